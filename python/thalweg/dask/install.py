"""What a server gets by listening on ``thalweg://``: the metric of workers, the page of schedulers.

So nothing need be configured or preloaded.
"""

from __future__ import annotations

import logging
from typing import Any

from . import traffic

logger = logging.getLogger("distributed.comm.thalweg")


def for_server(server: Any) -> None:
    # Not at the top: Dask's registry loads backends while it is being imported itself.
    from distributed.scheduler import Scheduler
    from distributed.worker import Worker

    if isinstance(server, Worker):
        server.metrics.setdefault(traffic.METRIC, traffic.metric)
    elif isinstance(server, Scheduler):
        try:
            from . import dashboard
        except ImportError as error:
            logger.debug("No page about thalweg on the dashboard: %s", error)
            return
        try:
            dashboard.add_to(server)
        except Exception:
            # A dashboard is no reason not to start.
            logger.warning("No page about thalweg on the dashboard", exc_info=True)
