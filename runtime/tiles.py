"""Distances computed in tiles, in threads or on a GPU, and the nearest items of a tile as sortable keys."""

import contextlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from runtime.errors import UserError
from runtime.precision import without_tf32

Tile = tuple[int, int]  # numbers of queries and gallery items in one product

NONE = np.iinfo(np.int64).max  # the key of no item; it sorts after all others


DISTANCES = 'euclidean', 'cosine'


@dataclass(frozen=True)
class Points:
    """Features (N, D) of any float type and their squared norms (N,) float32, on one device.

    If `scales` (N,) are given, the points are the features multiplied by them.
    """

    features: Tensor
    norms: Tensor
    scales: Tensor | None = None

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, rows: 'slice | Tensor') -> 'Points':
        """The selected points, in float32, scaled."""
        features = self.features[rows].float()
        return Points(features if self.scales is None else features * self.scales[rows, None], self.norms[rows])


def points(
    q_features: np.ndarray | Tensor,
    g_features: np.ndarray | Tensor,
    num_queries: int,
    num_gallery: int,
    distance: str = 'euclidean',
) -> tuple[Points, Points]:
    """Queries and gallery as checked `Points` on the gallery's device. Raises UserError like `rank`."""
    gallery = torch.as_tensor(g_features).detach()
    queries = torch.as_tensor(q_features).detach().to(gallery.device)
    for subset, features, number in (('query', queries, num_queries), ('gallery', gallery, num_gallery)):
        if tuple(features.shape) != (number, gallery.size(-1)):
            raise UserError(
                f'the {subset} features have shape {tuple(features.shape)}, not ({number}, {gallery.size(-1)})'
            )
    return points_of('query', queries, distance), points_of('gallery', gallery, distance)


def points_of(subset: str, features: Tensor, distance: str) -> Points:
    """The features (N, D) of queries or of a gallery as `Points`. Raises UserError if one is not finite or too large.

    The cosine distance, 1 - cosine, is the squared Euclidean distance of features scaled to length sqrt(1/2). A zero
    feature, or one too short to be scaled (about 1e-19), has distance 1 from all others.
    """
    norms = _squared_norms(features)
    wrong = (4 * norms).isfinite().logical_not().nonzero().flatten().tolist()  # 4 |x|^2 bounds |q - g|^2
    if wrong:
        raise UserError(
            f'{len(wrong)} of {len(features)} {subset} features are not finite or too large to be squared, the first '
            f'at index {wrong[0]}: check the weights and the precision of the model'
        )
    if distance != 'cosine':
        return Points(features, norms)
    scales = torch.where(norms >= torch.finfo(torch.float32).tiny, (0.5 / norms).sqrt(), 0)
    return Points(features, torch.full_like(norms, 0.5), scales)


def joined(queries: Points, gallery: Points) -> Points:
    """The queries, followed by the gallery."""
    scales = None
    if queries.scales is not None and gallery.scales is not None:
        scales = torch.cat([queries.scales, gallery.scales])
    return Points(torch.cat([queries.features, gallery.features]), torch.cat([queries.norms, gallery.norms]), scales)


def squared_distances(queries: Points, gallery: Points) -> Tensor:
    """(B, W) float32: |q|^2 + |g|^2 - 2 q.g, which rounding may make slightly negative."""
    if not is_host(gallery.features.device):
        result = queries.features @ gallery.features.t()  # (B, W)
    elif 4 * len(queries) < len(gallery):
        result = products(gallery.features, queries.features).t()
    else:
        result = products(queries.features, gallery.features)
    return torch.add(gallery.norms, result, alpha=-2, out=result).add_(queries.norms[:, None])


def _squared_norms(features: Tensor) -> Tensor:
    norms = torch.empty(len(features), device=features.device)

    def work(part: Tensor, norm: Tensor) -> None:
        torch.sum(part.float().square(), 1, out=norm)

    in_threads(work, zip(features.split(128), norms.split(128), strict=True), features.device)
    return norms


def products(left: Tensor, right: Tensor) -> Tensor:
    """left (L, D) @ right (R, D) transposed, (L, R), on the CPU, computed as a 1 x 1 convolution.

    It is computed by oneDNN, which on AMD processors is twice as fast as the library behind torch.mm, and sums each
    element in the same order regardless of L and R. It copies `right`, so L should be larger than R.
    """
    height = -(-len(left) // 16)  # 16 images of height x 1: with fewer, a single thread does not use oneDNN
    pixels = F.pad(left, (0, 0, 0, 16 * height - len(left))) if len(left) % 16 else left  # (16 h, D)
    pixels = pixels.reshape(16, height, 1, -1).permute(0, 3, 1, 2)  # (16, D, h, 1), channels_last
    products = F.conv2d(pixels, right[:, :, None, None])  # (16, R, h, 1), channels_last
    return products.permute(0, 2, 3, 1).reshape(16 * height, len(right))[: len(left)]


def nearest_host(
    block: np.ndarray | Tensor, places: np.ndarray, nearest: np.ndarray, bounds: np.ndarray | None = None
) -> np.ndarray:
    """Keys (B, at most k) of the finite distances in `block` (B, W) that may be among the nearest (B, k) so far.

    bounds (B,): a distance that at least k items of the row do not exceed, or the row's largest distance.
    """
    block = np.asarray(block)
    so_far = distances_of(nearest[:, -1])  # (B,) NaN while there are fewer than k
    if bounds is None:
        k = min(nearest.shape[1], len(places))
        bounds = np.partition(block, k - 1)[:, k - 1] if np.isnan(so_far).any() else so_far
    bounds = np.minimum(np.fmin(bounds, so_far), np.finfo(np.float32).max)
    rows, columns = np.divmod(np.flatnonzero(block <= bounds[:, None]), len(places))  # (n,)
    order = np.arange(len(rows)) - np.searchsorted(rows, rows)  # (n,) from 0, within the row
    keys = np.full((len(block), order.max(initial=0) + 1), NONE)
    keys[rows, order] = keys_of(block[rows, columns], places[columns])
    return np.sort(keys, axis=1)[:, : nearest.shape[1]]


def nearest_device(block: Tensor, places: np.ndarray, nearest: np.ndarray) -> np.ndarray:
    keys = keys_on_device(block, torch.from_numpy(places).to(block.device))  # (B, W)
    keys[block == torch.inf] = NONE
    return keys.topk(min(nearest.shape[1], len(places)), largest=False).values.cpu().numpy()


def nearer(some: np.ndarray, others: np.ndarray) -> np.ndarray:
    """The k smallest keys in each row of `some` (B, k) and `others` (B, any) together."""
    return np.sort(np.hstack([some, others]), axis=1)[:, : some.shape[1]]


def keys_of(distances: np.ndarray, places: np.ndarray) -> np.ndarray:
    """int64 keys that sort like (distance, place): distances float32, never -0; places below 2^32."""
    return keys_on_device(torch.from_numpy(distances), torch.from_numpy(places)).numpy()


def keys_on_device(distances: Tensor, places: Tensor) -> Tensor:
    """Like `keys_of`, for tensors."""
    bits = distances.view(torch.int32).long()
    return torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits) << 32 | places


def distances_of(keys: np.ndarray) -> np.ndarray:
    """The float32 distances encoded in keys; NaN for NONE."""
    bits = (keys >> 32).astype(np.int32)
    return np.where(bits < 0, bits ^ 0x7FFFFFFF, bits).view(np.float32)


def find(places: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each of `wanted` (p,): how many of the ascending `places` (W,) are smaller, and whether it is among them."""
    below = np.searchsorted(places, wanted)
    return below, places[np.minimum(below, len(places) - 1)] == wanted


def is_host(device: torch.device) -> bool:
    return device.type == 'cpu'


def tile_of(device: torch.device) -> Tile:
    """Numbers of queries and gallery items per product: enough for speed, few enough for cache and memory."""
    return (1120, max(512, min(2304, 4608 // torch.get_num_threads()))) if is_host(device) else (1024, 8192)


def tiles(height: int, width: int, tile: Tile) -> list[tuple[slice, slice]]:
    return [
        (slice(top, top + tile[0]), slice(left, left + tile[1]))
        for top in range(0, height, tile[0])
        for left in range(0, width, tile[1])
    ]


def in_threads(work: Callable[..., object], tasks: Iterable[tuple], device: torch.device) -> None:
    """Call work(*task) for all tasks; on the CPU in as many threads as torch would use, one per product."""
    threads = torch.get_num_threads()

    @torch.inference_mode()  # set per thread, like autocast, which is off in new threads
    def do(task: tuple) -> None:
        work(*task)

    with contextlib.ExitStack() as stack:
        stack.callback(torch.set_num_threads, threads)  # new threads use the number set last in any thread
        if torch.cuda.is_initialized():  # what runs in these threads may use a GPU
            stack.enter_context(without_tf32())
        number = threads if is_host(device) else 1
        pool = stack.enter_context(ThreadPoolExecutor(number, initializer=torch.set_num_threads, initargs=(1,)))
        for _ in pool.map(do, tasks):
            pass
