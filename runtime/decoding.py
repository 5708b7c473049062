"""Reading images, and the worker processes that read them while the run computes.

A task names the items of a batch, a block is what comes back: their pixels in one run of bytes. Workers do nothing but
call the data set for each item, so what its `__getitem__` does happens there.
"""

import atexit
import contextlib
import fcntl
import multiprocessing
import os
import signal
import stat
import time
import traceback
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from runtime.errors import ProcessLost, UserError

FORMATS = ('JPEG', 'PNG', 'BMP', 'GIF', 'PPM', 'TIFF', 'WEBP')  # none of them runs another program
TRIES, PAUSE = 3, 0.1  # of reading an image; seconds in between, in which a network file system may recover
PIPE_BYTES = 1 << 20  # that a worker can send before it waits; Linux's default is 64 kB

# Positions in the batch (n,) and pixels (n, H, W, 3) of the images of one size: uint8, or float32 if prepared.
Group = tuple[Tensor, Tensor]


def read_image(path: str | os.PathLike) -> Image.Image:
    """An image file as RGB with 8 bits a channel, at its own size. Reading is tried three times.

    Grey, palette and CMYK images are converted, transparency is dropped, of 16 bits a channel the upper 8 are kept, of
    an animation the first frame. A rotation in EXIF is not applied: boxes were drawn on the pixels as stored.

    Raises:
        UserError: the file is missing, none of FORMATS, truncated, holds numbers that are not pixels of 8 or 16 bits,
            or claims more pixels than Pillow considers safe (`PIL.Image.MAX_IMAGE_PIXELS`). It names the path.
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
        if image.width * image.height > (Image.MAX_IMAGE_PIXELS or 2**62):
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


# Batches


class Items(Protocol):
    """A data set: `items[index]` is (image, pid, camid, more ...)."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Any, ...]: ...


@dataclass
class Task:
    """The items of a batch, of which this process has the positions `first`, `first + step`, ... of the epoch."""

    items: list[int]
    epoch: int = 0
    first: int = 0
    step: int = 1


@dataclass
class Block:
    """The images of a batch in host memory, and what belongs to them."""

    groups: list[tuple[np.ndarray, tuple[int, ...]]]  # of equal size: positions in the batch (n,), shape (n, H, W, 3)
    pixels: Tensor  # of one group after the other, flat
    counts: list[int]  # images of each item: 1, or the frames of a tracklet
    pids: list[int]
    more: list[tuple]  # what the data set returns for each item beyond (image, pid, camid)

    def images(self, device: torch.device) -> list[Group]:
        """The images on `device`; if they were pinned, the host does not wait for their copy."""
        parts = self.pixels.to(device, non_blocking=True).split([int(np.prod(shape)) for _, shape in self.groups])
        return [
            (torch.from_numpy(positions), part.view(shape))
            for (positions, shape), part in zip(self.groups, parts, strict=True)
        ]


def collate(items: Sequence[tuple], pin: bool = False) -> Block:
    """Items (image or images, pid, camid, more ...) of a data set -> a block, with `pin` in pinned memory."""
    images, counts = [], []
    for shown, *_ in items:
        frames = shown if isinstance(shown, list) or getattr(shown, 'ndim', 3) == 4 else [shown]
        images += [_channels_last(frame) for frame in frames]  # (H, W, 3) each
        counts.append(len(frames))
    by_form: dict[tuple, list[int]] = {}
    for position, image in enumerate(images):
        by_form.setdefault((*image.shape, image.dtype), []).append(position)
    if len({dtype for *_, dtype in by_form}) > 1 or (images[0].dtype != np.uint8 and len(by_form) > 1):
        raise UserError(
            'a data set must return uint8 images, at any size, or prepared float32 images, all of one size; in a batch '
            f'it returned {", ".join(f"{dtype} {tuple(shape)}" for *shape, dtype in by_form)}'
        )
    kind = torch.from_numpy(images[0][:0]).dtype
    pixels = torch.empty(sum(image.size for image in images), dtype=kind, pin_memory=pin)
    np.concatenate([images[i].reshape(-1) for group in by_form.values() for i in group], out=pixels.numpy())
    groups = [(np.array(group), (len(group), *shape)) for (*shape, _), group in by_form.items()]
    return Block(groups, pixels, counts, [int(pid) for _, pid, *_ in items], [tuple(item[3:]) for item in items])


def _channels_last(image: Any) -> np.ndarray:
    """An image as uint8 or float32 (H, W, 3), from a PIL image or a tensor (3, H, W)."""
    if isinstance(image, Image.Image):
        return np.asarray(image.convert('RGB'))
    array = torch.as_tensor(image).permute(1, 2, 0).numpy()
    return array if array.dtype == np.uint8 else array.astype(np.float32, copy=False)


# Workers


class Workers:
    """Processes that do `work` on tasks, one task each at a time, so that as many are done ahead of the run.

    They are forked when they are first needed, and end with `close` or with the run, however that ends. They ignore
    SIGINT and SIGTERM, which a terminal or a batch system sends to them as well: the run saves first, then ends them.
    """

    def __init__(self, number: int, work: Callable[[Task], Block], pin: bool):
        self.number, self.work, self.pin = number, work, pin
        self.workers: list[Worker] = []
        end = weakref.finalize(self, _end_all, self.workers, os.getpid())
        atexit.register(end)  # runs before multiprocessing, registered earlier, would wait for them to heed SIGTERM

    def blocks(self, tasks: Iterable[Task]) -> Iterator[Block]:
        """The blocks of the tasks, in their order. With `number` 0 the run does the work itself.

        Raises:
            UserError: what `work` raised in a worker, or no worker could be started.
            ProcessLost: a worker was killed.
        """
        if self.number == 0:
            yield from map(self.work, tasks)
            return
        self._start()
        tasks, busy, whole = iter(tasks), deque[Worker](), False
        try:
            for worker in self.workers:
                if task := next(tasks, None):
                    worker.send(task)
                    busy.append(worker)
            while busy:
                worker = busy.popleft()
                block = worker.receive(self.pin)
                if task := next(tasks, None):
                    worker.send(task)
                    busy.append(worker)
                yield block
            whole = True
        finally:
            if not whole:  # they may still send blocks that nobody wants
                self.close()

    def _start(self) -> None:
        try:
            while len(self.workers) < self.number:
                self.workers.append(Worker(self.work, self.workers))
        except OSError as problem:
            self.close()
            raise UserError(
                f'{self.number} processes that decode images cannot be started ({problem.strerror}): use fewer '
                f'--workers, or 0'
            ) from problem

    def close(self) -> None:
        """End the workers, also one that hangs in a read."""
        _end_all(self.workers, os.getpid())


def _end_all(workers: list['Worker'], owner: int) -> None:
    if os.getpid() != owner:  # a worker, which was forked with a copy of this
        return
    for worker in workers:
        worker.end()
    workers.clear()


class Worker:
    """One process, and the pipes by which tasks reach it and blocks come back."""

    def __init__(self, work: Callable[[Task], Block], others: list['Worker']):
        context = multiprocessing.get_context('fork')  # the data set needs no pickling, its memory no copy
        theirs_in, self.tasks = context.Pipe(duplex=False)
        self.blocks, theirs_out = context.Pipe(duplex=False)
        with contextlib.suppress(OSError, AttributeError):  # a limit of the system's; another system than Linux
            fcntl.fcntl(theirs_out.fileno(), fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        inherited = [self.tasks, self.blocks, *(end for other in others for end in (other.tasks, other.blocks))]
        self.process = context.Process(target=_serve, args=(work, theirs_in, theirs_out, inherited), daemon=True)
        try:
            self.process.start()
        finally:
            theirs_in.close()
            theirs_out.close()

    def send(self, task: Task) -> None:
        try:
            self.tasks.send(task)
        except OSError as problem:
            raise self._lost() from problem

    def receive(self, pin: bool) -> Block:
        try:
            answer = self.blocks.recv()
            if isinstance(answer, Exception):
                raise answer
            block: Block
            block, kind, size = answer
            block.pixels = torch.empty(size, dtype=kind, pin_memory=pin)
            _read(self.blocks.fileno(), block.pixels.numpy().data.cast('B'))
        except (EOFError, OSError) as problem:
            raise self._lost() from problem
        return block

    def _lost(self) -> ProcessLost:
        self.process.join(timeout=60)  # its pipe closes a little before it has ended
        return ProcessLost(f'a process that decodes images {_ended(self.process.exitcode)}')

    def end(self) -> None:
        self.tasks.close()
        self.blocks.close()
        if self.process.is_alive():
            self.process.kill()  # it holds nothing that must be written
        self.process.join()


def _serve(work: Callable[[Task], Block], tasks: Connection, blocks: Connection, inherited: list[Connection]) -> None:
    """What a worker does: its tasks, until the run closes the pipe or is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    for end in inherited:  # or a worker would keep the pipes of another open
        end.close()
    torch.set_num_threads(1)
    with contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            task = tasks.recv()
            try:
                block = work(task)
            except UserError as mistake:
                blocks.send(UserError(str(mistake)))
            except Exception:
                blocks.send(RuntimeError(f'in a process that decodes images:\n{traceback.format_exc()}'))
            else:
                pixels, block.pixels = block.pixels, torch.empty(0)
                blocks.send((block, pixels.dtype, pixels.numel()))
                _write(blocks.fileno(), pixels.numpy().data.cast('B'))


def _write(file: int, data: memoryview) -> None:
    while data:
        data = data[os.write(file, data) :]


def _read(file: int, room: memoryview) -> None:
    while room:
        count = os.readv(file, [room])
        if not count:
            raise EOFError
        room = room[count:]


def _ended(exitcode: int | None) -> str:
    if exitcode == -signal.SIGKILL:
        return 'was ended by SIGKILL, as happens when memory runs out: use fewer --workers'
    names = {each.value: each.name for each in signal.Signals}
    code = exitcode or 0
    end = f'ended with status {code}' if code >= 0 else f'was ended by {names.get(-code, -code)}'
    return f'{end}: with --workers 0 the run decodes images itself'
