"""`hlcli fills sync` and `hlcli twap sync` as people call them."""

from __future__ import annotations

import json
import os
import re
from datetime import UTC, datetime, timedelta

import pytest
from s3_server import SECRET, USER, assert_every_call_pays, fill, fills, log_of, refuse, tids, twap_ids, twaps
from test_cli import NOWHERE, on_terminal
from typer.testing import CliRunner
from vault_tables import runs

from hlcli.cli import app
from hlcli.jobs.sync_fills import CHANNEL
from hlcli.migrations import LOCK_NAMESPACE

pytest_plugins = ("s3_fixtures",)
BOTH = pytest.mark.parametrize("what", ["fills", "twap"])


@pytest.fixture
def env(database, s3):
    return {"DATABASE_URL": database, "HL_EGRESS_KEY": "test", **s3.env()}


WRONG = {
    ("--object-key", "k", "--local-file", "f"): "give one of them",
    ("--incremental", "--object-key", "k"): "--incremental leaves out",
    ("--incremental", "--again"): "--incremental leaves out",
    ("--since", "2026-11-21", "--until", "2026-11-21"): "must be later than --since",
    ("--since", "2026-11-22", "--until", "2026-11-21"): "must be later than --since",
    ("--since", "yesterday"): "is no time",
    ("--until", "0000-00-00"): "is no time",
    ("--limit", "0"): "'--limit'",
    ("--jobs", "9"): "'--jobs'",
    ("--max-gb", "0"): "'--max-gb'",
    ("--max-gb", "nan"): "'--max-gb'",
    ("--max-gb", "inf"): "'--max-gb'",
    ("--deadline", "soon"): "is no duration",
    ("--no-such-option",): "No such option",
    ("more",): "unexpected extra argument",
}


@BOTH
@pytest.mark.parametrize(("args", "message"), WRONG.items(), ids=[" ".join(args) for args in WRONG])
def test_wrong_usage_exits_2(what, args, message, monkeypatch):
    monkeypatch.setenv("DATABASE_URL", NOWHERE)
    done = CliRunner().invoke(app, [what, "sync", *args], env={"TERM": "dumb", "COLUMNS": "200"})
    assert (done.exit_code, done.stdout) == (2, "")
    assert message in " ".join(re.sub("[│╭╰─╮╯]", " ", done.stderr).split())


@pytest.mark.parametrize(
    "args", [("--user", USER), ("--user", "0x12", "--local-file", "f"), ("--user", "", "--local-file", "f")]
)
def test_whose_fills_they_are_is_asked_of_files_alone(args, monkeypatch):
    monkeypatch.setenv("DATABASE_URL", NOWHERE)
    assert CliRunner().invoke(app, ["fills", "sync", *args]).exit_code == 2
    assert CliRunner().invoke(app, ["twap", "sync", "--user", USER]).exit_code == 2


@BOTH
@pytest.mark.parametrize("columns", ["80", "250"])
def test_the_help_tells_every_option_and_exit_code(what, columns):
    done = CliRunner().invoke(app, [what, "sync", "--help"], env={"COLUMNS": columns, "TERM": "dumb"})
    told = " ".join(re.sub("[│╭╰─╮╯]", " ", done.stdout).split())
    assert done.exit_code == 0
    options = "incremental since until object-key local-file again dry-run limit max-gb jobs deadline json"
    assert all(f"--{name}" in told for name in [*options.split(), "fail-if-locked"])
    assert ("--user" in told) == (what == "fills")
    for word in ("Default: 50m", "Default: 10.", "Default: 2.", "Exit codes: 0 done", "6 another run"):
        assert word in told
    assert max(map(len, done.stdout.splitlines())) <= max(int(columns), 80)


@BOTH
def test_the_example_of_the_help_tells_what_it_would_read_and_cost(what, cli, env, s3, connection):
    now = datetime.now(UTC) + timedelta(days=365)
    for number in range(30):
        s3.put(f"raw/{number:02}.lz4", fills(number), now)
    shown = CliRunner().invoke(app, [what, "sync", "--help"], env={"COLUMNS": "250", "TERM": "dumb"}).stdout
    example = re.search(r"Example: +hlcli (.+?) *\n", shown)[1].split()
    assert example[:2] == [what, "sync"]
    done = cli(*example, **env)
    assert (done.returncode, done.stderr) == (0, "")
    assert "dry-run" in done.stdout
    assert "objects: 30" in done.stdout
    assert "cost usd: <0.01" in done.stdout
    assert "raw/19.lz4" in done.stdout
    assert "raw/20.lz4" not in done.stdout
    assert connection.execute("select count(*) from ingestion_runs").fetchone() == (0,)
    assert_every_call_pays(s3)


def test_a_run_in_a_pipe_is_silent_and_tells_all_in_json_where_asked(cli, env, s3, connection):
    s3.put("raw/0.lz4", twaps(0, 1))
    done = cli("twap", "sync", **env)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert twap_ids(connection) == [0, 1]
    s3.put("raw/0.lz4", twaps(0))
    s3.put("raw/1.lz4", b"no such thing")
    done = cli("twap", "sync", "--json", **env)
    report = json.loads(done.stdout)
    assert (done.returncode, report["exit_code"], report["status"]) == (3, 3, "partial")
    assert report["channel"] == "s3/twap_status"
    assert (report["details"]["objects"], report["numbers"]["units_failed"]) == (2, 1)
    assert report["failed"][0].startswith("raw/1.lz4: ")
    assert done.stderr.count("\n") == 1
    assert twap_ids(connection) == [0]


def test_on_a_terminal_a_run_tells_what_it_did(env, s3, tmp_path, connection):
    for number in range(3):
        s3.put(f"raw/{number}.lz4", fills(number))
    code, lines = on_terminal(["fills", "sync", "--limit", "2"], env, columns=80, cwd=tmp_path)
    told = "\n".join(lines)
    assert code == 0
    assert re.search(r"s3/fills: ok in .*\n.*rows +2 served: 2 inserted", told)
    assert re.search(r"objects: 2\n", told)
    assert re.search(r"left: 1\n", told)


@pytest.mark.parametrize("args", [(), ("--debug",), ("-v", "--log-format", "json")], ids=str)
def test_what_s3_refuses_is_told_in_one_line_without_a_secret(cli, env, s3, args, connection):
    s3.put("raw/0.lz4", fills(0))
    s3.fault("list", times=None, instead=refuse(403, f"AccessDenied {SECRET}"))
    done = cli(*args, "fills", "sync", **env)
    assert (done.returncode, done.stdout) == (5, "")
    assert SECRET not in done.stderr
    assert "***" in done.stderr
    if not args:
        assert done.stderr.count("\n") == 1
    (run,) = runs(connection, "fills")
    assert (run["status"], run["exit_code"]) == ("failed", 5)
    assert SECRET not in run["error"]


def test_without_credentials_a_run_says_what_to_set(cli, env, monkeypatch):
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    done = cli("twap", "sync", **env)
    assert (done.returncode, done.stderr.count("\n")) == (5, 1)
    assert "AWS_ACCESS_KEY_ID" in done.stderr


def test_files_are_read_without_s3_or_credentials(cli, database, connection, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.lz4").write_bytes(fills(0, 1))
    (tmp_path / "userFills.json").write_text(json.dumps([fill(0), fill(2)]))
    env = {"DATABASE_URL": database, "HL_EGRESS_KEY": "test", "AWS_EC2_METADATA_DISABLED": "true"}
    for args in (
        ["--local-file", "in"],
        ["--local-file", "userFills.json", "--user", USER.upper().replace("X", "x")],
    ):
        done = cli("fills", "sync", *args, **env)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert tids(connection) == [0, 1, 2]
    assert connection.execute("select source, count(*) from fills group by 1 order by 1").fetchall() == [
        ("api", 1), ("s3", 2)
    ]  # fmt: skip
    assert set(log_of(connection)) == {str(tmp_path / "in/a.lz4"), str(tmp_path / "userFills.json")}


def test_nonsense_paths_exit_2_in_one_line(cli, database, tmp_path):
    os.mkfifo(tmp_path / "fifo")
    for path in ("fifo", "missing"):
        done = cli("twap", "sync", "--local-file", path, DATABASE_URL=database, HL_EGRESS_KEY="test")
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
        assert path in done.stderr


def test_a_second_run_at_once_exits_6_where_that_is_wanted_and_a_dry_run_does_not_mind(
    cli, env, connection, s3
):
    connection.execute("select pg_advisory_lock(%s, %s)", (LOCK_NAMESPACE, CHANNEL.lock_key))
    assert cli("fills", "sync", "--fail-if-locked", **env).returncode == 6
    assert cli("fills", "sync", "--fail-if-locked", "--dry-run", **env).returncode == 0
    assert s3.count("get") == 0
