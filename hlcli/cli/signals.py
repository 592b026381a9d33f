"""`hlcli signals`: what the watched wallets do, as scores and playbooks."""

from __future__ import annotations

from dataclasses import asdict
from datetime import datetime
from decimal import Decimal
from typing import Annotated

import typer

from hlcli.cli import common
from hlcli.exitcodes import ExitCode, UsageError

app = typer.Typer(help="Scores and playbooks from the snapshots, and alerts.", no_args_is_help=True)


@app.command(epilog=common.epilog("hlcli signals compute --since 2026-11-20T00:00Z", *common.JOB_CODES))
def compute(
    at: Annotated[
        datetime | None,
        typer.Option(
            parser=common.moment,
            metavar="TIME",
            help="Only the five-minute window that ends here (ISO, UTC).",
        ),
    ] = None,
    since: Annotated[
        datetime | None,
        typer.Option(
            parser=common.moment, metavar="TIME", help="Every window since, also those computed before."
        ),
    ] = None,
    fail_if_locked: common.FailIfLocked = False,
    as_json: common.Json = False,
) -> None:
    """Compute the signals of every window since the last one, v1 and v2, and raise alerts.

    Windows are five minutes long and are computed two minutes after they end. Nothing is computed on stale or failed \
snapshots; what rests on thin data is marked degraded.
    """
    from hlcli.jobs.compute_signals import Options, compute_signals

    if at is not None and since is not None:
        raise UsageError("--at and --since exclude each other")
    report = compute_signals(common.settings(), Options(at=at, since=since, fail_if_locked=fail_if_locked))
    common.show_report(report, as_json=as_json)


@app.command(epilog=common.epilog("hlcli signals show --asset BTC --since 2026-11-21", ExitCode.CONFIG))
def show(
    asset: Annotated[
        list[str] | None, typer.Option(metavar="COIN", help="Only this coin; may be repeated.")
    ] = None,
    version: Annotated[str, typer.Option(metavar="v1|v2|all", help="Which formulas.")] = "v2",
    since: Annotated[
        datetime | None,
        typer.Option(
            parser=common.moment, metavar="TIME", help="Since this time. Default: the newest window."
        ),
    ] = None,
    limit: Annotated[int, typer.Option(min=1, max=100_000, help="At most so many rows.")] = 100,
    as_json: common.Json = False,
) -> None:
    """Show signals, newest first, and the alerts of the last day."""
    from hlcli import output
    from hlcli.jobs.compute_signals import read_signals

    if version not in {"v1", "v2", "all"}:
        raise typer.BadParameter("--version: must be v1, v2 or all")
    rows, alerts = read_signals(
        common.settings(),
        assets=asset or (),
        version=None if version == "all" else version,
        since=since,
        limit=limit,
    )
    if as_json:
        output.print_json(
            {"signals": [asdict(each) for each in rows], "alerts": [asdict(each) for each in alerts]}
        )
        return
    output.print_table(
        ["time", "asset", "align", "trend", "disp", "exit", "z", "playbook", "risk", "wallets", "degraded"],
        [
            [
                f"{each.signal_ts:%m-%d %H:%M}",
                each.asset if version != "all" else f"{each.asset} {each.formula_version}",
                _score(each.alignment_score),
                each.alignment_trend,
                _score(each.dispersion_index),
                _score(each.exit_cluster_score),
                _score(each.exit_cluster_z),
                each.allowed_playbook,
                each.risk_mode,
                each.wallet_count,
                each.degraded_reason,
            ]
            for each in rows
        ],
    )
    for alert in alerts:
        print(f"{alert.alert_ts:%m-%d %H:%M} {alert.severity}: {output.printable(alert.message)}")


def _score(value: Decimal | None) -> str | None:
    return None if value is None else f"{value:.1f}"
