"""Measuring between two machines.

Owns the conversation between a listener and the program that connects to it: one TCP connection,
lines of JSON, a question (a case) and two answers (a port, then what serving cost) a sample.
"""

from __future__ import annotations

import json
import socket
import sys
import time
from typing import Any

from . import pair
from .case import Case
from .errors import BenchError, Unavailable

_VERSION = 1
_LINE_MAX = 65536
#: How long the other program may take for an answer that needs no measurement.
_PATIENCE_S = 60.0
#: How long a program that is connected may be silent between samples. The first words are due at
#: once.
_SILENCE_S, _FIRST_S = 300.0, 10.0


def parse_address(text: str) -> tuple[str, int]:
    """``thalweg://host:port`` or ``host:port``; IPv6 in brackets."""
    bare = text.removeprefix("thalweg://")
    host, colon, port = bare.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        colon = ""
    if not colon or not host or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise ValueError(f"{text!r} is not an address; write thalweg://10.0.0.2:7000")
    return host, int(port)


class Line:
    """A connection that carries lines of JSON."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        self._heard = b""

    def say(self, **words: Any) -> None:
        self.socket.sendall(json.dumps(words).encode() + b"\n")

    def hear(self, limit_s: float) -> dict[str, Any]:
        """The next words; :class:`EOFError` when there will be none."""
        deadline = time.monotonic() + limit_s
        while b"\n" not in self._heard:
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError
            self.socket.settimeout(left)
            piece = self.socket.recv(4096)
            if not piece:
                raise EOFError
            self._heard += piece
            if len(self._heard) > _LINE_MAX:
                raise BenchError("what it says is no line of words")
        line, _, self._heard = self._heard.partition(b"\n")
        self.socket.settimeout(_PATIENCE_S)
        try:
            words = json.loads(line)
        except ValueError:
            words = None
        if not isinstance(words, dict) or words.get("version") != _VERSION:
            raise BenchError("it speaks something else, or another version")
        return words


class Connector:
    """The measuring program's side."""

    def __init__(self, host: str, port: int) -> None:
        self._host = host
        self._where = f"{host}:{port}"
        try:
            connection = socket.create_connection((host, port), timeout=20)
        except OSError as error:
            raise BenchError(f"cannot connect to {self._where}: {_reason(error)}") from None
        self._line = Line(connection)

    def measure(self, case: Case, cpu: int | None) -> pair.Outcome:
        port = self._ask(case)
        with pair.Side("the measuring process", case, cpu, self._host, port) as client:
            words = pair.hear([client], lambda words: "result" in words, case.limit_s(), case)
            client.finish()
        words.update(self._hear("usage"))
        return pair.outcome(words)

    def _ask(self, case: Case) -> int:
        try:
            self._line.say(version=_VERSION, case=case.to_json())
        except OSError as error:
            raise BenchError(f"the listener at {self._where}: {_reason(error)}") from None
        port = self._hear("port")["port"]
        if type(port) is not int or not 0 < port < 65536:
            raise BenchError(f"the listener at {self._where} names no port")
        return port

    def _hear(self, what: str) -> dict[str, Any]:
        try:
            words = self._line.hear(_PATIENCE_S)
        except EOFError:
            raise BenchError(f"the listener at {self._where} has gone") from None
        except BenchError as error:
            raise BenchError(f"the listener at {self._where}: {error}") from None
        except OSError as error:
            raise BenchError(f"the listener at {self._where}: {_reason(error)}") from None
        if "error" in words:
            kind = Unavailable if words.get("unavailable") else BenchError
            raise kind(f"the listener at {self._where}: {words['error']}")
        if what not in words:
            raise BenchError(f"the listener at {self._where} does not say its {what}")
        return words

    def close(self) -> None:
        self._line.socket.close()


def listen(host: str, port: int, cpu: int | None, once: bool) -> None:
    """Serves one program after the other, until interrupted or, if ``once``, the first has gone."""
    try:
        listener = socket.create_server((host, port), family=_family(host))
    except OSError as error:
        raise BenchError(f"cannot listen at {host}:{port}: {_reason(error)}") from None
    with listener:
        port = listener.getsockname()[1]
        print(f"listening at thalweg://{f'[{host}]' if ':' in host else host}:{port}", flush=True)
        while True:
            connection, peer = listener.accept()
            with connection:
                print(f"serving {peer[0]}", file=sys.stderr, flush=True)
                served = _serve(Line(connection), host, cpu)
            if served and once:
                return


def _serve(line: Line, host: str, cpu: int | None) -> bool:
    """Whether at least one sample was asked for."""
    served = False
    while True:
        try:
            words = line.hear(_SILENCE_S if served else _FIRST_S)
            case = Case.from_json(words.get("case"))
            served = True
            with pair.serving(case, cpu, host) as (side, port):
                line.say(version=_VERSION, port=port)
                words = pair.hear(
                    [side], lambda words: "usage" in words, case.limit_s(), case,
                    stop_on=line.socket,
                )
                side.finish()
            line.say(version=_VERSION, usage=words["usage"])
        except (EOFError, OSError):
            return served
        except BenchError as error:
            print(f"thalweg.bench: {error}", file=sys.stderr, flush=True)
            try:
                line.say(
                    version=_VERSION, error=str(error), unavailable=isinstance(error, Unavailable)
                )
            except OSError:
                return served
            if not isinstance(error, Unavailable):
                return served


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def _reason(error: OSError) -> str:
    return error.strerror or str(error) or type(error).__name__
