"""Seconds and memory of the test's ranking: rows of `table.py`.

Features have 2048 dimensions, sizes are queries x gallery, and ids are distributed as in Market1501. The limit is the
product of all features alone, into preallocated memory: by torch.mm, and in a separate row as this project computes it.
Peak memory is what a separate process needed in addition to the features. Both sides multiply in float32.
"""

import ctypes
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

import plain
import ranking
import reranking
from eval_metrics import average_precision, evaluate
from runtime import tiles
from runtime.precision import allow_tf32
from table import Row, in_a_fresh_process, row, take_turns

DIM = 2048
Drawn = tuple[torch.Tensor, torch.Tensor, np.ndarray, np.ndarray, np.ndarray, np.ndarray]  # see `draw`

MARKET1501, MSMT17, DISTRACTORS = (3368, 15913), (11659, 82161), (3368, 515913)


def draw(num_queries: int, num_gallery: int, seed: int = 0) -> Drawn:
    """Features and ids that score about like a trained network; a part of the gallery has pids of no query."""
    rng = np.random.default_rng(seed)
    num_pids = num_queries // 4
    pids = rng.integers(1, num_pids, num_queries), rng.integers(1, num_pids, num_gallery)
    pids[1][min(num_gallery * 4 // 5, 17 * num_pids) :] = 0
    camids = rng.integers(0, 6, num_queries), rng.integers(0, 6, num_gallery)
    torch.manual_seed(seed)
    persons, cameras = 0.35 * torch.randn(num_pids, DIM), 0.15 * torch.randn(6, DIM)
    features = []
    for whose, where in zip(pids, camids, strict=True):
        some = torch.empty(len(whose), DIM)
        for rows in torch.arange(len(whose)).split(1000):
            person = persons[whose[rows]]
            person[torch.from_numpy(whose[rows] == 0)] = 0.35 * torch.randn(int((whose[rows] == 0).sum()), DIM)
            some[rows] = (person + cameras[where[rows]] + 0.75 * torch.randn(len(rows), DIM)).relu_()
        features.append(some)
    queries, gallery = features
    return queries, gallery, *pids, *camids


def bare(rows: torch.Tensor, columns: torch.Tensor) -> Callable:
    """Their product by torch.mm, in parts of at most 1 GB."""
    width = min(len(columns), (1 << 28) // len(rows))
    memory = torch.empty(len(rows) * width, device=rows.device)

    def work() -> None:
        for part in columns.split(width):
            torch.mm(rows, part.t(), out=memory[: len(rows) * len(part)].view(len(rows), -1))

    return work


def own(rows: torch.Tensor, columns: torch.Tensor) -> Callable:
    """The same product as this project computes it, tile by tile and thread by thread."""
    device = rows.device
    parts = tiles.tiles(len(rows), len(columns), tiles.tile_of(device))
    return lambda: tiles.in_threads(lambda i, j: tiles.products(rows[i], columns[j]), parts, device)


def peak(what: str, num_queries: int, num_gallery: int) -> float:
    """Memory in MB, in addition to the features, that `ranking.rank` or `ranking.rerank` needs in a fresh process."""

    def memory(field: str) -> int:
        return int(Path('/proc/self/status').read_text().split(field + ':')[1].split()[0])  # kB

    data = draw(num_queries, num_gallery)
    ctypes.CDLL(None).malloc_trim(0)  # return the memory that drawing freed
    before = memory('VmRSS')
    getattr(ranking, what)(*data).mAP  # noqa: B018
    return (memory('VmHWM') - before) / 1024


def same_as_textbook(result: ranking.Ranking, data: Drawn, number: int) -> None:
    """Assert that some queries have the AP given by a stable sort of their distances."""
    q_features, g_features, q_pids, g_pids, q_camids, g_camids = data
    some = np.random.default_rng(1).choice(len(q_features), number, replace=False)
    distmat = np.hstack([plain.distance_matrix(q_features[some], part) for part in g_features.split(20000)])
    _, textbook = plain.evaluate_tightly(distmat, q_pids[some], g_pids, q_camids[some], g_camids)
    precisions = average_precision(result.ranks, result.offsets)[some]
    assert abs(np.nanmean(precisions) - textbook) < 1e-5, (np.nanmean(precisions), textbook)


def spared_by_none(queries: torch.Tensor, gallery: torch.Tensor) -> Callable:
    """The products that re-ranking in bounded memory needs: half of all by all, and queries by gallery again."""
    everyone = torch.cat([queries, gallery])
    side = min(tiles.tile_of(everyone.device))
    parts = tiles.tiles(len(everyone), len(everyone), (side, side))
    half = [(rows, columns) for rows, columns in parts if rows.start <= columns.start]

    def work() -> None:
        tiles.in_threads(lambda i, j: tiles.products(everyone[i], everyone[j]), half, everyone.device)
        own(queries, gallery)()

    return work


def limits(one: torch.Tensor, other: torch.Tensor) -> dict[str, Callable]:
    """The product alone, on CPUs by two libraries."""
    both = {'torch.mm': bare(one, other)}
    return {**both, 'our product': own(one, other)} if one.device.type == 'cpu' else both


def ranked(size: tuple[int, int], turns: int, target: float, device: str = 'cpu') -> list[Row]:
    data = draw(*size)
    on_device = data[0].to(device), data[1].to(device)
    result: list[tuple[ranking.Ranking, np.ndarray, float, float]] = []

    def ours() -> None:
        found = ranking.rank(*on_device, *data[2:])
        result[:] = [(found, found.cmc(), found.mAP, found.mINP)]

    def done(work: Callable) -> Callable:
        def waited() -> None:
            work()
            if device == 'cuda':
                torch.cuda.synchronize()

        return waited

    sides = {name: done(side) for name, side in {'ours': ours, **limits(*on_device)}.items()}
    if device == 'cuda':
        allow_tf32(False)
        take_turns(1, **sides)
    times = take_turns(turns, **sides)
    same_as_textbook(result[0][0], data, 64)
    what = 'distances, CMC, mAP, mINP, {} x {}{}'.format(*size, ' on CUDA' * (device == 'cuda'))
    title = f'{what}; limit: torch.mm'
    if device == 'cuda':  # where the memory of the process says nothing
        return [row(title, times, limit='torch.mm', limit_target=target)]
    peak_mb = in_a_fresh_process('testing', 'peak', 'rank', *size)
    return [
        row(title, times, limit='torch.mm', limit_target=target, peak_mb=peak_mb, peak_target=256),
        row('the same; limit: our product', times, limit='our product'),
    ]


def evaluated(size: tuple[int, int], turns: int) -> list[Row]:
    """Rows for `evaluate` of a whole distance matrix, against the original's loop and a lean one."""
    data = draw(*size)
    distmat = plain.distance_matrix(*data[:2])
    found = []
    sides = {
        'ours': lambda: found.append(evaluate(distmat, *data[2:])),
        'lean': lambda: found.append(plain.evaluate_tightly(distmat, *data[2:])),
    }
    times = take_turns(turns, original=lambda: found.append(plain.evaluate(distmat, *data[2:])), **sides)
    for name, more in take_turns(5 - turns, **sides).items():
        times[name] += more
    assert all(
        np.allclose(cmc, found[-1][0], atol=1e-3) for cmc, _ in found
    )  # the original does not define the order of ties
    assert all(abs(mean - found[-1][1]) < 1e-5 for _, mean in found)
    what = 'evaluate(distmat), {} x {}'.format(*size)
    loop = {'ours': times['ours'][:turns], 'plain': times['original']}
    lean = {'ours': times['ours'], 'plain': times['lean']}
    return [
        row(what, loop, plain_target=20),
        row('the same; plain: a lean loop, stable argsort per row', lean, plain_target=3),
    ]


def from_disk(num_queries: int, num_gallery: int, dim: int) -> Row:
    """`python ranking.py` on saved features: seconds, and its memory without the mapped pages of the files."""
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        for subset, number in (('query', num_queries), ('gallery', num_gallery)):
            there = Path(folder) / subset
            there.mkdir()
            features = np.lib.format.open_memmap(there / 'features.npy', 'w+', np.float32, (number, dim))
            for rows in np.array_split(np.arange(number), max(number // 10000, 1)):
                features[rows] = rng.standard_normal((len(rows), dim), np.float32)
            np.save(there / 'pids.npy', rng.integers(1, num_queries // 4, number))
            np.save(there / 'camids.npy', rng.integers(0, 6, number))
        command = [sys.executable, str(Path(ranking.__file__)), f'{folder}/query', f'{folder}/gallery']
        begin, peak_kb = time.perf_counter(), 0
        with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
            while process.poll() is None:
                status = Path(f'/proc/{process.pid}/status').read_text()
                peak_kb = max(peak_kb, *map(int, re.findall(r'RssAnon:\s+(\d+)', status)), 0)
                time.sleep(0.1)
        assert process.returncode == 0
    what = f'python ranking.py from disk, {num_queries} x {num_gallery}, {dim} dimensions; memory of the whole process'
    return Row(what, 's', time.perf_counter() - begin, peak_mb=peak_kb / 1024)


def reranked(size: tuple[int, int], turns: int) -> list[Row]:
    data = draw(*size)
    everyone = torch.cat(data[:2])
    times = take_turns(turns, ours=lambda: ranking.rerank(*data).mAP, **limits(everyone, everyone))
    peak_mb = in_a_fresh_process('testing', 'peak', 'rerank', *size)
    what = 're-ranking, {} x {}; limit: product of all by all, torch.mm'.format(*size)
    return [
        row(what, times, limit='torch.mm', limit_target=1.5, peak_mb=peak_mb, peak_target=1024),
        row('the same; limit: our product', times, limit='our product'),
    ]


def reranked_densely(size: tuple[int, int], turns: int) -> Row:
    data = draw(*size)
    found, dense = [], []
    times = take_turns(
        turns,
        ours=lambda: found.append(ranking.rerank(*data)),
        plain=lambda: dense.append(plain.rerank(data[0].numpy(), data[1].numpy())),
        limit=spared_by_none(*data[:2]),
    )
    distances = reranking.reranked(*tiles.points(*data[:2], *size))
    blocks = [(distances(slice(top, top + 100)), dense[0][top : top + 100]) for top in range(0, size[0], 100)]
    assert max(np.abs(ours - theirs).max() for ours, theirs in blocks) < 1e-5
    assert abs(found[0].mAP - evaluate(dense[0], *data[2:])[1]) < 1e-5
    return row('re-ranking, {} x {}; plain: dense; limit: its products'.format(*size), times, plain_target=8)


def rows(full: bool) -> Iterator[Row]:
    """`full` adds the large sizes and runs more turns."""
    yield from ranked(MARKET1501, 9, 1.4)
    if full:
        yield from ranked(MSMT17, 5, 1.25)
        yield from ranked(DISTRACTORS, 5, 1.25)
        yield from_disk(3368, 1_000_000, 512)
    if in_a_fresh_process('table', 'gpus'):
        for size in (MARKET1501, MSMT17, DISTRACTORS)[: 3 if full else 2]:
            target = 1.4 if size == MARKET1501 else 1.25
            yield from in_a_fresh_process('testing', 'ranked', size, 5, target, 'cuda')
    yield from evaluated(MARKET1501, turns=3 if full else 1)
    yield from reranked(MARKET1501, turns=5 if full else 3)
    yield reranked_densely((1000, 5000), 3 if full else 1)
