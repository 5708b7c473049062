"""Images per second of training and extraction: this project against the original's way, on the device that is there.

    python benchmarks/training.py [--full]

Both sides work on one resident batch of 32 images of 256x128, ResNet50, in turn, so that a noisy machine slows both; a
row is the median of its pairs. The original's way, "plain", is float32, NCHW, eager, Adam as torch gives it. "End to
end" is this project's whole loop (decoding workers, copy, augmentation, step, meter) against its bare step.

On a CUDA device the same command also measures the compiled step, and with --full the original's recipe: 60 epochs over
12936 images. Without one it says so.
"""

import argparse
import contextlib
import io
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch.nn import functional as F  # noqa: E402
from torch.optim import Adam  # noqa: E402

import data_manager  # noqa: E402
import launch  # noqa: E402
import models  # noqa: E402
import toy_data  # noqa: E402
import train_img_model_xent as script  # noqa: E402
from dataset_loader import ImageDataset, train_loader  # noqa: E402
from losses import CrossEntropyLabelSmooth  # noqa: E402
from meters import LossMeter  # noqa: E402
from samplers import RandomSampler  # noqa: E402
from transforms import TrainTransform  # noqa: E402

BATCH, HEIGHT, WIDTH, CLASSES = 32, 256, 128, 751
PAIRS = 5


def start(precision: str, compiled: bool = False) -> launch.Run:
    options = SimpleNamespace(
        seed=1, use_cpu=False, gpu_devices='0', precision=precision, width=WIDTH, compile=compiled, sync_bn=False
    )
    with contextlib.redirect_stdout(io.StringIO()):
        return launch.start(options)


def network() -> torch.nn.Module:
    torch.manual_seed(0)
    with contextlib.redirect_stdout(io.StringIO()):
        return models.init_model('resnet50', CLASSES)


def plain_trainer(images, pids):
    """One step as the original took it."""
    model = network().to(images.device).train()
    optimizer = Adam(model.parameters(), 3e-4, weight_decay=5e-4)

    def step():
        target = torch.full((len(pids), CLASSES), 0.1 / CLASSES, device=images.device)
        target.scatter_(1, pids[:, None], 0.9 + 0.1 / CLASSES)
        loss = (-target * F.log_softmax(model(images), dim=1)).mean(0).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()  # as the original's meter read it

    return step


def trainer(images, pids, precision, compiled=False):
    """One step of this project's script, on a batch that is already there."""
    run = start(precision, compiled)
    model = run.place(network())
    replica = run.replicate(model)
    optimizer = Adam(model.parameters(), 3e-4, weight_decay=5e-4, fused=True)
    criterion = CrossEntropyLabelSmooth(CLASSES)
    images = images.contiguous(memory_format=torch.channels_last)
    meter = SimpleNamespace(update=lambda loss: losses.append(loss.detach()))
    losses = []

    def step():
        losses.clear()
        script.train([(images, pids, None)], replica, lambda imgs, draws: imgs, criterion, optimizer, meter, run)
        return losses[0]

    return step


def plain_extractor(images):
    model = network().to(images.device).eval()

    def step():
        with torch.no_grad():
            return model(images).cpu()

    return step


def extractor(images, precision):
    run = start(precision)
    model = run.place(network()).eval()
    images = images.contiguous(memory_format=torch.channels_last)

    def step():
        with torch.inference_mode(), run.autocast(testing=True):
            return model(images).float()

    return step


def seconds(step, device) -> float:
    begin = time.perf_counter()
    step()
    if device.type == 'cuda':
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def compare(what, ours, plain, device, repeats=1) -> dict:
    """A row: the median rate of both sides, and the median of the ratios of their turns."""
    times = []
    for step in (plain, ours):
        for _ in range(2):  # warm up
            seconds(step, device)
    for _ in range(PAIRS):
        times.append([sum(seconds(step, device) for _ in range(repeats)) for step in (ours, plain)])
    mine, others = (statistics.median(column) for column in zip(*times, strict=True))
    ratio = statistics.median(other / own for own, other in times)
    rate = BATCH * repeats
    return {'what': what, 'unit': 'images/s', 'ours': rate / mine, 'plain': rate / others, 'ratio': ratio}


def agree(ours, plain, tolerance):
    """Whether both sides computed the same, as far as the precision goes."""
    torch.testing.assert_close(
        torch.as_tensor(ours).cpu(), torch.as_tensor(plain).cpu(), rtol=tolerance, atol=tolerance
    )


def end_to_end(device) -> dict:
    """This project's whole loop against its bare step on a resident batch, in turns of an epoch."""
    run = start('auto')
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        toy_data.draw_market1501(Path(folder) / 'market1501', num_train=32, num_images=8, height=128, width=64)
        dataset = data_manager.init_dataset('market1501', folder)
        sampler = RandomSampler(dataset.train, BATCH, 1)
        loader = train_loader(ImageDataset(dataset.train), sampler, SimpleNamespace(workers=2), run)
        model = run.place(network())
        optimizer = Adam(model.parameters(), 3e-4, weight_decay=5e-4, fused=True)
        criterion, augment = CrossEntropyLabelSmooth(CLASSES), TrainTransform(HEIGHT, WIDTH)
        meter = LossMeter(SimpleNamespace(print_freq=10), len(loader))
        images, pids, draws = next(iter(loader.epoch(0)))
        resident = augment(images, draws)
        epochs = iter(range(1, 100))

        def whole():
            epoch = next(epochs)
            batches = meter.watch(loader.epoch(epoch), epoch)
            script.train(batches, model, augment, criterion, optimizer, meter, run)

        def bare():
            batches = ((resident, pids, None) for _ in range(len(loader)))
            quiet = SimpleNamespace(update=lambda loss: None)
            script.train(batches, model, lambda imgs, _: imgs, criterion, optimizer, quiet, run)

        row = compare(f'training end to end, {run.precision}', whole, bare, device)
    count = len(loader)
    return {
        **row,
        'ours': row['ours'] * count,
        'limit': row.pop('plain') * count,
        'plain': None,
        'share': row.pop('ratio'),
    }


def rows(full: bool) -> list[dict]:
    run = start('auto')
    device = run.device
    torch.manual_seed(1)
    images = torch.randn(BATCH, 3, HEIGHT, WIDTH, device=device)
    pids = torch.arange(BATCH, device=device)
    agree(trainer(images, pids, 'fp32')(), plain_trainer(images, pids)(), 1e-4)
    agree(extractor(images, 'fp32')(), plain_extractor(images)(), 1e-3)
    table = []
    for precision in ('fp32', 'bf16'):
        plain = plain_trainer(images, pids)
        table.append(compare(f'training step, {precision}', trainer(images, pids, precision), plain, device))
    for precision in ('fp32', 'bf16'):
        plain = plain_extractor(images)
        table.append(compare(f'extraction, {precision}', extractor(images, precision), plain, device))
    table.append(end_to_end(device))
    if device.type == 'cuda':
        ours = trainer(images, pids, 'auto', compiled=True)
        table.append(compare('training step, compiled', ours, plain_trainer(images, pids), device, repeats=20))
        if full:
            table.append(recipe())
    else:
        table.append({'what': 'CUDA: no device here; this command measures the compiled step and the recipe on one'})
    return table


def recipe() -> dict:
    """The original's 60 epochs over 12936 images (it reported 1:57:44), from the shell, all told."""
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / 'data'
        with contextlib.redirect_stdout(io.StringIO()):
            toy_data.draw_market1501(data / 'market1501', num_train=1617, num_images=8, height=128, width=64)
        command = [
            sys.executable, str(ROOT / 'train_img_model_xent.py'), '--data-dir', str(data), '--pretrained', 'none',
            '--save-dir', str(Path(folder) / 'log'), '--compile', '--cache', 'device',
        ]  # fmt: skip
        begin = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return {'what': '60 epochs over 12936 images', 'unit': 'minutes', 'ours': (time.perf_counter() - begin) / 60}


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--full', action='store_true', help='the recipe of 60 epochs too, on a CUDA device')
    for row in rows(parser.parse_args().full):
        print(
            ', '.join(f'{name} {value:.2f}' if isinstance(value, float) else str(value) for name, value in row.items())
        )
