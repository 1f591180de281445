"""Which way the traffic of a server goes, and how much there is: for ``worker.metrics``.

Owns the counts of comms that have ended and the sum over those that live. Must not know how they
are shown.

Each connection is counted by who opened it, with the bytes of both directions: who was connected
to does not know which server's address the other end belongs to, and nothing is counted twice.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import thalweg

if TYPE_CHECKING:
    from .comm import ThalwegComm

#: In the metrics of workers, and of the scheduler on its page.
METRIC = "thalweg"

#: Peers that a server's metrics name. The busiest ones; the rest is summed up.
PEERS_MAX = 256

#: The sum of those that are not named.
OTHERS = "others"

_COUNTED = {
    "bytes_sent": "message_bytes_sent",
    "bytes_received": "message_bytes_received",
    "messages_sent": "messages_sent",
    "messages_received": "messages_received",
}

Counts = dict[str, Any]

_live: weakref.WeakSet[ThalwegComm] = weakref.WeakSet()
_ended: weakref.WeakKeyDictionary[Any, dict[tuple[str, str], Counts]] = (
    weakref.WeakKeyDictionary()
)


class Traffic:
    """What a comm has to say about its connection."""

    __slots__ = ("_endpoint", "_why", "incoming", "link", "owner", "peer")

    def __init__(self, endpoint: thalweg.Endpoint | None, peer: str, incoming: bool, owner: Any):
        self._endpoint = endpoint
        self.link: str = "" if endpoint is None else endpoint.link
        self.peer = peer
        self.incoming = incoming
        # Of who was connected to. Of who connects Dask says it when the comm is there.
        self.owner = None if owner is None else weakref.ref(owner)
        self._why: str | None = None

    @property
    def why(self) -> str:
        """Why this link, and what spoke against those before it."""
        if self._why is None and self._endpoint is not None:
            self._why = explained(self._endpoint.route()["candidates"])
        return self._why or ""

    def counts(self) -> Counts:
        """What has gone over the connection so far."""
        if self._endpoint is None:
            return {}
        stats = self._endpoint.stats()
        return {name: stats[source] for name, source in _COUNTED.items()}

    def let_go(self) -> None:
        """Dask keeps comms that are closed; an endpoint would keep the whole node."""
        self._endpoint = None


def started(comm: ThalwegComm) -> None:
    """The comm is counted from now on."""
    _live.add(comm)


def ended(comm: ThalwegComm) -> None:
    """The comm's connection has ended: its counts are kept, and it need not be asked again."""
    if comm not in _live:
        return
    _live.discard(comm)
    owner = owner_of(comm)
    if owner is not None and not comm.traffic.incoming:
        _add(_ended.setdefault(owner, {}), comm, open_now=0)
    comm.traffic.let_go()


def owner_of(comm: ThalwegComm) -> Any:
    """The server that a comm belongs to, where Dask says so."""
    owner = comm.traffic.owner
    if owner is None:
        owner = getattr(comm, "_server", None)
    if owner is None and (pool := getattr(comm, "_pool", None)) is not None:
        owner = getattr(pool(), "server", None)
    return owner() if owner is not None else None


def _add(table: dict[tuple[str, str], Counts], comm: ThalwegComm, open_now: int) -> None:
    traffic = comm.traffic
    counts = {"connections": open_now, **traffic.counts()}
    _sum(table, (traffic.peer, traffic.link), counts)


def _sum(table: dict[tuple[str, str], Counts], key: tuple[str, str], counts: Counts) -> None:
    known = table.setdefault(key, dict.fromkeys(counts, 0))
    for name, count in counts.items():
        known[name] += count


def metric(server: Any) -> dict[str, Any]:
    """The traffic of a server, as it is found in ``worker.metrics["thalweg"]``.

    ``peers`` has, for each address and each link that was used to it, the number of open
    ``connections``, and ``bytes_sent``, ``bytes_received``, ``messages_sent`` and
    ``messages_received`` since the server began. ``incoming`` has the number of open connections
    that others have opened, by link. ``routes`` says why a link was chosen, and for which peers.
    """
    table = {key: dict(counts) for key, counts in _ended.get(server, {}).items()}
    incoming: dict[str, int] = {}
    reasons: dict[str, str] = {}
    for comm in list(_live):
        if owner_of(comm) is not server:
            continue
        link = comm.traffic.link
        if comm.traffic.incoming:
            incoming[link] = incoming.get(link, 0) + 1
            continue
        _add(table, comm, open_now=1)
        if comm.traffic.peer not in reasons:
            reasons[comm.traffic.peer] = comm.traffic.why
    table = _bounded(table)
    peers: dict[str, dict[str, Counts]] = {}
    for (peer, link), counts in table.items():
        peers.setdefault(peer, {})[link] = counts
    routes: dict[str, list[str]] = {}
    for peer, text in reasons.items():
        if peer in peers:
            routes.setdefault(text, []).append(peer)
    return {"peers": peers, "incoming": incoming, "routes": routes}


def _bounded(table: dict[tuple[str, str], Counts]) -> dict[tuple[str, str], Counts]:
    if len(table) <= PEERS_MAX:
        return table

    def volume(item: tuple[tuple[str, str], Counts]) -> int:
        return int(item[1]["bytes_sent"] + item[1]["bytes_received"])

    busiest = sorted(table.items(), key=volume, reverse=True)
    named = dict(busiest[: PEERS_MAX - 1])
    for (_, link), counts in busiest[PEERS_MAX - 1 :]:
        _sum(named, (OTHERS, link), counts)
    return named


def explained(candidates: list[dict[str, Any]]) -> str:
    """The candidates of a route up to the one that was chosen, in one line."""
    reasons = []
    for candidate in candidates:
        text = f"{candidate['link']} {candidate['verdict']}: {candidate['reason']}"
        if candidate["verdict"] == "rejected" and candidate.get("fix"):
            text += f" (to change that: {candidate['fix']})"
        reasons.append(text)
        if candidate["verdict"] == "chosen":
            break
    return "; ".join(reasons)
