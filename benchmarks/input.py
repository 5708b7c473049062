"""Images per second and CPU core from JPEG files to the network's input: this project against the original's way.

    python benchmarks/input.py [--full]

The original's way, "plain", is one image after the other through PIL: decode, Random2DTranslation, flip, ToTensor,
Normalize. Images are 128x64, as those of Market1501, and become 256x128; in the mixed rows no two sizes are equal. Both
sides work in turn in one process and one thread, and what is counted is CPU time; what batches cost on their way from
worker to run (plain's are 16 times as large) is left out. "Host work" is what is left to the CPU when a GPU augments.
The limit is Pillow's bare decoding.
"""

import argparse
import contextlib
import io
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402

import data_manager  # noqa: E402
import toy_data  # noqa: E402
from dataset_loader import ImageDataset, train_loader  # noqa: E402
from samplers import RandomSampler  # noqa: E402
from transforms import IMAGENET_MEAN, IMAGENET_STD, Normalize, ToTensor, TrainTransform  # noqa: E402

BATCH, HEIGHT, WIDTH = 32, 256, 128
RUN = SimpleNamespace(device=torch.device('cpu'), rank=0, world_size=1)
TARGETS = {'host work': 4, 'host work and augmentation': 2, 'the same with --cache ram': 3}  # times plain


def plain_image(path: str, draw: list[float]) -> torch.Tensor:
    """The original's transforms of one image, given its draws."""
    translate, down, right, mirror = draw
    image = Image.open(path).convert('RGB')
    if translate < 0.5:
        image = image.resize((WIDTH, HEIGHT), Image.BILINEAR)
    else:
        wide, tall = round(WIDTH * 1.125), round(HEIGHT * 1.125)
        left, top = round(right * (wide - WIDTH)), round(down * (tall - HEIGHT))
        image = image.resize((wide, tall), Image.BILINEAR).crop((left, top, left + WIDTH, top + HEIGHT))
    if mirror < 0.5:
        image = image.transpose(Image.FLIP_LEFT_RIGHT)
    return Normalize(IMAGENET_MEAN, IMAGENET_STD)(ToTensor()(image))  # (3, h, w)


def plain_epoch(items: list, sampler: RandomSampler):
    for indices, draws in zip(*sampler.draw(0), strict=True):
        paths = [items[index][0] for index in indices]
        yield torch.stack([plain_image(*each) for each in zip(paths, draws.tolist(), strict=True)])  # (B, 3, h, w)


def epoch(loader, augment: Callable = lambda images, draws: None):
    for images, _, draws in loader.epoch(0):
        yield augment(images, draws)


def seconds(batches) -> float:
    begin = time.process_time()
    for _ in batches:
        pass
    return time.process_time() - begin


def compare(items: list, pairs: int) -> list[dict]:
    """A row for each of TARGETS: median rates, and the median of the ratios of their turns.

    Both sides' pixels agree to 2/255, on average to a tenth of that, see `transforms`.
    """
    sampler, augment = RandomSampler(items, BATCH), TrainTransform(HEIGHT, WIDTH)
    loaders = {
        cache: train_loader(ImageDataset(items), sampler, SimpleNamespace(workers=0, cache=cache), RUN)
        for cache in ('none', 'ram')
    }
    std = torch.tensor(IMAGENET_STD)[:, None, None]
    for cached, decoded, plain in zip(  # this fills the cache, too
        epoch(loaders['ram'], augment), epoch(loaders['none'], augment), plain_epoch(items, sampler), strict=True
    ):
        assert torch.equal(cached, decoded)
        difference = ((decoded - plain) * std * 255).abs()
        assert difference.max() < 2.01 and difference.mean() < 0.2

    def bare():
        for path, _, _ in items[: len(loaders['none']) * BATCH]:
            with Image.open(path) as image:
                yield image.load()

    sides = {
        'plain': lambda: plain_epoch(items, sampler),
        'limit': bare,
        'host work': lambda: epoch(loaders['none']),
        'host work and augmentation': lambda: epoch(loaders['none'], augment),
        'the same with --cache ram': lambda: epoch(loaders['ram'], augment),
    }
    turns = [{name: seconds(side()) for name, side in sides.items()} for _ in range(pairs)]
    count = len(loaders['none']) * BATCH
    rate = {name: count / statistics.median(turn[name] for turn in turns) for name in sides}
    return [
        {
            'what': name,
            'unit': 'images/s per core',
            'ours': rate[name],
            'plain': rate['plain'],
            'limit': None if 'cache' in name else rate['limit'],
            'ratio': statistics.median(turn['plain'] / turn[name] for turn in turns),
            'target': target,
        }
        for name, target in TARGETS.items()
    ]


def rows(full: bool) -> list[dict]:
    """Six rows: images of one size, then of mixed sizes. `full` takes more turns."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            toy_data.draw_market1501(Path(folder) / 'market1501', num_train=32, num_images=8, height=128, width=64)
            items = data_manager.init_dataset('market1501', folder).train
            table = compare(items, pairs=15 if full else 5)
            sizes = np.random.default_rng(0).permutation(len(items))
            for (path, _, _), size in zip(items, sizes, strict=True):  # 64 widths x 4 heights, 128x64 on average
                image = Image.open(path).resize((32 + size % 64, 116 + 8 * (size // 64 % 4)), Image.BICUBIC)
                image.save(path, quality=90)
            mixed = compare(items, pairs=15 if full else 5)
    finally:
        torch.set_num_threads(threads)
    return table + [{**row, 'what': f'{row["what"]}, mixed sizes', 'target': row['target'] / 2} for row in mixed]


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--full', action='store_true', help='more turns')
    for row in rows(parser.parse_args().full):
        print(
            ', '.join(f'{name} {value:.2f}' if isinstance(value, float) else str(value) for name, value in row.items())
        )
