"""The interface of a backbone, and the properties that its class declares."""

from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from transforms import IMAGENET, Normalisation

if TYPE_CHECKING:
    from torchvision.models import WeightsEnum

Renaming = tuple[str, str, str]  # a note on it, a pattern, and its replacement


@dataclass(frozen=True)
class Training:
    """What is known of the training of weights.

    where:       their file, or what they are, for messages
    of_imagenet: they were trained to classify ImageNet, not for re-ID
    options:     all options of the run that wrote the file, {} if it was not of this project
    fingerprint: of its data set (`data_manager.fingerprint`), None if unknown
    num_pids:    of its data set, None if the file has no classifier
    random:      the parameters of features that are missing, '' if none is
    """

    where: str
    of_imagenet: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)
    fingerprint: str | None = None
    num_pids: int | None = None
    random: str = ''


class Network(nn.Module):
    """A backbone with a classifier. A subclass computes `features` and overrides the attributes that differ.

    (B, 3, H, W) -> eval: features (B, feat_dim); training: logits (B, num_classes), and features unless loss is
    {'xent'}.

    Attributes:
        feat_dim: length of a feature.
        smallest: least height and width of an image, in pixels.
        narrowest_bf16: least width, in pixels, for which bf16 gives correct results on CPUs.
        normalisation: mean and standard deviation of RGB in [0, 1] with which images are normalised.
        imagenet: torchvision's ImageNet weights for the backbone, or None.
        fresh: prefixes of parameters that the ImageNet weights lack, besides the classifier.
        signature: name and shape of a tensor by which weights for this class are recognised.
        absent: names that only the weights of related networks have.
        published: other names of the tensors in published files.
        options: buffers that are None, and therefore not saved, unless foreign weights need a different computation.
        trained: what is known of the training of the weights that were loaded; None before any are.
    """

    feat_dim: int
    smallest = 1
    narrowest_bf16 = 1
    normalisation: Normalisation = IMAGENET
    imagenet: 'WeightsEnum | None' = None
    fresh: tuple[str, ...] = ()
    signature: tuple[str, tuple[int, ...]] = ('', ())
    absent: tuple[str, ...] = ()
    published: tuple[Renaming, ...] = ()
    options: tuple[str, ...] = ()
    trained: Training | None = None

    classifier: nn.Module

    def __init__(self, num_classes: int, loss: Set[str] = frozenset({'xent'})):
        super().__init__()
        self.num_classes, self.loss = num_classes, set(loss)

    @classmethod
    def adapt(cls, state_dict: dict[str, Tensor], notes: Set[str]) -> None:
        """Change renamed weights in place if the network they come from computes differently.

        notes: those of the renamings that were used
        """

    def features(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, feat_dim)."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        f = self.features(x)  # (B, feat_dim)
        if not self.training:
            return f
        y: Tensor = self.classifier(f)  # (B, num_classes)
        return y if self.loss == {'xent'} else (y, f)
