"""Weight files: any published or foreign file -> its weights under this project's names, and what the file was.

A file may come from a stranger. Before PyTorch reads it (always with `weights_only=True`), the instructions of its
pickle are followed with stand-ins for everything they would make: only what weights need may be named, every tensor
must lie inside its storage, every storage inside the file, and nothing may be nested deeply or grow beyond measure.
"""

import http.client
import io
import math
import os
import pickletools
import re
import stat
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import torch
from torch import Tensor, nn

from errors import UserError

if TYPE_CHECKING:
    from torchvision.models import WeightsEnum

FORMAT = 'deep-person-reid 1'  # the entry 'format' of the checkpoints written here


@dataclass
class Weights:
    """What a weight file held.

    state_dict: this project's parameter names -> tensors on the CPU
    layout:     what the file was and what was renamed, in one line
    rank1:      best Rank-1 as a fraction, None where the file names none
    epoch:      of the epoch that had just been finished, None where the file names none; the original and this project
                count from 0, torchreid from 1
    state:      the whole content of a checkpoint written by this project, for resuming; None for any other file
    """

    state_dict: dict[str, Tensor]
    layout: str
    rank1: float | None = None
    epoch: int | None = None
    state: dict[str, Any] | None = None


# ------------------------------------------------------------------------------------------------------------- reading


def read(path: str | os.PathLike) -> Weights:
    """Reads a checkpoint or a bare state dict; runs nothing that is in it.

    Understood are the checkpoints of this project; those of the original, by PyTorch 0.3 under Python 2 and later;
    state dicts by any PyTorch since 0.1, bare or under 'state_dict'; prefixes `module.` and `_orig_mod.`; both layouts
    of ResNet50M; the dotted names of DenseNet; the names of torchvision and of torchreid (`normalised`).

    Raises UserError, in one line, for a file that is missing, cut short, damaged, no checkpoint, larger unpacked than
    packed, that names anything but weights, or that mixes the names of two projects.
    """
    where = _plain(os.fspath(path), 500)
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # before it is opened: a pipe would wait for ever
            raise _Refused('is no regular file; give the path of a checkpoint')
        with open(path, 'rb') as file:
            kind = _inspect_file(file)
            file.seek(0)
            loaded = _load(file)
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise UserError(f'{where} cannot be read ({reason}); give the path of a checkpoint') from error
    except _Refused as refused:
        raise UserError(f'{where} {refused}') from refused
    except Exception as error:  # whatever a stranger's bytes provoke is the file's fault
        reason = _plain(f'{type(error).__name__}: {error}')
        raise UserError(f'{where} is damaged, cut short or no checkpoint ({reason}); get the file again') from error
    return _understand(loaded, kind, where)


def _load(file: BinaryIO) -> Any:
    scalar = np.float32().__reduce__()[0]  # its module is numpy.core or numpy._core, by numpy's version
    scalars = [(scalar, f'numpy.{core}.multiarray.scalar') for core in ('core', '_core')]
    safe = [*scalars, np.dtype, type(np.dtype('f4')), type(np.dtype('f8'))]
    with warnings.catch_warnings(), torch.serialization.safe_globals(safe):
        warnings.simplefilter('ignore')  # 'encoding' is obeyed, but warned about
        return torch.load(file, map_location='cpu', weights_only=True, encoding='latin1')  # latin1: Python 2's strings


def _understand(loaded: Any, kind: str, where: str) -> Weights:
    """What PyTorch made of the file -> Weights."""
    checkpoint, found = {}, loaded
    if isinstance(loaded, dict) and 'state_dict' in loaded:
        checkpoint, found = loaded, loaded['state_dict']
    if not isinstance(found, dict) or not found:
        raise UserError(f'{where} holds no weights but a {type(found).__name__}; give a checkpoint or a state dict')
    for key, value in found.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise UserError(
                f'{where} holds no weights: {_plain(str(key))} is a {type(value).__name__}, not a tensor; '
                f"give a state dict, or a checkpoint with one under 'state_dict'"
            )
    state_dict = {key: value.detach() for key, value in found.items()}

    ours = str(checkpoint.get('format', '')).startswith(FORMAT.split()[0])
    if ours and checkpoint['format'] != FORMAT:
        raise UserError(
            f'{where} is a {_plain(checkpoint["format"])}, which is not {FORMAT}: use the version that wrote it'
        )
    if ours:
        layout = ['checkpoint of this project']
    else:
        contents = f'checkpoint with {_listed(checkpoint)}' if checkpoint else 'bare state dict'
        state_dict, notes = normalised(state_dict, where)
        layout = [f'{contents} in {kind}', *notes]
    rank1, epoch = checkpoint.get('rank1'), checkpoint.get('epoch')
    return Weights(
        state_dict=state_dict,
        layout=', '.join(layout),
        rank1=float(rank1) if isinstance(rank1, int | float | np.number) and abs(rank1) < 2**31 else None,
        epoch=epoch if isinstance(epoch, int) else None,
        state=checkpoint if ours else None,
    )


# --------------------------------------------------------------------------------------------------------------- names

PREFIX = re.compile(r'^(?:module\.|_orig_mod\.)+')  # of nn.DataParallel and of torch.compile

FUSED_FIRST = "torchreid's resnet50mid translated, the columns of its classifier put into the order of ResNet50M"
LAST_RELU = 'names features.* translated, last_relu set as in their networks'

RENAMED = (  # a note on it, then pattern -> replacement
    ("second names of ResNet50M's layers merged", r'^layers1\.', 'base.'),
    ("second names of ResNet50M's layers merged", r'^layers2\.1\.', 'base.4.'),
    ("second names of ResNet50M's layers merged", r'^layers3\.', 'base.5.'),
    ("second names of ResNet50M's layers merged", r'^layers4\.', 'base.6.'),
    ("second names of ResNet50M's layers merged", r'^layers5a\.', 'base.7.0.'),
    ("second names of ResNet50M's layers merged", r'^layers5b\.', 'base.7.1.'),
    ("second names of ResNet50M's layers merged", r'^layers5c\.', 'base.7.2.'),
    ("torchvision's names translated", r'^conv1\.', 'base.0.'),
    ("torchvision's names translated", r'^bn1\.', 'base.1.'),
    ("torchvision's names translated", r'^layer1\.', 'base.4.'),
    ("torchvision's names translated", r'^layer2\.', 'base.5.'),
    ("torchvision's names translated", r'^layer3\.', 'base.6.'),
    ("torchvision's names translated", r'^layer4\.', 'base.7.'),
    ("torchvision's names translated", r'^fc\.(weight|bias)$', r'classifier.\1'),
    (FUSED_FIRST, r'^fc_fusion\.', 'fc_fuse.'),
    (LAST_RELU, r'^features\.', 'base.'),
    ('dotted names of DenseNet translated', r'(\.denselayer\d+\.(?:norm|conv))\.([12])\.', r'\1\2.'),
)  # fmt: skip
OF_THE_ORIGINAL = re.compile(r'(?:base|layers\d[abc]?|fc_fuse)\.')
OF_OTHERS = re.compile(r'(?:conv1|bn1|layer\d|fc|fc_fusion|features)\.')


def normalised(state_dict: Mapping[str, Tensor], where: str) -> tuple[dict[str, Tensor], list[str]]:
    """Any names that the published models have had -> this project's names, and notes on what was renamed.

    Where a network of another project computes otherwise, its weights are changed so that ours gives the same logits:

    - torchreid's resnet50mid puts its 1024 fused features before the 2048 of the last block. ResNet50M puts them
      behind, and the columns of the classifier follow. The features are torchreid's with these two parts exchanged.
    - `features.*` are the names of torchvision's and of torchreid's densenet121, which have a ReLU behind the last
      normalisation: the entry `last_relu` is added, by which `load_into` gives one to DenseNet121.

    Prefixes go in any case; other names are left alone where the result is none of this project's architectures.
    Raises UserError where a tensor is named twice and differs, and where the names of the original are mixed with
    those of torchvision or torchreid: nothing then says which network computed with these weights.
    """
    notes = []
    plain = _renamed(state_dict, lambda key: PREFIX.sub('', key), where)
    if plain.keys() != state_dict.keys():
        notes.append('prefix module. or _orig_mod. dropped')
    used = set()

    def rename(key: str) -> str:
        for note, pattern, replacement in RENAMED:
            key, count = re.subn(pattern, replacement, key)
            if count:
                used.add(note)
        return key

    ours = _renamed(plain, rename, where)
    if arch_of(ours) is None:
        return plain, notes
    original, other = (next(filter(names.match, plain), None) for names in (OF_THE_ORIGINAL, OF_OTHERS))
    if original and other:
        raise UserError(
            f'{where} mixes the names of two projects, {_plain(original)} and {_plain(other)}, which compute '
            f'differently; get the file as it was published'
        )
    classifier = ours.get('classifier.weight')  # (num_classes, feat_dim)
    if FUSED_FIRST in used and classifier is not None and classifier.shape[1:] == (3072,):
        ours['classifier.weight'] = torch.cat((classifier[:, 1024:], classifier[:, :1024]), dim=1)
    if LAST_RELU in used:
        ours['last_relu'] = torch.tensor(True)
    return ours, notes + sorted(used)


def _renamed(state_dict: Mapping[str, Tensor], rename: Callable[[str], str], where: str) -> dict[str, Tensor]:
    result: dict[str, Tensor] = {}
    for key, value in state_dict.items():
        name = rename(key)
        other = result.setdefault(name, value)
        form, other_form = (value.shape, value.stride(), value.dtype), (other.shape, other.stride(), other.dtype)
        if form != other_form or not (other.data_ptr() == value.data_ptr() or torch.equal(other, value)):
            raise UserError(f'{where} names {_plain(name)} twice with different values; get the file again')
    return result


SIGNATURES = {  # architecture -> a tensor that it has, and a name that only its longer relatives have
    'resnet50m': ('fc_fuse.0.weight', (1024, 4096), 'base.6.6.conv1.weight'),
    'resnet50': ('base.7.2.conv3.weight', (2048, 512, 1, 1), 'base.6.6.conv1.weight'),
    'densenet121': ('base.norm5.weight', (1024,), 'base.denseblock4.denselayer17.norm1.weight'),
}


def arch_of(state_dict: Mapping[str, Tensor]) -> str | None:
    """The architecture that weights with these names and shapes are for, None for one that is not of this project."""
    for arch, (name, shape, longer) in SIGNATURES.items():
        if name in state_dict and state_dict[name].shape == shape and longer not in state_dict:
            return arch
    return None


# ------------------------------------------------------------------------------------------------------------- loading


def load_into(
    model: nn.Module, state_dict: Mapping[str, Tensor], *, allow_other_classifier: bool, where: str
) -> list[str]:
    """Copies weights into a model, all of them or none; returns notices of what was left out, to be printed.

    Names, shapes and kinds of numbers are compared before anything is copied. Missing `num_batches_tracked` are
    accepted: PyTorch 0.3 had none, and a fixed momentum does not use them. A classifier of another size is left out,
    with a notice, where `allow_other_classifier`. Anything else that is missing, unexpected or wrongly shaped raises
    UserError, which lists it and guesses the architecture that the weights are for.

    A model's `options` are the names of buffers that are None, and so in no file, unless the network that the weights
    come from computes in another way; whether one is set follows the weights.

    where: the file, for the messages
    """
    own = model.state_dict()
    options = getattr(model, 'options', ())
    for option in options:
        own.pop(option, None)
        if option in state_dict:
            own[option] = torch.tensor(True, device=next(model.parameters()).device)
    missing = [key for key in own if key not in state_dict and not key.endswith('.num_batches_tracked')]
    unexpected = [key for key in state_dict if key not in own]
    unlike = [key for key in own if key in state_dict and not _alike(state_dict[key], own[key])]
    classifier = [key for key in unlike if key.startswith('classifier.')]

    if missing or unexpected or unlike != classifier:
        faults = [
            f'missing {_listed(missing)}' if missing else '',
            f'unexpected {_listed(unexpected)}' if unexpected else '',
            f'other shapes in {_listed(_shapes(key, state_dict, own) for key in unlike)}' if unlike else '',
        ]
        arch, own_arch = arch_of(state_dict), arch_of(own)
        if arch is None:
            guess = 'it looks like no architecture of this project'
        elif arch == own_arch:
            guess = f'it looks like another {arch} than the one of this project'
        else:
            guess = f'it looks like a {arch}: try --arch {arch}'
        raise UserError(f'{where} does not fit the model: {"; ".join(filter(None, faults))}; {guess}')
    others = _listed(_shapes(key, state_dict, own) for key in classifier)
    if classifier and not allow_other_classifier:
        raise UserError(
            f'{where} has a classifier for other identities: {others}; '
            f'test it with --evaluate, or start from its other weights with --resume-weights-only'
        )
    for option in options:
        setattr(model, option, own.get(option))
    model.load_state_dict({**own, **{key: value for key, value in state_dict.items() if key not in classifier}})
    return [f'Left out from {where}: {others}'] if classifier else []


def _alike(given: Tensor, own: Tensor) -> bool:
    return given.shape == own.shape and given.dtype.is_floating_point == own.dtype.is_floating_point


def _shapes(key: str, given: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> str:
    return f'{key} {_described(given[key])} where the model has {_described(own[key])}'


def _described(tensor: Tensor) -> str:
    shape = '×'.join(map(str, tensor.shape)) or 'scalar'
    return shape if tensor.dtype.is_floating_point else f'{shape} {str(tensor.dtype).removeprefix("torch.")}'


def pretrain(model: nn.Module, pretrained: str, imagenet: 'WeightsEnum | None') -> None:
    """Gives a model its first weights; prints what was taken and what was left out.

    pretrained: 'none' leaves the model alone; 'imagenet' takes torchvision's weights out of its cache, fetched once;
                anything else is the path of a file that `read` understands
    imagenet:   torchvision's name of the weights (a WeightsEnum), None where there are none for this model

    The classifier stays random, and so does the `fc_fuse` of ResNet50M where the weights have none. ImageNet's weights,
    known in a file by their 1000 classes, begin a network of this project: as in the original, DenseNet121 does not
    take over torchvision's last ReLU. Raises UserError for weights that cannot be had, read, or that do not fit.
    """
    if pretrained == 'none':
        return
    if pretrained == 'imagenet':
        where = "torchvision's ImageNet weights"
        if imagenet is None:
            raise UserError(f'{type(model).__name__} has no ImageNet weights; give --pretrained none or a path')
        state_dict, _ = normalised(_fetch(imagenet), where)
        layout, of_imagenet = str(imagenet), True
    else:
        where, weights = _plain(pretrained, 500), read(pretrained)
        state_dict, layout = weights.state_dict, weights.layout
        bias = state_dict.get('classifier.bias', torch.empty(0))
        of_imagenet = LAST_RELU in layout and bias.numel() == 1000

    own = model.state_dict()
    others = ('classifier.', 'last_relu') if of_imagenet else ('classifier.',)
    dropped = [key for key in state_dict if key.startswith(others)]
    taken = {key: value for key, value in state_dict.items() if key not in dropped}
    groups = ('classifier.',) if any(key.startswith('fc_fuse.') for key in taken) else ('classifier.', 'fc_fuse.')
    fresh = {key: value for key, value in own.items() if key.startswith(groups)}
    load_into(model, taken | fresh, allow_other_classifier=False, where=where)
    print(f'Loaded pretrained weights from {where} ({layout})')
    if dropped:
        print(f'Left out: {_listed(dropped)}')
    print(f'Starting from random weights: {_listed(fresh, most=len(fresh))}')


def _fetch(imagenet: 'WeightsEnum') -> dict[str, Tensor]:
    path = os.path.join(torch.hub.get_dir(), 'checkpoints', os.path.basename(imagenet.url))
    elsewise = 'give another file with --pretrained PATH, or start from random weights with --pretrained none'
    try:
        return imagenet.get_state_dict(
            progress=sys.stderr.isatty(), check_hash=True, weights_only=True, map_location='cpu'
        )
    except (OSError, http.client.HTTPException) as error:
        reason = _plain(str(getattr(error, 'reason', error)))
        raise UserError(
            f'the ImageNet weights could not be fetched ({reason}); put the file {imagenet.url} into '
            f'{os.path.dirname(path)} by hand, {elsewise}'
        ) from error
    except Exception as error:  # a damaged file in the cache, or a download with another checksum than its name says
        reason = _plain(f'{type(error).__name__}: {error}')
        raise UserError(f'{path} is damaged ({reason}); remove it and start again, {elsewise}') from error


# ---------------------------------------------------------------------------------------------------------- inspection

MAGIC = 0x1950A86A20F9469CFC6C  # first number of a legacy stream
MAX_INSTRUCTIONS = 1_000_000  # DenseNet121 with Adam has 60 thousand
MAX_DEPTH = 32  # a checkpoint has about 6
MAX_SIZE = 5_000_000  # values, counting shared ones as often as they are met
ELEMENT_BYTES = {
    'torch DoubleStorage': 8, 'torch FloatStorage': 4, 'torch HalfStorage': 2, 'torch BFloat16Storage': 2,
    'torch LongStorage': 8, 'torch IntStorage': 4, 'torch ShortStorage': 2, 'torch CharStorage': 1,
    'torch ByteStorage': 1, 'torch BoolStorage': 1,
}  # fmt: skip
CALLABLES = {
    'collections OrderedDict',
    'collections Counter',  # in the state of a MultiStepLR
    'torch._utils _rebuild_tensor',  # up to PyTorch 0.3
    'torch._utils _rebuild_tensor_v2',
    'torch._utils _rebuild_parameter',
    'torch.nn.parameter Parameter',  # up to PyTorch 0.3: torchvision's first backbones
    'numpy dtype',
    'numpy.core.multiarray scalar',  # up to numpy 1: rank1 in the published files
    'numpy._core.multiarray scalar',
    '_codecs encode',  # how Python 3 writes bytes for Python 2
}


class _Refused(Exception):
    """Why a file is refused, as the end of a sentence that begins with its path."""


@dataclass(slots=True, eq=False)
class _Value:
    """Stands for a value, other than a number or a string, that an instruction would make."""

    kind: str  # tuple, list, dict, OrderedDict, storage, tensor, parameter, dtype, scalar, global
    items: list = field(default_factory=list)  # elements; keys of a dict; [elements] of a storage; [name] of a global
    depth: int = 1
    size: int = 1
    placed: bool = False  # inside another value: may not grow any more

    def place(self, values: list) -> None:
        """Accounts for values that were put into this one; bounds what a walk, a hash or a print would cost later."""
        for value in values:
            if isinstance(value, _Value):
                value.placed = True
                self.depth = max(self.depth, value.depth + 1)
                self.size += value.size
            else:
                self.size += 1
        if self.placed:
            raise _Refused('has a list or dict that contains itself, which weights never need; nothing of it was run')
        if self.depth > MAX_DEPTH or self.size > MAX_SIZE:
            raise _Refused('is nested too deeply or grows too large for weights; nothing of it was run')


def _inspect_file(file: BinaryIO) -> str:
    """Follows a file without making anything of it; returns the kind of file. Raises _Refused, or whatever it meets."""
    size = os.fstat(file.fileno()).st_size
    head = file.read(4)
    file.seek(0)
    if head == b'PK\x03\x04':
        _inspect_zip(file, size)
        return 'a zip file'
    if head[:1] == b'\x80':
        _inspect_legacy(file, size)
        return 'a legacy stream'
    what = 'is empty' if size == 0 else f'is no PyTorch file (it begins with {head!r})'
    raise _Refused(f'{what}; get the checkpoint again')


def _inspect_zip(file: BinaryIO, size: int) -> None:
    """Zip file, PyTorch 1.6 and later: NAME/data.pkl, and NAME/data/KEY for every storage."""
    with zipfile.ZipFile(file) as archive:
        records = archive.infolist()
        for record in records:
            if record.compress_type != zipfile.ZIP_STORED or record.file_size != record.compress_size:
                raise _Refused('has compressed records, which PyTorch never writes and which can fill the memory')
            if set(record.filename.split('/')) & {'', '.', '..'} or '\\' in record.filename:
                raise _Refused(f'has a record named {_plain(record.filename)}, which leads out of the file; refused')
        names = {record.filename.lower(): record for record in records}  # PyTorch finds records by any case
        top, *others = {name.split('/')[0] for name in names} or {''}
        if others or f'{top}/data.pkl' not in names:
            raise _Refused('is a zip file, but no checkpoint; give the checkpoint itself')
        if f'{top}/constants.pkl' in names:
            raise _Refused('is a TorchScript program, not weights; save model.state_dict() where it was made')
        start = min(record.header_offset for record in records)
        if len(names) < len(records) or sum(record.file_size for record in records) > size or start or archive.comment:
            raise _Refused('is a zip file with shared or hidden records, which PyTorch never writes; refused')

        storages: dict[str, tuple[str, int]] = {}
        _inspect(io.BytesIO(archive.read(names[f'{top}/data.pkl'])), storages)
        for key, (kind, elements) in storages.items():
            record = names.get(f'{top}/data/{key}'.lower())
            if record is None or record.file_size != elements * ELEMENT_BYTES[kind]:
                raise _Refused(f'claims another size for its storage {_plain(key)} than it holds; get the file again')
        if damaged := archive.testzip():
            raise _Refused(f'is damaged: its record {_plain(damaged)} fails its checksum; get the file again')


def _inspect_legacy(file: BinaryIO, size: int) -> None:
    """Legacy stream, PyTorch 0.1 to 1.5: five pickles (magic number, protocol, C's types, the object, the keys of its
    storages), then for every storage its number of elements and its bytes."""
    if _inspect(file, None) != MAGIC:
        raise _Refused('is a pickle, but no PyTorch file; save weights with torch.save(model.state_dict(), path)')
    _inspect(file, None)
    _inspect(file, None)
    storages: dict[str, tuple[str, int]] = {}
    _inspect(file, storages)
    keys = _inspect(file, None)
    if not isinstance(keys, _Value) or keys.kind != 'list' or sorted(keys.items) != sorted(storages):
        raise _Refused('lists other storages than its tensors use; get the file again')
    need = sum(8 + elements * ELEMENT_BYTES[kind] for kind, elements in storages.values())  # 8: element count
    held = size - file.tell()
    if need > held:
        raise _Refused(f'is cut short: its tensors need {need} bytes, {held} are there; get the file again')


def _inspect(stream: BinaryIO, storages: dict[str, tuple[str, int]] | None) -> Any:
    """Follows one pickle with stand-ins; returns its number, string or _Value.

    storages: filled with key -> (kind, number of elements); None where no tensor may be
    """
    stack: list = []
    below: list[list] = []  # the stacks under the marks, as PyTorch keeps them
    memo: dict[int, Any] = {}

    def since_mark() -> list:
        nonlocal stack
        values, stack = stack, below.pop()
        return values

    for number, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
        if number > MAX_INSTRUCTIONS:
            raise _Refused('has more instructions than any weights need; nothing of it was run')
        match opcode.name:
            case 'PROTO':
                _expect(argument == 2, 'is pickled with another protocol than 2, the only one that PyTorch writes')
            case 'NONE' | 'NEWTRUE' | 'NEWFALSE':
                stack.append({'NONE': None, 'NEWTRUE': True, 'NEWFALSE': False}[opcode.name])
            case 'BININT' | 'BININT1' | 'BININT2' | 'LONG1' | 'BINFLOAT' | 'BINUNICODE' | 'SHORT_BINSTRING':
                stack.append(argument)
            case 'EMPTY_TUPLE' | 'EMPTY_LIST' | 'EMPTY_DICT':
                stack.append(_Value(opcode.name.removeprefix('EMPTY_').lower()))
            case 'MARK':
                below.append(stack)
                stack = []
            case 'TUPLE':
                values = since_mark()
                stack.append(_tuple(values))
            case 'TUPLE1' | 'TUPLE2' | 'TUPLE3':
                length = int(opcode.name[-1])
                values = [stack.pop() for _ in range(length)][::-1]
                stack.append(_tuple(values))
            case 'APPEND' | 'APPENDS':
                values = [stack.pop()] if opcode.name == 'APPEND' else since_mark()
                _expect(_kind(stack[-1]) == 'list', 'appends to what is no list')
                stack[-1].place(values)
                stack[-1].items.extend(values)
            case 'SETITEM' | 'SETITEMS':
                values = [stack.pop(), stack.pop()][::-1] if opcode.name == 'SETITEM' else since_mark()
                _expect(_kind(stack[-1]) in ('dict', 'OrderedDict'), 'sets items of what is no dict')
                _set_items(stack[-1], values[::2], values[1::2])
            case 'BINPUT' | 'LONG_BINPUT':
                memo[argument] = stack[-1]
            case 'BINGET' | 'LONG_BINGET':
                stack.append(memo[argument])
            case 'GLOBAL':
                if argument not in CALLABLES and argument not in ELEMENT_BYTES:
                    name = _plain(argument.replace(' ', '.', 1))
                    raise _Refused(
                        f'asks for {name}, which weights never need; nothing of it was run; '
                        f'take the file from a source that you trust, or save only a state dict where it was made'
                    )
                stack.append(_Value('global', [argument]))
            case 'BINPERSID':
                _expect(storages is not None, 'has a tensor where none belongs')
                stack.append(_storage(stack.pop(), storages))
            case 'REDUCE':
                arguments = stack.pop()
                stack.append(_call(stack.pop(), arguments))
            case 'BUILD':
                state = stack.pop()
                _expect(_may_build(stack[-1], state), 'sets the state of an object, which weights never need')
            case 'STOP':
                pass
            case name:
                raise _Refused(f'has the pickle instruction {name}, which weights never need; nothing of it was run')
    return stack.pop()


def _expect(holds: bool, otherwise: str) -> None:
    if not holds:
        raise _Refused(f'{otherwise}; nothing of it was run; get the file again')


def _kind(value: Any) -> str:
    return value.kind if isinstance(value, _Value) else type(value).__name__


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _tuple(values: list) -> _Value:
    made = _Value('tuple', values)
    made.place(values)
    return made


def _set_items(target: _Value, keys: list, values: list) -> None:
    _expect(len(keys) == len(values), 'has a key without a value')
    _expect(all(type(key) is str or (_is_size(key) and key < 2**31) for key in keys), 'has keys of an unknown form')
    target.place([*keys, *values])
    target.items.extend(keys)


def _storage(identity: Any, storages: dict[str, tuple[str, int]]) -> _Value:
    """('storage', kind, key, device, elements), in a legacy stream also the view: None or (key, offset, elements)."""
    _expect(_kind(identity) == 'tuple' and len(identity.items) in (5, 6), 'has a storage of an unknown form')
    word, kind, key, device, elements, *view = identity.items
    _expect(
        word == 'storage' and _kind(kind) == 'global' and kind.items[0] in ELEMENT_BYTES and _is_size(elements)
        and isinstance(key, str) and isinstance(device, str),
        'has a storage of an unknown form',
    )  # fmt: skip
    claim = (kind.items[0], elements)
    _expect(storages.setdefault(key, claim) == claim, 'claims two sizes for one storage')
    if view and view[0] is not None:
        _expect(_kind(view[0]) == 'tuple' and len(view[0].items) == 3, 'has a storage of an unknown form')
        _, offset, length = view[0].items
        _expect(
            _is_size(offset) and _is_size(length) and offset + length <= elements, 'has a view outside of its storage'
        )
        elements = length
    return _Value('storage', [elements])


def _call(function: Any, arguments: Any) -> _Value | bytes:
    """The stand-in for what a call of one of CALLABLES returns, after a check of its arguments."""
    _expect(_kind(function) == 'global' and _kind(arguments) == 'tuple', 'calls what cannot be called')
    name, given = function.items[0], arguments.items
    kinds = [_kind(value) for value in given]
    match name:
        case 'collections OrderedDict':
            made = _Value('OrderedDict')
            if given:  # Python 2 gives a list of [key, value]
                pairs = given[0].items if kinds == ['list'] else [None]
                _expect(
                    all(_kind(pair) == 'list' and len(pair.items) == 2 for pair in pairs), 'has a dict without pairs'
                )
                _set_items(made, [pair.items[0] for pair in pairs], [pair.items[1] for pair in pairs])
            return made
        case 'collections Counter':
            _expect(kinds == ['dict'], 'has a counter of an unknown form')
            return _Value('Counter', [], given[0].depth, given[0].size)
        case 'torch._utils _rebuild_tensor' | 'torch._utils _rebuild_tensor_v2':
            _expect(kinds[:4] == ['storage', 'int', 'tuple', 'tuple'], 'has a tensor of an unknown form')
            _expect(kinds[4:5] in ([], ['bool']) and all(map(_no_hooks, given[5:])), 'has a tensor with hooks')
            _expect_inside(*given[:4])
            return _Value('tensor')
        case 'torch._utils _rebuild_parameter':
            _expect(kinds[:2] == ['tensor', 'bool'] and all(map(_no_hooks, given[2:])), 'has a parameter with hooks')
            return _Value('tensor')
        case 'torch.nn.parameter Parameter':
            _expect(kinds == ['tensor'], 'has a parameter of an unknown form')
            return _Value('parameter')
        case 'numpy dtype':
            _expect(kinds[:1] == ['str'] and given[0] in ('f4', 'f8'), 'has a number that is no float')
            _expect(given[1:] == [False, True], 'has a number that is no float')
            return _Value('dtype', given[:1])
        case 'numpy.core.multiarray scalar' | 'numpy._core.multiarray scalar':
            _expect(kinds in (['dtype', 'str'], ['dtype', 'bytes']), 'has a number of an unknown form')
            _expect(len(given[1]) == int(given[0].items[0][1]), 'has a number of an unknown form')
            return _Value('scalar')
        case '_codecs encode':
            _expect(kinds == ['str', 'str'] and given[1] == 'latin1', 'has bytes of an unknown form')
            return given[0].encode('latin1')
    raise _Refused(f'calls {_plain(name.replace(" ", "."))}, which cannot be called; nothing of it was run')


def _no_hooks(hooks: Any) -> bool:
    return hooks is None or (_kind(hooks) == 'OrderedDict' and not hooks.items)


def _expect_inside(storage: _Value, offset: int, size: _Value, stride: _Value) -> None:
    """A tensor may not be larger than its storage: a stride of 0 would make anything of a single number."""
    lengths, steps = size.items, stride.items
    _expect(
        len(lengths) == len(steps) <= 8 and all(map(_is_size, [offset, *lengths, *steps])),
        'has a tensor of an unknown form',
    )
    end = offset + 1 + sum((length - 1) * step for length, step in zip(lengths, steps, strict=True))
    inside = math.prod(lengths) <= storage.items[0] and (0 in lengths or end <= storage.items[0])
    _expect(inside, 'has a tensor that is larger than its storage')


def _may_build(target: Any, state: Any) -> bool:
    match _kind(target), _kind(state):
        case 'OrderedDict', 'dict':  # the versions of the modules
            return state.items == ['_metadata'] and not target.placed
        case 'dtype', 'tuple':  # the float's byte order and nothing else
            return state.items == [3, '<', None, None, None, -1, -1, 0]
        case 'parameter', 'tuple':  # requires_grad, volatile, hooks
            *flags, hooks = state.items
            return len(flags) == 2 and all(isinstance(flag, bool) for flag in flags) and _no_hooks(hooks)
    return False


# --------------------------------------------------------------------------------------------------------------- words


def _plain(text: str, longest: int = 200) -> str:
    """Foreign text in one line that cannot steer a terminal: its first line, escaped where needed, cut."""
    line = text.strip().split('\n', 1)[0]
    line = line if line.isprintable() else ascii(line)[1:-1]
    return line if len(line) <= longest else f'{line[:longest]}...'


def _listed(names: Iterable, most: int = 8) -> str:
    names = [_plain(str(name)) for name in names]
    more = f' and {len(names) - most} more' if len(names) > most else ''
    return ', '.join(names[:most]) + more
