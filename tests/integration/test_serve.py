"""The HTTP API: answers of a real `hlcli serve` over a socket; faults and the token in this process."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from decimal import Decimal

import psycopg
import psycopg_pool
import pytest
import requests
import uvicorn
from psycopg import conninfo, sql
from psycopg.types.json import Jsonb

from hlcli.serve import models, pool
from hlcli.serve.app import create_app

WALLET = "0x31ca8395cf837de08b24da3f660e77761dfb974b"
DAY = datetime(2025, 11, 3, tzinfo=UTC)
NOWHERE = "postgresql://user:hunter2secret@127.0.0.1:1/db"


def put(connection, twap_id=123456, ts=DAY, status="activated", wallet=WALLET, **other):
    """One row of twap_status; what is not given is as of an ordinary TWAP of half an hour."""
    row = {
        "twap_id": twap_id,
        "wallet": wallet,
        "ts": ts,
        "status": status,
        "asset": "SOL",
        "side": "B",
        "size_executed": Decimal("10.5"),
        "notional_executed": Decimal("950.25"),
        "duration_minutes": 30,
        "created_at": ts,
        "ts_kind": "event",
        "s3_object_key": "raw/twap_statuses/a",
        "s3_last_modified": DAY,
        "object_id": 1,
        "raw_payload": Jsonb({"twap_id": twap_id, "status": status}),
        **other,
    }
    names, places = ", ".join(row), ", ".join(f"%({name})s" for name in row)
    connection.execute(f"insert into twap_status ({names}) values ({places})", row)


@contextmanager
def copied(server, template):
    """The connection string of a database with the current schema."""
    name = f"hlcli_test_{uuid.uuid4().hex}"
    with psycopg.connect(server, autocommit=True) as admin:
        admin.execute(
            sql.SQL("create database {} template {}").format(sql.Identifier(name), sql.Identifier(template))
        )
        yield conninfo.make_conninfo(server, dbname=name)
        admin.execute(sql.SQL("drop database {} with (force)").format(sql.Identifier(name)))


def start(url, log, *args, **env):
    """`hlcli serve` on any free port as a process that writes to the file `log`."""
    # Of the module's process, too, no setting of the machine.
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("API_", "HL_", "HLCLI_", "PG"))
    }
    with log.open("wb") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "hlcli", "-v", "serve", "--port", "0", *args],
            env={**kept, "DATABASE_URL": url, **env},
            cwd=log.parent,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )


def address(process, log):
    """Where a started process listens."""
    for _ in range(600):
        if found := re.search(r"listening on (http://\S+:\d+), documentation on \1/docs", log.read_text()):
            return found[1]
        assert process.poll() is None, log.read_text()
        time.sleep(0.05)
    raise AssertionError(log.read_text())


@pytest.fixture(scope="module")
def stored(server, template):
    """A connection to the one database of the tests that need no other; each uses a wallet of its own."""
    with copied(server, template) as url, psycopg.connect(url, autocommit=True) as connection:
        yield connection, url


@pytest.fixture(scope="module")
def process(stored, tmp_path_factory):
    log = tmp_path_factory.mktemp("serve") / "log"
    running = start(stored[1], log)
    yield running, address(running, log)
    running.terminate()
    running.wait(20)


@pytest.fixture
def wallet(rng):
    return f"0x{rng.getrandbits(160):040x}"


@pytest.fixture
def twap_id(rng):
    return rng.getrandbits(62)


@pytest.fixture
def add(stored, wallet, twap_id):
    """put() into the shared database, by default for the test's own wallet and TWAP."""

    def into(**row):
        put(stored[0], **{"wallet": wallet, "twap_id": twap_id, **row})

    return into


@pytest.fixture
def ask(process, wallet):
    """GET /api/v1/twaps for the test's wallet and November 2025; the parsed answer, which must be sound."""

    def get(code=200, **parameters):
        query = {
            "wallet": wallet,
            "start": "2025-11-01T00:00:00Z",
            "end": "2025-11-30T00:00:00Z",
            **parameters,
        }
        return sound(requests.get(f"{process[1]}/api/v1/twaps", query, timeout=20), models.Twaps, code)

    return get


@pytest.fixture
def show(process):
    def get(twap_id, code=200):
        return sound(requests.get(f"{process[1]}/api/v1/twaps/{twap_id}", timeout=20), models.TwapRows, code)

    return get


def sound(answer, model, code):
    """The answer's JSON, after a look that it has this code and is to the letter what the model would write."""
    assert answer.status_code == code, answer.text
    assert answer.headers["content-type"] == "application/json"
    if code == 200:
        assert json.loads(model.model_validate_json(answer.content).model_dump_json()) == answer.json()
    return answer.json()


def ids(told):
    return [twap["twap_id"] for twap in told["twaps"]]


# --- shapes -------------------------------------------------------------------------------------------------------


def test_a_list_has_the_shape_of_the_specification(ask, add, wallet):
    raw = {
        "time": "2025-11-03T12:00:00.123456789",
        "state": {"sz": "0.10", "n": 2**60},
        "list": [None, True, 1.50],
    }
    add(twap_id=123456, ts=DAY + timedelta(hours=12), raw_payload=Jsonb(raw))
    told = ask(start="2025-11-01T00:00:00Z", end="2025-11-04T00:00:00Z")
    expected = {
        "wallet": wallet,
        "start": "2025-11-01T00:00:00Z",
        "end": "2025-11-04T00:00:00Z",
        "twaps": [
            {
                "twap_id": "123456",
                "asset": "SOL",
                "side": "B",
                "status": "activated",
                "duration_minutes": 30,
                "latest_ts": "2025-11-03T12:00:00Z",
                "executed": {"size": "10.5", "notional": "950.25"},
                "raw": raw,
            }
        ],
    }
    assert told == expected
    assert list(told) == list(expected)
    assert list(told["twaps"][0]) == list(expected["twaps"][0])


def test_a_twap_has_the_shape_of_the_specification_and_all_rows_oldest_first(show, add, wallet, twap_id):
    add(ts=DAY + timedelta(hours=1), status="finished", raw_payload=Jsonb({"b": "é\u2028"}))
    add(ts=DAY, raw_payload=Jsonb({}))
    # At one moment what begins comes before what ends.
    add(ts=DAY + timedelta(hours=1), raw_payload=Jsonb({"c": 0}))
    assert show(twap_id) == {
        "twap_id": str(twap_id),
        "rows": [
            {"wallet": wallet, "ts": "2025-11-03T00:00:00Z", "status": "activated", "raw": {}},
            {"wallet": wallet, "ts": "2025-11-03T01:00:00Z", "status": "activated", "raw": {"c": 0}},
            {"wallet": wallet, "ts": "2025-11-03T01:00:00Z", "status": "finished", "raw": {"b": "é\u2028"}},
        ],
    }


def test_nothing_known_is_an_empty_list_and_an_unknown_twap_404(ask, show, wallet):
    assert ask()["twaps"] == []
    assert show(2**63 - 1, 404) == {"detail": "there is no TWAP 9223372036854775807"}


def test_what_is_unknown_is_null(ask, add):
    nothing = dict.fromkeys(
        ("asset", "side", "size_executed", "notional_executed", "duration_minutes", "created_at")
    )
    add(**nothing)
    (twap,) = ask()["twaps"]
    assert [twap[name] for name in ("asset", "side", "duration_minutes")] == [None] * 3
    assert twap["executed"] == {"size": None, "notional": None}


@pytest.mark.parametrize(
    "digits",
    [
        "0.00000000010",
        "123456789012345678901234567890.123456789012345678",
        "0",
        "0.000",
        "-1.50",
        "1" + "0" * 30,
    ],
)
def test_decimals_are_told_digit_for_digit(ask, add, digits):
    add(size_executed=digits, notional_executed=digits)
    assert ask()["twaps"][0]["executed"] == {"size": digits, "notional": digits}


def test_digits_in_raw_stay_as_they_are_stored(process, stored, add, twap_id):
    add(raw_payload='{"sz": 0.10000000000000000000001000, "n": 12345678901234567890123}')
    text = requests.get(f"{process[1]}/api/v1/twaps/{twap_id}", timeout=20).text
    assert "0.10000000000000000000001000" in text
    assert "12345678901234567890123" in text


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("2025-11-03", "2025-11-03T00:00:00Z"),
        ("2025-11-03T12:00", "2025-11-03T12:00:00Z"),
        ("2025-11-03T12:00:00.5Z", "2025-11-03T12:00:00.500000Z"),
        ("2025-11-03T12:00:00.123456789Z", "2025-11-03T12:00:00.123456Z"),
        ("2025-11-03T12:00:00+02:00", "2025-11-03T10:00:00Z"),
        ("2025-11-03T12:00:00 02:00", "2025-11-03T10:00:00Z"),  # a + that nobody escaped
        ("2025-11-03T12:00:00-02:30", "2025-11-03T14:30:00Z"),
    ],
)
def test_times_are_iso_8601_and_told_in_utc(ask, given, told):
    assert ask(start=given)["start"] == told


def test_a_row_tells_its_microseconds_and_both_ends_of_the_range_belong_to_it(ask, show, add, twap_id):
    add(ts=DAY + timedelta(microseconds=7))
    moment = "2025-11-03T00:00:00.000007Z"
    assert ask(start=moment, end=moment)["twaps"][0]["latest_ts"] == moment
    assert show(twap_id)["rows"][0]["ts"] == moment
    assert ask(start="2025-11-03T00:00:00.000008Z")["twaps"] == []
    assert ask(end="2025-11-03T00:00:00.000006Z")["twaps"] == []


# --- which rows ---------------------------------------------------------------------------------------------------


def test_on_a_tie_the_end_is_later_than_the_beginning(ask, add):
    for number, statuses in enumerate(
        [["activated", "finished"], ["terminated", "activated"], ["error", "activated"], ["zzz", "activated"]]
    ):
        for status in statuses:
            add(twap_id=number, status=status)
    assert {twap["twap_id"]: twap["status"] for twap in ask()["twaps"]} == {
        "0": "finished",
        "1": "terminated",
        "2": "error",
        "3": "zzz",
    }


def test_the_limit_counts_twaps_and_keeps_the_newest(ask, add):
    for number in range(5):
        for minute, status in ((0, "activated"), (1, "odd"), (2, "finished")):
            add(twap_id=number, ts=DAY + timedelta(hours=number, minutes=minute), status=status)
    assert ids(ask()) == ["4", "3", "2", "1", "0"]
    assert ids(ask(limit=2)) == ["4", "3"]
    told = ask(limit=2, latest_per_twap="false")
    assert ids(told) == ["4"] * 3 + ["3"] * 3
    assert [twap["status"] for twap in told["twaps"]] == ["finished", "odd", "activated"] * 2


def test_by_event_shows_only_rows_within_the_range_and_by_created_the_twap_as_it_is_now(ask, add):
    add(ts=DAY)
    add(ts=DAY + timedelta(days=2), status="finished", created_at=DAY)
    short = {"start": "2025-11-02", "end": "2025-11-04"}
    assert [twap["status"] for twap in ask(**short)["twaps"]] == ["activated"]
    assert [twap["status"] for twap in ask(**short, by="created")["twaps"]] == ["finished"]
    assert len(ask(**short, latest_per_twap="false")["twaps"]) == 1
    assert len(ask(**short, by="created", latest_per_twap="false")["twaps"]) == 2
    later = {"start": "2025-11-04", "end": "2025-11-06"}
    assert [twap["status"] for twap in ask(**later)["twaps"]] == ["finished"]
    assert ask(**later, by="created")["twaps"] == []


def test_active_is_from_the_creation_to_the_end_or_for_as_long_as_was_planned(ask, add):
    hour = timedelta(hours=1)
    add(twap_id=1, ts=DAY, duration_minutes=600)  # its end was not seen: planned until 10:00
    add(twap_id=2, ts=DAY, duration_minutes=600)  # ended at 02:00
    add(twap_id=2, ts=DAY + 2 * hour, created_at=DAY, status="terminated", duration_minutes=600)
    # Its terminal row bears the time of creation, which is no end: planned until 10:00.
    add(twap_id=3, ts=DAY, status="finished", ts_kind="creation", duration_minutes=600)
    add(twap_id=4, ts=DAY, created_at=None, duration_minutes=None)  # known for one moment
    add(twap_id=5, ts=DAY + 20 * hour)  # not yet
    add(twap_id=6, ts=DAY, duration_minutes=2**31 - 1)

    def alive(start, end):
        told = ask(start=(DAY + start * hour).isoformat(), end=(DAY + end * hour).isoformat(), by="active")
        return sorted(int(number) for number in ids(told))

    assert alive(3, 4) == [1, 3, 6]
    assert alive(2, 4) == [1, 2, 3, 6]
    assert alive(10, 11) == [1, 3, 6]
    assert alive(11, 12) == [6]
    assert alive(-2, 0) == [1, 2, 3, 4, 6]
    assert alive(-2, -1) == []
    assert alive(11, 20) == [5, 6]


def test_a_twap_may_be_alive_where_one_row_alone_tells_of_it_and_another_of_later(ask, add):
    add(ts=DAY + timedelta(minutes=172), status="error", created_at=None, ts_kind="creation")
    late = DAY + timedelta(minutes=236)
    add(
        ts=DAY + timedelta(minutes=71),
        status="error",
        created_at=late,
        ts_kind="creation",
        duration_minutes=126,
    )
    start, end = (DAY + timedelta(minutes=minutes) for minutes in (196, 232))
    told = ask(start=start.isoformat(), end=end.isoformat(), by="active")
    assert [twap["latest_ts"] for twap in told["twaps"]] == ["2025-11-03T02:52:00Z"]


def test_every_choice_is_what_a_plain_reading_of_the_rules_gives(ask, add, rng):
    rows = {}
    for _ in range(60):
        ts, created = (DAY + timedelta(minutes=rng.randrange(300)) for _ in range(2))
        row = {
            "twap_id": rng.randrange(12),
            "ts": ts,
            "status": rng.choice(["activated", "finished", "terminated", "error"]),
            "asset": rng.choice(["SOL", "SOL", "BTC"]),
            "created_at": rng.choice([created, None]),
            "ts_kind": rng.choice(["event", "block", "creation"]),
            "duration_minutes": rng.choice([None, rng.randrange(200)]),
        }
        if rows.setdefault((row["twap_id"], ts, row["status"]), row) is row:
            add(**row)
    for _ in range(40):
        start = DAY + timedelta(minutes=rng.randrange(-50, 350))
        asked = {
            "start": start,
            "end": start + timedelta(minutes=rng.randrange(200)),
            "by": rng.choice(["event", "created", "active"]),
            "latest_per_twap": rng.choice([True, False]),
            "limit": rng.choice([1, 3, 1000]),
            "asset": rng.choice([None, "SOL", "BTC"]),
        }
        told = ask(
            **{name: getattr(value, "isoformat", lambda v=value: v)() for name, value in asked.items()}
        )
        found = [(twap["twap_id"], twap["latest_ts"], twap["status"]) for twap in told["twaps"]]
        assert found == plainly(rows.values(), asked), asked


def plainly(rows, asked):
    """What /api/v1/twaps must show of these rows, by the rules and without SQL."""

    def late(row):
        return (row["status"] != "activated", *when(row))

    def when(row):
        return (row["ts"], row["status"] != "activated", [-ord(letter) for letter in row["status"]])

    def within(moment):
        return moment is not None and asked["start"] <= moment <= asked["end"]

    def of_asset(row):
        return asked["asset"] in {None, row["asset"]}

    def alive(twap):
        created = min(row["created_at"] or row["ts"] for row in twap)
        ends = [row["ts"] for row in twap if row["status"] != "activated" and row["ts_kind"] != "creation"]
        told = [row["created_at"] for row in twap if row["created_at"]]
        planned = [row["duration_minutes"] for row in twap if row["duration_minutes"] is not None]
        expected = [min(told) + timedelta(minutes=max(planned))] if told and planned else []
        end = min(ends) if ends else max([row["ts"] for row in twap] + expected)
        return created <= asked["end"] and end >= asked["start"]

    groups = {}
    for row in rows:
        groups.setdefault(row["twap_id"], []).append(row)
    kept = []
    for twap in groups.values():
        if asked["by"] == "event":
            shown = [row for row in twap if within(row["ts"]) and of_asset(row)]
        elif asked["by"] == "created":
            shown = twap if any(within(row["created_at"]) and of_asset(row) for row in twap) else []
        else:
            shown = twap if alive(twap) and any(map(of_asset, twap)) else []
        if shown:
            kept.append(sorted(shown, key=late, reverse=True))
    kept.sort(key=lambda twap: (twap[0]["ts"], twap[0]["twap_id"]), reverse=True)
    return [
        (str(row["twap_id"]), models.iso(row["ts"]), row["status"])
        for twap in kept[: asked["limit"]]
        for row in (twap[:1] if asked["latest_per_twap"] else sorted(twap, key=when, reverse=True))
    ]


def test_an_address_is_compared_without_its_case_and_other_wallets_are_not_shown(ask, add, wallet, rng):
    add()
    add(wallet=f"0x{rng.getrandbits(160):040x}")
    told = ask(wallet="0x" + wallet[2:].upper())
    assert told["wallet"] == wallet
    assert len(told["twaps"]) == 1


SQL_TEXTS = [
    "'; drop table twap_status; --",
    "%s",
    "%(wallet)s",
    "SOL' or '1'='1",
    "\\",
    "$1",
    "*/",
    "ＳＯＬ",
]


@pytest.mark.parametrize("text", SQL_TEXTS)
def test_sql_in_a_parameter_is_a_coin_that_nobody_trades(ask, add, text):
    add()
    assert ask(asset=text)["twaps"] == []
    assert len(ask(asset="SOL")["twaps"]) == 1


# --- wrong questions ----------------------------------------------------------------------------------------------

WRONG = [
    ("wallet", "0x12"),
    ("wallet", WALLET + "\n"),
    ("wallet", WALLET + "0"),
    ("wallet", "0x" + "g" * 40),
    ("wallet", "' or 1=1 --"),
    ("wallet", "0x" + "１" * 40),
    ("wallet", "\x00"),
    ("wallet", None),
    ("start", None),
    ("end", None),
    ("start", "yesterday"),
    ("start", "1762128000"),
    ("start", "2025-13-01"),
    ("start", "0001-01-01T00:00:00+14:00"),
    ("end", "9999-12-31T23:59:59-14:00"),
    ("start", "2025-11-03T00:00:00Z; select 1"),
    ("end", "2025-11-02\x00"),
    ("end", "2025-10-31"),
    ("end", "2026-11-02T00:00:01Z"),
    ("limit", "0"),
    ("limit", "1001"),
    ("limit", "-1"),
    ("limit", "1_0"),
    ("limit", "many"),
    ("limit", "9" * 5000),
    ("limit", "1.0"),
    ("limit", ""),
    ("asset", ""),
    ("asset", "A" * 41),
    ("asset", "SOL\x00"),
    ("asset", "\x1b[2J"),
    ("by", "time"),
    ("by", "EVENT"),
    ("latest_per_twap", "perhaps"),
]


@pytest.mark.parametrize(
    ("name", "value"), WRONG, ids=[f"{name}={str(value)[:30]!a}" for name, value in WRONG]
)
def test_a_wrong_parameter_is_422_and_named(ask, name, value):
    (told,) = ask(422, **{name: value})["detail"]
    # Of the range as a whole both ends are to blame.
    assert told["loc"] in (["query", name], ["query"])
    assert told["loc"] != ["query"] or re.search(
        "end is (before start|more than 366 days after)", told["msg"]
    )
    assert told["msg"]


@pytest.mark.parametrize(
    "given", [2**63, -(2**63) - 1, "abc", "1_0", "1.0", "%00", "0x10", "1;select 1", "9" * 5000, "%FF"]
)
def test_a_wrong_number_of_a_twap_is_422(show, given):
    assert show(given, 422)["detail"][0]["loc"] == ["path", "twap_id"]


def test_a_range_of_366_days_is_not_too_long(ask):
    assert ask(start="2024-01-01", end="2025-01-01")["twaps"] == []


@pytest.mark.parametrize(("method", "code"), [("post", 405), ("put", 405), ("delete", 405)])
def test_there_is_no_way_to_write(process, method, code):
    for path in ("/api/v1/twaps", "/api/v1/twaps/1", "/healthz"):
        assert requests.request(method, process[1] + path, json={}, timeout=20).status_code == code


# --- health, documentation ----------------------------------------------------------------------------------------


def log_object(connection, key, ingested_at, *, table="twap_status", bucket="b", state="ok", rows=7):
    connection.execute(
        "insert into etl_s3_ingest_log (table_name, bucket, s3_object_key, etag, size, last_modified, state,"
        " rows_ingested, error_text, run_id, ingested_at) values (%s, %s, %s, '\"e\"', 1, %s, %s, %s, %s, %s, %s)",
        (table, bucket, key, DAY, state, rows, None if state == "ok" else "bad", uuid.uuid4(), ingested_at),
    )


def test_health_tells_the_twap_object_that_was_read_last(client, connection):
    assert client.get("/healthz").json() == {"status": "ok", "database": "ok", "last_ingested": None}
    log_object(connection, "raw/twap_statuses/1", DAY)
    log_object(connection, "raw/twap_statuses/2", DAY + timedelta(hours=1, microseconds=1))
    log_object(connection, "raw/twap_statuses/3", DAY + timedelta(hours=2), state="failed")
    log_object(connection, "node_fills/4", DAY + timedelta(hours=3), table="fills")
    assert sound(client.get("/healthz"), models.Health, 200) == {
        "status": "ok",
        "database": "ok",
        "last_ingested": {
            "s3_object_key": "raw/twap_statuses/2",
            "last_modified": "2025-11-03T00:00:00Z",
            "ingested_at": "2025-11-03T01:00:00.000001Z",
            "rows_ingested": 7,
        },
    }
    log_object(
        connection, "/home/someone/secret place/sample.parquet", DAY + timedelta(hours=4), bucket="file:"
    )
    assert client.get("/healthz").json()["last_ingested"]["s3_object_key"] == "sample.parquet"


def test_the_documentation_is_served_and_tells_every_answer(process):
    assert "swagger" in requests.get(f"{process[1]}/docs", timeout=20).text.lower()
    paths = requests.get(f"{process[1]}/openapi.json", timeout=20).json()["paths"]
    assert {path: set(of["get"]["responses"]) for path, of in paths.items()} == {
        "/api/v1/twaps": {"200", "422", "503"},
        "/api/v1/twaps/{twap_id}": {"200", "404", "422", "503"},
        "/healthz": {"200", "503"},
    }
    asked = {each["name"]: each["required"] for each in paths["/api/v1/twaps"]["get"]["parameters"]}
    assert asked == {
        "wallet": True,
        "start": True,
        "end": True,
        "asset": False,
        "latest_per_twap": False,
        "limit": False,
        "by": False,
    }


def test_no_question_made_from_the_documentation_breaks_it(client, connection, rng):
    import hypothesis
    import schemathesis
    from schemathesis import checks

    put(connection)
    schema = schemathesis.openapi.from_url(f"{client.url}/openapi.json")
    chosen = [
        checks.not_a_server_error,
        *(
            each
            for each in checks.CHECKS.get_all()
            if each.__name__
            in {"status_code_conformance", "content_type_conformance", "response_schema_conformance"}
        ),
    ]
    seed, seen = rng.getrandbits(32), set()
    print(f"seed {seed}")

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=60, deadline=None, database=None, suppress_health_check=list(hypothesis.HealthCheck)
    )
    @hypothesis.given(case=schema.as_strategy())
    def run(case):
        seen.add(case.call_and_validate(checks=chosen).status_code)

    run()
    assert {200, 422} <= seen


# --- the token ----------------------------------------------------------------------------------------------------

TOKEN = "t0ken-of-the-test"


class Here:
    """The application behind a uvicorn in a thread of this process, and a client of it."""

    def __init__(self, settings):
        self.app, self.loop = create_app(settings), None
        self.server = uvicorn.Server(uvicorn.Config(self.app, log_config=None, lifespan="on"))
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        self.thread = threading.Thread(target=asyncio.run, args=(self._serve(),))

    async def _serve(self):
        self.loop = asyncio.get_running_loop()
        await self.server.serve([self.socket])

    def get(self, path, **options):
        return requests.get(self.url + path, timeout=30, **options)

    def call(self, coroutine):
        """Run a coroutine where the pool lives."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(30)

    def __enter__(self):
        self.thread.start()
        assert self.get("/healthz").status_code in {200, 503}
        return self

    def __exit__(self, *_):
        self.server.should_exit = True
        self.thread.join(30)


@pytest.fixture
def client(settings):
    with Here(settings()) as opened:
        yield opened


def test_without_the_token_only_health_is_told(settings):
    with Here(settings(API_TOKEN=TOKEN)) as client:
        query = f"/api/v1/twaps?wallet={WALLET}&start=2025-11-01&end=2025-11-02"
        paths = [
            query,
            "/api/v1/twaps/1",
            "/docs",
            "/openapi.json",
            "/nothing",
            "/healthz/",
            "//healthz",
            "/api/v1/twaps",
        ]
        for path in paths:
            for given in [
                None,
                "",
                "Bearer",
                "Bearer ",
                f"Bearer {TOKEN}x",
                f"Basic {TOKEN}",
                TOKEN,
                f"Bearer {TOKEN[:-1]}",
            ]:
                told = client.get(path, headers={} if given is None else {"Authorization": given})
                assert (told.status_code, told.headers.get("www-authenticate")) == (401, "Bearer"), (
                    path,
                    given,
                )
                assert told.json() == {"detail": "a valid token is needed"}
        assert client.get("/healthz").status_code == 200
        shown = {"Authorization": f"Bearer {TOKEN}"}
        assert client.get(query, headers=shown).status_code == 200
        assert client.get(query, headers={"Authorization": f"bearer {TOKEN}"}).status_code == 200
        assert client.get("/api/v1/twaps/1", headers=shown).status_code == 404
        api = client.get("/openapi.json", headers=shown).json()
        assert "bearer" in [each["scheme"] for each in api["components"]["securitySchemes"].values()]
        assert "401" in api["paths"]["/api/v1/twaps"]["get"]["responses"]
        assert "security" not in api["paths"]["/healthz"]["get"]


# --- the database -------------------------------------------------------------------------------------------------


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(pool, "STATEMENT_TIMEOUT", 0.4)
    monkeypatch.setattr(pool, "CONNECTION_TIMEOUT", 0.4)


QUERY = f"/api/v1/twaps?wallet={WALLET}&start=2025-11-01&end=2025-11-30"


def test_connections_are_read_only_and_say_who_they_are(client, connection):
    put(connection)
    assert client.get(QUERY).status_code == 200
    connections = client.app.state.pool.connections

    async def write():
        async with connections.connection() as opened:
            with pytest.raises(psycopg.errors.ReadOnlySqlTransaction):
                await opened.execute("delete from twap_status")
            cursor = await opened.execute(
                "select current_setting('statement_timeout'), current_setting('TimeZone'),"
                " current_setting('application_name')"
            )
            return await cursor.fetchone()

    assert client.call(write()) == ("5s", "UTC", "hlcli:serve")
    assert client.get(QUERY).json()["twaps"]


def refused(told, database):
    """A 503 that says nothing of the inside."""
    assert told.status_code == 503
    assert told.headers["content-type"] == "application/json"
    name = str(conninfo.conninfo_to_dict(database)["dbname"])
    for inside in (name, "psycopg", "postgres", "Traceback", "File", "select", "host", "timeout"):
        assert inside not in told.text
    return told.json()


def test_a_query_that_takes_too_long_is_503_and_the_next_is_answered(impatient, client, connection, database):
    with connection.transaction():
        connection.execute("lock table twap_status in access exclusive mode")
        assert refused(client.get(QUERY), database) == {"detail": "the query took too long: ask for less"}
        assert refused(client.get("/api/v1/twaps/1"), database)["detail"]
    assert client.get(QUERY).status_code == 200


def test_more_requests_than_may_wait_are_503_at_once(monkeypatch, settings, connection, database):
    monkeypatch.setattr(pool, "CONNECTIONS", 1)
    monkeypatch.setattr(pool, "WAITING", 1)
    told = []
    with Here(settings()) as client:
        asking = [threading.Thread(target=lambda: told.append(client.get(QUERY))) for _ in range(6)]
        with connection.transaction():
            connection.execute("lock table twap_status in access exclusive mode")
            for thread in asking:
                thread.start()
            while len(told) < 4:
                time.sleep(0.01)
        for thread in asking:
            thread.join()
    assert sorted(each.status_code for each in told) == [200, 200, 503, 503, 503, 503]
    assert all(refused(each, database) == {"detail": "too many requests at once"} for each in told[:4])


END = "select count(pg_terminate_backend(pid)) from pg_stat_activity where datname = current_database() and pid <> pg_backend_pid()"


def test_a_restart_of_the_database_is_not_noticed(client, connection):
    with requests_at_once(client, 6) as codes:
        pass
    assert codes == [200] * 6
    for _ in range(3):
        (ended,) = connection.execute(END).fetchone()
        assert ended >= 1
        with requests_at_once(client, 6) as codes:
            pass
        assert codes == [200] * 6


@contextmanager
def requests_at_once(client, number):
    """The status codes of so many requests side by side."""
    codes = []
    asking = [
        threading.Thread(target=lambda: codes.append(client.get(QUERY).status_code)) for _ in range(number)
    ]
    for thread in asking:
        thread.start()
    for thread in asking:
        thread.join()
    yield codes


@pytest.mark.skipif(
    "HLCLI_TEST_DATABASE_URL" in os.environ, reason="only processes of our own server are stopped"
)
def test_a_connection_on_which_nothing_moves_is_given_up(monkeypatch, client, connection, database):
    monkeypatch.setattr(pool, "ANSWER_TIMEOUT", 0.3)
    monkeypatch.setattr(pool, "CONNECTION_TIMEOUT", 0.5)
    assert client.get(QUERY).status_code == 200
    backends = connection.execute(
        "select pid from pg_stat_activity"  # of the pool alone: the server's own cleaning shows there, too
        " where datname = current_database() and application_name = 'hlcli:serve'"
    ).fetchall()
    assert backends
    for (pid,) in backends:
        os.kill(pid, signal.SIGSTOP)
    try:
        began = time.monotonic()
        told = [client.get(QUERY) for _ in backends]
        assert time.monotonic() - began < 3 * len(told)
        assert [refused(each, database)["detail"] for each in told] == ["the database is unavailable"] * len(
            told
        )
        assert client.get(QUERY).status_code == 200
    finally:
        for (pid,) in backends:
            os.kill(pid, signal.SIGCONT)


def test_without_a_database_answers_are_503_until_it_is_back(
    impatient, monkeypatch, client, connection, database, server
):
    # As if the outage lasted twenty times as long.
    monkeypatch.setattr(psycopg_pool.base.AttemptWithBackoff, "INITIAL_DELAY", 0.05)
    assert client.get(QUERY).status_code == 200
    name = sql.Identifier(str(conninfo.conninfo_to_dict(database)["dbname"]))
    with psycopg.connect(server, autocommit=True) as admin:
        admin.execute(sql.SQL("alter database {} allow_connections false").format(name))
        connection.execute(END)
        began = time.monotonic()
        # So long that a pool which tries ever more seldom would still sleep when the database is back.
        while time.monotonic() - began < 2.5:
            for path in (QUERY, "/api/v1/twaps/1"):
                assert refused(client.get(path), database) == {"detail": "the database is unavailable"}
        told = client.get("/healthz")
        assert refused(told, database) == {
            "status": "error",
            "database": "unavailable",
            "last_ingested": None,
        }
        admin.execute(sql.SQL("alter database {} allow_connections true").format(name))
    back = time.monotonic()
    while client.get(QUERY).status_code != 200:
        assert time.monotonic() - back < 2
    assert client.get(QUERY).status_code == 200
    assert client.get("/healthz").json()["status"] == "ok"


def test_a_bug_shows_nothing_of_the_inside(client, connection, caplog):
    connection.execute("alter table twap_status rename column asset to coin")
    told = client.get(QUERY)
    assert (told.status_code, told.json()) == (500, {"detail": "internal error"})


# --- the command --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_it_cleanly_after_the_last_answer(database, connection, tmp_path, number, code):
    process = start(database, tmp_path / "log", API_TOKEN=TOKEN)
    url, told = address(process, tmp_path / "log"), []

    def get():
        told.append(requests.get(url + QUERY, headers={"Authorization": f"Bearer {TOKEN}"}, timeout=20))

    asking = threading.Thread(target=get)
    with connection.transaction():
        connection.execute("lock table twap_status in access exclusive mode")
        asking.start()
        waiting = "select count(*) from pg_locks where not granted and relation = 'twap_status'::regclass"
        while connection.execute(waiting).fetchone() == (0,):
            time.sleep(0.01)
        process.send_signal(number)
        time.sleep(0.3)
        assert process.poll() is None
    asking.join()
    assert told[0].status_code == 200
    assert process.wait(20) == code
    log = (tmp_path / "log").read_text()
    assert "GET /api/v1/twaps" in log
    assert "Traceback" not in log
    assert TOKEN not in log
    assert re.fullmatch(r"(hlcli: .*\n)+", log)


def test_a_port_in_use_is_one_line_and_exit_4(cli, database):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = cli("serve", "--port", str(port), DATABASE_URL=database)
    assert (done.returncode, done.stdout) == (4, "")
    assert re.fullmatch(rf"hlcli: cannot listen on 127.0.0.1 port {port}: .*in use.*\n", done.stderr)


def test_an_address_of_another_machine_is_exit_5(cli, database):
    done = cli("serve", "--host", "192.0.2.1", DATABASE_URL=database)
    assert done.returncode == 5
    assert re.fullmatch(r"hlcli: cannot listen on 192.0.2.1 port 8000: .*\n", done.stderr)


def test_an_old_schema_is_exit_5_and_no_database_exit_4(cli, empty_database):
    done = cli("serve", "--port", "0", DATABASE_URL=empty_database)
    assert (done.returncode, done.stderr) == (5, "hlcli: the database is empty: run `hlcli init`\n")
    done = cli("serve", "--port", "0", DATABASE_URL=NOWHERE)
    assert done.returncode == 4
    assert "hunter2secret" not in done.stderr


def test_without_the_extra_it_says_what_to_install(cli, tmp_path):
    # Python looks where it was started, first.
    (tmp_path / "fastapi.py").write_text("raise ModuleNotFoundError('no', name='fastapi')")
    done = cli("serve", DATABASE_URL=NOWHERE)
    assert done.returncode == 5
    assert done.stderr == "hlcli: the API needs the package fastapi: pip install 'hlcli[serve]'\n"


@pytest.mark.parametrize(("env", "warned"), [({}, True), ({"API_TOKEN": TOKEN}, False)])
def test_an_open_door_is_warned_of(database, tmp_path, env, warned):
    process = start(database, tmp_path / "log", "--host", "0.0.0.0", **env)
    try:
        url = address(process, tmp_path / "log")
    finally:
        process.terminate()
        process.wait(20)
    text = f"hlcli: warning: API_TOKEN is not set: {url} is open to the whole network\n"
    assert (text in (tmp_path / "log").read_text()) is warned
