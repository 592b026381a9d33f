"""`hlcli signals`: from minutes of positions to scores, playbooks and alerts."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

from hlcli import migrations
from hlcli.exitcodes import UsageError
from hlcli.features import alerting, signals
from hlcli.jobs import Job, Report, run_job
from hlcli.ledger import Channel
from hlcli.loader import Merge, load
from hlcli.reader import read
from hlcli.sqlfiles import query

if TYPE_CHECKING:
    from collections.abc import Sequence

    from psycopg import Connection

    from hlcli.ledger import Unit
    from hlcli.settings import Settings

CHANNEL = Channel(
    "hyperliquid", "wallet_signals", timedelta(minutes=5), "hlcli signals compute", "2-59/5 * * * *"
)

# A day at a time, however long ago --since is; and a run without options catches up for no longer than this.
CHUNK = timedelta(days=1)
CATCH_UP = timedelta(days=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What the command line decides."""

    at: datetime | None = None
    """Only the window that ends here."""
    since: datetime | None = None
    """All windows that end here or later."""
    fail_if_locked: bool = False


def compute_signals(settings: Settings, options: Options) -> Report:
    """Compute the signals of every window since the last one, or of those asked for, and raise the alerts that follow.

    Computing a window again changes nothing, unless its snapshots have, or those of the day before it, which decide
    what is dust, are no longer kept. What snapshots are too few or too old for is skipped and told; that is no failure.

    Raises UsageError for a window that does not exist, and what run_job() raises.
    """
    # Before the run: a wrong option is no failure of the channel.
    with migrations.connect_ready(settings, role=CHANNEL.name) as connection:
        first, last = _range(connection, options)

    def work(job: Job) -> None:
        skipped: Counter[str] = Counter()
        start = first
        while start <= last:
            end = min(start + CHUNK - signals.WINDOW, last)
            with job.run.unit() as unit:
                skipped += _compute(job, unit, start, end)
            start = end + signals.WINDOW
        job.report.details.update(newest_window=last, skipped=dict(skipped))
        with job.run.unit() as unit:
            job.report.details["alerts"] = _alert(unit)

    return run_job(settings, CHANNEL, work, fail_if_locked=options.fail_if_locked)


def _range(connection: Connection[Any], options: Options) -> tuple[datetime, datetime]:
    """The ends of the first and the last window to compute; the first is later when there is nothing to do."""
    row = connection.execute(query("signals", "newest_window")).fetchone()
    assert row is not None
    newest, stored, first_stored, oldest_snapshot, now = row
    if options.at is not None:
        if options.at > newest:
            raise UsageError(f"--at: the newest window that can be computed ends {newest:%Y-%m-%d %H:%MZ}")
        if _up(options.at) != options.at:
            raise UsageError("--at: windows end at multiples of five minutes")
        return options.at, options.at
    first = options.since or max(stored or now - CATCH_UP, now - CATCH_UP)
    if options.since is not None and options.since > newest:
        raise UsageError(f"--since: the newest window that can be computed ends {newest:%Y-%m-%d %H:%MZ}")
    if options.since is not None and stored and oldest_snapshot and first_stored < oldest_snapshot:
        # What is dust follows from a day: the signals of the first day kept were computed from more than is left.
        first = max(first, min(stored, oldest_snapshot + signals.DAY))
    # Snapshots are kept for days only; before them there is nothing to compute.
    return _up(max(first, oldest_snapshot or now)), newest


def _up(moment: datetime) -> datetime:
    """The end of the window that a moment lies in."""
    return moment + (datetime.min.replace(tzinfo=moment.tzinfo) - moment) % signals.WINDOW


def _compute(job: Job, unit: Unit, first: datetime, last: datetime) -> Counter[str]:
    """Compute and store the windows of one chunk; returns how often signals were skipped, by reason."""
    import polars as pl

    began = time.monotonic()
    connection = unit.connection
    moment = pl.Datetime("us", "UTC")
    # The positions of two days are grouped in memory, some 100 MB for 200 wallets and three assets.
    connection.execute("set local work_mem = '64MB'")
    around = {"after": first - 2 * signals.WINDOW, "until": last, "first": first}
    found = signals.compute(
        read(
            connection,
            query("signals", "positions"),
            {"after": first - signals.DAY, "until": last},
            {
                "asset": pl.String,
                "wallet_id": pl.String,
                "window_end": moment,
                "position_szi": pl.Float64,
                "is_dirty": pl.Boolean,
            },
        ),
        read(
            connection,
            query("signals", "windows"),
            around,
            {
                "window_end": moment,
                "snapshot_count": pl.Int64,
                "partial_count": pl.Int64,
                "wallets_expected": pl.Int64,
                "wanted": pl.Boolean,
            },
        ),
        read(
            connection,
            query("signals", "past"),
            {"first": first},
            {
                "signal_ts": moment,
                "asset": pl.String,
                "formula_version": pl.String,
                "alignment_score": pl.Float64,
                "reducer_count": pl.Int64,
                "holder_count": pl.Int64,
            },
        ),
    )
    took_ms = pl.lit(round((time.monotonic() - began) * 1000)).alias("computation_ms")
    run_id = unit.run.run_id
    counts = load(
        connection,
        "signals",
        found.signals.with_columns(took_ms),
        rule=Merge.UPDATE,
        touch=["computation_ms"],
        run_id=run_id,
    )
    counts += load(connection, "signal_contributors", found.contributors, rule=Merge.UPDATE, run_id=run_id)
    windows = found.signals["signal_ts"].n_unique()
    unit.add(counts, units_ok=windows)
    job.report.details["windows"] = job.report.details.get("windows", 0) + windows
    return Counter(found.skipped["reason"].to_list())


def _alert(unit: Unit) -> int:
    """Decide what is new for each alert and store alerts and states; returns how many are to be sent."""
    from psycopg.rows import class_row

    connection = unit.connection
    rows = connection.cursor(row_factory=class_row(alerting.State)).execute(query("signals", "alert_states"))
    states = {(state.asset, state.alert_type): state for state in rows}
    row = connection.execute(query("signals", "last_usable")).fetchone()
    assert row is not None
    last_snapshot, now = row
    if last_snapshot is None:
        return 0  # there never was a snapshot, or not for as long as runs are kept: nothing new to say
    seen = [state.last_evaluated_ts for key, state in states.items() if key[1] != alerting.STALE]
    after = min((each for each in seen if each), default=None)
    found = connection.execute(
        query("signals", "to_evaluate"), {"after": after if all(seen) and after else now - CATCH_UP}
    ).fetchall()
    after_states, alerts = alerting.evaluate(
        states, [alerting.Signal(*each) for each in found], now=now, last_snapshot=last_snapshot
    )
    for alert in alerts:
        connection.execute(query("signals", "keep_alert"), asdict(alert))
    for key, state in sorted(after_states.items()):
        if state != states.get(key):
            connection.execute(query("signals", "keep_alert_state"), asdict(state))
    unit.add()
    return sum(not alert.suppressed for alert in alerts)


def read_signals(
    settings: Settings,
    *,
    assets: Sequence[str] = (),
    version: str | None = "v2",
    since: datetime | None = None,
    limit: int = 100,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows of `signals`, the newest window's or the newest `limit` since a moment, and of `v_recent_alerts`."""
    from psycopg.rows import dict_row

    wanted = {"assets": list(assets) or None, "version": version, "since": since, "limit": limit}
    with migrations.connect_ready(settings, role="signals") as connection:
        shown = connection.cursor(row_factory=dict_row).execute(query("signals", "show"), wanted)
        alerts = connection.cursor(row_factory=dict_row).execute(query("signals", "recent_alerts"))
        return shown.fetchall(), alerts.fetchall()
