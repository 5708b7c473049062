import importlib
import sys

import pytest

from runtime import commands
from runtime.errors import ProcessLost, UserError, plain


def raise_(error):
    raise error


def test_a_mistake_on_the_command_line_is_one_line(capsys):
    parser = commands.Parser(prog='report.py')
    parser.add_argument('--height', type=int)
    for arguments, line in (
        (['--height', 'x'], "error: --height: invalid int value: 'x'\n"),
        (['extra'], 'error: unrecognized arguments: extra\n'),
    ):
        with pytest.raises(SystemExit) as end:
            parser.parse_args(arguments)
        assert (end.value.code, *capsys.readouterr()) == (2, '', line)


@pytest.mark.parametrize(('kind', 'status'), [(UserError, 2), (ProcessLost, 1)])
def test_run_reports_a_user_error_in_one_line(kind, status, capsys):
    with pytest.raises(SystemExit) as end:
        commands.run(lambda: raise_(kind('no such file; give another')))
    assert (end.value.code, *capsys.readouterr()) == (status, '', 'error: no such file; give another\n')


def test_an_interrupt_from_the_keyboard_ends_a_command_without_a_traceback(capsys):
    with pytest.raises(SystemExit) as end:
        commands.run(lambda: raise_(KeyboardInterrupt()))
    assert (end.value.code, *capsys.readouterr()) == (130, '', '')


def test_run_leaves_other_errors_their_traceback():
    with pytest.raises(ZeroDivisionError):
        commands.run(lambda: 1 / 0)


@pytest.mark.parametrize(('returned', 'status'), [(None, 0), (0, 0), (1, 1)])
def test_run_exits_with_what_main_returns(returned, status):
    with pytest.raises(SystemExit) as end:
        commands.run(lambda: returned)
    assert end.value.code == status


@pytest.mark.parametrize(
    ('module', 'command'),
    [
        ('ranking', '~/query ~/gallery'),
        ('report', '~/run'),
        ('report', '~/run --out ~/page.html'),
        ('report', '--activations ~/checkpoint.pth.tar ~/image.jpg --out ~/grid.png'),
        ('data_manager', '--data-dir ~/data'),
    ],
)
def test_every_path_of_a_command_may_be_in_the_home_folder(module, command, tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    monkeypatch.setattr(sys, 'argv', [f'{module}.py', *command.split()])
    parse, parsed = commands.Parser.parse_args, []

    def see(parser):
        parsed.append(parse(parser))
        raise UserError('it ends here')

    monkeypatch.setattr(commands.Parser, 'parse_args', see)
    with pytest.raises(UserError, match='it ends here'):
        importlib.import_module(module).main()
    assert str(parsed).count(str(tmp_path)) == command.count('~') and '~' not in str(parsed)


@pytest.mark.parametrize(
    ('text', 'shown'),
    [
        ('  naïve  ', 'naïve'),
        ('first\nsecond', 'first'),
        ('\x1b[2Jgone', r'\x1b[2Jgone'),
        ('lost\udcff.jpg', r'lost\udcff.jpg'),
        ('x' * 201, 'x' * 200 + '...'),
        ('x' * 200, 'x' * 200),
    ],
)
def test_foreign_text_is_one_printable_line(text, shown):
    assert plain(text) == shown
    assert plain('abc', longest=2) == 'ab...'
