"""A folder for each person: images and videos, a given or drawn split, and cameras in names."""

import contextlib
import errno
import os
import re
from types import SimpleNamespace
from unittest.mock import Mock

import pytest

import data_manager
from readers import folder
from readers.folder import Folder
from readers.tree import distractors
from runtime.errors import UserError


def put(root, *paths):
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).touch()
    return str(root)


def people(root, persons=10, cameras=(1, 2), images=2):
    return put(root, *(f'p{person}/c{camera}_{number}.jpg'
                       for person in range(persons) for camera in cameras for number in range(images)))  # fmt: skip


def shown(dataset, items):
    """Person, camid and file of each item."""
    return [(dataset.name_of(pid), camid, os.path.basename(path)) for path, pid, camid in items]


def persons_of(dataset):
    train = {dataset.name_of(pid) for pid in dataset.train_pids}
    return train, *({dataset.name_of(pid) for _, pid, _ in items} for items in (dataset.query, dataset.gallery))


def test_a_split_that_is_there(tmp_path, capsys):
    root = put(
        tmp_path / 'my people', 'train/Åsa B/c1_10.jpg', 'train/Åsa B/c2_9.png', 'train/10/c1.jpg', 'train/9/c1.jpg',
        'query/$(x) & y/0_c2s1_1.jpg', 'gallery/$(x) & y/0_c1.jpg', 'gallery/z/c1.JPG', 'train/.hidden/a.jpg',
        'train/empty/x.txt', 'notes.txt', 'train/9/.c3.jpg', 'train/stray.jpg',
    )  # fmt: skip
    dataset = data_manager.init_dataset(f'folder:{root}')
    train = [(path, dataset.train_pids[label], camid) for path, label, camid in dataset.train]
    assert shown(dataset, train) == [
        ('9', 1, 'c1.jpg'), ('10', 1, 'c1.jpg'), ('Åsa B', 1, 'c1_10.jpg'), ('Åsa B', 2, 'c2_9.png')
    ]  # fmt: skip
    assert shown(dataset, dataset.query) == [('$(x) & y', 2, '0_c2s1_1.jpg')]
    assert shown(dataset, dataset.gallery) == [('$(x) & y', 1, '0_c1.jpg'), ('z', 1, 'c1.JPG')]
    assert not dataset.no_cameras and not dataset.drawn
    printed = capsys.readouterr().out
    assert 'Passed over: 3 files (' in printed and '1 folder (' in printed


def test_without_a_split_persons_are_drawn(tmp_path, capsys):
    root = people(tmp_path / 'people')
    dataset = data_manager.init_dataset(f'folder:{root}', test_share=0.3, seed=5)
    train, query, gallery = persons_of(dataset)
    assert len(train) == 7 and query == gallery and len(query) == 3 and not train & query
    assert len(dataset.train) == 28 and len(dataset.gallery) == 12
    assert len({item[1:] for item in dataset.query}) == len(dataset.query) == 6  # one of each person and camera
    assert set(dataset.query) <= set(dataset.gallery)
    line = 'Split by identity: 3 of 10 persons are for the test (--test-share 0.3, --seed 5); one of each person and '
    printed = capsys.readouterr().out
    assert line in printed and '  total    |    10 |       40\n' in printed

    again = data_manager.init_dataset(f'folder:{root}', test_share=0.3, seed=5)
    assert (again.train, again.query, again.gallery) == (dataset.train, dataset.query, dataset.gallery)
    other = [persons_of(Folder(root, test_share=0.3, seed=seed))[1] for seed in range(8)]
    assert len(set(map(frozenset, other))) > 4
    queries = {tuple(Folder(root, test_share=1.0, seed=seed).query) for seed in range(8)}
    assert len(queries) == 8


def test_a_new_person_moves_few_others(tmp_path):
    root = people(tmp_path / 'people', persons=40, cameras=(1,), images=1)
    before = persons_of(Folder(root))[1]
    put(tmp_path / 'people', 'somebody else/c1.jpg')
    assert len(before - persons_of(Folder(root))[1]) <= 1


@pytest.mark.parametrize(('share', 'number'), [(0.0, 0), (0.01, 1), (0.5, 2), (0.99, 3), (1.0, 5)])
def test_shares(share, number, tmp_path):
    """Both sides get somebody, two persons for training, unless the share is 0 or 1."""
    dataset = Folder(people(tmp_path / 'people', persons=5), test_share=share)
    assert dataset.num_query_pids == number and dataset.num_train_pids == 5 - number
    assert bool(dataset.untrainable) == (share == 1)


def test_unknown_cameras(tmp_path, capsys):
    root = put(
        tmp_path / 'people', 'a/1.jpg', 'a/2.jpg', 'b/scan1.jpg', 'b/c2.jpg', 'c/x.jpg', 'c/pic1_2.jpg', 'd/y.jpg'
    )
    dataset = data_manager.init_dataset(f'folder:{root}')
    assert dataset.no_cameras and {item[2] for item in dataset.train + dataset.gallery} == {0}
    assert len(dataset.query) == dataset.num_query_pids == 2  # one of each person
    printed = capsys.readouterr().out
    assert printed.count('The cameras are unknown') == 1 and 'one of each person is a query\n' in printed
    assert f'1 of 7 names contain a camera, as in c1_; the first without one is {root}/a/1.jpg\n' in printed


def test_videos(tmp_path):
    frames = (f'{person}/c{camera} {number}/f{frame}.png'
              for person in 'abcd' for camera in (1, 3) for number in (1, 2) for frame in (1, 2, 10))  # fmt: skip
    root = put(tmp_path / 'clips', *frames, 'a/c1 1/notes.txt')
    dataset = data_manager.init_dataset(f'folder:{root}')
    assert (dataset.kind, data_manager.kind_of(f'folder:{root}')) == ('video', 'video')
    assert len(dataset.gallery) == 8 and len(dataset.query) == 4 and {item[2] for item in dataset.gallery} == {1, 3}
    assert [os.path.basename(path) for path in dataset.train[0][0]] == ['f1.png', 'f2.png', 'f10.png']
    assert dataset.passed_over == [f'{root}/a/c1 1/notes.txt']


@pytest.mark.parametrize(
    ('paths', 'fault'),
    [
        ((), ' does not exist; it must contain a folder of images for each person, or train, query and gallery'),
        (('a.jpg', 'b/x.txt'), ' contains no image of a person; it must contain a folder of images'),
        (('train/a.jpg',), ' contains no image of a person; '),
        (
            ('a/1.jpg', 'b/t1/1.jpg'),
            ' contains images of some persons, and folders of frames of others, such as ROOT/a/1.jpg and ROOT/b/t1; ',
        ),
    ],
)
def test_mistakes_are_one_line(paths, fault, tmp_path):
    root = str(tmp_path / 'pe\x1bople')
    put(tmp_path / 'pe\x1bople', *paths)
    with pytest.raises(UserError) as error:
        Folder(root)
    shown = root.replace('\x1b', r'\x1b')
    assert str(error.value).startswith(shown + fault.replace('ROOT', shown)) and '\n' not in str(error.value)


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / 'x').touch()
    with pytest.raises(UserError, match=r'x is not a folder; it must contain'):
        folder.kind_of(str(tmp_path / 'x'))


def test_names_that_are_integers_mean_what_they_mean_in_market1501(tmp_path):
    root = put(
        tmp_path / 'n', *(f'{split}/{person}/c1.jpg' for split in ('train', 'gallery') for person in (-1, 0, 7, 10))
    )
    dataset = Folder(root)
    assert (dataset.train_pids, [pid for _, pid, _ in dataset.gallery]) == ([0, 7, 10], [0, 7, 10])
    put(tmp_path / 'n', 'train/x/c1.jpg')
    assert {dataset.name_of(pid) for dataset in [Folder(root)] for pid in dataset.train_pids} == {
        '-1',
        '0',
        '7',
        '10',
        'x',
    }


def test_names_that_are_padded_integers_are_numbers_too(tmp_path):
    persons = 'train/0002', 'train/0010', 'query/0001', 'gallery/-1', 'gallery/0000', 'gallery/0001'
    root = put(tmp_path / 'n', *(f'{person}/c1.jpg' for person in persons))
    dataset = Folder(root)
    assert (dataset.train_pids, [pid for _, pid, _ in dataset.gallery]) == ([2, 10], [0, 1])
    assert shown(dataset, dataset.query) == [('0001', 1, 'c1.jpg')]
    put(tmp_path / 'n', 'train/1/c1.jpg')
    with pytest.raises(UserError) as error:
        Folder(root)
    assert str(error.value) == f"{root}: persons '0001' and '1' have the same number; write them alike, or rename one"


def test_what_lies_beside_a_split_is_reported(tmp_path, capsys):
    root = put(tmp_path / 'n', 'train/a/c1.jpg', 'val/a/c2.jpg', 'train_all/b/c1.jpg', 'list.txt')
    dataset = Folder(root)
    assert sorted(os.path.basename(path) for path in dataset.passed_over) == ['list.txt', 'train_all', 'val']
    assert 'Passed over: 1 file (' in (printed := capsys.readouterr().out) and '2 folders (' in printed


def test_a_split_may_be_spelled_in_any_case(tmp_path):
    root = put(tmp_path / 'n', 'Train/a/c1.jpg', 'QUERY/b/c1.jpg', 'gallery/b/c2.jpg')
    dataset = Folder(root)
    assert folder.kind_of(root) == dataset.kind == 'image'
    assert persons_of(dataset) == ({'a'}, {'b'}, {'b'}) and shown(dataset, dataset.gallery) == [('b', 2, 'c2.jpg')]
    if not (tmp_path / 'n' / 'GALLERY').exists():  # the file system has upper and lower case
        put(tmp_path / 'n', 'Gallery/b/c3.jpg')
        dataset = Folder(root)
        assert shown(dataset, dataset.gallery) == [('b', 2, 'c2.jpg')] and dataset.passed_over == [f'{root}/Gallery']


@pytest.mark.parametrize(('name', 'others'), [('0000', '{:04}'), ('0', '{}'), ('0', 'p{}'), ('0000', 'p{}')])
def test_a_folder_of_distractors_is_drawn_neither_for_training_nor_as_a_query(name, others, tmp_path, capsys):
    images = [f'{person}/c{camera}_1.jpg' for person in (name, *map(others.format, (1, 2, 3, 4))) for camera in (1, 2)]
    root = put(tmp_path / 'n', *images)
    for seed in range(6):
        dataset = Folder(root, test_share=0.5, seed=seed)
        train, query, gallery = persons_of(dataset)
        assert len(train) == len(query) == 2 and gallery == query | {name} and name not in train | query
        assert len(distractors(dataset)) == 1
        assert [path for path, _, _ in dataset.gallery] == sorted(path for path, _, _ in dataset.gallery)
    capsys.readouterr()
    assert not Folder(root, test_share=0.0).gallery
    assert '  total    |     4 |        8\n' in capsys.readouterr().out
    with pytest.raises(UserError, match=r'contains no image of a person'):
        Folder(put(tmp_path / 'o', f'{name}/c1.jpg'))


@pytest.mark.parametrize('stray', ['@eaDir/c1.jpg/THUMB.jpg', 'backup/x.txt', 'album.jpg/x.txt'])
def test_folders_without_frames_do_not_make_images_videos(stray, tmp_path):
    images, clips = put(tmp_path / 'i', f'a/{stray}', 'a/c1.jpg'), put(tmp_path / 'v', f'a/{stray}', 'a/c1/1.jpg')
    for root, kind in (images, 'image'), (clips, 'video'):
        assert folder.kind_of(root) == Folder(root, test_share=0.0).kind == kind


def test_links_are_followed(tmp_path):
    root = people(tmp_path / 'people', persons=3)
    (tmp_path / 'people' / 'linked').symlink_to(tmp_path / 'people' / 'p0')
    assert Folder(root, test_share=0.0).num_train_pids == 4


def test_a_link_to_itself_is_no_folder(tmp_path):
    """One with the name of an image counts as an image, and is reported when it is read."""
    root = people(tmp_path / 'people', persons=3)
    broken = [f'{root}/{name}' for name in ('loop', 'p0/c1_9.jpg', 'p0/loop')]
    for path in broken:
        os.symlink(os.path.basename(path), path)
    assert folder.kind_of(root) == 'image'
    dataset = Folder(root, test_share=0.0)
    assert [path for path, _, _ in dataset.train if path in broken] == broken[1:2]
    assert dataset.passed_over == [broken[0], broken[2]]


def test_a_link_into_a_folder_that_may_not_be_entered_is_one_line(tmp_path, monkeypatch):
    root, scandir = people(tmp_path / 'people', persons=3), os.scandir
    refused = PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    @contextlib.contextmanager
    def scan(path):
        entry = SimpleNamespace(name='linked', path=f'{path}/linked', is_dir=Mock(side_effect=refused))
        with scandir(path) as entries:
            yield [*entries, entry]

    monkeypatch.setattr(os, 'scandir', scan)
    with pytest.raises(UserError, match=r'people/linked cannot be read: Permission denied$'):
        Folder(root)


def test_what_lies_beside_frames_is_reported_in_order(tmp_path):
    stray = [f'a/c1 1/{number}.txt' for number in range(30)]
    dataset = Folder(put(tmp_path / 'clips', 'a/c1 1/1.jpg', *stray), test_share=0.0)
    assert dataset.passed_over == [f'{tmp_path}/clips/{name}' for name in stray]


def test_order_does_not_depend_on_the_file_system(tmp_path, monkeypatch):
    root = people(tmp_path / 'people', persons=12)
    expected = Folder(root)
    scandir = os.scandir

    class Backwards:
        def __init__(self, path):
            self.entries = list(scandir(path))[::-1]

        def __enter__(self):
            return iter(self.entries)

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(os, 'scandir', Backwards)
    again = Folder(root)
    assert (again.train, again.query, again.gallery) == (expected.train, expected.query, expected.gallery)
    assert expected.name_of(expected.train_pids[-1]) == max(persons_of(expected)[0], key=lambda name: int(name[1:]))


@pytest.mark.parametrize(('name', 'camera'), [
    ('0002_c1s1_000451_03.jpg', 1), ('c12.jpg', 12), ('x_c007_y.png', 7), ('C1.jpg', 0),
    ('cc1.jpg', 0), ('abc1.jpg', 0), ('c1234567890.jpg', 0), ('x c1.jpg', 0),
])  # fmt: skip
def test_cameras_in_names(name, camera):
    found = re.search(folder.CAMERA, name)
    assert (int(found[1]) if found else 0) == camera


def test_markets_folders_may_be_missing(tmp_path):
    root = put(tmp_path / 'm', 'query/0001_c1.jpg', 'bounding_box_test/0001_c9.jpg')
    dataset = data_manager.init_dataset(f'market:{root}', train=False)
    assert [item[1:] for item in dataset.query + dataset.gallery] == [(1, 0), (1, 1)] and dataset.untrainable
    with pytest.raises(UserError, match=r'the training set is empty'):
        data_manager.init_dataset(f'market:{root}')
    with pytest.raises(
        UserError, match=r'contains none of the folders bounding_box_train, query, bounding_box_test; give'
    ):
        data_manager.init_dataset(f'market:{tmp_path}')
    assert dataset.multi_query() == dataset.query


@pytest.mark.parametrize('junk', ['00-1', '-1', '-001'])
def test_junk_is_no_person_however_it_is_padded(junk, tmp_path):
    """As in MARS; its names need no camera, it is not drawn, and it is counted nowhere."""
    root = tmp_path / 'people'
    put(root, f'{junk}/x.jpg', *(f'{person:04d}/c{camera}_1.jpg' for person in range(1, 7) for camera in (1, 2)))
    dataset = data_manager.init_dataset(f'folder:{root}', test_share=0.5)
    assert not dataset.no_cameras and dataset.train_pids == sorted(dataset.train_pids) and len(dataset.train_pids) == 3
    assert {pid for _, pid, _ in dataset.query} | set(dataset.train_pids) == {1, 2, 3, 4, 5, 6}
    assert '3 of 6 persons are for the test' in dataset.drawn
    put(tmp_path / 'split', f'gallery/{junk}/c1.jpg', 'gallery/0000/c1.jpg', 'gallery/0002/c1.jpg', 'query/0002/c2.jpg',
        'train/0001/c1.jpg', 'train/0005/c2.jpg')  # fmt: skip
    split = data_manager.init_dataset(f'folder:{tmp_path / "split"}')
    assert (split.train_pids, [pid for _, pid, _ in split.gallery]) == ([1, 5], [0, 2])


def test_junk_alone_is_no_data_set(tmp_path):
    with pytest.raises(UserError, match='contains no image of a person'):
        Folder(put(tmp_path / 'people', '00-1/c1.jpg'))
