"""The model that a validation chose, and its only test."""

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

import weights
from models import loading
from models.network import Network
from runtime.device import Run
from runtime.errors import UserError
from utils import read_json


class LastTest(Protocol):
    """The test of the model on the data sets that are tested; `more` is added to results.json."""

    def last(self, model: Network, more: dict[str, object], /) -> dict[str, float]: ...


def load(model: Network, folders: Sequence[Path], run: Run) -> dict[str, Any] | None:
    """Give the model, in all processes, the weights of best_model.pth.tar in the first of `folders` that has one.

    Returns its file, the epoch (from 1) after which it was chosen, and its mAP on the persons held out. None if
    results.json in the first folder is of it already: the test set is used once.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    run.sum(torch.zeros(1))  # the first process, which reads, has written it
    best: dict[str, Any] = {'file': '', 'epoch': 1}
    if run.rank == 0:
        best = _load(model, folders)
    done = run.rank == 0 and _tested(folders[0]) == _told(best)
    if run.sum(torch.tensor(int(done))):
        print(f'{folders[0] / "results.json"} is of {best["file"]}: the test set is used once')
        return None
    if run.rank == 0:
        print(
            f'Testing {best["file"]}, chosen after epoch {best["epoch"]} by {best["validation_mAP"]:.1%} mAP on the '
            'persons held out'
        )
    if run.world_size > 1:
        for tensor in model.state_dict().values():
            tensor.copy_(run.sum(tensor if run.rank == 0 else torch.zeros_like(tensor)))
    return best


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


def _tested(folder: Path) -> object:
    """What results.json in `folder` tells of the model that was tested; None if there is no such file."""
    with contextlib.suppress(OSError, ValueError):
        found = read_json(folder / 'results.json')
        return _told(found.get('chosen')) if isinstance(found, dict) else None
    return None


def _told(chosen: object) -> object:
    """Without the file, which may have been moved."""
    return {name: value for name, value in chosen.items() if name != 'file'} if isinstance(chosen, dict) else None
