"""Several data sets that a run tests: the folders of their results, and the table of their figures."""

import hashlib
import os
import re
from collections.abc import Mapping, Sequence

from eval_metrics import METRICS
from page.runs import TARGETS
from runtime.errors import UserError, plain

Figures = Mapping[str, float]  # the mean of each of METRICS

LONGEST_NAME = 80  # characters of the name of a folder


def folders(save_dir: str, names: Sequence[str]) -> list[str]:
    """The folder of the results of each target: `save_dir` of the first one, for each other one a folder below it.

    It is named as the target is: csv_people.csv for csv:my tables/people.csv. If two targets would have one name, also
    if one of them is the first, digits of a digest of the whole name follow, so that no folder depends on their order.

    Raises UserError for two targets of one name, which only classes of one's own can have.
    """
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f'two data sets that are tested have the name {plain(twice[0], 500)}; give one another name')
    short = [_short(name) for name in names]
    pairs = zip(names, short, strict=True)
    unique = [text if short.count(text) == 1 else f'{text}_{_digits(name)}' for name, text in pairs]
    return [save_dir, *(os.path.join(save_dir, TARGETS, text) for text in unique[1:])][: len(names)]


def _short(name: str) -> str:
    form, colon, place = name.partition(':')
    text = f'{form}_{os.path.basename(os.path.abspath(place))}' if colon else name
    return re.sub(r'[^\w.-]+', '_', text)[-LONGEST_NAME:].lstrip('.-') or 'target'


def _digits(name: str) -> str:
    return hashlib.sha256(name.encode(errors='surrogateescape')).hexdigest()[:8]


def named(figures: Mapping[str, Figures]) -> dict[str, float]:
    """The figures of all targets by one name each: of the first one those of METRICS, of another one NAME/rank1 ..."""
    return {
        name if number == 0 else f'{plain(target, 200)}/{name}': value
        for number, (target, some) in enumerate(figures.items())
        for name, value in some.items()
    }


def table(figures: Mapping[str, Figures], places: Sequence[str]) -> dict[str, dict[str, object]]:
    """What results.json has of each target: its figures, and the folder of its results, seen from that of the first."""
    rows = zip(figures.items(), places, strict=True)
    return {name: {**some, 'folder': os.path.relpath(place, places[0])} for (name, some), place in rows}


def show(figures: Mapping[str, Figures]) -> None:
    """Print a row for each target."""
    names = [plain(target, 60) for target in figures]
    width = max(map(len, names))
    print('Targets ----------')
    print(' '.join([' ' * width, *(f'{metric.label:>8}' for metric in METRICS)]))
    for name, some in zip(names, figures.values(), strict=True):
        print(' '.join([f'{name:{width}}', *(f'{some[metric.name]:>8.1%}' for metric in METRICS)]))
    print('------------------')
