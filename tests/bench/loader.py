"""Rows per second of the loader against psql \\copy and against SQLAlchemy inserts of 1000 (spec 004's design).

    python -m tests.bench.loader [--rows 500000] [--rounds 3] [--existing 0]

Every contender fills the same keyed, indexed table, empty but for --existing rows, with the same fills-shaped rows
in order of time, as a source serves them. The loader validates, sorts, de-duplicates and merges; \\copy reads a ready
CSV of rows known to be good. The best of --rounds counts.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from uuid import uuid4

import polars as pl
import psycopg

from hlcli import migrations
from hlcli.loader import Merge, load
from tests.bench.server import private_server, psql

TABLE = """
drop table if exists bench_fills;
create table bench_fills (
    user_address text collate "C" not null, coin text collate "C" not null, tid bigint not null,
    oid bigint not null, side text collate "C" not null, time timestamptz not null, event_ix integer not null,
    px numeric not null, sz numeric not null, dir text, start_position numeric, closed_pnl numeric, fee numeric,
    fee_token text, crossed boolean, hash text, block_time timestamptz, twap_id bigint, builder_fee numeric,
    cloid text, builder text, liquidation jsonb,
    primary key (user_address, coin, tid, oid, side, time, event_ix)
);
create index bench_fills_coin_time on bench_fills (coin, time);
"""
SQLALCHEMY_ROWS = 20_000


def fills(rows: int, seed: int) -> pl.DataFrame:
    """Invented fills in order of time: 30,000 wallets and 200 coins, few of them busy."""
    rnd = random.Random(seed)
    wallets = ["0x" + hashlib.sha1(f"{i}".encode()).hexdigest() for i in range(30_000)]
    coins = ["BTC", "ETH", "HYPE", "SOL", "kPEPE", *(f"C{i}" for i in range(195))]
    start = 1_767_225_600_000 + seed * 86_400_000
    times = sorted(start + rnd.randrange(3_600_000) for _ in range(rows))
    sizes = [f"{rnd.random() * 10:.5f}" for _ in range(rows)]
    when = pl.Series(times).cast(pl.Datetime("ms")).dt.replace_time_zone("UTC").cast(pl.Datetime("us", "UTC"))
    nothing = pl.Series([None] * rows, dtype=pl.String)
    return pl.DataFrame(
        {
            "user_address": [wallets[min(int(rnd.paretovariate(1.2) * 50), 29_999)] for _ in range(rows)],
            "coin": [coins[min(int(rnd.paretovariate(1)), 199)] for _ in range(rows)],
            "tid": [rnd.getrandbits(50) for _ in range(rows)],
            "oid": [rnd.randrange(500_000_000_000) for _ in range(rows)],
            "side": [rnd.choice("AB") for _ in range(rows)],
            "time": when,
            "event_ix": pl.Series([0] * rows, dtype=pl.Int64),
            "px": [f"{rnd.random() * 100_000:.2f}" for _ in range(rows)],
            "sz": sizes,
            "dir": ["Open Long"] * rows,
            "start_position": sizes,
            "closed_pnl": [f"{rnd.gauss(0, 100):.6f}" for _ in range(rows)],
            "fee": [f"{rnd.random():.6f}" for _ in range(rows)],
            "fee_token": ["USDC"] * rows,
            "crossed": [rnd.random() < 0.5 for _ in range(rows)],
            "hash": [f"0x{rnd.getrandbits(256):064x}" for _ in range(rows)],
            "block_time": when,
            "twap_id": pl.Series([None] * rows, dtype=pl.Int64),
            "builder_fee": nothing,
            "cloid": nothing,
            "builder": nothing,
            "liquidation": nothing,
        }
    )


def fresh(url: str, existing: Path | None) -> None:
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(TABLE)
        if existing:
            copy_csv(url, existing)
            connection.execute("vacuum analyze bench_fills")
        connection.execute("checkpoint")


def copy_csv(url: str, path: Path) -> None:
    subprocess.run([psql(), url, "-qc", f"\\copy bench_fills from '{path}' csv"], check=True)


def load_all(url: str, frame: pl.DataFrame, connections: int) -> None:
    def one(unit: pl.DataFrame) -> None:
        with psycopg.connect(url) as connection, connection.transaction():
            counts = load(connection, "bench_fills", unit, rule=Merge.IGNORE, run_id=uuid4())
        assert counts.inserted == unit.height, counts

    with ThreadPoolExecutor(connections) as pool:
        list(pool.map(one, frame.iter_slices(-(-frame.height // connections))))


def sqlalchemy_inserts(url: str, frame: pl.DataFrame) -> None:
    import sqlalchemy as sa
    from sqlalchemy.dialects.postgresql import insert

    engine = sa.create_engine("postgresql+psycopg://", creator=lambda: psycopg.connect(url))
    table = sa.Table("bench_fills", sa.MetaData(), autoload_with=engine)
    rows = frame.to_dicts()
    with engine.begin() as connection:
        for start in range(0, len(rows), 1000):
            connection.execute(insert(table).values(rows[start : start + 1000]).on_conflict_do_nothing())
    engine.dispose()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=500_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--existing", type=int, default=0, help="rows in the table before each contender")
    options = parser.parse_args()
    frame = fills(options.rows, seed=1)
    few = frame.head(SQLALCHEMY_ROWS)
    with private_server() as url, tempfile.TemporaryDirectory(dir="/tmp") as folder:
        with psycopg.connect(url, autocommit=True) as connection:
            migrations.migrate(connection)
        ready, before = Path(folder, "ready.csv"), Path(folder, "existing.csv")
        frame.write_csv(ready, include_header=False)
        if options.existing:
            with before.open("wb") as file:
                for part, start in enumerate(range(0, options.existing, 500_000)):
                    rows = min(500_000, options.existing - start)
                    fills(rows, seed=100 + part).write_csv(file, include_header=False)
        contenders = {
            "psql \\copy of a ready CSV": (options.rows, lambda: copy_csv(url, ready)),
            "loader, one connection": (options.rows, lambda: load_all(url, frame, 1)),
            "loader, two connections": (options.rows, lambda: load_all(url, frame, 2)),
        }
        if not options.existing:
            contenders["SQLAlchemy inserts of 1000"] = (few.height, lambda: sqlalchemy_inserts(url, few))
        best: dict[str, float] = {}
        for _ in range(options.rounds):
            for name, (rows, contender) in contenders.items():
                fresh(url, before if options.existing else None)
                began = time.perf_counter()
                contender()
                best[name] = max(best.get(name, 0), rows / (time.perf_counter() - began))
    print(f"{options.rows:,} rows into a table of {options.existing:,}, best of {options.rounds}")
    base = best["psql \\copy of a ready CSV"]
    for name, speed in best.items():
        print(f"  {name:28s} {speed:10,.0f} rows/s   {speed / base:5.2f} of \\copy")
    if "SQLAlchemy inserts of 1000" in best:
        print(
            f"  loader / SQLAlchemy: {best['loader, one connection'] / best['SQLAlchemy inserts of 1000']:.1f}"
        )


if __name__ == "__main__":
    main()
