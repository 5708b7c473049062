"""The test: features of query and gallery, their ranking, the printed figures, and the result files.

Several processes share it: each extracts its part of the images, and counts in its part of the gallery. Every image is
extracted once; no feature of the gallery leaves its process.
"""

import datetime
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

import ranking
from arguments import TestOptions
from data_manager import fingerprint
from dataset_loader import ImageDataset, TestLoader, VideoDataset, test_loader
from eval_metrics import METRICS
from models.network import Network
from page import cameras, results
from readers.tree import Dataset, Item, ids_of
from runtime import notices
from runtime.device import Run
from runtime.features import create_features, keep_features
from runtime.meters import bar_over
from runtime.provenance import provenance
from runtime.testset import Averaged, averaged, check_files, check_items, fitting
from transforms import TestTransform

MAX_RANK = 50
EMBEDDED, EMBEDDED_ROWS = 12, 400  # identities and images whose features are kept for a plot
FRAMES = 15  # with --seq-len 0, frames for each of --test-batch: as many as there are by default

Extracted = tuple[Tensor, Tensor]  # features (n, D) of this process's items, and the indices of these items (n,)


class Test:
    """The test of an experiment: `figures = test(model)`, a dict with the mean of each of METRICS (0..1).

    Raises:
        UserError: the test is known to fail before training starts: query or gallery is empty, no query has a match, a
            file or with --multi-query an image of a query is missing, or a package that the page needs.
    """

    def __init__(self, dataset: Dataset, options: TestOptions, run: Run):
        options = fitting(options, dataset)
        self.dataset, self.options, self.run = dataset, options, run
        self.ids = check_items(dataset, options.any_camera, run)
        self.averaged = averaged(dataset) if options.multi_query else None
        more = [self.averaged.items] if self.averaged else []
        subsets = (tested_items(items, options) for items in (dataset.query, dataset.gallery, *more))
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
        self.options, self.notices = notices.before_test(model, self.dataset, self.options, self.run)
        for notice in self.notices:
            print(f'Notice: {notice}')
        print('Evaluate only' if self.options.evaluate else '==> Test')
        self.run.unify(model)
        tested = self.run.for_test(model, self.options)
        query, gallery = (self._extract(tested, subset) for subset in ('query', 'gallery'))
        if self.options.save_features:
            keep_features(self.options.save_dir, self.run)
        print('Computing distance matrix')  # the original's line; no matrix is kept
        print('Computing CMC and mAP')
        result = self._rank(query, gallery)
        by_camera = self._by_camera(query, gallery)
        shown = sample(query, gallery, self.dataset, self.run)
        values = torch.zeros(len(METRICS), dtype=torch.float64)
        if result:  # in the first process
            ranking.show(result, self.options.any_camera)
            figures = result.figures()
            values = torch.tensor([figures[metric.name] for metric in METRICS], dtype=torch.float64)
            folder = self.options.save_dir
            results.write(
                folder, self._summary(result), self.dataset, result, {**by_camera, **shown}, self.run.unwritten
            )
            if self.options.evaluate and not self.options.no_report:  # training: after metrics.csv
                results.write_page(folder, self.run.unwritten)
        return dict(zip((metric.name for metric in METRICS), self.run.sum(values).tolist(), strict=True))

    def _extract(self, model: Network, subset: str) -> Extracted:
        items = getattr(self.dataset, subset)
        several, file = self.averaged if subset == 'query' else None, None
        if self.options.save_features:
            counts = np.bincount(several.groups)[several.of_queries] if several else None
            file = create_features(self.options.save_dir, subset, items, model.feat_dim, self.run, counts)
        if several:
            subset, items = 'multi-query', several.items
        extracted = extract(model, items, self.options, self.run, None if several else file)
        print(f'Extracted features for {subset} set, obtained {len(items)}-by-{extracted[0].size(1)} matrix')
        return self._means(*extracted, several, file) if several else extracted

    def _means(self, features: Tensor, indices: Tensor, several: Averaged, file: np.ndarray | None) -> Extracted:
        """The features of the queries, each the mean of those (N, D) of the items of its person in its camera.

        As the field's evaluations do it, the features are averaged as the single-query test compares them: here without
        being normalised before or after.
        """
        groups, numbers = (torch.from_numpy(each) for each in (several.groups, several.of_queries))  # (N,), (Q,)
        sizes = groups.bincount()  # (P,)
        own = groups[indices]  # (n,)
        order = own.argsort(stable=True).to(features.device)
        parts = features[order].split(own.bincount(minlength=len(sizes)).tolist())
        sums = self.run.sum(torch.stack([part.sum(0) for part in parts]))  # (P, D), in every process
        rows = torch.arange(self.run.rank, len(numbers), self.run.world_size)  # (q,) of this process
        numbers = numbers[rows].to(features.device)
        means = sums[numbers] / sizes.to(features.device)[numbers, None]  # (q, D)
        if file is not None:
            file[rows.numpy()] = means.cpu().numpy()
        print('Multi-query: the feature of a query is the mean over the images of its person in its camera')
        return means, rows

    def _rank(self, query: Extracted, gallery: Extracted) -> ranking.Ranking | None:
        """The ranking, in the first process; None in the others."""
        if self.options.any_camera:
            print(ranking.ANY_CAMERA)
        if self.options.rerank:
            print(ranking.RERANKING.format(**vars(self.options)))
            return rerank(query, gallery, self.ids, self.options, self.run)
        result = rank(query, gallery, self.ids, self.run, self.options.distance)
        return None if self.run.rank else result

    def _by_camera(self, query: Extracted, gallery: Extracted) -> dict[str, np.ndarray]:
        """The arrays of the table of cameras; empty ones if it is left out."""
        q_pids, g_pids, q_camids, g_camids = ids_of(self.dataset.query, self.dataset.gallery)

        def rank_in(items: np.ndarray) -> ranking.Ranking:
            places = gallery[1].numpy()  # (m,)
            held = np.isin(places, items)  # (m,)
            some = (
                gallery[0][torch.from_numpy(held).to(gallery[0].device)],
                torch.from_numpy(np.searchsorted(items, places[held])),
            )
            return rank(
                query, some, (q_pids, g_pids[items], q_camids, g_camids[items]), self.run, self.options.distance
            )

        return cameras.table(q_camids, g_camids, None if self._cameras_left_out() else rank_in)

    def _cameras_left_out(self) -> str:
        """Why there is no table of cameras; '' if there is one."""
        for option in ('any_camera', 'rerank', 'no_report'):
            if getattr(self.options, option):
                return f'--{option.replace("_", "-")}'
        *_, q_camids, g_camids = ids_of(self.dataset.query, self.dataset.gallery)
        return cameras.too_many(q_camids, g_camids)

    def _summary(self, result: ranking.Ranking) -> dict[str, object]:
        options, dataset = self.options, self.dataset
        return {
            'mAP': result.mAP,
            'mINP': result.mINP,
            'cmc': result.cmc(MAX_RANK).tolist(),
            'queries': {
                'all': len(dataset.query),
                'valid': result.num_valid,
                'match in the same camera only': result.num_same_camera,  # with --any-camera: in their own file
                'not in the gallery': result.num_absent,
            },
            'gallery': len(dataset.gallery),
            'date': datetime.datetime.now().astimezone().isoformat(timespec='seconds'),
            'dataset': dataset.name,
            **({'split': dataset.drawn} if dataset.drawn else {}),
            'rerank': options.rerank and {name: getattr(options, name) for name in ('k1', 'k2', 'lambda_value')},
            'distance': options.distance,
            'flip_test': options.flip_test,
            'any_camera': options.any_camera,
            'multi_query': self.averaged is not None and {'items': len(self.averaged.items)},
            'seq_len': options.seq_len if dataset.kind == 'video' else None,
            'pool': options.pool if dataset.kind == 'video' else None,
            'cameras_left_out': self._cameras_left_out() or None,
            'arch': options.arch,
            'checkpoint': options.resume or (options.pretrained if options.evaluate else None),
            'height': options.height,
            'width': options.width,
            'precision': self.run.test_precision,
            'notices': self.notices,
            'dataset_fingerprint': fingerprint(dataset),
            'test_fingerprint': fingerprint(dataset, ('query', 'gallery')),  # whether or not there is a training set
            **provenance(self.run),
        }


def tested_items(items: Sequence[Item], options: TestOptions) -> ImageDataset | VideoDataset:
    """The images, or --seq-len frames of each tracklet, that are tested; all frames, one by one, if that is 0."""
    if isinstance(items[0][0], str):
        return ImageDataset(items)
    if options.seq_len == 0:
        return ImageDataset([(path, pid, camid) for paths, pid, camid in items for path in paths])
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
    if isinstance(dataset, ImageDataset) and not isinstance(items[0][0], str):
        return _extract_whole(model, items, dataset, options, run, file)
    loader = test_loader(dataset, options.test_batch, options.workers, run)
    own = torch.tensor([item for batch in loader.items for item in batch], dtype=torch.int64)  # (n,)
    features = torch.empty(len(own), model.feat_dim, device=run.device)  # (n, feat_dim)
    done = 0
    for found, indices, counts in _batches(model, loader, options, run):
        if isinstance(dataset, VideoDataset):
            found = pool(found, counts, options.pool)  # (b, feat_dim)
        features[done : done + len(found)] = found
        done += len(found)
        if file is not None:
            file[indices.numpy()] = found.cpu().numpy()
    return features, own


def _extract_whole(
    model: Network, items: Sequence[Item], frames: ImageDataset, options: TestOptions, run: Run, file: np.ndarray | None
) -> Extracted:
    """The same for all frames of each tracklet, however long: no batch has more than --test-batch times FRAMES."""
    sizes = torch.tensor([len(paths) for paths, _, _ in items])  # (N,)
    tracklets = torch.arange(len(items)).repeat_interleave(sizes)  # of each frame
    loader = test_loader(frames, options.test_batch * FRAMES, options.workers, run, tracklets.numpy())
    own = torch.arange(run.rank, len(items), run.world_size)  # (n,)
    start = 0.0 if options.pool == 'avg' else -torch.inf
    features = torch.full((len(own), model.feat_dim), start, device=run.device)  # (n, feat_dim)
    for found, indices, _ in _batches(model, loader, options, run):
        parts, counts = tracklets[indices].unique_consecutive(return_counts=True)
        for tracklet, part in zip(parts.tolist(), found.split(counts.tolist()), strict=True):  # (frames, feat_dim)
            row = features[tracklet // run.world_size]  # (feat_dim,)
            row.copy_(row + part.sum(0) if options.pool == 'avg' else row.maximum(part.amax(0)))
    if options.pool == 'avg':
        features /= sizes[own, None].to(run.device)
    if file is not None:
        file[own.numpy()] = features.cpu().numpy()
    return features, own


def _batches(
    model: Network, loader: TestLoader, options: TestOptions, run: Run
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """The features (images, feat_dim) of each batch, the indices (b,) of its items, and how many images each has."""
    interpolation = options.interpolation or model.interpolation
    prepare = TestTransform(options.height, options.width, model.normalisation, interpolation)
    was_training = model.training
    model.eval()
    for images, indices, counts in bar_over(loader, 'Extracting features', options.quiet, unit='batch'):
        batch = prepare(images)  # (images, 3, h, w)
        with run.autocast(testing=True):
            found = model(batch).float()
        if options.flip_test:
            with run.autocast(testing=True):
                found = (found + model(batch.flip(3)).float()) / 2
        yield found, indices, counts
    model.train(was_training)


def rank(
    query: Extracted, gallery: Extracted, ids: Sequence[np.ndarray], run: Run, distance: str = 'euclidean'
) -> ranking.Ranking:
    """The ranking of the whole gallery, in every process, from what `extract` returned in each.

    ids: the pids of query and gallery, then their camids

    All processes receive the features of all queries. The counts in their parts of the gallery add up to exact ranks.
    """
    features, places = gallery[0], gallery[1].numpy()  # (m, D), (m,)
    number = len(ids[0])
    queries, items = ranking.points(_collect(*query, number, run), features, number, len(places), distance)
    pairs = ranking.same_identity(*ids)
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


def rerank(
    query: Extracted, gallery: Extracted, ids: Sequence[np.ndarray], options: TestOptions, run: Run
) -> ranking.Ranking | None:
    """The re-ranked gallery, in the first process, which receives all features from the others; None in the others."""
    queries, items = (_collect(*each, len(pids), run) for each, pids in zip((query, gallery), ids[:2], strict=True))
    if run.rank:
        return None
    q_pids, g_pids, q_camids, g_camids = ids
    how = options.k1, options.k2, options.lambda_value, options.distance
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
