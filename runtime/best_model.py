"""The model chosen by validation, and its single test, which is recorded in last_test.json in the run's folder."""

import contextlib
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch

import weights
from files.writing import Unwritten, write_whole
from models import loading
from models.network import Network
from runtime.device import Run
from runtime.errors import UserError
from utils import read_json, write_json

RECORD = 'last_test.json'
KNOWN_BY = ('epoch', 'validation_mAP')  # rather than by its path, as it may have been moved


class LastTest(Protocol):
    """The test of the model on the targets; `more` is added to results.json."""

    def last(self, model: Network, more: dict[str, object], /) -> dict[str, float]: ...


class Best(NamedTuple):
    """The best model: its file, the epoch (from 1) after which it was chosen, and its mAP on the persons held out.

    `tested`: whether it has already been tested; `figures` are those of that test, in the first process.
    """

    model: dict[str, Any]
    tested: bool
    figures: dict[str, float]


def inherit(theirs: Path, folder: Path, score: float, unwritten: Unwritten) -> None:
    """Copy the best model so far of a run that continues in another folder: best_model.pth.tar, if it has this score.

    If it has another score, it is of a time after the position from which the run continues.
    """
    ours = folder / theirs.name
    if ours.exists() or not theirs.exists():
        return
    with contextlib.suppress(UserError):  # it is damaged
        state = weights.read(theirs).state or {}
        held_out = state.get('validation')
        if score in (held_out.get('mAP') if isinstance(held_out, dict) else None, state.get('rank1')):
            with unwritten.excuse(ours):
                write_whole(ours, lambda path: shutil.copyfile(theirs, path))


def load(model: Network, folders: Sequence[Path], run: Run) -> Best:
    """Load best_model.pth.tar, from the first of `folders` that has one, into the model, in all processes.

    If the first folder has the record of its test, and results, it must not be tested again: the test set is used once.

    Raises:
        UserError: there is no such file, or it cannot be read.
    """
    run.sum(torch.zeros(1))  # wait until the first process, which also reads it, has written it
    best: dict[str, Any] = {'file': '', 'epoch': 1}
    figures: dict[str, float] | None = None
    if run.rank == 0:
        best = _load(model, folders)
        figures = _tested(folders[0], best)
    if run.sum(torch.tensor(int(figures is not None))):
        print(f'{best["file"]} was already tested, see {folders[0] / RECORD}: the test set is used once')
        return Best(best, True, figures or {})
    if run.rank == 0:
        print(
            f'Testing {best["file"]}, chosen after epoch {best["epoch"]} by {best["validation_mAP"]:.1%} mAP on the '
            'persons held out'
        )
    if run.world_size > 1:
        for tensor in model.state_dict().values():
            tensor.copy_(run.sum(tensor if run.rank == 0 else torch.zeros_like(tensor)))
    return Best(best, False, {})


def record(best: dict[str, Any], figures: dict[str, float], folder: Path) -> None:
    """Write the record of the test of `best`, which remains when --evaluate replaces the results.

    Raises OSError if it cannot be written.
    """
    write_json({**{name: best[name] for name in KNOWN_BY}, 'figures': figures}, folder / RECORD)


def _load(model: Network, folders: Sequence[Path]) -> dict[str, Any]:
    names = [folder / 'best_model.pth.tar' for folder in folders]
    path = next((name for name in names if name.exists()), None)
    if path is None:
        raise UserError(f'{names[0]} is missing, so nothing was tested; test another file with --evaluate --resume')
    loaded = weights.read(path)
    for notice in loading.load_into(model, loaded.state_dict, allow_other_classifier=False, where=str(path)):
        print(notice)
    held_out = (loaded.state or {}).get('validation')
    mean_ap = held_out.get('mAP') if isinstance(held_out, dict) else None
    if not isinstance(mean_ap, float) or loaded.epoch is None:
        raise UserError(f'{path} was not chosen by a validation; test it with --evaluate --resume')
    return {'file': str(path), 'epoch': loaded.epoch + 1, 'validation_mAP': mean_ap}


def _tested(folder: Path, best: dict[str, Any]) -> dict[str, float] | None:
    """The figures of the test of `best`; None if `folder` has no record of this test or no results."""
    with contextlib.suppress(OSError, ValueError):
        record = read_json(folder / RECORD)
        if isinstance(record, dict) and (folder / 'results.json').exists():
            figures = record.get('figures')
            if isinstance(figures, dict) and all(record.get(name) == best[name] for name in KNOWN_BY):
                return figures
    return None
