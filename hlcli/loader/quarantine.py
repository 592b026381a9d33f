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

STATEMENT_ROWS = 2_000

_KEEP = """
insert into rejected_rows (table_name, row_key, reason, column_name, payload, times, first_run_id, last_run_id)
select %(table)s, row_key, reason, column_name, payload, times, %(run_id)s, %(run_id)s
from unnest(%(keys)s::text[], %(reasons)s::text[], %(columns)s::text[], %(payloads)s::text[], %(times)s::bigint[])
    rejected (row_key, reason, column_name, payload, times)
on conflict (table_name, row_key, reason) do update
    set times = rejected_rows.times + excluded.times, payload = excluded.payload, column_name = excluded.column_name,
        last_run_id = excluded.last_run_id, last_seen_at = excluded.last_seen_at
returning row_key, reason, times
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
    # One entry a key and reason: a statement cannot touch a row twice. The last payload is kept.
    entries: dict[tuple[str, str], tuple[str | None, str, int]] = {}
    served = 0
    for row in rows:
        served += 1
        identity = (_key(row), row.reason)
        times = entries[identity][2] if identity in entries else 0
        entries[identity] = (row.column, _json(row.payload)[:MAX_PAYLOAD], times + 1)
    new = 0
    identities = sorted(entries)  # two runs then lock in one order
    for start in range(0, len(identities), STATEMENT_ROWS):
        chunk = identities[start : start + STATEMENT_ROWS]
        columns, payloads, times_each = zip(*(entries[identity] for identity in chunk), strict=True)
        stored = connection.execute(
            _KEEP,
            {
                "table": table,
                "run_id": run_id,
                "keys": [key for key, _ in chunk],
                "reasons": [reason for _, reason in chunk],
                "columns": list(columns),
                "payloads": list(payloads),
                "times": list(times_each),
            },
        )
        new += sum(times == entries[key, reason][2] for key, reason, times in stored)
    return Counts(served=served, rejected=served, new_rejects=new)


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
