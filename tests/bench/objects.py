"""`hlcli fills sync` and `hlcli twap sync` of files against psql \\copy of the same rows; their peak memory.

    python -m tests.bench.objects [--rows 1000000] [--rounds 3] [--what fills|twaps|memory] [--large 5000000]

hlcli decodes, checks, sorts, de-duplicates and merges; \\copy reads a ready CSV of what it left, in that order, into
the same empty table with the same partitions. Start-up is that of the same command when all files are done. The best
of --rounds counts.
"""

from __future__ import annotations

import argparse
import multiprocessing
import subprocess
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import psycopg

from hlcli.sim.fill_files import BY_BLOCK, FillShape, write_fills
from hlcli.sim.fills import fills
from hlcli.sim.twap_files import TwapShape, write_twaps
from hlcli.sim.twaps import twaps
from tests.bench.server import private_server, psql, timed

HOUR = 1_790_000_000 // 3600
FILES = 6
MEMORY_ROWS = 1_000_000


def in_own_process(function: Callable[..., int], *arguments: object) -> int:
    """What makes the files must not be held by the parent of what is measured: a child's peak begins with its parent's."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


TIMES = {"fills": "time", "twap_status": "ts"}


def make_fills(folder: Path, rows: int, files: int, shape: FillShape, suffix: str) -> int:
    """Write files of so many fills in all; a Parquet file as a single row group. Returns how many there are."""
    from itertools import groupby

    parts = fills(1, HOUR, rows // files, files)
    return sum(
        write_fills(
            folder / f"{hour}{suffix}", (part.rows for part in those), shape, whole=shape.layout == "parquet"
        )
        for hour, those in groupby(parts, lambda part: part.hour)
    )


def make_twaps(folder: Path, rows: int, files: int, shape: TwapShape, suffix: str) -> int:
    """Write files of so many events in all, but for those of TWAPs that have not ended. Returns how many there are."""
    hours = 24
    events = twaps(1, HOUR, rows // 2 // hours, hours)
    size = -(-events.height // files)
    return sum(
        write_twaps(folder / f"{number}{suffix}", frame, shape)
        for number, frame in enumerate(events.iter_slices(size))
    )


def emptied(url: str, table: str) -> None:
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(f"truncate {table}, etl_s3_ingest_log")
        connection.execute("checkpoint")


def compare(url: str, table: str, command: str, folder: Path, rows: int, rounds: int) -> None:
    env, arguments = {"DATABASE_URL": url}, (command, "sync", "--local-file", str(folder), "--jobs", "2")
    # Once before, for the partitions and the CSV.
    timed(env, *arguments)
    with psycopg.connect(url) as connection:
        stored = connection.execute(f"select count(*) from {table}").fetchone()[0]
    assert stored == rows, (stored, rows)
    with tempfile.TemporaryDirectory(prefix="hlcli-bench-", dir="/tmp") as other:
        ready = Path(other, "ready.csv")
        # In the order in which a source serves them, not in that of our loads.
        copy(url, f"\\copy (select * from {table} order by {TIMES[table]}) to '{ready}' csv")
        whole, start, copied = [], [], []
        for _ in range(rounds):
            emptied(url, table)
            seconds, _ = timed(env, *arguments)
            whole.append(seconds)
            seconds, _ = timed(env, *arguments)
            start.append(seconds)
            emptied(url, table)
            began = time.perf_counter()
            copy(url, f"\\copy {table} from '{ready}' csv")
            copied.append(time.perf_counter() - began)
    base = rows / min(copied)
    megabytes = sum(file.stat().st_size for file in folder.iterdir()) / 1e6
    print(f"{rows:,} rows of {table} out of {len(list(folder.iterdir()))} files ({megabytes:.0f} MB):")
    for name, seconds in (
        ("psql \\copy of a ready CSV", min(copied)),
        (f"hlcli {command} sync", min(whole)),
        (f"  without start-up ({min(start):.1f} s)", min(whole) - min(start)),
    ):
        print(
            f"  {name:30s} {seconds:7.1f} s {rows / seconds:10,.0f} rows/s   {rows / seconds / base:5.2f} of \\copy"
        )


def copy(url: str, command: str) -> None:
    subprocess.run([psql(), url, "-qc", command], check=True)


def peak(
    url: str, table: str, command: str, what: str, make: Callable[..., int], rows: int, *shape: object
) -> None:
    with tempfile.TemporaryDirectory(prefix="hlcli-bench-", dir="/tmp") as folder:
        made = in_own_process(make, Path(folder), rows, 1, *shape)
        size = sum(file.stat().st_size for file in Path(folder).iterdir()) / 1e6
        emptied(url, table)
        seconds, usage = timed({"DATABASE_URL": url}, command, "sync", "--local-file", folder)
    print(f"  {what}, {made:,} rows, {size:.0f} MB: {usage.ru_maxrss / 1024:.0f} MB peak, {seconds:.0f} s")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--large", type=int, default=5_000_000, help="rows of the larger file for memory")
    parser.add_argument("--what", choices=["fills", "twaps", "memory"], action="append")
    given = parser.parse_args()
    what = given.what or ["fills", "twaps", "memory"]
    with private_server() as url:
        timed({"DATABASE_URL": url}, "init")
        cases = {
            "fills": [("fills", "fills", make_fills, BY_BLOCK, ".lz4")],
            "twaps": [
                ("twap_status", "twap", make_twaps, TwapShape("lines"), ".lz4"),
                ("twap_status", "twap", make_twaps, TwapShape("columns"), ".parquet"),
            ],
        }
        for table, command, make, shape, suffix in (case for name in what for case in cases.get(name, ())):
            with tempfile.TemporaryDirectory(prefix="hlcli-bench-", dir="/tmp") as folder:
                rows = in_own_process(make, Path(folder), given.rows, FILES, shape, suffix)
                emptied(url, table)
                compare(url, table, command, Path(folder), rows, given.rounds)
        if "memory" in what:
            print("peak memory of one file:")
            parquet, lines = FillShape("parquet"), TwapShape("lines")
            for rows in (MEMORY_ROWS, given.large):
                peak(url, "fills", "fills", "fills by block", make_fills, rows, BY_BLOCK, ".lz4")
                peak(url, "fills", "fills", "fills, one row group", make_fills, rows, parquet, ".parquet")
            for rows in (MEMORY_ROWS // 5, MEMORY_ROWS):
                peak(url, "twap_status", "twap", "TWAPs by line", make_twaps, rows, lines, ".lz4")


if __name__ == "__main__":
    main()
