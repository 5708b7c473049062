"""The saved state of a run: checks it against the current run, and restores it into the parts of the run."""

import math
import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from types import NoneType
from typing import Any, Protocol

import numpy as np
import torch
from torch.optim.lr_scheduler import LRScheduler

from arguments import SaveOptions
from runtime.errors import UserError
from runtime.values import MOST_INT

# The entries that a run needs to continue, and what they must be. `batch` is 0 if a file does not have it.
ENTRIES: dict[str, Callable[[Any], bool]] = {
    'recipe': lambda value: isinstance(value, dict) and all(isinstance(name, str) for name in value),
    'state': lambda value: isinstance(value, dict),
    'epoch': lambda value: isinstance(value, int) and -1 <= value <= MOST_INT,
    'batch': lambda value: isinstance(value, int) and 0 <= value <= MOST_INT,
    'best_rank1': lambda value: isinstance(value, int | float) and math.isfinite(value),
}

# What `weights.read` accepts
SIMPLE = {str, int, float, bool, NoneType, np.float32, np.float64}
SAVED_DTYPES = (
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool,
)  # fmt: skip
CONTAINERS = {dict, OrderedDict, Counter, list, tuple}


class Stateful(Protocol):
    """A part of a run that changes during training: a model, an optimizer, a schedule, a criterion with parameters."""

    def state_dict(self) -> Mapping[str, Any]: ...

    def load_state_dict(self, state_dict: Any, /) -> object: ...


def check(
    state: dict[str, Any], options: SaveOptions, provenance: object, labels: list[str], where: str | Path | None
) -> None:
    """Raise UserError if a file of this project was altered, or its run had a different recipe or different labels.

    provenance: of the current run
    labels: of the current run: for each label the digest of the person behind it

    Options that the script gained after the file was written have their defaults.
    """
    wrong = [repr(name) for name, fits in ENTRIES.items() if not fits(({'batch': 0} | state).get(name))]
    if wrong:
        raise UserError(
            f'--resume {where}: its {", ".join(wrong)} is missing or invalid; get the file again, or load only its '
            f'weights with --resume-weights-only'
        )
    same_script = _script(state.get('provenance')) == _script(provenance)
    known = options.defaults | state['recipe'] if same_script else state['recipe']
    _check_recipe(known, options.recipe, where)
    _check_labels(state.get('labels', labels), labels, where)


def _script(provenance: object) -> str | None:
    """The name of the script that wrote a file; None if its provenance, which may have been altered, has none."""
    match provenance:
        case {'command': [str(script), *_]}:
            return Path(script).name
    return None


def _check_recipe(theirs: dict, ours: dict, where: str | Path | None) -> None:
    """Raise UserError if the learning rate, seed, data set ... differ from those with which the run started."""
    differences = [
        f'--{name.replace("_", "-")} was {theirs.get(name, "not an option")}, is {ours.get(name, "not an option")}'
        for name in sorted({*theirs, *ours})
        if theirs.get(name) != ours.get(name)
    ]
    if differences:
        raise UserError(
            f'--resume {where}: the run has a different recipe: {"; ".join(differences)}. Use its values, or start a '
            f'new run from these weights with --resume-weights-only'
        )


def _check_labels(theirs: object, ours: list[str], where: str | Path | None) -> None:
    """Raise UserError if labels stand for different persons: the classifier would confuse them."""
    if theirs == ours:
        return
    known = theirs if isinstance(theirs, list) else []
    moved = sum(one != other for one, other in zip(known, ours, strict=False))
    what = f'it has {len(known)} persons, not {len(ours)}'
    if len(known) == len(ours):
        what = f'{moved} of {len(ours)} labels mean other persons'
    raise UserError(
        f'--resume {where}: the run was trained with another table of persons and labels: {what}. Restore the training '
        f'set, or start a new run from these weights with --resume-weights-only'
    )


def check_saved(state: Any, entry: str = '') -> None:
    """Raise UserError if a checkpoint with this `state` could be written, but not read again.

    Such values come from a script: an option of a type of its own, or milestones computed with NumPy.
    """
    kind = type(state)
    if kind in SIMPLE or (isinstance(state, torch.Tensor) and state.dtype in SAVED_DTYPES):
        return
    of = f' of {state.dtype}' if isinstance(state, torch.Tensor) else ''
    if kind not in CONTAINERS:
        raise UserError(
            f'the checkpoints of this run could not be read again, because of a {kind.__module__}.{kind.__qualname__}'
            f'{of} in {entry}: use tensors, numbers and strings of Python, lists, tuples or dicts'
        )
    for name, value in state.items() if isinstance(state, dict) else enumerate(state):
        check_saved(name, f'the keys of {entry}')
        check_saved(value, f'{entry}[{name!r}]' if entry else str(name))


def written(state: Mapping[str, Any] | None) -> float:
    """When a checkpoint was written, in seconds since 1970; 0 for files of earlier versions."""
    time = state.get('written') if state else None
    return time if isinstance(time, float) else 0.0


def restore(part: Stateful, name: str, states: dict[str, Any], where: str | Path | None) -> None:
    """Restore the state of a part of the run; UserError if the file has no state for it, or one that does not fit."""
    if name not in states:
        raise UserError(f'--resume {where} has no state for {name!r}: it was written by a different script')
    try:
        part.load_state_dict(states[name])
    except (ValueError, KeyError, RuntimeError, TypeError, AttributeError) as problem:
        raise UserError(
            f'--resume {where}: its state for {name!r} does not fit: {" ".join(str(problem).split())}'
        ) from None
    if isinstance(part, torch.optim.Optimizer):
        _match_strides(part)


def _match_strides(optimizer: torch.optim.Optimizer) -> None:
    """Convert the moments to the memory layout of their parameters.

    A fused step treats both as flat memory, so moments from an NCHW file would silently be applied to the wrong
    elements of a channels_last weight.
    """
    for param, state in optimizer.state.items():
        for name, value in state.items():
            if torch.is_tensor(value) and value.shape == param.shape and value.stride() != param.stride():
                state[name] = torch.empty_like(param).copy_(value)


def advance(scheduler: LRScheduler, epochs: int) -> None:
    """Advance the schedule of a run that starts from weights alone to its first epoch."""
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # "scheduler.step() before optimizer.step()" is intended here
        for _ in range(epochs):
            scheduler.step()
