"""The network that computes the features, from a file of weights or an exported file, and how it is used."""

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from arguments import RunOptions
from batches.resizing import KERNELS
from extraction import compiling, onnx_network
from extraction.engines import ENGINES, ByEngine
from extraction.onnx_network import need
from models.network import LENGTHS, Network, Training
from models.Timm import PREFIX
from runtime import notices
from runtime.device import precision_of
from runtime.errors import UserError, plain
from runtime.tiles import DISTANCES
from weights import arch_of, build
from weights import read as read_weights

ASSUMED = 'Assumed, because the file does not record: {}; --assume NAME=VALUE changes it'
VERSION = 1  # of the digest's definition
PRECISIONS = 'auto', 'fp32', 'tf32', 'bf16'


class Usage(NamedTuple):
    """How a network's features are computed and compared."""

    height: int
    width: int
    interpolation: str  # '': the network's own
    distance: str
    flip_test: bool  # average the features of an image and its mirror image


@dataclass
class Source:
    """A network in eval mode, the usage of its features, and what is known of its weights.

    flips:  whether the network itself averages the features of mirror images if `usage.flip_test` is set
    sealed: the digest of an exported file, whose usage is fixed; '' for weights
    notes:  lines about what was loaded
    """

    model: Network
    usage: Usage
    arch: str
    trained: Training
    notes: list[str]
    flips: bool = False
    sealed: str = ''

    def precision_on(self, device: torch.device, wanted: str) -> str:
        """The precision that is wanted; auto is fp32, as in a test.

        Raises:
            UserError: the network does not support the precision or the device.
        """
        if wanted not in PRECISIONS:
            raise UserError(f'there is no precision {plain(wanted)}: choose {", ".join(PRECISIONS)}')
        if self.sealed and (device.type != 'cpu' or wanted not in ('auto', 'fp32')):
            raise UserError(
                f'{self.trained.where}: an ONNX file is run on the CPU in fp32: choose these, or give the weights'
            )
        if wanted == 'auto' or self.sealed:
            return 'fp32'
        return precision_of(RunOptions(arch=self.arch, width=self.usage.width, precision=wanted), device)

    def compiled(self, device: torch.device, batch: int) -> Network:
        """The network, compiled for batches of at most `batch` images.

        Raises:
            UserError: it is on a GPU or in an ONNX file, or there is no compiler.
        """
        self._check_for_cpu('--compile', device)
        compiling.check_compiler(*compiling.CPP)
        return compiling.Compiled(self.model, self.usage.height, self.usage.width, batch)

    def by_engine(self, device: torch.device, engine: str, precision: str, batch: int) -> Network:
        """The network, run by another engine, one of ENGINES; `batch` is the usual batch size.

        Raises:
            UserError: it is on a GPU or in an ONNX file, or cannot be converted; or the engine is not installed or does
                not support the precision.
        """
        self._check_for_cpu(f'--engine {engine}', device)
        if engine == 'onnxruntime' and precision == 'bf16':
            raise UserError('--engine onnxruntime has no convolutions in bf16 on CPUs: choose fp32, or openvino')
        need(ENGINES[engine], f'--engine {engine}')
        return ByEngine(self.model, self.usage.height, self.usage.width, engine, precision, batch)

    def _check_for_cpu(self, option: str, device: torch.device) -> None:
        if self.sealed or device.type != 'cpu':
            where = f'{self.trained.where} is run by onnxruntime' if self.sealed else f'the network is on {device}'
            instead = 'remove it' if self.sealed else 'use the CPU (--use-cpu), or remove it'
            raise UserError(f'{option} is for networks of torch on CPUs, and {where}: {instead}')

    def digest(self, precision: str, flip_test: bool, engine: str = 'torch') -> str:
        """16 hexadecimal digits that identify the weights and how they are used.

        In bf16 the digest depends on the engine, or 'compiled', because they round differently; in fp32 their features
        differ in the last digits only.
        """
        if self.sealed:
            return self.sealed
        model, usage = self.model, self.usage
        arithmetic = f'bf16 {engine}' if precision == 'bf16' and engine != 'torch' else precision
        how = self.arch, usage.height, usage.width, usage.interpolation, arithmetic, flip_test
        digest = hashlib.sha256(repr((VERSION, model.made, model.normalisation, *how)).encode())
        for name, value in sorted(model.state_dict().items()):
            if not name.startswith('classifier.'):
                digest.update(f'{name} {value.dtype} {tuple(value.shape)}'.encode())
                digest.update(value.cpu().contiguous().flatten().view(torch.uint8).numpy())
        return digest.hexdigest()[:16]


def usage_of(trained: Training) -> Usage:
    """The usage with which the run or project of the weights tests; by default 256 x 128 pixels, Euclidean distance."""

    def option(name: str, default: Any, fits: Callable[[Any], bool] = lambda _: True) -> Any:
        value = {**trained.options, **trained.test}.get(name)
        return value if type(value) is type(default) and fits(value) else default

    return Usage(
        option('height', 256, lambda pixels: pixels in LENGTHS),
        option('width', 128, lambda pixels: pixels in LENGTHS),
        option('interpolation', '', lambda name: name in KERNELS),
        option('distance', 'euclidean', lambda name: name in DISTANCES),
        option('flip_test', False),
    )


def source_of(
    path: str | os.PathLike, arch: str | None = None, assume: str = '', height: int | None = None,
    width: int | None = None,
) -> Source:  # fmt: skip
    """The source of a file: weights, or, recognised by its suffix, an ONNX file written by `export.py`.

    Raises:
        UserError: the file cannot be read or does not fit the arguments.
    """
    suffix, where = os.path.splitext(os.fspath(path))[1].lower(), plain(os.fspath(path), 500)
    if suffix == '.pt2':
        raise UserError(
            f'{where}: .pt2 files are read by torch.export.load, which is not safe for untrusted files; give the '
            f'weights, or the same network as an .onnx file'
        )
    if suffix == '.onnx':
        return of_onnx(path, where, arch=arch, assume=assume, height=height, width=width)
    return of_weights(path, where, arch, assume, height, width)


def of_weights(
    path: str | os.PathLike, where: str, arch: str | None, assume: str, height: int | None, width: int | None
) -> Source:
    """The network that the weights were trained with."""
    notes = list[str]()
    loaded = read_weights(path, assume)
    shared = any(each.startswith('project=') for each in loaded.assumed)  # two projects use these names
    if shared and (arch or '').startswith(PREFIX) and 'project=' not in assume:
        loaded = read_weights(path, f'{assume},project=timm')
        loaded.assumed.remove('project=timm')  # the user has chosen it with `arch`
    if loaded.assumed:
        notes.append(ASSUMED.format(', '.join(loaded.assumed)))
    trained, usage = loaded.trained, usage_of(loaded.trained)
    height, width = height or usage.height, width or usage.width
    size = {'height': height, 'width': width}  # some networks take images of one size only
    sized = replace(loaded, trained=replace(trained, options={**trained.options, **size}))
    with torch.random.fork_rng(devices=[]), _usual_defaults():  # initial weights, replaced at once, are random
        model = build(sized, arch, where, notes.append)
    zero_subnormals(model)
    if min(height, width) < model.smallest:
        raise UserError(
            f'{where}: the network needs images of at least {model.smallest} pixels, not {height} x {width}'
        )
    notes += [f'Notice: {notice}' for notice in notices.of_size(trained, height, width)]
    arch = str(arch or trained.options.get('arch') or arch_of(loaded.state_dict))
    interpolation = usage.interpolation or model.interpolation
    return Source(model, usage._replace(height=height, width=width, interpolation=interpolation), arch, trained, notes)


@contextlib.contextmanager
def _usual_defaults() -> Iterator[None]:
    """Tensors are created as float32 on the CPU, whatever the program's defaults."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device('cpu'):
            yield
    finally:
        torch.set_default_dtype(before)


@torch.no_grad()
def zero_subnormals(model: torch.nn.Module) -> None:
    """Replace weights below 1.2e-38 by 0: no feature changes, but some processors are many times as fast."""
    for values in model.state_dict().values():
        if values.is_floating_point():
            values.masked_fill_(values.abs() < torch.finfo(values.dtype).tiny, 0)


def of_onnx(path: str | os.PathLike, where: str, **given: Any) -> Source:
    """The network of an ONNX file, whose usage is fixed."""
    model, facts = onnx_network.open_onnx(path)
    for name, value in given.items():
        if value and value != getattr(facts, name, None):
            raise UserError(
                f'{where}: --{name} {plain(str(value))} cannot be changed in an ONNX file; remove it, or export the '
                f'weights with it'
            )
    usage = Usage(facts.height, facts.width, facts.interpolation, facts.distance, facts.flip_test)
    notes = [f'{where}: {facts.arch} for images of {facts.height} x {facts.width}, written by export.py']
    notes += [f'Notice: {notice}' for notice in notices.of_size(facts.trained, facts.height, facts.width)]
    return Source(model, usage, facts.arch, facts.trained, notes, flips=True, sealed=model.session.digest)
