"""Reads and writes the safetensors format: a JSON header, then the tensors' bytes.

The header of an untrusted file is checked before anything is allocated: every tensor must have a known type and exactly
the number of bytes of its shape; tensors must not overlap, and must fill the file. The format: the length of the
header, 8 bytes, little-endian; the header, {name: {dtype, shape, data_offsets}}, with strings under `__metadata__`; the
bytes.
"""

import json
import math
import os
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from runtime.errors import UserError, plain

KIND = 'a safetensors file'
BEGINNING = re.compile(rb'.{5}\x00\x00\x00\{', re.DOTALL)
LONGEST_HEADER = 100_000_000  # bytes of a header, the limit of the library safetensors
MOST_TENSORS = 100_000  # tensors; DenseNet121 has 727
DTYPES = {
    'F64': torch.float64, 'F32': torch.float32, 'F16': torch.float16, 'BF16': torch.bfloat16, 'I64': torch.int64,
    'I32': torch.int32, 'I16': torch.int16, 'I8': torch.int8, 'U8': torch.uint8, 'BOOL': torch.bool,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}


def recognised(path: str | os.PathLike) -> bool:
    """Whether a file begins like one of this format; False if it cannot be opened."""
    try:
        if not os.path.isfile(path):  # opening a pipe would block
            return False
        with open(path, 'rb') as file:
            return BEGINNING.match(file.read(9)) is not None
    except OSError:
        return False


def load(path: str | os.PathLike) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata.

    Raises:
        UserError: the file cannot be read, is damaged or truncated, or its header does not fit its contents.
    """
    where = plain(os.fspath(path), 500)
    try:
        size = os.path.getsize(path)
        with open(path, 'rb') as file:
            (length,) = struct.unpack('<Q', file.read(8))
            if length > min(LONGEST_HEADER, size - 8):
                raise ValueError(f'its header would have {length} bytes, and the file has {size}')
            entries, metadata = _header(file.read(length))
            _check_places(entries, size - 8 - length)
            data = bytearray(size - 8 - length)
            if file.readinto(data) != len(data) or file.read(1):
                raise ValueError('its size has changed')
        return {name: _tensor(entry, data) for name, entry in entries.items()}, metadata
    except OSError as error:
        raise UserError(f'{where} cannot be read ({error.strerror}); give the path of a checkpoint') from error
    except Exception as error:  # untrusted bytes may cause any exception
        reason = plain(str(error)) or type(error).__name__
        raise UserError(f'{where} is a damaged or truncated safetensors file ({reason}); get the file again') from error


ENTRY = 'deep-person-reid'  # the entry of the metadata in files of this project


def contents(metadata: Mapping[str, str]) -> dict[str, Any]:
    """From a file of this project, the checkpoint without its weights; from any other file, its licence if given."""
    names = [metadata[name] for name in ('licence', 'license') if name in metadata]
    licence = {'licence': names[0]} if names else {}
    try:
        held = json.loads(metadata.get(ENTRY, '{}'))
    except (ValueError, RecursionError):
        held = {}
    return {**licence, **(held if isinstance(held, dict) else {})}


def metadata(contents: Mapping[str, Any]) -> dict[str, str]:
    """A checkpoint without its weights (numbers, strings and plain containers) as metadata."""
    return {'format': 'pt', ENTRY: json.dumps(contents, default=str)}


def _header(text: bytes) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    header = json.loads(text.decode(), object_pairs_hook=_once)
    if not isinstance(header, dict):
        raise ValueError('its header is not a table')
    metadata = header.pop('__metadata__', {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError('its metadata are not strings')
    if len(header) > MOST_TENSORS:
        raise ValueError(f'it has {len(header)} tensors')
    return header, metadata


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        raise ValueError('its header contains a name twice')
    return table


def _check_places(entries: Mapping[str, Any], size: int) -> None:
    """Raise ValueError unless the tensors fill `size` bytes without gaps or overlaps."""
    places = []
    for name, entry in entries.items():
        if not isinstance(entry, dict) or set(entry) != {'dtype', 'shape', 'data_offsets'}:
            raise ValueError(f'its tensor {plain(name)} is not described by dtype, shape and data_offsets')
        dtype, shape, place = entry['dtype'], entry['shape'], entry['data_offsets']
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise ValueError(f'its tensor {plain(name)} has the unknown type {plain(str(dtype))}')
        if not (_are_sizes(shape) and _are_sizes(place) and len(place) == 2 and len(shape) <= 8):
            raise ValueError(f'its tensor {plain(name)} has an invalid shape or position')
        if place[1] - place[0] != math.prod(shape) * DTYPES[dtype].itemsize:
            raise ValueError(f'its tensor {plain(name)} has a size that does not match its shape')
        places.append(place)
    end = 0
    for begin, after in sorted(places):
        if begin != end:
            raise ValueError('its tensors overlap or leave bytes between them')
        end = after
    if end != size:
        raise ValueError(f'its tensors need {end} bytes, and it has {size}')


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**48 for value in values)


def _tensor(entry: Mapping[str, Any], data: bytearray) -> Tensor:
    dtype, shape, (begin, end) = DTYPES[entry['dtype']], entry['shape'], entry['data_offsets']
    if begin == end:
        return torch.empty(shape, dtype=dtype)
    piece = data[begin:end]  # a copy, which is aligned
    if dtype == torch.bool and max(piece) > 1:
        raise ValueError('it has boolean values other than 0 and 1')
    return torch.frombuffer(piece, dtype=dtype).view(shape)


def save(path: str | os.PathLike, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors and metadata, tensors with the largest elements first, so all are aligned. Raises OSError."""
    ordered = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {'__metadata__': dict(metadata)}
    end = 0
    for name in ordered:
        tensor = tensors[name]
        place = [end, end + tensor.numel() * tensor.element_size()]
        header[name] = {'dtype': NAMES[tensor.dtype], 'shape': list(tensor.shape), 'data_offsets': place}
        end = place[1]
    text = json.dumps(header).encode()
    text += b' ' * (-len(text) % 8)
    with open(Path(path), 'wb') as file:
        file.write(struct.pack('<Q', len(text)) + text)
        for name in ordered:
            file.write(tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
