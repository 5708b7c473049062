"""The user's own data: a folder for each person, with images or folders of frames. `-d folder:DIR`"""

import errno
import os
import re
from collections.abc import Iterator, Sequence, Set

from batches.decoding import SUFFIXES
from readers.split import one_of_each, smallest
from readers.tree import JUNK, SPLITS, Dataset, Item, natural, numbered, persons_of
from runtime.errors import UserError, plain

CAMERA = re.compile(r'(?:^|_)c([0-9]{1,9})(?![0-9])')  # 0002_c1s1_000451_03.jpg, c3_17.png
EXPECTED = 'it must contain a folder of images for each person, or train, query and gallery with these folders'

NO_SPLIT = {'': ''}  # the folders of the persons are in the root
NamedItem = tuple[str | tuple[str, ...], str, str]  # paths, person, camera or ''


class Folder(Dataset):
    """A folder for each person, named after the person, with images, or with tracklets, which are folders of frames.

    The folders of the persons are in train, query and gallery, in upper or lower case, if any of these exists.
    Otherwise a share of the persons, `test_share`, is drawn for the test by `seed`. All images of these persons form
    the gallery, with those of the distractors, which are in folders 0, 00, and so on. One image of each person and
    camera, also drawn, is a query, which stays in the gallery but never counts as its own match. Adding a person
    changes the assignment of few others.

    Pids are names: any text, numbered as in a `readers.table.Table`; junk (-1, or 00-1 as in MARS) is left out. The
    camera is the number after a c, which is at the beginning of the name of an image (or of a tracklet's folder) or
    after an underscore, as in Market1501. If any name has no such number, the cameras are unknown. Items are sorted by
    person and name, frames by name, in natural order: a2 before a10. Hidden files, and files that are not images
    (SUFFIXES), are skipped.

    Raises UserError if the folder is missing or contains no image of a person, if images and folders of frames are
    mixed, and for two spellings of the same number.
    """

    def __init__(self, root: str, name: str = 'folder', test_share: float = 0.5, seed: int = 1) -> None:
        passed_over: list[str] = []
        splits = _splits(root)
        if splits:
            passed_over += [entry.path for entry in _entries(root) if entry.name not in splits.values()]
        by_split = {split: _scan(os.path.join(root, name), passed_over) for split, name in (splits or NO_SPLIT).items()}
        persons = {person for items in by_split.values() for _, person, _ in items}
        pid_of, names = persons_of(persons, plain(root, 500))
        by_split = {split: [item for item in items if pid_of[item[1]] != JUNK] for split, items in by_split.items()}
        everything = [item for items in by_split.values() for item in items]
        if not everything:
            raise UserError(f'{plain(root, 500)} contains no image of a person; {EXPECTED}')
        images = [paths for paths, _, _ in everything if isinstance(paths, str)]
        tracklets = [os.path.dirname(paths[0]) for paths, _, _ in everything if not isinstance(paths, str)]
        if images and tracklets:
            raise UserError(
                f'{plain(root, 500)} contains images of some persons, and folders of frames of others, such as '
                f'{plain(images[0], 500)} and {plain(tracklets[0], 500)}; {EXPECTED}'
            )
        unknown = next((paths for paths, _, camera in everything if not camera), None)
        drawn = ''
        if not splits:
            nobody = {person for person in persons if not person.strip('0')}
            if nobody >= {person for _, person, _ in everything}:
                raise UserError(f'{plain(root, 500)} contains no image of a person; {EXPECTED}')
            by_split, drawn = _draw(everything, nobody, test_share, seed, by_camera=unknown is None)
            everything = list(dict.fromkeys(item for items in by_split.values() for item in items))
        camid_of = {'': 0}
        if unknown is None:
            camid_of, _ = numbered((camera for _, _, camera in everything), 0, f'{plain(root, 500)}: cameras')
        lists: list[list[Item]] = [
            [
                (paths, pid_of[person], 0 if unknown else camid_of[camera])
                for paths, person, camera in by_split.get(split, ())
            ]
            for split in SPLITS
        ]
        super().__init__(
            name,
            *lists,
            total=len(everything),
            lengths=[len(paths) for paths, _, _ in everything] if tracklets else [],
            passed_over=passed_over,
            names=names,
            no_cameras=unknown is not None,
            drawn=drawn,
        )
        known = sum(1 for _, _, camera in everything if camera)
        if unknown and known:
            first = plain(unknown if isinstance(unknown, str) else os.path.dirname(unknown[0]), 500)
            print(f'{known} of {len(everything)} names contain a camera, as in c1_; the first without one is {first}')


def kind_of(root: str) -> str:
    """'image' or 'video', according to the first non-empty folder of a person."""
    for name in (_splits(root) or NO_SPLIT).values():
        for person in _folders(os.path.join(root, name), []):
            for entry in _entries(person.path):
                if _is_folder(entry):
                    if _frames(entry.path, []):
                        return 'video'
                elif entry.name.lower().endswith(SUFFIXES):
                    return 'image'
    return 'image'


def _splits(root: str) -> dict[str, str]:
    """The names of the folders train, query and gallery, in any case; {} if there are none."""
    if not os.path.isdir(root):
        fault = 'is not a folder' if os.path.exists(root) else 'does not exist'
        raise UserError(f'{plain(root, 500)} {fault}; {EXPECTED}')
    folders = {
        entry.name.lower(): entry.name
        for entry in sorted(_entries(root), key=lambda each: each.name)
        if _is_folder(entry)
    }
    return {split: folders[split] for split in SPLITS if split in folders}


def _entries(folder: str) -> list[os.DirEntry]:
    """The entries of a folder except hidden files, in natural order."""
    try:
        with os.scandir(folder) as entries:
            seen = {entry.name: entry for entry in entries if entry.name[0] != '.'}
    except OSError as error:
        raise UserError(f'{plain(folder, 500)} cannot be read: {error.strerror}') from error
    return [seen[name] for name in sorted(seen, key=natural)]


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError as error:
        if error.errno == errno.ELOOP:  # a link to itself, which is like one to nowhere
            return False
        raise UserError(f'{plain(entry.path, 500)} cannot be read: {error.strerror}') from error


def _folders(folder: str, passed_over: list[str]) -> Iterator[os.DirEntry]:
    """The folders in `folder`; adds the rest to `passed_over`."""
    for entry in _entries(folder):
        if _is_folder(entry):
            yield entry
        else:
            passed_over.append(entry.path)


def _scan(folder: str, passed_over: list[str]) -> list[NamedItem]:
    """The items of all persons, by person and name."""
    items: list[NamedItem] = []
    for person in _folders(folder, passed_over):
        before = len(items)
        for entry in _entries(person.path):
            camera = CAMERA.search(entry.name)
            number = camera[1].lstrip('0') or '0' if camera else ''
            if entry.name.lower().endswith(SUFFIXES) and not _is_folder(entry):
                items.append((entry.path, person.name, number))
            elif _is_folder(entry) and (frames := _frames(entry.path, passed_over)):
                items.append((frames, person.name, number))
            else:
                passed_over.append(entry.path)
        if len(items) == before:
            passed_over.append(person.path)
    return items


def _frames(folder: str, passed_over: list[str]) -> tuple[str, ...]:
    frames: list[str] = []
    others: list[str] = []
    for entry in _entries(folder):
        is_frame = entry.name.lower().endswith(SUFFIXES) and not _is_folder(entry)
        (frames if is_frame else others).append(entry.path)
    if frames:
        passed_over += others
    return tuple(frames)


def _draw(
    items: Sequence[NamedItem], nobody: Set[str], share: float, seed: int, by_camera: bool
) -> tuple[dict[str, list[NamedItem]], str]:
    """The split by identity, and a line that describes how it was drawn.

    The persons with the smallest digests of (seed, name) are for the test: at least one if the share is above 0; if it
    is below 1, two or more are left for training, provided that there are three persons. `nobody`, the folders of
    distractors, are in the gallery only.
    """
    persons = {person for _, person, _ in items} - nobody
    number = round(share * len(persons))
    if 0 < share < 1:
        number = max(1, min(number, len(persons) - 2))
    chosen = smallest(persons, number, seed)
    gallery = [item for item in items if item[1] in chosen | nobody] if chosen else []
    of_persons = [item for item in gallery if item[1] in chosen]
    queries = one_of_each(of_persons, lambda item: (item[1], item[2] if by_camera else ''), _name, seed)
    split = {
        'train': [item for item in items if item[1] in persons - chosen],
        'query': queries,
        'gallery': gallery,
    }
    each = 'person and camera' if by_camera else 'person'
    return split, (
        f'Split by identity: {number} of {len(persons)} persons are for the test ({how_drawn(share, seed)}); one of '
        f'each {each} is a query'
    )


def how_drawn(share: float, seed: int) -> str:
    """The options by which a split was drawn, as in `Dataset.drawn`."""
    return f'--test-share {share:g}, --seed {seed}'


def _name(item: NamedItem) -> str:
    """The name of an item: person and file, or person and folder of a tracklet."""
    paths, person, _ = item
    return f'{person}/{os.path.basename(paths if isinstance(paths, str) else os.path.dirname(paths[0]))}'
