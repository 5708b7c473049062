"""On Windows, commands that cannot work end with a one-line message, and the others work."""

import subprocess
import sys

import numpy as np
import pytest
from conftest import ENV, HANG, ROOT, SCRIPTS

AS_ON_WINDOWS = """
import errno, fcntl, os, runpy, signal, sys, torch
for module, names in ((os, 'fork forkpty getuid posix_fallocate pread pwrite readv register_at_fork sysconf wait'),
                      (signal, 'SIGHUP SIGKILL SIGSTOP SIGCONT pthread_sigmask')):
    for name in names.split():
        delattr(module, name)
whole_open, whole_fsync = os.open, os.fsync

def open_file(path, *how, **more):
    if os.path.isdir(path):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
    return whole_open(path, *how, **more)

def fsync(number):
    if fcntl.fcntl(number, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))
    whole_fsync(number)

os.open, os.fsync = open_file, fsync
sys.modules['fcntl'] = sys.modules['resource'] = sys.modules['pwd'] = None
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name='__main__')
"""


def as_on_windows(*command):
    return subprocess.run(
        [sys.executable, '-c', AS_ON_WINDOWS, *map(str, command)], cwd=ROOT, env=ENV, timeout=HANG,
        capture_output=True, text=True,
    )  # fmt: skip


@pytest.mark.parametrize('name', SCRIPTS)
def test_a_command_that_needs_unix_says_so(name):
    run = as_on_windows(f'{name}.py', '-h')
    line = 'error: this program needs Linux or macOS; on Windows it runs in WSL, the Windows Subsystem for Linux\n'
    assert (run.returncode, run.stdout, run.stderr) == (2, '', line)


@pytest.mark.parametrize('module', ['runtime.launch', 'batches.workers'])
def test_so_does_a_module_whichever_is_imported_first(module):
    run = subprocess.run(
        [sys.executable, '-c', f'import sys; sys.modules["fcntl"] = None; import {module}'], env=ENV, timeout=HANG,
        capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 2 and run.stderr.startswith('error: this program needs Linux or macOS')
    assert run.stderr.count('\n') == 1


def test_a_command_that_does_not_need_it_works(tmp_path):
    for subset in ('query', 'gallery'):
        (tmp_path / subset).mkdir()
        np.save(tmp_path / subset / 'features.npy', np.random.default_rng(0).random((4, 8), np.float32))
        np.save(tmp_path / subset / 'pids.npy', np.arange(4))
        np.save(tmp_path / subset / 'camids.npy', np.full(4, len(subset)))
    run = as_on_windows('ranking.py', tmp_path / 'query', tmp_path / 'gallery')
    assert run.returncode == 0 and 'Rank-1' in run.stdout, run.stderr
    run = as_on_windows('data_manager.py', '-h')
    assert run.returncode == 0, run.stderr


def test_so_does_the_page(script, tmp_path):
    assert script('train_img_model_xent', '--max-epoch', 1, '--save-dir', tmp_path) == 0
    run = as_on_windows('report.py', tmp_path)
    assert (run.returncode, run.stdout) == (0, f'Wrote {tmp_path / "report.html"}\n'), run.stderr
    assert (tmp_path / 'report.html').stat().st_size > 0
