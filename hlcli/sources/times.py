"""Times in every unit and spelling that the sources use, as nanoseconds since 1970."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import polars as pl

# What is served lies between 2023, when the exchange began, and 2100; the units cannot be confused there.
EARLIEST_NS = 1_672_531_200 * 10**9
LATEST_NS = 4_102_444_800 * 10**9
# Below each bound an integer counts this many nanoseconds: seconds, milliseconds, microseconds.
UNITS = ((10**11, 10**9), (10**14, 10**6), (10**17, 10**3))


def nanoseconds(values: pl.Series) -> pl.Series:
    """Whatever tells a time, as nanoseconds (Int64); NULL for what tells none between 2023 and 2100.

    Takes integers in s, ms, us or ns, told apart by their size; their text; ISO 8601 text, without an offset in UTC;
    datetimes. A datetime far from our days is an integer that was stored under the wrong unit (Artemis did so in
    August 2025: milliseconds as timestamp[ns]) and is read once more by its size.
    """
    import polars as pl

    name = values.name
    if isinstance(values.dtype, pl.Datetime):
        told = values.dt.epoch("ns")
    elif values.dtype.is_integer():
        told = values.cast(pl.Int64, strict=False)
    else:
        text = values.cast(pl.String)
        numbers = text.cast(pl.Int64, strict=False)
        told = numbers if numbers.null_count() == text.null_count() else numbers.fill_null(_iso(text))
    frame = pl.DataFrame({"told": told})
    size, ns = pl.col("told").abs(), pl.col("told")
    for bound, factor in reversed(UNITS):
        ns = pl.when(size < bound).then(pl.col("told") * factor).otherwise(ns)
    return frame.select(
        pl.when(ns.is_between(EARLIEST_NS, LATEST_NS, closed="left")).then(ns).alias(name)
    ).to_series()


def _iso(text: pl.Series) -> pl.Series:
    """ISO 8601 text as nanoseconds, NULL where it is none."""
    import polars as pl

    plain = text.str.strip_chars().str.replace(" ", "T", literal=True).str.replace(r"(Z|[+-]00:?00)$", "")
    parsed = plain.str.to_datetime("%Y-%m-%dT%H:%M:%S%.f", time_unit="ns", strict=False).dt.epoch("ns")
    if parsed.null_count() == text.null_count():
        return parsed
    rest = pl.Series([_other(each) if ns is None else None for each, ns in zip(plain, parsed, strict=True)])
    return parsed.fill_null(rest.cast(pl.Int64))


def _other(text: str | None) -> int | None:
    """The rarer forms of ISO 8601: a date alone, another offset than UTC."""
    try:
        moment = datetime.fromisoformat(text or "")
        moment = moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)
        since = moment - datetime(1970, 1, 1, tzinfo=UTC)
    except (ValueError, OverflowError):
        return None
    return ((since.days * 86_400 + since.seconds) * 10**6 + since.microseconds) * 1000


def timestamp(values: pl.Series) -> pl.Series:
    """Nanoseconds as timestamptz columns take them, cut to microseconds."""
    import polars as pl

    return (values // 1000).cast(pl.Datetime("us")).dt.replace_time_zone("UTC")
