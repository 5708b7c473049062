"""Files of other projects against the projects' own computation (tests/projects.py): features at test, logits and
features of training, and what the files do not record.
"""

import functools

import projects
import pytest
import torch
from torch import nn
from torchvision.models import resnet18

import models
import weights
from arguments import SaveOptions
from extraction.source import source_of
from files import safetensors
from models import DenseNet, ResNet, Timm, loading
from models.layouts import ASSUMPTIONS
from readers.tree import Dataset
from runtime.checkpoint import Checkpoint
from runtime.device import Run
from runtime.errors import UserError

STRONG = {'distance': 'cosine', 'interpolation': 'bilinear', 'height': 256, 'width': 128, 'flip_test': False}
FAST = STRONG | {'interpolation': 'bicubic'}
FT = FAST | {'flip_test': True}
TORCHREID = STRONG | {'distance': 'euclidean'}
FINE = 'last_stride=1'
TOLD = f'project=reid-strong-baseline, {FINE}'  # and the same names as timm's
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.InstanceNorm2d)
CASES = {  # network, the architecture and its parts here, what is assumed, options of the test
    'reid-strong-baseline': (projects.StrongBaseline, 'resnet50', {'last_stride': 1, 'neck': True},
        f'{TOLD}, neck_feature=after', STRONG),
    **{
        f'reid-strong-baseline, ResNet{depth}': (functools.partial(projects.StrongBaseline, depth=depth),
            f'resnet{depth}', {'last_stride': 1, 'neck': True}, f'{TOLD}, neck_feature=after', STRONG)
        for depth in (18, 34, 101)
    },
    'reid-strong-baseline, IBN': (functools.partial(projects.StrongBaseline, ibn=True), 'resnet50_ibn_a',
        {'last_stride': 1, 'neck': True}, f'{FINE}, neck_feature=after', STRONG),
    'reid-strong-baseline without neck': (projects.WithoutNeck, 'resnet50', {'last_stride': 1}, TOLD, STRONG),
    'reid-strong-baseline without neck, ResNet18': (functools.partial(projects.WithoutNeck, 18), 'resnet18',
        {'last_stride': 1}, TOLD, STRONG),
    'fast-reid v0.1 bagtricks': (functools.partial(projects.FastReid, 'v0.1'), 'resnet50',
        {'last_stride': 1, 'neck': True}, f'{FINE}, neck_feature=after, stem_pool=padded, pooling=avg', FAST),
    'fast-reid v0.1 AGW': (functools.partial(projects.FastReid, 'v0.1', 'gemP', True), 'resnet50',
        {'last_stride': 1, 'neck': True, 'pooling': 'gem', 'non_local': True},
        f'{FINE}, neck_feature=after, stem_pool=padded', FAST),
    'fast-reid v1.0 bagtricks IBN': (functools.partial(projects.FastReid, 'v1.0.0', ibn=True), 'resnet50_ibn_a',
        {'last_stride': 1, 'neck': True}, f'{FINE}, neck_feature=after, stem_pool=ceil, pooling=avg', FAST),
    'fast-reid v1.3 bagtricks': (projects.FastReid, 'resnet50',
        {'last_stride': 1, 'neck': True}, f'{FINE}, neck_feature=after, stem_pool=ceil, pooling=avg', FAST),
    **{
        f'fast-reid v1.3 bagtricks, ResNet{depth}': (functools.partial(projects.FastReid, depth=depth),
            f'resnet{depth}', {'last_stride': 1, 'neck': True},
            f'{FINE}, neck_feature=after, stem_pool=ceil, pooling=avg', FAST)
        for depth in (18, 34)
    },
    'fast-reid v1.3 SBS, ResNet34': (functools.partial(projects.FastReid, pool='gemP', depth=34), 'resnet34',
        {'last_stride': 1, 'neck': True, 'pooling': 'gem'},
        f'{FINE}, neck_feature=after, stem_pool=ceil', FAST | {'height': 384}),
    'fast-reid v1.3 AGW, ResNet101': (functools.partial(projects.FastReid, 'v1.3.0', 'gem', True, depth=101),
        'resnet101', {'last_stride': 1, 'neck': True, 'pooling': 'gem', 'non_local': True},
        f'{FINE}, neck_feature=after, stem_pool=ceil, pooling=gem', FAST),
    'fast-reid v1.3 AGW': (functools.partial(projects.FastReid, 'v1.3.0', 'gem', True), 'resnet50',
        {'last_stride': 1, 'neck': True, 'pooling': 'gem', 'non_local': True},
        f'{FINE}, neck_feature=after, stem_pool=ceil, pooling=gem', FAST),
    'fast-reid v1.0 SBS IBN': (functools.partial(projects.FastReid, 'v1.0.0', 'gemP', True, True), 'resnet50_ibn_a',
        {'last_stride': 1, 'neck': True, 'pooling': 'gem', 'non_local': True},
        f'{FINE}, neck_feature=after, stem_pool=ceil', FAST | {'height': 384}),
    'ft_net': (projects.FtNet, 'resnet50', {'embedding': 512}, 'last_stride=2', FT),
    'ft_net, IBN': (functools.partial(projects.FtNet, ibn=True), 'resnet50_ibn_a', {'embedding': 512},
        'last_stride=2', FT),
    'ft_net_dense': (projects.FtNetDense, 'densenet121', {'embedding': 512}, 'transition_stride=2', FT),
    'resnet50_fc512': (projects.Fc512, 'resnet50', {'last_stride': 1, 'embedding': 512}, '', TORCHREID),
    'densenet121_fc512': (projects.DenseFc512, 'densenet121', {'embedding': 512}, '', TORCHREID),
    'moco': (projects.Moco, 'resnet50', {}, '', {}),
    'tonylins': (functools.partial(projects.Tonylins, 7), 'mobilenet_v2', {}, '', {}),
    'osnet_x1_0': (projects.OmniScale, 'osnet_x1_0', {}, '', TORCHREID),
    'osnet_x0_75': (functools.partial(projects.OmniScale, 0.75), 'osnet_x0_75', {}, '', TORCHREID),
    'osnet_x0_5': (functools.partial(projects.OmniScale, 0.5), 'osnet_x0_5', {}, '', TORCHREID),
    'osnet_x0_25': (functools.partial(projects.OmniScale, 0.25), 'osnet_x0_25', {}, '', TORCHREID),
    'osnet_ibn_x1_0': (functools.partial(projects.OmniScale, 1, ('sum', 'sum', '', '', '', '')), 'osnet_ibn_x1_0', {},
        '', TORCHREID),
    **{
        f'osnet_ain_x{name}': (
            functools.partial(
                projects.OmniScale, width, ('residual', 'residual', '', 'residual', 'residual', ''), True
            ),
            f'osnet_ain_x{name}', {}, '', STRONG,
        )
        for name, width in (('1_0', 1), ('0_75', 0.75), ('0_5', 0.5), ('0_25', 0.25))
    },
}  # fmt: skip


@pytest.fixture
def path(tmp_path):
    """Of a file that is removed after the test: it is large."""
    yield tmp_path / 'weights.pth'
    for file in tmp_path.glob('*'):
        file.unlink()


def images(seed=1):
    return torch.randn(3, 3, 70, 38, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)  # (B, 3, H, W)


def drawn(network, seed=0):
    """A network with different values in every channel, in float64, so that swapping any two is detected."""
    torch.manual_seed(seed)
    theirs = network().train()
    norms = [layer for layer in theirs.modules() if isinstance(layer, NORMS)]
    with torch.no_grad():
        for norm in norms:
            norm.weight.uniform_(0.5, 1.5)
            norm.bias.normal_(0, 0.3)
            norm.momentum = 1.0
        for layer in theirs.modules():
            if isinstance(layer, nn.Conv2d) and layer.bias is not None:
                layer.bias.normal_(0, 0.1)
            if isinstance(layer, projects.Attention):
                layer.W[1].weight.mul_(0.1)  # its products grow with the third power of the maps
        theirs.tested(images(2).float())  # or random statistics would let the activations grow without bound
        for norm in norms:
            if norm.running_mean is not None:
                norm.running_mean.add_(0.2 * norm.running_var.sqrt() * torch.randn_like(norm.running_mean))
                norm.running_var.mul_(torch.empty_like(norm.running_var).uniform_(0.5, 2))
            norm.momentum = 0.1
    return theirs


def saved(theirs, path, prefix=''):
    """As its project saves it."""
    state_dict = {f'{prefix}{name}': value for name, value in theirs.state_dict().items()}
    if isinstance(theirs, projects.FastReid):
        optimizer = torch.optim.Adam([nn.Parameter(torch.ones(2))]).state_dict()
        torch.save({'model': state_dict, 'optimizer': optimizer, 'iteration': 17}, path)
    elif isinstance(theirs, projects.Moco):
        torch.save({'epoch': 200, 'arch': 'resnet50', 'state_dict': state_dict}, path)
    else:
        torch.save(state_dict, path)
    return path


def assert_near(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def assert_same(model, theirs):
    """The features of the test; logits and features of training, and the statistics that it leaves."""
    x = images()
    model, theirs = model.double().eval(), theirs.double().eval()
    with torch.no_grad():
        features = theirs.tested(x)
        assert 0.05 < features.std() < 100
        assert_near(model(x), features)
        if not hasattr(theirs, 'trained'):
            return
        model.loss = {'xent', 'htri'}
        model.train(), theirs.train()
        for found, expected in zip(model(x), theirs.trained(x), strict=True):
            assert_near(found, expected)
        model.eval(), theirs.eval()
        assert_near(model(x), theirs.tested(x))


@pytest.mark.parametrize('case', CASES)
def test_features_and_logits_are_those_of_the_project(case, path, capsys):
    network, arch, parts, assumed, test = CASES[case]
    theirs = drawn(network)
    loaded = weights.read(saved(theirs, path, 'module.'))
    assert loaded.trained.arch == arch
    assert (', '.join(loaded.assumed), dict(loaded.trained.test)) == (assumed, test)
    assert loaded.layout.isprintable() and loaded.state is None
    model = weights.build(loaded, None, str(path))
    assert {**models.DEFAULT_PARTS, **model.made} == {**models.DEFAULT_PARTS, **parts}
    assert model.interpolation == test.get('interpolation', 'bilinear')
    if case != 'moco':
        assert 'Not loaded' not in capsys.readouterr().out
    assert_same(model, theirs)


@pytest.mark.parametrize(
    ('network', 'assume', 'same'),
    [
        (functools.partial(projects.FastReid, 'v0.1'), '', 'stem_pool=padded, last_stride=1'),
        (functools.partial(projects.FastReid, 'v0.1'), 'stem_pool=ceil', ''),
        (projects.FastReid, 'stem_pool=padded', ''),
        (functools.partial(projects.FastReid, pool='gem'), 'pooling=gem', 'all'),
        (functools.partial(projects.FtNet, 1), ' last_stride=1,', 'all'),
        (functools.partial(projects.FtNet, 1), '', ''),
        (functools.partial(projects.FtNetDense, 1), 'transition_stride=1', 'all'),
        (functools.partial(projects.FtNetDense, 1), '', ''),
    ],
)
def test_what_a_file_does_not_tell_changes_what_is_computed(network, assume, same, path):
    theirs = drawn(network)
    model = weights.build(weights.read(saved(theirs, path), assume), None, 'x').eval().double()
    with torch.no_grad():
        difference = (model(images()) - theirs.double().eval().tested(images())).abs().max()
    assert (difference < 1e-5) == bool(same)


def test_the_feature_before_the_neck(path):
    theirs = drawn(projects.StrongBaseline)
    model = weights.build(weights.read(saved(theirs, path), 'neck_feature=before'), None, 'x').eval().double()
    with torch.no_grad():
        assert_near(model(images()), theirs.double().eval().trained(images())[1])


@pytest.mark.parametrize(
    ('network', 'assume', 'message'),
    [
        (projects.StrongBaseline, 'x=1', '--assume x=1: must be one of project=reid-strong-baseline|timm, '),
        (projects.StrongBaseline, 'last_stride=3', '--assume last_stride=3: must be one of '),
        (projects.StrongBaseline, 'pooling=gem',
            '--assume pooling: it does not apply to x.pth; project, last_stride, neck_feature can be assumed'),
        (functools.partial(projects.OmniScale, 0.25), 'last_stride=1',
            '--assume last_stride: it does not apply to x.pth; nothing else can be assumed'),
    ],
)  # fmt: skip
def test_an_assumption_that_the_file_refutes(network, assume, message, path, monkeypatch):
    monkeypatch.chdir(path.parent)
    torch.save(network().state_dict(), 'x.pth')
    with pytest.raises(UserError) as refused:
        weights.read('x.pth', assume)
    assert str(refused.value).startswith(message) and '\n' not in str(refused.value)


def change(name, make):
    def changed(state_dict):
        state_dict[name] = make(state_dict.get(name))

    return changed


def take(pattern):
    def taken(state_dict):
        for name in [name for name in state_dict if name.startswith(pattern)]:
            del state_dict[name]

    return taken


@pytest.mark.parametrize(
    ('case', 'spoil', 'message'),
    [
        ('fast-reid v1.3 bagtricks', take('backbone.layer3.5.'), r'missing base\.6\.5\.conv1\.weight'),
        ('fast-reid v1.3 AGW', take('backbone.NL_3.2.'), r'missing non_local\.3\.2\.g\.weight'),
        ('fast-reid v1.3 AGW', change('backbone.NL_3.3.g.weight', lambda _: torch.ones(1, 1024, 1, 1)), 'unexpected'),
        ('fast-reid v1.3 bagtricks', change('heads.bottleneck.1.weight', lambda _: torch.ones(512)), 'unexpected'),
        ('fast-reid v1.3 bagtricks', change('backbone.layer1.0.se.fc.0.weight', lambda _: torch.ones(4)), 'unexpected'),
        ('fast-reid v1.3 bagtricks', change('b1_head.weight', lambda _: torch.ones(7, 2048)), r'unexpected b1_head'),
        ('reid-strong-baseline', change('bottleneck.weight', lambda _: torch.ones(512)), 'different shapes in bottle'),
        ('reid-strong-baseline', change('base.layer4.2.se_module.fc1.weight', lambda _: torch.ones(4)), 'unexpected'),
        ('ft_net', change('usam_1.weight', lambda _: torch.ones(1, 1, 3, 3)), 'unexpected usam_1'),
        ('ft_net', change('classifier.add_block.1.weight', lambda _: torch.ones(2)), 'different shapes in embedding'),
        ('osnet_x0_25', change('conv2.0.conv1.conv.weight', lambda _: torch.ones(20, 16, 1, 1)), 'different shapes'),
        ('tonylins', take('features.17.'), 'missing base.17'),
        ('moco', change('encoder_q.layer1.0.conv1.bias', lambda _: torch.ones(64)), 'unexpected'),
    ],
)  # fmt: skip
def test_what_almost_fits_is_refused(case, spoil, message, path):
    network, *_ = CASES[case]
    with torch.device('meta'):
        state_dict = dict(network().state_dict())
    state_dict = {name: torch.ones(value.shape, dtype=value.dtype) for name, value in state_dict.items()}
    spoil(state_dict)
    torch.save(state_dict, path)
    with pytest.raises(UserError, match=message) as refused:
        weights.build(weights.read(path), None, 'x')
    assert '\n' not in str(refused.value)


@pytest.mark.parametrize(
    'network',
    [
        functools.partial(projects.StrongBaseline, ibn=True, depth=101),
        functools.partial(projects.FastReid, ibn=True, depth=101),
        functools.partial(projects.FastReid, ibn=True, depth=34),
    ],
)
def test_networks_of_these_projects_that_are_none_here(network, path):
    """ResNet34-IBN-a and ResNet101-IBN-a."""
    with torch.device('meta'):
        state_dict = network().state_dict()
    torch.save({name: torch.ones(value.shape, dtype=value.dtype) for name, value in state_dict.items()}, path)
    with pytest.raises(UserError, match=r'^x: its architecture cannot be recognised by its weights; give it with'):
        weights.build(weights.read(path), None, 'x')


class TorchreidResNet18(projects.Backbone):
    """Of 1000 classes."""

    def __init__(self):
        super().__init__(stride=2, depth=18)
        self.classifier = nn.Linear(512, 1000)

    def tested(self, x):
        return projects.average(self(x))


@pytest.mark.parametrize(
    ('network', 'arch', 'layout'),
    [
        (resnet18, 'resnet18', "torchvision's names translated"),
        (TorchreidResNet18, 'resnet18', "torchreid's names translated"),
        (functools.partial(projects.OmniScale, 0.25, num_classes=1000), 'osnet_x0_25', "torchreid's names"),
    ],
)
def test_weights_of_imagenet(network, arch, layout, path, capsys):
    """The description of a file, and training that starts from it."""
    torch.manual_seed(0)
    theirs = network()
    torch.save({'state_dict': {f'module.{name}': value for name, value in theirs.state_dict().items()}}, path)
    lines = [line for line in weights.describe(str(path), '') if not line.startswith('sha256: ')]
    assert lines[1:] == [
        f'architecture: {arch}',
        'identities: none, its 1000 classes are those of ImageNet',
        f'layout: {layout}',
        'test: none, it was trained to classify ImageNet',
        'licence of the weights: unknown',
    ]
    model = models.init_model(arch, 5)
    capsys.readouterr()
    weights.pretrain(model, str(path))
    out = capsys.readouterr().out
    assert 'Not loaded: classifier.weight, classifier.bias\n' in out and 'Assumed' not in out
    assert 'Initialised at random: classifier.weight, classifier.bias\n' in out
    model, theirs = model.double().eval(), theirs.double().eval()
    with torch.no_grad():
        assert_near(model(images()), features_of(theirs, images()))


def features_of(theirs, x):
    """Before the classifier."""
    if hasattr(theirs, 'tested'):
        return theirs.tested(x)
    theirs.fc = nn.Identity()
    return theirs(x)


def test_tensors_of_an_unknown_layout(path):
    torch.save({'encoder.block.0.weight': torch.ones(3)}, path)
    with pytest.raises(UserError, match='its architecture cannot be recognised by its weights'):
        weights.build(weights.read(path), None, 'x')


def test_pixels_are_normalised_as_the_file_says(path):
    theirs = projects.FastReid('v1.0.0')
    theirs.pixel_mean.copy_(torch.tensor([127.5, 102, 51]).view(1, 3, 1, 1))
    theirs.pixel_std.fill_(255)
    loaded = weights.read(saved(theirs, path))
    expected = ((0.5, 0.4, 0.2), (1.0, 1.0, 1.0))
    assert loaded.trained.test['normalisation'] == expected
    assert weights.build(loaded, None, 'x').normalisation == expected


@pytest.mark.parametrize(('name', 'value'), [('pixel_std', 0.0), ('pixel_mean', torch.nan), ('pixel_std', torch.inf)])
def test_pixels_that_cannot_be_normalised(name, value, path):
    with torch.device('meta'):
        state_dict = projects.FastReid('v1.0.0').state_dict()
    state_dict = {key: torch.ones(tensor.shape) for key, tensor in state_dict.items()}
    torch.save({'model': {**state_dict, name: torch.full((1, 3, 1, 1), value)}}, path)
    with pytest.raises(UserError, match=r'has a pixel_mean or pixel_std that cannot be used; get the file again$'):
        weights.read(path)


def test_every_assumption_is_known():
    for network in models.factory.values():
        for layout in network.published:
            assert all(value in ASSUMPTIONS[name] for name, value in layout.assumed.items())


def test_first_weights(path, capsys):
    """The backbone of a file, in a network that this project trains."""
    theirs = drawn(projects.Moco)
    model = models.init_model('resnet50', 5)
    weights.pretrain(model, str(saved(theirs, path, 'module.')))
    assert_same(model, theirs)
    out = capsys.readouterr().out
    assert "MoCo's query encoder" in out and 'queue' in out

    theirs = drawn(projects.FtNet)
    weights.pretrain(model, str(saved(theirs, path)))
    assert 'Not loaded: embedding.0.weight' in capsys.readouterr().out
    assert not any('embedding' in name for name in model.state_dict())
    with torch.no_grad():
        assert_near(model.double().eval()(images()), projects.average(theirs.double().eval().model(images())))

    theirs = drawn(projects.StrongBaseline)
    model = models.init_model('resnet50', 5, last_stride=1, neck=True)
    weights.pretrain(model, str(saved(theirs, path)))
    assumed = f'Assumed, because {path} does not record: project=reid-strong-baseline\n'
    assert assumed in capsys.readouterr().out  # stride and neck are the network's
    theirs = theirs.double()
    with torch.no_grad():
        assert_near(model.double().eval()(images()), theirs.eval().tested(images()))
    assert 'stem_linear' in model.state_dict()
    assert loading.parts(model.state_dict())['neck']


def test_first_weights_with_attention(path, capsys):
    """A network without non-local blocks starts from the rest, and the test is that of the script."""
    theirs = drawn(CASES['fast-reid v1.3 AGW'][0])
    model = models.init_model('resnet50', 5)
    weights.pretrain(model, str(saved(theirs, path)))
    out = capsys.readouterr().out
    assert 'non_local.' in out.split('Not loaded: ')[1].splitlines()[0]
    assert f'Assumed, because {path} does not record: stem_pool=ceil\n' in out and 'last_stride' not in out
    assert (model.trained.project, model.trained.test) == ('', {})


@pytest.mark.parametrize('stride', [1, 2])
def test_own_weights_with_a_neck_do_not_tell_the_last_stride(stride, path):
    model = models.init_model('resnet18', 5, neck=True, last_stride=stride).eval()
    torch.save(model.state_dict(), path)
    assert weights.read(path).assumed == ['last_stride=1']
    assume = '' if stride == 1 else 'last_stride=2'
    twin = weights.build(weights.read(path, assume), None, 'a file')
    assert torch.equal(twin(torch.ones(1, 3, 64, 32)), model(torch.ones(1, 3, 64, 32)))
    state = {'format': weights.FORMAT, 'state_dict': model.state_dict(), 'model': model.made}
    torch.save(state, path)  # a checkpoint does
    assert weights.read(path).assumed == [] and weights.read(path).made['last_stride'] == stride


@pytest.mark.parametrize('arch', ['resnet18', 'resnet50m', 'densenet121'])
def test_a_script_of_another_recipe_tests_weights_as_they_were_trained(arch, path, capsys):
    """The strong script and weights of the original, with last stride 2, as `weights.build` takes them."""
    theirs = models.init_model(arch, 5).eval()
    torch.save({'state_dict': theirs.state_dict(), 'rank1': 0.5, 'epoch': 60}, path)
    strong = {'last_stride': 1, 'neck': True, 'pooling': 'max'}
    loaded = weights.read(path)
    network = weights.rebuilt(models.init_model(arch, 5, **strong), loaded, keep_arch=False)
    assert f'The network is that of {path}: {arch}\n' in capsys.readouterr().out
    loading.load_into(network, loaded.state_dict, allow_other_classifier=False, where='a file')
    assert torch.equal(network.eval()(torch.ones(1, 3, 64, 32)), theirs(torch.ones(1, 3, 64, 32)))


@pytest.mark.parametrize('layout', [DenseNet.FEATURES, ResNet.SECOND_NAMES])
def test_networks_that_always_have_last_stride_2(layout):
    assert layout.made == {'last_stride': 2}


def test_a_network_that_a_checkpoint_names_but_names_of_weights_do_not(path):
    """Of timm: it is tested without -a, too."""
    pytest.importorskip('timm')
    model = models.init_model('timm:test_vit', 5, size=(96, 48))
    options = {'arch': 'timm:test_vit', 'height': 96, 'width': 48}
    torch.save({'format': weights.FORMAT, 'state_dict': model.state_dict(), 'arguments': options}, path)
    loaded = weights.read(path)
    network = weights.rebuilt(models.init_model('resnet18', 5), loaded, keep_arch=False, size=(96, 48))
    loading.load_into(network, loaded.state_dict, allow_other_classifier=False, where='a file')
    given = torch.ones(1, 3, 96, 48)
    assert torch.equal(network.eval()(given), model.eval()(given))


def test_a_transformer_trained_with_images_of_another_size(path):
    pytest.importorskip('timm')
    arch = 'timm:vit_tiny_patch16_224'
    options = {'arch': arch, 'height': 96, 'width': 48}
    state_dict = models.init_model(arch, 5, size=(96, 48)).state_dict()
    torch.save({'format': weights.FORMAT, 'state_dict': state_dict, 'arguments': options}, path)
    loaded = weights.read(path)
    network = weights.rebuilt(models.init_model('resnet18', 5), loaded, keep_arch=False, size=(128, 64))
    with pytest.raises(UserError, match='it was trained with images of another size: give its --height and --width'):
        loading.load_into(network, loaded.state_dict, allow_other_classifier=True, where='a file')


# ---- reid-strong-baseline or timm: equal names and shapes, and another arithmetic ----


def timm_resnet(neck=False):
    pytest.importorskip('timm')
    torch.manual_seed(3)
    model = models.init_model('timm:resnet18', 7, neck=neck, size=(70, 38))
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, NORMS):
                layer.weight.uniform_(0.5, 1.5)
                layer.bias.normal_(0, 0.3)
    return model.eval()


def without_versions(state_dict):
    """As after any change by a user's own code, or from another kind of file."""
    return {f'module.{name}': value for name, value in state_dict.items()}


@pytest.mark.parametrize('neck', [False, True])
def test_own_weights_of_timm_are_known_by_the_modules_that_torch_names(neck, path, capsys):
    model = timm_resnet(neck)
    torch.save(model.state_dict(), path)
    loaded = weights.read(path)
    assert loaded.state_dict.keys() == model.state_dict().keys() and loaded.assumed == []
    lines = list(weights.describe(str(path), ''))
    assert lines[2].startswith('architecture: timm:NAME, whose name it does not record')
    assert 'of a network of timm, which -a timm:NAME names' in lines[0]
    twin = weights.build(loaded, 'timm:resnet18', 'x')
    x = images().float()
    assert torch.equal(twin(x), model(x))
    with pytest.raises(UserError, match=r'it may be of a network of timm: give its name, -a timm:NAME$'):
        loading.load_into(models.init_model('resnet18', 7), loaded.state_dict, allow_other_classifier=True, where='x')


@pytest.mark.parametrize('neck', [False, True])
def test_names_that_reid_strong_baseline_and_timm_share(neck, path, capsys):
    """The first one is assumed, which is printed; --assume and -a override it."""
    model = timm_resnet(neck)
    torch.save(without_versions(model.state_dict()), path)
    loaded = weights.read(path)
    assert loaded.trained.arch == 'resnet18' and 'stem_linear' in loaded.state_dict
    assert loaded.assumed[:2] == ['project=reid-strong-baseline', 'last_stride=1']
    assert any('--assume NAME=VALUE changes it' in line for line in weights.describe(str(path), ''))

    loaded = weights.read(path, 'project=timm')
    assert loaded.assumed == ['project=timm'] and loaded.state_dict.keys() == model.state_dict().keys()
    x = images().float()
    assert torch.equal(weights.build(loaded, 'timm:resnet18', 'x')(x), model(x))

    with pytest.raises(UserError, match=r'of a network of timm, give --assume project=timm$'):
        weights.build(weights.read(path), 'timm:resnet18', 'x', lambda _: None)
    source = source_of(path, 'timm:resnet18', '', 70, 38)
    assert torch.equal(source.model(x), model(x)) and not any('Assumed' in note for note in source.notes)

    begun = models.init_model('timm:resnet18', 7, neck=neck, size=(70, 38))
    weights.pretrain(begun, str(path))
    assert torch.equal(begun.eval()(x), model(x))
    assert 'of a network of timm' in capsys.readouterr().out
    for how in ({'evaluate': True, 'given': frozenset({'arch'})}, {'resume_weights_only': True}):
        begun = models.init_model('timm:resnet18', 7, neck=neck, size=(70, 38))
        checkpoint = begin(begun, path, **how)
        assert torch.equal(checkpoint.model.eval()(x), model(x))


@pytest.mark.parametrize('suffix', ['.pth', '.safetensors'])
@pytest.mark.parametrize('neck', [False, True])
def test_weights_of_timm_begin_a_training_with_another_head(neck, suffix, tmp_path):
    model, path = timm_resnet(neck), str(tmp_path / f'weights{suffix}')
    if suffix == '.pth':
        torch.save(without_versions(model.state_dict()), path)
    else:
        safetensors.save(path, model.state_dict(), {})
    begun = models.init_model('timm:resnet18', 9, neck=not neck, size=(70, 38))
    weights.pretrain(begun, path)
    assert all(map(torch.equal, begun.base.state_dict().values(), model.base.state_dict().values()))


@pytest.mark.parametrize('neck', [False, True])
@pytest.mark.parametrize('name', ['resnet18', 'resnet50', 'resnet26', 'seresnet50', 'test_vit'])
def test_the_weights_that_timm_downloads(name, neck, monkeypatch, capsys):
    """Those of plain ResNets have the names of reid-strong-baseline, too."""
    pytest.importorskip('timm')
    model = models.init_model(f'timm:{name}', 5, neck=neck, size=(64, 32))
    torch.manual_seed(5)
    theirs = Timm.build(name, (64, 32))
    monkeypatch.setattr(Timm, 'build', lambda *_, **__: theirs)
    weights.pretrain(model, 'imagenet')
    assert all(map(torch.equal, model.base.state_dict().values(), theirs.state_dict().values()))
    assert model.trained.missing.startswith('bottleneck.') if neck else model.trained.missing == ''
    assert "Loaded pretrained weights from timm's weights (https://huggingface.co/timm/" in capsys.readouterr().out
    assert model.trained.of_imagenet


def test_files_that_reid_strong_baseline_saves(path):
    """torch names its pool, which has no weights."""
    theirs = projects.StrongBaseline(depth=18)
    theirs.gap = nn.AdaptiveAvgPool2d(1)
    torch.save(theirs.state_dict(), path)
    assert weights.read(path).assumed == ['last_stride=1', 'neck_feature=after']


def test_weights_that_begin_a_training_need_no_assumptions_of_a_test(path, capsys):
    theirs = drawn(functools.partial(projects.FastReid, depth=18))
    saved(theirs, path)
    begin(models.init_model('resnet18', 5, last_stride=1, neck=True), path, resume_weights_only=True)
    assumed = 'Assumed, because the file does not record: '
    assert f'{assumed}stem_pool=ceil; --assume changes that\n' in capsys.readouterr().out
    begin(models.init_model('resnet18', 5, last_stride=1, neck=True), path, evaluate=True)
    out = capsys.readouterr().out
    assert f'{assumed}{FINE}, neck_feature=after, stem_pool=ceil, pooling=avg; --' in out
    saved(projects.FtNet(), path)
    model = models.init_model('resnet50', 7)
    model.add_embedding(512)
    begin(model, path, resume_weights_only=True)
    assert 'Assumed' not in capsys.readouterr().out  # nothing of it matters


def begin(model, path, **how):
    data = Dataset('two', [('a.jpg', 0, 0), ('b.jpg', 1, 0)], [], [])
    options = SaveOptions(save_dir=str(path.parent), resume=str(path), no_report=True, **how)
    return Checkpoint(data, options, Run(torch.device('cpu')), model=model)


def test_position_embeddings_of_another_size(path):
    pytest.importorskip('timm')
    torch.save(models.init_model('timm:test_vit', 5, size=(96, 48)).state_dict(), path)
    with pytest.raises(UserError) as refused:
        weights.pretrain(models.init_model('timm:test_vit', 5, size=(128, 64)), str(path))
    assert str(refused.value) == (
        f'{path} does not fit the model: different shapes in base.pos_embed 1×19×64 where the model has 1×33×64; it '
        'was trained with images of another size: give its --height and --width'
    )
    with pytest.raises(UserError, match='was trained with images of another size'):  # and of another number of persons
        begin(models.init_model('timm:test_vit', 9, size=(128, 64)), path, resume_weights_only=True)
