"""Writes features so that an interrupted `python extract.py` can resume and an incomplete folder is never visible."""

import contextlib
import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from files import paths
from files.writing import write_whole
from runtime.errors import UserError, plain
from runtime.system import fcntl

STAMPS = 'stamps'  # in an unfinished folder: a line for each item with the size and time of its files


def _stamps(item: paths.Paths) -> str:
    return json.dumps([paths.stamp_of(path) for path in ([item] if isinstance(item, str) else item)])


class Draft:
    """Context manager that writes features as they arrive and resumes after an interrupted call.

    Until all have arrived they are in `.NAME.unfinished` beside the folder `out`, to which it is then renamed. If an
    earlier call with the same `what` left such a folder, the features of the items at the beginning of both lists are
    kept, up to the first whose files have changed. pids and camids, which are unknown, are -1.

    Args:
        items: paths of N images or tracklets.
        feat_dim: D, length of a feature.
        what: describes the features; written to model.json.
        batch: batch size. Only whole batches of an earlier call are kept.

    Attributes:
        done: number of items whose features are written.

    Raises:
        UserError: `out` exists, is being written by another process, or cannot be written. A UserError raised in the
            context gets the hint that the same command resumes.
    """

    def __init__(
        self, out: str | Path, items: Sequence[paths.Paths], feat_dim: int, what: Mapping[str, object], batch: int
    ):
        self.out, self.items, self.feat_dim = Path(out).absolute(), items, feat_dim
        with self._explained():
            self._check_new()
            self.folder = self.out.with_name(f'.{self.out.name}.unfinished')
            self.folder.mkdir(parents=True, exist_ok=True)
            self.file = os.fdopen(os.open(self.folder / 'features.npy', os.O_RDWR | os.O_CREAT, 0o666), 'r+b')
            try:
                fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                raise UserError(f'-o {plain(str(out), 500)} is being written by another process') from None
            self._check_new()  # another process may just have finished it
            self.done = self._kept(what, batch)
            self.file.truncate(len(self._header()) + self.done * feat_dim * 4)
            self.file.write(self._header())
            write_whole(self.folder / 'paths.jsonl', lambda path: paths.write(path, items))
            write_whole(self.folder / STAMPS, lambda path: path.write_text('\n'.join(map(_stamps, items))))
            write_whole(self.folder / 'model.json', lambda path: path.write_text(json.dumps(what, indent=2) + '\n'))
            self.file.seek(0, os.SEEK_END)

    def _check_new(self) -> None:
        is_empty = self.out.is_dir() and not self.out.is_symlink() and not any(self.out.iterdir())
        if os.path.lexists(self.out) and not is_empty:
            raise UserError(f'-o {plain(str(self.out), 500)} exists; remove it, or choose another folder')

    def _kept(self, what: Mapping[str, object], batch: int) -> int:
        try:
            if json.loads((self.folder / 'model.json').read_text()) != json.loads(json.dumps(what)):
                return 0
            before = (self.folder / 'paths.jsonl').read_text(encoding='ascii').splitlines()
            stamps = (self.folder / STAMPS).read_text().splitlines()
        except (OSError, ValueError):
            return 0
        rows = (os.fstat(self.file.fileno()).st_size - len(self._header())) // (4 * self.feat_dim)
        kept = 0
        for line, stamp, item in zip(before[: max(rows, 0)], stamps, self.items, strict=False):
            if (line, stamp) != (json.dumps(item), _stamps(item)):
                break
            kept += 1
        return kept if kept == len(self.items) else kept // batch * batch

    def _header(self) -> bytes:
        """The header of features.npy. NumPy pads it, so its length does not depend on the number of rows."""
        header = io.BytesIO()
        shape = len(self.items), self.feat_dim
        np.lib.format.write_array_header_1_0(header, {'descr': '<f4', 'fortran_order': False, 'shape': shape})
        return header.getvalue()

    def add(self, features: Tensor) -> None:
        """Write the features (b, D), float32, of the next items."""
        with self._explained():
            self.file.write(features.numpy().astype('<f4').tobytes())
            self.file.flush()
        self.done += len(features)

    def __enter__(self) -> 'Draft':
        return self

    def __exit__(self, kind: type | None, problem: BaseException | None, _: object) -> None:
        if problem is not None:
            with contextlib.suppress(OSError):  # a full disk, which is the problem
                self.file.close()
            if isinstance(problem, UserError):
                at = f'after {self.done} of {len(self.items)}'
                raise UserError(f'{problem}; once that is mended, the same command resumes {at}')
            return
        with self._explained(), contextlib.closing(self.file):
            os.fsync(self.file.fileno())
            for name, value in ('pids', -1), ('camids', -1), ('counts', 1):
                np.save(self.folder / f'{name}.npy', np.full(len(self.items), value))
            self.folder.replace(self.out)
            (self.out / STAMPS).unlink()  # last, so that a failure loses no feature

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as problem:
            where, reason = plain(str(self.out), 500), problem.strerror or problem
            raise UserError(
                f'-o {where} cannot be written ({reason}); choose another folder, or free space'
            ) from problem
