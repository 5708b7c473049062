"""safetensors: read as by the library, or refused in one line, for any header."""

import json
import struct

import pytest
import torch

from files import safetensors
from runtime.errors import UserError

TENSORS = {
    'a': torch.arange(6.0).view(2, 3),
    'b': torch.tensor([[True], [False]]),
    'c': torch.tensor(7),
    'd': torch.arange(3, dtype=torch.bfloat16),
    'e': torch.zeros(0, 4, dtype=torch.float16),
    'f': torch.tensor([1, -2], dtype=torch.int8),
}


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)


def test_written_and_read(tmp_path):
    safetensors.save(tmp_path / 'x', TENSORS, {'licence': 'MIT'})
    assert safetensors.recognised(tmp_path / 'x')
    found, metadata = safetensors.load(tmp_path / 'x')
    assert_equal(found, TENSORS)
    assert metadata == {'licence': 'MIT'}
    found['a'][0, 0] = 9  # memory of its own


def test_the_library_reads_what_is_written_and_the_other_way_round(tmp_path):
    library = pytest.importorskip('safetensors.torch')
    safetensors.save(tmp_path / 'x', TENSORS, {})
    assert_equal(library.load_file(tmp_path / 'x'), TENSORS)
    library.save_file(TENSORS, tmp_path / 'y', {'format': 'pt'})
    found, metadata = safetensors.load(tmp_path / 'y')
    assert_equal(found, TENSORS)
    assert metadata == {'format': 'pt'}


def file_of(table, data=b'', length=None):
    text = table if isinstance(table, bytes) else json.dumps(table).encode()
    return struct.pack('<Q', len(text) if length is None else length) + text + data


def entry(shape, place, dtype='F32', **more):
    return {'dtype': dtype, 'shape': shape, 'data_offsets': place, **more}


GOOD = entry([2], [0, 8])


@pytest.mark.parametrize(
    ('content', 'reason'),
    [
        (file_of({'x': GOOD}, bytes(8), length=2**63), 'its header would have 9223372036854775808 bytes'),
        (file_of({'x': GOOD}, bytes(8), length=200_000_000), 'its header would have 200000000 bytes'),
        (file_of({'x': GOOD}, bytes(8))[:30], 'its header would have'),
        (b'12345', 'unpack requires a buffer of 8 bytes'),
        (file_of({'x': GOOD}, bytes(7)), 'its tensors need 8 bytes, and it has 7'),
        (file_of({'x': GOOD}, bytes(9)), 'its tensors need 8 bytes, and it has 9'),
        (file_of({'x': entry([10**9, 10**9], [0, 8])}, bytes(8)), 'its tensor x has a size that does not match its'),
        (file_of({'x': entry([2**62, 8], [0, 8])}, bytes(8)), 'its tensor x has an invalid shape or position'),
        (file_of({'x': entry([-2], [0, 8])}, bytes(8)), 'its tensor x has an invalid shape'),
        (file_of({'x': entry([True], [0, 4])}, bytes(4)), 'its tensor x has an invalid shape'),
        (file_of({'x': entry([2.0], [0, 8])}, bytes(8)), 'its tensor x has an invalid shape'),
        (file_of({'x': entry([1] * 9, [0, 4])}, bytes(4)), 'its tensor x has an invalid shape'),
        (file_of({'x': entry([2], [0])}, bytes(8)), 'its tensor x has an invalid shape'),
        (file_of({'x': entry([2], [8, 0])}, bytes(8)), 'its tensor x has a size that does not match'),
        (file_of({'x': entry([2], [0, 8], 'F128')}, bytes(8)), 'its tensor x has the unknown type F128'),
        (file_of({'x': entry([2], [0, 8], ['F32'])}, bytes(8)), "its tensor x has the unknown type ['F32']"),
        (file_of({'x': entry([2], [0, 8], more=1)}, bytes(8)), 'its tensor x is not described by'),
        (file_of({'x\x1b[31m': 3}, b''), r'its tensor x\x1b[31m is not described by'),
        (file_of({'x': GOOD, 'y': GOOD}, bytes(8)), 'its tensors overlap or leave bytes'),
        (file_of({'x': GOOD, 'y': entry([1], [9, 13])}, bytes(13)), 'its tensors overlap or leave bytes'),
        (file_of(b'{"x": {}, "x": {}}'), 'its header contains a name twice'),
        (file_of(b'{"x": ' + b'[' * 100_000), 'recursion'),
        (file_of(b'{"x": ' + b'9' * 5000 + b'}'), 'its tensor x is not described|Exceeds the limit'),
        (file_of(b'{"x": \xff}'), "'utf-8' codec"),
        (file_of(b'{"x": '), 'Expecting value'),
        (file_of({'__metadata__': {'a': 1}}), 'its metadata are not strings'),
        (file_of({'__metadata__': []}), 'its metadata are not strings'),
        (file_of({'x': entry([2], [0, 2], 'BOOL')}, b'\x01\x02'), 'boolean values other than 0 and 1'),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else '',
)
def test_a_hostile_file_is_refused_in_one_line(content, reason, tmp_path):
    (tmp_path / 'x').write_bytes(content)
    with pytest.raises(UserError) as refused:
        safetensors.load(tmp_path / 'x')
    message = str(refused.value)
    assert message.startswith(f'{tmp_path}/x is a damaged or truncated safetensors file (')
    assert any(part in message for part in reason.split('|')), message
    assert message.isprintable()


def test_what_is_no_such_file(tmp_path):
    assert not safetensors.recognised(tmp_path) and not safetensors.recognised(tmp_path / 'none')
    torch.save(TENSORS, tmp_path / 'x.pth')
    assert not safetensors.recognised(tmp_path / 'x.pth')
    with pytest.raises(UserError, match='cannot be read'):
        safetensors.load(tmp_path / 'none')


@pytest.mark.parametrize('text', ['', '[]', '{', '[' * 100_000, '"x"'])
def test_metadata_that_hold_no_checkpoint(text):
    assert safetensors.contents({safetensors.ENTRY: text, 'license': 'MIT'}) == {'licence': 'MIT'}
