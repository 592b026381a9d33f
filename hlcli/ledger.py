"""The ledger of runs, the lock that keeps a job single, and the health that both tell.

The lock is a session-level advisory lock on the very connection that writes: a process that lost its lock has lost
its connection and cannot commit. A killed process frees it at once.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import zlib
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any
from uuid import UUID, uuid4

from hlcli import __version__
from hlcli.exitcodes import ConfigError, ExitCode, TemporaryError
from hlcli.loader import Counts
from hlcli.migrations import LOCK_NAMESPACE
from hlcli.sqlfiles import query

if TYPE_CHECKING:
    from collections.abc import Iterator

    from psycopg import Connection

    from hlcli.budget import Budget


@dataclass(frozen=True, slots=True)
class Channel:
    """What a job keeps filled: its name in the ledger, how often it should run, and the command that does it."""

    source: str
    name: str
    cadence: timedelta
    command: str
    cron: str
    """When the crontab starts it, in UTC; minutes are spread so that jobs do not all start at once."""
    member: str = ""
    """Which one, of a job whose runs may work side by side; the lock is the member's own then."""

    @property
    def label(self) -> str:
        return f"{self.source}/{self.name}"

    @property
    def lock_key(self) -> int:
        # Not hash(): it is salted per process. The top half of int4 is left to fixed keys such as migrations.
        name = f"{self.label} {self.member}" if self.member else self.label
        return zlib.crc32(name.encode()) % (2**30) + 2**30

    @property
    def stale_after(self) -> timedelta:
        """Spec 001: max(cadence * 2, cadence + 5 minutes)."""
        return max(self.cadence * 2, self.cadence + timedelta(minutes=5))


@dataclass(slots=True)
class Run:
    """One run of a channel, alive. `connection` writes and holds the lock; counts are those of committed units."""

    connection: Connection[Any]
    channel: Channel
    run_id: UUID
    started_at: datetime
    """By the database's clock."""
    budget: Budget | None = None
    counts: Counts = field(default_factory=Counts)
    units_ok: int = 0
    units_failed: int = 0
    rows_failed: int = 0
    _mutex: threading.Lock = field(default_factory=threading.Lock)

    @contextmanager
    def unit(self, connection: Connection[Any] | None = None) -> Iterator[Unit]:
        """A transaction for one unit, on the run's connection or on one of a worker of its own.

        Rows, cursors and add() inside it commit together or not at all.
        """
        unit = Unit(self, connection or self.connection)
        with unit.connection.transaction():
            yield unit
        with self._mutex:
            self.counts += unit.counts
            self.units_ok += unit.units_ok
            self.units_failed += unit.units_failed
            self.rows_failed += unit.rows_failed

    def cursor(self, name: str) -> Any:
        """What keep_cursor() last stored under this name, or None."""
        row = self.connection.execute(
            query("ledger", "cursor"), (self.channel.source, self.channel.name, name)
        ).fetchone()
        return row[0] if row else None

    def finish(
        self,
        connection: Connection[Any],
        status: str,
        exit_code: ExitCode,
        error: str | None,
        details: dict[str, Any],
    ) -> None:
        """Close the row, on any connection (the run's own may be lost); `error` must be masked already."""
        connection.execute(
            query("ledger", "finish"),
            {
                "status": status,
                "exit_code": int(exit_code),
                "error": error,
                "details": json.dumps(details, default=str),
                "run_id": self.run_id,
                **self.spent,
            },
        )

    def heard(self, connection: Connection[Any]) -> None:
        """Tell that the run is alive, on a connection that is not amid a unit."""
        connection.execute(query("ledger", "heard"), (self.run_id,))

    def release(self) -> None:
        """Give the lock back now: the server ends a closed session in its own time, and the next run may be near."""
        import psycopg

        with suppress(psycopg.Error):
            self.connection.execute(
                "select pg_advisory_unlock(%s, %s)", (LOCK_NAMESPACE, self.channel.lock_key)
            )
            if self.channel.member:
                self.connection.execute(
                    "select pg_advisory_unlock_shared(%s, %s)",
                    (LOCK_NAMESPACE, _whole(self.channel).lock_key),
                )

    @property
    def spent(self) -> dict[str, int]:
        """Requests and weight that this run charged to the budget so far."""
        return {
            "requests": self.budget.requests if self.budget else 0,
            "weight": self.budget.weight if self.budget else 0,
        }


@dataclass(slots=True)
class Unit:
    """One transaction of a run; what it counts is the run's once it is committed."""

    run: Run
    connection: Connection[Any]
    counts: Counts = field(default_factory=Counts)
    units_ok: int = 0
    units_failed: int = 0
    rows_failed: int = 0

    def add(
        self, counts: Counts | None = None, *, units_ok: int = 0, units_failed: int = 0, rows_failed: int = 0
    ) -> None:
        """Count what the unit did, here and in the ledger row. `rows_failed` rows were served but not handled.

        Raises TemporaryError, so that nothing of the unit is committed, when a later run has taken over.
        """
        counts = (counts or Counts()) + Counts(served=rows_failed)
        alive = self.connection.execute(
            query("ledger", "add"),
            {
                **asdict(counts),
                "units_ok": units_ok,
                "units_failed": units_failed,
                "failed": rows_failed,
                "run_id": self.run.run_id,
                **self.run.spent,
            },
        ).fetchone()
        if alive is None:
            raise TemporaryError("another run has taken over; nothing of this unit is kept")
        self.counts += counts
        self.units_ok += units_ok
        self.units_failed += units_failed
        self.rows_failed += rows_failed

    def keep_cursor(self, name: str, value: Any) -> None:
        """Store where to go on, with the rows that it speaks of."""
        channel = self.run.channel
        self.connection.execute(
            query("ledger", "keep_cursor"),
            (channel.source, channel.name, name, json.dumps(value), self.run.started_at),
        )


def begin(
    connection: Connection[Any], channel: Channel, *, locked_code: ExitCode = ExitCode.OK
) -> Run | None:
    """Take the channel's lock and open a ledger row; None, and a `skipped` row, when another run holds the lock.

    A member takes its own lock, and shares that of the channel with the others. Runs that are still marked running
    but hold no lock are dead: they become `abandoned`.

    Raises ConfigError behind a transaction pooler, where session locks do not hold. Needs autocommit.
    """
    assert connection.autocommit
    run_id, place = uuid4(), (socket.gethostname(), os.getpid(), __version__)
    where = (LOCK_NAMESPACE, channel.lock_key)
    row = connection.execute("select pg_try_advisory_lock(%s, %s)", where).fetchone()
    if row != (True,):
        connection.execute(
            query("ledger", "skip"),
            (run_id, channel.source, channel.name, channel.member, int(locked_code), *place),
        )
        return None
    held = connection.execute(
        "select exists (select from pg_locks where locktype = 'advisory' and pid = pg_backend_pid()"
        " and classid = %s and objid = %s)",
        where,
    ).fetchone()
    if held != (True,):
        raise ConfigError(
            "a transaction pooler stands before the database, where locks do not hold: "
            "point DATABASE_URL at the server itself or at a session pool"
        )
    if channel.member:
        connection.execute(
            "select pg_advisory_lock_shared(%s, %s)", (LOCK_NAMESPACE, _whole(channel).lock_key)
        )
    connection.execute(query("ledger", "abandon"), (LOCK_NAMESPACE, channel.source, channel.name))
    row = connection.execute(
        query("ledger", "begin"),
        (run_id, channel.source, channel.name, channel.member, channel.lock_key, *place),
    ).fetchone()
    assert row is not None
    return Run(connection, channel, run_id, row[0])


def _whole(channel: Channel) -> Channel:
    """The channel of which this is a member."""
    return replace(channel, member="")


@dataclass(frozen=True, slots=True)
class Health:
    """A channel's state as operators see it."""

    channel: Channel
    state: str
    """missing, failed, stale, running or ok."""
    last_success: datetime | None
    age: timedelta | None
    last_status: str | None
    error: str | None
    rows: int
    """Rows inserted or updated by the last run."""
    rejected: int
    skips: int
    """Runs skipped in a row because another one held the lock."""


def health(connection: Connection[Any], channel: Channel) -> Health:
    """How a channel is doing. A run counts as running while its lock is held, however its row reads."""
    locked = connection.execute(
        query("ledger", "lock_held"), (LOCK_NAMESPACE, channel.lock_key)
    ).fetchone() == (True,)
    row = connection.execute(
        query("ledger", "health"), {"source": channel.source, "channel": channel.name, "locked": locked}
    ).fetchone()
    assert row is not None
    last, last_success, current, skips, now = row
    age = now - last_success if last_success else None
    alive = datetime.fromisoformat(current["heard_at"] or current["started_at"]) if current else None
    # A run that hangs must not look healthy for ever: beyond the time of a stale success it is stale itself.
    if alive and (now - max(alive, last_success or alive)) <= channel.stale_after:
        state = "running"
    elif alive:
        state = "stale"
    elif last is None:
        state = "missing"
    elif last["status"] in {"failed", "interrupted", "abandoned", "running"}:
        state = "failed"
    elif age is None or age > channel.stale_after:
        state = "stale"
    else:
        state = "ok"
    status = last and ("abandoned" if last["status"] == "running" else last["status"])
    return Health(
        channel=channel,
        state=state,
        last_success=last_success,
        age=age,
        last_status=status,
        error=last["error"] if last else None,
        rows=last["rows_inserted"] + last["rows_updated"] if last else 0,
        rejected=last["rows_rejected"] if last else 0,
        skips=skips,
    )
