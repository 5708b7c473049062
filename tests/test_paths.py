"""Paths that are written are read back; which items are the same file."""

import itertools
import json

import numpy as np
import pytest
from test_results import ODD

from files import paths
from runtime.errors import UserError


def test_paths_are_read_back(tmp_path):
    path = tmp_path / 'paths.jsonl'
    for items in (ODD, [tuple(ODD), ('a',)], ['data/1.jpg'] * 3):
        paths.write(path, items)
        assert list(paths.read(path, len(items))) == items
        assert [json.loads(line) for line in path.read_text('ascii').splitlines()] == [
            [*each] if isinstance(each, tuple) else each for each in items
        ]


@pytest.mark.parametrize(
    ('content', 'fault'),
    [
        ('"a"\n"b"\n', 'has 2 lines for 3 items; write'),
        ('"a"\n3\n"b"\n', 'line 2: not a path or a list of paths'),
        ('"a"\n[]\n"b"\n', 'line 2: not a path or a list of paths'),
        ('"a"\n"b\n"c"\n', r'\(line 2: Invalid control character at\);'),
        ('"a"\n{\n"c"\n', r'\(line 2: Expecting property name enclosed in double quotes\);'),
        ('"a"\n"\xff"\n', 'ascii'),
        ('[' * 100_000, 'line 1'),
    ],
)
def test_damaged_paths_are_refused_in_one_line(content, fault, tmp_path):
    path = tmp_path / 'paths.jsonl'
    path.write_text(content)
    with pytest.raises(UserError, match=fault) as refused:
        list(paths.read(path, 3))
    assert '\n' not in str(refused.value) and str(path) in str(refused.value)


def same_plainly(query, gallery, q_pids, g_pids):
    """{(query, gallery)} of the pairs of one pid that are the same file, by comparing each with each."""

    def same(one, other):
        return all(a.samefile(b) if a.exists() and b.exists() else a.absolute() == b.absolute()
                   for a, b in zip(one, other, strict=True))  # fmt: skip

    return {
        (i, j)
        for (i, one), (j, other) in itertools.product(enumerate(query), enumerate(gallery))
        if q_pids[i] == g_pids[j] and len(one) == len(other) and same(one, other)
    }


def test_same_files_are_those_of_a_plain_loop(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = ['a', 'b', 'c', 'gone']
    for name in names[:3]:
        (tmp_path / name).write_text('equal')  # copies are different files
        (tmp_path / f'link_{name}').symlink_to(name)
        (tmp_path / f'hard_{name}').hardlink_to(tmp_path / name)
    (tmp_path / 'loop').symlink_to('loop')
    (tmp_path / 'sub').mkdir()
    names += [*(f'{kind}_{name}' for kind in ('link', 'hard') for name in 'abc'), 'sub/../a', 'loop', './gone', 'lost']
    names.append(str(tmp_path / 'b'))
    rng = np.random.default_rng(0)
    for longest in (1, 2, 3):
        items = [tuple(rng.choice(names, rng.integers(1, longest + 1))) for _ in range(160)]
        pids = rng.integers(0, 3, 160)
        (query, gallery), (q_pids, g_pids) = (items[:40], items[40:]), (pids[:40], pids[40:])
        shown = [[each[0] if longest == 1 else each for each in some] for some in (query, gallery)]
        q_files, g_files = paths.same_files(q_pids, g_pids, *map(iter, shown))
        found = {(i, j) for i, j in np.argwhere((q_files[:, None] == g_files) & (q_pids[:, None] == g_pids)).tolist()}
        as_paths = [[[tmp_path / frame for frame in each] for each in some] for some in (query, gallery)]
        expected = same_plainly(*as_paths, q_pids, g_pids)
        assert found == expected and len(expected) > 10


def test_only_persons_of_both_sets_are_looked_up(monkeypatch):
    seen = []
    monkeypatch.setattr(paths, 'file_id', lambda path: seen.append(path) or path)
    query, gallery = [('a', 'b'), ('c', 'd')], [('c', 'e'), ('f', 'g'), ('h',)]
    q_files, g_files = paths.same_files(np.array([1, 2]), np.array([2, 3, 4]), query, gallery)
    assert sorted(seen) == ['c', 'c', 'd', 'e']
    assert len({*q_files, *g_files}) == 5
