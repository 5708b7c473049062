"""The cores of this machine that the program may use."""

import os


def usable_cores() -> int:
    """The number of cores to which this program is bound, as by Slurm or a cpuset (Linux); otherwise, all."""
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
