"""The few helpers that people know from the original: a mean, a log file, JSON and whole files on disk."""

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import torch


class AverageMeter:
    """The last value of something and its mean since the last reset."""

    def __init__(self):
        self.reset()

    def reset(self) -> None:
        self.val = self.avg = self.sum = 0.0
        self.count = 0

    def update(self, val: float, n: int = 1) -> None:
        """Take in `val`, a mean over `n` items."""
        self.val = val
        self.sum += val * n
        self.count += n
        self.avg = self.sum / self.count


class Logger:
    """A standard output that also goes to a file: `with Logger('log/log_train.txt'): print(...)`.

    The file is appended to, line by line, so that the log of a run that goes on, or of a mistake, destroys none.
    """

    def __init__(self, fpath: str | Path):
        self.console = sys.stdout
        mkdir_if_missing(Path(fpath).parent)
        self.file = open(fpath, 'a', buffering=1, encoding='utf-8')  # noqa: SIM115 (closed by __exit__)

    def __enter__(self) -> 'Logger':
        sys.stdout = self
        return self

    def __exit__(self, *_) -> None:
        sys.stdout = self.console
        self.file.close()

    def write(self, text: str) -> None:
        self.console.write(text)
        self.file.write(text)

    def flush(self) -> None:
        self.console.flush()
        self.file.flush()

    def isatty(self) -> bool:
        return self.console.isatty()


def mkdir_if_missing(folder: str | Path) -> None:
    Path(folder).mkdir(parents=True, exist_ok=True)


def read_json(fpath: str | Path) -> object:
    return json.loads(Path(fpath).read_text(encoding='utf-8'))


def write_json(obj: object, fpath: str | Path) -> None:
    write_whole(fpath, lambda path: path.write_text(json.dumps(obj, indent=2) + '\n', encoding='utf-8'))


def write_whole(fpath: str | Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `fpath`, then rename it: what has that name is always whole.

    The data reach the disk before the name does, and the name before this returns: a power loss leaves the old file
    or the new one.
    """
    fpath = Path(fpath)
    mkdir_if_missing(fpath.parent)
    temporary = fpath.with_name(f'.{fpath.name}.{os.getpid()}')
    try:
        write(temporary)
        with open(temporary, 'rb') as file:
            os.fsync(file.fileno())
        temporary.replace(fpath)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(fpath.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def save_checkpoint(state: dict, is_best: bool, fpath: str | Path) -> None:
    """Write `state` to `fpath`, whole or not at all, and to `best_model.pth.tar` beside it when it is the best."""
    write_whole(fpath, lambda path: torch.save(state, path))
    if is_best:
        write_whole(Path(fpath).with_name('best_model.pth.tar'), lambda path: shutil.copyfile(fpath, path))
