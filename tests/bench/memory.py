"""Peak memory and time of `hlcli ingest vaults --limit 0` on a list of 9,500 vaults (15 MB).

python -m tests.bench.memory [--vaults 9500]
"""

from __future__ import annotations

import argparse

from tests.bench.server import exchange, private_server, timed


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--vaults", type=int, default=9500)
    vaults = parser.parse_args().vaults
    with private_server() as url, exchange(vaults=vaults) as env:
        timed({**env, "DATABASE_URL": url}, "init")
        seconds, usage = timed({**env, "DATABASE_URL": url}, "ingest", "vaults", "--limit", "0")
    print(f"{vaults:,} vaults from the list into the table:")
    print(f"  peak memory {usage.ru_maxrss / 1024:.0f} MB, {seconds:.1f} s with start-up")


if __name__ == "__main__":
    main()
