"""`hlcli snapshot`: the positions of the watched wallets, each minute."""

from __future__ import annotations

from datetime import timedelta
from typing import Annotated

import typer

from hlcli.cli import common
from hlcli.exitcodes import ConfigError

EPILOG = common.epilog("hlcli snapshot --asset BTC --asset xyz:GOLD", *common.JOB_CODES)


def _asset(text: str) -> str:
    from hlcli.settings import assets_of

    try:
        (asset,) = assets_of(text)
    except (ConfigError, ValueError):
        raise typer.BadParameter(f"{text!r} is no coin such as BTC or xyz:GOLD") from None
    return asset


def snapshot(
    asset: Annotated[
        list[str] | None,
        typer.Option(
            parser=_asset, metavar="COIN", help="Only this coin; may be repeated. Default: HLCLI_ASSETS."
        ),
    ] = None,
    concurrency: Annotated[int, typer.Option(min=1, max=32, help="Requests under way at once.")] = 8,
    timeout: Annotated[
        timedelta,
        typer.Option(
            parser=common.duration,
            metavar="DURATION",
            help="For one request. Default: 10s.",
            show_default=False,
        ),
    ] = timedelta(seconds=10),
    deadline: Annotated[
        timedelta,
        typer.Option(
            parser=common.duration,
            metavar="DURATION",
            help="Stop asking so long after the minute began. Default: 50s.",
            show_default=False,
        ),
    ] = timedelta(seconds=50),
    batch: Annotated[
        int,
        typer.Option(
            min=0, max=50, metavar="N", help="Ask for N wallets at once (undocumented by the exchange)."
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

    if deadline > timedelta(seconds=59):
        raise typer.BadParameter("--deadline: a snapshot must end within its minute, 59s at most")
    report = job.snapshot(
        common.settings(),
        job.Options(
            assets=tuple(dict.fromkeys(asset or ())),
            concurrency=concurrency,
            timeout=timeout,
            deadline=deadline,
            batch=batch,
            fail_if_locked=fail_if_locked,
        ),
    )
    common.show_report(report, as_json=as_json)
