"""Shared by all readers: the data set object, the numbering of its cameras, and the search for its folder."""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

import numpy as np

from runtime.errors import UserError, plain

Image = tuple[str, int, int]  # path, pid, camid
Tracklet = tuple[tuple[str, ...], int, int]  # paths of the frames in order, pid, camid
Item = tuple[str | tuple[str, ...], int, int]  # either

AnyItem = TypeVar('AnyItem', Image, Tracklet)

NUM_CAMERAS = 6  # of Market1501 and MARS, 1..6 on disk
MAX_PID = 2**63 - 1  # pids are int64
DROPPINGS = ('thumbs.db', 'desktop.ini')  # left by Windows in any folder
ARCHIVES = ('.zip', '.rar', '.7z', '.tar', '.tar.gz', '.tgz')


class Dataset:
    """Training items, queries and gallery, lists of (path, pid, camid), or (tuple of paths, pid, camid) of tracklets.

    Args:
        train: with any integers as pids; they are relabelled 0..n-1 in ascending order.
        title: heading of the printed statistics; `name` by default.
        total: total number of items, if subsets share some.
        lengths: frames of each tracklet.
        untrainable: why nothing can be trained on it, in the words of an error message.
        cameras: the cameras on disk, if they had to be renumbered.
        passed_over: files and folders that are not read.

    Attributes:
        kind: 'image' or 'video', what the items are.
        train_pids: the original pid of each training label.
        num_train_pids, num_query_pids, num_gallery_pids: numbers of pids in the lists.
        untrainable: as above, also if there are fewer than two persons to train on; '' if it can be trained on.

    Prints the original's table of statistics; below it, what was passed over (except for hidden files and DROPPINGS),
    and how the data set differs from the one that is published under its name.
    """

    published: Mapping[str, tuple[int, int]] = {}  # known numbers of persons and items of each subset

    def __init__(
        self,
        name: str,
        train: Sequence[Item],
        query: Sequence[Item],
        gallery: Sequence[Item],
        *,
        title: str = '',
        total: int | None = None,
        lengths: Sequence[int] = (),
        untrainable: str = '',
        cameras: Sequence[int] = (),
        passed_over: Sequence[str] = (),
    ):
        self.name, self.cameras, self.passed_over = name, cameras, passed_over
        self.train_pids = sorted({pid for _, pid, _ in train})
        self.untrainable = untrainable
        if not untrainable and len(self.train_pids) < 2:
            fault = f'has only one person ({plain(paths_of(train[0])[0], 500)} ...)' if train else 'is empty'
            self.untrainable = f'{name}: the training set {fault}; at least two persons are needed'
        self.kind = 'image' if all(isinstance(paths, str) for paths, _, _ in (*train[:1], *query[:1])) else 'video'
        labels = {pid: label for label, pid in enumerate(self.train_pids)}
        self.train: list[Item] = [(paths, labels[pid], camid) for paths, pid, camid in train]
        self.query, self.gallery = list(query), list(gallery)
        self.num_train_pids, self.num_query_pids, self.num_gallery_pids = map(
            count_pids, (self.train, self.query, self.gallery)
        )
        total = len(train) + len(query) + len(gallery) if total is None else total
        print('\n'.join([f'=> {title or name} loaded', 'Dataset statistics:', *self._statistics(total, lengths)]))
        if named := [path for path in passed_over if not _is_harmless(path)]:
            print(f'Passed over: {listed(named, os.path.dirname(os.path.dirname(named[0])))}')
        if differences := self.differences():
            print(f'It differs from the published {title or name}: {"; ".join(differences)}')

    def multi_query(self) -> list[Item]:
        """Images of the queries' persons in their cameras, over which --multi-query averages: here the queries."""
        return self.query

    def _statistics(self, total: int, lengths: Sequence[int]) -> list[str]:
        """The original's table. The total number of ids is that of train and query."""
        counts = [
            ('train', self.num_train_pids, len(self.train)),
            ('query', self.num_query_pids, len(self.query)),
            ('gallery', self.num_gallery_pids, len(self.gallery)),
            ('total', self.num_train_pids + self.num_query_pids, total),
        ]
        line, unit = '  ' + '-' * 30, 'tracklets' if self.kind == 'video' else 'images'
        rows = [f'  {subset:8} | {num_pids:5d} | {num_items:8d}' for subset, num_pids, num_items in counts]
        table = [line, f'  subset   | # ids | # {unit}', line, *rows[:3], line, rows[3]]
        if lengths:
            average = sum(lengths) / len(lengths)
            table.append(f'  number of images per tracklet: {min(lengths)} ~ {max(lengths)}, average {average:.1f}')
        return [*table, line]

    def differences(self) -> list[str]:
        """How the data set differs from the published one in persons and items of a subset, and in cameras.

        Queries that are also in the gallery are not counted there. A training set that is missing is no difference.
        """
        if not self.published:
            return []
        queries = set(self.query)
        gallery = [item for item in self.gallery if item not in queries]
        counts = {
            subset: (count_pids(items), len(items))
            for subset, items in {'train': self.train, 'query': self.query, 'gallery': gallery}.items()
            if items or not self.untrainable
        }
        differences = [
            '{}: {} ids, {} items instead of {} and {}'.format(subset, *found, *self.published[subset])
            for subset, found in counts.items()
            if found != self.published[subset]
        ]
        if self.cameras:
            numbers = ', '.join(map(str, self.cameras[:12])) + (' ...' if len(self.cameras) > 12 else '')
            camids = f'camids 0 to {len(self.cameras) - 1}'
            differences.append(f'cameras {plain(numbers)} instead of 1 to {NUM_CAMERAS} ({camids}, in this order)')
        return differences


def count_pids(items: Iterable[Item]) -> int:
    """The number of persons among the items of a data set."""
    return len({pid for _, pid, _ in items})


def ids_of(query: Sequence[Item], gallery: Sequence[Item]) -> list[np.ndarray]:
    """The pids of query and gallery, then their camids."""
    return [np.array([item[column] for item in items]) for column in (1, 2) for items in (query, gallery)]


def paths_of(item: Item) -> Sequence[str]:
    """The files of an item."""
    return (item[0],) if isinstance(item[0], str) else item[0]


def usable(read: Callable[[], list[AnyItem]], untrainable: str) -> tuple[list[AnyItem], str]:
    """What `read` returns and ''; or nothing and why: `untrainable`, or the message if it raises UserError."""
    if untrainable:
        return [], untrainable
    try:
        return read(), ''
    except UserError as fault:
        return [], str(fault)


def camids_of(*subsets: Iterable[Item]) -> tuple[dict[int, int], list[int]]:
    """The camid of each camera of the items: camera - 1 if all are 1..6, otherwise from 0 in ascending order.

    Also returns the cameras, in ascending order, if they are not all 1..6.
    """
    cameras = sorted({camera for items in subsets for _, _, camera in items})
    if all(1 <= camera <= NUM_CAMERAS for camera in cameras):
        return {camera: camera - 1 for camera in cameras}, []
    return {camera: camid for camid, camera in enumerate(cameras)}, cameras


def listed(paths: Sequence[str], root: str, most: int = 3) -> str:
    """Files and folders as an enumeration: how many of each, and the first `most`, relative to `root`."""
    parts = []
    folders = [path for path in paths if os.path.isdir(path)]
    files = sorted({*paths}.difference(folders))
    for kind, some in (('file', files), ('folder', folders)):
        if some:
            names = [plain(os.path.relpath(path, root), 100) for path in some[:most]]
            more = ' ...' if len(some) > most else ''
            parts.append(f'{len(some)} {kind}{"s" if len(some) > 1 else ""} ({", ".join(names)}{more})')
    return ' and '.join(parts)


def _is_harmless(path: str) -> bool:
    name = os.path.basename(path)
    return name.startswith('.') or name.lower() in DROPPINGS


def find(
    data_dir: str, name: str, folders: Sequence[str], parts: Mapping[str, str], training: Sequence[str]
) -> tuple[str, str]:
    """The folder of a data set, and '', or the message about the parts that are missing for training.

    Searched are data_dir/FOLDER, data_dir/FOLDER/FOLDER, for any of `folders` in any spelling (case, signs), and
    data_dir itself; a folder with all parts is preferred.

    parts: each with the hint that the error message gives for it
    training: those that only training needs

    Raises:
        UserError: there is none; the message shows the expected folders.
    """
    places = [os.path.join(data_dir, folder) for folder in folders] + _spelled(data_dir, folders)
    places += [os.path.join(place, folder) for place in places for folder in folders]
    places += [inner for place in places for inner in _spelled(place, folders)]
    places = list(dict.fromkeys([*places, os.fspath(data_dir)]))
    missing = {place: [part for part in parts if not os.path.exists(os.path.join(place, part))] for place in places}
    untestable = {place: not {*missing[place]} <= {*training} for place in places}
    nearest = min(places, key=lambda place: (untestable[place], len(missing[place])))
    if nearest == os.fspath(data_dir) and not untestable[nearest]:
        print(f"--data-dir '{data_dir}' is the data set itself")
    if not missing[nearest]:
        return nearest, ''

    if len(missing[nearest]) < len(parts):
        fault = f'{nearest} contains no {", no ".join(missing[nearest])}'
    else:
        fault = f"no {' or '.join(folders)} in --data-dir '{data_dir}'"
    tree = [os.path.join(data_dir, folders[0]) + os.sep]
    tree += [f'    {part}{"" if "." in part else os.sep}'.ljust(34) + hint for part, hint in parts.items()]
    advice = f'see data/README.md for where to download it; -d toy_{name} draws a toy in this format'
    if name.startswith('toy_'):
        advice = 'remove that folder, and the toy is drawn again'
    elif archives := _spelled(data_dir, folders, ARCHIVES):
        advice = f'unpack {plain(archives[0])} there'
    message = '\n'.join([f'{fault}; expected:', *(line.rstrip() for line in tree), advice])
    if untestable[nearest]:
        raise UserError(message)
    return nearest, message


def _spelled(folder: str, names: Sequence[str], endings: Sequence[str] = ('',)) -> list[str]:
    """The entries of a folder with one of `names`, in any case and with any signs between the letters and digits."""
    try:
        entries = sorted(os.listdir(folder))
    except OSError:
        return []
    wanted = {_letters(name) + _letters(ending) for name in names for ending in endings}
    return [os.path.join(folder, entry) for entry in entries if _letters(entry) in wanted and entry.isprintable()]


def _letters(name: str) -> str:
    return ''.join(filter(str.isalnum, name.lower()))
