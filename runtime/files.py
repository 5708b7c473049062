"""Files that are complete or absent, and disks that fail."""

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

BLOCK = 1 << 24  # bytes that are written at once


def write_whole(fpath: str | Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `fpath`, then rename it: a file of that name is always complete.

    The data reach the disk before the name does, and the name before this returns: a power failure leaves the old file
    or the new one. Raises OSError if it cannot be written; the old file is then untouched.
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


def allocate(fpath: str | Path) -> None:
    """Reserve the disk space of a file; writing into the memory map of a file on a full disk would raise SIGBUS.

    Raises OSError if there is not enough.
    """
    with open(fpath, 'r+b') as file:
        size = os.fstat(file.fileno()).st_size
        if hasattr(os, 'posix_fallocate'):
            os.posix_fallocate(file.fileno(), 0, size)
            return
        for start in range(0, size, BLOCK):  # macOS
            file.seek(start)
            block = file.read(BLOCK)
            file.seek(start)
            file.write(block)


def free_space(folder: str | Path) -> int:
    """Free bytes on the disk of `folder`; -1 if unknown: some network file systems report zeros."""
    with contextlib.suppress(OSError):
        usage = shutil.disk_usage(folder)
        return usage.free if usage.total else -1
    return -1


class Unwritten(list[str]):
    """The files that could not be written although the run continued; they make its exit status 2."""

    @contextlib.contextmanager
    def excuse(self, fpath: str | Path) -> Iterator[None]:
        """A failure to write `fpath` in this context is reported, and the run continues."""
        try:
            yield
        except OSError as problem:
            self.report(fpath, problem, 'the old file is untouched, and the run continues')

    def report(self, fpath: str | Path, problem: OSError, consequence: str) -> None:
        self.append(f'{fpath}: {problem.strerror or problem}')
        print(f'error: {self[-1]}; {consequence}')
