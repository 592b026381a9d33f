"""What a value must look like to be stored: one rule a column type, applied to whole columns.

A source may hand over every value as text, just as it was served: decimals stay text up to NUMERIC and so keep
every digit. An integer, or its text, for a timestamptz column is milliseconds since 1970, the only unit of time in
the sources' JSON.
"""

from __future__ import annotations

import json
import re
from contextlib import suppress
from decimal import Decimal
from typing import TYPE_CHECKING

import msgspec
import polars as pl

if TYPE_CHECKING:
    from collections.abc import Callable

    from hlcli.loader.catalog import Column, Table

# PostgreSQL's NUMERIC takes NaN, Infinity and 1e400 without a word, and each of them spoils every sum. The widest
# numbers ever seen have 15 integer digits and 10 decimals; 40 of each is room enough.
NUMERIC_TEXT = r"^-?[0-9]{1,40}(\.[0-9]{1,40})?([eE][+-]?0{0,3}([0-9]|[1-3][0-9]|40))?$"
# \u0000 behind an even number of backslashes is the NUL character, behind an odd one a text about it.
_NUL_ESCAPE = re.compile(r"(?<!\\)(?:\\\\)*\\u0000")
INTEGER_TEXT = r"^-?[0-9]{1,19}$"
MAX_JSON_EXPONENT = 1000
MAX_TEXT_BYTES = 1_000_000
# A row of a btree index holds at most 2704 bytes.
MAX_KEY_BYTES = 500
_YEAR_MS = 31_556_952_000
MIN_MS, MAX_MS = 0, 180 * _YEAR_MS  # 1970 to 2149

_INTEGERS = {
    "smallint": (-(2**15), 2**15 - 1),
    "integer": (-(2**31), 2**31 - 1),
    "bigint": (-(2**63), 2**63 - 1),
}
TIMESTAMP = pl.Datetime("us", "UTC")

Rule = tuple[pl.Expr, dict[str, pl.Expr]]
"""The value to stage, and by reason the condition under which the row is rejected."""


def split(frame: pl.DataFrame, table: Table) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Divide rows into (rows to stage, rejected rows with `_column` and `_reason`).

    The staged frame has the types that binary COPY sends: text, bigint, boolean, timestamptz, double.

    Raises ValueError for a frame that does not fit the table: an unknown column, one that is missing, a float
    for a NUMERIC column. That is an error in a source function, not in its data.
    """
    _fits(frame, table)
    values, verdicts = [], []
    for name in frame.columns:
        column = table.columns[name]
        value, reasons = _rule(column, frame.schema[name], is_key=name in table.key)
        if column.not_null:
            reasons = {"null": pl.col(name).is_null(), **reasons}
        values.append(value.alias(name))
        verdicts += [pl.when(bad).then(pl.lit(f"{name}:{reason}")) for reason, bad in reasons.items()]
    checked = frame.with_columns(pl.coalesce(*verdicts, pl.lit(None, pl.String)).alias("_verdict"))
    bad = checked.filter(pl.col("_verdict").is_not_null())
    good = frame if bad.is_empty() else checked.filter(pl.col("_verdict").is_null()).drop("_verdict")
    rejected = bad.with_columns(
        pl.col("_verdict").str.split_exact(":", 1).struct.rename_fields(["_column", "_reason"])
    ).unnest("_verdict")
    return good.select(values), rejected


def _fits(frame: pl.DataFrame, table: Table) -> None:
    unknown = [name for name in frame.columns if name not in table.columns]
    missing = [
        column.name
        for column in table.columns.values()
        if column.name not in frame.columns
        and (column.name in table.key or column.not_null)
        and not column.has_default
    ]
    if unknown or missing:
        raise ValueError(f"{table.name}: the frame has unknown columns {unknown} or lacks {missing}")


def _rule(column: Column, given: pl.DataType, *, is_key: bool) -> Rule:
    kind = column.kind
    if kind in _INTEGERS:
        return _integer(column, given, *_INTEGERS[kind])
    maker = _RULES.get(kind)
    if maker is None:
        raise ValueError(f"{column.name}: the loader does not know the type {column.kind}")
    if is_key and kind in {"numeric", "jsonb"}:
        # 1.0 and 1.00 are one key to the database and two texts to us.
        raise ValueError(f"{column.name}: a column of a key cannot be {column.kind}")
    value, reasons = maker(column, given)
    if is_key and kind == "text":
        reasons["key_too_long"] = value.str.len_bytes() > MAX_KEY_BYTES
    return value, reasons


def _refuse(column: Column, given: pl.DataType) -> ValueError:
    return ValueError(f"{column.name}: {given} cannot be stored as {column.kind}")


def _text(column: Column, given: pl.DataType) -> Rule:
    value = pl.col(column.name).cast(pl.String)
    if given in (pl.Null, pl.Boolean) or given.is_integer():
        return value, {}
    if given != pl.String:
        raise _refuse(column, given)
    return value, {
        "invalid_text": value.str.contains("\x00", literal=True),
        "too_long": value.str.len_bytes() > MAX_TEXT_BYTES,
    }


def _numeric(column: Column, given: pl.DataType) -> Rule:
    value = pl.col(column.name).cast(pl.String)
    if given == pl.Null or given.is_integer() or given.is_decimal():
        return value, {}
    if given != pl.String:  # a float has lost the served digits already
        raise _refuse(column, given)
    return value, {"not_a_number": ~value.str.contains(NUMERIC_TEXT)}


def _integer(column: Column, given: pl.DataType, low: int, high: int) -> Rule:
    source = pl.col(column.name)
    value = source.cast(pl.Int64, strict=False)
    if given == pl.String:
        return value, {
            "not_an_integer": ~source.str.contains(INTEGER_TEXT),
            "out_of_range": (source.is_not_null() & value.is_null()) | ~value.is_between(low, high),
        }
    if given != pl.Null and not given.is_integer():
        raise _refuse(column, given)
    return value, {"out_of_range": (source.is_not_null() & value.is_null()) | ~value.is_between(low, high)}


def _boolean(column: Column, given: pl.DataType) -> Rule:
    source = pl.col(column.name)
    if given in (pl.Boolean, pl.Null):
        return source.cast(pl.Boolean), {}
    if given != pl.String:
        raise _refuse(column, given)
    return source == "true", {"not_a_boolean": ~source.is_in(["true", "false"])}


def _timestamptz(column: Column, given: pl.DataType) -> Rule:
    source = pl.col(column.name)
    if isinstance(given, pl.Datetime):
        aware = source if given.time_zone else source.dt.replace_time_zone("UTC")
        value = aware.dt.convert_time_zone("UTC").cast(TIMESTAMP)
        epoch = source.dt.epoch("ms")
        return value, {"time_out_of_range": ~epoch.is_between(MIN_MS, MAX_MS)}
    if given not in (pl.String, pl.Null) and not given.is_integer():
        raise _refuse(column, given)
    epoch = source.cast(pl.Int64, strict=False)
    value = (epoch.clip(MIN_MS, MAX_MS) * 1000).cast(pl.Datetime("us")).dt.replace_time_zone("UTC")
    reasons = {
        "time_out_of_range": (source.is_not_null() & epoch.is_null()) | ~epoch.is_between(MIN_MS, MAX_MS)
    }
    if given == pl.String:
        reasons = {"not_a_time": ~source.str.contains(INTEGER_TEXT), **reasons}
    return value, reasons


def _double(column: Column, given: pl.DataType) -> Rule:
    value = pl.col(column.name).cast(pl.Float64)
    if given != pl.Null and not given.is_float() and not given.is_integer():
        raise _refuse(column, given)
    return value, {"not_a_number": ~value.is_finite()}


def _jsonb(column: Column, given: pl.DataType) -> Rule:
    value = pl.col(column.name).cast(pl.String)
    if given not in (pl.String, pl.Null):
        raise _refuse(column, given)
    valid = value.map_elements(_is_json, return_dtype=pl.Boolean, skip_nulls=True)
    return value, {"not_json": ~valid, "too_long": value.str.len_bytes() > MAX_TEXT_BYTES}


def _is_json(text: str) -> bool:
    """Whether jsonb takes the text: it refuses NaN, and the NUL character and lone surrogates in any string."""
    if "\\u" not in text:  # then what is JSON to a strict and fast reader is JSON to jsonb
        with suppress(ValueError, RecursionError, ArithmeticError):
            _STRICT.decode(text)
            return True
    try:
        decoded = json.loads(text, parse_constant=_no_constant, parse_float=_sane_number)
        if "\\u" in text:
            json.dumps(decoded, ensure_ascii=False).encode()  # fails for a lone surrogate
    except (ValueError, RecursionError, ArithmeticError):
        return False
    return not _NUL_ESCAPE.search(text)


def _sane_number(text: str) -> str:
    """A number as its text; jsonb holds no more than NUMERIC does."""
    if abs(Decimal(text).adjusted()) > MAX_JSON_EXPONENT:
        raise ValueError(text)
    return text


_STRICT = msgspec.json.Decoder(float_hook=_sane_number)


def _no_constant(name: str) -> None:
    raise ValueError(name)


_RULES: dict[str, Callable[[Column, pl.DataType], Rule]] = {
    "text": _text,
    "numeric": _numeric,
    "boolean": _boolean,
    "timestamp with time zone": _timestamptz,
    "double precision": _double,
    "jsonb": _jsonb,
}
