"""What holds on the GPU of this machine: the tests that need one, the demo, and speeds, in less than ten minutes.

    python benchmarks/gpu.py [--dry]

The last line sums up what holds and what does not, and the exit status is 0 only if all holds. The packages torch,
torchvision, numpy, Pillow, scipy and pytest are enough, and nothing is downloaded. Each part runs in a process of its
own, which is ended when its time is over. The tests come last and have all the time that is left.

`--dry` runs a few tests, a short demo and single steps on the CPU, as a test of this file.
"""

import argparse
import importlib.util
import json
import os
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import learning
from table import HERE, within

ROOT = HERE.parent
NEEDED = {name: name for name in ('torch', 'torchvision', 'numpy', 'scipy', 'pytest')} | {'PIL': 'Pillow'}
TOTAL = 590  # seconds
SPEEDS = {'fp32': 50, 'tf32': 50, 'bf16': 50, 'bf16 compiled': 120}  # what is measured, and seconds at most
DEVICE_SECONDS, DEMO_SECONDS = 60, 70
LEAST_MAP = 0.75  # of the demo; 0.81 was the least of three seeds in both precisions on CPUs
NOISE = 0.95  # what is claimed to be as fast as something else may be that much slower
DRY_TESTS = 'waits or finite or exactly or tf32'

# Parts that run in a process of their own and print a line of JSON


def device() -> dict:
    import torch

    from runtime.precision import has_bf16

    if not torch.cuda.is_available():
        return {'torch': torch.__version__, 'name': ''}
    name = torch.cuda.get_device_name(0)
    return {'torch': torch.__version__, 'name': name, 'bf16': has_bf16(torch.device('cuda', 0))}


def speed(what: str, dry: bool) -> dict:
    """Images per second of a training step and an extraction of ResNet50, and the peak memory of the training in GB."""
    import torch

    import training

    if dry:
        training.BATCH, training.HEIGHT, training.WIDTH = 4, 96, 48
    cuda = torch.cuda.is_available() and not dry

    def images_per_second(step: Callable[[], object]) -> float:
        turns = []
        for turn in range(2 if dry else 6):  # the first one warms up
            began = time.perf_counter()
            for _ in range(1 if dry else 10):
                step()
            if cuda:
                torch.cuda.synchronize()
            turns += [time.perf_counter() - began] * (turn > 0)
        return training.BATCH * (1 if dry else 10) / statistics.median(turns)

    precision, compiled = what.split()[0], 'compiled' in what
    found = {'training': images_per_second(training.trainer(precision, compiled))}
    if cuda:
        found['peak'] = torch.cuda.max_memory_allocated() / 1e9
    if not compiled:
        found['extraction'] = images_per_second(training.extractor(precision))
    return found


# What starts them


def call(name: str, seconds: float, *args: object) -> dict | None:
    """What a part found; None if it failed or took too long."""
    with tempfile.TemporaryFile('w+') as out:
        code = f'import json, gpu; print(json.dumps(gpu.{name}(*{args!r})))'
        status = within(seconds, [sys.executable, '-c', code], stdout=out)
        out.seek(0)
        lines = out.read().splitlines()
    return json.loads(lines[-1]) if status == 0 and lines else None


def demo(seconds: float, dry: bool) -> float | None:
    """The mAP (0..1) after the command of `make demo`, without its page."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, *learning.command(), '--no-report']
        command += ['--save-dir', folder, '--data-dir', f'{folder}/data']
        if dry:
            command[1:1] = [str(ROOT / 'tests' / 'tiny.py')]
            command += ['-a', 'tiny', '--use-cpu', '--precision', 'fp32', '--max-epoch', '1', '--workers', '0']
        status, results = within(seconds, command, cwd=ROOT), Path(folder) / 'results.json'
        return json.loads(results.read_text(encoding='utf-8'))['mAP'] if status == 0 else None


def run_tests(seconds: float, dry: bool) -> dict:
    """The names of the tests by outcome, how many there were to run, and the exit status of pytest."""
    marked = [path for path in sorted((ROOT / 'tests').glob('test_*.py')) if 'mark.gpu' in path.read_text('utf-8')]
    command = [sys.executable, '-m', 'pytest', '-v', '-m', 'gpu', '--tb=short', '-p', 'no:cacheprovider']
    command += ['-k', DRY_TESTS] if dry else []
    files = sorted(marked, key=lambda path: path.name != 'test_gpu.py')[: 1 if dry else None]
    print(f'tests: {seconds:.0f} s at most', flush=True)
    with tempfile.TemporaryFile('w+') as out:
        settings = {'PYTHONUNBUFFERED': '1'}  # what was printed before the time was over is not lost
        settings |= {'GPU_TESTS': 'cpu', 'OMP_NUM_THREADS': '1'} if dry else {}
        status = within(seconds, [*command, *map(str, files)], settings, stdout=out, cwd=ROOT)
        out.seek(0)
        text = out.read()
    print(text)
    return {**outcomes(text), 'status': status}


def outcomes(text: str) -> dict:
    """What `pytest -v` printed, perhaps not to its end."""
    found: dict = {'passed': [], 'failed': [], 'error': [], 'skipped': []}
    for name, outcome in re.findall(r'::(\S.*?) (PASSED|FAILED|ERROR|SKIPPED)\b', text):
        found[outcome.lower()].append(name)
    collected = re.search(r'\bcollected (\d+) items?(?: / .* (\d+) selected)?', text)
    return {**found, 'selected': int(collected[2] or collected[1]) if collected else 0}


# What is made of it


def verdict(found: dict, dry: bool = False) -> tuple[str, list[str]]:
    """The line that sums up, and what does not hold."""
    tests, speeds, problems = found['tests'], found['speeds'], []
    wrong = tests['failed'] + tests['error']
    run = len(tests['passed']) + len(wrong)
    problems += wrong
    unfinished = tests['selected'] - run - len(tests['skipped'])
    if unfinished > 0 or tests['status'] not in (0, 1) or not tests['passed']:
        ending = 'the end of their time' if tests['status'] is None else f'exit status {tests["status"]}'
        problems.append(f'{max(unfinished, 0)} tests did not run ({ending})')
    words = [f'tests {len(tests["passed"])} of {run} passed' + (f' (failed: {", ".join(wrong)})' if wrong else '')]
    words += [f'{len(tests["skipped"])} skipped'] if tests['skipped'] else []

    words.append('demo failed' if found['demo'] is None else f'demo mAP {100 * found["demo"]:.1f}')
    if found['demo'] is None or (found['demo'] < LEAST_MAP and not dry):
        problems.append(f'demo mAP of at least {100 * LEAST_MAP:.0f}')

    problems += [f'speed in {what} could be measured' for what, speed in speeds.items() if speed is None]
    for kind in ('training', 'extraction'):
        known = {what: speed[kind] for what, speed in speeds.items() if speed and kind in speed}
        shown = [f'{value:.0f} {what}{ratio(value, known, what)}' for what, value in known.items()]
        words.append(f'{kind} {", ".join(shown)} images/s')
        for fast, slow in (('tf32', 'fp32'), ('bf16', 'fp32'), ('bf16 compiled', 'bf16')):
            applies = not dry and fast in known and slow in known and (found['device'].get('bf16') or fast == 'tf32')
            if applies and known[fast] < NOISE * known[slow]:
                problems.append(f'{kind} in {fast} as fast as in {slow}')
    peaks = [f'{speed["peak"]:.1f} {what}' for what, speed in speeds.items() if speed and 'peak' in speed]
    words += [f'peak memory {", ".join(peaks)} GB'] if peaks else []

    where = 'DRY RUN on the CPU' if dry else f'GPU {found["device"]["name"]}'
    end = f'does not hold: {"; ".join(problems)}' if problems else 'all holds'
    return f'{where}, torch {found["device"]["torch"]}: {", ".join(words)}: {end}', problems


def ratio(value: float, known: dict, what: str) -> str:
    return f' (x{value / known["fp32"]:.1f} fp32)' if 'fp32' in known and what != 'fp32' else ''


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--dry', action='store_true', help='on the CPU, at tiny size, as a test of this file')
    dry, began = parser.parse_args().dry, time.monotonic()
    missing = [package for name, package in NEEDED.items() if not importlib.util.find_spec(name)]
    if missing:
        sys.exit(f'nothing was measured: install {", ".join(missing)}')
    if dry:
        os.environ['CUDA_VISIBLE_DEVICES'] = ''
    found: dict = {'device': call('device', DEVICE_SECONDS) or {'torch': 'that could not be imported', 'name': ''}}
    if not dry and not found['device']['name']:
        sys.exit(f'nothing was measured: there is no CUDA device for torch {found["device"]["torch"]}')
    found['speeds'] = {}
    for what in ('fp32', 'bf16') if dry else SPEEDS:
        found['speeds'][what] = call('speed', 600 if dry else SPEEDS[what], what, dry)
        print(f'{what}: {found["speeds"][what]}', flush=True)
    found['demo'] = demo(600 if dry else DEMO_SECONDS, dry)
    found['tests'] = run_tests(600 if dry else TOTAL - (time.monotonic() - began), dry)
    line, problems = verdict(found, dry)
    print(f'{time.monotonic() - began:.0f} s\n{line}')
    sys.exit(1 if problems else 0)


if __name__ == '__main__':
    if not importlib.util.find_spec('tqdm'):
        paths = [str(HERE / 'instead'), *filter(None, [os.environ.get('PYTHONPATH')])]
        os.environ['PYTHONPATH'] = os.pathsep.join(paths)
    main()
