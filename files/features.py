"""Features on disk, written by --save-features and `python extract.py` and read by `python ranking.py`.

Queries and gallery have a folder each, with
- features.npy, (N, D) float32;
- pids.npy and camids.npy, (N,);
- counts.npy, (N,): how many items each feature is the mean of, 1 without --multi-query;
- model.json, an object: `distance`, with which they are compared, and after extract.py what else is known of the model;
- paths.jsonl, N lines: the path of an image as a JSON string, or those of a tracklet's frames as a list of strings.
"""

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from files import paths
from files.writing import allocate
from readers.tree import Item
from runtime.errors import UserError
from runtime.tiles import DISTANCES

COPIED_AT_ONCE = 4096  # features that are copied from a GPU together

if TYPE_CHECKING:  # `python ranking.py` needs no device
    from runtime.device import Run


class FeatureFile:
    """features.npy. The processes write their rows one after another: on a network file system a host writes whole
    pages, which also contain rows of other processes.
    """

    def __init__(self, path: Path, run: 'Run'):
        rows = np.load(path, mmap_mode='r')
        self.path, self.begin, self.row_bytes, self.run = path, rows.offset, rows.strides[0], run

    def write(self, features: torch.Tensor, indices: torch.Tensor) -> None:
        """Write features (n, feat_dim) to the rows with these indices (n,). Every process must call this."""
        for rank in range(self.run.world_size):
            if rank == self.run.rank:
                self._write(features, indices)
            self.run.sum(torch.zeros(1))  # wait for it

    def _write(self, features: torch.Tensor, indices: torch.Tensor) -> None:
        try:
            with open(self.path, 'r+b') as file:
                for some, rows in zip(features.split(COPIED_AT_ONCE), indices.split(COPIED_AT_ONCE), strict=True):
                    for index, row in zip(rows.tolist(), some.float().cpu().numpy(), strict=True):
                        file.seek(self.begin + index * self.row_bytes)
                        file.write(row.tobytes())
        except OSError as problem:
            raise UserError(
                f'--save-features: {self.path} cannot be written ({problem.strerror}); omit it'
            ) from problem


def create_features(
    save_dir: str,
    subset: str,
    items: Sequence[Item],
    feat_dim: int,
    run: 'Run',
    counts: np.ndarray | None = None,
    distance: str = 'euclidean',
) -> FeatureFile:
    """Create features.npy (N, feat_dim), and the other files beside it; returns it in every process.

    counts: (N,) integers, the number of items over which each feature is averaged; None if features are not averaged

    Until all are extracted the files are in `.features`, so that a failure leaves those of an earlier test intact.

    Raises:
        UserError: they cannot be written, or are not visible to every process.
    """
    folder = Path(save_dir) / '.features' / subset
    path = folder / 'features.npy'
    failure = 0
    if run.rank == 0:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for column, name in ((1, 'pids'), (2, 'camids')):
                np.save(folder / f'{name}.npy', np.array([item[column] for item in items]))
            np.save(folder / 'counts.npy', np.ones(len(items), np.int64) if counts is None else counts)
            paths.write(folder / 'paths.jsonl', (item[0] for item in items))
            (folder / 'model.json').write_text(json.dumps({'distance': distance}) + '\n')
            np.lib.format.open_memmap(path, 'w+', np.float32, (len(items), feat_dim))
            allocate(path)
        except OSError as problem:
            failure = problem.errno or errno.ENOSPC  # numpy raises some without an errno
    failure = int(run.sum(torch.tensor(failure)))  # the others wait until the files exist
    if failure:
        raise UserError(f'--save-features: {path} cannot be written ({os.strerror(failure)}); free space or omit it')
    if not path.exists():
        raise UserError(f'--save-features: {path} is not visible on every host; use a folder that all hosts share')
    return FeatureFile(path, run)


def keep_features(save_dir: str, run: 'Run') -> None:
    """Replace the features of an earlier test by the new ones, which are complete; other files in their folder remain.

    All are replaced at once: files of two tests would be ranked against each other.
    """
    if run.rank == 0:
        folder = Path(save_dir) / '.features'
        kept, old = folder.with_name('features'), folder.with_name('.features.old')
        shutil.rmtree(old, ignore_errors=True)  # of a process that was killed
        if kept.exists():
            for path in [path for path in kept.rglob('*') if path.is_file()]:
                place = folder / path.relative_to(kept)
                if not place.exists():
                    place.parent.mkdir(parents=True, exist_ok=True)
                    path.replace(place)
            kept.replace(old)
        folder.replace(kept)
        shutil.rmtree(old, ignore_errors=True)


def read(folder: str | Path, labelled: bool = False) -> list[np.ndarray]:
    """features (N, D), pids (N,) and camids (N,); the features stay on disk.

    Raises:
        UserError: a file is missing or is not an array of numbers; or they should be labelled, and no person is known.
    """
    kinds = (('features', 'f'), ('pids', 'iu'), ('camids', 'iu'))
    arrays = [_array(Path(folder), name, kind) for name, kind in kinds]
    if labelled and len(arrays[1]) and (arrays[1] == -1).all():
        raise UserError(
            f'{Path(folder) / "pids.npy"} has -1 for every person, as extract.py writes it, and nothing can be ranked: '
            'replace it with the numbers of the persons, and camids.npy with those of the cameras'
        )
    return arrays


def distance_of(folder: str | Path) -> str:
    """The distance that model.json names; 'euclidean' if it does not."""
    with contextlib.suppress(OSError, ValueError):
        description = json.loads((Path(folder) / 'model.json').read_text())
        if isinstance(description, dict) and description.get('distance') in DISTANCES:
            return str(description['distance'])
    return DISTANCES[0]


def _array(folder: Path, name: str, kinds: str) -> np.ndarray:
    path = folder / f'{name}.npy'
    try:
        array: np.ndarray = np.load(path, mmap_mode='c')
    except Exception as problem:  # of any type: NumPy evaluates the header as Python
        reason = getattr(problem, 'strerror', None) or ' '.join(str(problem).split())
        raise UserError(f'{path} cannot be read ({reason}); write it with --evaluate --save-features') from None
    if not isinstance(array, np.ndarray):
        raise UserError(f'{path} contains several arrays; write it with --evaluate --save-features')
    dtype = array.dtype
    dimensions = 2 if name == 'features' else 1
    if dtype.kind not in kinds or dtype.itemsize > 8 or not dtype.isnative or array.ndim != dimensions:
        raise UserError(f'{path} contains {dtype} of shape {array.shape}; write it with --evaluate --save-features')
    return array


def read_files(
    query: str | Path, gallery: str | Path, q_pids: np.ndarray, g_pids: np.ndarray
) -> tuple[np.ndarray, np.ndarray] | None:
    """What `paths.same_files` returns for the items of two folders; None if one of them has no paths.

    Raises:
        UserError: see `read_paths`; or the features of the queries are means, whose items cannot be dropped.
    """
    if (Path(query) / 'counts.npy').exists() and (_array(Path(query), 'counts', 'iu') > 1).any():
        raise UserError(
            f'--any-camera: the features in {query} are means over several items (--multi-query), which would count as '
            'matches; save them without --multi-query'
        )
    q_paths, g_paths = read_paths(query, len(q_pids)), read_paths(gallery, len(g_pids))
    return paths.same_files(q_pids, g_pids, q_paths, g_paths) if q_paths and g_paths else None


def read_paths(folder: str | Path, number: int) -> Iterator[paths.Paths] | None:
    """The paths of the `number` items of a folder, one by one, exactly as written; None if it has no paths.

    Raises:
        UserError: the file is damaged, or has a different number of items.
    """
    path = Path(folder) / 'paths.jsonl'
    return paths.read(path, number) if path.exists() else None
