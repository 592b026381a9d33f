"""`hlcli fills coverage` as people call it."""

from __future__ import annotations

import json
import re

import pytest
from test_cli import NOWHERE, on_terminal
from typer.testing import CliRunner

from hlcli.cli import app

LOST, WHOLE, NEW = (f"0xabcdef{number:034d}" for number in range(3))
UNKNOWN = "0x" + "9" * 40


@pytest.fixture
def env(database):
    return {"DATABASE_URL": database, "HL_EGRESS_KEY": "test"}


@pytest.fixture
def world(connection):
    """Seven hours in S3 with a gap, a file, a wallet with all of its fills, one with half of them, one only in S3."""
    connection.execute(
        "insert into etl_s3_ingest_log (table_name, bucket, s3_object_key, etag, size, last_modified, state,"
        " rows_ingested, rows_rejected, run_id)"
        " select 'fills', case i when 0 then 'file:' else 'b' end, 'x/20250914/' || i || '.lz4', 'e', 1, now(), 'ok',"
        " 1000, 2, gen_random_uuid() from generate_series(0, 15) i where i = 0 or i > 7 and i <> 11;"
        "insert into etl_s3_ingest_log (table_name, bucket, s3_object_key, etag, size, last_modified, state, run_id)"
        " values ('fills', 'b', 'x/readme', 'e', 1, now(), 'ok', gen_random_uuid())"
    )
    with connection.cursor() as cursor:
        cursor.executemany(
            "insert into backfill_progress (user_address, state, wanted_from, wanted_to, covered, cut_off,"
            " slices_covered, fills_count, error) values (%s, %s, '2023-11-01', '2025-09-14 08:00', %s, %s, %s, %s, %s)",
            [
                (
                    WHOLE,
                    "complete",
                    "{[2023-11-01, 2025-09-14 08:00)}",
                    "{}",
                    "{[2026-11-08 01:02:03, 2026-11-21)}",
                    1234,
                    None,
                ),
                (
                    LOST,
                    "failed",
                    "{[2024-03-05 11:22:33.456, 2025-09-14 08:00)}",
                    "{[2023-11-01, 2024-03-05 11:22:33.456)}",
                    "{}",
                    12_345,
                    "no list but \x1b[2Jnull: " + "x" * 300,
                ),
            ],
        )
    connection.execute(
        "insert into fills (user_address, coin, tid, oid, side, time, px, sz, source)"
        " values (%(lost)s, 'BTC', 1, 1, 'A', '2024-03-05 11:22:33.456', 1, 1, 'api'),"
        " (%(lost)s, 'BTC', 2, 1, 'A', '2025-09-14 09:00', 1, 1, 's3'),"
        " (%(new)s, 'BTC', 2, 1, 'B', '2025-09-14 09:00', 1, 1, 's3')",
        {"lost": LOST, "new": NEW},
    )


WRONG = {
    ("--state", "done"): "'done' is not one of 'pending', 'running', 'complete', 'truncated', 'failed'",
    ("--state", ""): "is not one of",
    ("--limit", "0"): "'--limit'",
    ("--limit", "many"): "'--limit'",
    ("--user", "0x12"): "is no address",
    ("--user", UNKNOWN, "--user", ""): "is no address",
    ("more",): "unexpected extra argument",
}


@pytest.mark.parametrize(("args", "message"), WRONG.items(), ids=[" ".join(args) for args in WRONG])
def test_wrong_usage_exits_2(args, message, monkeypatch):
    monkeypatch.setenv("DATABASE_URL", NOWHERE)
    done = CliRunner().invoke(app, ["fills", "coverage", *args], env={"TERM": "dumb", "COLUMNS": "200"})
    assert (done.exit_code, done.stdout) == (2, "")
    assert message in " ".join(re.sub("[│╭╰─╮╯]", " ", done.stderr).split())


def test_the_help_tells_every_option_an_example_and_the_exit_codes():
    done = CliRunner().invoke(app, ["fills", "coverage", "--help"], env={"COLUMNS": "120", "TERM": "dumb"})
    told = " ".join(re.sub("[│╭╰─╮╯]", " ", done.stdout).split())
    assert done.exit_code == 0
    for word in (
        "--user",
        "--state",
        "--limit",
        "--json",
        "Default: 50 on a terminal",
        "Example: hlcli fills cov",
    ):
        assert word in told
    assert "Exit codes: 0 done" in told


def test_in_a_pipe_there_is_a_line_a_wallet_with_all_of_it(cli, env, world):
    done = cli("fills", "coverage", **env)
    assert (done.returncode, done.stderr) == (0, "")
    head, lost, whole = (line.split("\t") for line in done.stdout.splitlines())
    assert head == [
        "wallet",
        "state",
        "fills",
        "wanted",
        "api",
        "cut off",
        "slices",
        "missing",
        "stored",
        "error",
    ]
    wanted = "2023-11-01 .. 2025-09-14 08:00Z"
    cut = "2023-11-01 .. 2024-03-05 11:22:33.456Z"
    assert lost[:-1] == [
        LOST,
        "failed",
        "12345",
        wanted,
        "2024-03-05 11:22:33.456Z .. 2025-09-14 08:00Z",
        cut,
        "-",
        cut,
        "-",
    ]
    assert lost[-1] == "no list but \N{REPLACEMENT CHARACTER}[2Jnull: " + "x" * 300
    assert whole == [
        *[WHOLE, "complete", "1234", wanted, wanted, "-"],
        *["2026-11-08 01:02:03Z .. 2026-11-21", "-", "-", "-"],
    ]


def test_json_is_one_document(cli, env, world):
    done = cli("fills", "coverage", "--json", "--user", LOST.upper().replace("X", "x"), "--user", NEW, **env)
    assert (done.returncode, done.stderr) == (0, "")
    told = json.loads(done.stdout)
    assert told["schema_version"] == 1
    assert told["s3"] == {
        "ranges": [
            {"from": "2025-09-14T08:00:00Z", "to": "2025-09-14T10:00:00Z"},
            {"from": "2025-09-14T12:00:00Z", "to": "2025-09-14T15:00:00Z"},
        ],
        "gaps": [{"from": "2025-09-14T10:00:00Z", "to": "2025-09-14T12:00:00Z"}],
        "objects": 8,
        "objects_ok": 8,
        "objects_without_hour": 1,
        "rows_ingested": 7000,
        "rows_rejected": 14,
    }
    assert told["local_files"] == {"files": 1, "rows_ingested": 1000}
    assert told["states"]["failed"] == {"wallets": 1, "fills": 12345, "cut_off": 1, "missing": 1}
    lost, new = told["wallets"]
    cut = [{"from": "2023-11-01T00:00:00Z", "to": "2024-03-05T11:22:33.456Z"}]
    assert (lost["user_address"], lost["state"], lost["known"]) == (LOST, "failed", True)
    assert lost["cut_off"] == lost["missing"] == cut
    assert lost["api"] == [{"from": cut[0]["to"], "to": "2025-09-14T08:00:00Z"}]
    assert lost["stored"] == [
        {"source": "api", "rows": 1, "first": cut[0]["to"], "last": cut[0]["to"]},
        {"source": "s3", "rows": 1, "first": "2025-09-14T09:00:00Z", "last": "2025-09-14T09:00:00Z"},
    ]
    assert (new["user_address"], new["state"], new["known"], new["api"]) == (NEW, None, True, [])
    assert new["missing"] == [
        {"from": "2023-11-01T00:00:00Z", "to": "2025-09-14T08:00:00Z"},
        {"from": "2025-09-14T10:00:00Z", "to": "2025-09-14T12:00:00Z"},
    ]


def test_without_a_wallet_json_is_a_document_and_a_pipe_gets_the_head_alone(cli, env):
    told = json.loads(cli("fills", "coverage", "--json", **env).stdout)
    assert (told["wallets"], told["states"], told["s3"]["ranges"]) == ([], {}, [])
    done = cli("fills", "coverage", "--state", "pending", **env)
    assert (done.returncode, done.stdout.count("\n"), done.stderr) == (0, 1, "")


@pytest.mark.parametrize("columns", [80, 200])
def test_a_terminal_gets_a_summary_and_tables_that_fit(env, world, tmp_path, connection, columns):
    code, lines = on_terminal(["fills", "coverage"], env, columns=columns, cwd=tmp_path)
    assert code == 0
    assert max(map(len, lines)) <= min(columns, 100)
    told = " ".join(" ".join(lines).split())
    assert "s3 2025-09-14 08:00Z .. 2025-09-14 10:00Z, 2025-09-14 12:00Z .. 2025-09-14 15:00Z" in told
    assert "s3 lacks 2025-09-14 10:00Z .. 2025-09-14 12:00Z" in told
    assert "8 of 8 objects (1 of no hour), 7,000 rows, 14 rejected" in told
    assert "files 1, 1,000 rows" in told
    assert "wallets 1 complete, 1 failed" in told
    assert "13,579 fills from the API; 1 miss something, 1 were cut off" in told
    assert told.index(LOST) < told.index(WHOLE)
    assert "\x1b[2J" not in told
    code, lines = on_terminal(
        ["fills", "coverage", "--user", UNKNOWN, "--user", NEW, "--user", LOST],
        env,
        columns=columns,
        cwd=tmp_path,
    )
    assert code == 0
    assert max(map(len, lines)) <= min(columns, 100)
    text = "\n".join(lines)
    assert f"{UNKNOWN} unknown: neither asked for nor stored" in text
    assert f"{NEW} not asked for\n" in text
    assert f"{LOST} failed, 12,345 fills from the API\n" in text
    assert re.search(r"cut off +2023-11-01 \.\. 2024-03-05 11:22:33\.456Z", text)
    assert re.search(r"stored +1 from s3, 2025-09-14 09:00Z \.\. 2025-09-14 09:00Z", text)
    assert text.index(UNKNOWN) < text.index(NEW) < text.index(LOST)


def test_a_terminal_gets_fifty_wallets_and_few_of_many_ranges(env, tmp_path, connection):
    connection.execute(
        "insert into backfill_progress (user_address, wanted_from, wanted_to, covered)"
        " select '0x' || lpad(to_hex(i), 40, '0'), '2023-11-01', '2025-09-14', case i when 1 then (select range_agg("
        " tstzrange(t, t + interval '1 hour')) from generate_series('2023-11-01', '2023-12-01', interval '1 day') t)"
        " else '{}' end from generate_series(1, 60) i"
    )
    shown = {}
    for limit in ((), ("--limit", "55")):
        _, lines = on_terminal(["fills", "coverage", *limit], env, columns=100, cwd=tmp_path)
        shown[limit] = sum(line.startswith("0x") for line in lines)
    assert list(shown.values()) == [50, 55]
    text = "\n".join(lines)
    assert re.search(r"\n0x0{39}1  pending +0 +api +2023-11-01 \.\. 2023-11-01 01:00Z", text)
    assert re.search(r"api +2023-11-04 \.\. 2023-11-04 01:00Z *\n +api +26 more *\n +api +2023-12-01 ", text)


def test_an_old_schema_is_exit_5(cli, empty_database):
    done = cli("fills", "coverage", DATABASE_URL=empty_database)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (5, "", 1)
