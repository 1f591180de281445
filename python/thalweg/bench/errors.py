"""How the programs fail."""

from __future__ import annotations


class BenchError(Exception):
    """Ends the program with this message and without a traceback."""


class Unavailable(BenchError):
    """Cannot be measured here; the rest can."""
