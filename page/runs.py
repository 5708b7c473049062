"""The files of a tested run, and quantities derived from them."""

import csv
import functools
import io
import json
import math
import os
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

import eval_metrics
from runtime.errors import UserError, plain

# Folders in --save-dir: one with a subfolder for each tested data set except the first one, and that of the validation,
# whose name is also the prefix of its columns in metrics.csv
TARGETS, VALIDATION = 'targets', 'validation'
POINTS = 400  # of a curve; more points are averaged in groups
RESAMPLES = 1000  # of the bootstrap
NEEDED = {  # in results.json or, from query_files on, in ranking.npz
    *('mAP', 'queries', 'gallery', 'dataset', 'arch', 'checkpoint', 'rerank', 'height', 'width', 'precision', 'date'),
    *('seed', 'device', 'versions', 'revision', 'command', 'dataset_fingerprint'),
    *('query_files', 'gallery_files', 'q_pids', 'g_pids', 'q_camids', 'g_camids', 'ranks', 'offsets', 'nearest'),
    *('nearest_distances', 'edges', 'match_histogram', 'other_histogram', 'camera_map', 'camera_queries'),
    *('embedding_features', 'embedding_pids', 'embedding_is_query'),
}


def shown(name: str) -> str:
    """The name of a file, which may have bytes that are no text, as it can be drawn."""
    return name.encode('utf-8', 'replace').decode()


def labelled(name: str) -> str:
    """A name as it can be in a legend: matplotlib leaves out names that begin with an underscore."""
    return f' {name}' if name.startswith('_') else name


@dataclass(frozen=True, eq=False)
class TestedRun:
    """The contents of a run's files, and quantities derived from them."""

    name: str
    summary: dict[str, Any]  # results.json
    arrays: dict[str, np.ndarray]  # ranking.npz
    metrics: dict[str, np.ndarray]  # column of metrics.csv -> (N,) float64, NaN for empty cells; {} without the file
    losses: list[str]  # the columns of `metrics` that are losses, the total first

    @property
    def how(self) -> list[str]:
        """How the test differs from the usual one, in words."""
        words = {
            'rerank': 're-ranked',
            'any_camera': 'any camera',
            'multi_query': 'multi-query',
            'flip_test': 'with mirror images',
        }
        whole = ['all frames'] if self.summary.get('seq_len') == 0 else []
        cosine = ['cosine distance'] if self.summary.get('distance') == 'cosine' else []
        return cosine + [word for option, word in words.items() if self.summary.get(option)] + whole

    @property
    def distance_name(self) -> str:
        """The distance between features, in words."""
        return 'cosine distance' if self.summary.get('distance') == 'cosine' else 'squared Euclidean distance'

    @property
    def short_name(self) -> str:
        """For legends."""
        name = shown(self.name)
        return labelled(name if len(name) <= 24 else f'…{name[-23:]}')

    @property
    def notices(self) -> list[str]:
        """How the test differs from the training of its weights; empty for files of earlier versions."""
        notices = self.summary.get('notices')
        return [str(notice) for notice in notices] if isinstance(notices, list) else []

    @functools.cached_property
    def decimals(self) -> int:
        """Decimals of the distances on the page, for four significant digits of a typical distance to a near item."""
        usual = np.nanmedian(self.arrays['nearest_distances']).clip(min=1e-6)
        return max(0, 3 - math.floor(math.log10(usual)))

    def distance(self, value: float) -> str:
        return f'{value:.{self.decimals}f}'

    def curve(self, column: str) -> tuple[np.ndarray, np.ndarray]:
        """Epochs trained (n,) and values (n,) of the rows that have the column; means of neighbouring rows if there are
        many."""
        if not np.isfinite(self.metrics.get(column, np.nan)).any():
            return np.empty(0), np.empty(0)
        epochs, batches, values = (self.metrics[name] for name in ('epoch', 'batch', column))  # (N,) each
        epochs = np.where(np.isnan(batches), epochs, epochs - 1 + batches / np.nanmax(batches, initial=1))
        known = np.flatnonzero(np.isfinite(values))
        groups = np.array_split(known, min(len(known), POINTS))
        epochs, values = (np.array([each[group].mean() for group in groups]) for each in (epochs, values))
        return epochs, values

    @functools.cached_property
    def valid(self) -> np.ndarray:
        """(Q,) bool: the queries that have a match."""
        return np.diff(self.arrays['offsets']) > 0

    @functools.cached_property
    def first_ranks(self) -> np.ndarray:
        """(Q,) float64: rank of the first match, NaN if there is none."""
        first = np.full(len(self.valid), np.nan)
        first[self.valid] = self.arrays['ranks'][self.arrays['offsets'][:-1][self.valid]]
        return first

    @functools.cached_property
    def scores(self) -> dict[str, np.ndarray]:
        """Each of METRICS by name: (Q,) float64, NaN if a query has no match."""
        ranks, offsets = self.arrays['ranks'], self.arrays['offsets']
        return {metric.name: metric.score(ranks, offsets) for metric in eval_metrics.METRICS}

    @property
    def ap(self) -> np.ndarray:
        """(Q,) float64: average precision, NaN if a query has no match."""
        return self.scores['mAP']

    @functools.cached_property
    def figures(self) -> list[tuple[str, float, float, float]]:
        """Label of each of METRICS, its mean over the queries, and the limits of the mean's interval."""
        scores = np.stack([*self.scores.values()], axis=1)[self.valid]  # (V, K)
        labels = [metric.label for metric in eval_metrics.METRICS]
        return list(zip(labels, scores.mean(0), *interval(scores), strict=True))

    @property
    def targets(self) -> list[tuple[str, str, list[float]]]:
        """Name, page and METRICS figures of each data set in the same test, if there are several."""
        table = self.summary.get('targets')
        return [
            (name, f'{quote(row["folder"])}/report.html', [row[metric.name] for metric in eval_metrics.METRICS])
            for name, row in (table.items() if isinstance(table, dict) else ())
        ]

    @functools.cached_property
    def names(self) -> dict[int, str]:
        """The names of the queries' pids, if persons have names in the data."""
        if 'named_pids' not in self.arrays:
            return {}
        return dict(
            zip(self.arrays['named_pids'].tolist(), (row[0] for row in _split(self.arrays['pid_names'])), strict=True)
        )

    def name_of(self, pid: int) -> str:
        return self.names.get(pid, str(pid))

    @functools.cached_property
    def files(self) -> dict[str, list[list[str]]]:
        """'query' and 'gallery' -> for each item the path of its image, or those of up to 8 frames of a tracklet."""
        return {subset: _split(self.arrays[f'{subset}_files']) for subset in ('query', 'gallery')}

    def located(self, path: str) -> str:
        """The path of an image from here, or from the folder in which the test ran."""
        if 'folder' not in self.arrays or os.path.exists(path):
            return path
        return os.path.join(_split(self.arrays['folder'])[0][0], path)

    @functools.cached_property
    def queries(self) -> list[tuple[str, int, int]]:
        """File name (the folder may have been moved), pid and camid: tests can be compared if these are equal."""
        names = (Path(paths[0]).name for paths in self.files['query'])
        return list(zip(names, self.arrays['q_pids'].tolist(), self.arrays['q_camids'].tolist(), strict=True))


def read(save_dir: str | Path) -> TestedRun:
    """Read the files of a run. metrics.csv may be missing if nothing was trained.

    Raises:
        UserError: the folder contains no test results, or they are damaged or from two tests.
    """
    folder = Path(save_dir)
    try:
        summary = json.loads((folder / 'results.json').read_text(encoding='utf-8'))
        with np.load(folder / 'ranking.npz') as file:
            arrays = dict(file)
        if lacking := NEEDED - summary.keys() - arrays.keys():
            raise ValueError(f'{min(lacking)} is missing in results.json or ranking.npz')
        place = folder.resolve().parent if summary.get('validation') else folder
        where = place / 'metrics.csv'
        try:
            curves = _read_metrics(where)
        except (ValueError, LookupError, TypeError, csv.Error) as problem:
            reason = plain(f'{type(problem).__name__}: {problem}')
            raise UserError(f'{where} is damaged ({reason}); without it the page has no curves: rename it') from problem
        run = TestedRun(str(save_dir), summary, arrays, *curves)
        _ = run.targets  # checks their form
        same = run.valid.any() and abs(run.ap[run.valid].mean() - summary['mAP']) < 1e-4
        complete = len(run.queries) == len(run.valid) and len(run.files['gallery']) == len(arrays['g_pids'])
    except OSError as problem:
        where, why = problem.filename or folder, problem.strerror
        raise UserError(f'{where} cannot be read ({why}); give the --save-dir of a tested run') from problem
    except (ValueError, LookupError, TypeError, AttributeError, EOFError, zipfile.BadZipFile) as problem:
        reason = plain(f'{type(problem).__name__}: {problem}')
        raise UserError(f'{folder} contains damaged results ({reason}); test again with --evaluate') from problem
    if not same or not complete:
        raise UserError(
            f'{folder} contains results.json and ranking.npz of two different tests; test again with --evaluate'
        )
    return run


def complete_lines(path: Path) -> str:
    """The text of a file without a last line that has no end, as is left by a full disk or a power cut."""
    lines, end, _ = path.read_bytes().rpartition(b'\n')
    return (lines + end).decode()


def _read_metrics(path: Path) -> tuple[dict[str, np.ndarray], list[str]]:
    """The columns of metrics.csv, with rows sorted by epoch and batch, tests last; and which columns are losses."""
    if not path.exists():
        return {}, []
    rows: dict[tuple[str, str], list[float]] = {}  # (epoch, batch) -> numbers
    reader = csv.DictReader(io.StringIO(complete_lines(path), newline=''), restval='')
    names = list(reader.fieldnames or ())
    if not names:
        return {}, []
    for row in reader:
        key, values = (row['epoch'], row['batch']), [float(row[name] or 'nan') for name in names]
        # After a resume some rows are repeated, and the last one counts; the last test has its own row.
        before = rows.get(key, values)
        rows[key] = [old if math.isnan(new) else new for old, new in zip(before, values, strict=True)]
    table = np.array([*rows.values()], dtype=float).reshape(-1, len(names))  # (N, columns)
    order = np.lexsort([table[:, names.index(name)] for name in ('batch', 'epoch')])
    end = min(names.index(metric.name) for metric in eval_metrics.METRICS if metric.name in names)
    return dict(zip(names, table[order].T, strict=True)), names[names.index('data_wait') + 1 : end]


def _split(paths: np.ndarray) -> list[list[str]]:
    """The inverse of `results._lines`: the frames of each item."""
    text = paths.tobytes().decode('utf-8', 'surrogateescape')
    mark = '\0' if text.endswith('\0') else ''
    return [line.split(f'{mark}\t') for line in text.removesuffix('\0').split(f'{mark}\n')]


def settings(runs: Sequence[TestedRun]) -> list[str]:
    """A notice for each setting that affects the figures of tests and differs between runs."""
    mark = 'dataset' if any('test_fingerprint' not in run.summary for run in runs) else 'test'  # in older files
    of: dict[str, Callable[[dict[str, Any]], str]] = {
        'input sizes': lambda summary: f'{summary["height"]} × {summary["width"]} pixels',
        'ways of resizing': lambda summary: str(summary.get('interpolation') or ''),
        'precisions': lambda summary: str(summary['precision']),
        'data sets': lambda summary: f'{summary["dataset"]}, fingerprint {summary[f"{mark}_fingerprint"]}',
        'rankings': lambda summary: _listed(summary['rerank'], 're-ranked') or 'not re-ranked',
        'distances': lambda summary: str(summary.get('distance') or 'euclidean'),
        'features': lambda summary: 'means with mirror images' if summary.get('flip_test') else 'of the images alone',
        'matches': lambda summary: f'from {"any camera" if summary.get("any_camera") else "other cameras"}',
        'queries': lambda summary: _listed(summary.get('multi_query'), 'multi-query') or 'single',
        'numbers of frames': lambda summary: {None: '', 0: 'all'}.get(number := summary.get('seq_len'), str(number)),
        'poolings': lambda summary: str(summary.get('pool') or ''),
    }
    notices = []
    for what, value_of in of.items():
        values = [value_of(run.summary) for run in runs]
        if len({*values} - {''}) > 1:  # '' is unknown: older files lack it
            listed = '; '.join(f'{run.name}: {value or "unknown"}' for run, value in zip(runs, values, strict=True))
            notices.append(f'the runs were tested with different {what} ({listed})')
    return notices


def _listed(values: object, what: str) -> str:
    """`what`, followed by its options and their values; '' if it was not used."""
    named = [f'{name} {value}' for name, value in values.items()] if isinstance(values, dict) else []
    return ', '.join([what, *named]) if values else ''


def interval(values: np.ndarray) -> np.ndarray:
    """(2, K): limits of the 95% percentile bootstrap intervals of the means of `values` (V, K) over V queries."""
    number, rng, means = len(values), np.random.default_rng(0), []
    for _ in range(RESAMPLES):
        times = np.bincount(rng.integers(number, size=number), minlength=number)  # (V,), how often each is drawn
        means.append(times @ values / number)  # (K,)
    ends: np.ndarray = np.percentile(means, (2.5, 97.5), axis=0)
    return ends
