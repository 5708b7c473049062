"""Networks run by onnxruntime or OpenVINO on the CPU, converted in memory from any weights that can be loaded."""

from collections import Counter
from threading import Lock
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import Dim

from extraction.onnx_network import INPUT, OUTPUT, session_of
from extraction.programs import obstacle, onnx_of, quiet
from models.network import Network, Replacement
from runtime.errors import UserError, plain

ENGINES = {  # engine -> the packages that it needs
    'onnxruntime': ['onnx', 'onnxscript', 'onnxruntime'],
    'openvino': ['onnx', 'onnxscript', 'openvino'],
}
FIXED = 3  # programs of OpenVINO for one batch size each; each takes memory
ONE_AT_A_TIME = Lock()  # torch traces one network at a time in a process


class TakesArrays(nn.Module):
    """A network that takes images in the memory layout of `TestTransform`, (B, h, w, 3), so they are not copied."""

    def __init__(self, network: Network):
        super().__init__()
        self.network = network.eval()

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.network(images.permute(0, 3, 1, 2))
        return features.float()


class ByEngine(Replacement):
    """A network in eval mode that another engine runs: (B, 3, height, width) -> (B, feat_dim), float32.

    Later changes to the weights have no effect. Several threads may call it at once.

    Args:
        precision: 'fp32', or 'bf16', which only OpenVINO has.
        batch: the usual batch size.

    Raises:
        UserError: an operator of the network has no counterpart in ONNX, or the engine cannot run it.
    """

    def __init__(self, network: Network, height: int, width: int, engine: str, precision: str, batch: int):
        super().__init__(network)
        what = f'--engine {engine}: the network'
        contents = as_onnx(network, height, width, what)
        try:
            if engine == 'onnxruntime':
                self.compute: OnnxRuntime | OpenVINO = OnnxRuntime(contents, what)
            else:
                self.compute = OpenVINO(contents, (batch, height, width, 3), precision)
        except UserError:
            raise
        except Exception as problem:  # of any type: another library compiles the network
            raise UserError(f'{what} cannot be compiled ({plain(str(problem))}); remove --engine') from problem
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        images = x.permute(0, 2, 3, 1).contiguous()  # (B, h, w, 3), no copy of a batch in channels_last
        return torch.from_numpy(self.compute(images.numpy()))


def as_onnx(network: Network, height: int, width: int, what: str) -> bytes:
    """The network as an ONNX file: any number of normalised images (B, height, width, 3) -> features (B, D)."""
    example = torch.zeros(2, height, width, 3)
    with ONE_AT_A_TIME, quiet(printing=True):
        try:
            with torch.no_grad():
                program = torch.export.export(
                    TakesArrays(network), (example,), dynamic_shapes={'images': {0: Dim('batch')}}, strict=False
                )
        except Exception as problem:  # of any type, some of them private
            raise UserError(f'{what} cannot be converted: {obstacle(problem)}; remove --engine') from problem
        return onnx_of(program, {0: 'batch'}, {}, f'{what} cannot be converted', 'remove --engine')


class OnnxRuntime:
    """An ONNX file as a function, float32 (B, h, w, 3) -> features (B, D), with as many threads as torch uses now."""

    def __init__(self, contents: bytes, what: str):
        self.session = session_of(contents, what, 'remove --engine')

    def __call__(self, images: np.ndarray) -> np.ndarray:
        features: np.ndarray = self.session.run([OUTPUT], {INPUT: images})[0]
        return features


class OpenVINO:
    """The same in OpenVINO.

    A program for a fixed number of images is up to a fifth faster than one for any number. There is one for the number
    in `shape`, and one for each of the first numbers that occur twice, at most FIXED in all.

    Attributes:
        requests: number of images, or -1 for any -> a request to the program.
    """

    def __init__(self, contents: bytes, shape: tuple[int, int, int, int], precision: str):
        import openvino  # optional

        self.core, self.shape, self.lock, self.seen = openvino.Core(), shape, Lock(), Counter[int]()
        self.model = self.core.read_model(contents)
        self.how: dict[str, Any] = {
            'INFERENCE_PRECISION_HINT': {'fp32': 'f32', 'bf16': 'bf16'}[precision],
            'INFERENCE_NUM_THREADS': torch.get_num_threads(),
            'PERFORMANCE_HINT': 'LATENCY',  # all threads share a batch
            'ENABLE_CPU_PINNING': False,  # otherwise the processes of a machine all choose its first cores
        }
        self.requests: dict[int, Any] = {}
        self._compile(shape[0])

    def _compile(self, number: int) -> None:
        model = self.model.clone()
        model.reshape([number, *self.shape[1:]])
        self.requests[number] = self.core.compile_model(model, 'CPU', self.how).create_infer_request()

    def __call__(self, images: np.ndarray) -> np.ndarray:
        number = len(images)
        with self.lock:
            self.seen[number] += 1
            recurs = self.seen[number] > 1 and len(self.requests.keys() - {-1}) < FIXED
            key = number if number in self.requests or recurs else -1
            if key not in self.requests:
                self._compile(key)
            features: np.ndarray = self.requests[key].infer([images], share_inputs=True)[0]
        return features
