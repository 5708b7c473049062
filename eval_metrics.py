"""CMC, mAP and mINP from the ranks of the matches, or from a distance matrix.

The protocol is Market-1501's (Zheng et al., Scalable Person Re-identification: A Benchmark, ICCV 2015): for each query,
gallery items of the same pid and the same camid are dropped; the remaining items of the same pid are its matches; a
query without a match is skipped. AP is the mean of the precisions at the matches, as in the original; the code of Zheng
et al. applies the trapezoidal rule to the precision-recall curve. Items are sorted by distance, ties by gallery index.
With --any-camera file numbers replace the camids (`files.paths.same_files`), so that a query drops only its own file.

METRICS lists the reported metrics. To add one, add a function and a row: it is then printed, written to results.json,
results.csv, metrics.csv and TensorBoard, and shown on the page.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from os import cpu_count
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from runtime.errors import UserError

if TYPE_CHECKING:
    from numpy.typing import ArrayLike
    from torch import Tensor

    Ids = ArrayLike | Tensor

BLOCK = 1 << 20  # elements of a distance matrix that a thread ranks at a time, so that its copies fit the cache


class Pairs(NamedTuple):
    """Each query with the gallery items of its pid: those of query i are at offsets[i]:offsets[i + 1]."""

    offsets: np.ndarray  # (Q + 1,) int64
    places: np.ndarray  # (P,) int64, gallery indices, ascending within a query
    dropped: np.ndarray  # (P,) bool: also same camid as the query, so not a match

    def among(self, queries: slice) -> tuple[slice, np.ndarray]:
        """The slice of these queries' pairs (p of P), and for each pair the index of its query in the slice: (p,)."""
        offsets = self.offsets[queries.start : queries.stop + 1]
        return slice(offsets[0], offsets[-1]), rows_of(offsets)


@dataclass(frozen=True)
class Matches:
    """The ranks of the matches of each query: those of query i are at offsets[i]:offsets[i + 1], nearest first."""

    offsets: np.ndarray  # (Q + 1,) int64
    places: np.ndarray  # (M,) int64, in the gallery
    distances: np.ndarray  # (M,) float
    ranks: np.ndarray  # (M,) int64, from 1, in the gallery without the query's dropped items
    num_dropped: np.ndarray  # (Q,) int64, gallery items that the query drops

    @property
    def valid(self) -> np.ndarray:
        """(Q,) bool: the queries that are scored."""
        return np.diff(self.offsets) > 0

    @property
    def num_valid(self) -> int:
        return int(self.valid.sum())

    @property
    def num_skipped(self) -> int:
        return int((~self.valid).sum())

    @property
    def num_same_camera(self) -> int:
        """Number of queries skipped because the gallery contains their identity only in their own camera."""
        return int((~self.valid & (self.num_dropped > 0)).sum())

    @property
    def num_absent(self) -> int:
        """Number of queries skipped because their identity is not in the gallery."""
        return self.num_skipped - self.num_same_camera

    def cmc(self, max_rank: int = 50) -> np.ndarray:
        """CMC (max_rank,) of the valid queries. Raises UserError if there is none."""
        self.check_valid()
        return cmc(self.ranks, self.offsets, max_rank)

    @property
    def mAP(self) -> float:
        """Mean average precision of the valid queries. Raises UserError if there is none."""
        self.check_valid()
        return float(np.nanmean(average_precision(self.ranks, self.offsets)))

    @property
    def mINP(self) -> float:
        """Mean inverse negative penalty of the valid queries. Raises UserError if there is none."""
        self.check_valid()
        return float(np.nanmean(inverse_negative_penalty(self.ranks, self.offsets)))

    def figures(self) -> dict[str, float]:
        """The mean of each of METRICS over the valid queries. Raises UserError if there is none."""
        self.check_valid()
        return {metric.name: float(np.nanmean(metric.score(self.ranks, self.offsets))) for metric in METRICS}

    def check_valid(self, any_camera: bool = False) -> None:
        if self.num_valid == 0:
            raise no_match(self.num_absent, self.num_same_camera, any_camera)


def cmc(ranks: np.ndarray, offsets: np.ndarray, max_rank: int = 50) -> np.ndarray:
    """(max_rank,) float64: the fraction of valid queries whose first match is at rank 1, 2, ..., max_rank or better.

    `ranks` (M,) of the matches, from 1, those of query i at offsets[i]:offsets[i + 1] in ascending order. Queries
    without a match are skipped; at least one must have a match. Beyond the end of a small gallery the curve is flat.
    """
    first = ranks[offsets[:-1][np.diff(offsets) > 0]]  # (V,)
    return np.bincount(first[first <= max_rank] - 1, minlength=max_rank).cumsum() / len(first)


def average_precision(ranks: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """(Q,) float64: mean precision at the ranks of the matches, NaN without a match; arguments as for `cmc`."""
    rows, matches = rows_of(offsets), np.diff(offsets)  # (M,), (Q,)
    hits = np.arange(1, len(ranks) + 1) - offsets[rows]  # (M,) the query's matches up to this one
    total = np.bincount(rows, hits / ranks, minlength=len(matches))  # (Q,)
    precisions = np.full(len(matches), np.nan)
    np.divide(total, matches, out=precisions, where=matches > 0)
    return precisions


def inverse_negative_penalty(ranks: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """(Q,) float64: number of matches / rank of the last one, NaN without a match; arguments as for `cmc`.

    Ye et al., Deep Learning for Person Re-identification: A Survey and Outlook, TPAMI 2021, arXiv:2001.04193.
    """
    matches = np.diff(offsets)  # (Q,)
    valid = matches > 0
    penalty = np.full(len(matches), np.nan)
    penalty[valid] = matches[valid] / ranks[offsets[1:][valid] - 1]
    return penalty


def hit(ranks: np.ndarray, offsets: np.ndarray, k: int) -> np.ndarray:
    """(Q,) float64: 1 if there is a match at rank k or better, else 0; NaN without a match; arguments as for `cmc`."""
    valid = np.diff(offsets) > 0  # (Q,)
    hits = np.full(len(valid), np.nan)
    hits[valid] = ranks[offsets[:-1][valid]] <= k
    return hits


@dataclass(frozen=True)
class Metric:
    """A metric: the mean of a score over the queries that have a match."""

    name: str  # in results.json, metrics.csv and TensorBoard
    label: str  # as printed and on the page
    score: Callable[[np.ndarray, np.ndarray], np.ndarray]  # ranks, offsets as for cmc -> (Q,) float64, 0..1 or NaN


# Not printed in lines of their own: mAP and CMC have the original's format; mINP is only in the files and on the page.
CLASSIC = frozenset({'mAP', 'mINP', 'rank1', 'rank5', 'rank10'})

METRICS: tuple[Metric, ...] = (
    Metric('mAP', 'mAP', average_precision),
    Metric('mINP', 'mINP', inverse_negative_penalty),
    *(Metric(f'rank{k}', f'Rank-{k}', partial(hit, k=k)) for k in (1, 5, 10)),
)


def evaluate(
    distmat: 'np.ndarray | Tensor', q_pids: 'Ids', g_pids: 'Ids', q_camids: 'Ids', g_camids: 'Ids', max_rank: int = 50
) -> tuple[np.ndarray, float]:
    """CMC (max_rank,) and mAP of a distance matrix (Q, G), numpy or torch; ids (Q,) and (G,) are any array-likes.

    Raises:
        UserError: the shapes do not fit, a distance is NaN, or no query has a match.
    """
    matches = match_ranks(distmat, q_pids, g_pids, q_camids, g_camids)
    return matches.cmc(max_rank), matches.mAP


def match_ranks(
    distmat: 'np.ndarray | Tensor', q_pids: 'Ids', g_pids: 'Ids', q_camids: 'Ids', g_camids: 'Ids'
) -> Matches:
    """The matches in a distance matrix, which is ranked like a tile of `ranking.count`.

    Arguments and errors are those of `evaluate`, but it is not an error if no query has a match.
    """
    q_pids, g_pids, q_camids, g_camids = check_ids(q_pids, g_pids, q_camids, g_camids)
    if tuple(distmat.shape) != (len(q_pids), len(g_pids)):
        raise UserError(
            f'the distance matrix is {tuple(distmat.shape)}, but there are {len(q_pids)} queries and {len(g_pids)} '
            'gallery items: its shape must be (queries, gallery)'
        )
    pairs = same_identity(q_pids, g_pids, q_camids, g_camids)
    distances = np.empty(len(pairs.places))
    counts = np.empty(len(pairs.places), np.int64)

    def work(begin: int) -> None:
        queries = slice(begin, begin + step)
        block = _floats(distmat[queries])  # (B, G), a copy
        if np.isnan(block).any():
            raise UserError('the distance matrix contains NaN: check the features that it was computed from')
        selected, rows = pairs.among(queries)
        places = pairs.places[selected]  # (p,)
        distances[selected] = block[rows, places]
        block[rows, places] = np.nan
        counts[selected] = count_before(block, np.sort(block, axis=1), rows, distances[selected], places)

    step = max(1, BLOCK // max(1, len(g_pids)))
    with ThreadPoolExecutor(min(8, cpu_count() or 1)) as pool:
        list(pool.map(work, range(0, len(q_pids), step)))
    return rank_matches(pairs, distances, counts)


def check_matches(q_pids: 'Ids', g_pids: 'Ids', q_camids: 'Ids', g_camids: 'Ids', any_camera: bool = False) -> None:
    """Raise UserError if no query has a match, which does not depend on the distances; ids are any array-likes.

    any_camera: the camids are file numbers (for the message)
    """
    pairs = same_identity(*check_ids(q_pids, g_pids, q_camids, g_camids))
    if pairs.dropped.all():  # or there is no pair at all
        absent = int(np.count_nonzero(np.diff(pairs.offsets) == 0))
        raise no_match(absent, len(pairs.offsets) - 1 - absent, any_camera)


def no_match(absent: int, dropped: int, any_camera: bool = False) -> UserError:
    """The error for a test without any match: the number of queries for each reason, and what to do."""
    reasons = f'none of the {absent + dropped} queries has a match: {absent} whose person is not in the gallery'
    if any_camera:
        return UserError(
            f'{reasons}, {dropped} whose only match is their own file; a query needs another gallery item of its '
            'pid: correct the pids of the data set'
        )
    return UserError(
        f'{reasons}, {dropped} whose person is in the same camera only; a query needs a gallery item of its pid from '
        'another camera: correct the pids and camids of the data set; if the cameras are unknown, use --any-camera'
    )


def same_identity(q_pids: np.ndarray, g_pids: np.ndarray, q_camids: np.ndarray, g_camids: np.ndarray) -> Pairs:
    """All pairs with equal pids; ids as returned by `check_ids`. No step needs memory for queries x gallery items."""
    order = np.argsort(g_pids, kind='stable')
    by_pid = g_pids[order]
    first = np.searchsorted(by_pid, q_pids, 'left')  # (Q,)
    offsets = np.concatenate([[0], np.cumsum(np.searchsorted(by_pid, q_pids, 'right') - first)])
    rows = rows_of(offsets)  # (P,)
    places = order[first[rows] + np.arange(len(rows)) - offsets[rows]]  # (P,)
    return Pairs(offsets, places, g_camids[places] == q_camids[rows])


def count_before(
    block: np.ndarray, by_distance: np.ndarray, rows: np.ndarray, distances: np.ndarray, earlier: np.ndarray
) -> np.ndarray:
    """(p,) int64: how many items precede each of p items in the ranking of its query.

    An item precedes another if it is nearer, or equally near and earlier in the gallery.

    Args:
        block: (B, W) distances of B queries to W items in gallery order; NaN or infinite for items that must not be
            counted (the query's own identity).
        by_distance: (B, W), `block` with each row sorted.
        rows: (p,) ascending, the row of the item's query.
        distances: (p,) of the items.
        earlier: (p,) the number of the W items that are earlier in the gallery: 0 for an item before all of them, W for
            one after all of them.
    """
    width = block.shape[1]
    bounds = distances.astype(block.dtype)  # (p,)
    after = earlier == width  # all equally near items precede an item after the block
    values = by_distance.ravel()
    first, last = rows * width, rows * width + width - 1  # (p,) where the row starts and ends in `values`
    nearer = first - 1  # (p,) the last value known to precede; a binary search for all items at once
    for step in 1 << np.arange(width.bit_length())[::-1]:
        probe = np.minimum(nearer + step, last)
        precede = (values[probe] < bounds) | (after & (values[probe] == bounds))
        nearer = np.where(precede, probe, nearer)
    counts: np.ndarray = nearer + 1 - first
    # For an item inside the block, the equally near items that are earlier precede it.
    tied = (earlier > 0) & (earlier < width)
    tied[tied] = by_distance[rows[tied], np.minimum(counts[tied], width - 1)] == bounds[tied]
    for i in np.flatnonzero(tied):
        counts[i] += np.count_nonzero(block[rows[i], : earlier[i]] == bounds[i])
    return counts


def rank_matches(pairs: Pairs, distances: np.ndarray, counts: np.ndarray) -> Matches:
    """The matches, from the distances (P,) of all pairs and the number (P,) of items of other pids before each."""
    num_queries = len(pairs.offsets) - 1
    rows = rows_of(pairs.offsets)  # (P,)
    keep = np.flatnonzero(~pairs.dropped)
    keep = keep[np.lexsort((pairs.places[keep], distances[keep], rows[keep]))]  # (M,) by query, then nearest first
    offsets = np.concatenate([[0], np.cumsum(np.bincount(rows[keep], minlength=num_queries))])
    hits = np.arange(1, len(keep) + 1) - offsets[rows[keep]]  # (M,) the query's matches up to this one
    num_dropped = np.bincount(rows[pairs.dropped], minlength=num_queries)
    return Matches(offsets, pairs.places[keep], distances[keep], counts[keep] + hits, num_dropped)


def rows_of(offsets: np.ndarray) -> np.ndarray:
    """The row (M,) of each element of a CSR array, from its offsets (N + 1,), which may start above 0."""
    return np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))


def check_ids(q_pids: 'Ids', g_pids: 'Ids', q_camids: 'Ids', g_camids: 'Ids') -> list[np.ndarray]:
    """The four arguments as int64 arrays. Raises UserError if pids and camids differ in length."""
    from torch import Tensor  # here: the page, which reads metrics too, needs no torch

    ids = [
        np.asarray(each.cpu() if isinstance(each, Tensor) else each).astype(np.int64).reshape(-1)
        for each in (q_pids, g_pids, q_camids, g_camids)
    ]
    for subset, pids, camids in (('query', ids[0], ids[2]), ('gallery', ids[1], ids[3])):
        if len(pids) != len(camids):
            raise UserError(f'the {subset} has {len(pids)} pids but {len(camids)} camids: each item needs one of each')
    return ids


def _floats(block: 'np.ndarray | Tensor') -> np.ndarray:
    """A copy on the CPU, in the same precision, but at least float32."""
    if not isinstance(block, np.ndarray):
        block = block.detach().cpu()
        block = (block.float() if block.itemsize < 4 else block).numpy()  # numpy has no bfloat16
    return np.array(block, np.result_type(block, np.float32))
