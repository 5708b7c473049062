import csv
import errno
import re

import pytest
import torch

import utils
from arguments import ShowOptions
from page import runs
from runtime.errors import UserError
from runtime.meters import LossMeter


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


@pytest.fixture
def meter(tmp_path, run):
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.5)

    def make(print_freq, **changes):
        options = ShowOptions(print_freq=print_freq, save_dir=str(tmp_path), train_batch=8, max_epoch=3, **changes)
        return LossMeter(options, run, optimizer)

    return make


def test_the_lines_of_the_original(capsys, meter):
    two = meter(2)
    watch(two, [1.0, 2.0, 3.0, 4.0, 5.0])
    assert capsys.readouterr().out == ('Batch 2/5\t Loss 2.000000 (1.500000)\nBatch 4/5\t Loss 4.000000 (2.500000)\n')
    assert two.means['loss'].avg == 3.0  # the rest of the epoch is counted too
    watch(two, [7.0, 9.0])  # an epoch begins afresh
    assert capsys.readouterr().out == 'Batch 2/2\t Loss 9.000000 (8.000000)\n'


def test_an_epoch_that_continues(capsys, meter):
    watch(meter(2), [1.0, 2.0, 3.0, 4.0, 5.0], start=3)
    assert capsys.readouterr().out == 'Batch 4/5\t Loss 4.000000 (4.000000)\n'


def test_further_losses_by_name(capsys, meter):
    watch(meter(1), [1.0], htri=torch.tensor(0.25), active=torch.tensor(0.5))
    assert (
        capsys.readouterr().out
        == 'Batch 1/1\t Loss 1.000000 (1.000000)\t htri 0.2500 (0.2500)\t active 0.5000 (0.5000)\n'
    )


def test_the_step_of_a_test_in_a_process_that_trained_nothing(meter, monkeypatch):
    """It follows from the batches of metrics.csv; the row is found again."""
    watch(meter(2), [1.0, 2.0, 3.0, 4.0, 5.0])
    steps, add, figures = [], LossMeter._record, {'rank1': 1 / 3, 'mAP': 0.25}
    monkeypatch.setattr(LossMeter, '_record', lambda *args: steps.append(args[2]) or add(*args))
    again = meter(2)
    assert not again.has_test(1, figures)
    again.tested(1, figures)
    assert steps == [10] and again.has_test(1, figures)
    assert not again.has_test(0, figures) and not again.has_test(1, figures | {'mAP': 0.5})


@pytest.mark.parametrize('bad', [float('nan'), float('inf')])
@pytest.mark.parametrize('print_freq', [1, 2, 100])
def test_a_loss_that_is_not_finite_ends_the_run(bad, print_freq, meter):
    with pytest.raises(UserError, match=r'not finite in epoch 3, batch 3/4 .*: 2-2\.jpg, other\.jpg'):
        watch(meter(print_freq), [1.0, 1.0, bad, 1.0], epoch=2)


def test_collapse_is_reported_once_when_it_lasts_an_epoch(capsys, meter):
    shown = meter(1)
    for value in (0.0, 1.0, 1.0):
        watch(shown, [0.3, 0.3], collapsed=torch.tensor(value))
    out = capsys.readouterr().out
    assert out.count('Collapse: ') == 1 and 'collapsed' not in out
    sometimes = meter(1)
    for loss, value in ((0.3, 1.0), (0.3, 0.0)):
        watch(sometimes, [loss], collapsed=torch.tensor(value))
    assert capsys.readouterr().out.count('Collapse: ') == 1  # the first of these two epochs
    resumed = meter(1)
    watch(resumed, [0.3, 0.3], start=1, collapsed=torch.tensor(1.0))  # the rest of an epoch does not count
    assert 'Collapse' not in capsys.readouterr().out


def rows(folder):
    with open(folder / 'metrics.csv', newline='') as file:
        return list(csv.DictReader(file))


FIGURES = {'mAP': 0.5, 'mINP': 0.25, 'rank1': 0.75, 'rank5': 1.0, 'rank10': 1.0}


def test_metrics_csv(meter, tmp_path, capsys):
    first = meter(2)
    for loss in first.watch(Losses(1.0, 2.0, 6.0), 0):
        first.update(loss=torch.tensor(loss), htri=torch.tensor(0.5), collapsed=torch.tensor(0.0))
        if loss == 6.0:
            first.record()  # as the checkpoint does before it saves
    first.tested(0, FIGURES)
    found = rows(tmp_path)
    assert list(found[0]) == ['epoch', 'batch', 'lr', 'images_per_s', 'data_wait', 'loss', 'htri', *FIGURES]
    assert [(row['epoch'], row['batch'], row['loss'], row['mAP']) for row in found] == [
        ('1', '2', '1.5', ''), ('1', '3', '6', ''), ('1', '', '', '0.5'),
    ]  # fmt: skip
    assert [row['lr'] for row in found] == ['0.5', '0.5', '']
    assert all(float(row['images_per_s']) > 0 and 0 <= float(row['data_wait']) <= 1 for row in found[:2])
    watch(meter(1), [1.0, 2.0], epoch=1, start=1, htri=torch.tensor(0.5))  # a run that continues
    assert [row['batch'] for row in rows(tmp_path)] == ['2', '3', '', '2']
    late = meter(1)  # a run that continues with the test of an epoch
    watch(late, [1.0, 2.0], epoch=1, start=2)
    late.tested(1, FIGURES)
    assert rows(tmp_path)[-1] == {
        **dict.fromkeys(found[0], ''),
        'epoch': '2',
        **{k: f'{v:g}' for k, v in FIGURES.items()},
    }


@pytest.mark.parametrize('left', [1, 7, 14])
def test_a_row_that_was_written_in_part_does_not_damage_the_next_one(left, meter, tmp_path):
    """As a full disk or a power cut leaves it; `left` bytes of the last row are missing."""
    path = tmp_path / 'metrics.csv'
    watch(meter(1), [1.0, 2.0])
    path.write_bytes(path.read_bytes()[:-left])
    assert [row[0] for row in runs._read_metrics(path)[0].values()][:2] == [1, 1]
    assert len(runs._read_metrics(path)[0]['epoch']) == 1
    assert not meter(1).has_test(0, {'loss': 2.0})
    watch(meter(1), [3.0], epoch=1)
    assert [(row['epoch'], row['loss'], row['rank1']) for row in rows(tmp_path)] == [('1', '1', ''), ('2', '3', '')]
    path.write_text('epoch,bat')  # the names of the columns
    assert runs._read_metrics(path) == ({}, [])
    watch(meter(1), [4.0])
    assert [row['loss'] for row in rows(tmp_path)] == ['4']


@pytest.mark.parametrize('content', ['\ufeffepoch,batch\n1,10\n'.encode('utf-16'), b'epoch,batch\n"1\x00,1\n'])
def test_a_table_that_another_program_changed_ends_no_run(content, meter, run, tmp_path, capsys):
    (tmp_path / 'metrics.csv').write_bytes(content)
    watch(meter(1), [1.0, 2.0])
    if run.unwritten:
        assert f'error: {tmp_path}/metrics.csv: it is not the table of a run' in capsys.readouterr().out
        assert (tmp_path / 'metrics.csv').read_bytes() == content
    assert run.unwritten or content.startswith(b'epoch')


def test_a_full_disk_for_tensorboard_ends_no_run(meter, run, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(errno.EDQUOT, 'Disk quota exceeded')

    monkeypatch.setattr('torch.utils.tensorboard.SummaryWriter', fail)
    watch(meter(1, tensorboard=True), [1.0])
    assert run.unwritten == [f'{tmp_path}: Disk quota exceeded']


def test_a_signal_before_the_first_batch_ends_the_run_at_once(meter, run):
    """The loader may still decode all images for --cache; from the first batch on, steps are finished first."""
    held = []

    class Slow(Losses):
        def epoch(self, epoch, start):
            for loss in self.losses:
                held.append(run.signals.held)
                yield loss

    loop = meter(1)
    for _ in loop.watch(Slow(1.0, 2.0), 0):
        held.append(run.signals.held)
        loop.update(loss=torch.tensor(1.0))
    assert held == [False, True, True, True]


def test_metrics_csv_has_the_losses_and_tests_that_come_later(meter, tmp_path):
    """A run that is resumed at a test into a new folder, and then trains another script's losses."""
    meter(1).tested(0, FIGURES | {'other/rank1': 0.5})
    watch(meter(1), [1.0], epoch=1, htri=torch.tensor(0.25))
    watch(meter(1), [2.0], epoch=2, cent=torch.tensor(8.0))
    found = rows(tmp_path)
    training = ['epoch', 'batch', 'lr', 'images_per_s', 'data_wait']
    assert list(found[0]) == [*training, 'loss', 'htri', 'cent', *FIGURES, 'other/rank1']
    assert [[row[name] for name in ('epoch', 'loss', 'htri', 'cent', 'rank1', 'other/rank1')] for row in found] == [
        ['1', '', '', '', '0.75', '0.5'], ['2', '1', '0.25', '', '', ''], ['3', '2', '', '8', '', ''],
    ]  # fmt: skip


def test_tensorboard_reads_what_is_written(meter, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = meter(1, tensorboard=True)
    watch(board, [1.0, 2.0], htri=torch.tensor(0.5), active=torch.tensor(0.25))
    board.tested(0, FIGURES)
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(event.step, event.value) for event in events.Scalars('train/loss')] == [(1, 1.0), (2, 2.0)]
    assert [event.value for event in events.Scalars('train/active')] == [0.25, 0.25]
    assert {name: events.Scalars(f'test/{name}')[0].value for name in FIGURES} == FIGURES
    assert {f'train/{name}' for name in ('loss', 'htri', 'active', 'lr', 'images_per_s', 'data_wait')} | {
        f'test/{name}' for name in FIGURES
    } == set(events.Tags()['scalars'])


def test_a_bar_on_terminals_and_lines_elsewhere(meter, run, tmp_path, monkeypatch, capfd):
    """On a terminal the lines go to the log alone; with --quiet neither they nor the bar are shown."""
    monkeypatch.setattr(utils.Logger, 'isatty', lambda self: True)
    for quiet in (False, True):
        log = tmp_path / f'{quiet}.txt'
        with utils.Logger(log) as run.log:
            watch(meter(1, quiet=quiet), [1.0, 2.0])
        found = capfd.readouterr()
        assert 'Batch' not in found.out
        assert ('loss=2.000' in found.err) == ('Epoch 1/3' in found.err) == (not quiet)
        assert quiet or re.search(r'2/2 \|.*\| \d+:\d\d, left=00:00, img/s=\d+, wait=\d+%, loss=2.000', found.err)
        assert log.read_text() == 'Batch 1/2\t Loss 1.000000 (1.000000)\nBatch 2/2\t Loss 2.000000 (1.500000)\n'
