"""The one exception that means "the user can mend this"; anything else that reaches the top is a bug."""


class UserError(ValueError):
    """A mistake of the user: the message names the value and the remedy in one line.

    It is a ``ValueError``, so that callers of the library need not know it. ``megatron_midus.cli.run`` prints it without
    a traceback, which it does for no other ``ValueError``.
    """


class UsageError(UserError):
    """A command line that cannot be read: an unknown flag, a value that its flag does not take. Exit code 2."""
