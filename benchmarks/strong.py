"""The strong recipe at full length: its mAP and Rank-1 on Market1501 beside those of its paper.

    python benchmarks/strong.py [options of train_img_model_strong.py]

trains ResNet50 at 256x128 for 120 epochs, as the paper did (Luo et al., CVPRW 2019, arXiv:1903.07071) and as the script
does by default. That takes hours and needs a GPU. Repeat the command to continue an interrupted run.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[1] / 'train_img_model_strong.py'
PAPER = {'mAP': 0.859, 'Rank-1': 0.945}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--save-dir', default='log/strong', type=os.path.expanduser)
    parser.add_argument('--use-cpu', action='store_true')
    args, options = parser.parse_known_args()
    if args.use_cpu:
        options.append('--use-cpu')
    else:
        import torch  # slow, and not needed for -h

        if not torch.cuda.is_available():
            print('Not measured: there is no GPU. To try a short run on the CPU, add --use-cpu', file=sys.stderr)
            return 2
    command = [sys.executable, str(SCRIPT), '--eval-step', '20', '--auto-resume']
    training = subprocess.Popen([*command, '--save-dir', args.save_dir, *options])
    signal.signal(signal.SIGINT, lambda *_: None)  # the terminal sends it to the training too, which saves and ends
    signal.signal(signal.SIGTERM, lambda number, _: training.send_signal(number))
    if status := training.wait():
        return status if status > 0 else 128 - status
    path = Path(args.save_dir) / 'results.json'
    if not path.exists():
        print(f'Not measured: there is no {path}, as nothing was tested', file=sys.stderr)
        return 2
    results = json.loads(path.read_text(encoding='utf-8'))
    print(f'{"%":8}{"here":>6}{"paper":>7}')
    for name, value in (('mAP', results['mAP']), ('Rank-1', results['cmc'][0])):
        print(f'{name:8}{100 * value:6.1f}{100 * PAPER[name]:7.1f}')
    size = f'{results["height"]}x{results["width"]}'
    print(f'Here: {results["arch"]}, {results["dataset"]} at {size}, on {results["device"]}, {results["precision"]}')
    print('Paper: resnet50, market1501 at 256x128')
    return 0


if __name__ == '__main__':
    sys.exit(main())
