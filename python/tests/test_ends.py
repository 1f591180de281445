"""How things end that nobody ended in order: loops that close or move, nodes that are dropped, and what
is raised where nobody awaits it. And that tasks which never wait let the others run."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import thalweg
from conftest import LIMIT, accepted, descriptors, dial, pair, run


def script(text: str) -> str:
    """What a program says that may hang: it has a process of its own, and is killed then."""
    command = [sys.executable, "-X", "faulthandler", "-c", textwrap.dedent(text)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


CONNECTED = """
    import asyncio, threading, thalweg
    from types import SimpleNamespace
    here = SimpleNamespace()

    async def set_up():
        here.node = thalweg.Node()
        here.listener = await here.node.listen("thalweg://127.0.0.1:0")
        accepting = asyncio.ensure_future(accept())
        here.one = await here.node.connect(here.listener.address)
        here.other = await accepting

    async def accept():
        return await here.listener.accept()
"""


def test_a_loop_closes_while_a_task_that_uses_thalweg_at_its_end_is_woken() -> None:
    said = script(
        CONNECTED
        + """
    async def wait():
        try:
            await here.one.recv()
        finally:
            here.other.abort()
            print("aborted")

    async def main():
        await set_up()
        asyncio.ensure_future(wait())
        await asyncio.sleep(0.05)

    loop = asyncio.new_event_loop()
    loop.run_until_complete(main())
    elsewhere = threading.Thread(target=here.one.abort)
    elsewhere.start()
    elsewhere.join()
    loop.close()
    print("closed")
    """
    )
    assert said.split() == ["aborted", "closed"]


def test_a_loop_closes_with_a_close_callback_that_uses_thalweg_at_its_end() -> None:
    said = script(
        CONNECTED
        + """
    class Callback:
        def __call__(self, *args):
            pass

        def __del__(self):
            here.one.add_close_callback(print)
            print("ended")

    loop = asyncio.new_event_loop()
    loop.run_until_complete(set_up())
    here.one.add_close_callback(Callback())
    loop.close()
    print("closed")
    """
    )
    assert said.split() == ["ended", "closed"]


def test_a_loop_that_goes_on_in_another_thread() -> None:
    """It is told so once; what waits there is told as well."""
    loop = asyncio.new_event_loop()
    raised: list[Any] = []
    loop.set_exception_handler(lambda _loop, context: raised.append(context.get("exception")))

    async def set_up() -> tuple[Any, ...]:
        node = thalweg.Node()
        listener = await node.listen("thalweg://127.0.0.1:0")
        there, here = await asyncio.gather(dial(node, listener.address), accepted(listener))
        waiting = asyncio.ensure_future(here.recv())
        await asyncio.sleep(0.01)
        return node, listener, there, here, waiting

    node, listener, there, here, waiting = loop.run_until_complete(set_up())
    elsewhere = threading.Thread(target=loop.run_forever)
    elsewhere.start()
    # Somebody comes, and the descriptor is readable.
    with socket.create_connection(("127.0.0.1", int(listener.address.rpartition(":")[2]))):

        async def over() -> BaseException | None:
            await asyncio.wait([waiting], timeout=LIMIT)
            # Many turns more: it is not called again.
            for _ in range(1000):
                await asyncio.sleep(0)
            return waiting.exception()

        failed = asyncio.run_coroutine_threadsafe(over(), loop).result(2 * LIMIT)
    loop.call_soon_threadsafe(loop.stop)
    elsewhere.join()
    loop.close()
    assert isinstance(failed, RuntimeError) and "another thread" in str(failed)
    assert [type(error) for error in raised] == [RuntimeError], raised
    assert "the node has ended" in str(raised[0])
    assert node.is_closed and there.is_closed and here.is_closed


async def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LIMIT / 2
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.005)


@run
async def test_a_node_that_is_dropped_is_released() -> None:
    before = descriptors()
    with pytest.warns(ResourceWarning, match="unclosed node"):
        for _ in range(20):
            thalweg.Node()
    await until(lambda: descriptors() <= before)


@run
async def test_what_a_dropped_node_has_sent_goes_out(link: str) -> None:
    async with thalweg.Node(transports=link) as other:
        listener = await other.listen("thalweg://127.0.0.1:0")

        async def careless() -> None:
            endpoint = await thalweg.Node(transports=link).connect(listener.address)
            await endpoint.send([b"last words", bytes(1 << 20)])

        before = descriptors()
        with pytest.warns(ResourceWarning, match="unclosed node"):
            _, here = await asyncio.gather(careless(), accepted(listener))
            gc.collect()
        words, data = await here.recv(timeout=LIMIT / 2)
        assert bytes(words) == b"last words" and len(data) == 1 << 20
        with pytest.raises(thalweg.ClosedError):
            await here.recv(timeout=LIMIT / 2)
        await until(lambda: descriptors() <= before)


@pytest.mark.parametrize("kept", ["endpoints", "listener", "operation"])
@run
async def test_a_node_goes_on_while_anything_of_it_is_kept(kept: str) -> None:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        node = thalweg.Node()
        listener = await node.listen("thalweg://127.0.0.1:0")
        there, here = await asyncio.gather(dial(node, listener.address), accepted(listener))
        if kept == "listener":
            del there, here
        elif kept == "operation":
            waiting = here.recv()
            waiting.send(None)
            await there.send(b"x")
            del listener, here
        else:
            del listener
        del node
        gc.collect()
        for _ in range(10):
            await asyncio.sleep(0.001)
        if kept == "listener":
            dialling = dial(thalweg.node(), listener.address)
            there, here = await asyncio.gather(dialling, accepted(listener))
        if kept == "operation":
            (frame,) = await waiting
        else:
            await there.send(b"x")
            (frame,) = await here.recv(timeout=5)
        assert bytes(frame) == b"x"
        assert not [each for each in said if each.category is ResourceWarning]
        await thalweg.close()
    with pytest.warns(ResourceWarning, match="unclosed node"):
        there = here = listener = waiting = frame = None
        gc.collect()


def test_forks_while_another_thread_sends() -> None:
    """The child has a node of its own, and does not wait for what the other thread was at."""
    said = script(
        """
    import asyncio, os, threading, time, thalweg

    async def both(body):
        async with thalweg.Node(transports="tcp") as node:
            async with await node.listen("thalweg://127.0.0.1:0") as listener:
                async def accept():
                    return await listener.accept()
                accepting = asyncio.ensure_future(accept())
                there = await node.connect(listener.address)
                await body(there, await accepting)

    async def much(there, here):
        async def receive():
            while True:
                await here.recv()
        receiving = asyncio.ensure_future(receive())
        frames = [bytearray(5000) for _ in range(300)]
        while not over.is_set():
            await there.send(frames)
        receiving.cancel()

    async def little(there, here):
        await there.send(bytearray(9000))
        await here.recv()

    def in_child():
        asyncio.new_event_loop().run_until_complete(both(little))

    # The first loop makes asyncio's policy, with a lock in hand that a child would inherit.
    asyncio.new_event_loop().close()
    over = threading.Event()
    sender = threading.Thread(target=lambda: asyncio.run(both(much)))
    sender.start()
    until = time.monotonic() + 4
    hung = 0
    while time.monotonic() < until:
        child = os.fork()
        if child == 0:
            devnull = os.open(os.devnull, os.O_WRONLY)
            os.dup2(devnull, 2)
            try:
                in_child()
            finally:
                os._exit(0)
        patience = time.monotonic() + 5
        while os.waitpid(child, os.WNOHANG)[0] == 0:
            if time.monotonic() > patience:
                os.kill(child, 9)
                os.waitpid(child, 0)
                hung += 1
                break
            time.sleep(0.002)
    over.set()
    sender.join()
    print("hung:", hung)
    """
    )
    assert said.split() == ["hung:", "0"]


@pytest.mark.parametrize(
    "first",
    [
        "await there.send([b'x']); await here.recv()",
        "await there.send(frame for frame in [b'x']); await here.recv()",
        "refused(lambda: there.send([b'x'], timeout='soon'))",
        "refused(lambda: thalweg.Node(transports=5))",
        "refused(lambda: thalweg.Node(single_copy=1))",
    ],
)
def test_forks_while_another_thread_does_a_thing_for_the_first_time(first: str) -> None:
    """Nothing that the whole process shares is half made then. A process of its own each time."""
    text = f"""
    import asyncio, os, signal, sys, threading, thalweg

    def refused(call):
        try:
            call()
        except TypeError:
            return
        sys.exit("it is taken")

    async def main(begun):
        async with thalweg.Node(transports="tcp") as node:
            async with await node.listen("thalweg://127.0.0.1:0") as listener:
                async def accept():
                    return await listener.accept()
                begun[0]()
                accepting = asyncio.ensure_future(accept())
                there = await node.connect(listener.address)
                here = await accepting
                begun[1]()
                {first}

    def nothing():
        pass

    # The first loop makes asyncio's policy, with a lock in hand that a child would inherit.
    asyncio.new_event_loop().close()
    # Who waits for Python gets it as soon as the other lets go of it.
    sys.setswitchinterval(1e-6)
    begun = [threading.Event(), threading.Event()]
    doing = threading.Thread(target=lambda: asyncio.run(main([each.set for each in begun])))
    doing.start()
    children = []
    for each in begun:
        each.wait()
        for _ in range(4):
            child = os.fork()
            if child == 0:
                signal.alarm(5)
                asyncio.new_event_loop().run_until_complete(main([nothing, nothing]))
                os._exit(0)
            children.append(child)
            for _ in range(10_000):
                pass
    ends = [os.waitpid(child, 0)[1] for child in children]
    doing.join()
    print("fine" if not any(ends) else ends)
    """
    for _ in range(8):
        assert script(text).split() == ["fine"]


def test_nothing_is_imported_once_thalweg_is() -> None:
    """A child forked off while another thread imports a module never gets that module's lock."""
    said = script(
        """
    import asyncio, builtins, traceback, thalweg

    original = builtins.__import__
    asked = []

    def watched(name, *others, **named):
        asked.append(f"{name}, for {traceback.extract_stack()[-2].name}")
        return original(name, *others, **named)

    async def accept(listener):
        async for endpoint in listener:
            return endpoint

    async def main():
        async with thalweg.Node(transports="tcp") as node:
            async with await node.listen("thalweg://127.0.0.1:0") as listener:
                accepting = asyncio.ensure_future(accept(listener))
                async with await node.connect(listener.address) as there:
                    here = await accepting
                    here.add_close_callback(lambda *_: None)
                    await there.send([b"one", bytearray(9000)])
                    await here.recv()
                    await there.send(frame for frame in [b"one"])
                    await here.recv()
                    for refused in (
                        lambda: there.send([b"one"], timeout="soon"),
                        lambda: thalweg.Node(transports=5),
                        lambda: thalweg.Node(single_copy=1),
                    ):
                        try:
                            refused()
                        except TypeError:
                            print("refused")
                    waiting = asyncio.ensure_future(here.recv())
                    while not waiting.done():
                        await asyncio.sleep(0)
                        waiting.cancel()
                    future = next(iter(here.recv().__await__()))
                    future.add_done_callback(lambda _: None)
                try:
                    await here.recv()
                except thalweg.ClosedError:
                    print("closed")

    loop = asyncio.new_event_loop()
    builtins.__import__ = watched
    loop.run_until_complete(main())
    builtins.__import__ = original
    print("asked:", asked)
    """
    )
    assert said.split("\n", 4) == ["refused"] * 3 + ["closed", "asked: []\n"]


@run
async def test_cancelled_inside_of_an_allocator() -> None:
    """A signal's handler may do that: the wish is granted, and the receive goes on."""
    refused: list[BaseException] = []

    def allocate(length: int) -> bytearray:
        try:
            assert waiting.cancel("from within")
        except RuntimeError as error:
            refused.append(error)
        return bytearray(length)

    async with pair(allocator=allocate) as (there, here):
        memory = bytearray(100)
        waiting = asyncio.ensure_future(there.tag_recv(1, 1, memory))
        await asyncio.sleep(0)
        sending = asyncio.ensure_future(there.send(bytes(100_000)))
        (frame,) = await here.recv(timeout=5)
        assert len(frame) == 100_000 and not refused
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(waiting, 5)
        memory.extend(b"x")
        await sending


@pytest.mark.skipif(sys.version_info < (3, 11), reason="asyncio handles the signal since 3.11")
def test_an_interrupt_inside_of_an_allocator() -> None:
    """The first cancels the main task, as everywhere, and harms nobody."""

    def allocate(length: int) -> bytearray:
        if not interrupted:
            interrupted.append(True)
            signal.raise_signal(signal.SIGINT)
        return bytearray(length)

    async def main() -> None:
        async with pair(allocator=allocate) as (there, here):

            async def receive() -> None:
                for _ in range(3):
                    (frame,) = await here.recv(timeout=5)
                    received.append(len(frame))
                everything.set()

            everything = asyncio.Event()
            receiving = asyncio.ensure_future(receive())
            sending = [asyncio.ensure_future(there.send(bytes(100_000))) for _ in range(3)]
            try:
                await there.recv(timeout=5)
            finally:
                await asyncio.wait_for(everything.wait(), 5)
                await asyncio.gather(receiving, *sending)

    interrupted: list[bool] = []
    received: list[int] = []
    with pytest.raises((KeyboardInterrupt, asyncio.CancelledError)):
        asyncio.run(main())
    assert received == [100_000] * 3


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
def test_an_allocator_ends_the_program(kind: type[BaseException]) -> None:
    def allocate(length: int) -> bytearray:
        raise kind

    async def main() -> None:
        async with pair(allocator=allocate) as (there, here):
            sending = asyncio.ensure_future(there.send(bytes(100_000)))
            with pytest.raises(thalweg.ResourcesError, match=kind.__name__):
                await here.recv()
            await asyncio.gather(sending, return_exceptions=True)
            await asyncio.sleep(LIMIT)

    with pytest.raises(kind):
        asyncio.run(main())


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@run
async def test_what_an_allocator_raises_is_a_line_in_the_error() -> None:
    def allocate(length: int) -> bytearray:
        raise ValueError("x" * 100 + "\x1b[31m\nsecond line" + "y" * 100_000)

    async with pair(allocator=allocate) as (there, here):
        sending = asyncio.ensure_future(there.send(bytes(100_000)))
        with pytest.raises(thalweg.ResourcesError) as caught:
            await here.recv()
        text = str(caught.value)
        assert "xxx\\u{1b}[31m\\nsecond line" in text and text.isprintable() and len(text) < 4096
        await asyncio.gather(sending, return_exceptions=True)


@pytest.fixture
def handlers() -> Iterator[Callable[[Callable[[], None]], None]]:
    """Adds handlers to the log for as long as the test runs."""
    logger = logging.getLogger("thalweg")
    level, added = logger.level, []

    def add(emit: Callable[[], None]) -> None:
        class Handler(logging.Handler):
            def handle(self, record: logging.LogRecord) -> bool:
                emit()
                return True

        added.append(Handler())
        logger.addHandler(added[-1])
        logger.setLevel(logging.INFO)

    yield add
    for handler in added:
        logger.removeHandler(handler)
    logger.setLevel(level)


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
def test_a_handler_of_the_log_ends_the_program(
    kind: type[BaseException], handlers: Callable[[Callable[[], None]], None]
) -> None:
    said = 0

    def emit() -> None:
        nonlocal said
        said += 1
        if said == 2:
            raise kind

    async def main() -> None:
        async with pair() as (there, here):
            await there.send(b"x")
            await here.recv()
            await asyncio.sleep(LIMIT)

    handlers(emit)
    with pytest.raises(kind):
        asyncio.run(main())


class Turns:
    """Counts the loop's turns while something goes on."""

    def __init__(self) -> None:
        self.count = 0

    async def __aenter__(self) -> Turns:
        self.task = asyncio.ensure_future(self.tick())
        await asyncio.sleep(0)
        self.count = 0
        return self

    async def __aexit__(self, *_: object) -> None:
        self.task.cancel()

    async def tick(self) -> None:
        while True:
            self.count += 1
            await asyncio.sleep(0)


@run
async def test_a_task_that_never_waits_lets_others_run(link: str) -> None:
    async with pair(transports=link) as (there, here), Turns() as turns:
        sends = receives = 0
        began = time.thread_time()
        while time.thread_time() < began + 0.2:
            before, phase, sent = turns.count, time.thread_time(), 0
            # Hardly any of them has to wait, here and below.
            while time.thread_time() < phase + 0.01:
                await there.send(b"x")
                sent += 1
            between = turns.count
            for _ in range(sent):
                await here.recv()
            sends += between - before
            receives += turns.count - between
        assert sends >= 10 and receives >= 10


@run
async def test_receives_begin_in_the_order_in_which_they_are_awaited() -> None:
    async with pair() as (there, here):
        first, number = await one_that_lets_others_go_first(there, here)
        # Something waits, and so the others have had their turn.
        watching = there.closed()
        watching.send(None)
        second = here.recv()
        assert second.send(None).done()
        for operation, expected in [(first, number), (second, number + 1)]:
            with pytest.raises(StopIteration) as taken:
                operation.send(None)
            (frame,) = taken.value.value
            assert int.from_bytes(frame, "little") == expected
        watching.close()
    # One that is given up leaves its place.
    async with pair() as (there, here):
        given_up, number = await one_that_lets_others_go_first(there, here)
        given_up.close()
        await asyncio.sleep(0)
        (frame,) = await here.recv()
        assert int.from_bytes(frame, "little") == number


async def one_that_lets_others_go_first(there: Any, here: Any) -> tuple[Any, int]:
    """A receive that has not begun yet, and the message that it will have. More are there."""
    deadline = time.monotonic() + LIMIT / 2
    sent = received = 0
    while time.monotonic() < deadline:
        while sent < received + 30:
            await there.send(sent.to_bytes(8, "little"))
            sent += 1
        while received < sent - 5:
            operation = here.recv()
            try:
                waiter = operation.send(None)
            except StopIteration:
                received += 1
                continue
            assert waiter.done()
            return operation, received
    raise AssertionError("none of them did")


@run
async def test_cancelled_while_others_go_first(link: str) -> None:
    """Nothing is lost, whenever it is."""
    async with pair(transports=link) as (there, here):
        sent: list[int] = []
        got: list[int] = []

        async def receive() -> None:
            while True:
                (frame,) = await here.recv()
                got.append(int.from_bytes(frame, "little"))

        async def send() -> None:
            while True:
                await there.send(len(sent).to_bytes(8, "little"))
                sent.append(len(sent))

        sending = asyncio.ensure_future(send())
        for _ in range(500):
            receiving = asyncio.ensure_future(receive())
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            receiving.cancel()
            await asyncio.gather(receiving, return_exceptions=True)
        sending.cancel()
        await asyncio.gather(sending, return_exceptions=True)
        # The one in hand when it was cancelled may have gone out as well.
        while len(got) < len(sent):
            (frame,) = await here.recv(timeout=5)
            got.append(int.from_bytes(frame, "little"))
        assert got[: len(sent)] == sent


def test_an_interrupt_is_not_lost_with_a_handler_of_the_log(
    handlers: Callable[[Callable[[], None]], None],
) -> None:
    """The signal itself, with asyncio's own handler out of the way."""

    def emit() -> None:
        if not interrupted:
            interrupted.append(True)
            os.kill(os.getpid(), signal.SIGINT)
            for _ in range(1000):
                pass

    async def main() -> None:
        async with pair():
            await asyncio.sleep(LIMIT)

    interrupted: list[bool] = []
    handlers(emit)
    loop = asyncio.new_event_loop()
    task = loop.create_task(main())
    try:
        with pytest.raises(KeyboardInterrupt):
            loop.run_until_complete(task)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            loop.run_until_complete(task)
    finally:
        loop.close()


@run
async def test_a_task_that_runs_the_loop_it_is_run_by() -> None:
    """The package nest_asyncio lets tasks do so, and marks its loops."""
    loop = asyncio.get_running_loop()
    loop._nest_patched = True  # type: ignore[attr-defined]
    raised: list[Any] = []
    loop.set_exception_handler(lambda _loop, context: raised.append(context.get("exception")))
    async with pair() as (there, here):

        async def receive() -> int:
            await here.recv()
            # What the loop does when the descriptor is readable.
            keys = list(loop._selector.get_map().values())  # type: ignore[attr-defined]
            readers = [key.data[0] for key in keys if "thalweg" in repr(key.data[0])]
            for reader in readers:
                reader._run()
            return len(readers)

        receiving = asyncio.ensure_future(receive())
        await asyncio.sleep(0.01)
        await there.send(b"x")
        assert await receiving == 1
    assert not raised
