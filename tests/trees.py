"""Tiny data sets in the real formats, whose pixels never change.

The files in tests/fixtures/ were trained on this Market1501, and both sides of tests/compare.py read these images. So
nothing here may change, nor depend on the project, on a random generator or on a font: pixels are integer arithmetic.
"""

from pathlib import Path

import numpy as np
from PIL import Image

HEIGHT, WIDTH = 48, 24
CAMERAS = (1, 2, 3)


def draw_market1501(folder: Path) -> None:
    """24 training images of 6 persons; 8 queries of 4 others; 8 matches, 4 distractors and an image of junk.

    They are PNG files, which any version of Pillow decodes to the same pixels.
    """
    for pid in range(1, 7):
        for shot in range(4):
            camera = CAMERAS[shot % 3]
            _save(folder / 'bounding_box_train', f'{pid:04d}_c{camera}s1_{shot:06d}_00.png', pid, shot, camera)
    for pid in range(11, 15):
        for shot in range(4):
            subset = 'query' if shot < 2 else 'bounding_box_test'
            camera = CAMERAS[(pid + shot) % 3]
            _save(folder / subset, f'{pid:04d}_c{camera}s1_{shot:06d}_00.png', pid, shot, camera)
    for shot in range(4):
        camera = CAMERAS[shot % 3]
        _save(folder / 'bounding_box_test', f'0000_c{camera}s1_{shot:06d}_00.png', 20 + shot, shot, camera)
    _save(folder / 'bounding_box_test', '-1_c1s1_000000_00.png', 30, 0, 1)


def draw_mars(folder: Path) -> None:
    """12 training tracklets of 4 persons, 3 to 5 frames long; 3 queries and 6 tracklets of 3 others; a distractor."""
    from scipy.io import savemat

    (folder / 'info').mkdir(parents=True)
    for subset, pids in (('train', (1, 3, 5, 7)), ('test', (0, 2, 4, 6))):
        names, rows = [], []
        for pid in pids:
            for tracklet, camera in enumerate(CAMERAS if pid else CAMERAS[:1], start=1):
                first = len(names) + 1
                for frame in range(1, 4 + (pid + camera) % 3):
                    names.append(f'{pid:04d}C{camera}T{tracklet:04d}F{frame:03d}.jpg')
                    _save(folder / f'bbox_{subset}' / f'{pid:04d}', names[-1], 40 + pid, frame, camera)
                rows.append((first, len(names), pid, camera))
        (folder / 'info' / f'{subset}_name.txt').write_text('\n'.join(names) + '\n')
        savemat(folder / 'info' / f'tracks_{subset}_info.mat', {f'track_{subset}_info': np.array(rows)})
    savemat(folder / 'info' / 'query_IDX.mat', {'query_IDX': np.array([[2, 5, 8]])})  # rows from 1: camera 1 of each


def _save(folder: Path, name: str, look: int, shot: int, camera: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    options = {} if name.endswith('.png') else {'quality': 95}
    Image.fromarray(_pixels(look, shot, camera)).save(folder / name, **options)


def _pixels(look: int, shot: int, camera: int) -> np.ndarray:
    """Uint8 (H, W, 3): four bands in the colours of a look, lit by the camera, with noise of the shot."""
    y, x, channel = np.ogrid[:HEIGHT, :WIDTH, :3]  # (H, 1, 1), (1, W, 1), (1, 1, 3)
    band = (y + shot) * 4 // (HEIGHT + 4)
    colour = _hash(look, band, channel) % 160  # (H, 1, 3)
    noise = _hash(y * WIDTH + x, 100 * look + 10 * shot + camera, channel) % 64  # (H, W, 3)
    return (colour + 10 * camera + noise).astype(np.uint8)  # 253 at most


def _hash(a, b, c) -> np.ndarray:
    """Whole numbers that look random, of three small ones."""
    mixed = (np.int64(73856093) * a) ^ (np.int64(19349663) * b) ^ (np.int64(83492791) * c)
    mixed = (mixed ^ (mixed >> 13)) % 2**20 * 1274126177
    return (mixed ^ (mixed >> 16)) % 2**31
