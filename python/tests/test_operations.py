"""Tags, one-sided operations, and what becomes of operations that are cancelled or late."""

from __future__ import annotations

import asyncio
import gc
import random
import sys
import warnings

import pytest
import thalweg
from conftest import pair, run

ALL = (1 << 64) - 1


@run
async def test_tags(link: str) -> None:
    async with pair(transports=link) as (there, here):
        for size in [0, 8, 5000, 200_000, 3_000_000]:
            data = random.Random(size).randbytes(size)
            buffer = bytearray(size + 7)
            send = asyncio.ensure_future(there.tag_send(0xAB00 | 5, data))
            assert await here.tag_recv(0xAB00, ~0xFF & ALL, buffer) == (0xAB05, size)
            await send
            assert buffer[:size] == data and buffer[size:] == bytes(7)
        await there.tag_send(9, b"0123456789")
        with pytest.raises(BufferError):
            await here.tag_recv(9, ALL, bytearray(3))
        assert await here.tag_recv(9, ALL, bytearray(10)) == (9, 10)
        with pytest.raises(OverflowError):
            await there.tag_send(1 << 64, b"")


@run
async def test_put_and_get(link: str) -> None:
    async with thalweg.Node(transports=link) as node:
        async with await node.listen("thalweg://127.0.0.1:0") as listener:
            there = await node.connect(listener.address)
            here = await listener.accept()
        memory = bytearray(1 << 20)
        region = node.register(memory)
        key = thalweg.RemoteKey.from_bytes(bytes(region.key))
        assert len(key) == len(region) == 1 << 20 and key == region.key
        data = random.Random(1).randbytes(700_000)
        await there.put(data, key, 1000)
        await there.fence()
        assert memory[1000:701_000] == data
        back = bytearray(700_000)
        await there.get(back, bytes(key), 1000)
        assert back == data
        with pytest.raises(thalweg.RemoteAccessError):
            await there.get(back, key, (1 << 20) - 5)
        with pytest.raises(BufferError):
            memory.extend(b"registered memory cannot be resized")
        await region.revoke()
        memory.extend(b"now it can")
        with pytest.raises(thalweg.RemoteAccessError) as caught:
            await there.put(b"late", key)
        assert caught.value.kind == "key-revoked"
        with pytest.raises(RuntimeError):
            await region.revoke()
        with pytest.raises(ValueError):
            node.register(memory, "everything")
        with pytest.raises(BufferError):
            node.register(b"read only")
        assert not here.is_closed


@run
async def test_a_cancelled_receive_loses_nothing(link: str) -> None:
    """Messages go on until enough receives were cancelled; an empty one ends them."""
    async with pair(transports=link) as (there, here):
        enough = asyncio.Event()

        async def produce() -> int:
            number = 0
            while number < 400 or not enough.is_set():
                await there.send([number.to_bytes(4, "little"), bytes(number % 5 * 20_000)])
                number += 1
                if number % 7 == 0:
                    await asyncio.sleep(0)
            await there.send([])
            return number

        async def receive() -> int | None:
            message = await here.recv()
            if not message:
                return None
            head, body = message
            number = int.from_bytes(head, "little")
            assert len(body) == number % 5 * 20_000
            return number

        producer = asyncio.create_task(produce())
        dice = random.Random(3)
        expected = cancelled = 0
        while True:
            task = asyncio.create_task(receive())
            for _ in range(dice.randrange(4)):
                await asyncio.sleep(0)
            if dice.random() < 0.6:
                task.cancel()
            try:
                number = await task
            except asyncio.CancelledError:
                cancelled += 1
                if cancelled == 20:
                    enough.set()
                continue
            if number is None:
                break
            assert number == expected
            expected += 1
        assert await producer == expected


@run
async def test_a_cancelled_tagged_receive_loses_nothing(link: str) -> None:
    """As above, into buffers of ours."""
    async with pair(transports=link) as (there, here):
        dice = random.Random(5)
        enough = asyncio.Event()

        async def produce() -> int:
            number = 0
            while number < 150 or not enough.is_set():
                data = number.to_bytes(4, "little") * (dice.choice([1, 2000, 100_000]))
                await there.tag_send(7, data)
                number += 1
            await there.tag_send(7, b"")
            return number

        producer = asyncio.create_task(produce())
        expected = cancelled = 0
        while True:
            buffer = bytearray(400_000)
            task = asyncio.ensure_future(here.tag_recv(7, ALL, buffer))
            for _ in range(dice.randrange(5)):
                await asyncio.sleep(0)
            if dice.random() < 0.5:
                task.cancel()
            try:
                _, length = await task
            except asyncio.CancelledError:
                cancelled += 1
                # Nobody writes to it any more, so it can be resized.
                buffer.extend(b"x")
                if cancelled == 20:
                    enough.set()
                continue
            if length == 0:
                break
            assert buffer[:length] == expected.to_bytes(4, "little") * (length // 4)
            expected += 1
        assert await producer == expected


@run
async def test_cancelled_while_the_peer_stalls(link: str) -> None:
    """A matched receive whose payload does not come is cancelled when the peer has gone."""
    async with pair(transports=link) as (there, here):
        buffer = bytearray(1000)
        task = asyncio.ensure_future(here.tag_recv(1, ALL, buffer))
        await asyncio.sleep(0.01)
        task.cancel("enough")
        with pytest.raises(asyncio.CancelledError):
            await task
        assert task.cancelled()
        buffer.extend(b"free")
        task = asyncio.ensure_future(there.closed())
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


@run
async def test_timeouts(link: str) -> None:
    async with pair(transports=link, message_window=65536) as (there, here):
        late = [
            lambda: here.recv(timeout=0.02),
            lambda: here.recv(timeout=0),
            lambda: here.tag_recv(1, ALL, bytearray(8), timeout=0.02),
        ]
        for operation in late:
            with pytest.raises(TimeoutError) as caught:
                await operation()
            assert isinstance(caught.value, thalweg.TimedOutError)
            assert caught.value.kind == "timed-out" and caught.value.peer == here.peer_address
        await there.send(b"not lost")
        assert bytes((await here.recv(timeout=5))[0]) == b"not lost"
        # Sends that wait for credit.
        stuck = asyncio.gather(*(there.send(bytes(60_000)) for _ in range(3)))
        await asyncio.sleep(0)
        with pytest.raises(TimeoutError):
            await there.send(bytes(60_000), timeout=0.05)
        for _ in range(3):
            await here.recv(timeout=5)
        await stuck
        for wrong in [-1, float("nan")]:
            with pytest.raises(ValueError):
                here.recv(timeout=wrong)


@run
async def test_with_asyncio() -> None:
    """Operations are awaitables like others."""
    async with pair() as (there, here):
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(here.recv(), 0.02)
        first, second = asyncio.ensure_future(here.recv()), asyncio.ensure_future(here.recv())
        await asyncio.sleep(0.01)
        await there.send(b"1")
        await there.send(b"2")
        got = await asyncio.gather(first, second)
        assert [bytes(frames[0]) for frames in got] == [b"1", b"2"]
        shielded = asyncio.ensure_future(here.recv())
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(asyncio.shield(shielded), 0.02)
        await there.send(b"3")
        assert bytes((await shielded)[0]) == b"3"
        done, pending = await asyncio.wait(
            [asyncio.ensure_future(here.recv()), asyncio.ensure_future(there.send(b"4"))],
            timeout=5,
        )
        assert len(done) == 2 and not pending
        if sys.version_info >= (3, 11):
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.02):
                    await here.recv()
            with pytest.raises(ExceptionGroup):  # noqa: F821
                async with asyncio.TaskGroup() as group:
                    group.create_task(_wait(here))
                    group.create_task(_fail())
        await there.send(b"5")
        assert bytes((await here.recv())[0]) == b"5"


async def _wait(endpoint: thalweg.Endpoint) -> object:
    return await endpoint.recv()


async def _fail() -> None:
    await asyncio.sleep(0.01)
    raise ValueError("on purpose")


@run
async def test_an_operation_is_awaited_once() -> None:
    async with pair() as (there, here):
        operation = there.send(b"x")
        await operation
        with pytest.raises(RuntimeError, match="once"):
            await operation
        await here.recv()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            there.send(b"forgotten")
            gc.collect()
        assert any("never awaited" in str(warning.message) for warning in caught)
        with pytest.raises(TimeoutError):
            await here.recv(timeout=0.02)


@run
async def test_a_destroyed_task_withdraws() -> None:
    async with pair() as (there, here):
        coroutine = _wait(here)
        coroutine.send(None)
        coroutine.close()
        await there.send(b"x")
        assert bytes((await here.recv())[0]) == b"x"


@run
async def test_context_variables() -> None:
    import contextvars

    mine = contextvars.ContextVar("mine", default="nobody")
    async with pair() as (there, here):

        async def wait(name: str) -> str:
            mine.set(name)
            await here.recv()
            return mine.get()

        tasks = [asyncio.create_task(wait(name)) for name in "abc"]
        await asyncio.sleep(0.01)
        for _ in tasks:
            await there.send(b"")
        assert await asyncio.gather(*tasks) == ["a", "b", "c"]
        assert mine.get() == "nobody"
