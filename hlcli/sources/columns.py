"""From decoded JSON objects or a Parquet frame to named columns, each of the type that the loader takes.

Files name one thing in many ways (startPosition, start_position, State_ExecutedSz): names are compared in lower case
and without underscores.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from hlcli.sources import times, wire
from hlcli.sources.files import UnusableError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    import polars as pl

    from hlcli.sources.files import Batch, Rows

Kind = Literal["text", "number", "integer", "boolean", "time", "document"]
# Integers beyond are not the same in JavaScript, nor in a double.
MAX_EXACT = 2**53


class InexactError(Exception):
    """A number came as a float, or a value as another type than usual: decode once more, exactly."""


def exactly_if_needed(batch: Batch, read: Callable[[Sequence[Any], bool], Rows]) -> Rows:
    """Rows of a JSON batch: decoded fast, and once more with every digit where that was not good enough."""
    try:
        values, rejected = batch.values(exact=False)
        rows = read(values, batch.elements is not None)
    except InexactError:
        values, rejected = batch.values(exact=True)
        rows = read(values, True)
    rows.rejected += rejected
    return rows


def plain(name: str) -> str:
    """A name as it is compared."""
    return name.replace("_", "").lower()


def of_dicts(
    dicts: Sequence[Mapping[str, Any]], names: Mapping[str, str], prefix: str = ""
) -> tuple[dict[str, list[Any]], list[str]]:
    """The values of JSON objects by our names, and the keys that have none."""
    found: dict[str, list[Any]] = {}
    unknown = []
    for key in sorted(set().union(*dicts)):
        name = names.get(prefix + plain(key))
        if name is None:
            unknown.append(key)
            continue
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


def series(values: Sequence[Any], kind: Kind, *, exact: bool) -> pl.Series:
    """Decoded JSON values as a column: of the usual type of its kind, or of text with `exact`. Raises InexactError."""
    import polars as pl

    if kind == "document":
        return pl.Series([document(value, exact=exact) for value in values], dtype=pl.String)
    if exact:
        return pl.Series([wire.text(value) for value in values], dtype=pl.String)
    first = next((value for value in values if value is not None), None)
    usual: type[pl.DataType] = pl.String
    if kind == "boolean":
        usual = pl.Boolean
    elif kind == "integer" or (kind == "time" and isinstance(first, int)):
        usual = pl.Int64
        if bool in set(map(type, values)):  # which Polars takes for 0 and 1
            raise InexactError
    try:
        return pl.Series(values, dtype=usual, strict=True)
    except (TypeError, ValueError, OverflowError, pl.exceptions.PolarsError):
        raise InexactError from None


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
            raise UnusableError(f"column {values.name!r} holds {values.dtype}")
        lossy |= kind == "number" and values.dtype.is_float() and values.null_count() < height
        columns.append(_of_kind(values, kind).alias(name))
    return pl.DataFrame(columns), lossy


def _of_kind(values: pl.Series, kind: Kind) -> pl.Series:
    import polars as pl

    if kind == "time":
        return times.nanoseconds(values)
    if kind == "integer":
        return _integer(values)
    if kind == "boolean" and values.dtype == pl.Boolean:
        return values
    if kind == "boolean":
        return values.cast(pl.String).str.to_lowercase()
    if kind == "document" and isinstance(values.dtype, pl.Struct):
        return documents(values.struct.unnest())
    return values.cast(pl.String)


def _integer(values: pl.Series) -> pl.Series:
    """Integers, or the text of what is none; a float that is a whole number counts as one.

    Writers that know no missing integers make floats of a column with gaps.
    """
    import polars as pl

    if values.dtype.is_integer():
        return values
    shown = values.cast(pl.String)
    if values.dtype.is_float():
        whole = values.is_finite() & (values == values.floor()) & (values.abs() <= MAX_EXACT)
        shown = (
            values.cast(pl.Int64, strict=False).cast(pl.String).zip_with(whole.fill_null(value=False), shown)
        )
    integers = shown.cast(pl.Int64, strict=False)
    return integers if integers.null_count() == shown.null_count() else shown


def document(value: Any, *, exact: bool) -> str | None:
    """A decoded JSON value as JSON text, integers beyond 2**53 as text. Raises InexactError for floats in it."""
    import orjson

    if value is None or isinstance(value, str):
        return value
    if exact:
        return wire.text(_safe(value))
    if has_float(value):
        raise InexactError
    try:
        return orjson.dumps(value, option=orjson.OPT_STRICT_INTEGER).decode()
    except TypeError:
        return orjson.dumps(_safe(value)).decode()


def documents(frame: pl.DataFrame) -> pl.Series:
    """Each row of a frame as a JSON object, NULL when all of it is: times in ISO 8601, bytes in base64.

    What JSON cannot hold (NaN) and what JavaScript would change (integers beyond 2**53) is text.
    """
    import polars as pl

    shown = []
    for column in frame.get_columns():
        kind = column.dtype
        if isinstance(kind, pl.Datetime):
            shown.append(column.dt.to_string("iso"))
        elif kind == pl.Binary:
            shown.append(column.bin.encode("base64"))
        elif (kind.is_integer() and not column.is_between(-MAX_EXACT, MAX_EXACT).all()) or (
            kind.is_float() and not column.is_finite().all()
        ):
            shown.append(column.cast(pl.String))
        else:
            shown.append(column)
    nothing = pl.all_horizontal(pl.all().is_null())
    return (
        pl.DataFrame(shown)
        .select(pl.when(~nothing).then(pl.struct(pl.all()).struct.json_encode()).alias("document"))
        .to_series()
    )


def has_float(value: Any) -> bool:
    """Whether a float is anywhere in a decoded JSON value."""
    if isinstance(value, dict):
        return any(has_float(held) for held in value.values())
    if isinstance(value, list):
        return any(map(has_float, value))
    return isinstance(value, float)


def _safe(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _safe(held) for name, held in value.items()}
    if isinstance(value, list):
        return [_safe(held) for held in value]
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) > MAX_EXACT:
        return str(value)
    return value
