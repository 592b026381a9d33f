"""`hlcli twap`: TWAP orders."""

from __future__ import annotations

import typer

from hlcli.cli import common, objects

app = typer.Typer(help="TWAP orders and what became of them.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """TWAP orders and what became of them."""


@app.command(epilog=common.epilog("hlcli twap sync --since 2026-11-01 --dry-run", *common.JOB_CODES))
def sync(
    incremental: objects.Incremental = False,
    since: objects.Since = None,
    until: objects.Until = None,
    object_key: objects.ObjectKey = None,
    local_file: objects.LocalFile = None,
    again: objects.Again = False,
    dry_run: objects.DryRun = False,
    limit: objects.Limit = None,
    max_gb: objects.MaxGb = objects.MAX_GB,
    jobs: objects.Jobs = objects.JOBS,
    deadline: objects.Deadline = objects.DEADLINE,
    fail_if_locked: common.FailIfLocked = False,
    as_json: common.Json = False,
) -> None:
    """Read the TWAP events of new objects of AWS_S3_BUCKET: activated, then finished, terminated or error.

    An object that failed is read again by the next run, one that was replaced as well.
    """
    from hlcli.jobs.sync_twaps import sync_twaps

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
    common.show_report(sync_twaps(common.settings(), options), as_json=as_json, always=dry_run)
