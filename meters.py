"""What is shown while training: the lines of the losses."""

import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

import launch
from errors import UserError
from utils import AverageMeter


class LossMeter:
    """The losses of a run by name, printed every `print_freq` batches.

        for imgs, pids, draws in meter.watch(checkpoint.batches(trainloader), epoch):
            ...
            meter.update(loss=loss, xent=xent, htri=htri)

    The first name is the loss that is minimised. Values stay on the device until their line is printed, so no step
    waits for the one before, nor for another process: what is shown is the mean over all.
    """

    def __init__(self, options, num_batches: int):
        self.print_freq = options.print_freq
        self.num_batches = num_batches
        self.unread: list[dict[str, Tensor]] = []
        self.means: dict[str, AverageMeter] = {}

    def watch(self, batches: Iterable[tuple], epoch: int, start: int = 0) -> Iterator[tuple]:
        """Pass on the batches of an epoch; print a line after every `print_freq`-th has been trained on.

        Raises:
            UserError: a loss was not finite. It names epoch and batch; the weights are those before that batch, and all
                steps since then did nothing.
        """
        self.means, self.unread = {}, []
        for count, batch in enumerate(batches, start + 1):
            yield batch
            if count % self.print_freq == 0:
                self._read(epoch, count)
                print(f'Batch {count}/{self.num_batches}\t {self}')
        self._read(epoch, self.num_batches)

    def update(self, **losses: Tensor) -> None:
        """Take in the 0-dim losses of a batch."""
        self.unread.append({name: value.detach() for name, value in losses.items()})

    def _read(self, epoch: int, count: int) -> None:
        if not self.unread:
            return
        names = list(self.unread[0])
        rows = torch.stack([torch.stack([row[name].float() for name in names]) for row in self.unread])
        rows = launch.mean(rows).tolist()
        for batch, row in enumerate(rows, count - len(rows) + 1):
            for name, value in zip(names, row, strict=True):
                self.means.setdefault(name, AverageMeter()).update(value)
            if not all(map(math.isfinite, row)):
                shown = ', '.join(f'{name} {value}' for name, value in zip(names, row, strict=True))
                raise UserError(
                    f'the loss is not finite in epoch {epoch + 1}, batch {batch}/{self.num_batches} ({shown}); '
                    f'nothing was saved from it. Try a lower --lr, or --precision fp32'
                )
        self.unread = []

    def __str__(self) -> str:
        first, *others = self.means
        text = f'Loss {self.means[first].val:.6f} ({self.means[first].avg:.6f})'
        return '\t '.join(
            [text] + [f'{name} {self.means[name].val:.4f} ({self.means[name].avg:.4f})' for name in others]
        )
