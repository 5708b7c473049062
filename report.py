"""Pictures and one HTML page of a run, made from the files in its --save-dir alone.

    python report.py log/demo                           # writes log/demo/report.html
    python report.py log/a log/b --out a_and_b.html     # two runs or more over each other
    python report.py --activations log/demo/best_model.pth.tar IMAGE ...    # where the network looks

The page is one file: no network, no server. Each test writes it anew.
"""

import argparse
import base64
import csv
import functools
import io
import itertools
import json
import math
import sys
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from eval_metrics import average_precision, inverse_negative_penalty
from runtime.errors import UserError
from runtime.files import write_whole

FIGURES = ('mAP', 'mINP', 'Rank-1', 'Rank-5', 'Rank-10')
RANKS = (1, 5, 10)
RESAMPLES = 1000  # of the bootstrap
SHOWN = 20  # queries of each kind
HEIGHT, STRIP_HEIGHT = 128, 80  # of an embedded picture, and of each frame of a tracklet, in pixels
FRAMES = {'query': 8, 'gallery': 4}  # of a tracklet
QUALITY = 75  # of their JPEGs
RATES = (0.01, 0.001)  # false-match rates
NEEDED = {  # in results.json
    *('mAP', 'queries', 'gallery', 'dataset', 'arch', 'checkpoint', 'rerank', 'height', 'width', 'precision', 'date'),
    *('seed', 'device', 'versions', 'revision', 'command', 'dataset_fingerprint'),
}
POINTS = 400  # of a curve; more are averaged in groups

# Okabe and Ito's colours, in which matplotlib draws. In the SVG each becomes a variable of the page, which has a shade
# of its own for light and dark: so one drawing is legible in both.
INK, LINE = '#010203', '#040506'
GREEN, VERMILLION = '#009e73', '#d55e00'  # match, non-match
SERIES = ('#0072b2', VERMILLION, GREEN, '#cc79a7', '#e69f00', '#56b4e9')
VARIABLES = dict(
    zip((INK, LINE, *SERIES), ('ink', 'line', 'blue', 'vermillion', 'green', 'purple', 'orange', 'sky'), strict=True)
)
DASHES = ('solid', (0, (5, 2)), (0, (1.5, 1.5)), (0, (5, 1.5, 1, 1.5)))  # beside the colours, for who cannot tell them


# --------------------------------------------------------------------------------------------------------------- pages


def write(save_dir: str | Path) -> Path:
    """Write report.html into --save-dir, whole or not at all, and return its path.

    Raises:
        UserError: the folder holds no results of a test, they are damaged or of two tests, or it cannot be written.
    """
    run = read(save_dir)
    return _write_page(
        Path(save_dir) / 'report.html',
        title=f'{run.summary["dataset"]}, {run.summary["arch"]}',
        runs=[run],
        charts=[*_history([run], run.losses), _cmc([run]), _distances(run), _embedding(run)],
        cameras=_cameras(run),
        **_examples(run),
    )


def compare(save_dirs: Sequence[str | Path], out: str | Path = 'compare.html') -> Path:
    """Write a page of two or more runs over the same queries, and return its path.

    Raises:
        UserError: as `write` does, or the queries differ.
    """
    runs = [read(save_dir) for save_dir in save_dirs]
    first = runs[0]
    for run in runs[1:]:
        if run.queries != first.queries:
            raise UserError(f'{run.name} and {first.name} were tested with different queries; compare runs of one test')
    both = np.all([run.valid for run in runs], axis=0)  # (Q,)
    if not both.any():
        raise UserError(f'{first.name} and the others share no query that has a match; compare runs of one gallery')
    pairs = []
    for left, right in itertools.combinations(runs, 2):
        gain = (right.scores - left.scores)[both, :1]  # (V, 1) of AP
        pairs.append((left, right, gain.mean(), *interval(gain)[:, 0]))
    return _write_page(
        Path(out),
        title=f'{len(runs)} runs on {first.summary["dataset"]}',
        runs=runs,
        pairs=pairs,
        charts=[*_history(runs, ['loss']), _cmc(runs)],
        **_changes(runs, both),
    )


def _write_page(path: Path, **content) -> Path:
    import jinja2

    folder = Path(__file__).resolve().parent / 'page'
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters['percent'] = lambda share, sign='': f'{100 * share:{sign}.1f}'.replace('-', '−')
    content['charts'] = [chart for chart in content['charts'] if chart]
    page = environment.get_template('report.html.j2').render(resamples=RESAMPLES, **content)
    try:
        write_whole(path, lambda file: file.write_bytes(page.encode('utf-8', 'replace')))
    except OSError as problem:
        raise UserError(f'{path} cannot be written ({problem.strerror}); give another folder') from problem
    return path


# ------------------------------------------------------------------------------------------------- the files of a run


@dataclass(frozen=True, eq=False)
class Run:
    """What the files of a run hold, and what follows from them."""

    name: str
    summary: dict[str, Any]  # results.json
    ranking: dict[str, np.ndarray]  # ranking.npz
    metrics: dict[str, np.ndarray]  # column of metrics.csv -> (N,) float64, NaN where it is empty; {} without the file
    losses: list[str]  # the columns of `metrics` that are losses, the total first

    def __getattr__(self, name: str) -> np.ndarray:
        if name in self.__dict__.get('ranking', ()):
            return self.ranking[name]
        raise AttributeError(name)

    @property
    def short_name(self) -> str:
        """For legends."""
        return self.name if len(self.name) <= 24 else f'…{self.name[-23:]}'

    @functools.cached_property
    def decimals(self) -> int:
        """Of every distance that is shown: four digits of what is usual among the nearest."""
        usual = np.nanmedian(self.nearest_distances).clip(min=1e-6)
        return max(0, 3 - math.floor(math.log10(usual)))

    def distance(self, value: float) -> str:
        return f'{value:.{self.decimals}f}'

    def curve(self, column: str) -> tuple[np.ndarray, np.ndarray]:
        """Epochs trained (n,) and values (n,) in the rows that have the column; of many, the means of neighbours."""
        if not np.isfinite(self.metrics.get(column, np.nan)).any():
            return np.empty(0), np.empty(0)
        epochs, batches, values = (self.metrics[name] for name in ('epoch', 'batch', column))  # (N,) each
        epochs = np.where(np.isnan(batches), epochs, epochs - 1 + batches / np.nanmax(batches, initial=1))
        known = np.flatnonzero(np.isfinite(values))
        groups = np.array_split(known, min(len(known), POINTS))
        return tuple(np.array([each[group].mean() for group in groups]) for each in (epochs, values))

    @functools.cached_property
    def valid(self) -> np.ndarray:
        """(Q,) bool: the queries that have a match."""
        return np.diff(self.offsets) > 0

    @functools.cached_property
    def first_ranks(self) -> np.ndarray:
        """(Q,) float64: rank of the first match, NaN without one."""
        first = np.full(len(self.valid), np.nan)
        first[self.valid] = self.ranks[self.offsets[:-1][self.valid]]
        return first

    @functools.cached_property
    def scores(self) -> np.ndarray:
        """(Q, 5) float64: what each query adds to the means that FIGURES are, NaN without a match."""
        ap, penalty = (score(self.ranks, self.offsets) for score in (average_precision, inverse_negative_penalty))
        hits = [np.where(self.valid, self.first_ranks <= rank, np.nan) for rank in RANKS]
        return np.stack([ap, penalty, *hits], axis=1)

    @functools.cached_property
    def figures(self) -> list[tuple[str, float, float, float]]:
        """Name, mean over the queries, and the ends of its interval, of each of FIGURES."""
        scores = self.scores[self.valid]  # (V, 5)
        return list(zip(FIGURES, scores.mean(0), *interval(scores), strict=True))

    @functools.cached_property
    def files(self) -> dict[str, list[list[str]]]:
        """'query' and 'gallery' -> for each item the paths of its image, or of up to 8 frames of the tracklet."""
        return {
            subset: [item.split('\t') for item in _text(self.ranking[f'{subset}_files']).split('\n')]
            for subset in ('query', 'gallery')
        }

    @functools.cached_property
    def queries(self) -> list[tuple[str, int, int]]:
        """Name (the data may have moved), pid and camid of each: what makes two tests the same."""
        names = (Path(paths[0]).name for paths in self.files['query'])
        return list(zip(names, self.q_pids.tolist(), self.q_camids.tolist(), strict=True))


def read(save_dir: str | Path) -> Run:
    """The files of a run. metrics.csv may be absent: nothing was trained. Raises UserError as `write` does."""
    folder = Path(save_dir)
    try:
        summary = json.loads((folder / 'results.json').read_text(encoding='utf-8'))
        with np.load(folder / 'ranking.npz') as file:
            ranking = dict(file)
        run = Run(str(save_dir), summary, ranking, *_read_metrics(folder / 'metrics.csv'))
        lacking = NEEDED - summary.keys()
        if lacking:
            raise ValueError(f'no {min(lacking)} in results.json')
        same = run.valid.any() and abs(run.scores[run.valid, 0].mean() - summary['mAP']) < 1e-4
        complete = len(run.queries) == len(run.valid) and len(run.files['gallery']) == len(run.g_pids)
    except OSError as problem:
        where = problem.filename or folder
        raise UserError(
            f'{where} cannot be read ({problem.strerror}); give the --save-dir of a tested run'
        ) from problem
    except (ValueError, LookupError, TypeError, AttributeError, EOFError, zipfile.BadZipFile) as problem:
        reason = ' '.join(f'{type(problem).__name__}: {problem}'.split())[:200]
        raise UserError(f'{folder} holds damaged results ({reason}); test again with --evaluate') from problem
    if not same or not complete:
        raise UserError(f'{folder} holds results.json and ranking.npz of two tests; test again with --evaluate')
    return run


def _read_metrics(path: Path) -> tuple[dict[str, np.ndarray], list[str]]:
    """The columns of metrics.csv, rows in order of epoch and batch, tests behind; and those that are losses."""
    if not path.exists():
        return {}, []
    rows = {}  # (epoch, batch) -> numbers; after a resume some repeat, and the last counts
    with path.open(newline='', encoding='utf-8') as file:
        reader = csv.DictReader(file, restval='')
        for row in reader:
            rows[row['epoch'], row['batch']] = [float(row[name] or 'nan') for name in reader.fieldnames]
        names = list(reader.fieldnames or ())
    table = np.array([*rows.values()], dtype=float).reshape(-1, len(names))  # (N, columns)
    order = np.lexsort([table[:, names.index(name)] for name in ('batch', 'epoch')])
    losses = names[names.index('data_wait') + 1 : names.index('mAP')]
    return dict(zip(names, table[order].T, strict=True)), losses


def _text(array: np.ndarray) -> str:
    return array.tobytes().decode('utf-8', 'surrogateescape')


def interval(values: np.ndarray) -> np.ndarray:
    """(2, K): ends of the 95% percentile bootstrap intervals of the means of `values` (V, K) over V queries."""
    number = len(values)
    times = np.random.default_rng(0).multinomial(number, np.full(number, 1 / number), RESAMPLES)  # (1000, V)
    return np.percentile(times @ values / number, (2.5, 97.5), axis=0)


# -------------------------------------------------------------------------------------------------------------- charts


def _chart(title: str, note: str, xlabel: str, ylabel: str, draw: Callable[[Any], None]) -> dict[str, str]:
    """`draw(axes)` as an SVG that takes its font and its colours from the page."""
    from markupsafe import Markup
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    style = {
        'svg.fonttype': 'none', 'svg.hashsalt': title, 'font.size': 10.5, 'text.parse_math': False,
        'text.color': INK, 'axes.labelcolor': INK, 'axes.edgecolor': LINE, 'xtick.color': LINE, 'ytick.color': LINE,
        'xtick.labelcolor': INK, 'ytick.labelcolor': INK, 'grid.color': LINE, 'grid.linewidth': 0.5, 'axes.grid': True,
        'axes.axisbelow': True, 'axes.spines.top': False, 'axes.spines.right': False, 'axes.facecolor': 'none',
        'figure.facecolor': 'none', 'legend.frameon': False, 'lines.linewidth': 1.6, 'lines.solid_capstyle': 'round',
    }  # fmt: skip
    with rc_context(style):
        figure = Figure(figsize=(4.5, 3), layout='constrained')
        axes = figure.add_subplot(xlabel=xlabel, ylabel=ylabel)
        draw(axes)
        labels = axes.get_legend_handles_labels()[1]
        if labels and axes.get_legend() is None:
            columns = max(1, 44 // (4 + max(map(len, labels))))
            figure.legend(loc='outside upper left', ncols=columns, handlelength=2.6, fontsize=9.5)  # covers no data
            figure.set_figheight(3 + 0.2 * max(0, math.ceil(len(labels) / columns) - 2))
        file = io.StringIO()
        figure.savefig(file, format='svg', metadata=dict.fromkeys(('Creator', 'Date', 'Format', 'Type')))
    svg = file.getvalue()
    svg = svg[svg.index('<svg') :]
    for colour, variable in VARIABLES.items():
        svg = svg.replace(colour, f'var(--{variable})')
    return {'title': title, 'note': note, 'svg': Markup(svg)}  # matplotlib escapes the texts in it


def _line(number: int) -> dict[str, Any]:
    """Colour and dashes of the line of this number."""
    return {'color': SERIES[number % len(SERIES)], 'linestyle': DASHES[number % len(DASHES)]}


def _history(runs: list[Run], losses: list[str]) -> list[dict | None]:
    """The curves of training; one run also shows Rank-1."""

    def logarithmic(axes) -> None:
        from matplotlib.ticker import LogLocator

        axes.set_yscale('log')
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(lambda lr, _: np.format_float_positional(lr, 1, fractional=False, trim='-'))
        axes.yaxis.set_minor_formatter('')
        axes.margins(y=0.15)

    def from_zero(axes) -> None:
        axes.set_ylim(bottom=min(0, axes.dataLim.y0))

    def percent(axes) -> None:
        axes.yaxis.set_major_formatter(lambda share, _: f'{100 * share:g}')

    named = {name: name if len(losses) > 1 else None for name in losses}
    shares = {'mAP': 'mAP', 'rank1': 'Rank-1'} if len(runs) == 1 else {'mAP': 'mAP'}
    label = f'{" and ".join(shares.values())}, %'
    note = 'As printed while training.' + ' active: share of anchors whose triplet violates the margin.' * (
        'active' in losses
    )
    return [
        _curves(runs, 'Loss', note, 'loss', named, from_zero),
        _curves(runs, 'Learning rate', 'On a logarithmic scale.', 'learning rate', {'lr': None}, logarithmic),
        _curves(runs, 'Tests while training', 'Each dot is a test.', label, shares, percent),
    ]


def _curves(runs, title, note, ylabel, columns: dict, finish: Callable = lambda axes: None) -> dict | None:
    """Columns of metrics.csv, with their labels, over the epochs; None where no run has two points."""
    lines = [(run, column, *run.curve(column)) for run in runs for column in columns]
    if max((len(values) for *_, values in lines), default=0) < 2:
        return None

    def draw(axes) -> None:
        for number, (run, column, epochs, values) in enumerate(lines):
            label = columns[column] if len(runs) == 1 else run.short_name
            marker = 'o' if title.startswith('Tests') else None
            if len(values):
                axes.plot(epochs, values, label=label, marker=marker, markersize=3.5, **_line(number))
        axes.xaxis.get_major_locator().set_params(integer=True)
        finish(axes)

    return _chart(title, note, 'epochs trained', ylabel, draw)


def _cmc(runs: list[Run]) -> dict:
    places = np.arange(1, 51)

    def draw(axes) -> None:
        for number, run in enumerate(runs):
            hits = (run.first_ranks[run.valid, None] <= places).astype(float)  # (V, 50)
            low, high = 100 * interval(hits)
            axes.fill_between(places, low, high, color=SERIES[number % len(SERIES)], alpha=0.16, linewidth=0)
            label = run.short_name if len(runs) > 1 else None
            axes.plot(places, 100 * hits.mean(0), label=label, clip_on=False, **_line(number))
        axes.set_xlim(1, 50)
        axes.set_xticks([1, 5, 10, 20, 30, 40, 50])
        axes.set_ylim(min(axes.dataLim.y0, 95), 100)

    note = 'How many queries have a match at this rank or before. The band is the 95% interval over queries.'
    return _chart('Cumulative match characteristic', note, 'rank', 'queries with a match, %', draw)


def _distances(run: Run) -> dict | None:
    """Histogram, with thresholds: the largest edge of a bin that at most a share of the non-matches is nearer than."""
    histograms = run.match_histogram, run.other_histogram  # (H,) each
    if not all(histogram.sum() for histogram in histograms):
        return None
    edges = run.edges.astype(float)  # (H + 1,)
    matches, others = (np.append(0, histogram.cumsum() / histogram.sum()) for histogram in histograms)  # (H + 1,) each
    places = [int(np.searchsorted(others, rate, 'right')) - 1 for rate in RATES]
    kind = 're-ranked distance' if run.summary['rerank'] else 'squared Euclidean distance of features'

    def draw(axes) -> None:
        used = np.flatnonzero(histograms[0] + histograms[1])
        last = min(used[-1] + 1, max(np.searchsorted(matches, 0.995), np.searchsorted(others, 0.995)))
        bins = np.linspace(edges[used[0]], edges[last], 81)  # equally wide: shares are read off the given bins
        styles = (others, 'non-matches', VERMILLION, '--'), (matches, 'matches', GREEN, '-')
        for shares, label, colour, dash in styles:
            heights = 100 * np.diff(np.interp(bins, edges, shares))  # (80,)
            axes.stairs(heights, bins, fill=True, color=colour, alpha=0.22)
            axes.stairs(heights, bins, color=colour, linestyle=dash, label=label, linewidth=1.4)
        axes.set_ylim(bottom=0)
        axes.set_xlim(bins[0], bins[-1])
        for place, rate, dash in zip(places, RATES, ((0, (1, 1.5)), (0, (4, 1.5))), strict=True):
            axes.axvline(edges[place], color=INK, linewidth=1.2, linestyle=dash, label=f'{rate * 100:g}% false matches')

    found = '; '.join(
        f'at {rate * 100:g}%, {run.distance(edges[place])} and {matches[place]:.1%}'
        for place, rate in zip(places, RATES, strict=True)
    )
    note = f'Upright: the thresholds at two false-match rates, each given with the share of matches below it: {found}.'
    return _chart('Distances of matches and non-matches', note, kind, 'pairs in a bin, %', draw)


def _embedding(run: Run) -> dict | None:
    """PCA of the features of some identities; each has a colour and a shape."""
    features, pids = run.embedding_features.astype(np.float32), run.embedding_pids  # (n, D), (n,)
    if len(features) < 3:
        return None
    _, sizes, axes_of = np.linalg.svd(features - features.mean(0), full_matrices=False)
    plane = (features - features.mean(0)) @ axes_of[:2].T  # (n, 2)
    shares = sizes**2 / max((sizes**2).sum(), np.finfo(np.float32).tiny)

    def draw(axes) -> None:
        for number, pid in enumerate(np.unique(pids)):
            colour, marker = SERIES[number % 6], 'os^DvP'[number // 6 % 6]
            for queried, style in (
                (False, {'s': 18, 'alpha': 0.55, 'linewidths': 0}),
                (True, {'s': 42, 'edgecolors': INK, 'linewidths': 0.9}),
            ):
                mine = (pids == pid) & (run.embedding_is_query == queried)
                label = str(pid) if queried or not run.embedding_is_query[pids == pid].any() else None
                axes.scatter(*plane[mine].T, color=colour, marker=marker, label=label, **style)
        axes.set_aspect('equal', 'datalim')  # a distance is as long in any direction
        style = {'fontsize': 9, 'title_fontsize': 9, 'labelspacing': 0.25, 'handletextpad': 0.1}
        axes.legend(title='identity', loc='center left', bbox_to_anchor=(1, 0.5), **style)

    note = (
        f'Features of {len(np.unique(pids))} identities on their two principal axes; queries are large and outlined.'
        f' Near in this plane need not be near in all {features.shape[1]} dimensions.'
    )
    labels = [
        f'{name} axis ({share:.0%} of variance)' for name, share in zip(('first', 'second'), shares, strict=False)
    ]
    return _chart('Embedding', note, *labels, draw)


def _cameras(run: Run) -> dict | None:
    """mAP and number of queries by the camera of the query (row) and of the gallery (column)."""
    rows, columns = (np.flatnonzero(run.camera_queries.sum(axis)) for axis in (1, 0))
    if not len(rows):
        return None
    cells = [[(run.camera_map[row, column], run.camera_queries[row, column]) for column in columns] for row in rows]
    return {'names': columns.tolist(), 'rows': list(zip(rows.tolist(), cells, strict=True))}


# -------------------------------------------------------------------------------------------------------- ranked lists


def _examples(run: Run) -> dict:
    """The worst, best and some random queries of those that have a match, in order of AP."""
    ap = run.scores[:, 0]
    order = np.flatnonzero(run.valid)
    order = order[np.argsort(ap[order], kind='stable')]  # (V,)
    random = np.random.default_rng(0).permutation(order)[:SHOWN]
    groups = {'worst': order[:SHOWN], 'best': order[-SHOWN:], 'random': random}
    chosen = [i for i in order if any(i in group for group in groups.values())]
    shown = (
        f'Shown are {len(chosen)} of the {len(order)} queries that have a match: the {len(groups["worst"])} of lowest '
        f'average precision (AP), the {len(groups["best"])} of highest, and {len(random)} drawn at random (seed 0); '
        f'a query may be several of these. They stand in order of AP.'
    )
    return _gallery([run], chosen, groups, shown)


def _changes(runs: list[Run], both: np.ndarray) -> dict:
    """The queries whose AP differs most between any two of the runs, most first."""
    ap = np.stack([run.scores[:, 0] for run in runs])  # (R, Q)
    change = np.where(both, ap.max(0) - ap.min(0), -1)  # (Q,)
    chosen = np.argsort(-change, kind='stable')[:SHOWN]
    chosen = chosen[change[chosen] > 0]
    gain = ap[-1] - ap[0]
    groups = {'better': chosen[gain[chosen] > 0], 'worse': chosen[gain[chosen] < 0]}
    shown = (
        f'Shown are the {len(chosen)} queries whose average precision (AP) differs most between the runs, most first. '
        f'Better and worse are said of the last run against the first.'
    )
    return _gallery(runs, chosen, groups, shown)


def _gallery(runs: list[Run], chosen: Sequence[int], groups: dict[str, np.ndarray], shown: str) -> dict:
    """What the template needs to show the chosen queries with the nearest items of each run."""
    thumbnail = functools.cache(_thumbnail)

    def picture(run: Run, subset: str, place: int) -> dict:
        paths = run.files[subset][place]
        return {'name': Path(paths[0]).name, 'image': thumbnail(tuple(paths), FRAMES[subset])}

    def results(run: Run, query: int) -> list[dict]:
        return [
            {
                'place': int(place),
                'distance': float(distance),
                'shown': run.distance(distance),
                'camid': int(run.g_camids[place]),
                'match': bool(run.g_pids[place] == run.q_pids[query]),
                **picture(run, 'gallery', place),
            }
            for place, distance in zip(run.nearest[query], run.nearest_distances[query], strict=True)
            if place >= 0
        ]

    queries = [
        {
            'index': int(query),
            'pid': int(runs[0].q_pids[query]),
            'camid': int(runs[0].q_camids[query]),
            'groups': [name for name, group in groups.items() if query in group],
            'rankings': [
                {
                    'run': run.name,
                    'ap': float(run.scores[query, 0]),
                    'first_rank': int(run.first_ranks[query]),
                    'results': results(run, query),
                }
                for run in runs
            ],
            **picture(runs[0], 'query', query),
        }
        for query in chosen
    ]
    ranked = [item for query in queries for each in query['rankings'] for item in each['results']]
    return {
        'queries': queries,
        'groups': {name: len(group) for name, group in groups.items()},
        'pids': sorted({query['pid'] for query in queries}),
        'shown': shown,
        'missing': len({item['name'] for item in [*queries, *ranked] if item['image'] is None}),
        'tracklets': any(len(paths) > 1 for paths in runs[0].files['query']),
    }


def _thumbnail(paths: tuple[str, ...], frames: int) -> str | None:
    """A small JPEG as a data: URI, of a tracklet some of its frames side by side; None where nothing can be read."""
    number = min(len(paths), frames)
    height = HEIGHT if len(paths) == 1 else STRIP_HEIGHT
    pictures = []
    for path in (paths[i * len(paths) // number] for i in range(number)):
        try:
            with Image.open(path) as image:
                width = min(max(1, round(image.width * height / image.height)), 2 * height)
                pictures.append(np.asarray(image.convert('RGB').resize((width, height), Image.Resampling.BOX)))
        except Exception:  # the data may have moved, and Pillow's readers raise anything
            continue
    if not pictures:
        return None
    file = io.BytesIO()
    Image.fromarray(np.hstack(pictures)).save(file, 'JPEG', quality=QUALITY)
    return f'data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}'


# ----------------------------------------------------------------------------------------------------- activation maps


def activations(
    checkpoint: str | Path,
    images: Sequence[str | Path],
    arch: str | None = None,
    height: int = 256,
    width: int = 128,
    out: str | Path = 'activations.png',
) -> Path:
    """Write a grid of pictures, each beside its copy under the map of activations, and return its path.

    The map is the sum of the squared channels of the network's last stage, scaled from its least to its most in each
    picture, as torchreid's tools show it; after Zagoruyko and Komodakis, ICLR 2017, arXiv:1612.03928.

    Args:
        arch: of the checkpoint; None to know it by its weights.
        height, width: of the network's input, in pixels.

    Raises:
        UserError: the checkpoint or an image cannot be read, they do not fit, or `out` cannot be written.
    """
    import torch
    from matplotlib import colormaps
    from torch.nn import functional as F

    import models
    import weights
    from dataset_loader import read_image
    from transforms import TestTransform

    found = weights.read(checkpoint)
    held, options = found.state_dict, (found.state or {}).get('arguments', {})
    arch = arch or options.get('arch') or weights.arch_of(held)
    if arch is None:
        raise UserError(f'{checkpoint} is of no architecture that is known by its weights; name it with --arch')
    model = models.init_model(arch, num_classes=len(held.get('classifier.bias', [0]))).eval()
    weights.load_into(model, held, allow_other_classifier=True, where=str(checkpoint))
    stage = list(model.base.children())[-1]
    if isinstance(stage, torch.nn.Sequential):
        stage = stage[-1]  # ResNet50M calls the blocks of its last stage one by one
    found = []
    stage.register_forward_hook(lambda module, inputs, output: found.append(output))
    prepare, colours, cells = TestTransform(height, width), colormaps['inferno'], []
    for path in images:
        picture = read_image(path)
        pixels = torch.from_numpy(np.array(picture))[None]  # (1, H, W, 3)
        with torch.inference_mode():
            model(prepare([(torch.tensor([0]), pixels)]))
            heat = found.pop().square().sum(1, keepdim=True)  # (1, 1, h, w)
            heat = F.interpolate(heat, (height, width), mode='bilinear')[0, 0]  # (height, width)
        heat = (heat - heat.min()) / (heat.max() - heat.min()).clamp(min=torch.finfo(heat.dtype).tiny)
        picture = np.asarray(picture.resize((width, height), Image.Resampling.BILINEAR)) / 255  # (height, width, 3)
        cells.append((Path(path).name, picture, 0.4 * picture + 0.6 * colours(heat.numpy())[..., :3]))
    return _write_grid(cells, height / width, Path(out))


def _write_grid(cells: list[tuple[str, np.ndarray, np.ndarray]], shape: float, path: Path) -> Path:
    """name, picture and map (H, W, 3) in 0..1 of each cell -> one PNG."""
    from matplotlib import rc_context
    from matplotlib.cm import ScalarMappable
    from matplotlib.figure import Figure

    rows = math.ceil(len(cells) / 6)
    columns = math.ceil(len(cells) / rows)
    with rc_context({'font.size': 8, 'text.parse_math': False}):
        figure = Figure(figsize=(2 * columns, rows * (shape + 0.3) + 0.6), dpi=150, layout='constrained')
        grid = figure.subplots(rows, columns, squeeze=False)
        for axes in grid.flat:
            axes.set_axis_off()
        for axes, (name, picture, under) in zip(grid.flat, cells, strict=False):
            gap = np.ones((len(picture), max(1, len(picture) // 40), 3))
            axes.imshow(np.hstack([picture, gap, under]))
            axes.set_title(name if len(name) <= 28 else f'...{name[-25:]}', fontsize=7)
        bar = figure.colorbar(
            ScalarMappable(cmap='inferno'), ax=grid, location='bottom', shrink=min(1, 2 / columns), aspect=30,
            ticks=[0, 1], label='sum of squared channels, in each picture',
        )  # fmt: skip
        bar.ax.set_xticklabels(['least', 'most'])
        bar.outline.set_visible(False)
        try:
            write_whole(path, lambda file: figure.savefig(file, format='png', bbox_inches='tight'))
        except OSError as problem:
            raise UserError(f'{path} cannot be written ({problem.strerror}); give another --out') from problem
    return path


# ------------------------------------------------------------------------------------------------------------- command


def main() -> None:
    parser = argparse.ArgumentParser(description='A page of a run, of several compared, or a grid of activation maps.')
    parser.error = _refuse
    parser.add_argument('save_dirs', nargs='*', metavar='SAVE_DIR', help='folder of a tested run; several: compared')
    parser.add_argument('--out', help='file to write (default: SAVE_DIR/report.html, compare.html, activations.png)')
    parser.add_argument('--activations', nargs='+', metavar=('CHECKPOINT', 'IMAGE'), help='map these images instead')
    parser.add_argument('-a', '--arch', help='of the checkpoint (default: known by its weights)')
    parser.add_argument('--height', type=int, default=256, help="of the network's input, in pixels (default: 256)")
    parser.add_argument('--width', type=int, default=128, help='likewise (default: 128)')
    args = parser.parse_args()
    out = {'out': args.out} if args.out else {}
    try:
        if bool(args.save_dirs) == bool(args.activations):
            _refuse('give the --save-dir of one run or of several, or --activations CHECKPOINT IMAGE ...')
        if args.activations:
            checkpoint, *images = args.activations
            if not images:
                _refuse('--activations: no image; name one or more behind the checkpoint')
            if min(args.height, args.width) < 1:
                _refuse('--height and --width: at least 1 pixel')
            path = activations(checkpoint, images, args.arch, args.height, args.width, **out)
        elif len(args.save_dirs) > 1:
            path = compare(args.save_dirs, **out)
        elif args.out:
            _refuse('--out: the page of one run is report.html in its folder; leave the option out')
        else:
            path = write(args.save_dirs[0])
    except UserError as mistake:
        _refuse(str(mistake))
    print(f'Wrote {path}')


def _refuse(message: str) -> None:
    sys.stderr.write(f'error: {message.removeprefix("argument ")}\n')
    sys.exit(2)


if __name__ == '__main__':
    main()
