"""Trees as people unzip them, tables of the real size, and every fault of a tree as one message."""

import os
import re
import shutil
import textwrap
import time

import numpy as np
import PIL.Image
import pytest
from conftest import ROOT
from scipy.io import loadmat, savemat

import data_manager
from batches import decoding
from readers import market1501, mars
from readers.market1501 import Market1501
from readers.mars import Mars
from runtime.errors import UserError

README = (ROOT / 'data' / 'README.md').read_text()
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
        (root / f'bbox_{subset}' / '0001').mkdir(parents=True)
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
        'It differs from the published Market1501: train: 2 ids, 3 items instead of 751 and 12936; '
        'query: 2 ids, 2 items instead of 750 and 3368; gallery: 2 ids, 2 items instead of 751 and 15913\n'
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
        'It differs from the published MARS: train: 2 ids, 3 items instead of 625 and 8298; '
        'query: 2 ids, 2 items instead of 626 and 1980; gallery: 2 ids, 3 items instead of 621 and 9330\n'
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


# ---- trees of one's own ----


def ids(dataset):
    return [[(pid, camid) for _, pid, camid in items] for items in (dataset.train, dataset.query, dataset.gallery)]


def last_lines(capsys):
    return capsys.readouterr().out.split('  ' + '-' * 30 + '\n')[-1].splitlines()


def test_any_cameras_and_long_pids_of_market1501(tmp_path, capsys):
    files = {
        'bounding_box_train': ['0000000007_c12s1_1.jpg', '2_c0.jpg', '2_c7.jpg'],
        'query': ['9223372036854775807_c007.jpg'],
        'bounding_box_test': ['-1_c99.jpg', '9223372036854775807_c100.jpg'],
    }
    put_market(tmp_path / 'market1501', files)
    dataset = Market1501(tmp_path)
    largest = 2**63 - 1
    assert ids(dataset) == [[(1, 2), (0, 0), (0, 1)], [(largest, 1)], [(largest, 3)]]
    assert np.array([pid for _, pid, _ in dataset.query]).dtype == np.int64
    (line,) = last_lines(capsys)
    assert line.endswith('; cameras 0, 7, 12, 100 instead of 1 to 6 (camids 0 to 3, in this order)')


def test_cameras_within_1_to_6_keep_their_camids(tmp_path, capsys):
    put_market(tmp_path / 'market1501', {**MARKET, 'query': ['0001_c4s1.jpg'], 'bounding_box_test': ['0001_c6s1.jpg']})
    assert ids(Market1501(tmp_path))[1:] == [[(1, 3)], [(1, 5)]]
    assert 'camera' not in capsys.readouterr().out


def test_all_formats_that_are_decoded_are_images(tmp_path):
    """And no others: their suffixes are those of Pillow, but for floating-point pixels."""
    PIL.Image.init()
    known = {suffix for suffix, kind in PIL.Image.registered_extensions().items() if kind in decoding.FORMATS}
    assert set(decoding.SUFFIXES) == known - {'.pfm'}
    names = [f'0001_c1s1_{number:06d}_00{suffix}' for number, suffix in enumerate(decoding.SUFFIXES)]
    put_market(tmp_path / 'market1501', {**MARKET, 'query': [*names, '0001_c1s1_9.JPG.Png']})
    assert len(Market1501(tmp_path).query) == len(names) + 1


def test_what_is_passed_over_is_counted(tmp_path, capsys):
    root = put_market(tmp_path / 'market1501')
    for name in ('Thumbs.db', '.DS_Store', 'desktop.ini'):
        (root / 'query' / name).touch()
    assert len(Market1501(tmp_path).passed_over) == 3
    assert 'Passed over' not in capsys.readouterr().out
    for name in ('a.txt', '0001_c1.jp2', '0001_c2.svg'):
        (root / 'query' / name).touch()
    (root / 'bounding_box_train' / '0002').mkdir()
    (root / 'bounding_box_test' / '\x1b[2J').touch()
    assert len(Market1501(tmp_path).passed_over) == 8
    assert last_lines(capsys)[0] == (
        r'Passed over: 4 files (bounding_box_test/\x1b[2J, query/0001_c1.jp2, query/0001_c2.svg ...) '
        'and 1 folder (bounding_box_train/0002)'
    )


def test_a_folder_for_each_person(tmp_path):
    put_market(tmp_path / 'market1501', {**MARKET, 'bounding_box_train': ()})
    for name in MARKET['bounding_box_train']:
        (tmp_path / 'market1501/bounding_box_train' / name[:4]).mkdir(exist_ok=True)
    with pytest.raises(UserError) as error:
        data_manager.init_dataset('market1501', tmp_path)
    assert 'but 2 folders (0002, 0007); move the images from its folders up into' in one_line(error)


def test_mars_of_other_names_and_cameras(tmp_path, capsys):
    root = put_info(tmp_path / 'mars')
    for subset in ('train', 'test'):
        path = root / 'info' / f'{subset}_name.txt'
        path.write_text(re.sub(r'(\d{4})C(\d)T(\d+)F(\d+).jpg', r'1\1C1\2T\3F1\4.PNG', path.read_text()))
        key = f'track_{subset}_info'
        table = loadmat(root / 'info' / f'tracks_{subset}_info.mat')[key].astype(float)
        table[table[:, 2] >= 0] += [0, 0, 2**40, 10]
        savemat(root / 'info' / f'tracks_{subset}_info.mat', {key: table})
    dataset = Mars(tmp_path)
    assert ids(dataset) == [
        [(0, 0), (0, 1), (1, 4)],
        [(2**40 + 2, 0), (2**40 + 4, 1)],
        [(2**40, 2), (2**40 + 2, 0), (2**40 + 2, 3)],
    ]
    assert dataset.train[1][0][0] == str(root / 'bbox_train' / '10001' / '10001C12T0002F1001.PNG')
    assert last_lines(capsys)[0].endswith(
        '; cameras 11, 12, 13, 14, 16 instead of 1 to 6 (camids 0 to 4, in this order)'
    )


@pytest.mark.parametrize('encoding', ['utf-8-sig', 'utf-16'])
def test_name_files_with_a_byte_order_mark(tmp_path, encoding):
    root = put_info(tmp_path / 'mars')
    expected = Mars(tmp_path).train
    path = root / 'info' / 'train_name.txt'
    path.write_text(path.read_text().replace('\n', '\r\n'), encoding=encoding)
    assert Mars(tmp_path).train == expected


@pytest.mark.parametrize(
    'content, what',
    [
        (b'MATLAB 7.3 MAT-file, Platform: GLNXA64'.ljust(124) + b'\x00\x02IM' + bytes(384) + b'\x89HDF\r\n\x1a\n',
         'is a .mat file of version 7.3 (HDF5)'),
        (b'\x89HDF\r\n\x1a\n' + bytes(200), 'is a .mat file of version 7.3 (HDF5)'),
        (b'# Created by Octave 8.4\n# name: query_IDX\n# type: matrix\n', "is in Octave's own format"),
    ],
)  # fmt: skip
def test_tables_that_scipy_cannot_read(tmp_path, content, what):
    root = put_info(tmp_path / 'mars')
    (root / 'info' / 'query_IDX.mat').write_bytes(content)
    with pytest.raises(UserError) as error:
        Mars(tmp_path)
    assert one_line(error).endswith(
        f"query_IDX.mat {what}, which is not supported; load it in MATLAB or Octave, and save('query_IDX.mat', "
        "'query_IDX', '-v7')"
    )


@pytest.mark.parametrize('place', ['Market1501', 'market-1501', 'MARKET-1501-V15.09.15', 'market1501/market_1501', ''])
def test_other_spellings_of_the_folder(tmp_path, place, capsys):
    """And --data-dir may be the data set itself."""
    put_market(tmp_path / 'data' / place)
    assert len(Market1501(tmp_path / 'data').train) == 3
    assert (f"--data-dir '{tmp_path}/data' is the data set itself\n" in capsys.readouterr().out) == (not place)


def test_mars_may_be_the_data_dir_itself(tmp_path):
    put_info(tmp_path / 'x')
    assert len(data_manager.init_dataset('mars_official', tmp_path / 'x').train) == 3


def test_a_data_set_below_the_data_dir_comes_first(tmp_path):
    put_market(tmp_path)
    put_market(tmp_path / 'market1501', {**MARKET, 'query': ['0009_c1.jpg']})
    assert [pid for _, pid, _ in Market1501(tmp_path).query] == [9]
    shutil.rmtree(tmp_path / 'market1501' / 'bounding_box_train')  # it can only be tested
    assert [pid for _, pid, _ in Market1501(tmp_path).query] == [1, 3]


def test_an_archive_is_to_be_unpacked(tmp_path):
    (tmp_path / 'Market-1501-v15.09.15.zip').touch()
    with pytest.raises(UserError, match=f'unpack {tmp_path}/Market-1501-v15.09.15.zip there$'):
        Market1501(tmp_path)


# ---- a test without a training set ----


def test_market1501_without_a_training_set(tmp_path, capsys):
    root = put_market(tmp_path / 'market1501')
    whole = Market1501(tmp_path)
    train = root / 'bounding_box_train'
    for number, (make, reason) in enumerate((
        (lambda: (train / MARKET['bounding_box_train'][2]).unlink(), 'the training set has only one person'),
        (lambda: (train / 'holiday.jpg').touch(), "the name 'holiday.jpg' cannot be parsed"),
        (lambda: (shutil.rmtree(train), train.mkdir()), 'contains no images of persons; it is empty'),
        (train.rmdir, 'market1501 contains no bounding_box_train'),
    )):  # fmt: skip
        make()
        capsys.readouterr()
        dataset = data_manager.init_dataset('market1501', tmp_path, train=False)
        *_, line = capsys.readouterr().out.splitlines()
        assert line.startswith('It can be tested, but not trained on: ') and reason in line and 'expected' not in line
        assert (dataset.query, dataset.gallery) == (whole.query, whole.gallery)
        assert len(dataset.train) == (0 if number else 2)
        with pytest.raises(UserError, match=re.escape(reason)):
            data_manager.init_dataset('market1501', tmp_path)


def test_mars_without_a_training_set(tmp_path, capsys):
    root = put_info(tmp_path / 'mars')
    whole = Mars(tmp_path)
    shutil.move(root / 'bbox_train', tmp_path / 'frames')
    (root / 'bbox_train').mkdir()
    assert Mars(tmp_path).untrainable == f'{root}/bbox_train is empty; unpack bbox_train.zip'
    assert Mars(tmp_path).train == []
    for part in ('bbox_train', 'info/tracks_train_info.mat', 'info/train_name.txt'):
        shutil.rmtree(root / part) if part == 'bbox_train' else (root / part).unlink()
        capsys.readouterr()
        dataset = data_manager.init_dataset('mars', tmp_path, train=False)
        printed = capsys.readouterr().out
        assert f'not trained on: {root} contains no bbox_train' in printed and part in printed
        assert (dataset.query, dataset.gallery) == (whole.query, whole.gallery)
        assert dataset.train == [] and '  train    |     0 |        0\n' in printed
        with pytest.raises(UserError, match=f'contains no (bbox_train, .*)?{part}[,;]'):
            data_manager.init_dataset('mars', tmp_path)
    (root / 'info' / 'query_IDX.mat').unlink()
    with pytest.raises(UserError, match=r'contains no bbox_train, .* no info/query_IDX\.mat; expected'):
        data_manager.init_dataset('mars', tmp_path, train=False)


@pytest.mark.parametrize(
    ('name', 'part'),
    [('market1501', part) for part in market1501.TRAINING] + [('mars', part) for part in mars.TRAINING],
)
def test_a_part_that_only_training_needs(name, part, data_dir, tmp_path):
    """Without it there is no training set, and query and gallery are as before."""
    root = tmp_path / 'data' / name
    shutil.copytree(data_dir / name, root)
    whole = data_manager.init_dataset(name, root.parent)
    (root / part).rename(tmp_path / 'elsewhere')
    with pytest.raises(UserError, match=f'{root} contains no {part}; expected'):
        data_manager.init_dataset(name, root.parent)
    dataset = data_manager.init_dataset(name, root.parent, train=False)
    assert (dataset.train, dataset.num_train_pids) == ([], 0) and whole.train
    assert (dataset.query, dataset.gallery) == (whole.query, whole.gallery)


# ---- the real sizes ----


def real_sized(rng, num_tracks, num_frames):
    """Lengths of tracklets from 2 to 920, `num_frames` together."""
    others = num_tracks - 2
    return [2, 920, *(2 + rng.multinomial(num_frames - 922 - 2 * others, np.full(others, 1 / others))).tolist()]


def timed(function, argument):
    """What it returns, and its CPU seconds in this process, which no other process adds to."""
    started = time.process_time()
    return function(argument), time.process_time() - started


def match(names):
    """A regular expression for each name: takes a time to compare with, on any machine."""
    for name in names:
        re.match(r'(-1|\d{4})', name)


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

    dataset, seconds = timed(Mars, tmp_path)
    printed = capsys.readouterr().out
    assert '  train    |   625 |     8298\n  query    |   626 |     1980\n  gallery  |   621 |     9330\n' in printed
    assert '  total    |  1251 |    19608\n' in printed
    assert '  number of images per tracklet: 2 ~ 920, average 59.5\n' in printed
    assert textwrap.indent(printed, '    ') in README
    assert sum(len(paths) for paths, _, _ in dataset.train) == 509914
    names = [name for file in ('train', 'test') for name in (info / f'{file}_name.txt').read_text().splitlines()]
    assert seconds < 8 * timed(match, names)[1]  # 1.3 times as many seen


def test_market1501_at_its_size(tmp_path, monkeypatch, capsys):
    """12936, 3368 and 19732 names, of which 3819 are junk."""
    train = [f'{row % 751 + 1:04d}_c{row % 6 + 1}s1_{row:06d}_01.jpg' for row in range(12936)]
    query = [f'{row % 750 + 1000:04d}_c{row % 6 + 1}s1_{row:06d}_00.jpg' for row in range(3368)]
    gallery = [f'-1_c{row % 6 + 1}s1_{row:06d}_01.jpg' for row in range(3819)]
    gallery += [f'{row % 751 and row % 751 + 999:04d}_c{row % 6 + 1}s1_{row:06d}_01.jpg' for row in range(15913)]
    names = dict(zip(MARKET, (train, query, gallery), strict=True))
    put_market(tmp_path / 'market1501', dict.fromkeys(MARKET, ()))
    listdir = os.listdir
    monkeypatch.setattr(os, 'listdir', lambda path: names.get(os.path.basename(path)) or listdir(path))

    _, seconds = timed(Market1501, tmp_path)
    printed = capsys.readouterr().out
    assert '  train    |   751 |    12936\n  query    |   750 |     3368\n  gallery  |   751 |    15913\n' in printed
    assert '  total    |  1501 |    32217\n' in printed
    assert textwrap.indent(printed, '    ') in README
    assert seconds < 40 * timed(match, train + query + gallery)[1]  # 4.4 times as many seen


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
    parts = market1501.PARTS if name == 'market1501' else mars.PARTS
    assert all(f'\n    {part}' in message for part in parts)
    assert message.endswith(f'see data/README.md for where to download it; -d toy_{name} draws a toy in this format')


def test_a_missing_part_is_named(tmp_path):
    root = put_market(tmp_path / 'Market-1501-v15.09.15')
    shutil.rmtree(root / 'query')
    with pytest.raises(UserError, match=r'Market-1501-v15\.09\.15 contains no query; expected:'):
        Market1501(tmp_path)
    root = put_info(tmp_path / 'mars' / 'MARS')
    (root / 'info' / 'query_IDX.mat').unlink()
    shutil.rmtree(root / 'bbox_test')
    with pytest.raises(UserError, match=r'mars/MARS contains no bbox_test, no info/query_IDX\.mat; expected:'):
        Mars(tmp_path)


@pytest.mark.parametrize(
    'part, names, fault',
    [
        ('bounding_box_train', [], 'contains no images of persons; it is empty: unzip the data'),
        ('query', ['Thumbs.db', '.hidden_c1.jpg'], 'query contains no images of persons'),
        ('bounding_box_test', ['-1_c1s1_000401_03.jpg'], 'bounding_box_test contains no images of persons'),
        ('query', ['holiday.jpg'], "query: the name 'holiday.jpg' cannot be parsed"),
        ('query', ['x0001_c1s1_001051_00.jpg'], 'cannot be parsed'),
        ('query', ['--1_c1s1_001051_00.jpg'], 'cannot be parsed'),
        ('query', ['-2_c1s1_001051_00.jpg'], "'-2_c1s1_001051_00.jpg' has person -2, but persons are numbered from 0 "),
        ('query', ['9223372036854775808_c1.jpg'], 'has person 9223372036854775808, but persons are numbered from 0 to '
         '9223372036854775807, and -1 is junk'),
        ('query', ['9' * 200 + '_c1.jpg'], 'has person 999999999999999999999999999999..., but'),
        ('query', ['a.txt', 'b.TXT', 'c.txt', 'd.jp2'], 'query contains no images of persons, but 4 files '
         '(a.txt, b.TXT, c.txt ...); images are .jpg, .jpeg,'),
        ('bounding_box_test', ['-1_c1s1_000401_03.jpg', 'a.txt'], 'but only junk (pid -1)'),
        ('bounding_box_train', MARKET['bounding_box_train'][:2], 'the training set has only one person'),
        ('query', ['a\n\x1b[2J\udcff.jpg'], r"query: the name 'a\n\x1b[2J\udcff.jpg' cannot be parsed"),
        ('query', ['-3_c7\n.jpg'], r"query: '-3_c7\n.jpg' has person -3"),
    ],
)  # fmt: skip
def test_faults_of_market1501(tmp_path, part, names, fault):
    put_market(tmp_path / 'market1501', {**MARKET, part: names})
    with pytest.raises(UserError) as error:
        data_manager.init_dataset('market1501', tmp_path)
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
        (changed(2, 1, 10), 'track 3 has lines 7 to 10 of'),
        (changed(0, 0, 0), 'track 1 has lines 0 to 4 of'),
        (changed(0, 0, -3), 'track 1 has lines -3 to 4 of'),
        (changed(1, 1, 4), 'track 2 has lines 5 to 4 of'),
        (changed(0, 1, 2**31 - 1), 'track 1 has lines 1 to 2147483647 of'),
        (changed(1, 1, 7), 'track 2, lines 5 to 7 of'),  # two persons
        (changed(0, 1, 5), 'mixes 0001C1 and 0001C2, but a tracklet is one person in one camera'),
        (changed(1, 3, -1), 'track 2 has camera -1, but cameras are numbered from 0'),
        (changed(1, 2, -2), 'track 2 has person -2, but persons are numbered from 0, and -1 is junk'),
        (changed(1, 2, 2**54, float), 'is not a table of integers up to 2^53'),
        (changed(2, 2, 1), 'the training set has only one person'),
        (changed(slice(None), 2, -1), 'the training set has no tracklet of a person'),
        (changed(0, 0, np.nan, float), 'is not a table of integers'),
        (changed(0, 0, 1.5, float), 'is not a table of integers'),
        (changed(0, 0, 1e300, float), 'is not a table of integers'),
        (GOOD + 0.5j, 'is not a table of integers'),
        (np.array([['a', 'b']], dtype=object), 'is not a table of integers'),
        (GOOD[:, :3], 'is a table of shape (3, 3), but must have 4 columns'),
        (np.zeros((0, 4)), 'the training set has no tracklet of a person'),
    ],
)
def test_faults_of_mars_tables(tmp_path, table, fault):
    put_info(tmp_path / 'mars', {'train': table})
    with pytest.raises(UserError) as error:
        data_manager.init_dataset('mars', tmp_path)
    assert fault in one_line(error)
    assert f'{tmp_path}/mars' in one_line(error)


def test_a_mars_table_that_would_fill_the_memory(tmp_path):
    """Ten thousand tracklets of all the frames that there are; each frame of MARS is in one."""
    lines = ''.join(f'0001C1T0001F{frame % 1000:03d}.jpg\n' for frame in range(10**5))
    table = np.array([[1, 10**5, 1, 1]] * 10**4)
    root = put_info(tmp_path / 'mars', {'train': table})
    (root / 'info' / 'train_name.txt').write_text(lines)
    with pytest.raises(UserError) as error:
        data_manager.init_dataset('mars', tmp_path)
    assert 'its tracks have 1000000000 frames, but' in one_line(error)


@pytest.mark.parametrize('dtype', [np.uint16, np.int64, float])
def test_mars_tables_of_any_whole_type(tmp_path, dtype):
    put_info(tmp_path / 'mars', {'train': GOOD.astype(dtype), 'queries': np.array([QUERIES], dtype)})
    dataset = Mars(tmp_path)
    assert len(dataset.train) == 3
    assert all(type(pid) is type(camid) is int for _, pid, camid in dataset.train + dataset.query)


@pytest.mark.parametrize(
    'queries, fault',
    [
        (np.array([[0, 3]], dtype=np.uint16), 'query_IDX.mat refers to track 0, but tracks are 1 to 6'),
        (np.array([[7]], dtype=np.uint16), 'query_IDX.mat refers to track 7, but tracks are 1 to 6'),
        (np.array([[2, 3, 2]], dtype=np.uint16), 'query_IDX.mat names track 2 more than once'),
        (np.array([[1]], dtype=np.uint16), 'the query set has no tracklet of a person'),
        (np.array([[2, 3, 4, 5, 6]], dtype=np.uint16), 'the gallery set has no tracklet of a person'),
    ],
)
def test_faults_of_mars_queries(tmp_path, queries, fault):
    put_info(tmp_path / 'mars', {'queries': queries})
    with pytest.raises(UserError) as error:
        data_manager.init_dataset('mars', tmp_path)
    assert fault in one_line(error)


@pytest.mark.parametrize(
    'file, content, fault',
    [
        ('train_name.txt', b'', 'track 1 has lines 1 to 4 of'),
        ('train_name.txt', b'\n' * 9 + b'0001C1T0001F001.jpg', "the name '' cannot be parsed"),
        ('train_name.txt', b'\x1b[2J\n' * 9, r"the name '\x1b[2J' cannot be parsed"),
        ('train_name.txt', b'\n'.join([b'x' * 10**6] * 9), "the name 'xxx"),
        ('train_name.txt', b'\xff\xfe' * 9, 'cannot be read as a list of file names'),
        ('tracks_train_info.mat', b'', 'cannot be read as a .mat file'),
        ('tracks_train_info.mat', b'no table' * 40, 'cannot be read as a .mat file'),
        ('tracks_test_info.mat', None, "tracks_test_info.mat contains no table 'track_test_info'"),
    ],
)
def test_faults_of_mars_files(tmp_path, file, content, fault):
    root = put_info(tmp_path / 'mars')
    if content is None:
        shutil.copy(root / 'info' / 'tracks_train_info.mat', root / 'info' / file)
    else:
        (root / 'info' / file).write_bytes(content)
    with pytest.raises(UserError) as error:
        data_manager.init_dataset('mars', tmp_path)
    assert fault in one_line(error)


@pytest.mark.parametrize(
    'name', ['Thumbs.db', '0001C1T0001F001.txt', '../../../C1T0001F001.jpg', '0001C1T0001F0001.jpg/x']
)
def test_a_mars_name_that_does_not_parse(tmp_path, name):
    root = put_info(tmp_path / 'mars')
    path = root / 'info' / 'train_name.txt'
    lines = path.read_text().splitlines()
    path.write_text('\n'.join([*lines[:2], name, *lines[3:]]))
    with pytest.raises(UserError) as error:
        data_manager.init_dataset('mars', tmp_path)
    assert f"{path}: the name '{name}' cannot be parsed; it must look like 0001C1T0001F001.jpg" in one_line(error)
