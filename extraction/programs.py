"""Traces a network, writes it as a program of ONNX or torch.export, and opens the file."""

import contextlib
import io
import json
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.export import Dim, ExportedProgram

from extraction.graph import Graph
from extraction.onnx_network import INPUT, OUTPUT, Session
from runtime.errors import UserError, plain

EXPORT_FORMATS = {'onnx': ['onnx', 'onnxscript', 'onnxruntime'], 'pt2': []}  # format -> the packages that it needs
METADATA_FILE = 'deep-person-reid.json'  # the metadata in a .pt2 file
AXES = {0: 'batch', 1: 'height', 2: 'width'}  # the dynamic axes of the images
OPSET = 18  # of ONNX: the one for which torch writes graphs without converting them

Opened = Callable[[np.ndarray], np.ndarray]  # uint8 (B, H, W, 3) -> float32 (B, D)


def program_of(graph: Graph, what: str) -> ExportedProgram:
    """The graph traced by torch.export, with dynamic batch size, height and width of the images.

    Raises:
        UserError: an operator cannot be traced.
    """
    example = torch.zeros(2, graph.height + 1, graph.width + 3, 3, dtype=torch.uint8)
    sizes = {axis: Dim(name) for axis, name in AXES.items()}
    try:
        with quiet(), torch.no_grad():
            return torch.export.export(graph, (example,), dynamic_shapes={INPUT: sizes}, strict=False)
    except Exception as problem:  # of any type, some of them private
        raise UserError(f'{what} cannot be exported: {obstacle(problem)}') from problem


def write(program: ExportedProgram, path: Path, kind: str, metadata: Mapping[str, str], what: str) -> None:
    """Write the file, in one of EXPORT_FORMATS.

    Raises:
        UserError: an operator has no counterpart in ONNX, or the file would be larger than ONNX allows.
        OSError: the file cannot be written.
    """
    if kind == 'pt2':
        for module in program.graph_module.modules():
            for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
                node.meta.pop('stack_trace', None)  # it contains paths of this machine
        file = io.BytesIO()  # torch aborts the process if a file cannot be written
        with quiet():
            torch.export.save(program, file, extra_files={METADATA_FILE: json.dumps(metadata)})
        contents = file.getvalue()
    else:
        with quiet():
            contents = onnx_of(program, AXES, metadata, f'{what} cannot be written as ONNX', '--format pt2 may work')
    path.write_bytes(contents)


def onnx_of(
    program: ExportedProgram, axes: Mapping[int, str], metadata: Mapping[str, str], what: str, instead: str
) -> bytes:
    """The program as an ONNX file; `axes` are the dynamic axes of its only input, and their names.

    Raises:
        UserError: an operator has no counterpart in ONNX, or the file would be larger than ONNX allows. The message is
            made of `what`, the reason, and `instead`, the advice.
    """
    try:
        written = torch.onnx.export(
            program, dynamo=True, input_names=[INPUT], output_names=[OUTPUT], dynamic_shapes={INPUT: dict(axes)},
            opset_version=OPSET, verbose=False,
        )  # fmt: skip
        assert written is not None  # with dynamo=True
        model: Any = written.model_proto
        strip(model)
        for name, value in metadata.items():
            model.metadata_props.add(key=name, value=value)
        contents: bytes = model.SerializeToString()
        return contents
    except Exception as problem:  # of any type, some of them private
        raise UserError(f'{what}: {obstacle(problem)}; {instead}') from problem


def strip(part: Any) -> None:
    """Remove all annotations from an ONNX model, a protobuf message, recursively.

    torch annotates every node with a stack trace, which contains paths of this machine.
    """
    from google.protobuf.message import Message  # which onnx needs

    for field, value in part.ListFields():
        if field.name in ('metadata_props', 'doc_string'):
            part.ClearField(field.name)
        elif field.message_type is not None:
            for inner in [value] if isinstance(value, Message) else value:
                strip(inner)


def obstacle(problem: BaseException) -> str:
    """Why an export failed: the unsupported operator if the exporter names one, otherwise the original message."""
    reasons: list[str] = []
    cause: BaseException | None = problem
    while cause is not None:
        reasons.append(str(cause).strip() or type(cause).__name__)
        cause = cause.__cause__ or cause.__context__
    named = re.search(r"<OpOverload\(op='([^']+)'|target=torch\.ops\.([\w.]+)", '\n'.join(reversed(reasons)))
    return f'the operator {plain(named[1] or named[2])} is not supported' if named else plain(reasons[-1])


@contextlib.contextmanager
def quiet(printing: bool = False) -> Iterator[None]:
    """Suppress what torch logs on a failure (pages of its graph), its warnings about its own code, and prints.

    Logs, warnings and the streams belong to the whole process. With `printing`, the streams, to which other threads
    may print, stay as they are.
    """
    before = logging.root.manager.disable  # logging has no function that returns it
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.ExitStack() as stack:
            warnings.simplefilter('ignore')
            if not printing:
                stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
                stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
            yield
    finally:
        logging.disable(before)


def opened(path: Path, kind: str) -> tuple[Opened, str]:
    """The written file as a function, and the name and version of the program that runs it."""
    if kind == 'onnx':
        import onnxruntime

        return Session(path), f'onnxruntime {onnxruntime.__version__}'
    with open(path, 'rb') as file:
        module = torch.export.load(file).module()  # written by this process; a file from elsewhere could run code

    def run(images: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            features: np.ndarray = module(torch.from_numpy(images)).numpy()
        return features

    return run, f'torch {torch.__version__}'
