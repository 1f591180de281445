"""What messages contain, so that a byte lost, doubled or misplaced is noticed."""

from __future__ import annotations

import functools
import random
from typing import Any

from .errors import BenchError

#: The two directions never carry the same bytes.
OUT, BACK = "out", "back"

# A prime: nothing that is misplaced by whole pages or cache lines looks right.
_PERIOD = 65521


@functools.cache
def _block(way: str) -> bytes:
    return random.Random(way).randbytes(_PERIOD)


def content(size_bytes: int, index: int, way: str) -> bytes:
    """The bytes of message number ``index`` going ``way``."""
    start = index * 7919 % _PERIOD
    block = _block(way)
    block = block[start:] + block[:start]
    head = index.to_bytes(8, "little")[:size_bytes]
    repeated = block * (size_bytes // _PERIOD + 1)
    return head + repeated[len(head) : size_bytes]


def verify(parts: list[Any], size_bytes: int, index: int, way: str) -> None:
    """Compares what came, in any number of buffers, with what was sent."""
    got = b"".join(parts)
    if len(got) != size_bytes:
        raise BenchError(f"message {index} has {len(got)} bytes instead of {size_bytes}")
    expected = content(size_bytes, index, way)
    if got != expected:
        at = next(i for i in range(size_bytes) if got[i] != expected[i])
        raise BenchError(f"message {index} going {way}: byte {at} is not what was sent")
