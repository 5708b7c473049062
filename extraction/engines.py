"""Networks run by onnxruntime or OpenVINO on the CPU, converted in memory from any weights that can be loaded."""

from collections.abc import Callable
from threading import Lock
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import Dim

from extraction.onnx_network import INPUT, OUTPUT, session_of
from extraction.programs import obstacle, onnx_of, quiet
from models.network import Network, Replacement
from runtime.errors import UserError

ENGINES = {  # engine -> the packages that it needs
    'onnxruntime': ['onnx', 'onnxscript', 'onnxruntime'],
    'openvino': ['onnx', 'onnxscript', 'openvino'],
}


class ChannelsLast(nn.Module):
    """A network that takes images in the memory layout of `TestTransform`, (B, h, w, 3), so they are not copied."""

    def __init__(self, network: Network):
        super().__init__()
        self.network = network.eval()

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.network(images.permute(0, 3, 1, 2))
        return features.float()


class Converted(Replacement):
    """A network in eval mode that another engine runs: (B, 3, height, width) -> (B, feat_dim), float32.

    Later changes to the weights have no effect. Several threads may call it at once.

    Args:
        precision: 'fp32', or 'bf16', which only OpenVINO has.
        batch: the usual batch size.

    Raises:
        UserError: an operator of the network has no counterpart in ONNX.
    """

    def __init__(self, network: Network, height: int, width: int, engine: str, precision: str, batch: int):
        super().__init__(network)
        contents = converted(network, height, width, f'--engine {engine}: the network')
        self.run = run_by_onnxruntime(contents) if engine == 'onnxruntime' else OpenVINO(contents, precision, batch)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        images = x.permute(0, 2, 3, 1).contiguous()  # (B, h, w, 3), no copy of a batch in channels_last
        return torch.from_numpy(self.run(images.numpy()))


def converted(network: Network, height: int, width: int, what: str) -> bytes:
    """The network as an ONNX file: any number of normalised images (B, height, width, 3) -> features (B, D)."""
    example = torch.zeros(2, height, width, 3)
    try:
        with quiet(), torch.no_grad():
            program = torch.export.export(
                ChannelsLast(network), (example,), dynamic_shapes={'images': {0: Dim('batch')}}, strict=False
            )
    except Exception as problem:  # of any type, some of them private
        raise UserError(f'{what} cannot be converted: {obstacle(problem)}; remove --engine') from problem
    return onnx_of(program, {0: 'batch'}, {}, f'{what} cannot be converted', 'remove --engine')


def run_by_onnxruntime(contents: bytes) -> Callable[[np.ndarray], np.ndarray]:
    """What computes the features of images: float32 (B, h, w, 3) -> float32 (B, D)."""
    session = session_of(contents, 'the converted network')

    def run(images: np.ndarray) -> np.ndarray:
        features: np.ndarray = session.run([OUTPUT], {INPUT: images})[0]
        return features

    return run


class OpenVINO:
    """An ONNX file run by OpenVINO on the CPU, with the number of threads that torch uses at this moment.

    It is compiled up to three times, each in less than a second: for batches of `batch` images, for single images, and
    for any other number. A program for a fixed number of images is up to a fifth faster than one for any number.
    """

    def __init__(self, contents: bytes, precision: str, batch: int):
        import openvino  # optional

        self.core = openvino.Core()
        self.contents, self.sizes, self.lock = contents, (batch, 1), Lock()
        self.requests: dict[int, Any] = {}  # by batch size; -1: any other
        self.how: dict[str, Any] = {
            'INFERENCE_PRECISION_HINT': {'fp32': 'f32', 'bf16': 'bf16'}[precision],
            'INFERENCE_NUM_THREADS': torch.get_num_threads(),
            'PERFORMANCE_HINT': 'LATENCY',  # all threads share a batch
        }

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """float32 (B, h, w, 3) -> features (B, D), float32."""
        size = len(images) if len(images) in self.sizes else -1
        with self.lock:
            if size not in self.requests:
                model = self.core.read_model(self.contents)
                model.reshape([size, *images.shape[1:]])
                self.requests[size] = self.core.compile_model(model, 'CPU', self.how).create_infer_request()
            features: np.ndarray = self.requests[size].infer([images], share_inputs=True)[0]
        return features
