"""Runs the cases in turn, as often as was asked, and makes rows of what they gave."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Sequence
from typing import Any

from . import pair
from .case import Case
from .errors import BenchError, Unavailable
from .stats import median, medians

#: A repeated sample whose processes waited longer than this share of the time for a core that
#: others held is taken again, so often at most.
_DISTURBED = 0.05
_RETAKES = 2

Measure = Callable[[Case], pair.Outcome]


@dataclasses.dataclass
class Results:
    """What a run gave."""

    #: One a case, as scripts read them.
    rows: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    #: What could not be measured, and why.
    left_out: list[str] = dataclasses.field(default_factory=list)


def run(cases: Sequence[Case], repeat: int, measure: Measure) -> Results:
    """Measures all cases ``repeat`` times, A B A B."""
    samples: dict[Case, list[pair.Outcome]] = {case: [] for case in cases}
    results = Results()
    unavailable: set[str] = set()
    for turn in range(1, repeat + 1):
        for case in cases:
            if case.backend in unavailable:
                continue
            progress(f"[{turn}/{repeat}] {case.describe()}")
            try:
                samples[case].append(_undisturbed(case, measure, repeat > 1))
            except Unavailable as error:
                unavailable.add(case.backend)
                results.left_out.append(str(error))
            except BenchError as error:
                progress("")
                raise BenchError(f"{case.describe()}: {error}") from None
    progress("")
    results.rows = [_row(case, taken) for case, taken in samples.items() if taken]
    _add_ratios(results.rows)
    return results


def _undisturbed(case: Case, measure: Measure, retake: bool) -> pair.Outcome:
    taken = [measure(case)]
    retakes = _RETAKES if retake and not case.has_threads else 0
    while taken[-1].disturbed > _DISTURBED and len(taken) <= retakes:
        taken.append(measure(case))
    return min(taken, key=lambda outcome: outcome.disturbed)


def _row(case: Case, taken: list[pair.Outcome]) -> dict[str, Any]:
    row: dict[str, Any] = {
        "program": case.program,
        "row": "thalweg" if case.backend == "thalweg" else "baseline",
        "backend": case.backend,
        "transport": taken[-1].link,
        "memory": "host",
        "wake": "spin" if case.spin_us else "park",
        "spin_us": case.spin_us,
        "size_bytes": case.size_bytes,
        "frames": len(case.frames),
        "samples": len(taken),
    }
    cpu_us = median(outcome.cpu_us for outcome in taken) or 0.0
    if case.program == "pingpong":
        row["iters"] = case.iters
        row["half_rtt_us"] = medians([outcome.result["half_rtt_us"] for outcome in taken])
        row["cpu_us_per_message"] = cpu_us / (2 * case.iters)
    else:
        seconds = median(outcome.result["seconds"] for outcome in taken)
        assert seconds
        row["window"] = case.window
        row["messages"] = case.iters
        row["seconds"] = seconds
        row["gb_per_s"] = case.iters * case.size_bytes / seconds / 1e9
        row["messages_per_s"] = case.iters / seconds
        row["cpu_us_per_message"] = cpu_us / case.iters
    row["disturbed"] = max(outcome.disturbed for outcome in taken)
    row["route"] = taken[-1].route
    return row


def headline(row: dict[str, Any]) -> float:
    """The figure that ratios and plots are made of."""
    figure: float
    if row["program"] == "pingpong":
        figure = row["half_rtt_us"]["p50"]
    elif row["size_bytes"] <= 1024:
        figure = row["messages_per_s"]
    else:
        figure = row["gb_per_s"]
    return figure


def _add_ratios(rows: list[dict[str, Any]]) -> None:
    """To the first baseline of the same size."""
    first: dict[tuple[int, int], dict[str, Any]] = {}
    for row in rows:
        if row["row"] == "baseline":
            first.setdefault((row["size_bytes"], row["frames"]), row)
    for row in rows:
        baseline = first.get((row["size_bytes"], row["frames"]))
        row["baseline"] = baseline["backend"] if baseline else None
        row["ratio"] = headline(row) / headline(baseline) if baseline else None


def progress(text: str) -> None:
    """One line that is written over, where somebody looks."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


def note(text: str) -> None:
    """A line that stays, whoever looks: a run that is interrupted has said what it had."""
    clear = "\r\x1b[K" if sys.stderr.isatty() else ""
    print(f"{clear}{text}", file=sys.stderr, flush=True)
