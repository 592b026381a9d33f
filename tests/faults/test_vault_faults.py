"""What the sources of `hlcli ingest vaults` may do wrong, and what must hold then (F9, F11, F17; G3, G7)."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from vault_tables import (
    LIST,
    METRICS,
    PLENTY,
    TOP,
    VAULTS,
    assert_ledger_adds_up,
    assert_nothing_left,
    by_address,
    dump,
    expected_metrics,
    expected_vaults,
    metric_row,
    open_addresses,
    rejected,
    runs,
    served_details,
)

from hlcli.exitcodes import ExitCode, HlcliError
from hlcli.jobs.asking import OUTAGE_AFTER
from hlcli.jobs.ingest_vaults import Options, ingest_vaults
from hlcli.sim import Fault, Simulator
from hlcli.sim.wire import RawNumber


@pytest.fixture
def sim():
    with Simulator(vaults=30, weight_per_minute=100_000) as running:
        yield running


@pytest.fixture
def ingest(settings, sim, connection, monkeypatch):
    """Run the job in this process, with short pauses between attempts; afterwards the invariants hold."""
    monkeypatch.setattr("hlcli.http.BACKOFF_BASE_S", 0.001)

    def run(**options):
        return ingest_vaults(settings(**sim.env(), **PLENTY), Options(**options))

    yield run
    assert_ledger_adds_up(connection)
    assert_nothing_left(connection)


def everything(connection):
    cursors = connection.execute("select * from ingest_cursors").fetchall()
    return [dump(connection, table, without=()) for table in (VAULTS, METRICS, TOP, "rejected_rows")], cursors


def edit(**changes):
    """A fault's patch that changes fields of a vaultDetails answer; ... takes one away."""

    def patch(answer):
        answer |= changes
        return {name: value for name, value in answer.items() if value is not ...}

    return patch


def edit_entry(index, **changes):
    """A fault's patch that changes one entry of the list."""

    def patch(entries):
        entries[index]["summary"] |= changes
        return entries

    return patch


# --- the list -----------------------------------------------------------------------------------------------------

BROKEN_LISTS = {
    "half of the entries": {"kind": "shrink", "share": 0.5},
    "cut off": {"kind": "cut", "share": 0.5},
    "cut off in a chunk": {"kind": "cut_chunked", "share": 0.7},
    "closed before its end": {"kind": "cut_close", "share": 0.5},
    "an HTML page with 200": {"kind": "html"},
    "403": {"kind": "status", "status": 403},
    "404": {"kind": "status", "status": 404},
    "503": {"kind": "status", "status": 503},
    "null": {"kind": "null"},
    "an empty list": {"kind": "replace", "body": "[]"},
    "an object": {"kind": "replace", "body": "{}"},
    "an error object": {"kind": "replace", "body": '{"error":"busy"}'},
    "nothing": {"kind": "replace", "body": ""},
    "strings": {"kind": "replace", "body": '["a","b"]'},
    "vaults without address": {"kind": "replace", "body": '[{"summary":{"name":"x"}}]'},
    "NaN": {"kind": "replace", "body": '[{"apr":NaN,"summary":{}}]'},
    "reset": {"kind": "reset"},
}


@pytest.mark.parametrize("fault", BROKEN_LISTS.values(), ids=BROKEN_LISTS)
def test_a_broken_list_is_refused_and_nothing_changes(ingest, sim, connection, fault):
    ingest(limit=2)
    # Without its ETag, or the answer would be 304 and have no body to break.
    connection.execute("update ingest_cursors set value = value - 'etag'")
    before = everything(connection)
    sim.add_fault(Fault(LIST, times=None, **fault))
    with pytest.raises(HlcliError) as caught:
        ingest()
    assert caught.value.exit_code is ExitCode.TEMPORARY
    assert everything(connection) == before
    last = runs(connection)[-1]
    assert (last["status"], last["exit_code"]) == ("failed", 4)
    assert last["error"]
    assert sim.count("vaultDetails") == 2


def test_a_deeply_nested_list_is_refused_within_bounded_memory(sim, database, connection, tmp_path):
    """200 KB of brackets must not take gigabytes: a process of its own, or a failure would end this one."""
    sim.add_fault(Fault(LIST, "deep", times=None))
    done = subprocess.run(
        # Address space, of which libraries and threads alone reserve over one GB.
        ["bash", "-c", f"ulimit -v 6000000; exec {sys.executable} -m hlcli ingest vaults --deadline 5s"],
        env={**os.environ, "DATABASE_URL": database, **PLENTY, **sim.env()},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=90,
    )
    assert (done.returncode, done.stderr.count("\n")) == (4, 1), done.stderr
    assert runs(connection)[-1]["exit_code"] == 4


def test_the_process_exits_4_with_one_line_when_the_list_lost_half(cli, ingest, sim, database, connection):
    ingest(limit=0)
    before = everything(connection)
    sim.add_fault(Fault(LIST, "shrink", times=None))
    done = cli("ingest", "vaults", DATABASE_URL=database, **PLENTY, **sim.env())
    assert (done.returncode, done.stdout) == (4, "")
    assert done.stderr.count("\n") == 1
    assert "--accept-short-list" in done.stderr
    assert everything(connection) == before


def test_accept_short_list_takes_it_and_keeps_the_other_vaults(ingest, sim, connection):
    ingest(limit=0)
    sim.add_fault(Fault(LIST, "shrink", times=None))
    report = ingest(limit=0, accept_short_list=True)
    assert (report.status, report.details["vaults_in_list"]) == ("ok", 15)
    assert by_address(dump(connection, VAULTS)) == expected_vaults(sim, set())
    # From now on the short list is the measure.
    assert ingest(limit=0).status == "ok"


def test_a_list_that_lost_less_than_a_fifth_is_taken(ingest, sim):
    ingest(limit=0)
    sim.add_fault(Fault(LIST, "shrink", share=0.81))
    assert ingest(limit=0).status == "ok"


def test_a_list_that_was_cut_once_is_read_whole_the_second_time(ingest, sim, connection):
    sim.add_fault(Fault(LIST, "cut", times=2))
    ingest(limit=0)
    assert by_address(dump(connection, VAULTS)) == expected_vaults(sim, set())


HOSTILE_ENTRIES = {
    "NUL in the name": ({"name": "a\x00b"}, "name", "invalid_text"),
    "a lone high surrogate in the name": ({"name": "a\ud83db"}, "name", "invalid_text"),
    "a lone low surrogate in the name": ({"name": "a\ude00b"}, "name", "invalid_text"),
    "NaN as text": ({"tvl": "NaN"}, "tvl_usd", "not_a_number"),
    "Infinity as text": ({"tvl": "Infinity"}, "tvl_usd", "not_a_number"),
    "1e400": ({"tvl": RawNumber("1e400")}, "tvl_usd", "not_a_number"),
    "underscores": ({"tvl": "1_000"}, "tvl_usd", "not_a_number"),
    "closed neither true nor false": ({"isClosed": "maybe"}, "is_closed", "not_a_boolean"),
    "closed unknown": ({"isClosed": None}, "is_closed", "null"),
    "created far in the future": ({"createTimeMillis": 10**17}, "vault_create_time", "time_out_of_range"),
    "created at 2**63": ({"createTimeMillis": 2**63}, "vault_create_time", "time_out_of_range"),
    "an address that is none": ({"vaultAddress": "0xabc"}, None, "check vaults_address"),
}


@pytest.mark.parametrize(("changes", "column", "reason"), HOSTILE_ENTRIES.values(), ids=HOSTILE_ENTRIES)
def test_a_hostile_entry_is_quarantined_alone(ingest, sim, connection, changes, column, reason):
    sim.add_fault(Fault(LIST, "patch", times=None, patch=edit_entry(20, **changes)))
    report = ingest(limit=0)
    assert report.status == "ok"
    hostile = sim.vaults.addresses[20]
    key = json.dumps([changes.get("vaultAddress", hostile)])
    assert rejected(connection) == [("vaults", key, column, reason)]
    expected = expected_vaults(sim, set())
    del expected[hostile]
    assert by_address(dump(connection, VAULTS)) == expected
    assert (report.numbers["served"], report.numbers["rejected"]) == (30, 1)


def test_entries_that_are_no_vault_are_quarantined_one_by_one(ingest, sim, connection):
    strange = [None, 7, "x", [], {}, {"summary": None}, {"summary": {"vaultAddress": None}}]
    sim.add_fault(Fault(LIST, "patch", patch=lambda entries: entries[:15] + strange + entries[15:]))
    report = ingest(limit=0)
    assert (report.numbers["served"], report.numbers["rejected"]) == (37, 7)
    assert {reason for *_, reason in rejected(connection)} == {"not_a_vault"}
    assert by_address(dump(connection, VAULTS)) == expected_vaults(sim, set())


def test_a_list_of_mostly_unusable_entries_is_refused(ingest, sim, connection):
    sim.add_fault(Fault(LIST, "patch", times=None, patch=lambda entries: [*entries[:15], *[None] * 15]))
    with pytest.raises(HlcliError, match="unusable"):
        ingest()
    assert dump(connection, VAULTS) == []


def test_mixed_case_addresses_of_the_list_are_one_vault(ingest, sim, connection):
    address = sim.vaults.addresses[20]
    sim.add_fault(Fault(LIST, "patch", patch=edit_entry(20, vaultAddress="0x" + address[2:].upper())))
    ingest(limit=0)
    assert by_address(dump(connection, VAULTS)) == expected_vaults(sim, set())


def test_a_vault_listed_twice_is_stored_once_and_counted(ingest, sim, connection):
    sim.add_fault(Fault(LIST, "patch", patch=lambda entries: [*entries, entries[5]]))
    report = ingest(limit=0)
    assert by_address(dump(connection, VAULTS)) == expected_vaults(sim, set())
    assert (report.numbers["served"], report.numbers["duplicate"]) == (31, 1)


# --- the details --------------------------------------------------------------------------------------------------


@pytest.fixture
def victim(sim):
    """The largest open vault: asked first, and once the others are done nothing else is asked."""
    return open_addresses(sim)[0]


def others(sim, victim):
    return [address for address in open_addresses(sim) if address != victim]


HOSTILE_ANSWERS = {
    "null": (lambda _: None, None, "not_a_vault"),
    "an empty object": (lambda _: {}, None, "unknown_shape"),
    "a list": (lambda _: [1], None, "unknown_shape"),
    "a string": (lambda _: "busy", None, "unknown_shape"),
    "no portfolio": (edit(portfolio=...), None, "unknown_shape"),
    "another vault": (edit(vaultAddress="0x" + "7" * 40), None, "another_vault"),
    "no address": (edit(vaultAddress=...), None, "another_vault"),
    "1e400": (edit(apr=RawNumber("1e400")), "apr", "not_a_number"),
    "1e140000": (edit(apr=RawNumber("1e140000")), "apr", "not_a_number"),
    "NaN as text": (edit(maxDistributable="NaN"), "max_distributable_tvl", "not_a_number"),
    "a boolean for a number": (edit(leaderFraction=True), "leader_fraction", "not_a_number"),
    "an object for a number": (edit(leaderFraction={"a": 1}), "leader_fraction", "not_a_number"),
    "volume Infinity": (edit(portfolio=[["week", {"vlm": "Infinity"}]]), "vlm_week", "not_a_number"),
    "a point before 1970": (
        edit(portfolio=[["day", {"accountValueHistory": [[-1, "1.0"]], "pnlHistory": [], "vlm": "0"}]]),
        "source_ts",
        "time_out_of_range",
    ),
    "a point at no time": (
        edit(portfolio=[["day", {"accountValueHistory": [["soon", "1.0"]], "pnlHistory": [], "vlm": "0"}]]),
        "source_ts",
        "not_a_time",
    ),
}


@pytest.mark.parametrize(("patch", "column", "reason"), HOSTILE_ANSWERS.values(), ids=HOSTILE_ANSWERS)
def test_a_hostile_answer_is_quarantined_alone(ingest, sim, connection, victim, patch, column, reason):
    sim.add_fault(Fault("vaultDetails", "patch", times=None, address=victim, patch=patch))
    report = ingest()
    assert (report.status, report.exit_code) == ("ok", ExitCode.OK)
    assert [
        (table, json.loads(key)[0], *why)
        for table, key, *why in rejected(connection)
        if table == "vault_metrics"
    ] == [("vault_metrics", victim, column, reason)]
    assert by_address(dump(connection, METRICS)) == expected_metrics(sim, others(sim, victim))


HOSTILE_DESCRIPTIONS = {"NUL": "a\x00b", "a lone surrogate": "a\ud800b", "a lone low surrogate": "a\udc00"}


@pytest.mark.parametrize("text", HOSTILE_DESCRIPTIONS.values(), ids=HOSTILE_DESCRIPTIONS)
def test_a_description_no_text_column_takes_costs_only_itself(ingest, sim, connection, victim, text):
    sim.add_fault(Fault("vaultDetails", "patch", times=None, address=victim, patch=edit(description=text)))
    ingest()
    assert rejected(connection) == [("vaults", json.dumps([victim]), "description", "invalid_text")]
    assert by_address(dump(connection, METRICS)) == expected_metrics(sim, open_addresses(sim))
    assert by_address(dump(connection, VAULTS)) == expected_vaults(sim, set(others(sim, victim)))


STORED_TEXTS = [
    "",
    " \t\n\r",
    "\\N",
    "\\.",
    "a\\b\"c',;",
    "\u202e\u200b\ufeff",
    "🇨🇭👩‍🚀",
    "\U0010ffff",
    "x" * 300_000,
]


@pytest.mark.parametrize("text", STORED_TEXTS, ids=lambda text: ascii(text[:12]))
def test_any_other_description_is_stored_as_it_is(ingest, sim, connection, victim, text):
    sim.add_fault(Fault("vaultDetails", "patch", times=None, address=victim, patch=edit(description=text)))
    ingest(addresses=[victim])
    assert by_address(dump(connection, VAULTS))[victim]["description"] == text
    assert rejected(connection) == []


def test_a_missing_max_distributable_is_null_not_zero(ingest, sim, connection, victim):
    sim.add_fault(Fault("vaultDetails", "patch", address=victim, patch=edit(maxDistributable=...)))
    ingest(addresses=[victim])
    (row,) = dump(connection, METRICS)
    assert row == metric_row(served_details(sim, victim) | {"maxDistributable": None})
    assert row["max_distributable_tvl"] is None


@pytest.mark.parametrize(("served", "cut"), [(0, "false"), (99, "false"), (100, "true"), (101, "true")])
def test_followers_cut_at_100_are_flagged(ingest, sim, connection, victim, served, cut):
    follower = {"user": "Leader", "vaultEquity": "1.0"}
    sim.add_fault(Fault("vaultDetails", "patch", address=victim, patch=edit(followers=[follower] * served)))
    ingest(addresses=[victim])
    (row,) = dump(connection, METRICS)
    assert (row["follower_count"], row["followers_truncated"]) == (str(served), cut)


def test_numbers_wider_than_a_float_are_stored_whole(ingest, sim, connection, victim):
    wide = {
        "apr": RawNumber("-123456789012345.01234567890123456789"),
        "leaderFraction": RawNumber("1.5e-12"),
        "leaderCommission": 0,
        "maxDistributable": RawNumber("9007199254740993.0000000001"),
        "maxWithdrawable": RawNumber("1E+3"),
    }
    sim.add_fault(Fault("vaultDetails", "patch", address=victim, patch=edit(**wide)))
    ingest(addresses=[victim])
    (row,) = dump(connection, METRICS)
    assert (row["apr"], row["leader_fraction"], row["leader_commission"], row["max_distributable_tvl"]) == (
        "-123456789012345.01234567890123456789",
        "0.0000000000015",
        "0",
        "9007199254740993.0000000001",
    )
    assert row["max_withdrawable"] == "1000"


FAILING = {
    "422": {"kind": "status", "status": 422},
    "403": {"kind": "status", "status": 403},
    "500 null": {"kind": "status", "status": 500, "body": "null"},
    "an HTML page": {"kind": "html"},
    "cut off": {"kind": "cut", "share": 0.5},
    "NaN": {"kind": "patch", "patch": edit(apr=RawNumber("NaN"))},
    "an integer of 5000 digits": {"kind": "bigint"},
    "deep nesting": {"kind": "deep"},
    "nothing": {"kind": "replace", "body": ""},
}


@pytest.mark.parametrize("fault", FAILING.values(), ids=FAILING)
def test_a_vault_that_fails_is_named_and_the_others_go_on(ingest, sim, connection, victim, fault):
    sim.add_fault(Fault("vaultDetails", times=None, address=victim, **fault))
    report = ingest()
    assert (report.status, report.exit_code) == ("partial", ExitCode.PARTIAL)
    assert by_address(dump(connection, METRICS)) == expected_metrics(sim, others(sim, victim))
    run = runs(connection)[-1]
    assert (run["status"], run["exit_code"], run["units_failed"], run["rows_failed"]) == ("partial", 3, 1, 1)
    assert [text.split(":")[0] for text in run["details"]["failed"]] == [victim]
    assert victim in run["error"]
    # What failed is due again, and nothing else is.
    sim.clear_faults()
    assert ingest().exit_code is ExitCode.OK
    assert by_address(dump(connection, METRICS)) == expected_metrics(sim, open_addresses(sim))


def test_a_fault_that_passes_is_retried_and_no_failure(ingest, sim, connection, victim):
    for fault in (
        Fault("vaultDetails", "status", status=502),
        Fault("vaultDetails", "cut"),
        Fault("vaultDetails", "reset"),
    ):
        sim.add_fault(fault)
    assert ingest().exit_code is ExitCode.OK
    assert by_address(dump(connection, METRICS)) == expected_metrics(sim, open_addresses(sim))


def code_of(run):
    """The exit code of a run, whether it reports its end or raises it."""
    try:
        return run().exit_code
    except HlcliError as error:
        return error.exit_code


def test_an_outage_ends_the_run_early_with_exit_4(ingest, settings, connection):
    with Simulator(vaults=120, weight_per_minute=100_000) as outage:
        outage.add_fault(Fault("vaultDetails", "status", times=None, status=403))
        environment = settings(**outage.env(), **PLENTY)
        code = code_of(lambda: ingest_vaults(environment, Options(include_closed=True, concurrency=4)))
    assert outage.count("vaultDetails") <= OUTAGE_AFTER + 4
    run = runs(connection)[-1]
    assert OUTAGE_AFTER <= run["units_failed"] <= OUTAGE_AFTER + 4
    assert run["details"]["left_for_next_run"] == 120 - run["units_failed"]
    assert (code, run["exit_code"], run["status"]) == (ExitCode.TEMPORARY, 4, "failed")


def test_all_of_a_few_vaults_failing_is_exit_4_too(ingest, sim, connection):
    """The list may be fine; the run was started for the metrics, and has none."""
    sim.add_fault(Fault("vaultDetails", "status", times=None, status=403))
    assert code_of(lambda: ingest(limit=3)) is ExitCode.TEMPORARY
    run = runs(connection)[-1]
    assert (run["exit_code"], run["status"], run["units_failed"]) == (4, "failed", 3)


def test_failures_in_a_row_that_end_are_no_outage(ingest, sim, connection):
    sim.add_fault(Fault("vaultDetails", "status", times=OUTAGE_AFTER - 1, status=403))
    assert ingest(include_closed=True, concurrency=1).exit_code is ExitCode.PARTIAL
    assert connection.execute(f"select count(*) from {METRICS}").fetchone() == (30 - OUTAGE_AFTER + 1,)


def test_the_process_exits_3_and_warns_when_some_vaults_fail(cli, sim, database, connection, victim):
    sim.add_fault(Fault("vaultDetails", "status", times=None, address=victim, status=422))
    done = cli("ingest", "vaults", DATABASE_URL=database, **PLENTY, **sim.env())
    assert (done.returncode, done.stdout) == (3, "")
    assert victim in done.stderr
    assert runs(connection)[-1]["exit_code"] == 3


def test_a_rejected_row_is_kept_once_however_often_it_is_served(ingest, sim, connection):
    stranger = "0x" + "5" * 40
    for _ in range(3):
        ingest(addresses=[stranger])
    kept = connection.execute(
        "select row_key, times, first_run_id <> last_run_id from rejected_rows"
    ).fetchall()
    assert kept == [(json.dumps([stranger]), 3, True)]
