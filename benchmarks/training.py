"""Images per second of training and extraction, on the device that is there: rows of `table.py`.

The sides work on one resident batch of 32 images of 256x128, ResNet50, each in a process of its own: on a CPU it counts
what a process has done with its memory before. The original's way is float32, NCHW, eager, Adam as torch gives it.
"From files" is this project's whole loop (decoding workers, copy, augmentation, step, meter).
"""

import contextlib
import io
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.nn import functional as F
from torch.optim import Adam

import data_manager
import models
import toy
from arguments import DataOptions, RunOptions, ShowOptions
from dataset_loader import ImageDataset, train_loader
from losses import CrossEntropyLabelSmooth
from runtime import device
from runtime.device import Run
from runtime.meters import LossMeter
from samplers import RandomSampler
from table import Row, apart, row, seconds, take_turns
from transforms import TrainTransform

ROOT = Path(__file__).resolve().parents[1]
BATCH, HEIGHT, WIDTH, CLASSES = 32, 256, 128, 751
TURNS = 7


def start(precision: str, compiled: bool = False) -> Run:
    with contextlib.redirect_stdout(io.StringIO()):
        return device.start(RunOptions(precision=precision, width=WIDTH, compile=compiled))


def network() -> torch.nn.Module:
    torch.manual_seed(0)
    with contextlib.redirect_stdout(io.StringIO()):
        return models.init_model('resnet50', CLASSES)


def resident():
    """The batch: images (32, 3, 256, 128) and pids (32,)."""
    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    torch.manual_seed(1)
    return torch.randn(BATCH, 3, HEIGHT, WIDTH, device=device), torch.arange(BATCH, device=device)


def plain_trainer():
    """One step as the original took it."""
    images, pids = resident()
    model = network().to(images.device).train()
    optimizer = Adam(model.parameters(), 3e-4, weight_decay=5e-4)
    torch.backends.cudnn.benchmark = True  # convolutions in TF32, as torch has it where nothing else was set

    def step():
        target = torch.full((len(pids), CLASSES), 0.1 / CLASSES, device=images.device)
        target.scatter_(1, pids[:, None], 0.9 + 0.1 / CLASSES)
        loss = (-target * F.log_softmax(model(images), dim=1)).mean(0).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()  # as the original's meter read it

    return step


def train(batches, replica, augment, criterion_xent, optimizer, meter, run) -> None:
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


def trainer(precision, compiled=False):
    """One step of this project's script, on a batch that is already there."""
    run = start(precision, compiled)
    images, pids = resident()
    model = run.place(network())
    replica = run.replicate(model)
    optimizer = Adam(model.parameters(), 3e-4, weight_decay=5e-4, fused=True)
    criterion = CrossEntropyLabelSmooth(CLASSES)
    images = images.contiguous(memory_format=torch.channels_last)
    meter = SimpleNamespace(update=lambda loss: losses.append(loss.detach()))
    losses = []

    def step():
        losses.clear()
        train([(images, pids, None)], replica, lambda imgs, draws: imgs, criterion, optimizer, meter, run)
        return losses[0]

    return step


def plain_extractor():
    images, _ = resident()
    model = network().to(images.device).eval()

    def step():
        with torch.no_grad():
            return model(images).cpu()

    return step


def extractor(precision):
    run = start(precision)
    images, _ = resident()
    model = run.place(network()).eval()
    images = images.contiguous(memory_format=torch.channels_last)

    def step():
        with torch.inference_mode(), run.autocast(testing=True):
            return model(images).float()

    return step


def convolutions(precision):
    """The convolutions of an extraction alone, each on the input that it has there."""
    run = start(precision)
    images, _ = resident()
    model = run.place(network()).eval()
    calls = []
    for part in model.modules():
        if isinstance(part, torch.nn.Conv2d):
            part.register_forward_pre_hook(lambda part, args: calls.append((part.forward, args[0].clone())))

    def step():
        with torch.inference_mode(), run.autocast(testing=True):
            for forward, pixels in calls:
                forward(pixels)

    with torch.inference_mode(), run.autocast(testing=True):
        model(images.contiguous(memory_format=torch.channels_last))
    return step


def steps(repeats: int, maker: str, *args):
    """So many steps of a side, until the device has done them; two are made to warm up."""
    step = globals()[maker](*args)

    def work():
        for _ in range(repeats):
            step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    step()
    step()
    return work


def compare(repeats: int, **sides: tuple) -> dict:
    """Seconds of so many steps of the sides, each in a process of its own: a maker of this file and its arguments."""
    with apart('training', 'steps', **{name: (repeats, *side) for name, side in sides.items()}) as works:
        return take_turns(TURNS, lambda work: work(), **works)


def agree(ours, plain, tolerance):
    """Whether both sides computed the same, as far as the precision goes."""
    torch.testing.assert_close(
        torch.as_tensor(ours).cpu(), torch.as_tensor(plain).cpu(), rtol=tolerance, atol=tolerance
    )


def from_files(on_cpu: bool, limit_target: float, compiled: bool = False, cache: str = 'none') -> Row:
    """This project's whole loop against its bare step on a resident batch, in turns of an epoch."""
    run = start('auto', compiled)
    workers = 2 if on_cpu else 8
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        persons = 32 if on_cpu else 1617
        toy.draw_market1501(Path(folder) / 'market1501', num_train=persons, num_images=8, height=128, width=64)
        dataset = data_manager.init_dataset('market1501', folder)
        sampler = RandomSampler(dataset.train, BATCH, 1)
        loader = train_loader(ImageDataset(dataset.train), sampler, DataOptions(workers=workers, cache=cache), run)
        model = run.place(network())
        replica = run.replicate(model)
        optimizer = Adam(model.parameters(), 3e-4, weight_decay=5e-4, fused=True)
        criterion, augment = CrossEntropyLabelSmooth(CLASSES), TrainTransform(HEIGHT, WIDTH)
        meter = LossMeter(ShowOptions(save_dir=folder, train_batch=BATCH, max_epoch=1), run, optimizer)
        images, pids, draws = next(iter(loader.epoch(0)))
        augmented = augment(images, draws)
        epochs = iter(range(1, 100))

        def whole():
            epoch = next(epochs)
            batches = meter.watch(loader, epoch)
            train(batches, replica, augment, criterion, optimizer, meter, run)

        def bare():
            batches = ((augmented, pids, None) for _ in range(len(loader)))
            quiet = SimpleNamespace(update=lambda loss: None)
            train(batches, replica, lambda imgs, _: imgs, criterion, optimizer, quiet, run)

        take_turns(2, ours=whole, limit=bare)
        times = take_turns(TURNS, ours=whole, limit=bare)
    how = f'{run.precision}{", compiled" * compiled}, --cache {cache}'
    what = f'training from files, {how}; limit: the step on a resident batch'
    return row(what, times, things=len(loader) * BATCH, limit_target=limit_target)


def rows(full: bool) -> list[Row]:
    agree(trainer('fp32')(), plain_trainer()(), 1e-4)
    agree(extractor('fp32')(), plain_extractor()(), 1e-3)
    on_cpu = start('auto').device.type == 'cpu'
    repeats = 1 if on_cpu else 20
    table = []
    for precision, target in (('fp32', None), ('bf16', 2.6 if on_cpu else None)):
        times = compare(repeats, ours=('trainer', precision), plain=('plain_trainer',))
        table.append(row(f'training step, {precision}', times, repeats * BATCH, plain_target=target))
    for precision, target in (('fp32', 1.5), ('bf16', 4)):
        sides = {'ours': ('extractor', precision), 'plain': ('plain_extractor',), 'limit': ('convolutions', precision)}
        what = f'extraction, {precision}; limit: its convolutions alone'
        times = compare(repeats, **sides)
        table.append(row(what, times, repeats * BATCH, plain_target=target if on_cpu else None))
    table.append(from_files(on_cpu, limit_target=1.05))
    if on_cpu:
        return [*table, Row('compiled step, from files against it, and 60 epochs of 12936 images: need a CUDA device')]
    times = compare(repeats, ours=('trainer', 'auto', True), plain=('plain_trainer',))
    table.append(row('training step, compiled', times, repeats * BATCH, plain_target=3))
    table += [from_files(on_cpu, 1.11, compiled=True, cache=cache) for cache in ('none', 'device')]
    return [*table, recipe()] if full else table


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
