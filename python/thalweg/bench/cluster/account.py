"""Where the time of a scheduler, a worker or a client goes, of their event loop above all.

Preloaded into Dask's processes (``--preload``). What runs in the event loop's thread belongs to one
of :data:`KINDS` at any time; changing it costs about a microsecond. The protocols' backends are not
changed otherwise, and are counted by the same rules, on connections that were there before as well:

- ``comm``: every step of a comm's ``read`` and ``write``, and the callback that the loop calls when
  a descriptor is ready, system calls included. Not what Dask does in that same callback afterwards.
- ``serialise``: ``to_frames`` and ``from_frames`` inside of those.
- ``waits``: in the selector.
- ``dask``: all else in that thread, the loop's own turns among it.

Must not know what is measured, nor how it is shown.
"""

from __future__ import annotations

import asyncio
import collections.abc
import functools
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from distributed.batched import BatchedSend
from distributed.comm.core import Comm
from tornado.ioloop import IOLoop
from tornado.iostream import BaseIOStream

KINDS = ("comm", "serialise", "dask", "waits")

#: The callback of a comm, until it has let a task go on: then that is Dask.
_READY = "ready"


class Clock:
    """The time of one event loop's thread, by kind."""

    def __init__(self) -> None:
        self.thread = threading.get_ident()
        self.wall_s = dict.fromkeys((*KINDS, _READY), 0.0)
        self.cpu_s = dict.fromkeys((*KINDS, _READY), 0.0)
        self.kind = "dask"
        self.wall, self.cpu = time.perf_counter(), time.thread_time()

    def switch(self, kind: str) -> str:
        """From now on it is this; gives what it was."""
        wall, cpu = time.perf_counter(), time.thread_time()
        before = self.kind
        self.wall_s[before] += wall - self.wall
        self.cpu_s[before] += cpu - self.cpu
        self.kind, self.wall, self.cpu = kind, wall, cpu
        return before


class _Batches:
    """What ``BatchedSend`` kept until its interval was over."""

    def __init__(self) -> None:
        self.count = 0
        self.held_s = 0.0


_clock: Clock | None = None
_batches = _Batches()


def _clock_here() -> Clock | None:
    """Not that of other threads, which serialise large messages and run tasks."""
    clock = _clock
    return clock if clock is not None and clock.thread == threading.get_ident() else None


class _Steps(collections.abc.Coroutine[Any, Any, Any]):
    """A coroutine whose steps are counted."""

    def __init__(self, inner: Any, kind: str) -> None:
        self._inner, self._kind = inner, kind

    def _step(self, step: Callable[..., Any], *arguments: Any) -> Any:
        clock = _clock_here()
        if clock is None:
            return step(*arguments)
        before = clock.switch(self._kind)
        try:
            return step(*arguments)
        finally:
            clock.switch("dask" if before is _READY else before)

    def send(self, value: Any) -> Any:
        return self._step(self._inner.send, value)

    def throw(self, *what: Any) -> Any:
        return self._step(self._inner.throw, *what)

    def close(self) -> None:
        self._inner.close()

    def __await__(self) -> _Steps:
        return self

    def __iter__(self) -> _Steps:
        return self

    def __next__(self) -> Any:
        return self.send(None)


def _steps_of(owner: Any, name: str, kind: str) -> None:
    """The coroutines that ``owner.name`` makes are counted."""
    make = getattr(owner, name)

    @functools.wraps(make)
    def counted(*arguments: Any, **named: Any) -> _Steps:
        return _Steps(make(*arguments, **named), kind)

    setattr(owner, name, counted)


def _calls_of(call: Callable[..., Any], kind: str) -> Callable[..., Any]:
    """The same call, counted."""

    @functools.wraps(call, updated=())
    def counted(*arguments: Any, **named: Any) -> Any:
        clock = _clock_here()
        if clock is None:
            return call(*arguments, **named)
        before = clock.switch(kind)
        try:
            return call(*arguments, **named)
        finally:
            clock.switch(before)

    return counted


def _comm_classes(base: type) -> set[type]:
    subclasses: list[type] = base.__subclasses__()
    return {each for one in subclasses for each in (one, *_comm_classes(one))}


def _count_comms() -> None:
    classes = _comm_classes(Comm)
    for comm in classes:
        for name in ("read", "write"):
            if name in vars(comm):
                _steps_of(comm, name, "comm")
    for module in {sys.modules[comm.__module__] for comm in classes}:
        for name in ("to_frames", "from_frames"):
            if name in vars(module):
                _steps_of(module, name, "serialise")


def _count_streams(io_loop: Any) -> None:
    """Tornado's streams, which tcp:// uses: those to come, and those that are open."""
    stream: Any = BaseIOStream
    handle = stream._handle_events
    stream._handle_events = _calls_of(handle, _READY)
    for descriptor, (file, handler) in list(io_loop.handlers.items()):
        if getattr(handler, "__func__", None) is handle:
            io_loop.handlers[descriptor] = (file, _calls_of(handler, _READY))


def _count_readers(loop: Any) -> None:
    """thalweg's nodes: those to come, and those that are there."""
    add_reader = loop.add_reader

    def of_thalweg(callback: Any) -> bool:
        return type(callback).__module__ == "thalweg"

    def counted(descriptor: Any, callback: Any, *arguments: Any) -> Any:
        callback = _calls_of(callback, _READY) if of_thalweg(callback) else callback
        return add_reader(descriptor, callback, *arguments)

    loop.add_reader = counted
    for key in loop._selector.get_map().values():
        reader, _ = key.data
        if reader is not None and of_thalweg(reader._callback):
            reader._callback = _calls_of(reader._callback, _READY)


def _count_batches() -> None:
    def buffer(batched: Any) -> Any:
        return vars(batched)["buffer"]

    def replace(batched: Any, new: Any) -> None:
        since = vars(batched).pop("_since", None)
        if since is not None:
            _batches.count += 1
            _batches.held_s += time.perf_counter() - since
        vars(batched)["buffer"] = new

    send = BatchedSend.send

    def counted(batched: Any, *messages: Any) -> None:
        send(batched, *messages)
        if messages:
            vars(batched).setdefault("_since", time.perf_counter())

    batched_send: Any = BatchedSend
    batched_send.buffer = property(buffer, replace)
    batched_send.send = counted


def begin() -> None:
    """Counts from now on: this process, and the event loop that is running."""
    global _clock
    if _clock is None:
        _count_comms()
        _count_batches()
        loop: Any = asyncio.get_running_loop()
        _count_streams(IOLoop.current())
        _count_readers(loop)
        loop._selector.select = _calls_of(loop._selector.select, "waits")
        _clock = Clock()


def dask_setup(_server: Any) -> None:
    """Called by Dask in the process that preloads this."""
    begin()


def so_far() -> dict[str, float]:
    """What has been counted; called in the event loop's thread."""
    clock = _clock
    assert clock is not None
    clock.switch(clock.kind)
    # Both first: a thread's time goes on.
    threads_s = time.process_time() - time.thread_time()
    figures = {"wall_s": time.perf_counter(), "threads_cpu_s": threads_s}
    for kind in KINDS:
        figures[f"{kind}_cpu_s"] = clock.cpu_s[kind]
    figures["comm_cpu_s"] += clock.cpu_s[_READY]
    figures["waits_s"] = clock.wall_s["waits"]
    figures["batches"] = float(_batches.count)
    figures["held_s"] = _batches.held_s
    return figures
