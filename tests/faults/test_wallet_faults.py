"""What may go wrong under `hlcli universe` and `hlcli snapshot`, and what must hold then (F1, F4, F9-F12, F17, F18)."""

from __future__ import annotations

import json
import signal
import threading
import time
from datetime import timedelta

import pytest
from vault_tables import PLENTY, assert_ledger_adds_up, assert_nothing_left, dump, runs
from waiting import until
from wallet_tables import (
    ASSETS,
    CURRENT,
    LEADERBOARD,
    MEMBERS,
    MINUTE_MS,
    STATE,
    UNIVERSE_RUNS,
    Clock,
    anomalies,
    assert_minutes_add_up,
    assert_universe_agrees,
    board,
    expected_snapshot,
    listed,
    minutes,
    ranked,
    rejected,
    served_rows,
    state,
    stored_snapshots,
    stored_universe,
    universe_runs,
    unknown_row,
    watch,
)

from hlcli.budget import DeadlineError
from hlcli.exitcodes import ExitCode, TemporaryError
from hlcli.jobs.refresh_universe import Options as UniverseOptions
from hlcli.jobs.refresh_universe import refresh_universe
from hlcli.jobs.snapshot import CHANNEL, ROUNDS, Options, snapshot
from hlcli.sim import Fault, Simulator
from hlcli.sim.wire import RawNumber


@pytest.fixture
def sim():
    with Simulator(vaults=1, wallets=40, weight_per_minute=1_000_000, now_ms=MINUTE_MS) as running:
        yield running


@pytest.fixture
def environment(database, sim):
    return {"DATABASE_URL": database, "HL_EGRESS_KEY": "test", **PLENTY, **sim.env()}


# --- the leaderboard ----------------------------------------------------------------------------------------------


@pytest.fixture
def refresh(settings, sim, connection, monkeypatch):
    """Run the job in this process, with short pauses between attempts; afterwards the invariants hold."""
    monkeypatch.setattr("hlcli.http.BACKOFF_BASE_S", 0.001)

    def run(size=20, **options):
        return refresh_universe(settings(**sim.env(), **PLENTY), UniverseOptions(size=size, **options))

    yield run
    assert_ledger_adds_up(connection)
    assert_nothing_left(connection)
    assert_universe_agrees(connection)


def everything(connection):
    return [dump(connection, table, without=()) for table in (CURRENT, MEMBERS, "rejected_rows")]


BROKEN_LISTS = {
    "cut off": {"kind": "cut", "share": 0.5},
    "cut off in a chunk": {"kind": "cut_chunked", "share": 0.7},
    "closed before its end": {"kind": "cut_close", "share": 0.9},
    "closed just before its end": {"kind": "cut_close", "share": 0.99},
    "an HTML page with 200": {"kind": "html"},
    "403": {"kind": "status", "status": 403},
    "503": {"kind": "status", "status": 503},
    "null": {"kind": "null"},
    "nothing": {"kind": "replace", "body": ""},
    "an empty list": {"kind": "replace", "body": "[]"},
    "an empty object": {"kind": "replace", "body": "{}"},
    "another object": {"kind": "replace", "body": '{"error":"busy"}'},
    "no rows": {"kind": "replace", "body": '{"leaderboardRows":[]}'},
    "rows of null": {"kind": "replace", "body": '{"leaderboardRows":null}'},
    "rows as an object": {"kind": "replace", "body": '{"leaderboardRows":{"a":1}}'},
    "rows that are none": {"kind": "replace", "body": '{"leaderboardRows":[1,null,"x",[],{}]}'},
    "rows twice": {
        "kind": "replace",
        "body": board([listed(1, "1")])[:-1] + "," + board([listed(2, "1")])[1:],
    },
    "rows and something after them": {"kind": "replace", "body": board([listed(1, "1")]) + "}"},
    "nested deeply": {"kind": "deep"},
    "an integer of 5000 digits": {"kind": "bigint"},
    "reset": {"kind": "reset"},
}


def test_reading_a_leaderboard_ends_at_the_deadline(refresh, sim, connection):
    row = '{"ethAddress":"x","junk":[' + "[]," * 300_000 + "[]]}"
    body = '{"leaderboardRows":[' + ",".join([row] * 60) + "]}"
    refresh()
    sim.add_fault(Fault(LEADERBOARD, "replace", times=None, body=body))
    # Read to its end it would be refused as a list without a wallet.
    with pytest.raises(DeadlineError, match="time is up"):
        refresh(deadline=timedelta(seconds=1))
    run = universe_runs(connection)[-1]
    assert (run["status"], run["error"]) == ("failed", "the run's time is up")


@pytest.mark.parametrize("fault", BROKEN_LISTS.values(), ids=BROKEN_LISTS)
def test_a_broken_leaderboard_and_no_fallback_leave_the_universe_as_it_was(refresh, sim, connection, fault):
    refresh()
    before = everything(connection)
    sim.add_fault(Fault(LEADERBOARD, times=None, **fault))
    with pytest.raises(TemporaryError) as caught:
        refresh()
    assert caught.value.exit_code is ExitCode.TEMPORARY
    assert everything(connection) == before
    run = universe_runs(connection)[-1]
    assert (run["status"], run["source"], run["n_received"], run["n_listed"]) == ("failed", None, 0, 0)
    # Both reasons: what the stats server did, and that the info endpoint knows no such question.
    first, _, second = run["error"].partition("; and the fallback: ")
    assert first
    assert second.endswith("leaderboard answered HTTP 422")
    assert sim.count("leaderboard", 422) == 1
    ledger = runs(connection, "wallet_universe")[-1]
    assert (ledger["status"], ledger["exit_code"], ledger["units_failed"]) == ("failed", 4, 1)


def test_a_leaderboard_cut_at_any_place_is_refused(refresh, sim, connection, rng):
    """Also where what is left is a list of whole rows: behind a row, or behind the list."""
    refresh()
    before = everything(connection)
    body = sim.wallets.list_body
    places = [body.rindex(b"]"), body.rindex(b"}"), body.index(b"},") + 1, body.rindex(b"},")]
    for place in [*places, *(rng.randrange(1, len(body)) for _ in range(10))]:
        sim.clear_faults()
        sim.add_fault(Fault(LEADERBOARD, "replace", times=None, body=body[:place]))
        with pytest.raises(TemporaryError):
            refresh()
        assert everything(connection) == before, place


def test_a_leaderboard_that_was_cut_once_is_read_whole_the_second_time(refresh, sim, connection):
    sim.add_fault(Fault(LEADERBOARD, "cut", times=2))
    refresh()
    assert stored_universe(connection) == ranked(served_rows(sim), 20)
    assert universe_runs(connection)[-1]["source"] == "stats-data"


def test_a_working_fallback_is_taken_and_named(refresh, sim, connection, caplog):
    sim.add_fault(Fault(LEADERBOARD, "status", times=None, status=404))
    sim.add_fault(Fault("leaderboard", "replace", times=None, body=sim.wallets.list_body))
    report = refresh()
    assert (report.status, report.details["source"]) == ("ok", "info-api")
    assert stored_universe(connection) == ranked(served_rows(sim), 20)
    assert universe_runs(connection)[-1]["source"] == "info-api"
    assert "HTTP 404" in caplog.text


def test_a_fallback_that_is_no_leaderboard_is_refused(refresh, sim, connection):
    refresh()
    before = everything(connection)
    for body in ("null", "[]", "{}", '{"leaderboardRows":[]}', '{"leaderboardRows":{}}'):
        sim.clear_faults()
        sim.add_fault(Fault(LEADERBOARD, "status", times=None, status=404))
        sim.add_fault(Fault("leaderboard", "replace", times=None, body=body))
        with pytest.raises(TemporaryError, match="HTTP 404; and the fallback: "):
            refresh()
        assert everything(connection) == before, body


def test_the_lists_of_two_sources_are_not_compared_by_length(refresh, sim, connection):
    refresh()
    sim.add_fault(Fault(LEADERBOARD, "status", times=None, status=404))
    sim.add_fault(Fault("leaderboard", "replace", times=None, body=board(served_rows(sim)[:19])))
    assert refresh(19).details["listed"] == 19


def test_a_stats_server_that_stays_silent_is_a_failed_run_with_its_reason(refresh, sim, connection):
    refresh()
    before = everything(connection)
    sim.add_fault(Fault(LEADERBOARD, "silent", times=None, seconds=30))
    with pytest.raises(TemporaryError):
        refresh(deadline=timedelta(seconds=1))
    assert everything(connection) == before
    assert [(run["status"], bool(run["error"])) for run in universe_runs(connection)] == [
        ("success", False),
        ("failed", True),
    ]


def test_the_process_exits_4_with_one_error_when_no_list_can_be_had(
    cli, refresh, environment, sim, connection
):
    refresh()
    sim.add_fault(Fault(LEADERBOARD, "status", times=None, status=403))
    done = cli("universe", "refresh", "--size", "20", **environment)
    assert (done.returncode, done.stdout) == (4, "")
    assert "HTTP 403" in done.stderr
    assert "HTTP 422" in done.stderr
    assert "Traceback" not in done.stderr


def edit(index, **changes):
    """A fault's patch that changes fields of one row of the leaderboard."""

    def patch(answer):
        answer["leaderboardRows"][index] |= changes
        return answer

    return patch


def month(pnl="1.0", roi="0.1"):
    return [["month", {"pnl": pnl, "roi": roi, "vlm": "0.0"}]]


HOSTILE_ROWS = {
    "an address that is none": ({"ethAddress": "0xabc"}, "wallet_id", "not_an_address"),
    "no address": ({"ethAddress": None}, "wallet_id", "not_an_address"),
    "a NUL in the address": ({"ethAddress": "0x" + "a" * 39 + "\x00"}, "wallet_id", "not_an_address"),
    "pnl NaN": ({"windowPerformances": month("NaN")}, "month_pnl", "not_a_number"),
    "pnl 1e400": ({"windowPerformances": month(RawNumber("1e400"))}, "month_pnl", "not_a_number"),
    "pnl a bare NaN": ({"windowPerformances": month(RawNumber("NaN"))}, "month_pnl", "not_a_number"),
    "pnl and a line break": ({"windowPerformances": month("5\n")}, "month_pnl", "not_a_number"),
    "no pnl": ({"windowPerformances": month(None)}, "month_pnl", "null"),
    "no month": ({"windowPerformances": []}, "month_pnl", "null"),
    "roi Infinity": ({"windowPerformances": month(roi="Infinity")}, "month_roi", "not_a_number"),
    "account value a list": ({"accountValue": [1]}, "account_value", "not_a_number"),
}


@pytest.mark.parametrize(("changes", "column", "reason"), HOSTILE_ROWS.values(), ids=HOSTILE_ROWS)
def test_a_hostile_row_is_quarantined_alone(refresh, sim, connection, changes, column, reason):
    sim.add_fault(Fault(LEADERBOARD, "patch", times=None, patch=edit(7, **changes)))
    report = refresh(39)
    assert report.status == "ok"
    kept = [row for index, row in enumerate(served_rows(sim)) if index != 7]
    assert stored_universe(connection) == ranked(kept, 39)
    (found,) = rejected(connection)
    assert (found[0], found[2:]) == (CURRENT, (column, reason))
    run = universe_runs(connection)[-1]
    assert (run["n_received"], run["n_listed"]) == (39, 39)


HOSTILE_NAMES = {
    "NUL": "a\x00b",
    "a lone surrogate": "a\ud83db",
    "a low surrogate": "\ude00",
    "1 MB": "x" * 1_000_000,
}


@pytest.mark.parametrize("name", HOSTILE_NAMES.values(), ids=HOSTILE_NAMES)
def test_a_name_no_column_takes_costs_the_name_and_not_the_wallet(refresh, sim, connection, name):
    sim.add_fault(Fault(LEADERBOARD, "patch", times=None, patch=edit(7, displayName=name)))
    refresh(40)
    rows = served_rows(sim)
    rows[7]["displayName"] = None
    assert stored_universe(connection) == ranked(rows, 40)
    assert rejected(connection) == [
        (CURRENT, json.dumps([rows[7]["ethAddress"]]), "display_name", "invalid_text")
    ]


def test_control_characters_in_a_name_are_stored_as_they_are(refresh, sim, connection):
    name = "\x01\x07\x1b[2J\x7f\x9b\u202e\u2028\ufeff\r\n\t\\N\\."
    sim.add_fault(Fault(LEADERBOARD, "patch", times=None, patch=edit(7, displayName=name)))
    refresh(40)
    address = served_rows(sim)[7]["ethAddress"]
    assert [row["display_name"] for row in stored_universe(connection) if row["wallet_id"] == address] == [
        name
    ]
    assert rejected(connection) == []


def test_a_wallet_listed_twice_or_in_mixed_case_has_one_place(refresh, sim, connection):
    rows = served_rows(sim)
    shouted = [row | {"ethAddress": "0x" + row["ethAddress"][2:].upper()} for row in rows]
    sim.add_fault(Fault(LEADERBOARD, "replace", times=None, body=board([*shouted[:20], *rows[20:], *rows])))
    report = refresh(40)
    assert stored_universe(connection) == ranked(rows, 40)
    assert report.details["listed"] == 40


def test_duplicates_do_not_make_a_short_list_long(refresh, sim, connection):
    refresh(10)
    sim.add_fault(Fault(LEADERBOARD, "replace", times=None, body=board(served_rows(sim)[:8] * 5)))
    with pytest.raises(TemporaryError, match="8 usable wallets"):
        refresh(10)


# --- positions ----------------------------------------------------------------------------------------------------


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
    """Take the snapshot of a minute in this process, asking once unless told; afterwards everything adds up."""

    def run(minute=0, *, second=1.0, rounds=1, **options):
        monkeypatch.setattr("hlcli.jobs.snapshot.ROUNDS", rounds)
        clock.set(minute, second=second)
        return snapshot(settings(**sim.env(), **PLENTY), Options(**options))

    yield run
    assert_ledger_adds_up(connection)
    assert_nothing_left(connection)
    assert_minutes_add_up(connection)


def asked(sim):
    return [served.address for served in sim.log if served.kind == STATE]


def answer_with(sim, address, answer):
    sim.add_fault(Fault(STATE, "patch", times=None, address=address, patch=lambda _: answer))


def split(connection, lost):
    """The stored rows of the wallets that were read, and those of the others."""
    stored = stored_snapshots(connection)
    return (
        {key: row for key, row in stored.items() if key[0] not in lost},
        {key: row for key, row in stored.items() if key[0] in lost},
    )


def test_a_tenth_of_the_wallets_timing_out_is_a_partial_minute(take, sim, connection, wallets):
    lost = [wallets[2], wallets[17]]
    for address in lost:
        sim.add_fault(Fault(STATE, "silent", times=None, address=address, seconds=20))
    report = take(timeout=timedelta(seconds=0.5))
    assert (report.status, report.exit_code) == ("partial", ExitCode.PARTIAL)
    assert report.details["coverage_pct"] == "90.00"
    (run,) = minutes(connection)
    assert (run["status"], run["coverage_pct"], run["wallets_failed"]) == ("partial", 90, 2)
    assert run["error"] == f"2 x 127.0.0.1/info {STATE} did not answer whole within 0.5 s"
    known, unknown = split(connection, lost)
    assert known == expected_snapshot(sim, wallets, unknown=lost)
    reason = run["error"].removeprefix("2 x ")
    assert unknown == {
        (address, asset): unknown_row(address, asset, reason, 0) for address in lost for asset in ASSETS
    }
    assert [row[1:4] for row in anomalies(connection)] == sorted(
        (address, asset, "null_szi") for address in lost for asset in ASSETS
    )
    (ledger,) = runs(connection, "wallet_snapshots")
    assert (ledger["status"], ledger["exit_code"], ledger["units_ok"], ledger["units_failed"]) == (
        "partial",
        3,
        18,
        2,
    )


def test_all_wallets_failing_is_a_failed_minute_of_unknowns(take, sim, connection, wallets):
    sim.add_fault(Fault(STATE, "status", times=None, status=403))
    report = take()
    assert (report.status, report.exit_code) == ("failed", ExitCode.TEMPORARY)
    stored = stored_snapshots(connection)
    assert len(stored) == 60
    assert {(row["position_szi"], row["dirty_reason"]) for row in stored.values()} == {(None, "null_szi")}
    (run,) = minutes(connection)
    assert (run["status"], run["coverage_pct"], run["rows_expected"], run["rows_written"]) == (
        "failed",
        0,
        60,
        0,
    )
    assert anomalies(connection) == []
    # Every wallet was tried: no early end leaves the best ones unknown and the others unasked.
    assert sorted(asked(sim)) == sorted(wallets)
    assert connection.execute(
        "select health_state, last_success_snapshot_ts from ingest_health"
    ).fetchall() == [("stale", None)]


@pytest.mark.parametrize("kind", [[], {}, ["cross"], {"cross": 1}, 5, True, None, "x" * 1000])
def test_an_odd_kind_of_leverage_costs_nobody_his_position(take, sim, connection, wallets, kind):
    def odd(answer):
        for entry in answer["assetPositions"]:
            entry["position"]["leverage"]["type"] = kind
        return answer

    sim.add_fault(Fault(STATE, "patch", times=None, address=wallets[0], patch=odd))
    assert take().status == "ok"
    expected = expected_snapshot(sim, wallets)
    for (wallet, _), row in expected.items():
        if wallet == wallets[0]:
            row["leverage_type"] = None
    assert stored_snapshots(connection) == expected


@pytest.mark.parametrize("body", ["\0garbage", "\x1b[31mred", "\u202e"])
def test_no_control_character_of_an_answer_reaches_the_tables(take, sim, connection, wallets, body):
    sim.add_fault(
        Fault(STATE, "replace", times=None, body=body, headers={"Content-Type": f"te\x1bxt/{body}"})
    )
    assert take().status == "failed"
    (run,) = runs(connection, "wallet_snapshots")
    (minute,) = minutes(connection)
    assert (run["status"], run["exit_code"]) == ("failed", 4)
    told = [
        minute["error"],
        run["error"],
        *(row["missing_reason"] for row in stored_snapshots(connection).values()),
    ]
    assert all(text.isprintable() for text in told), told


def test_large_payloads_are_cut_before_they_are_kept(take, sim, connection, wallets):
    def large(answer):
        found = {"coin": "BTC", "szi": "many", "note": "x" * 1_000_000}
        return {**answer, "assetPositions": [{"position": found}]}

    sim.add_fault(Fault(STATE, "patch", times=None, patch=large))
    assert take(assets=["BTC"]).status == "failed"
    lengths = connection.execute("select length(payload) from rejected_rows").fetchall()
    assert len(lengths) == len(wallets)
    assert all(length <= 20_100 for (length,) in lengths)


def test_the_process_exits_3_and_4_by_coverage(cli, environment, clock, sim, connection, wallets):
    clock.set(0)
    for address in wallets[:2]:
        sim.add_fault(Fault(STATE, "status", times=None, address=address, status=422))
    done = cli("snapshot", **environment)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (3, "", 1)
    assert wallets[0] in done.stderr
    sim.add_fault(Fault(STATE, "status", times=None, status=422))
    clock.set(1)
    done = cli("snapshot", "--json", **environment)
    told = json.loads(done.stdout)
    assert (done.returncode, told["status"], told["exit_code"]) == (4, "failed", 4)
    # In every round each of them was asked once more.
    assert sim.count(STATE) == 18 + 2 * ROUNDS + 20 * ROUNDS


def test_who_failed_is_asked_again_after_all_others(take, sim, connection, wallets):
    victim = wallets[0]
    sim.add_fault(Fault(STATE, "status", times=1, address=victim, status=500))
    assert take(rounds=ROUNDS, concurrency=1).status == "ok"
    assert asked(sim) == [*wallets, victim]
    assert stored_snapshots(connection) == expected_snapshot(sim, wallets)


def test_what_the_deadline_cuts_off_is_unknown_with_the_reason(take, sim, connection, wallets):
    lost = wallets[:2]
    for address in lost:
        sim.add_fault(Fault(STATE, "silent", times=None, address=address, seconds=20))
    began = time.monotonic()
    report = take(second=1, deadline=timedelta(seconds=3), concurrency=4)
    assert time.monotonic() - began < 10
    assert report.status == "partial"
    known, unknown = split(connection, lost)
    assert known == expected_snapshot(sim, wallets, unknown=lost)
    reason = "the minute was over before an answer came"
    assert unknown == {
        (address, asset): unknown_row(address, asset, reason, 0) for address in lost for asset in ASSETS
    }


WHOLES = {
    "null": {"kind": "null"},
    "an empty object": {"kind": "replace", "body": "{}"},
    "an empty list": {"kind": "replace", "body": "[]"},
    "nothing": {"kind": "replace", "body": ""},
    "an HTML page": {"kind": "html"},
    "cut off": {"kind": "cut"},
    "cut off in a chunk": {"kind": "cut_chunked"},
    "closed before its end": {"kind": "cut_close"},
    "positions null": {"kind": "replace", "body": '{"assetPositions":null,"time":1}'},
    "positions an object": {"kind": "replace", "body": '{"assetPositions":{},"time":1}'},
    "a position without coin": {
        "kind": "replace",
        "body": json.dumps({"assetPositions": [{"position": {"szi": "1"}}]}),
    },
    "an entry of null": {"kind": "replace", "body": '{"assetPositions":[null]}'},
    "a bare NaN": {"kind": "replace", "body": '{"assetPositions":[],"time":NaN}'},
    "nested deeply": {"kind": "deep"},
    "reset": {"kind": "reset"},
    "500 null": {"kind": "status", "status": 500, "body": "null"},
}


def test_an_answer_that_cannot_be_understood_is_unknown_never_flat(take, sim, connection, wallets):
    """One wallet for each kind of broken answer."""
    lost = wallets[: len(WHOLES)]
    for address, fault in zip(lost, WHOLES.values(), strict=True):
        sim.add_fault(Fault(STATE, times=None, address=address, **fault))
    report = take()
    assert (report.status, report.details["wallets_failed"]) == ("failed", len(WHOLES))
    known, unknown = split(connection, lost)
    assert known == expected_snapshot(sim, wallets, unknown=lost)
    assert len(unknown) == 3 * len(lost)
    for (address, asset), row in unknown.items():
        assert row["missing_reason"]
        assert row == unknown_row(address, asset, row["missing_reason"], 0)


BAD_POSITIONS = {
    "szi NaN": ({"szi": "NaN"}, "position_szi: not_a_number"),
    "szi null": ({"szi": None}, "position_szi: null"),
    "szi 1e400": ({"szi": RawNumber("1e400")}, "position_szi: not_a_number"),
    "szi and a line break": ({"szi": "1.5\n"}, "position_szi: not_a_number"),
    "szi NUL": ({"szi": "1\x00"}, "position_szi: not_a_number"),
    "szi a lone surrogate": ({"szi": "\ud800"}, "position_szi: not_a_number"),
    "price text": ({"entryPx": "cheap"}, "entry_px: not_a_number"),
}


def test_a_malformed_position_makes_its_asset_unknown_and_is_quarantined(take, sim, connection, wallets):
    """One wallet for each kind; the last serves the coin twice. The other assets are told."""
    lost = wallets[: len(BAD_POSITIONS) + 1]
    reasons = dict(
        zip(lost, [*(reason for _, reason in BAD_POSITIONS.values()), "served_twice"], strict=True)
    )
    for address, (change, _) in zip(lost, BAD_POSITIONS.values(), strict=False):
        answer = state(BTC="1.5", ETH="-2.50")
        answer["assetPositions"][0]["position"] |= change
        answer_with(sim, address, answer)
    answer = state(BTC="1.5", ETH="-2.50")
    answer["assetPositions"].append(state(BTC="1.5")["assetPositions"][0])
    answer_with(sim, lost[-1], answer)
    take()
    known, unknown = split(connection, lost)
    assert known == expected_snapshot(sim, wallets, unknown=lost)
    sizes = {
        key: (row["position_szi"], row["missing_reason"], row["dirty_reason"]) for key, row in unknown.items()
    }
    assert sizes == {
        (address, asset): told
        for address in lost
        for asset, told in (
            ("HYPE", ("0", None, None)),
            ("BTC", (None, reasons[address], "null_szi")),
            ("ETH", ("-2.50", None, None)),
        )
    }
    assert rejected(connection) == sorted(
        [
            ("wallet_snapshots", json.dumps([address, "BTC"]), None, reason)
            for address, reason in reasons.items()
        ],
        key=lambda row: row[1],
    )
    assert minutes(connection)[0]["wallets_failed"] == len(lost)


def test_sizes_wider_than_a_float_are_stored_whole(take, sim, connection, wallets):
    wide = ["9007199254740993.0000000001", "-0.0000000000000000000000000000000001", RawNumber("1E+3"), 12]
    for address, size in zip(wallets, wide, strict=False):
        answer_with(sim, address, state(BTC=size))
    take(assets=["BTC"])
    stored = stored_snapshots(connection)
    assert [stored[address, "BTC"]["position_szi"] for address in wallets[:4]] == [*wide[:2], "1000", "12"]
    assert stored[wallets[2], "BTC"]["is_dirty"] == "false"


def test_a_lost_database_connection_leaves_nothing_of_the_minute(take, sim, connection, wallets):
    cut = threading.Event()

    def hang_up(answer):
        if not cut.is_set():
            cut.set()
            connection.execute(
                "select pg_terminate_backend(pid) from pg_stat_activity where datname = current_database()"
                " and application_name = %s",
                (f"hlcli:{CHANNEL.name}",),
            )
        return answer

    import psycopg

    sim.add_fault(Fault(STATE, "patch", times=None, patch=hang_up))
    with pytest.raises(psycopg.OperationalError):
        take()
    assert cut.is_set()
    assert (minutes(connection), stored_snapshots(connection)) == ([], {})
    sim.clear_faults()
    assert take(second=20).status == "ok"
    assert stored_snapshots(connection) == expected_snapshot(sim, wallets)


# --- killed -------------------------------------------------------------------------------------------------------


def alone(connection):
    """Wait until the server has noticed that every client of ours has gone."""
    others = (
        "select count(*) from pg_stat_activity where datname = current_database() and pid <> pg_backend_pid()"
    )
    until(lambda: connection.execute(others).fetchone() == (0,), "the end of the killed run's sessions")


@pytest.fixture
def killed(spawn, environment, sim, connection, rng):
    """Start a command and kill it at a random request of `most`, or a little later; True if it was still alive."""

    def run(*args, most):
        goal = sim.count() + rng.randrange(1, most + 1)
        process = spawn(*args, **environment)
        until(lambda: sim.count() >= goal or process.poll() is not None, "a request")
        # So that the commit is hit as well.
        time.sleep(rng.choice((0, rng.uniform(0, 0.2))))
        process.kill()
        process.wait()
        alone(connection)
        return process.returncode == -signal.SIGKILL

    return run


def kill_snapshots(killed, take, clock, sim, connection, wallets, kills):
    """Kill run after run of one minute; a clean run in the same minute must make the table exact."""
    done = minute = 0
    expected = expected_snapshot(sim, wallets)
    while done < kills:
        clock.set(minute)
        done += killed("snapshot", most=len(wallets))
        # All of the minute, or nothing of it.
        stored = stored_snapshots(connection, minute=minute)
        assert stored in ({}, expected)
        assert len(minutes(connection)) == minute + bool(stored)
        assert take(minute, second=20).status == "ok"
        assert stored_snapshots(connection, minute=minute) == expected
        assert_minutes_add_up(connection)
        assert_nothing_left(connection)
        minute += 1
        expected = expected_snapshot(sim, wallets, minute=minute)
    assert [run["status"] for run in minutes(connection)] == ["success"] * minute
    assert anomalies(connection) == []
    assert {run["status"] for run in runs(connection, "wallet_snapshots")} == {"abandoned", "ok"}


def test_killed_snapshots_leave_all_of_the_minute_or_nothing(killed, take, clock, sim, connection, wallets):
    kill_snapshots(killed, take, clock, sim, connection, wallets, kills=5)


@pytest.mark.long
@pytest.mark.timeout(900)
def test_fifty_killed_snapshots_leave_all_of_the_minute_or_nothing(
    killed, take, clock, sim, connection, wallets
):
    kill_snapshots(killed, take, clock, sim, connection, wallets, kills=50)


def kill_refreshes(killed, refresh, sim, connection, kills):
    """Kill refresh after refresh; the universe is the old one or the new one, and its run is there with it."""
    rows = served_rows(sim)
    refresh(10)
    done = step = 0
    while done < kills:
        step += 1
        size = 10 + step % 2
        before = stored_universe(connection)
        done += killed("universe", "refresh", "--size", str(size), most=1)
        assert stored_universe(connection) in (before, ranked(rows, size))
        assert_universe_agrees(connection)
        assert refresh(size).status == "ok"
        assert stored_universe(connection) == ranked(rows, size)
    assert {run["status"] for run in universe_runs(connection)} == {"success"}
    counted = f"select count(*) from {UNIVERSE_RUNS} where n_received <> (select count(*) from {MEMBERS} m where m.run_id = {UNIVERSE_RUNS}.run_id)"
    assert connection.execute(counted).fetchone() == (0,)


def test_killed_refreshes_leave_the_old_universe_or_the_new_one(killed, refresh, sim, connection):
    kill_refreshes(killed, refresh, sim, connection, kills=3)


@pytest.mark.long
@pytest.mark.timeout(900)
def test_fifty_killed_refreshes_leave_the_old_universe_or_the_new_one(killed, refresh, sim, connection):
    kill_refreshes(killed, refresh, sim, connection, kills=50)
