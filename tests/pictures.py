"""Small images on disk for the tests of reading and loading."""

from pathlib import Path

import numpy as np
from PIL import Image

SIZES = [(32, 16), (48, 20), (20, 30)]  # height, width


def noise(height: int, width: int, seed: int = 0) -> Image.Image:
    """Smooth enough to survive JPEG, different everywhere."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 3, 3), np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.BICUBIC)


def draw(folder: Path, ending: str, sizes: list[tuple[int, int]]) -> list[tuple[str, int, int]]:
    """Six identities with four images each, as items (path, pid, camid); image k has the size k modulo their number."""
    items = []
    for index in range(24):
        path = folder / f'{index}.{ending}'
        noise(*sizes[index % len(sizes)], seed=index).save(path)
        items.append((str(path), index // 4, index % 3))
    return items


def cut(path: Path) -> None:
    """Write the first half of a JPEG file."""
    noise(128, 64).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def in_order(groups: list) -> list:
    """The images (H, W, 3) of a batch, one by one in their places."""
    images = {}
    for positions, pixels in groups:
        assert pixels.shape[0] == len(positions) and pixels.shape[3] == 3
        images |= dict(zip(positions.tolist(), pixels, strict=True))
    assert sorted(images) == list(range(len(images)))
    return [images[place] for place in range(len(images))]
