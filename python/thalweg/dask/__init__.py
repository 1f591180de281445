"""``protocol="thalweg"`` for Dask.

Found by Dask through the entry point ``distributed.comm.backends``; nothing needs to be imported.
Settings are under ``distributed.comm.thalweg`` (``thalweg.yaml`` beside this file has them all).
"""

from . import config

# Before the others: they are configured.
config.load_defaults()

from .backend import ThalwegBackend, ThalwegConnector, ThalwegListener  # noqa: E402
from .comm import ThalwegComm  # noqa: E402

__all__ = ["ThalwegBackend", "ThalwegComm", "ThalwegConnector", "ThalwegListener"]
