"""Files that are whole or absent, and a disk that fails."""

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

unwritten: list[str] = []  # what could not be written although the run went on, see `excused`


def write_whole(fpath: str | Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `fpath`, then rename it: what has that name is always whole.

    The data reach the disk before the name does, and the name before this returns: a power loss leaves the old file
    or the new one. Raises OSError where it cannot be written; what was there is then as it was.
    """
    fpath = Path(fpath)
    fpath.parent.mkdir(parents=True, exist_ok=True)
    temporary = fpath.with_name(f'.{fpath.name}.{os.getpid()}')
    try:
        write(temporary)
        with open(temporary, 'rb') as file:
            os.fsync(file.fileno())
        temporary.replace(fpath)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    folder = os.open(fpath.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


@contextlib.contextmanager
def excused(fpath: str | Path) -> Iterator[None]:
    """Writing `fpath` in here may fail: that is printed, and the run goes on, but ends with status 2."""
    try:
        yield
    except OSError as problem:
        note_unwritten(fpath, problem, 'what was there is untouched, and the run goes on')


def note_unwritten(fpath: str | Path, problem: OSError, consequence: str) -> None:
    unwritten.append(f'{fpath}: {problem.strerror or problem}')
    print(f'error: {unwritten[-1]}; {consequence}')
