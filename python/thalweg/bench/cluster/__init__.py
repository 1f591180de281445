"""What users of Dask wait for, over each protocol in turn.

Owns the turns, the limits of time and the table. Each turn is a process of its own
(:mod:`.session`) with a scheduler and workers, so that no protocol inherits anything from another.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import json
import os
import selectors
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import entry_points
from typing import Any

from .. import offspring
from ..errors import BenchError, Unavailable
from ..measure import note, progress
from ..stats import median
from ..table import lay_out
from ..units import show_figure
from . import profile

#: What is measured, its unit, and how long it may take at a scale of 1.
STEPS = {
    "transfer": ("200 MB worker to worker", "s", 60),
    "shuffle": ("P2P shuffle, 5.2 M rows", "s", 120),
    "rechunk": ("P2P rechunk, 200 MB", "s", 90),
    "tree": ("tree reduction, 512 × 64 KiB", "s", 60),
    "sequential": ("500 tiny tasks in sequence", "s", 60),
    "at-once": ("10,000 tiny tasks at once", "s", 120),
    "idle": ("idle CPU, scheduler and workers", "% of a core", 40),
}

#: What a step finds out by the way: after which step it is shown, and what as those above.
FOUND_BY = {"transfer-recorded": ("transfer", "transfer (as Dask records it)", "s")}

#: How long a cluster may take to start, and to end.
_START_S, _END_S = 90.0, 40.0

_MODULES_OF_STEPS = {
    "shuffle": ("pandas", "pyarrow"), "rechunk": ("numpy",), "transfer": ("numpy",),
    "tree": ("numpy",),
}


@dataclasses.dataclass
class Results:
    rows: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    left_out: list[str] = dataclasses.field(default_factory=list)
    routes: list[str] = dataclasses.field(default_factory=list)
    #: Whether something failed that is there.
    failed: bool = False


@dataclasses.dataclass
class _Turn:
    protocol: str
    steps: list[str]
    workers: int
    scale: float
    profile: bool

    def limit_s(self, step: str) -> float:
        return STEPS[step][2] * max(1.0, self.scale)


def run(options: argparse.Namespace) -> Results:
    """Every protocol, as often as was asked, in turn."""
    if importlib.util.find_spec("distributed") is None:
        raise BenchError("dask.distributed is not installed: pip install distributed")
    results = Results()
    steps = _possible(options.only, results)
    protocols = [name for name in options.protocol if _is_there(name, results)]
    samples: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for turn in range(1, options.repeat + 1):
        for protocol in list(protocols):
            progress(f"[{turn}/{options.repeat}] {protocol}")
            this = _Turn(protocol, steps, options.workers, options.scale, options.profile)
            try:
                for words in _take(this, f"[{turn}/{options.repeat}] {protocol}"):
                    if "route" in words:
                        results.routes.append(f"{protocol}: {words['route']}")
                    else:
                        samples.setdefault((words["step"], protocol), []).append(words)
                        unit = _described(words["step"])[1]
                        figure = show_figure(words["value"])
                        where = f"[{turn}/{options.repeat}] {protocol} {words['step']}"
                        note(f"{where}: {figure} {unit}")
            except BenchError as error:
                protocols.remove(protocol)
                results.failed = results.failed or not isinstance(error, Unavailable)
                results.left_out.append(f"{protocol}: {error}")
    progress("")
    results.routes = list(dict.fromkeys(results.routes))
    for step in _with_what_they_find(steps):
        taken = {name: samples[step, name] for name in options.protocol if (step, name) in samples}
        results.rows += _rows(step, taken, options)
    return results


def _described(step: str) -> tuple[str, str]:
    """What a step is called, and its unit."""
    what, unit = FOUND_BY[step][1:] if step in FOUND_BY else STEPS[step][:2]
    return what, unit


def _with_what_they_find(steps: list[str]) -> Iterator[str]:
    for step in steps:
        yield step
        yield from (name for name, (after, *_) in FOUND_BY.items() if after == step)


def _possible(steps: list[str], results: Results) -> list[str]:
    possible = []
    for step in steps:
        wanting = [
            name for name in _MODULES_OF_STEPS.get(step, ())
            if importlib.util.find_spec(name) is None
        ]
        if wanting:
            results.left_out.append(f"{step}: {' and '.join(wanting)} not installed")
        else:
            possible.append(step)
    return possible


def _is_there(protocol: str, results: Results) -> bool:
    from distributed.comm.registry import backends

    known = set(backends) | {
        entry.name for entry in entry_points(group="distributed.comm.backends")
    }
    if protocol in known:
        return True
    hint = ": pip install distributed-ucxx-cu12" if protocol == "ucxx" else ""
    results.left_out.append(f"{protocol}: distributed has no such protocol here{hint}")
    return False


def _take(turn: _Turn, where: str) -> Iterator[dict[str, Any]]:
    """What one session says, step by step. It is ended when a step takes too long."""
    duty = dataclasses.asdict(turn)
    with tempfile.TemporaryDirectory(
        prefix="thalweg-bench-", ignore_cleanup_errors=True
    ) as folder, contextlib.ExitStack() as s:
        duty["folder"] = folder
        errors = s.enter_context(open(os.path.join(folder, "session.log"), "w+"))
        process = s.enter_context(_ended(subprocess.Popen(
            offspring.command("thalweg.bench.cluster.session"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            start_new_session=True,
        )))
        assert process.stdin and process.stdout
        process.stdin.write(json.dumps(duty).encode() + b"\n")
        process.stdin.flush()
        doing, limit_s = "starting the cluster", _START_S
        lines = _Lines(process.stdout.fileno())
        while True:
            words = lines.read(limit_s)
            if words is None:
                raise BenchError(f"{doing}: no end after {limit_s:.0f} s")
            if not words:
                break
            if "error" in words:
                kind = Unavailable if words.get("unavailable") else BenchError
                raise kind(f"{doing}: {words['error']}")
            if "begin" in words:
                doing, limit_s = words["begin"], turn.limit_s(words["begin"])
                progress(f"{where} {doing}")
            elif "end" in words:
                doing, limit_s = "ending the cluster", _END_S
            else:
                yield words
        code = process.wait(_END_S)
        if code:
            errors.seek(0)
            lines_of_log = errors.read().strip().splitlines() or ["it said nothing"]
            raise BenchError(f"{doing}: the session ended with status {code}: {lines_of_log[-1]}")


@contextlib.contextmanager
def _ended(process: subprocess.Popen[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    """Scheduler and workers end with the session, however that ends."""
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout):
            if stream:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()


class _Lines:
    """Lines of JSON from a pipe, each within a time."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._heard = b""

    def read(self, limit_s: float) -> dict[str, Any] | None:
        """The next words; an empty dictionary at the end, ``None`` when the time is over."""
        deadline = time.monotonic() + limit_s
        with selectors.DefaultSelector() as selector:
            selector.register(self._descriptor, selectors.EVENT_READ)
            while b"\n" not in self._heard:
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    return None
                piece = os.read(self._descriptor, 65536)
                if not piece:
                    return {}
                self._heard += piece
        line, _, self._heard = self._heard.partition(b"\n")
        words: dict[str, Any] = json.loads(line)
        return words


def _rows(
    step: str, taken: dict[str, list[dict[str, Any]]], options: argparse.Namespace
) -> list[dict[str, Any]]:
    baseline = "tcp" if "tcp" in taken else next(iter(taken), None)
    rows = []
    what, unit = _described(step)
    for protocol, samples in taken.items():
        row = {
            "program": "dask",
            "protocol": protocol,
            "step": step,
            "what": what,
            "unit": unit,
            "value": median(sample["value"] for sample in samples),
            "samples": [sample["value"] for sample in samples],
            "workers": options.workers,
            "scale": options.scale,
            "baseline": baseline,
        }
        details = {name for sample in samples for name in sample.get("details", {})}
        row["details"] = {
            name: median(sample.get("details", {}).get(name) for sample in samples)
            for name in sorted(details)
        }
        if profiles := [sample["profile"] for sample in samples if sample.get("profile")]:
            row["profile"] = profile.mean(profiles)
        rows.append(row)
    reference = next((row["value"] for row in rows if row["protocol"] == baseline), None)
    for row in rows:
        row["ratio"] = row["value"] / reference if reference else None
    return rows


def render(rows: Sequence[dict[str, Any]]) -> str:
    """A line a step, a column a protocol, and what each is to the first."""
    protocols = list(dict.fromkeys(row["protocol"] for row in rows))
    baseline = rows[0]["baseline"]
    others = [name for name in protocols if name != baseline]
    workers, scale = rows[0]["workers"], rows[0]["scale"]
    heading = f"{workers} workers" + (f", scale {scale:g}" if scale != 1 else "")
    lines = [[heading, "unit", *protocols, *(f"{name} / {baseline}" for name in others), ""]]
    for step in dict.fromkeys(row["step"] for row in rows):
        found = {row["protocol"]: row for row in rows if row["step"] == step}
        row = next(iter(found.values()))
        line = [row["what"] if scale == 1 else step, row["unit"]]
        line += [show_figure(found[name]["value"]) if name in found else "–" for name in protocols]
        for name in others:
            line.append(_comparison(found, name, baseline))
        lines.append([*line, ""])
    return lay_out(lines, 2)


def _comparison(found: dict[str, dict[str, Any]], name: str, baseline: str) -> str:
    if name not in found or baseline not in found:
        return "–"
    if found[name]["step"] == "idle":
        return f"{found[name]['value'] - found[baseline]['value']:+.2f} points"
    ratio = found[name]["ratio"]
    return f"{ratio:.2f}" if ratio is not None else "–"
