"""The options that the experiments share, in groups, and what is checked before anything starts.

    parser = arguments.parser(__doc__, dataset='market1501', test_batch=32)
    parser.set_defaults(max_epoch=180, stepsize=60)
    parser.add_argument('--margin', type=arguments.positive_float, default=0.3, help='margin of the triplet loss')

Every option stands in `args` by its name; `args.run`, `args.data`, `args.test`, `args.save` and `args.show` hold what
the room of that name needs, so that a new option of a room touches no script. Options that a script adds belong to
the recipe of its experiment, like the learning rate: a run is resumed with the values it began with.
"""

import argparse
import math
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import data_manager
import models

# What each room is given. An option may serve two of them.
ROOMS = {
    'run': 'seed use_cpu gpu_devices precision compile sync_bn width deterministic max_restarts',
    'data': 'workers cache',
    'test': 'dataset arch height width workers test_batch eval_step max_epoch resume evaluate save_dir save_features '
    'rerank k1 k2 lambda_value no_report quiet',
    'save': 'save_dir resume auto_resume resume_weights_only overwrite start_epoch evaluate save_minutes keep '
    'no_report',
    'show': 'print_freq quiet tensorboard save_dir train_batch max_epoch',
}
TEST_OF_TRACKLETS = ' seq_len pool'

# Options of the experiment that may differ when it is resumed: how long it is, and what its first weights were.
FREE = 'max_epoch pretrained help'


class Arguments(argparse.Namespace):
    """The options by name, and for each room of `ROOMS` a namespace of its own."""

    def plain(self) -> argparse.Namespace:
        """The options alone, by name in alphabetical order: what is printed and what a checkpoint keeps."""
        return argparse.Namespace(**{name: value for name, value in sorted(vars(self).items()) if name not in ROOMS})


class Parser(argparse.ArgumentParser):
    """An argparse parser that says a mistake in one line, checks values against each other, and sorts them by room."""

    def __init__(self, description: str | None, kind: str):
        super().__init__(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        self.kind = kind
        self.requirements: list[tuple[Callable[[argparse.Namespace], bool], str]] = []

    def error(self, message: str):
        if os.environ.get('LOCAL_RANK', '0') == '0':  # the first process of each host speaks
            sys.stderr.write(f'error: {message.removeprefix("argument ")}\n')
        sys.exit(2)

    def require(self, holds: Callable[[argparse.Namespace], bool], message: str) -> None:
        """Refuse the options unless `holds(args)`. `message` may name their values: `--margin {margin}`."""
        self.requirements.append((holds, message))

    def parse_args(self, args=None, namespace=None) -> Arguments:
        parsed = super().parse_args(args, namespace or Arguments())
        restarted = int(os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)) > 0
        if restarted:  # by torchrun --max-restarts
            parsed.auto_resume, parsed.overwrite = True, False
        if parsed.resume:  # nothing is fetched when weights are given
            parsed.pretrained = 'none'
        for holds, message in self.requirements:
            if not holds(parsed):
                self.error(message.format(**vars(parsed)))
        _check_names(self, parsed)
        _check_batch(self, parsed)
        _check_files(self, parsed, restarted)
        plain = vars(parsed.plain())
        actions = [action for action in self._optionals._group_actions if action.dest not in FREE.split()]
        for room, names in ROOMS.items():
            if room == 'test' and self.kind == 'video':
                names += TEST_OF_TRACKLETS
            setattr(parsed, room, argparse.Namespace(**{name: plain[name] for name in names.split()}))
        step, last = parsed.eval_step, parsed.max_epoch - 1
        tested = {last, *range(step - 1, last, step)} if step > 0 else {last}
        parsed.test.test_epochs = parsed.save.test_epochs = tested  # epochs (from 0) that a test follows
        parsed.save.arguments = plain
        parsed.save.recipe = {name: plain[name] for name in sorted(action.dest for action in actions)}
        # Of the recipe; of two options with one name in `args` the first one's counts.
        parsed.save.defaults = {action.dest: _default(action) for action in reversed(actions)}
        return parsed


def parser(description: str | None, dataset: str, test_batch: int) -> Parser:
    """The options of an experiment on images or tracklets, whichever `dataset`, its default, holds.

    Args:
        description: the docstring of the script.
        test_batch: default of --test-batch, in images or tracklets.
    """
    kind = 'video' if dataset in data_manager.get_names('video') else 'image'
    parser = Parser(description, kind)

    parser._optionals.title = 'the experiment (a resumed run must have the same, but for --max-epoch and --pretrained)'
    add = parser.add_argument
    add('-d', '--dataset', default=dataset, help=f'one of {", ".join(data_manager.get_names(kind))}')
    add('-a', '--arch', default='resnet50', help=f'one of {", ".join(models.get_names())}')
    add('--pretrained', default='imagenet', metavar='imagenet|none|PATH',
        help='first weights of the network; PATH is a checkpoint or a backbone of torchvision. '
             'Not looked at when --resume is given')  # fmt: skip
    add('--height', type=positive_int, default=256, help='of an image, in pixels')
    add('--width', type=positive_int, default=128, help='of an image, in pixels')
    add('--train-batch', type=two_or_more, default=32, help='images in a batch of the whole run, on all GPUs')
    add('--max-epoch', type=positive_int, default=60, help='epochs to train for')
    add('--lr', '--learning-rate', type=positive_float, default=0.0003, help='first learning rate of Adam')
    add(
        '--stepsize',
        type=epochs_or_never,
        default=20,
        help='epochs between two decays of the learning rate; 0 or less: no decay',
    )
    add('--gamma', type=positive_float, default=0.1, help='factor of a decay')
    add('--weight-decay', type=nonnegative_float, default=5e-4, help='L2 penalty, as in Adam')
    add('--seed', type=seed, default=1, help='of first weights, order and augmentation')

    add = parser.add_argument_group('data').add_argument
    add('--data-dir', default='data', help='folder that holds the data sets, see data/README.md')
    add('-j', '--workers', type=nonnegative_int, default=4, help='processes that decode images, for each GPU')
    add('--cache', choices=['none', 'ram', 'device'], default='none',
        help='decode training images once, keep their pixels in memory or on the GPU; workers then rest')  # fmt: skip

    add = parser.add_argument_group('test').add_argument
    add('--evaluate', action='store_true', help='test only')
    things = 'tracklets' if kind == 'video' else 'images'
    add(
        '--test-batch',
        type=positive_int,
        default=test_batch,
        help=f'{things} in a batch, on all GPUs; changes no result',
    )
    add('--save-features', action='store_true',
        help='write the features of query and gallery into --save-dir, for `python ranking.py`')  # fmt: skip
    add('--rerank', action='store_true',
        help='rank by k-reciprocal re-ranking (Zhong et al., CVPR 2017), which looks at the neighbours of neighbours: '
             'better figures, which must not be compared with those without')  # fmt: skip
    add('--k1', type=positive_int, default=20, help='of --rerank: nearest items that may be reciprocal neighbours')
    add('--k2', type=positive_int, default=6, help='of --rerank: nearest items over which neighbourhoods are averaged')
    add('--lambda', dest='lambda_value', type=fraction, default=0.3,
        help='of --rerank: weight of the Euclidean distance, 0 to 1, beside that of the neighbourhoods')  # fmt: skip
    add('--no-report', action='store_true', help='leave out report.html, the page of a test')
    add('--eval-step', type=int, default=-1, help='epochs between two tests; -1: after the last one only')
    if kind == 'video':
        add('--seq-len', type=positive_int, default=15, help='frames that are taken from a tracklet, evenly')
        add('--pool', choices=['avg', 'max'], default='avg', help="how a tracklet's features become one")

    add = parser.add_argument_group('save').add_argument
    add('--save-dir', default='log', help='folder of logs, checkpoints and results')
    add('--resume', default='', metavar='PATH',
        help='go on from this checkpoint, or, with --evaluate, test it; published weights are read too')  # fmt: skip
    add('--auto-resume', action='store_true',
        help='go on from the newest whole checkpoint in --save-dir, or else begin: one command for the first start and '
             'for each one after an interruption')  # fmt: skip
    add('--save-minutes', type=positive_float, default=5,
        help='save resume_{epoch}_{batch}.pth.tar as often, so that no more than that is lost')  # fmt: skip
    add('--keep', type=positive_int, default=3, help='how many of these are kept; checkpoints of tests always are')
    add('--resume-weights-only', action='store_true',
        help='take the weights of --resume alone and begin a run of its own with them, at --start-epoch')  # fmt: skip
    add('--start-epoch', type=nonnegative_int, default=0, help='first epoch of a run that starts from weights alone')
    add(
        '--overwrite',
        action='store_true',
        help='remove an earlier run in --save-dir, all but its logs and features, after the first step of this one',
    )

    add = parser.add_argument_group('run').add_argument
    add('--use-cpu', action='store_true', help='even where there is a GPU')
    add('--gpu-devices', type=gpu_list, default='0',
        help='index of the GPU, or a list such as 0,1,2,3: one process is started for each, and they share each batch. '
             'Under torchrun it may be left out')  # fmt: skip
    add('--sync-bn', action='store_true',
        help='BatchNorm over the images of all GPUs, not of each alone; worth its waiting where a GPU has few of them, '
             'less than 16 or so, or few identities')  # fmt: skip
    add('--precision', choices=['auto', 'fp32', 'tf32', 'bf16'], default='auto',
        help='of the network; weights, losses and statistics are float32 always. auto: bf16 where the device '
             'multiplies it in hardware, and fp32 for the test, so that published figures come out')  # fmt: skip
    add('--compile', action='store_true',
        help='compile the network with CUDA graphs: small batches are bound by launches otherwise; costs a minute at '
             'the start')  # fmt: skip
    add('--deterministic', action='store_true',
        help='deterministic algorithms only, for equal weights from equal runs on a GPU too; there it costs speed, and '
             'an operation without one is an error. On the CPU runs are equal without it')  # fmt: skip
    add('--max-restarts', type=nonnegative_int, default=0,
        help='start again, as with --auto-resume, when a process is killed or fails, so many times')  # fmt: skip
    add('--print-freq', type=positive_int, default=10, help='batches between two lines, and two rows of metrics.csv')
    add('--quiet', action='store_true', help='neither lines nor a bar of the losses on the screen; the log has them')
    add('--tensorboard', action='store_true', help="write TensorBoard's event files into --save-dir")
    return parser


def _default(action: argparse.Action) -> Any:
    """The value of an option that is not given: argparse converts a default only if it is a string."""
    return action.type(action.default) if action.type and isinstance(action.default, str) else action.default


def _check_names(parser: Parser, args: argparse.Namespace) -> None:
    names = data_manager.get_names(parser.kind)
    if args.dataset in data_manager.get_names() and args.dataset not in names:
        here, there = ('images', 'tracklets') if parser.kind == 'image' else ('tracklets', 'images')
        script = Path(sys.argv[0]).name
        other = script.replace('img', 'vid') if parser.kind == 'image' else script.replace('vid', 'img')
        parser.error(
            f'-d {args.dataset} holds {there}, and {script} trains on {here}: choose one of {", ".join(names)}, '
            f'or run {other if other != script else "a script for " + there}'
        )
    if args.dataset not in names:
        parser.error(f'-d {args.dataset}: no such data set; choose one of {", ".join(names)}')
    if args.arch not in models.get_names():
        parser.error(f'-a {args.arch}: no such model; choose one of {", ".join(models.get_names())}')
    smallest = getattr(models.factory[args.arch], 'smallest', 1)
    if min(args.height, args.width) < smallest:
        parser.error(
            f'--height {args.height} --width {args.width} are too small: -a {args.arch} needs {smallest} pixels or '
            f'more of each'
        )
    if args.pretrained not in ('imagenet', 'none') and not Path(args.pretrained).is_file():
        parser.error(f'--pretrained {args.pretrained}: no such file; give a path, imagenet or none')


def _check_batch(parser: Parser, args: argparse.Namespace) -> None:
    """Whether each process of the run has the same part of a batch, of 2 images or more: BatchNorm needs two."""
    listed = 1 if args.use_cpu else args.gpu_devices.count(',') + 1
    processes = int(os.environ.get('WORLD_SIZE', 1)) if 'LOCAL_RANK' in os.environ else listed  # torchrun's, or to come
    if args.evaluate or processes == 1 or (args.train_batch % processes == 0 and args.train_batch >= 2 * processes):
        return
    step = math.lcm(processes, getattr(args, 'num_instances', 1))  # P x K batches hold whole identities as well
    least = -(-2 * processes // step) * step
    below = max(args.train_batch // step * step, least)
    parser.error(
        f'--train-batch {args.train_batch} cannot be shared by {processes} processes, each with the same number of '
        f'images, 2 or more: use {below} or {below + step}'
    )


def _check_files(parser: Parser, args: argparse.Namespace, restarted: bool) -> None:
    """Whether the checkpoint is there and the folder can be written to; nothing of an earlier run is touched."""
    if args.resume and not Path(args.resume).is_file():
        parser.error(f'--resume {args.resume}: no such file')
    restarts = args.max_restarts or os.environ.get('TORCHELASTIC_MAX_RESTARTS', '0') != '0'  # by us, or by torchrun
    if args.overwrite and (args.auto_resume or restarts):
        other = '--auto-resume' if args.auto_resume else '--max-restarts'
        parser.error(f'--overwrite removes what {other} would go on from: give one of them')
    if args.evaluate and args.auto_resume and not restarted:
        parser.error('--evaluate tests the file of --resume: leave out --auto-resume')
    if args.resume_weights_only and not args.resume:
        parser.error('--resume-weights-only needs --resume PATH, the file to take the weights from')
    if args.start_epoch >= args.max_epoch and not args.evaluate:
        parser.error(f'--start-epoch {args.start_epoch} leaves nothing of --max-epoch {args.max_epoch} epochs to train')
    save_dir = Path(args.save_dir)
    held = sorted(save_dir.glob('*.pth.tar')) if save_dir.is_dir() else []
    goes_on = args.evaluate or args.overwrite or args.auto_resume or (args.resume and not args.resume_weights_only)
    if held and not goes_on:
        parser.error(
            f'--save-dir {save_dir} holds the checkpoints of a run ({held[0].name}): go on with --auto-resume '
            f'or --resume, remove them with --overwrite, or name another folder'
        )
    try:
        save_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=save_dir):
            pass
    except OSError as problem:
        parser.error(f'--save-dir {save_dir}: cannot be written to ({os.strerror(problem.errno)}); name another folder')


def positive_int(text: str) -> int:
    return _number(text, int, 1, 'a whole number of 1 or more')


def two_or_more(text: str) -> int:
    """Of images in a batch: BatchNorm needs two."""
    return _number(text, int, 2, 'a whole number of 2 or more')


def seed(text: str) -> int:
    return _number(text, int, 0, 'a whole number from 0 to 2^64 - 1', most=2**64 - 1)


def nonnegative_int(text: str) -> int:
    return _number(text, int, 0, 'a whole number of 0 or more')


def positive_float(text: str) -> float:
    return _number(text, float, math.ulp(0.0), 'a number above 0')


def nonnegative_float(text: str) -> float:
    return _number(text, float, 0.0, 'a number of 0 or more')


def fraction(text: str) -> float:
    return _number(text, float, 0.0, 'a number from 0 to 1', most=1.0)


def epochs_or_never(text: str) -> int | float:
    """A number of epochs; infinite for 0 or less, and for inf, as it is then shown."""
    if text == 'inf':
        return math.inf
    try:
        return int(text) if int(text) > 0 else math.inf
    except ValueError:
        raise argparse.ArgumentTypeError(f'must be a whole number, not {text!r}') from None


def gpu_list(text: str) -> str:
    """'0' or '0,1,2,3', each index once."""
    indices = text.split(',')
    if not all(index.isdecimal() for index in indices) or len({int(index) for index in indices}) < len(indices):
        raise argparse.ArgumentTypeError(f'{text!r} is not a list of GPU indices such as 0 or 0,1,2,3')
    return text


def _number(text: str, kind: type, least: float, expected: str, most: float = math.inf):
    try:
        value = kind(text)
        fits = math.isfinite(value) and least <= value <= most
    except (ValueError, OverflowError):  # the latter of whole numbers that no float holds
        fits = False
    if not fits:
        raise argparse.ArgumentTypeError(f'must be {expected}, not {text!r}')
    return value
