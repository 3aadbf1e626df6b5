"""UserError, which the user can mend: commands print its text without a traceback. And any exception's text in one line."""

from cruijff_kit.util import redaction


class UserError(ValueError):
    """A mistake in the command, the configuration or the data.

    The message says in one line what is wrong, where, and what to type instead. Commands print it and exit with code 2.
    """

    fix: str | None
    """Suggested action, if it is not in the message; only --json shows it."""

    def __init__(self, message: str, fix: str | None = None) -> None:
        super().__init__(message)
        self.fix = fix


def one_line(error: BaseException | str) -> str:
    """Format an exception (or a foreign message) in one line: its text, or the name of its type if it has none.

    Of red data only the text of our own exceptions is shown.
    """
    return redaction.safe_message(error) or type(error).__name__


class ClusterError(UserError):
    """SLURM refused or did not answer; the message quotes it."""


class InnerError(BaseException):
    """Carries a run's error through Hydra, which would print a report of its own for any Exception."""

    def __init__(self, error: Exception) -> None:
        super().__init__(one_line(error))
        self.error = error
