"""Pillow's bilinear and bicubic resize of a whole uint8 batch, on its device, with the normalisation of its pixels.

Weights are 22-bit integers, the horizontal pass comes first, and each pass is rounded to 8 bits, as in Pillow. Integer
arithmetic is exact on every device, so every pixel equals that of the per-image pipeline. (From version 12.3 Pillow
starts with the vertical pass if that is less work, for sources that are proportionally taller than the target. Many
values then differ by 1/255, and by more where a bicubic pass exceeds the range of 8 bits and is clipped. The published
weights were trained and tested with the horizontal pass first.)
"""

import functools
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

BITS = 22  # Pillow's fixed point: 32 bits minus 8 for a pixel and 2 of headroom
AT_ONCE = {'cpu': 1 << 17, 'cuda': 1 << 25}  # pixels processed at a time: fits a CPU's cache, bounds a GPU's memory
PADDED = {'cpu': 1, 'cuda': 2}  # by how much images may be enlarged to a common size, to be processed at once

# Positions in the batch, int64 (n,), and pixels, uint8 (n, H, W, 3), of the images of each size
Images = Sequence[tuple[Tensor, Tensor]]
Normalisation = tuple[tuple[float, ...], tuple[float, ...]]  # mean and standard deviation of RGB in [0, 1]
Tables = tuple[Tensor, Tensor]  # taps and weights, (K, N, T) each: of N images for T output pixels


def render(
    images: Images,
    rows: Tensor,
    columns: Tensor,
    heights: tuple[int, ...],
    widths: tuple[int, ...],
    normalisation: Normalisation,
    interpolation: str,
) -> Tensor:
    """Resizes each image to all of `heights` and `widths`, keeps its `rows` (B, h) and `columns` (B, w), normalises.

    Returns float32 (B, 3, h, w), channels_last.
    """
    device, height, width = rows.device, rows.shape[1], columns.shape[1]
    if mixed := len(images) > 1:
        images = sorted(images, key=lambda group: group[1].shape[1] * group[1].shape[2])
        order = torch.cat([positions for positions, _ in images]).to(device, non_blocking=True)  # (B,)
        rows, columns = rows[order], columns[order]
    scale, shift = affine(normalisation, width, device)
    # (B, h, w, 3), one group after the other
    batch = torch.empty(len(rows), height, width, 3, dtype=torch.float32, device=device)
    done, clamp = 0, interpolation == 'bicubic'  # which has negative weights
    for some in _together([pixels for _, pixels in images], height, width):
        pixels = _padded(some)  # (N, H, W, 3)
        of_rows = _tables([(each.shape[1], len(each)) for each in some], heights, interpolation, device)
        of_columns = _tables([(each.shape[2], len(each)) for each in some], widths, interpolation, device)
        largest = max(pixels.shape[1], height) * max(pixels.shape[2], width)
        at_once = min(max(AT_ONCE[device.type] // largest, 1), len(pixels))
        work = torch.empty(3, at_once * largest * 3, dtype=torch.int32, device=device)
        for first in range(0, len(pixels), at_once):
            part = slice(first, first + at_once)  # of these images
            source = pixels[part]
            places = slice(done, done := done + len(source))  # of the batch
            column, row = _chosen(of_columns, part, columns[places]), _chosen(of_rows, part, rows[places])
            source = _pass(source.transpose(1, 2), *column, work, clamp)  # (n, w, H, 3)
            source = _pass(source.transpose(1, 2), *row, work, clamp)  # (n, h, w, 3)
            ready = batch[places].copy_(source)
            torch.addcmul(shift, ready, scale, out=ready)
    if mixed:
        batch = torch.empty_like(batch).index_copy_(0, order, batch)
    return batch.permute(0, 3, 1, 2)  # (B, 3, h, w)


def _together(groups: Sequence[Tensor], height: int, width: int) -> Iterator[list[Tensor]]:
    """Groups (n, H, W, 3) that are processed at once, because a GPU needs as long for one small image as for many.

    Padded to a common size they have at most AT_ONCE pixels, and at most PADDED times as many as before.
    """
    some: list[Tensor] = []
    number = tall = wide = held = 0
    for group in groups:
        number, tall, wide = number + len(group), max(tall, group.shape[1]), max(wide, group.shape[2])
        held += group.shape[:3].numel()
        largest, device = max(tall, height) * max(wide, width), group.device.type
        if some and (number * largest > AT_ONCE[device] or number * tall * wide > PADDED[device] * held):
            yield some
            some, (number, tall, wide, _), held = [], group.shape, group.shape[:3].numel()
        some.append(group)
    yield some


def _padded(groups: Sequence[Tensor]) -> Tensor:
    """(N, H, W, 3): the images of all groups (n, h, w, 3), at the top left of the size of the largest."""
    if len(groups) == 1:
        return groups[0]
    numbers, heights, widths, _ = zip(*(each.shape for each in groups), strict=True)
    padded, done = groups[0].new_zeros(sum(numbers), max(heights), max(widths), 3), 0
    for each in groups:
        padded[done : (done := done + len(each)), : each.shape[1], : each.shape[2]] = each
    return padded


def _tables(
    sources: Sequence[tuple[int, int]], targets: tuple[int, ...], interpolation: str, device: torch.device
) -> Tables:
    """The coefficients of images of these lengths, each with its number of images."""
    pairs = [_taps(length, targets, interpolation, device) for length, _ in sources]
    most = max(len(taps) for taps, _ in pairs)
    for place, (length, _) in enumerate(sources):
        if len(pairs[place][0]) < most:
            pairs[place] = _taps(length, targets, interpolation, device, most)
    taps, weights = (
        [each[:, None].expand(-1, number, -1) for each, (_, number) in zip(tables, sources, strict=True)]
        for tables in zip(*pairs, strict=True)
    )  # (K, n, T) each
    return (taps[0], weights[0]) if len(sources) == 1 else (torch.cat(taps, 1), torch.cat(weights, 1))


def _chosen(tables: Tables, images: slice, outputs: Tensor) -> Tables:
    """(K, n, t): the coefficients of some images, for the output pixels (n, t)."""
    taps, weights = (each[:, images] for each in tables)
    outputs = outputs.expand(len(taps), -1, -1)
    return taps.gather(2, outputs), weights.gather(2, outputs)


def _pass(pixels: Tensor, taps: Tensor, weights: Tensor, work: Tensor, clamp: bool) -> Tensor:
    """One pass of the resize, along axis 1: (n, L, M, 3), with taps and weights (K, n, l), -> int32 (n, l, M, 3).

    Large intermediates and the result are written to the three rows of `work`, because memory traffic is slower than
    arithmetic.
    """
    n, length, width, _ = pixels.shape
    source = work[0, : pixels.numel()].view(pixels.shape).copy_(pixels).view(n * length, width * 3)
    taps = taps + torch.arange(0, n * length, length, device=taps.device)[:, None]  # (K, n, l), lines of source
    taps, weights = taps.flatten(1), weights.flatten(1)[..., None]  # (K, n * l), (K, n * l, 1)
    shape = taps.shape[1], width * 3
    lines, total = (row[: shape[0] * shape[1]].view(shape) for row in work[1:])  # (n * l, M * 3) each
    total.fill_(1 << (BITS - 1))  # one half, so that the shift rounds
    for tap, weight in zip(taps, weights, strict=True):
        torch.index_select(source, 0, tap, out=lines)
        total.addcmul_(lines, weight)
    total >>= BITS  # bilinear: at most 255.5 * 2^22; bicubic: at most 1.4 times as much, which fits int32
    if clamp:
        total.clamp_(0, 255)
    result: Tensor = total.view(n, -1, width, 3)
    return result


def _triangle(x: np.ndarray) -> np.ndarray:
    weight: np.ndarray = np.maximum(1 - np.abs(x), 0)
    return weight


def _cubic(x: np.ndarray) -> np.ndarray:
    """The cubic convolution kernel with a = -0.5 (Keys, 1981), which Pillow uses."""
    x = np.abs(x)
    inner, outer = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
    return np.where(x < 1, inner, np.where(x < 2, outer, 0))


KERNELS = {'bilinear': (_triangle, 1.0), 'bicubic': (_cubic, 2.0)}  # kernel, and the distance from which it is 0


@functools.lru_cache(maxsize=16)
def affine(normalisation: Normalisation, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Factor and addend for pixels 0..255, (w, 3) each, many times faster than broadcasting three numbers."""
    mean, std = torch.tensor(normalisation, dtype=torch.float64, device='cpu')  # (3,) each
    table = torch.stack([1 / (255 * std), -mean / std]).float()  # (2, 3)
    return tuple(table[:, None].expand(2, width, 3).contiguous().to(device))


@functools.lru_cache(maxsize=2048)
def _taps(
    source: int, targets: tuple[int, ...], interpolation: str, device: torch.device, least: int = 0
) -> tuple[Tensor, Tensor]:
    """The coefficients of Pillow's resize of `source` pixels to each of `targets` pixels, concatenated.

    Returns the source pixels of each output pixel, int64 (K, sum(targets)), and their weights, int32 of the same shape,
    which add up to about 2^22. K is the largest number of source pixels, or `least`; unused ones have weight 0.
    """
    taps, weights = [], []
    kernel, support = KERNELS[interpolation]
    width = 2 * int(np.ceil(support * max(source / min(targets), 1))) + 1  # most taps that any output pixel needs
    for target in targets:
        scale = source / target
        stretch = max(scale, 1.0)  # of the kernel, which is not narrowed when an image is enlarged
        radius = support * stretch  # in source pixels
        center = (np.arange(target) + 0.5) * scale  # (target,)
        first = np.maximum((center - radius + 0.5).astype(np.int64), 0)
        end = np.minimum((center + radius + 0.5).astype(np.int64), source)
        tap = first + np.arange(width)[:, None]  # (width, target)
        weight = kernel((tap - center + 0.5) * (1 / stretch)) * (tap < end)  # (width, target)
        weight = weight / weight.sum(0) * (1 << BITS)
        weights.append((weight + np.copysign(0.5, weight)).astype(np.int32))
        taps.append(np.minimum(tap, source - 1))
    tap, weight = np.concatenate(taps, 1), np.concatenate(weights, 1)
    used = max(int(np.flatnonzero(weight.any(1))[-1]) + 1, least)
    if missing := max(used - len(tap), 0):
        tap, weight = (np.pad(each, ((0, missing), (0, 0))) for each in (tap, weight))
    return torch.from_numpy(tap[:used]).to(device), torch.from_numpy(weight[:used]).to(device)
