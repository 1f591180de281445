"""Percentiles, medians, and what a process has consumed."""

from __future__ import annotations

import math
import resource
import statistics
from collections.abc import Iterable, Sequence

PERCENTILES = ("min", "p50", "p90", "p99", "max", "mean")


def one_way_us(round_trips_ns: Sequence[int]) -> dict[str, float]:
    """The distribution of half a round trip, by rank."""
    ordered = sorted(round_trips_ns)

    def at(fraction: float) -> float:
        rank = math.ceil(fraction * len(ordered))
        return ordered[max(rank, 1) - 1] / 2000

    figures = {"min": at(0), "p50": at(0.5), "p90": at(0.9), "p99": at(0.99), "max": at(1)}
    figures["mean"] = sum(ordered) / len(ordered) / 2000
    return figures


def median(values: Iterable[float | None]) -> float | None:
    """The median of what is known; ``None`` of nothing."""
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def medians(of: Sequence[dict[str, float]]) -> dict[str, float | None]:
    """The median of each figure over several samples."""
    return {name: median(figures[name] for figures in of) for name in PERCENTILES}


class Usage:
    """CPU time of this process, and how long its main thread waited for a core, from now on."""

    def __init__(self) -> None:
        self._cpu_us = _cpu_us()
        self._waited_us = _waited_us()

    def so_far(self) -> dict[str, float]:
        return {"cpu_us": _cpu_us() - self._cpu_us, "waited_us": _waited_us() - self._waited_us}


def _cpu_us() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return (usage.ru_utime + usage.ru_stime) * 1e6


def _waited_us() -> float:
    try:
        with open("/proc/thread-self/schedstat") as file:
            return int(file.read().split()[1]) / 1e3
    except (OSError, IndexError, ValueError):
        return 0.0
