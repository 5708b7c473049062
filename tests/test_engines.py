"""Networks run by another engine: features equal those of torch, in batches of any size, from any thread."""

import argparse
import importlib.util
import logging
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tiny import Tiny

import extract
import weights
from extract import FeatureExtractor
from extraction.engines import ENGINES, ByEngine
from extraction.source import source_of
from runtime.errors import UserError

NEED = {name: pytest.mark.skipif(not all(map(importlib.util.find_spec, need)), reason=f'needs {", ".join(need)}')
        for name, need in ENGINES.items()}  # fmt: skip
EACH = pytest.mark.parametrize('engine', [pytest.param(name, marks=mark) for name, mark in NEED.items()])


@pytest.fixture(scope='module')
def file(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp('weights') / 'tiny.pth.tar'
    options = {'arch': 'tiny', 'height': 32, 'width': 16}
    torch.save({'format': weights.FORMAT, 'state_dict': Tiny(6).state_dict(), 'arguments': options}, path)
    return path


@EACH
def test_features_are_equal(engine, file, mixed):
    files = [path for path, *_ in mixed]
    plain, fast = FeatureExtractor(file, 'cpu', batch=5), FeatureExtractor(file, 'cpu', batch=5, engine=engine)
    for some in (files[:5], files, files[:1], files[:16]):  # last batches of 5, 4, 1, 1
        torch.testing.assert_close(fast(some), plain(some), rtol=1e-4, atol=1e-5)
    assert fast.digest == plain.digest


@EACH
def test_the_log_of_the_caller_stays_as_it_is(engine, file):
    logging.disable(logging.INFO)
    try:
        FeatureExtractor(file, 'cpu', engine=engine)
        assert not logging.getLogger().isEnabledFor(logging.INFO) and logging.getLogger().isEnabledFor(logging.ERROR)
    finally:
        logging.disable(logging.NOTSET)


@EACH
def test_threads_may_convert_at_once_and_nothing_is_printed(engine, file, images, capfd):
    """torch itself cannot trace two networks at once."""
    files = [path for path, *_ in images][:3]
    expected = FeatureExtractor(file, 'cpu')(files)
    capfd.readouterr()
    with ThreadPoolExecutor(3) as pool:
        for made in pool.map(lambda _: FeatureExtractor(file, 'cpu', engine=engine), range(3)):
            torch.testing.assert_close(made(files), expected, rtol=1e-4, atol=1e-5)
    lines = ''.join(capfd.readouterr()).splitlines()
    assert not [line for line in lines if not line.startswith(('Initializing model', 'Model size'))]


@EACH
def test_workers_decode_for_it(engine, file, images):
    files = [path for path, *_ in images]
    fast = FeatureExtractor(file, 'cpu', batch=4, workers=2, engine=engine)
    torch.testing.assert_close(fast(files), FeatureExtractor(file, 'cpu', batch=4)(files), rtol=1e-4, atol=1e-5)


@EACH
def test_weights_are_copied(engine, file, images):
    files = [path for path, *_ in images]
    fast = FeatureExtractor(file, 'cpu', engine=engine)
    features = fast(files)
    with torch.no_grad():
        for param in fast.model.parameters():
            param.zero_()
    assert torch.equal(fast(files), features)


@EACH
def test_threads_share_one(engine, file, images):
    files = [path for path, *_ in images]
    fast = FeatureExtractor(file, 'cpu', batch=3, engine=engine)
    parts = [files[start : start + 3] for start in range(0, 12, 3)] * 8
    expected = [fast(part) for part in parts]
    with ThreadPoolExecutor(4) as pool:
        for found, each in zip(pool.map(fast, parts), expected, strict=True):
            torch.testing.assert_close(found, each)


@NEED['openvino']
def test_openvino_has_bf16(file, images):
    """Features are rounded by no more than in torch's bf16, and have an index of their own."""
    files = [path for path, *_ in images]
    exact, eager = FeatureExtractor(file, 'cpu')(files), FeatureExtractor(file, 'cpu', 'bf16')
    fast = FeatureExtractor(file, 'cpu', 'bf16', engine='openvino')
    errors = [float(((each(files) - exact).norm(dim=1) / exact.norm(dim=1)).max()) for each in (eager, fast)]
    assert errors[1] <= 1.5 * errors[0] < 0.05
    assert eager.digest != fast.digest


@EACH
def test_the_option_of_the_commands(engine, file):
    parser = argparse.ArgumentParser()
    extract.add_options(parser)
    made = extract.extractor_of(parser.parse_args(['--weights', str(file), '--use-cpu', '--engine', engine]))
    assert isinstance(made.network, ByEngine)


@pytest.mark.parametrize(
    ('options', 'reason'),
    [
        ({'engine': 'openvino', 'compile': True}, '--compile uses torch, which --engine openvino replaces'),
        ({'engine': 'onnxruntime', 'precision': 'bf16'}, '--engine onnxruntime has no convolutions in bf16'),
        ({'engine': 'tensorrt'}, 'there is no engine tensorrt: choose torch, onnxruntime or openvino'),
    ],
)
def test_what_does_not_go_together(options, reason, file):
    with pytest.raises(UserError, match=f'^{reason}'):
        FeatureExtractor(file, 'cpu', **options)


@NEED['openvino']
def test_openvino_has_programs_for_the_sizes_that_recur(file, images):
    """Others share one, which takes any number of images."""
    files = [path for path, *_ in images][:9]
    fast, plain = FeatureExtractor(file, 'cpu', batch=9, engine='openvino'), FeatureExtractor(file, 'cpu', batch=9)
    programs = {9}
    for number, new in ((9, None), (1, -1), (1, 1), (2, None), (2, 2), (3, None), (3, None), (9, None)):
        torch.testing.assert_close(fast(files[:number]), plain(files[:number]), rtol=1e-4, atol=1e-5)
        programs |= {new} - {None}
        assert set(fast.network.compute.requests) == programs


@NEED['openvino']
def test_an_engine_that_fails_is_reported_in_one_line(file, monkeypatch):
    import openvino

    def fail(*_):
        raise RuntimeError('no\nprimitive')

    monkeypatch.setattr(openvino.Core, 'compile_model', fail)
    with pytest.raises(UserError, match=r'^--engine openvino: the network cannot be compiled \(no\); remove --engine$'):
        FeatureExtractor(file, 'cpu', engine='openvino')


@pytest.mark.parametrize(('sealed', 'device'), [('0' * 16, 'cpu'), ('', 'cuda')])
def test_only_networks_of_torch_on_a_cpu_are_converted(sealed, device, file):
    source = source_of(file)
    source.sealed = sealed
    with pytest.raises(UserError, match=r'--engine openvino is for networks of torch on CPUs, and .*: .*remove it$'):
        source.by_engine(torch.device(device), 'openvino', 'fp32', 8)


@pytest.mark.parametrize('engine', ENGINES)
def test_missing_packages_are_named(engine, file, monkeypatch):
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(UserError, match=f'--engine {engine} needs the packages onnx and onnxscript and {engine}: pip'):
        FeatureExtractor(file, 'cpu', engine=engine)


@EACH
def test_a_network_that_cannot_be_converted_is_refused_in_one_line(engine, file, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError('no\nsuch thing')

    monkeypatch.setattr(torch.export, 'export', fail)
    reason = f'^--engine {engine}: the network cannot be converted: no; remove --engine$'
    with pytest.raises(UserError, match=reason):
        FeatureExtractor(file, 'cpu', engine=engine)
    monkeypatch.undo()
    monkeypatch.setattr(torch.onnx, 'export', fail)
    with pytest.raises(UserError, match=reason):
        FeatureExtractor(file, 'cpu', engine=engine)
