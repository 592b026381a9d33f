"""Invented TWAP orders: what was asked, and what became of each. All follows from (seed, hour, count)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hlcli.sim.columns import (
    GENESIS_HOUR,
    HOUR_NS,
    WALLETS,
    addresses,
    at,
    block_number,
    draws,
    skewed,
    text_of,
)
from hlcli.sim.markets import NAMES, PERPS, PRICES, SIZE_SCALES
from hlcli.sim.values import MINUTE_MS, USD

if TYPE_CHECKING:
    import polars as pl

ORDERS = 12  # TWAPs an hour
MINUTES = (5, 5, 10, 10, 30, 30, 60, 60, 90, 120, 240, 480)
ERRORS = ("Insufficient margin to place order.", "Order has zero size.", 'Coin "X" is delisted.')


def twaps(seed: int, hour: int, orders: int = ORDERS, hours: int = 1) -> pl.DataFrame:
    """The events of so many TWAPs, created evenly in each of the hours from `hour` on, in order.

    None of the events is later than these hours, so some TWAPs have no end yet.
    """
    import polars as pl

    made = pl.concat(orders_of(seed, number, orders) for number in range(hour, hour + hours))
    begun = made.with_columns(
        ended_ns="created_ns",
        status=pl.lit("activated"),
        error=pl.lit(None, pl.String),
        executed=pl.lit(0, pl.Int64),
        notional=pl.lit(0, pl.Int64),
    )
    events = pl.concat([begun, made]).rename({"ended_ns": "time_ns"})
    events = events.filter(pl.col("time_ns") < (hour + hours) * HOUR_NS).sort("time_ns", maintain_order=True)
    scale = at(SIZE_SCALES, pl.col("market"))
    return events.select(
        "twap_id",
        "time_ns",
        block_number=block_number(pl.col("time_ns")),
        user=at(addresses(seed, "wallet", WALLETS), pl.col("wallet")),
        coin=at(NAMES, pl.col("market")),
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


def orders_of(seed: int, hour: int, count: int) -> pl.DataFrame:
    """TWAPs created evenly in an hour, and what became of each."""
    import polars as pl

    key = f"{seed}:{hour}:{count}:twap"
    gap = HOUR_NS // count
    number = pl.int_range(count, dtype=pl.Int64)
    who, what, when, draw = map(pl.col, ("who", "what", "when", "draw"))
    chance, market, units, minutes = map(pl.col, ("chance", "market", "units", "minutes"))
    dollars = (10 + draw % 90) * 100 * at((1, 10, 100, 1000), draw // 128 % 4)
    frame = pl.DataFrame({name: draws(f"{key}:{name}", count) for name in ("who", "what", "when", "draw")})
    frame = frame.select(
        twap_id=(hour - GENESIS_HOUR) * 100_000 + number,
        wallet=skewed(who, 2),
        market=what % PERPS,
        buys=what // 64 % 2 == 0,
        minutes=at(MINUTES, what // 128 % len(MINUTES)),
        reduce_only=what // 2**16 % 8 == 0,
        randomize=what // 2**20 % 2 == 0,
        created_ns=hour * HOUR_NS + number * gap + when % gap,
        chance=draw // 2**10 % 100,
        units=dollars * USD // at(PRICES, what % PERPS),
        draw=draw // 2**20,
    )
    # In thousandths: some finish with a rest, some end before their first slice.
    share = pl.when(chance < 63).then(1000).when(chance < 90).then(draw % 1000).otherwise(draw % 3 * 149)
    lasted = pl.when(chance < 70).then(1000).otherwise(share)
    usual, executed = at(PRICES, market), units * share // 1000
    return frame.with_columns(
        ended_ns=pl.col("created_ns") + minutes * lasted * (MINUTE_MS * 1000) + 1 + draw % (2 * 10**9),
        status=pl.when(chance < 70)
        .then(pl.lit("finished"))
        .when(chance < 88)
        .then(pl.lit("terminated"))
        .otherwise(pl.lit("error")),
        error=pl.when(chance >= 88).then(at(ERRORS, draw % len(ERRORS))),
        executed=executed,
        notional=executed * (usual + usual * (draw // 4096 % 200 - 100) // 10_000),
    )
