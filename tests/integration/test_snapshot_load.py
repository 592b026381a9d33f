"""Snapshots, once a minute, beside a backfill that takes all the weight it can get (faults F24, design 4)."""

import os
import subprocess
import sys
import time

import psycopg
import pytest

from hlcli.sim import Simulator

MINUTES = 4

# Each answer costs 20; 120 is reserved, as for a page of fills that may turn out full.
BACKFILL = """
import sys, threading, time
from hlcli import settings
from hlcli.budget import Budget, DeadlineError, Priority
from hlcli.http import HttpClient
url, info_url, address, seconds = sys.argv[1:]
budget = Budget(settings.from_env({"DATABASE_URL": url, "HL_EGRESS_KEY": "test"}))
client = HttpClient(budget=budget, deadline=time.monotonic() + float(seconds))
def work():
    try:
        while True:
            client.post_json(info_url, {"type": "vaultDetails", "vaultAddress": address}, weight=120,
                             cost_of=lambda answer: 20, priority=Priority.BULK)
    except DeadlineError:
        pass
workers = [threading.Thread(target=work) for _ in range(4)]
for worker in workers: worker.start()
for worker in workers: worker.join()
print(budget.requests)
"""


@pytest.mark.long
@pytest.mark.timeout(420)
def test_no_snapshot_is_late_beside_a_backfill_and_nothing_is_refused(database, cli):
    with Simulator(vaults=5, wallets=300, weight_per_minute=1200, latency=0.1) as exchange:
        env = {**exchange.env(), "DATABASE_URL": database, "HL_EGRESS_KEY": "test"}
        assert cli("universe", "refresh", "--size", "200", **env).returncode == 0
        backfills = [
            subprocess.Popen(
                [
                    sys.executable,
                    "-c",
                    BACKFILL,
                    database,
                    exchange.info_url,
                    exchange.vaults.addresses[number],
                    str(60 * (MINUTES + 1)),
                ],
                stdout=subprocess.PIPE,
                text=True,
                env={**os.environ, **env},
            )
            for number in range(2)
        ]
        began = time.monotonic()
        codes = []
        for _ in range(MINUTES):
            time.sleep(60 - time.time() % 60)  # as cron does
            codes.append(cli("snapshot", **env).returncode)
        ended = time.monotonic()
        done = 0
        for backfill in backfills:
            out, _ = backfill.communicate(timeout=150)
            assert backfill.returncode == 0
            done += int(out)
        used = sum(served.weight for served in exchange.log if began <= served.at < ended) / (ended - began)
    with psycopg.connect(database) as connection:
        minutes = connection.execute(
            "select r.status, r.duration_ms, l.finished_at - r.snapshot_ts < interval '1 minute'"
            " from ingest_runs r join ingestion_runs l on l.run_id = r.ledger_run_id order by r.snapshot_ts"
        ).fetchall()
    told = f"refused {exchange.refused}, used {used * 60 / 1200:.1%} of 1200, backfill requests {done}, {minutes}"
    print(told)
    assert exchange.refused == 0, told
    assert codes == [0] * MINUTES, told
    assert [(status, in_time) for status, _, in_time in minutes] == [("success", True)] * MINUTES, told
    assert used * 60 / 1200 > 0.9, told
