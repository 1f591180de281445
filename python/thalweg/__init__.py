"""thalweg: the line of fastest flow between two processes.

An asyncio transport for distributed schedulers. A :class:`Node` is this process's place on the
running event loop; it listens and connects, and each connection is an :class:`Endpoint`.
Underneath, an endpoint moves its data over the best link that both sides have: shared memory on
one host, TCP otherwise. :meth:`Endpoint.route` says which one and why::

    import asyncio, thalweg

    async def main():
        async with await thalweg.listen("thalweg://127.0.0.1:0") as listener:
            there = await thalweg.connect(listener.address)
            here = await listener.accept()
            await there.send([b"head", bytearray(1 << 20)])
            head, body = await here.recv()
            print(bytes(head), len(body), here.route()["link"])
            await thalweg.close()

    asyncio.run(main())

Cancelling a task withdraws its operation: ``CancelledError`` is raised once nothing can write to
the caller's memory any more, and nothing that had arrived is lost.
"""

from __future__ import annotations

import asyncio
import weakref

from ._core import (
    Endpoint,
    Frame,
    Listener,
    Node,
    Operation,
    Region,
    RemoteKey,
    __version__,
)
from ._errors import (
    KINDS,
    AddressError,
    BufferTooSmallError,
    ClosedError,
    ConnectError,
    ConnectionLostError,
    Error,
    ForkedError,
    InUseError,
    InvalidInputError,
    LimitError,
    NodeGoneError,
    NoRouteError,
    OperatingSystemError,
    PeerGoneError,
    ProtocolError,
    RefusedError,
    RemoteAccessError,
    ResourcesError,
    TimedOutError,
    UnsupportedError,
)

__all__ = [
    "AddressError",
    "BufferTooSmallError",
    "ClosedError",
    "ConnectError",
    "ConnectionLostError",
    "Endpoint",
    "Error",
    "ForkedError",
    "Frame",
    "InUseError",
    "InvalidInputError",
    "KINDS",
    "LimitError",
    "Listener",
    "NoRouteError",
    "Node",
    "NodeGoneError",
    "Operation",
    "OperatingSystemError",
    "PeerGoneError",
    "ProtocolError",
    "RefusedError",
    "Region",
    "RemoteAccessError",
    "RemoteKey",
    "ResourcesError",
    "TimedOutError",
    "UnsupportedError",
    "__version__",
    "close",
    "connect",
    "listen",
    "node",
]

_nodes: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, Node] = weakref.WeakKeyDictionary()


def node() -> Node:
    """The running loop's own node, made with the settings of the environment when first needed."""
    loop = asyncio.get_running_loop()
    known = _nodes.get(loop)
    if known is None or known.is_closed:
        known = _nodes[loop] = Node()
    return known


async def listen(address: str) -> Listener:
    """Listens at exactly this address, with the running loop's own node."""
    return await node().listen(address)


async def connect(address: str, *, timeout: float | None = None) -> Endpoint:
    """Connects to a listener, with the running loop's own node."""
    return await node().connect(address, timeout=timeout)


async def close(code: int = 0, text: str = "") -> None:
    """Closes the running loop's own node, if it has one, and every endpoint of it."""
    known = _nodes.pop(asyncio.get_running_loop(), None)
    if known is not None:
        await known.close(code, text)
