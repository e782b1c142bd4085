"""The one exception that means "the user can mend this", and what else does; anything else that reaches the top is a bug."""

from __future__ import annotations

import errno


class UserError(ValueError):
    """A mistake of the user: the message names the value and the remedy in one line.

    It is a ``ValueError``, so that callers of the library need not know it. ``megatron_midus.cli.run`` prints it without
    a traceback, which it does for no other ``ValueError``.
    """


class UsageError(UserError):
    """A command line that cannot be read: an unknown flag, a value that its flag does not take. Exit code 2."""


# Names that are wrong or not allowed, media that are full or broken, peers that are gone. Not here: what wrong use of a
# call gives (EBADF, EINVAL, ECHILD …), and errors without a number, such as a shared library that cannot be loaded.
_OUTSIDE = {
    getattr(errno, name)
    for name in (
        *("ENOENT", "ENOTDIR", "EISDIR", "EEXIST", "ENOTEMPTY", "ENAMETOOLONG", "ELOOP", "EXDEV", "EBUSY", "ETXTBSY"),
        *("EACCES", "EPERM", "EROFS", "ENOSPC", "EDQUOT", "EFBIG", "EIO", "ENODEV", "ENXIO", "ESTALE", "EREMOTEIO"),
        *("EMFILE", "ENFILE", "ENOMEM", "EPIPE", "ENOLCK", "ENOSYS", "EOPNOTSUPP", "ETIMEDOUT", "EADDRINUSE"),
        *("EADDRNOTAVAIL", "ECONNREFUSED", "ECONNRESET", "ECONNABORTED", "EHOSTUNREACH", "ENETUNREACH", "ENETDOWN"),
    )
    if hasattr(errno, name)
}


def is_users_mistake(error: BaseException) -> bool:
    """Whether one line tells enough: a :class:`UserError`, or what the file system or the network refused."""
    if isinstance(error, OSError):
        return error.errno in _OUTSIDE or isinstance(error, (ConnectionError, TimeoutError))
    return isinstance(error, UserError)
