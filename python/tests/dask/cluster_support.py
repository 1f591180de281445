"""What the tests with whole clusters share: limits of time, and processes that are cleaned up."""

import contextlib
import copy
import os
import pathlib
import queue
import re
import signal
import subprocess
import sys
import threading
import time

import dask.config
import psutil
import pytest

#: THALWEG_TEST_PROTOCOL=tcp shows that a test asks nothing of thalweg that TCP does not do.
PROTOCOL = os.environ.get("THALWEG_TEST_PROTOCOL", "thalweg")

only_thalweg = pytest.mark.skipif(PROTOCOL != "thalweg", reason="is about thalweg itself")

HERE = str(pathlib.Path(__file__).parent)
PACKAGE = pathlib.Path(__file__).parents[2]


@contextlib.contextmanager
def bounded(seconds):
    """Raises in the main thread when the time is over."""

    def late(_signal, _frame):
        raise TimeoutError(f"the test took longer than {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def is_helper(process):
    """Processes of Python's own, which live as long as this one."""
    try:
        words = " ".join(process.cmdline())
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return False
    return "resource_tracker" in words or "forkserver" in words


@contextlib.contextmanager
def settings_as_before():
    """A client that could not connect leaves itself in Dask's configuration."""
    before = copy.deepcopy(dask.config.config)
    yield
    dask.config.config.clear()
    dask.config.config.update(before)


@contextlib.contextmanager
def no_processes_left():
    me = psutil.Process()
    before = set(me.children(recursive=True))
    yield
    left = []
    deadline = time.monotonic() + 15
    while time.monotonic() < deadline:
        left = [p for p in me.children(recursive=True) if p not in before and not is_helper(p)]
        left = [p for p in left if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
        if not left:
            return
        time.sleep(0.05)
    words = [" ".join(p.cmdline()) for p in left]
    for process in left:
        process.kill()
    pytest.fail(f"processes are left: {words}")


def wait_for(condition, timeout=30, interval=0.05):
    """Waits for a condition that nobody announces, and gives what it gave."""
    deadline = time.monotonic() + timeout
    while True:
        if result := condition():
            return result
        if time.monotonic() > deadline:
            raise TimeoutError("the condition did not come true")
        time.sleep(interval)


class Program:
    """A program of this test's own, with its output line by line."""

    def __init__(self, *words, env=None):
        self.process = subprocess.Popen(
            [sys.executable, *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
            # What a task is made of is looked up by the module's name.
            env={**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONPATH": HERE, **(env or {})},
        )
        self.lines = []
        self._new = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self):
        for line in self.process.stdout:
            self.lines.append(line.rstrip())
            self._new.put(line.rstrip())
        self._new.put(None)

    @property
    def output(self):
        return "\n".join(self.lines)

    def expect(self, pattern, timeout=60):
        """The first group of the first line from now on that has the pattern."""
        deadline = time.monotonic() + timeout
        while True:
            try:
                line = self._new.get(timeout=max(0, deadline - time.monotonic()))
            except queue.Empty:
                raise TimeoutError(f"no {pattern!r} in:\n{self.output}") from None
            if line is None:
                raise AssertionError(f"it ended without {pattern!r}:\n{self.output}")
            if found := re.search(pattern, line):
                return found[1] if found.groups() else found[0]

    def wait(self, timeout=60):
        code = self.process.wait(timeout)
        self._reader.join(10)
        return code

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.process.poll() is None:
            family = psutil.Process(self.process.pid).children(recursive=True)
            self.process.terminate()
            try:
                self.process.wait(15)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait(15)
            for child in family:
                with contextlib.suppress(psutil.NoSuchProcess):
                    child.kill()
        self._reader.join(10)
        self.process.stdout.close()


def scheduler_program(*options, protocol=PROTOCOL, env=None):
    """``dask scheduler`` and its address."""
    program = Program(
        "-m", "distributed.cli.dask_scheduler", "--protocol", protocol, "--no-dashboard",
        "--port", "0", *options, env=env,
    )
    return program, program.expect(r"Scheduler at:\s+(\S+)")


def worker_program(address, *options, env=None):
    return Program(
        "-m", "distributed.cli.dask_worker", address, "--no-dashboard", "--nthreads", "1",
        "--memory-limit", "1GB", *options, env=env,
    )
