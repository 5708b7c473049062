"""For a run that tests several data sets: the folders of their results, and the table of their figures."""

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
    """The folder of the results of each target: `save_dir` for the first one, a folder below it for each other one.

    It is named after the target: csv_people.csv for csv:my tables/people.csv. If two targets (including the first one)
    would get the same name, digits of a digest of the full name are appended, so folders do not depend on the order.

    Raises UserError for two targets with the same name, which is possible only for user-defined data sets.
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
    """The figures of all targets in one dict: named as in METRICS for the first one, NAME/rank1 ... for the others."""
    return {
        name if number == 0 else f'{plain(target, 200)}/{name}': value
        for number, (target, some) in enumerate(figures.items())
        for name, value in some.items()
    }


def table(figures: Mapping[str, Figures], places: Sequence[str]) -> dict[str, dict[str, object]]:
    """The entry of each target in results.json: its figures, and its folder relative to that of the first target."""
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
