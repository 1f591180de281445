"""One of the two processes of a sample: reads what to do from standard input, says how it went.

Both are lines of JSON. Nothing else is written to standard output.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

from . import channels, pattern
from .case import Case
from .channels import Backend, Channel
from .errors import BenchError, Unavailable
from .stats import Usage, one_way_us
from .words import Voice

Say = Callable[..., None]

#: The acknowledgement at the end of a stream.
_ACK = (1,)


def main() -> int:
    say = Voice().say
    duty = json.loads(sys.stdin.readline())
    if duty["cpu"] is not None:
        os.sched_setaffinity(0, {duty["cpu"]})
    case = Case.from_json(duty["case"])
    try:
        backend = channels.find(case.backend)
        if duty["port"] is None:
            asyncio.run(_serve(backend, case, duty["host"], say))
        else:
            asyncio.run(_measure(backend, case, duty["host"], duty["port"], say))
    except Unavailable as error:
        say(error=str(error), unavailable=True)
        return 1
    except asyncio.IncompleteReadError:
        say(error="the connection ended in the middle")
        return 1
    except Exception as error:
        say(error=_words(error))
        return 1
    return 0


def _words(error: Exception) -> str:
    text = str(error)
    if isinstance(error, BenchError) or (text and isinstance(error, OSError)):
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


async def _serve(backend: type[Backend], case: Case, host: str, say: Say) -> None:
    served = await backend(case).listen(host)
    say(port=served.port)
    channel = await served.accept()
    serve = _echo if case.program == "pingpong" else _swallow
    say(usage=await serve(channel, case))
    # The measuring side closes; a reset from here could overtake the last message.
    try:
        await asyncio.wait_for(channel.receiver(1)(), 10)
    except Exception:
        pass
    await channel.close()


async def _measure(backend: type[Backend], case: Case, host: str, port: int, say: Say) -> None:
    channel = await backend(case).connect(host, port)
    measure = _ping if case.program == "pingpong" else _stream
    result = await measure(channel, case)
    say(result=result, link=channel.link, route=channel.route)
    await channel.close()


async def _ping(channel: Channel, case: Case) -> dict[str, Any]:
    size, send, recv = case.size_bytes, channel.send, channel.receiver(case.size_bytes)
    for index in range(case.warmup):
        await send(channel.message(pattern.content(size, index, pattern.OUT), case.frames))
        pattern.verify(channel.parts(await recv()), size, index, pattern.BACK)
    message = channel.message(pattern.content(size, case.warmup, pattern.OUT), case.frames)
    laps = [0] * case.iters
    received: Any = None
    clock = time.perf_counter_ns
    usage = Usage()
    begin = last = clock()
    for index in range(case.iters):
        await send(message)
        received = await recv()
        now = clock()
        laps[index] = now - last
        last = now
    result = {"wall_us": (last - begin) / 1e3, "usage": usage.so_far()}
    pattern.verify(channel.parts(received), size, case.warmup, pattern.BACK)
    return {"half_rtt_us": one_way_us(laps), **result}


async def _echo(channel: Channel, case: Case) -> dict[str, float]:
    size, send, recv = case.size_bytes, channel.send, channel.receiver(case.size_bytes)
    for index in range(case.warmup):
        pattern.verify(channel.parts(await recv()), size, index, pattern.OUT)
        await send(channel.message(pattern.content(size, index, pattern.BACK), case.frames))
    message = channel.message(pattern.content(size, case.warmup, pattern.BACK), case.frames)
    received: Any = None
    usage = Usage()
    for _ in range(case.iters):
        received = await recv()
        await send(message)
    consumed = usage.so_far()
    pattern.verify(channel.parts(received), size, case.warmup, pattern.OUT)
    return consumed


async def _stream(channel: Channel, case: Case) -> dict[str, Any]:
    size, send, ack = case.size_bytes, channel.send, channel.receiver(1)
    for index in range(case.warmup):
        await send(channel.message(pattern.content(size, index, pattern.OUT), case.frames))
    await ack()
    message = channel.message(pattern.content(size, case.warmup, pattern.OUT), case.frames)
    window = min(case.window, case.iters) if channel.has_window else 1
    usage = Usage()
    begin = time.perf_counter_ns()
    if window == 1:
        for _ in range(case.iters):
            await send(message)
    else:
        await _in_flight(send, message, case.iters, window)
    await ack()
    wall_ns = time.perf_counter_ns() - begin
    return {"seconds": wall_ns / 1e9, "wall_us": wall_ns / 1e3, "usage": usage.so_far()}


async def _in_flight(send: Any, message: Any, count: int, window: int) -> None:
    """Sends so often, with so many sends begun and not ended."""
    left = iter(range(count))

    async def some() -> None:
        for _ in left:
            await send(message)

    tasks = [asyncio.ensure_future(some()) for _ in range(window)]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


async def _swallow(channel: Channel, case: Case) -> dict[str, float]:
    size, recv = case.size_bytes, channel.receiver(case.size_bytes)
    for index in range(case.warmup):
        pattern.verify(channel.parts(await recv()), size, index, pattern.OUT)
    await channel.send(channel.message(b"!", _ACK))
    received: Any = None
    usage = Usage()
    for _ in range(case.iters):
        received = await recv()
    await channel.send(channel.message(b"!", _ACK))
    consumed = usage.so_far()
    pattern.verify(channel.parts(received), size, case.warmup, pattern.OUT)
    return consumed


if __name__ == "__main__":
    sys.exit(main())
