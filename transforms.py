"""Training augmentation and test preparation of the pixels of a whole uint8 batch, on its device.

Both use Pillow's bilinear or bicubic resize. The preparation, and on a GPU also the augmentation, reproduces Pillow's
arithmetic: weights are 22-bit integers, the horizontal pass comes first, and each pass is rounded to 8 bits. Integer
arithmetic is exact on every device, so every pixel equals that of the per-image pipeline. (From version 12.3 Pillow
starts with the vertical pass if that is less work, for sources that are proportionally taller than the target; single
pixels then differ by 1/255. The published weights were trained and tested with the horizontal pass first.) On a CPU the
augmentation uses torch, whose weights have 15 bits: it is twice as fast; most pixels are equal, the others differ by at
most 2/255.

Images arrive as groups of equal size, a list of (positions in the batch int64 (n,), pixels uint8 (n, H, W, 3)), which
together form a batch of B. Images of one size form one group, in order.
"""

import functools
import random
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms import Compose, Normalize, RandomHorizontalFlip, Resize, ToTensor

from runtime.errors import UserError

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
IMAGENET = (IMAGENET_MEAN, IMAGENET_STD)
ENLARGE = 1.125  # factor by which an image is enlarged before it is cropped
BITS = 22  # Pillow's fixed point: 32 bits minus 8 for a pixel and 2 of headroom
AT_ONCE = {'cpu': 1 << 17, 'cuda': 1 << 25}  # pixels processed at a time: fits a CPU's cache, bounds a GPU's memory

Images = Sequence[tuple[Tensor, Tensor]]
Normalisation = tuple[tuple[float, ...], tuple[float, ...]]  # mean and standard deviation of RGB in [0, 1]


class Random2DTranslation:
    """The original's augmentation of one PIL image, drawing from python's `random`.

    With probability p the image is resized to 1.125 times (height, width), and a random (height, width) crop is taken;
    otherwise it is resized to (height, width). `TrainTransform` does the same to a batch.
    """

    def __init__(self, height: int, width: int, p: float = 0.5, interpolation: int = Image.Resampling.BILINEAR):
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
    """The training augmentation of a batch, given its draws; ToTensor and Normalize.

    By default as in the original: Random2DTranslation and horizontal flip, both with p = 0.5.

    padding:        black pixels added on each side after resizing; a random (height, width) crop is then taken instead
                    of Random2DTranslation
    random_erasing: probability of replacing a rectangle of an image by the mean colour, see `erased`
    """

    def __init__(
        self,
        height: int,
        width: int,
        normalisation: Normalisation = IMAGENET,
        interpolation: str = 'bilinear',
        padding: int = 0,
        random_erasing: float = 0.0,
    ):
        self.height, self.width, self.normalisation = height, width, normalisation
        self.interpolation, self.padding, self.random_erasing = interpolation, padding, random_erasing
        self.heights, self.widths = (height, round(height * ENLARGE)), (width, round(width * ENLARGE))

    def __call__(self, images: Images, draws: Tensor) -> Tensor:
        """Returns float32 (B, 3, height, width), channels_last, on the device of the images.

        Args:
            draws: (B, DRAWS), uniform in [0, 1), float64, see `samplers`: an image is translated if column 0 is >= 0.5,
                by the fractions of the available margin in columns 1 (down) and 2 (right), and mirrored if column 3 is
                < 0.5. With padding it is always translated. The other columns are passed to `erased`.
        """
        if (prepared := _prepared(images, self.height, self.width)) is not None:
            return prepared
        device = images[0][1].device
        draws = draws.to(device, non_blocking=True)
        translate, down, right, mirror = draws[:, :4].unbind(1)  # (B,) each
        mirror = mirror < 0.5
        if self.padding:
            enlarge = torch.zeros_like(mirror)
            top, left = ((draw * (2 * self.padding + 1)).long() - self.padding for draw in (down, right))  # (B,)
        else:
            enlarge = translate >= 0.5
            top = (down * (self.heights[1] - self.height)).round().long() * enlarge  # (B,)
            left = (right * (self.widths[1] - self.width)).round().long() * enlarge  # (B,)
        render = self._on_cpu if device.type == 'cpu' else self._anywhere
        batch = render(images, enlarge, top, left, mirror)
        if self.random_erasing:
            rectangles = erased(draws[:, 4:], self.height, self.width, self.random_erasing)  # (B, h, w)
            batch.masked_fill_(rectangles[:, None], 0)  # the mean, after normalisation
        return batch

    def _anywhere(self, images: Images, enlarge: Tensor, top: Tensor, left: Tensor, mirror: Tensor) -> Tensor:
        """Pillow's arithmetic, without host synchronisation: crop and flip select rows and columns."""
        rows = top[:, None] + _range(self.height, top)  # (B, h)
        columns = left[:, None] + _range(self.width, left)  # (B, w)
        columns = torch.where(mirror[:, None], columns.flip(1), columns)
        outside = None
        if self.padding:
            black_rows, black_columns = (rows < 0) | (rows >= self.height), (columns < 0) | (columns >= self.width)
            outside = black_rows[:, :, None] | black_columns[:, None, :]  # (B, h, w)
            rows, columns = rows.clamp(0, self.height - 1), columns.clamp(0, self.width - 1)
        rows = rows + (self.height * enlarge)[:, None]  # rows of the enlarged image follow those of the other
        columns = columns + (self.width * enlarge)[:, None]
        batch = _render(images, rows, columns, self.heights, self.widths, self.normalisation, self.interpolation)
        if outside is not None:
            batch = torch.where(outside[:, None], self._black(batch.device), batch)
        return batch

    def _on_cpu(self, images: Images, enlarge: Tensor, top: Tensor, left: Tensor, mirror: Tensor) -> Tensor:
        """torch's uint8 resize, image by image, so that an image is still in the cache when it is normalised."""
        scale, shift = _affine(self.normalisation, self.width, enlarge.device)
        batch = torch.empty(len(enlarge), self.height, self.width, 3)  # (B, h, w, 3)
        places = list(zip(top.tolist(), left.tolist(), mirror.tolist(), strict=True))
        for positions, pixels in images:
            for enlarged, size in enumerate(zip(self.heights, self.widths, strict=True)):
                chosen = (enlarge[positions] == enlarged).nonzero()[:, 0]  # (n,)
                if not len(chosen):
                    continue
                source = pixels[chosen].permute(0, 3, 1, 2)  # (n, 3, H, W)
                resized = F.interpolate(source, size, mode=self.interpolation, antialias=True).permute(0, 2, 3, 1)
                for image, place in zip(resized, positions[chosen].tolist(), strict=True):
                    down, right, mirrored = places[place]
                    if self.padding:
                        image = F.pad(image, (0, 0, *2 * (self.padding,), *2 * (self.padding,)))
                        down, right = down + self.padding, right + self.padding
                    image = image[down:, right:][: self.height, : self.width]
                    ready = batch[place].copy_(image.flip(1) if mirrored else image)  # (h, w, 3)
                    torch.addcmul(shift, ready, scale, out=ready)
        return batch.permute(0, 3, 1, 2)  # (B, 3, h, w)

    def _black(self, device: torch.device) -> Tensor:
        """(3, 1, 1): a normalised black pixel."""
        return _affine(self.normalisation, 1, device)[1][0][:, None, None]


RECTANGLES = 8  # drawn for an image, of which the first that fits is taken: one in 10^10 images of 2:1 has none
DRAWS_OF_ERASING = 3 + 2 * RECTANGLES


def erased(draws: Tensor, height: int, width: int, p: float) -> Tensor:
    """Random erasing: a mask with the rectangle to erase in each image, bool (B, height, width).

    Zhong et al., Random Erasing Data Augmentation, AAAI 2020, arXiv:1708.04896: with probability p, a rectangle of 2 to
    40% of the area with an aspect (height / width) of 0.3 to 1 / 0.3, both uniform, at a uniform position. Rectangles
    as high or wide as the image are drawn again.

    draws: (B, DRAWS_OF_ERASING), uniform in [0, 1): erase?, down, right, and area and aspect of each try
    """
    erase, down, right = draws[:, :3].T[..., None]  # (B, 1) each
    area, aspect = draws[:, 3:].unflatten(1, (RECTANGLES, 2)).unbind(2)  # (B, T) each
    area = (0.02 + 0.38 * area) * (height * width)
    aspect = 0.3 + (1 / 0.3 - 0.3) * aspect
    tall, wide = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()  # (B, T)
    fits = (tall < height) & (wide < width)  # (B, T)
    first = fits.int().argmax(1, keepdim=True)  # (B, 1)
    tall, wide = tall.gather(1, first), wide.gather(1, first)  # (B, 1)
    top, left = (down * (height - tall + 1)).floor(), (right * (width - wide + 1)).floor()  # (B, 1)
    row, column = _range(height, draws), _range(width, draws)
    chosen = (erase < p) & fits.any(1, keepdim=True)  # (B, 1)
    rows = (row >= top) & (row < top + tall) & chosen  # (B, h)
    columns = (column >= left) & (column < left + wide)  # (B, w)
    rectangles: Tensor = rows[:, :, None] & columns[:, None, :]  # (B, h, w)
    return rectangles


class TestTransform:
    """Resize, ToTensor and Normalize of a batch; no crop, no flip."""

    __test__ = False  # not a test case, despite its name

    def __init__(
        self, height: int, width: int, normalisation: Normalisation = IMAGENET, interpolation: str = 'bilinear'
    ):
        self.height, self.width, self.normalisation, self.interpolation = height, width, normalisation, interpolation

    def __call__(self, images: Images) -> Tensor:
        """Returns float32 (B, 3, height, width), channels_last, on the device of the images."""
        if (prepared := _prepared(images, self.height, self.width)) is not None:
            return prepared
        device, count = images[0][1].device, sum(len(positions) for positions, _ in images)
        rows = torch.arange(self.height, device=device).expand(count, -1)  # (B, h)
        columns = torch.arange(self.width, device=device).expand(count, -1)  # (B, w)
        return _render(images, rows, columns, (self.height,), (self.width,), self.normalisation, self.interpolation)


def _range(size: int, like: Tensor) -> Tensor:
    return torch.arange(size, device=like.device)


def _prepared(images: Images, height: int, width: int) -> Tensor | None:
    """The batch (B, 3, h, w) if the data set returned float images, which are already prepared.

    Raises UserError if their size is another: the test, and those who use the weights, would resize to this one.
    """
    _, pixels = images[0]
    if not pixels.is_floating_point():
        return None
    if (pixels.shape[1], pixels.shape[2]) != (height, width):
        raise UserError(
            f'the data set returns float images of {pixels.shape[1]} x {pixels.shape[2]} pixels, which are not '
            f'resized: return {height} x {width}, or give their size by --height and --width'
        )
    return pixels.permute(0, 3, 1, 2)  # all of one size, so in order


def _render(
    images: Images,
    rows: Tensor,
    columns: Tensor,
    heights: tuple[int, ...],
    widths: tuple[int, ...],
    normalisation: Normalisation,
    interpolation: str,
) -> Tensor:
    """Resizes each image to all of `heights` and `widths`, keeps its `rows` (B, h) and `columns` (B, w), normalises."""
    device, height, width = rows.device, rows.shape[1], columns.shape[1]
    if mixed := len(images) > 1:
        order = torch.cat([positions for positions, _ in images]).to(device, non_blocking=True)  # (B,)
        rows, columns = rows[order], columns[order]
    scale, shift = _affine(normalisation, width, device)
    batch = torch.empty(len(rows), height, width, 3, device=device)  # (B, h, w, 3), one group after the other
    done, clamp = 0, interpolation == 'bicubic'  # which has negative weights
    for _, pixels in images:
        row_taps, row_weights = _taps(pixels.shape[1], heights, interpolation, device)
        column_taps, column_weights = _taps(pixels.shape[2], widths, interpolation, device)
        largest = max(pixels.shape[1], height) * max(pixels.shape[2], width)
        at_once = min(max(AT_ONCE[device.type] // largest, 1), len(pixels))
        work = torch.empty(3, at_once * largest * 3, dtype=torch.int32, device=device)
        for source in pixels.split(at_once):
            here = slice(done, done := done + len(source))
            column, row = columns[here], rows[here]  # (n, w), (n, h)
            source = _pass(
                source.transpose(1, 2), column_taps[:, column], column_weights[:, column], work, clamp
            )  # (n, w, H, 3)
            source = _pass(source.transpose(1, 2), row_taps[:, row], row_weights[:, row], work, clamp)  # (n, h, w, 3)
            ready = batch[here].copy_(source)
            torch.addcmul(shift, ready, scale, out=ready)
    if mixed:
        batch = torch.empty_like(batch).index_copy_(0, order, batch)
    return batch.permute(0, 3, 1, 2)  # (B, 3, h, w)


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
def _affine(normalisation: Normalisation, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Factor and addend for pixels 0..255, (w, 3) each, many times faster than broadcasting three numbers."""
    mean, std = torch.tensor(normalisation, dtype=torch.float64)  # (3,) each
    table = torch.stack([1 / (255 * std), -mean / std]).float()  # (2, 3)
    return tuple(table[:, None].expand(2, width, 3).contiguous().to(device))


@functools.lru_cache(maxsize=1024)
def _taps(source: int, targets: tuple[int, ...], interpolation: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """The coefficients of Pillow's resize of `source` pixels to each of `targets` pixels, concatenated.

    Returns the source pixels of each output pixel, int64 (K, sum(targets)), and their weights, int32 of the same shape,
    which add up to about 2^22. K is the largest number of source pixels; unused ones have weight 0.
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
    used = int(np.flatnonzero(weight.any(1))[-1]) + 1
    return torch.from_numpy(tap[:used]).to(device), torch.from_numpy(weight[:used]).to(device)
