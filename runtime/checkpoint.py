"""The state of a run: what is saved and when, what is restored on resuming, and the remaining epochs."""

import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

import weights
from arguments import SaveOptions
from data_manager import digests, fingerprint
from models import loading
from models.layouts import in_training
from models.network import Network
from page import results
from page.runs import VALIDATION
from readers.tree import Dataset
from runtime import best_model, notices
from runtime.device import Run
from runtime.errors import UserError
from runtime.meters import LossMeter
from runtime.provenance import provenance
from runtime.run_folder import BEST, OTHERS, PARTIAL, POSITIONS, TESTS, RunFolder, modified
from runtime.state import Stateful, advance, check, check_saved, restore
from utils import save_checkpoint

HELD_OUT = f'{VALIDATION}/'  # prefix of the names of validation figures


class Checkpoint:
    """The checkpoint files of a run, and its position.

        checkpoint = Checkpoint(dataset, args.save, run, model=model, optimizer=optimizer, scheduler=scheduler)
        for epoch in checkpoint.epochs(args.max_epoch):
            for imgs, pids, draws in meter.watch(trainloader, epoch, checkpoint.start_batch):
                ...
                checkpoint.after_step(epoch, meter)
            checkpoint.tested(epoch, test(model), meter)
        checkpoint.last_test(test, meter)

    Pass everything that has a `state_dict` and changes during training: the `model`, optimizers, schedulers and
    criteria with parameters. With `--resume` or `--auto-resume` their state is restored on construction. With
    `--evaluate`, `model` is then the network of the file, which may be from another project.

    A file is a dict of tensors, numbers, strings and plain containers. `state_dict`, `rank1` (Rank-1 in 0..1) and
    `epoch` (index of the last finished epoch, from 0) have the same meaning as in the original's files. `batch` is the
    number of finished batches of the next epoch, `state` holds the other parts, `best_rank1` is the best Rank-1 so far,
    `arguments` holds every option, `recipe` the options that a resumed run must repeat, `model` the arguments of
    `init_model`, `labels` a digest of the person behind each training label, `provenance` the origin of the file, and
    `written` the time in seconds since 1970.
    If a script gains options, their defaults are assumed for files written before.

    With --validate the best model is chosen by the mAP on the held-out persons: `best_rank1` is then the best mAP,
    `rank1` is None, and `validation` holds the figures of these persons. If nothing is tested, `rank1` is None too.

    Raises:
        UserError: the file cannot be read, does not fit the model, or has a different recipe or different labels.
    """

    def __init__(self, dataset: Dataset, options: SaveOptions, run: Run, *, model: Network, **parts: Stateful):
        self.options, self.run, self.model, self.parts = options, run, model, parts
        self.folder = Path(options.save_dir)
        self.files = RunFolder(self.folder, [options.resume, options.arguments.get('pretrained')])
        self.provenance = {**provenance(run), 'dataset_fingerprint': fingerprint(dataset)}
        self.labels = digests(dataset)
        self.epoch, self.start_batch, self.done = options.start_epoch, 0, 0  # done: batches of this epoch
        self.best_rank1 = -1.0
        self.validated = dataset.validation is not None
        self.judged_by = 'validation mAP' if self.validated else 'Rank-1' if dataset.targets else ''
        self.has_targets = bool(dataset.targets)
        self.saved = time.monotonic()
        self.meter: LossMeter | None = None  # None before the first step
        self.position: Path | None = None  # the file that contains the current state, if there is one
        self.path: str | Path | None  # the file that the run continues from
        self.path, loaded = self.files.newest() if options.auto_resume and not options.evaluate else (None, None)
        self.resumes = loaded is not None
        if options.resume and loaded is None:
            self.path, loaded = options.resume, weights.read(options.resume, options.assume, model.state_dict())
            self.resumes = loaded.state is not None and not (options.evaluate or options.resume_weights_only)
        if loaded:
            print(f"Loading checkpoint from '{self.path}'")
            self._load(loaded)
        if not self.resumes:
            if not options.evaluate:
                self.files.check_named()
            for part in parts.values():
                if isinstance(part, LRScheduler):
                    advance(part, options.start_epoch)

        places = run.stack(torch.tensor([self.epoch, self.start_batch]))  # (world_size, 2)
        if (places != places[0]).any():
            raise UserError(
                f'--save-dir {self.folder}: the processes of the run found different checkpoints there; use a folder '
                f'that all hosts share'
            )

    def _load(self, loaded: weights.Weights) -> None:
        state = loaded.state if self.resumes else None
        if state is not None:
            check(state, self.options, self.provenance, self.labels, self.path)
        where, weights_only = str(self.path), self.options.evaluate or self.options.resume_weights_only
        if self.options.evaluate:
            height, width = (self.options.arguments.get(name, 0) for name in ('height', 'width'))
            network = weights.rebuilt(self.model, loaded, 'arch' in self.options.given, (height, width))
            self.model = self.model if network is self.model else self.run.place(network)
            loading.fit_classifier(self.model, loaded.state_dict, where)
        for notice in loading.load_into(
            self.model, loaded.state_dict, allow_other_classifier=weights_only, where=where
        ):
            print(notice)
        self.model.trained = loaded.trained
        if not weights_only and not self.options.auto_resume:
            self._check_folder(where, state is not None)
        if state is None and not weights_only:
            print(f'{where} has only weights: a new run starts from them, in epoch {self.epoch + 1}')
        print(f'Loaded {loaded.layout}')
        if assumed := loaded.assumed if self.options.evaluate else in_training(loaded.assumed):
            print(f'Assumed, because the file does not record: {", ".join(assumed)}; --assume changes that')
        if state is None:
            return
        for name, part in self.parts.items():
            restore(part, name, state['state'], self.path)
        self.epoch, self.start_batch = state['epoch'] + 1, state.get('batch', 0)
        self.best_rank1 = state['best_rank1']
        origin = state.get('provenance')
        theirs = origin.get('dataset_fingerprint') if isinstance(origin, dict) else None  # someone may have removed it
        if theirs not in (None, self.provenance['dataset_fingerprint']):
            print('The data set has changed since this checkpoint was written: the run continues with different files')
        for notice in notices.of_resumed(loaded.trained, self.options.arguments):
            print(f'Notice: {notice}')
        where = f'after epoch {self.epoch}'
        if self.start_batch:
            where = f'in epoch {self.epoch + 1} after batch {self.start_batch}'
        best = f'; best {self.judged_by} so far {max(self.best_rank1, 0):.1%}' if self.judged_by else ''
        print(f'Continuing {where}{best}')

    def _check_folder(self, where: str, resumes: bool) -> None:
        """Raise UserError if the run of --resume would be mixed with another one in its folder, or remove itself."""
        held = [path for path in sorted(self.folder.glob('*.pth.tar')) if path.resolve() != Path(where).resolve()]
        contains = f'--save-dir {self.folder} contains the checkpoints of a run ({held[0].name})' if held else ''
        if held and not resumes and not self.options.overwrite:
            raise UserError(
                f'--resume {where} has only weights, from which a new run starts, and {contains}: choose another '
                f'folder, or remove them with --overwrite'
            )
        places = Path(where).resolve().parent, Path(where).parent.resolve()  # they differ if the file is a link
        if held and resumes and self.folder.resolve() not in places:
            raise UserError(
                f'--resume {where} continues the run of another folder, and {contains}: continue that one with '
                f'--auto-resume, or choose another folder'
            )
        if resumes and self.options.overwrite:
            raise UserError(f'--overwrite removes a run, and --resume {where} continues one: remove one of the two')

    def epochs(self, max_epoch: int) -> Iterator[int]:
        """The remaining epochs, counted from 0; the first one may start at batch `start_batch`.

        A run that starts from weights alone at `--start-epoch` starts with the learning rate of that epoch.

        Raises:
            UserError: no epochs remain, the disk has no space for a checkpoint, or it could not be read again.
        """
        first = self.epoch
        if first >= max_epoch:
            if self.options.auto_resume and first == max_epoch and not self.start_batch:
                print(f'{self.path}: all {max_epoch} epochs of --max-epoch are finished')
                return
            raise UserError(
                f'{self.path} has finished epoch {first}, and --max-epoch is {max_epoch}: there is nothing left to '
                f'train; raise --max-epoch, or test the file with --evaluate --resume'
            )
        check_saved(self._state(first - 1, self.start_batch, None))
        if self.run.rank == 0:
            self.files.clear(PARTIAL)  # incomplete files left by a killed process
            if self.resumes and self.path:  # perhaps from another folder
                theirs = Path(self.path).with_name('best_model.pth.tar')
                best_model.inherit(theirs, self.folder, self.best_rank1, self.run.unwritten)
        size = sum(tensor.nbytes for tensor in self.model.state_dict().values())
        self.files.check_room(size, self.run, emptied=self.options.overwrite)
        self.saved = time.monotonic()
        self.run.rescue = self.rescue
        for self.epoch in range(first, max_epoch):
            line = f'==> Epoch {self.epoch + 1}/{max_epoch}'
            if self.options.quiet and self.run.log:
                self.run.log.note(line + '\n')
            else:
                print(line)
            self.done = self.start_batch
            if self.start_batch:
                self.position = Path(self.path or '')
                warnings.filterwarnings('ignore', 'Detected call of `lr_scheduler.step')  # optimizer steps came earlier
            yield self.epoch
            self.start_batch = 0
        self.run.rescue = None
        self.run.signals.release()

    def after_step(self, epoch: int, meter: LossMeter) -> None:
        """Save the state every --save-minutes, before a test, and when a signal stops the run.

        An interrupted run resumes after this step. Between a test and the next epoch a signal ends the run immediately.
        """
        self.done, self.position = meter.count, None
        last = self.done == meter.total
        if self.meter is None:
            self.meter = meter
            self._begin(afresh=(epoch, self.done) == (0, 1))
        stop = self.run.stopping(last)
        if stop or (last and self.options.is_tested(epoch)):
            meter.record()  # ends the run if a loss was not finite
            self._save_position()
        elif self.run.rank == 0 and time.monotonic() - self.saved > 60 * self.options.save_minutes:
            self._save_position()
        if stop:
            raise self.run.signals.stop(stop, self.rescue())

    def _begin(self, afresh: bool) -> None:
        """Called after the first step, so that a run that fails immediately deletes nothing of the previous one."""
        if self.run.rank or not self._is_finite():
            return
        if self.options.overwrite and not self.resumes:
            self.files.clear(POSITIONS, TESTS, BEST, OTHERS)
            self.files.clear_results()
        elif afresh:
            self.files.clear(r'metrics\.csv')

    def rescue(self) -> Path | None:
        """Save the state of a failing run unless it is already saved. Returns the file, or None if there is none.

        Nothing is saved in the middle of a step, when BatchNorm has seen the batch and some weights may have changed.
        """
        if self.meter and self.meter.count == self.done and self.position is None:
            if self.run.world_size == 1:  # otherwise it needs the others
                self.meter.record()
            self._save_position()
        return self.position if self.position and self.position.exists() else None

    def _save_position(self) -> None:
        """Write resume_{epoch}_{batch}.pth.tar, counted from 1, and delete all but the newest --keep of these files."""
        self.position = path = self.folder / f'resume_{self.epoch + 1}_{self.done}.pth.tar'
        if self.run.rank or not self._is_finite():
            return
        rank1 = max(self.best_rank1, 0.0) if self.judged_by == 'Rank-1' else None
        if self._write(path, self._state(self.epoch - 1, self.done, rank1)):
            self.files.prune(POSITIONS, self.options.keep, path)
        self.saved = time.monotonic()

    def _write(self, path: Path, state: dict[str, Any], is_best: bool = False) -> bool:
        """Write a file, and return whether this succeeded; a failure is reported, and the run continues."""
        failures = len(self.run.unwritten)
        with self.run.unwritten.excuse(path):
            save_checkpoint(state, is_best, path)
        return len(self.run.unwritten) == failures

    def _is_finite(self) -> bool:
        """Whether losses and weights are finite: a loss can be finite although its gradients are not."""
        modules = [self.model, *(part for part in self.parts.values() if isinstance(part, nn.Module))]
        tensors = [tensor for module in modules for tensor in module.state_dict().values()]
        return self.run.is_healthy() and bool(torch.stack([tensor.isfinite().all() for tensor in tensors]).all())

    def tested(self, epoch: int, figures: dict[str, float], meter: LossMeter) -> None:
        """Write `checkpoint_ep{N}.pth.tar`, N counted from 1, and `best_model.pth.tar` if Rank-1 is the best so far.

        With --validate the mAP on the held-out persons replaces Rank-1; if nothing is tested and there are no figures,
        every epoch is the best one. best_model.pth.tar is a hard link to the checkpoint if the file system supports
        links; with --keep-tests, old checkpoints are then deleted. The first process writes. All processes hold the
        same state, and any number of processes can resume from it.
        """
        self.run.signals.hold()
        rank1 = figures.get('rank1')
        held_out = {name.removeprefix(HELD_OUT): figures[name] for name in figures if name.startswith(HELD_OUT)}
        score = held_out.get('mAP', rank1)
        best, earlier = self.folder / 'best_model.pth.tar', self.best_rank1
        is_best = score is None or score > earlier
        self.position = path = self.folder / f'checkpoint_ep{epoch + 1}.pth.tar'
        if self.run.rank:
            return
        if not is_best and not best.exists():
            is_best = True
            print(f'{best} is missing: the weights of this epoch replace it')
        if is_best and score is not None:
            self.best_rank1 = score
        meter.tested(epoch, figures)
        if not self._is_finite():
            raise UserError(f'weights are not finite after epoch {epoch + 1}; nothing was saved. Try a lower --lr')
        state = self._state(epoch, 0, rank1) | ({'validation': held_out} if held_out else {})
        if not self._write(path, state, is_best):
            self.best_rank1 = earlier  # as best_model.pth.tar was not replaced
        elif self.options.keep_tests:
            self.files.prune(TESTS, self.options.keep_tests, path)
        self.saved = time.monotonic()
        if not figures:
            print(f'{best} has the weights of this epoch, as nothing was tested')
        elif not self.options.no_report:
            results.write_page(self.folder / VALIDATION if held_out else self.folder, self.run.unwritten)

    def last_test(self, test: best_model.LastTest, meter: LossMeter) -> None:
        """With --validate: test best_model.pth.tar on the targets, once, after training.

        Does nothing without --validate or without targets. If a run is resumed after its last epoch, an interrupted
        test is repeated; if the results are complete (recorded in last_test.json), only the row of metrics.csv and the
        page are written if they are missing.

        Raises:
            UserError: there is no best_model.pth.tar, or the test fails.
        """
        if not self.validated or not self.has_targets:
            return
        folders = [self.folder, *([Path(self.path).parent] if self.path else [])]  # if resumed elsewhere
        best, tested, figures = best_model.load(self.model, folders, self.run)
        failures = len(self.run.unwritten)
        if not tested:
            figures = test.last(self.model, {'chosen': best, 'checkpoint': best['file']})
        if self.run.rank:
            return
        record, page = self.folder / best_model.RECORD, self.folder / 'report.html'
        if not tested and len(self.run.unwritten) == failures:  # the results are complete
            with self.run.unwritten.excuse(record):
                best_model.record(best, figures, self.folder)
        if not meter.has_test(best['epoch'] - 1, figures):
            meter.tested(best['epoch'] - 1, figures)
        if not (self.options.no_report or (tested and modified(page) >= modified(record))):
            results.write_page(self.folder, self.run.unwritten)

    def _state(self, epoch: int, batch: int, rank1: float | None) -> dict[str, Any]:
        return {
            'format': weights.FORMAT,
            'model': self.model.made,
            'state_dict': self.model.state_dict(),
            'rank1': rank1,
            'epoch': epoch,
            'batch': batch,
            'best_rank1': self.best_rank1,
            'state': {name: part.state_dict() for name, part in self.parts.items()},
            'arguments': self.options.arguments,
            'recipe': self.options.recipe,
            'labels': self.labels,
            'provenance': self.provenance,
            'written': time.time(),
        }
