"""Reading an image file, and refusing what is none."""

import os
import stat
import time

import numpy as np
from PIL import Image, UnidentifiedImageError

from runtime.errors import UserError

FORMATS = ('JPEG', 'PNG', 'BMP', 'GIF', 'PPM', 'TIFF', 'WEBP')  # none of them runs another program
TRIES, PAUSE = 3, 0.1  # of reading an image; seconds in between, in which a network file system may recover


def read_image(path: str | os.PathLike) -> Image.Image:
    """An image file as RGB with 8 bits a channel, at its own size. Reading is tried three times.

    Grey, palette and CMYK images are converted, transparency is dropped, of 16 bits a channel the upper 8 are kept, of
    an animation the first frame. A rotation in EXIF is not applied: boxes were drawn on the pixels as stored.

    Raises:
        UserError: the file is missing, none of FORMATS, truncated, holds numbers that are not pixels of 8 or 16 bits,
            or claims more pixels than Pillow considers safe (`PIL.Image.MAX_IMAGE_PIXELS`). It names the path.
    """
    for attempt in range(TRIES):
        if attempt:
            time.sleep(PAUSE)
        try:
            return _decode(path)
        except Exception as error:  # Pillow's readers raise OSError, SyntaxError, ValueError, struct.error and more
            failure = error
    if isinstance(failure, UnidentifiedImageError):
        reason = f'it is no {", ".join(FORMATS[:-1])} or {FORMATS[-1]} file'
    else:
        reason = getattr(failure, 'strerror', None) or str(failure) or type(failure).__name__
    raise UserError(' '.join(f'cannot read the image {os.fspath(path)}: {reason}'.splitlines())) from failure


def _decode(path: str | os.PathLike) -> Image.Image:
    if stat.S_ISFIFO(os.stat(path).st_mode):
        raise OSError('it is a pipe')  # opening it would wait for ever
    with Image.open(path, formats=FORMATS) as image:
        if image.width * image.height > (Image.MAX_IMAGE_PIXELS or 2**62):
            raise ValueError(f'it claims {image.width} x {image.height} pixels, as a decompression bomb does')
        if image.mode == 'RGB':
            image.load()
            return image
        if image.mode == 'F':
            raise ValueError('its pixels are floating-point numbers')
        if not image.mode.startswith('I'):
            return image.convert('RGB')
        grey = np.asarray(image)  # I;16 and its kin, or 32 bits that hold 16; Pillow would clip them at 255
        if grey.min() < 0 or grey.max() >= 1 << 16:
            raise ValueError('its pixels have more than 16 bits')
        return Image.fromarray((grey >> 8).astype(np.uint8)).convert('RGB')
