"""Images in the forms that callers pass, and the image files named by command-line arguments."""

import glob
import os
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from batches.decoding import SUFFIXES, read_image
from readers.tree import natural
from runtime.errors import Unreadable, UserError, plain


def listed(images: Any) -> Sequence[Any]:
    """One image, or several, as a list."""
    if isinstance(images, np.ndarray | Tensor):
        return list(images) if images.ndim == 4 else [images]
    if isinstance(images, str | os.PathLike | Image.Image):
        return [images]
    try:
        several = iter(images)
    except TypeError:  # `pixels_of` reports its type
        return [images]
    return list(several)


def pixels_of(image: Any, bgr: bool, where: str) -> Tensor:
    """An image in any of the forms that FeatureExtractor accepts -> uint8 (3, H, W), RGB.

    Raises:
        UserError: its form is not one of these, or it cannot be read. `where` is its name in the message.
    """
    if isinstance(image, str | os.PathLike):
        image = read_image(image)
    if isinstance(image, Image.Image):
        if image.mode.startswith(('I', 'F')):
            raise UserError(f'{where} has pixels of more than 8 bits ({image.mode}): convert it to RGB')
        try:
            image, bgr = np.array(image if image.mode == 'RGB' else image.convert('RGB')), False
        except MemoryError:  # not the image's fault
            raise
        except Exception as problem:  # of any type: it is decoded only now
            raise Unreadable(f'{where} cannot be read: {plain(str(problem))}') from problem
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
            raise UserError(f'{where} is an array of {image.dtype} {image.shape}: give uint8 (H, W, 3)')
        image = np.ascontiguousarray(image[..., ::-1] if bgr else image)
        return torch.from_numpy(image if image.flags.writeable else image.copy()).permute(2, 0, 1)
    if not isinstance(image, Tensor):
        raise UserError(f'{where} is a {type(image).__name__}: give a path, a PIL image, an array or a tensor')
    pixels, kind = image.detach().cpu(), f'{str(image.dtype).removeprefix("torch.")} {tuple(image.shape)}'
    if pixels.ndim != 3 or len(pixels) != 3 or not pixels.numel():
        raise UserError(f'{where} is a tensor of {kind}: give (3, H, W)')
    if pixels.is_floating_point():
        if not bool(((pixels >= 0) & (pixels <= 1)).all()):
            raise UserError(f'{where} has values that are not from 0 to 1: give RGB that is not normalised')
        pixels = (pixels.float() * 255).round().to(torch.uint8)
    if pixels.dtype != torch.uint8:
        raise UserError(f'{where} is a tensor of {kind}: give uint8, or floating-point numbers from 0 to 1')
    return pixels.flip(0) if bgr else pixels


def cut(frame: Tensor, boxes: Any) -> list[Tensor]:
    """Cut the boxes (N, 4 or more: left, top, right, bottom) out of a frame (3, H, W): uint8 (3, h, w) each.

    Raises:
        UserError: the boxes have a different shape, or some are empty or lie outside the frame.
    """
    try:
        array = np.asarray(boxes.detach().cpu().double() if isinstance(boxes, Tensor) else _rows(boxes), np.float64)
    except (TypeError, ValueError) as problem:
        raise UserError(
            f'boxes are not numbers in rows of equal length ({plain(str(problem))}): give (N, 4)'
        ) from problem
    if not array.size:
        return []
    if array.ndim != 2 or array.shape[1] < 4:
        raise UserError(f'boxes have the shape {array.shape}: give (N, 4), left, top, right and bottom in pixels')
    _, height, width = frame.shape
    edges = array[:, :4].round().clip(0, [width, height, width, height])  # (N, 4)
    left, top, right, bottom = edges.T  # (N,) each
    empty = np.flatnonzero(~((left < right) & (top < bottom)))  # including those with NaN
    if len(empty):
        rows = ', '.join(map(str, empty[:10].tolist())) + (' ...' if len(empty) > 10 else '')
        raise UserError(
            f'{len(empty)} of {len(array)} boxes are empty or outside the frame of {width} x {height} pixels: rows '
            f'{rows}; leave them out'
        )
    return [frame[:, top:bottom, left:right] for left, top, right, bottom in edges.astype(np.int64).tolist()]


def _rows(boxes: Any) -> Any:
    """An iterator as a list; rows may be tensors on a device."""
    if hasattr(boxes, '__array__'):
        return boxes
    return [row.tolist() if isinstance(row, Tensor) else row for row in boxes]


IMAGES_HELP = "files, folders, patterns such as 'cam*/*.jpg', or - for a list on stdin"  # as `files_of` reads them


def files_of(names: Sequence[str]) -> list[str]:
    """The image files named by arguments: files, folders searched recursively, patterns, or - for a list on stdin.

    Files are sorted within each folder and pattern, and listed once; hidden files and folders are skipped, and symbolic
    links are followed.

    Raises:
        UserError: an argument names no image.
    """
    found: dict[str, None] = {}
    for name in names:
        some = _lines() if name == '-' else _matching(name)
        files = [file for path in some for file in (_below(path) if os.path.isdir(path) else [path])]
        if not files:
            raise UserError(f'{plain(name, 500)}: no images found; give files, folders, a pattern, or - for stdin')
        found.update(dict.fromkeys(files))
    return list(found)


def folders_of(names: Sequence[str]) -> list[str]:
    """The folders named by arguments, directly or by a pattern; folders in a list on stdin are not included."""
    return [path for name in names if name != '-' for path in _matching(name) if os.path.isdir(path)]


def _matching(name: str) -> list[str]:
    """`name` itself if it exists, otherwise the paths that it matches as a pattern."""
    return [name] if os.path.exists(name) else sorted(glob.glob(name, recursive=True))


def _lines() -> list[str]:
    """The paths on stdin: one per line, or separated by NULs, as written by find -print0."""
    data = sys.stdin.buffer.read()
    if b'\0' not in data:
        data = data.replace(b'\r\n', b'\n').replace(b'\n', b'\0')  # a list from Windows, too
    return [os.fsdecode(line) for line in data.split(b'\0') if line]


def _below(folder: str) -> list[str]:
    files, seen = list[str](), set[str]()
    for place, folders, names in os.walk(folder, onerror=_passed_over, followlinks=True):
        if (real := os.path.realpath(place)) in seen:  # links may lead in a circle
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith('.'))
        images = (name for name in sorted(names) if name.lower().endswith(SUFFIXES) and not name.startswith('.'))
        files += [os.path.join(place, name) for name in images]
    return files


def _passed_over(problem: OSError) -> None:
    """A private folder is left out, which is printed; from one that fails images would be missing: UserError."""
    where = plain(os.fsdecode(problem.filename), 500)
    if not isinstance(problem, PermissionError):
        raise UserError(f'{where} cannot be read ({problem.strerror}); try again, or leave it out') from problem
    print(f'Left out: {where} ({problem.strerror})', file=sys.stderr)


def tracklets_of(files: Sequence[str]) -> list[tuple[str, ...]]:
    """Group files into one tracklet per folder, its frames in natural order of their names: f2 before f10."""
    folders: dict[str, list[str]] = {}
    for file in files:
        folders.setdefault(os.path.dirname(file), []).append(file)
    return [tuple(sorted(frames, key=natural)) for frames in folders.values()]
