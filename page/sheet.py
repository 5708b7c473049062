"""A contact sheet: one picture of each person in each camera, to see at a glance what a data set holds."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

import page
from page.lists import thumbnail
from readers.tree import Dataset, Item, paths_of
from runtime.errors import UserError, plain

PRIVATE = 'a page of pictures of people: do not publish it'
ENDING = 'sheet.html'  # of its name; git ignores it
PERSONS, CAMERAS = 400, 24  # rows and columns at the most
FRAMES = 3  # of a tracklet


def write(dataset: Dataset, out: str | Path) -> Path:
    """Write the page, completely or not at all, and return its path.

    Rows are persons, in the order of their pids, and columns are cameras, or one column if the cameras are unknown. A
    cell has the first picture of that person in that camera, and how many there are. Of more than PERSONS persons,
    evenly spaced ones are shown, and of more than CAMERAS cameras the first ones.

    Raises:
        UserError: the name does not end as git ignores it, there is no image, or the page cannot be written.
    """
    path = Path(out)
    if not path.name.endswith(ENDING):
        raise UserError(
            f'--sheet {plain(str(out), 500)}: the name must end in {ENDING}, which git ignores: it is {PRIVATE}'
        )
    persons: dict[int, dict[int, list[Item]]] = {}
    parts: dict[int, set[str]] = {}
    for part in ('train', 'query', 'gallery'):
        for item in getattr(dataset, part):
            pid = dataset.train_pids[item[1]] if part == 'train' else item[1]
            persons.setdefault(pid, {}).setdefault(item[2], []).append(item)
            parts.setdefault(pid, set()).add('train' if part == 'train' else 'test')
    if not persons:
        raise UserError(f'{plain(dataset.name, 500)} has no image to show')
    pids = _spaced(sorted(persons), PERSONS)
    camids = sorted({camid for pid in pids for camid in persons[pid]})[:CAMERAS]
    rows = [
        {
            'name': dataset.name_of(pid) if pid or dataset.names else '0, distractors',
            'parts': ' and '.join(sorted(parts[pid], reverse=True)),
            'cells': [_cell(persons[pid].get(camid, [])) for camid in camids],
        }
        for pid in pids
    ]
    return page.render(
        path,
        'sheet.html.j2',
        title=f'{plain(dataset.name, 200)}: contact sheet',
        rows=rows,
        cameras=['camera unknown'] if dataset.no_cameras else [_camera(dataset, camid) for camid in camids],
        shown=f'{len(pids)} of {len(persons)} persons' if len(pids) < len(persons) else f'{len(pids)} persons',
        private=PRIVATE,
    )


def _camera(dataset: Dataset, camid: int) -> str:
    return f'camera {dataset.camera_names.get(camid, camid)}'


def _cell(items: Sequence[Item]) -> dict[str, object] | None:
    if not items:
        return None
    paths = tuple(paths_of(items[0]))
    return {'image': thumbnail(paths, FRAMES), 'name': Path(paths[0]).name, 'number': len(set(items))}


def _spaced(pids: list[int], most: int) -> list[int]:
    """All pids, or `most` of them, evenly spaced."""
    places = np.linspace(0, len(pids) - 1, min(len(pids), most)).round().astype(int)
    return [pids[place] for place in places]
