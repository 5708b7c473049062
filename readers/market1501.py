"""Market1501: images whose names contain person and camera."""

import os
import re

from readers.tree import IMAGE_TYPES, Dataset, Image, Item, find
from runtime.errors import UserError, plain

FOLDERS = ('market1501', 'Market-1501-v15.09.15')  # as the original's README renamed it, and as the archive unpacks
PARTS = {
    'bounding_box_train': '0002_c1s1_000451_03.jpg ...',
    'query': '0001_c1s1_001051_00.jpg ...',
    'bounding_box_test': '0001_c1s1_002301_00.jpg, -1_c1s1_000401_03.jpg ...',
}
PUBLISHED = {'train': (751, 12936), 'query': (750, 3368), 'gallery': (751, 15913)}
NUM_CAMERAS = 6  # 1..6 on disk, camid 0..5 here
NAME = re.compile(r'(-1|\d{1,9})_c(\d+)', re.ASCII)  # 0002_c1s1_000451_03.jpg: pid 2, camera 1


class Market1501(Dataset):
    """Market1501, images of 1501 persons in 6 cameras (Zheng et al., Scalable Person Re-identification, ICCV 2015).

    Found in `data_dir` as market1501 or Market-1501-v15.09.15, also nested once. Person and camera are read from the
    file name only. Junk (pid -1) is dropped, distractors (pid 0) stay in the gallery; hidden files and files that are
    not images (Thumbs.db) are ignored. Pids of query and gallery are as on disk; camids are 0..5. Items are sorted by
    file name.

    `name` is market1501 or toy_market1501. Raises UserError for a missing folder, a folder without images, an image
    whose name cannot be parsed, a camera outside 1..6, and a training set with a single person.
    """

    def __init__(self, data_dir: str = 'data', name: str = 'market1501') -> None:
        self.root = root = find(data_dir, name, FOLDERS if name == 'market1501' else (name,), PARTS)
        train, query, gallery = (_scan(os.path.join(root, part)) for part in PARTS)
        self.published = PUBLISHED if name == 'market1501' else {}
        super().__init__(name, train, query, gallery, title='Market1501' if name == 'market1501' else name)

    def multi_query(self) -> list[Item]:
        """The hand-drawn boxes in gt_bbox, of all persons and cameras.

        Raises UserError if that folder is missing, and for the names in it as for those of the other folders.
        """
        folder = os.path.join(self.root, 'gt_bbox')
        if not os.path.isdir(folder):
            again = (
                'remove the folder of the toy, and it is drawn again'
                if self.name.startswith('toy_')
                else ('it is part of Market-1501-v15.09.15.zip: unzip that again')
            )
            raise UserError(f'--multi-query needs {folder}, which is missing; {again}, or omit the option')
        return [*_scan(folder)]


def _scan(folder: str) -> list[Image]:
    """The images of one folder without junk, sorted by name."""
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        raise UserError(f'{folder} cannot be read: {error.strerror}') from error
    items = []
    for name in names:
        if name.startswith('.') or not name.lower().endswith(IMAGE_TYPES):
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
        if not 1 <= camera <= NUM_CAMERAS:
            raise UserError(f'{folder}: {plain(repr(name))} has camera {camera}, but cameras are 1 to {NUM_CAMERAS}')
        items.append((os.path.join(folder, name), pid, camera - 1))
    if not items:
        kinds = ', '.join(IMAGE_TYPES)
        raise UserError(f'{folder} contains no images of persons ({kinds}); unzip the data set there again')
    return items
