"""--multi-query: the mean of the features of all images of a query's person in its camera."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import textbook
import torch
from test_any_camera import ranked
from test_eval_metrics import figures
from test_evaluation import options, printed
from tiny import Tiny

import data_manager
import evaluation
import page
import ranking
from page import runs
from runtime.errors import UserError


@pytest.fixture
def market(data_dir):
    return data_manager.init_dataset('market1501', str(data_dir))


def outcome(dataset, run, folder, **changes):
    """Figures, results.json and the features of some items as a test extracts them."""
    torch.manual_seed(0)
    test, model = evaluation.Test(dataset, options(folder, multi_query=True, **changes), run), Tiny(3)
    found = test(model)
    return (
        found,
        json.loads((folder / 'results.json').read_text()),
        lambda items: [feature.numpy() for feature in evaluation.extract(model, items, test.options, run)[0]],
    )


def check(dataset, images, run, folder, dropped, **changes):
    """The test against a loop: `images` are those that may be averaged. Returns results.json."""
    found, results, features_of = outcome(dataset, run, folder, **changes)
    means, used = [], 0
    for _, pid, camid in dataset.query:
        some = [item for item in images if item[1:] == (pid, camid)]
        means.append(textbook.mean_feature(features_of(some)))
    used = [item for item in images if item[1:] in {query[1:] for query in dataset.query}]
    gallery = features_of(dataset.gallery)
    distances = [[float(np.square(np.subtract(mean, feature)).sum()) for feature in gallery] for mean in means]
    pids = [[item[1] for item in items] for items in (dataset.query, dataset.gallery)]
    curve, mean, penalty = figures(textbook.match_ranks(distances, *pids, dropped))
    assert found['mAP'] == results['mAP'] == pytest.approx(mean, abs=1e-4)
    assert found['mINP'] == pytest.approx(penalty, abs=1e-4)
    np.testing.assert_allclose(results['cmc'], curve, atol=1e-6)
    assert results['multi_query'] == {'items': len(used)}
    return means


def of_gt_bbox(dataset):
    """(path, pid, camid) by the names."""
    folder = Path(dataset.query[0][0]).parents[1] / 'gt_bbox'
    return [(str(path), int(path.name[:4]), int(path.name[6]) - 1) for path in sorted(folder.iterdir())]


@pytest.mark.parametrize('save_features', [False, True])
def test_market1501_equals_the_textbook(save_features, market, run, tmp_path, capsys, monkeypatch):
    market.query[0], market.query[3] = market.query[3], market.query[0]  # in any order

    def dropped(query, item):
        return market.gallery[item][2] == market.query[query][2]

    images = of_gt_bbox(market)
    means = check(market, images, run, tmp_path, dropped, save_features=save_features)
    lines = printed(capsys)
    assert f'Extracted features for multi-query set, obtained {len(images)}-by-16 matrix' in lines
    line = 'Multi-query: the feature of a query is the mean over the images of its person in its camera'
    assert lines.count(line) == 1 and not any('query set, obtained' in line for line in lines if '-query' not in line)
    if save_features:  # those that were ranked, with the paths of the queries
        features, pids, _ = ranking.read(tmp_path / 'features' / 'query')
        np.testing.assert_allclose(features, means, atol=1e-5)
        assert pids.tolist() == [pid for _, pid, _ in market.query]
        assert ranked(capsys, monkeypatch, tmp_path) == lines[-9:]
        counts = np.load(tmp_path / 'features' / 'query' / 'counts.npy')
        assert counts.tolist() == [sum(item[1:] == query[1:] for item in images) for query in market.query]
        with pytest.raises(UserError, match=r'features/query are means over several .* save them without --multi'):
            ranked(capsys, monkeypatch, tmp_path, '--any-camera')
        evaluation.Test(market, options(tmp_path, save_features=True), run)(Tiny(3))
        assert ranked(capsys, monkeypatch, tmp_path, '--any-camera')[0].startswith('Any camera')


def test_images_of_other_persons_and_cameras_are_not_read(market, run, tmp_path):
    """The real gt_bbox shows all persons in all cameras."""
    held = market.multi_query()
    (_, pid, camid), *_ = held
    others = [('nowhere.jpg', 999, camid), ('nowhere.jpg', pid, camid + 1)]
    assert others[1][1:] not in {item[1:] for item in market.query}
    market.multi_query = lambda: others + held
    _, results, _ = outcome(market, run, tmp_path)
    assert results['multi_query'] == {'items': len(held)}


def test_works_with_reranking(market, run, tmp_path):
    (tmp_path / 'one').mkdir()
    plain, _, features_of = outcome(market, run, tmp_path / 'one')
    found, results, _ = outcome(market, run, tmp_path, rerank=True, k1=4, k2=2)
    means = [
        textbook.mean_feature(features_of([item for item in of_gt_bbox(market) if item[1:] == query[1:]]))
        for query in market.query
    ]
    ids = [[item[column] for item in items] for column in (1, 2) for items in (market.query, market.gallery)]
    gallery = np.stack(features_of(market.gallery))
    expected = ranking.rerank(np.array(means, np.float32), gallery, *ids, 4, 2)
    assert found['mAP'] == pytest.approx(expected.mAP, abs=1e-5) and results['rerank'] and plain


def test_with_cosine_distance_features_of_length_1_are_averaged(market, run, tmp_path, capsys, monkeypatch):
    found, _, features_of = outcome(market, run, tmp_path, distance='cosine', save_features=True)
    lines = printed(capsys)
    means = []
    for query in market.query:
        some = np.stack(features_of([item for item in of_gt_bbox(market) if item[1:] == query[1:]]))
        means.append(textbook.mean_feature(some / np.linalg.norm(some, axis=1, keepdims=True)))
    ids = [[item[column] for item in items] for column in (1, 2) for items in (market.query, market.gallery)]
    gallery = np.stack(features_of(market.gallery))
    expected = ranking.rank(np.array(means, np.float32), gallery, *ids, distance='cosine')
    assert found['mAP'] == pytest.approx(expected.mAP, abs=1e-5)
    np.testing.assert_allclose(ranking.read(tmp_path / 'features' / 'query')[0], means, atol=1e-5)
    assert ranked(capsys, monkeypatch, tmp_path) == ['Distance: cosine', *lines[-9:]]


def test_the_page_and_the_comparison_say_so(market, run, tmp_path):
    outcome(market, run, tmp_path)
    number = len(of_gt_bbox(market))
    assert f'<li>multi-query <b>means of {number} images</b></li>' in page.write(tmp_path).read_text()
    assert runs.read(tmp_path).how == ['multi-query']
    html = page.compare([tmp_path, tmp_path], tmp_path / 'compare.html').read_text()
    assert html.count('<td>tiny, multi-query</td>') == 2


@pytest.mark.parametrize(
    ('name', 'advice'),
    [
        ('market1501', 'it is part of Market-1501-v15.09.15.zip: unzip that again, or omit the option'),
        ('toy_market1501', 'remove the folder of the toy, and it is drawn again, or omit the option'),
    ],
)
def test_without_gt_bbox(name, advice, data_dir, run, tmp_path):
    root = tmp_path / name
    shutil.copytree(data_dir / 'market1501', root, ignore=shutil.ignore_patterns('gt_bbox'))
    dataset = data_manager.init_dataset(name, str(tmp_path))
    with pytest.raises(UserError) as refused:
        evaluation.Test(dataset, options(tmp_path, multi_query=True), run)
    expected = f'--multi-query needs {root}/gt_bbox, which is missing or empty; {advice}'
    assert str(refused.value) == expected
    (root / 'gt_bbox').mkdir()
    with pytest.raises(UserError) as refused:
        evaluation.Test(dataset, options(tmp_path, multi_query=True), run)
    assert str(refused.value) == expected
    evaluation.Test(dataset, options(tmp_path), run)


def test_a_query_without_images(market, run, tmp_path):
    pid, camid = market.query[2][1:]
    held = [item for item in market.multi_query() if item[1:] != (pid, camid)]
    market.multi_query = lambda: held
    with pytest.raises(
        UserError, match=rf'person and camera of 1 of its 10 queries, the first one {market.query[2][0]}'
    ):
        evaluation.Test(market, options(tmp_path, multi_query=True), run)


def test_images_that_are_missing_are_noticed_before_training(market, run, tmp_path):
    held = [*market.multi_query(), (f'{tmp_path}/gone.jpg', *market.query[0][1:])]
    market.multi_query = lambda: held
    with pytest.raises(UserError, match=r'gone\.jpg: No such file'):
        evaluation.Test(market, options(tmp_path, multi_query=True), run)


@pytest.mark.parametrize('name', ['market1501', 'mars'])
def test_other_data_sets_average_over_their_queries(name, data_dir, run, tmp_path):
    """If they have several of a person in a camera."""
    dataset = data_manager.init_dataset(name, str(data_dir))
    dataset = data_manager.Dataset('mine', dataset.train, dataset.query, dataset.gallery)
    with pytest.raises(UserError, match='mine has one query of each person in a camera, and no other images'):
        evaluation.Test(dataset, options(tmp_path, multi_query=True), run)
    _, pid, camid = dataset.query[1]
    dataset.query += [(dataset.gallery[row][0], pid, camid) for row in range(3)]
    check(
        dataset, dataset.query, run, tmp_path, lambda query, item: dataset.gallery[item][2] == dataset.query[query][2]
    )
    words = 'images' if name == 'market1501' else 'tracklets'
    assert f'means of {len(dataset.query)} {words}</b></li>' in page.write(tmp_path).read_text()
