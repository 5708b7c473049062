"""The precision in which a device multiplies."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch


def has_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 in hardware."""
    if device.type == 'cuda':
        return torch.cuda.get_device_capability(device) >= (8, 0)
    with contextlib.suppress(OSError):
        flags = Path('/proc/cpuinfo').read_text(encoding='ascii', errors='replace').split()
        return 'avx512_bf16' in flags or 'amx_bf16' in flags
    return False


def allow_tf32(allowed: bool) -> None:
    """Allow or forbid rounding float32 products and convolutions to TF32, on GPUs that support it.

    The older names are used: if a part is set by the newer `fp32_precision`, torch raises when it reads the older ones.
    """
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed


@contextlib.contextmanager
def without_tf32() -> Iterator[None]:
    """float32 products in full precision, whatever is allowed otherwise."""
    matmul = torch.backends.cuda.matmul
    name, off = ('fp32_precision', 'ieee') if hasattr(matmul, 'fp32_precision') else ('allow_tf32', False)
    before = getattr(matmul, name)
    setattr(matmul, name, off)
    try:
        yield
    finally:
        setattr(matmul, name, before)
