"""What several rooms' tests need: the tiny network, tiny data sets in the real formats, and a way to run a script."""

import importlib
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pictures
import pytest
import tiny  # registers the network
import torch

import toy
from runtime import launch
from runtime.device import Run

signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which nohup ignores, and all that it starts

ROOT = tiny.ROOT
TINY = ['-a', 'tiny', '--height', '32', '--width', '16', '--workers', '0', '--use-cpu', '--precision', 'fp32']
TINY.append('--no-report')  # it takes a second
HANG = 600  # seconds after which a process that is waited for is taken to hang; nothing is measured by it
SCRIPTS = [path.stem for path in sorted(ROOT.glob('train_*.py'))]
PATHS = [str(ROOT), str(ROOT / 'tests'), *filter(None, [os.environ.get('PYTHONPATH')])]
ENV = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': os.pathsep.join(PATHS)}


@pytest.fixture(scope='session')
def data_dir(tmp_path_factory) -> Path:
    """Market1501 and MARS in their real formats, with few persons."""
    folder = tmp_path_factory.mktemp('data')
    toy.draw_market1501(
        folder / 'market1501', num_train=6, num_test=5, num_distractors=2, num_images=4, height=48, width=24
    )
    toy.draw_mars(folder / 'mars', num_train=4, num_test=4, num_distractors=2, num_frames=(3, 5), height=48, width=24)
    return folder


@pytest.fixture(scope='session')
def places(data_dir, tmp_path_factory) -> Path:
    """Data sets of images and of videos, whose persons have the same numbers."""
    small = {'height': 48, 'width': 24, 'num_distractors': 2, 'seed': 1}
    folder = tmp_path_factory.mktemp('places')
    for name in ('market1501', 'mars'):
        shutil.copytree(data_dir / name, folder / name)
    toy.draw_market1501(folder / 'toy_market1501', num_train=5, num_test=4, num_images=4, **small)
    toy.draw_market1501(folder / 'toy_market1501_hard', num_train=4, num_test=4, num_images=4, hard=True, **small)
    toy.draw_mars(folder / 'toy_mars', num_train=3, num_test=4, num_frames=(3, 4), **small)
    return folder


@pytest.fixture(scope='session')
def images(tmp_path_factory) -> list:
    """Six identities with four images each, all of one size."""
    return pictures.draw(tmp_path_factory.mktemp('images'), 'jpg', pictures.SIZES[:1])


@pytest.fixture(scope='session')
def mixed(tmp_path_factory) -> list:
    """The same identities in three sizes."""
    return pictures.draw(tmp_path_factory.mktemp('mixed'), 'png', pictures.SIZES)


@pytest.fixture
def run() -> Run:
    """A run of one process on the CPU."""
    return Run(torch.device('cpu'))


@pytest.fixture
def python():
    """Run `python tests/tiny.py ARGS` in a process of its own and give back the finished process."""

    def start(*args, cwd=ROOT, check=False):
        command = [sys.executable, ROOT / 'tests' / 'tiny.py', *args]
        return subprocess.run(
            [*map(str, command)], cwd=cwd, timeout=HANG, check=check, capture_output=True, text=True,
            env={**os.environ, 'OMP_NUM_THREADS': '1'},
        )  # fmt: skip

    return start


@pytest.fixture
def script(data_dir, monkeypatch):
    """Run a script's `main` in this process, as from the shell: `script('train_img_model_xent', '--lr', '0.1')`.

    Gives back the exit status; what was printed is for `capsys`.
    """

    def start(name: str, *args) -> int:
        module = importlib.import_module(name)
        argv = [f'{name}.py', *TINY, '--data-dir', data_dir, '--pretrained', 'none', '--train-batch', '8', *args]
        monkeypatch.setattr(sys, 'argv', [*map(str, argv)])
        try:
            launch.main(module.main, module.parser)
        except SystemExit as end:
            return end.code
        return 0

    return start


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 300 kB, where mounting is possible."""
    folder = tmp_path / 'small'
    folder.mkdir()
    mount = ['mount', '-t', 'tmpfs', '-o', 'size=300k', 'tmpfs', str(folder)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip('no file system can be mounted here')
    yield folder
    subprocess.run(['umount', str(folder)], check=True)


@pytest.fixture(autouse=True)
def one_thread():
    """Tests compute little, and threads that wait for each other on a busy machine cost ten times as much.

    A run lets its thread compute with 0 in place of very small numbers: that ends with its test.
    """
    torch.set_num_threads(1)
    yield
    torch.set_flush_denormal(False)
