"""`hlcli fills`: every wallet's fills."""

from __future__ import annotations

from typing import Annotated

import typer

from hlcli.cli import common, coverage, objects

app = typer.Typer(help="Every wallet's fills.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Every wallet's fills."""


@app.command(epilog=common.epilog("hlcli fills sync --since 2026-11-20 --dry-run", *common.JOB_CODES))
def sync(
    incremental: objects.Incremental = False,
    since: objects.Since = None,
    until: objects.Until = None,
    object_key: objects.ObjectKey = None,
    local_file: objects.LocalFile = None,
    user: Annotated[
        str | None,
        typer.Option(
            parser=common.address,
            metavar="ADDRESS",
            help="With --local-file: whose fills these are, of answers of the API, which do not say.",
        ),
    ] = None,
    again: objects.Again = False,
    dry_run: objects.DryRun = False,
    limit: objects.Limit = None,
    max_gb: objects.MaxGb = objects.MAX_GB,
    jobs: objects.Jobs = objects.JOBS,
    deadline: objects.Deadline = objects.DEADLINE,
    fail_if_locked: common.FailIfLocked = False,
    as_json: common.Json = False,
) -> None:
    """Read the fills of new objects of HL_FILLS_S3_BUCKET, both sides of each trade.

    Objects are files of an hour, cut by arrival: the fills of an hour are in two of them. An object that failed is \
read again by the next run, one that was replaced as well.
    """
    from hlcli.jobs.sync_fills import sync_fills

    if user is not None and not local_file:
        raise typer.BadParameter("--user: only with --local-file")
    options = objects.options(
        incremental=incremental,
        since=since,
        until=until,
        object_key=object_key,
        local_file=local_file,
        again=again,
        dry_run=dry_run,
        limit=limit,
        max_gb=max_gb,
        jobs=jobs,
        deadline=deadline,
        fail_if_locked=fail_if_locked,
    )
    common.show_report(sync_fills(common.settings(), options, user=user), as_json=as_json, always=dry_run)


app.command(epilog=coverage.EPILOG)(coverage.coverage)
