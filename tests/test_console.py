"""A console that cannot be written does not stop training, and ends a command without a traceback."""

import contextlib
import errno
import fcntl
import io
import os
import pty
import signal
import struct
import subprocess
import sys
import termios

import numpy as np
import pytest
from conftest import ENV, HANG, ROOT, TINY

from runtime.console import Console, guarded, report
from runtime.errors import UserError
from utils import Logger

FULL = os.strerror(errno.ENOSPC)
GONE = os.strerror(errno.EPIPE)
CLOSED = os.strerror(errno.EBADF)
TRAIN = ['--max-epoch', 1, '--print-freq', 1]
BUFFERED = {name: value for name, value in ENV.items() if name != 'PYTHONUNBUFFERED'}


def pipe_without_a_reader():
    reader, writer = os.pipe()
    os.close(reader)
    return open(writer, 'w')


def closed_file():
    file = io.StringIO()
    file.close()
    return file


BROKEN = {  # how a stream is made, and why it cannot be written
    'a full disk': (lambda: open('/dev/full', 'w'), FULL),  # noqa: SIM115
    'a pipe': (pipe_without_a_reader, GONE),
    'closed at the start': (lambda: None, CLOSED),
    'closed later': (closed_file, 'I/O operation on closed file'),
}


@pytest.fixture(params=BROKEN)
def broken(request):
    """How such a stream is made, and why it cannot be written."""
    return BROKEN[request.param]


def test_a_stream_that_fails_is_reported_once_and_drops_the_rest(broken):
    make, problem = broken
    stream, problems = make(), []
    console = Console(stream, problems.append)
    assert not console.isatty()
    for _ in range(3):
        console.write('text\n')
        console.flush()
    assert problems == [console.problem] == [problem]
    assert not console.isatty()
    if stream and not stream.closed:
        stream.close()  # what was left is gone, or Python would fail here and at its exit


def test_a_console_that_nothing_is_written_to_has_not_failed():
    console = Console(None, lambda problem: pytest.fail(problem))
    console.flush()
    assert not console.isatty() and not console.problem


@pytest.mark.parametrize(
    ('encoding', 'written'), [('ascii', rb'\xe9 \u4eba \udcff'), ('latin-1', b'\xe9 \\u4eba \\udcff')]
)
def test_characters_that_the_encoding_does_not_have(encoding, written):
    stream = io.TextIOWrapper(io.BytesIO(), encoding)
    console = Console(stream, lambda problem: pytest.fail(problem))
    console.write('é 人 \udcff')
    console.flush()
    assert stream.buffer.getvalue() == written and console.encoding == encoding


def test_a_guarded_stdout_raises_and_stderr_does_not(broken, monkeypatch):
    make, problem = broken
    streams = make(), make()
    monkeypatch.setattr(sys, 'stdout', streams[0])
    monkeypatch.setattr(sys, 'stderr', streams[1])
    with guarded():
        report('text\n')
        print('text', file=sys.stderr, flush=True)
        with pytest.raises(UserError, match=f'^stdout cannot be written: {problem}$'):
            print('text', flush=True)
        print('text', flush=True)  # once
    assert (sys.stdout, sys.stderr) == streams


def test_a_report_to_nobody(broken, monkeypatch):
    monkeypatch.setattr(sys, 'stderr', broken[0]())
    report('text\n')


def test_a_log_has_what_its_console_does_not_take(broken, tmp_path, monkeypatch, capsys):
    make, problem = broken
    monkeypatch.setattr(sys, 'stdout', make())
    with Logger(tmp_path / 'log.txt') as log:
        print('one')
        print('two')
    assert log.problem == problem and not isinstance(sys.stdout, Logger)
    line = f'error: stdout cannot be written: {problem}; the run continues with its log\n'
    assert (tmp_path / 'log.txt').read_text() == f'one\n{line}two\n'
    assert capsys.readouterr().err == line


@pytest.mark.parametrize('stderr_too', [False, True])
def test_a_training_continues_without_its_console(broken, stderr_too, script, tmp_path, monkeypatch, capsys):
    make, problem = broken
    monkeypatch.setattr(sys, 'stdout', make())
    if stderr_too:
        monkeypatch.setattr(sys, 'stderr', BROKEN['a full disk'][0]())
    assert script('train_img_model_xent', *TRAIN, '--save-dir', tmp_path) == 2
    log = (tmp_path / 'log_train.txt').read_text()
    line = f'error: stdout cannot be written: {problem}; the run continues with its log\n'
    assert f'\n==========\n{line}' in log and log.count('error') == 1 and 'Batch 2/' in log and 'Finished' in log
    assert (tmp_path / 'checkpoint_ep1.pth.tar').exists()
    assert capsys.readouterr().err == ('' if stderr_too else line)


def test_a_test_continues_without_its_console(script, tmp_path, monkeypatch, capsys):
    assert script('train_img_model_xent', *TRAIN, '--save-dir', tmp_path) == 0
    capsys.readouterr()
    evaluate = ['--evaluate', '--resume', tmp_path / 'checkpoint_ep1.pth.tar', '--save-dir', tmp_path]
    monkeypatch.setattr(sys, 'stdout', BROKEN['a full disk'][0]())
    assert script('train_img_model_xent', *evaluate) == 2
    log = (tmp_path / 'log_test.txt').read_text()
    assert log.count('error: stdout') == 1 and 'Finished' in log and 'Rank-1' in log
    assert capsys.readouterr().err.count('error: stdout') == 1


def test_a_mistake_is_reported_without_a_console(script, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, 'stdout', BROKEN['a full disk'][0]())
    assert script('train_img_model_xent', '--data-dir', tmp_path / 'nowhere', '--save-dir', tmp_path) == 2
    log = (tmp_path / 'log_train.txt').read_text()
    assert log.count('error: ') == capsys.readouterr().err.count('error: ') == 2  # one is about the console


def test_names_that_the_console_cannot_show(script, tmp_path, monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), 'ascii')
    monkeypatch.setattr(sys, 'stdout', stream)
    folder = tmp_path / 'né\udcff'
    assert script('train_img_model_xent', *TRAIN, '--save-dir', folder) == 0
    assert rb'n\xe9\udcff' in stream.buffer.getvalue()


# In processes of their own, where Python writes once more at its exit


def finished(command, stdout, stderr=subprocess.PIPE):
    """Exit status, and what it wrote to stderr; `stdout` and `stderr` may be files, which are closed here."""
    run = subprocess.run(
        [sys.executable, *map(str, command)], stdout=stdout, stderr=stderr, cwd=ROOT, env=BUFFERED,
        timeout=HANG, text=True,
    )  # fmt: skip
    return run.returncode, run.stderr


def train(folder, data_dir, *options, via='tiny.py'):
    shared = [*TINY, *TRAIN, '--pretrained', 'none', '--train-batch', 8, '--data-dir', data_dir, '--save-dir', folder]
    if via == 'two_gpus.py':
        shared.remove('--use-cpu')
    return [ROOT / 'tests' / via, ROOT / 'train_img_model_xent.py', *shared, *options]


def test_a_terminal_that_is_closed_in_the_middle(data_dir, tmp_path):
    """The progress bar on it too."""
    terminal, ours = pty.openpty()
    fcntl.ioctl(ours, termios.TIOCSWINSZ, struct.pack('4H', 24, 80, 0, 0))
    command = [sys.executable, *map(str, train(tmp_path, data_dir))]
    run = subprocess.Popen(
        command, stdin=ours, stdout=ours, stderr=ours, env={**BUFFERED, 'ACT': 'stop 2 0'}, start_new_session=True
    )
    os.close(ours)
    try:
        _, status = os.waitpid(run.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status)
        os.set_blocking(terminal, False)
        shown = b''
        with contextlib.suppress(BlockingIOError):
            while True:
                shown += os.read(terminal, 1 << 16)
        assert b'Epoch 1/1: ' in shown
        os.close(terminal)
        os.kill(run.pid, signal.SIGCONT)
        assert run.wait(HANG) == 2
    finally:
        run.kill()
    log = (tmp_path / 'log_train.txt').read_text()
    assert log.count(f'error: stdout cannot be written: {os.strerror(errno.EIO)}') == 1 and 'Finished' in log


@pytest.mark.parametrize('options', [['--max-restarts', 1, '--use-cpu'], ['--gpu-devices', '0,1']])
def test_processes_that_a_command_starts_continue_and_are_not_restarted(options, data_dir, tmp_path):
    with open('/dev/full', 'w') as full:
        status, err = finished(train(tmp_path, data_dir, *options, via='two_gpus.py'), full)
    line = f'error: stdout cannot be written: {FULL}; the run continues with its log\n'
    assert (status, err) == (2, line)
    log = (tmp_path / 'log_train.txt').read_text()
    assert log.count(line) == log.count('Finished') == 1 and 'restarting' not in log


def test_a_training_that_nobody_listens_to(data_dir, tmp_path):
    """stdin, stdout and stderr were closed at the start: no file that the run opens takes their place."""
    command = [sys.executable, *map(str, train(tmp_path, data_dir, '--workers', 1))]
    run = subprocess.run(
        ['sh', '-c', 'exec "$@" <&- >&- 2>&-', 'sh', *command], env=BUFFERED, capture_output=True, timeout=HANG
    )
    assert run.returncode == 2 and run.stdout == run.stderr == b''
    assert (tmp_path / 'log_train.txt').read_text().count(f'error: stdout cannot be written: {CLOSED}') == 1


@pytest.fixture(scope='module')
def commands(data_dir, tmp_path_factory):
    """A command line of each program that prints its results."""
    folder = tmp_path_factory.mktemp('features')
    for subset in ('query', 'gallery'):
        (folder / subset).mkdir()
        np.save(folder / subset / 'features.npy', np.random.default_rng(0).random((4, 8), np.float32))
        np.save(folder / subset / 'pids.npy', np.arange(4))
        np.save(folder / subset / 'camids.npy', np.full(4, len(subset)))
    return {
        'ranking': ['ranking.py', folder / 'query', folder / 'gallery'],
        'data_manager': ['data_manager.py', '--data-dir', data_dir, '-j', 1],
        'report': ['report.py', '-h'],
        'train': ['train_img_model_xent.py', '-h'],
    }


@pytest.mark.parametrize('name', ['ranking', 'data_manager', 'report', 'train'])
def test_a_command_without_a_reader_ends_in_one_line(name, commands):
    with pipe_without_a_reader() as writer:
        assert finished(commands[name], writer) == (2, f'error: stdout cannot be written: {GONE}\n')


@pytest.mark.parametrize(
    ('end', 'status', 'err'),
    [
        ('raise UserError("a mistake")', 2, 'error: a mistake\n'),
        ('refuse("a mistake")', 2, 'error: a mistake\n'),
        ('raise KeyboardInterrupt', 130, ''),
        ('raise MemoryError', 2, 'error: the memory of the host ran out (no details are known)\n'),
        ('return 1', 2, f'error: stdout cannot be written: {FULL}\n'),  # its results are lost
    ],
)
def test_a_command_that_fails_leaves_nothing_that_python_writes_at_its_exit(end, status, err):
    """Which would fail again, with two more lines and status 120."""
    program = f"""
from runtime.commands import refuse, run
from runtime.errors import UserError

def main():
    print('a result')
    {end}

run(main)
"""
    with open('/dev/full', 'w') as full:
        assert finished(['-c', program], full) == (status, err)


def test_a_command_without_a_reader_of_its_errors(commands):
    with pipe_without_a_reader() as writer:
        assert finished(commands['ranking'], writer, stderr=subprocess.STDOUT) == (2, None)
        assert finished(['ranking.py'], subprocess.DEVNULL, stderr=writer) == (2, None)
