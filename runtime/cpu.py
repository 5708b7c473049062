"""What lets a process compute fast on the CPU."""

import contextlib
import ctypes
import os

import numpy as np
import torch

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


def tune() -> None:
    """Called before the first computation, because the threads that share it inherit the state of this one."""
    keep_memory()
    flush_subnormals()


def flush_subnormals() -> None:
    """Let this thread, and those that it starts from now on, compute with 0 in place of numbers below 1.2e-38.

    Weight decay makes the weights of unused channels that small, and some processors need many times as long for an
    operation on such a number.
    """
    for kind in (np.float16, np.float32, np.float64):
        np.finfo(kind)  # if it is called for the first time afterwards, numpy warns that the smallest number is 0
    torch.set_flush_denormal(True)


def keep_memory() -> None:
    """Let the process keep the memory that it frees, unless the user has tuned the allocator.

    By default the memory of each layer's activations is returned to the kernel, requested again, and cleared page by
    page, which takes a third of the time of an extraction on a CPU. If it is kept, training needs up to a sixth more
    memory. Blocks of more than 256 MB (features, caches) are still returned (before glibc 2.35, of more than 32 MB).
    """
    if any(name.startswith(('MALLOC_', 'GLIBC_TUNABLES')) for name in os.environ):
        return
    with contextlib.suppress(AttributeError):  # a C library other than glibc
        mallopt = ctypes.CDLL(None).mallopt
        if not mallopt(M_MMAP_THRESHOLD, 1 << 28):
            mallopt(M_MMAP_THRESHOLD, 1 << 25)
        mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)
