"""Checks of the test before training: whether queries have matches, and whether the files exist."""

import os
import time
from collections.abc import Sequence

import torch

from eval_metrics import check_matches
from readers.tree import Dataset, ids_of
from runtime.device import Run
from runtime.errors import UserError

LOOK_UP_SECONDS = 2  # time limit, at the start of a run, for checking that the test's files exist


def check_items(dataset: Dataset) -> None:
    """Raise UserError if, according to pids and camids, no query has a match; files are not examined."""
    for subset in ('query', 'gallery'):
        if not getattr(dataset, subset):
            raise UserError(f'{dataset.name}: the {subset} set is empty, so there is nothing to test')
    check_matches(*ids_of(dataset.query, dataset.gallery))


def check_files(paths: Sequence[str], run: Run) -> None:
    """Raise UserError, in every process, if a file of the test is missing.

    The first process checks them in order for LOOK_UP_SECONDS; on a slow disk the rest is left to the test.
    """
    missing = torch.zeros(len(paths), dtype=torch.uint8)
    if run.rank == 0:
        missing[look_up(paths, LOOK_UP_SECONDS)] = 1
    rows = run.sum(missing).nonzero().flatten().tolist()
    if rows:
        first, *others = [paths[row] for row in rows]
        also = f', also {", ".join(others[:2])}{" ..." if len(others) > 2 else ""}' if others else ''
        text = (
            f'cannot read the image {first}: No such file or directory (missing: {len(rows)} of {len(paths)} files of '
            f'the test{also}); restore them, or unpack the data set again if it is a published one'
        )
        raise UserError(' '.join(text.splitlines()))


def look_up(paths: Sequence[str], seconds: float) -> list[int]:
    """The indices of `paths` that do not exist, as far as can be checked in `seconds`; at least one is checked."""
    missing, end = [], time.monotonic() + seconds
    for index, path in enumerate(paths):
        try:
            os.stat(path)
        except (
            FileNotFoundError,
            NotADirectoryError,
        ):  # other errors may be transient: reading an image is tried three times
            missing.append(index)
        if time.monotonic() >= end:
            break
    return missing
