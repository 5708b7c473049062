"""A network as one graph from pixels to features, for other programs; it resizes images of any size.

The resize is Pillow's, as in `transforms`: weights of 22 bits, the horizontal pass first, each pass rounded to 8 bits.
Here a pass is a product with a matrix that is computed from the size of the images, and every operation is one that
other runtimes have. Weights are split into halves of 11 bits. Sums of these halves times 8-bit pixels are integers
below 2^24, which float32 represents exactly, so pixels equal those of `transforms` bit for bit. (If an output pixel has
more than 32 source pixels, the sum of the lower halves may be rounded, by far less than could change a pixel.)
"""

import torch
from torch import Tensor, nn

from models.network import Network, embed

HALF = 1 << 11  # two halves of 11 bits are the 22 bits of Pillow's weights


class Graph(nn.Module):
    """uint8 images (B, H, W, 3), RGB, all of one arbitrary size -> features (B, D), float32, as the test uses them.

    flip_test: average the features of an image and its mirror image
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, network: Network, height: int, width: int, interpolation: str, flip_test: bool = False):
        super().__init__()
        self.network = network.eval().to(memory_format=torch.contiguous_format)  # otherwise torch.export.save warns
        self.height, self.width = height, width
        self.interpolation, self.flip_test = interpolation, flip_test
        mean, std = torch.tensor(network.normalisation, dtype=torch.float64)[:, :, None, None]  # (3, 1, 1) each
        self.register_buffer('scale', (1 / (255 * std)).float())
        self.register_buffer('shift', (-mean / std).float())

    def forward(self, images: Tensor) -> Tensor:
        pixels = images.permute(0, 3, 1, 2).float()  # (B, 3, H, W)
        columns = halves(images.size(2), self.width, self.interpolation)  # (2 * w, W)
        pixels = rounded(*(pixels @ columns.T).chunk(2, dim=3))  # (B, 3, H, w)
        rows = halves(images.size(1), self.height, self.interpolation)  # (2 * h, H)
        pixels = rounded(*(rows @ pixels).chunk(2, dim=2))  # (B, 3, h, w)
        batch = (pixels * self.scale + self.shift).contiguous(memory_format=torch.channels_last)
        return embed(self.network, batch, self.flip_test)  # (B, D)


def halves(source: int, target: int, interpolation: str) -> Tensor:
    """Weights of `source` pixels in each of `target` pixels, upper and lower halves: (2 * target, source), float32.

    Row t is the upper half of the weights of output pixel t, row target + t the lower one, which is not negative.
    """
    centers = 2 * torch.arange(source) + 1  # (S,) of the source pixels, in half pixels
    places = (2 * torch.arange(target) + 1)[:, None]  # (T, 1)
    apart = (centers * target - places * source).abs()  # (T, S) integers, exact also in runtimes without float64
    stretch = (centers[-1:] + 1).clamp(min=2 * target)  # (1,) the kernel is not narrowed when an image is enlarged
    x = apart.double() / stretch.double()  # (T, S)
    weights = (1 - x).clamp(min=0) if interpolation == 'bilinear' else cubic(x)
    weights = (weights / weights.sum(1, keepdim=True) * HALF**2 + 0.5).floor()  # (T, S) whole numbers of 22 bits
    upper = (weights / HALF).floor()
    return torch.cat((upper, weights - upper * HALF)).float()


def cubic(x: Tensor) -> Tensor:
    """The cubic convolution kernel with a = -0.5 (Keys, 1981) at distances x >= 0, factorised."""
    return (1 - x) * torch.where(x < 1, 2 + 2 * x - 3 * x * x, (2 - x).clamp(min=0) ** 2)


def rounded(upper: Tensor, lower: Tensor) -> Tensor:
    """Sums of products with the two halves of the weights -> integer pixels 0..255, rounded as Pillow does."""
    total = upper + (lower / HALF).floor()  # the remainder of the lower half cannot change the pixel
    return ((total + HALF / 2) / HALF).floor().clamp(0, 255)
