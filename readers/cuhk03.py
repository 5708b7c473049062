"""CUHK03 under the new protocol: folders like those of Market1501, or the authors' .mat file with the new split."""

import os
import re
import tempfile
from functools import partial
from typing import Any

import numpy as np
from PIL import Image as Picture

from readers.market1501 import PARTS, TRAINING, Market
from readers.place import find
from readers.tree import Dataset, Image
from runtime.errors import UserError, plain

PUBLISHED = {
    'detected': {'train': (767, 7365), 'query': (700, 1400), 'gallery': (700, 5332)},
    'labeled': {'train': (767, 7368), 'query': (700, 1400), 'gallery': (700, 5328)},
}
FOLDERS = ('cuhk03-np', 'cuhk03')  # of the published form
LARGEST_IMAGE = 2**26  # bytes of an image, usually about 50 kB: a damaged file must not fill the memory
# Camera pair, person, camera within the pair, number: as save_img.m of Zhong et al. interprets a name
NAME = re.compile(r'([1-5])_(\d{3})_([12])_(\d{2})\.png', re.ASCII)


def read(boxes: str, data_dir: str = 'data') -> Dataset:
    """CUHK03, images of 1467 persons in 5 pairs of cameras, split as Zhong et al. do (CVPR 2017, arXiv:1701.08398).

    Li et al., DeepReID, CVPR 2014. Each person is seen by two cameras. 767 persons are for training; for each of the
    700 others one image from each camera is a query, and the rest is the gallery. Camids are 0 and 1.

    The first existing of these is read:

    - the published CUHK03-NP in `data_dir`/cuhk03-np or `data_dir`/cuhk03, in any spelling: folders `detected` and
      `labeled`, each with bounding_box_train, query and bounding_box_test as in Market1501;
    - `data_dir`/cuhk03: the authors' cuhk03_release/cuhk-03.mat, and cuhk03_new_protocol_config_detected.mat and
      ..._labeled.mat of Zhong et al. The images are extracted once from the former, to images_detected or
      images_labeled, which needs the package h5py. torchreid extracts images to the same folders and names.

    Sources: the split, its numbers of persons and images, the folders of CUHK03-NP and the .mat files of the split,
    github.com/zhunzhong07/person-re-ranking (its CUHK03-NP/README.md, and save_img.m for the meaning of the names in
    the split); the layout of cuhk-03.mat, its readme and torchreid.

    boxes: 'detected' by a detector, or 'labeled' by hand

    Raises UserError if neither exists, or if a file of the second form is missing, damaged or inconsistent.
    """
    name, parts = f'cuhk03_{boxes}', {os.path.join(boxes, part): hint for part, hint in PARTS.items()}
    raw = _raw_folder(data_dir, boxes)
    try:
        root, untrainable = find(data_dir, name, FOLDERS, parts, [os.path.join(boxes, part) for part in TRAINING])
    except UserError:
        if raw:
            return Raw(raw, boxes)
        if os.path.isdir(os.path.join(data_dir, 'cuhk03', 'cuhk03_release')):
            raise UserError(
                f'there is no {_split_of(os.path.join(data_dir, "cuhk03"), boxes)}, the split of cuhk03_release; get '
                'it from github.com/zhunzhong07/person-re-ranking'
            ) from None
        raise
    return Published(os.path.join(root, boxes), boxes, untrainable)


detected, labeled = partial(read, 'detected'), partial(read, 'labeled')


class Published(Market):
    """CUHK03-NP."""

    def __init__(self, root: str, boxes: str, untrainable: str = '') -> None:
        self.published = PUBLISHED[boxes]
        super().__init__(root, f'cuhk03_{boxes}', title=f'CUHK03, {boxes}', untrainable=untrainable, whole=True)

    def multi_query(self) -> list:
        return self.query


class Raw(Dataset):
    """The authors' .mat file, and the lists of the split."""

    first_camera = 1

    def __init__(self, root: str, boxes: str) -> None:
        self.published = PUBLISHED[boxes]
        path = _split_of(root, boxes)
        split = _read_split(path)
        folder = os.path.join(root, f'images_{boxes}')
        if os.path.isdir(folder) and not set(split['names']) <= set(os.listdir(folder)):
            raise UserError(f'{folder} is incomplete: remove it, and its images are extracted again')
        if not os.path.isdir(folder):
            _take_out(os.path.join(root, 'cuhk03_release', 'cuhk-03.mat'), boxes, split['names'], folder)
        items: list[Image] = [
            (os.path.join(folder, name), pid, int(name[6]) - 1)
            for name, pid in zip(split['names'], split['pids'], strict=True)
        ]
        subsets = ([items[row] for row in split[part]] for part in ('train_idx', 'query_idx', 'gallery_idx'))
        super().__init__(f'cuhk03_{boxes}', *subsets, title=f'CUHK03, {boxes}')


def _split_of(root: str, boxes: str) -> str:
    return os.path.join(root, f'cuhk03_new_protocol_config_{boxes}.mat')


def _raw_folder(data_dir: str, boxes: str) -> str:
    """The folder of the second form; '' if it does not exist."""
    places = [os.path.join(data_dir, 'cuhk03'), data_dir]
    return next((place for place in places if os.path.isfile(_split_of(place, boxes))), '')


def _read_split(path: str) -> dict[str, Any]:
    """The names and pids of all images, and the rows, from 0, of each part."""
    from scipy.io import loadmat  # slow to import

    try:
        tables = loadmat(path, appendmat=False)
        names = [str(cell.item()) for cell in tables['filelist'].ravel()]
        pids = [int(pid) for pid in tables['labels'].ravel()]
        rows = {part: tables[part].ravel().astype(np.int64) - 1 for part in ('train_idx', 'query_idx', 'gallery_idx')}
        if len(names) != len(pids):
            raise ValueError(f'it has {len(names)} names and {len(pids)} persons')
        for name in names:
            if not NAME.fullmatch(name):
                raise ValueError(f'the name {name!r} is not like 1_001_1_01.png')
        for part, some in rows.items():
            if not len(some) or some.min() < 0 or some.max() >= len(names):
                raise ValueError(f'{part} does not fit its {len(names)} names')
    except Exception as error:  # of any type: scipy parses untrusted bytes
        reason = plain(' '.join(str(error).split())) or type(error).__name__
        raise UserError(f'{path} cannot be read as a split of CUHK03 ({reason}); get it again') from error
    return {'names': names, 'pids': pids, **{part: some.tolist() for part, some in rows.items()}}


def _take_out(path: str, boxes: str, names: list[str], folder: str) -> None:
    """Extract the named images of cuhk-03.mat to `folder`, which is either complete or absent.

    `boxes` is a cell of 5 camera pairs, each a cell of persons x 10 images; in HDF5 these are transposed references.
    """
    if not os.path.isfile(path):
        raise UserError(f'there is no {path} to take images from; unpack cuhk03_release.zip there')
    try:
        import h5py
    except ImportError:
        raise UserError(f'{path} is a file of HDF5, which needs a package: pip install h5py') from None
    print(f'Taking the images out of {path} into {folder}')
    with tempfile.TemporaryDirectory(prefix='.images-', dir=os.path.dirname(folder)) as temporary:
        whole = os.path.join(temporary, 'whole')
        os.mkdir(whole)
        try:
            with h5py.File(path, 'r') as file:
                pairs = [np.asarray(file[pair]) for pair in np.asarray(file[boxes]).ravel()]  # (10, persons) each
                for name in names:
                    cell = file[_cell(pairs, name)]  # (3, W, H), not read yet: one image at a time is in memory
                    if cell.ndim != 3 or cell.shape[0] != 3 or cell.dtype != np.uint8 or cell.size > LARGEST_IMAGE:
                        raise ValueError(f'{name} is not an image but {cell.dtype} of shape {cell.shape}')
                    Picture.fromarray(np.ascontiguousarray(np.asarray(cell).T)).save(os.path.join(whole, name))
        except Exception as error:  # of any type: h5py parses untrusted bytes
            reason = plain(f'{type(error).__name__}: {error}')
            raise UserError(
                f'the images of {path} cannot be written to {folder} ({reason}); free some space there, or get '
                'the file again'
            ) from error
        try:
            os.rename(whole, folder)
        except OSError:
            if not os.path.isdir(folder):  # otherwise another process was first, with the same images
                raise


def _cell(pairs: list[np.ndarray], name: str) -> Any:
    """The reference to an image."""
    match = NAME.fullmatch(name)
    assert match is not None  # as _read_split checked
    pair, person, _, number = map(int, match.groups())
    return pairs[pair - 1][number - 1, person - 1]
