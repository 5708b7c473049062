"""The interface of a backbone, the properties that its class declares, pooling, and the neck."""

from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from batches.resizing import Normalisation
from models.layouts import Layout
from runtime.errors import UserError
from transforms import IMAGENET

if TYPE_CHECKING:
    from torchvision.models import WeightsEnum


@dataclass(frozen=True)
class WeightsFile:
    """A published file of weights; its name ends in the first digits of its SHA-256, as torch.hub expects.

    whose: what messages call the weights
    """

    url: str
    whose: ClassVar[str] = "the authors' ImageNet weights"

    def get_state_dict(self, **how: Any) -> dict[str, Tensor]:
        """Like the method of torchvision's WeightsEnum."""
        state_dict: dict[str, Tensor] = torch.hub.load_state_dict_from_url(self.url, **how)
        return state_dict

    def __str__(self) -> str:
        return self.url


LENGTHS = range(1, 4097)  # pixels of a side, and dimensions of a feature, that files of strangers may ask for


@dataclass(frozen=True)
class Training:
    """What is known about the training of weights.

    where:       their file, or a description, for messages
    of_imagenet: whether they were trained to classify ImageNet, not for re-ID
    options:     all options of the run that wrote the file, {} for files of other projects
    fingerprint: of the training data (`data_manager.fingerprint`), None if unknown
    num_pids:    number of training persons, None if the file has no classifier
    missing:     parameters that features depend on and the file lacks, so that they are random; '' if there are none
    arch:        architecture of the weights, '' if it is not one of this project
    project:     note on the layout of a file of another project, '' for files of this one
    test:        options of that project's test
    """

    where: str
    of_imagenet: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)
    fingerprint: str | None = None
    num_pids: int | None = None
    missing: str = ''
    arch: str = ''
    project: str = ''
    test: Mapping[str, Any] = field(default_factory=dict)


class Network(nn.Module):
    """A backbone with a classifier. A subclass computes `maps`, or, if it pools them itself, `features`, and overrides
    the attributes that differ.

    (B, 3, H, W) -> eval: features (B, feat_dim); training: logits (B, num_classes), and features unless loss is
    {'xent'}. With a neck (`add_neck`), tests and the classifier use the features behind it, and training returns those
    before it.

    Attributes:
        feat_dim: length of a feature.
        smallest: minimum height and width of an image, in pixels.
        narrowest_bf16: minimum width, in pixels, for which bf16 gives correct results on CPUs.
        faster_in_bf16: whether bf16 makes training faster on a CPU that multiplies it in hardware.
        normalisation: mean and standard deviation of RGB in [0, 1] for normalising images.
        interpolation: bilinear or bicubic, for resizing images.
        pools_itself: whether `features` ignores `pool`.
        imagenet: ImageNet weights for the backbone, or None.
        fresh: prefixes of parameters that the ImageNet weights lack, besides the classifier, pooling and neck.
        signature: name and shape of a tensor by which weights for this class are recognised.
        present: names of further tensors in these weights that related networks lack.
        absent: names that only the weights of related networks have.
        published: the layouts of other projects' files, see `models.layouts`.
        notice: a line to be reported with the network, such as the licence of its weights.
        variants: buffers that are None, and so not saved, unless weights of other projects need another computation.
        trained: what is known about the training of the loaded weights; None if none are loaded.
    """

    feat_dim: int
    smallest = 1
    narrowest_bf16 = 1
    faster_in_bf16 = True
    normalisation: Normalisation = IMAGENET
    interpolation = 'bilinear'
    pools_itself = False
    imagenet: 'WeightsEnum | WeightsFile | None' = None
    fresh: tuple[str, ...] = ()
    signature: tuple[str, tuple[int, ...]] = ('', ())
    present: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()
    published: tuple[Layout, ...] = ()
    notice = ''
    variants: tuple[str, ...] = ('embedding_linear',)
    trained: Training | None = None

    classifier: nn.Module
    embedding_linear: Tensor | None  # any tensor: no ReLU after the embedding

    def __init__(self, num_classes: int, loss: Set[str] = frozenset({'xent'})):
        super().__init__()
        self.num_classes, self.loss = num_classes, set(loss)
        self.pool: Callable[[Tensor], Tensor] = average
        self.embedding: nn.Module | None = None
        self.bottleneck: nn.Module | None = None
        self.neck_feature = 'after'  # feature at test: the neck's output; 'before': its input
        self.register_buffer('embedding_linear', None)
        self.made: dict[str, Any] = {}  # the arguments of init_model that decide what the network computes

    def maps(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, C, h, w); C is feat_dim unless `features` is overridden too."""
        raise NotImplementedError

    def features(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, feat_dim)."""
        return self.pool(self.maps(x))

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        f = self.features(x)  # (B, feat_dim), or the input of the embedding
        if self.embedding is not None:
            f = self.embedding(f)  # (B, feat_dim)
            if self.embedding_linear is None:
                f = f.relu()
        behind: Tensor = f if self.bottleneck is None else self.bottleneck(f)  # (B, feat_dim)
        if not self.training:
            return behind if self.neck_feature == 'after' else f
        y: Tensor = self.classifier(behind)  # (B, num_classes)
        return y if self.loss == {'xent'} else (y, f)

    def keep_resolution(self) -> None:
        """Set the last stride to 1, so that the last stage keeps the resolution of the stage before it and its maps are
        twice as high and wide. Sun et al., Beyond Part Models, ECCV 2018, arXiv:1711.09349.

        Does nothing if the last stage does not reduce the resolution.
        """

    def add_embedding(self, length: int) -> None:
        """Add a linear layer, batch normalisation and ReLU between the pooled maps and the classifier; changes
        `feat_dim`. Weights of networks without this ReLU set the variant `embedding_linear`.
        """
        self.embedding = nn.Sequential(nn.Linear(self.feat_dim, length), nn.BatchNorm1d(length))
        self.feat_dim = length
        self.classifier = nn.Linear(length, self.num_classes)

    def add_attention(self) -> None:
        """Add non-local blocks, in the networks that support them."""
        raise UserError(f'{type(self).__name__} has no non-local blocks')

    def add_neck(self) -> None:
        """Add BNNeck: batch normalisation without a shift between the feature and a classifier without a bias.

        Luo et al., Bag of Tricks and a Strong Baseline for Deep Person Re-identification, CVPRW 2019, arXiv:1903.07071.
        """
        self.bottleneck = nn.BatchNorm1d(self.feat_dim)
        self.bottleneck.bias.requires_grad_(False)  # remains 0
        self.classifier = nn.Linear(self.feat_dim, self.num_classes, bias=False)
        nn.init.normal_(self.classifier.weight, std=0.001)


def embed(network: nn.Module, images: Tensor, flip_test: bool) -> Tensor:
    """Features (B, feat_dim), float32, of (B, 3, H, W); with `flip_test` the mean of those of each image and its mirror
    image.
    """
    features: Tensor = network(images).float()
    return (features + network(images.flip(3)).float()) / 2 if flip_test else features


class Replacement(Network):
    """Computes another network's features by other means, such as a compiled graph; images are prepared as for it."""

    pools_itself = True

    def __init__(self, network: Network):
        super().__init__(num_classes=1)
        self.feat_dim, self.normalisation = network.feat_dim, network.normalisation
        self.interpolation = network.interpolation


def average(maps: Tensor) -> Tensor:
    """Global average pooling, (B, D, h, w) -> (B, D)."""
    return maps.mean((2, 3))


def maximum(maps: Tensor) -> Tensor:
    """Global maximum pooling, (B, D, h, w) -> (B, D)."""
    return maps.amax((2, 3))


class GeM(nn.Module):
    """Generalised mean of each map, (B, D, h, w) -> (B, D): average pooling for p = 1, maximum pooling for large p.

    Radenovic et al., Fine-tuning CNN Image Retrieval with No Human Annotation, TPAMI 2019, arXiv:1711.02512. p is
    learned and starts at 3. Values below 1e-6 count as 1e-6.
    """

    def __init__(self, p: float = 3.0):
        super().__init__()
        self.p = nn.Parameter(torch.tensor([p]))

    def forward(self, maps: Tensor) -> Tensor:
        powers = maps.float().clamp(min=1e-6) ** self.p  # in bf16 the powers would lose most of their digits
        return powers.mean((2, 3)) ** (1 / self.p)


POOLINGS: dict[str, Callable[[], Callable[[Tensor], Tensor]]] = {
    'avg': lambda: average,
    'max': lambda: maximum,
    'gem': GeM,
}
