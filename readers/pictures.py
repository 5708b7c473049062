"""Properties of image files: whether they can be read, whether they are equal or similar, contrast and sharpness."""

import hashlib
import importlib.util
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import cache
from typing import NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from batches.decoding import read_image
from runtime.errors import ProcessLost, UserError

SIDE = 16  # of a perceptual hash, in bits
# Near-duplicates may differ in this number of SIDE * SIDE bits. When 120 images of Market1501 were saved as JPEG of
# quality 20, halved, brightened or cropped by a pixel, at most 34 bits changed; any two images of its training and test
# sets differ in at least 62.
ALIKE = 40
PAIRS_AT_ONCE = 2**24  # pairs of hashes compared at once; one float32 each is 64 MB
EMPTY = 4.0  # an image with a smaller standard deviation of grey values (0 to 255) shows nothing
HEIGHT = 128  # pixels; higher images, which are smoother, are reduced to it before sharpness is measured
BLURRED = 20.0  # an image with a smaller variance of the Laplacian is very blurred


class Look(NamedTuple):
    """The properties of an image. If it cannot be read, `reason` says why, and the rest is empty."""

    reason: str = ''
    digest: bytes = b''  # of the file's bytes
    bits: bytes = b''  # perceptual hash, SIDE * SIDE bits; b'' without the package imagehash
    contrast: float = np.inf  # standard deviation of grey values, 0 to 255
    sharpness: float = np.inf  # variance of the Laplacian of grey values


def look_at_all(paths: Sequence[str], jobs: int) -> Iterator[Look]:
    """`look` at each path, in order, in `jobs` processes; shows a progress bar on a terminal.

    Raises ProcessLost if one of these is killed.
    """
    pool = ProcessPoolExecutor(min(jobs, len(paths)))
    try:
        yield from tqdm(pool.map(look, paths, chunksize=64), total=len(paths), unit='image', leave=False, disable=None)
    except BrokenProcessPool as problem:
        why = 'a process that checks images was killed, probably because memory ran out: use a smaller -j'
        raise ProcessLost(why) from problem
    finally:
        pool.shutdown(cancel_futures=True)  # on an interruption, do not wait for the remaining images


def look(path: str) -> Look:
    """The properties of an image file; sharpness as in Pech-Pacheco et al., Diatom autofocusing, ICPR 2000."""
    try:
        os.stat(path)  # read_image would try three times to open a missing file
        image = read_image(path)
        with open(path, 'rb') as file:
            digest = hashlib.file_digest(file, 'sha1').digest()
    except OSError as error:
        return Look(f'cannot read the image {path}: {error.strerror}')
    except UserError as error:
        return Look(str(error))
    grey = image.convert('L')
    bits = b''
    if can_hash():
        from imagehash import phash

        bits = np.packbits(phash(grey, SIDE).hash).tobytes()
    if grey.height > HEIGHT:
        grey = grey.resize((max(1, round(grey.width * HEIGHT / grey.height)), HEIGHT), Image.Resampling.BOX)
    pixels = np.asarray(grey, np.float32)  # (H, W)
    return Look('', digest, bits, float(pixels.std()), sharpness(pixels))


def sharpness(pixels: np.ndarray) -> float:
    """The variance of the Laplacian (sum of the four neighbours minus four times the pixel) of grey values (H, W)."""
    if min(pixels.shape) < 3:
        return np.inf
    inner = pixels[1:-1, 1:-1]
    laplacian = pixels[:-2, 1:-1] + pixels[2:, 1:-1] + pixels[1:-1, :-2] + pixels[1:-1, 2:] - 4 * inner
    return float(laplacian.var())


@cache
def can_hash() -> bool:
    return importlib.util.find_spec('imagehash') is not None


def near_duplicates(one: Sequence[bytes], other: Sequence[bytes], most: int = ALIKE) -> Iterator[tuple[int, int, int]]:
    """(i, j, bits) of all pairs of hashes that differ in at most `most` bits, by i and j."""
    if not one or not other:
        return
    left, right = (_signs(hashes) for hashes in (one, other))  # (N, bits), (M, bits)
    step = max(1, PAIRS_AT_ONCE // len(right))
    for begin in range(0, len(left), step):
        differing = (left.shape[1] - left[begin : begin + step] @ right.T) / 2  # (step, M)
        for row, column in zip(*np.nonzero(differing <= most), strict=True):
            yield begin + int(row), int(column), int(differing[row, column])


def _signs(hashes: Sequence[bytes]) -> np.ndarray:
    """(N, bits) float32 of 1 and -1; the product of two rows counts equal bits minus different ones."""
    packed = np.frombuffer(b''.join(hashes), np.uint8).reshape(len(hashes), -1)
    return np.unpackbits(packed, axis=1).astype(np.float32) * 2 - 1
