"""Networks of the library timm, as backbones."""

import difflib
from collections.abc import Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from models.network import Network, WeightsFile
from runtime.errors import UserError, plain

__all__ = ['PREFIX', 'Timm', 'named']

PREFIX = 'timm:'  # timm:NAME


@dataclass(frozen=True)
class TimmWeights(WeightsFile):
    """The weights that timm downloads for a network, with position embeddings resampled to its image size."""

    name: str
    size: tuple[int, int]

    def get_state_dict(self, **_: Any) -> dict[str, Tensor]:
        try:
            base = build(self.name, self.size, pretrained=True)
        except Exception as problem:  # of any type: another library looks for them on the network
            raise OSError(f'timm: {problem}') from problem
        return {f'base.{name}': value for name, value in base.state_dict().items()}


class Timm(Network):
    """A network of timm. The feature is what its own classifier would receive, so it pools its maps itself.

    A subclass for each network is made by `named`.
    """

    name: str
    size: tuple[int, int]
    pools_itself = True

    def __init__(self, num_classes: int, loss: Set[str] = frozenset({'xent'})):
        super().__init__(num_classes, loss)
        self.base = build(self.name, self.size)
        was_training = self.base.training
        with torch.inference_mode():
            self.feat_dim = self.eval().features(torch.zeros(1, 3, *self.size)).size(1)
        self.train(was_training)
        self.classifier = nn.Linear(self.feat_dim, num_classes)

    def features(self, x: Tensor) -> Tensor:
        features: Tensor = self.base.forward_head(self.base.forward_features(x), pre_logits=True)  # type: ignore[operator]  # methods of timm's networks
        return features


def named(name: str, size: tuple[int, int] | None = None) -> type[Timm]:
    """The class of a network of timm, for images of `size` (height, width), by default of the size of its weights.

    Raises:
        UserError: timm is not installed, or has no such network.
    """
    try:
        import timm  # optional
    except ImportError:
        raise UserError(f'-a {PREFIX}{name} needs the package timm: pip install timm') from None
    if not timm.is_model(name.partition('.')[0]):
        near = difflib.get_close_matches(name, timm.list_models(), 5)
        also = f', such as {", ".join(near)}' if near else ''
        raise UserError(
            f'-a {PREFIX}{plain(name)}: timm {timm.__version__} has no such model; see timm.list_models(){also}'
        )
    config = timm.get_pretrained_cfg(name)
    assert config is not None  # only for models that are not registered
    interpolation = config.interpolation if config.interpolation in ('bilinear', 'bicubic') else 'bilinear'
    height, width = size or config.input_size[1:]
    address = f'https://huggingface.co/{config.hf_hub_id}' if config.hf_hub_id else str(config.url or '')
    properties = {
        'name': name,
        'size': (height, width),
        'licence': config.license or 'unknown',
        'normalisation': (tuple(config.mean), tuple(config.std)),
        'interpolation': interpolation,
        'imagenet': TimmWeights(address, name, (height, width)) if address else None,
        'faster_in_bf16': not is_depthwise(name),
    }
    return type('Timm', (Timm,), properties)


def build(name: str, size: tuple[int, int], pretrained: bool = False) -> nn.Module:
    """timm's network without its classifier. `size` is given if the network has one.

    Raises:
        UserError: the network cannot take images of this size.
    """
    import timm

    def create(**how: Any) -> nn.Module:
        model: nn.Module = timm.create_model(name, pretrained=pretrained, num_classes=0, **how)
        return model

    try:
        return create(img_size=size)
    except TypeError:  # a convolutional network takes any size
        return create()
    except (AssertionError, ValueError, RuntimeError) as problem:
        if pretrained:
            raise
        reason = plain(' '.join(str(problem).split())) or type(problem).__name__
        raise UserError(f'-a {PREFIX}{name} cannot take images of {size[0]}x{size[1]} ({reason})') from problem


def is_depthwise(name: str) -> bool:
    """Whether the network has depthwise convolutions, which CPUs compute more slowly in bf16 than in float32."""
    import timm

    with torch.device('meta'):
        model = timm.create_model(name, num_classes=0)
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    return any(module.groups == module.in_channels > 1 for module in convolutions)
