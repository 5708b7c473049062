"""MobileNetV2."""

from collections.abc import Set

from torch import Tensor, nn
from torchvision.models import MobileNet_V2_Weights, mobilenet_v2

from models.layouts import Layout
from models.network import Network

TORCHVISION_MOBILENET = Layout(
    "torchvision's names translated",
    ((r'^features\.', 'base.'), (r'^classifier\.1\.', 'classifier.')),
    marks=(r'^features\.1\.conv\.0\.0\.',),
)
# pytorch-mobilenet-v2 of October 2019: its blocks are not nested
FLAT = {0: '0.0', 1: '0.1', 3: '1.0', 4: '1.1', 6: '2', 7: '3'}  # layer of a block -> its name in torchvision
FIRST = {0: '0.0', 1: '0.1', 3: '1', 4: '2'}  # the same for the first block, which does not expand
TONYLINS = Layout(
    'names of pytorch-mobilenet-v2 (tonylins) translated',
    (
        *((rf'^features\.1\.conv\.{layer}\.', f'base.1.conv.{name}.') for layer, name in FIRST.items()),
        *((rf'^features\.(\d+)\.conv\.{layer}\.', rf'base.\1.conv.{name}.') for layer, name in FLAT.items()),
        (r'^features\.', 'base.'),
    ),
    marks=(r'^features\.2\.conv\.7\.',),
)


class MobileNetV2(Network):
    """MobileNetV2 without its classifier; the feature is the global average of the last convolution.

    Sandler et al., MobileNetV2: Inverted Residuals and Linear Bottlenecks, CVPR 2018, arXiv:1801.04381.
    """

    feat_dim = 1280
    faster_in_bf16 = False  # depthwise convolutions
    imagenet = MobileNet_V2_Weights.IMAGENET1K_V1
    signature = ('base.18.0.weight', (1280, 320, 1, 1))
    published = (TORCHVISION_MOBILENET, TONYLINS)

    def __init__(self, num_classes: int, loss: Set[str] = frozenset({'xent'})):
        super().__init__(num_classes, loss)
        self.base = mobilenet_v2(weights=None).features
        self.classifier = nn.Linear(self.feat_dim, num_classes)

    def maps(self, x: Tensor) -> Tensor:
        maps: Tensor = self.base(x)  # (B, 1280, H/32, W/32)
        return maps

    def keep_resolution(self) -> None:
        self.base[14].conv[1][0].stride = (1, 1)  # the first depthwise convolution of the last stage
