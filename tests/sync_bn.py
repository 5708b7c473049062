"""BatchNorm over two GPUs, for test_distributed.py: torchrun --nproc-per-node 2 tests/sync_bn.py FOLDER."""

import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn

from runtime import launch

options = SimpleNamespace(
    seed=1, use_cpu=False, gpu_devices='0', precision='fp32', sync_bn=True, compile=False, deterministic=False, width=16
)
run = launch.start(options)
model = run.place(nn.Sequential(nn.BatchNorm2d(3)))
imgs = torch.randn(8, 3, 4, 4, generator=torch.Generator().manual_seed(0))[run.rank :: 2].to(run.device)
out = run.replicate(model)(imgs)
out.square().mul(imgs).mean().backward()
norm = model[0]
found = {'out': out.detach(), 'mean': norm.running_mean, 'gradient': norm.weight.grad}
torch.save({name: tensor.cpu() for name, tensor in found.items()}, Path(sys.argv[1]) / f'{run.rank}.pt')
launch._leave()
