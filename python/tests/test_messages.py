"""Messages: what goes in comes out, whatever holds it."""

from __future__ import annotations

import array
import asyncio
import gc
import mmap
import random
import sys

import numpy
import pytest
import thalweg
from conftest import pair, run


def pattern(seed: int, length: int) -> bytes:
    return random.Random(seed).randbytes(length)


ALL = (1 << 64) - 1
SIZES = [0, 1, 8, 48, 49, 128, 129, 2048, 2049, 4096, 4097, 65536, 65537, 1 << 20, 5_000_001]


@run
async def test_sizes(link: str) -> None:
    async with pair(transports=link) as (there, here):
        assert there.link == link
        for number, size in enumerate(SIZES):
            data = pattern(number, size)
            send = asyncio.ensure_future(there.send(data))
            (frame,) = await here.recv()
            await send
            assert isinstance(frame, memoryview) and frame.format == "B" and not frame.readonly
            assert frame == data


@run
async def test_frames(link: str) -> None:
    async with pair(transports=link) as (there, here):
        for lengths in [[], [0], [0, 0, 3], [100, 165, 620_000], SIZES, [1] * 20_000]:
            frames = [pattern(at, length) for at, length in enumerate(lengths)]
            send = asyncio.ensure_future(there.send(frames))
            got = await here.recv()
            await send
            assert [bytes(frame) for frame in got] == frames


@run
async def test_what_has_the_buffer_protocol() -> None:
    numbers = numpy.arange(5000, dtype="f8")
    with mmap.mmap(-1, 8192) as mapped:
        mapped[:] = pattern(1, 8192)
        things = [
            b"bytes",
            bytearray(pattern(2, 9000)),
            memoryview(pattern(3, 9000)),
            array.array("d", [1.0, 2.0] * 600),
            numbers,
            numbers.reshape(50, 100),
            numbers.astype("M8[s]").view("i8"),
            memoryview(numbers)[10:20],
            mapped,
        ]
        async with pair() as (there, here):
            for thing in things:
                await there.send(thing)
                (frame,) = await here.recv()
                assert frame == memoryview(thing).cast("B")
            await there.send(tuple(things))
            assert len(await here.recv()) == len(things)
            await there.send(frame for frame in [b"a", b"b"])
            assert [bytes(frame) for frame in await here.recv()] == [b"a", b"b"]


@run
async def test_what_cannot_be_sent() -> None:
    async with pair() as (there, here):
        for thing in [3, None, object(), [b"a", "text"]]:
            with pytest.raises(TypeError):
                await there.send(thing)
        with pytest.raises(BufferError, match="contiguous"):
            await there.send(numpy.zeros((100, 100))[:, ::2])
        with pytest.raises(BufferError, match="contiguous"):
            await there.send([b"good", memoryview(bytes(10000))[::2]])
        with pytest.raises(BufferError, match="writable"):
            await there.tag_recv(1, 1, b"read only")
        # It is as good as before.
        await there.send(b"x")
        assert bytes((await here.recv())[0]) == b"x"


@run
async def test_what_is_received_is_ones_own(link: str) -> None:
    async with pair(transports=link) as (there, here):
        for size in [5, 3000, 100_000]:
            data = bytearray(pattern(size, size))
            await there.send(data)
            (frame,) = await here.recv()
            before = bytes(data)
            data[:] = bytes(size)
            assert frame == before
            frame[0] ^= 0xFF
            assert frame[0] == before[0] ^ 0xFF
            data.extend(b"can be resized: nobody holds it")
        kept = numpy.frombuffer(frame, dtype="u1")
        expected = bytes(frame)
        del frame
        await there.close()
    gc.collect()
    assert kept.tobytes() == expected


@run
async def test_a_sent_buffer_stays_exported_until_it_has_left() -> None:
    async with pair(transports="shm", message_window=65536) as (there, here):
        data = bytearray(4 << 20)
        blocked = [asyncio.ensure_future(there.send(data)) for _ in range(2)]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        with pytest.raises(BufferError):
            data.extend(b"x")
        assert not any(task.done() for task in blocked[1:])
        for _ in blocked:
            (frame,) = await here.recv()
            assert len(frame) == 4 << 20
        await asyncio.gather(*blocked)
        data.extend(b"x")


@run
async def test_order(link: str) -> None:
    async with pair(transports=link) as (there, here):

        async def produce() -> None:
            for number in range(2000):
                await there.send([number.to_bytes(4, "little"), bytes(number % 3 * 3000)])

        producer = asyncio.create_task(produce())
        for number in range(2000):
            head, body = await here.recv()
            assert int.from_bytes(head, "little") == number and len(body) == number % 3 * 3000
        await producer


@run
async def test_backpressure(link: str) -> None:
    """A sender waits for a receiver that does not receive."""
    async with pair(transports=link, message_window=1 << 20) as (there, here):
        sent = 0

        async def produce() -> None:
            nonlocal sent
            while sent < 200:
                await there.send(bytes(100_000))
                sent += 1

        producer = asyncio.create_task(produce())
        last = -1
        while last != sent:
            last = sent
            await asyncio.sleep(0.2)
        assert sent < 100
        for _ in range(200):
            await here.recv()
        await producer


@run
async def test_allocator() -> None:
    given: list[numpy.ndarray] = []

    def allocate(nbytes: int) -> numpy.ndarray:
        given.append(numpy.zeros(nbytes + 16, dtype="u1"))
        return given[-1]

    async with pair(allocator=allocate) as (there, here):
        data = pattern(1, 300_000)
        await there.send([b"short", data])
        short, long = await here.recv()
        assert bytes(short) == b"short" and long == data
        assert len(given) == 1 and long.obj is given[0] and len(long) == len(data)
        long[0] ^= 1
        assert given[0][0] == data[0] ^ 1


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("fault", ["raises", "too small", "read only"])
@run
async def test_a_bad_allocator(fault: str) -> None:
    def allocate(nbytes: int) -> object:
        if fault == "raises":
            raise MemoryError("none left")
        return bytearray(nbytes - 1) if fault == "too small" else bytes(nbytes)

    async with pair(allocator=allocate) as (there, here):
        task = asyncio.ensure_future(there.send(bytes(100_000)))
        said = {"raises": "MemoryError: none left", "too small": "gave 99999", "read only": "writable"}
        with pytest.raises(thalweg.ResourcesError, match=said[fault]):
            await here.recv()
        await asyncio.gather(task, return_exceptions=True)


@run
async def test_spinning_nodes() -> None:
    async with pair(spin_us=20) as (there, here):
        for number in range(500):
            await there.send(number.to_bytes(8, "little"))
            (frame,) = await here.recv()
            assert int.from_bytes(frame, "little") == number
        with pytest.raises(TimeoutError):
            await here.recv(timeout=0.05)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@run
async def test_an_allocator_must_not_use_thalweg() -> None:
    """It is called with the endpoint's lock in hand: what it asks of thalweg is refused."""
    refused: list[str] = []

    def receive() -> None:
        operation = here.recv()
        try:
            operation.send(None)
        finally:
            # It was refused before it began.
            operation.close()

    def allocate(length: int) -> bytearray:
        for use in [here.stats, lambda: here.is_closed, here.abort, receive]:
            try:
                use()
            except RuntimeError as error:
                refused.append(str(error))
        return bytearray(length)

    async with pair(allocator=allocate) as (there, here):
        await there.send(bytes(100_000))
        (frame,) = await here.recv(timeout=5)
        assert len(frame) == 100_000
        assert len(refused) == 4 and all("allocator" in text for text in refused)


@run
async def test_garbage_is_collected_inside_of_an_allocator() -> None:
    """What is dropped there belongs to the very endpoint whose lock is held."""

    class Cycle:
        pass

    def allocate(length: int) -> bytearray:
        gc.collect()
        return bytearray(length)

    async with pair(allocator=allocate) as (there, here):
        for number in range(20):
            cycle = Cycle()
            cycle.itself = cycle
            cycle.pending = [here.tag_recv(number, ALL, bytearray(100)), here.fence()]
            for operation in cycle.pending:
                operation.send(None)
            cycle.mine = [there, here]
            del operation, cycle
            sending = asyncio.ensure_future(there.send(bytes(100_000)))
            (frame,) = await here.recv(timeout=5)
            assert len(frame) == 100_000
            await sending


@pytest.mark.skipif(sys.version_info < (3, 12), reason="classes have __buffer__ since 3.12")
@run
async def test_an_allocator_of_objects_with_a_buffer_method() -> None:
    class Memory:
        def __init__(self, length: int) -> None:
            self.memory = bytearray(length)

        def __buffer__(self, flags: int) -> memoryview:
            return memoryview(self.memory)

    async with pair(allocator=Memory) as (there, here):
        await there.send(pattern(1, 50_000))
        (frame,) = await here.recv(timeout=5)
        assert frame == pattern(1, 50_000)
