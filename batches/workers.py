"""Batches of images, and the worker processes that prepare them while the run computes.

A task lists the items of a batch; a block is the result, with all pixels contiguous in memory. A worker only calls the
data set for each item, so `__getitem__` runs in the worker.

A worker has one task at a time, and receives the next one after its block has been read, so that the two sides never
block each other by writing at the same time. Each worker holds one block: the number of workers is the number of
batches that are decoded ahead of the run.
"""

import atexit
import contextlib
import gc
import io
import itertools
import multiprocessing
import multiprocessing.util
import os
import pickle
import signal
import traceback
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from runtime import memory
from runtime.errors import ProcessLost, Unreadable, UserError
from runtime.signals import STOPS
from runtime.system import fcntl

PIPE_BYTES = 1 << 20  # that a worker can send before it blocks; the default on Linux is 64 kB
RETURNS = (
    'a data set must return a PIL image or a uint8 tensor (3, H, W), of any size, or a prepared float tensor (3, '
    'height, width), always of the same size; it returned'
)

# Positions in the batch (n,) and pixels (n, H, W, 3) of the images of one size: uint8, or float32 if prepared.
SizeGroup = tuple[Tensor, Tensor]


class Items(Protocol):
    """A data set: `items[index]` is (image, pid, camid, more ...)."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Any, ...]: ...


@dataclass
class Task:
    """The items of a batch, and for each one the seed of its random draws in the data set."""

    items: list[int]
    seeds: list[int]


@dataclass
class Block:
    """The images of a batch in host memory, with their labels."""

    groups: list[tuple[np.ndarray, tuple[int, ...]]]  # of equal size: positions in the batch (n,), shape (n, H, W, 3)
    pixels: Tensor  # flat, group after group
    counts: list[int]  # images of each item: 1, or the frames of a tracklet
    pids: list[int]
    more: list[tuple]  # further values that the data set returns for each item, after (image, pid, camid)

    def images(self, device: torch.device) -> list[SizeGroup]:
        """The images on `device`; if they are pinned, the host does not wait for the copy."""
        parts = self.pixels.to(device, non_blocking=True).split([int(np.prod(shape)) for _, shape in self.groups])
        return [
            (torch.from_numpy(positions), part.view(shape))
            for (positions, shape), part in zip(self.groups, parts, strict=True)
        ]


def collate(items: Sequence[tuple], pin: bool = False) -> Block:
    """Items (image or images, pid, camid, more ...) of a data set -> a block, in pinned memory if `pin`.

    Raises:
        UserError: an image has a type or shape that a data set must not return.
    """
    images, counts = [], []
    for shown, *_ in items:
        frames = shown if isinstance(shown, list) or getattr(shown, 'ndim', 3) == 4 else [shown]
        images += [_channels_last(frame) for frame in frames]  # (H, W, 3) each
        counts.append(len(frames))
    by_form: dict[tuple[np.dtype, tuple[int, ...]], list[int]] = {}
    for position, image in enumerate(images):
        by_form.setdefault((image.dtype, image.shape), []).append(position)
    if len(by_form) > 1 and any(dtype != np.uint8 for dtype, _ in by_form):
        forms = ', '.join(f'{dtype} (3, {height}, {width})' for dtype, (height, width, _) in by_form)
        raise UserError(f'{RETURNS} {forms}')
    kind = torch.uint8 if images[0].dtype == np.uint8 else torch.float32
    pixels = _empty(sum(image.size for image in images), kind, pin)
    np.concatenate([images[i].reshape(-1) for group in by_form.values() for i in group], out=pixels.numpy())
    groups = [(np.array(group), (len(group), *shape)) for (_, shape), group in by_form.items()]
    return Block(groups, pixels, counts, [int(pid) for _, pid, *_ in items], [tuple(item[3:]) for item in items])


def _empty(size: int, kind: torch.dtype, pin: bool) -> Tensor:
    """Memory of the host, pinned unless CUDA cannot pin more, as under WSL or in a small container."""
    try:
        return torch.empty(size, dtype=kind, device='cpu', pin_memory=pin)
    except RuntimeError:
        if not pin:
            raise
        return torch.empty(size, dtype=kind, device='cpu')


def _channels_last(image: Any) -> np.ndarray:
    """An image as uint8 or float32 (H, W, 3), from a PIL image or a tensor (3, H, W)."""
    if isinstance(image, Image.Image):
        return np.asarray(image if image.mode == 'RGB' else image.convert('RGB'))
    if isinstance(image, Tensor):
        image = (image.detach().float() if image.is_floating_point() else image).numpy()  # numpy has no bfloat16
    array = np.asarray(image)
    if array.ndim != 3 or len(array) != 3 or not (array.dtype == np.uint8 or np.issubdtype(array.dtype, np.floating)):
        raise UserError(f'{RETURNS} {array.dtype} {array.shape}')
    return (array if array.dtype == np.uint8 else array.astype(np.float32, copy=False)).transpose(1, 2, 0)


# Workers


RUNNING = weakref.WeakSet['Workers']()


@atexit.register  # after multiprocessing's handler, which waits for processes to end, and therefore called before it
def _end_running() -> None:
    for workers in list(RUNNING):
        workers.end()


class Workers:
    """Processes that run `work` on tasks ahead of the run, each on one task at a time.

    They are forked when first needed, and end on `close` or when the run ends for any reason. They ignore the signals
    that ask a run to stop: the run saves its state first, then ends them.
    """

    def __init__(self, number: int, work: Callable[[Task], Block], pin: bool):
        if multiprocessing.current_process().daemon:  # of a pool, or of a DataLoader: it must not start any
            number = 0
        self.number, self.work, self.pin = number, work, pin
        self.workers: list[Worker] = []
        self.busy: deque[Worker] = deque()  # those that have yet to send a block to the newest iteration
        self.end = weakref.finalize(self, _end_all, self.workers, os.getpid())
        RUNNING.add(self)

    def blocks(self, tasks: Iterable[Task]) -> Iterator[Block]:
        """The blocks of the tasks, in order. If `number` is 0, the run does the work itself.

        Abandoning an iteration ends the workers, and so does starting one before another is finished, because the
        blocks that they would still send are not needed.

        Raises:
            UserError: `work` raised it in a worker, or no worker could be started.
            ProcessLost: a worker was killed.
        """
        tasks = iter(tasks)
        if self.number == 0:
            for task in tasks:
                yield self.work(task)
            return
        if self.busy:
            self.close()
        busy = self.busy = deque()
        try:
            for place, task in enumerate(itertools.islice(tasks, self.number)):
                if place == len(self.workers):
                    self._start()
                busy.append(self.workers[place])
                busy[-1].send(task)
            while busy:
                if busy is not self.busy:
                    raise RuntimeError('a later iteration has taken over the workers')
                block = busy[0].receive(self.pin)
                worker = busy.popleft()
                if following := next(tasks, None):
                    busy.append(worker)
                    worker.send(following)
                yield block
        finally:
            if busy and busy is self.busy:
                self.close()

    def _start(self) -> None:
        try:
            worker = Worker(self.work, self.workers)
            self.workers.append(worker)  # before it starts: a signal may interrupt this function anywhere
            worker.start()
        except OSError as problem:
            self.close()
            raise UserError(
                f'{self.number} processes that decode images cannot be started ({problem.strerror}): use fewer '
                f'--workers, or 0'
            ) from problem

    def close(self) -> None:
        """End the workers, even if one hangs in a read."""
        self.busy = deque()
        _end_all(self.workers, os.getpid())


def _end_all(workers: list['Worker'], owner: int) -> None:
    if os.getpid() != owner:  # a forked process with a copy of the list
        return
    for worker in workers:
        worker.end()
    workers.clear()


class Worker:
    """One process, with a pipe for its tasks and one for its blocks."""

    def __init__(self, work: Callable[[Task], Block], others: Sequence['Worker']):
        context = multiprocessing.get_context('fork')  # the data set is neither pickled nor copied
        tasks, self.tasks = context.Pipe(duplex=False)
        self.blocks, blocks = context.Pipe(duplex=False)
        with contextlib.suppress(OSError, AttributeError):  # above the system's limit, or not Linux
            fcntl.fcntl(blocks.fileno(), fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        inherited = [self.tasks, self.blocks, *(end for other in others for end in (other.tasks, other.blocks))]
        self.ends = tasks, blocks  # the worker's ends
        self.process = context.Process(target=_serve, args=(work, tasks, blocks, inherited), daemon=True)

    def start(self) -> None:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)  # until the worker ignores them
        try:
            self.process.start()
        finally:
            for end in self.ends:
                end.close()
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def send(self, task: Task) -> None:
        with self._watched():
            self.tasks.send(task)

    def receive(self, pin: bool) -> Block:
        with self._watched():
            message = self.blocks.recv_bytes()
        answer = pickle.loads(message)
        if isinstance(answer, Exception):
            raise answer
        block: Block
        block, kind, size = answer
        block.pixels = _empty(size, kind, pin)
        with self._watched():
            _read(self.blocks.fileno(), block.pixels.numpy().data.cast('B'))
        return block

    @contextlib.contextmanager
    def _watched(self) -> Iterator[None]:
        """Report the worker as lost if the other end of a pipe closes, possibly in the middle of a block."""
        try:
            yield
        except (EOFError, OSError) as problem:
            self.process.join(timeout=60)  # its pipe closes shortly before it ends
            raise ProcessLost(f'a process that decodes images {_ended(self.process.exitcode)}') from problem

    def end(self) -> None:
        self.tasks.close()
        self.blocks.close()
        if self.process.pid is not None:  # it was started
            self.process.kill()  # it has nothing to save
            self.process.join()


def _serve(work: Callable[[Task], Block], tasks: Connection, blocks: Connection, inherited: list[Connection]) -> None:
    """The main function of a worker: do its tasks until the run closes the pipe or ends."""
    for number in STOPS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)
    gc.freeze()  # objects of the run, such as GPU tensors or temporary folders, must not be finalised here
    for end in inherited:  # otherwise a worker would keep another one's pipes open
        end.close()
    torch.set_num_threads(1)
    with contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            message, pixels = _answer(work, tasks.recv())
            blocks.send_bytes(message)
            _write(blocks.fileno(), pixels)


def _answer(work: Callable[[Task], Block], task: Task) -> tuple[bytes, memoryview]:
    """The reply to a task: its block without the pixels, their dtype and number, then the pixels; or an exception."""
    try:
        block = work(task)
        pixels, block.pixels = block.pixels, torch.empty(0)
        return _pickled((block, pixels.dtype, pixels.numel())), pixels.numpy().data.cast('B')
    except UserError as mistake:
        kind = Unreadable if isinstance(mistake, Unreadable) else UserError
        return pickle.dumps(kind(str(mistake))), memoryview(b'')
    except BaseException as problem:  # also SystemExit; the exception may not be picklable, its traceback is
        if memory.exhausted(problem):
            text = f'memory ran out in a process that decodes images ({memory.reason(problem)}); use fewer --workers'
            return pickle.dumps(UserError(text)), memoryview(b'')
        text = f'in a process that decodes images:\n{traceback.format_exc()}'
        return pickle.dumps(RuntimeError(text)), memoryview(b'')


def _pickled(answer: object) -> bytes:
    file = io.BytesIO()
    _Pickler(file, pickle.HIGHEST_PROTOCOL).dump(answer)
    return file.getvalue()


class _Pickler(pickle.Pickler):
    """Pickles the bytes of tensors, ten times as fast as torch; multiprocessing would use /dev/shm."""

    def reducer_override(self, value: object) -> Any:
        if type(value) is Tensor:
            with contextlib.suppress(TypeError, RuntimeError):  # a dtype that numpy does not have
                return torch.from_numpy, (value.detach().numpy(),)
        return NotImplemented


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
        return 'was killed by SIGKILL, probably because memory ran out: use fewer --workers'
    names = {each.value: each.name for each in signal.Signals}
    code = exitcode or 0
    end = f'ended with status {code}' if code >= 0 else f'was killed by {names.get(-code, f"signal {-code}")}'
    return f'{end}: with --workers 0 the run decodes images itself'
