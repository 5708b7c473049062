"""Training on query and gallery too; persons held out of the training set to choose the best model."""

import os
import re
import signal
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY
from test_distributed import torchrun
from test_joined import BOTH, HTRI, VIDEO, XENT, read, rows_of
from test_own_data import equal, results, weights_of

import data_manager
import page
import toy
import train_img_model_xent
from arguments import DataOptions
from page import results as files
from page import runs
from readers import table
from readers.folder import Folder
from readers.joined import Joined, combined
from readers.split import hold_out
from readers.tree import Dataset, train_items
from runtime import best_model
from runtime.errors import UserError
from runtime.meters import LossMeter


def persons(dataset, items) -> set[str]:
    return {dataset.name_of(pid) for _, pid, _ in items}


@pytest.fixture
def options(places):
    def make(**changes):
        return DataOptions(**{'dataset': 'market1501', 'data_dir': str(places), **changes})

    return make


# ---- query and gallery in the training set ----


def drawn(train=(), query=(), gallery=(), **how) -> Dataset:
    return Dataset('drawn', *([(f'{name}.jpg', pid, camid) for name, pid, camid in some]
                              for some in (train, query, gallery)), **how)  # fmt: skip


def test_each_item_of_a_person_counts_once_and_distractors_do_not():
    dataset = drawn(
        train=[('a', 7, 0), ('b', 9, 1)],
        query=[('c', 3, 0), ('d', 7, 1)],
        gallery=[('c', 3, 0), ('e', 3, 1), ('f', 0, 1), ('g', 5, 1)],  # of 5 there is no query
        extra=[('h.jpg', 8, 2)],
    )
    whole = combined(dataset)
    found = sorted((os.path.basename(path), pid) for path, pid, _ in train_items(whole))
    assert found == [('a.jpg', 7), ('b.jpg', 9), ('c.jpg', 3), ('d.jpg', 7), ('e.jpg', 3), ('g.jpg', 5), ('h.jpg', 8)]
    assert (whole.query, whole.gallery, whole.train_pids) == ([], [], [3, 5, 7, 8, 9])
    asked = drawn(train=[('a', 7, 0), ('b', 9, 1)], query=[('c', 0, 0)], gallery=[('f', 0, 1)])
    assert 0 in combined(asked).train_pids  # a query has it, so it is a person
    named = drawn([('a', 1, 0), ('b', 2, 0)], [('c', 3, 0)], [('f', 4, 1), ('g', 3, 1)], names={4: '0', 3: 'x'})
    assert combined(named).train_pids == [1, 2, 3]  # of a merged table


def test_the_lists_that_are_left_out_are_taken_in(tmp_path):
    toy.draw_msmt17(tmp_path / 'MSMT17_V1', height=48, width=24)
    dataset = data_manager.init_dataset('msmt17', str(tmp_path))
    assert dataset.extra == dataset.val != []
    whole = combined(dataset)
    assert {item[0] for item in dataset.val} <= {item[0] for item in whole.train}
    parts = dataset.train, dataset.val, dataset.query, dataset.gallery
    assert len(whole.train) == len({item[0] for items in parts for item in items})


def test_tracklets_are_combined(places):
    for name in ('mars', 'mars_official'):  # in the latter queries are in the gallery, too
        (dataset,) = read(places, name)
        number = len({item[0] for item in dataset.query + [item for item in dataset.gallery if item[1]]})
        assert len(combined(dataset).train) == len(dataset.train) + number


def test_what_is_combined_is_not_tested(options, capsys):
    dataset = data_manager.init_datasets(options(combine=True))
    assert dataset.targets == [] and dataset.num_train_pids == 11
    assert 'market1501 is not tested: --combine trains on its query and gallery\n' in capsys.readouterr().out
    dataset = data_manager.init_datasets(options(combine=True, targets=BOTH))
    assert [target.name for target in dataset.targets] == ['toy_market1501']
    dataset = data_manager.init_datasets(options(combine=True, dataset=BOTH))
    assert dataset.num_train_pids == 11 + 9 and {*dataset.set_of} == {0, 1} and dataset.targets == []
    capsys.readouterr()
    for names, more in (('market1501', {}), (BOTH, {'dataset': BOTH}), ('market1501', {'targets': 'market1501'})):
        dataset = data_manager.init_datasets(options(combine=True, evaluate=True, **more))
        assert [target.name for target in dataset.targets] == names.split(',')  # nothing is combined
    assert 'is not tested' not in capsys.readouterr().out
    with pytest.raises(UserError, match='--select market1501: it is not tested; choose one of toy_market1501'):
        data_manager.init_datasets(options(combine=True, targets=BOTH, select='market1501'))


def test_a_copy_of_what_is_trained_on_is_noticed(options, places, tmp_path, capsys):
    copy = tmp_path / 'copy.csv'
    (dataset,) = read(places, 'market1501')
    table.write(dataset, str(copy))
    data_manager.init_datasets(options(targets=f'csv:{copy}'))
    assert 'Notice' not in capsys.readouterr().out
    data_manager.init_datasets(options(targets=f'csv:{copy}', combine=True))
    number = len(dataset.query + dataset.gallery)
    some = number - sum(1 for item in dataset.gallery if not item[1])
    text = f'Notice: {some} of the {number} items of csv:{copy} that are tested are trained on\n'
    assert text in capsys.readouterr().out
    both = tmp_path / 'both.csv'  # it trains on images of market1501's gallery, which -d A,B tests
    images = [(path, pid, camid) for path, pid, camid in dataset.gallery if pid]
    table.write(Dataset('both', images, [], []), str(both))
    data_manager.init_datasets(options(dataset=f'market1501,csv:{both}'))
    text = f'Notice: {len(images)} of the {number} items of market1501 that are tested are trained on\n'
    assert text in capsys.readouterr().out


@pytest.mark.parametrize(('name', 'data'), [(XENT, 'market1501'), (VIDEO, 'mars')])
def test_a_run_without_a_test(name, data, tmp_path, script, capsys):
    """It ends with the last weights, resumes, and records that its weights were trained on the test set."""
    log = tmp_path / 'log'
    how = ['-d', data, '--combine', '--save-dir', log, '--save-minutes', 1e-9, '--keep', 99]
    assert script(name, *how, '--max-epoch', 2, '--eval-step', 1) == 0
    out = capsys.readouterr().out
    assert (
        'mAP' not in out and out.count('best_model.pth.tar has the weights of this epoch, as nothing was tested') == 2
    )
    state = torch.load(log / 'best_model.pth.tar', weights_only=True)
    assert (state['epoch'], state['rank1']) == (1, None)
    assert not (log / 'results.json').exists()
    position = sorted(log.glob('resume_1_*.pth.tar'))[0]
    parted = ['-d', data, '--combine', '--save-dir', tmp_path / 'parted', '--resume', position]
    assert script(name, *parted, '--max-epoch', 2) == 0
    assert equal(weights_of(log / 'checkpoint_ep2.pth.tar'), weights_of(tmp_path / 'parted' / 'best_model.pth.tar'))
    capsys.readouterr()
    assert script(name, *parted[:2], *parted[3:], '--max-epoch', 3) == 2
    assert '--combine was True, is False' in capsys.readouterr().err
    evaluate = ['--evaluate', '--resume', log / 'best_model.pth.tar', '--save-dir', tmp_path / 'again']
    assert script(name, '-d', data, *evaluate) == 0
    (notice,) = re.findall('Notice: (.*)', capsys.readouterr().out)
    assert notice.endswith(
        f'was trained on query and gallery of {data} too (--combine): its figures are of known persons'
    )


# ---- persons held out ----


@pytest.mark.parametrize('name', ['market1501', 'toy_mars'])
def test_persons_are_held_out(name, places, capsys):
    (dataset,) = read(places, name)
    rest, held = hold_out(dataset, 0.3, 1)
    trained, validated = persons(dataset, train_items(rest)), persons(held, held.gallery)
    assert not trained & validated and trained | validated == persons(dataset, train_items(dataset))
    assert persons(held, held.query) == validated and len(validated) == max(1, round(0.3 * dataset.num_train_pids))
    assert {*held.query} <= {*held.gallery} and len({item[1:] for item in held.query}) == len(held.query)
    assert {item[1:] for item in held.gallery} == {item[1:] for item in held.query}  # one of each person and camera
    assert {label for _, label, _ in rest.train} == {*range(rest.num_train_pids)}
    assert (rest.query, rest.gallery, rest.name) == (dataset.query, dataset.gallery, name)
    assert held.name == f'validation of {name}' and held.untrainable
    assert f'{held.drawn}\n' in capsys.readouterr().out
    for other in range(2, 40):
        if persons(held, hold_out(dataset, 0.3, other)[1].gallery) != validated:
            break
    else:
        pytest.fail('the seed draws nothing')


def test_who_cannot_be_a_query_stays_in_training():
    train = [(f'{pid}{camid}', pid, camid) for pid in range(8) for camid in (0, 1)]
    alone = [('x', 20, 0), ('y', 20, 0), ('z', 21, 1)]  # one camera, one picture
    for share, number in ((0.01, 1), (0.5, 4), (0.99, 8)):
        rest, held = hold_out(drawn([*train, *alone]), share, 3)
        assert len(persons(held, held.gallery)) == number and {'20', '21'} <= persons(rest, train_items(rest))
    rest, held = hold_out(drawn(train), 0.99, 3)
    assert rest.num_train_pids == 2 and not rest.untrainable
    assert hold_out(drawn(alone), 0.5, 3)[1] is None
    unknown = drawn([(name, pid, 0) for name, pid, _ in [*train, *alone]], no_cameras=True)
    rest, held = hold_out(unknown, 0.99, 3)
    left = persons(rest, train_items(rest))
    assert '21' in left and len(left) == 2 and held.no_cameras and not held.camera_names
    assert len(held.query) == len(persons(held, held.gallery)) == 8
    with pytest.raises(UserError, match=r'--validate 0\.5: drawn has 2 persons to train on; if one is held out'):
        hold_out(drawn(train[:4]), 0.5, 3)


def test_the_seed_draws_queries_of_tracklets_whose_frames_have_equal_names():
    train = [((f'{pid}_{camid}{copy}/1.jpg',), pid, camid) for pid in range(9) for camid in (0, 1) for copy in 'abc']
    queries = [hold_out(Dataset('drawn', train, [], []), 0.99, seed)[1].query for seed in range(9)]
    assert len({paths for query in queries for paths, pid, camid in query if (pid, camid) == (3, 1)}) > 1


def test_cameras_keep_their_names(places):
    """Those of Market1501 count from 1, and camids from 0."""
    (dataset,) = read(places, 'market1501')
    made = [*hold_out(dataset, 0.4, 1), combined(dataset), hold_out(combined(dataset), 0.4, 1)[0]]
    for part in made:
        camids = {camid for *_, camid in (*part.train, *part.query, *part.gallery)}
        assert {part.camera_of(camid) for camid in camids} == {str(camid + 1) for camid in camids} and camids


def test_one_line_of_counts_for_what_is_made_of_a_data_set(options, capsys):
    data_manager.init_datasets(options(dataset=BOTH, combine=True, validate=0.4))
    out = capsys.readouterr().out
    assert out.count('Dataset statistics') == 4  # of each, and joined: to train on, and held out
    assert re.search(r'\n=> market1501 with query and gallery in the training set: 11 persons and \d+ images', out)
    assert re.search(r'\n=> market1501 without the persons held out: 7 persons and \d+ images to train on\n', out)
    assert re.search(r'\n=> validation of market1501: 4 persons, \d+ queries and \d+ images in the gallery\n', out)
    assert out.count('Held out of training: ') == 2


def test_equal_shares_of_several_sets_of_which_some_are_held_out(options, places, script, tmp_path, monkeypatch):
    dataset = data_manager.init_datasets(options(dataset=BOTH, validate=0.4))
    place = [int('toy_market1501' in path) for path, *_ in dataset.train]
    assert dataset.groups('dataset').tolist() == [*dataset.set_of] == place and {*place} == {0, 1}
    seen = []

    class Sampler(train_img_model_xent.RandomSampler):
        def __init__(self, *args):
            super().__init__(*args)
            seen.append(args[3].tolist())

    monkeypatch.setattr(train_img_model_xent, 'RandomSampler', Sampler)
    how = ['-d', BOTH, '--data-dir', places, '--validate', 0.4, '--balance', 'dataset', '--max-epoch', 2]
    log, parted = tmp_path / 'log', tmp_path / 'parted'
    assert script(XENT, *how, '--save-minutes', 1e-9, '--keep', 99, '--save-dir', log) == 0
    assert seen == [place] and [*results(log)['targets']] == BOTH.split(',')
    assert results(log / 'validation')['dataset'] == 'validation of market1501,validation of toy_market1501'
    assert script(XENT, *how, '--save-dir', parted, '--resume', log / 'resume_1_1.pth.tar') == 0
    assert equal(weights_of(log / 'checkpoint_ep2.pth.tar'), weights_of(parted / 'checkpoint_ep2.pth.tar'))


def test_a_new_person_moves_few_others():
    train = [(f'{pid}{camid}', pid, camid) for pid in range(40) for camid in (0, 1)]
    sets = [hold_out(drawn(some), 0.3, 1)[1] for some in (train, [*train, ('new0', 99, 0), ('new1', 99, 1)])]
    before, after = (persons(held, held.gallery) for held in sets)
    assert len(before - after) <= 1


def test_the_draw_of_a_folder_is_what_it_was(tmp_path):
    """The persons with the smallest digests are held out; computed here for eight persons by the rule alone."""
    import hashlib

    for person in range(8):
        for image in range(3):
            place = tmp_path / f'p{person}' / f'c1_{image}.jpg'
            place.parent.mkdir(exist_ok=True)
            place.touch()
    dataset = Folder(str(tmp_path), test_share=0.25, seed=5)

    def digest(text):
        return hashlib.sha256(f'5 {text}'.encode()).digest()

    expected = sorted((f'p{person}' for person in range(8)), key=digest)[:2]
    assert persons(dataset, dataset.gallery) == {*expected}
    images = {person: min(range(3), key=lambda image: digest(f'{person}/c1_{image}.jpg')) for person in expected}
    assert {dataset.name_of(pid): os.path.basename(path) for path, pid, _ in dataset.query} == {
        person: f'c1_{image}.jpg' for person, image in images.items()
    }


def test_of_several_sets_and_beside_combine(options, places, tmp_path, capsys):
    dataset = data_manager.init_datasets(options(dataset=BOTH, validate=0.4))
    assert isinstance(dataset, Joined) and isinstance(dataset.validation, Joined)
    assert dataset.validation.name == 'validation of market1501,validation of toy_market1501'
    assert dataset.num_train_pids == 11 - 4 and [target.name for target in dataset.targets] == BOTH.split(',')
    both = data_manager.init_datasets(options(validate=0.4, combine=True))
    held = persons(both.validation, both.validation.gallery)
    assert len(held) == 4 and both.num_train_pids == 7 and both.targets == []
    assert data_manager.init_datasets(options(validate=0.4, evaluate=True)).validation is None
    alone = tmp_path / 'alone.csv'
    table.write(drawn([('a', 1, 0), ('b', 2, 0), ('c', 3, 1)], [('q', 4, 0)], [('g', 4, 1)]), str(alone))
    capsys.readouterr()
    dataset = data_manager.init_datasets(options(dataset=f'csv:{alone},market1501', validate=0.4))
    assert dataset.validation.name == 'validation of market1501' and dataset.num_train_pids == 3 + 4
    text = f'No person of csv:{alone} is held out: none is seen by two cameras\n'
    assert text in capsys.readouterr().out
    with pytest.raises(UserError, match=r'no person can be held out of -d csv:.*, as none is seen by two cameras'):
        data_manager.init_datasets(options(dataset=f'csv:{alone}', validate=0.4))


SUFFIXES = ('.json', '.csv', '.npz', '.tar')
HOW = ['--validate', 0.4, '--max-epoch', 3, '--eval-step', 1, '--lr', 0.05]


@pytest.fixture
def validated(script, tmp_path):
    assert script(XENT, *HOW, '--save-minutes', 1e-9, '--keep', 99, '--save-dir', tmp_path / 'log') == 0
    return tmp_path / 'log'


def written(folder) -> list[tuple[str, int]]:
    """The results, checkpoints and figures in a folder, and when they were written."""
    return [(path.name, path.stat().st_mtime_ns) for path in sorted(folder.glob('*.*')) if path.suffix in SUFFIXES]


def test_the_test_set_is_used_once(validated, script, tmp_path, capsys):
    out = (validated / 'log_train.txt').read_text()
    assert out.count('==> Validation, on persons held out of training\n') == 3 and out.count('==> Test\n') == 1
    assert out.index('Testing ') > out.rindex('==> Validation') and out.index('==> Test\n') > out.index('Testing ')
    assert (
        out.count('------------------\nThe figures above are of persons held out of training, not of a test set\n') == 3
    )
    rows = rows_of(validated)
    validations = [row for row in rows if row['validation/mAP']]
    (last,) = (row for row in rows if row['mAP'])
    assert len(validations) == 3 and not any(row['mAP'] for row in validations) and not last['validation/mAP']
    best = max(validations, key=lambda row: (float(row['validation/mAP']), -int(row['epoch'])))
    assert last['epoch'] == best['epoch']
    top, held = results(validated), results(validated / 'validation')
    assert (top['dataset'], held['dataset']) == ('market1501', 'validation of market1501')
    assert held['validation'] is True and 'they are not those of a test set' in held['notices'][0]
    assert 'validation' not in top and top['notices'] == []
    state = torch.load(validated / 'best_model.pth.tar', weights_only=True)
    assert state['epoch'] + 1 == top['chosen']['epoch'] == int(best['epoch']) and state['rank1'] is None
    assert state['best_rank1'] == state['validation']['mAP'] == top['chosen']['validation_mAP']
    assert state['validation']['mAP'] == pytest.approx(float(best['validation/mAP']), abs=1e-5)
    evaluate = ['--evaluate', '--resume', validated / 'best_model.pth.tar', '--save-dir', tmp_path / 'again']
    assert script(XENT, *evaluate) == 0
    assert 'Notice' not in capsys.readouterr().out
    assert results(tmp_path / 'again')['mAP'] == top['mAP'] == pytest.approx(float(last['mAP']), abs=1e-5)
    before = written(validated)
    assert script(XENT, *HOW, '--save-dir', validated, '--auto-resume') == 0
    out = capsys.readouterr().out
    assert 'the test set is used once\n' in out and '==> Test' not in out
    assert 'best validation mAP so far' in out and 'Rank-1 so far' not in out
    assert written(validated) == before


def test_an_interrupted_run_makes_up_for_its_last_test(validated, script, tmp_path, monkeypatch, capsys):
    top = results(validated)
    for name in ('results.json', 'results.csv', 'ranking.npz'):
        (validated / name).unlink()
    again = ['--save-dir', validated, '--auto-resume']
    monkeypatch.setattr(best_model, 'load', lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    assert script(XENT, *HOW, *again) == 143
    monkeypatch.undo()
    (tmp_path / 'elsewhere').mkdir()
    capsys.readouterr()
    assert script(XENT, *HOW, *again) == 0
    assert capsys.readouterr().out.count('==> Test\n') == 1
    assert {**results(validated), 'date': 0, 'command': 0} == {**top, 'date': 0, 'command': 0}


def test_a_last_test_that_is_killed_is_completed(places, script, tmp_path, monkeypatch, capsys):
    """Interrupted at each file that it writes; another run changes nothing, even if --evaluate replaced the results."""
    monkeypatch.setattr('conftest.TINY', [option for option in TINY if option != '--no-report'])
    monkeypatch.setattr(page, 'write', lambda folder: (Path(folder) / 'report.html').write_text(''))  # takes no time
    how = ['--validate', 0.4, '-t', BOTH, '--data-dir', places, '--max-epoch', 1, '--save-dir', tmp_path]
    below = tmp_path / 'targets' / 'toy_market1501'

    def killed(module, name, when):
        whole = getattr(module, name)

        def act(*args):
            if when(*args):
                raise SystemExit(9)
            return whole(*args)

        with monkeypatch.context() as patch:
            patch.setattr(module, name, act)
            assert script(XENT, *how, '--auto-resume') == 9
        return capsys.readouterr().out.count('==> Test\n')

    def again():
        """How often it is tested, and the rows of tests in metrics.csv."""
        assert script(XENT, *how, '--auto-resume') == 0
        return capsys.readouterr().out.count('==> Test\n'), len([row for row in rows_of(tmp_path) if row['mAP']])

    assert killed(files, 'write_whole', lambda path, *_: path == below / 'results.json') == 1
    assert killed(files, 'write_whole', lambda path, *_: path == tmp_path / 'ranking.npz') == 1
    assert (below / 'report.html').exists() and not (tmp_path / 'results.json').exists()
    assert killed(best_model, 'record', lambda *_: True) == 1
    assert killed(LossMeter, 'tested', lambda meter, epoch, figures: 'mAP' in figures) == 1
    assert killed(files, 'write_page', lambda folder, *_: folder == tmp_path) == 0
    assert again() == (0, 1) and (tmp_path / 'report.html').exists()
    evaluate = ['--evaluate', '--resume', tmp_path / 'best_model.pth.tar', '--save-dir', tmp_path]
    assert script(XENT, *evaluate) == 0
    before = written(tmp_path)
    capsys.readouterr()
    assert again() == (0, 1) and written(tmp_path) == before
    (tmp_path / 'results.json').unlink()
    assert again() == (1, 1)


def test_a_resumed_run_validates_on_the_same_persons(validated, script, tmp_path, capsys):
    position, parted = validated / 'resume_2_1.pth.tar', tmp_path / 'parted'
    assert script(XENT, *HOW, '--save-dir', parted, '--resume', position) == 0
    assert equal(weights_of(validated / 'checkpoint_ep3.pth.tar'), weights_of(parted / 'checkpoint_ep3.pth.tar'))
    assert results(parted / 'validation')['mAP'] == results(validated / 'validation')['mAP']
    assert results(parted)['mAP'] == results(validated)['mAP']  # best_model.pth.tar may be that of the other folder
    capsys.readouterr()
    assert script(XENT, *HOW, '--validate', 0.5, '--save-dir', tmp_path / 'x', '--resume', position) == 2
    assert '--validate was 0.4, is 0.5' in capsys.readouterr().err


def test_the_pages_tell_them_apart(script, tmp_path, monkeypatch):
    monkeypatch.setattr('conftest.TINY', [option for option in TINY if option != '--no-report'])
    log = tmp_path / 'log'
    assert script(XENT, '--validate', 0.4, '--max-epoch', 2, '--eval-step', 1, '--save-dir', log) == 0
    top, held = ((folder / 'report.html').read_text() for folder in (log, log / 'validation'))
    assert '<h1>market1501, tiny</h1>' in top and '<h1>validation of market1501, tiny</h1>' in held
    assert 'Notice: these figures are for persons held out of the training set' in held and 'Notice' not in top
    assert 'mAP on persons held out</b></li>' in top and 'persons held out</b></li>' not in held
    for html in (top, held):
        assert '<h3>Validation during training</h3>' in html and '<h3>Tests during training</h3>' not in html
        assert '<h3>Loss</h3>' in html or '<h3>Learning rate</h3>' in html
    run = runs.read(log)
    assert len(run.curve('validation/mAP')[0]) == 2 and len(run.curve('mAP')[0]) == 1
    assert page.write(log / 'validation').exists()
    assert script(XENT, '--max-epoch', 1, '--save-dir', log, '--overwrite') == 0
    assert not (log / 'validation').exists() and 'chosen' not in results(log)


def test_tensorboard_has_names_of_their_own(script, tmp_path, monkeypatch):
    pytest.importorskip('tensorboard')
    from torch.utils.tensorboard import SummaryWriter

    tags, add = [], SummaryWriter.add_scalar
    monkeypatch.setattr(SummaryWriter, 'add_scalar', lambda *args: tags.append(args[1]) or add(*args))
    assert script(XENT, '--validate', 0.4, '--max-epoch', 1, '--tensorboard', '--save-dir', tmp_path) == 0
    assert tags.index('validation/mAP') < tags.index('test/mAP') and tags.count('test/mAP') == 1


def test_two_processes(places, tmp_path, script):
    """Both processes test each data set with the weights read by the first one, with the figures of one process."""
    how = [*TINY, '--validate', 0.4, '--data-dir', places, '--pretrained', 'none', '--train-batch', 8, '--lr', 0.05]
    how += ['--max-epoch', 3, '--eval-step', 1, '-t', BOTH, '--save-dir', tmp_path]
    two = torchrun(2, ROOT / 'tests/tiny.py', f'{HTRI}.py', *how)
    assert (two.returncode, two.stderr) == (0, ''), two.stderr
    again = ['--evaluate', '--resume', tmp_path / 'best_model.pth.tar', '-t', BOTH, '--data-dir', places]
    assert script(HTRI, *again, '--save-dir', tmp_path / 'again') == 0
    tested = [
        {name: row['mAP'] for name, row in results(folder)['targets'].items()}
        for folder in (tmp_path, tmp_path / 'again')
    ]
    assert tested[0] == tested[1] and [*tested[0]] == BOTH.split(',')


def test_videos_and_no_test_set(places, tmp_path, script, capsys):
    """A data set with training persons only is validated on them, and nothing is tested."""
    only = tmp_path / 'only.csv'
    (dataset,) = read(places, 'mars')
    dataset.query, dataset.gallery = [], []
    table.write(dataset, str(only))
    log = tmp_path / 'log'
    assert script(VIDEO, '-d', f'csv:{only}', '--validate', 0.3, '--max-epoch', 1, '--save-dir', log) == 0
    out = capsys.readouterr().out
    assert 'has no query, and is not tested' in out and '==> Test' not in out
    assert (log / 'best_model.pth.tar').exists() and not (log / 'results.json').exists()
    assert script(VIDEO, '-d', f'csv:{only}', '--validate', 0.3, '-t', 'mars', '--max-epoch', 1, '--data-dir', places,
                  '--save-dir', tmp_path / 'tested') == 0  # fmt: skip
    assert results(tmp_path / 'tested')['dataset'] == 'mars'


def test_a_validation_takes_single_queries(script, tmp_path):
    """One item of each person and camera is a query, so the validation has nothing to average, unlike the test."""
    assert script(XENT, '--validate', 0.4, '--multi-query', '--max-epoch', 1, '--save-dir', tmp_path) == 0
    assert results(tmp_path)['multi_query']['items'] > 0 and results(tmp_path / 'validation')['multi_query'] is False


def test_a_best_model_that_is_gone_is_one_line(validated, script, capsys):
    (validated / 'best_model.pth.tar').unlink()
    assert script(XENT, *HOW, '--save-dir', validated, '--auto-resume') == 2
    err = capsys.readouterr().err
    assert err.count('\n') == 1 and 'best_model.pth.tar is missing, so nothing was tested' in err


@pytest.mark.parametrize(
    ('options', 'flag'),
    [(['--validate', 0.4], '--validate'), (['--combine'], '--combine'), (['-t', 'toy_market1501'], '-t'), ([], '')],
)
@pytest.mark.parametrize('evaluate', [False, True])
def test_a_script_that_reads_one_data_set(options, flag, evaluate, places, script, tmp_path, monkeypatch, capsys):
    """As in copies of scripts that are older than these options: no option is silently ignored."""
    text = (ROOT / f'{XENT}.py').read_text()
    text = re.sub(r'    checkpoint\.last_test.*\n', '', text)
    old = 'init_dataset(args.dataset, args.data_dir, not args.evaluate)'
    (tmp_path / 'train_img_model_old.py').write_text(text.replace('init_datasets(args.data)', old))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, 'train_img_model_old', raising=False)
    how = ['--data-dir', places, '--max-epoch', 1, '--save-dir', tmp_path / 'log', *['--evaluate'] * evaluate]
    refused = flag and not (evaluate and flag in ('--validate', '--combine'))  # which are ignored then
    assert script('train_img_model_old', *options, *how) == (2 if refused else 0)
    if refused:
        assert f'error: this script does not know {flag}: create its data set with' in capsys.readouterr().err


@pytest.mark.parametrize(
    ('options', 'text'),
    [
        (['--validate', 1], '--validate 1: no person would be left to train on; give a share below 1'),
        (['--validate', 1.5], '--validate: must be a number from 0 to 1'),
        (['--validate', 0.3, '--select', 'market1501'], '--select does not work with --validate'),
    ],
)
def test_mistakes(options, text, script, tmp_path, capsys):
    assert script(XENT, *options, '--save-dir', tmp_path) == 2
    err = capsys.readouterr().err
    assert err.startswith('error: ') and text in err and err.count('\n') == 1
