"""Features, pids and camids -> the exact ranks of the matches, streamed in blocks; k-reciprocal re-ranking.

Nothing of the size queries x gallery is held. Between equal distances the place in the gallery decides, so the ranks
are those of a stable sort of the whole distance matrix. First each query is measured against its own identity (its
matches, and what it drops): `measure`. Then the gallery streams by, and what stands before them is counted: `count`.
Both take any ascending part of the gallery, so several processes can each do their shard and add up: distances first,
then tallies.

    python ranking.py log/features/query log/features/gallery

ranks features that --save-features has left on disk, in bounded memory whatever their number.
"""

import argparse
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

import numpy as np
import torch
import torch.nn.functional as F
from scipy import sparse
from torch import Tensor

from eval_metrics import BLOCK, Matches, Pairs, check_ids, count_before, rank_matches, rows_of, same_identity
from runtime.errors import UserError

NEAREST = 10  # gallery items listed for each query
LISTED = 4  # times k1 nearest items are listed for re-ranking: few neighbours of neighbours are farther
OWN = 64  # queries, ordered by pid, that are measured together against the gallery items of all their pids
BINS = 1 << 15  # of the histograms: the upper half of a positive float32, 128 bins for each doubling of the distance
INFINITY = 0x7F80  # the bin of infinity
NONE = np.iinfo(np.int64).max  # the key of no item, behind all others


@dataclass(frozen=True)
class Points:
    """Features (N, D) of any float type and their squared norms (N,) float32, on one device."""

    features: Tensor
    norms: Tensor

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, rows) -> 'Points':
        """Some of them, in float32."""
        return Points(self.features[rows].float(), self.norms[rows])


@dataclass(frozen=True)
class Tally:
    """What was counted, in (a part of) the gallery, of other identities than the query's. Tallies of parts add up."""

    counts: np.ndarray  # (P,) int64, items that stand before the one of each pair
    nearest: np.ndarray  # (Q, k) int64, the keys of the nearest items, ascending
    histogram: np.ndarray  # (BINS,) int64, of the distances

    def __add__(self, other: 'Tally') -> 'Tally':
        nearest = _nearer(self.nearest, other.nearest)
        return Tally(self.counts + other.counts, nearest, self.histogram + other.histogram)


@dataclass(frozen=True)
class Ranking(Matches):
    """The matches, the nearest items, and how the distances (squared Euclidean, or re-ranked) are spread.

    What a query drops appears nowhere. A skipped query has nearest items and counts in the histograms.
    """

    nearest: np.ndarray  # (Q, 10) int64, places of the nearest gallery items, -1 where there are fewer
    nearest_distances: np.ndarray  # (Q, 10) float32, NaN where there are fewer
    edges: np.ndarray  # (H + 1,) float32, of the bins of the histograms: under 1% wide, the first takes all below 0 too
    match_histogram: np.ndarray  # (H,) int64
    other_histogram: np.ndarray  # (H,) int64, distances between two identities


def rank(q_features, g_features, q_pids, g_pids, q_camids, g_camids, tile: tuple[int, int] | None = None) -> Ranking:
    """Rank the gallery for each query by squared Euclidean distance in float32.

    Args:
        q_features: (Q, D), tensor or array of any float type.
        g_features: (G, D); the products are made on its device.
        q_pids: (Q,), as g_pids (G,), q_camids (Q,) and g_camids (G,) anything array-like.
        tile: queries and gallery items of one product. No rank depends on it.

    Raises:
        UserError: features that are not finite or whose squares are not, or shapes that do not fit.
    """
    ids = check_ids(q_pids, g_pids, q_camids, g_camids)
    queries, gallery = points(q_features, g_features, len(ids[0]), len(ids[1]))
    pairs, places = same_identity(*ids), np.arange(len(gallery))
    distances = measure(queries, gallery, places, pairs, tile)
    return assemble(pairs, distances, count(queries, gallery, places, pairs, distances, tile))


def rerank(
    q_features, g_features, q_pids, g_pids, q_camids, g_camids, k1: int = 20, k2: int = 6, lambda_value: float = 0.3
) -> Ranking:
    """Rank the gallery for each query by the distance of `reranked`; the rest as for `rank`."""
    ids = check_ids(q_pids, g_pids, q_camids, g_camids)
    queries, gallery = points(q_features, g_features, len(ids[0]), len(ids[1]))
    pairs, places = same_identity(*ids), np.arange(len(gallery))
    distances = np.zeros(len(pairs.places), np.float32)
    tally = _no_tally(len(pairs.places), len(queries), NEAREST)
    block_of = reranked(queries, gallery, k1, k2, lambda_value)
    lock = Lock()

    def work(queried: slice) -> None:
        block = block_of(queried)  # (B, G)
        own, rows = pairs.among(queried)
        distances[own] = block[rows, pairs.places[own]]
        found = _tally_host(block, places, rows, pairs.places[own], distances[own], tally.nearest[queried])
        tally.counts[own] = found.counts
        tally.nearest[queried] = _nearer(tally.nearest[queried], found.nearest)
        with lock:
            tally.histogram[:] += found.histogram

    step = max(1, BLOCK // max(1, len(gallery)))
    _in_threads(work, [(slice(top, top + step),) for top in range(0, len(queries), step)], torch.device('cpu'))
    return assemble(pairs, distances, tally)


def points(q_features, g_features, num_queries: int, num_gallery: int) -> tuple[Points, Points]:
    """Queries and gallery, checked, on the gallery's device. Raises UserError as `rank` does."""
    gallery = torch.as_tensor(g_features).detach()
    queries = torch.as_tensor(q_features).detach().to(gallery.device)
    both = []
    for subset, features, number in (('query', queries, num_queries), ('gallery', gallery, num_gallery)):
        if tuple(features.shape) != (number, gallery.size(-1)):
            raise UserError(
                f'the {subset} features are {tuple(features.shape)}: they must be ({number}, {gallery.size(-1)})'
            )
        norms = _squared_norms(features)
        wrong = (4 * norms).isfinite().logical_not().nonzero().flatten().tolist()  # 4 |x|^2 bounds |q - g|^2
        if wrong:
            raise UserError(
                f'{len(wrong)} of {number} {subset} features are not finite or too large to be squared, the first at '
                f'{wrong[0]}: check the weights and the precision of the model'
            )
        both.append(Points(features, norms))
    return tuple(both)


def measure(queries: Points, gallery: Points, places: np.ndarray, pairs: Pairs, tile=None) -> np.ndarray:
    """(P,) float32: squared distances of the pairs; 0 for those whose gallery item is not in this part of the gallery.

    `places` (G,) ascending: where the items of `gallery` stand in the whole gallery, of which `pairs` speak. On
    the CPU these are bit for bit the distances in the tiles of `count`, since products sum in one order (see
    `_products`); a GPU promises no such order. What a query has in common with a tile is counted by place, so no match
    is ever compared with itself.
    """
    distances = np.zeros(len(pairs.places), np.float32)
    _, width = tile or _tile(gallery.features.device)
    sizes = np.diff(pairs.offsets)  # (Q,)
    order = np.flatnonzero(sizes) if len(gallery) else np.zeros(0, np.int64)
    order = order[np.argsort(pairs.places[pairs.offsets[order]], kind='stable')]  # by the first place of the pid

    def work(begin: int) -> None:
        block = order[begin : begin + OWN]  # (B,)
        offsets = np.concatenate([[0], np.cumsum(sizes[block])])
        rows = rows_of(offsets)  # (p,) of B
        own = pairs.offsets[block][rows] + np.arange(len(rows)) - offsets[rows]  # (p,) of P
        items, present = _find(places, pairs.places[own])
        own, rows = own[present], rows[present]
        items, columns = np.unique(items[present], return_inverse=True)
        for left in range(0, len(items), width):
            part = items[left : left + width]
            part = np.pad(part, (0, -len(part) % 64), 'edge')  # few widths: for each a product is compiled once
            found = squared_distances(queries[torch.from_numpy(block)], gallery[torch.from_numpy(part)])  # (B, W)
            here = np.flatnonzero((columns >= left) & (columns < left + width))
            distances[own[here]] = found.cpu().numpy()[rows[here], columns[here] - left]

    _in_threads(work, [(begin,) for begin in range(0, len(order), OWN)], gallery.features.device)
    return distances


def count(queries: Points, gallery: Points, places: np.ndarray, pairs: Pairs, distances, tile=None) -> Tally:
    """Stream the gallery, or the part of it that stands at `places`, past the pairs at their `distances` (P,)."""
    tally = _no_tally(len(pairs.places), len(queries), NEAREST)
    device = gallery.features.device
    tally_block = _tally_host if _is_host(device) else _tally_device
    lock = Lock()

    def work(queried: slice, passing: slice) -> None:
        block = squared_distances(queries[queried], gallery[passing])  # (B, W)
        own, rows = pairs.among(queried)
        found = tally_block(block, places[passing], rows, pairs.places[own], distances[own], tally.nearest[queried])
        with lock:
            tally.counts[own] += found.counts
            tally.nearest[queried] = _nearer(tally.nearest[queried], found.nearest)
            tally.histogram[:] += found.histogram

    _in_threads(work, _tiles(len(queries), len(gallery), tile or _tile(device)), device)
    return tally


def assemble(pairs: Pairs, distances: np.ndarray, tally: Tally) -> Ranking:
    """The ranking, from the distances (P,) of all pairs and the tally of the whole gallery."""
    matches = rank_matches(pairs, distances, tally.counts)
    rows = rows_of(matches.offsets)  # (M,)
    order = np.arange(len(rows)) - matches.offsets[rows]  # (M,) from 0, within the query
    first = order < NEAREST
    keys = np.full((len(tally.nearest), NEAREST), NONE)
    keys[rows[first], order[first]] = _keys(matches.distances[first], matches.places[first])
    keys = _nearer(keys, tally.nearest)  # (Q, NEAREST)
    bits = matches.distances.view(np.int32)  # (M,)
    own = np.bincount(np.maximum(bits, 0) >> 16, minlength=BINS)  # (BINS,)
    used = np.flatnonzero(own + tally.histogram)
    low, high = (used[0], used[-1] + 1) if len(used) else (0, 0)
    return Ranking(
        **vars(matches),
        nearest=np.where(keys < NONE, keys & 0xFFFFFFFF, -1),
        nearest_distances=_distances(keys),
        edges=(np.arange(low, high + 1, dtype=np.int32) << 16).view(np.float32),
        match_histogram=own[low:high],
        other_histogram=tally.histogram[low:high],
    )


def reranked(
    queries: Points, gallery: Points, k1: int = 20, k2: int = 6, lambda_value: float = 0.3
) -> Callable[[slice], np.ndarray]:
    """k-reciprocal re-ranking: a function from a slice of queries to the distances (B, G) float32 of these B queries.

    Zhong et al., Re-ranking Person Re-identification with k-reciprocal Encoding, CVPR 2017, arXiv 1701.08398, as their
    published evaluation computes it: lambda * squared Euclidean distance, divided by the largest that the query has to
    any query or gallery item, + (1 - lambda) * Jaccard distance of the expanded k-reciprocal neighbourhoods. Nothing of
    the size of N x N, N = Q + G, is held, but the features once more and, for each item, some hundred neighbours.

    Args:
        k1: nearest items that may be reciprocal neighbours, the item itself not counted.
        k2: nearest items, the item itself counted, over which neighbourhoods are averaged.
        lambda_value: weight of the Euclidean distance.

    Raises:
        UserError: k1 or k2 below 1, lambda_value outside of 0 .. 1.
    """
    if k1 < 1 or k2 < 1 or not 0 <= lambda_value <= 1:
        raise UserError(
            f're-ranking needs k1 and k2 of 1 or more and 0 <= lambda <= 1, not {k1}, {k2} and {lambda_value}'
        )
    lambda_value = float(lambda_value)  # numpy's own would make float64 of float32
    everyone = Points(torch.cat([queries.features, gallery.features]), torch.cat([queries.norms, gallery.norms]))
    keys, farthest = neighbours(everyone, max(LISTED * (k1 + 1), k2))  # (N, k), (N,)
    places = keys & 0xFFFFFFFF  # (N, k)
    near, half = _graph(places[:, : k1 + 1]), _graph(places[:, : int(np.around(k1 / 2)) + 1])
    near, half = near * near.T, half * half.T  # (N, N) of ones: reciprocal neighbours
    # A neighbour brings its own neighbours (of half as many) in, when more than two thirds of them are in already.
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
        # Sum of the minima of two rows of weights: each weight of the query meets the items that have weight there too.
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
            euclidean = squared_distances(queries[rows], gallery[columns]).cpu().numpy()
            block[:, columns] += lambda_value * euclidean / farthest[: len(queries)][rows, None]
        return block

    return distances


def neighbours(everyone: Points, k: int) -> tuple[np.ndarray, np.ndarray]:
    """For each of N points the keys (N, min(k, N)) of the nearest, itself included, and the largest distance (N,)."""
    number, device = len(everyone), everyone.features.device
    keys = np.full((number, min(k, number)), NONE)
    farthest = np.zeros(number, np.float32)
    nearest = _nearest_host if _is_host(device) else _nearest_device
    lock = Lock()

    def work(rows: slice, columns: slice) -> None:
        block = squared_distances(everyone[rows], everyone[columns])  # (B, W)
        note(block, rows, columns)
        if rows != columns:
            note(block.t().contiguous(), columns, rows)

    def note(block: Tensor, rows: slice, columns: slice) -> None:
        found = nearest(block, np.arange(number)[columns], keys[rows])
        largest = block.amax(1).cpu().numpy()
        with lock:
            keys[rows] = _nearer(keys[rows], found)
            farthest[rows] = np.maximum(farthest[rows], largest)

    side = min(_tile(device))
    tiles = _tiles(number, number, (side, side))
    _in_threads(work, [(rows, columns) for rows, columns in tiles if rows.start <= columns.start], device)
    return keys, np.maximum(farthest, np.finfo(np.float32).tiny)


def squared_distances(queries: Points, gallery: Points) -> Tensor:
    """(B, W) float32: |q|^2 + |g|^2 - 2 q.g, which rounding may leave a little below 0."""
    if not _is_host(gallery.features.device):
        products = queries.features @ gallery.features.t()  # (B, W)
    elif 4 * len(queries) < len(gallery):
        products = _products(gallery.features, queries.features).t()
    else:
        products = _products(queries.features, gallery.features)
    return products.mul_(-2).add_(gallery.norms).add_(queries.norms[:, None])


def _squared_norms(features: Tensor) -> Tensor:
    norms = torch.empty(len(features), device=features.device)

    def work(part: Tensor, norm: Tensor) -> None:
        torch.sum(part.float().square(), 1, out=norm)

    _in_threads(work, zip(features.split(128), norms.split(128), strict=True), features.device)
    return norms


def _products(left: Tensor, right: Tensor) -> Tensor:
    """left (L, D) @ right (R, D) transposed, (L, R), on the CPU, by a convolution with windows of 1 x 1 pixel.

    That goes to oneDNN, which is twice as fast as the library behind torch.mm on AMD's processors, and which sums each
    element in one order whatever L and R are. It copies `right`, so L should be the larger.
    """
    height = -(-len(left) // 16)  # 16 pictures of height x 1: with fewer, one thread does not go to oneDNN
    pixels = F.pad(left, (0, 0, 0, 16 * height - len(left))) if len(left) % 16 else left  # (16 h, D)
    pixels = pixels.reshape(16, height, 1, -1).permute(0, 3, 1, 2)  # (16, D, h, 1), channels_last
    products = F.conv2d(pixels, right[:, :, None, None])  # (16, R, h, 1), channels_last
    return products.permute(0, 2, 3, 1).reshape(16 * height, len(right))[: len(left)]


def _tally_host(block, places, rows, own_places, distances, nearest) -> Tally:
    """Count one block; it is overwritten.

    Args:
        block: (B, W) tensor or array, distances of B queries to the gallery items that stand at places (W,).
        rows, own_places, distances: (p,) the pairs of these queries.
        nearest: (B, k) keys of the nearest items so far.
    """
    block = np.asarray(block)
    columns, present = _find(places, own_places)
    block[rows[present], columns[present]] = np.inf
    by_distance = np.sort(block, axis=1)  # (B, W)
    counts = count_before(block, by_distance, rows, distances, columns)
    bits = by_distance.ravel().view(np.uint32)
    ends = np.append(np.flatnonzero((bits[1:] ^ bits[:-1]) > 0xFFFF), len(bits) - 1)  # of what lies in one bin
    histogram = np.bincount(bits[ends] >> 16, np.diff(ends, prepend=-1), 2 * BINS).astype(np.int64)
    histogram[0] += histogram[BINS:].sum()  # those with a sign
    histogram[INFINITY] = 0
    bounds = by_distance[:, min(nearest.shape[1], len(places)) - 1]  # (B,)
    return Tally(counts, _nearest_host(block, places, nearest, bounds), histogram[:BINS])


def _tally_device(block: Tensor, places, rows, own_places, distances, nearest) -> Tally:
    """The same, where sorting is dear and comparing is cheap."""
    columns, present = _find(places, own_places)
    rows, columns, present, distances, own_places = (
        torch.from_numpy(x).to(block.device) for x in (rows, columns, present, distances, own_places)
    )
    block[rows[present], columns[present]] = torch.inf
    histogram = (block.view(torch.int32) >> 16).clamp_(min=0).flatten().bincount(minlength=BINS)
    histogram[INFINITY] = 0
    keys, marks = _keys(block, torch.from_numpy(places).to(block.device)), _keys(distances, own_places)  # (B, W), (p,)
    parts = zip(rows.split(1024), marks.split(1024), strict=True)
    counts = torch.cat([(keys[part] < mark[:, None]).sum(1) for part, mark in parts])
    return Tally(counts.cpu().numpy(), _nearest_device(block, places, nearest), histogram.cpu().numpy())


def _nearest_host(block, places: np.ndarray, nearest: np.ndarray, bounds: np.ndarray | None = None) -> np.ndarray:
    """Keys (B, at most k) of the finite distances in `block` (B, W) that may belong among the nearest (B, k) so far.

    bounds (B,): a distance that at least k of the row do not exceed, or its largest.
    """
    block = np.asarray(block)
    so_far = _distances(nearest[:, -1])  # (B,) NaN while there are fewer
    if bounds is None:
        k = min(nearest.shape[1], len(places))
        bounds = np.partition(block, k - 1)[:, k - 1] if np.isnan(so_far).any() else so_far
    bounds = np.minimum(np.fmin(bounds, so_far), np.finfo(np.float32).max)
    found, columns = np.divmod(np.flatnonzero(block <= bounds[:, None]), len(places))  # (n,)
    order = np.arange(len(found)) - np.searchsorted(found, found)  # (n,) from 0, within the row
    keys = np.full((len(block), order.max(initial=0) + 1), NONE)
    keys[found, order] = _keys(block[found, columns], places[columns])
    return np.sort(keys, axis=1)[:, : nearest.shape[1]]


def _nearest_device(block: Tensor, places: np.ndarray, nearest: np.ndarray) -> np.ndarray:
    keys = _keys(block, torch.from_numpy(places).to(block.device))  # (B, W)
    keys[block == torch.inf] = NONE
    return keys.topk(min(nearest.shape[1], len(places)), largest=False).values.cpu().numpy()


def _nearer(some: np.ndarray, others: np.ndarray) -> np.ndarray:
    """The k smallest keys of each row of (B, k) and (B, any)."""
    return np.sort(np.hstack([some, others]), axis=1)[:, : some.shape[1]]


def _keys(distances, places):
    """int64 that sort as (distance, place) do. distances float32, never -0, places below 2^32; tensors or arrays."""
    if isinstance(distances, np.ndarray):
        return _keys(torch.from_numpy(distances), torch.from_numpy(places)).numpy()
    bits = distances.view(torch.int32).long()
    return torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits) << 32 | places


def _distances(keys: np.ndarray) -> np.ndarray:
    """float32: the distances in such keys; NaN for NONE."""
    bits = (keys >> 32).astype(np.int32)
    return np.where(bits < 0, bits ^ 0x7FFFFFFF, bits).view(np.float32)


def _find(places: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How many of `places` (W,), which ascend, are below each of `wanted` (p,), and whether it is one of them."""
    below = np.searchsorted(places, wanted)
    return below, places[np.minimum(below, len(places) - 1)] == wanted


def _graph(places: np.ndarray) -> sparse.csr_array:
    """(N, N) with a one from each item to its k items in places (N, k)."""
    number, k = places.shape
    graph = sparse.csr_array(
        (np.ones(number * k, np.float32), places.flatten(), np.arange(0, number * k + 1, k)), (number, number)
    )
    graph.sort_indices()
    return graph


def _distances_between(everyone: Points, keys: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """(n,) float32: distances of n pairs of points, looked up in the keys (N, k) of their nearest or else computed."""
    number = len(keys)
    listed = (np.arange(number)[:, None] * number + (keys & 0xFFFFFFFF)).ravel()  # (N k,)
    order = np.argsort(listed)
    below, present = _find(listed[order], rows.astype(np.int64) * number + columns)
    distances = np.empty(len(rows), np.float32)
    distances[present] = _distances(keys.ravel()[order[below[present]]])
    missing = np.flatnonzero(~present)
    for part in np.array_split(missing, -(-len(missing) // 512)) if len(missing) else ():
        ours, theirs = everyone[torch.from_numpy(rows[part])], everyone[torch.from_numpy(columns[part])]
        products = (ours.features * theirs.features).sum(1)  # (512,)
        distances[part] = (ours.norms + theirs.norms - 2 * products).cpu()
    return distances


def _no_tally(num_pairs: int, num_queries: int, k: int) -> Tally:
    return Tally(np.zeros(num_pairs, np.int64), np.full((num_queries, k), NONE), np.zeros(BINS, np.int64))


def _is_host(device: torch.device) -> bool:
    return device.type == 'cpu'


def _tile(device: torch.device) -> tuple[int, int]:
    """Queries and gallery items of one product: enough for its speed, few enough for the cache and for memory."""
    return (1120, max(512, min(2304, 4608 // torch.get_num_threads()))) if _is_host(device) else (1024, 8192)


def _tiles(height: int, width: int, tile: tuple[int, int]) -> list[tuple[slice, slice]]:
    return [
        (slice(top, top + tile[0]), slice(left, left + tile[1]))
        for top in range(0, height, tile[0])
        for left in range(0, width, tile[1])
    ]


def _in_threads(work: Callable, tasks: Iterable, device: torch.device) -> None:
    """Do work(*task) for all tasks; on the CPU in as many threads as torch would use, with products of one thread."""
    threads, tf32 = torch.get_num_threads(), torch.backends.cuda.matmul.allow_tf32

    @torch.inference_mode()  # a setting of the thread, as autocast is, which is off in there
    def do(task: tuple) -> None:
        work(*task)

    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        with ThreadPoolExecutor(threads if _is_host(device) else 1, None, torch.set_num_threads, (1,)) as pool:
            for _ in pool.map(do, tasks):
                pass
    finally:
        torch.set_num_threads(threads)  # the number set last, anywhere, is that of threads to come
        torch.backends.cuda.matmul.allow_tf32 = tf32


# The figures, and the command


PRINTED_RANKS = (1, 5, 10, 20)


def show(result: Ranking) -> None:
    """Print the figures of the original."""
    cmc = result.cmc(max(PRINTED_RANKS))
    print(
        f'Queries: {result.num_valid} valid, {result.num_skipped} skipped ({result.num_same_camera} with a match in '
        f'their own camera only, {result.num_absent} with none in the gallery)'
    )
    print('Results ----------')
    print(f'mAP: {result.mAP:.1%}')
    print('CMC curve')
    for place in PRINTED_RANKS:
        print(f'Rank-{place:<3}: {cmc[place - 1]:.1%}')
    print('------------------')


def read(folder: str | Path) -> list[np.ndarray]:
    """features (N, D), pids (N,) and camids (N,) that --save-features wrote; the features stay on disk.

    Raises:
        UserError: a file is missing or no array of numbers.
    """
    arrays = []
    for name, kinds in (('features', 'f'), ('pids', 'iu'), ('camids', 'iu')):
        path = Path(folder) / f'{name}.npy'
        try:
            array = np.load(path, mmap_mode='c')
        except (OSError, ValueError, EOFError) as problem:
            reason = getattr(problem, 'strerror', None) or ' '.join(str(problem).split())
            raise UserError(f'{path} cannot be read ({reason}); write it with --evaluate --save-features') from None
        if array.dtype.kind not in kinds:
            raise UserError(f'{path} holds {array.dtype}; write it with --evaluate --save-features')
        arrays.append(array)
    return arrays


class _Parser(argparse.ArgumentParser):
    """One that says a mistake in one line, as the scripts do."""

    def error(self, message: str):
        sys.stderr.write(f'error: {message}\n')
        sys.exit(2)


def main() -> None:
    parser = _Parser(description='Rank saved features from disk, in bounded memory.')
    parser.add_argument('query', help='folder with features.npy (N, D), pids.npy and camids.npy (N,)')
    parser.add_argument('gallery', help='another one')
    args = parser.parse_args()
    try:
        (queries, q_pids, q_camids), (gallery, g_pids, g_camids) = read(args.query), read(args.gallery)
        show(rank(queries, gallery, q_pids, g_pids, q_camids, g_camids))
    except UserError as mistake:
        sys.stderr.write(f'error: {mistake}\n')
        sys.exit(2)


if __name__ == '__main__':
    main()
