"""`hlcli universe`: which wallets are watched."""

from __future__ import annotations

import sys
from dataclasses import asdict
from datetime import timedelta
from typing import TYPE_CHECKING, Annotated

import typer

from hlcli.cli import common
from hlcli.exitcodes import ExitCode
from hlcli.logs import log

if TYPE_CHECKING:
    from decimal import Decimal

    from hlcli.jobs.refresh_universe import Change, Member, Universe

app = typer.Typer(help="The wallets that are watched: the best traders by 30-day PnL.", no_args_is_help=True)


@app.command(epilog=common.epilog("hlcli universe refresh --size 200", *common.JOB_CODES))
def refresh(
    size: Annotated[
        int | None,
        typer.Option(
            min=1, max=20_000, help="How many wallets to watch. Default: as many as last time, at first 200."
        ),
    ] = None,
    deadline: Annotated[
        timedelta,
        common.duration_option("Give up after this time. Default: 10m."),
    ] = timedelta(minutes=10),
    accept_short_list: Annotated[
        bool, typer.Option("--accept-short-list", help="Take a leaderboard that lost over half its wallets.")
    ] = False,
    accept_churn: Annotated[
        bool,
        typer.Option("--accept-churn", help="Take it though over 30 % entered or left, thrice in a row."),
    ] = False,
    fail_if_locked: common.FailIfLocked = False,
    as_json: common.Json = False,
) -> None:
    """Replace the universe by the best wallets of today's leaderboard.

    A leaderboard that is short, broken or changes too much leaves the universe as it was; the run is kept with the \
reason.
    """
    from hlcli.jobs.refresh_universe import Options, refresh_universe

    report = refresh_universe(
        common.settings(),
        Options(
            size=size,
            deadline=deadline,
            accept_short_list=accept_short_list,
            accept_churn=accept_churn,
            fail_if_locked=fail_if_locked,
        ),
    )
    common.show_report(report, as_json=as_json)


@app.command(epilog=common.epilog("hlcli universe show --diff", ExitCode.TEMPORARY, ExitCode.CONFIG))
def show(
    run: Annotated[
        int | None,
        typer.Option(min=1, max=2**63 - 1, metavar="N", help="The universe of this run. Default: the last."),
    ] = None,
    diff: Annotated[bool, typer.Option("--diff", help="What changed since the universe before it.")] = False,
    as_json: common.Json = False,
) -> None:
    """Show the wallets of the universe, or who entered, left or moved."""
    from hlcli import output
    from hlcli.jobs.refresh_universe import read_universe

    found = read_universe(common.settings(), run_id=run)
    if found.run["error"]:
        log.warning("run %d failed: %s", found.run["run_id"], found.run["error"])
    if as_json:
        held = {"changes": found.changes} if diff else {"wallets": found.members}
        output.print_json(
            {"run": found.run, **{name: [asdict(each) for each in rows] for name, rows in held.items()}}
        )
        return
    if sys.stdout.isatty():
        told = found.run
        print(f"run {told['run_id']} at {told['as_of_ts']:%Y-%m-%d %H:%MZ}, {told['status']}")
    if diff:
        output.print_table(
            ["change", "wallet", "was", "rank", "pnl 30d", "name"],
            [
                [
                    each.change,
                    each.wallet_id,
                    each.rank_before,
                    each.rank,
                    _number(each.month_pnl),
                    _name(each),
                ]
                for each in found.changes
            ],
            whole=["wallet"],
        )
    else:
        _print_members(found)


def _print_members(found: Universe) -> None:
    from hlcli import output

    output.print_table(
        ["rank", "wallet", "pnl 30d", "roi 30d", "account", "name"],
        [
            [
                each.rank,
                each.wallet_id,
                _number(each.month_pnl),
                None if each.month_roi is None else f"{_number(100 * each.month_roi, 1)} %",
                None if each.account_value is None else _number(each.account_value),
                _name(each),
            ]
            for each in found.members
        ],
        whole=["wallet"],
    )


def _number(value: Decimal, decimals: int = 0) -> str:
    """A number for the eye; an absurd one in short."""
    return f"{value:,.{decimals}f}" if abs(value) < 10**15 else f"{value:.2e}"


def _name(each: Member | Change) -> str | None:
    """The display name, cut: it is any text, of any length."""
    return each.display_name[:12] if each.display_name else None
