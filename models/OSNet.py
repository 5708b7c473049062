"""OSNet, with or without instance normalisation (IBN, AIN)."""

from collections.abc import Sequence, Set
from dataclasses import replace

from torch import Tensor, nn
from torch.nn import functional as F

from models.layouts import Layout, tested
from models.network import Network

OF_OSNET_IBN, OF_OSNET_AIN = 'conv2.0.IN.weight', 'conv2.0.conv2.0.layers.0.conv1.weight'
# torchreid (deep-person-reid v1.4.0), which has the same names
TORCHREID_OSNET = Layout("torchreid's names", marks=(r'^conv5\.conv\.weight$',), made={'last_stride': 2}, test=tested())
TORCHREID_OSNET_AIN = replace(TORCHREID_OSNET, test=tested('cosine'))
SCALES = 4  # streams of a block, of 1, 2, 3 and 4 convolutions, with receptive fields of 3, 5, 7 and 9


class Convolution(nn.Module):
    """Convolution, normalisation, ReLU. The layers are named as in the published weights."""

    def __init__(self, channels: int, out: int, size: int = 1, stride: int = 1, instance_norm: bool = False):
        super().__init__()
        self.conv = nn.Conv2d(channels, out, size, stride, size // 2, bias=False)
        self.bn = nn.InstanceNorm2d(out, affine=True) if instance_norm else nn.BatchNorm2d(out)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class Linear1x1(nn.Module):
    """1x1 convolution and, unless `norm` is False, batch normalisation, without a ReLU."""

    def __init__(self, channels: int, out: int, norm: bool = True):
        super().__init__()
        self.conv = nn.Conv2d(channels, out, 1, bias=False)
        self.bn = nn.BatchNorm2d(out) if norm else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return x if self.bn is None else self.bn(x)


class Lite3x3(nn.Module):
    """A 3x3 convolution factorised into a 1x1 and a depthwise 3x3 one; batch normalisation, ReLU."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 1, bias=False)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv2(self.conv1(x))))


class Gate(nn.Module):
    """Multiplies each channel by a sigmoid that depends on the global averages of all channels."""

    def __init__(self, channels: int):
        super().__init__()
        self.fc1 = nn.Conv2d(channels, channels // 16, 1)
        self.fc2 = nn.Conv2d(channels // 16, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        weights = F.relu(self.fc1(x.mean((2, 3), keepdim=True)))  # (B, C/16, 1, 1)
        weighted: Tensor = x * self.fc2(weights).sigmoid()
        return weighted


class OSBlock(nn.Module):
    """Residual block of four streams, which are weighted by a shared gate and summed.

    instance_norm: none; 'after' the addition of the residual (IBN); or 'inside' the residual (AIN)
    ain:           whether names and streams are those of the AIN networks
    """

    def __init__(self, channels: int, out: int, instance_norm: str = '', ain: bool = False):
        super().__init__()
        middle = out // 4
        self.conv1 = Convolution(channels, middle)
        streams = [nn.Sequential(*(Lite3x3(middle) for _ in range(depth))) for depth in range(1, SCALES + 1)]
        if ain:
            self.conv2 = nn.ModuleList(nn.ModuleDict({'layers': stream}) for stream in streams)
            self.streams = [f'conv2.{number}.layers' for number in range(SCALES)]
        else:
            self.conv2a = streams[0][0]
            self.conv2b, self.conv2c, self.conv2d = streams[1:]
            self.streams = ['conv2a', 'conv2b', 'conv2c', 'conv2d']
        self.gate = Gate(middle)
        self.conv3 = Linear1x1(middle, out, norm=instance_norm != 'inside')
        self.downsample = Linear1x1(channels, out) if channels != out else None
        self.IN = nn.InstanceNorm2d(out, affine=True) if instance_norm else None
        self.inside = instance_norm == 'inside'

    def forward(self, x: Tensor) -> Tensor:
        reduced = self.conv1(x)  # (B, out/4, h, w)
        first, *others = (self.gate(self.get_submodule(stream)(reduced)) for stream in self.streams)
        for other in others:
            first = first + other
        residual = self.conv3(first)  # (B, out, h, w)
        if self.IN is not None and self.inside:
            residual = self.IN(residual)
        total = residual + (x if self.downsample is None else self.downsample(x))
        if self.IN is not None and not self.inside:
            total = self.IN(total)
        return F.relu(total)


def halved(channels: int) -> nn.Sequential:
    """A 1x1 convolution, then 2x2 average pooling."""
    return nn.Sequential(Convolution(channels, channels), nn.AvgPool2d(2, 2))


class OSNet(Network):
    """OSNet x1.0; the feature is the global average of the maps after a linear layer, batch normalisation and ReLU.

    Zhou et al., Omni-Scale Feature Learning for Person Re-Identification, ICCV 2019, arXiv:1905.00953. Parameters are
    named as in the published weights. The last stage has the resolution of the stage before it.

    The feature contains a BatchNorm1d: a training batch needs at least 2 images.
    """

    channels: Sequence[int] = (64, 256, 384, 512)
    norms: Sequence[Sequence[str]] = (('', ''), ('', ''), ('', ''))  # of the two blocks in each stage, see OSBlock
    ain = False
    feat_dim = 512
    smallest = 13  # halved four times, the last two times rounding down
    faster_in_bf16 = False  # depthwise convolutions
    signature: tuple[str, tuple[int, ...]] = ('conv5.conv.weight', (512, 512, 1, 1))
    absent: tuple[str, ...] = (OF_OSNET_IBN, OF_OSNET_AIN)
    published = (TORCHREID_OSNET,)

    def __init__(self, num_classes: int, loss: Set[str] = frozenset({'xent'})):
        super().__init__(num_classes, loss)
        stem, *widths = self.channels
        self.conv1 = Convolution(3, stem, 7, 2, instance_norm=self.norms[0][0] != '')
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.conv2, self.conv3, self.conv4 = (
            nn.Sequential(OSBlock(before, out, norms[0], self.ain), OSBlock(out, out, norms[1], self.ain))
            for before, out, norms in zip(self.channels, widths, self.norms, strict=False)
        )
        if self.ain:
            self.pool2, self.pool3 = map(halved, widths[:2])
        else:
            self.conv2.append(halved(widths[0]))
            self.conv3.append(halved(widths[1]))
        self.conv5 = Convolution(widths[-1], widths[-1])
        self.fc = nn.Sequential(nn.Linear(widths[-1], self.feat_dim), nn.BatchNorm1d(self.feat_dim), nn.ReLU())
        self.classifier = nn.Linear(self.feat_dim, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode='fan_out', nonlinearity='relu')
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.01)
            if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def maps(self, x: Tensor) -> Tensor:
        x = self.conv2(self.maxpool(self.conv1(x)))
        x = self.conv3(self.pool2(x) if self.ain else x)
        maps: Tensor = self.conv5(self.conv4(self.pool3(x) if self.ain else x))  # (B, channels[-1], H/16, W/16)
        return maps

    def features(self, x: Tensor) -> Tensor:
        features: Tensor = self.fc(super().features(x))
        return features


class OSNet075(OSNet):
    """OSNet x0.75: three quarters of the channels."""

    channels = (48, 192, 288, 384)
    signature = ('conv5.conv.weight', (384, 384, 1, 1))


class OSNet050(OSNet):
    """OSNet x0.5: half of the channels."""

    channels = (32, 128, 192, 256)
    signature = ('conv5.conv.weight', (256, 256, 1, 1))


class OSNet025(OSNet):
    """OSNet x0.25: a quarter of the channels."""

    channels = (16, 64, 96, 128)
    signature = ('conv5.conv.weight', (128, 128, 1, 1))


class OSNetIBN(OSNet):
    """OSNet-IBN x1.0: instance normalisation in the first layer and behind the blocks of the first stage.

    After Pan et al., ECCV 2018, arXiv:1807.09441, in the variant of torchreid.
    """

    norms = (('after', 'after'), ('', ''), ('', ''))
    signature = (OF_OSNET_IBN, (256,))
    absent = (OF_OSNET_AIN,)


class OSNetAIN(OSNet):
    """OSNet-AIN x1.0: instance normalisation in the first layer and inside the residuals of four of the blocks.

    Zhou et al., Learning Generalisable Omni-Scale Representations for Person Re-Identification, TPAMI 2021,
    arXiv:1910.06827.
    """

    ain = True
    smallest = 29  # instance normalisation needs more than one pixel in the last stage
    norms = (('inside', 'inside'), ('', 'inside'), ('inside', ''))
    signature = (OF_OSNET_AIN, (64, 64, 1, 1))
    absent = ()
    published = (TORCHREID_OSNET_AIN,)


class OSNetAIN075(OSNetAIN):
    """OSNet-AIN x0.75: three quarters of the channels."""

    channels = (48, 192, 288, 384)
    signature = (OF_OSNET_AIN, (48, 48, 1, 1))


class OSNetAIN050(OSNetAIN):
    """OSNet-AIN x0.5: half of the channels."""

    channels = (32, 128, 192, 256)
    signature = (OF_OSNET_AIN, (32, 32, 1, 1))


class OSNetAIN025(OSNetAIN):
    """OSNet-AIN x0.25: a quarter of the channels."""

    channels = (16, 64, 96, 128)
    signature = (OF_OSNET_AIN, (16, 16, 1, 1))
