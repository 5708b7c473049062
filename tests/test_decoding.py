"""Reading images, right or refused; the workers that read them, however they end; and the cache."""

import os
import re
import signal
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pictures
import pytest
import torch
from conftest import ROOT
from PIL import Image

from runtime import caching, decoding
from runtime.decoding import Block, Task, Workers, collate, read_image
from runtime.errors import ProcessLost, UserError

CPU = torch.device('cpu')


# Reading


def test_rgb_is_read_as_it_is(tmp_path):
    pictures.noise(32, 16).save(tmp_path / 'a.png')
    assert (np.asarray(read_image(tmp_path / 'a.png')) == np.asarray(pictures.noise(32, 16))).all()
    pictures.noise(32, 16).save(tmp_path / 'a.jpg')
    with Image.open(tmp_path / 'a.jpg') as image:
        assert (np.asarray(read_image(tmp_path / 'a.jpg')) == np.asarray(image)).all()


@pytest.mark.parametrize(
    ('mode', 'name', 'tolerance'),
    [
        ('L', 'a.jpg', 8),
        ('CMYK', 'a.jpg', 8),
        ('P', 'a.png', 40),
        ('RGBA', 'a.png', 0),
        ('1', 'a.png', 0),
        ('LA', 'a.png', 0),
    ],
)
def test_other_kinds_of_pixels_become_rgb(mode, name, tolerance, tmp_path):
    original = pictures.noise(32, 16).convert(mode)
    original.save(tmp_path / name)
    image = read_image(tmp_path / name)
    assert image.mode == 'RGB' and image.size == (16, 32)
    difference = np.asarray(image).astype(int) - np.asarray(original.convert('RGB'))
    assert np.abs(difference).max() <= tolerance


@pytest.mark.parametrize('name', ['a.png', 'a.tif'])
def test_of_16_bits_the_upper_8_are_kept(name, tmp_path):
    grey = np.linspace(0, 65535, 32 * 16).astype(np.uint16).reshape(32, 16)
    Image.fromarray(grey).save(tmp_path / name)
    assert (np.asarray(read_image(tmp_path / name)) == (grey >> 8)[..., None]).all()


def test_of_an_animation_the_first_frame_is_read(tmp_path):
    first, second = (Image.new('RGB', (16, 32), color) for color in ('red', 'blue'))
    first.save(tmp_path / 'a.gif', save_all=True, append_images=[second])
    assert (np.asarray(read_image(tmp_path / 'a.gif')) == [255, 0, 0]).all()


def test_a_rotation_in_exif_is_not_applied(tmp_path):
    exif = Image.Exif()
    exif[274] = 6  # turn by 90 degrees
    pictures.noise(32, 16).save(tmp_path / 'a.jpg', exif=exif)
    assert read_image(tmp_path / 'a.jpg').size == (16, 32)


def png_that_claims(width: int, height: int) -> bytes:
    """A PNG of a few bytes, one chunk of which says how large the image is."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))

    header = struct.pack('>IIBBBBB', width, height, 8, 2, 0, 0, 0)
    return (
        b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', header) + chunk(b'IDAT', zlib.compress(bytes(99))) + chunk(b'IEND', b'')
    )


def make_program(path, tmp_path):
    path.write_text(f'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n({tmp_path}/ran) (w) file closefile showpage\n')


BAD = {
    'missing': (lambda path, _: None, 'No such file'),
    'empty': (lambda path, _: path.write_bytes(b''), 'it is no JPEG, PNG'),
    'text': (lambda path, _: path.write_text('not an image\n'), 'it is no JPEG, PNG'),
    'program': (make_program, 'it is no JPEG, PNG'),
    'folder': (lambda path, _: path.mkdir(), 'directory'),
    'link': (lambda path, tmp_path: path.symlink_to(tmp_path / 'gone'), 'No such file'),
    'pipe': (lambda path, _: os.mkfifo(path), 'it is a pipe'),
    'cut': (lambda path, _: pictures.cut(path), 'truncated'),
    'bomb': (lambda path, _: path.write_bytes(png_that_claims(10**4, 10**4)), '10000 x 10000 pixels'),
    'large bomb': (lambda path, _: path.write_bytes(png_that_claims(10**5, 10**5)), 'decompression bomb'),
    'float': (lambda path, _: Image.fromarray(np.ones((4, 4), np.float32)).save(path, 'TIFF'), 'floating-point'),
    'depth': (
        lambda path, _: Image.fromarray(np.full((4, 4), 1 << 20, np.int32)).save(path, 'TIFF'),
        'more than 16 bits',
    ),
}


@pytest.mark.parametrize('kind', BAD)
@pytest.mark.filterwarnings('ignore::PIL.Image.DecompressionBombWarning')
def test_what_is_no_image_is_refused_in_one_line_with_its_path(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(decoding, 'PAUSE', 0)
    path = tmp_path / f'{kind}.jpg'
    make, reason = BAD[kind]
    make(path, tmp_path)
    with pytest.raises(UserError) as error:
        read_image(path)
    message = str(error.value)
    assert message.startswith(f'cannot read the image {path}: ')
    assert reason in message and '\n' not in message and message.count(str(path)) == 1
    assert not (tmp_path / 'ran').exists()


def test_an_image_is_tried_three_times(tmp_path, monkeypatch):
    pictures.noise(32, 16).save(tmp_path / 'a.png')
    monkeypatch.setattr(decoding, 'PAUSE', 0)
    decode, tries = decoding._decode, []

    def fails(times):
        def attempt(path):
            tries.append(path)
            if len(tries) <= times:
                raise OSError(5, 'Input/output error', str(path))
            return decode(path)

        return attempt

    monkeypatch.setattr(decoding, '_decode', fails(2))
    assert read_image(tmp_path / 'a.png').size == (16, 32)
    assert len(tries) == 3
    tries.clear()
    monkeypatch.setattr(decoding, '_decode', fails(3))
    with pytest.raises(UserError, match=r'a\.png: Input/output error$'):
        read_image(tmp_path / 'a.png')
    assert len(tries) == 3


# Workers


def work(task: Task) -> Block:
    """A block whose pixels say which items it is made of; item 13 cannot be read."""
    if 13 in task.items:
        raise UserError('cannot read the image 13.jpg: it is missing')
    return collate([(torch.full((3, 4, 2), item % 256, dtype=torch.uint8), item, 0) for item in task.items])


def tasks_of(number: int, size: int = 2) -> list[Task]:
    return [Task(list(range(20 + at * size, 20 + at * size + size))) for at in range(number)]


def pids_of(blocks) -> list[list[int]]:
    return [block.pids for block in blocks]


@pytest.mark.parametrize('number', [0, 1, 2, 3])
@pytest.mark.parametrize('count', [0, 1, 2, 7])
def test_blocks_come_in_the_order_of_their_tasks(number, count):
    workers = Workers(number, work, pin=False)
    tasks = tasks_of(count)
    for _ in range(2):
        blocks = list(workers.blocks(iter(tasks)))
        assert pids_of(blocks) == [task.items for task in tasks]
        for block in blocks:
            assert block.pixels.tolist() == [item % 256 for item in block.pids for _ in range(24)]
    workers.close()
    assert workers.workers == []


@pytest.mark.parametrize(
    ('end', 'message'),
    [
        (signal.SIGKILL, 'was ended by SIGKILL, as happens when memory runs out: use fewer --workers'),
        (signal.SIGALRM, 'was ended by SIGALRM: with --workers 0 the run decodes images itself'),
        (None, 'ended with status 5: with --workers 0 the run decodes images itself'),
    ],
)
def test_a_lost_worker_is_reported_by_how_it_ended(end, message):
    def dies(task):
        if task.items[0] > 22:
            os.kill(os.getpid(), end) if end else os._exit(5)
        return work(task)

    workers = Workers(2, dies, pin=False)
    blocks = workers.blocks(tasks_of(4))
    assert next(blocks).pids == [20, 21] and next(blocks).pids == [22, 23]
    with pytest.raises(ProcessLost, match=f'^a process that decodes images {re.escape(message)}$'):
        next(blocks)
    assert workers.workers == []


def test_a_worker_that_is_lost_in_the_middle_of_sending(monkeypatch):
    """The run has read the first bytes of a block, which is larger than any pipe."""
    workers = Workers(1, lambda task: collate([(torch.zeros(3, 2048, 1024, dtype=torch.uint8), 0, 0)]), pin=False)

    def read(file, room, whole=decoding._read):
        whole(file, room[:1000])
        workers.workers[0].process.kill()
        whole(file, room[1000:])

    monkeypatch.setattr(decoding, '_read', read)
    with pytest.raises(ProcessLost, match='SIGKILL'):
        next(workers.blocks(tasks_of(1)))


SIGNALLED = """
import os, signal, sys, torch
from arguments import DataOptions
from dataset_loader import ImageDataset, train_loader
from runtime.device import Run
from samplers import RandomSampler

got = []
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda number, _: got.append(number))
items = [(path, index, 0) for index, path in enumerate(sys.argv[2:])]
options, run = DataOptions(workers=2), Run(torch.device('cpu'))
training = train_loader(ImageDataset(items), RandomSampler(items, 4), options, run)
batches = training.epoch(0)
next(batches)
os.killpg(0, signal.SIGTERM)
os.killpg(0, signal.SIGINT)
assert len(list(batches)) == len(training) - 1 and len(list(training.epoch(1))) == len(training)
assert got == [signal.SIGTERM, signal.SIGINT], got
print('continued', flush=True)
if sys.argv[1] == 'raises':
    batches = training.epoch(2)
    next(batches)
    raise RuntimeError('with workers at work')
"""


@pytest.mark.parametrize('end', ['returns', 'raises'])
def test_workers_ignore_signals_and_yet_end_with_the_run(end, images):
    done = subprocess.run(  # its pipes close when the last of its workers has ended
        [sys.executable, '-c', SIGNALLED, end, *[path for path, _, _ in images]],
        cwd=ROOT,
        env={**os.environ, 'OMP_NUM_THREADS': '1'},
        capture_output=True,
        text=True,
        timeout=120,
        start_new_session=True,
    )
    assert 'continued' in done.stdout, done.stderr
    assert done.returncode == (end == 'raises'), done.stderr


# The cache


def test_a_cache_for_a_gpu_is_sent_in_one_piece(mixed):
    """What `ram` sends to another device: the same blocks that workers make."""
    shown = [read_image(path) for path, _, _ in mixed[:7]]
    block = collate([(picture, index, 0) for index, picture in enumerate(shown)])
    assert block.pixels.dim() == 1 and len(block.groups) == 3
    for arrived, expected in zip(pictures.in_order(block.images(CPU)), shown, strict=True):
        assert (arrived.numpy() == np.asarray(expected)).all()


def test_free_memory_is_that_of_this_machine():
    free = caching.free_memory(CPU)
    assert 1e6 < free <= os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')


def test_free_memory_heeds_the_limit_of_a_container(tmp_path, monkeypatch):
    class There(type(Path())):
        def __new__(cls, path):
            return Path(
                str(path).replace('/sys/fs/cgroup', str(tmp_path)).replace('/proc/self/cgroup', f'{tmp_path}/own')
            )

    (tmp_path / 'own').write_text('1:cpu:/x\n0::/jobs/7\n')
    (tmp_path / 'jobs' / '7').mkdir(parents=True)
    (tmp_path / 'jobs' / '7' / 'memory.max').write_text('3000000\n')
    (tmp_path / 'jobs' / '7' / 'memory.stat').write_text('anon 1000000\nfile 1900000\n')
    monkeypatch.setattr(caching, 'Path', There)
    assert caching.free_memory(CPU) == 2_000_000
    (tmp_path / 'jobs' / '7' / 'memory.max').write_text('max\n')
    assert caching.free_memory(CPU) > 2_000_000
