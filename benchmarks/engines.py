"""Extraction on a CPU by torch, onnxruntime and OpenVINO: rows of `table.py`, measured with BENCH=full.

    python benchmarks/table.py --full engines      # these rows alone; most of the time is compiling
    python benchmarks/engines.py --short           # does it run? One small network, small images

All compute the same network for images that are ready, float32 (B, 3, 256, 128): the other engines, called by their own
interfaces, read an ONNX file of it, without the resize. Each side has a process of its own and as many threads as
torch, and they take turns. A row compares this project's fastest way with the faster of the others; rows below it show
each side. onnxruntime has no convolutions in bf16 on CPUs.

eager:         the network as it is, NCHW
channels_last: as a test and an extractor without options compute it
compiled:      with --compile; for single images as with batch=1
--engine NAME: as an extractor computes it with this option
"""

import argparse
import contextlib
import importlib.util
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

if __name__ == '__main__':
    sys.path[:1] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

import models
from extraction.compiling import Compiled
from extraction.engines import ByEngine
from extraction.programs import OPSET, quiet
from models.network import Network
from runtime import cpu
from table import Row, row

ARCHS = ('resnet50', 'osnet_x1_0', 'osnet_x0_25', 'mobilenet_v2')
OTHERS = ('onnxruntime', 'openvino')
OURS = ('eager', 'channels_last', 'compiled', *(f'--engine {name}' for name in OTHERS))
PRECISIONS = {'fp32': 1e-4, 'bf16': 0.1}  # and how much two sides may differ, relative to the features
TARGET = 0.95  # least speed relative to the faster of the others


class Plan(NamedTuple):
    """What is measured: images of a batch, turns, and batches and single images of a turn."""

    archs: Sequence[str] = ARCHS
    height: int = 256
    width: int = 128
    batch: int = 32
    turns: int = 7
    batches: int = 3
    singles: int = 30


SHORT = Plan(('osnet_x0_25',), 64, 32, 4, 1, 1, 3)


def network(arch: str, plan: Plan) -> Network:
    torch.manual_seed(0)
    return models.init_model(arch, 751, size=(plan.height, plan.width), report=lambda _: None).eval()


def write(arch: str, plan: Plan, path: str) -> None:
    """The network alone as an ONNX file, with a dynamic batch."""
    example, axes = torch.rand(2, 3, plan.height, plan.width), {0: torch.export.Dim('batch')}
    with quiet(), torch.no_grad():
        program = torch.export.export(network(arch, plan), (example,), dynamic_shapes={'x': axes}, strict=False)
        exported = torch.onnx.export(program, dynamo=True, opset_version=OPSET, verbose=False)
        assert exported is not None  # as with dynamo=False
        exported.save(path, external_data=False)


def our_side(name: str, arch: str, precision: str, plan: Plan, batch: int) -> Callable[[], np.ndarray]:
    cpu.tune()
    model, images = network(arch, plan), inputs(plan, batch)
    if name != 'eager':
        model, images = model.to(memory_format=torch.channels_last), images.to(memory_format=torch.channels_last)
    if name == 'compiled':
        model = Compiled(model, plan.height, plan.width, batch)
    elif name.startswith('--engine'):
        model = ByEngine(model, plan.height, plan.width, name.split()[1], precision, batch)

    @torch.inference_mode()
    def run() -> np.ndarray:
        with torch.autocast('cpu', torch.bfloat16, enabled=precision == 'bf16'):
            features: np.ndarray = model(images).float().numpy()
            return features

    return run


def onnxruntime_side(file: str, plan: Plan, batch: int) -> Callable[[], np.ndarray]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(file, options, providers=['CPUExecutionProvider'])
    feed = {session.get_inputs()[0].name: inputs(plan, batch).numpy()}
    return lambda: session.run(None, feed)[0]


def openvino_side(file: str, precision: str, plan: Plan, batch: int) -> Callable[[], np.ndarray]:
    import openvino

    core, images = openvino.Core(), inputs(plan, batch).numpy()
    model = core.read_model(file)
    model.reshape(images.shape)  # static shapes are faster
    how = {
        'INFERENCE_PRECISION_HINT': {'fp32': 'f32', 'bf16': 'bf16'}[precision],
        'INFERENCE_NUM_THREADS': torch.get_num_threads(),
        'PERFORMANCE_HINT': 'LATENCY',  # all threads share a batch
    }
    request = core.compile_model(model, 'CPU', how).create_infer_request()
    return lambda: request.infer([images], share_inputs=True)[0]


def inputs(plan: Plan, batch: int) -> torch.Tensor:
    return torch.rand(batch, 3, plan.height, plan.width, generator=torch.Generator().manual_seed(1))


def side(name: str, arch: str, precision: str, plan: Plan, batch: int, file: str) -> Callable[[], np.ndarray]:
    """The features of a batch, (B, D), as this side computes them."""
    if name == 'onnxruntime':
        return onnxruntime_side(file, plan, batch)
    if name == 'openvino':
        return openvino_side(file, precision, plan, batch)
    return our_side(name, arch, precision, plan, batch)


_run: Callable[[], np.ndarray]  # of this process, see `prepare`


def prepare(name: str, arch: str, precision: str, plan: Plan, batch: int, file: str) -> None:
    global _run  # the process of a side calls this once, and an initializer can keep its result nowhere else
    _run = side(name, arch, precision, plan, batch, file)


def first() -> np.ndarray:
    """The features, once: it also compiles."""
    return [_run() for _ in range(3)][-1]


def turn(repeats: int) -> list[float]:
    """The seconds of each call."""
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        _run()
        times.append(time.perf_counter() - begin)
    return times


def sides_of(precision: str) -> list[str]:
    """Those that are installed and have the precision."""
    return [
        name
        for name in (*OURS, *OTHERS)
        if (engine := name.split()[-1]) not in OTHERS
        or (importlib.util.find_spec(engine) and (engine, precision) != ('onnxruntime', 'bf16'))
    ]


def measured(arch: str, precision: str, plan: Plan, batch: int, file: str) -> dict[str, list[list[float]]]:
    """Of each side the seconds of each call, turn by turn. Asserts that all sides compute the same features."""
    repeats = plan.singles if batch == 1 else plan.batches
    with contextlib.ExitStack() as stack:
        processes = {
            name: stack.enter_context(
                ProcessPoolExecutor(
                    1, multiprocessing.get_context('spawn'), prepare, (name, arch, precision, plan, batch, file)
                )
            )
            for name in sides_of(precision)
        }
        waiting = {name: process.submit(first) for name, process in processes.items()}  # they compile side by side
        features = {name: each.result() for name, each in waiting.items()}
        agree(features, PRECISIONS[precision])
        times: dict[str, list[list[float]]] = {name: [] for name in processes}
        for _ in range(plan.turns):
            for name, process in processes.items():
                times[name].append(process.submit(turn, repeats).result())
    return times


def agree(features: dict[str, np.ndarray], tolerance: float) -> None:
    expected = features[OURS[0]]
    for name, each in features.items():
        error = np.linalg.norm(each - expected, axis=1) / np.linalg.norm(expected, axis=1)
        assert error.max() <= tolerance, f'{name} differs by {error.max():.1e}'


def compared(what: str, times: dict[str, list[list[float]]], batch: int) -> Iterator[Row]:
    """A row for the fastest of ours and of the others by their medians, and one for each side."""
    middle = {name: [statistics.median(each) for each in turns] for name, turns in times.items()}
    speed = {name: statistics.median(each) for name, each in middle.items()}
    ours = min((name for name in OURS if name in times), key=speed.__getitem__)
    others = [name for name in OTHERS if name in times]
    latency = batch == 1
    factor = 1000 if latency else 1  # milliseconds of an image, or images per second
    chosen = {'ours': [factor * each for each in middle[ours]]}
    text = f'{what}: {ours}'
    if others:
        best = min(others, key=speed.__getitem__)
        chosen['plain'], text = [factor * each for each in middle[best]], f'{text}; plain: {best}'
    found = row(text, chosen, 0 if latency else batch, plain_target=TARGET if others else None)
    found.unit = 'ms' if latency else found.unit
    yield found
    for name in times:
        each = row(f'the same: {name}', {'ours': [factor * one for one in middle[name]]}, 0 if latency else batch)
        if latency:
            slow = 1000 * float(np.percentile(np.concatenate(times[name]), 99))
            each.what, each.unit = f'{each.what}, 99th percentile {slow:.2f} ms', 'ms'
        yield each


def rows(full: bool, plan: Plan | None = None) -> Iterator[Row]:
    if not full:
        yield Row('torch, onnxruntime and OpenVINO on a CPU: measured with BENCH=full')
        return
    missing = [name for name in ('onnx', 'onnxscript', *OTHERS) if not importlib.util.find_spec(name)]
    if missing:
        yield Row(f'torch, onnxruntime and OpenVINO on a CPU: install {" ".join(missing)}')
        return
    plan = plan or Plan()
    for arch in plan.archs:
        with tempfile.TemporaryDirectory() as folder:
            file = f'{folder}/network.onnx'
            write(arch, plan, file)
            for precision in PRECISIONS:
                for batch in (plan.batch, 1):
                    how = f'batches of {batch}' if batch > 1 else 'one image alone'
                    times = measured(arch, precision, plan, batch, file)
                    yield from compared(f'{arch} on a CPU, {precision}, {how}', times, batch)


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--short', action='store_true', help='one small network, small images')
    for each in rows(True, SHORT if parser.parse_args().short else None):
        print(each, flush=True)
