"""The invented files of fills and TWAP statuses: what they tell adds up, and is the same however it is written."""

import json
from collections import Counter, defaultdict
from datetime import UTC, datetime, timedelta
from decimal import Decimal

import polars as pl
import pyarrow as pa
import pytest

from hlcli.sim import objects
from hlcli.sim.columns import HOUR_NS, text_of
from hlcli.sim.files import BLOCK
from hlcli.sim.fill_files import BY_BLOCK, FillShape, fill_rows, write_fills
from hlcli.sim.fills import CASCADE, DUST_USERS, SYSTEM_ADDRESS, ZERO_HASH
from hlcli.sim.fills import fills as fills_of
from hlcli.sim.twap_files import TwapShape, write_twaps
from hlcli.sim.twaps import twaps
from hlcli.sim.values import decimal_text

HOUR = 498_000
COUNT = 8000
DUST = "Spot Dust Conversion"


def by_hour(parts):
    files = defaultdict(list)
    for part in parts:
        files[part.hour].append(part.rows)
    return {hour: pl.concat(frames) for hour, frames in files.items()}


@pytest.fixture(scope="module")
def files():
    return by_hour(fills_of(1, HOUR, COUNT, 3))


@pytest.fixture(scope="module")
def fills(files):
    """All that was written, and nothing is missing in it but what the next file would begin with."""
    return pl.concat(files.values())


@pytest.fixture(scope="module")
def events():
    return twaps(1, HOUR, 40, 12)


def text(path):
    raw = path.read_bytes()
    return (
        pa.input_stream(pa.BufferReader(raw), compression="lz4").read() if path.suffix == ".lz4" else raw
    ).decode()


def decoded(path):
    return [json.loads(line) for line in text(path).splitlines()]


def shape(value):
    """The keys of a JSON object in their order, with the kind of what stands there."""
    if isinstance(value, dict):
        return {name: shape(inner) for name, inner in value.items()}
    return type(value).__name__


# --- fills ---------------------------------------------------------------------------------------------------


def test_numbers_are_written_as_by_the_rest_of_the_simulator(rng):
    numbers = [0, 1, -1, 10, -10, 10**15, *(rng.randrange(-(10**12), 10**12) for _ in range(200))]
    frame = pl.DataFrame({"n": numbers})
    for decimals in range(11):
        ours = frame.select(text_of(pl.col("n"), 10**decimals)).to_series().to_list()
        assert ours == [decimal_text(number, decimals) for number in numbers]


def test_the_same_seed_hour_and_count_make_the_same_fills(files):
    again = by_hour(fills_of(1, HOUR, COUNT, 3))
    assert all(again[hour].equals(files[hour]) for hour in files)
    other = by_hour(fills_of(2, HOUR, COUNT))[HOUR]
    assert set(other["tid"]) & set(files[HOUR]["tid"]) == {0}
    # A later hour of a longer row of hours tells of the same trades.
    alone = by_hour(fills_of(1, HOUR + 1, COUNT))[HOUR + 1]
    own = files[HOUR + 1].filter(pl.col("block_ns") > HOUR_NS * (HOUR + 1))
    assert set(alone["tid"]) >= set(own["tid"])


def test_as_many_fills_as_asked_for_happen_in_an_hour(files):
    arrived = [frame.height for frame in files.values()]
    late = [frame.filter(pl.col("local_ns") < hour * HOUR_NS + 10**8).height for hour, frame in files.items()]
    assert late[0] == 0
    assert all(0.015 * COUNT / 2 < each < 0.025 * COUNT / 2 for each in late[1:])
    assert arrived[0] + late[1] == arrived[1] - late[1] + late[2] == COUNT


def test_two_sides_make_a_trade_and_the_last_file_lacks_the_late_ones(files, fills):
    trades = fills.filter(pl.col("tid") != 0).group_by("tid", "block_number").agg(pl.all())
    single = 0
    for trade in trades.iter_rows(named=True):
        if len(trade["side"]) == 1:
            single += 1
            assert trade["crossed"] == [True]
            continue
        assert sorted(trade["side"]) == ["A", "B"]
        assert sorted(trade["crossed"]) == [False, True]
        for name in ("coin", "px", "sz", "time", "hash", "liquidated_user"):
            assert len(set(trade[name])) == 1, name
        assert len(set(trade["user"])) == len(set(trade["oid"])) == 2
    last = files[HOUR + 2]
    assert single == COUNT - (last.filter(pl.col("local_ns") >= (HOUR + 2) * HOUR_NS + 10**8).height)


def test_a_file_is_cut_by_arrival(files):
    for hour, frame in files.items():
        assert frame["local_ns"].is_sorted()
        assert frame["local_ns"].is_between(hour * HOUR_NS, (hour + 1) * HOUR_NS, closed="left").all()
        before = frame["block_ns"] < hour * HOUR_NS
        assert before[0]
        assert before.sum() < 0.02 * COUNT
        assert (frame["block_ns"] < frame["local_ns"]).all()
        assert (frame["time"] == frame["block_ns"] // 10**6).all()
        lines = frame.select(BLOCK).unique()
        assert lines.height == frame["block_number"].n_unique() == frame["block_ns"].n_unique()


def test_blocks_hold_one_fill_or_hundreds(fills):
    sizes = fills.group_by("block_number").len()["len"]
    assert sizes.min() == 1
    assert sizes.max() >= 2 * CASCADE
    assert 5 < sizes.mean() < 20


def test_positions_follow_from_one_another(fills):
    rows = fills.filter(pl.col("dir") != DUST)
    arrived = rows.sort("block_ns", maintain_order=True)
    held, checked, broken = {}, 0, 0
    for row in arrived.iter_rows(named=True):
        key = row["user"], row["coin"]
        start, size = Decimal(row["start_position"]), Decimal(row["sz"])
        if key in held:
            checked += 1
            broken += held[key] != start
        after = held[key] = start + (size if row["side"] == "B" else -size)
        if row["coin"][0] in "@#" or "/" in row["coin"]:
            assert (row["dir"], start >= 0) == ("Buy" if row["side"] == "B" else "Sell", True)
        else:
            assert row["dir"] in allowed(row["side"], start, after)
        closes = start * (after - start) < 0
        assert closes or row["closed_pnl"] == "0.0"
    # What has not arrived yet, or arrived within its block after others, leaves a gap.
    assert checked > COUNT
    assert broken < 0.02 * checked


def allowed(side, start, after):
    if side == "B" and start < 0:
        return {"Short > Long"} if after > 0 else {"Close Short", "Liquidated Cross Short"}
    if side == "A" and start > 0:
        return {"Long > Short"} if after < 0 else {"Close Long", "Liquidated Cross Long"}
    return {"Open Long" if side == "B" else "Open Short"}


def test_every_oddity_is_there(fills):
    coins = set(fills["coin"])
    assert coins >= {"BTC", "kPEPE", "xyz:NFLX", "@107", "PURR/USDC", "#1890"}
    foreign = (fills["fee_token"] != "USDC").mean()
    assert 0.02 < foreign < 0.08
    assert 0.05 < fills["fee"].str.starts_with("-").mean() < 0.4
    assert not fills.filter("crossed")["fee"].str.starts_with("-").any()
    shares = fills.select(pl.all().is_not_null().mean()).row(0, named=True)
    for name in ("cloid", "liquidated_user", "builder", "builder_fee", "deployer_fee", "priority_gas"):
        assert 0.002 < shares[name] < 0.5, name
    forced = fills.filter(pl.col("dir").str.starts_with("Liquidated"))
    assert (forced["user"] == forced["liquidated_user"]).all()
    assert forced["crossed"].all()
    assert set(forced["side"]) == {"A", "B"}


def test_slices_have_no_hash_and_only_their_owner_has_the_number(fills):
    slices = fills.filter((pl.col("hash") == ZERO_HASH) & (pl.col("dir") != DUST))
    assert 0.08 < slices.height / fills.height < 0.2
    assert slices.filter("crossed")["twap_id"].null_count() == 0
    assert fills.filter(~pl.col("crossed"))["twap_id"].drop_nulls().is_empty()
    orders = twaps(1, HOUR - 2, hours=5).unique("twap_id")
    owned = slices.filter("crossed").join(orders, on="twap_id", suffix="_twap")
    assert owned.height == slices.filter("crossed").height
    assert (owned["user"] == owned["user_twap"]).all()
    assert (owned["coin"] == owned["coin_twap"]).all()
    assert (owned["side"] == owned["side_twap"]).all()


def test_dust_has_one_order_no_trade_and_rows_that_differ_in_size_alone(files):
    for frame in files.values():
        dust = frame.filter(pl.col("dir") == DUST)
        assert dust.height == 2 * DUST_USERS
        for name in ("tid", "oid", "time", "hash", "coin", "block_number"):
            assert dust[name].n_unique() == 1, name
        assert (dust["tid"][0], dust["hash"][0]) == (0, ZERO_HASH)
        assert frame.filter(pl.col("tid") == 0).height == dust.height
        sold = dust.filter(pl.col("side") == "A")
        assert sold["user"].n_unique() == DUST_USERS
        assert (sold["sz"] == sold["start_position"]).all()
        bought = fill_rows([frame], BY_BLOCK)
        numbers = [row["event_ix"] for row in bought if row["user_address"] == SYSTEM_ADDRESS]
        assert numbers == list(range(DUST_USERS))
        assert Counter(row["event_ix"] > 0 for row in bought)[True] == DUST_USERS - 1


# --- TWAPs ---------------------------------------------------------------------------------------------------


def test_a_twap_is_activated_and_ends_once_if_at_all(events):
    ends = Counter()
    for twap in events.group_by("twap_id", maintain_order=True).agg(pl.all()).iter_rows(named=True):
        for name in ("user", "coin", "side", "sz", "minutes", "timestamp"):
            assert len(set(twap[name])) == 1, name
        assert (twap["status"][0], twap["executed_sz"][0], twap["executed_ntl"][0]) == (
            "activated",
            "0.0",
            "0.0",
        )
        assert twap["time_ns"][0] // 10**6 == twap["timestamp"][0]
        ends[tuple(twap["status"][1:])] += 1
        for status, executed, notional, error, time_ns in zip(
            *(twap[name][1:] for name in ("status", "executed_sz", "executed_ntl", "error", "time_ns")),
            strict=True,
        ):
            lasted = time_ns - twap["time_ns"][0]
            assert 0 < lasted <= twap["minutes"][0] * 60 * 10**9 + 2 * 10**9
            assert (lasted >= twap["minutes"][0] * 60 * 10**9) or status != "finished"
            assert Decimal(executed) <= Decimal(twap["sz"][0])
            assert (Decimal(notional) > 0) == (Decimal(executed) > 0)
            assert (error is not None) == (status == "error")
    assert set(ends) == {(), ("finished",), ("terminated",), ("error",)}
    assert min(ends.values()) > 10
    assert events["time_ns"].is_sorted()
    assert events["time_ns"].is_between(HOUR * HOUR_NS, (HOUR + 12) * HOUR_NS, closed="left").all()
    assert twaps(1, HOUR, 40, 12).equals(events)


# --- files ---------------------------------------------------------------------------------------------------

ORDER = (
    "coin px sz side time startPosition dir closedPnl hash oid crossed fee tid cloid liquidation builderFee builder"
    " deployerFee priorityGas feeToken twapId"
).split()


def test_lines_of_fills_have_the_recorded_shapes(tmp_path, files, recorded):
    folder = recorded / "s3/node_fills"
    theirs = decoded(folder / "nodeindexer_liquidation_line.jsonl")[0]
    write_fills(tmp_path / "blocks.lz4", [files[HOUR]], BY_BLOCK)
    ours = decoded(tmp_path / "blocks.lz4")
    assert {tuple(line) for line in ours} == {tuple(theirs)}
    assert len(ours[0]["block_time"]) == len(theirs["block_time"])
    told = [fill for line in ours for _, fill in line["events"]]
    liquidated = next(
        fill for fill in told if fill.get("cloid") and "liquidation" in fill and not fill["crossed"]
    )
    assert shape(liquidated) == shape(theirs["events"][0][1])
    assert all(list(fill) == [name for name in ORDER if name in fill] for fill in told)
    write_fills(tmp_path / "flat.jsonl", [files[HOUR]], FillShape("flat"))
    kinds = [shape(fill) for fill in decoded(tmp_path / "flat.jsonl")]
    assert all(shape(fill) in kinds for fill in decoded(folder / "vigil_notebook_fills.jsonl"))


def test_lines_of_twaps_have_the_recorded_shapes(tmp_path, events, recorded):
    folder = recorded / "s3/twap_statuses"
    for layout, name in (
        ("lines", "node_unbatched_20260128_15.jsonl"),
        ("blocks", "quicknode_20251204.jsonl"),
    ):
        path = tmp_path / f"{layout}.jsonl"
        assert write_twaps(path, events, TwapShape(layout)) == events.height
        ours, theirs = decoded(path)[0], decoded(folder / name)[0]
        assert shape(ours) == shape(theirs)
        assert shape(ours.get("events", [ours])[0]) == shape(theirs.get("events", [theirs])[0])
    write_twaps(tmp_path / "columns.parquet", events, TwapShape("columns"))
    served = json.loads((folder / "bitquery_twap_statuses_BNB.json").read_text())
    columns = {name: kind for name, kind in shape(served[0]).items() if "Extra" not in name}
    row = pl.read_parquet(tmp_path / "columns.parquet").row(0, named=True)
    assert sorted(shape(row).items()) == sorted(columns.items())


@pytest.mark.parametrize("numbers", ["text", "decimal", "double"])
@pytest.mark.parametrize("times", ["int", "ms", "us", "ns", "misread"])
def test_parquet_of_fills_tells_what_the_lines_tell(tmp_path, fills, times, numbers):
    rows = fills.head(300)
    path = tmp_path / "fills.parquet"
    made = FillShape("parquet", snake=times == "us", times=times, numbers=numbers)
    write_fills(path, [rows.head(100), rows.tail(200)], made, whole=numbers == "decimal")
    told = pl.read_parquet(path)
    snake = made.snake
    served = told["start_position" if snake else "startPosition"]
    dtype = {"text": pl.String, "decimal": pl.Decimal(38, 12), "double": pl.Float64}[numbers]
    assert served.dtype == dtype
    truth = fill_rows([rows], made)
    numbers_told = [Decimal(str(each)) for each in served]
    assert numbers_told == [row["start_position"] for row in truth]
    assert {row["is_exact"] for row in truth} == {numbers != "double"}
    assert told["user_address" if snake else "user"].to_list() == [row["user_address"] for row in truth]
    liquidations = told["liquidation"].to_list()
    assert [each for each in liquidations if each] == [
        row["liquidation"] for row in truth if row["liquidation"]
    ]
    raw = told["time"].cast(pl.Int64).to_list()
    factor = {"us": 1000, "ns": 10**6}.get(times, 1)
    assert raw == [each * factor for each in rows["time"]]
    assert ("block_time" in told.columns) == (times != "misread") == (truth[0]["block_time"] is not None)
    if times == "int":
        assert told["block_time"].str.contains(r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{9}$").all()


def test_a_parquet_file_has_a_row_group_a_frame_or_one(tmp_path, fills):
    from pyarrow import parquet

    frames = [fills.head(100), fills.tail(200)]
    for whole, groups in ((False, 2), (True, 1)):
        path = tmp_path / f"{whole}.parquet"
        assert write_fills(path, iter(frames), FillShape("parquet"), whole=whole) == 300
        with parquet.ParquetFile(path) as file:
            assert (file.num_row_groups, file.metadata.num_rows) == (groups, 300)


def test_a_sample_holds_what_it_says_and_nothing_older_than_a_day(tmp_path):
    now = datetime(2026, 10, 3, 14, 20, tzinfo=UTC)
    truth = objects.sample(tmp_path, now, count=2800)
    times = [row["time"] for row in truth.fills] + [row["ts"] for row in truth.twaps]
    assert now - timedelta(days=1) < min(times) < max(times) < now
    names = [path.name for path in sorted((tmp_path / "fills").iterdir())]
    assert names == [f"20261003-{hour:02}-{name}" for hour, name in enumerate(objects.SAMPLE_FILLS, 7)]
    lines = 0
    for path in (tmp_path / "fills").iterdir():
        if path.suffix == ".parquet":
            lines += pl.read_parquet(path).height
        elif "blocks" in path.name:
            lines += sum(len(line["events"]) for line in decoded(path))
        else:
            lines += len(decoded(path))
    key = ("user_address", "coin", "tid", "oid", "side", "time", "event_ix")
    assert lines == len(truth.fills) == len({tuple(row[name] for name in key) for row in truth.fills})
    assert len(list((tmp_path / "twaps").iterdir())) == len(objects.SAMPLE_TWAPS)
    assert 450 < len(truth.twaps) < 600
    # The slices in the last hours' fills are of TWAPs that the sample tells of.
    sliced = {row["twap_id"] for row in truth.fills} - {None}
    assert sliced
    assert sliced <= {row["twap_id"] for row in truth.twaps}
