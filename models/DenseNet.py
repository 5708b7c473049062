"""DenseNet121."""

from collections.abc import Set

from torch import Tensor, nn
from torchvision.models import DenseNet121_Weights, densenet121

import weights

__all__ = ['DenseNet121']


class DenseNet121(nn.Module):
    """DenseNet121 without its classifier; the feature is the global average of the last normalisation.

    Huang et al., Densely Connected Convolutional Networks, CVPR 2017, arXiv:1608.06993. The published weights were
    trained without the ReLU that torchvision puts behind that normalisation: features may be negative. Weights of
    torchreid's densenet121 were trained with it; the model that they are loaded into has it, and so have its files.

    (B, 3, H, W) -> eval: features (B, 1024); training: logits (B, num_classes), and features unless loss is {'xent'}.
    """

    feat_dim = 1024
    options = ('last_relu',)  # buffers that foreign weights set
    smallest = 29  # pixels of a side: halved five times, the last three rounding down

    def __init__(self, num_classes: int, loss: Set[str] = frozenset({'xent'}), pretrained: str = 'none'):
        super().__init__()
        self.loss = loss
        self.base = densenet121(weights=None).features
        self.register_buffer('last_relu', None)  # a tensor, whatever its value: ReLU behind the last normalisation
        self.classifier = nn.Linear(self.feat_dim, num_classes)
        weights.pretrain(self, pretrained, DenseNet121_Weights.IMAGENET1K_V1)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x = self.base(x)  # (B, 1024, H/32, W/32)
        if self.last_relu is not None:
            x = x.relu()
        f = x.mean((2, 3))  # (B, 1024)
        if not self.training:
            return f
        y = self.classifier(f)  # (B, num_classes)
        return y if self.loss == {'xent'} else (y, f)
