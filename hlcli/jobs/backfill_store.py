"""What the walkers of a backfill bring, and its way into the database: all that is here in one transaction."""

from __future__ import annotations

import time
from collections import Counter
from datetime import datetime
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import psycopg

from hlcli.http import StatusError
from hlcli.jobs import maintain
from hlcli.jobs.asking import OUTAGE_AFTER
from hlcli.jobs.backfill_queue import decide, fail, finish, keep_page
from hlcli.jobs.contention import persist
from hlcli.loader import Counts, Merge, Rejected, describe, load, quarantine
from hlcli.logs import log, one_line
from hlcli.sources import fills, user_fills
from hlcli.sources.files import Rows, UnusableError
from hlcli.sqlfiles import query

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import timedelta

    import polars as pl

    from hlcli.jobs import Job
    from hlcli.jobs.backfill_queue import Lease
    from hlcli.ledger import Unit
    from hlcli.sources.user_fills import Page, Range

# So many wallets that the source will not hear of, one after the other, mean that it is not the wallets.
REFUSED_AFTER = 3 * OUTAGE_AFTER
# Who uses the table for so long that no partition can be made is not asked again at once.
PAUSE_S = 60.0


class Fetched(NamedTuple):
    """A page of a wallet, ready to be loaded; ranges in milliseconds."""

    lease: Lease
    kind: str
    covered: Range
    cut_off: Range | None
    doubtful: Range | None
    fills: int
    weight: int
    frame: pl.DataFrame | None
    rejected: list[Rejected]

    @classmethod
    def of(cls, lease: Lease, kind: str, page: Page, rows: Rows | None, weight: int) -> Fetched:
        """A page without its events, of which `rows` was made."""
        frame, rejected = (rows.frame, rows.rejected) if rows else (None, [])
        frame = frame if frame is not None and frame.height else None
        count = len(page.events)
        return cls(lease, kind, page.covered, page.cut_off, page.doubtful, count, weight, frame, rejected)

    @property
    def oldest(self) -> int | None:
        """The time of its first fill in milliseconds."""
        first = self.frame["time"].dt.epoch("ms").min() if self.frame is not None else None
        return first if isinstance(first, int) else None


class Walked(NamedTuple):
    """A wallet of which nothing is left to ask."""

    lease: Lease


class Failed(NamedTuple):
    """A wallet whose walk ended early."""

    lease: Lease
    error: Exception


Item = Fetched | Walked | Failed


class Store:
    """Loads what comes; counts what became of it."""

    def __init__(self, job: Job, lease: timedelta) -> None:
        self._job, self._lease = job, lease
        self._connection = job.run.connection
        self._table = describe(self._connection, fills.TABLE)
        self._days: set[datetime] = set()
        self._partitions_from = 0.0
        self._failing: list[str] = []
        """Wallets that failed one after the other, for no reason of their own."""
        self._in_vain = 0
        """Wallets that failed one after the other, for any reason."""
        self.states: Counter[str] = Counter()
        """Wallets that were walked, by what they are now."""
        self.lost = 0
        """Wallets whose lease had expired when something of them came."""
        self.fills = 0
        """Rows served."""

    @property
    def has_any(self) -> bool:
        """Whether anything that was answered is stored."""
        return self.fills > 0 or self.states.total() > 0

    def keep(self, items: list[Item]) -> bool:
        """Commit what came, and say whether one wallet after the other fails, so that the others are tried in vain.

        What the database refuses is tried wallet by wallet, and fails the wallet.
        """
        walked = [item for item in items if isinstance(item, Walked)]
        is_outage = self._keep([item for item in items if not isinstance(item, Walked)])
        for item in walked:
            persist(partial(decide, self._connection, item.lease), "what is doubtful of a wallet")
        return self._keep(walked) or is_outage

    def _keep(self, items: Sequence[Item]) -> bool:
        # In the order of wallets, as other workers may wait for the same rows; a wallet's items stay in theirs.
        items = sorted((item for item in items if not item.lease.lost), key=lambda item: item.lease.user)
        if not items:
            return False
        self._make_partitions(items)
        try:
            return persist(partial(self._commit, items), "a group of pages")
        except (psycopg.DataError, psycopg.IntegrityError) as error:
            return self._keep_each(items, error)

    def _keep_each(self, items: list[Item], error: psycopg.Error) -> bool:
        leases = {item.lease.user: item.lease for item in items}
        if len(leases) > 1:
            outages = [self._keep([item for item in items if item.lease.user == user]) for user in leases]
            return any(outages)
        (lease,) = leases.values()
        outage = self._commit([Failed(lease, UnusableError(f"refused by the database: {one_line(error)}"))])
        lease.lost = True
        return outage

    def _commit(self, items: list[Item]) -> bool:
        states: list[str] = []
        failed: list[Failed] = []
        lost: dict[str, Lease] = {}
        with self._job.run.unit() as unit:
            pages = []
            for page in (item for item in items if isinstance(item, Fetched)):
                if page.lease.user in lost:
                    continue
                if keep_page(unit.connection, page, lasts=self._lease):
                    pages.append(page)
                else:
                    lost[page.lease.user] = page.lease
            counts = self._load(unit, pages)
            for item in items:
                if isinstance(item, Fetched) or item.lease.user in lost:
                    continue
                if isinstance(item, Failed):
                    if fail(unit.connection, item.lease, one_line(item.error)):
                        failed.append(item)
                elif state := finish(unit.connection, item.lease):
                    states.append(state)
                else:
                    lost[item.lease.user] = item.lease
            unit.add(counts, units_ok=len(states), units_failed=len(failed))
        for lease in lost.values():
            lease.lost = True
            log.info("%s: its lease had expired, so what came is left to whoever has it now", lease.user)
        self.states.update(states)
        self.lost += len(lost)
        self.fills += counts.served
        return self._is_outage(bool(pages or states), failed)

    def _load(self, unit: Unit, pages: list[Fetched]) -> Counts:
        """Load fills, and then slices, so that the one row may complete the other."""
        import polars as pl

        counts = Counts()
        connection, run_id = unit.connection, unit.run.run_id
        for kind in (user_fills.FILLS, user_fills.SLICES):
            rejected = [each for page in pages if page.kind == kind for each in page.rejected]
            frames = [page.frame for page in pages if page.kind == kind and page.frame is not None]
            counts += quarantine(connection, fills.TABLE, rejected, run_id)
            if frames:
                counts += load(
                    connection,
                    self._table,
                    pl.concat(frames, how="diagonal_relaxed"),
                    rule=Merge.COMPLETE,
                    newer=fills.NEWER,
                    run_id=run_id,
                )
        return counts

    def _make_partitions(self, items: list[Item]) -> None:
        """Of the days that these fills are of."""
        days: set[datetime] = set()
        for item in items:
            if isinstance(item, Fetched) and item.frame is not None:
                days.update(item.frame["time"].dt.truncate("1d").unique().drop_nulls())
        days -= self._days
        if not days or self._table.partitioned_by != "time" or time.monotonic() < self._partitions_from:
            return
        if maintain.cover(self._connection, fills.TABLE, sorted(days)):
            self._days |= days
        else:
            self._partitions_from = time.monotonic() + PAUSE_S

    def _is_outage(self, progress: bool, failed: list[Failed]) -> bool:
        if progress:
            self._failing, self._in_vain = [], 0
        self._in_vain += len(failed)
        for item in failed:
            self._job.report.fail(item.lease.user, item.error)
            if not (isinstance(item.error, StatusError) and item.error.of_question):
                self._failing.append(item.lease.user)
        if not failed or (len(self._failing) < OUTAGE_AFTER and self._in_vain < REFUSED_AFTER):
            return False
        log.warning("%d wallets failed in a row, stopping: %s", self._in_vain, one_line(failed[-1].error))
        self._connection.execute(query("backfill", "reopen"), {"users": self._failing})
        return True
