import io
import os
import signal
import sys

import pytest
import torch.distributed as dist

from arguments import Arguments, RunOptions
from runtime import launch
from runtime.errors import ProcessLost, UserError
from runtime.processes import Group, Processes
from runtime.signals import Signals
from utils import Logger


class Parser:
    """A parser of no options, for `launch.main`."""

    def __init__(self, save_dir, **options):
        self.args = Arguments(save_dir=str(save_dir), evaluate=False, run=RunOptions(use_cpu=True, **options))

    def parse_args(self):
        return self.args


def ended(experiment, save_dir, capsys):
    """Exit status of a run, and what it wrote to stdout and stderr."""
    with pytest.raises(SystemExit) as end:
        launch.main(experiment, Parser(save_dir))
    return end.value.code, *capsys.readouterr()


def test_main_logs_what_is_printed(tmp_path, capsys):
    parser = Parser(tmp_path)
    launch.main(lambda args, run: print('hello', args is parser.args, run.world_size), parser)
    out = capsys.readouterr().out
    assert out.startswith(f'==========\nArgs:{parser.args.plain()}\n==========\n')
    assert '\nhello True 1\nFinished. Total elapsed time (h:m:s): 0:' in out
    assert (tmp_path / 'log_train.txt').read_text() == out


@pytest.mark.parametrize(
    ('exception', 'status', 'text'),
    [
        (UserError('what, where, what to do'), 2, 'error: what, where, what to do\n'),
        (ProcessLost('a process was ended'), 1, 'error: a process was ended\n'),
        (ValueError('our fault'), 1, 'Traceback'),
    ],
)
def test_mistakes_are_one_line_and_faults_a_traceback(tmp_path, capsys, exception, status, text):
    def experiment(args, run):
        raise exception

    code, _, err = ended(experiment, tmp_path, capsys)
    assert code == status
    assert err.startswith(text)
    assert (tmp_path / 'log_train.txt').read_text().endswith(err)
    assert sys.stdout is not None and not isinstance(sys.stdout, Logger)


def test_a_path_that_is_no_text_is_reported_and_logged(tmp_path, monkeypatch):
    """As names of files are that another system wrote."""
    stderr = io.TextIOWrapper(io.BytesIO(), 'utf-8', 'backslashreplace')  # as Python opens it
    monkeypatch.setattr(sys, 'stderr', stderr)

    def experiment(args, run):
        run.log.note('a note of x\udcff\n')
        raise UserError('no x\udcff')

    with pytest.raises(SystemExit) as end:
        launch.main(experiment, Parser(tmp_path))
    stderr.flush()
    assert (end.value.code, stderr.buffer.getvalue()) == (2, b'error: no x\\udcff\n')
    assert (tmp_path / 'log_train.txt').read_text().endswith('a note of x\\udcff\nerror: no x\\udcff\n')


SAVED = 'saved log/resume_1_3.pth.tar, from which --auto-resume continues'


@pytest.mark.parametrize(
    ('exception', 'end'),
    [
        (UserError('what, where, what to do'), f'error: what, where, what to do; {SAVED}\n'),
        (ValueError('our fault'), f'\nValueError: our fault\n{SAVED}\n'),
    ],
)
def test_a_run_that_fails_saves_and_says_where(exception, end, tmp_path, capsys):
    def experiment(args, run):
        run.rescue = lambda: 'log/resume_1_3.pth.tar'
        raise exception

    _, _, err = ended(experiment, tmp_path, capsys)
    assert err.endswith(end) and err.count(SAVED) == 1
    assert (tmp_path / 'log_train.txt').read_text().endswith(err)


@pytest.mark.parametrize('rescue', [lambda: None, lambda: 1 / 0])
def test_a_run_that_cannot_be_saved_reports_its_own_fault(rescue, tmp_path, capsys):
    """As when the device has failed, or the disk."""

    def experiment(args, run):
        run.rescue = rescue
        raise UserError('what, where, what to do')

    assert ended(experiment, tmp_path, capsys)[::2] == (2, 'error: what, where, what to do\n')


def test_a_signal_in_a_test_says_where_the_run_was_saved(tmp_path, capsys):
    def experiment(args, run):
        run.rescue = lambda: 'log/resume_1_3.pth.tar'
        signal.raise_signal(signal.SIGTERM)

    status, out, err = ended(experiment, tmp_path, capsys)
    assert (status, err) == (143, '') and out.endswith(f'\nStopped by SIGTERM; {SAVED}\n')


def test_a_second_sigint_does_not_wait_for_a_save(tmp_path, capsys):
    def experiment(args, run):
        run.rescue = lambda: pytest.fail('it was saved')
        run.signals.hold()
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    status, out, err = ended(experiment, tmp_path, capsys)
    assert (status, err) == (130, '') and out.endswith('\nStopped by SIGINT\n')


def test_a_signal_beside_a_fault_changes_nothing(tmp_path, capsys):
    """The run saves what it has, and reports the fault."""

    def rescue():
        signal.raise_signal(signal.SIGTERM)
        return 'log/resume_1_3.pth.tar'

    def experiment(args, run):
        run.rescue = rescue
        raise UserError('what, where, what to do')

    assert ended(experiment, tmp_path, capsys)[::2] == (2, f'error: what, where, what to do; {SAVED}\n')


@pytest.mark.parametrize(('names', 'number'), [('a', '1 file'), ('ab', '2 files')])
def test_files_that_could_not_be_written_are_counted_at_the_end(names, number, tmp_path, capsys):
    def experiment(args, run):
        for name in names:
            with run.unwritten.excuse(tmp_path / name):
                raise OSError(28, 'No space left on device')

    status, out, err = ended(experiment, tmp_path, capsys)
    assert status == 2 and 'Finished.' in out
    assert f'error: {tmp_path}/a: No space left on device; the old file is untouched, and the run continues\n' in out
    assert err == f'error: {number} could not be written, the first was {tmp_path}/a: No space left on device\n'


CLOSED = RuntimeError('[/gloo/transport/tcp/pair.cc:561] Connection closed by peer [127.0.0.1]:5021')


@pytest.fixture
def first(monkeypatch, run):
    """The first of two processes: its run, which must not be saved, group and signals."""
    monkeypatch.setattr(dist, 'is_initialized', lambda: True)
    group = Group(Processes(world_size=2, local_world_size=2, started=True))
    group.store = dist.HashStore()
    run.rescue = lambda: pytest.fail('saved in the middle of a step')
    return run, group, Signals(group.processes)


def when_it_waits(act, monkeypatch):
    """Call `act` when a process begins to wait, which must end that."""
    acts = iter([act])
    monkeypatch.setattr(launch.time, 'sleep', lambda _: next(acts)())


def test_a_process_that_lost_another_waits_for_its_report(first, monkeypatch):
    run, group, signals = first
    when_it_waits(lambda: group.store.set('failed', '2 1'), monkeypatch)
    assert launch._end(CLOSED, run, group, signals) == (2, '')


def test_a_process_that_lost_a_killed_one_is_ended_by_the_launcher(first, monkeypatch):
    """Which may notice seconds later, on a busy machine."""
    run, group, signals = first
    when_it_waits(lambda: os.kill(os.getpid(), signal.SIGTERM), monkeypatch)
    with signals.handled():
        signals.hold()
        assert launch._end(CLOSED, run, group, signals) == (143, '')
    assert not group.has_failed()


def test_a_process_that_hears_nothing_of_the_one_it_lost_reports_that(first, monkeypatch):
    run, group, signals = first
    monkeypatch.setattr(launch.processes, 'REPORT_SECONDS', 0)
    status, text = launch._end(CLOSED, run, group, signals)
    assert status == 1 and text.endswith(f'RuntimeError: {CLOSED}\n')


def test_a_fault_of_its_own_is_reported_at_once(first, monkeypatch):
    run, group, signals = first
    when_it_waits(lambda: pytest.fail('it waits'), monkeypatch)
    run.rescue = None
    assert launch._end(ValueError('x'), run, group, signals) == (1, 'ValueError: x\n')
    group.processes = Processes(rank=1, world_size=2)
    assert launch._end(ValueError('y'), run, group, signals) == (1, '')
