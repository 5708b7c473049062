"""Backbones: sizes, names, layers against the papers' formulas, and what the arguments of init_model change."""

import copy
import sys

import pytest
import torch
import torchvision.models
from torch import nn
from torch.nn import functional as F

import models
from models import loading
from models.network import GeM, average, maximum
from models.OSNet import OSBlock
from models.ResNet import IBN
from runtime.errors import UserError

# Parameters without the classifier, in millions. torchvision's documents give those of its networks with 1000 classes;
# Zhou et al., TPAMI 2021, table 8, those of OSNet: 2.2, 1.3, 0.6 and 0.2.
MILLIONS = {
    'resnet18': 11.689512 - 0.513,
    'resnet34': 21.797672 - 0.513,
    'resnet101': 44.549160 - 2.049,
    'resnet50_ibn_a': 25.557032 - 2.049,
    'mobilenet_v2': 3.504872 - 1.281,
    'osnet_x1_0': 2.2,
    'osnet_x0_75': 1.3,
    'osnet_x0_5': 0.6,
    'osnet_x0_25': 0.2,
    'osnet_ibn_x1_0': 2.2,
    'osnet_ain_x1_0': 2.2,
}
ALL = [name for name, model in models.factory.items() if model.__module__.startswith('models.')]


def images(count: int, height: int = 64, width: int = 32) -> torch.Tensor:
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(1))  # (B, 3, H, W)


@pytest.fixture(scope='module', params=list(MILLIONS))
def model(request):
    torch.manual_seed(0)
    model = models.init_model(request.param, 5, loss={'xent', 'htri'})
    for parameter in model.parameters():  # normalisation that changes nothing would hide its absence
        if parameter.ndim == 1:
            nn.init.normal_(parameter, 1, 0.1)
    with torch.no_grad():
        model(images(4))
    model.arch = request.param
    return model


def test_the_number_of_parameters_is_that_of_the_paper(model):
    classifier = 5 * (model.feat_dim + 1)
    number = (sum(parameter.numel() for parameter in model.parameters()) - classifier) / 1e6
    digits = 1 if model.arch.startswith('osnet') else 6
    assert round(number, digits) == round(MILLIONS[model.arch], digits)


@pytest.mark.parametrize('arch', ALL)
def test_weights_are_recognised_by_their_names(arch):
    with torch.device('meta'):
        assert loading.arch_of(models.init_model(arch, 5).state_dict()) == arch


@pytest.mark.parametrize('arch', ['resnet18', 'resnet34', 'resnet101', 'mobilenet_v2'])
def test_weights_of_torchvision_give_its_logits(arch):
    theirs = getattr(torchvision.models, arch)(weights=None)
    for parameter in theirs.parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, 1, 0.1)
    state_dict, notes, *_ = loading.normalised(theirs.state_dict(), 'a file')
    assert notes == ["torchvision's names translated"]
    ours = models.init_model(arch, 1000)
    loading.load_into(ours, state_dict, allow_other_classifier=False, where='a file')
    x = images(2, 128, 64)
    ours.train(), theirs.train()
    for module in theirs.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # of MobileNetV2's classifier
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-4)
    theirs.eval()
    with torch.inference_mode():
        torch.testing.assert_close(ours.eval().classifier(ours(x)), theirs(x), rtol=1e-4, atol=1e-4)


def test_features_in_training_and_at_test(model):
    model = copy.deepcopy(model)
    logits, features = model.train()(images(2))
    assert logits.shape == (2, 5) and features.shape == (2, model.feat_dim)
    torch.testing.assert_close(logits, model.classifier(features))
    logits.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert model.eval()(images(2)).shape == (2, model.feat_dim)


def test_the_smallest_images(model):
    model = copy.deepcopy(model).train()
    assert model(images(2, model.smallest, model.smallest))[0].shape == (2, 5)
    if model.smallest > 1:
        with pytest.raises((RuntimeError, ValueError), match=r'too small|more than 1 spatial'):
            model(images(2, model.smallest - 1, model.smallest - 1))


def test_instance_and_batch_normalisation_of_the_halves():
    layer, x = IBN(6).train(), torch.randn(4, 6, 5, 3) * 3 + 1
    mean, variance = x[:, :3].mean((2, 3), keepdim=True), x[:, :3].var((2, 3), correction=0, keepdim=True)
    first = (x[:, :3] - mean) / (variance + 1e-5).sqrt()
    mean, variance = x[:, 3:].mean((0, 2, 3), keepdim=True), x[:, 3:].var((0, 2, 3), correction=0, keepdim=True)
    torch.testing.assert_close(layer(x), torch.cat([first, (x[:, 3:] - mean) / (variance + 1e-5).sqrt()], 1))
    names = models.init_model('resnet50_ibn_a', 5).state_dict()
    assert sum(name.endswith('IN.weight') for name in names) == 3 + 4 + 6  # the blocks of the first three stages


def convolution(x, layer, relu=True):
    """conv, bn (of batch or instance), relu of a layer of OSNet, in eval mode."""
    x = F.conv2d(x, layer.conv.weight, stride=layer.conv.stride, padding=layer.conv.padding)
    if layer.bn is not None:
        x = layer.bn(x)
    return x.relu() if relu else x


@pytest.mark.parametrize('norm', ['', 'after', 'inside'])
@pytest.mark.parametrize('ain', [False, True])
@pytest.mark.parametrize('out', [128, 192])
def test_a_block_of_osnet_is_that_of_the_paper(norm, ain, out):
    """Equations 2 to 5 of the paper: residual of four streams with receptive fields 3 to 9, one shared gate."""
    torch.manual_seed(0)
    block = OSBlock(128, out, norm, ain).eval()
    for parameter in block.parameters():
        nn.init.normal_(parameter, 0.1, 0.2)
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean), nn.init.uniform_(module.running_var, 0.5, 2)
    x = torch.randn(2, 128, 6, 5)
    reduced, total = convolution(x, block.conv1), 0
    for depth in range(1, 5):
        if ain:
            layers = block.conv2[depth - 1]['layers']
        else:
            layers = [block.conv2a] if depth == 1 else getattr(block, f'conv2{"abcd"[depth - 1]}')
        assert len(layers) == depth
        stream = reduced
        for layer in layers:
            stream = F.conv2d(stream, layer.conv1.weight)
            stream = layer.bn(F.conv2d(stream, layer.conv2.weight, padding=1, groups=stream.size(1))).relu()
        pooled = stream.mean((2, 3))  # (B, C)
        hidden = (pooled @ block.gate.fc1.weight.flatten(1).T + block.gate.fc1.bias).relu()
        gate = torch.sigmoid(hidden @ block.gate.fc2.weight.flatten(1).T + block.gate.fc2.bias)
        total = total + stream * gate[:, :, None, None]
    residual = convolution(total, block.conv3, relu=False)
    if norm == 'inside':
        residual = F.instance_norm(residual, weight=block.IN.weight, bias=block.IN.bias)
    whole = residual + (x if out == 128 else convolution(x, block.downsample, relu=False))
    if norm == 'after':
        whole = F.instance_norm(whole, weight=block.IN.weight, bias=block.IN.bias)
    torch.testing.assert_close(block(x), whole.relu(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('arch', ALL)
def test_a_last_stride_of_1_doubles_the_maps_and_changes_no_weight(arch):
    torch.manual_seed(0)
    plain = models.init_model(arch, 5)
    fine = models.init_model(arch, 5, last_stride=1)
    assert [(k, v.shape) for k, v in plain.state_dict().items()] == [(k, v.shape) for k, v in fine.state_dict().items()]
    sizes = []
    for model in (plain, fine):
        model.pool = lambda maps: sizes.append(maps.shape[2:]) or maps.mean((2, 3))
        with torch.inference_mode():
            model.eval()(images(1, 128, 64))
    before, after = sizes[0], sizes[-1]
    assert before == ((8, 4) if arch.startswith('osnet') else (4, 2)) and after == (8, 4)


def test_poolings_are_their_formulas_with_gradients():
    maps = torch.rand(3, 4, 5, 2, dtype=torch.float64, requires_grad=True)
    flat = maps.flatten(2)
    torch.testing.assert_close(average(maps), flat.mean(2))
    torch.testing.assert_close(maximum(maps), flat.max(2).values)
    gem = GeM().double()
    assert gem.p.item() == 3
    expected = torch.stack([torch.stack([(row**3).mean() ** (1 / 3) for row in image]) for image in flat.float()])
    torch.testing.assert_close(gem(maps).float(), expected)
    with torch.no_grad():
        gem.p.fill_(1)
        torch.testing.assert_close(gem(maps).float(), average(maps).float())
        gem.p.fill_(200)
        torch.testing.assert_close(gem(maps).float(), maximum(maps).float(), rtol=0.02, atol=0)
        gem.p.fill_(2.5)
    assert torch.isfinite(gem(torch.zeros(1, 4, 2, 2))).all()

    def formula(p):
        return (flat.float() ** p).mean(2).pow(1 / p).sum()

    gem(maps).sum().backward()
    p = torch.tensor(2.5, requires_grad=True)
    formula(p).backward()
    torch.testing.assert_close(gem.p.grad[0].float(), p.grad, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize('arch', ALL)
def test_the_neck_normalises_what_is_classified_and_tested(arch):
    torch.manual_seed(0)
    model = models.init_model(arch, 5, loss={'xent', 'htri'}, neck=True, pooling='gem')
    state = model.state_dict()
    assert 'classifier.bias' not in state and {'bottleneck.weight', 'pool.p'} < state.keys()
    assert loading.arch_of(state) == arch
    logits, features = model.train()(images(4))
    normal = (features - features.mean(0)) / (features.var(0, correction=0) + 1e-5).sqrt()
    torch.testing.assert_close(logits, normal @ model.classifier.weight.T, rtol=1e-3, atol=1e-4)
    logits.square().sum().backward()
    assert model.bottleneck.bias.grad is None and model.bottleneck.weight.grad is not None
    assert abs(model.classifier.weight.std().item() - 0.001) < 1e-4
    model.eval()
    nn.init.normal_(model.bottleneck.running_mean), nn.init.uniform_(model.bottleneck.running_var, 0.5, 2)
    with torch.inference_mode():
        before, behind = model.features(images(2)), model(images(2))
    expected = (before - model.bottleneck.running_mean) / (model.bottleneck.running_var + 1e-5).sqrt()
    torch.testing.assert_close(behind, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(('name', 'narrowest'), [('resnet50', 33), ('resnet18', 1), ('vit_tiny_patch16_224', 1)])
def test_the_narrowest_images_in_bf16_of_a_network_of_timm(name, narrowest):
    pytest.importorskip('timm')
    assert models.network_of(f'timm:{name}').narrowest_bf16 == narrowest
    assert narrowest in (1, models.network_of('resnet50').narrowest_bf16)


@pytest.mark.parametrize(('name', 'depthwise'), [('vit', False), ('convnext', True)])
def test_a_network_of_timm_is_its_own_up_to_the_classifier(name, depthwise):
    timm = pytest.importorskip('timm')
    torch.manual_seed(0)
    model = models.init_model(f'timm:test_{name}', 5, loss={'xent', 'htri'}, size=(64, 32))
    config = timm.get_pretrained_cfg(f'test_{name}')
    assert model.normalisation == (config.mean, config.std) and model.interpolation == config.interpolation == 'bicubic'
    assert model.faster_in_bf16 != depthwise
    theirs = timm.create_model(f'test_{name}', num_classes=7, **({'img_size': (64, 32)} if name == 'vit' else {}))
    missing, unexpected = theirs.load_state_dict(model.base.state_dict(), strict=False)
    assert not unexpected and all('head' in name for name in missing)
    x = images(2)
    with torch.inference_mode():
        features = model.eval()(x)
        logits = theirs.eval()(x)
        torch.testing.assert_close(logits, theirs.get_classifier()(features), rtol=1e-4, atol=1e-5)


def test_position_embeddings_have_the_size_of_the_images():
    pytest.importorskip('timm')
    wide = models.init_model('timm:test_vit', 5, size=(64, 64)).base.pos_embed
    narrow = models.init_model('timm:test_vit', 5, size=(64, 32)).base.pos_embed
    assert wide.shape[1] - 1 == 2 * (narrow.shape[1] - 1)


@pytest.mark.parametrize(
    ('arch', 'size', 'message'),
    [
        (
            'timm:test_vitt',
            (64, 32),
            r"timm .* has no model 'test_vitt'; see timm.list_models\(\), such as test_vit",
        ),
        ('timm:', (64, 32), r"timm .* has no model ''"),
        ('timm:resnet50.a1_in1kk', None, r"timm .* has no model 'resnet50.a1_in1kk'; .* such as .*resnet50.a1_in1k"),
        ('timm:tf_efficientnet_b0_ns', None, r"timm .* has no model 'tf_efficientnet_b0_ns'; .* such as"),  # replaced
        ('timm:test_vit', (8, 8), r'timm:test_vit cannot take images of 8x8 \(Input height \(8\) should be'),
        ('resnet', None, r"there is no model 'resnet'; choose one of resnet50, .*, or timm:NAME"),
    ],
)
def test_a_model_that_cannot_be_built_is_one_line(arch, size, message):
    pytest.importorskip('timm')
    with pytest.raises(UserError, match=message) as mistake:
        models.init_model(arch, 5, size=size)
    assert '\n' not in str(mistake.value)


def test_without_timm_one_line_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, 'timm', None)
    with pytest.raises(UserError, match='it needs the package timm: pip install timm'):
        models.init_model('timm:test_vit', 5)


def test_a_network_that_pools_itself_takes_no_other_pooling():
    pytest.importorskip('timm')
    with pytest.raises(UserError, match="timm:test_vit pools its maps itself: leave out pooling='gem'"):
        models.init_model('timm:test_vit', 5, pooling='gem')
