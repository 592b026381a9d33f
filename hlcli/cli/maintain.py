"""`hlcli maintain`: the database stays at its size."""

from __future__ import annotations

from typing import Annotated

import typer

from hlcli.cli import common

EPILOG = common.epilog("hlcli maintain --dry-run --json", *common.JOB_CODES)


def maintain(
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Count what would be done; change nothing, not even the ledger.")
    ] = False,
    fail_if_locked: common.FailIfLocked = False,
    as_json: common.Json = False,
) -> None:
    """Remove rows older than the table retention_rules keeps them, and make partitions for the days to come.

    A table that is in use when a partition is to be made or dropped is left for the next run.
    """
    from hlcli.jobs import maintain as job

    report = job.maintain(common.settings(), dry_run=dry_run, fail_if_locked=fail_if_locked)
    common.show_report(report, as_json=as_json, always=dry_run)
