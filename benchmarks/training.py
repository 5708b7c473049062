"""Images per second of training and extraction, on the device that is there: rows of `table.py`.

The sides work on one resident batch of 32 images of 256x128, ResNet50, each in a process of its own: on a CPU it counts
what a process has done with its memory before, and on a GPU no side has less memory than another. The original's way is
NCHW, eager, Adam as torch gives it. All sides multiply in the same precision and let cuDNN choose its algorithms by
trial, except in the rows that name a precision of plain. "From files" is this project's whole loop (decoding workers,
copy, augmentation, step, meter).
"""

import contextlib
import io
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Adam, Optimizer

import data_manager
import models
import toy
from arguments import DataOptions, RunOptions, ShowOptions
from dataset_loader import ImageDataset, TrainLoader
from extraction.engines import ByEngine
from losses import CrossEntropyLabelSmooth
from models.network import Network
from runtime import device
from runtime.device import Run
from runtime.meters import LossMeter
from runtime.precision import allow_tf32
from samplers import RandomSampler
from table import Row, apart, in_a_fresh_process, row, seconds, take_turns
from transforms import TrainTransform

ROOT = Path(__file__).resolve().parents[1]
BATCH, HEIGHT, WIDTH, CLASSES = 32, 256, 128, 751
TURNS = 7


def start(precision: str, compiled: bool = False) -> Run:
    with contextlib.redirect_stdout(io.StringIO()):
        return device.start(RunOptions(precision=precision, width=WIDTH, compile=compiled))


def network(arch: str = 'resnet50', unused: bool = False) -> Network:
    """unused: every eighth channel of a normalisation is as small as weight decay makes it if nothing uses it"""
    torch.manual_seed(0)
    with contextlib.redirect_stdout(io.StringIO()):
        model = models.init_model(arch, CLASSES)
    for layer in model.modules():
        if unused and isinstance(layer, nn.BatchNorm2d):
            layer.weight.data[::8] = layer.bias.data[::8] = 1e-39
    return model


def resident() -> tuple[Tensor, Tensor]:
    """The batch: images (32, 3, 256, 128) and pids (32,)."""
    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    torch.manual_seed(1)
    return torch.randn(BATCH, 3, HEIGHT, WIDTH, device=device), torch.arange(BATCH, device=device)


def plain_start(precision: str) -> Callable[[], torch.autocast]:
    """The settings of a plain side, and its autocast. It has what `start` sets for the arithmetic, not for memory."""
    torch.backends.cudnn.benchmark = torch.cuda.is_available()
    allow_tf32(precision == 'tf32')
    kind = 'cuda' if torch.cuda.is_available() else 'cpu'
    return lambda: torch.autocast(kind, torch.bfloat16, enabled=precision == 'bf16')


def plain_trainer(precision: str = 'fp32', arch: str = 'resnet50', unused: bool = False) -> Callable[[], float]:
    """One step as the original took it."""
    autocast = plain_start(precision)
    images, pids = resident()
    model = network(arch, unused).to(images.device).train()
    optimizer = Adam(model.parameters(), 3e-4, weight_decay=5e-4)

    def step() -> float:
        target = torch.full((len(pids), CLASSES), 0.1 / CLASSES, device=images.device)
        target.scatter_(1, pids[:, None], 0.9 + 0.1 / CLASSES)
        with autocast():
            logits = model(images)
        loss = (-target * F.log_softmax(logits.float(), dim=1)).mean(0).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()  # as the original's meter read it

    return step


def train(
    batches: Iterable[tuple],
    replica: nn.Module,
    augment: Callable[..., Tensor],
    criterion_xent: nn.Module,
    optimizer: Optimizer,
    meter: LossMeter | SimpleNamespace,
    run: Run,
) -> None:
    """The steps of train_img_model_xent.py, line by line, without its checkpoint."""
    replica.train()
    for imgs, pids, draws in batches:
        with run.autocast():
            logits = replica(augment(imgs, draws))  # (B, num_train_pids)
        loss = criterion_xent(logits.float(), pids)
        optimizer.zero_grad()
        loss.backward()
        run.skip_unless_finite(loss, optimizer)
        optimizer.step()
        meter.update(loss=loss)


def trainer(
    precision: str, compiled: bool = False, arch: str = 'resnet50', unused: bool = False
) -> Callable[[], Tensor]:
    """One step of this project's script, on a batch that is already there."""
    run = start(precision, compiled)
    images, pids = resident()
    model = run.place(network(arch, unused))
    replica = run.replicate(model)
    optimizer = Adam(model.parameters(), 3e-4, weight_decay=5e-4, fused=True)
    criterion = CrossEntropyLabelSmooth(CLASSES)
    images = images.contiguous(memory_format=torch.channels_last)
    meter = SimpleNamespace(update=lambda loss: losses.append(loss.detach()))
    losses: list[Tensor] = []

    def step() -> Tensor:
        losses.clear()
        train([(images, pids, None)], replica, lambda imgs, draws: imgs, criterion, optimizer, meter, run)
        return losses[0]

    return step


def plain_extractor(precision: str = 'fp32') -> Callable[[], Tensor]:
    autocast = plain_start(precision)
    images, _ = resident()
    model = network().to(images.device).eval()

    def step() -> Tensor:
        with torch.no_grad(), autocast():
            features: Tensor = model(images).float().cpu()
            return features

    return step


def extractor(precision: str, arch: str = 'resnet50', engine: str = 'torch') -> Callable[[], Tensor]:
    run = start(precision)
    images, _ = resident()
    model = run.place(network(arch)).eval()
    if engine != 'torch':
        model = ByEngine(model, images.size(2), images.size(3), engine, precision, len(images))
    images = images.contiguous(memory_format=torch.channels_last)

    def step() -> Tensor:
        with torch.inference_mode(), run.autocast(testing=True):
            features: Tensor = model(images).float()
            return features

    return step


def convolutions(precision: str) -> Callable[[], None]:
    """The convolutions of an extraction alone, each on the input that it has there."""
    run = start(precision)
    images, _ = resident()
    model = run.place(network()).eval()
    calls: list[tuple[Callable[[Tensor], Tensor], Tensor]] = []
    for part in model.modules():
        if isinstance(part, torch.nn.Conv2d):
            part.register_forward_pre_hook(lambda part, args: calls.append((part.forward, args[0].clone())))

    def step() -> None:
        with torch.inference_mode(), run.autocast(testing=True):
            for forward, pixels in calls:
                forward(pixels)

    with torch.inference_mode(), run.autocast(testing=True):
        model(images.contiguous(memory_format=torch.channels_last))
    return step


def steps(repeats: int, maker: str, *args: object) -> Callable[[], None]:
    """So many steps of a side, until the device has done them; two are made to warm up."""
    step = globals()[maker](*args)

    def work() -> None:
        for _ in range(repeats):
            step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    step()
    step()
    return work


def compare(repeats: int, **sides: tuple) -> dict[str, list[float]]:
    """Seconds of so many steps of the sides, each in a process of its own: a maker of this file and its arguments."""
    with apart('training', 'steps', **{name: (repeats, *side) for name, side in sides.items()}) as works:
        return take_turns(TURNS, lambda work: work(), **works)


def result(maker: str, *args: object) -> Tensor:
    """What the first step of a side computed, on the CPU."""
    return torch.as_tensor(globals()[maker](*args)()).cpu().clone()


def agree(ours: tuple, plain: tuple, tolerance: float) -> None:
    """Assert that two sides compute the same in float32, as far as rounding goes."""
    one, other = (in_a_fresh_process('training', 'result', *side, 'fp32') for side in (ours, plain))
    torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def from_files(persons: int, turns: int, limit_target: float, compiled: bool = False, cache: str = 'none') -> Row:
    """This project's whole loop against its bare step on a resident batch, in turns of an epoch."""
    run = start('auto', compiled)
    workers = 2 if run.device.type == 'cpu' else 8
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        toy.draw_market1501(Path(folder) / 'market1501', num_train=persons, num_images=8, height=128, width=64)
        dataset = data_manager.init_dataset('market1501', folder)
        sampler = RandomSampler(dataset.train, BATCH, 1)
        loader = TrainLoader(ImageDataset(dataset.train), sampler, DataOptions(workers=workers, cache=cache), run)
        model = run.place(network())
        replica = run.replicate(model)
        optimizer = Adam(model.parameters(), 3e-4, weight_decay=5e-4, fused=True)
        criterion, augment = CrossEntropyLabelSmooth(CLASSES), TrainTransform(HEIGHT, WIDTH)
        meter = LossMeter(ShowOptions(save_dir=folder, train_batch=BATCH, max_epoch=1), run, optimizer)
        images, pids, draws = next(iter(loader.epoch(0)))
        augmented = augment(images, draws)
        epochs = iter(range(1, 100))

        def whole() -> None:
            epoch = next(epochs)
            batches = meter.watch(loader, epoch)
            train(batches, replica, augment, criterion, optimizer, meter, run)

        def bare() -> None:
            batches = ((augmented, pids, None) for _ in range(len(loader)))
            quiet = SimpleNamespace(update=lambda loss: None)
            train(batches, replica, lambda imgs, _: imgs, criterion, optimizer, quiet, run)

        def finished(work: Callable[[], None]) -> Callable[[], None]:
            def waited() -> None:
                work()
                if run.device.type == 'cuda':
                    torch.cuda.synchronize()

            return waited

        sides = {'ours': finished(whole), 'limit': finished(bare)}
        take_turns(1 if compiled else 2, **sides)
        times = take_turns(turns, **sides)
    how = f'{run.precision}{", compiled" * compiled}, --cache {cache}'
    what = f'training from files, {how}; limit: the step on a resident batch'
    return row(what, times, things=len(loader) * BATCH, limit_target=limit_target)


def rows(full: bool) -> Iterator[Row]:
    """`full`: longer epochs and more turns from files, and the recipe."""
    agree(('trainer',), ('plain_trainer',), 1e-4)
    agree(('extractor',), ('plain_extractor',), 1e-3)
    on_cpu = not in_a_fresh_process('table', 'gpus')
    repeats = 1 if on_cpu else 20

    def trained(ours: str, plain: str, target: float | None, compiled: bool = False) -> Row:
        times = compare(repeats, ours=('trainer', ours, compiled), plain=('plain_trainer', plain))
        what = f'training step, {ours}{", compiled" * compiled}{f"; plain: {plain}" * (ours != plain)}'
        return row(what, times, repeats * BATCH, plain_target=target)

    def extracted(ours: str, plain: str, target: float | None) -> Row:
        sides = {'ours': ('extractor', ours), 'plain': ('plain_extractor', plain), 'limit': ('convolutions', ours)}
        what = f'extraction, {ours}; {f"plain: {plain}; " * (ours != plain)}limit: its convolutions alone'
        return row(what, compare(repeats, **sides), repeats * BATCH, plain_target=target)

    yield trained('fp32', 'fp32', None)
    if on_cpu:
        yield trained('bf16', 'fp32', 2.6)
        yield with_unused_channels(repeats)
        yield extracted('fp32', 'fp32', 1.5)
        yield extracted('bf16', 'fp32', 4)
        yield from_files(32, TURNS, 1.05)
        yield Row('compiled step, from files against it, and 60 epochs of 12936 images: need a CUDA device')
        return
    for precision in ('tf32', 'bf16'):
        yield trained(precision, precision, None)
    yield trained('bf16', 'tf32', 3, compiled=True)  # what this project can do against the faster plain of those days
    for precision in ('fp32', 'bf16'):
        yield extracted(precision, precision, None)
    size = (1617, TURNS) if full else (404, 3)
    yield in_a_fresh_process('training', 'from_files', *size, 1.05)
    for cache in ('none', 'device') if full else ('device',):
        yield in_a_fresh_process('training', 'from_files', *size, 1.11, True, cache)
    if full:
        yield recipe()


def with_unused_channels(repeats: int) -> Row:
    """Some processors are slow with numbers below 1.2e-38, which the weights of these channels are."""
    ours, unused = ('trainer', 'fp32', False, 'mobilenet_v2'), True
    plain = 'plain_trainer', 'fp32', 'mobilenet_v2', unused
    times = compare(repeats, ours=(*ours, unused), plain=plain, limit=ours)
    what = 'training step, fp32, mobilenet_v2, an eighth of the channels unused; limit: none of them'
    return row(what, times, repeats * BATCH, limit_target=1.1)


def recipe() -> Row:
    """The original's 60 epochs over 12936 images (it reported 1:57:44), from the shell, all told."""
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / 'data'
        with contextlib.redirect_stdout(io.StringIO()):
            toy.draw_market1501(data / 'market1501', num_train=1617, num_images=8, height=128, width=64)
        command = [
            sys.executable, str(ROOT / 'train_img_model_xent.py'), '--data-dir', str(data), '--pretrained', 'none',
            '--save-dir', str(Path(folder) / 'log'), '--compile', '--cache', 'device',
        ]  # fmt: skip
        took = seconds(lambda: subprocess.run(command, check=True, stdout=subprocess.DEVNULL))
    return Row('60 epochs over 12936 images, from the shell', 's', took, target='≤ 300 s', met=took <= 300)
