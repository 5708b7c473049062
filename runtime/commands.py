"""Command lines: a mistake is reported in one line, and the command exits with status 2."""

import argparse
import signal
import sys
from collections.abc import Callable
from typing import NoReturn

from runtime import console, memory
from runtime.errors import UserError


class Parser(argparse.ArgumentParser):
    """An argparse parser that reports a mistake without printing the usage."""

    def error(self, message: str) -> NoReturn:
        refuse(message.removeprefix('argument '))


def refuse(message: str, status: int = UserError.status) -> NoReturn:
    """Report a mistake and exit."""
    console.report(f'error: {message}\n')
    sys.exit(status)


def status_of(main: Callable[[], int | None]) -> int:
    """The status that `main` returns or exits with, or that of its UserError, which is reported.

    A console that cannot be written counts as a UserError. Ctrl-C ends the command without a message.
    """
    with console.guarded():
        try:
            try:
                status = main()
            except SystemExit as end:  # as after -h, or a mistake that has been reported
                if isinstance(end.code, str):
                    raise
                if end.code:
                    return end.code
                status = 0
            sys.stdout.flush()
            return status or 0
        except UserError as mistake:
            console.report(f'error: {mistake}\n')
            return mistake.status
        except KeyboardInterrupt:
            return 128 + signal.SIGINT
        except Exception as problem:
            if not (whose := memory.exhausted(problem)):
                raise
            console.report(f'error: the memory of the {whose} ran out ({memory.reason(problem)})\n')
            return UserError.status


def run(main: Callable[[], int | None]) -> NoReturn:
    """Exit with the status that `main` returns, or with that of its UserError."""
    sys.exit(status_of(main))
