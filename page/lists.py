"""Queries with images of their nearest gallery items: examples from one run, and differences between runs."""

import base64
import functools
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from batches.decoding import decode
from page.runs import TestedRun

SHOWN = 20  # queries shown per group
IMAGE_HEIGHT, STRIP_HEIGHT = 128, 80  # of an embedded image, and of each frame of a tracklet, in pixels
FRAMES_SHOWN = {'query': 8, 'gallery': 4}  # of a tracklet
QUALITY = 75  # of the JPEGs


def examples(run: TestedRun) -> dict[str, Any]:
    """The worst, the best and some random queries among those with a match, sorted by AP."""
    order = np.flatnonzero(run.valid)
    order = order[np.argsort(run.ap[order], kind='stable')]  # (V,)
    random = np.random.default_rng(0).permutation(order)[:SHOWN]
    groups = {'worst': order[:SHOWN], 'best': order[-SHOWN:], 'random': random}
    chosen = order[np.isin(order, np.concatenate([*groups.values()]))]
    shown = (
        f'{len(chosen)} of the {len(order)} queries with a match are shown: the {len(groups["worst"])} with the '
        f'lowest average precision (AP), the {len(groups["best"])} with the highest, and {len(random)} drawn at random '
        f'(seed 0); a query may be in several of these groups. They are sorted by AP.'
    )
    return _lists([run], chosen, groups, shown)


def changes(runs: Sequence[TestedRun], valid: np.ndarray) -> dict[str, Any]:
    """The queries whose AP differs most between any two of the runs, the largest difference first.

    Args:
        valid: (Q,) bool, the queries that have a match in every run.
    """
    ap = np.stack([run.ap for run in runs])  # (R, Q)
    change = np.where(valid, ap.max(0) - ap.min(0), -1)  # (Q,)
    chosen = np.argsort(-change, kind='stable')[:SHOWN]
    chosen = chosen[change[chosen] > 0]
    gain = ap[-1] - ap[0]  # (Q,)
    groups = {'better': chosen[gain[chosen] > 0], 'worse': chosen[gain[chosen] < 0]}
    shown = (
        f'These are the {len(chosen)} queries whose average precision (AP) differs most between the runs, the largest '
        f'difference first. Better and worse compare the last run with the first.'
    )
    return _lists(runs, chosen, groups, shown)


def _lists(
    runs: Sequence[TestedRun], chosen: Iterable[int], groups: dict[str, np.ndarray], shown: str
) -> dict[str, Any]:
    """The template's variables for the chosen queries with their nearest gallery items in each run."""
    first, missing = runs[0], set()
    small = functools.cache(thumbnail)

    def picture(run: TestedRun, subset: str, index: int) -> dict[str, Any]:
        paths = [run.located(path) for path in run.files[subset][index]]
        name, image = '/'.join(Path(paths[0]).parts[-2:]), small(tuple(paths), FRAMES_SHOWN[subset])
        if image is None:
            missing.add(paths[0])
        return {'name': name, 'image': image}

    def camera(run: TestedRun, camid: int) -> str:
        return 'unknown camera' if run.summary.get('no_cameras') else f'camera {camid}'

    def nearest(run: TestedRun, query: int) -> list[dict[str, Any]]:
        arrays = run.arrays
        return [
            {
                'place': int(place),
                'distance': float(distance),
                'shown': run.distance(distance),
                'camid': int(arrays['g_camids'][place]),
                'camera': camera(run, arrays['g_camids'][place]),
                'match': bool(arrays['g_pids'][place] == arrays['q_pids'][query]),
                **picture(run, 'gallery', place),
            }
            for place, distance in zip(arrays['nearest'][query], arrays['nearest_distances'][query], strict=True)
            if place >= 0
        ]

    queries = [
        {
            'index': int(query),
            'pid': first.name_of(int(first.arrays['q_pids'][query])),
            'camera': camera(first, first.arrays['q_camids'][query]),
            'groups': [name for name, group in groups.items() if query in group],
            'rankings': [
                {
                    'run': run.name,
                    'ap': float(run.ap[query]),
                    'first_rank': int(run.first_ranks[query]),
                    'results': nearest(run, query),
                }
                for run in runs
            ],
            **picture(first, 'query', query),
        }
        for query in chosen
    ]
    return {
        'queries': queries,
        'groups': {name: len(group) for name, group in groups.items()},
        'pids': [
            first.name_of(pid) for pid in sorted({int(first.arrays['q_pids'][query['index']]) for query in queries})
        ],
        'shown': shown,
        'missing': len(missing),
        'tracklets': any(len(paths) > 1 for paths in first.files['query']),
    }


def thumbnail(paths: tuple[str, ...], frames: int) -> str | None:
    """A small JPEG as a data: URI, for a tracklet of up to `frames` frames side by side; None if none can be read."""
    number = min(len(paths), frames)
    height = IMAGE_HEIGHT if len(paths) == 1 else STRIP_HEIGHT
    pictures = []
    for path in (paths[i * len(paths) // number] for i in range(number)):
        try:
            image = decode(path)
            width = min(max(1, round(image.width * height / image.height)), 2 * height)
            pictures.append(np.asarray(image.resize((width, height), Image.Resampling.BOX)))
        except Exception:  # the data may have been moved, and Pillow raises many kinds of exceptions
            continue
    if not pictures:
        return None
    file = io.BytesIO()
    Image.fromarray(np.hstack(pictures)).save(file, 'JPEG', quality=QUALITY)
    return f'data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}'
