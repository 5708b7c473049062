"""Exports a trained network to a file for other programs: ONNX, or a program of torch.export.

    python export.py --weights log/demo/best_model.pth.tar --format onnx

The exported network maps uint8 RGB images (B, H, W, 3), with any B, H and W, to features (B, D), float32; it includes
resizing and normalisation. The metadata contain the architecture, the input size, the distance by which features are
compared, and more. The file is run before it is renamed to its final name: if its features or ten nearest neighbours
differ from those of the weights, nothing is written and the exit status is 1.
"""

import os
import sys

import numpy as np

from extract import FeatureExtractor, add_network, add_weights
from extraction import agreement, programs
from extraction.graph import Graph
from extraction.images import files_of, pixels_of
from extraction.onnx_network import Facts, metadata, need
from files.writing import check_new, new_file
from runtime import commands, values
from runtime.errors import UserError, plain

WEIGHT_SUFFIXES = '.safetensors', '.tar', '.pth', '.pt'  # of weights


def named(weights: str, kind: str) -> str:
    """The name of an exported file beside its weights: best_model.pth.tar -> best_model.onnx."""
    stem = weights
    for suffix in WEIGHT_SUFFIXES:
        stem = stem.removesuffix(suffix)
    return f'{stem}.{kind}'


def images_of(names: list[str]) -> list[np.ndarray]:
    """The images (H, W, 3) of the check: at most agreement.MOST_IMAGES of the files in `names`, or drawn ones."""
    available = files_of(names) if names else []
    paths = agreement.evenly(available)
    if len(paths) < len(available):
        print(f'Of {len(available)} images {len(paths)} are checked, evenly spaced in their list')
    return [pixels_of(path, False, path).permute(1, 2, 0).numpy() for path in paths] or agreement.drawn()


def main() -> None:
    parser = commands.Parser(description='Export a trained network to a file for other programs.')
    add_weights(parser, required=True)
    parser.add_argument(
        '--format', choices=[*programs.EXPORT_FORMATS], required=True, help='ONNX, or a program of torch.export'
    )
    parser.add_argument('-o', '--out', type=values.path, metavar='FILE', help='new file (default: beside the weights)')
    parser.add_argument('--images', nargs='+', default=[], type=values.path, metavar='IMAGES',
        help='images for the check, files or folders (default: drawn images)')  # fmt: skip
    add_network(parser)
    args = parser.parse_args()
    out, kind = args.out or named(args.weights, args.format), args.format
    need(programs.EXPORT_FORMATS[kind], f'--format {kind}')
    if not out.lower().endswith(f'.{kind}'):
        raise UserError(f'--out {plain(out, 500)}: give a name that ends in .{kind}, by which other programs know it')
    check_new(out)
    images = images_of(args.images)
    how = {name: getattr(args, name) for name in ('arch', 'assume', 'height', 'width')}
    extractor = FeatureExtractor(args.weights, 'cpu', **how)
    for note in extractor.notes:
        print(note, file=sys.stderr)
    if extractor.source.sealed:
        raise UserError(f'{plain(args.weights, 500)} is an exported file: give the weights from which it was made')
    model, size = extractor.model, (extractor.height, extractor.width)
    expected = extractor(images)  # (N, D)
    program = programs.program_of(Graph(model, *size, extractor.interpolation, extractor.flip_test), extractor.arch)
    facts = Facts(
        extractor.arch, model.feat_dim, *size, extractor.interpolation, model.normalisation, extractor.distance,
        extractor.flip_test, extractor.digest, extractor.trained,
    )  # fmt: skip
    with new_file(out) as path:
        programs.write(program, path, kind, metadata(facts), extractor.arch)
        if not agreement.report(*programs.opened(path, kind), images, expected, extractor.distance):
            sys.exit(1)
    size_mb = os.path.getsize(out) / 1e6
    print(f'Wrote {plain(out, 500)}: uint8 (B, H, W, 3) -> float32 (B, {model.feat_dim}), {size_mb:.1f} MB')


if __name__ == '__main__':
    commands.run(main)
