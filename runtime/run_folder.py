"""Which files of a run are kept: those that it wrote are deleted when newer ones take their place."""

import contextlib
import re
from collections.abc import Sequence
from pathlib import Path

from page.results import FILES
from page.runs import TARGETS, VALIDATION
from runtime.best_model import RECORD
from utils import read_json

# The names of the files that a run writes, and may therefore delete
POSITIONS, TESTS, BEST = r'resume_\d+_\d+\.pth\.tar', r'checkpoint_ep\d+\.pth\.tar', r'best_model\.pth\.tar'
PARTIAL = rf'\.(?:{POSITIONS}|{TESTS}|{BEST})\.\d+'  # of `write_whole`
OTHERS = rf'metrics\.csv|{re.escape(RECORD)}|events\.out\.tfevents\..*'


class RunFolder:
    """The folder of a run. Files that the command names, `named`, are never deleted.

    A restart of the same command checks that they exist.
    """

    def __init__(self, folder: Path, named: Sequence[str | None]):
        self.folder, self.named = folder, named

    def clear(self, *patterns: str) -> None:
        """Delete the files whose whole names match a regular expression."""
        for path in self._written('|'.join(patterns)):
            if path.resolve() not in self._spared():
                path.unlink()

    def clear_results(self) -> None:
        """Delete the results of tests, also those that a run wrote below its folder; then folders that are empty."""
        below = [*self.folder.glob(f'{TARGETS}/*'), self.folder / VALIDATION]
        written = [folder for folder in below if _is_part(folder)]
        for folder in (self.folder, *written):
            RunFolder(folder, self.named).clear(*map(re.escape, FILES))
        for folder in (*written, self.folder / TARGETS):
            with contextlib.suppress(OSError):  # it is not empty, or not there
                folder.rmdir()

    def prune(self, written: str, number: int, newest: Path) -> None:
        """Delete all but the newest files that were `written` (a regular expression).

        The file just written, `newest`, is spared, whatever the clock says. What cannot be listed or deleted is
        reported.
        """
        try:
            paths = sorted(self._written(written), key=age)
        except OSError as problem:
            print(f'{self.folder} cannot be listed ({problem.strerror}), and no old file is deleted; the run continues')
            return
        for path in paths[number:]:
            if path != newest and path.resolve() not in self._spared():
                try:
                    path.unlink(missing_ok=True)
                except OSError as problem:
                    print(f'{path} cannot be deleted ({problem.strerror}); the run continues')

    def _written(self, pattern: str) -> list[Path]:
        return [path for path in self.folder.glob('*') if re.fullmatch(pattern, path.name)]

    def _spared(self) -> list[Path]:
        return [Path(path or '').resolve() for path in self.named]


def age(path: Path) -> tuple[int, list[int], str]:
    """Sort key that puts the newest first; of files written within milliseconds, that of the later epoch and batch."""
    return -modified(path), [-int(number) for number in re.findall(r'\d+', path.name)], path.name


def modified(path: Path) -> int:
    """When it was written, in ns; 0 of a link to nowhere, and of a file that was deleted since it was listed."""
    with contextlib.suppress(OSError):
        return path.stat().st_mtime_ns
    return 0


def _is_part(folder: Path) -> bool:
    """Whether the results in a folder are those of a part of a run's test, and not of a test of their own."""
    with contextlib.suppress(OSError, ValueError):
        found = read_json(folder / 'results.json')
        return isinstance(found, dict) and bool(found.get('part_of_a_test'))
    return False
