"""Whether the experiments learn: training of the real network on toy data, for minutes each. `make soak` runs them."""

import json
import re
import resource
import shlex
import subprocess
import sys

import pytest
from conftest import ROOT, SCRIPTS

pytestmark = pytest.mark.soak

MAKEFILE = (ROOT / 'Makefile').read_text()
SMALL = ['--height', '96', '--width', '48', '--pretrained', 'none', '--workers', '2']
DEMO = shlex.split(re.search(r'train_img_model_xent\.py((?:[^\n]*\\\n)*[^\n]*)', MAKEFILE)[1].replace('\\\n', ' '))
EPOCHS = {  # about 3 minutes on 2 cores
    'train_img_model_cent': 5,
    'train_img_model_strong': 30,
    'train_img_model_xent': 5,
    'train_img_model_xent_htri': 26,
    'train_vid_model_xent': 4,
    'train_vid_model_xent_htri': 45,
}
assert EPOCHS.keys() == set(SCRIPTS)  # noticed when the tests are collected, as these run rarely
# The strong recipe is made for long training: more epochs of a smaller network, its schedule in proportion
MORE = {'train_img_model_strong': ['-a', 'resnet18', '--lr', '0.0007', '--warmup', '3', '--decays', '10', '18']}


@pytest.fixture(scope='module')
def toys(tmp_path_factory):
    return tmp_path_factory.mktemp('toys')


def results(name, save_dir, *args) -> dict:
    """What a script's last test wrote, run from the shell."""
    command = [sys.executable, ROOT / f'{name}.py', *args, '--save-dir', save_dir]
    subprocess.run([*map(str, command)], check=True, capture_output=True)
    return json.loads((save_dir / 'results.json').read_text())


def cpu_minutes() -> float:
    """Of all processes so far that have ended, on both cores: a busy machine takes longer, but has no more to do."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return (usage.ru_utime + usage.ru_stime) / 60


@pytest.mark.parametrize('name', SCRIPTS)
def test_a_script_at_least_doubles_the_map_of_its_untrained_self(name, toys, tmp_path, capsys):
    data = ['-d', 'toy_mars' if 'vid' in name else 'toy_market1501', '--data-dir', toys]
    options = [*SMALL, *MORE.get(name, [])]
    before = results(name, tmp_path / 'before', *data, *options, '--evaluate')
    begun = cpu_minutes()
    after = results(name, tmp_path / 'after', *data, *options, '--max-epoch', EPOCHS[name])
    took = cpu_minutes() - begun
    with capsys.disabled():
        print(
            f'\n{name}: mAP {before["mAP"]:.1%} -> {after["mAP"]:.1%}, Rank-1 {after["cmc"][0]:.1%}, '
            f'{took:.1f} minutes of a core'
        )
    assert after['mAP'] >= 2 * before['mAP']


@pytest.mark.parametrize('seed', [1, 2, 3])
def test_the_demo(seed, toys, tmp_path, capsys):
    """The command of `make demo`, but for the folder."""
    seeded = [*DEMO, '--data-dir', toys, '--seed', seed]
    before = results('train_img_model_xent', tmp_path / 'before', *seeded, '--evaluate')
    begun = cpu_minutes()
    after = results('train_img_model_xent', tmp_path / 'after', *seeded)
    took = cpu_minutes() - begun
    with capsys.disabled():
        print(
            f'\nseed {seed}: mAP {before["mAP"]:.1%} -> {after["mAP"]:.1%}, Rank-1 {after["cmc"][0]:.1%}, '
            f'{took:.1f} minutes of a core'
        )
    assert after['mAP'] >= 0.75 and after['cmc'][0] >= 0.9
    assert before['mAP'] < after['mAP'] / 4
