"""The processes of a run: the rank of this process, starting several from a plain command, and ending them together.

This is the only module that reads torchrun's environment variables.
"""

import contextlib
import datetime
import logging
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn

import torch
import torch.distributed as dist

from runtime.cores import usable_cores
from runtime.errors import UserError

ENVIRONMENT = ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'LOCAL_WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT')  # set by torchrun
RUN_ID = 'plain-command'  # run id of processes that a plain command starts, for --gpu-devices or --max-restarts
# Others wait while the first process re-ranks a large gallery; a CPU is slower, and gloo notices lost connections.
TIMEOUTS = {'nccl': datetime.timedelta(hours=1), 'gloo': datetime.timedelta(hours=3)}
REPORT_SECONDS = 30  # more than a launcher needs to end the other processes after one has failed


@dataclass(frozen=True)
class Processes:
    """The rank of this process and the number of processes."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0  # on its host
    local_world_size: int = 1
    hosts: int = 1
    started: bool = False  # by torchrun, or in the same way by a plain command
    by_torchrun: bool = False
    restarts: int = 0  # number of restarts by torchrun
    may_restart: bool = False

    @property
    def is_first(self) -> bool:
        """Whether this is the process that prints and writes."""
        return self.rank == 0


def of_environment() -> Processes:
    """The processes according to torchrun's environment variables; a single one if torchrun did not start this process.

    Raises:
        UserError: the environment is incomplete or contradicts itself.
    """

    def number(name: str, least: int, most: int | None = None, default: str = '0') -> int:
        text = os.environ.get(name, default)
        fits = text.isascii() and text.isdecimal() and int(text) >= least and (most is None or int(text) <= most)
        if not fits:
            limits = f'of at least {least}' if most is None else f'from {least} to {most}'
            raise UserError(f'{name} is {text!r} in the environment, not an integer {limits}: start with torchrun')
        return int(text)

    restarts = number('TORCHELASTIC_RESTART_COUNT', 0)
    may_restart = os.environ.get('TORCHELASTIC_MAX_RESTARTS', '0') != '0'
    if 'LOCAL_RANK' not in os.environ:
        return Processes(restarts=restarts, may_restart=may_restart)
    if missing := [name for name in ENVIRONMENT if name not in os.environ]:
        raise UserError(f'LOCAL_RANK is set in the environment, but {", ".join(missing)} is not: start with torchrun')
    world_size, local_world_size = number('WORLD_SIZE', 1), number('LOCAL_WORLD_SIZE', 1)
    number('MASTER_PORT', 0, 65535)
    return Processes(
        number('RANK', 0, world_size - 1),
        world_size,
        number('LOCAL_RANK', 0, local_world_size - 1),
        local_world_size,
        number('GROUP_WORLD_SIZE', 1, default='1'),
        started=True,
        by_torchrun=os.environ.get('TORCHELASTIC_RUN_ID', RUN_ID) != RUN_ID,
        restarts=restarts,
        may_restart=may_restart,
    )


class Group:
    """The group of a process: a store for starting and ending together, and collectives in between."""

    def __init__(self, processes: Processes):
        self.processes = processes
        self.store: dist.Store | None = None

    def meet(self) -> None:
        """Connect to the store that all processes share; from now on, only the first process that fails reports this.

        Raises:
            UserError: they cannot connect, because the port is in use or the host is unknown.
        """
        if self.processes.world_size == 1 or self.store is not None:
            return
        try:
            self.store, *_ = next(dist.rendezvous('env://'))
        except RuntimeError as problem:  # torch 2.6 has no DistError for this
            reason = str(problem).split('\n', 1)[0]
            address = ':'.join(os.environ[name] for name in ('MASTER_ADDR', 'MASTER_PORT'))
            raise UserError(
                f'the processes cannot meet at {address} of MASTER_ADDR and MASTER_PORT ({reason}); choose another '
                f'port or host with --master-port and --master-addr of torchrun'
            ) from problem

    def join(self, device: torch.device) -> None:
        """Prepare to exchange tensors with the other processes; every process must call this."""
        processes = self.processes
        if processes.world_size == 1:
            return
        on_gpu = device.type == 'cuda'
        backend = 'nccl' if on_gpu else 'gloo'
        dist.init_process_group(
            backend,
            store=self.store,
            rank=processes.rank,
            world_size=processes.world_size,
            device_id=device if on_gpu else None,
            timeout=TIMEOUTS[backend],
        )

    def leave(self) -> None:
        """Leave once every process has called this, so that none closes a connection that another still reads."""
        if dist.is_initialized():
            dist.barrier()
            dist.destroy_process_group()

    def has_failed(self) -> bool:
        """Whether a process has reported its failure, or the store is lost."""
        try:
            return self.store is None or self.store.check(['failed'])
        except RuntimeError:
            return True

    def agree(self, status: int, text: str) -> tuple[int, str]:
        """Exit status and text of a process that fails: the status of the first one that failed, and only its message.

        The other processes fail because they lost the first one, and report nothing.
        """
        if self.store is None:
            return status, text
        mine = f'{status} {self.processes.rank}'
        with contextlib.suppress(RuntimeError):  # the store was lost with its process
            first = self.store.compare_set('failed', '', mine).decode()
            return (status, text) if first == mine else (int(first.split()[0]), '')
        return status, ''


def lost_another(problem: BaseException) -> bool:
    """Whether an exception means that another process of the group has ended; the launcher reports that process."""
    if not dist.is_initialized():
        return False
    named = isinstance(problem, RuntimeError) and any(backend in str(problem) for backend in ('gloo', 'NCCL'))
    return named or isinstance(problem, dist.DistError)


def hangup_is_ignored() -> bool:
    """Whether the program was started with nohup and continues without its terminal."""
    return signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


def start_all(number: int, more: Sequence[str]) -> tuple[int, str]:
    """Run this command in `number` processes, like torchrun. Returns the exit status and a message to report."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    if number > 1:  # a single process uses all cores by itself
        os.environ.setdefault('OMP_NUM_THREADS', str(max(usable_cores() // number, 1)))
    logging.disable()  # for good: this process only starts the others, which report their own errors, and then ends
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=number,
        run_id=RUN_ID,
        rdzv_backend='c10d',
        rdzv_endpoint='localhost:0',  # any free port
        max_restarts=0,
    )
    if hangup_is_ignored() and hasattr(config, 'signals_to_handle'):  # missing in older versions of torch
        config.signals_to_handle = 'SIGTERM,SIGINT,SIGQUIT'  # SIGHUP stays ignored, also in the processes
    try:
        elastic_launch(config, sys.executable)(*sys.orig_argv[1:], *more)
    except ChildFailedError as failed:
        return _first_end({rank: (each.timestamp, each.exitcode) for rank, each in failed.failures.items()})
    except SignalException as stopped:
        return 128 + stopped.sigval, ''
    return 0, ''


def _first_end(ends: Mapping[int, tuple[int, int]]) -> tuple[int, str]:
    """Exit status and message of a run, from the time (s) and exit code (-N if killed by signal N) of its processes.

    The first process to end counts: the launcher then ends the others, by SIGKILL if SIGTERM is not enough.
    """
    causes = {rank: end for rank, end in ends.items() if end[1] != -signal.SIGTERM} or ends
    # Within one second: a mistake comes first, because others may fail when they lose that process; then a kill.
    rank, (_, code) = min(causes.items(), key=lambda item: (item[1][0], item[1][1] != UserError.status, item[1][1]))
    if code >= 0 or code == -signal.SIGTERM:
        return (code if code >= 0 else 128 - code), ''
    return 128 - code, f'error: process {rank} of the run was killed by signal {-code}\n'


def end(status: int) -> NoReturn:
    """Exit with a status, even if the group was not left because a process has failed.

    A normal exit would let NCCL report that its group was not destroyed, but destroying it waits for collectives that
    never end.
    """
    if dist.is_initialized() and dist.get_backend() == 'nccl':
        for stream in filter(None, (sys.stdout, sys.stderr)):
            stream.flush()
        os._exit(status)
    sys.exit(status)
