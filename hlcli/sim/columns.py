"""Polars expressions that the invented files are made of: draws that follow from a key, and text.

Money, sizes and prices are counted in integers, as in `hlcli.sim.wallets`, and written as decimal text.
"""

from __future__ import annotations

from functools import lru_cache
from random import Random
from typing import TYPE_CHECKING, Any

from hlcli.sim.values import HOUR_MS, address_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    import polars as pl

HOUR_NS = HOUR_MS * 10**6
# The exchange's first year, from which blocks are counted: a number each 0.25 ms, though few of them are used.
GENESIS_HOUR = 1_672_531_200 // 3600
BLOCK_NS = 250_000
WALLETS = 30_000


def draws(key: str, count: int) -> pl.Series:
    """Numbers below 2**63 that follow from the key alone."""
    import polars as pl
    import pyarrow as pa

    raw = pa.py_buffer(Random(key).randbytes(8 * count))
    numbers = pl.from_arrow(pa.Array.from_buffers(pa.int64(), count, [None, raw]))
    assert isinstance(numbers, pl.Series)
    return numbers & (2**63 - 1)


def hex_texts(key: str, count: int, size: int) -> pl.Series:
    """Texts of an even number of hexadecimal digits that follow from the key alone."""
    import polars as pl
    import pyarrow as pa

    digits = pa.py_buffer(Random(key).randbytes(count * size // 2).hex().encode())
    texts = pl.from_arrow(pa.Array.from_buffers(pa.binary(size), count, [None, digits]))
    assert isinstance(texts, pl.Series)
    return texts.cast(pl.String)


def skewed(draw: pl.Expr, factors: int) -> pl.Expr:
    """The number of a wallet: the more factors (up to four), the more often it is one of the first."""
    share: Any = 1
    for factor in range(factors):
        share *= draw // 2 ** (12 * factor) % 4096
    number: pl.Expr = share * WALLETS // 4096**factors
    return number


def at(values: Sequence[Any] | pl.Series, place: pl.Expr) -> pl.Expr:
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


def filled(template: str, *values: str | pl.Expr) -> pl.Expr:
    """The template with the values (columns by name) for each %; NULL where one of them is."""
    import polars as pl

    first, *others = template.split("%")
    pieces: list[pl.Expr] = [pl.lit(first)]
    for value, text in zip(values, others, strict=True):
        pieces += [pl.col(value) if isinstance(value, str) else value, pl.lit(text)]
    return pl.concat_str(pieces)


def iso(ns: pl.Expr) -> pl.Expr:
    import polars as pl

    return ns.cast(pl.Datetime("ns")).dt.strftime("%Y-%m-%dT%H:%M:%S%.9f")


def moment(us: pl.Expr) -> pl.Expr:
    import polars as pl

    return us.cast(pl.Datetime("us")).dt.replace_time_zone("UTC")


def wave(at: pl.Expr, period: int, height: int) -> pl.Expr:
    """A triangle between -height and height."""
    return (2 * (2 * (at % period) - period).abs() - period) * height // period


def block_number(ns: pl.Expr) -> pl.Expr:
    return (ns - GENESIS_HOUR * HOUR_NS) // BLOCK_NS


@lru_cache(maxsize=4)
def addresses(seed: int, role: str, count: int) -> pl.Series:
    import polars as pl

    return pl.Series([address_of(seed, role, number) for number in range(count)])
