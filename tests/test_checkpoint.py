"""The parts of resuming; resuming bit for bit is tested with the scripts."""

import errno
import os
import sys
from collections import Counter, OrderedDict, defaultdict
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import Tiny
from torch import nn
from torch.optim import Adam
from torch.optim.lr_scheduler import MultiStepLR, StepLR

import weights
from arguments import SaveOptions, ShowOptions
from readers.tree import Dataset
from runtime import state as states
from runtime.checkpoint import Checkpoint
from runtime.device import Run
from runtime.errors import UserError
from runtime.meters import LossMeter


def options(save_dir, **changes):
    recipe = {'lr': 0.01, 'seed': 1}
    more = {'recipe': recipe, 'defaults': recipe, 'arguments': {**recipe, 'workers': 2}, **changes}
    return SaveOptions(save_dir=str(save_dir), no_report=True, max_epoch=3, **more)


def begin(options, **state):
    dataset = Dataset('drawn', [('a.jpg', 0, 0), ('b.jpg', 1, 0)], [], [])
    return Checkpoint(dataset, options, Run(torch.device('cpu')), **state)


def meter_of(checkpoint):
    return LossMeter(ShowOptions(save_dir=checkpoint.options.save_dir), checkpoint.run, checkpoint.parts['optimizer'])


def record_test(checkpoint, epoch, rank1):
    checkpoint.tested(epoch, {'rank1': rank1}, meter_of(checkpoint))


class Batches(list):
    """In place of a loader; an exception among its batches is raised in its turn."""

    def epoch(self, epoch, start):
        for batch in self[start:]:
            if isinstance(batch, Exception):
                raise batch
            yield batch


def parts(num_classes=3):
    model = Tiny(num_classes)
    optimizer = Adam(model.parameters(), 0.01, fused=True)
    return {'model': model, 'optimizer': optimizer, 'scheduler': StepLR(optimizer, 2, 0.1)}


def train(model, optimizer, scheduler, epochs=1):
    for _ in range(epochs):
        model.train()
        optimizer.zero_grad()
        images = (
            torch.arange(2 * 3 * 32 * 16.0).view(2, 3, 32, 16).div(3072).contiguous(memory_format=torch.channels_last)
        )
        model(images).logsumexp(1).sum().backward()
        optimizer.step()
        scheduler.step()


def saved(tmp_path, epoch=0, rank1=0.5):
    state = parts()
    train(**state)
    record_test(begin(options(tmp_path), **state), epoch, rank1)
    return state, tmp_path / f'checkpoint_ep{epoch + 1}.pth.tar'


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def equal(one, other):
    return all(torch.equal(one[name], other[name]) for name in one | other)


def test_a_file_holds_plain_things_and_the_originals_keys(tmp_path):
    state, path = saved(tmp_path, epoch=4, rank1=0.25)
    found = torch.load(path, weights_only=True)
    assert (found['rank1'], found['epoch']) == (0.25, 4)
    assert equal(found['state_dict'], state['model'].state_dict())
    assert found['arguments']['workers'] == 2


VALUES = [
    1, 2**70, 0.5, float('nan'), True, None, 'text', np.float32(1), np.float64(1), torch.ones(2), torch.tensor(True),
    torch.ones(1, dtype=torch.bfloat16), nn.Parameter(torch.ones(1)), [], (), {}, [1, (2.0, {'a': [None]})],
    OrderedDict(a=1), Counter([1]), np.int64(1), np.bool_(True), np.ones(2), Counter([np.int64(1)]), {'a': {1}}, {1},
    Path('a'), defaultdict(int), 1j, range(2), torch.float32, torch.device('cpu'), torch.Size([1]), Fraction(1),
    [Path('a')], ({'a': Path('a')},),
    *(torch.ones(1, dtype=each) for each in (torch.complex64, torch.uint16, *states.SAVED_DTYPES)),
]  # fmt: skip


@pytest.mark.parametrize('value', VALUES, ids=repr)
def test_what_could_not_be_read_again_is_refused_before_training(value, tmp_path):
    """As an option that a script adds, or in the state of its schedule. The reader decides what it can read."""
    path = tmp_path / 'file.pth.tar'
    torch.save({'state_dict': parts()['model'].state_dict(), 'format': weights.FORMAT, 'more': value}, path)
    checkpoint = begin(options(tmp_path / 'run', arguments={'mine': value}), **parts())
    try:
        weights.read(path)
    except UserError:
        with pytest.raises(UserError, match=r'could not be read again, because of a .* in .*mine'):
            next(checkpoint.epochs(1))
    else:
        assert next(checkpoint.epochs(1)) == 0


def test_milestones_of_numpy_are_refused_before_training(tmp_path):
    made = parts()
    made['scheduler'] = MultiStepLR(made['optimizer'], [np.int64(2), 3])
    with pytest.raises(UserError, match=r"numpy.int64 in the keys of state\['scheduler'\]\['milestones'\]: use"):
        next(begin(options(tmp_path), **made).epochs(1))


def test_a_resumed_run_has_the_state_of_the_saved_one(tmp_path):
    state, path = saved(tmp_path)
    resumed = parts()
    checkpoint = begin(options(tmp_path, resume=str(path)), **resumed)
    assert list(checkpoint.epochs(3)) == [1, 2]
    assert checkpoint.best_rank1 == 0.5
    train(**state, epochs=2)
    train(**resumed, epochs=2)
    assert equal(state['model'].state_dict(), resumed['model'].state_dict())
    assert state['scheduler'].get_last_lr() == resumed['scheduler'].get_last_lr() == [pytest.approx(0.001)]


def test_moments_take_the_layout_of_their_weight(tmp_path):
    """Saved from NCHW weights, resumed into channels_last ones: the next steps must be the same."""
    state, path = saved(tmp_path)
    resumed = parts()
    resumed['model'].to(memory_format=torch.channels_last)
    begin(options(tmp_path, resume=str(path)), **resumed)
    for param, moments in resumed['optimizer'].state.items():
        assert moments['exp_avg'].stride() == param.stride()
    train(**state, epochs=2)
    train(**resumed, epochs=2)
    for name, value in state['model'].state_dict().items():
        torch.testing.assert_close(resumed['model'].state_dict()[name], value, atol=1e-6, rtol=0)


def test_a_best_model_that_was_deleted_is_replaced_by_the_next_one(tmp_path, capsys):
    best = tmp_path / 'best_model.pth.tar'
    checkpoint = begin(options(tmp_path), **parts())
    for epoch, rank1 in ((0, 0.5), (1, 0.3)):
        record_test(checkpoint, epoch, rank1)
    assert torch.load(best, weights_only=True)['epoch'] == 0
    assert 'is missing' not in capsys.readouterr().out
    best.unlink()
    record_test(checkpoint, 2, 0.3)
    assert torch.load(best, weights_only=True)['epoch'] == 2
    assert f'{best} is missing: the weights of this epoch replace it\n' in capsys.readouterr().out
    record_test(checkpoint, 3, 0.4)  # better than what is there now
    assert torch.load(best, weights_only=True)['epoch'] == 3


def stepped(folder, **changes):
    """A run that has taken its first step."""
    state = parts()
    checkpoint = begin(options(folder, **changes), **state)
    meter, epoch = meter_of(checkpoint), next(checkpoint.epochs(9))
    next(meter.watch(Batches([0, 1]), epoch))
    checkpoint.after_step(epoch, meter)
    return checkpoint


@pytest.mark.parametrize('interrupted', [False, True])
def test_a_run_that_continues_in_another_folder_takes_its_best_model_with_it(interrupted, tmp_path, capsys):
    """Whether or not it is interrupted there."""
    _, path = saved(tmp_path / 'old', epoch=0, rank1=0.5)
    new, best = tmp_path / 'new', tmp_path / 'new' / 'best_model.pth.tar'
    checkpoint = stepped(new, resume=str(path))
    assert torch.load(best, weights_only=True)['epoch'] == 0
    record_test(checkpoint, 1, 0.4)
    if interrupted:
        checkpoint = begin(options(new, resume=str(path), auto_resume=True), **parts())
    record_test(checkpoint, 2, 0.45)
    assert torch.load(best, weights_only=True)['epoch'] == 0 and 'is missing' not in capsys.readouterr().out
    record_test(checkpoint, 3, 0.6)
    assert torch.load(best, weights_only=True)['epoch'] == 3


def test_a_run_that_continues_before_a_test_takes_its_best_model_with_it(tmp_path):
    """It has no step before that test."""
    _, path = saved(tmp_path / 'old', epoch=0, rank1=0.5)
    checkpoint = begin(options(tmp_path / 'new', resume=str(path)), **parts())
    next(checkpoint.epochs(9))
    record_test(checkpoint, 1, 0.1)
    assert torch.load(tmp_path / 'new' / 'best_model.pth.tar', weights_only=True)['epoch'] == 0


def test_weights_alone_start_with_auto_resume_where_only_damaged_files_are(tmp_path):
    foreign = tmp_path / 'foreign.pth'
    torch.save(parts()['model'].state_dict(), foreign)
    (tmp_path / 'run').mkdir()
    (tmp_path / 'run' / 'checkpoint_ep1.pth.tar').write_text('damaged')
    assert begin(options(tmp_path / 'run', resume=str(foreign), auto_resume=True), **parts()).epoch == 0


def test_a_best_model_of_a_later_time_is_not_taken_along(tmp_path):
    """Nor is a damaged one, or one that replaces another."""
    _, path = saved(tmp_path / 'old', epoch=0, rank1=0.5)
    saved(tmp_path / 'old', epoch=5, rank1=0.9)
    for place in ('later', 'damaged'):
        stepped(tmp_path / place, resume=str(path))
        assert not (tmp_path / place / 'best_model.pth.tar').exists()
        (tmp_path / 'old' / 'best_model.pth.tar').write_text('damaged')


def test_best_model_is_the_best_also_after_a_resume(tmp_path):
    _, path = saved(tmp_path, epoch=0, rank1=0.5)
    checkpoint = begin(options(tmp_path, resume=str(path)), **parts())
    best = tmp_path / 'best_model.pth.tar'
    for epoch, rank1, expected in ((1, 0.4, 0), (2, 0.6, 2), (3, 0.6, 2)):
        record_test(checkpoint, epoch, rank1)
        assert torch.load(best, weights_only=True)['epoch'] == expected
    assert len(list(tmp_path.glob('checkpoint_ep*.pth.tar'))) == 4


def epochs_in(folder):
    """The epochs of the tests' checkpoints, counted from 1."""
    return sorted(int(path.name[13:-8]) for path in folder.glob('checkpoint_ep*.pth.tar'))


@pytest.mark.parametrize(('number', 'kept'), [(0, [1, 2, 3, 4, 5]), (1, [5]), (2, [4, 5]), (9, [1, 2, 3, 4, 5])])
def test_the_newest_checkpoints_of_tests_are_kept_and_the_best(number, kept, tmp_path):
    checkpoint = begin(options(tmp_path, keep_tests=number), **parts())
    for epoch, rank1 in enumerate((0.4, 0.6, 0.5, 0.1, 0.2)):
        record_test(checkpoint, epoch, rank1)
    assert epochs_in(tmp_path) == kept
    best = torch.load(tmp_path / 'best_model.pth.tar', weights_only=True)
    assert (best['epoch'], best['rank1']) == (1, 0.6)
    resumed = begin(options(tmp_path, auto_resume=True), **parts())
    assert (resumed.path, resumed.epoch, resumed.best_rank1) == (tmp_path / 'checkpoint_ep5.pth.tar', 5, 0.6)


@pytest.mark.parametrize('of_a_clock', [1, 2**32])
def test_what_is_never_deleted(of_a_clock, tmp_path):
    """Kept are the file just written, even if others have later times; files that the command names; foreign files."""
    _, path = saved(tmp_path)
    begun_with = tmp_path / 'checkpoint_ep2.pth.tar'
    spared = ['checkpoint_ep2_mine', 'checkpoint_ep', 'mine', 'resume_1_1_mine', 'resume_1_2']
    for name in ('checkpoint_ep2', 'checkpoint_ep3', 'resume_1_1', *spared):
        (tmp_path / f'{name}.pth.tar').write_bytes(path.read_bytes())
    for each in tmp_path.iterdir():
        os.utime(each, (of_a_clock, of_a_clock))
    elsewhere = tmp_path / 'link.pth.tar'  # a name for a file in the folder
    elsewhere.symlink_to(begun_with)
    pretrained = str(tmp_path / 'resume_1_2.pth.tar')
    how = {'keep': 1, 'keep_tests': 1, 'arguments': {'pretrained': pretrained}}
    checkpoint = begin(options(tmp_path, resume=str(elsewhere), **how), **parts())
    record_test(checkpoint, 3, 0.1)
    checkpoint._save_position()
    left = {path.name.removesuffix('.pth.tar') for path in tmp_path.glob('*.pth.tar')}
    newest = ['checkpoint_ep3'] * (of_a_clock > 1)
    assert left == {*spared, *newest, 'link', 'best_model', 'checkpoint_ep2', 'checkpoint_ep4', 'resume_2_0'}


def test_a_file_that_cannot_be_deleted_is_reported_and_kept(tmp_path, monkeypatch, capsys):
    def refuse(path, missing_ok=False):
        if path.name.startswith('checkpoint'):
            raise PermissionError(errno.EPERM, 'Operation not permitted')
        whole(path, missing_ok)

    whole = type(tmp_path).unlink
    monkeypatch.setattr(type(tmp_path), 'unlink', refuse)
    checkpoint = begin(options(tmp_path, keep_tests=1), **parts())
    for epoch in (0, 1):
        record_test(checkpoint, epoch, 0.5)
    assert epochs_in(tmp_path) == [1, 2]
    line = f'{tmp_path}/checkpoint_ep1.pth.tar cannot be deleted (Operation not permitted); the run continues'
    assert line in capsys.readouterr().out.splitlines()
    assert not checkpoint.run.unwritten


def test_a_folder_that_cannot_be_listed_is_no_failure_to_write(tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(errno.ESTALE, 'Stale file handle')

    checkpoint = begin(options(tmp_path, keep_tests=1), **parts())
    monkeypatch.setattr(type(tmp_path), 'glob', refuse)
    monkeypatch.setattr(type(tmp_path), 'iterdir', refuse)
    record_test(checkpoint, 0, 0.5)
    checkpoint.epoch, checkpoint.done = 1, 2
    checkpoint._save_position()
    monkeypatch.undo()
    assert (checkpoint.run.unwritten, checkpoint.best_rank1) == ([], 0.5)
    assert torch.load(tmp_path / 'resume_2_2.pth.tar', weights_only=True)['best_rank1'] == 0.5
    line = f'{tmp_path} cannot be listed (Stale file handle), and no old file is deleted; the run continues'
    assert capsys.readouterr().out.splitlines().count(line) == 2


def test_a_write_that_fails_deletes_nothing_and_is_not_the_best(tmp_path, monkeypatch):
    """Of the tests after it, one is the best if it is better than best_model.pth.tar, which was not replaced."""

    def fail(*_):
        raise OSError(errno.ENOSPC, 'No space left on device')

    checkpoint = begin(options(tmp_path, keep_tests=1), **parts())
    record_test(checkpoint, 0, 0.4)
    with monkeypatch.context() as patch:
        patch.setattr(torch, 'save', fail)
        record_test(checkpoint, 1, 0.6)
    assert epochs_in(tmp_path) == [1]
    assert checkpoint.run.unwritten == [f'{tmp_path}/checkpoint_ep2.pth.tar: No space left on device']
    record_test(checkpoint, 2, 0.5)
    assert epochs_in(tmp_path) == [3]
    assert torch.load(tmp_path / 'best_model.pth.tar', weights_only=True)['rank1'] == 0.5


def test_a_link_to_nowhere_is_passed_over(tmp_path, capsys):
    _, path = saved(tmp_path)
    (tmp_path / 'checkpoint_ep9.pth.tar').symlink_to(tmp_path / 'gone')
    assert begin(options(tmp_path, auto_resume=True), **parts()).path == path


def test_another_recipe_is_refused_and_listed(tmp_path):
    _, path = saved(tmp_path)
    other = options(tmp_path, resume=str(path), recipe={'lr': 0.02, 'margin': 0.3, 'seed': 1})
    with pytest.raises(UserError) as refusal:
        begin(other, **parts())
    text = str(refusal.value)
    assert '--lr was 0.01, is 0.02' in text
    assert '--margin was not an option, is 0.3' in text
    assert '--resume-weights-only' in text
    assert '--seed' not in text


@pytest.mark.parametrize('value', [0.3, 0.5])
@pytest.mark.parametrize('script', ['same.py', 'other.py', None])
def test_an_option_that_a_file_does_not_know_has_its_default(script, value, tmp_path, monkeypatch):
    """In a file of the same script; another script with its default may be another experiment."""
    monkeypatch.setattr(sys, 'argv', ['/somewhere/same.py', '--lr', '0.01'])
    _, path = saved(tmp_path)
    if script is None:
        changed = torch.load(path, weights_only=True)
        changed['provenance']['command'] = None
        torch.save(changed, path)
    monkeypatch.setattr(sys, 'argv', [script or 'same.py'])
    recipe, defaults = {'lr': 0.01, 'margin': value, 'seed': 1}, {'lr': 0.0003, 'margin': 0.3, 'seed': 1}
    gained = options(tmp_path, resume=str(path), recipe=recipe, defaults=defaults)
    if (script, value) == ('same.py', 0.3):
        assert begin(gained, **parts()).epoch == 1
        return
    known = '0.3' if script == 'same.py' else 'not an option'
    with pytest.raises(UserError, match=f'a different recipe: --margin was {known}, is {value}. Use'):
        begin(gained, **parts())


def test_weights_alone_begin_a_run_of_their_own(tmp_path):
    state, path = saved(tmp_path)
    fresh = parts()
    begun = options(tmp_path / 'new', resume=str(path), resume_weights_only=True, recipe={'lr': 1.0}, start_epoch=2)
    checkpoint = begin(begun, **fresh)
    assert equal(fresh['model'].state_dict(), state['model'].state_dict())
    assert list(checkpoint.epochs(4)) == [2, 3]
    assert not fresh['optimizer'].state
    assert fresh['scheduler'].get_last_lr() == [pytest.approx(0.001)]  # that of epoch 2


def test_a_new_run_at_a_later_epoch_has_the_learning_rate_of_that_epoch(tmp_path):
    fresh = parts()
    checkpoint = begin(options(tmp_path, recipe={'lr': 1.0}, start_epoch=2), **fresh)
    assert list(checkpoint.epochs(4)) == [2, 3]
    assert fresh['scheduler'].get_last_lr() == [pytest.approx(0.001)]


def test_a_foreign_file_starts_from_its_weights(tmp_path):
    state = parts()
    torch.save(state['model'].state_dict(), tmp_path / 'foreign.pth')
    checkpoint = begin(options(tmp_path, resume=str(tmp_path / 'foreign.pth')), **parts())
    assert equal(checkpoint.model.state_dict(), state['model'].state_dict())
    assert list(checkpoint.epochs(2)) == [0, 1]


def test_weights_alone_are_not_mixed_with_the_run_in_their_folder(tmp_path, capsys):
    saved(tmp_path)
    foreign = tmp_path / 'foreign.pth.tar'
    torch.save(parts()['model'].state_dict(), foreign)
    with pytest.raises(UserError, match=r'foreign.pth.tar has only weights, .* \(best_model.pth.tar\): choose another'):
        begin(options(tmp_path, resume=str(foreign)), **parts())
    capsys.readouterr()
    begin(options(tmp_path, resume=str(foreign), evaluate=True), **parts())
    begin(options(tmp_path / 'other', resume=str(foreign), resume_weights_only=True), **parts())
    assert 'a new run' not in capsys.readouterr().out
    begin(options(tmp_path / 'other', resume=str(foreign)), **parts())
    assert f'{foreign} has only weights: a new run starts from them, in epoch 1\n' in capsys.readouterr().out
    state = parts()
    checkpoint = begin(options(tmp_path, resume=str(foreign), overwrite=True), **state)
    meter, epoch = meter_of(checkpoint), next(checkpoint.epochs(1))
    next(meter.watch(Batches([0, 1]), epoch))
    checkpoint.after_step(epoch, meter)
    assert names(tmp_path) == [foreign.name]


def test_another_classifier(tmp_path, capsys):
    _, path = saved(tmp_path)
    with pytest.raises(UserError, match=r'classifier'):
        torch.save(weights.read(path).state_dict, tmp_path / 'foreign.pth')
        begin(options(tmp_path, resume=str(tmp_path / 'foreign.pth')), **parts(num_classes=5))
    begin(options(tmp_path, resume=str(path), evaluate=True), **parts(num_classes=5))
    assert 'classifier' in capsys.readouterr().out


def test_a_finished_run_has_nothing_left(tmp_path):
    _, path = saved(tmp_path, epoch=1)
    with pytest.raises(UserError, match='nothing left to train; raise --max-epoch'):
        next(begin(options(tmp_path, resume=str(path)), **parts()).epochs(2))
    assert list(begin(options(tmp_path, auto_resume=True), **parts()).epochs(2)) == []
    with pytest.raises(UserError, match=r'ep2.pth.tar has finished epoch 2, and --max-epoch is 1: .* raise'):
        next(begin(options(tmp_path, auto_resume=True), **parts()).epochs(1))


def test_a_run_in_the_middle_of_an_epoch_is_past_the_one_before(tmp_path):
    """And was not tested after that epoch, if --max-epoch was greater."""
    _, path = saved(tmp_path, epoch=1)
    state = torch.load(path)
    torch.save({**state, 'batch': 2}, path)
    with pytest.raises(UserError, match='has finished epoch 2, and --max-epoch is 2: there is nothing left to train'):
        next(begin(options(tmp_path, auto_resume=True), **parts()).epochs(2))


def test_a_file_without_its_origin_continues(tmp_path):
    _, path = saved(tmp_path)
    torch.save({**torch.load(path), 'provenance': None}, path)
    assert begin(options(tmp_path, resume=str(path)), **parts()).epoch == 1


@pytest.mark.parametrize('flag', ['resume', 'pretrained'])
@pytest.mark.parametrize('more', [{'overwrite': True}, {'auto_resume': True}])
def test_a_new_run_does_not_replace_the_file_that_it_starts_from(flag, more, tmp_path):
    saved(tmp_path)
    best = tmp_path / 'best_model.pth.tar'
    (tmp_path / 'checkpoint_ep1.pth.tar').unlink()
    named = {
        'resume': {'resume': str(best), 'resume_weights_only': True},
        'pretrained': {'arguments': {flag: str(best)}},
    }
    with pytest.raises(UserError, match=r'best_model.pth.tar is to be the start of a new run, .*: rename the file, or'):
        begin(options(tmp_path, **named[flag], **more), **parts())
    begin(options(tmp_path / 'other', **named[flag], **more), **parts())
    begin(options(tmp_path, **named['resume'], evaluate=True), **parts())


def test_a_file_of_another_script_is_refused(tmp_path):
    _, path = saved(tmp_path)
    extra = parts()
    with pytest.raises(UserError, match="has no state for 'criterion_cent'"):
        begin(options(tmp_path, resume=str(path)), **extra, criterion_cent=torch.nn.Linear(1, 1))
    other = parts()
    other['optimizer'].add_param_group({'params': [torch.nn.Parameter(torch.ones(1))]})
    with pytest.raises(UserError, match="its state for 'optimizer' does not fit"):
        begin(options(tmp_path, resume=str(path)), **other)


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    state = parts()
    with torch.no_grad():
        state['model'].classifier.weight[0, 0] = float('nan')
    with pytest.raises(UserError, match='weights are not finite after epoch 1'):
        record_test(begin(options(tmp_path), **state), 0, 0.5)
    assert names(tmp_path) == ['metrics.csv']  # the figures of the test


def test_of_files_of_the_same_moment_the_later_position_is_the_newest(tmp_path):
    """A clock of files has steps of some milliseconds, in which two small ones can be written."""
    order = ['resume_1_9', 'resume_1_10', 'checkpoint_ep1', 'resume_2_1', 'checkpoint_ep10', 'resume_11_1']
    _, path = saved(tmp_path)
    for name in order:
        (tmp_path / f'{name}.pth.tar').write_bytes(path.read_bytes())
        os.utime(tmp_path / f'{name}.pth.tar', (1, 1))
    for name in reversed(order):
        assert begin(options(tmp_path, auto_resume=True), **parts()).path == tmp_path / f'{name}.pth.tar'
        (tmp_path / f'{name}.pth.tar').unlink()


def test_a_folder_that_was_copied_continues_where_it_was(tmp_path, capsys):
    """A copy has the files in any order of time; but a later position may be of a training that was gone back from."""
    state, _ = saved(tmp_path)
    _, last = saved(tmp_path, epoch=11)
    other = tmp_path / 'resume_10_3.pth.tar'
    other.write_bytes((tmp_path / 'checkpoint_ep1.pth.tar').read_bytes())  # written before
    for time, path in enumerate((last, other, tmp_path / 'checkpoint_ep1.pth.tar')):
        os.utime(path, (time, time))
    assert begin(options(tmp_path, auto_resume=True), **parts()).path == last
    last.write_text('damaged')
    os.utime(last, (0, 0))
    assert begin(options(tmp_path, auto_resume=True), **parts()).path == tmp_path / 'checkpoint_ep1.pth.tar'
    assert 'Skipped: ' in capsys.readouterr().out
    record_test(begin(options(tmp_path, resume=str(other)), **state), 1, 0.5)  # gone back, and on to epoch 2
    assert begin(options(tmp_path, auto_resume=True), **parts()).path == tmp_path / 'checkpoint_ep2.pth.tar'


@pytest.mark.parametrize('name', ['backup_20240501.pth.tar', 'market1501_ep20.pth.tar', 'a_resume_99_9.pth.tar'])
def test_a_copy_with_a_name_of_its_own_is_not_newer_because_it_was_copied_later(name, tmp_path):
    """Its name may have any numbers."""
    _, early = saved(tmp_path)
    copy = tmp_path / name
    copy.write_bytes(early.read_bytes())
    _, last = saved(tmp_path, epoch=4)
    os.utime(copy, (later := last.stat().st_mtime + 1000, later))
    assert begin(options(tmp_path, auto_resume=True), **parts()).path == last
    for number, path in enumerate((copy, last)):  # all have names of their own
        other = path.rename(tmp_path / f'{path.stem}_{number}.tar.pth.tar')
        os.utime(other, (later + 9 - number,) * 2)
    assert begin(options(tmp_path, auto_resume=True), **parts()).path == other


def test_a_run_is_not_mixed_with_the_one_in_another_folder(tmp_path):
    _, theirs = saved(tmp_path / 'theirs')
    _, ours = saved(tmp_path / 'ours')
    before = theirs.read_bytes()
    for changes in ({}, {'overwrite': True}):
        with pytest.raises(UserError, match=r'continues the run of another folder, .* with --auto-resume, or choose'):
            begin(options(tmp_path / 'theirs', resume=str(ours), **changes), **parts())
    with pytest.raises(UserError, match=r'--overwrite removes a run, and --resume \S+ continues one'):
        begin(options(tmp_path / 'ours', resume=str(ours), overwrite=True), **parts())
    assert theirs.read_bytes() == before
    assert begin(options(tmp_path / 'theirs', resume=str(ours), auto_resume=True), **parts()).path == theirs
    assert begin(options(tmp_path / 'new', resume=str(ours)), **parts()).path == str(ours)
    saved(tmp_path / 'ours', epoch=4)
    moved = ours.rename(tmp_path / 'scratch.pth.tar')
    ours.symlink_to(moved)  # to save space in the folder of the run
    assert begin(options(tmp_path / 'ours', resume=str(ours)), **parts()).path == str(ours)


@pytest.mark.parametrize('loss', [1.0, float('nan')])
def test_overwrite_removes_the_old_run_after_the_first_step_of_the_new_one(loss, tmp_path):
    saved(tmp_path, epoch=7)
    begun_with = tmp_path / 'begun.pth.tar'
    others = ['.mine.pth.tar.bak', 'checkpoint_ep20_mine.pth.tar', 'mine.pth.tar', 'old_resume_1_1.pth.tar']
    kept = sorted([*others, 'log_train.txt', begun_with.name])
    old = ['best_model.pth.tar', 'checkpoint_ep8.pth.tar', 'metrics.csv', 'report.html', 'resume_2_9.pth.tar', *kept]
    for name in ('log_train.txt', 'report.html', 'resume_2_9.pth.tar', begun_with.name, *others):
        (tmp_path / name).write_text(name)
    state = parts()
    changes = {'overwrite': True, 'arguments': {'pretrained': str(begun_with)}}
    checkpoint = begin(options(tmp_path, **changes), **state)
    meter, epoch = meter_of(checkpoint), next(checkpoint.epochs(1))
    next(meter.watch(Batches([0, 1]), epoch))
    assert names(tmp_path) == sorted(old)  # the first batch might not fit into memory
    checkpoint.run.skip_unless_finite(torch.tensor(loss), state['optimizer'])
    checkpoint.after_step(epoch, meter)
    assert names(tmp_path) == (kept if loss == 1.0 else sorted(old))


@pytest.fixture
def training(tmp_path):
    """A checkpoint, the loader, and what takes the steps of the run, one with each `next`: epoch and batch."""
    state, loader = parts(), Batches([1, 2])
    checkpoint = begin(options(tmp_path, eval_step=2), **state)
    meter = meter_of(checkpoint)

    def steps():
        for epoch in checkpoint.epochs(3):
            for batch in meter.watch(loader, epoch):
                yield epoch, batch
                loss = state['model'](torch.zeros(2, 3, 32, 16)).square().sum()
                checkpoint.run.skip_unless_finite(loss, state['optimizer'])
                meter.update(loss=loss)
                checkpoint.after_step(epoch, meter)
            yield epoch, 'end'
            if epoch == 1:
                record_test(checkpoint, epoch, 0.5)

    return checkpoint, loader, steps()


def until(steps, *place):
    assert place in steps


def test_a_run_that_fails_before_its_first_step_saves_nothing(training, tmp_path):
    checkpoint, _, steps = training
    assert checkpoint.run.rescue is None
    until(steps, 0, 1)
    assert checkpoint.run.rescue() is None and names(tmp_path) == []


def test_a_run_that_fails_between_two_steps_is_saved_once(training, tmp_path):
    checkpoint, loader, steps = training
    loader.append(UserError('an image that cannot be read'))
    with pytest.raises(UserError):
        list(steps)
    position = tmp_path / 'resume_1_2.pth.tar'
    assert checkpoint.run.rescue() == position
    found = torch.load(position, weights_only=True)
    assert (found['epoch'], found['batch']) == (-1, 2)
    assert (tmp_path / 'metrics.csv').read_text().count('\n') == 2  # the losses of both steps are in a row
    position.write_text('')
    assert checkpoint.run.rescue() == position and position.read_text() == ''


def test_in_the_middle_of_a_step_nothing_is_saved(training, tmp_path):
    checkpoint, _, steps = training
    until(steps, 0, 2)
    assert checkpoint.run.rescue() is None and names(tmp_path) == []


def test_a_run_that_fails_in_a_test_or_after_it_names_the_newest_file(training, tmp_path):
    checkpoint, _, steps = training
    until(steps, 1, 'end')
    assert names(tmp_path) == ['metrics.csv', 'resume_2_2.pth.tar']  # saved before the test
    assert checkpoint.run.rescue() == tmp_path / 'resume_2_2.pth.tar'
    until(steps, 2, 1)
    assert checkpoint.run.rescue() == tmp_path / 'checkpoint_ep2.pth.tar'


def test_a_loss_that_is_not_finite_is_never_saved(training, tmp_path):
    checkpoint, _, steps = training
    until(steps, 0, 2)
    checkpoint.run.skip_unless_finite(torch.tensor(float('nan')))
    until(steps, 0, 'end')
    assert checkpoint.run.rescue() is None and 'resume_1_2.pth.tar' not in names(tmp_path)


def test_a_run_that_has_ended_has_nothing_to_save(training):
    checkpoint, _, steps = training
    list(steps)
    assert checkpoint.run.rescue is None and not checkpoint.run.signals.held
