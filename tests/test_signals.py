import os
import signal
import sys
from pathlib import Path

import pytest

from runtime.processes import Processes
from runtime.signals import STOPS, Signals, Stopped


@pytest.mark.parametrize(
    ('processes', 'command'),
    [
        (Processes(), 'Continue with:\npython train.py --auto-resume'),
        (Processes(world_size=2, local_world_size=2, started=True), 'Continue with:\npython train.py --auto-resume'),
        (
            Processes(world_size=4, local_world_size=4, started=True, by_torchrun=True),
            'Continue with:\ntorchrun --standalone --nproc-per-node 4 train.py --auto-resume',
        ),
        (Processes(hosts=2, by_torchrun=True), 'Continue with the same command and --auto-resume on each host'),
    ],
)
@pytest.mark.parametrize('option', ['--overwrite', '--over', '--auto-resume', '--auto'])
def test_how_to_continue(processes, command, option, monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['train.py', option])
    stopped = Signals(processes).stop(signal.SIGTERM, Path('x'))
    assert str(stopped) == f'Stopped by SIGTERM after saving x. {command}' and stopped.together
    assert str(Signals(processes).stop(signal.SIGINT, None)) == 'Stopped by SIGINT'


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_at_once_or_when_the_run_is_ready(number):
    ours = Signals(Processes())
    with ours.handled(), pytest.raises(Stopped) as stopped:
        signal.raise_signal(number)
    assert stopped.value.signal == number and not stopped.value.together
    ours = Signals(Processes())
    with ours.handled():
        ours.hold()
        signal.raise_signal(number)
        assert ours.waiting == number
        with pytest.raises(Stopped):
            ours.release()


def test_a_second_sigint_does_not_wait():
    ours = Signals(Processes())
    with ours.handled():
        ours.hold()
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(Stopped, match='SIGINT'):
            signal.raise_signal(signal.SIGINT)


def test_a_sigint_that_a_launcher_forwards_is_no_second_one():
    """However late it does."""
    ours = Signals(Processes(started=True))
    with ours.handled():
        ours.hold()
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        assert ours.waiting == signal.SIGINT
        with pytest.raises(Stopped):
            signal.raise_signal(signal.SIGINT)


def test_a_run_on_its_way_out_is_not_stopped_again(monkeypatch):
    """But for a second SIGINT, which ends even that."""
    ends = []
    monkeypatch.setattr(os, '_exit', ends.append)
    ours = Signals(Processes())
    with ours.handled():
        with pytest.raises(Stopped):
            signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        assert not ends
        signal.raise_signal(signal.SIGINT)
    assert ends == [130]


def test_a_hangup_that_is_ignored_stays_ignored():
    """As under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        ours = Signals(Processes())
        with ours.handled():
            signal.raise_signal(signal.SIGHUP)
            assert not ours.received
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_the_handlers_are_put_back():
    before = [signal.getsignal(number) for number in STOPS]
    with Signals(Processes()).handled():
        assert all(signal.getsignal(number) != handler for number, handler in zip(STOPS, before, strict=True))
    assert [signal.getsignal(number) for number in STOPS] == before
