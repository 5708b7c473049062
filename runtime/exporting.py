"""Writing a network as a file for other programs, and the check of what was written."""

import contextlib
import io
import json
import logging
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram

from runtime import exported
from runtime.errors import UserError, plain
from runtime.exported import INPUT, OUTPUT
from runtime.graph import Graph

FORMATS = {'onnx': ['onnx', 'onnxscript', 'onnxruntime'], 'pt2': []}  # and the packages that each needs
ENTRY = 'deep-person-reid.json'  # the metadata in a .pt2 file
AXES = {0: 'batch', 1: 'height', 2: 'width'}  # of the images, of any size
OPSET = 18  # of ONNX: the one for which torch writes graphs without converting them
TOLERANCE = 1e-3  # largest relative error of a feature that passes
NEAREST = 10
BATCHES = (1, 2, 5, 3, 8)  # images that are checked at a time
SIZES = ((256, 128), (128, 64), (97, 41), (40, 60), (331, 182), (17, 9))  # of the images that are drawn

Run = Callable[[np.ndarray], np.ndarray]  # uint8 (B, H, W, 3) -> float32 (B, D)


def program_of(graph: Graph, what: str) -> ExportedProgram:
    """The graph as torch.export traces it; batch, height and width of the images are dynamic.

    Raises:
        UserError: an operator cannot be traced.
    """
    example = torch.zeros(2, graph.height + 1, graph.width + 3, 3, dtype=torch.uint8)
    sizes = {axis: Dim(name) for axis, name in AXES.items()}
    try:
        with quiet(), torch.no_grad():
            return torch.export.export(graph, (example,), dynamic_shapes={INPUT: sizes}, strict=False)
    except Exception as problem:  # of any type, some of them private
        raise UserError(f'{what} cannot be exported: {obstacle(problem)}') from problem


def write(program: ExportedProgram, path: Path, kind: str, metadata: Mapping[str, str], what: str) -> None:
    """Write the file, in one of FORMATS.

    Raises:
        UserError: an operator has no counterpart in ONNX, or the file would be larger than ONNX allows.
        OSError: the file cannot be written.
    """
    if kind == 'pt2':
        with quiet(), open(path, 'wb') as file:
            torch.export.save(program, file, extra_files={ENTRY: json.dumps(metadata)})
        return
    try:
        with quiet():
            converted = torch.onnx.export(
                program, dynamo=True, input_names=[INPUT], output_names=[OUTPUT], dynamic_shapes={INPUT: AXES},
                opset_version=OPSET, verbose=False,
            )  # fmt: skip
        assert converted is not None  # with dynamo=True
        converted.model.metadata_props.update(metadata)
        converted.save(path, external_data=False)
    except OSError:
        raise
    except Exception as problem:  # of any type, some of them private
        raise UserError(f'{what} cannot be written as ONNX: {obstacle(problem)}; --format pt2 may work') from problem


def obstacle(problem: BaseException) -> str:
    """The operator that an exporter names, or else the first line of the message that caused the others."""
    reasons: list[str] = []
    cause: BaseException | None = problem
    while cause is not None:
        reasons.append(str(cause).strip() or type(cause).__name__)
        cause = cause.__cause__ or cause.__context__
    named = re.search(r"<OpOverload\(op='([^']+)'|target=torch\.ops\.([\w.]+)", '\n'.join(reversed(reasons)))
    return f'the operator {plain(named[1] or named[2])} stands in the way' if named else plain(reasons[-1])


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without what torch prints and logs of a failure, pages of its graph, and its warnings about its own code."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        out = io.StringIO()
        with warnings.catch_warnings(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            warnings.simplefilter('ignore')
            yield
    finally:
        logging.disable(before)


def opened(path: Path, kind: str) -> tuple[Run, str]:
    """The written file, ready to run, and by what: onnxruntime or torch."""
    if kind == 'onnx':
        import onnxruntime

        return exported.Session(path), f'onnxruntime {onnxruntime.__version__}'
    with open(path, 'rb') as file:
        module = torch.export.load(file).module()  # our own file: that of a stranger may run code

    def run(images: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            features: np.ndarray = module(torch.from_numpy(images)).numpy()
        return features

    return run, f'torch {torch.__version__}'


class Outcome(NamedTuple):
    """Of a check: images and sizes of them, the largest relative error of a feature, and the number of neighbours that
    changed their places although their distances differ by more than TOLERANCE."""

    images: int
    sizes: int
    error: float
    exchanged: int

    @property
    def passed(self) -> bool:
        return self.error <= TOLERANCE and not self.exchanged  # NaN does not pass


def report(path: str, kind: str, images: Sequence[np.ndarray], expected: Tensor, distance: str) -> bool:
    """Check a file against the features (N, D) of these images (H, W, 3); print the outcome; whether it passed."""
    run, engine = opened(Path(path), kind)
    outcome = check(run, images, expected, distance)
    nearest = (
        f'{outcome.exchanged} of the {NEAREST} nearest differ' if outcome.exchanged else f'the {NEAREST} nearest agree'
    )
    print(
        f'Checked with {engine} on {outcome.images} images of {outcome.sizes} sizes: largest relative error '
        f'{outcome.error:.1e}, {nearest}'
    )
    if not outcome.passed:
        why = f'an error above {TOLERANCE:g}, or other neighbours'
        print(f'error: {plain(path, 500)} is removed: {why}', file=sys.stderr)
    return outcome.passed


def check(run: Run, images: Sequence[np.ndarray], expected: Tensor, distance: str) -> Outcome:
    """Compare the features of a file with those that are `expected` (N, D), of images (H, W, 3).

    The error of a feature is the length of the difference, divided by the length of the feature.
    """
    found = torch.full_like(expected, torch.nan)  # (N, D)
    sizes = dict.fromkeys(image.shape for image in images)
    for size in sizes:
        places = [place for place, image in enumerate(images) if image.shape == size]
        for some in batches(places):
            found[some] = torch.from_numpy(run(np.stack([images[place] for place in some])))
    errors = (found - expected).norm(dim=1) / expected.norm(dim=1).clamp(min=torch.finfo().tiny)  # (N,)
    return Outcome(len(images), len(sizes), float(errors.max()), exchanged(expected, found, distance))


def batches(places: Sequence[int]) -> Iterator[list[int]]:
    """Batches of several sizes, one after the other."""
    start, turn = 0, 0
    while start < len(places):
        yield list(places[start : (start := start + BATCHES[turn % len(BATCHES)])])
        turn += 1


def exchanged(expected: Tensor, found: Tensor, distance: str) -> int:
    """How many of the NEAREST neighbours of each feature (N, D) are others in `found`, unless their distances agree.

    Two distances agree if they differ by at most TOLERANCE of the larger one.
    """
    (one, other), nearest = (distances(each, distance) for each in (expected, found)), min(NEAREST, len(expected) - 1)
    ours, theirs = (each.sort(dim=1, stable=True).indices[:, :nearest] for each in (one, other))  # (N, nearest) each
    near, far = one.gather(1, ours), one.gather(1, theirs)  # as the features that are expected have them
    return int(((near - far).abs() > TOLERANCE * torch.maximum(near, far)).sum())


def distances(features: Tensor, distance: str) -> Tensor:
    """(N, N) float64, of each feature to the others; that to itself is infinite."""
    points = features.double()
    if distance == 'cosine':
        points = torch.nn.functional.normalize(points)
    between = torch.cdist(points, points, compute_mode='donot_use_mm_for_euclid_dist').square()
    return between.fill_diagonal_(torch.inf)


def drawn(number: int = 48) -> list[np.ndarray]:
    """Images of several sizes, uint8 (H, W, 3): a coarse pattern and noise, always the same."""
    rng, images = np.random.default_rng(0), []
    for height, width in (SIZES[turn % len(SIZES)] for turn in range(number)):
        coarse = rng.integers(0, 256, (6, 3, 3))[np.arange(height) * 6 // height][:, np.arange(width) * 3 // width]
        images.append((coarse * 3 // 4 + rng.integers(0, 64, (height, width, 3))).astype(np.uint8))
    return images
