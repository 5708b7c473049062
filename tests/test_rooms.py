"""The plan of the house: which room may import which. A new import is a decision, made here."""

import ast

import pytest
from conftest import ROOT

MAY_IMPORT = {
    'errors': set(),
    'files': set(),
    'losses': set(),
    'signals': set(),
    'utils': {'files'},
    'eval_metrics': set(),
    'results': {'eval_metrics', 'report', 'files', 'utils'},
    'weights': set(),
    'toy_data': set(),
    'transforms': set(),
    'samplers': set(),
    'launch': {'files', 'signals', 'utils'},
    'data_manager': {'toy_data', 'dataset_loader'},  # the latter lazily, for its check of every image
    'models': {'weights'},
    'ranking': {'eval_metrics', 'launch'},
    'dataset_loader': {'launch'},
    'meters': {'launch', 'files', 'utils'},
    'checkpoint': {'weights', 'data_manager', 'results', 'signals', 'files', 'utils'},
    'evaluation': {
        'data_manager',
        'dataset_loader',
        'transforms',
        'ranking',
        'eval_metrics',
        'meters',
        'results',
        'launch',
        'utils',
    },
    'arguments': {'data_manager', 'models'},
    'report': {'eval_metrics', 'files', 'models', 'weights', 'transforms', 'dataset_loader'},  # the last four lazily
}
SCRIPTS = {path.stem for path in ROOT.glob('train_*.py')}
FILES = {path.stem: path for path in ROOT.glob('*.py')} | {'models': ROOT / 'models' / '__init__.py'}


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split('.')[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module.split('.')[0]


def test_every_room_is_on_the_plan():
    assert set(FILES) - SCRIPTS == set(MAY_IMPORT)


@pytest.mark.parametrize('room', sorted(MAY_IMPORT))
def test_imports_run_one_way(room):
    paths = [FILES[room]] if room != 'models' else (ROOT / 'models').glob('*.py')
    ours = {name for path in paths for name in imports(path) if name in FILES and name != room}
    assert ours <= MAY_IMPORT[room] | {'errors'}


@pytest.mark.parametrize('script', sorted(SCRIPTS))
def test_a_script_imports_no_script_and_is_short(script):
    assert not SCRIPTS & set(imports(FILES[script]))
    assert len(FILES[script].read_text().splitlines()) <= 100


def test_only_launch_knows_of_processes():
    assert [room for room, path in FILES.items() if 'torch.distributed' in path.read_text()] in ([], ['launch'])


def test_utils_is_no_drawer():
    assert len(FILES['utils'].read_text().splitlines()) <= 100
