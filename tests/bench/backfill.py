"""A backfill of 100,000 wallets under a simulated clock; a real worker's use of the weight; its peak memory.

    python -m tests.bench.backfill [--what clock|used|memory] [--wallets 100000] [--minutes 30] [--workers 1 4 10]

clock: spec 003's scenarios for 1, 4 and 10 workers. The budget's SQL functions themselves decide, on a real database
whose clock is set; a server that enforces the published weights counts beside them. Each worker has an egress key,
eight requests in the air and answers after 0.2 to 3 s (log-normal, half of them within 0.7 s). A wallet's pages are
full but for its last one, of 1 to 1999 fills (log-uniform: half below 45). A steady state of --minutes is simulated;
the hours are the weight of all wallets drawn over the weight that was used an hour.

used: `hlcli backfill` of full pages against the simulator at 1200 weight a minute, in real time (--real minutes).

memory: the same over histories of 50,000 and of 500,000 fills of eight wallets, with weight for all of them.
"""

from __future__ import annotations

import argparse
import math
import random
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from resource import struct_rusage

import psycopg

from hlcli import migrations
from hlcli.sim.user_fills import UserFills
from tests.bench.server import exchange, private_server, timed
from tests.budget_clock import FULL, Address, Clock, simulate_clock, wallet

LIMIT = 1200
# Spec 003: requests a wallet, and what it says of them.
SCENARIOS = {"optimistic": 1, "average": 3, "pessimistic": 5}
SPEC_REQUESTS = 40
WARM_UP_S = 180
# The fewest that the simulator makes.
WALLETS = 8


def fleet(
    connection: psycopg.Connection, rng: random.Random, pages: int, workers: int, minutes: float
) -> list[Address]:
    """So many workers, each alone behind its address, after a warm-up and so many minutes."""

    def latency() -> float:
        return min(max(rng.lognormvariate(math.log(0.7), 0.6), 0.2), 3.0)

    def wallets() -> Iterator[list[int]]:
        while True:
            yield wallet(rng, pages)

    connection.execute("truncate rate_budget, rate_budget_buckets, rate_budget_waiters")
    clock = Clock(connection, rng)
    addresses = [Address(clock, latency, f"worker {number}", LIMIT) for number in range(workers)]
    for address in addresses:
        address.backfill(wallets())
    clock.run(WARM_UP_S + minutes * 60)
    return addresses


def simulated(given: argparse.Namespace) -> None:
    rng = random.Random(given.seed)
    with private_server() as url, psycopg.connect(url, autocommit=True) as connection:
        migrations.migrate(connection)
        connection.execute("set synchronous_commit = off")
        simulate_clock(connection)
        print(
            f"spec 003: {SPEC_REQUESTS} requests a minute, of full pages {SPEC_REQUESTS * FULL:,} weight a minute:"
            f" {SPEC_REQUESTS * FULL / LIMIT:.0f} times the limit, refused; allowed are {LIMIT // FULL}"
        )
        print(f"{given.wallets:,} wallets, {given.minutes:g} minutes simulated, seed {given.seed}:")
        print(
            f"  {'scenario':22s} {'workers':>7s} {'hours':>7s} {'spec 003':>8s} {'used':>6s} {'refused':>7s}"
            f" {'peak/60 s':>9s} {'requests/min':>12s}   the spec's {SPEC_REQUESTS} requests a minute"
        )
        for name, pages in SCENARIOS.items():
            weight = sum(sum(wallet(rng, pages)) for _ in range(given.wallets))
            theirs = SPEC_REQUESTS * weight / (given.wallets * pages)
            for workers in given.workers:
                addresses = fleet(connection, rng, pages, workers, given.minutes)
                used = [address.used(WARM_UP_S) for address in addresses]
                asked = sum(one.settled >= WARM_UP_S for address in addresses for one in address.served)
                print(
                    f"  {f'{name} ({pages} a user)':22s} {workers:7d} {weight / sum(used) / LIMIT / 60:7.0f}"
                    f" {given.wallets * pages / SPEC_REQUESTS / 60 / workers:8.0f} {sum(used) / workers:6.1%}"
                    f" {sum(address.window.refused for address in addresses):7d}"
                    f" {max(address.window.peak for address in addresses):9,d}"
                    f" {asked / given.minutes / workers:12.1f}"
                    f"   would weigh {theirs:,.0f} a minute",
                    flush=True,
                )


def worker(
    fills: int, limit: int, latency: float, deadline: str
) -> tuple[float, struct_rusage, int, dict[int, int], bool]:
    """Run a worker over so many fills: seconds, what it used, fills stored, weight by second, whether it met a 429."""
    served = {
        "fill_wallets": WALLETS,
        "fills": fills,
        "history_limit": 0,
        "weight_per_minute": limit,
        "latency": latency,
    }
    with (
        private_server() as url,
        exchange(**served) as where,
        tempfile.NamedTemporaryFile("w", prefix="hlcli-bench-", dir="/tmp") as users,
        ThreadPoolExecutor(1) as pool,
    ):
        env = {**where, "DATABASE_URL": url, "HL_API_WEIGHT_PER_MINUTE": str(limit)}
        timed(env, "init")
        Path(users.name).write_text("\n".join(UserFills(1, wallets=WALLETS, fills=fills).addresses))
        run = pool.submit(timed, env, "backfill", "--users-file", users.name, "--deadline", deadline)
        spent: dict[int, int] = {}
        with psycopg.connect(url, autocommit=True) as connection:
            done = False
            while not done:
                try:
                    run.result(timeout=15)
                    done = True
                except TimeoutError:
                    pass
                # What is younger may still be a reservation.
                spent.update(
                    connection.execute(
                        "select second, weight from rate_budget_buckets"
                        " where second < extract(epoch from clock_timestamp()) - %s",
                        (0 if done else 20,),
                    ).fetchall()
                )
            stored, refused = connection.execute(
                "select (select count(*) from fills), bool_or(blocked_until <> '-infinity') from rate_budget"
            ).fetchone() or (0, False)
        return *run.result(), stored, spent, refused


def used(minutes: int) -> None:
    seconds, usage, stored, spent, refused = worker(400_000, LIMIT, 0.5, f"{minutes}m")
    begin = min(second for second, weight in spent.items() if weight)
    by_minute = [
        sum(spent.get(second, 0) for second in range(begin + 60 * minute, begin + 60 * minute + 60))
        for minute in range(1, minutes)
    ]
    print(
        f"hlcli backfill of full pages at {LIMIT} weight a minute, answers after 0.5 s, {seconds:.0f} s:\n"
        f"  weight by minute after the first: {by_minute}, {sum(by_minute) / LIMIT / len(by_minute):.1%};"
        f" {'REFUSED' if refused else 'never refused'}; {sum(spent.values()):,} weight and {stored:,} fills in all;"
        f" {usage.ru_maxrss / 1024:.0f} MB peak, {usage.ru_utime + usage.ru_stime:.1f} s of CPU",
        flush=True,
    )


def memory() -> None:
    print("peak memory of hlcli backfill, weight for all:")
    for fills in (50_000, 500_000):
        seconds, usage, stored, _, _ = worker(fills, 1_000_000, 0.0, "30m")
        print(
            f"  eight wallets, {fills:,} fills, {stored:,} of them before S3's: {usage.ru_maxrss / 1024:.0f} MB,"
            f" {seconds:.1f} s with start-up, {stored / seconds:,.0f} fills/s",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--what", choices=["clock", "used", "memory"], action="append")
    parser.add_argument("--wallets", type=int, default=100_000)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 4, 10])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--real", type=int, default=5, help="minutes of the real worker")
    given = parser.parse_args()
    what = given.what or ["clock", "used", "memory"]
    if "clock" in what:
        simulated(given)
    if "used" in what:
        used(given.real)
    if "memory" in what:
        memory()


if __name__ == "__main__":
    main()
