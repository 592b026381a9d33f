"""Times in all units and spellings become the same nanoseconds; what is no time of ours becomes none."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone

import polars as pl
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from object_files import T0_NS, iso

from hlcli.sources import times

FIRST, LAST = times.EARLIEST_NS, times.LATEST_NS - 1
moments = st.integers(FIRST, LAST)


def ns(*values, dtype=None):
    return times.nanoseconds(pl.Series("at", values, dtype=dtype)).to_list()


@given(moments)
@example(FIRST)
@example(LAST)
@example(T0_NS)
def test_a_moment_is_the_same_in_every_unit(at):
    for unit in (1, 10**3, 10**6, 10**9):
        cut = at // unit * unit
        assert ns(at // unit) == ns(str(at // unit)) == [cut]
        assert ns(iso(cut)) == ns(iso(cut).rstrip("0").rstrip(".")) == [cut]
    for unit, factor in (("ns", 1), ("us", 10**3), ("ms", 10**6)):
        stored = pl.Series([at // factor]).cast(pl.Datetime(unit))
        assert times.nanoseconds(stored).to_list() == [at // factor * factor]
        aware = stored.dt.replace_time_zone("UTC").dt.convert_time_zone("Asia/Tokyo")
        assert times.nanoseconds(aware).to_list() == [at // factor * factor]


@given(moments, st.sampled_from(["ns", "us"]), st.sampled_from([10**3, 10**6, 10**9]))
def test_a_datetime_of_a_wrong_unit_is_read_by_its_size(at, unit, factor):
    misread = pl.Series([at // factor]).cast(pl.Datetime(unit))
    assert times.nanoseconds(misread).to_list() == [at // factor * factor]


def test_milliseconds_that_were_stored_as_nanoseconds_are_no_day_of_1970():
    misread = pl.Series([1_755_000_000_123]).cast(pl.Datetime("ns"))
    assert misread.dt.year().to_list() == [1970]
    assert times.nanoseconds(misread).to_list() == [1_755_000_000_123 * 10**6]


@given(moments, st.integers(-14 * 60, 14 * 60))
def test_an_offset_is_taken_into_account_with_every_digit_kept(at, minutes):
    offset = timedelta(minutes=minutes)
    sign, size = "-" if minutes < 0 else "+", abs(minutes)
    text = f"{iso(at + minutes * 60 * 10**9)}{sign}{size // 60:02}:{size % 60:02}"
    whole = datetime.fromisoformat(text[:19]).replace(tzinfo=timezone(offset))
    assert (whole - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(seconds=1) == at // 10**9
    assert ns(text) == [at]


SECOND = 1_790_248_352


@pytest.mark.parametrize(
    "text",
    [
        "2026-09-24T11:12:32",
        "2026-09-24 11:12:32",
        "2026-09-24T11:12:32Z",
        "2026-09-24 11:12:32 UTC",
        "2026-09-24 11:12:32+00",
        "2026-09-24T11:12:32+0000",
        "2026-09-24T11:12:32.000-00:00",
        " 2026-09-24T11:12:32.0000000000 ",
        "2026-09-24T20:12:32+09:00",
        "20260924T111232",
        "2026-09-24T06:42:32-0430",
    ],
)
def test_spellings_of_one_second(text):
    assert ns(text) == [SECOND * 10**9]


def test_a_date_alone_is_its_midnight():
    assert ns("2026-09-24") == [(SECOND - SECOND % 86_400) * 10**9]
    assert times.nanoseconds(pl.Series(["2026-09-24"]).str.to_date()).to_list() == ns("2026-09-24")


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "now",
        "infinity",
        "NaN",
        "true",
        "2026-02-30T00:00:00",
        "2026-13-01T00:00:00",
        "2026-09-24T25:00:00",
        "2022-12-31T23:59:59.999999999",
        "2100-01-01T00:00:00",
        "2199-01-01T00:00:00",
        "0001-01-01T00:00:00",
        "0001-01-01T00:00:00+14:00",
        "9999-12-31T23:59:59-14:00",
        "9999-12-31T00:00:00",
        # Nanoseconds of 64 bits would make 2026 of it.
        "2610-12-05T10:46:04",
        "294277-01-01T00:00:00",
        "+2026-09-24T11:12:32",
        "1790248352.5",
        "1_790_248_352",
        "0x6ab5",
        "٢٠٢٦-٠٩-٢٤T11:12:32",
        "\x002026-09-24T11:12:32",
        "99999999999999999999999",
    ],
)
def test_what_tells_no_time_of_ours_is_none_and_spoils_no_other(text):
    assert ns(iso(T0_NS), text, None, str(T0_NS)) == [T0_NS, None, None, T0_NS]


@given(st.integers(-(2**63), 2**63 - 1))
@example(-(2**63))
@example(2**63 - 1)
@example(21 * 10**9)  # x 10**9 is 2050 when it wraps around
@example(96 * 10**15)
@example(0)
@example(-T0_NS)
def test_an_integer_is_a_time_in_one_unit_or_in_none(value):
    units = [unit for unit in (1, 10**3, 10**6, 10**9) if FIRST <= value * unit <= LAST]
    assert len(units) < 2
    expected = [value * units[0]] if units else [None]
    assert ns(value) == ns(str(value)) == expected
    assert ns(value, dtype=pl.Int64) == expected
    for unit in ("ns", "us", "ms"):
        assert times.nanoseconds(pl.Series([value]).cast(pl.Datetime(unit))).to_list() == expected


def test_other_types_tell_none():
    assert ns(2**64 - 1, dtype=pl.UInt64) == [None]
    assert ns(True) == ns(None) == ns(1.5) == [None]
    assert times.nanoseconds(pl.Series([], dtype=pl.String)).to_list() == []


@given(moments)
def test_a_timestamp_is_cut_to_microseconds(at):
    (stored,) = times.timestamp(pl.Series([at])).to_list()
    assert stored == datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=at // 1000)
