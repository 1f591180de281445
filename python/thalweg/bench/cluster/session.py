"""One cluster and its client: starts it, takes the steps, says what each took.

Reads its duty from standard input and writes lines of JSON to standard output; its parent bounds
its time.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import dask
from distributed import Client

from .. import offspring
from ..errors import BenchError
from ..words import Voice
from . import profile, steps


def main() -> int:
    say = Voice().say
    duty = json.loads(sys.stdin.readline())
    try:
        with cluster(duty) as context:
            for name in duty["steps"]:
                say(begin=name)
                context.profiles.clear()
                value, details = steps.BY_NAME[name](context)
                # The first time was for nothing.
                taken = context.profiles[1:]
                say(step=name, value=value, details=details,
                    profile=profile.mean(taken) if taken else None)
                if (recorded := details.get("recorded_s")) is not None:
                    say(step="transfer-recorded", value=recorded, details={})
            if route := steps.route(context):
                say(route=route)
            say(end=True)
    except BenchError as error:
        say(error=str(error))
        return 1
    except Exception as error:
        text = " ".join(str(error).split())[:300]
        say(error=f"{type(error).__name__}: {text}")
        return 1
    return 0


@contextlib.contextmanager
def cluster(duty: dict[str, Any]) -> Iterator[steps.Context]:
    """A scheduler, workers and a client, all ended again."""
    folder, protocol = duty["folder"], duty["protocol"]
    preload = ["--preload", "thalweg.bench.cluster.account"] if duty["profile"] else []
    scheduler_file = os.path.join(folder, "scheduler.json")
    with contextlib.ExitStack() as stack:
        scheduler = stack.enter_context(_program(
            folder, "scheduler", "distributed.cli.dask_scheduler", "--protocol", protocol,
            "--host", "127.0.0.1", "--port", "0", "--no-dashboard",
            "--scheduler-file", scheduler_file, *preload,
        ))
        address = _address(scheduler, scheduler_file, folder)
        workers = [
            stack.enter_context(_program(
                folder, f"worker-{number}", "distributed.cli.dask_worker", address,
                "--protocol", protocol, "--host", "127.0.0.1", "--no-dashboard", "--no-nanny",
                "--nthreads", "1", "--memory-limit", "0", "--name", str(number),
                "--local-directory", folder, *preload,
            ))
            for number in range(duty["workers"])
        ]
        client = stack.enter_context(Client(address, timeout=30))
        client.wait_for_workers(duty["workers"], timeout=60)
        if duty["profile"]:
            profile.begin(client)
        yield steps.Context(
            client=client,
            workers=sorted(client.scheduler_info(n_workers=-1)["workers"]),
            scheduler_pid=scheduler.pid,
            worker_pids=[worker.pid for worker in workers],
            scale=duty["scale"],
            profiled=duty["profile"],
        )


@contextlib.contextmanager
def _program(folder: str, name: str, module: str, *words: str) -> Iterator[subprocess.Popen[bytes]]:
    environ = dict(os.environ)
    # What a nanny would set.
    for config in ("pre-spawn-environ", "environ"):
        for key, value in dask.config.get(f"distributed.nanny.{config}", {}).items():
            environ.setdefault(key, str(value))
    with open(os.path.join(folder, f"{name}.log"), "wb") as log:
        process = subprocess.Popen(
            offspring.command(module, *words), stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            env=environ,
        )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _address(scheduler: subprocess.Popen[bytes], file: str, folder: str) -> str:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and scheduler.poll() is None:
        with contextlib.suppress(OSError, ValueError, KeyError):
            with open(file) as text:
                address: str = json.load(text)["address"]
                return address
        time.sleep(0.02)
    with open(os.path.join(folder, "scheduler.log"), errors="replace") as log:
        lines = log.read().strip().splitlines() or ["it said nothing"]
    raise BenchError(f"the scheduler does not start: {lines[-1]}")


if __name__ == "__main__":
    sys.exit(main())
