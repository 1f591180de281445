"""What the tests of the Dask backend share.

Every test of the contract runs over ``tcp://`` too: a test that Dask's own TCP fails says nothing
about the contract.
"""

import asyncio
import contextlib
import functools
import gc
import logging
import pathlib

import pytest

pytest.importorskip("distributed")

import dask.config  # noqa: E402
from distributed.comm import connect, listen  # noqa: E402
from distributed.comm.core import Comm  # noqa: E402

HERE = pathlib.Path(__file__).parent
PROTOCOLS = ["tcp", "thalweg"]
NOISY_LOGGERS = ("asyncio", "tornado.application", "distributed.comm.thalweg", "distributed.comm.tcp")


def pytest_configure(config):
    config.addinivalue_line("markers", "noisy: the test provokes errors in the log")
    config.addinivalue_line("markers", "limit(seconds): how long a test with a cluster may take")


def pytest_collection_modifyitems(items):
    for item in items:
        if HERE in pathlib.Path(item.fspath).parents:
            # First, so that marks of the tests themselves are stronger.
            item.add_marker(pytest.mark.filterwarnings("error"), append=False)
            if "tcp" in getattr(getattr(item, "callspec", None), "params", {}).values():
                # Tornado leaves sockets to the collector.
                item.add_marker(pytest.mark.filterwarnings("ignore::ResourceWarning"))


@pytest.fixture(params=PROTOCOLS)
def protocol(request):
    return request.param


@pytest.fixture(autouse=True)
def quiet(request, caplog):
    """No test leaves an error in the log of asyncio, of tornado or of the backend."""
    yield
    gc.collect()
    if request.node.get_closest_marker("noisy"):
        return
    noise = [
        record.getMessage()
        for record in caplog.get_records("call") + caplog.get_records("teardown")
        if record.levelno >= logging.WARNING and record.name.startswith(NOISY_LOGGERS)
    ]
    assert not noise, noise


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


@pytest.fixture
def config():
    """Settings of Dask for one test."""
    with contextlib.ExitStack() as stack:
        yield lambda **values: stack.enter_context(
            dask.config.set({key.replace("__", "."): value for key, value in values.items()})
        )
