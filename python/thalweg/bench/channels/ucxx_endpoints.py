"""Endpoints of UCXX's asyncio interface, as its Dask backend makes them."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from typing import Any

import ucxx

from . import Backend, Channel, Served


class UcxxChannel(Channel):
    link = "ucx"

    def __init__(self, endpoint: Any) -> None:
        self._endpoint = endpoint

    def message(self, content: bytes, frames: tuple[int, ...]) -> Any:
        return bytearray(content)

    @property
    def send(self) -> Any:
        return self._endpoint.send

    def receiver(self, size_bytes: int) -> Any:
        endpoint, into = self._endpoint, bytearray(size_bytes)

        async def recv() -> bytearray:
            await endpoint.recv(into)
            return into

        return recv

    def parts(self, received: Any) -> list[Any]:
        return [received]

    async def close(self) -> None:
        with contextlib.suppress(Exception):
            await self._endpoint.close()


class UcxxServed(Served):
    def __init__(self) -> None:
        self._accepted: asyncio.Future[Channel] = asyncio.get_running_loop().create_future()
        self._listener = ucxx.create_listener(self._connected, port=0)
        self.port = self._listener.port

    async def _connected(self, endpoint: Any) -> None:
        if not self._accepted.done():
            self._accepted.set_result(UcxxChannel(endpoint))

    async def accept(self) -> Channel:
        return await self._accepted


class Ucxx(Backend):
    async def listen(self, host: str) -> Served:
        # It listens on every address, whatever was asked.
        return UcxxServed()

    async def connect(self, host: str, port: int) -> Channel:
        address = socket.gethostbyname(host)
        return UcxxChannel(await asyncio.wait_for(ucxx.create_endpoint(address, port), 20))


BACKEND = Ucxx
