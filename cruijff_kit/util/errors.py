"""The one exception that means "the user can mend this": its text is printed as it is, without a traceback.

And the text of any other exception as one line.
"""

from cruijff_kit.util import redaction


class UserError(ValueError):
    """A mistake in the command, the configuration or the data.

    The message says what was wrong, where, and what to type instead, in one line;
    the commands print it and exit with code 2.

    fix: what to do, where the message itself does not say it; only programs are told (--json).
    """

    def __init__(self, message: str, fix: str | None = None) -> None:
        super().__init__(message)
        self.fix = fix


def one_line(error: BaseException | str) -> str:
    """What an exception (or a foreign message) says, in one line; its type's name where it says nothing.

    Where the process handles red data, only what an exception of ours says.
    """
    return redaction.said(error) or type(error).__name__


class ClusterError(UserError):
    """SLURM refused, or did not answer; the message holds its own words."""


class InnerError(BaseException):
    """Carries a run's error through Hydra, which would print a report of its own for any Exception."""

    def __init__(self, error: Exception) -> None:
        super().__init__(one_line(error))
        self.error = error
