"""The test: features of query and gallery, their ranking, the printed figures, and the result files.

Several processes share it: each extracts its part of the images, and counts in its part of the gallery. Every image is
extracted once; no feature of the gallery leaves its process.
"""

import datetime
import errno
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import ranking
from arguments import TestOptions
from data_manager import fingerprint
from dataset_loader import ImageDataset, VideoDataset, test_loader
from eval_metrics import METRICS, average_precision
from models.network import Network
from page import results
from readers.tree import Dataset, Item, ids_of
from runtime.device import Run
from runtime.errors import UserError
from runtime.files import allocate
from runtime.meters import bar_over
from runtime.provenance import provenance
from runtime.testset import check_files, check_items
from transforms import TestTransform
from utils import mkdir_if_missing

MAX_RANK = 50
NO_CAMERAS = {'camera_map': np.zeros((0, 0)), 'camera_queries': np.zeros((0, 0), np.int64)}
EMBEDDED, EMBEDDED_ROWS = 12, 400  # identities and images whose features are kept for a plot

Extracted = tuple[Tensor, Tensor]  # features (n, D) of this process's items, and the indices of these items (n,)


class Test:
    """The test of an experiment: `figures = test(model)`, a dict with the mean of each of METRICS (0..1).

    Raises:
        UserError: the test is known to fail before training starts: query or gallery is empty, no query has a match, a
            file is missing, or a package that the page needs is missing.
    """

    def __init__(self, dataset: Dataset, options: TestOptions, run: Run):
        self.dataset, self.options, self.run = dataset, options, run
        check_items(dataset)
        subsets = (tested_items(items, options) for items in (dataset.query, dataset.gallery))
        check_files(list(dict.fromkeys(path for items in subsets for path in items.files())), run)
        if not options.no_report:
            results.check_packages()

    def is_due(self, epoch: int) -> bool:
        """Whether a test is run after this epoch (from 0): every --eval-step epochs, and after the last one."""
        return epoch in self.options.test_epochs

    def __call__(self, model: Network) -> dict[str, float]:
        """Print the same figures as the original; write results.json, results.csv, ranking.npz and their page.

        Raises:
            UserError: an image cannot be read, features are not finite, or --save-features cannot write them.
        """
        self.run.signals.release()  # there is nothing to save until the next epoch
        print('Evaluate only' if self.options.evaluate else '==> Test')
        self.run.unify(model)
        query, gallery = (self._extract(model, subset) for subset in ('query', 'gallery'))
        if self.options.save_features:
            self._keep_features()
        print('Computing distance matrix')  # the original's line; no matrix is kept
        print('Computing CMC and mAP')
        result = self._rank(query, gallery)
        unwanted = self.options.rerank or self.options.no_report
        cameras = NO_CAMERAS if unwanted else by_camera(query, gallery, self.dataset, self.run)
        shown = sample(query, gallery, self.dataset, self.run)
        values = torch.zeros(len(METRICS), dtype=torch.float64)
        if result:  # in the first process
            ranking.show(result)
            figures = result.figures()
            values = torch.tensor([figures[metric.name] for metric in METRICS], dtype=torch.float64)
            folder = self.options.save_dir
            results.write(folder, self._summary(result), self.dataset, result, {**cameras, **shown}, self.run.unwritten)
            if self.options.evaluate and not self.options.no_report:  # training: after metrics.csv
                results.write_page(folder, self.run.unwritten)
        return dict(zip((metric.name for metric in METRICS), self.run.sum(values).tolist(), strict=True))

    def _extract(self, model: Network, subset: str) -> Extracted:
        items = getattr(self.dataset, subset)
        file = self._features_file(subset, items, model.feat_dim) if self.options.save_features else None
        features, indices = extract(model, items, self.options, self.run, file)  # (n, D), (n,)
        print(f'Extracted features for {subset} set, obtained {len(items)}-by-{features.size(1)} matrix')
        return features, indices

    def _rank(self, query: Extracted, gallery: Extracted) -> ranking.Ranking | None:
        """The ranking, in the first process; None in the others."""
        if self.options.rerank:
            print('Re-ranking with k1 {k1}, k2 {k2}, lambda {lambda_value}'.format(**vars(self.options)))
            return rerank(query, gallery, self.dataset, self.options, self.run)
        result = rank(query, gallery, self.dataset.query, self.dataset.gallery, self.run)
        return None if self.run.rank else result

    def _features_file(self, subset: str, items: Sequence[Item], feat_dim: int) -> np.ndarray:
        """features.npy (N, feat_dim) in memory-mapped form, pids.npy and camids.npy next to it; in every process.

        Until all are extracted the three are in `.features`, so that a failure leaves the earlier ones intact.
        """
        folder = Path(self.options.save_dir) / '.features' / subset
        path = folder / 'features.npy'
        failure = 0
        if self.run.rank == 0:
            try:
                mkdir_if_missing(folder)
                for column, name in ((1, 'pids'), (2, 'camids')):
                    np.save(folder / f'{name}.npy', np.array([item[column] for item in items]))
                np.lib.format.open_memmap(path, 'w+', np.float32, (len(items), feat_dim))
                allocate(path)
            except OSError as problem:
                failure = problem.errno or errno.ENOSPC  # numpy raises some without an errno
        failure = int(self.run.sum(torch.tensor(failure)))  # the others wait until the files exist
        if failure:
            raise UserError(
                f'--save-features: {path} cannot be written ({os.strerror(failure)}); free space or omit it'
            )
        if not path.exists():
            raise UserError(f'--save-features: {path} is not visible on every host; use a folder that all hosts share')
        features: np.ndarray = np.load(path, mmap_mode='r+')
        return features

    def _keep_features(self) -> None:
        """Replace the features of an earlier test by the extracted ones."""
        self.run.sum(torch.zeros(1))  # every process has opened and filled the files
        if self.run.rank == 0:
            folder = Path(self.options.save_dir) / '.features'
            for path in folder.glob('*/*.npy'):
                kept = folder.with_name('features') / path.relative_to(folder)
                mkdir_if_missing(kept.parent)
                path.replace(kept)
            shutil.rmtree(folder)

    def _summary(self, result: ranking.Ranking) -> dict[str, object]:
        options, dataset = self.options, self.dataset
        return {
            'mAP': result.mAP,
            'mINP': result.mINP,
            'cmc': result.cmc(MAX_RANK).tolist(),
            'queries': {
                'all': len(dataset.query),
                'valid': result.num_valid,
                'match in the same camera only': result.num_same_camera,
                'not in the gallery': result.num_absent,
            },
            'gallery': len(dataset.gallery),
            'date': datetime.datetime.now().astimezone().isoformat(timespec='seconds'),
            'dataset': dataset.name,
            'rerank': options.rerank and {name: getattr(options, name) for name in ('k1', 'k2', 'lambda_value')},
            'arch': options.arch,
            'checkpoint': options.resume or None,
            'height': options.height,
            'width': options.width,
            'precision': self.run.test_precision,
            'dataset_fingerprint': fingerprint(dataset),
            **provenance(self.run),
        }


def tested_items(items: Sequence[Item], options: TestOptions) -> ImageDataset | VideoDataset:
    """The images, or --seq-len frames of each tracklet, that are tested."""
    if isinstance(items[0][0], str):
        return ImageDataset(items)
    return VideoDataset(items, options.seq_len, 'evenly')


@torch.inference_mode()
def extract(
    model: Network, items: Sequence[Item], options: TestOptions, run: Run, file: np.ndarray | None = None
) -> Extracted:
    """Features of the images or tracklets that this process handles, and the indices of these items.

    A tracklet's feature is the mean or maximum over `--seq-len` of its frames. Any --test-batch gives the same figures.
    The model's mode is restored. Each batch is also written to its rows of `file` (N, feat_dim), if given.

    Returns:
        Features (n, feat_dim), float32, on the run's device, and indices (n,) int64, ascending. One process gets all N
        items in order; several get a part each, which is empty for some if there are more processes than items.
    """
    dataset = tested_items(items, options)
    prepare = TestTransform(options.height, options.width, model.normalisation)
    loader = test_loader(dataset, options.test_batch, options.workers, run)
    own = torch.tensor([item for batch in loader.items for item in batch], dtype=torch.int64)  # (n,)
    features = torch.empty(len(own), model.feat_dim, device=run.device)  # (n, feat_dim)
    was_training = model.training
    model.eval()
    done = 0
    for images, indices, counts in bar_over(loader, 'Extracting features', options.quiet, unit='batch'):
        with run.autocast(testing=True):
            found = model(prepare(images)).float()  # (frames, feat_dim)
        if isinstance(dataset, VideoDataset):
            found = pool(found, counts, options.pool)  # (b, feat_dim)
        features[done : done + len(found)] = found
        done += len(found)
        if file is not None:
            file[indices.numpy()] = found.cpu().numpy()
    model.train(was_training)
    return features, own


def rank(
    query: Extracted, gallery: Extracted, q_items: Sequence[Item], g_items: Sequence[Item], run: Run
) -> ranking.Ranking:
    """The ranking of the whole gallery, in every process, from what `extract` returned in each.

    All processes receive the features of all queries. The counts in their parts of the gallery add up to exact ranks.
    """
    q_pids, g_pids, q_camids, g_camids = ids_of(q_items, g_items)
    features, places = gallery[0], gallery[1].numpy()  # (m, D), (m,)
    queries, items = ranking.points(_collect(*query, len(q_pids), run), features, len(q_pids), len(places))
    pairs = ranking.same_identity(q_pids, g_pids, q_camids, g_camids)
    distances = _sum(ranking.measure(queries, items, places, pairs), run)  # (P,), each from the process with the item
    tally = ranking.count(queries, items, places, pairs, distances)
    listed = run.stack(torch.from_numpy(tally.nearest)).transpose(0, 1).flatten(1)  # (Q, W * NEAREST)
    nearest = listed.sort(1).values[:, : ranking.NEAREST].numpy()  # (Q, NEAREST)
    return ranking.assemble(
        pairs, distances, ranking.Tally(_sum(tally.counts, run), nearest, _sum(tally.histogram, run))
    )


def sample(query: Extracted, gallery: Extracted, dataset: Dataset, run: Run) -> dict[str, np.ndarray]:
    """The features of the EMBEDDED identities with the most images, for a plot; the same in every process."""
    q_pids, g_pids, q_camids, g_camids = ids_of(dataset.query, dataset.gallery)
    pids, camids = np.concatenate([q_pids, g_pids]), np.concatenate([q_camids, g_camids])
    known, sizes = np.unique(pids[np.isin(pids, q_pids)], return_counts=True)
    chosen = known[np.argsort(-sizes, kind='stable')[:EMBEDDED]]
    rows = np.flatnonzero(np.isin(pids, chosen))[:EMBEDDED_ROWS]  # (n,) of the queries, then the gallery
    features = torch.zeros(len(rows), query[0].size(1))
    for (own, indices), first in ((query, 0), (gallery, len(q_pids))):
        held = indices.numpy() + first  # (m,) rows held by this process, ascending
        here = np.isin(held, rows)
        features[np.searchsorted(rows, held[here])] = own[torch.from_numpy(here).to(own.device)].cpu()
    return {
        'embedding_features': run.sum(features).half().numpy(),
        'embedding_pids': pids[rows],
        'embedding_camids': camids[rows],
        'embedding_is_query': rows < len(q_pids),
    }


def by_camera(query: Extracted, gallery: Extracted, dataset: Dataset, run: Run) -> dict[str, np.ndarray]:
    """(C, C) each: mAP of each camera's queries against each camera's gallery, and the number of scored queries."""
    *_, q_camids, g_camids = ids_of(dataset.query, dataset.gallery)
    number = 1 + max(q_camids.max(initial=0), g_camids.max(initial=0))
    means, counts = np.full((number, number), np.nan), np.zeros((number, number), np.int64)
    features, places = gallery[0], gallery[1].numpy()  # (m, D), (m,)
    for camid in range(number):
        items = np.flatnonzero(g_camids == camid)  # (n,) of the gallery
        if not len(items):
            continue
        here = np.flatnonzero(np.isin(places, items))
        own = (
            features[torch.from_numpy(here).to(features.device)],
            torch.from_numpy(np.searchsorted(items, places[here])),
        )
        some = [dataset.gallery[item] for item in items]
        result = rank(query, own, dataset.query, some, run)
        precisions = average_precision(result.ranks, result.offsets)  # (Q,)
        for of in range(number):
            valid = precisions[(q_camids == of) & result.valid]
            counts[of, camid] = len(valid)
            if len(valid):
                means[of, camid] = valid.mean()
    return {'camera_map': means, 'camera_queries': counts}


def rerank(
    query: Extracted, gallery: Extracted, dataset: Dataset, options: TestOptions, run: Run
) -> ranking.Ranking | None:
    """The re-ranked gallery, in the first process, which receives all features from the others; None in the others."""
    q_pids, g_pids, q_camids, g_camids = ids_of(dataset.query, dataset.gallery)
    queries, items = _collect(*query, len(q_pids), run), _collect(*gallery, len(g_pids), run)
    if run.rank:
        return None
    how = options.k1, options.k2, options.lambda_value
    return ranking.rerank(queries, items, q_pids, g_pids, q_camids, g_camids, *how)


def _collect(own: Tensor, indices: Tensor, number: int, run: Run) -> Tensor:
    """All features (number, D), in every process, from the rows (n, D) at `indices` (n,) that each process has."""
    everyone = own.new_zeros(number, own.size(1))
    everyone[indices.to(own.device)] = own
    return run.sum(everyone)


def _sum(values: np.ndarray, run: Run) -> np.ndarray:
    total: np.ndarray = run.sum(torch.from_numpy(values)).numpy()
    return total


def pool(features: Tensor, counts: Tensor, how: str) -> Tensor:
    """One feature per tracklet, (b, D): mean ('avg') or maximum ('max') over its `counts` (b,) rows of (frames, D)."""
    tracklets = features.split(counts.tolist())
    return torch.stack([frames.mean(0) if how == 'avg' else frames.amax(0) for frames in tracklets])
