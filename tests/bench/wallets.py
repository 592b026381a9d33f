"""`hlcli snapshot` of 200 wallets against what its requests must take; `hlcli universe refresh` on a full leaderboard.

python -m tests.bench.wallets [--latency 0.2] [--rows 47500]
"""

from __future__ import annotations

import argparse
import time

from tests.bench.server import exchange, private_server, timed

WALLETS, CONCURRENCY, RUNS = 200, 8, 5


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--latency", type=float, default=0.2)
    parser.add_argument("--rows", type=int, default=47_500)
    options = parser.parse_args()
    with private_server() as url:
        env = {"DATABASE_URL": url, "HL_API_WEIGHT_PER_MINUTE": "100000"}
        with exchange(wallets=options.rows) as where:
            timed({**env, **where}, "init")
            seconds, usage = timed({**env, **where}, "universe", "refresh", "--size", str(WALLETS))
            print(f"universe refresh, {options.rows:,} rows:")
            print(f"  peak memory {usage.ru_maxrss / 1024:.0f} MB, {seconds:.1f} s with start-up")
        ideal = WALLETS / CONCURRENCY * options.latency
        print(
            f"snapshot of {WALLETS} wallets, {CONCURRENCY} at once, {options.latency:g} s each: {ideal:.2f} s ideal"
        )
        with exchange(wallets=options.rows, weight_per_minute=100_000, latency=options.latency) as where:
            for ago in range(RUNS, 0, -1):
                # Minutes two apart, each begun five seconds ago.
                shift = 5 - time.time() % 60 - 120 * ago
                clock = {"PGOPTIONS": f"-c hlcli.clock_offset={shift:.0f}s"}
                seconds, usage = timed({**env, **where, **clock}, "snapshot")
                again, _ = timed({**env, **where, **clock}, "snapshot")
                print(
                    f"  {seconds:.2f} s, of which start-up (the same with nothing to ask) {again:.2f} s:"
                    f" {(seconds - again) / ideal:.2f}x; {usage.ru_utime + usage.ru_stime:.2f} s of CPU,"
                    f" {usage.ru_maxrss / 1024:.0f} MB"
                )


if __name__ == "__main__":
    main()
