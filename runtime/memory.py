"""Running out of memory: on which device it happened, and which options need less."""

import argparse
import errno
import re

from runtime.errors import UserError, plain

# On the GPU: the messages of torch.OutOfMemoryError, of other CUDA calls, and of the CUDA libraries.
OF_GPU = re.compile(r'out of memory|(?:CUBLAS|CUDNN|CUSOLVER)_STATUS_ALLOC_FAILED', re.IGNORECASE)
OF_HOST = re.compile('DefaultCPUAllocator|DefaultHostAllocator')


def exhausted(problem: BaseException) -> str:
    """'GPU' or 'host' if an exception means that the memory of the GPU or host ran out, '' otherwise."""
    if isinstance(problem, MemoryError) or (isinstance(problem, OSError) and problem.errno == errno.ENOMEM):
        return 'host'
    if isinstance(problem, RuntimeError):  # torch raises it for both
        return 'host' if OF_HOST.search(str(problem)) else 'GPU' if OF_GPU.search(str(problem)) else ''
    return ''


def reason(problem: BaseException) -> str:
    """The first sentences of an out-of-memory error, which contain its numbers, without torch's advice."""
    text = str(problem).rpartition('DefaultCPUAllocator: ')[2]
    return plain('. '.join(text.split('. ')[:3])).rstrip('.') or 'no details are known'


def explained(problem: Exception, args: argparse.Namespace, testing: bool, precision: str = '') -> Exception:
    """If memory ran out in training or a test, a UserError with the options that need less; otherwise `problem`.

    precision: that of the network, '' if it is not known yet
    """
    whose, options = exhausted(problem), vars(args)
    if not whose:
        return problem
    batch = '--test-batch' if testing else '--train-batch'
    advice = [f'a smaller {batch}']
    if whose == 'GPU' and precision in ('fp32', 'tf32'):
        advice.append('--precision bf16')
    if whose == 'host' and options.get('workers'):
        advice.append('fewer --workers')
    if options.get('cache', 'none') == ('device' if whose == 'GPU' else 'ram'):
        advice.append('--cache none')
    return UserError(f'the memory of the {whose} ran out ({reason(problem)}); try {" or ".join(advice)}')
