"""`hlcli rank`: tables derived from what was ingested."""

from __future__ import annotations

from datetime import timedelta
from typing import Annotated

import typer

from hlcli.cli import common

app = typer.Typer(help="Rank what was ingested.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Rank what was ingested."""


@app.command(epilog=common.epilog("hlcli rank vaults --max-age 6h", *common.JOB_CODES))
def vaults(
    max_age: Annotated[
        timedelta,
        common.duration_option("Leave out vaults with older metrics. Default: 6h."),
    ] = timedelta(hours=6),
    fail_if_locked: common.FailIfLocked = False,
    as_json: common.Json = False,
) -> None:
    """Rank open vaults by what they could distribute: the table top_500_vaults, replaced in one transaction."""
    from hlcli.jobs.rank_vaults import rank_vaults

    report = rank_vaults(common.settings(), max_age=max_age, fail_if_locked=fail_if_locked)
    common.show_report(report, as_json=as_json)
