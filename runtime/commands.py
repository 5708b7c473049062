"""Command lines: a mistake is reported in one line and ends the command with status 2."""

import argparse
import sys
from collections.abc import Callable
from typing import NoReturn

from runtime.errors import UserError


class Parser(argparse.ArgumentParser):
    """An argparse parser that reports a mistake without printing its usage."""

    def error(self, message: str) -> NoReturn:
        refuse(message.removeprefix('argument '))


def refuse(message: str, status: int = UserError.status) -> NoReturn:
    """Report a mistake and exit."""
    sys.stderr.write(f'error: {message}\n')
    sys.exit(status)


def run(main: Callable[[], int | None]) -> NoReturn:
    """Exit with the status that `main` returns, or with its UserError."""
    try:
        status = main()
    except UserError as mistake:
        refuse(str(mistake), mistake.status)
    sys.exit(status or 0)
