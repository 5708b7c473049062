"""ResNet50, and ResNet50 with mid-level features."""

from collections.abc import Set

import torch
from torch import Tensor, nn
from torchvision.models import ResNet50_Weights, resnet50

from models.network import Network

__all__ = ['ResNet50', 'ResNet50M']

TORCHVISION = "torchvision's names translated"
NAMES = (
    (TORCHVISION, r'^conv1\.', 'base.0.'),
    (TORCHVISION, r'^bn1\.', 'base.1.'),
    *((TORCHVISION, rf'^layer{stage}\.', f'base.{stage + 3}.') for stage in (1, 2, 3, 4)),
    (TORCHVISION, r'^fc\.(weight|bias)$', r'classifier.\1'),
)
SECOND = "second names of ResNet50M's layers merged"
SECOND_NAMES = (
    (SECOND, r'^layers1\.', 'base.'),
    (SECOND, r'^layers2\.1\.', 'base.4.'),
    (SECOND, r'^layers3\.', 'base.5.'),
    (SECOND, r'^layers4\.', 'base.6.'),
    *((SECOND, rf'^layers5{block}\.', f'base.7.{number}.') for number, block in enumerate('abc')),
)
FUSED_FIRST = "torchreid's resnet50mid translated, the columns of its classifier put in the order of ResNet50M"


def backbone() -> nn.Sequential:
    """conv1, bn1, relu, maxpool and the four stages."""
    return nn.Sequential(*list(resnet50(weights=None).children())[:-2])


class ResNet50(Network):
    """ResNet50 without its classifier; the feature is the global average of the last stage.

    He et al., Deep Residual Learning for Image Recognition, CVPR 2016, arXiv:1512.03385.
    """

    feat_dim = 2048
    narrowest_bf16 = 33  # for narrower images the CPU's bf16 convolutions of the last stage return garbage
    imagenet = ResNet50_Weights.IMAGENET1K_V1
    signature = ('base.7.2.conv3.weight', (2048, 512, 1, 1))
    absent = ('base.6.6.conv1.weight', 'fc_fuse.0.weight', 'fc_fusion.0.weight')  # of ResNet101, ResNet50M, resnet50mid
    published = NAMES

    def __init__(self, num_classes: int, loss: Set[str] = frozenset({'xent'})):
        super().__init__(num_classes, loss)
        self.base = backbone()
        self.classifier = nn.Linear(self.feat_dim, num_classes)

    def features(self, x: Tensor) -> Tensor:
        maps: Tensor = self.base(x)  # (B, 2048, H/32, W/32)
        return maps.mean((2, 3))


class ResNet50M(Network):
    """ResNet50 whose feature is that of the last stage's third block, followed by the fused features of the first two.

    Yu et al., The Devil is in the Middle: Exploiting Mid-level Representations for Cross-Domain Instance Matching,
    arXiv:1711.08106.

    torchreid's resnet50mid has the 1024 fused features first. When its weights are loaded, the columns of the
    classifier are put in the order of this class: logits are equal, and the two parts of the features are exchanged.

    `fc_fuse` contains a BatchNorm1d: a training batch needs at least 2 images.
    """

    feat_dim = 3072
    narrowest_bf16 = ResNet50.narrowest_bf16
    imagenet = ResNet50_Weights.IMAGENET1K_V1
    fresh = ('fc_fuse.',)
    signature = ('fc_fuse.0.weight', (1024, 4096))
    absent = ('base.6.6.conv1.weight',)
    published = (*SECOND_NAMES, *NAMES, (FUSED_FIRST, r'^fc_fusion\.', 'fc_fuse.'))

    def __init__(self, num_classes: int, loss: Set[str] = frozenset({'xent'})):
        super().__init__(num_classes, loss)
        self.base = backbone()
        self.fc_fuse = nn.Sequential(nn.Linear(4096, 1024), nn.BatchNorm1d(1024), nn.ReLU())
        self.classifier = nn.Linear(self.feat_dim, num_classes)

    @classmethod
    def adapt(cls, state_dict: dict[str, Tensor], notes: Set[str]) -> None:
        columns = state_dict.get('classifier.weight')  # (num_classes, 3072)
        if FUSED_FIRST in notes and columns is not None and columns.shape[1:] == (cls.feat_dim,):
            state_dict['classifier.weight'] = torch.cat((columns[:, 1024:], columns[:, :1024]), dim=1)

    def features(self, x: Tensor) -> Tensor:
        *stem, last = self.base
        block_a, block_b, block_c = last.children()
        for layer in stem:
            x = layer(x)
        x_a = block_a(x)  # (B, 2048, H/32, W/32)
        x_b = block_b(x_a)
        x_c = block_c(x_b)
        middle = self.fc_fuse(torch.cat((x_a.mean((2, 3)), x_b.mean((2, 3))), dim=1))  # (B, 4096) -> (B, 1024)
        return torch.cat((x_c.mean((2, 3)), middle), dim=1)  # (B, 3072)
