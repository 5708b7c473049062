"""Batches on their way from host memory to the device."""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import default_collate

from runtime.caching import Resident
from runtime.workers import Block, Group

Arrived = tuple[list[Group], Tensor, list[int], list[Any]]  # images, pids (b,), images of each item, more


def arrivals(
    blocks: Iterable[Block | Resident], device: torch.device, stream: torch.cuda.Stream | None
) -> Iterator[Arrived]:
    """The blocks of an epoch, one by one, on the device. A GPU is sent the next one while it computes with this one.

    Args:
        stream: of a GPU, for the copies.
    """
    sent = (_send(block, device, stream) for block in blocks)
    if stream is None:
        yield from sent
        return
    coming = next(sent, None)
    while coming is not None:
        computing = torch.cuda.current_stream(device)
        computing.wait_stream(stream)
        for tensor in _tensors(coming):
            tensor.record_stream(computing)  # its memory is not used again before the computation has ended
        arrived, coming = coming, next(sent, None)
        yield arrived


def _send(block: Block | Resident, device: torch.device, stream: torch.cuda.Stream | None) -> Arrived:
    pin = stream is not None
    with torch.cuda.stream(stream) if stream else contextlib.nullcontext():  # torch's own of None starts CUDA
        images = block.images(device)
        pids = torch.tensor(block.pids, pin_memory=pin).to(device, non_blocking=True)
        more = default_collate(block.more) if any(block.more) else []
        return images, pids, block.counts, [_moved(part, device, pin) for part in more]


def _moved(value: Any, device: torch.device, pin: bool) -> Any:
    """Collated values with every tensor in them on the device."""
    match value:
        case Tensor():
            return (value.pin_memory() if pin else value).to(device, non_blocking=True)
        case dict():
            return {key: _moved(part, device, pin) for key, part in value.items()}
        case list() | tuple():
            return [_moved(part, device, pin) for part in value]
    return value


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors of the device in a batch."""
    match value:
        case Tensor():
            if value.is_cuda:
                yield value
        case dict():
            for part in value.values():
                yield from _tensors(part)
        case list() | tuple():
            for part in value:
                yield from _tensors(part)
