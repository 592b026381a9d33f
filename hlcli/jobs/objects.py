"""From objects to rows: what `hlcli fills sync` and `hlcli twap sync` share.

A unit is an object: its rows and its row in etl_s3_ingest_log commit together or not at all. While one object is
loaded the next ones are fetched; within an object the next batch is decoded while one is loaded.
"""

from __future__ import annotations

import gc
import json
import os
import tempfile
import threading
import time
from collections import deque
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import cache
from itertools import chain
from pathlib import Path
from queue import SimpleQueue
from typing import IO, TYPE_CHECKING, Any, TypeVar

import psycopg
from psycopg import errors, sql

from hlcli import migrations, output, s3
from hlcli.exitcodes import ConfigError, TemporaryError, UsageError
from hlcli.jobs import Job, Report, maintain, run_job
from hlcli.loader import Counts, Merge, describe, load, quarantine
from hlcli.logs import log, one_line
from hlcli.s3 import StoredObject
from hlcli.sources import files
from hlcli.sqlfiles import query

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
    from datetime import timedelta

    import polars as pl
    from psycopg import Connection

    from hlcli.ledger import Channel, Unit
    from hlcli.loader import Table
    from hlcli.settings import Settings

Item = TypeVar("Item")

LOCAL = "file:"
SUFFIXES = (".parquet", ".lz4", ".gz", ".zst", ".json", ".jsonl", ".ndjson")
# Objects that could not be fetched, one after the other: S3 is out, and the others would only be tried in vain.
OUTAGE_AFTER = 10
# A malformed object may have been caught while it was written; after so many times it was not.
ATTEMPTS = 3
REPLACEMENTS = 3
# Two objects may hold the same rows; a transaction of many batches cannot take them in one order.
DEADLOCKS = 5
# Beyond this the rejected rows of one object are no oddities any more but the object itself.
MAX_REJECTED = 100_000
# When of so many rows, the first of an object, none can be stored, the others are not looked at.
HOPELESS_ROWS = 1_000
# What an object of an hour or a day touches. The rows of wilder ones go to the default partition, and are sorted by
# `hlcli maintain`.
COVERED_DAYS = 40
SHOWN = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Dataset:
    """What kind of objects these are, where they are, and the table that their rows go to."""

    channel: Channel
    table: str
    time: str
    """The column that tells when a row happened."""
    newer: Sequence[str]
    """The columns by which the better one of two rows with the same key is told; the first that differs decides."""
    bucket: str
    prefix: str
    region: str
    read: Callable[[Iterable[files.Batch]], Iterator[files.Rows]]
    columns: Callable[[StoredObject], Mapping[str, Any]] = field(default=lambda _: {})
    """What a row takes from its object, beside object_id."""
    touch: Sequence[str] = ()
    """Columns that are written with a change but, as those from the object, make none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What the command line decides."""

    since: datetime | None = None
    """Only objects that were last modified then or later."""
    until: datetime | None = None
    """Only objects that were last modified before."""
    keys: Sequence[str] = ()
    """Just these objects, whatever the log says of them."""
    local: Sequence[Path] = ()
    """Files, whatever the log says of them, and folders, of which all files."""
    again: bool = False
    """Objects that are done, too."""
    limit: int | None = None
    max_bytes: int
    """Compressed; the first object is read however large."""
    jobs: int
    """Objects that are loaded at once, each on a connection of its own."""
    deadline: timedelta
    dry_run: bool = False
    fail_if_locked: bool = False


@dataclass(slots=True)
class Plan:
    """What is to be read."""

    offered: int = 0
    """Objects that were there to choose from."""
    chosen: list[StoredObject] = field(default_factory=list)
    done: int = 0
    """Objects that are skipped, as they were read in this version."""
    quarantined: int = 0
    """Objects that are skipped, as they cannot be read in this version."""
    left: int = 0
    """Objects beyond --limit or --max-gb."""

    @property
    def size(self) -> int:
        return sum(each.size for each in self.chosen)

    def details(self) -> dict[str, Any]:
        return {
            "objects": len(self.chosen),
            "bytes": self.size,
            "skipped": self.done,
            "quarantined_before": self.quarantined,
            "left": self.left,
        }


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
        named = list(_named(dataset, options, client() if options.keys else None))
        if options.dry_run:
            return _rehearse(settings, dataset, options, client(), named)

        def work(job: Job) -> None:
            plan = _plan(job.run.connection, dataset, options, client(), named)
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
        plan = _plan(connection, dataset, options, client, named)
    report.details.update(plan.details())
    if client is not None:
        cost = s3.cost_usd(dataset.region, len(plan.chosen), plan.size)
        report.details["cost_usd"] = "<0.01" if 0 < cost < 0.01 else f"{cost:.2f}"
    report.details["first"] = [each.key for each in plan.chosen[:SHOWN]]
    report.seconds = round(time.monotonic() - started, 3)
    return report


def _plan(
    connection: Connection[Any],
    dataset: Dataset,
    options: Options,
    client: s3.S3 | None,
    named: Sequence[StoredObject],
) -> Plan:
    """Which objects are to be read: in the order of their keys, but those that have failed before come last.

    Else a few that always fail would be taken for an outage in every run, and none behind them ever read.
    """
    plan, wanted = Plan(), []
    bucket = LOCAL if options.local else dataset.bucket
    known = {
        key: seen for key, *seen in connection.execute(query("objects", "known"), (dataset.table, bucket))
    }
    for stored in chain(named, _found(dataset, options, client)):
        plan.offered += 1
        seen = known.get(stored.key)
        # Rows of it may be missing since another object was replaced; nobody would ask for it by its time.
        owed = seen is not None and seen[2] == "pending"
        if not owed and (
            (options.since and stored.last_modified < options.since)
            or (options.until and stored.last_modified >= options.until)
        ):
            continue
        if (
            seen
            and plan.offered > len(named)
            and not options.again
            and seen[:2] == [stored.etag, stored.size]
        ):
            if seen[2] == "ok":
                plan.done += 1
                continue
            if seen[2] == "quarantined":
                plan.quarantined += 1
                continue
        wanted.append(stored)
    if client is not None and not plan.offered:
        log.warning("s3://%s/%s holds no objects", dataset.bucket, dataset.prefix)
    wanted.sort(key=lambda each: each.key in known and known[each.key][2] == "failed")
    size = 0
    for stored in wanted:
        size += stored.size
        full = options.limit is not None and len(plan.chosen) >= options.limit
        if full or plan.left or (size > options.max_bytes and plan.chosen):
            plan.left += 1
        else:
            plan.chosen.append(stored)
    return plan


def _named(dataset: Dataset, options: Options, client: s3.S3 | None) -> Iterator[StoredObject]:
    """The objects and files that the command line names one by one. Raises UsageError for what is none."""
    for path in options.local:
        if not path.exists():
            raise UsageError(f"--local-file: there is no {path}")
        if path.is_file():
            yield _file(path)
        elif not path.is_dir():
            raise UsageError(f"--local-file: {path} is neither a file nor a folder")
    for key in dict.fromkeys(options.keys):
        assert client is not None
        try:
            yield client.head(dataset.bucket, key)
        except s3.GoneError as error:
            raise UsageError(f"--object-key: there is no s3://{dataset.bucket}/{key}") from error
        except s3.DeniedError as error:
            raise ConfigError(str(error)) from error


def _found(dataset: Dataset, options: Options, client: s3.S3 | None) -> Iterator[StoredObject]:
    """The objects of the bucket, or the files of folders."""
    for path in options.local:
        if path.is_dir():
            yield from map(_file, sorted(_files(path)))
    if client is not None and not options.keys:
        yield from client.list(dataset.bucket, dataset.prefix)


def _files(folder: Path) -> set[Path]:
    """The data files of a folder and its folders, but of no hidden one; each once, by whatever names."""
    return {
        path.resolve()
        for path in folder.rglob("*")
        if path.name.endswith(SUFFIXES)
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    }


def _file(path: Path) -> StoredObject:
    """A file as if it were an object. Raises OSError, UsageError for a name that no database can hold."""
    state = path.stat()
    if not path.resolve().as_posix().isprintable():
        raise UsageError(f"--local-file: the name of {path!r} cannot be kept")
    modified = datetime.fromtimestamp(state.st_mtime_ns / 10**9, UTC)
    return StoredObject(
        LOCAL, str(path.resolve()), f"{state.st_size}-{state.st_mtime_ns}", state.st_size, modified
    )


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
        self._stopped = threading.Event()
        self._failures_in_a_row = 0
        self._gone = self._given_up = 0
        self._unfetched = False
        self._covered: set[datetime] = set()
        self._in_midst = 0
        """Loads whose transaction is open."""
        self._idle = threading.Condition()
        """Is told when one of them ends."""
        self._consumed: dict[str, int] = {}
        """Bytes by key, of objects done and under way; for the progress bar."""

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
                    # A signal that comes just before a wait without end would be looked at only after it.
                    under_way: list[Future[Any]] = [*fetching, *loading]
                    wait(under_way, timeout=1.0, return_when=FIRST_COMPLETED)
                    for fetch in [each for each in fetching if each.done()]:
                        self._fetched(fetch, fetching.pop(fetch), ready)
                    for loaded in [each for each in loading if each.done()]:
                        self._loaded(loaded, loading.pop(loaded))
                    bar.update(sum(self._consumed.values()) - bar.n)
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
        self._consumed[stored.key] = stored.size
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
            for attempt in range(1, DEADLOCKS + 1):
                try:
                    return self._load_once(fetched, connection)
                except (errors.DeadlockDetected, errors.SerializationFailure, errors.LockNotAvailable):
                    if attempt == DEADLOCKS:
                        raise
                    log.info("%s: overlaps with another object, once more", fetched.stored.key)
            raise AssertionError
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
                table = describe(connection, dataset.table)
                if first is not None and table.partitioned_by == dataset.time:
                    self._cover(connection, first.frame[dataset.time])
                with self._midst(), self._job.run.unit(connection) as unit:
                    loading = _Loading(unit, dataset, table, stored, self._version(stored))
                    for rows in chain([first] if first else [], batches):
                        if self._stopped.is_set():
                            raise _StoppedError
                        counts = loading.add(rows)
                    if isinstance(fetched.place, Path) and _file(fetched.place) != stored:
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
            self._consumed[stored.key] = file.position
            yield batch


class _UnusableError(Exception):
    """An object whose content cannot be used, and how many of its rows were decoded before that was seen."""

    def __init__(self, cause: files.UnusableError | OSError, rows: int) -> None:
        super().__init__(str(cause))
        self.cause, self.rows = cause, rows


class _Loading:
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


def ahead(items: Iterator[Item]) -> Generator[Item]:
    """The same items, each made in another thread while the one before it is used."""
    with ThreadPoolExecutor(1, "ahead") as pool:
        coming = pool.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = pool.submit(next, items, None)
            yield item
