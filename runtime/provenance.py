"""The origin of results, recorded in every checkpoint and with every result."""

import functools
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL
import torch
import torchvision

from runtime.device import Run


def provenance(run: Run) -> dict[str, object]:
    """Seed, device, versions, command, and the git revision of this code if it has one."""
    return {
        'seed': run.seed,
        'device': torch.cuda.get_device_name(run.device) if run.device.type == 'cuda' else 'CPU',
        'processes': run.world_size,
        'versions': {
            'python': platform.python_version(),
            'torch': str(torch.__version__),
            'torchvision': str(torchvision.__version__),
            'numpy': np.__version__,
            'pillow': PIL.__version__,
        },
        'revision': _revision(),
        'command': list(sys.argv),
    }


@functools.cache
def _revision() -> str | None:
    """The commit of this code, followed by `+` if tracked files differ from it."""
    git = ['git', '-C', str(Path(__file__).parent)]
    try:
        commit, changes = (
            subprocess.run([*git, *command], capture_output=True, text=True, check=True, timeout=60).stdout.strip()
            for command in (['rev-parse', 'HEAD'], ['status', '--porcelain', '--untracked-files=no'])
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return f'{commit}{"+" if changes else ""}'
