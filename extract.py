"""Computes features of images of persons, with weights from any supported file, in Python or on the command line.

    from extract import FeatureExtractor

    extractor = FeatureExtractor('log/demo/best_model.pth.tar')
    features = extractor(['one.jpg', 'two.jpg'])     # (2, D)
    features = extractor(frame, boxes)               # (N, D), of a tracker's boxes in a frame

    python extract.py --weights log/demo/best_model.pth.tar IMAGES ... -o features

The command writes the same files as --save-features. IMAGES are files, folders, patterns such as 'cam*/*.jpg', or - for
a list on stdin. After an interruption, the same command resumes.
"""

import argparse
import contextlib
import functools
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from batches.workers import SizeGroup, collate
from dataset_loader import ImageDataset, TestLoader, VideoDataset
from evaluation import FRAMES, pool
from extraction.engines import ENGINES
from extraction.images import IMAGES_HELP, cut, files_of, listed, pixels_of, tracklets_of
from extraction.source import source_of
from files.draft import Draft
from files.paths import Paths
from models.network import embed
from runtime import cards, commands, cpu, values
from runtime.device import Run
from runtime.errors import UserError, plain
from runtime.precision import tf32
from transforms import TestTransform

DEFAULT_BATCH = {'cpu': 32, 'cuda': 256}  # images per batch: a GPU needs more to be fully used


class FeatureExtractor:
    """Images -> float32 features (N, D) on the CPU, equal to those that a test of the same weights computes.

        extractor = FeatureExtractor('weights.pth')
        features = extractor(images)
        features = extractor(frame, boxes)

    With the same batch size and number of threads, features equal those of the test bit for bit; otherwise, and with
    `compile` or another `engine`, they differ by rounding. Several threads may use an extractor at once. Nothing is
    printed: see `notes`.

    Args:
        weights: a file that `weights.read` supports, or an ONNX file written by `export.py`, which onnxruntime runs on
            the CPU in fp32, at the file's image size; no code in the file is run.
        device: 'auto' (the current GPU if there is one, otherwise the CPU), 'cpu', 'cuda', 'cuda:1', ...
        precision: 'auto' (fp32, as in a test), 'fp32', 'tf32' (GPUs only) or 'bf16'.
        arch: the architecture of the weights, if it cannot be recognised.
        assume: NAME=VALUE, separated by commas: replaces assumptions about what the file does not record.
        height, width: size of the network's input in pixels; by default the size of the training, or 256 x 128 if the
            file does not record it.
        batch: images per batch; by default 32, on a GPU 256.
        workers: processes that decode files, for lists of more than one batch; 0 decodes in the calling thread.
        compile: compile the network for this CPU at the first call, which takes a minute and needs a C++ compiler;
            later calls are faster. With `batch=1` it is compiled for single images.
        engine: what runs the network on a CPU: 'torch', or 'onnxruntime' or 'openvino', which are separate packages. A
            network is converted for these when it is loaded, which takes 5 to 30 seconds.

    Attributes:
        arch, feat_dim, device, precision, height, width, interpolation, distance, flip_test: the values in use.
        digest: 16 hexadecimal digits that identify the weights and how they are used.
        notes: lines about what was loaded and what was not.

    Raises:
        UserError: the weights cannot be read or do not fit, or the device or its precision cannot be used.
    """

    def __init__(
        self,
        weights: str | os.PathLike,
        device: str | torch.device = 'auto',
        precision: str = 'auto',
        *,
        arch: str | None = None,
        assume: str = '',
        height: int | None = None,
        width: int | None = None,
        batch: int | None = None,
        workers: int = 0,
        compile: bool = False,
        engine: str = 'torch',
    ):
        if engine not in ('torch', *ENGINES):
            raise UserError(f'there is no engine {plain(engine)}: choose torch, {" or ".join(ENGINES)}')
        if (batch is not None and batch < 1) or workers < 0:
            raise UserError(
                f'batch {batch}, workers {workers}: give at least 1 image per batch, and at least 0 workers'
            )
        if compile and engine != 'torch':
            raise UserError(f'--compile uses torch, which --engine {engine} replaces: choose one of them')
        source = source_of(weights, arch, assume, height, width)
        self.source, self.arch, self.trained, self.notes = source, source.arch, source.trained, source.notes
        self.height, self.width, self.interpolation, self.distance, self.flip_test = source.usage
        self.device = device_of('cpu' if source.sealed and device == 'auto' else device)
        self.precision = source.precision_on(self.device, precision)
        self.run = Run(self.device, self.precision, self.precision)
        self.model = self.run.place(source.model)
        self.feat_dim = self.model.feat_dim
        self.batch, self.workers = batch or DEFAULT_BATCH[self.device.type], workers
        self.compile, self.engine = compile, engine
        if compile:
            self.network = source.compiled(self.device, self.batch)
        elif engine != 'torch':
            self.network = source.by_engine(self.device, engine, self.precision, self.batch)
        else:
            self.network = self.model
        self.prepare = TestTransform(self.height, self.width, self.model.normalisation, self.interpolation)

    def __call__(self, images: Any, boxes: Any = None, *, bgr: bool = False) -> Tensor:
        """Features (N, D) of images, or of the boxes in a frame.

        An image is

        - a path, or a PIL image of any mode with 8 bits;
        - an array (H, W, 3), uint8, RGB, or BGR if `bgr`, as OpenCV reads it;
        - a tensor (3, H, W), RGB (BGR if `bgr`), uint8, or floating-point numbers from 0 to 1, which are rounded to 8
          bits. It must not be normalised yet.

        Several images are a list of these, which may differ in size, an array (N, H, W, 3) or a tensor (N, 3, H, W).

        Args:
            boxes: (N, 4): left, top, right and bottom in pixels of the only image, the frame; further columns are
                ignored. Boxes are rounded to whole pixels and clipped to the frame.

        Raises:
            UserError: an image cannot be read or has another form; boxes are empty or outside the frame (the message
                gives their rows); or features are not finite.
        """
        given = listed(images)
        if boxes is not None:
            if len(given) != 1:
                raise UserError(f'boxes belong to one frame, not to {len(given)} images: give one frame at a time')
            given, bgr = cut(pixels_of(given[0], bgr, 'the frame'), boxes), False
        features = torch.empty(len(given), self.feat_dim, dtype=torch.float32, device='cpu')  # (N, D)
        done = 0
        for batch_features in self.stream(given, bgr):
            features[done : (done := done + len(batch_features))] = batch_features
        return features

    def stream(self, images: Sequence[Any], bgr: bool = False) -> Iterator[Tensor]:
        """The features of each batch of images, (b, D) on the CPU, equal to those of a call with the whole list."""
        if self.workers and len(images) > self.batch and all(isinstance(image, str | os.PathLike) for image in images):
            files = ImageDataset([(image, 0, 0) for image in images])
            batches: Iterator[list[SizeGroup]] = (
                groups for groups, _, _ in TestLoader(files, self.batch, self.workers, self.run)
            )
        else:
            batches = self._collated(images, bgr)
        done = 0
        for groups in batches:
            features = self._embed(groups)
            check_finite(features, images, done)
            yield features
            done += len(features)

    def stream_tracklets(self, tracklets: Sequence[tuple[str, ...]], frames: int = FRAMES) -> Iterator[Tensor]:
        """The features (b, D) of tracklets, given as the paths of their frames in order.

        As in a test, a feature is the mean over `frames` frames, or the maximum for weights trained with --pool max.
        """
        how = 'max' if self.trained.options.get('pool') == 'max' else 'avg'
        dataset = VideoDataset([(tracklet, 0, 0) for tracklet in tracklets], frames, 'evenly')
        done = 0
        for groups, _, counts in TestLoader(dataset, max(1, self.batch // frames), self.workers, self.run):
            features = pool(self._embed(groups), counts, how)
            check_finite(features, tracklets, done)
            yield features
            done += len(features)

    def _collated(self, images: Sequence[Any], bgr: bool) -> Iterator[list[SizeGroup]]:
        """The batches of images, prepared by the calling thread, on the device."""
        for start in range(0, len(images), self.batch):
            part = enumerate(images[start : start + self.batch], start)
            block = collate([(pixels_of(image, bgr, f'image {number}'), 0, 0) for number, image in part])
            yield block.images(self.device)

    def _embed(self, groups: list[SizeGroup]) -> Tensor:
        """(b, D) float32, on the CPU."""
        with torch.inference_mode():
            batch = self.prepare(groups)  # (b, 3, h, w)
            with self.arithmetic():
                features = embed(self.network, batch, self.mirrors)
            features = features.cpu()
        return features.clone()  # which the caller may change

    @contextlib.contextmanager
    def arithmetic(self) -> Iterator[None]:
        """Context with the precision of the extractor; on GPUs, for one thread of the process at a time."""
        setting = contextlib.nullcontext() if self.device.type == 'cpu' else tf32(self.precision == 'tf32')
        with setting, self.run.autocast(testing=True):
            yield

    @property
    def mirrors(self) -> bool:
        """Whether the extractor averages the features of mirror images: it should, and the network does not."""
        return self.flip_test and not self.source.flips

    @property
    def description(self) -> dict[str, object]:
        """A description of the features, for JSON."""
        names = 'digest', 'arch', 'feat_dim', 'height', 'width', 'interpolation', 'distance', 'precision', 'flip_test'
        return {name: getattr(self, name) for name in names}

    @functools.cached_property
    def digest(self) -> str:
        return self.source.digest(self.precision, self.flip_test, 'compiled' if self.compile else self.engine)


def check_finite(features: Tensor, items: Sequence[Any], start: int) -> None:
    """Raise UserError if features (b, D) are not finite; `start` is the index of the first of them in `items`."""
    wrong = (~features.isfinite().all(1)).nonzero().flatten().tolist()
    if wrong:
        item = items[start + wrong[0]]
        item = item[0] if isinstance(item, tuple) else item  # the first frame of a tracklet
        name = plain(os.fspath(item), 500) if isinstance(item, str | os.PathLike) else f'image {start + wrong[0]}'
        raise UserError(f'the features of {name} are not finite: use precision fp32')


def device_of(name: str | torch.device) -> torch.device:
    """The device of this name; 'auto' is the current GPU if there is one, otherwise the CPU.

    Raises:
        UserError: the device does not exist or cannot be used.
    """
    try:
        device = torch.device(('cuda' if cards.available() else 'cpu') if name == 'auto' else name)
    except RuntimeError:
        raise UserError(f'there is no device {plain(str(name))}: choose auto, cpu or cuda:N') from None
    if device.type == 'cpu':
        return torch.device('cpu')
    number = torch.cuda.device_count() if device.type == 'cuda' else 0
    if device.type == 'cuda' and device.index is None and number:
        device = torch.device('cuda', torch.cuda.current_device())
    if (device.index or 0) >= number:
        raise UserError(f'there is no device {device}: this machine has {number} CUDA devices')
    cards.check(device)
    return device


# The command


def add_weights(parser: argparse.ArgumentParser, required: bool = False) -> None:
    """Add the file of weights."""
    parser.add_argument(
        '--weights', type=values.path, required=required, metavar='PATH', help='checkpoint, or published weights'
    )


def add_network(parser: argparse.ArgumentParser) -> None:
    """Add what the file of weights may not record."""
    parser.add_argument('-a', '--arch', help='architecture of the weights (default: recognised)')
    parser.add_argument('--assume', default='', metavar='NAME=VALUE,...', help='replaces assumptions about the file')
    parser.add_argument('--height', type=values.positive_int, help='input height (default: as trained, or 256)')
    parser.add_argument('--width', type=values.positive_int, help='input width (default: as trained, or 128)')


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of a FeatureExtractor."""
    add_weights(parser)
    add_network(parser)
    parser.add_argument('--precision', choices=('auto', 'fp32', 'tf32', 'bf16'), default='auto', help='(default: fp32)')
    parser.add_argument('--batch', type=values.positive_int, help='images per batch (default: 32; on a GPU 256)')
    parser.add_argument('-j', '--workers', type=values.nonnegative_int, default=4, help='image decoders (default: 4)')
    parser.add_argument('--compile', action='store_true', help='compile the network (CPUs only; takes a minute)')
    parser.add_argument(
        '--engine', choices=('torch', *ENGINES), default='torch', help='what runs the network on a CPU (default: torch)'
    )
    parser.add_argument('--use-cpu', action='store_true', help='use the CPU even if there is a GPU')
    parser.add_argument('--gpu-devices', metavar='N', help='index of the GPU (default: 0)', type=values.nonnegative_int)


def extractor_of(args: argparse.Namespace) -> FeatureExtractor:
    """The extractor with these options; what was loaded is reported on stderr."""
    if not args.weights:
        raise UserError('--weights is missing: give a checkpoint or published weights')
    device = 'cpu' if args.use_cpu else 'auto' if args.gpu_devices is None else f'cuda:{args.gpu_devices}'
    names = 'arch', 'assume', 'height', 'width', 'batch', 'workers', 'compile', 'engine'
    how = {name: getattr(args, name) for name in names}
    cpu.tune()
    extractor = FeatureExtractor(args.weights, device, args.precision, **how)
    for note in extractor.notes:
        print(note, file=sys.stderr)
    return extractor


def main() -> None:
    parser = commands.Parser(description='Write the features of images to a folder, in the files of --save-features.')
    parser.add_argument('images', nargs='+', type=values.path, metavar='IMAGES', help=IMAGES_HELP)
    parser.add_argument('-o', '--out', type=values.path, required=True, help='folder to write; it must not exist yet')
    parser.add_argument('--tracklets', action='store_true', help='the images of a folder are frames of one tracklet')
    parser.add_argument(
        '--seq-len', type=values.positive_int, help=f'frames taken of each tracklet (default: {FRAMES})'
    )
    add_options(parser)
    args = parser.parse_args()
    if args.seq_len and not args.tracklets:
        parser.error('--seq-len: images have no frames; add --tracklets, or remove it')
    frames = args.seq_len or FRAMES
    files = files_of(args.images)
    items: list[Paths] = [*(tracklets_of(files) if args.tracklets else files)]
    extractor = extractor_of(args)
    batch = max(1, extractor.batch // frames) if args.tracklets else extractor.batch
    what = {'weights': args.weights, **extractor.description, 'seq_len': frames if args.tracklets else None}
    with Draft(args.out, items, extractor.feat_dim, what, batch) as draft:
        if draft.done:
            print(f'Resuming after {draft.done} of {len(items)} items')
        rest: Any = items[draft.done :]
        stream = extractor.stream_tracklets(rest, frames) if args.tracklets else extractor.stream(rest)
        with tqdm(total=len(items), initial=draft.done, unit='item', leave=False, disable=None) as bar:
            for features in stream:
                draft.add(features)
                bar.update(len(features))
    print(f'Wrote {len(items)} features of {extractor.feat_dim} dimensions to {args.out}')


if __name__ == '__main__':
    commands.run(main)
