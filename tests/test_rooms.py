"""The plan of the house: which room may import which. A new import is a decision, made here."""

import ast

import pytest
from conftest import ROOT

LONGEST, MOST_AT_ROOT = 350, 18  # lines of a room; files at the root
DOORS = ('models', 'readers', 'runtime', 'page', 'toy')


def rooms():
    for path in [*ROOT.glob('*.py'), *(path for door in DOORS for path in (ROOT / door).glob('*.py'))]:
        name = '.'.join(path.relative_to(ROOT).with_suffix('').parts)
        yield name.removesuffix('.__init__'), path


FILES = dict(rooms())
SCRIPTS = {name for name in FILES if name.startswith('train_')}


def imports(name) -> set[str]:
    """The rooms that a room imports, lazily or not."""
    found = set()
    for node in ast.walk(ast.parse(FILES[name].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f'{node.module}.{alias.name}' for alias in node.names} | {node.module}
    return found & set(FILES) - {name}


def test_no_room_is_reached_from_itself():
    left = {name: imports(name) - {name.rpartition('.')[0]} for name in FILES}
    while ground := {name for name, needed in left.items() if not needed}:
        left = {name: needed - ground for name, needed in left.items() if name not in ground}
    assert not left, f'circle among {left}'


def test_rooms_are_short():
    lengths = {name: len(path.read_text().splitlines()) for name, path in FILES.items()}
    assert {name: length for name, length in lengths.items() if length > LONGEST} == {}


def test_the_root_can_be_taken_in_at_a_glance():
    assert len(list(ROOT.glob('*.py'))) <= MOST_AT_ROOT


@pytest.mark.parametrize('script', sorted(SCRIPTS))
def test_a_script_is_imported_by_none_and_is_short(script):
    assert not [name for name in FILES if script in imports(name)]
    assert len(FILES[script].read_text().splitlines()) <= 100


def test_utils_is_no_drawer():
    assert len(FILES['utils'].read_text().splitlines()) <= 100
