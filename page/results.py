"""The result files of a test: results.json, results.csv and ranking.npz, each complete or absent.

The page is made from these files and the images alone.
"""

import csv
import importlib.util
import os
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

import eval_metrics
import page
from files.writing import Unwritten, write_whole
from ranking import Ranking
from readers.tree import Dataset, ids_of, paths_of
from runtime.errors import UserError
from utils import write_json

FILES = ('results.json', 'results.csv', 'ranking.npz', 'report.html')
FRAMES_WRITTEN = 8  # frames per tracklet whose paths are written
KEPT = ('ranks', 'offsets', 'nearest', 'nearest_distances', 'edges', 'match_histogram', 'other_histogram')
PAGE_PACKAGES = ('jinja2', 'matplotlib')


def write(
    folder: str | Path,
    summary: dict[str, Any],
    dataset: Dataset,
    result: Ranking,
    more: dict[str, np.ndarray],
    unwritten: Unwritten,
) -> None:
    """Write the files to `folder`. A file that cannot be written is reported, and the run continues.

    Added metrics are those in METRICS that are not in CLASSIC.

    - results.json: `summary`, and the mean of each added metric.
    - results.csv: for each query its path, pid, camid, AP, rank of the first match, number of matches, the pid of the
      nearest item of another identity if that is among the ten nearest, its score by each added metric, and for each of
      the ten nearest items its path and whether it is a match (1 or 0). The path of a tracklet is that of its first
      frame.
    - ranking.npz: the arrays KEPT of `result`, the paths, pids and camids of query and gallery, the folder from which
      the paths begin, and `more`; if persons have names, the pids of the queries and their names.

    results.csv names persons as in the data, and leaves unknown cameras empty.
    """
    folder, query, gallery = Path(folder), dataset.query, dataset.gallery
    scores = {
        metric.name: metric.score(result.ranks, result.offsets)  # (Q,)
        for metric in eval_metrics.METRICS
        if metric.name not in eval_metrics.CLASSIC
    }
    added = {name: float(np.nanmean(values)) for name, values in scores.items()}
    arrays = {
        'query_files': _files(query),
        'gallery_files': _files(gallery),
        'folder': _lines([[_here()]]),
        **dict(zip(('q_pids', 'g_pids', 'q_camids', 'g_camids'), ids_of(query, gallery), strict=True)),
        **{name: getattr(result, name) for name in KEPT},
        **more,
    }
    if dataset.names:
        pids = sorted({pid for _, pid, _ in query})
        arrays |= {'named_pids': np.array(pids), 'pid_names': _lines([dataset.name_of(pid)] for pid in pids)}
    writers: dict[str, Callable[[Path], object]] = {
        'results.csv': lambda path: _write_table(path, dataset, result, arrays['g_pids'], scores),
        'ranking.npz': lambda path: _save_arrays(path, arrays),
        'results.json': lambda path: write_json(summary | added, path),  # last, so if it exists, the others do
    }
    for name, writer in writers.items():
        with unwritten.excuse(folder / name):
            write_whole(folder / name, writer)


def check_packages() -> None:
    """Raise UserError if a package that `write_page` needs is not installed."""
    missing = [name for name in PAGE_PACKAGES if not importlib.util.find_spec(name)]
    if missing:
        raise UserError(f'report.html needs {" and ".join(missing)}: pip install {" ".join(missing)}, or --no-report')


def write_page(folder: str | Path, unwritten: Unwritten) -> None:
    """Write report.html. Any error is reported, and the run continues."""
    with unwritten.excuse(Path(folder) / 'report.html'):
        try:
            page.write(folder)
        except Exception as problem:
            raise OSError(f'the page cannot be created ({type(problem).__name__}: {problem})') from problem


def _write_table(
    path: Path, dataset: Dataset, result: Ranking, g_pids: np.ndarray, scores: dict[str, np.ndarray]
) -> None:
    """One row per query; cells that need a match are empty for a query without one."""
    precisions = eval_metrics.average_precision(result.ranks, result.offsets)  # (Q,)
    with open(path, 'w', newline='', encoding='utf-8', errors='surrogateescape') as file:
        table = csv.writer(file)
        listed = range(1, result.nearest.shape[1] + 1)
        names = [name for rank in listed for name in (f'nearest_{rank}', f'match_{rank}')]
        table.writerow(['query', 'pid', 'camid', 'AP', 'first_rank', 'matches', 'nearest_wrong', *scores, *names])
        for row, query in enumerate(dataset.query):
            _, pid, camid = query
            begin, end = result.offsets[row : row + 2]
            first_rank = result.ranks[begin] if end > begin else ''
            near = [int(place) for place in result.nearest[row] if place >= 0]
            wrong = next((dataset.name_of(g_pids[place]) for place in near if g_pids[place] != pid), '')
            named: list[tuple[str, object]] = [
                (paths_of(dataset.gallery[place])[0], int(g_pids[place] == pid)) for place in near
            ]
            named += [('', '')] * (len(listed) - len(near))
            ap, *added = (_shown(values[row]) for values in (precisions, *scores.values()))
            person, camera, matches = dataset.name_of(pid), '' if dataset.no_cameras else camid, end - begin
            table.writerow([paths_of(query)[0], person, camera, ap, first_rank, matches, wrong, *added, *chain(*named)])


def _shown(score: float) -> str:
    return '' if np.isnan(score) else f'{score:.6f}'


def _files(items: Sequence[tuple]) -> np.ndarray:
    """The path of each item, for a tracklet up to FRAMES_WRITTEN of its frames; see `_lines`."""
    return _lines(frames[:: -(-len(frames) // FRAMES_WRITTEN)] for frames in map(paths_of, items))


def _here() -> str:
    """The working directory; '' if it was removed."""
    try:
        return os.getcwd()
    except OSError:
        return ''


def _lines(names: Iterable[Sequence[str]]) -> np.ndarray:
    """uint8: a line for each row of names, which are separated by tabs.

    If a name contains one of these separators, each separator is preceded by a NUL, which cannot occur in names, and a
    NUL ends the text.
    """
    rows = list(names)
    mark = '\0' if any('\n' in path or '\t' in path for frames in rows for path in frames) else ''
    text = f'{mark}\n'.join(f'{mark}\t'.join(frames) for frames in rows) + mark
    return np.frombuffer(text.encode('utf-8', 'surrogateescape'), np.uint8)


def _save_arrays(path: Path, arrays: dict[str, Any]) -> None:
    with open(path, 'wb') as file:  # numpy would append .npz to a name
        np.savez_compressed(file, **arrays)
