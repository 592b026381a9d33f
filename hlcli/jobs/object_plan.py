"""Which objects a sync job reads: those of a bucket or of folders, less what the log says is done."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import chain
from typing import TYPE_CHECKING, Any

from hlcli.exitcodes import ConfigError, UsageError
from hlcli.logs import log
from hlcli.s3 import DeniedError, GoneError, StoredObject
from hlcli.sqlfiles import query

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from datetime import timedelta
    from pathlib import Path

    from psycopg import Connection

    from hlcli.ledger import Channel
    from hlcli.s3 import S3
    from hlcli.sources import files

LOCAL = "file:"
SUFFIXES = (".parquet", ".lz4", ".gz", ".zst", ".json", ".jsonl", ".ndjson")


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


def make_plan(
    connection: Connection[Any],
    dataset: Dataset,
    options: Options,
    client: S3 | None,
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


def named_objects(dataset: Dataset, options: Options, client: S3 | None) -> Iterator[StoredObject]:
    """The objects and files that the command line names one by one. Raises UsageError for what is none."""
    for path in options.local:
        if not path.exists():
            raise UsageError(f"--local-file: there is no {path}")
        if path.is_file():
            yield local_file(path)
        elif not path.is_dir():
            raise UsageError(f"--local-file: {path} is neither a file nor a folder")
    for key in dict.fromkeys(options.keys):
        assert client is not None
        try:
            yield client.head(dataset.bucket, key)
        except GoneError as error:
            raise UsageError(f"--object-key: there is no s3://{dataset.bucket}/{key}") from error
        except DeniedError as error:
            raise ConfigError(str(error)) from error


def _found(dataset: Dataset, options: Options, client: S3 | None) -> Iterator[StoredObject]:
    """The objects of the bucket, or the files of folders."""
    for path in options.local:
        if path.is_dir():
            yield from map(local_file, sorted(_files(path)))
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


def local_file(path: Path) -> StoredObject:
    """A file as if it were an object. Raises OSError, UsageError for a name that no database can hold."""
    state = path.stat()
    if not path.resolve().as_posix().isprintable():
        raise UsageError(f"--local-file: the name of {path!r} cannot be kept")
    modified = datetime.fromtimestamp(state.st_mtime_ns / 10**9, UTC)
    return StoredObject(
        LOCAL, str(path.resolve()), f"{state.st_size}-{state.st_mtime_ns}", state.st_size, modified
    )
