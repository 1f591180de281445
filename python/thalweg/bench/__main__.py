"""``python -m thalweg.bench``"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any, TextIO

from . import cli, measure, pair, pins, plot, remote, table
from .case import Case
from .errors import BenchError

_SIZES = {"pingpong": [8, 64 << 10, 1 << 20], "bandwidth": [8, 64 << 10, 1 << 20, 10**7]}
_SMALL_BYTES = 64 << 10


def main(arguments: Sequence[str] | None = None) -> int:
    options = cli.parse(sys.argv[1:] if arguments is None else arguments)
    try:
        return _dask(options) if options.program == "dask" else _messages(options)
    except BenchError as error:
        print(f"thalweg.bench: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nthalweg.bench: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Whoever read the output has enough. Python would complain at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _messages(options: argparse.Namespace) -> int:
    if options.pin is not None:
        pins.check(options.pin)
    cores = options.pin or pins.default_pair()
    if options.listen is not None:
        host, port = options.listen
        remote.listen(host, port, cores[1] if cores else None, options.once)
        return 0
    with _output(options) as json_file:
        cases = _cases(options)
        repeat = options.repeat or 1
        if options.connect is not None:
            connector = remote.Connector(*options.connect)
            with contextlib.closing(connector):
                here = cores[0] if cores else None
                results = measure.run(cases, repeat, lambda case: connector.measure(case, here))
        else:
            results = measure.run(cases, repeat, lambda case: pair.measure_here(case, cores))
        for line in results.left_out:
            print(f"thalweg.bench: left out: {line}", file=sys.stderr)
        if not results.rows:
            raise BenchError("nothing could be measured")
        _write_json(json_file, results.rows)
        if json_file is not sys.stdout:
            print(table.render(results.rows))
            if routes := table.routes(results.rows):
                print(routes)
        if options.plot:
            plot.messages(results.rows, options.plot)
    return 0


def _cases(options: argparse.Namespace) -> list[Case]:
    program = options.program
    shapes = [options.frames] if options.frames else [[s] for s in options.size or _SIZES[program]]
    cases = []
    for shape in shapes:
        for backend in options.backend or ["thalweg", "asyncio"]:
            own = backend == "thalweg"
            for transport in (options.transport or ["auto"]) if own else ["-"]:
                for spin_us in (options.spin_us or [0]) if own else [0]:
                    cases.append(_case(options, backend, transport, spin_us, tuple(shape)))
    return cases


def _case(
    options: argparse.Namespace, backend: str, transport: str, spin_us: int, frames: tuple[int, ...]
) -> Case:
    size_bytes = sum(frames)
    # About what streams take; UCXX is slower by far where cores are shared.
    message_s = (25e-6 + size_bytes / 1.5e9) * (8 if backend == "ucxx" else 1)
    if options.program == "pingpong":
        iters, window = int(1 / (2 * message_s)), 1
    else:
        iters = int(1 / message_s)
        window = options.window or (64 if size_bytes <= _SMALL_BYTES else 4)
    iters = options.iters or max(10, iters)
    warmup = min(500, max(3, iters // 10)) if options.warmup is None else options.warmup
    return Case(
        program=options.program,
        backend=backend,
        transport=transport,
        spin_us=spin_us,
        single_copy=None if options.single_copy is None else options.single_copy == "on",
        frames=frames,
        iters=iters,
        warmup=warmup,
        window=window,
    )


def _dask(options: argparse.Namespace) -> int:
    from . import cluster

    with _output(options) as json_file:
        results = cluster.run(options)
        for line in results.left_out:
            print(f"thalweg.bench: left out: {line}", file=sys.stderr)
        if not results.rows:
            raise BenchError("nothing could be measured")
        _write_json(json_file, results.rows)
        if json_file is not sys.stdout:
            print(cluster.render(results.rows))
            if options.profile:
                print(f"\n{cluster.profile.render(results.rows)}")
            for route in results.routes:
                print(f"route: {route}")
        if options.plot:
            plot.steps(results.rows, options.plot)
    return 1 if results.failed else 0


@contextlib.contextmanager
def _output(options: argparse.Namespace) -> Iterator[TextIO | None]:
    """Where JSON goes. What would fail in the end fails here."""
    if options.plot:
        plot.check(options.plot)
    if options.json is None or options.json == "-":
        yield sys.stdout if options.json else None
        return
    try:
        file = open(options.json, "w")
    except OSError as error:
        raise BenchError(f"--json cannot write {options.json!r}: {error.strerror}") from None
    with file:
        yield file


def _write_json(file: TextIO | None, rows: Sequence[dict[str, Any]]) -> None:
    if file is not None:
        for row in rows:
            print(json.dumps(row), file=file)
        file.flush()


if __name__ == "__main__":
    sys.exit(main())
