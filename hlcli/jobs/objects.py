"""From objects to rows: what `hlcli fills sync` and `hlcli twap sync` share.

A unit is an object: its rows and its row in etl_s3_ingest_log commit together or not at all. While one object is
loaded the next ones are fetched; within an object the next batch is decoded while one is loaded.
"""

from __future__ import annotations

import gc
import os
import tempfile
import threading
import time
from collections import deque
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from functools import cache, partial
from itertools import chain
from pathlib import Path
from queue import SimpleQueue
from typing import IO, TYPE_CHECKING, Any, TypeVar

import psycopg

from hlcli import migrations, output, s3
from hlcli.exitcodes import TemporaryError, heed_stop
from hlcli.jobs import Job, Report, maintain, run_job
from hlcli.jobs.contention import persist
from hlcli.jobs.object_load import Loading
from hlcli.jobs.object_plan import Dataset, Options, Plan, local_file, make_plan, named_objects
from hlcli.loader import Counts, describe
from hlcli.logs import log, one_line
from hlcli.sources import files
from hlcli.sqlfiles import query

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator, Sequence
    from datetime import datetime

    import polars as pl
    from psycopg import Connection

    from hlcli.s3 import StoredObject
    from hlcli.settings import Settings

Item = TypeVar("Item")

# Objects that could not be fetched, one after the other: S3 is out, and the others would only be tried in vain.
OUTAGE_AFTER = 10
# A malformed object may have been caught while it was written; after so many times it was not.
ATTEMPTS = 3
REPLACEMENTS = 3
# What an object of an hour or a day touches. The rows of wilder ones go to the default partition, and are sorted by
# `hlcli maintain`.
COVERED_DAYS = 40
SHOWN = 20


def sync(settings: Settings, dataset: Dataset, options: Options) -> Report:
    """Read the objects that were not read yet into the dataset's table.

    `dry_run` reports what would be read and what that costs; it takes no lock, opens no run and writes nothing.

    Raises UsageError for a path that is none, ConfigError for a bucket that we may not read, TemporaryError when it
    is out of reach, and what run_job() raises.
    """
    with ExitStack() as stack:

        @cache
        def client() -> s3.S3 | None:
            if options.local:
                return None
            made = s3.S3(settings, dataset.region)
            stack.callback(made.close)
            return made

        # What was named wrongly is no failure of the channel: before the run.
        named = list(named_objects(dataset, options, client() if options.keys else None))
        if options.dry_run:
            return _rehearse(settings, dataset, options, client(), named)

        def work(job: Job) -> None:
            plan = make_plan(job.run.connection, dataset, options, client(), named)
            job.report.details.update(plan.details())
            if plan.chosen:
                with _rare_collections():
                    _Reading(job, dataset, options, client()).read(plan)

        return run_job(settings, dataset.channel, work, fail_if_locked=options.fail_if_locked)


@contextmanager
def _rare_collections() -> Iterator[None]:
    """Decoded values hold no cycles: looking for some among hundreds of thousands takes a sixth of the time."""
    before = gc.get_threshold()
    gc.set_threshold(10 * files.BATCH)
    try:
        yield
    finally:
        gc.set_threshold(*before)


def _rehearse(
    settings: Settings,
    dataset: Dataset,
    options: Options,
    client: s3.S3 | None,
    named: Sequence[StoredObject],
) -> Report:
    started, report = time.monotonic(), Report(dataset.channel, status="dry-run")
    with migrations.connect_ready(settings, role=dataset.channel.name) as connection:
        connection.read_only = True
        plan = make_plan(connection, dataset, options, client, named)
    report.details.update(plan.details())
    if client is not None:
        cost = s3.cost_usd(dataset.region, len(plan.chosen), plan.size)
        report.details["cost_usd"] = "<0.01" if 0 < cost < 0.01 else f"{cost:.2f}"
    report.details["first"] = [each.key for each in plan.chosen[:SHOWN]]
    report.seconds = round(time.monotonic() - started, 3)
    return report


class _StoppedError(Exception):
    """The run is over; what is under way is rolled back."""


@dataclass(frozen=True, slots=True)
class _Fetched:
    """A version of an object, here: an unnamed file, or one of this machine's own."""

    stored: StoredObject
    place: Path | IO[bytes]

    def for_a_reader(self) -> Path | IO[bytes]:
        """What one reading takes, and closes when it is done."""
        return self.place if isinstance(self.place, Path) else os.fdopen(os.dup(self.place.fileno()), "rb")

    def close(self) -> None:
        if not isinstance(self.place, Path):
            self.place.close()


class _Reading:
    """One run's reading of the planned objects, by threads that fetch and threads that load."""

    def __init__(self, job: Job, dataset: Dataset, options: Options, client: s3.S3 | None) -> None:
        self._job, self._dataset, self._options, self._client = job, dataset, options, client
        self._deadline = time.monotonic() + options.deadline.total_seconds()
        self._table = describe(job.run.connection, dataset.table)
        self._stopped = threading.Event()
        self._failures_in_a_row = 0
        self._gone = self._given_up = 0
        self._unfetched = False
        self._covered: set[datetime] = set()
        self._in_midst = 0
        """Loads whose transaction is open."""
        self._idle = threading.Condition()
        """Is told when one of them ends."""
        self._bytes_done = 0
        self._bytes_read: dict[str, int] = {}
        """By key, of the objects that are being loaded; with those done for the progress bar."""

    def read(self, plan: Plan) -> None:
        """Fetch and load all objects; what fails is counted and logged, and the others go on."""
        left = deque(plan.chosen)
        fetching: dict[Future[_Fetched], StoredObject] = {}
        loading: dict[Future[Counts], _Fetched] = {}
        ready: deque[_Fetched] = deque()
        jobs = min(self._options.jobs, max(len(left), 1))
        with ExitStack() as stack:
            connections = [
                stack.enter_context(
                    migrations.connect_ready(self._job.settings, role=self._dataset.channel.name)
                )
                for _ in range(jobs)
            ]
            free: SimpleQueue[Connection[Any]] = SimpleQueue()
            for connection in connections:
                free.put(connection)
            # A download may hang for a minute, or drip; who has to end does not wait for it.
            fetchers = ThreadPoolExecutor(jobs, "fetch")
            stack.callback(fetchers.shutdown, wait=False, cancel_futures=True)
            loaders = stack.enter_context(ThreadPoolExecutor(jobs, "load"))
            bar = stack.enter_context(output.progress(plan.size, self._dataset.channel.name, "B"))
            try:
                while True:
                    while left and not self._over() and len(fetching) + len(ready) <= jobs:
                        stored = left.popleft()
                        fetching[fetchers.submit(self._fetch, stored)] = stored
                    while ready and len(loading) < jobs:
                        fetched = ready.popleft()
                        loading[loaders.submit(self._load, fetched, free)] = fetched
                    if not loading and (not fetching or self._over()):
                        break
                    heed_stop()
                    # A signal that comes just before a wait without end would be looked at only after it.
                    under_way: list[Future[Any]] = [*fetching, *loading]
                    wait(under_way, timeout=1.0, return_when=FIRST_COMPLETED)
                    for fetch in [each for each in fetching if each.done()]:
                        self._fetched(fetch, fetching.pop(fetch), ready)
                    for loaded in [each for each in loading if each.done()]:
                        self._loaded(loaded, loading.pop(loaded))
                    bar.update(self._bytes_done + sum(self._bytes_read.values()) - bar.n)
            except BaseException:
                self._stopped.set()
                # Again and again, as a load that was between two statements goes on to the next one.
                while wait(loading, timeout=0.1).not_done:
                    for connection in connections:
                        with suppress(psycopg.Error):
                            connection.cancel_safe(timeout=5)
                raise
            finally:
                for fetched in ready:
                    fetched.close()
        not_begun = plan.left + len(left)
        self._job.report.details.update(gone=self._gone, left=not_begun + len(fetching) + self._given_up)
        if self._job.run.units_failed and not self._unfetched:
            self._job.verdict = "partial"  # S3 does its work: to try again later will not help

    def _over(self) -> bool:
        return (
            self._stopped.is_set()
            or time.monotonic() > self._deadline
            or self._failures_in_a_row >= OUTAGE_AFTER
        )

    def _fetch(self, stored: StoredObject) -> _Fetched:
        """Bring an object here, in the version that there is now. Raises what S3.download() raises."""
        if self._client is None:
            return _Fetched(stored, Path(stored.key))
        # Without a name, so that nothing is left of it however we end.
        try:
            file = tempfile.TemporaryFile(prefix="hlcli-")  # noqa: SIM115 - closed by who reads it
        except OSError as error:
            raise TemporaryError(f"cannot write the download: {one_line(error)}") from error
        try:
            for attempt in range(1, REPLACEMENTS + 1):
                try:
                    self._client.download(stored, file, until=self._over)
                except s3.ReplacedError:
                    if attempt == REPLACEMENTS:
                        raise
                    stored = self._client.head(stored.bucket, stored.key)
                else:
                    return _Fetched(stored, file)
            raise AssertionError
        except BaseException:
            with suppress(OSError):  # a full disk refuses the last bytes once more
                file.close()
            raise

    def _fetched(self, future: Future[_Fetched], stored: StoredObject, ready: deque[_Fetched]) -> None:
        try:
            ready.append(future.result())
        except s3.GoneError as error:
            log.info("%s", one_line(error))
            self._gone += 1
        except s3.ObjectError as error:
            self._unfetched = True
            if self._over():
                self._given_up += 1  # its download was ended, or is one more of an outage
                return
            self._failures_in_a_row += 1
            if self._failures_in_a_row == OUTAGE_AFTER:
                log.warning("%d objects failed in a row, stopping: %s", OUTAGE_AFTER, one_line(error))
            self._failed(stored, error)
        else:
            self._failures_in_a_row = 0

    def _loaded(self, future: Future[Counts], fetched: _Fetched) -> None:
        """Take note of what became of an object; an error of the database ends the run."""
        stored = fetched.stored
        self._bytes_read.pop(stored.key, None)
        self._bytes_done += stored.size
        try:
            counts = future.result()
        except _UnusableError as error:
            self._failed(stored, error.cause, rows=error.rows)
        else:
            log.info(
                "%s: %d rows, %d inserted, %d updated, %d rejected",
                stored.key,
                counts.served,
                counts.inserted,
                counts.updated,
                counts.rejected,
            )

    def _failed(self, stored: StoredObject, error: Exception, *, rows: int = 0) -> None:
        """Log and count an object that could not be read; `rows` of it were decoded."""
        with self._job.run.unit() as unit:
            unit.connection.execute(
                query("objects", "failed"),
                {
                    **self._version(stored),
                    "error": one_line(error),
                    "final": isinstance(error, files.UnusableError) and error.final,
                    "attempts": ATTEMPTS if isinstance(error, files.UnusableError) else None,
                },
            )
            unit.add(units_failed=1, rows_failed=rows)
        self._job.report.fail(stored.key, error)

    def _version(self, stored: StoredObject) -> dict[str, Any]:
        return {
            "table_name": self._dataset.table,
            "bucket": stored.bucket,
            "s3_object_key": stored.key,
            "etag": stored.etag,
            "size": stored.size,
            "last_modified": stored.last_modified,
            "version": f"{stored.etag} {stored.size}",
            "run_id": self._job.run.run_id,
        }

    def _load(self, fetched: _Fetched, free: SimpleQueue[Connection[Any]]) -> Counts:
        """Load an object on a free connection; returns what became of its rows.

        Raises _UnusableError, psycopg.Error.
        """
        connection = free.get()
        try:
            # Two objects may hold the same rows; a transaction of many batches cannot take them in one order.
            return persist(partial(self._load_once, fetched, connection), fetched.stored.key)
        finally:
            free.put(connection)
            fetched.close()

    def _load_once(self, fetched: _Fetched, connection: Connection[Any]) -> Counts:
        stored, dataset, counts = fetched.stored, self._dataset, Counts()
        try:
            with (
                files.opened(fetched.for_a_reader()) as file,
                closing(ahead(dataset.read(self._metered(file, stored)))) as batches,
            ):
                first = next(batches, None)
                if first is not None and self._table.partitioned_by == dataset.time:
                    self._cover(connection, first.frame[dataset.time])
                with self._midst(), self._job.run.unit(connection) as unit:
                    loading = Loading(unit, dataset, self._table, stored, self._version(stored))
                    for rows in chain([first] if first else [], batches):
                        if self._stopped.is_set():
                            raise _StoppedError
                        counts = loading.add(rows)
                    if isinstance(fetched.place, Path) and local_file(fetched.place) != stored:
                        raise files.UnusableError("changed while it was read")
                    return loading.finish()
        except (files.UnusableError, OSError) as error:
            raise _UnusableError(error, counts.served) from error
        except psycopg.DataError as error:  # the object's fault, not the run's
            refused = files.UnusableError(f"refused by the database: {one_line(error)}")
            raise _UnusableError(refused, counts.served) from error

    def _cover(self, connection: Connection[Any], times: pl.Series) -> None:
        """Make the partitions of the days that an object begins with; between loads, as each holds the table."""
        with self._idle:
            days = set(times.dt.truncate("1d")) - self._covered
            if 0 < len(days) <= COVERED_DAYS:
                self._idle.wait_for(lambda: not self._in_midst or self._stopped.is_set())
                maintain.cover(connection, self._dataset.table, sorted(days))
                self._covered |= days

    @contextmanager
    def _midst(self) -> Iterator[None]:
        with self._idle:
            self._in_midst += 1
        try:
            yield
        finally:
            with self._idle:
                self._in_midst -= 1
                self._idle.notify_all()

    def _metered(self, file: files.File, stored: StoredObject) -> Iterator[files.Batch]:
        for batch in file.batches():
            self._bytes_read[stored.key] = file.position
            yield batch


class _UnusableError(Exception):
    """An object whose content cannot be used, and how many of its rows were decoded before that was seen."""

    def __init__(self, cause: files.UnusableError | OSError, rows: int) -> None:
        super().__init__(str(cause))
        self.cause, self.rows = cause, rows


def ahead(items: Iterator[Item]) -> Generator[Item]:
    """The same items, each made in another thread while the one before it is used."""
    with ThreadPoolExecutor(1, "ahead") as pool:
        coming = pool.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = pool.submit(next, items, None)
            yield item
