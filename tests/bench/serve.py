"""Latency of `hlcli serve` against its bare query, both with 20 clients.

    python -m tests.bench.serve [--rows 1000000] [--clients 20] [--seconds 10] [--rounds 2] [--days 365]

A table of --rows statuses of 10,000 wallets over a year; each question is for a random wallet and --days of it. The bare
query is the API's own, through as many kept connections with the API's settings, its answer fetched as text. Both kinds
of clients wait in threads of the same number of processes, and the HTTP ones use bare sockets, so that what is
measured is the server. The bare query and the API take turns; the best round of each counts.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg

from hlcli import db, migrations
from hlcli.serve.app import LISTS
from hlcli.serve.pool import READ_ONLY, STATEMENT_TIMEOUT
from tests.bench.server import private_server

WALLETS = 10_000
PROCESSES = 4
YEAR = datetime(2025, 1, 1, tzinfo=UTC)

# Two rows a TWAP, as the node writes them: activated, and half an hour later finished.
FILL = """
insert into twap_status (twap_id, wallet, ts, status, asset, side, size_requested, size_executed, notional_executed,
    duration_minutes, created_at, ts_kind, event_time_ns, s3_object_key, s3_last_modified, object_id, raw_payload)
select id, wallet, ts, status, asset, side, '1234.5'::numeric, executed, notional, 30, created, 'event',
    (extract(epoch from ts) * 1e9)::bigint, 'raw/twap_statuses/bench', created, 1,
    jsonb_build_object('time', to_char(ts, 'YYYY-MM-DD"T"HH24:MI:SS.US') || '123', 'twap_id', id, 'status', status,
        'state', jsonb_build_object('coin', asset, 'user', wallet, 'side', side, 'sz', '1234.5', 'executedSz',
            executed::text, 'executedNtl', notional::text, 'minutes', 30, 'reduceOnly', false, 'randomize', true,
            'timestamp', (extract(epoch from created) * 1000)::bigint))
from (select 100000 + n id, '0x' || encode(substring(sha256((n * 7919 %% %(wallets)s)::text::bytea) for 20), 'hex') wallet,
             (array['BTC', 'ETH', 'HYPE', 'SOL', 'kPEPE'])[1 + n %% 5] asset, (array['A', 'B'])[1 + n / 5 %% 2] side,
             %(year)s + n * interval '365 days' / %(twaps)s created
      from generate_series(1::bigint, %(twaps)s) n) twap,
     lateral (values ('activated', created + interval '17 ms', 0::numeric, 0::numeric),
                     ('finished', created + interval '30 minutes', '1234.5', '98765.432109'))
         event (status, ts, executed, notional)
"""


def questions(days: int, wallets: list[str], seed: int) -> Iterator[tuple[str, datetime, datetime]]:
    rnd = random.Random(seed)
    while True:
        start = YEAR + timedelta(days=rnd.randrange(366 - days))
        yield rnd.choice(wallets), start, start + timedelta(days=days)


def ask_database(target: str) -> Callable[..., int]:
    connection = psycopg.connect(target, **db.keywords("bench"))
    connection.execute(db.SESSION)
    connection.execute(READ_ONLY, (f"{STATEMENT_TIMEOUT}s",))

    def ask(wallet: str, start: datetime, end: datetime) -> int:
        values = {"wallet": wallet, "start": start, "end": end, "asset": None, "limit": 500}
        row: Any = connection.execute(
            LISTS["event"], values | {"latest_per_twap": True, "by": "event"}
        ).fetchone()
        return len(row[0])

    return ask


def ask_api(target: str) -> Callable[..., int]:
    host, port = target.split(":")
    connection = socket.create_connection((host, int(port)))
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def ask(wallet: str, start: datetime, end: datetime) -> int:
        path = f"/api/v1/twaps?wallet={wallet}&start={start:%Y-%m-%dT%H:%M:%SZ}&end={end:%Y-%m-%dT%H:%M:%SZ}"
        connection.sendall(f"GET {path} HTTP/1.1\r\nHost: {target}\r\n\r\n".encode())
        got = b""
        while b"\r\n\r\n" not in got:
            got += connection.recv(65536) or sys.exit("the server hung up")
        head, _, body = got.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 "), got
        length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
        left = length - len(body)
        while left:
            left -= len(connection.recv(min(left, 1 << 20))) or sys.exit("the server hung up")
        return length

    return ask


def clients(
    kind: str, target: str, number: int, seconds: float, days: int, wallets: list[str], seed: int, out: Any
) -> None:
    """One process: `number` clients that ask without pause; puts the latencies in seconds, and the bytes."""
    taken: list[list[float]] = [[] for _ in range(number)]
    size = [0] * number
    connect = {"sql": ask_database, "http": ask_api}[kind]
    asks = [connect(target) for _ in range(number)]
    began = time.perf_counter()

    def one(place: int) -> None:
        ask = asks[place]
        for question in questions(days, wallets, seed + place):
            start = time.perf_counter()
            answer = ask(*question)
            end = time.perf_counter()
            if end > began + 1:  # the first second warms up
                size[place] += answer
                taken[place].append(end - start)
            if end > began + 1 + seconds:
                return

    threads = [threading.Thread(target=one, args=(place,)) for place in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    out.put(([each for one in taken for each in one], sum(size)))


def measure(kind: str, target: str, options: argparse.Namespace, wallets: list[str]) -> dict[str, float]:
    context = multiprocessing.get_context("spawn")
    out = context.Queue()
    running = []
    for place in range(PROCESSES):
        number = options.clients // PROCESSES + (place < options.clients % PROCESSES)
        arguments = (kind, target, number, options.seconds, options.days, wallets, 1000 * place, out)
        running.append(context.Process(target=clients, args=arguments))
        running[-1].start()
    found = [out.get(timeout=options.seconds + 60) for _ in running]
    for process in running:
        process.join()
    taken = sorted(each for times, _ in found for each in times)
    return {
        "per second": len(taken) / options.seconds,
        "p50 ms": taken[len(taken) // 2] * 1000,
        "p99 ms": taken[len(taken) * 99 // 100] * 1000,
        "KB each": sum(size for _, size in found) / len(taken) / 1000,
    }


@contextmanager
def served(url: str) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {**os.environ, "DATABASE_URL": url}
    process = subprocess.Popen([sys.executable, "-m", "hlcli", "serve", "--port", str(port)], env=env)
    try:
        for _ in range(200):
            try:
                socket.create_connection(("127.0.0.1", port)).close()
                break
            except ConnectionRefusedError:
                time.sleep(0.05)
        yield f"127.0.0.1:{port}"
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--clients", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--days", type=int, default=365)
    options = parser.parse_args()
    with private_server() as url:
        with psycopg.connect(url, autocommit=True) as connection:
            migrations.migrate(connection)
            values = {"twaps": options.rows // 2, "wallets": WALLETS, "year": YEAR}
            connection.execute(FILL, values)
            connection.execute("vacuum analyze twap_status")
            connection.execute("checkpoint")
            wallets = [wallet for (wallet,) in connection.execute("select distinct wallet from twap_status")]
        rounds: list[dict[str, dict[str, float]]] = []
        with served(url) as api:
            for _ in range(options.rounds):
                rounds.append(
                    {
                        kind: measure(kind, target, options, wallets)
                        for kind, target in (("sql", url), ("http", api))
                    }
                )
                for kind, found in rounds[-1].items():
                    print(f"  {kind:5s}" + "".join(f"{value:10.1f} {name}" for name, value in found.items()))
    best = {
        kind: min((each[kind] for each in rounds), key=lambda found: found["p99 ms"])
        for kind in ("sql", "http")
    }
    print(f"{options.rows:,} rows, {options.clients} clients, {options.days} days: API / bare query")
    for name in ("p50 ms", "p99 ms"):
        print(f"  {name} {best['http'][name] / best['sql'][name]:.2f}")


if __name__ == "__main__":
    main()
