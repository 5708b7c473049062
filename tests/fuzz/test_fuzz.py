"""Random files for the readers of foreign files: weights, names, lists and tables of data sets.

Whatever a file holds, it is read or refused in one line, in bounded time and memory, and nothing of it is run. As
tests, each reader is given a few hundred inputs, the same ones every time. As a command, new ones for as long as told:

    python tests/fuzz/test_fuzz.py weights market1501 mars --seconds 600

Hypothesis draws them at random; where atheris is installed, it then goes for the code that none of them has reached.
A finding ends it with exit status 1. The input, which Hypothesis makes as small as it can, is left in
tests/fuzz/findings/.
"""

import argparse
import contextlib
import csv
import functools
import importlib
import io
import itertools
import json
import multiprocessing
import os
import pickletools
import random
import resource
import shutil
import signal
import string
import struct
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable
from pathlib import Path

sys.path.extend(map(str, Path(__file__).resolve().parents[1:3]))  # as a command; pytest has them

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from published_files import (
    OldParameter,
    View,
    legacy_of,
    number,
    state_dict_of,
    tensor_of,
    text,
    write_python2,
    zip_of,
)
from scipy.io import savemat
from scipy.sparse import csc_matrix
from torch import nn

import data_manager
import weights
from files import kinds, safetensors, unpickling
from models import layouts, loading
from models.network import Network
from readers import market1501, mars, msmt17, table, tree
from readers.tree import paths_of
from runtime.errors import UserError

READERS = [
    pickletools,
    zipfile,
    kinds,
    weights,
    layouts,
    loading,
    safetensors,
    unpickling,
    market1501,
    mars,
    msmt17,
    table,
    tree,
    data_manager,
]
ROOT = Path(__file__).resolve().parents[2]
SECONDS = 20  # of a core that one input may take; a million instructions are followed in 3
HANG = 600  # seconds after which one that takes no time of a core hangs
MEGABYTES = 400  # that one input may need: the inputs are small
ENGINES = ['hypothesis', *(['atheris'] if importlib.util.find_spec('atheris') else [])]
FINDINGS = ROOT / 'tests' / 'fuzz' / 'findings'
QUIET = {'deadline': None, 'database': None, 'report_multiple_bugs': False, 'suppress_health_check': list(HealthCheck)}

# ---- what may not happen, whatever the input ----

FORBIDDEN = ('os.', 'subprocess.', 'socket.', 'shutil.', 'tempfile.', 'pickle.find_class', 'ctypes.', 'exec', 'open')
HARMLESS = ('os.listdir', 'os.scandir')
watching = False
events: list[str] = []


def audit(event: str, args: tuple) -> None:
    """Python's own account of what is run and opened; it sees what a patched os.system would not."""
    if not watching or event in HARMLESS:
        return
    if event == 'exec' and importing():  # PyTorch imports some of its modules late
        return
    if event == 'open' and not set(args[1] or '') & set('wax+') and not args[2] & (os.O_WRONLY | os.O_RDWR):
        return
    if event.startswith(FORBIDDEN):
        events.append(f'{event} {args}')


def importing() -> bool:
    frame = sys._getframe()
    while frame and not frame.f_code.co_filename.startswith('<frozen importlib'):
        frame = frame.f_back
    return frame is not None


sys.addaudithook(audit)


class Stuck(BaseException):
    """An input took longer than SECONDS; no `except Exception` of a reader holds it up."""


def stuck(*_) -> None:
    raise Stuck


@contextlib.contextmanager
def watched():
    """Reading, and nothing else, in bounded time and memory. What is printed is kept from the terminal."""
    global watching
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    others = {number: signal.signal(number, stuck) for number in (signal.SIGPROF, signal.SIGALRM)}
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    signal.alarm(HANG)
    watching = True
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter('ignore')
            yield
    finally:
        watching = False
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.alarm(0)
        for number, other in others.items():
            signal.signal(number, other)
        done = events[:]
        events.clear()
    assert not done, done
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MEGABYTES * 1024, 'too much memory'


def assert_one_line(error: UserError) -> None:
    """It can be printed anywhere, and steers no terminal."""
    message = str(error)
    assert message.isprintable(), ascii(message)
    assert len(message) < 2000


# ---- edits that fit any file ----

INTERESTING = [
    0,
    1,
    -1,
    2,
    3,
    7,
    127,
    128,
    255,
    256,
    32767,
    65535,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**40,
    2**63 - 1,
    2**63,
]
PLACES = st.integers(0, 2**16)  # of 2**16 equal parts of a file
CHUNKS = st.one_of(
    st.binary(min_size=1, max_size=8),
    st.sampled_from(INTERESTING).map(lambda value: struct.pack('<Q', value % 2**64)),
    st.sampled_from(INTERESTING).map(lambda value: struct.pack('<I', value % 2**32)),
    st.sampled_from(INTERESTING).map(lambda value: bytes([value % 256])),
)
EDITS = st.lists(
    st.tuples(
        st.sampled_from(['put', 'insert', 'delete', 'repeat', 'flip', 'end']), PLACES, CHUNKS, st.integers(1, 64)
    ),
    max_size=6,
)


def edited(data: bytes, edits: list) -> bytes:
    for kind, place, chunk, length in edits:
        at = place * len(data) >> 16
        match kind:
            case 'put':
                data = data[:at] + chunk + data[at + len(chunk) :]
            case 'insert':
                data = data[:at] + chunk + data[at:]
            case 'delete':
                data = data[:at] + data[at + length :]
            case 'repeat':
                data = data[: at + length] + data[at:]
            case 'flip':
                data = data[:at] + bytes(byte ^ 1 << length % 8 for byte in data[at : at + 1]) + data[at + 1 :]
            case 'end' if length < 8:  # most other edits would be lost
                data = data[:at]
    return data


# ---- weights ----

WORDS = [
    'weight',
    'module.weight',
    'state_dict',
    'format',
    weights.FORMAT,
    'rank1',
    'epoch',
    '_metadata',
    'storage',
    'cpu',
]
WORDS += ['0', 'f4', 'latin1', 'base.norm5.weight', 'classifier.weight', '__class__', 'x\n\x1b[31m', '', '\u2028']
GLOBALS = [
    *unpickling.CALLABLES,
    *unpickling.ELEMENT_BYTES,
    'posix system',
    '__builtin__ eval',
    'builtins getattr',
    'os popen',
]
GLOBALS += ['torch load', 'torch Tensor', 'torch._utils _rebuild_wrapper_subclass', 'numpy ndarray', 'x\x1b y']
ATTACKS = [
    b'cposix\nsystem\n(' + text('touch executed') + b'tR',
    b'c__builtin__\neval\n(' + text("open('executed', 'w')") + b'tR',
    b'ctorch\nFloatStorage\n(' + number(10**12) + b'tR',
    b']q\x00h\x00a',
]
SIZES = st.one_of(st.integers(0, 5), st.sampled_from([*INTERESTING, 10**600]))
TENSORS = st.builds(
    tensor_of,
    SIZES,
    SIZES,
    st.lists(SIZES, max_size=4).map(tuple),
    st.lists(SIZES, max_size=4).map(tuple),
    st.sampled_from([b'', b'N', b'(' + text('v') + b'K\x00K\x01t']),
)
GOOD = st.sampled_from(
    [tensor_of(4, 0, (2, 2), (2, 1)), tensor_of(4, 0, (2, 2), (2, 1), b'N'), tensor_of(4, 3, (), (), b'N')]
)
ATOMS = st.one_of(
    st.sampled_from([bytes([code]) for code in range(256)]),
    SIZES.map(number),
    st.sampled_from(WORDS).map(text),
    st.sampled_from(GLOBALS).map(lambda name: b'c' + '\n'.join(name.split(' ')).encode() + b'\n'),
    st.tuples(st.sampled_from(b'hqUKC'), st.integers(0, 9)).map(bytes),
    st.floats().map(lambda value: b'G' + struct.pack('>d', value)),
    st.sampled_from(
        [b'N', b'\x88', b'(', b')', b']', b'}', b't', b'R', b'b', b's', b'u', b'a', b'e', b'\x85', b'\x86', b'Q']
    ),
    st.sampled_from(ATTACKS),
    GOOD,
    TENSORS,
)


def _dict_of(pairs: list) -> bytes:
    return b'}(' + b''.join(text(key) + value for key, value in pairs) + b'u'


VALUES = st.recursive(
    st.one_of(ATOMS, GOOD),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3).map(lambda values: b'(' + b''.join(values) + b't'),
        st.lists(inner, max_size=3).map(lambda values: b'](' + b''.join(values) + b'e'),
        st.lists(st.tuples(st.sampled_from(WORDS), inner), max_size=4).map(_dict_of),
    ),
    max_leaves=8,
)
CHECKPOINTS = st.one_of(
    VALUES,
    GOOD.map(state_dict_of),
    st.lists(st.tuples(st.sampled_from(WORDS), st.one_of(GOOD, VALUES)), max_size=4).map(
        lambda pairs: _dict_of([*pairs, ('state_dict', state_dict_of(tensor_of(4, 0, (2, 2), (2, 1), b'N')))])
    ),
)


def of_projects() -> list[dict]:
    """Names by which the layouts of other projects are recognised."""
    one, norm = torch.ones(1), {'layer1.0.bn1.IN.weight': torch.ones(32)}  # the signature of ResNet50-IBN-a

    def prefixed(prefix: str, **more: torch.Tensor) -> dict:
        return {f'{prefix}{name}': value for name, value in {**norm, 'conv1.weight': one}.items()} | more

    fast = prefixed('backbone.', pixel_mean=torch.ones(1, 3, 1, 1), pixel_std=torch.ones(3))
    fast |= {'heads.bottleneck.0.weight': one, 'heads.pool_layer.p': one}
    flat = prefixed('model.') | {'classifier.add_block.0.weight': torch.ones(2, 2), 'model.fc.weight': one}
    dense = {'model.features.norm5.weight': torch.ones(1024), 'classifier.add_block.0.weight': one}
    return [{'model': fast, 'iteration': 3}, prefixed('base.'), flat, dense, {**prefixed('encoder_q.'), 'queue': one}]


TENSOR = st.fixed_dictionaries(
    {
        'dtype': st.sampled_from([*safetensors.DTYPES, 'F8_E4M3', '', 4, None]),
        'shape': st.one_of(
            st.lists(st.one_of(st.integers(-1, 4), st.sampled_from(INTERESTING)), max_size=4), st.text()
        ),
        'data_offsets': st.lists(st.one_of(st.integers(0, 32), st.sampled_from(INTERESTING)), max_size=3),
    },
    optional={'x': st.none()},
)
METADATA = st.dictionaries(
    st.sampled_from([safetensors.ENTRY, 'format', 'license', 'licence']),
    st.one_of(
        st.text(max_size=9), st.integers(),
        st.dictionaries(
            st.sampled_from(['format', 'model', 'test', 'arguments', 'converted', 'rank1', 'epoch', 'licence']),
            st.one_of(st.text(max_size=9), st.floats(), st.lists(st.integers()), st.just(weights.FORMAT),
                      st.dictionaries(st.sampled_from(['pooling', 'height', 'width', 'normalisation']), st.integers())),
        ).map(json.dumps),
    ), max_size=3,
)  # fmt: skip


@st.composite
def tensor_files(draw) -> bytes:
    """safetensors: a header of any entries, or a good file with edits."""
    table = {'weight': {'dtype': 'F32', 'shape': [2, 2], 'data_offsets': [0, 16]}}
    table['bias'] = {'dtype': 'BOOL', 'shape': [2], 'data_offsets': [16, 18]}
    if draw(st.booleans()):
        table |= draw(st.dictionaries(st.sampled_from(WORDS), st.one_of(TENSOR, st.integers()), max_size=3))
    if draw(st.booleans()):
        table['__metadata__'] = draw(st.one_of(METADATA, st.integers()))
    header = json.dumps(table).encode()
    data = struct.pack('<Q', len(header)) + header + bytes(18)
    return edited(data, draw(EDITS)) if draw(st.booleans()) else data


@functools.cache
def layouts_of_files() -> list[bytes]:
    """A small valid file of each layout."""
    torch.manual_seed(0)
    root = torch.arange(12.0)
    tensors = OrderedDict(weight=root.view(3, 4), bias=root[:3], other=torch.ones(2, 2, dtype=torch.float64))
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(3, 2)).sum().backward()
    optimizer.step()
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [1, 2])
    ours = {'format': weights.FORMAT, 'state_dict': model.state_dict(), 'rank1': 0.5, 'epoch': 3}
    ours |= {'optimizer': optimizer.state_dict(), 'scheduler': scheduler.state_dict()}
    dense = {'module.features.norm5.weight': torch.ones(1024), 'module.features.norm5.bias': torch.zeros(4)}
    contents = [
        tensors,
        {'state_dict': tensors, 'rank1': np.float32(0.5), 'epoch': 7},
        ours,
        dense,
        *of_projects(),
        {'module.weight': root, '_orig_mod.weight': root, 'kinds': root.bfloat16(), 'bool': root > 3, 'none': root[:0]},
        nn.Linear(1, 1).state_dict() | {'parameter': nn.Parameter(torch.ones(2))},
    ]
    files = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / 'x.pth'
        for content, is_zip in itertools.product(contents, (True, False)):
            torch.save(content, path, _use_new_zipfile_serialization=is_zip)
            files.append(path.read_bytes())
        view = View(root, 2, 4)
        for content in {'weight': root, 'view': view, 'old': OldParameter(root)}, contents[1]:
            write_python2(path, content)
            files.append(path.read_bytes())
        for data in files:  # what PyTorch imports late is imported here
            path.write_bytes(data)
            weights.read(path)
    return files


def pickles(data: bytes, count: int) -> list[bytes]:
    """The first `count` pickles of a stream, and what is left of it."""
    stream, parts = io.BytesIO(data), []
    for _ in range(count):
        begin = stream.tell()
        for _ in pickletools.genops(stream):
            pass
        parts.append(data[begin : stream.tell()])
    return [*parts, data[stream.tell() :]]


def instructions(data: bytes) -> list[bytes]:
    places = [place for _, _, place in pickletools.genops(data)]
    return [data[begin:end] for begin, end in itertools.pairwise([*places, len(data)])]


STEPS = st.lists(
    st.tuples(st.sampled_from(['put', 'insert', 'delete', 'swap', 'copy']), PLACES, PLACES, ATOMS), max_size=5
)


def stepped(data: bytes, steps: list) -> bytes:
    """A pickle with some of its instructions changed; the first and the last stay."""
    first, *codes, last = instructions(data)
    for kind, place, other, atom in steps:
        at, there = place * len(codes) >> 16, other * len(codes) >> 16
        if kind == 'put':
            codes[at : at + 1] = [atom]
        elif kind == 'insert':
            codes.insert(at, atom)
        elif kind == 'delete':
            del codes[at : at + 1 + other % 3]
        elif codes and kind == 'swap':
            codes[min(at, len(codes) - 1)], codes[min(there, len(codes) - 1)] = (
                codes[min(there, len(codes) - 1)],
                codes[min(at, len(codes) - 1)],
            )
        elif kind == 'copy':
            codes[at:at] = codes[there : there + 1 + place % 8]
    return b''.join([first, *codes, last])


def rezipped(data: bytes, steps: list, records: list) -> bytes:
    """A zip file with a changed pickle, right checksums, and records put in or in others' places."""
    buffer = io.BytesIO()
    old, new = zipfile.ZipFile(io.BytesIO(data)), zipfile.ZipFile(buffer, 'w')
    with old, new, warnings.catch_warnings():
        warnings.simplefilter('ignore')  # two records of one name are meant
        contents = {name: old.read(name) for name in old.namelist()}
        top = next(iter(contents)).split('/')[0]
        contents[f'{top}/data.pkl'] = stepped(contents[f'{top}/data.pkl'], steps)
        for name, content, compression in records:
            contents.pop(f'{top}/{name}', None)
            new.writestr(f'{top}/{name}', content, compression)
        for name, content in contents.items():
            new.writestr(name, content)
    return buffer.getvalue()


RECORDS = st.lists(
    st.tuples(
        st.sampled_from(
            ['byteorder', 'version', '.data/version', 'data/0', 'data/1', 'DATA/0', '.format_version', '../x', '']
        ),
        st.one_of(st.sampled_from([b'big', b'little', b'', b'9' * 30, b'\xff']), st.binary(max_size=64)),
        st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED]),
    ),
    max_size=2,
)
DATA = struct.pack('<q4f', 4, 1, 2, 3, 4)


@st.composite
def weight_files(draw) -> bytes:
    way = draw(st.sampled_from(['made', 'steps', 'bytes', 'tensors']))
    if way == 'tensors':
        return draw(tensor_files())
    if way == 'made':
        made = draw(CHECKPOINTS)
        if draw(st.booleans()):
            return zip_of(made, {'archive/data/0': DATA[8:]})
        return legacy_of(made, ('0',), DATA)
    data = draw(st.sampled_from(layouts_of_files()))
    if way == 'bytes':
        return edited(data, draw(EDITS))
    steps = draw(STEPS)
    if data[:2] == b'PK':
        return rezipped(data, steps, draw(RECORDS))
    parts = pickles(data, 5)
    at = draw(st.sampled_from([3, 3, 3, 3, 0, 1, 2, 4]))
    parts[at] = stepped(parts[at], steps)
    return b''.join(parts)


class Small(Network):
    """Has the names of nn.Linear(2, 2)."""

    def __init__(self, num_classes: int):
        super().__init__(num_classes)
        self.weight, self.bias = nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.zeros(2))


def read_weights(data: bytes, folder: Path) -> bool:
    """Refused, or no more tensors than the file has bytes for, which fit a model or are refused there."""
    (folder / 'x.pth').write_bytes(data)
    os.chdir(folder)
    model = Small(2)
    try:
        with watched():
            found = weights.read('x.pth')
    except UserError as error:
        assert_one_line(error)
        return False
    finally:
        assert os.listdir(folder) == ['x.pth']
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in found.state_dict.values()}
    assert sum(storage.nbytes() for storage in storages.values()) <= len(data)
    assert all(tensor.nbytes <= len(data) for tensor in found.state_dict.values())
    assert all(type(key) is str and type(tensor) is torch.Tensor for key, tensor in found.state_dict.items())
    assert found.layout.isprintable()
    assert found.rank1 is None or type(found.rank1) is float
    assert found.epoch is None or isinstance(found.epoch, int)
    with contextlib.suppress(UserError):
        loading.load_into(model, found.state_dict, allow_other_classifier=True, where='x.pth')
    return True


# ---- Market1501 ----

PIDS = ['-1', '0', '0000', '0001', '0002', '0003', '7', '-2', '--1', '9' * 10, '9' * 99, '\u0663', '', str(2**63 - 1)]
CAMERAS = ['0', '1', '2', '6', '06', '7', '9' * 30, '\xb2', '\u0663', '']
SUFFIXES = ['.jpg', '.jpg', '.JPG', '.jpeg', '.png', '.gif', '.Tif', '.webp', '.db', '', '.jpg ', '.jpg\n']
TYPES = ['jpg', 'jpeg', 'jpe', 'jfif', 'png', 'apng', 'bmp', 'gif', 'ppm', 'pgm', 'pbm', 'pnm', 'tif', 'tiff', 'webp']
ODD = st.binary(max_size=12).map(os.fsdecode)
NAMES = st.one_of(
    st.builds('{:04d}_c{}s1_{:06d}_00.jpg'.format, st.integers(0, 5), st.integers(1, 6), st.integers(0, 99)),
    st.builds('{:04d}_c{}s1_{:06d}_00.jpg'.format, st.integers(0, 5), st.integers(1, 6), st.integers(0, 99)),
    st.builds('{}_c{}{}{}'.format, st.sampled_from(PIDS), st.sampled_from(CAMERAS), ODD, st.sampled_from(SUFFIXES)),
    st.builds('{}{}'.format, ODD, st.sampled_from(SUFFIXES)),
).filter(lambda name: name not in ('', '.', '..') and '/' not in name and '\0' not in name)
FILES = st.dictionaries(NAMES, st.sampled_from(['file', 'file', 'folder', 'link']), max_size=5)
GOOD_FILES = FILES.map(lambda files: files | dict.fromkeys(['0001_c1.jpg', '0002_c2.jpg', '-1_c9.jpg', '.x'], 'file'))
PLAIN_FILES = st.just(
    dict.fromkeys(['0001_c1.jpg', '0002_c2.jpg', '0000_c6s1_1.PNG', '-1_c9.jpg', 'Thumbs.db'], 'file')
)
PARTS = st.one_of(PLAIN_FILES, PLAIN_FILES, GOOD_FILES, GOOD_FILES, FILES, st.sampled_from(['file', 'link', None]))
TREES = st.tuples(
    st.sampled_from(['market1501', 'market1501', 'Market-1501-v15.09.15', 'market1501/Market-1501-v15.09.15', 'other']),
    st.tuples(PARTS, PARTS, PARTS),
)


def put(path: Path, kind: str | None) -> None:
    if kind == 'file':
        path.touch()
    elif kind == 'folder':
        path.mkdir()
    elif kind == 'link':
        path.symlink_to('/nowhere')


def expected_of(names: dict) -> list[tuple[str, int, int]] | None:
    """Name, pid and camera of the images of a folder by a slow second reading; None if one must be refused."""
    items = []
    for name in sorted(names):
        if name[0] == '.' or name.lower().rpartition('.')[2] not in TYPES or '.' not in name:
            continue
        pid, mark, rest = name.partition('_c')
        camera = ''.join(itertools.takewhile(lambda letter: letter in string.digits, rest))
        digits = pid and not set(pid) - set(string.digits) and int(pid) < 2**63
        if not mark or not camera or not (pid == '-1' or digits):
            return None
        if pid != '-1':
            items.append((name, int(pid), int(camera)))
    return items or None


def read_market(tree: tuple, folder: Path) -> bool:
    """As the slow reading has it, or refused."""
    place, parts = tree
    for part, files in zip(market1501.PARTS, parts, strict=True):
        (folder / place).mkdir(parents=True, exist_ok=True)
        if isinstance(files, dict):
            (folder / place / part).mkdir()
            for name, kind in files.items():
                put(folder / place / part / name, kind)
        else:
            put(folder / place / part, files)
    missing = place == 'other' or 'link' in parts or None in parts
    expected = [expected_of(files) if isinstance(files, dict) else None for files in parts]
    good = None not in expected and len({pid for _, pid, _ in expected[0]}) > 1
    try:
        with watched():
            dataset = data_manager.init_dataset('market1501', str(folder))
            data_manager.fingerprint(dataset)
    except UserError as error:
        assert not good or missing, error
        if not missing:  # that message draws the tree
            assert_one_line(error)
        return False
    assert good
    labels = {pid: label for label, pid in enumerate(sorted({pid for _, pid, _ in expected[0]}))}
    expected[0] = [(name, labels[pid], camera) for name, pid, camera in expected[0]]
    cameras = sorted({camera for items in expected for _, _, camera in items})
    order = [1, 2, 3, 4, 5, 6] if set(cameras) <= set(range(1, 7)) else cameras
    for part, items, wanted in zip(
        market1501.PARTS, (dataset.train, dataset.query, dataset.gallery), expected, strict=True
    ):
        assert items == [
            (os.path.join(folder, place, part, name), pid, order.index(camera)) for name, pid, camera in wanted
        ]
    return True


# ---- MARS ----

LINES = [f'{pid:04d}C{camera}T0001F{frame:03d}.jpg' for pid, camera in ((1, 1), (1, 2), (5, 6)) for frame in (1, 2, 3)]
ROWS = [[1, 3, 1, 1], [4, 6, 1, 2], [7, 9, 5, 6]]
DTYPES = ['u1', 'i1', 'u2', 'i2', 'u4', 'i4', 'u8', 'i8', 'f4', 'f8', 'c16', '?', '<U3', 'O']
NUMBERS = st.one_of(
    st.integers(-2, 10), st.sampled_from([*INTERESTING, np.nan, np.inf, -np.inf, 0.5, 1e300, -(2**31), -(2**40)])
)
CELLS = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 3), NUMBERS), max_size=2)


def table_of(cells: list, dtype: str, rows: int) -> np.ndarray:
    table = np.array(ROWS * rows, dtype=float)
    for row, column, value in cells:
        table[row % len(table), column] = value
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return table.astype(dtype)


TABLES = st.one_of(
    st.builds(table_of, CELLS, st.sampled_from(['i4', 'f8', 'u2']), st.just(1)),
    st.builds(table_of, CELLS, st.sampled_from(DTYPES), st.sampled_from([1, 1, 5, 3000])),
    st.builds(
        lambda shape, dtype: np.ones(shape, dtype),
        st.lists(st.integers(0, 4), max_size=4).map(tuple),
        st.sampled_from(DTYPES),
    ),
    st.sampled_from([[np.ones(3), 'x'], {'a': {'b': 1}}, 'words', csc_matrix(np.eye(4)), 1.5, np.array([[], []])]),
)
QUERIES = st.one_of(st.lists(NUMBERS, max_size=3).map(lambda row: np.array([row], dtype=float)), TABLES)
KEYS = ['track_train_info', 'track_test_info', 'query_IDX', 'x']


@st.composite
def mat_files(draw, key: str, tables, good) -> bytes:
    buffer = io.BytesIO()
    table = draw(st.one_of(st.just(good), st.just(good), tables))
    key = draw(st.sampled_from([key] * 9 + KEYS))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            savemat(
                buffer, {key: table}, format=draw(st.sampled_from(['5', '5', '4'])), do_compression=draw(st.booleans())
            )
    except Exception:  # a table that the format does not have: what was written so far is a damaged file
        pass
    return edited(buffer.getvalue(), draw(st.one_of(st.just([]), st.just([]), EDITS)))


@st.composite
def name_files(draw) -> bytes:
    lines = LINES[:]
    for place, line in draw(st.lists(st.tuples(st.integers(0, 8), st.one_of(ODD, st.sampled_from(LINES))), max_size=1)):
        lines[place] = line
    end = draw(st.sampled_from(['\n', '\n', '\r\n', '\r', '\x0b']))
    lines *= draw(st.sampled_from([1, 1, 1, 500]))
    return edited(os.fsencode(end.join(lines) + end), draw(st.one_of(st.just([]), st.just([]), EDITS)))


@st.composite
def infos(draw) -> tuple:
    """The protocol and the five files of info/, of which most often one is odd."""
    kinds = [
        name_files(),
        name_files(),
        mat_files('track_train_info', TABLES, np.array(ROWS, 'i4')),
        mat_files('track_test_info', TABLES, np.array(ROWS, 'i4')),
        mat_files('query_IDX', QUERIES, np.array([[2]], 'u2')),
    ]
    odd = draw(st.one_of(st.integers(0, 4).map(lambda at: {at}), st.just(set(range(5)))))
    files = [draw(kind) if at in odd else good for at, (kind, good) in enumerate(zip(kinds, good_infos(), strict=True))]
    return draw(st.booleans()), *files


@functools.cache
def good_infos() -> list[bytes]:
    files = [os.fsencode('\n'.join(LINES))] * 2
    for key, rows in (
        (KEYS[0], np.array(ROWS, 'i4')),
        (KEYS[1], np.array(ROWS, 'i4')),
        (KEYS[2], np.array([[2]], 'u2')),
    ):
        buffer = io.BytesIO()
        savemat(buffer, {key: rows})
        files.append(buffer.getvalue())
    return files


def read_mars(info: tuple, folder: Path) -> bool:
    """Frames of the name files, of one person and one camera each, not many times more than there are; or refused."""
    official, *contents = info
    parts = list(mars.PARTS)
    (folder / 'mars' / 'info').mkdir(parents=True)
    for part in parts[:2]:
        (folder / 'mars' / part / '0001').mkdir(parents=True)
    for part, content in zip(parts[2:], contents, strict=True):
        (folder / 'mars' / part).write_bytes(content)
    try:
        with watched():
            dataset = data_manager.init_dataset('mars_official' if official else 'mars', str(folder))
            data_manager.fingerprint(dataset)
    except UserError as error:
        assert_one_line(error)
        return False
    assert sorted({pid for _, pid, _ in dataset.train}) == list(range(dataset.num_train_pids))
    for part, content, items in (
        ('bbox_train', contents[0], dataset.train),
        ('bbox_test', contents[1], dataset.query),
        ('bbox_test', contents[1], dataset.gallery),
    ):
        lines = content.decode('utf-8-sig').split()
        for paths, pid, camid in items:
            assert paths
            assert pid >= 0
            assert camid in range(len(dataset.cameras) or 6)
            assert type(pid) is type(camid) is int
            names = [os.path.basename(path) for path in paths]
            assert set(names) <= set(lines)
            assert {os.path.dirname(path) for path in paths} == {
                str(folder / 'mars' / part / names[0].partition('C')[0])
            }
        assert sum(len(paths) for paths, _, _ in items) <= 20 * len(lines)
    return True


# ---- tables and lists ----

CELLS_OF_A_TABLE = [
    st.one_of(st.sampled_from(['a.jpg', 'b/c 1.jpg', '/x/y.png', '../z', '"q, r".jpg', '']), ODD),
    st.one_of(st.sampled_from(['1', '2', '0', '-1', 'Zoë', 'a10', 'a2', '9' * 5000, '']), ODD),
    st.sampled_from(['0', '3', 'north', '', '9' * 30]),
    st.sampled_from(['train', 'train', 'train', 'query', 'gallery', 'Train', '']),
    st.sampled_from(['1', '1', '2', '']),
    st.sampled_from(['1', '2', '10', '']),
]
GOOD_CELLS = [st.sampled_from([*map(str, range(9))]) for _ in range(3)] + [st.sampled_from(table.SPLITS)] + [
    st.sampled_from(['1', '2']), st.integers(0, 10**6).map(str)
]  # fmt: skip
HEADERS = [','.join(table.COLUMNS[:4]), ','.join(table.COLUMNS), 'path,pid,split', 'split;pid;path', 'pid,pid', '']


@st.composite
def csv_files(draw) -> bytes:
    header = draw(st.sampled_from(HEADERS))
    delimiter = ';' if ';' in header else ','
    columns = header.split(delimiter)
    places = [table.COLUMNS.index(column) if column in table.COLUMNS else 0 for column in columns]
    cells = draw(st.sampled_from([GOOD_CELLS, GOOD_CELLS, CELLS_OF_A_TABLE]))
    text = io.StringIO(newline='')
    writer = csv.writer(text, delimiter=delimiter)
    writer.writerow(columns)
    writer.writerows(draw(st.lists(st.tuples(*(cells[place] for place in places)), max_size=6)))
    data = text.getvalue().encode(draw(st.sampled_from(['utf-8', 'utf-8', 'utf-8-sig'])), 'surrogateescape')
    return edited(data, draw(st.one_of(st.just([]), st.just([]), EDITS)))


def read_table(data: bytes, folder: Path) -> bool:
    """Refused, or no more items than there are lines, which are the same when they are written and read again."""
    os.chdir(folder)
    Path('x.csv').write_bytes(data)
    try:
        with watched():
            dataset = data_manager.init_dataset('csv:x.csv', train=False)
            data_manager.fingerprint(dataset), data_manager.digests(dataset)
    except UserError as error:
        assert_one_line(error)
        return False
    items = dataset.train + dataset.query + dataset.gallery
    assert len(items) <= data.count(b'\n') + data.count(b'\r')
    assert all(paths and type(pid) is type(camid) is int and pid > -(2**63) for paths, pid, camid in items)
    with contextlib.redirect_stdout(io.StringIO()):
        table.write(dataset, 'again.csv')
        again = data_manager.init_dataset('csv:again.csv', train=False)
    for one, other in (dataset.train, again.train), (dataset.query, again.query), (dataset.gallery, again.gallery):
        named = [[(paths_of(item), item[2]) for item in some] for some in (one, other)]
        assert [(list(map(os.path.abspath, paths)), camid) for paths, camid in named[0]] == [
            (list(map(os.path.abspath, paths)), camid) for paths, camid in named[1]
        ]
    assert [dataset.name_of(pid) for pid in dataset.train_pids] == [again.name_of(pid) for pid in again.train_pids]
    return True


@st.composite
def list_files(draw) -> bytes:
    lines = [
        f'{pid:04d}/{pid:04d}_000_{camera:02d}_0303morning_0015_0.jpg {pid}' for pid in (0, 1) for camera in (1, 15)
    ]
    for place, line in draw(st.lists(st.tuples(st.integers(0, 3), ODD), max_size=1)):
        lines[place] = line
    return edited(os.fsencode('\n'.join(lines)), draw(st.one_of(st.just([]), EDITS)))


def read_list(data: bytes, folder: Path) -> bool:
    """Refused, or images in the folder of the data set."""
    for part in 'train', 'test':
        (folder / 'msmt17' / part).mkdir(parents=True)
    for part in 'train', 'query', 'gallery':
        (folder / 'msmt17' / f'list_{part}.txt').write_bytes(data)
    try:
        with watched():
            dataset = data_manager.init_dataset('msmt17', str(folder))
    except UserError as error:
        assert_one_line(error)
        return False
    root = os.path.realpath(folder / 'msmt17')
    for path, pid, camid in dataset.train + dataset.query + dataset.gallery:
        assert os.path.realpath(path).startswith(root) and pid >= 0 and camid >= 0
    return True


# ---- the tests, and the loop ----

TARGETS = {  # name: (inputs, what reads one: True if it is read, False if it is refused; inputs of the test)
    'weights': (weight_files(), read_weights, 400),
    'market1501': (TREES, read_market, 150),
    'mars': (infos(), read_mars, 150),
    'table': (csv_files(), read_table, 200),
    'msmt17': (list_files(), read_list, 150),
}


def give(target: str, value, folder: Path) -> bool:
    """One input to one reader, in a folder that holds nothing else, and that keeps the input."""
    for entry in folder.iterdir():
        shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
    return TARGETS[target][1](value, folder)


@pytest.mark.parametrize('target', TARGETS)
def test_any_input_is_read_or_refused(target, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    layouts_of_files()
    outcomes = Counter()

    @settings(max_examples=TARGETS[target][2], derandomize=True, **QUIET)
    @given(TARGETS[target][0])
    def run(value):
        outcomes[give(target, value, tmp_path)] += 1

    run()
    assert min(outcomes[True], outcomes[False]) > 10  # the inputs are not all of one kind


def test_the_edits_of_nothing_leave_a_file_as_it_is():
    for data in layouts_of_files():
        parts = pickles(data, 5) if data[:1] == b'\x80' else []
        assert parts == [] or b''.join([*map(stepped, parts[:5], [[]] * 5), parts[5]]) == data
        assert edited(data, []) == data


def test_the_audit_sees_what_is_run(tmp_path):
    for act in (lambda: os.system('true'), lambda: open(tmp_path / 'x', 'w').close(), lambda: eval('1')):
        with pytest.raises(AssertionError), watched():
            act()


def loop(target: str, engine: str, seconds: float, folder: Path, seed: int, results) -> None:
    """In a process of its own: new inputs until the time is over or one of them is a finding."""
    outcomes = Counter()
    end = time.monotonic() + seconds

    def run(value):
        if time.monotonic() < end:
            outcomes[give(target, value, folder)] += 1

    def finish(finding: str = ''):
        results.send((outcomes, finding))
        os._exit(0)  # atheris would go on

    def batch():
        return settings(max_examples=500, **QUIET)(given(TARGETS[target][0])(run))

    def one(data: bytes):
        """The input that Hypothesis draws when these bytes are its random numbers."""
        try:
            drawn.hypothesis.fuzz_one_input(data)
        except BaseException:
            finish(traceback.format_exc())
        if time.monotonic() >= end:
            finish()

    try:
        torch.set_num_threads(1)
        layouts_of_files()
        if engine == 'atheris':
            drawn = batch()
            guide(one, seed)
        while time.monotonic() < end:
            hypothesis.seed(seed)(batch())()
            seed += 1
    except BaseException:
        finish(traceback.format_exc())
    finish()


def guide(one: Callable[[bytes], None], seed: int) -> None:
    """Give `one` bytes that reach code of the readers that no others did; does not return."""
    import atheris

    with atheris.instrument_imports(include=[room.__name__ for room in READERS]):
        for room in READERS:
            importlib.reload(room)
    # Hypothesis bounds time and memory itself.
    options = ['-timeout=0', '-rss_limit_mb=0', '-max_len=8192', '-len_control=0', '-verbosity=0']
    atheris.Setup([sys.argv[0], *options, f'-seed={seed}'], one)
    atheris.Fuzz()


def fuzz(target: str, engine: str, seconds: float) -> bool:
    """Prints what came of it; True if there is a finding."""
    seed = random.SystemRandom().randrange(2**32)
    context = multiprocessing.get_context('fork')
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix='fuzz-') as folder:
        here, there = context.Pipe(duplex=False)
        process = context.Process(target=loop, args=(target, engine, seconds, Path(folder), seed, there))
        process.start()
        there.close()
        outcomes, finding = Counter(), f'no answer {HANG} s after the end of the time'
        if here.poll(seconds + HANG):  # a finding is made smaller after the time is over
            try:
                outcomes, finding = here.recv()
            except EOFError:  # it crashed, so the folder holds the input
                process.join()
                finding = f'the process ended with status {process.exitcode}'
        process.kill()
        process.join()
        took = time.monotonic() - started
        print(
            f'{target} by {engine}: {took:.0f} s, {outcomes.total()} inputs tried (seed {seed}): '
            f'{outcomes[True]} read, {outcomes[False]} refused, {"1 finding" if finding else "no finding"}',
            flush=True,
        )
        if finding:
            kept = FINDINGS / f'{target}-{engine}-{seed}'
            shutil.copytree(folder, kept, symlinks=True)
            (kept / 'finding.txt').write_text(finding, errors='backslashreplace')
            print(f'{finding}\nthe input is in {kept.relative_to(ROOT)}')
    return bool(finding)


def main() -> None:
    parser = argparse.ArgumentParser(description='Random files for the readers of foreign files.')
    parser.add_argument('targets', nargs='*', help=f'{", ".join(TARGETS)} (default: all)')
    parser.add_argument('--seconds', type=float, default=600, help='for each, by each engine (default: 600)')
    args = parser.parse_args()
    if unknown := set(args.targets) - set(TARGETS):
        parser.error(f'there is no {", ".join(unknown)}: choose of {", ".join(TARGETS)}')
    findings = [fuzz(target, engine, args.seconds) for target in args.targets or TARGETS for engine in ENGINES]
    sys.exit(any(findings))


if __name__ == '__main__':
    main()
