"""BatchNorm over two GPUs, for test_distributed.py: torchrun --nproc-per-node 2 tests/sync_bn.py FOLDER."""

import sys
from pathlib import Path

import torch
from torch import nn

from arguments import RunOptions
from runtime import device, processes

group = processes.Group(processes.of_environment())
run = device.start(RunOptions(precision='fp32', sync_bn=True), group)
model = run.place(nn.Sequential(nn.BatchNorm2d(3)))
imgs = torch.randn(8, 3, 4, 4, generator=torch.Generator().manual_seed(0))[run.rank :: 2].to(run.device)
out = run.replicate(model)(imgs)
out.square().mul(imgs).mean().backward()
norm = model[0]
found = {'out': out.detach(), 'mean': norm.running_mean, 'gradient': norm.weight.grad}
torch.save({name: tensor.cpu() for name, tensor in found.items()}, Path(sys.argv[1]) / f'{run.rank}.pt')
group.leave()
