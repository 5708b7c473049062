"""The test: features of query and gallery, their ranking, the printed figures, and the result files.

If there are several processes, each extracts its share of the images, without duplicates, and counts in its part of the
gallery. Gallery features leave their process only for re-ranking, and for the few that the page plots.
"""

import datetime
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

import ranking
from arguments import TestOptions
from data_manager import fingerprint, names_of
from dataset_loader import ImageDataset, TestLoader, VideoDataset
from eval_metrics import METRICS
from files.features import create_features, keep_features
from models.network import Network, embed
from page import cameras, results
from page.runs import VALIDATION
from readers.tree import Dataset, Item, ids_of
from runtime import notices, targets
from runtime.device import Run
from runtime.errors import plain
from runtime.meters import bar_over
from runtime.provenance import provenance
from runtime.ranks import Extracted, mean_features, rank, rerank, sample
from runtime.testset import averaged, check_files, check_items, check_script, fitting
from transforms import TestTransform

MAX_RANK = 50
HELD_OUT_NOTICE = (
    'these figures are for persons held out of the training set, by which best_model.pth.tar is chosen; they are not '
    'those of a test set'
)
FRAMES = 15  # of a tracklet: the default of --seq-len; with --seq-len 0, those that count for --test-batch


class Test:
    """The tests of an experiment: `figures = test(model)`, a dict with the mean of each of METRICS (0..1).

    Each of the data set's `targets` is tested. The figures of the first one are named as in METRICS, those of the
    others have the target's name as a prefix, as in `market1501/rank1`. If persons are held out for validation, they
    are tested instead, their figures have the prefix `validation/`, and `last` tests the targets. Without targets the
    figures are {}.

    Raises:
        UserError: the test would fail, which is detected before training: query or gallery is empty, no query has a
            match, a file is missing, --multi-query finds no images for a query, or the page needs a missing package.
    """

    def __init__(self, dataset: Dataset, options: TestOptions, run: Run):
        check_script(dataset, options)
        self.options, self.run = options, run
        names = [target.name for target in dataset.targets]
        alone = not options.targets and len(names) == len(names_of(options.dataset)) == 1
        known = [options.dataset] if alone else names  # a single one as in -d, such as csv:FILE
        self.targets = [
            TargetTest(target, replace(options, dataset=name, save_dir=folder), run, folder != options.save_dir)
            for target, name, folder in zip(
                dataset.targets, known, targets.folders(options.save_dir, names), strict=True
            )
        ]
        self.validation: TargetTest | None = None
        if dataset.validation and not options.evaluate:
            folder = os.path.join(options.save_dir, VALIDATION)
            single = replace(options, save_dir=folder, multi_query=False)
            self.validation = TargetTest(dataset.validation, single, run)
        if not options.no_report:
            results.check_packages()

    def is_due(self, epoch: int) -> bool:
        """Whether to test after this epoch (from 0): every --eval-step epochs, and after the last one."""
        return self.options.is_tested(epoch)

    def __call__(self, model: Network) -> dict[str, float]:
        """Print the same figures as the original; write results.json, results.csv, ranking.npz and the page.

        Raises:
            UserError: an image cannot be read, features are not finite, or --save-features cannot write them.
        """
        if self.validation:
            more = {'validation': True, 'part_of_a_test': True, 'notices': [HELD_OUT_NOTICE]}
            figures = self._test(model, [self.validation], '==> Validation, on persons held out of training', more)
            print('The figures above are of persons held out of training, not of a test set')
            return {f'{VALIDATION}/{name}': value for name, value in figures.items()}
        return self._test(model, self.targets, 'Evaluate only' if self.options.evaluate else '==> Test', {})

    def last(self, model: Network, more: dict[str, object]) -> dict[str, float]:
        """Test the targets of a run with --validate; `more` is added to results.json."""
        return self._test(model, self.targets, '==> Test', more)

    def _test(
        self, model: Network, tests: Sequence['TargetTest'], heading: str, more: dict[str, object]
    ) -> dict[str, float]:
        if not tests:
            print('No test: no data set is left to test')
            return {}
        self.run.testing = True
        self.run.signals.release()  # there is nothing to save until the next epoch
        self.options = notices.as_in_project(self.options, model)
        for test in tests:
            test.prepare(model, self.options)
        for notice in dict.fromkeys(notice for test in tests for notice in test.notices):
            print(f'Notice: {notice}')
        print(heading)
        self.run.unify(model)
        tested = self.run.for_test(model, self.options)
        figures: dict[str, dict[str, float]] = {}
        for test in tests:
            if len(tests) > 1:
                print(f'Target {plain(test.dataset.name, 500)}')
            figures[test.dataset.name] = test(tested)
        table: dict[str, object] = {}
        if len(tests) > 1:
            targets.show(figures)
            table = {'targets': targets.table(figures, [test.options.save_dir for test in tests])}
        for test in reversed(tests):  # the first one is written last, because its results refer to the others
            test.write({**more, **(table if test is tests[0] else {})})
        self.run.testing = False
        return targets.named(figures)


class TargetTest:
    """The test of one data set; `write` writes its results, to --save-dir, or if `apart` to a folder below it."""

    def __init__(self, dataset: Dataset, options: TestOptions, run: Run, apart: bool = False):
        options = fitting(options, dataset)
        self.dataset, self.options, self.run, self.apart = dataset, options, run, apart
        self.ids = check_items(dataset, options.any_camera, run)
        self.averaged = averaged(dataset) if options.multi_query else None
        more = [self.averaged.items] if self.averaged else []
        subsets = (tested_items(items, options) for items in (dataset.query, dataset.gallery, *more))
        check_files(list(dict.fromkeys(path for items in subsets for path in items.files())), run)
        self.notices: list[str] = []
        self.result: ranking.Ranking | None = None  # of the last test, in the first process
        self.arrays: dict[str, np.ndarray] = {}

    def prepare(self, model: Network, options: TestOptions) -> None:
        """Set the `options` of the test; with --evaluate, compare it with the training of the weights."""
        kept = {name: getattr(self.options, name) for name in ('dataset', 'save_dir', 'any_camera')}
        self.options = replace(options, interpolation=options.interpolation or model.interpolation, **kept)
        if options.evaluate:
            self.notices = notices.of_test(model, self.dataset, self.options, self.run)

    def __call__(self, model: Network) -> dict[str, float]:
        query, gallery = (self._extract(model, subset) for subset in ('query', 'gallery'))
        if self.options.save_features:
            keep_features(self.options.save_dir, self.run)
        print('Computing distance matrix')  # as printed by the original; no matrix is kept
        print('Computing CMC and mAP')
        self.result = self._rank(query, gallery)
        self.arrays = self._by_camera(query, gallery) | sample(query, gallery, self.dataset, self.run)
        values = torch.zeros(len(METRICS), dtype=torch.float64)
        if self.result:
            ranking.show(self.result, self.options.any_camera)
            figures = self.result.figures()
            values = torch.tensor([figures[metric.name] for metric in METRICS], dtype=torch.float64)
        return dict(zip((metric.name for metric in METRICS), self.run.sum(values).tolist(), strict=True))

    def write(self, more: dict[str, object]) -> None:
        """Write the files of the last test; `more` is added to results.json."""
        result, self.result = self.result, None
        if result is None:
            return
        folder = self.options.save_dir
        more = more | ({'part_of_a_test': True} if self.apart else {})
        results.write(folder, self._summary(result) | more, self.dataset, result, self.arrays, self.run.unwritten)
        if (self.options.evaluate or self.apart) and not self.options.no_report:  # else after metrics.csv
            results.write_page(folder, self.run.unwritten)

    def _extract(self, model: Network, subset: str) -> Extracted:
        items = getattr(self.dataset, subset)
        file = None
        several = self.averaged if subset == 'query' else None  # with --multi-query, the images to be averaged
        if self.options.save_features:
            counts = np.bincount(several.groups)[several.of_queries] if several else None
            folder = self.options.save_dir
            file = create_features(folder, subset, items, model.feat_dim, self.run, counts, self.options.distance)
        if several:
            subset, items = 'multi-query', several.items
        extracted = extract(model, items, self.options, self.run)
        print(f'Extracted features for {subset} set, obtained {len(items)}-by-{extracted[0].size(1)} matrix')
        if several:
            extracted = mean_features(*extracted, several, self.run, self.options.distance)
        if file:
            file.write(*extracted)
        return extracted

    def _rank(self, query: Extracted, gallery: Extracted) -> ranking.Ranking | None:
        """The ranking in the first process; None in the others."""
        if self.options.any_camera:
            print(ranking.ANY_CAMERA)
        if self.options.rerank:
            print(ranking.RERANKING_LINE.format(**vars(self.options)))
            return rerank(query, gallery, self.ids, self.options, self.run)
        result = rank(query, gallery, self.ids, self.run, self.options.distance)
        return None if self.run.rank else result

    def _by_camera(self, query: Extracted, gallery: Extracted) -> dict[str, np.ndarray]:
        """The arrays of the table of cameras; empty if the table is left out."""
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
        if self.dataset.no_cameras:
            return 'the cameras are unknown'
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
                'match in the same camera only': result.num_same_camera,  # with --any-camera: only their own file
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
            'no_cameras': dataset.no_cameras,
            'multi_query': self.averaged is not None and {'items': len(self.averaged.items)},
            'seq_len': options.seq_len if dataset.kind == 'video' else None,
            'pool': options.pool if dataset.kind == 'video' else None,
            'cameras_left_out': self._cameras_left_out() or None,
            'arch': options.arch,
            'checkpoint': (options.resume or options.pretrained) if options.evaluate else None,
            'height': options.height,
            'width': options.width,
            'interpolation': options.interpolation,
            'precision': self.run.test_precision,
            'notices': self.notices,
            'dataset_fingerprint': fingerprint(dataset),
            'test_fingerprint': fingerprint(dataset, ('query', 'gallery')),  # whether or not there is a training set
            **provenance(self.run),
        }


def tested_items(items: Sequence[Item], options: TestOptions) -> ImageDataset | VideoDataset:
    """The images to test, or --seq-len frames of each tracklet; if that is 0, all frames as single images."""
    if isinstance(items[0][0], str):
        return ImageDataset(items)
    if options.seq_len == 0:
        return ImageDataset([(path, pid, camid) for paths, pid, camid in items for path in paths])
    return VideoDataset(items, options.seq_len, 'evenly')


@torch.inference_mode()
def extract(model: Network, items: Sequence[Item], options: TestOptions, run: Run) -> Extracted:
    """Features of the images or tracklets that this process handles, and the indices of these items.

    A tracklet's feature is the mean or maximum over `--seq-len` of its frames. Apart from rounding, figures do not
    depend on --test-batch. The model's mode is restored.

    Returns:
        Features (n, feat_dim), float32, on the run's device, and indices (n,) int64, ascending. A single process gets
        all N items in order; several get a part each, which may be empty if there are more processes than items.
    """
    dataset = tested_items(items, options)
    if isinstance(dataset, ImageDataset) and not isinstance(items[0][0], str):
        return _extract_whole(model, items, dataset, options, run)
    loader = TestLoader(dataset, options.test_batch, options.workers, run)
    item_indices = torch.tensor([item for batch in loader.items for item in batch], dtype=torch.int64)  # (n,)
    features = torch.empty(len(item_indices), model.feat_dim, device=run.device)  # (n, feat_dim)
    done = 0
    for batch_features, _, counts in _batches(model, loader, options, run):
        if isinstance(dataset, VideoDataset):
            batch_features = pool(batch_features, counts, options.pool)  # (b, feat_dim)
        features[done : done + len(batch_features)] = batch_features
        done += len(batch_features)
    return features, item_indices


def _extract_whole(
    model: Network, items: Sequence[Item], frames: ImageDataset, options: TestOptions, run: Run
) -> Extracted:
    """Like `extract`, with all frames of each tracklet, in batches of at most --test-batch times FRAMES frames."""
    sizes = torch.tensor([len(paths) for paths, _, _ in items])  # (N,)
    tracklets = torch.arange(len(items)).repeat_interleave(sizes)  # of each frame
    loader = TestLoader(frames, options.test_batch * FRAMES, options.workers, run, tracklets.numpy())
    item_indices = torch.arange(run.rank, len(items), run.world_size)  # (n,)
    start = 0.0 if options.pool == 'avg' else -torch.inf
    features = torch.full((len(item_indices), model.feat_dim), start, device=run.device)  # (n, feat_dim)
    for of_frames, indices, _ in _batches(model, loader, options, run):
        parts, counts = tracklets[indices].unique_consecutive(return_counts=True)
        for tracklet, part in zip(parts.tolist(), of_frames.split(counts.tolist()), strict=True):  # (frames, feat_dim)
            row = features[tracklet // run.world_size]  # (feat_dim,)
            row.copy_(row + part.sum(0) if options.pool == 'avg' else row.maximum(part.amax(0)))
    if options.pool == 'avg':
        features /= sizes[item_indices, None].to(run.device)
    return features, item_indices


def _batches(
    model: Network, loader: TestLoader, options: TestOptions, run: Run
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """For each batch its features (images, feat_dim), the indices (b,) of its items, and their numbers of images."""
    interpolation = options.interpolation or model.interpolation
    prepare = TestTransform(options.height, options.width, model.normalisation, interpolation)
    was_training = model.training
    model.eval()
    for images, indices, counts in bar_over(loader, 'Extracting features', options.quiet, unit='batch'):
        batch = prepare(images)  # (images, 3, h, w)
        with run.autocast(testing=True):
            features = embed(model, batch, options.flip_test)
        yield features, indices, counts
    model.train(was_training)


def pool(features: Tensor, counts: Tensor, how: str) -> Tensor:
    """One feature per tracklet, (b, D): mean ('avg') or maximum ('max') of its frames; `counts` (b,) of (frames, D)."""
    tracklets = features.split(counts.tolist())
    return torch.stack([frames.mean(0) if how == 'avg' else frames.amax(0) for frames in tracklets])
