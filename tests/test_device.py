import os
import platform
import random
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from tiny import Tiny
from torch.optim import SGD, Adam

import models
from arguments import RunOptions
from runtime import cpu, device, precision
from runtime.device import Run
from runtime.errors import UserError
from runtime.precision import allow_tf32, has_bf16, without_tf32
from runtime.processes import Processes

CPU = torch.device('cpu')


def start(**options):
    return device.start(RunOptions(**{'use_cpu': True, **options}))


def test_start_seeds_everything():
    drawn = []
    for _ in range(2):
        start(seed=5)
        drawn.append((random.random(), np.random.rand(), torch.rand(()).item()))  # noqa: NPY002
    assert drawn[0] == drawn[1]
    start(seed=6)
    assert torch.rand(()).item() != drawn[0][2]


@pytest.mark.skipif(platform.libc_ver()[0] != 'glibc', reason='memory is kept by an option of glibc')
def test_freed_memory_is_kept_on_a_cpu():
    """Eight blocks of 16 MB take 32768 pages from the kernel: once or twice, where it could be each of ten times."""
    program = """if True:
        import resource, torch
        from arguments import RunOptions
        from runtime import cpu, device, precision
        device.start(RunOptions(use_cpu=True, precision='fp32'))
        def faults():
            return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        before = faults()
        for _ in range(10):
            blocks = [torch.ones(1 << 22) for _ in range(8)]
            del blocks
        print(faults() - before)
    """
    env = {name: value for name, value in os.environ.items() if not name.startswith(('MALLOC_', 'GLIBC_TUNABLES'))}
    command = [sys.executable, '-c', program]
    printed = subprocess.run(command, check=True, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True).stdout
    assert int(printed.split()[-1]) < 3 * 32768


@pytest.mark.parametrize(
    'program',
    [
        "launch.main(lambda *_: check(), arguments.parser(None, dataset='market1501', test_batch=32))",
        "extract.FeatureExtractor = lambda *_, **__: check(); extract.extractor_of(parsed('--weights', 'w'))",
    ],
)
def test_subnormal_numbers_are_zero_in_every_thread(program, tmp_path):
    """They slow down some processors. Releases of numpy before 2.4 must not warn of it."""
    begin = """if True:
        import argparse, sys, warnings
        warnings.simplefilter('error')
        import numpy, torch
        import arguments, extract
        from runtime import launch
        def check():
            product = torch.ones(1 << 22) * 2e-39
            print(torch.get_num_threads(), product.count_nonzero().item(), numpy.finfo(numpy.float32).tiny > 0)
            sys.exit()
        def parsed(*words):
            parser = argparse.ArgumentParser()
            extract.add_options(parser)
            return parser.parse_args(words)
        """
    command = [sys.executable, '-c', begin + program, '--use-cpu', '--save-dir', str(tmp_path)]
    env = os.environ | {'OMP_NUM_THREADS': '2'}
    printed = subprocess.run(command, check=True, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True).stdout
    assert printed.splitlines()[-1] == '2 0 True'


def test_an_allocator_that_the_user_has_tuned_is_left_alone(monkeypatch):
    calls = []
    library = SimpleNamespace(mallopt=lambda *option: calls.append(option) or 1)
    monkeypatch.setattr(cpu.ctypes, 'CDLL', lambda name: library)
    for name in [name for name in os.environ if name.startswith(('MALLOC_', 'GLIBC_TUNABLES'))]:
        monkeypatch.delenv(name)
    start()
    assert calls == [(cpu.M_MMAP_THRESHOLD, 1 << 28), (cpu.M_TRIM_THRESHOLD, (1 << 31) - 1)]
    monkeypatch.setenv('MALLOC_ARENA_MAX', '8')
    start()
    assert len(calls) == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason='this machine has CUDA')
def test_gpus_that_are_not_there(capsys):
    assert start(use_cpu=False).device.type == 'cpu'
    assert 'Currently using CPU (GPU is highly recommended)' in capsys.readouterr().out
    with pytest.raises(UserError, match='--gpu-devices 0,1: this machine has 0 CUDA devices'):
        start(use_cpu=False, gpu_devices='0,1')


def test_precision(monkeypatch):
    monkeypatch.setattr(device, 'has_bf16', lambda device: True)
    run = start()
    assert (run.precision, run.test_precision) == ('bf16', 'fp32')
    assert start(precision='bf16').test_precision == 'bf16'
    assert start(width=32).precision == 'fp32'
    with pytest.raises(UserError, match='--precision bf16 with --width 32'):
        start(precision='bf16', width=32)
    with pytest.raises(UserError, match='tf32 needs a CUDA device'):
        start(precision='tf32')
    with pytest.raises(UserError, match='--compile is for CUDA'):
        start(compile=True)
    with pytest.raises(UserError, match='--sync-bn is for CUDA'):
        start(sync_bn=True)
    monkeypatch.setattr(device, 'has_bf16', lambda device: False)
    assert start().precision == 'fp32'


@pytest.mark.parametrize(
    ('vendor', 'flags', 'gains'),
    [
        ('AuthenticAMD', 'avx512f avx512_bf16', True),
        ('AuthenticAMD', 'avx512f', False),
        ('GenuineIntel', 'avx512_bf16 amx_bf16 amx_tile', True),
        ('GenuineIntel', 'avx512f avx512_bf16', False),  # slower than float32 there
    ],
)
def test_processors_that_gain_from_bf16(vendor, flags, gains, monkeypatch):
    text = f'processor\t: 0\nvendor_id\t: {vendor}\nflags\t\t: fpu {flags} vaes\n'
    monkeypatch.setattr(precision.Path, 'read_text', lambda *_, **__: text)
    assert has_bf16(CPU) == gains


@pytest.mark.parametrize('allowed', [False, True])
def test_both_names_of_a_precision_can_be_read_afterwards(allowed):
    """PyTorch raises for the older ones if they contradict the newer ones, as after only one of them was set."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    try:
        allow_tf32(allowed)
        with without_tf32():
            assert getattr(matmul, 'fp32_precision', 'ieee') == 'ieee'
        assert matmul.allow_tf32 == cudnn.allow_tf32 == allowed
        assert torch.get_float32_matmul_precision() == ('high' if allowed else 'highest')
    finally:
        allow_tf32(False)


def test_autocast_is_for_the_model_call():
    weight = torch.ones(2, 2)
    run = Run(CPU, 'bf16', 'fp32')
    with run.autocast():
        assert (weight @ weight).dtype == torch.bfloat16
    with run.autocast(testing=True):
        assert (weight @ weight).dtype == torch.float32


@pytest.mark.parametrize('kind', [Adam, SGD])
def test_a_loss_that_is_not_finite_steps_nothing(kind, run):
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = kind([weight], lr=0.1, fused=True)

    def step(loss):
        optimizer.zero_grad()
        loss.backward()
        run.skip_unless_finite(loss, optimizer)
        optimizer.step()

    step(weight.sum())
    after_one = weight.detach().clone()
    assert (after_one < 1).all()
    step(weight.sum() * float('nan'))
    assert torch.equal(weight, after_one)
    assert not run.is_healthy()
    step(weight.sum())  # nor does any step after it: BatchNorm has seen what was not finite
    assert torch.equal(weight, after_one) and not run.is_healthy()


def test_an_optimizer_that_cannot_skip_a_step_is_refused(run):
    weight = torch.nn.Parameter(torch.ones(3))
    with pytest.raises(UserError, match='SGD cannot skip a step on the device: give it fused=True'):
        run.skip_unless_finite(weight.sum(), SGD([weight], lr=0.1))


@pytest.fixture(scope='module')
def model():
    torch.manual_seed(0)
    return models.init_model('resnet50', 2).eval().to(memory_format=torch.channels_last)


@pytest.mark.skipif(not has_bf16(CPU), reason='this CPU has no bf16 instructions')
@pytest.mark.parametrize(('height', 'width'), [(96, 48), (256, 128)])
def test_features_of_bf16_are_those_of_fp32(model, height, width):
    images = torch.randn(2, 3, height, width).contiguous(memory_format=torch.channels_last)
    features = []
    for chosen in ('fp32', 'bf16'):
        run = Run(CPU, chosen, chosen)
        with torch.inference_mode(), run.autocast(testing=True):
            features.append(model(images).float())
    full, half = features
    assert ((full - half).norm(dim=1) / full.norm(dim=1)).max() < 0.02  # 8 bits of mantissa through 50 layers


def test_sync_bn_keeps_parameters_and_keys(monkeypatch):
    monkeypatch.setattr(device, 'DistributedDataParallel', lambda module, *args, **kwargs: module)
    model = Tiny(3)
    keys, params = list(model.state_dict()), list(model.parameters())
    replica = Run(CPU, sync_bn=True, processes=Processes(world_size=2)).replicate(model)
    assert sum(isinstance(module, torch.nn.SyncBatchNorm) for module in replica.modules()) == 2
    assert list(model.state_dict()) == list(replica.state_dict()) == keys
    assert all(mine is theirs for mine, theirs in zip(replica.parameters(), params, strict=True))
    assert model.eval()(torch.rand(2, 3, 32, 16)).shape == (2, 16)  # a test on the CPU


@pytest.mark.parametrize('name', ['mobilenetv3_small_050', 'test_resnet'])
def test_sync_bn_keeps_the_activations_of_timm(name, monkeypatch):
    """Which for some networks are part of the normalisation, and which torch would drop."""
    pytest.importorskip('timm')
    monkeypatch.setattr(device, 'DistributedDataParallel', lambda module, *args, **kwargs: module)
    model = models.init_model(f'timm:{name}', 3, size=(64, 32)).eval()
    images, keys = torch.rand(2, 3, 64, 32), list(model.state_dict())
    expected = model(images)
    replica = Run(CPU, sync_bn=True, processes=Processes(world_size=2)).replicate(model)
    norms = [module for module in replica.modules() if isinstance(module, torch.nn.modules.batchnorm._BatchNorm)]
    assert norms and all(isinstance(norm, torch.nn.SyncBatchNorm) for norm in norms)
    assert torch.equal(replica.eval()(images), expected) and torch.equal(model.eval()(images), expected)
    assert list(model.state_dict()) == keys


def test_sync_bn_is_refused_for_a_normalisation_with_a_forward_of_its_own():
    class Mine(torch.nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x).relu()

    class Same(torch.nn.BatchNorm1d):
        """With the usual forward."""

    assert isinstance(device.synchronised(Same(3)), torch.nn.SyncBatchNorm)
    with pytest.raises(UserError, match=r'--sync-bn cannot replace Mine, whose forward is its own: remove --sync-bn'):
        device.synchronised(torch.nn.Sequential(Mine(3)))


def test_which_gpu_a_process_takes(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 4)
    checked, taken = [], []
    monkeypatch.setattr(device.cards, 'check', checked.append)
    monkeypatch.setattr(torch.cuda, 'set_device', taken.append)

    def take(local_rank, number, listed):
        processes = Processes(local_rank=local_rank, local_world_size=number)
        return device._device(RunOptions(gpu_devices=listed), processes)

    for local_rank, number, listed in ((0, 1, '2'), (1, 2, '0'), (1, 2, '2,3')):
        assert take(local_rank, number, listed) == taken[-1]
    assert [each.index for each in taken] == [2, 1, 3] and checked == taken
    with pytest.raises(UserError, match='0,1,2: 3 GPUs for 2 processes on this host'):
        take(1, 2, '0,1,2')


def test_processes_of_different_precision():
    """As --precision auto chooses on unequal hosts or GPUs."""
    for stack in (lambda tensor: tensor[None], lambda tensor: torch.stack([tensor, tensor])):
        precision.check_agreement('bf16', stack)
    with pytest.raises(UserError, match=r'--precision auto chose bf16 and fp32 on different devices: choose one'):
        precision.check_agreement('bf16', lambda tensor: torch.stack([tensor, torch.zeros_like(tensor)]))
