"""Tornado's streams, as Dask's own ``tcp://`` uses them."""

from __future__ import annotations

import asyncio
import functools
import socket
from typing import Any

from tornado.iostream import IOStream
from tornado.netutil import bind_sockets
from tornado.tcpclient import TCPClient
from tornado.tcpserver import TCPServer

from . import Backend, Channel, Served

#: Larger ones are received into memory made beforehand.
_WHOLE_BYTES = 4096


class TornadoChannel(Channel):
    def __init__(self, stream: IOStream) -> None:
        stream.set_nodelay(True)
        self._stream = stream

    def message(self, content: bytes, frames: tuple[int, ...]) -> Any:
        return content

    @property
    def send(self) -> Any:
        return self._stream.write

    def receiver(self, size_bytes: int) -> Any:
        if size_bytes <= _WHOLE_BYTES:
            return functools.partial(self._stream.read_bytes, size_bytes)
        stream, into = self._stream, bytearray(size_bytes)

        async def recv() -> bytearray:
            await stream.read_into(into)
            return into

        return recv

    def parts(self, received: Any) -> list[Any]:
        return [received]

    async def close(self) -> None:
        self._stream.close()


class TornadoServed(Served, TCPServer):
    def __init__(self, host: str, size_bytes: int) -> None:
        TCPServer.__init__(self, max_buffer_size=_buffer_bytes(size_bytes))
        self._accepted: asyncio.Future[Channel] = asyncio.get_running_loop().create_future()
        sockets = bind_sockets(0, address=host, family=socket.AF_UNSPEC)
        self.add_sockets(sockets)
        self.port = sockets[0].getsockname()[1]

    async def handle_stream(self, stream: IOStream, address: Any) -> None:
        if self._accepted.done():
            stream.close()
        else:
            self._accepted.set_result(TornadoChannel(stream))

    async def accept(self) -> Channel:
        channel = await self._accepted
        self.stop()
        return channel


class TornadoStreams(Backend):
    async def listen(self, host: str) -> Served:
        return TornadoServed(host, self.case.size_bytes)

    async def connect(self, host: str, port: int) -> Channel:
        size = _buffer_bytes(self.case.size_bytes)
        return TornadoChannel(
            await TCPClient().connect(host, port, max_buffer_size=size, timeout=20)
        )


def _buffer_bytes(size_bytes: int) -> int:
    return max(100 * 1024 * 1024, 2 * size_bytes)


BACKEND = TornadoStreams
