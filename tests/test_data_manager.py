"""The table of data sets, and the command that opens every image of one."""

import errno
import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT
from pictures import noise
from PIL import Image
from test_readers import MARKET

import data_manager
import toy
from readers import market1501, mars, pictures
from readers.tree import Dataset
from runtime import commands
from runtime.errors import ProcessLost, UserError


def test_images_are_checked_on_the_cores_to_which_the_program_is_bound(market, tmp_path, monkeypatch):
    used = []
    look_at_all = pictures.look_at_all
    monkeypatch.setattr(os, 'sched_getaffinity', lambda _: {0, 5, 7}, raising=False)
    monkeypatch.setattr(pictures, 'look_at_all', lambda paths, jobs: used.append(jobs) or look_at_all(paths, 1))
    monkeypatch.setattr(sys, 'argv', ['data_manager.py', '-d', 'market1501', '--data-dir', str(tmp_path)])
    data_manager.main()
    assert used == [3]


def test_a_lost_process_of_the_check_is_one_line(monkeypatch):
    """As when memory runs out."""
    monkeypatch.setattr(pictures, 'look', die)
    with pytest.raises(ProcessLost, match=r'^a process that checks images was killed, .*: use a smaller -j$'):
        list(pictures.look_at_all(['a.jpg'], 1))


def die(path):
    os.kill(os.getpid(), signal.SIGKILL)


def test_boxes_that_may_not_be_read_are_one_line(data_dir, monkeypatch):
    dataset, listdir = market1501.Market1501(str(data_dir)), os.listdir

    def refused(folder):
        if os.path.basename(folder) == 'gt_bbox':
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return listdir(folder)

    monkeypatch.setattr(os, 'listdir', refused)
    with pytest.raises(UserError, match=r'gt_bbox cannot be read: Permission denied$'):
        dataset.multi_query()


def test_toys_are_drawn_and_read(tmp_path, monkeypatch):
    small = {'num_train': 3, 'num_test': 2, 'num_distractors': 1, 'height': 24, 'width': 12}
    draw_market1501, draw_mars = toy.draw_market1501, toy.draw_mars
    monkeypatch.setattr(toy, 'draw_market1501', lambda folder, hard: draw_market1501(folder, num_images=4, **small))
    monkeypatch.setattr(toy, 'draw_mars', lambda folder: draw_mars(folder, num_frames=(2, 3), **small))
    market = data_manager.init_dataset('toy_market1501', tmp_path)
    mars = data_manager.init_dataset('toy_mars', tmp_path)
    assert (market.name, market.kind, mars.name, mars.kind) == ('toy_market1501', 'image', 'toy_mars', 'video')
    assert sorted(os.listdir(tmp_path)) == ['toy_market1501', 'toy_mars']
    assert all(os.path.isfile(path) for path, _, _ in market.train + market.query + market.gallery)
    assert all(os.path.isfile(path) for paths, _, _ in mars.train + mars.query + mars.gallery for path in paths)

    again = data_manager.init_dataset('toy_mars', tmp_path / 'toy_mars')  # its own folder
    assert len(again.train) == len(mars.train) and sorted(os.listdir(tmp_path)) == ['toy_market1501', 'toy_mars']
    assert len(data_manager.init_dataset('toy_mars', tmp_path / 'new' / 'toy_mars').query) == len(mars.query)
    assert 'bbox_train' in os.listdir(tmp_path / 'new' / 'toy_mars')

    shutil.rmtree(tmp_path / 'toy_market1501' / 'query')
    with pytest.raises(UserError, match=r'remove that folder, and the toy is drawn again'):
        data_manager.init_dataset('toy_market1501', tmp_path)


def test_a_toy_that_cannot_be_drawn(tmp_path):
    (tmp_path / 'file').touch()
    with pytest.raises(UserError, match=r'toy_mars cannot be read or drawn in .*file: .*choose another --data-dir'):
        data_manager.init_dataset('toy_mars', tmp_path / 'file')


def test_names():
    images = ['market1501', 'market1501_500k', 'msmt17', 'cuhk03_detected', 'cuhk03_labeled']
    images += ['toy_market1501', 'toy_market1501_hard']
    videos = ['mars', 'mars_official', 'toy_mars']
    assert data_manager.get_names() == [*images, *videos]
    assert (data_manager.get_names('image'), data_manager.get_names('video')) == (images, videos)
    assert [data_manager.kind_of(name) for name in ('msmt17', 'mars', 'market:x', 'duke', 'csv', '')] == [
        'image', 'video', 'image', '', '', ''
    ]  # fmt: skip
    with pytest.raises(
        UserError, match=r"no data set 'duke': choose one of market1501, .* toy_mars, or csv:FILE, folder:DIR"
    ):
        data_manager.init_dataset('duke')


@pytest.mark.parametrize('table', ['IMAGES', 'TRACKLETS'])
def test_any_object_with_three_lists_is_a_data_set(table, monkeypatch, capsys):
    """Its training pids may be any whole numbers; it becomes one that has the rest."""
    path = 'a.jpg' if table == 'IMAGES' else ('a.jpg', 'b.jpg')
    lists = {'train': [(path, 70, 0), (path, 3, 1), (path, 70, 1)], 'query': [(path, 70, 0)], 'gallery': [(path, 9, 5)]}
    monkeypatch.setitem(getattr(data_manager, table), 'mine', lambda data_dir: SimpleNamespace(**lists))
    dataset = data_manager.init_dataset('mine')
    assert (dataset.name, dataset.kind) == ('mine', 'image' if table == 'IMAGES' else 'video')
    assert dataset.train == [(path, 1, 0), (path, 0, 1), (path, 1, 1)]
    assert (dataset.query, dataset.gallery, dataset.train_pids) == (lists['query'], lists['gallery'], [3, 70])
    assert (dataset.num_train_pids, dataset.num_query_pids, dataset.num_gallery_pids) == (2, 1, 1)
    assert f'# {"images" if table == "IMAGES" else "tracklets"}\n' in capsys.readouterr().out
    assert dataset.multi_query() == lists['query']
    more = [(path, 70, 0), (path, 70, 0)]
    lists['multi_query'] = lambda: more
    assert data_manager.init_dataset('mine').multi_query() == more
    for train, fault in (([], 'is empty'), (lists['train'][::2], 'has only one person .a.jpg ...')):
        lists['train'] = train
        with pytest.raises(UserError, match=f'^mine: the training set {fault}'):
            data_manager.init_dataset('mine')


# ---- the command that opens every image ----

WITHOUT_A_PACKAGE = (
    'note: near-duplicates in the training set and the test sets were not looked for: 1',
    '    pip install imagehash, and check again',
)


@pytest.fixture
def checked(tmp_path, monkeypatch, capsys):
    """Run the command on the data sets under `tmp_path`; gives back its status, what it found and its errors."""

    def run(name, *args, every=False):
        monkeypatch.setattr(sys, 'argv', ['data_manager.py', '-d', name, '--data-dir', str(tmp_path), '-j', '1', *args])
        with pytest.raises(SystemExit) as end:
            commands.run(data_manager.main)
        said = capsys.readouterr()
        found = said.out.split('  ' + '-' * 30 + '\n')[-1].replace(f'{tmp_path}/', '').splitlines()
        passed = 'It differs', 'Passed over', 'Split by', 'The cameras', *(() if every else WITHOUT_A_PACKAGE)
        return end.value.code, [line for line in found if not line.startswith(passed)], said.err

    return run


@pytest.fixture
def market(tmp_path, monkeypatch):
    """The tree that is read as Market1501, each image with its own bytes; its statistics are the known ones."""
    monkeypatch.setattr(market1501, 'PUBLISHED', {'train': (2, 3), 'query': (2, 2), 'gallery': (2, 2)})
    for number, (part, name) in enumerate((part, name) for part, names in MARKET.items() for name in names):
        (tmp_path / 'market1501' / part).mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 255, (8, 4, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / 'market1501' / part / name)
    return tmp_path / 'market1501'


NOTES = [
    'note: persons of the training set seen by one camera only: 1',
    '    7',
    'note: persons of the test sets seen by one camera only: 1',
    '    3',
    'note: queries without a match (the person is not in the gallery): 1',
    '    market1501/query/0003_c5s1_000476_00.JPG',
]


def test_a_sound_data_set(market, checked):
    status, found, errors = checked('market1501')
    assert (status, found[:-1]) == (0, NOTES)
    assert found[-1].startswith('market1501: 0 kinds of faults; ')
    assert errors == ''  # no bar where there is no terminal


def test_all_faults_of_a_data_set_are_found(market, checked, monkeypatch):
    monkeypatch.setattr(pictures, 'can_hash', lambda: False)  # near-duplicates are tested below
    (market / 'bounding_box_train' / '0001_c1s1_000001_00.jpg').write_bytes(b'no image')
    query = market / 'query' / '0001_c1s1_001051_00.jpg'
    train = market / 'bounding_box_train'
    shutil.copy(query, train / '0009_c1s1_000001_00.jpg')
    shutil.copy(query, train / '0009_c2s1_000001_00.jpg')
    (market / 'bounding_box_test' / '0001_c2s1_000301_00.jpg').unlink()
    (market / 'bounding_box_test' / '0001_c1s1_000301_00.jpg').symlink_to('/nowhere')
    shutil.copy(train / '0002_c1s1_000451_03.jpg', train / '0002_c2s1_000451_03.jpg')
    (market / 'query' / '0001_c3.png').write_bytes((market / 'query' / '0003_c5s1_000476_00.JPG').read_bytes()[:-20])
    status, found, _ = checked('market1501', '-j', '2')
    folder, kinds = 'market1501/bounding_box_train/', 'JPEG, PNG, BMP, GIF, PPM, TIFF'
    assert status == 1
    assert found[:-1] == [
        'fault: statistics that differ from the known ones: 2',
        '    train: 4 ids, 7 items instead of 2 and 3',
        '    query: 2 ids, 3 items instead of 2 and 2',
        'fault: persons in both the training set and the test sets: 1',
        '    1',
        'note: persons of the training set seen by one camera only: 2',
        '    1',
        '    7',
        *NOTES[2:],
        'note: queries without a match (the person is in the same camera only): 1',
        '    market1501/query/0001_c1s1_001051_00.jpg',
        'fault: files (of 12) that cannot be read: 3',
        f'    cannot read the image {folder}0001_c1s1_000001_00.jpg: it is not a {kinds} or WEBP file',
        f'    cannot read the image market1501/query/0001_c3.png: {found[-7].split(": ")[1]}',
        '    cannot read the image market1501/bounding_box_test/0001_c1s1_000301_00.jpg: No such file or directory',
        'fault: groups of byte-equal files of different persons: 1',
        f'    {folder}0009_c1s1_000001_00.jpg = {folder}0009_c2s1_000001_00.jpg = market1501/query/{query.name}',
        'note: groups of byte-equal files of one person or of distractors: 1',
        f'    {folder}0002_c1s1_000451_03.jpg = {folder}0002_c2s1_000451_03.jpg',
    ]
    assert found[-1].startswith('market1501: 4 kinds of faults; ')


def test_what_is_not_read_is_listed(market, checked):
    for name in ('Thumbs.db', '.hidden', '0001_c1.jp2'):
        (market / 'query' / name).touch()
    (market / 'bounding_box_train' / '0001').mkdir()
    _, found, _ = checked('market1501')
    assert found[:5] == [
        'note: files and folders that are not read: 4',
        '    market1501/bounding_box_train/0001',
        *(f'    market1501/query/{name}' for name in ('.hidden', '0001_c1.jp2', 'Thumbs.db')),
    ]


def test_a_data_set_that_can_only_be_tested(market, checked):
    shutil.rmtree(market / 'bounding_box_train')
    status, found, _ = checked('market1501')
    assert status == 1
    assert found[0].startswith('It can be tested, but not trained on: ')
    assert found[1:-1] == [
        'fault: training set that cannot be used: 1',
        '    market1501 contains no bounding_box_train',
        *NOTES[2:],
    ]


def test_other_cameras_are_a_difference(market, checked):
    shutil.copy(market / 'query' / MARKET['query'][0], market / 'bounding_box_test' / '0000_c0.jpg')
    status, found, _ = checked('market1501')
    assert status == 1
    assert found[:3] == [
        'fault: statistics that differ from the known ones: 2',
        '    gallery: 2 ids, 3 items instead of 2 and 2',
        '    cameras 0, 1, 2, 3, 5, 6 instead of 1 to 6 (camids 0 to 5, in this order)',
    ]


def test_a_distractor_is_no_person(market, checked):
    shutil.copy(market / 'query' / MARKET['query'][0], market / 'bounding_box_test' / MARKET['bounding_box_test'][1])
    status, found, _ = checked('market1501')
    assert status == 0
    assert found[-3] == 'note: groups of byte-equal files of one person or of distractors: 1'


def test_who_is_numbered_0_is_a_person_if_a_query_has_it(market, checked, tmp_path):
    first, second = MARKET['query'][:2]
    shutil.copy(market / 'query' / first, tmp_path / 'copy.jpg')
    train = [
        f'market1501/bounding_box_train/{name},{pid},train' for pid, name in enumerate(MARKET['bounding_box_train'])
    ]
    rows = [*train, f'market1501/query/{first},0,query', f'market1501/query/{second},0,gallery', 'copy.jpg,4,gallery']
    (tmp_path / 'table.csv').write_text('\n'.join(['path,pid,split', *rows]) + '\n')
    status, found, _ = checked(f'csv:{tmp_path}/table.csv')
    assert status == 1
    assert 'fault: groups of byte-equal files of different persons: 1' in found


def test_a_file_that_is_listed_for_several_persons(market, checked, tmp_path):
    """In a table; a distractor is nobody."""
    for number, name in enumerate('abcd'):
        noise(128, 64, number).save(tmp_path / f'{name}.png')
    rows = ['a.png,1,train', 'b.png,2,train', 'b.png,1,train', 'c.png,3,query', 'd.png,3,gallery', 'c.png,0,gallery']
    rows += ['a.png,4,gallery', 'd.png,0,gallery']
    (tmp_path / 'table.csv').write_text('\n'.join(['path,pid,split', *rows]) + '\n')
    status, found, _ = checked(f'csv:{tmp_path}/table.csv')
    place = found.index('fault: files that are listed for several persons: 2')
    assert status == 1
    assert found[place + 1 : place + 3] == ['    a.png for 2 persons', '    b.png for 2 persons']
    assert not any('byte-equal' in line for line in found)


def test_images_that_show_nothing_or_are_blurred(market, checked):
    names = sorted((market / 'bounding_box_test').iterdir())
    Image.new('RGB', (64, 128), (9, 9, 9)).save(names[-1])
    rng = np.random.default_rng(0)
    blurred = Image.fromarray(rng.integers(0, 255, (4, 2, 3), dtype=np.uint8)).resize(
        (64, 128), Image.Resampling.BICUBIC
    )
    blurred.save(names[1], quality=95)
    status, found, _ = checked('market1501')
    assert status == 0
    assert found[len(NOTES) : -1] == [
        'note: images that show nothing (nearly one shade of grey): 1',
        f'    market1501/bounding_box_test/{names[-1].name}',
        'note: images that are very blurred, the worst first: 1',
        f'    market1501/bounding_box_test/{names[1].name}',
    ]


def test_near_duplicates_across_train_and_test(market, checked, tmp_path):
    pytest.importorskip('imagehash')
    toy.draw_cuhk03(tmp_path / 'toy', num_train=1, num_test=1, num_images=1)
    image = Image.open(next((tmp_path / 'toy' / 'labeled' / 'query').iterdir()))  # with structure, as hashes compare it
    one = market / 'bounding_box_train' / MARKET['bounding_box_train'][0]
    other = market / 'bounding_box_test' / MARKET['bounding_box_test'][1]
    image.save(one, quality=90)
    image.resize((50, 100), Image.Resampling.BICUBIC).save(other, quality=60)
    _, found, _ = checked('market1501')
    assert found[-3:-1] == [
        'note: near-duplicates in the training set and the test sets: 1',
        f'    market1501/bounding_box_train/{one.name} ~ market1501/bounding_box_test/{other.name}',
    ]


def test_without_the_package_near_duplicates_are_not_looked_for(market, checked, monkeypatch):
    monkeypatch.setattr(pictures, 'can_hash', lambda: False)
    assert '    pip install imagehash, and check again' in checked('market1501', every=True)[1]


def test_pairs_of_hashes_are_those_of_a_plain_loop(monkeypatch):
    monkeypatch.setattr(pictures, 'PAIRS_AT_ONCE', 20000)  # ten rows at once
    rng = np.random.default_rng(0)
    one, other = (rng.integers(0, 256, (number, 4), dtype=np.uint8) for number in (30, 2000))
    other[7] = one[3]
    expected = [
        (i, j, differing)
        for i, left in enumerate(one)
        for j, right in enumerate(other)
        if (differing := int(np.unpackbits(left ^ right).sum())) <= 6
    ]
    found = list(pictures.near_duplicates([bytes(row) for row in one], [bytes(row) for row in other], 6))
    assert found == expected and (3, 7, 0) in found and len(found) > 1
    assert list(pictures.near_duplicates([], [b'x'], 6)) == []


def test_sharpness_is_the_variance_of_a_laplacian():
    pixels = np.random.default_rng(0).integers(0, 255, (9, 7)).astype(np.float32)
    values = [pixels[y - 1, x] + pixels[y + 1, x] + pixels[y, x - 1] + pixels[y, x + 1] - 4 * pixels[y, x]
              for y in range(1, 8) for x in range(1, 6)]  # fmt: skip
    assert pictures.sharpness(pixels) == pytest.approx(np.var(values), rel=1e-5)
    assert pictures.sharpness(np.zeros((2, 9), np.float32)) == np.inf


def test_unknown_cameras_are_no_reason_for_notes(tmp_path, checked):
    rng = np.random.default_rng(0)
    for number, person in enumerate('aabbccdd'):
        (tmp_path / 'people' / person).mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 255, (8, 4, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / 'people' / person / f'{number}.png')
    status, found, _ = checked(f'folder:{tmp_path}/people')
    assert (status, len(found)) == (0, 1) and found[0].startswith('folder:people: 0 kinds of faults; ')
    for person in 'abcd':
        (tmp_path / 'people' / person / f'{2 * "abcd".index(person)}.png').unlink()
    _, found, _ = checked(f'folder:{tmp_path}/people')
    assert found[0] == 'note: queries without a match (the person has no other file in the gallery): 2'


def test_names_that_would_steer_a_terminal(market, checked):
    (market / 'query' / '0001_c1\x1b[2J\udcff.jpg').write_bytes(b'')
    assert r'market1501/query/0001_c1\x1b[2J\udcff.jpg: ' in '\n'.join(checked('market1501')[1])


@pytest.mark.parametrize('name', ['mars', 'mars_official'])
def test_mars_is_checked_under_both_protocols(tmp_path, checked, monkeypatch, name):
    toy.draw_mars(tmp_path / 'mars', num_train=3, num_test=2, num_distractors=1, num_frames=(2, 3), height=24, width=12)
    status, found, _ = checked(name)
    assert status == 1
    assert found[0] == 'fault: statistics that differ from the known ones: 3'
    assert found[3].endswith(' instead of 621 and 9330')
    monkeypatch.setattr(mars, 'PUBLISHED', {})
    path = min((tmp_path / 'mars' / 'bbox_train' / '0001').iterdir())
    path.write_bytes(b'')
    status, other, _ = checked(name)
    assert status == 1
    assert other[:-3] == found[4:-1]
    assert f'    cannot read the image mars/bbox_train/0001/{path.name}: it is not a JPEG' in other[-2]
    assert 'note: queries without a match under mars (the person is not in the gallery): 4' in other
    assert not [line for line in other if 'mars_official (' in line and 'not in the gallery' in line]
    assert 'note: queries without a match under mars_official (the person is in the same camera only)' not in other


def test_mistakes_of_the_command_are_one_line(tmp_path, checked):
    for name, args, fault in (
        ('duke', (), "there is no data set 'duke'"),
        ('market1501', (), 'no market1501 or Market-1501-v15.09.15 in --data-dir'),
        ('toy_mars', ('-j', '0'), '-j/--jobs: must be an integer of at least 1 '),
        ('toy_mars', ('-j', 'all'), '-j/--jobs: must be an integer of at least 1 '),
    ):
        status, _, errors = checked(name, *args)
        assert (status, errors[: len(fault) + 7]) == (2, f'error: {fault}')
        assert 'Traceback' not in errors
    assert list(tmp_path.iterdir()) == []


def test_data_of_one_camera_can_be_tested_with_an_option(market, checked):
    for part, names in MARKET.items():
        for name in names:
            (market / part / name).rename(market / part / re.sub(r'_c\d', '_c1', name))
    _, found, _ = checked('market1501')
    hint = 'the person is in the same camera only; if the cameras are unknown, test with --any-camera'
    assert f'note: queries without a match ({hint}): 1' in found


def test_the_room_is_cheap_to_import():
    program = "import sys, data_manager; print({'torch', 'scipy', 'dataset_loader'} & set(sys.modules))"
    ran = subprocess.run([sys.executable, '-c', program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ran.stdout == 'set()\n'


def test_a_fingerprint_includes_the_names_of_persons(tmp_path):
    """Files may have equal names in the folders of all persons."""
    marks = []
    for place, persons in ('one', ('Anna', 'Bert')), ('other', ('Emil', 'Fred')):
        for person in persons:
            for split in 'train', 'query', 'gallery':
                (tmp_path / place / split / person).mkdir(parents=True)
                (tmp_path / place / split / person / 'c1_1.jpg').touch()
        dataset = data_manager.init_dataset(f'folder:{tmp_path / place}')
        marks.append([data_manager.fingerprint(dataset, [subset]) for subset in ('train', 'query', 'gallery')])
    assert not set(marks[0]) & set(marks[1])
    numbers = Dataset('x', [('a', 5, 0), ('b', 7, 1)], [('q', 3, 0)], [('g', 3, 1)])
    assert data_manager.fingerprint(numbers) == hashlib.sha256(b'0 0 a\n1 1 b\n3 0 q\n3 1 g\n').hexdigest()[:16]
