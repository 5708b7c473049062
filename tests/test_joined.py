"""Several data sets: joint training, separate tests, and one table."""

import csv
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY
from test_own_data import equal, results, weights_of

import data_manager
import page
from arguments import DataOptions
from readers import table
from readers.joined import Joined
from readers.tree import Dataset, distractors, train_items
from runtime import commands, targets
from runtime.errors import UserError

XENT, HTRI, VIDEO = 'train_img_model_xent', 'train_img_model_xent_htri', 'train_vid_model_xent'
BOTH = 'market1501,toy_market1501'


def read(folder, *names) -> list[Dataset]:
    return [data_manager.init_dataset(name, str(folder)) for name in names]


def rows_of(folder) -> list[dict]:
    with open(folder / 'metrics.csv', newline='', encoding='utf-8') as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize(
    ('text', 'names'),
    [
        ('market1501', ['market1501']),
        (BOTH, ['market1501', 'toy_market1501']),
        ('csv:a,b.csv,market1501', ['csv:a,b.csv', 'market1501']),
        ('folder:/x, y/z,csv:a.csv,market:/m', ['folder:/x, y/z', 'csv:a.csv', 'market:/m']),
        ('csv:/d,market1501/a.csv', ['csv:/d,market1501/a.csv']),
        ('market1501,nothing', ['market1501,nothing']),
        ('', ['']),
    ],
)
def test_a_comma_separates_names_and_no_paths(text, names):
    assert data_manager.names_of(text) == names


@pytest.mark.parametrize('names', [BOTH, 'mars,toy_mars'])
def test_persons_and_cameras_are_kept_apart(names, places):
    one, other = read(places, *names.split(','))
    both = Joined([one, other])
    assert both.name == names and both.kind == one.kind and both.targets == [both] and not both.untrainable
    assert both.num_train_pids == one.num_train_pids + other.num_train_pids
    assert both.set_of == [0] * len(one.train) + [1] * len(other.train) and one.set_of == [0] * len(one.train)
    assert [item[0] for item in both.train] == [item[0] for item in one.train + other.train]
    labels = [label for _, label, _ in one.train] + [label + one.num_train_pids for _, label, _ in other.train]
    assert [label for _, label, _ in both.train] == labels
    seen = []
    for dataset in (one, other):
        place = {item[0]: item[1:] for items in (train_items(both), both.query, both.gallery) for item in items}
        items = [*train_items(dataset), *dataset.query, *dataset.gallery]
        persons = {pid for _, pid, _ in items if pid}
        assert {both.name_of(place[paths][0]) for paths, pid, _ in items if pid} == {
            f'{dataset.name}/{pid}' for pid in persons
        }
        assert {place[paths][0] for paths, pid, _ in items if not pid} == {0}  # distractors
        seen.append([{place[paths][column] for paths, pid, _ in items if pid or column} for column in (0, 1)])
    for first, second in zip(*seen, strict=True):
        assert not first & second and max(first) < min(second)
    assert data_manager.digests(both)[: one.num_train_pids] != data_manager.digests(one)
    turned = Joined([other, one])
    assert sorted(data_manager.digests(turned)) == sorted(data_manager.digests(both))
    assert data_manager.digests(turned) != data_manager.digests(both)


def test_one_of_unknown_cameras_makes_all_unknown(places):
    (one,) = read(places, 'market1501')
    unknown = Dataset('b', [('x', 1, 0), ('y', 2, 0)], [('q', 3, 0)], [('g', 3, 0)], no_cameras=True)
    both = Joined([one, unknown])
    assert both.no_cameras and {camid for _, _, camid in both.train + both.query + both.gallery} == {0}


def test_what_cannot_be_joined(places):
    one, video = read(places, 'market1501', 'mars')
    copy = Dataset('copy', [*one.train[:2], ('z', 9, 0)], [], [])
    for datasets, text in (
        ([one, video], '-d: market1501 has images, and mars has videos; give data sets of one kind'),
        ([one, one], '-d: market1501 is given twice; give each data set once'),
        ([one, copy], f'-d: market1501 and copy share 2 files of their training sets, the first one {one.train[0][0]}'),
    ):
        with pytest.raises(UserError, match=re.escape(text)):
            Joined(datasets)


def test_a_link_does_not_hide_that_data_are_the_same(places, tmp_path, capsys):
    """data/README.md recommends links."""
    (tmp_path / 'linked').symlink_to(places / 'market1501')
    one, other = (
        data_manager.init_dataset('market1501', str(places)),
        data_manager.init_dataset(f'market:{tmp_path}/linked'),
    )
    with pytest.raises(UserError, match=f'share {len(one.train)} files of their training sets'):
        Joined([one, other])
    options = DataOptions('market1501', targets=f'market:{tmp_path}/linked', combine=True, data_dir=str(places))
    capsys.readouterr()
    data_manager.init_datasets(options)
    assert 'that are tested are trained on\n' in capsys.readouterr().out


def test_the_merged_table_reads_the_same(places, tmp_path, monkeypatch, capsys):
    place = tmp_path / 'a,b.csv'
    command = ['data_manager.py', '-d', BOTH, '--data-dir', places, '--write-csv', place]
    monkeypatch.setattr('sys.argv', [*map(str, command)])
    assert data_manager.main() == 0
    both = Joined(read(places, *BOTH.split(',')))
    again = data_manager.init_dataset(f'csv:{place}')
    for subset in ('train', 'query', 'gallery'):
        pairs = zip(getattr(both, subset), getattr(again, subset), strict=True)
        assert all(Path(one[0]) == Path(other[0]).resolve() for one, other in pairs)
    items = [*train_items(both), *both.query, *both.gallery], [*train_items(again), *again.query, *again.gallery]
    names = [[dataset.name_of(pid) for _, pid, _ in some] for dataset, some in zip((both, again), items, strict=True)]
    assert names[0] == names[1] and 'market1501/2' in names[0] and 'toy_market1501/2' in names[0]
    cameras = [[dataset.camera_names[camid] for *_, camid in some]
               for dataset, some in zip((both, again), items, strict=True)]  # fmt: skip
    assert cameras[0] == cameras[1]
    assert distractors(both) == {0} and {again.name_of(pid) for pid in distractors(again)} == {'0'}


def test_each_is_checked(places, tmp_path, monkeypatch, capsys):
    fine = tmp_path / 'fine.csv'
    table.write(read(places, 'toy_market1501')[0], str(fine))
    capsys.readouterr()
    for names, status in ((f'csv:{fine},toy_market1501', 0), (f'toy_market1501,market1501,csv:{fine}', 1)):
        monkeypatch.setattr('sys.argv', ['data_manager.py', '-d', names, '--data-dir', str(places), '-j', '1'])
        with pytest.raises(SystemExit) as end:
            commands.run(data_manager.main)
        assert (end.value.code or 0) == status
        lines = re.findall(r'^(.*): \d+ kinds? of faults', capsys.readouterr().out, re.M)
        assert lines == data_manager.names_of(names)


@pytest.fixture
def options(places):
    def make(**changes):
        return DataOptions(**{'dataset': BOTH, 'data_dir': str(places), **changes})

    return make


def test_which_are_tested(options, places, tmp_path, capsys):
    def tested(**changes):
        return [target.name for target in data_manager.init_datasets(options(**changes)).targets]

    assert tested() == BOTH.split(',')
    assert tested(select='toy_market1501') == ['toy_market1501', 'market1501']
    assert tested(dataset='market1501') == tested(dataset='market1501', targets='market1501') == ['market1501']
    assert tested(dataset='market1501', targets='toy_market1501') == ['toy_market1501']
    single = data_manager.init_datasets(options(dataset='market1501', targets=BOTH))
    assert single.targets[0] is single and single.num_train_pids == 6
    only = tmp_path / 'train.csv'
    (dataset,) = read(places, 'toy_market1501')
    dataset.query = []
    table.write(dataset, str(only))
    capsys.readouterr()
    assert tested(dataset=f'csv:{only},market1501') == ['market1501']
    assert f'csv:{only} has no query, and is not tested\n' in capsys.readouterr().out
    with pytest.raises(UserError, match=r'--select csv:.*: it is not tested; choose one of market1501'):
        tested(dataset=f'csv:{only},market1501', select=f'csv:{only}')


def test_with_evaluate_nothing_of_d_is_read(options, capsys):
    dataset = data_manager.init_datasets(options(dataset='msmt17', targets=BOTH, evaluate=True))
    assert [target.name for target in dataset.targets] == BOTH.split(',')
    assert capsys.readouterr().out.count('Initializing dataset') == 2


def test_names_of_folders_are_readable_and_safe():
    names = ['a', 'csv:/x/my people.csv', 'csv:/y/my people.csv', 'market1501', 'folder:..', 'csv:/x/\n\udcff/']
    first, *others = targets.folders('log', names)
    assert first == 'log' and len(set(others)) == 5 and others[2] == 'log/targets/market1501'
    assert all(re.fullmatch(r'log/targets/csv_my_people\.csv_[0-9a-f]{8}', folder) for folder in others[:2])
    again = ['csv:/y/my people.csv', 'market1501', 'csv:/x/my people.csv']  # another order, and one is the first
    assert targets.folders('log', again) == ['log', others[2], others[0]]
    with pytest.raises(UserError, match='two data sets that are tested have the name a'):
        targets.folders('log', ['a', 'b', 'a'])
    assert all(re.fullmatch(r'log/targets/\w[\w.-]*', folder) for folder in others)


@pytest.mark.parametrize('name', [XENT, HTRI])
def test_training_on_two_and_testing_on_each(name, places, tmp_path, script, capsys):
    """A row for each in print, results.json and metrics.csv; a run that was interrupted ends with the same weights."""
    log, parted = tmp_path / 'log', tmp_path / 'parted'
    how = ['-d', BOTH, '--data-dir', places, '--max-epoch', 2, '--eval-step', 1]
    assert script(name, *how, '--save-minutes', 1e-9, '--keep', 99, '--save-dir', log) == 0
    out = capsys.readouterr().out
    assert 'train    |    11 |       44' in out  # of both together
    assert out.count('Target market1501\n') == out.count('Target toy_market1501\n') == 2
    assert out.count('Results ----------') == 4 and out.count('Targets ----------\n') == 2
    top, below = results(log), results(log / 'targets' / 'toy_market1501')
    assert (top['dataset'], below['dataset']) == ('market1501', 'toy_market1501') and 'targets' not in below
    assert list(top['targets']) == BOTH.split(',')
    for found, figures in zip((top, below), top['targets'].values(), strict=True):
        assert (figures['mAP'], figures['rank1']) == (found['mAP'], found['cmc'][0])
    last = rows_of(log)[-1]
    assert float(last['mAP']) == pytest.approx(top['mAP'], abs=1e-5)
    assert float(last['toy_market1501/mAP']) == pytest.approx(below['mAP'], abs=1e-5)
    assert len(re.findall(r'^toy_market1501 .*%$', out, re.M)) == 2
    state = torch.load(log / 'best_model.pth.tar', weights_only=True)
    tests = [row for row in rows_of(log) if row['rank1']]
    assert state['rank1'] == pytest.approx(max(float(row['rank1']) for row in tests), abs=1e-5)
    position = sorted(log.glob('resume_1_*.pth.tar'))[0]
    assert script(name, *how, '--save-dir', parted, '--resume', position) == 0
    assert equal(weights_of(log / 'checkpoint_ep2.pth.tar'), weights_of(parted / 'checkpoint_ep2.pth.tar'))
    capsys.readouterr()
    how[1] = ','.join(reversed(BOTH.split(',')))
    assert script(name, *how, '--save-dir', tmp_path / 'other', '--resume', position) == 2
    assert f'--dataset was {BOTH}, is toy_market1501,market1501' in capsys.readouterr().err
    state = torch.load(position, weights_only=True)
    state['recipe']['dataset'] = how[1]
    torch.save(state, tmp_path / 'altered.pth.tar')
    assert script(name, *how, '--save-dir', tmp_path / 'other', '--resume', tmp_path / 'altered.pth.tar') == 2
    assert '11 of 11 labels mean other persons' in capsys.readouterr().err


def test_the_best_model_goes_by_the_selected_one(places, tmp_path, script):
    how = ['-d', 'market1501', '-t', BOTH, '--data-dir', places, '--max-epoch', 3, '--eval-step', 1, '--lr', 0.05]
    for select, other in (('market1501', 'toy_market1501'), ('toy_market1501', 'market1501')):
        log = tmp_path / select
        assert script(XENT, *how, '--select', select, '--save-dir', log) == 0
        assert results(log)['dataset'] == select and results(log / 'targets' / other)['dataset'] == other
        tests = [row for row in rows_of(log) if row['rank1']]
        assert set(tests[0]) >= {'rank1', f'{other}/rank1'} and f'{select}/rank1' not in tests[0]
        best = max(tests, key=lambda row: (float(row['rank1']), -int(row['epoch'])))
        assert torch.load(log / 'best_model.pth.tar', weights_only=True)['epoch'] + 1 == int(best['epoch'])
    one, other = ([row for row in rows_of(tmp_path / name) if row['rank1']] for name in BOTH.split(','))
    assert [row['rank1'] for row in one] == [row['market1501/rank1'] for row in other]  # the same runs


def test_the_page_has_a_row_and_a_link_for_each(places, tmp_path, script, monkeypatch):
    monkeypatch.setattr('conftest.TINY', [option for option in TINY if option != '--no-report'])
    log = tmp_path / 'log'
    how = ['-d', 'toy_market1501', '-t', f'market1501,market:{places}/toy_market1501', '--data-dir', places]
    assert script(XENT, *how, '--max-epoch', 1, '--save-features', '--save-dir', log) == 0
    html = (log / 'report.html').read_text()
    assert '<table id="targets">' in html and '<tr><th>market1501</th><td>' in html
    (link,) = re.findall(r'<a href="(targets/[^"]*)">market:', html)
    assert '<table id="targets">' not in (log / link).read_text()
    assert (log / 'features/query/features.npy').exists() and (log / link).with_name('features').is_dir()
    assert page.write(log) == log / 'report.html'
    damaged = results(log)
    damaged['targets']['market1501'] = {}
    (log / 'results.json').write_text(json.dumps(damaged))
    with pytest.raises(UserError, match='contains damaged results'):
        page.write(log)


def test_cameras_are_a_matter_of_each_target(places, tmp_path, script):
    (dataset,) = read(places, 'toy_market1501')
    dataset.no_cameras = True
    table.write(dataset, str(tmp_path / 'unknown.csv'))
    log = tmp_path / 'log'
    how = ['--data-dir', places, '-t', f'market1501,csv:{tmp_path}/unknown.csv', '--max-epoch', 1, '--save-dir', log]
    assert script(XENT, *how) == 0
    assert results(log)['any_camera'] is False
    assert results(log / 'targets' / 'csv_unknown.csv')['any_camera'] is True


def test_overwrite_clears_what_a_run_wrote_below_its_folder(places, tmp_path, script):
    log = tmp_path / 'log'
    how = ['-d', 'market1501', '--data-dir', places, '--max-epoch', 1, '--save-dir', log]
    assert script(XENT, *how, '-t', BOTH) == 0
    below = log / 'targets' / 'toy_market1501'
    assert (below / 'results.json').exists()
    mine = log / 'targets' / 'mine'
    mine.mkdir()
    shutil.copy(log / 'results.json', mine)  # of a test of its own
    assert script(XENT, *how, '--overwrite') == 0
    assert not below.exists() and [*mine.iterdir()] == [mine / 'results.json'] and 'targets' not in results(log)
    assert script(XENT, *how, '-t', BOTH, '--overwrite') == 0 and (below / 'results.json').exists()


def test_evaluate_on_others(places, tmp_path, script, capsys):
    """Without the data that the weights were trained on; each notice names the data set."""
    assert script(XENT, '-d', BOTH, '--data-dir', places, '--max-epoch', 1, '--save-dir', tmp_path / 'log') == 0
    capsys.readouterr()
    evaluate = ['--evaluate', '--resume', tmp_path / 'log' / 'checkpoint_ep1.pth.tar', '--data-dir', places]
    assert script(XENT, *evaluate, '-d', 'msmt17', '-t', BOTH, '--save-dir', tmp_path / 'again') == 0
    assert 'Notice' not in capsys.readouterr().out  # both are data that it was trained on
    assert results(tmp_path / 'again')['targets'] == results(tmp_path / 'log')['targets']
    name = f'market:{places}/toy_market1501'
    assert script(XENT, *evaluate, '-t', f'market1501,{name}', '--save-dir', tmp_path / 'again') == 0
    (notice,) = re.findall(r'Notice: (.*)', capsys.readouterr().out)
    assert notice.endswith(f'was trained with -d {BOTH}, and is tested with -d {name}')
    assert results(tmp_path / 'again')['notices'] == []  # of market1501


def test_evaluate_where_one_of_two_can_be_tested(places, tmp_path, script, capsys):
    """The tested data set is compared by its own name, not by that of both, which has other files."""
    only = tmp_path / 'train.csv'
    (dataset,) = read(places, 'toy_market1501')
    dataset.query = []
    table.write(dataset, str(only))
    how = ['-d', f'csv:{only},market1501', '--data-dir', places, '--save-dir', tmp_path / 'log']
    assert script(XENT, *how, '--max-epoch', 1) == 0
    capsys.readouterr()
    assert script(XENT, *how, '--evaluate', '--resume', tmp_path / 'log' / 'checkpoint_ep1.pth.tar') == 0
    assert 'Notice' not in capsys.readouterr().out


def test_videos(places, tmp_path, script, capsys):
    log = tmp_path / 'log'
    how = ['-d', 'mars,toy_mars', '--data-dir', places, '--max-epoch', 1, '--save-dir', log]
    assert script(VIDEO, *how) == 0
    assert list(results(log)['targets']) == ['mars', 'toy_mars']
    assert weights_of(log / 'checkpoint_ep1.pth.tar')['classifier.weight'].shape[0] == 7
    assert script(VIDEO, *how, '--overwrite', '-t', 'mars,mars_official', '--select', 'mars_official') == 0
    assert results(log)['dataset'] == 'mars_official' and results(log / 'targets' / 'mars')['dataset'] == 'mars'


def test_a_table_with_a_comma_in_its_name_and_an_object_of_one_s_own(places, tmp_path, script, monkeypatch):
    one, other = read(places, *BOTH.split(','))
    table.write(other, str(tmp_path / 'a,b.csv'))
    own = SimpleNamespace(train=train_items(one), query=one.query, gallery=one.gallery)
    monkeypatch.setitem(data_manager.IMAGES, 'own', lambda data_dir: own)
    log, names = tmp_path / 'log', f'own,csv:{tmp_path}/a,b.csv'
    assert script(XENT, '-d', names, '--max-epoch', 1, '--save-dir', log) == 0
    assert list(results(log)['targets']) == ['own', f'csv:{tmp_path}/a,b.csv']
    named = tmp_path / 'named'
    assert script(XENT, '-d', BOTH, '--data-dir', places, '--max-epoch', 1, '--save-dir', named) == 0
    assert equal(weights_of(log / 'checkpoint_ep1.pth.tar'), weights_of(named / 'checkpoint_ep1.pth.tar'))


@pytest.mark.parametrize(
    ('options', 'text'),
    [
        (['-t', 'mars'], '-t mars contains tracklets, but train_img_model_xent.py tests images: choose one of'),
        (['-t', 'nothing'], '-t nothing: no such data set; choose one of'),
        (['-d', 'market1501,mars'], '-d mars contains tracklets, but train_img_model_xent.py trains on images'),
        (['-d', 'market1501,nothing'], '-d market1501,nothing: no such data set'),
        (['-d', 'market1501,market1501'], '-d: market1501 is given twice; give each data set once'),
        (['-t', 'market1501,market1501'], '-t: market1501 is given twice; give each data set once'),
        (['-d', BOTH, '--select', 'msmt17'], '--select msmt17: it is not tested; choose one of market1501, toy_market'),
        (['--select', 'toy_market1501'], '--select toy_market1501: it is not tested; choose one of market1501'),
    ],
)
def test_mistakes(options, text, script, tmp_path, capsys):
    assert script(XENT, *options, '--save-dir', tmp_path) == 2
    err = capsys.readouterr().err
    assert err.startswith(f'error: {text}') and err.count('\n') == 1
