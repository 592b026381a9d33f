"""`hlcli universe`: which wallets are watched."""

from __future__ import annotations

from dataclasses import asdict
from datetime import timedelta
from typing import TYPE_CHECKING, Annotated

import typer

from hlcli.cli import common
from hlcli.exitcodes import ExitCode

if TYPE_CHECKING:
    from hlcli.jobs.refresh_universe import Universe

app = typer.Typer(help="The wallets that are watched: the best traders by 30-day PnL.", no_args_is_help=True)


@app.command(epilog=common.epilog("hlcli universe refresh --size 200", *common.JOB_CODES))
def refresh(
    size: Annotated[int, typer.Option(min=1, max=20_000, help="How many wallets to watch.")] = 200,
    deadline: Annotated[
        timedelta,
        typer.Option(
            parser=common.duration,
            metavar="DURATION",
            help="Give up after this time. Default: 10m.",
            show_default=False,
        ),
    ] = timedelta(minutes=10),
    accept_short_list: Annotated[
        bool, typer.Option("--accept-short-list", help="Take a leaderboard that lost over half its wallets.")
    ] = False,
    accept_churn: Annotated[
        bool,
        typer.Option("--accept-churn", help="Take a third universe in a row that changed by over 30 %."),
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
        int | None, typer.Option(min=1, metavar="N", help="The universe of this run. Default: the last.")
    ] = None,
    diff: Annotated[bool, typer.Option("--diff", help="What changed since the universe before it.")] = False,
    as_json: common.Json = False,
) -> None:
    """Show the wallets of the universe, or who entered, left or moved."""
    from hlcli import output
    from hlcli.jobs.refresh_universe import read_universe

    found = read_universe(common.settings(), run_id=run)
    if as_json:
        held = {"changes": found.changes} if diff else {"wallets": found.members}
        output.print_json(
            {"run": found.run, **{name: [asdict(each) for each in rows] for name, rows in held.items()}}
        )
    elif diff:
        output.print_table(
            ["change", "wallet", "rank before", "rank", "pnl 30d", "name"],
            [
                [each.change, each.wallet_id, each.rank_before, each.rank, _usd(each.month_pnl), _name(each)]
                for each in found.changes
            ],
        )
    else:
        _print_members(found)


def _print_members(found: Universe) -> None:
    from hlcli import output

    output.print_table(
        ["rank", "wallet", "pnl 30d", "roi 30d", "account value", "name"],
        [
            [
                each.rank,
                each.wallet_id,
                _usd(each.month_pnl),
                None if each.month_roi is None else f"{100 * each.month_roi:,.1f} %",
                _usd(each.account_value),
                _name(each),
            ]
            for each in found.members
        ],
    )


def _usd(value: object) -> str | None:
    return None if value is None else f"{value:,.0f}"


def _name(each: object) -> str | None:
    """The display name, cut: it is any text, of any length."""
    name = getattr(each, "display_name", None)
    return name[:24] if name else None
