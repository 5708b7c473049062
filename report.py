"""Writes an HTML page about a tested run, made only from the files in its --save-dir.

    python report.py log/demo                               # writes log/demo/report.html
    python report.py log/a log/b --out log/a_and_b.html     # compares two or more runs
    python report.py --activations log/demo/best_model.pth.tar IMAGE ...    # where the network looks

The page is one file that needs no network and no server. Each test rewrites it.
"""

import os
from pathlib import Path

from page import compare, write
from page.activations import activations
from runtime import commands, values

MOST_MAPS = 600  # in a grid: matplotlib draws at most 65535 rows of pixels, enough for images 4 times as high as wide


def main() -> None:
    parser = commands.Parser(description='Write the page of a run, a comparison of runs, or a grid of activation maps.')
    parser.add_argument(
        'save_dirs',
        nargs='*',
        type=values.path,
        metavar='SAVE_DIR',
        help='folder of a tested run; several are compared',
    )
    parser.add_argument(
        '--out', type=values.path,
        help='file to write for a comparison or activation maps (default: compare.html, activations.png)',
    )  # fmt: skip
    parser.add_argument(
        '--activations',
        nargs='+',
        type=values.path,
        metavar=('CHECKPOINT', 'IMAGE'),
        help='draw activation maps of these images instead',
    )
    parser.add_argument('-a', '--arch', help='architecture of the checkpoint (default: recognised by its weights)')
    parser.add_argument('--assume', default='', metavar='NAME=VALUE,...', help='replaces assumptions about the file')
    parser.add_argument('--height', type=values.positive_int, help='input height (default: as trained, or 256)')
    parser.add_argument('--width', type=values.positive_int, help='input width (default: as trained, or 128)')
    args = parser.parse_args()
    out = {'out': args.out} if args.out else {}
    if bool(args.save_dirs) == bool(args.activations):
        parser.error('give the --save-dir of one or more runs, or --activations CHECKPOINT IMAGE ...')
    if not args.activations and (args.arch or args.assume or args.height or args.width):
        parser.error('--arch, --assume, --height and --width are for --activations: remove them')
    if args.activations:
        checkpoint, *images = args.activations
        if not images:
            parser.error('--activations: no image; give at least one after the checkpoint')
        if len(images) > MOST_MAPS:
            parser.error(f'--activations: {len(images)} images; give at most {MOST_MAPS}')
        if args.out and Path(args.out).suffix.lower() != '.png':
            parser.error(f'--out {args.out}: activation maps are written as PNG; give a name that ends in .png')
        if args.out and os.path.realpath(args.out) in map(os.path.realpath, images):
            parser.error(f'--out {args.out} is one of the images; give another name')
        path = activations(checkpoint, images, args.arch, args.assume, args.height, args.width, **out)
    elif len(args.save_dirs) > 1:
        if args.out and not args.out.lower().endswith('.html'):
            parser.error(f'--out {args.out}: a comparison is a page; give a name that ends in .html')
        path = compare(args.save_dirs, **out)
    elif args.out:
        parser.error('--out: the page of a single run is report.html in its folder; remove the option')
    else:
        path = write(args.save_dirs[0])
    print(f'Wrote {path}')


if __name__ == '__main__':
    commands.run(main)
