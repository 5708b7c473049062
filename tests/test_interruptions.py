"""A run that is stopped, killed, or whose disk fails goes on to the very weights of one that was not interrupted."""

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
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
import torch
from conftest import ROOT, TINY

from runtime import files, signals

ENV = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': f'{ROOT}{os.pathsep}{ROOT / "tests"}'}


def weights_of(path):
    found = torch.load(path, weights_only=True)
    return {**found['state_dict'], **found['state'].get('criterion_cent', {})}


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def names(folder):
    return sorted(path.name for path in folder.glob('*.pth.tar'))


@pytest.fixture
def at_batch(monkeypatch):
    """Do something while a batch (from 1) of this process's trainings is computed, once."""

    def plan(number, act):
        count = 0

        def forward(model, x, whole=tiny.Tiny.forward):
            nonlocal count
            count += model.training
            if model.training and count == number:
                count = number + 1  # not again for the same batch
                act()
            return whole(model, x)

        monkeypatch.setattr(tiny.Tiny, 'forward', forward)

    return plan


@pytest.fixture
def started():
    """Start a script in a process of its own, or in two; what is left of them is ended with the test."""
    runs = []

    def start(name, *options, processes=1):
        via = 'tiny.py' if processes == 1 else 'two_gpus.py'
        options = [*TINY, '--pretrained', 'none', '--train-batch', 8, *options]
        if processes == 2:
            options.remove('--use-cpu')
            options += ['--gpu-devices', '0,1']
        command = [sys.executable, ROOT / 'tests' / via, ROOT / f'{name}.py', *options]
        runs.append(
            subprocess.Popen(
                [*map(str, command)], env=ENV, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                start_new_session=True,
            )
        )  # fmt: skip
        return runs[-1]

    yield start
    for run in runs:
        if run.poll() is None:
            os.killpg(run.pid, signal.SIGKILL)
        run.communicate()


def wait_for(run, text):
    """Read what `run` prints until a line holds `text`."""
    for line in run.stdout:
        if text in line:
            return
    raise AssertionError(f'{text} was never printed: {run.stderr.read()}')


@pytest.mark.parametrize('workers', [0, 2])
@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize('name', ['train_img_model_xent_htri', 'train_img_model_cent', 'train_vid_model_xent'])
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
    assert f'Stopped by {number.name} after saving {parted}/resume_2_1.pth.tar. Go on with:\npython {name}.py ' in out
    assert re.search(r'--save-dir \S+parted --auto-resume\n', out)
    assert script(name, *options, '--save-dir', parted, '--auto-resume') == 0
    out += capsys.readouterr().out
    assert 'Going on in epoch 2 after batch 1' in out
    assert len([line for line in out.splitlines() if line.startswith('Batch')]) == len(lines) - 1  # that of the signal
    assert (parted / 'log_train.txt').read_text() == out
    assert equal(weights_of(parted / 'checkpoint_ep3.pth.tar'), weights_of(whole / 'checkpoint_ep3.pth.tar'))


def test_a_test_that_a_signal_ended_is_made_up_for(script, tmp_path, monkeypatch, capsys):
    import evaluation

    whole, parted = tmp_path / 'whole', tmp_path / 'parted'
    options = ['--max-epoch', 2, '--stepsize', 1, '--eval-step', 1]
    assert script('train_img_model_xent', *options, '--save-dir', whole) == 0
    extract = evaluation.extract
    monkeypatch.setattr(evaluation, 'extract', lambda *args: os.kill(os.getpid(), signal.SIGTERM))
    assert script('train_img_model_xent', *options, '--save-dir', parted) == 143
    monkeypatch.setattr(evaluation, 'extract', extract)
    (position,) = names(parted)
    assert re.fullmatch(r'resume_1_\d+\.pth\.tar', position)
    capsys.readouterr()
    assert script('train_img_model_xent', *options, '--save-dir', parted, '--auto-resume') == 0
    out = capsys.readouterr().out
    assert out.count('==> Test') == 2 and out.count('==> Epoch') == 2
    for epoch in (1, 2):
        one, other = (folder / f'checkpoint_ep{epoch}.pth.tar' for folder in (whole, parted))
        assert equal(weights_of(one), weights_of(other))
        states = [torch.load(path, weights_only=True)['state']['scheduler'] for path in (one, other)]
        assert states[0] == states[1]


def test_a_signal_before_the_first_step_or_in_an_evaluation_ends_at_once(script, monkeypatch, tmp_path, capsys):
    import data_manager

    monkeypatch.setattr(data_manager, 'init_dataset', lambda *_: os.kill(os.getpid(), signal.SIGINT))
    assert script('train_img_model_xent', '--save-dir', tmp_path) == 130
    assert script('train_img_model_xent', '--save-dir', tmp_path, '--evaluate') == 130
    assert capsys.readouterr().out.count('Stopped by SIGINT\n') == 2
    assert names(tmp_path) == []


@pytest.mark.parametrize('name', ['train_img_model_xent', 'train_img_model_xent_htri'])
def test_metrics_csv_knows_every_batch_of_a_run_that_was_stopped(name, script, at_batch, tmp_path, capsys):
    """Its rows are means since the row before, so the last batch of each row tells which ones it covers."""
    options = ['--max-epoch', 2, '--print-freq', 100, '--save-dir', tmp_path]
    at_batch(2, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert script(name, *options) == 143
    assert script(name, *options, '--auto-resume') == 0
    with open(tmp_path / 'metrics.csv', newline='') as file:
        places = [(row['epoch'], row['batch']) for row in csv.DictReader(file) if row['batch']]
    last = max(batch for _, batch in places)
    assert places == [('1', '2'), *([('1', last)] if last > '2' else []), ('2', last)]


def workers():
    return multiprocessing.active_children()


def limited():
    """Workers whose shared memory, being files, is refused."""
    for worker in workers():
        resource.prlimit(worker.pid, resource.RLIMIT_FSIZE, (100, 100))


def killed():
    os.kill(workers()[0].pid, signal.SIGKILL)


KILLED = 'a process that decodes images was ended by SIGKILL, as happens when memory runs out: use fewer --workers\n'
REFUSED = 'a process that decodes images cannot hand them over (unable to resize file '


@pytest.mark.parametrize(('act', 'status', 'message'), [(killed, 1, KILLED), (limited, 2, REFUSED)])
def test_a_training_whose_worker_fails_ends_and_goes_on(act, status, message, script, at_batch, tmp_path, capsys):
    whole, parted = tmp_path / 'whole', tmp_path / 'parted'
    options = ['--max-epoch', 4, '--workers', 2]
    assert script('train_img_model_xent', *options, '--save-dir', whole) == 0
    at_batch(2, act)
    started = time.monotonic()
    assert script('train_img_model_xent', *options, '--save-dir', parted) == status
    assert time.monotonic() - started < 20
    out, err = capsys.readouterr()
    assert err.startswith(f'error: {message}') and err.count('\n') == 1
    (position,) = names(parted)
    assert f'Saved {parted}/{position}, from which --auto-resume goes on' in out
    assert script('train_img_model_xent', *options, '--save-dir', parted, '--auto-resume') == 0
    assert 'Going on ' in capsys.readouterr().out
    assert equal(*(weights_of(folder / 'checkpoint_ep4.pth.tar') for folder in (whole, parted)))


@pytest.mark.parametrize(('act', 'status', 'message'), [(killed, 1, KILLED), (limited, 2, REFUSED)])
def test_a_test_whose_worker_fails_ends(act, status, message, script, tmp_path, monkeypatch, capsys):
    train = ['--max-epoch', 1, '--save-dir', tmp_path]
    assert script('train_img_model_xent', *train) == 0
    before = {path: path.read_bytes() for path in tmp_path.glob('*.pth.tar')}

    def forward(model, x, whole=tiny.Tiny.forward):
        monkeypatch.setattr(tiny.Tiny, 'forward', whole)
        act()
        return whole(model, x)

    monkeypatch.setattr(tiny.Tiny, 'forward', forward)
    started = time.monotonic()
    evaluate = ['--evaluate', '--resume', tmp_path / 'checkpoint_ep1.pth.tar', '--test-batch', 1, '--workers', 2]
    assert script('train_img_model_xent', *evaluate, '--save-dir', tmp_path) == status
    assert time.monotonic() - started < 20
    err = capsys.readouterr().err
    assert err.startswith(f'error: {message}') and err.count('\n') == 1
    assert {path: path.read_bytes() for path in tmp_path.glob('*.pth.tar')} == before


def test_workers_that_cannot_be_started(script, tmp_path, monkeypatch, capsys):
    """The third one, as where processes or the semaphores in /dev/shm run out; the others end too."""
    start, count = multiprocessing.process.BaseProcess.start, itertools.count()

    def refuse(process):
        if next(count) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        start(process)

    monkeypatch.setattr(multiprocessing.process.BaseProcess, 'start', refuse)
    assert script('train_img_model_xent', '--workers', 3, '--save-dir', tmp_path) == 2
    assert re.fullmatch(
        r'error: 3 processes that decode images cannot be started \(No space left on device\): .*--workers, or 0\n',
        capsys.readouterr().err,
    )
    for worker in workers():
        worker.join(5)
    assert not workers()


def test_a_second_sigint_ends_at_once(script, at_batch, tmp_path):
    def twice():
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError('went on')

    at_batch(2, twice)
    assert script('train_img_model_xent', '--save-dir', tmp_path) == 130
    assert names(tmp_path) == []


def test_the_handlers_are_put_back(script, tmp_path):
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    assert script('train_img_model_xent', '--max-epoch', 1, '--save-dir', tmp_path) == 0
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def kill_and_resume(started, data_dir, tmp_path, kills, seed):
    """SIGKILL at random moments, each time after more epochs; the final weights are those of a run left alone."""
    rng = random.Random(seed)
    epochs = kills + 3
    options = ['--data-dir', data_dir, '--max-epoch', epochs, '--print-freq', 1, '--workers', 1]
    options += ['--save-minutes', 1e-6, '--auto-resume']  # after each step
    whole = started('train_img_model_xent_htri', *options, '--save-dir', tmp_path / 'whole')
    assert whole.wait() == 0, whole.stderr.read()
    parted = [*options, '--save-dir', tmp_path / 'parted']
    for kill in range(kills):
        run = started('train_img_model_xent_htri', *parted)
        wait_for(run, f'==> Epoch {kill + 2}/')
        time.sleep(rng.uniform(0, 0.05))
        os.kill(run.pid, signal.SIGKILL)
        run.wait()
    run = started('train_img_model_xent_htri', *parted)
    out, err = run.communicate()
    assert run.returncode == 0, err
    assert re.search(r'Going on (in|after) epoch', out)
    files = [tmp_path / folder / f'checkpoint_ep{epochs}.pth.tar' for folder in ('whole', 'parted')]
    assert equal(*map(weights_of, files))
    assert len(list((tmp_path / 'parted').glob('resume_*'))) == 3


def test_killed_at_three_random_moments(started, data_dir, tmp_path):
    kill_and_resume(started, data_dir, tmp_path, kills=3, seed=0)


@pytest.mark.soak
def test_killed_at_thirty_random_moments(started, data_dir, tmp_path):
    kill_and_resume(started, data_dir, tmp_path, kills=30, seed=1)


@pytest.mark.parametrize('to', ['launcher', 'all'])
def test_two_processes_stop_after_the_same_step(to, started, data_dir, tmp_path):
    """Whoever gets the signal: the launcher alone (kill), or each process too (Ctrl-C, srun)."""
    options = ['--data-dir', data_dir, '--max-epoch', 200, '--print-freq', 1]
    stopped = started('train_img_model_xent_htri', *options, '--save-dir', tmp_path, processes=2)
    wait_for(stopped, '==> Epoch 3/')
    if to == 'launcher':
        os.kill(stopped.pid, signal.SIGTERM)
    else:
        os.killpg(stopped.pid, signal.SIGTERM)
    out, err = stopped.communicate(timeout=60)
    assert (stopped.returncode, err) == (143, '')
    (position,) = names(tmp_path)
    epoch = int(re.search(r'\d+', position)[0])
    assert f'Stopped by SIGTERM after saving {tmp_path}/{position}. Go on with:\npython ' in out
    options = ['--data-dir', data_dir, '--max-epoch', epoch + 1, '--print-freq', 1]
    runs = [
        started('train_img_model_xent_htri', *options, '--save-dir', folder, '--auto-resume', processes=2)
        for folder in (tmp_path, tmp_path / 'whole')
    ]
    for run in runs:
        assert run.wait(timeout=120) == 0, run.stderr.read()
    ends = [weights_of(folder / f'checkpoint_ep{epoch + 1}.pth.tar') for folder in (tmp_path, tmp_path / 'whole')]
    assert equal(*ends)


@pytest.mark.parametrize(
    ('environ', 'again'),
    [
        ({}, 'Go on with:\npython train.py --auto-resume'),
        ({'TORCHELASTIC_RUN_ID': signals.RUN_ID}, 'Go on with:\npython train.py --auto-resume'),
        (
            {'TORCHELASTIC_RUN_ID': 'job', 'LOCAL_WORLD_SIZE': '4'},
            'Go on with:\ntorchrun --standalone --nproc-per-node 4 train.py --auto-resume',
        ),
        ({'GROUP_WORLD_SIZE': '2'}, 'Go on with the same command on each host, and --auto-resume'),
    ],
)
def test_how_to_go_on(environ, again, monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['train.py', '--overwrite'])
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    assert str(signals.Stopped(signal.SIGTERM, Path('x'))) == f'Stopped by SIGTERM after saving x. {again}'


@pytest.mark.parametrize('victim', ['process', 'worker'])
def test_a_killed_process_is_started_again(victim, started, data_dir, tmp_path):
    options = ['--data-dir', data_dir, '--max-epoch', 40, '--print-freq', 1, '--save-minutes', 1e-6, '--workers', 2]
    run = started('train_img_model_xent', *options, '--max-restarts', 1, '--save-dir', tmp_path)
    wait_for(run, '==> Epoch 3/')
    pid, *_ = (tmp_path / '.lock').read_text().split()
    if victim == 'worker':
        pid, *_ = subprocess.run(['pgrep', '-P', pid], capture_output=True, text=True).stdout.split()
    os.kill(int(pid), signal.SIGKILL)
    out, err = run.communicate(timeout=120)
    assert (run.returncode, err) == (0, '' if victim == 'process' else f'error: {KILLED}')
    assert re.search(r'Going on (in|after) epoch', out)
    assert 'checkpoint_ep40.pth.tar' in names(tmp_path)


def test_auto_resume_begins_passes_over_damage_and_ends(script, tmp_path, capsys):
    options = ['--max-epoch', 2, '--eval-step', 1, '--save-dir', tmp_path, '--auto-resume']
    assert script('train_img_model_xent', *options) == 0
    assert f'No checkpoint in {tmp_path}: beginning' in capsys.readouterr().out
    ends = weights_of(tmp_path / 'checkpoint_ep2.pth.tar')
    assert script('train_img_model_xent', *options) == 0  # all is done: a job that is queued again ends well
    assert 'has finished all of --max-epoch 2 epochs' in capsys.readouterr().out
    newest = tmp_path / 'checkpoint_ep2.pth.tar'
    newest.write_bytes(newest.read_bytes()[:-2000])
    assert script('train_img_model_xent', *options) == 0
    out = capsys.readouterr().out
    assert f'Passed over: {newest} is damaged' in out
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


def test_weights_only_with_overwrite_spares_the_file_it_begins_with(script, tmp_path):
    assert script('train_img_model_xent', '--max-epoch', 2, '--eval-step', 1, '--save-dir', tmp_path) == 0
    begin = ['--resume', tmp_path / 'checkpoint_ep1.pth.tar', '--resume-weights-only', '--overwrite']
    assert script('train_img_model_xent', *begin, '--max-epoch', 3, '--save-dir', tmp_path) == 0
    found = [name for name in names(tmp_path) if name.startswith('check')]
    assert found == ['checkpoint_ep1.pth.tar', 'checkpoint_ep3.pth.tar']


def test_positions_are_kept_by_number(script, tmp_path):
    options = ['--max-epoch', 4, '--save-dir', tmp_path, '--save-minutes', 1e-9, '--keep', 2]
    assert script('train_img_model_xent', *options) == 0
    found = names(tmp_path)
    assert [name for name in found if name.startswith('resume')] == ['resume_4_2.pth.tar', 'resume_4_3.pth.tar']
    assert 'checkpoint_ep4.pth.tar' in found


def test_a_disk_that_fails_ends_no_training(script, at_batch, tmp_path, capsys):
    """Files larger than 10 kB cannot be written any more from the second epoch on."""
    options = ['--max-epoch', 3, '--eval-step', 1, '--save-dir', tmp_path]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    at_batch(4, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard)))
    try:
        assert script('train_img_model_xent', *options) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    found = capsys.readouterr()
    assert f'error: {tmp_path}/checkpoint_ep2.pth.tar: File too large; what was there is untouched' in found.out
    assert re.fullmatch(rf'error: 4 files could not be written, first {tmp_path}/resume_2_3.*\n', found.err)
    assert found.out.count('==> Test') == 3
    assert not [path for path in tmp_path.iterdir() if path.name.startswith('.check')]
    assert names(tmp_path)[:2] == ['best_model.pth.tar', 'checkpoint_ep1.pth.tar']
    weights_of(tmp_path / 'checkpoint_ep1.pth.tar')
    assert files.unwritten == []


def test_a_folder_that_goes_ends_no_training(script, at_batch, tmp_path, capsys):
    folder = tmp_path / 'log'

    def replace():
        folder.rename(tmp_path / 'moved')
        folder.touch()  # a file as parent

    at_batch(4, replace)
    assert script('train_img_model_xent', '--max-epoch', 3, '--eval-step', 1, '--save-dir', folder) == 2
    assert 'could not be written' in capsys.readouterr().err
    assert 'checkpoint_ep1.pth.tar' in names(tmp_path / 'moved')


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


def test_a_full_disk(script, small_disk, capsys):
    options = ['--max-epoch', 9, '--eval-step', 1, '--save-dir', small_disk, '--workers', 1]
    assert script('train_img_model_xent', *options) == 2
    assert 'No space left on device; what was there is untouched' in capsys.readouterr().out
    for path in small_disk.glob('*.pth.tar'):
        weights_of(path)
    assert not list(small_disk.glob('.*.pth.tar*'))


def test_two_trainings_in_one_folder(script, started, data_dir, tmp_path, capsys):
    options = ['--data-dir', data_dir, '--max-epoch', 200, '--print-freq', 1, '--eval-step', 1]
    run = started('train_img_model_xent', *options, '--save-dir', tmp_path)
    wait_for(run, '==> Epoch 2/')
    log = (tmp_path / 'log_train.txt').read_text()
    for more in (['--overwrite'], ['--auto-resume']):
        assert script('train_img_model_xent', '--save-dir', tmp_path, *more) == 2
        assert capsys.readouterr().err == (
            f'error: --save-dir {tmp_path}: another training run writes there (process {run.pid} on '
            f'{platform.node()}); name another folder\n'
        )
    assert (tmp_path / 'log_train.txt').read_text().startswith(log)
    evaluate = ['--evaluate', '--resume', tmp_path / 'checkpoint_ep1.pth.tar', '--save-dir', tmp_path]
    assert script('train_img_model_xent', *evaluate) == 0
    os.kill(run.pid, signal.SIGKILL)
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
    """Between epoch 20 and epoch 300, with a test every 10 epochs; workers counted in."""
    options = ['--data-dir', data_dir, '--max-epoch', 301, '--eval-step', 10, '--workers', workers]
    run = started('train_img_model_xent_htri', *options, '--save-dir', tmp_path)

    def look():
        children = subprocess.run(['pgrep', '-P', str(run.pid)], capture_output=True, text=True).stdout.split()
        status = [Path(f'/proc/{pid}/status').read_text() for pid in (run.pid, *children)]
        memory = sum(int(re.search(r'VmRSS:\s+(\d+)', text)[1]) for text in status)  # kB
        return memory, len(os.listdir(f'/proc/{run.pid}/fd'))

    wait_for(run, '==> Epoch 21/')
    memory, number = look()
    wait_for(run, '==> Epoch 301/')
    later, number_later = look()
    with capsys.disabled():
        print(
            f'\n{workers} workers: {memory / 1024:.0f} -> {later / 1024:.0f} MB, {number} -> {number_later} files open'
        )
    assert later <= 1.05 * memory
    assert number_later <= number
    run.communicate()
