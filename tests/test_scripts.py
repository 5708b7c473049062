"""Each script from the outside: training, resuming, evaluation; and modified copies of a script."""

import json
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, SCRIPTS, TINY
from tiny import Tiny

import data_manager

EPOCHS = 3


def weights_of(path):
    return torch.load(path, weights_only=True)['state_dict']


def equal(one, other):
    return all(torch.equal(one[name], other[name]) for name in one | other)


@pytest.mark.parametrize('name', SCRIPTS)
def test_train_resume_evaluate(name, script, tmp_path, capsys):
    """A run that is resumed after its first epoch ends with the weights of the one that was not interrupted."""
    decay = ['--warmup', 1, '--decays', 2] if name == 'train_img_model_strong' else ['--stepsize', 2]
    options = ['--max-epoch', EPOCHS, '--eval-step', 1, *decay, '--print-freq', 2]
    assert script(name, *options, '--save-dir', tmp_path / 'whole') == 0
    out = capsys.readouterr().out
    assert 'Model size: 0.00' in out
    assert f'==> Epoch {EPOCHS}/{EPOCHS}' in out
    assert out.count('==> Test') == EPOCHS
    assert 'Finished. Total elapsed time (h:m:s): 0:0' in out
    assert (tmp_path / 'whole' / 'log_train.txt').read_text() in out
    files = {path.name for path in (tmp_path / 'whole').glob('*.pth.tar')}
    tested = {'best_model.pth.tar', *(f'checkpoint_ep{epoch + 1}.pth.tar' for epoch in range(EPOCHS))}
    assert {name for name in files if not name.startswith('resume_')} == tested
    assert len(files - tested) == min(EPOCHS, 3)  # the positions before a test

    resumed = [*options, '--save-dir', tmp_path / 'resumed', '--resume', tmp_path / 'whole' / 'checkpoint_ep1.pth.tar']
    assert script(name, *resumed) == 0
    assert '==> Epoch 1/' not in capsys.readouterr().out
    last = f'checkpoint_ep{EPOCHS}.pth.tar'
    one, other = (torch.load(tmp_path / folder / last, weights_only=True) for folder in ('whole', 'resumed'))
    assert equal(one['state_dict'], other['state_dict'])
    assert (one['epoch'], one['best_rank1']) == (other['epoch'], other['best_rank1'])

    results = json.loads((tmp_path / 'whole' / 'results.json').read_text())
    assert script(name, '--evaluate', '--resume', tmp_path / 'whole' / last, '--save-dir', tmp_path / 'test') == 0
    out = capsys.readouterr().out
    assert 'Loading checkpoint from' in out and 'Evaluate only' in out and '==> Epoch' not in out
    tested = json.loads((tmp_path / 'test' / 'results.json').read_text())
    assert tested['mAP'] == results['mAP']
    assert (tmp_path / 'test' / 'log_test.txt').exists()


FOR_TRAINING = '--train-batch 999 --start-epoch 999 --auto-resume --overwrite --resume-weights-only --sync-bn'


@pytest.mark.parametrize('name', SCRIPTS)
def test_a_test_needs_nothing_of_the_training(name, script, data_dir, tmp_path, capsys, recwarn):
    """No images, no identities, no batch that can be composed of them; with weights or without."""
    video = '_vid_' in name
    parts = ['mars/bbox_train', *('mars/info/' + part for part in ('train_name.txt', 'tracks_train_info.mat'))]
    for part in parts if video else ['market1501/bounding_box_train']:
        assert (data_dir / part).exists()
    root = tmp_path / 'data'
    missing = shutil.ignore_patterns('bbox_train', 'train_name.txt', 'tracks_train_info.mat', 'bounding_box_train')
    shutil.copytree(data_dir, root, ignore=missing)
    model = Tiny(11)
    if name == 'train_img_model_strong':
        model.add_neck()
    torch.save(model.state_dict(), tmp_path / 'eleven.pth')
    odd = FOR_TRAINING.split() + (['--num-instances', 7, '--margin', 0] if 'htri' in name else ['--cache', 'ram'])
    for resume in ([], ['--resume', tmp_path / 'eleven.pth']):
        figures = []
        for data in (
            [],
            ['--data-dir', root],
            ['--data-dir', root, *(option for option in odd if resume or option != '--auto-resume')],
        ):
            save_dir = tmp_path / f'log{len(figures)}'
            assert script(name, '--evaluate', *data, *resume, '--save-dir', save_dir) == 0
            out, err = capsys.readouterr()
            assert err == '' and 'Evaluate only' in out
            assert ('  train    |     0 |        0\n' in out) == bool(data)
            assert ('It can be tested, but not trained on: ' in out) == bool(data)
            assert ('The classifier has the 11 identities of ' in out) == bool(resume and not data)
            assert 'Not loaded' not in out
            figures.append(json.loads((save_dir / 'results.json').read_text())['mAP'])
        assert figures[0] == figures[1] == figures[2]
    assert not [warning for warning in recwarn if 'zero-element' in str(warning.message)]
    assert script(name, '--data-dir', root, '--save-dir', tmp_path / 'log') == 2
    assert 'contains no b' in capsys.readouterr().err.splitlines()[0]


@pytest.mark.parametrize('name', ['train_img_model_xent_htri', 'train_vid_model_xent'])
def test_workers_change_nothing(name, script, tmp_path):
    for workers in (0, 2):
        assert script(name, '--max-epoch', 2, '--workers', workers, '--save-dir', tmp_path / str(workers)) == 0
    none, two = (weights_of(tmp_path / str(workers) / 'checkpoint_ep2.pth.tar') for workers in (0, 2))
    assert equal(none, two)


def test_another_seed_is_another_run(script, tmp_path):
    for seed in (1, 1, 2):
        options = ['--max-epoch', 1, '--seed', seed, '--save-dir', tmp_path / str(seed), '--overwrite']
        assert script('train_img_model_xent', *options) == 0
    one, two = (weights_of(tmp_path / str(seed) / 'checkpoint_ep1.pth.tar') for seed in (1, 2))
    assert not equal(one, two)


def test_the_learning_rate_decays_by_epochs(script, tmp_path):
    for stepsize, expected in ((1, 3e-6), (0, 3e-4)):
        folder = tmp_path / str(stepsize)
        assert script('train_img_model_xent', '--max-epoch', 2, '--stepsize', stepsize, '--save-dir', folder) == 0
        state = torch.load(folder / 'checkpoint_ep2.pth.tar', weights_only=True)['state']
        assert state['optimizer']['param_groups'][0]['lr'] == pytest.approx(expected)


def test_resume_with_another_recipe_is_one_line(script, tmp_path, capsys):
    assert script('train_img_model_xent', '--max-epoch', 1, '--save-dir', tmp_path) == 0
    resume = ['--resume', tmp_path / 'checkpoint_ep1.pth.tar', '--save-dir', tmp_path, '--max-epoch', 2]
    capsys.readouterr()
    assert script('train_img_model_xent', *resume, '--lr', '0.1') == 2
    err = capsys.readouterr().err
    assert err.startswith('error: --resume') and err.count('\n') == 1 and '--lr was 0.0003, is 0.1' in err
    assert script('train_img_model_xent_htri', *resume, '--stepsize', 20) == 2
    assert '--margin was not an option, is 0.3' in capsys.readouterr().err
    assert script('train_img_model_xent', *resume, '--workers', 1, '--test-batch', 3) == 0


def test_a_loss_that_is_not_finite_saves_nothing(script, tmp_path, capsys):
    assert script('train_img_model_xent', '--max-epoch', 9, '--lr', '1e38', '--save-dir', tmp_path) == 2
    assert 'not finite' in capsys.readouterr().err
    assert not list(tmp_path.glob('*.pth.tar'))


def test_a_missing_data_set_is_one_message(script, tmp_path, capsys):
    assert script('train_img_model_xent', '--data-dir', tmp_path / 'nowhere', '--save-dir', tmp_path / 'log') == 2
    err = capsys.readouterr().err
    assert err.startswith('error: ') and 'bounding_box_train' in err and 'toy_market1501' in err


def test_from_another_folder(python, data_dir, tmp_path):
    found = python(
        ROOT / 'train_img_model_xent.py', *TINY, '--pretrained', 'none', '--data-dir', data_dir, '--max-epoch', 1,
        '--train-batch', 8, cwd=tmp_path,
    )  # fmt: skip
    assert (found.returncode, found.stderr) == (0, '')
    assert (tmp_path / 'log' / 'checkpoint_ep1.pth.tar').exists()


@pytest.mark.parametrize(
    ('name', 'table', 'whole'),
    [('train_img_model_xent', 'IMAGES', 'market1501'), ('train_vid_model_xent_htri', 'TRACKLETS', 'mars')],
)
def test_a_data_set_of_one_s_own(name, table, whole, script, data_dir, tmp_path, monkeypatch):
    """It needs three lists, and a line in the table; its pids may be any whole numbers."""
    same = data_manager.init_dataset(whole, data_dir)
    train = [(paths, 7 * same.train_pids[label] - 9, camid) for paths, label, camid in same.train]
    own = SimpleNamespace(train=train, query=same.query, gallery=same.gallery)
    monkeypatch.setitem(getattr(data_manager, table), 'own', lambda data_dir: own)
    for dataset in (whole, 'own'):
        assert script(name, '-d', dataset, '--max-epoch', 1, '--save-dir', tmp_path / dataset) == 0
    one, other = (weights_of(tmp_path / dataset / 'checkpoint_ep1.pth.tar') for dataset in (whole, 'own'))
    assert equal(one, other)


def test_a_copy_with_another_loss_trains_and_resumes(script, tmp_path, monkeypatch, capsys):
    """How people start an experiment of their own."""
    text = (ROOT / 'train_img_model_xent.py').read_text()
    option = "parser.add_argument('--scale', type=float, default=2.0, help='of the loss')\n"
    for old, new in (
        ('parser.set_defaults(', option + 'parser.set_defaults('),
        ('criterion_xent(logits.float(), pids)', 'args.scale * nn.functional.multi_margin_loss(logits.float(), pids)'),
        ('from torch.optim import Adam\n', 'from torch import nn\nfrom torch.optim import Adam\n'),
    ):
        assert old in text
        text = text.replace(old, new)
    (tmp_path / 'my_experiment.py').write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, 'my_experiment', raising=False)
    options = ['--eval-step', 1, '--max-epoch', 2]
    assert script('my_experiment', *options, '--save-dir', tmp_path / 'a') == 0
    resume = [*options, '--resume', tmp_path / 'a' / 'checkpoint_ep1.pth.tar', '--save-dir', tmp_path / 'b']
    assert script('my_experiment', *resume) == 0
    one, other = (weights_of(tmp_path / folder / 'checkpoint_ep2.pth.tar') for folder in 'ab')
    assert equal(one, other)
    capsys.readouterr()
    assert script('my_experiment', *resume, '--scale', '3') == 2
    assert '--scale was 2.0, is 3.0' in capsys.readouterr().err


@pytest.mark.parametrize('arch', ['timm:test_vit', 'timm:test_convnext'])
@pytest.mark.parametrize('name', ['train_img_model_xent', 'train_img_model_strong'])
def test_a_network_of_timm_learns_resumes_and_is_tested(name, arch, script, tmp_path, capsys):
    timm = pytest.importorskip('timm')
    size = ['-a', arch, '--height', 64, '--width', 32]
    options = [*size, '--max-epoch', 2, '--eval-step', 1, '--save-dir']
    assert script(name, *options, tmp_path / 'whole') == 0
    out = capsys.readouterr().out
    licence = timm.get_pretrained_cfg(arch.removeprefix('timm:')).license
    assert f'have the licence {licence}\n' in out
    assert script(name, *options, tmp_path / 'resumed', '--resume', tmp_path / 'whole' / 'checkpoint_ep1.pth.tar') == 0
    first, one, other = (
        weights_of(tmp_path / folder / f'checkpoint_ep{epoch}.pth.tar')
        for folder, epoch in (('whole', 1), ('whole', 2), ('resumed', 2))
    )
    assert equal(one, other) and not equal(first, one)
    whole = json.loads((tmp_path / 'whole' / 'results.json').read_text())
    last = tmp_path / 'whole' / 'checkpoint_ep2.pth.tar'
    assert script(name, *size, '--evaluate', '--resume', last, '--save-dir', tmp_path / 'test') == 0
    assert json.loads((tmp_path / 'test' / 'results.json').read_text())['mAP'] == whole['mAP']


def test_a_quiet_run_prints_its_progress_to_the_log_alone(script, tmp_path, capsys):
    assert script('train_img_model_xent', '--quiet', '--max-epoch', 2, '--save-dir', tmp_path) == 0
    out, log = capsys.readouterr().out, (tmp_path / 'log_train.txt').read_text()
    assert 'Epoch' not in out and 'Batch' not in out and 'mAP: ' in out
    assert '==> Epoch 2/2\n' in log and 'mAP: ' in log
