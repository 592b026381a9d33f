"""`hlcli ingest vaults`: the vault list, then the details of as many vaults as weight and time allow."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from operator import itemgetter
from typing import TYPE_CHECKING, Any

from hlcli.budget import Priority
from hlcli.http import BadPayloadError
from hlcli.jobs import Job, Report, run_job
from hlcli.jobs.asking import ask_each
from hlcli.ledger import Channel
from hlcli.loader import Merge, load, quarantine
from hlcli.sources import vaults
from hlcli.sqlfiles import query

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime
    from decimal import Decimal

    import polars as pl

    from hlcli.http import HttpClient, SourceError
    from hlcli.ledger import Unit
    from hlcli.loader import Counts
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

    Raises SourceError when the list cannot be had, and what run_job() raises.
    """

    def work(job: Job) -> None:
        with job.client(deadline=options.deadline, per_second=options.requests_per_second) as client:
            _load_list(client, job, options)
            _load_details(client, job, options)

    return run_job(settings, CHANNEL, work, fail_if_locked=options.fail_if_locked)


def _load_list(client: HttpClient, job: Job, options: Options) -> None:
    """Upsert the whole list in one transaction, with its ETag and length."""
    run, url = job.run, vaults.list_url(job.settings)
    last = run.cursor("list") or {}
    # An ETag says nothing about another server's list.
    etag = last.get("etag") if last.get("url") == url else None
    found, etag = vaults.fetch_list(client, job.settings, etag=etag)
    if found is None:
        job.report.details["vaults_in_list"] = "not modified"
        return
    least = int(last.get("vaults", 0) * LEAST_SHARE_OF_LAST_LIST)
    if found.vaults.height < least and not options.accept_short_list:
        raise BadPayloadError(
            f"the vault list has {found.vaults.height} vaults, the last one had {last['vaults']}: refused, "
            "nothing was changed (--accept-short-list takes it)"
        )
    with run.unit() as unit:
        counts = _upsert_vaults(unit, found.vaults)
        counts += quarantine(unit.connection, vaults.VAULTS, found.rejected, run.run_id)
        usable = found.served - counts.rejected
        if usable < found.served * LEAST_SHARE_OF_LAST_LIST and not options.accept_short_list:
            raise BadPayloadError(
                f"{counts.rejected} of {found.served} entries of the vault list are unusable: refused"
            )
        unit.keep_cursor("list", {"url": url, "etag": etag, "vaults": found.vaults.height})
        unit.add(counts)
    job.report.details["vaults_in_list"] = found.served


def _load_details(client: HttpClient, job: Job, options: Options) -> None:
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
        lambda address: vaults.fetch_details(client, job.settings, address, Priority.NORMAL),
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
        self.failures: list[str] = []

    def answered(self, unit: str, answer: Any) -> None:
        self.answers.append((unit, answer))
        self._commit_if_full()

    def failed(self, unit: str, error: SourceError) -> None:
        self.job.report.fail(unit, error)
        self.failures.append(unit)
        self._commit_if_full()

    def _commit_if_full(self) -> None:
        if len(self.answers) + len(self.failures) >= BATCH_VAULTS:
            self.commit()

    def commit(self) -> None:
        """Store what was answered and count what failed, in one transaction."""
        if not self.answers and not self.failures:
            return
        run = self.job.run
        # In the order of addresses, whatever order the answers came in.
        told = vaults.details(sorted(self.answers, key=itemgetter(0)), self.hour, self.unlisted)
        failed = len(self.failures)
        with run.unit() as unit:
            counts = _upsert_vaults(unit, told.listed) + _upsert_vaults(unit, told.unlisted)
            counts += load(
                unit.connection,
                vaults.METRICS,
                told.metrics,
                rule=Merge.UPDATE,
                known_by=["vault_address"],
                run_id=run.run_id,
            )
            counts += quarantine(unit.connection, vaults.METRICS, told.rejected, run.run_id)
            unread = [*self.failures, *(row.key[0] for row in told.rejected)]
            unit.connection.execute(
                query("vaults", "details_failed"), {"hour": self.hour, "addresses": unread}
            )
            unit.add(counts, units_ok=len(self.answers), units_failed=failed, rows_failed=failed)
        self.answers, self.failures = [], []


def _upsert_vaults(unit: Unit, rows: pl.DataFrame) -> Counts:
    import polars as pl

    updated_at = pl.lit(unit.run.started_at).cast(pl.Datetime("us", "UTC")).alias("updated_at")
    return load(
        unit.connection,
        vaults.VAULTS,
        rows.with_columns(updated_at),
        rule=Merge.UPDATE,
        touch=["updated_at"],
        run_id=unit.run.run_id,
    )
