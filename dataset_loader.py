"""ImageDataset, VideoDataset and the loaders made of them.

Workers decode and do nothing more: they are sent paths and send back uint8 pixels at the images' own sizes, one run of
memory a batch. `samplers` decides what a batch is made of, `transforms` what becomes of its pixels, on the device.
"""

import atexit
import multiprocessing.queues
import os
import signal
import stat
import threading
import time
import traceback
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing import connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.dataloader import _BaseDataLoaderIter

from runtime.errors import ProcessLost, UserError

FORMATS = ('JPEG', 'PNG', 'BMP', 'GIF', 'PPM', 'TIFF', 'WEBP')  # none that would run another program
TRIES, PAUSE = 3, 0.1  # of reading an image; seconds in between: a network file system may come back
SAMPLES = ('evenly', 'random', 'all')
CACHES = ('none', 'ram', 'device')

Images = list[tuple[Tensor, Tensor]]  # groups of equal size: positions in the batch (n,), uint8 pixels (n, H, W, 3)
Block = tuple[list[tuple[np.ndarray, tuple[int, ...]]], Tensor]  # positions and shape of each group, all their bytes

# Decoders sleep most of the time: --workers is meant per process, not per core.
warnings.filterwarnings('ignore', message='This DataLoader will create')


def read_image(path: str | os.PathLike) -> Image.Image:
    """An image file as RGB with 8 bits a channel, at its own size; it is tried three times.

    Grey, palette and CMYK images are converted, transparency is dropped, of 16 bits a channel the upper 8 are kept, of
    an animation the first frame. A rotation in EXIF is not applied: the boxes were drawn on the pixels as stored.

    Raises:
        UserError: the file is missing, none of FORMATS, cut short, of numbers that are no pixels of 8 or 16 bits, or
            claims more pixels than Pillow takes for harmless (`PIL.Image.MAX_IMAGE_PIXELS`). It names the path.
    """
    for attempt in range(TRIES):
        if attempt:
            time.sleep(PAUSE)
        try:
            return _decode(path)
        except Exception as error:  # Pillow's readers raise OSError, SyntaxError, ValueError, struct.error and more
            failure = error
    if isinstance(failure, UnidentifiedImageError):
        reason = f'it is no {", ".join(FORMATS[:-1])} or {FORMATS[-1]} file'
    else:
        reason = getattr(failure, 'strerror', None) or str(failure) or type(failure).__name__
    raise UserError(' '.join(f'cannot read the image {os.fspath(path)}: {reason}'.splitlines())) from failure


def _decode(path: str | os.PathLike) -> Image.Image:
    if stat.S_ISFIFO(os.stat(path).st_mode):
        raise OSError('it is a pipe')  # opening it would wait for ever
    with Image.open(path, formats=FORMATS) as image:
        if image.width * image.height > Image.MAX_IMAGE_PIXELS:
            raise ValueError(f'it claims {image.width} x {image.height} pixels, as a decompression bomb does')
        if image.mode == 'RGB':
            image.load()
            return image
        if image.mode == 'F':
            raise ValueError('its pixels are floating-point numbers')
        if not image.mode.startswith('I'):
            return image.convert('RGB')
        grey = np.asarray(image)  # I;16 and its kin, or 32 bits that hold 16; Pillow would clip them at 255
        if grey.min() < 0 or grey.max() >= 1 << 16:
            raise ValueError('its pixels have more than 16 bits')
        return Image.fromarray((grey >> 8).astype(np.uint8)).convert('RGB')


def read_pixels(path: str | os.PathLike) -> Tensor:
    """`read_image` as uint8 (3, H, W)."""
    return torch.from_numpy(np.array(read_image(path))).permute(2, 0, 1)


class ImageDataset(Dataset):
    """Images as items (img, pid, camid): `img` is what `transform` makes of the PIL image.

    Without a transform it is uint8 (3, H, W) at the image's own size; the loaders of this room need that.

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

    def paths(self, index: int) -> tuple[str, ...]:
        """The files of an item."""
        return (self.dataset[index][0],)


class VideoDataset(Dataset):
    """Tracklets as items (imgs, pid, camid): `imgs` (S, C, H, W) is what `transform` makes of each frame, stacked.

    Without a transform it is uint8 (S, 3, H, W), or a list of frames (3, H, W) when they differ in size.

    Args:
        dataset: list of (tuple of paths, pid, camid).
        seq_len: L, frames to take of a tracklet's n.
        sample: 'evenly' takes frames k * (n // L) for k < L, and with n < L all of them and the last one again;
            'random' takes L in order, some twice when n < L, drawn from (seed, epoch, index), where the key of an item
            is its index (epoch 0) or (index, epoch); 'all' takes all n.

    Raises:
        UserError: another `sample`, or `seq_len` is less than 1.
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
            raise UserError(f'--seq-len is {seq_len}: take 1 frame of a tracklet or more')
        self.dataset, self.seq_len, self.sample, self.transform, self.seed = dataset, seq_len, sample, transform, seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[Any, int, int]:
        index, epoch = key if isinstance(key, tuple) else (key, 0)
        _, pid, camid = self.dataset[index]
        paths = self.paths(index, epoch)
        imgs = [self.transform(read_image(path)) if self.transform else read_pixels(path) for path in paths]
        if self.transform is None and len({img.shape for img in imgs}) > 1:
            return imgs, pid, camid
        return torch.stack(imgs), pid, camid  # (S, C, H, W)

    def paths(self, index: int, epoch: int = 0) -> tuple[str, ...]:
        """The files of an item: its sampled frames."""
        frames = self.dataset[index][0]
        return tuple(frames[k] for k in self._sampled(len(frames), index, epoch))

    def _sampled(self, n: int, index: int, epoch: int) -> Iterable[int]:
        length = self.seq_len
        if self.sample == 'all':
            return range(n)
        if self.sample == 'random':
            key = int(self.seed < 0), abs(self.seed), epoch, index % len(self)  # -1 is the last one, as in a list
            return np.sort(np.random.default_rng(key).choice(n, length, replace=n < length)).tolist()
        return (min(k * max(n // length, 1), n - 1) for k in range(length))


class TrainLoader:
    """The batches of an epoch, decoded by workers; a GPU is sent the next one while it computes the one before.

    Batch b is what the sampler drew for positions b * B to b * B + B - 1, whatever the number of workers. Process r of
    W takes positions r, r + W, ... of a batch: of P x K identities each process sees as many different ones as can be.

    With `cache` the images are decoded once, before the first epoch, and kept as uint8 in RAM or on the device. The run
    then gathers its batches itself, which costs it less than to take them from a worker.

    Args:
        args_data: `workers`, processes that decode (0: the run itself), and `cache`, one of CACHES (absent: 'none').

    Raises:
        UserError: the data set has a transform; later, an image cannot be read or the cache does not fit.
    """

    def __init__(self, dataset: ImageDataset, sampler: Any, args_data: Any, run: Any):
        if len(sampler.data_source) != len(dataset):
            raise ValueError(f'the sampler draws from {len(sampler.data_source)} images, there are {len(dataset)}')
        self.dataset, self.sampler, self.run = dataset, sampler, run
        self.cache = getattr(args_data, 'cache', 'none')
        self.pids = torch.tensor([pid for _, pid, _ in dataset.dataset])  # (N,)
        self.source = _Decoder(dataset, args_data.workers, run.device, persistent=self.cache == 'none')
        self.advised = False

    def __len__(self) -> int:
        return self.sampler.num_batches

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Images, Tensor, Tensor]]:
        """Batches start, start + 1, ... of an epoch: (images, pids int64 (B,), draws float64 (B, 4)), on the device."""
        if self.cache != 'none' and isinstance(self.source, _Decoder):
            self.source = _Cache(self.dataset, self.source, self.cache, self.run)
        mine = slice(self.run.rank, None, self.run.world_size)
        indices, draws = (drawn[start:, mine] for drawn in self.sampler.draw(epoch))  # (batches, B), (batches, B, 4)
        pids = self.pids[indices].to(self.run.device)  # (batches, B); one copy an epoch
        draws = draws.contiguous().to(self.run.device)  # (batches, B, 4)
        batches = self.source.batches(indices.tolist())
        began = asked = time.perf_counter()
        waited = 0.0
        for batch, (batch_pids, batch_draws) in enumerate(zip(pids, draws, strict=True)):
            images = next(batches)
            waited += time.perf_counter() - asked if batch else 0.0  # the first one waits for the workers to start
            yield images, batch_pids, batch_draws
            asked = time.perf_counter()
        if self.cache == 'none' and not self.advised and start == 0 and self.run.rank == 0:
            self._advise(waited, waited / (time.perf_counter() - began))
            self.advised = True

    def paths(self, epoch: int, batch: int) -> list[str]:
        """The files of a batch, of all processes."""
        indices, _ = self.sampler.draw(epoch)  # (batches, B)
        return [path for index in indices[batch].tolist() for path in self.dataset.paths(index)]

    def _advise(self, seconds: float, share: float) -> None:
        """Says so when a cache would pay, because the run waited for images, and would fit."""
        if seconds > 1 and share > 0.05 and (size := _size(self.dataset)) < ROOM * _free_memory(torch.device('cpu')):
            print(f'{share:.0%} of the epoch was spent waiting for images; --cache ram would hold all in {_gb(size)}')


class TestLoader:
    """The items of a data set, once each and in order: batches (images, indices int64 (b,), counts int64 (b,)).

    `images` are those of the batch's items one after the other, `counts` how many belong to each: 1, or the frames of a
    tracklet. Process r of W takes items r, r + W, ... of each batch; a batch that leaves it none is skipped.

    Raises:
        UserError: the data set has a transform; later, an image cannot be read.
    """

    __test__ = False  # no test case, whatever pytest thinks of the name

    def __init__(self, dataset: ImageDataset | VideoDataset, batch_size: int, workers: int, run: Any):
        items = range(len(dataset))
        shares = (items[at : at + batch_size][run.rank :: run.world_size] for at in items[::batch_size])
        self.items = [list(share) for share in shares if share]
        self.dataset, self.source = dataset, _Decoder(dataset, workers, run.device, persistent=False)

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[tuple[Images, Tensor, Tensor]]:
        for items, images in zip(self.items, self.source.batches(self.items), strict=True):
            yield images, torch.tensor(items), torch.tensor([len(self.dataset.paths(item)) for item in items])


def train_loader(dataset: ImageDataset, sampler: Any, args_data: Any, run: Any) -> TrainLoader:
    """The training batches of `dataset`, as `sampler` composes them."""
    return TrainLoader(dataset, sampler, args_data, run)


def test_loader(dataset: ImageDataset | VideoDataset, batch_size: int, workers: int, run: Any) -> TestLoader:
    """The items of `dataset` in order, `batch_size` at a time over all processes, each with `workers` decoders."""
    return TestLoader(dataset, batch_size, workers, run)


test_loader.__test__ = False


# Decoding in workers

MORE_ROOM = 'give the run more shared memory (/dev/shm; --shm-size of a container), or use fewer --workers, or 0'


class _Decoder:
    """Batches of items in, their images on the device out; `persistent` workers stay from one epoch to the next."""

    def __init__(self, dataset: ImageDataset | VideoDataset, workers: int, device: torch.device, persistent: bool):
        if dataset.transform is not None:
            raise UserError(
                'train_loader and test_loader only decode: give the data set no transform and change the pixels on the '
                "device, as transforms.TrainTransform does, or use torch's DataLoader"
            )
        self.tasks, self.device = _Tasks(dataset), device
        self.workers: list[Any] = []
        self.end: weakref.finalize | None = None  # of the workers
        self.loader = DataLoader(
            _Files(),
            batch_size=None,
            sampler=self.tasks,
            num_workers=workers,
            collate_fn=_unchanged,
            pin_memory=device.type == 'cuda',
            persistent_workers=persistent and workers > 0,
            worker_init_fn=_start_worker,
            generator=torch.Generator(),  # an epoch would draw a number from the global one
        )

    def batches(self, items: Sequence[Sequence[int]]) -> Iterator[Images]:
        self.tasks.items = items
        try:
            blocks = self._start()
            yield from _ahead(blocks, self.device) if self.device.type == 'cuda' else map(_unpack, blocks)
        except UserError:
            raise
        except Exception as problem:
            # The sockets of a worker, whose end may be the problem, close a little before it has ended.
            ending = connection.wait([worker.sentinel for worker in self.workers], timeout=1)
            for worker in self.workers:
                worker.join(1 if worker.sentinel in ending else 0)
                if worker.exitcode:
                    raise ProcessLost(f'a process that decodes images {_end(worker.exitcode)}') from problem
            raise

    def _start(self) -> Any:
        """The blocks of an epoch, as workers send them."""
        try:
            blocks = iter(self.loader)
        except OSError as problem:  # no more processes, or no shared memory for what they talk through
            for frame, _ in traceback.walk_tb(problem.__traceback__):
                if isinstance(half := frame.f_locals.get('self'), _BaseDataLoaderIter):
                    half._shutdown = True  # it cannot do so itself
                    for worker in getattr(half, '_workers', ()):
                        worker.kill()
            raise UserError(
                f'{self.loader.num_workers} processes that decode images cannot be started ({problem.strerror}): '
                f'{MORE_ROOM}'
            ) from problem
        if self.loader.num_workers and not (self.end and self.loader.persistent_workers):
            if self.end:
                self.end()
            self.workers = blocks._workers
            self.end = weakref.finalize(self, _end_workers, blocks)
            # Called before what torch has just registered, which would wait for workers to heed a SIGTERM.
            atexit.register(self.end)
            if threading.current_thread() is threading.main_thread():
                # Torch would raise in the middle of a step when a worker ends; it looks after them every 5 s as well.
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        return blocks


class _Tasks:
    """What workers are sent: the paths of each batch. They need not hold the data set, nor know of epochs."""

    def __init__(self, dataset: ImageDataset | VideoDataset):
        self.dataset = dataset
        self.items: Sequence[Sequence[int]] = ()

    def __iter__(self) -> Iterator[list[str]]:
        return ([path for item in items for path in self.dataset.paths(item)] for items in self.items)


class _Files(Dataset):
    """What workers do with them."""

    def __getitem__(self, paths: list[str]) -> Block | str:
        try:
            return _pack([np.asarray(read_image(path)) for path in paths])
        except UserError as error:  # is raised where it arrives: DataLoader would wrap it in the worker's traceback
            return str(error)


def _unchanged(block: Block | str) -> Block | str:
    return block


def _start_worker(_: int) -> None:
    """A signal to the whole process group must not end a worker before the run has saved; the run ends it then."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    multiprocessing.queues.Queue._on_queue_feeder_error = _tell


def _tell(results: Any, problem: Exception, sent: tuple[int, Block]) -> None:
    """What cannot be sent to the run is told to it; else it would wait for ever."""
    reason = ' '.join(str(problem).split())
    results.put((sent[0], f'a process that decodes images cannot hand them over ({reason}): {MORE_ROOM}'))


def _end(exitcode: int) -> str:
    if exitcode == -signal.SIGKILL:
        return 'was ended by SIGKILL, as happens when memory runs out: use fewer --workers'
    if exitcode == -signal.SIGBUS:
        return f'was ended by SIGBUS, as happens when shared memory runs out: {MORE_ROOM}'
    names = {each.value: each.name for each in signal.Signals}
    end = f'ended with status {exitcode}' if exitcode > 0 else f'was ended by {names.get(-exitcode, -exitcode)}'
    return f'{end}: with --workers 0 the run decodes them itself'


def _end_workers(blocks: Any) -> None:
    """In an orderly way, as long as the iterator is whole: once it is being collected, only SIGTERM would be left."""
    blocks._shutdown_workers()
    for worker in blocks._workers:
        worker.kill()  # one that hangs in a read


def _by_size(images: Sequence[np.ndarray | Tensor]) -> dict[tuple[int, ...], list[int]]:
    """The positions of the images (H, W, 3) of each size."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for position, image in enumerate(images):
        groups.setdefault(tuple(image.shape), []).append(position)
    return groups


def _pack(images: Sequence[np.ndarray], pin: bool = False) -> Block:
    """Images (H, W, 3) as one run of bytes, size by size: one tensor crosses to the run, and to the device."""
    groups = _by_size(images)
    pixels = torch.empty(sum(image.size for image in images), dtype=torch.uint8, pin_memory=pin)
    np.concatenate([images[i].reshape(-1) for group in groups.values() for i in group], out=pixels.numpy())
    return [(np.array(group), (len(group), *shape)) for shape, group in groups.items()], pixels


def _unpack(block: Block | str, device: torch.device | None = None) -> Images:
    if isinstance(block, str):
        raise UserError(block)
    layout, pixels = block
    parts = pixels.to(device, non_blocking=True).split([int(np.prod(shape)) for _, shape in layout])
    return [(torch.from_numpy(group), part.view(shape)) for (group, shape), part in zip(layout, parts, strict=True)]


def _ahead(blocks: Iterable[Block | str], device: torch.device) -> Iterator[Images]:
    """Copies the next batch to the GPU, on a stream of its own, while the one before it is computed."""
    stream, blocks = torch.cuda.Stream(device), iter(blocks)

    def copy() -> Images | None:
        block = next(blocks, None)
        with torch.cuda.stream(stream):
            return None if block is None else _unpack(block, device)

    coming = copy()
    while coming is not None:
        computing = torch.cuda.current_stream(device)
        computing.wait_stream(stream)
        for _, pixels in coming:
            pixels.record_stream(computing)  # its memory is not used again before the computation is through
        images, coming = coming, copy()
        yield images


# Decoding once

ROOM = 0.8  # of the free memory that a cache may take
CHUNK = 64  # images that a worker decodes at a time to fill it


class _Cache:
    """All images of a data set, decoded once by `decoder`'s workers; gives batches like `_Decoder`.

    Raises:
        UserError: they do not fit into memory (each process holds a copy), or one cannot be read.
    """

    def __init__(self, dataset: ImageDataset, decoder: _Decoder, cache: str, run: Any):
        self.device = run.device
        self.home = run.device if cache == 'device' else torch.device('cpu')
        size = _size(dataset) * (run.world_size if self.home.type == 'cpu' else 1)
        free = _free_memory(self.home)
        plan = f'--cache {cache}: {len(dataset)} training images take about {_gb(size)} of {_gb(free)} free memory'
        if size > ROOM * free:
            raise UserError(f'{plan}, too much: use --cache none')
        if run.rank == 0:
            print(plan)
        decoder.device = self.home
        chunks = [range(len(dataset))[at : at + CHUNK] for at in range(0, len(dataset), CHUNK)]
        self.images: list[Any] = [None] * len(dataset)  # uint8 (H, W, 3) each
        for chunk, groups in zip(chunks, decoder.batches(chunks), strict=True):
            for positions, pixels in groups:
                pixels = pixels.clone()  # out of the memory that is shared with the workers
                for position, image in zip(positions.tolist(), pixels, strict=True):
                    self.images[chunk[position]] = image if self.home == self.device else image.numpy()

    def batches(self, items: Sequence[Sequence[int]]) -> Iterator[Images]:
        batches = ([self.images[item] for item in batch] for batch in items)
        if self.home == self.device:
            return map(_gather, batches)
        return _ahead((_pack(images, pin=True) for images in batches), self.device)


def _gather(images: Sequence[Tensor]) -> Images:
    groups = _by_size(images).values()
    return [(torch.tensor(group), torch.stack([images[i] for i in group])) for group in groups]


def _size(dataset: ImageDataset) -> int:
    """Bytes of the decoded images, going by up to 64 of them."""
    sample = range(0, len(dataset), max(len(dataset) // 64, 1))
    pixels = [np.prod(read_image(dataset.paths(index)[0]).size) for index in sample]
    return int(3 * np.mean(pixels) * len(dataset))


def _free_memory(device: torch.device) -> int:
    """Bytes that are free, for this process group (a container or a batch job may have less than the machine)."""
    if device.type == 'cuda':
        return torch.cuda.mem_get_info(device)[0]
    try:
        free = _numbers('/proc/meminfo')['MemAvailable'] * 1024
    except OSError:  # no Linux
        return os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') // 2
    try:
        group = Path('/sys/fs/cgroup') / Path('/proc/self/cgroup').read_text().rpartition('::')[2].strip().lstrip('/')
        limit = int((group / 'memory.max').read_text())
        return min(free, limit - _numbers(group / 'memory.stat')['anon'])
    except (OSError, ValueError):  # no limit
        return free


def _numbers(path: str | os.PathLike) -> dict[str, int]:
    return {line.split()[0].rstrip(':'): int(line.split()[1]) for line in Path(path).read_text().splitlines()}


def _gb(size: float) -> str:
    return f'{size / 1e9:.2f} GB'
