"""The files that tell of a test: results.json, results.csv and ranking.npz, whole or absent.

They are what the page is made of, and all that it needs besides the images.
"""

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from eval_metrics import average_precision
from runtime.files import excused, write_whole
from utils import write_json

FILES = ('results.json', 'results.csv', 'ranking.npz', 'report.html')
FRAMES = 8  # of a tracklet that are named
KEPT = ('ranks', 'offsets', 'nearest', 'nearest_distances', 'edges', 'match_histogram', 'other_histogram')


def write(folder: str | Path, summary: dict, dataset: Any, result: Any, more: dict[str, np.ndarray]) -> None:
    """Write the files into `folder`; what cannot be written is told, and ends no run.

    - results.json: `summary`.
    - results.csv: for each query its path, pid, camid, AP, rank of the first match, number of matches, and the pid of
      the nearest item of another identity, if that is among the ten nearest.
    - ranking.npz: of `result`, a `ranking.Ranking`, the arrays KEPT; paths, pids and camids of queries and gallery; and
      `more`.
    """
    folder = Path(folder)
    pids = {f'{subset}_pids': _column(items, 1) for subset, items in (('q', dataset.query), ('g', dataset.gallery))}
    arrays = {
        'query_files': _files(dataset.query),
        'gallery_files': _files(dataset.gallery),
        **pids,
        'q_camids': _column(dataset.query, 2),
        'g_camids': _column(dataset.gallery, 2),
        **{name: getattr(result, name) for name in KEPT},
        **more,
    }
    writers: dict[str, Callable[[Path], object]] = {
        'results.json': lambda path: write_json(summary, path),
        'results.csv': lambda path: _write_table(path, dataset.query, result, pids['g_pids']),
        'ranking.npz': lambda path: _save_arrays(path, arrays),
    }
    for name, writer in writers.items():
        with excused(folder / name):
            write_whole(folder / name, writer)


def write_page(folder: str | Path) -> None:
    """Write report.html; whatever goes wrong with it is told, and ends no run."""
    import report  # with matplotlib, which is slow to import

    path = Path(folder) / 'report.html'
    with excused(path):
        try:
            report.write(folder)
        except Exception as problem:
            raise OSError(f'the page cannot be made ({type(problem).__name__}: {problem})') from problem


def _column(items: list, column: int) -> np.ndarray:
    return np.array([item[column] for item in items])


def _write_table(path: Path, queries: list, result: Any, g_pids: np.ndarray) -> None:
    """A line for each query; what a query without a match lacks is left empty."""
    precisions = average_precision(result.ranks, result.offsets)  # (Q,)
    with open(path, 'w', newline='', encoding='utf-8', errors='surrogateescape') as file:
        table = csv.writer(file)
        table.writerow(['query', 'pid', 'camid', 'AP', 'first_rank', 'matches', 'nearest_wrong'])
        for row, (paths, pid, camid) in enumerate(queries):
            begin, end = result.offsets[row : row + 2]
            near = [g_pids[place] for place in result.nearest[row] if place >= 0]
            found = [f'{precisions[row]:.6f}', result.ranks[begin]] if end > begin else ['', '']
            wrong = next((other for other in near if other != pid), '')
            table.writerow([_frames(paths)[0], pid, camid, *found, end - begin, wrong])


def _files(items: list) -> np.ndarray:
    """uint8: the paths of the items, one a line, those of up to FRAMES frames of a tracklet with tabs between."""
    lines = []
    for paths, _, _ in items:
        frames = _frames(paths)
        lines.append('\t'.join(frames[:: -(-len(frames) // FRAMES)]))
    return np.frombuffer('\n'.join(lines).encode('utf-8', 'surrogateescape'), np.uint8)


def _frames(paths: str | tuple[str, ...]) -> tuple[str, ...]:
    return (paths,) if isinstance(paths, str) else paths


def _save_arrays(path: Path, arrays: dict) -> None:
    with open(path, 'wb') as file:  # by its name, numpy would add .npz to that of the temporary file
        np.savez_compressed(file, **arrays)
