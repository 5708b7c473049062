"""The console: a terminal, a pipe or a file that may be missing, full or closed while a program runs."""

import contextlib
import errno
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, TextIO

from runtime.errors import UserError


class Console:
    """A standard stream that drops what it cannot write, and calls `lost(problem)` once, at the first failure.

    Characters missing in its encoding are written as escape sequences.

    stream:  None if it was closed when Python started
    problem: why it cannot be written, '' as long as it can be
    """

    def __init__(self, stream: 'TextIO | Console | None', lost: Callable[[str], object] = lambda _: None):
        self.stream: TextIO | None = stream.stream if isinstance(stream, Console) else stream
        self.lost, self.problem = lost, ''

    def write(self, text: str) -> None:
        self._try(lambda stream: _write(stream, text))

    def flush(self) -> None:
        if self.stream is not None:
            self._try(lambda stream: stream.flush())

    def isatty(self) -> bool:
        with contextlib.suppress(OSError, ValueError):  # it was closed
            return self.stream is not None and not self.problem and self.stream.isatty()
        return False

    def __getattr__(self, name: str) -> Any:  # encoding, fileno, ...
        return getattr(self.stream, name)

    def _try(self, act: Callable[[TextIO], object]) -> None:
        if self.problem:
            return
        try:
            if self.stream is None:
                raise OSError(errno.EBADF, os.strerror(errno.EBADF))
            act(self.stream)
        except (OSError, ValueError) as problem:  # ValueError: it was closed
            self.problem = getattr(problem, 'strerror', None) or str(problem)
            _discard(self.stream)
            self.lost(self.problem)


def _write(stream: TextIO, text: str) -> None:
    try:
        stream.write(text)
    except UnicodeEncodeError:
        stream.write(text.encode(stream.encoding, 'backslashreplace').decode(stream.encoding))


def _discard(stream: Any) -> None:
    """Redirect the unwritten rest to the null device: otherwise Python would try again on exit, and fail."""
    with contextlib.suppress(OSError, ValueError, AttributeError), open(os.devnull, 'wb') as nowhere:
        os.dup2(nowhere.fileno(), stream.fileno())  # streams in memory have no fileno


def end(problem: str) -> None:
    """Ends a command whose output can no longer be written."""
    raise UserError(f'stdout cannot be written: {problem}')


@contextlib.contextmanager
def guarded() -> Iterator[None]:
    """In this context a failure of stdout raises UserError, and a failure of stderr is ignored."""
    for file in range(3):  # a file that is opened later must not become stdin, stdout or stderr
        try:
            os.fstat(file)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
    streams = sys.stdout, sys.stderr
    consoles = sys.stdout, sys.stderr = Console(sys.stdout, end), Console(sys.stderr)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = streams
        for console in consoles:
            with contextlib.suppress(UserError):  # the command has ended; what cannot be written is discarded
                console.flush()


def report(text: str) -> None:
    """Write to stderr if possible."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        sys.stderr.write(text)
