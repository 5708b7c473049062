"""A run that is stopped or killed, or fails, resumes to exactly the weights of an uninterrupted run."""

import csv
import errno
import itertools
import json
import multiprocessing
import os
import platform
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from conftest import ENV, HANG, ROOT, SCRIPTS, TINY
from torch.distributed.launcher.api import LaunchConfig

from runtime import checkpoint


def weights_of(path):
    found = torch.load(path, weights_only=True)
    return {**found['state_dict'], **found['state'].get('criterion_cent', {})}


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def saved(path):
    """How an error ends."""
    return f'saved {path}, from which --auto-resume continues'


def names(folder):
    return sorted(path.name for path in folder.glob('*.pth.tar'))


@pytest.fixture
def at_batch(monkeypatch):
    """`tiny.at_batch`, until the end of the test."""
    monkeypatch.setattr(tiny.Tiny, 'forward', tiny.Tiny.forward)
    return tiny.at_batch


@pytest.fixture(scope='module')
def started():
    """Start a script in one or two separate processes, with an `ACT` of tiny.py; they are ended after the test."""
    runs = []

    def start(name, *options, processes=1, act='', stdout=subprocess.PIPE):
        via = 'tiny.py' if processes == 1 else 'two_gpus.py'
        options = [*TINY, '--pretrained', 'none', '--train-batch', 8, *options]
        if processes == 2:
            options.remove('--use-cpu')
            options += ['--gpu-devices', '0,1']
        command = [sys.executable, ROOT / 'tests' / via, ROOT / f'{name}.py', *options]
        runs.append(
            subprocess.Popen(
                [*map(str, command)], env={**ENV, 'ACT': act}, text=True, stdout=stdout, stderr=subprocess.PIPE,
                start_new_session=True,
            )
        )  # fmt: skip
        return runs[-1]

    yield start
    for run in runs:
        if run.poll() is None:
            os.killpg(run.pid, signal.SIGKILL)
        run.communicate()


def end_of(run):
    """Exit status, and what was printed to stdout and stderr."""
    out, err = run.communicate(timeout=HANG)
    return run.returncode, out, err


def wait_for_stop(run):
    """Wait until `run` has stopped itself."""
    _, status = os.waitpid(run.pid, os.WUNTRACED)
    assert os.WIFSTOPPED(status), run.stderr.read()


@pytest.mark.parametrize('workers', [0, 2])
@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize('name', ['train_img_model_xent_htri', 'train_img_model_strong', 'train_vid_model_xent'])
def test_a_signal_in_the_middle_of_an_epoch(name, number, workers, script, at_batch, tmp_path, capsys):
    whole, parted = tmp_path / 'whole', tmp_path / 'parted'
    options = ['--max-epoch', 3, '--print-freq', 1, '--workers', workers]
    assert script(name, *options, '--save-dir', whole) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith('Batch')]
    batches = len(lines) // 3
    assert batches >= 2
    at_batch(batches + 1, lambda: os.kill(os.getpid(), number))
    assert script(name, *options, '--save-dir', parted) == 128 + number
    out = capsys.readouterr().out
    assert names(parted) == ['resume_2_1.pth.tar']
    assert (
        f'Stopped by {number.name} after saving {parted}/resume_2_1.pth.tar. Continue with:\npython {name}.py ' in out
    )
    assert re.search(r'--save-dir \S+parted --auto-resume\n', out)
    assert script(name, *options, '--save-dir', parted, '--auto-resume') == 0
    out += capsys.readouterr().out
    assert 'Continuing in epoch 2 after batch 1' in out
    assert len([line for line in out.splitlines() if line.startswith('Batch')]) == len(lines) - 1  # that of the signal
    assert (parted / 'log_train.txt').read_text() == out
    assert equal(weights_of(parted / 'checkpoint_ep3.pth.tar'), weights_of(whole / 'checkpoint_ep3.pth.tar'))


def test_a_signal_before_the_first_step_or_in_an_evaluation_ends_at_once(script, monkeypatch, tmp_path, capsys):
    import data_manager

    monkeypatch.setattr(data_manager, 'init_dataset', lambda *_, **__: os.kill(os.getpid(), signal.SIGINT))
    assert script('train_img_model_xent', '--save-dir', tmp_path) == 130
    assert script('train_img_model_xent', '--save-dir', tmp_path, '--evaluate') == 130
    assert capsys.readouterr().out.count('Stopped by SIGINT\n') == 2
    assert names(tmp_path) == []


@pytest.mark.parametrize('name', ['train_img_model_xent', 'train_img_model_xent_htri'])
def test_metrics_csv_knows_every_batch_of_a_run_that_was_stopped(name, script, at_batch, tmp_path, capsys):
    """Its rows are means since the previous row, so the last batch of each row shows which batches it covers."""
    options = ['--max-epoch', 2, '--print-freq', 100, '--save-dir', tmp_path]
    at_batch(2, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert script(name, *options) == 143
    assert script(name, *options, '--auto-resume') == 0
    with open(tmp_path / 'metrics.csv', newline='') as file:
        places = [(row['epoch'], row['batch']) for row in csv.DictReader(file) if row['batch']]
    last = max(batch for _, batch in places)
    assert places == [('1', '2'), *([('1', last)] if last > '2' else []), ('2', last)]


KILLED = 'a process that decodes images was killed by SIGKILL, probably because memory ran out: use fewer --workers'


def test_a_training_whose_worker_is_killed_ends_and_continues(script, at_batch, tmp_path, capsys):
    whole, parted = tmp_path / 'whole', tmp_path / 'parted'
    options = ['--max-epoch', 1, '--workers', 2, '--train-batch', 2]  # more batches than the workers hold
    assert script('train_img_model_xent', *options, '--save-dir', whole) == 0
    at_batch(2, tiny.kill_worker)
    assert script('train_img_model_xent', *options, '--save-dir', parted) == 1
    (position,) = names(parted)
    assert capsys.readouterr().err == f'error: {KILLED}; {saved(parted / position)}\n'
    assert script('train_img_model_xent', *options, '--save-dir', parted, '--auto-resume') == 0
    assert 'Continuing ' in capsys.readouterr().out
    assert equal(*(weights_of(folder / 'checkpoint_ep1.pth.tar') for folder in (whole, parted)))


@pytest.mark.parametrize('workers', [0, 1])
def test_a_training_continues_when_its_images_are_mended(workers, script, at_batch, data_dir, tmp_path, capsys):
    whole, parted = tmp_path / 'whole', tmp_path / 'parted'
    shutil.copytree(data_dir / 'market1501', tmp_path / 'market1501')
    contents = {path: path.read_bytes() for path in (tmp_path / 'market1501' / 'bounding_box_train').iterdir()}

    def spoil():
        for path, content in contents.items():
            path.write_bytes(content[:100])

    options = ['--max-epoch', 1, '--workers', workers, '--train-batch', 2, '--data-dir', tmp_path]
    assert script('train_img_model_xent', *options, '--save-dir', whole) == 0
    at_batch(5, spoil)
    assert script('train_img_model_xent', *options, '--save-dir', parted) == 2
    (position,) = names(parted)
    batch = re.fullmatch(r'resume_1_(\d+)\.pth\.tar', position)[1]
    assert int(batch) >= 5  # workers have decoded a few more
    err = capsys.readouterr().err
    assert re.fullmatch(rf'error: cannot read the image \S+\.jpg: .*; {saved(parted / position)}\n', err), err
    for path, content in contents.items():
        path.write_bytes(content)
    assert script('train_img_model_xent', *options, '--save-dir', parted, '--auto-resume') == 0
    assert f'Continuing in epoch 1 after batch {batch}' in capsys.readouterr().out
    assert equal(*(weights_of(folder / 'checkpoint_ep1.pth.tar') for folder in (whole, parted)))
    with open(parted / 'metrics.csv', newline='') as file:
        assert batch in [row['batch'] for row in csv.DictReader(file)]


def test_a_fault_in_the_middle_of_a_step_saves_nothing(script, at_batch, tmp_path, capsys):
    """BatchNorm has seen the batch: a run that continued from there would differ from one without the fault."""
    at_batch(3, bug)
    assert script('train_img_model_xent', '--max-epoch', 1, '--save-dir', tmp_path) == 1
    assert capsys.readouterr().err.endswith('ValueError: a bug\n') and names(tmp_path) == []


def bug(*_):
    raise ValueError('a bug')


def out_of_memory(*_):
    raise torch.OutOfMemoryError('CUDA out of memory')


def stopped(*_):
    os.kill(os.getpid(), signal.SIGTERM)


def all_killed(*_):
    for worker in multiprocessing.active_children():
        os.kill(worker.pid, signal.SIGKILL)


def not_finite(features):
    features.fill_(torch.nan)


FAILURES = {  # of a test: what happens when it has the first features, options, exit status and message
    'a bug': (bug, [], 1, r'ValueError: a bug\n'),
    'memory': (out_of_memory, [], 2, r'error: the memory of the GPU ran out .*; try a smaller --test-batch or .*; '),
    'a signal': (stopped, [], 143, 'Stopped by SIGTERM; '),
    'a killed worker': (all_killed, ['--workers', 1, '--test-batch', 1], 1, 'error: a process that decodes .*; '),
    'infinite features': (not_finite, [], 2, r'error: (\d+) of \1 query features are not finite .*; '),
}


@pytest.fixture
def at_test(monkeypatch):
    """Do something to the first features (b, D) that a test extracts, once."""

    def plan(act):
        def forward(model, x, whole=tiny.Tiny.forward):
            features = whole(model, x)
            if not model.training:
                monkeypatch.setattr(tiny.Tiny, 'forward', whole)
                act(features)
            return features

        monkeypatch.setattr(tiny.Tiny, 'forward', forward)

    return plan


@pytest.fixture(scope='session')
def untouched(tmp_path_factory):
    """The folders of uninterrupted runs, by script."""
    return tmp_path_factory.mktemp('untouched')


TWICE = ['--max-epoch', 2, '--stepsize', 1, '--eval-step', 1, '--print-freq', 1]


def twice(name):
    """TWICE for any script."""
    return [*TWICE[:2], '--decays', 1, *TWICE[4:]] if name == 'train_img_model_strong' else TWICE


def assert_it_continues_with_the_test(name, options, folder, untouched, script, capsys):
    """After a failure in the first test, a run resumes to exactly the weights, state and figures of one without."""
    whole = untouched / name
    if not whole.exists():
        assert script(name, *twice(name), '--save-dir', whole) == 0
    capsys.readouterr()
    assert script(name, *twice(name), *options, '--save-dir', folder, '--auto-resume') == 0
    out = capsys.readouterr().out
    assert '==> Epoch 1/2\n==> Test\n' in out and out.count('==> Test') == 2 and out.count('==> Epoch') == 2
    for epoch in (1, 2):
        files = [path / f'checkpoint_ep{epoch}.pth.tar' for path in (whole, folder)]
        assert equal(*map(weights_of, files))
        one, other = (torch.load(path, weights_only=True) for path in files)
        assert one['state']['scheduler'] == other['state']['scheduler']
        assert (one['rank1'], one['best_rank1']) == (other['rank1'], other['best_rank1'])
    tables = [csv.DictReader((path / 'metrics.csv').read_text().splitlines()) for path in (whole, folder)]
    rows = [[{**row, 'images_per_s': '', 'data_wait': ''} for row in table] for table in tables]
    assert rows[0] == rows[1]


def assert_failed_with(message, status, folder, capsys):
    """The message names the one position, which has all steps of the first epoch, and how to continue from it."""
    out, err = capsys.readouterr()
    (position,) = names(folder)
    assert re.fullmatch(r'resume_1_\d+\.pth\.tar', position)
    note = f'{saved(folder / position)}\n'
    report = out if status == 143 else err
    assert re.search(f'{message}{re.escape(note)}$', report), report
    assert status != 2 or err.count('\n') == 1
    assert (folder / 'log_train.txt').read_text().endswith(note)


@pytest.mark.parametrize('failure', FAILURES)
def test_a_test_that_fails_costs_no_training(failure, script, at_test, untouched, tmp_path, capsys):
    act, options, status, message = FAILURES[failure]
    at_test(act)
    assert script('train_img_model_xent', *TWICE, *options, '--save-dir', tmp_path) == status
    assert_failed_with(message, status, tmp_path, capsys)
    assert_it_continues_with_the_test('train_img_model_xent', options, tmp_path, untouched, script, capsys)


@pytest.mark.parametrize('name', SCRIPTS)
def test_each_script_continues_with_the_test_that_failed(name, script, at_test, untouched, tmp_path, capsys):
    at_test(bug)
    assert script(name, *twice(name), '--save-dir', tmp_path) == 1
    assert_failed_with(r'ValueError: a bug\n', 1, tmp_path, capsys)
    assert_it_continues_with_the_test(name, [], tmp_path, untouched, script, capsys)


def test_a_test_continues_when_the_image_is_mended(script, untouched, data_dir, tmp_path, capsys):
    """It fails again, with the same message, until the image is restored."""
    folder = tmp_path / 'log'
    shutil.copytree(data_dir / 'market1501', tmp_path / 'market1501')
    image = min((tmp_path / 'market1501' / 'bounding_box_test').glob('0*'))
    content = image.read_bytes()
    image.write_bytes(content[:100])
    data = ['--data-dir', tmp_path]
    for again in ([], ['--auto-resume']):
        assert script('train_img_model_xent', *TWICE, *data, *again, '--save-dir', folder) == 2
        assert_failed_with(rf'error: cannot read the image {image}: .*; ', 2, folder, capsys)
    image.write_bytes(content)
    assert_it_continues_with_the_test('train_img_model_xent', data, folder, untouched, script, capsys)


def test_the_position_of_another_folder_is_named_too(script, at_test, tmp_path, capsys):
    """A run with --auto-resume would find it again."""
    at_test(bug)
    assert script('train_img_model_xent', *TWICE, '--save-dir', tmp_path / 'a') == 1
    (position,) = (tmp_path / 'a').glob('*.pth.tar')
    again = [*TWICE, '--resume', position, '--save-dir', tmp_path / 'b']
    at_test(bug)
    assert script('train_img_model_xent', *again) == 1
    assert capsys.readouterr().err.endswith(f'\n{saved(position)}\n')
    assert script('train_img_model_xent', *again, '--auto-resume') == 0
    assert capsys.readouterr().out.count('==> Test') == 2


def test_nothing_is_promised_where_nothing_was_saved(script, at_test, monkeypatch, tmp_path, capsys):
    """The disk was full, or there is nothing to save in an evaluation."""

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, 'save_checkpoint', full)
        at_test(bug)
        assert script('train_img_model_xent', *TWICE, '--save-dir', tmp_path) == 1
    assert script('train_img_model_xent', *TWICE, '--save-dir', tmp_path) == 0
    at_test(bug)
    evaluate = ['--evaluate', '--resume', tmp_path / 'best_model.pth.tar', '--save-dir', tmp_path]
    before = names(tmp_path)
    assert script('train_img_model_xent', *evaluate) == 1
    found = capsys.readouterr()
    assert found.err.count('ValueError: a bug\n') == 2
    assert '--auto-resume' not in found.out + found.err and names(tmp_path) == before


def test_an_evaluation_whose_worker_is_killed_ends(script, at_test, tmp_path, capsys):
    train = ['--max-epoch', 1, '--save-dir', tmp_path]
    assert script('train_img_model_xent', *train) == 0
    before = {path: path.read_bytes() for path in tmp_path.glob('*.pth.tar')}
    at_test(all_killed)
    evaluate = ['--evaluate', '--resume', tmp_path / 'checkpoint_ep1.pth.tar', '--test-batch', 1, '--workers', 2]
    assert script('train_img_model_xent', *evaluate, '--save-dir', tmp_path) == 1
    assert capsys.readouterr().err == f'error: {KILLED}\n'
    assert {path: path.read_bytes() for path in tmp_path.glob('*.pth.tar')} == before


def test_workers_that_cannot_be_started(script, tmp_path, monkeypatch, capsys):
    """Starting the third process fails, as with limited memory or processes; the others end too."""
    start, count = multiprocessing.process.BaseProcess.start, itertools.count()

    def refuse(process):
        if next(count) == 2:
            raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        start(process)

    monkeypatch.setattr(multiprocessing.process.BaseProcess, 'start', refuse)
    assert script('train_img_model_xent', '--workers', 3, '--save-dir', tmp_path) == 2
    assert capsys.readouterr().err == (
        'error: 3 processes that decode images cannot be started (Resource temporarily unavailable): use fewer '
        '--workers, or 0\n'
    )
    assert not multiprocessing.active_children()


def test_a_second_sigint_ends_at_once(script, at_batch, tmp_path):
    def twice():
        signal.raise_signal(signal.SIGINT)  # which returns when it has been handled
        assert tiny.waiting() == signal.SIGINT
        signal.raise_signal(signal.SIGINT)
        raise AssertionError('it continued')

    at_batch(2, twice)
    assert script('train_img_model_xent', '--save-dir', tmp_path) == 130
    assert names(tmp_path) == []


def kill_and_resume(started, data_dir, tmp_path, kills, seed):
    """SIGKILL at random lines of a step, a save or a test; the final weights are those of an uninterrupted run."""
    rng = random.Random(seed)
    epochs = kills + 3  # of three batches
    options = ['--data-dir', data_dir, '--max-epoch', epochs, '--print-freq', 1, '--workers', 1, '--eval-step', 1]
    options += ['--save-minutes', 1e-6, '--auto-resume']  # after each step
    whole = started('train_img_model_xent_htri', *options, '--save-dir', tmp_path / 'whole')
    parted = [*options, '--save-dir', tmp_path / 'parted']
    for _ in range(kills):  # each after two steps at most
        batch, lines = rng.choice((1, 2)), rng.randrange(rng.choice((14_000, 47_000)))  # of a step; of one and a test
        act = f'kill_later {batch} 0 {lines}; kill {batch + 1} 0'
        run = started('train_img_model_xent_htri', *parted, act=act)
        assert run.wait(HANG) == -signal.SIGKILL, run.stderr.read()
    status, out, err = end_of(started('train_img_model_xent_htri', *parted))
    assert status == 0, err
    assert re.search(r'Continuing (in|after) epoch', out)
    status, _, err = end_of(whole)
    assert status == 0, err
    files = [tmp_path / folder / f'checkpoint_ep{epochs}.pth.tar' for folder in ('whole', 'parted')]
    assert equal(*map(weights_of, files))
    assert len(list((tmp_path / 'parted').glob('resume_*'))) == 3


def test_killed_at_three_random_moments(started, data_dir, tmp_path):
    kill_and_resume(started, data_dir, tmp_path, kills=3, seed=0)


@pytest.mark.soak
def test_killed_at_thirty_random_moments(started, data_dir, tmp_path):
    kill_and_resume(started, data_dir, tmp_path, kills=30, seed=1)


TWO_EPOCHS = ['--max-epoch', 2, '--print-freq', 1]


@pytest.fixture(scope='module')
def left_alone(started, data_dir, tmp_path_factory):
    """The folder of an uninterrupted run of two processes."""
    folder = tmp_path_factory.mktemp('left_alone')
    options = [*TWO_EPOCHS, '--data-dir', data_dir, '--save-dir', folder]
    status, _, err = end_of(started('train_img_model_xent_htri', *options, processes=2))
    assert status == 0, err
    return folder


@pytest.mark.parametrize('act', ['ignore 1 1; ask_launcher 4 0', 'ask_launcher 4 0; ask 4 0; ask 4 1'])
def test_two_processes_stop_after_the_same_step(act, started, left_alone, data_dir, tmp_path):
    """The signal may reach only the launcher, perhaps too late for some processes (kill), or every process (srun)."""
    options = [*TWO_EPOCHS, '--data-dir', data_dir, '--save-dir', tmp_path]
    status, out, err = end_of(started('train_img_model_xent_htri', *options, processes=2, act=act))
    assert (status, err) == (143, '')
    (position,) = names(tmp_path)
    assert position == 'resume_2_2.pth.tar'  # all learn of it with the step in which the first one got it
    assert f'Stopped by SIGTERM after saving {tmp_path}/{position}. Continue with:\npython ' in out
    status, _, err = end_of(started('train_img_model_xent_htri', *options, '--auto-resume', processes=2))
    assert status == 0, err
    assert equal(*(weights_of(folder / 'checkpoint_ep2.pth.tar') for folder in (tmp_path, left_alone)))


def test_two_processes_stop_when_their_terminal_is_closed(started, data_dir, tmp_path):
    options = [*TWO_EPOCHS, '--data-dir', data_dir, '--save-dir', tmp_path, '--max-restarts', 1]
    act = f'ask_launcher 4 0 {signal.SIGHUP:d}'
    status, out, err = end_of(started('train_img_model_xent_htri', *options, processes=2, act=act))
    assert (status, err) == (129, '') and 'restarting' not in out
    assert f'Stopped by SIGHUP after saving {tmp_path}/resume_2_2.pth.tar. Continue with:' in out


def test_two_processes_that_are_quit_are_not_restarted(started, data_dir, tmp_path):
    options = [*TWO_EPOCHS, '--data-dir', data_dir, '--save-dir', tmp_path, '--max-restarts', 1]
    act = f'ask_launcher 4 0 {signal.SIGQUIT:d}'
    status, out, _ = end_of(started('train_img_model_xent_htri', *options, processes=2, act=act))
    assert status == 128 + signal.SIGQUIT and 'restarting' not in out


@pytest.mark.skipif(not hasattr(LaunchConfig, 'signals_to_handle'), reason='this launcher always heeds SIGHUP')
def test_two_processes_that_ignore_the_end_of_their_terminal(started, data_dir, tmp_path):
    """As under nohup."""
    options = ['--max-epoch', 1, '--data-dir', data_dir, '--save-dir', tmp_path]
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        run = started('train_img_model_xent', *options, processes=2, act='hang_up 2 0')
    finally:
        signal.signal(signal.SIGHUP, before)
    assert end_of(run)[::2] == (0, '')


@pytest.mark.parametrize('act', ['kill', 'kill_worker'])
def test_a_killed_process_is_started_again(act, started, data_dir, tmp_path):
    """In the second of two epochs, after which too few of their 24 batches are left for that to happen again."""
    options = ['--data-dir', data_dir, '--max-epoch', 2, '--train-batch', 2, '--save-minutes', 1e-6, '--workers', 2]
    options += ['--max-restarts', 1]
    run = started('train_img_model_xent', *options, '--save-dir', tmp_path, act=f'{act} 16 0')
    status, out, err = end_of(run)
    assert status == 0 and re.fullmatch('' if act == 'kill' else f'error: {KILLED}; saved .*\n', err)
    assert re.search(r'Continuing (in|after) epoch', out)
    assert 'checkpoint_ep2.pth.tar' in names(tmp_path)


def test_auto_resume_begins_passes_over_damage_and_ends(script, tmp_path, capsys):
    options = ['--max-epoch', 2, '--eval-step', 1, '--save-dir', tmp_path, '--auto-resume']
    assert script('train_img_model_xent', *options) == 0
    assert f'No checkpoint in {tmp_path}: starting from the beginning' in capsys.readouterr().out
    ends = weights_of(tmp_path / 'checkpoint_ep2.pth.tar')
    assert script('train_img_model_xent', *options) == 0  # all is done: a job that is queued again ends well
    assert 'all 2 epochs of --max-epoch are finished' in capsys.readouterr().out
    newest = tmp_path / 'checkpoint_ep2.pth.tar'
    newest.write_bytes(newest.read_bytes()[:-2000])
    assert script('train_img_model_xent', *options) == 0
    out = capsys.readouterr().out
    assert f'Skipped: {newest} is damaged' in out
    assert re.search(r'resume_2_\d\.pth\.tar', out) and out.count('==> Test') == 1
    assert equal(weights_of(newest), ends)


def test_weights_that_are_not_finite_are_no_position(script, tmp_path, monkeypatch, capsys):
    """A loss can be finite where its gradients are not."""

    hook = torch.nn.Module.__call__

    def spoilt(self, *args):
        out = hook(self, *args)
        if isinstance(self, tiny.Tiny) and self.training:
            out.register_hook(lambda gradient: gradient * float('nan'))
        return out

    monkeypatch.setattr(torch.nn.Module, '__call__', spoilt)
    assert script('train_img_model_xent', '--max-epoch', 1, '--save-minutes', 1e-9, '--save-dir', tmp_path) == 2
    assert 'not finite' in capsys.readouterr().err
    assert names(tmp_path) == []


def test_what_a_killed_save_left_is_removed(script, tmp_path):
    left = tmp_path / '.resume_1_1.pth.tar.12345'
    left.write_bytes(b'half')
    assert script('train_img_model_xent', '--max-epoch', 1, '--save-dir', tmp_path) == 0
    assert not left.exists()


def test_weights_only_with_overwrite_spares_the_file_it_begins_with(script, tmp_path, capsys):
    assert script('train_img_model_xent', '--max-epoch', 2, '--eval-step', 1, '--save-dir', tmp_path) == 0
    begin = ['--resume-weights-only', '--overwrite', '--max-epoch', 3, '--save-dir', tmp_path, '--resume']
    first = tmp_path / 'checkpoint_ep1.pth.tar'
    assert script('train_img_model_xent', *begin, first) == 2
    assert f'error: {first} is to be the start of a new run, which would replace it: rename' in capsys.readouterr().err
    assert script('train_img_model_xent', *begin, first.rename(tmp_path / 'checkpoint_first.pth.tar')) == 0
    found = [name for name in names(tmp_path) if name.startswith('check')]
    assert found == ['checkpoint_ep3.pth.tar', 'checkpoint_first.pth.tar']


def test_positions_are_kept_by_number(script, tmp_path):
    options = ['--max-epoch', 4, '--save-dir', tmp_path, '--save-minutes', 1e-9, '--keep', 2]
    assert script('train_img_model_xent', *options) == 0
    found = names(tmp_path)
    assert [name for name in found if name.startswith('resume')] == ['resume_4_2.pth.tar', 'resume_4_3.pth.tar']
    assert 'checkpoint_ep4.pth.tar' in found


def test_a_run_that_is_killed_while_it_replaces_the_best_loses_nothing(script, monkeypatch, tmp_path):
    """It ends after the first of two names was replaced; resumed, it repeats the test and has both."""

    class Killed(BaseException):
        pass

    def replace(path, target):
        nonlocal dead
        if dead:
            raise Killed
        moved = whole(path, target)
        dead = Path(target).name.startswith(('best', 'checkpoint'))
        if dead:
            raise Killed
        return moved

    whole, dead, best = Path.replace, False, tmp_path / 'best_model.pth.tar'
    options = ['--max-epoch', 1, '--save-dir', tmp_path]
    with monkeypatch.context() as patch:
        patch.setattr(Path, 'replace', replace)
        with pytest.raises(Killed):
            script('train_img_model_xent', *options)
    assert script('train_img_model_xent', *options, '--auto-resume') == 0
    assert weights_of(best)
    assert best.samefile(tmp_path / 'checkpoint_ep1.pth.tar')


@pytest.mark.parametrize('name', ['resume_1_2', 'checkpoint_ep1'])
def test_a_file_that_the_command_names_is_there_when_it_is_restarted(name, script, tmp_path):
    """The newest ones alone are kept, but the same command has to work again."""
    options = ['--eval-step', 1, '--save-minutes', 1e-9, '--keep', 1, '--keep-tests', 1, '--save-dir', tmp_path]
    assert script('train_img_model_xent', *options, '--max-epoch', 1, '--keep', 9) == 0
    options += ['--resume', tmp_path / f'{name}.pth.tar', '--max-epoch', 3]
    assert script('train_img_model_xent', *options) == 0
    expected = sorted({'best_model.pth.tar', 'checkpoint_ep3.pth.tar', f'{name}.pth.tar', 'resume_3_3.pth.tar'})
    assert [found for found in names(tmp_path) if found.endswith('.pth.tar')] == expected
    assert script('train_img_model_xent', *options, '--auto-resume') == 0  # as it is restarted


def test_a_disk_that_fails_ends_no_training(script, at_batch, tmp_path, capsys):
    """From the second epoch on, files larger than 10 kB cannot be written."""
    options = ['--max-epoch', 3, '--eval-step', 1, '--save-dir', tmp_path]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    at_batch(4, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard)))
    try:
        assert script('train_img_model_xent', *options) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    found = capsys.readouterr()
    assert f'error: {tmp_path}/checkpoint_ep2.pth.tar: File too large; the old file is untouched' in found.out
    # Of each of two epochs: the position, the checkpoint, and results.csv.
    assert re.fullmatch(rf'error: 6 files could not be written, the first was {tmp_path}/resume_2_3.*\n', found.err)
    assert found.out.count('==> Test') == 3
    assert not [path for path in tmp_path.iterdir() if path.name.startswith('.check')]
    assert names(tmp_path)[:2] == ['best_model.pth.tar', 'checkpoint_ep1.pth.tar']
    weights_of(tmp_path / 'checkpoint_ep1.pth.tar')


@pytest.mark.parametrize(('total', 'status'), [(10**9, 2), (0, 0)])  # some network file systems report zeros
@pytest.mark.parametrize('more', [[], ['--overwrite']])
def test_a_disk_without_room_begins_no_training(total, status, more, script, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(shutil, 'disk_usage', lambda _: SimpleNamespace(total=total, free=0))
    assert script('train_img_model_xent', '--max-epoch', 1, '--save-dir', tmp_path, *more) == status
    out, err = capsys.readouterr()
    if status:
        assert err.startswith(f'error: --save-dir {tmp_path}: 0.0 MB are free on its disk, but the weights alone take')
        assert err.count('\n') == 1 and '==> Epoch' not in out


def test_a_folder_that_goes_ends_no_training(script, at_batch, tmp_path, capsys):
    folder = tmp_path / 'log'

    def replace():
        folder.rename(tmp_path / 'moved')
        folder.touch()  # a file as parent

    at_batch(4, replace)
    assert script('train_img_model_xent', '--max-epoch', 3, '--eval-step', 1, '--save-dir', folder) == 2
    assert 'could not be written' in capsys.readouterr().err
    assert 'checkpoint_ep1.pth.tar' in names(tmp_path / 'moved')


def test_a_full_disk(script, small_disk, capsys):
    options = ['--max-epoch', 9, '--eval-step', 1, '--save-dir', small_disk, '--workers', 1]
    assert script('train_img_model_xent', *options) == 2
    assert 'No space left on device; the old file is untouched' in capsys.readouterr().out
    for path in small_disk.glob('*.pth.tar'):
        weights_of(path)
    assert not list(small_disk.glob('.*.pth.tar*'))


def test_two_trainings_in_one_folder(script, started, data_dir, tmp_path, capsys):
    options = ['--data-dir', data_dir, '--max-epoch', 2, '--eval-step', 1]
    run = started('train_img_model_xent', *options, '--save-dir', tmp_path, act='stop 4 0')  # in its second epoch
    wait_for_stop(run)
    log = (tmp_path / 'log_train.txt').read_text()
    for more in (['--overwrite'], ['--auto-resume']):
        assert script('train_img_model_xent', '--save-dir', tmp_path, *more) == 2
        assert capsys.readouterr().err == (
            f'error: --save-dir {tmp_path}: another training run is writing there (process {run.pid} on '
            f'{platform.node()}); choose another folder\n'
        )
    assert (tmp_path / 'log_train.txt').read_text().startswith(log)
    evaluate = ['--evaluate', '--resume', tmp_path / 'checkpoint_ep1.pth.tar', '--save-dir', tmp_path]
    assert script('train_img_model_xent', *evaluate) == 0
    run.kill()
    run.wait()
    assert script('train_img_model_xent', '--save-dir', tmp_path, '--overwrite', '--max-epoch', 1) == 0


def test_provenance_is_in_every_checkpoint_and_in_the_results(script, tmp_path):
    assert script('train_img_model_xent', '--max-epoch', 1, '--save-minutes', 1e-9, '--save-dir', tmp_path) == 0
    results = json.loads((tmp_path / 'results.json').read_text())
    keys = {'seed', 'device', 'processes', 'versions', 'revision', 'command', 'dataset_fingerprint'}
    assert len(names(tmp_path)) >= 3
    for name in names(tmp_path):
        found = torch.load(tmp_path / name, weights_only=True)['provenance']
        assert found == {key: results[key] for key in keys}
    assert found['seed'] == 1 and found['device'] == 'CPU' and found['versions']['torch'] == torch.__version__
    assert found['command'][0] == 'train_img_model_xent.py' and len(found['dataset_fingerprint']) == 16
    head = subprocess.run(['git', '-C', ROOT, 'rev-parse', 'HEAD'], capture_output=True, text=True).stdout.strip()
    assert (found['revision'] or '').rstrip('+') == head


def test_deterministic(script, tmp_path):
    ends = []
    for folder in (tmp_path / 'a', tmp_path / 'b'):
        try:
            assert script('train_img_model_xent_htri', '--deterministic', '--max-epoch', 1, '--save-dir', folder) == 0
            assert torch.are_deterministic_algorithms_enabled()
        finally:
            torch.use_deterministic_algorithms(False)
        ends.append(weights_of(folder / 'checkpoint_ep1.pth.tar'))
    assert equal(*ends)


@pytest.mark.soak
@pytest.mark.parametrize('workers', [0, 2])
def test_memory_and_open_files_stay_as_they_are(workers, started, data_dir, tmp_path, capsys):
    """Between batch 61 and batch 901, with a test every 30 batches; workers counted in."""
    options = ['--data-dir', data_dir, '--max-epoch', 301, '--eval-step', 10, '--workers', workers]
    options += ['--save-dir', tmp_path]
    act = 'stop 61 0; stop 901 0'
    run = started('train_img_model_xent_htri', *options, act=act, stdout=subprocess.DEVNULL)

    def look():
        children = subprocess.run(['pgrep', '-P', str(run.pid)], capture_output=True, text=True).stdout.split()
        status = [Path(f'/proc/{pid}/status').read_text() for pid in (run.pid, *children)]
        memory = sum(int(re.search(r'VmRSS:\s+(\d+)', text)[1]) for text in status)  # kB
        return memory, len(os.listdir(f'/proc/{run.pid}/fd'))

    wait_for_stop(run)
    memory, number = look()
    os.kill(run.pid, signal.SIGCONT)
    wait_for_stop(run)
    later, number_later = look()
    os.kill(run.pid, signal.SIGCONT)
    assert end_of(run)[::2] == (0, '')
    with capsys.disabled():
        print(
            f'\n{workers} workers: {memory / 1024:.0f} -> {later / 1024:.0f} MB, {number} -> {number_later} files open'
        )
    assert later <= 1.05 * memory
    assert number_later <= number
