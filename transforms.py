"""Training augmentation and test preparation of the pixels of a whole uint8 batch, on its device.

Both use Pillow's bilinear or bicubic resize. The preparation, and on a GPU also the augmentation, reproduces Pillow's
arithmetic (`batches/resizing.py`). On a CPU the augmentation uses torch's resize, whose interpolation weights have 15
bits. It is twice as fast; most pixels are equal, and the others differ by at most 2/255.

Images arrive as groups of equal size, a list of (positions in the batch int64 (n,), pixels uint8 (n, H, W, 3)), which
together form a batch of B. Images of one size form one group, in order.
"""

import random

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms import Compose, Normalize, RandomHorizontalFlip, Resize, ToTensor

from batches.resizing import Images, Normalisation, affine, render
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
    random_erasing: probability of filling a rectangle of an image with the mean of the normalisation, see `erased`
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
        augmented = self._on_cpu if device.type == 'cpu' else self._by_index
        batch = augmented(images, enlarge, top, left, mirror)
        if self.random_erasing:
            rectangles = erased(draws[:, 4:], self.height, self.width, self.random_erasing)  # (B, h, w)
            batch.masked_fill_(rectangles[:, None], 0)  # the mean, after normalisation
        return batch

    def _by_index(self, images: Images, enlarge: Tensor, top: Tensor, left: Tensor, mirror: Tensor) -> Tensor:
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
        batch = render(images, rows, columns, self.heights, self.widths, self.normalisation, self.interpolation)
        if outside is not None:
            batch = torch.where(outside[:, None], self._black(batch.device), batch)
        return batch

    def _on_cpu(self, images: Images, enlarge: Tensor, top: Tensor, left: Tensor, mirror: Tensor) -> Tensor:
        """torch's uint8 resize, image by image, so that an image is still in the cache when it is normalised."""
        scale, shift = affine(self.normalisation, self.width, enlarge.device)
        batch = torch.empty(len(enlarge), self.height, self.width, 3, dtype=torch.float32)  # (B, h, w, 3)
        crops = list(zip(top.tolist(), left.tolist(), mirror.tolist(), strict=True))
        for positions, pixels in images:
            for enlarged, size in enumerate(zip(self.heights, self.widths, strict=True)):
                chosen = (enlarge[positions] == enlarged).nonzero()[:, 0]  # (n,)
                if not len(chosen):
                    continue
                source = pixels[chosen].permute(0, 3, 1, 2)  # (n, 3, H, W)
                resized = F.interpolate(source, size, mode=self.interpolation, antialias=True).permute(0, 2, 3, 1)
                for image, place in zip(resized, positions[chosen].tolist(), strict=True):
                    y, x, mirrored = crops[place]  # y and x are negative in the padding
                    if self.padding:
                        image = F.pad(image, (0, 0, *2 * (self.padding,), *2 * (self.padding,)))
                        y, x = y + self.padding, x + self.padding
                    image = image[y:, x:][: self.height, : self.width]
                    ready = batch[place].copy_(image.flip(1) if mirrored else image)  # (h, w, 3)
                    torch.addcmul(shift, ready, scale, out=ready)
        return batch.permute(0, 3, 1, 2)  # (B, 3, h, w)

    def _black(self, device: torch.device) -> Tensor:
        """(3, 1, 1): a normalised black pixel."""
        return affine(self.normalisation, 1, device)[1][0][:, None, None]


RECTANGLES = 8  # sizes drawn for an image; the first that fits is used. At 2:1, none fits in one of 10^10 images
DRAWS_OF_ERASING = 3 + 2 * RECTANGLES


def erased(draws: Tensor, height: int, width: int, p: float) -> Tensor:
    """Random erasing: a mask with the rectangle to erase in each image, bool (B, height, width).

    Zhong et al., Random Erasing Data Augmentation, AAAI 2020, arXiv:1708.04896: with probability p, a rectangle of 2 to
    40% of the area with an aspect (height / width) of 0.3 to 1 / 0.3, both uniform, at a uniform position. As in the
    published code, sizes are drawn until one is smaller than the image, and then a position; the paper draws both
    together until the rectangle fits, and fills it with random values.

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
        return render(images, rows, columns, (self.height,), (self.width,), self.normalisation, self.interpolation)


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
