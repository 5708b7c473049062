"""How a run starts and ends: its log, its lock, its exit status, and the last save of a failing run."""

import contextlib
import datetime
import errno
import os
import platform
import signal
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

from arguments import Arguments, ExperimentParser, RunOptions
from files.writing import Unwritten
from runtime import commands, console, device, memory, processes
from runtime.device import Run
from runtime.errors import UserError
from runtime.processes import Group
from runtime.signals import STOPS, Signals, Stopped
from runtime.system import fcntl
from utils import Logger, mkdir_if_missing

# Exit statuses after which --max-restarts does not restart
ENDS = (0, UserError.status, *(128 + number for number in (*STOPS, signal.SIGQUIT)))

Experiment = Callable[[Arguments, Run], object]
End = tuple[int, str]  # exit status, and the text for stderr and the log


def main(experiment: Experiment, parser: ExperimentParser) -> None:
    """Run `experiment(args, run)` with the command-line arguments, logging to a file in `--save-dir`.

    With several `--gpu-devices` this process only starts one process per GPU, with the same command. The first of these
    prints and logs.

    A mistake of the user (`UserError`) is reported in one line on stderr, with exit status 2; an error in the code
    keeps its traceback, with status 1; after a signal the status is 128 + its number. All are logged. If several
    processes fail, only the first one reports its error, and all exit with its status. If a file or the console could
    not be written during the run, the exit status is 2.
    """
    if status := commands.status_of(lambda: _main(experiment, parser)):
        processes.end(status)


def _main(experiment: Experiment, parser: ExperimentParser) -> int:
    ours = processes.of_environment()
    args = parser.parse_args()
    path = Path(args.save_dir) / ('log_test.txt' if args.evaluate else 'log_train.txt')
    supervises = not ours.started and (args.run.several_gpus or args.run.max_restarts > 0)
    unwritten = Unwritten()
    with contextlib.ExitStack() as stack:
        try:
            if ours.is_first and not supervises and not args.evaluate:
                stack.enter_context(_alone_in(args.save_dir))
            log = stack.enter_context(Logger(path, unwritten)) if ours.is_first else None
        except OSError as problem:
            raise UserError(
                f'--save-dir: {problem.filename} cannot be written ({problem.strerror}); choose another folder'
            ) from problem
        if log is None:
            stack.enter_context(_silence())
        status, text = _supervise(args.run) if supervises else _run(experiment, args, Group(ours), unwritten, log)
        if not status and unwritten:
            number = f'{len(unwritten)} files' if len(unwritten) > 1 else '1 file'
            status, text = 2, f'error: {number} could not be written, the first was {unwritten[0]}\n'
    if text:
        console.report(text)
        with contextlib.suppress(OSError), open(path, 'a', encoding='utf-8', errors='backslashreplace') as file:
            file.write(text)
    return status or (2 if log and log.problem else 0)


def _run(experiment: Experiment, args: Arguments, group: Group, unwritten: Unwritten, log: Logger | None) -> End:
    started = time.time()
    signals = Signals(group.processes)
    run: Run | None = None
    with signals.handled():
        try:
            try:
                print(f'==========\nArgs:{args.plain()}\n==========')
                run = device.start(args.run, group, signals, unwritten, log)
                experiment(args, run)
                group.leave()
                elapsed = datetime.timedelta(seconds=round(time.time() - started))
                print(f'Finished. Total elapsed time (h:m:s): {elapsed}')
                return 0, ''
            except Exception as problem:
                testing = args.evaluate or bool(run and run.testing)
                signals.hold()
                precision = (run.test_precision if testing else run.precision) if run else ''
                return _end(memory.explained(problem, args, testing, precision), run, group, signals)
        except Stopped as stopped:
            if stopped.together:
                print(stopped)
                with contextlib.suppress(RuntimeError):  # another process ended without leaving
                    group.leave()
            else:  # before the first batch, or in a test, before which the position was saved; or a second SIGINT
                saved = '' if signals.held else _rescue(run)
                print(f'{stopped}; {saved}' if saved else stopped)
            return 128 + stopped.signal, ''


def _end(problem: Exception, run: Run | None, group: Group, signals: Signals) -> End:
    """Exit status and text for a run that raised an exception: its message, and where the run was saved."""
    saved = ''
    if processes.lost_another(problem):  # in the middle of a step, so nothing is saved
        end = time.monotonic() + processes.REPORT_SECONDS
        while not (group.has_failed() or signals.waiting) and time.monotonic() < end:
            time.sleep(0.01)
        if signals.waiting and not group.has_failed():
            return 128 + signals.waiting, ''  # the launcher reports the killed process
    else:
        saved = _rescue(run)
    if isinstance(problem, UserError):
        return group.agree(problem.status, f'error: {problem}; {saved}\n' if saved else f'error: {problem}\n')
    fault = ''.join(traceback.format_exception(problem))
    return group.agree(1, f'{fault}{saved}\n' if saved else fault)


def _rescue(run: Run | None) -> str:
    """Save the state of the run unless it is already saved. Returns a message with the path, or ''."""
    with contextlib.suppress(Exception):  # if the device has failed; that error is reported anyway
        if run and run.rescue and (path := run.rescue()):
            return f'saved {path}, from which --auto-resume continues'
    return ''


def _supervise(options: RunOptions) -> End:
    """Start one process per GPU, or a single one; after a failure restart all, at most --max-restarts times."""
    try:
        number = len(device.gpus(options)) if options.several_gpus else 1
    except UserError as mistake:
        return mistake.status, f'error: {mistake}\n'
    for attempt in range(options.max_restarts + 1):
        more = [] if attempt == 0 or options.evaluate else ['--auto-resume']
        status, text = processes.start_all(number, more)
        if status in ENDS or attempt == options.max_restarts:
            break
        reason = text.removeprefix('error: ').strip() or f'the run ended with status {status}'
        print(f'{reason}; restarting, {attempt + 1} of {options.max_restarts}')
    return status, text


@contextlib.contextmanager
def _alone_in(save_dir: str) -> Iterator[None]:
    """Lock `save_dir` against other training runs. The lock is released when the process ends for any reason."""
    mkdir_if_missing(save_dir)
    with open(Path(save_dir) / '.lock', 'a', encoding='ascii') as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not flock, which the workers of a killed run would keep
        except OSError as problem:
            if problem.errno not in (errno.EACCES, errno.EAGAIN):  # other errors: the file system has no locks
                yield
                return
            owner = Path(file.name).read_text(encoding='ascii') or 'on another host'
            raise UserError(
                f'--save-dir {save_dir}: another training run is writing there (process {owner}); choose another folder'
            ) from None
        with contextlib.suppress(OSError):  # a full disk; the lock works without its owner's name
            os.ftruncate(file.fileno(), 0)
            os.write(file.fileno(), f'{os.getpid()} on {platform.node()}'.encode('ascii', 'replace'))
        yield


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Suppress output and warnings: only the first process prints."""
    warnings.simplefilter('ignore')
    with open(os.devnull, 'w', encoding='utf-8', errors='replace') as nowhere, contextlib.redirect_stdout(nowhere):
        yield
