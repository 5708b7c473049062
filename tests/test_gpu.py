"""Tests that need a real GPU: the project computes, waits and ends as the other tests assume.

python -m pytest -m gpu               every test that needs a CUDA device, those of other files included
GPU_TESTS=cpu pytest tests/test_gpu.py    the logic of these tests, on the CPU
"""

import importlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import ENV, HANG, ROOT, SCRIPTS
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, Adam, AdamW

import data_manager
import evaluation
import models
import ranking
from arguments import RunOptions, TestOptions
from losses import CrossEntropyLabelSmooth, TripletLoss
from runtime import device, launch
from runtime.device import Run
from runtime.meters import LossMeter

ON_CPU = os.environ.get('GPU_TESTS') == 'cpu'
DEVICE = torch.device('cpu') if ON_CPU else torch.device('cuda', 0)
WHERE = ['--use-cpu'] if ON_CPU else ['--gpu-devices', '0']
RESIDENT = 'ram' if ON_CPU else 'device'  # values of --cache
REAL = [name for name, model in models.factory.items() if model.__module__.startswith('models.')]
EPOCHS, SOON = 2, 300  # seconds; NCCL itself would wait for a lost process for 10 minutes

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not (ON_CPU or torch.cuda.is_available()), reason='needs a CUDA device'),
]
needs_cuda = pytest.mark.skipif(ON_CPU, reason='the CPU has no CUDA graphs')
needs_two = pytest.mark.skipif(not ON_CPU and torch.cuda.device_count() < 2, reason='needs two GPUs')


# Running a script


def arguments_of(name: str, data_dir: Path, folder: Path, *options, arch: str = 'tiny', where=WHERE) -> list[str]:
    height, width = (32, 16) if arch == 'tiny' else (96, 48)
    argv = [f'{name}.py', '-a', arch, '--height', height, '--width', width, '--pretrained', 'none', '--workers', 2]
    argv += ['--train-batch', 8, '--max-epoch', EPOCHS, '--no-report', '--data-dir', data_dir]
    return [*map(str, [*argv, '--save-dir', folder, *where, *options])]


def run_here(*args, **kwargs) -> None:
    """Run a script in this process, as from the shell; it must succeed."""
    argv = arguments_of(*args, **kwargs)
    module = importlib.import_module(args[0])
    with mock.patch.object(sys, 'argv', argv):
        launch.main(module.main, module.parser)


class Shell:
    """A script in a process of its own, started at once; several of them run side by side."""

    def __init__(self, *args, act: str = '', via: str = 'tiny.py', **kwargs):
        name, *argv = arguments_of(*args, **kwargs)
        command = [sys.executable, str(ROOT / 'tests' / via), str(ROOT / name), *argv]
        pipes = {'stdout': subprocess.PIPE, 'stderr': subprocess.PIPE, 'text': True}
        self.process = subprocess.Popen(command, env={**ENV, 'ACT': act}, **pipes)
        self.folder = Path(args[2])

    def end(self, status: int = 0, seconds: float = HANG) -> tuple[str, str]:
        """Wait for its end; what it printed to stdout and stderr."""
        try:
            out, err = self.process.communicate(timeout=seconds)
        finally:
            self.process.kill()
        assert self.process.returncode == status, err
        return out, err


def weights_of(folder: Path) -> dict[str, Tensor]:
    """All that a run has learned: network, optimizers, centers."""
    saved = torch.load(folder / f'checkpoint_ep{EPOCHS}.pth.tar', weights_only=True, map_location='cpu')
    return dict(leaves({'network': saved['state_dict'], 'state': saved['state']}))


def leaves(tree: object, where: str = ''):
    if isinstance(tree, Tensor):
        yield where, tree
    elif isinstance(tree, (dict, list, tuple)):
        for key, branch in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from leaves(branch, f'{where}.{key}')


def assert_equal_weights(folder: Path, expected: Path) -> None:
    found, wanted = weights_of(folder), weights_of(expected)
    assert found.keys() == wanted.keys() and len(wanted) > 20
    assert [name for name, tensor in wanted.items() if not torch.equal(found[name], tensor)] == []


def losses_of(out: str) -> list[float]:
    return [float(loss) for loss in re.findall(r'^Batch .*?Loss ([\d.]+)', out, re.M)]


def figures_of(folder: Path) -> dict:
    results = json.loads((folder / 'results.json').read_text())
    return {key: results[key] for key in ('mAP', 'mINP', 'cmc', 'queries')}


# Steps


@pytest.mark.parametrize(('precision', 'cache'), [('fp32', 'none'), ('bf16', RESIDENT)])
@pytest.mark.parametrize('name', SCRIPTS)
def test_no_step_waits(name, precision, cache, data_dir, tmp_path, monkeypatch):
    """In the last epoch, from the end of its first step to that of its last one: loader, network, losses, meter.

    The first step of a run fills tables. What the host prints or saves at the end of an epoch waits, rightly.
    """
    watch, steps, guards = LossMeter.watch, [], False
    set_mode = (lambda mode: None) if ON_CPU else torch.cuda.set_sync_debug_mode

    def watched(meter, loader, epoch, start=0):
        nonlocal guards
        for batch in watch(meter, loader, epoch, start):
            steps.append(guards)
            yield batch
            guards = epoch == EPOCHS - 1 and meter.count < meter.total
            set_mode('error' if guards else 'default')

    monkeypatch.setattr(LossMeter, 'watch', watched)
    options = ['--precision', precision, '--cache', cache, '--print-freq', 1000]
    try:
        run_here(name, data_dir, tmp_path, *options, arch='tiny' if ON_CPU else 'resnet50')
    finally:
        set_mode('default')
    assert steps == [False] * (len(steps) // EPOCHS + 1) + [True] * (len(steps) // EPOCHS - 1) and any(steps)


@pytest.mark.parametrize('kind', [Adam, AdamW, SGD])
@pytest.mark.parametrize('number', [float('nan'), float('inf')])
def test_a_loss_that_is_not_finite_changes_nothing(kind, number):
    """CUDA's fused optimizers heed `found_inf`: weights, moments and the count of steps stay as they were."""
    torch.manual_seed(0)
    params = [
        nn.Parameter(torch.randn(8, 4, 3, 3, device=DEVICE).contiguous(memory_format=torch.channels_last)),
        nn.Parameter(torch.randn(8, device=DEVICE)),
    ]
    optimizer = kind(params, lr=0.1, fused=True, **({'momentum': 0.9} if kind is SGD else {}))
    run, states = Run(DEVICE), []
    for factor in (1.0, 1.0, number, 1.0):
        optimizer.zero_grad()
        loss = factor * sum(param.square().sum() for param in params)
        loss.backward()
        run.skip_unless_finite(loss, optimizer)
        optimizer.step()
        states.append({name: x.clone() for name, x in leaves([[*map(Tensor.detach, params)], optimizer.state_dict()])})
    first, second, *skipped = states
    assert not all(torch.equal(second[name], x) for name, x in first.items())
    for state in skipped:
        assert [name for name, x in second.items() if not torch.equal(state[name], x)] == []
    assert not run.is_healthy()


# The network


def seeded(name: str, loss: set[str], classes: int = 4) -> nn.Module:
    torch.manual_seed(0)
    return models.factory[name](classes, loss)


def start(precision: str) -> Run:
    return device.start(RunOptions(use_cpu=ON_CPU, precision=precision, width=64))


@pytest.mark.parametrize('name', REAL)
def test_features_are_those_of_the_cpu(name):
    """In float32 and, roughly, in bfloat16; every convolution keeps the channels_last layout."""
    run, model = start('fp32'), seeded(name, {'xent'}).eval()
    images, layouts = torch.randn(5, 3, 128, 64), []
    with torch.inference_mode():
        expected = model(images)
    model = run.place(model)
    for part in model.modules():
        if isinstance(part, nn.Conv2d):
            part.register_forward_hook(
                lambda part, args, out: layouts.append(out.is_contiguous(memory_format=torch.channels_last))
            )
    with torch.inference_mode():
        placed = images.to(run.device)  # NCHW: it is the weights that decide
        full = model(placed).cpu()
        with torch.autocast(run.device.type, torch.bfloat16):
            half = model(placed).float().cpu()
    torch.testing.assert_close(full, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
    assert ((half - expected).norm(dim=1) / expected.norm(dim=1)).max() < 0.05  # 8 bits of mantissa, 50 layers and more
    assert len(layouts) > 50 and all(layouts)


@pytest.mark.parametrize('name', REAL)
def test_gradients_are_those_of_the_cpu(name):
    """Of cross entropy and the triplet loss; they have the layout of their parameters, as fused optimizers need it."""
    images, pids = torch.randn(8, 3, 128, 64, generator=torch.Generator().manual_seed(1)), torch.arange(8) // 2
    sides = []
    for run in (Run(torch.device('cpu')), start('fp32')):
        model = run.place(seeded(name, {'xent', 'htri'})).train()
        placed = images.to(run.device, memory_format=torch.channels_last)
        logits, features = model(placed)
        there = pids.to(run.device)
        loss = CrossEntropyLabelSmooth(4)(logits, there) + TripletLoss()(features, there)
        loss.backward()
        for param in model.parameters():
            assert min(param.shape) == 1 or param.grad.stride() == param.stride()
        sides.append((loss.detach().cpu(), torch.cat([param.grad.flatten().cpu() for param in model.parameters()])))
    (loss, gradient), (found_loss, found) = sides
    torch.testing.assert_close(found_loss, loss, rtol=1e-3, atol=0)
    assert (found - gradient).norm() < 0.02 * gradient.norm()


@needs_cuda
def test_compiled_steps_are_those_of_an_eager_network():
    """They replay one CUDA graph, though tests of any batch size happen in between."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    images = torch.randn(16, 3, 96, 48, device=DEVICE).contiguous(memory_format=torch.channels_last)
    pids, losses = torch.arange(16, device=DEVICE) // 2, {}
    for compiled in (False, True):
        start('fp32')
        run = Run(DEVICE, 'fp32', compiled=compiled)
        model = run.place(seeded('resnet50', {'xent', 'htri'}, classes=8))
        losses[compiled], step = [], stepper(run, model, images, pids)
        for number in range(8):
            losses[compiled].append(step(number))
            if number % 3 == 2:
                with torch.inference_mode():
                    assert model.eval()(images[:5]).shape == (5, 2048)
                model.train()
    torch.testing.assert_close(torch.stack(losses[True]), torch.stack(losses[False]), rtol=1e-2, atol=0)
    assert counters['stats']['unique_graphs'] == 1 and not counters['inductor']['cudagraph_skips']
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        step(9)
    seen = {event.name for event in profile.events() if event.name.startswith('cuda')}
    assert 'cudaGraphLaunch' in seen or not seen  # none are seen where the driver keeps its counters to itself


def stepper(run: Run, model: nn.Module, images: Tensor, pids: Tensor) -> Callable[[int], Tensor]:
    replica, optimizer = run.replicate(model), Adam(model.parameters(), 1e-4, fused=True)
    xent, htri = CrossEntropyLabelSmooth(model.num_classes), TripletLoss()

    def step(number: int) -> Tensor:
        with run.autocast():
            logits, features = replica(images + 0.01 * number)
        loss = xent(logits.float(), pids) + htri(features.float(), pids)
        optimizer.zero_grad()
        loss.backward()
        run.skip_unless_finite(loss, optimizer)
        optimizer.step()
        return loss.detach().clone()

    return step


def test_a_compiled_script_prints_the_losses_of_an_eager_one(data_dir, tmp_path):
    """With a test after each epoch whose last batch is smaller."""
    options = ['--precision', 'fp32', '--print-freq', 1, '--eval-step', 1, '--test-batch', 3, '--cache', RESIDENT]
    compiled = [] if ON_CPU else ['--compile']
    for_each = [
        [
            Shell(name, data_dir, tmp_path / name / side, *options, *more)
            for side, more in (('eager', []), ('fast', compiled))
        ]
        for name in ('train_img_model_xent_htri', 'train_img_model_cent', 'train_img_model_strong')
    ]
    for pair in for_each:
        (eager, _), (fast, err) = (run.end() for run in pair)
        assert len(losses_of(eager)) >= 2 * EPOCHS
        assert losses_of(fast) == pytest.approx(losses_of(eager), rel=1e-2)
        assert 'skipping cudagraphs' not in err


# Runs


@pytest.mark.parametrize('name', ['train_img_model_cent', 'train_img_model_xent_htri'])  # all losses and optimizers
def test_deterministic_runs_are_equal(name, data_dir, tmp_path):
    """Bit for bit: another run, cached runs, and one that is resumed from its first epoch."""
    options, arch = ['--deterministic', '--eval-step', 1], 'tiny' if ON_CPU else 'resnet50'
    whole, *others = [
        Shell(name, data_dir, tmp_path / folder, *options, '--cache', cache, arch=arch)
        for folder, cache in (('whole', 'none'), ('again', 'none'), ('ram', 'ram'), ('resident', RESIDENT))
    ]
    for run in (whole, *others):
        run.end()
    for run in others:
        assert_equal_weights(run.folder, whole.folder)
    first = whole.folder / 'checkpoint_ep1.pth.tar'
    resumed = Shell(name, data_dir, tmp_path / 'resumed', *options, '--resume', first, arch=arch)
    resumed.end()
    assert_equal_weights(resumed.folder, whole.folder)


def test_a_deterministic_run_that_was_interrupted_ends_as_one_that_was_not(data_dir, tmp_path):
    """Interrupted in the second batch of a run, in the middle of an epoch."""
    wholes, parts = (
        [
            Shell(name, data_dir, tmp_path / name / folder, '--deterministic', act=act)
            for name in ('train_img_model_cent', 'train_vid_model_xent_htri')
        ]
        for folder, act in (('whole', ''), ('parted', 'ask 2 0'))
    )
    for run in wholes:
        run.end()
    for run in parts:
        run.end(143)
        assert [path.name for path in run.folder.glob('*.pth.tar')] == ['resume_1_2.pth.tar']
    resumed = [Shell(run.folder.parent.name, data_dir, run.folder, '--deterministic', '--auto-resume') for run in parts]
    for run, whole in zip(resumed, wholes, strict=True):
        run.end()
        assert_equal_weights(run.folder, whole.folder)


# The test


@pytest.fixture(scope='module')
def trained(data_dir, tmp_path_factory) -> Callable[[str], Path]:
    """The checkpoint of a script's training, which is done once."""
    paths: dict[str, Path] = {}

    def checkpoint(name: str) -> Path:
        if name not in paths:
            folder = tmp_path_factory.mktemp('trained')
            run_here(name, data_dir, folder, arch='tiny' if ON_CPU else 'resnet50')
            paths[name] = folder / f'checkpoint_ep{EPOCHS}.pth.tar'
        return paths[name]

    return checkpoint


@pytest.mark.parametrize('rerank', [[], ['--rerank', '--k1', '4']])
@pytest.mark.parametrize('name', ['train_img_model_xent', 'train_vid_model_xent'])
def test_figures_are_those_of_the_cpu(name, rerank, trained, data_dir, tmp_path):
    """By default in float32, up to features that differ in the last bits."""
    options = ['--evaluate', '--resume', trained(name), *rerank]
    for folder, where in (('here', WHERE), ('cpu', ['--use-cpu'])):
        run_here(name, data_dir, tmp_path / folder, *options, arch='tiny' if ON_CPU else 'resnet50', where=where)
    found, expected = (figures_of(tmp_path / folder) for folder in ('here', 'cpu'))
    assert found['queries'] == expected['queries']
    assert found['mAP'] == pytest.approx(expected['mAP'], abs=5e-3)
    assert found['cmc'] == pytest.approx(expected['cmc'], abs=1 / expected['queries']['valid'] + 1e-9)  # one query


@pytest.mark.parametrize('rerank', [False, True])
def test_equal_distances_give_exactly_the_figures_of_the_cpu(rerank, data_dir, tmp_path):
    """Features of small whole numbers are multiplied without rounding, and most gallery items have an equal."""
    dataset, rng = data_manager.init_dataset('market1501', str(data_dir)), np.random.default_rng(0)
    drawn = [
        torch.from_numpy(rng.integers(0, 2, (len(items), 6))).float() for items in (dataset.query, dataset.gallery)
    ]
    assert len(drawn[1].unique(dim=0)) < len(drawn[1]) - 5
    for place in (torch.device('cpu'), DEVICE):
        folder = tmp_path / place.type / str(len(list(tmp_path.iterdir())))
        options = TestOptions(save_dir=str(folder), no_report=True, rerank=rerank, k1=4, k2=2, interpolation='bilinear')
        extracted = [(features.to(place), torch.arange(len(features))) for features in drawn]
        with mock.patch.object(evaluation, 'extract', side_effect=extracted):
            evaluation.Test(dataset, options, Run(place))(nn.Identity())
    one, other = (path.parent for path in sorted(tmp_path.glob('*/*/results.json')))
    assert figures_of(one) == figures_of(other)
    assert (one / 'results.csv').read_text() == (other / 'results.csv').read_text()


def wide_numbers(rng: np.random.Generator, count: int) -> Tensor:
    """(count, 64): an odd number of 12 bits each, whose square has 23. float32 is exact; TF32, with 11 bits, is not."""
    features = torch.zeros(count, 64)
    features[:, 0] = torch.from_numpy(rng.integers(1024, 1448, count) * 2 + 1).float()
    return features


def test_wide_numbers_are_none_of_tf32():
    """Which has 10 explicit bits of the 23 of float32: the others would be lost."""
    numbers = wide_numbers(np.random.default_rng(0), 1000)[:, 0].contiguous()
    assert (numbers.view(torch.int32) & 0x1FFF).all() and (numbers.square() < 2**23).all()


@pytest.mark.parametrize('rank', [ranking.rank, ranking.rerank])
@pytest.mark.parametrize('precision', ['fp32', 'tf32'])
def test_ranking_counts_exactly(rank, precision):
    """In several tiles, with equal distances, and in full float32 where the training may use TF32."""
    start('fp32' if ON_CPU else precision)
    rng = np.random.default_rng(3)
    pids, camids = ([rng.integers(0, most, count) for count in (300, 3000)] for most in (50, 4))
    features = [wide_numbers(rng, 300), wide_numbers(rng, 3000)]
    features[1][1000:1500] = features[1][:500]
    expected = rank(*features, *pids, *camids)
    there = [each.to(DEVICE) for each in features]
    tiles = [{}, {'tile': (70, 333)}] if rank is ranking.rank else [{}]
    for tile in tiles:
        found = vars(rank(*there, *pids, *camids, **tile))
        for key, value in vars(expected).items():
            np.testing.assert_array_equal(found[key], value, key)


def test_float32_is_not_rounded_to_tf32():
    """In fp32, also after a run that allowed TF32: products and convolutions are exact."""
    for precision in ('fp32',) if ON_CPU else ('tf32', 'fp32'):
        start(precision)
    one, other = (wide_numbers(np.random.default_rng(seed), 1024) for seed in (0, 1))
    expected = (one.double() @ other.double().t()).float()
    one, other = one.to(DEVICE), other.to(DEVICE)
    assert torch.equal((one @ other.t()).cpu(), expected)
    pixels = one.t().reshape(1, 64, 32, 32).contiguous(memory_format=torch.channels_last)
    assert torch.equal(F.conv2d(pixels, other[:, :, None, None]).reshape(1024, 1024).t().cpu(), expected)


# Two GPUs. On the CPU two processes stand in for them, which need no SyncBatchNorm.

TOGETHER = {'where': ['--gpu-devices', '0,1'], 'via': 'two_gpus.py' if ON_CPU else 'tiny.py'}


@needs_two
@pytest.mark.parametrize('name', SCRIPTS)
def test_two_gpus_are_one(name, data_dir, tmp_path):
    """The first losses, before rounding has grown, with statistics of the whole batch."""
    options = ['--precision', 'fp32', '--print-freq', 1]
    alone = Shell(name, data_dir, tmp_path / 'one', *options)
    shared = Shell(name, data_dir, tmp_path / 'two', *options, *([] if ON_CPU else ['--sync-bn']), **TOGETHER)
    expected, found = (losses_of(run.end()[0]) for run in (alone, shared))
    assert len(found) == len(expected) >= 2 * EPOCHS
    assert found[:2] == pytest.approx(expected[:2], rel=0.2 if ON_CPU else 1e-3)


@needs_two
@pytest.mark.skipif(ON_CPU, reason='needs two GPUs: --compile is for them')
def test_two_gpus_replay_compiled_steps(data_dir, tmp_path):
    """Of two replicas, the network and the centers, whose graphs are split into the buckets of their gradients."""
    options = ['--precision', 'fp32', '--print-freq', 1]
    eager = Shell('train_img_model_cent', data_dir, tmp_path / 'eager', *options, **TOGETHER)
    fast = Shell('train_img_model_cent', data_dir, tmp_path / 'fast', *options, '--compile', **TOGETHER)
    (expected, _), (found, err) = eager.end(), fast.end()
    assert losses_of(found) == pytest.approx(losses_of(expected), rel=1e-2)
    assert 'skipping cudagraphs' not in err


@needs_two
@pytest.mark.parametrize('rerank', [[], ['--rerank', '--k1', '4']])
def test_two_gpus_share_a_test(rerank, data_dir, tmp_path):
    name, arch = 'train_img_model_xent', 'tiny'
    run_here(name, data_dir, tmp_path / 'trained', arch=arch)
    options = ['--evaluate', '--resume', tmp_path / 'trained' / f'checkpoint_ep{EPOCHS}.pth.tar', *rerank]
    for run in [
        Shell(name, data_dir, tmp_path / 'one', *options),
        Shell(name, data_dir, tmp_path / 'two', *options, **TOGETHER),
    ]:
        run.end()
    found, expected = (figures_of(tmp_path / folder) for folder in ('two', 'one'))
    assert found['queries'] == expected['queries'] and found['mAP'] == pytest.approx(expected['mAP'], abs=5e-3)


@needs_two
@pytest.mark.parametrize(('act', 'status'), [('mistake', 2), ('fault', 1), ('kill', 137)])
def test_a_lost_process_ends_the_run(act, status, data_dir, tmp_path):
    """NCCL would wait for it: the launcher has to end the others."""
    run = Shell('train_img_model_xent', data_dir, tmp_path, act=f'{act} 2 1', **TOGETHER)
    _, err = run.end(status, HANG if ON_CPU else SOON)
    assert act == 'kill' or 'what process 1 says' in err


@needs_two
def test_two_gpus_stop_together(data_dir, tmp_path):
    """When one process is asked to: after the step in which all have agreed, from which the run is resumed."""
    name = 'train_img_model_xent_htri'
    Shell(name, data_dir, tmp_path, act='ask 2 1', **TOGETHER).end(143)
    assert len(list(tmp_path.glob('resume_*.pth.tar'))) == 1
    Shell(name, data_dir, tmp_path, '--auto-resume', **TOGETHER).end()
