"""README's commands are run, at tiny size, and its tables name every row once."""

import importlib
import re
import runpy
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SCRIPTS, TINY
from tiny import Tiny
from torch.distributed.run import get_args_parser

README = (ROOT / 'README.md').read_text()
BLOCKS = [line.strip() for block in re.findall(r'```\w*\n(.*?)```', README, re.S) for line in block.splitlines()]
COMMANDS = [line for line in BLOCKS if line.startswith('python train_')]
ROWS = re.findall(r'`(python train_[^`]*-d [^`]*)`', README)


@pytest.mark.parametrize('command', COMMANDS)
def test_a_command_runs(command, script, data_dir, tmp_path, monkeypatch, capsys):
    """As written, but for the network, the number of epochs and the folder of the weights."""
    monkeypatch.chdir(tmp_path)
    name, *args = shlex.split(command)[1:]
    if '--resume' in args and '--evaluate' not in args:  # the run that it goes on with
        path = args[args.index('--resume') + 1]
        begun = [value for value in args if value not in ('--resume', path)]
        assert script(name.removesuffix('.py'), *begun, *TINY, '--max-epoch', 1, '--train-batch', 8) == 0
        (tmp_path / path).parent.joinpath('checkpoint_ep1.pth.tar').rename(tmp_path / path)
    elif '--resume' in args:
        path = tmp_path / args[args.index('--resume') + 1]
        path.parent.mkdir()
        torch.save({'state_dict': Tiny(751).state_dict()}, path)
    assert script(name.removesuffix('.py'), *args, *TINY, '--max-epoch', 2, '--train-batch', 8) == 0
    assert 'mAP: ' in capsys.readouterr().out


def test_each_row_of_the_originals_tables_has_its_command():
    assert len(ROWS) == len(set(ROWS)) == 13
    assert {command.split()[1].removesuffix('.py') for command in ROWS} == set(SCRIPTS)


def test_the_rows_options_are_good(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for command in ROWS:
        name, *args = shlex.split(command)[1:]
        importlib.import_module(name.removesuffix('.py')).parser.parse_args(args)


def test_torchruns_options_are_good(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = [line for line in BLOCKS if 'torchrun ' in line]
    assert lines
    for line in lines:
        launcher, name, args = re.fullmatch(r'.*?torchrun (.*?) (train_\w+)\.py (.*)', line).groups()
        get_args_parser().parse_args([*launcher.split(), f'{name}.py'])
        importlib.import_module(name).parser.parse_args(args.split())


def test_commands_of_make_exist():
    targets = re.findall(r'^([a-z]+):', (ROOT / 'Makefile').read_text(), re.M)
    assert {line.split()[1] for line in BLOCKS if line.startswith('make ')} <= set(targets)
    assert COMMANDS


def test_files_that_are_named_exist():
    for name in re.findall(r'`([\w/*]+\.(?:py|md|txt))`', README):
        assert '{' in name or 'log_' in name or list(ROOT.glob(name)), name


def test_the_other_commands_run(script, data_dir, tmp_path, monkeypatch, capsys):
    """Those of the rooms, on tiny runs in the folders that they name, and toys drawn small."""
    commands = [shlex.split(line) for line in BLOCKS if re.match(r'python (?!train_)\w+\.py', line)]
    assert {command[1] for command in commands} == {'report.py', 'ranking.py', 'data_manager.py'}
    monkeypatch.chdir(tmp_path)
    for command in commands:
        for word in command:
            if word.startswith('log/'):
                folder = '/'.join(word.split('/')[:2])
                if not Path(folder).exists() and not word.endswith('.html'):
                    options = ['--save-dir', folder, '--max-epoch', 1, '--save-features', '--overwrite']
                    assert script('train_img_model_xent', *options, '--seed', len(word)) == 0
            if word.endswith('.jpg'):
                Path(word).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(next((data_dir / 'market1501' / 'query').iterdir()), word)
    Path('data').mkdir(exist_ok=True)
    shutil.copytree(data_dir / 'market1501', 'data/market1501')
    for command in commands:
        monkeypatch.setattr(sys, 'argv', command[1:])
        try:
            runpy.run_path(str(ROOT / command[1]), run_name='__main__')
        except SystemExit as end:  # data_manager.py: the counts are not those of the real Market1501
            assert end.code in (None, 0) or (command[1] == 'data_manager.py' and end.code == 1)
    assert Path('log/demo/report.html').exists() and Path('a_and_b.html').exists()
