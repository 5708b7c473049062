"""Reads weight files of this and other projects: translates them to this project's names, and describes them.

python weights.py FILE            # what it is, what it does not record, and how it will be tested
python weights.py FILE OUT        # the same weights in this project's layout, OUT.pth.tar or OUT.safetensors
"""

import hashlib
import os
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

import models
from files import download, safetensors, unpickling
from files.writing import new_file, torch_errors
from models import layouts, loading
from models.loading import arch_of, listed
from models.network import LENGTHS, Network, Training
from runtime import commands, values
from runtime.errors import UserError, plain

FORMAT = 'deep-person-reid 1'  # the entry 'format' of the checkpoints written here
LICENCE = 'unknown'  # unless the file gives it


@dataclass
class Weights:
    """The contents of a weight file.

    state_dict: this project's parameter names -> tensors on the CPU
    layout:     the kind of file and what was renamed, in one line
    trained:    what is known about the training of the weights, and how their project tests them
    rank1:      best Rank-1 as a fraction, None if the file does not contain it
    epoch:      the last finished epoch, None if the file does not contain it; the original and this project count from
                0, torchreid from 1
    state:      the complete checkpoint if this project wrote it, for resuming; None for any other file
    made:       the arguments of `models.assemble` that the network needs, as far as they are known
    assumed:    what the file does not record, as NAME=VALUE of `models.layouts.ASSUMPTIONS`
    licence:    the licence of the weights, as given in the file
    """

    state_dict: dict[str, Tensor]
    layout: str
    trained: Training
    rank1: float | None = None
    epoch: int | None = None
    state: dict[str, Any] | None = None
    made: dict[str, Any] = field(default_factory=dict)
    assumed: list[str] = field(default_factory=list)
    licence: str = LICENCE


def read(path: str | os.PathLike, assume: str = '', target: Container[str] = ()) -> Weights:
    """Reads a checkpoint or a bare state dict without running any code in it (`files.unpickling`).

    Supported are checkpoints of this project; checkpoints of the original, written by PyTorch 0.3 under Python 2 or
    later; state dicts of any PyTorch since 0.1, bare or under 'state_dict' or 'model'; safetensors; the prefixes
    `module.` and `_orig_mod.`; and the layouts that the models' classes list as `published`.

    assume: NAME=VALUE, separated by commas, to replace assumptions of the file's layout
    target: the names of the weights of the target network; a file with these names is not translated

    Raises UserError for a file that cannot be read safely, contains no weights, or mixes the names of two projects, and
    for an assumption that does not apply to the file.
    """
    where = plain(os.fspath(path), 500)
    if safetensors.recognised(path):
        tensors, metadata = safetensors.load(path)
        loaded, kind = {**safetensors.contents(metadata), 'state_dict': tensors}, safetensors.KIND
    else:
        loaded, kind = unpickling.load(path)
    return _understand(loaded, kind, where, layouts.chosen(assume), target)


def _understand(loaded: Any, kind: str, where: str, chosen: Mapping[str, str], target: Container[str]) -> Weights:
    """The contents of a file -> Weights."""
    checkpoint, entries = {}, loaded
    entry = 'state_dict'
    if isinstance(loaded, dict) and 'state_dict' not in loaded and isinstance(loaded.get('model'), dict):
        entry = 'model'  # of fast-reid
    if isinstance(loaded, dict) and entry in loaded:
        checkpoint, entries = loaded, loaded[entry]
    if not isinstance(entries, dict) or not entries:
        raise UserError(
            f'{where} contains no weights but a {type(entries).__name__}; give a checkpoint or a state dict'
        )
    state_dict = loading.tensors_of(entries, where)

    ours = str(checkpoint.get('format', '')).startswith(FORMAT.split()[0])
    if ours and checkpoint['format'] != FORMAT:
        raise UserError(
            f'{where} has the format {plain(checkpoint["format"])}, not {FORMAT}: use the version that wrote it'
        )
    origin = checkpoint.get('converted') if ours else None  # the layout that `convert` read
    converted = isinstance(origin, str)
    if ours:
        named = loading.Named(state_dict, [], None, layouts.test_of(checkpoint.get('test')))
        layout = f'weights that this project converted, in {kind}' if converted else 'checkpoint of this project'
    else:
        bare = not checkpoint or kind == safetensors.KIND
        contents = 'bare state dict' if bare else f'checkpoint with {listed(checkpoint)}'
        named = loading.normalised(state_dict, where, loading.project_of(entries, target), chosen.get('project', ''))
        layout = ', '.join([f'{contents} in {kind}', *named.notes])
    recorded = layouts.made_of(checkpoint.get('model')) if ours else {}
    state_dict, made, assumed = loading.settled(named, chosen, where, bool(recorded))
    foreign = (named.layout is not None and layouts.OF_TIMM.note not in named.notes) or (
        ours and checkpoint.get('imagenet') is True
    )
    trained = _training(checkpoint if ours else {}, state_dict, foreign, where)
    project = named.layout.note if named.layout else plain(origin, 500) if isinstance(origin, str) else ''
    trained = replace(trained, project=project, test={} if trained.of_imagenet else named.test)
    rank1, epoch, licence = (checkpoint.get(name) for name in ('rank1', 'epoch', 'licence'))
    number = rank1 if isinstance(rank1, int | float | np.number) else np.inf
    return Weights(
        state_dict=state_dict,
        layout=layout,
        trained=trained,
        rank1=float(number) if abs(number) < 2**31 else None,  # type: ignore[operator]  # abs() of numbers
        epoch=epoch if isinstance(epoch, int) else None,
        state=checkpoint if ours and not converted else None,
        made=made | recorded,
        assumed=assumed,
        licence=plain(licence) if isinstance(licence, str) else LICENCE,
    )


def _training(checkpoint: dict, state_dict: Mapping[str, Tensor], foreign: bool, where: str) -> Training:
    """What a file records about its training; invalid entries of an altered checkpoint are ignored."""
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
        arch=arch_of(state_dict) or '',
    )


def build(loaded: Weights, arch: str | None, where: str, report: Callable[[str], object] = print) -> Network:
    """The network that the weights were trained with, with these weights, in eval mode; prints which were left out.

    A file of this project records the architecture and the arguments of `init_model`. For other files, the
    architecture, the neck, the pooling and the other parts are recognised by names and shapes, and the rest is assumed
    (`Weights.assumed`). Normalisation and interpolation are those of the weights' project.

    arch:   None to recognise it
    report: called with each line, in place of print

    Raises:
        UserError: the architecture cannot be recognised, or the weights do not fit.
    """
    state_dict, options = loaded.state_dict, loaded.trained.options
    arch = arch or options.get('arch') or arch_of(state_dict)
    if not isinstance(arch, str):
        raise UserError(f'{where}: its architecture cannot be recognised by its weights; give it with --arch')
    size = _size(loaded)
    model = models.init_model(
        arch,
        num_classes=_num_classes(loaded, models.network_of(arch, size)),
        size=size,
        report=report,
        **{**loaded.made, **loading.parts(state_dict)},
    )
    for notice in loading.load_into(model, state_dict, allow_other_classifier=True, where=where):
        report(notice)
    return _prepared(model, loaded, report).eval()


def _num_classes(loaded: Weights, network: type[Network]) -> int:
    """The classes of the classifier; 1 if it has other columns than features, so that its rows need not be believed."""
    classifier = loaded.state_dict.get('classifier.weight', torch.empty(0))
    length = loading.parts(loaded.state_dict).get('embedding') or getattr(network, 'feat_dim', None)
    return len(classifier) if classifier.ndim == 2 and classifier.size(1) == (length or classifier.size(1)) else 1


def _size(loaded: Weights) -> tuple[int, int] | None:
    """The image size (height, width) of a run of this project, None if unknown or impossible."""
    height, width = (loaded.trained.options.get(name, 0) for name in ('height', 'width'))
    return (height, width) if all(isinstance(side, int) and side in LENGTHS for side in (height, width)) else None


def _prepared(model: Network, loaded: Weights, report: Callable[[str], object] = print) -> Network:
    """Set the network's normalisation and interpolation to those of the weights' project."""
    for name in ('normalisation', 'interpolation'):
        setattr(model, name, loaded.trained.test.get(name, getattr(model, name)))
    if 'normalisation' in loaded.trained.test:
        report('Normalised as the file says: mean {}, standard deviation {}'.format(*model.normalisation))
    return model


def rebuilt(model: Network, loaded: Weights, keep_arch: bool, size: tuple[int, int] | None = None) -> Network:
    """The network for testing the weights: `model`, or a new one with the architecture and parts of the weights.

    keep_arch: keep the architecture of `model`, which the user chose
    size: height and width of the images; needed only for networks of timm
    """
    recorded = loaded.trained.options.get('arch')
    arch = '' if keep_arch else loaded.trained.arch or (recorded if isinstance(recorded, str) else '')
    network = models.network_of(arch, size) if arch else type(model)
    before = {**models.DEFAULT_PARTS, **model.made}
    shown = loading.parts(loaded.state_dict)
    of_recipe = shown['neck'] == before['neck']  # else the script's other parts say nothing about the file's
    made = {**(before if of_recipe else models.DEFAULT_PARTS), **loaded.made, **shown}
    if 'pool.p' not in loaded.state_dict and made['pooling'] == 'gem':
        made['pooling'] = 'avg'
    if network is not type(model) or made != before:
        changes = ', '.join(f'{name}={value}' for name, value in made.items() if models.DEFAULT_PARTS[name] != value)
        kind = arch or 'the same architecture'
        print(f'The network is that of {loaded.trained.where}: {kind}{f" with {changes}" if changes else ""}')
        model = models.assemble(network, model.num_classes, model.loss, **made)
    return _prepared(model, loaded)


def pretrain(model: Network, pretrained: str) -> None:
    """Initialises a model's weights; prints what was loaded and what was not.

    pretrained: 'none' leaves the model unchanged; 'imagenet' loads the published weights of the model's class, which
                are downloaded once to a cache; anything else is the path of a file that `read` supports

    The classifier remains random, and so do neck, pooling and the parameters listed in a model's `fresh` if the weights
    do not contain them. ImageNet weights, recognised in a file by another project's names and 1000 classes, do not
    change the `options` of the network.

    Raises UserError if the weights cannot be downloaded or read, or do not fit.
    """
    target = model.state_dict()
    if pretrained == 'none':
        return
    if pretrained == 'imagenet':
        if model.imagenet is None:
            raise UserError(f'{type(model).__name__} has no ImageNet weights; give --pretrained none or a path')
        where = getattr(model.imagenet, 'whose', "torchvision's ImageNet weights")
        fetched = download.fetch(model.imagenet)
        state_dict = loading.normalised(fetched, where, loading.project_of(fetched, target)).state_dict
        layout, trained, assumed = str(model.imagenet), Training(where, of_imagenet=True), []
    else:
        where, weights = plain(pretrained, 500), read(pretrained, target=target)
        state_dict, layout, trained = weights.state_dict, weights.layout, weights.trained
        assumed = layouts.in_training(weights.assumed)

    kept = model.variants if trained.of_imagenet else ()
    dropped = [
        key for key in state_dict
        if key.startswith('classifier.') or key in kept or (key.startswith(loading.HEAD_PARTS) and key not in target)
    ]  # fmt: skip
    taken = {key: value for key, value in state_dict.items() if key not in dropped}
    fresh_parts = (*model.fresh, *loading.HEAD_PARTS)
    random = ('classifier.', *(part for part in fresh_parts if not any(key.startswith(part) for key in taken)))
    fresh = {key: value for key, value in target.items() if key.startswith(random)}
    loading.load_into(model, taken | fresh, allow_other_classifier=False, where=where)
    trained = replace(trained, project='', test={})  # network and test are those of the script
    model.trained = replace(trained, missing=listed(key for key in fresh if not key.startswith('classifier.')))
    print(f'Loaded pretrained weights from {where} ({layout})')
    if assumed:
        print(f'Assumed, because {where} does not record: {", ".join(assumed)}')
    if dropped:
        print(f'Not loaded: {listed(dropped)}')
    print(f'Initialised at random: {listed(fresh, most=len(fresh))}')


def describe(path: str, assume: str) -> Iterator[str]:
    """A description of a file and its test, line by line.

    Raises:
        UserError: it cannot be read, or has an architecture of this project but does not fit it.
    """
    loaded, where = read(path, assume), plain(path, 500)
    arch, parts, test = loaded.trained.arch, loading.parts(loaded.state_dict), loaded.trained.test
    made = {**models.DEFAULT_PARTS, **loaded.made, **parts}
    changes = ', '.join(f'{name}={value}' for name, value in made.items() if models.DEFAULT_PARTS[name] != value)
    with open(path, 'rb') as file:
        digest = hashlib.file_digest(file, 'sha256').hexdigest()
    yield f'{where}: {loaded.layout}'
    yield f'sha256: {digest}'
    recorded, number = loaded.trained.options.get('arch'), loaded.trained.num_pids
    unknown = f'unknown: no network of this project has the names {listed(loaded.state_dict, most=3)}'
    if loaded.trained.project == layouts.OF_TIMM.note:
        unknown = 'timm:NAME, whose name it does not record'
    yield f'architecture: {arch or plain(str(recorded or unknown))}{f" with {changes}" if changes else ""}'
    kept = f'none, its {number} classes are those of ImageNet' if loaded.trained.of_imagenet and number else number
    yield f'identities: {kept or "none, it has no classifier"}'
    yield f'layout: {loaded.trained.project or "this project, the original, or unknown"}'
    if loaded.assumed:
        yield f'assumed, because the file does not record: {", ".join(loaded.assumed)}; --assume NAME=VALUE changes it'
    if loaded.trained.of_imagenet:
        yield 'test: none, it was trained to classify ImageNet'
    else:
        yield f'test: {layouts.written(test) or "as the options of the script say"}'
    yield f'licence of the weights: {loaded.licence}'
    if arch:
        network = models.assemble(models.factory[arch], _num_classes(loaded, models.factory[arch]), {'xent'}, **made)
        loading.load_into(network, loaded.state_dict, allow_other_classifier=True, where=where)


def convert(path: str, out: str, assume: str, arch: str | None = None) -> None:
    """Writes the weights of a file in this project's layout, with its records, the assumptions and the test options.

    Raises:
        UserError: `out` exists, has an unknown suffix or cannot be written, or the weights do not fit any network.
    """
    loaded, where, target = read(path, assume), plain(path, 500), plain(out, 500)
    if not out.endswith(('.pth.tar', '.pth', '.pt', '.safetensors')):
        raise UserError(f'{target}: give a name that ends in .pth.tar or .safetensors')
    model = build(loaded, arch, where)
    test = dict(loaded.trained.test)
    contents: dict[str, Any] = {
        'format': FORMAT, 'converted': loaded.trained.project or loaded.layout, 'model': model.made, 'test': test,
        'licence': loaded.licence, 'imagenet': loaded.trained.of_imagenet, 'rank1': loaded.rank1, 'epoch': loaded.epoch,
        'arguments': {**loaded.trained.options, **({'arch': name} if (name := arch or loaded.trained.arch) else {})},
    }  # fmt: skip
    tensors = {name: tensor.contiguous().clone() for name, tensor in loaded.state_dict.items()}
    with new_file(out) as temporary:
        if out.endswith('.safetensors'):
            safetensors.save(temporary, tensors, safetensors.metadata(contents))
        else:
            with torch_errors(), open(temporary, 'wb') as file:
                torch.save({**contents, 'state_dict': tensors}, file)
    print(f'Wrote {target}')


def main() -> None:
    parser = commands.Parser(description='Describe a weight file, or write it in the layout of this project.')
    parser.add_argument('file', type=values.path, metavar='FILE', help='weights of any project')
    parser.add_argument(
        'out', type=values.path, nargs='?', metavar='OUT', help='new file for the weights, .pth.tar or .safetensors'
    )
    parser.add_argument('-a', '--arch', help='architecture, to convert weights that do not show it, such as timm:NAME')
    parser.add_argument('--assume', default='', metavar='NAME=VALUE,...', help='replaces assumptions about FILE')
    args = parser.parse_args()
    for line in describe(args.file, args.assume):
        print(line)
    if args.out:
        convert(args.file, args.out, args.assume, args.arch)


if __name__ == '__main__':
    commands.run(main)
