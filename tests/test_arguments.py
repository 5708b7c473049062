import dataclasses
import importlib
import math
import re
from pathlib import Path

import pytest
from conftest import SCRIPTS

import arguments

DEFAULTS = {  # of the original
    'train_img_model_xent': {'dataset': 'market1501', 'max_epoch': 60, 'stepsize': 20, 'test_batch': 32},
    'train_img_model_xent_htri': {'dataset': 'market1501', 'max_epoch': 180, 'stepsize': 60, 'test_batch': 32,
                                  'margin': 0.3, 'num_instances': 4},
    'train_img_model_cent': {'dataset': 'market1501', 'max_epoch': 60, 'stepsize': 20, 'test_batch': 32,
                             'lr_cent': 0.5, 'weight_cent': 0.0005},
    'train_vid_model_xent': {'dataset': 'mars', 'max_epoch': 15, 'stepsize': 5, 'test_batch': 5,
                             'seq_len': 15, 'pool': 'avg'},
    'train_vid_model_xent_htri': {'dataset': 'mars', 'max_epoch': 500, 'stepsize': 200, 'test_batch': 5,
                                  'seq_len': 15, 'pool': 'avg', 'margin': 0.3, 'num_instances': 4},
}  # fmt: skip
COMMON = {
    'workers': 4, 'height': 256, 'width': 128, 'train_batch': 32, 'lr': 3e-4, 'gamma': 0.1, 'weight_decay': 5e-4,
    'arch': 'resnet50', 'print_freq': 10, 'seed': 1, 'start_epoch': 0, 'eval_step': -1, 'gpu_devices': '0',
    'resume': '', 'evaluate': False, 'use_cpu': False, 'pretrained': 'imagenet',
}  # fmt: skip


def parse(script, *args):
    return importlib.import_module(script).parser.parse_args([*map(str, args)])


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize('script', DEFAULTS)
def test_defaults_are_those_of_the_original(script):
    args = vars(parse(script))
    expected = {**COMMON, 'save_dir': 'log', **DEFAULTS[script]}
    assert {name: args[name] for name in expected} == expected


def test_defaults_of_the_strong_recipe_are_those_of_its_paper():
    args = vars(parse('train_img_model_strong'))
    expected = {
        'train_batch': 64, 'num_instances': 4, 'lr': 3.5e-4, 'max_epoch': 120, 'warmup': 10, 'decays': [40, 70],
        'gamma': 0.1, 'weight_decay': 5e-4, 'margin': 0.3, 'weight_cent': 5e-4, 'lr_cent': 0.5, 'padding': 10,
        'random_erasing': 0.5, 'height': 256, 'width': 128, 'distance': 'cosine', 'arch': 'resnet50',
    }  # fmt: skip
    assert {name: args[name] for name in expected} == expected
    assert 'stepsize' not in args


@pytest.mark.parametrize('script', SCRIPTS)
def test_help_shows_every_option_in_a_group_with_a_reason(script, capsys):
    with pytest.raises(SystemExit) as end:
        parse(script, '-h')
    assert end.value.code == 0
    text = capsys.readouterr().out
    for group in ('the experiment', 'data:', 'test:', 'save:', 'run:'):
        assert group in text
    actions = importlib.import_module(script).parser._actions
    assert all(action.help for action in actions)


def test_rooms_get_their_own_options():
    args = parse('train_vid_model_xent', '--lr', '0.1', '--seq-len', '4')
    assert args.lr == args.save.recipe['lr'] == args.save.arguments['lr'] == 0.1
    assert args.test.seq_len == 4
    assert args.run.lr == 0.1 and args.run.save_dir == args.save.save_dir  # the experiment, and what rooms share
    assert not hasattr(args.run, 'seq_len') and not hasattr(args.test, 'use_cpu')
    with pytest.raises(dataclasses.FrozenInstanceError):
        args.test.seq_len = 5
    assert 'seq_len' not in args.save.recipe
    assert {'seed', 'lr', 'stepsize', 'gamma', 'train_batch', 'arch', 'dataset', 'height', 'width'} <= set(
        args.save.recipe
    )
    assert not {'max_epoch', 'workers', 'print_freq', 'test_batch', 'eval_step'} & set(args.save.recipe)


def test_an_option_of_a_script_belongs_to_its_recipe():
    assert parse('train_img_model_xent_htri').save.recipe['margin'] == 0.3
    assert parse('train_img_model_cent').save.recipe['lr_cent'] == 0.5


def test_an_option_in_a_group_of_a_script_belongs_to_its_recipe():
    parser = arguments.parser('an experiment', dataset='market1501', test_batch=1)
    group = parser.add_argument_group('mine')
    group.add_argument('--alpha', type=float, default=1.0)
    either = parser.add_mutually_exclusive_group()
    either.add_argument('--beta', action='store_true')
    recipe = parser.parse_args(['--beta']).save.recipe
    assert (recipe['alpha'], recipe['beta']) == (1.0, True)
    assert set(recipe) - {'alpha', 'beta'} == set(parse('train_img_model_xent').save.recipe)


def test_options_of_all_kinds():
    """Those that add to what is there, and paths, which a checkpoint stores as strings."""
    parser = arguments.parser('an experiment', dataset='market1501', test_batch=1)
    parser.add_argument('--stage', action='append', type=int)
    parser.add_argument('--more', action='extend', nargs='+', default=['a'])
    parser.add_argument('--deep', action='count', default=0)
    parser.add_argument('--teacher', type=Path, default='here')
    parser.add_argument('--folders', type=Path, nargs='+')
    parser.add_argument('--pool', default='avg')  # the name of an option of videos
    words = '--stage 1 --stage 2 --more b c --deep --deep --folders a b --pool gem'
    args = parser.parse_args(words.split(' '))
    assert (args.save.recipe['pool'], args.save.recipe['folders']) == ('gem', ['a', 'b'])
    assert (args.stage, args.more, args.deep, args.teacher) == ([1, 2], ['a', 'b', 'c'], 2, Path('here'))
    assert args.save.recipe['teacher'] == args.save.defaults['teacher'] == 'here'
    assert {'stage', 'more', 'deep'} <= args.save.given
    assert 'teacher' not in args.save.given


def test_a_default_is_the_value_of_an_option_that_is_not_given():
    parser = arguments.parser('an experiment', dataset='market1501', test_batch=1)
    parser.add_argument('--alpha', type=float, default='2', help='a default that argparse converts')
    parser.add_argument('--beta', default='2', help='one that it does not')
    parser.add_argument('--flip', action='store_true', default=True, help='on')
    parser.add_argument(
        '--no-flip', action='store_false', dest='flip', default=False, help='off; the first default counts'
    )
    parser.set_defaults(stepsize=7)
    save = parser.parse_args([]).save
    assert save.defaults == save.recipe and save.recipe['alpha'] == 2.0 and save.recipe['flip'] is True
    other = parser.parse_args(['--alpha', '3', '--no-flip', '--stepsize', '9', '--lr', '1']).save
    assert other.defaults == save.defaults != other.recipe


def test_args_are_printed_as_in_the_original():
    text = str(parse('train_img_model_xent').plain())
    assert re.match(
        r"Namespace\(any_camera=False, arch='resnet50', .*dataset='market1501', .*eval_step=-1, .*workers=4\)$", text
    )


@pytest.mark.parametrize(('text', 'value'), [('20', 20), ('0', math.inf), ('-3', math.inf), ('inf', math.inf)])
def test_stepsize_of_zero_or_less_is_no_decay(text, value):
    assert parse('train_img_model_xent', '--stepsize', text).stepsize == value


@pytest.mark.parametrize(('eval_step', 'due'), [(-1, [5]), (0, [5]), (2, [1, 3, 5]), (4, [3, 5]), (9, [5])])
def test_tests_are_due_every_step_and_at_the_end(eval_step, due):
    args = parse('train_img_model_xent', '--eval-step', eval_step, '--max-epoch', 6)
    for options in args.test, args.save:
        assert [epoch for epoch in range(6) if options.is_tested(epoch)] == due


def test_nothing_is_fetched_when_weights_are_given(tmp_path):
    (tmp_path / 'weights.pth').touch()
    assert parse('train_img_model_xent', '--resume', 'weights.pth').pretrained == 'none'


@pytest.mark.parametrize('options', ['--evaluate', '--overwrite', '--resume run/checkpoint_ep1.pth.tar'])
def test_a_folder_with_checkpoints_may_be_continued_with(options, tmp_path):
    (tmp_path / 'run').mkdir()
    (tmp_path / 'run' / 'checkpoint_ep1.pth.tar').touch()
    parse('train_img_model_xent', '--save-dir', 'run', *options.split())


@pytest.mark.parametrize('script', SCRIPTS)
def test_a_home_folder_that_the_shell_left_alone(script, tmp_path, monkeypatch):
    """In every option that is a path, and only in these."""
    monkeypatch.setenv('HOME', str(tmp_path))
    (tmp_path / 'file').touch()
    args = parse(script, '--save-dir=~/log', '--data-dir=~/data', '--pretrained=~/file')
    expected = {name: f'{tmp_path}/{name}' for name in ('log', 'data', 'file')}
    assert [args.save_dir, args.data_dir, args.pretrained] == [*expected.values()]
    assert args.save.arguments['save_dir'] == args.run.save_dir == expected['log']
    assert parse(script, '--resume=~/file').resume == expected['file']
    assert sorted(path.name for path in tmp_path.iterdir()) == ['file', 'log']
    assert not {'save_dir', 'data_dir', 'resume', 'pretrained'} & set(args.save.recipe)  # it resumes elsewhere
