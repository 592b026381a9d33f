"""``python -m hlcli.sim``: the simulator as a process of its own.

Prints one JSON line with its addresses, then serves until it is told to stop.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from time import time

from hlcli.sim.faults import Fault, load_faults
from hlcli.sim.server import Simulator
from hlcli.sim.user_fills import HISTORY_LIMIT, PAGE_LIMIT, UserFills
from hlcli.sim.values import HOUR_MS


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until SIGTERM, SIGINT or, with ``--until-eof``, the end of stdin."""
    parser = _parser()
    options = parser.parse_args(argv)
    faults: list[Fault] = []
    if options.faults is not None:
        try:
            faults = load_faults(options.faults.read_bytes())
        except (OSError, ValueError) as error:
            parser.error(f"--faults: {error}")
    hour_ms = (int(time() * 1000) if options.now_ms is None else options.now_ms) // HOUR_MS * HOUR_MS
    try:
        user_fills = UserFills(
            options.seed,
            wallets=options.fill_wallets,
            fills=options.fills,
            recent_before_ms=hour_ms,
            page_limit=options.page_limit,
            history_limit=options.history_limit or None,
        )
    except ValueError as error:
        parser.error(f"--fills: {error}")
    done = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: done.set())
    simulator = Simulator(
        seed=options.seed,
        vaults=options.vaults,
        wallets=options.wallets,
        weight_per_minute=options.weight_per_minute,
        latency=options.latency,
        faults=faults,
        now_ms=options.now_ms,
        port=options.port,
        user_fills=user_fills,
    )
    with simulator:
        urls = {"info_url": simulator.info_url, "stats_url": simulator.stats_url, "url": simulator.url}
        print(json.dumps(urls), flush=True)
        if options.until_eof:
            threading.Thread(target=_wait_for_eof, args=(done,), daemon=True).start()
        done.wait()
    return 0


def _wait_for_eof(done: threading.Event) -> None:
    """Set the event when stdin ends: a child that waits for this dies with its parent."""
    # The descriptor itself: a daemon thread inside a buffered read would make the interpreter abort at exit.
    while os.read(0, 4096):
        pass
    done.set()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m hlcli.sim", description="A simulated exchange on loopback."
    )
    parser.add_argument("--port", type=int, default=0, help="port to listen on (0: any free one)")
    parser.add_argument("--vaults", type=int, default=300, help="number of vaults")
    parser.add_argument("--wallets", type=int, default=300, help="number of wallets")
    parser.add_argument("--weight-per-minute", type=int, default=1200, help="weight budget of the server")
    parser.add_argument("--fill-wallets", type=int, default=120, help="number of wallets with fills")
    parser.add_argument("--fills", type=int, default=20_000, help="number of their fills (even)")
    parser.add_argument("--page-limit", type=int, default=PAGE_LIMIT, help="fills on a page")
    parser.add_argument(
        "--history-limit",
        type=int,
        default=HISTORY_LIMIT,
        help="newest fills of a wallet that exist (0: all)",
    )
    parser.add_argument("--latency", type=float, default=0.0, help="seconds before each answer")
    parser.add_argument("--seed", type=int, default=1, help="seed of the data")
    parser.add_argument("--faults", type=Path, help="JSON file with an array of faults")
    parser.add_argument(
        "--now-ms", type=int, help="the exchange's clock (default: this hour; the wallets': real time)"
    )
    parser.add_argument("--until-eof", action="store_true", help="also stop when stdin is closed")
    return parser


if __name__ == "__main__":
    sys.exit(main())
