"""`hlcli ingest vaults`: the vault list, then the details of as many vaults as weight and time allow."""

from __future__ import annotations

import time
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from datetime import datetime, timedelta
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from hlcli import output
from hlcli.budget import Budget, DeadlineError, Priority
from hlcli.http import BadPayloadError, HttpClient, SourceError
from hlcli.jobs import Job, Report, running
from hlcli.ledger import Channel
from hlcli.loader import Counts, Merge, load, quarantine
from hlcli.logs import log
from hlcli.sources import vaults
from hlcli.sqlfiles import query

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hlcli.settings import Settings

CHANNEL = Channel("hyperliquid", "vaults", timedelta(hours=1), "hlcli ingest vaults", "7 * * * *")

# The list only ever grew; one that lost a fifth of its entries is a broken answer.
LEAST_SHARE_OF_LAST_LIST = 0.8
BATCH_VAULTS = 25
BATCH_SECONDS = 20.0
# So many failures in a row are an outage; asking the rest would only burn the budget.
OUTAGE_AFTER = 10


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
    import polars as pl

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
            updated_at = pl.lit(run.started_at).cast(pl.Datetime("us", "UTC")).alias("updated_at")
            counts = load(
                connection,
                vaults.VAULTS,
                found.vaults.with_columns(updated_at),
                rule=Merge.UPDATE,
                touch=["updated_at"],
                run_id=run.run_id,
            )
            new = quarantine(connection, vaults.VAULTS, found.rejected, run.run_id)
            bad = len(found.rejected)
            counts += Counts(served=bad, rejected=bad, new_rejects=new)
            if (
                counts.rejected > found.served * (1 - LEAST_SHARE_OF_LAST_LIST)
                and not options.accept_short_list
            ):
                raise BadPayloadError(
                    f"{counts.rejected} of {found.served} entries of the vault list are unusable: refused"
                )
            run.keep_cursor("list", {"etag": etag, "vaults": found.vaults.height})
            run.add(counts, units_ok=1)
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
    batch = _Batch(job, hour, set(unlisted))
    asked = _ask_all(settings, client, job, options, todo, batch)
    report.details["left_for_next_run"] = len(todo) - asked


def _ask_all(
    settings: Settings, client: HttpClient, job: Job, options: Options, todo: Sequence[str], batch: _Batch
) -> int:
    """Ask for every vault with a few threads, committing batch by batch; returns how many were answered or failed."""
    waiting = iter(todo)
    under_way: dict[Future[Any], str] = {}
    failures_in_a_row = finished = 0
    stopped: BaseException | None = None
    pool = ThreadPoolExecutor(options.concurrency, thread_name_prefix="ask")
    bar = output.progress(len(todo), "vaults", " vaults")
    try:
        while True:
            while stopped is None and len(under_way) < options.concurrency:
                address = next(waiting, None)
                if address is None:
                    break
                future = pool.submit(vaults.fetch_details, client, settings, address, Priority.NORMAL)
                under_way[future] = address
            if not under_way:
                break
            ready, _ = wait(under_way, timeout=BATCH_SECONDS, return_when=FIRST_COMPLETED)
            for future in ready:
                address = under_way.pop(future)
                try:
                    batch.answers.append((address, future.result()))
                    failures_in_a_row = 0
                except DeadlineError as error:
                    stopped = error
                    continue
                except SourceError as error:
                    batch.failed += 1
                    job.report.fail(address, error)
                    failures_in_a_row += 1
                    if failures_in_a_row >= OUTAGE_AFTER and stopped is None:
                        stopped = error
                        log.warning("%d vaults failed in a row, stopping: %s", failures_in_a_row, error)
                finished += 1
                bar.update()
            batch.commit_if_due()
        batch.commit()
    finally:
        # Threads that still wait for weight or an answer see that time is up.
        client.deadline = 0.0
        pool.shutdown(wait=False, cancel_futures=True)
        bar.close()
    if isinstance(stopped, DeadlineError):
        log.info("the deadline was reached")
    return finished


class _Batch:
    """Answers that wait for their common transaction."""

    def __init__(self, job: Job, hour: datetime, unlisted: set[str]) -> None:
        self.job, self.hour, self.unlisted = job, hour, unlisted
        self.answers: list[tuple[str, Any]] = []
        self.failed = 0
        self.since = time.monotonic()

    def commit_if_due(self) -> None:
        full = len(self.answers) + self.failed >= BATCH_VAULTS
        if full or time.monotonic() - self.since > BATCH_SECONDS:
            self.commit()

    def commit(self) -> None:
        """Store what was answered and count what failed, in one transaction."""
        import polars as pl

        self.since = time.monotonic()
        if not self.answers and not self.failed:
            return
        run = self.job.run
        told = vaults.details(sorted(self.answers, key=lambda answer: answer[0]), self.hour)
        updated_at = pl.lit(run.started_at).cast(pl.Datetime("us", "UTC")).alias("updated_at")
        of_vaults = told.vaults.with_columns(updated_at)
        # The list is the authority on what it holds; of a vault outside of it the details are all there is.
        listed = ~pl.col("vault_address").is_in(list(self.unlisted))
        with run.unit() as connection:
            counts = Counts()
            for rows in (
                of_vaults.filter(~listed),
                of_vaults.filter(listed).select(*vaults.DETAIL_COLUMNS, "updated_at"),
            ):
                counts += load(
                    connection,
                    vaults.VAULTS,
                    rows,
                    rule=Merge.UPDATE,
                    touch=["updated_at"],
                    run_id=run.run_id,
                )
            counts += load(connection, vaults.METRICS, told.metrics, rule=Merge.UPDATE, run_id=run.run_id)
            new = quarantine(connection, vaults.METRICS, told.rejected, run.run_id)
            bad = len(told.rejected)
            counts += Counts(served=bad, rejected=bad, new_rejects=new)
            run.add(counts, units_ok=len(self.answers), units_failed=self.failed, rows_failed=self.failed)
        self.answers, self.failed = [], 0
