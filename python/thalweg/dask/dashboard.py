"""The page ``/thalweg`` of the scheduler's dashboard: which way the traffic of each pair goes.

Owns what the page looks like. What it shows is counted elsewhere (``traffic``). Nothing of it
exists before somebody opens the page.
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any

from bokeh.core.properties import without_property_validation
from bokeh.layouts import column
from bokeh.models import (
    ColumnDataSource,
    DataTable,
    Div,
    FactorRange,
    HoverTool,
    HTMLTemplateFormatter,
    NumberFormatter,
    TableColumn,
)
from bokeh.plotting import figure
from dask.utils import format_bytes
from distributed.dashboard.components import DashboardComponent, add_periodic_callback
from distributed.dashboard.components.scheduler import BOKEH_THEME, env
from distributed.dashboard.core import BokehApplication
from distributed.dashboard.scheduler import template_variables
from distributed.dashboard.utils import _DATATABLE_STYLESHEETS_KWARGS, update
from distributed.utils import log_errors
from tornado.ioloop import IOLoop

from . import traffic

PAGE = "thalweg"
INTERVAL_MS = 1000

#: Pairs that the chart draws; the table has all.
CHART_SIDE_MAX = 64

LINK_COLORS = {"shm": "#2a9d8f", "verbs": "#6a4c93", "ucx": "#3a6ea5", "tcp": "#e08e45"}
OTHER_COLOR = "#999999"

Row = dict[str, Any]


def rows(scheduler: Any) -> list[Row]:
    """A row for each pair and link, the busiest first: what workers say, and what the scheduler
    itself has opened."""
    metrics = {
        address: worker.metrics.get(traffic.METRIC)
        for address, worker in scheduler.workers.items()
    }
    metrics[scheduler.address] = traffic.metric(scheduler)
    found = [
        {
            "from": name_of(scheduler, source),
            "to": name_of(scheduler, target),
            "link": link,
            "connections": counts["connections"],
            "sent": counts["bytes_sent"],
            "received": counts["bytes_received"],
            "messages": counts["messages_sent"] + counts["messages_received"],
            "why": why_of(metric, target),
        }
        for source, metric in metrics.items()
        if metric
        for target, links in metric["peers"].items()
        for link, counts in links.items()
    ]
    return sorted(found, key=lambda row: (-row["sent"] - row["received"], row["from"], row["to"]))


def name_of(scheduler: Any, address: str) -> str:
    """What people call the server at an address."""
    if address == scheduler.address:
        return "scheduler"
    worker = scheduler.workers.get(address)
    if worker is None or worker.name in (None, address):
        return address
    return f"{worker.name} ({address})"


def why_of(metric: dict[str, Any], peer: str) -> str:
    return next((text for text, peers in metric["routes"].items() if peer in peers), "")


def summary(found: list[Row]) -> str:
    """The sum over all pairs, by link, as HTML."""
    if not found:
        return "Nothing has gone over thalweg yet."
    totals: dict[str, list[int]] = {}
    for row in found:
        total = totals.setdefault(row["link"], [0, 0, 0])
        total[0] += row["connections"]
        total[1] += row["sent"] + row["received"]
        total[2] += row["messages"]
    return " &nbsp; ".join(
        f'<b style="color: {LINK_COLORS.get(link, OTHER_COLOR)}">{link}</b>: '
        f"{connections:,} connections, {format_bytes(volume)}, {messages:,} messages"
        for link, (connections, volume, messages) in sorted(totals.items())
    )


class Pairs(DashboardComponent):
    """A chart of who has exchanged how much with whom over which link, and the same as a table."""

    def __init__(self, scheduler: Any):
        self.scheduler = scheduler
        names = ["from", "to", "link", "connections", "sent", "received", "messages", "why"]
        self.source: Any = ColumnDataSource({name: [] for name in names})
        self.cells = ColumnDataSource(
            {name: [] for name in ["x", "y", "color", "alpha", "label", "why"]}
        )
        self.summary = Div(sizing_mode="stretch_width")
        self.figure = self._chart()
        self.root = column(
            self.summary, self.figure, self._table(), sizing_mode="stretch_width"
        )

    def _chart(self) -> Any:
        chart = figure(
            title="Traffic between who connected (from) and whom to (colour: link; strength: bytes, both ways)",
            x_range=FactorRange(),
            y_range=FactorRange(),
            x_axis_label="to",
            y_axis_label="from",
            height=320,
            sizing_mode="stretch_width",
            tools="",
            toolbar_location=None,
        )
        chart.rect(
            "x",
            "y",
            width=0.95,
            height=0.95,
            color="color",
            alpha="alpha",
            line_color=None,
            source=self.cells,
        )
        chart.text(
            "x",
            "y",
            text="label",
            text_align="center",
            text_baseline="middle",
            text_font_size="11px",
            source=self.cells,
        )
        chart.add_tools(HoverTool(tooltips=[("", "@y to @x"), ("", "@label"), ("why", "@why")]))
        chart.grid.grid_line_color = None
        chart.xaxis.major_label_orientation = 0.3
        return chart

    def _table(self) -> Any:
        text = HTMLTemplateFormatter(template='<span title="<%- value %>"><%- value %></span>')
        number = NumberFormatter(format="0,0")
        size = NumberFormatter(format="0.00 b")
        columns = [
            TableColumn(field="from", title="From", formatter=text, width=200),
            TableColumn(field="to", title="To", formatter=text, width=200),
            TableColumn(field="link", title="Link", formatter=text, width=50),
            TableColumn(field="connections", title="Open", formatter=number, width=50),
            TableColumn(field="sent", title="Sent", formatter=size, width=80),
            TableColumn(field="received", title="Received", formatter=size, width=80),
            TableColumn(field="messages", title="Messages", formatter=number, width=80),
            TableColumn(field="why", title="Why this link", formatter=text, width=600),
        ]
        return DataTable(
            source=self.source,
            columns=columns,
            reorderable=True,
            sortable=True,
            index_position=None,
            height=400,
            sizing_mode="stretch_width",
            **_DATATABLE_STYLESHEETS_KWARGS,
        )

    @without_property_validation  # type: ignore[untyped-decorator]
    @log_errors
    def update(self) -> None:
        found = rows(self.scheduler)
        self.summary.text = summary(found)
        update(self.source, {name: [row[name] for row in found] for name in self.source.data})
        sources, targets, cells = chart_of(found)
        # The order of the workers, not that of their traffic: cells stay where they are.
        if list(self.figure.x_range.factors) != targets:
            self.figure.x_range.factors = targets
        if list(self.figure.y_range.factors) != sources:
            self.figure.y_range.factors = sources
            self.figure.height = 140 + 28 * max(4, len(sources))
        update(self.cells, cells)


def chart_of(found: list[Row]) -> tuple[list[str], list[str], dict[str, list[Any]]]:
    """Both axes of the chart, and its cells: for each pair the link that moved most."""
    pairs: dict[tuple[str, str], Row] = {}
    for row in found:
        pairs.setdefault((row["from"], row["to"]), row)
    sources = sorted({source for source, _ in pairs})[:CHART_SIDE_MAX]
    targets = sorted({target for _, target in pairs})[:CHART_SIDE_MAX]
    shown = [row for (a, b), row in pairs.items() if a in sources and b in targets]
    most = max((row["sent"] + row["received"] for row in shown), default=0) or 1
    cells: dict[str, list[Any]] = {
        "x": [row["to"] for row in shown],
        "y": [row["from"] for row in shown],
        "color": [LINK_COLORS.get(row["link"], OTHER_COLOR) for row in shown],
        "alpha": [0.25 + 0.75 * (row["sent"] + row["received"]) / most for row in shown],
        "label": [
            f"{row['link']} {format_bytes(row['sent'] + row['received'])}" for row in shown
        ],
        "why": [row["why"] for row in shown],
    }
    return sources[::-1], targets, cells


@log_errors
def document(scheduler: Any, extra: dict[str, Any], doc: Any) -> None:
    pairs = Pairs(scheduler)
    pairs.update()
    add_periodic_callback(doc, pairs, INTERVAL_MS)
    doc.title = "Dask: thalweg"
    doc.add_root(pairs.root)
    doc.template = env.get_template("simple.html")
    doc.template_variables.update(extra)
    doc.theme = BOKEH_THEME


class LazyBokehPage:
    """Stands among a scheduler's web applications, and makes the page when it is asked for: a
    server of Bokeh's has timers, which an idle scheduler need not pay for."""

    app_paths = (f"/{PAGE}",)

    def __init__(self, scheduler: Any, prefix: str):
        self._make = functools.partial(
            BokehApplication,
            {f"/{PAGE}": document},
            scheduler,
            prefix=prefix,
            template_variables=template_variables(scheduler),
        )
        self._path = f"/{prefix.strip('/')}/{PAGE}" if prefix.strip("/") else f"/{PAGE}"
        self._made: Any = None

    def __repr__(self) -> str:
        # Dask looks for this word where it lists its pages.
        return f"<bokeh page {self._path}>"

    def find_handler(self, request: Any, **kwargs: Any) -> Any:
        if request.path != self._path and not request.path.startswith(self._path + "/"):
            return None
        if self._made is None:
            self._made = self._make()
            self._made.initialize(IOLoop.current())
            self._made.start()
        return self._made.find_handler(request, **kwargs)

    def stop(self) -> None:
        made, self._made = self._made, None
        if made is not None:
            made.stop()


def add_to(scheduler: Any) -> None:
    """Adds the page, and a link to it, to a scheduler that has a dashboard of Bokeh's."""
    applications = getattr(getattr(scheduler, "http_application", None), "applications", [])
    if any(isinstance(known, LazyBokehPage) for known in applications):
        return
    with contextlib.suppress(StopIteration):
        board = next(known for known in applications if hasattr(known, "prefix"))
        scheduler.http_application.add_application(LazyBokehPage(scheduler, board.prefix or ""))
        pages = template_variables(scheduler)["pages"]
        if PAGE not in pages:
            pages.append(PAGE)
