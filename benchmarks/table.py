"""The speeds of this project beside the original's way ("plain") and the bare work that no way can spare ("limit").

    python benchmarks/table.py [--full] [part ...]

The sides of a row work in turn, so that a noisy machine slows all; a ratio is the median of the turns' ratios. Input,
training (in float32) and testing assert that the sides computed the same. Each part runs in a process of its own and
prints its rows when it ends.

`--full` adds the large sizes (11 GB of memory), the training of both precisions, and on a CUDA device the original's
recipe; what needs a CUDA device says so where there is none.
"""

import argparse
import contextlib
import gc
import importlib
import multiprocessing
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

PARTS = ['input', 'training', 'testing', 'reporting', 'distributed', 'learning']
HEAD = '| what | unit | this project | plain | limit | times plain | time / limit | peak MB | target | met |'


@dataclass
class Row:
    """Medians of the sides in `unit`, seconds or things per second, and what the targets say of them."""

    what: str
    unit: str = ''
    ours: float | None = None
    plain: float | None = None
    limit: float | None = None
    times_plain: float | None = None  # how many times as fast as plain
    over_limit: float | None = None  # our time over the limit's
    peak_mb: float | None = None  # above what it works on
    target: str = ''
    met: bool | None = None

    def __str__(self) -> str:
        sides = [self.ours, self.plain, self.limit]
        ratios = [self.times_plain, self.over_limit]
        cells = [self.what, self.unit, *(_digits(side, 3) for side in sides), *(_digits(ratio, 3) for ratio in ratios)]
        cells += [_digits(self.peak_mb, 3), self.target, {True: 'yes', False: 'NO', None: ''}[self.met]]
        return f'| {" | ".join(cells)} |'


def _digits(value: float | None, digits: int) -> str:
    """With so many significant ones, and no fewer than before the point."""
    if value is None:
        return ''
    return f'{value:.{max(0, digits - len(str(int(abs(value)))))}f}' if abs(value) >= 1 else f'{value:.{digits - 1}f}'


def seconds(work: Callable) -> float:
    gc.collect()
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def take_turns(turns: int, measure: Callable = seconds, **sides: Callable) -> dict[str, list[float]]:
    """`measure` of each side in each turn."""
    times = {name: [] for name in sides}
    for _ in range(turns):
        for name, side in sides.items():
            times[name].append(measure(side))
    return times


def row(
    what: str,
    times: dict[str, list[float]],
    things: int = 0,
    limit: str = 'limit',
    plain_target: float | None = None,
    limit_target: float | None = None,
    peak_mb: float | None = None,
    peak_target: float | None = None,
    unit: str = 'images/s',
) -> Row:
    """A row of what sides 'ours', 'plain' and `limit` took, if they were measured, in seconds or `things` per second.

    The targets: so many times as fast as plain at least, so many times the limit's time at most, so many MB at most.
    """

    def shown(side: str) -> float | None:
        if side not in times:
            return None
        middle = statistics.median(times[side])
        return things / middle if things else middle

    def ratio(one: str, other: str) -> float | None:
        if one not in times or other not in times:
            return None
        return statistics.median(a / b for a, b in zip(times[one], times[other], strict=True))

    times_plain, over_limit = ratio('plain', 'ours'), ratio('ours', limit)
    targets, met = [], []
    for value, target, text, sign in (
        (times_plain, plain_target, 'plain ≥ {}', 1), (over_limit, limit_target, 'limit ≤ {}', -1),
        (peak_mb, peak_target, '≤ {} MB', -1),
    ):  # fmt: skip
        if target is not None:
            targets.append(text.format(target))
            met.append(sign * value >= sign * target)
    return Row(
        what, unit if things else 's', shown('ours'), shown('plain'), shown(limit), times_plain, over_limit, peak_mb,
        ', '.join(targets), all(met) if met else None,
    )  # fmt: skip


def in_a_fresh_process(module: str, function: str, *args):
    """What a function of a part gives in a process that did nothing before."""
    with ProcessPoolExecutor(1, multiprocessing.get_context('spawn')) as process:
        return process.submit(_call, module, function, *args).result()


@contextlib.contextmanager
def apart(module: str, function: str, **sides: tuple) -> Iterator[dict[str, Callable]]:
    """The seconds of the work that a function of a part gives for the arguments of each side, when called.

    Each side is a process of its own, with the memory, and what it set for its process, that its program would have.
    """
    with contextlib.ExitStack() as stack:
        works = {}
        for name, args in sides.items():
            process = ProcessPoolExecutor(1, multiprocessing.get_context('spawn'), _prepare, (module, function, *args))
            stack.enter_context(process)
            works[name] = lambda process=process: process.submit(_work).result()
        yield works


def _call(module: str, function: str, *args):
    return getattr(importlib.import_module(module), function)(*args)


def _prepare(*call) -> None:
    global _work_here
    _work_here = _call(*call)


def _work() -> float:
    return seconds(_work_here)


def machine() -> str:
    """What it was measured on, in words."""
    import torch

    names = {line.split(':')[1].strip() for line in Path('/proc/cpuinfo').read_text().splitlines() if 'name' in line}
    gpus = {torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())} or {'no CUDA device'}
    return (
        f'{os.cpu_count()} CPUs ({", ".join(sorted(names))}), {", ".join(sorted(gpus))}, Python '
        f'{platform.python_version()}, torch {torch.__version__}; load at the start {os.getloadavg()[0]:.1f}'
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('parts', nargs='*', default=PARTS, metavar='part', help=f'of {", ".join(PARTS)}')
    parser.add_argument('--full', action='store_true', help='large sizes too')
    options = parser.parse_args()
    unknown = sorted({*options.parts} - {*PARTS})
    if unknown:
        parser.error(f'{unknown[0]}: no such part; choose of {", ".join(PARTS)}')
    print(f'{machine()}\n\n{HEAD}\n|{" --- |" * (HEAD.count("|") - 1)}', flush=True)
    for part in options.parts:
        for line in in_a_fresh_process(part, 'rows', options.full):
            print(line, flush=True)


if __name__ == '__main__':
    here = Path(__file__).resolve().parent
    sys.path[:1] = [str(here.parent), str(here)]
    main()
