"""How every job runs: one connection that holds the lock and writes, a ledger row, an exit code, a ping.

A job module declares `CHANNEL` and a function that hands its work to run_job(): fetch from a source, load in units.
The Report is made from what the run counted.
"""

from __future__ import annotations

import importlib
import pkgutil
import time
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from hlcli import ledger, logs, migrations
from hlcli.budget import Budget
from hlcli.exitcodes import ExitCode, HlcliError, LockedError, exit_code_for, undisturbed
from hlcli.http import HttpClient
from hlcli.jobs.ping import ping
from hlcli.ledger import Channel, Run
from hlcli.logs import log, one_line

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from datetime import timedelta

    from hlcli.settings import Settings

FAILED_SHOWN = 20
# What a run that came to its end tells by its exit code.
CODES = {"ok": ExitCode.OK, "partial": ExitCode.PARTIAL, "failed": ExitCode.TEMPORARY}


@dataclass(slots=True)
class Report:
    """What a run did, for people and for --json; filled while the job runs."""

    channel: Channel
    status: str = "running"
    exit_code: ExitCode = ExitCode.OK
    run_id: str | None = None
    seconds: float = 0.0
    numbers: dict[str, int] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)
    """Facts of this job: how many were selected, left for the next run, ..."""
    failed: list[str] = field(default_factory=list)
    """The first units that failed, each with its reason."""
    error: str | None = None

    def fail(self, unit: str, error: BaseException) -> None:
        """Name a failed unit; the ledger keeps the first twenty."""
        if len(self.failed) < FAILED_SHOWN:
            self.failed.append(f"{unit}: {one_line(error)}")

    def as_json(self) -> dict[str, Any]:
        data = asdict(self)
        data["channel"], data["exit_code"] = self.channel.label, int(self.exit_code)
        return data


@dataclass(slots=True)
class Job:
    """A run that holds its channel's lock, and the report that it fills."""

    settings: Settings
    run: Run
    report: Report
    verdict: str | None = None
    """ok, partial or failed, where the job knows better than the count of units."""

    @contextmanager
    def client(
        self, *, deadline: timedelta, most_weight: int | None = None, **options: Any
    ) -> Iterator[HttpClient]:
        """The HTTP client of this run; what it spends is the run's. `deadline` counts from now."""
        self.run.budget = budget = Budget(self.settings, most_weight=most_weight)
        client = HttpClient(budget=budget, deadline=time.monotonic() + deadline.total_seconds(), **options)
        try:
            yield client
        finally:
            client.close()
            budget.close()


def run_job(
    settings: Settings, channel: Channel, work: Callable[[Job], None], *, fail_if_locked: bool = False
) -> Report:
    """Do `work` as a run of `channel`; nothing, and a report that says `skipped`, when another run holds the lock.

    The status follows from what was counted: `partial` when some units failed, `failed` when all did; a job with
    thresholds of its own sets Job.verdict. An exception marks the run `failed` (a signal: `interrupted`) and goes on.

    Raises LockedError with `fail_if_locked`, ConfigError for an old schema, psycopg.Error for the database.
    """
    started = time.monotonic()
    report = Report(channel)
    connection = migrations.connect_ready(settings, role=channel.name)
    with connection:
        locked_code = ExitCode.LOCKED if fail_if_locked else ExitCode.OK
        run = ledger.begin(connection, channel, locked_code=locked_code)
        if run is None:
            report.status = "skipped"
            which = f"{channel.label} {channel.member}".strip()
            log.warning("%s: another run holds the lock, skipped", which)
            if fail_if_locked:
                raise LockedError(f"{which}: another run holds the lock")
            return report
        report.run_id = str(run.run_id)
        logs.set_run_id(report.run_id)
        try:
            ping(settings, channel.name, run.run_id, None)
            job = Job(settings, run, report)
            work(job)
            report.status = job.verdict or _verdict(run)
            report.exit_code = CODES[report.status]
        except BaseException as error:
            report.exit_code = exit_code_for(error)
            stopped = report.exit_code in {ExitCode.INTERRUPTED, ExitCode.TERMINATED}
            report.status = "interrupted" if stopped else "failed"
            report.error = f"ended by signal, exit {int(report.exit_code)}" if stopped else one_line(error)
            raise
        finally:
            with undisturbed():
                if report.failed and report.error is None and report.status != "ok":
                    report.error = f"{run.units_failed} units failed, first: {report.failed[0]}"
                report.seconds = round(time.monotonic() - started, 3)
                report.numbers = {
                    **asdict(run.counts),
                    "units_ok": run.units_ok,
                    "units_failed": run.units_failed,
                    "rows_failed": run.rows_failed,
                    **run.spent,
                }
                _close(settings, run, report)
                run.release()
                ping(settings, channel.name, run.run_id, report.exit_code, report.error or "")
    if run.counts.new_rejects:
        log.warning(
            "%s: %d rows quarantined for the first time, see table rejected_rows",
            channel.label,
            run.counts.new_rejects,
        )
    return report


def _verdict(run: Run) -> str:
    if not run.units_failed:
        return "ok"
    return "partial" if run.units_ok else "failed"


def _close(settings: Settings, run: Run, report: Report) -> None:
    """Close the ledger row, on a new connection when the run's own was lost; the next run would find it dead."""
    import psycopg

    details = {**report.details, **({"failed": report.failed} if report.failed else {})}
    try:
        run.finish(run.connection, report.status, report.exit_code, report.error, details)
    except psycopg.Error:
        run.connection.close()  # an open transaction of ours would lock the very row that is to be closed
        with suppress(psycopg.Error, HlcliError), migrations.connect_ready(settings, role="ledger") as other:
            run.finish(other, report.status, report.exit_code, report.error, details)


def channels() -> list[Channel]:
    """The channel of every job module, in the order of their names."""
    found = []
    for module in pkgutil.iter_modules(__path__):
        channel = getattr(importlib.import_module(f"{__name__}.{module.name}"), "CHANNEL", None)
        if isinstance(channel, Channel):
            found.append(channel)
    return sorted(found, key=lambda channel: channel.label)
