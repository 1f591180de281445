"""What a server gets by listening on ``thalweg://``: the metric of workers, the page of schedulers.

So nothing need be configured or preloaded.
"""

from __future__ import annotations

from typing import Any

from . import traffic


def for_server(server: Any) -> None:
    from distributed.worker import Worker

    if isinstance(server, Worker):
        server.metrics.setdefault(traffic.METRIC, traffic.metric)
