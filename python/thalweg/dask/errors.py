"""thalweg's errors as those that Dask expects."""

from __future__ import annotations

import errno
import os
import socket
from typing import Any, NoReturn

import thalweg
from distributed.comm.core import CommClosedError, FatalCommClosedError

#: What trying again does not change: ``distributed.comm.connect`` gives up at once.
FATAL_KINDS = frozenset(
    {"not-thalweg", "version-mismatch", "no-route", "invalid-input", "unsupported", "forked"}
)

#: How a connection ends that was there.
_ENDED_KINDS = frozenset({"connection-lost", "peer-gone", "closed"})
#: What the system says of a connection that never was.
_NO_WAY = frozenset({errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ENETDOWN})


def is_hung_up(error: thalweg.Error) -> bool:
    """Whether this error of ``connect`` says that somebody was there, and ended the connection
    before it was set up."""
    return error.kind in _ENDED_KINDS and error.errno not in _NO_WAY


def closed(where: Any, error: BaseException) -> CommClosedError:
    """What Dask calls this error of a comm, a connector or a listener."""
    text = f"in {where}: {type(error).__name__}: {error}"
    if isinstance(error, thalweg.Error) and error.kind in FATAL_KINDS:
        return FatalCommClosedError(text)
    return CommClosedError(text)


def no_such_name(address: str) -> socket.gaierror:
    """What a socket says of a host that is none. ``distributed.comm.connect`` tries again."""
    return socket.gaierror(socket.EAI_NONAME, f"Name or service not known: {address!r}")


def raise_from_listening(address: str, error: thalweg.Error) -> NoReturn:
    """Binding fails with what a socket would say: callers look at ``errno``."""
    if error.kind == "name-resolution":
        raise socket.gaierror(socket.EAI_NONAME, str(error)) from error
    if error.errno is not None:
        text = f"{os.strerror(error.errno)} ({address})"
        raise OSError(error.errno, text) from error
    if isinstance(error, (OSError, ValueError, RuntimeError)):
        raise error
    raise OSError(str(error)) from error
