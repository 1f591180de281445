"""What is measured on a cluster. Every step verifies what came out.

A step gives its value and further figures. What is quick is taken several times, and all of it once
for nothing before.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any

import dask
import psutil
from distributed import Client, wait

from ..errors import BenchError
from ..stats import median
from . import profile

#: How long the client waits for anything; the whole step is bounded elsewhere.
_WAIT_S = 100


@dataclasses.dataclass
class Context:
    """The cluster."""

    client: Client
    workers: list[str]
    scheduler_pid: int
    worker_pids: list[int]
    scale: float
    #: Where the time goes is asked before and after everything that is timed.
    profiled: bool = False
    profiles: list[profile.Profile] = dataclasses.field(default_factory=list)

    def scaled(self, count: float, smallest: int = 1) -> int:
        return max(smallest, round(count * self.scale))

    @contextlib.contextmanager
    def timing(self) -> Iterator[Timing]:
        """Times what is inside of it."""
        before = profile.so_far(self.client) if self.profiled else {}
        timing = Timing()
        begin = time.perf_counter()
        yield timing
        timing.seconds = time.perf_counter() - begin
        if self.profiled:
            self.profiles.append(profile.between(before, profile.so_far(self.client)))


@dataclasses.dataclass
class Timing:
    """How long something took."""

    seconds: float = 0.0


Step = Callable[[Context], tuple[float, dict[str, float]]]


def check(what: str, got: Any, expected: Any) -> None:
    if got != expected:
        raise BenchError(f"{what} is {got} instead of {expected}")


def _median_of(times: int, once: Callable[[], float]) -> float:
    """After once for nothing: connections are made, and modules imported, when first needed."""
    once()
    value = median(once() for _ in range(times))
    assert value is not None
    return value


# One large transfer


def _random_bytes(count: int) -> Any:
    import numpy as np

    # Nothing that compresses.
    return np.random.default_rng(count).integers(0, 256, count, "u1")


def _touch(array: Any) -> int:
    return int(array[0]) + int(array[-1]) + int(array.nbytes)


def _sum(array: Any) -> int:
    return int(array.sum(dtype="u8"))


def transfer(context: Context) -> tuple[float, dict[str, float]]:
    client, (here, there, *_) = context.client, context.workers
    size_bytes = context.scaled(200e6, 1000)

    def submit(function: Any, argument: Any, worker: str) -> Any:
        return client.submit(function, argument, workers=worker, pure=False)

    def once() -> float:
        array = submit(_random_bytes, size_bytes, here)
        touched = submit(_touch, array, here).result(_WAIT_S)
        with context.timing() as timing:
            got = submit(_touch, array, there).result(_WAIT_S)
        check("what was touched", got, touched)
        recorded.append(_recorded(client, there, size_bytes))
        sums = [submit(_sum, array, worker).result(_WAIT_S) for worker in (here, there)]
        check("the sum", sums[1], sums[0])
        return timing.seconds

    recorded: list[float] = []
    seconds = _median_of(3, once)
    # As for the whole: the first was for nothing.
    itself = median(recorded[1:])
    assert itself
    return seconds, {"gb_per_s": size_bytes / seconds / 1e9, "recorded_s": itself}


def _recorded(client: Client, worker: str, size_bytes: int) -> float:
    """How long the last transfer took of which the receiving worker's own log says so: from its
    request for the data until it had them."""

    def last(dask_worker: Any) -> Any:
        log = dask_worker.transfer_incoming_log
        return (log[-1]["total"], log[-1]["duration"]) if log else (0, 0.0)

    total, seconds = client.run(last, workers=[worker])[worker]
    if not size_bytes <= total <= 1.1 * size_bytes + 1000:
        raise BenchError(f"the worker's log of transfers ends with {total} bytes, not {size_bytes}")
    return float(seconds)


# Peer to peer


def _rows(part: int, rows: int, turn: int) -> Any:
    import numpy as np
    import pandas as pd

    random = np.random.default_rng([turn, part])
    key = random.integers(0, 1 << 20, rows)
    return pd.DataFrame({"key": key, "a": key * 3 + 1, "b": random.random(rows)})


def _digest(frame: Any) -> Any:
    """Rows, sum, and how many keys there are: too many over all if a key is in two partitions."""
    import pandas as pd

    wrong = int((frame.a != frame.key * 3 + 1).sum())
    return pd.DataFrame({
        "rows": [len(frame)], "sum": [int(frame.a.sum())], "keys": [frame.key.nunique()],
        "wrong": [wrong],
    })


def shuffle(context: Context) -> tuple[float, dict[str, float]]:
    import dask.dataframe as dd
    import pandas as pd

    client = context.client
    parts = 8 * len(context.workers)
    rows = context.scaled(5.2e6 / parts)
    meta = _rows(0, 1, 0)
    digest_meta = pd.DataFrame({name: [0] for name in ("rows", "sum", "keys", "wrong")})
    turns = itertools.count()

    def once() -> float:
        # Anew each time: results of the last turn have other names, and cannot be taken again.
        made = dd.from_map(_rows, range(parts), rows=rows, turn=next(turns), meta=meta)
        source = client.persist(made)
        wait(source, timeout=_WAIT_S)
        with context.timing() as timing:
            shuffled = client.persist(source.shuffle("key", npartitions=parts))
            wait(shuffled, timeout=_WAIT_S)
        got = client.compute(shuffled.map_partitions(_digest, meta=digest_meta)).result(_WAIT_S)
        expected = {
            "rows": parts * rows,
            "sum": client.compute(source.a.sum()).result(_WAIT_S),
            "keys": client.compute(source.key.unique().size).result(_WAIT_S),
            "wrong": 0,
        }
        for name, value in expected.items():
            check(f"shuffled: {name}", int(got[name].sum()), int(value))
        return timing.seconds

    with dask.config.set({"dataframe.shuffle.method": "p2p", "dataframe.convert-string": False}):
        seconds = _median_of(2, once)
    return seconds, {"rows": parts * rows}


def _numbers(location: Any, n: int, turn: int) -> Any:
    import numpy as np

    (top, bottom), (left, right) = location
    return np.arange(top, bottom)[:, None] * n + np.arange(left, right) + turn


def _block(n: int, turn: int, block_info: Any = None) -> Any:
    return _numbers(block_info[None]["array-location"], n, turn)


def _wrong(block: Any, n: int, turn: int, block_info: Any = None) -> Any:
    import numpy as np

    expected = _numbers(block_info[0]["array-location"], n, turn)
    return np.array([[int((block != expected).sum())]])


def rechunk(context: Context) -> tuple[float, dict[str, float]]:
    import dask.array as da

    client = context.client
    n = max(100, round(5000 * context.scale**0.5))
    chunk = -(-n // (4 * len(context.workers)))
    rows = da.core.normalize_chunks((chunk, n), (n, n))
    turns = itertools.count()

    def once() -> float:
        turn = next(turns)
        source = client.persist(da.map_blocks(_block, n, turn, chunks=rows, dtype="i8"))
        wait(source, timeout=_WAIT_S)
        with dask.config.set({"array.rechunk.method": "p2p"}), context.timing() as timing:
            turned = client.persist(source.rechunk((n, chunk)))
            wait(turned, timeout=_WAIT_S)
        ones = tuple((1,) * count for count in turned.numblocks)
        wrong = turned.map_blocks(_wrong, n, turn, chunks=ones, dtype="i8").sum()
        check("count of numbers in the wrong place", int(client.compute(wrong).result(_WAIT_S)), 0)
        return timing.seconds

    seconds = _median_of(3, once)
    return seconds, {"mb": n * n * 8 / 1e6}


# Many small things


def _small(number: int) -> Any:
    import numpy as np

    return np.arange(8192) + number


def _add(*arrays: Any) -> Any:
    return sum(arrays[1:], arrays[0])


def tree(context: Context) -> tuple[float, dict[str, float]]:
    client = context.client
    count = context.scaled(512, 4)

    def once() -> float:
        # Neighbours are on different workers, so that every addition moves something.
        level = [
            client.submit(_small, number, workers=context.workers[number % len(context.workers)],
                          pure=False)
            for number in range(count)
        ]
        wait(level, timeout=_WAIT_S)
        with context.timing() as timing:
            while len(level) > 1:
                level = [
                    client.submit(_add, *level[at : at + 4], pure=False)
                    for at in range(0, len(level), 4)
                ]
            result = level[0].result(_WAIT_S)
        check("the sum", _sum(result), count * 8191 * 4096 + 8192 * count * (count - 1) // 2)
        return timing.seconds

    return _median_of(3, once), {"arrays": count}


def _increment(number: int) -> int:
    return number + 1


def sequential(context: Context) -> tuple[float, dict[str, float]]:
    client = context.client

    def once(count: int) -> float:
        value = 0
        with context.timing() as timing:
            for _ in range(count):
                value = client.submit(_increment, value, pure=False).result(_WAIT_S)
        check("the count", value, count)
        return timing.seconds

    return _after_a_tenth(once, context.scaled(500, 5))


def at_once(context: Context) -> tuple[float, dict[str, float]]:
    client = context.client

    def once(count: int) -> float:
        with context.timing() as timing:
            futures = client.map(_increment, range(count), pure=False)
            values = client.gather(futures)
        check("the sum", sum(values), count * (count + 1) // 2)
        return timing.seconds

    return _after_a_tenth(once, context.scaled(10_000, 100))


def _after_a_tenth(once: Callable[[int], float], count: int) -> tuple[float, dict[str, float]]:
    once(count // 10)
    seconds = once(count)
    return seconds, {"ms_per_task": seconds / count * 1e3}


# Nothing at all


def _cpu_s(pids: list[int]) -> float:
    times = [psutil.Process(pid).cpu_times() for pid in pids]
    return float(sum(each.user + each.system for each in times))


def idle(context: Context) -> tuple[float, dict[str, float]]:
    """CPU of all processes together while nothing is asked of them. The client stays connected."""
    seconds = max(1.0, 10 * min(1.0, context.scale))
    # What the last step left to be tidied up.
    time.sleep(min(2.0, seconds))
    groups = {"scheduler": [context.scheduler_pid], "workers": context.worker_pids}
    before = {name: _cpu_s(pids) for name, pids in groups.items()}
    begin = time.perf_counter()
    time.sleep(seconds)
    passed = time.perf_counter() - begin
    percent = {
        f"{name}_percent": 100 * (_cpu_s(pids) - before[name]) / passed
        for name, pids in groups.items()
    }
    return sum(percent.values()), percent


BY_NAME: dict[str, Step] = {
    "transfer": transfer,
    "shuffle": shuffle,
    "rechunk": rechunk,
    "tree": tree,
    "sequential": sequential,
    "at-once": at_once,
    "idle": idle,
}


def route(context: Context) -> str | None:
    """What carried the bytes between two workers, where the backend says so."""
    here, there, *_ = context.workers
    for _ in range(40):
        metrics = context.client.scheduler_info(n_workers=-1)["workers"][there]["metrics"]
        for why, peers in metrics.get("thalweg", {}).get("routes", {}).items():
            if here in peers:
                return str(why)
        if "thalweg" not in metrics:
            return None
        # The next heartbeat may know.
        time.sleep(0.1)
    return None
