"""The state of a run: what is saved, what a resume restores, and the epochs and batches that are left."""

import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch.optim.lr_scheduler import LRScheduler

import launch
import weights
from errors import UserError
from utils import save_checkpoint

FORMAT = 'deep-person-reid 1'


class Checkpoint:
    """The files of a run and its place in them.

        checkpoint = Checkpoint(args.save, model=model, optimizer=optimizer, scheduler=scheduler)
        for epoch in checkpoint.epochs(args.max_epoch):
            ...
            checkpoint.tested(epoch, rank1)

    Everything that has a `state_dict` and changes while training is named here: `model` first of all, then optimizers,
    schedulers and criteria with parameters. With `--resume` their state is restored on construction.

    A file is a dict of tensors, numbers, strings and plain containers. `state_dict`, `rank1` (Rank-1 in 0..1) and
    `epoch` (index of the epoch just finished, from 0) mean what they mean in the original's files; `state` holds the
    other parts, `best_rank1` the best of all tests so far, `arguments` every option, `recipe` those that a resume must
    repeat.

    Raises:
        UserError: the file cannot be read or does not fit the model, or its recipe is another one.
    """

    def __init__(self, options, *, model: torch.nn.Module, **parts):
        self.options = options
        self.model = model
        self.parts = parts
        self.start_epoch = options.start_epoch
        self.best_rank1 = -1.0
        if options.resume:
            print(f"Loading checkpoint from '{options.resume}'")
            self._load(weights.read(options.resume))

    def _load(self, found: weights.Weights) -> None:
        options = self.options
        weights_only = options.evaluate or options.resume_weights_only
        goes_on = found.state is not None and not weights_only
        if goes_on:
            _check_recipe(found.state['recipe'], options.recipe, options.resume)
        notices = weights.load_into(
            self.model, found.state_dict, allow_other_classifier=weights_only, where=options.resume
        )
        for notice in notices:
            print(notice)
        print(f'Loaded {found.layout}')
        if options.start_epoch and not goes_on:
            for part in self.parts.values():
                if isinstance(part, LRScheduler):
                    _advance(part, options.start_epoch)
        if goes_on:
            for name, part in self.parts.items():
                _restore(part, name, found.state['state'], options.resume)
            self.start_epoch = found.epoch + 1
            self.best_rank1 = found.state['best_rank1']
            print(f'Going on after epoch {self.start_epoch}; best Rank-1 so far {max(self.best_rank1, 0):.1%}')

    def epochs(self, max_epoch: int) -> Iterator[int]:
        """The epochs that are left, counted from 0.

        A run that starts from weights alone at `--start-epoch` has the learning rate of that epoch.
        """
        if self.start_epoch >= max_epoch:
            raise UserError(
                f'--resume {self.options.resume} has finished epoch {self.start_epoch} of --max-epoch {max_epoch}: '
                f'there is nothing left to train; raise --max-epoch'
            )
        if self.options.overwrite and not self.options.resume and launch.is_first():
            for path in Path(self.options.save_dir).glob('*.pth.tar'):
                path.unlink()
        for epoch in range(self.start_epoch, max_epoch):
            print(f'==> Epoch {epoch + 1}/{max_epoch}')
            yield epoch

    def batches(self, loader, epoch: int) -> Iterable[tuple]:
        """The batches of the epoch that are left."""
        return loader.epoch(epoch)

    def tested(self, epoch: int, rank1: float) -> None:
        """Write `checkpoint_ep{N}.pth.tar`, N counted from 1, and `best_model.pth.tar` if Rank-1 is the best so far.

        The first process writes. All hold the same state, and any number of them can go on from it.
        """
        is_best = rank1 > self.best_rank1
        self.best_rank1 = max(rank1, self.best_rank1)
        if not launch.is_first():
            return
        state = {
            'format': FORMAT,
            'state_dict': self.model.state_dict(),
            'rank1': rank1,
            'epoch': epoch,
            'best_rank1': self.best_rank1,
            'state': {name: part.state_dict() for name, part in self.parts.items()},
            'arguments': self.options.arguments,
            'recipe': self.options.recipe,
        }
        if not all(bool(torch.isfinite(tensor).all()) for tensor in state['state_dict'].values()):
            raise UserError(f'weights are not finite after epoch {epoch + 1}; nothing was saved. Try a lower --lr')
        save_checkpoint(state, is_best, Path(self.options.save_dir) / f'checkpoint_ep{epoch + 1}.pth.tar')


def _check_recipe(theirs: dict, ours: dict, where: str) -> None:
    """Refuse to go on with another learning rate, seed, data set ... than the run began with."""
    differences = [
        f'--{name.replace("_", "-")} was {theirs.get(name, "not an option")}, is {ours.get(name, "not an option")}'
        for name in sorted({*theirs, *ours})
        if theirs.get(name) != ours.get(name)
    ]
    if differences:
        raise UserError(
            f'--resume {where}: the run has another recipe: {"; ".join(differences)}. Give its values, or begin a run '
            f'of its own from these weights with --resume-weights-only'
        )


def _restore(part, name: str, states: dict, where: str) -> None:
    if name not in states:
        raise UserError(f'--resume {where} has no state for {name!r}: it was written by another script')
    try:
        part.load_state_dict(states[name])
    except (ValueError, KeyError, RuntimeError) as problem:
        raise UserError(
            f'--resume {where}: its state of {name!r} does not fit: {" ".join(str(problem).split())}'
        ) from None
    if isinstance(part, torch.optim.Optimizer):
        _match_strides(part)


def _advance(scheduler: LRScheduler, epochs: int) -> None:
    """Bring the learning rate of a run that starts from weights alone to that of its first epoch."""
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # "step of the schedule before one of the optimizer": it is meant
        for _ in range(epochs):
            scheduler.step()


def _match_strides(optimizer: torch.optim.Optimizer) -> None:
    """Give the moments the memory layout of their parameter.

    A fused step walks both as flat memory: moments from an NCHW file beside a channels_last weight would be applied to
    the wrong elements, silently.
    """
    for param, state in optimizer.state.items():
        for name, value in state.items():
            if torch.is_tensor(value) and value.shape == param.shape and value.stride() != param.stride():
                state[name] = torch.empty_like(param).copy_(value)
