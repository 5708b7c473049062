"""The models: image -> logits and features. `init_model` builds one by name."""

from collections.abc import Callable, Set
from typing import Any

from models import Timm
from models.DenseNet import DenseNet121
from models.MobileNet import MobileNetV2
from models.network import POOLINGS, Network
from models.OSNet import (
    OSNet,
    OSNet025,
    OSNet050,
    OSNet075,
    OSNetAIN,
    OSNetAIN025,
    OSNetAIN050,
    OSNetAIN075,
    OSNetIBN,
)
from models.ResNet import ResNet18, ResNet34, ResNet50, ResNet50IBN, ResNet50M, ResNet101
from runtime.errors import UserError

factory: dict[str, type[Network]] = {
    'resnet50': ResNet50,
    'resnet50m': ResNet50M,
    'densenet121': DenseNet121,
    'resnet18': ResNet18,
    'resnet34': ResNet34,
    'resnet101': ResNet101,
    'resnet50_ibn_a': ResNet50IBN,
    'mobilenet_v2': MobileNetV2,
    'osnet_x1_0': OSNet,
    'osnet_x0_75': OSNet075,
    'osnet_x0_5': OSNet050,
    'osnet_x0_25': OSNet025,
    'osnet_ibn_x1_0': OSNetIBN,
    'osnet_ain_x1_0': OSNetAIN,
    'osnet_ain_x0_75': OSNetAIN075,
    'osnet_ain_x0_5': OSNetAIN050,
    'osnet_ain_x0_25': OSNetAIN025,
}


def get_names() -> list[str]:
    """The names that `init_model` accepts, besides timm:NAME for any network of the library timm."""
    return list(factory)


def network_of(name: str, size: tuple[int, int] | None = None) -> type[Network]:
    """The class of a model, by its name.

    size: height and width of the images; needed only for networks of timm

    Raises:
        UserError: there is no such model, or it needs timm, which is not installed.
    """
    if name.startswith(Timm.PREFIX):
        return Timm.named(name.removeprefix(Timm.PREFIX), size)
    if name not in factory:
        raise UserError(f'there is no model {name!r}; choose one of {", ".join(get_names())}, or timm:NAME')
    return factory[name]


def init_model(
    name: str,
    num_classes: int,
    loss: Set[str] = frozenset({'xent'}),
    *,
    last_stride: int = 2,
    neck: bool = False,
    pooling: str = 'avg',
    size: tuple[int, int] | None = None,
    report: Callable[[str], object] = print,
    **more: Any,
) -> Network:
    """Builds a model with random weights. In eval mode it returns features (B, feat_dim); in training mode logits
    (B, num_classes), and, unless `loss` is {'xent'}, (logits, features).

    name:        one of `get_names()`, or timm:NAME
    num_classes: number of training identities; 0, in a test without a training set, counts as 1
    loss:        {'xent'} if only logits are needed in training, else any other set of names
    last_stride: 1 keeps the resolution in the last stage, see `Network.keep_resolution`
    neck:        add BNNeck, see `Network.add_neck`
    pooling:     of the maps: 'avg', 'max', or 'gem' (`models.network.GeM`)
    size:        height and width of the images, for networks of timm
    report:      called with each line, in place of print
    more:        arguments for networks of other projects, see `assemble`

    Prints the name and the number of parameters, in millions. Raises UserError for an unknown name, or if a pooling is
    given for a network that does its own pooling.
    """
    network = network_of(name, size)
    report(f'Initializing model: {name}')
    if network.notice:
        report(network.notice)
    if pooling != 'avg' and network.pools_itself:
        raise UserError(f'{name} pools its maps itself: leave out pooling={pooling!r}')
    model = assemble(network, num_classes, loss, last_stride=last_stride, neck=neck, pooling=pooling, **more)
    report(f'Model size: {sum(param.numel() for param in model.parameters()) / 1e6:.5f}M')
    return model


RECORDED = ('last_stride', 'neck', 'pooling')  # in every checkpoint; other parts only if the network has them
DEFAULT_PARTS = {
    'last_stride': 2, 'neck': False, 'pooling': 'avg', 'embedding': 0, 'non_local': False, 'neck_feature': 'after'
}  # fmt: skip


def assemble(network: type[Network], num_classes: int, loss: Set[str], **parts: Any) -> Network:
    """A network of a class with the parts described in `init_model`, and those of other projects:

    embedding:    length of the feature after a linear layer, see `Network.add_embedding`
    non_local:    add non-local blocks, see `ResNet50.add_attention`
    neck_feature: 'before' if the feature at test is the input of the neck
    """
    parts = {**DEFAULT_PARTS, **parts}
    model = network(max(num_classes, 1), loss)  # torch warns about layers without outputs
    model.made = {name: value for name, value in parts.items() if name in RECORDED or value != DEFAULT_PARTS[name]}
    if parts['last_stride'] == 1:
        model.keep_resolution()
    if parts['non_local']:
        model.add_attention()
    if parts['pooling'] != 'avg':
        model.pool = POOLINGS[parts['pooling']]()
    if parts['embedding']:
        model.add_embedding(parts['embedding'])
    if parts['neck']:
        model.add_neck()
    model.neck_feature = parts['neck_feature']
    return model
