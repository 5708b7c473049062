"""A contact sheet: one picture of each person in each camera, as an overview of a data set."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

import page
from page.lists import thumbnail
from readers.tree import Dataset, Item, distractors, paths_of, train_items
from runtime.errors import UserError, plain

PRIVATE = 'a page of pictures of people: do not publish it'
ENDING = 'sheet.html'  # of the file's name; git ignores such files
PERSONS, CAMERAS = 400, 24  # rows and columns at the most
FRAMES_ON_SHEET = 3  # of a tracklet


def write(dataset: Dataset, out: str | Path) -> Path:
    """Write the page, completely or not at all, and return its path.

    Rows are persons, in the order of their pids; distractors are left out, and their number is shown. Columns are
    cameras, named as in the data; there is a single column if the cameras are unknown. A cell contains the first
    picture of that person in that camera, and the number of pictures. Of more than PERSONS persons, evenly spaced ones
    are shown, and of more than CAMERAS cameras the first ones.

    Raises:
        UserError: the name does not end in ENDING, there is no image, or the page cannot be written.
    """
    path = Path(out)
    if not path.name.endswith(ENDING):
        raise UserError(
            f'--sheet {plain(str(out), 500)}: the name must end in {ENDING}, which git ignores: it is {PRIVATE}'
        )
    persons: dict[int, dict[int, list[Item]]] = {}
    parts: dict[int, set[str]] = {}
    nobody, left_out = distractors(dataset), 0
    for part, items in (('train', train_items(dataset)), ('test', dataset.query), ('test', dataset.gallery)):
        for item in items:
            pid = item[1]
            if part == 'test' and pid in nobody:
                left_out += 1
                continue
            persons.setdefault(pid, {}).setdefault(item[2], []).append(item)
            parts.setdefault(pid, set()).add(part)
    if not persons:
        raise UserError(f'{plain(dataset.name, 500)} has no image to show')
    pids = _spaced(sorted(persons), PERSONS)
    camids = sorted({camid for pid in pids for camid in persons[pid]})
    shown = f'{len(pids)} of {len(persons)} persons' if len(pids) < len(persons) else f'{len(pids)} persons'
    shown += f' in the first {CAMERAS} of {len(camids)} cameras' if len(camids) > CAMERAS else ''
    camids = camids[:CAMERAS]
    rows = [
        {
            'name': dataset.name_of(pid),
            'parts': ' and '.join(sorted(parts[pid], reverse=True)),
            'cells': [_cell(persons[pid].get(camid, [])) for camid in camids],
        }
        for pid in pids
    ]
    unit = 'tracklets' if dataset.kind == 'video' else 'images'
    return page.render(
        path,
        'sheet.html.j2',
        title=f'{plain(dataset.name, 200)}: contact sheet',
        rows=rows,
        cameras=[f'camera {"unknown" if dataset.no_cameras else dataset.camera_of(camid)}' for camid in camids],
        shown=shown,
        left_out=f'{left_out} {unit} of distractors are not shown' if left_out else '',
        private=PRIVATE,
    )


def _cell(items: Sequence[Item]) -> dict[str, object] | None:
    if not items:
        return None
    paths = tuple(paths_of(items[0]))
    return {'image': thumbnail(paths, FRAMES_ON_SHEET), 'name': Path(paths[0]).name, 'number': len(set(items))}


def _spaced(pids: list[int], most: int) -> list[int]:
    """All pids, or `most` of them, evenly spaced."""
    places = np.linspace(0, len(pids) - 1, min(len(pids), most)).round().astype(int)
    return [pids[place] for place in places]
