"""`hlcli universe` against the simulated exchange and a real database."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import struct
import subprocess
import sys
import termios

import pytest
from vault_tables import PLENTY, assert_ledger_adds_up, assert_nothing_left, dump, runs
from wallet_tables import (
    CURRENT,
    LEADERBOARD,
    MEMBERS,
    assert_universe_agrees,
    board,
    listed,
    ranked,
    rejected,
    served_rows,
    stored_universe,
    universe_runs,
)

from hlcli.exitcodes import ExitCode, TemporaryError, UsageError
from hlcli.jobs.refresh_universe import Options, read_universe, refresh_universe
from hlcli.sim import Fault, Simulator


@pytest.fixture
def sim():
    with Simulator(vaults=1, wallets=120, weight_per_minute=100_000) as running:
        yield running


@pytest.fixture
def refresh(settings, sim, connection, monkeypatch):
    """Run the job in this process, with short pauses between attempts; afterwards everything adds up."""
    monkeypatch.setattr("hlcli.http.BACKOFF_BASE_S", 0.001)

    def run(size=20, **options):
        return refresh_universe(settings(**sim.env(), **PLENTY), Options(size=size, **options))

    yield run
    assert_ledger_adds_up(connection)
    assert_nothing_left(connection)
    if any(row["status"] == "success" for row in universe_runs(connection)):
        assert_universe_agrees(connection)


@pytest.fixture
def environment(database, sim):
    return {"DATABASE_URL": database, "HL_EGRESS_KEY": "test", **PLENTY, **sim.env()}


def serve(sim, rows):
    """From now on the leaderboard has these rows."""
    sim.clear_faults()
    sim.add_fault(Fault(LEADERBOARD, "replace", times=None, body=board(rows)))


def rows_of(numbers):
    """A leaderboard of these wallets, the first the best."""
    numbers = list(numbers)
    return [listed(number, f"{1000 - place}.5") for place, number in enumerate(numbers)]


def addresses(numbers):
    return [f"0x{number:040x}" for number in numbers]


def current(connection):
    return [row["wallet_id"] for row in stored_universe(connection)]


def everything(connection):
    return [dump(connection, table, without=()) for table in (CURRENT, MEMBERS)]


# --- taken --------------------------------------------------------------------------------------------------------


def test_the_size_of_the_universe_lasts(refresh, sim, connection):
    refresh(15)
    assert refresh(None).details["wallets"] == 15
    assert current(connection) == sim.wallets.top(15)


@pytest.mark.parametrize("size", [1, 20, 120])
def test_the_universe_is_the_simulators_own_ranking_digit_for_digit(refresh, sim, connection, size):
    report = refresh(size)
    assert (report.status, report.exit_code) == ("ok", ExitCode.OK)
    assert stored_universe(connection) == ranked(served_rows(sim), size)
    assert current(connection) == sim.wallets.top(size)
    (run,) = universe_runs(connection)
    assert (run["status"], run["source"], run["error"]) == ("success", "stats-data", None)
    assert (run["n_requested"], run["n_received"], run["n_listed"]) == (size, size, 120)
    assert (run["entered_count"], run["exited_count"], run["churn_warning_count"]) == (size, 0, 0)
    (ledger,) = runs(connection, "wallet_universe")
    assert (ledger["run_id"], ledger["started_at"]) == (run["ledger_run_id"], run["as_of_ts"])
    assert (ledger["rows_served"], ledger["rows_inserted"], ledger["status"]) == (size, size, "ok")
    assert run["duration_ms"] >= 0


def test_equal_profits_are_ranked_by_address(refresh, sim, connection):
    """Every fortieth place of the simulator's list has two wallets with one and the same loss."""
    refresh(120)
    stored = stored_universe(connection)
    ties = [
        row["wallet_id"] for row in stored if [row["month_pnl"] for row in stored].count(row["month_pnl"]) > 1
    ]
    assert len(ties) >= 4
    assert current(connection) == sim.wallets.top(120)


def test_a_second_refresh_changes_no_wallet_and_is_another_run(refresh, sim, connection):
    refresh()
    before = stored_universe(connection)
    report = refresh()
    assert stored_universe(connection) == before
    first, second = universe_runs(connection)
    assert (second["entered_count"], second["exited_count"], second["churn_warning_count"]) == (0, 0, 0)
    assert stored_universe(connection, MEMBERS, first["run_id"]) == before
    assert (report.numbers["updated"], report.numbers["inserted"]) == (20, 0)
    assert connection.execute(f"select count(*) from {MEMBERS}").fetchone() == (40,)


def test_who_enters_and_who_leaves_is_counted_and_told(refresh, settings, sim, connection):
    serve(sim, rows_of(range(1, 11)))
    refresh(10)
    serve(sim, rows_of([1, 2, 30, 3, 4, 5, 6, 7, 8, 9, 10]))
    refresh(10)
    run = universe_runs(connection)[-1]
    assert (run["entered_count"], run["exited_count"], run["churn_warning_count"]) == (1, 1, 0)
    assert current(connection) == addresses([1, 2, 30, 3, 4, 5, 6, 7, 8, 9])
    told = [
        (each.change, each.wallet_id, each.rank_before, each.rank)
        for each in read_universe(settings()).changes
    ]
    (entered, left) = addresses([30, 10])
    assert told == [
        ("entered", entered, None, 3),
        ("exited", left, 10, None),
        *[("moved", wallet, place, place + 1) for place, wallet in enumerate(addresses(range(3, 10)), 3)],
    ]


def test_ranks_may_be_swapped(refresh, sim, connection):
    serve(sim, rows_of(range(1, 11)))
    refresh(10)
    serve(sim, rows_of([2, 1, *range(10, 2, -1)]))
    assert refresh(10).status == "ok"
    assert current(connection) == addresses([2, 1, *range(10, 2, -1)])
    assert universe_runs(connection)[-1]["entered_count"] == 0


@pytest.mark.parametrize("sizes", [(10, 40), (40, 10)])
def test_another_size_is_no_churn(refresh, sim, connection, sizes):
    for size in sizes:
        refresh(size)
    assert current(connection) == sim.wallets.top(sizes[1])
    assert [run["churn_warning_count"] for run in universe_runs(connection)] == [0, 0]


def test_a_list_of_just_nine_tenths_is_taken(refresh, sim, connection):
    serve(sim, rows_of(range(1, 19)))
    assert refresh(20).status == "ok"
    assert (len(current(connection)), universe_runs(connection)[-1]["n_received"]) == (18, 18)


# --- refused ------------------------------------------------------------------------------------------------------


def refused(refresh, connection, match, *, source="stats-data", **options):
    """Run a refresh that must fail, and return its row: the universe stays, the reason is kept."""
    before = everything(connection)
    with pytest.raises(TemporaryError, match=match) as caught:
        refresh(**options)
    assert caught.value.exit_code is ExitCode.TEMPORARY
    assert everything(connection) == before
    run = universe_runs(connection)[-1]
    assert (run["status"], run["source"], run["error"]) == ("failed", source, str(caught.value)[:500])
    ledger = runs(connection, "wallet_universe")[-1]
    assert (ledger["status"], ledger["exit_code"], ledger["run_id"]) == ("failed", 4, run["ledger_run_id"])
    assert ledger["error"] == run["error"]
    return run


def test_a_list_under_nine_tenths_of_what_was_asked_is_refused(refresh, sim, connection):
    refresh(20)
    serve(sim, rows_of(range(1, 18)))
    run = refused(
        refresh, connection, "17 usable wallets, 20 were asked for", size=20, accept_short_list=True
    )
    assert (run["n_requested"], run["n_received"], run["n_listed"]) == (20, 17, 17)


def test_a_first_list_that_is_short_leaves_no_universe(refresh, sim, connection):
    serve(sim, rows_of(range(1, 18)))
    refused(refresh, connection, "refused", size=20)
    assert current(connection) == []


def test_the_process_exits_4_with_one_line_and_says_how_to_take_a_short_list(
    cli, refresh, environment, sim, connection
):
    refresh(20)
    sim.add_fault(Fault(LEADERBOARD, "shrink", times=None, share=0.49))
    before = everything(connection)
    done = cli("universe", "refresh", "--size", "20", **environment)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (4, "", 1)
    assert "--accept-short-list" in done.stderr
    assert everything(connection) == before
    done = cli("universe", "refresh", "--size", "20", "--accept-short-list", "--accept-churn", **environment)
    assert done.returncode == 0
    assert current(connection) != sim.wallets.top(20)
    assert universe_runs(connection)[-1]["n_listed"] == 58
    # From now on the short list is the measure.
    refresh(20)


@pytest.mark.parametrize(("share", "taken"), [(0.5, True), (0.49, False)])
def test_a_list_may_lose_half_of_its_wallets_but_not_more(refresh, sim, connection, share, taken):
    refresh(5)
    sim.add_fault(Fault(LEADERBOARD, "shrink", times=None, share=share))
    if taken:
        assert refresh(5).details["listed"] == 60
    else:
        run = refused(refresh, connection, "--accept-short-list", size=5)
        assert run["n_listed"] == 58
        assert refresh(5, accept_short_list=True).details["listed"] == 58


# --- churn --------------------------------------------------------------------------------------------------------


def universe_of(start):
    """Ten wallets; two more in `start`, two other wallets."""
    return rows_of(range(start, start + 10))


def test_three_churns_in_a_row_are_refused_and_a_quiet_one_ends_the_row(refresh, sim, connection, caplog):
    counts = []
    for start in (0, 2, 4, 4, 6, 8):  # 40 % each but for the fourth
        serve(sim, universe_of(start + 1))
        refresh(10)
        counts.append(universe_runs(connection)[-1]["churn_warning_count"])
    assert counts == [0, 1, 2, 0, 1, 2]
    assert "40 %" in caplog.text
    serve(sim, universe_of(11))
    for _ in range(2):
        run = refused(refresh, connection, "--accept-churn", size=10)
        assert (run["churn_warning_count"], run["entered_count"], run["exited_count"]) == (3, 2, 2)
    assert current(connection) == addresses(range(9, 19))
    assert refresh(10, accept_churn=True).status == "ok"
    assert current(connection) == addresses(range(11, 21))
    assert universe_runs(connection)[-1]["churn_warning_count"] == 3


def test_exactly_30_percent_is_no_churn(refresh, sim, connection):
    serve(sim, rows_of(range(1, 21)))
    refresh(20)
    serve(sim, rows_of(range(4, 24)))
    refresh(20)  # three entered and three left, of twenty
    run = universe_runs(connection)[-1]
    assert (run["entered_count"], run["exited_count"], run["churn_warning_count"]) == (3, 3, 0)
    serve(sim, rows_of(range(8, 28)))
    refresh(20)
    assert universe_runs(connection)[-1]["churn_warning_count"] == 1


def test_the_process_warns_of_churn_and_exits_0(cli, refresh, environment, sim):
    serve(sim, universe_of(1))
    refresh(10)
    serve(sim, universe_of(3))
    done = cli("universe", "refresh", "--size", "10", **environment)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (0, "", 1)
    assert "40 %" in done.stderr


# --- shown --------------------------------------------------------------------------------------------------------


def test_show_lists_the_universe_a_run_and_what_changed(cli, refresh, settings, environment, sim, connection):
    serve(sim, rows_of(range(1, 11)))
    refresh(10)
    serve(sim, rows_of([1, 2, 30, *range(3, 11)]))
    refresh(10)
    serve(sim, rows_of(range(1, 5)))
    refused(refresh, connection, "refused", size=10)
    first, second, third = (run["run_id"] for run in universe_runs(connection))

    done = cli("universe", "show", **environment)
    assert (done.returncode, done.stderr) == (0, "")
    head, *lines = [line.split("\t") for line in done.stdout.splitlines()]
    assert head == ["rank", "wallet", "pnl 30d", "roi 30d", "account", "name"]
    assert [line[1] for line in lines] == current(connection)
    assert lines[0] == ["1", addresses([1])[0], "1,000", "25.0 %", "1,000", "-"]

    told = json.loads(cli("universe", "show", "--json", **environment).stdout)
    assert (told["run"]["run_id"], told["run"]["status"], told["run"]["source"]) == (
        second,
        "success",
        "stats-data",
    )
    assert [wallet["wallet_id"] for wallet in told["wallets"]] == current(connection)
    assert [wallet["month_pnl"] for wallet in told["wallets"]] == [
        row["month_pnl"] for row in stored_universe(connection)
    ]

    told = json.loads(cli("universe", "show", "--run", str(first), "--json", **environment).stdout)
    assert [wallet["wallet_id"] for wallet in told["wallets"]] == addresses(range(1, 11))

    done = cli("universe", "show", "--diff", **environment)
    assert [line.split("\t")[:4] for line in done.stdout.splitlines()[1:3]] == [
        ["entered", addresses([30])[0], "-", "3"],
        ["exited", addresses([10])[0], "10", "-"],
    ]
    told = json.loads(cli("universe", "show", "--diff", "--json", **environment).stdout)
    assert [change["change"] for change in told["changes"]] == ["entered", "exited", *["moved"] * 7]

    # The first run has nothing before it: all of its wallets entered. A failed run has none.
    found = read_universe(settings(), run_id=first)
    assert {change.change for change in found.changes} == {"entered"}
    assert len(found.changes) == 10
    failed = read_universe(settings(), run_id=third)
    assert (failed.run["status"], failed.members, failed.changes) == ("failed", [], [])


def test_show_without_a_universe_names_the_cure(cli, settings, environment):
    done = cli("universe", "show", **environment)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (4, "", 1)
    assert "hlcli universe refresh" in done.stderr
    with pytest.raises(UsageError, match="there is no run 77"):
        read_universe(settings(), run_id=77)


NAMES = [
    "\x1b[31mred\x07",
    "\x9b31mC1",
    "\u202eabc\u2066",
    "[red]markup[/red]",
    "\r\nline\ttab",
    "🦊👩‍🚀",
    "\u200b",
]


def on_terminal(args, env, cwd):
    """What a command writes to a terminal, byte for byte."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 120, 0, 0))
    process = subprocess.Popen(
        [sys.executable, "-m", "hlcli", *args],
        stdin=slave,
        stdout=slave,
        stderr=slave,
        # A terminal that knows no colours, so that every escape would be one of the name's.
        env={**os.environ, "TERM": "dumb", "NO_COLOR": "1", **env},
        cwd=cwd,
    )
    os.close(slave)
    shown = b""
    try:
        while chunk := os.read(master, 65536):
            shown += chunk
    except OSError:  # Linux: the other side was closed
        pass
    os.close(master)
    return process.wait(60), shown.decode()


@pytest.mark.parametrize("args", [(), ("--diff",), ("--json",)], ids=["table", "diff", "json"])
def test_no_name_reaches_a_terminal_raw(refresh, environment, sim, connection, tmp_path, args):
    rows = [listed(number, "5", displayName=name) for number, name in enumerate(NAMES, 1)]
    serve(sim, rows)
    refresh(len(NAMES))
    # Stored as it came, whatever it is.
    assert [row["display_name"] for row in stored_universe(connection)] == NAMES
    assert rejected(connection) == []
    code, shown = on_terminal(["universe", "show", *args], {**environment, "COLUMNS": "100"}, tmp_path)
    assert code == 0
    assert "markup" in shown
    assert "[red]" in shown
    raw = {char for char in shown if not char.isprintable()} - {"\n", "\r"}
    assert raw == set()
