"""The strong recipe at full length: its mAP and Rank-1 on Market1501 beside those of its paper.

    python benchmarks/strong.py [options of train_img_model_strong.py]

trains ResNet50 at 256x128 for 120 epochs, as the paper did (Luo et al., CVPRW 2019, arXiv:1903.07071). That takes hours
and needs a GPU. Options given here replace those of COMMAND. Repeat the command to continue an interrupted run.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[1] / 'train_img_model_strong.py'
COMMAND = '-d market1501 -a resnet50 --height 256 --width 128 --max-epoch 120 --eval-step 20 --auto-resume'
PAPER = {'mAP': 0.859, 'Rank-1': 0.945}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--save-dir', default='log/strong')
    parser.add_argument('--use-cpu', action='store_true')
    args, options = parser.parse_known_args()
    if args.use_cpu:
        options.append('--use-cpu')
    else:
        import torch  # slow, and not needed for -h

        if not torch.cuda.is_available():
            print('Not measured: there is no GPU. To try a short run on the CPU, add --use-cpu', file=sys.stderr)
            return 2
    ran = subprocess.run([sys.executable, SCRIPT, *COMMAND.split(), '--save-dir', args.save_dir, *options])
    if ran.returncode:
        return ran.returncode
    results = json.loads((Path(args.save_dir) / 'results.json').read_text(encoding='utf-8'))
    print(f'{"%":8}{"here":>6}{"paper":>7}')
    for name, value in (('mAP', results['mAP']), ('Rank-1', results['cmc'][0])):
        print(f'{name:8}{100 * value:6.1f}{100 * PAPER[name]:7.1f}')
    size = f'{results["height"]}x{results["width"]}'
    print(f'Here: {results["arch"]}, {results["dataset"]} at {size}, on {results["device"]}, {results["precision"]}')
    print('Paper: resnet50, market1501 at 256x128')
    return 0


if __name__ == '__main__':
    sys.exit(main())
