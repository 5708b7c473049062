"""What a backbone is to the rest of the house, and what its class says of itself."""

from collections.abc import Set
from typing import TYPE_CHECKING

from torch import Tensor, nn

from transforms import IMAGENET, Normalisation

if TYPE_CHECKING:
    from torchvision.models import WeightsEnum

Renaming = tuple[str, str, str]  # a note on it, a pattern, and its replacement


class Network(nn.Module):
    """A backbone with a classifier. A subclass computes `features`, and says what is not as usual.

    (B, 3, H, W) -> eval: features (B, feat_dim); training: logits (B, num_classes), and features unless loss is
    {'xent'}.

    Attributes:
        feat_dim: length of a feature.
        smallest: pixels of a side that an image needs.
        narrowest_bf16: pixels of width from which on bf16 is right on CPUs.
        normalisation: mean and standard deviation of RGB in [0, 1] that images are normalised with.
        imagenet: torchvision's ImageNet weights for the backbone; None: there are none.
        fresh: prefixes of what ImageNet's weights do not have, beside the classifier.
        signature: name and shape of a tensor by which weights are known to be for this class.
        absent: names that only the weights of relatives have.
        published: other names that the world's files have for the tensors.
        options: buffers that are None, and so in no file, unless foreign weights compute in another way.
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

    classifier: nn.Module

    def __init__(self, num_classes: int, loss: Set[str] = frozenset({'xent'})):
        super().__init__()
        self.num_classes, self.loss = num_classes, set(loss)

    @classmethod
    def adapt(cls, state_dict: dict[str, Tensor], notes: Set[str]) -> None:
        """Change renamed weights in place where the network they come from computes in another way.

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
