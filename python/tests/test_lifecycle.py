"""Connecting, closing, dying, threads and forks; and that an idle node does nothing."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import thalweg
from conftest import LIMIT, accepted, dial, pair, run


@run
async def test_errors_of_connecting() -> None:
    async with thalweg.Node(connect_timeout=5) as node:
        async with await node.listen("thalweg://127.0.0.1:0") as listener:
            address = listener.address
            with pytest.raises(OSError) as taken:
                await node.listen(address)
            assert taken.value.kind == "address-in-use"
        with pytest.raises(ConnectionRefusedError) as refused:
            await node.connect(address)
        error = refused.value
        assert isinstance(error, (thalweg.RefusedError, thalweg.ConnectError, thalweg.Error))
        assert error.kind == "refused" and error.phase == "connect" and error.retryable
        assert error.errno == 111 and address.removeprefix("thalweg://") in str(error)
        for wrong in ["", "thalweg://", "tcp://127.0.0.1:1", "thalweg://host", "thalweg://h:99999"]:
            with pytest.raises(ValueError):
                await node.connect(wrong)
        with pytest.raises(OSError) as unknown:
            await node.connect("thalweg://no-such-host.invalid:1", timeout=20)
        assert unknown.value.kind == "name-resolution"
    with pytest.raises(TypeError):
        thalweg.Node(no_such_setting=1)
    with pytest.raises(ValueError):
        thalweg.Node(transports="pigeon")
    with pytest.raises(ValueError, match="stands alone"):
        thalweg.Node(transports=["auto", "tcp"])
    async with thalweg.Node(transports="auto"):
        pass
    with pytest.raises(ValueError):
        thalweg.Node(connect_timeout=-1)
    for name in ["max_message", "message_window", "tag_window"]:
        with pytest.raises(ValueError, match=f"at least 4096 .THALWEG_{name.upper()}"):
            thalweg.Node(**{name: 4095})


async def said(caplog: pytest.LogCaptureFixture, what: str) -> logging.LogRecord:
    """The record of the logger ``thalweg`` that says this, when it is there."""
    while True:
        for record in caplog.records:
            if record.name == "thalweg" and what in record.getMessage():
                return record
        await asyncio.sleep(0.005)


@run
async def test_a_stranger_at_the_door_is_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    async with thalweg.Node() as node, await node.listen("thalweg://127.0.0.1:0") as listener:
        port = int(listener.address.rpartition(":")[2])
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET / HTTP/1.1\r\n\r\n")
        record = await said(caplog, "handshake failed")
        assert record.levelno == logging.WARNING
        own = writer.get_extra_info("sockname")[1]
        assert "not thalweg" in record.getMessage() and str(own) in record.getMessage()
        writer.close()
        # Who merely goes away is not worth a warning.
        caplog.clear()
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.close()
        await until_stats(node, lambda stats: stats["handshakes_failed"] == 2)
        assert not caplog.records


async def until_stats(node: thalweg.Node, condition: Callable[[dict[str, Any]], bool]) -> None:
    while not condition(node.stats()):
        await asyncio.sleep(0.005)


@run
async def test_the_log_has_more_for_who_wants_it(caplog: pytest.LogCaptureFixture) -> None:
    async with pair():
        pass
    assert not caplog.records
    caplog.set_level(logging.INFO, "thalweg")
    async with pair():
        record = await said(caplog, "endpoint up")
        assert record.levelno == logging.INFO and "link shm" in record.getMessage()
    caplog.set_level(logging.WARNING, "thalweg")
    caplog.clear()
    async with pair():
        pass
    assert not caplog.records


@run
async def test_a_log_that_fails_harms_nobody(caplog: pytest.LogCaptureFixture) -> None:
    """It is told with no lock in hand, and what it raises is not the operation's affair."""
    seen = []

    class Handler(logging.Handler):
        def handle(self, record: logging.LogRecord) -> bool:
            seen.append(node.stats()["endpoints"])
            raise ValueError("a handler that fails")

    handler = Handler()
    caplog.set_level(logging.INFO, "thalweg")
    logging.getLogger("thalweg").addHandler(handler)
    raised: list[Any] = []
    hook, sys.unraisablehook = sys.unraisablehook, lambda args: raised.append(args.exc_type)
    try:
        async with thalweg.Node() as node, await node.listen("thalweg://127.0.0.1:0") as listener:
            there, here = await asyncio.gather(dial(node, listener.address), accepted(listener))
            await there.send(b"goes on")
            assert bytes((await here.recv())[0]) == b"goes on"
    finally:
        logging.getLogger("thalweg").removeHandler(handler)
        sys.unraisablehook = hook
    assert seen and raised == [ValueError] * len(seen)


@run
async def test_a_stranger() -> None:
    """What answers, but not with thalweg's protocol."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n" * 10)
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with thalweg.Node() as node:
        with pytest.raises(ConnectionError):
            await node.connect(f"thalweg://127.0.0.1:{port}", timeout=10)
    server.close()
    await server.wait_closed()


@run
async def test_encryption_is_refused() -> None:
    async with pair(require_encryption=True) as (there, _):
        assert there.link == "shm"
    with pytest.raises(thalweg.NoRouteError):
        async with pair(require_encryption=True, transports="tcp"):
            pass


@run
async def test_close_says_why(link: str) -> None:
    async with pair(transports=link, hello=b"who I am") as (there, here):
        assert there.peer_hello == b"who I am"
        assert there.local_address == here.peer_address
        assert here.local_address == there.peer_address
        told: list[tuple[object, thalweg.Error]] = []
        for endpoint in (there, here):
            endpoint.add_close_callback(lambda endpoint, why: told.append((endpoint, why)))
        waiting = [asyncio.ensure_future(here.recv()), asyncio.ensure_future(here.closed())]
        await there.send(b"last words")
        await there.close(42, "enough")
        assert bytes((await waiting[0])[0]) == b"last words"
        why = await waiting[1]
        assert (why.close_code, why.close_text, why.closed_by_peer) == (42, "enough", True)
        with pytest.raises(thalweg.ClosedError) as caught:
            await here.recv()
        assert caught.value.close_code == 42 and isinstance(caught.value, ConnectionError)
        with pytest.raises(thalweg.ClosedError):
            await there.send(b"late")
        await _until(lambda: len(told) == 2)
        assert {endpoint for endpoint, _ in told} == {there, here}
        assert there.is_closed and here.is_closed and here.close_error.close_code == 42


async def _until(condition: object) -> None:
    deadline = time.monotonic() + 10
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline
        await asyncio.sleep(0.005)


@run
async def test_listeners() -> None:
    async with thalweg.Node() as node:
        listener = await node.listen("thalweg://[::1]:0")
        assert listener.address.startswith("thalweg://[::1]:")
        seen = []

        async def serve() -> None:
            async for endpoint in listener:
                seen.append(endpoint)

        server = asyncio.create_task(serve())
        ends = await asyncio.gather(*(dial(node, listener.address) for _ in range(20)))
        await _until(lambda: len(seen) == 20)
        waiting = asyncio.ensure_future(listener.accept())
        await asyncio.sleep(0.01)
        listener.close()
        await server
        with pytest.raises(thalweg.ClosedError):
            await waiting
        with pytest.raises(thalweg.ClosedError):
            await listener.accept()
        with pytest.raises(TimeoutError):
            async with await node.listen("thalweg://127.0.0.1:0") as other:
                await other.accept(timeout=0.02)
        assert not any(end.is_closed for end in ends)


@run
async def test_module_functions() -> None:
    async with await thalweg.listen("thalweg://127.0.0.1:0") as listener:
        async with await thalweg.connect(listener.address) as there:
            here = await listener.accept()
            await there.send(b"x")
            await here.recv()
            assert thalweg.node() is thalweg.node()
            assert thalweg.node().stats()["endpoints"] == 2
            route = here.route()
            assert route["link"] == "shm" and "chosen" in route["text"]
            assert any(c["verdict"] == "chosen" for c in route["candidates"])
            assert here.stats()["messages_received"] == 1
            links = {c["link"]: c for c in thalweg.node().capabilities()}
            assert links["tcp"]["present"] is True
        assert there.is_closed
    await thalweg.close()
    await thalweg.close()


@run
async def test_a_closed_node() -> None:
    async with pair() as (there, here):
        pass
    with pytest.raises(thalweg.Error):
        await there.send(b"x")
    with pytest.raises(thalweg.Error):
        await here.recv()
    assert there.is_closed
    node = thalweg.Node()
    await node.close()
    assert node.is_closed
    with pytest.raises(thalweg.Error):
        await node.connect("thalweg://127.0.0.1:1")
    with pytest.raises(thalweg.Error):
        await node.listen("thalweg://127.0.0.1:0")


@run
async def test_closing_a_node_ends_what_waits() -> None:
    """A connect to somebody who accepts and never says anything, among others."""
    accepting = asyncio.Event()

    async def silence(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        accepting.set()
        await reader.read()
        writer.close()

    server = await asyncio.start_server(silence, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    node = thalweg.Node()
    listener = await node.listen("thalweg://127.0.0.1:0")
    there = await node.connect(listener.address)
    waiting = [
        asyncio.ensure_future(node.connect(f"thalweg://127.0.0.1:{port}")),
        asyncio.ensure_future(listener.accept()),
        asyncio.ensure_future(listener.accept()),
        asyncio.ensure_future(there.recv()),
        asyncio.ensure_future(there.tag_recv(1, 1, bytearray(10))),
    ]
    await accepting.wait()
    await node.close()
    done, pending = await asyncio.wait(waiting, timeout=5)
    assert not pending
    assert [type(task.exception()) for task in waiting].count(type(None)) == 1
    server.close()
    await server.wait_closed()


def test_outside_of_a_loop() -> None:
    with pytest.raises(RuntimeError, match="loop"):
        thalweg.Node()


def test_loops_that_end_without_closing() -> None:
    """A loop that ends takes its node with it."""

    async def careless() -> object:
        node = thalweg.Node()
        listener = await node.listen("thalweg://127.0.0.1:0")
        there = await node.connect(listener.address)
        here = await listener.accept()
        there.add_close_callback(lambda *_: None)
        await there.send(b"x")
        return node, listener, there, here

    left = [asyncio.run(careless()) for _ in range(5)]
    del left
    gc.collect()

    async def later(endpoint: thalweg.Endpoint) -> None:
        await endpoint.recv()

    _, _, there, _ = asyncio.run(careless())
    with pytest.raises((RuntimeError, thalweg.Error)):
        asyncio.run(later(there))


@run
async def test_connections_leave_nothing(link: str) -> None:
    async with thalweg.Node(transports=link) as node:
        async with await node.listen("thalweg://127.0.0.1:0") as listener:
            for _ in range(100):
                there = await node.connect(listener.address)
                here = await listener.accept()
                await there.send(b"x")
                await here.recv()
                await there.close()
            await _until(lambda: node.stats()["endpoints"] == 0)


CHILD = textwrap.dedent(
    """
    import asyncio, sys, thalweg

    async def main():
        node = thalweg.Node(transports=sys.argv[1])
        endpoint = await node.connect(sys.argv[2])
        await endpoint.send(b"here")
        while True:
            await endpoint.send(bytes(1 << 20))

    asyncio.run(main())
    """
)


@pytest.mark.parametrize("when", ["idle", "receiving", "sending"])
@run
async def test_a_killed_peer(link: str, when: str) -> None:
    async with thalweg.Node(transports=link) as node:
        async with await node.listen("thalweg://127.0.0.1:0") as listener:
            command = [sys.executable, "-c", CHILD, link, listener.address]
            child = subprocess.Popen(command)
            endpoint = await listener.accept(timeout=20)
        try:
            await endpoint.recv(timeout=20)
            waiting = asyncio.ensure_future(endpoint.closed())
            if when == "receiving":
                for _ in range(5):
                    await endpoint.recv(timeout=20)
            if when == "sending":

                async def send() -> None:
                    while True:
                        await endpoint.send(bytes(1 << 20))

                waiting = asyncio.ensure_future(send())
            await asyncio.sleep(0.05)
            began = time.monotonic()
        finally:
            child.send_signal(signal.SIGKILL)
            child.wait(10)
        if when == "sending":
            with pytest.raises(ConnectionResetError):
                await waiting
        else:
            assert isinstance(await waiting, ConnectionResetError)
        assert time.monotonic() - began < 2
        with pytest.raises(ConnectionResetError):
            while True:
                await endpoint.recv()


def test_loops_in_threads() -> None:
    """Each thread's loop has its own node, and they talk to each other."""
    count = 4
    results: list[object] = []

    async def main(number: int) -> None:
        async with await thalweg.listen("thalweg://127.0.0.1:0") as listener:
            addresses[number] = listener.address
            await asyncio.to_thread(everybody.wait, LIMIT)
            others = [address for at, address in enumerate(addresses) if at != number]
            there = await asyncio.gather(*(thalweg.connect(address) for address in others))
            here = [await listener.accept() for _ in others]
            for turn in range(50):
                sends = [end.send([number.to_bytes(1, "little"), bytes(turn * 3000)]) for end in there]
                got = await asyncio.gather(*(end.recv() for end in here), *sends)
                assert sorted(bytes(frames[0])[0] for frames in got[: len(here)]) == [
                    at for at in range(count) if at != number
                ]
            await asyncio.to_thread(everybody.wait, LIMIT)
            await thalweg.close()

    def thread(number: int) -> None:
        try:
            results.append(asyncio.run(asyncio.wait_for(main(number), LIMIT)))
        except BaseException as error:
            results.append(error)

    addresses = [""] * count
    everybody = threading.Barrier(count)
    threads = [threading.Thread(target=thread, args=(number,)) for number in range(count)]
    for one in threads:
        one.start()
    for one in threads:
        one.join(LIMIT)
    assert results == [None] * count


@run
async def test_from_another_thread() -> None:
    async with pair() as (there, here):

        def elsewhere() -> None:
            with pytest.raises(RuntimeError, match="thread"), pytest.warns(RuntimeWarning):
                there.send(b"x").send(None)
            with pytest.raises(RuntimeError, match="thread"):
                there.add_close_callback(print)
            assert there.stats()["messages_sent"] == 0
            assert not there.is_closed
            there.abort()

        waiting = asyncio.ensure_future(there.recv())
        await asyncio.sleep(0.01)
        await asyncio.to_thread(elsewhere)
        with pytest.raises(thalweg.ClosedError):
            await asyncio.wait_for(waiting, 5)
        with pytest.raises(ConnectionError):
            await here.recv(timeout=5)


@run
async def test_objects_dropped_in_other_threads() -> None:
    """Python's garbage collector runs where it likes."""
    async with pair(allocator=bytearray) as (there, here):
        for _ in range(30):
            box = [here.recv(), there.tag_send(1, bytes(10)), here.tag_recv(1, 1, bytearray(100_000))]
            tasks = [asyncio.ensure_future(operation) for operation in box]
            box.clear()
            await asyncio.sleep(0)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            operation = here.tag_recv(2, 3, bytearray(300_000))
            operation.send(None)
            sending = asyncio.ensure_future(there.tag_send(2, bytes(200_000)))
            await asyncio.sleep(0)
            holder = [operation]
            del operation
            await asyncio.to_thread(holder.clear)
            assert (await here.tag_recv(2, 3, bytearray(300_000)))[1] == 200_000
            await sending


def test_fork() -> None:
    """In a forked child everything fails at once; the parent goes on."""

    async def main() -> None:
        async with pair() as (there, here):
            child = os.fork()
            if child == 0:
                code = 1
                try:
                    operations = [there.send(b"x"), here.recv(), there.fence()]
                    codes = []
                    for operation in operations:
                        try:
                            operation.send(None)
                        except thalweg.ForkedError:
                            codes.append(0)
                    code = 0 if len(codes) == 3 and there.is_closed else 2
                finally:
                    os._exit(code)
            _, status = await asyncio.to_thread(os.waitpid, child, 0)
            assert os.waitstatus_to_exitcode(status) == 0
            await there.send(b"still here")
            assert bytes((await here.recv(timeout=5))[0]) == b"still here"

    asyncio.run(asyncio.wait_for(main(), LIMIT))


def counted_callbacks() -> Callable[[], int]:
    """Counts callbacks of the loop's readers that are added from now on."""
    loop = asyncio.get_running_loop()
    calls = 0
    add_reader = loop.add_reader

    def counting(fd: int, callback: object, *args: object) -> object:
        def count(*args: object) -> object:
            nonlocal calls
            calls += 1
            return callback(*args)  # type: ignore[operator]

        return add_reader(fd, count, *args)

    loop.add_reader = counting  # type: ignore[method-assign]
    return lambda: calls


@run
async def test_a_message_that_comes_alone_costs_few_callbacks(link: str) -> None:
    """One for the message itself, and no ticks after it."""
    calls = counted_callbacks()
    async with pair(transports=link) as (there, here):
        for _ in range(2):
            before = calls()
            for _ in range(50):
                waiting = asyncio.ensure_future(here.recv())
                await asyncio.sleep(0.002)
                await there.send([b"short", bytearray(100)])
                await waiting
                await asyncio.sleep(0.004)
            if calls() - before <= 75:
                break
        # Ticks would make it four each.
        assert calls() - before <= 75


@run
async def test_idle_means_idle(link: str) -> None:
    """A node at rest makes no callback of the loop's."""
    calls = counted_callbacks()
    async with pair(transports=link) as (there, here):
        waiting = asyncio.ensure_future(here.recv())
        for _ in range(100):
            await there.send(b"x")
            await waiting
            waiting = asyncio.ensure_future(here.recv())
        await asyncio.sleep(0)
        assert calls() > 50
        quiet = time.monotonic()
        last = calls()
        while time.monotonic() < quiet + 1:
            await asyncio.sleep(0.1)
            if calls() != last:
                last, quiet = calls(), time.monotonic()
            assert time.monotonic() < quiet + LIMIT
        before, cpu = calls(), time.thread_time()
        await asyncio.sleep(1)
        assert calls() == before
        assert time.thread_time() - cpu < 0.05
        await there.send(b"it still wakes")
        await asyncio.wait_for(waiting, 5)


def test_fork_leaves_other_peoples_files_alone() -> None:
    """The child's descriptors were closed, and their numbers are somebody else's now."""

    async def main() -> None:
        async with thalweg.Node() as node:
            async with await node.listen("thalweg://127.0.0.1:0") as listener:
                there, here = await asyncio.gather(dial(node, listener.address), accepted(listener))
                region = node.register(bytearray(10))
                waiting = [here.recv(), here.tag_recv(1, 1, bytearray(10)), there.send(b"x")]
                waiting[0].send(None)
                waiting[1].send(None)
                child = os.fork()
                if child == 0:
                    code = 1
                    try:
                        files = [os.memfd_create("not thalweg's") for _ in range(40)]
                        with warnings.catch_warnings():
                            warnings.simplefilter("ignore")
                            waiting.clear()
                            del region
                            listener.close()
                            there.abort()
                            gc.collect()
                        written = [os.fstat(file).st_size for file in files]
                        code = 0 if not any(written) else 3
                    finally:
                        os._exit(code)
                _, status = await asyncio.to_thread(os.waitpid, child, 0)
                assert os.waitstatus_to_exitcode(status) == 0
                await waiting[2]
                assert not there.is_closed
                for operation in waiting:
                    operation.close()

    asyncio.run(asyncio.wait_for(main(), LIMIT))


@run
async def test_an_endpoint_with_a_callback_closes_when_it_is_dropped() -> None:
    async with thalweg.Node() as node:
        async with await node.listen("thalweg://127.0.0.1:0") as listener:
            there, here = await asyncio.gather(dial(node, listener.address), accepted(listener))
        told = []
        there.add_close_callback(lambda endpoint, why: told.append((endpoint, why.kind)))
        del there
        gc.collect()
        why = await asyncio.wait_for(here.closed(), 5)
        assert why.kind == "closed"
        await _until(lambda: told)
        assert told == [(None, "closed")]


@run
async def test_buffers_come_back_after_the_end() -> None:
    node = thalweg.Node()
    listener = await node.listen("thalweg://127.0.0.1:0")
    there, here = await asyncio.gather(dial(node, listener.address), accepted(listener))
    lent = [bytearray(10_000) for _ in range(4)]
    never = there.send(lent[0])
    never.close()
    lent[0].extend(b"x")
    region, unsent, unreceived = (
        node.register(lent[1]),
        there.send(lent[2]),
        here.tag_recv(1, 1, lent[3]),
    )
    await node.close()
    del region
    unsent.close()
    unreceived.close()
    for memory in lent:
        memory.extend(b"x")


@run
async def test_an_allocator_that_holds_its_node_leaks_nothing() -> None:
    class Holder:
        async def live(self) -> None:
            self.node = thalweg.Node(allocator=self.allocate)
            await self.node.close()

        def allocate(self, length: int) -> bytearray:
            return bytearray(length)

    for _ in range(5):
        await Holder().live()


@run
async def test_absurd_settings() -> None:
    for settings in [
        {"spin_us": 1 << 63},
        {"spin_us": 20_000},
        {"close_timeout": 1e19},
        {"handshake_timeout": 1e19},
        {"connect_timeout": 1.8e19},
        {"keepalive": 1e12},
        {"connect_timeout": float("inf")},
    ]:
        with pytest.raises(ValueError):
            thalweg.Node(**settings)
