"""Peak memory and time of `hlcli signals compute`: a day of 200 wallets and 3 coins, then the next window.

python -m tests.bench.signals [--wallets 200] [--hours 24]
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta

import psycopg

from tests.bench.server import private_server

# Every wallet takes a new position in a coin every three to fourteen minutes, one time in four none.
SNAPSHOTS = """
insert into wallet_snapshots (snapshot_ts, wallet_id, asset, position_szi, ingest_run_id)
select %(first)s::timestamptz + make_interval(mins => minute), '0x' || lpad(to_hex(wallet), 40, '0'), asset,
       case when draw %% 4 = 0 then 0 else (draw %% 2000001 - 1000000) / 1000.0 end, 1
from generate_series(0, %(minutes)s - 1) minute, generate_series(1, %(wallets)s) wallet,
     unnest(array['HYPE', 'BTC', 'ETH']) asset,
     lateral (select abs(hashtext(asset || wallet || ':' || minute / (wallet %% 12 + 3))::bigint) as draw) drawn
"""
RUNS = """
insert into ingest_runs (snapshot_ts, status, wallets_expected, wallets_succeeded, wallets_failed, rows_expected,
    rows_written, coverage_pct, duration_ms, ledger_run_id)
select %(first)s::timestamptz + make_interval(mins => minute), 'success', %(wallets)s, %(wallets)s, 0,
       3 * %(wallets)s, 3 * %(wallets)s, 100, 1, gen_random_uuid()
from generate_series(0, %(minutes)s - 1) minute
"""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--wallets", type=int, default=200)
    parser.add_argument("--hours", type=int, default=24)
    given = parser.parse_args()
    minutes = 60 * given.hours
    first = datetime(2026, 1, 1, 0, 1, tzinfo=UTC)
    last = first + timedelta(minutes=minutes - 1)
    with private_server() as url:
        _measured(url, last, "init")
        rows = _fill(url, first, minutes, given.wallets)
        print(f"{rows:,} snapshots of {given.wallets} wallets")
        _tell("every window", *_measured(url, last, "signals", "compute", "--since", first.isoformat()))
        _tell("every window again", *_measured(url, last, "signals", "compute", "--since", first.isoformat()))
        _fill(url, last + timedelta(minutes=1), 5, given.wallets)
        _tell("one more window", *_measured(url, last + timedelta(minutes=5), "signals", "compute"))
        with psycopg.connect(url) as connection:
            print(*connection.execute("select count(*), count(distinct signal_ts) from signals").fetchone())


def _fill(url: str, first: datetime, minutes: int, wallets: int) -> int:
    values = {"first": first, "minutes": minutes, "wallets": wallets}
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(RUNS, values)
        rows = connection.execute(SNAPSHOTS, values).rowcount
        connection.execute("vacuum analyze wallet_snapshots")
    return rows


def _measured(url: str, last: datetime, *arguments: str) -> tuple[float, float]:
    """Run `hlcli` two and a half minutes after `last`; returns seconds with start-up and the peak in MB."""
    offset_s = (last + timedelta(minutes=2.5) - datetime.now(UTC)).total_seconds()
    env = {**os.environ, "DATABASE_URL": url, "PGOPTIONS": f"-c hlcli.clock_offset={offset_s:.0f}s"}
    began = time.perf_counter()
    child = subprocess.Popen([sys.executable, "-m", "hlcli", *arguments], env=env, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    assert child.returncode == 0, arguments
    return time.perf_counter() - began, usage.ru_maxrss / 1024


def _tell(what: str, seconds: float, megabytes: float) -> None:
    print(f"  {what}: {seconds:.1f} s with start-up, peak memory {megabytes:.0f} MB")


if __name__ == "__main__":
    main()
