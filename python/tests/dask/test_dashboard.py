"""The page ``/thalweg``: what it shows, that it is served, and that it looks right in a browser."""

import asyncio
import json

import browser
import numpy as np
import pytest
from cluster_support import bounded, no_processes_left
from dask_support import in_loop, until

pytest.importorskip("bokeh")

from bokeh.document import Document
from distributed import Client, Scheduler, Worker
from thalweg.dask import dashboard, traffic
from tornado.httpclient import AsyncHTTPClient, HTTPClientError


@pytest.fixture(autouse=True)
def tidy():
    with no_processes_left(), bounded(60):
        yield


async def get(scheduler, path):
    url = f"http://127.0.0.1:{scheduler.http_server.port}{path}"
    response = await AsyncHTTPClient().fetch(url)
    return response.body.decode()


def is_the_page(text):
    return "embed_document" in text or "docs_json" in text or "render_items" in text


class Cluster:
    """A scheduler with a dashboard, and two workers that have exchanged something."""

    def __init__(self, protocol="thalweg", **kwargs):
        options = dict(protocol=protocol, host="127.0.0.1", port=0, dashboard_address="127.0.0.1:0")
        self._scheduler = Scheduler(**{**options, **kwargs})

    async def __aenter__(self):
        self.scheduler = await self._scheduler
        self.workers = await asyncio.gather(
            *(Worker(self.scheduler.address, name=name, dashboard=False) for name in ("a", "b"))
        )
        self.client = await Client(self.scheduler.address, asynchronous=True)
        a, b = self.workers
        x = self.client.submit(np.ones, 1_000_000, workers=[a.address])
        assert await self.client.submit(np.sum, x, workers=[b.address]) == 1_000_000
        await asyncio.gather(a.heartbeat(), b.heartbeat())
        return self

    async def __aexit__(self, *_):
        await self.client.close()
        await asyncio.gather(*(worker.close() for worker in self.workers))
        await self.scheduler.close()


@in_loop(timeout=50)
async def test_the_rows():
    async with Cluster() as cluster:
        scheduler = cluster.scheduler
        a, b = (f"{worker.name} ({worker.address})" for worker in cluster.workers)
        rows = dashboard.rows(scheduler)
        [row] = [row for row in rows if (row["from"], row["to"]) == (b, a)]
        assert row["link"] == "shm" and row["connections"] == 1
        assert row["received"] > 8_000_000 > row["sent"] > 0
        assert row["messages"] >= 4
        assert row["why"].startswith("shm chosen")
        assert rows[0] is row
        assert {(a, "scheduler"), (b, "scheduler")} <= {(r["from"], r["to"]) for r in rows}
        assert "shm</b>" in dashboard.summary(rows)
        sources, targets, cells = dashboard.chart_of(rows)
        assert {a, b} <= set(sources) and {a, "scheduler"} <= set(targets)
        assert len({len(column) for column in cells.values()}) == 1


def test_nothing_to_show():
    class Nobody:
        address = "thalweg://127.0.0.1:1"
        workers = {}

    assert dashboard.rows(Nobody()) == []
    assert "Nothing" in dashboard.summary([])
    assert dashboard.chart_of([])[:2] == ([], [])


@in_loop(timeout=50)
async def test_the_components():
    async with Cluster() as cluster:
        document = Document()
        dashboard.document(cluster.scheduler, {}, document)
        [root] = document.roots
        pairs = next(iter(document.components))
        assert len(pairs.source.data["link"]) >= 3
        assert "shm" in pairs.source.data["link"]
        assert "b (" in json.dumps(pairs.cells.data["y"])
        assert root.children[0] is pairs.summary


@in_loop(timeout=50)
async def test_the_page_is_served_and_linked():
    async with Cluster() as cluster:
        scheduler = cluster.scheduler
        page = await get(scheduler, "/thalweg")
        assert is_the_page(page)
        # Dask's own pages have a link to it, and are as they were.
        for path in ["/status", "/workers", "/thalweg"]:
            assert '<a href="thalweg">' in await get(scheduler, path)
        assert "individual-task-stream" in await get(scheduler, "/individual-plots.json")
        with pytest.raises(HTTPClientError, match="404"):
            await get(scheduler, "/thalwegs")


@in_loop(timeout=50)
async def test_the_page_behind_a_prefix():
    async with Cluster(http_prefix="some/where") as cluster:
        assert is_the_page(await get(cluster.scheduler, "/some/where/thalweg"))


@in_loop(timeout=50)
async def test_nothing_is_made_before_it_is_looked_at():
    async with Cluster() as cluster:
        [page] = [
            known
            for known in cluster.scheduler.http_application.applications
            if isinstance(known, dashboard.LazyBokehPage)
        ]
        assert page._made is None
        await get(cluster.scheduler, "/status")
        assert page._made is None


@in_loop(timeout=50)
async def test_without_a_dashboard():
    async with Cluster(dashboard=False) as cluster:
        assert not any(
            isinstance(known, dashboard.LazyBokehPage)
            for known in cluster.scheduler.http_application.applications
        )


@in_loop(timeout=50)
async def test_other_protocols_have_neither_page_nor_metric():
    async with Cluster(protocol="tcp") as cluster:
        with pytest.raises(HTTPClientError, match="404"):
            await get(cluster.scheduler, "/thalweg")
        for worker in cluster.scheduler.workers.values():
            assert traffic.METRIC not in worker.metrics


@in_loop(timeout=50)
async def test_counts_survive_their_connections():
    async with Cluster() as cluster:
        _, b = cluster.workers
        before = traffic.metric(b)["peers"]
        b.rpc.remove(cluster.workers[0].address)
        peer = cluster.workers[0].address
        await until(lambda: traffic.metric(b)["peers"][peer]["shm"]["connections"] == 0)
        after = traffic.metric(b)["peers"]
        assert after[peer]["shm"]["bytes_received"] >= before[peer]["shm"]["bytes_received"]


def test_only_the_busiest_peers_are_named(monkeypatch):
    monkeypatch.setattr(traffic, "PEERS_MAX", 3)
    counts = dict(connections=1, bytes_sent=0, messages_sent=1, messages_received=0)
    table = {(f"peer {i}", "shm"): {**counts, "bytes_received": i} for i in range(10)}
    bounded_table = traffic._bounded(table)
    assert set(bounded_table) == {("peer 9", "shm"), ("peer 8", "shm"), (traffic.OTHERS, "shm")}
    assert bounded_table[traffic.OTHERS, "shm"]["bytes_received"] == sum(range(8))
    assert bounded_table[traffic.OTHERS, "shm"]["connections"] == 8


@pytest.mark.skipif(browser.PATH is None, reason="there is no Chromium on this machine")
@in_loop(timeout=55)
async def test_a_browser_shows_it(tmp_path):
    shown = "Bokeh.documents[0].roots()[0]"
    async with Cluster() as cluster:
        url = f"http://127.0.0.1:{cluster.scheduler.http_server.port}/thalweg"
        async with browser.browsing(url, tmp_path / "profile") as page:
            await page.until(f"Bokeh.documents.length == 1 && {shown}.children.length == 3")
            await page.until("Bokeh.documents[0].is_idle")
            summary = await page.value(f"{shown}.children[0].text")
            assert "shm" in summary and "connections" in summary
            links = await page.value(f"Array.from({shown}.children[2].source.data.link)")
            assert len(links) >= 3 and set(links) == {"shm"}
            # It goes on by itself.
            before = await page.value(f"{shown}.children[0].text")
            await cluster.client.submit(len, b"x" * 100_000)
            await page.until(f"{shown}.children[0].text != {before!r}")
            picture = await page.picture()
        (tmp_path / "thalweg.png").write_bytes(picture)
        # An empty page of this size has about 15 kB.
        assert len(picture) > 30_000
