"""One connection of each backend, all used in the same way.

``send(message)`` and ``recv()`` of a channel are what the backend itself offers where that is
possible: a wrapper would be measured too.
"""

from __future__ import annotations

import abc
import importlib
from collections.abc import Awaitable, Callable
from typing import Any

from ..case import Case
from ..errors import Unavailable

_MODULES = {
    "thalweg": "native",
    "asyncio": "asyncio_streams",
    "tornado": "tornado_streams",
    "ucxx": "ucxx_endpoints",
}

NAMES = tuple(_MODULES)


class Channel(abc.ABC):
    """A connection. It carries whole messages; both sides know how large the next one is."""

    #: What carries the bytes, and why, where the backend can say.
    link: str = "tcp"
    route: str | None = None
    #: Whether several sends may be begun before the first has ended.
    has_window: bool = True

    @abc.abstractmethod
    def message(self, content: bytes, frames: tuple[int, ...]) -> Any:
        """What ``send`` takes for this content."""

    @property
    @abc.abstractmethod
    def send(self) -> Callable[[Any], Awaitable[Any]]: ...

    @abc.abstractmethod
    def receiver(self, size_bytes: int) -> Callable[[], Awaitable[Any]]:
        """Receives one message of this size at each call."""

    @abc.abstractmethod
    def parts(self, received: Any) -> list[Any]:
        """The buffers of what a receiver gave."""

    @abc.abstractmethod
    async def close(self) -> None: ...


class Served(abc.ABC):
    """A listener for one connection."""

    port: int

    @abc.abstractmethod
    async def accept(self) -> Channel: ...


class Backend(abc.ABC):
    """Makes channels."""

    def __init__(self, case: Case) -> None:
        self.case = case

    @abc.abstractmethod
    async def listen(self, host: str) -> Served: ...

    @abc.abstractmethod
    async def connect(self, host: str, port: int) -> Channel: ...


def find(name: str) -> type[Backend]:
    """The backend of this name; raises :class:`Unavailable` if it is not installed."""
    try:
        module = importlib.import_module(f".{_MODULES[name]}", __name__)
    except ImportError as error:
        raise Unavailable(f"{name} cannot be measured here: {error}") from error
    found: type[Backend] = module.BACKEND
    return found
