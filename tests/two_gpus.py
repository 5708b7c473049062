"""Run a script as on a machine with two GPUs; the processes that it starts for them use the CPU.

python tests/two_gpus.py train_img_model_xent.py -a tiny --gpu-devices 0,1 ...

FAULT=mistake, fault or killed lets the second process fail at its second batch.
"""

import os
import runpy
import signal
import sys

import tiny
import torch

from runtime.errors import UserError


def break_down():
    if os.environ['FAULT'] == 'mistake':
        raise UserError('what the second process says')
    if os.environ['FAULT'] == 'fault':
        raise ValueError('what the second process says')
    os.kill(os.getpid(), signal.SIGKILL)


def forward(model, x, whole=tiny.Tiny.forward, count=[]):  # noqa: B006
    count.append(1)
    if len(count) == 2:
        break_down()
    return whole(model, x)


sys.argv = sys.argv[1:]
if 'LOCAL_RANK' in os.environ:
    sys.argv.append('--use-cpu')
    if 'FAULT' in os.environ and os.environ['RANK'] == '1':
        tiny.Tiny.forward = forward
else:
    torch.cuda.device_count = lambda: 2
runpy.run_path(sys.argv[0], run_name='__main__')
