"""Streams of the standard library, over TCP."""

from __future__ import annotations

import asyncio
import functools
from typing import Any

from . import Backend, Channel, Served


class StreamChannel(Channel):
    # `drain` comes back while as much is buffered as a window would hold.
    has_window = False

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    def message(self, content: bytes, frames: tuple[int, ...]) -> Any:
        return content

    @property
    def send(self) -> Any:
        writer = self._writer

        async def send(message: bytes) -> None:
            writer.write(message)
            await writer.drain()

        return send

    def receiver(self, size_bytes: int) -> Any:
        return functools.partial(self._reader.readexactly, size_bytes)

    def parts(self, received: Any) -> list[Any]:
        return [received]

    async def close(self) -> None:
        self._writer.close()
        try:
            await self._writer.wait_closed()
        except ConnectionError:
            # The other side was quicker.
            pass


class StreamServed(Served):
    def __init__(self) -> None:
        self._accepted: asyncio.Future[Channel] = asyncio.get_running_loop().create_future()
        self._server: asyncio.Server

    async def start(self, host: str) -> None:
        self._server = await asyncio.start_server(self._connected, host, 0)
        self.port = self._server.sockets[0].getsockname()[1]

    def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._accepted.done():
            writer.close()
        else:
            self._accepted.set_result(StreamChannel(reader, writer))

    async def accept(self) -> Channel:
        channel = await self._accepted
        self._server.close()
        return channel


class AsyncioStreams(Backend):
    async def listen(self, host: str) -> Served:
        served = StreamServed()
        await served.start(host)
        return served

    async def connect(self, host: str, port: int) -> Channel:
        opened = await asyncio.wait_for(asyncio.open_connection(host, port), 20)
        return StreamChannel(*opened)


BACKEND = AsyncioStreams
