"""The benchmarks import, and the steps that they measure are those of the scripts."""

import ast
import importlib
import inspect
import os
import select
import subprocess
import sys

import pytest
import torch
from conftest import HANG, ROOT

from runtime.precision import allow_tf32

FOLDER = ROOT / 'benchmarks'
PARTS = sorted(path.stem for path in FOLDER.glob('*.py'))


@pytest.fixture(autouse=True)
def path(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    yield
    for name in PARTS:
        sys.modules.pop(name, None)


@pytest.mark.parametrize('name', PARTS)
def test_a_part_is_imported(name):
    part = importlib.import_module(name)
    assert part.__doc__ and part.__file__ == str(FOLDER / f'{name}.py')


def step_of(source: str) -> str:
    """The loop over the batches, without the line that saves; comments and line breaks do not count."""
    loops = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.For))
    (body,) = (loop.body for loop in loops if 'draws' in ast.unparse(loop.target))
    return '\n'.join(line for line in map(ast.unparse, body) if not line.startswith('checkpoint.'))


@pytest.mark.parametrize(
    ('part', 'script'), [('training', 'train_img_model_xent'), ('distributed', 'train_img_model_xent_htri')]
)
def test_the_measured_step_is_that_of_the_script(part, script):
    step = step_of(inspect.getsource(importlib.import_module(part).train))
    assert step == step_of((ROOT / f'{script}.py').read_text())


@pytest.mark.parametrize('precision', ['fp32', 'tf32', 'bf16'])
def test_both_sides_of_a_training_have_the_same_arithmetic(precision, monkeypatch):
    """On a GPU, which this machine need not have: TF32 for products and for convolutions, and cuDNN's trials."""
    training, matmul = importlib.import_module('training'), torch.backends.cuda.matmul
    for name, value in (('is_available', True), ('device_count', 1), ('set_device', None)):
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    sides = []
    for prepare in (training.start, training.plain_start):
        allow_tf32(precision != 'tf32')
        torch.backends.cudnn.benchmark = False
        prepare(precision)
        name = 'fp32_precision' if hasattr(matmul, 'fp32_precision') else 'allow_tf32'
        sides.append((getattr(matmul, name), torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark))
    allow_tf32(False)
    torch.backends.cudnn.benchmark = False
    assert sides[0] == sides[1] and sides[0][1:] == (precision == 'tf32', True)


@pytest.mark.parametrize('name', ['training', 'testing', 'distributed', 'reporting', 'learning', 'table'])
def test_what_waits_for_the_measurements_does_not_start_cuda(name):
    """It would hold memory of the GPU while they run."""
    part = importlib.import_module(name)
    source = inspect.getsource(part.main if name == 'table' else part.rows)
    assert 'cuda.' not in source and 'trainer(' not in source and ' start(' not in source


def test_what_takes_too_long_is_ended_with_all_that_it_started():
    """Each of them holds the pipe, which ends when the last of them has ended."""
    within = importlib.import_module('table').within
    reading, writing = os.pipe()
    assert within(2, ['bash', '-c', f'sleep {2 * HANG} & wait'], stdout=writing) is None
    os.close(writing)
    assert select.select([reading], [], [], HANG)[0] and os.read(reading, 1) == b''
    os.close(reading)
    assert within(HANG, ['bash', '-c', 'exit 3']) == 3
    assert within(None, ['bash', '-c', 'exit 0']) == 0


def test_the_command():
    done = subprocess.run([sys.executable, FOLDER / 'table.py', 'everything'], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, '')
    assert 'everything: no such part; choose from input, training' in done.stderr
