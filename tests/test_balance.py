"""--balance from the outside: the groups that a data set gives, and runs with equal shares of them."""

import pytest
import torch
from conftest import SCRIPTS

import data_manager
from arguments import DataOptions
from dataset_loader import ImageDataset, TrainLoader
from readers.folder import Folder
from readers.tree import Dataset
from runtime.device import Run
from runtime.errors import UserError
from runtime.processes import Processes
from samplers import AllImagesSampler, RandomIdentitySampler, RandomSampler

PERSONS = [('a.jpg', 5, 0), ('b.jpg', 5, 1), ('c.jpg', 9, 1)]


class Two(Dataset):
    """Of two data sets."""

    def __init__(self, *args, **how):
        super().__init__(*args, **how)
        self.set_of = [0, 0, 1]


def test_the_groups_of_a_data_set():
    images, videos = Two('two', PERSONS, [], []), Two('two', [((path,) * 3, *ids) for path, *ids in PERSONS], [], [])
    assert images.groups('none') is None
    assert images.groups('dataset').tolist() == [0, 0, 1] and images.groups('camera').tolist() == [0, 1, 1]
    assert videos.groups('dataset').tolist() == [0] * 6 + [1] * 3  # of the frames, which are trained one by one
    assert videos.groups('camera').tolist() == [0] * 3 + [1] * 6
    assert Dataset('one', PERSONS, [], []).set_of == [0, 0, 0]


@pytest.mark.parametrize(
    ('dataset', 'balance', 'message'),
    [
        (Dataset('one', PERSONS, [], []), 'dataset', 'one is one data set: give several, as in -d A,B, or leave the'),
        (Dataset('one', PERSONS[1:], [], []), 'camera', 'one has one camera to train on: give data with several, or'),
        (Two('x', PERSONS, [], [], no_cameras=True), 'camera', 'x does not name its cameras: add them, see docs/data'),
    ],
)
def test_what_cannot_be_balanced(dataset, balance, message):
    with pytest.raises(UserError) as refused:
        dataset.groups(balance)
    assert str(refused.value).startswith(f'--balance {balance}: {message}') and '\n' not in str(refused.value)


def test_unknown_cameras_of_a_folder(tmp_path):
    for path in ('a/1.jpg', 'a/2.jpg', 'b/c1_1.jpg', 'b/c2_2.jpg'):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).touch()
    with pytest.raises(UserError, match='does not name its cameras'):
        Folder(str(tmp_path), test_share=0).groups('camera')


def test_an_object_of_ones_own_can_be_balanced(data_dir, monkeypatch):
    own = type('Own', (), {'train': PERSONS, 'query': PERSONS, 'gallery': PERSONS})()
    monkeypatch.setitem(data_manager.IMAGES, 'own', lambda data_dir: own)
    assert data_manager.init_dataset('own', str(data_dir)).groups('camera').tolist() == [0, 1, 1]


@pytest.mark.parametrize('sampler', [RandomSampler, RandomIdentitySampler, AllImagesSampler])
def test_workers_processes_and_the_start_change_no_batch(sampler, images):
    """What process r of W sees of batch b is what one process sees there, however it is decoded and begun."""
    groups = [int(index >= 16) for index in range(len(images))]  # four identities and two
    between = () if sampler is RandomSampler else (4,)

    def epoch(rank=0, world_size=1, workers=0, start=0):
        made = sampler(images, *between, 8, 3, groups)
        run = Run(torch.device('cpu'), processes=Processes(rank, world_size))
        loader = TrainLoader(ImageDataset(images), made, DataOptions(workers=workers, balance='dataset'), run)
        return [(pids.tolist(), draws.tolist()) for _, pids, draws, *_ in loader.epoch(2, start)]

    whole = epoch()
    assert whole == epoch(workers=2) and whole[1:] == epoch(start=1, workers=1)
    for rank in (0, 1):
        assert epoch(rank, 2) == [(pids[rank::2], draws[rank::2]) for pids, draws in whole]
    shares = [sum(pid >= images[16][1] for pid in pids) for pids, _ in whole]
    assert shares == [4] * len(whole)


def test_a_sampler_that_balances_nothing_is_refused(images, run):
    """As in the copy of a script that was made before the option."""
    with pytest.raises(UserError, match=r"^--balance camera: this script's sampler balances nothing; give it "):
        TrainLoader(ImageDataset(images), RandomSampler(images, 8), DataOptions(balance='camera'), run)


def weights_of(path):
    return torch.load(path, weights_only=True)['state_dict']


@pytest.mark.parametrize('name', SCRIPTS)
def test_a_balanced_run_continues_as_it_began(name, script, tmp_path, capsys):
    """From the middle of an epoch, with other workers; not with another balance."""
    options = ['--max-epoch', 2, '--balance', 'camera', '--save-minutes', 1e-9, '--keep', 99]
    assert script(name, *options, '--save-dir', tmp_path / 'whole') == 0
    resume = ['--resume', tmp_path / 'whole' / 'resume_1_1.pth.tar', '--save-dir', tmp_path / 'resumed']
    assert script(name, *options, '--workers', 1, *resume) == 0
    whole, resumed = (weights_of(tmp_path / folder / 'checkpoint_ep2.pth.tar') for folder in ('whole', 'resumed'))
    assert all(torch.equal(whole[key], resumed[key]) for key in whole | resumed)
    capsys.readouterr()
    if name == SCRIPTS[0]:
        assert script(name, '--max-epoch', 2, *resume) == 2
        assert '--balance' in capsys.readouterr().err
        assert script(name, '--max-epoch', 2, '--save-dir', tmp_path / 'plain') == 0
        plain = weights_of(tmp_path / 'plain' / 'checkpoint_ep2.pth.tar')
        assert not all(torch.equal(whole[key], plain[key]) for key in whole)
