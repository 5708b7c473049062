"""Where and how an experiment runs: its device, precision and processes.

Each process of a run computes its share of a batch; gradients, mined triplets and printed losses are those of the whole
batch.
"""

import functools
import inspect
import os
import random
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import models
from arguments import RunOptions, TestOptions
from extraction.compiling import Compiled
from files.writing import Unwritten
from models.network import Network
from runtime import cards, cpu
from runtime.errors import UserError
from runtime.precision import allow_tf32, check_agreement, has_bf16
from runtime.processes import Group, Processes
from runtime.signals import Signals
from utils import Logger

Module = TypeVar('Module', bound=nn.Module)

# The same option under two names: broadcast_buffers in torch 2.6, forward_sync_buffers in the newest releases.
SYNC_BUFFERS = next(
    name
    for name in ('forward_sync_buffers', 'broadcast_buffers')
    if name in inspect.signature(DistributedDataParallel).parameters
)


class Step(NamedTuple):
    """What the processes agreed on in a step: whether any loss so far was not finite, and the stop signal."""

    flags: Tensor  # (2,) on the device
    host: Tensor  # (2,) the same, on the host once it is `copied`
    copied: 'torch.cuda.Event | None'


class Run:
    """The run, in which this is process `rank` of `world_size`; only the first process prints and writes files.

    precision:      of training: fp32, tf32 or bf16
    test_precision: of extraction: fp32 unless another is requested, so that published figures are reproduced
    unwritten:      files that could not be written, although the run continued
    """

    def __init__(
        self,
        device: torch.device,
        precision: str = 'fp32',
        test_precision: str = 'fp32',
        seed: int = 1,
        *,
        compiled: bool = False,
        sync_bn: bool = False,
        processes: Processes | None = None,
        signals: Signals | None = None,
        unwritten: Unwritten | None = None,
        log: Logger | None = None,
    ):
        self.device, self.precision, self.test_precision, self.seed = device, precision, test_precision, seed
        self.compiled, self.sync_bn, self.log = compiled, sync_bn, log
        self.processes = processes or Processes()
        self.rank, self.world_size = self.processes.rank, self.processes.world_size
        self.signals = signals or Signals(self.processes)
        self.unwritten = Unwritten() if unwritten is None else unwritten
        self.testing = False  # whether a test is under way
        self.rescue: Callable[[], Path | None] | None = None  # saves the state of a failing run
        self.steps: deque[Step] = deque(maxlen=2)  # the last two

    @functools.cached_property
    def copying(self) -> 'torch.cuda.Stream | None':
        """The stream on which all loaders copy a batch to the GPU while the network processes the previous one.

        None on the CPU. All loaders share it, because memory freed on a stream is reused only by the same stream.
        """
        return torch.cuda.Stream(self.device) if self.device.type == 'cuda' else None

    def autocast(self, testing: bool = False) -> torch.autocast:
        """Autocast to bfloat16 for the model call, if that is this run's precision. Weights stay float32."""
        precision = self.test_precision if testing else self.precision
        return torch.autocast(self.device.type, torch.bfloat16, enabled=precision == 'bf16')

    def place(self, module: Module) -> Module:
        """Move `module` to the device, in the channels_last layout, in which convolutions are fastest."""
        # torch's stubs do not have a memory format without a dtype.
        return module.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]

    def replicate(self, module: nn.Module) -> nn.Module:
        """The copy of `module` that is trained, compiled if --compile is given; `module` itself is saved and tested.

        The gradients of a replica are means over all processes. BatchNorm computes its statistics over the images of
        each process, or with --sync-bn of all processes. Running statistics are not exchanged during training, which
        does not use them: those of the first process are saved and used in tests (`unify`).
        """
        replica = module
        if self.world_size > 1:
            if self.sync_bn:
                replica = synchronised(replica)
            devices = [self.device.index] if self.device.type == 'cuda' else None
            how = {'gradient_as_bucket_view': True, SYNC_BUFFERS: False}
            replica = DistributedDataParallel(replica, devices, **how)  # type: ignore[arg-type]  # both take a bool
        if self.compiled:  # a module gives a module, whatever the annotation says
            replica = torch.compile(replica, mode='reduce-overhead')  # type: ignore[assignment]
        return replica

    def for_test(self, network: Network, options: TestOptions) -> Network:
        """The network that a test uses for extraction: compiled if --compile is given and it runs on a CPU."""
        if not self.compiled or self.device.type != 'cpu':
            return network
        return Compiled(network, options.height, options.width, options.test_batch)

    def gather(self, features: Tensor, pids: Tensor) -> tuple[Tensor, Tensor]:
        """The features (B, D) and pids (B,) of the whole batch, over all processes, in the batch's order.

        Gradients flow back to the process that a feature came from, once for each process: each computes the loss of
        the whole batch, and `replicate` takes the mean.
        """
        if self.world_size == 1:
            return features, pids
        return _Gather.apply(features), self.stack(pids).transpose(0, 1).flatten()

    def stack(self, tensor: Tensor) -> Tensor:
        """`tensor` (...) of every process, stacked: (world_size, ...). It must have the same shape in all of them."""
        if self.world_size == 1:
            return tensor[None]
        parts = [torch.empty_like(tensor, device=self.device) for _ in range(self.world_size)]
        dist.all_gather(parts, tensor.to(self.device).contiguous())
        return torch.stack(parts).to(tensor.device)

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of `tensor` over all processes; it must have the same shape in all of them."""
        if self.world_size == 1:
            return tensor
        total = tensor.to(self.device, copy=True)
        dist.all_reduce(total)
        return total.to(tensor.device)

    def mean(self, tensor: Tensor) -> Tensor:
        """The mean of `tensor` over all processes; it has the same shape in all."""
        return self.sum(tensor) / self.world_size

    def unify(self, model: nn.Module) -> None:
        """Copy the buffers of the first process, the running statistics of BatchNorm, to all others."""
        if self.world_size > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, 0)

    def skip_unless_finite(self, loss: Tensor, *optimizers: torch.optim.Optimizer) -> None:
        """Skip this and all later steps of the (fused) optimizers if `loss` is not finite in any process.

        The decision stays on the device, so the host does not wait for it. Weights and moments keep their values,
        nothing more is saved (`is_healthy`), and the meter ends the run when it reads the loss. In this collective,
        which a step has besides those of features and gradients, a request to stop is exchanged too (`stopping`).

        Raises:
            UserError: an optimizer is not fused, so it cannot skip a step on the device.
        """
        non_finite = (~torch.isfinite(loss.detach())).float()  # ()
        flags = torch.stack([non_finite, torch.full_like(non_finite, self.signals.waiting)])  # (2,)
        if self.steps:
            flags[0] = torch.maximum(flags[0], self.steps[-1].flags[0])  # once set, it stays set
        if self.world_size > 1:
            dist.all_reduce(flags, dist.ReduceOp.MAX)
        host, copied = flags.to('cpu', non_blocking=True), None
        if self.world_size > 1 and flags.is_cuda:
            copied = torch.cuda.Event()
            copied.record()
        self.steps.append(Step(flags, host, copied))
        for optimizer in optimizers:
            if not optimizer.defaults.get('fused'):
                raise UserError(f'{type(optimizer).__name__} cannot skip a step on the device: give it fused=True')
            optimizer.found_inf = flags[0]  # type: ignore[attr-defined]  # as torch's GradScaler sets it

    def is_healthy(self) -> bool:
        """Whether the losses of all steps so far were finite, in every process. The host waits for the device."""
        return not self.steps or not bool(self.steps[-1].flags[0])

    def stopping(self, last: bool = False) -> int:
        """The signal for which all processes stop after this step; 0 to continue.

        If there are several processes, they read the flags exchanged in the previous step, so none waits for a GPU that
        is still busy with this one; after the `last` step of an epoch they read the flags of that step.
        """
        if self.world_size == 1:
            return self.signals.waiting
        if not self.steps:
            return 0
        step = self.steps[-1 if last else 0]
        if step.copied:
            step.copied.synchronize()  # waits only for that step; reading the flags would wait for all queued work
        return int(step.host[1])


def synchronised(module: nn.Module) -> nn.Module:
    """`module` with SyncBatchNorm in place of BatchNorm, with the same parameters, buffers and keys.

    Those of timm's that include an activation become timm's synchronised ones; torch would drop the activation. For
    other kinds with a forward of their own, UserError.
    """
    usual = nn.BatchNorm2d.forward, nn.SyncBatchNorm.forward
    norms = {type(each) for each in module.modules() if isinstance(each, nn.modules.batchnorm._BatchNorm)}
    convert: Callable[[nn.Module], nn.Module] = nn.SyncBatchNorm.convert_sync_batchnorm
    for kind in (kind for kind in norms if kind.forward not in usual):
        if not kind.__module__.startswith('timm.'):
            raise UserError(f'--sync-bn cannot replace {kind.__name__}, whose forward is its own: remove --sync-bn')
        import timm.layers

        convert = timm.layers.convert_sync_batchnorm
    return convert(module)


class _Gather(torch.autograd.Function):
    """Features (b, D) of each process -> (B, D) of the batch; process r of W has rows r, r + W, ..."""

    @staticmethod
    def forward(ctx: object, features: Tensor) -> Tensor:
        parts = [torch.empty_like(features) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, features.contiguous())
        return torch.stack(parts, 1).flatten(0, 1)  # (b, W, D) -> (B, D)

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        gradient = gradient.clone(memory_format=torch.contiguous_format)  # (B, D)
        dist.all_reduce(gradient)
        return gradient[dist.get_rank() :: dist.get_world_size()]  # (b, D)


def start(
    options: RunOptions,
    group: Group | None = None,
    signals: Signals | None = None,
    unwritten: Unwritten | None = None,
    log: Logger | None = None,
) -> Run:
    """Choose device and precision, join the other processes, and set the seeds for weights and centers.

    Raises:
        UserError: a GPU does not exist or cannot be used; a device does not support the precision, or they have
        different ones; --sync-bn or --compile is used in training on a CPU.
    """
    group = group or Group(Processes())
    group.meet()
    device = _device(options, group.processes)
    chosen = precision_of(options, device)
    for option, wanted in (('--sync-bn', options.sync_bn), ('--compile', options.compile)):
        if wanted and device.type != 'cuda' and not options.evaluate:
            where = 'on the CPU' if option == '--sync-bn' else 'on the CPU, where it is for --evaluate only'
            raise UserError(f'{option} is for CUDA devices: remove it {where}')
    if options.deterministic:
        os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')  # required for deterministic cuBLAS
        torch.backends.cudnn.benchmark = False  # it may choose a different algorithm each time
        torch.use_deterministic_algorithms(True)
    allow_tf32(chosen == 'tf32')
    random.seed(options.seed)
    np.random.seed(options.seed % 2**32)  # noqa: NPY002 (for the user's code that draws from it)
    torch.manual_seed(options.seed)
    group.join(device)
    run = Run(
        device, chosen, 'fp32' if options.precision == 'auto' else chosen, options.seed, compiled=options.compile,
        sync_bn=options.sync_bn, processes=group.processes, signals=signals, unwritten=unwritten, log=log,
    )  # fmt: skip
    check_agreement(chosen, run.stack)
    return run


def _device(options: RunOptions, processes: Processes) -> torch.device:
    if processes.world_size > 1:
        print(f'{processes.world_size} processes')
    if options.use_cpu or (',' not in options.gpu_devices and not cards.available()):
        print('Currently using CPU (GPU is highly recommended)')
        if not options.use_cpu and (other := cards.unsupported()):
            print(f'The {other} device of this machine is not used: the program supports CUDA and the CPU only')
        cpu.tune()
        return torch.device('cpu')
    indices = gpus(options, processes.local_world_size)
    if len(indices) != processes.local_world_size:
        raise UserError(
            f'--gpu-devices {options.gpu_devices}: {len(indices)} GPUs for {processes.local_world_size} processes on '
            f'this host; with torchrun, list as many as --nproc-per-node'
        )
    print(f'Currently using GPU {",".join(map(str, indices))}')
    device = torch.device('cuda', indices[processes.local_rank])
    cards.check(device)
    torch.cuda.set_device(device)
    torch.backends.cudnn.benchmark = not options.deterministic  # every batch has the same shape
    return device


def gpus(options: RunOptions, processes: int = 1) -> list[int]:
    """The indices in --gpu-devices; 0, 1, ... if it has only one, as by default, and there are several processes.

    Raises:
        UserError: the machine has fewer GPUs, or its driver does not work.
    """
    indices = [int(index) for index in options.gpu_devices.split(',')]
    if len(indices) == 1 < processes:
        indices = list(range(processes))
    if missing := [str(index) for index in indices if index >= torch.cuda.device_count()]:
        cards.available()  # raises with the reason if there is no usable GPU
        raise UserError(
            f'--gpu-devices {options.gpu_devices}: this machine has {torch.cuda.device_count()} CUDA devices, '
            f'none with index {", ".join(missing)}; list fewer, or pass --use-cpu'
        )
    return indices


def precision_of(options: RunOptions, device: torch.device) -> str:
    """fp32, tf32 or bf16: as requested by --precision; for auto, the faster one that gives correct results.

    Raises:
        UserError: the device does not support the precision, or the network gives wrong results in it.
    """
    network = models.network_of(options.arch)
    narrowest = network.narrowest_bf16
    narrow = device.type == 'cpu' and options.width < narrowest
    if options.precision == 'auto':
        slower = device.type == 'cpu' and not network.faster_in_bf16
        return 'bf16' if has_bf16(device) and not narrow and not slower else 'fp32'
    if options.precision == 'bf16' and narrow:
        raise UserError(
            f'--precision bf16 with --width {options.width}: on CPUs bf16 gives wrong results for images up to '
            f'{narrowest - 1} pixels wide; use --precision fp32'
        )
    if options.precision == 'tf32' and device.type != 'cuda':
        raise UserError('--precision tf32 needs a CUDA device; use fp32 or bf16 on the CPU')
    return options.precision
