"""The one error type that is a user's to fix."""


class TruePoseError(ValueError):
    """A wrong input, file or argument.

    The message says what was given, what was expected, and what to do. The command line prints it
    without a traceback and exits with code 2.
    """
