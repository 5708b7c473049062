"""The test: features of query and gallery, their ranking, the printed figures and results.json."""

import platform
import sys
from pathlib import Path

import numpy as np
import torch
import torchvision
from torch import Tensor, nn

import ranking
from dataset_loader import ImageDataset, VideoDataset, test_loader
from transforms import TestTransform
from utils import write_json

MAX_RANK = 50
PRINTED_RANKS = (1, 5, 10, 20)


class Test:
    """The test of an experiment: `rank1 = test(model)`.

    Args:
        dataset: what `data_manager.init_dataset` gives.
        options: `args.test`.
        run: `launch.start(...)`.
    """

    def __init__(self, dataset, options, run):
        self.dataset = dataset
        self.options = options
        self.run = run

    def is_due(self, epoch: int) -> bool:
        """Whether a test follows this epoch (from 0): every --eval-step, and after the last one."""
        step, epochs = self.options.eval_step, epoch + 1
        return (step > 0 and epochs % step == 0) or epochs == self.options.max_epoch

    def __call__(self, model: nn.Module) -> float:
        """Print the figures of the original, write results.json into --save-dir, and return Rank-1 (0..1).

        Raises:
            UserError: no query has a match in the gallery, or features are not finite.
        """
        print('Evaluate only' if self.options.evaluate else '==> Test')
        features = {}
        for subset in ('query', 'gallery'):
            features[subset] = extract(model, getattr(self.dataset, subset), self.options, self.run)
            height, width = features[subset].shape
            print(f'Extracted features for {subset} set, obtained {height}-by-{width} matrix')
        print('Computing distance matrix')
        print('Computing CMC and mAP')
        result = ranking.rank(
            features['query'],
            features['gallery'],
            *_ids(self.dataset.query, self.dataset.gallery),
        )
        self._print(result)
        write_json(self._summary(result), Path(self.options.save_dir) / 'results.json')
        return float(result.cmc(MAX_RANK)[0])

    def _print(self, result) -> None:
        cmc = result.cmc(MAX_RANK)
        print(
            f'Queries: {result.num_valid} valid, {result.num_skipped} skipped ({result.num_same_camera} with a match '
            f'in their own camera only, {result.num_absent} with none in the gallery)'
        )
        print('Results ----------')
        print(f'mAP: {result.mAP:.1%}')
        print('CMC curve')
        for rank in PRINTED_RANKS:
            print(f'Rank-{rank:<3}: {cmc[rank - 1]:.1%}')
        print('------------------')

    def _summary(self, result) -> dict:
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
            'dataset': dataset.name,
            'arch': options.arch,
            'checkpoint': options.resume or None,
            'height': options.height,
            'width': options.width,
            'precision': self.run.test_precision,
            'versions': {
                'python': platform.python_version(),
                'torch': torch.__version__,
                'torchvision': torchvision.__version__,
                'numpy': np.__version__,
            },
            'command': sys.argv,
        }


@torch.inference_mode()
def extract(model: nn.Module, items: list, options, run) -> Tensor:
    """Features (N, feat_dim), float32, on the run's device, of N images or tracklets, in their order.

    A tracklet's feature is the mean or maximum over `--seq-len` of its frames. The shape of each batch is taken from
    the batch, so any --test-batch gives the same figures. The model is left in the mode it was in.
    """
    tracklets = isinstance(items[0][0], tuple)
    dataset = VideoDataset(items, options.seq_len, 'evenly') if tracklets else ImageDataset(items)
    prepare = TestTransform(options.height, options.width)
    features = None
    was_training = model.training
    model.eval()
    for images, indices, counts in test_loader(dataset, options.test_batch, options.workers, run):
        with run.autocast(testing=True):
            found = model(prepare(images)).float()  # (frames, feat_dim)
        if tracklets:
            found = pool(found, counts, options.pool)  # (b, feat_dim)
        if features is None:
            features = found.new_empty(len(items), found.size(1))
        features[indices.to(found.device)] = found
    model.train(was_training)
    return features


def pool(features: Tensor, counts: Tensor, how: str) -> Tensor:
    """One feature per tracklet, (b, D): mean ('avg') or maximum ('max') over its `counts` (b,) rows of (frames, D)."""
    tracklets = features.split(counts.tolist())
    return torch.stack([frames.mean(0) if how == 'avg' else frames.amax(0) for frames in tracklets])


def _ids(query: list, gallery: list) -> list[np.ndarray]:
    """pids of query and gallery, then their camids."""
    return [np.array([item[column] for item in items]) for column in (1, 2) for items in (query, gallery)]
