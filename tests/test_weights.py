"""Weight files: every published layout is recognised, and weights that do not fit a model are refused completely."""

import contextlib
import copy
import multiprocessing
import pickle
import socket
import urllib.error
from collections import Counter
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from conftest import HANG
from published_files import (
    TORCHVISION_NAMES,
    OldParameter,
    View,
    number,
    old_names,
    renamed,
    state_dict_of,
    tensor_of,
    text,
    write_python2,
    zip_of,
)
from torch import nn
from torchvision.models import DenseNet121_Weights, ResNet50_Weights

import models
import weights
from files import download
from models import loading
from models.network import Network, Training
from runtime.errors import UserError

LONGER = ('base.6.6.conv1.weight', 'base.denseblock4.denselayer17.norm1.weight')  # ResNet101, DenseNet169
KEYS = {'resnet50': 267, 'resnet50m': 538, 'densenet121': 606}  # in a file of PyTorch 0.3


@pytest.fixture(scope='module', params=list(KEYS))
def model(request):
    torch.manual_seed(0)
    model = models.init_model(request.param, 5)
    model.arch = request.param
    return model


@pytest.fixture(scope='module')
def resnet():
    torch.manual_seed(1)
    return models.init_model('resnet50', 5)


@pytest.fixture
def folder(tmp_path):
    """A folder that is emptied after the test: these files are large."""
    yield tmp_path
    for path in tmp_path.glob('*.pth*'):
        path.unlink()


def saved(value, path, **options):
    torch.save(value, path, **options)
    return path


def without_counters(state_dict):
    return {key: value for key, value in state_dict.items() if not key.endswith('num_batches_tracked')}


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def filled_with_sevens(model):
    for tensor in model.state_dict().values():
        tensor.fill_(7)
    return model


class Tiny(Network):
    def __init__(self, num_classes=5):
        super().__init__(num_classes)
        self.base = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8))
        self.classifier = nn.Linear(8, num_classes)


# --------------------------------------------------------------------------------------------------- published layouts


@pytest.mark.parametrize('prefix', ['', 'module.'])
def test_files_of_the_original(model, prefix, folder):
    names = old_names(model.state_dict(), prefix)
    assert len(names) == KEYS[model.arch]
    path = folder / 'best_model.pth.tar'
    write_python2(path, {'state_dict': names, 'rank1': np.float32(0.854), 'epoch': 59}, location='cuda:0')
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, map_location='cpu')  # why this project has a reader of its own

    read = weights.read(path)
    assert_equal(read.state_dict, without_counters(model.state_dict()))
    assert read.rank1 == pytest.approx(0.854)
    assert read.epoch == 59
    assert read.state is None
    assert all(tensor.device.type == 'cpu' and not tensor.requires_grad for tensor in read.state_dict.values())
    assert read.layout.startswith('checkpoint with state_dict, rank1, epoch in a legacy stream')
    assert ('module.' in read.layout) == (prefix == 'module.')
    assert ('second names' in read.layout) == (model.arch == 'resnet50m')
    assert ('dotted' in read.layout) == (model.arch == 'densenet121')
    assert '\n' not in read.layout

    twin = filled_with_sevens(copy.deepcopy(model))
    assert loading.load_into(twin, read.state_dict, allow_other_classifier=False, where=str(path)) == []
    assert_equal(without_counters(twin.state_dict()), without_counters(model.state_dict()))


def test_bare_state_dicts(model, folder):
    read = weights.read(saved(model.state_dict(), folder / 'weights.pth'))
    assert_equal(read.state_dict, model.state_dict())
    assert (read.rank1, read.epoch, read.state) == (None, None, None)
    assert read.layout == 'bare state dict in a zip file'


@pytest.mark.parametrize('prefix', ['_orig_mod.', 'module._orig_mod.', '_orig_mod.module.'])
def test_prefixes(prefix, folder):
    state_dict = Tiny().state_dict()
    read = weights.read(saved(renamed(state_dict, [], prefix), folder / 'weights.pth'))
    assert_equal(read.state_dict, state_dict)
    assert read.layout == 'bare state dict in a zip file, prefix module. or _orig_mod. removed'


def test_state_dicts_with_their_versions(folder):
    """`_metadata`, in both kinds of file; PyTorch's own legacy writer."""
    state_dict = nn.BatchNorm2d(3).state_dict()
    for zipped in (True, False):
        path = saved({'state_dict': state_dict}, folder / 'x.pth', _use_new_zipfile_serialization=zipped)
        assert_equal(weights.read(path).state_dict, dict(state_dict))


@pytest.mark.parametrize('prefix', ['', 'module.'])
def test_resnet50m_with_its_second_names_only(prefix):
    state_dict = models.init_model('resnet50m', 5).state_dict()
    later = {key: value for key, value in old_names(state_dict, prefix).items() if not key.startswith(f'{prefix}base.')}
    assert len(later) == 273
    found, notes, *_ = loading.normalised(later, 'x')
    assert_equal(found, without_counters(state_dict))
    assert notes[-1] == "second names of ResNet50M's layers merged"


def test_second_names_must_agree():
    state_dict = old_names(models.init_model('resnet50m', 5).state_dict())
    state_dict['layers3.0.conv1.weight'] = state_dict['layers3.0.conv1.weight'].clone()
    loading.normalised(state_dict, 'x')  # equal copies are one
    state_dict['layers3.0.conv1.weight'][0] += 1
    with pytest.raises(UserError, match=r'x contains base\.5\.0\.conv1\.weight twice with different values'):
        loading.normalised(state_dict, 'x')


def test_names_of_torchvision_and_torchreid(model):
    """What else is needed to have the same logits is tested with those projects' networks."""
    state_dict = renamed(model.state_dict(), TORCHVISION_NAMES)
    assert not any(key.startswith('base.') for key in state_dict)
    found, notes, *_ = loading.normalised(state_dict, 'x')
    base = {key: value for key, value in model.state_dict().items() if key.startswith('base.')}
    assert found.keys() - {'last_relu'} == model.state_dict().keys()
    assert_equal({key: found[key] for key in base}, base)
    assert any('translated' in note for note in notes)


def test_foreign_names_of_other_models_are_left_alone():
    state_dict = {'module.conv1.weight': torch.zeros(2), 'module.fc.weight': torch.zeros(2)}
    found, notes, *_ = loading.normalised(state_dict, 'x')
    assert list(found) == ['conv1.weight', 'fc.weight']
    assert notes == ['prefix module. or _orig_mod. removed']


def test_checkpoint_of_this_project(folder):
    state = {
        'format': weights.FORMAT,
        'state_dict': {'module.weight': torch.ones(2)},  # a submodule of that name: kept as it is
        'rank1': 0.5,
        'epoch': 3,
        'optimizer': torch.optim.Adam([nn.Parameter(torch.ones(2))]).state_dict(),
        'args': {'lr': 3e-4, 'arch': 'resnet50', 'gpu': None, 'flag': True, 'sizes': [1, (2, 3)]},
    }
    read = weights.read(saved(state, folder / 'x.pth'))
    assert read.layout == 'checkpoint of this project'
    assert read.state.keys() == state.keys()
    assert read.state['args'] == state['args']
    assert (read.rank1, read.epoch, list(read.state_dict)) == (0.5, 3, ['module.weight'])
    with pytest.raises(UserError, match='has the format deep-person-reid 2, not deep-person-reid 1'):
        weights.read(saved({**state, 'format': 'deep-person-reid 2'}, folder / 'x.pth'))


@pytest.mark.parametrize('kind', [np.float32, np.float64, float, int])
@pytest.mark.parametrize('writer', ['python 2', 'zip', 'legacy'])
def test_rank1_of_any_writer(kind, writer, folder):
    path, contents = folder / 'x.pth', {'state_dict': {'weight': torch.ones(2)}, 'rank1': kind(1), 'epoch': 300}
    if writer == 'python 2':
        write_python2(path, contents)
    else:
        torch.save(contents, path, _use_new_zipfile_serialization=writer == 'zip')
    read = weights.read(path)
    assert type(read.rank1) is float
    assert (read.rank1, read.epoch) == (1.0, 300)


def test_rare_contents(folder):
    """Parameters instead of tensors, old and new; views of storages; shared storages; the counter of a MultiStepLR."""
    first = torch.arange(6.0).view(2, 3)
    path = folder / 'x.pth'
    write_python2(path, {'state_dict': {'a': OldParameter(first), 'b': View(first, 2, 3), 'c': first.T, 'd': first}})
    found = weights.read(path).state_dict
    assert_equal(found, {'a': first, 'b': first.flatten()[2:5], 'c': first.T, 'd': first})
    assert found['d'].data_ptr() == found['a'].data_ptr()

    contents = {'state_dict': {'a': nn.Parameter(first), 'e': torch.zeros(0), 'f': torch.tensor(3)}, 'rank1': 'best'}
    contents |= {'milestones': Counter({20: 1}), 'epoch': 1.5}
    read = weights.read(saved(contents, path))
    assert_equal(read.state_dict, {'a': first, 'e': torch.zeros(0), 'f': torch.tensor(3)})
    assert not read.state_dict['a'].requires_grad
    assert (read.rank1, read.epoch) == (None, None)


@pytest.mark.parametrize(
    ('value', 'message'),
    [
        ([], 'contains no weights but a list; give'),
        ({}, 'contains no weights but a dict; give'),
        ({'lr': 1}, 'contains no weights: lr is a int, not a tensor; give'),
        ({'state_dict': None}, 'contains no weights but a NoneType; give'),
        ({'state_dict': {1: torch.ones(1)}}, 'contains no weights: 1 is not the name of a tensor; give'),
    ],
)
def test_a_file_without_weights_is_refused_in_one_line(value, message, folder):
    path = saved(value, folder / 'x.pth')
    with pytest.raises(UserError, match=f'^{path} {message}') as refused:
        weights.read(path)
    assert str(refused.value).isprintable()


@pytest.mark.parametrize('rank1', [10**600, -(10**600)])
def test_a_rank1_that_is_no_fraction(tmp_path, rank1):
    value = (
        b'}(' + text('state_dict') + state_dict_of(tensor_of(0, 0, (0,), (1,))) + text('rank1') + number(rank1) + b'u'
    )
    (tmp_path / 'x.pth').write_bytes(zip_of(value, {'archive/data/0': b''}))
    assert weights.read(tmp_path / 'x.pth').rank1 is None


def test_a_tensor_that_has_only_a_shape(tmp_path):
    """The network would be built with as many classes: a file of a megabyte could fill the memory."""
    path = tmp_path / 'huge.pth'
    torch.save({**Tiny(3).state_dict(), 'classifier.weight': torch.zeros(2**40, 0)}, path)
    with pytest.raises(
        UserError, match=r'huge.pth: classifier.weight has no elements, only the shape \(1099511627776, 0\)'
    ):
        weights.read(path)


# ------------------------------------------------------------------------------------------------------------- loading


def load(model, state_dict, allow=False):
    return loading.load_into(model, state_dict, allow_other_classifier=allow, where='best.pth')


def test_other_classifier():
    state_dict = Tiny(7).state_dict()
    model = filled_with_sevens(Tiny(5))
    with pytest.raises(
        UserError, match=r'best\.pth has a classifier for a different .* 7×8 .* 5×8.*--evaluate.*--resume-weig'
    ):
        load(model, state_dict)
    assert (model.base[0].weight == 7).all()
    (notice,) = load(model, state_dict, allow=True)
    assert notice == (
        'Not loaded from best.pth: classifier.weight 7×8 where the model has 5×8, '
        'classifier.bias 7 where the model has 5'
    )
    assert_equal(model.base.state_dict(), {key[5:]: state_dict[key] for key in state_dict if key.startswith('base.')})
    assert (model.classifier.weight == 7).all()


def test_without_a_classifier():
    """A test does not use it, and neither does a training that starts from the other weights."""
    state_dict = {key: value for key, value in Tiny(7).state_dict().items() if not key.startswith('classifier.')}
    model = filled_with_sevens(Tiny(5))
    with pytest.raises(UserError, match=r'missing classifier\.weight, classifier\.bias'):
        load(model, state_dict)
    assert (model.base[0].weight == 7).all()
    (notice,) = load(model, state_dict, allow=True)
    assert notice == 'Not loaded from best.pth: classifier.weight, classifier.bias, which it does not contain'
    assert_equal(model.base.state_dict(), {key[5:]: state_dict[key] for key in state_dict})
    assert (model.classifier.weight == 7).all()
    with pytest.raises(UserError, match=r'missing classifier\.bias;'):
        load(model, {**state_dict, 'classifier.weight': torch.ones(5, 8)}, allow=True)


def test_a_classifier_of_the_files_size(capsys):
    """For a test. Weights without a classifier, or with one for other features, do not change the model."""
    state_dict = Tiny(7).state_dict()
    model = filled_with_sevens(Tiny(5)).double()
    loading.fit_classifier(model, state_dict, 'best.pth')
    assert capsys.readouterr().out == 'The classifier has the 7 identities of best.pth instead of 5\n'
    assert load(model, state_dict) == [] and model.num_classes == 7
    assert torch.equal(model.classifier.weight, state_dict['classifier.weight'].double())
    for unfit in (
        {**state_dict, 'classifier.weight': torch.ones(4, 9), 'classifier.bias': torch.ones(4)},
        {**state_dict, 'classifier.weight': torch.ones(4, 8)},
        {**state_dict, 'classifier.weight': torch.ones(0, 8), 'classifier.bias': torch.ones(0)},
        {key: value for key, value in state_dict.items() if key != 'classifier.bias'},
        {key: value for key, value in state_dict.items() if not key.startswith('classifier')},
        state_dict,
    ):
        loading.fit_classifier(model, unfit, 'best.pth')
        assert model.classifier.out_features == model.num_classes == 7
    model = Tiny(1)  # of a data set without a training set
    loading.fit_classifier(model, state_dict, 'best.pth')
    assert model.num_classes == 7 and capsys.readouterr().out == ''


@pytest.mark.parametrize('allow', [True, False])
@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (
            lambda s: s.pop('base.0.bias'),
            r'^best\.pth does not fit the model: missing base\.0\.bias; it does not look like an arch',
        ),
        (lambda s: s.pop('classifier.weight'), r'missing classifier\.weight;'),
        (lambda s: s.update({'extra.weight': torch.ones(1)}), r'unexpected extra\.weight;'),
        (
            lambda s: s.update({'base.1.bias': torch.ones(9)}),
            r'different shapes in base\.1\.bias 9 where the model has',
        ),
        (lambda s: s.update({'base.1.bias': torch.ones(8, dtype=torch.int32)}), r'bias 8 int32 where the model has 8;'),
        (lambda s: s.update({'base.1.bias': torch.tensor(1.0)}), r'bias scalar where the model has 8;'),
        (lambda s: s.clear(), r'missing (\S+, ){5,7}\S+; it'),
        (
            lambda s: s.update({str(i): torch.ones(1) for i in range(99)}),
            r'unexpected 0, 1, 2, 3, 4, 5, 6, 7 and 91 more;',
        ),
        (lambda s: s.update({'a\x1b[31m\nb': torch.ones(1)}), r'unexpected a\\x1b\[31m;'),
    ],
)
def test_everything_else_is_refused_whole(change, message, allow):
    state_dict = dict(Tiny().state_dict())
    change(state_dict)
    model = filled_with_sevens(Tiny())
    with pytest.raises(UserError, match=message):
        load(model, state_dict, allow)
    assert all((tensor == 7).all() for tensor in model.state_dict().values())  # nothing was copied


def test_architecture_is_guessed(model):
    found = loading.normalised(old_names(model.state_dict()), 'x').state_dict
    assert loading.arch_of(found) == model.arch
    for arch in KEYS.keys() - {model.arch}:
        with torch.device('meta'):
            other = models.init_model(arch, 5)
        with pytest.raises(UserError, match=f'it looks like a {model.arch}: try --arch {model.arch}$'):
            load(other, found)
    assert loading.arch_of({**found, **dict.fromkeys(LONGER, torch.zeros(1))}) is None
    del found['classifier.bias']
    with pytest.raises(
        UserError, match=f'missing classifier.bias; it looks like a {model.arch} that differs from this'
    ):
        load(model, found)


def test_half_precision_weights_load():
    state_dict = Tiny().state_dict()
    model = filled_with_sevens(Tiny())
    load(model, {key: value.half() if value.is_floating_point() else value for key, value in state_dict.items()})
    assert model.base[0].weight.dtype == torch.float32
    torch.testing.assert_close(model.base[0].weight, state_dict['base.0.weight'], rtol=1e-3, atol=1e-4)


# ---------------------------------------------------------------------------------------------------------- pretrained


@pytest.fixture
def hub(folder, monkeypatch):
    """An empty cache of torchvision's weights, and no network."""
    (folder / 'hub/checkpoints').mkdir(parents=True)
    monkeypatch.setenv('TORCH_HOME', str(folder))

    def unreachable(*_, **__):
        raise urllib.error.URLError('no network')

    monkeypatch.setattr(torch.hub, 'download_url_to_file', unreachable)
    yield folder / 'hub/checkpoints'
    for path in (folder / 'hub/checkpoints').iterdir():
        path.unlink()


def test_imagenet_weights_from_the_cache(model, hub, capsys):
    imagenet = DenseNet121_Weights if model.arch == 'densenet121' else ResNet50_Weights
    state_dict = {
        key: value for key, value in model.state_dict().items() if not key.startswith(('classifier', 'fc_fuse'))
    }
    cached = old_names(renamed(state_dict, TORCHVISION_NAMES))  # torchvision's DenseNet is a file with dots
    last = 'classifier' if model.arch == 'densenet121' else 'fc'
    cached |= {f'{last}.weight': torch.zeros(1000, 8), f'{last}.bias': torch.zeros(1000)}
    saved(cached, hub / Path(imagenet.IMAGENET1K_V1.url).name)

    taken = models.init_model(model.arch, 4)
    weights.pretrain(taken, 'imagenet')
    assert_equal(
        {key: taken.state_dict()[key] for key in state_dict if 'num_batches' not in key}, without_counters(state_dict)
    )
    said = capsys.readouterr().out
    assert f"Loaded pretrained weights from torchvision's ImageNet weights ({imagenet.__name__}.IMAGENET1K_V1)" in said
    assert 'Not loaded: classifier.weight, classifier.bias' in said
    assert 'Initialised at random: ' in said
    assert ('fc_fuse.1.running_mean' in said) == (model.arch == 'resnet50m')
    assert taken.classifier.weight.shape[0] == 4
    assert taken.trained.of_imagenet and ('fc_fuse.1.running_mean' in taken.trained.missing) == ('fc_fuse' in said)
    assert weights.read(hub / Path(imagenet.IMAGENET1K_V1.url).name).trained.of_imagenet  # given by --resume


def test_imagenet_weights_without_a_network(resnet, hub):
    with pytest.raises(UserError) as refused:
        weights.pretrain(resnet, 'imagenet')
    message = str(refused.value)
    assert 'could not be downloaded (no network)' in message
    assert 'resnet50-0676ba61.pth' in message
    assert str(hub) in message
    assert '--pretrained none' in message
    (hub / 'resnet50-0676ba61.pth').write_bytes(b'PK\x03\x04 cut short')
    with pytest.raises(UserError, match=r'resnet50-0676ba61\.pth is damaged .*; delete it'):
        weights.pretrain(resnet, 'imagenet')
    with pytest.raises(UserError, match='Tiny has no ImageNet weights'):
        weights.pretrain(Tiny(), 'imagenet')


ANSWER = b'HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n'


def serve(server, answer, stays):
    connection, _ = server.accept()
    connection.sendall(answer)
    while stays and connection.recv(1000):  # until the other side gives up
        pass


@pytest.mark.parametrize(
    ('answer', 'stays', 'reason'),
    [
        (b'', True, 'timed out'),
        (ANSWER, True, 'timed out'),
        (ANSWER + b'PK', True, 'timed out'),
        (ANSWER + b'PK', False, 'invalid hash value|IncompleteRead|Connection reset'),
        (b'', False, 'without response|Connection reset'),
    ],
    ids=['silent', 'stalls before the data', 'stalls in the middle', 'ends early', 'hangs up'],
)
def test_a_download_that_ends_in_the_middle_or_never(answer, stays, reason, tmp_path, monkeypatch):
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    monkeypatch.setenv('no_proxy', '*')
    with socket.create_server(('127.0.0.1', 0)) as server:
        process = multiprocessing.get_context('fork').Process(target=serve, args=(server, answer, stays))
        process.start()
        url = f'http://127.0.0.1:{server.getsockname()[1]}/resnet50-0676ba61.pth'
        imagenet = SimpleNamespace(url=url, get_state_dict=partial(torch.hub.load_state_dict_from_url, url))
        start = rf'^the ImageNet weights could not be downloaded \(.*({reason}).*\); download {url} into '
        with pytest.raises(UserError, match=start):
            download.fetch(imagenet, timeout=0.2 if stays else HANG)
        process.join()
    assert socket.getdefaulttimeout() is None
    assert list((tmp_path / 'hub' / 'checkpoints').iterdir()) == []


def test_pretrained_path(resnet, folder, capsys):
    path = saved({'state_dict': resnet.state_dict(), 'rank1': 0.5, 'epoch': 3}, folder / 'x.pth')
    taken = models.init_model('resnet50', 9)
    random = copy.deepcopy(taken.state_dict())
    weights.pretrain(taken, 'none')
    assert_equal(taken.state_dict(), random)
    assert 'Loaded' not in capsys.readouterr().out
    assert taken.trained is None
    weights.pretrain(taken, str(path))
    assert taken.trained == Training(str(path), num_pids=resnet.num_classes, arch='resnet50')
    assert_equal(taken.base.state_dict(), resnet.base.state_dict())
    assert torch.equal(taken.classifier.weight, random['classifier.weight'])
    said = capsys.readouterr().out
    assert f'Loaded pretrained weights from {path} (checkpoint with state_dict, rank1, epoch in a zip file)' in said
    assert 'Not loaded: classifier.weight, classifier.bias\n' in said

    middle = models.init_model('resnet50m', 9)
    weights.pretrain(middle, str(path))
    assert_equal(middle.base.state_dict(), resnet.base.state_dict())
    assert 'fc_fuse.0.weight' in capsys.readouterr().out
    assert middle.trained.missing.startswith('fc_fuse.0.weight, ')

    torch.save(middle.state_dict(), path)
    with pytest.raises(UserError, match=r'unexpected fc_fuse\.0\.weight.*try --arch resnet50m'):
        weights.pretrain(taken, str(path))


@pytest.mark.parametrize('value', [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_refused_and_named(value):
    torch.manual_seed(0)
    model = tiny.Tiny(3)
    broken = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    broken['base.3.weight'][0, 0, 0, 0] = value
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(
        UserError, match=r'^a\.pth has weights that are not finite, in base\.3\.weight; get the file again$'
    ):
        loading.load_into(model, broken, allow_other_classifier=False, where='a.pth')
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())


def test_counters_of_any_type_are_accepted():
    torch.manual_seed(0)
    model, halved = tiny.Tiny(3), tiny.Tiny(3)
    state_dict = {key: tensor.half() for key, tensor in halved.state_dict().items()}
    assert loading.load_into(model, state_dict, allow_other_classifier=False, where='a.pth') == []
    torch.testing.assert_close(model.classifier.weight, halved.classifier.weight, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    'altered',
    [
        {'classifier.weight': torch.zeros(400_000, 0, dtype=torch.int64)},
        {'classifier.weight': torch.zeros(400_000, 1)},
        {'classifier.weight': torch.tensor(1.0)},
        {'embedding.0.weight': torch.zeros(400_000, 1)},
    ],
)
def test_rows_of_a_strangers_file_are_not_believed(altered, tmp_path, monkeypatch):
    """A network with so many classes would take thousands of times the memory of the file."""
    made, init = [], models.init_model
    monkeypatch.setattr(models, 'init_model', lambda *args, **parts: made.append(init(*args, **parts)) or made[-1])
    torch.save(models.init_model('osnet_x0_25', 5).state_dict() | altered, tmp_path / 'x.pth')
    with contextlib.suppress(UserError):
        weights.build(weights.read(tmp_path / 'x.pth'), None, 'x')
    assert all(value.numel() < 1e6 for value in made[-1].state_dict().values())


def test_an_image_size_of_a_strangers_file_is_not_believed(tmp_path):
    """A network of timm is tried with an image of this size."""
    state = {'format': weights.FORMAT, 'state_dict': tiny.Tiny(5).state_dict()}
    for height, expected in ((40_000, None), ('1', None), (None, None), (64, (64, 32))):
        torch.save(state | {'arguments': {'height': height, 'width': 32}}, tmp_path / 'x.pth')
        assert weights._size(weights.read(tmp_path / 'x.pth')) == expected
