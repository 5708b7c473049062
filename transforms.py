"""Pixels: the training augmentation and the test preparation of a whole uint8 batch, on the device where it lies.

Both are Pillow's bilinear resize in Pillow's own arithmetic: weights are integers of 22 bits, the horizontal pass comes
first, each pass is rounded to 8 bits. Integers are exact on any device, and `ToTensor` and `Normalize` follow as
torchvision computes them: on a CPU the result is that of the per-image pipeline to the last bit. (Pillow from 12.3 on
begins with the vertical pass where that leaves less to do, for sources taller in proportion than the target; single
pixels then differ by 1/255. The published weights were trained and tested with the horizontal pass first.)

Images arrive as groups of equal size, a list of (positions in the batch int64 (n,), pixels uint8 (n, H, W, 3)) that
together make a batch of B; images of one size are one group, in order.
"""

import functools
import random
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import Compose, Normalize, RandomHorizontalFlip, Resize, ToTensor

__all__ = [
    'IMAGENET_MEAN',
    'IMAGENET_STD',
    'Compose',
    'Normalize',
    'Random2DTranslation',
    'RandomHorizontalFlip',
    'Resize',
    'TestTransform',
    'ToTensor',
    'TrainTransform',
]

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of RGB in [0, 1]
ENLARGE = 1.125  # a translated image is cropped out of one so much larger
BITS = 22  # Pillow's fixed point: 32 bits less 8 of a pixel and 2 of headroom
AT_ONCE = {'cpu': 1 << 17, 'cuda': 1 << 25}  # pixels worked on: a CPU's stay in its cache, a GPU's memory in bounds

Images = Sequence[tuple[Tensor, Tensor]]


class Random2DTranslation:
    """The original's augmentation of one PIL image, drawing from python's `random`.

    With probability p the image is resized to 1.125 times (height, width), of which (height, width) is cropped at a
    random place, else it is resized to (height, width). `TrainTransform` does the same to a batch.
    """

    def __init__(self, height: int, width: int, p: float = 0.5, interpolation: int = Image.BILINEAR):
        self.height, self.width, self.p, self.interpolation = height, width, p, interpolation

    def __call__(self, img: Image.Image) -> Image.Image:
        if random.random() < 1 - self.p:
            return img.resize((self.width, self.height), self.interpolation)
        width, height = round(self.width * ENLARGE), round(self.height * ENLARGE)
        left = round(random.uniform(0, width - self.width))
        top = round(random.uniform(0, height - self.height))
        img = img.resize((width, height), self.interpolation)
        return img.crop((left, top, left + self.width, top + self.height))


class TrainTransform:
    """Random2DTranslation, horizontal flip (both p = 0.5), ToTensor and Normalize of a batch, given its draws."""

    def __init__(self, height: int, width: int):
        self.height, self.width = height, width
        self.heights, self.widths = (height, round(height * ENLARGE)), (width, round(width * ENLARGE))

    def __call__(self, images: Images, draws: Tensor) -> Tensor:
        """Returns float32 (B, 3, height, width), channels_last, on the device of the images.

        Args:
            draws: (B, 4), uniform in [0, 1), float64, see `samplers`: an image is translated when column 0 is >= 0.5,
                by the share of the room there is that columns 1 (down) and 2 (right) say, and mirrored when column 3
                is < 0.5.
        """
        translate, down, right, mirror = draws.to(images[0][1].device, non_blocking=True).unbind(1)  # (B,) each
        rows = _window(translate, down, *self.heights)  # (B, h)
        columns = _window(translate, right, *self.widths)  # (B, w)
        columns = torch.where(mirror[:, None] < 0.5, columns.flip(1), columns)  # (B, w)
        return _render(images, rows, columns, self.heights, self.widths)


class TestTransform:
    """Resize, ToTensor and Normalize of a batch; no crop, no flip."""

    __test__ = False  # no test case, whatever pytest thinks of the name

    def __init__(self, height: int, width: int):
        self.height, self.width = height, width

    def __call__(self, images: Images) -> Tensor:
        """Returns float32 (B, 3, height, width), channels_last, on the device of the images."""
        device, count = images[0][1].device, sum(len(positions) for positions, _ in images)
        rows = torch.arange(self.height, device=device).expand(count, -1)  # (B, h)
        columns = torch.arange(self.width, device=device).expand(count, -1)  # (B, w)
        return _render(images, rows, columns, (self.height,), (self.width,))


def _window(translate: Tensor, share: Tensor, size: int, enlarged: int) -> Tensor:
    """The lines (B, size) that are kept of each image: of `size` plain ones, followed by `enlarged` ones."""
    offset = size + (share * (enlarged - size)).round().long()  # (B,)
    return torch.where(translate < 0.5, 0, offset)[:, None] + torch.arange(size, device=share.device)


def _render(images: Images, rows: Tensor, columns: Tensor, heights: tuple[int, ...], widths: tuple[int, ...]) -> Tensor:
    """Keeps `rows` (B, h) and `columns` (B, w) of each image's resizes to all of `heights` and `widths`; normalises."""
    device, height, width = rows.device, rows.shape[1], columns.shape[1]
    if mixed := len(images) > 1:
        order = torch.cat([positions for positions, _ in images]).to(device, non_blocking=True)  # (B,)
        rows, columns = rows[order], columns[order]
    mean, std = _statistics(width, device)
    batch = torch.empty(len(rows), height, width, 3, device=device)  # (B, h, w, 3), one group after the other
    done = 0
    for _, pixels in images:
        row_taps, row_weights = _taps(pixels.shape[1], heights, device)
        column_taps, column_weights = _taps(pixels.shape[2], widths, device)
        largest = max(pixels.shape[1] * pixels.shape[2], height * width)
        for source in pixels.split(max(AT_ONCE[device.type] // largest, 1)):
            here = slice(done, done := done + len(source))
            column, row = columns[here], rows[here]  # (n, w), (n, h)
            source = source.transpose(1, 2).to(torch.int32, memory_format=torch.contiguous_format)  # (n, W, H, 3)
            source = _pass(source, column_taps[:, column], column_weights[:, column])  # (n, w, H, 3)
            source = _pass(source.transpose(1, 2), row_taps[:, row], row_weights[:, row])  # (n, h, w, 3)
            batch[here].copy_(source).div_(255).sub_(mean).div_(std)
    if mixed:
        batch = torch.empty_like(batch).index_copy_(0, order, batch)
    return batch.permute(0, 3, 1, 2)  # (B, 3, h, w)


def _pass(pixels: Tensor, taps: Tensor, weights: Tensor) -> Tensor:
    """One pass of the resize, along axis 1: int32 (n, L, M, 3), with taps and weights (K, n, l), -> (n, l, M, 3)."""
    n, length, width, _ = pixels.shape
    lines = pixels.reshape(n * length, width * 3)
    taps = taps + torch.arange(0, n * length, length, device=taps.device)[:, None]  # (K, n, l), indices of lines
    taps, weights = taps.flatten(1), weights.flatten(1)[..., None]  # (K, n * l), (K, n * l, 1)
    total = lines.index_select(0, taps[0]).mul_(weights[0])  # (n * l, M * 3)
    for tap, weight in zip(taps[1:], weights[1:], strict=True):
        total.addcmul_(lines.index_select(0, tap), weight)
    total += 1 << (BITS - 1)  # one half, so that the shift rounds
    total >>= BITS  # from at most 255 * 2^22: int32 holds it
    return total.view(n, -1, width, 3)


@functools.lru_cache(maxsize=16)
def _statistics(width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation, (w, 3) each: repeated in full, which is many times faster than three numbers."""
    statistics = torch.tensor([IMAGENET_MEAN, IMAGENET_STD], device=device)  # (2, 3)
    return tuple(statistics[:, None].expand(2, width, 3).contiguous())


@functools.lru_cache(maxsize=1024)
def _taps(source: int, targets: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Pillow's bilinear resize of `source` pixels to each of `targets` pixels, one after the other.

    Returns the source pixels that make an output pixel, int64 (K, sum(targets)), and their weights, int32, alike, which
    add up to about 2^22. K is the largest number that one needs; others have weights of 0.
    """
    taps, weights = [], []
    width = 2 * int(np.ceil(max(source / min(targets), 1))) + 1  # most taps that any output pixel needs
    for target in targets:
        scale = source / target
        radius = max(scale, 1.0)  # of the triangle, in source pixels
        center = (np.arange(target) + 0.5) * scale  # (target,)
        first = np.maximum((center - radius + 0.5).astype(np.int64), 0)
        end = np.minimum((center + radius + 0.5).astype(np.int64), source)
        tap = first + np.arange(width)[:, None]  # (width, target)
        weight = np.maximum(1 - np.abs((tap - center + 0.5) * (1 / radius)), 0) * (tap < end)  # (width, target)
        weights.append((weight / weight.sum(0) * (1 << BITS) + 0.5).astype(np.int32))
        taps.append(np.minimum(tap, source - 1))
    tap, weight = np.concatenate(taps, 1), np.concatenate(weights, 1)
    used = int(np.flatnonzero(weight.any(1))[-1]) + 1
    return torch.from_numpy(tap[:used]).to(device), torch.from_numpy(weight[:used]).to(device)
