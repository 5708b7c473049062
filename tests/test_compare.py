"""tests/compare.py finds what differs and nothing else, in a repository of its own with a copy of the working tree."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time

import compare
import numpy as np
import pytest
import torch
from conftest import ROOT

SCRIPT = 'train_img_model_xent'
# Without the variables by which git, in a hook, tells its repository, and without the user's settings
CLEAN = {name: value for name, value in os.environ.items() if not name.startswith('GIT_')}
CLEAN |= {'GIT_CONFIG_GLOBAL': os.devnull, 'GIT_CONFIG_NOSYSTEM': '1'}


def git(folder, *args):
    identity = ['-c', 'user.name=a', '-c', 'user.email=a@example.org', '-c', 'commit.gpgsign=false']
    command = ['git', '-C', folder, *identity, *args]
    return subprocess.run(command, capture_output=True, text=True, check=True, env=CLEAN).stdout


@pytest.fixture
def repository(tmp_path):
    """What git would take from the working tree, committed."""
    if not shutil.which('git') or not (ROOT / '.git').exists():
        pytest.skip('needs a git checkout')
    folder = tmp_path / 'repository'
    for name in git(ROOT, 'ls-files', '-z', '--cached', '--others', '--exclude-standard').split('\0'):
        if name and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    git(folder, 'init', '--quiet')
    git(folder, 'add', '.')
    git(folder, 'commit', '--quiet', '--no-verify', '-m', 'the working tree')
    return folder


@pytest.fixture
def start(repository, tmp_path):
    """`compare.py ARGS` of the repository, whose temporary files are in a folder that is empty again in the end."""
    temporary = tmp_path / 'temporary'
    temporary.mkdir()

    def run(*args, **environment):
        return subprocess.Popen(
            [sys.executable, repository / 'tests' / 'compare.py', *args], text=True, cwd=tmp_path,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
            env={**CLEAN, 'TMPDIR': str(temporary), **environment},
        )  # fmt: skip

    yield run
    assert list(temporary.iterdir()) == []
    assert git(repository, 'worktree', 'list').count('\n') == 1


def change(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_a_changed_line_is_found(repository, start):
    """It changes the training, not the test; a further option is worth a note alone."""
    script = repository / f'{SCRIPT}.py'
    change(script, 'criterion_xent(logits.float(), pids)', '1.001 * criterion_xent(logits.float(), pids)')
    change(
        script, '\n\ndef main(', "\nparser.add_argument('--warmup', type=int, default=2, help='epochs')\n\n\ndef main("
    )
    process = start('HEAD', '--only', SCRIPT)
    out, err = process.communicate(timeout=600)
    assert (process.returncode, err) == (1, '')
    for run in ('whole', 'position', 'epoch'):
        part = out.split(f'{SCRIPT}/{run}: ')[1].split(f'\n{SCRIPT}/')[0]
        assert part.startswith('differs\n')
        losses = [line for line in part.splitlines() if 'Loss ' in line]
        assert [line.strip()[0] for line in losses[:2]] == ['-', '+']
        assert 'metrics.csv\n      [0].loss: ' in part
        assert 'checkpoint_ep2.pth.tar' in part
    assert f'{SCRIPT}/evaluate: equal\n' in out
    assert 'note: the working tree alone has --warmup\n' in out
    assert '3 of 4 runs differ' in out


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_leaves_nothing(number, repository, start, tmp_path):
    """Neither files nor processes, though these would wait for long. Slow libraries are left out."""
    waits = 'import signal\nsignal.alarm(600)\nprint("waiting", flush=True)\nsignal.pause()\n'
    (repository / 'tests' / 'tiny.py').write_text(waits)
    git(repository, 'commit', '--quiet', '--all', '--no-verify', '-m', 'scripts that wait')
    stubs = tmp_path / 'stubs'
    (stubs / 'scipy').mkdir(parents=True)
    for name in ('torchvision.py', 'scipy/__init__.py', 'scipy/io.py'):
        (stubs / name).write_text('def savemat(*_):\n    pass\n')
    process = start('HEAD', '--only', SCRIPT, PYTHONPATH=str(stubs))
    outputs = f'temporary/*/*/{SCRIPT}/whole.stdout'
    while 'waiting\n' not in [path.read_text() for path in tmp_path.glob(outputs)]:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    assert git(repository, 'worktree', 'list').count('\n') == 2
    process.send_signal(number)
    assert (process.communicate(timeout=600)[1], process.returncode) == ('', 128 + number)
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)


@pytest.mark.parametrize(
    ('args', 'message'),
    [
        ([], 'error: the following arguments are required: COMMIT\n'),
        (['nowhere'], 'error: nowhere: no such commit in '),
        (
            ['HEAD', '--only', 'train_nothing', SCRIPT],
            'error: --only train_nothing: no such script in HEAD, which has ',
        ),
        (['HEAD~1'], 'error: HEAD~1 has no tests/tiny.py to run a script with: name a later commit\n'),
    ],
)
def test_a_mistake_is_one_line(args, message, repository, start):
    if args == ['HEAD~1']:
        git(repository, 'rm', '--quiet', '--cached', 'tests/tiny.py')
        for _ in 'ab':
            git(repository, 'commit', '--quiet', '--no-verify', '--allow-empty', '-m', 'without it')
    process = start(*args)
    out, err = process.communicate(timeout=600)
    assert (process.returncode, out) == (2, '')
    assert err.startswith(message) and err.count('\n') == 1


def test_values_are_compared_bit_for_bit():
    equal = {'a': [1, 2.5, math.nan], 'b': torch.tensor([math.nan, 0.0]), 'c': np.array(['x']), 'd': torch.zeros(0)}
    assert list(compare.compare_values(equal, {**equal, 'b': equal['b'].clone()})) == []
    bf16 = torch.ones(2, dtype=torch.bfloat16)
    cases = [
        (0.0, -0.0, 'x: 0.0 -> -0.0'),
        (1, 1.0, 'x: 1 -> 1.0'),
        ([1], [1, 2], 'x: 1 -> 2 entries'),
        (torch.zeros(2), torch.tensor([0.0, -0.0]), 'x: 1 of 2 values differ, by up to 0'),
        (torch.zeros(2, 2), torch.tensor([[0, 0.5], [2, 0]]), 'x: 2 of 4 values differ, by up to 2'),
        (torch.tensor(1), torch.tensor(2), 'x: 1 -> 2'),
        (torch.zeros(2), torch.zeros(2).double(), 'x: torch.float32 (2,) -> torch.float64 (2,)'),
        (bf16, bf16 + bf16, 'x: 2 of 2 values differ, by up to 1'),
        ({'y': 1}, {'z': 1}, '- x.y', '+ x.z'),
    ]
    for old, new, *expected in cases:
        assert list(compare.compare_values({'x': old}, {'x': new})) == expected


def test_paths_in_either_checkout_are_equal(tmp_path):
    """The best model of the commit is copied into a run that continues in another folder, on both sides."""
    (tmp_path / 'x').write_text(f'{tmp_path}/commit/a.py\n{tmp_path}/tree/a.py\n')
    assert compare.read(tmp_path / 'x', tmp_path / 'tree', tmp_path / 'commit') == ['a.py', 'a.py']


def test_lines_are_compared_without_what_varies(tmp_path):
    text = 'Args:Namespace(lr=0.1, steps=inf{})\n{}/a.py\nof {}.0 GB free memory\nelapsed time (h:m:s): 0:00:0{}\n'
    sides = []
    for name, values in (('old', (", gone='x, y'", tmp_path, 1, 2)), ('new', (', added=None', tmp_path, 2, 3))):
        (tmp_path / name).write_text(text.format(*values))
        sides.append(compare.read(tmp_path / name, tmp_path))
    notes = set()
    assert list(compare.compare_lines(*sides, notes)) == []
    assert notes == {'the working tree alone has --added', 'the commit alone has --gone'}
    sides[1][0] = sides[1][0].replace('0.1', '0.2')
    assert list(compare.compare_lines(sides[0], [*sides[1], 'more'], notes)) == ["Args: lr: '0.1' -> '0.2'", '+ more']


def test_files_are_compared_by_what_they_hold(tmp_path):
    """Notes, time, place, speed and revision aside; one more file, and another status, are differences."""
    sides = []
    for number, name in enumerate(('old', 'new')):
        folder = tmp_path / name
        folder.mkdir()
        (folder / 'metrics.csv').write_text(f'epoch,images_per_s,data_wait,loss\n1,{number},{number},0.{number}\n')
        (folder / 'results.json').write_text(json.dumps({'mAP': 0.5, 'date': number, 'command': [f'{folder}/a.py']}))
        place = np.frombuffer(str(folder).encode(), np.uint8)
        np.savez(folder / 'ranking.npz', ranks=np.array([1, 2 + number]), folder=place)
        made = {'revision': number, 'command': [f'{folder}/a.py']}
        options = {'lr': 1.0} | ({'new': 1} if number else {})
        state = {'arguments': options, 'recipe': options, 'provenance': made, 'state_dict': {'a': torch.zeros(1)}}
        torch.save(state | {'written': float(number)}, folder / 'best_model.pth.tar')
        sides.append({path.name: compare.read(path, folder) for path in folder.iterdir()} | {'exit status': 0})
    sides[1]['results.csv'] = []
    notes = set()
    differences = dict(compare.compare_files(*sides, notes))
    assert differences == {
        'metrics.csv': ["[0].loss: '0.0' -> '0.1'"],
        'ranking.npz': ['ranks: 1 of 2 values differ, by up to 1'],
        'results.csv': ['only in the new one'],
    }
    assert notes == {'the working tree alone has --new'}
    sides[1] |= {'exit status': 1, 'stderr': ['Traceback ...', 'ValueError: x']}
    assert dict(compare.compare_files(*sides, notes)) == {'exit status': ['0 -> 1', 'ValueError: x']}
