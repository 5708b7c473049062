"""Helpers known from the original: a running mean, a log file, JSON, and saving a checkpoint."""

import contextlib
import json
import sys
from pathlib import Path

import torch

from files.writing import Unwritten, torch_errors, write_whole
from runtime.console import Console, report


class AverageMeter:
    """The last value of a quantity and its mean since the last reset."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.val, self.avg, self.sum, self.count = 0.0, 0.0, 0.0, 0

    def update(self, val: float, n: int = 1) -> None:
        """Add `val`, a mean over `n` items."""
        self.val = val
        self.sum += val * n
        self.count += n
        self.avg = self.sum / self.count


class Logger(Console):
    """Standard output that is also appended to a file: `with Logger('log/log_train.txt'): print(...)`."""

    def __init__(self, fpath: str | Path, unwritten: Unwritten | None = None):
        self.problems: list[str] = []  # of the console, not reported yet
        super().__init__(sys.stdout, self.problems.append)
        self.failed, self.unwritten = False, Unwritten() if unwritten is None else unwritten
        mkdir_if_missing(Path(fpath).parent)
        self.file = open(fpath, 'a', 1, 'utf-8', 'backslashreplace')  # noqa: SIM115 (closed by __exit__)

    def __enter__(self) -> 'Logger':
        self.before, sys.stdout = sys.stdout, self
        return self

    def __exit__(self, *_: object) -> None:
        self.flush()
        sys.stdout = self.before
        with contextlib.suppress(OSError):  # the rest does not fit on a full disk
            self.file.close()

    def write(self, text: str) -> None:
        self.note(text)
        super().write(text)
        if text.endswith('\n'):
            self.flush()  # otherwise a pipe receives lines late
            while self.problems:
                line = f'error: stdout cannot be written: {self.problems.pop()}; the run continues with its log\n'
                report(line)
                self.note(line)

    def note(self, text: str) -> None:
        """Write to the file only."""
        try:
            self.file.write(text)
        except OSError as problem:  # a full disk does not stop training
            if not self.failed:
                self.failed = True
                self.unwritten.report(self.file.name, problem, 'the run continues without its log')


def mkdir_if_missing(folder: str | Path) -> None:
    Path(folder).mkdir(parents=True, exist_ok=True)


def read_json(fpath: str | Path) -> object:
    return json.loads(Path(fpath).read_text(encoding='utf-8'))


def write_json(obj: object, fpath: str | Path) -> None:
    write_whole(fpath, lambda path: path.write_text(json.dumps(obj, indent=2) + '\n', encoding='utf-8'))


def save_checkpoint(state: dict, is_best: bool, fpath: str | Path) -> None:
    """Write `state` to `fpath`, completely or not at all; if `is_best`, also to best_model.pth.tar in its folder."""

    def write(path: Path) -> None:
        with torch_errors(), open(path, 'wb') as file:
            torch.save(state, file)

    write_whole(fpath, write, *[Path(fpath).with_name('best_model.pth.tar')] * bool(is_best))
