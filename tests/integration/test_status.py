"""`hlcli status`: missing, failed, stale, running, ok; told in words, in JSON and by the exit code."""

from __future__ import annotations

import json
from datetime import timedelta

import pytest
from vault_tables import PLENTY

from hlcli.exitcodes import ExitCode, UsageError
from hlcli.jobs.ingest_vaults import CHANNEL, Options, ingest_vaults
from hlcli.jobs.status import read_status
from hlcli.migrations import LOCK_NAMESPACE
from hlcli.sim import Simulator

VAULTS = "hyperliquid/vaults"


@pytest.fixture
def health(settings):
    def ask():
        (found,) = read_status(settings(), [VAULTS]).health
        return found

    return ask


def ended(connection, status, *, ago="0 s", code=0, **numbers):
    """A run in the ledger that ended so long ago."""
    columns = "".join(f", {name}" for name in numbers)
    connection.execute(
        "insert into ingestion_runs (run_id, source, channel, status, started_at, finished_at, exit_code, error,"
        f" host, pid, version{columns}) values (gen_random_uuid(), 'hyperliquid', 'vaults', %s,"
        " clock_timestamp() - %s::interval - interval '1 s',"
        f" case when %s <> 'running' then clock_timestamp() - %s::interval end, %s, %s, 'h', 1, 'v'"
        f"{', %s' * len(numbers)})",
        (status, ago, status, ago, code, "why" if code else None, *numbers.values()),
    )


def test_a_channel_that_never_ran_is_missing(health):
    found = health()
    assert (found.state, found.last_success, found.last_status, found.rows) == ("missing", None, None, 0)


@pytest.mark.parametrize("status", ["ok", "partial"])
def test_a_recent_success_is_ok(health, connection, status):
    ended(
        connection, status, rows_inserted=3, rows_updated=4, rows_unchanged=5, rows_rejected=6, rows_served=18
    )
    found = health()
    assert (found.state, found.last_status, found.rows, found.rejected) == ("ok", status, 7, 6)
    assert timedelta(0) <= found.age < timedelta(minutes=2)


def test_a_success_older_than_two_cadences_is_stale(health, connection):
    ended(connection, "ok", ago="119 min")
    assert health().state == "ok"
    connection.execute("truncate ingestion_runs")
    ended(connection, "ok", ago="121 min")
    assert health().state == "stale"


@pytest.mark.parametrize("status", ["failed", "interrupted", "abandoned", "running"])
def test_a_bad_end_is_failed_however_fresh_the_success_before_it(health, connection, status):
    """A `running` row whose lock nobody holds is a dead run."""
    ended(connection, "ok", ago="10 min")
    ended(connection, status, code=4)
    found = health()
    assert (found.state, found.error) == ("failed", "why")
    assert found.last_status == ("abandoned" if status == "running" else status)
    assert found.last_success is not None


def test_a_success_after_a_failure_is_ok_again(health, connection):
    ended(connection, "failed", ago="10 min", code=4)
    ended(connection, "ok")
    assert health().state == "ok"


def test_a_run_that_holds_its_lock_is_running_and_keeps_the_last_success(health, connection):
    ended(connection, "ok", ago="10 min")
    ended(connection, "running")
    connection.execute("select pg_advisory_lock(%s, %s)", (LOCK_NAMESPACE, CHANNEL.lock_key))
    found = health()
    assert (found.state, found.last_status) == ("running", "ok")
    assert timedelta(minutes=9) < found.age


def test_skips_in_a_row_are_counted_from_the_last_real_run(health, connection):
    ended(connection, "skipped", ago="50 min")
    ended(connection, "ok", ago="40 min")
    for minutes in (30, 20, 10):
        ended(connection, "skipped", ago=f"{minutes} min")
    found = health()
    assert (found.skips, found.state, found.last_status) == (3, "ok", "ok")


def test_check_exits_3_for_failed_and_stale_and_for_missing_only_when_named(settings, connection):
    def code(*names):
        return read_status(settings(), names).exit_code(named=bool(names))

    assert code() is ExitCode.OK
    assert code("vaults") is ExitCode.PARTIAL
    ended(connection, "ok")
    assert code("vaults") is code(VAULTS) is code() is ExitCode.OK
    ended(connection, "failed", code=4)
    assert code("vaults") is code() is ExitCode.PARTIAL
    connection.execute("truncate ingestion_runs")
    ended(connection, "ok", ago="3 h")
    assert code() is ExitCode.PARTIAL


def test_an_unknown_channel_is_a_usage_error(settings):
    with pytest.raises(UsageError, match="hyperliquid/vaults"):
        read_status(settings(), ["valuts"])


def test_the_command_says_it_in_json_and_by_its_exit_code(cli, database, connection, settings):
    with Simulator(vaults=20, weight_per_minute=100_000) as sim:
        ingest_vaults(settings(**sim.env(), **PLENTY), Options(limit=5))
    connection.execute("update ingestion_runs set finished_at = finished_at - interval '3 h'")
    env = {"DATABASE_URL": database}
    done = cli("status", "--json", "--check", **env)
    assert (done.returncode, done.stderr) == (3, "")
    told = json.loads(done.stdout)
    assert told["schema_version"] == 1
    channels = {each["channel"]: each for each in told["channels"]}
    assert channels[VAULTS]["state"] == "stale"
    assert channels[VAULTS]["age"] > 3 * 3600
    assert channels[VAULTS]["last_success"].endswith("Z")
    assert channels["hyperliquid/top_500_vaults"]["state"] == "missing"
    (budget,) = told["budgets"]
    assert (budget["egress_key"], budget["weight"], budget["requests"], budget["limit"]) == (
        "test",
        100,
        5,
        1200,
    )
    # Without --check the state is told, not judged; without a terminal as tab-separated lines.
    done = cli("status", "--channel", "vaults", **env)
    assert done.returncode == 0
    header, row, *_ = done.stdout.splitlines()
    assert dict(zip(header.split("\t"), row.split("\t"), strict=True))["state"] == "stale"
    assert cli("status", "--channel", "nonsense", **env).returncode == 2


def test_a_closed_gate_is_shown(settings, connection):
    connection.execute(
        "insert into rate_budget (egress_key, blocked_until) values ('a', now() + interval '1 min'), ('b', now())"
    )
    uses = read_status(settings()).budgets
    assert [(use.egress_key, use.blocked_until is not None) for use in uses] == [("a", True), ("b", False)]
