"""Processes and devices: an experiment is started here and runs on what the machine has.

The only room that knows which device is used, in which precision, and that there could be more than one process.
Several processes are a group of torchrun's, on one host or many, or the same group started by `--gpu-devices 0,1`. Each
does its share of a batch; gradients, the features that are mined and the losses that are shown are those of the whole.

A run that is asked to stop, by SIGTERM or SIGINT, finishes its step and saves; all its processes after the same step.
"""

import contextlib
import ctypes
import datetime
import errno
import fcntl
import functools
import inspect
import logging
import os
import platform
import random
import signal
import subprocess
import sys
import time
import traceback
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import PIL
import torch
import torch.distributed as dist
import torchvision
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from runtime import signals
from runtime.errors import UserError
from runtime.files import unwritten
from utils import Logger, mkdir_if_missing

NARROWEST_BF16 = 33  # pixels; below, the CPU's bf16 convolution of ResNet50's last stage returns garbage
ENVIRONMENT = ['RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'LOCAL_WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT']  # of torchrun
ENDS = (0, 2, 128 + signal.SIGTERM, 128 + signal.SIGINT)  # exit statuses after which --max-restarts leaves it at that
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
LAUNCHER_NOTICES = 1  # second after which the launcher has ended the others of a process that was killed

# One option under two names: that of torch 2.6, and that for which the newest lets it go.
SYNC_BUFFERS = next(
    name
    for name in ('forward_sync_buffers', 'broadcast_buffers')
    if name in inspect.signature(DistributedDataParallel).parameters
)

_store: dist.Store | None = None  # what the processes of a run share beside the collectives


def main(experiment: Callable, parser) -> None:
    """Run `experiment(args)` with the arguments of the command line, under a log file in `--save-dir`.

    With several `--gpu-devices` this process only starts one for each, with the same command. The first one of them
    prints and logs.

    A mistake of the user (`UserError`) is one line on stderr and exit status 2; a fault of ours keeps its traceback and
    exits with 1; a signal ends with 128 + its number. All stand in the log. Of several processes the first that fails
    says so, and all end with its status. What could not be written while the run went on makes its status 2.
    """
    try:
        _check_environment()
    except UserError as mistake:  # each process speaks: which is the first one is not known
        sys.stderr.write(f'error: {mistake}\n')
        sys.exit(2)
    args = parser.parse_args()
    started = time.time()
    path = Path(args.save_dir) / ('log_test.txt' if args.evaluate else 'log_train.txt')
    status, text = 0, ''
    others = _starts_others(args.run)
    with contextlib.ExitStack() as stack:
        try:
            if is_first() and not others and not args.evaluate:
                stack.enter_context(_alone_in(args.save_dir))
        except UserError as mistake:  # the log belongs to the other run
            sys.stderr.write(f'error: {mistake}\n')
            sys.exit(2)
        stack.enter_context(Logger(path) if is_first() else _silence())
        try:
            if others:
                for attempt in range(args.run.max_restarts + 1):
                    more = [] if attempt == 0 or args.evaluate else ['--auto-resume']
                    status, text = _start_others(args.run, more)
                    if status in ENDS or attempt == args.run.max_restarts:
                        break
                    reason = text.removeprefix('error: ').strip() or f'the run ended with status {status}'
                    print(f'{reason}; starting it again, {attempt + 1} of {args.run.max_restarts}')
            else:
                stack.enter_context(signals.heeded())
                print(f'==========\nArgs:{args.plain()}\n==========')
                experiment(args)
                _leave()
                elapsed = datetime.timedelta(seconds=round(time.time() - started))
                print(f'Finished. Total elapsed time (h:m:s): {elapsed}')
                if unwritten:
                    status, text = 2, f'error: {len(unwritten)} files could not be written, first {unwritten[0]}\n'
        except UserError as mistake:
            status, text = _agree(mistake.status, f'error: {mistake}\n')
        except signals.Stopped as stopped:
            status = 128 + stopped.signal
            print(stopped)
            if stopped.together:
                _leave()
        except Exception:
            signals.ignore()  # one that comes now, when another process has ended, changes nothing
            status, text = _agree(1, traceback.format_exc())
        unwritten.clear()
    if text:
        sys.stderr.write(text)
        with contextlib.suppress(OSError), open(path, 'a', encoding='utf-8') as log:
            log.write(text)
    if status:
        sys.exit(status)


def is_first() -> bool:
    """Whether this process is the one that prints and writes."""
    return 'LOCAL_RANK' not in os.environ or os.environ.get('RANK', '0') == '0'


def mean(values: Tensor) -> Tensor:
    """The mean of `values` over all processes, each of which calls this."""
    if not dist.is_initialized():
        return values
    values = values.clone()
    dist.all_reduce(values)
    return values / dist.get_world_size()


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
    sync_bn: bool = False
    flags: deque = field(default_factory=lambda: deque(maxlen=2), repr=False)  # of the last steps, see `guard`

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
        """The copy of `module` to train with, compiled with --compile; `module` itself is what is saved and tested.

        The gradients of a replica are means over all processes. Its BatchNorm takes its statistics from the images of
        its own process, or with --sync-bn of all. Running statistics are not exchanged while training, which does not
        look at them: those of the first process are saved, and tested with (`unify`).
        """
        replica = module
        if self.world_size > 1:
            if self.sync_bn:
                replica = nn.SyncBatchNorm.convert_sync_batchnorm(replica)  # the same parameters, buffers and keys
            devices = [self.device.index] if self.device.type == 'cuda' else None
            replica = DistributedDataParallel(replica, devices, gradient_as_bucket_view=True, **{SYNC_BUFFERS: False})
        return torch.compile(replica, mode='reduce-overhead') if self.compiled else replica

    def gather(self, features: Tensor, pids: Tensor) -> tuple[Tensor, Tensor]:
        """The features (B, D) and pids (B,) of the whole batch, over all processes, in the batch's order.

        Gradients flow back to the process that a feature came from, as many times as there are processes: each computes
        the loss of the whole batch, and `replicate` takes the mean.
        """
        if self.world_size == 1:
            return features, pids
        return _Gather.apply(features), self.stack(pids).transpose(0, 1).flatten()

    def stack(self, tensor: Tensor) -> Tensor:
        """`tensor` (...) of every process, (world_size, ...); it has the same shape in all."""
        if self.world_size == 1:
            return tensor[None]
        parts = [torch.empty_like(tensor, device=self.device) for _ in range(self.world_size)]
        dist.all_gather(parts, tensor.to(self.device).contiguous())
        return torch.stack(parts).to(tensor.device)

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of `tensor` over all processes; it has the same shape in all."""
        if self.world_size == 1:
            return tensor
        total = tensor.to(self.device, copy=True)
        dist.all_reduce(total)
        return total.to(tensor.device)

    def unify(self, model: nn.Module) -> None:
        """Give every process the buffers of the first one, the running statistics of BatchNorm."""
        if self.world_size > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, 0)

    def guard(self, loss: Tensor, *optimizers: torch.optim.Optimizer) -> None:
        """Make this and all further steps of the (fused) optimizers do nothing if `loss` is not finite, in any process.

        The decision stays on the device: nobody waits for it. Weights and moments are then as they were, nothing is
        saved any more (`is_healthy`), and the meter ends the run when it reads the loss. A signal to stop, which any of
        several processes was sent, travels with it.
        """
        non_finite = (~torch.isfinite(loss.detach())).float()  # ()
        flags = torch.stack([non_finite, torch.full_like(non_finite, signals.waiting())])  # (2,)
        if self.flags:
            flags[0] = torch.maximum(flags[0], self.flags[-1][0][0])  # once not finite, it remains so
        if self.world_size > 1:
            dist.all_reduce(flags, dist.ReduceOp.MAX)
        host, copied = flags.to('cpu', non_blocking=True), None
        if self.world_size > 1 and flags.is_cuda:
            copied = torch.cuda.Event()
            copied.record()
        self.flags.append((flags, host, copied))
        for optimizer in optimizers:
            if not optimizer.defaults.get('fused'):
                raise UserError(f'{type(optimizer).__name__} cannot leave out a step on the device: give it fused=True')
            optimizer.found_inf = flags[0]

    def is_healthy(self) -> bool:
        """Whether the losses of all steps so far were finite, in every process. This waits for the device."""
        return not self.flags or not bool(self.flags[-1][0][0])

    def stopping(self, last: bool = False) -> int:
        """The signal for which all processes stop after this very step; 0 to go on.

        Several processes go by what they exchanged in the step before, so that none waits for a GPU that is still busy
        with this one; by this one after the `last` step of an epoch.
        """
        if self.world_size == 1:
            return signals.waiting()
        if not self.flags:
            return 0
        _, host, copied = self.flags[-1 if last else 0]
        if copied:
            copied.synchronize()  # with that step alone; reading the flags themselves would wait for all that is queued
        return int(host[1])

    def provenance(self) -> dict:
        """Where results come from: seed, devices, versions, command, and the revision of this code, if git knows it."""
        return {
            'seed': self.seed,
            'device': torch.cuda.get_device_name(self.device) if self.device.type == 'cuda' else 'CPU',
            'processes': self.world_size,
            'versions': {
                'python': platform.python_version(),
                'torch': str(torch.__version__),
                'torchvision': str(torchvision.__version__),
                'numpy': np.__version__,
                'pillow': PIL.__version__,
            },
            'revision': _revision(),
            'command': list(sys.argv),
        }


class _Gather(torch.autograd.Function):
    """Features (b, D) of each process -> (B, D) of the batch, of which process r of W holds rows r, r + W, ..."""

    @staticmethod
    def forward(ctx, features: Tensor) -> Tensor:
        parts = [torch.empty_like(features) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, features.contiguous())
        return torch.stack(parts, 1).flatten(0, 1)  # (b, W, D) -> (B, D)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        gradient = gradient.clone(memory_format=torch.contiguous_format)  # (B, D)
        dist.all_reduce(gradient)
        return gradient[dist.get_rank() :: dist.get_world_size()]  # (b, D)


def start(options) -> Run:
    """Join the group of processes, choose device and precision, and seed what is drawn once: weights and centers.

    Raises:
        UserError: a GPU that is not there; a precision that the device does not have; --sync-bn or --compile on a CPU.
    """
    rank, world_size = _find_others()
    device = _device(options)
    precision = _precision(options, device)
    test_precision = 'fp32' if options.precision == 'auto' else precision
    if options.sync_bn and device.type == 'cpu':
        raise UserError('--sync-bn is for CUDA devices: leave it out on the CPU')
    if options.deterministic:
        os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')  # without which cuBLAS is refused
        torch.backends.cudnn.benchmark = False  # it might choose another algorithm each time
        torch.use_deterministic_algorithms(True)
    for allow in (torch.backends.cuda.matmul, torch.backends.cudnn):
        allow.allow_tf32 = precision == 'tf32'
    random.seed(options.seed)
    np.random.seed(options.seed % 2**32)  # noqa: NPY002 (for code of the user's that draws from it)
    torch.manual_seed(options.seed)
    if options.compile and device.type != 'cuda':
        raise UserError('--compile is for CUDA devices; leave it out on the CPU')
    if _store and not dist.is_initialized():
        on_gpu = device.type == 'cuda'
        dist.init_process_group(
            'nccl' if on_gpu else 'gloo',
            store=_store,
            rank=rank,
            world_size=world_size,
            device_id=device if on_gpu else None,
        )
    return Run(
        device,
        precision,
        test_precision,
        options.seed,
        compiled=options.compile,
        rank=rank,
        world_size=world_size,
        sync_bn=options.sync_bn,
    )


def _device(options) -> torch.device:
    if options.use_cpu or (',' not in options.gpu_devices and not torch.cuda.is_available()):
        print('Currently using CPU (GPU is highly recommended)')
        _keep_memory()
        return torch.device('cpu')
    local_rank, processes = int(os.environ.get('LOCAL_RANK', 0)), int(os.environ.get('LOCAL_WORLD_SIZE', 1))
    indices = _gpus(options, processes)
    if len(indices) != processes:
        raise UserError(
            f'--gpu-devices {options.gpu_devices}: {len(indices)} GPUs for {processes} processes on this host; with '
            f'torchrun, list as many as --nproc-per-node says'
        )
    print(f'Currently using GPU {",".join(map(str, indices))}')
    device = torch.device('cuda', indices[local_rank])
    torch.cuda.set_device(device)
    torch.backends.cudnn.benchmark = not options.deterministic  # every batch has the same shape
    return device


def _keep_memory() -> None:
    """Have the process keep the memory that it frees for what comes next, unless the user has tuned the allocator.

    Otherwise the activations of each layer are given back and asked for anew, and the kernel clears them page by page:
    a third of the time of an extraction on a CPU. It costs a training up to a sixth more memory. Blocks of more than
    256 MB, of features and caches, go back as ever (before glibc 2.35 of more than 32 MB).
    """
    if any(name.startswith(('MALLOC_', 'GLIBC_TUNABLES')) for name in os.environ):
        return
    with contextlib.suppress(AttributeError):  # another C library than glibc
        mallopt = ctypes.CDLL(None).mallopt
        if not mallopt(M_MMAP_THRESHOLD, 1 << 28):
            mallopt(M_MMAP_THRESHOLD, 1 << 25)
        mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)


def _gpus(options, processes: int = 1) -> list[int]:
    """The indices that were listed; of one alone, which is the default, as many from 0 on as there are processes."""
    indices = [int(index) for index in options.gpu_devices.split(',')]
    if len(indices) == 1 < processes:
        indices = list(range(processes))
    missing = [str(index) for index in indices if index >= torch.cuda.device_count()]
    if missing:
        raise UserError(
            f'--gpu-devices {options.gpu_devices}: this machine has {torch.cuda.device_count()} CUDA devices, '
            f'and none of index {", ".join(missing)}; list fewer, or pass --use-cpu'
        )
    return indices


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


# Several processes


def _starts_others(options) -> bool:
    """Whether this is a plain command that asks for several GPUs, or to be started again when it is killed."""
    several = ',' in options.gpu_devices and not options.use_cpu
    return (several or options.max_restarts > 0) and 'LOCAL_RANK' not in os.environ


def _start_others(options, more: list[str]) -> tuple[int, str]:
    """Run this very command once for each listed GPU, as torchrun does; the exit status, and what is left to say."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    number = len(_gpus(options)) if ',' in options.gpu_devices and not options.use_cpu else 1
    os.environ.setdefault('OMP_NUM_THREADS', str(max((os.cpu_count() or 1) // number, 1)))
    logging.disable()  # what its processes have to say they say themselves
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=number,
        run_id=signals.RUN_ID,
        rdzv_backend='c10d',
        rdzv_endpoint='localhost:0',  # any free port
        max_restarts=0,
    )
    try:
        elastic_launch(config, sys.executable)(*sys.orig_argv[1:], *more)
    except ChildFailedError as failed:
        rank, failure = failed.get_first_failure()
        if failure.exitcode < 0:
            return 128 - failure.exitcode, f'error: process {rank} of the run was ended by signal {-failure.exitcode}\n'
        return failure.exitcode, ''
    except SignalException as stopped:
        return 128 + stopped.sigval, ''
    return 0, ''


def _find_others() -> tuple[int, int]:
    """Rank and number of the processes of torchrun's group, to which this one may belong; 0 and 1 if it does not."""
    global _store
    if 'LOCAL_RANK' not in os.environ:
        return 0, 1
    _check_environment()
    rank, world_size = int(os.environ['RANK']), int(os.environ['WORLD_SIZE'])
    if world_size > 1 and _store is None:
        try:
            _store, *_ = next(dist.rendezvous('env://'))
        except RuntimeError as problem:  # a port that is taken (torch 2.6: no DistError), a host that nobody knows
            reason = str(problem).split('\n', 1)[0]
            address = ':'.join(os.environ[name] for name in ('MASTER_ADDR', 'MASTER_PORT'))
            raise UserError(
                f'the processes cannot meet at {address} of MASTER_ADDR and MASTER_PORT ({reason}); name another port '
                f'or host, as --master-port and --master-addr of torchrun do'
            ) from problem
        print(f'{world_size} processes')
    return rank, world_size


def _check_environment() -> None:
    """Whether a process that is one of torchrun's was given all of its numbers, and these fit each other."""

    def check(name: str, least: int, most: int | None = None) -> int:
        text = os.environ.get(name, '0')
        fits = text.isascii() and text.isdecimal() and int(text) >= least and (most is None or int(text) <= most)
        if not fits:
            limits = f'{least} or more' if most is None else f'from {least} to {most}'
            raise UserError(f'{name} is {text!r} in the environment, not a whole number {limits}: start with torchrun')
        return int(text)

    check('TORCHELASTIC_RESTART_COUNT', 0)
    if 'LOCAL_RANK' not in os.environ:
        return
    missing = [name for name in ENVIRONMENT if name not in os.environ]
    if missing:
        raise UserError(f'LOCAL_RANK is in the environment, but {", ".join(missing)} is not: start with torchrun')
    for rank, size in (('RANK', 'WORLD_SIZE'), ('LOCAL_RANK', 'LOCAL_WORLD_SIZE')):
        check(rank, 0, check(size, 1) - 1)
    check('MASTER_PORT', 0, 65535)


def _leave() -> None:
    """End the group once every process has come here, so that none closes a connection that another still reads."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def _agree(status: int, text: str) -> tuple[int, str]:
    """Exit status and text of a process that fails: of several the first one's status, and its text alone.

    The others fail because they lost it, so what they could tell is no news.
    """
    if _store is None:
        return status, text
    if status == 1 and signals.waiting():  # the launcher ended it, for the sake of another, before it noticed
        return 128 + signals.waiting(), ''
    if status == 1:
        time.sleep(LAUNCHER_NOTICES)  # if another was killed and this one misses it, it is ended here, and silent
    mine = f'{status} {os.environ["RANK"]}'
    with contextlib.suppress(RuntimeError):  # the store went with the process that held it
        first = _store.compare_set('failed', '', mine).decode()
        return (status, text) if first == mine else (int(first.split()[0]), '')
    return status, ''


# What a run leaves and takes


@contextlib.contextmanager
def _alone_in(save_dir: str) -> Iterator[None]:
    """Keep other trainings out of `save_dir`. The lock goes with the process, however it ends."""
    mkdir_if_missing(save_dir)
    with open(Path(save_dir) / '.lock', 'a', encoding='ascii') as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not flock, which workers of a killed run would keep
        except OSError as problem:
            if problem.errno not in (errno.EACCES, errno.EAGAIN):  # else there are no locks on that file system
                yield
                return
            owner = Path(file.name).read_text(encoding='ascii') or 'of another host'
            raise UserError(
                f'--save-dir {save_dir}: another training run writes there (process {owner}); name another folder'
            ) from None
        with contextlib.suppress(OSError):  # a full disk; the lock holds without the name of its owner
            os.ftruncate(file.fileno(), 0)
            os.write(file.fileno(), f'{os.getpid()} on {platform.node()}'.encode('ascii', 'replace'))
        yield


@functools.cache
def _revision() -> str | None:
    """The commit of this code; `+` behind it when files differ from it."""
    git = ['git', '-C', str(Path(__file__).parent)]
    try:
        commit, changes = (
            subprocess.run([*git, *command], capture_output=True, text=True, check=True, timeout=10).stdout.strip()
            for command in (['rev-parse', 'HEAD'], ['status', '--porcelain', '--untracked-files=no'])
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return f'{commit}{"+" if changes else ""}'


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Print nothing and warn of nothing: the first process does."""
    warnings.simplefilter('ignore')
    with open(os.devnull, 'w', encoding='utf-8') as nowhere, contextlib.redirect_stdout(nowhere):
        yield
