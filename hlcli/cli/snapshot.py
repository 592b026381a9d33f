"""`hlcli snapshot`: the positions of the watched wallets, each minute."""

from __future__ import annotations

from datetime import timedelta
from typing import Annotated

import typer

from hlcli.cli import common

EPILOG = common.epilog("hlcli snapshot --asset SOL --asset xyz:GOLD", *common.JOB_CODES)


def snapshot(
    asset: Annotated[
        list[str] | None,
        typer.Option(
            parser=common.asset, metavar="COIN", help="This coin too, beside HLCLI_ASSETS; may be repeated."
        ),
    ] = None,
    concurrency: Annotated[int, typer.Option(min=1, max=32, help="Requests under way at once.")] = 8,
    timeout: Annotated[
        timedelta,
        common.duration_option("For one request. Default: 10s."),
    ] = timedelta(seconds=10),
    deadline: Annotated[
        timedelta,
        common.duration_option("Stop asking so long after the minute began. Default: 50s."),
    ] = timedelta(seconds=50),
    batch: Annotated[
        int,
        typer.Option(
            min=0,
            max=50,
            metavar="N",
            help="Ask for N wallets at once: undocumented, and matched by order alone.",
        ),
    ] = 0,
    fail_if_locked: common.FailIfLocked = False,
    as_json: common.Json = False,
) -> None:
    """Write this minute's position of every watched wallet: a value, 0 for none, NULL for not known.

    The minute is the database's. A second run in the same minute asks only for what the first could not learn. \
Exit 0 from 95 % of the wallets, 3 from 80 %, else 4.
    """
    from hlcli.jobs import snapshot as job

    if not timedelta(seconds=1) <= deadline <= timedelta(seconds=59):
        raise typer.BadParameter("--deadline: must lie within the minute, from 1s to 59s")
    settings = common.settings()
    # Never instead of the usual ones: the minute would lack them, as the next run would find the lock held.
    assets = tuple(dict.fromkeys((*settings.hlcli_assets, *(asset or ()))))
    report = job.snapshot(
        settings,
        job.Options(
            assets=assets,
            concurrency=concurrency,
            timeout=timeout,
            deadline=deadline,
            batch=batch,
            fail_if_locked=fail_if_locked,
        ),
    )
    common.show_report(report, as_json=as_json)
