"""The options shared by all experiments: one typed line each, in the group of the module that uses it.

    parser = arguments.parser(__doc__, dataset='market1501', test_batch=32)
    parser.set_defaults(max_epoch=180, stepsize=60)
    parser.add_argument('--margin', type=arguments.positive_float, default=0.3, help='margin of the triplet loss')

Every option is an attribute of `args`, and `args.run`, `args.data`, `args.test`, `args.save` and `args.show` are the
groups. Options that a script adds belong to the recipe of its experiment, like the learning rate: a resumed run must
use the values it started with.
"""

import argparse
import dataclasses
import os
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import data_manager
import models
from runtime import commands
from runtime.checks import check
from runtime.errors import UserError
from runtime.processes import REPORT_SECONDS, of_environment
from runtime.values import (
    Value,
    check_reranking,
    epochs_or_never,
    fraction,
    gpu_list,
    nonnegative_float,
    nonnegative_int,
    path,
    positive_float,
    positive_int,
    seed,
)  # fmt: skip

FREE = ('max_epoch', 'pretrained')  # may change when a run resumes: its length and its initial weights


# The groups


def option(default: Value, text: str, *names: str, under: str = '', **how: Any) -> Value:
    """An option of a group: its default, its help, and alternative names.

    under: heading in -h, if not that of the group
    how:   further arguments for argparse, such as `type` or `choices`; `flag`: a name that replaces the default one
    """
    made: Value = field(default=default, metadata={'help': text, 'names': names, 'under': under, **how})
    return made


@dataclass(frozen=True)
class Recipe:
    """The options of the experiment. A resumed run must use the same values, except for FREE."""

    dataset: str = option('',
        'one of {datasets}, or your own data: {own}, see docs/data.md; or several, separated by commas, to train on '
        'them together', '-d')  # fmt: skip
    targets: str = option('', 'data sets to test instead of those of -d, separated by commas', '-t')
    select: str = option('', 'the tested data set by which best_model.pth.tar is chosen; by default the first one')
    combine: bool = option(False,
        'also train on the query and gallery sets of -d, for weights meant for use; these data sets are not '
        'tested')  # fmt: skip
    validate: float = option(0.0,
        'share of the training persons to hold out, to choose best_model.pth.tar by their mAP; the test set is '
        'used once, at the end', metavar='SHARE', type=fraction)  # fmt: skip
    test_share: float = option(0.5, 'share of the persons of folder:DIR without a split to draw for the test',
        type=fraction)  # fmt: skip
    arch: str = option('resnet50', 'one of {models}, or timm:NAME, see docs/models.md', '-a')
    pretrained: str = option('imagenet',
        'initial weights of the network; PATH is a checkpoint or a torchvision backbone. Ignored if --resume is '
        'given', metavar='imagenet|none|PATH', type=path)  # fmt: skip
    height: int = option(256, 'image height, in pixels', type=positive_int)
    width: int = option(128, 'image width, in pixels', type=positive_int)
    train_batch: int = option(32, 'images per batch, over all GPUs together', type=positive_int)
    balance: str = option('none',
        'equal shares of the data sets of -d A,B, or of the cameras, in every batch; camera in P x K batches: the K '
        'images of an identity from different cameras; see docs/data.md',
        choices=('none', 'dataset', 'camera'))  # fmt: skip
    padding: int = option(0, 'black pixels to add around an image for a random crop, which replaces the translation',
        type=nonnegative_int)  # fmt: skip
    random_erasing: float = option(0.0, 'probability of replacing a random rectangle of an image by the mean colour',
        type=fraction)  # fmt: skip
    interpolation: str = option('', "for resizing images; by default bilinear, for networks of timm their own",
        choices=('bilinear', 'bicubic'))  # fmt: skip
    max_epoch: int = option(60, 'number of epochs', type=positive_int)
    lr: float = option(0.0003, 'learning rate of Adam, before any decay', '--learning-rate', type=positive_float)
    stepsize: float = option(20, 'epochs between decays of the learning rate; 0 or less: no decay',
        type=epochs_or_never)  # fmt: skip
    gamma: float = option(0.1, 'factor by which the learning rate is multiplied at each decay', type=positive_float)
    weight_decay: float = option(5e-4, 'L2 penalty, as implemented in Adam', type=nonnegative_float)
    seed: int = option(1,
        'random seed for initial weights, data order and augmentation, and for drawing persons (folder:DIR, '
        '--validate)', type=seed)  # fmt: skip


@dataclass(frozen=True)
class Shared(Recipe):
    """Options that several modules need."""

    workers: int = option(4, 'decoding processes per GPU', '-j', under='data', type=nonnegative_int)
    evaluate: bool = option(False, 'test only', under='test')
    eval_step: int = option(-1, 'epochs between tests; -1: test after the last epoch only', under='test', type=int)
    no_report: bool = option(False, 'do not write report.html, the page of a test', under='test')
    save_dir: str = option('log', 'folder for logs, checkpoints and results', under='save', type=path)
    resume: str = option('',
        'continue from this checkpoint, or, with --evaluate, test it; published weights are accepted too', under='save',
        metavar='PATH', type=path)  # fmt: skip
    quiet: bool = option(False, 'do not print progress; the log still contains it', under='run')

    given: frozenset[str] = frozenset()  # the options on the command line

    def is_tested(self, epoch: int) -> bool:
        """Whether the model is tested after this epoch, counted from 0."""
        return epoch == self.max_epoch - 1 or (self.eval_step > 0 and (epoch + 1) % self.eval_step == 0)


@dataclass(frozen=True)
class DataOptions(Shared):
    data_dir: str = option('data', 'folder with the data sets, see data/README.md', type=path)
    cache: str = option('none',
        'decode the training images once, before the first epoch, and keep their pixels in memory or on the GPU',
        choices=('none', 'ram', 'device'))  # fmt: skip


@dataclass(frozen=True)
class TestOptions(Shared):
    __test__ = False  # not a test case, despite its name

    test_batch: int = option(32, '{things} per batch, over all GPUs; affects only rounding', type=positive_int)
    save_features: bool = option(False,
        'write the query and gallery features to --save-dir, for `python ranking.py`')  # fmt: skip
    distance: str = option('euclidean', 'distance between features', choices=('euclidean', 'cosine'))
    flip_test: bool = option(False, 'use the mean of the features of each image and its mirror image')
    rerank: bool = option(False,
        'use k-reciprocal re-ranking (Zhong et al., CVPR 2017), which also considers the neighbours of neighbours; do '
        'not compare its figures with those of a plain ranking')  # fmt: skip
    k1: int = option(20, 'with --rerank: nearest items considered as reciprocal neighbours', type=positive_int)
    k2: int = option(6, 'with --rerank: nearest items over which neighbourhoods are averaged', type=positive_int)
    lambda_value: float = option(0.3,
        'with --rerank: weight of the Euclidean distance, 0 to 1, relative to the Jaccard distance of neighbourhoods',
        flag='--lambda', type=fraction)  # fmt: skip
    any_camera: bool = option(False,
        "also count matches from the query's own camera, and drop only the query's own file, for data with unknown "
        'cameras; do not compare its figures with those of the usual protocol')  # fmt: skip
    multi_query: bool = option(False,
        'the feature of a query is the mean of those of all images of its person in its camera (Zheng et al., ICCV '
        '2015): for Market1501 those in gt_bbox; do not compare its figures with those of single queries')  # fmt: skip
    seq_len: int = option(15, 'frames sampled from each tracklet, evenly spaced; 0: all frames', kind='video',
        type=nonnegative_int)  # fmt: skip
    pool: str = option('avg', "how the frames' features are combined", kind='video', choices=('avg', 'max'))


@dataclass(frozen=True)
class SaveOptions(Shared):
    auto_resume: bool = option(False,
        'continue from the newest intact checkpoint in --save-dir, or start from the beginning if there is none: the '
        'same command works for the first start and after an interruption')  # fmt: skip
    save_minutes: float = option(5,
        'minutes between saves of resume_{epoch}_{batch}.pth.tar; an interruption loses no more than that',
        type=positive_float)  # fmt: skip
    keep: int = option(3, 'number of resume_*.pth.tar to keep', type=positive_int)
    keep_tests: int = option(0,
        'number of newest checkpoint_ep*.pth.tar to keep, besides best_model.pth.tar; 0: all',
        type=nonnegative_int)  # fmt: skip
    resume_weights_only: bool = option(False,
        'load only the weights of --resume and start a new run from them, at --start-epoch')  # fmt: skip
    start_epoch: int = option(0, 'first epoch of a run that starts from weights alone', type=nonnegative_int)
    overwrite: bool = option(
        False, 'remove an earlier run from --save-dir, except its logs and features, after the first step of this one'
    )
    assume: str = option('',
        'with --resume: replaces assumptions about a file of another project, separated by commas; `python weights.py '
        'FILE` lists them', under='test', metavar='NAME=VALUE')  # fmt: skip

    arguments: dict[str, Any] = field(default_factory=dict)  # every option
    recipe: dict[str, Any] = field(default_factory=dict)  # those that a resumed run must repeat
    defaults: dict[str, Any] = field(default_factory=dict)  # of these


@dataclass(frozen=True)
class RunOptions(Shared):
    use_cpu: bool = option(False, 'use the CPU even if there is a GPU')
    gpu_devices: str = option('0',
        'index of the GPU, or a list such as 0,1,2,3, which starts one process per GPU; they share each batch. Not '
        'needed under torchrun', type=gpu_list)  # fmt: skip
    sync_bn: bool = option(False,
        'compute BatchNorm over the images of all GPUs instead of each GPU separately; worth its cost if a GPU has few '
        'images, fewer than about 16, or few identities')  # fmt: skip
    precision: str = option('auto',
        'precision of the network; weights, losses and statistics are always float32. auto: bf16 where hardware '
        'makes that faster, and fp32 for the test, so that published figures are reproduced',
        choices=('auto', 'fp32', 'tf32', 'bf16'))  # fmt: skip
    compile: bool = option(False,
        'compile the network: on a GPU for training, with CUDA graphs, because small batches are limited by kernel '
        'launches; on a CPU for --evaluate. Takes a minute at the start')  # fmt: skip
    deterministic: bool = option(False,
        'use only deterministic algorithms, so that equal runs give equal weights on a GPU too; slower there, and an '
        'operation without one is an error. Not needed on the CPU')  # fmt: skip
    max_restarts: int = option(0,
        'restart, as with --auto-resume, if a process is killed or fails, at most N times', metavar='N',
        type=nonnegative_int)  # fmt: skip

    @property
    def several_gpus(self) -> bool:
        return ',' in self.gpu_devices and not self.use_cpu


@dataclass(frozen=True)
class ShowOptions(Shared):
    print_freq: int = option(10, 'batches between printed lines, and between rows of metrics.csv', under='run',
        type=positive_int)  # fmt: skip
    tensorboard: bool = option(False, 'write TensorBoard event files to --save-dir', under='run')


GROUPS = {'data': DataOptions, 'test': TestOptions, 'save': SaveOptions, 'run': RunOptions, 'show': ShowOptions}


class Arguments(argparse.Namespace):
    """All options by name, and the modules' groups."""

    data: DataOptions
    test: TestOptions
    save: SaveOptions
    run: RunOptions
    show: ShowOptions

    def plain(self) -> argparse.Namespace:
        """The options alone, in alphabetical order, as printed and as stored in checkpoints."""
        options = {key: _plain(each) for key, each in sorted(vars(self).items()) if key not in GROUPS}
        return argparse.Namespace(**options)


class ExperimentParser(commands.Parser):
    """Parses the options, checks them against each other, and passes each module its group.

    kind: 'image' or 'video', the items of the experiment
    """

    def __init__(self, description: str | None, kind: str):
        super().__init__(
            description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter, add_help=False
        )
        super().add_argument('-h', '--help', action='help', help='show this help message and exit')  # not of the recipe
        self.kind, self.shared = kind, list[argparse.Action]()  # shared: options that do not belong to the recipe
        self.experiment = self.add_argument_group(
            'the experiment (a resumed run must use the same values, except for --max-epoch and --pretrained)'
        )

    def add_argument(self, *names: str, **how: Any) -> argparse.Action:
        """Add an option of the experiment, as scripts do."""
        return self.experiment.add_argument(*names, **how)

    def error(self, message: str) -> NoReturn:
        """Report a mistake: the first process of each host does, and the others wait until their launcher ends them."""
        if of_environment().local_rank:
            time.sleep(REPORT_SECONDS)
        super().error(message)  # of another process, if it alone found the mistake

    def parse_args(self, args: Sequence[str] | None = None) -> Arguments:  # type: ignore[override]  # no namespace
        options = vars(super().parse_args(args))
        restarted = {'auto_resume': True, 'overwrite': False} if of_environment().restarts else {}  # by torchrun
        resumed = {'pretrained': 'none'} if options['resume'] else {}  # nothing is downloaded when weights are given
        parsed = Arguments(**options | restarted | resumed)
        check_reranking(self, parsed)
        try:
            check(self.kind, parsed)
        except UserError as mistake:
            self.error(str(mistake))
        plain = vars(parsed.plain())
        recipe = [each for each in self._actions if each not in self.shared and each.dest not in ('help', *FREE)]
        more = {
            'arguments': plain,
            'given': self._given(args, plain),
            'recipe': {name: plain[name] for name in sorted(action.dest for action in recipe)},
            # If two options share a name in `args`, the default of the first one counts.
            'defaults': {action.dest: self._default(action) for action in reversed(recipe)},
        }
        for module, group in GROUPS.items():
            values = {field.name: (plain | more)[field.name] for field in dataclasses.fields(group)
                      if field.name in plain | more}  # fmt: skip
            setattr(parsed, module, group(**values))
        return parsed

    def _given(self, args: Sequence[str] | None, names: Collection[str]) -> frozenset[str]:
        """The names of the options on the command line, whatever their values."""
        parsed = argparse.Namespace(**dict.fromkeys(names))  # None, from which append and count start
        super().parse_args(args, parsed)
        return frozenset(name for name, value in vars(parsed).items() if value is not None)

    def _default(self, action: argparse.Action) -> object:
        """The value of an option that is not given; argparse converts a default only if it is a string."""
        value, convert = action.default, action.type
        return _plain(convert(value) if callable(convert) and isinstance(value, str) else value)


def _plain(value: object) -> object:
    plain = os.fspath(value) if isinstance(value, os.PathLike) else value
    return [_plain(each) for each in plain] if isinstance(plain, list) else plain


def parser(description: str | None, dataset: str, test_batch: int, without: Collection[str] = ()) -> ExperimentParser:
    """The options of an experiment, on images or on tracklets depending on its default data set `dataset`.

    Args:
        description: the docstring of the script.
        test_batch: default of --test-batch, in images or tracklets.
        without: shared options that the experiment does not have.
    """
    kind = 'video' if dataset in data_manager.get_names('video') else 'image'
    parser = ExperimentParser(description, kind)
    words = {
        'datasets': ', '.join(data_manager.get_names(kind)),
        'own': data_manager.OWN_NAMES,
        'models': ', '.join(models.get_names()),
        'things': 'tracklets' if kind == 'video' else 'images',
    }
    headings: dict[str, Callable[..., argparse.Action]] = {'': parser.add_argument}
    for module, each in _options():
        metadata = dict(each.metadata)
        if metadata.pop('kind', kind) != kind or each.name in without:
            continue
        text, names, under = (metadata.pop(key) for key in ('help', 'names', 'under'))
        heading = under or module
        if heading not in headings:
            headings[heading] = parser.add_argument_group(heading).add_argument
        flags = [metadata.pop('flag', f'--{each.name.replace("_", "-")}'), *names]
        if isinstance(each.default, bool):
            metadata['action'] = 'store_true'
        for key, word in words.items():
            text = text.replace(f'{{{key}}}', word)
        made = headings[heading](*sorted(flags, key=len), dest=each.name, default=each.default, help=text, **metadata)
        parser.shared += [made] * bool(module)
    parser.set_defaults(dataset=dataset, test_batch=test_batch)
    return parser


def _options() -> Iterator[tuple[str, dataclasses.Field]]:
    """Every option once, with the module whose group it belongs to; '' for those of the experiment."""
    seen: set[str] = set()
    for module, group in ({'': Recipe} | GROUPS).items():
        for each in dataclasses.fields(group):
            if 'help' in each.metadata and each.name not in seen:
                seen.add(each.name)
                yield module, each
