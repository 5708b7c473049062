"""Writes files completely or not at all, and reports writes that fail."""

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from runtime.errors import UserError, plain

BYTES_AT_ONCE = 1 << 24  # bytes per write


def write_whole(fpath: str | Path, write: Callable[[Path], object], *also: str | Path) -> None:
    """Let `write` fill a temporary file beside `fpath`, then rename it: a file of that name is always complete.

    The data are flushed to disk before the file is renamed, and the new name before this returns, so a power failure
    leaves either the old file or the new one. Raises OSError if it cannot be written; the old file is then unchanged.

    also: further names in the same folder for the same contents: hard links if the file system supports them, else
          copies. They are replaced after everything is written and before `fpath`, so if `fpath` is new, they are too.
    """
    paths = [Path(fpath), *map(Path, also)]
    temporaries = [path.with_name(f'.{path.name}.{os.getpid()}') for path in paths]
    first, *doubles = temporaries
    paths[0].parent.mkdir(parents=True, exist_ok=True)
    try:
        for temporary in temporaries:
            temporary.unlink(missing_ok=True)  # a killed process may have left a link to a file in use
        write(first)
        for double in doubles:
            _double(first, double)
        for temporary in temporaries:
            with open(temporary, 'r+b') as file:  # Windows flushes only files opened for writing
                os.fsync(file.fileno())
        try:
            for double, path in zip(doubles, paths[1:], strict=True):
                double.replace(path)
        finally:
            first.replace(paths[0])
    finally:
        for temporary in temporaries:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
    _sync(paths[0].parent)


def check_new(fpath: str) -> None:
    """Raise UserError if the file exists, to fail before the work rather than after it."""
    if os.path.lexists(fpath):
        raise UserError(f'{plain(fpath, 500)} exists and is not overwritten; choose another name')


@contextlib.contextmanager
def new_file(fpath: str) -> Iterator[Path]:
    """A temporary file beside `fpath` for the context to fill and check; it is renamed when the context ends.

    If anything fails or the process is killed, `fpath` is not created. If another process creates it meanwhile, it is
    kept.

    Raises:
        UserError: it exists, or cannot be written.
    """
    check_new(fpath)
    path = Path(fpath)
    temporary = path.with_name(f'.{path.name}.{os.getpid()}')
    try:
        temporary.unlink(missing_ok=True)
        temporary.touch()  # fails now, not after the work, if the folder is not writable
        yield temporary
        with open(temporary, 'r+b') as file:
            os.fsync(file.fileno())
        _name(temporary, path)
        _sync(path.parent)
    except OSError as problem:
        check_new(fpath)  # another process may have created it meanwhile
        target = plain(fpath, 500)
        raise UserError(f'{target} cannot be written ({problem.strerror}); choose another place') from problem
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def torch_errors() -> Iterator[None]:
    """Raise the OSError of a failed write, such as on a full disk, which torch replaces by a RuntimeError."""
    try:
        yield
    except RuntimeError as problem:
        if isinstance(problem.__context__, OSError):
            raise problem.__context__ from None
        raise


def _name(temporary: Path, path: Path) -> None:
    """Rename a file; FileExistsError if the new name exists."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise
    except OSError:  # the file system has no hard links
        path.touch(exist_ok=False)
        temporary.replace(path)


def _sync(folder: Path) -> None:
    """Flush the names in a folder to disk."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except PermissionError:  # Windows cannot open folders; elsewhere it must be readable
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _double(fpath: Path, double: Path) -> None:
    """Give the file a second name. Later writes replace names, so neither changes the contents of the other."""
    try:
        os.link(fpath, double)
    except OSError:  # the file system has no hard links
        shutil.copyfile(fpath, double)


def allocate(fpath: str | Path) -> None:
    """Reserve the disk space of a file, because writing to a memory map on a full disk would raise SIGBUS.

    Raises OSError if there is not enough.
    """
    with open(fpath, 'r+b') as file:
        size = os.fstat(file.fileno()).st_size
        if hasattr(os, 'posix_fallocate'):
            os.posix_fallocate(file.fileno(), 0, size)
            return
        for start in range(0, size, BYTES_AT_ONCE):  # macOS
            file.seek(start)
            block = file.read(BYTES_AT_ONCE)
            file.seek(start)
            file.write(block)


def free_space(folder: str | Path) -> int:
    """Free bytes on the disk of `folder`; -1 if unknown, because some network file systems report zero."""
    with contextlib.suppress(OSError):
        usage = shutil.disk_usage(folder)
        return usage.free if usage.total else -1
    return -1


class Unwritten(list[str]):
    """The files that could not be written although the run continued; if there are any, its exit status is 2."""

    @contextlib.contextmanager
    def excuse(self, fpath: str | Path) -> Iterator[None]:
        """Report a failure to write `fpath` in this context, and let the run continue."""
        try:
            yield
        except OSError as problem:
            self.report(problem.filename2 or fpath, problem, 'the old file is untouched, and the run continues')

    def report(self, fpath: str | Path, problem: OSError, consequence: str) -> None:
        self.append(f'{fpath}: {problem.strerror or problem}')
        print(f'error: {self[-1]}; {consequence}')
