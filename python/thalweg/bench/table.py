"""Results as people read them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .units import show_figure, show_size


def lay_out(lines: Sequence[Sequence[str]], left: int) -> str:
    """Columns, the first ``left`` of them and the last one to the left."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = []
    for line in lines:
        cells = [
            cell.ljust(width) if at < left or at + 1 == len(widths) else cell.rjust(width)
            for at, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        text.append("   ".join(cells).rstrip())
    return "\n".join(text)


def _ratio(row: dict[str, Any]) -> str:
    return f"{row['ratio']:.2f} × {row['baseline']}" if row["ratio"] is not None else ""


def render(rows: Sequence[dict[str, Any]]) -> str:
    """The rows of ``pingpong`` or ``bandwidth``."""
    if rows[0]["program"] == "pingpong":
        figures = ["p50", "p90", "p99", "max", "mean"]
        heading = ["half a round trip, µs", "link", "wake", "size", *figures, "cpu µs"]
    else:
        heading = ["one way", "link", "wake", "size", "window", "GB/s", "messages/s", "cpu µs"]
    lines = [[*heading, "ratio"]]
    for row in rows:
        wake = f"spin {row['spin_us']} µs" if row["spin_us"] else row["wake"]
        line = [row["backend"], row["transport"], wake, show_size(row["size_bytes"])]
        if row["program"] == "pingpong":
            line += [show_figure(row["half_rtt_us"][name]) for name in figures]
        else:
            line += [str(row["window"]), show_figure(row["gb_per_s"])]
            line += [show_figure(row["messages_per_s"])]
        lines.append([*line, show_figure(row["cpu_us_per_message"]), _ratio(row)])
    return lay_out(lines, 3)


def routes(rows: Sequence[dict[str, Any]]) -> str:
    """Each route that thalweg took, once: without its first line, which names the address."""
    found = dict.fromkeys(row["route"].partition("\n")[2] for row in rows if row["route"])
    return "\n".join(f"route:\n{route.rstrip()}" for route in found)
