"""Untrusted files: what PyTorch writes is read, and no code in any file is run."""

import copy
import io
import pickle
import struct
import subprocess
import sys
import textwrap
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from published_files import MAGIC, Python2Pickler, legacy_of, number, state_dict_of, tensor_of, text, zip_of
from torch import nn

from files import unpickling
from runtime.errors import UserError

GOOD = state_dict_of(tensor_of(4, 0, (2, 2), (2, 1)))
GOOD_LEGACY = state_dict_of(tensor_of(4, 0, (2, 2), (2, 1), view=b'N'))
DATA = struct.pack('<4f', 1, 2, 3, 4)
LEGACY_DATA = struct.pack('<q', 4) + DATA
RECORDS = {'archive/data/0': DATA}
OS_SYSTEM = b'cposix\nsystem\n(' + text('touch executed') + b'tR'
EVAL = b'c__builtin__\neval\n(' + text("open('executed', 'w')") + b'tR'
GETATTR = b'cbuiltins\ngetattr\n(cos\npopen\n' + text('__call__') + b'tR(' + text('touch executed') + b'tR'
TORCH_CALL = b'ctorch.hub\nload_state_dict_from_url\n(' + text('file:///executed') + b'tR'
HUGE_STORAGE = b'ctorch\nFloatStorage\n(' + number(10**12) + b'tR'
DEEP = b']' * 100_000 + b'a' * 99_999
DEEP_KEY = b'}' + b')' + b'\x85' * 100_000 + b'K\x01s'  # its hash would overflow the stack of C
LAUGHS = b'K\x01q\x00' + b''.join(b'h\x00h\x00\x86q\x00' for _ in range(25))
SELF = b']q\x00h\x00a'
LATE = b']q\x00\x85h\x00K\x01a\x86'


def legacy(value, keys=('0',), data=LEGACY_DATA):
    return legacy_of(value, keys, data)


def zipped(value, **records):
    return zip_of(value, RECORDS)


def renamed_record(name):
    return zip_of(GOOD, {**RECORDS, name: b'x'})


def overlapping():
    """Two records that refer to the same bytes."""
    with zipfile.ZipFile(io.BytesIO(zip_of(GOOD, {'archive/data/0': bytes(5000)}))) as archive:
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, 'w') as copied:
            for name in archive.namelist():
                copied.writestr(name, archive.read(name))
            twin = copy.copy(copied.getinfo('archive/data/0'))
            twin.filename = 'archive/data/1'
            copied.filelist.append(twin)
    return buffer.getvalue()


def flipped():
    data = bytearray(zip_of(GOOD, RECORDS))
    data[data.index(DATA) + 1] ^= 1
    return bytes(data)


def torchscript():
    return zip_of(GOOD, {**RECORDS, 'archive/constants.pkl': b'x'})


def big():
    return zip_of(state_dict_of(tensor_of(750_000_000, 0, (750_000_000,), (1,))), {}, zipfile.ZIP_DEFLATED)


REFUSED = {
    'os.system, legacy': (legacy(OS_SYSTEM), r'refers to posix\.system, which weights never need; no code was'),
    'os.system, zip': (zipped(OS_SYSTEM), r'refers to posix\.system,'),
    'os.system before the magic number': (b'\x80\x02' + OS_SYSTEM + b'.', r'refers to posix\.system,'),
    'eval, legacy': (legacy(EVAL), r'refers to __builtin__\.eval,'),
    'eval, zip': (zipped(EVAL), r'refers to __builtin__\.eval,'),
    'getattr, legacy': (legacy(GETATTR), r'refers to builtins\.getattr,'),
    'getattr, zip': (zipped(GETATTR), r'refers to builtins\.getattr,'),
    'a function of torch, legacy': (legacy(TORCH_CALL), r'refers to torch\.hub\.load_state_dict_from_url,'),
    'a function of torch, zip': (zipped(TORCH_CALL), r'refers to torch\.hub\.load_state_dict_from_url,'),
    'a whole model': (pickle.dumps(nn.Linear(1, 1), 2), r'refers to torch\.nn\.modules\.linear\.Linear,.*a state dict'),
    'a storage made by a call': (zipped(HUGE_STORAGE), r'calls torch\.FloatStorage, which must not be called'),
    'STACK_GLOBAL': (legacy(text('os') + text('system') + b'\x93'), r'has the pickle instruction STACK_GLOBAL'),
    'INST': (zipped(b'(iposix\nsystem\n'), r'has the pickle instruction INST'),
    'OBJ and NEWOBJ': (zipped(b'ccollections\nOrderedDict\n)\x81'), r'has the pickle instruction NEWOBJ'),
    'EXT1': (legacy(b'\x82\x01'), r'has the pickle instruction EXT1'),
    'PERSID': (zipped(b'Pos\n'), r'has the pickle instruction PERSID'),
    'state of a dict class': (
        zipped(b'ccollections\nOrderedDict\n)R}' + text('items') + b'K\x01sb'), r'sets the state of an object'
    ),
    'state of a list': (zipped(b']}b'), r'sets the state of an object'),
    'traversal': (renamed_record('archive/../../executed'), r'named archive/\.\./\.\./executed, which points outside'),
    'absolute name': (renamed_record('/tmp/executed'), r'a record named /tmp/executed, which points outside'),
    'a name for Windows': (renamed_record('archive\\..\\executed'), r'which points outside'),
    'two tops': (renamed_record('other/x'), r'is a zip file, but not a checkpoint'),
    'two records of one name': (renamed_record('archive/DATA.pkl'), r'shared or hidden records'),
    'two records in one place': (overlapping(), r'shared or hidden records'),
    'bytes before the zip': (b'PK\x03\x04' + zip_of(GOOD, RECORDS), r'shared or hidden records'),
    'stride 0, legacy': (
        legacy(state_dict_of(tensor_of(4, 0, (10**15,), (0,), b'N'))), r'has a tensor that is larger than its storage'
    ),
    'stride 0, zip': (zipped(state_dict_of(tensor_of(4, 0, (10**15,), (0,)))), r'larger than its storage'),
    'a view beyond the end': (zipped(state_dict_of(tensor_of(4, 2, (3,), (1,)))), r'larger than its storage'),
    'negative stride': (zipped(state_dict_of(tensor_of(4, 3, (2,), (-1,)))), r'has an unsupported tensor'),
    'a storage of 4 TB, legacy': (
        legacy(state_dict_of(tensor_of(10**12, 0, (2,), (1,), b'N'))), r'its tensors need 4000000000008 bytes'
    ),
    'a storage of 4 TB, zip': (
        zipped(state_dict_of(tensor_of(10**12, 0, (2,), (1,)))), r'declares a size for its storage 0'
    ),
    'a storage larger than its record': (zipped(state_dict_of(tensor_of(5, 0, (2,), (1,)))), r'declares a size'),
    'a storage without a record': (zip_of(GOOD), r'declares a size for its storage 0'),
    'a storage of two sizes': (
        zipped(b'(' + tensor_of(4, 0, (2,), (1,)) + tensor_of(2, 0, (2,), (1,)) + b't'), r'declares two sizes for one'
    ),
    'a storage that is not filled': (legacy(GOOD_LEGACY, keys=()), r'lists storages that differ from'),
    'a view outside of its storage': (
        legacy(state_dict_of(tensor_of(4, 0, (2,), (1,), b'(' + text('v') + b'K\x03K\x02t'))), r'outside its'
    ),
    'a deflated record of 3 GB': (big(), r'has compressed records, which PyTorch never writes'),
    'nested 10^5 deep, legacy': (legacy(DEEP), r'is nested too deeply'),
    'nested 10^5 deep, zip': (zipped(DEEP), r'is nested too deeply'),
    'a key nested 10^5 deep': (zipped(DEEP_KEY), r'is nested too deeply'),
    'a key that is a tuple': (zipped(b'})K\x01s'), r'has unsupported keys'),
    'billion laughs': (zipped(LAUGHS), r'is nested too deeply or is too large'),
    'a list in itself': (zipped(SELF), r'has a list or dict that contains itself'),
    'a list that grows later': (zipped(LATE), r'has a list or dict that contains itself'),
    'a million instructions': (legacy(b'N' * 1_000_001), r'has more instructions than any weights need'),
    'a word of 4 GB': (zipped(b'X\xff\xff\xff\xff'), r'is damaged, truncated or not a checkpoint'),
    'a word of 2^62 bytes': (legacy(b'\x8d' + struct.pack('<Q', 2**62)), r'is damaged, truncated or not a checkpoint'),
    'a memo of 2^32': (zipped(b'Nr\xff\xff\xff\xff0'), r'has the pickle instruction POP'),
    'a tensor with hooks': (
        zipped(tensor_of(4, 0, (2,), (1,)).replace(b')RtR', b')R}K\x01K\x01stR')), r'has a tensor with hooks'
    ),
    'a numpy object': (
        zipped(b'cnumpy.core.multiarray\nscalar\n(cnumpy\ndtype\n(' + text('O') + b'K\x00K\x01tR' + text('x') + b'tR'),
        r'has a number that is not a float',
    ),
    'protocol 4': (pickle.dumps(MAGIC, 4), r'is pickled with a protocol other than 2'),
    'a control character in a name': (legacy(b'cos\x1b[31m\nsystem\n'), r'refers to os\\x1b\[31m\.system,'),
    'too few values': (zipped(b'\x85'), r'is damaged, truncated or not a checkpoint'),
    'no STOP': (legacy_of(b'')[:-30], r'is damaged, truncated or not a checkpoint'),
    'a tensor in the frame': (
        b'\x80\x02' + tensor_of(4, 0, (2,), (1,)) + b'.', r'has a tensor where none is allowed'
    ),
    'an empty file': (b'', r'is empty; get the checkpoint again'),
    'a web page': (b'<!DOCTYPE html>', r'is an HTML page that was saved instead of the file'),
    'a pickle': (pickle.dumps([1, 2], 2), r'is a pickle, but not a PyTorch file'),
    'a zip of something': (
        zip_of(b'').replace(b'data.pkl', b'data.txt'), r'is a zip file, but not a checkpoint'
    ),
    'TorchScript': (torchscript(), r'is a TorchScript program, not weights'),
    'a legacy file cut short': (legacy(GOOD_LEGACY)[:-1], r'is truncated: .* need 24 bytes, but it has only 23'),
    'a zip file cut short': (zipped(GOOD)[:-9], r'is damaged, truncated or not a checkpoint \(BadZipFile'),
    'a flipped bit': (flipped(), r'is damaged: its record archive/data/0 fails its checksum'),
    'a wrong count of elements': (legacy(GOOD_LEGACY, data=struct.pack('<q', 3) + DATA), r'is damaged, truncated or'),
}  # fmt: skip


@pytest.mark.parametrize('name', REFUSED)
def test_strangers_files_are_refused_in_one_line(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data, message = REFUSED[name]
    Path('x.pth').write_bytes(data)
    with pytest.raises(UserError, match=message) as refused:
        unpickling.load('x.pth')
    said = str(refused.value)
    assert said.startswith('x.pth ')
    assert said.isprintable()
    assert len(said) < 500
    assert sorted(path.name for path in tmp_path.iterdir()) == ['x.pth']  # nothing was executed or unpacked


def test_the_harmless_twin_is_read(tmp_path):
    """The refusals above are not caused by the frame that they share."""
    for data in (legacy(GOOD_LEGACY), zipped(GOOD)):
        (tmp_path / 'x.pth').write_bytes(data)
        assert torch.equal(unpickling.load(tmp_path / 'x.pth')[0]['weight'], torch.tensor([[1.0, 2], [3, 4]]))


def test_strangers_files_need_no_memory(tmp_path):
    """All of them, in a process that may use 256 MB more than PyTorch itself."""
    names = []
    for number_, (data, _) in enumerate(REFUSED.values()):
        names.append(f'{number_}.pth')
        (tmp_path / names[-1]).write_bytes(data)
    program = textwrap.dedent("""
        import resource, sys
        from files import unpickling
        from runtime.errors import UserError
        taken = 4096 * int(open('/proc/self/statm').read().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (taken + 2**28, taken + 2**28))
        for name in sys.argv[1:]:
            try:
                unpickling.load(name)
            except UserError:
                print(name)
    """)
    ran = subprocess.run(
        [sys.executable, '-c', program, *names],
        cwd=tmp_path,
        env={'PYTHONPATH': str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert ran.stderr == ''
    assert ran.stdout.split() == names
    assert {path.name for path in tmp_path.iterdir()} == set(names)


def test_what_is_no_file(tmp_path):
    with pytest.raises(UserError, match=r'missing\.pth cannot be read \(No such file or directory\)'):
        unpickling.load(tmp_path / 'missing.pth')
    for path, what in ((tmp_path, 'is a folder without checkpoints'), ('/dev/zero', 'is not a regular file')):
        with pytest.raises(UserError, match=what):
            unpickling.load(path)


def test_the_python2_writer_is_right():
    """What the hand-written pickler writes, Python's own reader understands as meant."""
    value = {
        'a': [1, -1, 70000, 2**40, 2.5, None, True],
        'b': ('x', ('y', 'z'), (), (1, 2, 3, 4)),
        'rank1': np.float32(0.5),
    }
    value['ordered'] = OrderedDict([('b', 1), ('a', 'x')])
    read = pickle.loads(Python2Pickler().dumps(value), encoding='latin1')
    assert read == value
    assert type(read['ordered']) is OrderedDict


@pytest.mark.parametrize('dtype', [torch.float64, torch.float16, torch.bfloat16, torch.int32, torch.int16, torch.bool])
def test_kinds_of_numbers(dtype, tmp_path):
    tensor = torch.tensor([0, 1, 1, 0, 1]).to(dtype)
    for zipped in (True, False):
        torch.save({'x': tensor}, tmp_path / 'x.pth', _use_new_zipfile_serialization=zipped)
        value, kind = unpickling.load(tmp_path / 'x.pth')
        assert torch.equal(value['x'], tensor)
        assert kind == ('a zip file' if zipped else 'a legacy stream')
