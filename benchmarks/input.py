"""Images per second and CPU core, from JPEG files to the network's input: rows of `table.py`.

The original's method processes one image after the other with PIL: decode, Random2DTranslation, flip, ToTensor,
Normalize. Images are 128x64, like those of Market1501, and are resized to 256x128; in the mixed rows no two sizes are
equal. All sides run in one process and one thread, and CPU time is measured; the transfer of batches from worker to run
is not included (the batches of plain are 16 times as large). When a GPU augments, only decoding is left to the CPU. The
limit is Pillow's decoding alone.
"""

import contextlib
import io
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import data_manager
import toy
from arguments import DataOptions
from dataset_loader import ImageDataset, TrainLoader
from runtime.device import Run
from samplers import RandomSampler
from table import Row, row, take_turns
from transforms import IMAGENET_MEAN, IMAGENET_STD, Normalize, ToTensor, TrainTransform

BATCH, HEIGHT, WIDTH = 32, 256, 128
RUN = Run(torch.device('cpu'))


def plain_image(path: str, draw: list[float]) -> torch.Tensor:
    """The original's transforms of one image, given its draws."""
    translate, down, right, mirror, *_ = draw  # the rest belongs to random erasing
    image = Image.open(path).convert('RGB')
    if translate < 0.5:
        image = image.resize((WIDTH, HEIGHT), Image.Resampling.BILINEAR)
    else:
        wide, tall = round(WIDTH * 1.125), round(HEIGHT * 1.125)
        left, top = round(right * (wide - WIDTH)), round(down * (tall - HEIGHT))
        image = image.resize((wide, tall), Image.Resampling.BILINEAR).crop((left, top, left + WIDTH, top + HEIGHT))
    if mirror < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    pixels: torch.Tensor = Normalize(IMAGENET_MEAN, IMAGENET_STD)(ToTensor()(image))  # (3, h, w)
    return pixels


def plain_epoch(items: list, sampler: RandomSampler) -> Iterator[torch.Tensor]:
    for indices, draws in zip(*sampler.draw(0), strict=True):
        paths = [items[index][0] for index in indices]
        yield torch.stack([plain_image(*each) for each in zip(paths, draws.tolist(), strict=True)])  # (B, 3, h, w)


def epoch(loader: TrainLoader, augment: Callable = lambda images, draws: None) -> Iterator:
    for images, _, draws in loader.epoch(0):
        yield augment(images, draws)


def cpu_seconds(batches: Callable) -> float:
    begin = time.process_time()
    for _ in batches():
        pass
    return time.process_time() - begin


def compare(items: list, turns: int, mixed: bool = False) -> list[Row]:
    """Assert that the pixels of both sides agree to within 2/255, on average to a tenth of that; see `transforms`."""
    sampler, augment = RandomSampler(items, BATCH), TrainTransform(HEIGHT, WIDTH)
    loaders = {
        cache: TrainLoader(ImageDataset(items), sampler, DataOptions(workers=0, cache=cache), RUN)
        for cache in ('none', 'ram')
    }
    std = torch.tensor(IMAGENET_STD)[:, None, None]
    for cached, decoded, plain in zip(  # this also fills the cache
        epoch(loaders['ram'], augment), epoch(loaders['none'], augment), plain_epoch(items, sampler), strict=True
    ):
        assert torch.equal(cached, decoded)
        difference = ((decoded - plain) * std * 255).abs()
        assert difference.max() < 2.01 and difference.mean() < 0.2

    def bare() -> Iterator[object]:
        for path, _, _ in items[: len(loaders['none']) * BATCH]:
            with Image.open(path) as image:
                yield image.load()

    times = take_turns(
        turns,
        cpu_seconds,
        plain=lambda: plain_epoch(items, sampler),
        limit=bare,
        host=lambda: epoch(loaders['none']),
        both=lambda: epoch(loaders['none'], augment),
        cached=lambda: epoch(loaders['ram'], augment),
    )

    def found(what: str, ours: str, target: float, **kwargs: list[float]) -> Row:
        what, target = f'{what}, mixed sizes' if mixed else what, target / 2 if mixed else target
        chosen = {'ours': times[ours], 'plain': times['plain'], **kwargs}
        count = len(loaders['none']) * BATCH
        return row(what, chosen, count, plain_target=target, unit='images/s of a core')

    return [
        found('decoding', 'host', 4, limit=times['limit']),
        found('decoding and augmentation', 'both', 2, limit=times['limit']),
        found('augmentation, --cache ram', 'cached', 3),
    ]


def rows(full: bool) -> list[Row]:
    """Six rows: images of one size, then of mixed sizes. `full` runs more turns."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            toy.draw_market1501(Path(folder) / 'market1501', num_train=32, num_images=8, height=128, width=64)
            items = data_manager.init_dataset('market1501', folder).train
            table = compare(items, turns=15 if full else 5)
            sizes = np.random.default_rng(0).permutation(len(items))
            for (path, _, _), size in zip(items, sizes, strict=True):  # 64 widths x 4 heights, 128x64 on average
                assert isinstance(path, str)  # not a tracklet
                image = Image.open(path).resize((32 + size % 64, 116 + 8 * (size // 64 % 4)), Image.Resampling.BICUBIC)
                image.save(path, quality=90)
            table += compare(items, turns=15 if full else 5, mixed=True)
    finally:
        torch.set_num_threads(threads)
    return table
