"""ResNets, ResNet50 with mid-level features, and ResNet50 with instance normalisation."""

from collections.abc import Callable, Set

import torch
from torch import Tensor, nn
from torchvision.models import (
    ResNet,
    ResNet18_Weights,
    ResNet34_Weights,
    ResNet50_Weights,
    ResNet101_Weights,
    resnet18,
    resnet34,
    resnet50,
    resnet101,
)
from torchvision.models.resnet import BasicBlock

from models.network import Network, WeightsFile

__all__ = ['ResNet18', 'ResNet34', 'ResNet50', 'ResNet50IBN', 'ResNet50M', 'ResNet101']

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


LAST_OF_34 = 'base.7.2.conv1.weight'  # ResNet18 has two blocks in its last stage
LAST_OF_101 = 'base.6.6.conv1.weight'  # ResNet50 has six blocks in its third stage
OF_IBN = 'base.4.0.bn1.IN.weight'


def backbone(build: Callable[..., ResNet]) -> nn.Sequential:
    """conv1, bn1, relu, maxpool and the four stages."""
    return nn.Sequential(*list(build(weights=None).children())[:-2])


class ResNet50(Network):
    """ResNet50 without its classifier; the feature is the global average of the last stage.

    He et al., Deep Residual Learning for Image Recognition, CVPR 2016, arXiv:1512.03385.
    """

    build: Callable[..., ResNet] = staticmethod(resnet50)
    feat_dim = 2048
    narrowest_bf16 = 33  # for narrower images the CPU's bf16 convolutions of the last stage return garbage
    imagenet = ResNet50_Weights.IMAGENET1K_V1
    signature: tuple[str, tuple[int, ...]] = ('base.7.2.conv3.weight', (2048, 512, 1, 1))
    absent: tuple[str, ...] = (
        LAST_OF_101,
        OF_IBN,
        'fc_fuse.0.weight',
        'fc_fusion.0.weight',
    )  # the last two of ResNet50M, resnet50mid
    published = NAMES

    def __init__(self, num_classes: int, loss: Set[str] = frozenset({'xent'})):
        super().__init__(num_classes, loss)
        self.base = backbone(self.build)
        self.classifier = nn.Linear(self.feat_dim, num_classes)

    def maps(self, x: Tensor) -> Tensor:
        maps: Tensor = self.base(x)  # (B, feat_dim, H/32, W/32)
        return maps

    def keep_resolution(self) -> None:
        first = next(self.base[-1].children())  # block of the last stage
        strided = 'conv1' if isinstance(first, BasicBlock) else 'conv2'
        for name in (strided, 'downsample.0'):
            first.get_submodule(name).stride = (1, 1)  # type: ignore[assignment]  # of a convolution


class ResNet18(ResNet50):
    """ResNet18, otherwise like ResNet50."""

    build = staticmethod(resnet18)
    feat_dim = 512
    imagenet = ResNet18_Weights.IMAGENET1K_V1
    signature = ('base.7.1.conv2.weight', (512, 512, 3, 3))
    absent = (LAST_OF_34, OF_IBN)


class ResNet34(ResNet50):
    """ResNet34, otherwise like ResNet50."""

    build = staticmethod(resnet34)
    feat_dim = 512
    imagenet = ResNet34_Weights.IMAGENET1K_V1
    signature = ('base.7.2.conv2.weight', (512, 512, 3, 3))
    absent = ('base.7.2.conv3.weight', OF_IBN)


class ResNet101(ResNet50):
    """ResNet101, otherwise like ResNet50."""

    build = staticmethod(resnet101)
    imagenet = ResNet101_Weights.IMAGENET1K_V1
    signature = ('base.6.22.conv3.weight', (1024, 256, 1, 1))
    absent = ('base.6.23.conv3.weight', OF_IBN)


class IBN(nn.Module):
    """Instance normalisation of the first half of the channels, batch normalisation of the others."""

    def __init__(self, channels: int):
        super().__init__()
        self.first = channels // 2
        self.IN = nn.InstanceNorm2d(self.first, affine=True)
        self.BN = nn.BatchNorm2d(channels - self.first)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((self.IN(x[:, : self.first]), self.BN(x[:, self.first :])), dim=1)


class ResNet50IBN(ResNet50):
    """ResNet50-IBN-a: IBN replaces the first batch normalisation of each block in the first three stages.

    Pan et al., Two at Once: Enhancing Learning and Generalization Capacities via IBN-Net, ECCV 2018, arXiv:1807.09441.
    """

    smallest = 17  # instance normalisation needs more than one pixel in the third stage
    imagenet = WeightsFile('https://github.com/XingangPan/IBN-Net/releases/download/v1.0/resnet50_ibn_a-d9d0bb7b.pth')
    signature = (OF_IBN, (32,))
    absent = (LAST_OF_101, 'base.4.2.IN.weight')  # ResNet101-IBN-a, IBN-b

    def __init__(self, num_classes: int, loss: Set[str] = frozenset({'xent'})):
        super().__init__(num_classes, loss)
        for stage in self.base[4:7]:
            for block in stage.children():
                block.bn1 = IBN(block.get_submodule('bn1').num_features)  # type: ignore[arg-type]  # of a BatchNorm2d


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
    absent = (LAST_OF_101, OF_IBN)
    published = (*SECOND_NAMES, *NAMES, (FUSED_FIRST, r'^fc_fusion\.', 'fc_fuse.'))

    def __init__(self, num_classes: int, loss: Set[str] = frozenset({'xent'})):
        super().__init__(num_classes, loss)
        self.base = backbone(resnet50)
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
        middle = self.fc_fuse(torch.cat((self.pool(x_a), self.pool(x_b)), dim=1))  # (B, 4096) -> (B, 1024)
        return torch.cat((self.pool(x_c), middle), dim=1)  # (B, 3072)

    keep_resolution = ResNet50.keep_resolution
