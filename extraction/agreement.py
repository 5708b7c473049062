"""Checks that a network in another program gives the expected features and nearest neighbours."""

import sys
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from extraction.programs import Opened

TOLERANCE = 1e-3  # largest relative error of a feature that passes
NEIGHBOURS = 10
MOST_IMAGES = 1000  # images that are checked: all pairs are compared
BATCH_SIZES = (1, 2, 5, 3, 8)  # images that are checked at a time
SIZES = ((256, 128), (128, 64), (97, 41), (40, 60), (331, 182), (17, 9))  # (height, width) of the drawn images


class Outcome(NamedTuple):
    """The outcome of a check: number of images and of their sizes, largest relative error of a feature, and number of
    neighbours that changed places although their distances differ by more than TOLERANCE."""

    images: int
    sizes: int
    error: float
    exchanged: int

    @property
    def passed(self) -> bool:
        return self.error <= TOLERANCE and not self.exchanged  # NaN does not pass


def report(run: Opened, engine: str, images: Sequence[np.ndarray], expected: Tensor, distance: str) -> bool:
    """Check a program against the expected features (N, D) of images (H, W, 3), print the outcome, and return whether
    it passed."""
    outcome = check(run, images, expected, distance)
    nearest = min(NEIGHBOURS, len(images) - 1)
    words = f'the {nearest} nearest agree' if nearest else 'no neighbours were compared'
    if outcome.exchanged:
        words = f'{outcome.exchanged} of the {nearest} nearest of all images differ'
    print(
        f'Checked with {engine} on {counted(outcome.images, "image")} of {counted(outcome.sizes, "size")}: largest '
        f'relative error {outcome.error:.1e}, {words}'
    )
    if not outcome.passed:
        print(f'error: not written: relative error above {TOLERANCE:g}, or nearest neighbours differ', file=sys.stderr)
    return outcome.passed


def counted(number: int, noun: str) -> str:
    return f'{number} {noun}' if number == 1 else f'{number} {noun}s'


def check(run: Opened, images: Sequence[np.ndarray], expected: Tensor, distance: str) -> Outcome:
    """Compare a program's features of images (H, W, 3) with the `expected` ones (N, D).

    The error of a feature is the length of the difference, divided by the length of the feature.
    """
    computed = torch.full_like(expected, torch.nan)  # (N, D)
    sizes = dict.fromkeys(image.shape for image in images)
    for size in sizes:
        places = [place for place, image in enumerate(images) if image.shape == size]
        for some in batches(places):
            computed[some] = torch.from_numpy(run(np.stack([images[place] for place in some])))
    errors = (computed - expected).norm(dim=1) / expected.norm(dim=1).clamp(min=torch.finfo().tiny)  # (N,)
    return Outcome(len(images), len(sizes), float(errors.max()), exchanged(expected, computed, distance))


def batches(places: Sequence[int]) -> Iterator[list[int]]:
    """Split `places` into consecutive batches, whose sizes cycle through BATCH_SIZES."""
    start, turn = 0, 0
    while start < len(places):
        yield list(places[start : (start := start + BATCH_SIZES[turn % len(BATCH_SIZES)])])
        turn += 1


def exchanged(expected: Tensor, computed: Tensor, distance: str) -> int:
    """The number of the NEIGHBOURS of all features (N, D) that differ in `computed` and whose distances do not agree.

    Two distances agree if they differ by at most TOLERANCE of the larger one.
    """
    nearest = min(NEIGHBOURS, len(expected) - 1)
    one, other = (distances(each, distance) for each in (expected, computed))  # (N, N) each
    ours, theirs = (each.sort(dim=1, stable=True).indices[:, :nearest] for each in (one, other))  # (N, nearest) each
    near, far = one.gather(1, ours), one.gather(1, theirs)  # distances of the expected features
    return int(((near - far).abs() > TOLERANCE * torch.maximum(near, far)).sum())


def distances(features: Tensor, distance: str) -> Tensor:
    """(N, N) float64: the distances between all features; that of a feature to itself is infinite."""
    points = features.double()
    if distance == 'cosine':
        points = torch.nn.functional.normalize(points)
    between = torch.cdist(points, points, compute_mode='donot_use_mm_for_euclid_dist').square()
    return between.fill_diagonal_(torch.inf)


def evenly(paths: Sequence[str]) -> list[str]:
    """At most MOST_IMAGES of the paths, evenly spaced."""
    number = min(MOST_IMAGES, len(paths))
    return [paths[place * len(paths) // number] for place in range(number)]


def drawn(number: int = 48) -> list[np.ndarray]:
    """Images of several sizes, uint8 (H, W, 3): a coarse pattern and noise, always the same."""
    rng, images = np.random.default_rng(0), []
    for height, width in (SIZES[turn % len(SIZES)] for turn in range(number)):
        coarse = rng.integers(0, 256, (6, 3, 3))[np.arange(height) * 6 // height][:, np.arange(width) * 3 // width]
        images.append((coarse * 3 // 4 + rng.integers(0, 64, (height, width, 3))).astype(np.uint8))
    return images
