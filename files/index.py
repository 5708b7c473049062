"""An index on disk of one model's features of the images in any number of galleries.

Each model has a folder of mode 0700, which contains
- rows-{generation}.f32: float32 features, one row per image; rows are appended and never changed;
- index.sqlite: for each file its row, and its size and modification time when it was read; and facts such as
  thresholds.

A transaction writes the rows before the table refers to them. If the process is killed, the table is unchanged, and the
appended rows are overwritten later. Several processes may use an index at once: a transaction takes milliseconds, and
only one process writes at a time.
"""

import contextlib
import json
import os
import re
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from files.paths import Stamp, stamp_of
from runtime.errors import UserError, plain
from runtime.tiles import NONE, Points, distances_of, in_threads, nearer, nearest_host, points_of, squared_distances

WIDTH = 16384  # rows that are compared at a time: 32 MB of 512 dimensions
QUERIES = 1024  # that are compared at a time, by each thread: 64 MB of distances
WASTE = 1000  # unused rows may exceed the used ones by at most this number
LOCK_SECONDS = 60  # seconds to wait for a transaction of another process

TABLES = """
CREATE TABLE IF NOT EXISTS files (path BLOB PRIMARY KEY, size INTEGER, modified INTEGER, row INTEGER) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value TEXT);
"""


class Gallery(NamedTuple):
    """The images to search: their paths (G) and rows (G,), and all features of the index, memory-mapped."""

    paths: list[str]
    rows: np.ndarray
    points: Points

    def nearest(self, features: Tensor, k: int, distance: str) -> tuple[np.ndarray, np.ndarray]:
        """Gallery indices and distances of the k nearest images of each query, (Q, k) int64 and float32.

        The search is exact: ranks and ties are those of `ranking.rank`. With fewer than k images the last indices are
        -1, and their distances NaN.

        features: (Q, D), of the queries
        distance: the one passed to `Index.gallery`
        """
        order = np.argsort(self.rows, kind='stable')  # (G,) in the order of the file
        parts = [self._nearest(some, order, k, distance) for some in features.split(QUERIES)]
        return np.concatenate([places for places, _ in parts]), np.concatenate([distances for _, distances in parts])

    def _nearest(self, features: Tensor, order: np.ndarray, k: int, distance: str) -> tuple[np.ndarray, np.ndarray]:
        queries = points_of('query', features, distance)[:]
        keys = np.full((len(features), k), NONE)  # (Q, k)
        lock, spare = Lock(), list[Tensor]()

        def work(places: np.ndarray) -> None:
            rows = self.rows[places]  # (W,) ascending
            first, last = int(rows[0]), int(rows[-1]) + 1
            part: slice | Tensor = slice(first, last) if last - first == len(rows) else torch.from_numpy(rows)
            some, scales = self.points.features[part], self.points.scales
            if scales is None:
                block = squared_distances(queries, Points(some, self.points.norms[part]))  # (Q, W)
            else:  # into reused memory: allocating it would take longer than the rest
                memory = spare.pop() if spare else torch.empty(WIDTH, some.size(1))
                torch.mul(some, scales[part, None], out=memory[: len(rows)])
                block = squared_distances(queries, Points(memory[: len(rows)], self.points.norms[part]))
                spare.append(memory)
            block_keys = nearest_host(block, places, keys.copy())
            with lock:
                keys[:] = nearer(keys, block_keys)

        tasks = [(order[left : left + WIDTH],) for left in range(0, len(order), WIDTH)]
        in_threads(work, tasks, self.points.features.device)
        return np.where(keys < NONE, keys & 0xFFFFFFFF, -1), distances_of(keys)


class Index:
    """The index of one model in the folder `root`.

    digest:   identifies the model and how it is used; each digest has a folder of its own
    feat_dim: D, length of a feature

    Raises:
        UserError: it cannot be created, read or written, or is damaged.
    """

    def __init__(self, root: str | os.PathLike, digest: str, feat_dim: int):
        self.folder, self.feat_dim = Path(root) / digest, feat_dim
        with self._explained():
            for folder in (*reversed(self.folder.parents), self.folder):
                if not folder.is_dir():
                    folder.mkdir(0o700, exist_ok=True)
            self.folder.chmod(0o700)
            self.table = sqlite3.connect(self.folder / 'index.sqlite', LOCK_SECONDS, isolation_level=None)
            self.table.executescript(TABLES)

    def stale(self, paths: Iterable[str]) -> dict[str, Stamp]:
        """The files among `paths` that are new or have changed since they were added, with their current stamps.

        A file that does not exist has the stamp (-1, -1).
        """
        with self._reading():
            known = {path: stamp for path, *stamp in self.table.execute('SELECT path, size, modified FROM files')}
        stamps = {path: stamp_of(path) for path in paths}
        return {path: stamp for path, stamp in stamps.items() if known.get(os.fsencode(path)) != [*stamp]}

    def add(self, files: Mapping[str, Stamp], features: Tensor) -> None:
        """Store the features (N, D), float32, of files, with the stamps that the files had before they were read."""
        with self._writing():
            first, path = self._fact('next', 0), self._rows_file()
            if first:
                self._check_length(path, first)
            with open(path, 'r+b' if path.exists() else 'xb') as file:
                file.seek(first * self.feat_dim * 4)
                file.write(features.numpy().astype('<f4').tobytes())
                file.flush()
                os.fsync(file.fileno())
            self.table.executemany(
                'INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?)',
                [(os.fsencode(path), *stamp, first + row) for row, (path, stamp) in enumerate(files.items())],
            )
            self._put('next', first + len(files))

    def _check_length(self, path: Path, number: int) -> None:
        if not path.exists() or path.stat().st_size < 4 * number * self.feat_dim:
            raise sqlite3.DatabaseError(f'{path.name} is too short')

    def drop(self, folders: Iterable[str], present: Iterable[str], unread: Iterable[str] = ()) -> int:
        """Remove the entries of files below `folders` that no longer exist or are in `unread`. Returns how many.

        present: files that are there, which need not be looked for. Another search may have added others meanwhile.
        """
        kept, unreadable, dropped = {*map(os.fsencode, present)}, {*map(os.fsencode, unread)}, 0
        with self._writing():
            for folder in {os.fsencode(folder).rstrip(b'/') for folder in folders}:
                within = folder + b'/', folder + b'0'  # '0' follows '/'
                known = self.table.execute('SELECT path FROM files WHERE path > ? AND path < ?', within)
                gone = [(path,) for (path,) in known if path not in kept and (path in unreadable or _is_gone(path))]
                self.table.executemany('DELETE FROM files WHERE path = ?', gone)
                dropped += len(gone)
        return dropped

    def tidy(self) -> None:
        """If most rows are unused, copy the used ones to a new file and remove the old file."""
        with self._writing():
            files = self.table.execute('SELECT row, path FROM files ORDER BY row').fetchall()
            number, path, generation = self._fact('next', 0), self._rows_file(), self._fact('generation', 0)
            if tidied := number > 2 * len(files) + WASTE:
                features = np.memmap(path, '<f4', 'r', shape=(number, self.feat_dim))
                path = self._rows_file(generation + 1)
                with open(path, 'wb') as file:
                    for left in range(0, len(files), WIDTH):
                        file.write(features[[row for row, _ in files[left : left + WIDTH]]].tobytes())
                    file.flush()
                    os.fsync(file.fileno())
                moved = [(row, path) for row, (_, path) in enumerate(files)]
                self.table.executemany('UPDATE files SET row = ? WHERE path = ?', moved)
                self._put('next', len(files))
                self._put('generation', generation + 1)
        if tidied:
            for old in range(generation + 1):  # including files left by a killed process
                self._rows_file(old).unlink(missing_ok=True)

    def gallery(self, paths: Sequence[str], distance: str) -> Gallery:
        """The files among `paths` that are in the index, in this order, with their features and the features' norms.

        Raises:
            UserError: features are not finite, or files of the index are damaged.
        """
        with self._reading():
            known = dict(self.table.execute('SELECT path, row FROM files'))
            number = self._fact('next', 0)
            path = self._rows_file()
            if not number:
                features = np.zeros((0, self.feat_dim), np.float32)
            else:
                self._check_length(path, max(number, max(known.values(), default=0) + 1))
                features = np.memmap(path, '<f4', 'c', shape=(number, self.feat_dim))
        held = [path for path in paths if os.fsencode(path) in known]
        rows = np.array([known[os.fsencode(path)] for path in held], np.int64)  # (G,)
        whole = torch.from_numpy(features)
        return Gallery(held, rows, points_of('gallery', whole, distance))

    def fact(self, name: str) -> Any:
        """The value stored under a name, None if there is none."""
        with self._reading():
            return self._fact(name, None)

    def keep(self, name: str, value: Any) -> None:
        """Store a value that JSON can express under a name."""
        with self._writing():
            self._put(name, value)

    def _fact(self, name: str, default: Any) -> Any:
        row = self.table.execute('SELECT value FROM facts WHERE name = ?', (name,)).fetchone()
        return json.loads(row[0]) if row else default

    def _put(self, name: str, value: Any) -> None:
        self.table.execute('INSERT OR REPLACE INTO facts VALUES (?, ?)', (name, json.dumps(value)))

    def _rows_file(self, generation: int | None = None) -> Path:
        return self.folder / f'rows-{self._fact("generation", 0) if generation is None else generation}.f32'

    def _reading(self) -> contextlib.AbstractContextManager[None]:
        """A transaction: all reads in it see one state, and no file of rows is removed meanwhile."""
        return self._transaction('BEGIN')

    def _writing(self) -> contextlib.AbstractContextManager[None]:
        """A write transaction: one process at a time, complete or without effect."""
        return self._transaction('BEGIN IMMEDIATE')

    @contextlib.contextmanager
    def _transaction(self, begin: str) -> Iterator[None]:
        with self._explained():
            self.table.execute(begin)
            try:
                yield
                self.table.execute('COMMIT')
            except BaseException:
                if self.table.in_transaction:
                    self.table.execute('ROLLBACK')
                raise

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        where = plain(str(self.folder), 500)
        try:
            yield
        except sqlite3.OperationalError as problem:  # a full disk, a folder that cannot be written
            raise UserError(f'the index {where} cannot be used ({problem}); choose another --index') from problem
        except (sqlite3.DatabaseError, ValueError, TypeError) as problem:
            raise UserError(
                f'the index {where} is damaged ({plain(str(problem))}); remove it with --forget'
            ) from problem
        except OSError as problem:
            raise UserError(
                f'the index {where} cannot be used ({problem.strerror}); choose another --index'
            ) from problem


def _is_gone(path: bytes) -> bool:
    """Whether the file does not exist; one that cannot be reached at the moment may."""
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError:
        pass
    return False


def forget(root: str | os.PathLike, digest: str = '') -> list[Path]:
    """Remove the index of the model `digest`, or by default all indices, from the folder `root`, and nothing else.

    Returns the removed folders.

    Raises:
        UserError: one cannot be removed.
    """
    removed = []
    for folder in [Path(root) / digest] if digest else sorted(Path(root).glob('*')):
        if not re.fullmatch('[0-9a-f]{16}', folder.name) or not (folder / 'index.sqlite').is_file():
            continue
        try:
            for path in folder.iterdir():
                if path.name.startswith('index.sqlite') or path.match('rows-*.f32'):
                    path.unlink()
            folder.rmdir()
        except OSError as problem:
            raise UserError(f'the index {folder} cannot be removed ({problem.strerror})') from problem
        removed.append(folder)
    return removed


def default_root() -> Path:
    """The default folder of the indices, in the user's cache. It begins with ~ if the user has no home folder."""
    cache = os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache')
    return Path(cache) / 'deep-person-reid' / 'index'
