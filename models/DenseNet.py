"""DenseNet121."""

from collections.abc import Set

from torch import Tensor, nn
from torchvision.models import DenseNet121_Weights, densenet121

from models.layouts import EMBEDDING, FT_NET_DENSE, Layout, tested
from models.network import Network

# torchvision, and torchreid v1.4.0 (the same since v0.5.0), which has the same names
FEATURES = Layout(
    'names features.* translated, last_relu set as in torchvision and torchreid',
    ((r'^features\.', 'base.'),),
    marks=(r'^features\.',),
    lacks=(r'^fc\.',),
    sets=('last_relu',),
    made={'last_stride': 2},
    test=tested(),
)
FC512 = Layout(
    "torchreid's names features.* translated, last_relu set, its fc is the embedding here",
    ((r'^features\.', 'base.'), *EMBEDDING),
    marks=(r'^features\.', r'^fc\.0\.weight$'),
    sets=('last_relu',),
    made={'last_stride': 2},
    test=tested(),
)


class DenseNet121(Network):
    """DenseNet121 without its classifier; the feature is the global average of the last normalisation.

    Huang et al., Densely Connected Convolutional Networks, CVPR 2017, arXiv:1608.06993. The original's weights were
    trained without the ReLU that torchvision and torchreid apply after that normalisation, so features may be negative.
    A model that loads weights of these projects applies the ReLU, and records this in the files that it saves.
    """

    feat_dim = 1024
    smallest = 29  # minimum height and width: they are halved five times, the last three times rounding down
    imagenet = DenseNet121_Weights.IMAGENET1K_V1
    signature = ('base.norm5.weight', (1024,))
    absent = ('base.denseblock4.denselayer17.norm1.weight',)
    published = (FEATURES, FC512, FT_NET_DENSE)
    variants = (*Network.variants, 'last_relu', 'last_pool_overlaps')

    last_relu: Tensor | None  # any tensor: ReLU after the last normalisation
    last_pool_overlaps: Tensor | None  # any tensor: the pool of the last transition has stride 1

    def __init__(self, num_classes: int, loss: Set[str] = frozenset({'xent'})):
        super().__init__(num_classes, loss)
        self.base = densenet121(weights=None).features
        for variant in ('last_relu', 'last_pool_overlaps'):
            self.register_buffer(variant, None)
        self.classifier = nn.Linear(self.feat_dim, num_classes)

    def maps(self, x: Tensor) -> Tensor:
        pool, stride = self.base.transition3.pool, 2 if self.last_pool_overlaps is None else 1
        if getattr(pool, 'stride', stride) != stride:
            pool.stride = stride
        maps: Tensor = self.base(x)  # (B, 1024, H/32, W/32)
        if self.last_relu is not None:
            maps = maps.relu()
        return maps

    def keep_resolution(self) -> None:
        self.base.transition3.pool = nn.Identity()
