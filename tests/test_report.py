"""The page of a run, made from files that are put together here: plain colours rank toy pictures."""

import base64
import html
import json
import os
import re
import shutil
import subprocess
import sys
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import HANG, ROOT
from matplotlib import colormaps
from PIL import Image
from tiny import Tiny

import data_manager
import models
import ranking
import report
import weights
from eval_metrics import average_precision
from page import activations, charts, lists, runs
from runtime import commands
from runtime.errors import UserError
from transforms import TestTransform

WIDTH, HEIGHT = 1280, 1100  # of the browser's window


def put_run(folder, dataset, noise=0.0, metrics=True):
    """Write the files of a run: `dataset`'s images or tracklets ranked by plain colours with some noise."""
    subsets = dataset.query, dataset.gallery
    rng = np.random.default_rng(1)
    features = [colours(subset) for subset in subsets]  # (N, 72) each
    features = [each + noise * rng.normal(size=each.shape).astype('f4') for each in features]
    pids, camids = ([np.array([item[column] for item in subset]) for subset in subsets] for column in (1, 2))
    result = ranking.rank(*features, *pids, *camids)
    ap = average_precision(result.ranks, result.offsets)
    cameras = 1 + max(map(max, camids))
    camera_map, camera_queries = np.full((cameras, cameras), np.nan), np.zeros((cameras, cameras), np.int64)
    for camera in range(cameras):
        here = camids[1] == camera
        part = ranking.rank(features[0], features[1][here], pids[0], pids[1][here], camids[0], camids[1][here])
        precisions = average_precision(part.ranks, part.offsets)
        for row in range(cameras):
            counted = precisions[(camids[0] == row) & part.valid]
            camera_queries[row, camera] = len(counted)
            camera_map[row, camera] = counted.mean() if len(counted) else np.nan
    files = [[item[0] if isinstance(item[0], tuple) else (item[0],) for item in subset] for subset in subsets]
    files = [['\t'.join(map(str, paths[:8])) for paths in each] for each in files]
    embedded = np.isin(np.concatenate(pids), np.unique(pids[0])[:12])
    write_files(
        folder,
        {
            'mAP': float(np.nanmean(ap)), 'mINP': 0.5, 'cmc': result.cmc(50).tolist(),
            'queries': {'all': len(ap), 'valid': result.num_valid}, 'gallery': len(pids[1]),
            'dataset': 'toy_market1501', 'arch': 'colours of 12 bands', 'checkpoint': None, 'rerank': False,
            'height': 96, 'width': 48, 'precision': 'fp32', 'date': '2018-04-01T12:00:00+00:00', 'seed': 1,
            'device': 'CPU', 'versions': {'numpy': np.__version__}, 'revision': None, 'command': ['colours.py'],
            'dataset_fingerprint': '0123456789abcdef',
        },
        {
            'query_files': text(files[0]), 'gallery_files': text(files[1]), 'q_pids': pids[0], 'g_pids': pids[1],
            'q_camids': camids[0], 'g_camids': camids[1], 'ranks': result.ranks, 'offsets': result.offsets,
            'nearest': result.nearest, 'nearest_distances': result.nearest_distances, 'edges': result.edges,
            'match_histogram': result.match_histogram, 'other_histogram': result.other_histogram,
            'camera_map': camera_map, 'camera_queries': camera_queries,
            'embedding_features': np.concatenate(features)[embedded][:400].astype('f2'),
            'embedding_pids': np.concatenate(pids)[embedded][:400],
            'embedding_camids': np.concatenate(camids)[embedded][:400],
            'embedding_is_query': (np.arange(sum(map(len, pids))) < len(pids[0]))[embedded][:400],
        },
    )  # fmt: skip
    if metrics:
        put_metrics(folder / 'metrics.csv', noise)
    return folder


def write_files(folder, summary, arrays):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / 'results.json').write_text(json.dumps(summary))
    np.savez(folder / 'ranking.npz', **arrays)


def put_metrics(path, noise, epochs=15, batches=48):
    rng = np.random.default_rng(2)
    lines = ['epoch,batch,lr,images_per_s,data_wait,loss,xent,htri,mAP,mINP,rank1,rank5,rank10']
    for epoch in range(1, epochs + 1):
        for batch in range(10, batches, 10):
            xent = 1.2 + 3.4 * np.exp(-epoch / 5) + 0.1 * rng.normal() + noise
            htri = 0.05 + 0.7 * np.exp(-epoch / 4) + 0.03 * rng.normal()
            lr = 6e-4 * 0.1 ** (epoch > 11)
            lines.append(f'{epoch},{batch},{lr},200,0.01,{xent + htri},{xent},{htri},,,,,')
        if epoch % 3 == 0:
            good = 0.85 - 0.5 * np.exp(-epoch / 6) - noise
            lines.append(f'{epoch},,,,,,,,{good - 0.1},{good / 3},{good},{good},{good}')
    path.write_text('\n'.join([*lines[:20], *lines[10:]]) + '\n')  # some rows twice, as after a resume


def summarise(folder, **changes):
    summary = json.loads((folder / 'results.json').read_text())
    (folder / 'results.json').write_text(json.dumps({**summary, **changes}))


def text(items):
    return np.frombuffer('\n'.join(items).encode('utf-8', 'surrogateescape'), np.uint8)


def colours(items):
    """(N, 72) float32: mean and spread of colour in 12 bands of each first frame, less what is usual of its camera."""
    found = []
    for paths, _, _ in items:
        picture = Image.open(paths[0] if isinstance(paths, tuple) else paths).convert('RGB').resize((24, 48))
        bands = np.asarray(picture, np.float32)[:, 6:18].reshape(12, -1, 3) / 255  # (12, pixels, 3)
        found.append(np.stack([bands.mean(1), bands.std(1)]).ravel())
    found, camids = np.stack(found), np.array([item[2] for item in items])
    for camid in set(camids.tolist()):
        found[camids == camid] -= found[camids == camid].mean(0)
    return found


def change(folder, **arrays):
    with np.load(folder / 'ranking.npz') as file:
        np.savez(folder / 'ranking.npz', **{**file, **arrays})


def drop(folder, name):
    with np.load(folder / 'ranking.npz') as file:
        arrays = dict(file)
    del arrays[name]
    np.savez(folder / 'ranking.npz', **arrays)


@pytest.fixture(scope='session')
def market(data_dir):
    return data_manager.init_dataset('market1501', str(data_dir))


@pytest.fixture
def saved(tmp_path, market):
    return put_run(tmp_path / 'run', market)


# ------------------------------------------------------------------------------------------------------------ the page


def test_the_page_is_one_file_that_asks_for_nothing(saved):
    path = report.write(saved)
    page = path.read_text()
    assert path == saved / 'report.html' and len(page) < 4e6
    assert sorted(file.name for file in saved.iterdir()) == [
        'metrics.csv',
        'ranking.npz',
        'report.html',
        'results.json',
    ]
    assert not re.findall(r'(?:src=|href=|url\()"?(?!data:|"?#)[^"]+', page)
    for name in ('Loss', 'Learning rate', 'Tests during training', 'Cumulative match', 'Distances', 'Embedding'):
        assert f'<h3>{name}' in page
    assert page.count('<img ') == page.count('data:image/jpeg')
    assert '$' not in ''.join(re.findall(r'<text.*?</text>', page, re.S))


def test_without_training_the_page_has_no_curves_of_it(tmp_path, market):
    page = report.write(put_run(tmp_path, market, metrics=False)).read_text()
    assert '<h3>Loss' not in page and '<h3>Cumulative match' in page


def test_a_reranked_test_has_no_cameras(saved):
    change(saved, camera_map=np.empty((0, 0)), camera_queries=np.empty((0, 0), int))
    assert 'pair of cameras' not in report.write(saved).read_text()
    summarise(saved, cameras_left_out='--rerank')
    assert '<p>Left out: --rerank.</p>' in report.write(saved).read_text()


def test_cameras_are_called_by_their_camids(saved):
    means, counts = np.array([[np.nan, 0.5], [0.25, np.nan]]), np.array([[0, 3], [2, 0]])
    change(saved, camera_ids=np.array([-7, 10**15]), camera_map=means, camera_queries=counts)
    page = report.write(saved).read_text()
    assert '<th scope="col">camera -7</th><th scope="col">camera 1000000000000000</th>' in page
    assert 'Cameras are named by their camids.' in page and 'tracklets' not in page
    assert re.search(r'<th scope="row">camera -7</th><td aria-label="no query">–</td><td [^>]*>50.0', page)


def test_a_table_of_too_many_cameras_is_not_shown(saved):
    """As earlier versions wrote it."""
    change(saved, camera_map=np.ones((33, 33)), camera_queries=np.ones((33, 33), int))
    page = report.write(saved).read_text()
    assert '<p>Left out: 33 cameras, more than 32.</p>' in page and 'camera 32' not in page


def test_names_are_never_markup(tmp_path, market):
    name = '<img src=x onerror=alert(1)>.jpg'
    shutil.copy(market.query[0][0], tmp_path / name)
    folder = put_run(tmp_path / '<b>run</b> & $x$', market)
    summary = json.loads((folder / 'results.json').read_text())
    summary.update(dataset='<script>alert(2)</script>', checkpoint='"><script>', command=['</code><script>'])
    (folder / 'results.json').write_text(json.dumps(summary))
    change(folder, query_files=text([str(tmp_path / name)] * len(market.query)))
    other = put_run(tmp_path / 'other', market, noise=0.3)
    change(other, query_files=text([str(tmp_path / name)] * len(market.query)))
    for page in (report.write(folder), report.compare([folder, other], tmp_path / 'out.html')):
        page = page.read_text()
        assert '&lt;img src=x onerror=alert(1)&gt;.jpg' in page and '<img src=x' not in page
        assert page.count('<script') == 1 and '<b>run</b>' not in page


def test_names_that_are_no_utf8(saved, market):
    change(saved, query_files=text(['lost\udcff.jpg'] * len(market.query)))
    assert 'lost?.jpg' in report.write(saved).read_text()


def test_names_that_begin_with_an_underscore_are_in_the_legends(tmp_path, market, monkeypatch):
    folders = [put_run(tmp_path / name, market) for name in ('_old', 'new')]
    pids = np.unique([pid for _, pid, _ in market.query])
    change(folders[0], named_pids=pids, pid_names=text([f'_unknown {pid}' for pid in pids]))
    assert report.write(folders[0]).read_text().count('> _unknown ') >= 2
    monkeypatch.chdir(tmp_path)
    compared = report.compare(['_old', 'new'], 'compare.html').read_text()
    assert compared.count('> _old</text>') == compared.count('>new</text>') >= 3


def test_pictures_that_are_gone_leave_a_box(saved, market):
    change(saved, gallery_files=text([f'gone/{i}.jpg' for i in range(len(market.gallery))]))
    page = report.write(saved).read_text()
    assert page.count('class="missing"') > len(market.query) and 'images were not found' in page


def test_tracklets_are_strips(tmp_path, data_dir):
    dataset = data_manager.init_dataset('mars', str(data_dir))
    page = report.write(put_run(tmp_path, dataset)).read_text()
    strips = [Image.open(BytesIO(base64.b64decode(each))) for each in re.findall(r'base64,([^"]+)"', page)]
    assert {strip.height for strip in strips} == {lists.STRIP_HEIGHT}
    assert {strip.width // 40 for strip in strips} <= set(range(1, 6)) and max(strip.width for strip in strips) > 100


def test_which_queries_are_shown(tmp_path, saved):
    run = runs.read(saved)
    examples = lists.examples(run)
    shown = [query['index'] for query in examples['queries']]
    assert shown == sorted(shown, key=lambda i: (run.ap[i], i)) and set(shown) <= set(np.flatnonzero(run.valid))
    assert all(query['groups'] for query in examples['queries'])


def test_rows_that_a_resume_repeats_count_once(saved):
    run = runs.read(saved)
    assert [len(each) for each in run.curve('loss')] == [15 * 4] * 2 and run.curve('mAP')[0].tolist() == [
        3,
        6,
        9,
        12,
        15,
    ]
    assert len(run.metrics['epoch']) == 15 * 4 + 5 and run.curve('loss')[0][-1] == 15
    assert run.losses == ['loss', 'xent', 'htri']


@pytest.mark.parametrize(
    'spoil',
    [
        lambda folder: (folder / 'results.json').unlink(),
        lambda folder: (folder / 'ranking.npz').unlink(),
        lambda folder: (folder / 'results.json').write_text('{}'),
        lambda folder: (folder / 'results.json').write_text('[1'),
        lambda folder: (folder / 'ranking.npz').write_bytes((folder / 'ranking.npz').read_bytes()[:900]),
        lambda folder: change(folder, ranks=np.load(folder / 'ranking.npz')['ranks'] + 1),  # of another test
        lambda folder: change(folder, query_files=text(['one.jpg'])),
        lambda folder: drop(folder, 'camera_map'),
        lambda folder: (folder / 'metrics.csv').write_text('epoch,batch\n1,2\n'),
        lambda folder: (folder / 'report.html').mkdir(),
    ],
)
def test_a_folder_without_results_is_refused_in_one_line(saved, spoil):
    spoil(saved)
    with pytest.raises(UserError) as refused:
        report.write(saved)
    assert '\n' not in str(refused.value) and str(saved) in str(refused.value)


@pytest.mark.parametrize(
    'rows', ['epoch;batch;loss\n1;2;3\n', 'epoch,batch\n1,x\n', 'epoch,batch,mAP\n', 'epoch,batch\n\0' + '0' * 200_000]
)
def test_a_damaged_table_of_the_training_is_named(saved, rows):
    """A test writes it no better, so the advice is another one than for the results."""
    (saved / 'metrics.csv').write_text(rows)
    with pytest.raises(UserError, match=rf'{saved}/metrics\.csv is damaged \(.*\); without it the page has no curves'):
        report.write(saved)
    (saved / 'metrics.csv').unlink()
    assert report.write(saved).exists()


# ------------------------------------------------------------------------------------------------------------- numbers


def test_interval_is_that_of_a_loop():
    values = np.random.default_rng(3).beta(2, 1, size=(300, 2))
    rng = np.random.default_rng(4)
    means = [values[rng.integers(300, size=300)].mean(0) for _ in range(4000)]
    assert runs.interval(values) == pytest.approx(np.percentile(means, (2.5, 97.5), axis=0), abs=0.004)


def test_interval_covers_the_mean_of_the_population_in_95_of_100_samples():
    rng = np.random.default_rng(5)
    low, high = np.stack([runs.interval(rng.exponential(size=(120, 1)))[:, 0] for _ in range(300)]).T
    assert 0.90 < np.mean((low <= 1) & (high >= 1)) < 0.98


def test_interval_of_equal_values_is_that_value():
    assert runs.interval(np.full((7, 1), 0.25)).tolist() == [[0.25], [0.25]]


def test_scores_are_the_figures_of_each_query(saved):
    run = runs.read(saved)
    assert list(run.scores) == ['mAP', 'mINP', 'rank1', 'rank5', 'rank10']
    offsets, scores = run.arrays['offsets'], np.stack([*run.scores.values()], axis=1)  # (Q, 5)
    for query in range(len(run.valid)):
        ranks = run.arrays['ranks'][offsets[query] : offsets[query + 1]]
        if not len(ranks):
            assert np.isnan(scores[query]).all()
            continue
        ap = np.mean([(i + 1) / rank for i, rank in enumerate(ranks)])
        assert scores[query].tolist() == pytest.approx(
            [ap, len(ranks) / ranks[-1], *(float(ranks[0] <= k) for k in (1, 5, 10))]
        )
    assert [(label, mean) for label, mean, *_ in run.figures] == [
        (label, pytest.approx(scores[run.valid, column].mean()))
        for column, label in enumerate(('mAP', 'mINP', 'Rank-1', 'Rank-5', 'Rank-10'))
    ]


def test_threshold_is_the_largest_that_keeps_the_rate(saved):
    change(
        saved,
        edges=np.arange(6, dtype='f4'),
        match_histogram=np.array([5, 3, 0, 2, 0]),
        other_histogram=np.array([0, 1, 0, 9, 990]),
    )
    note = charts.distances(runs.read(saved))['note']
    assert re.search(r'at 1%, 4\.0* and 100\.0%; at 0\.1%, 3\.0* and 80\.0%', note)


def test_no_share_is_above_100():
    nearly_perfect = SimpleNamespace(first_ranks=np.r_[2, np.ones(300)], valid=np.full(301, True))
    ticks = [float(each) for each in re.findall(r'<text[^>]*>([\d.]+)</text>', charts.cmc([nearly_perfect])['svg'])]
    assert 99 in ticks and max(ticks) == 100


# ------------------------------------------------------------------------------------------------------------- compare


def test_compare(tmp_path, market):
    saved = [put_run(tmp_path / name, market, noise) for name, noise in (('a', 0), ('b', 0.15), ('c', 0.3))]
    page = report.compare(saved, tmp_path / 'out.html').read_text()
    scores = [runs.read(folder).ap for folder in saved]
    assert page.count(' against ') == 3 + 1  # the rows of the table and its head
    for left, right in ((0, 1), (0, 2), (1, 2)):
        gain = scores[right] - scores[left]
        low, high = runs.interval(gain[:, None])[:, 0]
        cells = f'<td>{100 * gain.mean():+.1f}</td><td>{100 * low:+.1f} to {100 * high:+.1f}</td>'.replace('-', '−')
        assert f'{saved[right]} against {saved[left]}</th>{cells}' in page
    change_of = np.ptp(scores, axis=0)
    shown = [int(index) for index in re.findall(r'data-index="(\d+)"', page)]
    assert change_of[shown].tolist() == sorted(change_of, reverse=True)[: len(shown)]


def test_compare_refuses_other_queries(tmp_path, saved, market):
    other = put_run(tmp_path / 'other', market)
    change(other, q_pids=np.load(other / 'ranking.npz')['q_pids'][::-1])
    with pytest.raises(UserError, match='different queries'):
        report.compare([saved, other], tmp_path / 'out.html')
    assert not (tmp_path / 'out.html').exists()


def test_compare_allows_data_that_moved(tmp_path, saved, market):
    other = put_run(tmp_path / 'other', market)
    change(other, query_files=text([f'elsewhere/{Path(item[0]).name}' for item in market.query]))
    assert report.compare([saved, other], tmp_path / 'out.html').exists()


def put_summary(folder, **changes):
    path = folder / 'results.json'
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_compare_lists_the_notices_and_the_settings_that_differ(tmp_path, saved, market):
    other = put_run(tmp_path / 'other', market)
    assert 'Notice' not in report.compare([saved, other], tmp_path / 'out.html').read_text()
    put_summary(other, notices=['<b>random</b>'], height=64, precision='bf16', dataset_fingerprint='f')
    page = report.compare([saved, other], tmp_path / 'out.html').read_text()
    assert [html.unescape(notice) for notice in re.findall('Notice: (.*)</p>', page)] == [
        f'{other}: <b>random</b>',
        f'the runs were tested with different input sizes ({saved}: 96 × 48 pixels; {other}: 64 × 48 pixels)',
        f'the runs were tested with different precisions ({saved}: fp32; {other}: bf16)',
        f'the runs were tested with different data sets ({saved}: toy_market1501, fingerprint 0123456789abcdef; '
        f'{other}: toy_market1501, fingerprint f)',
    ]


def test_compare_lists_the_protocols_that_differ(tmp_path, saved, market):
    other = put_run(tmp_path / 'other', market)
    put_summary(saved, seq_len=15, pool='avg', multi_query=False, any_camera=False, interpolation='bilinear')
    reranked = {'k1': 20, 'k2': 6, 'lambda_value': 0.3}
    put_summary(other, seq_len=0, pool='max', multi_query={'items': 9}, any_camera=True, rerank=reranked)
    put_summary(other, interpolation='bicubic')
    page = report.compare([saved, other], tmp_path / 'out.html').read_text()
    words = [
        ('ways of resizing', 'bilinear', 'bicubic'),
        ('rankings', 'not re-ranked', 're-ranked, k1 20, k2 6, lambda_value 0.3'),
        ('matches', 'from other cameras', 'from any camera'),
        ('queries', 'single', 'multi-query, items 9'),
        ('numbers of frames', '15', 'all'),
        ('poolings', 'avg', 'max'),
    ]
    assert [html.unescape(notice) for notice in re.findall('Notice: (.*)</p>', page)] == [
        f'the runs were tested with different {what} ({saved}: {one}; {other}: {another})'
        for what, one, another in words
    ]
    older = put_run(tmp_path / 'older', market)  # whose frames are unknown
    assert 'Notice' not in report.compare([saved, older], tmp_path / 'out.html').read_text()


def test_compare_needs_no_training_set(tmp_path, saved, market):
    """Files of earlier versions have one fingerprint, which includes it."""
    other = put_run(tmp_path / 'other', market)
    for folder, whole in ((saved, 'a'), (other, 'b')):
        put_summary(folder, dataset_fingerprint=whole, test_fingerprint='t')
    assert 'Notice' not in report.compare([saved, other], tmp_path / 'out.html').read_text()
    older = put_run(tmp_path / 'older', market)
    put_summary(older, dataset_fingerprint='a')
    page = report.compare([saved, other, older], tmp_path / 'out.html').read_text()
    assert f'({saved}: toy_market1501, fingerprint a; {other}: toy_market1501, fingerprint b; {older}: toy' in page
    assert 'Notice' not in report.compare([saved, older], tmp_path / 'out.html').read_text()
    put_summary(other, test_fingerprint='u')
    page = report.compare([saved, other], tmp_path / 'out.html').read_text()
    assert f'({saved}: toy_market1501, fingerprint t; {other}: toy_market1501, fingerprint u)' in page


@pytest.mark.parametrize('notices', [None, 5, 'text'])
def test_notices_that_are_none(notices, saved):
    put_summary(saved, notices=notices)
    assert 'Notice' not in report.write(saved).read_text()


def test_unknown_cameras_are_not_numbered(saved):
    put_summary(saved, no_cameras=True, any_camera=True, cameras_left_out='the cameras are unknown')
    page = report.write(saved).read_text()
    assert '<p>Left out: the cameras are unknown.</p>' in page and ', unknown camera</h3>' in page
    assert not re.search(r'camera \d', page)


def test_names_with_spaces_and_commands_can_be_used(saved):
    """HTML collapses spaces, so an option needs its value; a shell separates words."""
    put_summary(saved, command=['train.py', '-d', 'csv:my tables/p.csv'])
    with np.load(saved / 'ranking.npz') as file:
        pids = np.unique(file['q_pids'])
    change(saved, named_pids=pids, pid_names=text([f'Ann  {pid}' for pid in pids]))
    page = report.write(saved).read_text()
    assert f'<option value="Ann  {pids[0]}">Ann  {pids[0]}</option>' in page
    assert '<code>train.py -d &#39;csv:my tables/p.csv&#39;</code>' in page


def test_missing_images_of_equal_names_are_counted_by_path(saved, market):
    change(saved, gallery_files=text([f'gone/{i}/0001.jpg' for i in range(len(market.gallery))]))
    page = report.write(saved).read_text()
    missing = set(re.findall(r'aria-label="rank [^"]*picture not found" title="(\d+/0001.jpg)"', page))
    number = int(re.search(r'<strong id="missing">(\d+) images', page)[1])
    assert len(missing) == number > 20


# ------------------------------------------------------------------------------------------------- activations, command


@pytest.fixture(params=['avg', 'gem'])
def checkpoint(request, tmp_path):
    torch.manual_seed(0)
    path = tmp_path / 'tiny.pth.tar'
    network = models.init_model('tiny', 7, pooling=request.param)
    torch.save({'state_dict': network.state_dict(), 'epoch': 0}, path)
    return path


def test_activations_are_the_squared_channels(tmp_path, checkpoint, market, monkeypatch):
    cells = []
    monkeypatch.setattr(activations, '_write_grid', lambda found, *_: cells.extend(found))
    image = market.query[0][0]
    report.activations(checkpoint, [image], 'tiny', '', 64, 32)
    ((name, picture, under),) = cells
    network = Tiny(7).eval()
    network.load_state_dict(torch.load(checkpoint, weights_only=True)['state_dict'], strict=False)  # pool.p of GeM
    pixels = torch.from_numpy(np.array(Image.open(image)))[None]
    with torch.inference_mode():
        channels = network.base(TestTransform(64, 32)([(torch.tensor([0]), pixels)]))[0]  # (16, h, w)
    heat = sum(channel**2 for channel in channels)
    heat = torch.nn.functional.interpolate(heat[None, None], (64, 32), mode='bilinear')[0, 0]
    heat = (heat - heat.min()) / (heat.max() - heat.min())
    assert name == Path(image).name and picture.shape == (64, 32, 3)
    assert np.abs(under - 0.4 * picture - 0.6 * colormaps['inferno'](heat.numpy())[..., :3]).max() < 0.02


def test_activations_write_one_grid(tmp_path, checkpoint, market):
    images = [item[0] for item in market.query[:8]]
    out = report.activations(checkpoint, images, 'tiny', '', 64, 32, tmp_path / 'grid.png')
    with Image.open(out) as grid:
        assert grid.format == 'PNG' and grid.width > 1000
        dark = np.asarray(grid.convert('L')) < 250  # (H, W)
    height = len(dark)
    assert dark[:40].any() and dark[-40:].any()  # no empty margins
    assert dark[height * 5 // 9 : height * 2 // 3, -60:].mean() > 0.5  # 8 in 2 rows of 4


def test_activations_of_a_name_that_is_no_text(tmp_path, checkpoint, market):
    image = os.fsdecode(bytes(tmp_path / 'caf') + b'\xe9.png')
    Image.open(market.query[0][0]).save(image)
    out = report.activations(checkpoint, [image], 'tiny', '', 64, 32, tmp_path / 'grid.png')
    assert out.exists()


def test_activations_are_of_the_size_of_the_training(tmp_path, market, capsys):
    path = tmp_path / 'tiny.pth.tar'
    arguments = {'arch': 'tiny', 'height': 32, 'width': 16}
    state = {'format': weights.FORMAT, 'state_dict': Tiny(7).state_dict(), 'arguments': arguments}
    torch.save(state, path)
    notice = f'Notice: {path} was trained with --height 32, and is used with --height 64\n'
    for size, told in (({}, ''), ({'height': 64}, notice)):
        report.activations(path, [market.query[0][0]], **size, out=tmp_path / 'grid.png')
        assert capsys.readouterr().out.partition('Model size: 0.00192M\n')[2] == told


def command(*args, cwd=ROOT):
    done = subprocess.run(
        [sys.executable, str(ROOT / 'report.py'), *map(str, args)],
        cwd=cwd, capture_output=True, text=True, timeout=HANG, env={**os.environ, 'OMP_NUM_THREADS': '1'},
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


def test_command_writes_the_page(saved):
    assert command(saved) == (0, f'Wrote {saved}/report.html\n', '')


@pytest.mark.parametrize(
    ('args', 'words'),
    [
        ([], '--save-dir of one or more runs'),
        (['nowhere'], 'nowhere/results.json cannot be read'),
        (['--activations', 'only.pth.tar'], 'no image'),
        (['--activations', 'no.pth.tar', 'image.jpg'], 'no.pth.tar cannot be read'),
        (['a', '--height', 'x'], 'height'),
        (['a', '--height', '64'], 'are for --activations: remove them'),
        (['a', '--activations', 'b', 'c'], 'or --activations'),
        (['a', '--out', 'b'], 'report.html'),
        (['a', 'b', '--out', 'b.png'], 'a name that ends in .html'),
        (['--activations', 'a', 'b', '--out', 'b.jpg'], 'a name that ends in .png'),
        (['--activations', 'a', 'b.png', '--out', './b.png'], 'is one of the images'),
        (['--activations', 'a', *['b'] * 601], '601 images; give at most 600'),
    ],
)
def test_mistakes_are_reported_in_one_line(args, words, capsys, monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['report.py', *args])
    with pytest.raises(SystemExit) as end:
        commands.run(report.main)
    line = capsys.readouterr().err
    assert end.value.code == 2 and line.startswith('error: ') and line.count('\n') == 1 and words in line


def test_pictures_are_imported_with_the_first_page():
    check = 'import sys, report; sys.exit(bool({"matplotlib", "jinja2", "torch"} & set(sys.modules)))'
    assert subprocess.run([sys.executable, '-c', check], cwd=ROOT, timeout=HANG).returncode == 0


@pytest.mark.parametrize(('mode', 'value'), [('I;16', 20000), ('L', 78), ('RGBA', (78, 78, 78, 0))])
def test_an_image_is_shown_as_the_network_sees_it(mode, value, tmp_path):
    """16-bit images by their upper 8 bits."""
    Image.new(mode, (32, 64), value).save(tmp_path / 'a.png')
    shown = lists.thumbnail((str(tmp_path / 'a.png'),), 1)
    pixels = np.asarray(Image.open(BytesIO(base64.b64decode(shown.split(',')[1]))))
    assert np.abs(pixels.astype(int) - 78).max() <= 2
