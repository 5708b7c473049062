"""A test that differs from the training of its weights gives a notice: printed, in results.json and on the page."""

import dataclasses
import re
import shutil

import pytest
import tiny
import torch
import trees
from conftest import TINY
from test_evaluation import options
from test_folder import people

import data_manager
from arguments import Recipe, TestOptions
from models.network import Training
from readers.market1501 import Market1501
from runtime import notices
from utils import read_json

IMAGES, VIDEOS = 'train_img_model_xent', 'train_vid_model_xent'


@pytest.fixture(scope='module')
def trained(data_dir, tmp_path_factory):
    """A checkpoint of a script, trained for an epoch."""
    made = {}

    def train(script, name):
        if name not in made:
            folder = tmp_path_factory.mktemp('trained')
            assert script(name, '--max-epoch', 1, '--save-dir', folder) == 0
            made[name] = folder / 'checkpoint_ep1.pth.tar'
        return made[name]

    return train


@pytest.fixture
def noticed(script, trained, tmp_path, capsys):
    """The notices of a test, which are printed before its figures."""

    def test(*options, name=IMAGES, path=None):
        path = path or trained(script, name)
        capsys.readouterr()
        assert script(name, '--evaluate', '--resume', path, '--save-dir', tmp_path, *options) == 0
        out = capsys.readouterr().out
        printed = [line.removeprefix('Notice: ') for line in out.splitlines() if line.startswith('Notice')]
        assert read_json(tmp_path / 'results.json')['notices'] == printed
        if printed:
            assert out.index('Notice') < out.index('Results ---')
        return [line.removeprefix(f'{path} ') for line in printed]

    return test


def test_no_weights(script, tmp_path, capsys):
    assert script(IMAGES, '--evaluate', '--save-dir', tmp_path) == 0
    notice = 'neither --resume nor --pretrained gave weights, so the network is random'
    assert f'Notice: {notice}\n' in capsys.readouterr().out
    results = read_json(tmp_path / 'results.json')
    assert (results['notices'], results['checkpoint']) == ([notice], 'none')


def test_a_test_like_those_of_the_training_has_none(noticed, trained, script):
    assert noticed() == noticed(name=VIDEOS) == []
    results = read_json(trained(script, IMAGES).with_name('results.json'))  # of the training
    assert (results['notices'], results['checkpoint']) == ([], None)


@pytest.mark.parametrize('alone', [[], ['--resume-weights-only']])
def test_tests_of_a_training_that_was_resumed_are_of_its_own_weights(alone, trained, script, tmp_path):
    more = ['--resume', trained(script, IMAGES), *alone, '--max-epoch', 2, '--save-dir', tmp_path]
    assert script(IMAGES, *more) == 0
    assert read_json(tmp_path / 'results.json')['checkpoint'] is None


def test_weights_given_otherwise(noticed, trained, script, tmp_path, capsys):
    """As --pretrained, the same file has the same notices."""
    path = trained(script, IMAGES)
    options = ['--evaluate', '--pretrained', path, '--save-dir', tmp_path]
    assert script(IMAGES, *options) == 0
    assert read_json(tmp_path / 'results.json')['notices'] == []
    assert script(IMAGES, *options, '--height', 64) == 0
    results = read_json(tmp_path / 'results.json')
    assert results['notices'] == [f'{path} was trained with --height 32, and is used with --height 64']
    assert results['checkpoint'] == str(path)


def test_another_size(noticed):
    size = ['--height', 64, '--width', 24]
    assert noticed(*size) == ['was trained with --height 32 --width 16, and is used with --height 64 --width 24']


def test_another_precision(noticed):
    wide = ['--height', 96, '--width', 48]  # narrower images are wrong in bf16 on some CPUs
    assert noticed(*wide, '--precision', 'bf16') == [
        'was trained with --height 32 --width 16, and is used with --height 96 --width 48',
        'was tested with --precision fp32 during training, and now with --precision bf16',
    ]
    assert noticed('--precision', 'auto') == []  # fp32, too


def test_other_frames(noticed):
    frames = ['--seq-len', 2, '--pool', 'max']
    expected = 'was tested with --seq-len 15 --pool avg during training, and now with --seq-len 2 --pool max'
    assert noticed(*frames, name=VIDEOS) == [expected]


@pytest.mark.parametrize(
    ('options', 'before', 'now'),
    [
        ('--distance cosine', '--distance euclidean', '--distance cosine'),
        ('--flip-test', 'no --flip-test', '--flip-test'),
        ('--interpolation bicubic', '--interpolation bilinear', '--interpolation bicubic'),
    ],
)
def test_another_way_of_testing(options, before, now, noticed, trained, script, tmp_path):
    assert noticed(*options.split()) == [f'was tested with {before} during training, and now with {now}']
    path = tmp_path / 'checkpoint.pth.tar'
    changed = torch.load(trained(script, IMAGES), weights_only=True)
    changed['arguments'] |= {'distance': 'cosine', 'flip_test': True, 'interpolation': 'bicubic'}
    torch.save(changed, path)
    assert noticed('--distance', 'cosine', '--flip-test', '--interpolation', 'bicubic', path=path) == []
    assert [notice.split(' during training')[0] for notice in noticed(path=path)] == [
        'was tested with --distance cosine --flip-test --interpolation bicubic'
    ]
    assert read_json(tmp_path / 'results.json')['interpolation'] == 'bilinear'


def test_networks_without_a_neck_and_a_record_are_tested_with_euclidean_distance(tmp_path, capsys):
    """The original's, also by the strong script, whose default is cosine."""
    model, changed = tiny.Tiny(3), options(tmp_path, distance='cosine', evaluate=True)
    model.trained = Training('a file')
    assert notices.as_in_project(changed, model).distance == 'euclidean'
    assert capsys.readouterr().out == (
        'Tested with --distance euclidean: a file has no neck, and records no distance\n'
    )
    given = dataclasses.replace(changed, given=frozenset({'distance'}))
    assert notices.as_in_project(given, model).distance == 'cosine'
    model.trained = Training('a file', options={'distance': 'cosine'})
    assert notices.as_in_project(changed, model).distance == 'cosine'
    model.trained = Training('a file')
    model.add_neck()
    assert notices.as_in_project(changed, model).distance == 'cosine'
    assert capsys.readouterr().out == ''


@pytest.mark.parametrize('more', [{}, {'dataset': 'market1501,folder:people'}, {'validate': 0.2}])
def test_test_persons_of_a_folder_that_were_drawn_otherwise(more, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    people(tmp_path / 'people')
    trained = Training('a file', options={'dataset': 'folder:people', 'test_share': 0.5, 'seed': 3, **more})
    for seed, share, differs in ((3, 0.5, False), (1, 0.5, True), (31, 0.5, True), (3, 0.3, True)):
        dataset = data_manager.init_dataset('folder:people', seed=seed, test_share=share)
        found = notices.of_data(trained, dataset, 'folder:people')
        assert found == differs * [
            'a file was trained on folder:people with --test-share 0.5, --seed 3: persons of that training may be '
            'among those tested'
        ]


def test_frames_are_nothing_to_a_test_of_images(noticed, trained, script, tmp_path):
    path = tmp_path / 'checkpoint.pth.tar'
    changed = torch.load(trained(script, VIDEOS), weights_only=True)
    changed['arguments']['seq_len'] = 4
    torch.save(changed, path)
    assert noticed(path=path) == ['was trained with -d mars, and is tested with -d market1501']


def test_another_data_set(noticed, monkeypatch):
    monkeypatch.setitem(data_manager.IMAGES, 'other', lambda folder: Market1501(folder))
    assert noticed('-d', 'other') == ['was trained with -d market1501, and is tested with -d other']


def test_other_files_under_the_same_name(noticed, tmp_path):
    trees.draw_market1501(tmp_path / 'data' / 'market1501')
    (notice,) = noticed('--data-dir', tmp_path / 'data')
    assert re.fullmatch(r'was trained on other files of market1501: fingerprint \w{16}, now \w{16}', notice)


@pytest.mark.parametrize('number', [6, 9])
def test_weights_of_strangers_are_known_by_their_classifier(number, noticed, tmp_path):
    path = tmp_path / 'foreign.pth'
    torch.save(tiny.Tiny(number).state_dict(), path)
    expected = [f'was trained on {number} persons, and market1501 has 6'] if number != 6 else []
    assert noticed('--height', 96, '--width', 48, '--precision', 'bf16', path=path) == expected


@pytest.mark.parametrize(
    'change',
    [
        {'arguments': None},
        {'arguments': {'height': '96', 'width': None, 'precision': 8, 'dataset': ['a'], 1: 2}, 'provenance': []},
        {'arguments': {}, 'provenance': {'dataset_fingerprint': 3}},
    ],
)
def test_what_a_file_does_not_know_has_no_notice(change, noticed, trained, script, tmp_path):
    path = tmp_path / 'checkpoint.pth.tar'
    torch.save(torch.load(trained(script, IMAGES), weights_only=True) | change, path)
    assert noticed('--height', 64, path=path) == []


def test_foreign_text_stays_in_one_line(noticed, trained, script, tmp_path):
    path = tmp_path / 'checkpoint.pth.tar'
    changed = torch.load(trained(script, IMAGES), weights_only=True)
    changed['arguments']['dataset'] = 'a\x1b[31m\nb'
    torch.save(changed, path)
    assert noticed(path=path) == [r'was trained with -d a\x1b[31m, and is tested with -d market1501']


def test_imagenet_weights_are_not_of_reid(data_dir, run, tmp_path):
    model, dataset = tiny.Tiny(3), data_manager.init_dataset('market1501', str(data_dir))
    model.trained = Training('some weights', of_imagenet=True, num_pids=1000, missing='fc_fuse.0.weight')
    assert notices.of_test(model, dataset, options(tmp_path), run) == [
        'the network has ImageNet weights (some weights) and was not trained for re-ID',
        'not in some weights, and therefore random: fc_fuse.0.weight',
    ]


def test_a_resumed_run_whose_tests_change(script, trained, tmp_path, capsys):
    how = ['--resume', trained(script, VIDEOS), '--max-epoch', 2]
    assert script(VIDEOS, *how, '--save-dir', tmp_path / 'same') == 0
    assert 'Notice' not in capsys.readouterr().out
    more = ['--seq-len', 4, '--rerank', '--k1', 4, '--no-report']
    assert script(VIDEOS, *how, *more, '--save-dir', tmp_path / 'other') == 0
    (line,) = re.findall('Notice: .*', capsys.readouterr().out)
    expected = 'had --seq-len 15 no --rerank --k1 20, and from now on have --seq-len 4 --rerank --k1 4: their figures'
    assert line.startswith(f'Notice: the tests of this run {expected}')


def test_the_page_shows_them(script, trained, tmp_path, monkeypatch):
    monkeypatch.setattr('conftest.TINY', [option for option in TINY if option != '--no-report'])
    path = trained(script, IMAGES)
    assert script(IMAGES, '--evaluate', '--resume', path, '--width', 24, '--save-dir', tmp_path) == 0
    page = (tmp_path / 'report.html').read_text()
    assert f'<p class="notice">Notice: {path} was trained with --width 16, and is used with --width 24</p>' in page


UNCHANGING = (
    'test_batch', 'save_features', 'evaluate', 'eval_step', 'no_report', 'save_dir', 'resume', 'quiet', 'workers',
    'given',
)  # fmt: skip


def test_every_option_of_a_test_changes_its_figures_or_does_not():
    recipe, names = ({field.name for field in dataclasses.fields(group)} for group in (Recipe, TestOptions))
    assert sorted([*notices.CHANGING, *UNCHANGING]) == sorted(names - recipe)  # the recipe cannot change
    assert {'height', 'width', 'dataset', *notices.POOLING} <= names


OTHERS = {
    'seq_len': 4, 'pool': 'max', 'any_camera': True, 'multi_query': True, 'rerank': True, 'precision': 'bf16',
    'distance': 'cosine', 'flip_test': True,
}  # fmt: skip


@pytest.mark.parametrize('name', OTHERS)
def test_each_option_that_changes_the_tests_of_a_resumed_run_has_a_notice(name):
    assert {*OTHERS, *notices.RERANKING} == {'precision', *notices.CHANGING}
    before = {field.name: field.default for field in dataclasses.fields(TestOptions)} | {'precision': 'auto'}
    after = before | {name: OTHERS[name]}
    trained = Training('a file', options=before)
    assert notices.of_resumed(trained, before) == []
    (notice,) = notices.of_resumed(trained, after)
    flag = f'--{name.replace("_", "-")}'
    assert re.match(rf'the tests of this run had (no )?{flag}\b.*, and from now on have {flag}\b', notice)
    older = Training('a file', options={'precision': 'auto', 'lr': 0.1})  # before there were such options
    assert notices.of_resumed(older, before) == [] and notices.of_resumed(older, after) == [notice]
    assert notices.of_resumed(Training('a file'), after) == []
    neutral = dict.fromkeys(UNCHANGING, 'other')
    assert notices.of_resumed(trained, before | neutral) == []


def test_without_a_training_set_nothing_about_it_is_compared(noticed, trained, script, data_dir, tmp_path, capsys):
    shutil.copytree(data_dir / 'market1501', tmp_path / 'data' / 'market1501')
    foreign = tmp_path / 'foreign.pth'
    torch.save(tiny.Tiny(9).state_dict(), foreign)
    where, marks = ['--data-dir', tmp_path / 'data'], []
    for part in ('', 'bounding_box_train'):
        if part:
            shutil.rmtree(tmp_path / 'data' / 'market1501' / part)
            assert noticed(*where, path=foreign) == []
        path = trained(script, IMAGES)
        capsys.readouterr()
        assert script(IMAGES, '--evaluate', '--resume', path, '--save-dir', tmp_path, *where) == 0
        out = capsys.readouterr().out
        assert 'Notice' not in out and 'The classifier has' not in out
        marks.append(read_json(tmp_path / 'results.json'))
    assert marks[0]['test_fingerprint'] == marks[1]['test_fingerprint']
    assert marks[0]['dataset_fingerprint'] != marks[1]['dataset_fingerprint']


def test_the_protocols_of_mars_share_a_training_set(noticed, trained, script, tmp_path):
    expected = 'was tested with -d mars during training, and now with -d mars_official'
    assert noticed('-d', 'mars_official', name=VIDEOS) == [expected]
    more = f'{expected.replace("-d mars ", "--pool avg -d mars ").replace("-d mars_", "--pool max -d mars_")}'
    assert noticed('-d', 'mars_official', '--pool', 'max', name=VIDEOS) == [more]
    path = tmp_path / 'checkpoint.pth.tar'
    changed = torch.load(trained(script, VIDEOS), weights_only=True)
    changed['arguments']['dataset'] = 'mars_official'
    torch.save(changed, path)
    expected = 'was tested with -d mars_official during training, and now with -d mars'
    assert noticed(name=VIDEOS, path=path) == [expected]
