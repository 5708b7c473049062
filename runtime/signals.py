"""SIGTERM and SIGINT: a run that is asked to stop does so when it is ready, and in order."""

import contextlib
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

RUN_ID = 'plain-command'  # of processes that a plain command started, by --gpu-devices or --max-restarts
PASSED_ON = 1  # second within which a launcher passes a signal on that its processes have had as well


class Stopped(BaseException):  # as KeyboardInterrupt: no `except Exception` may take it for a fault
    """The run was asked to stop. `together`: all its processes stop here, after the same step."""

    def __init__(self, number: int, saved: Path | None = None, together: bool = False):
        self.signal, self.together = number, together
        text = f'Stopped by {signal.Signals(number).name}'
        super().__init__(f'{text} after saving {saved}. {_how_to_go_on()}' if saved else text)


def _how_to_go_on() -> str:
    if int(os.environ.get('GROUP_WORLD_SIZE', 1)) > 1:
        return 'Go on with the same command on each host, and --auto-resume'
    launcher = ['python']
    if os.environ.get('TORCHELASTIC_RUN_ID', RUN_ID) != RUN_ID:
        launcher = ['torchrun', '--standalone', '--nproc-per-node', os.environ['LOCAL_WORLD_SIZE']]
    command = [word for word in sys.argv if word not in ('--overwrite', '--auto-resume')]
    return f'Go on with:\n{shlex.join([*launcher, *command, "--auto-resume"])}'


@dataclass
class _Stop:
    """The signal that came, and whether it has to wait for the end of a step."""

    signal: int = 0
    time: float = 0.0
    held: bool = False
    ending: bool = False  # `Stopped` was raised


_stop = _Stop()


def waiting() -> int:
    """The signal that waits, 0 for none."""
    return _stop.signal


def hold() -> None:
    """From now on a signal to stop waits until somebody asks for it: `waiting`, or `release`."""
    _stop.held = True


def release() -> None:
    """From now on a signal ends the run wherever it is; one that waits does so here."""
    _stop.held = False
    if _stop.signal:
        _stop.ending = True
        raise Stopped(_stop.signal)


def ignore() -> None:
    """A run that fails has nothing more to save: from now on SIGTERM ends it silently, as a launcher means it."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextlib.contextmanager
def heeded() -> Iterator[None]:
    """SIGTERM and SIGINT end the run with `Stopped`, at once or when it is ready; a second SIGINT always at once."""
    _stop.signal, _stop.held, _stop.ending = 0, False, False
    before = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, _heed) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _heed(number: int, _) -> None:
    passed_on = 'LOCAL_RANK' in os.environ and time.monotonic() - _stop.time <= PASSED_ON
    again = _stop.signal and not passed_on
    if not _stop.signal:
        _stop.signal, _stop.time = number, time.monotonic()
    at_once = again and number == signal.SIGINT
    if _stop.ending:  # the run is on its way out, where nothing would catch a second `Stopped`
        if at_once:
            os._exit(128 + number)
    elif at_once or not _stop.held:
        _stop.ending = True
        raise Stopped(number)
