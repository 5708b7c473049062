"""Checks before training that a test will work: that queries have matches, and that the files exist."""

import errno
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch

from arguments import TestOptions
from data_manager import names_of
from eval_metrics import check_matches
from files.paths import same_files
from readers.tree import Dataset, Item, ids_of, paths_of
from runtime.device import Run
from runtime.errors import UserError, plain

LOOK_UP_SECONDS = 2  # time limit, at the start of a run, for checking that the test's files exist


def fitting(options: TestOptions, dataset: Dataset) -> TestOptions:
    """The options of the test, with --any-camera if the cameras of the data set are unknown.

    In that case --multi-query, which needs cameras, raises UserError.
    """
    if dataset.no_cameras and options.multi_query:
        raise UserError(
            f'--multi-query: the cameras of {plain(dataset.name, 500)} are unknown, so that averaged images in the '
            'gallery would count as matches; omit the option'
        )
    return replace(options, any_camera=True) if dataset.no_cameras else options


def check_script(dataset: Dataset, options: TestOptions) -> None:
    """Raise UserError for options that a user's script ignores because it reads its data with `init_dataset`."""
    alone = dataset.targets == [dataset] and dataset.name == options.dataset
    ignored = {
        '--validate': options.validate and not options.evaluate and dataset.validation is None,
        '--combine': options.combine and not options.evaluate and alone,
        '-t': options.targets and alone and options.dataset not in names_of(options.targets),
    }
    if flags := [flag for flag, is_ignored in ignored.items() if is_ignored]:
        raise UserError(
            f'this script does not know {flags[0]}: create its data set with data_manager.init_datasets(args.data), or '
            'omit the option'
        )


def check_items(dataset: Dataset, any_camera: bool, run: Run) -> list[np.ndarray]:
    """The ids that the test uses for ranking: the pids of query and gallery, then their camids.

    With `any_camera` file numbers replace the camids, so that a query drops only its own file. Otherwise no file is
    examined.

    Raises:
        UserError: the query or gallery set is empty, or no query has a match.
    """
    for subset in ('query', 'gallery'):
        if not getattr(dataset, subset):
            raise UserError(f'{dataset.name}: the {subset} set is empty, so there is nothing to test')
    q_pids, g_pids, q_camids, g_camids = ids_of(dataset.query, dataset.gallery)
    if any_camera:
        q_files, g_files = np.zeros(len(q_pids), np.int64), np.zeros(len(g_pids), np.int64)
        if run.rank == 0:  # every process must use the same numbers, even if hosts see different files
            q_paths, g_paths = ([item[0] for item in items] for items in (dataset.query, dataset.gallery))
            q_files, g_files = same_files(q_pids, g_pids, q_paths, g_paths)
        q_camids, g_camids = (run.sum(torch.from_numpy(files)).numpy() for files in (q_files, g_files))
    check_matches(q_pids, g_pids, q_camids, g_camids, any_camera)
    return [q_pids, g_pids, q_camids, g_camids]


class Averaged(NamedTuple):
    """With --multi-query: the items over which the features of the queries are averaged."""

    items: list[Item]
    groups: np.ndarray  # (N,) int64, the number, from 0, of each item's person and camera
    of_queries: np.ndarray  # (Q,) int64, the same for each query


def averaged(dataset: Dataset) -> Averaged:
    """All items of each query's person in its camera, by pid and camid.

    Raises:
        UserError: there are no items for some query, or no items except one query for each person and camera.
    """
    numbers = {key: number for number, key in enumerate(dict.fromkeys(item[1:] for item in dataset.query))}
    items = [item for item in dataset.multi_query() if item[1:] in numbers]
    groups, of_queries = (np.array([numbers[item[1:]] for item in some], np.int64) for some in (items, dataset.query))
    lacking = np.flatnonzero(~np.isin(of_queries, groups))
    if len(lacking):
        first = plain(paths_of(dataset.query[lacking[0]])[0], 1000)
        raise UserError(
            f'--multi-query: {dataset.name} has no image of the person and camera of {len(lacking)} of its '
            f'{len(of_queries)} queries, the first one {first}; unpack the data set again, or omit the option'
        )
    if len(items) == len(numbers) and items == dataset.query:
        raise UserError(
            f'--multi-query: {dataset.name} has one query of each person in a camera, and no other images of them, '
            'so there is nothing to average; omit the option'
        )
    return Averaged(items, groups, of_queries)


def check_files(paths: Sequence[str], run: Run) -> None:
    """Raise UserError, in every process, if a file of the test is missing.

    The first process checks them in order for at most LOOK_UP_SECONDS; on a slow disk the rest is left to the test.
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
    """The indices of missing `paths`, as far as they can be checked in `seconds`; at least one is checked."""
    missing, end = [], time.monotonic() + seconds
    for index, path in enumerate(paths):
        try:
            os.stat(path)
        except OSError as error:  # others may be transient: reading an image is tried three times
            if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG):
                missing.append(index)
        if time.monotonic() >= end:
            break
    return missing
