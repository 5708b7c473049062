"""Tracklets, and loaders that give the same batches however they are run."""

import contextlib
import gc
import os
import time
from types import SimpleNamespace

import numpy as np
import pictures
import pytest
import torch
from pictures import in_order
from PIL import Image
from torch.utils.data import DataLoader

import dataset_loader
from arguments import DataOptions
from dataset_loader import ImageDataset, VideoDataset, read_image, train_loader
from dataset_loader import test_loader as items_loader  # its own name is that of a test
from runtime import caching, decoding
from runtime.device import Run
from runtime.errors import UserError
from runtime.feed import Feed
from runtime.processes import Processes
from runtime.workers import collate
from samplers import RandomIdentitySampler, RandomSampler

CPU = torch.device('cpu')


@pytest.fixture
def tracklets(mixed) -> list:
    """Frames of one size in the first, of several sizes in the others."""
    paths = [path for path, _, _ in mixed]
    return [(tuple(paths[::3]), 0, 0), (tuple(paths[:5]), 1, 1), (tuple(paths[5:7]), 1, 2)]


def share_of(rank: int = 0, world_size: int = 1, device: torch.device = CPU) -> Run:
    """A run as process `rank` of `world_size` sees it."""
    return Run(device, processes=Processes(rank, world_size))


def loader_of(items, batch_size=8, workers=0, identities=False, run=None, cache='none', dataset=None, seed=0):
    """A training loader, of the run of one process if no other is given."""
    sampler = (
        RandomIdentitySampler(items, 4, batch_size, seed) if identities else RandomSampler(items, batch_size, seed)
    )
    options = DataOptions(workers=workers, cache=cache)
    return train_loader(dataset or ImageDataset(items), sampler, options, run or share_of())


def epoch_of(loader, epoch=0, start=0) -> list:
    """The batches of an epoch as plain (images, pids, draws, more ...)."""
    return [(in_order(images), *others) for images, *others in loader.epoch(epoch, start)]


def assert_equal(one: list, two: list) -> None:
    """The same batches, bit for bit, and of the same types."""
    assert len(one) == len(two)
    for batch, other in zip(one, two, strict=True):
        assert_same(batch, other)


def assert_same(one, two) -> None:
    assert type(one) is type(two)
    if isinstance(one, torch.Tensor):
        assert one.dtype == two.dtype and one.device == two.device and torch.equal(one, two)
    elif isinstance(one, dict):
        assert list(one) == list(two)
        assert_same(list(one.values()), list(two.values()))
    elif isinstance(one, list | tuple):
        assert len(one) == len(two)
        for part, other in zip(one, two, strict=True):
            assert_same(part, other)
    else:
        assert one == two


def processes_of(training) -> list:
    return [worker.process for worker in training.workers.workers]


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


@pytest.fixture
def numbered(monkeypatch) -> None:
    """A frame is a number, and so are its pixels."""
    monkeypatch.setattr(dataset_loader, 'read_pixels', torch.tensor)


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
def test_frames_taken_evenly(length, n, frames, numbered):
    dataset = VideoDataset([(tuple(range(n)), 0, 0)], length, 'evenly')
    assert dataset[0][0].tolist() == list(dataset.files()) == frames


def test_frames_taken_at_random(numbered):
    def taken(index: int, epoch: int = 0, seed: int = 3) -> list[int]:
        return VideoDataset(tracklets, 4, 'random', seed=seed)[index, epoch][0].tolist()

    frames = tuple(range(10))
    tracklets = [(frames, 0, 0), (frames, 1, 0), (frames[:3], 2, 0)]
    for epoch in range(20):
        assert taken(0, epoch) == sorted(set(taken(0, epoch))) and len(taken(0, epoch)) == 4
        few = taken(2, epoch)
        assert few == sorted(few) and len(few) == 4 and set(few) <= {0, 1, 2}
    assert taken(1, 5) == taken(1, 5) == taken(-2, 5)
    assert len({tuple(taken(0, epoch)) for epoch in range(20)}) > 10
    assert len({tuple(taken(0, 0, seed)) for seed in range(-10, 10)}) > 10
    assert set(frames) == {frame for epoch in range(50) for frame in taken(0, epoch)}
    dataset = VideoDataset(tracklets, 4, 'random', seed=3)
    assert list(dataset.files()) == [frame for index in range(3) for frame in dataset[index][0].tolist()]


def test_items_of_tracklets(tracklets):
    imgs, pid, camid = VideoDataset(tracklets, 3)[0]
    assert imgs.shape == (3, 3, 32, 16) and imgs.dtype == torch.uint8 and (pid, camid) == (0, 0)
    assert torch.equal(imgs[1], ImageDataset([(tracklets[0][0][2], 0, 0)])[0][0])
    imgs, *_ = VideoDataset(tracklets, sample='all')[1]
    assert [tuple(img.shape) for img in imgs] == [(3, 32, 16), (3, 48, 20), (3, 20, 30), (3, 32, 16), (3, 48, 20)]
    dataset = VideoDataset(tracklets, 3, transform=lambda image: torch.tensor(image.resize((2, 2)).getpixel((0, 0))))
    assert dataset[1][0].shape == (3, 3)
    dataset = VideoDataset(tracklets, 2, 'random')
    assert all(torch.equal(a, b) for a, b in zip(dataset[0, 4][0], dataset[0, 4][0], strict=True))
    assert len({tuple(dataset[0, epoch][0].flatten().tolist()) for epoch in range(6)}) > 1


def test_unknown_ways_to_sample_are_refused(tracklets):
    with pytest.raises(UserError, match=r"'oddly': choose one of evenly, random, all"):
        VideoDataset(tracklets, 4, 'oddly')
    with pytest.raises(UserError, match=r'--seq-len is 0'):
        VideoDataset(tracklets, 0)


def test_files_are_all_that_is_read(images, tracklets):
    assert list(ImageDataset(images).files()) == [path for path, _, _ in images]
    assert list(VideoDataset(tracklets, sample='all').files()) == [path for paths, _, _ in tracklets for path in paths]


# Training batches


@pytest.mark.parametrize('kind', ['images', 'mixed'])
def test_batches_are_what_the_sampler_drew(kind, request):
    items = request.getfixturevalue(kind)
    training = loader_of(items, identities=True)
    indices, draws = training.sampler.draw(3)
    batches = epoch_of(training, epoch=3)
    assert len(batches) == len(training) == 3
    for batch, (images, pids, batch_draws) in enumerate(batches):
        assert torch.equal(batch_draws, draws[batch])
        assert pids.dtype == torch.int64 and pids.tolist() == [items[index][1] for index in indices[batch]]
        assert training.paths(3, batch) == [items[index][0] for index in indices[batch]]
        for image, index in zip(images, indices[batch].tolist(), strict=True):
            assert image.dtype == torch.uint8
            assert (image.numpy() == np.asarray(Image.open(items[index][0]))).all()


@pytest.mark.parametrize('kind', ['images', 'mixed'])
def test_workers_change_nothing_and_stay(kind, request):
    items = request.getfixturevalue(kind)
    alone, helped = loader_of(items), loader_of(items, workers=2)
    state = torch.get_rng_state()
    assert_equal(epoch_of(helped, 0), epoch_of(alone, 0))
    workers = {process.pid for process in processes_of(helped)}
    assert len(workers) == 2
    assert_equal(epoch_of(helped, 1), epoch_of(alone, 1))
    assert_equal(epoch_of(helped, 1, start=2), epoch_of(alone, 1)[2:])
    assert workers == {process.pid for process in processes_of(helped)}
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize('workers', [0, 2])
def test_an_epoch_can_be_left_and_begun_in_the_middle(workers, images):
    training = loader_of(images, batch_size=4, workers=workers)
    whole = epoch_of(training, 2)
    assert_equal(epoch_of(training, 2, start=4), whole[4:])
    assert epoch_of(training, 2, start=6) == []
    left = training.epoch(1)
    next(left)
    left.close()
    assert_equal(epoch_of(training, 2), whole)


@pytest.mark.parametrize('world_size', [2, 3, 4])
def test_the_batches_of_all_processes_are_the_batch_of_one(world_size, mixed):
    whole = epoch_of(loader_of(mixed, 12), 1)
    shares = [epoch_of(loader_of(mixed, 12, run=share_of(rank, world_size)), 1) for rank in range(world_size)]
    for batch, (images, pids, draws) in enumerate(whole):
        for place in range(12):
            share, own = shares[place % world_size][batch], place // world_size
            assert torch.equal(share[0][own], images[place])
            assert share[1][own] == pids[place] and torch.equal(share[2][own], draws[place])
        assert sum(len(share[batch][0]) for share in shares) == 12


@pytest.mark.parametrize('workers', [0, 2])
def test_a_bad_image_ends_the_epoch_with_its_path_in_one_line(workers, images, tmp_path):
    bad = tmp_path / 'cut.jpg'
    pictures.cut(bad)
    training = loader_of([*images[:-1], (str(bad), 5, 0)], workers=workers)
    with pytest.raises(UserError) as error:
        epoch_of(training)
    assert str(error.value).startswith(f'cannot read the image {bad}: ') and '\n' not in str(error.value)


def test_a_sampler_of_other_items_is_refused(images):
    with pytest.raises(ValueError, match='draws from 24 images, there are 23'):
        loader_of(images, dataset=ImageDataset(images[:-1]))


@pytest.mark.parametrize('cyclic', [False, True])
def test_workers_end_with_the_loader(cyclic, images):
    training = loader_of(images, workers=2)
    batches = training.epoch(0)
    next(batches)
    processes = processes_of(training)
    assert len(processes) == 2 and all(process.is_alive() for process in processes)
    pids = [process.pid for process in processes]
    if cyclic:  # as in the traceback of an error: collected as a whole, in any order
        training.itself = training, batches
    del training, batches, processes
    gc.collect()
    assert not any(os.path.exists(f'/proc/{pid}') for pid in pids)


def test_a_run_that_waits_for_images_is_advised_to_cache_them_once(images, monkeypatch, capsys):
    clock = iter(range(10**6))
    monkeypatch.setattr(time, 'perf_counter', lambda: next(clock))
    training = loader_of(images)
    for epoch in range(3):
        epoch_of(training, epoch)
    line = '33% of the epoch was spent waiting for images; --cache ram would hold all in 0.00 GB\n'
    assert capsys.readouterr().out == line
    epoch_of(loader_of(images, cache='ram'))
    epoch_of(loader_of(images, run=share_of(1, 2)))
    assert 'waiting' not in capsys.readouterr().out
    monkeypatch.setattr(dataset_loader, 'free_memory', lambda device: 10)
    epoch_of(loader_of(images))
    assert capsys.readouterr().out == ''


# Test batches


@pytest.mark.parametrize('workers', [0, 2])
@pytest.mark.parametrize('batch_size', [1, 5, 24, 100])
def test_every_image_once_and_in_order(batch_size, workers, mixed):
    loader = items_loader(ImageDataset(mixed), batch_size, workers, share_of())
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
def test_tracklets_come_as_flat_frames(sample, tracklets):
    dataset = VideoDataset(tracklets, 4, sample)
    batches = list(items_loader(dataset, 2, 0, share_of()))
    assert [indices.tolist() for _, indices, _ in batches] == [[0, 1], [2]]
    assert [counts.tolist() for _, _, counts in batches] == ([[8, 5], [2]] if sample == 'all' else [[4, 4], [4]])
    for groups, indices, counts in batches:
        frames = [frame for index in indices.tolist() for frame in dataset[index][0]]
        arrived = in_order(groups)
        assert len(arrived) == counts.sum() == len(frames)
        assert all(torch.equal(a.permute(2, 0, 1), b) for a, b in zip(arrived, frames, strict=True))


@pytest.mark.parametrize('world_size', [2, 5, 30])
def test_processes_share_a_test_without_duplicates(world_size, mixed):
    shares = []
    for rank in range(world_size):
        loader = items_loader(ImageDataset(mixed), 7, 0, share_of(rank, world_size))
        batches = list(loader)
        assert len(batches) == len(loader)
        shares += [index for _, indices, _ in batches for index in indices.tolist()]
    assert sorted(shares) == list(range(24))


def test_an_empty_test_has_no_batches():
    assert list(items_loader(ImageDataset([]), 4, 0, share_of())) == []


# The cache


@pytest.mark.parametrize('kind', ['images', 'mixed'])
@pytest.mark.parametrize('cache', ['ram', 'device'])
@pytest.mark.parametrize('workers', [0, 2])
def test_a_cache_changes_nothing_and_decodes_once(kind, cache, workers, request, monkeypatch, capsys):
    items = request.getfixturevalue(kind)
    training = loader_of(items, workers=workers, cache=cache)
    assert capsys.readouterr().out == ''  # a run that only tests fills none
    cached = epoch_of(training, 0)
    line = capsys.readouterr().out
    assert line.startswith(f'--cache {cache}: 24 training images take about 0.00 GB of ') and line.count('\n') == 1
    assert processes_of(training) == []  # nothing is left for them to do
    plain = loader_of(items)
    assert_equal(cached, epoch_of(plain, 0))
    expected = epoch_of(plain, 1)
    monkeypatch.setattr(decoding, '_decode', None)  # nothing is read any more
    assert_equal(epoch_of(training, 1), expected)
    assert_equal(epoch_of(training, 1, start=1), expected[1:])


def test_a_cache_that_does_not_fit_is_refused(images, monkeypatch):
    monkeypatch.setattr(caching, 'free_memory', lambda device: 24 * 32 * 16 * 3)
    with pytest.raises(UserError, match=r'--cache ram: 24 training images take .* too much: use --cache none'):
        epoch_of(loader_of(images, cache='ram'))
    monkeypatch.setattr(caching, 'free_memory', lambda device: 24 * 32 * 16 * 3 * 2)
    epoch_of(loader_of(images, cache='ram'))
    with pytest.raises(UserError, match='too much'):  # each process holds its own
        epoch_of(loader_of(images, cache='ram', run=share_of(0, 2)))


def test_a_cache_names_a_bad_image(images, tmp_path):
    with pytest.raises(UserError, match=r'gone\.jpg'):
        epoch_of(loader_of([*images[:-1], (str(tmp_path / 'gone.jpg'), 5, 0)], cache='ram'))


# To the device


def test_one_batch_is_copied_ahead_of_the_computation(mixed, monkeypatch):
    """The order of things on a GPU, with streams that only write down what they are asked."""
    said = []
    stream = SimpleNamespace(wait_stream=lambda other: said.append('wait'))
    monkeypatch.setattr(torch.cuda, 'stream', lambda _: contextlib.nullcontext(said.append('copy')))
    monkeypatch.setattr(torch.cuda, 'current_stream', lambda device: stream)
    monkeypatch.setattr(torch.Tensor, 'pin_memory', lambda tensor: tensor)
    monkeypatch.setattr(torch, 'tensor', lambda data, pin_memory=False, make=torch.tensor: make(data))
    monkeypatch.setattr(torch.Tensor, 'is_cuda', True)
    monkeypatch.setattr(torch.Tensor, 'record_stream', lambda tensor, _: said.append('keep'))
    blocks = [collate([(read_image(path), pid, camid)]) for path, pid, camid in mixed[:6:3]]
    batches = Feed(blocks, CPU, stream)
    for path, pid, _ in mixed[:6:3]:
        groups, pids, counts, more = next(batches)
        assert (in_order(groups)[0].numpy() == np.asarray(Image.open(path))).all()
        assert pids.tolist() == [pid] and counts == [1] and more == []
        said.append('compute')
    assert next(batches, None) is None
    steps = [step for index, step in enumerate(said) if step != 'keep' or said[index - 1] != 'keep']
    assert steps == ['copy', 'wait', 'keep', 'copy', 'compute', 'wait', 'keep', 'compute']


gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason='needs CUDA')


@gpu
@pytest.mark.gpu
@pytest.mark.parametrize('kind', ['images', 'mixed'])
@pytest.mark.parametrize(('cache', 'workers'), [('none', 0), ('none', 2), ('ram', 2), ('device', 2)])
def test_a_gpu_gets_the_same_batches(kind, cache, workers, request):
    items = request.getfixturevalue(kind)
    expected = epoch_of(loader_of(items), 1)
    run = share_of(device=torch.device('cuda', 0))
    training = loader_of(items, workers=workers, cache=cache, run=run)
    for _ in range(3):
        batches = []
        for images, pids, draws in training.epoch(1):
            assert {pixels.device for _, pixels in images} == {pids.device} == {draws.device} == {run.device}
            torch.cuda._sleep(10**7)  # the device is behind: memory that is used again too early would show
            batches.append(([image.cpu() for image in in_order(images)], pids.cpu(), draws.cpu()))
        assert_equal(batches, expected)
