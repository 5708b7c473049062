"""Files written by `export.py`: their metadata, and an ONNX file as a network.

The metadata are strings, one per name, which any program can read; `trained` is JSON for `search.py`.
"""

import hashlib
import importlib.util
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from batches.resizing import KERNELS, Normalisation
from data_manager import get_names, names_of
from files.kinds import not_a_file
from models.network import LENGTHS, Network, Training
from runtime.errors import UserError, plain
from runtime.tiles import DISTANCES

EXPORT_FORMAT = 'deep-person-reid export 1'
LAYOUT = 'uint8 (batch, height, width, 3), RGB -> float32 (batch, feat_dim)'
INPUT, OUTPUT = 'images', 'features'
# The training options that `search.py --calibrate` and the notices need; the others may contain the user's paths
KEPT_OPTIONS = ('dataset', 'combine', 'validate', 'test_share', 'seed', 'height', 'width', 'pool')
PIXELS: Normalisation = ((0.0, 0.0, 0.0), (1 / 255, 1 / 255, 1 / 255))  # leaves pixels as they are, 0 to 255


class Facts(NamedTuple):
    """The metadata of a file. `digest` identifies the weights and how they were used before the export."""

    arch: str
    feat_dim: int
    height: int
    width: int
    interpolation: str
    normalisation: Normalisation
    distance: str
    flip_test: bool
    digest: str
    trained: Training


def metadata(facts: Facts) -> dict[str, str]:
    """The facts as strings, without the names of the user's own data sets, which contain their paths."""
    mean, std = facts.normalisation
    trained = asdict(facts.trained)
    options = {name: value for name, value in trained['options'].items() if name in KEPT_OPTIONS}
    if not set(names_of(str(options.get('dataset')))) <= set(get_names()):
        options.pop('dataset', None)
    trained |= {'where': '', 'options': options, 'test': {}}
    return {
        'format': EXPORT_FORMAT,
        'layout': LAYOUT,
        'arch': facts.arch,
        'feat_dim': str(facts.feat_dim),
        'height': str(facts.height),
        'width': str(facts.width),
        'interpolation': facts.interpolation,
        'mean': json.dumps(mean),
        'std': json.dumps(std),
        'distance': facts.distance,
        'flip_test': json.dumps(facts.flip_test),
        'digest': facts.digest,
        'trained': json.dumps(trained),
    }


def facts_of(metadata: Mapping[str, str], where: str) -> Facts:
    """The facts of a file.

    Raises:
        UserError: `export.py` did not write it, or its metadata were altered.
    """
    written = metadata.get('format', '')
    if written != EXPORT_FORMAT:
        if written.startswith(EXPORT_FORMAT.rstrip('0123456789')):
            raise UserError(
                f'{where} has the format {plain(written)}, not {EXPORT_FORMAT}: use the version that wrote it'
            )
        raise UserError(
            f'{where} was not written by export.py, so its input and its features are unknown: export the weights with '
            f'python export.py --weights WEIGHTS --format onnx'
        )
    try:
        if metadata['interpolation'] not in KERNELS or metadata['distance'] not in DISTANCES:
            raise ValueError('unknown interpolation or distance')
        held = {name: json.loads(metadata[name]) for name in ('mean', 'std', 'flip_test', 'trained')}
        return Facts(
            arch=plain(metadata['arch']),
            feat_dim=_length(metadata['feat_dim']),
            height=_length(metadata['height']),
            width=_length(metadata['width']),
            interpolation=metadata['interpolation'],
            normalisation=(tuple(map(float, held['mean'])), tuple(map(float, held['std']))),
            distance=metadata['distance'],
            flip_test=held['flip_test'] is True,
            digest=metadata['digest'],
            trained=_training_of(held['trained'], where),
        )
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as problem:
        raise UserError(f'{where} has incomplete metadata ({plain(str(problem))}): export the weights again') from None


def _training_of(held: Mapping[str, Any], where: str) -> Training:
    """What a file records about its training; texts are made printable."""
    number, fingerprint = held['num_pids'], held['fingerprint']
    return Training(
        where=where,
        of_imagenet=held['of_imagenet'] is True,
        options=dict(held['options']),
        fingerprint=None if fingerprint is None else plain(fingerprint),
        num_pids=None if number is None else int(number),
        missing=plain(held['missing']),
        arch=plain(held['arch']),
        project=plain(held['project']),
    )


def _length(text: str) -> int:
    if int(text) not in LENGTHS:
        raise ValueError(f'a length of {text}')
    return int(text)


def need(packages: Sequence[str], what: str) -> None:
    """Raise UserError unless all packages are installed."""
    missing = [name for name in packages if not importlib.util.find_spec(name)]
    if missing:
        several = 'packages' if len(missing) > 1 else 'package'
        raise UserError(f'{what} needs the {several} {" and ".join(missing)}: pip install {" ".join(missing)}')


def session_of(contents: bytes, what: str, instead: str, compiled: bool = True) -> Any:
    """An ONNX file loaded by onnxruntime on the CPU, with as many threads as torch uses at this moment.

    compiled: if False, constants are not computed, which may take any memory or time

    Raises:
        UserError: it cannot be loaded; the message says `what`, why, and what can be done `instead`.
    """
    import onnxruntime  # optional

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors, which are raised as well
    if not compiled:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        return onnxruntime.InferenceSession(contents, options, providers=['CPUExecutionProvider'])
    except Exception as problem:  # of any type: another library parses the file
        raise UserError(f'{what} cannot be loaded by onnxruntime ({plain(str(problem))}): {instead}') from problem


class Session:
    """A file written by `export.py`, run by onnxruntime.

    Attributes:
        facts: the metadata of the file.
        digest: 16 hexadecimal digits, computed from all bytes of the file; any change to the graph changes it.

    Raises:
        UserError: onnxruntime is not installed, the file cannot be read, or `export.py` did not write it (`facts_of`).
    """

    def __init__(self, path: str | os.PathLike):
        where = plain(os.fspath(path), 500)
        need(['onnxruntime'], where)
        if what := not_a_file(path):
            raise UserError(f'{where} {what}')
        try:
            with open(path, 'rb') as file:
                contents = file.read()
        except OSError as problem:
            raise UserError(f'{where} cannot be read ({problem.strerror}); give the path of an ONNX file') from problem
        instead = 'export the weights again'
        only_read = session_of(contents, where, instead, compiled=False)  # other files are refused before computing
        self.facts = facts_of(only_read.get_modelmeta().custom_metadata_map, where)
        self.session = session_of(contents, where, instead)
        self.digest = hashlib.sha256(contents).hexdigest()[:16]

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """uint8 (B, H, W, 3) -> features (B, D), float32."""
        (features,) = self.session.run([OUTPUT], {INPUT: images})
        found: np.ndarray = features
        return found


class OnnxNetwork(Network):
    """The network of an ONNX file: images of the network's size, pixels 0..255 (B, 3, h, w) -> features (B, feat_dim).

    The graph resizes and normalises. `normalisation` leaves pixels unchanged, so `TestTransform` only brings images of
    different sizes into one batch.
    """

    normalisation = PIXELS
    pools_itself = True

    def __init__(self, session: Session, facts: Facts):
        super().__init__(num_classes=1)
        self.session, self.feat_dim, self.interpolation = session, facts.feat_dim, facts.interpolation
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        pixels = x.permute(0, 2, 3, 1).to(torch.uint8).contiguous()  # (B, h, w, 3)
        return torch.from_numpy(self.session(pixels.cpu().numpy()))


def open_onnx(path: str | os.PathLike) -> tuple[OnnxNetwork, Facts]:
    """The network of a file written by `export.py`. onnxruntime reads it; no Python code in it is run.

    Raises:
        UserError: see `Session`; or the graph does not fit the metadata.
    """
    where, session = plain(os.fspath(path), 500), Session(path)
    facts = session.facts
    network = OnnxNetwork(session, facts)
    try:
        shape = tuple(network(torch.zeros(1, 3, facts.height, facts.width)).shape)
    except MemoryError:
        raise
    except Exception as problem:  # of any type: another library runs the graph
        raise UserError(f'{where} cannot be run ({plain(str(problem))}): export the weights again') from problem
    if shape != (1, facts.feat_dim):
        raise UserError(f'{where} gives features {shape}, not (1, {facts.feat_dim}): export the weights again')
    return network, facts
