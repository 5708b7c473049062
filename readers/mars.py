"""MARS: tracklets listed in name files and .mat tables."""

import codecs
import os
import re

import numpy as np

from batches.decoding import SUFFIXES
from files.kinds import HEAD, recognised, recognised_file
from readers.place import find
from readers.tree import Dataset, Tracklet, camids_of, usable
from runtime.errors import UserError, plain

FOLDERS = ('mars', 'MARS')
PARTS = {
    'bbox_train': '0001/0001C1T0001F001.jpg ...',
    'bbox_test': '0002/0002C1T0001F001.jpg ...',
    'info/train_name.txt': 'info/ comes from github.com/liangzheng06/MARS-evaluation',
    'info/test_name.txt': '',
    'info/tracks_train_info.mat': '',
    'info/tracks_test_info.mat': '',
    'info/query_IDX.mat': '',
}
TRAINING = ('bbox_train', 'info/train_name.txt', 'info/tracks_train_info.mat')  # needed for training only
PUBLISHED = {'train': (625, 8298), 'query': (626, 1980), 'gallery': (621, 9330)}  # under the original's protocol
NAME = re.compile(  # 0001C1T0001F001.jpg: pid, camera, tracklet, frame
    rf'(?:\d+|00-1)C\d+T\d+F\d+(?i:{"|".join(map(re.escape, SUFFIXES))})', re.ASCII
)
AGAIN = 'correct it, or download info/ again if it is the published one'
BOMS = {codecs.BOM_UTF8: 'utf-8-sig', codecs.BOM_UTF16_LE: 'utf-16', codecs.BOM_UTF16_BE: 'utf-16'}
LARGEST_EXACT = 2**53  # MATLAB represents integers exactly up to this
MOST_TRACKLETS = 20  # per frame, on average; 1 in MARS. A damaged table must not fill the memory


class Mars(Dataset):
    """MARS, tracklets of 1261 persons in 6 cameras (Zheng et al., MARS: A Video Benchmark, ECCV 2016).

    It is found in `data_dir` as mars or MARS, possibly nested once, or as `data_dir` itself. The name files and .mat
    tables in info/ define the frames, person and camera of each tracklet; items are (paths of the frames, pid, camid),
    in the order of the tables. Pids of query and gallery are as on disk. Camids are camera - 1, which is 0..5; if there
    are cameras other than 1..6, all cameras are numbered from 0 in ascending order.

    `official=False` is the original's protocol: queries are removed from the gallery, which leaves 140 of the 1980
    without a match. `official=True` is the data set's own protocol: queries stay in the gallery, and all 1980 are
    scored. Figures of the two protocols must not be compared.

    Junk tracklets (pid -1) are dropped, distractors (pid 0) stay in the gallery. The number of ids is the number of
    pids in the list: 621 in the gallery under the original's protocol, where the original printed 622 because it
    counted the pid of the junk tracklets that it dropped. The printed total counts every tracklet once under both
    protocols.

    `name` is mars or toy_mars. Raises UserError for a missing folder, a table of the wrong name, shape or type or with
    lines beyond the end of the name file, a name that cannot be parsed, a tracklet of two persons or two cameras, a
    negative camera, and an empty query or gallery. If only the training set has such a fault, is missing or empty, it
    is left empty, and `untrainable` is the message.
    """

    first_camera = 1

    def __init__(self, data_dir: str = 'data', official: bool = False, name: str = 'mars') -> None:
        self.official = official
        self.published = PUBLISHED if name == 'mars' else {}
        root, untrainable = find(data_dir, name, FOLDERS if name == 'mars' else (name,), PARTS, TRAINING)
        if not untrainable and not os.listdir(folder := os.path.join(root, 'bbox_train')):
            untrainable = f'{folder} is empty; unpack bbox_train.zip'
        train, untrainable = usable(lambda: _present(root, 'training', _read_tracklets(root, 'train')), untrainable)
        test = _read_tracklets(root, 'test')
        queries = _read_query_rows(os.path.join(root, 'info', 'query_IDX.mat'), len(test))
        others = set(range(len(test))).difference(queries)
        query = _present(root, 'query', [test[row] for row in queries])
        gallery = _present(root, 'gallery', [test[row] for row in range(len(test)) if official or row in others])
        camids, cameras = camids_of(train, query, gallery)
        subsets = ([(paths, pid, camids[camera]) for paths, pid, camera in items] for items in (train, query, gallery))
        once = train + query + [tracklet for row in sorted(others) if (tracklet := test[row])]
        super().__init__(
            f'{name}_official' if official else name,
            *subsets,
            title='MARS' if name == 'mars' else name,
            total=len(once),
            lengths=[len(paths) for paths, _, _ in once],
            untrainable=untrainable,
            cameras=cameras,
        )


def _present(root: str, subset: str, tracklets: list[Tracklet | None]) -> list[Tracklet]:
    """The tracklets without junk; UserError if there are none."""
    persons = [tracklet for tracklet in tracklets if tracklet]
    if not persons:
        raise UserError(f'{root}/info: the {subset} set has no tracklet of a person; {AGAIN}')
    return persons


def _read_tracklets(root: str, subset: str) -> list[Tracklet | None]:
    """(paths, pid, camera) for each row of the table of `subset`, train or test; None for junk."""
    names_path = os.path.join(root, 'info', f'{subset}_name.txt')
    table_path = os.path.join(root, 'info', f'tracks_{subset}_info.mat')
    names, table = _read_names(names_path), _read_table(table_path, f'track_{subset}_info')
    _check_table(table, table_path, len(names), names_path)
    tracklets: list[Tracklet | None] = []
    for row, (first, last, pid, camera) in enumerate(table.tolist(), start=1):
        if pid == -1:
            tracklets.append(None)
            continue
        frames = names[first - 1 : last]
        _check_frames(frames, f'{table_path}: track {row}, lines {first} to {last} of {names_path},', names_path)
        folder = os.path.join(root, f'bbox_{subset}', frames[0].partition('C')[0], '')
        tracklets.append((tuple([folder + name for name in frames]), pid, camera))
    return tracklets


def _check_table(table: np.ndarray, path: str, num_names: int, names_path: str) -> None:
    """Check that each row is the track of a person (first and last line of the name file, pid, camera), or junk."""
    if table.ndim != 2 or table.shape[1] != 4:
        raise UserError(f'{path} is a table of shape {table.shape}, but must have 4 columns; {AGAIN}')
    first, last, pids, cameras = table.T
    faults = {
        'has person {2}, but persons are numbered from 0, and -1 is junk': pids < -1,
        'has camera {3}, but cameras are numbered from 0': cameras < 0,
        f'has lines {{0}} to {{1}} of {names_path}, which has {num_names}': (first < 1) | (last < first)
        | (last > num_names),
    }  # fmt: skip
    for fault, rows in faults.items():
        for row in np.flatnonzero(rows & (pids != -1))[:1]:
            raise UserError(f'{path}: track {row + 1} {fault.format(*table[row])}; {AGAIN}')
    num_frames = int((last - first + 1)[pids != -1].sum())
    if num_frames > MOST_TRACKLETS * num_names:
        raise UserError(f'{path}: its tracks have {num_frames} frames, but {names_path} has {num_names}; {AGAIN}')


def _check_frames(frames: list[str], track: str, names_path: str) -> None:
    """Check that the frames of a track have valid names, and that these contain one person and one camera."""
    if not all(map(NAME.fullmatch, frames)):
        name = next(name for name in frames if not NAME.fullmatch(name))
        raise UserError(
            f"{names_path}: the name '{plain(name, 100)}' cannot be parsed; it must look like 0001C1T0001F001.jpg"
        )
    if len(begins := {name.partition('T')[0] for name in frames}) > 1:  # 0001C1: person and camera
        raise UserError(
            f'{track} mixes {plain(" and ".join(sorted(begins)[:2]))}, but a tracklet is one person in one camera; '
            f'{AGAIN}'
        )


def _read_names(path: str) -> list[str]:
    """The lines of a name file, in ASCII, or UTF-8 or UTF-16 with a byte-order mark."""
    try:
        with open(path, 'rb') as file:
            content = file.read()
        if what := recognised(content[:HEAD]):
            raise UserError(f'{path} {what}')
        encoding = next((encoding for bom, encoding in BOMS.items() if content.startswith(bom)), 'ascii')
        text = content.decode(encoding).encode('ascii').decode()
    except (OSError, UnicodeError) as error:
        reason = plain(str(error))
        raise UserError(f'{path} cannot be read as a list of file names ({reason}); {AGAIN}') from error
    return text.replace('\r\n', '\n').replace('\r', '\n').rstrip().split('\n')


def _read_query_rows(path: str, num_tracks: int) -> list[int]:
    """The rows of the test table, from 0, that are queries."""
    rows = _read_table(path, 'query_IDX').ravel() - 1  # on disk from 1
    for row in rows[(rows < 0) | (rows >= num_tracks)][:1]:
        raise UserError(f'{path} refers to track {row + 1}, but tracks are 1 to {num_tracks}; {AGAIN}')
    tracks, counts = np.unique(rows, return_counts=True)
    for row in tracks[counts > 1][:1]:
        raise UserError(f'{path} names track {row + 1} more than once; {AGAIN}')
    queries: list[int] = rows.tolist()
    return queries


def _read_table(path: str, key: str) -> np.ndarray:
    """The integers under `key` of a .mat file, as int64 (the file's type may be uint16, in which 0 - 1 wraps)."""
    from scipy.io import loadmat  # slow to import, and only MARS needs it

    try:
        table = loadmat(path, variable_names=[key], appendmat=False).get(key)
    except Exception as error:  # of any type: scipy parses untrusted bytes
        if what := _recognised(path, key):
            raise UserError(f'{path} {what}') from None
        reason = plain(' '.join(str(error).split())) or type(error).__name__
        raise UserError(f'{path} cannot be read as a .mat file ({reason}); {AGAIN}') from error
    if table is None:
        raise UserError(f"{path} contains no table '{key}'; {AGAIN}")
    whole = isinstance(table, np.ndarray) and table.dtype.kind in 'iuf'
    if not whole or not (np.abs(table.astype(np.float64)) <= LARGEST_EXACT).all() or (table != np.trunc(table)).any():
        raise UserError(f"{path}: '{key}' is not a table of integers up to 2^53; {AGAIN}")
    numbers: np.ndarray = table.astype(np.int64)
    return numbers


def _recognised(path: str, key: str) -> str:
    """The kind of a file that scipy cannot read, and what to do; '' if it is not recognised."""
    advice = f"load it in MATLAB or Octave, and save('{os.path.basename(path)}', '{key}', '-v7')"
    new = rb'MATLAB 7\.3|\x89HDF', 'is a .mat file of version 7.3 (HDF5), which is not supported', advice
    octave = b'# Created by Octave|Octave-1-', "is in Octave's own format, which is not supported", advice
    return recognised_file(path, new, octave)
