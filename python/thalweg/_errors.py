"""thalweg's exceptions: a small hierarchy that maps to the built-in ones users expect."""

from __future__ import annotations

import asyncio
import sys


class Error(Exception):
    """Any failure of thalweg's. Says what failed, with whom, over which link and when.

    Attributes:
        kind: what failed, for instance ``"refused"``; stable, to be matched on.
        phase: what was being done: ``"setup"``, ``"listen"``, ``"connect"``, ``"link set-up"``,
            ``"transfer"`` or ``"close"``.
        peer: the peer's address, where one was known.
        link: the link that failed (``"tcp"``, ``"shm"``, ...), where one was up.
        errno: the operating system's error number, where there was one.
        hint: what a person might do about it, where this is known.
        retryable: whether the same again, perhaps after a new connect, may succeed.
        close_code, close_text, closed_by_peer: the reason given at close, where one was.
    """

    kind: str = "io"
    phase: str | None = None
    peer: str | None = None
    link: str | None = None
    hint: str | None = None
    retryable: bool = False
    close_code: int | None = None
    close_text: str | None = None
    closed_by_peer: bool | None = None
    errno: int | None = None


class ConnectError(Error, ConnectionError):
    """A connection could not be made."""


class RefusedError(ConnectError, ConnectionRefusedError):
    """Nobody listens at the address."""


class NoRouteError(ConnectError):
    """No link that both sides have satisfies the settings."""


class ClosedError(Error, ConnectionError):
    """The endpoint was closed, by this side or by the peer."""


class PeerGoneError(Error, ConnectionResetError):
    """The peer is gone without saying goodbye: killed, crashed, or its host is down."""


class ConnectionLostError(Error, ConnectionResetError):
    """The connection failed although the peer may live."""


if sys.version_info >= (3, 11):

    class TimedOutError(Error, TimeoutError):
        """A deadline passed."""

else:
    # Before 3.11 asyncio has a class of its own.
    class TimedOutError(Error, TimeoutError, asyncio.TimeoutError):
        """A deadline passed."""


class AddressError(Error, OSError):
    """A name that does not resolve, or an address that is taken."""


class InvalidInputError(Error, ValueError):
    """An address or a setting that cannot be understood."""


class ProtocolError(Error, ConnectionError):
    """The other side does not speak thalweg's protocol, or breaks it."""


class LimitError(Error, ValueError):
    """A limit of this node's or of the peer's settings was exceeded."""


class BufferTooSmallError(Error, BufferError):
    """The receive buffer is smaller than the payload with the matching tag."""


class RemoteAccessError(Error, PermissionError):
    """A put or get outside its region, or with a key that is unknown or revoked."""


class InUseError(Error, BufferError):
    """Memory cannot be given back: a transfer uses it, or a device may still reach it."""


class ResourcesError(Error, OSError):
    """Descriptors, memory or another resource of this process ran out."""


class NodeGoneError(Error, RuntimeError):
    """The node was closed, or its event loop has ended."""


class ForkedError(Error, RuntimeError):
    """This process was forked from the one that made the node."""


class UnsupportedError(Error, NotImplementedError):
    """Something is not supported by this link or this build."""


class OperatingSystemError(Error, OSError):
    """Another failure of the operating system."""

_CLASSES: dict[str, type[Error]] = {
    "invalid-input": InvalidInputError,
    "name-resolution": AddressError,
    "address-in-use": AddressError,
    "refused": RefusedError,
    "timed-out": TimedOutError,
    "not-thalweg": ProtocolError,
    "version-mismatch": ProtocolError,
    "protocol": ProtocolError,
    "limit-exceeded": LimitError,
    "closed": ClosedError,
    "peer-gone": PeerGoneError,
    "connection-lost": ConnectionLostError,
    "buffer-too-small": BufferTooSmallError,
    "out-of-bounds": RemoteAccessError,
    "key-revoked": RemoteAccessError,
    "in-use": InUseError,
    "no-route": NoRouteError,
    "resources": ResourcesError,
    "cancelled": Error,
    "runtime-gone": NodeGoneError,
    "forked": ForkedError,
    "unsupported": UnsupportedError,
    "io": OperatingSystemError,
}

KINDS = frozenset(_CLASSES)


def make(text: str, **fields: object) -> Error:
    """The exception for a failure of the compiled part."""
    error = _CLASSES[str(fields["kind"])](text)
    for name, value in fields.items():
        setattr(error, name, value)
    return error
