"""The command line of all programs."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from . import channels, remote
from .units import parse_size

T = TypeVar("T")

#: Options that a listener hears from the connecting program.
_SAID_BY_THE_CONNECTOR = (
    "backend", "transport", "size", "frames", "iters", "warmup", "spin_us", "single_copy",
    "repeat", "json", "plot", "window",
)


def _reader(read: Callable[[str], T]) -> Callable[[str], T]:
    """What it says about a wrong value reaches the user."""

    def checked(text: str) -> T:
        try:
            return read(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return checked


def _list(read: Callable[[str], T]) -> Callable[[str], list[T]]:
    return _reader(lambda text: list(dict.fromkeys(read(part.strip()) for part in text.split(","))))


def _one_of(names: Sequence[str], what: str) -> Callable[[str], str]:
    def read(text: str) -> str:
        if text not in names:
            raise ValueError(f"{text!r} is no {what}; there are {', '.join(names)}")
        return text

    return read


def _count(smallest: int, largest: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        if not (text.isascii() and text.isdigit() and smallest <= int(text) <= largest):
            raise ValueError(f"{text!r} is not a whole number from {smallest} to {largest}")
        return int(text)

    return read


def _frames(text: str) -> list[int]:
    return [parse_size(part) for part in text.split(",")]


def _pins(text: str) -> tuple[int, int]:
    here, comma, peer = text.partition(",")
    if not (comma and here.strip().isdigit() and peer.strip().isdigit()):
        raise ValueError(f"{text!r} is not two CPU numbers; write 0,1")
    return int(here), int(peer)


def _scale(text: str) -> float:
    try:
        scale = float(text)
    except ValueError:
        scale = 0.0
    if not 0.001 <= scale <= 100:
        raise ValueError(f"{text!r} is not a number from 0.001 to 100")
    return scale


def _protocol(text: str) -> str:
    if not text.isidentifier():
        raise ValueError(f"{text!r} is no name of a protocol")
    return text


def _links(text: str) -> str:
    names = ("auto", "shm", "tcp", "ucx", "verbs")
    for name in text.split("+"):
        _one_of(names, "link")(name)
        if name == "auto" and text != "auto":
            raise ValueError(f"{text!r}: auto stands alone")
    return text


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="python -m thalweg.bench",
        description="Measures thalweg from Python, beside what else Python has.",
        allow_abbrev=False,
    )
    programs = top.add_subparsers(dest="program", required=True, metavar="PROGRAM")
    for name, text in (
        ("pingpong", "latency of messages between two processes: half a round trip"),
        ("bandwidth", "bandwidth and message rate of a one-way stream, its final acknowledgement "
         "included; 1 GB is 10⁹ bytes"),
    ):
        _messages(programs.add_parser(
            name, help=text, description=text.capitalize() + ".", allow_abbrev=False
        ))
    text = "what users of Dask wait for, over each protocol in turn"
    _dask(programs.add_parser(
        "dask", help=text, description=text.capitalize() + ".", allow_abbrev=False
    ))
    return top


def _messages(options: argparse.ArgumentParser) -> None:
    add: Any = options.add_argument
    add("--backend", metavar="NAME", type=_list(_one_of(channels.NAMES, "backend")),
        help="thalweg, asyncio, tornado, ucxx; several with commas. Ratios are to the first one "
        "that is not thalweg [thalweg,asyncio]")
    add("--transport", metavar="LINK", type=_list(_links),
        help="links that thalweg may use: auto, shm, tcp, ucx; shm+tcp for a choice; several with "
        "commas [auto]")
    shape = options.add_mutually_exclusive_group()
    shape.add_argument(
        "--size", metavar="BYTES", type=_list(parse_size),
        help="bytes in a message, several with commas: 8,64KiB,1MiB,10MB (KiB = 1024, kB = 1000)")
    shape.add_argument(
        "--frames", metavar="BYTES", type=_reader(_frames),
        help="the frames of a message in bytes, for instance 100,165,620000, instead of --size; "
        "other backends send the same bytes in one")
    add("--iters", metavar="N", type=_reader(_count(1, 10_000_000)),
        help="round trips, or messages of a stream, to measure [as many as take a second or less]")
    add("--warmup", metavar="N", type=_reader(_count(0, 1_000_000)),
        help="messages sent before measuring; every byte of them is verified")
    add("--spin-us", metavar="N", type=_list(_count(0, 1_000_000)),
        help="how long an operation of thalweg's polls before it sleeps, in microseconds; it holds "
        "the event loop meanwhile; several with commas [0]")
    add("--single-copy", metavar="on|off", type=_reader(_one_of(("on", "off"), "such choice")),
        help="whether a link may read the peer's memory (process_vm_readv) "
        "[as THALWEG_SINGLE_COPY says, or on]")
    if options.prog.endswith("bandwidth"):
        add("--window", metavar="N", type=_reader(_count(1, 65536)),
            help="sends begun and not ended [64 up to 64 KiB, 4 above]; asyncio's streams have "
            "their own measure")
    add("--pin", metavar="A,B", type=_reader(_pins),
        help="the CPUs for the measuring process and for its peer [two that this process may use]; "
        "with --connect the first counts, with --listen the second")
    add("--repeat", metavar="N", type=_reader(_count(1, 1000)),
        help="measure everything this many times, in turn (A B A B), and report medians [1]")
    _output(options)
    place = options.add_mutually_exclusive_group()
    place.add_argument(
        "--listen", metavar="ADDR", type=_reader(remote.parse_address),
        help="be the far side on this machine, until interrupted; the connecting side says what is "
        "measured. Only in a network you trust")
    place.add_argument(
        "--connect", metavar="ADDR", type=_reader(remote.parse_address),
        help="measure against a program started with --listen, for instance "
        "thalweg://10.0.0.2:7000")
    add("--once", action="store_true",
        help="with --listen: end after the first connecting program has gone")


def _dask(options: argparse.ArgumentParser) -> None:
    from .cluster import STEPS

    add: Any = options.add_argument
    add("--protocol", metavar="NAME", type=_list(_protocol), default=["thalweg", "tcp"],
        help="protocols of distributed, with commas: thalweg, tcp, ucxx. Ratios are to tcp, or "
        "else to the first [thalweg,tcp]")
    add("--workers", metavar="N", type=_reader(_count(2, 64)), default=2,
        help="processes with one thread each, at least 2 [2]")
    add("--only", metavar="STEP", type=_list(_one_of(list(STEPS), "step")), default=list(STEPS),
        help=f"some of the steps: {', '.join(STEPS)}")
    add("--scale", metavar="X", type=_reader(_scale), default=1.0,
        help="multiplies how much is moved and done [1]")
    add("--repeat", metavar="N", type=_reader(_count(1, 100)), default=3,
        help="measure everything this many times, in turn, each with a cluster of its own, and "
        "report medians [3]")
    add("--profile", action="store_true",
        help="also say where the time goes: CPU of comm, serialisation and the rest of Dask in each "
        "process, and how long Dask's batched streams hold messages back. Costs a little of it")
    _output(options)


def _output(options: argparse.ArgumentParser) -> None:
    options.add_argument(
        "--json", metavar="FILE", nargs="?", const="-",
        help="write one JSON object a line into this file; - for standard output, on which nothing "
        "else is then written [-]")
    options.add_argument(
        "--plot", metavar="FILE", help="draw the result into this .png, .svg or .pdf file "
        "(needs matplotlib)")


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    top = parser()
    options = top.parse_args(arguments)
    if options.program == "dask":
        return options
    if options.once and options.listen is None:
        top.error("--once needs --listen")
    if options.listen is not None:
        for name in _SAID_BY_THE_CONNECTOR:
            if getattr(options, name, None) is not None:
                top.error(f"--{name.replace('_', '-')} is for the side with --connect")
    return options
