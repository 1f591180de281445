"""thalweg itself."""

from __future__ import annotations

from typing import Any

import thalweg

from ..case import Case
from . import Backend, Channel, Served


class ThalwegChannel(Channel):
    def __init__(self, node: thalweg.Node, endpoint: thalweg.Endpoint) -> None:
        self._node = node
        self._endpoint = endpoint
        self.link = endpoint.link
        self.route = endpoint.route()["text"]

    def message(self, content: bytes, frames: tuple[int, ...]) -> Any:
        if len(frames) == 1:
            return content
        parts, at = [], 0
        for size_bytes in frames:
            parts.append(content[at : at + size_bytes])
            at += size_bytes
        return parts

    @property
    def send(self) -> Any:
        return self._endpoint.send

    def receiver(self, size_bytes: int) -> Any:
        return self._endpoint.recv

    def parts(self, received: Any) -> list[Any]:
        return list(received)

    async def close(self) -> None:
        await self._node.close()


class ThalwegServed(Served):
    def __init__(self, node: thalweg.Node, listener: thalweg.Listener) -> None:
        self._node = node
        self._listener = listener
        self.port = int(listener.address.rpartition(":")[2])

    async def accept(self) -> Channel:
        endpoint = await self._listener.accept()
        self._listener.close()
        return ThalwegChannel(self._node, endpoint)


class Thalweg(Backend):
    def __init__(self, case: Case) -> None:
        super().__init__(case)
        links = None if case.transport == "auto" else case.transport.split("+")
        self._node = thalweg.Node(
            transports=links, spin_us=case.spin_us, single_copy=case.single_copy
        )

    async def listen(self, host: str) -> Served:
        return ThalwegServed(self._node, await self._node.listen(_address(host, 0)))

    async def connect(self, host: str, port: int) -> Channel:
        endpoint = await self._node.connect(_address(host, port), timeout=20)
        return ThalwegChannel(self._node, endpoint)


def _address(host: str, port: int) -> str:
    return f"thalweg://[{host}]:{port}" if ":" in host else f"thalweg://{host}:{port}"


BACKEND = Thalweg
