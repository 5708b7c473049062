"""The models: image -> logits and features. `init_model` builds one by name."""

from collections.abc import Set

from models.DenseNet import DenseNet121
from models.network import Network
from models.ResNet import ResNet50, ResNet50M
from runtime.errors import UserError

factory: dict[str, type[Network]] = {'resnet50': ResNet50, 'resnet50m': ResNet50M, 'densenet121': DenseNet121}


def get_names() -> list[str]:
    """The names that `init_model` accepts."""
    return list(factory)


def init_model(name: str, num_classes: int, loss: Set[str] = frozenset({'xent'})) -> Network:
    """Builds a model with random weights. In eval mode it returns features (B, feat_dim); in training mode logits
    (B, num_classes), and, unless `loss` is {'xent'}, (logits, features).

    name: one of `get_names()`
    num_classes: number of training identities; 0, at a test without a training set, counts as 1
    loss: names of the losses that will be computed, any

    Prints the name and the number of parameters, in millions. Raises UserError for an unknown name.
    """
    if name not in factory:
        raise UserError(f'unknown model {name!r}; choose one of {", ".join(get_names())}')
    print(f'Initializing model: {name}')
    model = factory[name](max(num_classes, 1), loss)  # torch warns of a layer without outputs
    print(f'Model size: {sum(param.numel() for param in model.parameters()) / 1e6:.5f}M')
    return model
