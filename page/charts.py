"""The charts of a page, as SVG."""

import io
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

import eval_metrics
from page.runs import VALIDATION, TestedRun, interval, labelled
from runtime.errors import plain

if TYPE_CHECKING:  # matplotlib is slow to import
    from matplotlib.axes import Axes

    Draw = Callable[[Axes], None]

RATES = (0.01, 0.001)  # false-match rates

# Charts use Okabe and Ito's colours. In the SVG, each colour is replaced by a CSS variable, which the page sets for its
# light and dark themes, so that one drawing is legible in both.
INK, LINE = '#010203', '#040506'
BLUISH_GREEN, VERMILLION = '#009e73', '#d55e00'  # match, non-match
SERIES = ('#0072b2', VERMILLION, BLUISH_GREEN, '#cc79a7', '#e69f00', '#56b4e9')
VARIABLES = dict(
    zip((INK, LINE, *SERIES), ('ink', 'line', 'blue', 'vermillion', 'green', 'purple', 'orange', 'sky'), strict=True)
)
DASHES = ('solid', (0, (5, 2)), (0, (1.5, 1.5)), (0, (5, 1.5, 1, 1.5)))  # for colour-blind readers
SMALL: dict[str, Any] = {'s': 18, 'alpha': 0.55, 'linewidths': 0}  # a dot for a gallery item
LARGE: dict[str, Any] = {'s': 42, 'edgecolors': INK, 'linewidths': 0.9}  # a dot for a query

Chart = dict[str, str]  # title, note and svg


def _chart(title: str, note: str, xlabel: str, ylabel: str, draw: 'Draw') -> Chart:
    """The chart drawn by `draw(axes)`, as an SVG in the page's font and colours."""
    from markupsafe import Markup
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    style: dict[Any, Any] = {
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
            figure.legend(loc='outside upper left', ncols=columns, handlelength=2.6, fontsize=9.5)  # hides no data
            figure.set_figheight(3 + 0.2 * max(0, math.ceil(len(labels) / columns) - 2))
        file = io.StringIO()
        figure.savefig(file, format='svg', metadata=dict.fromkeys(('Creator', 'Date', 'Format', 'Type')))
    svg = file.getvalue()
    svg = svg[svg.index('<svg') :]
    for colour, variable in VARIABLES.items():
        svg = svg.replace(colour, f'var(--{variable})')
    return {'title': title, 'note': note, 'svg': Markup(svg)}  # matplotlib has escaped its texts


def _line(number: int) -> dict[str, Any]:
    """Colour and dash pattern of line `number`."""
    return {'color': SERIES[number % len(SERIES)], 'linestyle': DASHES[number % len(DASHES)]}


def history(runs: Sequence[TestedRun], losses: Sequence[str]) -> list[Chart | None]:
    """The training curves; for a single run including Rank-1."""

    def logarithmic(axes: 'Axes') -> None:
        from matplotlib.ticker import LogLocator

        axes.set_yscale('log')
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(lambda lr, _: np.format_float_positional(lr, 1, fractional=False, trim='-'))
        axes.yaxis.set_minor_formatter('')
        axes.margins(y=0.15)

    def from_zero(axes: 'Axes') -> None:
        axes.set_ylim(bottom=min(0, axes.dataLim.y0))

    def dots(axes: 'Axes') -> None:
        for line in axes.lines:
            line.set_marker('o')
        axes.yaxis.set_major_formatter(lambda share, _: f'{100 * share:g}')

    labels = {name: name if len(losses) > 1 else None for name in losses}
    shown = ('mAP', 'rank1') if len(runs) == 1 else ('mAP',)
    shares = {metric.name: metric.label for metric in eval_metrics.METRICS if metric.name in shown}
    title, dot = 'Tests during training', 'Each dot is a test.'
    if len(runs) == 1 and any(name.startswith(f'{VALIDATION}/') for name in runs[0].metrics):
        shares = {f'{VALIDATION}/{name}': label for name, label in shares.items()}
        title, dot = 'Validation during training', 'On persons held out of the training set. Each dot is a validation.'
    note = 'As printed during training.'
    if 'active' in losses:
        note += ' active: share of anchors whose triplet violates the margin.'
    tests = f'{" and ".join(shares.values())}, %'
    return [
        _curves(runs, 'Loss', note, 'loss', labels, from_zero),
        _curves(runs, 'Learning rate', 'On a logarithmic scale.', 'learning rate', {'lr': None}, logarithmic),
        _curves(runs, title, dot, tests, shares, dots),
    ]


def _curves(
    runs: Sequence[TestedRun], title: str, note: str, ylabel: str, columns: Mapping[str, str | None], finish: 'Draw'
) -> Chart | None:
    """A chart of columns of metrics.csv, with their labels, over the epochs; None if no run has two points."""
    lines = [(run, column, *run.curve(column)) for run in runs for column in columns]
    if max((len(values) for *_, values in lines), default=0) < 2:
        return None

    def draw(axes: 'Axes') -> None:
        for number, (run, column, epochs, values) in enumerate(lines):
            label = columns[column] if len(runs) == 1 else run.short_name
            if len(values):
                axes.plot(epochs, values, label=label, markersize=3.5, **_line(number))
        axes.locator_params('x', integer=True)
        finish(axes)

    return _chart(title, note, 'epochs trained', ylabel, draw)


def cmc(runs: Sequence[TestedRun]) -> Chart:
    """The share of queries with a match at rank k or better, for k up to 50, with its interval."""
    ranks = np.arange(1, 51)

    def draw(axes: 'Axes') -> None:
        for number, run in enumerate(runs):
            hits = (run.first_ranks[run.valid, None] <= ranks).astype(float)  # (V, 50)
            low, high = 100 * interval(hits)
            axes.fill_between(ranks, low, high, color=SERIES[number % len(SERIES)], alpha=0.16, linewidth=0)
            label = run.short_name if len(runs) > 1 else None
            axes.plot(ranks, 100 * hits.mean(0), label=label, clip_on=False, **_line(number))
        axes.set_xlim(1, 50)
        axes.set_xticks([1, 5, 10, 20, 30, 40, 50])
        axes.set_ylim(min(axes.dataLim.y0, 95), 100)

    note = 'Share of queries with a match at this rank or better. The band is the 95% interval over queries.'
    return _chart('Cumulative match characteristic', note, 'rank', 'queries with a match, %', draw)


def distances(run: TestedRun) -> Chart | None:
    """Histograms of the distances of matches and non-matches, and the threshold of each false-match rate.

    A threshold is the largest bin edge below which the share of non-matches does not exceed the rate. None if there are
    no matches or no non-matches.
    """
    histograms = run.arrays['match_histogram'], run.arrays['other_histogram']  # (H,) each
    if not all(histogram.sum() for histogram in histograms):
        return None
    edges = run.arrays['edges'].astype(float)  # (H + 1,)
    matches, others = (np.append(0, histogram.cumsum() / histogram.sum()) for histogram in histograms)  # (H + 1,) each
    thresholds = [int(np.searchsorted(others, rate, 'right')) - 1 for rate in RATES]  # index into edges
    kind = 're-ranked distance' if run.summary['rerank'] else f'{run.distance_name} of features'

    def draw(axes: 'Axes') -> None:
        used = np.flatnonzero(histograms[0] + histograms[1])
        last = min(used[-1] + 1, max(np.searchsorted(matches, 0.995), np.searchsorted(others, 0.995)))
        bins = np.linspace(edges[used[0]], edges[last], 81)  # of equal width: shares are interpolated between the edges
        styles = (others, 'non-matches', VERMILLION, '--'), (matches, 'matches', BLUISH_GREEN, '-')
        for shares, label, colour, dash in styles:
            heights = 100 * np.diff(np.interp(bins, edges, shares))  # (80,)
            axes.stairs(heights, bins, fill=True, color=colour, alpha=0.22)
            axes.stairs(heights, bins, color=colour, linestyle=dash, label=label, linewidth=1.4)
        axes.set_ylim(bottom=0)
        axes.set_xlim(bins[0], bins[-1])
        for index, rate, dashes in zip(thresholds, RATES, ((1, 1.5), (4, 1.5)), strict=True):
            label = f'{rate * 100:g}% false matches'
            axes.axvline(edges[index], color=INK, linewidth=1.2, linestyle=(0, dashes), label=label)

    listed = '; '.join(
        f'at {rate * 100:g}%, {run.distance(edges[index])} and {matches[index]:.1%}'
        for index, rate in zip(thresholds, RATES, strict=True)
    )
    note = f'Vertical: the thresholds at two false-match rates, each with the share of matches below it: {listed}.'
    return _chart('Distances of matches and non-matches', note, kind, 'pairs in a bin, %', draw)


def embedding(run: TestedRun) -> Chart | None:
    """PCA of the features of some identities, each with its own colour and marker; None for fewer than 3 features."""
    features = run.arrays['embedding_features'].astype(np.float32)  # (n, D)
    pids, is_query = run.arrays['embedding_pids'], run.arrays['embedding_is_query']  # (n,) each
    if len(features) < 3:
        return None
    centred = features - features.mean(0)
    _, sizes, principal = np.linalg.svd(centred, full_matrices=False)
    plane = centred @ principal[:2].T  # (n, 2)
    shares = sizes**2 / max((sizes**2).sum(), np.finfo(np.float32).tiny)

    def draw(axes: 'Axes') -> None:
        for number, pid in enumerate(np.unique(pids)):
            colour, marker = SERIES[number % 6], 'os^DvP'[number // 6 % 6]
            for queried, style in enumerate((SMALL, LARGE)):
                some = (pids == pid) & (is_query == queried)
                label = (
                    labelled(plain(run.name_of(int(pid)), 24)) if queried or not is_query[pids == pid].any() else None
                )
                axes.scatter(*plane[some].T, color=colour, marker=marker, label=label, **style)
        axes.set_aspect('equal', 'datalim')  # distances are the same in every direction
        small: dict[str, Any] = {'fontsize': 9, 'title_fontsize': 9, 'labelspacing': 0.25, 'handletextpad': 0.1}
        axes.legend(title='identity', loc='center left', bbox_to_anchor=(1, 0.5), **small)

    note = (
        f'Features of {len(np.unique(pids))} identities on their two principal axes; queries are large and outlined.'
        f' Points that are near in this plane need not be near in all {features.shape[1]} dimensions.'
    )
    first, second = (f'{share:.0%}' for share in shares[:2])
    return _chart('Embedding', note, f'first axis ({first} of variance)', f'second axis ({second} of variance)', draw)
