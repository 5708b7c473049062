"""The precision of a device's products."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import RLock
from typing import Any

import torch

from runtime.errors import UserError

_SETTING = RLock()  # held by the thread that has changed the setting


def has_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 in hardware, and faster than float32.

    Intel's processors do so by AMX alone: with AVX512_BF16 ResNet50 trains 0.7 times as fast as in float32, on AMD's
    processors 1.8 to 2 times (benchmarks/backbones.py).
    """
    if device.type == 'cuda':
        return torch.cuda.get_device_capability(device) >= (8, 0)
    with contextlib.suppress(OSError):
        words = Path('/proc/cpuinfo').read_text(encoding='ascii', errors='replace').split()
        return 'amx_bf16' in words or ('avx512_bf16' in words and 'GenuineIntel' not in words)
    return False


def check_agreement(precision: str, stack: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Raise UserError, in all processes, if they have different precisions: `auto` chooses by the device of each.

    stack: stacks a tensor of every process
    """
    codes = ('fp32', 'tf32', 'bf16')
    different = sorted({codes[number] for number in stack(torch.tensor(codes.index(precision))).tolist()})
    if len(different) > 1:
        raise UserError(f'--precision auto chose {" and ".join(different)} on different devices: choose one of the two')


def allow_tf32(allowed: bool) -> None:
    """Allow or forbid rounding float32 products and convolutions to TF32, on GPUs that support it.

    Uses the older names: if any part is set through the newer `fp32_precision`, reading the older names raises.
    """
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed


@contextlib.contextmanager
def tf32(allowed: bool, convolutions: bool = True) -> Iterator[None]:
    """In this context float32 products, and with `convolutions` also convolutions, use TF32 or full precision.

    This is a setting of the whole process, which is restored at the end; other threads that want it wait until then.
    """
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    parts: list[Any] = [matmul, cudnn]
    settings: tuple[str, object] = ('allow_tf32', allowed)
    if hasattr(matmul, 'fp32_precision'):
        parts = [matmul, getattr(cudnn, 'conv')]  # noqa: B009  # not in torch's stubs
        settings = 'fp32_precision', 'tf32' if allowed else 'ieee'
    name, value = settings
    parts = parts[: 1 + convolutions]
    with _SETTING:
        before = [getattr(part, name) for part in parts]
        for part in parts:
            setattr(part, name, value)
        try:
            yield
        finally:
            for part, setting in zip(parts, before, strict=True):
                setattr(part, name, setting)


def without_tf32() -> contextlib.AbstractContextManager[None]:
    """In this context float32 products use full precision."""
    return tf32(False, convolutions=False)
