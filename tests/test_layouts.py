"""Weights of other projects, compared with these projects' own computation: features and logits, in both modes.

Each network is put together here from torchvision's layers, as its project does it, and its own names make the file.
Building a network takes longer than running it, so each is built once.
"""

import copy
import functools

import pytest
import torch
from published_files import DOTTED, renamed
from torch import nn
from torch.nn import functional
from torchvision.models import DenseNet121_Weights, densenet121, resnet50

import models
import weights
from arguments import SaveOptions, ShowOptions
from models import loading
from readers.tree import Dataset
from runtime.checkpoint import Checkpoint
from runtime.device import Run
from runtime.errors import UserError
from runtime.meters import LossMeter

NUM_CLASSES = 7


def layers(build):
    """torchvision's own network, whose layers all networks here share; one for each device."""
    return _layers(build, torch.get_default_device())


@functools.cache
def _layers(build, device):
    torch.manual_seed(0)
    return build(weights=None)


@functools.cache
def _model(arch):
    return models.init_model(arch, NUM_CLASSES, loss={'xent', 'htri'})


def model_of(arch, num_classes=NUM_CLASSES):
    """This project's network as if it were new, but for its weights, which are sevens."""
    model = _model(arch).train()
    model.classifier = nn.Linear(model.feat_dim, num_classes)
    for variant in model.variants:
        setattr(model, variant, None)
    for tensor in model.state_dict().values():
        tensor.fill_(7)
    return model


class OriginalResNet50(nn.Module):
    """March 2018: a Sequential of torchvision's layers, without the last two."""

    def __init__(self):
        super().__init__()
        self.base = nn.Sequential(*list(layers(resnet50).children())[:-2])
        self.classifier = nn.Linear(2048, NUM_CLASSES)

    def features_of(self, x):
        x = self.base(x)
        return functional.avg_pool2d(x, x.shape[2:]).flatten(1)  # (B, 2048)


class OriginalResNet50M(nn.Module):
    """March 2018: every layer has two names."""

    def __init__(self):
        super().__init__()
        self.base = nn.Sequential(*list(layers(resnet50).children())[:-2])
        self.layers1, self.layers2 = nn.Sequential(*self.base[:3]), nn.Sequential(*self.base[3:5])
        self.layers3, self.layers4 = self.base[5], self.base[6]
        self.layers5a, self.layers5b, self.layers5c = self.base[7]
        self.fc_fuse = nn.Sequential(nn.Linear(4096, 1024), nn.BatchNorm1d(1024), nn.ReLU())
        self.classifier = nn.Linear(3072, NUM_CLASSES)

    def features_of(self, x):
        a = self.layers5a(self.layers4(self.layers3(self.layers2(self.layers1(x)))))
        b = self.layers5b(a)
        c = self.layers5c(b)
        a, b, c = (functional.avg_pool2d(x, x.shape[2:]).flatten(1) for x in (a, b, c))  # (B, 2048) each
        return torch.cat((c, self.fc_fuse(torch.cat((a, b), 1))), 1)  # (B, 3072)


class LaterResNet50M(OriginalResNet50M):
    """April 2018: the second names alone."""

    def __init__(self):
        super().__init__()
        del self.base


class OriginalDenseNet121(nn.Module):
    """The average of torchvision's features, which end in a normalisation."""

    def __init__(self):
        super().__init__()
        self.base = layers(densenet121).features
        self.classifier = nn.Linear(1024, NUM_CLASSES)

    def features_of(self, x):
        x = self.base(x)
        return functional.avg_pool2d(x, x.shape[2:]).flatten(1)  # (B, 1024)


class TorchvisionResNet50(nn.Module):
    """Its names end in `fc`, of any number of classes."""

    def __init__(self, num_classes=1000):
        super().__init__()
        for name, layer in layers(resnet50).named_children():
            setattr(self, name, layer)
        self.fc = nn.Linear(2048, num_classes)

    def stages(self, x):
        return self.layer3(self.layer2(self.layer1(self.maxpool(self.relu(self.bn1(self.conv1(x)))))))

    def features_of(self, x):
        return self.avgpool(self.layer4(self.stages(x))).flatten(1)  # (B, 2048)


class TorchreidResNet50(TorchvisionResNet50):
    """torchvision's names, but for the classifier."""

    def __init__(self):
        super().__init__()
        del self.fc
        self.classifier = nn.Linear(2048, NUM_CLASSES)


class TorchreidResNet50Mid(TorchvisionResNet50):
    """The fused features come first."""

    def __init__(self):
        super().__init__()
        del self.fc
        self.fc_fusion = nn.Sequential(nn.Linear(4096, 1024), nn.BatchNorm1d(1024), nn.ReLU(inplace=True))
        self.classifier = nn.Linear(3072, NUM_CLASSES)

    def features_of(self, x):
        x, parts = self.stages(x), []
        for block in self.layer4:
            x = block(x)
            parts.append(functional.adaptive_avg_pool2d(x, 1).flatten(1))  # (B, 2048)
        return torch.cat((self.fc_fusion(torch.cat(parts[:2], 1)), parts[2]), 1)  # (B, 3072)


class FeaturesDenseNet121(nn.Module):
    """torchvision's and torchreid's: a ReLU between the last normalisation and the average."""

    def __init__(self, num_classes=NUM_CLASSES):
        super().__init__()
        self.features = layers(densenet121).features
        self.classifier = nn.Linear(1024, num_classes)

    def features_of(self, x):
        return functional.adaptive_avg_pool2d(functional.relu(self.features(x)), 1).flatten(1)  # (B, 1024)


def imagenet_densenet121():
    return FeaturesDenseNet121(1000)


def torchvision_resnet50_of_few_classes():
    return TorchvisionResNet50(NUM_CLASSES)


LAYOUTS = {  # network, the architecture here, prefix of its names, whether its file is of PyTorch 0.3, what is reported
    'original resnet50': (OriginalResNet50, 'resnet50', '', True, ''),
    'original resnet50 on GPUs': (OriginalResNet50, 'resnet50', 'module.', False, 'prefix'),
    'original resnet50m': (OriginalResNet50M, 'resnet50m', 'module.', True, 'second names'),
    'later resnet50m': (LaterResNet50M, 'resnet50m', '', False, 'second names'),
    'original densenet121': (OriginalDenseNet121, 'densenet121', '', True, 'dotted'),
    'original densenet121, later names': (OriginalDenseNet121, 'densenet121', '_orig_mod.', False, 'prefix'),
    'torchvision resnet50': (TorchvisionResNet50, 'resnet50', '', True, "torchvision's names"),
    'torchvision resnet50, fine-tuned': (torchvision_resnet50_of_few_classes, 'resnet50', '', False, 'names'),
    'torchvision densenet121': (imagenet_densenet121, 'densenet121', '', True, 'last_relu'),
    'torchreid resnet50': (TorchreidResNet50, 'resnet50', 'module.', False, "torchreid's names"),
    'torchreid resnet50mid': (
        TorchreidResNet50Mid,
        'resnet50m',
        'module._orig_mod.',
        False,
        'columns of its classifier',
    ),
    'torchreid densenet121': (FeaturesDenseNet121, 'densenet121', 'module.', False, 'last_relu'),
}


@pytest.fixture
def path(tmp_path):
    """Of a file that is removed after the test: it is large."""
    yield tmp_path / 'weights.pth.tar'
    for file in tmp_path.glob('*.pth*'):
        file.unlink()


def images(seed=1):
    return torch.randn(4, 3, 64, 32, generator=torch.Generator().manual_seed(seed))  # (B, 3, H, W)


def drawn(network, seed=0):
    """A network with different values in every channel, so that swapping any two is detected."""
    torch.manual_seed(seed)
    theirs = network().train()
    norms = [layer for layer in theirs.modules() if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d)]
    with torch.no_grad():
        for norm in norms:
            norm.weight.uniform_(0.5, 1.5)
            norm.bias.normal_(0, 0.3)
            norm.momentum = 1.0
        theirs.features_of(images(2))  # or random statistics would let the activations grow without bound
        for norm in norms:
            norm.running_mean.add_(0.2 * norm.running_var.sqrt() * torch.randn_like(norm.running_mean))
            norm.running_var.mul_(torch.empty_like(norm.running_var).uniform_(0.5, 2))
            norm.momentum = 0.1
    return theirs


def named(theirs, prefix='', old=False):
    """What the network's project would put into a file; old: by PyTorch 0.3."""
    state_dict = copy.deepcopy(theirs.state_dict())
    if not old:
        return renamed(state_dict, [], prefix)
    plain = {key: value for key, value in state_dict.items() if not key.endswith('num_batches_tracked')}
    return renamed(plain, [DOTTED], prefix)


def loaded(state_dict, arch, where='x'):
    model = model_of(arch, len(state_dict['classifier.bias']))
    assert loading.load_into(model, state_dict, allow_other_classifier=False, where=where) == []
    return model


def in_our_order(features, theirs):
    """(B, D); those of torchreid's resnet50mid with their two parts exchanged."""
    if isinstance(theirs, TorchreidResNet50Mid):
        return torch.cat((features[:, 1024:], features[:, :1024]), 1)
    return features


def last_layer(theirs):
    return theirs.fc if isinstance(getattr(theirs, 'fc', None), nn.Linear) else theirs.classifier


def assert_near(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)


def in_float64(*networks):
    """Copies: in float32, rounding in 50 layers adds up to 1e-5 and more, which hides what is computed differently."""
    return [copy.deepcopy(network).double() for network in networks]


def assert_same_network(model, theirs):
    """Features and logits in eval mode, then in training, and the statistics that a step of training leaves."""
    x = images().double()
    model, theirs = in_float64(model, theirs)
    model.eval(), theirs.eval()
    with torch.no_grad():
        features, expected = model(x), theirs.features_of(x)
        assert_near(features, in_our_order(expected, theirs))
        assert_near(model.classifier(features), last_layer(theirs)(expected))
        assert 0.1 < expected.std() < 100
        model.train(), theirs.train()
        logits, features = model(x)
        expected = theirs.features_of(x)
        assert_near(features, in_our_order(expected, theirs))
        assert_near(logits, last_layer(theirs)(expected))
    again = loading.normalised(theirs.state_dict(), 'x').state_dict
    own = model.state_dict()
    assert own.keys() == again.keys()
    for key in own:
        if key.endswith(('running_mean', 'running_var')):
            assert_near(own[key], again[key])
        elif not key.endswith('num_batches_tracked'):
            assert torch.equal(own[key], again[key])


@pytest.mark.parametrize('layout', LAYOUTS)
def test_logits_and_features_are_those_of_the_project(layout, path):
    network, arch, prefix, old, note = LAYOUTS[layout]
    theirs = drawn(network)
    state_dict = named(theirs, prefix, old)
    torch.save({'state_dict': state_dict, 'epoch': 60, 'rank1': 0.9}, path)
    read = weights.read(path)
    assert note in read.layout
    assert '\n' not in read.layout
    assert loading.arch_of(read.state_dict) == arch
    assert_same_network(loaded(read.state_dict, arch), theirs)


def test_torchvisions_own_logits():
    """That the networks above are put together rightly: torchvision's own call, in both modes."""
    for network, own in ((TorchvisionResNet50, resnet50), (imagenet_densenet121, densenet121)):
        theirs = drawn(network)
        whole = own(weights=None)
        whole.load_state_dict(theirs.state_dict())
        whole, theirs, x = *in_float64(whole, theirs), images().double()
        for mode in (False, True):
            whole.train(mode), theirs.train(mode)
            with torch.no_grad():
                assert_near(whole(x), last_layer(theirs)(theirs.features_of(x)))


def test_a_classifier_of_another_width_is_not_reordered():
    """It is refused with the shape that the file has."""
    with torch.device('meta'):
        state_dict = TorchreidResNet50Mid().state_dict()
        model = models.init_model('resnet50m', NUM_CLASSES)
    for shape in ((NUM_CLASSES, 3071), (3072,), ()):
        state_dict['classifier.weight'] = torch.empty(shape, device='meta')
        found = loading.normalised(state_dict, 'x').state_dict
        assert found['classifier.weight'].shape == shape
        with pytest.raises(UserError, match='x has a classifier for a different number of identities'):
            loading.load_into(model, found, allow_other_classifier=False, where='x')


# ------------------------------------------------------------------------------------------- networks that are refused


def fc512(network, num_features):
    """torchreid's resnet50_fc512 and densenet121_fc512: a layer more between features and classifier."""
    with torch.device('meta'):
        theirs = network()
        theirs.fc = nn.Sequential(nn.Linear(num_features, 512), nn.BatchNorm1d(512), nn.ReLU())
        theirs.classifier = nn.Linear(512, NUM_CLASSES)
    return theirs.state_dict()


@pytest.mark.parametrize(
    ('arch', 'network', 'num_features'),
    [('resnet50', TorchreidResNet50, 2048), ('densenet121', FeaturesDenseNet121, 1024)],
)
@pytest.mark.parametrize('allow', [True, False])
def test_another_layer_before_the_classifier(arch, network, num_features, allow):
    found = loading.normalised(fc512(network, num_features), 'x').state_dict
    with torch.device('meta'):
        model = models.init_model(arch, NUM_CLASSES)
    with pytest.raises(UserError, match=r'x does not fit the model: unexpected embedding\.0\.weight') as refused:
        loading.load_into(model, found, allow_other_classifier=allow, where='x')
    assert '\n' not in str(refused.value)
    assert getattr(model, 'last_relu', None) is None  # nothing was changed


@pytest.mark.parametrize(
    ('network', 'pattern', 'replacement', 'named'),
    [
        (TorchreidResNet50Mid, '^fc_fusion', 'fc_fuse', 'fc_fuse.0.weight and conv1.weight'),
        (LaterResNet50M, '^fc_fuse', 'fc_fusion', 'layers1.0.weight and fc_fusion.0.weight'),
        (OriginalResNet50M, '^fc_fuse', 'fc_fusion', 'base.0.weight and fc_fusion.0.weight'),
        (FeaturesDenseNet121, r'^features\.conv0', 'base.conv0', 'base.conv0.weight and features.norm0.weight'),
    ],
)
def test_half_translated_names(network, pattern, replacement, named):
    """The file does not show the order of the features, or whether there was a ReLU."""
    with torch.device('meta'):
        state_dict = renamed(network().state_dict(), [(pattern, replacement)])
    with pytest.raises(UserError, match=f'x mixes the names of two projects, {named}, which compute differently; get'):
        loading.normalised(state_dict, 'x')


def test_a_model_without_the_option():
    with torch.device('meta'):
        model = models.init_model('resnet50', NUM_CLASSES)
        state_dict = {**model.state_dict(), 'last_relu': torch.tensor(True)}
    with pytest.raises(UserError, match='unexpected last_relu'):
        loading.load_into(model, state_dict, allow_other_classifier=False, where='x')


@pytest.mark.parametrize('value', [torch.ones(2, dtype=torch.bool), torch.tensor(1.0)])
def test_an_option_of_another_form(value):
    model = model_of('densenet121')
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UserError, match='different shapes in last_relu'):
        loading.load_into(model, {**before, 'last_relu': value}, allow_other_classifier=True, where='x')
    assert model.state_dict().keys() == before.keys()


# ---------------------------------------------------------------------------- what follows: resume, evaluate, fine-tune


def begin(model, save_dir, **changes):
    data = Dataset('two', [('a.jpg', 0, 0), ('b.jpg', 1, 0)], [], [])
    options = SaveOptions(save_dir=str(save_dir), no_report=True, **changes)
    return Checkpoint(data, options, Run(torch.device('cpu')), model=model)


def write_checkpoint(model, save_dir):
    run = Run(torch.device('cpu'))
    meter = LossMeter(ShowOptions(save_dir=str(save_dir)), run, torch.optim.Adam(model.parameters()))
    begin(model, save_dir).tested(0, {'rank1': 0.5}, meter)


def pretrained(arch, path):
    model = model_of(arch, 5)
    weights.pretrain(model, str(path))
    return model


def assert_same_features(model, theirs):
    """And logits, in eval mode."""
    model, theirs = in_float64(model.eval(), theirs.eval())
    x = images().double()
    with torch.no_grad():
        features, expected = model(x), theirs.features_of(x)
        assert_near(features, in_our_order(expected, theirs))
        assert_near(model.classifier(features), last_layer(theirs)(expected))


@pytest.mark.parametrize(
    ('network', 'arch', 'how'),
    [
        (TorchreidResNet50Mid, 'resnet50m', {}),
        (TorchreidResNet50Mid, 'resnet50m', {'evaluate': True}),
        (FeaturesDenseNet121, 'densenet121', {'resume_weights_only': True}),
        (FeaturesDenseNet121, 'densenet121', {'evaluate': True}),
    ],
)
def test_a_run_from_a_foreign_file_keeps_its_classifier(network, arch, how, path, capsys):
    theirs = drawn(network)
    torch.save({'state_dict': named(theirs, 'module.'), 'epoch': 60, 'rank1': 0.9}, path)
    model = model_of(arch)
    checkpoint = begin(model, path.parent, resume=str(path), **how)
    assert (checkpoint.epoch, checkpoint.start_batch) == (0, 0)
    assert 'translated' in capsys.readouterr().out
    assert_same_features(model, theirs)


def test_a_checkpoint_of_a_densenet121_holds_its_last_relu(path):
    """For every way to start a run from it."""
    theirs = drawn(FeaturesDenseNet121)
    model = loaded(loading.normalised(named(theirs), 'x')[0], 'densenet121')
    bare = renamed(model.state_dict(), [], 'module._orig_mod.')  # of a replica, by a user's own code
    assert loading.normalised(bare, 'x')[0].keys() == model.state_dict().keys()
    write_checkpoint(model, path.parent)
    written = path.with_name('checkpoint_ep1.pth.tar')
    for how, folder in (({}, ''), ({'resume_weights_only': True}, 'new'), ({'evaluate': True}, '')):
        resumed = model_of('densenet121')
        assert begin(resumed, path.parent / folder, resume=str(written), **how).epoch == (not how)
        assert_same_features(resumed, theirs)


def test_plain_weights_take_the_last_relu_away():
    theirs = drawn(FeaturesDenseNet121)
    model = loaded(loading.normalised(named(theirs), 'x')[0], 'densenet121')
    assert 'last_relu' in model.state_dict()
    original = drawn(OriginalDenseNet121, seed=1)
    loading.load_into(model, original.state_dict(), allow_other_classifier=False, where='x')
    assert_same_network(model, original)


@pytest.mark.parametrize(
    ('network', 'arch', 'again'),
    [
        (TorchreidResNet50Mid, 'resnet50m', False),
        (FeaturesDenseNet121, 'densenet121', False),
        (FeaturesDenseNet121, 'densenet121', True),
        (TorchvisionResNet50, 'resnet50', False),
    ],
)
def test_pretrained(network, arch, again, path, capsys):
    """The features are those of the file, which are what training begins with; the classifier is left alone.

    again: the file is a checkpoint of this project that was begun from the foreign one
    """
    theirs = drawn(network)
    torch.save({'state_dict': named(theirs), 'epoch': 60, 'rank1': 0.9}, path)
    if again:
        write_checkpoint(loaded(weights.read(path).state_dict, arch), path.parent)
        path = path.with_name('best_model.pth.tar')
    model = pretrained(arch, path).eval()
    one, other = in_float64(model, theirs.eval())
    with torch.no_grad():
        assert_near(one(images().double()), in_our_order(other.features_of(images().double()), theirs))
    assert (model.classifier.weight == 7).all() and (model.classifier.bias == 7).all()
    left_out = 'classifier.bias, classifier.weight'
    assert sorted(capsys.readouterr().out.split('Not loaded: ')[1].split('\n')[0].split(', ')) == left_out.split(', ')


def test_pretrained_resnet50m_from_torchvisions_backbone(path):
    theirs = drawn(TorchvisionResNet50)
    torch.save(named(theirs), path)
    model, theirs = in_float64(pretrained('resnet50m', path).eval(), theirs.eval())
    with torch.no_grad():
        assert_near(model(images().double())[:, :2048], theirs.features_of(images().double()))


def test_imagenet_weights_begin_a_densenet121_without_the_last_relu(path, monkeypatch, capsys):
    """As the original began its own, from the network and from the same file by its path."""
    theirs = drawn(imagenet_densenet121)
    state_dict = named(theirs, old=True)
    torch.save(state_dict, path)
    monkeypatch.setattr(DenseNet121_Weights, 'get_state_dict', lambda *_, **__: state_dict)
    original = OriginalDenseNet121().eval()
    original.base.load_state_dict(theirs.features.state_dict())
    for source in ('imagenet', path):
        model = pretrained('densenet121', source).eval()
        assert 'last_relu' in capsys.readouterr().out.split('Not loaded: ')[1]
        with torch.no_grad():
            one, other = in_float64(model, original)
            features = one(images().double())
            assert_near(features, other.features_of(images().double()))
        assert features.min() < -0.01
        assert 'last_relu' not in model.state_dict()


def test_a_fine_tuned_model_of_1000_classes_keeps_its_last_relu(path):
    theirs = drawn(imagenet_densenet121)
    model = loaded(loading.normalised(named(theirs), 'x')[0], 'densenet121')
    torch.save(model.state_dict(), path)
    assert 'last_relu' in pretrained('densenet121', path).state_dict()
