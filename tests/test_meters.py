from types import SimpleNamespace

import pytest
import torch

from errors import UserError
from meters import LossMeter


def watch(meter, losses, epoch=0, **extra):
    for loss in meter.watch(losses, epoch):
        meter.update(loss=torch.tensor(loss), **extra)


def test_the_lines_of_the_original(capsys):
    meter = LossMeter(SimpleNamespace(print_freq=2), num_batches=5)
    watch(meter, [1.0, 2.0, 3.0, 4.0, 5.0])
    assert capsys.readouterr().out == ('Batch 2/5\t Loss 2.000000 (1.500000)\nBatch 4/5\t Loss 4.000000 (2.500000)\n')
    assert meter.means['loss'].avg == 3.0  # the rest of the epoch is counted too
    watch(meter, [7.0, 9.0])  # an epoch begins afresh
    assert capsys.readouterr().out == 'Batch 2/5\t Loss 9.000000 (8.000000)\n'


def test_further_losses_by_name(capsys):
    meter = LossMeter(SimpleNamespace(print_freq=1), num_batches=1)
    watch(meter, [1.0], htri=torch.tensor(0.25), active=torch.tensor(0.5))
    assert (
        capsys.readouterr().out
        == 'Batch 1/1\t Loss 1.000000 (1.000000)\t htri 0.2500 (0.2500)\t active 0.5000 (0.5000)\n'
    )


@pytest.mark.parametrize('bad', [float('nan'), float('inf')])
@pytest.mark.parametrize('print_freq', [1, 2, 100])
def test_a_loss_that_is_not_finite_ends_the_run(bad, print_freq):
    meter = LossMeter(SimpleNamespace(print_freq=print_freq), num_batches=4)
    with pytest.raises(UserError, match='not finite in epoch 3, batch 3/4'):
        watch(meter, [1.0, 1.0, bad, 1.0], epoch=2)
