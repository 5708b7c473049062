"""The files of a run: old ones are deleted when newer ones replace them."""

import contextlib
import re
from collections.abc import Sequence
from pathlib import Path

import torch

import weights
from files.writing import free_space
from page.results import FILES
from page.runs import TARGETS, VALIDATION
from runtime.best_model import RECORD
from runtime.device import Run
from runtime.errors import UserError
from runtime.state import written
from utils import read_json

# The names of the files that a run writes and may therefore delete
POSITIONS, TESTS, BEST = r'resume_\d+_\d+\.pth\.tar', r'checkpoint_ep\d+\.pth\.tar', r'best_model\.pth\.tar'
PARTIAL = rf'\.(?:{POSITIONS}|{TESTS}|{BEST})\.\d+'  # of `write_whole`
OTHERS = rf'metrics\.csv|{re.escape(RECORD)}|events\.out\.tfevents\..*'


class RunFolder:
    """The folder of a run. `named`, the files that the command names, are never deleted.

    A restart of the same command needs them.
    """

    def __init__(self, folder: Path, named: Sequence[str | None]):
        self.folder, self.named = folder, named

    def newest(self) -> tuple[Path | None, weights.Weights | None]:
        """The newest intact checkpoint of a run, and its path.

        Copying may change modification times. Therefore files of later positions, and files with names that a run does
        not write, are compared by the time recorded in them.
        """
        newest: tuple[Path, weights.Weights] | None = None
        for path in sorted(self.folder.glob('*_*.pth.tar'), key=age):
            if path.name == 'best_model.pth.tar' or (newest and _is_earlier(path, newest[0])):
                continue
            try:
                loaded = weights.read(path)
            except UserError as damage:
                print(f'Skipped: {damage}')
                continue
            if loaded.state is not None and (newest is None or written(loaded.state) > written(newest[1].state)):
                newest = path, loaded
        if newest is None:
            print(f'No checkpoint in {self.folder}: starting from {self.named[0] or "the beginning"}')
        return newest or (None, None)

    def check_named(self) -> None:
        """Raise UserError if a new run in this folder would replace a file that the command names."""
        for path in self._spared():
            if path.parent == self.folder.resolve() and re.fullmatch(f'{POSITIONS}|{TESTS}|{BEST}', path.name):
                raise UserError(
                    f'{path} is to be the start of a new run, which would replace it: rename the file, or choose '
                    f'another --save-dir'
                )

    def check_room(self, weights: int, run: Run, emptied: bool) -> None:
        """Raise UserError, in every process, if the disk has no space for a checkpoint with so many bytes of weights.

        emptied: the run deletes the files of an earlier one after its first step
        """
        old = self._written(f'{POSITIONS}|{TESTS}|{BEST}') if emptied else []
        free = free_space(self.folder)
        if free >= 0:
            free += sum(path.stat().st_size for path in old if path.exists())
        free = int(run.stack(torch.tensor(free))[0])  # in the first process, which saves
        if 0 <= free < weights:
            raise UserError(
                f'--save-dir {self.folder}: {free / 1e6:.1f} MB are free on its disk, but the weights alone '
                f'take {weights / 1e6:.1f} MB; free some space, or choose another folder'
            )

    def clear(self, *patterns: str) -> None:
        """Delete the files whose full name matches one of the regular expressions."""
        for path in self._written('|'.join(patterns)):
            self._delete(path)

    def clear_results(self) -> None:
        """Delete the results of tests, including those below the run's folder, and then empty folders."""
        below = [*self.folder.glob(f'{TARGETS}/*'), self.folder / VALIDATION]
        written = [folder for folder in below if _is_part(folder)]
        for folder in (self.folder, *written):
            RunFolder(folder, self.named).clear(*map(re.escape, FILES))
        for folder in (*written, self.folder / TARGETS):
            with contextlib.suppress(OSError):  # it is not empty or does not exist
                folder.rmdir()

    def prune(self, written: str, number: int, newest: Path) -> None:
        """Delete all but the `number` newest of the files that match `written`, a regular expression.

        `newest`, the file just written, is always kept, even if the clock was changed. Failures to list or delete files
        are reported.
        """
        try:
            paths = sorted(self._written(written), key=age)
        except OSError as problem:
            print(f'{self.folder} cannot be listed ({problem.strerror}), and no old file is deleted; the run continues')
            return
        for path in paths[number:]:
            if path != newest:
                self._delete(path)

    def _delete(self, path: Path) -> None:
        """Delete a file that the command does not name; a failure is reported."""
        if path.resolve() in self._spared():
            return
        try:
            path.unlink(missing_ok=True)
        except OSError as problem:
            print(f'{path} cannot be deleted ({problem.strerror}); the run continues')

    def _written(self, pattern: str) -> list[Path]:
        return [path for path in self.folder.glob('*') if re.fullmatch(pattern, path.name)]

    def _spared(self) -> list[Path]:
        return [Path(path or '').resolve() for path in self.named]


def age(path: Path) -> tuple[int, list[int], str]:
    """Sort key that puts the newest first, and among files written within milliseconds the later epoch and batch."""
    return -modified(path), [-int(number) for number in re.findall(r'\d+', path.name)], path.name


def _is_earlier(path: Path, other: Path) -> bool:
    """Whether the position in the first name is not later than that in the second; False if either name has none."""
    place, others = _place(path), _place(other)
    return place is not None and others is not None and place <= others


def _place(path: Path) -> tuple[int, int] | None:
    """The finished epochs, and the finished batches of the next one, by a file's name; None for other names."""
    numbers = [int(number) for number in re.findall(r'\d+', path.name)]
    if re.fullmatch(POSITIONS, path.name):
        return numbers[0] - 1, numbers[1]
    return (numbers[0], 0) if re.fullmatch(TESTS, path.name) else None


def modified(path: Path) -> int:
    """Modification time in ns; 0 for a broken link, or a file that was deleted after it was listed."""
    with contextlib.suppress(OSError):
        return path.stat().st_mtime_ns
    return 0


def _is_part(folder: Path) -> bool:
    """Whether the results in a folder belong to the test of a run, and are not those of a separate test."""
    with contextlib.suppress(OSError, ValueError):
        results = read_json(folder / 'results.json')
        return isinstance(results, dict) and bool(results.get('part_of_a_test'))
    return False
