"""`hlcli backfill`: every wallet's fills from the API, by any number of workers.

Threads walk the wallets and ask for pages; the thread that runs the job loads all pages that are here in one
transaction, with what they cover. Neither waits for the other while few pages lie between them.
"""

from __future__ import annotations

import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Self

import psycopg
from psycopg import errors

from hlcli import migrations, output
from hlcli.exitcodes import TemporaryError, UsageError, stopped_by, undisturbed
from hlcli.http import SourceError
from hlcli.jobs import Job, Report, run_job
from hlcli.jobs.backfill_queue import Queue, Shard, Window
from hlcli.jobs.backfill_store import Store
from hlcli.jobs.backfill_walk import Walkers
from hlcli.ledger import Channel
from hlcli.logs import log, one_line
from hlcli.sources import info, user_fills

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tqdm import tqdm

    from hlcli.http import HttpClient
    from hlcli.settings import Settings

CHANNEL = Channel("hyperliquid", "backfill", timedelta(days=1), "hlcli backfill", "47 * * * *")

# Spec 003's launch of the exchange.
LAUNCH = datetime(2023, 11, 1, tzinfo=UTC)
# The files of fills by block begin amid the hour before; from this one on they are whole.
S3_BEGINS = datetime(2025, 7, 27, 9, tzinfo=UTC)
LEASE = timedelta(minutes=2)
UNBOUNDED = timedelta(days=3650)
BAR_S, LINE_S = 5.0, 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What the command line decides."""

    worker_id: int = 0
    total_workers: int = 1
    own_shard: bool = False
    """Stop when the own shard is done, and leave the others' to them."""
    users: Sequence[str] | None = None
    """None: all wallets in `fills` and of the universe."""
    since: datetime = LAUNCH
    until: datetime = S3_BEGINS
    limit: int | None = None
    deadline: timedelta | None = None
    max_weight: int | None = None
    concurrency: int = 8
    lease: timedelta = LEASE
    page_size: int = user_fills.PAGE_SIZE
    fail_if_locked: bool = False

    @property
    def shard(self) -> Shard:
        return Shard(self.worker_id, self.total_workers, self.own_shard)

    @property
    def window(self) -> Window:
        """What is asked for. Raises UsageError for a window that is empty."""
        if self.since >= self.until:
            told = " (where --until is not given)" if self.until == S3_BEGINS else ""
            raise UsageError(
                f"nothing is between {self.since:%Y-%m-%d %H:%M}Z and {self.until:%Y-%m-%d %H:%M}Z{told}"
            )
        return Window(self.since, self.until)


def backfill(settings: Settings, options: Options) -> Report:
    """Ask the API for the fills of every wallet that is wanted and not yet there.

    A unit is a wallet; each page commits by itself, with what it covers. The run ends when no wallet is left, neither
    waiting nor leased by another worker, or at the deadline.

    Raises UsageError for an empty window and for less weight than a page may cost, and what run_job() raises.
    """
    window = options.window
    dearest = info.weight(user_fills.FILLS, options.page_size)
    if options.max_weight is not None and options.max_weight < dearest:
        raise UsageError(f"--max-weight: a single page may cost {dearest}")
    member = f"{options.worker_id}/{options.total_workers}@{settings.hl_egress_key}"

    def work(job: Job) -> None:
        with (
            job.client(deadline=options.deadline or UNBOUNDED, most_weight=options.max_weight) as client,
            migrations.connect_ready(settings, role="backfill_queue") as connection,
        ):
            queue = Queue(connection, job.run.run_id, options.shard, options.lease, options.users)
            past = queue.want(window)
            if not queue.knows_any():
                log.warning(
                    "no wallet is known: run `hlcli universe refresh` or `hlcli fills sync`, or name some"
                )
            if _walk(job, client, queue, options) and options.users is not None:
                _look_for_holes(job, queue, past)

    return run_job(settings, replace(CHANNEL, member=member), work, fail_if_locked=options.fail_if_locked)


def _walk(job: Job, client: HttpClient, queue: Queue, options: Options) -> bool:
    """Walk wallets and store what comes; returns whether it went on until none was left."""
    store = Store(job, options.lease)
    walkers = Walkers(
        job,
        client,
        queue,
        concurrency=options.concurrency,
        limit=options.limit,
        page_size=options.page_size,
    )
    with _Progress(job, queue, store, options.limit) as progress, walkers:
        may_be_a_wallet = False
        try:
            walkers.start()
            while not walkers.ended():
                if store.keep(walkers.ready()):
                    break
                progress.tell()
        except Exception as error:
            # Leases that expire are counted, and a lasting cause is left alone. A signal in the middle of a lock's
            # release ends in an error of that lock.
            may_be_a_wallet = stopped_by() is None and not isinstance(error, errors.InsufficientPrivilege)
            raise
        finally:
            if not may_be_a_wallet:
                _give_back(walkers, queue)
            with suppress(psycopg.Error, TemporaryError):
                _sum_up(job, queue, store, walkers)
    if isinstance(walkers.ended_by, SourceError) and not store.has_any:
        raise walkers.ended_by
    return walkers.ended_by is None and options.limit is None and not queue.has_left()


def _give_back(walkers: Walkers, queue: Queue) -> None:
    with undisturbed(), suppress(psycopg.Error):
        walkers.stop(at_once=True)
        queue.release()


def _sum_up(job: Job, queue: Queue, store: Store, walkers: Walkers) -> None:
    """Fill the report, also of a run that ends early."""
    for user in queue.given_up:
        job.report.fail(user, TemporaryError("too many workers ended while they worked on it"))
    with job.run.unit() as unit:
        unit.add(units_failed=len(queue.given_up))
    left = queue.left().all
    job.report.details.update(
        complete=store.states["complete"],
        truncated=store.states["truncated"],
        lost_leases=store.lost,
        wallets_left=left,
    )
    if walkers.ended_by:
        job.report.details["ended_by"] = one_line(walkers.ended_by)
    log.info("%s wallets are done, %s left", f"{store.states.total():,}", f"{left:,}")


def _look_for_holes(job: Job, queue: Queue, window: Window) -> None:
    """Nothing is left, and yet not all need be there: the window may be another run's by now."""
    holes = queue.uncovered(window) - job.run.units_failed
    if holes > 0:
        job.report.failed.append(f"{holes} wallets: another run has asked for another window of them")
        job.verdict = "partial"


class _Progress:
    """How far all workers are: a bar on a terminal, else a line a minute (with -v)."""

    def __init__(self, job: Job, queue: Queue, store: Store, limit: int | None) -> None:
        self._job, self._queue, self._store, self._limit = job, queue, store, limit
        left = queue.left().all
        self._total = left if limit is None else min(left, limit)
        self._bar: tqdm[Any] = output.progress(self._total, "backfill", " wallet")
        self._marks = deque([self._mark()])
        """(time, fills, weight) of the last minute."""

    def _mark(self) -> tuple[float, int, int]:
        return time.monotonic(), self._store.fills, self._job.run.spent["weight"]

    def tell(self) -> None:
        """Say how far it is, where enough time has gone by."""
        now = time.monotonic()
        if now - self._marks[-1][0] < (LINE_S if self._bar.disable else BAR_S):
            return
        while len(self._marks) > 1 and self._marks[0][0] < now - LINE_S:
            self._marks.popleft()
        since, fills_then, weight_then = self._marks[0]
        mark = self._mark()
        self._marks.append(mark)
        rate = (mark[1] - fills_then) / (now - since)
        weight = 60 * (mark[2] - weight_then) / max(now - since, 60)  # as the budget counts it
        pace = f"{weight:,.0f} weight/min, {rate:,.0f} fills/s"
        left = self._left()
        self._total = max(self._total, left)
        if self._bar.disable:
            log.info(
                "%s of %s wallets are left; here %s, %s fills so far",
                f"{left:,}",
                f"{self._total:,}",
                pace,
                f"{mark[1]:,}",
            )
            return
        self._bar.total, self._bar.n = self._total, self._total - left
        self._bar.set_postfix_str(pace)

    def _left(self) -> int:
        """Of all workers' wallets, or of as many as this run may take."""
        if self._limit is None:
            return self._queue.left().all
        return max(self._total - sum(self._store.states.values()) - self._job.run.units_failed, 0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
