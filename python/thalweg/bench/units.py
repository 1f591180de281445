"""Sizes and figures as people write and read them."""

from __future__ import annotations

import re

_FACTORS = {
    "": 1,
    "b": 1,
    "k": 1 << 10,
    "kib": 1 << 10,
    "m": 1 << 20,
    "mib": 1 << 20,
    "g": 1 << 30,
    "gib": 1 << 30,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
}

#: Larger messages are refused before they are made.
SIZE_MAX = 1 << 32


def parse_size(text: str) -> int:
    """``8``, ``64KiB``, ``1.5MiB``, ``10MB``: a number of bytes."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    factor = _FACTORS.get(found[2].lower()) if found else None
    if found is None or factor is None:
        raise ValueError(f"{text!r} is not a size; write 8, 64KiB, 1MiB or 10MB")
    size = float(found[1]) * factor
    if size != int(size) or not 1 <= size <= SIZE_MAX:
        raise ValueError(f"{text!r} is not a whole number of bytes from 1 B to 4 GiB")
    return int(size)


def show_size(size_bytes: int) -> str:
    """Exact, in the largest unit that divides it."""
    for factor, unit in (
        (1 << 30, "GiB"), (1 << 20, "MiB"), (10**6, "MB"), (1 << 10, "KiB"),
    ):
        if size_bytes and size_bytes % factor == 0:
            return f"{size_bytes // factor} {unit}"
    return f"{size_bytes} B"


def show_figure(value: float | None) -> str:
    """Three significant digits, no exponent."""
    if value is None:
        return "–"
    magnitude = abs(value)
    digits = 0 if magnitude >= 99.95 else 1 if magnitude >= 9.995 else 2 if magnitude >= 0.9995 else 3
    return f"{value:.{digits}f}"
