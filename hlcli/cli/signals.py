"""`hlcli signals`: what the watched wallets do, as scores and playbooks."""

from __future__ import annotations

import sys
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


@app.command(
    epilog=common.epilog(
        "hlcli signals show --asset BTC --since 2026-11-21", ExitCode.TEMPORARY, ExitCode.CONFIG
    )
)
def show(
    asset: Annotated[
        list[str] | None,
        typer.Option(parser=common.asset, metavar="COIN", help="Only this coin; may be repeated."),
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
    """Show signals, newest first, and the last five alerts of the last day.

    align: 0 all sell, 50 balance, 100 all buy. disp: 0 unanimous to 100 divided. exit: percent who reduce, in v2 of \
those who hold. z: how unusual that is, in standard deviations. Times are UTC.
    """
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
        output.print_json({"signals": rows, "alerts": alerts})
        return
    on_terminal = sys.stdout.isatty()  # where the reason would fold every other column
    output.print_table(
        ["time", "asset", "v", "align", "trend", "disp", "exit", "z", "playbook", "risk", "degraded"],
        [
            [
                f"{row['signal_ts']:%m-%d %H:%M}",
                row["asset"],
                row["formula_version"],
                _score(row["alignment_score"]),
                row["alignment_trend"],
                _score(row["dispersion_index"]),
                _score(row["exit_cluster_score"]),
                _score(row["exit_cluster_z"]),
                row["allowed_playbook"],
                row["risk_mode"],
                "yes" if on_terminal and row["is_degraded"] else row["degraded_reason"],
            ]
            for row in rows
        ],
        whole=["time", "v", "trend", "playbook", "risk"],
    )
    for alert in alerts:
        print(f"{alert['alert_ts']:%m-%d %H:%M} {alert['severity']}: {output.printable(alert['message'])}")


def _score(value: Decimal | None) -> str | None:
    return None if value is None else f"{value:.1f}"
