"""Weight files: any published or foreign file -> weights under this project's names, and a description of it."""

import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

import models
from models.network import Network, Training
from runtime import download, unpickling
from runtime.errors import UserError, plain

FORMAT = 'deep-person-reid 1'  # the entry 'format' of the checkpoints written here


@dataclass
class Weights:
    """The contents of a weight file.

    state_dict: this project's parameter names -> tensors on the CPU
    layout:     the kind of file and what was renamed, in one line
    trained:    what is known of the training of the weights
    rank1:      best Rank-1 as a fraction, None if the file does not contain it
    epoch:      of the last finished epoch, None if the file does not contain it; the original and this project count
                from 0, torchreid from 1
    state:      the complete checkpoint if this project wrote it, for resuming; None for any other file
    """

    state_dict: dict[str, Tensor]
    layout: str
    trained: Training
    rank1: float | None = None
    epoch: int | None = None
    state: dict[str, Any] | None = None


def read(path: str | os.PathLike) -> Weights:
    """Reads a checkpoint or a bare state dict without running any code in it (`runtime.unpickling`).

    Supported are the checkpoints of this project; those of the original, by PyTorch 0.3 under Python 2 or later; state
    dicts of any PyTorch since 0.1, bare or under 'state_dict'; the prefixes `module.` and `_orig_mod.`; and the
    names that the models' classes list as `published`.

    Raises UserError, in one line, for a file that cannot be read safely, contains no weights, or mixes the names of two
    projects.
    """
    loaded, kind = unpickling.load(path)
    return _understand(loaded, kind, plain(os.fspath(path), 500))


def _understand(loaded: Any, kind: str, where: str) -> Weights:
    """The object that PyTorch loaded -> Weights."""
    checkpoint, found = {}, loaded
    if isinstance(loaded, dict) and 'state_dict' in loaded:
        checkpoint, found = loaded, loaded['state_dict']
    if not isinstance(found, dict) or not found:
        raise UserError(f'{where} contains no weights but a {type(found).__name__}; give a checkpoint or a state dict')
    for key, value in found.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            fault = f'a {type(value).__name__}, not a tensor' if isinstance(key, str) else 'not the name of a tensor'
            raise UserError(
                f'{where} contains no weights: {plain(str(key))} is {fault}; give a state dict, or a checkpoint '
                f"with one under 'state_dict'"
            )
    state_dict = {key: value.detach() for key, value in found.items()}

    ours = str(checkpoint.get('format', '')).startswith(FORMAT.split()[0])
    if ours and checkpoint['format'] != FORMAT:
        raise UserError(
            f'{where} has the format {plain(checkpoint["format"])}, not {FORMAT}: use the version that wrote it'
        )
    foreign = False
    if ours:
        layout = ['checkpoint of this project']
    else:
        contents = f'checkpoint with {_listed(checkpoint)}' if checkpoint else 'bare state dict'
        state_dict, notes = normalised(state_dict, where)
        layout = [f'{contents} in {kind}', *notes]
        foreign = any(note in notes for network in models.factory.values() for note, *_ in network.published)
    rank1, epoch = checkpoint.get('rank1'), checkpoint.get('epoch')
    return Weights(
        state_dict=state_dict,
        layout=', '.join(layout),
        trained=_training(checkpoint if ours else {}, state_dict, foreign, where),
        rank1=float(rank1) if isinstance(rank1, int | float | np.number) and abs(rank1) < 2**31 else None,  # type: ignore[operator]  # abs() of numbers
        epoch=epoch if isinstance(epoch, int) else None,
        state=checkpoint if ours else None,
    )


def _training(checkpoint: dict, state_dict: Mapping[str, Tensor], foreign: bool, where: str) -> Training:
    """What a file tells of its training; of an altered checkpoint, what is left of that."""
    options, provenance = (checkpoint.get(name) for name in ('arguments', 'provenance'))
    mark = provenance.get('dataset_fingerprint') if isinstance(provenance, dict) else None
    classifier = state_dict.get('classifier.weight')
    num_pids = len(classifier) if classifier is not None and classifier.ndim else None
    return Training(
        where,
        of_imagenet=foreign and num_pids == 1000,
        options=options if isinstance(options, dict) else {},
        fingerprint=plain(mark) if isinstance(mark, str) else None,
        num_pids=num_pids,
    )


PREFIX = re.compile(r'^(?:module\.|_orig_mod\.)+')  # of nn.DataParallel and of torch.compile
OF_THE_ORIGINAL = re.compile(r'(?:base|layers\d[abc]?|fc_fuse)\.')
OF_OTHERS = re.compile(r'(?:conv1|bn1|layer\d|fc|fc_fusion|features)\.')


def normalised(state_dict: Mapping[str, Tensor], where: str) -> tuple[dict[str, Tensor], list[str]]:
    """Any names used by published models -> this project's names, and notes on what was renamed.

    A model's class lists the names (`published`), and changes weights of a network that computes differently
    (`adapt`). Prefixes are always removed; other names are unchanged if the result fits none of the classes.

    Raises UserError if a tensor is named twice with different values, or if the names of the original are mixed with
    those of torchvision or torchreid: it is then unknown which network these weights belong to.
    """
    notes = []
    unprefixed = _renamed(state_dict, lambda key: PREFIX.sub('', key), where)
    if unprefixed.keys() != state_dict.keys():
        notes.append('prefix module. or _orig_mod. removed')
    for network in models.factory.values():
        used: set[str] = set()

        def rename(key: str, network: type[Network] = network, used: set[str] = used) -> str:
            for note, pattern, replacement in network.published:
                key, count = re.subn(pattern, replacement, key)
                if count:
                    used.add(note)
            return key

        if not _is_for(network, {rename(key): value for key, value in unprefixed.items()}):
            continue
        ours = _renamed(unprefixed, rename, where)
        original, other = (next(filter(names.match, unprefixed), None) for names in (OF_THE_ORIGINAL, OF_OTHERS))
        if original and other:
            raise UserError(
                f'{where} mixes the names of two projects, {plain(original)} and {plain(other)}, which compute '
                f'differently; get the file as it was published'
            )
        network.adapt(ours, used)
        return ours, notes + sorted(used)
    return unprefixed, notes


def _renamed(state_dict: Mapping[str, Tensor], rename: Callable[[str], str], where: str) -> dict[str, Tensor]:
    result: dict[str, Tensor] = {}
    for key, value in state_dict.items():
        name = rename(key)
        other = result.setdefault(name, value)
        form, other_form = (value.shape, value.stride(), value.dtype), (other.shape, other.stride(), other.dtype)
        if form != other_form or not (other.data_ptr() == value.data_ptr() or torch.equal(other, value)):
            raise UserError(f'{where} contains {plain(name)} twice with different values; get the file again')
    return result


def arch_of(state_dict: Mapping[str, Tensor]) -> str | None:
    """The architecture that fits weights with these names and shapes, None if it is not one of this project's."""
    return next((arch for arch, network in models.factory.items() if _is_for(network, state_dict)), None)


def build(loaded: Weights, arch: str | None, where: str, report: Callable[[str], object] = print) -> Network:
    """The network that weights were trained with, holding them, in eval mode; prints what of them was left out.

    Architecture and arguments of `init_model` are those that a file of this project records. Of other files the
    architecture is recognised by names and shapes, and so are neck and pooling; the last stride is assumed to be 2.

    arch:   None to recognise it
    report: receives the lines that are otherwise printed

    Raises:
        UserError: the architecture cannot be recognised, or the weights do not fit.
    """
    state_dict, state = loaded.state_dict, loaded.state or {}
    arch = arch or loaded.trained.options.get('arch') or arch_of(state_dict)
    if not isinstance(arch, str):
        raise UserError(f'{where}: its architecture cannot be recognised by its weights; give it with --arch')
    made, options = state.get('model'), loaded.trained.options
    made = made if isinstance(made, dict) else {}
    size = tuple(side for name in ('height', 'width') if isinstance(side := options.get(name), int))
    model = models.init_model(
        arch,
        num_classes=len(state_dict.get('classifier.weight', [0])),
        last_stride=1 if made.get('last_stride') == 1 else 2,
        neck='bottleneck.weight' in state_dict,
        pooling='gem' if 'pool.p' in state_dict else 'max' if made.get('pooling') == 'max' else 'avg',
        size=size if len(size) == 2 else None,
        report=report,
    )
    for notice in load_into(model, state_dict, allow_other_classifier=True, where=where):
        report(notice)
    return model.eval()


def _is_for(network: type[Network], state_dict: Mapping[str, Tensor]) -> bool:
    name, shape = network.signature
    known = name in state_dict and state_dict[name].shape == shape
    return known and not any(other in state_dict for other in network.absent)


def load_into(
    model: Network, state_dict: Mapping[str, Tensor], *, allow_other_classifier: bool, where: str
) -> list[str]:
    """Copies weights into a model, all or none; returns notices, to be printed, of what was left out.

    Names, shapes and data types are compared before anything is copied. Missing `num_batches_tracked` are accepted:
    PyTorch 0.3 had none, and a fixed momentum does not use them. A classifier of another size, or none, is accepted,
    with a notice, if `allow_other_classifier`: the model keeps its own. Anything else that is missing, unexpected or of
    another shape raises UserError, which lists it and guesses the architecture of the weights.

    A model's `options` are the names of buffers that are None, and therefore not saved, unless the network that the
    weights come from computes differently; the weights determine whether one is set.

    where: the file, for the messages
    """
    own = model.state_dict()
    for option in model.options:
        own.pop(option, None)
        if option in state_dict:
            own[option] = torch.tensor(True, device=next(model.parameters()).device)
    missing = [key for key in own if key not in state_dict and not key.endswith('.num_batches_tracked')]
    unexpected = [key for key in state_dict if key not in own]
    unlike = [key for key in own if key in state_dict and not _alike(key, state_dict[key], own[key])]
    classifier = [key for key in unlike if key.startswith('classifier.')]
    absent = [key for key in own if key.startswith('classifier.')]
    if allow_other_classifier and absent and set(absent) <= set(missing):
        missing = [key for key in missing if key not in absent]
    else:
        absent = []

    if missing or unexpected or unlike != classifier:
        faults = [
            f'missing {_listed(missing)}' if missing else '',
            f'unexpected {_listed(unexpected)}' if unexpected else '',
            f'different shapes in {_listed(_shapes(key, state_dict, own) for key in unlike)}' if unlike else '',
        ]
        arch, own_arch = arch_of(state_dict), arch_of(own)
        if arch is None:
            guess = 'it does not look like an architecture of this project'
        elif arch == own_arch:
            guess = f"it looks like a {arch} that differs from this project's"
        else:
            guess = f'it looks like a {arch}: try --arch {arch}'
        raise UserError(f'{where} does not fit the model: {"; ".join(filter(None, faults))}; {guess}')
    others = _listed(_shapes(key, state_dict, own) for key in classifier)
    if classifier and not allow_other_classifier:
        raise UserError(
            f'{where} has a classifier for a different number of identities: {others}; '
            f'test it with --evaluate, or start from its other weights with --resume-weights-only'
        )
    if broken := [key for key, value in state_dict.items() if not bool(value.isfinite().all())]:
        raise UserError(f'{where} has weights that are not finite, in {_listed(broken)}; get the file again')
    for option in model.options:
        setattr(model, option, own.get(option))
    model.load_state_dict({**own, **{key: value for key, value in state_dict.items() if key not in classifier}})
    left_out = others or (f'{_listed(absent)}, which it does not contain' if absent else '')
    return [f'Not loaded from {where}: {left_out}'] if left_out else []


def fit_classifier(model: Network, state_dict: Mapping[str, Tensor], where: str) -> None:
    """Gives a model that will only be tested a classifier of the size that its weights have, and prints that it did.

    That is not printed if the model's has one identity, for want of a training set. The classifier is not used at a
    test. Nothing changes if the weights have no classifier, or one on other features.
    """
    own, weight, bias = model.classifier, state_dict.get('classifier.weight'), state_dict.get('classifier.bias')
    if not isinstance(own, torch.nn.Linear) or weight is None or (bias is None) != (own.bias is None):
        return
    number = len(weight) if weight.ndim else 0
    if not number or weight.shape != (number, own.in_features) or (bias is not None and bias.shape != (number,)):
        return
    if weight.shape == own.weight.shape:
        return
    model.num_classes, before = number, own.out_features
    model.classifier = torch.nn.Linear(own.in_features, number, bias=bias is not None).to(own.weight)
    if before > 1:
        print(f'The classifier has the {number} identities of {where} instead of {before}')


def _alike(key: str, given: Tensor, own: Tensor) -> bool:
    kinds = given.dtype.is_floating_point == own.dtype.is_floating_point or key.endswith('.num_batches_tracked')
    return given.shape == own.shape and kinds


def _shapes(key: str, given: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> str:
    return f'{key} {_described(given[key])} where the model has {_described(own[key])}'


def _described(tensor: Tensor) -> str:
    shape = '×'.join(map(str, tensor.shape)) or 'scalar'
    return shape if tensor.dtype.is_floating_point else f'{shape} {str(tensor.dtype).removeprefix("torch.")}'


HEAD = ('bottleneck.', 'pool.')  # neck and pooling, which weights of a backbone lack


def pretrain(model: Network, pretrained: str) -> None:
    """Initialises a model's weights; prints what was loaded and what was not.

    pretrained: 'none' leaves the model unchanged; 'imagenet' loads torchvision's weights, downloaded once into its
                cache; anything else is the path of a file that `read` supports

    The classifier stays random, and so do neck, pooling and the parameters that a model's `fresh` lists if the weights
    do not contain them. ImageNet's weights, recognised in a file by foreign names and 1000 classes, initialise a
    network of this project: its `options` do not change.

    Raises UserError for weights that cannot be downloaded or read, or that do not fit.
    """
    if pretrained == 'none':
        return
    if pretrained == 'imagenet':
        where = "torchvision's ImageNet weights"
        if model.imagenet is None:
            raise UserError(f'{type(model).__name__} has no ImageNet weights; give --pretrained none or a path')
        state_dict, _ = normalised(download.fetch(model.imagenet), where)
        layout, trained = str(model.imagenet), Training(where, of_imagenet=True)
    else:
        where, weights = plain(pretrained, 500), read(pretrained)
        state_dict, layout, trained = weights.state_dict, weights.layout, weights.trained

    own = model.state_dict()
    kept = model.options if trained.of_imagenet else ()
    dropped = [key for key in state_dict if key.startswith('classifier.') or key in kept]
    taken = {key: value for key, value in state_dict.items() if key not in dropped}
    fresh_parts = (*model.fresh, *HEAD)
    random = ('classifier.', *(part for part in fresh_parts if not any(key.startswith(part) for key in taken)))
    fresh = {key: value for key, value in own.items() if key.startswith(random)}
    load_into(model, taken | fresh, allow_other_classifier=False, where=where)
    model.trained = replace(trained, random=_listed(key for key in fresh if not key.startswith('classifier.')))
    print(f'Loaded pretrained weights from {where} ({layout})')
    if dropped:
        print(f'Not loaded: {_listed(dropped)}')
    print(f'Initialised at random: {_listed(fresh, most=len(fresh))}')


def _listed(names: Iterable, most: int = 8) -> str:
    names = [plain(str(name)) for name in names]
    more = f' and {len(names) - most} more' if len(names) > most else ''
    return ', '.join(names[:most]) + more
