"""From a query to a frame: COPY out as CSV, read by polars with the types that the caller names."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, LiteralString

if TYPE_CHECKING:
    from collections.abc import Mapping

    import polars as pl
    from psycopg import Connection


def read(
    connection: Connection[Any],
    query: LiteralString,
    values: Mapping[str, Any],
    schema: Mapping[str, pl.DataType | type[pl.DataType]],
) -> pl.DataFrame:
    """The rows of a query as a frame, some five times as fast as row by row.

    `schema` names the columns in order. NUMERIC is read exactly as String; a timestamptz column as Datetime must be
    selected as microseconds since 1970, (extract(epoch from t) * 1000000)::bigint, since CSV would spell it out. Texts
    must not be empty: an empty one reads as null.

    Raises psycopg.Error for the database, polars.exceptions.PolarsError for a value that is not of its type.
    """
    import polars as pl
    from psycopg import ClientCursor

    with ClientCursor(connection) as cursor:
        # COPY takes no parameters: the values are quoted into the text here.
        text = cursor.mogrify(query, values)
        with cursor.copy(f"copy ({text}\n) to stdout (format csv)".encode()) as copy:
            body = b"".join(bytes(chunk) for chunk in copy)
    if not body:
        return pl.DataFrame(schema=schema)
    told = pl.read_csv(body, has_header=False, schema={name: _told(kind) for name, kind in schema.items()})
    return told.select(
        pl.from_epoch(name, time_unit="us").cast(kind)
        if kind.is_temporal()
        else pl.col(name) == "t"
        if kind == pl.Boolean
        else pl.col(name)
        for name, kind in schema.items()
    )


def _told(kind: Any) -> Any:
    """How CSV tells a value of this type: times as microseconds, booleans as t and f."""
    import polars as pl

    if kind.is_temporal():
        return pl.Int64
    return pl.String if kind == pl.Boolean else kind
