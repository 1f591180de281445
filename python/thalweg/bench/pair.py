"""Starts the two processes of a sample, and hears how it went."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import selectors
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

from . import offspring
from .case import Case
from .errors import BenchError, Unavailable

#: How long a process may take until it has something to say of its end.
_END_S = 20.0

#: With the C library's own settings, freed memory returns to the system, or not, depending on what
#: else was allocated before; asyncio's streams run at half the speed where it does.
MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(512 << 20),
    "MALLOC_TOP_PAD_": str(64 << 20),
}


class Side:
    """A process that measures or serves."""

    def __init__(self, name: str, case: Case, cpu: int | None, host: str, port: int | None) -> None:
        self.name = name
        self._heard = b""
        self._has_told = False
        self._errors = tempfile.TemporaryFile()
        self._process = subprocess.Popen(
            offspring.command("thalweg.bench.side"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env={**os.environ, **MALLOC},
            # An interrupt from the keyboard is for the program only; it ends this one.
            start_new_session=True,
        )
        assert self._process.stdin and self._process.stdout
        cpu = None if case.has_threads else cpu
        duty = {"case": case.to_json(), "cpu": cpu, "host": host, "port": port}
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(duty).encode() + b"\n")
            self._process.stdin.close()

    def fileno(self) -> int:
        assert self._process.stdout
        return self._process.stdout.fileno()

    @property
    def pid(self) -> int:
        return self._process.pid

    def read(self) -> dict[str, Any] | None:
        """What it says, if that is complete; once after it has become readable.

        :class:`EOFError` if it has said all and nothing more will come.
        """
        piece = os.read(self.fileno(), 65536)
        if not piece:
            if self._has_told:
                raise EOFError
            raise BenchError(self._last_words())
        self._heard += piece
        if not self._heard.endswith(b"\n"):
            return None
        words: dict[str, Any] = {}
        for line in self._heard.splitlines():
            words.update(json.loads(line))
        self._heard = b""
        if "error" in words:
            if words.get("unavailable"):
                raise Unavailable(words["error"])
            raise BenchError(f"{self.name}: {words['error']}")
        self._has_told = self._has_told or "result" in words or "usage" in words
        return words

    def _last_words(self) -> str:
        code = self._process.wait(_END_S)
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        why = f": {lines[-1]}" if lines else ""
        if code < 0:
            return f"{self.name} was ended by {signal.Signals(-code).name}{why}"
        return f"{self.name} ended early, with status {code}{why}"

    def finish(self) -> None:
        """Waits for its end."""
        try:
            self._process.wait(_END_S)
        except subprocess.TimeoutExpired:
            raise BenchError(f"{self.name} does not end") from None

    def __enter__(self) -> Side:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        assert self._process.stdout
        self._process.stdout.close()
        self._errors.close()


def hear(
    sides: list[Side],
    enough: Callable[[dict[str, Any]], bool],
    limit_s: float,
    case: Case,
    known: dict[str, Any] | None = None,
    stop_on: Any = None,
) -> dict[str, Any]:
    """Collects what the sides say until it is enough. What one of them fails with is raised.

    ``stop_on``: a socket that has nothing to say meanwhile; if it becomes readable, the other
    program has gone.
    """
    words = dict(known or {})
    deadline = time.monotonic() + limit_s
    with selectors.DefaultSelector() as selector:
        for side in sides:
            selector.register(side, selectors.EVENT_READ)
        if stop_on is not None:
            selector.register(stop_on, selectors.EVENT_READ)
        while not enough(words):
            ready = selector.select(max(0.0, deadline - time.monotonic()))
            if not ready:
                raise BenchError(f"{case.describe()}: no end after {limit_s:.0f} s")
            # Who died says more than who noticed.
            sayings: list[BenchError] = []
            for key, _ in ready:
                if key.fileobj is stop_on:
                    raise BenchError("the connecting program has gone")
                assert isinstance(key.fileobj, Side)
                side = key.fileobj
                try:
                    words.update(side.read() or {})
                except EOFError:
                    selector.unregister(side)
                except BenchError as error:
                    selector.unregister(side)
                    sayings.append(error)
            if sayings:
                raise _told_best(sayings, sides, selector)
    return words


def _told_best(
    sayings: list[BenchError], sides: list[Side], selector: selectors.BaseSelector
) -> BenchError:
    """Of a process that was killed and one that noticed, the first tells the cause."""
    if not isinstance(sayings[0], Unavailable) and " was ended by " not in str(sayings[0]):
        for key, _ in selector.select(0.5):
            if isinstance(key.fileobj, Side):
                try:
                    key.fileobj.read()
                except EOFError:
                    pass
                except BenchError as error:
                    sayings.append(error)
    return next((error for error in sayings if " was ended by " in str(error)), sayings[0])


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What one sample gave."""

    result: dict[str, Any]
    link: str
    route: str | None
    #: CPU time of both processes.
    cpu_us: float
    #: Share of the time in which a process waited for a core that others held.
    disturbed: float


def outcome(words: dict[str, Any]) -> Outcome:
    result, served = words["result"], words["usage"]
    sides = [result["usage"], served]
    return Outcome(
        result=result,
        link=words["link"],
        route=words["route"],
        cpu_us=sum(side["cpu_us"] for side in sides),
        disturbed=max(side["waited_us"] for side in sides) / max(result["wall_us"], 1.0),
    )


@contextlib.contextmanager
def serving(case: Case, cpu: int | None, host: str) -> Iterator[tuple[Side, int]]:
    """The serving process and the port at which it waits."""
    with Side("the serving process", case, cpu, host, None) as side:
        words = hear([side], lambda words: "port" in words, _END_S + 10, case)
        yield side, words["port"]


def measure_here(case: Case, pins: tuple[int, int] | None) -> Outcome:
    """One sample with two processes of this machine."""
    here, peer = pins or (None, None)
    with serving(case, peer, "127.0.0.1") as (server, port):
        with Side("the measuring process", case, here, "127.0.0.1", port) as client:
            words = hear(
                [server, client],
                lambda words: "result" in words and "usage" in words,
                case.limit_s(),
                case,
            )
            client.finish()
        server.finish()
    return outcome(words)
