"""The programs of ``thalweg.bench``: what they print, and how they fail."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from thalweg.bench import pattern
from thalweg.bench.case import Case
from thalweg.bench.errors import BenchError
from thalweg.bench.remote import parse_address
from thalweg.bench.stats import median, one_way_us
from thalweg.bench.units import parse_size, show_figure, show_size

SHORT = ("--iters", "50", "--warmup", "3")

needs_tornado = pytest.mark.skipif(
    importlib.util.find_spec("tornado") is None, reason="tornado is not installed"
)
needs_distributed = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("distributed", "numpy", "pandas")),
    reason="distributed, numpy and pandas are not all installed",
)
needs_matplotlib = pytest.mark.skipif(
    importlib.util.find_spec("matplotlib") is None, reason="matplotlib is not installed"
)


def run(*words: str, limit_s: float = 100, **env: str) -> subprocess.CompletedProcess[str]:
    with program(*words, **env) as process:
        out, err = process.communicate(timeout=limit_s)
    return subprocess.CompletedProcess(words, process.returncode, out, err)


@contextlib.contextmanager
def program(*words: str, **env: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-m", "thalweg.bench", *words],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, **env},
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        assert process.stdout and process.stderr
        process.stdout.close()
        process.stderr.close()


def rows_of(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def measured(*words: str, **env: str) -> list[dict[str, Any]]:
    done = run(*words, "--json", "-", **env)
    assert done.returncode == 0, done.stderr
    return rows_of(done.stdout)


def failed(*words: str, code: int = 1) -> str:
    done = run(*words)
    assert done.returncode == code, (done.stdout, done.stderr)
    assert "Traceback" not in done.stderr
    assert not done.stdout
    return done.stderr


# What they print


@needs_tornado
def test_pingpong_gives_a_row_for_each_case():
    rows = measured(
        "pingpong", "--backend", "thalweg,asyncio,tornado", "--transport", "shm,tcp",
        "--size", "8,64KiB", "--spin-us", "0,20", "--repeat", "2", *SHORT,
    )
    seen = [(r["backend"], r["transport"], r["spin_us"], r["size_bytes"]) for r in rows]
    assert seen == [
        (backend, transport, spin_us, size)
        for size in (8, 65536)
        for backend, transport, spin_us in [
            ("thalweg", "shm", 0), ("thalweg", "shm", 20),
            ("thalweg", "tcp", 0), ("thalweg", "tcp", 20),
            ("asyncio", "tcp", 0), ("tornado", "tcp", 0),
        ]
    ]
    for row in rows:
        figures = row["half_rtt_us"]
        assert 0 < figures["min"] <= figures["p50"] <= figures["p90"] <= figures["p99"]
        assert figures["p99"] <= figures["max"] and figures["min"] <= figures["mean"]
        assert (row["program"], row["iters"], row["samples"]) == ("pingpong", 50, 2)
        assert row["wake"] == ("spin" if row["spin_us"] else "park")
        assert row["cpu_us_per_message"] > 0
        assert row["baseline"] == "asyncio" and row["ratio"] > 0
        assert (row["row"] == "thalweg") == (row["route"] is not None)
    assert all(row["ratio"] == 1 for row in rows if row["backend"] == "asyncio")


@needs_tornado
def test_bandwidth_gives_a_row_for_each_case():
    rows = measured(
        "bandwidth", "--backend", "tornado,asyncio,thalweg", "--size", "1,1MiB", *SHORT,
    )
    assert [row["backend"] for row in rows] == ["tornado", "asyncio", "thalweg"] * 2
    for row in rows:
        assert row["window"] == (64 if row["size_bytes"] == 1 else 4)
        assert row["messages"] == 50
        bytes_per_s = row["messages_per_s"] * row["size_bytes"]
        assert row["gb_per_s"] == pytest.approx(bytes_per_s / 1e9)
        assert row["seconds"] == pytest.approx(50 / row["messages_per_s"])
        assert row["baseline"] == "tornado"


def test_frames_are_one_message():
    [row] = measured("pingpong", "--backend", "thalweg", "--frames", "100,165,620000", *SHORT)
    assert (row["size_bytes"], row["frames"]) == (620265, 3)
    assert row["baseline"] is None and row["ratio"] is None


def test_without_json_there_is_a_table_and_the_route(tmp_path):
    file = tmp_path / "rows.json"
    done = run("pingpong", "--size", "8", "--json", str(file), *SHORT)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^thalweg +shm +park +8 B .* × asyncio$", done.stdout, re.M), done.stdout
    assert "both processes are on this host" in done.stdout
    assert [row["backend"] for row in rows_of(file.read_text())] == ["thalweg", "asyncio"]


def test_a_backend_that_is_not_there_is_left_out(tmp_path):
    (tmp_path / "ucxx.py").write_text("raise ImportError('No module named ucxx')")
    here = {"PYTHONPATH": str(tmp_path)}
    words = ("pingpong", "--size", "8", "--json", "-", *SHORT)
    done = run(*words, "--backend", "thalweg,ucxx", "--repeat", "2", **here)
    assert done.returncode == 0
    assert [row["backend"] for row in rows_of(done.stdout)] == ["thalweg"]
    why = "thalweg.bench: left out: ucxx cannot be measured here: No module named ucxx\n"
    assert done.stderr == why
    done = run(*words, "--backend", "ucxx", **here)
    assert (done.returncode, done.stderr) == (1, why + "thalweg.bench: nothing could be measured\n")


@needs_matplotlib
@pytest.mark.parametrize("name", ["pingpong", "bandwidth"])
def test_a_plot_is_drawn(name, tmp_path):
    file = tmp_path / "plot.png"
    done = run(name, "--size", "8,64KiB", "--plot", str(file), *SHORT)
    assert done.returncode == 0, done.stderr
    assert file.read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_a_plot_is_refused_before_measuring(tmp_path):
    (tmp_path / "matplotlib.py").write_text("raise ImportError('none here')")
    done = run("pingpong", "--plot", "plot.png", PYTHONPATH=str(tmp_path))
    assert done.returncode == 1
    assert done.stderr == "thalweg.bench: --plot needs matplotlib: pip install matplotlib\n"


# How they fail


@pytest.mark.parametrize(
    "words, message",
    [
        ("", "PROGRAM"),
        ("swim", "invalid choice"),
        ("pingpong --backend pigeon", "'pigeon' is no backend; there are thalweg, asyncio"),
        ("pingpong --transport pigeon", "'pigeon' is no link"),
        ("pingpong --transport auto+shm", "auto stands alone"),
        ("pingpong --size many", "'many' is not a size"),
        ("pingpong --size 0", "not a whole number of bytes"),
        ("pingpong --size 8 --frames 1,2", "not allowed with"),
        ("pingpong --iters 0", "not a whole number from 1"),
        ("pingpong --spin-us -1", "-1"),
        ("pingpong --pin 1", "is not two CPU numbers"),
        ("pingpong --window 3", "unrecognized arguments"),
        ("pingpong --once", "--once needs --listen"),
        ("pingpong --listen nowhere", "is not an address"),
        ("pingpong --listen a:1 --connect b:1", "not allowed with"),
        ("bandwidth --listen a:1 --window 3", "--window is for the side with --connect"),
        ("pingpong --listen a:1 --json", "--json is for the side with --connect"),
        ("dask --only sleep", "'sleep' is no step; there are transfer, shuffle"),
        ("dask --workers 1", "not a whole number from 2"),
        ("dask --scale 0", "is not a number from"),
    ],
)
def test_wrong_options_are_refused(words, message):
    assert message in failed(*words.split(), code=2)


def test_what_cannot_work_is_refused_in_one_line(tmp_path):
    missing = str(tmp_path / "missing" / "file")
    for words, message in [
        (["pingpong", "--pin", "0,4000"], "CPU 4000 may not be used by this process; these may:"),
        (["pingpong", "--json", missing], f"--json cannot write {missing!r}: No such file"),
        (["pingpong", "--transport", "verbs", "--backend", "thalweg", *SHORT], "pingpong thalweg"),
    ]:
        text = failed(*words)
        assert message in text
        assert len(text.splitlines()) == 1, text


def test_a_refused_connection_is_one_line():
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    text = failed("pingpong", "--connect", f"thalweg://127.0.0.1:{port}")
    assert text == f"thalweg.bench: cannot connect to 127.0.0.1:{port}: Connection refused\n"


def children(pid: int) -> list[int]:
    tasks = pathlib.Path(f"/proc/{pid}/task")
    with contextlib.suppress(OSError):
        return [
            int(child)
            for task in tasks.iterdir()
            for child in (task / "children").read_text().split()
        ]
    return []


def until(condition, limit_s=30.0):
    """Waits for a condition that nobody announces, and gives what it gave."""
    deadline = time.monotonic() + limit_s
    while not (found := condition()):
        assert time.monotonic() < deadline, "the condition did not come true"
        time.sleep(0.01)
    return found


def has_cpu_time(pid: int, seconds: float) -> bool:
    try:
        fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return False
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK") >= seconds


def is_gone(pid: int) -> bool:
    try:
        return ") Z" in pathlib.Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return True


LONG = ("pingpong", "--size", "8", "--iters", "10000000", "--warmup", "0")


@contextlib.contextmanager
def in_the_middle(backend: str) -> Iterator[tuple[subprocess.Popen[str], list[int]]]:
    """The program, and its two processes while they measure."""
    with program(*LONG, "--backend", backend) as process:
        sides = until(lambda: len(found := children(process.pid)) == 2 and found)
        until(lambda: all(has_cpu_time(side, 1.0) for side in sides), 60)
        yield process, sides
    until(lambda: all(map(is_gone, sides)))


@pytest.mark.parametrize("backend", ["thalweg", "asyncio"])
@pytest.mark.parametrize("which, name", [(0, "serving"), (1, "measuring")])
def test_a_killed_process_is_named(backend, which, name):
    with in_the_middle(backend) as (process, sides):
        os.kill(sides[which], signal.SIGKILL)
        out, err = process.communicate(timeout=30)
    assert process.returncode == 1 and not out
    assert f"the {name} process was ended by SIGKILL" in err
    assert len(err.splitlines()) == 1, err


@pytest.mark.parametrize("name, code", [("SIGINT", 130), ("SIGTERM", -15), ("SIGKILL", -9)])
def test_nothing_outlives_an_interrupted_program(name, code):
    with in_the_middle("thalweg") as (process, _):
        process.send_signal(getattr(signal, name))
        _, err = process.communicate(timeout=30)
    assert process.returncode == code
    assert err.strip() == ("thalweg.bench: interrupted" if code > 0 else "")


# Two machines


@contextlib.contextmanager
def listening(*words: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    with program("pingpong", "--listen", "127.0.0.1:0", *words) as listener:
        assert listener.stdout
        said = listener.stdout.readline()
        found = re.fullmatch(r"listening at (thalweg://127\.0\.0\.1:\d+)\n", said)
        assert found
        yield listener, found[1]


def test_a_listener_serves_one_program_after_another():
    with listening() as (listener, address):
        for name in ("pingpong", "bandwidth"):
            rows = measured(
                name, "--connect", address, "--size", "8", "--backend", "thalweg,asyncio",
                "--repeat", "2", *SHORT,
            )
            assert [row["backend"] for row in rows] == ["thalweg", "asyncio"]
        listener.send_signal(signal.SIGINT)
        assert listener.wait(20) == 130


def test_a_listener_survives_nonsense_and_ends_after_one_program():
    with listening("--once") as (listener, address):
        host, port = parse_address(address)
        for nonsense in [b"GET / HTTP/1.1\r\n\r\n", b"[]\n", b'{"version":1,"case":{}}\n', b""]:
            with socket.create_connection((host, port), 10) as connection:
                connection.sendall(nonsense)
                if nonsense:
                    assert b"error" in connection.recv(4096)
        assert measured("pingpong", "--connect", address, "--size", "8", *SHORT)
        assert listener.wait(20) == 0


def test_a_listener_is_not_kept_by_a_program_that_was_killed():
    with listening("--once") as (listener, address):
        with program(*LONG, "--backend", "thalweg", "--connect", address) as process:
            serving = until(lambda: children(listener.pid))
            until(lambda: all(has_cpu_time(side, 1.0) for side in serving), 60)
            process.kill()
        assert listener.wait(20) == 0
        until(lambda: all(map(is_gone, serving)))


def test_a_connector_says_who_does_not_answer():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]

        def answer():
            connection, _ = server.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(b"SSH-2.0-OpenSSH_9.0\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        text = failed("pingpong", "--connect", f"127.0.0.1:{port}", "--size", "8", *SHORT)
        thread.join()
    assert f"the listener at 127.0.0.1:{port}: it speaks something else" in text


# Dask


@needs_distributed
def test_all_steps_over_both_protocols(tmp_path):
    json_file, plot_file = tmp_path / "rows.json", tmp_path / "plot.png"
    plot = ["--plot", str(plot_file)] if importlib.util.find_spec("matplotlib") else []
    done = run(
        "dask", "--scale", "0.01", "--repeat", "1", "--json", str(json_file), *plot, limit_s=200
    )
    assert done.returncode == 0, done.stderr
    rows = rows_of(json_file.read_text())
    steps = [
        "transfer", "transfer-recorded", "shuffle", "rechunk", "tree", "sequential", "at-once", "idle",
    ]
    assert [(r["step"], r["protocol"]) for r in rows] == [
        (step, protocol) for step in steps for protocol in ("thalweg", "tcp")
    ]
    for row in rows:
        assert row["program"] == "dask" and row["baseline"] == "tcp"
        assert row["value"] > 0 or row["step"] == "idle"
        assert row["samples"] == [row["value"]]
        assert row["ratio"] is None or row["protocol"] != "tcp" or row["ratio"] == 1
        assert "profile" not in row
    # What Dask's log has of a transfer is a part of what its client waits for.
    values = {(row["step"], row["protocol"]): row["value"] for row in rows}
    for protocol in ("thalweg", "tcp"):
        assert values["transfer-recorded", protocol] < values["transfer", protocol]
    assert "thalweg / tcp" in done.stdout
    assert "route: thalweg: shm chosen" in done.stdout
    if plot:
        assert plot_file.read_bytes().startswith(b"\x89PNG")


@needs_distributed
def test_a_profile_of_both_protocols(tmp_path):
    json_file = tmp_path / "rows.json"
    done = run(
        "dask", "--scale", "0.1", "--repeat", "1", "--only", "sequential", "--profile",
        "--json", str(json_file), limit_s=120,
    )
    assert done.returncode == 0, done.stderr
    rows = rows_of(json_file.read_text())
    assert [row["protocol"] for row in rows] == ["thalweg", "tcp"]
    for row in rows:
        for figures in row["profile"].values():
            cpu = {name: value for name, value in figures.items() if name.endswith("_cpu_s")}
            assert len(cpu) == 5 and all(value >= 0 for value in cpu.values())
            # Messages go through all of these, and nothing is counted twice.
            assert min(cpu["comm_cpu_s"], cpu["serialise_cpu_s"], cpu["dask_cpu_s"]) > 0
            loop_s = sum(cpu.values()) - cpu["threads_cpu_s"]
            assert loop_s + figures["waits_s"] < 1.1 * figures["wall_s"] + 0.1
            assert figures["waits_s"] > 0
        # 50 tasks, one after the other: a batch each, which waits for the last one's interval; some
        # more on a busy machine (62 were seen). Counting twice would make a hundred.
        assert 50 <= row["profile"]["client"]["batches"] < 100
        assert 0 < row["profile"]["client"]["held_s"] < row["value"]
    assert all(word in done.stdout for word in ("comm's share", "scheduler", "workers", "client"))


@needs_distributed
def test_a_protocol_that_is_not_there_is_left_out():
    text = failed("dask", "--protocol", "pigeon")
    assert "left out: pigeon: distributed has no such protocol here" in text
    assert text.endswith("thalweg.bench: nothing could be measured\n")


def descendants(pid: int) -> list[int]:
    found = children(pid)
    return found + [each for child in found for each in descendants(child)]


@needs_distributed
@pytest.mark.parametrize("name, code", [("SIGINT", 130), ("SIGKILL", -9)])
def test_no_cluster_outlives_the_program(name, code):
    with (
        # A program that is killed leaves its files.
        tempfile.TemporaryDirectory() as folder,
        program("dask", "--only", "idle", "--protocol", "thalweg", TMPDIR=folder) as process,
    ):
        # The session, a scheduler and two workers.
        family = until(lambda: len(found := descendants(process.pid)) >= 4 and found, 90)
        process.send_signal(getattr(signal, name))
        process.communicate(timeout=30)
        assert process.returncode == code
    until(lambda: all(map(is_gone, family)))


# The parts


def test_sizes():
    for text, size in [("8", 8), ("64KiB", 65536), ("1.5MiB", 3 << 19), ("10MB", 10**7)]:
        assert parse_size(text) == size
    for text in ["", "KiB", "-1", "0.3", "1.2.3", "8 apples", "9999GiB"]:
        with pytest.raises(ValueError):
            parse_size(text)
    assert [show_size(size) for size in (8, 65536, 10**7, 620265)] == [
        "8 B", "64 KiB", "10 MB", "620265 B",
    ]
    assert [show_figure(value) for value in (0.1689, 1.004, 12.34, 812.6, None)] == [
        "0.169", "1.00", "12.3", "813", "–",
    ]


def test_percentiles_are_by_rank():
    figures = one_way_us([2000 * n for n in range(100, 0, -1)])
    assert figures == {"min": 1, "p50": 50, "p90": 90, "p99": 99, "max": 100, "mean": 50.5}
    assert median([3.0, None, 1.0, 900.0]) == 3
    assert median([]) is None


def test_every_byte_of_a_message_is_verified():
    size = 200_000
    good = pattern.content(size, 5, pattern.OUT)
    pattern.verify([good[:7], memoryview(good)[7:]], size, 5, pattern.OUT)
    for at in (0, 65521, size - 1):
        bad = bytearray(good)
        bad[at] ^= 1
        with pytest.raises(BenchError, match=f"byte {at} "):
            pattern.verify([bad], size, 5, pattern.OUT)
    for got, index, way in [
        (good[:-1], 5, pattern.OUT), (good, 6, pattern.OUT), (good, 5, pattern.BACK),
        (good[4096:] + good[:4096], 5, pattern.OUT),
    ]:
        with pytest.raises(BenchError):
            pattern.verify([got], size, index, way)


def test_a_case_is_what_it_was():
    case = Case("pingpong", "thalweg", "auto", 20, True, (100, 8), 50, 3, 1)
    assert Case.from_json(json.loads(json.dumps(case.to_json()))) == case
    for change in [
        {"iters": 0}, {"frames": []}, {"frames": [-1]}, {"frames": [1 << 40]}, {"iters": "many"},
        {"program": "swim"}, {"more": 1}, {"single_copy": 1}, {"window": 1 << 40},
    ]:
        with pytest.raises(BenchError):
            Case.from_json({**case.to_json(), **change})


def test_addresses():
    assert parse_address("thalweg://10.0.0.2:7000") == ("10.0.0.2", 7000)
    assert parse_address("[::1]:0") == ("::1", 0)
    for text in ["", "host", ":7000", "::1:7000", "host:seven", "host:70000"]:
        with pytest.raises(ValueError):
            parse_address(text)
