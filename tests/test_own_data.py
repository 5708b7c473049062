"""Training and tests on the user's own data: equal figures in each form, names, unknown cameras, changed labels."""

import csv
import json
import os
import shutil

import pytest
import torch

import data_manager
import page
from readers import table

XENT, VIDEO = 'train_img_model_xent', 'train_vid_model_xent'


@pytest.fixture
def market(data_dir) -> str:
    return f'{data_dir}/market1501'


@pytest.fixture
def people(market, tmp_path) -> str:
    """The same images in a folder for each person, whose names are not numbers, in the published split."""
    for split, part in (('train', 'bounding_box_train'), ('query', 'query'), ('gallery', 'bounding_box_test')):
        for name in os.listdir(f'{market}/{part}'):
            if not name.startswith('-1'):
                folder = tmp_path / 'people' / split / f'Nr. {name[:4]}'
                folder.mkdir(parents=True, exist_ok=True)
                (folder / name).symlink_to(f'{market}/{part}/{name}')
    return str(tmp_path / 'people')


def results(folder) -> dict:
    return json.loads((folder / 'results.json').read_text())


def weights_of(path) -> dict:
    return torch.load(path, weights_only=True)['state_dict']


def equal(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_each_form_of_a_data_set_gives_equal_weights_and_figures(market, people, data_dir, tmp_path, script):
    """The order of persons, and so of labels, is the same in all; a folder's images are sorted as Market1501's are."""
    table.write(data_manager.init_dataset('market1501', str(data_dir)), str(tmp_path / 'a b.csv'))
    forms = {
        'named': 'market1501',
        'market': f'market:{market}',
        'csv': f'csv:{tmp_path}/a b.csv',
        'folder': f'folder:{people}',
    }
    for form, name in forms.items():
        assert script(XENT, '-d', name, '--max-epoch', 1, '--save-dir', tmp_path / form) == 0
    for form in forms:
        assert equal(
            weights_of(tmp_path / form / 'checkpoint_ep1.pth.tar'),
            weights_of(tmp_path / 'named/checkpoint_ep1.pth.tar'),
        )
        one, other = results(tmp_path / form), results(tmp_path / 'named')
        for figure in ('mAP', 'mINP', 'cmc', 'queries', 'gallery'):
            assert one[figure] == other[figure], (form, figure)
        if form != 'folder':
            assert one['test_fingerprint'] == other['test_fingerprint']
    evaluated = tmp_path / 'evaluated'
    arguments = ['--evaluate', '--resume', tmp_path / 'named' / 'checkpoint_ep1.pth.tar', '--save-dir', evaluated]
    assert script(XENT, '-d', forms['csv'], *arguments) == 0
    assert results(evaluated)['mAP'] == results(tmp_path / 'named')['mAP']


def test_videos_from_a_table(data_dir, tmp_path, script):
    table.write(data_manager.init_dataset('mars', str(data_dir)), str(tmp_path / 'mars.csv'))
    for form, name in {'named': 'mars', 'csv': f'csv:{tmp_path}/mars.csv'}.items():
        assert script(VIDEO, '-d', name, '--max-epoch', 1, '--save-dir', tmp_path / form) == 0
    assert equal(*(weights_of(tmp_path / form / 'checkpoint_ep1.pth.tar') for form in ('named', 'csv')))
    assert results(tmp_path / 'csv')['mAP'] == results(tmp_path / 'named')['mAP']


def test_videos_from_folders(data_dir, tmp_path, script):
    """A folder for each tracklet, in one for each person; the gallery is in another order than in the tables."""
    dataset = data_manager.init_dataset('mars', str(data_dir))
    train = [(paths, dataset.train_pids[label], camid) for paths, label, camid in dataset.train]
    for split, items in (('train', train), ('query', dataset.query), ('gallery', dataset.gallery)):
        for number, (paths, pid, camid) in enumerate(items):
            folder = tmp_path / 'clips' / split / f'{pid:04d}' / f'{number:03d}_c{camid + 1}'
            folder.mkdir(parents=True)
            for path in paths:
                (folder / os.path.basename(path)).symlink_to(path)
    for form, name in {'named': 'mars', 'folder': f'folder:{tmp_path}/clips'}.items():
        assert script(VIDEO, '-d', name, '--max-epoch', 1, '--save-dir', tmp_path / form) == 0
    assert equal(*(weights_of(tmp_path / form / 'checkpoint_ep1.pth.tar') for form in ('named', 'folder')))
    assert results(tmp_path / 'folder')['mAP'] == pytest.approx(results(tmp_path / 'named')['mAP'])


def test_results_name_the_persons(people, tmp_path, script):
    assert script(XENT, '-d', f'folder:{people}', '--max-epoch', 1, '--save-dir', tmp_path / 'log') == 0
    with open(tmp_path / 'log' / 'results.csv', newline='', encoding='utf-8') as file:
        rows = list(csv.DictReader(file))
    assert all(row['pid'] == f'Nr. {os.path.basename(row["query"])[:4]}' for row in rows)
    assert {row['nearest_wrong'][:4] for row in rows} <= {'Nr. ', ''}
    html = page.write(tmp_path / 'log').read_text()
    assert f'<option value="{rows[0]["pid"]}">' in html and f'Identity {rows[0]["pid"]}, camera' in html
    assert f'data-pid="{rows[0]["pid"]}"' in html
    checkpoint = (tmp_path / 'log' / 'checkpoint_ep1.pth.tar').read_bytes()
    assert b'Nr. 0' not in checkpoint  # digests of the names alone
    assert len(torch.load(tmp_path / 'log' / 'checkpoint_ep1.pth.tar', weights_only=True)['labels']) == 6


def test_unknown_cameras_are_tested_with_any_camera(people, tmp_path, script, capsys):
    for number, (folder, _, names) in enumerate(os.walk(people)):
        for name in names:
            os.rename(f'{folder}/{name}', f'{folder}/{number} {name.replace("_c", "_x")}')
    log = tmp_path / 'log'
    assert script(XENT, '-d', f'folder:{people}', '--max-epoch', 2, '--eval-step', 1, '--save-dir', log) == 0
    printed = capsys.readouterr().out
    assert printed.count('The cameras are unknown: a test counts matches from any camera, as with --any-camera\n') == 1
    assert (
        printed.count("Any camera: matches from the query's own camera count too") == 2
    )  # each test reports what it counts
    assert results(log)['any_camera'] is True
    with open(log / 'results.csv', newline='', encoding='utf-8') as file:
        assert {row['camid'] for row in csv.DictReader(file)} == {''}
    assert script(XENT, '-d', f'folder:{people}', '--evaluate', '--multi-query', '--save-dir', log) == 2
    assert '--multi-query: the cameras of folder:' in capsys.readouterr().err


def test_a_drawn_split_is_recorded(people, tmp_path, script, capsys):
    names = f'folder:{people}/train'
    for number, options in enumerate((['--test-share', 0.4, '--seed', 3], ['--test-share', 0.4], ['--seed', 3])):
        log = tmp_path / str(number)
        assert script(XENT, '-d', names, '--max-epoch', 1, '--train-batch', 4, '--save-dir', log, *options) == 0
        state = torch.load(log / 'checkpoint_ep1.pth.tar', weights_only=True)
        assert (state['recipe']['test_share'], state['recipe']['seed']) == ((0.4, 3), (0.4, 1), (0.5, 3))[number]
        assert results(log)['split'].startswith(f'Split by identity: {(2, 2, 3)[number]} of 6 persons are for the test')
    capsys.readouterr()
    resume = ['--resume', tmp_path / '0' / 'checkpoint_ep1.pth.tar', '--max-epoch', 2, '--train-batch', 4, '--seed', 3]
    assert script(XENT, '-d', names, *resume, '--save-dir', tmp_path / 'x', '--test-share', 0.5) == 2
    assert '--test-share was 0.4, is 0.5. Use its values' in capsys.readouterr().err
    evaluate = ['--evaluate', '--resume', tmp_path / '0' / 'checkpoint_ep1.pth.tar', '--test-share', 0.4, '--save-dir']
    assert script(XENT, '-d', names, *evaluate, tmp_path / 'y', '--seed', 4) == 0
    out = capsys.readouterr().out
    assert 'persons of that training may be among those tested' in out


def test_a_run_with_another_table_of_labels_does_not_resume(people, tmp_path, script, capsys):
    """A person with another's label would be mistaken for that person."""
    log, names = tmp_path / 'log', sorted(os.listdir(f'{people}/train'))
    command = [XENT, '-d', f'folder:{people}', '--save-dir', log, '--max-epoch']
    assert script(*command, 1) == 0
    os.rename(f'{people}/train/{names[2]}', f'{people}/train/{names[2]} b')
    before = sorted(path.name for path in log.iterdir())
    assert script(*command, 2, '--auto-resume') == 2
    err = capsys.readouterr().err
    assert err.count('\n') == 1 and err.endswith(
        'checkpoint_ep1.pth.tar: the run was trained with another table of persons and labels: 1 of 6 labels mean '
        'other persons. Restore the training set, or start a new run from these weights with --resume-weights-only\n'
    )
    assert sorted(path.name for path in log.iterdir()) == before
    shutil.rmtree(f'{people}/train/{names[2]} b')
    assert script(*command, 2, '--auto-resume') == 2
    assert 'persons and labels: it has 6 persons, not 5. Restore' in capsys.readouterr().err


def test_files_of_before_have_no_labels(people, tmp_path, script):
    log = tmp_path / 'log'
    command = [XENT, '-d', f'folder:{people}', '--save-dir', log, '--max-epoch']
    assert script(*command, 1) == 0
    path = log / 'checkpoint_ep1.pth.tar'
    state = torch.load(path, weights_only=True)
    for labels, status in ((None, 0), ('x', 2), ([], 2), (state['labels'], 0)):
        altered = {key: value for key, value in state.items() if key != 'labels'} | (
            {} if labels is None else {'labels': labels}
        )
        torch.save(altered, tmp_path / 'altered.pth.tar')
        begun = ['--resume', tmp_path / 'altered.pth.tar', '--save-dir', tmp_path / f'{labels!r:.8}']
        assert script(*command, 2, *begun) == status
