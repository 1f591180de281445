"""What the tests of the Dask backend share.

Every test of the contract runs over ``tcp://`` too: a test that Dask's own TCP fails says nothing
about the contract.
"""

import gc
import logging
import os
import pathlib

import pytest

pytest.importorskip("distributed")

HERE = pathlib.Path(__file__).parent
PROTOCOLS = ["tcp", "thalweg"]
# Dask's batches wait by tornado's `Event.wait(deadline)`. A loop that ends as the deadline passes leaves
# the future of it, over any protocol.
LEFT_BY_DASK = "future: <Future finished exception=TimeoutError('Timeout')>"
NOISY_LOGGERS = ("asyncio", "tornado.application", "distributed.comm.thalweg", "distributed.comm.tcp")


def pytest_configure(config):
    config.addinivalue_line("markers", "noisy: the test provokes errors in the log")
    config.addinivalue_line("markers", "leaky: what is left of it is not ours")
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


def descriptors():
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture(autouse=True)
def nothing_left_behind(request, caplog):
    """A loop of thalweg's that has ended leaves no descriptor. (Dask's servers leave some.)"""
    strict = "thalweg" in getattr(getattr(request.node, "callspec", None), "params", {}).values()
    before = descriptors()
    yield
    if strict and not request.node.get_closest_marker("leaky"):
        # What was logged holds frames, and they hold comms.
        caplog.handler.reset()
        after = descriptors()
        assert after <= before, f"{after - before} descriptors are left over"


@pytest.fixture(autouse=True)
def quiet(request, caplog, nothing_left_behind):
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
    noise = [message for message in noise if not message.endswith(LEFT_BY_DASK)]
    assert not noise, noise
