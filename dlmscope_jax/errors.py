"""The one exception that means "the user can fix this": one line, names the thing, says what would be right."""


class UserError(ValueError):
    """A mistake in what the user gave (a path, a key, a shape), not in the program.

    The command line prints its message as one line and exits with code 2; from Python it is an ordinary ``ValueError``.
    """
