"""export.py: the file gives the features of the weights and describes them; otherwise it is refused or removed."""

import functools
import importlib.util
import json
import os
import resource
import runpy
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from tiny import Tiny
from torch import library, nn

import models
import weights
from extract import FeatureExtractor
from extraction import agreement, onnx_network, programs
from extraction.graph import Graph
from files.writing import new_file
from models.network import Training
from page.activations import activations
from runtime.errors import UserError
from transforms import TestTransform

SIZE = {'height': 32, 'width': 16}
USAGE = {
    'distance': 'cosine', 'interpolation': 'bicubic', 'flip_test': True, 'test_share': 0.5, 'save_dir': '/secret',
    'dataset': 'market1501,csv:/secret/people.csv',
}  # fmt: skip
ONNX = all(map(importlib.util.find_spec, programs.EXPORT_FORMATS['onnx']))
needs_onnx = pytest.mark.skipif(not ONNX, reason='needs onnx, onnxscript and onnxruntime')


def put(path, network=Tiny, **options):
    torch.manual_seed(0)
    options = {'arch': 'tiny', **SIZE, **USAGE, **options}
    state_dict = network(6).state_dict()
    torch.save({'format': weights.FORMAT, 'state_dict': state_dict, 'arguments': options}, path)
    return path


def start(*args):
    """Run a command in this process; returns the exit status."""
    before, sys.argv = sys.argv, [*map(str, args)]
    try:
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(ROOT / sys.argv[0]), run_name='__main__')
    finally:
        sys.argv = before
    return end.value.code


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A folder with weights and the files exported from them."""
    folder = tmp_path_factory.mktemp('weights')
    put(folder / 'tiny.pth.tar')
    for kind in ('onnx', 'pt2') if ONNX else ('pt2',):
        assert start('export.py', '--weights', folder / 'tiny.pth.tar', '--format', kind) == 0
    return folder


@pytest.fixture
def images():
    return agreement.drawn(12)


# The graph


@pytest.mark.parametrize('interpolation', ['bilinear', 'bicubic'])
@pytest.mark.parametrize('size', [(32, 16), (256, 128), (40, 77)])
def test_the_graph_resizes_as_the_test_does_bit_for_bit(size, interpolation):
    pixels = nn.Identity()
    pixels.normalisation = onnx_network.PIXELS
    graph, prepare = Graph(pixels, *size, interpolation), TestTransform(*size, onnx_network.PIXELS, interpolation)
    for shape in ((1, 1), (2, 3), (17, 9), (32, 16), (90, 41), (331, 182), (1100, 30)):
        torch.manual_seed(shape[0])
        source = torch.randint(0, 256, (2, *shape, 3), dtype=torch.uint8)
        expected = prepare([(torch.arange(2), source)])
        assert torch.equal(expected, expected.round()) and expected.max() > 1  # 0 to 255
        assert torch.equal(graph(source), expected)


def test_the_graph_normalises_and_averages_mirror_images(images):
    model = Tiny(3).eval()
    prepare = TestTransform(32, 16, model.normalisation)
    source = torch.from_numpy(np.stack([images[0], images[6]]))
    batch = prepare([(torch.arange(2), source)])
    torch.testing.assert_close(Graph(model, 32, 16, 'bilinear')(source), model(batch))
    both = (model(batch) + model(batch.flip(3))) / 2
    torch.testing.assert_close(Graph(model, 32, 16, 'bilinear', flip_test=True)(source), both)


# The files


@pytest.mark.parametrize('kind', [pytest.param('onnx', marks=needs_onnx), 'pt2'])
def test_a_file_has_the_features_of_its_weights(kind, folder, images):
    """For any size and number of images, including a single image of one pixel."""
    images = [*images, np.full((1, 1, 3), 77, np.uint8)]
    expected = FeatureExtractor(folder / 'tiny.pth.tar', 'cpu')(images)
    run, engine = programs.opened(folder / f'tiny.{kind}', kind)
    assert engine.split()[0] == {'onnx': 'onnxruntime', 'pt2': 'torch'}[kind]
    for number in (1, 4):
        found = [run(np.stack([image] * number)) for image in images]
        assert all(each.shape == (number, 16) and each.dtype == np.float32 for each in found)
        torch.testing.assert_close(torch.from_numpy(np.stack([each[-1] for each in found])), expected)


@pytest.mark.parametrize('kind', [pytest.param('onnx', marks=needs_onnx), 'pt2'])
def test_its_metadata_say_what_it_is(kind, folder):
    if kind == 'onnx':
        onnx = pytest.importorskip('onnx')
        model = onnx.load(folder / 'tiny.onnx')
        held = {entry.key: entry.value for entry in model.metadata_props}
        (given,), (made,) = model.graph.input, model.graph.output
        names = [each.dim_param or each.dim_value for each in given.type.tensor_type.shape.dim]
        assert (given.name, names, made.name) == ('images', ['batch', 'height', 'width', 3], 'features')
        assert given.type.tensor_type.elem_type == onnx.TensorProto.UINT8
    else:
        files = {programs.METADATA_FILE: ''}
        torch.export.load(folder / 'tiny.pt2', extra_files=files)
        held = json.loads(files[programs.METADATA_FILE])
    extractor = FeatureExtractor(folder / 'tiny.pth.tar', 'cpu')
    facts = onnx_network.facts_of(held, 'w')
    assert facts[:5] == ('tiny', 16, 32, 16, 'bicubic')
    assert facts[5:9] == (extractor.model.normalisation, 'cosine', True, extractor.digest)
    assert facts.trained.options == {**SIZE, 'test_share': 0.5} and facts.trained.num_pids == 6
    named = [{'dataset': name} for name in ('market1501,mars', 'market1501,folder:x')]
    kept = [onnx_network.metadata(facts._replace(trained=Training('w', options=options))) for options in named]
    assert [json.loads(each['trained'])['options'] for each in kept] == [named[0], {}]


@pytest.mark.parametrize('kind', [pytest.param('onnx', marks=needs_onnx), 'pt2'])
def test_it_contains_no_paths_of_this_machine(kind, folder):
    contents = [(folder / f'tiny.{kind}').read_bytes()]
    if kind == 'pt2':
        with zipfile.ZipFile(folder / 'tiny.pt2') as archive:
            contents += map(archive.read, archive.namelist())
    home = os.environ.get('HOME', '')
    places = (ROOT, folder, Path(torch.__file__).parent, *[home] * (len(home) > 4), 'secret', 'File "', '.py')
    for place in places:  # a home like / is in any file
        assert not any(str(place).encode() in each for each in contents), place


@needs_onnx
def test_notes_are_removed_from_all_parts_of_a_graph():
    onnx = pytest.importorskip('onnx')
    make, note = onnx.helper, {'doc_string': 'secret'}
    node, value = make.make_node('Relu', ['x'], ['y'], **note), make.make_tensor_value_info('y', 1, [1], **note)
    node.metadata_props.add(key='secret', value='secret')
    inner = make.make_graph([node], 'inner', [], [value], [make.make_tensor('w', 1, [1], [0.0])], **note)
    branch = make.make_node('If', ['c'], ['z'], then_branch=inner, else_branch=inner)
    function = make.make_function('d', 'f', ['x'], ['y'], [node], [], **note)
    graph = make.make_graph([branch], 'outer', [], [make.make_tensor_value_info('z', 1, [1])])
    model = make.make_model(graph, functions=[function], **note)
    assert model.SerializeToString().count(b'secret') >= 10
    programs.strip(model)
    assert b'secret' not in model.SerializeToString() and b'Relu' in model.SerializeToString()


def test_what_is_printed(folder, images, tmp_path, capsys):
    picture = tmp_path / 'one.png'
    Image.new('RGB', (20, 30), 'red').save(picture)
    args = '--weights', folder / 'tiny.pth.tar', '--format', 'pt2', '-o', tmp_path / 'w.pt2', '--images', picture
    assert start('export.py', *args) == 0
    out, err = capsys.readouterr()
    checked, wrote = out.splitlines()
    assert wrote.startswith(f'Wrote {tmp_path}/w.pt2: uint8 (B, H, W, 3) -> float32 (B, 16), 0.')
    assert checked.startswith(f'Checked with torch {torch.__version__} on 1 image of 1 size: largest relative error ')
    assert checked.endswith(', no neighbours were compared')
    assert err.splitlines()[0] == 'Initializing model: tiny'
    extractor = FeatureExtractor(folder / 'tiny.pth.tar', 'cpu')
    agreement.report(*programs.opened(tmp_path / 'w.pt2', 'pt2'), images[:4], extractor(images[:4]), 'euclidean')
    out = capsys.readouterr().out
    assert ' on 4 images of 4 sizes: ' in out and out.endswith(', the 3 nearest agree\n')


def test_of_many_images_some_are_checked(folder, tmp_path, monkeypatch, capsys):
    some = agreement.evenly([str(number) for number in range(2500)])
    assert len(some) == agreement.MOST_IMAGES == 1000 and some[::2] == [str(number) for number in range(0, 2500, 5)]
    monkeypatch.setattr(agreement, 'MOST_IMAGES', 3)
    for number in range(7):
        Image.new('RGB', (20, 30), (30 * number, 0, 0)).save(tmp_path / f'{number}.png')
    args = '--weights', folder / 'tiny.pth.tar', '--format', 'pt2', '-o', tmp_path / 'w.pt2', '--images', tmp_path
    assert start('export.py', *args) == 0
    chosen, checked, _ = capsys.readouterr().out.splitlines()
    assert chosen == 'Of 7 images 3 are checked, evenly spaced in their list'
    assert ' on 3 images of 1 size: ' in checked


def test_nothing_is_overwritten(tmp_path, capsys):
    path = put(tmp_path / 'w.safe.pth')
    (tmp_path / 'w.safe.pt2').write_text('mine')
    assert start('export.py', '--weights', path, '--format', 'pt2') == 2
    assert capsys.readouterr().err.endswith('w.safe.pt2 exists and is not overwritten; choose another name\n')
    assert (tmp_path / 'w.safe.pt2').read_text() == 'mine'


@pytest.mark.parametrize('name', ['w', 'w.onnx', 'w.pt2.zip'])
def test_a_name_has_the_suffix_by_which_it_is_known(name, folder, tmp_path, capsys):
    args = '--weights', folder / 'tiny.pth.tar', '--format', 'pt2', '-o', tmp_path / name
    assert start('export.py', *args) == 2
    assert f'--out {tmp_path}/{name}: give a name that ends in .pt2' in capsys.readouterr().err
    assert os.listdir(tmp_path) == []


def test_a_file_gets_its_name_once_it_is_checked(tmp_path, monkeypatch):
    """If the command ends earlier for any reason, it leaves no file."""
    path, there = put(tmp_path / 'w.pth'), []

    def watched(whole, *args):
        result = whole(*args)
        there.append((tmp_path / 'w.pt2').exists())
        return result

    for room, name in ((programs, 'write'), (agreement, 'report')):
        monkeypatch.setattr(room, name, functools.partial(watched, getattr(room, name)))
    assert start('export.py', '--weights', path, '--format', 'pt2') == 0
    assert there == [False, False] and sorted(os.listdir(tmp_path)) == ['w.pt2', 'w.pth']


@pytest.mark.parametrize('links', [True, False])
def test_a_file_that_others_made_meanwhile_is_kept(links, tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(1, 'no hard links')

    if not links:
        monkeypatch.setattr(os, 'link', refuse)
    with new_file(str(tmp_path / 'new')) as path:
        path.write_text('ours')
    assert (tmp_path / 'new').read_text() == 'ours'
    with pytest.raises(UserError, match='exists and is not overwritten'), new_file(str(tmp_path / 'w')) as path:
        path.write_text('ours')
        (tmp_path / 'w').write_text('theirs')
    assert (tmp_path / 'w').read_text() == 'theirs' and sorted(os.listdir(tmp_path)) == ['new', 'w']


@pytest.mark.parametrize(
    'outcome', [agreement.Outcome(9, 1, 2e-3, 0), agreement.Outcome(9, 1, 0, 1), agreement.Outcome(9, 1, np.nan, 0)]
)
def test_a_file_that_computes_something_else_is_not_kept(outcome, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(agreement, 'check', lambda *_: outcome)
    assert start('export.py', '--weights', put(tmp_path / 'w.pth'), '--format', 'pt2') == 1
    assert 'not written: relative error above 0.001, or nearest neighbours differ' in capsys.readouterr().err
    assert os.listdir(tmp_path) == ['w.pth']


def test_the_check_sees_what_is_wrong(images):
    def run(some):
        return np.stack([image.reshape(-1, 3).mean(0) for image in some]).astype(np.float32)

    expected = torch.from_numpy(np.concatenate([run(image[None]) for image in images]))
    assert agreement.check(run, images, expected, 'euclidean') == (12, 6, 0, 0)
    outcome = agreement.check(lambda some: run(some) * np.float32(1.01), images, expected, 'euclidean')
    assert outcome.error == pytest.approx(0.01, rel=1e-3) and outcome.exchanged == 0 and not outcome.passed
    outcome = agreement.check(
        lambda some: run(some)[::-1].copy(), [*images, *images], expected.repeat(2, 1), 'euclidean'
    )
    assert outcome.exchanged > 0  # images of a batch are confused
    assert not agreement.check(lambda some: run(some) * np.nan, images, expected, 'cosine').passed


@pytest.mark.parametrize('distance', ['euclidean', 'cosine'])
def test_neighbours_may_change_places_if_their_distances_agree(distance):
    """Computed in a plain loop."""
    torch.manual_seed(0)
    expected = torch.randn(30, 4)
    for noise in (0, 1e-6, 1e-2, 1):
        found = expected + noise * torch.randn(30, 4)
        points = [each.double() / (each.double().norm(dim=1, keepdim=True) if distance == 'cosine' else 1)
                  for each in (expected, found)]  # fmt: skip
        wrong = 0
        for query in range(30):
            others = [item for item in range(30) if item != query]
            far = [{item: float((each[query] - each[item]).square().sum()) for item in others} for each in points]
            pairs = zip(*(sorted(others, key=each.get)[:10] for each in far), strict=True)
            wrong += sum(abs(far[0][a] - far[0][b]) > 1e-3 * max(far[0][a], far[0][b]) for a, b in pairs)
        assert agreement.exchanged(expected, found, distance) == wrong
        assert (wrong > 0) == (noise >= 1e-2)


@library.custom_op('odd::plus_one', mutates_args=())
def odd(x: torch.Tensor) -> torch.Tensor:
    return x + 1


@odd.register_fake
def _(x):
    return torch.empty_like(x)


class Odd(Tiny):
    """A network with an operator that ONNX does not have."""

    def maps(self, x):
        return odd(super().maps(x))


class Fixed(Tiny):
    """A network whose trace is valid for one batch size only."""

    def maps(self, x):
        return torch.stack([*super().maps(x)])


@pytest.mark.parametrize(
    ('network', 'kind', 'message'),
    [
        pytest.param(
            Odd, 'onnx', 'odd cannot be written as ONNX: the operator odd.plus_one is not supported', marks=needs_onnx
        ),
        (Fixed, 'pt2', 'odd cannot be exported: Constraints violated (batch)!'),
    ],
)
def test_what_cannot_be_exported_is_named_in_one_line(network, kind, message, tmp_path, monkeypatch, capfd):
    monkeypatch.setitem(models.factory, 'odd', network)
    assert start('export.py', '--weights', put(tmp_path / 'w.pth', arch='odd'), '--format', kind) == 2
    out, err = capfd.readouterr()
    assert (out, err.splitlines()[:2]) == ('', ['Initializing model: odd', 'Model size: 0.00190M'])
    assert len(err.splitlines()) == 3 and err.splitlines()[2].startswith(f'error: {message}')
    assert os.listdir(tmp_path) == ['w.pth']


def test_packages_that_are_missing(tmp_path, monkeypatch, capsys):
    whole = importlib.util.find_spec
    gone = {'onnxscript', 'onnxruntime'}
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name, *more: None if name in gone else whole(name, *more))
    assert start('export.py', '--weights', put(tmp_path / 'w.pth'), '--format', 'onnx') == 2
    message = 'error: --format onnx needs the package'
    err = capsys.readouterr().err
    assert err.startswith(message) and err.endswith('onnxscript onnxruntime\n') and err.count('\n') == 1
    with pytest.raises(UserError, match=r'w\.onnx needs the package onnxruntime: pip install onnxruntime$'):
        FeatureExtractor(tmp_path / 'w.onnx')


# An ONNX file instead of weights


@needs_onnx
def test_an_extractor_takes_the_file_as_it_takes_the_weights(folder, mixed):
    files = [path for path, *_ in mixed]
    ours, theirs = (FeatureExtractor(folder / f'tiny.{end}', batch=5) for end in ('pth.tar', 'onnx'))
    torch.testing.assert_close(theirs(files), ours(files))
    torch.testing.assert_close(theirs(Image.open(files[0])), ours(files[:1]))
    frame = np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8)
    boxes = [[10, 5, 30, 50], [0, 0, 12, 60]]
    torch.testing.assert_close(theirs(frame, boxes, bgr=True), ours(frame, boxes, bgr=True))
    tracklets = [tuple(files[:7]), tuple(files[7:9])]
    torch.testing.assert_close(
        torch.cat([*theirs.stream_tracklets(tracklets)]), torch.cat([*ours.stream_tracklets(tracklets)])
    )
    assert {**theirs.description, 'digest': 0} == {**ours.description, 'digest': 0}
    assert theirs([]).shape == (0, 16)
    assert theirs.notes == [f'{folder}/tiny.onnx: tiny for images of 32 x 16, written by export.py']
    FeatureExtractor(folder / 'tiny.onnx', 'cpu', 'fp32', arch='tiny', height=32)  # as it is


@needs_onnx
def test_mirror_images_are_averaged_once(folder, images, monkeypatch):
    extractor, calls = FeatureExtractor(folder / 'tiny.onnx'), []
    whole = extractor.model.forward
    monkeypatch.setattr(extractor.model, 'forward', lambda x: calls.append(1) or whole(x))
    assert extractor.flip_test and not extractor.mirrors
    extractor(images)
    assert len(calls) == 1


@needs_onnx
def test_the_digest_is_that_of_the_file(folder, tmp_path):
    onnx = pytest.importorskip('onnx')
    extractor = FeatureExtractor(folder / 'tiny.onnx')
    assert extractor.digest == FeatureExtractor(folder / 'tiny.onnx', batch=3).digest
    assert extractor.digest != FeatureExtractor(folder / 'tiny.pth.tar', 'cpu').digest
    model = onnx.load(folder / 'tiny.onnx')
    model.graph.initializer[0].raw_data = bytes(len(model.graph.initializer[0].raw_data))
    onnx.save(model, tmp_path / 'other.onnx')
    assert FeatureExtractor(tmp_path / 'other.onnx').digest != extractor.digest


@needs_onnx
@pytest.mark.parametrize(
    ('how', 'message'),
    [
        ({'height': 64}, '--height 64 cannot be changed in an ONNX file'),
        ({'arch': 'resnet50'}, '--arch resnet50 cannot be changed'),
        ({'assume': 'neck=1'}, '--assume neck=1 cannot be changed'),
        ({'precision': 'bf16'}, 'an ONNX file is run on the CPU in fp32'),
    ],
)
def test_what_is_fixed_in_the_file(how, message, folder):
    with pytest.raises(UserError, match=rf'tiny\.onnx: {message}'):
        FeatureExtractor(folder / 'tiny.onnx', **how)


@needs_onnx
def test_its_activation_maps_cannot_be_shown(folder, images):
    with pytest.raises(UserError, match=r'tiny\.onnx: an ONNX file has no maps that can be shown; give the weights$'):
        activations(folder / 'tiny.onnx', images)


@needs_onnx
@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'format': None}, r'was not written by export\.py'),
        ({'format': 'deep-person-reid export 2'}, r'has the format deep-person-reid export 2, not deep-person-reid ex'),
        ({'height': None}, 'has incomplete metadata'),
        ({'trained': '[]'}, 'has incomplete metadata'),
        ({'trained': '{"options": [1]}'}, 'has incomplete metadata'),
        ({'height': '0'}, r'has incomplete metadata \(a length of 0\)'),
        ({'width': '-4'}, r'has incomplete metadata \(a length of -4\)'),
        ({'feat_dim': '7'}, r'gives features \(1, 16\), not \(1, 7\): export the weights again'),
        ({'interpolation': 'lanczos'}, r'has incomplete metadata \(unknown interpolation or distance\)'),
        ({'distance': 'manhattan'}, r'has incomplete metadata \(unknown interpolation or distance\)'),
        ({'mean': '3'}, 'has incomplete metadata'),
        ({'trained': 200_000 * '['}, 'has incomplete metadata'),
        ({'trained': '{"options": {}, "num_pids": [1]}'}, 'has incomplete metadata'),
    ],
)
def test_a_file_of_others_is_refused(change, message, folder, tmp_path):
    onnx = pytest.importorskip('onnx')
    model = onnx.load(folder / 'tiny.onnx')
    held = {entry.key: entry.value for entry in model.metadata_props} | change
    del model.metadata_props[:]
    onnx.helper.set_model_props(model, {name: value for name, value in held.items() if value is not None})
    onnx.save(model, tmp_path / 'w.onnx')
    with pytest.raises(UserError, match=rf'w\.onnx {message}') as error:
        FeatureExtractor(tmp_path / 'w.onnx')
    assert '\n' not in str(error.value)


@needs_onnx
def test_a_damaged_file(folder, tmp_path):
    (tmp_path / 'w.onnx').write_bytes((folder / 'tiny.onnx').read_bytes()[:20000])
    with pytest.raises(UserError, match=r'w\.onnx cannot be loaded by onnxruntime'):
        FeatureExtractor(tmp_path / 'w.onnx')
    with pytest.raises(UserError, match=r'none\.onnx cannot be read \(No such file'):
        FeatureExtractor(tmp_path / 'none.onnx')


@needs_onnx
def test_a_file_of_others_is_not_computed(folder, tmp_path, monkeypatch):
    """Constants could take any memory or time. Texts of the file, which notices print, are made printable."""
    onnx, onnxruntime = pytest.importorskip('onnx'), pytest.importorskip('onnxruntime')
    levels, make = [], onnxruntime.InferenceSession

    def recorded(contents, options, providers):
        levels.append(options.graph_optimization_level)
        return make(contents, options, providers=providers)

    monkeypatch.setattr(onnxruntime, 'InferenceSession', recorded)
    model = onnx.load(folder / 'tiny.onnx')
    held = {entry.key: entry.value for entry in model.metadata_props}
    trained = json.dumps(json.loads(held['trained']) | {'fingerprint': '\x1b[31m'})
    onnx.helper.set_model_props(model, held | {'trained': trained})
    onnx.save(model, tmp_path / 'w.onnx')
    assert onnx_network.open_onnx(tmp_path / 'w.onnx')[1].trained.fingerprint == r'\x1b[31m'
    read, computed = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL, onnxruntime.SessionOptions()
    assert levels == [read, computed.graph_optimization_level] and read != levels[1]
    del model.metadata_props[:]
    onnx.save(model, tmp_path / 'w.onnx')
    with pytest.raises(UserError, match=r'was not written by export\.py'):
        onnx_network.open_onnx(tmp_path / 'w.onnx')
    assert levels[2:] == [read]
    os.mkfifo(tmp_path / 'pipe.onnx')
    with pytest.raises(UserError, match=r'pipe\.onnx is not a regular file'):
        onnx_network.open_onnx(tmp_path / 'pipe.onnx')


@pytest.mark.parametrize('kind', [pytest.param('onnx', marks=needs_onnx), 'pt2'])
def test_a_file_that_is_too_large_for_its_disk(kind, folder, tmp_path, capsys):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        status = start(
            'export.py', '--weights', folder / 'tiny.pth.tar', '--format', kind, '-o', tmp_path / f'w.{kind}'
        )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert status == 2 and 'cannot be written (File too large)' in capsys.readouterr().err.splitlines()[-1]
    assert not list(tmp_path.iterdir())


def test_a_program_of_torch_is_not_loaded(folder):
    with pytest.raises(UserError, match=r'tiny\.pt2: \.pt2 files are read by torch\.export\.load, which is not safe'):
        FeatureExtractor(folder / 'tiny.pt2')


@needs_onnx
def test_an_exported_file_is_not_exported(folder, tmp_path, capsys):
    args = '--weights', folder / 'tiny.onnx', '--format', 'pt2', '-o', tmp_path / 'w.pt2'
    assert start('export.py', *args) == 2
    assert 'is an exported file: give the weights from which it was made' in capsys.readouterr().err


@pytest.mark.parametrize('kind', [pytest.param('onnx', marks=needs_onnx), 'pt2'])
def test_an_exported_file_is_no_weights(kind, folder):
    """For `weights.py`, --pretrained and --resume."""
    advice = r'not weights; give the weights from which it was made; extract\.py and search\.py also take the ONNX'
    with pytest.raises(UserError, match=rf'tiny\.{kind} is an? .*{advice}'):
        weights.read(folder / f'tiny.{kind}')


@needs_onnx
def test_a_search_with_the_file(folder, mixed, tmp_path, capsys):
    """The exported file finds what the weights find, in a separate index, and calibrates."""
    files, results = [path for path, *_ in mixed], []
    for end in ('pth.tar', 'onnx'):
        how = '--weights', folder / f'tiny.{end}', '--use-cpu', '-j', 0, '--index', tmp_path / 'index', '--json'
        assert start('search.py', '--gallery', *files, '--query', files[0], *how) == 0
        results.append(json.loads(capsys.readouterr().out)['queries'][0]['results'])
    assert [each['path'] for each in results[0]] == [each['path'] for each in results[1]]
    assert [each['distance'] for each in results[0]] == pytest.approx(
        [each['distance'] for each in results[1]], abs=1e-5
    )
    assert len(os.listdir(tmp_path / 'index')) == 2


@needs_onnx
def test_a_calibration_with_the_file(folder, data_dir, tmp_path, capsys):
    printed = []
    for end in ('pth.tar', 'onnx'):
        how = '--weights', folder / f'tiny.{end}', '--use-cpu', '-j', 0, '--index', tmp_path / 'index'
        assert start('search.py', '--calibrate', '-d', 'market1501', '--data-dir', data_dir, *how) == 0
        printed.append([line for line in capsys.readouterr().out.splitlines() if line.startswith('Match: ')])
    assert printed[0] == printed[1]


@needs_onnx
def test_openvino_reads_the_file(folder, images):
    """In float32: its default on some CPUs is bf16."""
    openvino = pytest.importorskip('openvino')
    core = openvino.Core()
    how = {'INFERENCE_PRECISION_HINT': 'f32', 'INFERENCE_NUM_THREADS': 1}
    compiled = core.compile_model(core.read_model(folder / 'tiny.onnx'), 'CPU', how)
    expected = FeatureExtractor(folder / 'tiny.pth.tar', 'cpu')(images)
    outcome = agreement.check(lambda some: compiled([some])[0], images, expected, 'cosine')
    assert outcome.passed, outcome


# Every backbone


def of_backbone(name, tmp_path, kind, **parts):
    torch.manual_seed(0)
    size = (96, 48)
    model = models.init_model(name, 2, size=size, report=lambda _: None, **parts).eval()
    path, images = tmp_path / f'w.{kind}', agreement.drawn(12)
    prepare = TestTransform(*size, model.normalisation, model.interpolation)
    with torch.inference_mode():
        expected = torch.cat([model(prepare([(torch.arange(1), torch.from_numpy(image)[None])])) for image in images])
    usage = model.interpolation, model.normalisation, 'euclidean', False
    metadata = onnx_network.metadata(onnx_network.Facts(name, model.feat_dim, *size, *usage, 'digest', Training('w')))
    programs.write(programs.program_of(Graph(model, *size, model.interpolation), name), path, kind, metadata, name)
    run, _ = programs.opened(path, kind)
    outcome = agreement.check(run, images, expected.clone(), 'euclidean')
    assert outcome.error < 1e-5 and outcome.passed, outcome


QUICK = [('osnet_x0_25', {'neck': True, 'pooling': 'gem'})]
SLOW = [(name, {}) for name in models.get_names() if name != 'tiny']
SLOW += [('resnet18', {'pooling': 'max'})]
SLOW += [('resnet50', {'non_local': True, 'last_stride': 1, 'embedding': 64, 'neck': True, 'neck_feature': 'before'})]
TIMM = ['timm:test_vit', 'timm:test_convnext', 'timm:resnet10t', 'timm:vit_tiny_patch16_224']


@needs_onnx
@pytest.mark.parametrize(('name', 'parts'), QUICK)
def test_a_backbone_is_exported(name, parts, tmp_path):
    of_backbone(name, tmp_path, 'onnx', **parts)


@pytest.mark.soak
@pytest.mark.parametrize('kind', [pytest.param('onnx', marks=needs_onnx), 'pt2'])
@pytest.mark.parametrize(('name', 'parts'), [*SLOW, *((name, {}) for name in TIMM)])
def test_every_backbone_is_exported(name, parts, kind, tmp_path):
    if name.startswith('timm:'):
        pytest.importorskip('timm')
    of_backbone(name, tmp_path, kind, **parts)
