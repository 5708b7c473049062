"""What it costs to share a batch: steps of one process against those of several, on the device that is there.

    python benchmarks/distributed.py

ResNet50 with cross entropy and the triplet loss, whose features are gathered, on resident batches of 256x128.

- On CPUs 2 processes with half of the cores each share the batch of 32 that 1 process takes with all of them. Lost is
  what they need more; communication and waiting is what they need more than without exchanging anything.
- On several GPUs each process takes a batch of 64. Efficiency is the time of one alone over that of all at once; the
  target is 95% on 4 GPUs of one host. [gpu]

The kinds of steps take turns; the figures are medians of the turns' ratios. That does not help on CPUs that others use
too: the threads of the 1 process wait for each other spinning, and were seen to need 4 times the CPU time for the same
step. The load is therefore taken at the start, and told when it makes the comparison worthless.
"""

import contextlib
import io
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch.optim import Adam

import launch
import models
import train_img_model_xent_htri as script
from losses import CrossEntropyLabelSmooth, TripletLoss

HEIGHT, WIDTH, CLASSES = 256, 128, 751
TURNS, WARM = 7, 2


def trainer(run: launch.Run, batch: int):
    """One step of the script, on `batch` images that are already there."""
    torch.manual_seed(0)
    with contextlib.redirect_stdout(io.StringIO()):
        model = run.place(models.init_model('resnet50', CLASSES, loss={'xent', 'htri'}))
    replica = run.replicate(model)
    optimizer = Adam(model.parameters(), 3e-4, fused=True)
    images = run.place(torch.randn(batch, 3, HEIGHT, WIDTH))
    pids = torch.arange(batch, device=run.device) // 4
    criteria = CrossEntropyLabelSmooth(CLASSES), TripletLoss(0.3)
    meter = SimpleNamespace(update=lambda **losses: None)

    def step():
        script.train([(images, pids, None)], replica, lambda imgs, draws: imgs, *criteria, optimizer, meter, run)

    return step


def seconds(step, run: launch.Run, steps: int) -> torch.Tensor:
    """Of a step, in each of the processes (W,), which begin together."""
    run.sum(torch.zeros(1))
    began = time.perf_counter()
    for _ in range(steps):
        step()
    if run.device.type == 'cuda':
        torch.cuda.synchronize()
    return run.stack(torch.tensor((time.perf_counter() - began) / steps))


def main() -> None:
    options = SimpleNamespace(
        seed=1,
        use_cpu=False,
        gpu_devices='0',
        precision='auto',
        width=WIDTH,
        sync_bn=False,
        compile=False,
    )
    with contextlib.redirect_stdout(io.StringIO()):
        run = launch.start(options)
    on_cpu = run.device.type == 'cpu'
    busy = os.getloadavg()[0]  # of the last minute; starting up is less than 1 of it
    alone = launch.Run(run.device, run.precision, run.test_precision, run.seed)
    cores, many, steps = os.cpu_count() or 1, run.world_size, 1 if on_cpu else 50
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
        if on_cpu and busy > 1:
            print(f'NOT VALID against 1 process: others use these {cores} cores (load {busy:.1f} at the start)')
        report([tuple(map(float, turn)) for turn in turns[WARM:]], many, on_cpu, run.precision)
    launch._leave()


def report(turns: list[tuple], many: int, on_cpu: bool, precision: str) -> None:
    one, together, apart = (statistics.median(column) for column in zip(*turns, strict=True))
    print(f'{"CPU, gloo" if on_cpu else "GPU, NCCL"}, {many} processes, {precision}, resnet50 {HEIGHT}x{WIDTH}')
    print(f'step: {one:.3f} s in 1 process, {together:.3f} s in {many}, {apart:.3f} s in {many} without exchange')
    exchange = statistics.median(1 - apart / together for _, together, apart in turns)
    ratio = statistics.median(one / together for one, together, _ in turns)
    if on_cpu:
        print(f'lost against 1 process: {1 - ratio:.1%}; communication and waiting: {exchange:.1%} of a step')
    else:
        print(f'scaling efficiency: {ratio:.1%}; communication and waiting: {exchange:.1%} of a step')


if __name__ == '__main__':
    if 'LOCAL_RANK' in os.environ:
        main()
    else:
        gpus = torch.cuda.device_count()
        if gpus == 1:
            sys.exit('one GPU alone: there is nothing to compare')
        command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', str(gpus or 2)]
        sys.exit(subprocess.run([*command, __file__]).returncode)
