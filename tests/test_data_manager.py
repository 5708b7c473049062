"""Trees as people unzip them, tables of the real size, and every fault of a tree as one message."""

import os
import shutil
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

import data_manager
import toy
from data_manager import Market1501, Mars
from runtime.errors import UserError

README = (Path(data_manager.__file__).parent / 'data' / 'README.md').read_text()
MARKET = {
    'bounding_box_train': ['0002_c1s1_000451_03.jpg', '0002_c2s1_000301_01.jpg', '0007_c6s3_077419_03.jpg'],
    'query': ['0001_c1s1_001051_00.jpg', '0003_c5s1_000476_00.JPG'],
    'bounding_box_test': ['0001_c2s1_000301_00.jpg', '0000_c3s1_000151_01.jpg', '-1_c1s1_000401_03.jpg'],
}


def put_market(root, files=MARKET):
    """A tree of links to nowhere: to look a file up on disk is to fail."""
    for part, names in files.items():
        (root / part).mkdir(parents=True)
        for name in names:
            (root / part / name).symlink_to('/nowhere')
    return root


def lines_of(pid, camera, frames, number=1):
    begin = '00-1' if pid == -1 else f'{pid:04d}'
    return [f'{begin}C{camera}T{number:04d}F{frame:03d}.jpg' for frame in range(1, frames + 1)]


def put_info(root, tables=None):
    """MARS's info/ for the tracklets (pid, camera, frames) of TRAIN and TEST, or with other tables in their places."""
    return put_tracklets(root, TRAIN, TEST, QUERIES, tables or {})


def put_tracklets(root, train, test, queries, tables):
    info = root / 'info'
    info.mkdir(parents=True)
    for subset, tracklets in ('train', train), ('test', test):
        (root / f'bbox_{subset}').mkdir()
        names, table = [], []
        for number, (pid, camera, frames) in enumerate(tracklets, start=1):
            first = len(names) + 1
            names += lines_of(pid, camera, frames, number)
            table.append([first, len(names), pid, camera])
        (info / f'{subset}_name.txt').write_text('\n'.join(names) + '\n')
        table = tables.get(subset, np.array(table, dtype=np.int32))
        savemat(info / f'tracks_{subset}_info.mat', {f'track_{subset}_info': table})
    queries = tables.get('queries', np.array([queries], dtype=np.uint16))
    savemat(info / 'query_IDX.mat', {'query_IDX': queries})
    return root


TRAIN = [(1, 1, 4), (1, 2, 2), (5, 6, 3)]
TEST = [(-1, 1, 2), (0, 3, 2), (2, 1, 5), (2, 1, 3), (2, 4, 4), (4, 2, 2)]
QUERIES = [3, 6]


# ---- what is read ----


def test_market1501_is_read_from_names_alone(tmp_path, capsys):
    root = put_market(tmp_path / 'market1501')
    (root / 'query' / 'Thumbs.db').write_text('')
    (root / 'query' / '._0001_c1s1_001051_00.jpg').write_text('')
    dataset = data_manager.init_dataset('market1501', tmp_path)

    paths = [str(root / 'bounding_box_train' / name) for name in MARKET['bounding_box_train']]
    assert dataset.train == list(zip(paths, [0, 0, 1], [0, 1, 5], strict=True))
    assert [(pid, camid) for _, pid, camid in dataset.query] == [(1, 0), (3, 4)]
    assert [(pid, camid) for _, pid, camid in dataset.gallery] == [(0, 2), (1, 1)]  # distractors stay, junk goes
    assert (dataset.name, dataset.kind) == ('market1501', 'image')
    assert (dataset.num_train_pids, dataset.num_query_pids, dataset.num_gallery_pids) == (2, 2, 2)
    assert capsys.readouterr().out == (
        'Initializing dataset market1501\n'
        '=> Market1501 loaded\n'
        'Dataset statistics:\n'
        '  ------------------------------\n'
        '  subset   | # ids | # images\n'
        '  ------------------------------\n'
        '  train    |     2 |        3\n'
        '  query    |     2 |        2\n'
        '  gallery  |     2 |        2\n'
        '  ------------------------------\n'
        '  total    |     4 |        7\n'
        '  ------------------------------\n'
    )


@pytest.mark.parametrize(
    'place',
    [
        'market1501',
        'Market-1501-v15.09.15',
        'market1501/Market-1501-v15.09.15',
        'Market-1501-v15.09.15/Market-1501-v15.09.15',
    ],
)
def test_market1501_under_the_names_it_has(tmp_path, place):
    put_market(tmp_path / 'exp1_c2' / place)  # the folder's name looks like an image's
    (tmp_path / 'exp1_c2' / 'market1501').mkdir(exist_ok=True)  # an empty one does not hide it
    dataset = Market1501(tmp_path / 'exp1_c2')
    assert [pid for _, pid, _ in dataset.train] == [0, 0, 1]
    assert {camid for _, _, camid in dataset.train} == {0, 1, 5}


def test_order_and_labels_do_not_depend_on_the_file_system(tmp_path, monkeypatch):
    put_market(tmp_path / 'market1501')
    expected = Market1501(tmp_path)
    listdir = os.listdir
    monkeypatch.setattr(os, 'listdir', lambda path: listdir(path)[::-1])
    again = Market1501(tmp_path)
    assert (again.train, again.query, again.gallery) == (expected.train, expected.query, expected.gallery)
    assert again.train == sorted(again.train)


@pytest.mark.parametrize('place', ['mars', 'MARS', 'mars/MARS', 'MARS/mars'])
def test_mars_in_the_originals_protocol(tmp_path, capsys, place):
    root = put_info(tmp_path / place)
    dataset = data_manager.init_dataset('mars', tmp_path)

    frames = tuple(str(root / 'bbox_train' / '0001' / f'0001C2T0002F{frame:03d}.jpg') for frame in (1, 2))
    assert dataset.train[1] == (frames, 0, 1)
    assert [(len(paths), pid, camid) for paths, pid, camid in dataset.train] == [(4, 0, 0), (2, 0, 1), (3, 1, 5)]
    assert [(len(paths), pid, camid) for paths, pid, camid in dataset.query] == [(5, 2, 0), (2, 4, 1)]
    assert [(len(paths), pid, camid) for paths, pid, camid in dataset.gallery] == [(2, 0, 2), (3, 2, 0), (4, 2, 3)]
    assert (dataset.name, dataset.kind) == ('mars', 'video')
    assert (dataset.num_train_pids, dataset.num_query_pids, dataset.num_gallery_pids) == (2, 2, 2)
    assert capsys.readouterr().out == (
        'Initializing dataset mars\n'
        '=> MARS loaded\n'
        'Dataset statistics:\n'
        '  ------------------------------\n'
        '  subset   | # ids | # tracklets\n'
        '  ------------------------------\n'
        '  train    |     2 |        3\n'
        '  query    |     2 |        2\n'
        '  gallery  |     2 |        3\n'
        '  ------------------------------\n'
        '  total    |     4 |        8\n'
        '  number of images per tracklet: 2 ~ 5, average 3.1\n'
        '  ------------------------------\n'
    )


def test_mars_in_its_own_protocol_keeps_the_queries(tmp_path, capsys):
    put_info(tmp_path / 'mars')
    original = Mars(tmp_path)
    capsys.readouterr()
    official = data_manager.init_dataset('mars_official', tmp_path)
    assert official.name == 'mars_official'
    assert (official.train, official.query) == (original.train, original.query)
    assert sorted(official.gallery) == sorted(original.gallery + original.query)
    assert official.num_gallery_pids == 3
    printed = capsys.readouterr().out
    assert '  gallery  |     3 |        5\n' in printed
    assert '  total    |     4 |        8\n' in printed  # a tracklet counts once
    assert '2 ~ 5, average 3.1\n' in printed


def test_name_files_of_windows(tmp_path):
    root = put_info(tmp_path / 'mars')
    expected = Mars(tmp_path).train
    path = root / 'info' / 'train_name.txt'
    path.write_bytes(path.read_bytes().replace(b'\n', b'\r\n') + b'\r\n')
    assert Mars(tmp_path).train == expected


# ---- the real sizes ----


def real_sized(rng, num_tracks, num_frames):
    """Lengths of tracklets from 2 to 920, `num_frames` together."""
    others = num_tracks - 2
    return [2, 920, *(2 + rng.multinomial(num_frames - 922 - 2 * others, np.full(others, 1 / others))).tolist()]


def test_mars_at_its_size(tmp_path, capsys):
    """The tables' known numbers come out: 8298 and 12180 tracks, 1980 queries, 870 tracklets of junk."""
    rng = np.random.default_rng(0)
    train = [(2 * (row % 625) + 1, row % 6 + 1, frames) for row, frames in enumerate(real_sized(rng, 8298, 509914))]
    persons = [2 * index for index in range(1, 627)]
    junk_frames = 509914 + 681089 - round(59.5 * 19608)  # so that an average of 59.5 is left
    lengths = real_sized(rng, 12180 - 870, 681089 - junk_frames)
    pids = [persons[row % 626] for row in range(1980)]
    pids += [[0, *persons[:620]][row % 621] for row in range(9330)]
    test = [(-1, 1, frames) for frames in 2 + rng.multinomial(junk_frames - 2 * 870, np.full(870, 1 / 870))]
    test += [(pid, row % 6 + 1, frames) for row, (pid, frames) in enumerate(zip(pids, lengths, strict=True))]
    put_tracklets(tmp_path / 'mars', train, test, range(871, 871 + 1980), {})
    info = tmp_path / 'mars' / 'info'
    assert (info / 'train_name.txt').read_text().count('\n') == 509914
    assert (info / 'test_name.txt').read_text().count('\n') == 681089

    started = time.process_time()
    dataset = Mars(tmp_path)
    seconds = time.process_time() - started
    printed = capsys.readouterr().out
    assert '  train    |   625 |     8298\n  query    |   626 |     1980\n  gallery  |   621 |     9330\n' in printed
    assert '  total    |  1251 |    19608\n' in printed
    assert '  number of images per tracklet: 2 ~ 920, average 59.5\n' in printed
    assert textwrap.indent(printed, '    ') in README
    assert sum(len(paths) for paths, _, _ in dataset.train) == 509914
    assert seconds < 2  # of this process, so that a busy machine does not count; 0.8 s seen


def test_market1501_at_its_size(tmp_path, monkeypatch, capsys):
    """12936, 3368 and 19732 names, of which 3819 are junk."""
    train = [f'{row % 751 + 1:04d}_c{row % 6 + 1}s1_{row:06d}_01.jpg' for row in range(12936)]
    query = [f'{row % 750 + 1000:04d}_c{row % 6 + 1}s1_{row:06d}_00.jpg' for row in range(3368)]
    gallery = [f'-1_c{row % 6 + 1}s1_{row:06d}_01.jpg' for row in range(3819)]
    gallery += [f'{row % 751 and row % 751 + 999:04d}_c{row % 6 + 1}s1_{row:06d}_01.jpg' for row in range(15913)]
    names = dict(zip(MARKET, (train, query, gallery), strict=True))
    put_market(tmp_path / 'market1501', dict.fromkeys(MARKET, ()))
    monkeypatch.setattr(os, 'listdir', lambda path: names[os.path.basename(path)])

    started = time.process_time()
    Market1501(tmp_path)
    seconds = time.process_time() - started
    printed = capsys.readouterr().out
    assert '  train    |   751 |    12936\n  query    |   750 |     3368\n  gallery  |   751 |    15913\n' in printed
    assert '  total    |  1501 |    32217\n' in printed
    assert textwrap.indent(printed, '    ') in README
    assert seconds < 0.5  # 0.1 s seen


# ---- the toys ----


def test_toys_are_drawn_and_read(tmp_path, monkeypatch):
    small = {'num_train': 3, 'num_test': 2, 'num_distractors': 1, 'height': 24, 'width': 12}
    draw_market1501, draw_mars = toy.draw_market1501, toy.draw_mars
    monkeypatch.setattr(toy, 'draw_market1501', lambda folder: draw_market1501(folder, num_images=4, **small))
    monkeypatch.setattr(toy, 'draw_mars', lambda folder: draw_mars(folder, num_frames=(2, 3), **small))
    market = data_manager.init_dataset('toy_market1501', tmp_path)
    mars = data_manager.init_dataset('toy_mars', tmp_path)
    assert (market.name, market.kind, mars.name, mars.kind) == ('toy_market1501', 'image', 'toy_mars', 'video')
    assert sorted(os.listdir(tmp_path)) == ['toy_market1501', 'toy_mars']
    assert all(os.path.isfile(path) for path, _, _ in market.train + market.query + market.gallery)
    assert all(os.path.isfile(path) for paths, _, _ in mars.train + mars.query + mars.gallery for path in paths)

    shutil.rmtree(tmp_path / 'toy_market1501' / 'query')
    with pytest.raises(UserError, match='remove that folder, and the toy is drawn anew'):
        data_manager.init_dataset('toy_market1501', tmp_path)


def test_a_toy_that_cannot_be_drawn(tmp_path):
    (tmp_path / 'file').touch()
    with pytest.raises(UserError, match=r'toy_mars cannot be drawn into .*file.*choose another --data-dir'):
        data_manager.init_dataset('toy_mars', tmp_path / 'file')


def test_names():
    assert data_manager.get_names() == ['market1501', 'mars', 'mars_official', 'toy_market1501', 'toy_mars']
    assert data_manager.get_names('image') == ['market1501', 'toy_market1501']
    assert data_manager.get_names('video') == ['mars', 'mars_official', 'toy_mars']
    with pytest.raises(UserError, match="no data set 'duke': choose one of market1501, mars"):
        data_manager.init_dataset('duke')


# ---- faults ----


def one_line(error) -> str:
    message = str(error.value)
    assert message.isprintable()
    assert len(message) < 2000
    return message


@pytest.mark.parametrize('name, folder', [('market1501', 'Market-1501-v15.09.15'), ('mars', 'MARS')])
def test_a_missing_tree_is_drawn(tmp_path, name, folder):
    with pytest.raises(UserError) as error:
        data_manager.init_dataset(name, tmp_path)
    message = str(error.value)
    assert message.startswith(f"no {name} or {folder} in --data-dir '{tmp_path}'; expected:\n{tmp_path}/{name}/\n")
    parts = data_manager.MARKET_PARTS if name == 'market1501' else data_manager.MARS_PARTS
    assert all(f'\n    {part}' in message for part in parts)
    assert message.endswith(f'data/README.md says where to get it; -d toy_{name} draws a toy of this format')


def test_a_missing_part_is_named(tmp_path):
    root = put_market(tmp_path / 'Market-1501-v15.09.15')
    shutil.rmtree(root / 'query')
    with pytest.raises(UserError, match=r'Market-1501-v15\.09\.15 holds no query; expected:'):
        Market1501(tmp_path)
    root = put_info(tmp_path / 'mars' / 'MARS')
    (root / 'info' / 'query_IDX.mat').unlink()
    (root / 'bbox_test').rmdir()
    with pytest.raises(UserError, match=r'mars/MARS holds no bbox_test, no info/query_IDX\.mat; expected:'):
        Mars(tmp_path)


@pytest.mark.parametrize(
    'part, names, fault',
    [
        ('bounding_box_train', [], 'bounding_box_train holds no images of persons'),
        ('query', ['Thumbs.db', '.hidden_c1.jpg'], 'query holds no images of persons'),
        ('bounding_box_test', ['-1_c1s1_000401_03.jpg'], 'bounding_box_test holds no images of persons'),
        ('query', ['holiday.jpg'], "query: the name 'holiday.jpg' does not parse"),
        ('query', ['x0001_c1s1_001051_00.jpg'], 'does not parse'),
        ('query', ['-2_c1s1_001051_00.jpg'], 'does not parse'),
        ('query', ['0001_c0s1_001051_00.jpg'], "'0001_c0s1_001051_00.jpg' is of camera 0, but cameras are 1 to 6"),
        ('bounding_box_test', ['0001_c7s1_001051_00.jpg'], 'is of camera 7, but cameras are 1 to 6'),
        ('bounding_box_train', MARKET['bounding_box_train'][:2], 'the training set is of one person'),
        ('query', ['a\n\x1b[2J\udcff.jpg'], r"query: the name 'a\n\x1b[2J\udcff.jpg' does not parse"),
        ('query', ['0001_c7\n.jpg'], r"query: '0001_c7\n.jpg' is of camera 7"),
    ],
)
def test_faults_of_market1501(tmp_path, part, names, fault):
    put_market(tmp_path / 'market1501', {**MARKET, part: names})
    with pytest.raises(UserError) as error:
        Market1501(tmp_path)
    assert fault in one_line(error)


def test_a_part_that_is_a_file(tmp_path):
    root = put_market(tmp_path / 'market1501')
    shutil.rmtree(root / 'query')
    (root / 'query').touch()
    with pytest.raises(UserError) as error:
        Market1501(tmp_path)
    assert f'{root}/query cannot be read: Not a directory' in one_line(error)


GOOD = np.array([[1, 4, 1, 1], [5, 6, 1, 2], [7, 9, 5, 6]])  # the table of TRAIN


def changed(row, column, value, dtype=np.int32):
    table = GOOD.astype(dtype)
    table[row, column] = value
    return table


@pytest.mark.parametrize(
    'table, fault',
    [
        (changed(2, 1, 10), 'track 3 is lines 7 to 10 of'),
        (changed(0, 0, 0), 'track 1 is lines 0 to 4 of'),
        (changed(0, 0, -3), 'track 1 is lines -3 to 4 of'),
        (changed(1, 1, 4), 'track 2 is lines 5 to 4 of'),
        (changed(0, 1, 2**31 - 1), 'track 1 is lines 1 to 2147483647 of'),
        (changed(1, 1, 7), 'track 2, lines 5 to 7 of'),  # two persons
        (changed(0, 1, 5), 'mixes 0001C1 and 0001C2, but a tracklet is one person in one camera'),
        (changed(1, 3, 7), 'track 2 is of camera 7, but cameras are 1 to 6'),
        (changed(1, 3, 0), 'track 2 is of camera 0, but cameras are 1 to 6'),
        (changed(1, 2, -2), 'track 2 is of person -2'),
        (changed(2, 2, 1), 'the training set is of one person'),
        (changed(slice(None), 2, -1), 'the training set has no tracklet of a person'),
        (changed(0, 0, np.nan, float), 'is no table of whole numbers'),
        (changed(0, 0, 1.5, float), 'is no table of whole numbers'),
        (changed(0, 0, 1e300, float), 'is no table of whole numbers'),
        (GOOD + 0.5j, 'is no table of whole numbers'),
        (np.array([['a', 'b']], dtype=object), 'is no table of whole numbers'),
        (GOOD[:, :3], 'is a table of shape (3, 3), but must have 4 columns'),
        (np.zeros((0, 4)), 'the training set has no tracklet of a person'),
    ],
)
def test_faults_of_mars_tables(tmp_path, table, fault):
    put_info(tmp_path / 'mars', {'train': table})
    with pytest.raises(UserError) as error:
        Mars(tmp_path)
    assert fault in one_line(error)
    assert f'{tmp_path}/mars' in one_line(error)


def test_a_mars_table_that_would_fill_the_memory(tmp_path):
    """Ten thousand tracklets of all the frames that there are; each frame of MARS is in one."""
    lines = ''.join(f'0001C1T0001F{frame % 1000:03d}.jpg\n' for frame in range(10**5))
    table = np.array([[1, 10**5, 1, 1]] * 10**4)
    root = put_info(tmp_path / 'mars', {'train': table})
    (root / 'info' / 'train_name.txt').write_text(lines)
    with pytest.raises(UserError) as error:
        Mars(tmp_path)
    assert 'tracks 1 to 21 are of 2100000 frames, but' in one_line(error)


@pytest.mark.parametrize('dtype', [np.uint16, np.int64, float])
def test_mars_tables_of_any_whole_type(tmp_path, dtype):
    put_info(tmp_path / 'mars', {'train': GOOD.astype(dtype), 'queries': np.array([QUERIES], dtype)})
    dataset = Mars(tmp_path)
    assert len(dataset.train) == 3
    assert all(type(pid) is type(camid) is int for _, pid, camid in dataset.train + dataset.query)


@pytest.mark.parametrize(
    'queries, fault',
    [
        (np.array([[0, 3]], dtype=np.uint16), 'query_IDX.mat points at track 0, but there are tracks 1 to 6'),
        (np.array([[7]], dtype=np.uint16), 'query_IDX.mat points at track 7, but there are tracks 1 to 6'),
        (np.array([[2, 3, 2]], dtype=np.uint16), 'query_IDX.mat names track 2 more than once'),
        (np.array([[1]], dtype=np.uint16), 'the query set has no tracklet of a person'),
        (np.array([[2, 3, 4, 5, 6]], dtype=np.uint16), 'the gallery set has no tracklet of a person'),
    ],
)
def test_faults_of_mars_queries(tmp_path, queries, fault):
    put_info(tmp_path / 'mars', {'queries': queries})
    with pytest.raises(UserError) as error:
        Mars(tmp_path)
    assert fault in one_line(error)


@pytest.mark.parametrize(
    'file, content, fault',
    [
        ('train_name.txt', b'', 'track 1 is lines 1 to 4 of'),
        ('train_name.txt', b'\n' * 9 + b'0001C1T0001F001.jpg', "the name '' does not parse"),
        ('train_name.txt', b'\x1b[2J\n' * 9, r"the name '\x1b[2J' does not parse"),
        ('train_name.txt', b'\n'.join([b'x' * 10**6] * 9), "the name 'xxx"),
        ('train_name.txt', b'\xff\xfe' * 9, 'cannot be read as lines of file names'),
        ('tracks_train_info.mat', b'', 'cannot be read as a .mat file'),
        ('tracks_train_info.mat', b'no table' * 40, 'cannot be read as a .mat file'),
        ('tracks_test_info.mat', None, "tracks_test_info.mat holds no table 'track_test_info'"),
    ],
)
def test_faults_of_mars_files(tmp_path, file, content, fault):
    root = put_info(tmp_path / 'mars')
    if content is None:
        shutil.copy(root / 'info' / 'tracks_train_info.mat', root / 'info' / file)
    else:
        (root / 'info' / file).write_bytes(content)
    with pytest.raises(UserError) as error:
        Mars(tmp_path)
    assert fault in one_line(error)


@pytest.mark.parametrize(
    'name', ['Thumbs.db', '0001C1T0001F001.png', '../../../C1T0001F001.jpg', '0001C1T0001F0001.jpg/x']
)
def test_a_mars_name_that_does_not_parse(tmp_path, name):
    root = put_info(tmp_path / 'mars')
    path = root / 'info' / 'train_name.txt'
    lines = path.read_text().splitlines()
    path.write_text('\n'.join([*lines[:2], name, *lines[3:]]))
    with pytest.raises(UserError) as error:
        Mars(tmp_path)
    assert f"{path}: the name '{name}' does not parse; it must be as 0001C1T0001F001.jpg" in one_line(error)


# ---- the command that opens every image ----


@pytest.fixture
def checked(tmp_path, monkeypatch, capsys):
    """Run the command on the data sets under `tmp_path`; gives back its status, what it found and its errors."""

    def run(name, *args):
        monkeypatch.setattr(sys, 'argv', ['data_manager.py', '-d', name, '--data-dir', str(tmp_path), '-j', '1', *args])
        with pytest.raises(SystemExit) as end:
            data_manager.main()
        said = capsys.readouterr()
        found = said.out.split('  ' + '-' * 30 + '\n')[-1].replace(f'{tmp_path}/', '')
        return end.value.code, found.splitlines(), said.err

    return run


@pytest.fixture
def market(tmp_path, monkeypatch):
    """The tree that is read as Market1501, each image with its own bytes; its statistics are the known ones."""
    monkeypatch.setitem(data_manager.KNOWN, 'market1501', {'train': (2, 3), 'query': (2, 2), 'gallery': (2, 2)})
    for number, (part, name) in enumerate((part, name) for part, names in MARKET.items() for name in names):
        (tmp_path / 'market1501' / part).mkdir(parents=True, exist_ok=True)
        Image.new('RGB', (4, 8), (30 * number, 0, 0)).save(tmp_path / 'market1501' / part / name)
    return tmp_path / 'market1501'


NOTES = [
    'note: persons of the training set in one camera only: 1',
    '    7',
    'note: persons of the test sets in one camera only: 1',
    '    3',
    'note: queries without a match, their person not in the gallery: 1',
    '    market1501/query/0003_c5s1_000476_00.JPG',
]


def test_a_sound_data_set(market, checked):
    status, found, errors = checked('market1501')
    assert (status, found[:-1]) == (0, NOTES)
    assert found[-1].startswith('market1501: kinds of faults: 0; ')
    assert errors == ''  # no bar where there is no terminal


def test_all_faults_of_a_data_set_are_found(market, checked, tmp_path):
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
        'fault: statistics other than the known ones: 2',
        '    train: 4 ids, 7 items; known are 2 and 3',
        '    query: 2 ids, 3 items; known are 2 and 2',
        'fault: persons in both the training set and the test sets: 1',
        '    1',
        'note: persons of the training set in one camera only: 2',
        '    1',
        '    7',
        *NOTES[2:],
        'note: queries without a match, their person in their own camera only: 1',
        '    market1501/query/0001_c1s1_001051_00.jpg',
        'fault: files of 12 that cannot be read: 3',
        f'    cannot read the image {folder}0001_c1s1_000001_00.jpg: it is no {kinds} or WEBP file',
        f'    cannot read the image market1501/query/0001_c3.png: {found[-7].split(": ")[1]}',
        '    cannot read the image market1501/bounding_box_test/0001_c1s1_000301_00.jpg: No such file or directory',
        'fault: groups of byte-equal files of different persons: 1',
        f'    {folder}0009_c1s1_000001_00.jpg = {folder}0009_c2s1_000001_00.jpg = market1501/query/{query.name}',
        'note: groups of byte-equal files of one person or of distractors: 1',
        f'    {folder}0002_c1s1_000451_03.jpg = {folder}0002_c2s1_000451_03.jpg',
    ]
    assert found[-1].startswith('market1501: kinds of faults: 4; ')


def test_a_distractor_is_no_person(market, checked):
    shutil.copy(market / 'query' / MARKET['query'][0], market / 'bounding_box_test' / MARKET['bounding_box_test'][1])
    status, found, _ = checked('market1501')
    assert status == 0
    assert found[-3] == 'note: groups of byte-equal files of one person or of distractors: 1'


def test_names_that_would_steer_a_terminal(market, checked):
    (market / 'query' / '0001_c1\x1b[2J\udcff.jpg').write_bytes(b'')
    assert r'market1501/query/0001_c1\x1b[2J\udcff.jpg: ' in '\n'.join(checked('market1501')[1])


@pytest.mark.parametrize('name', ['mars', 'mars_official'])
def test_mars_is_checked_under_both_protocols(tmp_path, checked, monkeypatch, name):
    toy.draw_mars(tmp_path / 'mars', num_train=3, num_test=2, num_distractors=1, num_frames=(2, 3), height=24, width=12)
    status, found, _ = checked(name)
    assert status == 1
    assert found[0] == 'fault: statistics other than the known ones: 3'
    assert found[3].endswith('; known are 621 and 9330')
    monkeypatch.delitem(data_manager.KNOWN, 'mars')
    path = min((tmp_path / 'mars' / 'bbox_train' / '0001').iterdir())
    path.write_bytes(b'')
    status, other, _ = checked(name)
    assert status == 1
    assert other[:-3] == found[4:-1]
    assert f'    cannot read the image mars/bbox_train/0001/{path.name}: it is no JPEG' in other[-2]
    assert 'note: queries without a match under mars, their person not in the gallery: 4' in other
    assert not [line for line in other if 'mars_official,' in line and 'not in the gallery' in line]
    assert 'note: queries without a match under mars_official, their person in their own camera only' not in other


def test_mistakes_of_the_command_are_one_line(tmp_path, checked):
    for name, args, fault in (
        ('duke', (), "there is no data set 'duke'"),
        ('market1501', (), 'no market1501 or Market-1501-v15.09.15 in --data-dir'),
        ('toy_mars', ('-j', '0'), '-j 0: the images are opened by one process or more'),
        ('toy_mars', ('-j', 'all'), "argument -j/--jobs: invalid int value: 'all'"),
    ):
        status, _, errors = checked(name, *args)
        assert (status, errors[: len(fault) + 7]) == (2, f'error: {fault}')
        assert 'Traceback' not in errors
    assert list(tmp_path.iterdir()) == []


def test_the_room_is_cheap_to_import():
    program = "import sys, data_manager; print(bool({'torch', 'scipy', 'tqdm', 'dataset_loader'} & set(sys.modules)))"
    root = Path(data_manager.__file__).parent
    ran = subprocess.run([sys.executable, '-c', program], cwd=root, capture_output=True, text=True, check=True)
    assert ran.stdout == 'False\n'
