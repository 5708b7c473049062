"""Reading images, right or refused; tracklets; and loaders that give the same batches however they are run."""

import contextlib
import errno
import gc
import os
import re
import signal
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

import dataset_loader
from dataset_loader import ImageDataset, VideoDataset, read_image, test_loader, train_loader
from runtime.errors import ProcessLost, UserError
from samplers import RandomIdentitySampler, RandomSampler

ROOT = Path(dataset_loader.__file__).parent


def noise(height: int, width: int, seed: int = 0) -> Image.Image:
    """Smooth enough to survive JPEG, different everywhere."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 3, 3), np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.BICUBIC)


@pytest.fixture(scope='module')
def images(tmp_path_factory) -> list:
    """Six identities with four images each, all of one size."""
    folder = tmp_path_factory.mktemp('images')
    items = []
    for index in range(24):
        path = folder / f'{index}.jpg'
        noise(32, 16, seed=index).save(path)
        items.append((str(path), index // 4, index % 3))
    return items


@pytest.fixture(scope='module')
def mixed(images, tmp_path_factory) -> list:
    """The same identities in three sizes."""
    folder = tmp_path_factory.mktemp('mixed')
    items = []
    for index, (_, pid, camid) in enumerate(images):
        path = folder / f'{index}.png'
        noise(*[(32, 16), (48, 20), (20, 30)][index % 3], seed=index).save(path)
        items.append((str(path), pid, camid))
    return items


@pytest.fixture
def tracklets(mixed) -> list:
    """Frames of one size in the first, of several sizes in the others."""
    paths = [path for path, _, _ in mixed]
    return [(tuple(paths[::3]), 0, 0), (tuple(paths[:5]), 1, 1), (tuple(paths[5:7]), 1, 2)]


@pytest.fixture
def loader(run):
    """Make a training loader of the run of one process."""

    def make(items, batch_size=8, workers=0, identities=False, rank=0, world_size=1, **data):
        sampler = RandomIdentitySampler(items, 4, batch_size) if identities else RandomSampler(items, batch_size)
        share = SimpleNamespace(**{**vars(run), 'rank': rank, 'world_size': world_size})
        return train_loader(ImageDataset(items), sampler, SimpleNamespace(workers=workers, **data), share)

    return make


def in_order(groups) -> list:
    """The images of a batch, one by one in their places."""
    images = {}
    for positions, pixels in groups:
        assert pixels.dtype == torch.uint8 and pixels.shape[0] == len(positions) and pixels.shape[3] == 3
        images |= dict(zip(positions.tolist(), pixels, strict=True))
    assert sorted(images) == list(range(len(images)))
    return [images[place] for place in range(len(images))]


def epoch_of(loader, epoch=0, start=0) -> list:
    """The batches of an epoch as plain (images, pids, draws)."""
    return [(in_order(images), pids, draws) for images, pids, draws in loader.epoch(epoch, start)]


def assert_equal(one: list, two: list) -> None:
    assert len(one) == len(two)
    for (images, pids, draws), (others, other_pids, other_draws) in zip(one, two, strict=True):
        assert torch.equal(pids, other_pids) and torch.equal(draws, other_draws)
        assert len(images) == len(others)
        assert all(torch.equal(image, other) for image, other in zip(images, others, strict=True))


def workers_of(training) -> list:
    return training.source.loader._iterator._workers


# Reading


def test_rgb_is_read_as_it_is(tmp_path):
    noise(32, 16).save(tmp_path / 'a.png')
    assert (np.asarray(read_image(tmp_path / 'a.png')) == np.asarray(noise(32, 16))).all()
    noise(32, 16).save(tmp_path / 'a.jpg')
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
    original = noise(32, 16).convert(mode)
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
    noise(32, 16).save(tmp_path / 'a.jpg', exif=exif)
    assert read_image(tmp_path / 'a.jpg').size == (16, 32)


def png_that_claims(width: int, height: int) -> bytes:
    """A PNG of a few bytes, one chunk of which says how large the image is."""
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))

    header = struct.pack('>IIBBBBB', width, height, 8, 2, 0, 0, 0)
    return (
        b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', header) + chunk(b'IDAT', zlib.compress(bytes(99))) + chunk(b'IEND', b'')
    )


def make_cut(path, tmp_path):
    whole = tmp_path / 'whole.jpg'
    noise(128, 64).save(whole)
    path.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])


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
    'cut': (make_cut, 'truncated'),
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
    monkeypatch.setattr(dataset_loader, 'PAUSE', 0)
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
    noise(32, 16).save(tmp_path / 'a.png')
    monkeypatch.setattr(dataset_loader, 'PAUSE', 0)
    decode, tries = dataset_loader._decode, []

    def fails(times):
        def attempt(path):
            tries.append(path)
            if len(tries) <= times:
                raise OSError(5, 'Input/output error', str(path))
            return decode(path)

        return attempt

    monkeypatch.setattr(dataset_loader, '_decode', fails(2))
    assert read_image(tmp_path / 'a.png').size == (16, 32)
    assert len(tries) == 3
    tries.clear()
    monkeypatch.setattr(dataset_loader, '_decode', fails(3))
    with pytest.raises(UserError, match=r'a\.png: Input/output error$'):
        read_image(tmp_path / 'a.png')
    assert len(tries) == 3


# Data sets


def test_items_of_images(images):
    dataset = ImageDataset(images)
    img, pid, camid = dataset[5]
    assert len(dataset) == 24 and (pid, camid) == (1, 2)
    assert img.shape == (3, 32, 16) and img.dtype == torch.uint8
    assert (img.permute(1, 2, 0).numpy() == np.asarray(Image.open(images[5][0]))).all()
    transformed, pid, camid = ImageDataset(images, lambda image: image.size)[5]
    assert transformed == (16, 32) and (pid, camid) == (1, 2)


def test_a_plain_dataloader_reads_the_data_sets(images, tracklets):
    imgs, pids, camids = next(iter(DataLoader(ImageDataset(images), batch_size=6)))
    assert imgs.shape == (6, 3, 32, 16) and pids.tolist() == [0, 0, 0, 0, 1, 1] and camids.tolist() == [0, 1, 2] * 2
    imgs, *_ = next(iter(DataLoader(VideoDataset(tracklets[:1], 4), batch_size=1)))
    assert imgs.shape == (1, 4, 3, 32, 16)


@pytest.mark.parametrize(
    ('length', 'n', 'frames'),
    [
        (4, 8, [0, 2, 4, 6]),
        (4, 11, [0, 2, 4, 6]),
        (4, 4, [0, 1, 2, 3]),
        (4, 7, [0, 1, 2, 3]),
        (4, 3, [0, 1, 2, 2]),
        (5, 1, [0, 0, 0, 0, 0]),
        (1, 9, [0]),
    ],
)
def test_frames_taken_evenly(length, n, frames):
    dataset = VideoDataset([(tuple(range(n)), 0, 0)], length, 'evenly')
    assert list(dataset.paths(0)) == frames


def test_frames_taken_at_random():
    frames = tuple(range(10))
    dataset = VideoDataset([(frames, 0, 0), (frames, 1, 0), (frames[:3], 2, 0)], 4, 'random', seed=3)
    for epoch in range(20):
        taken = dataset.paths(0, epoch)
        assert list(taken) == sorted(set(taken)) and len(taken) == 4
        few = dataset.paths(2, epoch)
        assert list(few) == sorted(few) and len(few) == 4 and set(few) <= {0, 1, 2}
    again = VideoDataset(dataset.dataset, 4, 'random', seed=3)
    assert again.paths(1, 5) == dataset.paths(1, 5)
    assert dataset.paths(-2, 5) == dataset.paths(1, 5)
    assert len({dataset.paths(0, epoch) for epoch in range(20)}) > 10
    assert len({VideoDataset(dataset.dataset, 4, 'random', seed=seed).paths(0) for seed in range(-10, 10)}) > 10
    assert set(frames) == {frame for epoch in range(50) for frame in dataset.paths(0, epoch)}


def test_items_of_tracklets(tracklets):
    imgs, pid, camid = VideoDataset(tracklets, 3)[0]
    assert imgs.shape == (3, 3, 32, 16) and imgs.dtype == torch.uint8 and (pid, camid) == (0, 0)
    assert torch.equal(imgs[1], ImageDataset([(tracklets[0][0][2], 0, 0)])[0][0])
    imgs, *_ = VideoDataset(tracklets, sample='all')[1]
    assert [tuple(img.shape) for img in imgs] == [(3, 32, 16), (3, 48, 20), (3, 20, 30), (3, 32, 16), (3, 48, 20)]
    imgs, *_ = VideoDataset(tracklets, 3, transform=lambda image: torch.tensor(image.resize((2, 2)).getpixel((0, 0))))[
        1
    ]
    assert imgs.shape == (3, 3)
    dataset = VideoDataset(tracklets, 2, 'random')
    assert all(torch.equal(a, b) for a, b in zip(dataset[0, 4][0], dataset[0, 4][0], strict=True))
    assert len({tuple(dataset[0, epoch][0].flatten().tolist()) for epoch in range(6)}) > 1


def test_unknown_ways_to_sample_are_refused(tracklets):
    with pytest.raises(UserError, match=r"'oddly': choose one of evenly, random, all"):
        VideoDataset(tracklets, 4, 'oddly')
    with pytest.raises(UserError, match=r'--seq-len is 0'):
        VideoDataset(tracklets, 0)


# Training batches


@pytest.mark.parametrize('kind', ['images', 'mixed'])
def test_batches_are_what_the_sampler_drew(kind, loader, request):
    items = request.getfixturevalue(kind)
    training = loader(items, identities=True)
    indices, draws = training.sampler.draw(3)
    batches = epoch_of(training, epoch=3)
    assert len(batches) == len(training) == 3
    for batch, (images, pids, batch_draws) in enumerate(batches):
        assert torch.equal(batch_draws, draws[batch])
        assert pids.tolist() == [items[index][1] for index in indices[batch]]
        for image, index in zip(images, indices[batch].tolist(), strict=True):
            assert (image.numpy() == np.asarray(Image.open(items[index][0]))).all()


@pytest.mark.parametrize('kind', ['images', 'mixed'])
def test_workers_change_nothing_and_stay(kind, loader, request):
    items = request.getfixturevalue(kind)
    alone, helped = loader(items), loader(items, workers=2)
    state = torch.get_rng_state()
    assert_equal(epoch_of(helped, 0), epoch_of(alone, 0))
    workers = {worker.pid for worker in workers_of(helped)}
    assert_equal(epoch_of(helped, 1), epoch_of(alone, 1))
    assert_equal(epoch_of(helped, 1, start=2), epoch_of(alone, 1)[2:])
    assert workers == {worker.pid for worker in workers_of(helped)}
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize('workers', [0, 2])
def test_an_epoch_can_be_left_and_begun_in_the_middle(workers, loader, images):
    training = loader(images, batch_size=4, workers=workers)
    whole = epoch_of(training, 2)
    assert_equal(epoch_of(training, 2, start=4), whole[4:])
    assert epoch_of(training, 2, start=6) == []
    left = training.epoch(1)
    next(left)
    left.close()
    assert_equal(epoch_of(training, 2), whole)


@pytest.mark.parametrize('world_size', [2, 3, 4])
def test_the_batches_of_all_processes_are_the_batch_of_one(world_size, loader, mixed):
    whole = epoch_of(loader(mixed, batch_size=12), 1)
    shares = [epoch_of(loader(mixed, batch_size=12, rank=rank, world_size=world_size), 1) for rank in range(world_size)]
    for batch, (images, pids, draws) in enumerate(whole):
        for place in range(12):
            share, own = shares[place % world_size][batch], place // world_size
            assert torch.equal(share[0][own], images[place])
            assert share[1][own] == pids[place] and torch.equal(share[2][own], draws[place])
        assert sum(len(share[batch][0]) for share in shares) == 12


@pytest.mark.parametrize('workers', [0, 2])
def test_a_bad_image_ends_the_epoch_with_its_path_in_one_line(workers, loader, images, tmp_path):
    bad = tmp_path / 'cut.jpg'
    make_cut(bad, tmp_path)
    training = loader([*images[:-1], (str(bad), 5, 0)], workers=workers)
    with pytest.raises(UserError) as error:
        epoch_of(training)
    assert str(error.value).startswith(f'cannot read the image {bad}: ') and '\n' not in str(error.value)


@pytest.mark.parametrize(
    ('end', 'message'),
    [
        (signal.SIGKILL, 'SIGKILL, as happens when memory runs out: use fewer --workers'),
        (signal.SIGBUS, 'SIGBUS, as happens when shared memory runs out: give the run more shared memory'),
        (signal.SIGALRM, 'SIGALRM: with --workers 0 the run decodes them itself'),
    ],
)
def test_a_worker_is_seen_to_be_lost_though_its_socket_closes_before_it_has_ended(
    end, message, loader, images, monkeypatch
):
    training = loader(images, workers=2)

    def unpack(block):
        threading.Timer(0.2, os.kill, (workers_of(training)[0].pid, end)).start()
        raise ConnectionResetError(errno.ECONNRESET, 'Connection reset by peer')

    monkeypatch.setattr(dataset_loader, '_unpack', unpack)
    with pytest.raises(ProcessLost, match=f'ended by {re.escape(message)}'):
        next(training.epoch(0))


def test_loaders_only_decode(images, loader, run):
    with pytest.raises(UserError, match='only decode'):
        test_loader(ImageDataset(images, transform=np.asarray), 4, 0, run)
    with pytest.raises(ValueError, match='draws from 24 images, there are 23'):
        train_loader(ImageDataset(images[:-1]), RandomSampler(images, 8), SimpleNamespace(workers=0), run)


@pytest.mark.parametrize('cyclic', [False, True])
def test_workers_end_with_the_loader(cyclic, loader, images):
    training = loader(images, workers=2)
    next(training.epoch(0))
    workers = workers_of(training)
    assert all(worker.is_alive() for worker in workers)
    if cyclic:  # as in the traceback of an error: collected as a whole, in any order
        training.itself = training
    started = time.monotonic()
    del training
    gc.collect()
    assert not any(worker.is_alive() for worker in workers)
    assert time.monotonic() - started < 3


SIGNALLED = """
import os, signal, sys, time
from types import SimpleNamespace
import torch
from dataset_loader import ImageDataset, train_loader
from samplers import RandomSampler

got = []
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda number, _: got.append(number))
items = [(path, index, 0) for index, path in enumerate(sys.argv[2:])]
run = SimpleNamespace(device=torch.device('cpu'), rank=0, world_size=1)
training = train_loader(ImageDataset(items), RandomSampler(items, 4), SimpleNamespace(workers=2), run)
batches = training.epoch(0)
next(batches)
os.killpg(0, signal.SIGTERM)
os.killpg(0, signal.SIGINT)
time.sleep(0.2)
assert len(list(batches)) == len(training) - 1 and len(list(training.epoch(1))) == len(training)
assert got == [signal.SIGTERM, signal.SIGINT], got
print('went on', flush=True)
if sys.argv[1] == 'raises':
    batches = training.epoch(2)
    next(batches)
    raise RuntimeError('with workers at work')
"""


@pytest.mark.parametrize('end', ['returns', 'raises'])
def test_workers_ignore_signals_and_yet_end_with_the_run(end, images):
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, '-c', SIGNALLED, end, *[path for path, _, _ in images]],
        cwd=ROOT,
        env={**os.environ, 'OMP_NUM_THREADS': '1'},
        capture_output=True,
        text=True,
        timeout=60,
        start_new_session=True,
    )
    assert 'went on' in done.stdout, done.stderr
    assert done.returncode == (end == 'raises'), done.stderr
    assert time.monotonic() - started < 30


# Test batches


@pytest.mark.parametrize('workers', [0, 2])
@pytest.mark.parametrize('batch_size', [1, 5, 24, 100])
def test_every_image_once_and_in_order(batch_size, workers, mixed, run):
    if workers and batch_size == 1:
        pytest.skip('slow, and nothing new')
    loader = test_loader(ImageDataset(mixed), batch_size, workers, run)
    for _ in range(2):  # each time anew
        batches = list(loader)
        assert len(batches) == len(loader) == -(-24 // batch_size)
        assert torch.cat([indices for _, indices, _ in batches]).tolist() == list(range(24))
        assert all(counts.tolist() == [1] * len(indices) for _, indices, counts in batches)
        images = [image for groups, _, _ in batches for image in in_order(groups)]
        assert all(
            (image.numpy() == np.asarray(Image.open(item[0]))).all() for image, item in zip(images, mixed, strict=True)
        )


@pytest.mark.parametrize('sample', ['evenly', 'random', 'all'])
def test_tracklets_come_as_flat_frames(sample, tracklets, run):
    dataset = VideoDataset(tracklets, 4, sample)
    batches = list(test_loader(dataset, 2, 0, run))
    assert [indices.tolist() for _, indices, _ in batches] == [[0, 1], [2]]
    assert [counts.tolist() for _, _, counts in batches] == ([[8, 5], [2]] if sample == 'all' else [[4, 4], [4]])
    for groups, indices, counts in batches:
        frames = [frame for index in indices.tolist() for frame in dataset[index][0]]
        found = in_order(groups)
        assert len(found) == counts.sum() == len(frames)
        assert all(torch.equal(a.permute(2, 0, 1), b) for a, b in zip(found, frames, strict=True))


@pytest.mark.parametrize('world_size', [2, 5, 30])
def test_processes_share_a_test_without_duplicates(world_size, mixed, run):
    shares = []
    for rank in range(world_size):
        share = SimpleNamespace(**{**vars(run), 'rank': rank, 'world_size': world_size})
        loader = test_loader(ImageDataset(mixed), 7, 0, share)
        batches = list(loader)
        assert len(batches) == len(loader)
        shares += [index for _, indices, _ in batches for index in indices.tolist()]
    assert sorted(shares) == list(range(24))


def test_an_empty_test_has_no_batches(run):
    assert list(test_loader(ImageDataset([]), 4, 0, run)) == []


# The cache


@pytest.mark.parametrize('kind', ['images', 'mixed'])
@pytest.mark.parametrize('cache', ['ram', 'device'])
@pytest.mark.parametrize('workers', [0, 2])
def test_a_cache_changes_nothing_and_decodes_once(kind, cache, workers, loader, request, monkeypatch, capsys):
    items = request.getfixturevalue(kind)
    training = loader(items, workers=workers, cache=cache)
    assert capsys.readouterr().out == ''  # a run that only tests fills none
    cached = epoch_of(training, 0)
    line = capsys.readouterr().out
    assert line.startswith(f'--cache {cache}: 24 training images take about 0.00 GB of ') and line.count('\n') == 1
    plain = loader(items)
    assert_equal(cached, epoch_of(plain, 0))
    expected = epoch_of(plain, 1)
    monkeypatch.setattr(dataset_loader, '_decode', None)  # nothing is read any more
    assert_equal(epoch_of(training, 1), expected)
    assert_equal(epoch_of(training, 1, start=1), expected[1:])


def test_a_cache_for_a_gpu_is_sent_in_one_piece(mixed):
    """What `ram` sends to another device: the same blocks that workers make."""
    pictures = [np.asarray(read_image(path)) for path, _, _ in mixed[:7]]
    layout, pixels = dataset_loader._pack(pictures)
    assert pixels.dim() == 1 and len(layout) == 3
    for found, expected in zip(in_order(dataset_loader._unpack((layout, pixels))), pictures, strict=True):
        assert (found.numpy() == expected).all()


def test_a_cache_that_does_not_fit_is_refused(loader, images, monkeypatch):
    monkeypatch.setattr(dataset_loader, '_free_memory', lambda device: 24 * 32 * 16 * 3)
    with pytest.raises(UserError, match=r'--cache ram: 24 training images take .* too much: use --cache none'):
        epoch_of(loader(images, cache='ram'))
    monkeypatch.setattr(dataset_loader, '_free_memory', lambda device: 24 * 32 * 16 * 3 * 2)
    epoch_of(loader(images, cache='ram'))
    with pytest.raises(UserError, match='too much'):  # each process holds its own
        epoch_of(loader(images, cache='ram', rank=0, world_size=2))


def test_a_cache_names_a_bad_image(loader, images, tmp_path):
    with pytest.raises(UserError, match=r'gone\.jpg'):
        epoch_of(loader([*images[:-1], (str(tmp_path / 'gone.jpg'), 5, 0)], cache='ram'))


def test_free_memory_is_that_of_this_machine():
    free = dataset_loader._free_memory(torch.device('cpu'))
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
    monkeypatch.setattr(dataset_loader, 'Path', There)
    assert dataset_loader._free_memory(torch.device('cpu')) == 2_000_000
    (tmp_path / 'jobs' / '7' / 'memory.max').write_text('max\n')
    assert dataset_loader._free_memory(torch.device('cpu')) > 2_000_000


def test_a_run_that_waits_for_images_is_told_of_the_cache_once(loader, images, monkeypatch, capsys):
    clock = iter(range(10**6))
    monkeypatch.setattr(dataset_loader.time, 'perf_counter', lambda: next(clock))
    training = loader(images)
    for epoch in range(3):
        epoch_of(training, epoch)
    assert (
        capsys.readouterr().out
        == '33% of the epoch was spent waiting for images; --cache ram would hold all in 0.00 GB\n'
    )
    epoch_of(loader(images, cache='ram'))
    epoch_of(loader(images, rank=1, world_size=2))
    assert 'waiting' not in capsys.readouterr().out
    monkeypatch.setattr(dataset_loader, '_free_memory', lambda device: 10)
    epoch_of(loader(images))
    assert capsys.readouterr().out == ''


def test_one_batch_is_copied_ahead_of_the_computation(mixed, monkeypatch):
    """The order of things on a GPU, with streams that only write down what they are asked."""
    said = []
    stream = SimpleNamespace(wait_stream=lambda other: said.append('wait'))
    monkeypatch.setattr(torch.cuda, 'Stream', lambda device: stream)
    monkeypatch.setattr(torch.cuda, 'stream', lambda _: contextlib.nullcontext(said.append('copy')))
    monkeypatch.setattr(torch.cuda, 'current_stream', lambda device: stream)
    monkeypatch.setattr(torch.Tensor, 'record_stream', lambda pixels, _: said.append('keep'))
    pictures = [np.asarray(read_image(path)) for path, _, _ in mixed[:6:3]]
    blocks = [dataset_loader._pack([picture]) for picture in pictures]
    batches = dataset_loader._ahead(blocks, torch.device('cpu'))
    for picture in pictures:
        assert (in_order(next(batches))[0].numpy() == picture).all()
        said.append('compute')
    assert next(batches, None) is None
    assert said == ['copy', 'wait', 'keep', 'copy', 'compute', 'wait', 'keep', 'copy', 'compute']
    with pytest.raises(UserError, match='cannot read'):
        next(dataset_loader._ahead(['cannot read the image'], torch.device('cpu')))


# On a GPU

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason='needs CUDA')


@gpu
@pytest.mark.gpu
@pytest.mark.parametrize('kind', ['images', 'mixed'])
@pytest.mark.parametrize(('cache', 'workers'), [('none', 0), ('none', 2), ('ram', 2), ('device', 2)])
def test_a_gpu_gets_the_same_batches(kind, cache, workers, loader, run, request):
    items = request.getfixturevalue(kind)
    expected = epoch_of(loader(items), 1)
    run.device = torch.device('cuda', 0)
    training = loader(items, workers=workers, cache=cache)
    for _ in range(3):
        batches = []
        for images, pids, draws in training.epoch(1):
            assert {pixels.device for _, pixels in images} == {pids.device} == {draws.device} == {run.device}
            torch.cuda._sleep(10**7)  # the device is behind: memory that is used again too early would show
            batches.append(([image.cpu() for image in in_order(images)], pids.cpu(), draws.cpu()))
        assert_equal(batches, expected)
