"""The scripts on an emulated GPU: they compute what they compute on the CPU, no step waits, and faults are reported.

Scripts are run from their files, as from the shell. See fake_gpu.py for what this proves and what it cannot.
"""

import contextlib
import dataclasses
import functools
import gc
import importlib
import inspect
import io
import json
import runpy
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import fake_gpu
import numpy as np
import pytest
import tiny
import torch
from conftest import ROOT, SCRIPTS
from fake_gpu import DEVICE, MIXED, PAGEABLE, RACE, WAIT, DeviceTensor
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torch.optim.optimizer import register_optimizer_step_post_hook

import models

# All that is known here of the project below its scripts, besides the models: where a function is.
PLACES = {
    'augmentation': 'transforms:TrainTransform.__call__',
    'augmentation of a CPU': 'transforms:TrainTransform._on_cpu',
    'augmentation of a GPU': 'transforms:TrainTransform._by_index',
    'prefetching': 'batches.feed:Feed._send',
    'arrival of a batch': 'batches.feed:Feed.__next__',
    'copy of a batch': 'batches.workers:Block.images',
    'criterion': 'losses:CrossEntropyLabelSmooth.forward',
    'guard': 'runtime.device:Run.skip_unless_finite',
    'meter': 'runtime.meters:LossMeter.update',
    'distances': 'ranking:squared_distances',
    'tally': 'ranking:_tally_device',
    'neighbours': 'runtime.tiles:keys_on_device',
    'rank': 'ranking:rank',
    'rerank': 'ranking:rerank',
    'replica': 'runtime.device:Run.replicate',
}
REAL = [name for name, model in models.factory.items() if model.__module__.startswith('models.')]
EPOCHS = 2
OPTIONS = ['-a', 'tiny', '--height', '32', '--width', '16', '--pretrained', 'none', '--workers', '0']
OPTIONS += ['--train-batch', '8', '--max-epoch', str(EPOCHS), '--print-freq', '100']

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason='this machine has a GPU; run the tests marked gpu'),
    pytest.mark.skipif(not fake_gpu.POSSIBLE, reason='this version of PyTorch cannot emulate a GPU'),
]


@pytest.fixture(autouse=True)
def one_thread():
    """Tensors are small: more threads only cost time."""
    torch.set_num_threads(1)


@pytest.fixture
def gpu() -> Iterator[fake_gpu.Gpu]:
    with fake_gpu.emulated() as gpu:
        yield gpu


# Running a script


def find(place: str) -> tuple[Any, str, Any]:
    """The module or class that has the function of a place, its name in there, and the function."""
    module, _, path = PLACES[place].partition(':')
    owner = importlib.import_module(module)
    *parents, name = path.split('.')
    for parent in parents:
        owner = getattr(owner, parent)
    return owner, name, getattr(owner, name)


def run_script(name: str, data_dir: Path, folder: Path, *options: str, page: bool = False) -> int:
    """Its exit status. The page of a test takes a second."""
    argv = [f'{name}.py', *OPTIONS, '--data-dir', str(data_dir), '--save-dir', str(folder), *options]
    argv += [] if page else ['--no-report']
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, 'argv', argv)
        try:
            runpy.run_path(str(ROOT / argv[0]), run_name='__main__')
        except SystemExit as end:
            return end.code
    return 0


@pytest.fixture(scope='module')
def on_cpu(data_dir, tmp_path_factory) -> Callable[..., Path]:
    """Run a script on the CPU, once with the same options; the folder of its files.

    The augmentation is that of a GPU: the CPU has one of its own, whose pixels differ a little.
    """

    @functools.cache
    def start(name: str, *options: str, data_dir: Path = data_dir, page: bool = False) -> Path:
        folder = tmp_path_factory.mktemp('cpu')
        owner, attribute, _ = find('augmentation of a CPU')
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(owner, attribute, find('augmentation of a GPU')[2])
            options = ['--use-cpu', '--precision', 'fp32', *options]
            assert run_script(name, data_dir, folder, *options, page=page) == 0
        return folder

    return start


@contextlib.contextmanager
def counted_calls(*places: str) -> Iterator[Counter]:
    """How often the functions at these places are called."""
    calls = Counter()
    with pytest.MonkeyPatch.context() as patch:
        for place in places:
            owner, name, function = find(place)

            def count(*args, place=place, function=function, **kwargs):
                calls[place] += 1
                return function(*args, **kwargs)

            patch.setattr(owner, name, count)
        yield calls


@contextlib.contextmanager
def marked_steps(gpu: fake_gpu.Gpu) -> Iterator[list[tuple[int, int]]]:
    """The number of reports, and of bytes sent to the GPU, at the end of each step of the first optimizer."""
    marks, steps = [], Counter()

    def mark(optimizer, *_):
        steps[id(optimizer)] += 1
        if next(iter(steps)) == id(optimizer):
            marks.append((len(gpu.reports), gpu.sent))

    hook = register_optimizer_step_post_hook(mark)
    try:
        yield marks
    finally:
        hook.remove()


def of_steps(gpu: fake_gpu.Gpu, marks: list[tuple[int, int]]) -> list[fake_gpu.Report]:
    """What was reported in the last epoch, from the end of its first step to that of its last.

    Loading is part of a step. An epoch begins with copies; the first one of a run fills tables as well.
    """
    length = len(marks) // EPOCHS
    assert length > 1
    return gpu.reports[marks[-length][0] : marks[-1][0]]


def assert_equal(one: Any, other: Any, where: str = '') -> None:
    """Bit for bit, tensors in nested containers."""
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key, value in one.items():
            assert_equal(value, other[key], f'{where}.{key}')
    elif isinstance(one, (list, tuple)):
        assert_equal(dict(enumerate(one)), dict(enumerate(other)), where)
    else:
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other, where


def assert_same_training(folder: Path, expected: Path) -> None:
    """The weights, the state of optimizers and of what else is learned."""
    last = f'checkpoint_ep{EPOCHS}.pth.tar'
    states = [torch.load(path / last, weights_only=True, map_location='cpu') for path in (folder, expected)]
    assert states[0]['state']['optimizer']['state'], 'nothing is compared'
    assert_equal(*({key: state[key] for key in ('state_dict', 'state', 'epoch', 'rank1')} for state in states))


def assert_same_figures(folder: Path, expected: Path) -> None:
    """Of the whole test, and of each query."""
    results = [json.loads((path / 'results.json').read_text()) for path in (folder, expected)]
    assert_equal(*({key: result[key] for key in ('mAP', 'mINP', 'cmc', 'queries')} for result in results))
    assert (folder / 'results.csv').read_text() == (expected / 'results.csv').read_text()
    assert 'emulated' in results[0]['device'] and results[1]['device'] == 'CPU'


# What the scripts do


@pytest.mark.parametrize('name', SCRIPTS)
def test_a_script_computes_what_it_computes_on_the_cpu(name, on_cpu, data_dir, tmp_path):
    expected = on_cpu(name)
    reached = ('augmentation of a GPU', 'prefetching', 'tally', 'neighbours')
    with fake_gpu.emulated() as gpu, counted_calls(*reached) as calls, marked_steps(gpu) as marks:
        assert run_script(name, data_dir, tmp_path, '--gpu-devices', '1', '--precision', 'fp32') == 0
    assert_same_training(tmp_path, expected)
    assert_same_figures(tmp_path, expected)
    assert not of_steps(gpu, marks), '\n'.join(map(str, of_steps(gpu, marks)))
    assert not gpu.of(RACE, MIXED)
    assert set(calls) == set(reached)
    fused = ['_fused_adam_'] + ['_fused_sgd_'] * (name in ('train_img_model_cent', 'train_img_model_strong'))
    assert all(gpu.operations[each] == len(marks) for each in fused)
    assert all(report.lines for report in gpu.reports)


@pytest.mark.parametrize('name', SCRIPTS)
def test_no_step_waits_in_bf16(name, data_dir, tmp_path, monkeypatch):
    dtypes, forward = Counter(), tiny.Tiny.forward

    def watched(model, images):
        outputs = forward(model, images)
        for output in outputs if isinstance(outputs, tuple) else (outputs,):
            dtypes[model.training, images.dtype, output.dtype] += 1
        return outputs

    monkeypatch.setattr(tiny.Tiny, 'forward', watched)
    with fake_gpu.emulated() as gpu, marked_steps(gpu) as marks:
        assert run_script(name, data_dir, tmp_path, '--gpu-devices', '1') == 0  # bf16 is the default of such a GPU
    assert not of_steps(gpu, marks), '\n'.join(map(str, of_steps(gpu, marks)))
    assert {key for key in dtypes if key[0]} == {(True, torch.float32, torch.bfloat16)}
    assert {key for key in dtypes if not key[0]} == {(False, torch.float32, torch.float32)}


@pytest.fixture(scope='module')
def mixed_dir(data_dir, tmp_path_factory) -> Path:
    """Market1501 whose training images have two sizes."""
    folder = tmp_path_factory.mktemp('mixed')
    shutil.copytree(data_dir / 'market1501', folder / 'market1501')
    for path in sorted(folder.glob('market1501/*train/*.jpg'))[::3]:
        with Image.open(path) as image:
            image.resize((20, 40)).save(path)
    return folder


@pytest.mark.parametrize('sizes', ['one size', 'two sizes'])
@pytest.mark.parametrize('options', ['--cache none', '--cache ram', '--cache device', '--workers 1'])
def test_how_images_get_to_the_gpu(options, sizes, on_cpu, data_dir, mixed_dir, tmp_path):
    """With images of two sizes, memory that is not pinned is copied: their positions in the batch, 8 bytes each."""
    data_dir = data_dir if sizes == 'one size' else mixed_dir
    expected = on_cpu('train_img_model_xent_htri', data_dir=data_dir)
    with fake_gpu.emulated() as gpu, marked_steps(gpu) as marks:
        options = ['--gpu-devices', '1', '--precision', 'fp32', *options.split()]
        assert run_script('train_img_model_xent_htri', data_dir, tmp_path, *options) == 0
    assert_same_training(tmp_path, expected)
    reports = {(report.kind, report.what) for report in of_steps(gpu, marks)}
    assert reports == ({(PAGEABLE, '64 bytes to the GPU')} if sizes == 'two sizes' else set())
    assert not gpu.of(RACE, MIXED)
    (_, before), *_, (_, after) = marks[-len(marks) // EPOCHS :]
    assert (after - before < 1000) == ('device' in options)  # else pixels are sent


def test_a_resumed_run(on_cpu, data_dir, tmp_path):
    """After an epoch and within one: the state of two optimizers, of a schedule and of centers goes back to the GPU."""
    name, options = 'train_img_model_cent', ['--gpu-devices', '1', '--precision', 'fp32', '--eval-step', '1']
    whole = tmp_path / 'whole'
    with fake_gpu.emulated():
        assert run_script(name, data_dir, whole, *options, '--save-minutes', '1e-9', '--keep', '9') == 0
    for position in ('checkpoint_ep1', 'resume_1_2', 'resume_2_1'):
        with fake_gpu.emulated() as gpu:
            resume = ['--resume', str(whole / f'{position}.pth.tar')]
            assert run_script(name, data_dir, tmp_path / position, *options, *resume) == 0
        assert_same_training(tmp_path / position, on_cpu(name))
        assert not gpu.of(RACE, MIXED)


def test_all_loaders_copy_on_one_stream(data_dir, tmp_path, monkeypatch):
    """Those of the training and of query and gallery in each test."""
    with fake_gpu.emulated() as gpu, counted_calls('prefetching') as calls:
        made, streams = [], torch.cuda.Stream
        monkeypatch.setattr(torch.cuda, 'Stream', lambda device: made.append(streams(device)) or made[-1])
        options = ['--gpu-devices', '1', '--precision', 'fp32', '--eval-step', '1']
        assert run_script('train_img_model_xent', data_dir, tmp_path, *options) == 0
        monkeypatch.undo()
    assert [stream.device for stream in made] == [DEVICE] and calls['prefetching'] > 3 * EPOCHS
    assert not gpu.of(RACE, MIXED)


@pytest.mark.parametrize(
    ('name', 'options'),
    [
        ('train_img_model_xent', []),
        ('train_img_model_xent', ['--rerank', '--k1', '4']),
        ('train_vid_model_xent_htri', ['--save-features', '--pool', 'max', '--test-batch', '3']),
        ('train_vid_model_xent_htri', ['--rerank', '--k1', '4']),
        ('train_img_model_xent', ['--multi-query', '--save-features']),
        ('train_img_model_xent', ['--any-camera']),
        ('train_vid_model_xent_htri', ['--seq-len', '0', '--save-features']),
    ],
)
def test_an_evaluation(name, options, on_cpu, data_dir, tmp_path):
    """The figures, the arrays that the page is made of, the page itself, and the features."""
    page = not options
    options = ['--evaluate', *options, '--resume', str(on_cpu(name) / f'checkpoint_ep{EPOCHS}.pth.tar')]
    expected = on_cpu(name, *options, page=page)
    with fake_gpu.emulated() as gpu, counted_calls('neighbours') as calls:
        assert run_script(name, data_dir, tmp_path, '--gpu-devices', '1', *options, page=page) == 0
    assert calls['neighbours'] and not gpu.of(RACE, MIXED)
    assert_same_figures(tmp_path, expected)
    assert (tmp_path / 'report.html').exists() == page
    arrays, others = (np.load(folder / 'ranking.npz') for folder in (tmp_path, expected))
    for key in set(arrays) - {'edges', 'match_histogram', 'other_histogram', 'nearest_distances'}:  # of distances
        np.testing.assert_array_equal(arrays[key], others[key], key)
    features = list((expected / 'features').glob('*/*.npy'))
    assert bool(features) == ('--save-features' in options)
    for path in features:
        np.testing.assert_array_equal(np.load(tmp_path / path.relative_to(expected)), np.load(path))


@pytest.mark.parametrize('how', ['rank', 'rerank'])
def test_exact_ranks_of_equal_distances(how, gpu):
    """Features of small whole numbers, in several tiles: no product is rounded, and many distances are equal."""
    rng = np.random.default_rng(0)
    pids, camids = ([rng.integers(0, most, number) for number in (70, 300)] for most in (9, 3))
    features = [torch.from_numpy(rng.integers(0, 3, (number, 8)).astype(np.float32)) for number in (70, 300)]
    rank = find(how)[2]
    expected = vars(rank(*features, *pids, *camids))
    found = vars(rank(*(each.to(DEVICE) for each in features), *pids, *camids))
    for key, value in expected.items():
        np.testing.assert_array_equal(found[key], value, key)


def test_a_loss_that_is_not_finite(data_dir, tmp_path, capsys):
    """Optimizers leave the step out on the device; the meter ends the run."""
    with fake_gpu.emulated() as gpu:
        options = ['--gpu-devices', '1', '--precision', 'fp32', '--lr', '1e38']
        assert run_script('train_img_model_xent', data_dir, tmp_path, *options) == 2
    assert 'not finite' in capsys.readouterr().err and not list(tmp_path.glob('*.pth.tar'))
    assert not gpu.of(RACE, MIXED)


@pytest.mark.parametrize('name', REAL)
def test_a_step_of_a_real_network(name, gpu):
    torch.manual_seed(0)
    model = models.factory[name](4, loss={'xent', 'htri'}).to(DEVICE, memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(model.parameters(), 3e-4, fused=True)
    before = [fake_gpu.on_host(param.detach()).clone() for param in model.parameters()]
    images = torch.randn(4, 3, 96, 48).to(DEVICE, memory_format=torch.channels_last)
    pids = torch.tensor([0, 0, 1, 1]).to(DEVICE)
    gpu.reports.clear()
    with torch.autocast('cuda', torch.bfloat16):
        logits, features = model(images)
    assert logits.dtype == torch.bfloat16 and features.device == DEVICE
    (F.cross_entropy(logits.float(), pids) + features.float().square().mean()).backward()
    optimizer.step()
    assert not gpu.reports, '\n'.join(map(str, gpu.reports))
    for param, old in zip(model.parameters(), before, strict=True):
        assert param.grad.dtype == torch.float32 and param.grad.device == DEVICE
        moved = not torch.equal(fake_gpu.on_host(param.detach()), old)
        assert moved or not fake_gpu.on_host(param.grad).any()  # of a small OSNet, a gate may have no gradient
        if min(param.shape) > 1:  # else strides mean nothing
            assert param.grad.stride() == param.stride() == optimizer.state[param]['exp_avg'].stride()


def test_one_process_of_two(data_dir, tmp_path, monkeypatch):
    """What NCCL is given, by the first process beside another that does the same: dense tensors of the device.

    In a step the host waits for one event only, that of the previous step, to learn whether to stop.
    """
    given = Counter()

    def collective(name: str, exchange: Callable[..., None]) -> None:
        def call(tensor, *args, **_):
            for each in fake_gpu.tensors_of((tensor, args)):
                assert isinstance(each, DeviceTensor) and each.device == DEVICE and each.is_contiguous(), name
                given[name, each.dtype] += 1
            exchange(tensor, *args)

        monkeypatch.setattr(torch.distributed, name, call)

    def gather(parts, tensor, *_):
        for part in parts:
            part.copy_(tensor)

    collective('all_gather', gather)
    collective('all_reduce', lambda tensor, *how: None if how else tensor.add_(tensor.clone()))
    collective('broadcast', lambda tensor, *_: None)
    for name, value in {
        'rendezvous': lambda *_: iter([(torch.distributed.HashStore(), 0, 2)]),
        'init_process_group': lambda backend, **_: given.update([backend]),
        'is_initialized': lambda: 'nccl' in given,
        'get_world_size': lambda *_: 2,
        'get_rank': lambda *_: 0,
        'barrier': lambda *_: None,
        'destroy_process_group': lambda *_: None,
    }.items():
        monkeypatch.setattr(torch.distributed, name, value)
    environment = {'RANK': 0, 'LOCAL_RANK': 0, 'WORLD_SIZE': 2, 'LOCAL_WORLD_SIZE': 2, 'MASTER_PORT': 1}
    for name, value in {**environment, 'MASTER_ADDR': 'localhost'}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(*find('replica')[:2], lambda run, module: module)
    with fake_gpu.emulated() as gpu, marked_steps(gpu) as marks:
        assert run_script('train_img_model_xent_htri', data_dir, tmp_path, '--gpu-devices', '1,0') == 0
    assert {key for key in given if isinstance(key, str)} == {'nccl'}
    assert {name for name, _ in given.keys() - {'nccl'}} == {'all_gather', 'all_reduce', 'broadcast'}
    assert {report.what for report in of_steps(gpu, marks)} == {'synchronizes an event'}
    assert not gpu.of(RACE, MIXED, PAGEABLE)


# The emulation itself

RULES = {  # what is done with x (4, 3) and index (4,), which are on the GPU, and whether it is reported
    'sum': (None, lambda x, index: x.sum()),
    'number': (None, lambda x, index: x * 2 + torch.tensor(3.0)),
    'gather': (None, lambda x, index: x[index]),
    'fill by mask': (None, lambda x, index: x.__setitem__(index > 1, 0)),
    'fill a row': (None, lambda x, index: x.__setitem__(0, 1)),
    'fill one element': (WAIT, lambda x, index: x.__setitem__((0, 0), 1)),
    'scatter a number': (WAIT, lambda x, index: x.__setitem__(index, 0)),
    'scatter from the host': (MIXED, lambda x, index: x.__setitem__(index, torch.ones(4, 3))),
    'gather by mask': (WAIT, lambda x, index: x[index > 1]),
    'gather by mask of the host': (WAIT, lambda x, index: x[torch.arange(4) > 1]),
    'gather by a list': (WAIT, lambda x, index: x[[0, 1]]),
    'gather from the host': (MIXED, lambda x, index: torch.ones(4)[index]),
    'one hot': (None, lambda x, index: F.one_hot(index, 4)),
    'one hot of unknown size': (WAIT, lambda x, index: F.one_hot(index)),
    'where': (None, lambda x, index: torch.where(x > 0, x, 0)),
    'where, as a list': (WAIT, lambda x, index: torch.where(x > 0)),
    'bincount': (WAIT, lambda x, index: index.bincount(minlength=4)),
    'repeat': (None, lambda x, index: index.repeat_interleave(2)),
    'repeat as often as': (WAIT, lambda x, index: index.repeat_interleave(index)),
    'allclose': (WAIT, lambda x, index: torch.allclose(x, x)),
    'in': (WAIT, lambda x, index: 3 in index),
    'range': (WAIT, lambda x, index: range(index[0])),
    'rows': (None, lambda x, index: [row.sum() for row in x]),
    'stack with the host': (MIXED, lambda x, index: torch.stack([x.sum(), torch.ones(())])),
    'add to the host': (MIXED, lambda x, index: torch.zeros(4, 3).add_(x)),
    'add to a number of the host': (MIXED, lambda x, index: torch.zeros(()).add_(x.sum())),
    'add of another GPU': (MIXED, lambda x, index: x + x.to('cuda:0')),
    'numpy': (MIXED, lambda x, index: x.numpy()),
    'tensor': (WAIT, lambda x, index: torch.tensor([1.0], device=DEVICE)),
    'factory': (None, lambda x, index: torch.full((3,), 1.0, device=DEVICE) + x),
    'random': (None, lambda x, index: torch.randperm(4, device=DEVICE)),
    'send': (WAIT, lambda x, index: torch.ones(3).to(DEVICE)),
    'send without waiting': (PAGEABLE, lambda x, index: torch.ones(3).to(DEVICE, non_blocking=True)),
    'send pinned memory': (WAIT, lambda x, index: torch.ones(3).pin_memory().to(DEVICE)),
    'send it without waiting': (None, lambda x, index: torch.ones(3).pin_memory().to(DEVICE, non_blocking=True)),
    'send a part of it': (None, lambda x, index: torch.empty(3, pin_memory=True)[1:].to(DEVICE, non_blocking=True)),
    'fetch': (WAIT, lambda x, index: x.cpu()),
    'fetch without waiting': (None, lambda x, index: x.to('cpu', non_blocking=True)),
    'fetch and read': (RACE, lambda x, index: x.to('cpu', non_blocking=True).sum()),
    'fetch to numpy': (RACE, lambda x, index: x.to('cpu', non_blocking=True).numpy()),
    'fetch to a list': (RACE, lambda x, index: x.to('cpu', non_blocking=True).tolist()),
    'copy': (WAIT, lambda x, index: torch.empty(4, 3).copy_(x)),
    'copy without waiting': (PAGEABLE, lambda x, index: torch.empty(4, 3).copy_(x, non_blocking=True)),
    'copy to pinned': (None, lambda x, index: torch.empty(4, 3, pin_memory=True).copy_(x, non_blocking=True)),
    'save': (WAIT, lambda x, index: torch.save(x, io.BytesIO())),
    'dropout': (None, lambda x, index: F.dropout(x)),
    'synchronize': (WAIT, lambda x, index: torch.cuda.synchronize()),
    'synchronize an event': (WAIT, lambda x, index: torch.cuda.current_stream().record_event().synchronize()),
    'record an event': (None, lambda x, index: torch.cuda.Event().record()),
}


@pytest.mark.parametrize('name', RULES)
def test_a_rule_of_cuda(name, gpu):
    kind, function = RULES[name]
    torch.cuda.set_device(DEVICE)
    x, index = torch.randn(4, 3).to(DEVICE), torch.arange(4).to(DEVICE)
    gpu.reports.clear()
    with pytest.raises((RuntimeError, TypeError)) if kind == MIXED else contextlib.nullcontext():
        function(x, index)
    assert {report.kind for report in gpu.reports} == ({kind} if kind else set())


@pytest.mark.parametrize('waits_for_x', [True, False])
@pytest.mark.parametrize('keeps_x', [True, False])
@pytest.mark.parametrize('waits_for_y', [True, False])
@pytest.mark.parametrize('keeps_y', [True, False])
def test_two_streams(waits_for_x, keeps_x, waits_for_y, keeps_y, gpu):
    """`x` goes to a stream at the side, `y` comes back; without one of the four calls there is a race."""
    torch.cuda.set_device(DEVICE)
    main, side = torch.cuda.current_stream(), torch.cuda.Stream()
    x = torch.ones(3, device=DEVICE)
    if waits_for_x:
        side.wait_stream(main)
    with torch.cuda.stream(side):
        if keeps_x:
            x.record_stream(side)
        y = 2 * x
        done = side.record_event()
    if waits_for_y:
        main.wait_event(done)
    if keeps_y:
        y.record_stream(main)
    assert not gpu.reports or not (waits_for_x and keeps_x)
    y.sum()
    assert len(gpu.reports) == 4 - sum([waits_for_x, keeps_x, waits_for_y, keeps_y])
    assert len(gpu.of(RACE)) == len(gpu.reports)


def test_an_event_says_which_copies_have_ended(gpu):
    torch.cuda.set_device(DEVICE)
    x, event = torch.ones(3, device=DEVICE), torch.cuda.Event()
    first = x.to('cpu', non_blocking=True)
    event.record()
    second = x.to('cpu', non_blocking=True)
    event.synchronize()
    first.sum()
    assert not gpu.of(RACE)
    second.sum()
    assert len(gpu.of(RACE)) == 1


def test_gradients_are_those_of_the_cpu(gpu):
    """Of a graph that forks and joins, a shared parameter, a broadcast sum, several outputs, and two precisions."""

    def gradients(device):
        torch.manual_seed(0)
        weight, bias = (torch.randn(4, width).to(device).requires_grad_() for width in (4, 1))
        one, two = (weight @ weight + bias).split(2)
        (one.bfloat16().float() * two.exp() + weight[[0, 1]].amax(0)).mean().backward()
        return [fake_gpu.on_host(tensor.grad) for tensor in (weight, bias)]

    for found, expected in zip(gradients(DEVICE), gradients('cpu'), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ('path', 'expected'),
    [
        ('losses.py', 'losses.py'),
        ('folder/module.py', 'folder/module.py'),
        ('tests/tiny.py', None),
        ('.venv/lib/python3/site-packages/torch/nn/functional.py', None),
        ('../elsewhere.py', None),
    ],
)
def test_which_files_belong_to_the_project(path, expected):
    assert fake_gpu.path_in_project(str((ROOT / path).resolve())) == expected


def test_nothing_is_left_of_the_emulation(data_dir, tmp_path):
    names = [(torch.cuda, 'is_available'), (torch.autograd, 'backward'), (nn.Module, 'to'), (torch.Tensor, 'numpy')]
    before = [getattr(*name) for name in names]
    with fake_gpu.emulated():
        assert run_script('train_img_model_xent', data_dir, tmp_path, '--gpu-devices', '1') == 0
    assert [getattr(*name) for name in names] == before and not torch.cuda.is_available()
    gc.collect()
    assert not [thing for thing in gc.get_objects() if type(thing) is DeviceTensor]


# Faults


class Fault(NamedTuple):
    """A mistake that somebody could make: `function` is called with the function at `place` and its arguments."""

    place: str
    kind: str  # of the report
    function: Callable
    line: int | None  # which must be reported


FAULTS: list[Fault] = []


def fault(place: str, kind: str) -> Callable[[Callable], Callable]:
    """A decorator of faults. The line that must be reported ends with `# here`; without one it is the project's own."""

    def add(function: Callable) -> Callable:
        lines, first = inspect.getsourcelines(function)
        line = next((number for number, text in enumerate(lines, first) if text.endswith('# here\n')), None)
        # The code is passed off as that of a file of the project, with the line numbers that it has in this one.
        function.__code__ = function.__code__.replace(co_filename=str(ROOT / 'fault.py'))
        FAULTS.append(Fault(place, kind, function, line))
        return function

    return add


# Of the loss. `whole` is the function without the fault.


@fault('criterion', WAIT)
def reads_the_loss(whole, *args):
    loss = whole(*args)
    loss.item()  # here
    return loss


@fault('criterion', WAIT)
def branches_on_the_loss(whole, *args):
    loss = whole(*args)
    if loss > 0:  # here
        return loss
    return -loss


@fault('criterion', WAIT)
def prints_the_loss(whole, *args):
    loss = whole(*args)
    print(loss)  # here
    return loss


@fault('criterion', WAIT)
def formats_the_loss(whole, *args):
    loss = whole(*args)
    print(f'{loss:.3f}')  # here
    return loss


@fault('criterion', WAIT)
def counts_what_is_right(whole, criterion, logits, pids):
    (logits.argmax(1) == pids).float().mean().tolist()  # here
    return whole(criterion, logits, pids)


@fault('criterion', WAIT)
def selects_by_a_mask(whole, criterion, logits, pids):
    logits[pids > 0].sum()  # here
    return whole(criterion, logits, pids)


@fault('criterion', WAIT)
def writes_by_a_mask(whole, criterion, logits, pids):
    scores = torch.zeros_like(logits.detach())
    scores[pids > 0] = scores.new_ones(logits.shape[1])  # here
    return whole(criterion, logits, pids)


@fault('criterion', WAIT)
def selects_by_an_index_on_the_host(whole, criterion, logits, pids):
    logits[torch.arange(2)].sum()  # here
    return whole(criterion, logits, pids)


@fault('criterion', WAIT)
def makes_one_hot_labels_of_unknown_size(whole, criterion, logits, pids):
    F.one_hot(pids)  # here
    return whole(criterion, logits, pids)


@fault('criterion', WAIT)
def lists_the_identities(whole, criterion, logits, pids):
    pids.unique()  # here
    return whole(criterion, logits, pids)


@fault('criterion', WAIT)
def compares_on_the_host(whole, criterion, logits, pids):
    torch.equal(pids, pids.sort().values)  # here
    return whole(criterion, logits, pids)


@fault('criterion', WAIT)
def makes_a_constant_in_each_step(whole, criterion, logits, pids):
    weight = torch.tensor(1.0, device=logits.device)  # here
    return weight * whole(criterion, logits, pids)


@fault('criterion', WAIT)
def writes_one_element(whole, criterion, logits, pids):
    weights = torch.ones_like(pids)
    weights[0] = 0  # here
    return whole(criterion, logits, pids)


@fault('criterion', WAIT)
def fetches_the_loss(whole, *args):
    loss = whole(*args)
    loss.detach().cpu()  # here
    return loss


@fault('criterion', RACE)
def fetches_the_loss_and_reads_it_too_early(whole, *args):
    loss = whole(*args)
    copy = loss.detach().to('cpu', non_blocking=True)
    float(copy)  # here
    return loss


@fault('criterion', PAGEABLE)
def fetches_the_loss_to_memory_that_is_not_pinned(whole, *args):
    loss = whole(*args)
    torch.empty(()).copy_(loss.detach(), non_blocking=True)  # here
    return loss


@fault('criterion', MIXED)
def leaves_weights_on_the_host(whole, criterion, logits, pids):
    weights = torch.ones(logits.shape[1])
    return whole(criterion, logits * weights, pids)  # here


@fault('criterion', MIXED)
def looks_up_in_a_table_on_the_host(whole, criterion, logits, pids):
    torch.ones(logits.shape[1])[pids]  # here
    return whole(criterion, logits, pids)


@fault('criterion', MIXED)
def hands_the_loss_to_numpy(whole, *args):
    loss = whole(*args)
    np.mean(np.asarray(loss.detach()))  # here
    return loss


@fault('criterion', MIXED)
def names_the_first_gpu(whole, criterion, logits, pids):
    weights = torch.ones(logits.shape[1], device='cuda:0')
    return whole(criterion, logits * weights, pids)  # here


@fault('criterion', MIXED)
def assumes_that_a_thread_is_on_the_same_gpu(whole, criterion, logits, pids):
    with ThreadPoolExecutor(1) as pool:
        weights = pool.submit(torch.ones, logits.shape[1], device='cuda').result()
    return whole(criterion, logits * weights, pids)  # here


@fault('distances', MIXED)
def assumes_a_gpu_in_a_thread_of_the_ranking(whole, *args):
    distances = whole(*args)
    return distances + torch.zeros(1, device=torch.cuda.current_device())  # here


# Of what surrounds it


@fault('augmentation', WAIT)
def counts_what_is_translated(whole, transform, images, draws):
    (draws[:, 0] >= 0.5).nonzero()  # here
    return whole(transform, images, draws)


@fault('augmentation', WAIT)
def sends_a_table_in_each_step(whole, transform, images, draws):
    table = torch.zeros(draws.shape[1], dtype=draws.dtype).to(draws.device)  # here
    return whole(transform, images, draws + table)


@fault('guard', WAIT)
def reads_the_flag(whole, run, loss, *optimizers):
    whole(run, loss, *optimizers)
    bool(optimizers[0].found_inf)  # here


@fault('guard', WAIT)
def clips_gradients_and_checks_them(whole, run, loss, *optimizers):
    params = optimizers[0].param_groups[0]['params']
    nn.utils.clip_grad_norm_(params, 1.0, error_if_nonfinite=True)  # here
    whole(run, loss, *optimizers)


@fault('guard', MIXED)
def leaves_the_state_of_the_optimizer_on_the_host(whole, run, loss, *optimizers):
    whole(run, loss, *optimizers)
    for state in optimizers[0].state.values():
        state['step'] = state['step'].cpu()


@fault('meter', WAIT)
def reads_each_loss(whole, meter, **losses):
    whole(meter, **losses)
    print(float(losses['loss'].detach()))  # here


@fault('meter', WAIT)
def synchronizes_to_measure_time(whole, meter, **losses):
    torch.cuda.synchronize()  # here
    whole(meter, **losses)


@fault('meter', WAIT)
def saves_in_each_step(whole, meter, **losses):
    torch.save(losses, io.BytesIO())  # here
    whole(meter, **losses)


@fault('copy of a batch', WAIT)
def waits_for_the_copy_of_a_batch(whole, block, device):
    block.pixels.to(device)  # here
    return whole(block, device)


@fault('copy of a batch', PAGEABLE)
def copies_a_batch_that_is_not_pinned(whole, block, device):
    return whole(dataclasses.replace(block, pixels=block.pixels.clone()), device)


@fault('arrival of a batch', RACE)
def uses_a_batch_that_may_be_on_its_way(whole, feed):
    with mock.patch.object(type(torch.cuda.current_stream()), 'wait_stream', lambda *_: None):
        return whole(feed)


@fault('arrival of a batch', RACE)
def lets_the_memory_of_a_batch_be_used_again(whole, feed):
    with mock.patch.object(DeviceTensor, 'record_stream', lambda *_: None):
        return whole(feed)


@pytest.mark.parametrize('fault', FAULTS, ids=lambda fault: fault.function.__name__)
def test_a_fault_is_reported_with_its_line(fault, data_dir, tmp_path, monkeypatch):
    owner, name, whole = find(fault.place)
    monkeypatch.setattr(owner, name, lambda *args, **kwargs: fault.function(whole, *args, **kwargs))
    with fake_gpu.emulated() as gpu, marked_steps(gpu) as marks:
        options = ['--gpu-devices', '1', '--precision', 'fp32']
        status = run_script('train_img_model_xent', data_dir, tmp_path, *options)
    reports = gpu.of(MIXED) if fault.kind == MIXED else of_steps(gpu, marks)
    assert {report.kind for report in reports} == {fault.kind}
    assert status == (1 if fault.kind == MIXED else 0)
    for report in reports:
        first, *others = report.lines
        if fault.line:
            assert first == ('fault.py', fault.line, fault.function.__name__)
        assert (ROOT / (others[0] if fault.line else first).path).exists()
