"""The models: image -> logits and features. `init_model` builds one by its name."""

from collections.abc import Set

from torch import nn

from models.DenseNet import DenseNet121
from models.ResNet import ResNet50, ResNet50M
from runtime.errors import UserError

factory = {'resnet50': ResNet50, 'resnet50m': ResNet50M, 'densenet121': DenseNet121}

LOSSES = ({'xent'}, {'xent', 'htri'}, {'cent'}, {'xent', 'cent'})


def get_names() -> list[str]:
    """The names that `init_model` takes."""
    return list(factory)


def init_model(
    name: str, num_classes: int, loss: Set[str] = frozenset({'xent'}), pretrained: str = 'none'
) -> nn.Module:
    """Builds a model. In eval mode it returns features (B, feat_dim); in training logits (B, num_classes), and, unless
    `loss` is {'xent'}, (logits, features).

    name:       one of `get_names()`
    loss:       the losses that will be computed: {'xent'}, {'xent', 'htri'}, {'cent'} or {'xent', 'cent'}
    pretrained: 'none' for random weights, 'imagenet' for torchvision's (fetched once into its cache), or the path of a
                weight file; the classifier is random in any case

    Prints the name and the number of parameters, in millions. Raises UserError for an unknown name or loss, and for
    weights that cannot be had, read, or do not fit.
    """
    if name not in factory:
        raise UserError(f'unknown model {name!r}; choose one of {", ".join(get_names())}')
    if set(loss) not in LOSSES:
        known = ', '.join('{' + ', '.join(sorted(each)) + '}' for each in LOSSES)
        raise UserError(f'model {name} knows no loss {{{", ".join(sorted(loss))}}}; choose one of {known}')
    print(f'Initializing model: {name}')
    model = factory[name](num_classes, loss=loss, pretrained=pretrained)
    print(f'Model size: {sum(param.numel() for param in model.parameters()) / 1e6:.5f}M')
    return model
