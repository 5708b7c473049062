"""Training images that are decoded once and kept in RAM or on the device (--cache)."""

import contextlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from batches.workers import Block, SizeGroup, Task, Workers, collate
from runtime.device import Run
from runtime.errors import UserError

CGROUPS, GROUPS_OF_PROCESS = Path('/sys/fs/cgroup'), Path('/proc/self/cgroup')
USABLE = 0.8  # fraction of the free memory that a cache may use
CHUNK = 64  # items that a worker decodes at a time to fill the cache


@dataclass
class Resident:
    """A block whose images are already on the device."""

    groups: list[SizeGroup]
    counts: list[int]
    pids: list[int]
    more: list[tuple]

    def images(self, _: torch.device) -> list[SizeGroup]:
        return self.groups


class Cache:
    """All items of a data set, decoded once by `workers`; yields the same blocks as the workers.

    Args:
        size: bytes of all images, estimated from a sample.
        kind: 'ram' or 'device'.

    Raises:
        UserError: the images do not fit into memory (each process of a host holds a copy), or one cannot be read.
    """

    def __init__(self, number: int, size: int, kind: str, workers: Workers, run: Run):
        self.device = run.device
        self.home = run.device if kind == 'device' else torch.device('cpu')
        size *= run.processes.local_world_size if self.home.type == 'cpu' else 1
        free = free_memory(self.home)
        plan = f'--cache {kind}: {number} training images take about {gigabytes(size)} of {gigabytes(free)} free memory'
        if size > USABLE * free:
            raise UserError(f'{plan}, too much: use --cache none')
        if run.rank == 0:
            print(plan)
        chunks = [list(range(number)[at : at + CHUNK]) for at in range(0, number, CHUNK)]
        self.items: list[tuple] = []  # (image, pid, camid, more ...), image: (3, H, W) where it is kept
        for block in workers.blocks(Task(chunk, chunk) for chunk in chunks):
            images: dict[int, Tensor] = {}
            for positions, pixels in block.images(self.home):
                images |= zip(positions.tolist(), pixels.clone().permute(0, 3, 1, 2).unbind(), strict=True)
            for position, (pid, more) in enumerate(zip(block.pids, block.more, strict=True)):
                self.items.append((images[position], pid, 0, *more))
        workers.close()

    def blocks(self, tasks: Iterable[Task]) -> Iterator[Block | Resident]:
        for task in tasks:
            items = [self.items[index] for index in task.items]
            yield resident(items) if self.home == self.device else collate(items, pin=True)


def resident(items: list[tuple]) -> Resident:
    """A block of items whose images (3, H, W) are on the device."""
    by_size: dict[tuple[int, ...], list[int]] = {}
    for position, (image, *_) in enumerate(items):
        by_size.setdefault(tuple(image.shape), []).append(position)
    groups = [
        (torch.tensor(group), torch.stack([items[i][0].permute(1, 2, 0) for i in group]))  # (n,), (n, H, W, 3)
        for group in by_size.values()
    ]
    return Resident(groups, [1] * len(items), [item[1] for item in items], [item[3:] for item in items])


def free_memory(device: torch.device) -> int:
    """Free memory in bytes, within the limit of the container or batch job if there is one."""
    if device.type == 'cuda':
        return torch.cuda.mem_get_info(device)[0]
    try:
        free = _numbers('/proc/meminfo')['MemAvailable'] * 1024
    except OSError:  # not Linux
        return os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') // 2
    return min([free, *_left_in_groups()])


def _left_in_groups() -> Iterator[int]:
    """The bytes left to each control group that contains this process and has a memory limit (Linux).

    A batch system may limit any of the groups around that of the process. Groups of version 1 have a tree for memory.
    """
    with contextlib.suppress(OSError):  # not Linux
        for line in GROUPS_OF_PROCESS.read_text().splitlines():
            _, controllers, group = line.split(':', 2)
            if controllers and 'memory' not in controllers.split(','):
                continue
            top = CGROUPS / 'memory' if controllers else CGROUPS
            limit, used = ('memory.limit_in_bytes', 'total_rss') if controllers else ('memory.max', 'anon')
            folder = top / group.lstrip('/')
            for place in (folder, *folder.parents[: len(folder.parts) - len(top.parts)]):
                with contextlib.suppress(OSError, ValueError, KeyError):  # no limit here
                    yield int((place / limit).read_text()) - _numbers(place / 'memory.stat')[used]


def _numbers(path: str | os.PathLike) -> dict[str, int]:
    return {line.split()[0].rstrip(':'): int(line.split()[1]) for line in Path(path).read_text().splitlines()}


def gigabytes(size: float) -> str:
    return f'{size / 1e9:.2f} GB'
