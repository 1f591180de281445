"""What a process says to the one that started it: lines of JSON, on its standard output."""

from __future__ import annotations

import json
import os
from typing import Any


class Voice:
    """Takes standard output for itself: libraries that print there (UCX does) print to standard
    error from now on."""

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def say(self, **words: Any) -> None:
        self._out.write(json.dumps(words) + "\n")
        self._out.flush()
