"""The command search.py: results against brute force, the index behind it, thresholds, and the page."""

import contextlib
import io
import json
import os
import re
import runpy
import shutil
import sqlite3
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from PIL import Image
from tiny import Tiny

import data_manager
import evaluation
import page.found
import search
import weights
from extract import FeatureExtractor
from extraction.images import files_of
from runtime.errors import Unreadable, UserError

OPTIONS = {'arch': 'tiny', 'height': 32, 'width': 16}


@pytest.fixture
def file(tmp_path):
    torch.manual_seed(0)
    path = tmp_path / 'tiny.pth.tar'
    torch.save({'format': weights.FORMAT, 'state_dict': Tiny(6).state_dict(), 'arguments': OPTIONS}, path)
    return path


@pytest.fixture
def gallery(data_dir, tmp_path):
    shutil.copytree(data_dir / 'market1501' / 'bounding_box_test', tmp_path / 'gallery')
    return tmp_path / 'gallery'


@pytest.fixture
def queries(data_dir):
    return files_of([str(data_dir / 'market1501' / 'query')])


@pytest.fixture
def command(file, tmp_path, monkeypatch, capsys):
    """Run search.py in this process; returns the exit status and what was printed."""
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))

    def start(*args, path=file):
        model = ['--weights', path] if path else []
        monkeypatch.setattr(sys, 'argv', ['search.py', *map(str, [*model, '--use-cpu', '-j', '0', *args])])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(ROOT / 'search.py'), run_name='__main__')
        return end.value.code, *capsys.readouterr()

    return start


@pytest.fixture
def found(command, gallery):
    """The results of a search, from its JSON."""

    def start(*args):
        status, out, _ = command('--gallery', gallery, '--json', *args)
        assert status == 0
        return json.loads(out)

    return start


def nearest(file, gallery, query, k):
    """Paths and distances by brute force."""
    extractor = FeatureExtractor(file, 'cpu')
    files = files_of([str(gallery)])
    distances = (extractor(files) - extractor([query])).double().square().sum(1)
    order = distances.argsort(stable=True)[:k]
    return [files[place] for place in order], distances[order].tolist()


def test_the_nearest_images_are_found(found, file, gallery, queries):
    result = found('--query', *queries, '-k', 4)
    assert [each['query'] for each in result['queries']] == [[query] for query in queries]
    for query, each in zip(queries, result['queries'], strict=True):
        paths, distances = nearest(file, gallery, query, 4)
        assert [item['path'] for item in each['results']] == paths
        assert [item['distance'] for item in each['results']] == pytest.approx(distances, rel=1e-4, abs=1e-4)
        assert each['unknown'] is None and {item['match'] for item in each['results']} == {None}
    assert (result['gallery'], result['arch'], result['limit']) == (len(os.listdir(gallery)), 'tiny', None)


def test_the_table_has_the_same(command, found, gallery, queries):
    result = found('--query', queries[0], '-k', 3)['queries'][0]
    status, out, error = command('--gallery', gallery, '--query', queries[0], '-k', 3)
    rows = [f'{n:4}  {each["distance"]:<10.5g}  {each["path"]}' for n, each in enumerate(result['results'], 1)]
    assert (status, out.splitlines()) == (0, [queries[0], *rows])
    assert 'Initializing model: tiny' in error


def test_a_query_does_not_find_itself(found, gallery):
    query = files_of([str(gallery)])[0]
    os.link(query, gallery / 'link.jpg')
    (result,) = found('--query', query, '-k', 100)['queries']
    assert len(result['results']) == len(os.listdir(gallery)) - 2


def test_an_image_that_is_named_in_two_ways_is_listed_once(command, found, gallery, queries):
    (result,) = found('--query', queries[0], '-k', 100)['queries']
    out = command('--gallery', gallery, os.path.relpath(gallery), '--query', queries[0], '-k', 100, '--json')[1]
    assert json.loads(out)['queries'] == [result]


def embedded(monkeypatch):
    """Counts the images that are embedded from now on."""
    count, whole = [], Tiny.forward

    def forward(model, x):
        count.append(len(x))
        return whole(model, x)

    monkeypatch.setattr(Tiny, 'forward', forward)
    return count


def test_only_files_that_are_new_or_have_changed_are_embedded(found, file, gallery, queries, monkeypatch):
    found('--query', queries[0])
    first, second, third, *_ = files_of([str(gallery)])
    shutil.copy(second, first)
    os.remove(second)
    shutil.copy(third, gallery / 'new.jpg')
    count = embedded(monkeypatch)
    result = found('--query', queries[0], '-k', 100)['queries'][0]['results']
    assert sum(count) == 2 + 1  # and the query
    assert [each['path'] for each in result] == nearest(file, gallery, queries[0], 100)[0]
    assert found('--query', queries[0], '-k', 100)['queries'][0]['results'] == result


def test_another_model_never_meets_old_features(found, command, file, gallery, queries, monkeypatch):
    found('--query', queries[0])
    torch.manual_seed(1)
    torch.save({'format': weights.FORMAT, 'state_dict': Tiny(6).state_dict(), 'arguments': OPTIONS}, file)
    count = embedded(monkeypatch)
    result = found('--query', queries[0], '-k', 5)['queries'][0]['results']
    assert sum(count) == len(os.listdir(gallery)) + 1
    assert [each['path'] for each in result] == nearest(file, gallery, queries[0], 5)[0]


def test_several_pictures_of_one_person_are_one_query(found, file, gallery, queries):
    (result,) = found('--query', *queries[:3], '--fuse', '-k', 3)['queries']
    assert result['query'] == queries[:3]
    extractor = FeatureExtractor(file, 'cpu')
    files = files_of([str(gallery)])
    distances = (extractor(files) - extractor(queries[:3]).mean(0)).square().sum(1)
    assert [each['path'] for each in result['results']] == [files[place] for place in distances.argsort()[:3]]


def test_pictures_of_a_fused_query_count_alike_by_cosine_distance(found, file, gallery, queries, monkeypatch):
    """As in a multi-query test; the mean of features of different lengths would be nearly that of the longest."""
    state = {'state_dict': Tiny(6).state_dict(), 'arguments': OPTIONS | {'distance': 'cosine'}}
    torch.save({'format': weights.FORMAT, **state}, file)
    extract = FeatureExtractor.__call__

    def scaled(self, images):
        return extract(self, images) * torch.tensor([[100.0 if image == queries[1] else 1.0] for image in images])

    monkeypatch.setattr(FeatureExtractor, '__call__', scaled)
    (result,) = found('--query', *queries[:2], '--fuse', '-k', 24)['queries']
    files, extractor = files_of([str(gallery)]), FeatureExtractor(file, 'cpu')
    among, each = (F.normalize(extract(extractor, some)) for some in (files, queries[:2]))
    order = (among @ F.normalize(each.mean(0), dim=0)).argsort(descending=True)
    assert [each['path'] for each in result['results']] == [files[place] for place in order]
    assert not torch.equal(order, (among @ each[1]).argsort(descending=True))


def test_the_index_needs_a_folder(command, gallery, queries, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', '')
    monkeypatch.setattr(os.path, 'expanduser', lambda text: text)  # as for a user without a home
    status, _, error = command('--gallery', gallery, '--query', queries[0])
    assert (status, error) == (2, 'error: --index: your home folder is not known; give a folder\n')


def test_help_names_data_sets_of_images_and_the_users_own(command, capsys):
    status, out, _ = command('-h', path='')
    assert status == 0 and 'csv:FILE' in out and 'toy_market1501' in out and 'mars' not in out


def test_images_that_cannot_be_read_are_left_out(command, gallery, queries):
    (gallery / 'broken.jpg').write_text('no image')
    status, out, error = command('--gallery', gallery, '--query', queries[0], '-k', 1000)
    assert status == 0 and len(out.splitlines()) == len(os.listdir(gallery))  # a line for the query, none for the file
    assert f'Left out: cannot read the image {gallery}/broken.jpg: it is not a JPEG' in error
    for name in os.listdir(gallery):
        (gallery / name).write_text('no image')
    status, _, error = command('--gallery', gallery, '--query', queries[0])  # of the old contents nothing is used
    assert (status, error.splitlines()[-1]) == (2, 'error: no image of the gallery can be read')


def test_queries_that_cannot_be_read_are_left_out(command, gallery, queries, tmp_path):
    broken = tmp_path / 'broken.jpg'
    broken.write_text('no image')
    whole = command('--gallery', gallery, '--query', *queries[:2])[1]
    status, out, error = command('--gallery', gallery, '--query', queries[0], broken, queries[1])
    assert (status, out) == (0, whole) and f'Left out: cannot read the image {broken}: it is not a JPEG' in error
    status, _, error = command('--gallery', gallery, '--query', broken)
    assert (status, error.splitlines()[-1]) == (2, 'error: no image of the query can be read')


def test_a_broken_image_does_not_make_batches_small(gallery):
    files, asked = files_of([str(gallery)]), []
    (gallery / os.path.basename(files[3])).write_text('no image')

    def extract(some):
        asked.append(len(some))
        if files[3] in some:
            raise Unreadable(f'cannot read the image {files[3]}')
        return torch.zeros(len(some), 3)

    unread = {}
    readable, features = search._features(extract, files, unread)
    assert [*unread] == [files[3]] and readable == [file for file in files if file != files[3]]
    assert features.shape == (len(readable), 3) and asked == [len(files), len(readable)]


def test_other_faults_are_not_those_of_images(command, gallery, queries, monkeypatch):
    def forward(model, x):
        raise UserError('--compile: no compiler')

    monkeypatch.setattr(Tiny, 'forward', forward)
    status, _, error = command('--gallery', gallery, '--query', queries[0])
    assert status == 2 and error.splitlines()[-1] == 'error: --compile: no compiler' and 'Left out' not in error


def test_a_threshold_separates_known_from_unknown(command, found, gallery, queries):
    distances = [each['results'][0]['distance'] for each in found('--query', *queries, '-k', 3)['queries']]
    threshold = float(np.median(distances))
    result = found('--query', *queries, '-k', 3, '--threshold', threshold)
    assert [each['unknown'] for each in result['queries']] == [each >= threshold for each in distances]
    for each in result['queries']:
        assert [item['match'] for item in each['results']] == [item['distance'] < threshold for item in each['results']]
    out = command('--gallery', gallery, '--query', *queries, '-k', 3, '--threshold', threshold)[1]
    assert out.count(': unknown\n') == sum(each >= threshold for each in distances)
    assert out.endswith(f'Matches: distance below {threshold:g}\n')


def pairs_of(file, data_dir):
    """Distances of the pairs of one person and of two, by brute force."""
    with contextlib.redirect_stdout(io.StringIO()):
        dataset = data_manager.init_dataset('market1501', str(data_dir))
    extractor = FeatureExtractor(file, 'cpu')
    same, others = [], []
    gallery = extractor([path for path, _, _ in dataset.gallery])
    for path, pid, camid in dataset.query:
        distances = (gallery - extractor([path])).square().sum(1).tolist()
        for distance, (_, other, camera) in zip(distances, dataset.gallery, strict=True):
            if pid != other:
                others.append(distance)
            elif camid != camera:
                same.append(distance)
    return np.array(same), np.array(others)


def test_a_threshold_is_calibrated_on_labelled_data(command, found, file, data_dir, queries, gallery):
    status, _, error = command('--gallery', gallery, '--query', queries[0], '--false-match-rate', 0.1)
    assert status == 2 and 'these weights are not calibrated; run --calibrate -d DATASET' in error
    status, out, _ = command('--calibrate', '-d', 'market1501', '--data-dir', data_dir)
    same, others = pairs_of(file, data_dir)
    assert status == 0 and f'false match rate 0.01 in {len(others)} pairs of two persons of market1501' in out
    limit = found('--query', queries[0], '--false-match-rate', 0.1)['limit']
    assert (limit['pairs'], limit['pairs_of_one_person'], limit['dataset']) == (len(others), len(same), 'market1501')
    assert limit['false_matches'] == (others < limit['threshold']).sum() <= 0.1 * len(others)
    assert (others < 1.02 * limit['threshold']).sum() >= limit['false_matches']
    assert (
        limit['false_matches']
        > 0.1 * len(others) - 1 - (others < 1.02 * limit['threshold']).sum() + limit['false_matches']
    )
    assert limit['missed'] == pytest.approx((same >= limit['threshold']).mean())


def test_a_calibration_of_few_pairs_is_stored_and_searched_with(command, gallery, queries, data_dir, monkeypatch):
    """The two nearest persons have equal features: no rate can be measured."""
    monkeypatch.setattr(Tiny, 'forward', lambda _, x: torch.ones(len(x), 16))
    data = ['--calibrate', '-d', 'market1501', '--data-dir', data_dir]
    status, out, _ = command(*data, '--gallery', gallery, '--query', queries[0], '-k', 1)
    calibrated, query, _ = out.splitlines()[-3:]
    assert status == 0 and query == queries[0]
    assert re.fullmatch(r'Calibrated on market1501: \d+ pairs of two persons', calibrated)
    status, _, error = command('-d', 'market1501', '--gallery', gallery, '--query', queries[0])
    assert status == 2 and '-d is the data set of --calibrate: add this option, or remove -d' in error


def test_pairs_of_unknown_cameras_are_counted(file, data_dir, tmp_path):
    """All pairs except a query with its own file; otherwise no pair of one person would be left."""
    lines = ['path,pid,split']
    for subset, folder in (('train', 'bounding_box_train'), ('query', 'query'), ('gallery', 'bounding_box_test')):
        for path in sorted((data_dir / 'market1501' / folder).glob('0*.jpg')):
            lines.append(f'{path},{path.name[:4]},{subset}')
    (tmp_path / 'all.csv').write_text('\n'.join(lines))
    calibration = search.calibrate(FeatureExtractor(file, 'cpu'), f'csv:{tmp_path}/all.csv', '')
    rows = [line.split(',')[1:] for line in lines]
    ids = [[person for person, subset in rows[1:] if subset == part] for part in ('query', 'gallery')]
    pairs = [one == other for one in ids[0] for other in ids[1]]
    assert (sum(calibration['same']), sum(calibration['others'])) == (sum(pairs), len(pairs) - sum(pairs))
    assert sum(pairs) > 0


def test_a_calibration_has_the_arithmetic_of_the_extractor(file, data_dir, monkeypatch):
    inside, whole = [], evaluation.extract

    @contextlib.contextmanager
    def arithmetic(extractor):
        inside.append(1)
        yield
        inside.pop()

    monkeypatch.setattr(FeatureExtractor, 'arithmetic', arithmetic)
    monkeypatch.setattr(evaluation, 'extract', lambda *args: whole(*args) if inside else pytest.fail('outside'))
    search.calibrate(FeatureExtractor(file, 'cpu'), 'market1501', str(data_dir))


@pytest.mark.parametrize(
    ('drawn', 'expected'),
    [
        ({'test_share': 0.25, 'seed': 7}, {'test_share': 0.25, 'seed': 7}),
        ({'test_share': 2.0, 'seed': 7}, {}),
        ({'test_share': 0.25, 'seed': 'x'}, {}),
        ({}, {}),
    ],
)
def test_test_persons_are_drawn_as_in_the_training(drawn, expected):
    assert search.drawn_in({'dataset': 'folder:x', **drawn}, 'folder:x') == expected
    assert search.drawn_in({'dataset': 'market1501,folder:x', **drawn}, 'folder:x') == expected
    assert search.drawn_in({'dataset': 'folder:y', **drawn}, 'folder:x') == {}


def test_a_calibration_avoids_the_persons_of_the_training(command, file, data_dir, tmp_path):
    for path in (data_dir / 'market1501' / 'bounding_box_test').glob('0*.jpg'):
        (tmp_path / 'people' / path.name[:4]).mkdir(parents=True, exist_ok=True)
        shutil.copy(path, tmp_path / 'people' / path.name[:4])
    name = f'folder:{tmp_path}/people'
    with contextlib.redirect_stdout(io.StringIO()):
        trained_on = data_manager.init_dataset(name, test_share=0.3, seed=5)
    known = torch.load(file, weights_only=True)
    how = {**OPTIONS, 'dataset': name, 'test_share': 0.3, 'seed': 5}
    mark = {'dataset_fingerprint': data_manager.fingerprint(trained_on)}
    weights_of = Tiny(trained_on.num_train_pids).state_dict()
    torch.save({**known, 'state_dict': weights_of, 'arguments': how, 'provenance': mark}, file)
    status, _, error = command('--calibrate', '-d', name)
    assert status == 0 and 'Notice: ' not in error
    torch.save({**known, 'state_dict': weights_of, 'arguments': {**how, 'seed': 6}, 'provenance': mark}, file)
    status, _, error = command('--calibrate', '-d', name)
    assert status == 0 and f'Notice: {file} was trained on other files of ' in error


def test_a_picture_that_is_gone_leaves_the_index_also_with_a_pattern(command, gallery, queries, tmp_path):
    for number, path in enumerate(files_of([str(gallery)])):
        (tmp_path / 'cams' / str(number % 2)).mkdir(parents=True, exist_ok=True)
        shutil.copy(path, tmp_path / 'cams' / str(number % 2))
    args = '--gallery', tmp_path / 'cams' / '*', '--query', queries[0]
    assert command(*args)[0] == 0
    (table,) = (tmp_path / 'cache').rglob('index.sqlite')

    def rows():
        with contextlib.closing(sqlite3.connect(table)) as opened:
            return {os.fsdecode(path) for (path,) in opened.execute('SELECT path FROM files')}

    gone, *others = files_of([str(tmp_path / 'cams')])
    assert rows() == {gone, *others}
    os.remove(gone)
    assert command(*args)[0] == 0
    assert rows() == {*others}


def test_files_without_numbers_are_told_apart_by_their_names(monkeypatch, gallery, queries):
    """On some file systems all files have the inode number 0."""
    plain = os.stat

    def stat(path, **how):
        status = plain(path, **how)
        return os.stat_result((status[0], 0, *status[2:]))

    files = files_of([str(gallery)])[:3]
    places = np.array([[0, 1, 2]]), np.array([[1.0, 2.0, 3.0]], np.float32)
    nearest = SimpleNamespace(paths=files, nearest=lambda *_: places)
    monkeypatch.setattr(os, 'stat', stat)
    (result,) = search.search([[files[1]]], torch.zeros(1, 2), nearest, 3, 'euclidean', None)
    assert [each['path'] for each in result['results']] == [files[0], files[2]]


def test_a_rate_that_the_pairs_cannot_measure_is_refused():
    calibration = {'dataset': 'few', 'edges': [0, 1, 2, 3], 'same': [5, 4, 0], 'others': [1, 4, 5]}
    assert search.threshold_of(calibration, 0.1) == {
        'threshold': 1.0, 'false_match_rate': 0.1, 'dataset': 'few', 'pairs': 10, 'false_matches': 1,
        'pairs_of_one_person': 9, 'missed': pytest.approx(4 / 9),
    }  # fmt: skip
    assert search.threshold_of(calibration, 0.5)['threshold'] == 2
    for rate in (0.09, 0):
        with pytest.raises(UserError, match='cannot be measured with 10 pairs of two persons in few'):
            search.threshold_of(calibration, rate)


def test_the_index_is_removed(command, found, queries, tmp_path):
    found('--query', queries[0])
    (folder,) = (tmp_path / 'cache' / 'deep-person-reid' / 'index').iterdir()
    assert command('--forget')[:2] == (0, f'Removed {folder}\n')
    assert command('--forget', path=None)[:2] == (0, f'There is no index in {folder.parent}\n')
    expected = f'There is no index of these weights and options in {folder.parent}\n'
    assert command('--forget')[:2] == (0, expected)
    assert not folder.exists()


def test_a_page_shows_the_images(command, gallery, queries, tmp_path):
    page = tmp_path / 'found.html'
    args = '--gallery', gallery, '--query', *queries[:2], '-k', 3, '--page', page
    assert command(*args)[1].endswith(f'Wrote {page}\n')
    text = page.read_text()
    assert text.count('<li class="result ') == 6 and text.count('src="data:image/jpeg;base64,') == 8
    assert 'There is no threshold' in text and '✓' not in text
    command(*args, '--threshold', 1e9)
    assert page.read_text().count('<li class="result match"') == 6
    command(*args, '--threshold', 1e-9)
    text = page.read_text()
    assert text.count('<li class="result other"') == 6 and text.count(': unknown</h3>') == 2


def test_a_page_of_many_queries_shows_the_first_ones(tmp_path, queries, monkeypatch):
    """Their pictures are part of the page."""
    near = {'rank': 1, 'path': queries[0], 'distance': 0.5, 'match': None}
    results = [{'query': [queries[0]], 'unknown': None, 'results': [near]}] * (page.found.MOST_QUERIES + 3)
    facts = {
        'weights': 'w',
        'arch': 'a',
        'height': 9,
        'width': 9,
        'precision': 'fp32',
        'distance': 'cosine',
        'gallery': 7,
    }
    text = page.found.write(tmp_path / 'x.html', results, facts, '').read_text()
    assert text.count('<article') == page.found.MOST_QUERIES
    assert f'<h2>{page.found.MOST_QUERIES + 3} queries</h2>\n<p>The first {page.found.MOST_QUERIES} are shown. ' in text


def test_names_cannot_change_the_page(command, gallery, queries, tmp_path):
    name = '<script>alert(1)<'
    Image.open(queries[0]).save(gallery / f'{name}.png')
    command('--gallery', gallery, '--query', queries[0], '--page', tmp_path / 'found.html')
    text = (tmp_path / 'found.html').read_text()
    assert name not in text and '&lt;script&gt;alert(1)&lt;' in text


@pytest.mark.parametrize(
    ('args', 'message'),
    [
        ([], 'give --gallery and --query, or --calibrate -d DATASET, or --forget'),
        (['--gallery', 'x'], 'give --gallery and --query, or --calibrate -d DATASET, or --forget'),
        (['--calibrate'], '--calibrate: -d is missing, the labelled data set'),
        (['--calibrate', '-d', 'x', '--json'], '--json: --calibrate prints no JSON; run it first, without a query'),
        (['--gallery', 'x', '--query', 'x', '--page', 'x.png'], "--page: must end in .html, not 'x.png'"),
        (['--calibrate', '-d', 'x', '--page', 'x.html'], '--page, --fuse, --threshold and --false-match-rate are for'),
        (['--calibrate', '-d', 'x', '--threshold', '1'], '--page, --fuse, --threshold and --false-match-rate are for'),
        (['--calibrate', '-d', 'x', '--forget'], '--forget removes the index, and does nothing else'),
        (['--threshold', '1', '--false-match-rate', '1', '--gallery', 'x', '--query', 'x'], '--threshold and --false-'),
        (['--gallery', 'none', '--query', 'none'], 'none: no images found; give files, folders, a pattern, or - for'),
        (['--calibrate', '-d', 'x'], "there is no data set 'x'"),
        (['--calibrate', '-d', 'toy_mars'], '-d toy_mars: it has tracklets, but thresholds are for images'),
        (['--calibrate', '-d', 'market:no_query'], 'market:no_query: the query set is empty'),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line(args, message, command, data_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(data_dir / 'market1501', 'no_query', ignore=lambda *_: ['query'])
    status, _, error = command(*args)
    lines = [line for line in error.splitlines() if line.startswith('error: ')]
    assert status == 2 and len(lines) == 1 and lines[0].startswith(f'error: {message}')
