"""Invented fills, in the order in which a node writes them. All follows from (seed, hour, count).

Hours are counted since 1970. Rows are made in frames of some 50,000: an hour of millions needs little memory. The
wallets are those of the simulated leaderboard, but hold other positions there.

A file holds what arrived in its hour, not what happened in it: its first lines tell of the hour before.
"""

from __future__ import annotations

from random import Random
from typing import TYPE_CHECKING, NamedTuple

from hlcli.sim.columns import (
    BLOCK_NS,
    GENESIS_HOUR,
    HOUR_NS,
    WALLETS,
    addresses,
    at,
    block_number,
    draws,
    filled,
    hex_texts,
    skewed,
    text_of,
    wave,
)
from hlcli.sim.markets import (
    DEPLOYED,
    MARKETS,
    NAMES,
    PERPS,
    PRICE_SCALES,
    PRICES,
    SHARES,
    SIZE_SCALES,
    TOKEN_FACTORS,
    TOKEN_SCALE,
    TOKENS,
)
from hlcli.sim.twaps import ORDERS, orders_of
from hlcli.sim.values import USD, address_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    import polars as pl

PART = 25_000  # trades made at once
ZERO_HASH = "0x" + 64 * "0"
SYSTEM_ADDRESS = "0x" + 20 * "ee"
# Of every 64 orders: slices of TWAPs, and liquidations where they close something.
SLICES, LIQUIDATIONS = 8, 2
# Of every 4096 trades some in their midst are a cascade: one block.
CASCADE_EVERY, CASCADE_FROM, CASCADE = 4096, 700, 150
DUST_USERS = 8
DUST_COIN, DUST_PRICE = "@142", "104730.168"
DUST_SCALE = 10**10
SPOT_BALANCE = 10**10  # smallest units
# Hundred-thousandths of the notional, by wallet; some makers are paid.
TAKER_RATES = (45, 40, 35, 28)
MAKER_RATES = (15, 12, 0, -1, -3)
BUILDERS, BUILDER_RATE = 8, 5
SLICED_HOURS = 3  # those of the last hours have slices


class Part(NamedTuple):
    """Rows of the file of an hour, in the order of their arrival."""

    hour: int
    rows: pl.DataFrame


def fills(seed: int, hour: int, count: int, hours: int = 1) -> Iterator[Part]:
    """The files of the hours from `hour` on; so many fills (an even number) happen in each.

    The positions of a wallet are carried along through all hours; slices are of twaps(). Of some 2 % of an hour's
    trades one side arrives with the first lines of the next hour; what would stand in the file after the last is
    left out.
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
        orders = pl.concat(orders_of(seed, number - ago, ORDERS) for ago in range(SLICED_HOURS))
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
    most = 20_000 * USD // at(PRICES, market)
    held = pl.when(draw % 5 < 2).then(0).otherwise(draw // 8 % (2 * most + 1) - most)
    balance = SPOT_BALANCE + draw % SPOT_BALANCE
    frame = pl.DataFrame({"draw": draws(f"{seed}:positions", count)})
    return frame.select(pl.when(market < PERPS).then(held).otherwise(balance)).to_series()


def _trades(key: str, hour: int, numbers: range, of: int, slices: pl.DataFrame) -> pl.DataFrame:
    """Trades of an hour by their numbers: an order takes from one maker or more, and a block holds one order or more.

    What an order and a block draw, their first trade does.
    """
    import polars as pl

    names, count = ("start", "order", "taker", "maker", "ids"), len(numbers)
    key = f"{key}:{numbers.start}"
    frame = pl.DataFrame({name: draws(f"{key}:{name}", count) for name in names})
    frame = frame.with_columns(
        hash=hex_texts(f"{key}:hash", count, 64), cloid=hex_texts(f"{key}:cloid", count, 28)
    )
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
        taker=skewed(taker, 3),
        market=at(by_share, taker // 2**40 % 64),
        buys=taker // 2**48 % 2 == 0,
        maker_draw="maker",
        maker=skewed(pl.col("maker"), 4),
        taker_oid=(hour - GENESIS_HOUR) * 10**7 + numbers.start + first,
        maker_oid=(hour - GENESIS_HOUR) * 10**7 - 1 - pl.col("ids") % 10**6,
        tid=pl.col("ids") // 2**13,
        hash=pl.concat_str(pl.lit("0x"), pl.col("hash").gather(first)),
        order_cloid=pl.col("cloid").gather(first),
        late=(number * 100 >= of * 96) & (draw // 2**20 % 2 == 0),
    )
    if slices.height:
        frame = frame.with_columns(
            pl.coalesce(at(slices[theirs], pl.col("twap")), ours).alias(ours)
            for ours, theirs in (("taker", "wallet"), ("market", "market"), ("buys", "buys"))
        )
    delay = 300_000_000 + (pl.col("local_ns") % (97 * 10**9) - 48_500_000_000).abs() // 200
    second, usual = pl.col("local_ns") // 10**9, at(PRICES, pl.col("market"))
    waves = wave(second, 2963, 20_000) + wave(second, 37, 2_000)
    steps = pl.when("buys").then(1).otherwise(-1) * (row - first) * (usual // 50_000 + 1)
    dollars = (10 + pl.col("start") // 2**24 % 90) * at((1, 10, 100, 1000), pl.col("order") // 2**16 % 4)
    same = pl.col("maker") == pl.col("taker")
    return frame.with_columns(
        block_ns=pl.col("local_ns") - delay,
        maker=pl.when(same).then((pl.col("maker") + 1) % WALLETS).otherwise("maker"),
        twap_id=at(slices["twap_id"], pl.col("twap")) if slices.height else pl.lit(None, pl.Int64),
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
    rows = rows.with_columns(before=at(positions, key) + (signed.cum_sum() - signed).over("key"))
    last = rows.unique("key", keep="last").select("key", after=before + signed)
    positions = positions.scatter(last["key"], last["after"])

    closes = (before.sign() * signed.sign()) < 0
    closed = pl.when(closes).then(pl.min_horizontal(before.abs(), units)).otherwise(0)
    usual, notional = at(PRICES, market), units * price
    rate = (
        pl.when(crossed)
        .then(at(TAKER_RATES, wallet % len(TAKER_RATES)))
        .otherwise(at(MAKER_RATES, wallet % len(MAKER_RATES)))
    )
    token = pl.when("buys").then(at(TOKENS, market))
    rows = rows.with_columns(
        token=token,
        fee=pl.when(token.is_null()).then(notional).otherwise(units * at(TOKEN_FACTORS, market))
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
    users, builders = addresses(seed, "wallet", WALLETS), addresses(seed, "builder", BUILDERS)
    size_scale, price_scale = at(SIZE_SCALES, market), at(PRICE_SCALES, market)
    rows = rows.select(
        "block_ns",
        "local_ns",
        block_number=block_number(pl.col("block_ns")),
        user=at(users, wallet),
        coin=at(NAMES, market),
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
        liquidated_user=pl.when(liquidates).then(at(users, pl.col("taker"))),
        liquidation_mark=pl.when(liquidates).then(text_of(price + usual // 20_000, price_scale)),
        liquidation_method=pl.when(liquidates).then(
            pl.when(order // 2**40 % 8 == 0).then(pl.lit("backstop")).otherwise(pl.lit("market"))
        ),
        builder_fee=pl.when(built).then(text_of(notional * BUILDER_RATE // 100_000, USD)),
        builder=pl.when(built).then(at(builders, order // 2**24 % BUILDERS)),
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
        .then(filled("Open %", becomes))
        .when(before.sign() * after.sign() < 0)
        .then(filled("% > %", was, becomes))
        .when(pl.col("liquidates") & pl.col("crossed"))
        .then(filled("Liquidated Cross %", was))
        .otherwise(filled("Close %", was))
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
        block_number=block_number(pl.lit(ns)),
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
