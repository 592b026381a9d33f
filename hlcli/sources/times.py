"""Times in every unit and spelling that the sources use, as nanoseconds since 1970."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import polars as pl

# What is served lies between 2023, when the exchange began, and 2100; the units cannot be confused there.
EARLIEST_NS = 1_672_531_200 * 10**9
LATEST_NS = 4_102_444_800 * 10**9
# Why a row is rejected whose time is none of these.
GARBLED = "no time from 2023 to 2100"
# Nanoseconds, microseconds, milliseconds, seconds.
UNITS_NS = (1, 10**3, 10**6, 10**9)
# Of a second; a datetime would keep six digits of it.
_FRACTION = re.compile(r"(?<=:[0-9]{2})\.([0-9]+)", re.ASCII)


def nanoseconds(values: pl.Series) -> pl.Series:
    """Whatever tells a time, as nanoseconds (Int64); NULL for what tells none between 2023 and 2100.

    Takes integers in s, ms, us or ns, told apart by their size; their text; ISO 8601 text, without an offset in UTC;
    datetimes. Of a datetime, too, the size of its integer tells the unit: Artemis stored milliseconds as
    timestamp[ns] in August 2025.
    """
    import polars as pl

    name = values.name
    if isinstance(values.dtype, pl.Datetime):
        told = values.to_physical()
    elif values.dtype.is_integer():
        told = values.cast(pl.Int64, strict=False)
    else:
        text = values.cast(pl.String)
        numbers = text.cast(pl.Int64, strict=False)
        told = numbers if numbers.null_count() == text.null_count() else numbers.fill_null(_iso(text))
    # The product wraps around where the unit is another one, so the bounds are those of the integer as it was told.
    units = [
        pl.when(pl.col("told").is_between(EARLIEST_NS // unit, LATEST_NS // unit, closed="left")).then(
            pl.col("told") * unit
        )
        for unit in UNITS_NS
    ]
    return pl.DataFrame({"told": told}).select(pl.coalesce(units).alias(name)).to_series()


def _iso(text: pl.Series) -> pl.Series:
    """ISO 8601 text as nanoseconds, NULL where it is none."""
    import polars as pl

    plain = text.str.strip_chars().str.replace(r" ?(Z|UTC|[+-]00(:?00)?)$", "")
    plain = plain.str.replace(" ", "T", literal=True)
    # Nanoseconds of 64 bits end in 2262, and what lies beyond would come back as some other year.
    ours = pl.DataFrame({"plain": plain}).select(
        pl.when(pl.col("plain").str.contains("^20[0-9]{2}-")).then("plain")
    )
    parsed = (
        ours.to_series().str.to_datetime("%Y-%m-%dT%H:%M:%S%.f", time_unit="ns", strict=False).dt.epoch("ns")
    )
    if parsed.null_count() == text.null_count():
        return parsed
    rest = [_other(each) if ns is None else None for each, ns in zip(plain, parsed, strict=True)]
    return parsed.fill_null(pl.Series(rest, dtype=pl.Int64))


def _other(text: str | None) -> int | None:
    """The rarer forms of ISO 8601: a date alone, another offset than UTC; None for other times than ours."""
    fraction = _FRACTION.search(text or "")
    try:
        moment = datetime.fromisoformat(_FRACTION.sub("", text or "", count=1))
        moment = moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)
        since = moment - datetime(1970, 1, 1, tzinfo=UTC)
    except (ValueError, OverflowError):
        return None
    told = (since.days * 86_400 + since.seconds) * 10**9
    if fraction:
        told += int(fraction[1][:9].ljust(9, "0"))
    return told if EARLIEST_NS <= told < LATEST_NS else None


def timestamp(values: pl.Series) -> pl.Series:
    """Nanoseconds as timestamptz columns take them, cut to microseconds."""
    import polars as pl

    return (values // 1000).cast(pl.Datetime("us")).dt.replace_time_zone("UTC")
