"""What the tests of the compiled part share: every test runs in a loop of its own, for a bounded
time, and leaves no task, descriptor or node behind."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
import thalweg

LIMIT = 30.0

# A background job of a shell without job control is begun with interrupts ignored, and what it starts
# would be, too.
signal.signal(signal.SIGINT, signal.default_int_handler)


def run(body: Callable[..., Awaitable[Any]]) -> Callable[..., Any]:
    """A coroutine as a test, with a time limit."""

    @functools.wraps(body)
    def test(*args: Any, **kwargs: Any) -> None:
        async def bounded() -> None:
            await asyncio.wait_for(body(*args, **kwargs), LIMIT)

        asyncio.run(bounded())

    return test


@contextlib.asynccontextmanager
async def pair(**settings: Any) -> AsyncIterator[tuple[Any, Any]]:
    """Two endpoints of one node, connected with each other."""
    async with thalweg.Node(**settings) as node:
        async with await node.listen("thalweg://127.0.0.1:0") as listener:
            there, here = await asyncio.gather(
                dial(node, listener.address), accepted(listener)
            )
        yield there, here


async def dial(node: Any, address: str) -> Any:
    return await node.connect(address)


async def accepted(listener: Any) -> Any:
    return await listener.accept()


@pytest.fixture(params=["shm", "tcp"])
def link(request: pytest.FixtureRequest) -> str:
    return request.param


def descriptors() -> int:
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Any:
    before = descriptors()
    yield
    assert descriptors() <= before, "descriptors are left over"
