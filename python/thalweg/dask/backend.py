"""Connecting, listening and addresses."""

from __future__ import annotations

import asyncio
import errno
import itertools
import logging
import socket
from collections.abc import Awaitable, Callable
from typing import Any

import thalweg
from distributed.comm.addressing import parse_host_port, unparse_host_port
from distributed.comm.core import BaseListener, CommClosedError, Connector
from distributed.comm.registry import Backend
from distributed.comm.utils import ensure_concrete_host
from distributed.utils import ensure_ip, get_ip
from tornado.ioloop import IOLoop

from . import errors, install
from .comm import ThalwegComm
from .node import LoopNode, node_here

logger = logging.getLogger("distributed.comm.thalweg")

PREFIX = "thalweg://"

PORT_MAX = 65535

#: How often a port that the system chose is given up because it is taken in the other family.
PORT_ATTEMPTS = 5


def _check_encryption(address: str, connection_args: dict[str, Any]) -> None:
    if connection_args.get("require_encryption"):
        raise RuntimeError(
            "encryption required by Dask configuration, refusing communication from/to "
            f"{PREFIX + address!r}: thalweg cannot encrypt yet; use tls:// or do without"
        )


def _with_prefix(address: str) -> str:
    return PREFIX + address.rpartition("://")[2]


class ThalwegConnector(Connector):
    prefix = PREFIX
    comm_class = ThalwegComm
    encrypted = False

    async def connect(
        self, address: str, deserialize: bool = True, **connection_args: Any
    ) -> ThalwegComm:
        _check_encryption(address, connection_args)
        host, port = parse_host_port(address)
        if not host:
            raise errors.no_such_name(address)
        target = PREFIX + unparse_host_port(host, port)
        node = node_here()
        node.enter()
        try:
            endpoint = await node.node.connect(target)
            local = _local_address(endpoint, host)
            return self.comm_class(
                endpoint, local, self.prefix + address, deserialize, node=node
            )
        except thalweg.Error as error:
            if error.kind == "name-resolution" or (error.kind == "invalid-input" and port <= PORT_MAX):
                raise errors.no_such_name(address) from error
            if not errors.is_hung_up(error):
                raise errors.closed(self, error) from error
            # Over tcp:// this connection would have been made, and the first use of it fail. Dask
            # tries again where connecting fails, not then: who has begun to end is let be.
            local = PREFIX + unparse_host_port(get_ip(ensure_ip(host)), 0)
            return self.comm_class(
                None, local, self.prefix + address, deserialize, node=node, why_ended=error
            )
        finally:
            node.leave()


def _local_address(endpoint: thalweg.Endpoint, peer_host: str) -> str:
    known = getattr(endpoint, "local_address", None)
    if known is not None:
        return _with_prefix(known)
    return PREFIX + unparse_host_port(get_ip(ensure_ip(peer_host)), 0)


class ThalwegListener(BaseListener):
    prefix = PREFIX
    comm_class = ThalwegComm
    encrypted = False

    def __init__(
        self,
        address: str,
        comm_handler: Callable[[ThalwegComm], Awaitable[None]],
        deserialize: bool = True,
        allow_offload: bool = True,
        default_host: str | None = None,
        default_port: int = 0,
        **connection_args: Any,
    ):
        super().__init__()
        # As for tcp, nothing else is looked at: neither ssl_context nor handshake_overrides.
        _check_encryption(address, connection_args)
        self.ip, self.port = parse_host_port(address, default_port)
        self.default_host = default_host
        self.comm_handler = comm_handler
        self.deserialize = deserialize
        self.allow_offload = allow_offload
        # Dask's servers listen with a method of theirs.
        self.server = getattr(comm_handler, "__self__", None)
        self.bound_address: tuple[str, int] | None = None
        self._listeners: list[thalweg.Listener] = []
        self._node: LoopNode | None = None

    async def start(self) -> None:
        node = node_here()
        node.enter()
        try:
            self._listeners = await self._bind_any(node.node)
        except BaseException:
            node.leave()
            raise
        self._node = node
        self.bound_address = parse_host_port(self._listeners[0].address)
        if self.server is not None:
            install.for_server(self.server)
        for listener in self._listeners:
            IOLoop.current().add_future(
                asyncio.ensure_future(self._accept(listener)), lambda task: task.result()
            )

    async def _bind_any(self, node: thalweg.Node) -> list[thalweg.Listener]:
        for attempt in itertools.count(1):
            try:
                return await self._bind(node)
            except OSError as error:
                # The port that the system chose for one family may be taken in the other.
                if (
                    self.port != 0
                    or attempt == PORT_ATTEMPTS
                    or error.errno != errno.EADDRINUSE
                ):
                    raise
        raise AssertionError("unreachable")

    async def _bind(self, node: thalweg.Node) -> list[thalweg.Listener]:
        """One listener for each address that the host means; all on the same port."""
        hosts = await _addresses_to_bind(self.ip, self.port)
        listeners: list[thalweg.Listener] = []
        port = self.port
        for host in hosts:
            address = PREFIX + unparse_host_port(host, port)
            try:
                listeners.append(await node.listen(address))
            except thalweg.Error as error:
                if listeners and error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                    # A name may stand for addresses that this machine does not have.
                    continue
                for listener in listeners:
                    listener.close()
                errors.raise_from_listening(address, error)
            _, port = parse_host_port(listeners[-1].address)
        return listeners

    async def _accept(self, listener: thalweg.Listener) -> None:
        while True:
            try:
                endpoint = await listener.accept()
            except thalweg.Error as error:
                if self._listeners:
                    logger.error("Listener on %s has ended: %s", listener.address, error)
                return
            IOLoop.current().add_future(
                asyncio.ensure_future(self._handle_endpoint(endpoint)),
                lambda task: task.result(),
            )

    async def _handle_endpoint(self, endpoint: thalweg.Endpoint) -> None:
        node = self._node
        if node is None:
            endpoint.abort()
            return
        address = _with_prefix(endpoint.peer_address)
        logger.debug("Incoming connection from %r to %r", address, self.listen_address)
        known = getattr(endpoint, "local_address", None)
        local = self.contact_address if known is None else _with_prefix(known)
        comm = self.comm_class(
            endpoint,
            local,
            address,
            self.deserialize,
            node=node,
            incoming=True,
            owner=self.server,
        )
        comm.allow_offload = self.allow_offload
        try:
            await self.on_connection(comm)
        except CommClosedError:
            logger.info("Connection from %s closed before handshake completed", address)
            return
        handled = self.comm_handler(comm)
        # Not to be kept alive by this frame.
        del comm, endpoint
        await handled

    def stop(self) -> None:
        listeners, self._listeners = self._listeners, []
        for listener in listeners:
            listener.close()
        node, self._node = self._node, None
        if node is not None:
            node.leave()

    def _check_started(self) -> None:
        if not self._listeners:
            raise ValueError("invalid operation on non-started ThalwegListener")

    def get_host_port(self) -> tuple[str, int]:
        """The listening address as a (host, port) tuple."""
        self._check_started()
        assert self.bound_address is not None
        return self.bound_address

    @property
    def listen_address(self) -> str:
        return self.prefix + unparse_host_port(*self.get_host_port())

    @property
    def contact_address(self) -> str:
        host, port = self.get_host_port()
        if host in ("0.0.0.0", "::"):
            host = self._reachable_host(host)
        return self.prefix + unparse_host_port(host, port)

    def _reachable_host(self, wildcard: str) -> str:
        """The address of this machine under which the server's peers find it.

        Dask names one for its own protocols only, so it is done here as Dask does it: the one from
        which the scheduler is reached.
        """
        if self.default_host:
            return self.default_host
        scheduler = getattr(getattr(self.server, "scheduler", None), "address", None)
        if isinstance(scheduler, str) and scheduler.startswith(PREFIX):
            return str(get_ip(ensure_ip(parse_host_port(scheduler)[0])))
        return str(ensure_concrete_host(wildcard))


async def _addresses_to_bind(host: str, port: int) -> list[str]:
    """The addresses that a host to listen on means, IPv4 first; without a host, all."""
    found = await asyncio.get_running_loop().getaddrinfo(
        host or None,
        port,
        type=socket.SOCK_STREAM,
        flags=socket.AI_PASSIVE,
    )
    hosts: dict[str, None] = {}
    for family, _, _, _, address in sorted(found, key=lambda entry: entry[0] != socket.AF_INET):
        if family == socket.AF_INET or (family == socket.AF_INET6 and socket.has_ipv6):
            hosts[str(address[0])] = None
    return list(hosts)


class ThalwegBackend(Backend):
    def get_connector(self) -> ThalwegConnector:
        return ThalwegConnector()

    def get_listener(
        self, loc: str, handle_comm: Any, deserialize: bool, **connection_args: Any
    ) -> ThalwegListener:
        return ThalwegListener(loc, handle_comm, deserialize, **connection_args)

    def get_address_host(self, loc: str) -> str:
        return parse_host_port(loc)[0]

    def get_address_host_port(self, loc: str) -> tuple[str, int]:
        return parse_host_port(loc)

    def resolve_address(self, loc: str) -> str:
        host, port = parse_host_port(loc)
        return unparse_host_port(ensure_ip(host), port)

    def get_local_address_for(self, loc: str) -> str:
        host, _ = parse_host_port(loc)
        return unparse_host_port(get_ip(ensure_ip(host)), None)
