"""What is thalweg's own beyond the contract: backpressure, settings, the route, its errors."""

import asyncio
import contextlib
import importlib.metadata
import logging
import os
import signal
import socket
import subprocess
import sys

import dask.config
import numpy as np
import pytest
import thalweg
from dask_support import in_loop, listening, pair, until
from distributed import Scheduler
from distributed.comm import CommClosedError, connect, listen
from distributed.comm.core import FatalCommClosedError
from distributed.protocol import to_serialize
from thalweg.dask import ThalwegBackend, config, errors
from thalweg.dask import comm as comm_module
from thalweg.dask.node import _nodes, begin, node_here

MEBIBYTE = 1 << 20


def settings(**values):
    """Settings under ``distributed.comm.thalweg``."""
    named = {config.PREFIX + name.replace("_", "-"): value for name, value in values.items()}
    return dask.config.set(named)


def blob(nbytes):
    return to_serialize(np.ones(nbytes, "u1"))


def test_the_entry_point():
    [point] = importlib.metadata.entry_points(group="distributed.comm.backends", name="thalweg")
    assert point.load() is ThalwegBackend


def test_defaults_are_loaded_and_give_way():
    assert dask.config.get("distributed.comm.thalweg.spin") == "0us"
    with settings(spin="5us"):
        config.load_defaults()
        assert dask.config.get("distributed.comm.thalweg.spin") == "5us"


def test_settings_reach_the_node():
    arguments = config.node_arguments()
    assert arguments["connect_timeout"] == 30 and arguments["keepalive"] == 30
    assert arguments["backlog"] == 2048
    assert not {"transports", "message_window", "spin_us"} & set(arguments)
    with settings(
        transports="TCP, shm",
        message_window="1 MiB",
        node_budget="10MiB",
        spin="20us",
        host_pool="3MiB",
        single_copy=False,
        peer_write="no",
        close_timeout="2s",
        max_message="5 GiB",
    ):
        arguments = config.node_arguments()
    assert arguments["transports"] == ["tcp", "shm"]
    assert arguments["message_window"] == MEBIBYTE
    assert arguments["node_budget"] == 10 * MEBIBYTE
    assert arguments["spin_us"] == 20
    assert arguments["host_pool"] == 3 * MEBIBYTE
    assert arguments["single_copy"] is False
    assert arguments["peer_write"] is False
    assert arguments["close_timeout"] == 2
    assert arguments["max_message"] == 5 << 30


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("spin", "-1s"),
        ("spin", "banana"),
        ("close_timeout", "-1s"),
        ("message_window", "much"),
        ("message_window", -5),
        ("host_pool", "1 ZB"),
        ("single_copy", "maybe"),
        ("peer_write", "maybe"),
    ],
)
def test_a_setting_that_makes_no_sense(name, value):
    async def start():
        await listen("thalweg://127.0.0.1:0", lambda comm: None)

    wrong = f"distributed.comm.thalweg.{name.replace('_', '-')} is n"
    with settings(**{name: value}), pytest.raises(ValueError, match=wrong):
        asyncio.run(start())


def test_an_unknown_transport():
    async def start():
        await listen("thalweg://127.0.0.1:0", lambda comm: None)

    with settings(transports=["pigeon"]), pytest.raises(ValueError, match="pigeon"):
        asyncio.run(start())


def test_a_limit_that_dask_cannot_live_with_is_refused():
    for value in [0, 1000, "1023 KiB"]:
        with settings(max_message=value), pytest.raises(ValueError, match="max-message.*1 MiB"):
            config.node_arguments()
    with settings(max_message="1 MiB"):
        assert config.node_arguments()["max_message"] == MEBIBYTE


@pytest.mark.parametrize(("word", "meaning"), [("off", False), ("no", False), ("On", True), (1, True)])
def test_switches_may_be_words(word, meaning):
    with settings(single_copy=word):
        assert config.node_arguments()["single_copy"] is meaning


def test_who_does_not_speak_thalweg_is_named_at_once():
    def answer():
        connection, _ = server.accept()
        with connection, contextlib.suppress(ConnectionResetError):
            connection.sendall(b"what Dask says over tcp, for instance")
            while connection.recv(1000):
                pass

    async def main():
        address = f"thalweg://127.0.0.1:{server.getsockname()[1]}"
        answering = asyncio.ensure_future(asyncio.to_thread(answer))
        with pytest.raises(FatalCommClosedError, match="not thalweg"):
            await connect(address, timeout=10)
        await answering

    with socket.create_server(("127.0.0.1", 0)) as server:
        asyncio.run(main())


def test_the_log_tells_of_who_does_not_speak_thalweg(caplog):
    """A client with the wrong protocol hears something; whoever runs the scheduler shall, too."""

    async def main():
        async with Scheduler(host="127.0.0.1", protocol="thalweg", dashboard_address=":0") as scheduler:
            address = scheduler.address.replace("thalweg://", "tcp://")
            with contextlib.suppress(OSError, asyncio.TimeoutError):
                await asyncio.wait_for(connect(address, timeout=1), 2)
            await until(lambda: any(record.name == "thalweg" for record in caplog.records))

    asyncio.run(main())
    (record,) = [record for record in caplog.records if record.name == "thalweg"]
    assert record.levelno == logging.WARNING
    assert record.getMessage().startswith("handshake failed: peer is not thalweg")


def test_tcp_timeouts_that_are_shorter_than_possible():
    timeouts = {"distributed.comm.timeouts.connect": 0, "distributed.comm.timeouts.tcp": "1s"}
    with dask.config.set(timeouts):
        arguments = config.node_arguments()
    assert arguments["connect_timeout"] > 0 and arguments["keepalive"] >= 3


@pytest.mark.parametrize("link", ["shm", "tcp"])
def test_the_link_is_told(link):
    @in_loop
    async def test():
        async with pair("thalweg") as (a, b):
            assert a.extra_info["link"] == b.extra_info["link"] == link
            assert a.same_host and b.same_host
            for nbytes in [10, 100_000, 20_000_000]:
                _, got = await asyncio.gather(a.write({"x": blob(nbytes)}), b.read())
                assert got["x"].sum() == nbytes

    with settings(transports=[link, "tcp"]):
        test()


@pytest.mark.parametrize("link", ["shm", "tcp"])
def test_a_reader_that_does_not_read_stops_the_writer(link):
    size = MEBIBYTE // 4

    @in_loop
    async def test():
        async with pair("thalweg") as (a, b):
            written = 0

            async def write():
                nonlocal written
                for _ in range(100):
                    await a.write({"x": blob(size)})
                    written += 1

            task = asyncio.ensure_future(write())
            await until(lambda: written)
            before = -1
            while before != written:
                before = written
                await asyncio.sleep(0.2)
            # The window, and what the system holds of tcp besides.
            assert 2 <= written <= 40
            assert not task.done()
            for _ in range(100):
                assert (await b.read())["x"].nbytes == size
            await task

    with settings(transports=[link, "tcp"], message_window=MEBIBYTE):
        test()


def test_a_message_that_is_larger_than_the_window():
    @in_loop
    async def test():
        async with pair("thalweg") as (a, b):
            _, got = await asyncio.gather(a.write({"x": blob(10 * MEBIBYTE)}), b.read())
            assert got["x"].nbytes == 10 * MEBIBYTE

    with settings(message_window=MEBIBYTE):
        test()


def test_a_message_that_is_too_large():
    """It is refused, and the connection goes on."""

    @in_loop
    async def test():
        async with pair("thalweg") as (a, b):
            with pytest.raises(ValueError):
                await a.write({"x": blob(3 * MEBIBYTE)})
            assert not a.closed()
            await a.write("short")
            assert await b.read() == "short"

    with settings(max_message=2 * MEBIBYTE):
        test()


def test_a_write_that_is_cancelled_while_it_waits():
    """Whole or not at all, and what comes after it arrives."""

    @in_loop
    async def test():
        async with pair("thalweg") as (a, b):
            for _ in range(2):
                await a.write({"x": blob(MEBIBYTE // 2 - 4096)})
            write = asyncio.ensure_future(a.write({"x": blob(MEBIBYTE)}))
            await asyncio.sleep(0.1)
            assert not write.done()
            write.cancel()
            with pytest.raises(asyncio.CancelledError):
                await write
            assert not a.closed()
            last = asyncio.ensure_future(a.write("last"))
            sizes = []
            while not isinstance(message := await b.read(), str):
                sizes.append(message["x"].nbytes)
            await last
            assert sizes in ([MEBIBYTE // 2 - 4096] * 2, [MEBIBYTE // 2 - 4096] * 2 + [MEBIBYTE])

    with settings(message_window=MEBIBYTE):
        test()


def test_closing_waits_for_a_write_that_waits():
    @in_loop
    async def test():
        async with pair("thalweg") as (a, b):
            writes = [asyncio.ensure_future(a.write({"i": i, "x": blob(MEBIBYTE)})) for i in range(4)]
            await asyncio.sleep(0.1)
            close = asyncio.ensure_future(asyncio.wait_for(a.close(), 20))
            await asyncio.sleep(0.1)
            assert not close.done()
            assert [(await b.read())["i"] for _ in range(4)] == list(range(4))
            await close
            await asyncio.gather(*writes)

    with settings(message_window=MEBIBYTE):
        test()


PEER = """
    import asyncio, sys
    from distributed.comm import connect
    from distributed.protocol import to_serialize
    import numpy as np

    async def main():
        comm = await connect(sys.argv[1])
        await comm.write({"x": to_serialize(np.ones(1000, "u1"))})
        print("ready", flush=True)
        await comm.read()

    asyncio.run(main())
"""


def kill(process):
    """As ``process.kill()``, which also looks for the end and takes it from asyncio's own watcher."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(process.pid, signal.SIGKILL)


class Stranger:
    """Another process that connects, writes one message, and reads for ever."""

    async def __aenter__(self):
        loop = asyncio.get_running_loop()
        self.accepted = loop.create_future()

        async def handler(comm):
            self.accepted.set_result(comm)

        self._listening = listening("thalweg", handler)
        listener = await self._listening.__aenter__()
        code = "\n".join(line[4:] for line in PEER.splitlines())
        self.process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", code, listener.contact_address, stdout=subprocess.PIPE
        )
        comm = await self.accepted
        assert (await comm.read())["x"].sum() == 1000
        assert await self.process.stdout.readline() == b"ready\n"
        return comm, self.process

    async def __aexit__(self, *_):
        self.accepted.result().abort()
        if self.process.returncode is None:
            kill(self.process)
        await self.process.communicate()
        await self._listening.__aexit__(None, None, None)


@in_loop
async def test_a_peer_that_is_killed_is_noticed_at_once():
    async with Stranger() as (comm, process):
        read = asyncio.ensure_future(comm.read())
        await asyncio.sleep(0.05)
        kill(process)
        with pytest.raises(CommClosedError) as caught:
            await asyncio.wait_for(read, 5)
        assert "PeerGoneError" in str(caught.value)
        assert isinstance(caught.value.__cause__, thalweg.Error)
        assert comm.closed()


@in_loop
async def test_closing_does_not_wait_for_a_peer_that_does_not_run(monkeypatch):
    monkeypatch.setattr(comm_module, "CLOSE_WAIT_S", 0.2)
    async with Stranger() as (comm, process):
        os.kill(process.pid, signal.SIGSTOP)
        try:
            await comm.write("for later")
            await asyncio.wait_for(comm.close(), 3)
            assert comm.closed()
        finally:
            os.kill(process.pid, signal.SIGCONT)
        # And what was written arrived: it was waiting for that, and then ends.
        await asyncio.wait_for(process.wait(), 20)
        assert process.returncode == 0


def test_what_is_fatal():
    """Connecting is tried again, unless that cannot help."""

    def error(kind):
        made = thalweg.Error.__new__(thalweg.Error)
        made.kind = kind
        return made

    assert type(errors.closed("here", error("refused"))) is CommClosedError
    assert type(errors.closed("here", error("peer-gone"))) is CommClosedError
    for kind in errors.FATAL_KINDS:
        assert type(errors.closed("here", error(kind))) is FatalCommClosedError


@in_loop
async def test_a_loop_has_one_node_while_it_needs_one():
    loop = asyncio.get_running_loop()
    assert loop not in _nodes
    async with listening("thalweg", lambda comm: comm.close()) as listener:
        node = node_here()
        comm = await connect(listener.contact_address)
        assert node_here() is node and not node.is_closed
        with pytest.raises(CommClosedError):
            await comm.read()
    await until(lambda: node.is_closed)
    assert loop not in _nodes
    # Again, with settings as they are then.
    with settings(transports=["tcp"]):
        async with pair("thalweg") as (a, _):
            assert a.extra_info["link"] == "tcp"


@in_loop
async def test_what_is_begun_goes_on_by_itself():
    node, other = thalweg.Node(), thalweg.Node()
    listener = await other.listen("thalweg://127.0.0.1:0")
    kept = await node.connect(listener.address), await listener.accept()
    # It waits for the other side's answer.
    begin(node.close())
    assert not node.is_closed
    await until(lambda: node.is_closed)
    assert all(endpoint.is_closed for endpoint in kept)
    await other.close()


@in_loop
async def test_many_short_frames_travel_as_one():
    async with pair("thalweg") as (a, b):
        arrays = [np.full(i % 50, i % 256, "u1") for i in range(3000)]
        await a.write({"x": [to_serialize(x) for x in arrays]})
        got = await b.read()
        assert all((x == y).all() and x.flags.writeable for x, y in zip(arrays, got["x"], strict=True))


def test_putting_together_and_taking_apart():
    frames = [bytes([i]) * i for i in range(40)]
    size = sum(map(len, frames))
    sent = comm_module._put_together(frames, size)
    assert len(sent) == 2 and not sent[0]
    taken = comm_module._taken_apart([memoryview(bytearray(frame)) for frame in sent])
    assert [bytes(frame) for frame in taken] == frames
    for few in ([b"head", b"x" * 10], [b"head", b""], [b"head"] * 3):
        assert [bytes(f) for f in comm_module._put_together(few, sum(map(len, few)))] == few
        assert comm_module._taken_apart([memoryview(f) for f in few]) == few


FORKED = """
    import asyncio, os, sys
    from distributed.comm import CommClosedError, connect, listen

    async def main():
        async def handler(comm):
            await comm.read()

        listener = await listen("thalweg://127.0.0.1:0", handler)
        comm = await connect(listener.contact_address)
        child = os.fork()
        if child == 0:
            # asyncio itself knows no loop here, so the coroutine is driven by hand.
            try:
                comm.write("x").send(None)
            except CommClosedError:
                os._exit(7)
            finally:
                os._exit(1)
        _, status = os.waitpid(child, 0)
        await comm.write("the parent goes on")
        await comm.close()
        listener.stop()
        sys.exit(os.waitstatus_to_exitcode(status))

    asyncio.run(main())
"""


def test_a_forked_child_is_told():
    code = "\n".join(line[4:] for line in FORKED.splitlines())
    done = subprocess.run([sys.executable, "-c", code], timeout=30, capture_output=True, text=True)
    assert done.returncode == 7, done.stderr


@in_loop
async def test_a_cancelled_write_loses_its_message_and_not_the_comm():
    with settings(message_window="1 MiB"):
        async with pair("thalweg") as (a, b):
            first = asyncio.ensure_future(a.write({"n": 1, "x": blob(MEBIBYTE)}))
            second = asyncio.ensure_future(a.write({"n": 2, "x": blob(MEBIBYTE)}))
            await asyncio.sleep(0.1)
            assert not second.done()
            second.cancel()
            with pytest.raises(asyncio.CancelledError):
                await second
            assert not a.closed()
            third = asyncio.ensure_future(a.write({"n": 3}))
            assert [(await b.read())["n"] for _ in range(2)] == [1, 3]
            await first
            await third
