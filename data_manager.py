"""The data sets by name: `init_dataset(name)` -> train, query, gallery.

A scan reads file names and MARS's tables, nothing else: no image is opened or looked up on disk. The command
`python data_manager.py -d market1501` opens every image and reports the faults of a data set.
"""

import hashlib
import os
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial

from tqdm import tqdm

import toy
from readers.market1501 import Market1501
from readers.mars import Mars
from readers.tree import Dataset, Item, paths_of
from runtime import commands, values
from runtime.decoding import read_image
from runtime.errors import UserError, plain

__all__ = ['Market1501', 'Mars', 'get_names', 'init_dataset']


def toy_market1501(data_dir: str, hard: bool = False) -> Market1501:
    """A toy in Market1501's format, drawn if it does not exist; if `hard`, with much occlusion and changes of light."""
    name = 'toy_market1501_hard' if hard else 'toy_market1501'
    toy.draw_market1501(_place(data_dir, name), hard=hard)
    return Market1501(data_dir, name=name)


def toy_mars(data_dir: str) -> Mars:
    """A toy in MARS's format, drawn if it does not exist."""
    toy.draw_mars(_place(data_dir, 'toy_mars'))
    return Mars(data_dir, name='toy_mars')


def _place(data_dir: str, name: str) -> str:
    """The folder of a toy: `data_dir` itself if it has the toy's name."""
    itself = os.path.basename(os.path.abspath(data_dir)) == name
    return data_dir if itself else os.path.join(data_dir, name)


# A data set is a line in one of these two: its name, and the class that reads it from `data_dir`.
IMAGES: dict[str, Callable[[str], Dataset]] = {
    'market1501': Market1501,
    'toy_market1501': toy_market1501,
    'toy_market1501_hard': partial(toy_market1501, hard=True),
}
TRACKLETS: dict[str, Callable[[str], Dataset]] = {
    'mars': Mars,
    'mars_official': partial(Mars, official=True),
    'toy_mars': toy_mars,
}


def get_names(kind: str | None = None) -> list[str]:
    """The names that `init_dataset` accepts: all of them, or those of one kind, 'image' or 'video'."""
    return [*(IMAGES if kind != 'video' else ()), *(TRACKLETS if kind != 'image' else ())]


def init_dataset(name: str, data_dir: str = 'data', train: bool = True) -> Dataset:
    """Read the data set `name` from `data_dir` and print its statistics; a toy is drawn first if it does not exist.

    train: whether it must be possible to train on it; if not, a training set that is missing or unusable is empty

    Raises UserError for an unknown name, for a toy that cannot be drawn, for a training set that is needed and cannot
    be used, and in the cases that the class lists.
    """
    if name not in get_names():
        raise UserError(f"there is no data set '{name}': choose one of {', '.join(get_names())}")
    print(f'Initializing dataset {name}')
    try:
        dataset = (IMAGES | TRACKLETS)[name](data_dir)
    except OSError as error:
        raise UserError(f'{name} cannot be read or drawn in {data_dir}: {error}; choose another --data-dir') from error
    if not isinstance(dataset, Dataset):  # any object with the three lists, and perhaps multi_query()
        own = dataset
        dataset = Dataset(name, own.train, own.query, own.gallery)
        dataset.multi_query = getattr(own, 'multi_query', dataset.multi_query)
    if dataset.untrainable and train:
        raise UserError(dataset.untrainable)
    if dataset.untrainable:
        print(f'It can be tested, but not trained on: {_why(dataset)}')
    return dataset


def _why(dataset: Dataset) -> str:
    """Why nothing can be trained on a data set, in one line; '' if it can."""
    return plain(dataset.untrainable, 500).removesuffix('; expected:')


def fingerprint(dataset: Dataset, subsets: Sequence[str] = ('train', 'query', 'gallery')) -> str:
    """16 hexadecimal digits that identify the file names, pids and camids of `subsets`, wherever the files are."""
    digest = hashlib.sha256()
    for subset in subsets:
        for paths, pid, camid in getattr(dataset, subset):
            names = [os.path.basename(path) for path in ([paths] if isinstance(paths, str) else paths)]
            digest.update(f'{pid} {camid} {" ".join(names)}\n'.encode(errors='surrogateescape'))
    return digest.hexdigest()[:16]


# ---- the check: python data_manager.py -d market1501 ----

MOST = 10  # cases of a note that are listed
Finding = tuple[bool, str, list[str]]  # whether it is a fault, what it is, and its cases (none if all is well)


def check(dataset: Dataset, jobs: int = 1) -> Iterable[Finding]:
    """Faults of a data set, and notes that are merely worth knowing. Opens every image, in `jobs` processes.

    Faults are a training set that cannot be used, statistics that differ from the known ones, files that cannot be
    read, persons that are in both the training set and the test sets, and byte-equal images of two persons. For MARS
    both protocols are examined, whichever was read. Persons are numbered as on disk; distractors (pid 0) are not
    counted as persons.
    """
    train = [(paths, dataset.train_pids[label], camid) for paths, label, camid in dataset.train]
    query, queries = dataset.query, set(dataset.query)
    gallery = [item for item in dataset.gallery if item not in queries]  # as in the original's protocol

    yield True, 'training set that cannot be used', [why] if (why := _why(dataset)) else []
    yield True, 'statistics that differ from the known ones', dataset.differences()
    yield False, 'files and folders that are not read', list(dataset.passed_over)

    shared = set(dataset.train_pids) & {pid for _, pid, _ in query + gallery}
    yield True, 'persons in both the training set and the test sets', list(map(str, sorted(shared)))
    for subset, items in ('the training set', train), ('the test sets', query + gallery):
        cameras = _cameras_of(items)
        alone = [str(pid) for pid in sorted(cameras) if pid and len(cameras[pid]) == 1]
        yield False, f'persons of {subset} seen by one camera only', alone

    protocols = {'': gallery}
    if dataset.kind == 'video':
        protocols = {' under mars': gallery, ' under mars_official': gallery + query}
    for protocol, items in protocols.items():
        cameras = _cameras_of(items)
        rows = [(paths_of(item)[0], cameras.get(item[1]), item[2]) for item in query]
        absent = [path for path, seen, _ in rows if seen is None]
        yield False, f'queries without a match{protocol} (the person is not in the gallery)', absent
        same = [path for path, seen, camid in rows if seen == {camid}]
        hint = '; if the cameras are unknown, test with --any-camera' if len(same) + len(absent) == len(query) else ''
        yield False, f'queries without a match{protocol} (the person is in the same camera only{hint})', same

    pids = {path: item[1] for item in train + query + gallery for path in paths_of(item)}
    unread: list[str] = []
    copies: dict[bytes, list[str]] = {}
    for path, (digest, reason) in zip(pids, _open_all(list(pids), jobs), strict=True):
        if reason:
            unread.append(reason)
        else:
            copies.setdefault(digest, []).append(path)
    yield True, f'files (of {len(pids)}) that cannot be read', unread
    groups: dict[bool, list[str]] = {True: [], False: []}  # whether of two persons
    for paths in copies.values():
        if len(paths) > 1:
            groups[len({pids[path] for path in paths} - {0}) > 1].append(' = '.join(paths))
    yield True, 'groups of byte-equal files of different persons', groups[True]
    yield False, 'groups of byte-equal files of one person or of distractors', groups[False]


def _cameras_of(items: Iterable[Item]) -> dict[int, set[int]]:
    cameras: dict[int, set[int]] = {}
    for _, pid, camid in items:
        cameras.setdefault(pid, set()).add(camid)
    return cameras


def _open_all(paths: list[str], jobs: int) -> Iterable[tuple[bytes, str]]:
    """What `_open` returns for each path, in order; shows a progress bar on a terminal."""
    pool = ProcessPoolExecutor(min(jobs, len(paths)))
    try:
        yield from tqdm(pool.map(_open, paths, chunksize=64), total=len(paths), unit='image', leave=False, disable=None)
    finally:
        pool.shutdown(cancel_futures=True)  # otherwise an interruption would wait for every image


def _open(path: str) -> tuple[bytes, str]:
    """A digest of the file, and the reason why it cannot be read as an image ('' if it can)."""
    try:
        os.stat(path)  # read_image would try three times to open a missing file
        read_image(path)
        with open(path, 'rb') as file:
            return hashlib.file_digest(file, 'sha1').digest(), ''
    except OSError as error:
        return b'', f'cannot read the image {path}: {error.strerror}'
    except UserError as error:
        return b'', str(error)


def main() -> int:
    parser = commands.Parser(description='Open every image of a data set and report its faults.')
    parser.add_argument('-d', '--dataset', default='market1501', help=f'{", ".join(get_names())} (default: market1501)')
    parser.add_argument('--data-dir', type=values.path, default='data', help='where the data sets are (default: data)')
    parser.add_argument('-j', '--jobs', type=int, default=os.cpu_count() or 1, help='processes (default: all cores)')
    args = parser.parse_args()
    started = time.monotonic()
    faults = 0
    if args.jobs < 1:
        raise UserError(f'-j {args.jobs}: at least one process is needed')
    for is_fault, what, cases in check(init_dataset(args.dataset, args.data_dir, train=False), args.jobs):
        if not cases:
            continue
        faults += is_fault
        listed = cases if is_fault or len(cases) <= MOST else [*cases[:MOST], f'and {len(cases) - MOST} more']
        lines = [f'{"fault" if is_fault else "note"}: {what}: {len(cases)}', *(plain(case, 1000) for case in listed)]
        print('\n    '.join(lines))
    print(f'{args.dataset}: {faults} kind{"" if faults == 1 else "s"} of faults; {time.monotonic() - started:.0f} s')
    return 1 if faults else 0


if __name__ == '__main__':
    commands.run(main)
