"""The examples of CONTRIBUTING.md, added to a copy of the project as described there, do what it says."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from conftest import HANG, ROOT, TINY
from PIL import Image

BLOCKS = re.findall(r'```python\n(.*?)```', (ROOT / 'CONTRIBUTING.md').read_text(), re.S)
IMPORTS = {  # which the examples leave to the reader
    'readers/shop.py': 'import os\n\nfrom readers.tree import Dataset, Image\n',
    'models/SqueezeNet.py': 'from collections.abc import Set\n\nfrom torch import Tensor, nn\n'
    'from torchvision.models import SqueezeNet1_1_Weights, squeezenet1_1\n\n'
    'from models.layouts import Layout\nfrom models.network import Network\n',
    'script': 'import numpy as np\nfrom torch import Tensor, nn\n',
}
PLAIN = '''
class Plain:
    """The same images: three lists and nothing else, pids as on disk."""

    def __init__(self, data_dir: str = 'data') -> None:
        parts = ('train', 'query', 'gallery')
        self.train, self.query, self.gallery = (scan(os.path.join(data_dir, 'shop', part)) for part in parts)
'''
BACKBONE = """
import models, torch, weights
model = models.init_model('squeezenet', 5)
weights.pretrain(model, 'weights.pth')
assert torch.equal(model.base[12].expand3x3.weight, torch.load('weights.pth')['features.12.expand3x3.weight'])
assert model.eval()(torch.zeros(2, 3, 64, 32)).shape == (2, 512)
"""

# Importing the project takes longer than most of these commands, so they run one after the other in one process.
RUN_ALL = """
import contextlib, io, json, runpy, sys, traceback
import tiny, torch
torch.set_num_threads(1)
ends = {}
for name, (first, *words) in json.load(sys.stdin).items():
    out, err, status, sys.argv = io.StringIO(), io.StringIO(), 0, [first, *words]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            exec(words[0], {}) if first == '-c' else runpy.run_path(first, run_name='__main__')
        except SystemExit as end:
            status = end.code or 0
        except Exception:
            status = traceback.format_exc()
    ends[name] = status, out.getvalue(), err.getvalue()
json.dump(ends, sys.stdout)
"""


def xent(*options, script='train_img_model_xent.py', dataset='shop') -> list[str]:
    shared = ['--pretrained', 'none', '--train-batch', 4, '--max-epoch', 2, '--eval-step', 1]
    return [script, *TINY, *map(str, ['-d', dataset, *shared, *options])]


MINE = ['--num-instances', 2, '--print-freq', 1, '--weight-norm', 0.1, '--save-dir', 'log/mine']
COMMANDS = {
    'mine': xent(*MINE, script='train_img_model_mine.py'),
    'check': ['data_manager.py', '-d', 'shop', '-j', '1'],
    'shop': xent('--save-dir', 'log/shop', '--prefetch', 3),
    'plain': xent('--save-dir', 'log/plain', dataset='plain'),
    'compare': ['report.py', 'log/mine', 'log/shop', '--out', 'compare.html'],
    **{
        f'occluded{workers}': xent(
            '--save-dir', f'log/occluded{workers}', '--workers', workers, script='train_img_model_occluded.py'
        )
        for workers in (0, 2)
    },
    **{
        name: xent(
            '--num-instances', 2, '--print-freq', 1, '--save-dir', f'log/{name}', script=f'train_img_model_{name}.py'
        )
        for name in ('sgd', 'adamw')
    },
    'backbone': ['-c', BACKBONE],
    'squeezenet': xent(
        '-a', 'squeezenet', '--height', 64, '--width', 32, '--pretrained', 'weights.pth', '--save-dir', 'log/squeeze'
    ),
    'help': ['train_img_model_xent.py', '-h'],
}


def example(text: str) -> str:
    (block,) = (block for block in BLOCKS if text in block)
    return block


def inserted(path: Path, before: str, text: str) -> None:
    """Put `text` in front of the only place in the file where `before` begins."""
    source = path.read_text()
    assert source.count(before) == 1, f'{path}: {before}'
    path.write_text(source.replace(before, text + before))


@pytest.fixture(scope='module')
def project(tmp_path_factory) -> Path:
    """A copy of the project with all examples, and data for the example of a data set."""
    folder = tmp_path_factory.mktemp('project')
    for path in ROOT.iterdir():
        if path.suffix == '.py':
            shutil.copy(path, folder)
        elif path.is_dir() and not path.name.startswith('.') and path.name not in ('data', 'log', 'saved-models'):
            shutil.copytree(path, folder / path.name, ignore=shutil.ignore_patterns('__pycache__', 'fixtures'))

    for name, text in (('readers/shop.py', 'class Shop'), ('models/SqueezeNet.py', 'class SqueezeNet')):
        (folder / name).write_text(f'{IMPORTS[name]}\n\n{example(text)}')
    with open(folder / 'readers/shop.py', 'a') as file:
        file.write(f'\n{PLAIN}')
    inserted(folder / 'data_manager.py', 'from readers.tree', 'from readers.shop import Plain, Shop\n')
    inserted(folder / 'data_manager.py', "    'toy_market1501': toy_market1501,", "    'shop': Shop, 'plain': Plain,\n")
    inserted(folder / 'models/__init__.py', 'from models.network', 'from models.SqueezeNet import SqueezeNet\n')
    inserted(folder / 'models/__init__.py', "    'densenet121': DenseNet121,", "    'squeezenet': SqueezeNet,\n")
    function, row = re.fullmatch(
        r'(.*\n)METRICS = \(\n    # \.\.\.\n(.*)\)\n', example('def r_precision'), re.S
    ).groups()
    inserted(folder / 'eval_metrics.py', '@dataclass(frozen=True)\nclass Metric', function)
    inserted(folder / 'eval_metrics.py', "    *(Metric(f'rank{k}'", row)
    (line,) = re.findall(r'    prefetch: .*\n', example('prefetch'))
    inserted(folder / 'arguments.py', '\n\n@dataclass(frozen=True)\nclass TestOptions', line)

    source = (ROOT / 'train_img_model_xent_htri.py').read_text()
    loop = re.search(r' {8}for imgs, pids, draws in .*?\n(?= {8}scheduler)', source, re.S).group()
    step = ''.join(f'        {line}\n' for line in example('norm = criterion_norm').splitlines())
    source = source.replace(loop, step).replace('\n\n\ndef main', f'\n\n\n{example("class NormLoss")}\n\ndef main')
    source = source.replace('    criterion_htri =', '    criterion_norm = NormLoss()\n    criterion_htri =')
    (folder / 'train_img_model_mine.py').write_text(IMPORTS['script'] + source)

    source = (ROOT / 'train_img_model_xent_htri.py').read_text()
    for name, text in (('sgd', 'CosineAnnealingLR'), ('adamw', 'SequentialLR')):
        imports, lines = example(text).split('\n\n')
        lines += example('margin=None')
        copy = re.sub(r' {4}(criterion_htri|optimizer|scheduler) = .*\n', '', source)
        copy = copy.replace(
            '    checkpoint =', ''.join(f'    {line}\n' for line in lines.splitlines()) + '    checkpoint ='
        )
        (folder / f'train_img_model_{name}.py').write_text(f'{imports}\n{copy}')

    source = (ROOT / 'train_img_model_xent.py').read_text()
    source = source.replace('\n\n\ndef main', f'\n\n\n{example("class Occluded")}\n\ndef main')
    source = source.replace('ImageDataset(dataset.train)', 'Occluded(dataset.train)')
    source = source.replace('for imgs, pids, draws in', 'for imgs, pids, draws, covered in')
    source = source.replace('meter.update(', 'meter.update(covered=covered.float().mean(), ')
    (folder / 'train_img_model_occluded.py').write_text(IMPORTS['script'] + source)

    rng = np.random.default_rng(0)
    for part, pids in (('train', (1, 5, 7)), ('query', (2, 4)), ('gallery', (2, 4, 9))):
        (folder / 'data' / 'shop' / part).mkdir(parents=True)
        for name in (f'{pid}_{camera}_{number}.jpg' for pid in pids for camera in (1, 2) for number in (1, 2)):
            pixels = rng.integers(0, 255, (48, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / 'data' / 'shop' / part / name)
    torch.save(torchvision.models.squeezenet1_1(weights=None).state_dict(), folder / 'weights.pth')
    return folder


@pytest.fixture(scope='module')
def ends(project) -> dict[str, tuple[int, str, str]]:
    """Exit status, standard output and errors of each of COMMANDS."""
    done = subprocess.run(
        [sys.executable, '-c', RUN_ALL], cwd=project, input=json.dumps(COMMANDS), capture_output=True, text=True,
        timeout=HANG, env={**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': f'{project}{os.pathsep}tests'},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture
def printed(ends):
    """The output of a command, which must have succeeded."""

    def text(name: str) -> str:
        status, out, err = ends[name]
        assert (status, err) == (0, ''), f'{status}\n{err}'
        return out

    return text


def weights_of(folder: Path) -> dict:
    return torch.load(folder / 'checkpoint_ep2.pth.tar', weights_only=True)['state_dict']


def metrics_of(folder: Path) -> list[dict[str, str]]:
    with open(folder / 'metrics.csv', newline='') as file:
        return list(csv.DictReader(file))


def test_a_loss(project, printed):
    assert re.search(r'\t norm \d', printed('mine'))
    assert metrics_of(project / 'log/mine')[0]['norm']
    checkpoint = torch.load(project / 'log/mine/checkpoint_ep2.pth.tar', weights_only=True)
    assert checkpoint['recipe']['weight_norm'] == 0.1


@pytest.mark.parametrize(('name', 'rates'), [('sgd', [3e-4, 1.5e-4]), ('adamw', [3e-5, 5.7e-5])])
def test_optimizer_schedule_and_soft_margin(name, rates, project, printed):
    assert re.search(r'\t htri \d', printed(name))
    rows = metrics_of(project / 'log' / name)
    seen = {int(row['epoch']): float(row['lr']) for row in rows if row['lr']}
    assert [seen[epoch] for epoch in sorted(seen)] == pytest.approx(rates)


def test_a_metric(project, printed):
    assert 'R-precision: ' in printed('mine')
    assert metrics_of(project / 'log/mine')[-1]['rprecision']
    assert 0 <= json.loads((project / 'log/mine/results.json').read_text())['rprecision'] <= 1
    assert 'rprecision' in (project / 'log/mine/results.csv').read_text().splitlines()[0]
    assert printed('compare') and 'R-precision' in (project / 'compare.html').read_text()


def test_a_data_set(project, printed):
    assert 'train    |     3 |       12' in printed('shop')
    assert '0 kinds of faults' in printed('check')


def test_a_data_set_that_is_no_more_than_three_lists(project, printed):
    assert 'train    |     3 |       12' in printed('plain')
    one, other = (weights_of(project / 'log' / name) for name in ('shop', 'plain'))
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_a_data_set_that_draws_and_returns_more(project, printed):
    """The draws are those of another number of workers."""
    one, other = (weights_of(project / 'log' / name) for name in ('occluded0', 'occluded2') if printed(name))
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert float(metrics_of(project / 'log/occluded0')[0]['covered']) == pytest.approx(0.125)


def test_a_backbone(project, printed):
    assert "torchvision's names translated" in printed('backbone')
    out = printed('squeezenet')
    assert "torchvision's names translated" in out and 'obtained 8-by-512 matrix' in out
    assert weights_of(project / 'log/squeeze')['classifier.weight'].shape == (3, 512)


def test_an_option(project, printed):
    assert re.search(
        r'^data:.*--prefetch.*batches that each worker decodes ahead.*^test:', printed('help'), re.S | re.M
    )
    checkpoint = torch.load(project / 'log/shop/checkpoint_ep2.pth.tar', weights_only=True)
    assert checkpoint['arguments']['prefetch'] == 3
