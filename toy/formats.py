"""Writes the toy data sets to disk in the layouts of published ones: folders, file names, lists and .mat tables."""

import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from pathlib import Path

import numpy as np
from numpy.random import Generator

from toy.people import Person, random_persons
from toy.scenes import TOY_CAMERAS, photograph, random_camera
from toy.views import View, harder, random_view, walk


def draw_market1501(
    folder: str | os.PathLike[str],
    *,
    num_train: int = 96,
    num_test: int = 40,
    num_distractors: int = 20,
    num_images: int = 8,
    height: int = 96,
    width: int = 48,
    seed: int = 0,
    hard: bool = False,
) -> None:
    """Draw an image data set into `folder` in Market1501's format, unless the folder exists.

    Each of `num_train` persons has `num_images` images, two from each of several cameras. Each of `num_test` other
    persons is seen by the same number of cameras, with one query image and two gallery images from each. The gallery
    also contains `num_distractors` images of strangers (pid 0) and as many junk images (pid -1), in which bodies are
    partly outside the frame. gt_bbox contains a copy of each query and two more images of its person in its camera. If
    `hard`, the images show the same persons with more occlusion and more changes of light (`views.harder`).

    The folder is either complete or absent: it is drawn under a temporary name and then renamed, so several processes
    may draw it at once. Equal arguments give equal images. Raises OSError if it cannot be written.
    """
    rng = np.random.default_rng([seed, 1501])
    frames = count(25, 25)

    def draw(root: Path) -> None:
        cameras = [random_camera(kind, height, width, rng) for kind in range(TOY_CAMERAS)]
        for part in 'bounding_box_train', 'query', 'bounding_box_test', 'gt_bbox':
            (root / part).mkdir()
        queries = []  # arguments of `shoot`

        def shoot(part: str, pid: int, person: Person, camera: int, view: View) -> None:
            begin = '-1' if pid < 0 else f'{pid:04d}'
            name = f'{begin}_c{camera + 1}s1_{next(frames):06d}_{rng.integers(1, 5):02d}.jpg'
            seen = harder(view) if hard else view
            photograph(root / part / name, person, cameras[camera], seen, height, width, rng)
            if part == 'query':
                shutil.copyfile(root / part / name, root / 'gt_bbox' / name)
                queries.append((pid, person, camera))

        persons = random_persons(num_train + num_test + 2 * num_distractors, rng)
        for index, person in enumerate(persons[: num_train + num_test]):
            pid = 2 * index + 2 - index % 3 // 2  # with gaps, like the real ones
            parts = ['bounding_box_train'] * 2 if index < num_train else ['query'] + ['bounding_box_test'] * 2
            for camera in _some_cameras(num_images // 2, rng):
                for part in parts:
                    shoot(part, pid, person, camera, random_view(rng))
        for index, person in enumerate(persons[num_train + num_test :]):
            pid, view = -(index % 2), random_view(rng)
            if pid == -1:
                view = replace(view, x=view.x + rng.choice([-0.3, 0.3]), y=view.y + rng.choice([-0.4, 0.4]))
            shoot('bounding_box_test', pid, person, int(rng.integers(TOY_CAMERAS)), view)
        for pid, person, camera in queries:
            for _ in range(2):
                shoot('gt_bbox', pid, person, camera, random_view(rng))

    _once(folder, draw)


def draw_mars(
    folder: str | os.PathLike[str],
    *,
    num_train: int = 48,
    num_test: int = 24,
    num_distractors: int = 8,
    num_frames: tuple[int, int] = (4, 12),
    height: int = 96,
    width: int = 48,
    seed: int = 0,
) -> None:
    """Draw a video data set into `folder` in MARS's format, with its lists of names and .mat tables, unless it exists.

    Each of `num_train` persons has one tracklet in each of two to four cameras. Each of `num_test` others is seen by
    three cameras, two of which have two tracklets; the first tracklet in a camera is a query. Two more persons have one
    tracklet in each of two cameras, so their queries have no match when queries are removed from the gallery. The
    gallery also contains `num_distractors` tracklets of strangers (pid 0) and as many junk tracklets (pid -1). A
    tracklet shows a person in smooth motion; `num_frames` are its minimum and maximum number of frames.

    Complete or absent, and equal for equal arguments, like `draw_market1501`. Raises OSError if it cannot be written.
    """
    rng = np.random.default_rng([seed, 1261])

    def draw(root: Path) -> None:
        cameras = [random_camera(kind, height, width, rng) for kind in range(TOY_CAMERAS)]
        persons = random_persons(num_train + num_test + 2 + 2 * num_distractors, rng)
        info = root / 'info'
        info.mkdir()

        train = [  # tracklets: pid, person, camera
            (2 * index + 1, person, camera)
            for index, person in enumerate(persons[:num_train])
            for camera in _some_cameras(int(rng.integers(2, 5)), rng)
        ]
        strangers = persons[num_train + num_test + 2 :]
        test = [
            (-1 if index < num_distractors else 0, person, int(rng.integers(TOY_CAMERAS)))
            for index, person in enumerate(strangers)
        ]
        queries = []  # rows of the test table, counted from 1
        for index, person in enumerate(persons[num_train : num_train + num_test + 2]):
            tracklets = (2, 2, 1) if index < num_test else (1, 1)  # in each camera
            for camera, number in zip(_some_cameras(len(tracklets), rng), tracklets, strict=True):
                queries.append(len(test) + 1)
                test += [(2 * index + 2, person, camera)] * number
        _save_table(info / 'query_IDX.mat', 'query_IDX', np.array([queries], dtype=np.uint16))  # (1, num_query)

        for subset, tracks in ('train', train), ('test', test):
            names: list[str] = []
            table: list[tuple[int, int, int, int]] = []  # first and last frame, counted from 1, pid, camera
            numbers: dict[tuple[int, int], int] = {}  # how many tracklets a person has had in a camera
            for pid, person, camera in tracks:
                begin = '00-1' if pid < 0 else f'{pid:04d}'
                numbers[pid, camera] = number = numbers.get((pid, camera), 0) + 1
                tracklet = root / f'bbox_{subset}' / begin
                tracklet.mkdir(parents=True, exist_ok=True)
                first = len(names) + 1
                for frame, view in enumerate(walk(int(rng.integers(num_frames[0], num_frames[1] + 1)), rng), start=1):
                    if pid < 0:
                        view = replace(view, x=view.x + 0.3, y=view.y - 0.4)
                    names.append(f'{begin}C{camera + 1}T{number:04d}F{frame:03d}.jpg')
                    photograph(tracklet / names[-1], person, cameras[camera], view, height, width, rng)
                table.append((first, len(names), pid, camera + 1))
            (info / f'{subset}_name.txt').write_text('\n'.join(names) + '\n', encoding='ascii')
            rows = np.array(table, dtype=np.int32)  # (num_tracklets, 4)
            _save_table(info / f'tracks_{subset}_info.mat', f'track_{subset}_info', rows)

    _once(folder, draw)


def draw_msmt17(
    folder: str | os.PathLike[str],
    *,
    version: int = 1,
    num_train: int = 6,
    num_test: int = 4,
    num_images: int = 6,
    height: int = 96,
    width: int = 48,
    seed: int = 0,
) -> None:
    """Draw an image data set into `folder` in MSMT17's format, of version 1 or 2, with its lists, unless it exists.

    Each person has `num_images` images, two from each of several cameras. Training persons and test persons are both
    numbered from 0. One training image of each person is in list_val.txt, the others are in list_train.txt. The first
    image of a test person in each camera is a query.

    Complete or absent, and equal for equal arguments, like `draw_market1501`. Raises OSError if it cannot be written.
    """
    rng = np.random.default_rng([seed, 17])

    def draw(root: Path) -> None:
        cameras = [random_camera(kind, height, width, rng) for kind in range(TOY_CAMERAS)]
        persons = iter(random_persons(num_train + num_test, rng))
        lists: dict[str, list[str]] = {part: [] for part in ('train', 'val', 'query', 'gallery')}
        for subset, number in ('train', num_train), ('test', num_test):
            images = root / (subset if version == 1 else f'mask_{subset}_v2')
            for label, person in zip(range(number), persons, strict=False):
                (images / f'{label:04d}').mkdir(parents=True)
                chosen = [camera for camera in _some_cameras(num_images // 2, rng) for _ in range(2)]
                for index, camera in enumerate(chosen):
                    path = f'{label:04d}/{label:04d}_{index:03d}_{camera + 1:02d}_0303morning_{index:04d}_0.jpg'
                    photograph(images / path, person, cameras[camera], random_view(rng), height, width, rng)
                    part = ('query', 'gallery')[index % 2] if subset == 'test' else 'train' if index else 'val'
                    lists[part].append(f'{path} {label}\n')
        for part, lines in lists.items():
            (root / f'list_{part}.txt').write_text(''.join(lines), encoding='ascii')

    _once(folder, draw)


def draw_cuhk03(
    folder: str | os.PathLike[str],
    *,
    num_train: int = 6,
    num_test: int = 4,
    num_images: int = 3,
    height: int = 96,
    width: int = 48,
    seed: int = 0,
) -> None:
    """Draw an image data set into `folder` in the format of CUHK03-NP, unless it exists.

    Each person has `num_images` images in each of two cameras, in `labeled` and, shifted, in `detected`. The first
    image of a test person in each camera is a query.

    Complete or absent, and equal for equal arguments, like `draw_market1501`. Raises OSError if it cannot be written.
    """
    rng = np.random.default_rng([seed, 3])

    def draw(root: Path) -> None:
        cameras = [random_camera(kind, height, width, rng) for kind in range(2)]
        for boxes in 'detected', 'labeled':
            for part in 'bounding_box_train', 'query', 'bounding_box_test':
                (root / boxes / part).mkdir(parents=True)
        for index, person in enumerate(random_persons(num_train + num_test, rng)):
            for camera in range(2):
                for number in range(num_images):
                    part = 'query' if number == 0 else 'bounding_box_test'
                    part = 'bounding_box_train' if index < num_train else part
                    name, view = f'{index + 1:04d}_c{camera + 1}_{number + 1}.png', random_view(rng)
                    for boxes, shift in ('labeled', 0.0), ('detected', 0.04):
                        path = root / boxes / part / name
                        moved = replace(view, y=view.y + shift)
                        photograph(path, person, cameras[camera], moved, height, width, rng)

    _once(folder, draw)


def _once(folder: str | os.PathLike[str], draw: Callable[[Path], None]) -> None:
    """Fill `folder` by `draw` unless it exists; it is not visible to other processes before it is complete."""
    folder = Path(os.path.abspath(folder))
    if folder.is_dir():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix='.toy-', dir=folder.parent) as parent:
        drawn = Path(parent, folder.name)
        drawn.mkdir()
        draw(drawn)
        try:
            drawn.rename(folder)
        except OSError:
            if not folder.is_dir():  # otherwise another process was first, with the same images
                raise


def _save_table(path: Path, key: str, table: np.ndarray) -> None:
    """Write `table` as the only variable of a MATLAB 5 .mat file."""
    from scipy.io import savemat  # slow to import, and only MARS needs it

    savemat(path, {key: table})
    with open(path, 'r+b') as file:
        file.write(b'MATLAB 5.0 MAT-file'.ljust(116))  # replaces the header's text, which contains the time


def _some_cameras(number: int, rng: Generator) -> list[int]:
    """`number` different cameras in ascending order."""
    return sorted(rng.choice(TOY_CAMERAS, size=number, replace=False).tolist())
