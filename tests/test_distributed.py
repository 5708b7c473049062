"""Several processes on the CPU give the result of one, and no process is left behind."""

import importlib
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ENV, HANG, ROOT, SCRIPTS, TINY
from torch import nn

import data_manager
import ranking
from runtime import launch

TORCHRUN = [sys.executable, '-m', 'torch.distributed.run']


def torchrun(number, *command):
    """`command` in `number` processes, finished."""
    return finished([*TORCHRUN, '--standalone', '--nproc-per-node', str(number), *map(str, command)])


def finished(command, env=ENV):
    return subprocess.run(command, timeout=HANG, env=env, capture_output=True, text=True)


@pytest.fixture(scope='module')
def found(data_dir, tmp_path_factory):
    """The results of each process in runs of 1, 2 and 3, and the folder with the scripts' files."""
    folder = tmp_path_factory.mktemp('processes')
    found = {}
    for number in (1, 2, 3):
        command = [ROOT / 'tests' / 'processes.py', folder, data_dir]
        alone = finished([sys.executable, *map(str, command)]) if number == 1 else torchrun(number, *command)
        assert (alone.returncode, alone.stderr) == (0, ''), alone.stderr
        found[number] = [torch.load(folder / str(number) / f'{rank}.pt', weights_only=False) for rank in range(number)]
    return folder, found


several = pytest.mark.parametrize('number', [2, 3])


@several
def test_losses_gradients_and_weights_are_those_of_one_process(found, number):
    """Cross entropy, gathered triplets and replicated centers, in float64."""
    (one,), many = found[1][1], found[1][number]
    for name in ('losses', 'gradients', 'weights'):
        for process in many:
            torch.testing.assert_close(process['steps'][name], one['steps'][name], rtol=0, atol=1e-9)
    assert len(one['steps']['gradients']) == 5 and min(one['steps']['losses']) > 0


@several
def test_a_loss_that_is_not_finite_in_one_process_steps_none(found, number):
    assert all(process['steps']['kept'] for process in (*found[1][1], *found[1][number]))


@several
def test_the_batches_together_are_those_of_one_process(found, number):
    one, many = found[1][1][0]['batches'], [process['batches'] for process in found[1][number]]
    assert len(one) == 2
    for batch, (images, pids) in enumerate(one):
        for part in (0, 1):
            parts = [process[batch][part] for process in many]
            assert torch.equal(torch.stack(parts, 1).flatten(0, 1), (images, pids)[part])
        assert all(len(process[batch][1].unique()) == len(pids.unique()) for process in many)  # 4 images of each


@several
def test_each_image_is_extracted_once(found, number):
    for part, everything in enumerate(found[1][1][0]['tests']['seen']):
        for subset in (0, 1):
            parts = [process['tests']['seen'][part][subset] for process in found[1][number]]
            assert sorted(index for own in parts for index in own) == everything[subset]
            assert all(own == sorted(own) for own in parts)
    assert [] in [own for process in found[1][number] for own in process['tests']['seen'][1]]  # one item for them all


@several
def test_rankings_are_exactly_those_of_one_process(found, number):
    one = found[1][1][0]['tests']['rankings']
    for process in found[1][number]:
        for mine, theirs in zip(process['tests']['rankings'], one, strict=True):
            assert mine.keys() == theirs.keys()
            for name in mine:
                np.testing.assert_array_equal(mine[name], theirs[name], strict=True)


@several
def test_saved_features_are_those_of_one_process(found, number):
    for folder in ('features/query', 'features/gallery', 'more/features/query', 'more/features/gallery'):
        one, many = (ranking.read(found[0] / str(processes) / folder) for processes in (1, number))
        np.testing.assert_allclose(many[0], one[0], atol=1e-5)
        np.testing.assert_array_equal(many[1:], one[1:])


@several
def test_all_frames_are_extracted_once(found, number):
    """With --seq-len 0 the frames of a tracklet go to one process."""
    (one, everything), many = found[1][1][0]['tests']['whole'], [each['tests']['whole'] for each in found[1][number]]
    assert everything.tolist() == list(range(len(one)))
    for rank, (features, indices) in enumerate(many):
        assert indices.tolist() == list(range(rank, len(one), number))
        torch.testing.assert_close(features, one[indices], rtol=0, atol=1e-5)


@several
def test_figures_are_those_of_one_process(found, number):
    """The running statistics of the other processes have no effect."""
    one = found[1][1][0]['tests']
    assert one['printed'].count('mAP: ') == 4  # plain, re-ranked, --any-camera, --multi-query
    for process in found[1][number]:
        assert process['tests']['rank1'] == one['rank1']
    assert found[1][number][0]['tests']['printed'] == one['printed']


@several
def test_files_of_the_test_are_those_of_one_process(found, number):
    folder = found[0]
    for name in ('results.csv', 'results.json'):
        one, several = ((folder / str(count) / name).read_text().splitlines() for count in (1, number))
        if name == 'results.json':  # but for what tells the runs apart
            one, several = (
                [line for line in lines if '"date"' not in line and '"processes"' not in line]
                for lines in (one, several)
            )
        assert one == several
    one, several = (dict(np.load(folder / str(count) / 'ranking.npz')) for count in (1, number))
    assert one.keys() == several.keys()
    for key in one:
        if key == 'edges' or 'histogram' in key:  # features differ in their last bits by the size of a batch
            assert one[key].sum() == pytest.approx(several[key].sum(), rel=0.01)
        else:
            np.testing.assert_allclose(one[key], several[key], rtol=1e-3, atol=1e-6)


def weights_of(folder, number, name):
    state = torch.load(folder / str(number) / name / 'checkpoint_ep2.pth.tar', weights_only=True)
    return {**state['state_dict'], **state['state'].get('criterion_cent', {})}


@pytest.mark.parametrize('name', SCRIPTS)
def test_each_script_trains_as_in_one_process(name, found):
    folder, found = found
    one, two = (found[number][0]['lines'][name] for number in (1, 2))
    assert len(one) >= 3
    for mine, theirs in zip(two, one, strict=True):
        numbers = [[float(number) for number in re.findall(r'\d+\.\d+', line)] for line in (mine, theirs)]
        assert numbers[0] == pytest.approx(numbers[1], abs=2e-4, rel=2e-6)  # printed with 4 digits
    torch.testing.assert_close(weights_of(folder, 2, name), weights_of(folder, 1, name), rtol=0, atol=1e-5)


def test_a_script_that_forgets_the_gather_is_noticed(found):
    one, two = (weights_of(found[0], number, 'without_gather') for number in (1, 2))
    torch.testing.assert_close(one, weights_of(found[0], 1, 'train_img_model_xent_htri'))
    assert max((one[key] - two[key]).abs().max() for key in one if one[key].is_floating_point()) > 1e-4


def on_two_gpus(name, *options, act=''):
    """A script as a plain command with --gpu-devices 0,1, and an `ACT` of tiny.py."""
    shared = [option for option in TINY if option != '--use-cpu']
    shared += ['--gpu-devices', '0,1', '--pretrained', 'none', '--train-batch', 8]
    command = [sys.executable, ROOT / 'tests' / 'two_gpus.py', ROOT / f'{name}.py', *shared, *options]
    return finished([*map(str, command)], {**ENV, 'ACT': act})


@pytest.mark.parametrize('name', SCRIPTS)
def test_one_process_per_listed_gpu(name, data_dir, tmp_path, script, capsys):
    """Two processes resume where one stopped, and one where they stopped; everything is printed and written once."""
    one, two, last = tmp_path / 'one', tmp_path / 'two', tmp_path / 'last'
    options = ['--eval-step', 1, '--data-dir', data_dir]
    assert script(name, *options, '--max-epoch', 1, '--save-dir', one) == 0
    resume = ['--resume', one / 'checkpoint_ep1.pth.tar', '--max-epoch', 3]
    run = on_two_gpus(name, *options, *resume, '--save-dir', two)
    assert (run.returncode, run.stderr) == (0, '')
    once = ('2 processes', 'Args:', 'Continuing after epoch 1', '==> Epoch 2/3', '==> Epoch 3/3', 'Finished')
    assert [run.stdout.count(text) for text in once] == [1] * len(once)
    assert run.stdout.count('==> Test') == 2 and '==> Epoch 1/' not in run.stdout
    assert (two / 'log_train.txt').read_text() == run.stdout
    files = {'checkpoint_ep2.pth.tar', 'checkpoint_ep3.pth.tar', 'log_train.txt', 'metrics.csv', '.lock'}
    files |= {'results.json', 'results.csv', 'ranking.npz'}
    written = {path.name for path in two.iterdir() if not path.name.startswith(('best_model', 'resume_', 'report'))}
    assert written == files

    capsys.readouterr()
    assert script(name, *options, '--save-dir', last, '--resume', two / 'checkpoint_ep2.pth.tar', '--max-epoch', 3) == 0
    assert 'Continuing after epoch 2' in capsys.readouterr().out
    mine, theirs = (torch.load(folder / 'checkpoint_ep3.pth.tar', weights_only=True) for folder in (two, last))
    assert mine['state']['scheduler'] == theirs['state']['scheduler'] and mine['epoch'] == theirs['epoch'] == 2
    steps = [
        {key: held['step'].item() for key, held in each['state']['optimizer']['state'].items()}
        for each in (mine, theirs)
    ]
    assert steps[0] == steps[1] and min(steps[0].values()) > 0
    assert mine['best_rank1'] >= torch.load(one / 'best_model.pth.tar', weights_only=True)['best_rank1']


def test_two_processes_evaluate_as_one(data_dir, tmp_path, script, capsys):
    name, options = 'train_img_model_xent', ['--data-dir', data_dir, '--save-dir', tmp_path]
    assert script(name, *options, '--max-epoch', 1) == 0
    evaluate = [*options, '--evaluate', '--resume', tmp_path / 'checkpoint_ep1.pth.tar']
    capsys.readouterr()
    assert script(name, *evaluate) == 0
    one = capsys.readouterr().out
    run = on_two_gpus(name, *evaluate)
    assert (run.returncode, run.stderr) == (0, '')
    figures = [out[out.index('Evaluate only') : out.index('Finished')] for out in (one, run.stdout)]
    assert figures[0] == figures[1]


@pytest.mark.parametrize(
    ('act', 'status', 'text'),
    [
        ('mistake', 2, r'error: what process 1 says\n'),
        ('fault', 1, r'Traceback (?:(?!Traceback).)*\nValueError: what process 1 says\n'),
        (
            'memory',
            2,
            r'error: the memory of the GPU ran out \(CUDA out of memory\); try a smaller --train-batch or .*\n',
        ),
        ('kill', 137, r'error: process 1 of the run was killed by signal 9\n'),
    ],
)
def test_a_process_that_fails_ends_the_run(act, status, text, data_dir, tmp_path):
    """The first error is printed once, and determines the exit status."""
    options = ['--data-dir', data_dir, '--save-dir', tmp_path]
    run = on_two_gpus('train_img_model_xent_htri', *options, act=f'{act} 2 1')
    assert run.returncode == status
    assert re.fullmatch(text, run.stderr, re.DOTALL), run.stderr
    log = (tmp_path / 'log_train.txt').read_text()
    assert log.endswith(run.stderr) and log.count('what process 1') == run.stderr.count('what process 1')
    assert list(tmp_path.glob('*.pth.tar')) == []  # the first process lost the second in the middle of a step


@pytest.fixture
def copied(data_dir, tmp_path):
    """A folder with a copy of market1501, and of its gallery the first image that the second process reads."""
    shutil.copytree(data_dir / 'market1501', tmp_path / 'data' / 'market1501')
    return tmp_path / 'data', Path(data_manager.init_dataset('market1501', str(tmp_path / 'data')).gallery[1][0])


def test_two_processes_report_at_once_a_file_that_is_missing(copied, tmp_path):
    data, image = copied
    image.unlink()
    image.symlink_to('nowhere')
    run = on_two_gpus('train_img_model_xent', '--data-dir', data, '--save-dir', tmp_path / 'log')
    assert run.returncode == 2 and '==> Epoch' not in run.stdout
    assert re.fullmatch(rf'error: cannot read the image {image}: No such .* \(missing: 1 of .*\n', run.stderr)


def test_two_processes_continue_with_a_test_that_failed_in_one(copied, tmp_path):
    """Its message says where the first process saved the state."""
    data, image = copied
    content = image.read_bytes()
    image.write_bytes(content[:100])
    options = ['train_img_model_xent_htri', '--data-dir', data, '--max-epoch', 1, '--save-dir', tmp_path / 'log']
    run = on_two_gpus(*options)
    assert run.returncode == 2
    (position,) = (tmp_path / 'log').glob('*.pth.tar')
    note = f'saved {position}, from which --auto-resume continues'
    assert re.fullmatch(rf'error: cannot read the image {image}: .*; {note}\n', run.stderr), run.stderr
    image.write_bytes(content)
    run = on_two_gpus(*options, '--auto-resume')
    assert (run.returncode, run.stderr) == (0, '')
    assert '==> Epoch 1/1\n==> Test\n' in run.stdout
    one, other = (
        torch.load(path, weights_only=True)['state_dict']
        for path in (position, tmp_path / 'log/checkpoint_ep1.pth.tar')
    )
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize(('options', 'text'), [([], 'bounding_box_train'), (['--sync-bn'], '--sync-bn is for CUDA')])
def test_a_mistake_of_all_processes_is_reported_once(options, text, tmp_path):
    """Including a mistake that each process detects before they exchange anything."""
    run = on_two_gpus('train_img_model_xent', '--data-dir', tmp_path, '--save-dir', tmp_path, *options)
    assert run.returncode == 2
    assert run.stderr.startswith('error: ') and run.stderr.count(text) == 1


@pytest.mark.parametrize(
    ('options', 'reported'),
    [
        (['--train-batch', 9], 'error: --train-batch 9 cannot be split evenly among 2 processes with at least 2 images '
                               'each: use 8 or 10\n'),
        (['--train-batch', 2], 'use 4 or 6\n'),
        (['--gpu-devices', '0,1,3'], 'error: --gpu-devices 0,1,3: this machine has 2 CUDA devices, none with '),
    ],
)  # fmt: skip
def test_mistakes_that_are_seen_before_a_process_is_started(options, reported, tmp_path, monkeypatch, capsys):
    module = importlib.import_module('train_img_model_xent')
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    shared = [option for option in TINY if option != '--use-cpu']
    argv = ['x.py', *shared, '--gpu-devices', '0,1', '--train-batch', 12, '--save-dir', tmp_path, *options]
    monkeypatch.setattr(sys, 'argv', [str(arg) for arg in argv])
    with pytest.raises(SystemExit) as end:
        launch.main(module.main, module.parser)
    assert end.value.code == 2
    err = capsys.readouterr().err
    assert reported in err and err.count('\n') == 1


def test_batches_of_whole_identities_are_proposed(monkeypatch, capsys):
    module = importlib.import_module('train_img_model_xent_htri')
    with pytest.raises(SystemExit):
        module.parser.parse_args(['--gpu-devices', '0,1,2', '--train-batch', '32', '--num-instances', '4'])
    assert 'use 24 or 36' in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason='needs two GPUs')
def test_sync_bn_takes_its_statistics_from_all_gpus(tmp_path):
    alone = nn.BatchNorm2d(3).cuda()
    imgs = torch.randn(8, 3, 4, 4, generator=torch.Generator().manual_seed(0)).cuda()
    out = alone(imgs)
    out.square().mul(imgs).mean().backward()
    run = torchrun(2, ROOT / 'tests' / 'sync_bn.py', tmp_path)
    assert run.returncode == 0, run.stderr
    parts = [torch.load(tmp_path / f'{rank}.pt') for rank in (0, 1)]
    torch.testing.assert_close(torch.stack([part['out'] for part in parts], 1).flatten(0, 1), out.detach().cpu())
    for part in parts:
        torch.testing.assert_close(part['mean'], alone.running_mean.cpu())
        torch.testing.assert_close(part['gradient'], alone.weight.grad.cpu())


@pytest.mark.soak
def test_fifty_runs_end_in_order(data_dir, tmp_path):
    for _ in range(50):
        options = ['--max-epoch', 1, '--data-dir', data_dir, '--save-dir', tmp_path, '--overwrite']
        run = on_two_gpus('train_img_model_xent_htri', *options)
        assert (run.returncode, run.stderr) == (0, '')


@pytest.mark.soak
def test_two_hosts_train_as_one_process(found, data_dir, tmp_path):
    """Two agents that meet over the loopback, with one process each."""
    with socket.socket() as free:
        free.bind(('localhost', 0))
        port = free.getsockname()[1]
    meet = ['--nnodes', '2', '--nproc-per-node', '1', '--rdzv-backend', 'c10d', '--rdzv-endpoint', f'localhost:{port}']
    command = [*TORCHRUN, *meet, ROOT / 'tests' / 'processes.py', tmp_path, data_dir]
    hosts = [subprocess.Popen([str(arg) for arg in command], env=ENV, stdout=subprocess.DEVNULL) for _ in range(2)]
    assert [host.wait(HANG) for host in hosts] == [0, 0]
    one = found[1][1][0]
    for rank in (0, 1):
        process = torch.load(tmp_path / '2' / f'{rank}.pt', weights_only=False)
        torch.testing.assert_close(process['steps']['weights'], one['steps']['weights'], rtol=0, atol=1e-9)
        assert process['tests']['rank1'] == one['tests']['rank1']
        assert rank or process['tests']['printed'] == one['tests']['printed']
    for name in SCRIPTS:
        torch.testing.assert_close(weights_of(tmp_path, 2, name), weights_of(found[0], 1, name), rtol=0, atol=1e-5)
