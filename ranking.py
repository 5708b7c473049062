"""Features, pids and camids -> the exact ranks of the matches, streamed in blocks; k-reciprocal re-ranking.

Nothing of the size queries x gallery is held. Between equal distances the place in the gallery decides, so the ranks are
those of a stable sort of the whole distance matrix. First each query is measured against its own identity (its matches
and what it drops): `measure`. Then the gallery streams by and what stands before them is counted: `count`. Both take any
ascending part of the gallery, so that several processes can each do their shard and add up.

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
from torch import Tensor

from errors import UserError
from eval_metrics import Matches, Pairs, check_ids, count_before, rank_matches, rows_of, same_identity

NEAREST = 10  # gallery items listed for each query
TILE = (1120, 2304)  # queries x gallery items of one product: it stays in the cache while it is counted
OWN = 64  # queries, ordered by pid, that are multiplied with all gallery items of their pids
BINS = 1 << 15  # of the histograms: the upper half of a positive float32, 128 bins for each doubling of the distance
INFINITE = 0x7F80  # the bin of infinity
NONE = np.iinfo(np.int64).max  # the key of no item, behind all others


@dataclass(frozen=True)
class Points:
    """Features (N, D) of any float type and their squared norms (N,) float32, on one device."""

    features: Tensor
    norms: Tensor

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, rows) -> 'Points':
        return Points(self.features[rows].float(), self.norms[rows])


@dataclass(frozen=True)
class Tally:
    """What a pass over (a part of) the gallery counted of other identities than the query's; tallies of parts add up."""

    counts: np.ndarray  # (P,) int64, items that stand before the one of each pair
    nearest: np.ndarray  # (Q, NEAREST) int64, ascending keys of the nearest items
    histogram: np.ndarray  # (BINS,) int64, of the distances

    def __add__(self, other: 'Tally') -> 'Tally':
        nearest = np.sort(np.hstack([self.nearest, other.nearest]), axis=1)[:, :NEAREST]
        return Tally(self.counts + other.counts, nearest, self.histogram + other.histogram)


@dataclass(frozen=True)
class Ranking(Matches):
    """The matches, the nearest items, and how distances are spread; distances are squared Euclidean.

    What a query drops appears nowhere. A skipped query has nearest items and counts in the histograms.
    """

    nearest: np.ndarray  # (Q, 10) int64, places of the nearest gallery items, -1 where there are fewer
    nearest_distances: np.ndarray  # (Q, 10) float32, NaN where there are fewer
    edges: np.ndarray  # (H + 1,) float32, of the bins of the histograms; a bin is under 1% wide, the lowest is open
    match_histogram: np.ndarray  # (H,) int64
    other_histogram: np.ndarray  # (H,) int64, pairs of two identities


def rank(q_features, g_features, q_pids, g_pids, q_camids, g_camids, tile: tuple[int, int] = TILE) -> Ranking:
    """Rank the gallery for each query by squared Euclidean distance in float32.

    Args:
        q_features: (Q, D), tensor or array of any float type.
        g_features: (G, D); the products are made on its device.
        q_pids: (Q,), like g_pids (G,), q_camids (Q,) and g_camids (G,) anything array-like.
        tile: queries and gallery items of one product; no rank depends on it.

    Raises:
        UserError: features that are not finite or whose squares are not, or shapes that do not fit.
    """
    q_pids, g_pids, q_camids, g_camids = check_ids(q_pids, g_pids, q_camids, g_camids)
    gallery = points(g_features, len(g_pids), 'gallery')
    queries = points(q_features, len(q_pids), 'query', gallery.features)
    pairs = same_identity(q_pids, g_pids, q_camids, g_camids)
    places = np.arange(len(gallery))
    distances = measure(queries, gallery, places, pairs, tile)
    return assemble(pairs, distances, count(queries, gallery, places, pairs, distances, tile))


def points(features, number: int, subset: str, like: Tensor | None = None) -> Points:
    """Checked features, on the device and of the width of `like`; errors as for `rank`."""
    features = torch.as_tensor(features).detach()
    width = features.size(-1) if like is None else like.size(1)
    if tuple(features.shape) != (number, width):
        raise UserError(f'the {subset} features are {tuple(features.shape)}: they must be ({number}, {width})')
    features = features if like is None else features.to(like.device)
    norms = torch.cat([part.float().square().sum(1) for part in features.split(128)])  # (N,)
    wrong = (4 * norms).isfinite().logical_not().nonzero().flatten().tolist()  # 4: what a distance may come to
    if wrong:
        raise UserError(
            f'{len(wrong)} of {number} {subset} features are not finite or too large to be squared, first the one at '
            f'{wrong[0]}: check the weights and the precision of the model'
        )
    return Points(features, norms)


def measure(queries: Points, gallery: Points, places: np.ndarray, pairs: Pairs, tile=TILE) -> np.ndarray:
    """(P,) float32: squared distances of the pairs; 0 for those whose gallery item is not in this part of the gallery.

    `places` (G,) ascending: where the items of `gallery` stand in the whole gallery, of which `pairs` speak.
    """
    distances = np.zeros(len(pairs.places), np.float32)
    sizes = np.diff(pairs.offsets)  # (Q,)
    order = np.flatnonzero(sizes)
    order = order[
        np.argsort(pairs.places[pairs.offsets[order]], kind='stable')
    ]  # by pid: its first place stands for it

    def work(begin: int) -> None:
        block = order[begin : begin + OWN]  # (B,)
        offsets = np.concatenate([[0], np.cumsum(sizes[block])])
        rows = rows_of(offsets)  # (p,)
        own = pairs.offsets[block][rows] + np.arange(len(rows)) - offsets[rows]  # (p,) of P
        items, present = find(places, pairs.places[own])
        own, rows = own[present], rows[present]
        items, columns = np.unique(items[present], return_inverse=True)
        for left in range(0, len(items), tile[1]):
            here = np.flatnonzero((columns >= left) & (columns < left + tile[1]))
            part = items[left : left + tile[1]]
            part = torch.from_numpy(np.pad(part, (0, -len(part) % 64), 'edge'))  # few shapes: each is compiled once
            found = squared_distances(queries[torch.from_numpy(block)], gallery[part])  # (B, W)
            distances[own[here]] = found[rows[here], columns[here] - left].cpu().numpy()

    _in_threads(work, range(0, len(order), OWN), gallery.features.device)
    return distances


def count(queries: Points, gallery: Points, places: np.ndarray, pairs: Pairs, distances, tile=TILE) -> Tally:
    """Stream the gallery, or the part of it that stands at `places`, past the pairs at their `distances` (P,)."""
    counts = np.zeros(len(pairs.places), np.int64)
    nearest = np.full((len(queries), NEAREST), NONE)
    histogram = np.zeros(BINS, np.int64)
    tally = _tally_host if gallery.features.device.type == 'cpu' else _tally_device
    lock = Lock()

    def work(corner: tuple[int, int]) -> None:
        top, left = corner
        rows, columns = slice(top, top + tile[0]), slice(left, left + tile[1])
        block = squared_distances(queries[rows], gallery[columns])  # (B, W)
        offsets = pairs.offsets[top : top + len(block) + 1]
        own = slice(offsets[0], offsets[-1])  # p of P
        found = tally(block, places[columns], rows_of(offsets), pairs.places[own], distances[own], nearest[rows])
        with lock:
            total = Tally(counts[own], nearest[rows], histogram) + found
            counts[own], nearest[rows], histogram[:] = total.counts, total.nearest, total.histogram

    corners = [(top, left) for top in range(0, len(queries), tile[0]) for left in range(0, len(gallery), tile[1])]
    _in_threads(work, corners, gallery.features.device)
    return Tally(counts, nearest, histogram)


def assemble(pairs: Pairs, distances: np.ndarray, tally: Tally) -> Ranking:
    """The ranking, from the distances (P,) of all pairs and the tally of the whole gallery."""
    matches = rank_matches(pairs, distances, tally.counts)
    rows = rows_of(matches.offsets)  # (M,)
    order = np.arange(len(rows)) - matches.offsets[rows]  # (M,) from 0, within the query
    first = order < NEAREST
    keys = np.full((len(tally.nearest), NEAREST), NONE)
    keys[rows[first], order[first]] = keys_of(matches.distances[first], matches.places[first])
    keys = np.sort(np.hstack([keys, tally.nearest]), axis=1)[:, :NEAREST]  # (Q, NEAREST)
    own = np.bincount(bins_of(matches.distances), minlength=BINS)  # (BINS,)
    used = np.flatnonzero(own + tally.histogram)
    low, high = (used[0], used[-1] + 1) if len(used) else (0, 0)
    return Ranking(
        **vars(matches),
        nearest=np.where(keys < NONE, keys & 0xFFFFFFFF, -1),
        nearest_distances=distances_of(keys),
        edges=(np.arange(low, high + 1, dtype=np.int32) << 16).view(np.float32),
        match_histogram=own[low:high],
        other_histogram=tally.histogram[low:high],
    )


def squared_distances(queries: Points, gallery: Points) -> Tensor:
    """(B, W) float32: |q|^2 + |g|^2 - 2 q.g, which rounding may leave a little below 0."""
    if gallery.features.device.type != 'cpu':
        products = queries.features @ gallery.features.t()  # (B, W)
        return products.mul_(-2).add_(gallery.norms).add_(queries.norms[:, None])
    if 4 * len(queries) < len(gallery):
        products = _products(gallery.features, -2 * queries.features).t()
    else:
        products = _products(-2 * queries.features, gallery.features)
    return products.add_(gallery.norms).add_(queries.norms[:, None])


def _products(left: Tensor, right: Tensor) -> Tensor:
    """left (L, D) @ right (R, D) transposed, on the CPU, by a convolution with windows of 1 x 1 pixel.

    That goes to oneDNN, which on AMD is twice as fast as the library behind torch.mm (on Intel they are even), and which
    sums each element in the same order whatever L and R are. It copies `right`, so L should be the larger.
    """
    height = -(-len(left) // 16)  # 16 pictures of height x 1: with fewer, one thread does not go to oneDNN
    pixels = F.pad(left, (0, 0, 0, 16 * height - len(left))) if len(left) % 16 else left  # (16 h, D)
    pixels = pixels.view(16, height, 1, -1).permute(0, 3, 1, 2)  # (16, D, h, 1), channels_last
    products = F.conv2d(pixels, right[:, :, None, None])  # (16, R, h, 1), channels_last
    return products.permute(0, 2, 3, 1).reshape(16 * height, len(right))[: len(left)]


def find(places: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How many of `places` (W,), which ascend, are below each of `wanted` (p,), and whether it is among them."""
    below = np.searchsorted(places, wanted)
    if not len(places):
        return below, np.zeros(len(wanted), bool)
    return below, places[np.minimum(below, len(places) - 1)] == wanted


def keys_of(distances, places):
    """int64 that sort as (distance, place) do; float32 distances, places below 2^32; both tensors or both arrays."""
    if isinstance(distances, np.ndarray):
        return keys_of(torch.from_numpy(distances), torch.from_numpy(places)).numpy()
    bits = (distances + 0.0).view(torch.int32).long()  # no -0, which would sort before 0
    return torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits) << 32 | places


def distances_of(keys: np.ndarray) -> np.ndarray:
    """float32: the distances in such keys; NaN for NONE."""
    bits = (keys >> 32).astype(np.int32)
    return np.where(bits < 0, bits ^ 0x7FFFFFFF, bits).view(np.float32)


def bins_of(distances: np.ndarray) -> np.ndarray:
    """Bins of the histograms: the upper 16 bits of float32; the lowest bin takes what rounding left below 0."""
    bits = distances.view(np.int32)
    return np.where(bits < 0, 0, bits >> 16)


def _tally_host(block: Tensor, places, rows, own_places, distances, nearest) -> Tally:
    """Count one block.

    Args:
        block: (B, W) distances of B queries to the gallery items that stand at places (W,); it is overwritten.
        rows, own_places, distances: (p,) the pairs of those queries.
        nearest: (B, NEAREST) keys of the nearest items so far.
    """
    block = block.numpy()
    columns, present = find(places, own_places)
    own = rows[present], columns[present]
    block[own] = np.inf
    by_distance = np.sort(block, axis=1)  # (B, W)
    bits = by_distance.ravel().view(np.uint32)
    ends = np.append(np.flatnonzero((bits[1:] ^ bits[:-1]) > 0xFFFF), len(bits) - 1)  # of runs in one bin
    histogram = np.bincount(bits[ends] >> 16, np.diff(ends, prepend=-1), 2 * BINS).astype(np.int64)
    histogram[0] += histogram[BINS:].sum()  # those with the sign bit
    histogram[INFINITE] = 0
    counts = count_before(block, by_distance, rows, distances, columns)
    bounds = np.fmin(by_distance[:, :NEAREST][:, -1], distances_of(nearest[:, -1]))  # (B,)
    bounds = np.minimum(bounds, np.finfo(np.float32).max)
    found, columns = np.divmod(np.flatnonzero(block <= bounds[:, None]), len(places))  # (n,), n little more than 10 B
    order = np.arange(len(found)) - np.searchsorted(found, found)  # (n,) from 0, within the query
    keys = np.full((len(block), order.max(initial=0) + 1), NONE)
    keys[found, order] = keys_of(block[found, columns], places[columns])
    return Tally(counts, np.sort(keys, axis=1)[:, :NEAREST], histogram[:BINS])


def _tally_device(block: Tensor, places, rows, own_places, distances, nearest) -> Tally:
    """The same where sorting is dear and comparing cheap."""
    columns, present = find(places, own_places)
    places, rows, columns, present, own_places, distances = (
        torch.from_numpy(x).to(block.device) for x in (places, rows, columns, present, own_places, distances)
    )
    own = rows[present], columns[present]
    block[own] = torch.inf
    bins = (block.view(torch.int32) >> 16).clamp_(min=0)  # (B, W)
    histogram = bins.flatten().bincount(minlength=BINS)
    histogram[INFINITE] = 0
    keys = keys_of(block, places)  # (B, W)
    keys[own] = NONE
    marks = keys_of(distances, own_places)  # (p,)
    parts = zip(rows.split(OWN), marks.split(OWN), strict=True)
    counts = [(keys[part] < mark[:, None]).sum(1) for part, mark in parts]
    nearest = keys.topk(min(NEAREST, len(places)), largest=False).values
    return Tally(torch.cat(counts).cpu().numpy(), nearest.cpu().numpy(), histogram.cpu().numpy())


def _in_threads(work: Callable, tasks: Iterable, device: torch.device) -> None:
    """Run the tasks, on the CPU in one thread for each of torch's, each with products of one thread."""
    threads = torch.get_num_threads()
    tf32 = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        workers = threads if device.type == 'cpu' else 1
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            list(pool.map(work, tasks))
    finally:
        torch.set_num_threads(threads)  # the last number set anywhere is that of threads to come
        torch.backends.cuda.matmul.allow_tf32 = tf32


# The figures, and the command


PRINTED_RANKS = (1, 5, 10, 20)


def show(result: Ranking) -> None:
    """Print the figures of the original."""
    cmc = result.cmc(max(PRINTED_RANKS))
    print(f'Queries: {result.num_valid} valid, {result.num_skipped} skipped (without a match in another camera)')
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
        except (OSError, ValueError) as problem:
            reason = getattr(problem, 'strerror', None) or ' '.join(str(problem).split())
            raise UserError(f'{path} cannot be read ({reason}); write it with --evaluate --save-features') from None
        if array.dtype.kind not in kinds:
            raise UserError(f'{path} holds {array.dtype}; write it with --evaluate --save-features')
        arrays.append(array)
    return arrays


def main() -> None:
    parser = argparse.ArgumentParser(description='Rank saved features from disk, in bounded memory.')
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
