"""The exception that means "the user can fix this" (one line, names the thing, says what would be right), and two that end a job."""


class UserError(ValueError):
    """A mistake in what the user gave (a path, a key, a shape), not in the program.

    The command line prints its message as one line and exits with code 2; from Python it is an ordinary ``ValueError``.
    """


class Preempted(Exception):
    """The scheduler takes the machine away: everything is saved, and the same command goes on from there.

    The command line exits with code 75, "try again", where 0 would tell a scheduler that the job is done.
    """


class PeerLost(Exception):
    """Another process of the job is gone, so this one cannot go on; the message says which and why."""
