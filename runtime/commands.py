"""The command line of `python NAME.py ...`: every mistake is one line on stderr."""

import argparse
import sys
from collections.abc import Callable
from typing import NoReturn

from runtime.errors import UserError


class Parser(argparse.ArgumentParser):
    """An argparse parser that reports an error in one line, without the usage, and exits with status 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(UserError.status, f'error: {message.removeprefix("argument ")}\n')


def run(main: Callable[[], object]) -> None:
    """Call `main`; a UserError in it is printed as one line, and its status becomes the exit status."""
    try:
        main()
    except UserError as mistake:
        sys.stderr.write(f'error: {mistake}\n')
        sys.exit(mistake.status)
