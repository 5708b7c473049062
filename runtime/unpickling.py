"""Reading a stranger's PyTorch file safely.

Before PyTorch reads it (always with `weights_only=True`), the instructions of its pickle are followed with stand-ins
for everything they would create: only what weights need may be named, every tensor must lie inside its storage, every
storage inside the file, and nothing may be nested deeply or grow without bound.
"""

import io
import math
import os
import pickletools
import stat
import warnings
import zipfile
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import numpy as np
import torch

from runtime.errors import UserError, plain


def load(path: str | os.PathLike) -> tuple[Any, str]:
    """What a file holds, tensors on the CPU, and what kind of file it is; runs nothing that is in it.

    Raises UserError, in one line, for a file that is missing, truncated, damaged, no checkpoint, larger unpacked than
    packed, or that names anything but weights.
    """
    where = plain(os.fspath(path), 500)
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # before it is opened: a pipe would wait for ever
            raise Refused('is no regular file; give the path of a checkpoint')
        with open(path, 'rb') as file:
            kind = inspect_file(file)
            file.seek(0)
            return _load(file), kind
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise UserError(f'{where} cannot be read ({reason}); give the path of a checkpoint') from error
    except Refused as refused:
        raise UserError(f'{where} {refused}') from refused
    except Exception as error:  # whatever a stranger's bytes provoke is the file's fault
        reason = plain(f'{type(error).__name__}: {error}')
        raise UserError(f'{where} is damaged, cut short or no checkpoint ({reason}); get the file again') from error


def _load(file: BinaryIO) -> Any:
    scalar = np.float32().__reduce__()[0]  # its module is numpy.core or numpy._core, by numpy's version
    scalars = [(scalar, f'numpy.{core}.multiarray.scalar') for core in ('core', '_core')]
    safe = [*scalars, np.dtype, type(np.dtype('f4')), type(np.dtype('f8'))]
    with warnings.catch_warnings(), torch.serialization.safe_globals(safe):
        warnings.simplefilter('ignore')  # 'encoding' is obeyed, but warned about
        return torch.load(file, map_location='cpu', weights_only=True, encoding='latin1')  # latin1: Python 2's strings


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


class Refused(Exception):
    """Why a file is refused, as the end of a sentence that begins with its path."""


@dataclass(slots=True, eq=False)
class Value:
    """Stands for a value, other than a number or a string, that an instruction would make."""

    kind: str  # tuple, list, dict, OrderedDict, storage, tensor, parameter, dtype, scalar, global
    items: list = field(default_factory=list)  # elements; keys of a dict; [elements] of a storage; [name] of a global
    depth: int = 1
    size: int = 1
    placed: bool = False  # inside another value: may not grow any more

    def place(self, values: list) -> None:
        """Accounts for values that were put into this one; bounds what a walk, a hash or a print would cost later."""
        for value in values:
            if isinstance(value, Value):
                value.placed = True
                self.depth = max(self.depth, value.depth + 1)
                self.size += value.size
            else:
                self.size += 1
        if self.placed:
            raise Refused('has a list or dict that contains itself, which weights never need; nothing of it was run')
        if self.depth > MAX_DEPTH or self.size > MAX_SIZE:
            raise Refused('is nested too deeply or grows too large for weights; nothing of it was run')


def inspect_file(file: BinaryIO) -> str:
    """Follows a file without making anything of it; returns the kind of file. Raises Refused, or whatever it meets."""
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
    raise Refused(f'{what}; get the checkpoint again')


def _inspect_zip(file: BinaryIO, size: int) -> None:
    """Zip file, PyTorch 1.6 and later: NAME/data.pkl, and NAME/data/KEY for every storage."""
    with zipfile.ZipFile(file) as archive:
        records = archive.infolist()
        for record in records:
            if record.compress_type != zipfile.ZIP_STORED or record.file_size != record.compress_size:
                raise Refused('has compressed records, which PyTorch never writes and which can fill the memory')
            if set(record.filename.split('/')) & {'', '.', '..'} or '\\' in record.filename:
                raise Refused(f'has a record named {plain(record.filename)}, which leads out of the file; refused')
        names = {record.filename.lower(): record for record in records}  # PyTorch finds records by any case
        top, *others = {name.split('/')[0] for name in names} or {''}
        if others or f'{top}/data.pkl' not in names:
            raise Refused('is a zip file, but no checkpoint; give the checkpoint itself')
        if f'{top}/constants.pkl' in names:
            raise Refused('is a TorchScript program, not weights; save model.state_dict() where it was made')
        start = min(record.header_offset for record in records)
        if len(names) < len(records) or sum(record.file_size for record in records) > size or start or archive.comment:
            raise Refused('is a zip file with shared or hidden records, which PyTorch never writes; refused')

        storages: dict[str, tuple[str, int]] = {}
        _inspect(io.BytesIO(archive.read(names[f'{top}/data.pkl'])), storages)
        for key, (kind, elements) in storages.items():
            record = names.get(f'{top}/data/{key}'.lower())
            if record is None or record.file_size != elements * ELEMENT_BYTES[kind]:
                raise Refused(f'claims another size for its storage {plain(key)} than it holds; get the file again')
        if damaged := archive.testzip():
            raise Refused(f'is damaged: its record {plain(damaged)} fails its checksum; get the file again')


def _inspect_legacy(file: BinaryIO, size: int) -> None:
    """Legacy stream, PyTorch 0.1 to 1.5: five pickles (magic number, protocol, C's types, the object, the keys of its
    storages), then for every storage its number of elements and its bytes."""
    if _inspect(file, None) != MAGIC:
        raise Refused('is a pickle, but no PyTorch file; save weights with torch.save(model.state_dict(), path)')
    _inspect(file, None)
    _inspect(file, None)
    storages: dict[str, tuple[str, int]] = {}
    _inspect(file, storages)
    keys = _inspect(file, None)
    if not isinstance(keys, Value) or keys.kind != 'list' or sorted(keys.items) != sorted(storages):
        raise Refused('lists other storages than its tensors use; get the file again')
    need = sum(8 + elements * ELEMENT_BYTES[kind] for kind, elements in storages.values())  # 8: element count
    if need > (held := size - file.tell()):
        raise Refused(f'is cut short: its tensors need {need} bytes, {held} are there; get the file again')


def _inspect(stream: BinaryIO, storages: dict[str, tuple[str, int]] | None) -> Any:
    """Follows one pickle with stand-ins; returns its number, string or Value.

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
            raise Refused('has more instructions than any weights need; nothing of it was run')
        match opcode.name:
            case 'PROTO':
                _expect(argument == 2, 'is pickled with another protocol than 2, the only one that PyTorch writes')
            case 'NONE' | 'NEWTRUE' | 'NEWFALSE':
                stack.append({'NONE': None, 'NEWTRUE': True, 'NEWFALSE': False}[opcode.name])
            case 'BININT' | 'BININT1' | 'BININT2' | 'LONG1' | 'BINFLOAT' | 'BINUNICODE' | 'SHORT_BINSTRING':
                stack.append(argument)
            case 'EMPTY_TUPLE' | 'EMPTY_LIST' | 'EMPTY_DICT':
                stack.append(Value(opcode.name.removeprefix('EMPTY_').lower()))
            case 'MARK':
                below.append(stack)
                stack = []
            case 'TUPLE':
                values = since_mark()
                stack.append(_tuple(values))
            case 'TUPLE1' | 'TUPLE2' | 'TUPLE3':
                stack.append(_tuple([stack.pop() for _ in range(int(opcode.name[-1]))][::-1]))
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
                    raise Refused(
                        f'asks for {plain(argument.replace(" ", ".", 1))}, which weights never need; nothing of it was '
                        f'run; take the file from a source that you trust, or save only a state dict where it was made'
                    )
                stack.append(Value('global', [argument]))
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
                raise Refused(f'has the pickle instruction {name}, which weights never need; nothing of it was run')
    return stack.pop()


def _expect(holds: bool, otherwise: str) -> None:
    if not holds:
        raise Refused(f'{otherwise}; nothing of it was run; get the file again')


def _kind(value: Any) -> str:
    return value.kind if isinstance(value, Value) else type(value).__name__


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _tuple(values: list) -> Value:
    made = Value('tuple', values)
    made.place(values)
    return made


def _set_items(target: Value, keys: list, values: list) -> None:
    _expect(len(keys) == len(values), 'has a key without a value')
    _expect(all(type(key) is str or (_is_size(key) and key < 2**31) for key in keys), 'has keys of an unknown form')
    target.place([*keys, *values])
    target.items.extend(keys)


def _storage(identity: Any, storages: dict[str, tuple[str, int]]) -> Value:
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
        inside = _is_size(offset) and _is_size(length) and offset + length <= elements
        _expect(inside, 'has a view outside of its storage')
        elements = length
    return Value('storage', [elements])


def _call(function: Any, arguments: Any) -> Value | bytes:
    """The stand-in for what a call of one of CALLABLES returns, after a check of its arguments."""
    _expect(_kind(function) == 'global' and _kind(arguments) == 'tuple', 'calls what cannot be called')
    name, given = function.items[0], arguments.items
    kinds = [_kind(value) for value in given]
    match name:
        case 'collections OrderedDict':
            made = Value('OrderedDict')
            if given:  # Python 2 gives a list of [key, value]
                pairs = given[0].items if kinds == ['list'] else [None]
                paired = all(_kind(pair) == 'list' and len(pair.items) == 2 for pair in pairs)
                _expect(paired, 'has a dict without pairs')
                _set_items(made, [pair.items[0] for pair in pairs], [pair.items[1] for pair in pairs])
            return made
        case 'collections Counter':
            _expect(kinds == ['dict'], 'has a counter of an unknown form')
            return Value('Counter', [], given[0].depth, given[0].size)
        case 'torch._utils _rebuild_tensor' | 'torch._utils _rebuild_tensor_v2':
            _expect(kinds[:4] == ['storage', 'int', 'tuple', 'tuple'], 'has a tensor of an unknown form')
            _expect(kinds[4:5] in ([], ['bool']) and all(map(_no_hooks, given[5:])), 'has a tensor with hooks')
            _expect_inside(*given[:4])
            return Value('tensor')
        case 'torch._utils _rebuild_parameter':
            _expect(kinds[:2] == ['tensor', 'bool'] and all(map(_no_hooks, given[2:])), 'has a parameter with hooks')
            return Value('tensor')
        case 'torch.nn.parameter Parameter':
            _expect(kinds == ['tensor'], 'has a parameter of an unknown form')
            return Value('parameter')
        case 'numpy dtype':
            _expect(given in (['f4', False, True], ['f8', False, True]), 'has a number that is no float')
            return Value('dtype', given[:1])
        case 'numpy.core.multiarray scalar' | 'numpy._core.multiarray scalar':
            known = kinds in (['dtype', 'str'], ['dtype', 'bytes']) and len(given[1]) == int(given[0].items[0][1])
            _expect(known, 'has a number of an unknown form')
            return Value('scalar')
        case '_codecs encode':
            _expect(kinds == ['str', 'str'] and given[1] == 'latin1', 'has bytes of an unknown form')
            return given[0].encode('latin1')
    raise Refused(f'calls {plain(name.replace(" ", "."))}, which cannot be called; nothing of it was run')


def _no_hooks(hooks: Any) -> bool:
    return hooks is None or (_kind(hooks) == 'OrderedDict' and not hooks.items)


def _expect_inside(storage: Value, offset: int, size: Value, stride: Value) -> None:
    """A tensor may not be larger than its storage: a stride of 0 would make anything of a single number."""
    lengths, steps = size.items, stride.items
    known = len(lengths) == len(steps) <= 8 and all(map(_is_size, [offset, *lengths, *steps]))
    _expect(known, 'has a tensor of an unknown form')
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
