"""`hlcli ingest`: one command a dataset."""

from __future__ import annotations

from datetime import timedelta
from decimal import Decimal
from typing import Annotated

import typer

from hlcli.cli import common

app = typer.Typer(help="Fetch data from a source into its tables.", no_args_is_help=True)


@app.command(epilog=common.epilog("hlcli ingest vaults --min-tvl 10000 --deadline 50m", *common.JOB_CODES))
def vaults(
    limit: Annotated[
        int | None, typer.Option(min=0, help="Ask for the details of at most this many vaults.")
    ] = None,
    address: Annotated[
        list[str] | None,
        typer.Option(parser=common.address, metavar="0x...", help="Only this vault; may be repeated."),
    ] = None,
    min_tvl: Annotated[
        Decimal | None,
        typer.Option(parser=common.amount, metavar="USD", help="Only vaults with at least this TVL."),
    ] = None,
    include_closed: Annotated[bool, typer.Option("--include-closed", help="Closed vaults too.")] = False,
    concurrency: Annotated[int, typer.Option(min=1, max=32, help="Requests under way at once.")] = 4,
    requests_per_second: Annotated[
        float | None, typer.Option(min=0.01, max=1000, help="An own limit, below the shared weight budget.")
    ] = None,
    deadline: Annotated[
        timedelta,
        common.duration_option("Stop asking after this time. Default: 50m."),
    ] = timedelta(minutes=50),
    accept_short_list: Annotated[
        bool, typer.Option("--accept-short-list", help="Take a list that lost over a fifth of its vaults.")
    ] = False,
    fail_if_locked: common.FailIfLocked = False,
    as_json: common.Json = False,
) -> None:
    """Update the vault list, then this hour's metrics of as many vaults as the budget allows.

    Open vaults come first, by TVL and by how long ago they were last seen. A vault that has its row for this \
hour is not asked again, so a run that was killed is finished by the next one.
    """
    from hlcli.jobs.ingest_vaults import Options, ingest_vaults

    report = ingest_vaults(
        common.settings(),
        Options(
            limit=limit,
            addresses=tuple(dict.fromkeys(address or ())),
            min_tvl=min_tvl,
            include_closed=include_closed,
            concurrency=concurrency,
            requests_per_second=requests_per_second,
            deadline=deadline,
            accept_short_list=accept_short_list,
            fail_if_locked=fail_if_locked,
        ),
    )
    common.show_report(report, as_json=as_json)
