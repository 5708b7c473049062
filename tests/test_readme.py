"""The commands in README.md, CONTRIBUTING.md and docs/ work at tiny size, and all that they refer to exists."""

import ast
import importlib.util
import re
import runpy
import shlex
import shutil
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SCRIPTS, TINY
from tiny import Tiny
from torch.distributed.run import get_args_parser

import data_manager
from readers import table

TEXTS = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in (ROOT / 'README.md', ROOT / 'CONTRIBUTING.md', *sorted((ROOT / 'docs').glob('*.md')))
}
README = TEXTS['README.md']
FENCED = [pair for text in TEXTS.values() for pair in re.findall(r'```(\w*)\n(.*?)```', text, re.S)]  # language, lines
PYTHON = [block for language, block in FENCED if language == 'python']
LINES = list(dict.fromkeys(line.strip() for language, block in FENCED if not language for line in block.splitlines()))
COMMANDS = [line for line in LINES if line.startswith('python train_')]
ROWS = re.findall(r'\| `(python train_[^`]*)` \|', README)
ONNX = all(map(importlib.util.find_spec, ('onnx', 'onnxscript', 'onnxruntime')))  # export.py needs them
MOST_BYTES = 15_872  # of README.md: it is read in full


def put_own_data(words, data_dir):
    """The data of one's own that a command names, at their places in the current folder: those of Market1501."""
    market = data_dir / 'market1501'
    for form, colon, place in (word.partition(':') for word in words):
        if colon and form in data_manager.OWN and not Path(place).exists():
            Path(place).parent.mkdir(parents=True, exist_ok=True)
            if form == 'csv':
                table.write(data_manager.init_dataset('market1501', str(data_dir)), place)
            elif form == 'market':
                shutil.copytree(market, place)
            else:
                for path in (market / 'bounding_box_train').iterdir():
                    (Path(place) / f'person {path.name[:4]}').mkdir(parents=True, exist_ok=True)
                    shutil.copy(path, Path(place) / f'person {path.name[:4]}')


@pytest.mark.parametrize('command', COMMANDS)
def test_a_command_runs(command, script, data_dir, places, tmp_path, monkeypatch, capsys):
    """As written, except for the network, the number of epochs and the folder of the weights."""
    monkeypatch.chdir(tmp_path)
    name, *args = shlex.split(command)[1:]
    put_own_data(args, data_dir)
    if 'toy_' in command:  # small ones
        args += ['--data-dir', str(places)]
    if '--resume' in args and '--evaluate' not in args:  # the run that it resumes
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
    scripts = {command.split()[1].removesuffix('.py') for command in ROWS}
    assert len(scripts) == 5 and scripts <= set(SCRIPTS)


def test_the_rows_options_are_good(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for command in ROWS:
        name, *args = shlex.split(command)[1:]
        importlib.import_module(name.removesuffix('.py')).parser.parse_args(args)


def test_torchruns_options_are_good(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = [line for line in LINES if 'torchrun ' in line]
    assert lines
    for line in lines:
        launcher, name, args = re.fullmatch(r'.*?torchrun (.*?) (train_\w+)\.py (.*)', line).groups()
        get_args_parser().parse_args([*launcher.split(), f'{name}.py'])
        importlib.import_module(name).parser.parse_args(args.split())


def test_commands_of_make_exist():
    targets = re.findall(r'^([a-z]+):', (ROOT / 'Makefile').read_text(), re.M)
    assert {line.split()[1] for line in LINES if line.startswith('make ')} == set(targets)
    assert COMMANDS


def test_files_that_are_named_exist():
    for where, text in TEXTS.items():
        for name in re.findall(r'`([\w/*]+\.(?:py|md|txt))`', text):
            assert '{' in name or 'log_' in name or list(ROOT.glob(name)), f'{where}: {name}'


def test_files_that_commands_name_exist():
    for line in LINES:
        words = shlex.split(line) if line.startswith(('.venv/', 'cp ', 'python ')) else []
        for name in words[: 2 if words[:1] in (['cp'], ['python']) else None]:
            assert not name.endswith('.py') or (ROOT / name).exists(), line


@pytest.mark.parametrize('path', [*TEXTS, 'data/README.md', 'CHANGELOG.md'])
def test_relative_links_lead_somewhere(path):
    for link in re.findall(r'\]\(([^)\s]+)\)', (ROOT / path).read_text()):
        if not re.match(r'\w+:', link):
            assert (ROOT / path).parent.joinpath(link.partition('#')[0]).exists(), link


def test_readme_is_short_and_names_the_original():
    assert len(README.encode()) <= MOST_BYTES
    assert '(https://github.com/KaiyangZhou/deep-person-reid)' in README and 'Kaiyang Zhou' in README


@pytest.mark.parametrize('block', PYTHON)
def test_examples_are_python(block):
    ast.parse(block)


@pytest.mark.parametrize('block', [block for block in PYTHON if re.search(r'^scheduler = ', block, re.M)])
def test_an_optimizer_and_its_schedule_replace_those_of_a_script(block, script, tmp_path, monkeypatch):
    """The run learns, and a resumed one ends with the same weights."""
    source = (ROOT / 'train_img_model_xent.py').read_text()
    imports, lines = block.split('\n\n')
    for name, replacement in (('optimizer', ''), ('scheduler', textwrap.indent(lines, '    '))):
        source, count = re.subn(rf'^    {name} = .*\n', lambda _, by=replacement: by, source, flags=re.M)
        assert count == 1
    (tmp_path / 'train_img_model_mine.py').write_text(f'{imports}\n{source}')
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, 'train_img_model_mine', raising=False)
    whole, parted = tmp_path / 'whole', tmp_path / 'parted'
    options = ['--max-epoch', 3, '--eval-step', 1, '--save-dir']
    assert script('train_img_model_mine', *options, whole) == 0
    assert script('train_img_model_mine', *options, parted, '--resume', whole / 'checkpoint_ep1.pth.tar') == 0
    first, one, other = (
        torch.load(path, weights_only=True)['state_dict']
        for path in (whole / 'checkpoint_ep1.pth.tar', *(each / 'checkpoint_ep3.pth.tar' for each in (whole, parted)))
    )
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert not torch.equal(first['classifier.weight'], one['classifier.weight'])


def test_the_other_commands_run(script, data_dir, tmp_path, monkeypatch, capsys):
    """Those of the rooms, on tiny runs in the folders that they name, and toys drawn small."""
    commands = [shlex.split(line) for line in LINES if re.match(r'python (?!train_)\w+\.py', line)]
    main = "if __name__ == '__main__':"
    able = {path.name for path in ROOT.glob('*.py') if path.stem not in SCRIPTS and main in path.read_text()}
    assert {command[1] for command in commands} == able
    for package, there in (('onnx', ONNX), ('openvino', ONNX and importlib.util.find_spec('openvino'))):
        commands = [command for command in commands if there or package not in ' '.join(command)]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))  # for search.py
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
    for name in ('market1501', 'toy_market1501'):
        shutil.copytree(data_dir / 'market1501', f'data/{name}', dirs_exist_ok=True)
    shutil.copytree(data_dir / 'market1501' / 'query', 'tracks/1')
    for command in commands:
        monkeypatch.setattr(sys, 'argv', command[1:])
        try:
            runpy.run_path(str(ROOT / command[1]), run_name='__main__')
        except SystemExit as end:  # data_manager.py: the counts are not those of the real Market1501
            assert end.code in (None, 0) or (command[1] == 'data_manager.py' and end.code == 1)
    assert Path('log/demo/report.html').exists() and Path('log/a_and_b.html').exists()
    assert (
        all(Path(f'features/{name}/features.npy').exists() for name in ('toy', 'tracks'))
        and Path('found.html').exists()
    )


def run(*command):
    """A command of this project, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, 'argv', [*command])
        try:
            runpy.run_path(str(ROOT / command[0]), run_name='__main__')
        except SystemExit as end:
            assert not end.code


@pytest.mark.parametrize(
    'block', re.findall(r'```python\n(.*?)```', TEXTS['docs/use.md'] + TEXTS['docs/export.md'], re.S)
)
def test_the_examples_of_use_run(block, script, data_dir, tmp_path, monkeypatch):
    kind = re.search(r'best_model\.(onnx|pt2)', block)
    for package in ('qdrant_client', 'openvino', *(('onnx', 'onnxscript', 'onnxruntime') if 'onnx' in block else ())):
        if package in block or package.startswith('onnx'):
            pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    assert script('train_img_model_xent', '--max-epoch', 1, '--save-dir', 'log/demo') == 0
    shutil.copytree(data_dir / 'market1501', 'data/toy_market1501')
    for name, path in zip(('one.jpg', 'two.jpg'), Path('data/toy_market1501/query').iterdir(), strict=False):
        shutil.copy(path, name)
    if kind:
        run('export.py', '--weights', 'log/demo/best_model.pth.tar', '--format', kind[1])
    exec(compile(block, 'docs', 'exec'), {})
