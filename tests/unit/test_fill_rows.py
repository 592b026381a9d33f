"""Fills become the same rows in whatever shape they are told; what cannot be one is rejected and spoils no other."""

from __future__ import annotations

import json
import math
from decimal import Decimal

import pyarrow as pa
import pytest
from object_files import (
    T0_MS,
    T0_NS,
    WALLETS,
    as_parquet,
    batches,
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

from hlcli.sources import files, fills, user_fills
from hlcli.sources.files import UnusableError

LIQUIDATION = {"liquidatedUser": WALLETS[2], "markPx": "64000.50", "method": "market"}
OPTIONAL = {
    "liquidation": LIQUIDATION,
    "builder": WALLETS[3],
    "builderFee": "0.010",
    "deployerFee": "0.0020",
    "priorityGas": "0.00000001",
    "twapId": 2_250_263,
}
SERVED = [
    (WALLETS[0], fill(0)),
    (WALLETS[1].upper().replace("X", "x"), fill(1, **OPTIONAL)),
    (WALLETS[2], fill(2, cloid=..., feeToken="+1890", coin="@107", px="0.00000123000")),
]
TEXTS = {
    "coin": "coin",
    "side": "side",
    "px": "px",
    "sz": "sz",
    "dir": "dir",
    "start_position": "startPosition",
    "closed_pnl": "closedPnl",
    "fee": "fee",
    "fee_token": "feeToken",
    "hash": "hash",
    "cloid": "cloid",
    "builder": "builder",
    "builder_fee": "builderFee",
    "deployer_fee": "deployerFee",
    "priority_gas": "priorityGas",
}
BARE = {"tid": "tid", "oid": "oid", "crossed": "crossed", "twap_id": "twapId"}


def expected(served=SERVED, *, block_time=None, block_number=None, source="s3", **more):
    """The rows of the table, said without any code of the reader's."""
    return [
        {
            "user_address": user.lower(),
            "time": moment(one["time"] * 10**6),
            "event_ix": 0,
            "block_time": block_time,
            "block_number": block_number,
            "liquidation": one.get("liquidation"),
            "extra": None,
            "is_exact": True,
            "source": source,
            **{ours: one.get(theirs) for ours, theirs in {**TEXTS, **BARE}.items()},
            **more,
        }
        for user, one in served
    ]


def seen(rows):
    """Rows as read, with documents decoded, and integers and booleans out of text, as which they come from some files."""
    told = []
    for row in rows:
        plain = {
            name: int(row[name]) if row[name] is not None else None for name in ("tid", "oid", "twap_id")
        }
        plain |= {name: row[name] and json.loads(row[name]) for name in ("liquidation", "extra")}
        crossed = {"true": True, "false": False}.get(row["crossed"], row["crossed"])
        told.append({**row, **plain, "crossed": crossed})
    return told


# --- shapes -------------------------------------------------------------------------------------------------------

PAIRS = [[user, one] for user, one in SERVED]
FLAT = [{**one, "user": user} for user, one in SERVED]


def snake(name):
    return "".join("_" + char.lower() if char.isupper() else char for char in name)


def test_lines_by_block():
    whole = [block(PAIRS)]
    one_each = [block([pair]) for pair in PAIRS]
    for given in (whole, one_each):
        rows = clean(fills, packed(lines(*given), "lz4"))
        assert seen(rows) == expected(block_time=moment(T0_NS), block_number=1_159_309_631)


def test_lines_of_pairs_as_older_nodes_wrote_them():
    assert seen(clean(fills, lines(*PAIRS))) == expected()
    assert seen(clean(fills, lines(PAIRS))) == expected()


@pytest.mark.parametrize("naming", [str, snake, str.upper])
def test_flattened_lines(naming):
    given = [{naming(name): value for name, value in one.items()} for one in FLAT]
    rows = clean(fills, lines(*({**one, naming("block_time"): iso(T0_NS)} for one in given)))
    assert seen(rows) == expected(block_time=moment(T0_NS))
    renamed = [{naming("user_address"): one.pop(naming("user")), **one} for one in given]
    assert seen(clean(fills, lines(*renamed))) == expected()


@pytest.mark.parametrize("indent", [None, 1])
def test_arrays_as_the_api_answers(indent):
    answers = [one for _, one in SERVED]
    told = [(WALLETS[4], one) for one in answers]
    for given in (answers, [{"fill": {**one, "twapId": None}, "twapId": one["twapId"]} for one in answers]):
        rows = clean(
            fills, json.dumps(given, indent=indent).encode(), user=WALLETS[4].upper().replace("X", "x")
        )
        assert seen(rows) == expected(told, source="api")


def test_a_user_is_given_only_to_fills_that_do_not_say_theirs():
    rows = clean(fills, lines(*(served[1] for served in SERVED)), user=WALLETS[5])
    assert {(row["user_address"], row["source"]) for row in rows} == {(WALLETS[5], "api")}
    columns = {
        name: [one.get(name) for one in FLAT]
        for name in ("user", "coin", "tid", "oid", "side", "time", "px", "sz")
    }
    for body in (lines(block(PAIRS[:1])), lines(FLAT[1]), as_parquet(columns)):
        with pytest.raises(files.LackingError, match="leave out --user"):
            read(fills, body, user=WALLETS[5])
    del columns["user"]
    rows = clean(fills, as_parquet(columns), user=WALLETS[5])
    assert [row["user_address"] for row in rows] == [WALLETS[5]] * 3


@pytest.mark.timeout(20)
@pytest.mark.parametrize("leaf", [1, "1", Decimal("1.5")])
def test_a_value_that_is_nested_deeply_costs_its_own_row_and_no_time(leaf):
    deep = leaf
    for _ in range(400):
        deep = [deep]
    served = [served[1] for served in SERVED]
    rows = user_fills.rows(WALLETS[5], [*served, {**served[0], "px": deep}])
    assert rows.frame.height == len(SERVED) + 1
    assert rows.frame["px"][-1].startswith("[[[[")


def table_of(naming=str, **replaced):
    """Columns of a flattened Parquet file; keyword arguments replace one or, with None, leave it out."""
    names = dict.fromkeys(name for one in FLAT for name in one)
    columns = {name: pa.array([one.get(name) for one in FLAT]) for name in names}
    columns.update(replaced)
    return {naming(name): values for name, values in columns.items() if values is not None}


@pytest.mark.parametrize("naming", [str, snake, str.title])
def test_parquet_names(naming):
    block_time = pa.array([iso(T0_NS)] * 3)
    rows = clean(fills, as_parquet(table_of(naming, block_time=block_time, block_number=pa.array([7] * 3))))
    assert seen(rows) == expected(block_time=moment(T0_NS), block_number=7)


def texts_as(kind):
    return {
        name: values.cast(kind)
        for name, values in table_of().items()
        if pa.types.is_string(values.type) and not pa.types.is_null(values.type)
    }


@pytest.mark.parametrize(
    "kind",
    [pa.large_string(), pa.binary(), pa.large_binary(), pa.dictionary(pa.int32(), pa.string())],
    ids=str,
)
@pytest.mark.parametrize("store_schema", [True, False])
def test_parquet_kinds_of_text(kind, store_schema):
    body = as_parquet(table_of(**texts_as(kind)), store_schema=store_schema)
    assert seen(clean(fills, body)) == expected()


@pytest.mark.parametrize("unit", ["s", "ms", "us", "ns"])
@pytest.mark.parametrize("zone", [None, "UTC", "Asia/Tokyo"])
def test_parquet_timestamps(unit, zone):
    factor = {"s": 10**9, "ms": 10**6, "us": 10**3, "ns": 1}[unit]
    times = [one["time"] * 10**6 // factor for one in FLAT]
    body = as_parquet(table_of(time=pa.array(times).cast(pa.timestamp(unit, zone))))
    cut = [
        (user, {**one, "time": one["time"] // 1000 * 1000 if unit == "s" else one["time"]})
        for user, one in SERVED
    ]
    assert seen(clean(fills, body)) == expected(cut)


@pytest.mark.parametrize(
    "kind",
    [pa.int64(), pa.uint64(), pa.float64(), pa.string(), pa.decimal128(20, 0), pa.timestamp("ns")],
    ids=str,
)
def test_parquet_milliseconds_of_any_type(kind):
    times = pa.array([one["time"] for one in FLAT])
    assert seen(clean(fills, as_parquet(table_of(time=times.cast(kind))))) == expected()


@pytest.mark.parametrize(
    "kind", [pa.uint64(), pa.float64(), pa.string(), pa.binary(), pa.decimal256(40, 0)], ids=str
)
def test_parquet_integers_of_any_type(kind):
    def cast(values):
        return values.cast(pa.string()).cast(kind) if pa.types.is_binary(kind) else values.cast(kind)

    columns = {name: cast(table_of()[name]) for name in ("tid", "oid", "twapId")}
    assert seen(clean(fills, as_parquet(table_of(**columns)))) == expected()


@pytest.mark.parametrize(
    "kind", [pa.decimal128(38, 18), pa.decimal256(60, 18), pa.float64(), pa.float32()], ids=str
)
def test_parquet_numbers_of_any_type(kind):
    numbers = ["1234.5", "-0.5", "0"]
    values = pa.array(
        [(float if pa.types.is_floating(kind) else Decimal)(number) for number in numbers], kind
    )
    rows = clean(fills, as_parquet(table_of(px=values, fee=values)))
    for name in ("px", "fee"):
        assert [Decimal(row[name]) for row in rows] == [Decimal(number) for number in numbers]
    assert {row["is_exact"] for row in rows} == {not pa.types.is_floating(kind)}


def test_a_floating_point_number_is_its_shortest_text():
    numbers = [0.1, 1e-7, 123456789.123456789]
    rows = clean(fills, as_parquet(table_of(px=pa.array(numbers))))
    assert [float(row["px"]) for row in rows] == numbers
    assert [Decimal(row["px"]) for row in rows] == [Decimal(repr(number)) for number in numbers]


@pytest.mark.parametrize("values", [["true", "FALSE", "True"], [True, False, True]])
def test_parquet_booleans(values):
    rows = clean(fills, as_parquet(table_of(crossed=pa.array(values))))
    assert [str(row["crossed"]).lower() for row in rows] == ["true", "false", "true"]


def test_parquet_liquidations_of_any_type():
    told = [None, LIQUIDATION, None]
    text = pa.array([value and json.dumps(value) for value in told])
    nulls = pa.array([value or dict.fromkeys(LIQUIDATION) for value in told])
    for values in (pa.array(told), nulls, text, text.cast(pa.json_(pa.string()))):
        assert seen(clean(fills, as_parquet(table_of(liquidation=values)))) == expected()


def test_parquet_without_the_fields_of_few_fills():
    bare = ("user", "coin", "tid", "oid", "side", "time", "px", "sz")
    rows = clean(fills, as_parquet({name: values for name, values in table_of().items() if name in bare}))
    for row, whole in zip(rows, expected(), strict=True):
        kept = {
            "user_address",
            "coin",
            "tid",
            "oid",
            "side",
            "time",
            "px",
            "sz",
            "event_ix",
            "source",
            "is_exact",
        }
        assert row == {name: value if name in kept else None for name, value in whole.items()}


@pytest.mark.parametrize("name", ["user", "coin", "tid", "oid", "side", "time", "px", "sz"])
def test_parquet_without_what_every_fill_has_is_refused(name):
    ours = {"user": "user_address"}.get(name, name)
    with pytest.raises(UnusableError, match=f"has no column for {ours}$"):
        read(fills, as_parquet(table_of(**{name: None})))


def test_parquet_that_says_something_twice_is_refused():
    with pytest.raises(UnusableError, match="'startPosition' and 'start_position' say the same"):
        read(fills, as_parquet(table_of(start_position=pa.array(["1"] * 3))))


@pytest.mark.parametrize(
    "values", [[[1]] * 3, [{"a": 1}] * 3, pa.array([[("a", 1)]] * 3, pa.map_(pa.string(), pa.int64()))]
)
@pytest.mark.parametrize("name", ["px", "time", "user", "tid", "crossed", "dir"])
def test_parquet_with_lists_where_a_scalar_belongs_is_refused(name, values):
    with pytest.raises(UnusableError, match=f"column '{name}' holds"):
        read(fills, as_parquet(table_of(**{name: pa.array(values)})))


# --- what the table has no column for -----------------------------------------------------------------------------


def test_unknown_fields_are_kept_digit_for_digit():
    odd = '{"f":1.10,"big":12345678901234567890.123,"ns":1790248352992506967,"nan":NaN,"deep":[{"x":null,"y":-0.0}],"s":"ü"}'
    text = json.dumps(SERVED[0][1])[:-1] + f', "odd": {odd}, "nothing": null, "extra": "e"}}'
    (row,) = clean(fills, f'["{WALLETS[0]}", {text}]\n'.encode())
    told = json.loads(row["extra"], parse_float=str, parse_int=str)
    assert told == {
        "odd": {
            "f": "1.10",
            "big": "12345678901234567890.123",
            "ns": "1790248352992506967",
            "nan": "NaN",
            "deep": [{"x": None, "y": "-0.0"}],
            "s": "ü",
        },
        "extra": "e",
    }
    assert '"ns": "1790248352992506967"' in row["extra"]


def test_a_row_without_unknown_fields_has_no_extra_beside_one_that_has():
    rows = clean(
        fills, lines([WALLETS[0], fill(0)], [WALLETS[0], fill(1, novel=1)], [WALLETS[0], fill(2, novel=None)])
    )
    assert [row["extra"] for row in rows] == [None, '{"novel":1}', None]


def test_unknown_columns_are_kept_as_documents():
    at = pa.array([T0_NS, None, 2**62]).cast(pa.timestamp("ns"))
    columns = {
        "int": pa.array([2**53, 2**53 + 1, None]),
        "tiny": pa.array([1, 2, None], pa.uint8()),
        "huge": pa.array([2**64 - 1, 0, None], pa.uint64()),
        "float": pa.array([1.5, math.nan, None]),
        "decimal": pa.array([Decimal("1.10"), Decimal("-12345678901234567890.12"), None]),
        "binary": pa.array([b"text", b"text too", None]),
        "blob": pa.array([b"text", b"\xff\x00", None]),
        "at": at,
        "far": pa.array([2**60, 0, None]).cast(pa.timestamp("s")).cast(pa.int64()),
        "day": pa.array([20_000, None, None], pa.date32()),
        "list": pa.array([[1.5, math.inf], [], None]),
        "struct": pa.array([{"a": 2**60, "b": [{"c": b"\xff"}], "d": Decimal("0.10")}, None, None]),
    }
    rows = clean(fills, as_parquet(table_of(**columns)))
    first, second, third = (row["extra"] and json.loads(row["extra"]) for row in rows)
    assert first == {
        "int": str(2**53),
        "tiny": 1,
        "huge": str(2**64 - 1),
        "float": "1.5",
        "decimal": "1.10",
        "binary": "text",
        "blob": "dGV4dA==",
        "at": "2026-09-24 11:12:32.992506967",
        "far": str(2**60),
        "day": "2024-10-04 00:00:00.000",
        "list": [1.5, "inf"],
        "struct": {"a": str(2**60), "b": [{"c": "/w=="}], "d": "0.10"},
    }
    assert second["float"] == "NaN"
    assert second["decimal"] == "-12345678901234567890.12"
    assert second["struct"] is None
    assert third == {**dict.fromkeys(columns), "at": "2116-02-20 23:53:38.427387904"}


@pytest.mark.parametrize(
    ("unit", "year_10000"), [("ms", 253_402_300_800_000), ("us", 253_402_300_800_000_000)]
)
def test_unknown_timestamps_of_far_years_are_shown_as_integers(unit, year_10000):
    values = [year_10000 - 1, year_10000, -1]
    rows = clean(fills, as_parquet(table_of(odd=pa.array(values).cast(pa.timestamp(unit)))))
    shown = [json.loads(row["extra"])["odd"] for row in rows]
    assert shown[0].startswith("9999-12-31 23:59:59.999")
    assert shown[1:] == [str(year_10000), "-1"]


# --- fills with one key -------------------------------------------------------------------------------------------


def dust(sz, **more):
    return fill(0, **{"tid": 0, "sz": sz, "dir": "Spot Dust Conversion", **more})


def numbers(rows):
    return [(row["sz"], row["event_ix"]) for row in rows]


def test_equal_keys_are_numbered_in_their_order_and_identical_fills_are_one():
    given = [dust("1"), dust("2"), dust("1"), dust("3"), fill(0), dust("2")]
    rows = clean(fills, lines(block([[WALLETS[0], one] for one in given])))
    assert numbers(rows) == [("1", 0), ("2", 1), ("1", 0), ("3", 2), (fill(0)["sz"], 0), ("2", 1)]


@pytest.mark.parametrize(
    "name", ["startPosition", "fee", "dir", "hash", "crossed", "cloid", "feeToken", "twapId", "novel"]
)
def test_any_field_tells_fills_with_one_key_apart(name):
    value = False if name == "crossed" else 5 if name in {"twapId", "novel"} else "1"
    rows = clean(fills, lines(block([[WALLETS[0], dust("1")], [WALLETS[0], dust("1", **{name: value})]])))
    assert [row["event_ix"] for row in rows] == [0, 1]


def test_one_fill_told_by_two_blocks_is_one():
    pair = [WALLETS[0], fill(0)]
    rows = clean(fills, lines(block([pair]), block([pair], number=5, ns=T0_NS + 1000)))
    assert [row["event_ix"] for row in rows] == [0, 0]


@pytest.mark.parametrize("batch", [1, 2, 3, 7])
@pytest.mark.parametrize("shape", ["pairs", "blocks", "array", "parquet", "row groups"])
def test_equal_keys_are_told_apart_over_the_ends_of_batches(batch, shape, monkeypatch):
    monkeypatch.setattr(files, "BATCH", batch)
    given = [fill(0), *(dust(str(number)) for number in range(10)), dust("4"), fill(5)]
    user = WALLETS[0]
    options = {}
    if shape == "array":
        body, options = json.dumps(given, indent=1).encode(), {"user": user}
    elif shape == "pairs":
        body = lines(*([user, one] for one in given))
    elif shape == "blocks":
        body = lines(*(block([[user, one]]) for one in given))
    else:
        columns = {name: [one[name] for one in given] for name in given[0]}
        groups = {"row_group_size": 1} if shape == "row groups" else {}
        body = as_parquet({"user": [user] * len(given), **columns}, **groups)
    rows = clean(fills, body, **options)
    assert numbers(rows) == [
        (fill(0)["sz"], 0),
        *((str(number), number) for number in range(10)),
        ("4", 4),
        (fill(5)["sz"], 0),
    ]


def test_batches_of_different_types_are_one_file(monkeypatch):
    monkeypatch.setattr(files, "BATCH", 1)
    given = [fill(0), fill(0, tid="x", crossed="maybe", px=1.5), fill(0, tid=7, twapId=5), fill(0, tid=2**63)]
    rows = clean(fills, lines(*([WALLETS[0], one] for one in given)))
    assert [str(row["tid"]) for row in rows] == [str(one["tid"]) for one in given]


def test_a_million_fills_of_one_time_are_not_held(monkeypatch):
    monkeypatch.setattr(files, "BATCH", 5_000)
    assert fills.MAX_HELD == 200_000
    monkeypatch.setattr(fills, "MAX_HELD", 20_000)
    columns = {"user": WALLETS[0], "coin": "BTC", "oid": 1, "side": "A", "time": T0_MS, "px": "1", "sz": "1"}
    height = 40_000
    body = as_parquet(
        {name: [value] * height for name, value in columns.items()} | {"tid": list(range(height))}
    )
    with pytest.raises(UnusableError, match="over 20,000 fills have one time"):
        read(fills, body)


# --- what is no fill ----------------------------------------------------------------------------------------------

GOOD = [WALLETS[0], fill(1)]


@pytest.mark.parametrize(
    "odd",
    [1, "text", None, True, 1.5, [], [1, 2], ["0x", "y"], [None, None], ["a", {}, 3], [[]], ["0x"]],
    ids=str,
)
def test_an_event_that_is_no_pair_is_rejected_alone(odd):
    for body in (lines(block([GOOD, odd, GOOD])), lines(GOOD, [odd], GOOD), lines(GOOD, odd, GOOD)):
        rows, rejected = read(fills, body)
        assert {row["tid"] for row in rows} == {GOOD[1]["tid"]}
        assert len(rows) == 2
        assert {each.reason for each in rejected} <= {"not_a_fill", fills.GARBLED}


@pytest.mark.parametrize("events", [None, 5, "x", {}, {"a": 1}])
def test_a_block_whose_events_are_no_list_is_rejected_whole(events):
    rows, rejected = read(fills, lines(block([GOOD]), block(events), block([])))
    assert len(rows) == 1
    assert [each.reason for each in rejected] == [fills.GARBLED]


@pytest.mark.parametrize(
    "time",
    [..., None, "", "soon", 0, -1, True, 5 * 10**10, 1.5, 10**30, [], {}, "2022-01-01", "\ud800", "1e12"],
    ids=repr,
)
def test_a_fill_without_a_time_of_ours_is_rejected_with_its_payload(time):
    bad = fill(2, time=time, odd=1.10)
    rows, rejected = read(fills, lines(GOOD, [WALLETS[1], bad]))
    assert seen(rows) == expected([GOOD])
    ((key, reason, column),) = [(each.key, each.reason, each.column) for each in rejected]
    assert (reason, column, key[2]) == (fills.GARBLED, "time", bad["tid"])
    assert json.dumps(rejected[0].payload, default=str)


@pytest.mark.parametrize("block_time", ["soon", 5, 1.5, [], True])
def test_a_time_of_the_block_that_tells_none_is_not_dropped_silently(block_time):
    rows, rejected = read(fills, lines(block([GOOD]), block([[WALLETS[1], fill(2)]], block_time=block_time)))
    assert len(rows) == 1
    assert [(each.reason, each.column) for each in rejected] == [(fills.GARBLED, "block_time")]


def test_of_a_name_that_stands_twice_the_last_counts():
    text = json.dumps(fill(1))[:-1] + ', "px": "5.00"}'
    (row,) = clean(fills, f'["{WALLETS[0]}", {text}]\n'.encode())
    assert row["px"] == "5.00"


def test_a_file_that_names_no_user_is_refused_and_asks_for_one():
    for body in (lines(event(1), event(2)), lines(block([event(1)])), lines(fill(1), fill(2))):
        with pytest.raises(files.LackingError, match="whose fills .* --user"):
            read(fills, body)
    with pytest.raises(UnusableError, match="has no column for user_address, coin"):
        read(fills, as_parquet({"time": [T0_NS], "twap_id": [1], "status": ["activated"]}))


def test_the_first_fills_do_not_wait_for_the_last(monkeypatch):
    monkeypatch.setattr(files, "BATCH", 10)
    found = fills.read(batches(lines(*([WALLETS[0], fill(number)] for number in range(100)))))
    assert next(found).frame.height == 9


@pytest.mark.parametrize("batch", [1, 2, 20_000])
def test_no_frame_is_empty_and_that_of_a_small_file_has_all_its_days(batch, monkeypatch):
    monkeypatch.setattr(files, "BATCH", batch)
    given = [[WALLETS[0], fill(number, time=T0_MS + 86_400_000 * (number // 2))] for number in range(6)]
    found = list(fills.read(batches(lines(*given))))
    assert all(rows.frame.height for rows in found)
    assert sum(rows.frame.height for rows in found) == len(given)
    if batch > len(given):
        assert len(found) == 1


def test_rejected_lines_come_even_if_no_row_does(monkeypatch):
    monkeypatch.setattr(files, "BATCH", 2)
    monkeypatch.setattr(fills, "BATCH", 4)
    found = list(fills.read(batches(b"x\n" * 11)))
    assert [(rows.frame.height, len(rows.rejected)) for rows in found] == [(0, 4), (0, 4), (0, 3)]


def test_a_bad_time_in_parquet_costs_its_row_whatever_else_that_holds():
    odd = pa.array([b"\xff", b"a", b"b"])
    far = pa.array([2**62, T0_NS // 10**6, T0_NS // 10**6]).cast(pa.timestamp("ms"))
    rows, rejected = read(fills, as_parquet(table_of(time=far, odd=odd)))
    assert [row["tid"] for row in rows] == [one["tid"] for one in FLAT[1:]]
    ((reason, payload),) = [(each.reason, each.payload) for each in rejected]
    assert reason == fills.GARBLED
    assert (payload["time"], payload["odd"], payload["px"]) == (str(2**62), "/w==", FLAT[0]["px"])
