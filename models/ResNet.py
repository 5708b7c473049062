"""ResNets, ResNet50 with mid-level features, ResNet50 with instance normalisation, and non-local blocks."""

from collections.abc import Callable, Set
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
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

from models.layouts import RESNET, RESNETS, RESNETS_IBN, Layout, tested
from models.network import Network, WeightsFile

# Layouts in which the original, and torchreid v1.4.0 (unchanged since v0.5.0), save these networks
SECOND_NAMES = Layout(
    "second names of ResNet50M's layers merged",
    (
        (r'^layers1\.', 'base.'),
        (r'^layers2\.1\.', 'base.4.'),
        (r'^layers3\.', 'base.5.'),
        (r'^layers4\.', 'base.6.'),
        *((rf'^layers5{block}\.', f'base.7.{number}.') for number, block in enumerate('abc')),
    ),
    marks=(r'^layers1\.',),
    made={'last_stride': 2},
)


def fused_last(state_dict: dict[str, Tensor]) -> dict[str, Any]:
    columns = state_dict.get('classifier.weight')  # (num_classes, 3072)
    if columns is not None and columns.shape[1:] == (3072,):
        state_dict['classifier.weight'] = torch.cat((columns[:, 1024:], columns[:, :1024]), dim=1)
    return {}


FUSED_FIRST = Layout(
    "torchreid's resnet50mid translated, the columns of its classifier put in the order of ResNet50M",
    (*RESNET, (r'^fc_fusion\.', 'fc_fuse.')),
    marks=(r'^conv1\.weight$', r'^fc_fusion\.'),
    adapt=fused_last,
    made={'last_stride': 2},
    test=tested(),
)


LAST_OF_34 = 'base.7.2.conv1.weight'  # ResNet18 has two blocks in its last stage
LAST_OF_101 = 'base.6.6.conv1.weight'  # ResNet50 has six blocks in its third stage
OF_RESNET_IBN = 'base.4.0.bn1.IN.weight'


def backbone(build: Callable[..., ResNet]) -> nn.Sequential:
    """conv1, bn1, relu, maxpool and the four stages."""
    return nn.Sequential(*list(build(weights=None).children())[:-2])


class NonLocal(nn.Module):
    """Non-local block whose pairwise function is the product of two embeddings, divided by the number of pixels.

    Wang et al., Non-local Neural Networks, CVPR 2018, arXiv:1711.07971. As in fast-reid, the embeddings have one
    channel, and the layers have the same names. Before training it is the identity.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.g, self.theta, self.phi = (nn.Conv2d(channels, 1, 1) for _ in range(3))
        self.W = nn.Sequential(nn.Conv2d(1, channels, 1), nn.BatchNorm2d(channels))
        nn.init.zeros_(self.W[1].weight)  # type: ignore[arg-type]  # of a BatchNorm2d

    def forward(self, x: Tensor) -> Tensor:
        g, theta, phi = (layer(x).flatten(2) for layer in (self.g, self.theta, self.phi))  # (B, 1, h * w)
        context = phi @ g.transpose(1, 2) / g.size(2)  # (B, 1, 1)
        attended: Tensor = self.W((context @ theta).view(x.size(0), 1, *x.shape[2:])) + x  # (B, C, h, w)
        return attended


# The number of blocks at the end of each stage that are followed by a non-local block
ATTENDED = {'resnet50': (0, 2, 3, 0), 'resnet101': (0, 2, 9, 0)}


class ResNet50(Network):
    """ResNet50 without its classifier; the feature is the global average of the last stage.

    He et al., Deep Residual Learning for Image Recognition, CVPR 2016, arXiv:1512.03385.

    Weights of networks with a different stem set the variants `stem_linear`: no ReLU after the first normalisation; and
    `stem_ceil`: the pool has no padding and includes partial windows (ceil_mode).
    """

    build: Callable[..., ResNet] = staticmethod(resnet50)
    feat_dim = 2048
    narrowest_bf16 = 33  # for narrower images some CPUs' bf16 convolutions in the last stage are wrong
    imagenet = ResNet50_Weights.IMAGENET1K_V1
    signature: tuple[str, tuple[int, ...]] = ('base.7.2.conv3.weight', (2048, 512, 1, 1))
    absent: tuple[str, ...] = (
        LAST_OF_101,
        OF_RESNET_IBN,
        'fc_fuse.0.weight',
        'fc_fusion.0.weight',
    )  # the last two of ResNet50M, resnet50mid
    published: tuple[Layout, ...] = RESNETS
    variants = (*Network.variants, 'stem_linear', 'stem_ceil')

    stem_linear: Tensor | None
    stem_ceil: Tensor | None

    def __init__(self, num_classes: int, loss: Set[str] = frozenset({'xent'})):
        super().__init__(num_classes, loss)
        self.base = backbone(self.build)
        self.non_local: nn.ModuleDict | None = None  # number of a stage -> its non-local blocks
        self.classifier = nn.Linear(self.feat_dim, num_classes)
        for variant in ('stem_linear', 'stem_ceil'):
            self.register_buffer(variant, None)

    def maps(self, x: Tensor) -> Tensor:
        conv, norm, relu, pool, *stages = self.base
        x = norm(conv(x))
        if self.stem_linear is None:
            x = relu(x)
        x = pool(x) if self.stem_ceil is None else F.max_pool2d(x, 3, 2, ceil_mode=True)
        for number, stage in enumerate(stages, 1):
            if self.non_local is None or str(number) not in self.non_local:
                x = stage(x)
                continue
            attention, blocks = list(self.non_local[str(number)].children()), list(stage.children())
            for index, block in enumerate(blocks, len(attention) - len(blocks)):
                x = block(x)
                if index >= 0:
                    x = attention[index](x)
        return x  # (B, feat_dim, H/32, W/32), or with last stride 1 (B, feat_dim, H/16, W/16)

    def add_attention(self) -> None:
        """Add non-local blocks after the last blocks of the second and third stage, as in fast-reid's AGW.

        Ye et al., Deep Learning for Person Re-identification: A Survey and Outlook, TPAMI 2021, arXiv:2001.04193.
        """
        counts = ATTENDED.get(self.build.__name__)
        if counts is None:
            return super().add_attention()
        channels = [256 * 2**number for number in range(4)]
        self.non_local = nn.ModuleDict({
            str(number): nn.ModuleList(NonLocal(width) for _ in range(count))
            for number, (width, count) in enumerate(zip(channels, counts, strict=True), 1) if count
        })  # fmt: skip

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
    absent = (LAST_OF_34, OF_RESNET_IBN)


class ResNet34(ResNet50):
    """ResNet34, otherwise like ResNet50."""

    build = staticmethod(resnet34)
    feat_dim = 512
    imagenet = ResNet34_Weights.IMAGENET1K_V1
    signature = ('base.7.2.conv2.weight', (512, 512, 3, 3))
    absent = ('base.7.2.conv3.weight', OF_RESNET_IBN)


class ResNet101(ResNet50):
    """ResNet101, otherwise like ResNet50."""

    build = staticmethod(resnet101)
    imagenet = ResNet101_Weights.IMAGENET1K_V1
    signature = ('base.6.22.conv3.weight', (1024, 256, 1, 1))
    absent = ('base.6.23.conv3.weight', OF_RESNET_IBN)


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
    signature = (OF_RESNET_IBN, (32,))
    present = ('base.7.2.conv3.weight',)  # unlike ResNet34-IBN-a
    absent = (LAST_OF_101, 'base.4.2.IN.weight')  # ResNet101-IBN-a, IBN-b
    published = RESNETS_IBN

    def __init__(self, num_classes: int, loss: Set[str] = frozenset({'xent'})):
        super().__init__(num_classes, loss)
        for stage in self.base[4:7]:
            for block in stage.children():
                block.bn1 = IBN(block.get_submodule('bn1').num_features)  # type: ignore[arg-type]  # of a BatchNorm2d


class ResNet50M(Network):
    """ResNet50 whose feature is the output of the last stage's third block and the fused outputs of its first two.

    Yu et al., The Devil is in the Middle: Exploiting Mid-level Representations for Cross-Domain Instance Matching,
    arXiv:1711.08106.

    In torchreid's resnet50mid the 1024 fused features come first. When its weights are loaded, the columns of the
    classifier are reordered for this class: logits are equal, but the two parts of the features are swapped.

    `fc_fuse` contains a BatchNorm1d: a training batch needs at least 2 images.
    """

    feat_dim = 3072
    narrowest_bf16 = ResNet50.narrowest_bf16
    imagenet = ResNet50_Weights.IMAGENET1K_V1
    fresh = ('fc_fuse.',)
    signature = ('fc_fuse.0.weight', (1024, 4096))
    absent = (LAST_OF_101, OF_RESNET_IBN)
    published = (SECOND_NAMES, FUSED_FIRST)

    def __init__(self, num_classes: int, loss: Set[str] = frozenset({'xent'})):
        super().__init__(num_classes, loss)
        self.base = backbone(resnet50)
        self.fc_fuse = nn.Sequential(nn.Linear(4096, 1024), nn.BatchNorm1d(1024), nn.ReLU())
        self.classifier = nn.Linear(self.feat_dim, num_classes)

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
