"""A user's mistake is reported in one line; a fault of the program keeps its traceback."""


class UserError(Exception):
    """A mistake that the user can correct: what is wrong, where, and what to do, in one or two sentences.

    It is printed as `error: ...` on stderr, and the program ends with exit status `status`.
    """

    status = 2


class ProcessLost(UserError):
    """A process that the run needs was killed: nobody's mistake, and --max-restarts may start the run again."""

    status = 1


def plain(text: str, longest: int = 200) -> str:
    """The first line of foreign text, escaped where a terminal would not print it, and cut to `longest` characters."""
    line = text.strip().split('\n', 1)[0]
    line = line if line.isprintable() else ascii(line)[1:-1]
    return line if len(line) <= longest else f'{line[:longest]}...'
