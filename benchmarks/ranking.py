"""Seconds and memory of the test's ranking: this project, the original's way, and the bare product of the features.

    python benchmarks/ranking.py [--full]

Features have 2048 dimensions, sizes are queries x gallery, and ids are dealt as in Market1501. Sides work in turn in
one process; a ratio is the median of those of the turns. The limit is the product that a distance matrix takes, alone,
into memory that is there: by torch.mm ("limit"), and as this project makes it ("own limit"). Peak memory is what a
process of its own needed above the features.
"""

import argparse
import ctypes
import gc
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
sys.path.append(str(Path(__file__).resolve().parent))  # behind, or `import ranking` would find this file

import numpy as np  # noqa: E402
import plain_ranking as plain  # noqa: E402
import torch  # noqa: E402

import ranking  # noqa: E402
from eval_metrics import average_precision, evaluate  # noqa: E402

DIM = 2048
MARKET1501, MSMT17, DISTRACTORS = (3368, 15913), (11659, 82161), (3368, 515913)


def draw(num_queries: int, num_gallery: int, seed: int = 0):
    """Features and ids that score about as a trained network does: one part of the gallery shows nobody's pid."""
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
    return *features, *pids, *camids


def seconds(work: Callable) -> float:
    gc.collect()
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def bare(rows: torch.Tensor, columns: torch.Tensor) -> Callable:
    """Their product by torch.mm, in parts that fit into 1 GB."""
    width = min(len(columns), (1 << 28) // len(rows))
    memory = torch.empty(len(rows) * width)

    def work():
        for part in columns.split(width):
            torch.mm(rows, part.t(), out=memory[: len(rows) * len(part)].view(len(rows), -1))

    return work


def own(rows: torch.Tensor, columns: torch.Tensor) -> Callable:
    """The same product as this project makes it, tile by tile and thread by thread."""
    device = rows.device
    tiles = ranking._tiles(len(rows), len(columns), ranking._tile(device))
    return lambda: ranking._in_threads(lambda i, j: ranking._products(rows[i], columns[j]), tiles, device)


def compare(what: str, turns: int, target: str, ours: Callable, **others: Callable) -> dict:
    """A row: median seconds of each side, and what they are to ours."""
    sides = {'ours': ours, **others}
    times = [{name: seconds(side) for name, side in sides.items()} for _ in range(turns)]
    row = {'what': what, 'unit': 's', **{name: statistics.median(turn[name] for turn in times) for name in sides}}
    for name in others:
        if 'limit' in name:
            row[f'ours / {name}'] = statistics.median(turn['ours'] / turn[name] for turn in times)
        else:
            row[f'{name} / ours'] = statistics.median(turn[name] / turn['ours'] for turn in times)
    return {**row, 'target': target}


def peak(what: str, num_queries: int, num_gallery: int) -> float:
    """MB above the features that `what` needed in a process of its own."""
    command = [sys.executable, __file__, '--peak', what, str(num_queries), str(num_gallery)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def measure_peak(what: str, num_queries: int, num_gallery: int) -> None:
    def memory(field: str) -> int:
        return int(Path('/proc/self/status').read_text().split(field + ':')[1].split()[0])  # kB

    data = draw(num_queries, num_gallery)
    ctypes.CDLL(None).malloc_trim(0)  # give back what drawing freed
    before = memory('VmRSS')
    getattr(ranking, what)(*data).mAP  # noqa: B018
    print((memory('VmHWM') - before) / 1024)


def same_as_textbook(result: ranking.Ranking, data: tuple, number: int) -> None:
    """Whether some queries have the AP that a stable sort of their distances gives."""
    q_features, g_features, q_pids, g_pids, q_camids, g_camids = data
    some = np.random.default_rng(1).choice(len(q_features), number, replace=False)
    distmat = np.hstack([plain.distance_matrix(q_features[some], part) for part in g_features.split(20000)])
    _, textbook = plain.evaluate_tightly(distmat, q_pids[some], g_pids, q_camids[some], g_camids)
    precisions = average_precision(result.ranks, result.offsets)[some]
    assert abs(np.nanmean(precisions) - textbook) < 1e-5, (np.nanmean(precisions), textbook)


def ranked(size: tuple[int, int], turns: int, target: str) -> dict:
    data = draw(*size)
    result = []

    def ours():
        found = ranking.rank(*data)
        result[:] = [found, found.cmc(), found.mAP, found.mINP]

    sides = {'limit': bare(*data[:2]), 'own limit': own(*data[:2])}
    row = compare('distances, CMC, mAP and mINP, {} x {}'.format(*size), turns, target, ours, **sides)
    same_as_textbook(result[0], data, 64)
    return {**row, 'peak MB': peak('rank', *size)}


def evaluated(size: tuple[int, int], turns: int) -> list[dict]:
    """Rows for `evaluate` of a whole distance matrix, and for all of the original's test."""
    data = draw(*size)
    distmat = plain.distance_matrix(*data[:2])
    (cmc, mean), (cmc_tight, mean_tight) = evaluate(distmat, *data[2:]), plain.evaluate_tightly(distmat, *data[2:])
    assert np.allclose(cmc, cmc_tight, atol=1e-12)
    assert abs(mean - mean_tight) < 1e-12
    found = []
    what = 'evaluate(distmat), {} x {}'.format(*size)
    rows = [
        compare(
            what,
            turns,
            'plain / ours >= 20',
            lambda: evaluate(distmat, *data[2:]),
            plain=lambda: found.append(plain.evaluate(distmat, *data[2:])),
        ),
        compare(
            what,
            5,
            'tight loop / ours >= 3',
            lambda: evaluate(distmat, *data[2:]),
            **{'tight loop': lambda: plain.evaluate_tightly(distmat, *data[2:])},
        ),
    ]
    assert np.allclose(found[0][0], cmc, atol=1e-3)  # the original leaves the order of ties open
    assert abs(found[0][1] - mean) < 1e-5
    return rows


def reranked(size: tuple[int, int], turns: int) -> dict:
    data = draw(*size)
    everyone = torch.cat(data[:2])
    row = compare(
        're-ranking, {} x {}; limit: its product of all by all'.format(*size),
        turns,
        'ours / limit <= 1.5, peak MB <= 1024',
        lambda: ranking.rerank(*data).mAP,
        **{'limit': bare(everyone, everyone), 'own limit': own(everyone, everyone)},
    )
    return {**row, 'peak MB': peak('rerank', *size)}


def reranked_densely(size: tuple[int, int], turns: int) -> dict:
    data = draw(*size)
    queries, gallery = ranking.points(*data[:2], *size)
    dense = []

    def ours():
        return ranking.rerank(*data)

    row = compare(
        're-ranking, {} x {}'.format(*size),
        turns,
        'plain / ours >= 8',
        ours,
        plain=lambda: dense.append(plain.rerank(*(some.numpy() for some in data[:2]))),
    )
    distances = ranking.reranked(queries, gallery)
    assert (
        max(np.abs(distances(slice(i, i + 100)) - dense[0][i : i + 100]).max() for i in range(0, size[0], 100)) < 1e-5
    )
    assert abs(ours().mAP - evaluate(dense[0], *data[2:])[1]) < 1e-5
    return row


def rows(full: bool) -> list[dict]:
    """The table; `full` adds the large sizes and takes more turns."""
    table = [ranked(MARKET1501, 7, 'ours / limit <= 1.4, peak MB <= 256')]
    if full:
        table += [ranked(size, 5, 'ours / limit <= 1.25, peak MB <= 256') for size in (MSMT17, DISTRACTORS)]
    table += evaluated(MARKET1501, turns=3 if full else 1)
    table += [reranked(MARKET1501, turns=5 if full else 3), reranked_densely((1000, 5000), turns=3 if full else 1)]
    return table


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--full', action='store_true', help='large sizes too, 11 GB of memory')
    parser.add_argument('--peak', nargs=3, metavar=('WHAT', 'QUERIES', 'GALLERY'), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak:
        measure_peak(options.peak[0], *map(int, options.peak[1:]))
    else:
        for row in rows(options.full):
            print(
                ', '.join(
                    f'{key} {value:.2f}' if isinstance(value, float) else str(value) for key, value in row.items()
                )
            )
