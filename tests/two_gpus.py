"""Run a script as on a machine with two GPUs; the processes that it starts for them use the CPU.

python tests/two_gpus.py train_img_model_xent.py -a tiny --gpu-devices 0,1 ...

ACT is that of tiny.py.
"""

import os
import runpy
import sys

import tiny
import torch

sys.argv = sys.argv[1:]
if 'LOCAL_RANK' in os.environ:
    sys.argv.append('--use-cpu')
    tiny.plan()
else:
    torch.cuda.device_count = lambda: 2
    os.environ['LAUNCHER'] = str(os.getpid())
runpy.run_path(sys.argv[0], run_name='__main__')
