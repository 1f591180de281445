"""Whole clusters: they start, work, lose members, and stop, without leaving anything behind."""

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
import time

import dask.config
import numpy as np
import psutil
import pytest
from cluster_support import (
    PROTOCOL,
    Program,
    bounded,
    no_processes_left,
    only_thalweg,
    scheduler_program,
    settings_as_before,
    wait_for,
    worker_program,
)
from dask_support import in_loop, until
from distributed import Client, LocalCluster, Nanny, Scheduler, Security, Worker, wait
from distributed.comm import get_address_host
from test_contract import needs_ipv6


@pytest.fixture(autouse=True)
def tidy(request):
    marker = request.node.get_closest_marker("limit")
    with settings_as_before(), no_processes_left(), bounded(marker.args[0] if marker else 60):
        yield


def local_cluster(n_workers=2, **kwargs):
    defaults = dict(
        protocol=PROTOCOL,
        n_workers=n_workers,
        threads_per_worker=1,
        dashboard_address="127.0.0.1:0",
        memory_limit="1GB",
    )
    return LocalCluster(**{**defaults, **kwargs})


def workers_of(client):
    return list(client.scheduler_info(n_workers=-1)["workers"])


def ones(nbytes):
    return np.ones(nbytes, "u1")


def total(x):
    return int(x.sum())


def move(client, nbytes):
    """Makes an array on one worker and sums it on the other."""
    a, b = workers_of(client)[:2]
    x = client.submit(ones, nbytes, workers=a, pure=False)
    assert client.submit(total, x, workers=b, pure=False).result(timeout=40) == nbytes


def pid_of(client, address):
    return client.run(os.getpid, workers=[address])[address]


# Starting, working, stopping


@pytest.mark.parametrize("processes", [True, False], ids=["processes", "threads"])
def test_a_local_cluster(processes):
    with local_cluster(processes=processes) as cluster, Client(cluster) as client:
        assert cluster.scheduler_address.startswith(f"{PROTOCOL}://127.0.0.1:")
        for address in workers_of(client):
            assert address.startswith(f"{PROTOCOL}://127.0.0.1:")
        assert sum(client.gather(client.map(lambda i: i + 1, range(500)))) == 125250
        move(client, 30_000_000)
        # To the client and back.
        x = np.random.default_rng(1).random(2_000_000)
        [future] = client.scatter([x])
        np.testing.assert_array_equal(client.submit(np.sqrt, future).result(), np.sqrt(x))
        with pytest.raises(ZeroDivisionError):
            client.submit(lambda: 1 / 0).result()


@only_thalweg
def test_the_transport_is_shared_memory_and_workers_say_so():
    with local_cluster() as cluster, Client(cluster) as client:
        move(client, 30_000_000)
        a, b = workers_of(client)

        def moved():
            metrics = client.scheduler_info()["workers"][b]["metrics"]["thalweg"]
            counts = metrics["peers"].get(a, {}).get("shm")
            return counts and counts["bytes_received"] >= 30_000_000 and (metrics, counts)

        metrics, counts = wait_for(moved)
        assert counts["connections"] >= 1
        assert counts["messages_sent"] > 0 and counts["messages_received"] > 0
        assert cluster.scheduler_address in metrics["peers"]
        [(why, peers)] = metrics["routes"].items()
        assert why.startswith("shm chosen:") and a in peers
        # The same once more, as Dask's own metrics are.
        assert set(metrics["incoming"]) <= {"shm"}


@only_thalweg
def test_the_transports_can_be_chosen():
    with (
        dask.config.set({"distributed.comm.thalweg.transports": ["tcp"]}),
        local_cluster() as cluster,
        Client(cluster) as client,
    ):
        move(client, 5_000_000)

        def links():
            found = set()
            for worker in client.scheduler_info()["workers"].values():
                for counts in worker["metrics"]["thalweg"]["peers"].values():
                    found |= set(counts)
            return found

        wait_for(links)
        assert links() == {"tcp"}


@in_loop(timeout=50)
async def test_everything_in_one_loop():
    async with local_cluster(processes=False, asynchronous=True) as cluster:
        async with Client(cluster, asynchronous=True) as client:
            futures = client.map(lambda i: i * 2, range(200))
            assert sum(await client.gather(futures)) == 39800
            a, b = list(cluster.scheduler.workers)
            x = client.submit(ones, 20_000_000, workers=a)
            assert await client.submit(total, x, workers=b) == 20_000_000


def test_an_adaptive_cluster():
    with local_cluster(0) as cluster, Client(cluster) as client:
        cluster.adapt(minimum=0, maximum=2, interval="100ms", wait_count=2)
        assert client.submit(total, ones(1000)).result(timeout=40) == 1000
        wait_for(lambda: not cluster.scheduler.workers)
        assert client.submit(total, ones(2000)).result(timeout=40) == 2000


def test_scaling_up_and_down():
    with local_cluster(1) as cluster, Client(cluster) as client:
        cluster.scale(3)
        client.wait_for_workers(3, timeout=40)
        assert len(set(client.run(os.getpid).values())) == 3
        cluster.scale(1)
        wait_for(lambda: len(cluster.scheduler.workers) == 1)
        assert client.submit(total, ones(10)).result() == 10


def test_several_clusters_in_one_process():
    with (
        local_cluster(processes=False) as one,
        local_cluster(processes=False) as two,
        Client(one) as first,
        Client(two, set_as_default=False) as second,
        Client(one.scheduler_address, set_as_default=False) as third,
    ):
        assert one.scheduler_address != two.scheduler_address
        for client in (first, second, third):
            move(client, 1_000_000)


@needs_ipv6
@pytest.mark.parametrize("processes", [True, False], ids=["processes", "threads"])
def test_ipv6(processes):
    with local_cluster(processes=processes, host="[::1]") as cluster, Client(cluster) as client:
        for address in [cluster.scheduler_address, *workers_of(client)]:
            assert address.startswith(f"{PROTOCOL}://[::1]:")
        move(client, 1_000_000)


def test_a_client_by_address_and_from_a_thread():
    with local_cluster(processes=False) as cluster:
        for _ in range(3):
            with Client(cluster.scheduler_address, timeout=20) as client:
                assert client.submit(total, ones(100), pure=False).result() == 100


def test_nobody_listens():
    start = time.monotonic()
    with pytest.raises(OSError, match="Timed out trying to connect"):
        Client(f"{PROTOCOL}://127.0.0.1:1", timeout=0.5)
    assert time.monotonic() - start < 10


@in_loop(timeout=50)
async def test_a_range_of_ports():
    """Workers try one port after the other, and tell by the error which are taken."""
    async with Scheduler(protocol=PROTOCOL, host="127.0.0.1", port=0, dashboard=False) as s:
        first = int(s.address.rsplit(":", 1)[1])
        ports = f"{first}:{first + 5}"
        async with Worker(s.address, host="127.0.0.1", port=ports, dashboard=False) as a:
            async with Worker(s.address, host="127.0.0.1", port=ports, dashboard=False) as b:
                assert a.address != b.address
                assert first < a.port <= first + 5 and first < b.port <= first + 5


@only_thalweg
@pytest.mark.parametrize("who", ["cluster", "client"])
def test_encryption_is_refused(who):
    security = Security(
        require_encryption=True,
    )
    if who == "cluster":
        with pytest.raises(RuntimeError) as caught:
            local_cluster(processes=False, security=security)
        error = caught.value
        texts = []
        while error is not None:
            texts.append(str(error))
            error = error.__cause__
        assert any("thalweg cannot encrypt yet" in text for text in texts), texts
    else:
        with local_cluster(1, processes=False) as cluster:
            with pytest.raises(RuntimeError, match="thalweg cannot encrypt yet"):
                Client(cluster.scheduler_address, security=security, timeout=5)


# Programs


# A worker that is told to close while it connects for a heartbeat says so, whatever the protocol.
LATE_HEARTBEAT = "Failed to communicate with scheduler during heartbeat."


@pytest.mark.parametrize("host", [None, "127.0.0.1", "0.0.0.0"])
@pytest.mark.parametrize("nanny", [True, False], ids=["nanny", "no-nanny"])
def test_the_command_line(host, nanny):
    options = [] if host is None else ["--host", host]
    scheduler, address = scheduler_program("--host", "127.0.0.1")
    with scheduler:
        flags = ["--nanny" if nanny else "--no-nanny", "--protocol", PROTOCOL, *options]
        with worker_program(address, *flags) as a, worker_program(address, *flags) as b:
            with Client(address) as client:
                client.wait_for_workers(2, timeout=40)
                for worker in workers_of(client):
                    # Reachable, and not a wildcard.
                    assert worker.startswith(f"{PROTOCOL}://")
                    host_of_worker = get_address_host(worker)
                    assert host_of_worker not in ("0.0.0.0", "::", "")
                    if host != "0.0.0.0":
                        assert host_of_worker == "127.0.0.1"
                move(client, 2_000_000)
                client.shutdown()
            assert a.wait(30) == 0 and b.wait(30) == 0
        assert scheduler.wait(30) == 0
    # Nannies complain of their queues at the end, whatever the protocol.
    for program in (scheduler,) if nanny else (scheduler, a, b):
        lines = program.output.splitlines()
        errors = [x for x in lines if " - ERROR - " in x and not x.endswith(LATE_HEARTBEAT)]
        assert not errors, program.output


def test_the_command_line_without_any_host():
    scheduler, address = scheduler_program()
    with scheduler, worker_program(address) as worker:
        host = get_address_host(address)
        assert address.startswith(f"{PROTOCOL}://") and host not in ("0.0.0.0", "::", "")
        with Client(address) as client:
            client.wait_for_workers(1, timeout=40)
            [found] = workers_of(client)
            assert get_address_host(found) == host
            assert client.submit(total, ones(1000)).result() == 1000
        assert worker.process.poll() is None


@only_thalweg
def test_the_command_line_refuses_encryption():
    env = {"DASK_DISTRIBUTED__COMM__REQUIRE_ENCRYPTION": "True"}
    with Program(
        "-m", "distributed.cli.dask_scheduler", "--protocol", "thalweg", "--no-dashboard",
        "--port", "0", env=env,
    ) as program:
        assert program.wait(40) != 0
        assert "thalweg cannot encrypt yet" in program.output


SILENT = """
    import sys
    from distributed import Client, LocalCluster

    if __name__ == "__main__":
        with LocalCluster(
            protocol=sys.argv[1], n_workers=2, threads_per_worker=1, dashboard_address=None,
            processes=sys.argv[2] == "processes",
        ) as cluster:
            with Client(cluster) as client:
                assert client.submit(sum, [1, 2, 3]).result() == 6
                x = client.submit(bytes, 10_000_000, workers=0)
                assert client.submit(len, x, workers=1).result() == 10_000_000
"""

CARELESS = """
    import sys
    from distributed import Client, LocalCluster

    if __name__ == "__main__":
        cluster = LocalCluster(
            protocol=sys.argv[1], n_workers=2, threads_per_worker=1, dashboard_address=None,
            processes=sys.argv[2] == "processes",
        )
        client = Client(cluster)
        assert client.submit(sum, [1, 2, 3]).result() == 6
"""


@pytest.mark.parametrize("processes", ["processes", "threads"])
@pytest.mark.parametrize("script", [SILENT, CARELESS], ids=["closes", "just ends"])
def test_a_program_ends_in_silence(tmp_path, script, processes):
    path = tmp_path / "script.py"
    path.write_text(textwrap.dedent(script))
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-X", "dev", "-W", "ignore::DeprecationWarning", path, PROTOCOL, processes],
        capture_output=True,
        text=True,
        timeout=50,
    )
    noise = [
        line
        for line in (done.stdout + done.stderr).splitlines()
        # What a development build of Python says of Dask itself.
        if "ResourceWarning" not in line
    ]
    assert done.returncode == 0, done.stderr
    if PROTOCOL == "thalweg":
        assert not any("thalweg" in line or "Traceback" in line for line in noise), noise
    assert time.monotonic() - start < 40


# Members that are lost


def test_a_worker_is_killed_while_it_sends():
    """What it had is computed again, by a worker that its nanny has started anew."""
    size = 300_000_000
    with local_cluster(2, memory_limit="4GB") as cluster, Client(cluster) as client:
        a, b = workers_of(client)
        pid = pid_of(client, a)
        x = client.submit(ones, size, workers=[a], allow_other_workers=True, key="x")
        wait(x, timeout=30)
        y = client.submit(total, x, workers=[b], key="y")
        # While B fetches.
        wait_for(
            lambda: getattr(cluster.scheduler.tasks.get("y"), "state", None) == "processing",
            interval=0.001,
        )
        time.sleep(0.02)
        os.kill(pid, signal.SIGKILL)
        assert y.result(timeout=50) == size
        wait_for(lambda: len(cluster.scheduler.workers) == 2)


def test_a_worker_is_killed_again_and_again_while_all_exchange():
    with local_cluster(3) as cluster, Client(cluster) as client, dask.config.set(
        {"distributed.scheduler.allowed-failures": 20}
    ):
        cluster.scheduler.allowed_failures = 20
        layers = [client.submit(ones, 2_000_000, pure=False) for _ in range(12)]
        for _ in range(4):
            layers = [
                client.submit(lambda x, y: x + y - y, layers[i], layers[i - 5], pure=False)
                for i in range(len(layers))
            ]
        for _ in range(2):
            address = wait_for(lambda: next(iter(cluster.scheduler.workers), None))
            try:
                os.kill(pid_of(client, address), signal.SIGKILL)
            except (OSError, KeyError, ValueError):
                pass
            time.sleep(0.4)
        sums = client.gather(client.map(total, layers))
        assert sums == [2_000_000] * 12


def test_a_nanny_restarts_its_worker():
    with local_cluster(1) as cluster, Client(cluster) as client:
        [address] = workers_of(client)
        pid = pid_of(client, address)
        os.kill(pid, signal.SIGKILL)
        wait_for(lambda: address not in cluster.scheduler.workers)
        client.wait_for_workers(1, timeout=30)
        assert client.submit(os.getpid, pure=False).result(timeout=30) != pid
        client.restart(timeout=40)
        assert client.submit(total, ones(5)).result(timeout=30) == 5


def test_workers_are_restarted_one_by_one():
    with local_cluster(2) as cluster, Client(cluster) as client:
        before = client.run(os.getpid)
        client.restart_workers(workers=list(before), timeout=40)
        client.wait_for_workers(2, timeout=30)
        assert not set(client.run(os.getpid).values()) & set(before.values())


def test_the_scheduler_is_killed():
    """Clients are told, and workers end by themselves."""
    scheduler, address = scheduler_program("--host", "127.0.0.1")
    with scheduler:
        with worker_program(address, "--nanny") as a, worker_program(address, "--no-nanny") as b:
            client = Client(address, timeout=20)
            try:
                client.wait_for_workers(2, timeout=40)
                future = client.submit(time.sleep, 100)
                wait_for(lambda: future.status == "pending")
                scheduler.process.kill()
                wait_for(lambda: future.status in ("cancelled", "lost"), timeout=30)
                assert a.wait(40) is not None and b.wait(40) is not None
            finally:
                client.close(timeout=2)


def test_a_worker_is_stopped_for_a_while():
    """A process that does not run is slow, not dead."""
    with local_cluster(2) as cluster, Client(cluster) as client:
        a, b = workers_of(client)
        pid = pid_of(client, a)
        x = client.submit(ones, 50_000_000, workers=a)
        wait(x, timeout=20)
        os.kill(pid, signal.SIGSTOP)
        try:
            y = client.submit(total, x, workers=b)
            time.sleep(3)
            assert y.status == "pending"
        finally:
            os.kill(pid, signal.SIGCONT)
        assert y.result(timeout=30) == 50_000_000
        assert set(cluster.scheduler.workers) == {a, b}


def hold_the_gil(seconds):
    # One call into C that never lets go: a regular expression that backtracks.
    import re

    end = time.monotonic() + seconds
    while time.monotonic() < end:
        re.match(r"(a+)+$", "a" * 21 + "b")
    return seconds


def test_a_worker_that_holds_the_gil():
    with local_cluster(2) as cluster, Client(cluster) as client:
        a, b = workers_of(client)
        x = client.submit(ones, 5_000_000, workers=a)
        wait(x, timeout=20)
        busy = client.submit(hold_the_gil, 3, workers=a)
        assert client.submit(total, x, workers=b).result(timeout=40) == 5_000_000
        assert busy.result(timeout=40) == 3


def test_a_worker_retires():
    with local_cluster(2) as cluster, Client(cluster) as client:
        a, b = workers_of(client)
        data = client.map(ones, range(1_000_000, 1_000_010), workers=a)
        wait(data, timeout=30)
        client.retire_workers([a])
        wait_for(lambda: list(cluster.scheduler.workers) == [b] or a not in cluster.scheduler.workers)
        sums = client.gather(client.map(total, data))
        assert sums == list(range(1_000_000, 1_000_010))


def test_spilling(tmp_path):
    """More data than memory: received arrays go to the disk and come back."""
    size = 10_000_000
    with (
        dask.config.set({"temporary-directory": str(tmp_path)}),
        local_cluster(2, memory_limit="500MB") as cluster,
        Client(cluster) as client,
    ):
        a, b = workers_of(client)
        data = [client.submit(np.full, size, i, "u1", workers=a, pure=False) for i in range(40)]
        copies = [
            client.submit(lambda x: x + 1, x, workers=b, pure=False) for x in data
        ]
        sums = client.gather([client.submit(total, x, workers=a, pure=False) for x in copies])
        assert sums == [(i + 1) * size for i in range(40)]

        def spilled():
            workers = cluster.scheduler.workers.values()
            return sum(w.metrics["spilled_bytes"]["disk"] for w in workers)

        # What a worker has spilled comes with its next heartbeat.
        client.sync(until, lambda: spilled() > 0)


# Many at once


CROWD = """
    import asyncio, sys
    from distributed import Worker

    async def main(address, count):
        sys.stdin.readline()
        workers = await asyncio.gather(
            *(
                Worker(address, nthreads=1, memory_limit=0, dashboard=False, death_timeout=100)
                for _ in range(count)
            )
        )
        print("joined", len(workers), flush=True)
        await asyncio.gather(*(worker.finished() for worker in workers))

    asyncio.run(main(sys.argv[1], int(sys.argv[2])))
"""


@pytest.mark.limit(150)
def test_a_hundred_workers_connect_at_once(tmp_path):
    path = tmp_path / "crowd.py"
    path.write_text(textwrap.dedent(CROWD))
    processes = []
    with local_cluster(0, processes=False) as cluster, Client(cluster) as client:
        try:
            for _ in range(4):
                words = [sys.executable, str(path), cluster.scheduler_address, "25"]
                processes.append(
                    subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
                )
            for process in processes:
                process.stdin.write("\n")
                process.stdin.flush()
            client.wait_for_workers(100, timeout=100)
            for process in processes:
                assert process.stdout.readline() == "joined 25\n"
            # And everybody talks to everybody.
            parts = client.map(bytes, range(1000, 1100))
            wait(parts, timeout=60)
            sums = client.submit(lambda *xs: sum(map(len, xs)), *parts)
            assert sums.result(timeout=60) == sum(range(1000, 1100))
        finally:
            cluster.close()
            for process in processes:
                try:
                    process.communicate(timeout=20)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.communicate()
                    raise


@in_loop(timeout=50)
async def test_many_clients_at_once():
    async with local_cluster(1, processes=False, asynchronous=True) as cluster:

        async def one(i):
            async with Client(
                cluster.scheduler_address, asynchronous=True, set_as_default=False
            ) as client:
                return await client.submit(lambda x: x + 1, i, pure=False)

        assert await asyncio.gather(*map(one, range(40))) == list(range(1, 41))


@in_loop(timeout=50)
async def test_servers_come_and_go():
    async with Scheduler(protocol=PROTOCOL, host="127.0.0.1", port=0, dashboard=False) as s:
        for _ in range(5):
            async with Worker(s.address, dashboard=False) as worker:
                await until(lambda: worker.address in s.workers)
            await until(lambda: not s.workers)
        async with Nanny(s.address, nthreads=1, dashboard=False) as nanny:
            await until(lambda: nanny.worker_address in s.workers)


def test_no_descriptors_leak():
    """A cluster in this process that is closed has closed what it had opened."""
    process = psutil.Process()

    def once():
        with local_cluster(2, processes=False) as cluster, Client(cluster) as client:
            move(client, 1_000_000)

    once()
    before = process.num_fds()
    for _ in range(3):
        once()
    wait_for(lambda: process.num_fds() <= before + 2, timeout=10)
