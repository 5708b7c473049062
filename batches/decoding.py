"""Reads image files and rejects files that are not images."""

import os
import stat
import time

import numpy as np
from PIL import Image, UnidentifiedImageError

from files.kinds import PICTURES, recognised_file
from runtime.errors import Unreadable

FORMATS = ('JPEG', 'PNG', 'BMP', 'GIF', 'PPM', 'TIFF', 'WEBP')  # Pillow reads these without running another program
SUFFIXES = (  # of files in FORMATS, in lower case
    *('.jpg', '.jpeg', '.jpe', '.jfif', '.png', '.apng', '.bmp', '.gif'),
    *('.ppm', '.pgm', '.pbm', '.pnm', '.tif', '.tiff', '.webp'),
)
TRIES, PAUSE = 3, 0.1  # attempts to read an image; seconds between them, in which a network file system may recover


def read_image(path: str | os.PathLike) -> Image.Image:
    """An image file as RGB with 8 bits per channel, at its own size. Reading is tried three times.

    Grey, palette and CMYK images are converted; transparency is dropped; 16-bit channels are reduced to their upper 8
    bits, animations to their first frame. A rotation in EXIF is not applied: boxes refer to the pixels as stored.

    Raises:
        Unreadable: the file is missing, truncated, in none of FORMATS, has pixels of neither 8 nor 16 bits, or declares
            more pixels than Pillow considers safe (`PIL.Image.MAX_IMAGE_PIXELS`). The message names the path.
    """
    for attempt in range(TRIES):
        if attempt:
            time.sleep(PAUSE)
        try:
            return decode(path)
        except MemoryError:  # not the image's fault
            raise
        except Exception as error:  # Pillow's readers raise OSError, SyntaxError, ValueError, struct.error and more
            failure = error
    if isinstance(failure, UnidentifiedImageError):
        unknown = f'is not a {", ".join(FORMATS[:-1])} or {FORMATS[-1]} file'
        reason = f'it {recognised_file(path, *PICTURES) or unknown}'
    else:
        reason = getattr(failure, 'strerror', None) or str(failure) or type(failure).__name__
    raise Unreadable(' '.join(f'cannot read the image {os.fspath(path)}: {reason}'.splitlines())) from failure


def decode(path: str | os.PathLike) -> Image.Image:
    """The same, tried once; raises what Pillow raises."""
    if stat.S_ISFIFO(os.stat(path).st_mode):
        raise OSError('it is a pipe')  # opening it would block
    with Image.open(path, formats=FORMATS) as image:
        if image.width * image.height > (Image.MAX_IMAGE_PIXELS or 2**62):
            raise ValueError(f'it declares {image.width} x {image.height} pixels, like a decompression bomb')
        if image.mode == 'RGB':
            image.load()
            return image
        if image.mode == 'F':
            raise ValueError('its pixels are floating-point numbers')
        if not image.mode.startswith('I'):
            image.info.pop('transparency', None)  # of a palette; Pillow would warn that it is dropped
            return image.convert('RGB')
        grey = np.asarray(image)  # I;16 and similar modes, or 32 bits that hold 16; Pillow would clip them at 255
        if grey.min() < 0 or grey.max() >= 1 << 16:
            raise ValueError('its pixels have more than 16 bits')
        return Image.fromarray((grey >> 8).astype(np.uint8)).convert('RGB')
