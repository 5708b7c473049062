"""Errors that the user can correct, which are reported in one line; an error in the code keeps its traceback."""


class UserError(Exception):
    """A mistake that the user can correct: what is wrong, where, and what to do, in one or two sentences.

    It is printed as `error: ...` on stderr, and the program exits with `status`.
    """

    status = 2


class Unreadable(UserError):
    """An image that cannot be read; others may be readable."""


class ProcessLost(UserError):
    """A process of the run was killed, which is not a user's mistake; --max-restarts may restart the run."""

    status = 1


def plain(text: str, longest: int = 200) -> str:
    """Untrusted text as one line that is safe to print: its first line, escaped if necessary, and truncated."""
    line = text.strip().split('\n', 1)[0]
    line = line if line.isprintable() else ascii(line)[1:-1]
    return line if len(line) <= longest else f'{line[:longest]}...'
