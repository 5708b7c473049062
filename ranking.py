"""Features, pids and camids -> the exact ranks of the matches, computed in blocks; k-reciprocal re-ranking.

No array of size queries x gallery is held in memory. Ties are broken by gallery index, so the ranks are those of a
stable sort of the whole distance matrix. First, `measure` computes the distances between each query and the items of
its own identity (its matches and the items that it drops). Then `count` goes through the gallery and counts the items
that precede them. Both accept any ascending part of the gallery, so several processes can each process a part and add
up the results: first the distances, then the tallies.

    python ranking.py log/features/query log/features/gallery

ranks features written to disk by --save-features, in bounded memory regardless of their number; --rerank copies them.
"""

from dataclasses import dataclass
from threading import Lock
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from eval_metrics import (
    BLOCK,
    CLASSIC,
    METRICS,
    Matches,
    Pairs,
    check_ids,
    count_before,
    rank_matches,
    rows_of,
    same_identity,
)
from files.features import distance_of, read, read_files
from reranking import reranked
from runtime import commands, values
from runtime.tiles import (
    DISTANCES,
    NONE,
    Points,
    Tile,
    distances_of,
    find,
    in_threads,
    is_host,
    keys_of,
    keys_on_device,
    nearer,
    nearest_device,
    nearest_host,
    points,
    squared_distances,
    tile_of,
    tiles,
)  # fmt: skip

if TYPE_CHECKING:
    from eval_metrics import Ids

NEAREST = 10  # gallery items listed for each query
QUERIES_AT_ONCE = 64  # sorted by pid, whose distances to all gallery items of their pids are computed together
BINS = 1 << 15  # of the histograms: the upper half of a positive float32, 128 bins for each doubling of the distance
INFINITY = 0x7F80  # the bin of infinity


@dataclass(frozen=True)
class Tally:
    """Counts over (a part of) the gallery, excluding the query's own identity. Tallies of parts can be added."""

    counts: np.ndarray  # (P,) int64, number of items that precede the item of each pair
    nearest: np.ndarray  # (Q, k) int64, the keys of the nearest items, ascending
    histogram: np.ndarray  # (BINS,) int64, of the distances


@dataclass(frozen=True)
class Ranking(Matches):
    """The matches, the nearest items, and histograms of the distances (squared Euclidean, cosine, or re-ranked).

    Items dropped by a query do not appear. A skipped query has nearest items and is counted in the histograms.
    """

    nearest: np.ndarray  # (Q, 10) int64, gallery indices of the nearest items, -1 if there are fewer
    nearest_distances: np.ndarray  # (Q, 10) float32, NaN if there are fewer
    edges: np.ndarray  # (H + 1,) float32, of bins less than 1% wide; the first bin includes negative values
    match_histogram: np.ndarray  # (H,) int64
    other_histogram: np.ndarray  # (H,) int64, distances between different identities


def rank(
    q_features: np.ndarray | Tensor,
    g_features: np.ndarray | Tensor,
    q_pids: 'Ids',
    g_pids: 'Ids',
    q_camids: 'Ids',
    g_camids: 'Ids',
    tile: Tile | None = None,
    distance: str = 'euclidean',
) -> Ranking:
    """Rank the gallery for each query by distance, computed in float32.

    Args:
        q_features: (Q, D), tensor or array of any float type.
        g_features: (G, D); the products are computed on its device.
        q_pids: (Q,); like g_pids (G,), q_camids (Q,) and g_camids (G,), any array-like.
        tile: numbers of queries and gallery items per product. It does not affect the ranks.
        distance: 'euclidean', which is squared, or 'cosine'.

    Raises:
        UserError: features or their squares are not finite, or shapes do not fit.
    """
    ids = check_ids(q_pids, g_pids, q_camids, g_camids)
    queries, gallery = points(q_features, g_features, len(ids[0]), len(ids[1]), distance)
    pairs, places = same_identity(*ids), np.arange(len(gallery))
    distances = measure(queries, gallery, places, pairs, tile)
    return assemble(pairs, distances, count(queries, gallery, places, pairs, distances, tile))


def rerank(
    q_features: np.ndarray | Tensor,
    g_features: np.ndarray | Tensor,
    q_pids: 'Ids',
    g_pids: 'Ids',
    q_camids: 'Ids',
    g_camids: 'Ids',
    k1: int = 20,
    k2: int = 6,
    lambda_value: float = 0.3,
    distance: str = 'euclidean',
) -> Ranking:
    """Like `rank`, by the distances of `reranked`."""
    ids = check_ids(q_pids, g_pids, q_camids, g_camids)
    queries, gallery = points(q_features, g_features, len(ids[0]), len(ids[1]), distance)
    pairs, places = same_identity(*ids), np.arange(len(gallery))
    distances = np.zeros(len(pairs.places), np.float32)
    tally, lock = _no_tally(len(pairs.places), len(queries), NEAREST), Lock()
    if not len(gallery):
        return assemble(pairs, distances, tally)
    block_of = reranked(queries, gallery, k1, k2, lambda_value)

    def work(q: slice) -> None:
        block = block_of(q)  # (B, G)
        p, rows = pairs.among(q)  # the slice of the P pairs
        distances[p] = block[rows, pairs.places[p]]
        block_tally = _tally_host(block, places, rows, pairs.places[p], distances[p], tally.nearest[q])
        tally.counts[p] = block_tally.counts
        tally.nearest[q] = nearer(tally.nearest[q], block_tally.nearest)
        with lock:
            tally.histogram[:] += block_tally.histogram

    step = max(1, BLOCK // len(gallery))
    in_threads(work, [(slice(top, top + step),) for top in range(0, len(queries), step)], torch.device('cpu'))
    return assemble(pairs, distances, tally)


def measure(queries: Points, gallery: Points, places: np.ndarray, pairs: Pairs, tile: Tile | None = None) -> np.ndarray:
    """(P,) float32: squared distances of the pairs; 0 for pairs whose gallery item is not in this part of the gallery.

    `places` (G,), ascending, are the indices of the items of `gallery` in the whole gallery, to which `pairs` refers.
    On the CPU the distances equal those in the tiles of `count` bit for bit, because products are summed in the same
    order (see `runtime.tiles.products`); a GPU does not guarantee an order. Items of the query's own pid are excluded
    from a tile by index, so a match is never compared with itself.
    """
    distances = np.zeros(len(pairs.places), np.float32)
    _, width = tile or tile_of(gallery.features.device)
    sizes = np.diff(pairs.offsets)  # (Q,)
    order = np.flatnonzero(sizes) if len(gallery) else np.zeros(0, np.int64)
    order = order[np.argsort(pairs.places[pairs.offsets[order]], kind='stable')]  # by the pid's first gallery index

    def work(begin: int) -> None:
        q = order[begin : begin + QUERIES_AT_ONCE]  # (B,)
        offsets = np.concatenate([[0], np.cumsum(sizes[q])])
        rows = rows_of(offsets)  # (p,) of B
        p = pairs.offsets[q][rows] + np.arange(len(rows)) - offsets[rows]  # (p,) of P
        items, present = find(places, pairs.places[p])
        p, rows = p[present], rows[present]
        items, columns = np.unique(items[present], return_inverse=True)
        for left in range(0, len(items), width):
            part = items[left : left + width]
            part = np.pad(part, (0, -len(part) % 64), 'edge')  # a product is compiled for each new width
            block = squared_distances(queries[torch.from_numpy(q)], gallery[torch.from_numpy(part)])  # (B, W)
            inside = np.flatnonzero((columns >= left) & (columns < left + width))
            distances[p[inside]] = block.cpu().numpy()[rows[inside], columns[inside] - left]

    in_threads(work, [(begin,) for begin in range(0, len(order), QUERIES_AT_ONCE)], gallery.features.device)
    return distances


def count(
    queries: Points, gallery: Points, places: np.ndarray, pairs: Pairs, distances: np.ndarray, tile: Tile | None = None
) -> Tally:
    """Count the items of the gallery, or of its part at `places`, that precede each pair, at `distances` (P,)."""
    tally, lock = _no_tally(len(pairs.places), len(queries), NEAREST), Lock()
    device = gallery.features.device
    tally_block = _tally_host if is_host(device) else _tally_device

    def work(q: slice, g: slice) -> None:
        block = squared_distances(queries[q], gallery[g])  # (B, W)
        p, rows = pairs.among(q)  # the slice of the P pairs
        block_tally = tally_block(block, places[g], rows, pairs.places[p], distances[p], tally.nearest[q])
        with lock:
            tally.counts[p] += block_tally.counts
            tally.nearest[q] = nearer(tally.nearest[q], block_tally.nearest)
            tally.histogram[:] += block_tally.histogram

    in_threads(work, tiles(len(queries), len(gallery), tile or tile_of(device)), device)
    return tally


def assemble(pairs: Pairs, distances: np.ndarray, tally: Tally) -> Ranking:
    """The ranking, computed from the distances (P,) of all pairs and the tally of the whole gallery."""
    matches = rank_matches(pairs, distances, tally.counts)
    rows = rows_of(matches.offsets)  # (M,)
    order = np.arange(len(rows)) - matches.offsets[rows]  # (M,) position within the query's matches, from 0
    first = order < NEAREST
    keys = np.full((len(tally.nearest), NEAREST), NONE)
    keys[rows[first], order[first]] = keys_of(matches.distances[first], matches.places[first])
    keys = nearer(keys, tally.nearest)  # (Q, NEAREST)
    bits = matches.distances.view(np.int32)  # (M,)
    match_histogram = np.bincount(np.maximum(bits, 0) >> 16, minlength=BINS)  # (BINS,)
    used = np.flatnonzero(match_histogram + tally.histogram)
    low, high = (used[0], used[-1] + 1) if len(used) else (0, 0)
    return Ranking(
        **vars(matches),
        nearest=np.where(keys < NONE, keys & 0xFFFFFFFF, -1),
        nearest_distances=distances_of(keys),
        edges=(np.arange(low, high + 1, dtype=np.int32) << 16).view(np.float32),
        match_histogram=match_histogram[low:high],
        other_histogram=tally.histogram[low:high],
    )


def _tally_host(
    block: np.ndarray | Tensor,
    places: np.ndarray,
    rows: np.ndarray,
    own_places: np.ndarray,
    distances: np.ndarray,
    nearest: np.ndarray,
) -> Tally:
    """Count one block, which is overwritten.

    Args:
        block: (B, W) tensor or array, distances of B queries to the gallery items with indices places (W,).
        rows, own_places, distances: (p,) the pairs of these queries.
        nearest: (B, k) keys of the nearest items so far.
    """
    block = np.asarray(block)
    columns, present = find(places, own_places)
    block[rows[present], columns[present]] = np.inf
    by_distance = np.sort(block, axis=1)  # (B, W)
    counts = count_before(block, by_distance, rows, distances, columns)
    bits = by_distance.ravel().view(np.uint32)
    ends = np.append(np.flatnonzero((bits[1:] ^ bits[:-1]) > 0xFFFF), len(bits) - 1)  # the last element of each bin
    histogram = np.bincount(bits[ends] >> 16, np.diff(ends, prepend=-1), 2 * BINS).astype(np.int64)
    histogram[0] += histogram[BINS:].sum()  # negative distances
    histogram[INFINITY] = 0
    bounds = by_distance[:, min(nearest.shape[1], len(places)) - 1]  # (B,)
    return Tally(counts, nearest_host(block, places, nearest, bounds), histogram[:BINS])


def _tally_device(
    block: Tensor,
    places: np.ndarray,
    rows: np.ndarray,
    own_places: np.ndarray,
    distances: np.ndarray,
    nearest: np.ndarray,
) -> Tally:
    """The same for GPUs, on which sorting is expensive and comparing is cheap."""
    columns, present = find(places, own_places)
    at_row, at_column, is_here, own_distance, own_place, place = (
        torch.from_numpy(x).to(block.device) for x in (rows, columns, present, distances, own_places, places)
    )
    block[at_row[is_here], at_column[is_here]] = torch.inf
    histogram = (block.view(torch.int32) >> 16).clamp_(min=0).flatten().bincount(minlength=BINS)
    histogram[INFINITY] = 0
    keys, marks = keys_on_device(block, place), keys_on_device(own_distance, own_place)  # (B, W), (p,)
    parts = zip(at_row.split(1024), marks.split(1024), strict=True)
    counts = torch.cat([(keys[part] < mark[:, None]).sum(1) for part, mark in parts])
    return Tally(counts.cpu().numpy(), nearest_device(block, places, nearest), histogram.cpu().numpy())


def _no_tally(num_pairs: int, num_queries: int, k: int) -> Tally:
    return Tally(np.zeros(num_pairs, np.int64), np.full((num_queries, k), NONE), np.zeros(BINS, np.int64))


# Printing, and the command

PRINTED_RANKS = (1, 5, 10, 20)
RERANKING_LINE = 'Re-ranking with k1 {k1}, k2 {k2}, lambda {lambda_value}'
ANY_CAMERA = "Any camera: matches from the query's own camera count too; only the query's own file is dropped"
NO_FILES = "Any camera: matches from the query's own camera count too; no file is dropped, as there is no paths.jsonl"


def show(result: Ranking, any_camera: bool = False) -> None:
    """Print the same figures as the original.

    any_camera: the camids are file numbers
    """
    result.check_valid(any_camera)
    cmc = result.cmc(max(PRINTED_RANKS))
    print(
        f'Queries: {result.num_valid} valid, {result.num_skipped} skipped ({result.num_same_camera} '
        f'{"whose only match is their own file" if any_camera else "with a match in their own camera only"}, '
        f'{result.num_absent} with none in the gallery)'
    )
    print('Results ----------')
    print(f'mAP: {result.mAP:.1%}')
    figures = result.figures()
    for metric in METRICS:
        if metric.name not in CLASSIC:
            print(f'{metric.label}: {figures[metric.name]:.1%}')
    print('CMC curve')
    for k in PRINTED_RANKS:
        print(f'Rank-{k:<3}: {cmc[k - 1]:.1%}')
    print('------------------')


def main() -> None:
    parser = commands.Parser(description='Rank saved features from disk, in bounded memory.')
    parser.add_argument('query', type=values.path, help='folder with the features.npy, pids.npy, camids.npy of queries')
    parser.add_argument('gallery', type=values.path, help='the same for the gallery')
    parser.add_argument('--any-camera', action='store_true', help="drop the query's own file only, not its camera")
    parser.add_argument('--distance', choices=list(DISTANCES), help='(default: that of the test, which QUERY records)')
    parser.add_argument('--rerank', action='store_true', help='use k-reciprocal re-ranking; copies the features')
    parser.add_argument('--k1', type=values.positive_int, default=20, help='as for a test (default: 20)')
    parser.add_argument('--k2', type=values.positive_int, default=6, help='as for a test (default: 6)')
    parser.add_argument('--lambda', type=values.fraction, default=0.3, dest='lambda_value', help='(default: 0.3)')
    args = parser.parse_args()
    values.check_reranking(parser, args)
    (queries, *q_ids), (gallery, *g_ids) = read(args.query, labelled=True), read(args.gallery, labelled=True)
    q_pids, g_pids, q_camids, g_camids = check_ids(q_ids[0], g_ids[0], q_ids[1], g_ids[1])
    if args.any_camera:
        files = read_files(args.query, args.gallery, q_pids, g_pids)
        print(ANY_CAMERA if files else NO_FILES)
        q_camids, g_camids = files or (-1 - np.arange(len(q_pids)), np.arange(len(g_pids)))
    distance = args.distance or distance_of(args.query)
    if distance != 'euclidean':
        print(f'Distance: {distance}')
    if args.rerank:
        print(RERANKING_LINE.format(**vars(args)))
        how = args.k1, args.k2, args.lambda_value, distance
        result = rerank(queries, gallery, q_pids, g_pids, q_camids, g_camids, *how)
    else:
        result = rank(queries, gallery, q_pids, g_pids, q_camids, g_camids, distance=distance)
    show(result, args.any_camera)


if __name__ == '__main__':
    commands.run(main)
