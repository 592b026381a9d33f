"""`hlcli snapshot`: the positions of every watched wallet in one minute."""

from __future__ import annotations

import json
import time
from collections import Counter
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from statistics import median
from typing import TYPE_CHECKING, Any

from hlcli.exitcodes import ConfigError, TemporaryError
from hlcli.features.signals import EPS_ABS
from hlcli.jobs import FAILED_SHOWN, Job, Report, run_job
from hlcli.jobs.asking import ask_each
from hlcli.ledger import Channel
from hlcli.loader import Merge, Rejected, load, quarantine
from hlcli.logs import log, one_line
from hlcli.sources import wallets
from hlcli.sources.info import weight
from hlcli.sqlfiles import query

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hlcli.http import HttpClient, SourceError
    from hlcli.settings import Settings
    from hlcli.sources.wallets import Positions, Question

CHANNEL = Channel("hyperliquid", "wallet_snapshots", timedelta(minutes=1), "hlcli snapshot", "* * * * *")

# A run that begins later than in this part of the time until its deadline takes the next minute.
LATEST_START = 0.7
# Everybody is asked once; who failed is asked again while there is time, so that a slow wallet holds up no other.
ROUNDS = 4
CLOCKS_APART = timedelta(minutes=2)


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What the command line decides."""

    assets: Sequence[str] = ()
    """Empty: those of the settings."""
    concurrency: int = 8
    timeout: timedelta = timedelta(seconds=10)
    """For one request."""
    deadline: timedelta = timedelta(seconds=50)
    """From the beginning of the minute."""
    batch: int = 0
    """Wallets in one undocumented batch request; 0: one request a wallet."""
    fail_if_locked: bool = False


def snapshot(settings: Settings, options: Options) -> Report:
    """Write one row of `wallet_snapshots` per wallet and asset for this minute by the database's clock.

    A wallet that could not be read is written as unknown, never as flat. A second run in the minute asks for what the
    first could not learn, and for nothing else. The whole minute commits at once, with its row of `ingest_runs`.

    Raises TemporaryError when there is no universe, ConfigError for assets none of which the exchange lists, and what
    run_job() raises.
    """

    def work(job: Job) -> None:
        if not job.run.connection.execute(query("wallets", "universe")).fetchone():
            raise TemporaryError("there is no universe of wallets yet: run `hlcli universe refresh`")
        began = time.monotonic()
        minute, ends = _minute(job, options)
        assets = list(options.assets or settings.hlcli_assets)
        lacking = job.run.connection.execute(
            query("wallets", "lacking"), {"assets": assets, "minute": minute}
        ).fetchall()
        job.report.details.update(minute=minute, assets=", ".join(assets))
        if not lacking:
            job.report.details["already_done"] = "the whole minute"
            return
        asked = [question for row in lacking for question in wallets.questions(*row)]
        needed, allowed = weight("clearinghouseState") * len(asked), settings.hl_api_weight_per_minute
        if needed > allowed:
            log.warning(
                "these positions cost %d weight, the budget is %d a minute: some stay unknown",
                needed,
                allowed,
            )
        answers = _Answers()
        # The tables may have been locked meanwhile.
        with job.client(deadline=timedelta(seconds=ends - time.monotonic()), attempts=1) as client:
            _ask(client, job, asked, answers, options)
            unlisted = _unlisted(client, job, answers, options)
        if unlisted.issuperset(assets):
            raise ConfigError(
                f"the exchange lists no {' or '.join(sorted(unlisted))}: see HLCLI_ASSETS, --asset"
            )
        _warn_of_clocks(answers, minute)
        _store(job, minute, asked, answers, unlisted, began)

    return run_job(settings, CHANNEL, work, fail_if_locked=options.fail_if_locked)


def _minute(job: Job, options: Options) -> tuple[datetime, float]:
    """The minute to write and the time.monotonic() until which to ask; waits for the next one when it is far gone."""
    deadline_s = options.deadline.total_seconds()
    while True:
        row = job.run.connection.execute(query("wallets", "minute")).fetchone()
        assert row is not None
        minute, into_s = row
        if into_s <= LATEST_START * deadline_s:
            return minute, time.monotonic() + deadline_s - into_s
        log.warning("%d s of the minute have passed: waiting for the next one", into_s)
        time.sleep(60.001 - into_s)


@dataclass(slots=True)
class _Answers:
    """What came of each question; the last failure is the reason of those that stay unanswered."""

    found: dict[Question, Positions] = field(default_factory=dict)
    reasons: dict[Question, str] = field(default_factory=dict)

    def answered(self, unit: Question, answer: Positions) -> None:
        self.found[unit] = answer

    def failed(self, unit: Question, error: SourceError) -> None:
        self.reasons[unit] = one_line(error)[:200]

    def left(self, asked: Sequence[Question]) -> list[Question]:
        return [question for question in asked if question not in self.found]


@dataclass(slots=True)
class _Batches:
    """The same for batches of questions."""

    answers: _Answers

    def answered(self, unit: Sequence[Question], answer: Sequence[Positions | None]) -> None:
        self.answers.found.update(
            {question: found for question, found in zip(unit, answer, strict=True) if found is not None}
        )

    def failed(self, unit: Sequence[Question], error: SourceError) -> None:
        for question in unit:
            self.answers.failed(question, error)


def _ask(client: HttpClient, job: Job, asked: list[Question], answers: _Answers, options: Options) -> None:
    timeout_s = options.timeout.total_seconds()
    if options.batch:
        by_dex: dict[str, list[Question]] = {}
        for question in asked:
            by_dex.setdefault(question.dex, []).append(question)
        ask_each(
            client,
            [
                held[start : start + options.batch]
                for held in by_dex.values()
                for start in range(0, len(held), options.batch)
            ],
            lambda batch: wallets.fetch_batch(client, job.settings, batch, timeout_s=timeout_s),
            _Batches(answers),
            concurrency=options.concurrency,
            label="batches",
            outage_after=None,
        )
    for attempt in range(ROUNDS):
        left = answers.left(asked)
        pause_s = 0.5 * attempt
        if not left or time.monotonic() + pause_s > client.deadline:
            return
        time.sleep(pause_s)
        ask_each(
            client,
            left,
            lambda question: wallets.fetch_positions(client, job.settings, question, timeout_s=timeout_s),
            answers,
            concurrency=options.concurrency,
            label="wallets",
            outage_after=None,  # the minute is the bound, and nobody is helped by an early end
        )


def _unlisted(client: HttpClient, job: Job, answers: _Answers, options: Options) -> set[str]:
    """Assets that the exchange does not know: it says of them what it says of flat ones, and would be believed.

    Only what nobody holds is looked up.
    """
    rows = [row for found in answers.found.values() for row in found.rows]
    flat = {row["asset"] for row in rows} - {row["asset"] for row in rows if row.get("position_szi") != "0"}
    unlisted = set()
    for question in wallets.questions("", sorted(flat)):
        try:
            coins = wallets.fetch_coins(
                client, job.settings, question.dex, timeout_s=options.timeout.total_seconds()
            )
        except TemporaryError as error:
            log.info("whether %s are coins is not known: %s", ", ".join(question.assets), one_line(error))
            continue
        unlisted.update(set(question.assets) - coins)
    for asset in sorted(unlisted):
        log.warning("the exchange lists no %s: nothing is written for it", asset)
    return unlisted


def _warn_of_clocks(answers: _Answers, minute: datetime) -> None:
    """Minutes are the database's; whether its clock is right only the exchange can tell."""
    times = [row["source_ts"] for found in answers.found.values() for row in found.rows if row["source_ts"]]
    if times and abs(apart := datetime.fromtimestamp(median(times) / 1000, UTC) - minute) > CLOCKS_APART:
        log.warning(
            "the exchange's clock and the database's are %d s apart: snapshots are filed under the latter",
            abs(apart.total_seconds()),
        )


def _store(
    job: Job,
    minute: datetime,
    asked: Sequence[Question],
    answers: _Answers,
    unlisted: set[str],
    began: float,
) -> None:
    import polars as pl

    rows: list[dict[str, Any]] = []
    rejected: list[Rejected] = []
    for question in asked:
        found = answers.found.get(question)
        if found is None:
            reason = answers.reasons.get(question, "the minute was over before an answer came")
            rows += wallets.unknown_rows(question, reason)
        else:
            rows += found.rows
            rejected += found.rejected
    rows = [row for row in rows if row["asset"] not in unlisted]
    unread = {row["wallet_id"]: row["missing_reason"] for row in rows if row.get("missing_reason")}
    job.report.failed += [f"{wallet}: {reason}" for wallet, reason in unread.items()][:FAILED_SHOWN]
    run = job.run
    with run.unit() as unit:
        connection = unit.connection
        opened = connection.execute(
            query("wallets", "open_minute"), {"minute": minute, "ledger_run_id": run.run_id}
        ).fetchone()
        assert opened is not None
        frame = wallets.snapshot_frame(rows).with_columns(
            pl.lit(minute).cast(pl.Datetime("us", "UTC")).alias("snapshot_ts"),
            pl.lit(opened[0]).alias("ingest_run_id"),
        )
        counts = load(
            connection,
            wallets.SNAPSHOTS,
            frame,
            rule=Merge.UPDATE,
            run_id=run.run_id,
            known_by=["wallet_id", "asset"],
        )
        counts += quarantine(connection, wallets.SNAPSHOTS, rejected, run.run_id)
        marked = connection.execute(
            query("wallets", "mark_implausible"), {"minute": minute, "eps": json.dumps(EPS_ABS)}
        ).fetchone()
        closed = connection.execute(
            query("wallets", "close_minute"),
            {
                "minute": minute,
                "duration_ms": round((time.monotonic() - began) * 1000),
                "error": "; ".join(f"{n} x {reason}" for reason, n in Counter(unread.values()).most_common(3))
                or None,
            },
        ).fetchone()
        assert closed is not None
        assert marked is not None
        status, expected, failed, coverage_pct = closed
        if status != "failed":
            connection.execute(query("wallets", "tell_nulls"), {"minute": minute})
        connection.execute(query("wallets", "keep_health"), {"minute": minute})
        unit.add(
            counts,
            units_ok=len({question.wallet_id for question in asked}) - len(unread),
            units_failed=len(unread),
        )
    job.verdict = "ok" if status == "success" else status
    job.report.details.update(
        wallets=expected, wallets_failed=failed, coverage_pct=str(coverage_pct), found_dirty=marked[0]
    )
