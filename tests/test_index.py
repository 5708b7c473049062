"""The index of features: its contents, several processes, and processes that are killed."""

import multiprocessing
import os
import stat

import numpy as np
import pytest
import torch
from tiny import kill_later

import ranking
from files import index
from files.index import Index
from runtime.errors import UserError

DIGEST = '0123456789abcdef'
FORK = multiprocessing.get_context('fork')


def open_index(folder):
    return Index(folder, DIGEST, 3)


def put(place, names):
    """Empty files, each with a feature derived from its name."""
    for name in names:
        with open(name, 'a'):
            pass
    stale = place.stale(names)  # which another process may change
    place.add(stale, feature_of(stale))


def remove(names):
    for name in names:
        os.remove(name)


def feature_of(names):
    return torch.tensor([[float(os.path.basename(name)), 1, 2] for name in names]).reshape(-1, 3)


@pytest.fixture
def names(tmp_path):
    return [str(tmp_path / str(number)) for number in range(20)]


def held(place, names):
    """The names in the index; asserts that each has its own feature."""
    gallery = place.gallery(names, 'euclidean')
    assert torch.equal(gallery.points.features[torch.from_numpy(gallery.rows)], feature_of(gallery.paths))
    return gallery.paths


def test_files_are_known_until_they_change(tmp_path, names):
    place = open_index(tmp_path / 'index')
    assert held(place, names) == []
    put(place, names[:5])
    put(place, names[5:9])
    assert held(open_index(tmp_path / 'index'), names) == names[:9]
    assert held(place, names[::-1]) == names[:9][::-1]
    with open(names[2], 'w') as file:
        file.write('longer')
    status = os.stat(names[4])
    os.utime(names[4], ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    os.remove(names[6])
    assert [*place.stale(names[:9])] == [names[2], names[4], names[6]]
    assert place.stale(names[6:7]) == {names[6]: (-1, -1)}


def test_files_that_have_gone_from_a_folder_are_dropped(tmp_path, names):
    place = open_index(tmp_path / 'index')
    beside = [f'{tmp_path}x/3', f'{tmp_path}/../4']
    put(place, names[:5])
    place.add(dict.fromkeys(beside, (0, 0)), feature_of(beside))
    remove(names[2:5])
    assert place.drop([f'{tmp_path}/'], names[:2]) == 4  # below the folder: 3 names, and one with ..
    assert held(place, [*names, *beside]) == [*names[:2], beside[0]]


def test_files_that_another_search_has_added_meanwhile_stay(tmp_path, names):
    """Though this one listed the folder before they were there; those that cannot be read go."""
    place = open_index(tmp_path / 'index')
    put(place, names[:5])
    assert place.drop([str(tmp_path)], names[:3]) == 0
    assert place.drop([str(tmp_path)], names[:3], [names[4]]) == 1
    assert held(place, names) == names[:4]


@pytest.mark.parametrize('how', ['removed', 'cut'])
def test_rows_that_were_lost_are_never_taken_for_zeros(how, tmp_path, names):
    place = open_index(tmp_path / 'index')
    put(place, names[:5])
    (rows,) = place.folder.glob('rows-*')
    if how == 'removed':
        rows.unlink()
    else:
        os.truncate(rows, 3 * 3 * 4)
    with pytest.raises(UserError, match=r'is damaged \(rows-0.f32 is too short\); remove it with --forget'):
        put(place, names[5:9])


def test_an_index_is_for_its_user_alone(tmp_path):
    place = open_index(tmp_path / 'cache' / 'index')
    for folder in (tmp_path / 'cache', tmp_path / 'cache' / 'index', place.folder):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_another_model_has_another_index(tmp_path, names):
    put(open_index(tmp_path / 'index'), names[:3])
    assert held(Index(tmp_path / 'index', 'f' * 16, 3), names) == []


def test_rows_without_files_are_removed_when_they_are_most(tmp_path, names, monkeypatch):
    monkeypatch.setattr(index, 'WASTE', 0)
    place = open_index(tmp_path / 'index')
    put(place, names)
    reader = place.gallery(names, 'euclidean')
    remove(names[1::2])
    place.drop([str(tmp_path)], names[::2])
    place.tidy()
    assert [path.name for path in place.folder.glob('rows-*')] == ['rows-0.f32']  # half of them
    remove(names[2::4])
    place.drop([str(tmp_path)], names[1:19:4] + names[::4])
    place.tidy()
    (path,) = place.folder.glob('rows-*')
    assert path.name == 'rows-1.f32' and path.stat().st_size == 5 * 3 * 4
    assert held(place, names) == names[::4]
    put(place, names[1:3])
    assert held(place, names) == sorted(names[::4] + names[1:3], key=names.index)
    assert torch.equal(reader.points.features[torch.from_numpy(reader.rows)], feature_of(names))  # as it was opened


def test_facts_are_kept(tmp_path):
    place = open_index(tmp_path / 'index')
    assert place.fact('calibration') is None
    place.keep('calibration', {'edges': [0.5, 1]})
    assert open_index(tmp_path / 'index').fact('calibration') == {'edges': [0.5, 1]}


def add_all(folder, names, lines=None):
    place = open_index(folder)
    if lines is not None:
        kill_later(lines)
    for start in range(0, len(names), 2):
        put(place, names[start : start + 2])
    index.WASTE = -20  # so that it is tidied in any case
    place.tidy()


@pytest.mark.parametrize('lines', range(5, 200, 13))
def test_a_process_that_is_killed_leaves_an_index_that_works(lines, tmp_path, names):
    place = open_index(tmp_path / 'index')
    put(place, names[:4])
    child = FORK.Process(target=add_all, args=(tmp_path / 'index', names[:12], lines))
    child.start()
    child.join()
    present = held(place, names)
    assert present[:4] == names[:4] and present == names[: len(present)]
    put(place, names[3:20])
    assert held(place, names) == names
    place.tidy()
    assert held(open_index(tmp_path / 'index'), names) == names


def test_a_kill_does_kill(tmp_path, names):
    """Otherwise the test above would test nothing."""
    child = FORK.Process(target=add_all, args=(tmp_path / 'index', names, 60))
    child.start()
    child.join()
    assert child.exitcode == -9


def test_two_processes_may_use_an_index_at_once(tmp_path, names):
    parts = names[:14], names[6:], names[::-1]
    children = [FORK.Process(target=add_all, args=(tmp_path / 'index', part)) for part in parts]
    for child in children:
        child.start()
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0, 0, 0]
    assert held(open_index(tmp_path / 'index'), names) == names


def test_forget_removes_indices_and_nothing_else(tmp_path):
    root = tmp_path / 'index'
    for digest in (DIGEST, 'f' * 16, 'a' * 16):
        Index(root, digest, 3)
    (root / 'mine').mkdir()
    (root / ('b' * 16)).mkdir()
    assert index.forget(root, DIGEST) == [root / DIGEST]
    assert index.forget(root, DIGEST) == []
    (root / ('a' * 16) / 'mine').touch()
    with pytest.raises(UserError, match='cannot be removed'):
        index.forget(root)
    (root / ('a' * 16) / 'mine').unlink()
    index.forget(root)
    assert sorted(path.name for path in root.iterdir()) in (['b' * 16, 'mine'], ['a' * 16, 'b' * 16, 'mine'])
    assert index.forget(tmp_path / 'none') == []


def damage_table(folder):
    (folder / 'index.sqlite').write_bytes(b'no table' * 1000)


def damage_rows(folder):
    os.truncate(folder / 'rows-0.f32', 5)


def damage_facts(folder):
    place = Index(folder.parent, DIGEST, 3)
    place.table.execute("UPDATE facts SET value = 'x'")


@pytest.mark.parametrize('damage', [damage_table, damage_rows, damage_facts])
def test_a_damaged_index_is_named(damage, tmp_path, names):
    put(open_index(tmp_path / 'index'), names[:3])
    damage(tmp_path / 'index' / DIGEST)
    with pytest.raises(UserError, match=f'the index {tmp_path}/index/{DIGEST} is damaged .* --forget'):
        open_index(tmp_path / 'index').gallery(names, 'euclidean')


def test_an_index_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / 'file').touch()
    with pytest.raises(UserError, match=r'cannot be used .* choose another --index'):
        open_index(tmp_path / 'file')


def test_a_full_disk_changes_nothing(small_disk, tmp_path, names):
    place = Index(small_disk, DIGEST, 3)
    put(place, names[:3])
    with pytest.raises(UserError, match=r'cannot be used .No space left on device'):
        place.add(dict.fromkeys(map(str, range(50_000)), (0, 0)), torch.zeros(50_000, 3))
    assert held(place, names) == names[:3]
    place.table.close()  # a disk in use cannot be unmounted


@pytest.mark.parametrize('distance', ['euclidean', 'cosine'])
@pytest.mark.parametrize('k', [1, 7, 40])
def test_the_nearest_are_those_of_the_ranking(distance, k, tmp_path, monkeypatch):
    """With ties, rows in another order than the gallery, gaps between them, and several blocks."""
    monkeypatch.setattr(index, 'WIDTH', 7)
    monkeypatch.setattr(index, 'QUERIES', 4)
    torch.manual_seed(0)
    number = 30
    features = torch.randint(0, 3, (number, 4)).float()
    place = Index(tmp_path, DIGEST, 4)
    names = [str(each) for each in range(number)]
    order = np.random.default_rng(0).permutation(number).tolist()
    for start in range(0, number, 4):
        some = order[start : start + 4]
        place.add({names[each]: (0, 0) for each in some}, features[some])
    kept = [each for each in range(number) if each % 5]
    gallery = place.gallery([names[each] for each in kept], distance)
    queries = torch.randint(0, 3, (6, 4)).float()
    places, distances = gallery.nearest(queries, k, distance)
    ids = np.arange(6), 100 + np.arange(len(kept)), np.zeros(6), np.ones(len(kept))
    monkeypatch.setattr(ranking, 'NEAREST', k)
    expected = ranking.rank(queries, features[kept], *ids, distance=distance)
    assert np.array_equal(places, expected.nearest)
    assert np.array_equal(distances, expected.nearest_distances, equal_nan=True)


def test_the_default_place_is_the_cache_of_the_user(monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', '/cache')
    assert str(index.default_root()) == '/cache/deep-person-reid/index'
    monkeypatch.setenv('XDG_CACHE_HOME', '')
    monkeypatch.setenv('HOME', '/home/me')
    assert str(index.default_root()) == '/home/me/.cache/deep-person-reid/index'
