"""A comm on one endpoint: a Dask message is one message of thalweg's, frame by frame.

What Dask's own TCP does where nothing is written down is done here too: which calls close, which
exceptions come, what is left in the log.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import sys
import weakref
from typing import Any

import dask
import thalweg
from distributed.comm.core import Comm, CommClosedError
from distributed.comm.utils import from_frames, to_frames
from distributed.protocol.utils import pack_frames, unpack_frames
from distributed.utils import ensure_memoryview, nbytes
from tornado import gen

from . import config, errors, traffic
from .node import LoopNode, begin

# Below the loggers that Dask's configuration sets levels for.
logger = logging.getLogger("distributed.comm.thalweg")

#: How long closing waits for the peer's answer when nothing is left to be written. The rest goes on
#: without anybody waiting.
CLOSE_WAIT_S = 1.0

#: Messages of more frames than this are sent as one, if the frames are short on average.
FRAMES_MAX = 16
SHORT_FRAME_BYTES = 4096


class ThalwegComm(Comm):
    """An established connection."""

    #: Pieces that large objects are cut into before they are compressed. Without compression they
    #: travel whole, so that the receiver need not put them together.
    max_shard_size = dask.utils.parse_bytes(dask.config.get("distributed.comm.shard"))

    def __init__(
        self,
        endpoint: thalweg.Endpoint | None,
        local_addr: str,
        peer_addr: str,
        deserialize: bool = True,
        *,
        node: LoopNode,
        incoming: bool = False,
        owner: Any = None,
        why_ended: thalweg.Error | None = None,
    ):
        """Without an endpoint it has ended from the beginning, and says why to who uses it."""
        self._closed = endpoint is None
        super().__init__(deserialize=deserialize)
        self._local_addr = local_addr
        self._peer_addr = peer_addr
        self._endpoint = endpoint
        self._loop = asyncio.get_running_loop()
        self._writing = 0
        self._why_ended = why_ended
        self.traffic = traffic.Traffic(endpoint, peer_addr, incoming, owner)
        self._finalizer = weakref.finalize(self, _finalize, endpoint, repr(self))
        self._finalizer.atexit = False
        if endpoint is None:
            self._finalizer.detach()
            return
        traffic.started(self)
        node.enter()
        # Weakly: a callback that is never called, since its loop has ended, keeps nothing.
        known = (weakref.ref(self), weakref.ref(node))
        endpoint.add_close_callback(functools.partial(_ended, *known))

    @property
    def local_address(self) -> str:
        return self._local_addr

    @property
    def peer_address(self) -> str:
        return self._peer_addr

    @property
    def same_host(self) -> bool:
        # Shared memory has proved it, whatever the addresses are.
        return self.traffic.link == "shm" or super().same_host

    @property
    def extra_info(self) -> dict[str, Any]:
        return {"link": self.traffic.link}

    async def read(self, deserializers: Any = None) -> Any:
        endpoint = self._open_endpoint()
        try:
            frames = await endpoint.recv()
        except thalweg.Error as error:
            self._forget()
            raise errors.closed(self, error) from error
        except BaseException:
            # Nothing would be lost if the comm were kept. But Dask's protocols do not number
            # their answers: the next read would get that of the one which was given up.
            self.abort()
            raise
        if self._why_ended is not None:
            self._look_for_more(endpoint)
        # An exception that is kept somewhere keeps this frame.
        del endpoint
        try:
            return await from_frames(
                _taken_apart(frames),
                deserialize=self.deserialize,
                deserializers=deserializers,
                allow_offload=self.allow_offload,
            )
        except EOFError as error:
            self.abort()
            raise CommClosedError("aborted stream on truncated data") from error

    async def write(self, msg: Any, serializers: Any = None, on_error: str = "message") -> int:
        self._open_endpoint()
        compressed = self.handshake_options.get("compression")
        frames = await to_frames(
            msg,
            allow_offload=self.allow_offload,
            serializers=serializers,
            on_error=on_error,
            context={
                "sender": self.local_info,
                "recipient": self.remote_info,
                **self.handshake_options,
            },
            frame_split_size=self.max_shard_size if compressed else sys.maxsize,
        )
        endpoint = self._open_endpoint()
        size = int(sum(map(nbytes, frames)))
        # From here to where the endpoint has taken the message nothing is awaited: messages keep
        # the order in which they were serialised.
        self._writing += 1
        try:
            await endpoint.send(_put_together(frames, size))
        except thalweg.Error as error:
            if isinstance(error, ValueError):
                # Too large: nothing was sent, and nothing is wrong with the connection.
                raise
            self._forget()
            raise errors.closed(self, error) from error
        except (asyncio.CancelledError, GeneratorExit):
            # The message is withdrawn or goes out whole.
            raise
        except BaseException:
            self.abort()
            raise
        finally:
            self._writing -= 1
        return size

    # A coroutine of tornado's needs no task: a loop that stops meanwhile destroys none.
    @gen.coroutine
    def close(self) -> Any:  # type: ignore[override]
        endpoint = self._endpoint
        self._forget()
        if endpoint is None or endpoint.is_closed:
            return
        if asyncio._get_running_loop() is not self._loop:
            endpoint.abort()
            return
        ended = self._loop.create_future()
        timeout = config.close_timeout()
        last_resort = self._loop.call_later(timeout, endpoint.abort)
        endpoint.add_close_callback(functools.partial(_over, ended, last_resort))
        begin(endpoint.close())
        wait = timeout if self._writing else min(timeout, CLOSE_WAIT_S)
        patience = self._loop.call_later(wait, _tell, ended)
        try:
            yield ended
        finally:
            patience.cancel()

    def abort(self) -> None:
        endpoint = self._endpoint
        self._forget()
        if endpoint is not None:
            endpoint.abort()

    def closed(self) -> bool:
        return self._closed

    def _open_endpoint(self) -> thalweg.Endpoint:
        if self._endpoint is not None:
            return self._endpoint
        if self._why_ended is not None:
            raise errors.closed(self, self._why_ended) from self._why_ended
        raise CommClosedError()

    def _look_for_more(self, endpoint: thalweg.Endpoint) -> None:
        """A comm whose peer has gone is closed once everything has been read, as with TCP."""
        if not endpoint.stats()["inbox_messages"]:
            self._forget()

    def _forget(self) -> None:
        self._endpoint = None
        self._closed = True
        self._finalizer.detach()
        traffic.ended(self)


def _ended(
    comm_ref: weakref.ref[ThalwegComm],
    node_ref: weakref.ref[LoopNode],
    endpoint: thalweg.Endpoint,
    why: thalweg.Error,
) -> None:
    """The endpoint has ended. What had arrived by then can still be read."""
    comm = comm_ref()
    if comm is not None:
        traffic.ended(comm)
        if comm._endpoint is not None:
            comm._why_ended = why
            comm._look_for_more(endpoint)
    node = node_ref()
    if node is not None:
        node.leave()


def _over(
    future: asyncio.Future[None],
    last_resort: asyncio.TimerHandle,
    _endpoint: thalweg.Endpoint | None,
    _why: Any,
) -> None:
    last_resort.cancel()
    _tell(future)


def _tell(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def _put_together(frames: list[Any], size: int) -> list[Any]:
    """What is sent for these frames: themselves, or all in one behind an empty one.

    The first frame of a message of Dask's is never empty.
    """
    frames = [frame if type(frame) is bytes else ensure_memoryview(frame) for frame in frames]
    if len(frames) > FRAMES_MAX and size < SHORT_FRAME_BYTES * len(frames):
        return [b"", pack_frames(frames)]
    return frames


def _taken_apart(frames: list[memoryview]) -> list[memoryview]:
    if len(frames) == 2 and not frames[0].nbytes:
        return unpack_frames(frames[1])
    return frames


def _finalize(endpoint: thalweg.Endpoint | None, representation: str) -> None:
    if endpoint is not None and not endpoint.is_closed:
        logger.warning("Closing dangling endpoint in %s", representation)
        endpoint.abort()
