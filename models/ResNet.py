"""ResNet50, and ResNet50 with features of its middle."""

from collections.abc import Set

import torch
from torch import Tensor, nn
from torchvision.models import ResNet50_Weights, resnet50

import weights

__all__ = ['ResNet50', 'ResNet50M']


class ResNet50(nn.Module):
    """ResNet50 without its classifier; the feature is the global average of the last stage.

    He et al., Deep Residual Learning for Image Recognition, CVPR 2016, arXiv:1512.03385.

    (B, 3, H, W) -> eval: features (B, 2048); training: logits (B, num_classes), and features unless loss is {'xent'}.
    """

    feat_dim = 2048

    def __init__(self, num_classes: int, loss: Set[str] = frozenset({'xent'}), pretrained: str = 'none'):
        super().__init__()
        self.loss = loss
        self.base = nn.Sequential(*list(resnet50(weights=None).children())[:-2])  # conv1, bn1, relu, maxpool, 4 stages
        self.classifier = nn.Linear(self.feat_dim, num_classes)
        weights.pretrain(self, pretrained, ResNet50_Weights.IMAGENET1K_V1)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        f = self.base(x).mean((2, 3))  # (B, 2048)
        if not self.training:
            return f
        y = self.classifier(f)  # (B, num_classes)
        return y if self.loss == {'xent'} else (y, f)


class ResNet50M(nn.Module):
    """ResNet50 with features of the first two blocks of its last stage, fused, beside those of the third.

    Yu et al., The Devil is in the Middle: Exploiting Mid-level Representations for Cross-Domain Instance Matching,
    arXiv:1711.08106.

    (B, 3, H, W) -> eval: features (B, 3072); training: logits (B, num_classes), and features unless loss is {'xent'}.
    `fc_fuse` holds a BatchNorm1d: a training batch needs at least 2 images.
    """

    feat_dim = 3072

    def __init__(self, num_classes: int, loss: Set[str] = frozenset({'xent'}), pretrained: str = 'none'):
        super().__init__()
        self.loss = loss
        self.base = nn.Sequential(*list(resnet50(weights=None).children())[:-2])  # conv1, bn1, relu, maxpool, 4 stages
        self.fc_fuse = nn.Sequential(nn.Linear(4096, 1024), nn.BatchNorm1d(1024), nn.ReLU())
        self.classifier = nn.Linear(self.feat_dim, num_classes)
        weights.pretrain(self, pretrained, ResNet50_Weights.IMAGENET1K_V1)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        *stem, (block_a, block_b, block_c) = self.base
        for layer in stem:
            x = layer(x)
        x_a = block_a(x)  # (B, 2048, H/32, W/32)
        x_b = block_b(x_a)
        x_c = block_c(x_b)
        middle = self.fc_fuse(torch.cat((x_a.mean((2, 3)), x_b.mean((2, 3))), dim=1))  # (B, 4096) -> (B, 1024)
        f = torch.cat((x_c.mean((2, 3)), middle), dim=1)  # (B, 3072)
        if not self.training:
            return f
        y = self.classifier(f)  # (B, num_classes)
        return y if self.loss == {'xent'} else (y, f)
