import csv
import importlib.util
import shutil

import numpy as np
import pytest
import torch
from conftest import TINY
from test_evaluation import options
from tiny import Tiny

import data_manager
import eval_metrics
import evaluation
import page
from files.writing import Unwritten
from page import results, runs
from readers.tree import paths_of
from runtime.device import Run
from runtime.errors import UserError
from utils import read_json

ODD = ['=1+1.jpg', 'a\nb.jpg', 'a\r\tb.jpg', 'a,"b;.jpg', '\udcff.jpg', ' \U0001f6b6.jpg']


@pytest.fixture(scope='module', params=['market1501', 'mars'])
def tested(request, data_dir, tmp_path_factory):
    """The data set, the distances and the folder of a test."""
    folder = tmp_path_factory.mktemp('tested')
    dataset = data_manager.init_dataset(request.param, str(data_dir))
    torch.manual_seed(0)
    model, cpu = Tiny(3), Run(torch.device('cpu'))
    test = evaluation.Test(dataset, options(folder, no_report=False), cpu)
    figures = test(model)
    features = [evaluation.extract(model, items, test.options, cpu)[0] for items in (dataset.query, dataset.gallery)]
    return dataset, features, torch.cdist(*features).square().numpy(), folder, figures


def test_results_csv(tested):
    dataset, _, distmat, folder, figures = tested
    with open(folder / 'results.csv', newline='') as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(dataset.query)
    scored = [float(row['AP']) for row in rows if row['AP']]
    assert np.mean(scored) == pytest.approx(figures['mAP'], abs=1e-5)
    assert np.mean([int(row['first_rank']) == 1 for row in rows if row['AP']]) == pytest.approx(figures['rank1'])
    for row, distances, (paths, pid, camid) in zip(rows, distmat, dataset.query, strict=True):
        kept = [
            (distance, there)
            for distance, (_, there, where) in zip(distances, dataset.gallery, strict=True)
            if (there, where) != (pid, camid)
        ]
        order = [there for _, there in sorted(kept)]
        assert row['query'] == (paths if isinstance(paths, str) else paths[0])
        assert (int(row['pid']), int(row['camid'])) == (pid, camid)
        assert int(row['matches']) == order.count(pid)
        assert row['first_rank'] == (str(order.index(pid) + 1) if pid in order else '')
        wrong = [there for there in order[:10] if there != pid]
        assert row['nearest_wrong'] == (str(wrong[0]) if wrong else '')
        order = [place for place, item in enumerate(dataset.gallery) if item[1:] != (pid, camid)]
        order.sort(key=lambda place: (distances[place], place))
        for rank, place in enumerate(order[:10], start=1):
            paths, there, _ = dataset.gallery[place]
            assert row[f'nearest_{rank}'] == (paths if isinstance(paths, str) else paths[0])
            assert row[f'match_{rank}'] == ('1' if there == pid else '0')
        assert all(row[f'{name}_{rank}'] == '' for rank in range(len(order) + 1, 11) for name in ('nearest', 'match'))
        assert list(row)[6:] == [
            'nearest_wrong',
            *[f'{name}_{k}' for k in range(1, 11) for name in ('nearest', 'match')],
        ]


@pytest.mark.parametrize('name', ODD)
@pytest.mark.parametrize('subset', ['query', 'gallery'])
def test_names_with_any_characters_are_read_back(name, subset, data_dir, run, tmp_path):
    dataset = data_manager.init_dataset('market1501', str(data_dir))
    dataset.query = dataset.query[:1]
    items = getattr(dataset, subset)
    path = tmp_path / name
    shutil.copy(items[0][0], path)
    items[0] = (str(path), *items[0][1:])
    torch.manual_seed(0)
    evaluation.Test(dataset, options(tmp_path), run)(Tiny(3))
    with open(tmp_path / 'results.csv', newline='', encoding='utf-8', errors='surrogateescape') as file:
        (row,) = csv.DictReader(file)
    names = [item[0] for item in dataset.gallery]
    assert row['query'] == dataset.query[0][0] and all(row[f'nearest_{rank}'] in names for rank in range(1, 11))
    if subset == 'query':
        assert row['query'] == str(path)
    tested = runs.read(tmp_path)
    for subset in ('query', 'gallery'):
        assert tested.files[subset] == [[item[0]] for item in getattr(dataset, subset)]
    assert page.write(tmp_path).exists()


@pytest.mark.parametrize('names', [['a\nb'], ['a\tb', 'c'], ['a', 'b'], ['a\\n'], ['\n', '\t\n']])
def test_paths_of_frames_are_read_back(names):
    for items in ([(tuple(names), 1, 0)], [(name, 1, 0) for name in names], [(tuple(names * 9), 1, 0)] * 2):
        lines = runs._split(results._files(items))
        frames = [[*paths_of(item)] for item in items]
        assert lines == [each[:: -(-len(each) // 8)] for each in frames]
    assert results._lines([['a', 'b'], ['c']]).tobytes() == b'a\tb\nc'  # as in earlier versions


def test_a_page_can_be_written_again_from_any_folder_and_beside_its_data(data_dir, run, tmp_path, monkeypatch):
    monkeypatch.chdir(data_dir)
    dataset = data_manager.init_dataset('market1501', '.')
    torch.manual_seed(0)
    evaluation.Test(dataset, options(tmp_path), run)(Tiny(3))
    monkeypatch.chdir(tmp_path)
    assert 'class="missing"' not in page.write('.').read_text()
    shutil.copytree(data_dir / 'market1501', tmp_path / 'elsewhere' / 'market1501')
    with np.load('ranking.npz') as file:
        arrays = dict(file) | {'folder': results._lines([['gone']])}
    np.savez('ranking.npz', **arrays)
    assert page.write('.').read_text().count('class="missing"') > 100
    monkeypatch.chdir(tmp_path / 'elsewhere')
    assert 'class="missing"' not in page.write('..').read_text()


def test_packages_of_the_page_are_looked_for_before_a_training(tested, run, monkeypatch, tmp_path):
    dataset, find_spec = tested[0], importlib.util.find_spec
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None if name == 'matplotlib' else find_spec(name))
    with pytest.raises(UserError, match=r'report\.html needs matplotlib: pip install matplotlib, or --no-report'):
        evaluation.Test(dataset, options(tmp_path, no_report=False), run)
    evaluation.Test(dataset, options(tmp_path, no_report=True), run)


def test_ranking_npz(tested):
    dataset, features, distmat, folder, figures = tested
    with np.load(folder / 'ranking.npz') as found:
        arrays = dict(found)
    for subset, items in (('query', dataset.query), ('gallery', dataset.gallery)):
        lines = bytes(arrays[f'{subset}_files']).decode().split('\n')
        first = [paths if isinstance(paths, str) else paths[0] for paths, _, _ in items]
        assert [line.split('\t')[0] for line in lines] == first
        assert max(len(line.split('\t')) for line in lines) <= 8
    assert np.nanmean(eval_metrics.average_precision(arrays['ranks'], arrays['offsets'])) == figures['mAP']
    q_camids, g_camids = arrays['q_camids'], arrays['g_camids']
    for row, column in zip(*np.nonzero(arrays['camera_queries']), strict=True):
        mine, theirs = q_camids == arrays['camera_ids'][row], g_camids == arrays['camera_ids'][column]
        ids = arrays['q_pids'][mine], arrays['g_pids'][theirs], q_camids[mine], g_camids[theirs]
        _, mean_ap = eval_metrics.evaluate(distmat[mine][:, theirs], *ids)
        assert arrays['camera_map'][row, column] == pytest.approx(mean_ap, abs=1e-6)
    assert np.isnan(arrays['camera_map'][arrays['camera_queries'] == 0]).all()
    assert arrays['camera_queries'].trace() == 0  # a query drops its own camera
    everyone = np.concatenate(features)
    pids, is_query = arrays['embedding_pids'], arrays['embedding_is_query']
    assert len(set(pids)) <= 12 and is_query.any() and not is_query.all()
    subset = dataset.query + dataset.gallery
    rows = [row for row, item in enumerate(subset) if item[1] in set(pids)]
    assert [subset[row][1] for row in rows] == pids.tolist()
    np.testing.assert_allclose(arrays['embedding_features'], everyone[rows], rtol=1e-3, atol=1e-6)


def reciprocal_rank(ranks, offsets):
    scores = np.full(len(offsets) - 1, np.nan)
    scores[np.diff(offsets) > 0] = 1 / ranks[offsets[:-1][np.diff(offsets) > 0]]
    return scores


def test_a_metric_is_added_by_a_function_and_a_row(data_dir, run, tmp_path, monkeypatch):
    row = eval_metrics.Metric('mrr', 'Reciprocal rank', reciprocal_rank)
    monkeypatch.setattr(eval_metrics, 'METRICS', (*eval_metrics.METRICS, row))
    torch.manual_seed(0)
    dataset = data_manager.init_dataset('market1501', str(data_dir))
    evaluation.Test(dataset, options(tmp_path), run)(Tiny(3))
    summary = read_json(tmp_path / 'results.json')
    with open(tmp_path / 'results.csv', newline='') as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0])[6:9] == ['nearest_wrong', 'mrr', 'nearest_1'] and not {'mAP', 'mINP', 'rank1'} & set(rows[0])
    for query in rows:
        first_rank = query['first_rank']
        assert query['mrr'] == (f'{1 / int(first_rank):.6f}' if first_rank else '')
    mean = np.mean([1 / int(query['first_rank']) for query in rows if query['first_rank']])
    assert list(summary)[-1] == 'mrr' and 'rank1' not in summary and summary['mrr'] == pytest.approx(mean)
    assert f'<dt>Reciprocal rank</dt><dd>{100 * mean:.1f}%' in page.write(tmp_path).read_text()
    compared = page.compare([tmp_path, tmp_path], tmp_path / 'compare.html').read_text()
    assert '<th>Rank-10</th><th>Reciprocal rank</th>' in compared
    assert compared.count(f'<td>{100 * mean:.1f} <small>') == 2


def test_the_page_of_a_training_knows_its_last_test(script, tmp_path):
    """It is written after the test has come to metrics.csv; what is wrong with it ends no training."""
    options = ['--max-epoch', 2, '--eval-step', 1, '--print-freq', 1, '--save-dir', tmp_path]
    TINY.remove('--no-report')
    try:
        assert script('train_img_model_xent', *options) == 0
    finally:
        TINY.append('--no-report')
    assert len(runs.read(tmp_path).curve('mAP')[1]) == 2
    html = (tmp_path / 'report.html').read_text()
    assert 'Tests during training' in html and 'toy' not in html


def test_a_page_that_cannot_be_made_ends_no_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(page, 'write', lambda folder: 1 / 0)
    unwritten = Unwritten()
    results.write_page(tmp_path, unwritten)
    assert 'report.html: the page cannot be created (ZeroDivisionError: division by zero)' in capsys.readouterr().out
    assert len(unwritten) == 1 and unwritten[0].startswith(f'{tmp_path}')
