"""Recorded and hostile files go through the readers and the loader into the real tables: exactly, or to quarantine."""

from __future__ import annotations

import json
import math
import uuid
from collections import Counter
from datetime import UTC, datetime
from decimal import Decimal

import polars as pl
import pyarrow as pa
import pytest
from backfill_tables import NUMBERS
from object_files import T0_MS, T0_NS, WALLETS, as_parquet, batches, block, event, fill, iso, lines, moment

from hlcli.loader import Merge, checks, describe, load, quarantine
from hlcli.sources import files, fills, twaps
from hlcli.sources.files import UnusableError

USER = WALLETS[0]
RUN_ID = uuid.UUID(int=1)
PLAIN = {
    "coin": "coin",
    "side": "side",
    "dir": "dir",
    "hash": "hash",
    "oid": "oid",
    "tid": "tid",
    "crossed": "crossed",
    "fee_token": "feeToken",
    "cloid": "cloid",
    "builder": "builder",
    "twap_id": "twapId",
    "liquidation": "liquidation",
}


def keep(connection, source, body, **options):
    """Read a file into its table as the job does, in a transaction; returns (rows read, rows rejected)."""
    own = {"object_id": pl.lit(1)}
    if source is twaps:
        own |= {"s3_object_key": pl.lit("key"), "s3_last_modified": pl.lit(datetime(2026, 9, 30, tzinfo=UTC))}
    read = rejected = 0
    with connection.transaction():
        for rows in source.read(batches(body), **options):
            counts = quarantine(connection, source.TABLE, rows.rejected, RUN_ID)
            frame = rows.frame.with_columns(**own)
            counts += load(connection, source.TABLE, frame, rule=Merge.COMPLETE, run_id=RUN_ID)
            assert (
                counts.inserted + counts.updated + counts.unchanged + counts.duplicate
                == counts.served - counts.rejected
            )
            read += rows.frame.height + len(rows.rejected)
            rejected += counts.rejected
    return read, rejected


def stored_fills(connection):
    """Rows as dicts, numbers as the database's own text."""
    shown = ", ".join([*(f"{name}::text" for name in NUMBERS), *PLAIN])
    names = (
        "user_address",
        "time",
        "block_time",
        "block_number",
        "event_ix",
        "extra",
        "is_exact",
        "source",
    )
    cursor = connection.execute(f"select {shown}, {', '.join(names)} from fills")
    columns = [column.name for column in cursor.description]
    return [dict(zip(columns, row, strict=True)) for row in cursor]


def served_fill(user, one, source, *, block_time=None, block_number=None):
    """The row that must be stored, but for its event_ix."""
    return {
        "user_address": user.lower(),
        "time": moment(one["time"] * 10**6),
        "block_time": block_time,
        "block_number": block_number,
        "extra": None,
        "is_exact": True,
        "source": source,
        **{ours: one.get(theirs) for ours, theirs in {**NUMBERS, **PLAIN}.items()},
    }


def as_keys(rows):
    """Rows to be compared as a multiset, without the number of those with one key."""
    return Counter(
        json.dumps(
            {name: value for name, value in row.items() if name != "event_ix"}, sort_keys=True, default=str
        )
        for row in rows
    )


def text_of_ns(text):
    """ISO text of a node, cut to microseconds."""
    return datetime.fromisoformat(text[:26]).replace(tzinfo=UTC)


# --- recorded -----------------------------------------------------------------------------------------------------


def test_recorded_answers_with_fills_are_stored_digit_for_digit(recorded, connection):
    folder = recorded / "hyperliquid"
    paths = [
        *sorted((folder / "userFillsByTime").glob("*.json")),
        *sorted((recorded / "s3/node_fills").glob("*http*.json")),
    ]
    assert len(paths) > 10
    expected, seen = Counter(), set()
    for number, path in enumerate(paths):
        served = json.loads(path.read_bytes())
        user = f"0x{number:040x}"
        assert keep(connection, fills, path.read_bytes(), user=user) == (len(served), 0)
        # Identical fills are one.
        expected += Counter(dict.fromkeys(as_keys(served_fill(user, one, "api") for one in served), 1))
        seen |= {name for one in served for name in one}
    assert as_keys(stored_fills(connection)) == expected
    assert expected.total() > 1_400
    assert seen - {"time"} <= {*NUMBERS.values(), *PLAIN.values()}
    assert connection.execute("select count(*) from fills where tid = 0").fetchone()[0] > 0


def test_recorded_slices_of_twaps_name_their_twap(recorded, connection):
    answer = json.loads((recorded / "s3/twap_api/nautilus_ws_user_twap_slice_fills.json").read_bytes())[
        "data"
    ]
    served = answer["twapSliceFills"]
    keep(connection, fills, json.dumps(served, indent=1).encode(), user=answer["user"])
    told = [{**one["fill"], "twapId": one["twapId"]} for one in served]
    assert as_keys(stored_fills(connection)) == as_keys(
        served_fill(answer["user"], one, "api") for one in told
    )
    assert {one["twapId"] for one in told} == {2_087_225}


def test_recorded_lines_of_nodes_are_stored_digit_for_digit(recorded, connection):
    expected = []
    for path in sorted((recorded / "s3/node_fills").glob("*.jsonl")):
        keep(connection, fills, path.read_bytes())
        for line in map(json.loads, path.read_text().splitlines()):
            if "events" in line:
                around = {"block_time": text_of_ns(line["block_time"]), "block_number": line["block_number"]}
                expected += [served_fill(user, one, "s3", **around) for user, one in line["events"]]
            else:
                expected.append(
                    served_fill(line["user"], line, "s3", block_time=text_of_ns(line["block_time"]))
                )
    assert len(expected) == 4
    assert as_keys(stored_fills(connection)) == as_keys(expected)


def test_recorded_fills_of_a_time_without_numbers_of_trades_are_rejected_one_by_one(recorded, connection):
    body = (recorded / "hyperliquid/userFills/pysdk_2023-07_500.json").read_bytes()
    assert keep(connection, fills, body, user=USER) == (500, 500)
    reasons = connection.execute("select distinct column_name, reason from rejected_rows").fetchall()
    assert reasons == [("tid", "null")]


STATE = {
    "wallet": "user",
    "asset": "coin",
    "side": "side",
    "size_requested": "sz",
    "size_executed": "executedSz",
    "notional_executed": "executedNtl",
    "duration_minutes": "minutes",
    "reduce_only": "reduceOnly",
    "randomize": "randomize",
}


def stored_twaps(connection):
    numbers = ("size_requested", "size_executed", "notional_executed")
    shown = ", ".join(f"{name}::text" if name in numbers else name for name in STATE)
    cursor = connection.execute(
        f"select twap_id, status, status_error, ts, ts_kind, event_time_ns, block_number, created_at, is_exact, raw_payload, {shown}"
        " from twap_status order by twap_id, ts"
    )
    columns = [column.name for column in cursor.description]
    return [dict(zip(columns, row, strict=True)) for row in cursor]


def served_twap(number, state, status, ns, payload, *, block_number=None):
    return {
        "twap_id": number,
        "status": status,
        "status_error": None,
        "ts": moment(ns),
        "ts_kind": "event",
        "event_time_ns": ns,
        "block_number": block_number,
        "created_at": moment(state["timestamp"] * 10**6),
        "is_exact": True,
        "raw_payload": payload,
        **{ours: state[theirs] for ours, theirs in STATE.items()},
    }


def ns_of(text):
    return int(text_of_ns(text).timestamp()) * 10**9 + int(text[20:])


def test_recorded_twaps_of_nodes_are_stored_digit_for_digit(recorded, connection):
    expected = []
    for path in sorted((recorded / "s3/twap_statuses").glob("*.jsonl")):
        keep(connection, twaps, path.read_bytes())
        for line in map(json.loads, path.read_text().splitlines()):
            for one in line.get("events", [line]):
                number = line.get("block_number")
                ns = ns_of(one["time"])
                expected.append(
                    served_twap(one["twap_id"], one["state"], one["status"], ns, one, block_number=number)
                )
    assert len(expected) == 2
    assert stored_twaps(connection) == sorted(expected, key=lambda row: row["twap_id"])


def test_both_recorded_events_of_one_twap_are_kept(recorded, connection):
    path = recorded / "s3/twap_statuses/bitquery_twap_statuses_BNB.json"
    served = json.loads(path.read_bytes())
    for _ in range(2):  # what is served again is nothing new
        assert keep(connection, twaps, path.read_bytes()) == (3, 0)
    expected = []
    for one in served:
        state = {
            name[6].lower() + name[7:]: value for name, value in one.items() if name.startswith("State_")
        }
        payload = {**one, "Time": str(one["Time"]), "Block_Time": str(one["Block_Time"])}
        expected.append(
            served_twap(
                one["TwapId"], state, one["Status"], one["Time"], payload, block_number=one["Block_Number"]
            )
        )
    rows = stored_twaps(connection)
    assert rows == sorted(expected, key=lambda row: (row["twap_id"], row["ts"]))
    both = [row for row in rows if row["twap_id"] == 2_250_263]
    assert [row["status"] for row in both] == ["activated", "finished"]
    assert len({row["created_at"] for row in both}) == 1
    assert both[1]["event_time_ns"] - both[0]["event_time_ns"] == 5_401_017_508_517


def test_the_recorded_history_of_the_api_is_stored(recorded, connection):
    body = (recorded / "s3/twap_api/nautilus_ws_user_twap_history.json").read_bytes()
    served = json.loads(body)["data"]["history"]
    keep(connection, twaps, json.dumps(served).encode())
    expected = [
        served_twap(one["twapId"], one["state"], one["status"]["status"], one["time"] * 10**9, one)
        for one in served
    ]
    assert stored_twaps(connection) == sorted(expected, key=lambda row: row["twap_id"])


def test_both_sides_of_every_trade_are_stored(connection):
    trades = [
        [[WALLETS[number % 3], fill(2 * number, tid=number)], [WALLETS[3], fill(2 * number + 1, tid=number)]]
        for number in range(300)
    ]
    body = lines(*(block(pair, number=number) for number, pair in enumerate(trades)))
    assert keep(connection, fills, body) == (600, 0)
    sides = connection.execute("select array_agg(side order by side) from fills group by tid").fetchall()
    assert sides == [(["A", "B"],)] * 300


# --- hostile ------------------------------------------------------------------------------------------------------

HOSTILE = (
    *(None, True, False, 0, -1, 1.5, -0.0, 1e300, 2**31, 2**53 + 1, 2**63, -(2**63) - 1, 10**30, 10**400),
    *(
        "",
        " ",
        "x",
        "NaN",
        "Infinity",
        "1e400",
        "0x1",
        "1_000",
        "-0",
        "1.0",
        "1.10e1",
        "true",
        "activated",
        "error",
    ),
    *(
        "\x00",
        "\ud800",
        "a\udc00",
        "\u202e",
        "\\.",
        "\t\n\\",
        "x" * 3_000,
        '{"error": "\\u0000"}',
        '"',
        "{",
        '{"a": NaN}',
    ),
    *(
        [],
        {},
        [1.5],
        {"a": {"b": 1.10}},
        {"": None},
        {"\ud800": "\ud800"},
        {"\x00": 1},
        [[[[]]]],
        {"error": "\x00"},
    ),
    *(
        {"error": 1.10},
        math.nan,
        math.inf,
        iso(T0_NS),
        T0_MS,
        WALLETS[0],
        WALLETS[0].upper(),
        WALLETS[0][:-1] + "İ",
    ),
)
LIQUIDATION = {"liquidatedUser": WALLETS[2], "markPx": "64000.50", "method": "market"}


def hostile_fill(name, value):
    fields = {"liquidation": LIQUIDATION, "builder": WALLETS[3], "builderFee": "0.010", "tid": 2}
    pair = [WALLETS[1], fill(2, **fields)]
    if name == "user":
        pair[0] = value
    else:
        pair[1][name] = value
    return pair


def hostile_event(name, value):
    told = event(2)
    if name in told["state"] or name == "in state":
        told["state"][name] = value
    else:
        told[name] = value
    return told


CASES = {
    "fills": (
        fills,
        [WALLETS[0], fill(1)],
        hostile_fill,
        [*hostile_fill("user", "")[1], "user", "novel", "block_time", "block_number", ""],
    ),
    "twaps": (
        twaps,
        event(1),
        hostile_event,
        [*event(0), *event(0)["state"], "in state", "block_number", "status_error", "novel", ""],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_hostile_value_costs_its_own_row_at_most(case, connection):
    source, good, make, names = CASES[case]
    for name in names:
        bad = [make(name, value) for value in HOSTILE]
        for body in (lines(good, *bad), json.dumps([good, *bad], indent=1).encode()):
            connection.execute(f"truncate {source.TABLE}, rejected_rows")
            read, rejected = keep(connection, source, body)
            assert read >= len(bad) + 1, name
            intact = "tid = 1000000000001" if source is fills else "twap_id = 2250264"
            assert connection.execute(f"select count(*) from {source.TABLE} where {intact}").fetchone() == (
                1,
            ), name
            assert (
                rejected
                == connection.execute("select coalesce(sum(times), 0) from rejected_rows").fetchone()[0]
            )


def read_table(connection, source):
    """The table, without the columns that the job adds."""
    table = describe(connection, source.TABLE)
    for name in ("object_id", "s3_object_key", "s3_last_modified"):
        table.columns.pop(name, None)
    return table


@pytest.mark.parametrize("case", CASES)
def test_a_batch_with_nothing_but_a_hostile_value_has_types_that_the_loader_takes(
    case, connection, monkeypatch, rng
):
    source, _, make, names = CASES[case]
    table = read_table(connection, source)
    monkeypatch.setattr(files, "BATCH", 1)
    for name in names:
        # A sound row first: a file that begins without a user is refused whole.
        body = lines(make("other", 1), *(make(name, value) for value in rng.sample(HOSTILE, 20)))
        for rows in source.read(batches(body)):
            if rows.frame.height:
                checks.split(rows.frame, table)


ODD_COLUMNS = {
    "null": pa.nulls(3),
    "boolean": pa.array([True, False, None]),
    "tiny": pa.array([0, 1, None], pa.uint8()),
    "huge": pa.array([2**64 - 1, 2**63, 5], pa.uint64()),
    "float": pa.array([math.nan, math.inf, 1.5]),
    "half": pa.array([1.5, -0.0, None], pa.float16()),
    "decimal": pa.array([Decimal("1.10"), Decimal("-1E+30"), None], pa.decimal256(60, 10)),
    "day": pa.array([20_000, -(2**31), None], pa.date32()),
    "time": pa.array([1, 2, None], pa.time64("ns")),
    "span": pa.array([1, -(2**62), None], pa.duration("ns")),
    "seconds": pa.array([1, 10**15, None], pa.timestamp("ms", "Asia/Tokyo")),
    "bytes": pa.array([b"\xff", b"", b"a"]),
    "raw address": pa.array([b"\xab" * 20] * 3, pa.binary(20)),
    "categories": pa.array(["a", "b", None]).dictionary_encode(),
    "text": pa.array(["\x00", "", "\U0010ffff" * 3]),
    "json": pa.array(["{", "null", '{"a": NaN}'], pa.json_(pa.string())),
    "list": pa.array([[1], [], None]),
    "map": pa.array([[("a", 1)], [], None], pa.map_(pa.string(), pa.int64())),
    "struct": pa.array([{"a": [b"\xff"], "error": 5}, {"a": None, "error": None}, None]),
    "empty": pa.array([{"status": None}] * 3),
}


def table_of(case):
    if case == "fills":
        served = [{"user": user, **one} for user, one in (hostile_fill("tid", number) for number in range(3))]
        return {name: pa.array([one[name] for one in served]) for name in served[0]}
    states = [event(number)["state"] for number in range(3)]
    flat = {f"state_{name}": pa.array([one[name] for one in states]) for name in states[0]}
    return {
        "twap_id": pa.array([0, 1, 2]),
        "time": pa.array([T0_NS] * 3),
        "block_number": pa.array([1] * 3),
        "status": pa.array(["activated"] * 3),
        "status_error": pa.array([""] * 3),
        **flat,
    }


@pytest.mark.parametrize("case", CASES)
def test_a_column_of_an_odd_type_is_refused_or_costs_its_own_values(case, connection, rng):
    source = CASES[case][0]
    table = read_table(connection, source)
    columns = table_of(case)
    pairs = [(name, kind) for name in [*columns, "state", "novel"] for kind in ODD_COLUMNS]
    whole, refused = set(rng.sample(pairs, 40)), 0
    for name, kind in pairs:
        body = as_parquet({**columns, name: ODD_COLUMNS[kind]})
        try:
            for rows in source.read(batches(body)):
                rejected = len(rows.rejected)
                if rows.frame.height:
                    good, bad = checks.split(rows.frame, table)
                    rejected += bad.height
                    assert good.height + rejected == 3 or source is fills, (name, kind)
        except UnusableError:
            refused += 1
            continue
        if name == "novel":
            assert rejected == (kind == "text"), kind  # jsonb takes no NUL
        if (name, kind) in whole:
            connection.execute(f"truncate {source.TABLE}, rejected_rows")
            read, rejected = keep(connection, source, body)
            assert (read, kind) == (3, kind)
            assert connection.execute(f"select count(*) from {source.TABLE}").fetchone()[0] <= 3 - rejected
    assert 0 < refused < len(pairs) / 2
