"""Translates weights of any project to this project's names, and loads them into a model."""

import math
import re
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

import models
from models.layouts import ASSUMPTIONS, FLAGS, OF_TIMM, OF_WEIGHTS, OWN_WITH_NECK, Layout
from models.network import LENGTHS, Network
from runtime.errors import UserError, plain
from transforms import IMAGENET


class Named(NamedTuple):
    """Weights under this project's names.

    notes:  what was renamed, left out or changed
    layout: the layout of the file; None if its names are those of this project or of an unknown one
    test:   options of the project's test, including those recorded in this file only
    """

    state_dict: dict[str, Tensor]
    notes: list[str]
    layout: Layout | None = None
    test: Mapping[str, Any] = {}


WRAPPER_PREFIX = re.compile(r'^(?:module\.|_orig_mod\.)+')  # of nn.DataParallel and of torch.compile
OF_THE_ORIGINAL = re.compile(r'(?:base|layers\d[abc]?|fc_fuse)\.')
OF_POSITIONS = re.compile(r'pos_embed|rel_pos|relative_position')  # of timm's transformers, for images of one size
DOTTED = re.compile(r'(\.denselayer\d+\.(?:norm|conv))\.([12])\.')  # of DenseNet, up to PyTorch 0.3
OF_OTHERS = re.compile(r'(?:conv1|bn1|layer\d|fc|fc_fusion|features)\.')
HEAD_PARTS = ('bottleneck.', 'pool.', 'embedding', 'non_local.')  # parts that are missing in weights of a backbone


def tensors_of(entries: Mapping[Any, Any], where: str) -> dict[str, Tensor]:
    """The loaded object, checked to be a state dict. Raises UserError for an entry that is not a named tensor."""
    for key, value in entries.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            fault = f'a {type(value).__name__}, not a tensor' if isinstance(key, str) else 'not the name of a tensor'
            raise UserError(
                f'{where} contains no weights: {plain(str(key))} is {fault}; give a state dict, or a checkpoint '
                f"with one under 'state_dict'"
            )
        if value.is_floating_point() and value.ndim > 1 and not value.numel():  # the network would be of this shape
            raise UserError(
                f'{where}: {plain(key)} has no elements, only the shape {tuple(value.shape)}; get the file again'
            )
    return {key: value.detach() for key, value in entries.items()}


def project_of(entries: Mapping[str, Any], target: Container[str]) -> str:
    """The `project` of ASSUMPTIONS whose module names are in a state dict, '' if none.

    torch.save stores the names of all modules, including those without weights: timm's activations are named act1, and
    reid-strong-baseline has a pool named gap. If all names, apart from the head's, are those of the target network, the
    file belongs to it.

    target: the names of the target network's weights; empty if there is no network yet
    """
    # torch's private place for the versions of modules, which it keeps in the file: only their names are read here. No
    # public function returns them, and a file without this attribute merely leaves the question open.
    modules = getattr(entries, '_metadata', None)
    names = {WRAPPER_PREFIX.sub('', str(name)) for name in modules} if isinstance(modules, dict) else set()
    if 'gap' in names:
        return 'reid-strong-baseline'
    keys = (WRAPPER_PREFIX.sub('', key) for key in entries)
    of_target = all(key in target or key.startswith(('classifier.', *HEAD_PARTS)) for key in keys)
    return 'timm' if 'base.act1' in names or of_target else ''


def normalised(state_dict: Mapping[str, Tensor], where: str, seen: str = '', asked: str = '') -> Named:
    """Names used by any published model -> this project's names, and notes on what was renamed.

    A model's class lists the layouts in which it is published. Prefixes are always removed; other names are unchanged
    if no layout makes them fit one of the classes, or if they are those of a network of timm.

    seen, asked: `project` of ASSUMPTIONS, as found in the file and as given by the user, which has precedence; '' if
        unknown

    Raises UserError if a tensor occurs twice with different values, or if names of the original are mixed with those of
    torchvision or torchreid, because the network of the weights is then unknown.
    """
    notes = []
    unprefixed = _renamed(state_dict, lambda key: WRAPPER_PREFIX.sub('', key), where)
    if unprefixed.keys() != state_dict.keys():
        notes.append('prefix module. or _orig_mod. removed')
    original, other = (next(filter(names.match, unprefixed), None) for names in (OF_THE_ORIGINAL, OF_OTHERS))
    if original and other:
        raise UserError(
            f'{where} mixes the names of two projects, {plain(original)} and {plain(other)}, which compute '
            f'differently; get the file as it was published'
        )
    undotted = _renamed(unprefixed, lambda key: DOTTED.sub(r'\1\2.', key), where)
    if undotted.keys() != unprefixed.keys():
        notes.append('dotted names of DenseNet translated')
    names = '\n'.join(undotted)
    for network in models.factory.values():
        for layout in network.published:
            if not _fits(layout, names):
                continue
            unused = [key for key in undotted if layout.unused and re.search(layout.unused, key)]
            used = {key: value for key, value in undotted.items() if key not in unused}
            if not _is_for(network, {_translated(key, layout): value for key, value in used.items()}):
                continue
            if 'project' in layout.assumed:
                if (asked or seen) == 'timm':
                    layout = replace(OF_TIMM, assumed={'project': asked} if asked else {})
                    return Named(undotted, [*notes, layout.note], layout)
                if seen and not asked:
                    kept = {name: value for name, value in layout.assumed.items() if name != 'project'}
                    layout = replace(layout, assumed=kept)
            ours = _renamed(used, lambda key, layout=layout: _translated(key, layout), where)  # type: ignore[misc]
            ours |= dict.fromkeys(layout.sets, torch.tensor(True))
            test = {**layout.test, **layout.adapt(ours)}
            if not _is_normalisation(*test.get('normalisation', IMAGENET)):
                raise UserError(f'{where} has a pixel_mean or pixel_std that cannot be used; get the file again')
            left_out = [f'not used by its test and left out: {listed(unused, most=3)}'] if unused else []
            return Named(ours, [*notes, layout.note, *left_out], layout, test)
    return Named(undotted, notes)


def _is_normalisation(mean: Iterable[float], std: Iterable[float]) -> bool:
    return all(map(math.isfinite, (*mean, *std))) and min(std) > 0


def _fits(layout: Layout, names: str) -> bool:
    """names: one per line"""
    marked, lacking = (
        [re.search(pattern, names, re.MULTILINE) is not None for pattern in patterns]
        for patterns in (layout.marks, layout.lacks)
    )
    return all(marked) and not any(lacking)


def _translated(key: str, layout: Layout) -> str:
    for pattern, replacement in layout.names:
        key = re.sub(pattern, replacement, key)
    return key


def _renamed(state_dict: Mapping[str, Tensor], rename: Callable[[str], str], where: str) -> dict[str, Tensor]:
    result: dict[str, Tensor] = {}
    for key, value in state_dict.items():
        name = rename(key)
        other = result.setdefault(name, value)
        form, other_form = (value.shape, value.stride(), value.dtype), (other.shape, other.stride(), other.dtype)
        if form != other_form or not (other.data_ptr() == value.data_ptr() or torch.equal(other, value)):
            raise UserError(f'{where} contains {plain(name)} twice with different values; get the file again')
    return result


def settled(
    named: Named, chosen: Mapping[str, str], where: str, recorded: bool = False
) -> tuple[dict[str, Tensor], dict[str, Any], list[str]]:
    """Decide what a file does not record: as `chosen`, otherwise as its layout assumes.

    recorded: the file is of this project and contains the arguments of `models.init_model`

    Returns the weights, arguments of `models.init_model`, and the assumptions as NAME=VALUE.

    Raises:
        UserError: an assumption is unknown, or does not apply to the file.
    """
    state_dict = dict(named.state_dict)
    has_neck = 'bottleneck.weight' in state_dict
    default = OWN_WITH_NECK if has_neck and not recorded else Layout('')
    layout = named.layout or default
    assumed = {name: value for name, value in layout.assumed.items() if has_neck or name != 'neck_feature'}
    for name, value in chosen.items():
        if name not in ASSUMPTIONS or value not in ASSUMPTIONS[name]:
            choices = ', '.join(f'{name}={"|".join(values)}' for name, values in ASSUMPTIONS.items())
            raise UserError(f'--assume {plain(name)}={plain(value)}: must be one of {choices}')
        if name not in assumed:
            known = ', '.join(assumed) or 'nothing else'
            raise UserError(f'--assume {name}: it does not apply to {where}; {known} can be assumed')
    values = {**assumed, **chosen}
    made: dict[str, Any] = dict(layout.made)
    for name, value in values.items():
        if flag := FLAGS.get((name, value)):
            state_dict[flag] = torch.tensor(True)
        elif name not in OF_WEIGHTS:
            made[name] = int(value) if value.isdigit() else value
    if made.get('pooling') == 'gem':
        state_dict.setdefault('pool.p', torch.tensor([3.0]))
    return state_dict, made, [f'{name}={value}' for name, value in values.items()]


def parts(state_dict: Mapping[str, Tensor]) -> dict[str, Any]:
    """The arguments of `models.assemble` that names and shapes of weights show."""
    embedding = state_dict.get('embedding.0.weight')
    seen: dict[str, Any] = {'neck': 'bottleneck.weight' in state_dict}
    if 'pool.p' in state_dict:
        seen['pooling'] = 'gem'
    if embedding is not None and embedding.ndim == 2 and len(embedding) in LENGTHS:
        seen['embedding'] = len(embedding)
    if any(key.startswith('non_local.') for key in state_dict):
        seen['non_local'] = True
    return seen


def arch_of(state_dict: Mapping[str, Tensor]) -> str | None:
    """The architecture that fits the names and shapes of weights, None if it is not one of this project."""
    return next((arch for arch, network in models.factory.items() if _is_for(network, state_dict)), None)


def _is_for(network: type[Network], state_dict: Mapping[str, Tensor]) -> bool:
    name, shape = network.signature
    known = name in state_dict and state_dict[name].shape == shape
    return (
        known
        and all(other in state_dict for other in network.present)
        and not any(other in state_dict for other in network.absent)
    )


def load_into(
    model: Network, state_dict: Mapping[str, Tensor], *, allow_other_classifier: bool, where: str
) -> list[str]:
    """Copies weights into a model, all or none; returns notices, to be printed, about what was left out.

    Names, shapes and data types are compared before anything is copied. Missing `num_batches_tracked` are accepted,
    because PyTorch 0.3 had none, and a fixed momentum does not use them. With `allow_other_classifier`, a missing
    classifier or one of a different size is accepted with a notice, and the model keeps its own. Anything else that is
    missing, unexpected or of a different shape raises UserError, which lists it and guesses the weights' architecture.

    A model's `variants` are the names of buffers that are None, and therefore not saved, unless the network of the
    weights computes differently; the weights determine which of them are set.

    where: the file, for the messages
    """
    target = model.state_dict()
    for variant in model.variants:
        target.pop(variant, None)
        if variant in state_dict:
            target[variant] = torch.tensor(True, device=next(model.parameters()).device)
    missing = [key for key in target if key not in state_dict and not key.endswith('.num_batches_tracked')]
    unexpected = [key for key in state_dict if key not in target]
    unlike = [key for key in target if key in state_dict and not _alike(key, state_dict[key], target[key])]
    classifier = [key for key in unlike if key.startswith('classifier.')]
    absent = [key for key in target if key.startswith('classifier.')]
    if allow_other_classifier and absent and set(absent) <= set(missing):
        missing = [key for key in missing if key not in absent]
    else:
        absent = []

    if missing or unexpected or unlike != classifier:
        faults = [
            f'missing {listed(missing)}' if missing else '',
            f'unexpected {listed(unexpected)}' if unexpected else '',
            f'different shapes in {listed(_shapes(key, state_dict, target) for key in unlike)}' if unlike else '',
        ]
        arch, own_arch = arch_of(state_dict), arch_of(target)
        larger = [key for key in unlike if key not in classifier]
        if larger and not (missing or unexpected) and all(map(OF_POSITIONS.search, larger)):
            guess = 'it was trained with images of another size: give its --height and --width'
        elif arch is None:
            guess = 'it does not look like an architecture of this project'
            if 'base.conv1.weight' in unexpected:
                guess = 'it may be of a network of timm: give its name, -a timm:NAME'
        elif 'stem_linear' in unexpected and 'base.conv1.weight' in missing:
            guess = 'if it is also of a network of timm, give --assume project=timm'
        elif arch == own_arch:
            guess = f"it looks like a {arch} that differs from this project's"
        else:
            guess = f'it looks like a {arch}: try --arch {arch}'
        raise UserError(f'{where} does not fit the model: {"; ".join(filter(None, faults))}; {guess}')
    others = listed(_shapes(key, state_dict, target) for key in classifier)
    if classifier and not allow_other_classifier:
        raise UserError(
            f'{where} has a classifier for a different number of identities: {others}; '
            f'test it with --evaluate, or start from its other weights with --resume-weights-only'
        )
    if broken := [key for key, value in state_dict.items() if not bool(value.isfinite().all())]:
        raise UserError(f'{where} has weights that are not finite, in {listed(broken)}; get the file again')
    for variant in model.variants:
        setattr(model, variant, target.get(variant))
    model.load_state_dict({**target, **{key: value for key, value in state_dict.items() if key not in classifier}})
    left_out = others or (f'{listed(absent)}, which it does not contain' if absent else '')
    return [f'Not loaded from {where}: {left_out}'] if left_out else []


def fit_classifier(model: Network, state_dict: Mapping[str, Tensor], where: str) -> None:
    """Gives a model that will only be tested a classifier of the size in the weights, and prints this.

    It is not printed if the model's classifier has one identity because there is no training set. A test does not use
    the classifier. The model is unchanged if the weights have no classifier, or one for different features.
    """
    classifier, weight, bias = model.classifier, state_dict.get('classifier.weight'), state_dict.get('classifier.bias')
    if not isinstance(classifier, torch.nn.Linear) or weight is None or (bias is None) != (classifier.bias is None):
        return
    number = len(weight) if weight.ndim else 0
    if not number or weight.shape != (number, classifier.in_features) or (bias is not None and bias.shape != (number,)):
        return
    if weight.shape == classifier.weight.shape:
        return
    model.num_classes, before = number, classifier.out_features
    model.classifier = torch.nn.Linear(classifier.in_features, number, bias=bias is not None).to(classifier.weight)
    if before > 1:
        print(f'The classifier has the {number} identities of {where} instead of {before}')


def _alike(key: str, given: Tensor, expected: Tensor) -> bool:
    kinds = given.dtype.is_floating_point == expected.dtype.is_floating_point or key.endswith('.num_batches_tracked')
    return given.shape == expected.shape and kinds


def _shapes(key: str, given: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str:
    return f'{key} {_described(given[key])} where the model has {_described(expected[key])}'


def _described(tensor: Tensor) -> str:
    shape = '×'.join(map(str, tensor.shape)) or 'scalar'
    return shape if tensor.dtype.is_floating_point else f'{shape} {str(tensor.dtype).removeprefix("torch.")}'


def listed(names: Iterable, most: int = 8) -> str:
    names = [plain(str(name)) for name in names]
    more = f' and {len(names) - most} more' if len(names) > most else ''
    return ', '.join(names[:most]) + more
