"""What it costs to share a batch: steps of one process against those of several. Rows of `table.py`.

ResNet50 with cross entropy and the triplet loss, whose features are gathered, on resident batches of 256x128.

- On CPUs 2 processes with half of the cores each share the batch of 32 that 1 process takes with all of them.
- On several GPUs each process takes a batch of 64. The limit is the time of one alone: 1.05 times that on 4 GPUs of one
  host is a scaling efficiency of 95%.

Communication and waiting is what a step needs more than without exchanging anything. On CPUs that others use too the
1 process suffers most: its threads wait for each other spinning.
"""

import contextlib
import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn
from torch.optim import Adam, Optimizer

import models
from arguments import RunOptions
from losses import CrossEntropyLabelSmooth, TripletLoss
from runtime import device
from runtime.cores import usable_cores
from runtime.device import Run
from runtime.processes import Group, of_environment
from table import Row, in_a_fresh_process, row

HEIGHT, WIDTH, CLASSES = 256, 128, 751
TURNS, WARM = 7, 2


def train(
    batches: Iterable[tuple],
    replica: nn.Module,
    augment: Callable[..., torch.Tensor],
    criterion_xent: nn.Module,
    criterion_htri: TripletLoss,
    optimizer: Optimizer,
    meter: SimpleNamespace,
    run: Run,
) -> None:
    """The steps of train_img_model_xent_htri.py, line by line, without its checkpoint."""
    replica.train()
    for imgs, pids, draws in batches:
        with run.autocast():
            logits, features = replica(augment(imgs, draws))  # (B, num_train_pids), (B, feat_dim)
        xent = criterion_xent(logits.float(), pids)
        htri = criterion_htri(*run.gather(features.float(), pids))  # the hardest of the whole batch
        loss = xent + htri
        optimizer.zero_grad()
        loss.backward()
        run.skip_unless_finite(loss, optimizer)
        optimizer.step()
        meter.update(loss=loss, xent=xent, htri=htri, active=criterion_htri.active, collapsed=criterion_htri.collapsed)


def trainer(run: Run, batch: int) -> Callable[[], None]:
    """One step of the script, on `batch` images that are already there."""
    torch.manual_seed(0)
    with contextlib.redirect_stdout(io.StringIO()):
        model = run.place(models.init_model('resnet50', CLASSES, loss={'xent', 'htri'}))
    replica = run.replicate(model)
    optimizer = Adam(model.parameters(), 3e-4, fused=True)
    images = torch.randn(batch, 3, HEIGHT, WIDTH).to(run.device, memory_format=torch.channels_last)
    pids = torch.arange(batch, device=run.device) // 4
    criteria = CrossEntropyLabelSmooth(CLASSES), TripletLoss(0.3)
    meter = SimpleNamespace(update=lambda **losses: None)

    def step() -> None:
        train([(images, pids, None)], replica, lambda imgs, draws: imgs, *criteria, optimizer, meter, run)

    return step


def seconds(step: Callable[[], object], run: Run, steps: int) -> torch.Tensor:
    """Of a step, in each of the processes (W,), which begin together."""
    run.sum(torch.zeros(1))
    began = time.perf_counter()
    for _ in range(steps):
        step()
    if run.device.type == 'cuda':
        torch.cuda.synchronize()
    return run.stack(torch.tensor((time.perf_counter() - began) / steps))


def main() -> None:
    group = Group(of_environment())
    with contextlib.redirect_stdout(io.StringIO()):
        run = device.start(RunOptions(width=WIDTH), group)
    on_cpu = run.device.type == 'cpu'
    alone = Run(run.device, run.precision, run.test_precision, run.seed)
    cores, many, steps = usable_cores(), run.world_size, 1 if on_cpu else 50
    share = 32 // many if on_cpu else 64
    together, apart = trainer(run, share), trainer(alone, share)
    whole = trainer(alone, 32 if on_cpu else 64) if run.rank == 0 else None
    turns = []
    for _ in range(WARM + TURNS):
        torch.set_num_threads(cores if on_cpu else 1)
        one = run.stack(seconds(whole, alone, steps) if whole else torch.zeros(1)).max()  # the others wait
        torch.set_num_threads(max(cores // many, 1) if on_cpu else 1)
        turns.append((one, seconds(together, run, steps).max(), seconds(apart, run, steps).mean()))
    if run.rank == 0:
        names = ('one', 'together', 'apart')
        times = {name: [float(turn[index]) for turn in turns[WARM:]] for index, name in enumerate(names)}
        print(json.dumps({'times': times, 'batch': share * many, 'many': many}))
    group.leave()


def rows(full: bool) -> list[Row]:
    gpus = in_a_fresh_process('table', 'gpus')
    if gpus == 1:
        return [Row('a batch shared by several GPUs: needs two or more')]
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', str(gpus or 2)]
    path = os.pathsep.join([str(Path(__file__).parents[1]), str(Path(__file__).parent)])
    ended = subprocess.run(
        [*command, __file__], check=True, stdout=subprocess.PIPE, text=True, env={**os.environ, 'PYTHONPATH': path}
    )
    found = json.loads(ended.stdout.splitlines()[-1])
    times, what = found['times'], f'step shared by {found["many"]} {"GPUs" if gpus else "processes"}'
    target, one = 1.05 if gpus == 4 else None, 'one alone' if gpus else 'the whole batch in one'
    sides = {'ours': times['together'], 'limit': times['one']}
    exchange = {'ours': times['together'], 'limit': times['apart']}
    return [
        row(f'{what}; limit: {one}', sides, found['batch'], limit_target=target),
        row('the same; limit: without communication', exchange, found['batch']),
    ]


if __name__ == '__main__':
    main()
