"""From decoded JSON objects or a Parquet frame to named columns, each of the type that the loader takes.

Files name one thing in many ways (startPosition, start_position, State_ExecutedSz): names are compared in lower case
and without underscores.
"""

from __future__ import annotations

import base64
import json
import math
from contextlib import suppress
from decimal import Decimal
from operator import itemgetter
from typing import TYPE_CHECKING, Any, Literal

from hlcli.sources import times, wire
from hlcli.sources.files import Rows, UnusableError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    import polars as pl

    from hlcli.sources.files import Batch

Kind = Literal["text", "number", "integer", "boolean", "time", "document"]
# Integers beyond are not the same in JavaScript, nor in a double.
MAX_EXACT = 2**53
PER_SECOND = {"ms": 10**3, "us": 10**6, "ns": 10**9}
YEAR_10000_S = 253_402_300_800


def rows_of(
    batch: Batch,
    from_values: Callable[[Sequence[Any]], Rows],
    from_frame: Callable[[pl.DataFrame], Rows],
) -> Rows:
    """Rows of a batch. Raises UnusableError, also for a frame with values that Polars itself cannot handle."""
    import polars as pl

    if batch.frame is not None:
        try:
            return from_frame(batch.frame)
        except (pl.exceptions.PolarsError, pl.exceptions.PanicException, OverflowError) as error:
            raise UnusableError(f"holds what cannot be read: {error}") from error
    values, rejected = batch.values()
    rows = from_values(values)
    return Rows(rows.frame, [*rejected, *rows.rejected])


def events_of(
    values: Iterable[Any], is_event: Callable[[list[Any]], bool] = lambda _: False
) -> Iterator[tuple[Any, Any, Any]]:
    """The events of JSON values, each with the time and the number of its block, None where there is none.

    A value is a block {block_time, block_number, events: [...]}, a list of events, or an event; `is_event` tells lists
    that are events.
    """
    for value in values:
        if isinstance(value, dict) and isinstance(value.get("events"), list):
            around = value.get("block_time"), value.get("block_number")
            yield from ((event, *around) for event in value["events"])
        elif isinstance(value, list) and not is_event(value):
            yield from ((event, None, None) for event in value)
        else:
            yield value, None, None


def plain(name: str) -> str:
    """A name as it is compared."""
    return name.replace("_", "").lower()


def of_dicts(
    dicts: Sequence[Mapping[str, Any]], names: Mapping[str, str]
) -> tuple[dict[str, list[Any]], list[str]]:
    """The values of JSON objects by our names, and the keys that have none."""
    found: dict[str, list[Any]] = {}
    unknown = []
    for key in sorted(set().union(*dicts)):
        name = names.get(plain(key))
        if name is None:
            unknown.append(key)
            continue
        try:  # most keys are in all of them
            values = list(map(itemgetter(key), dicts))
        except KeyError:
            values = [each.get(key) for each in dicts]
        found[name] = first_of(found[name], values) if name in found else values
    return found, unknown


def of_frame(frame: pl.DataFrame, names: Mapping[str, str]) -> tuple[dict[str, pl.Series], list[str]]:
    """The columns of a frame by our names, and those that have none. Raises UnusableError for one that comes twice."""
    found: dict[str, pl.Series] = {}
    unknown = []
    for column in frame.columns:
        name = names.get(plain(column))
        if name is None:
            unknown.append(column)
        elif name in found:
            raise UnusableError(f"columns {found[name].name!r} and {column!r} say the same")
        else:
            found[name] = frame[column]
    return found, unknown


def first_of(one: Iterable[Any], other: Iterable[Any]) -> list[Any]:
    """Of each pair the first, or the second where that is None."""
    return [b if a is None else a for a, b in zip(one, other, strict=True)]


def needed(found: Mapping[str, Any], names: Iterable[str]) -> None:
    """Raises UnusableError when one of these columns is not among those found."""
    missing = [name for name in names if name not in found]
    if missing:
        raise UnusableError(f"has no column for {', '.join(missing)}")


def series(values: Sequence[Any], kind: Kind) -> pl.Series:
    """Decoded JSON values as a column: of the usual type of its kind or, when one is of another type, of text."""
    import polars as pl

    if kind == "document":
        return pl.Series([document(value) for value in values], dtype=pl.String)
    first = next((value for value in values if value is not None), None)
    usual: type[pl.DataType] = pl.String
    if kind == "boolean":
        usual = pl.Boolean
    elif kind == "integer" or (kind == "time" and isinstance(first, int)):
        usual = pl.Int64
    # Polars takes booleans for 0 and 1, and looks into nested lists for hours, deaf to signals.
    kinds = set(map(type, values))
    if kinds.isdisjoint((list, dict)) and (usual != pl.Int64 or bool not in kinds):
        with suppress(TypeError, ValueError, OverflowError, RuntimeError, pl.exceptions.PolarsError):
            return pl.Series(values, dtype=usual, strict=True)
    return pl.Series([wire.text(value) for value in values], dtype=pl.String)


def typed(
    found: Mapping[str, pl.Series], kinds: Mapping[str, Kind], height: int
) -> tuple[pl.DataFrame, bool]:
    """All columns of `kinds`, as the loader takes them but for times, which are nanoseconds; NULL where not found.

    And whether a decimal number came as a float, of which the shortest text is kept. Raises UnusableError for a
    column of lists or structs that is no document.
    """
    import polars as pl

    columns, lossy = [], False
    for name, kind in kinds.items():
        values = found.get(name)
        if values is None:
            missing = pl.Int64 if kind == "time" else pl.String
            columns.append(pl.Series(name, [None], dtype=missing).new_from_index(0, height))
            continue
        if values.dtype.is_nested() and kind != "document":
            text(values)
        lossy |= kind == "number" and values.dtype.is_float() and values.null_count() < height
        columns.append(_of_kind(values, kind).alias(name))
    return pl.DataFrame(columns), lossy


def _of_kind(values: pl.Series, kind: Kind) -> pl.Series:
    import polars as pl

    if kind == "time" and (values.dtype.is_float() or values.dtype == pl.Binary):
        return times.nanoseconds(_integer(values))
    if kind == "time":
        return times.nanoseconds(values)
    if kind == "integer":
        return _integer(values)
    if kind == "boolean" and values.dtype == pl.Boolean:
        return values
    if kind == "boolean":
        return text(values).str.to_lowercase()
    if isinstance(values.dtype, pl.Struct):
        return documents(values.struct.unnest())
    if values.dtype.is_nested():
        return pl.Series([document(value) for value in values.to_list()], dtype=pl.String)
    return text(values)


def text(values: pl.Series) -> pl.Series:
    """Scalars as text; bytes, which some writers make of all text, as what they spell, or else in base64.

    Raises UnusableError for lists and structs.
    """
    import polars as pl

    if values.dtype.is_nested():
        raise UnusableError(f"column {values.name!r} holds {values.dtype}")
    if isinstance(values.dtype, pl.Datetime):
        return _moments(values)
    try:
        return values.cast(pl.String)
    except pl.exceptions.ComputeError:
        if values.dtype != pl.Binary:
            raise
        return values.bin.encode("base64")


def _integer(values: pl.Series) -> pl.Series:
    """Integers, or the text of what is none; a float that is a whole number counts as one.

    Writers that know no missing integers make floats of a column with gaps.
    """
    import polars as pl

    if values.dtype.is_integer():
        return values
    shown = text(values)
    if values.dtype.is_float():
        whole = values.is_finite() & (values == values.floor()) & (values.abs() <= MAX_EXACT)
        shown = (
            values.cast(pl.Int64, strict=False).cast(pl.String).zip_with(whole.fill_null(value=False), shown)
        )
    integers = shown.cast(pl.Int64, strict=False)
    return integers if integers.null_count() == shown.null_count() else shown


def document(value: Any) -> str | None:
    """A decoded value as JSON text with all its digits; NUL, which no table takes, for what is nested too deeply.

    What JSON cannot hold (NaN) and what JavaScript would change (integers beyond 2**53) becomes text.
    """
    import msgspec

    if value is None or isinstance(value, str):
        return wire.text(value)
    try:
        if _is_plain(value):
            return msgspec.json.encode(value).decode()
        return wire.text(_safe(value))
    except UnicodeEncodeError:  # a lone surrogate
        return wire.text(_safe(value))
    except RecursionError:
        return "\0"


def documents(frame: pl.DataFrame) -> pl.Series:
    """Each row of a frame as document() would have it, NULL when all of it is: times in ISO 8601, bytes as in text()."""
    import polars as pl

    nothing = pl.all_horizontal(pl.all().is_null())
    shown = pl.DataFrame([_shown(column) for column in frame.get_columns()])
    if any(_holds_list(kind) for kind in shown.dtypes):
        rows = pl.Series([document(row) for row in shown.to_dicts()], dtype=pl.String)
        return shown.select(pl.when(~nothing).then(rows).alias("document")).to_series()
    encoded = pl.struct(pl.all()).struct.json_encode()
    return shown.select(pl.when(~nothing).then(encoded).alias("document")).to_series()


def rows_as_told(frame: pl.DataFrame) -> Callable[[int], dict[str, Any]]:
    """What gives a row of the frame as documents() has it, for quarantine."""
    told: list[str | None] = []

    def row(at: int) -> dict[str, Any]:
        if not told:
            told.extend(documents(frame))
        decoded: dict[str, Any] = json.loads(told[at] or "{}")
        return decoded

    return row


def _shown(column: pl.Series) -> pl.Series:
    """A column of which whatever stands outside of lists can be written as JSON."""
    import polars as pl

    kind, shown = column.dtype, column
    if isinstance(kind, pl.Struct) and kind.fields:
        inner = pl.DataFrame([_shown(column.struct.field(field.name)) for field in kind.fields])
        shown = inner.select(pl.when(column.is_not_null()).then(pl.struct(pl.all()))).to_series()
    elif isinstance(kind, pl.Datetime) or kind == pl.Binary:
        shown = text(column)
    elif kind.is_integer():
        if any(abs(bound) > MAX_EXACT for bound in (column.min(), column.max()) if isinstance(bound, int)):
            shown = column.cast(pl.String)
    elif kind.is_float() and not column.is_finite().all():
        shown = column.cast(pl.String)
    return shown.alias(column.name)


def _moments(values: pl.Series) -> pl.Series:
    """Datetimes as ISO 8601; those before 1970 or of a year of five digits as integers, for Polars cannot show all."""
    import polars as pl

    assert isinstance(values.dtype, pl.Datetime)
    number = values.to_physical()
    last = min(YEAR_10000_S * PER_SECOND[values.dtype.time_unit], 2**63) - 1
    known = pl.DataFrame({"at": values}).select(pl.when(number.is_between(0, last)).then("at")).to_series()
    return known.dt.to_string("iso").fill_null(number.cast(pl.String))


def _holds_list(kind: Any) -> bool:
    import polars as pl

    if isinstance(kind, pl.Struct):
        return any(map(_holds_list, kind.to_schema().values()))
    return bool(kind.is_nested())


def _is_plain(value: Any) -> bool:
    """Whether all of a decoded value is what JSON and JavaScript hold as it is, numbers being integers."""
    kind = type(value)
    if kind is str or value is None or kind is bool:
        return True
    if kind is int:
        return bool(-MAX_EXACT <= value <= MAX_EXACT)
    if kind is dict:
        return all(map(_is_plain, value.values()))
    return kind is list and all(map(_is_plain, value))


def _safe(value: Any) -> Any:
    """A value of which JSON can hold everything, and JavaScript does not change it."""
    if isinstance(value, dict):
        return {name: _safe(held) for name, held in value.items()}
    if isinstance(value, list):
        return [_safe(held) for held in value]
    if value is None or isinstance(value, (str, bool, Decimal)):
        return value
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    fits = isinstance(value, int) and abs(value) <= MAX_EXACT
    return value if fits or (isinstance(value, float) and math.isfinite(value)) else str(value)
