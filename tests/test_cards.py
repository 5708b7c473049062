"""GPUs that this build of PyTorch cannot use are reported in one line, and so are accelerators of other kinds."""

import warnings
from types import SimpleNamespace

import pytest
import torch

from arguments import RunOptions
from runtime import cards, device
from runtime.errors import UserError

CUDA_13 = ['sm_75', 'sm_80', 'sm_86', 'sm_90', 'sm_100', 'sm_120', 'compute_120']


@pytest.mark.parametrize(
    ('capability', 'built', 'runs'),
    [
        ((7, 5), CUDA_13, True),
        ((8, 9), CUDA_13, True),  # the same major number
        ((10, 3), CUDA_13, True),
        ((12, 1), CUDA_13, True),
        ((13, 0), CUDA_13, True),  # compiled from PTX
        ((7, 0), CUDA_13, False),
        ((6, 1), CUDA_13, False),
        ((11, 0), CUDA_13, False),  # no binary of its number, and the PTX is for newer ones
        ((8, 0), ['sm_86'], False),
        ((9, 0), ['sm_80'], False),
        ((9, 0), ['compute_80'], True),
        ((9, 0), ['sm_90a'], True),
        ((10, 0), ['compute_90a'], False),
        ((10, 3), ['sm_100a'], False),
        ((10, 3), ['compute_100f'], True),
        ((12, 0), ['compute_100f'], False),
        ((9, 0), ['gfx90a'], True),
        ((9, 0), [], True),
    ],
)
def test_which_kernels_run_on_which_card(capability, built, runs):
    assert cards.has_kernels(capability, built) is runs


@pytest.fixture
def old_card(monkeypatch):
    """A machine with a card of 2016."""
    answers = {
        'is_available': lambda: True,
        'device_count': lambda: 1,
        'get_device_capability': lambda *_: warnings.warn('several lines', stacklevel=1) or (6, 1),
        'get_device_name': lambda *_: 'an old card',
        'get_arch_list': lambda: CUDA_13,
        'set_device': lambda *_: pytest.fail('it is used'),
    }
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, answer)
    monkeypatch.setattr(torch.version, 'cuda', '13.0')


def test_a_card_without_kernels_is_named(old_card):
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        with pytest.raises(UserError) as refused:
            device.start(RunOptions())
    assert str(refused.value) == (
        f'PyTorch {torch.__version__} has no kernels for GPU 0, an old card, of compute capability 6.1: it is built '
        f'for {", ".join(CUDA_13)}; install another build, choose another GPU with --gpu-devices, or pass --use-cpu'
    )
    assert device.start(RunOptions(use_cpu=True)).device.type == 'cpu'


def test_rocm_is_not_asked_for_kernels_of_cuda(old_card, monkeypatch):
    monkeypatch.setattr(torch.version, 'cuda', None)
    monkeypatch.setattr(torch.version, 'hip', '6.4')
    cards.check(torch.device('cuda', 0))
    assert cards.available()


def test_a_card_that_does_not_respond_is_named(old_card, monkeypatch):
    def busy(*_):
        raise RuntimeError('CUDA error: CUDA-capable device(s) is/are busy or unavailable\nCUDA kernel errors')

    monkeypatch.setattr(torch.cuda, 'get_device_capability', busy)
    with pytest.raises(UserError, match=r'^GPU 0 cannot be used \(CUDA error: .* unavailable\); choose another'):
        device.start(RunOptions())


@pytest.fixture
def old_driver(monkeypatch, tmp_path):
    """A machine with a card whose driver is too old for this PyTorch."""
    (tmp_path / 'nvidia0').touch()
    (tmp_path / 'version').write_text(
        'NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  535.104.05  Release Build\nGCC version: 12.3.0\n'
    )
    monkeypatch.setattr(cards, 'DEVICES', tmp_path)
    monkeypatch.setattr(cards, 'DRIVER', tmp_path / 'version')
    monkeypatch.setattr(torch.version, 'cuda', '13.0')
    monkeypatch.delenv('CUDA_VISIBLE_DEVICES', raising=False)

    def is_available():
        text = 'The NVIDIA driver on your system is too old (found version 12020). Please update your GPU driver by ...'
        warnings.warn(f'CUDA initialization: {text}', stacklevel=1)
        return False

    monkeypatch.setattr(torch.cuda, 'is_available', is_available)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 0)


@pytest.mark.parametrize('listed', ['0', '0,1'])
def test_a_driver_that_is_too_old_is_named(listed, old_driver):
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        with pytest.raises(UserError) as refused:
            device.start(RunOptions(gpu_devices=listed))
    assert str(refused.value) == (
        f'the driver of the GPU, 535.104.05, does not work with PyTorch {torch.__version__}, which is built for CUDA '
        f'13.0 (The NVIDIA driver on your system is too old (found version 12020)); update the driver, install a build '
        f'for an older CUDA, or pass --use-cpu'
    )
    assert device.start(RunOptions(use_cpu=True)).device.type == 'cpu'


def test_a_driver_of_which_nothing_is_known(old_driver, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    cards.DRIVER.unlink()
    with pytest.raises(
        UserError, match=r'^the driver of the GPU does not work with PyTorch \S+, which is built for CUDA'
    ):
        cards.available()


@pytest.mark.parametrize('hidden', ['', '-1', 'none', 'NoDevFiles'])
def test_cards_that_are_hidden_leave_the_cpu(hidden, old_driver, monkeypatch, capsys):
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', hidden)
    with pytest.warns(UserWarning, match='too old'):
        assert device.start(RunOptions()).device.type == 'cpu'
    assert capsys.readouterr().out == 'Currently using CPU (GPU is highly recommended)\n'
    for shown in ('0', '1,2', 'GPU-8932f937', 'MIG-GPU-1'):
        monkeypatch.setenv('CUDA_VISIBLE_DEVICES', shown)
        with pytest.raises(UserError):
            cards.available()


@pytest.mark.parametrize('name', ['nvidia3', 'nvidia12', 'nvidiactl'])
def test_a_container_may_have_any_of_the_cards(name, old_driver):
    (cards.DEVICES / 'nvidia0').rename(cards.DEVICES / name)
    with pytest.raises(UserError, match=r'^the driver of the GPU'):
        cards.available()


def test_a_container_may_have_the_driver_and_no_card(old_driver, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)  # and no warning: the driver works
    for name in ('nvidiactl', 'nvidia-uvm', 'nvidia-modeset'):
        (cards.DEVICES / name).touch()
    (cards.DEVICES / 'nvidia0').unlink()
    assert not cards.available()


@pytest.mark.parametrize('missing', ['card', 'CUDA'])
@pytest.mark.filterwarnings('ignore:CUDA initialization')
def test_no_driver_is_missed_without_a_card_or_cuda(missing, old_driver, monkeypatch):
    if missing == 'card':
        (cards.DEVICES / 'nvidia0').unlink()
    else:
        monkeypatch.setattr(torch.version, 'cuda', None)
    assert not cards.available()


@pytest.mark.parametrize('kind', ['mps', 'xpu', 'cuda', None])
def test_an_accelerator_of_another_kind_is_mentioned(kind, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    monkeypatch.setattr(torch.backends.mps, 'is_available', lambda: kind == 'mps')
    monkeypatch.setattr(torch.accelerator, 'current_accelerator', lambda *_: kind and SimpleNamespace(type=kind))
    monkeypatch.setattr(torch.accelerator, 'is_available', lambda: True)
    monkeypatch.setattr(cards, 'DEVICES', tmp_path)
    device.start(RunOptions(precision='fp32'))
    line = f'The {kind} device of this machine is not used: the program supports CUDA and the CPU only\n'
    expected = 'Currently using CPU (GPU is highly recommended)\n' + (line if kind in ('mps', 'xpu') else '')
    assert capsys.readouterr().out == expected
    device.start(RunOptions(use_cpu=True, precision='fp32'))
    assert line not in capsys.readouterr().out


def test_a_pytorch_that_raises_when_there_is_no_accelerator(monkeypatch):
    def none(*_):
        raise RuntimeError('Cannot access accelerator device when none is available.')  # as torch 2.6 does

    monkeypatch.setattr(torch.accelerator, 'current_accelerator', none)
    monkeypatch.setattr(torch.backends.mps, 'is_available', lambda: False)
    assert cards.unsupported() == ''
