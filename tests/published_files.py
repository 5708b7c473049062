"""Writes weight files in the layouts that were published, and files that strangers might send, for the tests.

What today's PyTorch cannot write (the pickles of Python 2) is written by hand, instruction by instruction.
"""

import io
import pickle
import re
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

MAGIC = 0x1950A86A20F9469CFC6C  # of PyTorch's legacy stream

SECOND_NAMES = (  # of ResNet50M's layers
    (r'^base\.([01])\.', r'layers1.\1.'),
    (r'^base\.4\.', 'layers2.1.'),
    (r'^base\.5\.', 'layers3.'),
    (r'^base\.6\.', 'layers4.'),
    (r'^base\.7\.0\.', 'layers5a.'),
    (r'^base\.7\.1\.', 'layers5b.'),
    (r'^base\.7\.2\.', 'layers5c.'),
)
TORCHVISION_NAMES = (
    (r'^base\.0\.', 'conv1.'),
    (r'^base\.1\.', 'bn1.'),
    (r'^base\.4\.', 'layer1.'),
    (r'^base\.5\.', 'layer2.'),
    (r'^base\.6\.', 'layer3.'),
    (r'^base\.7\.', 'layer4.'),
    (r'^fc_fuse\.', 'fc_fusion.'),
    (r'^base\.', 'features.'),
)
DOTTED = (r'(denselayer\d+\.(?:norm|conv))([12])\.', r'\1.\2.')  # DenseNet's names up to PyTorch 0.3


def renamed(state_dict: dict, patterns, prefix: str = '') -> OrderedDict:
    result = OrderedDict()
    for key, value in state_dict.items():
        for pattern, replacement in patterns:
            key = re.sub(pattern, replacement, key)
        result[prefix + key] = value
    return result


def old_names(state_dict: dict, prefix: str = '') -> OrderedDict:
    """Today's weights as PyTorch 0.3 named them: no batch counters, dots in DenseNet, the layers of ResNet50M twice."""
    plain = {key: value for key, value in state_dict.items() if not key.endswith('num_batches_tracked')}
    if 'fc_fuse.0.weight' in plain:
        base = {key: value for key, value in plain.items() if key.startswith('base.')}
        rest = {key: value for key, value in plain.items() if key not in base}
        plain = {**base, **renamed(base, SECOND_NAMES), **rest}
    return renamed(plain, [DOTTED], prefix)


# ----------------------------------------------------------------------------------------- Python 2, PyTorch up to 0.3


class View:
    """A tensor whose storage is a view into the storage of another one."""

    def __init__(self, root: Tensor, offset: int, length: int):
        self.root, self.offset, self.length = root, offset, length


class OldParameter:
    """A parameter as PyTorch before 0.1.10 kept it in a state dict."""

    def __init__(self, tensor: Tensor):
        self.tensor = tensor


class Python2Pickler:
    """Protocol 2 as Python 2.7 wrote it: str is bytes (SHORT_BINSTRING), OrderedDict is called with a list of lists."""

    def __init__(self, location: str = 'cpu'):
        self.location = location
        self.memo: dict = {}
        self.storages: dict[str, Tensor] = {}  # key -> the storage's elements

    def dumps(self, value) -> bytes:
        self.memo = {}
        return b'\x80\x02' + self.save(value) + b'.'

    def remember(self, code: bytes, of=None) -> bytes:
        """BINPUT after an object; of: a value that is fetched from the memo from now on."""
        number = len(self.memo)
        self.memo[of if of is not None else object()] = number
        return code + (b'q' + bytes([number]) if number < 256 else b'r' + struct.pack('<I', number))

    def save(self, value) -> bytes:
        if isinstance(value, str | bytes) and value in self.memo:
            number = self.memo[value]
            return b'h' + bytes([number]) if number < 256 else b'j' + struct.pack('<I', number)
        match value:
            case None:
                return b'N'
            case bool():
                return b'\x88' if value else b'\x89'
            case int() if 0 <= value < 256:
                return b'K' + bytes([value])
            case int() if 0 <= value < 65536:
                return b'M' + struct.pack('<H', value)
            case int() if -(2**31) <= value < 2**31:
                return b'J' + struct.pack('<i', value)
            case int():  # Python 2's long
                digits = pickle.encode_long(value)
                return b'\x8a' + bytes([len(digits)]) + digits
            case np.float32() | np.float64():  # a subclass of float: before float
                kind = self.call('numpy', 'dtype', (f'f{value.nbytes}', 0, 1))
                kind += self.save((3, '<', None, None, None, -1, -1, 0)) + b'b'
                arguments = kind + self.save(value.tobytes().decode('latin1'))
                return self.remember(
                    self.name('numpy.core.multiarray', 'scalar') + self.remember(arguments + b'\x86') + b'R'
                )
            case float():
                return b'G' + struct.pack('>d', value)
            case str():  # Python 2's str
                data = value.encode('latin1')
                assert len(data) < 256
                return self.remember(b'U' + bytes([len(data)]) + data, of=value)
            case tuple():
                items = b''.join(map(self.save, value))
                if not value:
                    return b')'
                return self.remember(
                    items + {1: b'\x85', 2: b'\x86', 3: b'\x87'}[len(value)] if len(value) < 4 else b'(' + items + b't'
                )
            case list():
                return self.remember(b']') + b'(' + b''.join(map(self.save, value)) + b'e'
            case OrderedDict():
                return self.call('collections', 'OrderedDict', ([[key, item] for key, item in value.items()],))
            case dict():
                pairs = b''.join(self.save(key) + self.save(item) for key, item in value.items())
                return self.remember(b'}') + b'(' + pairs + b'u'
            case OldParameter():
                made = self.name('torch.nn.parameter', 'Parameter') + self.save(value.tensor) + b'\x85R'
                return self.remember(made) + self.save((True, False, OrderedDict())) + b'b'
            case Tensor():
                return self.tensor(value, value.untyped_storage(), None)
            case View():
                part = value.root.flatten()[value.offset : value.offset + value.length]
                return self.tensor(part.clone(), value.root.untyped_storage(), (value.offset, value.length))
        raise TypeError(type(value))

    def name(self, module: str, name: str) -> bytes:
        """GLOBAL, or its place in the memo."""
        code = f'c{module}\n{name}\n'.encode()
        if code in self.memo:
            return self.save(code)
        return self.remember(code, of=code)

    def call(self, module: str, name: str, arguments: tuple) -> bytes:
        return self.remember(self.name(module, name) + self.save(arguments) + b'R')

    def tensor(self, tensor: Tensor, storage: torch.UntypedStorage, view) -> bytes:
        kind = {torch.float32: 'FloatStorage', torch.float64: 'DoubleStorage', torch.int64: 'LongStorage'}[tensor.dtype]
        key = str(storage.data_ptr())  # 0.3 took the address of the C object
        elements = storage.nbytes() // tensor.element_size()
        self.storages[key] = torch.tensor([], dtype=tensor.dtype).set_(storage, 0, (elements,))
        seen = None if view is None else (f'{key}.{view[0]}', *view)
        identity = b'('
        identity += self.save('storage') + self.name('torch', kind) + self.save(key) + self.save(self.location)
        identity += self.save(elements) + self.save(seen) + b't'
        arguments = b'(' + self.remember(identity) + b'Q'
        arguments += self.save(tensor.storage_offset()) + self.save(tuple(tensor.shape)) + self.save(tensor.stride())
        return self.remember(self.name('torch._utils', '_rebuild_tensor') + self.remember(arguments + b't') + b'R')


def write_python2(path: Path, contents: dict, location: str = 'cuda:0') -> None:
    """A file as torch.save of PyTorch 0.3 wrote it under Python 2.7."""
    pickler = Python2Pickler(location)
    sizes = {'protocol_version': 1001, 'little_endian': True, 'type_sizes': {'short': 2, 'int': 4, 'long': 4}}
    with open(path, 'wb') as file:
        for value in (MAGIC, 1001, sizes, contents):
            file.write(pickler.dumps(value))
        keys = sorted(pickler.storages)
        file.write(pickler.dumps(keys))
        for key in keys:
            file.write(struct.pack('<q', pickler.storages[key].numel()))
            pickler.storages[key].numpy().tofile(file)


# ------------------------------------------------------------------------------------------------ files from strangers


def legacy_of(instructions: bytes, keys: tuple = (), data: bytes = b'') -> bytes:
    """A legacy stream around the instructions of one pickle, without its PROTO and STOP."""
    pickler = Python2Pickler()
    frame = [pickler.dumps(value) for value in (MAGIC, 1001, {'little_endian': True})]
    return b''.join([*frame, b'\x80\x02' + instructions + b'.', pickler.dumps(list(keys)), data])


def zip_of(
    instructions: bytes, records: dict[str, bytes] | None = None, compression: int = zipfile.ZIP_STORED
) -> bytes:
    """A zip file around the instructions of one pickle; records: name -> bytes, besides those of every file."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, 'w', compression) as archive:
        archive.writestr('archive/data.pkl', b'\x80\x02' + instructions + b'.')
        archive.writestr('archive/version', b'3\n')
        for name, data in (records or {}).items():
            archive.writestr(name, data)
    return buffer.getvalue()


def text(word: str) -> bytes:
    data = word.encode()
    return b'X' + struct.pack('<I', len(data)) + data


def number(value: int) -> bytes:
    digits = pickle.encode_long(value)
    return b'\x8a' + bytes([len(digits)]) + digits


def tensor_of(elements: int, offset: int, size: tuple, stride: tuple, view: bytes = b'') -> bytes:
    """Instructions for a tensor in a storage '0' of floats; view: the sixth entry of a legacy stream's storage."""
    identity = b'(' + text('storage') + b'ctorch\nFloatStorage\n' + text('0') + text('cpu') + number(elements) + view
    lengths = b'(' + b''.join(map(number, size)) + b't'
    steps = b'(' + b''.join(map(number, stride)) + b't'
    hooks = b'ccollections\nOrderedDict\n)R'
    return (
        b'ctorch._utils\n_rebuild_tensor_v2\n('
        + identity
        + b'tQ'
        + number(offset)
        + lengths
        + steps
        + b'\x89'
        + hooks
        + b'tR'
    )


def state_dict_of(value: bytes) -> bytes:
    """Instructions for {'weight': value}."""
    return b'}' + text('weight') + value + b's'
