"""Weight files: every published layout is understood, and nothing that a stranger sends is run."""

import copy
import io
import pickle
import struct
import subprocess
import sys
import textwrap
import urllib.error
import zipfile
from collections import Counter, OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from published_files import (
    MAGIC,
    TORCHVISION_NAMES,
    OldParameter,
    Python2Pickler,
    View,
    legacy_of,
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
from runtime.errors import UserError

LONGER = ('base.6.6.conv1.weight', 'base.denseblock4.denselayer17.norm1.weight')  # ResNet101, DenseNet169
KEYS = {'resnet50': 267, 'resnet50m': 538, 'densenet121': 606}  # in a file of PyTorch 0.3


@pytest.fixture(scope='module', autouse=True)
def one_thread():
    """These tensors are so small that threads mostly wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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


class Tiny(nn.Module):
    def __init__(self, num_classes=5):
        super().__init__()
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
    assert weights.load_into(twin, read.state_dict, allow_other_classifier=False, where=str(path)) == []
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
    assert read.layout == 'bare state dict in a zip file, prefix module. or _orig_mod. dropped'


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
    found, notes = weights.normalised(later, 'x')
    assert_equal(found, without_counters(state_dict))
    assert notes[-1] == "second names of ResNet50M's layers merged"


def test_second_names_must_agree():
    state_dict = old_names(models.init_model('resnet50m', 5).state_dict())
    state_dict['layers3.0.conv1.weight'] = state_dict['layers3.0.conv1.weight'].clone()
    weights.normalised(state_dict, 'x')  # equal copies are one
    state_dict['layers3.0.conv1.weight'][0] += 1
    with pytest.raises(UserError, match=r'x names base\.5\.0\.conv1\.weight twice with different values'):
        weights.normalised(state_dict, 'x')


def test_names_of_torchvision_and_torchreid(model):
    """What else is needed to have the same logits is tested with those projects' networks."""
    state_dict = renamed(model.state_dict(), TORCHVISION_NAMES)
    assert not any(key.startswith('base.') for key in state_dict)
    found, notes = weights.normalised(state_dict, 'x')
    base = {key: value for key, value in model.state_dict().items() if key.startswith('base.')}
    assert found.keys() - {'last_relu'} == model.state_dict().keys()
    assert_equal({key: found[key] for key in base}, base)
    assert any('translated' in note for note in notes)


def test_foreign_names_of_other_models_are_left_alone():
    state_dict = {'module.conv1.weight': torch.zeros(2), 'module.fc.weight': torch.zeros(2)}
    found, notes = weights.normalised(state_dict, 'x')
    assert list(found) == ['conv1.weight', 'fc.weight']
    assert notes == ['prefix module. or _orig_mod. dropped']


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
    with pytest.raises(UserError, match='is a deep-person-reid 2, which is not deep-person-reid 1'):
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


@pytest.mark.parametrize('dtype', [torch.float64, torch.float16, torch.bfloat16, torch.int32, torch.int16, torch.bool])
def test_kinds_of_numbers(dtype, folder):
    tensor = torch.tensor([0, 1, 1, 0, 1]).to(dtype)
    for zipped in (True, False):
        path = saved({'x': tensor}, folder / 'x.pth', _use_new_zipfile_serialization=zipped)
        assert torch.equal(weights.read(path).state_dict['x'], tensor)


# ------------------------------------------------------------------------------------------------------------- loading


def load(model, state_dict, allow=False):
    return weights.load_into(model, state_dict, allow_other_classifier=allow, where='best.pth')


def test_other_classifier():
    state_dict = Tiny(7).state_dict()
    model = filled_with_sevens(Tiny(5))
    with pytest.raises(
        UserError, match=r'best\.pth has a classifier for other .* 7×8 .* 5×8.*--evaluate.*--resume-weig'
    ):
        load(model, state_dict)
    assert (model.base[0].weight == 7).all()
    (notice,) = load(model, state_dict, allow=True)
    assert notice == (
        'Left out from best.pth: classifier.weight 7×8 where the model has 5×8, classifier.bias 7 where the model has 5'
    )
    assert_equal(model.base.state_dict(), {key[5:]: state_dict[key] for key in state_dict if key.startswith('base.')})
    assert (model.classifier.weight == 7).all()


@pytest.mark.parametrize('allow', [True, False])
@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (
            lambda s: s.pop('base.0.bias'),
            r'^best\.pth does not fit the model: missing base\.0\.bias; it looks like no arch',
        ),
        (lambda s: s.pop('classifier.weight'), r'missing classifier\.weight;'),
        (lambda s: s.update({'extra.weight': torch.ones(1)}), r'unexpected extra\.weight;'),
        (lambda s: s.update({'base.1.bias': torch.ones(9)}), r'other shapes in base\.1\.bias 9 where the model has 8;'),
        (lambda s: s.update({'base.1.bias': torch.ones(8, dtype=torch.int32)}), r'bias 8 int32 where the model has 8;'),
        (lambda s: s.update({'base.1.bias': torch.tensor(1.0)}), r'bias scalar where the model has 8;'),
        (lambda s: s.clear(), r'missing (\S+, ){7}\S+; it'),
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
    found, _ = weights.normalised(old_names(model.state_dict()), 'x')
    assert weights.arch_of(found) == model.arch
    for arch in KEYS.keys() - {model.arch}:
        with torch.device('meta'):
            other = models.init_model(arch, 5)
        with pytest.raises(UserError, match=f'it looks like a {model.arch}: try --arch {model.arch}$'):
            load(other, found)
    assert weights.arch_of({**found, **dict.fromkeys(LONGER, torch.zeros(1))}) is None
    del found['classifier.bias']
    with pytest.raises(
        UserError, match=f'missing classifier.bias; it looks like another {model.arch} than the one of this'
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

    taken = models.init_model(model.arch, 4, pretrained='imagenet')
    assert_equal(
        {key: taken.state_dict()[key] for key in state_dict if 'num_batches' not in key}, without_counters(state_dict)
    )
    said = capsys.readouterr().out
    assert f"Loaded pretrained weights from torchvision's ImageNet weights ({imagenet.__name__}.IMAGENET1K_V1)" in said
    assert 'Left out: classifier.weight, classifier.bias' in said
    assert 'Starting from random weights: ' in said
    assert ('fc_fuse.1.running_mean' in said) == (model.arch == 'resnet50m')
    assert taken.classifier.weight.shape[0] == 4


def test_imagenet_weights_without_a_network(hub):
    with pytest.raises(UserError) as refused:
        models.init_model('resnet50', 5, pretrained='imagenet')
    message = str(refused.value)
    assert 'could not be fetched (no network)' in message
    assert 'resnet50-0676ba61.pth' in message
    assert str(hub) in message
    assert '--pretrained none' in message
    (hub / 'resnet50-0676ba61.pth').write_bytes(b'PK\x03\x04 cut short')
    with pytest.raises(UserError, match=r'resnet50-0676ba61\.pth is damaged .*; remove it'):
        models.init_model('resnet50', 5, pretrained='imagenet')
    with pytest.raises(UserError, match='Linear has no ImageNet weights'):
        weights.pretrain(nn.Linear(1, 1), 'imagenet', None)


def test_pretrained_path(resnet, folder, capsys):
    path = saved({'state_dict': resnet.state_dict(), 'rank1': 0.5, 'epoch': 3}, folder / 'x.pth')
    torch.manual_seed(5)
    random = models.init_model('resnet50', 9, pretrained='none')
    assert 'Loaded' not in capsys.readouterr().out
    torch.manual_seed(5)
    taken = models.init_model('resnet50', 9, pretrained=str(path))
    assert_equal(taken.base.state_dict(), resnet.base.state_dict())
    assert torch.equal(taken.classifier.weight, random.classifier.weight)
    said = capsys.readouterr().out
    assert f'Loaded pretrained weights from {path} (checkpoint with state_dict, rank1, epoch in a zip file)' in said
    assert 'Left out: classifier.weight, classifier.bias\n' in said

    middle = models.init_model('resnet50m', 9, pretrained=str(path))
    assert_equal(middle.base.state_dict(), resnet.base.state_dict())
    assert 'fc_fuse.0.weight' in capsys.readouterr().out

    torch.save(middle.state_dict(), path)
    with pytest.raises(UserError, match=r'unexpected fc_fuse\.0\.weight.*try --arch resnet50m'):
        models.init_model('resnet50', 9, pretrained=str(path))


# ------------------------------------------------------------------------------------------------ files from strangers

GOOD = state_dict_of(tensor_of(4, 0, (2, 2), (2, 1)))
GOOD_LEGACY = state_dict_of(tensor_of(4, 0, (2, 2), (2, 1), view=b'N'))
DATA = struct.pack('<4f', 1, 2, 3, 4)
LEGACY_DATA = struct.pack('<q', 4) + DATA
RECORDS = {'archive/data/0': DATA}
OS_SYSTEM = b'cposix\nsystem\n(' + text('touch executed') + b'tR'
EVAL = b'c__builtin__\neval\n(' + text("open('executed', 'w')") + b'tR'
GETATTR = b'cbuiltins\ngetattr\n(cos\npopen\n' + text('__call__') + b'tR(' + text('touch executed') + b'tR'
TORCH_CALL = b'ctorch.hub\nload_state_dict_from_url\n(' + text('file:///executed') + b'tR'
HUGE_STORAGE = b'ctorch\nFloatStorage\n(' + number(10**12) + b'tR'
DEEP = b']' * 100_000 + b'a' * 99_999
DEEP_KEY = b'}' + b')' + b'\x85' * 100_000 + b'K\x01s'  # its hash would overflow the stack of C
LAUGHS = b'K\x01q\x00' + b''.join(b'h\x00h\x00\x86q\x00' for _ in range(25))
SELF = b']q\x00h\x00a'
LATE = b']q\x00\x85h\x00K\x01a\x86'


def legacy(value, keys=('0',), data=LEGACY_DATA):
    return legacy_of(value, keys, data)


def zipped(value, **records):
    return zip_of(value, RECORDS)


def renamed_record(name):
    return zip_of(GOOD, {**RECORDS, name: b'x'})


def overlapping():
    """Two records that name the same bytes."""
    with zipfile.ZipFile(io.BytesIO(zip_of(GOOD, {'archive/data/0': bytes(5000)}))) as archive:
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, 'w') as copied:
            for name in archive.namelist():
                copied.writestr(name, archive.read(name))
            twin = copy.copy(copied.getinfo('archive/data/0'))
            twin.filename = 'archive/data/1'
            copied.filelist.append(twin)
    return buffer.getvalue()


def flipped():
    data = bytearray(zip_of(GOOD, RECORDS))
    data[data.index(DATA) + 1] ^= 1
    return bytes(data)


def torchscript():
    return zip_of(GOOD, {**RECORDS, 'archive/constants.pkl': b'x'})


def big():
    return zip_of(state_dict_of(tensor_of(750_000_000, 0, (750_000_000,), (1,))), {}, zipfile.ZIP_DEFLATED)


REFUSED = {
    'os.system, legacy': (legacy(OS_SYSTEM), r'asks for posix\.system, which weights never need; nothing of it was'),
    'os.system, zip': (zipped(OS_SYSTEM), r'asks for posix\.system,'),
    'os.system before the magic number': (b'\x80\x02' + OS_SYSTEM + b'.', r'asks for posix\.system,'),
    'eval, legacy': (legacy(EVAL), r'asks for __builtin__\.eval,'),
    'eval, zip': (zipped(EVAL), r'asks for __builtin__\.eval,'),
    'getattr, legacy': (legacy(GETATTR), r'asks for builtins\.getattr,'),
    'getattr, zip': (zipped(GETATTR), r'asks for builtins\.getattr,'),
    'a function of torch, legacy': (legacy(TORCH_CALL), r'asks for torch\.hub\.load_state_dict_from_url,'),
    'a function of torch, zip': (zipped(TORCH_CALL), r'asks for torch\.hub\.load_state_dict_from_url,'),
    'a whole model': (pickle.dumps(nn.Linear(1, 1), 2), r'asks for torch\.nn\.modules\.linear\.Linear,.*a state dict'),
    'a storage made by a call': (zipped(HUGE_STORAGE), r'calls torch\.FloatStorage, which cannot be called'),
    'STACK_GLOBAL': (legacy(text('os') + text('system') + b'\x93'), r'has the pickle instruction STACK_GLOBAL'),
    'INST': (zipped(b'(iposix\nsystem\n'), r'has the pickle instruction INST'),
    'OBJ and NEWOBJ': (zipped(b'ccollections\nOrderedDict\n)\x81'), r'has the pickle instruction NEWOBJ'),
    'EXT1': (legacy(b'\x82\x01'), r'has the pickle instruction EXT1'),
    'PERSID': (zipped(b'Pos\n'), r'has the pickle instruction PERSID'),
    'state of a dict class': (
        zipped(b'ccollections\nOrderedDict\n)R}' + text('items') + b'K\x01sb'), r'sets the state of an object'
    ),
    'state of a list': (zipped(b']}b'), r'sets the state of an object'),
    'traversal': (renamed_record('archive/../../executed'), r'named archive/\.\./\.\./executed, which leads out'),
    'absolute name': (renamed_record('/tmp/executed'), r'a record named /tmp/executed, which leads out'),
    'a name for Windows': (renamed_record('archive\\..\\executed'), r'which leads out'),
    'two tops': (renamed_record('other/x'), r'is a zip file, but no checkpoint'),
    'two records of one name': (renamed_record('archive/DATA.pkl'), r'shared or hidden records'),
    'two records in one place': (overlapping(), r'shared or hidden records'),
    'bytes before the zip': (b'PK\x03\x04' + zip_of(GOOD, RECORDS), r'shared or hidden records'),
    'stride 0, legacy': (
        legacy(state_dict_of(tensor_of(4, 0, (10**15,), (0,), b'N'))), r'has a tensor that is larger than its storage'
    ),
    'stride 0, zip': (zipped(state_dict_of(tensor_of(4, 0, (10**15,), (0,)))), r'larger than its storage'),
    'a view beyond the end': (zipped(state_dict_of(tensor_of(4, 2, (3,), (1,)))), r'larger than its storage'),
    'negative stride': (zipped(state_dict_of(tensor_of(4, 3, (2,), (-1,)))), r'has a tensor of an unknown form'),
    'a storage of 4 TB, legacy': (
        legacy(state_dict_of(tensor_of(10**12, 0, (2,), (1,), b'N'))), r'short: its tensors need 4000000000008 bytes'
    ),
    'a storage of 4 TB, zip': (
        zipped(state_dict_of(tensor_of(10**12, 0, (2,), (1,)))), r'claims another size for its storage 0'
    ),
    'a storage larger than its record': (zipped(state_dict_of(tensor_of(5, 0, (2,), (1,)))), r'claims another size'),
    'a storage without a record': (zip_of(GOOD), r'claims another size for its storage 0'),
    'a storage of two sizes': (
        zipped(b'(' + tensor_of(4, 0, (2,), (1,)) + tensor_of(2, 0, (2,), (1,)) + b't'), r'claims two sizes for one'
    ),
    'a storage that is not filled': (legacy(GOOD_LEGACY, keys=()), r'lists other storages than its tensors use'),
    'a view outside of its storage': (
        legacy(state_dict_of(tensor_of(4, 0, (2,), (1,), b'(' + text('v') + b'K\x03K\x02t'))), r'outside of'
    ),
    'a deflated record of 3 GB': (big(), r'has compressed records, which PyTorch never writes'),
    'nested 10^5 deep, legacy': (legacy(DEEP), r'is nested too deeply'),
    'nested 10^5 deep, zip': (zipped(DEEP), r'is nested too deeply'),
    'a key nested 10^5 deep': (zipped(DEEP_KEY), r'is nested too deeply'),
    'a key that is a tuple': (zipped(b'})K\x01s'), r'has keys of an unknown form'),
    'billion laughs': (zipped(LAUGHS), r'is nested too deeply or grows too large'),
    'a list in itself': (zipped(SELF), r'has a list or dict that contains itself'),
    'a list that grows later': (zipped(LATE), r'has a list or dict that contains itself'),
    'a million instructions': (legacy(b'N' * 1_000_001), r'has more instructions than any weights need'),
    'a word of 4 GB': (zipped(b'X\xff\xff\xff\xff'), r'is damaged, cut short or no checkpoint'),
    'a word of 2^62 bytes': (legacy(b'\x8d' + struct.pack('<Q', 2**62)), r'is damaged, cut short or no checkpoint'),
    'a memo of 2^32': (zipped(b'Nr\xff\xff\xff\xff0'), r'has the pickle instruction POP'),
    'a tensor with hooks': (
        zipped(tensor_of(4, 0, (2,), (1,)).replace(b')RtR', b')R}K\x01K\x01stR')), r'has a tensor with hooks'
    ),
    'a numpy object': (
        zipped(b'cnumpy.core.multiarray\nscalar\n(cnumpy\ndtype\n(' + text('O') + b'K\x00K\x01tR' + text('x') + b'tR'),
        r'has a number that is no float',
    ),
    'protocol 4': (pickle.dumps(MAGIC, 4), r'is pickled with another protocol than 2'),
    'a control character in a name': (legacy(b'cos\x1b[31m\nsystem\n'), r'asks for os\\x1b\[31m\.system,'),
    'too few values': (zipped(b'\x85'), r'is damaged, cut short or no checkpoint'),
    'no STOP': (legacy_of(b'')[:-30], r'is damaged, cut short or no checkpoint'),
    'a tensor in the frame': (
        b'\x80\x02' + tensor_of(4, 0, (2,), (1,)) + b'.', r'has a tensor where none belongs'
    ),
    'an empty file': (b'', r'is empty; get the checkpoint again'),
    'a web page': (b'<!DOCTYPE html>', r"is no PyTorch file \(it begins with b'<!DO'\)"),
    'a pickle': (pickle.dumps([1, 2], 2), r'is a pickle, but no PyTorch file'),
    'a zip of something': (
        zip_of(b'').replace(b'data.pkl', b'data.txt'), r'is a zip file, but no checkpoint'
    ),
    'TorchScript': (torchscript(), r'is a TorchScript program, not weights'),
    'a legacy file cut short': (legacy(GOOD_LEGACY)[:-1], r'is cut short: its tensors need 24 bytes, 23 are there'),
    'a zip file cut short': (zipped(GOOD)[:-9], r'is damaged, cut short or no checkpoint \(BadZipFile'),
    'a flipped bit': (flipped(), r'is damaged: its record archive/data/0 fails its checksum'),
    'a wrong count of elements': (legacy(GOOD_LEGACY, data=struct.pack('<q', 3) + DATA), r'is damaged, cut short or'),
    'a list': (zipped(b']'), r'holds no weights but a list'),
    'an empty dict': (legacy(b'}', keys=()), r'holds no weights but a dict'),
    'a dict of numbers': (zipped(b'}' + text('lr') + b'K\x01s'), r'holds no weights: lr is a int, not a tensor'),
    'a state dict that is none': (zipped(b'}' + text('state_dict') + b'Ns'), r'holds no weights but a NoneType'),
}  # fmt: skip


@pytest.mark.parametrize('name', REFUSED)
def test_strangers_files_are_refused_in_one_line(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data, message = REFUSED[name]
    Path('x.pth').write_bytes(data)
    with pytest.raises(UserError, match=message) as refused:
        weights.read('x.pth')
    said = str(refused.value)
    assert said.startswith('x.pth ')
    assert said.isprintable()
    assert len(said) < 500
    assert sorted(path.name for path in tmp_path.iterdir()) == ['x.pth']  # nothing was executed or unpacked


def test_the_harmless_twin_is_read(tmp_path):
    """The refusals above are not of the frame that they share."""
    for data in (legacy(GOOD_LEGACY), zipped(GOOD)):
        (tmp_path / 'x.pth').write_bytes(data)
        assert torch.equal(weights.read(tmp_path / 'x.pth').state_dict['weight'], torch.tensor([[1.0, 2], [3, 4]]))


@pytest.mark.parametrize('rank1', [10**600, -(10**600)])
def test_a_rank1_that_is_no_fraction(tmp_path, rank1):
    value = b'}(' + text('state_dict') + GOOD + text('rank1') + number(rank1) + b'u'
    (tmp_path / 'x.pth').write_bytes(zipped(value))
    assert weights.read(tmp_path / 'x.pth').rank1 is None


def test_strangers_files_need_no_memory(tmp_path):
    """All of them in a process that may take 256 MB more than PyTorch itself."""
    names = []
    for number_, (data, _) in enumerate(REFUSED.values()):
        names.append(f'{number_}.pth')
        (tmp_path / names[-1]).write_bytes(data)
    program = textwrap.dedent("""
        import resource, sys, weights
        from runtime.errors import UserError
        taken = 4096 * int(open('/proc/self/statm').read().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (taken + 2**28, taken + 2**28))
        for name in sys.argv[1:]:
            try:
                weights.read(name)
            except UserError:
                print(name)
    """)
    root = str(Path(weights.__file__).parent)
    ran = subprocess.run(
        [sys.executable, '-c', program, *names], cwd=tmp_path, env={'PYTHONPATH': root}, capture_output=True, text=True
    )
    assert ran.stderr == ''
    assert ran.stdout.split() == names
    assert {path.name for path in tmp_path.iterdir()} == set(names)


def test_what_is_no_file(tmp_path):
    with pytest.raises(UserError, match=r'missing\.pth cannot be read \(No such file or directory\)'):
        weights.read(tmp_path / 'missing.pth')
    for path in (tmp_path, '/dev/zero'):
        with pytest.raises(UserError, match='is no regular file'):
            weights.read(path)


def test_the_python2_writer_is_right():
    """What the hand-written pickler writes, Python's own reader understands as meant."""
    value = {
        'a': [1, -1, 70000, 2**40, 2.5, None, True],
        'b': ('x', ('y', 'z'), (), (1, 2, 3, 4)),
        'rank1': np.float32(0.5),
    }
    value['ordered'] = OrderedDict([('b', 1), ('a', 'x')])
    read = pickle.loads(Python2Pickler().dumps(value), encoding='latin1')
    assert read == value
    assert type(read['ordered']) is OrderedDict
