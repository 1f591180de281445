"""Drawings of results, with matplotlib, which is not needed for anything else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .errors import BenchError
from .measure import headline
from .units import show_size


def check(path: str) -> None:
    """Says before anything is measured what would fail at the end."""
    try:
        import matplotlib
    except ImportError:
        raise BenchError("--plot needs matplotlib: pip install matplotlib") from None
    from matplotlib.backend_bases import FigureCanvasBase

    kind = path.rpartition(".")[2].lower()
    if kind not in FigureCanvasBase.get_supported_filetypes():
        raise BenchError(f"--plot cannot write {path!r}; name a .png, .svg or .pdf file")
    matplotlib.use("agg")
    try:
        open(path, "ab").close()
    except OSError as error:
        raise BenchError(f"--plot cannot write {path!r}: {error.strerror}") from None


def messages(rows: Sequence[dict[str, Any]], path: str) -> None:
    """Latency or bandwidth over the size of messages."""
    from matplotlib import pyplot

    latency = rows[0]["program"] == "pingpong"
    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    curves: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        wake = f", spin {row['spin_us']} µs" if row["spin_us"] else ""
        value = headline(row) if latency else row["gb_per_s"]
        name = f"{row['backend']} ({row['transport']}{wake})"
        curves.setdefault(name, []).append((row["size_bytes"], value))
    for name, points in curves.items():
        sizes, values = zip(*sorted(points), strict=True)
        axes.plot(sizes, values, marker="o", label=name)
    ticks = sorted({row["size_bytes"] for row in rows})
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks(ticks, [show_size(size) for size in ticks])
    axes.minorticks_off()
    axes.set_xlabel("size of a message")
    axes.set_ylabel("half a round trip, median, µs" if latency else "GB/s")
    axes.grid(True, alpha=0.3)
    axes.legend()
    figure.savefig(path)
    pyplot.close(figure)


def steps(rows: Sequence[dict[str, Any]], path: str) -> None:
    """The steps of ``dask``: a panel each, a bar for each protocol."""
    from matplotlib import pyplot

    names = list(dict.fromkeys(row["step"] for row in rows))
    protocols = list(dict.fromkeys(row["protocol"] for row in rows))
    columns = min(4, len(names))
    lines = -(-len(names) // columns)
    figure, grid = pyplot.subplots(
        lines, columns, figsize=(3 * columns, 2.8 * lines), layout="constrained", squeeze=False
    )
    for axes in grid.flat[len(names) :]:
        axes.set_visible(False)
    for axes, name in zip(grid.flat, names, strict=False):
        values = {row["protocol"]: row for row in rows if row["step"] == name}
        for at, protocol in enumerate(protocols):
            value = values.get(protocol, {}).get("value")
            bar = axes.bar(at, value or 0.0, color=f"C{at}")
            axes.bar_label(bar, ["–" if value is None else f"{value:.3g}"])
        unit = next(row["unit"] for row in rows if row["step"] == name)
        axes.set_title(name)
        axes.set_ylabel(unit)
        axes.set_xticks(range(len(protocols)), protocols)
        axes.margins(y=0.15)
    figure.savefig(path)
    pyplot.close(figure)
