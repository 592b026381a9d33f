"""Invented files of fills and of TWAP statuses, in the shapes that nodes, Artemis and others publish.

Everything follows from (seed, hour, count); hours are counted since 1970. Money, sizes and prices are counted in
integers, as in `hlcli.sim.wallets`, and written as decimal text. Rows are made in frames of some 50,000: an hour of
millions needs little memory. The wallets are those of the simulated leaderboard, but hold other positions there.

A file holds what arrived in its hour, not what happened in it: its first lines tell of the hour before.
"""

from __future__ import annotations

import json
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from functools import lru_cache
from itertools import groupby
from random import Random
from typing import IO, TYPE_CHECKING, Any, Literal, NamedTuple

from hlcli.sim.values import HOUR_MS, MINUTE_MS, USD, address_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

    import polars as pl

HOUR_NS = HOUR_MS * 10**6
# The exchange's first year, from which blocks are counted: a number each 0.25 ms, though few of them are used.
GENESIS_HOUR = 1_672_531_200 // 3600
BLOCK_NS = 250_000
PART = 25_000  # trades made at once
WALLETS = 30_000

ZERO_HASH = "0x" + 64 * "0"
SYSTEM_ADDRESS = "0x" + 20 * "ee"
# Of every 64 orders: slices of TWAPs, and liquidations where they close something.
SLICES, LIQUIDATIONS = 8, 2
# Of every 4096 trades some in their midst are a cascade: one block.
CASCADE_EVERY, CASCADE_FROM, CASCADE = 4096, 700, 150
DUST_USERS = 8
DUST_COIN, DUST_PRICE = "@142", "104730.168"
DUST_SCALE = 10**10


class Market(NamedTuple):
    """A coin: of 64 orders so many are in it, its digits, its usual price in ticks, what a buyer of spot pays fees in.

    A size times a price has six decimals.
    """

    name: str
    share: int
    size_decimals: int
    price: int
    token: str | None = None


MARKETS = (
    Market("BTC", 16, 5, 865_750),
    Market("ETH", 12, 4, 301_250),
    Market("HYPE", 12, 2, 345_000),
    Market("SOL", 8, 2, 1_380_000),
    Market("kPEPE", 4, 0, 4_348),
    Market("xyz:NFLX", 4, 3, 1_093_250),
    Market("@107", 4, 2, 345_100, "HYPE"),
    Market("PURR/USDC", 2, 0, 185_310, "PURR"),
    Market("@156", 1, 3, 160_320, "USOL"),
    Market("#1890", 1, 0, 431_250, "+1890"),
)
PERPS = 6  # the first ones
DEPLOYED = 5  # the place of the one on a dex of its own
NAMES, SHARES, SIZE_DECIMALS, PRICES, TOKENS = zip(*MARKETS, strict=True)
SIZE_SCALES = [10**decimals for decimals in SIZE_DECIMALS]
PRICE_SCALES = [10 ** (6 - decimals) for decimals in SIZE_DECIMALS]
# Fees in a token have eight decimals.
TOKEN_SCALE = 10**8
TOKEN_FACTORS = [10 ** (8 - decimals) for decimals in SIZE_DECIMALS]
SPOT_BALANCE = 10**10  # smallest units

# Hundred-thousandths of the notional, by wallet; some makers are paid.
TAKER_RATES = (45, 40, 35, 28)
MAKER_RATES = (15, 12, 0, -1, -3)
BUILDERS, BUILDER_RATE = 8, 5

ORDERS = 12  # TWAPs an hour
SLICED_HOURS = 3  # those of the last hours have slices
MINUTES = (5, 5, 10, 10, 30, 30, 60, 60, 90, 120, 240, 480)
ERRORS = ("Insufficient margin to place order.", "Order has zero size.", 'Coin "X" is delisted.')


@dataclass(frozen=True, slots=True)
class FillShape:
    """How a file of fills is written.

    layout: blocks (one line a block), pairs (the older lines [user, fill]), flat (lines with the user in the fill), or
    parquet. Of parquet: snake_case names instead of the exchange's; times as integers (milliseconds, and block_time as
    text), as timestamps of a unit, or misread (milliseconds that are declared nanoseconds, and no block_time, as
    Artemis had it); and numbers as text, decimals or floating point.
    """

    layout: Literal["blocks", "pairs", "flat", "parquet"]
    snake: bool = False
    times: Literal["int", "ms", "us", "ns", "misread"] = "int"
    numbers: Literal["text", "decimal", "double"] = "text"


@dataclass(frozen=True, slots=True)
class TwapShape:
    """How a file of TWAP statuses is written.

    layout: lines (one an event), blocks (one a block), or parquet with the state in columns (times as integers,
    StatusError beside Status), in a struct (timestamps, the status as text or JSON text), or as JSON text (ISO times).
    numbers: of columns and struct.
    """

    layout: Literal["lines", "blocks", "columns", "struct", "text"]
    numbers: Literal["text", "decimal", "double"] = "text"


class Part(NamedTuple):
    """Rows of the file of an hour, in the order of their arrival."""

    hour: int
    rows: pl.DataFrame


class Sample(NamedTuple):
    """What a sample must leave in the tables, see fill_rows() and twap_rows()."""

    fills: list[dict[str, Any]]
    twaps: list[dict[str, Any]]


BY_BLOCK = FillShape("blocks")
SAMPLE_FILLS = {
    "blocks.lz4": BY_BLOCK,
    "more-blocks.lz4": BY_BLOCK,
    "legacy.lz4": FillShape("pairs"),
    "flat.jsonl": FillShape("flat"),
    "camel.parquet": FillShape("parquet"),
    "snake.parquet": FillShape("parquet", snake=True, times="us", numbers="decimal"),
    "double.parquet": FillShape("parquet", times="ns", numbers="double"),
}
SAMPLE_TWAPS = {
    "lines.jsonl": TwapShape("lines"),
    "lines.lz4": TwapShape("lines"),
    "blocks.lz4": TwapShape("blocks"),
    "columns.parquet": TwapShape("columns"),
    "struct.parquet": TwapShape("struct", numbers="double"),
    "text.parquet": TwapShape("text"),
}


def sample(folder: Path, now: datetime, *, seed: int = 1, count: int = 21_000) -> Sample:
    """Write files of every shape below `fills` and `twaps` in a folder, with what happened in the last day.

    So many fills in the last whole hours, one file an hour, and some 500 events of the TWAPs that they are slices of.
    """
    hour = int(now.timestamp()) // 3600
    truth = Sample([], [])
    for name in ("fills", "twaps"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    first = hour - len(SAMPLE_FILLS)
    parts = fills(seed, first, count // len(SAMPLE_FILLS), len(SAMPLE_FILLS))
    for (name, shape), (number, those) in zip(
        SAMPLE_FILLS.items(), groupby(parts, lambda part: part.hour), strict=True
    ):
        frames = [part.rows for part in those]
        write_fills(folder / "fills" / f"{_stamp(number)}-{name}", frames, shape)
        truth.fills.extend(fill_rows(frames, shape))
    events = twaps(seed, hour - 23, hours=23)
    size = -(-events.height // len(SAMPLE_TWAPS))
    for (name, twap_shape), frame in zip(SAMPLE_TWAPS.items(), events.iter_slices(size), strict=True):
        number = frame["time_ns"][0] // HOUR_NS
        write_twaps(folder / "twaps" / f"{_stamp(number)}-{name}", frame, twap_shape)
        truth.twaps.extend(twap_rows(frame, twap_shape))
    return truth


def _stamp(hour: int) -> str:
    return f"{datetime.fromtimestamp(hour * 3600, UTC):%Y%m%d-%H}"


# --- draws and text -----------------------------------------------------------------------------------------------


def _draws(key: str, count: int) -> pl.Series:
    """Numbers below 2**63 that follow from the key alone."""
    import polars as pl
    import pyarrow as pa

    raw = pa.py_buffer(Random(key).randbytes(8 * count))
    numbers = pl.from_arrow(pa.Array.from_buffers(pa.int64(), count, [None, raw]))
    assert isinstance(numbers, pl.Series)
    return numbers & (2**63 - 1)


def _hex(key: str, count: int, size: int) -> pl.Series:
    """Texts of an even number of hexadecimal digits that follow from the key alone."""
    import polars as pl
    import pyarrow as pa

    digits = pa.py_buffer(Random(key).randbytes(count * size // 2).hex().encode())
    texts = pl.from_arrow(pa.Array.from_buffers(pa.binary(size), count, [None, digits]))
    assert isinstance(texts, pl.Series)
    return texts.cast(pl.String)


def _skewed(draw: pl.Expr, factors: int) -> pl.Expr:
    """The number of a wallet: the more factors (up to four), the more often it is one of the first."""
    share: Any = 1
    for factor in range(factors):
        share *= draw // 2 ** (12 * factor) % 4096
    return share * WALLETS // 4096**factors  # type: ignore[no-any-return]


def _at(values: Sequence[Any] | pl.Series, place: pl.Expr) -> pl.Expr:
    """The value at a place."""
    import polars as pl

    return pl.lit(pl.Series(values)).gather(place)


def text_of(value: pl.Expr, scale: pl.Expr | int) -> pl.Expr:
    """An integer count of 1 / scale as values.decimal_text() writes it."""
    import polars as pl

    size = value.abs()
    decimals = (size % scale + scale).cast(pl.String).str.slice(1).str.strip_chars_end("0")
    return pl.concat_str(
        pl.when(value < 0).then(pl.lit("-")).otherwise(pl.lit("")),
        (size // scale).cast(pl.String),
        pl.lit("."),
        pl.when(decimals == "").then(pl.lit("0")).otherwise(decimals),
    )


def _wave(at: pl.Expr, period: int, height: int) -> pl.Expr:
    """A triangle between -height and height."""
    return (2 * (2 * (at % period) - period).abs() - period) * height // period


def _block_number(ns: pl.Expr) -> pl.Expr:
    return (ns - GENESIS_HOUR * HOUR_NS) // BLOCK_NS


@lru_cache(maxsize=4)
def _addresses(seed: int, role: str, count: int) -> pl.Series:
    import polars as pl

    return pl.Series([address_of(seed, role, number) for number in range(count)])


# --- TWAPs --------------------------------------------------------------------------------------------------------


def twaps(seed: int, hour: int, orders: int = ORDERS, hours: int = 1) -> pl.DataFrame:
    """The events of so many TWAPs, created evenly in each of the hours from `hour` on, in order.

    None of the events is later than these hours, so some TWAPs have no end yet.
    """
    import polars as pl

    made = pl.concat(_orders(seed, number, orders) for number in range(hour, hour + hours))
    begun = made.with_columns(
        ended_ns="created_ns",
        status=pl.lit("activated"),
        error=pl.lit(None, pl.String),
        executed=pl.lit(0, pl.Int64),
        notional=pl.lit(0, pl.Int64),
    )
    events = pl.concat([begun, made]).rename({"ended_ns": "time_ns"})
    events = events.filter(pl.col("time_ns") < (hour + hours) * HOUR_NS).sort("time_ns", maintain_order=True)
    scale = _at(SIZE_SCALES, pl.col("market"))
    return events.select(
        "twap_id",
        "time_ns",
        block_number=_block_number(pl.col("time_ns")),
        user=_at(_addresses(seed, "wallet", WALLETS), pl.col("wallet")),
        coin=_at(NAMES, pl.col("market")),
        side=pl.when("buys").then(pl.lit("B")).otherwise(pl.lit("A")),
        sz=text_of(pl.col("units"), scale),
        executed_sz=text_of(pl.col("executed"), scale),
        executed_ntl=text_of(pl.col("notional"), USD),
        minutes="minutes",
        reduce_only="reduce_only",
        randomize="randomize",
        timestamp=pl.col("created_ns") // 10**6,
        status="status",
        error="error",
    )


def _orders(seed: int, hour: int, count: int) -> pl.DataFrame:
    """TWAPs created evenly in an hour, and what became of each."""
    import polars as pl

    key = f"{seed}:{hour}:{count}:twap"
    gap = HOUR_NS // count
    number = pl.int_range(count, dtype=pl.Int64)
    who, what, when, draw = map(pl.col, ("who", "what", "when", "draw"))
    chance, market, units, minutes = map(pl.col, ("chance", "market", "units", "minutes"))
    dollars = (10 + draw % 90) * 100 * _at((1, 10, 100, 1000), draw // 128 % 4)
    frame = pl.DataFrame({name: _draws(f"{key}:{name}", count) for name in ("who", "what", "when", "draw")})
    frame = frame.select(
        twap_id=(hour - GENESIS_HOUR) * 100_000 + number,
        wallet=_skewed(who, 2),
        market=what % PERPS,
        buys=what // 64 % 2 == 0,
        minutes=_at(MINUTES, what // 128 % len(MINUTES)),
        reduce_only=what // 2**16 % 8 == 0,
        randomize=what // 2**20 % 2 == 0,
        created_ns=hour * HOUR_NS + number * gap + when % gap,
        chance=draw // 2**10 % 100,
        units=dollars * USD // _at(PRICES, what % PERPS),
        draw=draw // 2**20,
    )
    # In thousandths: some finish with a rest, some end before their first slice.
    share = pl.when(chance < 63).then(1000).when(chance < 90).then(draw % 1000).otherwise(draw % 3 * 149)
    lasted = pl.when(chance < 70).then(1000).otherwise(share)
    usual, executed = _at(PRICES, market), units * share // 1000
    return frame.with_columns(
        ended_ns=pl.col("created_ns") + minutes * lasted * (MINUTE_MS * 1000) + 1 + draw % (2 * 10**9),
        status=pl.when(chance < 70)
        .then(pl.lit("finished"))
        .when(chance < 88)
        .then(pl.lit("terminated"))
        .otherwise(pl.lit("error")),
        error=pl.when(chance >= 88).then(_at(ERRORS, draw % len(ERRORS))),
        executed=executed,
        notional=executed * (usual + usual * (draw // 4096 % 200 - 100) // 10_000),
    )


# --- fills --------------------------------------------------------------------------------------------------------


def fills(seed: int, hour: int, count: int, hours: int = 1) -> Iterator[Part]:
    """The files of the hours from `hour` on; so many fills (an even number) happen in each.

    The positions of a wallet are carried along through all hours; slices are of twaps(). Of some 2 % of an hour's trades one side arrives with
    the first lines of the next hour; what would stand in the file after the last is left out.
    """
    import polars as pl

    positions = _opening(seed)
    late: list[pl.DataFrame] = []
    for number in range(hour, hour + hours):
        if late:
            yield Part(number, _delayed(pl.concat(late), number))
        late = []
        dust = min(DUST_USERS, count // 100)
        trades = count // 2 - dust
        orders = pl.concat(_orders(seed, number - ago, ORDERS) for ago in range(SLICED_HOURS))
        slices = orders.filter(pl.col("ended_ns") > number * HOUR_NS)
        for start in range(0, trades, PART):
            made = _trades(
                f"{seed}:{number}", number, range(start, min(start + PART, trades)), trades, slices
            )
            rows, positions = _sides(seed, made, positions)
            late.append(rows.filter("late").drop("late"))
            yield Part(number, rows.filter(~pl.col("late")).drop("late"))
            if start == 0 and dust:
                yield Part(number, _dust(seed, rows.drop("late"), dust))


def _opening(seed: int) -> pl.Series:
    """What every wallet holds of every market before the first fill, in smallest units: its markets side by side."""
    import polars as pl

    count = WALLETS * len(MARKETS)
    draw, market = pl.col("draw"), pl.int_range(count, dtype=pl.Int64) % len(MARKETS)
    most = 20_000 * USD // _at(PRICES, market)
    held = pl.when(draw % 5 < 2).then(0).otherwise(draw // 8 % (2 * most + 1) - most)
    balance = SPOT_BALANCE + draw % SPOT_BALANCE
    frame = pl.DataFrame({"draw": _draws(f"{seed}:positions", count)})
    return frame.select(pl.when(market < PERPS).then(held).otherwise(balance)).to_series()


def _trades(key: str, hour: int, numbers: range, of: int, slices: pl.DataFrame) -> pl.DataFrame:
    """Trades of an hour by their numbers: an order takes from one maker or more, and a block holds one order or more.

    What an order and a block draw, their first trade does.
    """
    import polars as pl

    names, count = ("start", "order", "taker", "maker", "ids"), len(numbers)
    key = f"{key}:{numbers.start}"
    frame = pl.DataFrame({name: _draws(f"{key}:{name}", count) for name in names})
    frame = frame.with_columns(hash=_hex(f"{key}:hash", count, 64), cloid=_hex(f"{key}:cloid", count, 28))
    row = pl.int_range(count, dtype=pl.Int64)
    draw, number = pl.col("start"), row + numbers.start
    cascade = ((number - CASCADE_FROM) % CASCADE_EVERY).is_between(1, CASCADE - 1)
    begins = (draw % 100 < 45) | (row == 0)
    opens = (begins & (draw // 128 % 100 < 40) & ~cascade) | (row == 0)
    frame = frame.with_columns(
        number=number,
        first=pl.when(begins).then(row).otherwise(0).cum_max(),
        block=pl.when(opens).then(row).otherwise(0).cum_max(),
    )
    first, block = pl.col("first"), pl.col("block")
    order, taker = pl.col("order").gather(first), pl.col("taker").gather(first)
    by_share = [place for place, share in enumerate(SHARES) for _ in range(share)]
    kind, twap = order % 64, order // 64 % max(1, slices.height)
    gap = (HOUR_NS - 2 * 10**8) // max(1, of)
    # The first of an hour arrives so early that it happened in the hour before.
    after = pl.when(number == 0).then(0).otherwise(draw % (gap // 2)).gather(block)
    frame = frame.with_columns(
        local_ns=hour * HOUR_NS + 10**8 + (numbers.start + block) * gap + after,
        twap=pl.when((kind < SLICES) & (slices.height > 0)).then(twap),
        liquidates=kind.is_between(SLICES, SLICES + LIQUIDATIONS - 1),
        order=order,
        taker=_skewed(taker, 3),
        market=_at(by_share, taker // 2**40 % 64),
        buys=taker // 2**48 % 2 == 0,
        maker_draw="maker",
        maker=_skewed(pl.col("maker"), 4),
        taker_oid=(hour - GENESIS_HOUR) * 10**7 + numbers.start + first,
        maker_oid=(hour - GENESIS_HOUR) * 10**7 - 1 - pl.col("ids") % 10**6,
        tid=pl.col("ids") // 2**13,
        hash=pl.concat_str(pl.lit("0x"), pl.col("hash").gather(first)),
        order_cloid=pl.col("cloid").gather(first),
        late=(number * 100 >= of * 96) & (draw // 2**20 % 2 == 0),
    )
    if slices.height:
        frame = frame.with_columns(
            pl.coalesce(_at(slices[theirs], pl.col("twap")), ours).alias(ours)
            for ours, theirs in (("taker", "wallet"), ("market", "market"), ("buys", "buys"))
        )
    delay = 300_000_000 + (pl.col("local_ns") % (97 * 10**9) - 48_500_000_000).abs() // 200
    second, usual = pl.col("local_ns") // 10**9, _at(PRICES, pl.col("market"))
    waves = _wave(second, 2963, 20_000) + _wave(second, 37, 2_000)
    steps = pl.when("buys").then(1).otherwise(-1) * (row - first) * (usual // 50_000 + 1)
    dollars = (10 + pl.col("start") // 2**24 % 90) * _at((1, 10, 100, 1000), pl.col("order") // 2**16 % 4)
    same = pl.col("maker") == pl.col("taker")
    return frame.with_columns(
        block_ns=pl.col("local_ns") - delay,
        maker=pl.when(same).then((pl.col("maker") + 1) % WALLETS).otherwise("maker"),
        twap_id=_at(slices["twap_id"], pl.col("twap")) if slices.height else pl.lit(None, pl.Int64),
        hash=pl.when(pl.col("twap").is_null()).then("hash").otherwise(pl.lit(ZERO_HASH)),
        price=usual + usual * waves // 10**6 + steps,
        units=(dollars * USD + pl.col("maker_draw") // 2**48 * 100) // usual,
    )


def _sides(seed: int, trades: pl.DataFrame, positions: pl.Series) -> tuple[pl.DataFrame, pl.Series]:
    """Both sides of each trade as rows, the taker's first; and the positions afterwards."""
    import polars as pl

    crossed, market, units, price = map(pl.col, ("crossed", "market", "units", "price"))
    wallet, signed, before, key = map(pl.col, ("user", "signed", "before", "key"))
    row = pl.int_range(2 * trades.height, dtype=pl.Int64, eager=True)
    rows = trades.select(pl.all().gather(row // 2)).with_columns(crossed=row % 2 == 0)
    rows = rows.with_columns(
        user=pl.when(crossed).then("taker").otherwise("maker"), buys=pl.col("buys") == crossed
    )
    rows = rows.with_columns(
        signed=pl.when("buys").then(units).otherwise(-units), key=wallet * len(MARKETS) + market
    )
    rows = rows.with_columns(before=_at(positions, key) + (signed.cum_sum() - signed).over("key"))
    last = rows.unique("key", keep="last").select("key", after=before + signed)
    positions = positions.scatter(last["key"], last["after"])

    closes = (before.sign() * signed.sign()) < 0
    closed = pl.when(closes).then(pl.min_horizontal(before.abs(), units)).otherwise(0)
    usual, notional = _at(PRICES, market), units * price
    rate = (
        pl.when(crossed)
        .then(_at(TAKER_RATES, wallet % len(TAKER_RATES)))
        .otherwise(_at(MAKER_RATES, wallet % len(MAKER_RATES)))
    )
    token = pl.when("buys").then(_at(TOKENS, market))
    rows = rows.with_columns(
        token=token,
        fee=pl.when(token.is_null()).then(notional).otherwise(units * _at(TOKEN_FACTORS, market))
        * rate
        // 100_000,
        pnl=closed * (price - usual) * before.sign(),
        closes=closes,
        # Where the taker closes something and does not turn round.
        liquidates=pl.col("liquidates")
        & (market < PERPS)
        & (closes & (units <= before.abs())).gather(row // 2 * 2),
    )
    order, liquidates, fee = pl.col("order"), pl.col("liquidates"), pl.col("fee")
    built = crossed & (order // 2**20 % 12 == 0) & pl.col("twap").is_null() & (market < PERPS)
    has_cloid = (
        pl.when(crossed).then(order // 2**32 % 100 < 30).otherwise(pl.col("maker_draw") // 2**20 % 100 < 40)
    )
    addresses, builders = _addresses(seed, "wallet", WALLETS), _addresses(seed, "builder", BUILDERS)
    size_scale, price_scale = _at(SIZE_SCALES, market), _at(PRICE_SCALES, market)
    rows = rows.select(
        "block_ns",
        "local_ns",
        block_number=_block_number(pl.col("block_ns")),
        user=_at(addresses, wallet),
        coin=_at(NAMES, market),
        px=text_of(price, price_scale),
        sz=text_of(units, size_scale),
        side=pl.when("buys").then(pl.lit("B")).otherwise(pl.lit("A")),
        time=pl.col("block_ns") // 10**6,
        start_position=text_of(before, size_scale),
        dir=_direction(),
        closed_pnl=text_of(pl.col("pnl"), USD),
        hash="hash",
        oid=pl.when(crossed).then("taker_oid").otherwise("maker_oid"),
        crossed="crossed",
        fee=text_of(fee, pl.when(pl.col("token").is_null()).then(USD).otherwise(TOKEN_SCALE)),
        tid="tid",
        cloid=pl.when(has_cloid).then(
            pl.when(crossed)
            .then(pl.concat_str(pl.lit("0x2026"), "order_cloid"))
            .otherwise(pl.concat_str(pl.lit("0x0000"), "cloid"))
        ),
        liquidated_user=pl.when(liquidates).then(_at(addresses, pl.col("taker"))),
        liquidation_mark=pl.when(liquidates).then(text_of(price + usual // 20_000, price_scale)),
        liquidation_method=pl.when(liquidates).then(
            pl.when(order // 2**40 % 8 == 0).then(pl.lit("backstop")).otherwise(pl.lit("market"))
        ),
        builder_fee=pl.when(built).then(text_of(notional * BUILDER_RATE // 100_000, USD)),
        builder=pl.when(built).then(_at(builders, order // 2**24 % BUILDERS)),
        deployer_fee=pl.when(crossed & (market == DEPLOYED)).then(text_of(fee // 2, USD)),
        priority_gas=pl.when(crossed & (order // 2**44 % 100 == 0)).then(
            text_of(order // 2**24 % 10**6 + 1, TOKEN_SCALE)
        ),
        fee_token=pl.col("token").fill_null("USDC"),
        twap_id=pl.when(crossed).then("twap_id"),
        late=pl.col("late") & ~crossed,
    )
    return rows, positions


def _direction() -> pl.Expr:
    """Of rows with the signed size and the position before."""
    import polars as pl

    before, after = pl.col("before"), pl.col("before") + pl.col("signed")
    was, becomes = (
        pl.when(buys).then(pl.lit("Short")).otherwise(pl.lit("Long")) for buys in ("buys", ~pl.col("buys"))
    )
    traded = pl.when("buys").then(pl.lit("Buy")).otherwise(pl.lit("Sell"))
    return (
        pl.when(pl.col("market") >= PERPS)
        .then(traded)
        .when(~pl.col("closes"))
        .then(_filled("Open %", becomes))
        .when(before.sign() * after.sign() < 0)
        .then(_filled("% > %", was, becomes))
        .when(pl.col("liquidates") & pl.col("crossed"))
        .then(_filled("Liquidated Cross %", was))
        .otherwise(_filled("Close %", was))
    )


def _dust(seed: int, before: pl.DataFrame, users: int) -> pl.DataFrame:
    """A block soon after these rows in which small rests are converted: all with one order's number and no trade's.

    They have one buyer, whose rows differ in size and position alone.
    """
    import polars as pl

    last = before.row(-1, named=True)
    draws = Random(f"{seed}:{last['block_number']}:dust")
    first, held = draws.randrange(WALLETS), 0
    rows = []
    for number in range(users):
        units = draws.randrange(1, 10**6)
        seller = address_of(seed, "wallet", (first + 3331 * number) % WALLETS)
        for user, side, start in ((seller, "A", units), (SYSTEM_ADDRESS, "B", held)):
            rows.append((user, side, units, start, side == "A"))
        held += units
    moved = pl.DataFrame(
        rows,
        {"user": pl.String, "side": pl.String, "units": pl.Int64, "start": pl.Int64, "crossed": pl.Boolean},
        orient="row",
    )
    ns = last["block_ns"] + 2 * BLOCK_NS
    made = moved.select(
        "user",
        "side",
        "crossed",
        block_ns=pl.lit(ns),
        block_number=_block_number(pl.lit(ns)),
        local_ns=last["local_ns"] + 2 * BLOCK_NS,
        coin=pl.lit(DUST_COIN),
        px=pl.lit(DUST_PRICE),
        sz=text_of(pl.col("units"), DUST_SCALE),
        time=ns // 10**6,
        start_position=text_of(pl.col("start"), DUST_SCALE),
        dir=pl.lit("Spot Dust Conversion"),
        closed_pnl=pl.lit("0.0"),
        hash=pl.lit(ZERO_HASH),
        oid=pl.lit(last["oid"] + 1),
        fee=pl.lit("0.0"),
        tid=pl.lit(0, pl.Int64),
        fee_token=pl.lit("USDC"),
    )
    return pl.concat([before.clear(), made], how="diagonal").select(before.columns)


def _delayed(rows: pl.DataFrame, hour: int) -> pl.DataFrame:
    """The same rows as the first arrivals of an hour, a microsecond after each other."""
    import polars as pl

    return rows.with_columns(local_ns=hour * HOUR_NS + pl.col("block_number").rle_id().cast(pl.Int64) * 1000)


# --- files of fills -----------------------------------------------------------------------------------------------

# Our names and the exchange's, in its order.
_FIELDS = {
    "coin": "coin",
    "px": "px",
    "sz": "sz",
    "side": "side",
    "time": "time",
    "start_position": "startPosition",
    "dir": "dir",
    "closed_pnl": "closedPnl",
    "hash": "hash",
    "oid": "oid",
    "crossed": "crossed",
    "fee": "fee",
    "tid": "tid",
    "cloid": "cloid",
    "liquidation": "liquidation",
    "builder_fee": "builderFee",
    "builder": "builder",
    "deployer_fee": "deployerFee",
    "priority_gas": "priorityGas",
    "fee_token": "feeToken",
    "twap_id": "twapId",
}
_LIQUIDATION = {
    "liquidatedUser": "liquidated_user",
    "markPx": "liquidation_mark",
    "method": "liquidation_method",
}
_OPTIONAL = ("builder_fee", "builder", "deployer_fee", "priority_gas")
_BLOCK = ("local_ns", "block_ns", "block_number")
_BARE = ("time", "oid", "crossed", "tid", "twap_id")
_NUMBERS = ("px", "sz", "start_position", "closed_pnl", "fee", "builder_fee", "deployer_fee", "priority_gas")


def write_fills(path: Path, frames: Iterable[pl.DataFrame], shape: FillShape, *, whole: bool = False) -> int:
    """Write rows of fills() to a file, compressed if it is called .lz4; returns how many.

    A Parquet file gets one row group a frame, or, with `whole`, a single one, for which all rows are held.
    """
    if shape.layout == "parquet":
        return _write_parquet(path, (_parquet_fills(frame, shape) for frame in frames), whole=whole)
    return _write_lines(path, ((frame.height, _fill_lines(frame, shape)) for frame in frames))


def fill_rows(frames: Iterable[pl.DataFrame], shape: FillShape) -> list[dict[str, Any]]:
    """What table fills must hold after a file with these rows, but object_id: Decimal, datetime, None, dict."""
    import polars as pl

    key = ["user", "coin", "tid", "oid", "side", "time"]
    rows = pl.concat(frames)
    told = (shape.layout in {"blocks", "flat"}) or (shape.layout == "parquet" and shape.times != "misread")
    cut = 10**6 if shape.times == "ms" else 10**3
    block_time = pl.when(told).then(pl.col("block_ns") // cut * cut // 1000)
    rows = rows.select(
        *(name for name in _FIELDS if name not in {"time", "liquidation"}),
        user_address="user",
        event_ix=pl.int_range(pl.len()).over(key),
        time=_moment(pl.col("time") * 1000),
        block_time=_moment(block_time),
        block_number=pl.when(shape.layout == "blocks").then("block_number"),
        liquidation=_liquidation(),
        lossy_numeric=pl.lit(True if shape.numbers == "double" else None, pl.Boolean),
        extra=pl.lit(None),
        source=pl.lit("s3"),
    )
    return [_decoded(row, _NUMBERS) for row in rows.iter_rows(named=True)]


def _moment(us: pl.Expr) -> pl.Expr:
    import polars as pl

    return us.cast(pl.Datetime("us")).dt.replace_time_zone("UTC")


def _decoded(row: dict[str, Any], numbers: Iterable[str]) -> dict[str, Any]:
    for name in numbers:
        if row[name] is not None:
            row[name] = Decimal(row[name])
    return row


def _liquidation() -> pl.Expr:
    import polars as pl

    fields = [pl.col(ours).alias(theirs) for theirs, ours in _LIQUIDATION.items()]
    return pl.when(pl.col("liquidated_user").is_not_null()).then(pl.struct(fields))


def _iso(ns: pl.Expr) -> pl.Expr:
    import polars as pl

    return ns.cast(pl.Datetime("ns")).dt.strftime("%Y-%m-%dT%H:%M:%S%.9f")


def _filled(template: str, *values: str | pl.Expr) -> pl.Expr:
    """The template with the values (columns by name) for each %; NULL where one of them is."""
    import polars as pl

    first, *others = template.split("%")
    pieces: list[pl.Expr] = [pl.lit(first)]
    for value, text in zip(values, others, strict=True):
        pieces += [pl.col(value) if isinstance(value, str) else value, pl.lit(text)]
    return pl.concat_str(pieces)


def _fill_lines(rows: pl.DataFrame, shape: FillShape) -> pl.Series:
    import polars as pl

    fill = _fill_json()
    if shape.layout == "flat":
        plus = ',"user":"%","block_time":"%"}'
        flat = _filled("%" + plus, fill.str.strip_suffix("}"), "user", _iso(pl.col("block_ns")))
        return rows.select(flat).to_series()
    pairs = rows.select(*_BLOCK, events=_filled('["%",%]', "user", fill))
    return pairs["events"] if shape.layout == "pairs" else _block_lines(pairs)


def _block_lines(events: pl.DataFrame) -> pl.Series:
    import polars as pl

    blocks = events.group_by(_BLOCK, maintain_order=True).agg(pl.col("events").str.join(","))
    template = '{"local_time":"%","block_time":"%","block_number":%,"events":[%]}'
    times = (_iso(pl.col("local_ns")), _iso(pl.col("block_ns")))
    return blocks.select(_filled(template, *times, "block_number", "events")).to_series()


def _fill_json() -> pl.Expr:
    import polars as pl

    parts = []
    for ours, theirs in _FIELDS.items():
        if ours == "liquidation":
            of = '{"liquidatedUser":"%","markPx":"%","method":"%"}'
            part = _filled(f',"{theirs}":{of}', *_LIQUIDATION.values()).fill_null("")
        elif ours == "cloid":
            # Sometimes it is there and null.
            none = pl.when(pl.col("oid") % 20 == 0).then(pl.lit(f',"{theirs}":null')).otherwise(pl.lit(""))
            part = pl.coalesce(_filled(f',"{theirs}":"%"', ours), none)
        elif ours in _OPTIONAL:
            part = _filled(f',"{theirs}":"%"', ours).fill_null("")
        elif ours in _BARE:
            part = _filled(f',"{theirs}":%', pl.col(ours).cast(pl.String).fill_null("null"))
        else:
            part = _filled(f',"{theirs}":"%"', ours)
        parts.append(part)
    return _filled("{%}", pl.concat_str(parts).str.strip_prefix(","))


def _parquet_fills(rows: pl.DataFrame, shape: FillShape) -> pl.DataFrame:
    import polars as pl

    block_ns, ms = pl.col("block_ns"), pl.col("time")
    times: dict[str, tuple[pl.Expr, pl.Expr | None]] = {
        "int": (ms, _iso(block_ns)),
        "ms": (ms.cast(pl.Datetime("ms")), (block_ns // 10**6).cast(pl.Datetime("ms"))),
        "us": ((ms * 1000).cast(pl.Datetime("us")), (block_ns // 1000).cast(pl.Datetime("us"))),
        "ns": ((ms * 10**6).cast(pl.Datetime("ns")), block_ns.cast(pl.Datetime("ns"))),
        "misread": (ms.cast(pl.Datetime("ns")), None),
    }
    time, block_time = times[shape.times]
    columns = {ours: pl.col(ours) for ours in _FIELDS if ours not in {"time", "liquidation", *_NUMBERS}}
    columns |= {name: _number(name, shape.numbers) for name in _NUMBERS}
    columns |= {"time": time, "liquidation": _liquidation(), "user": pl.col("user")}
    names = {ours: ours if shape.snake else theirs for ours, theirs in _FIELDS.items()}
    names["user"] = "user_address" if shape.snake else "user"
    chosen = [columns[ours].alias(name) for ours, name in names.items()]
    if block_time is not None:
        chosen.append(block_time.alias("block_time"))
    return rows.select(chosen)


def _number(name: str, numbers: str) -> pl.Expr:
    import polars as pl

    column = pl.col(name)
    if numbers == "text":
        return column
    return column.cast(pl.Float64 if numbers == "double" else pl.Decimal(38, 12))


# --- files of TWAPs -----------------------------------------------------------------------------------------------


# Our names and the exchange's, in its order.
_STATE = {
    "coin": "coin",
    "user": "user",
    "side": "side",
    "sz": "sz",
    "executed_sz": "executedSz",
    "executed_ntl": "executedNtl",
    "minutes": "minutes",
    "reduce_only": "reduceOnly",
    "randomize": "randomize",
    "timestamp": "timestamp",
}


def write_twaps(path: Path, rows: pl.DataFrame, shape: TwapShape) -> int:
    """Write rows of twaps() to a file, compressed if it is called .lz4; returns how many."""
    slices = rows.iter_slices(2 * PART)
    if shape.layout in {"lines", "blocks"}:
        return _write_lines(path, ((frame.height, _twap_lines(frame, shape)) for frame in slices))
    return _write_parquet(path, (_parquet_twaps(frame, shape) for frame in slices))


def twap_rows(rows: pl.DataFrame, shape: TwapShape) -> list[dict[str, Any]]:
    """What table twap_status must hold after a file with these rows, but raw_payload and what tells of the object."""
    import polars as pl

    lossy = shape.numbers == "double"
    numbered = shape.layout in {"blocks", "columns"}
    rows = rows.select(
        "twap_id",
        "status",
        "side",
        "reduce_only",
        "randomize",
        wallet="user",
        ts=_moment(pl.col("time_ns") // 1000),
        asset="coin",
        size_requested="sz",
        size_executed="executed_sz",
        notional_executed="executed_ntl",
        duration_minutes="minutes",
        status_error="error",
        created_at=_moment(pl.col("timestamp") * 1000),
        ts_kind=pl.lit("event"),
        event_time_ns="time_ns",
        block_number=pl.when(numbered).then("block_number"),
        lossy_numeric=pl.lit(True if lossy else None, pl.Boolean),
    )
    numbers = ("size_requested", "size_executed", "notional_executed")
    return [_decoded(row, numbers) for row in rows.iter_rows(named=True)]


def _twap_lines(rows: pl.DataFrame, shape: TwapShape) -> pl.Series:
    import polars as pl

    template = '{"time":"%","twap_id":%,"state":%,"status":%}'
    status = pl.coalesce(_error_json(), _filled('"%"', "status"))
    event = _filled(template, _iso(pl.col("time_ns")), "twap_id", _state_json(), status)
    if shape.layout == "lines":
        return rows.select(event).to_series()
    local_ns = pl.col("time_ns") + 170_000_000
    return _block_lines(rows.select("block_number", block_ns="time_ns", local_ns=local_ns, events=event))


def _error_json() -> pl.Expr:
    """The status of an error, NULL of others."""
    import polars as pl

    quoted = {text: json.dumps({"error": text}) for text in ERRORS}
    return pl.col("error").replace_strict(quoted, return_dtype=pl.String)


def _state_json() -> pl.Expr:
    amounts = '"sz":"%","executedSz":"%","executedNtl":"%"'
    template = f'{{"coin":"%","user":"%","side":"%",{amounts},"minutes":%,"reduceOnly":%,"randomize":%,"timestamp":%}}'
    return _filled(template, *_STATE)


def _parquet_twaps(rows: pl.DataFrame, shape: TwapShape) -> pl.DataFrame:
    import polars as pl

    numbers = ("sz", "executed_sz", "executed_ntl")
    state = [
        (_number(name, shape.numbers) if name in numbers else pl.col(name)).alias(theirs)
        for name, theirs in _STATE.items()
    ]
    if shape.layout == "columns":
        columns = {
            "block_number": "Block_Number",
            "twap_id": "TwapId",
            "status": "Status",
            "error": "StatusError",
        }
        return rows.select(
            *(pl.col(ours).alias(theirs) for ours, theirs in columns.items()),
            *(column.name.map(lambda name: "State_" + name[0].upper() + name[1:]) for column in state),
            Block_Time="time_ns",
            Time="time_ns",
        )
    status, time_ns = pl.coalesce(_error_json(), "status"), pl.col("time_ns")
    if shape.layout == "struct":
        moment = time_ns.cast(pl.Datetime("ns"))
        return rows.select("twap_id", time=moment, state=pl.struct(state), status=status)
    return rows.select("twap_id", time=_iso(time_ns), state=_state_json(), status=status)


# --- files --------------------------------------------------------------------------------------------------------


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    import pyarrow as pa

    with path.open("wb") as plain:
        if path.suffix != ".lz4":
            yield plain
            return
        with pa.CompressedOutputStream(plain, "lz4") as packed:
            yield packed


def _write_lines(path: Path, batches: Iterable[tuple[int, pl.Series]]) -> int:
    count = 0
    with _opened(path) as file:
        for size, lines in batches:
            count += size
            if size:
                file.write(lines.str.join("\n").item().encode() + b"\n")
    return count


def _write_parquet(path: Path, frames: Iterable[pl.DataFrame], *, whole: bool = False) -> int:
    import polars as pl
    from pyarrow import parquet

    if whole:
        frames = [pl.concat(frames)]
    count, writer = 0, None
    try:
        for frame in frames:
            table = frame.to_arrow(compat_level=pl.CompatLevel.oldest())
            writer = writer or parquet.ParquetWriter(path, table.schema, compression="zstd")
            writer.write_table(table, row_group_size=max(1, table.num_rows))
            count += table.num_rows
    finally:
        if writer:
            writer.close()
    return count
