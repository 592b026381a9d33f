"""Events of TWAPs become the same rows in whatever shape they are told."""

from __future__ import annotations

import json
from datetime import timedelta
from decimal import Decimal

import pyarrow as pa
import pytest
from object_files import (
    T0_MS,
    T0_NS,
    WALLETS,
    as_parquet,
    block,
    clean,
    event,
    fill,
    iso,
    lines,
    moment,
    packed,
    read,
)

from hlcli.sources import files, twaps
from hlcli.sources.files import UnusableError

MESSAGE = 'Insufficient margin: 1.10 < "2"'
STATUSES = ("activated", "finished", "terminated", {"error": MESSAGE})
SERVED = [event(number, status) for number, status in enumerate(STATUSES)]
STATE = {
    "coin": "asset",
    "side": "side",
    "sz": "size_requested",
    "executedSz": "size_executed",
    "executedNtl": "notional_executed",
    "minutes": "duration_minutes",
    "reduceOnly": "reduce_only",
    "randomize": "randomize",
}
NUMBERS = ("size_requested", "size_executed", "notional_executed")
PER_SECOND = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}


def at(number):
    return T0_NS + number * 10**9


def expected(served=SERVED, **more):
    """The rows of the table but for raw_payload, said without any code of the reader's."""
    return [
        {
            "twap_id": one["twap_id"],
            "wallet": one["state"]["user"].lower(),
            "status": "error" if isinstance(one["status"], dict) else one["status"],
            "status_error": MESSAGE if isinstance(one["status"], dict) else None,
            "created_at": moment(one["state"]["timestamp"] * 10**6),
            "ts": moment(at(number)),
            "ts_kind": "event",
            "event_time_ns": at(number),
            "block_number": None,
            "is_exact": True,
            **{ours: one["state"][theirs] for theirs, ours in STATE.items()},
            **more,
        }
        for number, one in enumerate(served)
    ]


def seen(rows):
    """Rows as read, without the payload; integers and booleans out of text, as which they come from some files."""
    told = []
    for row in rows:
        plain = {name: value for name, value in row.items() if name != "raw_payload"}
        for name in ("twap_id", "duration_minutes", "block_number"):
            plain[name] = None if row[name] is None else int(row[name])
        for name in ("reduce_only", "randomize"):
            plain[name] = {"true": True, "false": False}.get(row[name], row[name])
        told.append(plain)
    return told


def payloads(rows):
    return [json.loads(row["raw_payload"], parse_float=str) for row in rows]


# --- JSON ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", [None, "lz4"])
def test_lines(codec):
    rows = clean(twaps, packed(lines(*SERVED), codec))
    assert seen(rows) == expected()
    assert payloads(rows) == SERVED


def test_lines_by_block():
    rows = clean(twaps, lines(block(SERVED[:1]), block(SERVED[1:])))
    assert seen(rows) == expected(block_number=1_159_309_631)
    assert payloads(rows) == SERVED


@pytest.mark.parametrize("indent", [None, 1])
def test_arrays(indent):
    rows = clean(twaps, json.dumps(SERVED, indent=indent).encode())
    assert seen(rows) == expected()
    assert payloads(rows) == SERVED


def test_the_answer_of_the_api_counts_in_seconds_and_nests_the_status():
    answer = [
        {
            "time": at(number) // 10**9,
            "state": {**one["state"], "trigger": None, "stopPx": None},
            "status": one["status"] if isinstance(one["status"], dict) else {"status": one["status"]},
            "twapId": one["twap_id"],
        }
        for number, one in enumerate(SERVED)
    ]
    rows = clean(twaps, json.dumps(answer).encode())
    for row, other in zip(seen(rows), expected(), strict=True):
        whole = other["event_time_ns"] // 10**9 * 10**9
        assert row == {**other, "ts": moment(whole), "event_time_ns": whole}
    assert payloads(rows) == answer


def flat(one, naming=str):
    """As Bitquery has it."""
    told = {
        "Block_Number": 7,
        "Block_Time": T0_NS,
        "Time": None,
        "TwapId": one["twap_id"],
        "Status": one["status"],
        "StatusError": "",
    }
    if isinstance(one["status"], dict):
        told |= {"Status": "error", "StatusError": one["status"]["error"]}
    told |= {"State_" + name[0].upper() + name[1:]: value for name, value in one["state"].items()}
    return {naming(name): value for name, value in told.items()}


def snake(name):
    text = "".join("_" + char.lower() if char.isupper() else char for char in name.replace("_", ""))
    return text.strip("_")


@pytest.mark.parametrize("naming", [str, snake, str.lower, str.upper])
def test_flat_objects(naming):
    given = [{**flat(one, naming), naming("Time"): at(number)} for number, one in enumerate(SERVED)]
    rows = clean(twaps, json.dumps(given, indent=1).encode())
    assert seen(rows) == expected(block_number=7)
    # What is beyond JavaScript's integers is text there.
    assert payloads(rows) == [
        {**one, naming("Time"): str(one[naming("Time")]), naming("Block_Time"): str(T0_NS)} for one in given
    ]


@pytest.mark.parametrize(
    ("served", "status", "error"),
    [
        ("activated", "activated", None),
        ('"finished"', "finished", None),
        ({"status": "finished"}, "finished", None),
        ('{"status": "terminated"}', "terminated", None),
        ({"error": "e"}, "error", "e"),
        ('{"error": "e"}', "error", "e"),
        ({"status": {"error": "e"}}, "error", "e"),
        ({"error": None, "status": "finished"}, "finished", None),
        ({"error": {"code": 5}}, "error", '{"code": 5}'),
        ("{error}", "{error}", None),
        ("executing", "executing", None),
        ("", "", None),
        (5, "5", None),
        (True, "true", None),
        (["a"], '["a"]', None),
        ({}, None, None),
        ({"other": 1}, None, None),
        (None, None, None),
    ],
    ids=str,
)
def test_spellings_of_a_status(served, status, error):
    body = lines(event(0, served), event(1))
    assert [(row["status"], row["status_error"]) for row in clean(twaps, body)] == [
        (status, error),
        ("activated", None),
    ]


def test_a_message_beside_the_status_is_kept_and_an_empty_one_is_none():
    given = [
        event(0, "error", status_error="e"),
        event(1, {"error": "in"}, statusError="out"),
        event(2, StatusError=""),
    ]
    assert [row["status_error"] for row in clean(twaps, lines(*given))] == ["e", "in", None]


@pytest.mark.parametrize("naming", ["state", "State", "STATE"])
def test_a_state_of_json_text(naming):
    given = [{naming if name == "state" else name: value for name, value in one.items()} for one in SERVED]
    given = [{**one, naming: json.dumps(one[naming])} for one in given]
    rows = clean(twaps, lines(*given))
    assert seen(rows) == expected()
    assert payloads(rows) == given


def test_the_payload_keeps_every_digit():
    odd = '"odd":{"f":1.10,"big":12345678901234567890.123,"ns":1790248352992506967,"nan":NaN,"":-0.0},"state"'
    body = json.dumps(event(0)).replace('"state"', odd).encode()
    (row,) = clean(twaps, body)
    told = json.loads(row["raw_payload"], parse_float=str)["odd"]
    assert told == {
        "f": "1.10",
        "big": "12345678901234567890.123",
        "ns": "1790248352992506967",
        "nan": "NaN",
        "": "-0.0",
    }
    assert '"ns": "1790248352992506967"' in row["raw_payload"]


def test_bare_numbers_keep_their_digits():
    body = (
        json.dumps(event(0))
        .replace('"10.00"', "10.00")
        .replace('"250.125000"', "12345678901234567890.1230")
        .encode()
    )
    (row,) = clean(twaps, body)
    assert (row["size_requested"], row["notional_executed"]) == ("10.00", "12345678901234567890.1230")
    assert row["is_exact"]


# --- Parquet ------------------------------------------------------------------------------------------------------


def flat_columns(**replaced):
    """Flat state_* columns; keyword arguments replace one or, with None, leave it out."""
    told = [{**flat(one), "Time": at(number)} for number, one in enumerate(SERVED)]
    columns = {name: pa.array([one[name] for one in told]) for name in told[0]}
    columns.update(replaced)
    return {name: values for name, values in columns.items() if values is not None}


@pytest.mark.parametrize("naming", [str, snake, str.lower])
def test_parquet_with_flat_columns(naming):
    body = as_parquet(
        {naming(name): values for name, values in flat_columns(State_Extra=pa.array([{"a": 1}] * 4)).items()}
    )
    rows = clean(twaps, body)
    assert seen(rows) == expected(block_number=7)
    for row, one in zip(payloads(rows), SERVED, strict=True):
        assert row[naming("State_ExecutedNtl")] == "250.125000"
        assert row[naming("State_Timestamp")] == one["state"]["timestamp"]
        assert row[naming("State_Extra")] == {"a": 1}
        assert isinstance(row[naming("Time")], str)


def columns_with(state, status, time=None):
    return {
        "time": pa.array([at(number) for number in range(4)]) if time is None else time,
        "twap_id": pa.array([one["twap_id"] for one in SERVED]),
        "state": state,
        "status": status,
    }


STATES = {
    "struct": pa.array([one["state"] for one in SERVED]),
    "text": pa.array([json.dumps(one["state"]) for one in SERVED]),
    "json": pa.array([json.dumps(one["state"]) for one in SERVED], pa.json_(pa.string())),
    "binary": pa.array([json.dumps(one["state"]).encode() for one in SERVED]),
    "dictionary": pa.array([json.dumps(one["state"]) for one in SERVED]).dictionary_encode(),
}
STATUS_COLUMNS = {
    "text": pa.array([one if isinstance(one, str) else json.dumps(one) for one in STATUSES]),
    "json": pa.array([json.dumps(one) for one in STATUSES], pa.json_(pa.string())),
    "binary": pa.array([json.dumps(one).encode() for one in STATUSES]),
    "struct": pa.array(
        [
            {"status": one, "error": None} if isinstance(one, str) else {"status": None, **one}
            for one in STATUSES
        ]
    ),
}


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("status", STATUS_COLUMNS)
def test_parquet_with_a_state_in_one_column(state, status):
    rows = clean(twaps, as_parquet(columns_with(STATES[state], STATUS_COLUMNS[status])))
    assert seen(rows) == expected()
    if state == "struct":
        assert [row["state"] for row in payloads(rows)] == [one["state"] for one in SERVED]


@pytest.mark.parametrize("unit", PER_SECOND)
@pytest.mark.parametrize("zone", [None, "Asia/Tokyo"])
def test_parquet_timestamps(unit, zone):
    factor = 10**9 // PER_SECOND[unit]
    time = pa.array([at(number) // factor for number in range(4)]).cast(pa.timestamp(unit, zone))
    created = (
        pa.array([one["state"]["timestamp"] // 1000 for one in SERVED])
        .cast(pa.timestamp("s"))
        .cast(pa.timestamp(unit, zone))
    )
    rows = clean(twaps, as_parquet(flat_columns(Time=time, State_Timestamp=created, Block_Time=None)))
    cut = [at(number) // factor * factor for number in range(4)]
    assert [(row["event_time_ns"], row["ts"], row["ts_kind"]) for row in rows] == [
        (ns, moment(ns), "event") for ns in cut
    ]
    assert {row["created_at"] for row in rows} == {moment(SERVED[0]["state"]["timestamp"] // 1000 * 10**9)}


@pytest.mark.parametrize(
    "kind", [pa.int64(), pa.uint64(), pa.string(), pa.binary(), pa.decimal128(30, 0)], ids=str
)
def test_parquet_nanoseconds_of_any_type(kind):
    text = pa.array([str(at(number)) for number in range(4)])
    time = text.cast(pa.int64()).cast(kind) if pa.types.is_decimal(kind) else text.cast(kind)
    assert seen(clean(twaps, as_parquet(flat_columns(Time=time)))) == expected(block_number=7)


def test_parquet_times_of_iso_text():
    time = pa.array([iso(at(number)) + "+00:00" for number in range(4)])
    assert seen(clean(twaps, as_parquet(flat_columns(Time=time)))) == expected(block_number=7)


@pytest.mark.parametrize(
    "kind", [pa.float64(), pa.decimal128(30, 10), pa.decimal256(60, 10), pa.int64()], ids=str
)
@pytest.mark.parametrize("nested", [True, False])
def test_parquet_numbers_of_any_type(kind, nested):
    numbers = ["10", "0", "250"] if pa.types.is_integer(kind) else ["10.5", "0.125", "250.0625"]
    values = [
        pa.array([(float if pa.types.is_floating(kind) else Decimal)(number)] * 4).cast(kind)
        for number in numbers
    ]
    fields = ("Sz", "ExecutedSz", "ExecutedNtl")
    if nested:
        plain = {name: STATES["struct"].field(name) for name in ("user", "coin", "timestamp")}
        state = pa.StructArray.from_arrays([*plain.values(), *values], [*plain, *fields])
        body = as_parquet(columns_with(state, STATUS_COLUMNS["text"]))
    else:
        body = as_parquet(
            flat_columns(**{f"State_{name}": each for name, each in zip(fields, values, strict=True)})
        )
    for row in clean(twaps, body):
        assert [Decimal(str(row[name])) for name in NUMBERS] == [Decimal(number) for number in numbers]
        assert row["is_exact"] is not pa.types.is_floating(kind)
        json.loads(row["raw_payload"])


def test_parquet_statuses_of_any_struct():
    told = [b"activated", b"finished", None, None]
    errors = {
        "binary": pa.array([None, None, None, MESSAGE.encode()]),
        "nested": pa.array([None, None, None, {"code": 2**60}]),
    }
    shown = {"binary": MESSAGE, "nested": '{"code": "1152921504606846976"}'}
    for kind, error in errors.items():
        status = pa.StructArray.from_arrays([pa.array(told), error], ["status", "error"])
        rows = clean(twaps, as_parquet(flat_columns(Status=status)))
        assert [row["status"] for row in rows] == ["activated", "finished", None, "error"]
        assert rows[3]["status_error"] == shown[kind]


def test_parquet_errors_of_a_column_beside_a_struct():
    error = pa.array([None, "", "  ", "e"])
    rows = clean(twaps, as_parquet(flat_columns(Status=STATUS_COLUMNS["struct"], StatusError=error)))
    assert [row["status_error"] for row in rows] == [None, None, "  ", MESSAGE]


@pytest.mark.parametrize(
    ("left_out", "ours"), [("TwapId", "twap_id"), ("State_User", "wallet"), ("Status", "status")]
)
def test_parquet_without_what_every_event_has_is_refused(left_out, ours):
    with pytest.raises(UnusableError, match=f"has no column for {ours}$"):
        read(twaps, as_parquet(flat_columns(**{left_out: None})))


@pytest.mark.parametrize("name", ["TwapId", "State_Coin", "Time", "StatusError", "State_Sz"])
def test_parquet_with_lists_where_a_scalar_belongs_is_refused(name):
    with pytest.raises(UnusableError, match=f"column '{name}' holds List"):
        read(twaps, as_parquet(flat_columns(**{name: pa.array([["1"]] * 4)})))


@pytest.mark.parametrize(
    "state", [[["a"]] * 4, [1] * 4, ["no JSON"] * 4, [None] * 4, [{"x": 1}] * 4], ids=str
)
def test_parquet_with_a_state_that_is_none_is_refused(state):
    with pytest.raises(UnusableError, match="has no column for wallet|holds List"):
        read(twaps, as_parquet(columns_with(pa.array(state), STATUS_COLUMNS["text"])))


# --- when it happened ---------------------------------------------------------------------------------------------


def kinds(rows):
    return [(row["ts"], row["ts_kind"], row["event_time_ns"]) for row in rows]


def test_the_block_and_then_the_creation_stand_in_for_the_event():
    both, by_block = event(0), event(1, time=...)
    created = event(2, time=..., timestamp=T0_MS)
    ns = T0_NS + 5 * 10**9
    rows = clean(twaps, lines(block([both, by_block], ns=ns), created))
    assert kinds(rows) == [
        (moment(T0_NS), "event", T0_NS),
        (moment(ns), "block", ns),
        (moment(T0_MS * 10**6), "creation", None),
    ]


def test_both_events_of_a_twap_keep_their_own_time():
    start, end = event(0), {**event(5_401, "finished"), "twap_id": event(0)["twap_id"]}
    rows = clean(twaps, lines(start, end))
    assert rows[1]["ts"] - rows[0]["ts"] == timedelta(seconds=5_401)
    assert rows[0]["created_at"] == rows[1]["created_at"]


@pytest.mark.parametrize("name", ["time", "block_time", "timestamp"])
@pytest.mark.parametrize(
    "value", ["soon", "", 0, -1, 1.5, True, [], {}, 10**30, "2022-12-31T23:59:59", "\ud800"], ids=repr
)
def test_a_time_that_tells_none_rejects_its_event_and_is_not_guessed(name, value):
    rows, rejected = read(twaps, lines(event(0), {**event(1, block_time=T0_NS), **event(1, **{name: value})}))
    assert [row["twap_id"] for row in rows] == [event(0)["twap_id"]]
    assert [(each.reason, each.column, each.key[0]) for each in rejected] == [
        (twaps.GARBLED, "ts", event(1)["twap_id"])
    ]


def test_one_event_without_any_time_is_rejected_but_a_file_of_them_is_refused():
    timeless = event(1, time=..., timestamp=...)
    rows, rejected = read(twaps, lines(event(0), timeless))
    assert len(rows) == 1
    assert [(each.reason, each.payload) for each in rejected] == [(twaps.TIMELESS, timeless)]
    for body in (
        lines(timeless, timeless),
        as_parquet(flat_columns(Time=None, Block_Time=None, State_Timestamp=None)),
    ):
        with pytest.raises(files.LackingError):
            read(twaps, body)


def test_misread_timestamps_are_no_day_of_1970():
    misread = pa.array([at(number) // 10**6 for number in range(4)]).cast(pa.timestamp("ns"))
    rows = clean(twaps, as_parquet(flat_columns(Time=misread, Block_Time=None)))
    assert [row["event_time_ns"] for row in rows] == [at(number) // 10**6 * 10**6 for number in range(4)]


# --- what is no event ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("odd", [1, "text", None, True, 1.5, [1], [[]], ["0x", {}]], ids=str)
def test_what_is_no_event_is_rejected_alone(odd):
    for body in (lines(block([event(0), odd, event(1)])), lines(event(0), odd, event(1))):
        rows, rejected = read(twaps, body)
        assert seen(rows) == expected([event(0), event(1)], block_number=rows[0]["block_number"])
        assert {each.reason for each in rejected} <= {"not_an_event", twaps.TIMELESS, twaps.GARBLED}
        assert rejected


@pytest.mark.parametrize(
    "state",
    [None, 5, "text", [], {}, [{}], "{", '"x"', {"": 1, "_": 2, "state": 3, "extra": {"": {}}}],
    ids=str,
)
def test_a_state_that_is_none_leaves_its_columns_empty(state):
    rows = clean(twaps, lines(event(0), event(1, state=state)))
    assert seen(rows)[0] == expected()[0]
    assert rows[1]["wallet"] is None
    assert json.loads(rows[1]["raw_payload"])["state"] == state


def test_a_file_of_fills_gives_no_row_that_could_be_stored():
    for body in (
        lines([WALLETS[0], fill(1)]),
        lines(block([[WALLETS[0], fill(1)]])),
        lines(fill(1), fill(2)),
    ):
        rows, rejected = read(twaps, body)
        assert [row["wallet"] for row in rows] == [None] * len(rows)
        assert rows or rejected
    with pytest.raises(UnusableError, match="has no column for"):
        read(twaps, as_parquet({"coin": ["BTC"], "time": [T0_MS], "twap_id": [1]}))


def test_batches_of_different_types_are_read(monkeypatch):
    monkeypatch.setattr(files, "BATCH", 1)
    given = [event(0), event(1, twap_id="x"), event(2, reduceOnly="maybe", sz=1.5), event(3, twap_id=2**63)]
    rows = clean(twaps, lines(*given))
    assert [str(row["twap_id"]) for row in rows] == [str(one["twap_id"]) for one in given]
