"""The same commands on a plain server of the distribution: the oldest one found is used."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import psycopg
import pytest
from vault_tables import METRICS, PLENTY, TOP, VAULTS, assert_ledger_adds_up, assert_nothing_left, dump

from hlcli.sim import Simulator

_FOUND = sorted(
    (folder for folder in Path("/usr/lib/postgresql").glob("*/bin") if (folder / "initdb").exists()),
    key=lambda folder: int(folder.parent.name) if folder.parent.name.isdigit() else 0,
)
BINARIES = [folder for folder in _FOUND if folder.parent.name.isdigit() and int(folder.parent.name) >= 14]

pytestmark = pytest.mark.skipif(not BINARIES, reason="no PostgreSQL of the distribution is installed")


def as_postgres(*command):
    """Run a server program as a user that may run one: it refuses to work for root."""
    prefix = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []
    done = subprocess.run(
        [*prefix, *map(str, command)], capture_output=True, text=True, cwd="/tmp", timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def plain_server():
    folder = Path(tempfile.mkdtemp(prefix="hlcli-pg-", dir="/tmp"))
    data, binaries = folder / "data", BINARIES[0]
    try:
        if os.geteuid() == 0:
            shutil.chown(folder, "postgres", "postgres")
        as_postgres(
            binaries / "initdb", "-D", data, "-U", "postgres", "-A", "trust", "-N", "--locale=C", "-E", "UTF8"
        )
        options = f"-c listen_addresses='' -c unix_socket_directories='{folder}' -c fsync=off"
        as_postgres(binaries / "pg_ctl", "-D", data, "-w", "-l", folder / "log", "-o", options, "start")
        try:
            yield f"host={folder} user=postgres dbname=postgres"
        finally:
            as_postgres(binaries / "pg_ctl", "-D", data, "-w", "-m", "immediate", "stop")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def test_a_plain_server_holds_what_the_embedded_one_holds(plain_server, database, connection, cli):
    # One universe for all runs; more than one batch, closed vaults and a NULL to rank around among them.
    with Simulator(vaults=60, weight_per_minute=100_000) as sim:
        env = {**PLENTY, **sim.env(), "HL_EGRESS_KEY": "test"}

        def run(*args, url):
            done = cli(*args, DATABASE_URL=url, **env)
            assert (done.returncode, done.stderr) == (0, ""), args
            return done.stdout

        assert "applied 0001" in run("init", url=plain_server)
        assert run("init", url=plain_server) == "the schema is up to date\n"
        for url in (plain_server, database):
            run("ingest", "vaults", "--include-closed", url=url)
            run("rank", "vaults", url=url)
        with psycopg.connect(plain_server, autocommit=True, options="-c TimeZone=UTC") as plain:
            assert plain.info.server_version // 10000 == int(BINARIES[0].parent.name)
            first = {table: dump(plain, table, without=()) for table in (VAULTS, METRICS, TOP)}
            run("ingest", "vaults", "--include-closed", "--limit", "0", url=plain_server)
            run("rank", "vaults", url=plain_server)
            assert {table: dump(plain, table, without=()) for table in first} == first
            clock = ("created_at", "updated_at", "observed_at", "metrics_time")
            for table in first:
                assert dump(plain, table, without=clock) == dump(connection, table, without=clock) != []
            assert_ledger_adds_up(plain)
            assert_nothing_left(plain)
        assert "hyperliquid/vaults\tok" in run("status", "--check", url=plain_server)
