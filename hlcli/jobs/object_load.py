"""The transaction of one object: its rows, and its row in etl_s3_ingest_log."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import datetime
from typing import TYPE_CHECKING, Any

from psycopg import sql

from hlcli.loader import Counts, Merge, load, quarantine
from hlcli.logs import log
from hlcli.sources import files
from hlcli.sqlfiles import query

if TYPE_CHECKING:
    import polars as pl

    from hlcli.jobs.object_plan import Dataset
    from hlcli.ledger import Unit
    from hlcli.loader import Table
    from hlcli.s3 import StoredObject

# Beyond this the rejected rows of one object are no oddities any more but the object itself.
MAX_REJECTED = 100_000
# When of so many rows, the first of an object, none can be stored, the others are not looked at.
HOPELESS_ROWS = 1_000


class Loading:
    """The transaction of one object."""

    def __init__(
        self, unit: Unit, dataset: Dataset, table: Table, stored: StoredObject, version: dict[str, Any]
    ) -> None:
        self._unit, self._dataset, self._table = unit, dataset, table
        self._stored, self._version = stored, version
        self._counts = Counts()
        self._first: datetime | None = None
        self._last: datetime | None = None
        self._object_id = self._begin()

    def _begin(self) -> int:
        """The object's number; the rows of a version that was replaced are removed."""
        connection = self._unit.connection
        connection.execute(query("objects", "begin"), self._version)
        row = connection.execute(query("objects", "stored"), self._version).fetchone()
        assert row is not None
        object_id, loaded, first, last = row
        if loaded not in {None, self._version["version"]} and first is not None:
            connection.execute(
                sql.SQL(query("objects", "remove_rows")).format(
                    table=self._table.identifier,
                    object_id=sql.Literal(object_id),
                    time=sql.Identifier(self._dataset.time),
                    first=sql.Literal(first),
                    last=sql.Literal(last),
                )
            )
            # After that, which waits for whoever is loading a row of ours: only then is that object seen as done.
            owed = connection.execute(query("objects", "read_again"), {"object_id": object_id}).fetchall()
            elsewhere = [key for key, bucket in owed if bucket != self._stored.bucket]
            if elsewhere:
                log.warning(
                    "%s was replaced: rows that %s holds, too, come back when it is read again",
                    self._stored.key,
                    elsewhere[0],
                )
        return int(object_id)

    def add(self, rows: files.Rows) -> Counts:
        """Load a batch; returns the counts of all so far. Raises UnusableError when too much of it is rejected."""
        import polars as pl

        connection, run_id = self._unit.connection, self._unit.run.run_id
        key = self._stored.key
        # Such a row may be told by no more than its place: the same in every object.
        told = [replace(each, key=[key, *each.key]) for each in rows.rejected]
        self._counts += quarantine(connection, self._table.name, told, run_id)
        if rows.frame.height:
            first, last = _span(rows.frame[self._dataset.time])
            self._first, self._last = min(self._first or first, first), max(self._last or last, last)
            own = {"object_id": self._object_id, **self._dataset.columns(self._stored)}
            frame = rows.frame.with_columns(pl.lit(value).alias(name) for name, value in own.items())
            self._counts += load(
                connection,
                self._table,
                frame,
                rule=Merge.COMPLETE,
                newer=self._dataset.newer,
                touch=[*own, *self._dataset.touch],
                run_id=run_id,
            )
        counts = self._counts
        if counts.rejected > MAX_REJECTED or counts.rejected == counts.served > HOPELESS_ROWS:
            raise self._unstorable()
        return counts

    def finish(self) -> Counts:
        """Write the object's row in the log and in the ledger; returns the counts.

        Raises LackingError when no row could be stored: then the object is another kind of thing, and neither shall
        it take the place of the version before nor its content fill the quarantine.
        """
        counts = self._counts
        if 0 < counts.served == counts.rejected:
            raise self._unstorable()
        self._unit.connection.execute(
            query("objects", "loaded"),
            {
                **self._version,
                "object_id": self._object_id,
                "read": counts.served,
                "ingested": counts.inserted + counts.updated,
                "inserted": counts.inserted,
                "rejected": counts.rejected,
                "first": self._first,
                "last": self._last,
            },
        )
        self._unit.add(counts, units_ok=1)
        return counts

    def _unstorable(self) -> files.LackingError:
        counts = self._counts
        row = self._unit.connection.execute(
            query("objects", "first_reason"),
            {
                "table_name": self._table.name,
                "run_id": self._unit.run.run_id,
                "row": f'"object_id": {self._object_id}[,}}]',
                "place": json.dumps([self._stored.key])[:-1],
            },
        ).fetchone()
        reason = row[0] if row else "unknown"
        return files.LackingError(
            f"{counts.rejected:,} of {counts.served:,} rows cannot be stored, the first for: {reason}"
        )


def _span(times: pl.Series) -> tuple[datetime, datetime]:
    """The first and the last of times, of which there is one at least and none is missing."""
    first, last = times.min(), times.max()
    assert isinstance(first, datetime)
    assert isinstance(last, datetime)
    return first, last
