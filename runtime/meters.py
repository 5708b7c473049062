"""What is shown while training: the lines of the losses, a bar on terminals, metrics.csv and TensorBoard's files."""

import csv
import importlib.util
import math
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from runtime import launch
from runtime.errors import UserError
from runtime.files import excused
from utils import AverageMeter

FIGURES = ('mAP', 'mINP', 'rank1', 'rank5', 'rank10')  # of a test, 0..1
HIDDEN = 'collapsed'  # is not shown, but said
BAR = '{desc}: {n_fmt}/{total_fmt} |{bar}| {elapsed}{postfix}'  # 80 columns cut losses off, not the rest


def bar_over(batches: Iterable | None, text: str, quiet: bool, **kwargs) -> tqdm:
    """A progress bar over `batches`, on the terminal of the first process alone; nothing in a pipe or a log."""
    return tqdm(batches, desc=text, disable=quiet or not sys.stdout.isatty(), leave=False, **kwargs)


class LossMeter:
    """The losses of a run by name, told every `print_freq` batches.

        for imgs, pids, draws in meter.watch(trainloader, epoch):
            ...
            meter.update(loss=loss, xent=xent, htri=htri)

    The first name is the loss that is minimised. Values stay on the device until they are told, so no step waits for
    the one before, nor for another process: what is shown is the mean over all. `collapsed`, which is 1 where the
    features of a batch are all but equal, is not shown, but said once when it holds for a whole epoch.

    On a terminal a bar stands for the lines, which then go to the log alone; `quiet` keeps both off the screen.
    metrics.csv has a row for each line, for the rest of an epoch, and for each test.

    Raises:
        UserError: TensorBoard is asked for and not installed.
    """

    def __init__(self, options: Any):
        self.options = options
        self.loader, self.epoch, self.count, self.lr = None, 0, 0, math.nan
        self.unread: list[dict[str, Tensor]] = []  # on the device
        self.untold: list[dict[str, float]] = []  # read, and not yet in metrics.csv
        self.means: dict[str, AverageMeter] = {}
        self.warned = False
        self.clock = _Clock()
        self.table = _Table(Path(options.save_dir) / 'metrics.csv')
        if options.tensorboard and not importlib.util.find_spec('tensorboard'):
            raise UserError('--tensorboard needs the package tensorboard: pip install tensorboard, or leave it out')
        self.board = None

    def watch(self, loader: Any, epoch: int, start: int = 0, lr: float = math.nan) -> Iterator[tuple]:
        """The batches start, start + 1, ... of an epoch; after every `print_freq`-th of them its losses are told.

        Raises:
            UserError: see `read`.
        """
        self.loader, self.epoch, self.lr = loader, epoch, lr
        self.means, self.unread, self.untold = {}, [], []
        self.clock = clock = _Clock()
        text = f'Epoch {epoch + 1}/{self.options.max_epoch}'
        with bar_over(None, text, self.options.quiet, total=len(loader), initial=start, bar_format=BAR) as bar:
            for self.count, batch in enumerate(clock.waiting(loader.epoch(epoch, start)), start + 1):
                yield batch
                bar.update()
                if self.count % self.options.print_freq == 0:
                    self._tell(bar)
        self.record()
        if HIDDEN in self.means and self.means[HIDDEN].avg == 1 and not self.warned:
            self.warned = True
            print(
                f'Collapse: the network gave all images of a batch all but equal features, through epoch {epoch + 1}. '
                f'Try a lower --lr, pretrained weights, or a few epochs of cross entropy first'
            )

    def update(self, **losses: Tensor) -> None:
        """Take in the 0-dim losses of a batch."""
        self.unread.append({name: value.detach().clone() for name, value in losses.items()})  # of a CUDA graph's output

    def read(self) -> None:
        """Fetch the losses of the batches since the last time from the device; every process has to.

        Raises:
            UserError: one of them was not finite, in any process. It names epoch, batch and images; the weights are
                those before that batch, and all steps since then did nothing.
        """
        if not self.unread:
            return
        names = list(self.unread[0])
        rows = torch.stack([torch.stack([row[name].float() for name in names]) for row in self.unread])
        rows, self.unread = launch.mean(rows).tolist(), []
        for batch, row in enumerate(rows, self.count - len(rows) + 1):
            for name, value in zip(names, row, strict=True):
                self.means.setdefault(name, AverageMeter()).update(value)
            self.untold.append(dict(zip(names, row, strict=True)))
            if not all(map(math.isfinite, row)):
                shown = ', '.join(f'{name} {value}' for name, value in zip(names, row, strict=True))
                raise UserError(
                    f'the loss is not finite in epoch {self.epoch + 1}, batch {batch}/{len(self.loader)} ({shown}); '
                    f'nothing was saved from it. Try a lower --lr, or --precision fp32. Its images: '
                    f'{", ".join(self.loader.paths(self.epoch, batch - 1))}'
                )

    def record(self) -> dict[str, float]:
        """Add the losses since the last time to metrics.csv; every process has to. What a bar shows of them, by name.

        Raises UserError as `read` does.
        """
        self.read()
        untold, self.untold = self.untold, []
        if not untold or not launch.is_first():
            return {}
        losses = {name: sum(row[name] for row in untold) / len(untold) for name in untold[0] if name != HIDDEN}
        seconds, wait = self.clock.read()  # of a batch; the share that was waited for images
        speed = self.options.train_batch / seconds
        step = self.epoch * len(self.loader) + self.count
        row = {'epoch': self.epoch + 1, 'batch': self.count, 'lr': self.lr, 'images_per_s': speed, 'data_wait': wait}
        self._record(row | losses, step, 'train')
        left = len(self.loader) * (self.options.max_epoch - self.epoch) - self.count
        shown = {'left': tqdm.format_interval(left * seconds), 'img/s': f'{speed:.0f}', 'wait': f'{wait:.0%}'}
        return shown | {name: f'{value:.3f}' for name, value in losses.items()}

    def tested(self, epoch: int, figures: dict[str, float]) -> None:
        """Take in the figures of a test after an epoch (from 0), in the first process."""
        self._record({'epoch': epoch + 1, **figures}, (epoch + 1) * len(self.loader), 'test')

    def _tell(self, bar: tqdm) -> None:
        self.read()
        line = f'Batch {self.count}/{len(self.loader)}\t {self}'
        if bar.disable and not self.options.quiet:
            print(line)
        elif hasattr(sys.stdout, 'note'):
            sys.stdout.note(line + '\n')
        bar.set_postfix(self.record())

    def _record(self, row: dict[str, float], step: int, board: str) -> None:
        self.table.add(row, [name for name in self.means if name != HIDDEN])
        if not self.options.tensorboard:
            return
        if self.board is None:
            from torch.utils.tensorboard import SummaryWriter  # slow to import

            self.board = SummaryWriter(self.options.save_dir)
        with excused(self.options.save_dir):
            for name, value in row.items():
                if name not in ('epoch', 'batch'):
                    self.board.add_scalar(f'{board}/{name}', value, step)
            self.board.flush()

    def __str__(self) -> str:
        first, *others = (name for name in self.means if name != HIDDEN)
        text = f'Loss {self.means[first].val:.6f} ({self.means[first].avg:.6f})'
        return '\t '.join(
            [text] + [f'{name} {self.means[name].val:.4f} ({self.means[name].avg:.4f})' for name in others]
        )


class _Clock:
    """How long batches take, and how long they are waited for."""

    def __init__(self):
        self.began, self.waited, self.batches = time.perf_counter(), 0.0, 0

    def waiting(self, batches: Iterator) -> Iterator:
        while True:
            asked = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                return
            self.waited += time.perf_counter() - asked
            self.batches += 1
            yield batch

    def read(self) -> tuple[float, float]:
        """Seconds per batch since the last time, and the share of them that was waiting."""
        now = time.perf_counter()
        seconds, batches, waited = now - self.began, self.batches, self.waited
        self.began, self.waited, self.batches = now, 0.0, 0
        return seconds / batches, waited / seconds


class _Table:
    """metrics.csv. The rows of a run that goes on are added to those before."""

    def __init__(self, path: Path):
        self.path = path

    def add(self, row: dict[str, float], losses: list[str]) -> None:
        with excused(self.path), open(self.path, 'a+', newline='', encoding='utf-8') as file:
            file.seek(0)
            columns = next(csv.reader(file), None)
            if not columns:
                columns = ['epoch', 'batch', 'lr', 'images_per_s', 'data_wait', *losses, *FIGURES]
                csv.writer(file).writerow(columns)
            table = csv.DictWriter(file, columns, restval='', extrasaction='ignore')
            table.writerow({name: f'{value:.6g}' for name, value in row.items()})
