"""The table of cameras: mAP of the queries of each camera in the gallery of each camera."""

from collections.abc import Callable
from typing import Any

import numpy as np

from eval_metrics import Matches, average_precision
from page.runs import TestedRun

MOST_CAMERAS = 32  # cameras in a table: each needs a ranking, and a larger table would not be readable


def too_many(q_camids: np.ndarray, g_camids: np.ndarray) -> str:
    """Why there is no table if there are more than MOST_CAMERAS cameras, otherwise ''."""
    number = len(np.union1d(q_camids, g_camids))
    return f'{number} cameras, more than {MOST_CAMERAS}' if number > MOST_CAMERAS else ''


def table(
    q_camids: np.ndarray, g_camids: np.ndarray, rank: Callable[[np.ndarray], Matches] | None
) -> dict[str, np.ndarray]:
    """The arrays of the table, for any integers as camids; empty arrays without `rank`.

    camera_ids (C,), ascending; camera_map (C, C), the mAP of each camera's queries (row) in each camera's gallery
    (column), NaN if no query has a match there; camera_queries (C, C), the number of queries with a match.

    Args:
        rank: ranks all queries in a part of the gallery, given its indices (n,).
    """
    camids = np.union1d(q_camids, g_camids) if rank else np.zeros(0, np.int64)  # (C,)
    means, counts = np.full((len(camids), len(camids)), np.nan), np.zeros((len(camids), len(camids)), np.int64)
    for column, camid in enumerate(camids):
        items = np.flatnonzero(g_camids == camid)  # (n,) of the gallery
        if rank is None or not len(items):
            continue
        result = rank(items)
        precisions = average_precision(result.ranks, result.offsets)  # (Q,)
        for row, of in enumerate(camids):
            valid = precisions[(q_camids == of) & result.valid]
            counts[row, column] = len(valid)
            if len(valid):
                means[row, column] = valid.mean()
    return {'camera_ids': camids, 'camera_map': means, 'camera_queries': counts}


def view(run: TestedRun) -> dict[str, Any] | None:
    """The data for the page: mAP and number of queries by the camera of the query (row) and the gallery (column).

    `left_out` is the reason if there is no table. Returns None if neither is known.
    """
    means, counts = run.arrays['camera_map'], run.arrays['camera_queries']  # (C, C) each
    camids = run.arrays.get('camera_ids', np.arange(len(means)))  # (C,)
    rows, columns = (np.flatnonzero(counts.sum(axis)) for axis in (1, 0))
    left_out = run.summary.get('cameras_left_out') or too_many(camids[rows], camids[columns])
    if left_out:
        return {'left_out': left_out}
    if not len(rows):
        return None
    cells = [[(means[row, column], counts[row, column]) for column in columns] for row in rows]
    return {'names': camids[columns].tolist(), 'rows': list(zip(camids[rows].tolist(), cells, strict=True))}
