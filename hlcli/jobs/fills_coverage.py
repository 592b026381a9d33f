"""`hlcli fills coverage`: which times of whose fills came from S3 and from the API, and which are missing."""

from __future__ import annotations

import re
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from hlcli import migrations
from hlcli.jobs.backfill import LAUNCH
from hlcli.sqlfiles import query

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from psycopg import Connection

    from hlcli.settings import Settings

_BATCH = 5000

# Bounds are read as text: a range may end at infinity or beyond what a datetime holds.
_RANGE = re.compile(r'[\[(](?:"([^"]*)"|[^",]*),(?:"([^"]*)"|[^"\])]*)[\])]')


class Range(NamedTuple):
    """Times since `start`, before `end`: ISO 8601 in UTC; None is without end."""

    start: str | None
    end: str | None

    def as_json(self) -> dict[str, str | None]:
        return {"from": self.start, "to": self.end}


Ranges = list[Range]


@dataclass(frozen=True, slots=True)
class Stored:
    """A wallet's rows in table fills, of one source."""

    source: str
    """api or s3."""
    rows: int
    first: str
    last: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Wallet:
    """What is there of one wallet's fills, beside what S3 has of everybody's."""

    user_address: str
    state: str | None
    """None: the API was never asked for it."""
    wanted: Ranges
    api: Ranges
    """Served by the API."""
    cut_off: Ranges
    """Older than the API's limit on a wallet's history."""
    slices: Ranges
    """Of which the slices of TWAPs were asked for apart: the exchange keeps them for some two weeks."""
    missing: Ranges
    """Wanted, but neither served by the API nor in S3."""
    fills_count: int
    """Served by the API."""
    pages: int
    attempts: int
    oldest_fill_time: int | None
    """Milliseconds since 1970."""
    completed_at: str | None
    error: str | None
    stored: list[Stored] | None = None
    """None: not counted."""

    @property
    def known(self) -> bool:
        """Whether there is anything of it; where nothing was counted, it is one of the backfill's."""
        return self.state is not None or bool(self.stored)


@dataclass(frozen=True, slots=True, kw_only=True)
class S3:
    """What the objects of S3 cover, the same for every wallet, and the files, which claim nothing."""

    ranges: Ranges
    gaps: Ranges
    """Between the first and the last of them."""
    otherwise: Ranges
    """What is wanted of a wallet that was never asked for: up to the last hour in S3, or without any up to now."""
    objects: int
    objects_ok: int
    """Whose present version is in the table; the others' hours are not covered."""
    objects_without_hour: int
    """Whose keys do not tell one."""
    rows_ingested: int
    rows_rejected: int
    files: int
    """Files of this machine, of which nobody knows what they should hold."""
    rows_of_files: int


class InState(NamedTuple):
    """The wallets of one state."""

    wallets: int = 0
    fills: int = 0
    """Served by the API."""
    cut_off: int = 0
    """Wallets with a range that the API's limit cut off."""
    missing: int = 0
    """Wallets of which a wanted range is missing."""


@dataclass(frozen=True, slots=True)
class Coverage:
    """Everything that `hlcli fills coverage` shows."""

    s3: S3
    states: dict[str, InState]
    wallets: Iterator[Wallet]
    """Read while it is gone through."""


@contextmanager
def read_coverage(
    settings: Settings, *, users: Sequence[str] = (), state: str | None = None, limit: int | None = None
) -> Iterator[Coverage]:
    """What is there of all wallets of the backfill, those with gaps first, or of `users` (lower case), in their order.

    All of it is of one moment. The wallets come from the server as they are taken, so that half a million of them need
    no memory.

    Raises ConfigError for an old schema.
    """
    from psycopg import sql

    with migrations.connect_ready(settings, role="coverage") as connection, connection.transaction():
        connection.execute("set transaction isolation level repeatable read, read only")
        row = connection.execute(query("coverage", "s3"), {"launch": LAUNCH}).fetchone()
        assert row is not None
        covered, gaps, otherwise, of_wanted, *counts = row
        s3 = S3(
            ranges=ranges(covered),
            gaps=ranges(gaps),
            otherwise=ranges(otherwise),
            **{
                name: int(count)
                for name, count in zip(list(S3.__dataclass_fields__)[3:], counts, strict=True)
            },
        )
        values = {
            "s3": of_wanted,
            "otherwise": otherwise,
            "users": list(dict.fromkeys(users)),
            "state": state,
            "limit": limit,
        }
        states = {
            name: InState(wallets, int(fills), cut, missing)
            for name, wallets, fills, cut, missing in connection.execute(
                query("coverage", "by_state"), values
            )
        }
        which = sql.SQL(query("coverage", "of_users" if users else "of_all"))
        asked = sql.SQL(query("coverage", "wallets")).format(wallets=which)
        if users:
            values["s3"] = covered
            found = _in_order(connection, asked, values)
        else:
            found = (_wallet(row) for row in _streamed(connection, asked, values))
        yield Coverage(s3, states, found)


def _streamed(connection: Connection[Any], asked: Any, values: dict[str, Any]) -> Iterator[tuple[Any, ...]]:
    with connection.cursor("coverage") as cursor:
        cursor.itersize = _BATCH
        yield from cursor.execute(asked, values)


def _in_order(connection: Connection[Any], asked: Any, values: dict[str, Any]) -> Iterator[Wallet]:
    """The wallets that were named, with their rows in table fills."""
    stored: dict[str, list[Stored]] = {user: [] for user in values["users"]}
    for user, source, rows, first, last in connection.execute(query("coverage", "stored"), values):
        stored[user].append(Stored(source, rows, _iso(first), _iso(last)))
    found = {row[0]: _wallet(row, stored[row[0]]) for row in connection.execute(asked, values)}
    return (found[user] for user in values["users"] if user in found)


def _wallet(row: tuple[Any, ...], stored: list[Stored] | None = None) -> Wallet:
    user, state, wanted, covered, cut_off, slices, missing, fills, pages, attempts, *more = row
    oldest, completed_at, error = more
    return Wallet(
        user_address=user,
        state=state,
        wanted=ranges(wanted),
        api=ranges(covered),
        cut_off=ranges(cut_off),
        slices=ranges(slices),
        missing=ranges(missing),
        fills_count=fills,
        pages=pages,
        attempts=attempts,
        oldest_fill_time=oldest,
        completed_at=None if completed_at is None else _iso(completed_at),
        error=error,
        stored=stored,
    )


def ranges(text: str) -> Ranges:
    """The ranges of a tstzmultirange as PostgreSQL writes it in UTC."""
    return [Range(_bound(start), _bound(end)) for start, end in _RANGE.findall(text)]


def _bound(text: str) -> str | None:
    return _iso(text) if text else None


def _iso(text: str) -> str:
    """2026-11-21 12:05:00.25+00 as 2026-11-21T12:05:00.25Z."""
    return text.replace(" ", "T", 1).replace("+00", "Z", 1)
