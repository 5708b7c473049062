"""The files of items: writing and reading their paths, and finding items that are the same file."""

import json
import os
from collections.abc import Hashable, Iterable, Iterator
from itertools import chain
from pathlib import Path

import numpy as np

from runtime.errors import UserError, plain

Paths = str | tuple[str, ...]  # of an image, or of the frames of a tracklet
Stamp = tuple[int, int]  # size in bytes and modification time in ns


def stamp_of(path: str) -> Stamp:
    """By which a changed file is noticed; (-1, -1) if it does not exist."""
    try:
        status = os.stat(path)
    except OSError:
        return -1, -1
    return status.st_size, status.st_mtime_ns


def write(path: Path, items: Iterable[Paths]) -> None:
    """Write one line per item: a JSON string, or for a tracklet a list of strings, always in ASCII."""
    with open(path, 'w', encoding='ascii') as file:
        file.writelines(json.dumps(paths) + '\n' for paths in items)


def read(path: Path, number: int) -> Iterator[Paths]:
    """The paths of `number` items written by `write`, one by one.

    Raises:
        UserError: the file cannot be read, has a different number of lines, or a line that is not a path or paths.
    """
    line = 0
    try:
        with open(path, encoding='ascii') as file:
            for text in file:
                line += 1
                if line > number:
                    raise ValueError(f'it has lines for more than {number} items')
                paths = json.loads(text)
                frames = paths if isinstance(paths, list) else [paths]
                if not frames or not all(isinstance(frame, str) for frame in frames):
                    raise ValueError('not a path or a list of paths')
                yield tuple(paths) if isinstance(paths, list) else paths
    except (OSError, ValueError, RecursionError) as problem:
        message = getattr(problem, 'msg', str(problem))  # of json, without its own count of lines
        reason = getattr(problem, 'strerror', None) or f'line {line}: {plain(message)}'
        raise UserError(f'{path} cannot be read ({reason}); write it with --evaluate --save-features') from problem
    if line != number:
        raise UserError(f'{path} has {line} lines for {number} items; write it with --evaluate --save-features')


def same_files(
    q_pids: np.ndarray, g_pids: np.ndarray, query: Iterable[Paths], gallery: Iterable[Paths]
) -> tuple[np.ndarray, np.ndarray]:
    """(Q,) and (G,) int64: a query and a gallery item of the same pid have equal numbers if they are the same file.

    Two paths are the same file if a symbolic or hard link connects them; two tracklets are, if their frames are, in
    order. Copies are different files. Files that do not exist are compared by name. Only items whose pid is in both
    sets are looked up.
    """
    pids = np.concatenate([q_pids, g_pids])
    shared = np.isin(pids, np.intersect1d(q_pids, g_pids))  # (Q + G,)
    numbers = np.arange(len(pids))  # each item is its own file
    alike: dict[Hashable, list[tuple[int, tuple[str, ...]]]] = {}  # items of equal pid, length and first file
    for row, (paths, pid, look) in enumerate(zip(chain(query, gallery), pids.tolist(), shared.tolist(), strict=True)):
        if look:
            frames = (paths,) if isinstance(paths, str) else tuple(paths)
            alike.setdefault((pid, len(frames), file_id(frames[0])), []).append((row, frames))
    for items in alike.values():
        if len(items) > 1:
            known: dict[Hashable, int] = {}
            for row, frames in items:
                numbers[row] = known.setdefault(tuple(map(file_id, frames[1:])), row)
    return numbers[: len(q_pids)], numbers[len(q_pids) :]


def without_links(paths: Iterable[str]) -> list[str]:
    """The absolute paths, with the symbolic links of their folders followed, which are looked up once each."""
    folders: dict[str, str] = {}
    resolved = []
    for path in paths:
        head, tail = os.path.split(path)
        if head not in folders:
            folders[head] = os.path.realpath(head)
        resolved.append(os.path.join(folders[head], tail))
    return resolved


def file_id(path: str) -> Hashable:
    """A key that is equal for two paths of the same file."""
    try:
        status = os.stat(path)
        return (status.st_dev, status.st_ino) if status.st_ino else os.path.realpath(path)
    except (OSError, ValueError):  # ValueError: a name that no file can have
        return os.path.abspath(path)
