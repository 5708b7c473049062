"""If memory runs out, a run ends with the options that need less, in one line, and is not restarted."""

import argparse
import errno
import subprocess
import sys

import numpy as np
import pytest
import tiny
import torch
from conftest import ENV, HANG, ROOT, TINY

import evaluation
from batches import decoding
from batches.workers import Task, Workers
from runtime import commands, device, memory
from runtime.errors import UserError

GPU = torch.OutOfMemoryError(
    'CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 79.25 GiB of which 1.94 MiB is '
    'free. Including non-PyTorch memory, this process has 79.24 GiB memory in use. Of the allocated memory 77.76 GiB'
)


def of(act):
    """The exception that `act` raises."""
    try:
        act()
    except Exception as problem:
        return problem
    pytest.fail('there was enough')


@pytest.mark.parametrize(
    ('problem', 'whose'),
    [
        (GPU, 'GPU'),
        (RuntimeError('CUDA error: out of memory\nCUDA kernel errors might be'), 'GPU'),
        (RuntimeError('CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`'), 'GPU'),
        (RuntimeError('cuDNN error: CUDNN_STATUS_ALLOC_FAILED'), 'GPU'),
        (RuntimeError("NCCL error in: x.cpp:3\nCuda failure 2 'out of memory'"), 'GPU'),
        (MemoryError(), 'host'),
        (OSError(errno.ENOMEM, 'Cannot allocate memory'), 'host'),
        (of(lambda: torch.empty(1 << 60, dtype=torch.uint8)), 'host'),
        (of(lambda: np.empty(1 << 60, np.uint8)), 'host'),
        (OSError(errno.ENOSPC, 'No space left on device'), ''),
        (RuntimeError('mat1 and mat2 shapes cannot be multiplied'), ''),
        (UserError('the image out of memory.jpg cannot be read'), ''),
    ],
)
def test_whose_memory_ran_out(problem, whose):
    assert memory.exhausted(problem) == whose
    told = memory.explained(problem, argparse.Namespace(), False)
    assert (told is problem) == (not whose)
    assert not whose or (str(told).startswith(f'the memory of the {whose} ran out (') and '\n' not in str(told))


@pytest.mark.parametrize(
    ('options', 'testing', 'precision', 'advice'),
    [
        ({}, False, 'fp32', 'a smaller --train-batch or --precision bf16'),
        ({}, False, 'tf32', 'a smaller --train-batch or --precision bf16'),
        ({'precision': 'auto', 'cache': 'ram', 'workers': 4}, False, 'bf16', 'a smaller --train-batch'),
        ({'cache': 'device'}, True, 'fp32', 'a smaller --test-batch or --precision bf16 or --cache none'),
        ({}, False, '', 'a smaller --train-batch'),  # before it was chosen
    ],
)
def test_what_to_try_on_a_gpu(options, testing, precision, advice):
    told = str(memory.explained(GPU, argparse.Namespace(**options), testing, precision))
    numbers = 'Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 79.25 GiB of which 1.94 MiB is free'
    assert told == f'the memory of the GPU ran out (CUDA out of memory. {numbers}); try {advice}'


@pytest.mark.parametrize(
    ('options', 'advice'),
    [
        ({'workers': 0, 'cache': 'device'}, 'a smaller --train-batch'),
        ({'workers': 4, 'cache': 'ram'}, 'a smaller --train-batch or fewer --workers or --cache none'),
    ],
)
def test_what_to_try_on_the_host(options, advice):
    problem = of(lambda: np.empty(1 << 60, np.uint8))
    told = str(memory.explained(problem, argparse.Namespace(**options), False))
    assert told.startswith('the memory of the host ran out (Unable to allocate 1.00 EiB for an array')
    assert told.endswith(f'; try {advice}')


def raises(problem):
    def forward(*_):
        raise problem

    return forward


@pytest.mark.parametrize('evaluate', [False, True])
@pytest.mark.parametrize('problem', [GPU, MemoryError()])
def test_a_script_reports_it_in_one_line(problem, evaluate, script, monkeypatch, tmp_path, capsys):
    options = ['--max-epoch', 1, '--save-dir', tmp_path]
    if evaluate:
        assert script('train_img_model_xent', *options) == 0
        options += ['--evaluate', '--resume', tmp_path / 'checkpoint_ep1.pth.tar']
    capsys.readouterr()

    monkeypatch.setattr(tiny.Tiny, 'forward', raises(problem))
    assert script('train_img_model_xent', *options) == 2
    err = capsys.readouterr().err
    assert err.startswith('error: the memory of the ') and err.count('\n') == 1
    assert f'try a smaller {"--test-batch" if evaluate else "--train-batch"}' in err


@pytest.mark.parametrize(('which', 'options'), [('__call__', []), ('last', ['--validate', 0.5])])
def test_a_test_within_a_training_advises_a_smaller_test_batch(which, options, script, monkeypatch, tmp_path, capsys):
    test = getattr(evaluation.Test, which)

    def exhausting(self, *args):
        monkeypatch.setattr(tiny.Tiny, 'forward', raises(GPU))
        return test(self, *args)

    monkeypatch.setattr(evaluation.Test, which, exhausting)
    assert script('train_img_model_xent', '--max-epoch', 1, '--save-dir', tmp_path, *options) == 2
    assert 'try a smaller --test-batch' in capsys.readouterr().err


@pytest.mark.parametrize(
    ('bf16', 'evaluate', 'advised'), [(True, False, False), (True, True, True), (False, False, True)]
)
def test_a_precision_that_the_run_has_is_not_advised(bf16, evaluate, advised, script, monkeypatch, tmp_path, capsys):
    """With --precision auto, which is fp32 in a test."""
    monkeypatch.setattr(device, 'has_bf16', lambda _: bf16)
    options = ['--precision', 'auto', '--save-dir', tmp_path, *['--evaluate'] * evaluate]
    monkeypatch.setattr(tiny.Tiny, 'forward', raises(GPU))
    assert script('train_img_model_xent', *options) == 2
    assert ('or --precision bf16' in capsys.readouterr().err) is advised


def test_it_is_not_tried_again(data_dir, tmp_path):

    command = [
        sys.executable,
        ROOT / 'tests' / 'tiny.py',
        ROOT / 'train_img_model_xent.py',
        *TINY,
        '--pretrained',
        'none',
    ]
    command += ['--train-batch', 8, '--max-restarts', 1, '--data-dir', data_dir, '--save-dir', tmp_path]
    run = subprocess.run(
        [*map(str, command)], env={**ENV, 'ACT': 'memory 2 0'}, capture_output=True, text=True, timeout=HANG
    )
    assert run.returncode == 2 and 'restarting' not in run.stdout
    assert run.stderr.startswith('error: the memory of the GPU ran out') and run.stderr.count('\n') == 1


@pytest.mark.parametrize('make', [MemoryError, lambda: of(lambda: torch.empty(1 << 60))])
def test_it_is_reported_of_a_worker_too(make):
    def work(task):
        raise make()

    workers = Workers(1, work, pin=False)
    with pytest.raises(UserError, match=r'^memory ran out in a process that decodes images .*; use fewer --workers$'):
        list(workers.blocks([Task([0], [0])]))


def test_an_image_is_not_blamed_for_it(monkeypatch):
    def decode(path):
        raise MemoryError

    monkeypatch.setattr(decoding, 'decode', decode)
    with pytest.raises(MemoryError):
        decoding.read_image('image.jpg')


def test_other_commands_report_it_in_one_line(capsys):
    with pytest.raises(SystemExit) as end:
        commands.run(lambda: np.empty(1 << 60, np.uint8))
    err = capsys.readouterr().err
    assert (
        end.value.code == 2 and err.startswith('error: the memory of the host ran out (Unable') and err.count('\n') == 1
    )
