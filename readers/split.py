"""Draws persons for a test or a validation, and the queries among their items.

Everything is drawn by digests of (seed, name), so adding a person or an item changes the assignment of few others.
"""

import hashlib
import os
from collections.abc import Callable, Hashable, Iterable
from typing import TypeVar

from readers.tree import Dataset, Item, cameras_of, paths_of, train_items
from runtime.errors import UserError, plain

T = TypeVar('T')


def smallest(names: Iterable[str], number: int, seed: int) -> set[str]:
    """The `number` names with the smallest digests."""
    return set(sorted(set(names), key=lambda name: digest(name, seed))[:number])


def one_of_each(items: Iterable[T], key: Callable[[T], Hashable], name: Callable[[T], str], seed: int) -> list[T]:
    """The item with the smallest digest of its name for each key, in the order in which the keys appear."""
    chosen: dict[Hashable, tuple[bytes, T]] = {}
    for item in items:
        mark = digest(name(item), seed)
        if (known := chosen.get(key(item))) is None or mark < known[0]:
            chosen[key(item)] = mark, item
    return [item for _, item in chosen.values()]


def digest(text: str, seed: int) -> bytes:
    return hashlib.sha256(f'{seed} {text}'.encode(errors='surrogateescape')).digest()


def hold_out(dataset: Dataset, share: float, seed: int) -> tuple[Dataset, Dataset | None]:
    """Hold out persons of the training set: returns the data set without them, and a validation set of these persons.

    A share (0..1) of the persons that can form a query is held out: persons seen by two cameras or, if the cameras are
    unknown, with two items. The others stay in training. At least one person is held out, and at least two are left. As
    in `readers.folder`, the persons with the smallest digests of (seed, name) are held out; all their items form the
    gallery, and one of each person and camera is a query, which stays in the gallery but never counts as its own match.

    Returns the data set itself and None if no person can form a query. Raises UserError if fewer than two persons would
    be left to train on.
    """
    items, name = train_items(dataset), plain(dataset.name, 500)
    seen: dict[int, set[Hashable]] = {}
    for item in items:
        seen.setdefault(item[1], set()).add(tuple(paths_of(item)) if dataset.no_cameras else item[2])
    able = {dataset.name_of(pid): pid for pid, places in seen.items() if len(places) > 1}
    if not able:
        return dataset, None
    if len(seen) < 3:
        raise UserError(
            f'--validate {share:g}: {name} has {len(seen)} persons to train on; if one is held out, fewer than two are '
            'left: omit the option, or add persons'
        )
    number = max(1, min(round(share * len(able)), len(seen) - 2))
    chosen = {able[person] for person in smallest(able, number, seed)}
    gallery = [item for item in items if item[1] in chosen]
    query = one_of_each(
        gallery,
        lambda item: (item[1], 0 if dataset.no_cameras else item[2]),
        lambda item: f'{dataset.name_of(item[1])}/{_file(item)}',
        seed,
    )
    each = 'person' if dataset.no_cameras else 'person and camera'
    drawn = (
        f'Held out of training: {number} of the {len(able)} persons of {name} who can be a query (--validate '
        f'{share:g}, --seed {seed}); one of each {each} is a query'
    )
    print(drawn)
    names = dataset.names
    left = [item for item in items if item[1] not in chosen]
    rest = Dataset(
        dataset.name,
        left,
        dataset.query,
        dataset.gallery,
        title=f'{dataset.name} without the persons held out',
        names=names,
        camera_names=cameras_of(dataset, items, dataset.query, dataset.gallery),
        no_cameras=dataset.no_cameras,
        brief=True,
    )
    validation = Dataset(
        f'validation of {dataset.name}',
        [],
        query,
        gallery,
        untrainable='the persons of a validation are not trained on',
        names=names,
        camera_names=cameras_of(dataset, gallery),
        no_cameras=dataset.no_cameras,
        drawn=drawn,
        brief=True,
    )
    return rest, validation


def _file(item: Item) -> str:
    """The name of the file; for a tracklet with its folder, because tracklets may have frames of the same name."""
    folder, name = os.path.split(paths_of(item)[0])
    return name if isinstance(item[0], str) else f'{os.path.basename(folder)}/{name}'
