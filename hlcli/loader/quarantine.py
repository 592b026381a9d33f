"""Rows that no table can take are kept with the reason, once per key and reason."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hlcli.loader.counts import Counts

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from uuid import UUID

    from psycopg import Connection

MAX_PAYLOAD = 20_000
MAX_KEY = 300

_KEEP = """
insert into rejected_rows (table_name, row_key, reason, column_name, payload, first_run_id, last_run_id)
values (%s, %s, %s, %s, %s, %s, %s)
on conflict (table_name, row_key, reason) do update
    set times = rejected_rows.times + 1, payload = excluded.payload, column_name = excluded.column_name,
        last_run_id = excluded.last_run_id, last_seen_at = excluded.last_seen_at
returning times = 1
"""


@dataclass(frozen=True, slots=True)
class Rejected:
    """One row that was refused: the values of its key as far as known, why, and all of it."""

    key: Sequence[Any]
    reason: str
    payload: Mapping[str, Any] | str
    column: str | None = None


def quarantine(connection: Connection[Any], table: str, rows: Iterable[Rejected], run_id: UUID) -> Counts:
    """Keep rejected rows, within the caller's transaction; returns how many, and how many were new."""
    entries: list[tuple[Any, ...]] = [
        (table, _key(row), row.reason, row.column, _json(row.payload)[:MAX_PAYLOAD], run_id, run_id)
        for row in rows
    ]
    if not entries:
        return Counts()
    new = 0
    entries.sort(key=_identity)  # two runs then lock in one order
    with connection.cursor() as cursor:
        cursor.executemany(_KEEP, entries, returning=True)
        for result in cursor.results():
            new += result.fetchone() == (True,)
    return Counts(served=len(entries), rejected=len(entries), new_rejects=new)


def _identity(entry: tuple[Any, ...]) -> tuple[Any, ...]:
    return entry[:3]


def _json(payload: Mapping[str, Any] | str) -> str:
    # ensure_ascii turns the NUL characters and lone surrogates, for which rows come here, into harmless text.
    try:
        return json.dumps(payload, default=str)
    except RecursionError:
        return '"nested too deeply to show"'


def _key(row: Rejected) -> str:
    """The row's identity: its key, or a digest of the whole row when the key is missing or too long."""
    text = json.dumps(list(row.key), default=str)
    if len(text) <= MAX_KEY and any(value is not None for value in row.key):
        return text
    return "sha256:" + hashlib.sha256(_json(row.payload).encode()).hexdigest()
