"""The queue of wallets that any number of workers share: who is asked for, and leases on them.

A lease ends by the database's clock. What its holder brings later is refused by its token, so a machine that died, or
slept, does no harm to whoever has taken over.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, LiteralString, NamedTuple

from psycopg import errors, sql
from psycopg.types.multirange import Multirange, TimestamptzMultirange
from psycopg.types.range import Range as Bounds

from hlcli.exitcodes import UsageError
from hlcli.jobs.contention import persist
from hlcli.logs import log
from hlcli.migrations import LOCK_NAMESPACE
from hlcli.sources.user_fills import HISTORY_LIMIT, SLICES
from hlcli.sqlfiles import query

if TYPE_CHECKING:
    from collections.abc import Sequence
    from uuid import UUID

    from psycopg import Connection

    from hlcli.jobs.backfill_store import Fetched
    from hlcli.sources.user_fills import Range

# Beside the locks of channels, which are above 2**30.
ENLIST_LOCK = 2
# A wallet over which so many workers in a row ended is left alone.
MOST_ATTEMPTS = 5
LOOK_AGAIN_S = 1.0
RELEASES, RELEASE_AGAIN_S = 20, 0.1
# How far from the limit a wallet's number of fills may be when it was cut off there: some come while we count.
NEAR_LIMIT = HISTORY_LIMIT // 50
COUNTED_AT_ONCE = timedelta(days=30)
# Fills are served a little after they happened.
YOUNGEST = timedelta(minutes=1)
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MS = timedelta(milliseconds=1)


class Window(NamedTuple):
    """The times that are wanted of each wallet: [since, until)."""

    since: datetime
    until: datetime


@dataclass(frozen=True, slots=True)
class Shard:
    """Which wallets a worker begins with; `own` is without helping others with theirs."""

    worker: int
    workers: int
    own: bool = False


@dataclass(slots=True)
class Lease:
    """A wallet that is ours for now, and the ranges of milliseconds that are left to ask of it."""

    user: str
    token: UUID
    fills: list[Range]
    slices: list[Range]
    lost: bool = False
    """What was brought under it was refused."""


class Left(NamedTuple):
    """How many wallets wait or are worked on: of all that were asked for, and of the worker's own shard."""

    all: int
    shard: int


class Queue:
    """One worker's view of the queue, on a connection of its own. Safe to use from several threads.

    `users` restricts it to these wallets (None: all). Needs autocommit.
    """

    def __init__(
        self,
        connection: Connection[Any],
        owner: UUID,
        shard: Shard,
        lease: timedelta,
        users: Sequence[str] | None = None,
    ) -> None:
        self.connection = connection
        self._helping = False
        self.given_up: list[str] = []
        """Wallets that this worker set aside, as too many others ended over them."""
        self.lease = lease
        self._values: dict[str, Any] = {
            "owner": owner,
            "lease": lease,
            "named": users is not None,
            "shard": shard.worker if shard.workers > 1 else None,
            "workers": shard.workers,
        }
        self._shard = shard
        choose(connection, users or ())

    def want(self, window: Window) -> Window:
        """Enlist the wallets and ask for a window of each; what is covered of it already is not asked for again.

        Returns the part of the window that is past.

        Raises UsageError for a window that has not begun yet.
        """
        window = past(self.connection, window)
        times = {"since": window.since, "until": window.until}
        if self._values["named"]:
            self._enlist(sql.SQL(query("backfill", "wallets_chosen")), times)
        else:
            self._enlist_all(times)
        # Other workers hold wallets in another order.
        persist(
            lambda: self.connection.execute(query("backfill", "want"), {**self._values, **times}),
            "asking for a window",
            conflicts=(errors.DeadlockDetected,),
        )
        return window

    def _enlist_all(self, times: dict[str, datetime]) -> None:
        """Enlist all there are. Of workers that start together one looks for them: with hundreds of days it takes long."""
        connection = self.connection
        (began,) = _row(connection.execute("select clock_timestamp()").fetchone())
        lock = (LOCK_NAMESPACE, ENLIST_LOCK)
        while connection.execute("select pg_try_advisory_lock(%s, %s)", lock).fetchone() != (True,):
            time.sleep(LOOK_AGAIN_S)
        try:
            known = connection.execute(query("backfill", "is_enlisted"), {"began": began, **times}).fetchone()
            if known != (True,):
                for_all_wallets(connection, query("backfill", "enlist"), times)
                connection.execute(query("backfill", "enlisted"), times)
        finally:
            connection.execute("select pg_advisory_unlock(%s, %s)", lock)

    def _enlist(self, wallets: sql.Composable, times: dict[str, datetime]) -> None:
        self.connection.execute(sql.SQL(query("backfill", "enlist")).format(wallets=wallets), times)

    def claim(self, most: int) -> list[Lease]:
        """Lease up to so many wallets: of the own shard, and when that is done of the others'."""
        given_up = self.connection.execute(query("backfill", "give_up"), {"attempts": MOST_ATTEMPTS})
        self.given_up += [user for (user,) in given_up]
        rows = [] if self._helping else self._claim(most, sql.SQL("asc"), self._values["shard"])
        if not rows and self._shard.workers > 1 and not self._shard.own:
            # From the other end, where the others are last. What expires of the own shard is among them.
            self._helping = True
            rows = self._claim(most, sql.SQL("desc"), None)
        return [
            Lease(user, token, _milliseconds(todo), _milliseconds(slices))
            for user, token, todo, slices in rows
        ]

    def _claim(self, most: int, order: sql.SQL, shard: int | None) -> list[tuple[Any, ...]]:
        statement = sql.SQL(query("backfill", "claim")).format(order=order)
        return self.connection.execute(statement, {**self._values, "most": most, "shard": shard}).fetchall()

    def renew(self) -> None:
        """Prolong the leases that have not expired."""
        self.connection.execute(query("backfill", "renew"), self._values)

    def release(self) -> None:
        """Give back what is still leased; what a transaction holds that is about to end, a moment later."""
        for _ in range(RELEASES):
            self.connection.execute(query("backfill", "release"), self._values)
            if self.connection.execute(query("backfill", "holds_any"), self._values).fetchone() == (False,):
                break
            time.sleep(RELEASE_AGAIN_S)

    def uncovered(self, window: Window) -> int:
        """How many of the wallets that were named are not covered, be it that another run asked for another window."""
        values = {**self._values, "since": window.since, "until": window.until}
        if not self._shard.own:
            values["shard"] = None
        return int(_row(self.connection.execute(query("backfill", "count_todo"), values).fetchone())[0])

    def knows_any(self) -> bool:
        """Whether there is any wallet in the queue, be it done."""
        return self.connection.execute("select from backfill_progress limit 1").fetchone() is not None

    def has_left(self) -> bool:
        """Whether anything that this worker may do is left, now or when another one's lease expires."""
        left = self.left()
        return bool(left.shard if self._shard.own else left.all)

    def left(self) -> Left:
        """How many wallets are left; those that are leased are, too."""
        return Left(*_row(self.connection.execute(query("backfill", "left"), self._values).fetchone()))


def past(connection: Connection[Any], window: Window) -> Window:
    """The part of a window that lies in the past by the database's clock, up to a whole minute, in whole milliseconds."""
    (now,) = _row(connection.execute("select hlcli_now()").fetchone())
    latest = (now - YOUNGEST).replace(second=0, microsecond=0)
    since, until = (
        each.replace(microsecond=each.microsecond // 1000 * 1000)
        for each in (window.since, min(window.until, latest))
    )
    if since >= until:
        raise UsageError(f"{since:%Y-%m-%d %H:%M}Z lies in the future: there are no fills since then")
    return Window(since, until)


def choose(connection: Connection[Any], users: Sequence[str]) -> None:
    """Begin a list of wallets, a temporary table of this connection, with these."""
    connection.execute(query("backfill", "chosen"))
    connection.execute(query("backfill", "choose"), {"users": list(users)})


def for_all_wallets(
    connection: Connection[Any], statement: LiteralString, values: dict[str, Any] | None = None
) -> None:
    """Run a statement whose {wallets} are, one query after the other, those in `fills` and those ever watched."""

    def run(wallets: sql.Composable) -> None:
        connection.execute(sql.SQL(statement).format(wallets=wallets), values)

    run(sql.SQL(query("backfill", "wallets_of_universe")))
    for place in connection.execute(query("backfill", "parts_of_fills")).fetchall():
        part = sql.Identifier(*place)
        try:
            run(sql.SQL(query("backfill", "wallets_of_part")).format(part=part))
        except errors.FeatureNotSupported:
            run(sql.SQL(query("backfill", "wallets_of_part_at_once")).format(part=part))
        except errors.UndefinedTable:
            log.info("%s: dropped meanwhile, with what was too old", place[1])


def keep_page(connection: Connection[Any], page: Fetched, *, lasts: timedelta) -> bool:
    """Note what a page covers, in the transaction that stores its fills; False when the lease is no longer ours."""
    nothing = TimestamptzMultirange()
    covered, cut_off = _multirange(page.covered), _multirange(page.cut_off)
    of_slices = page.kind == SLICES
    row = connection.execute(
        query("backfill", "keep_page"),
        {
            "user": page.lease.user,
            "token": page.lease.token,
            "covered": nothing if of_slices else covered,
            "cut_off": nothing if of_slices else cut_off,
            "slices_covered": covered if of_slices else nothing,
            "doubtful": _multirange(page.doubtful),
            "weight": page.weight,
            "fills": page.fills,
            "oldest": page.oldest,
            "lease": lasts,
        },
    ).fetchone()
    return row is not None


def decide(connection: Connection[Any], lease: Lease) -> None:
    """Find out whether what is doubtful of a wallet was cut off, when all that it is served is stored.

    It was where an older fill had been served before. Where the number of fills since the oldest one, up to when that
    was served or up to now, is just the source's limit, that one is where the history is cut off, though nothing else
    shows it. Else the wallet began there. Needs autocommit.
    """
    values = {"user": lease.user, "token": lease.token}
    row = connection.execute(query("backfill", "doubtful"), values).fetchone()
    if row is None:
        return
    doubtful, oldest, *moments = row

    def is_cut_off(history_from: datetime) -> bool:
        if oldest is not None and oldest < history_from:
            return True
        counts = (_count_fills(connection, lease.user, history_from, until) for until in moments)
        return any(abs(count - HISTORY_LIMIT) <= NEAR_LIMIT for count in counts)

    cut_off = TimestamptzMultirange([each for each in doubtful if is_cut_off(each.upper)])
    connection.execute(query("backfill", "decide"), {**values, "cut_off": cut_off})


def _count_fills(connection: Connection[Any], user: str, since: datetime, until: datetime) -> int:
    """How many of a wallet's fills are stored, or so many that they are too many for the limit.

    Month by month: a statement locks every partition that it may read, and a server has a few thousand locks in all.
    """
    count, most = 0, HISTORY_LIMIT + NEAR_LIMIT + 1
    while since < until and count < most:
        values = {
            "user": user,
            "since": since,
            "until": min(since + COUNTED_AT_ONCE, until),
            "most": most - count,
        }
        # A prepared statement would lock all partitions again.
        count += _row(connection.execute(query("backfill", "count_fills"), values, prepare=False).fetchone())[
            0
        ]
        since += COUNTED_AT_ONCE
    return count


def finish(connection: Connection[Any], lease: Lease) -> str | None:
    """Say that nothing is left to ask; returns the wallet's state, or None when the lease is no longer ours."""
    values = {"user": lease.user, "token": lease.token}
    done = connection.execute(query("backfill", "finish"), values).fetchone()
    return done[0] if done else None


def fail(connection: Connection[Any], lease: Lease, error: str) -> bool:
    """Set a wallet aside with the reason; False when the lease is no longer ours."""
    values = {"user": lease.user, "token": lease.token, "error": error}
    return connection.execute(query("backfill", "fail"), values).fetchone() is not None


def moment(milliseconds: int) -> datetime:
    """Milliseconds since 1970 as a time."""
    return _EPOCH + milliseconds * _MS


def _milliseconds(ranges: Multirange[datetime]) -> list[Range]:
    """The ranges in milliseconds, the first one first; a database knows microseconds, the exchange does not."""
    found = []
    for each in ranges:
        assert each.lower is not None
        assert each.upper is not None
        found.append(((each.lower - _EPOCH) // _MS, -((_EPOCH - each.upper) // _MS)))
    return found


def _multirange(span: Range | None) -> TimestamptzMultirange:
    return TimestamptzMultirange(
        [Bounds(moment(span[0]), moment(span[1]))] if span is not None and span[0] < span[1] else []
    )


def _row(row: tuple[Any, ...] | None) -> tuple[Any, ...]:
    assert row is not None
    return row
