"""MSMT17: images listed in text files, with the person after each path and the camera in the image's name."""

import os
import re
from collections.abc import Mapping, Sequence

from files.kinds import HEAD, recognised
from readers.place import find
from readers.tree import Dataset, Image, Item, camids_of, count_pids, usable
from runtime.errors import UserError, plain

FOLDERS = ('msmt17', 'MSMT17_V1', 'MSMT17_V2')
VERSIONS = {'MSMT17_V1': ('train', 'test'), 'MSMT17_V2': ('mask_train_v2', 'mask_test_v2')}  # folders of the images
LISTS = ('list_train.txt', 'list_query.txt', 'list_gallery.txt')  # the required ones
TRAIN_PERSONS, TEST_PERSONS, MSMT17_CAMERAS = 1041, 3060, 15
PUBLISHED = {  # persons and images; query and gallery have the same persons
    'train and val': (TRAIN_PERSONS, 32621),
    'query and gallery': (TEST_PERSONS, 11659 + 82161),
}
# Path, camera, person: 0000/0000_000_01_0303morning_0015_0.jpg 0
LISTED_IMAGE = re.compile(r'((?:[^/]+/)*[^/_]+_[^/_]+_(\d{1,9})_[^/]*) (\d{1,9})', re.ASCII)


class Msmt17(Dataset):
    """MSMT17, images of 4101 persons in 15 cameras (Wei et al., Person Transfer GAN, CVPR 2018, arXiv:1711.08565).

    It is found in `data_dir` as msmt17, MSMT17_V1 or MSMT17_V2, in any spelling, possibly nested, or as `data_dir`
    itself. The images of version 1 are in train and test; those of version 2, with masked faces, in mask_train_v2 and
    mask_test_v2. If both versions exist, version 1 is read, unless only version 2 has a training set. Items are in the
    order of the lists.

    list_val.txt is left out of training, as in torchreid (but not in TransReID); `val` contains its items, with pids as
    in `train_pids`. On disk, training and test persons are both numbered from 0. Here training persons are 1 to 1041
    and test persons begin at 1042, so that no two share a number and none is 0, the pid of distractors. Camids are
    camera - 1, 0..14.

    Sources: torchreid and TransReID, which agree, for the folders of both versions, the lists, and the meaning of a
    line (path, person, and the camera as the third part of the name); the paper, as both quote it, for the numbers of
    persons, images and cameras. Only the totals of train and val together are checked: no source gives their parts.

    Raises UserError for a missing folder or list, a line that cannot be parsed, and an empty query or gallery. If only
    list_train.txt has such a fault, the training set is left empty, and `untrainable` is the message.
    """

    published, num_cameras, first_camera = PUBLISHED, MSMT17_CAMERAS, 1

    def __init__(self, data_dir: str = 'data') -> None:
        root, version, untrainable = _find(data_dir)
        folders = dict(zip(('train', 'test'), VERSIONS[version], strict=True))

        def read(part: str, folder: str, first: int, most: int) -> list[Image]:
            return _read(os.path.join(root, f'list_{part}.txt'), os.path.join(root, folders[folder]), first, most)

        train, untrainable = usable(lambda: read('train', 'train', 1, TRAIN_PERSONS), untrainable)
        val, _ = usable(lambda: read('val', 'train', 1, TRAIN_PERSONS), untrainable)
        query, gallery = (read(part, 'test', 1 + TRAIN_PERSONS, 2**31) for part in ('query', 'gallery'))
        camids, cameras = camids_of(train, val, query, gallery, most=MSMT17_CAMERAS)
        train, self.val, query, gallery = (
            [(path, pid, camids[camera]) for path, pid, camera in items] for items in (train, val, query, gallery)
        )
        self.lists = {'train and val': train and train + self.val, 'query and gallery': query + gallery}
        super().__init__(
            'msmt17', train, query, gallery, title=version, untrainable=untrainable, cameras=cameras, extra=self.val
        )
        if self.val:
            print(f'list_val.txt, {len(self.val)} images of {count_pids(self.val)} persons, is left out')

    def parts(self) -> Mapping[str, Sequence[Item]]:
        return self.lists


def _find(data_dir: str) -> tuple[str, str, str]:
    """The folder, its version, and why it cannot be trained on, '' if it can. Raises UserError if there is none."""
    faults, untrained = [], []
    for version, (train, test) in VERSIONS.items():
        parts = {train: '0000/0000_000_01_0303morning_0015_0.jpg ...', test: ''} | dict.fromkeys(LISTS, '')
        try:
            root, untrainable = find(data_dir, 'msmt17', FOLDERS, parts, (train, 'list_train.txt'))
        except UserError as fault:
            faults.append(fault)
            continue
        if not untrainable:
            return root, version, ''
        untrained.append((root, version, untrainable))
    if untrained:
        return untrained[0]
    raise min(faults, key=lambda fault: str(fault).count(' no '))  # of the more complete version


def _read(path: str, folder: str, first: int, most: int) -> list[Image]:
    """(path, pid, camera) of each line of a list; its persons, at most `most`, are numbered from `first`."""
    try:
        with open(path, 'rb') as file:
            content = file.read()
        if what := recognised(content[:HEAD]):
            raise UserError(f'{path} {what}')
        lines = content.decode().split('\n')
    except (OSError, UnicodeError) as error:
        reason = plain(getattr(error, 'strerror', None) or str(error))
        raise UserError(f'{path} cannot be read as a list of images ({reason}); get it again') from error
    items = []
    prefix = os.path.join(folder, '')
    for number, line in enumerate(lines, start=1):
        if not (line := line.rstrip('\r ')):
            continue
        match = LISTED_IMAGE.fullmatch(line)
        if not match or '\0' in line or '..' in match[1].split('/') or int(match[3]) >= most:
            raise UserError(
                f'{path}, line {number}: {plain(repr(line))} cannot be parsed; it must be a path and a person, from 0 '
                f'to {most - 1}, as in 0000/0000_000_01_0303morning_0015_0.jpg 0'
            )
        items.append((prefix + match[1], int(match[3]) + first, int(match[2])))
    if not items:
        raise UserError(f'{path} names no image; get it again')
    return items
