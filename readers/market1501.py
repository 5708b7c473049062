"""Market1501: images whose names contain person and camera."""

import os
import re
from collections.abc import Sequence

from batches.decoding import SUFFIXES
from readers.place import find
from readers.tree import MAX_PID, Dataset, Image, Item, camids_of, listed, usable
from runtime.errors import UserError, plain

FOLDERS = ('market1501', 'Market-1501-v15.09.15')  # the name in the original's README, and the archive's
PARTS = {
    'bounding_box_train': '0002_c1s1_000451_03.jpg ...',
    'query': '0001_c1s1_001051_00.jpg ...',
    'bounding_box_test': '0001_c1s1_002301_00.jpg, -1_c1s1_000401_03.jpg ...',
}
TRAINING = ('bounding_box_train',)  # needed for training only
PUBLISHED = {'train': (751, 12936), 'query': (750, 3368), 'gallery': (751, 15913)}
NAME = re.compile(r'(-?\d+)_c(\d+)', re.ASCII)  # 0002_c1s1_000451_03.jpg: pid 2, camera 1


class Market(Dataset):
    """Images in the folders and with the names of Market1501, of any persons and cameras: `-d market:DIR`.

    Person and camera are read from the file name only. Junk (pid -1) is dropped, distractors (pid 0) stay in the
    gallery; hidden files, folders and files that are not images (SUFFIXES) are skipped. Pids of query and gallery are
    as on disk. Camids are camera - 1, which is 0..5; if there are cameras other than 1..6, all cameras are numbered
    from 0 in ascending order. Items are sorted by file name.

    Args:
        root: the folder that contains bounding_box_train, query and bounding_box_test.
        name: the name under which it was requested.
        untrainable: why it cannot be trained on, if that is already known.
        whole: whether it is a published data set. Otherwise some of the three folders may be missing.
        distractors: more folders whose images are part of the gallery.

    Raises UserError for a missing folder, a folder without images, an image whose name cannot be parsed, and a pid
    below -1 or above MAX_PID. If only the training set has such a fault, it is left empty, and `untrainable` is the
    message.
    """

    first_camera = 1

    def __init__(
        self,
        root: str,
        name: str = 'market',
        *,
        title: str = '',
        untrainable: str = '',
        whole: bool = False,
        distractors: Sequence[str] = (),
    ) -> None:
        self.root, self.whole = root, whole
        passed_over: list[str] = []
        if not whole and not any(os.path.isdir(os.path.join(root, part)) for part in PARTS):
            raise UserError(
                f'{plain(root, 500)} contains none of the folders {", ".join(PARTS)}; give the one that does'
            )

        def scan(part: str) -> list[Image]:
            folder = os.path.join(root, part)
            return _scan(folder, passed_over) if whole or os.path.isdir(folder) else []

        train, untrainable = usable(lambda: scan('bounding_box_train'), untrainable)
        query = scan('query')
        gallery = [item for part in ('bounding_box_test', *distractors) for item in scan(part)]
        self.camids, cameras = camids_of(train, query, gallery)
        subsets = (
            [(path, pid, self.camids[camera]) for path, pid, camera in items] for items in (train, query, gallery)
        )
        super().__init__(name, *subsets, title=title, untrainable=untrainable, cameras=cameras, passed_over=passed_over)

    def multi_query(self) -> list[Item]:
        """The hand-drawn boxes in gt_bbox, of all persons and cameras.

        Raises UserError if this folder is missing, and for invalid names in it, as in the other folders. The user's own
        data need no such folder: the queries are used instead.
        """
        folder = os.path.join(self.root, 'gt_bbox')
        if not os.path.isdir(folder) or not _names_in(folder):
            if not self.whole:
                return self.query
            again = 'it is part of Market-1501-v15.09.15.zip: unzip that again'
            if self.name.startswith('toy_'):
                again = 'remove the folder of the toy, and it is drawn again'
            raise UserError(f'--multi-query needs {folder}, which is missing or empty; {again}, or omit the option')
        boxes = _scan(folder, [])
        return [(path, pid, self.camids[camera]) for path, pid, camera in boxes if camera in self.camids]


class Market1501(Market):
    """Market1501, images of 1501 persons in 6 cameras (Zheng et al., Scalable Person Re-identification, ICCV 2015).

    It is found in `data_dir` as market1501 or Market-1501-v15.09.15, in any spelling, possibly nested once, or as
    `data_dir` itself. `name` is market1501 or toy_market1501. It is read like any `Market`, with all three parts.
    """

    def __init__(self, data_dir: str = 'data', name: str = 'market1501') -> None:
        root, untrainable = find(data_dir, name, FOLDERS if name == 'market1501' else (name,), PARTS, TRAINING)
        self.published = PUBLISHED if name == 'market1501' else {}
        title = 'Market1501' if name == 'market1501' else name
        super().__init__(root, name, title=title, untrainable=untrainable, whole=True)


def _scan(folder: str, passed_over: list[str]) -> list[Image]:
    """(path, pid, camera) of the images in a folder, without junk, sorted by name; adds the rest to `passed_over`."""
    names = _names_in(folder)
    items, others = [], []
    for name in names:
        if name.startswith('.') or not name.lower().endswith(SUFFIXES):
            others.append(os.path.join(folder, name))
            continue
        match = NAME.match(name)
        if not match:
            raise UserError(
                f'{folder}: the name {plain(repr(name))} cannot be parsed; it must start with person and camera, as in '
                '0002_c1s1_'
            )
        pid, camera = map(int, match.groups())
        if pid == -1:
            continue
        if not 0 <= pid <= MAX_PID:
            raise UserError(
                f'{folder}: {plain(repr(name))} has person {plain(str(pid), 30)}, but persons are numbered from 0 to '
                f'{MAX_PID}, and -1 is junk'
            )
        items.append((os.path.join(folder, name), pid, camera))
    if not items:
        raise UserError(f'{folder} contains no images of persons{_instead(folder, others, len(names))}')
    passed_over += others
    return items


def _names_in(folder: str) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError as error:
        raise UserError(f'{folder} cannot be read: {error.strerror}') from error


def _instead(folder: str, others: list[str], total: int) -> str:
    """For the error message: what a folder without images contains instead, and what to do."""
    if not total:
        return '; it is empty: unzip the data set again, or put images there, such as 0002_c1s1_000451_03.jpg'
    if len(others) < total:
        return ', but only junk (pid -1); add images, such as 0002_c1s1_000451_03.jpg'
    deep = any(map(os.path.isdir, others))
    advice = f'move the images from its folders up into {folder}' if deep else f'images are {", ".join(SUFFIXES)}'
    return f', but {listed(others, folder)}; {advice}'
