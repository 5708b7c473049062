"""Readers of further published data sets, on toys in their formats."""

import os
import re
import shutil
import weakref
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

import data_manager
import toy
from readers import cuhk03, msmt17
from readers.tree import count_pids
from runtime.errors import UserError

SMALL = {'height': 24, 'width': 12}


# ---- MSMT17 ----


@pytest.mark.parametrize(('version', 'place'), [
    (1, 'msmt17/MSMT17_V1'), (2, 'msmt17/MSMT17_V2'), (1, 'MSMT17_V1'), (2, 'MSMT17_V2/MSMT17_V2'),
    (2, ''), (1, 'msmt17'),
])  # fmt: skip
def test_msmt17(version, place, tmp_path, capsys):
    toy.draw_msmt17(tmp_path / 'data' / place / '.' if place else tmp_path / 'data', version=version, **SMALL)
    dataset = data_manager.init_dataset('msmt17', str(tmp_path / 'data'))
    assert (dataset.num_train_pids, len(dataset.train)) == (6, 30)
    assert (len(dataset.query), len(dataset.gallery), dataset.num_query_pids) == (12, 12, 4)
    assert all(os.path.isfile(path) for path, _, _ in dataset.train + dataset.query + dataset.gallery + dataset.val)
    assert dataset.train_pids == [1, 2, 3, 4, 5, 6]
    assert {pid for _, pid, _ in dataset.query} == {1042, 1043, 1044, 1045}  # others than those of the training set
    for path, _, camid in dataset.query:
        assert int(Path(path).name.split('_')[2]) == camid + 1
    printed = capsys.readouterr().out
    assert f'=> MSMT17_V{version} loaded' in printed
    assert 'list_val.txt, 6 images of 6 persons, is left out\n' in printed
    assert 'train and val: 6 ids, 36 items instead of 1041 and 32621; ' in printed
    assert 'query and gallery: 4 ids, 24 items instead of 3060 and 93820\n' in printed


def test_msmt17_of_the_papers_size(tmp_path, capsys):
    """Only lists are read: no image is looked up."""
    rng = np.random.default_rng(0)
    root = tmp_path / 'MSMT17_V1'
    for part in 'train', 'test':
        (root / part).mkdir(parents=True)
    for part, number, persons in (
        ('train', 32000, 1041),
        ('val', 621, 621),
        ('query', 11659, 3060),
        ('gallery', 82161, 3060),
    ):
        labels = np.arange(number) % persons
        cameras = rng.integers(1, 16, number)
        lines = (f'{label:04d}/{label:04d}_{row:03d}_{camera:02d}_0303morning_0015_0.jpg {label}\r\n'
                 for row, (label, camera) in enumerate(zip(labels, cameras, strict=True)))  # fmt: skip
        (root / f'list_{part}.txt').write_text(''.join(lines), newline='')
    dataset = data_manager.init_dataset('msmt17', str(tmp_path))
    assert count_pids(dataset.query + dataset.gallery) == 3060 and {camid for _, _, camid in dataset.train} == {
        *range(15)
    }
    assert 'differs' not in capsys.readouterr().out


@pytest.mark.parametrize('line', [
    '0000/0000_000_01_a.jpg', '/etc/0000_000_01_a.jpg 0', '../0000/0000_000_01_a.jpg 0', '0000/0000_000_x_a.jpg 0',
    '0000/0000_000_01_a.jpg -1', '0000/0000_000_01_a.jpg 1041', '0000/0000_\0_01_a.jpg 0',
    f'0000/0000_000_{"9" * 5000}_a.jpg 0', f'0000/0000_000_01_a.jpg {"0" * 5000}',
])  # fmt: skip
def test_lines_of_a_list_that_are_refused(line, tmp_path):
    toy.draw_msmt17(tmp_path / 'msmt17', num_train=2, num_test=1, **SMALL)
    path = tmp_path / 'msmt17' / 'list_train.txt'
    path.write_text(f'{path.read_text()}{line}\n')
    with pytest.raises(UserError) as error:
        data_manager.init_dataset('msmt17', str(tmp_path))
    number = len(path.read_text().splitlines())
    assert str(error.value).startswith(f'{path}, line {number}: {line!r:.150}')
    assert ' cannot be parsed; it must be a path and a person, from 0 to 1040, as in 0000/' in str(error.value)


def test_msmt17_that_is_not_whole(tmp_path):
    with pytest.raises(UserError, match=r'no msmt17 or MSMT17_V1 or MSMT17_V2 in --data-dir'):
        data_manager.init_dataset('msmt17', str(tmp_path))
    toy.draw_msmt17(tmp_path / 'msmt17', version=2, num_train=2, num_test=2, **SMALL)
    (tmp_path / 'msmt17' / 'list_train.txt').unlink()
    assert 'contains no list_train.txt' in data_manager.init_dataset('msmt17', str(tmp_path), train=False).untrainable
    (tmp_path / 'msmt17' / 'list_query.txt').write_bytes(b'\x1f\x8b')
    with pytest.raises(UserError, match=r'list_query.txt is compressed with gzip'):
        data_manager.init_dataset('msmt17', str(tmp_path), train=False)


def test_a_complete_version_of_msmt17_is_preferred(tmp_path, capsys):
    for version in (1, 2):
        toy.draw_msmt17(tmp_path / f'MSMT17_V{version}', version=version, num_train=2, num_test=2, **SMALL)
    shutil.rmtree(tmp_path / 'MSMT17_V1' / 'train')
    assert not data_manager.init_dataset('msmt17', str(tmp_path)).untrainable
    assert '=> MSMT17_V2 loaded' in capsys.readouterr().out
    shutil.rmtree(tmp_path / 'MSMT17_V2' / 'mask_train_v2')
    assert 'MSMT17_V1 contains no train;' in data_manager.init_dataset('msmt17', str(tmp_path), train=False).untrainable


def test_the_papers_numbers_of_msmt17_add_up():
    """4101 persons, 126441 boxes: Wei et al., CVPR 2018."""
    assert tuple(map(sum, zip(*msmt17.PUBLISHED.values(), strict=True))) == (4101, 126441)


# ---- Market1501 with 500k distractors ----


def test_distractors_join_the_gallery(tmp_path, capsys):
    root = tmp_path / 'market1501'
    toy.draw_market1501(root, num_train=3, num_test=2, num_distractors=1, num_images=4, **SMALL)
    with pytest.raises(UserError, match=r'contains no images; expected:'):
        data_manager.init_dataset('market1501_500k', str(tmp_path))
    (root / 'images').mkdir()
    some = next((root / 'query').iterdir())
    for name in ('0000_c1s1_000001_00.jpg', '0000_c6s1_000002_00.jpg', '-1_c1s1_000003_00.jpg', 'Thumbs.db'):
        shutil.copy(some, root / 'images' / name)
    usual = data_manager.init_dataset('market1501', str(tmp_path))
    capsys.readouterr()
    dataset = data_manager.init_dataset('market1501_500k', str(tmp_path))
    assert (dataset.train, dataset.query) == (usual.train, usual.query)
    assert dataset.gallery[: len(usual.gallery)] == usual.gallery
    more = dataset.gallery[len(usual.gallery) :]
    assert [(os.path.basename(path), pid, camid) for path, pid, camid in more] == [
        ('0000_c1s1_000001_00.jpg', 0, 0), ('0000_c6s1_000002_00.jpg', 0, 5)
    ]  # fmt: skip
    printed = capsys.readouterr().out
    assert (
        '=> Market1501 + 500k loaded' in printed
        and 'instead of 750 and 3368\n' in printed
        and 'gallery:' not in printed
    )
    assert len(dataset.multi_query()) > len(dataset.query)


# ---- CUHK03 ----


@pytest.mark.parametrize('place', ['cuhk03-np', 'CUHK03-NP', 'cuhk03_np', 'cuhk03'])
def test_cuhk03_np(place, tmp_path, capsys):
    toy.draw_cuhk03(tmp_path / place, **SMALL)
    for boxes, number in (('detected', 7365), ('labeled', 7368)):
        dataset = data_manager.init_dataset(f'cuhk03_{boxes}', str(tmp_path))
        assert (len(dataset.train), len(dataset.query), len(dataset.gallery)) == (36, 8, 16)
        assert {camid for _, _, camid in dataset.train} == {0, 1}
        assert f'/{boxes}/query/' in dataset.query[0][0] and dataset.multi_query() == dataset.query
        printed = capsys.readouterr().out
        assert f'=> CUHK03, {boxes} loaded' in printed and f'6 ids, 36 items instead of 767 and {number}; ' in printed


def put_raw(folder, h5py, boxes='detected'):
    """The authors' .mat file of two pairs of cameras, and a split: 3 + 2 persons, up to 10 images each."""
    rng = np.random.default_rng(0)
    (folder / 'cuhk03_release').mkdir(parents=True)
    names, pids, images = [], [], {}
    with h5py.File(folder / 'cuhk03_release' / 'cuhk-03.mat', 'w') as file:
        pairs = []
        for pair, persons in enumerate((3, 2), start=1):
            cells = np.zeros((10, persons), dtype=h5py.ref_dtype)
            for person in range(persons):
                for number in range(10):
                    pixels = rng.integers(0, 255, (3, 8, 16), dtype=np.uint8)  # (3, W, H), as MATLAB stores (H, W, 3)
                    held = (person + number) % 5 > 0  # an empty cell otherwise
                    cell = file.create_dataset(f'#refs#/{pair}_{person}_{number}', data=pixels if held else np.zeros(2))
                    cells[number, person] = cell.ref
                    if held:
                        names.append(f'{pair}_{person + 1:03d}_{1 + number // 5}_{number + 1:02d}.png')
                        pids.append(3 * (pair - 1) + person + 1)
                        images[names[-1]] = pixels.T
            pairs.append(file.create_dataset(f'#refs#/pair{pair}', data=cells, dtype=h5py.ref_dtype).ref)
        file.create_dataset(boxes, data=np.array([pairs], dtype=h5py.ref_dtype), dtype=h5py.ref_dtype)
    put_split(folder, names, pids, boxes)
    return images


def put_split(folder, names, pids, boxes='detected', **changes):
    rows = np.arange(len(names))
    test, first = np.array(pids) > 3, np.array([name[8:10] in ('02', '07') for name in names])
    parts = {'train_idx': rows[~test], 'query_idx': rows[test & first], 'gallery_idx': rows[test & ~first]}
    tables = {part: (some + 1).astype(np.uint16)[:, None] for part, some in parts.items()}
    tables |= {'labels': np.array(pids, np.uint16)[:, None], 'filelist': np.array(names, dtype=object)[:, None]}
    folder.mkdir(exist_ok=True)
    savemat(folder / f'cuhk03_new_protocol_config_{boxes}.mat', tables | changes)


def test_cuhk03_from_the_authors_file(tmp_path, capsys):
    h5py = pytest.importorskip('h5py')
    images = put_raw(tmp_path / 'cuhk03', h5py)
    dataset = data_manager.init_dataset('cuhk03_detected', str(tmp_path))
    everything = [(path, dataset.train_pids[label], camid) for path, label, camid in dataset.train]
    everything += dataset.query + dataset.gallery
    assert sorted(os.path.basename(path) for path, _, _ in everything) == sorted(images)
    for path, pid, camid in everything:
        name = os.path.basename(path)
        np.testing.assert_array_equal(np.asarray(Image.open(path)), images[name])
        assert camid == int(name[6]) - 1 and pid == 3 * (int(name[0]) - 1) + int(name[2:5])
    assert (dataset.train_pids, {pid for _, pid, _ in dataset.query}) == ([1, 2, 3], {4, 5})
    assert 'Taking the images out of' in capsys.readouterr().out
    (tmp_path / 'cuhk03' / 'cuhk03_release' / 'cuhk-03.mat').unlink()  # once is enough
    again = data_manager.init_dataset('cuhk03_detected', str(tmp_path / 'cuhk03'))
    assert len(again.train) == len(dataset.train) and 'Taking' not in capsys.readouterr().out
    image = Path(again.train[0][0])
    content = image.read_bytes()
    image.unlink()
    with pytest.raises(
        UserError, match=r'images_detected is incomplete: remove it, and its images are extracted again'
    ):
        data_manager.init_dataset('cuhk03_detected', str(tmp_path))
    image.write_bytes(content)
    assert sorted(entry.name for entry in (tmp_path / 'cuhk03').iterdir()) == [
        'cuhk03_new_protocol_config_detected.mat', 'cuhk03_release', 'images_detected'
    ]  # fmt: skip


def test_one_image_of_the_authors_file_is_in_memory_at_a_time(tmp_path, monkeypatch):
    """The file has 2 GB; and a cell that claims more than an image can have is not read at all."""
    h5py = pytest.importorskip('h5py')
    images = put_raw(tmp_path / 'cuhk03', h5py)
    alive, most, written = weakref.WeakSet(), [], cuhk03.Picture.fromarray

    class Pixels(np.ndarray):  # unlike a plain array, it can be in a set
        __hash__ = object.__hash__

    def fromarray(pixels):
        alive.add(pixels := pixels.view(Pixels))
        most.append(len(alive))
        return written(pixels)

    monkeypatch.setattr(cuhk03.Picture, 'fromarray', fromarray)
    data_manager.init_dataset('cuhk03_detected', str(tmp_path))
    assert len(most) == len(images) and max(most) <= 2  # the next one, while the last one is still named

    shutil.rmtree(tmp_path / 'cuhk03' / 'images_detected')
    with h5py.File(tmp_path / 'cuhk03' / 'cuhk03_release' / 'cuhk-03.mat', 'r+') as file:
        del file['#refs#/1_0_1']
        cell = file.create_dataset('#refs#/1_0_1', (3, 2**20, 2**20), np.uint8, chunks=(1, 2**10, 2**10))
        pair = file[np.asarray(file['detected']).ravel()[0]]
        cells = pair[:]
        cells[1, 0] = cell.ref
        pair[:] = cells
    with pytest.raises(UserError, match=r'1_001_1_02.png is not an image but uint8 of shape \(3, 1048576, 1048576\)'):
        data_manager.init_dataset('cuhk03_detected', str(tmp_path))


def test_a_file_that_is_not_cuhk03s(tmp_path):
    h5py = pytest.importorskip('h5py')
    root = tmp_path / 'cuhk03'
    put_raw(root, h5py)
    path = root / 'cuhk03_release' / 'cuhk-03.mat'
    whole = path.read_bytes()
    for content in (b'', b'no HDF5', whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(
            UserError, match=r'the images of .*cuhk-03.mat cannot be written to .*images_detected .*get the file'
        ):
            data_manager.init_dataset('cuhk03_detected', str(tmp_path))
    path.write_bytes(whole)
    names, pids = ['1_001_1_01.png', '5_001_2_07.png', '5_001_2_08.png'], [1, 4, 4]
    put_split(root, names, pids)  # the first cell is empty, and there is no fifth pair
    with pytest.raises(UserError, match=r'ValueError: 1_001_1_01.png is not an image but float64 of shape \(2,\)'):
        data_manager.init_dataset('cuhk03_detected', str(tmp_path))
    assert not (root / 'images_detected').exists()
    path.unlink()
    with pytest.raises(
        UserError, match=r'there is no .*cuhk-03.mat to take images from; unpack cuhk03_release.zip there'
    ):
        data_manager.init_dataset('cuhk03_detected', str(tmp_path))


def test_a_split_that_is_damaged(tmp_path):
    names, pids = ['1_001_1_01.png', '1_002_2_02.png', '2_001_2_07.png'], [1, 2, 4]
    for changes, fault in (
        ({'filelist': np.array(['../x.png'] * 3, dtype=object)}, "the name '../x.png' is not like 1_001_1_01.png"),
        ({'labels': np.array([1])}, 'it has 3 names and 1 persons'),
        ({'train_idx': np.array([9])}, 'train_idx does not fit its 3 names'),
        ({'train_idx': np.array([0])}, 'train_idx does not fit its 3 names'),
    ):
        put_split(tmp_path / 'cuhk03', names, pids, **changes)
        with pytest.raises(UserError, match=re.escape(f'cannot be read as a split of CUHK03 ({fault}); get it again')):
            data_manager.init_dataset('cuhk03_detected', str(tmp_path))


def test_no_cuhk03_at_all(tmp_path):
    with pytest.raises(UserError, match=r'no cuhk03-np or cuhk03 in --data-dir'):
        data_manager.init_dataset('cuhk03_labeled', str(tmp_path))
    (tmp_path / 'cuhk03' / 'cuhk03_release').mkdir(parents=True)
    with pytest.raises(
        UserError, match=r'no \S+/cuhk03_new_protocol_config_labeled.mat, the split of cuhk03_release; get it'
    ):
        data_manager.init_dataset('cuhk03_labeled', str(tmp_path))


def test_without_h5py_the_package_is_named(tmp_path, monkeypatch):
    put_split(tmp_path / 'cuhk03', ['1_001_1_01.png', '2_001_2_07.png', '2_001_2_08.png'], [1, 4, 4])
    (tmp_path / 'cuhk03' / 'cuhk03_release').mkdir()
    (tmp_path / 'cuhk03' / 'cuhk03_release' / 'cuhk-03.mat').touch()
    monkeypatch.setitem(__import__('sys').modules, 'h5py', None)
    with pytest.raises(UserError, match=r'is a file of HDF5, which needs a package: pip install h5py'):
        data_manager.init_dataset('cuhk03_detected', str(tmp_path))


def test_the_splits_numbers_of_cuhk03_add_up():
    """1467 persons: Zhong et al., CVPR 2017."""
    for counts in cuhk03.PUBLISHED.values():
        assert counts['train'][0] + counts['query'][0] == 1467
