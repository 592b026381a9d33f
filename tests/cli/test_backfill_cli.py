"""`hlcli backfill` as people call it: what is refused, estimates, the fleet, progress."""

from __future__ import annotations

import json
import re
from datetime import timedelta
from decimal import Decimal
from uuid import uuid4

import pytest
from backfill_tables import PLENTY, SERVER_WEIGHT
from test_cli import NOWHERE, on_terminal
from typer.testing import CliRunner
from vault_tables import all_tables, dump, runs
from wallet_tables import watch

from hlcli import logs
from hlcli.cli import app, common
from hlcli.exitcodes import ExitCode, UsageError
from hlcli.jobs.backfill import Options, backfill
from hlcli.jobs.backfill_fleet import estimate
from hlcli.sim import Fault, Simulator
from hlcli.sim.user_fills import UserFills

A, B, C = (f"0x{number:040x}" for number in range(0xA0, 0xA3))
MIXED = "0xAbCdEf" + "0" * 33 + "1"


@pytest.fixture
def env(database):
    return {"DATABASE_URL": database, "HL_EGRESS_KEY": "test"}


@pytest.fixture
def call(monkeypatch):
    """Run `hlcli backfill ...` in this process; returns (exit code, stdout, stderr as one line)."""

    def run(*args, **env):
        with monkeypatch.context() as patched:
            for name, value in env.items():
                patched.setenv(name, value)
            done = CliRunner().invoke(app, ["backfill", *args], env={"TERM": "dumb", "COLUMNS": "250"})
        code, told = done.exit_code, done.stderr
        if done.exception and not isinstance(done.exception, SystemExit):
            assert isinstance(done.exception, UsageError), done.exception
            code, told = int(done.exception.exit_code), str(done.exception)
            assert "\n" not in told
        return code, done.stdout, " ".join(re.sub("[│╭╰─╮╯]", " ", told).split())

    return run


# --- usage --------------------------------------------------------------------------------------------------------

WRONG = {
    ("--worker-id", "4", "--total-workers", "4"): "--worker-id: the last of 4 workers is 3",
    ("--worker-id", "1"): "--worker-id: the last of 1 workers is 0",
    ("--worker-id", "-1"): "'--worker-id'",
    ("--total-workers", "0"): "'--total-workers'",
    ("--total-workers", "1001"): "'--total-workers'",
    ("--estimate", "--status"): "--estimate or --status, not both",
    ("--user", "0x12"): "is no address",
    ("--user", A, "--user", A + "0"): "is no address",
    ("--user", ""): "is no address",
    ("--since", "2025-01-01", "--until", "2025-01-01"): "nothing is between 2025-01-01 00:00Z and 2025-01-01",
    ("--since", "2025-08-01"): "nothing is between 2025-08-01 00:00Z and 2025-07-27 09:00Z",
    ("--until", "2023-10-31"): "nothing is between 2023-11-01 00:00Z and 2023-10-31 00:00Z",
    ("--estimate", "--since", "2025-08-01"): "nothing is between",
    ("--since", "yesterday"): "'yesterday' is no time",
    ("--until", "0001-01-01"): "is no time",
    ("--lease", "0.5s"): "--lease: from 1s to 1d",
    ("--lease", "25h"): "--lease: from 1s to 1d",
    ("--lease", "-1"): "is no duration",
    ("--deadline", "0"): "is no duration",
    ("--limit", "0"): "'--limit'",
    ("--max-weight", "0"): "'--max-weight'",
    ("--max-weight", "119"): "--max-weight: a single page may cost 120",
    ("--max-weight", "21", "--page-size", "40"): "--max-weight: a single page may cost 22",
    ("--concurrency", "0"): "'--concurrency'",
    ("--concurrency", "65"): "'--concurrency'",
    ("--page-size", "0"): "'--page-size'",
    ("more",): "unexpected extra argument",
}


@pytest.mark.parametrize(("args", "message"), WRONG.items(), ids=[" ".join(args) for args in WRONG])
def test_wrong_usage_exits_2(call, args, message):
    """Before the database is looked for, which would be exit 4."""
    code, out, told = call(*args, DATABASE_URL=NOWHERE)
    assert (code, out) == (2, "")
    assert message in told


def test_wrong_usage_that_the_job_finds_is_one_line(cli):
    done = cli("backfill", "--since", "2025-08-01", DATABASE_URL=NOWHERE)
    assert (done.returncode, done.stdout) == (2, "")
    assert (
        done.stderr
        == "hlcli: nothing is between 2025-08-01 00:00Z and 2025-07-27 09:00Z (where --until is not given)\n"
    )


def test_a_window_in_the_future_asks_for_nothing(call, env, connection):
    with Simulator(vaults=1, user_fills=UserFills(wallets=8, fills=16)) as sim:
        for more in (("--estimate",), (), ("--user", A)):
            code, out, told = call(
                "--since", "2050-01-01", "--until", "2051-01-01", *more, **env, **sim.env()
            )
            assert (code, out) == (2, ""), more
            assert "2050-01-01 00:00Z lies in the future" in told
        assert sim.log == []
    assert connection.execute("select count(*) from backfill_progress").fetchone() == (0,)
    assert [(run["status"], run["exit_code"]) for run in runs(connection, "backfill")] == [("failed", 2)] * 2


BAD_FILES = {
    "missing": (None, "cannot read"),
    "a folder": (..., "cannot read"),
    "binary": (bytes(range(256)), "cannot read"),
    "no text at all": (b"\0" * 100, "line 1:"),
    "UTF-16": (("\ufeff" + A).encode("utf-16-le"), "cannot read"),
    "empty": (b"", "names no wallet"),
    "comments alone": (b"# none\n\n   \n,,\n#" + A.encode(), "names no wallet"),
    "a bad address": (f"{A}\n\n# so\n{B[:-1]}\n{C}".encode(), "line 4: '0x"),
    "a header": (f"wallet,name\n{A},x\n".encode(), "line 1: 'wallet' is no address"),
    "another alphabet": (f"{A}\n{B[:-1]}\u0661\n".encode(), "line 2:"),
    "glued together": (f"{A}{B}\n".encode(), "line 1:"),
}


@pytest.mark.parametrize(("content", "message"), BAD_FILES.values(), ids=BAD_FILES)
def test_a_bad_file_of_users_exits_2(call, tmp_path, content, message):
    path = tmp_path / "users"
    if content is ...:
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    code, out, told = call("--users-file", str(path), DATABASE_URL=NOWHERE)
    assert (code, out) == (2, "")
    assert "--users-file: " in told
    assert message in told
    assert len(told) < 600


def test_a_huge_file_of_users_is_not_read_and_a_huge_line_not_shown(call, tmp_path):
    path = tmp_path / "users"
    with path.open("wb") as file:
        file.truncate((64 << 20) + 1)
    code, out, told = call("--users-file", str(path), DATABASE_URL=NOWHERE)
    assert (code, out) == (2, "")
    assert "is larger than 64 MB" in told
    # Nor one whose size nobody knows.
    code, out, told = call("--users-file", "/dev/zero", DATABASE_URL=NOWHERE)
    assert (code, out) == (2, "")
    assert "is larger than 64 MB" in told
    path.write_text(A + "\n" + "0x" + "a" * 100_000)
    code, out, told = call("--users-file", str(path), DATABASE_URL=NOWHERE)
    assert (code, out) == (2, "")
    assert "--users-file: line 2: '0xaaaa" in told
    assert len(told) < 600


GOOD_FILES = {
    "plain": (f"{A}\n{B}\n", {A, B}),
    "no last end of line": (f"{A}\n{B}", {A, B}),
    "CRLF": (f"{A}\r\n{B}\r\n", {A, B}),
    "a BOM": (f"\ufeff{A}\n", {A}),
    "mixed case": (f"{MIXED}\n{MIXED.upper().replace('X', 'x')}\n{MIXED.upper()}\n", {MIXED.lower()}),
    "comments": (f"# {C}\n{A} # and {C}\n\n  \t{B}#{C}\n", {A, B}),
    "commas": (f"{A},12.5,x\n{B} , {C}\n", {A, B}),
    "blanks around": (f"   {A}\t\n\t{B}   \n", {A, B}),
}


@pytest.mark.parametrize(("text", "users"), GOOD_FILES.values(), ids=GOOD_FILES)
def test_a_file_of_users(call, tmp_path, monkeypatch, text, users):
    given = []

    def take(_, options):
        given.append(options)
        raise UsageError("enough")

    monkeypatch.setattr("hlcli.jobs.backfill.backfill", take)
    path = tmp_path / "users"
    path.write_bytes(text.encode())
    assert call("--users-file", str(path), DATABASE_URL=NOWHERE)[0] == 2
    assert (
        call("--users-file", str(path), "--user", C.upper().replace("X", "x"), DATABASE_URL=NOWHERE)[0] == 2
    )
    assert [set(each.users) for each in given] == [users, users | {C}]
    assert [len(each.users) for each in given] == [len(users), len(users | {C})]


def test_options_reach_the_job(call, monkeypatch):
    given = []

    def take(_, options):
        given.append(options)
        raise UsageError("enough")

    monkeypatch.setattr("hlcli.jobs.backfill.backfill", take)
    call(DATABASE_URL=NOWHERE)
    call(
        *("--worker-id", "2", "--total-workers", "7", "--own-shard", "--limit", "5", "--since", "2024-01-01T02:00+02:00"),
        *("--until", "2024-02-01T12:00Z", "--deadline", "55m", "--max-weight", "500", "--concurrency", "3"),
        *("--lease", "30s", "--page-size", "100", "--fail-if-locked", "--user", A),
        DATABASE_URL=NOWHERE,
    )  # fmt: skip
    assert given[0] == Options()
    told = given[1]
    assert (told.worker_id, told.total_workers, told.own_shard, told.limit) == (2, 7, True, 5)
    assert (told.since.isoformat(), told.until.isoformat()) == (
        "2024-01-01T00:00:00+00:00",
        "2024-02-01T12:00:00+00:00",
    )
    assert (told.deadline, told.max_weight, told.concurrency) == (timedelta(minutes=55), 500, 3)
    assert (told.lease, told.page_size, told.fail_if_locked) == (timedelta(seconds=30), 100, True)
    assert told.users == [A]


def test_the_help_tells_every_option(call):
    code, out, _ = call("--help")
    assert code == 0
    for option in (
        *("--worker-id", "--total-workers", "--own-shard", "--limit", "--user", "--users-file", "--since", "--until"),
        *("--estimate", "--status", "--deadline", "--max-weight", "--concurrency", "--json"),
    ):  # fmt: skip
        assert option in out


# --- estimates ----------------------------------------------------------------------------------------------------


def everything(connection):
    """All tables as text."""
    return {table: dump(connection, table, ()) for table in all_tables(connection)}


def enlist(connection, users, state="pending", covered="{}", **columns):
    values = {
        "state": state,
        "wanted_from": "2023-11-01",
        "wanted_to": "2025-07-27 09:00",
        "covered": covered,
        "error": "why" if state == "failed" else None,
        **columns,
    }
    if state == "running":
        values |= {"lease_owner": uuid4(), "lease_token": uuid4(), "lease_expires_at": "2100-01-01"}
    with connection.cursor() as cursor:
        cursor.executemany(
            f"insert into backfill_progress (user_address, {', '.join(values)}) values (%s{', %s' * len(values)})",
            [(user, *values.values()) for user in users],
        )


WHOLE = "{[2023-11-01, 2025-07-27 09:00)}"


def test_an_estimate_asks_for_nothing_and_writes_nothing(call, env, connection):
    watch(connection, [A, B])
    enlist(connection, [B], "complete", WHOLE)
    enlist(connection, [C], "running")
    before = everything(connection)
    with Simulator(vaults=1, user_fills=UserFills(wallets=8, fills=16)) as sim:
        for more in ((), ("--json",), ("--user", C), ("--worker-id", "1", "--total-workers", "4")):
            code, out, told = call("--estimate", *more, **env, **sim.env())
            assert (code, told) == (0, ""), more
            assert out
        assert sim.log == []
    assert everything(connection) == before


def test_the_numbers_of_an_estimate(call, env, connection):
    watch(connection, [f"0x{number:040x}" for number in range(1, 1001)])
    code, out, _ = call("--estimate", "--json", **env)
    told = json.loads(out)
    assert (code, told["wallets"], told["weight_per_minute"]) == (0, 1000, 1200)
    # By hand: a page of 2,000 costs 120, one of 1,000 costs 70.
    weights = {"optimistic": 70, "average": 310, "pessimistic": 550}
    assert [each["name"] for each in told["scenarios"]] == list(weights)
    for each, pages in zip(told["scenarios"], (1, 3, 5), strict=True):
        weight = 1000 * weights[each["name"]]
        assert (each["requests"], each["weight"]) == (1000 * pages, weight)
        for workers in (1, 4, 10):
            exact = Decimal(weight) / 1200 / 60 / workers
            assert abs(Decimal(each["hours"][str(workers)]) - exact) <= Decimal("0.05")
    # With pages of 500: 45, and 33 for 250.
    told = json.loads(call("--estimate", "--json", "--page-size", "500", "--limit", "10", **env)[1])
    assert told["wallets"] == 10
    assert [each["weight"] for each in told["scenarios"]] == [330, 10 * (2 * 45 + 33), 10 * (4 * 45 + 33)]
    half = json.loads(call("--estimate", "--json", **env, HL_API_WEIGHT_PER_MINUTE="600")[1])
    assert half["weight_per_minute"] == 600
    assert Decimal(half["scenarios"][0]["hours"]["1"]) == Decimal("1.94")


def test_an_estimate_counts_what_is_left_of_the_window(settings, connection):
    users = [f"0x{number:040x}" for number in range(1, 8)]
    watch(connection, users[:6])
    half = "{[2023-11-01, 2024-06-01)}"
    enlist(connection, users[:2], "complete", WHOLE)
    enlist(connection, users[2:3], "pending", half)
    enlist(connection, users[3:4], "truncated", half, cut_off="{[2024-06-01, 2025-07-27 09:00)}")
    enlist(connection, users[4:5], "failed")
    enlist(
        connection, users[6:7], "pending"
    )  # of a list, and neither watched nor in fills: asked for all the same

    def left(**options):
        return estimate(settings(), Options(**options)).wallets

    assert left() == 4
    # What was to be done of users[2] still is: only who names it takes that back.
    month = Options().since + timedelta(days=30)
    assert (left(until=month), left(until=month, users=users[:6])) == (4, 2)
    assert left(since=Options().since - timedelta(days=1)) == 7
    shards = [left(own_shard=True, worker_id=number, total_workers=3) for number in range(3)]
    assert (sum(shards), left(worker_id=1, total_workers=3)) == (4, 4)
    assert left(users=[users[6], users[0], users[3], "0x" + "f" * 40]) == 2
    assert left(limit=2) == 2


def test_an_estimate_tells_what_was_measured_from_a_hundred_wallets_on(settings, connection):
    watch(connection, [A])
    enlist(
        connection, [f"0x{number:040x}" for number in range(1, 100)], "complete", WHOLE, pages=1, weight=21
    )
    # These tell nothing: not finished, or never asked.
    enlist(connection, [f"0x{number:040x}" for number in range(300, 310)], pages=50, weight=5000)
    enlist(connection, [f"0x{number:040x}" for number in range(310, 320)], "complete", WHOLE)
    assert len(estimate(settings(), Options()).scenarios) == 3
    enlist(
        connection,
        [f"0x{999:040x}"],
        "truncated",
        WHOLE,
        pages=7,
        weight=821,
        cut_off="{[2023-11-01, 2024-01-01)}",
    )
    options = Options(users=[f"0x{number:040x}" for number in range(5000, 6000)])
    *_, measured = estimate(settings(), options).scenarios
    assert measured.name == "as measured"
    assert (measured.requests, measured.weight) == (1060, 29_000)
    assert measured.hours == {1: Decimal("0.40"), 4: Decimal("0.10"), 10: Decimal("0.04")}


# --- what is shown ------------------------------------------------------------------------------------------------


@pytest.fixture
def fleet(connection):
    """Ten workers with long names: one that works, one that is silent, others that ended."""
    enlist(connection, [f"0x{number:040x}" for number in range(12_000)], fills_count=80_000)
    enlist(connection, [f"0x{number:040x}" for number in range(20_000, 20_500)], "complete", WHOLE)
    enlist(connection, [f"0x{number:040x}" for number in range(21_000, 21_020)], "failed")
    with connection.cursor() as cursor:
        cursor.executemany(
            "insert into ingestion_runs (run_id, source, channel, status, member, host, pid, version, started_at,"
            " heard_at, finished_at, units_ok, weight) values (gen_random_uuid(), 'hyperliquid', 'backfill', %s, %s,"
            " %s, 1, 'x', now() - interval '3 hours', now() - %s::interval,"
            " case when %s then now() - interval '1 hour' end, %s, %s)",
            [
                (
                    status,
                    f"{number}/10@egress-of-machine-{number}",
                    f"worker-{number}.region-2.example.com",
                    heard,
                    status != "running",
                    120 * number,
                    216_000,
                )
                for number, (status, heard) in enumerate(
                    [("running", "1 second"), ("running", "4 minutes"), *[("ok", "1 hour")] * 8]
                )
            ],
        )


@pytest.mark.parametrize("columns", [80, 100])
def test_a_terminal_gets_the_fleet_and_an_estimate_that_fit(env, fleet, connection, tmp_path, columns):
    code, (summary, head, *lines) = on_terminal(["backfill", "--status"], env, columns=columns, cwd=tmp_path)
    assert code == 0
    assert summary.startswith("backfill: 12,520 wallets (500 complete, 20 failed), 12,000 left, 1 worker; ")
    assert max(map(len, [head, *lines])) <= columns
    # Of a worker's line no figure is broken in two; the name may be, where there is no room.
    assert head.split() == [
        "worker",
        "state",
        "heard",
        "wallets",
        "a",
        "minute",
        "weight/min",
        "failed",
        "left",
    ]
    rows = [line.split() for line in lines if re.match(r"\d/10@", line)]
    left = dict(connection.execute(
        "select backfill_shard(user_address, 10), count(*) from backfill_progress where state = 'pending' group by 1"
    ).fetchall())  # fmt: skip
    for number, (member, state, heard, wallets, _, weight, failed, remain) in enumerate(rows):
        assert f"{number}/10@egress-of-machine-{number}".startswith(member)
        assert (state, wallets) == (
            ["working", "silent"][number] if number < 2 else "ok",
            f"{120 * number:,}",
        )
        assert heard == (["4m", "60m"][number > 1] if number else heard)
        assert weight == "1,800" if number > 1 else int(weight.replace(",", "")) in range(1190, 1240)
        assert (failed, remain) == ("0", f"{left[number]:,}" if number < 2 else "-")
    assert len(rows) == 10
    code, lines = on_terminal(["backfill", "--estimate", "--user", A], env, columns=columns, cwd=tmp_path)
    assert code == 0
    assert max(map(len, lines)) <= columns
    assert [line.split()[0] for line in lines if re.match("optim|aver|pess", line)] == [
        "optimistic", "average", "pessimistic",
    ]  # fmt: skip


def test_in_a_pipe_a_line_a_worker_and_as_json_all_of_it(call, env, fleet, cli):
    done = cli("backfill", "--status", **env)
    assert (done.returncode, done.stderr) == (0, "")
    summary, head, *lines = done.stdout.splitlines()
    assert summary.startswith("backfill: 12,520 wallets")
    assert head.split("\t")[:3] == ["worker", "host", "state"]
    assert len(lines) == 10
    assert all(line.count("\t") == head.count("\t") for line in lines)
    told = json.loads(call("--status", "--json", **env)[1])
    assert told["schema_version"] == 1
    assert (told["wallets"], told["left"], told["states"]["failed"]) == (12_520, 12_000, 20)
    assert [each["state"] for each in told["workers"]] == ["working", "silent", *["ok"] * 8]
    assert sum(each["left"] for each in told["workers"]) == 12_000
    # `hlcli status` has the same.
    done = cli("status", "--json", **env)
    shown = json.loads(done.stdout)["backfill"]
    assert (shown["wallets"], shown["left"], shown["states"]) == (
        told["wallets"],
        told["left"],
        told["states"],
    )
    assert [each["member"] for each in shown["workers"]] == [each["member"] for each in told["workers"]]
    plain = cli("status", **env)
    assert "backfill: 12,520 wallets" in plain.stdout
    assert "  worker 1/10@egress-of-machine-1 silent, heard" in plain.stdout


def test_before_the_first_backfill_there_is_no_fleet(call, env, cli):
    code, out, told = call("--status", **env)
    assert (code, told) == (0, "")
    assert out.startswith("backfill: 0 wallets")
    assert json.loads(cli("status", "--json", **env).stdout)["backfill"] is None
    assert json.loads(call("--status", "--json", **env)[1])["workers"] == []


def test_an_old_schema_is_exit_5(cli, empty_database):
    for args in ((), ("--status",), ("--estimate",)):
        done = cli("backfill", *args, DATABASE_URL=empty_database)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (5, "", 1), args


# --- progress -----------------------------------------------------------------------------------------------------


@pytest.fixture
def sim():
    world = UserFills(3, wallets=12, fills=240, page_limit=40)
    with Simulator(vaults=1, weight_per_minute=SERVER_WEIGHT, user_fills=world) as running:
        yield running


@pytest.fixture
def users(sim, tmp_path):
    path = tmp_path / "users.txt"
    path.write_text("\n".join(sim.user_fills.addresses))
    return ["--users-file", str(path), "--page-size", "40"]


def test_elsewhere_than_on_a_terminal_it_is_silent(cli, env, sim, users, connection):
    done = cli("backfill", *users, **env, **PLENTY, **sim.env())
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert connection.execute("select count(*) from fills").fetchone()[0] > 100
    done = cli("backfill", *users, "--json", **env, **PLENTY, **sim.env())
    assert (done.returncode, done.stderr) == (0, "")
    told = json.loads(done.stdout)
    assert (told["channel"], told["status"], told["details"]["wallets_left"]) == (
        "hyperliquid/backfill",
        "ok",
        0,
    )


def test_a_terminal_gets_a_bar_and_a_summary(env, sim, users, tmp_path):
    sim.add_fault(Fault("userFillsByTime", "latency", times=None, seconds=0.05))
    code, lines = on_terminal(["backfill", *users], {**env, **PLENTY, **sim.env()}, columns=100, cwd=tmp_path)
    assert code == 0
    assert max(map(len, lines)) <= 100
    assert any(re.match(r"backfill: +\d+%.* wallet/s", line) for line in lines), lines
    text = "\n".join(lines)
    assert "hyperliquid/backfill: ok" in text
    assert re.search(r"complete: \d+", text)
    assert "wallets left: 0" in text


@pytest.mark.parametrize("verbose", [True, False])
def test_with_v_a_line_a_minute_says_how_far_all_are(settings, sim, monkeypatch, capsys, verbose):
    monkeypatch.setattr("hlcli.jobs.backfill.LINE_S", 0.0)
    monkeypatch.setattr(common.root, "verbose", verbose)
    logs.setup(verbose=verbose, json_lines=False)
    try:
        report = backfill(
            settings(**PLENTY, **sim.env()),
            Options(users=sim.user_fills.addresses, page_size=40, concurrency=2),
        )
    finally:
        logs.setup(verbose=False, json_lines=False)
    assert report.exit_code == ExitCode.OK
    told = capsys.readouterr()
    assert told.out == ""
    lines = [line for line in told.err.splitlines() if "wallets are left" in line]
    if not verbose:
        assert told.err == ""
        return
    found = [
        re.search(
            r"(\d+) of 12 wallets are left; here [\d,]+ weight/min, [\d,]+ fills/s, ([\d,]+) fills so far",
            line,
        )
        for line in lines
    ]
    assert all(found)
    left = [int(each[1]) for each in found]
    came = [int(each[2].replace(",", "")) for each in found]
    assert (left, came) == (sorted(left, reverse=True), sorted(came))
    assert (left[-1], came[-1]) == (0, report.numbers["served"])
