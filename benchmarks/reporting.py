"""The cost of the page of a run: `python report.py RUN`, including imports. Rows of `table.py`.

The files of a test are written by the test itself, for random features; the images are those of a toy data set, each
of which is used many times at the size of Market1501.
"""

import contextlib
import io
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import torch

import data_manager
import evaluation
from arguments import TestOptions
from models.network import Network
from readers.tree import Dataset
from runtime.device import Run
from table import Row, seconds
from testing import MARKET1501, draw

REPORT = Path(__file__).resolve().parents[1] / 'report.py'
TURNS = 3


def put_run(folder: Path, size: tuple[int, int]) -> None:
    """Write into `folder` the files of a test on a Market1501 of that size."""
    toy = data_manager.init_dataset('toy_market1501', str(folder))
    *features, q_pids, g_pids, q_camids, g_camids = draw(*size)
    shown = {'query': (toy.query, q_pids, q_camids), 'gallery': (toy.gallery, g_pids, g_camids)}
    items = {
        subset: [
            (some[at % len(some)][0], int(pid), int(camid))
            for at, (pid, camid) in enumerate(zip(pids, camids, strict=True))
        ]
        for subset, (some, pids, camids) in shown.items()
    }
    dataset = Dataset('market1501', toy.train, items['query'], items['gallery'])
    extracted = [(each, torch.arange(len(each))) for each in features]
    with mock.patch.object(evaluation, 'extract', side_effect=extracted):
        test = evaluation.Test(dataset, TestOptions(save_dir=str(folder)), Run(torch.device('cpu')))
        test(Network(num_classes=1))  # which is not called


def page(size: tuple[int, int], most_seconds: float, most_mb: float) -> Row:
    with tempfile.TemporaryDirectory() as folder:
        with contextlib.redirect_stdout(io.StringIO()):
            put_run(Path(folder), size)
        command = [sys.executable, str(REPORT), folder]
        took = sorted(seconds(lambda: subprocess.run(command, check=True, capture_output=True)) for _ in range(TURNS))
        size_mb = (Path(folder) / 'report.html').stat().st_size / 1e6
    what = 'the page of a test, {} x {}, {:.1f} MB'.format(*size, size_mb)
    middle = took[TURNS // 2]
    met = middle <= most_seconds and size_mb <= most_mb
    return Row(what, 's', middle, target=f'≤ {most_seconds} s, ≤ {most_mb} MB', met=met)


def rows(full: bool) -> Iterator[Row]:
    yield page((160, 340), 5, 15)
    yield page(MARKET1501, 60, 15)
