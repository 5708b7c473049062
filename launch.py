"""Processes and devices: an experiment is started here and runs on what the machine has.

The only room that knows which device is used, in which precision, and that there could be more than one process.
"""

import contextlib
import datetime
import random
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from errors import UserError
from utils import Logger

NARROWEST_BF16 = 33  # pixels; below, the CPU's bf16 convolution of ResNet50's last stage returns garbage


def main(experiment: Callable, parser) -> None:
    """Run `experiment(args)` with the arguments of the command line, under a log file in `--save-dir`.

    A mistake of the user (`UserError`) is one line on stderr and exit status 2; a fault of ours keeps its traceback and
    exits with 1. Both stand in the log.
    """
    args = parser.parse_args()
    started = time.time()
    with Logger(Path(args.save_dir) / ('log_test.txt' if args.evaluate else 'log_train.txt')) as log:
        print(f'==========\nArgs:{args.plain()}\n==========')
        try:
            experiment(args)
        except UserError as mistake:
            status, text = 2, f'error: {mistake}\n'
        except Exception:
            status, text = 1, traceback.format_exc()
        else:
            elapsed = datetime.timedelta(seconds=round(time.time() - started))
            print(f'Finished. Total elapsed time (h:m:s): {elapsed}')
            return
        log.flush()
        log.file.write(text)
        sys.stderr.write(text)
    sys.exit(status)


@dataclass(frozen=True)
class Run:
    """Where and how an experiment runs. `rank` of `world_size` processes; the first one prints and writes."""

    device: torch.device
    precision: str  # of training: fp32, tf32 or bf16
    test_precision: str  # of extraction: fp32 unless another one was asked for, so that published figures come out
    seed: int
    compiled: bool = False
    rank: int = 0
    world_size: int = 1

    @contextlib.contextmanager
    def autocast(self, testing: bool = False) -> Iterator[None]:
        """bfloat16 around the model call, where it is this run's precision. Weights stay float32."""
        precision = self.test_precision if testing else self.precision
        with torch.autocast(self.device.type, torch.bfloat16, enabled=precision == 'bf16'):
            yield

    def place(self, module: nn.Module) -> nn.Module:
        """`module` on the device, channels last in memory: the layout in which convolutions are fastest."""
        return module.to(self.device, memory_format=torch.channels_last)

    def replicate(self, module: nn.Module) -> nn.Module:
        """The copy of `module` to train with, compiled with --compile; `module` itself is what is saved and tested."""
        return torch.compile(module, mode='reduce-overhead') if self.compiled else module

    def gather(self, features: Tensor, pids: Tensor) -> tuple[Tensor, Tensor]:
        """The features (B, D) and pids (B,) of the whole batch, over all processes."""
        return features, pids

    def guard(self, loss: Tensor, *optimizers: torch.optim.Optimizer) -> None:
        """Make the next step of the (fused) optimizers do nothing if `loss` is not finite.

        The decision stays on the device: nobody waits for it. Weights and moments are then as they were, and the meter
        ends the run when it reads the loss.
        """
        non_finite = (~torch.isfinite(loss.detach())).float()  # ()
        for optimizer in optimizers:
            optimizer.found_inf = non_finite


def start(options) -> Run:
    """Choose device and precision and seed what is drawn once, at the start: weights and centers.

    Raises:
        UserError: a GPU that is not there; a precision that the device does not have; --compile on a CPU.
    """
    device = _device(options)
    precision = _precision(options, device)
    test_precision = 'fp32' if options.precision == 'auto' else precision
    for allow in (torch.backends.cuda.matmul, torch.backends.cudnn):
        allow.allow_tf32 = precision == 'tf32'
    random.seed(options.seed)
    np.random.seed(options.seed % 2**32)  # noqa: NPY002 (for code of the user's that draws from it)
    torch.manual_seed(options.seed)
    if options.compile and device.type != 'cuda':
        raise UserError('--compile is for CUDA devices; leave it out on the CPU')
    return Run(device, precision, test_precision, options.seed, options.compile)


def _device(options) -> torch.device:
    indices = [int(index) for index in options.gpu_devices.split(',')]
    if options.use_cpu or (len(indices) == 1 and not torch.cuda.is_available()):
        print('Currently using CPU (GPU is highly recommended)')
        return torch.device('cpu')
    missing = [str(index) for index in indices if index >= torch.cuda.device_count()]
    if missing:
        raise UserError(
            f'--gpu-devices {options.gpu_devices}: this machine has {torch.cuda.device_count()} CUDA devices, '
            f'and none of index {", ".join(missing)}; list fewer, or pass --use-cpu'
        )
    if len(indices) > 1:
        raise UserError(f'--gpu-devices {options.gpu_devices}: training on several GPUs is not there yet; name one')
    print(f'Currently using GPU {options.gpu_devices}')
    device = torch.device('cuda', indices[0])
    torch.cuda.set_device(device)
    torch.backends.cudnn.benchmark = True  # every batch has the same shape
    return device


def _precision(options, device: torch.device) -> str:
    narrow = device.type == 'cpu' and options.width < NARROWEST_BF16
    if options.precision == 'auto':
        return 'bf16' if _has_bf16(device) and not narrow else 'fp32'
    if options.precision == 'bf16' and narrow:
        raise UserError(
            f'--precision bf16 with --width {options.width}: on CPUs bf16 is wrong for images up to '
            f'{NARROWEST_BF16 - 1} pixels wide; use --precision fp32'
        )
    if options.precision == 'tf32' and device.type != 'cuda':
        raise UserError('--precision tf32 is for CUDA devices; use fp32 or bf16 on the CPU')
    return options.precision


def _has_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 in hardware."""
    if device.type == 'cuda':
        return torch.cuda.get_device_capability(device) >= (8, 0)
    with contextlib.suppress(OSError):
        flags = Path('/proc/cpuinfo').read_text(encoding='ascii', errors='replace').split()
        return 'avx512_bf16' in flags or 'amx_bf16' in flags
    return False
