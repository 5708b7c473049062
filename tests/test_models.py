"""The models: the original's parameter names, sizes and features."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional
from torchvision.models import densenet121, resnet50

import models
from models.network import Network
from runtime.errors import UserError

FEAT_DIM = {'resnet50': 2048, 'resnet50m': 3072, 'densenet121': 1024}


@pytest.fixture(scope='module', params=list(FEAT_DIM))
def model(request):
    """A model whose batch normalisation has seen something, so that eval mode differs from the identity."""
    torch.manual_seed(0)
    model = models.init_model(request.param, 5, loss={'xent', 'htri'})
    with torch.no_grad():
        model(images(4))
    model.arch = request.param
    return model


@pytest.fixture
def fresh(model):
    return copy.deepcopy(model)


def images(count, height=48, width=32):
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(1))  # (B, 3, H, W)


def millions(model):
    return f'{sum(p.numel() for p in model.parameters()) / 1e6:.5f}M'


@pytest.mark.parametrize(
    ('arch', 'market1501', 'mars', 'keys'),
    [
        ('resnet50', '25.04683M', '24.78866M', 267),
        ('resnet50m', '30.01323M', '29.62603M', 273),
        ('densenet121', '7.72363M', '7.59448M', 606),
    ],
)
def test_sizes_are_those_of_the_original(arch, market1501, mars, keys):
    with torch.device('meta'):
        assert millions(models.init_model(arch, 751)) == market1501
        model = models.init_model(arch, 625)
    assert millions(model) == mars
    assert model.feat_dim == FEAT_DIM[arch]
    names = [key for key in model.state_dict() if not key.endswith('num_batches_tracked')]
    assert len(names) == keys
    assert {name.split('.')[0] for name in names} <= {'base', 'fc_fuse', 'classifier'}


def test_names_of_parameters(model):
    names = model.state_dict().keys()
    assert {'classifier.weight', 'classifier.bias'} < names
    if model.arch == 'densenet121':
        assert {'base.conv0.weight', 'base.denseblock1.denselayer1.norm1.weight', 'base.norm5.running_mean'} < names
    else:
        assert {'base.0.weight', 'base.4.0.conv1.weight', 'base.7.2.bn3.running_var'} < names
    assert ('fc_fuse.1.running_mean' in names) == (model.arch == 'resnet50m')


def test_features_are_those_of_the_original(model):
    """The global average of torchvision's own network, put together in another way."""
    x = images(2)
    model.eval()
    state = model.state_dict()
    with torch.inference_mode():
        features = model(x)
        if model.arch == 'densenet121':
            theirs = densenet121(weights=None).features.eval()
            theirs.load_state_dict({key[5:]: value for key, value in state.items() if key.startswith('base.')})
            expected = functional.adaptive_avg_pool2d(theirs(x), 1).flatten(1)
            assert expected.min() < -0.01  # no ReLU behind norm5
        else:
            stages = ('conv1', 'bn1', 'relu', 'maxpool', 'layer1', 'layer2', 'layer3', 'layer4')
            theirs = resnet50(weights=None).eval()
            for index, stage in enumerate(stages):
                start = f'base.{index}.'
                part = {key.removeprefix(start): value for key, value in state.items() if key.startswith(start)}
                getattr(theirs, stage).load_state_dict(part)
            theirs.fc = nn.Identity()
            seen = []
            for block in theirs.layer4:
                block.register_forward_hook(lambda _, __, out: seen.append(out.mean((2, 3))))
            expected = theirs(x)
            if model.arch == 'resnet50m':
                a, b, c = seen  # (B, 2048) each
                linear, norm, relu = model.fc_fuse
                expected = torch.cat((c, relu(norm(linear(torch.cat((a, b), 1))))), 1)
    assert features.shape == (2, FEAT_DIM[model.arch])
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-5)


def test_training_returns_logits_of_the_features(fresh):
    fresh.train()
    logits, features = fresh(images(2))
    assert logits.shape == (2, 5)
    assert features.shape == (2, fresh.feat_dim)
    torch.testing.assert_close(logits, fresh.classifier(features))
    logits.sum().backward()
    assert all(parameter.grad is not None for parameter in fresh.parameters())


def test_the_smallest_images(fresh):
    smallest = fresh.smallest
    fresh.train()
    assert fresh(images(2, smallest, smallest))[0].shape == (2, 5)
    if smallest > 1:
        with pytest.raises(RuntimeError, match='too small'):
            fresh(images(2, smallest, smallest - 1))


class Tiny(Network):
    feat_dim = 3

    def __init__(self, num_classes, loss=frozenset({'xent'})):
        super().__init__(num_classes, loss)
        self.classifier = nn.Linear(3, num_classes)

    def features(self, x):
        return x.mean((2, 3))


@pytest.mark.parametrize(
    'loss', [{'xent'}, {'xent', 'htri'}, {'cent'}, {'xent', 'cent'}, frozenset({'xent'}), {'htri', 'ring'}]
)
def test_features_are_returned_for_any_loss_but_cross_entropy_alone(loss):
    model = Tiny(5, loss)
    output = model(torch.zeros(2, 3, 8, 8))
    outputs, shapes = ([output], [(2, 5)]) if loss == {'xent'} else (output, [(2, 5), (2, 3)])
    assert [part.shape for part in outputs] == shapes
    assert model.eval()(torch.zeros(2, 3, 8, 8)).shape == (2, 3)


def test_an_unknown_name_is_the_user_s_mistake():
    with pytest.raises(
        UserError, match=r"there is no model 'resnet20'; choose one of resnet50, resnet50m, densenet121"
    ):
        models.init_model('resnet20', 5)


def test_factory_takes_new_models(monkeypatch, capsys):
    monkeypatch.setitem(models.factory, 'tiny', Tiny)
    assert models.get_names()[-1] == 'tiny'
    model = models.init_model('tiny', 2500, loss={'cent'})
    assert (model.classifier.out_features, model.num_classes, model.loss) == (2500, 2500, {'cent'})
    assert capsys.readouterr().out == 'Initializing model: tiny\nModel size: 0.01000M\n'


def test_channels_last_and_bfloat16_give_the_same_features(model):
    x = images(2, 64, 40)
    model.eval()
    with torch.inference_mode():
        plain = model(x)
        last = copy.deepcopy(model).to(memory_format=torch.channels_last)
        torch.testing.assert_close(last(x.to(memory_format=torch.channels_last)), plain, rtol=1e-4, atol=1e-4)
        with torch.autocast('cpu', torch.bfloat16):
            half = last(x.to(memory_format=torch.channels_last))
    assert functional.cosine_similarity(half.float(), plain).min() > 0.999


def compiles_whole(model, training):
    """No graph break, and the same result. Only tracing is tried: generating code takes minutes."""
    x = images(2)
    model.train(training)
    compiled = torch.compile(copy.deepcopy(model), backend='eager', fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x))


def test_resnet50m_compiles_whole():
    """Its forward pass is the only one here with more than a line."""
    compiles_whole(models.init_model('resnet50m', 5, loss={'xent', 'htri'}), training=True)


def test_the_network_of_the_strong_script_compiles_whole():
    network = models.init_model('resnet18', 5, loss={'xent', 'htri', 'cent'}, last_stride=1, neck=True)
    compiles_whole(network, training=True)


@pytest.mark.soak
@pytest.mark.parametrize('training', [True, False])
def test_model_compiles_whole(fresh, training):
    compiles_whole(fresh, training)
