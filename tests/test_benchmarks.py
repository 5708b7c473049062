"""The benchmarks import, and the steps that they measure are those of the scripts."""

import ast
import importlib
import inspect
import subprocess
import sys

import pytest
from conftest import ROOT

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


def test_the_command():
    done = subprocess.run([sys.executable, FOLDER / 'table.py', 'everything'], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, '')
    assert 'everything: no such part; choose from input, training' in done.stderr
