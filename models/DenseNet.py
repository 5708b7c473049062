"""DenseNet121."""

from collections.abc import Set

import torch
from torch import Tensor, nn
from torchvision.models import DenseNet121_Weights, densenet121

from models.network import Network

__all__ = ['DenseNet121']

LAST_RELU = 'names features.* translated, last_relu set as in torchvision and torchreid'


class DenseNet121(Network):
    """DenseNet121 without its classifier; the feature is the global average of the last normalisation.

    Huang et al., Densely Connected Convolutional Networks, CVPR 2017, arXiv:1608.06993. The published weights were
    trained without the ReLU that torchvision and torchreid apply after that normalisation, so features may be negative.
    A model that loads weights of those projects applies it, and so do the files that it saves.
    """

    feat_dim = 1024
    smallest = 29  # least height and width in pixels: they are halved five times, the last three times rounding down
    imagenet = DenseNet121_Weights.IMAGENET1K_V1
    signature = ('base.norm5.weight', (1024,))
    absent = ('base.denseblock4.denselayer17.norm1.weight',)
    published = (
        (LAST_RELU, r'^features\.', 'base.'),
        ('dotted names of DenseNet translated', r'(\.denselayer\d+\.(?:norm|conv))\.([12])\.', r'\1\2.'),
    )
    options = ('last_relu',)

    last_relu: Tensor | None  # any tensor: ReLU after the last normalisation

    def __init__(self, num_classes: int, loss: Set[str] = frozenset({'xent'})):
        super().__init__(num_classes, loss)
        self.base = densenet121(weights=None).features
        self.register_buffer('last_relu', None)
        self.classifier = nn.Linear(self.feat_dim, num_classes)

    @classmethod
    def adapt(cls, state_dict: dict[str, Tensor], notes: Set[str]) -> None:
        if LAST_RELU in notes:
            state_dict['last_relu'] = torch.tensor(True)

    def maps(self, x: Tensor) -> Tensor:
        maps: Tensor = self.base(x)  # (B, 1024, H/32, W/32)
        if self.last_relu is not None:
            maps = maps.relu()
        return maps

    def keep_resolution(self) -> None:
        self.base.transition3.pool = nn.Identity()
