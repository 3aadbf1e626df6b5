"""The one exception that means "the user can mend this": its text is printed as it is, without a traceback."""


class UserError(ValueError):
    """A mistake in the command, the configuration or the data.

    The message says what was wrong, where, and what to type instead, in one line;
    the commands print it and exit with code 2.
    """
