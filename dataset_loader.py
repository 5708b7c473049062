"""ImageDataset, VideoDataset and the loaders made of them.

Workers only call the data set's `__getitem__`: images arrive as uint8 at their own sizes. `samplers` selects the images
of a batch; `transforms` processes their pixels on the device.
"""

import contextlib
import inspect
import os
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from arguments import DataOptions
from batches.caching import USABLE, Cache, free_memory, gigabytes
from batches.decoding import read_image
from batches.feed import Feed
from batches.workers import Block, Items, SizeGroup, Task, Workers, collate
from runtime.device import Run
from runtime.errors import UserError
from samplers import ITEMS, STEPS, EpochSampler, generator

SAMPLES = ('evenly', 'random', 'all')


def read_pixels(path: str | os.PathLike) -> Tensor:
    """The result of `read_image` as uint8 (3, H, W)."""
    return torch.from_numpy(np.array(read_image(path)).transpose(2, 0, 1))  # a view; in memory it remains (H, W, 3)


class ImageDataset(Dataset):
    """Images as items (img, pid, camid): `img` is the result of `transform` on the PIL image.

    Without a transform, `img` is uint8 (3, H, W) at the image's own size, and is augmented on the device.

    Args:
        dataset: list of (path, pid, camid).
    """

    def __init__(self, dataset: Sequence, transform: Callable[[Image.Image], Any] | None = None):
        self.dataset, self.transform = dataset, transform

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Any, int, int]:
        path, pid, camid = self.dataset[index]
        return (self.transform(read_image(path)) if self.transform else read_pixels(path)), pid, camid

    def files(self) -> Iterator[str]:
        """The paths of all files to be read."""
        return (path for path, _, _ in self.dataset)


class VideoDataset(Dataset):
    """Tracklets as items (imgs, pid, camid): `imgs` (S, C, H, W) are the stacked results of `transform` on each frame.

    Without a transform, `imgs` is uint8 (S, 3, H, W), or a list of frames (3, H, W) if they differ in size.

    Args:
        dataset: list of (tuple of paths, pid, camid).
        seq_len: L, number of frames sampled from the n frames of a tracklet.
        sample: 'evenly' takes frames k * (n // L) for k < L, or if n < L all of them, repeating the last one;
            'random' draws L frames, in order, with replacement if n < L, as a function of (seed, epoch, index), where
            the key of an item is its index (epoch 0) or (index, epoch); 'all' takes all n.

    Raises:
        UserError: `sample` is unknown, or `seq_len` is less than 1.
    """

    def __init__(
        self,
        dataset: Sequence,
        seq_len: int = 15,
        sample: str = 'evenly',
        transform: Callable[[Image.Image], Tensor] | None = None,
        seed: int = 0,
    ):
        if sample not in SAMPLES:
            raise UserError(f'frames cannot be sampled {sample!r}: choose one of {", ".join(SAMPLES)}')
        if seq_len < 1:
            raise UserError(f'--seq-len is {seq_len}: at least 1 frame per tracklet is needed')
        self.dataset, self.seq_len, self.sample, self.transform, self.seed = dataset, seq_len, sample, transform, seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[Any, int, int]:
        index, epoch = key if isinstance(key, tuple) else (key, 0)
        paths, pid, camid = self.dataset[index]
        chosen = [paths[k] for k in self._sampled(len(paths), index, epoch)]
        imgs = [self.transform(read_image(path)) if self.transform else read_pixels(path) for path in chosen]
        if self.transform is None and len({img.shape for img in imgs}) > 1:
            return imgs, pid, camid
        return torch.stack(imgs), pid, camid  # (S, C, H, W)

    def files(self) -> Iterator[str]:
        """The paths of all files to be read in epoch 0."""
        for index, (paths, _, _) in enumerate(self.dataset):
            yield from (paths[k] for k in self._sampled(len(paths), index, 0))

    def _sampled(self, n: int, index: int, epoch: int) -> Iterable[int]:
        length = self.seq_len
        if self.sample == 'all':
            return range(n)
        if self.sample == 'random':
            key = int(self.seed < 0), abs(self.seed), epoch, index % len(self)  # -1 is the last item, as in a list
            chosen: list[int] = np.sort(np.random.default_rng(key).choice(n, length, replace=n < length)).tolist()
            return chosen
        return (min(k * max(n // length, 1), n - 1) for k in range(length))


class TrainLoader:
    """The batches of an epoch; the next batch is copied to the GPU while the current one is processed.

    Batch b contains the items that the sampler drew for positions b * B to b * B + B - 1, for any number of workers.
    Process r of W takes positions r, r + W, ... of a batch, so that it sees as many of the identities as possible.

    `dataset[index]` returns (image, pid, camid). Any further values follow the draws, in the order of the batch,
    collated by `torch.utils.data.default_collate`. The image is uint8, a tensor (3, H, W) or a PIL image, of any size.
    A float tensor (3, height, width) counts as prepared and is not augmented.

    Each item has a seed, a function of (seed, epoch, position in the epoch), so its random numbers do not depend on
    workers, processes or interruptions. A data set that draws random numbers declares
    `__getitem__(self, index, rng=None)` and receives a numpy Generator with that seed. If it does not, but has a
    transform or its own `__getitem__`, the global generators of random, numpy and torch are seeded for each item.

    With --cache each item is read once, before the first epoch, and its pixels are kept in RAM or on the device.

    Raises:
        UserError: the data set is a VideoDataset, --cache is used with a data set that takes `rng`, or --balance with a
            sampler without groups; later, if an image cannot be read or the cache does not fit into memory.
    """

    def __init__(self, dataset: Items, sampler: EpochSampler, options: DataOptions, run: Run):
        if len(sampler.data_source) != len(dataset):
            raise ValueError(f'the sampler draws from {len(sampler.data_source)} images, but there are {len(dataset)}')
        if isinstance(dataset, VideoDataset):
            raise UserError('tracklets cannot be augmented as a whole: train on their frames, ImageDataset(frames)')
        if options.balance != 'none' and sampler.groups is None:
            raise UserError(
                f"--balance {options.balance}: this script's sampler balances nothing; give it "
                'dataset.groups(args.balance), or leave the option out'
            )
        self.dataset, self.sampler, self.kind, self.run = dataset, sampler, options.cache, run
        if self.kind != 'none' and takes_rng(dataset):
            raise self._not_cached('its __getitem__ takes rng')
        self.workers = workers_for(dataset, options.workers, run.device)
        self.cache: Cache | None = None
        self.advised = self.announced = False

    def __len__(self) -> int:
        return self.sampler.num_batches

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple]:
        """Batches start, start + 1, ..., on the device: images, pids int64 (B,), draws float64 (B, DRAWS), more ..."""
        if start == len(self):  # a resumed run has nothing to decode before its test
            return
        indices, draws = self.sampler.draw(epoch)  # (batches, B), (batches, B, DRAWS)
        seeds = generator(ITEMS, self.sampler.seed, epoch).integers(2**63, size=tuple(indices.shape))  # (batches, B)
        steps = generator(STEPS, self.sampler.seed, epoch).integers(2**62, size=len(self))  # (batches,)
        mine = slice(start, None), slice(self.run.rank, None, self.run.world_size)  # batches, positions in each
        tasks = map(Task, indices[mine].tolist(), seeds[mine].tolist())
        draws = draws[mine].contiguous().to(self.run.device)  # one copy per epoch
        feed = Feed(self._source().blocks(tasks), self.run.device, self.run.copying)
        began = time.perf_counter()
        for step, (images, pids, _, more), batch_draws in zip(steps[start:].tolist(), feed, draws, strict=True):
            if images[0][1].is_floating_point() and not self.announced:
                self.announced = True
                print('The data set returns float images: they count as prepared and are not augmented')
            seed_network(step + self.run.rank, self.run.device)
            yield images, pids, batch_draws, *more
        if start == 0:
            self._advise(feed.waited, feed.waited / (time.perf_counter() - began))

    def _source(self) -> Workers | Cache:
        if self.kind == 'none':
            return self.workers
        if self.cache is None:
            size, is_random = estimate(self.dataset)
            if is_random:
                raise self._not_cached("it draws from Python's, numpy's or torch's global generator")
            self.cache = Cache(len(self.dataset), size, self.kind, self.workers, self.run)
        return self.cache

    def _not_cached(self, why: str) -> UserError:
        return UserError(
            f'--cache {self.kind} keeps what the data set returns once, but this one draws in each epoch ({why}): use '
            '--cache none'
        )

    def paths(self, epoch: int, batch: int) -> list[str]:
        """The files of a batch, over all processes."""
        indices, _ = self.sampler.draw(epoch)  # (batches, B)
        return [str(self.sampler.data_source[index][0]) for index in indices[batch].tolist()]

    def _advise(self, waited: float, share: float) -> None:
        """Recommend a cache, once, if the run waited for images and their pixels would fit into memory."""
        helps = self.kind == 'none' and not takes_rng(self.dataset) and waited > 1 and share > 0.05
        if not helps or self.advised or self.run.rank:
            return
        self.advised = True
        size, is_random = estimate(self.dataset)
        size *= self.run.processes.local_world_size  # each process would have a copy
        if size < USABLE * free_memory(torch.device('cpu')) and not is_random:
            waiting = f'{share:.0%} of the epoch was spent waiting for images'
            print(f'{waiting}; --cache ram would keep all of them in {gigabytes(size)}')


class TestLoader:
    """Each item of a data set once, in order: batches (images, indices int64 (b,), counts int64 (b,)).

    `images` are the images of the batch's items in order; `counts` is the number of images of each item: 1, or the
    number of frames of a tracklet. Process r of W takes items r, r + W, ... of each batch, which has at
    least W items; batches without items for it are skipped. If `groups` (N,), the group of each item, is given, it
    takes all items of the groups r, r + W, ...

    Raises:
        UserError: an image cannot be read.
    """

    __test__ = False  # not a test case, despite its name

    def __init__(self, dataset: Items, batch_size: int, workers: int, run: Run, groups: np.ndarray | None = None):
        items: Sequence[int] = range(len(dataset))
        batch_size = max(batch_size, run.world_size)
        shares = (items[at : at + batch_size][run.rank :: run.world_size] for at in items[::batch_size])
        if groups is not None:
            in_process: list[int] = np.flatnonzero(groups % run.world_size == run.rank).tolist()
            step = batch_size // run.world_size
            shares = (in_process[at : at + step] for at in range(0, len(in_process), step))
        self.items = [list(share) for share in shares if share]
        self.dataset, self.workers, self.run = dataset, workers, run

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[tuple[list[SizeGroup], Tensor, Tensor]]:
        workers = workers_for(self.dataset, self.workers, self.run.device)  # they end with the iteration
        feed = Feed(workers.blocks(map(Task, self.items, self.items)), self.run.device, self.run.copying)
        for (images, _, counts, _), items in zip(feed, self.items, strict=True):
            yield images, torch.tensor(items), torch.tensor(counts)


def takes_rng(dataset: Items) -> bool:
    """Whether the data set's `__getitem__` takes `rng`, a random generator for each item."""
    try:
        return 'rng' in inspect.signature(type(dataset).__getitem__).parameters
    except ValueError:  # of a built-in type, such as a list
        return False


def workers_for(dataset: Items, number: int, device: torch.device) -> Workers:
    """Processes that call `dataset.__getitem__` for the items of a task."""
    wants_rng, pin = takes_rng(dataset), device.type == 'cuda'
    draws_nothing = type(dataset) in (ImageDataset, VideoDataset) and getattr(dataset, 'transform', None) is None

    def item(index: int, seed: int) -> tuple:
        if draws_nothing:
            return dataset[index]
        seed_generators(seed)
        if not wants_rng:
            return dataset[index]
        rng = np.random.default_rng(seed)
        return type(dataset).__getitem__(dataset, index, rng=rng)  # type: ignore[call-arg]  # see takes_rng

    def work(task: Task) -> Block:
        with contextlib.nullcontext() if draws_nothing else generators_kept():
            items = [item(index, seed) for index, seed in zip(task.items, task.seeds, strict=True)]
            return collate(items, pin=pin and number == 0)  # a worker's block is pinned by the receiver

    return Workers(number, work, pin)


def seed_generators(seed: int) -> None:
    """Seed the global random generators."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    torch.default_generator.manual_seed(seed)


def seed_network(number: int, device: torch.device) -> None:
    """Seed what the network draws from in a step, as for dropout or stochastic depth.

    `torch.manual_seed` is slow as long as a GPU that is there has not been used.
    """
    torch.default_generator.manual_seed(number)
    if device.type == 'cuda':
        torch.cuda.manual_seed(number)


@contextlib.contextmanager
def generators_kept() -> Iterator[None]:
    """Restore the global random generators on exit: with --workers 0 items are made in the run, which uses them too."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        torch.set_rng_state(states[2])


def estimate(dataset: Items) -> tuple[int, bool]:
    """Bytes of all images, by at most 64 of them, and whether reading them draws from the global random generators."""

    def drawn() -> tuple[float, ...]:
        return random.random(), np.random.random(), torch.rand(()).item()  # noqa: NPY002

    indices = range(0, len(dataset), max(-(-len(dataset) // 64), 1))
    with generators_kept():
        seed_generators(0)
        first = drawn()
        seed_generators(0)
        mean = np.mean([collate([dataset[index]]).pixels.nbytes for index in indices])
        return int(mean * len(dataset)), drawn() != first
