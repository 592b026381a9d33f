"""`hlcli signals compute|show` and the snapshots in `hlcli status`, as processes."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta

import pytest
from test_cli import NOWHERE, on_terminal
from vault_tables import runs

from hlcli.jobs.compute_signals import CHANNEL
from hlcli.migrations import LOCK_NAMESPACE

T = datetime(2026, 3, 10, 12, 5, tzinfo=UTC)
NOW = T + timedelta(minutes=2, seconds=30)
FIVE = timedelta(minutes=5)
WALLETS = 12


@pytest.fixture
def env(database, connection):
    """The database's clock stands still two and a half minutes after T."""
    connection.execute(
        "create or replace function hlcli_now() returns timestamptz language sql volatile"
        f" as $$ select timestamptz '{NOW.isoformat()}' $$"
    )
    return {"DATABASE_URL": database, "HL_EGRESS_KEY": "test"}


def put_snapshots(connection, *, minutes):
    """Wallets that hold what they hold, in the minutes up to T."""
    connection.execute(
        "insert into ingest_runs (snapshot_ts, status, wallets_expected, wallets_succeeded, wallets_failed,"
        " rows_expected, rows_written, coverage_pct, duration_ms, ledger_run_id)"
        " select %s::timestamptz - make_interval(mins => m), 'success', %s, %s, 0, 24, 24, 97.5, 1,"
        " gen_random_uuid() from generate_series(0, %s - 1) m",
        (T, WALLETS, WALLETS, minutes),
    )
    connection.execute(
        "insert into wallet_snapshots (snapshot_ts, wallet_id, asset, position_szi, ingest_run_id)"
        " select %s::timestamptz - make_interval(mins => m), '0x' || lpad(to_hex(n), 40, '0'), asset, 100 * n, 1"
        " from generate_series(0, %s - 1) m, generate_series(1, %s) n, unnest(array['BTC', 'xyz:GOLD']) asset",
        (T, minutes, WALLETS),
    )


def put_signal(connection, moment, asset, version="v2", **columns):
    """A row of signals; every column that is not given is the most unremarkable."""
    row = {
        "signal_ts": moment,
        "asset": asset,
        "formula_version": version,
        "alignment_score": "50.123456",
        "alignment_trend": "flat",
        "allowed_playbook": "No-trade",
        "risk_mode": "Reduced",
        "add_exposure": False,
        "tighten_stops": False,
        **dict.fromkeys(
            ("add_long_count", "add_short_count", "reducer_count", "holder_count", "missing_count"), 0
        ),
        "wallet_count": 200,
        "dirty_count": 0,
        "snapshot_count": 5,
        "is_degraded": columns.get("degraded_reason") is not None,
        "computation_ms": 1,
        **columns,
    }
    connection.execute(
        f"insert into signals ({', '.join(row)}) values ({', '.join(['%s'] * len(row))})", list(row.values())
    )


def put_alert(connection, moment, asset, message, **columns):
    row = {
        "alert_ts": moment,
        "asset": asset,
        "alert_type": "regime_change",
        "severity": "medium",
        "message": message,
        **columns,
    }
    connection.execute(
        f"insert into alerts ({', '.join(row)}) values ({', '.join(['%s'] * len(row))})", list(row.values())
    )


def shown(done):
    """The table that a pipe gets, as a list of rows by column."""
    assert (done.returncode, done.stderr) == (0, "")
    head, *lines = [line.split("\t") for line in done.stdout.splitlines()]
    return [dict(zip(head, line, strict=True)) for line in lines]


# --- signals compute ----------------------------------------------------------------------------------------------


def test_compute_is_silent_and_its_report_is_the_ledgers(cli, env, connection):
    put_snapshots(connection, minutes=16)
    done = cli("signals", "compute", **env)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    told = json.loads(cli("signals", "compute", "--since", "2026-03-10T11:00", "--json", **env).stdout)
    first, second = runs(connection, CHANNEL.name)
    # Two windows of two assets in two versions, and the contributors.
    assert (first["rows_inserted"], second["rows_unchanged"]) == (2 * 2 * 3, 2 * 2 * 3)
    assert (told["schema_version"], told["status"], told["exit_code"]) == (1, "ok", 0)
    assert told["channel"] == "hyperliquid/wallet_signals"
    assert told["run_id"] == str(second["run_id"])
    assert (told["numbers"]["unchanged"], told["numbers"]["units_ok"]) == (12, second["units_ok"])
    assert told["details"]["newest_window"] == "2026-03-10T12:05:00Z"
    assert (told["details"]["windows"], told["details"]["alerts"]) == (2, 0)
    assert told["details"]["skipped"] == second["details"]["skipped"]
    assert sum(told["details"]["skipped"].values()) == 2


def test_a_terminal_is_told_what_was_computed_and_what_was_skipped(env, connection, tmp_path):
    put_snapshots(connection, minutes=16)
    code, lines = on_terminal(["signals", "compute"], env, columns=80, cwd=tmp_path)
    text = "\n".join(lines)
    assert code == 0
    assert "hyperliquid/wallet_signals: ok" in text
    assert "windows: 2" in text
    assert "of 5 snapshots" in text


WRONG = {
    ("--at", "2026-03-10T12:10Z"): "the newest window that can be computed ends 2026-03-10 12:05Z",
    ("--at", "2026-03-10T12:04Z"): "multiples of five minutes",
}


@pytest.mark.parametrize(("args", "message"), WRONG.items(), ids=[" ".join(args) for args in WRONG])
def test_a_window_that_cannot_be_computed_exits_2(cli, env, connection, args, message):
    put_snapshots(connection, minutes=10)
    done = cli("signals", "compute", *args, **env)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert message in done.stderr
    assert connection.execute("select count(*) from signals").fetchone() == (0,)


@pytest.mark.parametrize("time", ["9999-12-31T23:58Z", "0001-01-01T00:00Z"])
def test_the_ends_of_time_are_wrong_usage_and_no_bug(cli, env, connection, time):
    put_snapshots(connection, minutes=10)
    done = cli("signals", "compute", "--at", time, **env)
    assert (done.returncode, done.stdout) == (2, "")
    assert "bug" not in done.stderr


USAGE = [
    ("compute", "--at", "2026-03-10T12:05Z", "--since", "2026-03-10T12:00Z"),
    ("compute", "--since", "-1h"),
    ("show", "--version", "v3"),
    ("show", "--limit", "0"),
]


@pytest.mark.parametrize("args", USAGE, ids=" ".join)
def test_wrong_usage_exits_2_before_the_database_is_asked(cli, args):
    done = cli("signals", *args, DATABASE_URL=NOWHERE)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr
    assert "Traceback" not in done.stderr


def test_a_second_compute_at_once_exits_6_where_that_is_wanted(cli, env, connection):
    connection.execute("select pg_advisory_lock(%s, %s)", (LOCK_NAMESPACE, CHANNEL.lock_key))
    done = cli("signals", "compute", "--fail-if-locked", **env)
    assert (done.returncode, done.stdout, done.stderr.count("another run holds the lock")) == (6, "", 2)


# --- signals show -------------------------------------------------------------------------------------------------


@pytest.fixture
def market(connection):
    """Three windows of three assets, and alerts."""
    for back in range(3):
        put_signal(connection, T - back * FIVE, "BTC", alignment_score=70 + back)
        put_signal(connection, T - back * FIVE, "BTC", "v1", alignment_score=50)
    put_signal(connection, T, "ETH", degraded_reason="4 of 5 snapshots; partial snapshots")
    put_signal(
        connection,
        T,
        "xyz:GOLD",
        alignment_score="83.333333",
        alignment_score_ntl="91.500000",
        alignment_trend="rising",
        dispersion_index="12.07",
        exit_cluster_score="7.692308",
        exit_cluster_size="3.1",
        exit_cluster_z="-0.449",
        allowed_playbook="Long-only",
        risk_mode="Normal",
        add_exposure=True,
        add_long_count=20,
        holder_count=13,
        wallet_count=199,
        missing_count=1,
    )
    put_alert(connection, T - FIVE, "BTC", "BTC: No-trade became Long-only")
    put_alert(connection, T, "ETH", "ETH: told to nobody", suppressed=True)


def test_show_is_the_newest_window_of_v2(cli, env, market):
    done = cli("signals", "show", **env)
    assert (done.returncode, done.stderr) == (0, "")
    *lines, alert = done.stdout.splitlines()
    assert [line.split("\t") for line in lines] == [
        "time asset v align trend disp exit z playbook risk degraded".split(),
        ["03-10 12:05", "BTC", "v2", "70.0", "flat", "-", "-", "-", "No-trade", "Reduced", "-"],
        [
            *("03-10 12:05", "ETH", "v2", "50.1", "flat", "-", "-", "-", "No-trade", "Reduced"),
            "4 of 5 snapshots; partial snapshots",
        ],
        [
            *("03-10 12:05", "xyz:GOLD", "v2", "83.3", "rising", "12.1", "7.7", "-0.4"),
            *("Long-only", "Normal", "-"),
        ],
    ]
    assert alert == "03-10 12:00 medium: BTC: No-trade became Long-only"


def test_show_takes_assets_versions_a_time_and_a_limit(cli, env, market, connection):
    connection.execute("truncate alerts")

    def found(*args):
        return [(row["time"][-5:], row["asset"]) for row in shown(cli("signals", "show", *args, **env))]

    assert found("--asset", "xyz:GOLD", "--asset", "BTC") == [("12:05", "BTC"), ("12:05", "xyz:GOLD")]
    both = shown(cli("signals", "show", "--version", "all", "--asset", "BTC", **env))
    assert [(row["asset"], row["v"]) for row in both] == [("BTC", "v1"), ("BTC", "v2")]
    btc = [("12:05", "BTC"), ("12:00", "BTC"), ("11:55", "BTC")]
    assert found("--since", "2026-03-10T11:55:00Z", "--asset", "BTC") == btc
    assert found("--since", "2026-03-10", "--asset", "BTC", "--version", "v1", "--limit", "2") == btc[:2]
    assert found("--since", "2026-03-10T13:55:01+02:00", "--asset", "BTC") == btc[:2]


def test_show_as_json_has_every_column_with_its_digits(cli, env, market, connection):
    told = json.loads(cli("signals", "show", "--json", "--asset", "xyz:GOLD", **env).stdout)
    assert told.keys() == {"schema_version", "signals", "alerts"}
    assert told["signals"] == [
        {
            "signal_ts": "2026-03-10T12:05:00Z",
            "asset": "xyz:GOLD",
            "formula_version": "v2",
            "alignment_score": "83.333333",
            "alignment_score_ntl": "91.500000",
            "alignment_trend": "rising",
            "dispersion_index": "12.07",
            "exit_cluster_score": "7.692308",
            "exit_cluster_size": "3.1",
            "exit_cluster_z": "-0.449",
            "allowed_playbook": "Long-only",
            "risk_mode": "Normal",
            "add_exposure": True,
            "tighten_stops": False,
            "add_long_count": 20,
            "add_short_count": 0,
            "reducer_count": 0,
            "holder_count": 13,
            "wallet_count": 199,
            "missing_count": 1,
            "dirty_count": 0,
            "snapshot_count": 5,
            "is_degraded": False,
            "degraded_reason": None,
        }
    ]
    assert told["alerts"] == [
        {
            "alert_ts": "2026-03-10T12:00:00Z",
            "asset": "BTC",
            "alert_type": "regime_change",
            "severity": "medium",
            "message": "BTC: No-trade became Long-only",
        }
    ]


def test_show_without_any_signal_is_empty(cli, env):
    told = json.loads(cli("signals", "show", "--json", **env).stdout)
    assert (told["signals"], told["alerts"]) == ([], [])


def test_show_tells_the_days_five_newest_alerts_trouble_with_the_data_first(cli, env, connection):
    for minutes in range(7):
        put_alert(connection, NOW - timedelta(minutes=minutes), "BTC", f"alert {minutes}")
    long_ago = NOW - timedelta(hours=23)
    system = {"alert_type": "system_stale", "severity": "critical"}
    put_alert(connection, long_ago, "SYSTEM", "no usable snapshot at all", **system)
    _, *lines = cli("signals", "show", **env).stdout.splitlines()
    assert [line.split(" ", 2)[2] for line in lines] == [
        "critical: no usable snapshot at all",
        *(f"medium: alert {minutes}" for minutes in range(4)),
    ]


@pytest.mark.parametrize("columns", [80, 250])
def test_the_table_fits_the_terminal(env, market, connection, tmp_path, columns):
    # The longest that there can be of everything.
    put_signal(
        connection,
        T,
        "abcdefghijkl:" + "X" * 24,
        alignment_score=100,
        alignment_trend="falling",
        dispersion_index=100,
        exit_cluster_score=100,
        exit_cluster_z="-123.456",
        allowed_playbook="Short-only",
        risk_mode="Defensive",
        wallet_count=20_000,
        degraded_reason="4 of 5 snapshots; partial snapshots; under 80 % of the wallets known; over 10 % dirty;"
        " 10 % or more missing",
    )
    wide = {**env, "COLUMNS": str(columns)}  # a parent may have told of another terminal
    code, lines = on_terminal(["signals", "show", "--version", "all"], wide, columns=columns, cwd=tmp_path)
    text = "\n".join(lines)
    assert code == 0
    assert max(map(len, lines)) <= min(columns, 100)
    assert "BTC: No-trade became Long-only" in text
    if columns > 100:
        assert "xyz:GOLD" in text


# --- status -------------------------------------------------------------------------------------------------------


def test_status_before_the_first_snapshot_tells_of_none(cli, env):
    assert json.loads(cli("status", "--json", **env).stdout)["snapshots"] is None


def test_status_tells_how_fresh_the_snapshots_are(cli, env, connection):
    put_snapshots(connection, minutes=10)
    line = "snapshots degraded: coverage 97.5 % at 12:05Z, last usable 2m ago"
    assert line in cli("status", **env).stdout.splitlines()
    assert json.loads(cli("status", "--json", **env).stdout)["snapshots"] == {
        "health_state": "degraded",
        "coverage_pct": "97.5",
        "last_snapshot_ts": "2026-03-10T12:05:00Z",
        "last_success_snapshot_ts": "2026-03-10T12:05:00Z",
        "snapshot_status": "success",
        "age_s": 150.0,
        "error": None,
    }


def test_status_tells_of_failed_snapshots(cli, env, connection):
    put_snapshots(connection, minutes=1)
    connection.execute("update ingest_runs set status = 'failed', coverage_pct = 12.34, error = 'reset'")
    told = json.loads(cli("status", "--json", **env).stdout)["snapshots"]
    assert (told["health_state"], told["last_success_snapshot_ts"], told["age_s"], told["error"]) == (
        "stale",
        None,
        None,
        "reset",
    )
