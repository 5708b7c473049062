"""Several processes on the CPU: the result of one, and no process that is left behind."""

import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, SCRIPTS

ENV = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': f'{ROOT}{os.pathsep}{ROOT / "tests"}'}
TORCHRUN = [sys.executable, '-m', 'torch.distributed.run']


def torchrun(number, *command, timeout=120, **options):
    """`command` in `number` processes, finished."""
    launcher = [*TORCHRUN, '--standalone', '--nproc-per-node', str(number)]
    return finished([*launcher, *map(str, command)], timeout, **options)


def finished(command, timeout=120, env=ENV, **options):
    return subprocess.run(command, timeout=timeout, env=env, capture_output=True, text=True, **options)


@pytest.fixture(scope='module')
def found(data_dir, tmp_path_factory):
    """What each process of 1, 2 and 3 found, and the folder with what the scripts wrote."""
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
def test_figures_are_those_of_one_process(found, number):
    """Whatever the other processes hold as running statistics."""
    one = found[1][1][0]['tests']
    assert 'mAP: ' in one['printed']
    for process in found[1][number]:
        assert (process['tests']['printed'], process['tests']['rank1']) == (one['printed'], one['rank1'])


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
        assert numbers[0] == pytest.approx(numbers[1], abs=2e-4)  # printed with 4 digits
    torch.testing.assert_close(weights_of(folder, 2, name), weights_of(folder, 1, name), rtol=0, atol=1e-5)


def test_a_script_that_forgets_the_gather_is_noticed(found):
    one, two = (weights_of(found[0], number, 'without_gather') for number in (1, 2))
    torch.testing.assert_close(one, weights_of(found[0], 1, 'train_img_model_xent_htri'))
    assert max((one[key] - two[key]).abs().max() for key in one if one[key].is_floating_point()) > 1e-4
