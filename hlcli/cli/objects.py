"""What `hlcli fills sync` and `hlcli twap sync` have in common on the command line."""

from __future__ import annotations

from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hlcli.cli import common

if TYPE_CHECKING:
    from hlcli.jobs.object_plan import Options


def _path(text: str) -> Path:
    if not text.strip():  # an unset variable of a script would be the working directory
        raise typer.BadParameter("is empty")
    return Path(text)


def _key(text: str) -> str:
    if not text or text.startswith("s3://"):
        raise typer.BadParameter("is the key alone, without s3:// and the bucket")
    return text


Incremental = Annotated[
    bool, typer.Option("--incremental", help="Read all objects that were not read yet (the default).")
]
Since = Annotated[
    datetime | None,
    typer.Option(
        parser=common.moment, metavar="TIME", help="Only objects that were last modified then or later."
    ),
]
Until = Annotated[
    datetime | None,
    typer.Option(parser=common.moment, metavar="TIME", help="Only objects that were last modified before."),
]
ObjectKey = Annotated[
    list[str] | None,
    typer.Option(
        parser=_key, metavar="KEY", help="Just this object, even if it was read before; may be repeated."
    ),
]
LocalFile = Annotated[
    list[Path] | None,
    typer.Option(
        parser=_path,
        metavar="PATH",
        help="A file, even if it was read before, or all new files of a folder and its folders (.parquet, "
        ".json, .jsonl, .ndjson, .lz4, .gz, .zst); no S3. May be repeated.",
    ),
]
Again = Annotated[bool, typer.Option("--again", help="Objects that were read before, too.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only tell what would be read, and what it costs.")]
Limit = Annotated[int | None, typer.Option(min=1, metavar="N", help="At most so many objects.")]
MaxGb = Annotated[
    float,
    typer.Option(
        min=0.001,
        max=1_000_000,
        metavar="GB",
        help="At most so many gigabytes, compressed, but one object: their requester pays for them. Default: 10.",
        show_default=False,
    ),
]
Jobs = Annotated[
    int,
    typer.Option(min=1, max=8, metavar="N", help="Objects loaded at once. Default: 2.", show_default=False),
]
Deadline = Annotated[timedelta, common.duration_option("Fetch no object after that. Default: 50m.")]
DEADLINE = timedelta(minutes=50)
MAX_GB = 10.0
JOBS = 2


def options(
    *,
    incremental: bool,
    since: datetime | None,
    until: datetime | None,
    object_key: list[str] | None,
    local_file: list[Path] | None,
    again: bool,
    dry_run: bool,
    limit: int | None,
    max_gb: float,
    jobs: int,
    deadline: timedelta,
    fail_if_locked: bool,
) -> Options:
    """Options of the job. Raises BadParameter for what excludes each other."""
    from hlcli.jobs.object_plan import Options

    if object_key and local_file:
        raise typer.BadParameter("--object-key is of S3, --local-file is not: give one of them")
    if incremental and (object_key or again):
        raise typer.BadParameter(
            "--incremental leaves out what was read before: not with --object-key or --again"
        )
    if since is not None and until is not None and until <= since:
        raise typer.BadParameter("--until: must be later than --since")
    return Options(
        since=since,
        until=until,
        keys=object_key or (),
        local=local_file or (),
        again=again,
        limit=limit,
        max_bytes=round(max_gb * 1e9),
        jobs=jobs,
        deadline=deadline,
        dry_run=dry_run,
        fail_if_locked=fail_if_locked,
    )
