import sys

import pytest
import torch

import utils


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


def test_save_checkpoint_copies_the_best(tmp_path):
    for value, is_best in ((1, True), (2, False)):
        utils.save_checkpoint({'epoch': value}, is_best, tmp_path / f'checkpoint_ep{value}.pth.tar')
    assert torch.load(tmp_path / 'best_model.pth.tar', weights_only=True) == {'epoch': 1}
    assert torch.load(tmp_path / 'checkpoint_ep2.pth.tar', weights_only=True) == {'epoch': 2}
    assert len(list(tmp_path.iterdir())) == 3
