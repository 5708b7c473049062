"""The check of a data set: faults, and notes, which need not be mistakes."""

from collections.abc import Iterable, Iterator, Mapping

from readers import pictures
from readers.pictures import Look
from readers.tree import Dataset, Item, distractors, paths_of, train_items

Finding = tuple[bool, str, list[str]]  # whether it is a fault, what it is, and its cases (none if all is well)


def check(dataset: Dataset, why: str, jobs: int = 1) -> Iterable[Finding]:
    """Faults of a data set, and notes, which need not be mistakes. Opens every image, in `jobs` processes.

    Faults are a training set that cannot be used (`why`), statistics that differ from the known ones, files that
    cannot be read, persons that are in both the training set and the test sets, files that are listed for two persons,
    and byte-equal files of two persons. For MARS both protocols are examined, regardless of which was read. Persons are
    named as on disk; distractors (pid 0) do not count as persons.
    """
    train = train_items(dataset)
    queries, nobody = set(dataset.query), distractors(dataset)
    others = [item for item in dataset.gallery if item not in queries]  # as in the original's protocol of MARS

    yield True, 'training set that cannot be used', [why] if why else []
    yield True, 'statistics that differ from the known ones', dataset.differences()
    yield False, 'files and folders that are not read', list(dataset.passed_over)

    shared = set(dataset.train_pids) & {pid for _, pid, _ in dataset.query + others}
    yield True, 'persons in both the training set and the test sets', list(map(dataset.name_of, sorted(shared)))
    if not dataset.no_cameras:
        persons = [item for item in dataset.query + others if item[1] not in nobody]
        for subset, items in ('the training set', train), ('the test sets', persons):
            cameras = _cameras_of(items)
            alone = [dataset.name_of(pid) for pid in sorted(cameras) if len(cameras[pid]) == 1]
            yield False, f'persons of {subset} seen by one camera only', alone
    yield from _unmatched(dataset, others)
    yield from _of_images(dataset, train, dataset.query + others, jobs)


def _unmatched(dataset: Dataset, others: list[Item]) -> Iterator[Finding]:
    """Queries without a match, under each protocol."""
    protocols = {'': dataset.gallery}
    if dataset.name.removesuffix('_official') in ('mars', 'toy_mars'):
        protocols = {' under mars': others, ' under mars_official': others + dataset.query}
    query = dataset.query
    for protocol, items in protocols.items():
        cameras = _cameras_of(items)
        rows = [(paths_of(item)[0], cameras.get(item[1]), item[2]) for item in query]
        absent = [path for path, seen, _ in rows if seen is None]
        yield False, f'queries without a match{protocol} (the person is not in the gallery)', absent
        if dataset.no_cameras:
            files: dict[int, set[str | tuple[str, ...]]] = {}
            for paths, pid, _ in items:
                files.setdefault(pid, set()).add(paths)
            alone = [paths_of(item)[0] for item in query if files.get(item[1]) == {item[0]}]
            yield False, 'queries without a match (the person has no other file in the gallery)', alone
            continue
        same = [path for path, seen, camid in rows if seen == {camid}]
        hint = '; if the cameras are unknown, test with --any-camera' if len(same) + len(absent) == len(query) else ''
        yield False, f'queries without a match{protocol} (the person is in the same camera only{hint})', same


def _of_images(dataset: Dataset, train: list[Item], test: list[Item], jobs: int) -> Iterator[Finding]:
    """The findings that need all images to be opened."""
    persons: dict[str, set[int]] = {}  # for whom each file is listed
    for items, ignored in ((train, set[int]()), (test, distractors(dataset))):
        for item in items:
            for path in paths_of(item):
                persons.setdefault(path, set()).update({item[1]} - ignored)
    looks = dict(zip(persons, pictures.look_at_all(list(persons), jobs), strict=True)) if persons else {}
    unread = [look.reason for look in looks.values() if look.reason]
    yield True, f'files (of {len(persons)}) that cannot be read', unread
    listed = [f'{path} for {len(pids)} persons' for path, pids in persons.items() if len(pids) > 1]
    yield True, 'files that are listed for several persons', listed
    copies: dict[bytes, list[str]] = {}
    for path, look in looks.items():
        if not look.reason:
            copies.setdefault(look.digest, []).append(path)
    groups: dict[bool, list[str]] = {True: [], False: []}  # whether of two persons
    for paths in copies.values():
        if len(paths) > 1:
            groups[len(set().union(*(persons[path] for path in paths))) > 1].append(' = '.join(paths))
    yield True, 'groups of byte-equal files of different persons', groups[True]
    yield False, 'groups of byte-equal files of one person or of distractors', groups[False]
    empty = [path for path, look in looks.items() if look.contrast < pictures.EMPTY]
    yield False, 'images that show nothing (nearly one shade of grey)', empty
    blurred = {path: look.sharpness for path, look in looks.items() if look.sharpness < pictures.BLURRED}
    for path in empty:
        blurred.pop(path, None)
    yield False, 'images that are very blurred, the worst first', sorted(blurred, key=lambda path: blurred[path])
    one, other = ([paths_of(item)[0] for item in items] for items in (train, test))  # the first frames of tracklets
    yield False, *_near_duplicates(looks, one, other)


def _near_duplicates(looks: Mapping[str, Look], train: list[str], test: list[str]) -> tuple[str, list[str]]:
    """The description of this finding, and the pairs, the most similar first."""
    what = 'near-duplicates in the training set and the test sets'
    if not pictures.can_hash():
        return f'{what} were not looked for', ['pip install imagehash, and check again'] if train and test else []
    train, test = ([path for path in paths if looks[path].bits] for paths in (train, test))
    one, other = ([looks[path].bits for path in paths] for paths in (train, test))
    pairs = sorted((bits, train[i], test[j]) for i, j, bits in pictures.near_duplicates(one, other))
    return what, [f'{first} ~ {second}' for _, first, second in pairs]


def _cameras_of(items: Iterable[Item]) -> dict[int, set[int]]:
    cameras: dict[int, set[int]] = {}
    for _, pid, camid in items:
        cameras.setdefault(pid, set()).add(camid)
    return cameras
