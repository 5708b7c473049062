"""Each script takes the steps that the original took: its `main` beside a textbook written from the papers' formulas.

`main` runs as from the shell, with its own defaults; only what comes before a batch (files, augmentation) and after the
last step (test, checkpoint) is replaced. So the losses and their weights, the optimizers with their learning rates and
the schedule are all held here.

Either side takes its three steps alone, and both must end at the same weights, to 1e-6, and statistics, to 1e-5. The
tiny network starts as a training does. ResNet50 continues as a resumed training does: with residual branches as calm as
trained ones, and with second moments that are not zero. Adam's first step is nearly the sign of the gradient, which
float32 leaves open where a gradient is of the size of its rounding error, and 53 BatchNorms over random weights make
millions of such differences in two more steps.
"""

import copy
import importlib
from types import SimpleNamespace

import pytest
import textbook
import torch
from torch import Tensor, nn

from runtime import device

NUM_PIDS = 6
EPOCHS = [2, 1]  # steps in each; the learning rate is halved in between
LR, WEIGHT_DECAY, LR_CENT, WEIGHT_CENT = 3e-4, 5e-4, 0.5, 5e-4  # the original's
SIZES = {'tiny': (32, 16), 'resnet50': (96, 48)}  # height, width
LOSSES = {
    'train_img_model_xent': 'xent',
    'train_img_model_xent_htri': 'htri',
    'train_img_model_cent': 'cent',
    'train_vid_model_xent': 'xent',
    'train_vid_model_xent_htri': 'htri',
    'train_img_model_strong': 'strong',
}
STRONG = '--warmup 2 --decays 1'  # half of --lr in the first epoch; all of it in the second, which the decay halves
TOLERANCE = 1e-6
OF_FEATURES = 1e-5  # of centers and running statistics, which are made of features, whose rounding depends on the CPU
BEFORE = {'tiny': 0, 'resnet50': 1000}  # steps of Adam that were taken before
SQUARE = 1e-2  # second moment that they left


class Fixed(list):
    """In place of the loader: the batches of each epoch."""

    def epoch(self, epoch, start):
        return iter(self[epoch])


class Record:
    """In place of the checkpoint: copies all weights, before the first step and after each."""

    start_batch = 0

    def __init__(self, dataset, options, run, model, optimizer, criterion_cent=None, **others):
        if before := BEFORE[options.arguments['arch']]:
            for name, param in model.named_parameters():
                moments = {'exp_avg': torch.zeros_like(param), 'exp_avg_sq': torch.full_like(param, SQUARE)}
                optimizer.state[param] = {'step': torch.tensor(float(before)), **moments}
                if name.endswith('bn3.weight'):  # the last one of a residual branch
                    param.data *= 0.1
        self.modules = nn.ModuleDict({'model': model})
        if criterion_cent is not None:
            self.modules['cent'] = criterion_cent
        self.snapshots = [copy.deepcopy(self.modules)]

    def epochs(self, max_epoch):
        return range(max_epoch)

    def after_step(self, epoch, meter):
        self.snapshots.append(copy.deepcopy(self.modules))

    def last_test(self, test, meter):
        pass


def fixed_batches(arch: str) -> list[list[tuple[Tensor, Tensor, None]]]:
    """Per epoch its batches: images (8, 3, H, W), pids (8,) of 2 identities with 4 images each, no draws."""
    generator = torch.Generator().manual_seed(5)
    epochs = []
    for steps in EPOCHS:
        epochs.append([])
        for _ in range(steps):
            pids = torch.randperm(NUM_PIDS, generator=generator)[:2].repeat_interleave(4)
            images = torch.randn(8, 3, *SIZES[arch], generator=generator) + pids.view(-1, 1, 1, 1) / NUM_PIDS
            epochs[-1].append((images.contiguous(memory_format=torch.channels_last), pids, None))
    return epochs


def run_script(name: str, arch: str, epochs: list, save_dir, monkeypatch) -> tuple[list[nn.ModuleDict], list[Tensor]]:
    """`main` over the fixed batches: its model and centers before each step and after the last; its losses."""
    module = importlib.import_module(name)
    train = [((f'{i}.jpg',) if '_vid_' in name else f'{i}.jpg', i // 4, i % 2) for i in range(4 * NUM_PIDS)]
    dataset = SimpleNamespace(train=train, num_train_pids=NUM_PIDS, groups=lambda balance: None)
    records, losses = [], []

    def record(*args, **parts):
        records.append(Record(*args, **parts))
        return records[-1]

    update = module.LossMeter.update
    monkeypatch.setattr(module.LossMeter, 'update', lambda *a, **all: losses.append(all['loss']) or update(*a, **all))
    monkeypatch.setattr(module.data_manager, 'init_dataset', lambda *_, **__: dataset)
    monkeypatch.setattr(module, 'TrainLoader', lambda *_: Fixed(epochs))
    monkeypatch.setattr(module, 'TrainTransform', lambda *_: lambda images, draws: images)
    monkeypatch.setattr(module, 'Test', lambda *_: SimpleNamespace(is_due=lambda epoch: False))
    monkeypatch.setattr(module, 'Checkpoint', record)
    height, width = SIZES[arch]
    options = f'--use-cpu --precision fp32 --pretrained none -a {arch} --height {height} --width {width}'
    options += f' --train-batch 8 --max-epoch {len(EPOCHS)} --lr {LR} --gamma 0.5 --save-dir {save_dir} '
    options += STRONG if LOSSES[name] == 'strong' else '--stepsize 1'
    args = module.parser.parse_args(options.split())
    module.main(args, device.start(args.run))
    return records[0].snapshots, losses


def objective_and_gradients(loss: str, modules: nn.ModuleDict, images: Tensor, pids: Tensor):
    """The objective, its gradients by the model's parameters, and that of the unweighted center loss by the centers."""
    model = modules['model'].train()
    logits, features = (model(images), None) if loss == 'xent' else model(images)
    objective, centers_grad = textbook.cross_entropy_label_smooth(logits.double(), pids, epsilon=0.1), None
    if loss in ('htri', 'strong'):
        htri, active = textbook.triplet(features.double(), pids, margin=0.3)
        assert active > 0  # else the triplets are not held
        objective = objective + htri
    if loss in ('cent', 'strong'):
        cent = textbook.center(features.double(), modules['cent'].centers.double(), pids)
        (centers_grad,) = torch.autograd.grad(cent, modules['cent'].centers, retain_graph=True)
        objective = objective + WEIGHT_CENT * cent
    return objective, torch.autograd.grad(objective, trained(model)), centers_grad


def trained(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that are trained: all but the shift of a neck."""
    return [param for name, param in model.named_parameters() if name != 'bottleneck.bias']


class Adam:
    """Kingma & Ba, arXiv:1412.6980, algorithm 1, the gradient with that of an L2 penalty."""

    def __init__(self, params: list[Tensor], before: int):
        self.t = before
        square = SQUARE if before else 0.0
        self.moments = [(torch.zeros_like(param), torch.full_like(param, square)) for param in params]

    def step(self, params: list[Tensor], grads: tuple[Tensor, ...], lr: float) -> None:
        self.t += 1
        for param, grad, (m, v) in zip(params, grads, self.moments, strict=True):
            grad = grad + WEIGHT_DECAY * param
            m.copy_(0.9 * m + (1 - 0.9) * grad)
            v.copy_(0.999 * v + (1 - 0.999) * grad**2)
            param -= lr * (m / (1 - 0.9**self.t)) / ((v / (1 - 0.999**self.t)).sqrt() + 1e-8)


@pytest.mark.parametrize(
    ('script', 'arch'),
    [  # With last stride 1 the triplets of random images satisfy the margin in ResNet50, so they would not be held.
        *((script, 'tiny') for script in LOSSES),
        *((script, 'resnet50') for script in LOSSES if '_img_' in script and LOSSES[script] != 'strong'),
    ],
)
def test_three_steps_are_the_textbook_s(script, arch, tmp_path, monkeypatch):
    torch.set_num_threads(1)  # two wait for each other when the machine is busy, and cost ten times as much
    epochs = fixed_batches(arch)
    snapshots, losses = run_script(script, arch, epochs, tmp_path, monkeypatch)
    rates = [0.5, 0.5] if LOSSES[script] == 'strong' else [1, 0.5]  # of LR, in each epoch
    steps = [(images, pids, LR * rates[epoch]) for epoch, batches in enumerate(epochs) for images, pids, _ in batches]
    assert len(snapshots) == len(steps) + 1 and len(losses) == len(steps)

    modules = copy.deepcopy(snapshots[0])
    params = trained(modules['model'])
    adam = Adam(params, BEFORE[arch])
    for (images, pids, lr), after, loss in zip(steps, snapshots[1:], losses, strict=True):
        objective, grads, centers_grad = objective_and_gradients(LOSSES[script], modules, images, pids)
        torch.testing.assert_close(loss.double(), objective, rtol=TOLERANCE, atol=TOLERANCE)
        with torch.no_grad():
            adam.step(params, grads, lr)
            if centers_grad is not None:
                modules['cent'].centers -= LR_CENT * centers_grad
                torch.testing.assert_close(after['cent'].centers, modules['cent'].centers, rtol=0, atol=OF_FEATURES)

        for param, expected in zip(trained(after['model']), params, strict=True):
            torch.testing.assert_close(param, expected, rtol=0, atol=TOLERANCE)
        for buffer, expected in zip(after['model'].buffers(), modules['model'].buffers(), strict=True):
            torch.testing.assert_close(buffer, expected, rtol=OF_FEATURES, atol=OF_FEATURES)
    first = trained(snapshots[0]['model'])
    moved = sum((a - b).abs().gt(TOLERANCE).sum() for a, b in zip(params, first, strict=True))
    assert moved > 0.01 * sum(param.numel() for param in params)  # else nothing is held
