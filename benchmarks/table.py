"""The speeds of this project compared with the original's method ("plain") and with the unavoidable work ("limit").

    python benchmarks/table.py [--full] [part ...]

The sides of a row run in turn, so that a noisy machine slows all of them; a ratio is the median over the turns. Input,
training (in float32) and testing assert that all sides compute the same result. Each part runs in a separate process
and prints its rows one by one. Nothing but what is measured holds memory of a GPU.

`--full` adds the large sizes (11 GB of memory), the demo in both precisions, and on a CUDA device the original's
recipe. Rows that need a CUDA device say so if there is none. On a machine with one, all parts together take less than
15 minutes without `--full`: each part is ended when its time is over.
"""

import argparse
import contextlib
import gc
import importlib
import multiprocessing
import os
import platform
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

SECONDS = {
    'input': 90,
    'training': 340,
    'testing': 210,
    'using': 45,
    'reporting': 60,
    'distributed': 115,
    'learning': 15,
    'backbones': 15,
    'engines': 8,
}
PARTS = list(SECONDS)  # and how long each may take on a machine with a CUDA device
HERE = Path(__file__).resolve().parent
HEAD = '| what | unit | this project | plain | limit | times plain | time / limit | peak MB | target | met |'


@dataclass
class Row:
    """Medians of the sides in `unit` (seconds or items per second), and whether the targets are met."""

    what: str
    unit: str = ''
    ours: float | None = None
    plain: float | None = None
    limit: float | None = None
    times_plain: float | None = None  # speed relative to plain
    over_limit: float | None = None  # our time over the limit's
    peak_mb: float | None = None  # in addition to its inputs
    target: str = ''
    met: bool | None = None

    def __str__(self) -> str:
        sides = [self.ours, self.plain, self.limit]
        ratios = [self.times_plain, self.over_limit]
        cells = [self.what, self.unit, *(_digits(side, 3) for side in sides), *(_digits(ratio, 3) for ratio in ratios)]
        cells += [_digits(self.peak_mb, 3), self.target, {True: 'yes', False: 'NO', None: ''}[self.met]]
        return f'| {" | ".join(cells)} |'


def _digits(value: float | None, digits: int) -> str:
    """`value` with at least `digits` significant digits and all digits before the decimal point."""
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
    times: dict[str, list[float]] = {name: [] for name in sides}
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
    """A row of the times of the sides 'ours', 'plain' and `limit`, if measured, in seconds or `things` per second.

    The targets are the least speed relative to plain, the largest time relative to the limit, and the most MB.
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
            assert value is not None, f'{what}: nothing was measured for the target {text.format(target)}'
            targets.append(text.format(target))
            met.append(sign * value >= sign * target)
    return Row(
        what, unit if things else 's', shown('ours'), shown('plain'), shown(limit), times_plain, over_limit, peak_mb,
        ', '.join(targets), all(met) if met else None,
    )  # fmt: skip


def in_a_fresh_process(module: str, function: str, *args: object) -> Any:
    """The result of a part's function in a fresh process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context('spawn')) as process:
        return process.submit(_call, module, function, *args).result()


@contextlib.contextmanager
def apart(module: str, function: str, **sides: tuple) -> Iterator[dict[str, Callable]]:
    """Seconds taken by the work that a part's function returns for the arguments of each side.

    Each side has its own process, with the memory and the process settings that its program would have.
    """
    with contextlib.ExitStack() as stack:
        works: dict[str, Callable] = {}
        for name, args in sides.items():
            process = ProcessPoolExecutor(1, multiprocessing.get_context('spawn'), _prepare, (module, function, *args))
            stack.enter_context(process)
            works[name] = lambda process=process: process.submit(_work).result()
        yield works


def _call(module: str, function: str, *args: object) -> Any:
    return getattr(importlib.import_module(module), function)(*args)


_work_here: Callable[[], object]  # of this process, see `_prepare`


def _prepare(module: str, function: str, *args: object) -> None:
    global _work_here  # of this process, which calls this once: an initializer can keep its result nowhere else
    _work_here = _call(module, function, *args)


def _work() -> float:
    return seconds(_work_here)


def within(
    seconds: float | None,
    command: list[str],
    settings: Mapping[str, str] | None = None,
    stdout: IO | int | None = None,
    cwd: Path | None = None,
) -> int | None:
    """The exit status of `command`; None if it took longer. All processes that it has started end with it.

    settings: environment variables; modules of the project and of this folder can be imported
    """
    paths = [str(HERE.parent), str(HERE), *filter(None, [os.environ.get('PYTHONPATH')])]
    env = {**os.environ, 'PYTHONPATH': os.pathsep.join(paths), **(settings or {})}
    with subprocess.Popen(command, start_new_session=True, env=env, stdout=stdout, cwd=cwd) as process:
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def print_rows(part: str, full: bool) -> None:
    for each in importlib.import_module(part).rows(full):
        print(each, flush=True)


def machine() -> str:
    """A description of the machine; asking for its GPUs takes memory of each until this process ends."""
    import torch

    from runtime.cores import usable_cores

    facts = Path('/proc/cpuinfo')  # only on Linux
    lines = facts.read_text().splitlines() if facts.exists() else []
    names = {line.split(':')[1].strip() for line in lines if 'name' in line} or {platform.machine()}
    gpus = {torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())} or {'no CUDA device'}
    return (
        f'{usable_cores()} of {os.cpu_count()} CPUs ({", ".join(sorted(names))}), {", ".join(sorted(gpus))}, Python '
        f'{platform.python_version()}, torch {torch.__version__}; load at the start {os.getloadavg()[0]:.1f}'
    )


def gpus() -> int:
    """How many CUDA devices there are. To be called in a fresh process: what asks for them may start CUDA."""
    import torch

    return torch.cuda.device_count()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('parts', nargs='*', default=PARTS, metavar='part', help=f'of {", ".join(PARTS)}')
    parser.add_argument('--full', action='store_true', help='include the large sizes')
    options = parser.parse_args()
    unknown = sorted({*options.parts} - {*PARTS})
    if unknown:
        parser.error(f'{unknown[0]}: no such part; choose from {", ".join(PARTS)}')
    print(f'{in_a_fresh_process("table", "machine")}\n\n{HEAD}\n|{" --- |" * (HEAD.count("|") - 1)}', flush=True)
    limited = not options.full and in_a_fresh_process('table', 'gpus')
    failed = False
    for part in options.parts:
        command = [sys.executable, '-c', f'import table; table.print_rows({part!r}, {options.full})']
        status = within(SECONDS[part] if limited else None, command)
        if status is None:
            print(Row(f'{part} was ended after {SECONDS[part]} s', target='less', met=False), flush=True)
        failed = failed or status != 0
    sys.exit(1 if failed else 0)


if __name__ == '__main__':
    sys.path[:1] = [str(HERE.parent), str(HERE)]
    main()
