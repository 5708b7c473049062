"""Shared by all readers: the data set object, and the search for its folder."""

import os
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from runtime.errors import UserError

Image = tuple[str, int, int]  # path, pid, camid
Tracklet = tuple[tuple[str, ...], int, int]  # paths of the frames in order, pid, camid
Item = tuple[str | tuple[str, ...], int, int]  # either

IMAGE_TYPES = ('.jpg', '.jpeg', '.png')


class Dataset:
    """Training items, queries and gallery, lists of (path, pid, camid), or (tuple of paths, pid, camid) of tracklets.

    Args:
        train: with any integers as pids; they are relabelled 0..n-1 in ascending order.
        title: heading of the printed statistics; `name` by default.
        total: total number of items, if subsets share some.
        lengths: frames of each tracklet.

    Attributes:
        kind: 'image' or 'video', what the items are.
        train_pids: the original pid of each training label.
        num_train_pids, num_query_pids, num_gallery_pids: numbers of pids in the lists.

    Prints the original's table of statistics. Raises UserError for a training set with fewer than two persons.
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
    ):
        self.name = name
        self.train_pids = sorted({pid for _, pid, _ in train})
        if len(self.train_pids) < 2:
            whose = f'limited to one person ({paths_of(train[0])[0]} ...)' if train else 'empty'
            raise UserError(f'{name}: the training set is {whose}; at least two persons are needed')
        self.kind = 'image' if isinstance(train[0][0], str) else 'video'
        labels = {pid: label for label, pid in enumerate(self.train_pids)}
        self.train: list[Item] = [(paths, labels[pid], camid) for paths, pid, camid in train]
        self.query, self.gallery = list(query), list(gallery)
        self.num_train_pids, self.num_query_pids, self.num_gallery_pids = map(
            count_pids, (self.train, self.query, self.gallery)
        )
        total = len(train) + len(query) + len(gallery) if total is None else total
        print('\n'.join([f'=> {title or name} loaded', 'Dataset statistics:', *self._statistics(total, lengths)]))

    def multi_query(self) -> list[Item]:
        """Pictures of the queries' persons in their cameras, over which --multi-query averages: here the queries."""
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


def count_pids(items: Iterable[Item]) -> int:
    """The number of persons among the items of a data set."""
    return len({pid for _, pid, _ in items})


def ids_of(query: Sequence[Item], gallery: Sequence[Item]) -> list[np.ndarray]:
    """The pids of query and gallery, then their camids."""
    return [np.array([item[column] for item in items]) for column in (1, 2) for items in (query, gallery)]


def paths_of(item: Item) -> Sequence[str]:
    """The files of an item."""
    return (item[0],) if isinstance(item[0], str) else item[0]


def find(data_dir: str, name: str, folders: Sequence[str], parts: Mapping[str, str]) -> str:
    """The folder that contains all `parts`: data_dir/FOLDER or data_dir/FOLDER/FOLDER, for any of `folders`.

    parts: each with the hint that the error message gives for it

    Raises:
        UserError: there is none; the message shows the expected folders.
    """
    places = [os.path.join(data_dir, folder) for folder in folders]
    places += [os.path.join(place, folder) for place in places for folder in folders]
    missing = {place: [part for part in parts if not os.path.exists(os.path.join(place, part))] for place in places}
    for place in places:
        if not missing[place]:
            return place

    nearest = min(places, key=lambda place: len(missing[place]))
    if len(missing[nearest]) < len(parts):
        fault = f'{nearest} contains no {", no ".join(missing[nearest])}'
    else:
        fault = f"no {' or '.join(folders)} in --data-dir '{data_dir}'"
    tree = [os.path.join(data_dir, folders[0]) + os.sep]
    tree += [f'    {part}{"" if "." in part else os.sep}'.ljust(34) + hint for part, hint in parts.items()]
    advice = f'see data/README.md for where to download it; -d toy_{name} draws a toy in this format'
    if name.startswith('toy_'):
        advice = 'remove that folder, and the toy is drawn again'
    raise UserError('\n'.join([f'{fault}; expected:', *(line.rstrip() for line in tree), advice]))
