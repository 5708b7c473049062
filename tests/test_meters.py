from types import SimpleNamespace

import pytest
import torch

from errors import UserError
from meters import LossMeter


class Losses:
    """In place of a loader: batches that are losses."""

    def __init__(self, *losses):
        self.losses = losses

    def __len__(self):
        return len(self.losses)

    def epoch(self, epoch, start):
        return iter(self.losses[start:])

    def paths(self, epoch, batch):
        return [f'{epoch}-{batch}.jpg', 'other.jpg']


def watch(meter, losses, epoch=0, start=0, **extra):
    for loss in meter.watch(Losses(*losses), epoch, start):
        meter.update(loss=torch.tensor(loss), **extra)


def meter(print_freq):
    return LossMeter(SimpleNamespace(print_freq=print_freq))


def test_the_lines_of_the_original(capsys):
    two = meter(2)
    watch(two, [1.0, 2.0, 3.0, 4.0, 5.0])
    assert capsys.readouterr().out == ('Batch 2/5\t Loss 2.000000 (1.500000)\nBatch 4/5\t Loss 4.000000 (2.500000)\n')
    assert two.means['loss'].avg == 3.0  # the rest of the epoch is counted too
    watch(two, [7.0, 9.0])  # an epoch begins afresh
    assert capsys.readouterr().out == 'Batch 2/2\t Loss 9.000000 (8.000000)\n'


def test_an_epoch_that_goes_on(capsys):
    watch(meter(2), [1.0, 2.0, 3.0, 4.0, 5.0], start=3)
    assert capsys.readouterr().out == 'Batch 4/5\t Loss 4.000000 (4.000000)\n'


def test_further_losses_by_name(capsys):
    watch(meter(1), [1.0], htri=torch.tensor(0.25), active=torch.tensor(0.5))
    assert (
        capsys.readouterr().out
        == 'Batch 1/1\t Loss 1.000000 (1.000000)\t htri 0.2500 (0.2500)\t active 0.5000 (0.5000)\n'
    )


@pytest.mark.parametrize('bad', [float('nan'), float('inf')])
@pytest.mark.parametrize('print_freq', [1, 2, 100])
def test_a_loss_that_is_not_finite_ends_the_run(bad, print_freq):
    with pytest.raises(UserError, match=r'not finite in epoch 3, batch 3/4 .*: 2-2\.jpg, other\.jpg'):
        watch(meter(print_freq), [1.0, 1.0, bad, 1.0], epoch=2)


def test_collapse_is_told_once_when_it_lasts_an_epoch(capsys):
    shown = meter(1)
    for value in (0.0, 1.0, 1.0):
        watch(shown, [0.3, 0.3], collapsed=torch.tensor(value))
    out = capsys.readouterr().out
    assert out.count('Collapse: ') == 1 and 'collapsed' not in out
    sometimes = meter(1)
    for loss, value in ((0.3, 1.0), (0.3, 0.0)):
        watch(sometimes, [loss], collapsed=torch.tensor(value))
    assert capsys.readouterr().out.count('Collapse: ') == 1  # the first of these two epochs
