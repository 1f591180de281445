"""Which cores the two processes run on."""

from __future__ import annotations

import os

from .errors import BenchError


def allowed() -> list[int]:
    """The CPUs this process may run on, ascending."""
    return sorted(os.sched_getaffinity(0))


def check(pins: tuple[int, int]) -> None:
    for cpu in pins:
        if cpu not in allowed():
            these = ",".join(map(str, allowed()))
            raise BenchError(f"CPU {cpu} may not be used by this process; these may: {these}")


def default_pair() -> tuple[int, int] | None:
    """Two cores, not two threads of one where possible; ``None`` if there is only one."""
    here, *others = allowed()
    if not others:
        return None
    siblings = _siblings(here)
    return here, next((cpu for cpu in others if cpu not in siblings), others[0])


def _siblings(cpu: int) -> set[int]:
    path = f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"
    try:
        with open(path) as file:
            text = file.read().strip()
        found: set[int] = set()
        for part in text.split(","):
            first, _, last = part.partition("-")
            found.update(range(int(first), int(last or first) + 1))
        return found
    except (OSError, ValueError):
        return set()
