"""Asks a cluster's processes where their time went (:mod:`.account`), and shows what they say.

A profile has the figures of each role; those of several workers are added up.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ..table import lay_out
from ..units import show_figure

if TYPE_CHECKING:
    from distributed import Client

Figures = dict[str, float]
Profile = dict[str, Figures]

ROLES = ("scheduler", "workers", "client")

#: What is shown of each, with what it is called: CPU by kind, then what was waited for.
_CPU = {
    "comm_cpu_s": "comm", "serialise_cpu_s": "serialise", "dask_cpu_s": "Dask's loop",
    "waits_cpu_s": "selector", "threads_cpu_s": "other threads",
}


def begin(client: Client) -> None:
    """The client's own process counts as well; the others have it preloaded."""
    from . import account

    async def here() -> None:
        account.begin()

    client.sync(here)


def so_far(client: Client) -> Profile:
    """What all processes have counted."""
    from . import account

    async def here() -> Figures:
        return account.so_far()

    workers = client.run(account.so_far)
    scheduler = client.run_on_scheduler(account.so_far)
    return {"scheduler": scheduler, "workers": _sum(workers.values()), "client": client.sync(here)}


def _sum(all_figures: Any) -> Figures:
    total: Figures = {}
    for figures in all_figures:
        for name, value in figures.items():
            total[name] = total.get(name, 0.0) + value
    return total


def between(before: Profile, after: Profile) -> Profile:
    """What came to be counted meanwhile."""
    return {
        role: {name: value - before[role][name] for name, value in figures.items()}
        for role, figures in after.items()
    }


def mean(profiles: Sequence[Profile]) -> Profile:
    return {
        role: {name: value / len(profiles) for name, value in figures.items()}
        for role, figures in ((role, _sum(each[role] for each in profiles)) for role in ROLES)
    }


def render(rows: Sequence[dict[str, Any]]) -> str:
    """A line for each step, role and protocol."""
    lines = [[
        "CPU by process, ms", "protocol", "process", *_CPU.values(), "comm's share",
        "loop waits", "batches", "held each", "",
    ]]
    for row in rows:
        if row.get("profile"):
            lines += _lines(row)
    return lay_out(lines, 3)


def _lines(row: dict[str, Any]) -> Iterator[list[str]]:
    for role in ROLES:
        figures = row["profile"][role]
        cpu = [figures[name] for name in _CPU]
        batches = figures["batches"]
        yield [
            row["what"], row["protocol"], role,
            *(show_figure(1e3 * seconds) for seconds in cpu),
            f"{100 * cpu[0] / (sum(cpu) or 1):.1f} %",
            f"{100 * figures['waits_s'] / figures['wall_s']:.0f} %",
            f"{batches:.0f}",
            f"{1e3 * figures['held_s'] / batches:.2f} ms" if batches else "–",
            "",
        ]
