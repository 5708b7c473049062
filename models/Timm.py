"""Networks of the library timm as backbones."""

import contextlib
import difflib
import functools
from collections.abc import Set
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from models.network import Network, WeightsFile
from models.ResNet import ResNet50
from runtime.errors import UserError, plain

PREFIX = 'timm:'  # timm:NAME


@dataclass(frozen=True)
class TimmWeights(WeightsFile):
    """The weights that timm downloads for a network, with position embeddings resampled to its image size."""

    name: str
    size: tuple[int, int]
    whose: ClassVar[str] = "timm's weights"

    def get_state_dict(self, **_: Any) -> dict[str, Tensor]:
        try:
            base = build(self.name, self.size, pretrained=True)
        except Exception as problem:  # of any type: another library downloads them
            reason = plain(' '.join(str(problem).split()), 300) or type(problem).__name__
            raise UserError(
                f'timm could not get the weights of {self.name} ({reason}); where there is a network, download them '
                f'from {self.url}, and copy them to the same place in ~/.cache/huggingface/hub, or use a checkpoint '
                'of this project with --pretrained PATH, or start from random weights with --pretrained none'
            ) from problem
        return {f'base.{name}': value for name, value in base.state_dict().items()}


class Timm(Network):
    """A network of timm. The feature is the input of timm's own classifier, so the network pools its maps itself.

    `named` creates a subclass for each network.
    """

    name: str
    size: tuple[int, int]
    pools_itself = True

    def __init__(self, num_classes: int, loss: Set[str] = frozenset({'xent'})):
        super().__init__(num_classes, loss)
        try:
            self.base = build(self.name, self.size)
            self.feat_dim = feat_dim(self.base, self.size)
        except (AssertionError, ValueError, RuntimeError) as problem:
            (height, width), reason = self.size, plain(' '.join(str(problem).split())) or type(problem).__name__
            raise UserError(f'{PREFIX}{self.name} cannot take images of {height}x{width} ({reason})') from problem
        self.classifier = nn.Linear(self.feat_dim, num_classes)

    def features(self, x: Tensor) -> Tensor:
        return pooled(self.base, x)


@functools.cache
def named(name: str, size: tuple[int, int] | None = None) -> type[Timm]:
    """The class of a network of timm, for images of `size` (height, width), by default the size of its weights.

    Raises:
        UserError: timm is not installed, or has no such network.
    """
    try:
        import timm  # optional
    except ImportError:
        raise UserError('it needs the package timm: pip install timm') from None
    config = None
    with contextlib.suppress(RuntimeError):  # a tag of weights that does not exist
        config = timm.get_pretrained_cfg(name) if timm.is_model(name.partition('.')[0]) else None
    if config is None:  # also of a name that timm has replaced
        near = difflib.get_close_matches(name, [*timm.list_models(), *timm.list_pretrained()], 5)
        also = f', such as {", ".join(near)}' if near else ''
        raise UserError(f'timm {timm.__version__} has no model {plain(name)!r}; see timm.list_models(){also}')
    interpolation = config.interpolation if config.interpolation in ('bilinear', 'bicubic') else 'bilinear'
    height, width = size or config.input_size[1:]
    address = f'https://huggingface.co/{config.hf_hub_id}' if config.hf_hub_id else str(config.url or '')
    convolutions = convolutions_of(name)
    properties = {
        'name': name,
        'size': (height, width),
        'notice': f'The weights that timm has for {name} have the licence {config.license or "unknown"}',
        'normalisation': (tuple(config.mean), tuple(config.std)),
        'interpolation': interpolation,
        'imagenet': TimmWeights(address, name, (height, width)) if address else None,
        'faster_in_bf16': not any(layer.groups == layer.in_channels > 1 for layer in convolutions),  # depthwise
        'narrowest_bf16': ResNet50.narrowest_bf16 if any(map(is_wrong_when_narrow, convolutions)) else 1,
    }
    return type('Timm', (Timm,), properties)


def build(name: str, size: tuple[int, int], pretrained: bool = False) -> nn.Module:
    """timm's network without its classifier. `size` is passed on if the network has a fixed input size."""
    import timm

    how: dict[str, Any] = {'pretrained': pretrained, 'num_classes': 0}
    try:
        model: nn.Module = timm.create_model(name, img_size=size, **how)
    except TypeError:  # a convolutional network takes any size
        model = timm.create_model(name, **how)
    return model


def pooled(base: nn.Module, x: Tensor) -> Tensor:
    """The features of timm's network (B, feat_dim), before the classifier."""
    features: Tensor = base.forward_head(base.forward_features(x), pre_logits=True)  # type: ignore[operator]  # methods
    return features


def feat_dim(base: nn.Module, size: tuple[int, int]) -> int:
    """The length of a feature, from an image of zeros. The network and torch's generator do not change."""
    was_training = base.training
    with torch.inference_mode():
        length = pooled(base.eval(), torch.zeros(1, 3, *size)).size(1)
    base.train(was_training)
    return length


def convolutions_of(name: str) -> list[nn.Conv2d]:
    """The convolutions of a network, without weights."""
    import timm

    with torch.device('meta'):
        model = timm.create_model(name, num_classes=0)
    return [module for module in model.modules() if isinstance(module, nn.Conv2d)]


def is_wrong_when_narrow(layer: nn.Conv2d) -> bool:
    """Whether it is a convolution as in the last stage of ResNet50, which gives wrong results on some CPUs."""
    return layer.kernel_size == (3, 3) and layer.stride == (2, 2) and layer.groups == 1 and layer.in_channels >= 512
