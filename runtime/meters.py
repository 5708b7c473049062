"""The output of training: loss lines, a progress bar on terminals, metrics.csv and TensorBoard files."""

import contextlib
import csv
import importlib.util
import io
import math
import os
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer
from tqdm import tqdm

from arguments import ShowOptions
from eval_metrics import METRICS
from files.writing import write_whole
from page.runs import VALIDATION, complete_lines
from runtime.device import Run
from runtime.errors import UserError
from utils import AverageMeter

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

OF_TRAINING = ('epoch', 'batch', 'lr', 'images_per_s', 'data_wait')  # the columns of metrics.csv, before the losses
OF_TESTS = [metric.name for metric in METRICS]  # behind them
HIDDEN = 'collapsed'  # not logged; triggers a warning
BAR = '{desc}: {n_fmt}/{total_fmt} |{bar}| {elapsed}{postfix}'  # in 80 columns, only the losses are truncated


class Loader(Protocol):
    """A source of the batches of an epoch, such as `dataset_loader.TrainLoader`."""

    def __len__(self) -> int: ...

    def epoch(self, epoch: int, start: int) -> Iterator[tuple]: ...

    def paths(self, epoch: int, batch: int) -> list[str]: ...


def bar_over(batches: Iterable | None, text: str, quiet: bool, **kwargs: object) -> tqdm:
    """A progress bar over `batches`, shown on the terminal of the first process only, not in a pipe or a log."""
    return tqdm(batches, desc=text, disable=quiet or not sys.stdout.isatty(), leave=False, **kwargs)


class LossMeter:
    """The losses of a run by name, printed every `print_freq` batches.

        for imgs, pids, draws in meter.watch(trainloader, epoch):
            ...
            meter.update(loss=loss, xent=xent, htri=htri)

    The first name is the loss that is minimised. Values stay on the device until they are printed, so no step waits for
    the previous one or for another process; means over all processes are shown. `collapsed`, which is 1 if the features
    of a batch are nearly equal, is not logged; if it is 1 for a whole epoch, a warning is printed once.

    On a terminal a progress bar replaces the lines, which are then only logged; `quiet` prints neither. metrics.csv has
    a row for each line, for the rest of an epoch, and for each test. Each tested data set except the first one has its
    own columns for its figures, such as market1501/rank1, and so have the persons held out for validation, such as
    validation/rank1.

    Attributes:
        count, total: number of batches of the current epoch that were started, and in total.

    Raises:
        UserError: TensorBoard is requested but not installed.
    """

    def __init__(self, options: ShowOptions, run: Run, optimizer: Optimizer):
        self.options, self.run, self.optimizer = options, run, optimizer
        self.loader: Loader | None = None
        self.epoch = self.count = self.total = 0
        self.unread: list[dict[str, Tensor]] = []  # on the device
        self.unrecorded: list[dict[str, float]] = []  # read, but not yet in metrics.csv
        self.means: dict[str, AverageMeter] = {}
        self.warned = False
        self.began, self.waited, self.timed = time.perf_counter(), 0.0, 0  # since the last record; timed: batches
        self.path = Path(options.save_dir) / 'metrics.csv'
        if options.tensorboard and not importlib.util.find_spec('tensorboard'):
            raise UserError('--tensorboard needs the package tensorboard: pip install tensorboard, or omit the option')
        self.board: SummaryWriter | None = None

    def watch(self, loader: Loader, epoch: int, start: int = 0) -> Iterator[tuple]:
        """The batches start, start + 1, ... of an epoch; after every `print_freq`-th the losses are printed.

        Raises:
            UserError: see `read`.
        """
        self.loader, self.epoch, self.count, self.total = loader, epoch, start, len(loader)
        self.means, self.unread, self.unrecorded = {}, [], []
        self.began, self.waited, self.timed = time.perf_counter(), 0.0, 0
        batches, text = loader.epoch(epoch, start), f'Epoch {epoch + 1}/{self.options.max_epoch}'
        with bar_over(None, text, self.options.quiet, total=self.total, initial=start, bar_format=BAR) as bar:
            while True:
                asked = time.perf_counter()
                batch = next(batches, None)
                if batch is None:
                    break
                self.waited += time.perf_counter() - asked
                self.timed += 1
                self.count += 1
                self.run.signals.hold()  # until a test: from now on a step is finished before the run ends
                yield batch
                bar.update()
                if self.count % self.options.print_freq == 0:
                    self._print(bar)
        self.record()
        if HIDDEN in self.means and self.means[HIDDEN].avg == 1 and not (start or self.warned):
            self.warned = True
            print(
                f'Collapse: throughout epoch {epoch + 1} the network gave nearly equal features to all images of a '
                f'batch. Try a lower --lr, pretrained weights, or a few epochs of cross entropy first'
            )

    def update(self, **losses: Tensor) -> None:
        """Add the losses of a batch, each 0-dim."""
        # Cloned because a CUDA graph overwrites its output.
        self.unread.append({name: value.detach().clone() for name, value in losses.items()})

    def read(self) -> None:
        """Read the losses since the last call from the device. Every process must call this.

        Raises:
            UserError: a loss was not finite in some process. The message gives epoch, batch and images. The weights are
                those before that batch; all later steps were skipped.
        """
        if not self.unread:
            return
        names = list(self.unread[0])
        rows = torch.stack([torch.stack([row[name].float() for name in names]) for row in self.unread])
        means, self.unread = self.run.mean(rows).tolist(), []
        for batch, row in enumerate(means, self.count - len(means) + 1):
            for name, value in zip(names, row, strict=True):
                self.means.setdefault(name, AverageMeter()).update(value)
            self.unrecorded.append(dict(zip(names, row, strict=True)))
            if not all(map(math.isfinite, row)):
                shown = ', '.join(f'{name} {value}' for name, value in zip(names, row, strict=True))
                images = self.loader.paths(self.epoch, batch - 1) if self.loader else []
                raise UserError(
                    f'the loss is not finite in epoch {self.epoch + 1}, batch {batch}/{self.total} ({shown}); that '
                    f'step and all later ones were skipped. Try a lower --lr, or --precision fp32. Images of the '
                    f'batch: {", ".join(images)}'
                )

    def record(self) -> dict[str, str]:
        """Append the losses since the last call to metrics.csv. Every process must call this. Returns the values shown
        on the progress bar, by name.

        Raises UserError as `read` does.
        """
        self.read()
        rows, self.unrecorded = self.unrecorded, []
        if not rows or self.run.rank:
            return {}
        losses = {name: sum(row[name] for row in rows) / len(rows) for name in rows[0] if name != HIDDEN}
        now = time.perf_counter()
        seconds = (now - self.began) / self.timed  # per batch
        wait = self.waited / (now - self.began)  # share of time spent waiting for batches
        self.began, self.waited, self.timed = now, 0.0, 0
        speed, lr = self.options.train_batch / seconds, self.optimizer.param_groups[0]['lr']
        row = {'epoch': self.epoch + 1, 'batch': self.count, 'lr': lr, 'images_per_s': speed, 'data_wait': wait}
        self._record(row | losses, self.epoch * self.total + self.count, 'train')
        left = self.total * (self.options.max_epoch - self.epoch) - self.count
        shown = {'left': tqdm.format_interval(left * seconds), 'img/s': f'{speed:.0f}', 'wait': f'{wait:.0%}'}
        return shown | {name: f'{value:.3f}' for name, value in losses.items()}

    def tested(self, epoch: int, figures: dict[str, float]) -> None:
        """Record the figures of the test after `epoch` (from 0); called only in the first process."""
        if figures:
            batches = self.total or self._batches()  # of an epoch
            self._record({'epoch': epoch + 1, **figures}, (epoch + 1) * batches, 'test')

    def has_test(self, epoch: int, figures: dict[str, float]) -> bool:
        """Whether metrics.csv has the row of a test after `epoch` (from 0) with these figures."""
        row = _as_text({'epoch': epoch + 1, **figures})
        return any(all(other.get(name, text) == text for name, text in row.items()) for other in self._rows())

    def _batches(self) -> int:
        """Batches per epoch according to metrics.csv, for a process that has trained none; 1 if there is no row."""
        return max([int(row['batch']) for row in self._rows() if (row.get('batch') or '').isdecimal()], default=1)

    def _rows(self) -> list[dict[str, str]]:
        """The complete rows of metrics.csv; none if it cannot be read."""
        with contextlib.suppress(OSError, ValueError, csv.Error):
            return list(csv.DictReader(io.StringIO(complete_lines(self.path), newline='')))
        return []

    def _print(self, bar: tqdm) -> None:
        self.read()
        line = f'Batch {self.count}/{self.total}\t {self}'
        if bar.disable and not self.options.quiet:
            print(line)
        elif self.run.log:
            self.run.log.note(line + '\n')
        bar.set_postfix(self.record())

    def _record(self, row: dict[str, float], step: int, board: str) -> None:
        with self.run.unwritten.excuse(self.path):
            try:
                self._add(row)
            except (ValueError, csv.Error) as problem:  # another program changed the file
                raise OSError(f'it is not the table of a run ({problem}); move it away') from problem
        if not self.options.tensorboard:
            return
        with self.run.unwritten.excuse(self.options.save_dir):
            if self.board is None:
                from torch.utils.tensorboard import SummaryWriter  # slow to import

                self.board = SummaryWriter(self.options.save_dir)
            for name, value in row.items():
                if name not in ('epoch', 'batch'):
                    held_out = name.startswith(f'{VALIDATION}/')  # a validation is not a test
                    self.board.add_scalar(name if held_out else f'{board}/{name}', value, step)
            self.board.flush()

    def _add(self, row: dict[str, float]) -> None:
        """Add a row to metrics.csv. A resumed run appends its rows to the existing ones.

        Columns that are missing are added: the losses and tested data sets are not known before their first rows.
        """
        with contextlib.suppress(FileNotFoundError):
            if (whole := len(complete_lines(self.path).encode())) < self.path.stat().st_size:
                os.truncate(self.path, whole)
        known: list[str] = []
        with contextlib.suppress(FileNotFoundError), open(self.path, newline='', encoding='utf-8') as file:
            known = next(csv.reader(file), [])
        columns = known or [*OF_TRAINING, *OF_TESTS]
        at = columns.index(OF_TESTS[0]) if OF_TESTS[0] in columns else len(columns)
        new = [name for name in row if name not in columns]
        columns = [
            *columns[:at], *(name for name in new if '/' not in name),  # losses
            *columns[at:], *(name for name in new if '/' in name),  # figures of further data sets
        ]  # fmt: skip
        if known and columns != known:
            with open(self.path, newline='', encoding='utf-8') as file:
                rows = list(csv.DictReader(file))
            write_whole(self.path, lambda path: _write_rows(path, columns, rows))
        with open(self.path, 'a', newline='', encoding='utf-8') as file:
            table = csv.DictWriter(file, columns)
            if not known:
                table.writeheader()
            table.writerow(_as_text(row))

    def __str__(self) -> str:
        first, *others = (name for name in self.means if name != HIDDEN)
        text = f'Loss {self.means[first].val:.6f} ({self.means[first].avg:.6f})'
        return '\t '.join(
            [text] + [f'{name} {self.means[name].val:.4f} ({self.means[name].avg:.4f})' for name in others]
        )


def _as_text(row: dict[str, float]) -> dict[str, str]:
    return {name: f'{value:.6g}' for name, value in row.items()}


def _write_rows(path: Path, columns: list[str], rows: list[dict[str, str]]) -> None:
    with open(path, 'w', newline='', encoding='utf-8') as file:
        table = csv.DictWriter(file, columns, extrasaction='ignore')  # what a damaged row has beyond the header
        table.writeheader()
        table.writerows(rows)
