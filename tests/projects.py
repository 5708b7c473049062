"""Networks of other projects, for the tests: rebuilt from torch's layers, with those projects' names.

Each follows the source of the project at the release that its docstring names. `tested` is the feature of its test,
`trained` are the logits and the feature of its training.
"""

import torch
from torch import nn
from torch.nn import functional as F
from torchvision.models import densenet121, resnet18, resnet34, resnet50, resnet101

NUM_CLASSES = 7
RESNETS = {18: resnet18, 34: resnet34, 50: resnet50, 101: resnet101}  # by their depth


def average(x):
    return x.flatten(2).mean(2)  # (B, D)


class Ibn(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.IN, self.BN = nn.InstanceNorm2d(channels // 2, affine=True), nn.BatchNorm2d(channels // 2)

    def forward(self, x):
        one, other = x.chunk(2, 1)
        return torch.cat([self.IN(one.contiguous()), self.BN(other.contiguous())], 1)


class Attention(nn.Module):
    """fast-reid's Non_local: the whole matrix of products of pixels."""

    def __init__(self, channels):
        super().__init__()
        self.g, self.theta, self.phi = nn.Conv2d(channels, 1, 1), nn.Conv2d(channels, 1, 1), nn.Conv2d(channels, 1, 1)
        self.W = nn.Sequential(nn.Conv2d(1, channels, 1), nn.BatchNorm2d(channels))

    def forward(self, x):
        theta = self.theta(x).flatten(2).transpose(1, 2)  # (B, N, 1)
        products = theta @ self.phi(x).flatten(2)  # (B, N, N)
        y = products / products.shape[-1] @ self.g(x).flatten(2).transpose(1, 2)  # (B, N, 1)
        return self.W(y.transpose(1, 2).reshape(len(x), 1, *x.shape[2:])) + x


class Backbone(nn.Module):
    """torchvision's names; stride: the last one; relu: in the stem; ceil: its pool."""

    def __init__(self, stride=1, relu=True, ceil=False, ibn=False, attention=False, fc=False, depth=50):
        super().__init__()
        whole = RESNETS[depth](weights=None)
        self.width = 2048 if depth >= 50 else 512
        for name in ('conv1', 'bn1', 'layer1', 'layer2', 'layer3', 'layer4'):
            setattr(self, name, getattr(whole, name))
        if stride == 1:
            first = self.layer4[0]  # whose second convolution is strided if it has three, else its first one
            (first.conv2 if depth >= 50 else first.conv1).stride = first.downsample[0].stride = (1, 1)
        if ibn:
            for block in [*self.layer1, *self.layer2, *self.layer3]:
                block.bn1 = Ibn(block.bn1.num_features)
        self.relu, self.ceil = relu, ceil
        if attention:
            self.NL_1, self.NL_4 = nn.ModuleList(), nn.ModuleList()
            self.NL_2 = nn.ModuleList(Attention(512) for _ in range(2))
            self.NL_3 = nn.ModuleList(Attention(1024) for _ in range(9 if depth == 101 else 3))
        if fc:
            self.fc = nn.Linear(self.width, 1000)

    def forward(self, x):
        x = self.bn1(self.conv1(x))
        if self.relu:
            x = x.relu()
        x = F.max_pool2d(x, 3, 2, 0 if self.ceil else 1, ceil_mode=self.ceil)
        for number in (1, 2, 3, 4):
            stage, attention = getattr(self, f'layer{number}'), list(getattr(self, f'NL_{number}', []))
            for index, block in enumerate(stage):
                x = block(x)
                left = len(stage) - index
                if left <= len(attention):
                    x = attention[len(attention) - left](x)
        return x


class StrongBaseline(nn.Module):
    """reid-strong-baseline, April 2020."""

    def __init__(self, ibn=False, depth=50):
        super().__init__()
        self.base = Backbone(relu=ibn, ibn=ibn, fc=ibn, depth=depth)
        self.bottleneck = nn.BatchNorm1d(self.base.width)
        self.classifier = nn.Linear(self.base.width, NUM_CLASSES, bias=False)

    def tested(self, x):
        return self.bottleneck(average(self.base(x)))

    def trained(self, x):
        feature = average(self.base(x))
        return self.classifier(self.bottleneck(feature)), feature


class WithoutNeck(nn.Module):
    """The same with NECK 'no'."""

    def __init__(self, depth=50):
        super().__init__()
        self.base = Backbone(relu=False, depth=depth)
        self.classifier = nn.Linear(self.base.width, NUM_CLASSES)

    def tested(self, x):
        return average(self.base(x))

    def trained(self, x):
        feature = self.tested(x)
        return self.classifier(feature), feature


class FastReid(nn.Module):
    """fast-reid; early: v0.1, else v1.0.0 (with `heads.classifier`) or v1.3.0 (heads.weight)."""

    def __init__(self, release='v1.3.0', pool='avg', attention=False, ibn=False, depth=50):
        super().__init__()
        early = release == 'v0.1'
        if release != 'v1.3.0':
            self.register_buffer('pixel_mean', 255 * torch.tensor([0.485, 0.456, 0.406]).view(1, -1, 1, 1))
            self.register_buffer('pixel_std', 255 * torch.tensor([0.229, 0.224, 0.225]).view(1, -1, 1, 1))
        self.backbone = Backbone(ceil=not early, ibn=ibn, attention=attention, depth=depth)
        self.heads, self.pool = nn.Module(), pool
        if pool == 'gemP':
            self.heads.pool_layer = nn.Module()
            self.heads.pool_layer.p = nn.Parameter(torch.tensor([3.7]))
        self.neck = nn.BatchNorm2d(self.backbone.width)
        self.weight = nn.Parameter(torch.randn(NUM_CLASSES, self.backbone.width) / 30)
        if early:
            self.heads.bnneck = self.neck
        else:
            self.heads.bottleneck = nn.Sequential(self.neck)
        if release == 'v1.3.0':
            self.heads.weight = self.weight
        else:
            self.heads.classifier = nn.Module()
            self.heads.classifier.weight = self.weight

    def state_dict(self, *args, **kwargs):
        return {k: v for k, v in super().state_dict(*args, **kwargs).items() if not k.startswith(('neck.', 'weight'))}

    def pooled(self, x):
        x = self.backbone(x)
        if self.pool == 'avg':
            return F.adaptive_avg_pool2d(x, 1)
        p = self.heads.pool_layer.p if self.pool == 'gemP' else 3.0
        return F.adaptive_avg_pool2d(x.clamp(min=1e-6).pow(p), 1).pow(1 / p)

    def tested(self, x):
        return self.neck(self.pooled(x))[..., 0, 0]

    def trained(self, x):
        pooled = self.pooled(x)
        return F.linear(self.neck(pooled)[..., 0, 0], self.weight), pooled[..., 0, 0]


class Head(nn.Module):
    """Person_reID_baseline_pytorch's ClassBlock; its dropout is left out, so that training can be compared."""

    def __init__(self, features, length=512):
        super().__init__()
        self.add_block = nn.Sequential(nn.Linear(features, length), nn.BatchNorm1d(length))
        self.classifier = nn.Sequential(nn.Linear(length, NUM_CLASSES))


class FtNet(nn.Module):
    """Person_reID_baseline_pytorch, v1.1.0."""

    def __init__(self, stride=2, ibn=False):
        super().__init__()
        self.model, self.classifier = Backbone(stride, ibn=ibn, fc=True), Head(2048)

    def tested(self, x):
        return self.classifier.add_block(average(self.model(x)))

    def trained(self, x):
        feature = self.tested(x)
        return self.classifier.classifier(feature), feature


class FtNetDense(FtNet):
    """The same: the features end in a normalisation, which is averaged."""

    def __init__(self, stride=2):
        nn.Module.__init__(self)
        self.model, self.classifier = densenet121(weights=None), Head(1024)
        self.model.features.transition3.pool.stride = stride

    def tested(self, x):
        return self.classifier.add_block(average(self.model.features(x)))


class Fc512(Backbone):
    """torchreid v1.4.0, resnet50_fc512."""

    def __init__(self):
        super().__init__(stride=1)
        self.fc = nn.Sequential(nn.Linear(2048, 512), nn.BatchNorm1d(512), nn.ReLU())
        self.classifier = nn.Linear(512, NUM_CLASSES)

    def tested(self, x):
        return self.fc(average(self(x)))

    def trained(self, x):
        feature = self.tested(x)
        return self.classifier(feature), feature


class DenseFc512(nn.Module):
    """torchreid v1.4.0, densenet121_fc512."""

    def __init__(self):
        super().__init__()
        self.features = densenet121(weights=None).features
        self.fc = nn.Sequential(nn.Linear(1024, 512), nn.BatchNorm1d(512), nn.ReLU())
        self.classifier = nn.Linear(512, NUM_CLASSES)

    def tested(self, x):
        return self.fc(average(self.features(x).relu()))

    trained = Fc512.trained


class Moco(nn.Module):
    """MoCo v2: query and key encoder, each with a projection, and the queue of keys."""

    def __init__(self):
        super().__init__()
        self.encoder_q, self.encoder_k = Backbone(stride=2), Backbone(stride=2)
        for encoder in (self.encoder_q, self.encoder_k):
            encoder.fc = nn.Sequential(nn.Linear(2048, 2048), nn.ReLU(), nn.Linear(2048, 128))
        self.register_buffer('queue', torch.randn(128, 16))
        self.register_buffer('queue_ptr', torch.zeros(1, dtype=torch.long))

    def tested(self, x):
        return average(self.encoder_q(x))


class Flat(nn.Module):
    """A block of pytorch-mobilenet-v2."""

    def __init__(self, channels, out, stride, ratio):
        super().__init__()
        wide = channels * ratio
        layers = [nn.Conv2d(channels, wide, 1, bias=False), nn.BatchNorm2d(wide), nn.ReLU6()] if ratio > 1 else []
        layers += [nn.Conv2d(wide, wide, 3, stride, 1, groups=wide, bias=False), nn.BatchNorm2d(wide), nn.ReLU6()]
        self.conv = nn.Sequential(*layers, nn.Conv2d(wide, out, 1, bias=False), nn.BatchNorm2d(out))
        self.residual = stride == 1 and channels == out

    def forward(self, x):
        return x + self.conv(x) if self.residual else self.conv(x)


class Tonylins(nn.Module):
    """pytorch-mobilenet-v2, October 2019."""

    def __init__(self, num_classes=1000):
        super().__init__()
        layers, channels = [self.layer(3, 32, 3, 2)], 32
        for ratio, out, number, stride in (
            (1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)
        ):  # fmt: skip
            for index in range(number):
                layers.append(Flat(channels, out, stride if index == 0 else 1, ratio))
                channels = out
        self.features = nn.Sequential(*layers, self.layer(channels, 1280, 1, 1))
        self.classifier = nn.Linear(1280, num_classes)

    @staticmethod
    def layer(channels, out, size, stride):
        convolution = nn.Conv2d(channels, out, size, stride, size // 2, bias=False)
        return nn.Sequential(convolution, nn.BatchNorm2d(out), nn.ReLU6())

    def tested(self, x):
        return self.features(x).mean(3).mean(2)

    trained = Fc512.trained


class Layer(nn.Module):
    """A convolution and what follows it, by torchreid's names."""

    def __init__(self, channels, out, size=1, stride=1, norm=nn.BatchNorm2d, relu=True):
        super().__init__()
        self.conv = nn.Conv2d(channels, out, size, stride, size // 2, bias=False)
        self.bn = norm(out, affine=True) if norm else None
        self.relu = relu

    def forward(self, x):
        x = self.conv(x)
        x = x if self.bn is None else self.bn(x)
        return x.relu() if self.relu else x


class Light(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 1, bias=False)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, groups=channels, bias=False)
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x):
        return self.bn(self.conv2(self.conv1(x))).relu()


class Stream(nn.Module):
    """Of osnet_ain: `layers`."""

    def __init__(self, channels, depth):
        super().__init__()
        self.layers = nn.Sequential(*(Light(channels) for _ in range(depth)))

    def forward(self, x):
        return self.layers(x)


class ScaleBlock(nn.Module):
    """ain: of osnet_ain.py, else of osnet.py; norm: none, 'sum' (behind the sum) or 'residual' (within it)."""

    def __init__(self, channels, out, norm, ain):
        super().__init__()
        middle = out // 4
        self.conv1, self.ain, self.norm = Layer(channels, middle), ain, norm
        if ain:
            self.conv2 = nn.ModuleList(Stream(middle, depth) for depth in (1, 2, 3, 4))
        else:
            self.conv2a = Light(middle)
            for name, depth in zip('bcd', (2, 3, 4), strict=True):
                setattr(self, f'conv2{name}', nn.Sequential(*(Light(middle) for _ in range(depth))))
        self.gate = nn.Module()
        self.gate.fc1, self.gate.fc2 = nn.Conv2d(middle, middle // 16, 1), nn.Conv2d(middle // 16, middle, 1)
        self.conv3 = Layer(middle, out, relu=False, norm=None if norm == 'residual' else nn.BatchNorm2d)
        self.downsample = Layer(channels, out, relu=False) if channels != out else None
        if norm:
            self.IN = nn.InstanceNorm2d(out, affine=True)

    def forward(self, x):
        before, total = self.conv1(x), 0
        for stream in self.conv2 if self.ain else (self.conv2a, self.conv2b, self.conv2c, self.conv2d):
            y = stream(before)
            gate = self.gate.fc2(self.gate.fc1(F.adaptive_avg_pool2d(y, 1)).relu())
            total = total + y * torch.sigmoid(gate)
        y = self.conv3(total)
        y = self.IN(y) if self.norm == 'residual' else y
        y = y + (x if self.downsample is None else self.downsample(x))
        return (self.IN(y) if self.norm == 'sum' else y).relu()


class OmniScale(nn.Module):
    """torchreid v1.4.0: osnet.py, and osnet_ain.py, whose transitions stand apart."""

    def __init__(self, width=1.0, norms=('', '', '', '', '', ''), ain=False, num_classes=NUM_CLASSES):
        super().__init__()
        stem, *widths = (int(width * channels) for channels in (64, 256, 384, 512))
        self.conv1 = Layer(3, stem, 7, 2, nn.InstanceNorm2d if any(norms) else nn.BatchNorm2d)
        self.ain, before = ain, stem
        for number, out in enumerate(widths):
            blocks = [ScaleBlock(before, out, norms[2 * number], ain), ScaleBlock(out, out, norms[2 * number + 1], ain)]
            if number < 2:
                transition = nn.Sequential(Layer(out, out), nn.AvgPool2d(2, 2))
                if ain:
                    setattr(self, f'pool{number + 2}', transition)
                else:
                    blocks.append(transition)
            setattr(self, f'conv{number + 2}', nn.Sequential(*blocks))
            before = out
        self.conv5 = Layer(before, before)
        self.fc = nn.Sequential(nn.Linear(before, 512), nn.BatchNorm1d(512), nn.ReLU())
        self.classifier = nn.Linear(512, num_classes)

    def tested(self, x):
        x = self.conv2(F.max_pool2d(self.conv1(x), 3, 2, 1))
        x = self.conv3(self.pool2(x) if self.ain else x)
        x = self.conv4(self.pool3(x) if self.ain else x)
        return self.fc(average(self.conv5(x)))

    trained = Fc512.trained
