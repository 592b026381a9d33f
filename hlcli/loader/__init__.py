"""From a frame to a table: check, COPY into a temporary stage, merge in key order.

The loader knows no table: columns, types, NOT NULL, CHECK and the primary key come from the catalog. A value that
the table would refuse is quarantined with its reason, so a batch never fails for one row. Everything happens in
the caller's transaction, together with the cursor and the ledger.
"""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, Any, LiteralString
from uuid import uuid4

from psycopg import errors, pq, sql

from hlcli.loader.catalog import Table, describe
from hlcli.loader.counts import Counts
from hlcli.loader.quarantine import Rejected, quarantine

if TYPE_CHECKING:
    from collections.abc import Sequence
    from uuid import UUID

    import polars as pl
    from psycopg import Connection

__all__ = ["Counts", "Merge", "Rejected", "Table", "describe", "load", "quarantine"]

COPY_ROWS = 20_000
# Below this the look whether all rows are new costs more than it saves.
PROBE_ROWS = 5_000


class Merge(Enum):
    """What happens to a row whose key is stored already."""

    IGNORE = "ignore"
    """The stored row stays: the source never changes a row."""
    UPDATE = "update"
    """The served row wins, where it differs."""
    NEWER = "newer"
    """The served row wins where its `newer` column is greater."""


def load(
    connection: Connection[Any],
    table: str | Table,
    frame: pl.DataFrame,
    *,
    rule: Merge,
    run_id: UUID,
    newer: str | None = None,
    touch: Sequence[str] = (),
) -> Counts:
    """Load a frame whose columns are the table's columns; returns what became of each row.

    Rows with one key within the frame: the last wins, with IGNORE the first, with NEWER the greatest `newer`.
    `touch` names columns (such as updated_at) that are written with a change but do not make one.

    Must be called inside a transaction. Raises ValueError for a frame that does not fit the table (an error of
    the caller) and psycopg.Error when the database fails.
    """
    from hlcli.loader import checks

    assert connection.info.transaction_status == pq.TransactionStatus.INTRANS, "load() needs a transaction"
    if isinstance(table, str):
        table = describe(connection, table)
    if frame.is_empty():
        return Counts()
    good, bad = checks.split(frame, table)
    rejected = [
        Rejected([row.get(name) for name in table.key], row.pop("_reason"), row, row.pop("_column"))
        for row in bad.to_dicts()
    ]
    rows = _one_per_key(good, table, rule, newer)
    stage = _stage(connection, table, rows)
    rejected += _break_checks(connection, table, stage, rows.columns)
    inserted, updated = _merge(connection, table, stage, rows.columns, rule, newer, touch, rows.height)
    connection.execute(sql.SQL("drop table {}").format(stage))
    duplicate = good.height - rows.height
    stored = frame.height - len(rejected) - duplicate
    return quarantine(connection, table.name, rejected, run_id) + Counts(
        served=frame.height - len(rejected),
        inserted=inserted,
        updated=updated,
        unchanged=stored - inserted - updated,
        duplicate=duplicate,
    )


def _one_per_key(good: pl.DataFrame, table: Table, rule: Merge, newer: str | None) -> pl.DataFrame:
    """The rows sorted by key, each key once: two workers then lock in one order, and indexes grow at their end."""
    import polars as pl

    keys = list(table.key)
    if rule is Merge.NEWER:
        assert newer is not None
        good = good.sort([*keys, newer], maintain_order=True)
    else:
        good = good.sort(keys, maintain_order=True)
    # In sorted order an equal key stands next door; a hash of all keys would cost more than the sort.
    again = pl.all_horizontal(pl.col(name).eq_missing(pl.col(name).shift(1)) for name in keys)
    if rule is not Merge.IGNORE:
        again = again.shift(-1, fill_value=False)
    good = good.filter(~again.fill_null(value=False))
    if rule is not Merge.IGNORE:
        return good
    # Where nothing is overwritten, a column without any value need not travel.
    empty = [name for name in good.columns if good[name].null_count() == good.height and name not in keys]
    return good.drop([name for name in empty if not table.columns[name].has_default])


def _staged_kind(kind: str) -> LiteralString:
    """The type of a stage column: what binary COPY sends for it (see checks.split)."""
    if kind in {"smallint", "integer", "bigint"}:
        return "bigint"
    if kind == "boolean":
        return "boolean"
    if kind == "double precision":
        return "double precision"
    if kind == "timestamp with time zone":
        return "timestamptz"
    return "text"


def _stage(connection: Connection[Any], table: Table, rows: pl.DataFrame) -> sql.Identifier:
    """COPY the rows into a new temporary table, in their order, and return its name."""
    import pgpq
    import polars as pl

    stage = sql.Identifier(f"stage_{uuid4().hex}")
    columns = sql.SQL(", ").join(
        sql.SQL("{} {}").format(sql.Identifier(name), sql.SQL(_staged_kind(table.columns[name].kind)))
        for name in rows.columns
    )
    connection.execute(sql.SQL("create temp table {} ({}) on commit drop").format(stage, columns))
    arrow = rows.to_arrow(compat_level=pl.CompatLevel.oldest())
    encoder = pgpq.ArrowToPostgresBinaryEncoder(arrow.schema)
    with connection.cursor().copy(sql.SQL("copy {} from stdin (format binary)").format(stage)) as copy:
        copy.write(encoder.write_header())
        for batch in arrow.to_batches(max_chunksize=COPY_ROWS):
            copy.write(encoder.write_batch(batch))
        copy.write(encoder.finish())
    return stage


def _typed(table: Table, columns: Sequence[str]) -> sql.Composed:
    """The stage's columns cast to the table's types; the checks have made sure that every cast succeeds."""
    return sql.SQL(", ").join(
        sql.SQL("{0}::{1} as {0}").format(sql.Identifier(name), sql.SQL(_trusted(table.columns[name].kind)))
        for name in columns
    )


def _trusted(text: Any) -> LiteralString:
    """A type or expression out of the catalog, which is as trustworthy as the schema itself."""
    return text  # type: ignore[no-any-return]


def _break_checks(
    connection: Connection[Any], table: Table, stage: sql.Identifier, columns: Sequence[str]
) -> list[Rejected]:
    """Take the rows that break a CHECK of the table out of the stage."""
    rejected = []
    for name, expression in table.checks.items():
        broken = connection.execute(
            sql.SQL(
                "delete from {stage} where ctid in"
                " (select place from (select ctid as place, {typed} from {stage}) typed where not ({check}))"
                " returning {columns}"
            ).format(
                stage=stage,
                typed=_typed(table, columns),
                check=sql.SQL(_trusted(expression)),
                columns=sql.SQL(", ").join(map(sql.Identifier, columns)),
            )
        ).fetchall()
        for values in broken:
            row = dict(zip(columns, values, strict=True))
            rejected.append(Rejected([row.get(key) for key in table.key], f"check {name}", row))
    return rejected


def _merge(
    connection: Connection[Any],
    table: Table,
    stage: sql.Identifier,
    columns: Sequence[str],
    rule: Merge,
    newer: str | None,
    touch: Sequence[str],
    staged: int,
) -> tuple[int, int]:
    """Move the stage into the table; returns (inserted, updated)."""
    insert = sql.SQL("insert into {table} as stored ({columns}) select {typed} from {stage}").format(
        table=table.identifier,
        columns=sql.SQL(", ").join(map(sql.Identifier, columns)),
        typed=_typed(table, columns),
        stage=stage,
    )
    # Counting what RETURNING gives instead of the command tag: Citus reports wrong tags.
    count = sql.SQL(
        "with merged as ({} {} returning {} as fresh)"
        " select count(*) filter (where fresh), count(*) filter (where not fresh) from merged"
    )
    if staged >= PROBE_ROWS and not _any_stored(connection, table, stage):
        # ON CONFLICT writes and confirms each row twice, a third of the time. When no key is stored, a plain
        # insert will do; a writer who gets in between is found out by the key, and the careful way follows.
        try:
            with connection.transaction():
                row = connection.execute(count.format(insert, sql.SQL(""), sql.SQL("true"))).fetchone()
                assert row is not None
                return row[0], row[1]
        except errors.UniqueViolation:
            pass
    values = [name for name in columns if name not in table.key]
    compared = [name for name in values if name not in touch]
    if rule is Merge.IGNORE or not compared:
        fresh, action = sql.SQL("true"), sql.Composed([sql.SQL("on conflict do nothing")])
    else:
        changes: sql.Composed = sql.SQL("({}) is distinct from ({})").format(
            _tuple("stored", compared), _tuple("excluded", compared)
        )
        if rule is Merge.NEWER:
            assert newer is not None
            changes = sql.SQL("{} > {}").format(
                sql.Identifier("excluded", newer), sql.Identifier("stored", newer)
            )
        action = sql.SQL("on conflict ({}) do update set {} where {}").format(
            sql.SQL(", ").join(map(sql.Identifier, table.key)),
            sql.SQL(", ").join(
                sql.SQL("{} = {}").format(sql.Identifier(name), sql.Identifier("excluded", name))
                for name in values
            ),
            changes,
        )
        fresh = sql.SQL("stored.xmax = 0")
    row = connection.execute(count.format(insert, action, fresh)).fetchone()
    assert row is not None
    return row[0], row[1]


def _tuple(relation: str, columns: Sequence[str]) -> sql.Composed:
    return sql.SQL(", ").join(sql.Identifier(relation, name) for name in columns)


def _any_stored(connection: Connection[Any], table: Table, stage: sql.Identifier) -> bool:
    """Whether any staged key is in the table already, by looking each one up in the key's index."""
    # An empty table answers for all keys at once.
    query = sql.SQL(
        "select case when exists (select from {table})"
        " then exists (select from {stage} staged join {table} stored on {same}) else false end"
    ).format(
        stage=stage,
        table=table.identifier,
        same=sql.SQL(" and ").join(
            sql.SQL("{} = {}").format(sql.Identifier("stored", name), sql.Identifier("staged", name))
            for name in table.key
        ),
    )
    with connection.transaction():
        # The stage has no statistics; a hash of a table of millions would be built for nothing.
        connection.execute(
            "select set_config('enable_hashjoin', 'off', true), set_config('enable_mergejoin', 'off', true)"
        )
        row = connection.execute(query).fetchone()
        connection.execute(
            "select set_config('enable_hashjoin', 'on', true), set_config('enable_mergejoin', 'on', true)"
        )
    return row == (True,)
