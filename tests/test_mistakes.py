"""A mistake of the user gives `error: what, where, what to do`, one line on stderr, status 2, and changes no file."""

import hashlib
import importlib
import os
import pickle
import re
import shlex
import shutil
import socket
import struct
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from conftest import HANG, ROOT
from PIL import Image
from scipy.io import loadmat, savemat
from torchvision.models import ResNet50_Weights

from runtime import commands

XENT, HTRI, VIDEO = 'train_img_model_xent', 'train_img_model_xent_htri', 'train_vid_model_xent'
RESUMED = 'run/checkpoint_ep1.pth.tar'

Make = Callable[[Path], object]  # puts the mistake into a folder that holds data/, run/ and features/


@dataclass
class Mistake:
    """A mistake: what is done, in a separate folder, and the expected message.

    logged:  the run has come as far as having a log file, where the message stands too
    drawn:   the message draws the tree that is missing, over several lines
    trained: an epoch is begun before it can be known
    process: in a process of its own, as from the shell
    """

    name: str
    options: str
    message: str  # a regular expression
    make: Make = lambda folder: None
    script: str = XENT
    environ: Mapping[str, str | None] = field(default_factory=dict)  # None: not in it
    logged: bool = True
    drawn: bool = False
    trained: bool = True
    process: bool = False

    @property
    def reads(self) -> str:
        """The data set that a run would come to."""
        return {'ranking': '', VIDEO: 'mars'}.get(self.script, 'market1501') if self.logged else ''


# ---- options, which are refused before anything is read or written ----


def option(options: str, message: str, script: str = XENT, process: bool = False) -> Mistake:
    name = f'{options[:60]} ({script.removeprefix("train_")})'
    return Mistake(name, options, re.escape(message), script=script, logged=False, process=process)


OPTIONS = [
    option('--train-batch 1', '--train-batch 1: a batch needs at least 2 images, for BatchNorm', process=True),
    option('--train-batch 0', "--train-batch: must be an integer of at least 1 (at most 2147483647), not '0'"),
    option('--train-batch x', '--train-batch: must be an integer of at least 1'),
    option(f'--test-batch {10**400}', '--test-batch: must be an integer of at least 1'),
    option(f'--height {10**20}', '--height: must be an integer of at least 1 (at most 2147483647)'),
    option(f'--padding {10**20}', '--padding: must be an integer of at least 0 (at most 2147483647)'),
    option(f'--workers {10**20}', '-j/--workers: must be an integer of at least 0 (at most 2147483647)'),
    option('--padding 16', '--padding 16 is too large for --height 32 --width 16'),
    option('--lr 0', '--lr/--learning-rate: must be a number greater than 0'),
    option('--lr nan', '--lr/--learning-rate: must be a number greater than 0'),
    option('--gamma -1', '--gamma: must be a number greater than 0'),
    option('--weight-decay -1', '--weight-decay: must be a number of at least 0'),
    option('--stepsize x', '--stepsize: must be an integer'),
    option('--seed -1', '--seed: must be an integer from 0 to 2^64 - 1'),
    option(f'--seed {2**64}', '--seed: must be an integer from 0 to 2^64 - 1'),
    option('--workers -1', '-j/--workers: must be an integer of at least 0'),
    option('--height 0', '--height: must be'),
    option('--max-epoch 0', '--max-epoch: must be'),
    option('--print-freq 0', '--print-freq: must be'),
    option('--gpu-devices a', "--gpu-devices: 'a' is not a list of GPU indices"),
    option('--gpu-devices 0,0', "--gpu-devices: '0,0' is not a list of GPU indices"),
    option('--precision fp8', '--precision: invalid choice'),
    option('-a resnet51', "-a resnet51: there is no model 'resnet51'; choose one of"),
    option('-a densenet121', '--height 32 --width 16 is too small: -a densenet121 needs at least 29 pixels in each'),
    option('-d cuhk03', '-d cuhk03: no such data set; choose one of'),
    option('-d mars', 'run train_vid_model_xent.py'),
    option('-d market1501', 'run train_img_model_xent.py', VIDEO),
    option('--seq-len -1', '--seq-len: must be an integer of at least 0', VIDEO),
    option('--pool sum', '--pool: invalid choice', VIDEO),
    option('--any-camera --multi-query', '--any-camera does not work with --multi-query: averaged images in the '
           'gallery would count as matches; remove one of the two'),
    option('--k1 0', '--k1: must be an integer of at least 1'),
    option('--k1 10', '--k1 is an option of re-ranking: add --rerank, or remove it'),
    option('--lambda 1.1', '--lambda: must be a number from 0 to 1', VIDEO),
    option('--seq-len 4', 'unrecognized arguments: --seq-len 4'),
    option('--margin -0.1', '--margin: must be a number of at least 0', HTRI),
    option('--num-instances 5', '--train-batch 8 is not a multiple of --num-instances 5', HTRI),
    option('--weight-cent 0', '--weight-cent: must be a number greater than 0', 'train_img_model_cent'),
    option('--weight-cent 1e-50', '--weight-cent: must be a number greater than 0 (at least', 'train_img_model_cent'),
    option('--lr-cent 0', '--lr-cent: must be a number greater than 0', 'train_img_model_cent'),
    option('--resume nowhere.pth.tar', '--resume nowhere.pth.tar: no such file'),
    option('--resume run', '--resume run is a folder; the newest checkpoint in it is run/checkpoint_ep1.pth.tar'),
    option('--resume data', '--resume data is a folder without checkpoints; give the path of a checkpoint'),
    option('--pretrained nowhere', '--pretrained nowhere: no such file'),
    option('--pretrained data', '--pretrained data is a folder without checkpoints'),
    option('--resume-weights-only', '--resume-weights-only needs --resume'),
    option('--assume last_stride=1', '--assume needs --resume PATH'),
    option('--balance person', "--balance: invalid choice: 'person'"),
    option('--start-epoch 2', '--start-epoch 2 leaves no epoch to train'),
    option('--save-dir file/log', '--save-dir file/log: cannot be written to'),
    option('--save-dir file', '--save-dir file: cannot be written to'),
    option('--save-dir run', 'contains the checkpoints of a run (best_model.pth.tar)'),
    option('--save-dir run --overwrite --auto-resume', '--overwrite removes what --auto-resume would continue from'),
    option('--max-epoch', '--max-epoch: expected one argument'),
    Mistake('features into a file', '--save-features', '--save-features: log/features cannot be written to; remove it',
            lambda folder: ((folder / 'log').mkdir(), (folder / 'log/features').touch()), logged=False),
    *(
        Mistake(f'{name} that is a folder', '', rf'--save-dir: log/{name} cannot be written \(Is a directory\); choose',
                lambda folder, name=name: (folder / 'log' / name).mkdir(parents=True), logged=False)
        for name in ('log_train.txt', '.lock')
    ),
]  # fmt: skip


# ---- data sets ----


def tree(name, options, message, make=lambda folder: None, script=XENT, drawn=False) -> Mistake:
    return Mistake(name, options, message, make, script, drawn=drawn, trained=False)


def removed(path: str) -> Make:
    def make(folder: Path) -> None:
        place = folder / path
        shutil.rmtree(place) if place.is_dir() else place.unlink()

    return make


def emptied(path: str) -> Make:
    """An empty folder instead."""
    return lambda folder: (removed(path)(folder), (folder / path).mkdir())


def written(path: str, content: bytes) -> Make:
    return lambda folder: (folder / path).write_bytes(content)


def cut(path: str, length: int) -> Make:
    return lambda folder: (folder / path).write_bytes((folder / path).read_bytes()[:length])


def without(part: str, begin: str) -> Make:
    """A part of Market1501 that lost the images whose names do not begin so."""
    return lambda folder: [
        path.unlink() for path in (folder / 'data/market1501' / part).iterdir() if not path.name.startswith(begin)
    ]


def one_camera(folder: Path, parts: tuple[str, ...] = ('query', 'bounding_box_test')) -> None:
    for part in parts:
        for path in (folder / 'data/market1501' / part).glob('0*'):
            path.rename(path.with_name(re.sub(r'_c\d', '_c1', path.name)))


def one_training_camera(folder: Path) -> None:
    one_camera(folder, ('bounding_box_train',))


def one_folder_each(folder: Path) -> None:
    for path in (folder / 'data/market1501/bounding_box_train').glob('0*'):
        person = path.with_name(path.name[:4])
        person.mkdir(exist_ok=True)
        path.rename(person / path.name)


def one_each(folder: Path) -> None:
    for path in (folder / 'data/market1501/bounding_box_train').iterdir():
        seen = path.with_name(path.name[:4])
        path.unlink() if seen.exists() else seen.touch()


def table(name: str, change: Callable[[np.ndarray], np.ndarray | None], key: str | None = None) -> Make:
    """One of MARS's tables with its numbers (as floats) changed, perhaps under another key."""

    def make(folder: Path) -> None:
        path = folder / f'data/mars/info/{name}.mat'
        own = name.removesuffix('_info').replace('tracks', 'track') + '_info' if 'tracks' in name else name
        values = loadmat(path)[own].astype(np.float64)
        changed = change(values)
        savemat(path, {key or own: values if changed is None else changed})

    return make


def track(row: int, column: int, value: float) -> Make:
    """One number of the table of the training tracklets: first and last frame, pid, camera."""

    def change(values: np.ndarray) -> None:
        values[row, column] = value

    return table('tracks_train_info', change)


TRAIN_NAMES = 'data/mars/info/train_name.txt'
OFFICIAL = 'or download info/ again if it is the published one'

TREES = [
    tree('no data folder', '--data-dir nowhere', "no market1501 or .* in --data-dir 'nowhere'; expected:", drawn=True),
    tree('no mars', '--data-dir nowhere', "no mars or MARS in --data-dir 'nowhere'", script=VIDEO, drawn=True),
    tree('a part is missing', '', 'market1501 contains no query;', removed('data/market1501/query'), drawn=True),
    tree('a data folder that is a file', '--data-dir file', 'no market1501 or', drawn=True),
    tree('a toy in a file', '-d toy_market1501 --data-dir file',
         'toy_market1501 cannot be read or drawn in file: .*choose another --data-dir'),
    tree('an incomplete toy', '-d toy_market1501', 'toy_market1501 contains no query.*; expected',
         lambda folder: (folder / 'data/toy_market1501/bounding_box_train').mkdir(parents=True), drawn=True),
    tree('a part that is a file', '', 'query cannot be read: Not a directory',
         lambda folder: (removed('data/market1501/query')(folder), written('data/market1501/query', b'')(folder))),
    tree('no images', '', 'bounding_box_train contains no images of persons',
         emptied('data/market1501/bounding_box_train')),
    tree('junk alone', '', 'bounding_box_test contains no images', without('bounding_box_test', '-1')),
    tree('a holiday', '', "the name 'holiday.jpg' cannot be parsed", written('data/market1501/query/holiday.jpg', b'')),
    tree('two lines in a name', '', r"the name 'a\\nb.jpg' cannot be parsed",
         written('data/market1501/query/a\nb.jpg', b'')),
    tree('person -2', '', 'has person -2, but persons are numbered from 0',
         written('data/market1501/query/-2_c1s1_000001_00.jpg', b'')),
    tree('one identity', '', 'the training set has only one person', without('bounding_box_train', '0002')),
    tree('no match', '', r'none of the \d+ queries has a match', without('bounding_box_test', '0000')),
    tree('one camera', '', r'none of the (\d+) queries .*: 0 .* not in the gallery, \1 .* same camera only; .* if '
         'the cameras are unknown, use --any-camera', one_camera),
    tree('no boxes of the queries', '--multi-query', '--multi-query needs .*gt_bbox, which is missing or empty; it is',
         removed('data/market1501/gt_bbox')),
    tree('a query without a box', '--multi-query', 'no image of the person and camera of 4 of its 10 queries, ',
         without('gt_bbox', '001')),
    tree('boxes without a name', '--multi-query', "gt_bbox: the name 'a.jpg' cannot be parsed",
         written('data/market1501/gt_bbox/a.jpg', b'')),
    tree('single queries', '--multi-query', 'mars has one query of each person in a camera, and no ', script=VIDEO),
    tree('a batch larger than the data', '--train-batch 999', r'--train-batch is 999, but .* only \d+ images: use'),
    tree('P larger than the data', '--train-batch 64', 'needs 16 identities with --num-instances 4, but', script=HTRI),
    tree('one data set', '--balance dataset', '--balance dataset: market1501 is one data set: give several, as'),
    tree('one training camera', '--balance camera', 'market1501 has one camera to train on', one_training_camera),
    tree('P of 1', '--train-batch 4', 'has room for one identity with --num-instances 4', script=HTRI),
    tree('K of 1', '--num-instances 1', '--num-instances is 1: a triplet needs at least 2', script=HTRI),
    tree('one image each', '', 'each of the 6 identities in the training set has only one image', one_each, HTRI),
    tree('no training images', '', 'market1501 contains no bounding_box_train; expected:',
         removed('data/market1501/bounding_box_train'), drawn=True),
    tree('a folder for each person', '', r'contains .* but 6 folders \(0002, .*; move the images from its folders up',
         one_folder_each),
    tree('no name file', '', 'mars contains no info/train_name.txt; expected', removed(TRAIN_NAMES), VIDEO, drawn=True),
    tree('a name file not in ASCII', '', f'cannot be read as a list of file names .*{OFFICIAL}',
         written(TRAIN_NAMES, 'Bücher'.encode()), VIDEO),
    tree('a name file of other names', '', "train_name.txt: the name 'x' cannot be parsed",
         written(TRAIN_NAMES, b'x\n' * 999), VIDEO),
    tree('an empty name file', '', r'track 1 has lines 1 to \d+ of .*, which has 1', written(TRAIN_NAMES, b''), VIDEO),
    tree('a name file that is a folder', '', 'cannot be read as a list of file names', emptied(TRAIN_NAMES), VIDEO),
    tree('a table that is text', '', f'tracks_train_info.mat cannot be read as a .mat file .*{OFFICIAL}',
         written('data/mars/info/tracks_train_info.mat', b'no table' * 40), VIDEO),
    tree('a table that is cut short', '', 'query_IDX.mat cannot be read as a .mat file',
         cut('data/mars/info/query_IDX.mat', 150), VIDEO),
    tree('a table of another name', '', "contains no table 'track_train_info'",
         table('tracks_train_info', lambda values: values, 'other'), VIDEO),
    tree('a table of 3 columns', '', r'is a table of shape \(\d+, 3\), but must have 4',
         table('tracks_train_info', lambda values: values[:, :3]), VIDEO),
    tree('a table of words', '', 'is not a table of integers',
         table('tracks_train_info', lambda values: np.array([['a', 'b']], object)), VIDEO),
    tree('NaN in a table', '', 'is not a table of integers', track(0, 0, np.nan), VIDEO),
    tree('a huge number in a table', '', 'is not a table of integers', track(0, 1, 1e300), VIDEO),
    tree('a track beyond the names', '', r'track 1 has lines 1 to 9999 of .*download info/', track(0, 1, 9999), VIDEO),
    tree('a track from line -3', '', 'track 1 has lines -3 to', track(0, 0, -3), VIDEO),
    tree('person -2', '', 'track 2 has person -2', track(1, 2, -2), VIDEO),
    tree('camera -1', '', 'track 2 has camera -1, but cameras are numbered from 0', track(1, 3, -1), VIDEO),
    tree('a tracklet of two cameras', '', r'mixes \w+ and \w+, but a tracklet is one person', track(0, 1, 6), VIDEO),
    tree('a query beyond the tracks', '', r'query_IDX.mat refers to track 9999, but tracks are 1 to',
         table('query_IDX', lambda values: values + 9999 - values), VIDEO),
    tree('query 0', '', 'query_IDX.mat refers to track 0', table('query_IDX', lambda values: values * 0), VIDEO),
]  # fmt: skip


# ---- images ----

Change = Callable[[Path, bytes], object]  # puts something in the place of an image, which held these bytes
EVALUATE = f'--evaluate --resume {RESUMED}'


def image(
    name, change: Change, message, options='', part='market1501/bounding_box_train', script=XENT, trained=True
) -> Mistake:
    """The first image of a part of a data set is something else."""

    def make(folder: Path) -> None:
        path = min((folder / 'data' / part).rglob('0*.jpg'))
        content = path.read_bytes()
        path.unlink()
        change(path, content)

    message = rf'cannot read the image data/{part}/\S+jpg: ({message})'
    return Mistake(name, options, message, make, script, trained=trained)


def bomb(path: Path, _) -> None:
    """A PNG of a few bytes that claims 60000 x 60000 pixels."""
    claim = b'IHDR' + struct.pack('>IIBBBBB', 60_000, 60_000, 8, 2, 0, 0, 0)
    end = struct.pack('>I', 0) + b'IEND' + struct.pack('>I', zlib.crc32(b'IEND'))
    path.write_bytes(b'\x89PNG\r\n\x1a\n' + struct.pack('>I', 13) + claim + struct.pack('>I', zlib.crc32(claim)) + end)


def floats(path: Path, _) -> None:
    Image.fromarray(np.zeros((48, 24), np.float32)).save(path, 'TIFF')


def text(path: Path, _) -> None:
    path.write_text('not a picture')


def half(path: Path, content: bytes) -> None:
    path.write_bytes(content[: len(content) // 2])


def nothing(path: Path, _) -> None:
    path.touch()


def linked_to_nowhere(path: Path, _) -> None:
    for other in [path, *path.parent.glob('0*.jpg')]:
        other.unlink(missing_ok=True)
        other.symlink_to('nowhere')


MISSING = (
    r'No such file or directory \(missing: 1 of \d+ files of the test\); restore them, or unpack the data set again'
)
MISSING_ALL = r'No such .* \(missing: \d\d of \d\d files of the test, also \S+jpg, \S+jpg \.\.\.\)'
GALLERY, FRAMES = 'market1501/bounding_box_test', 'mars/bbox_train'

IMAGES = [
    image('a text', text, 'it is not a JPEG, .* file'),
    image('a text that workers read', text, 'it is not a JPEG, .* file', '--workers 2'),
    image('a text for the cache', text, 'it is not a JPEG, .* file', '--cache ram'),
    image('a text instead of an old run', text, 'it is not a JPEG', '--train-batch 24 --save-dir run --overwrite'),
    image('zero bytes', nothing, 'it is not a JPEG'),
    image('a cut JPEG', half, 'Truncated File Read|image file is truncated'),
    image('a folder', lambda path, _: path.mkdir(), 'Is a directory'),
    image('a link to nowhere', lambda path, _: path.symlink_to('nowhere'), 'No such file or directory'),
    image('a link to itself', lambda path, _: path.symlink_to(path.name), 'Too many levels of symbolic links'),
    image('a pipe', lambda path, _: os.mkfifo(path), 'it is a pipe'),
    image('a decompression bomb', bomb, '.*decompression bomb'),
    image('floating-point pixels', floats, 'its pixels are floating-point numbers'),
    image('a frame that is not there', lambda path, _: None, 'No such file', '', FRAMES, VIDEO),
    image('a cut frame', half, 'Truncated File Read|image file is truncated', '', FRAMES, VIDEO),
    image('a text in the gallery', text, 'it is not a JPEG', EVALUATE, GALLERY),
    image('a cut JPEG in the gallery', half, 'Truncated File Read|image file is truncated', EVALUATE, GALLERY),
    image('a bomb in the gallery after training', bomb, '.*decompression bomb', '--eval-step 1', GALLERY),
    image('a folder among the queries', lambda path, _: path.mkdir(), 'Is a directory', EVALUATE, 'market1501/query'),
    image('a text where features are saved again', text, 'it is not a JPEG',
          f'{EVALUATE} --save-features --save-dir run', GALLERY),
    image('a query that is a link to itself', lambda path, _: path.symlink_to(path.name), MISSING, '',
          'market1501/query', trained=False),
    image('a query that is a link to nowhere', lambda path, _: path.symlink_to('nowhere'), MISSING, '',
          'market1501/query', trained=False),
    image('a gallery of links to nowhere', linked_to_nowhere, MISSING_ALL, '', GALLERY, trained=False),
    image('a frame of the test that is gone', lambda path, _: None, MISSING, '', 'mars/bbox_test/0000', VIDEO, False),
    image('a frame that is gone, at the test', lambda path, _: None, MISSING, f'--evaluate --resume {RESUMED}',
          'mars/bbox_test/0000', VIDEO, False),
]  # fmt: skip


# ---- checkpoints ----


def checkpoint(name, make: Make, message, options='--resume weights.pth', script=XENT, logged=True) -> Mistake:
    return Mistake(name, options, message, make, script, logged=logged)


def saved(thing: object) -> Make:
    return lambda folder: torch.save(thing() if callable(thing) else thing, folder / 'weights.pth')


def edited(change: Callable[[dict], object]) -> Make:
    """The checkpoint of the run, changed, in weights.pth."""

    def make(folder: Path) -> None:
        state = torch.load(folder / RESUMED, weights_only=True)
        change(state)
        torch.save(state, folder / 'weights.pth')

    return make


def zipped(names: list[str], how: int = zipfile.ZIP_STORED) -> Make:
    def make(folder: Path) -> None:
        with zipfile.ZipFile(folder / 'weights.pth', 'w', how) as archive:
            for name in names:
                archive.writestr(name, b'0' * 99)

    return make


def flipped(folder: Path) -> None:
    content = bytearray((folder / RESUMED).read_bytes())
    with zipfile.ZipFile(folder / RESUMED) as archive:
        record = next(record for record in archive.infolist() if record.filename.endswith('data/0'))
    content[record.header_offset + 30 + len(record.filename) + 99] ^= 1  # behind its header, name and padding
    (folder / 'weights.pth').write_bytes(content)


class Burglar:
    """Runs a command when it is unpickled."""

    def __reduce__(self):
        return os.system, ('touch burgled',)


def nan_weights(state: dict) -> None:
    state['state_dict']['base.0.weight'].fill_(torch.nan)


def whole_numbers(state: dict) -> None:
    state['state_dict'] = {key: value.long() for key, value in state['state_dict'].items()}


def of_resnet50() -> dict:
    return {'base.7.2.conv3.weight': torch.zeros(2048, 512, 1, 1, dtype=torch.bfloat16)}


WEIGHTS = '--evaluate --resume weights.pth'
OTHER = 'has a different recipe: '

CHECKPOINTS = [
    checkpoint('a text', written('weights.pth', b'a text'), r"is not a PyTorch file \(it begins with b'a te'\)"),
    checkpoint('an empty file', written('weights.pth', b''), 'weights.pth is empty; get the checkpoint again'),
    checkpoint('a cut file', cut(RESUMED, 5000), 'is damaged, truncated or not a checkpoint', f'--resume {RESUMED}'),
    checkpoint('a flipped bit', flipped, 'record .* fails its checksum; get the file again'),
    checkpoint('a pipe', lambda folder: os.mkfifo(folder / 'weights.pth'), 'is not a regular', logged=False),
    checkpoint('a pickle', written('weights.pth', pickle.dumps({}, 2)), 'is a pickle, but not a PyTorch file'),
    checkpoint('a cut pickle', written('weights.pth', b'\x80\x02}q'), 'is damaged, truncated or not a checkpoint'),
    checkpoint('a zip file', zipped(['README']), 'is a zip file, but not a checkpoint'),
    checkpoint('a TorchScript program', zipped(['a/data.pkl', 'a/constants.pkl']), 'is a TorchScript program'),
    checkpoint('a compressed file', zipped(['a/data.pkl'], zipfile.ZIP_DEFLATED), 'has compressed records'),
    checkpoint('a burglar', saved({'state_dict': Burglar()}), 'refers to posix.system, which weights never need'),
    checkpoint('a burglar, at the test', saved(Burglar()), 'refers to posix.system', WEIGHTS),
    checkpoint('a whole model', saved(lambda: tiny.Tiny(6)), 'refers to tiny.Tiny, which weights never need'),
    checkpoint('a view larger than its storage', saved(lambda: {'a': torch.zeros(1).expand(10**9)}),
               'has a tensor that is larger than its storage'),
    checkpoint('a list', saved([1, 2]), 'contains no weights but a list; give a checkpoint'),
    checkpoint('an empty dict', saved({}), 'contains no weights but a dict'),
    checkpoint('a dict of numbers', saved({'a': 1}), 'contains no weights: a is a int, not a tensor'),
    checkpoint('a tensor', saved(lambda: torch.zeros(3)), 'contains no weights but a Tensor'),
    checkpoint('weights of whole numbers', edited(whole_numbers), 'different shapes in .* int64', WEIGHTS),
    checkpoint('another architecture', saved(of_resnet50), 'it looks like a resnet50: try --arch resnet50', WEIGHTS),
    checkpoint('another classifier', saved(lambda: tiny.Tiny(9).state_dict()),
               'has a classifier for a different number of identities'),
    checkpoint('a missing weight', edited(lambda state: state['state_dict'].pop('base.0.weight')),
               'does not fit the model: missing base.0.weight', WEIGHTS),
    checkpoint('one name for two tensors', saved(lambda: {'a': torch.zeros(1), 'module.a': torch.ones(1)}),
               'contains a twice with different values'),
    checkpoint('NaN at the test', edited(nan_weights), 'has weights that are not finite, in ', WEIGHTS),
    checkpoint('NaN in training', edited(nan_weights), 'has weights that are not finite, in '),
    checkpoint('another learning rate', removed('file'), OTHER + '--lr was 0.0003, is 0.1',
               f'--resume {RESUMED} --lr 0.1'),
    checkpoint('another script', removed('file'), OTHER + '--margin was not an option, is 0.3',
               f'--resume {RESUMED}', HTRI),
    checkpoint('another recipe of its own accord', removed('file'), OTHER + '--seed was 1, is 2',
               '--auto-resume --save-dir run --seed 2'),
    checkpoint('no scheduler', edited(lambda state: state['state'].pop('scheduler')), "no state for 'scheduler'"),
    checkpoint('another optimizer', edited(lambda state: state['state']['optimizer']['param_groups'].pop()),
               "its state for 'optimizer' does not fit"),
    checkpoint('an optimizer that is a number', edited(lambda state: state['state'].update(optimizer=1)),
               "its state for 'optimizer' does not fit"),
    checkpoint('a newer format', edited(lambda state: state.update(format='deep-person-reid 2')),
               'has the format deep-person-reid 2, not deep-person-reid 1: use the version that wrote it'),
    checkpoint('no recipe', edited(lambda state: state.pop('recipe')),
               "weights.pth: its 'recipe' is missing or invalid; get"),
    checkpoint('an epoch that is a word', edited(lambda state: state.update(epoch='one')),
               "weights.pth: its 'epoch' is missing or invalid; get"),
    *(
        checkpoint(f'{name} is {value}', edited(lambda state, name=name, value=value: state.update({name: value})),
                   f"weights.pth: its '{name}' is missing or invalid; get")
        for name, value in [('epoch', 10**25), ('epoch', -9), ('batch', None), ('batch', '1'), ('batch', -3),
                            ('best_rank1', float('nan')), ('recipe', {1: 2})]
    ),
    checkpoint('nothing left', removed('file'), 'there is nothing left to train; raise --max-epoch',
               f'--resume {RESUMED} --max-epoch 1'),
    checkpoint('an old run that is to go', written('weights.pth', b''), 'weights.pth is empty',
               '--save-dir run --overwrite --resume-weights-only --resume weights.pth'),
]  # fmt: skip


# ---- first weights, environments, and the command of ranking ----

RESNET = '-a resnet50 --height 64 --width 32 --pretrained'
HUB = 'cache/hub/checkpoints/'


def cached(folder: Path) -> None:
    (folder / HUB).mkdir(parents=True)
    (folder / HUB / ResNet50_Weights.IMAGENET1K_V1.url.rpartition('/')[2]).write_bytes(b'half a download')


LONG = 300 * 'n'  # more than a file system takes

PRETRAINED = [
    Mistake('first weights that are text', f'{RESNET} file', 'file is empty; get the checkpoint again'),
    Mistake('first weights of another model', f'{RESNET} {RESUMED}', 'ep1.pth.tar does not fit the model: missing'),
    Mistake('first weights of another shape', f'{RESNET} weights.pth', 'missing .*does not look like an architecture',
            saved(lambda: {'conv1.weight': torch.zeros(1)})),
    Mistake('first weights with a name that is too long', f'--pretrained {LONG}', f'--pretrained {LONG}: no such file',
            logged=False),
    Mistake('weights with a name that is too long', f'--resume {LONG}', f'--resume {LONG}: no such file', logged=False),
    Mistake('a folder with a name that is too long', f'--save-dir {LONG}', r'cannot be written to \(File name too long',
            logged=False),
    Mistake('data with a name that is too long', f'--data-dir {LONG}', 'error: no market1501', drawn=True),
    Mistake('a damaged cache', f'{RESNET} imagenet', r'-\w+.pth is damaged .*; delete it and start again',
            cached, environ={'TORCH_HOME': 'cache'}),
    Mistake('a cache in a file', f'{RESNET} imagenet', r'could not be downloaded \(.*Not a directory.*download https',
            environ={'TORCH_HOME': 'file/cache'}),
    Mistake('a home in a file', f'{RESNET} imagenet', r'could not be downloaded \(.*Not a directory',
            environ={'HOME': '/dev/null', 'TORCH_HOME': None, 'XDG_CACHE_HOME': None}),
]  # fmt: skip

GROUP = {  # of torchrun, one process
    'RANK': '0', 'WORLD_SIZE': '1', 'LOCAL_RANK': '0', 'LOCAL_WORLD_SIZE': '1', 'MASTER_ADDR': 'localhost',
    'MASTER_PORT': '29500',
}  # fmt: skip


DUAL = socket.has_dualstack_ipv6()
TAKEN = socket.create_server(('', 0), family=socket.AF_INET6 if DUAL else socket.AF_INET, dualstack_ipv6=DUAL)
PORT = TAKEN.getsockname()[1]


def group(name: str, message: str, options: str = '', **changed: str) -> Mistake:
    return Mistake(name, options, message, environ={**GROUP, **changed}, logged=False)


ENVIRONMENTS = [
    Mistake('half a group', '', 'LOCAL_RANK is set in the environment, but RANK, .* is not: start with torchrun',
            environ={'LOCAL_RANK': '0'}, logged=False),
    Mistake('a mistake in half a group', '--lr 0', 'LOCAL_RANK is set', environ={'LOCAL_RANK': '0'}, logged=False),
    group('a rank that is a word', "RANK is 'first'.*: start with torchrun", RANK='first'),
    group('no processes', "WORLD_SIZE is '0'", WORLD_SIZE='0'),
    group('a fraction of processes', "WORLD_SIZE is '1.5'", WORLD_SIZE='1.5'),
    group('a rank beyond the group', "RANK is '3'", RANK='3'),
    group('a negative rank', "LOCAL_RANK is '-1'", LOCAL_RANK='-1'),
    group('an empty rank', "LOCAL_RANK is ''", LOCAL_RANK=''),
    group('a port that is a word', "MASTER_PORT is 'http'", WORLD_SIZE='2', MASTER_PORT='http'),
    group('a port too high', "MASTER_PORT is '65536'", MASTER_PORT='65536'),
    Mistake('a port that is taken', '', f'cannot meet at localhost:{PORT} of MASTER_ADDR and MASTER_PORT',
            environ={**GROUP, 'WORLD_SIZE': '2', 'MASTER_PORT': str(PORT)}),
    group('restarts that are a word', "TORCHELASTIC_RESTART_COUNT is 'x'", TORCHELASTIC_RESTART_COUNT='x'),
    group('a batch for more processes', '--train-batch 8 cannot be split evenly among 3 processes', WORLD_SIZE='3'),
    Mistake('GPUs that are not there', '--gpu-devices 0,97', 'this machine has 0 CUDA devices, none with index 0, 97',
            environ={'CUDA_VISIBLE_DEVICES': 'none'}, process=True),
    Mistake('a precision of GPUs', '--precision tf32', '--precision tf32 needs a CUDA device; use fp32'),
    Mistake('narrow images in bf16', '-a resnet50 --precision bf16',
            '--precision bf16 with --width 16: .*; use --precision fp32'),
    Mistake('BatchNorm of GPUs', '--sync-bn', '--sync-bn is for CUDA devices: remove it'),
    Mistake('compiling for the CPU', '--compile', '--compile is for CUDA devices: remove it'),
]  # fmt: skip


def features(name: str, options: str, message: str, **arrays: np.ndarray) -> Mistake:
    """ranking.py with other arrays in the folder of the queries."""

    def make(folder: Path) -> None:
        for key, array in arrays.items():
            np.save(folder / f'features/query/{key}.npy', array)

    return Mistake(name, options, message, make, 'ranking', logged=False)


def instead(name: str, make: Make) -> Mistake:
    return Mistake(name, BOTH, f'{FEATURES} cannot be read .*; write it with', make, 'ranking', logged=False)


BOTH, FEATURES = 'features/query features/gallery', 'features/query/features.npy'
RANKING = [
    features('no folders', '', 'the following arguments are required: query, gallery'),
    features('an unknown option', f'{BOTH} --fast', 'unrecognized arguments: --fast'),
    features('no re-ranking', f'{BOTH} --lambda 0.5', '--lambda is an option of re-ranking: add --rerank'),
    features('no neighbours', f'{BOTH} --rerank --k1 0', '--k1: must be an integer of at least 1'),
    features('no weight', f'{BOTH} --rerank --lambda 2', '--lambda: must be a number from 0 to 1'),
    Mistake('paths of other features', f'{BOTH} --any-camera', 'paths.jsonl has 1 lines for 4',
            lambda folder: [(folder / f'features/{subset}/paths.jsonl').write_text('"a"\n')
                            for subset in ('query', 'gallery')], 'ranking', logged=False),
    features('a folder that is not there', 'features/query nowhere', r'nowhere/features.npy cannot be read \(No such'),
    features('a name that is too long', f'features/query {LONG}', r'features.npy cannot be read \(File name too long'),
    instead('a text', written(FEATURES, b'1, 2')),
    instead('no bytes', written(FEATURES, b'')),
    instead('features that are cut short', cut(FEATURES, 200)),
    instead('a folder', emptied(FEATURES)),
    instead('a header that is no Python', written(FEATURES, b"\x93NUMPY\x01\x00\x16\x00{'descr': '<f4', ((('''\n")),
    instead('a zip file without an end', written(FEATURES, b'PK\x03\x04' + bytes(99))),
    features('whole numbers for features', BOTH, 'features.npy contains int64', features=np.zeros((4, 8), np.int64)),
    features('words for persons', BOTH, 'pids.npy contains <U1', pids=np.array(['a'] * 4)),
    features('objects for persons', BOTH, 'pids.npy cannot be read', pids=np.array([{}] * 4, object)),
    features('more persons than cameras', BOTH, 'the query has 5 pids but 4 camids', pids=np.zeros(5, int)),
    features('more features than persons', BOTH, r'the query features have shape \(5, 8\), not \(4, 8\)',
             features=np.zeros((5, 8), np.float32)),
    features('features of another model', BOTH, r'the query features have shape \(4, 9\), not \(4, 8\)',
             features=np.zeros((4, 9), np.float32)),
    features('one number for features', BOTH, r'features.npy contains float32 of shape \(\); write',
             features=np.array(1.0, np.float32)),
    features('one person', BOTH, r'pids.npy contains int64 of shape \(\); write', pids=np.array(1)),
    features('numbers of another machine', BOTH, 'features.npy contains >f4', features=np.zeros((4, 8), '>f4')),
    features('numbers of 16 bytes', BOTH, 'features.npy contains float128', features=np.zeros((4, 8), np.longdouble)),
    Mistake('several arrays', BOTH, 'features.npy contains several arrays; write it with',
            lambda folder: (np.savez(folder / 'x.npz', a=np.zeros(1)), (folder / 'x.npz').rename(folder / FEATURES)),
            'ranking', logged=False),
    features('NaN', BOTH, '4 of 4 query features are not finite', features=np.full((4, 8), np.nan, np.float32)),
    features('too large', BOTH, '4 of 4 query features are .*too large', features=np.full((4, 8), 1e30, np.float32)),
    features('persons who are not in the gallery', BOTH, 'none of the 4 queries has a match', pids=np.full(4, 99)),
]  # fmt: skip

TABLES = {
    'option': OPTIONS, 'tree': TREES, 'image': IMAGES, 'checkpoint': CHECKPOINTS, 'pretrained': PRETRAINED,
    'environment': ENVIRONMENTS, 'ranking': RANKING,
}  # fmt: skip
MISTAKES = [pytest.param(mistake, id=f'{kind}: {mistake.name}') for kind, rows in TABLES.items() for mistake in rows]
assert len(MISTAKES) >= 60

SHORT = '--data-dir data --max-epoch 2'


@pytest.fixture(scope='session')
def ground(data_dir, tmp_path_factory) -> Path:
    """What each mistake gets a copy of: data/, run/ with the checkpoints of an epoch, features/, and an empty file."""
    folder = tmp_path_factory.mktemp('ground')
    shutil.copytree(data_dir, folder / 'data')
    (folder / 'file').touch()
    for subset in ('query', 'gallery'):
        path = folder / 'features' / subset
        path.mkdir(parents=True)
        np.save(path / 'features.npy', np.random.default_rng(0).random((4, 8), np.float32))
        np.save(path / 'pids.npy', np.arange(4))
        np.save(path / 'camids.npy', np.full(4, len(subset)))
    return folder


@pytest.fixture
def folder(mistake, ground, script, tmp_path, monkeypatch, capsys) -> Path:
    """The current folder, a copy of `ground` with the data set that is read. The first one to ask trains its run."""
    if not (ground / 'run').exists():
        once = ['--max-epoch', 1, '--save-features', '--save-dir', ground / 'run']
        assert script(XENT, *once) == 0
        capsys.readouterr()
    copy = tmp_path / 'copy'
    shutil.copytree(ground, copy, ignore=lambda *_: {'mars', 'market1501'} - {mistake.reads})
    monkeypatch.chdir(copy)
    return copy


def contents(folder: Path) -> dict[str, bytes | str]:
    """Each file's hash, of a log its text; of anything else what it is."""
    found = {}
    for path in sorted(folder.rglob('*')):
        if path.is_symlink():
            value = f'link to {path.readlink()}'
        elif not path.is_file():
            value = 'folder' if path.is_dir() else 'pipe'
        elif path.name.startswith('log_'):
            value = path.read_bytes()
        else:
            value = hashlib.sha256(path.read_bytes()).hexdigest()
        found[str(path.relative_to(folder))] = value
    return found


def in_process(mistake: Mistake, environ: dict) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of the command in a process of its own, where no option says --use-cpu."""
    options = shlex.split(f'-a tiny --height 32 --width 16 --workers 0 --pretrained none {SHORT} {mistake.options}')
    command = [sys.executable, ROOT / 'tests' / 'tiny.py', ROOT / f'{mistake.script}.py', *options]
    found = subprocess.run([*map(str, command)], env=environ, capture_output=True, text=True, timeout=HANG)
    return found.returncode, found.stdout, found.stderr


def command(module, options: list[str], monkeypatch) -> int:
    """Exit status of a room that is a command too."""
    monkeypatch.setattr(sys, 'argv', [f'{module.__name__}.py', *options])
    try:
        commands.run(module.main)
    except SystemExit as end:
        return end.code
    return 0


@pytest.mark.parametrize('mistake', MISTAKES)
def test_a_mistake_is_one_line_and_touches_nothing(mistake, folder, script, monkeypatch, capsys):
    mistake.make(folder)
    before = contents(folder)
    for name, value in {**dict.fromkeys(GROUP), **mistake.environ}.items():
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    if mistake.process:
        status, out, err = in_process(mistake, dict(os.environ))
    elif mistake.script == 'ranking':
        status = command(importlib.import_module('ranking'), shlex.split(mistake.options), monkeypatch)
        out, err = capsys.readouterr()
    else:
        status = script(mistake.script, *shlex.split(SHORT), *shlex.split(mistake.options))
        out, err = capsys.readouterr()

    assert status == 2, err
    assert err.startswith('error: ') and err.endswith('\n')
    assert re.search(mistake.message, err, re.S if mistake.drawn else 0), err
    assert mistake.drawn or err.count('\n') == 1, err
    assert 'Traceback' not in out + err
    assert mistake.logged or not out
    assert mistake.trained or '==> Epoch' not in out

    after = contents(folder)
    for name, value in before.items():
        assert after[name] == value or (name.startswith('run/log_') and after[name].startswith(value)), name
    new = after.keys() - before.keys()
    save_dir = re.search(r'--save-dir (\w+)', mistake.options)
    save_dir = save_dir[1] if save_dir else 'log'
    assert all(name.split('/')[0] == save_dir for name in new), new  # nothing was left anywhere else
    log = f'{save_dir}/log_{"test" if "--evaluate" in mistake.options else "train"}.txt'
    if mistake.logged:
        assert after[log].decode().endswith(err)
    else:
        assert after.get(log) == before.get(log)
