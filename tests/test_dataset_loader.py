"""Tracklets, and loaders that give the same batches in all configurations."""

import contextlib
import gc
import os
import random
import time
from types import SimpleNamespace

import numpy as np
import pictures
import pytest
import torch
from conftest import ROOT
from pictures import in_order
from PIL import Image
from torch.utils.data import DataLoader

import dataset_loader
from arguments import DataOptions
from batches import caching, decoding
from batches.feed import Feed
from batches.workers import collate
from dataset_loader import ImageDataset, TestLoader, TrainLoader, VideoDataset, read_image
from runtime.device import Run
from runtime.errors import UserError
from runtime.processes import Processes
from samplers import RandomIdentitySampler, RandomSampler
from transforms import TrainTransform

CPU = torch.device('cpu')


@pytest.fixture
def tracklets(mixed) -> list:
    """Frames of one size in the first, of several sizes in the others."""
    paths = [path for path, _, _ in mixed]
    return [(tuple(paths[::3]), 0, 0), (tuple(paths[:5]), 1, 1), (tuple(paths[5:7]), 1, 2)]


def share_of(rank: int = 0, world_size: int = 1, device: torch.device = CPU, local: int = 1) -> Run:
    """A run as process `rank` of `world_size`, of which `local` are on its host, sees it."""
    return Run(device, processes=Processes(rank, world_size, local_world_size=local))


def loader_of(items, batch_size=8, workers=0, identities=False, run=None, cache='none', dataset=None, seed=0):
    """A training loader, of the run of one process if no other is given."""
    sampler = (
        RandomIdentitySampler(items, 4, batch_size, seed) if identities else RandomSampler(items, batch_size, seed)
    )
    options = DataOptions(workers=workers, cache=cache)
    return TrainLoader(dataset or ImageDataset(items), sampler, options, run or share_of())


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


def test_tracklets_are_no_training_images():
    tracklets = [(('a.jpg', 'b.jpg'), pid, 0) for pid in (0, 0, 1, 1)]
    with pytest.raises(UserError, match=r'train on their frames, ImageDataset\(frames\)'):
        TrainLoader(VideoDataset(tracklets), RandomSampler(tracklets, 2), DataOptions(), share_of())


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
    assert_equal(epoch_of(helped, 0), epoch_of(alone, 0))
    workers = {process.pid for process in processes_of(helped)}
    assert len(workers) == 2
    assert_equal(epoch_of(helped, 1), epoch_of(alone, 1))
    assert_equal(epoch_of(helped, 1, start=2), epoch_of(alone, 1)[2:])
    assert workers == {process.pid for process in processes_of(helped)}
    state = torch.get_rng_state()
    epoch_of(alone, 1)
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


@pytest.mark.parametrize('cache', ['none', 'ram', 'device'])
@pytest.mark.parametrize('workers', [0, 2])
def test_an_epoch_can_be_begun_while_another_is_under_way(workers, cache, images):
    training = loader_of(images, batch_size=4, workers=workers, cache=cache)
    whole = epoch_of(training, 2)
    left = training.epoch(1)
    next(left)
    assert_equal(epoch_of(training, 2), whole)
    left.close()
    assert_equal(epoch_of(training, 2), whole)


def test_an_epoch_that_was_done_when_the_run_was_stopped_decodes_nothing(images, monkeypatch):
    monkeypatch.setattr(dataset_loader, 'read_image', None)
    for cache in ('none', 'ram'):
        training = loader_of(images, workers=2, cache=cache)
        assert epoch_of(training, 2, start=3) == [] and processes_of(training) == []


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
    with pytest.raises(ValueError, match='draws from 24 images, but there are 23'):
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
    line = '38% of the epoch was spent waiting for images; --cache ram would keep all of them in 0.00 GB\n'
    assert capsys.readouterr().out == line
    epoch_of(loader_of(images, cache='ram'))
    epoch_of(loader_of(images, run=share_of(1, 2)))
    assert 'waiting' not in capsys.readouterr().out
    monkeypatch.setattr(dataset_loader, 'free_memory', lambda device: 24 * 32 * 16 * 3 * 2)
    epoch_of(loader_of(images, run=share_of(0, 2, local=2)))  # both copies do not fit
    assert capsys.readouterr().out == ''
    epoch_of(loader_of(images, run=share_of(0, 2)))
    assert 'would keep' in capsys.readouterr().out


# Data sets of another kind


class Darker(ImageDataset):
    """A changed decoder."""

    def __getitem__(self, index):
        img, pid, camid = super().__getitem__(index)
        return img // 2, pid, camid


class Masked(ImageDataset):
    """A mask behind each item."""

    def __getitem__(self, index):
        img, pid, camid = super().__getitem__(index)
        return img, pid, camid, mask_of(index)


class Posed(ImageDataset):
    """A pose behind each item, and a word."""

    def __getitem__(self, index):
        img, pid, camid = super().__getitem__(index)
        pose = {'joints': np.full((17, 2), index + 0.5), 'visible': torch.arange(17) < index, 'score': index / 24}
        return img, pid, camid, pose, f'word {index}'


class Tracked(ImageDataset):
    """Another pid than the list has."""

    def __getitem__(self, index):
        img, pid, camid = super().__getitem__(index)
        return img, pid + 100, camid


def mask_of(index: int) -> torch.Tensor:
    return torch.arange(32).view(1, 8, 4) + 100 * index


def prepared(image: Image.Image) -> torch.Tensor:
    """As torchvision's ToTensor."""
    return torch.from_numpy(np.array(image.resize((12, 24)))).permute(2, 0, 1) / 255  # (3, 24, 12)


def turned(image: Image.Image) -> Image.Image:
    return image.transpose(Image.ROTATE_90)


WAYS = pytest.mark.parametrize(
    ('workers', 'cache'), [(workers, cache) for cache in ('none', 'ram', 'device') for workers in (0, 2)]
)


def pixels_of(items, indices) -> list[np.ndarray]:
    return [np.asarray(Image.open(items[index][0])) for index in indices.tolist()]


@WAYS
def test_a_changed_decoder(workers, cache, mixed):
    training = loader_of(mixed, workers=workers, cache=cache, dataset=Darker(mixed))
    for epoch in range(2):
        for (images, *_), indices in zip(epoch_of(training, epoch), training.sampler.draw(epoch)[0], strict=True):
            for image, expected in zip(images, pixels_of(mixed, indices), strict=True):
                assert image.dtype == torch.uint8 and (image.numpy() == expected // 2).all()


@WAYS
def test_a_pid_of_the_data_sets_own(workers, cache, images):
    training = loader_of(images, workers=workers, cache=cache, dataset=Tracked(images))
    for (_, pids, _), indices in zip(epoch_of(training), training.sampler.draw(0)[0], strict=True):
        assert pids.tolist() == [images[index][1] + 100 for index in indices]


@WAYS
def test_a_mask_arrives_behind_the_draws(workers, cache, mixed):
    training = loader_of(mixed, workers=workers, cache=cache, dataset=Masked(mixed), identities=True)
    plain = epoch_of(loader_of(mixed, identities=True), 1)
    batches = epoch_of(training, 1)
    assert_equal([batch[:3] for batch in batches], plain)
    for (*_, masks), indices in zip(batches, training.sampler.draw(1)[0], strict=True):
        assert torch.equal(masks, torch.stack([mask_of(index) for index in indices.tolist()]))
    assert_equal(epoch_of(training, 1, start=2), batches[2:])


@pytest.mark.parametrize('workers', [0, 2])
def test_processes_share_the_masks_of_a_batch(workers, mixed):
    whole = epoch_of(loader_of(mixed, dataset=Masked(mixed)), 1)
    for rank in range(2):
        training = loader_of(mixed, workers=workers, dataset=Masked(mixed), run=share_of(rank, 2))
        assert_equal(epoch_of(training, 1), [tuple(part[rank::2] for part in batch) for batch in whole])


@WAYS
def test_a_pose_and_a_word_arrive_behind_the_draws(workers, cache, images):
    training = loader_of(images, workers=workers, cache=cache, dataset=Posed(images))
    for epoch in range(2):
        for (*_, pose, words), indices in zip(epoch_of(training, epoch), training.sampler.draw(epoch)[0], strict=True):
            expected = {
                'joints': (indices + 0.5)[:, None, None].double().expand(-1, 17, 2),
                'visible': torch.arange(17) < indices[:, None],
                'score': indices.double() / 24,
            }
            assert_same(pose, expected)
            assert words == [f'word {index}' for index in indices]


@WAYS
def test_float_images_are_taken_as_prepared_and_announced_once(workers, cache, mixed, capsys):
    training = loader_of(mixed, workers=workers, cache=cache, dataset=ImageDataset(mixed, prepared))
    augment = TrainTransform(24, 12)
    for epoch in range(2):
        for batch, indices in zip(training.epoch(epoch), training.sampler.draw(epoch)[0], strict=True):
            images, _, draws = batch
            expected = torch.stack([prepared(read_image(mixed[index][0])) for index in indices.tolist()])
            assert torch.equal(augment(images, draws), expected)
    out = capsys.readouterr().out.splitlines()
    announced = 'The data set returns float images: they count as prepared and are not augmented'
    assert out[-1] == announced and len(out) == 1 + (cache != 'none')


@WAYS
def test_a_pil_image_is_augmented_like_a_decoded_one(workers, cache, mixed):
    training = loader_of(mixed, workers=workers, cache=cache, dataset=ImageDataset(mixed, turned))
    for epoch in range(2):
        for (images, *_), indices in zip(epoch_of(training, epoch), training.sampler.draw(epoch)[0], strict=True):
            for image, expected in zip(images, pixels_of(mixed, indices), strict=True):
                assert image.dtype == torch.uint8 and (image.numpy() == np.rot90(expected)).all()


@WAYS
def test_equal_pixels_give_equal_batches(workers, cache, mixed):
    """Whether they come as a decoder's tensor, as a PIL image, or as a tensor of another layout."""

    def laid_out(image):
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()

    plain = epoch_of(loader_of(mixed), 1)
    for transform in (lambda image: image, laid_out):
        dataset = ImageDataset(mixed, transform)
        assert_equal(epoch_of(loader_of(mixed, workers=workers, cache=cache, dataset=dataset), 1), plain)


@WAYS
def test_a_list_is_a_data_set(workers, cache, images):
    items = [ImageDataset(images)[index] for index in range(24)]
    assert_equal(epoch_of(loader_of(images, workers=workers, cache=cache, dataset=items)), epoch_of(loader_of(images)))


def test_what_a_network_draws_is_a_function_of_the_step(mixed):
    """For dropout and stochastic depth: a resumed run draws the same, and each process something else."""

    def drawn(epoch, start=0, **how):
        loader = loader_of(mixed, **how)
        return [torch.rand(2).tolist() for _ in loader.epoch(epoch, start)]

    whole = drawn(0)
    assert drawn(0, workers=2) == whole and drawn(0, 1) == whole[1:] and len(whole) > 2
    different = [*whole, *drawn(1)]
    assert len(set(map(tuple, different))) == len(different)


# What is drawn for an item


class Noisy(ImageDataset):
    """Draws from the generator that it is given."""

    def __getitem__(self, index, rng=None):
        img, pid, camid = super().__getitem__(index)
        noise = torch.from_numpy(rng.integers(0, 2, img.shape, np.uint8))
        return img ^ noise, pid, camid, rng.random()


class Global(ImageDataset):
    """Draws from the global generators, like the transforms of torchvision."""

    def __getitem__(self, index):
        img, pid, camid = super().__getitem__(index)
        noise = torch.randint(0, 2, img.shape, dtype=torch.uint8)
        return img ^ noise, pid, camid, random.random(), np.random.rand()  # noqa: NPY002


KINDS = pytest.mark.parametrize('kind', [Noisy, Global])
GLOBAL = (random.random, np.random.rand, lambda: torch.rand(()))


def states() -> tuple:
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # noqa: NPY002


@KINDS
def test_draws_are_a_function_of_seed_epoch_and_position(kind, images):
    dataset, before = kind(images), states()
    alone, helped = loader_of(images, 4, dataset=dataset), loader_of(images, 4, 2, dataset=dataset)
    epochs = [epoch_of(alone, epoch) for epoch in range(2)]
    drawn = torch.cat([batch[3] for epoch in epochs for batch in epoch])
    assert len(drawn.unique()) == len(drawn) == 48  # of each item another one, and others in the next epoch
    assert 0.3 < drawn.mean() < 0.7
    assert_equal(epoch_of(helped, 0), epochs[0])
    assert_equal(epoch_of(helped, 1), epochs[1])
    for training in (alone, helped):
        assert_equal(epoch_of(training, 1, start=2), epochs[1][2:])
        left = training.epoch(0)
        next(left)
        assert_equal(epoch_of(training, 1), epochs[1])
    assert states()[:2] == before[:2]  # those of random and numpy; torch draws anew in each step


@KINDS
def test_draws_depend_on_the_seed(kind, images):
    options = DataOptions(workers=0)
    one, two = (
        epoch_of(TrainLoader(kind(images), RandomSampler(images, 24, seed), options, share_of())) for seed in (1, 2)
    )
    assert not set(one[0][3].tolist()) & set(two[0][3].tolist())


@KINDS
@pytest.mark.parametrize('workers', [0, 2])
def test_draws_do_not_depend_on_the_number_of_processes(kind, workers, images):
    whole = epoch_of(loader_of(images, dataset=kind(images)), 1)
    for rank in range(2):
        training = loader_of(images, workers=workers, dataset=kind(images), run=share_of(rank, 2))
        assert_equal(epoch_of(training, 1), [tuple(part[rank::2] for part in batch) for batch in whole])


@pytest.mark.parametrize('cache', ['ram', 'device'])
def test_a_cache_of_what_is_drawn_anew_is_refused_in_one_line(cache, images):
    with pytest.raises(UserError, match=f'^--cache {cache} keeps .* takes rng\\): use --cache none$'):
        loader_of(images, cache=cache, dataset=Noisy(images))
    kept = states()
    for dataset in (
        Global(images),
        *(ImageDataset(images, lambda image, draw=draw: prepared(image) + draw()) for draw in GLOBAL),
    ):
        with pytest.raises(UserError, match=f'^--cache {cache} keeps .* global generator\\): use --cache none$'):
            epoch_of(loader_of(images, cache=cache, dataset=dataset))
    assert states() == kept


@KINDS
def test_a_cache_is_not_recommended_for_what_is_drawn_anew(kind, images, monkeypatch, capsys):
    clock = iter(range(10**6))
    monkeypatch.setattr(time, 'perf_counter', lambda: next(clock))
    epoch_of(loader_of(images, dataset=kind(images)))
    assert capsys.readouterr().out == ''


@pytest.mark.parametrize('workers', [0, 2])
def test_a_test_draws_the_same_each_time(workers, images):
    kept = states()
    loaders = [TestLoader(Noisy(images), batch_size, workers, share_of()) for batch_size in (5, 8)]
    one, two, again = ([image for groups, *_ in each for image in in_order(groups)] for each in [*loaders, loaders[0]])
    assert_same(one, two)
    assert_same(one, again)
    assert states() == kept


# A script with a data set of its own

OWN = """
class Own(ImageDataset):
    def __getitem__(self, index{declared}):
        img, pid, camid = super().__getitem__(index)
        mask = torch.ones(1, 32, 16)
        mask[:, index % 32] = 0
        return img // 2, pid, camid, mask, {{'weight': index % 3, 'drawn': {drawn}}}


parser = arguments"""
CHANGES = {
    'from torch.optim import Adam': 'import torch\nfrom torch.optim import Adam',
    'parser = arguments': OWN.format(declared='', drawn=0.5),
    'TrainLoader(ImageDataset(dataset.train)': 'TrainLoader(Own(dataset.train)',
    'for imgs, pids, draws in': 'for imgs, pids, draws, masks, pose in',
    'replica(augment(imgs, draws))': 'replica(augment(imgs, draws) * masks)',
    'loss = criterion_xent(logits.float(), pids)': (
        "loss = criterion_xent(logits.float(), pids) * (1 + pose['weight'] * pose['drawn']).float().mean()"
    ),
}
DRAWING = CHANGES | {'parser = arguments': OWN.format(declared=', rng=None', drawn='rng.random()')}


@pytest.fixture
def copied(tmp_path, monkeypatch, script):
    """Run a changed copy of a script in a folder of its own; its weights after two epochs."""
    torch.set_num_threads(1)  # so small a network is faster

    def train(changes: dict[str, str], *options) -> dict[str, torch.Tensor]:
        text = (ROOT / 'train_img_model_xent.py').read_text()
        for old, new in changes.items():
            assert text.count(old) == 1, old
            text = text.replace(old, new)
        number = len(list(tmp_path.iterdir()))
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / f'train_own_{number}.py').write_text(text)
        monkeypatch.syspath_prepend(folder)
        assert script(f'train_own_{number}', '--max-epoch', 2, '--save-dir', folder, *options) == 0
        return torch.load(folder / 'checkpoint_ep2.pth.tar', weights_only=True)['state_dict']

    return train


def test_a_copied_script_with_a_data_set_of_its_own(copied):
    """It trains to the same weights for all ways of loading its data; with `rng` they differ."""
    plain = copied({})
    cached = [
        copied(CHANGES, '--workers', workers, '--cache', cache)
        for cache in ('none', 'ram', 'device') for workers in (0, 2)
    ]  # fmt: skip
    drawn = [copied(DRAWING, '--workers', workers) for workers in (0, 2)]
    for same in (cached, drawn):
        for weights in same[1:]:
            assert_same(weights, same[0])
    assert not torch.equal(cached[0]['classifier.weight'], plain['classifier.weight'])
    assert not torch.equal(cached[0]['classifier.weight'], drawn[0]['classifier.weight'])


# Test batches


@pytest.mark.parametrize('workers', [0, 2])
@pytest.mark.parametrize('batch_size', [1, 5, 24, 100])
def test_every_image_once_and_in_order(batch_size, workers, mixed):
    loader = TestLoader(ImageDataset(mixed), batch_size, workers, share_of())
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
    batches = list(TestLoader(dataset, 2, 0, share_of()))
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
        loader = TestLoader(ImageDataset(mixed), 7, 0, share_of(rank, world_size))
        batches = list(loader)
        assert len(batches) == len(loader)
        shares += [index for _, indices, _ in batches for index in indices.tolist()]
    assert sorted(shares) == list(range(24))


def test_no_process_is_idle_in_a_test_with_small_batches(mixed):
    loaders = [TestLoader(ImageDataset(mixed), 2, 0, share_of(rank, 8)) for rank in range(8)]
    assert [sum(len(indices) for _, indices, _ in loader) for loader in loaders] == [3] * 8


def test_an_empty_test_has_no_batches():
    assert list(TestLoader(ImageDataset([]), 4, 0, share_of())) == []


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
    monkeypatch.setattr(decoding, 'decode', None)  # nothing is read any more
    assert_equal(epoch_of(training, 1), expected)
    assert_equal(epoch_of(training, 1, start=1), expected[1:])


def test_a_cache_that_does_not_fit_is_refused(images, monkeypatch):
    monkeypatch.setattr(caching, 'free_memory', lambda device: 24 * 32 * 16 * 3)
    with pytest.raises(UserError, match=r'--cache ram: 24 training images take .* too much: use --cache none'):
        epoch_of(loader_of(images, cache='ram'))
    monkeypatch.setattr(caching, 'free_memory', lambda device: 24 * 32 * 16 * 3 * 2)
    epoch_of(loader_of(images, cache='ram'))
    epoch_of(loader_of(images, cache='ram', run=share_of(0, 2)))
    with pytest.raises(UserError, match='too much'):  # each process of the host holds its own
        epoch_of(loader_of(images, cache='ram', run=share_of(0, 4, local=2)))


def test_a_cache_names_a_bad_image(images, tmp_path):
    with pytest.raises(UserError, match=r'gone\.jpg'):
        epoch_of(loader_of([*images[:-1], (str(tmp_path / 'gone.jpg'), 5, 0)], cache='ram'))


# To the device


def test_a_run_on_a_cpu_does_not_start_cuda(images, monkeypatch):
    """Which would take memory of a GPU that --use-cpu leaves to others, and be lost in the workers."""
    monkeypatch.setattr(torch.cuda, 'stream', None)
    monkeypatch.setattr(torch.cuda, 'current_stream', None)
    assert len(epoch_of(loader_of(images, workers=2))) == 3


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
    blocks = [collate([(read_image(path), pid, camid, {'mask': mask_of(pid)})]) for path, pid, camid in mixed[:6:3]]
    batches = Feed(blocks, CPU, stream)
    for path, pid, _ in mixed[:6:3]:
        groups, pids, counts, more = next(batches)
        assert (in_order(groups)[0].numpy() == np.asarray(Image.open(path))).all()
        assert pids.tolist() == [pid] and counts == [1]
        assert_same(more, [{'mask': mask_of(pid)[None]}])
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
