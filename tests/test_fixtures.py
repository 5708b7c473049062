"""Files of all earlier versions can be resumed and tested: tests/fixtures/ contains one of each kind.

They were written on tests/trees.py's Market1501 by

    python tests/tiny.py SCRIPT -a tiny --height 32 --width 16 --workers 0 --use-cpu --precision fp32 --no-report \
        --pretrained none --train-batch 8 --max-epoch 2 --eval-step 1 --print-freq 1 --save-minutes 1e-9 --keep 100

with `train_img_model_cent.py`, whose file has the most parts (checkpoint_ep1.pth.tar), and with
`train_img_model_xent_htri.py` (resume_2_1.pth.tar). A change of the format adds files beside these and changes none.
"""

import copy
import csv
import importlib
import json
import shutil
from types import SimpleNamespace

import pytest
import torch
import trees
from conftest import ROOT

# Written after `batch` of 3 in `epoch`, both from 1, when the best Rank-1 was `rank1`. Its weights have `mAP`.
FILES = [
    SimpleNamespace(
        fixture='checkpoint_format1.bin', name='checkpoint_ep1.pth.tar', script='train_img_model_cent',
        epoch=1, batch=3, rank1=0.625, mAP=0.703125,
    ),
    SimpleNamespace(
        fixture='position_format1.bin', name='resume_2_1.pth.tar', script='train_img_model_xent_htri',
        epoch=2, batch=1, rank1=0.625, mAP=0.7291666666666666,
    ),
]  # fmt: skip
every_file = pytest.mark.parametrize('file', FILES, ids=lambda file: file.fixture)


@pytest.fixture(scope='module')
def tree(tmp_path_factory):
    folder = tmp_path_factory.mktemp('trees')
    trees.draw_market1501(folder / 'market1501')
    return folder


@pytest.fixture
def train(script, tree):
    """Two epochs with a script, with a row and a file for each step."""

    def start(name, save_dir, *options):
        more = ['--max-epoch', 2, '--eval-step', 1, '--print-freq', 1, '--save-minutes', 1e-9, '--keep', 100]
        return script(name, '--data-dir', tree, '--save-dir', save_dir, *more, *options)

    return start


def copied(file, folder):
    """The path of the fixture under its own name; git keeps no file that is named like weights."""
    folder.mkdir()
    return shutil.copy(ROOT / 'tests' / 'fixtures' / file.fixture, folder / file.name)


def read(path):
    return torch.load(path, weights_only=True)


def steps(folder):
    """(epoch, batch) of each step: its losses."""
    with open(folder / 'metrics.csv') as table:
        rows = [row for row in csv.DictReader(table) if row['batch']]
    losses = [name for name in ('loss', 'xent', 'cent', 'htri') if name in rows[0]]
    return {(int(row['epoch']), int(row['batch'])): [float(row[name]) for name in losses] for row in rows}


@every_file
def test_an_old_file_resumes_where_it_was_written(file, train, tmp_path, capsys):
    path, resumed = copied(file, tmp_path / 'old'), tmp_path / 'resumed'
    assert train(file.script, resumed, '--resume', path) == 0
    out = capsys.readouterr().out
    assert 'Finished. Total elapsed time' in out and 'data set has changed' not in out
    left = [(epoch, batch) for epoch in (1, 2) for batch in (1, 2, 3) if (epoch, batch) > (file.epoch, file.batch)]
    assert list(steps(resumed)) == left

    old, last = read(path), read(resumed / 'checkpoint_ep2.pth.tar')
    first = read(resumed / 'resume_{}_{}.pth.tar'.format(*left[0]))
    assert first['best_rank1'] == file.rank1  # no test was made since
    tracked = 'base.1.num_batches_tracked'
    assert first['state_dict'][tracked] == old['state_dict'][tracked] + 1
    for name in old['state']:
        if name.startswith('optimizer'):
            before, after = (state['state'][name]['state'] for state in (old, last))
            assert after.keys() == before.keys()
            assert all(after[param]['step'] == before[param]['step'] + len(left) == 6 for param in before)
    assert (last['epoch'], last['state']['scheduler']['last_epoch']) == (1, 2)


@every_file
def test_an_old_run_continues_as_one_of_today(file, train, tmp_path):
    """Loosely: processors differ in the last bits, Adam makes whole steps of them, and draws may change one day."""
    resumed, whole = tmp_path / 'resumed', tmp_path / 'whole'
    assert train(file.script, resumed, '--resume', copied(file, tmp_path / 'old')) == 0
    assert train(file.script, whole) == 0
    expected = steps(whole)
    for step, losses in steps(resumed).items():
        assert losses == pytest.approx(expected[step], rel=0.1, abs=0.05)
    one, other = (read(folder / 'checkpoint_ep2.pth.tar')['state_dict'] for folder in (resumed, whole))
    for name, weight in one.items():
        if 'running' not in name:
            torch.testing.assert_close(
                weight, other[name], rtol=0, atol=2 * 6 * 0.0003
            )  # 6 steps of Adam there and back


@every_file
def test_an_old_file_has_its_figures(file, script, tree, tmp_path):
    """Matches and other items of a query are 0.1 % of a distance apart or more, so no rank depends on the processor."""
    path = copied(file, tmp_path / 'old')
    assert script(file.script, '--data-dir', tree, '--evaluate', '--resume', path, '--save-dir', tmp_path) == 0
    results = json.loads((tmp_path / 'results.json').read_text())
    assert (results['mAP'], results['cmc'][0]) == pytest.approx((file.mAP, file.rank1))
    assert results['notices'] == []


@every_file
def test_how_an_old_file_was_trained_is_known(file, script, tree, tmp_path):
    path = copied(file, tmp_path / 'old')
    options = ['--data-dir', tree, '--evaluate', '--resume', path, '--save-dir', tmp_path, '--height', 64]
    assert script(file.script, *options) == 0
    expected = [f'{path} was trained with --height 32, and is used with --height 64']
    assert json.loads((tmp_path / 'results.json').read_text())['notices'] == expected


@every_file
def test_an_old_file_resumes_in_a_script_that_gained_an_option(file, train, tmp_path, monkeypatch, capsys):
    module = importlib.import_module(file.script)
    monkeypatch.setattr(module, 'parser', copy.deepcopy(module.parser))
    module.parser.add_argument('--warmup', type=int, default=2, help='epochs')
    path = copied(file, tmp_path / 'old')
    assert train(file.script, tmp_path / 'resumed', '--resume', path) == 0
    assert read(tmp_path / 'resumed' / 'checkpoint_ep2.pth.tar')['recipe']['warmup'] == 2
    capsys.readouterr()
    assert train(file.script, tmp_path / 'other', '--resume', path, '--warmup', 3) == 2
    err = capsys.readouterr().err
    assert err.startswith(f'error: --resume {path}: the run has a different recipe: --warmup was 2, is 3. ')
    assert err.count('\n') == 1
