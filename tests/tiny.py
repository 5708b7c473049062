"""A network of a thousand parameters for tests, and a way to run a script with it in a process of its own.

python tests/tiny.py train_img_model_xent.py -a tiny ...

Something can happen to the process in the middle of a step, so that no test has to catch it there by the clock:
ACT='stop 61 0; kill 901 0' in the environment stops the process of rank 0 at its 61st batch and kills it at its 901st.
"""

import functools
import multiprocessing
import os
import runpy
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

os.environ.setdefault('OMP_WAIT_POLICY', 'passive')  # before torch: threads that spin hold up a busy machine

from torch import OutOfMemoryError, nn  # noqa: E402

import models  # noqa: E402
from models.network import Network  # noqa: E402
from runtime.errors import UserError  # noqa: E402


class Tiny(Network):
    """Two strided convolutions with BatchNorm; features (B, 16)."""

    feat_dim = 16

    def __init__(self, num_classes, loss=frozenset({'xent'})):
        super().__init__(num_classes, loss)
        self.base = nn.Sequential(
            nn.Conv2d(3, 8, 5, stride=4, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 16, 3, stride=2, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(),
        )
        self.classifier = nn.Linear(self.feat_dim, num_classes)

    def maps(self, x):
        return self.base(x)  # (B, 16, h, w)


models.factory['tiny'] = Tiny


def at_batch(number: int, act: Callable[[], object]) -> None:
    """Call `act` while batch `number` of the trainings of this process, counted from 1, is computed."""
    count, whole = 0, Tiny.forward

    def forward(model, x):
        nonlocal count
        count += model.training
        if model.training and count == number:
            act()
        return whole(model, x)

    Tiny.forward = forward


def waiting() -> int:
    """The signal that the run of this process was sent and has not handled yet."""
    return signal.getsignal(signal.SIGTERM).__self__.waiting  # of its Signals, whose method is the handler


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def kill_later(lines):
    """End this process when that many more lines of Python have run."""

    def trace(frame, event, arg):
        nonlocal lines
        lines -= event == 'line'
        if lines < 0:
            kill()
        return trace

    os.register_at_fork(after_in_child=lambda: sys.settrace(None))  # the lines of workers do not count
    sys.settrace(trace)


def kill_worker():
    os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)


def stop():
    """Stop until SIGCONT comes; the process that started this one can wait for that (`os.WUNTRACED`)."""
    os.kill(os.getpid(), signal.SIGSTOP)


def ask():
    """Ask this process to stop."""
    os.kill(os.getpid(), signal.SIGTERM)


def ask_launcher(number=signal.SIGTERM):
    """Ask the launcher of this process (two_gpus.py) to stop, and take no further step before it has forwarded that."""
    os.kill(int(os.environ['LAUNCHER']), number)
    while not waiting():
        time.sleep(0.01)


def hang_up():
    """What the end of a terminal sends to a run that ignores it, and to its launcher."""
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    for process in (int(os.environ['LAUNCHER']), os.getpid()):
        os.kill(process, signal.SIGHUP)


def ignore():
    """Receive no signal to stop."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def mistake():
    raise UserError(f'what process {os.environ["RANK"]} says')


def fault():
    raise ValueError(f'what process {os.environ["RANK"]} says')


def memory():
    """As one process of a group of GPUs may run out of it."""
    raise OutOfMemoryError('CUDA out of memory. ')


ACTS = [kill, kill_later, kill_worker, stop, ask, ask_launcher, hang_up, ignore, mistake, fault, memory]


def plan() -> None:
    """What ACT asks for: name, batch and rank of each act, and its arguments."""
    for words in filter(None, os.environ.get('ACT', '').split(';')):
        name, batch, rank, *numbers = words.split()
        if os.environ.get('RANK', '0') == rank:
            (act,) = (act for act in ACTS if act.__name__ == name)
            at_batch(int(batch), functools.partial(act, *map(int, numbers)))


if __name__ == '__main__':
    plan()
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name='__main__')
