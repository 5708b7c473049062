"""Reads untrusted PyTorch files safely.

Before PyTorch reads it (always with `weights_only=True`), the instructions of its pickle are simulated with
placeholders for the objects that they would create. Only names that weights need are allowed, every tensor must lie
within its storage and every storage within the file, and nesting depth and size are bounded.
"""

import io
import math
import os
import pickletools
import warnings
import zipfile
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import numpy as np
import torch

from files.kinds import HEAD, MODELS, not_a_file, recognised, recognised_zip
from runtime.errors import UserError, plain


def load(path: str | os.PathLike) -> tuple[Any, str]:
    """The contents of a file, with tensors on the CPU, and the kind of file. No code in the file is run.

    Raises UserError if the file is missing, truncated, damaged, compressed or not a checkpoint, or refers to anything
    but weights.
    """
    where = plain(os.fspath(path), 500)
    try:
        if what := not_a_file(path):  # before opening: opening a pipe would block
            raise Refused(what)
        with open(path, 'rb') as file:
            kind = inspect_file(file)
            file.seek(0)
            return _load(file), kind
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise UserError(f'{where} cannot be read ({reason}); give the path of a checkpoint') from error
    except Refused as refused:
        raise UserError(f'{where} {refused}') from refused
    except Exception as error:  # untrusted bytes may cause any exception
        reason = plain(f'{type(error).__name__}: {error}')
        raise UserError(f'{where} is damaged, truncated or not a checkpoint ({reason}); get the file again') from error


def _load(file: BinaryIO) -> Any:
    scalar = np.float32().__reduce__()[0]  # its module is numpy.core or numpy._core, depending on numpy's version
    scalars = [(scalar, f'numpy.{core}.multiarray.scalar') for core in ('core', '_core')]
    safe: list = [*scalars, np.dtype, type(np.dtype('f4')), type(np.dtype('f8'))]
    with warnings.catch_warnings(), torch.serialization.safe_globals(safe):
        warnings.simplefilter('ignore')  # 'encoding' works, but with a warning
        return torch.load(file, map_location='cpu', weights_only=True, encoding='latin1')  # latin1: Python 2's strings


MAGIC = 0x1950A86A20F9469CFC6C  # first number of a legacy stream
MAX_INSTRUCTIONS = 1_000_000  # DenseNet121 with Adam has 60 thousand
MAX_DEPTH = 32  # checkpoints have about 6
MAX_SIZE = 5_000_000  # values, counting shared ones each time they occur
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
    '_codecs encode',  # how Python 3 pickles bytes for Python 2
}


class Refused(Exception):
    """The reason why a file is rejected, as the end of a sentence that begins with its path."""


@dataclass(slots=True, eq=False)
class Placeholder:
    """A placeholder for a value, other than a number or a string, that an instruction would create."""

    kind: str  # tuple, list, dict, OrderedDict, storage, tensor, parameter, dtype, scalar, global
    items: list = field(default_factory=list)  # elements; keys of a dict; [elements] of a storage; [name] of a global
    depth: int = 1
    size: int = 1
    placed: bool = False  # inside another value, so it must not grow any more

    def place(self, values: list) -> None:
        """Records that values were put into this one; bounds the cost of traversing, hashing or printing it later."""
        for value in values:
            if isinstance(value, Placeholder):
                value.placed = True
                self.depth = max(self.depth, value.depth + 1)
                self.size += value.size
            else:
                self.size += 1
        if self.placed:
            raise Refused('has a list or dict that contains itself, which weights never need; no code was run')
        if self.depth > MAX_DEPTH or self.size > MAX_SIZE:
            raise Refused('is nested too deeply or is too large for weights; no code was run')


def inspect_file(file: BinaryIO) -> str:
    """Checks a file without creating any of its objects; returns its kind. Raises Refused, or any other exception."""
    size = os.fstat(file.fileno()).st_size
    head = file.read(4)
    file.seek(0)
    if head == b'PK\x03\x04':
        _inspect_zip(file, size)
        return 'a zip file'
    if head[:2] == b'\x80\x02':
        _inspect_legacy(file, size)
        return 'a legacy stream'
    if size == 0:
        raise Refused('is empty; get the checkpoint again')
    what = recognised(file.read(HEAD), *MODELS)
    raise Refused(what or f'is not a PyTorch file (it begins with {head!r}); give a checkpoint or a state dict')


def _inspect_zip(file: BinaryIO, size: int) -> None:
    """A zip file, as written by PyTorch 1.6 and later: NAME/data.pkl, and NAME/data/KEY for every storage."""
    with zipfile.ZipFile(file) as archive:
        records = archive.infolist()
        if what := recognised_zip(record.filename for record in records):
            raise Refused(what)
        for record in records:
            if record.compress_type != zipfile.ZIP_STORED or record.file_size != record.compress_size:
                raise Refused('has compressed records, which PyTorch never writes and which could fill the memory')
            if set(record.filename.split('/')) & {'', '.', '..'} or '\\' in record.filename:
                raise Refused(f'has a record named {plain(record.filename)}, which points outside the file')
        names = {record.filename.lower(): record for record in records}  # PyTorch finds records by any case
        top, *others = {name.split('/')[0] for name in names} or {''}
        if others or f'{top}/data.pkl' not in names:
            raise Refused('is a zip file, but not a checkpoint; give the checkpoint itself')
        start = min(record.header_offset for record in records)
        if len(names) < len(records) or sum(record.file_size for record in records) > size or start or archive.comment:
            raise Refused('is a zip file with shared or hidden records, which PyTorch never writes; get the file again')

        storages: dict[str, tuple[str, int]] = {}
        _inspect(io.BytesIO(archive.read(names[f'{top}/data.pkl'])), storages)
        for key, (kind, elements) in storages.items():
            held = names.get(f'{top}/data/{key}'.lower())
            if held is None or held.file_size != elements * ELEMENT_BYTES[kind]:
                raise Refused(
                    f'declares a size for its storage {plain(key)} that differs from its record; get the file again'
                )
        if damaged := archive.testzip():
            raise Refused(f'is damaged: its record {plain(damaged)} fails its checksum; get the file again')


def _inspect_legacy(file: BinaryIO, size: int) -> None:
    """A legacy stream, as written by PyTorch 0.1 to 1.5: five pickles (magic number, protocol, sizes of C types, the
    object, the keys of its storages), then for every storage its number of elements and its bytes."""
    if _inspect(file, None) != MAGIC:
        raise Refused('is a pickle, but not a PyTorch file; save weights with torch.save(model.state_dict(), path)')
    _inspect(file, None)
    _inspect(file, None)
    storages: dict[str, tuple[str, int]] = {}
    _inspect(file, storages)
    keys = _inspect(file, None)
    if not isinstance(keys, Placeholder) or keys.kind != 'list' or sorted(keys.items) != sorted(storages):
        raise Refused('lists storages that differ from those of its tensors; get the file again')
    need = sum(8 + elements * ELEMENT_BYTES[kind] for kind, elements in storages.values())  # 8: element count
    held = size - file.tell()
    if need > held:
        raise Refused(f'is truncated: its tensors need {need} bytes, but it has only {held}; get the file again')


def _inspect(stream: BinaryIO, storages: dict[str, tuple[str, int]] | None) -> Any:
    """Simulates one pickle with placeholders; returns its number, string or Placeholder.

    storages: filled with key -> (kind, number of elements); None if tensors are not allowed
    """
    stack: list = []
    below: list[list] = []  # the stacks below the marks, as in PyTorch
    memo: dict[int, Any] = {}
    argument: Any

    def since_mark() -> list:
        nonlocal stack
        values, stack = stack, below.pop()
        return values

    for number, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
        if number > MAX_INSTRUCTIONS:
            raise Refused('has more instructions than any weights need; no code was run')
        match opcode.name:
            case 'PROTO':
                _expect(argument == 2, 'is pickled with a protocol other than 2, the only one that PyTorch writes')
            case 'NONE' | 'NEWTRUE' | 'NEWFALSE':
                stack.append({'NONE': None, 'NEWTRUE': True, 'NEWFALSE': False}[opcode.name])
            case 'BININT' | 'BININT1' | 'BININT2' | 'LONG1' | 'BINFLOAT' | 'BINUNICODE' | 'SHORT_BINSTRING':
                stack.append(argument)
            case 'EMPTY_TUPLE' | 'EMPTY_LIST' | 'EMPTY_DICT':
                stack.append(Placeholder(opcode.name.removeprefix('EMPTY_').lower()))
            case 'MARK':
                below.append(stack)
                stack = []
            case 'TUPLE' | 'TUPLE1' | 'TUPLE2' | 'TUPLE3':
                length = opcode.name.removeprefix('TUPLE')
                values = [stack.pop() for _ in range(int(length))][::-1] if length else since_mark()
                stack.append(Placeholder('tuple', values))
                stack[-1].place(values)
            case 'APPEND' | 'APPENDS':
                values = [stack.pop()] if opcode.name == 'APPEND' else since_mark()
                _expect(_kind(stack[-1]) == 'list', 'appends to something that is not a list')
                stack[-1].place(values)
                stack[-1].items.extend(values)
            case 'SETITEM' | 'SETITEMS':
                values = [stack.pop(), stack.pop()][::-1] if opcode.name == 'SETITEM' else since_mark()
                _expect(_kind(stack[-1]) in ('dict', 'OrderedDict'), 'sets items of something that is not a dict')
                _set_items(stack[-1], values[::2], values[1::2])
            case 'BINPUT' | 'LONG_BINPUT':
                memo[argument] = stack[-1]
            case 'BINGET' | 'LONG_BINGET':
                stack.append(memo[argument])
            case 'GLOBAL':
                if argument not in CALLABLES and argument not in ELEMENT_BYTES:
                    raise Refused(
                        f'refers to {plain(argument.replace(" ", ".", 1))}, which weights never need; no code was run; '
                        f'get it from a source that you trust, or save only a state dict in the program that wrote it'
                    )
                stack.append(Placeholder('global', [argument]))
            case 'BINPERSID':
                if storages is None:
                    raise Refused('has a tensor where none is allowed; no code was run; get the file again')
                stack.append(_storage(stack.pop(), storages))
            case 'REDUCE':
                arguments = stack.pop()
                stack.append(_call(stack.pop(), arguments))
            case 'BUILD':
                state = stack.pop()
                _expect(_may_build(stack[-1], state), 'sets the state of an object, which weights never need')
            case name if name != 'STOP':
                raise Refused(f'has the pickle instruction {name}, which weights never need; no code was run')
    return stack.pop()


def _expect(holds: bool, otherwise: str) -> None:
    if not holds:
        raise Refused(f'{otherwise}; no code was run; get the file again')


def _kind(value: Any) -> str:
    return value.kind if isinstance(value, Placeholder) else type(value).__name__


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _set_items(target: Placeholder, keys: list, values: list) -> None:
    _expect(len(keys) == len(values), 'has a key without a value')
    _expect(all(type(key) is str or (_is_size(key) and key < 2**31) for key in keys), 'has unsupported keys')
    target.place([*keys, *values])
    target.items.extend(keys)


def _storage(identity: Any, storages: dict[str, tuple[str, int]]) -> Placeholder:
    """('storage', kind, key, device, elements), in a legacy stream also the view: None or (key, offset, elements)."""
    _expect(_kind(identity) == 'tuple' and len(identity.items) in (5, 6), 'has an unsupported storage')
    word, kind, key, device, elements, *view = identity.items
    _expect(
        word == 'storage' and _kind(kind) == 'global' and kind.items[0] in ELEMENT_BYTES and _is_size(elements)
        and isinstance(key, str) and isinstance(device, str),
        'has an unsupported storage',
    )  # fmt: skip
    claim = (kind.items[0], elements)
    _expect(storages.setdefault(key, claim) == claim, 'declares two sizes for one storage')
    if view and view[0] is not None:
        _expect(_kind(view[0]) == 'tuple' and len(view[0].items) == 3, 'has an unsupported storage')
        _, offset, length = view[0].items
        inside = _is_size(offset) and _is_size(length) and offset + length <= elements
        _expect(inside, 'has a view outside its storage')
        elements = length
    return Placeholder('storage', [elements])


def _call(function: Any, arguments: Any) -> Placeholder | bytes:
    """The placeholder for the result of calling one of CALLABLES, after checking the arguments."""
    _expect(_kind(function) == 'global' and _kind(arguments) == 'tuple', 'calls something that is not callable')
    name, given = function.items[0], arguments.items
    kinds = [_kind(value) for value in given]
    match name:
        case 'collections OrderedDict':
            made = Placeholder('OrderedDict')
            if given:  # Python 2 passes a list of [key, value]
                pairs: list = given[0].items if kinds == ['list'] else [None]
                paired = all(_kind(pair) == 'list' and len(pair.items) == 2 for pair in pairs)
                _expect(paired, 'has a dict without pairs')
                _set_items(made, [pair.items[0] for pair in pairs], [pair.items[1] for pair in pairs])
            return made
        case 'collections Counter':
            _expect(kinds == ['dict'], 'has an unsupported counter')
            return Placeholder('Counter', [], given[0].depth, given[0].size)
        case 'torch._utils _rebuild_tensor' | 'torch._utils _rebuild_tensor_v2':
            _expect(kinds[:4] == ['storage', 'int', 'tuple', 'tuple'], 'has an unsupported tensor')
            _expect(kinds[4:5] in ([], ['bool']) and all(map(_no_hooks, given[5:])), 'has a tensor with hooks')
            _expect_inside(*given[:4])
            return Placeholder('tensor')
        case 'torch._utils _rebuild_parameter':
            _expect(kinds[:2] == ['tensor', 'bool'] and all(map(_no_hooks, given[2:])), 'has a parameter with hooks')
            return Placeholder('tensor')
        case 'torch.nn.parameter Parameter':
            _expect(kinds == ['tensor'], 'has an unsupported parameter')
            return Placeholder('parameter')
        case 'numpy dtype':
            is_float = kinds[:1] == ['str'] and given[0] in ('f4', 'f8') and given[1:] == [False, True]
            _expect(is_float, 'has a number that is not a float')
            return Placeholder('dtype', given[:1])
        case 'numpy.core.multiarray scalar' | 'numpy._core.multiarray scalar':
            fits = kinds in (['dtype', 'str'], ['dtype', 'bytes']) and len(given[1]) == int(given[0].items[0][1])
            _expect(fits, 'has an unsupported number')
            return Placeholder('scalar')
        case '_codecs encode':
            _expect(kinds == ['str', 'str'] and given[1] == 'latin1', 'has unsupported bytes')
            return bytes(given[0], 'latin1')
    raise Refused(f'calls {plain(name.replace(" ", "."))}, which must not be called; no code was run')


def _no_hooks(hooks: Any) -> bool:
    return hooks is None or (_kind(hooks) == 'OrderedDict' and not hooks.items)


def _expect_inside(storage: Placeholder, offset: int, size: Placeholder, stride: Placeholder) -> None:
    """A tensor must not be larger than its storage: a stride of 0 could make a huge tensor from a single number."""
    lengths, steps = size.items, stride.items
    known = len(lengths) == len(steps) <= 8 and all(map(_is_size, [offset, *lengths, *steps]))
    _expect(known, 'has an unsupported tensor')
    end = offset + 1 + sum((length - 1) * step for length, step in zip(lengths, steps, strict=True))
    inside = math.prod(lengths) <= storage.items[0] and (0 in lengths or end <= storage.items[0])
    _expect(inside, 'has a tensor that is larger than its storage')


def _may_build(target: Any, state: Any) -> bool:
    match _kind(target), _kind(state):
        case 'OrderedDict', 'dict':  # the versions of the modules
            return state.items == ['_metadata'] and not target.placed
        case 'dtype', 'tuple':  # only the byte order of the float
            return bool(state.items == [3, '<', None, None, None, -1, -1, 0])
        case 'parameter', 'tuple':  # requires_grad, volatile, hooks
            *flags, hooks = state.items
            return len(flags) == 2 and all(isinstance(flag, bool) for flag in flags) and _no_hooks(hooks)
    return False
