"""What a data set is on disk: Market1501, MARS and their toys -> train, query, gallery.

The scan reads file names and MARS's tables, nothing else: no image is opened or looked up on disk. That is what the
command does: `python data_manager.py -d market1501` opens every image and says what is wrong with a data set.
"""

import argparse
import hashlib
import os
import re
import sys
import time
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

import toy
from runtime.errors import UserError

Image = tuple[str, int, int]  # path, pid, camid
Tracklet = tuple[tuple[str, ...], int, int]  # paths of the frames in order, pid, camid

NUM_CAMERAS = 6  # of either data set: 1..6 on disk, camid 0..5 here
MOST_TRACKLETS = 20  # that a frame is in, on average: 1 in MARS, and a damaged table must not fill the memory
IMAGE_TYPES = ('.jpg', '.jpeg', '.png')
MARKET_NAME = re.compile(r'(-1|\d{1,9})_c(\d+)', re.ASCII)  # 0002_c1s1_000451_03.jpg: pid 2, camera 1
MARS_NAME = re.compile(r'(\d{4}|00-1)C\dT\d+F\d+\.jpg', re.ASCII)  # 0001C1T0001F001.jpg: pid, camera, tracklet, frame

# What a tree must hold, and what the message about a missing one says of each part.
MARKET_PARTS = {
    'bounding_box_train': '0002_c1s1_000451_03.jpg ...',
    'query': '0001_c1s1_001051_00.jpg ...',
    'bounding_box_test': '0001_c1s1_002301_00.jpg, -1_c1s1_000401_03.jpg ...',
}
MARS_PARTS = {
    'bbox_train': '0001/0001C1T0001F001.jpg ...',
    'bbox_test': '0002/0002C1T0001F001.jpg ...',
    'info/train_name.txt': 'info/ comes from github.com/liangzheng06/MARS-evaluation',
    'info/test_name.txt': '',
    'info/tracks_train_info.mat': '',
    'info/tracks_test_info.mat': '',
    'info/query_IDX.mat': '',
}
# The folder as the original's README renamed it, then as the official archive unzips.
FOLDERS = {
    'market1501': ('market1501', 'Market-1501-v15.09.15'),
    'mars': ('mars', 'MARS'),
    'toy_market1501': ('toy_market1501',),
    'toy_mars': ('toy_mars',),
}


class Market1501:
    """Market1501, images of 1501 persons in 6 cameras (Zheng et al., Scalable Person Re-identification, ICCV 2015).

    Found in `data_dir` as market1501 or Market-1501-v15.09.15, also nested once. Person and camera are read from the
    file name alone. Junk (pid -1) is dropped, distractors (pid 0) stay in the gallery; files that are no images
    (Thumbs.db) or hidden are passed over. Train pids are relabelled 0..n-1 in ascending order, from `train_pids` on
    disk; those of query and gallery are as on disk; camids are 0..5. Items are sorted by file name.

    `name` is market1501 or toy_market1501. Raises UserError for a missing tree, a folder without images, an image
    whose name does not parse, a camera outside 1..6 and a training set of one person.
    """

    kind = 'image'

    def __init__(self, data_dir: str = 'data', name: str = 'market1501') -> None:
        self.name = name
        root = _find(data_dir, name, MARKET_PARTS)
        train, query, gallery = (_scan_images(os.path.join(root, part)) for part in MARKET_PARTS)
        self.train: list[Image]
        self.train, self.train_pids = _relabelled(train, root)
        self.query: list[Image] = query
        self.gallery: list[Image] = gallery
        self.num_train_pids, self.num_query_pids, self.num_gallery_pids = map(count_pids, (self.train, query, gallery))

        total = len(train) + len(query) + len(gallery)
        _print_statistics(self, {'market1501': 'Market1501'}.get(name, name), 'images', total)


class Mars:
    """MARS, tracklets of 1261 persons in 6 cameras (Zheng et al., MARS: A Video Benchmark, ECCV 2016).

    Found in `data_dir` as mars or MARS, also nested once. The name files and .mat tables of info/ say which frames
    make a tracklet, of whom and in which camera; items are (paths of the frames, pid, camid), in the tables' order.
    Train pids are relabelled 0..n-1 in ascending order, from `train_pids` on disk; those of query and gallery are as on
    disk; camids are 0..5.

    `official=False` is the original's protocol: queries are taken out of the gallery, which leaves 140 of the 1980
    without a match. `official=True` is the data set's own protocol: they stay, and all 1980 count. Figures of the one
    and the other must not be compared.

    Junk tracklets (pid -1) are dropped, distractors (pid 0) stay in the gallery. A number of ids is a number of pids
    in the list: 621 in the gallery of the original's protocol, where the original printed 622, the junk among them,
    although its tracklets were dropped. The printed total counts every tracklet once under both protocols.

    `name` is mars or toy_mars. Raises UserError for a missing tree, a table of another name, shape or type, or that
    points outside the name file, a name that does not parse, a tracklet of two persons or two cameras, a camera
    outside 1..6, an empty subset and a training set of one person.
    """

    kind = 'video'

    def __init__(self, data_dir: str = 'data', official: bool = False, name: str = 'mars') -> None:
        self.name = f'{name}_official' if official else name
        self.official = official
        root = _find(data_dir, name, MARS_PARTS)
        train = _read_tracklets(root, 'train')
        test = _read_tracklets(root, 'test')
        queries = _read_query_rows(os.path.join(root, 'info', 'query_IDX.mat'), len(test))
        queried = set(queries)
        taken_out = set() if official else queried
        train = [tracklet for tracklet in train if tracklet]
        query = [test[row] for row in queries if test[row]]
        gallery = [tracklet for row, tracklet in enumerate(test) if tracklet and row not in taken_out]
        for subset, tracklets in ('training', train), ('query', query), ('gallery', gallery):
            if not tracklets:
                raise UserError(f'{root}/info: the {subset} set has no tracklet of a person; fetch info/ again')

        self.train: list[Tracklet]
        self.train, self.train_pids = _relabelled(train, root)
        self.query: list[Tracklet] = query
        self.gallery: list[Tracklet] = gallery
        self.num_train_pids, self.num_query_pids, self.num_gallery_pids = map(count_pids, (self.train, query, gallery))

        once = train + query + [tracklet for row, tracklet in enumerate(test) if tracklet and row not in queried]
        lengths = [len(paths) for paths, _, _ in once]
        _print_statistics(self, {'mars': 'MARS'}.get(name, name), 'tracklets', len(once), lengths)


_DATASETS = {  # name: (kind, reader of data_dir)
    'market1501': ('image', Market1501),
    'mars': ('video', Mars),
    'mars_official': ('video', lambda data_dir: Mars(data_dir, official=True)),
    'toy_market1501': ('image', lambda data_dir: Market1501(data_dir, name='toy_market1501')),
    'toy_mars': ('video', lambda data_dir: Mars(data_dir, name='toy_mars')),
}


def get_names(kind: str | None = None) -> list[str]:
    """The names that `init_dataset` takes: all, or those of one kind, 'image' or 'video'."""
    return [name for name, (its_kind, _) in _DATASETS.items() if kind in (None, its_kind)]


def init_dataset(name: str, data_dir: str = 'data') -> Market1501 | Mars:
    """Read the data set `name` under `data_dir` and print its statistics; a toy is drawn there first, once.

    Raises UserError for an unknown name, for a toy that cannot be drawn and for all that the data set's class names.
    """
    if name not in _DATASETS:
        raise UserError(f"there is no data set '{name}': choose one of {', '.join(get_names())}")
    print(f'Initializing dataset {name}')
    if name.startswith('toy_'):
        draw = toy.draw_market1501 if name == 'toy_market1501' else toy.draw_mars
        try:
            draw(os.path.join(data_dir, name))
        except OSError as error:
            raise UserError(f'{name} cannot be drawn into {data_dir}: {error}; choose another --data-dir') from error
    return _DATASETS[name][1](data_dir)


def count_pids(items: Iterable[Image | Tracklet]) -> int:
    """The number of persons among the items of a data set."""
    return len({pid for _, pid, _ in items})


def _plain(text: str) -> str:
    """Foreign text as one line that cannot steer a terminal."""
    return text if text.isprintable() else ascii(text)[1:-1]


def _find(data_dir: str, name: str, parts: dict[str, str]) -> str:
    """The folder that holds all `parts`: data_dir/FOLDER or data_dir/FOLDER/FOLDER of the names it may have."""
    folders = FOLDERS[name]
    places = [os.path.join(data_dir, folder) for folder in folders]
    places += [os.path.join(place, folder) for place in places for folder in folders]
    missing = {place: [part for part in parts if not os.path.exists(os.path.join(place, part))] for place in places}
    for place in places:
        if not missing[place]:
            return place

    nearest = min(places, key=lambda place: len(missing[place]))
    if len(missing[nearest]) < len(parts):
        fault = f'{nearest} holds no {", no ".join(missing[nearest])}'
    else:
        fault = f"no {' or '.join(folders)} in --data-dir '{data_dir}'"
    tree = [os.path.join(data_dir, folders[0]) + os.sep]
    tree += [f'    {part}{"" if "." in part else os.sep}'.ljust(34) + hint for part, hint in parts.items()]
    advice = f'data/README.md says where to get it; -d toy_{name} draws a toy of this format'
    if name.startswith('toy_'):
        advice = 'remove that folder, and the toy is drawn anew'
    raise UserError('\n'.join([f'{fault}; expected:', *(line.rstrip() for line in tree), advice]))


def _relabelled(items: list, root: str) -> tuple[list, list[int]]:
    """The training items with pids 0..n-1, and the pids on disk in ascending order: that of label 0, of label 1 ..."""
    pids = sorted({pid for _, pid, _ in items})
    labels = {pid: label for label, pid in enumerate(pids)}
    if len(labels) < 2:
        raise UserError(f'{root}: the training set is of one person; there must be two or more to tell apart')
    return [(paths, labels[pid], camid) for paths, pid, camid in items], pids


def _print_statistics(
    dataset: Market1501 | Mars, title: str, unit: str, total: int, lengths: Sequence[int] = ()
) -> None:
    """The original's table; ids in total are those of train and query."""
    counts = [
        ('train', dataset.num_train_pids, len(dataset.train)),
        ('query', dataset.num_query_pids, len(dataset.query)),
        ('gallery', dataset.num_gallery_pids, len(dataset.gallery)),
        ('total', dataset.num_train_pids + dataset.num_query_pids, total),
    ]
    line = '  ' + '-' * 30
    rows = [f'  {subset:8} | {num_pids:5d} | {num_items:8d}' for subset, num_pids, num_items in counts]
    table = [line, f'  subset   | # ids | # {unit}', line, *rows[:3], line, rows[3]]
    if lengths:
        average = sum(lengths) / len(lengths)
        table.append(f'  number of images per tracklet: {min(lengths)} ~ {max(lengths)}, average {average:.1f}')
    print('\n'.join([f'=> {title} loaded', 'Dataset statistics:', *table, line]))


# ---- Market1501: file names ----


def _scan_images(folder: str) -> list[Image]:
    """The images of one folder, sorted by name, junk left out."""
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        raise UserError(f'{folder} cannot be read: {error.strerror}') from error
    items = []
    for name in names:
        if name.startswith('.') or not name.lower().endswith(IMAGE_TYPES):
            continue
        match = MARKET_NAME.match(name)
        if not match:
            raise UserError(
                f"{folder}: the name '{_plain(name)}' does not parse; "
                'it must begin with person and camera, as in 0002_c1s1_'
            )
        pid, camera = map(int, match.groups())
        if pid == -1:
            continue
        if not 1 <= camera <= NUM_CAMERAS:
            raise UserError(f"{folder}: '{_plain(name)}' is of camera {camera}, but cameras are 1 to {NUM_CAMERAS}")
        items.append((os.path.join(folder, name), pid, camera - 1))
    if not items:
        kinds = ', '.join(IMAGE_TYPES)
        raise UserError(f'{folder} holds no images of persons ({kinds}); unzip the data set there again')
    return items


# ---- MARS: name files and tables ----


def _read_tracklets(root: str, subset: str) -> list[Tracklet | None]:
    """One tracklet for each row of the table of `subset`, train or test; None for junk."""
    names_path = os.path.join(root, 'info', f'{subset}_name.txt')
    table_path = os.path.join(root, 'info', f'tracks_{subset}_info.mat')
    names = _read_names(names_path)
    table = _read_table(table_path, f'track_{subset}_info')
    if table.ndim != 2 or table.shape[1] != 4:
        raise UserError(f'{table_path} is a table of shape {table.shape}, but must have 4 columns; fetch info/ again')

    tracklets, num_frames = [], 0
    for row, (first, last, pid, camera) in enumerate(table.tolist(), start=1):
        if pid == -1:
            tracklets.append(None)
            continue
        track = f'{table_path}: track {row}'
        if pid < 0:
            raise UserError(f'{track} is of person {pid}; fetch info/ again')
        if not 1 <= camera <= NUM_CAMERAS:
            raise UserError(f'{track} is of camera {camera}, but cameras are 1 to {NUM_CAMERAS}; fetch info/ again')
        if not 1 <= first <= last <= len(names):
            raise UserError(
                f'{track} is lines {first} to {last} of {names_path}, which has {len(names)}; fetch info/ again'
            )
        num_frames += last - first + 1
        if num_frames > MOST_TRACKLETS * len(names):
            raise UserError(
                f'{table_path}: tracks 1 to {row} are of {num_frames} frames, but {names_path} has {len(names)}; '
                'fetch info/ again'
            )
        frames = names[first - 1 : last]
        if not all(map(MARS_NAME.fullmatch, frames)):
            name = next(name for name in frames if not MARS_NAME.fullmatch(name))
            raise UserError(
                f"{names_path}: the name '{_plain(name[:100])}' does not parse; it must be as 0001C1T0001F001.jpg"
            )
        if len(begins := {name[:6] for name in frames}) > 1:  # 0001C1: person and camera
            raise UserError(
                f'{track}, lines {first} to {last} of {names_path}, mixes {" and ".join(sorted(begins)[:2])}, '
                'but a tracklet is one person in one camera; fetch info/ again'
            )
        folder = os.path.join(root, f'bbox_{subset}', frames[0][:4], '')
        tracklets.append((tuple([folder + name for name in frames]), pid, camera - 1))
    return tracklets


def _read_names(path: str) -> list[str]:
    """The lines of a name file."""
    try:
        with open(path, encoding='ascii') as file:
            return file.read().rstrip().split('\n')
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f'{path} cannot be read as lines of file names ({error}); fetch info/ again') from error


def _read_query_rows(path: str, num_tracks: int) -> list[int]:
    """The rows of the test table that are queries, from 0."""
    rows = _read_table(path, 'query_IDX').ravel() - 1  # on disk from 1
    for row in rows[(rows < 0) | (rows >= num_tracks)][:1]:
        raise UserError(f'{path} points at track {row + 1}, but there are tracks 1 to {num_tracks}; fetch info/ again')
    tracks, counts = np.unique(rows, return_counts=True)
    for row in tracks[counts > 1][:1]:
        raise UserError(f'{path} names track {row + 1} more than once; fetch info/ again')
    return rows.tolist()


def _read_table(path: str, key: str) -> np.ndarray:
    """The whole numbers under `key` of a .mat file, as int64 (the file's own type may be uint16, where 0 - 1 wraps)."""
    from scipy.io import loadmat  # slow to import, and only MARS needs it

    try:
        table = loadmat(path, variable_names=[key], appendmat=False).get(key)
    except Exception as error:  # of any type: scipy parses bytes from a stranger
        reason = _plain(' '.join(str(error).split())[:200]) or type(error).__name__
        raise UserError(f'{path} cannot be read as a .mat file ({reason}); fetch info/ again') from error
    if table is None:
        raise UserError(f"{path} holds no table '{key}'; fetch info/ again")
    whole = isinstance(table, np.ndarray) and table.dtype.kind in 'iuf'
    if not whole or not (np.abs(table.astype(np.float64)) < 2**31).all() or (table != np.trunc(table)).any():
        raise UserError(f"{path}: '{key}' is no table of whole numbers; fetch info/ again")
    return table.astype(np.int64)


def fingerprint(dataset: Any) -> str:
    """16 hexadecimal digits that differ between data sets with other files, pids or camids, wherever they lie."""
    digest = hashlib.sha256()
    for items in (dataset.train, dataset.query, dataset.gallery):
        for paths, pid, camid in items:
            names = [os.path.basename(path) for path in ([paths] if isinstance(paths, str) else paths)]
            digest.update(f'{pid} {camid} {" ".join(names)}\n'.encode(errors='surrogateescape'))
    return digest.hexdigest()[:16]


# ---- the check: python data_manager.py -d market1501 ----

KNOWN = {  # persons and items of each subset
    'market1501': {'train': (751, 12936), 'query': (750, 3368), 'gallery': (751, 15913)},
    'mars': {'train': (625, 8298), 'query': (626, 1980), 'gallery': (621, 9330)},
}
MOST = 10  # cases that are listed of what is no fault
Finding = tuple[bool, str, list[str]]  # is it a fault, what it is, each case of it: none if all is well


def check(dataset: Market1501 | Mars, jobs: int = 1) -> Iterable[Finding]:
    """What is wrong with a data set, and what is merely worth knowing. Opens every image, in `jobs` processes.

    Faults are other statistics than the known ones, files that cannot be read, persons of the training set in the
    test sets, and two persons with the same picture, byte by byte. Of MARS both protocols are looked at, whichever
    was read. Persons are named as on disk; distractors (pid 0) are none.
    """
    train = [(paths, dataset.train_pids[label], camid) for paths, label, camid in dataset.train]
    query, queries = dataset.query, set(dataset.query)
    gallery = [item for item in dataset.gallery if item not in queries]  # as the original's protocol has it

    subsets = {'train': train, 'query': query, 'gallery': gallery}
    known = KNOWN.get(dataset.name.removesuffix('_official'), {})
    found = {subset: (count_pids(items), len(items)) for subset, items in subsets.items()}
    unlike = [subset for subset in known if found[subset] != known[subset]]
    cases = ['{}: {} ids, {} items; known are {} and {}'.format(key, *found[key], *known[key]) for key in unlike]
    yield True, 'statistics other than the known ones', cases

    shared = set(dataset.train_pids) & {pid for _, pid, _ in query + gallery}
    yield True, 'persons in both the training set and the test sets', list(map(str, sorted(shared)))
    for subset, items in ('the training set', train), ('the test sets', query + gallery):
        cameras = _cameras_of(items)
        alone = [str(pid) for pid in sorted(cameras) if pid and len(cameras[pid]) == 1]
        yield False, f'persons of {subset} in one camera only', alone

    protocols = {'': gallery}
    if dataset.kind == 'video':
        protocols = {' under mars': gallery, ' under mars_official': gallery + query}
    for protocol, items in protocols.items():
        cameras = _cameras_of(items)
        rows = [(_paths_of(item)[0], cameras.get(item[1]), item[2]) for item in query]
        absent = [path for path, seen, _ in rows if seen is None]
        yield False, f'queries without a match{protocol}, their person not in the gallery', absent
        same = [path for path, seen, camid in rows if seen == {camid}]
        yield False, f'queries without a match{protocol}, their person in their own camera only', same

    pids = {path: item[1] for item in train + query + gallery for path in _paths_of(item)}
    unread: list[str] = []
    copies: dict[bytes, list[str]] = {}
    for path, (digest, reason) in zip(pids, _open_all(list(pids), jobs), strict=True):
        if reason:
            unread.append(reason)
        else:
            copies.setdefault(digest, []).append(path)
    yield True, f'files of {len(pids)} that cannot be read', unread
    groups: dict[bool, list[str]] = {True: [], False: []}  # of two persons or not
    for paths in copies.values():
        if len(paths) > 1:
            groups[len({pids[path] for path in paths} - {0}) > 1].append(' = '.join(paths))
    yield True, 'groups of byte-equal files of different persons', groups[True]
    yield False, 'groups of byte-equal files of one person or of distractors', groups[False]


def _paths_of(item: Image | Tracklet) -> Sequence[str]:
    return (item[0],) if isinstance(item[0], str) else item[0]


def _cameras_of(items: Iterable[Image | Tracklet]) -> dict[int, set[int]]:
    cameras: dict[int, set[int]] = {}
    for _, pid, camid in items:
        cameras.setdefault(pid, set()).add(camid)
    return cameras


def _open_all(paths: list[str], jobs: int) -> Iterable[tuple[bytes, str]]:
    """What `_open` says of each path, in order; a bar on a terminal."""
    from concurrent.futures import ProcessPoolExecutor

    from tqdm import tqdm

    import dataset_loader  # noqa: F401 (before the processes are forked: it is slow to import)

    pool = ProcessPoolExecutor(min(jobs, len(paths)))
    try:
        yield from tqdm(pool.map(_open, paths, chunksize=64), total=len(paths), unit='image', leave=False, disable=None)
    finally:
        pool.shutdown(cancel_futures=True)  # else an interruption waits for every image


def _open(path: str) -> tuple[bytes, str]:
    """A digest of the file, and why it cannot be read as an image, '' if it can."""
    from dataset_loader import read_image

    try:
        os.stat(path)  # read_image would try three times to find what is not there
        read_image(path)
        with open(path, 'rb') as file:
            return hashlib.file_digest(file, 'sha1').digest(), ''
    except OSError as error:
        return b'', f'cannot read the image {path}: {error.strerror}'
    except UserError as error:
        return b'', str(error)


def main() -> None:
    def fail(mistake: str | UserError) -> None:
        sys.stderr.write(f'error: {mistake}\n')
        sys.exit(2)

    parser = argparse.ArgumentParser(description='Open every image of a data set and say what is wrong with it.')
    parser.add_argument('-d', '--dataset', default='market1501', help=f'{", ".join(get_names())} (default: market1501)')
    parser.add_argument('--data-dir', default='data', help='folder of the data sets (default: data)')
    parser.add_argument('-j', '--jobs', type=int, default=os.cpu_count() or 1, help='processes (default: all cores)')
    parser.error = fail
    args = parser.parse_args()
    started = time.monotonic()
    faults = 0
    try:
        if args.jobs < 1:
            raise UserError(f'-j {args.jobs}: the images are opened by one process or more')
        for is_fault, what, cases in check(init_dataset(args.dataset, args.data_dir), args.jobs):
            if not cases:
                continue
            faults += is_fault
            listed = cases if is_fault or len(cases) <= MOST else [*cases[:MOST], f'and {len(cases) - MOST} more']
            print('\n    '.join([f'{"fault" if is_fault else "note"}: {what}: {len(cases)}', *map(_plain, listed)]))
    except UserError as mistake:
        fail(mistake)
    print(f'{args.dataset}: kinds of faults: {faults}; {time.monotonic() - started:.0f} s')
    sys.exit(1 if faults else 0)


if __name__ == '__main__':
    main()
