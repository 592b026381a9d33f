"""What `hlcli fills sync` and `hlcli twap sync` have in common on the command line."""

from __future__ import annotations

from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hlcli.cli import common

if TYPE_CHECKING:
    from hlcli.jobs.objects import Options

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
    typer.Option(metavar="KEY", help="Just this object, even if it was read before; may be repeated."),
]
LocalFile = Annotated[
    Path | None,
    typer.Option(
        metavar="PATH", help="A file, even if it was read before, or all new files of a folder; no S3."
    ),
]
Again = Annotated[bool, typer.Option("--again", help="Objects that were read before, too.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only tell what would be read, and what it costs.")]
Limit = Annotated[int | None, typer.Option(min=1, metavar="N", help="At most so many objects.")]
MaxGb = Annotated[
    float,
    typer.Option(
        min=0.001, max=1_000_000, help="At most so many gigabytes, compressed: their requester pays for them."
    ),
]
Jobs = Annotated[int, typer.Option(min=1, max=8, help="Objects loaded at once.")]
Deadline = Annotated[timedelta, common.duration_option("Begin no object after that. Default: 50m.")]
DEADLINE = timedelta(minutes=50)
MAX_GB = 10.0
JOBS = 2


def options(
    *,
    incremental: bool,
    since: datetime | None,
    until: datetime | None,
    object_key: list[str] | None,
    local_file: Path | None,
    again: bool,
    dry_run: bool,
    limit: int | None,
    max_gb: float,
    jobs: int,
    deadline: timedelta,
    fail_if_locked: bool,
) -> Options:
    """Options of the job. Raises BadParameter for what excludes each other."""
    from hlcli.jobs.objects import Options

    if object_key and local_file is not None:
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
        local=local_file,
        again=again,
        limit=limit,
        max_bytes=round(max_gb * 1e9),
        jobs=jobs,
        deadline=deadline,
        dry_run=dry_run,
        fail_if_locked=fail_if_locked,
    )
