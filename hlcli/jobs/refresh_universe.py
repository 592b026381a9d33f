"""`hlcli universe`: which wallets are watched, the best of the leaderboard by PnL of 30 days."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from datetime import timedelta
from decimal import Decimal
from typing import TYPE_CHECKING, Any, NamedTuple

from hlcli import migrations
from hlcli.exitcodes import TemporaryError, UsageError
from hlcli.http import BadPayloadError, SourceError
from hlcli.jobs import Job, Report, run_job
from hlcli.ledger import Channel
from hlcli.loader import Merge, load, quarantine
from hlcli.logs import log, one_line
from hlcli.sources import wallets
from hlcli.sqlfiles import query

if TYPE_CHECKING:
    from datetime import datetime

    from hlcli.http import HttpClient
    from hlcli.ledger import Unit
    from hlcli.settings import Settings
    from hlcli.sources.wallets import Leaderboard

CHANNEL = Channel(
    "hyperliquid", "wallet_universe", timedelta(hours=6), "hlcli universe refresh", "41 */6 * * *"
)

FIRST_SIZE = 200
# Fewer are no universe; more than this change is worth a warning, three times in a row a broken source.
LEAST_SHARE_RECEIVED = 0.9
LEAST_SHARE_OF_LAST_LIST = 0.5
CHURN_WARNING = 0.3
CHURN_REFUSED_AFTER = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What the command line decides."""

    size: int | None = None
    """None: as large as the last one, at first 200."""
    deadline: timedelta = timedelta(minutes=10)
    accept_short_list: bool = False
    accept_churn: bool = False
    fail_if_locked: bool = False


@dataclass(slots=True, kw_only=True)
class _Outcome:
    """A row of wallet_universe_runs in the making."""

    as_of_ts: datetime
    n_requested: int
    ledger_run_id: Any
    status: str = "failed"
    source: str | None = None
    n_received: int = 0
    n_listed: int = 0
    entered_count: int = 0
    exited_count: int = 0
    churn_warning_count: int = 0
    error: str | None = None


class _Last(NamedTuple):
    """The last success, as the query last_universe tells it."""

    n_requested: int
    n_listed: int
    source: str
    churn_warning_count: int


def refresh_universe(settings: Settings, options: Options) -> Report:
    """Replace the universe by the best wallets of today's leaderboard: run, members and current set in one transaction.

    A list that cannot be had, is short, or changes the universe for the third time beyond all likelihood leaves
    everything as it was, but for the failed run with its reason.

    Raises TemporaryError then, and what run_job() raises.
    """

    def work(job: Job) -> None:
        run = job.run
        row = run.connection.execute(query("wallets", "last_universe")).fetchone()
        last = _Last(*row) if row else None
        size = options.size or (last.n_requested if last else FIRST_SIZE)
        outcome = _Outcome(as_of_ts=run.started_at, n_requested=size, ledger_run_id=run.run_id)
        try:
            with job.client(deadline=options.deadline) as client:
                board = _fetch(client, job, outcome)
            with run.unit() as unit:
                _replace(job, unit, board, last, outcome, options)
        except TemporaryError as error:
            outcome.status, outcome.error = "failed", one_line(error)
            with run.unit() as unit:
                unit.connection.execute(query("wallets", "begin_universe_run"), asdict(outcome))
                unit.add(units_failed=1)
            raise

    return run_job(settings, CHANNEL, work, fail_if_locked=options.fail_if_locked)


def _fetch(client: HttpClient, job: Job, outcome: _Outcome) -> Leaderboard:
    """The leaderboard from the stats server or else from the info endpoint."""
    try:
        board = wallets.fetch_leaderboard(client, job.settings, outcome.n_requested)
        outcome.source = "stats-data"
    except SourceError as error:
        log.warning("the leaderboard cannot be had (%s), asking the info endpoint", one_line(error))
        try:
            board = wallets.fetch_leaderboard_from_info(client, job.settings, outcome.n_requested)
        except SourceError as second:
            raise SourceError(f"{one_line(error)}; and the fallback: {one_line(second)}") from error
        outcome.source = "info-api"
    outcome.n_received, outcome.n_listed = board.wallets.height, board.listed
    return board


def _replace(
    job: Job, unit: Unit, board: Leaderboard, last: _Last | None, outcome: _Outcome, options: Options
) -> None:
    import polars as pl

    connection, run = unit.connection, job.run
    before = {wallet for (wallet,) in connection.execute(query("wallets", "universe"))}
    now = set(board.wallets["wallet_id"])
    outcome.entered_count, outcome.exited_count = len(now - before), len(before - now)
    last_listed = last.n_listed if last and last.source == outcome.source else 0
    _refuse_short(board, outcome, last_listed, options)
    # The first universe, or one of another size, is no churn.
    churn = (outcome.entered_count + outcome.exited_count) / outcome.n_requested
    if last and last.n_requested == outcome.n_requested and churn > CHURN_WARNING:
        outcome.churn_warning_count = last.churn_warning_count + 1
        _refuse_churn(churn, outcome, options)
    outcome.status = "success"
    row = connection.execute(query("wallets", "begin_universe_run"), asdict(outcome)).fetchone()
    assert row is not None
    connection.execute(query("wallets", "drop_exited"), (sorted(now),))
    as_of = pl.lit(outcome.as_of_ts).cast(pl.Datetime("us", "UTC"))
    frame = board.wallets.with_columns(as_of.alias("as_of_ts"), as_of.alias("updated_at"))
    counts = load(connection, wallets.UNIVERSE, frame, rule=Merge.UPDATE, run_id=run.run_id)
    counts += quarantine(connection, wallets.UNIVERSE, board.rejected, run.run_id)
    connection.execute(query("wallets", "keep_members"), row)
    unit.add(counts, units_ok=1)
    job.report.details.update(
        universe_run=row[0],
        source=outcome.source,
        listed=outcome.n_listed,
        wallets=outcome.n_received,
        entered=outcome.entered_count,
        exited=outcome.exited_count,
    )


def _refuse_short(board: Leaderboard, outcome: _Outcome, last_listed: int, options: Options) -> None:
    if outcome.n_received < outcome.n_requested * LEAST_SHARE_RECEIVED:
        raise BadPayloadError(
            f"the leaderboard has {outcome.n_received} usable wallets, {outcome.n_requested} were asked for: "
            "refused, the universe stays as it was"
        )
    if board.listed < last_listed * LEAST_SHARE_OF_LAST_LIST and not options.accept_short_list:
        raise BadPayloadError(
            f"the leaderboard has {board.listed} wallets, the last one had {last_listed}: refused, "
            "the universe stays as it was (--accept-short-list takes it)"
        )


def _refuse_churn(churn: float, outcome: _Outcome, options: Options) -> None:
    times = outcome.churn_warning_count
    if times >= CHURN_REFUSED_AFTER and not options.accept_churn:
        raise BadPayloadError(
            f"{outcome.entered_count} wallets entered and {outcome.exited_count} left, change number {times} of "
            "that size in a row: refused, the universe stays as it was (--accept-churn takes it)"
        )
    log.warning(
        "%d wallets entered the universe and %d left, together %.0f %% of it (%d in a row)",
        outcome.entered_count,
        outcome.exited_count,
        100 * churn,
        times,
    )


@dataclass(frozen=True, slots=True)
class Member:
    """A wallet of a universe."""

    rank: int
    wallet_id: str
    month_pnl: Decimal
    month_roi: Decimal | None
    account_value: Decimal | None
    display_name: str | None


@dataclass(frozen=True, slots=True)
class Change:
    """What became of a wallet since the success before."""

    change: str
    """entered, exited or moved."""
    wallet_id: str
    rank_before: int | None
    rank: int | None
    month_pnl: Decimal
    display_name: str | None


@dataclass(frozen=True, slots=True)
class Universe:
    """One run with its members, or with the changes that it made."""

    run: dict[str, Any]
    """The columns of wallet_universe_runs."""
    members: list[Member]
    changes: list[Change]


def read_universe(settings: Settings, *, run_id: int | None = None) -> Universe:
    """The universe of a run, by default of the last success.

    Raises UsageError when there is no such run, TemporaryError before the first success.
    """
    from psycopg.rows import class_row, dict_row

    with migrations.connect_ready(settings, role="universe") as connection:
        found = (
            connection.cursor(row_factory=dict_row)
            .execute(query("wallets", "universe_run"), {"run_id": run_id})
            .fetchone()
        )
        if found is None:
            if run_id is None:
                raise TemporaryError("there is no universe of wallets yet: run `hlcli universe refresh`")
            raise UsageError(f"--run: there is no run {run_id}")
        members = (
            connection.cursor(row_factory=class_row(Member))
            .execute(query("wallets", "members"), (found["run_id"],))
            .fetchall()
        )
        rows: list[tuple[Any, ...]] = (
            connection.execute(query("wallets", "diff"), {"run_id": found["run_id"]}).fetchall()
            if found["status"] == "success"
            else []
        )
    return Universe(found, members, [Change(*row) for row in rows])
