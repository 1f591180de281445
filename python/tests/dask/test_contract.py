"""What Dask demands of a comm, and what its own TCP does where nothing is written down."""

import asyncio
import contextlib
import gc
import logging
import os
import pickle
import re
import socket
import ssl
import struct
import threading
import weakref
from types import SimpleNamespace

import dask.config
import numpy as np
import pytest
from dask_support import in_loop, listening, pair, until
from distributed.comm import (
    CommClosedError,
    connect,
    get_address_host,
    get_address_host_port,
    get_local_address_for,
    listen,
    normalize_address,
    parse_address,
    resolve_address,
)
from distributed.comm.core import (
    BaseListener,
    Comm,
    Connector,
    FatalCommClosedError,
    Listener,
)
from distributed.comm.registry import Backend, get_backend
from distributed.core import Server, rpc
from distributed.protocol import Serialize, Serialized, deserialize, to_serialize
from distributed.utils import get_ip

HAS_IPV6 = socket.has_ipv6
if HAS_IPV6:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        HAS_IPV6 = False
needs_ipv6 = pytest.mark.skipif(not HAS_IPV6, reason="this machine has no IPv6 loopback")


def free_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def array_of(serialized):
    return deserialize(serialized.header, serialized.frames)


# Messages


MESSAGES = {
    "number": 1,
    "none": None,
    "text": "grüß",
    "bytes": b"\x00\xff" * 10,
    "empty bytes": b"",
    "empty list": (),
    "dict": {"op": "ping", "x": [1, 2, {"y": b"z"}], "none": None},
    "key of a task": {("x", 0, 1): 2},
    "a set": {"x": {1, 2, 3}},
    "big text": "x" * 3_000_000,
    "big bytes": {"data": os.urandom(20_000_000)},
    "just an exception": {"e": "Exception"},
}


@pytest.mark.parametrize("name", MESSAGES)
@in_loop
async def test_a_message_arrives_as_it_was(protocol, name):
    message = MESSAGES[name]
    async with pair(protocol) as (a, b):
        for one, other in ((a, b), (b, a)):
            nbytes, got = await asyncio.gather(one.write(message), other.read())
            # Lists become tuples, in every backend.
            assert repr(got) == repr(message) or got == tuplify(message)
            assert isinstance(nbytes, int) and nbytes > 0


def tuplify(message):
    if isinstance(message, dict):
        return {key: tuplify(value) for key, value in message.items()}
    if isinstance(message, (list, tuple)):
        return tuple(map(tuplify, message))
    return message


@in_loop
async def test_messages_keep_their_order(protocol):
    async with pair(protocol) as (a, b):
        for i in range(200):
            await a.write({"i": i, "data": b"x" * (i * 37 % 5000)})
        assert [(await b.read())["i"] for _ in range(200)] == list(range(200))


@in_loop
async def test_messages_of_both_directions_at_once(protocol):
    async with pair(protocol) as (a, b):

        async def talk(comm):
            got = []
            for i in range(50):
                await comm.write({"i": i, "x": to_serialize(np.full(10_000, i))})
                got.append((await comm.read())["i"])
            return got

        assert await asyncio.gather(talk(a), talk(b)) == [list(range(50))] * 2


@in_loop(timeout=60)
async def test_writes_at_once_are_all_whole(protocol):
    async with pair(protocol) as (a, b):
        count = 30
        sizes = [10, 100_000, 3_000_000]
        writes = [
            asyncio.ensure_future(
                a.write({"i": i, "x": to_serialize(np.full(sizes[i % 3], i % 256, "u1"))})
            )
            for i in range(count)
        ]
        seen = []
        for _ in range(count):
            message = await b.read()
            seen.append(message["i"])
            assert len(message["x"]) == sizes[message["i"] % 3]
            assert (message["x"] == message["i"] % 256).all()
        await asyncio.gather(*writes)
        assert seen == list(range(count))


@in_loop(timeout=60)
async def test_arrays_of_all_sizes(protocol):
    async with pair(protocol) as (a, b):
        for size in [0, 1, 127, 128, 129, 4095, 4096, 4097, 65_536, 1 << 20, (1 << 20) + 1, 9_000_000]:
            x = np.random.default_rng(size).integers(0, 256, size, dtype="u1")
            _, got = await asyncio.gather(a.write({"x": to_serialize(x)}), b.read())
            np.testing.assert_array_equal(got["x"], x)


@in_loop(timeout=90)
async def test_one_array_that_is_larger_than_a_shard(protocol):
    x = np.arange(150_000_000 // 8)
    async with pair(protocol) as (a, b):
        _, got = await asyncio.gather(a.write({"x": to_serialize(x)}), b.read())
        np.testing.assert_array_equal(got["x"], x)
        assert got["x"].flags.writeable


@in_loop
async def test_many_arrays_in_one_message(protocol):
    arrays = [np.full(i % 700, i) for i in range(1000)]
    async with pair(protocol) as (a, b):
        _, got = await asyncio.gather(
            a.write({"x": [to_serialize(x) for x in arrays]}), b.read()
        )
        assert len(got["x"]) == 1000
        for x, y in zip(arrays, got["x"], strict=True):
            np.testing.assert_array_equal(x, y)


@in_loop
async def test_frames_without_bytes_between_others(protocol):
    buffers = [b"", b"abc", b"", bytearray(), os.urandom(200_000), b"", memoryview(b"")]
    async with pair(protocol) as (a, b):
        await a.write({"x": Serialized({"serializer": "error"}, buffers)})
        b.deserialize = False
        got = (await b.read())["x"]
        assert [bytes(frame) for frame in got.frames] == [bytes(x) for x in buffers]


@in_loop
async def test_memory_that_is_not_bytes_or_not_contiguous(protocol):
    arrays = [
        np.arange(1000.0),
        np.arange(1000.0).reshape(10, 100).T,
        np.arange(100_000)[::3],
        np.asfortranarray(np.arange(90_000.0).reshape(300, 300)),
        np.zeros((0, 7)),
        np.array(3.5),
        np.arange(10).astype("M8[ns]"),
    ]
    async with pair(protocol) as (a, b):
        for x in arrays:
            _, got = await asyncio.gather(a.write({"x": to_serialize(x)}), b.read())
            np.testing.assert_array_equal(got["x"], x)
            assert got["x"].dtype == x.dtype


@in_loop
async def test_what_is_received_is_writable_and_is_the_receivers(protocol):
    async with pair(protocol) as (a, b):
        for size in [100, 5_000, 200_000, 12_000_000]:
            x = np.ones(size, "u1")
            _, got = await asyncio.gather(a.write({"x": to_serialize(x)}), b.read())
            assert got["x"].flags.writeable
            got["x"][:] = 7
            assert (x == 1).all()
            x[:] = 9
            assert (got["x"] == 7).all()
    # It outlives the connection.
    gc.collect()
    assert (got["x"] == 7).all()


@in_loop
async def test_buffers_are_not_shared_between_arrays(protocol):
    """Keeping one small array must not keep its large neighbour."""

    def owner(x):
        while isinstance(x, np.ndarray) and x.base is not None:
            x = x.base
        return id(x.obj) if isinstance(x, memoryview) else id(x)

    async with pair(protocol) as (a, b):
        arrays = [np.ones(1_000_000, "u1"), np.zeros(1_000_000, "u1"), np.ones(2_000_000, "u1")]
        _, got = await asyncio.gather(
            a.write({"x": [to_serialize(x) for x in arrays]}), b.read()
        )
        assert len({owner(x) for x in got["x"]}) == 3


@in_loop
async def test_without_deserialising(protocol):
    x = np.arange(100_000)
    kwargs = dict(connect_args={"deserialize": False}, deserialize=False)
    async with pair(protocol, **kwargs) as (a, b):
        assert not a.deserialize and not b.deserialize
        await a.write({"x": to_serialize(x), "y": 1})
        got = await b.read()
        assert isinstance(got["x"], Serialized) and got["y"] == 1
        # What was not deserialised can be sent on.
        await b.write(got)
        back = await a.read()
        np.testing.assert_array_equal(array_of(back["x"]), x)
        a.deserialize = True
        await b.write(got)
        np.testing.assert_array_equal((await a.read())["x"], x)


@in_loop
async def test_the_listener_hands_its_settings_to_its_comms(protocol):
    async with pair(protocol, deserialize=False, allow_offload=False) as (a, b):
        assert b.deserialize is False and b.allow_offload is False
        assert a.deserialize is True and a.allow_offload is True


class Lambda:
    """Not for msgpack or Dask's own serialisers: pickle only."""

    def __init__(self, value):
        self.value = value


@pytest.mark.noisy
@in_loop
async def test_serializers_are_respected(protocol):
    async with pair(protocol) as (a, b):
        await a.write({"x": to_serialize(Lambda(1))}, serializers=["dask", "pickle"])
        assert (await b.read(deserializers=["dask", "pickle"]))["x"].value == 1
        await a.write({"x": to_serialize(Lambda(2))}, serializers=["pickle"])
        with pytest.raises(TypeError, match="pickle"):
            await b.read(deserializers=["dask"])
        # A message that could not be understood is no reason to hang up.
        await a.write("more")
        assert await b.read() == "more"
        with pytest.raises(TypeError):
            await a.write(
                {"x": to_serialize(Lambda(3))}, serializers=["msgpack"], on_error="raise"
            )
        await a.write("still there")
        assert await b.read() == "still there"


class RaisesOnLoad:
    def __init__(self, error):
        self.error = error

    def __reduce__(self):
        return (_raise, (self.error,))


def _raise(error):
    raise error("on purpose")


@pytest.mark.parametrize("offload", [True, False])
@in_loop
async def test_eof_while_deserialising_closes(protocol, offload, caplog):
    async with pair(protocol) as (a, b):
        b.allow_offload = offload
        padding = to_serialize(np.zeros(15_000_000, "u1")) if offload else 0
        write = a.write({"x": to_serialize(RaisesOnLoad(EOFError)), "y": padding})
        _, result = await asyncio.gather(write, b.read(), return_exceptions=True)
        assert type(result) is CommClosedError
        assert str(result) == "aborted stream on truncated data"
        assert b.closed()
        with pytest.raises(CommClosedError):
            await a.read()
    caplog.clear()


@in_loop
async def test_another_error_while_deserialising_does_not_close(protocol):
    async with pair(protocol) as (a, b):
        await a.write({"x": to_serialize(RaisesOnLoad(ZeroDivisionError))})
        with pytest.raises(ZeroDivisionError):
            await b.read()
        assert not b.closed()
        await a.write("more")
        assert await b.read() == "more"


@in_loop
async def test_the_context_of_serialisation(protocol):
    """Who sends and who receives is told to those who serialise."""
    from distributed.protocol.serialize import register_serialization_family

    seen = []

    def dumps(x, context=None):
        seen.append(context)
        return {}, [pickle.dumps(x)]

    def loads(header, frames):
        return pickle.loads(b"".join(frames))

    register_serialization_family("test-context", dumps, loads)
    async with pair(protocol) as (a, b):
        await a.write({"x": Serialize(5)}, serializers=["test-context"])
        assert (await b.read(deserializers=["test-context"]))["x"] == 5
        (context,) = seen
        assert context["sender"]["address"] == a.local_address
        assert context["recipient"]["address"] == a.peer_address
        assert context["pickle-protocol"] == a.handshake_options["pickle-protocol"]
        assert context["compression"] is None


@in_loop
async def test_compression_that_was_agreed_on_is_used(protocol):
    pytest.importorskip("zlib")
    x = np.zeros(1_000_000, "u1")
    async with pair(protocol) as (a, b):
        a.handshake_options["compression"] = "zlib"
        nbytes = await a.write({"x": to_serialize(x)})
        assert nbytes < 100_000
        np.testing.assert_array_equal((await b.read())["x"], x)


@in_loop
async def test_write_says_how_much_it_sent(protocol):
    async with pair(protocol) as (a, b):
        small = await a.write({"op": "x"})
        assert 0 < small < 1000
        large, _, _ = await asyncio.gather(
            a.write({"x": to_serialize(np.zeros(5_000_000, "u1"))}), b.read(), b.read()
        )
        assert 5_000_000 < large < 5_010_000


# Who and where


@in_loop
async def test_addresses_agree(protocol):
    async with pair(protocol) as (a, b):
        assert a.peer_address == b.local_address
        assert a.local_address == b.peer_address
        for comm in (a, b):
            assert parse_address(comm.local_address)[0] == protocol
            host, port = get_address_host_port(comm.local_address)
            assert host == "127.0.0.1" and port > 0
            assert comm._local_addr == comm.local_address
            assert comm._peer_addr == comm.peer_address
            assert comm.same_host


@in_loop
async def test_the_peer_of_a_connector_is_as_it_was_named(protocol):
    async with listening(protocol, lambda comm: comm.close(), "localhost") as listener:
        port = get_address_host_port(listener.contact_address)[1]
        comm = await connect(f"{protocol}://localhost:{port}")
        assert comm.peer_address == f"{protocol}://localhost:{port}"
        comm.abort()


@in_loop
async def test_addresses_on_a_wildcard(protocol):
    async with pair(protocol, "0.0.0.0") as (a, b):
        assert get_address_host(b.local_address) == get_address_host(a.peer_address)
        assert a.peer_address == b.local_address
        assert a.local_address == b.peer_address


@needs_ipv6
@in_loop
async def test_ipv6(protocol):
    async with pair(protocol, "[::1]") as (a, b):
        assert a.peer_address.startswith(f"{protocol}://[::1]:")
        assert a.peer_address == b.local_address
        assert a.local_address == b.peer_address
        assert a.same_host and b.same_host
        await a.write("x")
        assert await b.read() == "x"


@in_loop
async def test_names_and_representations(protocol):
    async with pair(protocol) as (a, b):
        assert a.name is None
        pattern = r"<\w+  local={}://127\.0\.0\.1:\d+ remote={}://127\.0\.0\.1:\d+>"
        assert re.fullmatch(pattern.format(protocol, protocol), repr(a))
        a.name = "the name"
        assert " the name local=" in repr(a)
        assert str(a) == repr(a)
        assert "closed" not in repr(a)
        a.abort()
        assert re.match(r"<\w+ \(closed\) the name local=", repr(a))


@in_loop
async def test_class_and_instances(protocol):
    async with pair(protocol) as (a, b):
        for comm in (a, b):
            assert isinstance(comm, Comm)
            assert comm in Comm._instances
            assert isinstance(comm.extra_info, dict)
            assert isinstance(hash(comm), int)
            weakref.ref(comm)
            # Attributes that Dask itself sets.
            comm._pool = comm._server = None
    backend = get_backend(protocol)
    assert isinstance(backend, Backend)
    assert get_backend(protocol) is backend
    assert isinstance(backend.get_connector(), Connector)


@in_loop
async def test_handshake(protocol):
    async with pair(protocol) as (a, b):
        for one, other in ((a, b), (b, a)):
            info = one.handshake_info()
            assert info["compression"] is None
            assert set(info) >= {"compression", "python", "pickle-protocol"}
            assert one.local_info["address"] == one.local_address
            assert one.remote_info["address"] == one.peer_address
            assert one.remote_info["python"] == other.local_info["python"]
            assert one.handshake_options == {"compression": None, "pickle-protocol": 5}


@in_loop
async def test_handshake_overrides(protocol):
    seen = asyncio.get_running_loop().create_future()

    async def handler(comm):
        seen.set_result(comm)

    async with listening(
        protocol, handler, handshake_overrides={"pickle-protocol": 4}
    ) as listener:
        comm = await connect(
            listener.contact_address, handshake_overrides={"pickle-protocol": 4}
        )
        assert comm.handshake_options["pickle-protocol"] == 4
        assert (await seen).handshake_options["pickle-protocol"] == 4
        comm.abort()
        (await seen).abort()


# The end of a comm


@in_loop
async def test_close_reaches_the_peer(protocol):
    async with pair(protocol) as (a, b):
        assert not a.closed()
        await a.close()
        assert a.closed()
        with pytest.raises(CommClosedError):
            await b.read()
        assert b.closed()
        # Again does nothing.
        await a.close()
        await b.close()
        a.abort()
        b.abort()


@in_loop
async def test_abort_reaches_the_peer(protocol):
    async with pair(protocol) as (a, b):
        assert a.abort() is None
        assert a.closed()
        with pytest.raises(CommClosedError):
            await b.read()
        assert b.closed()


@pytest.mark.parametrize("how", ["close", "abort"])
@in_loop
async def test_an_idle_comm_notices_the_end(protocol, how):
    async with pair(protocol) as (a, b):
        result = getattr(a, how)()
        if result is not None:
            await result
        await until(b.closed)
        with pytest.raises(CommClosedError):
            await b.write("x")
        with pytest.raises(CommClosedError):
            await b.read()


@pytest.mark.parametrize("how", ["close", "abort"])
@in_loop
async def test_own_end_ends_a_waiting_read(protocol, how):
    async with pair(protocol) as (a, b):
        read = asyncio.ensure_future(a.read())
        await asyncio.sleep(0.05)
        assert not read.done()
        result = getattr(a, how)()
        if result is not None:
            await result
        with pytest.raises(CommClosedError):
            await read


@pytest.mark.parametrize("how", ["close", "abort"])
@in_loop
async def test_after_the_own_end(protocol, how):
    async with pair(protocol) as (a, b):
        result = getattr(a, how)()
        if result is not None:
            await result
        for _ in range(2):
            with pytest.raises(CommClosedError):
                await a.read()
            with pytest.raises(CommClosedError):
                await a.write("x")


@in_loop
async def test_what_was_written_before_close_arrives(protocol):
    async with pair(protocol) as (a, b):
        for i in range(100):
            await a.write({"i": i})
        await a.write({"x": to_serialize(np.arange(1000))})
        await a.close()
        for i in range(100):
            assert (await b.read())["i"] == i
        assert len((await b.read())["x"]) == 1000
        with pytest.raises(CommClosedError):
            await b.read()


@in_loop
async def test_what_was_not_read_is_there_after_the_peer_has_closed(protocol):
    """A comm that its peer has closed is closed when everything has been read."""
    async with pair(protocol) as (a, b):
        await a.write("one")
        await a.write("two")
        await a.close()
        await asyncio.sleep(0.1)
        assert not b.closed()
        assert await b.read() == "one"
        assert await b.read() == "two"
        await until(b.closed)
        with pytest.raises(CommClosedError):
            await b.read()


@in_loop
async def test_close_flushes_what_is_large(protocol):
    async with pair(protocol) as (a, b):
        read = asyncio.ensure_future(b.read())
        await a.write({"x": to_serialize(np.ones(20_000_000, "u1"))})
        await a.close()
        assert (await read)["x"].sum() == 20_000_000


@in_loop
async def test_close_while_a_write_is_under_way(protocol):
    async with pair(protocol) as (a, b):
        read = asyncio.ensure_future(b.read())
        write = asyncio.ensure_future(
            a.write({"x": to_serialize(np.ones(8_000_000, "u1"))})
        )
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        await a.close()
        assert (await read)["x"].sum() == 8_000_000
        await write


@in_loop
async def test_errors_are_comm_closed_errors(protocol):
    async with pair(protocol) as (a, b):
        b.abort()
        with pytest.raises(CommClosedError) as caught:
            await a.read()
        assert isinstance(caught.value, OSError)
        assert not isinstance(caught.value, FatalCommClosedError)
        # It says which comm.
        assert repr(a.local_address)[1:-1] in str(caught.value)
        assert caught.value.__cause__ is not None


@in_loop
async def test_a_cancelled_read_closes(protocol):
    """What has been read already is unknown, so Dask gives the comm up."""
    async with pair(protocol) as (a, b):
        read = asyncio.ensure_future(a.read())
        await asyncio.sleep(0.02)
        read.cancel()
        with pytest.raises(asyncio.CancelledError):
            await read
        assert a.closed()
        with pytest.raises(CommClosedError):
            await b.read()


@in_loop
async def test_a_read_that_timed_out_closes(protocol):
    async with pair(protocol) as (a, b):
        with pytest.raises((asyncio.TimeoutError, CommClosedError)):
            await asyncio.wait_for(a.read(), 0.05)
        assert a.closed()
        await until(b.closed)


@in_loop
async def test_a_write_while_a_read_waits(protocol):
    async with pair(protocol) as (a, b):
        read = asyncio.ensure_future(a.read())
        await asyncio.sleep(0.01)
        await a.write("from a")
        assert await b.read() == "from a"
        await b.write("from b")
        assert await read == "from b"


@in_loop
async def test_a_write_cancelled_while_it_serialises_sends_nothing(protocol):
    async with pair(protocol) as (a, b):
        write = asyncio.ensure_future(
            a.write({"x": to_serialize(np.ones(30_000_000, "u1"))})
        )
        await asyncio.sleep(0)
        write.cancel()
        with pytest.raises(asyncio.CancelledError):
            await write
        assert not a.closed()
        await a.write("next")
        assert await b.read() == "next"


@pytest.mark.noisy
@in_loop
async def test_a_forgotten_comm_is_closed_with_a_warning(protocol, caplog):
    accepted = asyncio.get_running_loop().create_future()

    async def handler(comm):
        accepted.set_result(comm)

    listener = await listen(f"{protocol}://127.0.0.1:0", handler)
    a = await connect(listener.contact_address)
    b = await accepted
    accepted = None
    ref = weakref.ref(a)
    where = a.local_address
    del a
    gc.collect()
    assert ref() is None
    (warning,) = [r.getMessage() for r in caplog.records if "dangling" in r.getMessage()]
    assert warning.startswith("Closing dangling ") and where in warning
    with pytest.raises(CommClosedError):
        await b.read()
    listener.stop()
    await asyncio.sleep(0.01)


@in_loop
async def test_a_closed_comm_is_forgotten_in_silence(protocol):
    async with pair(protocol) as (a, b):
        await b.close()
        with pytest.raises(CommClosedError):
            await a.read()


# Tornado keeps the last loop that has ended, and a loop keeps its node.
@pytest.mark.leaky
def test_a_loop_that_ends_with_open_comms(protocol):
    comms = []

    async def main():
        accepted = asyncio.get_running_loop().create_future()

        async def handler(comm):
            accepted.set_result(comm)

        comms.append(await listen(f"{protocol}://127.0.0.1:0", handler))
        comms.append(await connect(comms[0].contact_address))
        comms.append(await accepted)

    asyncio.run(main())
    listener, a, b = comms
    a.abort()
    b.abort()
    assert a.closed() and b.closed()
    listener.stop()
    comms.clear()


@in_loop
async def test_closing_from_several_tasks(protocol):
    async with pair(protocol) as (a, b):
        await asyncio.gather(a.close(), a.close(), b.close(), a.close())
        assert a.closed() and b.closed()


# Connecting


@in_loop
async def test_nobody_there(protocol):
    address = f"{protocol}://127.0.0.1:{free_port()}"
    with pytest.raises(OSError, match=re.escape(f"Timed out trying to connect to {address} after 0.3 s")) as caught:
        await connect(address, timeout=0.3)
    assert isinstance(caught.value.__cause__, (CommClosedError, asyncio.TimeoutError))
    connector = get_backend(protocol).get_connector()
    with pytest.raises(CommClosedError, match="ConnectionRefusedError|refused"):
        await connector.connect(address.split("://")[1])


@in_loop
async def test_connecting_waits_for_a_listener(protocol):
    port = free_port()
    address = f"{protocol}://127.0.0.1:{port}"
    attempt = asyncio.ensure_future(connect(address, timeout=20))
    await asyncio.sleep(0.1)
    assert not attempt.done()
    listener = await listen(address, lambda comm: comm.close())
    (await attempt).abort()
    listener.stop()


@pytest.mark.parametrize("how", ["end", "reset"])
@in_loop
async def test_a_listener_that_hangs_up(protocol, how):
    """Connecting ends there: only if nobody listens it is tried again. So a worker that tells a
    nanny which is ending does not try for half a minute."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(10)
        address = f"{protocol}://127.0.0.1:{server.getsockname()[1]}"
        times = []

        def hang_up():
            connection, _ = server.accept()
            times.append(1)
            with connection:
                # Not before it is used: tcp:// itself would take that for a failure to connect.
                connection.recv(1)
                if how == "reset":
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                else:
                    # Who has read everything ends without a reset.
                    connection.shutdown(socket.SHUT_WR)
                    while connection.recv(4096):
                        pass

        for make in (connect, get_backend(protocol).get_connector().connect):
            hanging = asyncio.ensure_future(asyncio.to_thread(hang_up))
            with pytest.raises(CommClosedError) as caught:
                loc = address if make is connect else address.split("://")[1]
                comm = await asyncio.wait_for(make(loc), 10)
                # Connecting by itself has succeeded.
                assert make is not connect
                assert comm.peer_address == address
                await comm.write("anything")
                await comm.read()
            assert type(caught.value) is CommClosedError
            assert caught.value.__cause__ is not None
            await hanging
        assert len(times) == 2
        assert comm.closed()
        comm.abort()
        await comm.close()


@in_loop
async def test_a_listener_that_never_answers(protocol):
    """A socket that accepts and says nothing: the attempt ends in time."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        address = f"{protocol}://127.0.0.1:{sock.getsockname()[1]}"
        attempt = asyncio.ensure_future(connect(address, timeout=0.5))
        done, _ = await asyncio.wait({attempt}, timeout=2)
        if protocol == "tcp":
            # Connects, and then waits for the handshake for ever.
            assert not done
            attempt.cancel()
            with pytest.raises(asyncio.CancelledError):
                await attempt
        else:
            with pytest.raises(OSError, match="Timed out trying to connect"):
                await attempt


# Where a connect is cancelled is chosen: on Python 3.10 ``asyncio.wait_for``, which Dask puts around
# each attempt, drops a cancellation that comes in the turn of the loop in which the attempt ends.
# Cancelled blindly while refused again and again, 12 of 400 went on over tcp and 9 over thalweg.


@in_loop
async def test_a_connect_cancelled_in_an_attempt(protocol):
    loop = asyncio.get_running_loop()
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        port = server.getsockname()[1]
        attempt = asyncio.ensure_future(connect(f"{protocol}://127.0.0.1:{port}", timeout=20))
        connection, _ = await loop.sock_accept(server)
        with connection:
            connection.setblocking(False)
            # It has spoken, and waits for an answer.
            assert await loop.sock_recv(connection, 1)
            attempt.cancel()
            with pytest.raises(asyncio.CancelledError):
                await attempt
            # Nothing of it is left: the connection ends, and there is no other.
            with contextlib.suppress(ConnectionResetError):
                while await loop.sock_recv(connection, 4096):
                    pass
        with pytest.raises(BlockingIOError):
            server.accept()


@in_loop
async def test_a_connect_cancelled_between_attempts(protocol, monkeypatch):
    waits = asyncio.Event()

    def pause(least, most):
        waits.set()
        return 20

    monkeypatch.setattr("distributed.comm.core.random", SimpleNamespace(uniform=pause))
    attempt = asyncio.ensure_future(connect(f"{protocol}://127.0.0.1:{free_port()}", timeout=20))
    await waits.wait()
    attempt.cancel()
    with pytest.raises(asyncio.CancelledError):
        await attempt


@in_loop
async def test_a_name_that_does_not_exist(protocol):
    with pytest.raises(OSError, match="Timed out trying to connect"):
        await connect(f"{protocol}://does-not-exist.invalid:1234", timeout=0.5)


@pytest.mark.parametrize(
    "address",
    ["does-not-exist.invalid:1234", "256.1.1.1:1", "a b:1", ":1", "127.0.0.1:-1"],
)
@in_loop
async def test_what_a_connector_says_of_a_name_that_is_none(protocol, address):
    with pytest.raises(socket.gaierror) as caught:
        await get_backend(protocol).get_connector().connect(address)
    assert not isinstance(caught.value, CommClosedError)


@pytest.mark.parametrize("address", ["127.0.0.1", "[::1", "::1:80", "127.0.0.1:port"])
@in_loop
async def test_a_malformed_address(protocol, address):
    with pytest.raises(ValueError):
        await get_backend(protocol).get_connector().connect(address)
    with pytest.raises(ValueError):
        await connect(f"{protocol}://{address}", timeout=1)


@in_loop
async def test_a_stranger_speaks_another_protocol(protocol):
    async with listening(protocol, lambda comm: comm.close()) as listener:
        host, port = get_address_host_port(listener.contact_address)
        reader, writer = await asyncio.open_connection(host, port)
        if protocol != "tcp":
            writer.write(b"GET / HTTP/1.1\r\n\r\n" * 10)
            await writer.drain()
            try:
                await asyncio.wait_for(reader.read(-1), 15)
            except ConnectionResetError:
                pass
        writer.close()
        try:
            await writer.wait_closed()
        except OSError:
            pass
        # Others are served all the same.
        comm = await connect(listener.contact_address)
        await comm.close()


@in_loop
async def test_unknown_arguments_are_accepted(protocol):
    kwargs = dict(ssl_context=None, require_encryption=False, extra_conn_args={})
    async with pair(protocol, connect_args=kwargs, **kwargs) as (a, b):
        await a.write("x")
        assert await b.read() == "x"
    context = ssl.create_default_context()
    async with pair(protocol, connect_args={"ssl_context": context}, ssl_context=context) as (a, b):
        await a.write("x")
        assert await b.read() == "x"


@in_loop
async def test_encryption_is_refused_where_there_is_none(protocol):
    address = f"{protocol}://127.0.0.1:{free_port()}"
    with pytest.raises(RuntimeError, match="encryption required by Dask configuration") as caught:
        await connect(address, timeout=5, require_encryption=True)
    assert address in str(caught.value)
    with pytest.raises(RuntimeError, match="encryption required by Dask configuration"):
        listen(f"{protocol}://127.0.0.1:0", lambda comm: None, require_encryption=True)
    async with listening(protocol, lambda comm: comm.close(), require_encryption=None) as listener:
        (await connect(listener.contact_address, require_encryption=None)).abort()


# Listening


@in_loop
async def test_a_listener_says_where_it_is(protocol):
    async with listening(protocol, lambda comm: None) as listener:
        assert isinstance(listener, (Listener, BaseListener))
        assert hasattr(listener, "abort_handshaking_comms")
        assert listener.prefix == f"{protocol}://"
        assert listener.listen_address == listener.contact_address
        assert re.fullmatch(rf"{protocol}://127\.0\.0\.1:\d+", listener.listen_address)
        assert listener.get_host_port() == get_address_host_port(listener.listen_address)


@pytest.mark.parametrize("host", ["", "0.0.0.0"])
@in_loop
async def test_a_listener_on_every_address(protocol, host):
    async with listening(protocol, lambda comm: comm.close(), host) as listener:
        port = get_address_host_port(listener.listen_address)[1]
        assert listener.listen_address == f"{protocol}://0.0.0.0:{port}"
        assert listener.contact_address == f"{protocol}://{get_ip()}:{port}"
        for address in ["127.0.0.1", get_ip()] + ["[::1]"] * (HAS_IPV6 and host == ""):
            (await connect(f"{protocol}://{address}:{port}", timeout=5)).abort()


@needs_ipv6
@in_loop
async def test_a_listener_on_every_ipv6_address(protocol):
    async with listening(protocol, lambda comm: comm.close(), "[::]", default_host="::1") as listener:
        port = get_address_host_port(listener.listen_address)[1]
        assert listener.listen_address == f"{protocol}://[::]:{port}"
        assert listener.contact_address == f"{protocol}://[::1]:{port}"
        (await connect(listener.contact_address, timeout=5)).abort()


@in_loop
async def test_a_default_host(protocol):
    async with listening(protocol, lambda comm: None, "0.0.0.0", default_host="10.1.2.3") as listener:
        assert listener.contact_address.startswith(f"{protocol}://10.1.2.3:")
    async with listening(protocol, lambda comm: None, "", default_host="10.1.2.3") as listener:
        assert listener.contact_address.startswith(f"{protocol}://10.1.2.3:")
    async with listening(protocol, lambda comm: None, default_host="10.1.2.3") as listener:
        assert listener.contact_address.startswith(f"{protocol}://127.0.0.1:")


@in_loop
async def test_a_default_port(protocol):
    port = free_port()
    listener = await listen(f"{protocol}://127.0.0.1", lambda comm: None, default_port=port)
    assert listener.listen_address == f"{protocol}://127.0.0.1:{port}"
    listener.stop()
    listener = await listen(f"{protocol}://127.0.0.1", lambda comm: None)
    assert get_address_host_port(listener.listen_address)[1] > 0
    listener.stop()


@in_loop
async def test_a_listener_binds_only_what_it_was_given(protocol):
    async with listening(protocol, lambda comm: None, "127.0.0.1") as listener:
        port = get_address_host_port(listener.listen_address)[1]
        if get_ip() != "127.0.0.1":
            with pytest.raises(OSError):
                await connect(f"{protocol}://{get_ip()}:{port}", timeout=0.3)
        with pytest.raises(OSError):
            await connect(f"{protocol}://127.0.0.2:{port}", timeout=0.3)


@in_loop
async def test_an_address_in_use(protocol):
    import errno

    async with listening(protocol, lambda comm: None) as listener:
        with pytest.raises(OSError) as caught:
            await listen(listener.listen_address, lambda comm: None)
        # Workers that were given a range of ports look at this.
        assert caught.value.errno == errno.EADDRINUSE


@in_loop
async def test_an_address_of_another_machine(protocol):
    import errno

    with pytest.raises(OSError) as caught:
        await listen(f"{protocol}://203.0.113.77:0", lambda comm: None)
    assert caught.value.errno == errno.EADDRNOTAVAIL


@in_loop
async def test_a_listener_that_has_not_started(protocol):
    listener = listen(f"{protocol}://127.0.0.1:0", lambda comm: None)
    for name in ("listen_address", "contact_address"):
        with pytest.raises(ValueError, match="non-started"):
            getattr(listener, name)
    listener.stop()
    await listener.start()
    assert listener.listen_address
    listener.stop()
    listener.stop()


@in_loop
async def test_a_stopped_listener(protocol):
    comms = []
    accepted = asyncio.Event()

    async def handler(comm):
        comms.append(comm)
        accepted.set()

    async with listening(protocol, handler) as listener:
        address = listener.contact_address
        a = await connect(address)
        await accepted.wait()
    with pytest.raises(ValueError):
        listener.listen_address
    # What was connected stays so.
    await a.write("x")
    assert await comms[0].read() == "x"
    with pytest.raises(OSError):
        await connect(address, timeout=0.3)
    # Its port is free again.
    async with listen(address, lambda comm: comm.close()) as again:
        assert again.contact_address == address
    await a.close()
    await comms[0].close()


@in_loop
async def test_a_listener_is_a_context_manager(protocol):
    async with listen(f"{protocol}://127.0.0.1:0", lambda comm: comm.close()) as listener:
        comm = await connect(listener.contact_address)
        with pytest.raises(CommClosedError):
            await comm.read()
    with pytest.raises(ValueError):
        listener.contact_address


@in_loop(timeout=60)
async def test_many_connections_at_once(protocol):
    comms = []

    async def handler(comm):
        comms.append(comm)
        await comm.write(await comm.read())

    async with listening(protocol, handler) as listener:

        async def one(i):
            comm = await connect(listener.contact_address)
            await comm.write(i)
            assert await comm.read() == i
            await comm.close()

        await asyncio.gather(*map(one, range(100)))
    await until(lambda: all(comm.closed() for comm in comms))


@in_loop
async def test_several_listeners(protocol):
    def says(text):
        async def handler(comm):
            await comm.write(text)
            await comm.close()

        return handler

    async with listening(protocol, says("one")) as one, listening(protocol, says("two")) as two:
        assert one.contact_address != two.contact_address
        for listener, text in ((two, "two"), (one, "one")):
            comm = await connect(listener.contact_address)
            assert await comm.read() == text
            comm.abort()


@pytest.mark.noisy
@in_loop
async def test_a_handler_that_fails(protocol, caplog):
    async def handler(comm):
        handled.append(comm)
        raise ZeroDivisionError("in the handler")

    handled = []
    async with listening(protocol, handler) as listener:
        for _ in range(3):
            comm = await connect(listener.contact_address)
            await until(lambda: handled)
            handled.pop().abort()
            comm.abort()
        await until(lambda: caplog.text.count("in the handler") >= 3)


@in_loop
async def test_the_handler_gets_the_comm_after_the_handshake(protocol):
    seen = asyncio.get_running_loop().create_future()

    async def handler(comm):
        seen.set_result(dict(comm.remote_info))
        await comm.close()

    async with listening(protocol, handler) as listener:
        comm = await connect(listener.contact_address)
        assert (await seen)["address"] == comm.local_address
        comm.abort()


@in_loop
async def test_the_peer_leaves_during_the_handshake(protocol, caplog):
    async with listening(protocol, lambda comm: pytest.fail("handled")) as listener:
        connector = get_backend(protocol).get_connector()
        with caplog.at_level(logging.INFO):
            comm = await connector.connect(listener.contact_address.split("://")[1])
            comm.abort()
            await until(lambda: "closed before handshake completed" in caplog.text)
    caplog.clear()


@in_loop
async def test_comms_in_the_handshake_can_be_aborted(protocol):
    async with listening(protocol, lambda comm: pytest.fail("handled")) as listener:
        connector = get_backend(protocol).get_connector()
        comm = await connector.connect(listener.contact_address.split("://")[1])
        # The listener speaks first, and then waits.
        assert "pickle-protocol" in await comm.read()
        listener.abort_handshaking_comms()
        with pytest.raises(CommClosedError):
            await comm.read()


# Addresses


def test_address_functions(protocol):
    assert get_address_host_port(f"{protocol}://1.2.3.4:80") == ("1.2.3.4", 80)
    assert get_address_host_port(f"{protocol}://[::1]:80") == ("::1", 80)
    assert get_address_host_port(f"{protocol}://name:80") == ("name", 80)
    assert get_address_host(f"{protocol}://1.2.3.4:80") == "1.2.3.4"
    assert get_address_host(f"{protocol}://[::1]:80") == "::1"
    assert resolve_address(f"{protocol}://127.0.0.1:80") == f"{protocol}://127.0.0.1:80"
    assert resolve_address(f"{protocol}://[::1]:80") == f"{protocol}://[::1]:80"
    assert resolve_address(f"{protocol}://localhost:80") == f"{protocol}://127.0.0.1:80"
    assert resolve_address(f"{protocol}://:80") == f"{protocol}://127.0.0.1:80"
    assert get_local_address_for(f"{protocol}://127.0.0.1:80") == f"{protocol}://127.0.0.1"
    assert get_local_address_for(f"{protocol}://localhost:80") == f"{protocol}://127.0.0.1"
    assert normalize_address(f"{protocol}://[::1]:80") == f"{protocol}://[::1]:80"
    for function in (get_address_host, get_address_host_port, resolve_address, get_local_address_for):
        with pytest.raises(ValueError):
            function(f"{protocol}://1.2.3.4")
        with pytest.raises(ValueError):
            function(f"{protocol}://::1:80")
    with pytest.raises(socket.gaierror):
        resolve_address(f"{protocol}://does-not-exist.invalid:80")


@needs_ipv6
def test_local_address_for_ipv6(protocol):
    assert get_local_address_for(f"{protocol}://[::1]:80") == f"{protocol}://[::1]"


# Dask's own layers on top


@in_loop
async def test_a_server_and_its_pool(protocol):
    async def double(x):
        return x * 2

    server = await Server({"double": double})
    await server.listen(f"{protocol}://127.0.0.1:0")
    client = await Server({})
    try:
        remote = client.rpc(server.address)
        results = await asyncio.gather(*(remote.double(x=i) for i in range(40)))
        assert results == [2 * i for i in range(40)]
        async with rpc(server.address) as remote:
            assert await remote.double(x=4) == 8
        assert server.address.startswith(protocol)
        assert server.port == get_address_host_port(server.address)[1]
    finally:
        await client.close()
        await server.close()


@in_loop
async def test_a_server_closes_under_its_clients(protocol):
    async def forever():
        await asyncio.sleep(100)

    server = await Server({"forever": forever})
    await server.listen(f"{protocol}://127.0.0.1:0")
    client = await Server({})
    call = asyncio.ensure_future(client.rpc(server.address).forever())
    await until(lambda: server.incoming_comms_active)
    await server.close()
    with pytest.raises(CommClosedError):
        await call
    await client.close()


@in_loop
async def test_a_cancelled_call_does_not_spoil_the_pool(protocol):
    async def slow(x):
        await asyncio.sleep(x)
        return x

    server = await Server({"slow": slow})
    await server.listen(f"{protocol}://127.0.0.1:0")
    client = await Server({})
    try:
        remote = client.rpc(server.address)
        for _ in range(5):
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(remote.slow(x=30), 0.05)
            assert await remote.slow(x=0) == 0
    finally:
        await client.close()
        await server.close()


def test_two_loops_in_two_threads(protocol):
    """Each has its own state, and they reach each other."""
    ready = threading.Event()
    address = []
    stop = []
    failures = []

    async def serve():
        async def handler(comm):
            while True:
                try:
                    await comm.write(await comm.read())
                except CommClosedError:
                    return

        listener = await listen(f"{protocol}://127.0.0.1:0", handler)
        address.append(listener.contact_address)
        finished = asyncio.Event()
        stop.extend([asyncio.get_running_loop(), finished])
        ready.set()
        await finished.wait()
        listener.stop()
        await asyncio.sleep(0.05)

    def thread():
        try:
            asyncio.run(serve())
        except BaseException as error:
            failures.append(error)
            ready.set()

    async def talk():
        comm = await connect(address[0])
        for i in range(20):
            x = np.full(i * 10_000, i)
            await comm.write({"x": to_serialize(x)})
            np.testing.assert_array_equal((await comm.read())["x"], x)
        await comm.close()

    server = threading.Thread(target=thread)
    server.start()
    try:
        assert ready.wait(20)
        assert not failures
        asyncio.run(asyncio.wait_for(talk(), 30))
        asyncio.run(asyncio.wait_for(talk(), 30))
    finally:
        if stop:
            stop[0].call_soon_threadsafe(stop[1].set)
        server.join(20)
    assert not server.is_alive() and not failures


def test_dask_config_is_untouched():
    assert dask.config.get("distributed.comm.default-scheme") == "tcp"
