"""The toy data sets: formats, determinism, all or nothing, and a task that colours alone do not solve."""

import multiprocessing
import os
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import loadmat

import data_manager
import toy
from toy import formats, people, scenes, views

SMALL = {'num_train': 3, 'num_test': 2, 'num_distractors': 2, 'height': 24, 'width': 12}


@pytest.fixture(scope='module')
def market(tmp_path_factory):
    """The data set as `-d toy_market1501` draws it."""
    folder = tmp_path_factory.mktemp('toys')
    return data_manager.init_dataset('toy_market1501', folder)


@pytest.fixture(scope='module')
def mars(tmp_path_factory):
    """The usual format with fewer and smaller persons."""
    folder = tmp_path_factory.mktemp('toys')
    toy.draw_mars(folder / 'toy_mars', num_train=6, num_test=4, num_distractors=3, height=48, width=24)
    return folder


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob('*') if path.is_file()}


def persons(items):
    return {pid for _, pid, _ in items}


# ---- formats ----


def test_the_format_of_market1501(market):
    folder = Path(market.query[0][0]).parents[1]
    assert sorted(os.listdir(folder)) == ['bounding_box_test', 'bounding_box_train', 'gt_bbox', 'query']
    names = {part: os.listdir(folder / part) for part in os.listdir(folder)}
    assert all(re.fullmatch(r'(\d{4}|-1)_c[1-6]s1_\d{6}_0[1-4]\.jpg', name) for part in names.values() for name in part)
    assert sum(name.startswith('-1_') for name in names['bounding_box_test']) == 20
    assert sum(name.startswith('0000_') for name in names['bounding_box_test']) == 20
    with Image.open(market.train[0][0]) as image:
        assert (image.format, image.mode, image.size) == ('JPEG', 'RGB', (48, 96))


def test_the_task_of_market1501(market):
    assert (market.num_train_pids, len(market.train)) == (96, 768)
    assert np.bincount([pid for _, pid, _ in market.train]).tolist() == [8] * 96
    assert persons(market.gallery) - persons(market.query) == {0}
    folder = Path(market.query[0][0]).parents[1]
    train_names = {name[:4] for name in os.listdir(folder / 'bounding_box_train')}
    assert not train_names & {f'{pid:04d}' for pid in persons(market.query)}
    for _, pid, camid in market.query:  # its person is in the gallery, seen by other cameras
        assert sum(p == pid and c != camid for _, p, c in market.gallery) == 6


def test_a_hard_setting(tmp_path):
    """The same persons under the same names, half of them partly hidden, under light that varies more."""
    for hard in False, True:
        toy.draw_market1501(tmp_path / str(hard), **SMALL, hard=hard)
    usual, hard = (contents(tmp_path / str(hard)) for hard in (False, True))
    assert usual.keys() == hard.keys() and all(usual[name] != hard[name] for name in usual)
    rng = np.random.default_rng(0)
    moments = [views.random_view(rng) for _ in range(2000)]
    for seen, share, spread in ((moments, 0.08, 0.12), (list(map(views.harder, moments)), 0.5, 0.36)):
        assert np.mean([view.screen > 1 - views.SCREENED for view in seen]) == pytest.approx(share, abs=0.03)
        assert max(abs(view.light - 1) for view in seen) == pytest.approx(spread, abs=0.01)
        assert all(0 <= view.screen <= 1 for view in seen)


def test_the_format_of_mars(mars):
    info = mars / 'toy_mars' / 'info'
    assert loadmat(info / 'query_IDX.mat')['query_IDX'].dtype == np.uint16
    for subset in 'train', 'test':
        table = loadmat(info / f'tracks_{subset}_info.mat')[f'track_{subset}_info']
        lines = (info / f'{subset}_name.txt').read_text().splitlines()
        assert table.dtype == np.int32
        assert table[0, 0] == 1
        assert table[-1, 1] == len(lines)
        assert (table[1:, 0] == table[:-1, 1] + 1).all()
        assert ((table[:, 1] - table[:, 0] + 1 >= 4) & (table[:, 1] - table[:, 0] + 1 <= 12)).all()
        folder = mars / 'toy_mars' / f'bbox_{subset}'
        assert sorted(lines) == sorted(path.name for path in folder.glob('*/*'))
        assert all((folder / line[:4] / line).is_file() for line in lines)
        for first, _, pid, camera in table:
            assert lines[first - 1].startswith(f'{"00-1" if pid == -1 else f"{pid:04d}"}C{camera}T')
            assert lines[first - 1].endswith('F001.jpg')


def test_the_task_of_mars(mars):
    original = data_manager.Mars(mars, name='toy_mars')
    official = data_manager.Mars(mars, name='toy_mars', official=True)

    def without_match(dataset):
        return sum(not any(p == pid and c != camid for _, p, c in dataset.gallery) for _, pid, camid in dataset.query)

    assert original.num_train_pids == 6
    assert len(original.query) == 4 * 3 + 2 * 2
    assert without_match(original) == 4
    assert without_match(official) == 0
    assert {0} < persons(original.gallery)
    assert len(official.gallery) == len(original.gallery) + len(original.query)


def test_tracklets_move_smoothly(mars):
    """Consecutive frames are more alike than frames of two tracklets of the same person."""
    dataset = data_manager.Mars(mars, name='toy_mars')

    def difference(a, b):
        return np.abs(np.subtract(*(np.asarray(Image.open(path), dtype=float) for path in (a, b)))).mean()

    within = [difference(paths[k], paths[k + 1]) for paths, _, _ in dataset.train for k in range(len(paths) - 1)]
    across = [
        difference(a[0], b[0]) for a, pid, _ in dataset.train for b, other, _ in dataset.train if pid == other and a < b
    ]
    assert np.median(within) < 0.6 * np.median(across)
    assert min(within) > 0


# ---- drawing ----


@pytest.mark.parametrize('draw', [toy.draw_market1501, toy.draw_mars])
def test_equal_arguments_equal_files(tmp_path, draw):
    draw(tmp_path / 'a', **SMALL)
    draw(tmp_path / 'b', **SMALL)
    draw(tmp_path / 'c', **SMALL, seed=1)
    a, b, c = (contents(tmp_path / name) for name in 'abc')
    assert not any(b'Created on' in content[:128] for content in a.values())  # a .mat file's time of day
    assert a == b
    assert a != c
    assert sorted(os.listdir(tmp_path)) == ['a', 'b', 'c']  # no temporary folder is left


def test_an_existing_folder_is_left_alone(tmp_path):
    (tmp_path / 'toy').mkdir()
    toy.draw_market1501(tmp_path / 'toy', **SMALL)
    assert not os.listdir(tmp_path / 'toy')


def test_complete_or_absent(tmp_path, monkeypatch):
    photograph, paths = formats.photograph, []

    def fail_later(path, *args):
        assert not (tmp_path / 'data' / 'toy').exists()
        paths.append(path)
        if len(paths) == 5:
            raise OSError(28, 'No space left on device')
        photograph(path, *args)

    monkeypatch.setattr(formats, 'photograph', fail_later)
    with pytest.raises(OSError, match='No space'):
        toy.draw_market1501(tmp_path / 'data' / 'toy', **SMALL)
    assert not os.listdir(tmp_path / 'data')


def test_two_processes_at_once(tmp_path):
    context = multiprocessing.get_context('fork')
    processes = [context.Process(target=toy.draw_market1501, args=(tmp_path / 'toy',), kwargs=SMALL) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert os.listdir(tmp_path) == ['toy']
    toy.draw_market1501(tmp_path / 'alone', **SMALL)
    assert contents(tmp_path / 'toy') == contents(tmp_path / 'alone')


def test_another_process_is_first(tmp_path):
    """The folder appears while this process draws it: the other one is kept, since the pictures are the same."""

    def draw(folder):
        (tmp_path / 'toy').mkdir()
        (tmp_path / 'toy' / 'of the other').touch()
        Path(folder, 'of this one').touch()

    formats._once(tmp_path / 'toy', draw)
    assert os.listdir(tmp_path) == ['toy']
    assert os.listdir(tmp_path / 'toy') == ['of the other']


def test_where_nothing_can_be_written(tmp_path):
    (tmp_path / 'file').touch()
    with pytest.raises(OSError, match='file'):
        toy.draw_mars(tmp_path / 'file' / 'toy', **SMALL)


# ---- a task worth learning ----


def test_every_value_of_a_view_fills_its_range():
    drawn = [views.random_view(np.random.default_rng(seed)) for seed in range(300)]
    for name, (low, high) in views.RANGES.items():
        values = [getattr(view, name) for view in drawn]
        assert low <= min(values) < low + 0.1 * (high - low) and high - 0.1 * (high - low) < max(values) <= high, name


def test_no_attribute_tells_people_apart():
    crowd = people.random_persons(144, np.random.default_rng(0))
    for key in people.CHOICES:
        values = [getattr(person, key) for person in crowd]
        assert min(values.count(value) for value in set(values)) >= 6, key
    looks = [[getattr(person, key) for key in people.CHOICES] for person in crowd]
    apart = [
        sum(a != b for a, b in zip(one, other, strict=True)) for one in looks for other in looks if one is not other
    ]
    assert min(apart) >= people.LOOK_APART


def test_a_crowd_of_any_size(monkeypatch):
    """More persons than can differ in many attributes: they differ in fewer, and no two are the same."""
    monkeypatch.setattr(people, 'LOOK_APART', 14)
    monkeypatch.setattr(people, 'PATIENCE', 20)
    assert len(set(people.random_persons(200, np.random.default_rng(0)))) == 200


def test_every_look_can_be_drawn(tmp_path):
    """Every value of every attribute, from the front, from behind and from both sides; all that can hide a person."""
    rng = np.random.default_rng(0)
    camera = scenes.random_camera(0, 48, 24, rng)
    pictures = set()
    for count, person in enumerate(people.random_persons(80, rng)):
        yaw = count * np.pi / 2 + 0.1
        screen = 1 - scenes.SCREENED * rng.uniform(0, 1) if count % 2 else 0
        view = replace(views.random_view(rng), yaw=yaw, screen=screen)
        scenes.photograph(tmp_path / 'one.jpg', person, camera, view, 48, 24, rng)
        pictures.add((tmp_path / 'one.jpg').read_bytes())
    assert len(pictures) == 80


@pytest.mark.parametrize(('balanced', 'bound'), [(False, 0.35), (True, 0.65)])  # 0.29 and 0.60 seen
def test_colours_alone_do_not_solve_it(balanced, bound, market):
    """Colour histograms of six horizontal stripes, the best features before deep ones, with and without white balance.

    The demo's network reaches 0.85.
    """
    from eval_metrics import evaluate

    def histograms(items):
        features = []
        for path, _, _ in items:
            pixels = np.asarray(Image.open(path).resize((24, 48)))  # (48, 24, 3)
            if balanced:  # so that the mean of each channel is 110
                pixels = (pixels * (110 / pixels.mean((0, 1)))).clip(0, 255).astype(int)
            bins = pixels // 64
            bins = (bins * [16, 4, 1]).sum(axis=2)[:, 4:20].reshape(6, -1)  # (6 stripes, pixels)
            features.append(np.concatenate([np.bincount(stripe, minlength=64) for stripe in bins]))
        return np.sqrt(np.array(features, dtype=np.float32))  # Hellinger

    query, gallery = histograms(market.query), histograms(market.gallery)
    distmat = (query**2).sum(1)[:, None] + (gallery**2).sum(1)[None] - 2 * query @ gallery.T
    ids = [np.array([item[column] for item in items]) for column in (1, 2) for items in (market.query, market.gallery)]
    _, mean_ap = evaluate(distmat, *ids)
    assert 0.05 < mean_ap < bound
