"""FeatureExtractor against the test's features, and the command extract.py."""

import errno
import io
import json
import multiprocessing
import os
import re
import runpy
import shutil
import sys
import threading
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from tiny import Tiny

import evaluation
import models
import ranking
import weights
from arguments import TestOptions
from batches import resizing
from extract import FeatureExtractor
from extraction import images as given
from extraction import source
from files.features import read
from models.network import Training
from runtime import precision
from runtime.errors import UserError
from runtime.precision import tf32

SIZE = {'height': 32, 'width': 16}


@pytest.fixture(scope='module')
def file(tmp_path_factory):
    """Weights of the tiny network, as this project writes them."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp('weights') / 'tiny.pth.tar'
    options = {'arch': 'tiny', **SIZE, 'distance': 'cosine', 'interpolation': 'bicubic'}
    torch.save({'format': weights.FORMAT, 'state_dict': Tiny(6).state_dict(), 'arguments': options}, path)
    return path


@pytest.fixture
def extractor(file):
    return FeatureExtractor(file, 'cpu', batch=5)


@pytest.fixture
def files(mixed) -> list[str]:
    return [str(path) for path, *_ in mixed]


def arrays(files):
    return [np.array(Image.open(path).convert('RGB')) for path in files]


@pytest.mark.parametrize('workers', [0, 2])
def test_features_are_those_of_the_test_bit_for_bit(workers, file, mixed, files, run):
    extractor = FeatureExtractor(file, 'cpu', batch=5, workers=workers)
    options = TestOptions(**SIZE, test_batch=5, workers=0, interpolation='bicubic')
    expected, _ = evaluation.extract(extractor.model, mixed, options, run)
    features = extractor(files)
    assert features.dtype == torch.float32 and features.shape == (len(files), 16)
    assert torch.equal(features, expected)
    assert torch.equal(torch.cat([*extractor.stream(files)]), expected)


def test_mirror_images_are_averaged_as_in_the_test(extractor, mixed, files, run):
    options = TestOptions(**SIZE, test_batch=5, workers=0, interpolation='bicubic', flip_test=True)
    extractor.flip_test = True
    assert torch.equal(extractor(files), evaluation.extract(extractor.model, mixed, options, run)[0])


def test_tracklets_have_the_features_of_the_test(extractor, files, run):
    tracklets = [tuple(files[:7]), tuple(files[7:9]), tuple(files[9:])]
    options = TestOptions(**SIZE, test_batch=1, workers=0, interpolation='bicubic', seq_len=4)
    expected, _ = evaluation.extract(extractor.model, [(each, 0, 0) for each in tracklets], options, run)
    assert torch.equal(torch.cat([*extractor.stream_tracklets(tracklets, 4)]), expected)


@pytest.mark.parametrize('form', ['PIL', 'array', 'bgr', 'tensor', 'float', 'bgr tensor', 'mixed', 'iterator'])
def test_all_forms_of_an_image_give_the_same_features(form, extractor, files):
    pixels = arrays(files)
    tensors = [torch.from_numpy(each).permute(2, 0, 1) for each in pixels]
    images, bgr = {
        'PIL': ([Image.open(path) for path in files], False),
        'array': (pixels, False),
        'bgr': ([each[..., ::-1] for each in pixels], True),
        'tensor': (tensors, False),
        'float': ([each / 255 for each in tensors], False),
        'bgr tensor': ([each.flip(0) for each in tensors], True),
        'mixed': ([pixels[0], files[1], tensors[2], *files[3:]], False),
        'iterator': (iter(files), False),
    }[form]
    assert torch.equal(extractor(images, bgr=bgr), extractor(files))


def test_one_image_or_a_block_of_them(extractor, files):
    pixels = arrays(files)[0]
    one = extractor(files[:1])
    for image in (files[0], pixels, torch.from_numpy(pixels).permute(2, 0, 1), Image.fromarray(pixels)):
        assert torch.equal(extractor(image), one)
    two = np.stack([pixels, pixels])
    assert extractor(two).shape == extractor(torch.from_numpy(two).permute(0, 3, 1, 2)).shape == (2, 16)
    assert extractor([]).shape == (0, 16)


@pytest.mark.parametrize('bgr', [False, True])
def test_boxes_are_clipped_to_the_frame(bgr, extractor):
    frame = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    shown = frame[..., ::-1] if bgr else frame
    boxes = [[10.4, 5.6, 30, 50], [-20, -3, 12, 70], [70, 10, np.inf, 40]]
    crops = [frame[6:50, 10:30], frame[:, :12], frame[10:40, 70:]]
    assert torch.equal(extractor(shown, boxes, bgr=bgr), extractor(crops))
    assert torch.equal(extractor(shown, torch.tensor([[*box, 0.9, 1] for box in boxes]), bgr=bgr), extractor(crops))
    assert extractor(shown, np.zeros((0, 4))).shape == extractor(shown, []).shape == (0, 16)


GREY = np.zeros((9, 9), np.uint8)


@pytest.mark.parametrize(
    ('image', 'boxes', 'message'),
    [
        (GREY, None, r'image 0 is an array of uint8 \(9, 9\): give uint8 \(H, W, 3\)'),
        ([np.zeros((9, 9, 3))], None, r'image 0 is an array of float64 \(9, 9, 3\)'),
        (['none.jpg'], None, 'cannot read the image none.jpg: No such file'),
        (None, None, 'image 0 is a NoneType: give a path, a PIL image, an array or a tensor'),
        ([3], None, 'image 0 is a int: give a path, a PIL image, an array or a tensor'),
        (torch.zeros(9, 9, 3, dtype=torch.uint8), None, r'image 0 is a tensor of uint8 \(9, 9, 3\): give \(3, H, W\)'),
        (torch.full((3, 9, 9), -0.1), None, 'image 0 has values that are not from 0 to 1'),
        (torch.full((3, 9, 9), torch.nan), None, 'image 0 has values that are not from 0 to 1'),
        (torch.zeros(3, 9, 9, dtype=torch.int64), None, 'give uint8, or floating-point numbers'),
        (Image.new('I', (9, 9)), None, r'image 0 has pixels of more than 8 bits \(I\)'),
        (np.zeros((0, 9, 3), np.uint8), None, 'image 0 is an array of uint8'),
        (
            np.zeros((30, 40, 3), np.uint8),
            [[1, 1, 9, 9], [5, 5, 5, 9], [40, 0, 60, 9], [0, 0, np.nan, 9]],
            '3 of 4 boxes are empty or outside the frame of 40 x 30 pixels: rows 1, 2, 3; leave them out',
        ),
        (np.zeros((30, 40, 3), np.uint8), [1, 2, 3, 4], r'boxes have the shape \(4,\): give \(N, 4\)'),
        (np.zeros((2, 30, 40, 3), np.uint8), [[1, 2, 3, 4]], 'boxes belong to one frame, not to 2 images'),
        (GREY, [[1, 1, 9, 9]], 'the frame is an array of uint8'),
    ],
)
def test_what_is_no_image_is_named(image, boxes, message, extractor):
    with pytest.raises(UserError, match=message):
        extractor(image, boxes)


def test_threads_may_share_an_extractor(extractor, files):
    expected, wrong = extractor(files), []

    def work():
        for _ in range(5):
            if not torch.equal(extractor(files), expected):
                wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_nothing_is_printed_and_no_random_state_changes(file, files, capfd):
    state = torch.get_rng_state()
    extractor = FeatureExtractor(file, 'cpu')
    extractor(files)
    assert capfd.readouterr() == ('', '')
    assert extractor.notes[0] == 'Initializing model: tiny'
    assert torch.equal(torch.get_rng_state(), state)


def test_results_can_be_changed(extractor, files):
    features = extractor(files)
    features /= features.norm(dim=1, keepdim=True)  # not a tensor of inference mode
    assert not features.requires_grad


def test_usage_is_that_of_the_file(extractor):
    assert (extractor.height, extractor.width, extractor.interpolation) == (32, 16, 'bicubic')
    assert (extractor.distance, extractor.arch, extractor.precision, extractor.feat_dim) == (
        'cosine',
        'tiny',
        'fp32',
        16,
    )


def test_a_foreign_or_altered_file_has_the_defaults():
    usual = (256, 128, '', 'euclidean', False)
    assert source.usage_of(Training('w')) == usual
    odd = {'height': '9', 'width': -3, 'interpolation': 'nearest', 'distance': ['cosine'], 'flip_test': 1}
    assert source.usage_of(Training('w', options=odd)) == usual


def test_the_digest_is_of_the_weights_and_of_their_use(file, tmp_path):
    extractor = FeatureExtractor(file, 'cpu')
    assert len(extractor.digest) == 16 and extractor.digest == FeatureExtractor(file, 'cpu', batch=3).digest
    loaded = torch.load(file, weights_only=True)
    other = {**loaded['state_dict'], 'classifier.bias': torch.ones(6)}
    torch.save({**loaded, 'state_dict': other}, tmp_path / 'same.pth')  # a test does not use the classifier
    assert FeatureExtractor(tmp_path / 'same.pth', 'cpu').digest == extractor.digest
    other = {**loaded['state_dict'], 'base.0.weight': loaded['state_dict']['base.0.weight'] + 1}
    torch.save({**loaded, 'state_dict': other}, tmp_path / 'other.pth')
    assert FeatureExtractor(tmp_path / 'other.pth', 'cpu').digest != extractor.digest
    assert FeatureExtractor(file, 'cpu', height=64).digest != extractor.digest
    assert FeatureExtractor(file, 'cpu', 'bf16').digest != extractor.digest


@pytest.mark.parametrize(
    ('how', 'message'),
    [
        ({'device': 'cuda:99'}, 'there is no device cuda:99: this machine has'),
        ({'device': 'tpu?'}, 'there is no device tpu'),
        ({'device': 'cpu', 'precision': 'tf32'}, 'tf32 needs a CUDA device'),
    ],
)
def test_a_device_or_precision_that_is_not_there(how, message, file):
    with pytest.raises(UserError, match=message):
        FeatureExtractor(file, **how)


def test_assumptions_are_noted_and_can_be_changed(file, monkeypatch):
    given = []

    def read(path, assume=''):
        given.append(assume)
        return replace(weights.read(path), assumed=['last_stride=1', 'pooling=avg'])

    assert not any('ssumed' in note for note in FeatureExtractor(file, 'cpu').notes)
    monkeypatch.setattr(source, 'read_weights', read)
    note = 'Assumed, because the file does not record: last_stride=1, pooling=avg; --assume NAME=VALUE changes it'
    assert note in FeatureExtractor(file, 'cpu', assume='pooling=avg').notes
    assert given == ['pooling=avg']


def test_a_network_of_one_size_is_built_for_the_images(tmp_path):
    pytest.importorskip('timm')
    state, path = models.init_model('timm:test_vit', 2, size=(64, 32)).state_dict(), tmp_path / 'vit.pth'
    torch.save(state, path)
    images = np.zeros((2, 80, 40, 3), np.uint8)
    extractor = FeatureExtractor(path, 'cpu', arch='timm:test_vit', height=64, width=32)
    assert extractor(images).shape == (2, extractor.feat_dim)
    known = {'arch': 'timm:test_vit', 'height': 64, 'width': 32}
    torch.save({'format': weights.FORMAT, 'state_dict': state, 'arguments': known}, path)
    assert torch.equal(FeatureExtractor(path, 'cpu')(images), extractor(images))
    with pytest.raises(UserError, match='pos_embed'):
        FeatureExtractor(path, 'cpu', height=96)


def test_features_that_are_not_finite_are_named(extractor, files, monkeypatch):
    def forward(x):
        features = torch.zeros(len(x), 16)
        features[-1] = torch.nan
        return features

    monkeypatch.setattr(extractor.model, 'forward', forward)
    with pytest.raises(UserError, match=f'the features of {re.escape(files[4])} are not finite'):
        extractor(files)
    with pytest.raises(UserError, match='the features of image 4 are not finite'):
        extractor(arrays(files))


@pytest.mark.parametrize(
    ('how', 'message'),
    [
        ({'batch': 0}, 'batch 0, workers 0: give at least 1 image per batch'),
        ({'batch': -1}, 'batch -1, workers 0: give at least 1 image per batch'),
        ({'workers': -1}, 'batch None, workers -1: give at least 1 image per batch, and at least 0 workers'),
        ({'precision': 'fp16'}, 'there is no precision fp16: choose auto, fp32, tf32, bf16'),
        ({'precision': 'BF16'}, 'there is no precision BF16: choose auto, fp32, tf32, bf16'),
    ],
)
def test_values_that_cannot_be_meant(how, message, file):
    with pytest.raises(UserError, match=message):
        FeatureExtractor(file, 'cpu', **how)


def test_the_features_are_the_callers(extractor, files):
    """They can be changed in place, and take part in a training."""
    for features in (extractor(files), next(extractor.stream(files))):
        features.mul_(2)
        (features * torch.ones(1, requires_grad=True)).sum().backward()


def test_the_defaults_of_the_program_change_nothing(file, files, extractor):
    expected = extractor(files)
    resizing.affine.cache_clear()
    resizing._taps.cache_clear()
    try:
        torch.set_default_dtype(torch.float64)
        torch.set_default_device('meta')  # in place of a GPU
        other = FeatureExtractor(file, 'cpu', batch=5)
        for each in (extractor, other):
            found = each(files)
            assert (found.dtype, found.device.type) == (torch.float32, 'cpu') and torch.equal(found, expected)
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)


def test_pictures_and_boxes_that_are_none(extractor, tmp_path, files):
    Image.new('RGB', (64, 128)).save(tmp_path / 'cut.png')
    data = (tmp_path / 'cut.png').read_bytes()
    (tmp_path / 'cut.png').write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match='image 0 cannot be read: '):
        extractor(Image.open(tmp_path / 'cut.png'))
    frame, box = arrays(files[:1])[0], [2, 3, 12, 20]
    for boxes in ([[1, 2, 3, 4], [1, 2]], [['a', 'b', 'c', 'd']], 5):
        with pytest.raises(UserError, match='boxes are not numbers in rows of equal length'):
            extractor(frame, boxes)
    expected = extractor(frame, [box])
    tensor = torch.tensor([box], dtype=torch.bfloat16)  # of a detector under autocast
    for boxes in (tensor, list(tensor), iter([box]), np.array([box])):
        assert torch.equal(extractor(frame, boxes), expected)
    frame.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert torch.equal(extractor(frame, [box]), expected)


def features_in_a_pool(file, files):
    return FeatureExtractor(file, 'cpu', batch=5, workers=2)(files).numpy()


def test_in_a_process_that_must_not_start_others(file, files, extractor):
    expected = extractor(files)
    with multiprocessing.get_context('spawn').Pool(1) as pool:
        assert np.allclose(pool.apply(features_in_a_pool, (file, files)), expected, atol=1e-5)


newer_names = pytest.mark.skipif(not hasattr(torch.backends.cuda.matmul, 'fp32_precision'), reason='before PyTorch 2.9')


@newer_names
@pytest.mark.parametrize('allowed', [False, True])
def test_tf32_is_restored(allowed):
    def settings():
        return [
            getattr(part, 'fp32_precision', None) for part in (torch.backends.cuda.matmul, torch.backends.cudnn.conv)
        ]

    before = settings()
    with tf32(allowed):
        assert settings() == ['tf32' if allowed else 'ieee'] * 2
    assert settings() == before


@newer_names
def test_tf32_is_changed_by_one_thread_at_a_time():
    """Otherwise two extractors would compute in each other's precision, and leave it behind."""
    matmul, seen = torch.backends.cuda.matmul, []
    before = matmul.fp32_precision

    def other():
        seen.append(precision._SETTING.acquire(blocking=False))
        started.set()
        with tf32(True):
            seen.append(matmul.fp32_precision)

    thread, started = threading.Thread(target=other), threading.Event()
    with tf32(False):
        thread.start()
        started.wait()
        with tf32(False, convolutions=False):
            assert (seen, matmul.fp32_precision) == ([False], 'ieee')
    thread.join()
    assert (seen, matmul.fp32_precision) == ([False, 'tf32'], before)


# The command


@pytest.fixture
def command(file, monkeypatch, capsys):
    """Run extract.py in this process; returns the exit status and what was printed."""

    def start(*args, stdin=b''):
        monkeypatch.setattr(
            sys, 'argv', ['extract.py', '--weights', str(file), '--use-cpu', '-j', '0', *map(str, args)]
        )
        monkeypatch.setattr(sys, 'stdin', io.TextIOWrapper(io.BytesIO(stdin)))
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(ROOT / 'extract.py'), run_name='__main__')
        return end.value.code, *capsys.readouterr()

    return start


def paths_in(folder):
    return [json.loads(line) for line in (folder / 'paths.jsonl').read_text().splitlines()]


def test_the_command_writes_what_save_features_writes(command, files, extractor, tmp_path):
    status, out, _ = command(os.path.dirname(files[0]), '-o', tmp_path / 'out', '--batch', 5)
    assert (status, out) == (0, f'Wrote {len(files)} features of 16 dimensions to {tmp_path / "out"}\n')
    features, pids, camids = read(tmp_path / 'out')
    assert paths_in(tmp_path / 'out') == sorted(files)
    assert np.array_equal(features, extractor(sorted(files)))
    assert (pids == -1).all() and (camids == -1).all() and len(pids) == len(files)
    assert json.loads((tmp_path / 'out' / 'model.json').read_text())['digest'] == extractor.digest
    assert os.listdir(tmp_path) == ['out']
    with pytest.raises(UserError, match='none of the 24 queries has a match'):
        ranking.rank(features, features, pids, pids, camids, camids).check_valid()


@pytest.mark.parametrize('kind', ['pattern', 'lines', 'lines of Windows', 'NULs'])
def test_images_may_be_a_pattern_or_a_list(kind, command, files, tmp_path):
    folder = os.path.dirname(files[0])
    names = {'pattern': f'{folder}/*.png'}.get(kind, '-')
    stdin = {'NULs': b'\0', 'lines of Windows': b'\r\n'}.get(kind, b'\n').join(
        map(os.fsencode, [*files[3:6], files[3]])
    )
    assert command(names, '-o', tmp_path / 'out', stdin=stdin)[0] == 0
    assert paths_in(tmp_path / 'out') == (sorted(files) if kind == 'pattern' else files[3:6])


def test_tracklets_are_folders(command, files, tmp_path):
    for number, file in enumerate(files[:5]):
        folder = tmp_path / 'tracklets' / f'{number // 3}'
        folder.mkdir(parents=True, exist_ok=True)
        Image.open(file).save(folder / f'{number}.png')
    (tmp_path / 'tracklets' / '.hidden').mkdir()
    (tmp_path / 'tracklets' / 'notes.txt').write_text('no image')
    assert command(tmp_path / 'tracklets', '--tracklets', '-o', tmp_path / 'out')[0] == 0
    assert [len(frames) for frames in paths_in(tmp_path / 'out')] == [3, 2]


def test_frames_are_in_natural_order(command, files, tmp_path):
    (tmp_path / 'track').mkdir()
    for number in (10, 2, 1):
        Image.open(files[0]).save(tmp_path / 'track' / f'f{number}.png')
    assert command(tmp_path / 'track', '--tracklets', '-o', tmp_path / 'out')[0] == 0
    assert paths_in(tmp_path / 'out') == [[f'{tmp_path}/track/f{number}.png' for number in (1, 2, 10)]]


def test_an_interrupted_command_continues(command, files, tmp_path):
    broken = tmp_path / 'broken.jpg'
    broken.write_text('no image')
    args = '-o', tmp_path / 'out', '--batch', 5
    status, _, error = command(*files[:12], broken, *files[12:], *args)
    assert (status, error.splitlines()[-1]) == (
        2,
        f'error: cannot read the image {broken}: it is not a JPEG, PNG, BMP, GIF, PPM, TIFF or WEBP file; once '
        f'that is mended, the same command resumes after 10 of {len(files) + 1}',
    )
    assert not (tmp_path / 'out').exists()
    status, out, _ = command(*files, *args)
    assert status == 0 and out.startswith(f'Resuming after 10 of {len(files)} items\n')
    assert command(*files, '-o', tmp_path / 'other', '--batch', 5)[0] == 0
    assert np.array_equal(*(read(tmp_path / name)[0] for name in ('out', 'other')))


def test_a_folder_that_cannot_be_named_at_the_end_loses_no_feature(command, files, tmp_path, monkeypatch):
    (tmp_path / 'link').symlink_to(tmp_path / 'nowhere')
    status, _, error = command(*files, '-o', tmp_path / 'link')
    assert status == 2 and error.endswith('link exists; remove it, or choose another folder\n')
    rename = Path.replace

    def failing(path, target):
        if path.name == '.out.unfinished':
            raise OSError(errno.ENOTEMPTY, 'Directory not empty')
        return rename(path, target)

    monkeypatch.setattr(Path, 'replace', failing)
    assert command(*files, '-o', tmp_path / 'out')[0] == 2
    monkeypatch.setattr(Path, 'replace', rename)
    status, out, _ = command(*files, '-o', tmp_path / 'out')
    assert status == 0 and out.startswith(f'Resuming after {len(files)} of {len(files)} items\n')


@pytest.mark.parametrize('args', [['--batch', 5, '--height', 64], ['--batch', 5, '--tracklets']])
def test_a_draft_of_other_features_is_not_continued(args, command, files, tmp_path):
    broken = tmp_path / 'broken.jpg'
    broken.write_text('no image')
    assert command(*files, broken, '-o', tmp_path / 'out', '--batch', 5)[0] == 2
    status, out, _ = command(*files, '-o', tmp_path / 'out', *args)
    assert status == 0 and 'Resuming' not in out


def test_pictures_that_were_replaced_are_computed_again(command, file, files, tmp_path):
    """Though an unfinished call has their features."""
    broken = tmp_path / 'broken.jpg'
    broken.write_text('no image')
    files = [shutil.copy(name, tmp_path) for name in files]
    args = '-o', tmp_path / 'out', '--batch', 5
    assert command(*files[:12], broken, *args)[0] == 2
    Image.open(files[20]).save(files[7])
    status, out, _ = command(*files[:12], *args)
    assert status == 0 and out.startswith('Resuming after 5 of 12 items\n')
    expected = FeatureExtractor(file, 'cpu', batch=5)(files[:12])
    assert np.array_equal(read(tmp_path / 'out')[0], expected)
    assert not (tmp_path / 'out' / 'stamps').exists()


def test_a_folder_that_cannot_be_reached_is_no_empty_one(command, files, tmp_path, monkeypatch):
    (tmp_path / 'in' / 'camera').mkdir(parents=True)
    Image.open(files[0]).save(tmp_path / 'in' / 'a.png')
    scandir = os.scandir

    def fail(number):
        def scan(path='.'):
            if str(path).endswith('camera'):
                raise OSError(number, os.strerror(number), str(path))
            return scandir(path)

        monkeypatch.setattr(os, 'scandir', scan)

    fail(errno.ESTALE)
    status, _, error = command(tmp_path / 'in', '-o', tmp_path / 'out')
    assert status == 2 and f'{tmp_path}/in/camera cannot be read (Stale file handle); try again, or leave it' in error
    fail(errno.EACCES)
    status, _, error = command(tmp_path / 'in', '-o', tmp_path / 'out')
    assert status == 0 and f'Left out: {tmp_path}/in/camera (Permission denied)\n' in error


def test_nothing_is_overwritten(command, files, tmp_path):
    (tmp_path / 'out').mkdir()
    (tmp_path / 'out' / 'mine').write_text('mine')
    status, _, error = command(files[0], '-o', tmp_path / 'out')
    assert status == 2 and 'exists; remove it, or choose another folder' in error
    assert os.listdir(tmp_path / 'out') == ['mine']


def test_the_root_is_no_folder_to_write(command, files):
    status, _, error = command(files[0], '-o', '/')
    assert status == 2 and '-o / exists; remove it, or choose another folder' in error


def test_images_have_no_frames(command, files, tmp_path):
    status, _, error = command(files[0], '-o', tmp_path / 'out', '--seq-len', 4)
    assert status == 2 and '--seq-len: images have no frames; add --tracklets, or remove it' in error


@pytest.mark.parametrize(
    ('args', 'message'),
    [
        (['nothing'], 'nothing: no images found; give files, folders, a pattern, or - for stdin'),
        (['-'], '-: no images found'),
    ],
)
def test_an_argument_without_images_is_named(args, message, command, tmp_path):
    status, _, error = command(*args, '-o', tmp_path / 'out')
    assert status == 2 and message in error


def test_an_assumption_is_an_option(command, files, tmp_path):
    status, _, error = command(*files, '-o', tmp_path / 'out', '--assume', 'last_stride=3')
    assert status == 2 and 'error: --assume last_stride=3: must be one of' in error


def test_weights_too_small_to_matter_are_zero(files, tmp_path):
    """Those of channels that nothing uses; some processors are slow with them."""
    path, own = tmp_path / 'tiny.pth', Tiny(6).eval()
    state = own.state_dict()
    state['base.0.weight'][::2] = 1e-39
    torch.save(state, path)
    extractor = FeatureExtractor(path, 'cpu', arch='tiny', height=32, width=16)
    kept = extractor.model.state_dict()['base.0.weight']
    assert kept[::2].count_nonzero() == 0 and torch.equal(kept[1::2], state['base.0.weight'][1::2])
    x = torch.rand(2, 3, 32, 16)
    with torch.inference_mode():
        assert torch.equal(extractor.model(x), own(x))


def test_links_to_folders_are_followed_once(tmp_path):
    place, camera = tmp_path / 'cameras', tmp_path / 'elsewhere'
    for folder in (place, camera):
        folder.mkdir()
        (folder / 'x.jpg').touch()
    (place / 'camera').symlink_to(camera)
    (camera / 'back').symlink_to(place)
    assert given.files_of([str(place)]) == [str(place / 'x.jpg'), str(place / 'camera' / 'x.jpg')]


def test_files_are_found_below_folders_in_order(tmp_path):
    for name in ('b/2.jpg', 'b/1.JPG', 'a/x.webp', '.git/y.jpg', 'a/.z.jpg', 'c.txt'):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert given.files_of([str(tmp_path)]) == [str(tmp_path / name) for name in ('a/x.webp', 'b/1.JPG', 'b/2.jpg')]
