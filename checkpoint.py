"""The state of a run: what is saved and when, what a resume restores, and the epochs and batches that are left."""

import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler

import results
import signals
import weights
from data_manager import fingerprint
from errors import UserError
from files import excused
from utils import save_checkpoint

FORMAT = 'deep-person-reid 1'


class Checkpoint:
    """The files of a run and its place in them.

        checkpoint = Checkpoint(dataset, args.save, run, model=model, optimizer=optimizer, scheduler=scheduler)
        for epoch in checkpoint.epochs(args.max_epoch):
            for imgs, pids, draws in checkpoint.batches(trainloader, epoch, meter):
                ...
            checkpoint.tested(epoch, test(model))

    Everything that has a `state_dict` and changes while training is named here: `model` first of all, then optimizers,
    schedulers and criteria with parameters. With `--resume` or `--auto-resume` their state is restored on construction.

    A file is a dict of tensors, numbers, strings and plain containers. `state_dict`, `rank1` (Rank-1 in 0..1) and
    `epoch` (index of the epoch just finished, from 0) mean what they mean in the original's files; `batch` is how many
    batches of the next epoch are done as well, `state` holds the other parts, `best_rank1` the best of all tests so
    far, `arguments` every option, `recipe` those that a resume must repeat, and `provenance` what made the file. A
    script may gain options: in a file that it wrote before, they have their defaults.

    Raises:
        UserError: the file cannot be read or does not fit the model, or its recipe is another one.
    """

    def __init__(self, dataset: Any, options: Any, run: Any, *, model: torch.nn.Module, **parts: Any):
        self.options, self.run, self.model, self.parts = options, run, model, parts
        self.provenance = {**run.provenance(), 'dataset_fingerprint': fingerprint(dataset)}
        self.start_epoch, self.start_batch = options.start_epoch, 0
        self.best_rank1 = -1.0
        self.saved = time.monotonic()
        self.meter = None
        self.begun = False  # a step was taken
        self.path, found = self._newest() if options.auto_resume and not options.evaluate else (None, None)
        goes_on = found is not None
        if options.resume and not goes_on:
            self.path, found = options.resume, weights.read(options.resume)
            goes_on = found.state is not None and not (options.evaluate or options.resume_weights_only)
        if found:
            print(f"Loading checkpoint from '{self.path}'")
            self._load(found, goes_on and not options.evaluate)

        places = run.stack(torch.tensor([self.start_epoch, self.start_batch]))  # (world_size, 2)
        if (places != places[0]).any():
            raise UserError(
                f'--save-dir {options.save_dir}: the processes of the run found different checkpoints there; use a '
                f'folder that all hosts share'
            )

    def _newest(self) -> tuple[Path | None, weights.Weights | None]:
        """The checkpoint in --save-dir that was written last and is whole."""
        for path in sorted(Path(self.options.save_dir).glob('*_*.pth.tar'), key=_age):
            if path.name == 'best_model.pth.tar':
                continue
            try:
                found = weights.read(path)
            except UserError as damage:
                print(f'Passed over: {damage}')
                continue
            if found.state is not None:
                return path, found
        print(f'No checkpoint in {self.options.save_dir}: beginning')
        return None, None

    def _load(self, found: weights.Weights, goes_on: bool) -> None:
        if goes_on:
            _check_entries(found.state, self.path)
            theirs = found.state['recipe']
            if _script(found.state.get('provenance')) == _script(self.provenance):
                theirs = self.options.defaults | theirs  # options that the script has gained since
            _check_recipe(theirs, self.options.recipe, self.path)
        weights_only = self.options.evaluate or self.options.resume_weights_only
        for notice in weights.load_into(
            self.model, found.state_dict, allow_other_classifier=weights_only, where=str(self.path)
        ):
            print(notice)
        print(f'Loaded {found.layout}')
        if not goes_on:
            for part in self.parts.values():
                if isinstance(part, LRScheduler):
                    _advance(part, self.options.start_epoch)
            return
        for name, part in self.parts.items():
            _restore(part, name, found.state['state'], self.path)
        self.start_epoch, self.start_batch = found.epoch + 1, found.state.get('batch', 0)
        self.best_rank1 = found.state['best_rank1']
        theirs = found.state.get('provenance', {}).get('dataset_fingerprint')
        if theirs not in (None, self.provenance['dataset_fingerprint']):
            print('The data set has changed since this checkpoint was written: the run goes on with other files')
        where = f'after epoch {self.start_epoch}'
        if self.start_batch:
            where = f'in epoch {self.start_epoch + 1} after batch {self.start_batch}'
        print(f'Going on {where}; best Rank-1 so far {max(self.best_rank1, 0):.1%}')

    def epochs(self, max_epoch: int) -> Iterator[int]:
        """The epochs that are left, counted from 0.

        A run that starts from weights alone at `--start-epoch` has the learning rate of that epoch.
        """
        if self.start_epoch >= max_epoch:
            if self.options.auto_resume:
                print(f'{self.path} has finished all of --max-epoch {max_epoch} epochs')
                return
            raise UserError(
                f'--resume {self.options.resume} has finished epoch {self.start_epoch} of --max-epoch {max_epoch}: '
                f'there is nothing left to train; raise --max-epoch'
            )
        if self.run.rank == 0:
            self._clear('.*.pth.tar.*')  # what a killed process left half written
        self.saved = time.monotonic()
        for epoch in range(self.start_epoch, max_epoch):
            signals.hold()
            print(f'==> Epoch {epoch + 1}/{max_epoch}')
            yield epoch
        signals.release()

    def _begin(self, afresh: bool) -> None:
        """After the first step, not before: a run that fails at once destroys nothing of the one that was there."""
        self.begun = True
        if self.run.rank or not self._is_finite():
            return
        if self.options.overwrite and (not self.options.resume or self.options.resume_weights_only):
            self._clear('*.pth.tar', 'metrics.csv', 'events.out.tfevents.*', *results.FILES)
        elif afresh:
            self._clear('metrics.csv')

    def _clear(self, *patterns: str) -> None:
        begun_with = [Path(path or '').resolve() for path in (self.path, self.options.arguments.get('pretrained'))]
        for pattern in patterns:
            for path in Path(self.options.save_dir).glob(pattern):
                if path.resolve() not in begun_with:
                    path.unlink()

    def batches(self, loader: Any, epoch: int, meter: Any) -> Iterator[tuple]:
        """The batches of the epoch that are left.

        After the step on each of them the run stops if a signal asked for it, and what is needed to go on from here is
        saved: then, every --save-minutes, before a test, and when the next batch cannot be had. From before a test
        until the next epoch a signal ends the run at once.
        """
        start, self.start_batch, self.meter = self.start_batch, 0, meter
        done, tested = start, epoch in self.options.test_epochs
        if start == len(loader):  # all steps were taken before the interruption; the scheduler's is next
            warnings.filterwarnings('ignore', 'Detected call of `lr_scheduler.step')
        try:
            for batch in meter.watch(loader, epoch, start, self._lr()):
                yield batch
                done += 1
                if not self.begun:
                    self._begin(afresh=(epoch, start) == (0, 0))
                last = done == len(loader)
                stop = self.run.stopping(last)
                saved = None
                if stop or (last and tested):
                    meter.record()  # which ends the run if a loss was not finite
                    saved = self._save_position(epoch, done)
                elif self.run.rank == 0 and time.monotonic() - self.saved > 60 * self.options.save_minutes:
                    self._save_position(epoch, done)
                if stop:
                    raise signals.Stopped(stop, saved, together=True)
        except UserError:  # an image that cannot be read, a worker that was killed
            if self.begun and (saved := self._save_position(epoch, done)):
                if self.run.world_size == 1:
                    meter.record()
                print(f'Saved {saved}, from which --auto-resume goes on')
            raise
        if tested:
            signals.release()

    def _save_position(self, epoch: int, done: int) -> Path | None:
        """Write resume_{epoch}_{batch}.pth.tar, both counted from 1; then drop older ones than the newest --keep."""
        path = Path(self.options.save_dir) / f'resume_{epoch + 1}_{done}.pth.tar'
        if self.run.rank or not self._is_finite():
            return None
        with excused(path):
            save_checkpoint(self._state(epoch - 1, done, max(self.best_rank1, 0.0)), False, path)
            for old in sorted(path.parent.glob('resume_*_*.pth.tar'), key=_age)[self.options.keep :]:
                old.unlink()
        self.saved = time.monotonic()
        return path if path.exists() else None

    def _is_finite(self) -> bool:
        """Whether losses and weights are: a loss can be where its gradients are not."""
        modules = [self.model, *(part for part in self.parts.values() if isinstance(part, torch.nn.Module))]
        tensors = [tensor for module in modules for tensor in module.state_dict().values()]
        return self.run.is_healthy() and bool(torch.stack([tensor.isfinite().all() for tensor in tensors]).all())

    def _lr(self) -> float:
        optimizers = (part for part in self.parts.values() if isinstance(part, torch.optim.Optimizer))
        return next(optimizers).param_groups[0]['lr']

    def tested(self, epoch: int, figures: dict[str, float]) -> None:
        """Write `checkpoint_ep{N}.pth.tar`, N counted from 1, and `best_model.pth.tar` if Rank-1 is the best so far.

        The first process writes. All hold the same state, and any number of them can go on from it.
        """
        signals.hold()
        rank1 = figures['rank1']
        is_best = rank1 > self.best_rank1
        self.best_rank1 = max(rank1, self.best_rank1)
        if self.run.rank:
            return
        if self.meter:
            self.meter.tested(epoch, figures)
        if not self._is_finite():
            raise UserError(f'weights are not finite after epoch {epoch + 1}; nothing was saved. Try a lower --lr')
        path = Path(self.options.save_dir) / f'checkpoint_ep{epoch + 1}.pth.tar'
        with excused(path):
            save_checkpoint(self._state(epoch, 0, rank1), is_best, path)
        self.saved = time.monotonic()
        if not self.options.no_report:
            results.write_page(self.options.save_dir)

    def _state(self, epoch: int, batch: int, rank1: float) -> dict:
        return {
            'format': FORMAT,
            'state_dict': self.model.state_dict(),
            'rank1': rank1,
            'epoch': epoch,
            'batch': batch,
            'best_rank1': self.best_rank1,
            'state': {name: part.state_dict() for name, part in self.parts.items()},
            'arguments': self.options.arguments,
            'recipe': self.options.recipe,
            'provenance': self.provenance,
        }


def _age(path: Path) -> tuple:
    """Sorts the newest first."""
    return -path.stat().st_mtime_ns, path.name


ENTRIES = {'recipe': dict, 'state': dict, 'epoch': int, 'best_rank1': int | float}  # what a run goes on from


def _check_entries(state: dict, where: str | Path) -> None:
    """Refuse a file of this project's format that somebody has changed."""
    wrong = [repr(name) for name, kind in ENTRIES.items() if not isinstance(state.get(name), kind)]
    if wrong:
        raise UserError(
            f'--resume {where}: its {", ".join(wrong)} cannot be gone on from; get the file again, or take its weights '
            f'alone with --resume-weights-only'
        )


def _script(provenance: Any) -> str | None:
    """The name of the script that wrote a file; None if its provenance, which anybody may have changed, has none."""
    match provenance:
        case {'command': [str(script), *_]}:
            return Path(script).name
    return None


def _check_recipe(theirs: dict, ours: dict, where: str | Path) -> None:
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


def _restore(part, name: str, states: dict, where: str | Path) -> None:
    if name not in states:
        raise UserError(f'--resume {where} has no state for {name!r}: it was written by another script')
    try:
        part.load_state_dict(states[name])
    except (ValueError, KeyError, RuntimeError, TypeError, AttributeError) as problem:
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
