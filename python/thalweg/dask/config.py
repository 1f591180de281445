"""Settings: Dask's configuration, told to a node.

Owns the defaults under ``distributed.comm.thalweg`` and their meaning. Must not know of comms.
"""

from __future__ import annotations

import pathlib
from typing import Any

import dask.config
import yaml
from dask.utils import parse_bytes, parse_timedelta

PREFIX = "distributed.comm.thalweg."
DEFAULTS = pathlib.Path(__file__).with_name("thalweg.yaml")

#: What a node takes.
SHORTEST_TIMEOUT_S = 0.001
SHORTEST_KEEPALIVE_S = 3.0

#: What Dask itself has to say must fit: who registers, a graph's tasks. ``max-message`` cannot be less.
SMALLEST_MAX_MESSAGE_BYTES = 1 << 20

_BYTES = {
    "message-window": "message_window",
    "node-budget": "node_budget",
    "host-pool": "host_pool",
    "max-message": "max_message",
}


def load_defaults() -> None:
    """Makes the settings known to Dask. What the user has set stays."""
    with DEFAULTS.open() as file:
        dask.config.update_defaults(yaml.safe_load(file))


def get(name: str) -> Any:
    """The setting ``distributed.comm.thalweg.<name>``."""
    return dask.config.get(PREFIX + name, default=None)


def seconds(name: str, value: Any) -> float:
    """A duration out of the setting ``name``."""
    try:
        parsed = parse_timedelta(value, default="seconds")
    except (KeyError, TypeError, ValueError):
        parsed = None
    if parsed is None or parsed < 0:
        raise ValueError(f"{name} is not a duration: {value!r}")
    return float(parsed)


def number_of_bytes(name: str, value: Any) -> int:
    """A size out of the setting ``name``."""
    try:
        parsed = parse_bytes(value)
    except (TypeError, ValueError):
        parsed = -1
    if parsed < 0:
        raise ValueError(f"{name} is not a number of bytes: {value!r}")
    return parsed


def yes_or_no(name: str, value: Any) -> bool:
    """A switch out of the setting ``name``, which the environment may give as a word."""
    words = {"true": True, "yes": True, "on": True, "1": True}
    words |= {"false": False, "no": False, "off": False, "0": False}
    parsed = words.get(str(value).strip().lower())
    if parsed is None:
        raise ValueError(f"{name} is neither true nor false: {value!r}")
    return parsed


def close_timeout() -> float:
    """How long closing goes on before the connection is given up, in seconds."""
    return seconds(PREFIX + "close-timeout", get("close-timeout") or "30s")


def node_arguments() -> dict[str, Any]:
    """What :class:`thalweg.Node` is to be made with, as of now."""
    arguments: dict[str, Any] = {}
    for name, argument in _BYTES.items():
        if (value := get(name)) is not None:
            arguments[argument] = number_of_bytes(PREFIX + name, value)
    if arguments.get("max_message", SMALLEST_MAX_MESSAGE_BYTES) < SMALLEST_MAX_MESSAGE_BYTES:
        raise ValueError(
            f"{PREFIX}max-message: {get('max-message')!r} is too little, "
            f"at least {SMALLEST_MAX_MESSAGE_BYTES} bytes (1 MiB)"
        )
    if (transports := get("transports")) is not None:
        arguments["transports"] = _names(transports)
    for name in ("single-copy", "peer-write"):
        if (value := get(name)) is not None:
            arguments[name.replace("-", "_")] = yes_or_no(PREFIX + name, value)
    if spin := seconds(PREFIX + "spin", get("spin") or 0):
        arguments["spin_us"] = round(spin * 1e6)
    connect = dask.config.get("distributed.comm.timeouts.connect")
    arguments["connect_timeout"] = max(
        seconds("distributed.comm.timeouts.connect", connect), SHORTEST_TIMEOUT_S
    )
    arguments["handshake_timeout"] = arguments["connect_timeout"]
    arguments["close_timeout"] = close_timeout()
    silence = dask.config.get("distributed.comm.timeouts.tcp")
    arguments["keepalive"] = max(
        seconds("distributed.comm.timeouts.tcp", silence), SHORTEST_KEEPALIVE_S
    )
    arguments["backlog"] = int(dask.config.get("distributed.comm.socket-backlog"))
    return arguments


def _names(transports: Any) -> list[str]:
    if isinstance(transports, str):
        transports = transports.replace(",", " ").split()
    return [str(name).strip().lower() for name in transports]
