"""A network of a thousand parameters for tests, and a way to run a script with it in a process of its own.

python tests/tiny.py train_img_model_xent.py -a tiny ...
"""

import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from torch import nn  # noqa: E402

import models  # noqa: E402
from models.network import Network  # noqa: E402


class Tiny(Network):
    """Two strided convolutions with BatchNorm; features (B, 16)."""

    feat_dim = 16

    def __init__(self, num_classes, loss=frozenset({'xent'})):
        super().__init__(num_classes, loss)
        self.base = nn.Sequential(
            nn.Conv2d(3, 8, 5, stride=4, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 16, 3, stride=2, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(),
        )
        self.classifier = nn.Linear(self.feat_dim, num_classes)

    def features(self, x):
        return self.base(x).mean((2, 3))  # (B, 16)


models.factory['tiny'] = Tiny

if __name__ == '__main__':
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name='__main__')
