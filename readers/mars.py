"""MARS: tracklets listed in name files and .mat tables."""

import os
import re

import numpy as np

from readers.tree import Dataset, Tracklet, find
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
PUBLISHED = {'train': (625, 8298), 'query': (626, 1980), 'gallery': (621, 9330)}  # under the original's protocol
NUM_CAMERAS = 6  # 1..6 on disk, camid 0..5 here
NAME = re.compile(r'(\d{4}|00-1)C\dT\d+F\d+\.jpg', re.ASCII)  # 0001C1T0001F001.jpg: pid, camera, tracklet, frame
MOST_TRACKLETS = 20  # per frame, on average: 1 in MARS; a damaged table must not fill the memory


class Mars(Dataset):
    """MARS, tracklets of 1261 persons in 6 cameras (Zheng et al., MARS: A Video Benchmark, ECCV 2016).

    Found in `data_dir` as mars or MARS, also nested once. The name files and .mat tables in info/ define the frames,
    person and camera of each tracklet; items are (paths of the frames, pid, camid), in the order of the tables. Pids of
    query and gallery are as on disk; camids are 0..5.

    `official=False` is the original's protocol: queries are removed from the gallery, which leaves 140 of the 1980
    without a match. `official=True` is the data set's own protocol: queries stay in the gallery, and all 1980 are
    scored. Figures of the two protocols must not be compared.

    Junk tracklets (pid -1) are dropped, distractors (pid 0) stay in the gallery. The number of ids is the number of
    pids in the list: 621 in the gallery under the original's protocol, where the original printed 622 because it
    counted junk although it dropped the junk tracklets. The printed total counts every tracklet once under both
    protocols.

    `name` is mars or toy_mars. Raises UserError for a missing folder, a table with another name, shape or type or with
    lines beyond the end of the name file, a name that cannot be parsed, a tracklet of two persons or two cameras, a
    camera outside 1..6, an empty subset, and a training set with a single person.
    """

    def __init__(self, data_dir: str = 'data', official: bool = False, name: str = 'mars') -> None:
        self.official = official
        self.published = PUBLISHED if name == 'mars' else {}
        root = find(data_dir, name, FOLDERS if name == 'mars' else (name,), PARTS)
        train = [tracklet for tracklet in _read_tracklets(root, 'train') if tracklet]
        test = _read_tracklets(root, 'test')
        queries = _read_query_rows(os.path.join(root, 'info', 'query_IDX.mat'), len(test))
        others = set(range(len(test))).difference(queries)
        query = [tracklet for row in queries if (tracklet := test[row])]
        gallery = [tracklet for row, tracklet in enumerate(test) if tracklet and (official or row in others)]
        for subset, tracklets in ('training', train), ('query', query), ('gallery', gallery):
            if not tracklets:
                raise UserError(f'{root}/info: the {subset} set has no tracklet of a person; download info/ again')
        once = train + query + [tracklet for row in sorted(others) if (tracklet := test[row])]
        super().__init__(
            f'{name}_official' if official else name,
            train,
            query,
            gallery,
            title='MARS' if name == 'mars' else name,
            total=len(once),
            lengths=[len(paths) for paths, _, _ in once],
        )


def _read_tracklets(root: str, subset: str) -> list[Tracklet | None]:
    """One tracklet for each row of the table of `subset`, train or test; None for junk."""
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
        folder = os.path.join(root, f'bbox_{subset}', frames[0][:4], '')
        tracklets.append((tuple([folder + name for name in frames]), pid, camera - 1))
    return tracklets


def _check_table(table: np.ndarray, path: str, num_names: int, names_path: str) -> None:
    """Check that the rows are tracks of persons (first and last line of the name file, pid, camera), or junk."""
    if table.ndim != 2 or table.shape[1] != 4:
        raise UserError(f'{path} is a table of shape {table.shape}, but must have 4 columns; download info/ again')
    first, last, pids, cameras = table.T
    faults = {
        'has person {2}': pids < -1,
        f'has camera {{3}}, but cameras are 1 to {NUM_CAMERAS}': (cameras < 1) | (cameras > NUM_CAMERAS),
        f'has lines {{0}} to {{1}} of {names_path}, which has {num_names}': (first < 1) | (last < first)
        | (last > num_names),
    }  # fmt: skip
    for fault, rows in faults.items():
        for row in np.flatnonzero(rows & (pids != -1))[:1]:
            raise UserError(f'{path}: track {row + 1} {fault.format(*table[row])}; download info/ again')
    num_frames = int((last - first + 1)[pids != -1].sum())
    if num_frames > MOST_TRACKLETS * num_names:
        raise UserError(
            f'{path}: its tracks have {num_frames} frames, but {names_path} has {num_names}; download info/ again'
        )


def _check_frames(frames: list[str], track: str, names_path: str) -> None:
    """Check that the frames of a track have valid names and show one person in one camera."""
    if not all(map(NAME.fullmatch, frames)):
        name = next(name for name in frames if not NAME.fullmatch(name))
        raise UserError(
            f"{names_path}: the name '{plain(name, 100)}' cannot be parsed; it must look like 0001C1T0001F001.jpg"
        )
    if len(begins := {name[:6] for name in frames}) > 1:  # 0001C1: person and camera
        raise UserError(
            f'{track} mixes {" and ".join(sorted(begins)[:2])}, but a tracklet is one person in one camera; '
            'download info/ again'
        )


def _read_names(path: str) -> list[str]:
    """The lines of a name file."""
    try:
        with open(path, encoding='ascii') as file:
            return file.read().rstrip().split('\n')
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f'{path} cannot be read as a list of file names ({error}); download info/ again') from error


def _read_query_rows(path: str, num_tracks: int) -> list[int]:
    """The rows of the test table, from 0, that are queries."""
    rows = _read_table(path, 'query_IDX').ravel() - 1  # on disk from 1
    for row in rows[(rows < 0) | (rows >= num_tracks)][:1]:
        raise UserError(f'{path} refers to track {row + 1}, but tracks are 1 to {num_tracks}; download info/ again')
    tracks, counts = np.unique(rows, return_counts=True)
    for row in tracks[counts > 1][:1]:
        raise UserError(f'{path} names track {row + 1} more than once; download info/ again')
    queries: list[int] = rows.tolist()
    return queries


def _read_table(path: str, key: str) -> np.ndarray:
    """The integers under `key` of a .mat file, as int64 (the file's type may be uint16, in which 0 - 1 wraps)."""
    from scipy.io import loadmat  # slow to import, and only MARS needs it

    try:
        table = loadmat(path, variable_names=[key], appendmat=False).get(key)
    except Exception as error:  # of any type: scipy parses untrusted bytes
        reason = plain(' '.join(str(error).split())) or type(error).__name__
        raise UserError(f'{path} cannot be read as a .mat file ({reason}); download info/ again') from error
    if table is None:
        raise UserError(f"{path} contains no table '{key}'; download info/ again")
    whole = isinstance(table, np.ndarray) and table.dtype.kind in 'iuf'
    if not whole or not (np.abs(table.astype(np.float64)) < 2**31).all() or (table != np.trunc(table)).any():
        raise UserError(f"{path}: '{key}' is not a table of integers; download info/ again")
    numbers: np.ndarray = table.astype(np.int64)
    return numbers
