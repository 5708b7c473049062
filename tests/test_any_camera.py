"""--any-camera: only the query's own file is dropped, in a test and in `python ranking.py`."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import textbook
import torch
from test_eval_metrics import figures
from test_evaluation import options, printed
from test_reranking import reranked_densely
from tiny import Tiny

import data_manager
import evaluation
import page
import ranking
from page import runs
from runtime import commands
from runtime.errors import UserError

LINE = "Any camera: matches from the query's own camera count too; "


@pytest.fixture(params=['market1501', 'mars', 'mars_official'])
def dataset(request, data_dir):
    return data_manager.init_dataset(request.param, str(data_dir))


@pytest.fixture
def one_camera(dataset, tmp_path):
    """All items in camera 0; some queries are also in the gallery, under the same path or through a link."""
    dataset.query = [(paths, pid, 0) for paths, pid, _ in dataset.query]
    dataset.gallery = [(paths, pid, 0) for paths, pid, _ in dataset.gallery]
    for number, (paths, pid, _) in enumerate(dataset.query[:6]):
        frames = [paths] if isinstance(paths, str) else list(paths)
        for k, frame in enumerate(frames if number % 3 else []):
            link = tmp_path / f'{number}_{k}{Path(frame).suffix}'
            [link.symlink_to, link.hardlink_to][number % 3 - 1](os.path.abspath(frame))
            frames[k] = str(link)
        dataset.gallery.append((frames[0] if isinstance(paths, str) else tuple(frames), pid, 0))
    return dataset


def is_own_file(dataset):
    """(query, item) -> whether they are the same file."""

    def frames(item):
        return [item[0]] if isinstance(item[0], str) else item[0]

    def dropped(query, item):
        one, other = frames(dataset.query[query]), frames(dataset.gallery[item])
        return len(one) == len(other) and all(map(os.path.samefile, one, other))

    return dropped


def outcome(dataset, run, folder, **changes):
    torch.manual_seed(0)
    test, model = evaluation.Test(dataset, options(folder, any_camera=True, **changes), run), Tiny(3)
    found = test(model)
    features = [evaluation.extract(model, items, test.options, run)[0] for items in (dataset.query, dataset.gallery)]
    return found, features, json.loads((folder / 'results.json').read_text())


@pytest.mark.parametrize('rerank', [False, True])
def test_equals_the_textbook(rerank, one_camera, run, tmp_path, capsys):
    found, features, results = outcome(one_camera, run, tmp_path, rerank=rerank, k1=4, k2=2)
    everyone = torch.cat(features)
    distances, number = torch.cdist(everyone, everyone).square().numpy(), len(one_camera.query)
    pids = [[item[1] for item in items] for items in (one_camera.query, one_camera.gallery)]
    matrix = reranked_densely(distances, number, 4, 2, 0.3) if rerank else distances[:number, number:]
    curve, mean, penalty = figures(textbook.match_ranks(matrix, *pids, is_own_file(one_camera)))
    assert found['mAP'] == results['mAP'] == pytest.approx(mean, abs=1e-4)
    assert found['mINP'] == pytest.approx(penalty, abs=1e-4)
    np.testing.assert_allclose(results['cmc'], curve, atol=1e-6)
    assert results['any_camera'] is True and results['cameras_left_out'] == '--any-camera'
    lines = printed(capsys)
    assert lines.count(LINE + "only the query's own file is dropped") == 1
    counts = results['queries']
    assert (
        f'Queries: {counts["valid"]} valid, {number - counts["valid"]} skipped '
        f'({counts["match in the same camera only"]} whose only match is their own file, '
        f'{counts["not in the gallery"]} with none in the gallery)'
    ) in lines


def test_the_usual_test_is_as_before(dataset, run, tmp_path):
    evaluation.Test(dataset, options(tmp_path), run)(Tiny(3))
    results = json.loads((tmp_path / 'results.json').read_text())
    assert results['any_camera'] is False and 'match in the same camera only' in results['queries']
    html = page.write(tmp_path).read_text()
    assert "Junk (the query's own identity in its own camera) is excluded, as in the figures. A match" in html
    assert 'from any camera' not in html and 'only match' not in html


def test_the_page_and_the_comparison_say_so(one_camera, run, tmp_path):
    outcome(one_camera, run, tmp_path)
    html = page.write(tmp_path).read_text()
    assert '<li>matches <b>from any camera</b></li>' in html
    only = json.loads((tmp_path / 'results.json').read_text())['queries']['match in the same camera only']
    assert (
        f'<li>queries whose only match is their own file <b>{only}</b></li>' in html
        and '<p>Left out: --any-camera.</p>' in html
    )
    assert "Only the query's own file is excluded, as in the figures." in html and 'Junk' not in html
    assert runs.read(tmp_path).how == ['any camera']
    html = page.compare([tmp_path, tmp_path], tmp_path / 'compare.html').read_text()
    assert html.count('<td>tiny, any camera</td>') == 2


def test_a_query_that_matches_itself_alone(data_dir, run, tmp_path, capsys):
    dataset = data_manager.init_dataset('market1501', str(data_dir))
    (path, pid, _), other = dataset.query[0], dataset.query[-1]
    dataset.query, dataset.gallery = [(path, pid, 0), other], [(path, pid, 1), dataset.gallery[0]]
    with pytest.raises(UserError) as refused:
        evaluation.Test(dataset, options(tmp_path, any_camera=True), run)
    assert str(refused.value) == (
        'none of the 2 queries has a match: 1 whose person is not in the gallery, 1 whose only match is their own '
        'file; a query needs another gallery item of its pid: correct the pids of the data set'
    )
    dataset.gallery.append((other[0] + 'copy', *other[1:]))
    shutil.copy(other[0], tmp_path / 'copy.jpg')  # a copy is another file
    dataset.gallery[-1] = (str(tmp_path / 'copy.jpg'), *other[1:])
    _, _, results = outcome(dataset, run, tmp_path)
    assert results['queries'] == {'all': 2, 'valid': 1, 'match in the same camera only': 1, 'not in the gallery': 0}
    assert '1 skipped (1 whose only match is their own file, 0 with none in the gallery)' in capsys.readouterr().out


def ranked(capsys, monkeypatch, folder, *more):
    """What `python ranking.py` prints for the features in a folder."""
    capsys.readouterr()
    monkeypatch.setattr('sys.argv', ['ranking.py', f'{folder}/features/query', f'{folder}/features/gallery', *more])
    ranking.main()
    return printed(capsys)


@pytest.mark.parametrize(
    ('how', 'flags'),
    [
        ({}, []),
        ({'rerank': True}, ['--rerank']),
        (
            {'rerank': True, 'k1': 3, 'k2': 2, 'lambda_value': 0.5},
            ['--rerank', '--k1', '3', '--k2', '2', '--lambda', '0.5'],
        ),
    ],
)
@pytest.mark.parametrize('any_camera', [False, True])
def test_saved_features_give_the_lines_of_the_test(how, flags, any_camera, dataset, run, tmp_path, capsys, monkeypatch):
    if any_camera:
        dataset.gallery += dataset.query[:3]
    torch.manual_seed(0)
    evaluation.Test(dataset, options(tmp_path, any_camera=any_camera, save_features=True, **how), run)(Tiny(3))
    lines = printed(capsys)
    lines = lines[lines.index('Computing CMC and mAP') + 1 :]
    assert ranked(capsys, monkeypatch, tmp_path, *flags, *['--any-camera'] * any_camera) == lines
    assert len(lines) == 9 + bool(how) + any_camera


def test_features_without_paths_drop_nothing(data_dir, run, tmp_path, capsys, monkeypatch):
    dataset = data_manager.init_dataset('market1501', str(data_dir))
    dataset.gallery += dataset.query
    torch.manual_seed(0)
    evaluation.Test(dataset, options(tmp_path, any_camera=True, save_features=True), run)(Tiny(3))
    known = ranked(capsys, monkeypatch, tmp_path, '--any-camera')
    (tmp_path / 'features' / 'gallery' / 'paths.jsonl').unlink()
    unknown = ranked(capsys, monkeypatch, tmp_path, '--any-camera')
    assert unknown[0] == LINE + 'no file is dropped, as there is no paths.jsonl'
    assert 'Rank-1  : 100.0%' in unknown and 'Rank-1  : 100.0%' not in known
    (tmp_path / 'features' / 'gallery' / 'paths.jsonl').write_text('"a"\n')
    with pytest.raises(SystemExit) as end:
        commands.run(ranking.main)
    err = capsys.readouterr().err
    assert end.value.code == 2 and err.count('\n') == 1 and 'paths.jsonl has 1 lines for' in err
