"""The node of the running event loop.

Owns which loop has which node. All comms and listeners of a loop share one, and it lives as long as
the loop: it costs nothing while nobody uses it.
"""

from __future__ import annotations

import asyncio
import weakref

import thalweg

from . import config

_nodes: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, thalweg.Node] = (
    weakref.WeakKeyDictionary()
)


def node_here() -> thalweg.Node:
    """The node of the running loop, made when it is first asked for.

    The settings are those of the configuration at that time.
    """
    loop = asyncio.get_running_loop()
    node = _nodes.get(loop)
    if node is None or node.is_closed:
        node = _nodes[loop] = thalweg.Node(**config.node_arguments())
    return node
