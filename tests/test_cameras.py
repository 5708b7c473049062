"""The table of cameras against a plain loop, and its bound."""

import json

import numpy as np
import pytest
import torch
from conftest import TINY
from test_eval_metrics import draw_ids, figures, textbook
from test_evaluation import options
from test_ranking import draw_integers, exact_distances
from tiny import Tiny

import data_manager
import evaluation
import page
import ranking
from page import cameras

NUMBERS = [[0, 1, 2, 3], [7, -3, 10**15, -(2**62)]]  # cameras 0 to 3, and any integers


def table_of(features, ids, **how):
    q_pids, g_pids, q_camids, g_camids = ids
    calls = []

    def rank(items):
        calls.append(items)
        return ranking.rank(features[0], features[1][items], q_pids, g_pids[items], q_camids, g_camids[items])

    return cameras.table(q_camids, g_camids, rank), calls


@pytest.mark.parametrize('numbers', NUMBERS)
def test_equals_a_plain_loop(numbers):
    rng = np.random.default_rng(1)
    ids = draw_ids(rng, 30, 80, 9, 4)
    ids[3][ids[3] == 2] = 1  # a camera of queries alone
    ids[2:] = [np.array(numbers)[each] for each in ids[2:]]
    features = draw_integers(rng, 30, 80, 6, 4)
    found, calls = table_of(features, ids)
    assert found['camera_ids'].tolist() == sorted(numbers) and len(calls) == 3
    distmat, (q_pids, g_pids, q_camids, g_camids) = exact_distances(*features), ids
    for row, mine in enumerate(sorted(numbers)):
        for column, theirs in enumerate(sorted(numbers)):
            queries, items = q_camids == mine, g_camids == theirs
            some = q_pids[queries], g_pids[items], q_camids[queries], g_camids[items]
            ranks = [each for each in textbook(distmat[queries][:, items], *some) if each]
            assert found['camera_queries'][row, column] == len(ranks)
            expected = figures(ranks)[1] if ranks else np.nan
            assert found['camera_map'][row, column] == pytest.approx(expected, abs=1e-12, nan_ok=True)


def written(data_dir, tmp_path, run, camid, **changes):
    """The summary, the arrays and the page of a test whose items have camid(place)."""
    dataset = data_manager.init_dataset('market1501', str(data_dir))
    number = len(dataset.query)
    dataset.query = [(path, pid, camid(place)) for place, (path, pid, _) in enumerate(dataset.query)]
    dataset.gallery = [(path, pid, camid(number + place)) for place, (path, pid, _) in enumerate(dataset.gallery)]
    torch.manual_seed(0)
    evaluation.Test(dataset, options(tmp_path, no_report=False, **changes), run)(Tiny(3))
    with np.load(tmp_path / 'ranking.npz') as file:
        arrays = dict(file)
    return json.loads((tmp_path / 'results.json').read_text()), arrays, (tmp_path / 'report.html').read_text()


@pytest.mark.parametrize('place', [lambda place: place, lambda place: -(10**12) * place])
def test_a_camera_for_each_image(place, data_dir, tmp_path, run, monkeypatch):
    """As people number images whose cameras they do not know: nothing has a row or a ranking of each camera."""
    rankings, rank = [], evaluation.rank
    monkeypatch.setattr(cameras, 'MOST_CAMERAS', 20)
    monkeypatch.setattr(evaluation, 'rank', lambda *args: rankings.append(args) or rank(*args))
    summary, arrays, html = written(data_dir, tmp_path, run, place)
    number = len(arrays['q_camids']) + len(arrays['g_camids'])
    assert number > 20 and len(rankings) == 1
    assert arrays['camera_map'].shape == arrays['camera_queries'].shape == (0, 0)
    assert summary['cameras_left_out'] == f'{number} cameras, more than 20'
    assert f'<p>Left out: {number} cameras, more than 20.</p>' in html and 'scope="row"' not in html


def test_far_apart_numbers_are_those_of_near_ones(data_dir, tmp_path, run):
    near, far = (
        written(data_dir, tmp_path / str(step), run, lambda place, step=step: step * (place % 4 - 1))
        for step in (1, 10**15)
    )
    assert near[0]['cameras_left_out'] is far[0]['cameras_left_out'] is None
    assert near[1]['camera_queries'].any()
    for name in ('camera_map', 'camera_queries'):
        np.testing.assert_array_equal(near[1][name], far[1][name])
    assert far[1]['camera_ids'].tolist() == [-(10**15), 0, 10**15, 2 * 10**15]


def test_no_table_without_a_page(data_dir, tmp_path, run):
    assert '--no-report' in TINY
    dataset = data_manager.init_dataset('market1501', str(data_dir))
    evaluation.Test(dataset, options(tmp_path), run)(Tiny(3))
    assert json.loads((tmp_path / 'results.json').read_text())['cameras_left_out'] == '--no-report'
    assert '<p>Left out: --no-report.</p>' in page.write(tmp_path).read_text()
