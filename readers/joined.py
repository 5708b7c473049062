"""Data sets made from others: several joined, `-d A,B`; query and gallery added to the training set, `--combine`."""

from collections.abc import Sequence

from files.paths import without_links
from readers.tree import Dataset, Item, cameras_of, distractors, paths_of, train_items
from runtime.errors import UserError, plain


class Joined(Dataset):
    """The items of several data sets, concatenated in each of train, query and gallery.

    Persons are renumbered from 1: first those of the first data set, then those of the second, and so on, in their
    original order. `names` contains them as SET/PERSON, because equal numbers in two data sets mean different persons.
    Distractors keep pid 0. Cameras are renumbered from 0 in the same way. If the cameras of one data set are unknown,
    all cameras count as unknown.

    Raises UserError if a data set is given twice, if images and videos are mixed, or if two training sets share files,
    because their persons would then have two labels.
    """

    def __init__(self, datasets: Sequence[Dataset]) -> None:
        _check_joinable(datasets)
        lists: tuple[list[Item], ...] = ([], [], [])  # train, query, gallery
        names: dict[int, str] = {}
        camera_names: dict[int, str] = {}
        no_cameras = any(dataset.no_cameras for dataset in datasets)
        for dataset in datasets:
            nobody: set[int] = set()
            parts = (train_items(dataset), nobody), (dataset.query, nobody), (dataset.gallery, distractors(dataset))
            pids = sorted({pid for items, ignored in parts for _, pid, _ in items if pid not in ignored})
            camids = sorted({camid for items, _ in parts for _, _, camid in items})
            pid_of = {pid: number for number, pid in enumerate(pids, start=len(names) + 1)}
            camid_of = {camid: 0 if no_cameras else number for number, camid in enumerate(camids, len(camera_names))}
            for joined, (items, ignored) in zip(lists, parts, strict=True):
                joined += [
                    (paths, 0 if pid in ignored else pid_of[pid], camid_of[camid]) for paths, pid, camid in items
                ]
            names |= {pid_of[pid]: f'{dataset.name}/{dataset.name_of(pid)}' for pid in pids}
            if not no_cameras:
                camera_names |= {camid_of[camid]: f'{dataset.name}/{dataset.camera_of(camid)}' for camid in camids}
        videos = any(not isinstance(items[0][0], str) for items in lists if items)
        super().__init__(
            ','.join(dataset.name for dataset in datasets),
            *lists,
            lengths=[len(paths_of(item)) for items in lists for item in items] if videos else [],
            names=names,
            camera_names=camera_names,
            no_cameras=no_cameras,
        )
        self.set_of = [number for number, dataset in enumerate(datasets) for _ in dataset.train]


def combined(dataset: Dataset) -> Dataset:
    """The data set with query, gallery and `extra` moved to the training set; its query and gallery are empty.

    Equal pids are one person. Distractors are left out, and items that are listed twice, such as a query that is also
    in the gallery, count once.
    """
    ignored = distractors(dataset)
    persons = [item for item in dataset.gallery if item[1] not in ignored]
    items: dict[tuple[str, ...], Item] = {}
    for item in (*train_items(dataset), *dataset.extra, *dataset.query, *persons):
        items.setdefault(tuple(paths_of(item)), item)
    train = [*items.values()]
    return Dataset(
        dataset.name,
        train,
        [],
        [],
        title=f'{dataset.name} with query and gallery in the training set',
        names=dataset.names,
        camera_names=cameras_of(dataset, train),
        no_cameras=dataset.no_cameras,
        brief=True,
    )


def _check_joinable(datasets: Sequence[Dataset]) -> None:
    by_file: dict[str, str] = {}
    for dataset in datasets:
        name = plain(dataset.name, 500)
        if [other.name for other in datasets].count(dataset.name) > 1:
            raise UserError(f'-d: {name} is given twice; give each data set once')
        kind, first = dataset.kind, datasets[0].kind
        if kind != first:
            raise UserError(
                f'-d: {plain(datasets[0].name, 500)} has {first}s, and {name} has {kind}s; give data sets of one kind'
            )
        files = _files(dataset)
        shared = [path for path in files if path in by_file]
        if shared:
            raise UserError(
                f'-d: {by_file[shared[0]]} and {name} share {len(shared)} files of their training sets, the first one '
                f'{plain(shared[0], 500)}, so that persons would have two labels; give one of the two'
            )
        by_file |= dict.fromkeys(files, name)


def _files(dataset: Dataset) -> list[str]:
    """The first file of each training item."""
    return without_links(paths_of(item)[0] for item in dataset.train)
