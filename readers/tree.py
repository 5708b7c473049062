"""Shared by all readers: the data set object, and the numbers of its persons and cameras."""

import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from runtime.errors import UserError, plain

Image = tuple[str, int, int]  # path, pid, camid
Tracklet = tuple[tuple[str, ...], int, int]  # paths of the frames in order, pid, camid
Item = tuple[str | tuple[str, ...], int, int]  # either

AnyItem = TypeVar('AnyItem', Image, Tracklet)

SPLITS = ('train', 'query', 'gallery')
NUM_CAMERAS = 6  # of Market1501 and MARS, 1..6 on disk
JUNK = -1  # the pid of items that are left out; never assigned to names
MAX_PID = 2**63 - 1  # pids are int64
INTEGER = re.compile(r'0*-[0-9]{1,18}|[0-9]{1,18}')  # within int64; 00-1 is junk in MARS
DIGITS = re.compile(r'([0-9]+)')
LONG = 4000  # digits; Python converts at most 4300
DROPPINGS = ('thumbs.db', 'desktop.ini')  # left by Windows in any folder


class Dataset:
    """Training items, queries and gallery: lists of (path, pid, camid), or for tracklets (tuple of paths, pid, camid).

    Args:
        train: with any integers as pids; they are relabelled 0..n-1 in ascending order.
        title: heading of the printed statistics; `name` by default.
        total: total number of items, if subsets share some.
        lengths: number of frames of each tracklet.
        untrainable: why it cannot be trained on, as an error message.
        cameras: the cameras on disk, if they had to be renumbered.
        passed_over: files and folders that are not read.
        names: the name of each pid, if it is not the number itself.
        camera_names: the same for each camid.
        no_cameras: the cameras are unknown, and all camids are 0: a test counts matches from any camera.
        drawn: how the persons were split into training and test, if the split was drawn.
        extra: items that are published for training but not used, with pids as in `train_pids`.
        brief: print a line of counts instead of the table, as for a part of a data set whose table was printed.

    Attributes:
        kind: 'image' or 'video', the kind of the items.
        train_pids: the original pid of each training label.
        num_train_pids, num_query_pids, num_gallery_pids: numbers of pids in the lists.
        untrainable: as above, also if there are fewer than two persons to train on; '' if it can be trained on.
        targets: the data sets that a run tests, by default only this one; the first one selects the best model.
        validation: the data set of the persons held out of this training set, which then selects the best model
            instead; None if no persons are held out.
        set_of: the number, from 0, of the data set of each training item; all zeros unless data sets are joined.

    Prints the original's table of statistics, then the skipped files (except hidden files and DROPPINGS), and how the
    data set differs from the published one of its name.
    """

    published: Mapping[str, tuple[int, int]] = {}  # known numbers of persons and items of a subset
    num_cameras = NUM_CAMERAS  # as published
    first_camera = 0  # in the data, of camid 0, unless the cameras had to be renumbered or have names

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
        names: Mapping[int, str] | None = None,
        camera_names: Mapping[int, str] | None = None,
        no_cameras: bool = False,
        drawn: str = '',
        extra: Sequence[Item] = (),
        brief: bool = False,
    ):
        self.name, self.cameras, self.passed_over = name, cameras, passed_over
        self.names, self.camera_names, self.no_cameras, self.drawn = names or {}, camera_names or {}, no_cameras, drawn
        self.train_pids = sorted({pid for _, pid, _ in train})
        self.untrainable, self.extra = untrainable, list(extra)
        self.targets: Sequence[Dataset] = [self]
        self.validation: Dataset | None = None
        if not untrainable and len(self.train_pids) < 2:
            fault = f'has only one person ({plain(paths_of(train[0])[0], 500)} ...)' if train else 'is empty'
            self.untrainable = f'{plain(name, 500)}: the training set {fault}; at least two persons are needed'
        some = (*train[:1], *query[:1], *gallery[:1])
        self.kind = 'image' if all(isinstance(paths, str) for paths, _, _ in some) else 'video'
        labels = {pid: label for label, pid in enumerate(self.train_pids)}
        self.train: list[Item] = [(paths, labels[pid], camid) for paths, pid, camid in train]
        self.set_of: Sequence[int] = [0] * len(train)
        self.query, self.gallery = list(query), list(gallery)
        self.num_train_pids, self.num_query_pids, self.num_gallery_pids = map(
            count_pids, (self.train, self.query, self.gallery)
        )
        if brief:
            print(f'=> {plain(title or name, 500)}: {self._counts()}')
            return
        total = len(train) + len(query) + len(gallery) if total is None else total
        heading = f'=> {plain(title or name, 500)} loaded'
        print('\n'.join([heading, 'Dataset statistics:', *self._statistics(total, lengths)]))
        for line in self._of_ones_own():
            print(line)
        if named := [path for path in passed_over if not _is_harmless(path)]:
            print(f'Passed over: {listed(named, os.path.dirname(os.path.dirname(named[0])))}')
        if differences := self.differences():
            print(f'It differs from the published {title or name}: {"; ".join(differences)}')

    def name_of(self, pid: int) -> str:
        """The person's name or number in the data."""
        return self.names.get(pid, str(pid))

    def camera_of(self, camid: int) -> str:
        """The camera's name or number in the data."""
        number = self.cameras[camid] if 0 <= camid < len(self.cameras) else camid + self.first_camera
        return self.camera_names.get(camid, str(number))

    def groups(self, balance: str) -> np.ndarray | None:
        """The group of each training image, for `samplers`: int64 (images,), or None if `balance` is 'none'.

        balance: 'dataset' or 'camera', which define the groups; all frames of a tracklet have its group

        Raises UserError if there is only one data set or camera, or the cameras are unknown.
        """
        if balance == 'none':
            return None
        groups = self.set_of if balance == 'dataset' else [camid for _, _, camid in self.train]
        if balance == 'camera' and self.no_cameras:
            fault = 'does not name its cameras: add them, see docs/data.md'
        elif balance == 'camera':
            fault = 'has one camera to train on: give data with several'
        else:
            fault = 'is one data set: give several, as in -d A,B'
        if len(np.unique(groups)) < 2 or (balance == 'camera' and self.no_cameras):
            raise UserError(f'--balance {balance}: {plain(self.name, 500)} {fault}, or leave the option out')
        return np.repeat(np.array(groups, np.int64), [len(paths_of(item)) for item in self.train])

    def multi_query(self) -> list[Item]:
        """Images of the queries' persons in their cameras, over which --multi-query averages; here the queries."""
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

    def _counts(self) -> str:
        """A short text with the numbers of persons and items to train on, or to test if there are none."""
        unit = 'tracklets' if self.kind == 'video' else 'images'
        if self.train:
            return f'{self.num_train_pids} persons and {len(self.train)} {unit} to train on'
        return f'{self.num_query_pids} persons, {len(self.query)} queries and {len(self.gallery)} {unit} in the gallery'

    def _of_ones_own(self) -> list[str]:
        """Lines on how the cameras and the split of unpublished data were interpreted."""
        lines = [self.drawn] if self.drawn else []
        if self.no_cameras:
            lines.append('The cameras are unknown: a test counts matches from any camera, as with --any-camera')
        if self.camera_names and [*self.camera_names] == [*range(len(self.camera_names))]:
            lines.append(
                f'Cameras {_enumerated(self.camera_names.values())} are camids 0 to {len(self.camera_names) - 1}'
            )
        elif self.cameras and not self.published:
            lines.append(f'Cameras {_enumerated(self.cameras)} are camids 0 to {len(self.cameras) - 1}')
        return lines

    def parts(self) -> Mapping[str, Sequence[Item]]:
        """The subsets whose sizes are in `published`. Queries that are also in the gallery are not counted there."""
        queries = set(self.query)
        gallery = [item for item in self.gallery if item not in queries]
        return {'train': self.train, 'query': self.query, 'gallery': gallery}

    def differences(self) -> list[str]:
        """How the data set differs from the published one in persons and items of a subset, and in cameras.

        A missing training set does not count as a difference.
        """
        if not self.published:
            return []
        counts = {
            subset: (count_pids(items), len(items))
            for subset, items in self.parts().items()
            if items or not self.untrainable
        }
        differences = [
            '{}: {} ids, {} items instead of {} and {}'.format(subset, *counts[subset], *known)
            for subset, known in self.published.items()
            if subset in counts and counts[subset] != known
        ]
        if self.cameras:
            camids = f'camids 0 to {len(self.cameras) - 1}'
            numbers = _enumerated(self.cameras)
            differences.append(f'cameras {numbers} instead of 1 to {self.num_cameras} ({camids}, in this order)')
        return differences


def _enumerated(values: Iterable[object], most: int = 12) -> str:
    shown = [plain(str(value), 30) for value in values]
    return ', '.join(shown[:most]) + (' ...' if len(shown) > most else '')


def count_pids(items: Iterable[Item]) -> int:
    """The number of persons among the items of a data set."""
    return len({pid for _, pid, _ in items})


def ids_of(query: Sequence[Item], gallery: Sequence[Item]) -> list[np.ndarray]:
    """The pids of query and gallery, then their camids."""
    return [np.array([item[column] for item in items]) for column in (1, 2) for items in (query, gallery)]


def paths_of(item: Item) -> Sequence[str]:
    """The files of an item."""
    return (item[0],) if isinstance(item[0], str) else item[0]


def train_items(dataset: Dataset) -> list[Item]:
    """The training items with the pids of their persons in place of labels."""
    return [(paths, dataset.train_pids[label], camid) for paths, label, camid in dataset.train]


def cameras_of(dataset: Dataset, *subsets: Iterable[Item]) -> dict[int, str]:
    """The name of each camera of the items, for a data set made from them; {} if the cameras are unknown."""
    camids = sorted({camid for items in subsets for _, _, camid in items})
    return {} if dataset.no_cameras else {camid: dataset.camera_of(camid) for camid in camids}


def distractors(dataset: Dataset) -> set[int]:
    """The pids in the gallery that are not persons: 0, and a person named 0 or 0000, unless a query has this pid."""
    queries = {pid for _, pid, _ in dataset.query}
    return {
        pid for _, pid, _ in dataset.gallery if pid not in queries and (pid == 0 or not dataset.name_of(pid).strip('0'))
    }


def usable(read: Callable[[], list[AnyItem]], untrainable: str) -> tuple[list[AnyItem], str]:
    """What `read` returns, and ''; or [] and the reason: `untrainable`, or the message of a UserError of `read`."""
    if untrainable:
        return [], untrainable
    try:
        return read(), ''
    except UserError as fault:
        return [], str(fault)


def numbered(texts: Iterable[str], first: int, what: str) -> tuple[dict[str, int], dict[int, str]]:
    """A number for each text, and the text of each number if that is not the number itself.

    If all texts are integers of up to 18 digits, possibly padded with zeros (0002, or 00-1 as in MARS), these are the
    numbers. Otherwise the texts are numbered from `first` in natural order.

    Raises UserError, which begins with `what`, for two texts with the same number, such as 1 and 001.
    """
    different = sorted(set(texts), key=natural)
    if not all(map(INTEGER.fullmatch, different)):
        numbers = {text: number for number, text in enumerate(different, start=first)}
        return numbers, {number: text for text, number in numbers.items()}
    text_of: dict[int, str] = {}
    for text in different:
        if (other := text_of.setdefault(int(text.lstrip('0') or 0), text)) != text:
            raise UserError(f'{what} {other!r} and {text!r} have the same number; write them alike, or rename one')
    names = {number: text for number, text in text_of.items() if text != str(number)}
    return {text: number for number, text in text_of.items()}, names


def persons_of(texts: Iterable[str], where: str) -> tuple[dict[str, int], dict[int, str]]:
    """`numbered` for persons, from 1; prints if one is named like junk, which only an integer among integers is."""
    pid_of, names = numbered(texts, 1, f'{where}: persons')
    for text in pid_of if JUNK not in pid_of.values() else ():
        if INTEGER.fullmatch(text) and int(text.lstrip('0') or 0) == JUNK:
            other = next(name for name in pid_of if not INTEGER.fullmatch(name))
            print(f'{where}: {text!r} counts as a person, not as junk, because {plain(repr(other), 100)} is no integer')
    return pid_of, names


def natural(text: str) -> tuple[list[Any], str]:
    """Sort key that compares runs of digits by value: a2 before a10; ties are broken by the text itself."""
    parts = DIGITS.split(text)  # digits are at odd places
    if len(text) < LONG:
        parts[1::2] = map(int, parts[1::2])
    else:
        parts[1::2] = [int(digits) if len(digits) < LONG else math.inf for digits in parts[1::2]]
    return parts, text


def camids_of(*subsets: Iterable[Item], most: int = NUM_CAMERAS) -> tuple[dict[int, int], list[int]]:
    """The camid of each camera of the items: camera - 1 if all are in 1..`most`, otherwise from 0 in ascending order.

    Also returns the cameras, in ascending order, if they are not all in 1..`most`.
    """
    cameras = sorted({camera for items in subsets for _, _, camera in items})
    if all(1 <= camera <= most for camera in cameras):
        return {camera: camera - 1 for camera in cameras}, []
    return {camera: camid for camid, camera in enumerate(cameras)}, cameras


def listed(paths: Sequence[str], root: str, most: int = 3) -> str:
    """Files and folders as a text: how many of each, and the first `most`, relative to `root`."""
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
