"""``async with`` and ``async for`` for the compiled classes."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, TypeVar

from ._errors import ClosedError, Error

T = TypeVar("T")


async def enter(thing: T) -> T:
    return thing


async def leave(thing: Any) -> None:
    """Closes a node or an endpoint. One that has ended before has nothing left to close."""
    try:
        await thing.close()
    except Error:
        pass


async def leave_listener(listener: Any) -> None:
    listener.close()


async def next_endpoint(listener: Any) -> Any:
    try:
        return await listener.accept()
    except ClosedError:
        raise StopAsyncIteration from None


def close_callback(endpoint: weakref.ref[Any]) -> Callable[[Any], Callable[[Error], object]]:
    """Makes of a callback of an endpoint's one that is called with the error alone."""

    def with_callback(callback: Any) -> Callable[[Error], object]:
        return lambda why: callback(endpoint(), why)

    return with_callback
