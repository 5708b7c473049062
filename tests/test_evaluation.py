import dataclasses
import json
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import textbook
import torch
from test_reranking import reranked_densely
from tiny import Tiny

import data_manager
import eval_metrics
import evaluation
import files.features
import page
import ranking
from arguments import TestOptions
from files import writing
from files.features import create_features, read_paths
from page import runs
from readers.tree import Dataset, ids_of
from runtime import commands, testset
from runtime.device import Run
from runtime.errors import UserError
from runtime.ranks import sample

OPTIONS = TestOptions(
    arch='tiny', height=32, width=16, workers=0, test_batch=5, evaluate=True, no_report=True, seq_len=4
)


class Whole(Tiny):
    """Features of small whole numbers, the same in a batch of any size."""

    @staticmethod
    def of(x):
        return (8 * x[:, :, ::8, ::4].flatten(1)[:, :16]).round()

    def features(self, x):
        return self.of(x)


def options(save_dir, **changes):
    return dataclasses.replace(OPTIONS, save_dir=str(save_dir), **changes)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Tiny(3)


@pytest.fixture(params=['market1501', 'mars', 'mars_official'])
def dataset(request, data_dir):
    return data_manager.init_dataset(request.param, str(data_dir))


def printed(capsys):
    return capsys.readouterr().out.splitlines()


def test_prints_the_lines_of_the_original(dataset, model, run, tmp_path, capsys):
    figures = evaluation.Test(dataset, options(tmp_path), run)(model)
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


def test_results_are_those_of_the_textbook(dataset, model, run, tmp_path):
    test = evaluation.Test(dataset, options(tmp_path), run)
    test(model)
    results = json.loads((tmp_path / 'results.json').read_text())
    features = [evaluation.extract(model, items, test.options, run)[0] for items in (dataset.query, dataset.gallery)]
    distmat = torch.cdist(*features).square().numpy()
    cmc, mean_ap = eval_metrics.evaluate(distmat, *ids_of(dataset.query, dataset.gallery))
    assert results['mAP'] == pytest.approx(mean_ap, abs=1e-6)
    np.testing.assert_allclose(results['cmc'], cmc, atol=1e-6)
    assert len(results['cmc']) == 50
    assert results['queries']['all'] == len(dataset.query)
    assert sum(results['queries'].values()) == 2 * len(dataset.query)  # all, and how each of them fared
    assert results['dataset'] == dataset.name
    assert results['versions']['torch'] == torch.__version__


def test_reranked(dataset, model, run, tmp_path, capsys):
    test = evaluation.Test(dataset, options(tmp_path, rerank=True, k1=4, k2=2, lambda_value=0.1), run)
    figures = test(model)
    assert 'Re-ranking with k1 4, k2 2, lambda 0.1' in printed(capsys)
    results = json.loads((tmp_path / 'results.json').read_text())
    features = [evaluation.extract(model, items, test.options, run)[0] for items in (dataset.query, dataset.gallery)]
    ids = ids_of(dataset.query, dataset.gallery)
    everyone = torch.cat(features)
    expected = reranked_densely(torch.cdist(everyone, everyone).square().numpy(), len(dataset.query), 4, 2, 0.1)
    cmc, mean_ap = eval_metrics.evaluate(expected, *ids)
    assert results['mAP'] == pytest.approx(mean_ap, abs=1e-4)
    assert figures['rank1'] == results['cmc'][0] == pytest.approx(cmc[0])
    assert results['rerank'] == {'k1': 4, 'k2': 2, 'lambda_value': 0.1}


def test_every_test_batch_prints_the_same(dataset, model, run, tmp_path, capsys):
    seen = set()
    for test_batch in (1, 2, 3, 7, len(dataset.gallery) - 1, len(dataset.gallery), 10_000):
        evaluation.Test(dataset, options(tmp_path, test_batch=test_batch), run)(model)
        seen.add(tuple(printed(capsys)[-12:]))
    assert len(seen) == 1


def test_the_mode_of_the_model_is_kept(data_dir, model, run, tmp_path):
    dataset = data_manager.init_dataset('market1501', str(data_dir))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for mode in (True, False):
        model.train(mode)
        evaluation.extract(model, dataset.query, options(tmp_path), run)
        assert model.training is mode
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_pool():
    features = torch.tensor([[1.0, 5.0], [3.0, 1.0], [7.0, 7.0]])
    counts = torch.tensor([2, 1])
    assert evaluation.pool(features, counts, 'avg').tolist() == [[2.0, 3.0], [7.0, 7.0]]
    assert evaluation.pool(features, counts, 'max').tolist() == [[3.0, 5.0], [7.0, 7.0]]


@pytest.mark.parametrize('test_batch', [1, 3])
@pytest.mark.parametrize('pooled', ['avg', 'max'])
def test_all_frames_of_tracklets(pooled, test_batch, data_dir, run, tmp_path, monkeypatch):
    """With --seq-len 0, in batches of no more than FRAMES times --test-batch, which begin and end in any tracklet."""
    monkeypatch.setattr(evaluation, 'FRAMES', 2)
    dataset = data_manager.init_dataset('mars', str(data_dir))
    assert len({len(paths) for paths, _, _ in dataset.gallery}) > 1
    batches = []
    monkeypatch.setattr(Whole, 'features', lambda model, x: batches.append(len(x)) or Whole.of(x))
    how = options(tmp_path, seq_len=0, pool=pooled, test_batch=test_batch)
    features, indices = evaluation.extract(Whole(3), dataset.gallery, how, run)
    assert indices.tolist() == list(range(len(dataset.gallery)))
    number = sum(len(paths) for paths, _, _ in dataset.gallery)
    assert batches == [2 * test_batch] * (number // (2 * test_batch)) + [number % (2 * test_batch)] * (
        number % (2 * test_batch) > 0
    )
    for (paths, pid, camid), feature in zip(dataset.gallery, features, strict=True):
        frames = evaluation.extract(Whole(3), [(path, pid, camid) for path in paths], how, run)[0]  # as images
        expected = textbook.mean_feature(frames) if pooled == 'avg' else frames.amax(0).tolist()
        assert feature.tolist() == np.float32(expected).tolist()  # no sum of such numbers is rounded


def test_all_frames_in_a_test(data_dir, model, run, tmp_path):
    dataset = data_manager.init_dataset('mars', str(data_dir))
    found = evaluation.Test(dataset, options(tmp_path, seq_len=0), run)(model)
    longest = max(len(paths) for paths, _, _ in dataset.query + dataset.gallery)
    for subset in ('query', 'gallery'):  # a tracklet of its frames, each as often as the others
        items = [(paths * (60 // len(paths)), *ids) for paths, *ids in getattr(dataset, subset)]
        setattr(dataset, subset, items)
    assert longest <= 5 and all(len(paths) == 60 for paths, _, _ in dataset.query)
    results = json.loads((tmp_path / 'results.json').read_text())
    assert (results['seq_len'], results['pool']) == (0, 'avg')
    assert '<li>tracklets <b>all frames, avg pooling</b></li>' in page.write(tmp_path).read_text()
    assert runs.read(tmp_path).how == ['all frames']
    again = evaluation.Test(dataset, options(tmp_path, seq_len=60), run)(model)
    assert list(found.values()) == pytest.approx(list(again.values()), abs=1e-6)
    assert '<li>tracklets <b>60 frames, avg pooling</b></li>' in page.write(tmp_path).read_text()


def test_missing_frames_are_noticed_with_all(data_dir, run, tmp_path):
    dataset = data_manager.init_dataset('mars', str(data_dir))
    (paths, *ids), *others = dataset.gallery
    dataset.gallery = [((*paths[:1], f'{tmp_path}/gone.jpg', *paths[1:]), *ids), *others]
    with pytest.raises(UserError, match=r'gone\.jpg: No such file'):
        evaluation.Test(dataset, options(tmp_path, seq_len=0), run)


def test_queries_without_a_match_are_noticed_without_a_look_at_the_disk(data_dir, run, tmp_path, monkeypatch):
    dataset = data_manager.init_dataset('market1501', str(data_dir))
    monkeypatch.setattr(testset, 'look_up', lambda *_: pytest.fail('a file was looked up'))
    gallery, number = dataset.gallery, len(dataset.query)
    dataset.gallery = [(path, pid + 1000, camid) for path, pid, camid in gallery]
    with pytest.raises(
        UserError, match=rf'none of the {number} queries .*: {number} .* not in the gallery, 0 .* same camera'
    ):
        evaluation.Test(dataset, options(tmp_path), run)
    dataset.query = [(path, pid, 0) for path, pid, _ in dataset.query]
    dataset.gallery = [(path, pid, 0) for path, pid, _ in gallery]
    with pytest.raises(
        UserError, match=rf'none of the {number} queries .*: 0 .* not in the gallery, {number} .* same camera'
    ):
        evaluation.Test(dataset, options(tmp_path), run)


def test_one_query_with_a_match_is_enough(data_dir, model, run, tmp_path):
    dataset = data_manager.init_dataset('market1501', str(data_dir))
    _, pid, camid = dataset.query[0]
    match = next(item for item in dataset.gallery if item[1] == pid and item[2] != camid)
    dataset.query, dataset.gallery = [item for item in dataset.query if item[1:] == (pid, camid)], [match]
    dataset.query.append((dataset.query[0][0], 999, 0))
    evaluation.Test(dataset, options(tmp_path), run)(model)
    counts = json.loads((tmp_path / 'results.json').read_text())['queries']
    assert (counts['all'] - counts['valid'], counts['not in the gallery']) == (1, 1)


@pytest.mark.parametrize('subset', ['query', 'gallery'])
def test_an_empty_test_set_is_refused(subset, dataset, run, tmp_path):
    setattr(dataset, subset, [])
    with pytest.raises(UserError, match=f'{dataset.name}: the {subset} set is empty'):
        evaluation.Test(dataset, options(tmp_path), run)


def test_files_that_are_missing_are_named(dataset, run, tmp_path):
    *gallery, (paths, pid, camid) = dataset.gallery
    gone = f'{tmp_path}/gone.jpg'
    dataset.gallery = [*gallery, (gone if isinstance(paths, str) else (*paths, gone), pid, camid)]
    with pytest.raises(
        UserError, match=rf'image {gone}: No such file or directory \(missing: 1 of \d+ files of the test\)'
    ):
        evaluation.Test(dataset, options(tmp_path, seq_len=99), run)
    if not isinstance(paths, str):  # only the frames that a test reads are looked up
        evaluation.Test(dataset, options(tmp_path, seq_len=1), run)


def test_the_first_process_alone_looks_files_up_and_all_fail(data_dir, tmp_path, monkeypatch):
    dataset = data_manager.init_dataset('market1501', str(data_dir))
    monkeypatch.setattr(testset, 'look_up', lambda *_: pytest.fail('a file was looked up'))
    missing = torch.zeros(len(dataset.query) + len(dataset.gallery), dtype=torch.uint8)
    second = SimpleNamespace(rank=1, sum=lambda values: values + missing)
    evaluation.Test(dataset, options(tmp_path), second)
    missing[:2] = 1
    with pytest.raises(UserError, match=rf'{dataset.query[0][0]}: .*missing: 2 of .*, also {dataset.query[1][0]}'):
        evaluation.Test(dataset, options(tmp_path), second)


def test_the_look_up_ends_with_its_time(tmp_path):
    gone = [f'{tmp_path}/{number}' for number in range(3)]
    assert testset.look_up(gone, seconds=0) == [0]
    (tmp_path / '1').touch()
    (tmp_path / '3').symlink_to('4')
    gone += [f'{tmp_path}/3', f'{tmp_path}/1/below_a_file']
    assert testset.look_up(gone, seconds=float('inf')) == [0, 2, 3, 4]


def test_lists_of_frames_are_tracklets_too(data_dir, model, run, tmp_path):
    """In the training set they work like tuples."""
    dataset = data_manager.init_dataset('mars', str(data_dir))
    figures = evaluation.Test(dataset, options(tmp_path), run)(model)
    for subset in ('query', 'gallery'):
        setattr(dataset, subset, [(list(paths), pid, camid) for paths, pid, camid in getattr(dataset, subset)])
    assert evaluation.Test(dataset, options(tmp_path), run)(model) == figures


@pytest.fixture(params=['Linux', 'macOS'])
def system(request, monkeypatch):
    if request.param == 'macOS':
        monkeypatch.delattr(os, 'posix_fallocate')


def test_features_that_do_not_fit_on_the_disk(system, dataset, run, small_disk):
    """It is noticed before they are extracted."""
    with pytest.raises(UserError, match=r'--save-features: .*query/features.npy cannot be written \(No space left'):
        create_features(str(small_disk), 'query', dataset.query, 200_000 // len(dataset.query), run)


def test_space_is_reserved_and_contents_stay(system, tmp_path, monkeypatch):
    monkeypatch.setattr(writing, 'BYTES_AT_ONCE', 1 << 12)
    path = tmp_path / 'features.npy'
    np.lib.format.open_memmap(path, 'w+', np.float32, (9, 1111))[:] = 7
    with open(path, 'r+b') as file:
        file.truncate(1 << 16)  # the rest is a hole
    writing.allocate(path)
    assert path.stat().st_size == 1 << 16 <= path.stat().st_blocks * 512
    assert (np.load(path) == 7).all()


def test_rows_of_a_file_of_features(dataset, run, tmp_path, monkeypatch):
    """Each process writes its own; a device gives them in parts."""
    monkeypatch.setattr(files.features, 'COPIED_AT_ONCE', 2)
    items = dataset.gallery[:7]
    file = create_features(str(tmp_path), 'gallery', items, 3, run)
    rows = torch.arange(21.0).view(7, 3)
    for rank in range(2):
        file.write(rows[rank::2].bfloat16(), torch.arange(rank, 7, 2))
    np.testing.assert_array_equal(np.load(file.path), rows)
    file.path.unlink()
    with pytest.raises(UserError, match=r'--save-features: .*features.npy cannot be written \(No such file'):
        file.write(rows, torch.arange(7))


def test_features_of_two_tests_are_never_mixed(dataset, run, tmp_path, monkeypatch):
    """Files of the user beside them remain. A process that is killed while it replaces them leaves no mixture."""

    def save(value):
        for subset in ('query', 'gallery'):
            file = create_features(str(tmp_path), subset, dataset.query, 3, run)
            file.write(torch.full((len(dataset.query), 3), value), torch.arange(len(dataset.query)))
        files.features.keep_features(str(tmp_path), run)

    def values():
        return [np.load(tmp_path / 'features' / subset / 'features.npy')[0, 0] for subset in ('query', 'gallery')]

    save(1.0)
    (tmp_path / 'features' / 'query' / 'mine.txt').write_text('mine')
    save(2.0)
    assert values() == [2, 2] and (tmp_path / 'features' / 'query' / 'mine.txt').read_text() == 'mine'
    replace = Path.replace

    def killed(path, target):
        if path.name == '.features':
            raise KeyboardInterrupt
        return replace(path, target)

    monkeypatch.setattr(Path, 'replace', killed)
    with pytest.raises(KeyboardInterrupt):
        save(3.0)
    assert not (tmp_path / 'features').exists()
    monkeypatch.undo()
    save(4.0)
    assert values() == [4, 4] and sorted(path.name for path in tmp_path.iterdir()) == ['features']
    assert (tmp_path / 'features' / 'query' / 'mine.txt').read_text() == 'mine'


def test_saved_features_are_ranked_from_disk(dataset, model, run, tmp_path, capsys, monkeypatch):
    test = evaluation.Test(dataset, options(tmp_path, save_features=True), run)
    test(model)
    figures = printed(capsys)[-9:]
    folders = [tmp_path / 'features' / subset for subset in ('query', 'gallery')]
    features, pids, camids = ranking.read(folders[1])
    assert isinstance(features, np.memmap)
    np.testing.assert_array_equal(features, evaluation.extract(model, dataset.gallery, test.options, run)[0])
    assert list(zip(pids, camids, strict=True)) == [item[1:] for item in dataset.gallery]
    for folder, items in zip(folders, (dataset.query, dataset.gallery), strict=True):
        assert list(read_paths(folder, len(items))) == [paths for paths, _, _ in items]
    monkeypatch.setattr('sys.argv', ['ranking.py', *map(str, folders)])
    ranking.main()
    assert printed(capsys) == figures

    np.save(folders[0] / 'pids.npy', np.full(len(dataset.query), -1))  # as `extract.py` writes them
    with pytest.raises(UserError, match=r'query/pids.npy has -1 for every person, as extract.py .* replace it with'):
        ranking.main()

    for spoil in (lambda path: path.write_bytes(b'no array'), lambda path: path.unlink()):
        spoil(folders[0] / 'pids.npy')
        with pytest.raises(SystemExit) as end:
            commands.run(ranking.main)
        err = capsys.readouterr().err
        assert end.value.code == 2 and err.count('\n') == 1 and 'pids.npy cannot be read' in err


def test_with_flip_test_a_feature_is_the_mean_with_that_of_the_mirror_image(dataset, model, run, tmp_path):
    class Mirror(Tiny):
        def forward(self, x):
            return super().forward(x.flip(3))

    mirror = Mirror(3)
    mirror.load_state_dict(model.state_dict())
    plain, mirrored = (evaluation.extract(each, dataset.query, options(tmp_path), run)[0] for each in (model, mirror))
    both, _ = evaluation.extract(model, dataset.query, options(tmp_path, flip_test=True), run)
    assert not torch.allclose(plain, mirrored)
    torch.testing.assert_close(both, (plain + mirrored) / 2)


def test_images_are_resized_as_the_model_or_the_option_says(data_dir, model, run, tmp_path):
    query = data_manager.init_dataset('market1501', str(data_dir)).query
    bilinear, bicubic = (
        evaluation.extract(model, query, options(tmp_path, interpolation=name), run)[0]
        for name in ('bilinear', 'bicubic')
    )
    assert torch.equal(evaluation.extract(model, query, options(tmp_path), run)[0], bilinear)
    model.interpolation = 'bicubic'
    assert torch.equal(evaluation.extract(model, query, options(tmp_path), run)[0], bicubic)
    assert not torch.equal(bilinear, bicubic)


def test_the_distance_is_that_of_the_figures_the_files_and_the_page(dataset, model, run, tmp_path):
    features = [evaluation.extract(model, items, OPTIONS, run)[0] for items in (dataset.query, dataset.gallery)]
    unit = [torch.nn.functional.normalize(each) for each in features]
    expected = ranking.rank(*unit, *ids_of(dataset.query, dataset.gallery))
    evaluation.Test(dataset, options(tmp_path, distance='cosine', no_report=False), run)(model)
    results = json.loads((tmp_path / 'results.json').read_text())
    assert results['distance'] == 'cosine' and results['mAP'] == pytest.approx(expected.mAP, abs=1e-6)
    nearest = np.load(tmp_path / 'ranking.npz')['nearest_distances']
    np.testing.assert_allclose(nearest, expected.nearest_distances / 2, atol=1e-5)
    assert 'cosine distance' in (tmp_path / 'report.html').read_text()
    evaluation.Test(dataset, options(tmp_path, distance='cosine', rerank=True), run)(model)
    how = 20, 6, 0.3
    reranked = ranking.rerank(*unit, *ids_of(dataset.query, dataset.gallery), *how)
    assert json.loads((tmp_path / 'results.json').read_text())['mAP'] == pytest.approx(reranked.mAP, abs=1e-6)


@pytest.mark.parametrize('distance', ['euclidean', 'cosine'])
def test_saved_features_are_ranked_by_the_distance_of_the_test(
    distance, dataset, model, run, tmp_path, monkeypatch, capsys
):
    other = {'euclidean': 'cosine', 'cosine': 'euclidean'}[distance]
    evaluation.Test(dataset, options(tmp_path, distance=other), run)(model)
    otherwise = printed(capsys)[-9:]
    evaluation.Test(dataset, options(tmp_path, distance=distance, save_features=True), run)(model)
    expected = printed(capsys)[-9:]
    folders = [str(tmp_path / 'features' / subset) for subset in ('query', 'gallery')]
    named = ['Distance: cosine']
    for more, lines in (
        ([], named * (distance == 'cosine') + expected),
        (['--distance', other], named * (other == 'cosine') + otherwise),
    ):
        monkeypatch.setattr('sys.argv', ['ranking.py', *folders, *more])
        ranking.main()
        assert printed(capsys) == lines
    assert expected != otherwise


def test_the_embedding_of_large_features_is_finite():
    """Half precision ends at 65504."""
    items = [(f'{row}.jpg', row % 3, row % 2) for row in range(12)]
    dataset, run = Dataset('x', [], items[:6], items[6:]), Run(torch.device('cpu'))
    features = torch.linspace(-1, 1, 12 * 4).view(12, 4)
    arrays = [
        sample((scale * features[:6], torch.arange(6)), (scale * features[6:], torch.arange(6)), dataset, run)
        for scale in (1, 1e6)
    ]
    small, large = (each['embedding_features'].astype(float) for each in arrays)
    assert np.array_equal(small, features.half().numpy())
    np.testing.assert_allclose(large / large.max(), small / small.max(), atol=1e-3)
