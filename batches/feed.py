"""Copies batches from host memory to the device."""

import contextlib
import time
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import default_collate

from batches.caching import Resident
from batches.workers import Block, SizeGroup

Arrived = tuple[list[SizeGroup], Tensor, list[int], list[Any]]  # images, pids (b,), images of each item, more


class Feed:
    """The blocks of an epoch, one by one, on the device. On a GPU the next one is copied while this one is processed.

    `waited`: seconds spent waiting for blocks, excluding the first one
    """

    def __init__(self, blocks: Iterable[Block | Resident], device: torch.device, stream: 'torch.cuda.Stream | None'):
        self.blocks, self.device, self.stream = iter(blocks), device, stream
        self.waited, self.requested = 0.0, 0  # blocks requested; the first one waits for the workers to start
        self.coming = self._send() if stream else None

    def __iter__(self) -> 'Feed':
        return self

    def __next__(self) -> Arrived:
        arrived = self.coming if self.stream else self._send()
        if arrived is None:
            raise StopIteration
        if self.stream:
            computing = torch.cuda.current_stream(self.device)
            computing.wait_stream(self.stream)
            for tensor in _tensors(arrived):
                tensor.record_stream(computing)  # its memory must not be reused before the computation has ended
            self.coming = self._send()
        return arrived

    def _send(self) -> Arrived | None:
        began = time.perf_counter()
        block = next(self.blocks, None)
        self.waited += time.perf_counter() - began if self.requested else 0
        self.requested += 1
        if block is None:
            return None
        pin = self.stream is not None
        with torch.cuda.stream(self.stream) if self.stream else contextlib.nullcontext():  # torch's own starts CUDA
            images = block.images(self.device)
            more = default_collate(block.more) if any(block.more) else []
            pids, *more = (_moved(part, self.device, pin) for part in (torch.tensor(block.pids), *more))
            return images, pids, block.counts, more


def _moved(value: Any, device: torch.device, pin: bool) -> Any:
    """The collated values, with all their tensors on the device."""
    match value:
        case Tensor():
            return (value.pin_memory() if pin else value).to(device, non_blocking=True)
        case dict():
            return {key: _moved(part, device, pin) for key, part in value.items()}
        case list() | tuple():
            return [_moved(part, device, pin) for part in value]
    return value


def _tensors(value: Any) -> Iterator[Tensor]:
    """All tensors on the device in a batch."""
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
