"""Whether bfloat16 learns as well as float32: mAP of the demo in both, over three seeds. Rows of `table.py`."""

import json
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import mean

from table import Row

ROOT = Path(__file__).resolve().parents[1]
SEEDS = (1, 2, 3)


def command() -> list[str]:
    """The command of `make demo`, without its Python."""
    makefile = (ROOT / 'Makefile').read_text(encoding='utf-8')
    found = re.search(r'(train_img_model_xent\.py(?:.*\\\n)*.*)', makefile)
    assert found, 'the Makefile has no command of the demo'
    return shlex.split(found[1].replace('\\\n', ' '))


def demo(*options: str) -> dict:
    """results.json after the command of `make demo` with additional options."""
    with tempfile.TemporaryDirectory() as folder:
        there = ['--save-dir', folder, '--data-dir', f'{folder}/data']
        subprocess.run([sys.executable, *command(), *options, *there], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        results: dict = json.loads((Path(folder) / 'results.json').read_text(encoding='utf-8'))
        return results


def rows(full: bool) -> list[Row]:
    if not full:
        return [Row('mAP of the demo in bf16 and fp32: measured with BENCH=full')]
    found = {
        precision: [100 * demo('--precision', precision, '--seed', str(seed))['mAP'] for seed in SEEDS]
        for precision in ('bf16', 'fp32')
    }
    ours, plain = mean(found['bf16']), mean(found['fp32'])
    seeds = '; '.join(f'{name} {", ".join(f"{value:.1f}" for value in values)}' for name, values in found.items())
    met = abs(ours - plain) <= 2
    return [Row(f'mAP of the demo in bf16, plain: fp32 ({seeds})', '%', ours, plain, target='within 2 points', met=met)]
