"""What --compile needs is checked before anything is read; the other checks of options are rows of test_mistakes.py."""

import importlib
import os
import re
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import pytest
import torch
from conftest import ENV, HANG, ROOT

from extraction import compiling
from runtime import checks, processes

SCRIPT = 'train_img_model_xent'


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine with a GPU, triton, gcc and Python.h, from which a test takes something away."""
    (tmp_path / 'bin').mkdir()
    (tmp_path / 'include').mkdir()
    program(tmp_path / 'bin' / 'gcc')
    (tmp_path / 'include' / 'Python.h').touch()
    whole = sysconfig.get_paths
    monkeypatch.setattr(sysconfig, 'get_paths', lambda *how: {**whole(*how), 'include': str(tmp_path / 'include')})
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch, '__version__', '2.8.0+cu128')
    monkeypatch.setattr(checks.importlib.util, 'find_spec', lambda name: name == 'triton')
    monkeypatch.setenv('PATH', str(tmp_path / 'bin'))
    for name in ('CC', 'CPATH', 'C_INCLUDE_PATH'):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def program(path):
    path.write_text('#!/bin/sh\n')
    path.chmod(0o755)


def parse(*options):
    return importlib.import_module(SCRIPT).parser.parse_args(['--compile', *options])


def refused(capsys, *options):
    """The line with which a run with --compile is refused."""
    with pytest.raises(SystemExit) as end:
        parse(*options)
    assert end.value.code == 2
    err = capsys.readouterr().err
    assert err.count('\n') == 1
    return err


def test_a_machine_that_has_all(machine):
    assert parse().compile
    assert parse('--gpu-devices', '0,1').compile


def test_without_a_compiler(machine, monkeypatch, capsys):
    (machine / 'bin' / 'gcc').unlink()
    program(machine / 'bin' / 'cc')  # which triton does not look for
    assert refused(capsys).startswith('error: --compile needs a C compiler, and there is no gcc or clang: install one')
    monkeypatch.setenv('CC', 'cc')
    assert parse().compile
    monkeypatch.delenv('CC')
    program(machine / 'bin' / 'clang')
    assert parse().compile


@pytest.mark.parametrize('compiler', ['', 'gcc-0', 'gcc -O3', '/usr'])
def test_a_compiler_that_is_none(compiler, machine, monkeypatch, capsys):
    """triton runs CC as it is, and nothing else."""
    monkeypatch.setenv('CC', compiler)
    assert f'and CC is {compiler!r} in the environment, which was not found' in refused(capsys)


def test_without_the_headers_of_python(machine, monkeypatch, capsys):
    (machine / 'include' / 'Python.h').rename(machine / 'Python.h')
    version = '.'.join(map(str, sys.version_info[:2]))
    message = f"error: --compile needs Python's header files, and there is no {machine}/include/Python.h: install"
    err = refused(capsys)
    assert err.startswith(message) and f'python{version}-dev' in err
    for name in ('CPATH', 'C_INCLUDE_PATH'):  # with which a user without root's rights can name another folder
        with monkeypatch.context() as patch:
            patch.setenv(name, f'/nowhere{os.pathsep}{machine}')
            assert parse().compile


def test_the_headers_of_a_debian(machine, monkeypatch):
    """Its Python names a folder of its own scheme, in which triton does not look."""
    asked = []
    monkeypatch.setattr(sysconfig, 'get_default_scheme', lambda: 'posix_local')
    monkeypatch.setattr(sysconfig, 'get_paths', lambda scheme: asked.append(scheme) or {'include': '/usr/include'})
    assert compiling.include_folders(('NONE',)) == [Path('/usr/include')] and asked == ['posix_prefix']


def test_without_triton(machine, monkeypatch, capsys):
    monkeypatch.setattr(checks.importlib.util, 'find_spec', lambda name: None)
    assert refused(capsys).startswith('error: --compile needs triton, which is not installed: pip install triton')


def test_several_gpus_need_a_newer_pytorch(machine, monkeypatch, capsys):
    monkeypatch.setattr(torch, '__version__', '2.7.1+cu126')
    assert parse().compile
    expected = 'error: --compile with several GPUs needs PyTorch 2.8 or newer, and 2.7.1+cu126 is installed'
    assert refused(capsys, '--gpu-devices', '0,1').startswith(expected)
    for name, value in {'RANK': 0, 'WORLD_SIZE': 2, 'LOCAL_RANK': 0, 'LOCAL_WORLD_SIZE': 2, 'MASTER_PORT': 1}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv('MASTER_ADDR', 'localhost')
    assert refused(capsys).startswith(expected)


@pytest.mark.parametrize('more', [[], ['--use-cpu'], ['--gpu-devices', '0,1']])
def test_sync_bn_is_not_compiled(more, machine, capsys):
    assert '--compile does not work with --sync-bn' in refused(capsys, '--sync-bn', *more)


@pytest.mark.parametrize('options', [['--evaluate'], ['--use-cpu']])
def test_what_compiles_nothing_needs_nothing(options, machine, monkeypatch):
    """A test on a GPU is not compiled, and training on the CPU is refused later."""
    monkeypatch.setenv('PATH', '')
    assert parse(*options).compile


@pytest.fixture
def cpu(machine, monkeypatch):
    """The same machine without a GPU, but with g++."""
    (machine / 'bin' / 'gcc').rename(machine / 'bin' / 'g++')
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    for name in ('CXX', 'CPLUS_INCLUDE_PATH'):
        monkeypatch.delenv(name, raising=False)
    return machine


@pytest.mark.parametrize('gpu', [False, True])
def test_a_test_on_a_cpu_needs_a_compiler(gpu, cpu, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: gpu)
    options = '--evaluate', *['--use-cpu'] * gpu
    assert parse(*options).compile
    (cpu / 'include' / 'Python.h').rename(cpu / 'Python.h')
    assert "--compile needs Python's header files, and there is no" in refused(capsys, *options)
    monkeypatch.setenv('CPLUS_INCLUDE_PATH', str(cpu))
    assert parse(*options).compile
    (cpu / 'bin' / 'g++').rename(cpu / 'bin' / 'cc')
    assert refused(capsys, *options).startswith(
        'error: --compile needs a C++ compiler, and there is no g++: install one'
    )
    monkeypatch.setenv('CXX', 'cc')
    assert parse(*options).compile
    monkeypatch.setenv('CXX', 'cc -O3')
    assert "needs a C++ compiler, and CXX is 'cc -O3' in the environment, which was not" in refused(capsys, *options)


LATE = """
import os, runpy, sys, time
from pathlib import Path
waits, sleep = Path(sys.argv[1]), time.sleep
sys.argv = sys.argv[2:]
if os.environ['LOCAL_RANK'] == '1':
    time.sleep = lambda _: waits.touch() or sleep(1000)  # until it is ended, on a busy machine too
while os.environ['LOCAL_RANK'] == '0' and not waits.exists():
    sleep(0.01)
runpy.run_path(sys.argv[0], run_name='__main__')
"""


@pytest.mark.parametrize('first_is_late', [False, True])
def test_processes_of_a_host_report_it_once(first_is_late, tmp_path):
    """Also if the second one finds the mistake while the first one is still starting."""
    (tmp_path / 'late.py').write_text(LATE)
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2']
    command += [tmp_path / 'late.py', tmp_path / 'waits'] if first_is_late else []
    command += [ROOT / f'{SCRIPT}.py', '--compile', '--sync-bn', '--save-dir', tmp_path / 'log']
    run = subprocess.run([*map(str, command)], env=ENV, timeout=HANG, capture_output=True, text=True)
    assert run.returncode
    assert len(re.findall('^error: --compile does not work', run.stderr, re.MULTILINE)) == 1
    assert not (tmp_path / 'log').exists()


def test_a_mistake_of_another_process_alone_is_reported(monkeypatch, capsys):
    for name, value in {'RANK': 1, 'WORLD_SIZE': 2, 'LOCAL_RANK': 1, 'LOCAL_WORLD_SIZE': 2, 'MASTER_PORT': 1}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv('MASTER_ADDR', 'localhost')
    waited = []
    monkeypatch.setattr(time, 'sleep', waited.append)
    assert refused(capsys, '--sync-bn').startswith('error: --compile does not work with --sync-bn')
    assert waited == [processes.REPORT_SECONDS]
