import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_ranking import reranked_densely
from tiny import Tiny

import data_manager
import eval_metrics
import evaluation
import ranking
from runtime import launch
from runtime.errors import UserError


def options(save_dir, **changes):
    return SimpleNamespace(
        **{
            'dataset': 'market1501', 'arch': 'tiny', 'height': 32, 'width': 16, 'workers': 0, 'test_batch': 5,
            'test_epochs': {2}, 'resume': '', 'save_dir': str(save_dir), 'evaluate': True,
            'save_features': False, 'rerank': False, 'k1': 20, 'k2': 6, 'lambda_value': 0.3,
            'no_report': True, 'quiet': False, 'seq_len': 4, 'pool': 'avg', **changes,
        }
    )  # fmt: skip


@pytest.fixture
def cpu():
    return launch.Run(torch.device('cpu'), 'fp32', 'fp32', 1)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Tiny(3)


@pytest.fixture(params=['market1501', 'mars', 'mars_official'])
def dataset(request, data_dir):
    return data_manager.init_dataset(request.param, str(data_dir))


def printed(capsys):
    return capsys.readouterr().out.splitlines()


def test_prints_the_lines_of_the_original(dataset, model, cpu, tmp_path, capsys):
    figures = evaluation.Test(dataset, options(tmp_path), cpu)(model)
    lines = printed(capsys)[-14:]
    results = json.loads((tmp_path / 'results.json').read_text())
    queries = lines.pop(5)
    assert lines == [
        'Evaluate only',
        f'Extracted features for query set, obtained {len(dataset.query)}-by-16 matrix',
        f'Extracted features for gallery set, obtained {len(dataset.gallery)}-by-16 matrix',
        'Computing distance matrix',
        'Computing CMC and mAP',
        'Results ----------',
        f'mAP: {results["mAP"]:.1%}',
        'CMC curve',
        f'Rank-1  : {results["cmc"][0]:.1%}',
        f'Rank-5  : {results["cmc"][4]:.1%}',
        f'Rank-10 : {results["cmc"][9]:.1%}',
        f'Rank-20 : {results["cmc"][19]:.1%}',
        '------------------',
    ]
    counts = results['queries']
    assert queries.startswith(f'Queries: {counts["valid"]} valid, {counts["all"] - counts["valid"]} skipped')
    assert list(figures.values()) == [results['mAP'], results['mINP'], *(results['cmc'][k - 1] for k in (1, 5, 10))]


def test_results_are_those_of_the_textbook(dataset, model, cpu, tmp_path):
    test = evaluation.Test(dataset, options(tmp_path), cpu)
    test(model)
    results = json.loads((tmp_path / 'results.json').read_text())
    features = [evaluation.extract(model, items, test.options, cpu)[0] for items in (dataset.query, dataset.gallery)]
    distmat = torch.cdist(*features).square().numpy()
    ids = [
        np.array([item[column] for item in items]) for column in (1, 2) for items in (dataset.query, dataset.gallery)
    ]
    cmc, mean_ap = eval_metrics.evaluate(distmat, *ids)
    assert results['mAP'] == pytest.approx(mean_ap, abs=1e-6)
    np.testing.assert_allclose(results['cmc'], cmc, atol=1e-6)
    assert len(results['cmc']) == 50
    assert results['queries']['all'] == len(dataset.query)
    assert sum(results['queries'].values()) == 2 * len(dataset.query)  # all, and how each of them fared
    assert results['dataset'] == dataset.name
    assert results['versions']['torch'] == torch.__version__


def test_reranked(dataset, model, cpu, tmp_path, capsys):
    test = evaluation.Test(dataset, options(tmp_path, rerank=True, k1=4, k2=2, lambda_value=0.1), cpu)
    figures = test(model)
    assert 'Re-ranking with k1 4, k2 2, lambda 0.1' in printed(capsys)
    results = json.loads((tmp_path / 'results.json').read_text())
    features = [evaluation.extract(model, items, test.options, cpu)[0] for items in (dataset.query, dataset.gallery)]
    ids = evaluation._ids(dataset.query, dataset.gallery)
    everyone = torch.cat(features)
    expected = reranked_densely(torch.cdist(everyone, everyone).square().numpy(), len(dataset.query), 4, 2, 0.1)
    cmc, mean_ap = eval_metrics.evaluate(expected, *ids)
    assert results['mAP'] == pytest.approx(mean_ap, abs=1e-4)
    assert figures['rank1'] == results['cmc'][0] == pytest.approx(cmc[0])
    assert results['rerank'] == {'k1': 4, 'k2': 2, 'lambda_value': 0.1}


def test_every_test_batch_prints_the_same(dataset, model, cpu, tmp_path, capsys):
    seen = set()
    for test_batch in (1, 2, 3, 7, len(dataset.gallery) - 1, len(dataset.gallery), 10_000):
        evaluation.Test(dataset, options(tmp_path, test_batch=test_batch), cpu)(model)
        seen.add(tuple(printed(capsys)[-12:]))
    assert len(seen) == 1


def test_the_mode_of_the_model_is_kept(data_dir, model, cpu, tmp_path):
    dataset = data_manager.init_dataset('market1501', str(data_dir))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for mode in (True, False):
        model.train(mode)
        evaluation.extract(model, dataset.query, options(tmp_path), cpu)
        assert model.training is mode
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_pool():
    features = torch.tensor([[1.0, 5.0], [3.0, 1.0], [7.0, 7.0]])
    counts = torch.tensor([2, 1])
    assert evaluation.pool(features, counts, 'avg').tolist() == [[2.0, 3.0], [7.0, 7.0]]
    assert evaluation.pool(features, counts, 'max').tolist() == [[3.0, 5.0], [7.0, 7.0]]


def test_queries_without_a_match(data_dir, model, cpu, tmp_path):
    dataset = data_manager.init_dataset('market1501', str(data_dir))
    dataset.gallery = [(path, pid + 1000, camid) for path, pid, camid in dataset.gallery]
    with pytest.raises(UserError, match='gallery'):
        evaluation.Test(dataset, options(tmp_path), cpu)(model)
    assert not (tmp_path / 'results.json').exists()


def test_saved_features_are_ranked_from_disk(dataset, model, cpu, tmp_path, capsys, monkeypatch):
    test = evaluation.Test(dataset, options(tmp_path, save_features=True), cpu)
    test(model)
    figures = printed(capsys)[-9:]
    folders = [tmp_path / 'features' / subset for subset in ('query', 'gallery')]
    features, pids, camids = ranking.read(folders[1])
    assert isinstance(features, np.memmap)
    np.testing.assert_array_equal(features, evaluation.extract(model, dataset.gallery, test.options, cpu)[0])
    assert list(zip(pids, camids, strict=True)) == [item[1:] for item in dataset.gallery]
    monkeypatch.setattr('sys.argv', ['ranking.py', *map(str, folders)])
    ranking.main()
    assert printed(capsys) == figures

    for spoil in (lambda path: path.write_bytes(b'no array'), lambda path: path.unlink()):
        spoil(folders[0] / 'pids.npy')
        with pytest.raises(SystemExit) as end:
            ranking.main()
        err = capsys.readouterr().err
        assert end.value.code == 2 and err.count('\n') == 1 and 'pids.npy cannot be read' in err
