"""Features from JPEG files, and search among a million: rows of `table.py`.

The limit of `extract` is the network alone on a batch that is ready. A search is exact, and its features are on disk.
"""

import contextlib
import io
import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from threading import Event, Thread

import numpy as np
import torch

import models
import toy
from extract import FeatureExtractor
from extraction.images import files_of
from files.index import Gallery
from runtime import cpu
from runtime.tiles import DISTANCES, points_of
from table import Row, in_a_fresh_process, row, seconds, take_turns

ARCH, NUMBER, DIM = 'osnet_x1_0', 1_000_000, 512


def extracted(images: int, turns: int) -> list[Row]:
    """`extract` end to end, and the network on prepared batches, in one process and by turns."""
    cpu.tune()
    on_device = ' on CUDA' * torch.cuda.is_available()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        toy.draw_market1501(Path(folder) / 'market1501', num_train=images // 8, num_images=8, height=128, width=64)
        files = files_of([f'{folder}/market1501/bounding_box_train'])[:images]
        torch.manual_seed(0)
        torch.save(models.init_model(ARCH, 751).state_dict(), f'{folder}/weights.pth')
        extractor = FeatureExtractor(f'{folder}/weights.pth', workers=4 if torch.cuda.is_available() else 0)
        model = extractor.model
        shape = extractor.batch, 3, extractor.height, extractor.width
        batch = torch.rand(shape, device=extractor.device).contiguous(memory_format=torch.channels_last)

        @torch.inference_mode()
        def bare() -> None:
            for start in range(0, len(files), len(batch)):
                model(batch[: len(files) - start]).cpu()

        sides = {'ours': lambda: extractor(files), 'network': bare}
        take_turns(1, **sides)
        times = take_turns(turns, **sides)
    what = f'extract, {ARCH}, fp32, from JPEG files{on_device}; limit: the network alone'
    return [row(what, times, len(files), limit='network', limit_target=1.11)]


def searched(turns: int) -> list[tuple[str, list[float], float]]:
    """For each distance the seconds of one query, and the MB that it needs beside the file."""
    result = []
    with tempfile.TemporaryDirectory() as folder:
        path, rng = Path(folder) / 'rows.f32', np.random.default_rng(0)
        with open(path, 'wb') as file:
            for _ in range(100):
                file.write(rng.standard_normal((NUMBER // 100, DIM), np.float32).tobytes())
        features = torch.from_numpy(np.memmap(path, '<f4', 'c', shape=(NUMBER, DIM)))
        query = features[4711:4712] + 0.1
        for distance in DISTANCES:
            loaded = points_of('gallery', features, distance)
            gallery = Gallery(['image'] * NUMBER, np.arange(NUMBER), loaded)
            assert gallery.nearest(query, 10, distance)[0][0, 0] == 4711
            before, most = anonymous(), [0.0]
            watch = Thread(target=watched, args=(most, (done := Event())))
            watch.start()
            times = [seconds(lambda gallery=gallery, by=distance: gallery.nearest(query, 10, by)) for _ in range(turns)]
            done.set()
            watch.join()
            result.append((distance, times, most[0] - before))
    return result


def watched(most: list[float], done: Event) -> None:
    while not done.wait(0.01):
        most[0] = max(most[0], anonymous())


def anonymous() -> float:
    """Memory of this process in MB, without the mapped pages of files."""
    return int(Path('/proc/self/status').read_text().split('RssAnon:')[1].split()[0]) / 1024


def rows(full: bool) -> Iterator[Row]:
    yield from in_a_fresh_process('using', 'extracted', 512 if full else 192, 5 if full else 3)
    for distance, times, peak_mb in in_a_fresh_process('using', 'searched', 9 if full else 5):
        what = f'search, exact, one query in {NUMBER} x {DIM}, {distance}; memory beside the file'
        found = row(what, {'ours': times}, peak_mb=peak_mb, peak_target=256)
        yield replace(found, target=f'≤ 1 s, {found.target}', met=bool(found.met) and statistics.median(times) <= 1)
