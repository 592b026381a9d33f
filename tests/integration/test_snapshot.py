"""`hlcli snapshot` against the simulated exchange and a real database, minute by minute."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
import time
from datetime import timedelta
from decimal import Decimal

import pytest
from vault_tables import PLENTY, assert_ledger_adds_up, assert_nothing_left, runs
from wallet_tables import (
    ASSETS,
    BATCH,
    LEADERBOARD,
    MINUTE,
    MINUTE_MS,
    SNAPSHOTS,
    STATE,
    Clock,
    anomalies,
    assert_minutes_add_up,
    expected_snapshot,
    minutes,
    shift,
    state,
    stored_snapshots,
    unknown_row,
    watch,
)

from hlcli.exitcodes import ConfigError, ExitCode, TemporaryError
from hlcli.jobs.snapshot import Options, snapshot
from hlcli.sim import Fault, Simulator

HIP3 = ("xyz:GOLD", "xyz:TSLA")


@pytest.fixture
def sim():
    with Simulator(vaults=1, wallets=40, weight_per_minute=100_000, now_ms=MINUTE_MS) as running:
        yield running


@pytest.fixture
def wallets(sim, connection):
    """Twenty watched wallets, the best first."""
    watch(connection, sim.wallets.top(20))
    return sim.wallets.top(20)


@pytest.fixture
def clock(sim, monkeypatch):
    return Clock(sim, monkeypatch)


@pytest.fixture
def take(settings, sim, connection, clock, monkeypatch):
    """Take the snapshot of a minute in this process, asking once; afterwards everything adds up."""
    # With the pauses between rounds each test with a wallet that stays silent would take three seconds.
    monkeypatch.setattr("hlcli.jobs.snapshot.ROUNDS", 1)

    def run(minute=0, *, second=1.0, env=None, **options):
        clock.set(minute, second=second)
        return snapshot(settings(**sim.env(), **PLENTY, **(env or {})), Options(**options))

    yield run
    assert_ledger_adds_up(connection)
    assert_nothing_left(connection)
    assert_minutes_add_up(connection)


@pytest.fixture
def environment(database, sim):
    return {"DATABASE_URL": database, "HL_EGRESS_KEY": "test", **PLENTY, **sim.env()}


def asked(sim):
    return [served.address for served in sim.log if served.kind == STATE]


def fail(sim, addresses, *, match=STATE, **fault):
    """Let every request of these wallets fail."""
    for address in addresses:
        sim.add_fault(
            Fault(match, times=None, address=address, **(fault or {"kind": "status", "status": 422}))
        )


def holding(sim, address, **positions):
    """Let a wallet hold exactly these sizes."""
    served = state(**positions)
    sim.add_fault(Fault(STATE, "patch", times=None, address=address, patch=lambda _: served))


# --- the rows -----------------------------------------------------------------------------------------------------


def test_rows_equal_the_simulators_positions_digit_for_digit(take, sim, connection, wallets):
    report = take()
    assert (report.status, report.exit_code) == ("ok", ExitCode.OK)
    stored = stored_snapshots(connection)
    assert stored == expected_snapshot(sim, wallets)
    # The positions must hold what the promise is about, or the comparison proves little.
    sizes = [Decimal(row["position_szi"]) for row in stored.values()]
    assert min(sizes) < 0 < max(sizes)
    assert 0 in sizes
    assert {row["leverage_type"] for row in stored.values()} == {None, "cross", "isolated"}
    assert any(row["liq_px"] for row in stored.values())
    assert any(row["entry_px"] and not row["liq_px"] for row in stored.values())
    assert sorted(asked(sim)) == sorted(wallets)
    (run,) = minutes(connection)
    assert (run["minute"], run["status"], run["coverage_pct"], run["error"]) == (0, "success", 100, None)
    assert (run["wallets_expected"], run["rows_expected"], run["rows_written"]) == (20, 60, 60)
    (ledger,) = runs(connection, "wallet_snapshots")
    assert (run["ledger_run_id"], ledger["details"]["coverage_pct"]) == (ledger["run_id"], "100.00")
    assert (ledger["units_ok"], ledger["requests"], ledger["weight"]) == (20, 20, 40)
    assert (ledger["rows_served"], ledger["rows_inserted"]) == (60, 60)


def test_assets_of_a_builders_dex_are_asked_there_and_stored_with_their_dex(take, sim, connection, wallets):
    assets = ("BTC", *HIP3)
    report = take(env={"HLCLI_ASSETS": ",".join(assets)})
    assert report.status == "ok"
    stored = stored_snapshots(connection)
    assert stored == expected_snapshot(sim, wallets, assets)
    assert any(Decimal(row["position_szi"]) for (_, asset), row in stored.items() if asset in HIP3)
    assert sorted(asked(sim)) == sorted(2 * wallets)


def test_the_assets_of_the_command_line_come_beside_those_of_the_settings(
    cli, environment, clock, sim, connection, wallets
):
    clock.set(0)
    args = ("snapshot", "--asset", "xyz:GOLD", "--asset", "ETH", "--asset", "xyz:GOLD")
    done = cli(*args, **environment, HLCLI_ASSETS="BTC")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert stored_snapshots(connection) == expected_snapshot(sim, wallets, ("BTC", "xyz:GOLD", "ETH"))
    assert_minutes_add_up(connection)


@pytest.mark.parametrize("name", ["btc", "NOPE", "nodex:GOLD", "xyz:gold"])
def test_a_coin_that_the_exchange_does_not_list_is_not_written_as_flat(
    take, sim, connection, wallets, caplog, name
):
    report = take(assets=["BTC", name])
    assert (report.status, report.details["coverage_pct"]) == ("ok", "100.00")
    assert stored_snapshots(connection) == expected_snapshot(sim, wallets, ("BTC",))
    assert f"the exchange lists no {name}" in caplog.text


def test_no_listed_coin_at_all_is_a_matter_of_configuration(take, connection, wallets):
    with pytest.raises(ConfigError, match="lists no HPYE or btc"):
        take(assets=["btc", "HPYE"])
    assert stored_snapshots(connection) == {}
    assert minutes(connection) == []


def test_a_listed_coin_that_nobody_holds_is_flat_for_all(take, sim, connection, wallets):
    sim.add_fault(Fault(STATE, "patch", times=None, patch=lambda answer: {**answer, "assetPositions": []}))
    assert take(assets=["BTC"]).status == "ok"
    assert {row["position_szi"] for row in stored_snapshots(connection).values()} == {"0"}
    assert sim.count("allMids") == 1


def test_coins_are_believed_when_their_list_cannot_be_had(take, sim, connection, wallets):
    sim.add_fault(Fault("allMids", "status", times=None, status=503))
    assert take(assets=["BTC", "NOPE"]).status == "ok"
    assert len(stored_snapshots(connection)) == 2 * len(wallets)


def test_a_wallet_with_one_dex_unknown_has_failed_and_keeps_the_other_dex(take, sim, connection, wallets):
    victim = wallets[0]
    sim.add_fault(Fault(STATE, "patch", times=None, address=victim, patch=gold_fails))
    report = take(assets=["BTC", "xyz:GOLD"])
    stored = stored_snapshots(connection)
    gold = stored.pop((victim, "xyz:GOLD"))
    assert (gold["position_szi"], gold["dirty_reason"]) == (None, "null_szi")
    expected = expected_snapshot(sim, wallets, ("BTC", "xyz:GOLD"))
    del expected[victim, "xyz:GOLD"]
    assert stored == expected
    assert (report.status, report.details["wallets_failed"]) == ("ok", 1)
    (run,) = minutes(connection)
    assert (run["wallets_failed"], run["rows_expected"], run["rows_written"]) == (1, 40, 39)


def gold_fails(answer):
    """null for an answer of the builder's dex, which only its coins tell apart."""
    coins = [entry["position"]["coin"] for entry in answer["assetPositions"]]
    return None if not coins or any(":" in coin for coin in coins) else answer


def test_no_universe_is_exit_4_and_names_the_cure(cli, environment, take, connection):
    with pytest.raises(TemporaryError, match="hlcli universe refresh"):
        take()
    done = cli("snapshot", **environment)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (4, "", 1)
    assert "hlcli universe refresh" in done.stderr
    assert minutes(connection) == []


def test_the_whole_way_by_commands(cli, environment, clock, sim, connection):
    clock.set(0)
    assert cli("universe", "refresh", "--size", "20", **environment).returncode == 0
    done = cli("snapshot", "--json", **environment)
    assert (done.returncode, done.stderr) == (0, "")
    told = json.loads(done.stdout)
    assert (told["status"], told["details"]["wallets"], told["details"]["wallets_failed"]) == ("ok", 20, 0)
    assert stored_snapshots(connection) == expected_snapshot(sim, sim.wallets.top(20))
    assert sim.count(LEADERBOARD) == 1
    assert_minutes_add_up(connection)
    assert_ledger_adds_up(connection)


@pytest.mark.parametrize("bad", ["BTC,ETH", "a:b:\x1bC"])
def test_an_asset_that_is_none_is_exit_2(cli, environment, bad):
    done = cli("snapshot", "--asset", bad, **environment)
    assert (done.returncode, done.stdout) == (2, "")
    assert "\x1b" not in done.stderr


# --- minute by minute ---------------------------------------------------------------------------------------------


def health_state(connection, seconds):
    shift(connection, seconds)
    return connection.execute(
        "select health_state, snapshot_status, coverage_pct, last_snapshot_ts, last_success_snapshot_ts"
        " from v_latest_health"
    ).fetchone()


def test_ten_minutes_in_a_row_are_complete_and_healthy(
    take, cli, environment, clock, sim, connection, wallets
):
    for minute in range(9):
        assert take(minute).details["coverage_pct"] == "100.00"
    clock.set(9)
    assert cli("snapshot", **environment).returncode == 0
    for minute in range(10):
        assert stored_snapshots(connection, minute=minute) == expected_snapshot(sim, wallets, minute=minute)
    told = [(run["minute"], run["status"], run["coverage_pct"]) for run in minutes(connection)]
    assert told == [(minute, "success", 100) for minute in range(10)]
    newest = MINUTE + timedelta(minutes=9)
    assert health_state(connection, 541) == ("healthy", "success", 100, newest, newest)
    kept = connection.execute("select health_ts, health_state from ingest_health order by 1").fetchall()
    assert kept == [(MINUTE + timedelta(minutes=minute), "healthy") for minute in range(10)]
    # In that time some wallet must have traded.
    assert stored_sizes(connection, 0) != stored_sizes(connection, 9)
    assert anomalies(connection) == []


def stored_sizes(connection, minute):
    return {key: row["position_szi"] for key, row in stored_snapshots(connection, minute=minute).items()}


def test_a_second_run_in_the_minute_adds_no_row_and_asks_nothing(take, sim, connection, wallets):
    take()
    before = connection.execute(f"select s.*, s.xmin from {SNAPSHOTS} s order by 2, 3").fetchall()
    first = minutes(connection)
    requests = sim.count()
    report = take(second=20)
    assert (report.status, report.details["already_done"], report.numbers["served"]) == (
        "ok",
        "the whole minute",
        0,
    )
    assert connection.execute(f"select s.*, s.xmin from {SNAPSHOTS} s order by 2, 3").fetchall() == before
    assert minutes(connection) == first
    assert sim.count() == requests


def test_a_second_run_asks_only_for_what_failed_and_overwrites_no_value(take, sim, connection, wallets):
    lost = [wallets[3], wallets[11]]
    fail(sim, lost)
    assert take().exit_code is ExitCode.PARTIAL
    known = {key: row for key, row in stored_snapshots(connection).items() if key[0] not in lost}
    sim.clear_faults()
    # Whoever is asked again now would be stored as flat.
    for address in set(wallets) - set(lost):
        holding(sim, address)
    before = len(asked(sim))
    report = take(second=20)
    assert sorted(asked(sim)[before:]) == sorted(lost)
    assert (report.status, report.exit_code) == ("ok", ExitCode.OK)
    assert (report.numbers["updated"], report.numbers["inserted"]) == (6, 0)
    stored = stored_snapshots(connection)
    assert stored == expected_snapshot(sim, wallets)
    assert {key: row for key, row in stored.items() if key[0] not in lost} == known
    (run,) = minutes(connection)
    assert (run["status"], run["coverage_pct"], run["wallets_failed"], run["error"]) == (
        "success",
        100,
        0,
        None,
    )
    assert run["ledger_run_id"] == runs(connection, "wallet_snapshots")[-1]["run_id"]


def test_a_second_run_that_fails_as_well_changes_no_value_to_null(take, sim, connection, wallets):
    lost = wallets[5:7]
    fail(sim, lost)
    take()
    before = stored_snapshots(connection)
    fail(sim, wallets)
    assert take(second=20).exit_code is ExitCode.PARTIAL
    assert stored_snapshots(connection) == before
    (run,) = minutes(connection)
    assert (run["status"], run["wallets_failed"]) == ("partial", 2)


def test_another_asset_in_the_same_minute_adds_its_rows(take, sim, connection, wallets):
    take(assets=["BTC"])
    take(assets=["BTC", "ETH"], second=20)
    assert stored_snapshots(connection) == expected_snapshot(sim, wallets, ("BTC", "ETH"))
    assert sim.count(STATE) == 40


def test_a_missed_minute_stays_missing_and_joins_no_neighbours(take, sim, connection, wallets):
    """Minutes 0, 2 and 3: what comes before and after the gap must not be taken for three in a row."""
    victim = wallets[0]
    for minute, size in ((0, "10"), (2, "0"), (3, "10")):
        sim.clear_faults()
        holding(sim, victim, BTC=size)
        take(minute)
    assert [run["minute"] for run in minutes(connection)] == [0, 2, 3]
    assert stored_snapshots(connection, minute=1) == {}
    assert anomalies(connection) == []
    assert connection.execute(f"select count(*) from {SNAPSHOTS} where is_dirty").fetchone() == (0,)


def test_a_run_begun_in_the_last_seconds_takes_the_next_minute(take, sim, connection, wallets):
    report = take(second=59.3)
    assert report.details["minute"] == MINUTE + timedelta(minutes=1)
    assert [run["minute"] for run in minutes(connection)] == [1]


@pytest.mark.parametrize(("second", "deadline_s"), [(33, 50), (12, 20)])
def test_a_run_begun_before_seven_tenths_of_its_deadline_takes_its_own_minute(
    take, sim, connection, wallets, second, deadline_s
):
    report = take(second=second, deadline=timedelta(seconds=deadline_s))
    assert (report.status, report.details["minute"]) == ("ok", MINUTE)


@pytest.mark.parametrize(
    ("second", "deadline_s", "pause"), [(35.1, 50, 24.9), (55, 50, 5), (55, 59, 5), (14.1, 20, 45.9)]
)
def test_what_is_left_of_the_minute_is_slept_through(
    settings, sim, clock, wallets, monkeypatch, second, deadline_s, pause
):
    class SleptError(Exception):
        pass

    def sleep(seconds):
        raise SleptError(seconds)

    clock.set(0, second=second)
    environment = settings(**sim.env(), **PLENTY)
    with monkeypatch.context() as patch, pytest.raises(SleptError) as caught:
        patch.setattr(time, "sleep", sleep)
        snapshot(environment, Options(deadline=timedelta(seconds=deadline_s)))
    # Connecting takes its time.
    assert pause - 5 < caught.value.args[0] <= pause + 0.01
    assert sim.count(STATE) == 0


def test_the_hosts_clock_decides_nothing(take, sim, connection, wallets, monkeypatch):
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + 3600)
    report = take()
    assert report.details["minute"] == MINUTE
    assert stored_snapshots(connection) == expected_snapshot(sim, wallets)


@pytest.mark.parametrize(
    ("off_ms", "warned"), [(3_600_000, True), (-3_600_000, True), (119_000, False), (121_000, True)]
)
def test_an_exchange_clock_far_off_is_warned_of_and_files_nothing_elsewhere(
    settings, sim, clock, connection, wallets, caplog, off_ms, warned
):
    clock.set(0)
    sim.clock_offset_ms = off_ms
    with caplog.at_level(logging.WARNING, "hlcli"):
        report = snapshot(settings(**sim.env(), **PLENTY), Options())
    assert report.details["minute"] == MINUTE
    assert ("clock" in caplog.text) is warned
    assert [run["minute"] for run in minutes(connection)] == [0]
    (stored,) = connection.execute(f"select distinct source_ts - snapshot_ts from {SNAPSHOTS}").fetchone()
    assert stored == timedelta(milliseconds=off_ms)


def test_of_two_snapshots_started_in_one_minute_one_is_skipped(
    cli, environment, clock, sim, connection, wallets, tmp_path
):
    arrived, opened = threading.Event(), threading.Event()

    def hold(answer):
        arrived.set()
        opened.wait(60)
        return answer

    sim.add_fault(Fault(STATE, "patch", times=None, patch=hold))
    clock.set(0)
    first = subprocess.Popen(
        [sys.executable, "-m", "hlcli", "snapshot", "--timeout", "40s"],
        env={**os.environ, **environment},
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert arrived.wait(30)
        second = cli("snapshot", **environment)
        third = cli("snapshot", "--fail-if-locked", **environment)
        opened.set()
        _, err = first.communicate(timeout=40)
    finally:
        opened.set()
        first.kill()
        first.communicate()
    assert (first.returncode, err) == (0, "")
    assert (second.returncode, third.returncode) == (0, 6)
    assert "skipped" in second.stderr
    assert stored_snapshots(connection) == expected_snapshot(sim, wallets)
    assert sorted(asked(sim)) == sorted(wallets)
    ledger = sorted((run["status"], run["exit_code"]) for run in runs(connection, "wallet_snapshots"))
    assert ledger == [("ok", 0), ("skipped", 0), ("skipped", 6)]
    assert_nothing_left(connection)
    assert_minutes_add_up(connection)


# --- batches ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 7, 20, 50])
def test_batches_store_the_same_rows(take, sim, connection, wallets, size):
    assert take(batch=size, assets=["BTC", "xyz:GOLD"]).status == "ok"
    assert stored_snapshots(connection) == expected_snapshot(sim, wallets, ("BTC", "xyz:GOLD"))
    assert (sim.count(BATCH), sim.count(STATE)) == (2 * -(-20 // size), 0)
    (ledger,) = runs(connection, "wallet_snapshots")
    # The batch is undocumented: it is charged as the dearer of a question and of its wallets.
    assert ledger["weight"] >= sum(served.weight for served in sim.log)


BROKEN_BATCHES = {
    "422": ({"kind": "status", "status": 422}, 20),
    "an HTML page": ({"kind": "html"}, 20),
    "null": ({"kind": "null"}, 20),
    "an object": ({"kind": "replace", "body": "{}"}, 20),
    "one short": ({"kind": "patch", "patch": lambda answer: answer[:-1]}, 20),
    "one too many": ({"kind": "patch", "patch": lambda answer: [*answer, answer[0]]}, 20),
    "empty": ({"kind": "replace", "body": "[]"}, 20),
    "cut off": ({"kind": "cut"}, 20),
    # Each of two batches of ten lacks two.
    "null entries": ({"kind": "patch", "patch": lambda answer: [None, *answer[1:-1], {}]}, 4),
}


@pytest.mark.parametrize(("fault", "single"), BROKEN_BATCHES.values(), ids=BROKEN_BATCHES)
def test_what_a_batch_does_not_tell_is_asked_one_by_one(take, sim, connection, wallets, fault, single):
    sim.add_fault(Fault(BATCH, times=None, **fault))
    assert take(batch=10).status == "ok"
    assert stored_snapshots(connection) == expected_snapshot(sim, wallets)
    assert (sim.count(BATCH), sim.count(STATE)) == (2, single)


# --- what is implausible ------------------------------------------------------------------------------------------

FAILS, FLAT = "fails", None
# Sizes of BTC (dust: 0.0001) in three minutes, and how the middle one is judged.
COLLAPSES = {
    "gone for a minute": ("10", FLAT, "10", "transient_collapse"),
    "served as zero": ("10", "0.0", "10", "transient_collapse"),
    "short and gone for a minute": ("-10", FLAT, "-10", "transient_collapse"),
    "back on the other side": ("10", FLAT, "-10", "transient_collapse"),
    "just under 1 %": ("10", "0.0999", "10", "transient_collapse"),
    "exactly 1 %": ("10", "0.1", "10", None),
    "exactly half is back": ("10", FLAT, "5", None),
    "over half is back": ("10", FLAT, "5.00001", "transient_collapse"),
    "closed": ("10", FLAT, FLAT, None),
    "dust": ("0.0001", FLAT, "0.0001", None),
    "more than dust": ("0.00011", FLAT, "0.00011", "transient_collapse"),
    "unknown for a minute": ("10", FAILS, "10", "transient_collapse"),
    "unknown, then closed": ("10", FAILS, FLAT, "null_szi"),
    "unknown before": (FAILS, FLAT, "10", None),
    "unknown afterwards": ("10", FLAT, FAILS, None),
}
JUMPS = {
    "exactly twentyfold": ("1", "20", "1", None),
    "over twentyfold": ("1", "20.00001", "1", "szi_jump"),
    "over twentyfold on the other side": ("2", "-41", "1", "szi_jump"),
    "twentyfold of the smaller only": ("1", "30", "2", None),
    "from dust": ("0.0001", "100", "1", None),
    "to dust": ("1", "100", "0.0001", None),
    "to more than dust": ("1", "100", "0.00011", "szi_jump"),
    "stays large": ("1", "100", "100", None),
    "steady": ("-1", "-1", "-1", None),
}


@pytest.mark.parametrize("cases", [COLLAPSES, JUMPS], ids=["collapses", "jumps"])
def test_the_middle_one_of_three_minutes_is_judged(take, sim, connection, wallets, cases):
    found = None
    for minute in range(3):
        sim.clear_faults()
        for address, case in zip(wallets, cases.values(), strict=False):
            size = case[minute]
            if size == FAILS:
                fail(sim, [address])
            else:
                holding(sim, address, **({} if size is FLAT else {"BTC": size}))
        found = take(minute, assets=["BTC"]).details["found_dirty"]
    judged = dict(zip(wallets, cases.values(), strict=False))
    marks = {
        address: (row["is_dirty"], row["dirty_reason"])
        for (address, _), row in stored_snapshots(connection, minute=1).items()
    }
    assert marks == {
        address: ("true", case[3]) if case[3] else ("false", None)
        for address, case in {address: judged.get(address, (None,) * 4) for address in wallets}.items()
    }
    told = {(1.0, address, "BTC", case[3]) for address, case in judged.items() if case[3]}
    told |= {
        (float(minute), address, "BTC", "null_szi")
        for address, case in judged.items()
        for minute in range(3)
        if case[minute] == FAILS
    }
    assert {tuple(row[:4]) for row in anomalies(connection)} == told
    assert len(anomalies(connection)) == len(told)
    # Only the middle is judged, and no value is changed by it.
    for minute in (0, 2):
        assert {row["dirty_reason"] for row in stored_snapshots(connection, minute=minute).values()} <= {
            None,
            "null_szi",
        }
    for address, case in judged.items():
        stored = stored_snapshots(connection, minute=1)[address, "BTC"]["position_szi"]
        assert stored == {FAILS: None, FLAT: "0"}.get(case[1], case[1])
    assert found == sum(case[3] in {"transient_collapse", "szi_jump"} for case in cases.values())


def test_an_anomaly_tells_the_three_sizes_or_the_reason(take, sim, connection, wallets):
    collapsed, jumped, lost = wallets[:3]
    for minute, sizes in enumerate((("10.5", "1"), ("0.0", "-99.25"), ("9", "2"))):
        sim.clear_faults()
        holding(sim, collapsed, BTC=sizes[0])
        holding(sim, jumped, BTC=sizes[1])
        if minute == 2:
            fail(sim, [lost])
        take(minute, assets=["BTC"])
    told = {(wallet, kind): details for _, wallet, _, kind, details in anomalies(connection)}
    assert told.pop((lost, "null_szi"))["reason"].endswith("422")
    assert told == {
        (collapsed, "transient_collapse"): {"before": 10.5, "found": 0.0, "after": 9},
        (jumped, "szi_jump"): {"before": 1, "found": -99.25, "after": 2},
    }


def test_each_asset_has_its_own_dust(take, sim, connection, wallets):
    """HYPE 0.01, BTC 0.0001, ETH 0.001, any other coin none."""
    assets = ("HYPE", "BTC", "ETH", "SOL")
    dust, more = wallets[:2]
    for minute in range(3):
        sim.clear_faults()
        away = minute == 1
        holding(
            sim, dust, **({} if away else dict(zip(assets, ("0.01", "0.0001", "0.001", "0"), strict=True)))
        )
        holding(
            sim,
            more,
            **({} if away else dict(zip(assets, ("0.011", "0.00011", "0.0011", "0.000001"), strict=True))),
        )
        take(minute, assets=assets)
    assert {tuple(row[1:4]) for row in anomalies(connection)} == {
        (more, asset, "transient_collapse") for asset in assets
    }


def test_a_failed_minute_in_between_marks_nothing(take, sim, connection, wallets):
    for minute in range(3):
        sim.clear_faults()
        holding(sim, wallets[0], BTC="10") if minute != 1 else holding(sim, wallets[0])
        if minute == 1:
            fail(sim, wallets[1:])
        take(minute, assets=["BTC"])
    assert [run["status"] for run in minutes(connection)] == ["success", "failed", "success"]
    assert anomalies(connection) == []
    row = stored_snapshots(connection, minute=1)[wallets[0], "BTC"]
    assert (row["position_szi"], row["is_dirty"]) == ("0", "false")


def test_a_second_run_of_the_third_minute_marks_what_the_first_could_not_see(take, sim, connection, wallets):
    victim = wallets[0]
    holding(sim, victim, BTC="10")
    take(0, assets=["BTC"])
    sim.clear_faults()
    holding(sim, victim)
    take(1, assets=["BTC"])
    sim.clear_faults()
    fail(sim, [victim])
    assert take(2, assets=["BTC"]).details["found_dirty"] == 0
    sim.clear_faults()
    holding(sim, victim, BTC="10")
    assert take(2, second=20, assets=["BTC"]).details["found_dirty"] == 1
    assert take(2, second=30, assets=["BTC"]).details["already_done"]
    assert stored_snapshots(connection, minute=1)[victim, "BTC"]["dirty_reason"] == "transient_collapse"
    assert [tuple(row[:4]) for row in anomalies(connection) if row[3] != "null_szi"] == [
        (1.0, victim, "BTC", "transient_collapse")
    ]


def test_a_position_learnt_in_a_second_run_is_no_anomaly_any_more(take, sim, connection, wallets):
    fail(sim, wallets[:1])
    take(assets=["BTC"])
    assert [row[3] for row in anomalies(connection)] == ["null_szi"]
    sim.clear_faults()
    take(assets=["BTC"], second=20)
    assert anomalies(connection) == []


# --- how a minute is judged ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lost", "status", "code", "state"),
    [
        (0, "success", ExitCode.OK, "healthy"),
        (1, "success", ExitCode.OK, "healthy"),
        (2, "partial", ExitCode.PARTIAL, "degraded"),
        (4, "partial", ExitCode.PARTIAL, "degraded"),
        (5, "failed", ExitCode.TEMPORARY, "stale"),
        (19, "failed", ExitCode.TEMPORARY, "stale"),
    ],
)
def test_success_from_95_percent_partial_from_80(take, sim, connection, wallets, lost, status, code, state):
    fail(sim, wallets[:lost])
    report = take()
    assert report.exit_code is code
    (run,) = minutes(connection)
    assert (run["status"], run["coverage_pct"], run["wallets_failed"]) == (status, 100 - 5 * lost, lost)
    assert (run["error"] is None) == (lost == 0)
    assert health_state(connection, 2)[0] == state
    assert connection.execute("select health_state, coverage_pct from ingest_health").fetchone() == (
        state,
        100 - 5 * lost,
    )
    stored = stored_snapshots(connection)
    assert {key: row for key, row in stored.items() if key[0] not in wallets[:lost]} == expected_snapshot(
        sim, wallets, unknown=wallets[:lost]
    )
    # Unknown, with the reason, and nothing else: nobody is flat on a guess.
    reason = f"127.0.0.1/info {STATE} answered HTTP 422"
    for address in wallets[:lost]:
        for asset in ASSETS:
            assert stored[address, asset] == unknown_row(address, asset, reason, 0)
    nulls = 3 * lost if status != "failed" else 0
    assert [row[3] for row in anomalies(connection)] == ["null_szi"] * nulls


def test_one_unknown_position_makes_the_wallet_fail_but_not_its_others(take, sim, connection, wallets):
    holding(sim, wallets[0], BTC="1.5", ETH="many")
    take()
    stored = stored_snapshots(connection)
    assert [stored[wallets[0], asset]["position_szi"] for asset in ("HYPE", "BTC", "ETH")] == [
        "0",
        "1.5",
        None,
    ]
    assert minutes(connection)[0]["wallets_failed"] == 1


@pytest.mark.parametrize(
    ("age_s", "expected"),
    [
        (0, "healthy"),
        (119.5, "healthy"),
        (120.5, "degraded"),
        (599.5, "degraded"),
        (600.5, "stale"),
        (90_000, "stale"),
    ],
)
def test_health_follows_the_age_of_the_newest_snapshot_when_it_is_read(
    take, connection, wallets, age_s, expected
):
    take()
    found = health_state(connection, age_s)
    assert found == (expected, "success", 100, MINUTE, MINUTE)


def test_a_partial_minute_is_degraded_and_then_stale_by_age(take, sim, connection, wallets):
    fail(sim, wallets[:3])
    take()
    assert [health_state(connection, age)[0] for age in (1, 119, 599, 601)] == ["degraded"] * 3 + ["stale"]


def test_a_failed_minute_is_stale_at_once_and_the_next_good_one_healthy(take, sim, connection, wallets):
    take(0)
    fail(sim, wallets)
    take(1)
    found = health_state(connection, 61)
    assert found == ("stale", "failed", 0, MINUTE + timedelta(minutes=1), MINUTE)
    sim.clear_faults()
    take(2)
    assert health_state(connection, 121)[0] == "healthy"


def test_before_the_first_snapshot_health_is_stale(connection):
    assert health_state(connection, 0) == ("stale", None, None, None, None)
