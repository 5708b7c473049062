"""python weights.py: describing a file, and writing its weights in this project's layout, with the same figures."""

import importlib
import json
import resource
import sys

import projects
import pytest
import torch

import models
import weights
from files import safetensors
from runtime import commands, launch

SIZE = ['--height', '64', '--width', '32']


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    """An OSNet in torchreid's layout."""
    folder = tmp_path_factory.mktemp('files')
    torch.manual_seed(0)
    network = projects.OmniScale(0.25)
    torch.save({'state_dict': network.state_dict(), 'epoch': 60, 'rank1': 0.5}, folder / 'osnet.pth.tar')
    return folder


@pytest.fixture
def command(monkeypatch, capsys):
    """Its status, output and error message."""

    def run(*args):
        capsys.readouterr()
        monkeypatch.setattr(sys, 'argv', ['weights.py', *map(str, args)])
        status = commands.status_of(weights.main)
        return status, *capsys.readouterr()

    return run


def test_what_a_file_is(files, command):
    status, out, err = command(files / 'osnet.pth.tar')
    assert (status, err) == (0, '')
    first, digest, *rest = out.splitlines()
    assert first == (
        f"{files}/osnet.pth.tar: checkpoint with state_dict, epoch, rank1 in a zip file, torchreid's names"
    )
    assert digest.startswith('sha256: ') and len(digest) == 8 + 64
    assert rest == [
        'architecture: osnet_x0_25',
        'identities: 7',
        "layout: torchreid's names",
        'test: --height 256 --width 128 --interpolation bilinear --distance euclidean no --flip-test',
        'licence of the weights: unknown',
    ]


@pytest.mark.parametrize('suffix', ['.pth.tar', '.safetensors'])
def test_a_file_that_is_too_large_for_its_disk(suffix, files, command, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        status, _, err = command(files / 'osnet.pth.tar', tmp_path / f'x{suffix}')
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (status, err.count('\n')) == (2, 1) and 'cannot be written (File too large)' in err
    assert not list(tmp_path.iterdir())


def test_weights_that_do_not_show_their_architecture(command, tmp_path):
    pytest.importorskip('timm')
    network = models.init_model('timm:test_resnet', 5, size=(64, 32))
    torch.save(network.state_dict(), tmp_path / 'bare.pth')
    out = tmp_path / 'x.safetensors'
    status, _, err = command(tmp_path / 'bare.pth', out)
    assert status == 2 and err.endswith('its architecture cannot be recognised by its weights; give it with --arch\n')
    assert command(tmp_path / 'bare.pth', out, '-a', 'timm:test_resnet')[0] == 0
    assert 'architecture: timm:test_resnet\n' in command(out)[1]


def test_what_an_unknown_file_is(command, tmp_path):
    torch.save({'encoder.weight\x1b': torch.ones(3), 'b': torch.ones(1)}, tmp_path / 'x.pth')
    status, out, err = command(tmp_path / 'x.pth')
    assert (status, err) == (0, '')
    assert r'architecture: unknown: no network of this project has the names encoder.weight\x1b, b' in out
    assert 'identities: none, it has no classifier' in out
    status, out, err = command(tmp_path / 'x.pth', tmp_path / 'y.pth')
    assert (status, err.count('\n')) == (2, 1) and not (tmp_path / 'y.pth').exists()
    assert 'its architecture cannot be recognised' in err


def test_a_licence_that_the_file_names(command, tmp_path):
    safetensors.save(tmp_path / 'x.safetensors', {'a': torch.ones(1)}, {'license': 'cc-by-nc-4.0\x1b'})
    assert r'licence of the weights: cc-by-nc-4.0\x1b' in command(tmp_path / 'x.safetensors')[1]
    torch.save({'state_dict': {'a': torch.ones(1)}, 'licence': 'MIT'}, tmp_path / 'x.pth')
    assert 'licence of the weights: MIT' in command(tmp_path / 'x.pth')[1]


@pytest.mark.parametrize('name', ['there.pth.tar', 'there.safetensors', 'x.bin', 'none/x.pth'])
def test_what_cannot_be_written(name, files, command, tmp_path):
    for there in ('there.pth.tar', 'there.safetensors'):
        (tmp_path / there).write_text('precious')
    status, _, err = command(files / 'osnet.pth.tar', tmp_path / name)
    assert (status, err.count('\n')) == (2, 1)
    assert ('exists and is not overwritten' in err) == name.startswith('there')
    assert sorted(path.name for path in tmp_path.iterdir()) == ['there.pth.tar', 'there.safetensors']
    assert (tmp_path / 'there.pth.tar').read_text() == (tmp_path / 'there.safetensors').read_text() == 'precious'


@pytest.fixture
def tested(data_dir, monkeypatch, capsys):
    """The output of a script that tests a file with these options only."""

    def run(name, path, folder, *options):
        module = importlib.import_module(name)
        argv = [name, '--evaluate', '--resume', path, '--save-dir', folder, '--data-dir', data_dir, '--workers', 0]
        monkeypatch.setattr(sys, 'argv', [*map(str, [*argv, '--use-cpu', '--no-report', *options])])
        capsys.readouterr()
        launch.main(module.main, module.parser)
        return capsys.readouterr().out

    return run


def test_what_a_converted_file_records_is_checked(tmp_path):
    """The file is untrusted."""
    two = torch.ones(2)
    contents = {
        'format': weights.FORMAT,
        'state_dict': {'a': two},
        'converted': 'x\x1b',
        'licence': two,
        'imagenet': two,
    }
    good = {'height': 384, 'interpolation': 'bicubic', 'normalisation': [[0.5, 0.5, 0.5], (1.0, 1.0, 1.0)]}
    for model, test, made, expected in (
        (two, two, {}, {}),
        ({'last_stride': two, 'pooling': [1], 'neck_feature': 'x'}, dict.fromkeys(good, two), {}, {}),
        ({'last_stride': True}, {'height': True, 'width': 0, 'normalisation': [[1, 2, 3], 4]}, {}, {}),
        ({'last_stride': 1, 'neck': True}, good, {'last_stride': 1},
            {**good, 'normalisation': ((0.5, 0.5, 0.5), (1.0, 1.0, 1.0))}),
    ):  # fmt: skip
        torch.save({**contents, 'model': model, 'test': test}, tmp_path / 'x.pth')
        loaded = weights.read(tmp_path / 'x.pth')
        assert (loaded.made, loaded.trained.test) == (made, expected)
        assert (loaded.trained.project, loaded.licence, loaded.state) == (r'x\x1b', 'unknown', None)
    torch.save({**contents, 'converted': two}, tmp_path / 'x.pth')
    assert weights.read(tmp_path / 'x.pth').layout == 'checkpoint of this project'


def figures(out):
    return out[out.index('Extracted features for query') : out.index('Finished. ')]


@pytest.mark.parametrize('suffix', ['.pth.tar', '.safetensors'])
def test_a_converted_file_has_the_same_test(suffix, files, command, tested, tmp_path):
    out = tmp_path / f'osnet{suffix}'
    status, printed, err = command(files / 'osnet.pth.tar', out)
    assert (status, err) == (0, '') and printed.endswith(f'Wrote {out}\n')
    lines = []
    for path in (files / 'osnet.pth.tar', out):
        folder = tmp_path / path.stem
        lines.append(tested('train_img_model_xent', path, folder, *SIZE))
    assert figures(lines[0]) == figures(lines[1])
    again = tmp_path / 'again.pth.tar'
    assert command(out, again)[0] == 0
    one, other = (torch.load(path, weights_only=True) for path in (files / 'osnet.pth.tar', again))
    assert one['state_dict'].keys() == other['state_dict'].keys()
    assert all(torch.equal(one['state_dict'][name], other['state_dict'][name]) for name in one['state_dict'])
    for path in (out, again):
        described = command(path)[1]
        assert 'test: --height 256' in described and "layout: torchreid's names\n" in described


@pytest.mark.parametrize('name', ['train_img_model_xent', 'train_img_model_strong'])
def test_a_test_as_its_project_does_it(name, tested, tmp_path):
    """Options that are not given are the project's; given ones take precedence, even a script's default."""
    torch.manual_seed(0)
    path = tmp_path / 'ain.pth'
    norms = ('residual', 'residual', '', 'residual', 'residual', '')
    torch.save(projects.OmniScale(0.25, norms, True).state_dict(), path)
    out = tested(name, path, tmp_path, *SIZE)
    assert f'The network is that of {path}: osnet_ain_x0_25\n' in out
    assert (
        f"Tested as the project of {path} does (torchreid's names): --interpolation bilinear --distance cosine "
        'no --flip-test, but as given with --height 64 --width 32\n'
    ) in out
    results = json.loads((tmp_path / 'results.json').read_text())
    assert (results['distance'], results['height'], results['arch']) == ('cosine', 64, 'osnet_ain_x0_25')
    out = tested(name, path, tmp_path, *SIZE, '--distance', 'euclidean')
    assert 'but as given with --height 64 --width 32 --distance euclidean' in out
    assert json.loads((tmp_path / 'results.json').read_text())['distance'] == 'euclidean'
