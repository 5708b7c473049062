"""SIGTERM, SIGINT and SIGHUP: a run that is asked to stop finishes its step, saves its state, and exits."""

import contextlib
import os
import shlex
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from runtime import system  # noqa: F401 (Windows has no SIGHUP)
from runtime.processes import Processes, hangup_is_ignored

# Sent to all processes of a run by a batch system, by a terminal on Ctrl-C, and by a terminal that is closed.
STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Stopped(BaseException):  # like KeyboardInterrupt: `except Exception` must not catch it
    """The run was asked to stop. `together`: all its processes stop here, after the same step."""

    def __init__(self, number: int, text: str = '', together: bool = False):
        self.signal, self.together = number, together
        super().__init__(f'Stopped by {signal.Signals(number).name}{text}')


def how_to_continue(processes: Processes) -> str:
    """The command that continues this run."""
    if processes.hosts > 1:
        return 'Continue with the same command and --auto-resume on each host'
    launcher = ['python']
    if processes.by_torchrun:
        launcher = ['torchrun', '--standalone', '--nproc-per-node', str(processes.local_world_size)]
    options = '--overwrite', '--auto-resume'  # argparse accepts their first letters too
    command = [word for word in sys.argv if len(word) < 3 or not any(option.startswith(word) for option in options)]
    return f'Continue with:\n{shlex.join([*launcher, *command, "--auto-resume"])}'


class Signals:
    """The signal that asked this run to stop, and whether the run must first finish a step."""

    def __init__(self, processes: Processes):
        self.processes = processes
        self.waiting = 0  # number of the pending signal, 0 if none
        self.received = 0  # number of signals
        self.held = False  # until the end of a step
        self.ending = False  # `Stopped` was raised

    def hold(self) -> None:
        """From now on a signal stays pending in `waiting` until `release`."""
        self.held = True

    def release(self) -> None:
        """From now on a signal ends the run immediately; a pending one does so here."""
        self.held = False
        if self.waiting:
            self.ending = True
            raise Stopped(self.waiting)

    def stop(self, number: int, saved: Path | None) -> Stopped:
        """The exception that ends all processes after the same step; `saved` is the file to continue from."""
        text = f' after saving {saved}. {how_to_continue(self.processes)}' if saved else ''
        return Stopped(number, text, together=True)

    @contextlib.contextmanager
    def handled(self) -> Iterator[None]:
        """Each of STOPS ends the run with `Stopped`, immediately or, if held, later; a second SIGINT immediately.

        Under a launcher it is the third SIGINT, because the launcher forwards the first one, which a terminal also
        sends to the processes.
        """
        before = {}
        if threading.current_thread() is threading.main_thread():
            numbers = [number for number in STOPS if number != signal.SIGHUP or not hangup_is_ignored()]
            before = {number: signal.signal(number, self._handle) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _handle(self, number: int, _: FrameType | None) -> None:
        self.waiting = self.waiting or number
        self.received += 1
        at_once = number == signal.SIGINT and self.received > (2 if self.processes.started else 1)
        if self.ending:  # the run is already ending, and nothing would catch a second `Stopped`
            if at_once:
                os._exit(128 + number)
        elif at_once or not self.held:
            self.ending = True
            raise Stopped(number)
