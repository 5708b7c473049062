"""Networks compiled for the CPU: features equal uncompiled ones, and odd batches cause no recompilation."""

import argparse
import json
import shutil

import pytest
import torch
from tiny import Tiny
from torch._dynamo.utils import counters  # private: how many graphs were compiled

import extract
import weights
from extract import FeatureExtractor
from extraction import compiling
from extraction.source import source_of
from runtime.errors import UserError

pytestmark = pytest.mark.skipif(not shutil.which('g++'), reason='needs a C++ compiler')
SIZE = {'height': 32, 'width': 16}


@pytest.fixture(scope='module')
def file(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp('weights') / 'tiny.pth.tar'
    options = {'arch': 'tiny', **SIZE}
    torch.save({'format': weights.FORMAT, 'state_dict': Tiny(6).state_dict(), 'arguments': options}, path)
    return path


@pytest.fixture(autouse=True)
def fresh():
    torch.compiler.reset()
    counters.clear()


def test_features_are_equal_and_odd_batches_compile_nothing_anew(file, mixed):
    files = [path for path, *_ in mixed]
    plain, fast = FeatureExtractor(file, 'cpu', batch=5), FeatureExtractor(file, 'cpu', batch=5, compile=True)
    for some in (files[:5], files, files[:1], files[:16], files[:7]):  # last batches of 5, 4, 1, 1, 2
        torch.testing.assert_close(fast(some), plain(some), rtol=1e-5, atol=1e-6)
        assert counters['stats']['unique_graphs'] == 1
    assert fast.digest == plain.digest


def test_weights_become_constants(file, images):
    """Otherwise BatchNorm is not folded into the weights, and they are not stored in the kernels' layout."""
    files = [path for path, *_ in images]
    fast = FeatureExtractor(file, 'cpu', compile=True)
    features = fast(files)
    with torch.no_grad():
        for param in fast.model.parameters():
            param.zero_()
    assert torch.equal(fast(files), features)


def test_in_bf16_the_digest_differs(file):
    """Features are then rounded differently, so an index contains either compiled features or others."""
    eager, compiled = (FeatureExtractor(file, 'cpu', 'bf16', compile=each).digest for each in (False, True))
    assert eager != compiled


@pytest.mark.soak  # its code takes longest to compile
def test_in_bf16(file, mixed):
    files = [path for path, *_ in mixed]
    exact, eager = FeatureExtractor(file, 'cpu')(files), FeatureExtractor(file, 'cpu', 'bf16')(files)
    found = FeatureExtractor(file, 'cpu', 'bf16', compile=True)(files)
    errors = [float(((each - exact).norm(dim=1) / exact.norm(dim=1)).max()) for each in (eager, found)]
    assert 1e-4 < errors[1] < 1.5 * errors[0] < 0.05  # it is bf16, and no worse than without


def test_the_script_tests_with_it(script, data_dir, tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(compiling.Compiled, 'forward', compiled_forward(compiled))
    torch.save(Tiny(6).state_dict(), tmp_path / 'w.pth')
    figures = []
    for more in ([], ['--compile']):
        folder = tmp_path / f'log{len(more)}'
        args = '--evaluate', '--resume', tmp_path / 'w.pth', '--save-dir', folder, *more
        assert script('train_img_model_xent', *args) == 0
        figures.append(json.loads((folder / 'results.json').read_text())['mAP'])
        assert bool(compiled) == bool(more)
    assert figures[0] == pytest.approx(figures[1], abs=1e-4)
    assert counters['stats']['unique_graphs'] == 1


def compiled_forward(calls):
    whole = compiling.Compiled.forward

    def forward(network, x):
        calls.append(len(x))
        return whole(network, x)

    return forward


def backend(monkeypatch, compile):
    """A fake compiler, which takes no time."""
    monkeypatch.setattr(torch, 'compile', lambda module, **_: compile(module))


def test_a_single_image_is_computed_twice_unless_there_are_only_such(file, images, monkeypatch):
    shapes = []

    def compile(module):
        return lambda x: shapes.append(len(x)) or module(x)

    backend(monkeypatch, compile)
    files = [path for path, *_ in images]
    expected = FeatureExtractor(file, 'cpu')(files[:3])
    torch.testing.assert_close(FeatureExtractor(file, 'cpu', batch=2, compile=True)(files[:3]), expected)
    torch.testing.assert_close(FeatureExtractor(file, 'cpu', batch=1, compile=True)(files[:3]), expected)
    tracklets = FeatureExtractor(file, 'cpu', batch=1, compile=True)
    assert len(torch.cat([*tracklets.stream_tracklets([tuple(files[:3])], 3)])) == 1  # batches of a tracklet
    assert shapes == [2, 2, 1, 1, 1, 3]


def test_the_option_of_the_commands(file, monkeypatch):
    backend(monkeypatch, lambda module: module)
    parser = argparse.ArgumentParser()
    extract.add_options(parser)
    for more in ([], ['--compile']):
        made = extract.extractor_of(parser.parse_args(['--weights', str(file), '--use-cpu', *more]))
        assert isinstance(made.network, compiling.Compiled) == bool(more)
        assert (made.network is made.model) == (not more)


def test_a_compiler_that_fails_is_reported_in_one_line(file, images, monkeypatch):
    def fail(_):
        raise RuntimeError('no\nsuch thing')

    backend(monkeypatch, lambda module: fail)
    extractor = FeatureExtractor(file, 'cpu', compile=True)
    with pytest.raises(UserError, match=r'^--compile: the network cannot be compiled \(no\); remove it$'):
        extractor(images[0][0])


def test_without_a_compiler_nothing_is_started(file, monkeypatch):
    monkeypatch.setenv('CXX', 'c++-0')
    with pytest.raises(UserError, match=r"^--compile needs a C\+\+ compiler, and CXX is 'c\+\+-0' in the environment"):
        FeatureExtractor(file, 'cpu', compile=True)


@pytest.mark.parametrize(('sealed', 'device'), [('0' * 16, 'cpu'), ('', 'cuda')])
def test_only_networks_of_torch_on_a_cpu_are_compiled(sealed, device, file):
    source = source_of(file)
    source.sealed = sealed
    with pytest.raises(UserError, match=r'--compile is for networks of torch on CPUs, and .*: .*remove it$'):
        source.compiled(torch.device(device), 8)


def test_images_of_another_size_are_refused():
    with pytest.raises(ValueError, match='images of'):
        compiling.Sized(Tiny(3), 32, 16)(torch.zeros(2, 3, 16, 32))
