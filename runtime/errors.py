"""What the user can mend is said in one line; what is our fault keeps its traceback."""


class UserError(Exception):
    """A mistake that the user can mend: what is wrong, where, and what to do, in one sentence or two.

    `launch.main` prints it as `error: ...` on stderr and ends the run with exit status `status`.
    """

    status = 2


class ProcessLost(UserError):
    """A process that the run needs was killed: nobody's mistake, and --max-restarts may start the run again."""

    status = 1
