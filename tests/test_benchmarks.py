"""The benchmarks import, and the steps that they measure are those of the scripts."""

import ast
import importlib
import inspect
import json
import os
import re
import select
import signal
import subprocess
import sys

import pytest
import torch
from conftest import ENV, HANG, ROOT

import data_manager
from runtime import cards
from runtime.precision import allow_tf32

FOLDER = ROOT / 'benchmarks'
PARTS = sorted(path.stem for path in FOLDER.glob('*.py'))


@pytest.fixture(autouse=True)
def path(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    yield
    for name in PARTS:
        sys.modules.pop(name, None)


@pytest.mark.parametrize('name', PARTS)
def test_a_part_is_imported(name):
    part = importlib.import_module(name)
    assert part.__doc__ and part.__file__ == str(FOLDER / f'{name}.py')


def step_of(source: str) -> str:
    """The loop over the batches, without the line that saves; comments and line breaks do not count."""
    loops = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.For))
    (body,) = (loop.body for loop in loops if 'draws' in ast.unparse(loop.target))
    return '\n'.join(line for line in map(ast.unparse, body) if not line.startswith('checkpoint.'))


@pytest.mark.parametrize(
    ('part', 'script'), [('training', 'train_img_model_xent'), ('distributed', 'train_img_model_xent_htri')]
)
def test_the_measured_step_is_that_of_the_script(part, script):
    step = step_of(inspect.getsource(importlib.import_module(part).train))
    assert step == step_of((ROOT / f'{script}.py').read_text())


def test_both_sides_of_the_input_make_the_same_batches(data_dir):
    """`compare` asserts it, with an independent interpretation of the draws."""
    items = data_manager.init_dataset('market1501', str(data_dir)).train * 4
    rows = importlib.import_module('input').compare(items, turns=1)
    assert len(rows) == 3 and all(row.ours > 0 and row.times_plain > 0 for row in rows)


def test_a_backbone_is_held_to_what_its_class_says(monkeypatch):
    """On a processor that gains from bf16 with any."""
    backbones = importlib.import_module('backbones')
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    for gain, met in ((1.5, [True, False]), (0.5, [False, True]), (1.0, [True, True])):
        times = {'ours': [1.0], 'plain': [gain]}
        monkeypatch.setattr(backbones, 'compare', lambda *_, times=times, **sides: times)
        for has_bf16 in (True, False):
            monkeypatch.setattr(backbones, 'has_bf16', lambda _, has=has_bf16: has)
            rows = list(backbones.rows(True, ['resnet50', 'mobilenet_v2']))
            assert [row.met for row in rows if row.met is not None] == met * has_bf16
            kinds = [tuple(row.what.split(', ')[:2]) for row in rows if '--engine' not in row.what]
            assert kinds == [
                (arch, how) for arch in ('resnet50', 'mobilenet_v2') for how in ('training step', 'extraction')
            ]
    assert len(list(backbones.rows(False))) == 1


def test_all_engines_compute_the_same_features(tmp_path, monkeypatch):
    """As their own code calls them; --compile has its tests."""
    engines = importlib.import_module('engines')
    for name in ('onnx', 'onnxscript', 'onnxruntime', 'openvino'):
        pytest.importorskip(name)
    plan, file = engines.Plan(('tiny',), 32, 16), str(tmp_path / 'tiny.onnx')
    engines.write('tiny', plan, file)
    monkeypatch.setattr(engines, 'Compiled', lambda model, *_: model)
    for precision, tolerance in engines.PRECISIONS.items():
        for batch in (3, 1):
            names = engines.sides_of(precision)
            assert ('onnxruntime' in names) == (precision == 'fp32') and 'openvino' in names
            features = {name: engines.side(name, 'tiny', precision, plan, batch, file)() for name in names}
            engines.agree(features, tolerance)
            assert features['eager'].shape == (batch, 16)
    with pytest.raises(AssertionError, match='openvino differs by'):
        engines.agree({**features, 'openvino': features['openvino'] * 2}, 0.1)


def test_the_fastest_way_is_compared_with_the_faster_engine():
    engines = importlib.import_module('engines')
    times = {
        'eager': [[4.0], [4.0]],
        'compiled': [[2.0], [2.0]],
        'onnxruntime': [[3.0], [1.0]],
        'openvino': [[2.1], [2.1]],
    }
    first, *others = engines.compared('net', times, 8)
    assert (first.what, first.ours, first.plain) == ('net: compiled; plain: onnxruntime', 4, 4)
    assert (first.times_plain, first.target, first.met) == (1, 'plain ≥ 0.95', True)
    assert [(row.what, row.ours) for row in others[:2]] == [('the same: eager', 2), ('the same: compiled', 4)]
    first, one, *_ = engines.compared('net', {'eager': [[1.0, 2.0, 3.0]], 'openvino': [[1.0, 1.0, 1.0]]}, 1)
    assert (first.unit, first.ours, first.plain, first.met) == ('ms', 2000, 1000, False)
    assert (one.what, one.unit) == ('the same: eager, 99th percentile 2980.00 ms', 'ms')
    assert len(list(engines.rows(False))) == 1


@pytest.mark.soak
def test_the_engines_are_measured():
    run = subprocess.run([sys.executable, FOLDER / 'engines.py', '--short'], capture_output=True, text=True, env=ENV)
    assert run.returncode == 0 and run.stdout.count('the same: compiled') == 4, run.stderr


@pytest.mark.parametrize('precision', ['fp32', 'tf32', 'bf16'])
def test_both_sides_of_a_training_have_the_same_arithmetic(precision, monkeypatch):
    """On a GPU, which this machine need not have: TF32 for products and for convolutions, and cuDNN's trials."""
    training, matmul = importlib.import_module('training'), torch.backends.cuda.matmul
    for name, value in (('is_available', True), ('device_count', 1), ('set_device', None)):
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    monkeypatch.setattr(cards, 'check', lambda *_: None)
    sides = []
    for prepare in (training.start, training.plain_start):
        allow_tf32(precision != 'tf32')
        torch.backends.cudnn.benchmark = False
        prepare(precision)
        name = 'fp32_precision' if hasattr(matmul, 'fp32_precision') else 'allow_tf32'
        sides.append((getattr(matmul, name), torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark))
    allow_tf32(False)
    torch.backends.cudnn.benchmark = False
    assert sides[0] == sides[1] and sides[0][1:] == (precision == 'tf32', True)


@pytest.mark.parametrize('full', [False, True])
@pytest.mark.parametrize('gpus', [0, 1])
def test_a_row_whose_sides_differ_in_precision_says_so(gpus, full, monkeypatch):
    training, table = importlib.import_module('training'), importlib.import_module('table')
    compared = []
    monkeypatch.setattr(training, 'agree', lambda *_: None)
    monkeypatch.setattr(training, 'compare', lambda _, **sides: compared.append(sides) or {key: [1.0] for key in sides})
    for name in ('from_files', 'recipe', 'with_unused_channels'):
        monkeypatch.setattr(training, name, lambda *_: table.Row('a row'))
    fresh = {'gpus': gpus, 'from_files': table.Row('a row')}
    monkeypatch.setattr(training, 'in_a_fresh_process', lambda module, function, *_: fresh[function])
    rows = [row for row in training.rows(full) if row.times_plain]
    assert len(rows) == len(compared) == (6 if gpus else 4)
    for row, sides in zip(rows, compared, strict=True):
        (_, ours, *_), (_, plain) = sides['ours'], sides['plain']
        assert ours in row.what and (ours != plain) == (f'; plain: {plain}' in row.what)
    assert {sides['ours'][1] for sides in compared} == ({'fp32', 'tf32', 'bf16'} if gpus else {'fp32', 'bf16'})


@pytest.mark.parametrize('name', ['training', 'testing', 'distributed', 'reporting', 'learning', 'table'])
def test_what_waits_for_the_measurements_does_not_start_cuda(name):
    """It would hold memory of the GPU while they run."""
    part = importlib.import_module(name)
    source = inspect.getsource(part.main if name == 'table' else part.rows)
    assert 'cuda.' not in source and 'trainer(' not in source and ' start(' not in source


def test_what_takes_too_long_is_ended_with_all_that_it_started():
    """Each of them holds the pipe, which ends when the last of them has ended."""
    within = importlib.import_module('table').within
    reading, writing = os.pipe()
    assert within(2, ['bash', '-c', f'sleep {2 * HANG} & wait'], stdout=writing) is None
    os.close(writing)
    assert select.select([reading], [], [], HANG)[0] and os.read(reading, 1) == b''
    os.close(reading)
    assert within(HANG, ['bash', '-c', 'exit 3']) == 3
    assert within(None, ['bash', '-c', 'exit 0']) == 0


def test_the_strong_recipe_is_printed_beside_its_paper(data_dir, tmp_path):
    command = [sys.executable, FOLDER / 'strong.py', '--data-dir', data_dir]
    small = '-a resnet18 --pretrained none --height 96 --width 48 --max-epoch 1 --train-batch 8 --num-instances 2'
    where = {'capture_output': True, 'text': True, 'cwd': tmp_path, 'timeout': HANG}
    done = subprocess.run(command, **where, env=ENV | {'CUDA_VISIBLE_DEVICES': ''})
    assert (done.returncode, done.stdout) == (2, '') and 'Not measured: there is no GPU' in done.stderr
    done = subprocess.run([*command, *small.split(), '--workers', '0', '--use-cpu', '--no-report'], **where, env=ENV)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / 'log' / 'strong' / 'results.json').read_text())
    head, *rows, ours, paper = done.stdout.splitlines()[-5:]
    assert head.split() == ['%', 'here', 'paper'] and paper == 'Paper: resnet50, market1501 at 256x128'
    assert rows == [f'mAP     {100 * results["mAP"]:6.1f}   85.9', f'Rank-1  {100 * results["cmc"][0]:6.1f}   94.5']
    assert ours.startswith('Here: resnet18, market1501 at 96x48, on ')


def test_the_strong_recipe_is_stopped_like_a_script(data_dir, tmp_path):
    small = '-a resnet18 --pretrained none --height 96 --width 48 --max-epoch 9999 --train-batch 8 --num-instances 2'
    options = [*small.split(), '--workers', '0', '--use-cpu', '--no-report', '--save-dir', 'run', '--print-freq', '1']
    command = [sys.executable, FOLDER / 'strong.py', '--data-dir', data_dir, *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=tmp_path, env=ENV) as process:
        for line in process.stdout:
            if 'Loss ' in line:
                process.terminate()
                break
        process.communicate(timeout=HANG)
    assert process.returncode == 128 + signal.SIGTERM
    assert list((tmp_path / 'run').glob('resume_*.pth.tar'))


def test_the_command():
    done = subprocess.run([sys.executable, FOLDER / 'table.py', 'everything'], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, '')
    assert 'everything: no such part; choose from input, training' in done.stderr


def test_parts_are_run_and_ended_in_time(monkeypatch, capfd):
    """On a machine with a GPU they have a time limit, if not all is to be measured."""
    table = importlib.import_module('table')
    monkeypatch.setattr(table, 'in_a_fresh_process', lambda _, function: {'machine': 'a machine', 'gpus': 1}[function])
    assert sum(table.SECONDS.values()) < 15 * 60
    for seconds, expected in ((0, '| learning was ended after 0 s |'), (HANG, '| mAP of the demo in bf16 and fp32:')):
        monkeypatch.setattr(table, 'SECONDS', {'learning': seconds})
        monkeypatch.setattr(sys, 'argv', ['table.py', 'learning'])
        with pytest.raises(SystemExit) as end:
            table.main()
        assert end.value.code == (1 if seconds == 0 else 0)
        out = capfd.readouterr().out
        assert out.startswith('a machine\n') and expected in out.splitlines()[-1]


# What holds on a GPU

SPEEDS = {
    'fp32': {'training': 1000.0, 'extraction': 3000.0, 'peak': 3.21},
    'tf32': {'training': 1500.0, 'extraction': 4000.0, 'peak': 3.21},
    'bf16': {'training': 2310.0, 'extraction': 6000.0, 'peak': 2.5},
    'bf16 compiled': {'training': 3000.0, 'peak': 2.0},
}
GOOD = {
    'device': {'name': 'NVIDIA H100', 'torch': '2.9+cu130', 'bf16': True},
    'tests': {'passed': ['a', 'b'], 'failed': [], 'error': [], 'skipped': ['c'], 'selected': 3, 'status': 0},
    'demo': 0.8514,
    'speeds': SPEEDS,
}


def test_all_holds():
    line, problems = importlib.import_module('gpu').verdict(GOOD)
    assert problems == []
    assert line == (
        'GPU NVIDIA H100, torch 2.9+cu130: tests 2 of 2 passed, 1 skipped, demo mAP 85.1, training 1000 fp32, '
        '1500 tf32 (x1.5 fp32), 2310 bf16 (x2.3 fp32), 3000 bf16 compiled (x3.0 fp32) images/s, extraction 3000 fp32, '
        '4000 tf32 (x1.3 fp32), 6000 bf16 (x2.0 fp32) images/s, peak memory 3.2 fp32, 3.2 tf32, 2.5 bf16, '
        '2.0 bf16 compiled GB: all holds'
    )


@pytest.mark.parametrize(
    ('change', 'problem'),
    [
        ({'tests': {**GOOD['tests'], 'passed': ['a'], 'failed': ['b[1]'], 'status': 1}}, 'b[1]'),
        ({'tests': {**GOOD['tests'], 'passed': ['a'], 'error': ['b'], 'status': 1}}, 'b'),
        ({'tests': {**GOOD['tests'], 'selected': 9, 'status': None}}, '6 tests did not run (the end of their time)'),
        ({'tests': {**GOOD['tests'], 'selected': 9, 'status': 3}}, '6 tests did not run (exit status 3)'),
        ({'tests': {**GOOD['tests'], 'passed': [], 'status': 0, 'selected': 1}}, '0 tests did not run (exit status 0)'),
        ({'demo': None}, 'demo mAP of at least 75'),
        ({'demo': 0.5}, 'demo mAP of at least 75'),
        ({'speeds': {**SPEEDS, 'tf32': None}}, 'speed in tf32 could be measured'),
        ({'speeds': {**SPEEDS, 'fp32': None}}, 'speed in fp32 could be measured'),
        (
            {'speeds': {**SPEEDS, 'bf16': {'training': 900.0}, 'bf16 compiled': {}}},
            'training in bf16 as fast as in fp32',
        ),
        ({'speeds': {**SPEEDS, 'bf16 compiled': {'training': 2000.0}}}, 'training in bf16 compiled as fast as in bf16'),
        ({'speeds': {**SPEEDS, 'tf32': {'extraction': 2000.0}}}, 'extraction in tf32 as fast as in fp32'),
    ],
)
def test_what_does_not_hold_is_named(change, problem):
    line, problems = importlib.import_module('gpu').verdict({**GOOD, **change})
    assert problems == [problem] and line.endswith(f': does not hold: {problem}')


def test_a_gpu_without_bf16_need_not_be_fast_in_it():
    slow = {**SPEEDS, 'bf16': {'training': 90.0, 'extraction': 90.0}, 'bf16 compiled': {'training': 95.0}}
    old = {**GOOD['device'], 'bf16': False}
    assert importlib.import_module('gpu').verdict({**GOOD, 'speeds': slow, 'device': old})[1] == []


def test_outcomes_of_tests_that_were_ended():
    text = (
        'collecting ... collected 90 items / 84 deselected / 6 selected\n\n'
        'tests/test_gpu.py::test_one[a b-1] PASSED  [ 16%]\ntests/test_gpu.py::test_two SKIPPED (needs tw...) [ 33%]\n'
        'tests/test_gpu.py::test_three FAILED  [ 50%]\ntests/test_gpu.py::test_four ERROR [ 66%]\n'
        'tests/test_gpu.py::test_five '
    )
    expected = {
        'passed': ['test_one[a b-1]'],
        'skipped': ['test_two'],
        'failed': ['test_three'],
        'error': ['test_four'],
    }
    outcomes = importlib.import_module('gpu').outcomes
    assert outcomes(text) == {**expected, 'selected': 6}
    assert outcomes('collecting ... collected 1 item\n')['selected'] == 1 and outcomes('')['selected'] == 0


def gpu_command(*args):
    command = [sys.executable, FOLDER / 'gpu.py', *args]
    return subprocess.run(command, capture_output=True, text=True, env=ENV, timeout=HANG)


def test_the_whole_of_it_on_the_cpu():
    """And with it some of the logic of test_gpu.py."""
    run = gpu_command('--dry')
    assert run.returncode == 0, run.stdout + run.stderr
    line = run.stdout.splitlines()[-1]
    assert re.fullmatch(r'DRY RUN on the CPU, .*tests (\d+) of \1 passed, demo mAP .*bf16 \(x.*: all holds', line), line
    assert 'test_no_step_waits' in run.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason='this machine has a GPU')
def test_a_machine_without_a_gpu():
    run = gpu_command()
    assert (run.returncode, run.stdout) == (1, '')
    assert run.stderr.startswith('nothing was measured: there is no CUDA device for torch 2')


def test_a_package_that_is_missing(monkeypatch):
    gpu = importlib.import_module('gpu')
    monkeypatch.setattr(gpu.importlib.util, 'find_spec', lambda name: name not in ('PIL', 'pytest'))
    monkeypatch.setattr(sys, 'argv', ['gpu.py'])
    with pytest.raises(SystemExit, match=r'^nothing was measured: install pytest, Pillow$'):
        gpu.main()


def test_a_script_does_without_tqdm(data_dir, tmp_path):
    options = ['-a', 'tiny', '--height', 32, '--width', 16, '--use-cpu', '--precision', 'fp32', '--pretrained', 'none']
    options += ['--train-batch', 8, '--max-epoch', 1, '--no-report', '--data-dir', data_dir, '--save-dir', tmp_path]
    command = [sys.executable, ROOT / 'tests' / 'tiny.py', ROOT / 'train_img_model_xent.py', *options]
    env = {**ENV, 'PYTHONPATH': str(FOLDER / 'instead')}
    run = subprocess.run([*map(str, command)], capture_output=True, text=True, env=env, timeout=HANG)
    assert run.returncode == 0 and 'mAP: ' in run.stdout, run.stderr
