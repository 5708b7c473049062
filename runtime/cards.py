"""Checks whether this build of PyTorch can use the machine's GPUs, and if not, why."""

import contextlib
import os
import re
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch

from runtime.errors import UserError, plain

DEVICES = Path('/dev')  # where NVIDIA's driver creates its devices
DRIVER = Path('/proc/driver/nvidia/version')


def available() -> bool:
    """Whether CUDA can be used.

    Raises:
        UserError: there is a visible NVIDIA GPU, but its driver does not work with this PyTorch.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        usable = torch.cuda.is_available()
    if usable or not torch.version.cuda or _are_hidden() or not _has_driver(bool(caught)):
        for each in caught:
            warnings.warn_explicit(each.message, each.category, each.filename, each.lineno)
        return usable
    text = plain(str(caught[0].message), 500).removeprefix('CUDA initialization: ') if caught else ''
    why = f' ({text.partition(". ")[0].rstrip(".")})' if text else ''
    raise UserError(
        f'the driver of the GPU{_driver()} does not work with PyTorch {torch.__version__}, which is built for CUDA '
        f'{torch.version.cuda}{why}; update the driver, install a build for an older CUDA, or pass --use-cpu'
    )


def _has_driver(failed: bool) -> bool:
    """Whether NVIDIA's driver is loaded and this container has a GPU, which may be any, such as the fourth.

    A container without a GPU may have the control device too, but in that case initialising CUDA has not `failed`.
    """
    return any(DEVICES.glob('nvidia[0-9]*')) or (failed and (DEVICES / 'nvidiactl').exists())


def _are_hidden() -> bool:
    """Whether CUDA_VISIBLE_DEVICES hides all devices: CUDA reads it up to the first invalid entry."""
    first = os.environ.get('CUDA_VISIBLE_DEVICES', '0').split(',')[0].strip()
    return not re.match(r'\d|GPU-|MIG-', first)


def _driver() -> str:
    """The driver's version, such as ' 535.104.05'; '' if unknown."""
    try:
        text = DRIVER.read_text(encoding='ascii', errors='replace')
    except OSError:
        return ''
    version = re.search(r'\b\d+(?:\.\d+)+\b', text)
    return f', {version[0]},' if version else ''


def check(device: torch.device) -> None:
    """Check that this PyTorch has kernels for a CUDA device, and that the device responds.

    Raises:
        UserError: it has no kernels, or the device cannot be used.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # torch's own warnings about this are many lines long
            capability = torch.cuda.get_device_capability(device)
            name = torch.cuda.get_device_name(device)
    except RuntimeError as problem:  # used exclusively by another process, or failed
        raise UserError(
            f'GPU {device.index} cannot be used ({plain(str(problem))}); choose another with --gpu-devices, or pass '
            f'--use-cpu'
        ) from problem
    if torch.version.cuda and not has_kernels(capability, built := torch.cuda.get_arch_list()):
        raise UserError(
            f'PyTorch {torch.__version__} has no kernels for GPU {device.index}, {name}, of compute capability '
            f'{capability[0]}.{capability[1]}: it is built for {", ".join(built)}; install another build, choose '
            f'another GPU with --gpu-devices, or pass --use-cpu'
        )


def has_kernels(capability: tuple[int, int], built: Sequence[str]) -> bool:
    """Whether code built for architectures such as sm_80 or compute_90 runs on a device of this compute capability.

    Binaries (sm) run on devices of the same major and at least the same minor number, and PTX (compute) also on all
    newer ones. With the suffix a, code runs on exactly this device, and with f on its family, of the same major number
    (NVIDIA, CUDA C++ Programming Guide, Compute Capability). An architecture of another form counts as suitable.
    """
    for name in built:
        parts = re.fullmatch(r'(sm|compute)_(\d+)(\d)([af]?)', name)
        if not parts:
            return True
        built_for, suffix = (int(parts[2]), int(parts[3])), parts[4]
        newest = built_for if suffix == 'a' else (built_for[0], 9) if parts[1] == 'sm' or suffix == 'f' else (99, 9)
        if built_for <= capability <= newest:
            return True
    return not built


def unsupported() -> str:
    """The kind of an accelerator of this machine that is neither CUDA nor ROCm, such as mps or xpu; '' if none."""
    if torch.backends.mps.is_available():
        return 'mps'
    with contextlib.suppress(RuntimeError):  # torch 2.6 raises where later versions return None
        device = torch.accelerator.current_accelerator()  # of those that PyTorch was built for
        if device and device.type != 'cuda' and torch.accelerator.is_available():
            return device.type
    return ''
