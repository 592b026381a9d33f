"""`hlcli maintain`: remove what has outlived its rule in `retention_rules`, and make partitions ahead of time.

A unit is a rule that was looked at, a partition made or dropped, or a batch of rows deleted: a run that is killed
is finished by the next one, and whatever is refused (a table in use, a wrong rule) holds up nothing else.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial
from math import ceil
from typing import TYPE_CHECKING, Any, LiteralString, TypeVar

import psycopg
from psycopg import sql
from psycopg.rows import class_row

from hlcli import migrations, output
from hlcli.exitcodes import ConfigError, ExitCode
from hlcli.jobs import Job, Report, run_job
from hlcli.ledger import Channel
from hlcli.logs import log, one_line
from hlcli.sqlfiles import query

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from psycopg import Connection

    from hlcli.settings import Settings

CHANNEL = Channel("hlcli", "maintenance", timedelta(days=1), "hlcli maintain", "23 3 * * *")
BATCH_ROWS = 10_000
SPANS_AHEAD = 3
# A history that came in before its partitions is sorted into them by and by.
MOST_ASTRAY = 100
# A lock that is waited for stops everybody who comes after; so no lock is waited for long.
LOCK_TIMEOUT = "5s"
# What one rule or one step may meet without harm to the others.
REFUSALS = (psycopg.Error, ConfigError)

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Rule:
    """A row of `retention_rules` and what the catalog says of its table, which is little when `unfit`."""

    name: str
    schema: str
    table: str
    column: str
    cut_off: str | None
    """Rows from before this go; a row of this very moment stays. None: none go."""
    oid: int
    default_schema: str | None
    default_table: str | None
    columns: list[str]
    """All that can be written: not the generated ones."""
    partitioned: bool
    expendable: str | None
    """The query that says which old rows can be done without; None: all."""
    unfit: str | None
    """Why the rule cannot be followed."""

    @property
    def identifier(self) -> sql.Identifier:
        return sql.Identifier(self.schema, self.table)

    @property
    def default(self) -> sql.Identifier | None:
        """The default partition, where there is one."""
        if self.default_schema is None or self.default_table is None:
            return None
        return sql.Identifier(self.default_schema, self.default_table)

    @property
    def cleared(self) -> sql.Identifier | None:
        """The table whose rows are deleted by age; other partitions are dropped whole."""
        return self.default if self.partitioned else self.identifier


@dataclass(frozen=True, slots=True)
class Span:
    """A stretch of time without a partition of its own, and the name that the partition shall have."""

    name: str
    lower: str
    upper: str
    overlaps: bool
    """Existing partitions cover a part of it."""


@dataclass(frozen=True, slots=True)
class Outlived:
    """A partition that ends at or before the cut-off."""

    schema: str
    name: str


@dataclass(frozen=True, slots=True)
class Plan:
    """What one rule asks for at this moment."""

    rule: Rule
    missing: list[Span]
    outlived: list[Outlived]
    old_rows: int


def maintain(settings: Settings, *, dry_run: bool = False, fail_if_locked: bool = False) -> Report:
    """Follow every rule; the report counts by table the rows deleted and the partitions made and dropped.

    Rows that went with their partition are not counted. `dry_run` reports the same numbers, takes no lock, opens no
    run in the ledger and writes nothing; its status is "dry-run".

    Raises what run_job() raises.
    """
    if dry_run:
        return _rehearse(settings)
    return run_job(settings, CHANNEL, _work, fail_if_locked=fail_if_locked)


def _rehearse(settings: Settings) -> Report:
    started, report, failed = time.monotonic(), Report(CHANNEL, status="dry-run"), 0
    with migrations.connect_ready(settings, role=CHANNEL.name) as connection:
        connection.read_only = True
        for name in _rules(connection, report):
            try:
                with connection.transaction():
                    plan = _plan(connection, name)
            except REFUSALS as error:
                if connection.closed:
                    raise
                report.fail(name, error)
                failed += 1
                continue
            for span in plan.missing:
                if span.overlaps:
                    report.fail(f"{name}: make {span.name}", _overlap(span))
                    failed += 1
                else:
                    _count(report, "partitions_made", name)
            _count(report, "partitions_dropped", name, len(plan.outlived))
            _count(report, "rows_deleted", name, plan.old_rows)
    if failed:
        report.exit_code = ExitCode.PARTIAL
        report.error = f"{failed} units would fail, first: {report.failed[0]}"
    report.seconds = round(time.monotonic() - started, 3)
    return report


def _work(job: Job) -> None:
    for name in _rules(job.run.connection, job.report):
        plan = _attempt(job, name, partial(_plan, name=name))
        if plan is None:
            continue
        for span in plan.missing:
            if _attempt(job, f"{name}: make {span.name}", partial(_make, rule=plan.rule, span=span)):
                _count(job.report, "partitions_made", name)
        for gone in plan.outlived:
            if _attempt(job, f"{name}: drop {gone.name}", partial(_drop, rule=plan.rule, gone=gone)):
                _count(job.report, "partitions_dropped", name)
        _delete_old(job, plan)


def _rules(connection: Connection[Any], report: Report) -> list[str]:
    """The names of all rules; the report's counts begin at none."""
    report.details.update(rows_deleted={}, partitions_made={}, partitions_dropped={})
    return [name for (name,) in connection.execute(query("maintain", "rules")).fetchall()]


def _count(report: Report, what: str, name: str, number: int = 1) -> None:
    if number:
        report.details[what][name] = report.details[what].get(name, 0) + number


def _attempt(job: Job, unit_name: str, step: Callable[[Connection[Any]], Result]) -> Result | None:
    """Do one step as a unit of its own; None when it was refused, which is counted and told."""
    run = job.run
    try:
        with run.unit() as unit:
            unit.connection.execute("select set_config('lock_timeout', %s, true)", (LOCK_TIMEOUT,))
            result = step(unit.connection)
            unit.add(units_ok=1)
    except REFUSALS as error:
        if run.connection.closed:
            raise
        job.report.fail(unit_name, error)
        with run.unit() as unit:
            unit.add(units_failed=1)
        return None
    return result


def _plan(connection: Connection[Any], name: str) -> Plan:
    """Look at one rule. Raises ConfigError for one that cannot be followed."""
    rule = _rule(connection, name)
    missing: list[Span] = []
    outlived: list[Outlived] = []
    if rule.partitioned:
        missing = _missing(connection, rule)
        for (lower,) in _astray(connection, rule):
            missing += [span for span in _missing(connection, rule, lower, lower) if span not in missing]
        statement = sql.SQL(query("maintain", "outlived")).format(
            partitions=sql.SQL(query("maintain", "partitions"))
        )
        outlived = _found(connection, Outlived, statement, {"oid": rule.oid, "cut_off": rule.cut_off})
    old_rows = 0
    if rule.cleared is not None:
        row = connection.execute(_on_old_rows("count_old", rule)).fetchone()
        assert row is not None
        old_rows = row[0]
    return Plan(rule, missing, outlived, old_rows)


def _rule(connection: Connection[Any], name: str) -> Rule:
    rule = next(iter(_found(connection, Rule, sql.SQL(query("maintain", "rule")), {"name": name})), None)
    if rule is None:
        raise ConfigError("the rule was removed meanwhile")
    if rule.unfit:
        raise ConfigError(rule.unfit)
    return rule


def _missing(
    connection: Connection[Any],
    rule: Rule,
    first: datetime | str | None = None,
    last: datetime | str | None = None,
) -> list[Span]:
    """The spans from that of one moment to that of another that have no partition; by default from now on."""
    statement = sql.SQL(query("maintain", "missing")).format(
        partitions=sql.SQL(query("maintain", "partitions"))
    )
    values = {
        "oid": rule.oid,
        "name": rule.name,
        "table": rule.table,
        "ahead": SPANS_AHEAD,
        "first": first,
        "last": last,
    }
    return _found(connection, Span, statement, values)


def _astray(connection: Connection[Any], rule: Rule) -> list[tuple[Any, ...]]:
    """The spans that rows in the default partition belong to; where rows go by age, these do so, too."""
    if rule.default is None or rule.cut_off is not None:
        return []
    return connection.execute(
        sql.SQL(query("maintain", "astray")).format(
            column=sql.Identifier(rule.column),
            default=rule.default,
            name=sql.Literal(rule.name),
            most=sql.Literal(MOST_ASTRAY),
        )
    ).fetchall()


def cover(connection: Connection[Any], name: str, moments: Sequence[datetime]) -> bool:
    """Make the partitions in which rows of these moments belong, each in a transaction of its own.

    Returns whether all are there. What is refused, as when somebody uses the table for long, is left: rows then go
    into the default partition, and maintain() moves them. Needs autocommit.
    """
    refused: Exception | None = None
    try:
        rule = _rule(connection, name)
    except ConfigError as error:
        log.info("%s: no partitions were made: %s", name, one_line(error))
        return False
    for moment in moments if rule.partitioned else ():
        try:
            for span in _missing(connection, rule, moment, moment):
                with connection.transaction():
                    connection.execute("select set_config('lock_timeout', %s, true)", (LOCK_TIMEOUT,))
                    # A process that is stopped just now keeps everybody from the table.
                    connection.execute(
                        "select set_config('idle_in_transaction_session_timeout', '20s', true)"
                    )
                    _make(connection, rule=rule, span=span)
        except REFUSALS as error:
            if connection.closed:
                raise
            refused = error
            if isinstance(error, psycopg.errors.LockNotAvailable):
                break  # each of the others would wait as long, and everybody behind it
    if refused is not None:
        log.info("%s: not all partitions were made: %s", name, one_line(refused))
    return refused is None


def _found(
    connection: Connection[Any], kind: type[Result], statement: sql.SQL | sql.Composed, values: dict[str, Any]
) -> list[Result]:
    return connection.cursor(row_factory=class_row(kind)).execute(statement, values).fetchall()


def _overlap(span: Span) -> ConfigError:
    return ConfigError(f"other partitions cover a part of {span.lower} to {span.upper}")


def _make(connection: Connection[Any], *, rule: Rule, span: Span) -> bool:
    """Create a partition, move the rows of its span out of the default one, and attach it; False when it is there."""
    if span.overlaps:
        raise _overlap(span)
    names = {
        "table": rule.identifier,
        "default": rule.default,
        "partition": sql.Identifier(rule.schema, span.name),
        "column": sql.Identifier(rule.column),
        "columns": sql.SQL(", ").join(map(sql.Identifier, rule.columns)),
        "lower": sql.Literal(span.lower),
        "upper": sql.Literal(span.upper),
    }
    connection.execute(sql.SQL(query("maintain", "lock")).format(**names))
    # Others make partitions as their rows come.
    if span.name not in {each.name for each in _missing(connection, rule, span.lower, span.lower)}:
        return False
    steps: list[LiteralString] = ["create", "move", "attach"]
    for step in steps:
        if step != "move" or rule.default:
            connection.execute(sql.SQL(query("maintain", step)).format(**names))
    log.debug("%s: made %s", rule.name, span.name)
    return True


def _drop(connection: Connection[Any], *, rule: Rule, gone: Outlived) -> bool:
    partition = sql.Identifier(gone.schema, gone.name)
    connection.execute(sql.SQL(query("maintain", "lock")).format(table=rule.identifier))
    connection.execute(sql.SQL(query("maintain", "drop")).format(partition=partition))
    log.info("%s: dropped %s", rule.name, gone.name)
    return True


def _delete_old(job: Job, plan: Plan) -> None:
    """Delete in batches as many rows as were counted; what grew old since then is the next run's."""
    name = plan.rule.name
    if not plan.old_rows:
        return
    with output.progress(plan.old_rows, name, " rows") as bar:
        for _ in range(ceil(plan.old_rows / BATCH_ROWS)):
            rows = _attempt(job, f"{name}: delete", partial(_delete_batch, rule=plan.rule))
            if not rows:
                break
            _count(job.report, "rows_deleted", name, rows)
            bar.update(rows)


def _delete_batch(connection: Connection[Any], *, rule: Rule) -> int:
    return connection.execute(_on_old_rows("delete_old", rule)).rowcount


def _on_old_rows(name: str, rule: Rule) -> sql.Composed:
    """A query over the rows that are to go: those before the cut-off that are expendable."""
    # Literals, as psycopg would look for parameters in a table's name as well.
    return sql.SQL(query("maintain", name)).format(
        table=rule.cleared,
        column=sql.Identifier(rule.column),
        cut_off=sql.Literal(rule.cut_off),
        expendable=sql.SQL(query("maintain", rule.expendable) if rule.expendable else "true"),
        batch=sql.Literal(BATCH_ROWS),
    )
