"""k-reciprocal re-ranking: distances that take the neighbours of neighbours into account, in bounded memory."""

from collections.abc import Callable
from threading import Lock

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from eval_metrics import rows_of
from runtime.errors import UserError
from runtime.tiles import (
    NONE,
    Points,
    distances_of,
    find,
    in_threads,
    is_host,
    joined,
    nearer,
    nearest_device,
    nearest_host,
    squared_distances,
    tile_of,
    tiles,
)

LISTED = 4  # times k1 nearest items are kept for re-ranking; few neighbours of neighbours are farther away


def reranked(
    queries: Points, gallery: Points, k1: int = 20, k2: int = 6, lambda_value: float = 0.3
) -> Callable[[slice], np.ndarray]:
    """k-reciprocal re-ranking. Returns a function that maps a slice of B queries to their distances (B, G), float32.

    Zhong et al., Re-ranking Person Re-identification with k-reciprocal Encoding, CVPR 2017, arXiv:1701.08398, as in
    their published evaluation: lambda * squared Euclidean distance, divided by the query's largest distance to any
    query or gallery item, + (1 - lambda) * Jaccard distance of the expanded k-reciprocal neighbourhoods. No array of
    size N x N, N = Q + G, is held in memory, only a copy of the features and about a hundred neighbours per item.

    Args:
        k1: number of nearest items considered as reciprocal neighbours, without the item itself.
        k2: number of nearest items, including the item itself, over which neighbourhoods are averaged.
        lambda_value: weight of the Euclidean distance.

    Raises:
        UserError: k1 or k2 is below 1, or lambda_value is not in [0, 1].
    """
    if k1 < 1 or k2 < 1 or not 0 <= lambda_value <= 1:
        raise UserError(f're-ranking needs k1 >= 1, k2 >= 1 and 0 <= lambda <= 1, not {k1}, {k2} and {lambda_value}')
    lambda_value = float(lambda_value)  # a numpy scalar would promote float32 to float64
    everyone = joined(queries, gallery)
    keys, farthest = neighbours(everyone, max(LISTED * (k1 + 1), k2))  # (N, k), (N,)
    places = keys & 0xFFFFFFFF  # (N, k)
    near, half = _graph(places[:, : k1 + 1]), _graph(places[:, : int(np.around(k1 / 2)) + 1])
    near, half = near * near.T, half * half.T  # (N, N) of ones: reciprocal neighbours
    # A neighbour adds its own k1 / 2 reciprocal neighbours if more than two thirds of them are already included.
    brings = near * (near @ half.T)
    brings.data = (3 * brings.data > 2 * np.diff(half.indptr)[brings.indices]).astype(np.float32)
    weights = (near + brings @ half).tocsr()  # (N, N)
    weights.eliminate_zeros()
    rows = rows_of(weights.indptr)
    weights.data = np.exp(-_distances_between(everyone, keys, rows, weights.indices) / farthest[rows])
    weights.data /= np.bincount(rows, weights.data, len(farthest))[rows]
    if k2 > 1:
        weights = (_graph(places[:, :k2]) @ weights / min(k2, len(places))).tocsr()  # (N, N)
    of_queries, of_items = weights[: len(queries)], weights[len(queries) :].tocsc()

    def distances(rows: slice) -> np.ndarray:
        some, width = of_queries[rows], len(gallery)
        # Sum of the minima of two rows of weights: each weight of a query is paired with the items that also have it.
        first, last = of_items.indptr[some.indices], of_items.indptr[some.indices + 1]
        meetings = np.concatenate([[0], np.cumsum(last - first, dtype=np.int64)])
        mine = rows_of(meetings)  # (n,) of the weights of the queries
        theirs = first[mine] + np.arange(len(mine)) - meetings[mine]  # (n,) of the weights of the items
        cells = rows_of(some.indptr)[mine] * width + of_items.indices[theirs]
        minima = np.minimum(some.data[mine], of_items.data[theirs])
        shared = np.bincount(cells, minima, some.shape[0] * width).reshape(-1, width).astype(np.float32)  # (B, G)
        block = (1 - lambda_value) * (1 - shared / (2 - shared))
        for left in range(0, width, 2048):
            columns = slice(left, left + 2048)
            euclidean = squared_distances(queries[rows], gallery[columns]).clamp_(min=0).cpu().numpy()
            block[:, columns] += lambda_value * euclidean / farthest[: len(queries)][rows, None]
        return block

    return distances


def neighbours(everyone: Points, k: int) -> tuple[np.ndarray, np.ndarray]:
    """For each of N points, the keys (N, min(k, N)) of the nearest, including itself, and the largest distance (N,)."""
    number, device = len(everyone), everyone.features.device
    keys = np.full((number, min(k, number)), NONE)
    farthest = np.zeros(number, np.float32)
    nearest = nearest_host if is_host(device) else nearest_device
    lock = Lock()

    def work(rows: slice, columns: slice) -> None:
        block = squared_distances(everyone[rows], everyone[columns])  # (B, W)
        note(block, rows, columns)
        if rows != columns:
            note(block.t().contiguous(), columns, rows)

    def note(block: Tensor, rows: slice, columns: slice) -> None:
        block_keys = nearest(block, np.arange(number)[columns], keys[rows])
        largest = block.amax(1).cpu().numpy()
        with lock:
            keys[rows] = nearer(keys[rows], block_keys)
            farthest[rows] = np.maximum(farthest[rows], largest)

    side = min(tile_of(device))
    pairs = [(rows, columns) for rows, columns in tiles(number, number, (side, side)) if rows.start <= columns.start]
    in_threads(work, pairs, device)
    return keys, np.maximum(farthest, np.finfo(np.float32).tiny)


def _graph(places: np.ndarray) -> sparse.csr_array:
    """(N, N) matrix with a one from each item to each of its k items in places (N, k)."""
    number, k = places.shape
    graph = sparse.csr_array(
        (np.ones(number * k, np.float32), places.flatten(), np.arange(0, number * k + 1, k)), (number, number)
    )
    graph.sort_indices()
    return graph


def _distances_between(everyone: Points, keys: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """(n,) float32: distances of n pairs of points, looked up in the keys (N, k) of the nearest points, or computed.

    Those that rounding made negative are 0: they are divided by the largest distance, which may be next to 0.
    """
    number = len(keys)
    listed = (np.arange(number)[:, None] * number + (keys & 0xFFFFFFFF)).ravel()  # (N k,)
    order = np.argsort(listed)
    below, present = find(listed[order], rows.astype(np.int64) * number + columns)
    distances = np.empty(len(rows), np.float32)
    distances[present] = distances_of(keys.ravel()[order[below[present]]])
    missing = np.flatnonzero(~present)
    for part in np.array_split(missing, -(-len(missing) // 512)) if len(missing) else ():
        ours, theirs = everyone[torch.from_numpy(rows[part])], everyone[torch.from_numpy(columns[part])]
        products = (ours.features * theirs.features).sum(1)  # (512,)
        distances[part] = (ours.norms + theirs.norms - 2 * products).cpu()
    return distances.clip(min=0)
