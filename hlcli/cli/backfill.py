"""`hlcli backfill`: every wallet's fills from the API, by one machine or many."""

from __future__ import annotations

import sys
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hlcli.cli import common

if TYPE_CHECKING:
    from hlcli.jobs.backfill_fleet import Estimate, Fleet

EPILOG = common.epilog("hlcli backfill --estimate", *common.JOB_CODES)
MOST_WORKERS = 1000
MAX_USERS_FILE = 64 << 20


def backfill(
    worker_id: Annotated[int, typer.Option(min=0, metavar="N", help="Which worker this is, from 0.")] = 0,
    total_workers: Annotated[
        int, typer.Option(min=1, max=MOST_WORKERS, metavar="M", help="How many workers there are.")
    ] = 1,
    own_shard: Annotated[
        bool,
        typer.Option("--own-shard", help="Stop when the own wallets are done; else help with the others'."),
    ] = False,
    limit: Annotated[
        int | None, typer.Option(min=1, metavar="WALLETS", help="At most so many wallets.")
    ] = None,
    user: Annotated[
        list[str] | None,
        typer.Option(parser=common.address, metavar="ADDRESS", help="Only this wallet; may be repeated."),
    ] = None,
    users_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Only the wallets of this file, an address a line.")
    ] = None,
    since: Annotated[
        datetime | None,
        typer.Option(
            parser=common.moment, metavar="TIME", help="From here on (2023-11-01).", show_default=False
        ),
    ] = None,
    until: Annotated[
        datetime | None,
        typer.Option(
            parser=common.moment,
            metavar="TIME",
            help="Up to here (2025-07-27T09Z: S3 has the rest).",
            show_default=False,
        ),
    ] = None,
    estimate: Annotated[
        bool, typer.Option("--estimate", help="Only say what it would take; asks the exchange for nothing.")
    ] = False,
    status: Annotated[bool, typer.Option("--status", help="Only show how far all workers are.")] = False,
    deadline: Annotated[
        timedelta | None, common.duration_option("Stop after so long, to be continued (none).")
    ] = None,
    max_weight: Annotated[
        int | None, typer.Option(min=1, metavar="WEIGHT", help="Stop before more than this is spent.")
    ] = None,
    concurrency: Annotated[
        int, typer.Option(min=1, max=64, metavar="N", help="Wallets that are asked for at once.")
    ] = 8,
    lease: Annotated[timedelta, typer.Option(parser=common.duration, hidden=True)] = timedelta(minutes=2),
    page_size: Annotated[int, typer.Option(min=1, max=10_000, hidden=True)] = 2000,
    fail_if_locked: common.FailIfLocked = False,
    as_json: common.Json = False,
) -> None:
    """Ask the API for the fills of every wallet that S3 does not have: those before July 2025.

    Wallets are those of the tables of fills and of the universe, or the named ones. Each page is stored with what it \
covers, so a run that ends goes on where it was. Workers with other addresses share the work: give each its \
--worker-id; those behind one address need one HL_EGRESS_KEY.
    """
    from hlcli.jobs.backfill import LAUNCH, S3_BEGINS, Options
    from hlcli.jobs.backfill import backfill as run

    if worker_id >= total_workers:
        raise typer.BadParameter(f"--worker-id: the last of {total_workers} workers is {total_workers - 1}")
    if not timedelta(seconds=1) <= lease <= timedelta(days=1):
        raise typer.BadParameter("--lease: from 1s to 1d")
    if estimate and status:
        raise typer.BadParameter("--estimate or --status, not both")
    if status and (user or users_file or since or until or limit):
        raise typer.BadParameter(
            "--status is about all wallets: without --user, --users-file, --since, --until, --limit"
        )
    settings = common.settings()
    if status:
        from hlcli.jobs.backfill_fleet import read_fleet

        _show_fleet(read_fleet(settings), as_json=as_json)
        return
    users = None
    if user or users_file is not None:
        users = sorted({*(user or ()), *(_users_of(users_file) if users_file is not None else ())})
    options = Options(
        worker_id=worker_id,
        total_workers=total_workers,
        own_shard=own_shard,
        users=users,
        since=since or LAUNCH,
        until=until or S3_BEGINS,
        limit=limit,
        deadline=deadline,
        max_weight=max_weight,
        concurrency=concurrency,
        lease=lease,
        page_size=page_size,
        fail_if_locked=fail_if_locked,
    )
    if estimate:
        from hlcli.jobs.backfill_fleet import estimate as make_estimate

        _show_estimate(make_estimate(settings, options), as_json=as_json)
        return
    common.show_report(run(settings, options), as_json=as_json)


def _users_of(path: Path) -> set[str]:
    """The addresses in a file: one a line, the first field of it; empty lines and # are left out."""
    try:
        with path.open("rb") as file:
            body = file.read(MAX_USERS_FILE + 1)
        if len(body) > MAX_USERS_FILE:
            raise typer.BadParameter(f"--users-file: {path} is larger than {MAX_USERS_FILE >> 20} MB")
        text = body.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise typer.BadParameter(f"--users-file: cannot read {path}: {reason}") from None
    users = set()
    for number, line in enumerate(text.splitlines(), 1):
        first = line.split("#")[0].replace(",", " ").split()[:1]
        if first:
            try:
                users.add(common.address(first[0]))
            except typer.BadParameter as error:
                raise typer.BadParameter(f"--users-file: line {number}: {error.message}") from None
    if not users:
        raise typer.BadParameter(f"--users-file: {path} names no wallet")
    return users


def _show_estimate(found: Estimate, *, as_json: bool) -> None:
    from hlcli import output
    from hlcli.jobs.backfill_fleet import FLEETS

    if as_json:
        output.print_json(
            {
                "wallets": found.wallets,
                "weight_per_minute": found.weight_per_minute,
                "scenarios": [
                    {"name": each.name, "requests": each.requests, "weight": each.weight, "hours": each.hours}
                    for each in found.scenarios
                ],
            }
        )
        return
    print(
        f"{found.wallets:,} wallets are left, at {found.weight_per_minute:,} weight a minute for each address:"
    )
    output.print_table(
        ["scenario", "requests", "weight", *(f"hours with {workers}" for workers in FLEETS)],
        [
            [
                each.name,
                f"{each.requests:,}",
                f"{each.weight:,}",
                *(f"{each.hours[workers]:,}" for workers in FLEETS),
            ]
            for each in found.scenarios
        ],
    )


def _show_fleet(found: Fleet, *, as_json: bool) -> None:
    from hlcli import output

    if as_json:
        output.print_json(found.as_json())
        return
    print(common.fleet_line(found))
    # A terminal has no room for the host, which is the egress key anyway where that was not set.
    host = not sys.stdout.isatty()
    figures = ["state", "heard", "wallets", "a minute", "weight/min", "failed", "left"]
    if found.members:
        output.print_table(
            ["worker", *(["host"] if host else []), *figures],
            [
                [
                    each.member,
                    *([each.host] if host else []),
                    each.state,
                    each.silence,
                    f"{each.units_ok:,}",
                    f"{each.per_minute(each.units_ok):,.1f}",
                    f"{each.per_minute(each.weight):,.0f}",
                    each.units_failed,
                    f"{each.left:,}" if each.status == "running" else "-",
                ]
                for each in found.members
            ],
            whole=figures,
        )
