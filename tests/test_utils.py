import errno
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import utils
from files.writing import Unwritten


def test_average_meter_weighs_by_count():
    meter = utils.AverageMeter()
    meter.update(1.0)
    meter.update(4.0, n=2)
    assert (meter.val, meter.avg, meter.sum, meter.count) == (4.0, 3.0, 9.0, 3)
    meter.reset()
    assert (meter.val, meter.avg, meter.count) == (0.0, 0.0, 0)


def test_logger_writes_to_both_and_appends(tmp_path, capsys):
    path = tmp_path / 'deep' / 'log.txt'
    for text in ('first', 'second'):
        with utils.Logger(path):
            print(text)
            sys.stdout.flush()
            assert not sys.stdout.isatty()
    assert path.read_text() == 'first\nsecond\n' == capsys.readouterr().out


def test_json_round_trip(tmp_path):
    utils.write_json({'mAP': 0.5, 'cmc': [1, 2]}, tmp_path / 'a' / 'results.json')
    assert utils.read_json(tmp_path / 'a' / 'results.json') == {'mAP': 0.5, 'cmc': [1, 2]}


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / 'file'
    path.write_text('old')

    def fail(temporary):
        temporary.write_text('half of the n')
        raise OSError('disk full')

    with pytest.raises(OSError, match='disk full'):
        utils.write_whole(path, fail)
    assert path.read_text() == 'old'
    assert list(tmp_path.iterdir()) == [path]


def save(value, is_best, path):
    utils.save_checkpoint({'epoch': value}, is_best, path)


def epoch_of(path):
    return torch.load(path, weights_only=True)['epoch']


def refuse(*_):
    raise OSError(errno.EPERM, 'Operation not permitted')


@pytest.mark.parametrize('links', [True, False])
def test_save_checkpoint_links_or_copies_the_best(links, tmp_path, monkeypatch):
    if not links:
        monkeypatch.setattr(os, 'link', refuse)
    one, two, best = (tmp_path / f'{name}.pth.tar' for name in ('checkpoint_ep1', 'checkpoint_ep2', 'best_model'))
    save(1, np.float64(0.5) > 0, one)  # as the original's scripts compare
    save(2, False, two)
    assert [epoch_of(path) for path in (one, two, best)] == [1, 2, 1]
    assert len(list(tmp_path.iterdir())) == 3
    assert best.samefile(one) == links
    save(3, False, one)  # neither a later write nor a deletion of the checkpoint changes the best
    assert (epoch_of(one), epoch_of(best)) == (3, 1)
    one.unlink()
    assert epoch_of(best) == 1
    save(4, True, two)
    assert epoch_of(best) == epoch_of(two) == 4


@pytest.mark.parametrize('links', [True, False])
def test_what_a_killed_save_left_is_not_written_into(links, tmp_path, monkeypatch):
    """Its temporary best is a link to a checkpoint, and a container gives the next process the same number."""
    old = tmp_path / 'checkpoint_ep1.pth.tar'
    save(1, False, old)
    for name in ('best_model', 'checkpoint_ep2'):
        (tmp_path / f'.{name}.pth.tar.{os.getpid()}').hardlink_to(old)
    if not links:
        monkeypatch.setattr(os, 'link', refuse)
    save(2, True, tmp_path / 'checkpoint_ep2.pth.tar')
    assert [epoch_of(path) for path in sorted(tmp_path.iterdir())] == [2, 1, 2]


def test_a_copy_that_does_not_fit_on_the_disk_replaces_nothing(tmp_path, monkeypatch):
    def fill(source, target):
        Path(target).write_bytes(b'half')
        raise OSError(errno.ENOSPC, 'No space left on device')

    save(1, True, tmp_path / 'checkpoint_ep1.pth.tar')
    monkeypatch.setattr(os, 'link', refuse)
    monkeypatch.setattr(shutil, 'copyfile', fill)
    with pytest.raises(OSError, match='No space left'):
        save(2, True, tmp_path / 'checkpoint_ep2.pth.tar')
    assert [(path.name, epoch_of(path)) for path in sorted(tmp_path.iterdir())] == [
        ('best_model.pth.tar', 1),
        ('checkpoint_ep1.pth.tar', 1),
    ]


def test_a_best_that_cannot_be_replaced_is_reported_under_its_name(tmp_path, capsys):
    (tmp_path / 'best_model.pth.tar').mkdir()
    unwritten = Unwritten()
    with unwritten.excuse(tmp_path / 'checkpoint_ep1.pth.tar'):
        save(1, True, tmp_path / 'checkpoint_ep1.pth.tar')
    assert unwritten == [f'{tmp_path}/best_model.pth.tar: Is a directory']
    assert epoch_of(tmp_path / 'checkpoint_ep1.pth.tar') == 1
    assert len(list(tmp_path.iterdir())) == 2
