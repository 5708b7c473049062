"""Compares an older commit with the working tree: what their scripts print, write and train, bit for bit.

    python tests/compare.py COMMIT [--only SCRIPT ...]

The commit is checked out into a temporary git worktree. Either side runs each of its own scripts by its own
tests/tiny.py, with the tiny network on the same images, in fp32 on the CPU with one thread:

    whole       two epochs, each tested, and a position saved after every step
    processes   the same in two processes, of one script
    position    two workers; resumed from what the commit saved after the first step
    epoch       --cache ram; resumed from what the commit saved after the first epoch
    evaluate    --evaluate of what the commit saved at the end

So files that the commit wrote must resume in the working tree and end with the same weights. Compared are the exit
status, every printed line and all that is in the files, but for times, speeds, free memory, the folder in which it runs
and the code's revision.
Options that one side alone has are reported and are no difference.

Exit status: 0 if nothing differs, 1 if something does, 2 if there is no such commit or its own runs fail.
"""

import argparse
import ast
import contextlib
import csv
import difflib
import itertools
import json
import multiprocessing
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

ROOT = Path(__file__).resolve().parents[1]
TINY = 'tests/tiny.py'
OPTIONS = '-a tiny --height 32 --width 16 --pretrained none --train-batch 8 --max-epoch 2 --eval-step 1'
SCHEDULES = {'train_img_model_strong': '--warmup 1 --decays 1'}  # of scripts without --stepsize
OPTIONS += ' --use-cpu --precision fp32 --no-report --print-freq 1 --save-minutes 1e-9 --keep 99 --data-dir ../data'
WHOLE = '../old/{script}/whole'  # seen from the folder in which either side runs
STAGES = [  # runs by name and what they add to OPTIONS; the second stage reads what the first one wrote
    {'whole': '--workers 0', 'processes': '--workers 0'},
    {
        'position': f'--workers 2 --resume {WHOLE}/resume_1_1.pth.tar',
        'epoch': f'--workers 0 --cache ram --resume {WHOLE}/checkpoint_ep1.pth.tar',
        'evaluate': f'--workers 0 --evaluate --resume {WHOLE}/checkpoint_ep2.pth.tar',
    },
]
SHARED = 'train_img_model_xent_htri'  # is run in two processes: its loss needs the features of both
VARYING_TEXT = re.compile(r'(?<=elapsed time \(h:m:s\): )\S+|\S+(?= GB free memory)')
VARYING = ('date', 'revision', 'written', 'folder', 'images_per_s', 'data_wait')  # entries that no two runs share
FIRST = ('exit status', 'stderr', 'stdout', 'metrics.csv', 'results.json')  # in the report; then the other files
SHOWN = 4  # files of a run, and lines of a file, that are listed
STOPS = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}


class Mistake(Exception):
    """What the user can mend, in one line."""


class Side(NamedTuple):
    """The commit or the working tree."""

    root: Path  # its checkout
    cwd: Path  # in which its scripts run, and where they write


class Run(NamedTuple):
    """What either side runs; its files are in `folder` of the side's `cwd`, and what it prints beside that."""

    script: str
    name: str
    options: str

    @property
    def folder(self) -> str:
        return f'{self.script}/{self.name}'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('commit', metavar='COMMIT')
    parser.add_argument('--only', nargs='+', default=[], metavar='SCRIPT', help='such as train_img_model_xent')
    parser.error = _fail
    args = parser.parse_args()
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
    try:
        with checked_out(args.commit) as folder:
            status = compare(args.commit, args.only, folder)
    except Mistake as mistake:
        _fail(mistake)
    sys.exit(status)


def _fail(mistake: str | Mistake) -> NoReturn:
    sys.stderr.write(f'error: {mistake}\n')
    sys.exit(2)


def stop_if_asked() -> None:
    """End in order if a signal waits. They are blocked: what a handler raises is lost where it interrupts a fork."""
    for number in STOPS & signal.sigpending():
        sys.exit(128 + number)


def compare(commit: str, only: list[str], folder: Path) -> int:
    """Run, compare and report; the exit status. `folder` holds the checkout of the commit."""
    started = time.monotonic()
    old, new = Side(folder / 'commit', folder / 'old'), Side(ROOT, folder / 'new')
    scripts, added = (sorted(path.stem for path in side.root.glob('train_*.py')) for side in (old, new))
    if unknown := set(only).difference(scripts):
        raise Mistake(f'--only {" ".join(sorted(unknown))}: no such script in {commit}, which has {", ".join(scripts)}')
    if not (old.root / TINY).exists():
        raise Mistake(f'{commit} has no {TINY} to run a script with: name a later commit')
    scripts = [script for script in scripts if script in only or not only]
    print(f'{commit} (old, -) and the working tree (new, +): {", ".join(scripts)}', flush=True)

    prepare(folder)
    runs, statuses = [], {}
    for stage in STAGES:
        planned = [Run(script, name, options) for script in scripts for name, options in stage.items()]
        planned = [run for run in planned if run.name != 'processes' or run.script == SHARED]
        statuses |= finish([(side, run) for run in planned for side in (old, new)])
        for run in planned:
            if statuses[old, run]:
                errors = (old.cwd / f'{run.folder}.stderr').read_text().splitlines() or ['it says nothing']
                raise Mistake(f'{run.folder} fails in {commit} itself, with status {statuses[old, run]}: {errors[-1]}')
        runs += planned

    differing, notes = 0, {f'{script} is new' for script in added if script not in scripts and not only}
    for run in sorted(runs, key=lambda run: run.script):
        stop_if_asked()
        files = [{'exit status': statuses[side, run], **read_all(side, run)} for side in (old, new)]
        differences = dict(compare_files(*files, notes))
        differing += bool(differences)
        report(run, differences)
    for note in sorted(notes):
        print(f'note: {note}')
    summary = f'{differing} of {len(runs)} runs differ' if differing else f'all {len(runs)} runs are equal'
    print(f'{summary}; {time.monotonic() - started:.0f} s')
    return 1 if differing else 0


def report(run: Run, differences: dict[str, list[str]]) -> None:
    print(f'{run.folder}: {"differs" if differences else "equal"}')
    for file, lines in list(differences.items())[:SHOWN]:
        print('\n      '.join([f'    {file}', *lines[:SHOWN]]))
        if len(lines) > SHOWN:
            print(f'      and {len(lines) - SHOWN} more')
    if more := list(differences)[SHOWN:]:
        print(f'    and {", ".join(more)}')


# ---- two checkouts, the same images ----


@contextlib.contextmanager
def checked_out(commit: str) -> Iterator[Path]:
    """A temporary folder with `commit` in it, as a git worktree; both are gone in the end, also when interrupted."""
    if commit.startswith('-') or git('rev-parse', '--verify', '--quiet', f'{commit}^{{commit}}').returncode:
        raise Mistake(f'{commit}: no such commit in {ROOT}')
    folder = Path(tempfile.mkdtemp(prefix='compare-'))
    tree = folder / 'commit'
    try:
        added = git('worktree', 'add', '--quiet', '--detach', tree, commit)
        if added.returncode:
            raise Mistake(f'{commit} cannot be checked out: {" ".join(added.stderr.split())}')
        yield folder
    finally:
        git('worktree', 'remove', '--force', tree)
        shutil.rmtree(folder, ignore_errors=True)


def git(*args: Any) -> subprocess.CompletedProcess:
    try:
        return subprocess.run(['git', '-C', ROOT, *args], capture_output=True, text=True)
    except FileNotFoundError:
        raise Mistake('there is no git on this machine') from None


def prepare(folder: Path) -> None:
    """Draw the images, and import what every run needs and is not of the project: its forks then do not have to."""
    os.environ['OMP_NUM_THREADS'] = '1'
    os.environ.pop('PYTHONPATH', None)  # might lead to one side's modules

    import scipy.io  # noqa: F401
    import torchvision  # noqa: F401
    import trees

    trees.draw_market1501(folder / 'data' / 'market1501')
    trees.draw_mars(folder / 'data' / 'mars')
    del sys.modules['trees']  # now this process holds no module that a side may have as well


def finish(planned: list[tuple[Side, Run]]) -> dict[tuple[Side, Run], int]:
    """Run them all, one for each core at a time; their exit statuses."""
    waiting, running, statuses = list(planned), {}, {}
    fork, cores = multiprocessing.get_context('fork'), os.cpu_count() or 1
    try:
        while waiting or running:
            stop_if_asked()
            while waiting and len(running) < cores:
                process = fork.Process(target=execute, args=waiting[0])
                process.start()
                running[process.sentinel] = process, waiting.pop(0)
            for sentinel in wait(list(running), timeout=0.1):
                process, key = running.pop(sentinel)
                process.join()
                statuses[key] = process.exitcode
    finally:
        for process, _ in running.values():
            process.terminate()
        for process, _ in running.values():
            process.join(10)
            process.kill()
    return statuses


def execute(side: Side, run: Run) -> None:
    """`python tests/tiny.py SCRIPT ...` in this process, a fork."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)
    (side.cwd / run.script).mkdir(parents=True, exist_ok=True)
    os.chdir(side.cwd)
    for descriptor, name in ((1, 'stdout'), (2, 'stderr')):
        with open(f'{run.folder}.{name}', 'wb') as file:
            os.dup2(file.fileno(), descriptor)
    tiny = side.root / TINY
    sys.path[0] = str(tiny.parent)  # was that of this file
    sys.argv = [str(tiny), str(side.root / f'{run.script}.py'), *OPTIONS.split(), '--save-dir', run.folder]
    sys.argv += SCHEDULES.get(run.script, '--stepsize 1').split()
    sys.argv += run.options.format(script=run.script).split()
    if run.name == 'processes':
        sys.argv = ['torchrun', '--standalone', '--nproc-per-node', '2', *sys.argv]
        runpy.run_module('torch.distributed.run', run_name='__main__')
    else:
        runpy.run_path(str(tiny), run_name='__main__')


# ---- what a run left, and where two differ ----


def read_all(side: Side, run: Run) -> dict[str, Any]:
    """The contents of each file."""
    files = {path.name: path for path in (side.cwd / run.folder).glob('*') if path.name != '.lock'}
    files |= {name: side.cwd / f'{run.folder}.{name}' for name in ('stdout', 'stderr')}
    old = side.cwd.parent / 'commit'  # both sides may have the best model of the commit, from whose run they continue
    return {name: read(path, side.root, old) for name, path in files.items()}


def read(path: Path, *roots: Path) -> Any:
    """The contents of a file, but for what varies from run to run and for where the checkouts `roots` are."""
    if path.name.endswith('.pth.tar'):
        import torch

        state = torch.load(path, map_location='cpu', weights_only=True)
        provenance = _without(roots, json.dumps(state.get('provenance', {})))
        return _lasting(state) | {'provenance': _lasting(json.loads(provenance))}
    if path.suffix == '.npz':
        import numpy as np

        with np.load(path) as arrays:
            return _lasting(dict(arrays))
    text = _without(roots, path.read_text(encoding='utf-8', errors='surrogateescape'))
    if path.suffix == '.json':
        return _lasting(json.loads(text))
    if path.suffix == '.csv':
        return [_lasting(row) for row in csv.DictReader(text.splitlines())]
    return VARYING_TEXT.sub('...', text).splitlines()


def _without(roots: Iterable[Path], text: str) -> str:
    for root in roots:
        text = text.replace(f'{root}/', '')
    return text


def _lasting(entries: dict) -> dict:
    return {name: value for name, value in entries.items() if name not in VARYING}


def compare_files(old: dict, new: dict, notes: set[str]) -> Iterator[tuple[str, list[str]]]:
    """Each file that differs, and how; `notes` are added of options that one side alone has.

    Of a run that ends with another status that is all, with the last of its lines on stderr.
    """
    if old['exit status'] != new['exit status']:
        yield 'exit status', [f'{old["exit status"]} -> {new["exit status"]}', *new['stderr'][-1:]]
        return
    printed = []
    for name in sorted(old | new, key=lambda name: (FIRST.index(name) if name in FIRST else len(FIRST), name)):
        if name not in old or name not in new:
            yield name, [f'only in the {"new" if name in new else "old"} one']
            continue
        one, other = old[name], new[name]
        if name.endswith('.pth.tar'):
            one, other = dict(one), dict(other)
            for key in one.keys() & other & {'arguments', 'recipe'}:
                one[key], other[key] = _common(one[key], other[key], notes)
        if name.endswith(('.txt', 'stdout', 'stderr')):
            lines = list(compare_lines(one, other, notes))
        else:
            lines = list(compare_values(one, other))
        if lines and not (name.startswith('log_') and lines == printed):  # reported once is enough
            yield name, lines
        printed = lines if name == 'stdout' else printed


def compare_lines(old: list[str], new: list[str], notes: set[str]) -> Iterator[str]:
    """The lines of one side alone; those with the options are compared option by option."""
    options: list[dict[str, str]] = []
    for lines in (old, new):
        args = [line for line in lines if line.startswith('Args:Namespace(')]
        keywords = [keyword for line in args for keyword in ast.parse(line[5:], mode='eval').body.keywords]
        options.append({keyword.arg: ast.unparse(keyword.value) for keyword in keywords})
    for line in compare_values(*_common(*options, notes)):
        yield f'Args: {line}'
    old, new = ([line for line in lines if not line.startswith('Args:Namespace(')] for lines in (old, new))
    for tag, *places in difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        if tag != 'equal':
            for one, other in itertools.zip_longest(old[slice(*places[:2])], new[slice(*places[2:])]):
                yield from (f'{sign} {line}' for sign, line in (('-', one), ('+', other)) if line is not None)


def _common(old: dict, new: dict, notes: set[str]) -> list[dict]:
    """The options that both sides have; `notes` are added of the others."""
    for side, names in (('the working tree', new.keys() - old), ('the commit', old.keys() - new)):
        notes.update(f'{side} alone has --{name.replace("_", "-")}' for name in names)
    return [{name: side[name] for name in sorted(old.keys() & new)} for side in (old, new)]


def compare_values(old: Any, new: Any, where: str = '') -> Iterator[str]:
    """Where two nested values differ. Numbers are equal if all their bits are: -0 is not 0, and NaN is NaN."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *(key for key in new if key not in old)]:
            place = f'{where}.{key}'.lstrip('.')
            if key in old and key in new:
                yield from compare_values(old[key], new[key], place)
            else:
                yield f'{"+" if key in new else "-"} {place}'
    elif type(old) is type(new) and isinstance(old, list | tuple) and len(old) == len(new):
        for place, pair in enumerate(zip(old, new, strict=True)):
            yield from compare_values(*pair, f'{where}[{place}]')
    elif type(old) is type(new) and isinstance(old, list | tuple):
        yield f'{where}: {len(old)} -> {len(new)} entries'
    elif hasattr(old, 'dtype') and hasattr(new, 'dtype'):
        yield from _compare_arrays(old, new, where)
    elif (type(old), repr(old)) != (type(new), repr(new)):
        yield f'{where}: {_short(old)} -> {_short(new)}'


def _compare_arrays(old: Any, new: Any, where: str) -> Iterator[str]:
    """The same of two tensors, or of two arrays."""
    import numpy as np
    import torch

    kinds = [f'{array.dtype} {tuple(array.shape)}' for array in (old, new)]
    if kinds[0] != kinds[1]:
        yield f'{where}: {kinds[0]} -> {kinds[1]}'
        return
    wide = old.dtype == torch.bfloat16  # which numpy does not have
    old, new = (np.asarray(array.float() if wide else array) for array in (old, new))
    one, other = (np.frombuffer(array.tobytes(), np.uint8).reshape(-1, array.itemsize) for array in (old, new))
    differing = int((one != other).any(1).sum())
    if differing and old.size == 1:
        yield f'{where}: {old.item()} -> {new.item()}'
    elif differing:
        largest = np.abs(new.astype(np.float64) - old.astype(np.float64)).max() if old.dtype.kind in 'biuf' else '?'
        yield f'{where}: {differing} of {old.size} values differ, by up to {largest:.2g}'


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f'{text[:57]}...'


if __name__ == '__main__':
    main()
