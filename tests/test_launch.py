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

import models
from runtime import launch
from runtime.errors import UserError


def options(**changes):
    return SimpleNamespace(
        **{
            'seed': 1,
            'use_cpu': True,
            'gpu_devices': '0',
            'precision': 'auto',
            'compile': False,
            'sync_bn': False,
            'deterministic': False,
            'max_restarts': 0,
            'width': 128,
            **changes,
        }
    )


class Parser:
    """A parser of no options, for `launch.main`."""

    def __init__(self, save_dir):
        self.args = SimpleNamespace(save_dir=save_dir, evaluate=False, run=options(), plain=lambda: 'Namespace()')

    def parse_args(self):
        return self.args


def test_main_logs_what_is_printed(tmp_path, capsys):
    launch.main(lambda args: print('hello'), Parser(tmp_path))
    out = capsys.readouterr().out
    assert out.startswith(
        '==========\nArgs:Namespace()\n==========\nhello\nFinished. Total elapsed time (h:m:s): 0:00:0'
    )
    assert (tmp_path / 'log_train.txt').read_text() == out


@pytest.mark.parametrize(
    ('exception', 'status', 'text'),
    [
        (UserError('what, where, what to do'), 2, 'error: what, where, what to do\n'),
        (ValueError('our fault'), 1, 'Traceback'),
    ],
)
def test_mistakes_are_one_line_and_faults_a_traceback(tmp_path, capsys, exception, status, text):
    def experiment(args):
        raise exception

    with pytest.raises(SystemExit) as end:
        launch.main(experiment, Parser(tmp_path))
    assert end.value.code == status
    err = capsys.readouterr().err
    assert err.startswith(text)
    assert (tmp_path / 'log_train.txt').read_text().endswith(err)
    assert sys.stdout is not None and not isinstance(sys.stdout, launch.Logger)


def test_start_seeds_everything():
    drawn = []
    for _ in range(2):
        launch.start(options(seed=5))
        drawn.append((random.random(), np.random.rand(), torch.rand(()).item()))  # noqa: NPY002
    assert drawn[0] == drawn[1]
    launch.start(options(seed=6))
    assert torch.rand(()).item() != drawn[0][2]


@pytest.mark.skipif(platform.libc_ver()[0] != 'glibc', reason='memory is kept by an option of glibc')
def test_freed_memory_is_kept_on_a_cpu():
    """Eight blocks of 16 MB take 32768 pages from the kernel: once or twice, where it could be each of ten times."""
    program = """if True:
        import resource, types, torch, launch
        launch.start(types.SimpleNamespace(
            seed=1, use_cpu=True, gpu_devices='0', precision='fp32', width=128, compile=False, sync_bn=False,
            deterministic=False,
        ))
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


def test_an_allocator_that_the_user_has_tuned_is_left_alone(monkeypatch):
    calls = []
    library = SimpleNamespace(mallopt=lambda *option: calls.append(option) or 1)
    monkeypatch.setattr(launch.ctypes, 'CDLL', lambda name: library)
    for name in [name for name in os.environ if name.startswith(('MALLOC_', 'GLIBC_TUNABLES'))]:
        monkeypatch.delenv(name)
    launch.start(options())
    assert calls == [(launch.M_MMAP_THRESHOLD, 1 << 28), (launch.M_TRIM_THRESHOLD, (1 << 31) - 1)]
    monkeypatch.setenv('MALLOC_ARENA_MAX', '8')
    launch.start(options())
    assert len(calls) == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason='this machine has CUDA')
def test_gpus_that_are_not_there(capsys):
    assert launch.start(options(use_cpu=False)).device.type == 'cpu'
    assert 'Currently using CPU (GPU is highly recommended)' in capsys.readouterr().out
    with pytest.raises(UserError, match='--gpu-devices 0,1: this machine has 0 CUDA devices'):
        launch.start(options(use_cpu=False, gpu_devices='0,1'))


def test_precision(monkeypatch):
    monkeypatch.setattr(launch, '_has_bf16', lambda device: True)
    run = launch.start(options())
    assert (run.precision, run.test_precision) == ('bf16', 'fp32')
    assert launch.start(options(precision='bf16')).test_precision == 'bf16'
    assert launch.start(options(width=32)).precision == 'fp32'
    with pytest.raises(UserError, match='--precision bf16 with --width 32'):
        launch.start(options(precision='bf16', width=32))
    with pytest.raises(UserError, match='tf32 is for CUDA'):
        launch.start(options(precision='tf32'))
    with pytest.raises(UserError, match='--compile is for CUDA'):
        launch.start(options(compile=True))
    monkeypatch.setattr(launch, '_has_bf16', lambda device: False)
    assert launch.start(options()).precision == 'fp32'


def test_autocast_is_for_the_model_call():
    weight = torch.ones(2, 2)
    run = launch.Run(torch.device('cpu'), 'bf16', 'fp32', 1)
    with run.autocast():
        assert (weight @ weight).dtype == torch.bfloat16
    with run.autocast(testing=True):
        assert (weight @ weight).dtype == torch.float32


@pytest.mark.parametrize('optimizer', [torch.optim.Adam, torch.optim.SGD])
def test_a_loss_that_is_not_finite_steps_nothing(optimizer):
    run = launch.Run(torch.device('cpu'), 'fp32', 'fp32', 1)
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = optimizer([weight], lr=0.1, fused=True)

    def step(loss):
        optimizer.zero_grad()
        loss.backward()
        run.guard(loss, optimizer)
        optimizer.step()

    step(weight.sum())
    after_one = weight.detach().clone()
    assert (after_one < 1).all()
    step(weight.sum() * float('nan'))
    assert torch.equal(weight, after_one)
    assert not run.is_healthy()
    step(weight.sum())  # nor does any step after it: BatchNorm has seen what was not finite
    assert torch.equal(weight, after_one) and not run.is_healthy()


@pytest.fixture(scope='module')
def model():
    torch.manual_seed(0)
    return models.init_model('resnet50', 2).eval().to(memory_format=torch.channels_last)


@pytest.mark.skipif(not launch._has_bf16(torch.device('cpu')), reason='this CPU has no bf16 instructions')
@pytest.mark.parametrize(('height', 'width'), [(96, 48), (256, 128)])
def test_features_of_bf16_are_those_of_fp32(model, height, width):
    images = torch.randn(2, 3, height, width).contiguous(memory_format=torch.channels_last)
    features = []
    for precision in ('fp32', 'bf16'):
        run = launch.Run(torch.device('cpu'), precision, precision, 1)
        with torch.inference_mode(), run.autocast(testing=True):
            features.append(model(images).float())
    full, half = features
    assert ((full - half).norm(dim=1) / full.norm(dim=1)).max() < 0.02  # 8 bits of mantissa through 50 layers


def test_sync_bn_keeps_parameters_and_keys(monkeypatch):
    with pytest.raises(UserError, match='--sync-bn is for CUDA'):
        launch.start(options(sync_bn=True))
    monkeypatch.setattr(launch, 'DistributedDataParallel', lambda module, *args, **kwargs: module)
    model = Tiny(3)
    keys, params = list(model.state_dict()), list(model.parameters())
    run = launch.Run(torch.device('cpu'), 'fp32', 'fp32', 1, world_size=2, sync_bn=True)
    replica = run.replicate(model)
    assert sum(isinstance(module, torch.nn.SyncBatchNorm) for module in replica.modules()) == 2
    assert list(model.state_dict()) == list(replica.state_dict()) == keys
    assert all(mine is theirs for mine, theirs in zip(replica.parameters(), params, strict=True))
    assert model.eval()(torch.rand(2, 3, 32, 16)).shape == (2, 16)  # a test on the CPU


def test_an_environment_of_half_a_group(monkeypatch):
    monkeypatch.setenv('LOCAL_RANK', '0')
    for name in ('RANK', 'WORLD_SIZE', 'LOCAL_WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT'):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match='RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT is not'):
        launch.start(options())


def test_which_gpu_a_process_takes(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 4)
    taken = []
    monkeypatch.setattr(torch.cuda, 'set_device', taken.append)
    for local_rank, processes, listed in ((0, 1, '2'), (1, 2, '0'), (1, 2, '2,3')):
        monkeypatch.setenv('LOCAL_RANK', str(local_rank))
        monkeypatch.setenv('LOCAL_WORLD_SIZE', str(processes))
        launch._device(options(use_cpu=False, gpu_devices=listed))
    assert [device.index for device in taken] == [2, 1, 3]
    with pytest.raises(UserError, match='0,1,2: 3 GPUs for 2 processes on this host'):
        launch._device(options(use_cpu=False, gpu_devices='0,1,2'))
