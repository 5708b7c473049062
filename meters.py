"""What is shown while training: the lines of the losses."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import launch
from errors import UserError
from utils import AverageMeter


class LossMeter:
    """The losses of a run by name, printed every `print_freq` batches.

        for imgs, pids, draws in meter.watch(trainloader, epoch):
            ...
            meter.update(loss=loss, xent=xent, htri=htri)

    The first name is the loss that is minimised. Values stay on the device until their line is printed, so no step
    waits for the one before, nor for another process: what is shown is the mean over all. `collapsed`, which is 1 where
    the features of a batch are all but equal, is not shown, but said once when it holds for a whole epoch.
    """

    def __init__(self, options: Any):
        self.print_freq = options.print_freq
        self.loader, self.epoch, self.count = None, 0, 0
        self.unread: list[dict[str, Tensor]] = []
        self.means: dict[str, AverageMeter] = {}
        self.warned = False

    def watch(self, loader: Any, epoch: int, start: int = 0) -> Iterator[tuple]:
        """The batches start, start + 1, ... of an epoch; a line after every `print_freq`-th has been trained on.

        Raises:
            UserError: see `read`.
        """
        self.loader, self.epoch, self.means, self.unread = loader, epoch, {}, []
        for self.count, batch in enumerate(loader.epoch(epoch, start), start + 1):
            yield batch
            if self.count % self.print_freq == 0:
                self.read()
                print(f'Batch {self.count}/{len(loader)}\t {self}')
        self.read()
        if 'collapsed' in self.means and self.means['collapsed'].avg == 1 and not self.warned:
            self.warned = True
            print(
                f'Collapse: the network gave all images of a batch all but equal features, through epoch {epoch + 1}. '
                f'Try a lower --lr, pretrained weights, or a few epochs of cross entropy first'
            )

    def update(self, **losses: Tensor) -> None:
        """Take in the 0-dim losses of a batch."""
        self.unread.append({name: value.detach() for name, value in losses.items()})

    def read(self) -> None:
        """Fetch the losses of the batches so far from the device; every process has to.

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
            if not all(map(math.isfinite, row)):
                shown = ', '.join(f'{name} {value}' for name, value in zip(names, row, strict=True))
                raise UserError(
                    f'the loss is not finite in epoch {self.epoch + 1}, batch {batch}/{len(self.loader)} ({shown}); '
                    f'nothing was saved from it. Try a lower --lr, or --precision fp32. Its images: '
                    f'{", ".join(self.loader.paths(self.epoch, batch - 1))}'
                )

    def __str__(self) -> str:
        first, *others = (name for name in self.means if name != 'collapsed')
        text = f'Loss {self.means[first].val:.6f} ({self.means[first].avg:.6f})'
        return '\t '.join(
            [text] + [f'{name} {self.means[name].val:.4f} ({self.means[name].avg:.4f})' for name in others]
        )
