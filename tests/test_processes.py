import os

import pytest
import torch.distributed as dist

from runtime import processes
from runtime.errors import UserError
from runtime.processes import RUN_ID, Group, Processes, of_environment

TORCHRUN = {
    'RANK': '3', 'WORLD_SIZE': '4', 'LOCAL_RANK': '1', 'LOCAL_WORLD_SIZE': '2', 'MASTER_ADDR': 'localhost',
    'MASTER_PORT': '29500', 'GROUP_WORLD_SIZE': '2', 'TORCHELASTIC_RUN_ID': 'job', 'TORCHELASTIC_RESTART_COUNT': '1',
    'TORCHELASTIC_MAX_RESTARTS': '5',
}  # fmt: skip


@pytest.fixture
def environ(monkeypatch):
    """Set torchrun's variables, or with None remove them."""
    for name in TORCHRUN:
        monkeypatch.delenv(name, raising=False)

    def change(values):
        for name, value in values.items():
            if value is None:
                monkeypatch.delenv(name)
            else:
                monkeypatch.setenv(name, value)

    return change


def test_a_process_that_nobody_started(environ):
    assert of_environment() == Processes()
    assert Processes().is_first and not Processes().started


def test_a_process_of_torchrun(environ):
    environ(TORCHRUN)
    expected = Processes(3, 4, 1, 2, hosts=2, started=True, by_torchrun=True, restarts=1, may_restart=True)
    assert of_environment() == expected and not expected.is_first
    environ({'TORCHELASTIC_RUN_ID': RUN_ID})
    assert not of_environment().by_torchrun


def test_an_environment_of_half_a_group(environ):
    environ({'LOCAL_RANK': '0'})
    with pytest.raises(UserError, match='RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT is not'):
        of_environment()


@pytest.mark.parametrize(
    ('name', 'value', 'limits'),
    [
        ('RANK', '4', 'from 0 to 3'),
        ('LOCAL_RANK', '-1', 'from 0 to 1'),
        ('WORLD_SIZE', 'two', 'of at least 1'),
        ('MASTER_PORT', '65536', 'from 0 to 65535'),
        ('TORCHELASTIC_RESTART_COUNT', '²', 'of at least 0'),
    ],
)
def test_numbers_that_do_not_fit(name, value, limits, environ):
    environ({**TORCHRUN, name: value})
    with pytest.raises(UserError, match=f"{name} is '{value}' in the environment, not an integer {limits}: start"):
        of_environment()


class Lost(dist.HashStore):
    """A store whose server has ended."""

    def compare_set(self, *_):
        raise dist.DistNetworkError('failed to recv')

    def check(self, *_):
        raise dist.DistNetworkError('failed to recv')


def groups(store, number=2):
    found = [Group(Processes(rank=rank, world_size=number)) for rank in range(number)]
    for group in found:
        group.store = store
    return found


def test_all_processes_end_with_the_status_of_the_first_that_fails_and_its_text_alone():
    first, second = groups(dist.HashStore())
    assert not first.has_failed() and not second.has_failed()
    assert second.agree(2, 'of the second') == (2, 'of the second')
    assert first.has_failed()
    assert first.agree(1, 'of the first') == (2, '')
    assert second.agree(2, 'of the second') == (2, 'of the second')


def test_a_process_alone_agrees_with_itself():
    assert Group(Processes()).agree(1, 'text') == (1, 'text')


def test_a_process_that_lost_the_store_is_silent():
    group, _ = groups(Lost())
    assert group.has_failed() and group.agree(1, 'text') == (1, '')


@pytest.mark.parametrize(
    ('problem', 'lost'),
    [
        (
            RuntimeError('[gloo/transport/tcp/pair.cc:561] Connection closed by peer [127.0.0.1]:5021'),
            True,
        ),
        (dist.DistBackendError('NCCL error: remote process exited or there was a network error'), True),
        (UserError('cannot read the image data/gloo/1.jpg'), False),
        (RuntimeError('mat1 and mat2 shapes cannot be multiplied'), False),
    ],
)
def test_the_loss_of_another_process_is_no_fault_of_this_one(problem, lost, monkeypatch):
    assert not processes.lost_another(problem)  # there is no other
    monkeypatch.setattr(dist, 'is_initialized', lambda: True)
    assert processes.lost_another(problem) is lost


def test_processes_meet_once_and_before_they_join(monkeypatch):
    group, store = Group(Processes(world_size=2)), dist.HashStore()
    met = iter([(store, 0, 2)])
    monkeypatch.setattr(dist, 'rendezvous', lambda _: met)
    for _ in range(2):
        group.meet()
        assert group.store is store
    Group(Processes()).meet()


KILLED = 'error: process 1 of the run was killed by signal 9\n'


@pytest.mark.parametrize(
    ('ends', 'expected'),
    [
        ({0: (100, -15), 1: (100, 2)}, (2, '')),  # a mistake; the launcher ended the other one
        ({0: (130, -9), 1: (100, 2)}, (2, '')),  # by SIGKILL, as it waited for its GPU
        ({0: (100, -6), 1: (100, 2)}, (2, '')),  # or NCCL did
        ({0: (100, -15), 1: (100, -9)}, (137, KILLED)),
        ({0: (100, 1), 1: (100, -9)}, (137, KILLED)),  # the other one noticed it
        ({0: (130, -9), 1: (100, -9)}, (137, KILLED)),
        ({0: (100, -15), 1: (101, -15)}, (143, '')),
    ],
)
def test_the_first_end_is_that_of_the_run(ends, expected):
    assert processes._first_end(ends) == expected


@pytest.mark.parametrize(('backend', 'at_once'), [('nccl', True), ('gloo', False), (None, False)])
def test_a_group_of_gpus_is_left_without_a_farewell(backend, at_once, monkeypatch):
    """NCCL would report at exit that its group was not destroyed."""

    class Exit(BaseException):
        pass

    def leave(status):
        assert status == 2
        raise Exit

    monkeypatch.setattr(dist, 'is_initialized', lambda: backend is not None)
    monkeypatch.setattr(dist, 'get_backend', lambda: backend)
    monkeypatch.setattr(processes.os, '_exit', leave)
    with pytest.raises(Exit if at_once else SystemExit):
        processes.end(2)


@pytest.mark.parametrize(('number', 'threads'), [(1, None), (2, '3'), (7, '1')])
def test_processes_share_the_cores_that_the_program_may_use(number, threads, monkeypatch):
    """A single process counts them itself."""
    import torch.distributed.launcher.api as api

    seen = []
    monkeypatch.setenv('OMP_NUM_THREADS', '')  # restored afterwards, also if it is not set
    monkeypatch.delenv('OMP_NUM_THREADS')
    monkeypatch.setattr(api, 'elastic_launch', lambda *_: lambda *_: seen.append(os.environ.get('OMP_NUM_THREADS')))
    monkeypatch.setattr(os, 'sched_getaffinity', lambda _: set(range(6)), raising=False)
    monkeypatch.setattr(os, 'cpu_count', lambda: 128)
    monkeypatch.setattr(processes.logging, 'disable', lambda: None)
    assert processes.start_all(number, []) == (0, '')
    assert seen == [threads]
