"""`hlcli ingest vaults`: the vault list, then the details of as many vaults as weight and time allow."""

from __future__ import annotations

import time
from dataclasses import dataclass
from datetime import timedelta
from operator import itemgetter
from typing import TYPE_CHECKING, Any

from hlcli.budget import Budget, Priority
from hlcli.http import BadPayloadError, HttpClient, SourceError
from hlcli.jobs import Job, Report, running
from hlcli.jobs.asking import ask_each
from hlcli.ledger import Channel
from hlcli.loader import Counts, Merge, load, quarantine
from hlcli.sources import vaults
from hlcli.sqlfiles import query

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime
    from decimal import Decimal

    import polars as pl
    from psycopg import Connection

    from hlcli.ledger import Run
    from hlcli.settings import Settings

CHANNEL = Channel("hyperliquid", "vaults", timedelta(hours=1), "hlcli ingest vaults", "7 * * * *")

# The list only ever grew; one that lost a fifth of its entries is a broken answer.
LEAST_SHARE_OF_LAST_LIST = 0.8
BATCH_VAULTS = 25


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What the command line decides."""

    limit: int | None = None
    addresses: Sequence[str] = ()
    min_tvl: Decimal | None = None
    include_closed: bool = False
    concurrency: int = 4
    requests_per_second: float | None = None
    deadline: timedelta = timedelta(minutes=50)
    accept_short_list: bool = False
    fail_if_locked: bool = False


def ingest_vaults(settings: Settings, options: Options) -> Report:
    """Bring `vaults` up to date with the list and add this hour's row to `vault_metrics` for each vault asked.

    A vault that has its row for this hour is not asked again, so a run that was killed is finished by the next one.
    The list and each batch of vaults commit by themselves. Reaching the deadline is no failure: what is left is
    told and comes first next time.

    Raises SourceError when the list cannot be had, and what running() raises.
    """
    with running(settings, CHANNEL, fail_if_locked=options.fail_if_locked) as (report, job):
        if job is None:
            return report
        budget = Budget(settings)
        job.run.budget = budget
        client = HttpClient(
            budget=budget,
            deadline=time.monotonic() + options.deadline.total_seconds(),
            per_second=options.requests_per_second,
        )
        try:
            _load_list(settings, client, job, options)
            _load_details(settings, client, job, options)
        finally:
            client.close()
            budget.close()
    return report


def _load_list(settings: Settings, client: HttpClient, job: Job, options: Options) -> None:
    """Upsert the whole list in one transaction, with its ETag and length."""
    run = job.run
    last = run.cursor("list") or {}
    with vaults.fetch_list(client, settings, etag=last.get("etag")) as (found, etag):
        if found is None:
            job.report.details["vaults_in_list"] = "not modified"
            return
        least = int(last.get("vaults", 0) * LEAST_SHARE_OF_LAST_LIST)
        if found.vaults.height < least and not options.accept_short_list:
            raise BadPayloadError(
                f"the vault list has {found.vaults.height} vaults, the last one had {last['vaults']}: refused, "
                "nothing was changed (--accept-short-list takes it)"
            )
        with run.unit() as connection:
            counts = _upsert_vaults(connection, found.vaults, run)
            counts += quarantine(connection, vaults.VAULTS, found.rejected, run.run_id)
            if (
                counts.rejected > found.served * (1 - LEAST_SHARE_OF_LAST_LIST)
                and not options.accept_short_list
            ):
                raise BadPayloadError(
                    f"{counts.rejected} of {found.served} entries of the vault list are unusable: refused"
                )
            run.keep_cursor("list", {"etag": etag, "vaults": found.vaults.height})
            run.add(counts)
    job.report.details["vaults_in_list"] = found.served


def _load_details(settings: Settings, client: HttpClient, job: Job, options: Options) -> None:
    run, report = job.run, job.report
    hour = run.started_at.replace(minute=0, second=0, microsecond=0)
    due = run.connection.execute(
        query("vaults", "due"),
        {
            "hour": hour,
            "addresses": list(options.addresses) or None,
            "include_closed": options.include_closed,
            "min_tvl": options.min_tvl,
        },
    ).fetchall()
    listed = {address for address, _ in due}
    unlisted = [address for address in options.addresses if address not in listed]
    selected = [*due, *((address, False) for address in unlisted)][: options.limit]
    todo = [address for address, done in selected if not done]
    report.details.update(selected=len(selected), already_done=len(selected) - len(todo))
    batch = _Batch(job, hour, frozenset(unlisted))
    report.details["left_for_next_run"] = ask_each(
        client,
        todo,
        lambda address: vaults.fetch_details(client, settings, address, Priority.NORMAL),
        batch,
        concurrency=options.concurrency,
        label="vaults",
    )
    batch.commit()


class _Batch:
    """Answers that wait for their common transaction."""

    def __init__(self, job: Job, hour: datetime, unlisted: frozenset[str]) -> None:
        self.job, self.hour, self.unlisted = job, hour, unlisted
        self.answers: list[tuple[str, Any]] = []
        self.failures = 0

    def answered(self, unit: str, answer: Any) -> None:
        self.answers.append((unit, answer))
        self._commit_if_full()

    def failed(self, unit: str, error: SourceError) -> None:
        self.job.report.fail(unit, error)
        self.failures += 1
        self._commit_if_full()

    def _commit_if_full(self) -> None:
        if len(self.answers) + self.failures >= BATCH_VAULTS:
            self.commit()

    def commit(self) -> None:
        """Store what was answered and count what failed, in one transaction."""
        if not self.answers and not self.failures:
            return
        run = self.job.run
        # In the order of addresses, whatever order the answers came in.
        told = vaults.details(sorted(self.answers, key=itemgetter(0)), self.hour, self.unlisted)
        with run.unit() as connection:
            counts = quarantine(connection, vaults.METRICS, told.rejected, run.run_id)
            for rows in (told.listed, told.unlisted):
                counts += _upsert_vaults(connection, rows, run)
            counts += load(
                connection,
                vaults.METRICS,
                told.metrics,
                rule=Merge.UPDATE,
                known_by=["vault_address"],
                run_id=run.run_id,
            )
            run.add(counts, units_ok=len(self.answers), units_failed=self.failures, rows_failed=self.failures)
        self.answers, self.failures = [], 0


def _upsert_vaults(connection: Connection[Any], rows: pl.DataFrame, run: Run) -> Counts:
    import polars as pl

    updated_at = pl.lit(run.started_at).cast(pl.Datetime("us", "UTC")).alias("updated_at")
    return load(
        connection,
        vaults.VAULTS,
        rows.with_columns(updated_at),
        rule=Merge.UPDATE,
        touch=["updated_at"],
        run_id=run.run_id,
    )
