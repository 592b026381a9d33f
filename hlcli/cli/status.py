"""`hlcli status`: whether everything runs."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hlcli.cli import common
from hlcli.exitcodes import ExitCode

if TYPE_CHECKING:
    from hlcli.jobs.status import Status

EPILOG = common.epilog(
    "hlcli status --check --channel vaults", ExitCode.PARTIAL, ExitCode.TEMPORARY, ExitCode.CONFIG
)


def status(
    check: Annotated[
        bool, typer.Option("--check", help="Exit 3 when a channel failed or is stale (or missing, if named).")
    ] = False,
    channel: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Only this channel; may be repeated.")
    ] = None,
    as_json: common.Json = False,
) -> None:
    """Show each channel's health, its last success and rows, and the use of the API budget."""
    from hlcli.jobs.status import read_status

    found = read_status(common.settings(), channel or ())
    _print_json(found) if as_json else _print(found)
    raise typer.Exit(int(found.exit_code(named=bool(channel)) if check else ExitCode.OK))


def _print_json(found: Status) -> None:
    from hlcli import output

    health: list[dict[str, Any]] = []
    for each in found.health:
        data = asdict(each)
        data.update(channel=each.channel.label, cadence=each.channel.cadence)
        health.append(data)
    output.print_json(
        {
            "channels": health,
            "snapshots": asdict(found.snapshots) if found.snapshots else None,
            "backfill": found.backfill.as_json() if found.backfill else None,
            "budgets": [asdict(each) | {"limit": found.weight_per_minute} for each in found.budgets],
        }
    )


def _print(found: Status) -> None:
    from hlcli import output

    on_terminal = sys.stdout.isatty()  # where an error would fold every other column
    output.print_table(
        ["channel", "state", "last success", "ago", "rows", "rejected", "skips", "last run"],
        [
            [
                each.channel.label,
                each.state,
                each.last_success,
                each.age,
                f"{each.rows:,}",
                f"{each.rejected:,}",
                each.skips,
                each.last_status or "never" if on_terminal else _last(each.last_status, each.error),
            ]
            for each in found.health
        ],
        whole=["channel", "state", "ago"],
    )
    if on_terminal:
        for each in found.health:
            if each.error:
                print(f"{each.channel.label}: {output.printable(each.error[:200])}")
    if found.snapshots:
        state, age = found.snapshots, found.snapshots.age_s
        print(
            f"snapshots {state.health_state}: coverage {state.coverage_pct} % at {state.last_snapshot_ts:%H:%MZ},"
            f" last usable {'never' if age is None else output.span(max(age, 0)) + ' ago'}"
        )
    if found.backfill:
        print(common.fleet_line(found.backfill))
        for worker in found.backfill.members:
            left = f", {worker.left:,} left" if worker.status == "running" else ""
            print(
                f"  worker {output.printable(worker.member)} {worker.state},"
                f" heard {output.span(worker.silence.total_seconds())} ago: {worker.units_ok:,} wallets,"
                f" {worker.per_minute(worker.weight):,.0f} weight/min{left}"
            )
    for use in found.budgets:
        closed = f", closed until {use.blocked_until:%H:%M:%SZ}" if use.blocked_until else ""
        print(
            f"budget {output.printable(use.egress_key)}: {use.weight:,} of {found.weight_per_minute:,} weight"
            f" in the last minute, {use.requests:,} requests{closed}"
        )


def _last(status: str | None, error: str | None) -> str:
    return "never" if status is None else status if not error else f"{status}: {error[:200]}"
