"""Loops, listeners and pairs of comms for the tests of the contract."""

import asyncio
import contextlib
import functools
import gc

from distributed.comm import connect, listen
from distributed.comm.core import Comm


def in_loop(function=None, *, timeout=30):
    """Runs an ``async def`` test in a loop of its own, and looks at what it leaves behind."""
    if function is None:
        return functools.partial(in_loop, timeout=timeout)

    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        async def main():
            try:
                await asyncio.wait_for(function(*args, **kwargs), timeout)
            finally:
                await settled()

        before = set(Comm._instances)
        asyncio.run(main())
        gc.collect()
        left = [comm for comm in set(Comm._instances) - before if not comm.closed()]
        assert not left, left

    return wrapper


async def settled(timeout=5):
    """Waits until no task is left but the caller's own."""
    try:
        await until(lambda: not (asyncio.all_tasks() - {asyncio.current_task()}), timeout)
    except TimeoutError:
        raise AssertionError(f"left running: {asyncio.all_tasks()}") from None


async def until(condition, timeout=10):
    """Waits for a condition that nobody announces."""
    deadline = asyncio.get_running_loop().time() + timeout
    while not condition():
        if asyncio.get_running_loop().time() > deadline:
            raise TimeoutError("the condition did not come true")
        await asyncio.sleep(0.005)


@contextlib.asynccontextmanager
async def listening(protocol, handler, host="127.0.0.1", **kwargs):
    listener = await listen(f"{protocol}://{host}:0", handler, **kwargs)
    try:
        yield listener
    finally:
        listener.stop()


@contextlib.asynccontextmanager
async def pair(protocol, host="127.0.0.1", connect_args=None, **kwargs):
    """Two comms that are connected: who connected, and who was connected to."""
    accepted = asyncio.get_running_loop().create_future()

    def handler(comm):
        accepted.set_result(comm)
        return accepted

    async with listening(protocol, handler, host, **kwargs) as listener:
        a = await connect(listener.contact_address, **(connect_args or {}))
        b = await accepted
    try:
        yield a, b
    finally:
        a.abort()
        b.abort()
