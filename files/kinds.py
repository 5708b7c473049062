"""Recognises files and folders that are passed by mistake: what each is, and what to do."""

import os
import re
from collections.abc import Iterable
from pathlib import Path

from runtime.errors import plain

HEAD = 512  # bytes of a file that are examined
TORCH = 'save model.state_dict() with torch.save in the program that wrote it'
EXPORTED = 'give the weights from which it was made; extract.py and search.py also take the ONNX files of export.py'

Kind = tuple[bytes, str, str]  # regular expression for the beginning; what the file is; what to do

DOWNLOADS: list[Kind] = [  # in place of any file
    (rb'version https://git-lfs', 'is a git-lfs pointer, not the file itself', 'run `git lfs pull` in its repository'),
    (
        rb'\s*(?:<!--.{,300}-->\s*)?<(?:!doctype\s+html|html|head)\b',
        'is an HTML page that was saved instead of the file',
        'open its link in a browser, and download the file itself',
    ),
    (rb'\s*<\?xml|<Error>', 'is an XML text, such as the error message of a download', 'download the file again'),
    (rb'\s*\{\s*"', 'is a JSON text', 'give the file that it describes'),
    (rb'\x1f\x8b', 'is compressed with gzip', 'unpack it with gunzip, or a .tar.gz with tar xzf'),
    (rb'BZh[1-9]', 'is compressed with bzip2', 'unpack it with bunzip2, or a .tar.bz2 with tar xjf'),
    (rb'\xfd7zXZ\x00', 'is compressed with xz', 'unpack it with unxz, or a .tar.xz with tar xJf'),
    (rb'\x28\xb5\x2f\xfd', 'is compressed with zstd', 'unpack it with unzstd'),
    (rb'.{257}ustar', 'is a tar archive', 'unpack it with tar xf, and give the file in it'),
    (rb'7z\xbc\xaf\x27\x1c', 'is a 7z archive', 'unpack it with 7z x, and give the file in it'),
    (rb'Rar!\x1a\x07', 'is a rar archive', 'unpack it with unrar x, and give the file in it'),
    (rb'%PDF', 'is a PDF document', 'give the file itself'),
    (rb'\x00\x05\x16\x07', 'is a metadata file of macOS (._NAME)', 'give the file itself, without ._'),
]
MODELS: list[Kind] = [  # in place of weights
    (
        rb'\x80[^\x02]',
        'is pickled with a protocol other than 2, the only one that PyTorch writes',
        'save it again, with torch.save(model.state_dict(), path)',
    ),
    (rb'\x89HDF\r\n\x1a\n', 'is an HDF5 file, such as Keras writes', 'give weights that PyTorch wrote'),
    (rb'.{4}TFL3', 'is a TensorFlow Lite model', 'give weights that PyTorch wrote'),
    (rb'\x08[\x03-\x14](?:\x12[\x01-\x40][\w. -]+|\x3a)', 'is an ONNX model, not weights', EXPORTED),
    (rb'GGUF', 'is a GGUF model', 'give weights that PyTorch wrote'),
    (rb'\x93NUMPY', 'is a NumPy array', 'give weights that PyTorch wrote'),
    (rb'MATLAB \d', 'is a .mat file of MATLAB', 'give weights that PyTorch wrote'),
]
PICTURES: list[Kind] = [  # in place of images in formats that are read
    (rb'.{4}ftyp(?:heic|heix|mif1|avif)', 'is a HEIC or AVIF image', 'convert it to JPEG or PNG'),
    (rb'\x00\x00\x00\x0cjP  |\xff\x4f\xff\x51', 'is a JPEG 2000 image', 'convert it to JPEG or PNG'),
    (rb'\s*(?:<\?xml.{,200}>\s*)?<svg', 'is an SVG drawing', 'convert it to JPEG or PNG'),
]
WEIGHTS = ('.pth', '.pt', '.pkl', '.tar', '.ckpt', '.bin', '.model', '.weights', '.safetensors')


def recognised(head: bytes, *kinds: Kind) -> str:
    """What a file with these first HEAD bytes is and what to do, as the end of a sentence; '' if unknown.

    kinds: tried before DOWNLOADS
    """
    for beginning, what, advice in (*kinds, *DOWNLOADS):
        if re.match(beginning, head, re.DOTALL | re.IGNORECASE):
            return f'{what}; {advice}'
    return ''


def recognised_file(path: str | os.PathLike, *kinds: Kind) -> str:
    """`recognised` of the first bytes of a file; '' if it cannot be read."""
    try:
        with open(path, 'rb') as file:
            return recognised(file.read(HEAD), *kinds)
    except OSError:
        return ''


def recognised_zip(names: Iterable[str]) -> str:
    """Like `recognised`, for a zip file with these records."""
    names = list(names)
    inner = {name.partition('/')[2] for name in names}
    if {'constants.pkl', 'data.pkl'} <= inner:
        return f'is a TorchScript program, not weights; {TORCH}'
    if 'archive_format' in inner or 'models/model.json' in inner or 'serialized_exported_program.json' in names:
        return f'is a program of torch.export (.pt2), not weights; {EXPORTED}'
    if '.data/extern_modules' in inner:
        return f'is a package of torch.package, not weights; {TORCH}'
    if 'model.weights.h5' in names:
        return 'is a Keras model; give weights that PyTorch wrote'
    if names and all(name.endswith('.npy') for name in names):
        return 'is a file of NumPy arrays (.npz); give weights that PyTorch wrote'
    if 'data.pkl' in inner:
        return ''
    held = [name for name in names if name.lower().endswith(WEIGHTS) and not name.startswith('__MACOSX/')]
    if held:
        return f'is a zip file that contains {plain(held[0])}; unpack it with unzip, and give that file'
    return ''


def not_a_file(path: str | os.PathLike) -> str:
    """Why an existing `path` is not a regular file, and what to give instead, as the end of a sentence; '' if it is."""
    place = Path(path)
    if os.path.isfile(place) or not os.path.exists(place):  # the methods of Path raise if the name is too long
        return ''
    if not place.is_dir():
        return 'is not a regular file; give the path of a checkpoint'
    try:
        files = [entry for entry in place.iterdir() if entry.name.lower().endswith(WEIGHTS) and entry.is_file()]
        if any(entry.name == 'data.pkl' for entry in (*files, *place.glob('*/data.pkl'))):
            return 'is a folder into which a checkpoint was unpacked; give the checkpoint itself, as it was downloaded'
        if files := [entry for entry in files if entry.name != 'best_model.pth.tar'] or files:
            newest = max(files, key=lambda entry: entry.stat().st_mtime_ns)
            return f'is a folder; the newest checkpoint in it is {plain(str(newest), 500)}'
    except OSError:
        pass
    return 'is a folder without checkpoints; give the path of a checkpoint'
