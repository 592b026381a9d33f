"""From a frame to a table: check, COPY into a temporary stage, merge in key order.

The loader knows no table: columns, types, NOT NULL, CHECK and the primary key come from the catalog. A value that
the table would refuse is quarantined with its reason, so a batch never fails for one row. Everything happens in
the caller's transaction, together with the cursor and the ledger.
"""

from __future__ import annotations

from contextlib import suppress
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
# Below this a plain insert that fails costs more than one that succeeds saves.
MANY_ROWS = 5_000
# Types that are staged as themselves, so that a frame sorts them as the database does.
ORDERED = ("smallint", "integer", "bigint", "timestamp with time zone")


class Merge(Enum):
    """What happens to a row whose key is stored already."""

    IGNORE = "ignore"
    """The stored row stays: the source never changes a row."""
    UPDATE = "update"
    """The served row wins, where it differs."""
    NEWER = "newer"
    """The served row wins where its `newer` column is greater."""
    COMPLETE = "complete"
    """The served value wins where it is one, so that NULL never replaces anything; with `newer`, a stored row whose
    `newer` is greater (of several columns the first that differs) keeps its values and only its NULLs are filled."""


def load(
    connection: Connection[Any],
    table: str | Table,
    frame: pl.DataFrame,
    *,
    rule: Merge,
    run_id: UUID,
    newer: str | Sequence[str] | None = None,
    touch: Sequence[str] = (),
    known_by: Sequence[str] | None = None,
) -> Counts:
    """Load a frame whose columns are the table's columns; returns what became of each row.

    Rows with one key within the frame: the last wins, with IGNORE the first, with NEWER the greatest `newer`.
    `touch` names columns (such as updated_at) that are written with a change but do not make one. A partitioned
    table needs a partition for every time that checks.py lets through: give it a DEFAULT one. `known_by` names the
    columns that identify a row in quarantine, by default the primary key: a key that holds the hour of the run would
    be new there every hour.

    Must be called inside a transaction. Raises ValueError for a frame that does not fit the table (an error of
    the caller) and psycopg.Error when the database fails.
    """
    from hlcli.loader import checks

    assert connection.info.transaction_status == pq.TransactionStatus.INTRANS, "load() needs a transaction"
    if isinstance(table, str):
        table = describe(connection, table)
    rank = [newer] if isinstance(newer, str) else list(newer or ())
    if rule is Merge.NEWER and (len(rank) != 1 or table.columns[rank[0]].kind not in ORDERED):
        raise ValueError(f"{table.name}: {newer} cannot tell which row is newer")
    if frame.is_empty():
        return Counts()
    identity = known_by or table.key
    good, bad = checks.split(frame, table)
    rejected = [
        Rejected([row.get(name) for name in identity], row.pop("_reason"), row, row.pop("_column"))
        for row in bad.to_dicts()
    ]
    rows, repeats = _sorted(good, table, rule, rank)
    stage = _stage(connection, table, rows)
    duplicate = 0
    # Of rows with one key a bad one must not win, so then the checks come first. Else the table itself checks as it
    # takes the rows, and they are looked through only if it refused one: that is a fifth of the time.
    checked = repeats
    if repeats:
        rejected += _break_checks(connection, table, stage, rows.columns, identity)
        duplicate = _drop_repeats(connection, table, stage, rule)
    while True:
        staged = frame.height - len(rejected) - duplicate
        try:
            with connection.transaction():
                inserted, updated = _merge(connection, table, stage, rows.columns, rule, rank, touch, staged)
            break
        except errors.CheckViolation:
            if checked:
                raise
            checked = True
            rejected += _break_checks(connection, table, stage, rows.columns, identity)
    connection.execute(sql.SQL("drop table {}").format(stage))
    return quarantine(connection, table.name, rejected, run_id) + Counts(
        served=frame.height - len(rejected),
        inserted=inserted,
        updated=updated,
        unchanged=staged - inserted - updated,
        duplicate=duplicate,
    )


def _sorted(good: pl.DataFrame, table: Table, rule: Merge, rank: Sequence[str]) -> tuple[pl.DataFrame, bool]:
    """The rows in key order, and whether a key repeats. Two workers then lock in one order, and indexes grow well."""
    import polars as pl

    keys = list(table.key)
    rows = good.sort([*keys, *rank] if rule is Merge.NEWER else keys, maintain_order=True)
    # In sorted order an equal key stands next door; a hash of all keys would cost more than the sort.
    again = pl.all_horizontal(pl.col(name).eq_missing(pl.col(name).shift(1)) for name in keys)
    repeats = rows.height > 1 and bool(rows.select(again.slice(1).any()).item())
    if rule in {Merge.IGNORE, Merge.COMPLETE}:
        # Where NULL overwrites nothing, a column without any value need not travel.
        empty = [name for name in rows.columns if rows[name].null_count() == rows.height]
        rows = rows.drop([name for name in empty if not table.columns[name].has_default and name not in keys])
    return rows, repeats


def _drop_repeats(connection: Connection[Any], table: Table, stage: sql.Identifier, rule: Merge) -> int:
    """Leave one row of each key in the stage: the first with IGNORE, else the last; returns how many went."""
    dropped = connection.execute(
        sql.SQL(
            "with dropped as (delete from {stage} where ctid in (select place from (select ctid as place,"
            " row_number() over (partition by {key} order by ctid {order}) as turn from {stage}) turns"
            " where turn > 1) returning 1) select count(*) from dropped"
        ).format(
            stage=stage,
            key=sql.SQL(", ").join(map(sql.Identifier, table.key)),
            order=sql.SQL("asc" if rule is Merge.IGNORE else "desc"),
        )
    ).fetchone()
    assert dropped is not None
    return int(dropped[0])


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
    connection: Connection[Any],
    table: Table,
    stage: sql.Identifier,
    columns: Sequence[str],
    identity: Sequence[str],
) -> list[Rejected]:
    """Take the rows that break a CHECK of the table out of the stage."""
    rejected = []
    whole = sql.SQL(", ").join(
        [
            _typed(table, columns),
            # A CHECK may speak of columns that the frame leaves to their defaults.
            *(
                sql.SQL("({})::{} as {}").format(
                    sql.SQL(_trusted(column.default or "null")),
                    sql.SQL(_trusted(column.kind)),
                    sql.Identifier(name),
                )
                for name, column in table.columns.items()
                if name not in columns
            ),
        ]
    )
    for name, expression in table.checks.items():
        broken = connection.execute(
            sql.SQL(
                "delete from {stage} where ctid in"
                " (select place from (select ctid as place, {whole} from {stage}) typed where not ({check}))"
                " returning {columns}"
            ).format(
                stage=stage,
                whole=whole,
                check=sql.SQL(_trusted(expression)),
                columns=sql.SQL(", ").join(map(sql.Identifier, columns)),
            )
        ).fetchall()
        for values in broken:
            row = dict(zip(columns, values, strict=True))
            rejected.append(Rejected([row.get(key) for key in identity], f"check {name}", row))
    return rejected


def _merge(
    connection: Connection[Any],
    table: Table,
    stage: sql.Identifier,
    columns: Sequence[str],
    rule: Merge,
    rank: Sequence[str],
    touch: Sequence[str],
    staged: int,
) -> tuple[int, int]:
    """Move the stage, which holds `columns`, into the table; returns (inserted, updated)."""
    insert = sql.SQL("insert into {table} as stored ({columns}) select {typed} from {stage}").format(
        table=table.identifier,
        columns=sql.SQL(", ").join(map(sql.Identifier, columns)),
        typed=_typed(table, columns),
        stage=stage,
    )
    counted = sql.SQL("with merged as ({} {} returning 1) select count(*) from merged")
    values = [name for name in columns if name not in table.key]
    compared = [name for name in values if name not in touch]
    ignore = rule is Merge.IGNORE or not compared
    if staged >= MANY_ROWS:
        # ON CONFLICT writes and confirms each row twice, a third of the time. Many rows are mostly new ones, and
        # then a plain insert will do; the first key that is stored ends it, and the careful way follows.
        with suppress(errors.UniqueViolation), connection.transaction():
            return _number(connection, counted.format(insert, sql.SQL(""))), 0
    # What is new is found out by inserting it: xmax, which would tell, is out of reach in partitioned tables, Citus
    # reports wrong command tags, and how to look keys up in new partitions the planner guesses badly.
    key = sql.SQL("on conflict ({})").format(sql.SQL(", ").join(map(sql.Identifier, table.key)))
    inserted = _number(connection, counted.format(insert, sql.SQL("{} do nothing").format(key)))
    if ignore or inserted == staged:
        return inserted, 0
    result = {name: _result(rule, name, rank) for name in values}
    if rule is Merge.NEWER:
        changes = sql.SQL("{} > {}").format(_ranks("excluded", rank), _ranks("stored", rank))
    else:
        changes = sql.SQL("({}) is distinct from ({})").format(
            sql.SQL(", ").join(sql.Identifier("stored", name) for name in compared),
            sql.SQL(", ").join(result[name] for name in compared),
        )
    action = sql.SQL("{} do update set {} where {}").format(
        key,
        sql.SQL(", ").join(sql.SQL("{} = {}").format(sql.Identifier(name), result[name]) for name in values),
        changes,
    )
    # The rows just inserted are as they are served, and so no changes.
    return inserted, _number(connection, counted.format(insert, action))


def _number(connection: Connection[Any], query: sql.Composed) -> int:
    row = connection.execute(query).fetchone()
    assert row is not None
    return int(row[0])


def _ranks(relation: str, rank: Sequence[str]) -> sql.Composed:
    return sql.SQL("({})").format(sql.SQL(", ").join(sql.Identifier(relation, name) for name in rank))


def _result(rule: Merge, name: str, rank: Sequence[str]) -> sql.Composable:
    """What a column of a stored row becomes."""
    served, stored = sql.Identifier("excluded", name), sql.Identifier("stored", name)
    if rule is not Merge.COMPLETE:
        return served
    if not rank:
        return sql.SQL("coalesce({}, {})").format(served, stored)
    return sql.SQL("case when {} > {} then coalesce({}, {}) else coalesce({}, {}) end").format(
        _ranks("stored", rank), _ranks("excluded", rank), stored, served, served, stored
    )
