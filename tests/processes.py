"""What several processes compute together, and one alone, for test_distributed.py to compare.

torchrun --nproc-per-node 2 tests/processes.py FOLDER DATA_DIR

Each process writes FOLDER/{number of processes}/{rank}.pt; each script of an experiment its own folder there.
"""

import contextlib
import dataclasses
import importlib
import io
import sys
from pathlib import Path

import numpy as np
import tiny
import torch
from torch import nn
from torch.optim import SGD

import data_manager
import evaluation
import losses
import models
from arguments import DataOptions, RunOptions, TestOptions
from dataset_loader import ImageDataset, TrainLoader
from readers.tree import ids_of
from runtime import device, processes
from runtime.device import Run
from samplers import RandomIdentitySampler
from transforms import TrainTransform

SCRIPTS = [path.stem for path in sorted(tiny.ROOT.glob('train_*.py'))]
BATCH = 12  # shared by 1, 2 and 3 processes


class Frozen(tiny.Tiny):
    """BatchNorm in eval mode: its statistics are then no matter of how a batch is shared."""

    def train(self, mode=True):
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                module.eval()
        return self


class Whole(tiny.Tiny):
    """Features that are small whole numbers, many of them equal: they rank exactly."""

    feat_dim = 3

    def features(self, x):
        return (2 * x.mean((2, 3))).round()


models.factory['frozen'] = Frozen


def steps(run):
    """Five steps in float64: losses, gradients of each step, and at last the weights; then one that must do nothing."""
    torch.manual_seed(3)
    model, cent = Frozen(5, {'xent', 'htri'}).double(), losses.CenterLoss(5, Frozen.feat_dim).double()
    xent, htri = losses.CrossEntropyLabelSmooth(5), losses.TripletLoss(0.3)
    params = [*model.parameters(), *cent.parameters()]
    optimizer = SGD(params, 0.1, fused=True)
    replica, replica_cent = run.replicate(model), run.replicate(cent)
    replica.train()
    mine = slice(run.rank, None, run.world_size)
    shown, gradients = [], []

    def step(factor=1.0):
        imgs, pids = torch.randn(BATCH, 3, 32, 16).double()[mine], torch.randint(5, (BATCH,))[mine]
        logits, features = replica(imgs)
        loss = xent(logits, pids) + htri(*run.gather(features, pids)) + 0.1 * replica_cent(features, pids)
        optimizer.zero_grad()
        (factor * loss).backward()
        run.skip_unless_finite(factor * loss, optimizer)
        optimizer.step()
        return loss.detach()

    for _ in range(5):
        shown.append(run.mean(step()))
        gradients.append([param.grad.clone() for param in params])
    weights = [param.detach().clone() for param in params]
    step(float('nan') if run.rank == run.world_size - 1 else 1.0)
    kept = all(torch.equal(param, weight) for param, weight in zip(params, weights, strict=True))
    return {'losses': shown, 'gradients': gradients, 'weights': weights, 'kept': kept}


def batches(run, dataset):
    """The pixels and pids of an epoch, as they enter the network."""
    sampler = RandomIdentitySampler(dataset.train, 4, BATCH, seed=1)
    loader = TrainLoader(ImageDataset(dataset.train), sampler, DataOptions(workers=0), run)
    augment = TrainTransform(32, 16)
    return [(augment(images, draws), pids) for images, pids, draws in loader.epoch(2)]


def tests(run, dataset, tracklets, folder):
    """What the test prints, with statistics of BatchNorm that only the first process has right, and exact rankings."""
    options = TestOptions(
        arch='tiny', height=32, width=16, workers=0, test_batch=5, save_dir=str(folder), evaluate=True,
        save_features=True, k1=6, k2=3,
    )  # fmt: skip
    torch.manual_seed(4)
    model = tiny.Tiny(5)
    for buffer in model.buffers():
        buffer += run.rank
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        rank1 = [evaluation.Test(dataset, options, run)(model)]
        rank1.append(evaluation.Test(dataset, dataclasses.replace(options, rerank=True), run)(model))
        for option in ('any_camera', 'multi_query'):
            more = {option: True, 'save_dir': str(folder / 'more'), 'no_report': True}
            rank1.append(evaluation.Test(dataset, dataclasses.replace(options, **more), run)(model))
    (_, pid, camid), *_ = dataset.query
    matches = [item for item in dataset.gallery if item[1] == pid and item[2] != camid]
    rankings, seen = [], []
    for subsets in ((dataset.query, dataset.gallery), (dataset.query[:1], matches[:1])):
        extracted = [evaluation.extract(Whole(5), items, options, run) for items in subsets]
        seen.append([indices.tolist() for _, indices in extracted])
        rankings.append(
            {name: np.asarray(x) for name, x in vars(evaluation.rank(*extracted, ids_of(*subsets), run)).items()}
        )
    whole = evaluation.extract(Whole(5), tracklets, dataclasses.replace(options, seq_len=0), run)
    return {'whole': whole, 'printed': printed.getvalue(), 'rank1': rank1, 'rankings': rankings, 'seen': seen}


def train(name, folder, data_dir, group):
    """Train with a script of an experiment, its steps untouched; plain SGD, whose steps are as large as gradients."""
    module = importlib.import_module(name)
    module.Adam = lambda params, lr, **_: SGD(params, lr, fused=True)
    module.Test = _NoTest
    args = module.parser.parse_args(
        [
            '-a', 'frozen', '--height', '32', '--width', '16', '--workers', '0', '--use-cpu', '--precision', 'fp32',
            '--pretrained', 'none', '--train-batch', '8', '--lr', '0.1', '--max-epoch', '2', '--print-freq', '1',
            '--data-dir', str(data_dir), '--save-dir', str(folder),
        ]
    )  # fmt: skip
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        module.main(args, run_of(args.run, group))
    return [line for line in printed.getvalue().splitlines() if line.startswith('Batch')]


class _NoTest:
    def __init__(self, *_):
        pass

    def is_due(self, epoch):
        return epoch == 1

    def __call__(self, model):
        return {'rank1': 0.5}


def run_of(options, group):
    """Another run of processes that have met."""
    group.join = lambda device: None
    return device.start(options, group)


def main(folder, data_dir):
    torch.set_num_threads(1)
    group = processes.Group(processes.of_environment())
    run = device.start(RunOptions(use_cpu=True, precision='fp32'), group)
    folder = Path(folder) / str(run.world_size)
    dataset = data_manager.init_dataset('market1501', data_dir)
    tracklets = data_manager.init_dataset('mars', data_dir).gallery
    found = {'steps': steps(run), 'batches': batches(run, dataset), 'lines': {}}
    found['tests'] = tests(run, dataset, tracklets, folder)
    if run.world_size < 3:
        found['lines'] = {name: train(name, folder / name, data_dir, group) for name in SCRIPTS}
        gather, Run.gather = Run.gather, lambda run, features, pids: (features, pids)
        train('train_img_model_xent_htri', folder / 'without_gather', data_dir, group)
        Run.gather = gather
    torch.save(found, folder / f'{run.rank}.pt')
    group.leave()


if __name__ == '__main__':
    main(*sys.argv[1:])
