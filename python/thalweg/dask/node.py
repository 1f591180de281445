"""The node of the running event loop.

Owns which loop has which node, and who uses it. All comms and listeners of a loop share one node.
It is closed with the last of them, so that a loop which ends leaves no descriptor open.
"""

from __future__ import annotations

import asyncio
import weakref
from typing import Any

import thalweg

from . import config


class LoopNode:
    """A node and the number of its users."""

    def __init__(self) -> None:
        self._node: thalweg.Node | None = thalweg.Node(**config.node_arguments())
        self._users = 0

    @property
    def node(self) -> thalweg.Node:
        """The node, which those who have entered may use."""
        assert self._node is not None
        return self._node

    @property
    def is_closed(self) -> bool:
        return self._node is None or self._node.is_closed

    def enter(self) -> None:
        self._users += 1

    def leave(self) -> None:
        """Closes the node if that was the last user. In the loop, once for each ``enter``."""
        self._users -= 1
        if self._users > 0:
            return
        for loop, known in list(_nodes.items()):
            if known is self:
                del _nodes[loop]
        # Those who left may be kept by somebody, and this with them; not so what it holds.
        node, self._node = self._node, None
        if node is not None and not node.is_closed:
            begin(node.close())


_nodes: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, LoopNode] = (
    weakref.WeakKeyDictionary()
)


def node_here() -> LoopNode:
    """The node of the running loop, made when there is none.

    The settings are those of the configuration at that time.
    """
    loop = asyncio.get_running_loop()
    known = _nodes.get(loop)
    if known is None or known.is_closed:
        # Loops that ended while something was open, and that somebody still holds.
        for ended in [other for other in list(_nodes) if other.is_closed()]:
            _nodes.pop(ended, None)
        known = _nodes[loop] = LoopNode()
    return known


def begin(operation: Any) -> None:
    """Starts an operation that goes on, or ends at once, without anybody waiting for it."""
    try:
        waiter = operation.__await__().send(None)
    except (StopIteration, thalweg.Error):
        pass
    except RuntimeError:
        # From another thread, or after the loop has ended: it ends with the node's last object.
        operation.close()
    else:
        # Kept by the node that it waits for, and not by a task: none is left when the loop stops.
        waiter.add_done_callback(lambda _waiter: begin(operation))
