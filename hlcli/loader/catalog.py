"""What the database says of a table: a table is declared once, in sql/, and read from there."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from psycopg import sql

if TYPE_CHECKING:
    from psycopg import Connection

_COLUMNS = """
select a.attname, format_type(a.atttypid, a.atttypmod), a.attnotnull,
       a.atthasdef or a.attidentity <> '', pg_get_expr(d.adbin, d.adrelid),
       array_position(i.indkey::int2[], a.attnum)
from pg_attribute a
left join pg_attrdef d on d.adrelid = a.attrelid and d.adnum = a.attnum
left join pg_index i on i.indrelid = a.attrelid and i.indisprimary
where a.attrelid = %s::regclass and a.attnum > 0 and not a.attisdropped
order by a.attnum
"""
_CHECKS = """
select conname, pg_get_expr(conbin, conrelid) from pg_constraint
where conrelid = %s::regclass and contype = 'c' order by conname
"""
_PARTITIONED_BY = """
select attname::text from pg_partitioned_table join pg_attribute on attrelid = partrelid and attnum = partattrs[0]
where partrelid = %s::regclass and partstrat = 'r' and partnatts = 1
"""


@dataclass(frozen=True, slots=True)
class Column:
    """One column; `kind` is the SQL type as text, such as "timestamp with time zone"."""

    name: str
    kind: str
    not_null: bool
    has_default: bool
    default: str | None
    """The default as an SQL expression."""


@dataclass(frozen=True)
class Table:
    """A table as declared: its columns, the columns of its primary key in order, its CHECKs by name."""

    name: str
    columns: dict[str, Column]
    key: tuple[str, ...]
    checks: dict[str, str]
    partitioned_by: str | None = None
    """The column whose ranges the partitions are."""

    @cached_property
    def identifier(self) -> sql.Identifier:
        return sql.Identifier(*self.name.split("."))


def describe(connection: Connection[Any], name: str) -> Table:
    """Read a table's declaration. Raises ValueError when it has no primary key (every loaded table has one)."""
    rows = connection.execute(_COLUMNS, (name,)).fetchall()
    key = sorted((position, column) for column, *_, position in rows if position is not None)
    if not key:
        raise ValueError(f"{name} has no primary key")
    partitioned_by = connection.execute(_PARTITIONED_BY, (name,)).fetchone()
    return Table(
        name=name,
        columns={row[0]: Column(*row[:5]) for row in rows},
        key=tuple(column for _, column in key),
        checks=dict(connection.execute(_CHECKS, (name,)).fetchall()),
        partitioned_by=partitioned_by[0] if partitioned_by else None,
    )
