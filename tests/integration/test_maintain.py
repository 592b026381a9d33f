"""`hlcli maintain`: what is removed and what never is, partitions, wrong rules, locks, kills, writers (F28)."""

from __future__ import annotations

import json
import re
import threading
import time
from datetime import UTC, datetime, timedelta
from functools import partial

import psycopg
import pytest
from vault_tables import assert_ledger_adds_up, assert_nothing_left, dump, runs
from waiting import until
from wallet_tables import freeze

from hlcli.exitcodes import ExitCode
from hlcli.jobs import maintain as job
from hlcli.jobs.maintain import BATCH_ROWS, CHANNEL, maintain

NOW = datetime(2026, 3, 10, 12, 34, 56, 789012, UTC)
TODAY = NOW.replace(hour=0, minute=0, second=0, microsecond=0)
DAY, MICROSECOND = timedelta(days=1), timedelta(microseconds=1)
NOTHING = {"rows_deleted": {}, "partitions_made": {}, "partitions_dropped": {}}


@pytest.fixture(autouse=True)
def one_partitioned_table(request, connection):
    """These tests count the partitions of wallet_snapshots; who asks for `all_rules` has those of fills, too."""
    if "all_rules" not in request.fixturenames:
        connection.execute("delete from retention_rules where table_name = 'fills'")


@pytest.fixture
def all_rules():
    """The rules as the schema has them."""


@pytest.fixture
def run(settings, connection):
    """Run the job in this process; afterwards the ledger adds up and nothing is left behind."""

    def go(**options):
        return maintain(settings(), **options)

    yield go
    assert_ledger_adds_up(connection)
    assert_nothing_left(connection)


@pytest.fixture
def start(spawn):
    """Start `hlcli maintain` as a process."""
    return partial(spawn, "maintain")


def only(connection, *tables):
    """Leave no other rules."""
    connection.execute("delete from retention_rules where table_name <> all (%s)", (list(tables),))


def partitions(connection, table="wallet_snapshots"):
    """Name and bounds of every partition, from the catalog."""
    return dict(
        connection.execute(
            "select inhrelid::regclass::text, pg_get_expr(relpartbound, oid)"
            " from pg_inherits join pg_class on oid = inhrelid where inhparent = %s::regclass order by 1",
            (table,),
        ).fetchall()
    )


def bounds(lower, upper):
    return f"FOR VALUES FROM ('{lower:%Y-%m-%d %H:%M:%S}+00') TO ('{upper:%Y-%m-%d %H:%M:%S}+00')"


def day(moment):
    return f"wallet_snapshots_p{moment:%Y%m%d}"


def attach(connection, lower, upper, name):
    connection.execute(
        f"create table {name} partition of wallet_snapshots for values from ('{lower}') to ('{upper}')"
    )


def add_snapshots(connection, moments, wallet="0x1", asset="BTC"):
    with connection.cursor() as cursor:
        cursor.executemany(
            "insert into wallet_snapshots (snapshot_ts, wallet_id, asset, position_szi, ingest_run_id)"
            " values (%s, %s, %s, 1, 1)",
            [(moment, wallet, asset) for moment in moments],
        )


def add_alerts(connection, moments):
    with connection.cursor() as cursor:
        cursor.executemany(
            "insert into alerts (alert_ts, asset, alert_type, severity, message)"
            " values (%s, 'BTC', 'regime_change', 'medium', 'x')",
            [(moment,) for moment in moments],
        )


def times(connection, table, column):
    return [moment for (moment,) in connection.execute(f"select {column} from {table} order by 1")]


def everything(connection):
    """All rows of all tables that have a rule, and all partitions; not the ledger."""
    tables = [name for (name,) in connection.execute("select table_name from retention_rules").fetchall()]
    return partitions(connection), {
        table: dump(connection, table, without=()) for table in tables if table != "ingestion_runs"
    }


def waits(connection):
    """Whether the job waits for a lock."""
    return connection.execute(
        "select exists (select from pg_stat_activity where datname = current_database()"
        " and application_name = %s and wait_event_type = 'Lock')",
        (f"hlcli:{CHANNEL.name}",),
    ).fetchone() == (True,)


def alone(connection):
    until(
        lambda: (
            connection.execute(
                "select count(*) from pg_stat_activity where datname = current_database()"
                " and application_name like 'hlcli:%'"
            ).fetchone()
            == (0,)
        ),
        "the end of the job's session",
    )


# --- what is removed ----------------------------------------------------------------------------------------------


def test_only_rows_strictly_older_than_the_cut_off_are_deleted(run, connection):
    freeze(connection, NOW)
    cut_off = NOW - 90 * DAY
    add_alerts(connection, [cut_off - MICROSECOND, cut_off, cut_off + MICROSECOND, NOW, NOW + DAY])
    report = run()
    assert (report.status, report.exit_code) == ("ok", ExitCode.OK)
    assert report.details["rows_deleted"] == {"alerts": 1}
    assert times(connection, "alerts", "alert_ts") == [cut_off, cut_off + MICROSECOND, NOW, NOW + DAY]


def add_universe_run(connection):
    return connection.execute(
        "insert into wallet_universe_runs (as_of_ts, status, n_requested, duration_ms, ledger_run_id)"
        " values (now(), 'success', 1, 1, gen_random_uuid()) returning run_id"
    ).fetchone()[0]


def test_the_members_of_the_universe_that_is_watched_stay_however_old(run, connection):
    freeze(connection, NOW)
    runs = [add_universe_run(connection) for _ in range(2)]
    for n, run_id in enumerate(runs):
        connection.execute(
            "insert into wallet_universe_members (run_id, wallet_id, rank, month_pnl, as_of_ts)"
            " values (%s, '0x' || lpad(%s::text, 40, '0'), 1, 1, %s)",
            (run_id, n, NOW - timedelta(days=400)),
        )
    assert run().details["rows_deleted"] == {"wallet_universe_members": 1}
    assert connection.execute("select run_id from wallet_universe_members").fetchall() == [(runs[1],)]


def test_every_rule_of_the_schema_keeps_the_row_at_its_cut_off_and_removes_the_one_before(
    all_rules, run, connection, rng
):
    freeze(connection, NOW)
    rules = dict(connection.execute("select table_name, keep from retention_rules").fetchall())
    assert rules.pop("fills") is None
    run_id, _ = (add_universe_run(connection) for _ in range(2))
    insert = {
        "wallet_universe_members": "insert into wallet_universe_members (run_id, wallet_id, rank, month_pnl, as_of_ts)"
        f" select {run_id}, '0x' || lpad(%(n)s::text, 40, '0'), 1, 1, %(t)s",
        "snapshot_anomalies": "insert into snapshot_anomalies (detected_at, snapshot_ts, wallet_id, asset,"
        " anomaly_type) select %(t)s, %(t)s, 'x', 'BTC', 'other'",
        "ingest_runs": "insert into ingest_runs (snapshot_ts, status, wallets_expected, wallets_succeeded,"
        " wallets_failed, rows_expected, rows_written, coverage_pct, duration_ms, ledger_run_id)"
        " select %(t)s, 'success', 1, 1, 0, 1, 1, 100, 1, gen_random_uuid()",
        "ingest_health": "insert into ingest_health (health_ts, snapshot_status, coverage_pct, health_state)"
        " select %(t)s, 'success', 100, 'healthy'",
        "signals": "insert into signals select %(t)s, 'BTC', 'v2', 50, 50, 'flat', 1, 1, 1, 1, 'No-trade', 'Normal',"
        " false, false, 1, 1, 1, 1, 1, 1, 1, 1, false, null, 1",
        "signal_contributors": "insert into signal_contributors select %(t)s, 'BTC', 0, 0, 0, 0, 0, 0, 0, 0, 0",
        "alerts": "insert into alerts (alert_ts, asset, alert_type, severity, message)"
        " select %(t)s, 'BTC', 'regime_change', 'medium', 'x'",
        "ingestion_runs": "insert into ingestion_runs (run_id, source, channel, status, started_at, host, pid, version)"
        " select gen_random_uuid(), 's', 'c', 'skipped', %(t)s, 'h', 1, 'v'",
        "wallet_snapshots": "insert into wallet_snapshots (snapshot_ts, wallet_id, asset, position_szi, ingest_run_id)"
        " select %(t)s, 'x', 'BTC', 1, 1",
    }
    assert set(insert) == set(rules), "a new rule needs a row here"
    column = dict(connection.execute("select table_name, time_column from retention_rules").fetchall())
    older = {table: rng.sample(range(1, 10_000_000), 3) for table in rules}
    for table, keep in rules.items():
        for n, back in enumerate([*older[table], 0, -rng.randrange(1, 60_000_000)]):
            connection.execute(insert[table], {"n": n, "t": NOW - keep - back * MICROSECOND})
    report = run()
    assert report.details["rows_deleted"] == dict.fromkeys(rules, 3)
    for table, keep in rules.items():
        left = [moment for moment in times(connection, table, column[table]) if moment < NOW]
        assert len(left) == 2, table
        assert left[0] == NOW - keep, table


def test_what_is_kept_for_ever_is_sorted_into_partitions_and_never_removed(
    all_rules, run, connection, monkeypatch
):
    freeze(connection, NOW)
    only(connection, "fills")
    monkeypatch.setattr(job, "MOST_ASTRAY", 2)
    moments = [NOW - days * DAY for days in (800, 401, 400, 2, 0)]
    for number, moment in enumerate(moments):
        connection.execute(
            "insert into fills (user_address, coin, tid, oid, side, time, px, sz, source)"
            " values ('0x' || repeat('a', 40), 'BTC', %s, 1, 'A', %s, 1, 1, 's3')",
            (number, moment),
        )
    before = dump(connection, "fills", without=())
    rehearsed = run(dry_run=True)
    made = [run().details["partitions_made"].get("fills", 0) for _ in range(4)]
    assert rehearsed.details["partitions_made"] == {"fills": 6}
    assert made == [6, 2, 0, 0]  # today and three days more were made in the first
    assert dump(connection, "fills", without=()) == before
    assert times(connection, "only fills_default", "time") == []


def test_the_cut_off_moves_with_the_clocks_offset(run, connection, monkeypatch):
    connection.execute(
        "insert into alerts (alert_ts, asset, alert_type, severity, message)"
        " select clock_timestamp() - make_interval(hours => 24 * d - 12), 'BTC', 'regime_change', 'medium', d::text"
        " from generate_series(80, 100) d"
    )
    for offset, oldest in (("-5days", 95), ("0", 90), ("5days", 85)):
        monkeypatch.setenv("PGOPTIONS", f"-c hlcli.clock_offset={offset}")
        assert run().details["rows_deleted"] == {"alerts": 5}
        assert connection.execute("select max(message::int), min(message::int) from alerts").fetchone() == (
            oldest,
            80,
        )


def test_a_rule_of_ten_years_keeps_ten_years(run, connection):
    freeze(connection, NOW)
    connection.execute("update retention_rules set keep = '10 years'")
    cut_off = NOW.replace(year=NOW.year - 10)
    add_alerts(connection, [cut_off - MICROSECOND, cut_off])
    add_snapshots(connection, [cut_off - MICROSECOND, cut_off])
    assert run().details["rows_deleted"] == {"alerts": 1, "wallet_snapshots": 1}
    assert (
        times(connection, "alerts", "alert_ts")
        == times(connection, "wallet_snapshots", "snapshot_ts")
        == [cut_off]
    )


def test_many_rows_are_deleted_in_batches_each_a_unit(run, connection):
    only(connection, "ingest_health")
    connection.execute(
        "insert into ingest_health (health_ts, snapshot_status, coverage_pct, health_state)"
        " select now() - interval '8 days' - make_interval(secs => s), 'x', 1, 'stale' from generate_series(1, %s) s",
        (2 * BATCH_ROWS + 1,),
    )
    connection.execute("insert into ingest_health values (now(), null, 'x', 1, 'stale', null)")
    report = run()
    assert report.details == {**NOTHING, "rows_deleted": {"ingest_health": 2 * BATCH_ROWS + 1}}
    # The rule itself, and three batches; deletions are no loads.
    assert (report.numbers["units_ok"], report.numbers["units_failed"], report.numbers["served"]) == (4, 0, 0)
    (ledger,) = runs(connection, CHANNEL.name)
    assert (ledger["status"], ledger["units_ok"], ledger["details"]) == ("ok", 4, report.details)
    assert connection.execute("select count(*) from ingest_health").fetchone() == (1,)


def test_the_ledger_keeps_runs_under_way_and_each_channels_last_run_and_last_success(run, connection):
    def ledger(*entries):
        for channel, status, days in entries:
            connection.execute(
                "insert into ingestion_runs (run_id, source, channel, status, started_at, host, pid, version)"
                " values (gen_random_uuid(), 's', %s, %s, clock_timestamp() - make_interval(days => %s), 'h', 1, 'v')",
                (channel, status, days),
            )

    gone = [
        ("a", "ok", 200),
        ("a", "failed", 190),
        ("b", "skipped", 100),
        ("a", "skipped", 160),
        ("b", "failed", 150),
        ("c", "ok", 99),
    ]
    kept = [
        ("a", "partial", 180),
        ("a", "failed", 170),
        ("b", "running", 130),
        ("d", "running", 125),
        ("d", "failed", 110),
        ("c", "ok", 1),
        ("c", "skipped", 0),
    ]
    ledger(*gone, *kept)
    report = run()
    assert report.details["rows_deleted"] == {"ingestion_runs": len(gone)}
    left = connection.execute(
        "select channel, status, round(extract(epoch from clock_timestamp() - started_at) / 86400)::int"
        " from ingestion_runs where source = 's' order by 1, 3 desc"
    ).fetchall()
    assert left == sorted(kept, key=lambda entry: (entry[0], -entry[2]))
    connection.execute("delete from ingestion_runs where status = 'running'")


def test_a_run_does_not_delete_its_own_row_when_the_clock_is_far_ahead(run, connection, monkeypatch):
    monkeypatch.setenv("PGOPTIONS", "-c hlcli.clock_offset=3650days")
    for _ in range(2):
        assert run().status == "ok"
    # The first one was neither the last run nor the last success when the third went by.
    assert run().details["rows_deleted"] == {"ingestion_runs": 1}
    assert [row["status"] for row in runs(connection, CHANNEL.name)] == ["ok", "ok"]


# --- partitions ---------------------------------------------------------------------------------------------------


def test_partitions_for_now_and_three_spans_more_are_made_and_a_second_run_changes_nothing(
    run, connection, rng
):
    freeze(connection, NOW)
    add_snapshots(connection, [NOW + timedelta(hours=rng.uniform(-190, 100)) for _ in range(300)])
    report = run()
    assert report.details["partitions_made"] == {"wallet_snapshots": 4}
    days = [TODAY + n * DAY for n in range(4)]
    assert partitions(connection) == {
        **{day(start): bounds(start, start + DAY) for start in days},
        "wallet_snapshots_default": "DEFAULT",
    }
    before = everything(connection)
    report = run()
    assert (report.status, report.details) == ("ok", NOTHING)
    assert everything(connection) == before
    freeze(connection, NOW + DAY)
    assert run().details["partitions_made"] == {"wallet_snapshots": 1}


def test_rows_of_the_default_partition_are_moved_with_every_column(run, connection, rng):
    freeze(connection, NOW)
    for number in range(400):
        known, dirty = rng.random() < 0.8, rng.random() < 0.3
        maybe = lambda value: value if rng.random() < 0.7 else None  # noqa: E731
        connection.execute(
            "insert into wallet_snapshots values (%s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s)",
            (
                rng.choice(
                    [TODAY, TODAY + DAY - MICROSECOND, TODAY + DAY, TODAY + 4 * DAY, TODAY - MICROSECOND]
                )
                if rng.random() < 0.3
                else NOW + timedelta(seconds=rng.uniform(-4 * 86400, 5 * 86400)),
                f"0x{number:040x}",
                rng.choice(["BTC", "dex:\u20bf"]),
                f"{rng.uniform(-1, 1):.17f}000" if known else None,
                *(maybe(f"{rng.uniform(0, 1e6):.6f}") for _ in range(3)),
                maybe("cross"),
                maybe("1e-30"),
                maybe("12345678901234567890.123456789"),
                None if known else "timeout",
                dirty,
                "null_szi" if dirty else None,
                maybe(NOW),
                rng.randrange(2**62),
            ),
        )
    before = dump(connection, "wallet_snapshots", without=())
    assert run().status == "ok"
    assert dump(connection, "wallet_snapshots", without=()) == before
    for n in range(4):
        start = TODAY + n * DAY
        inside = times(connection, day(start), "snapshot_ts")
        assert inside
        assert all(start <= moment < start + DAY for moment in inside)
    left = times(connection, "wallet_snapshots_default", "snapshot_ts")
    assert left
    assert all(moment < TODAY or moment >= TODAY + 4 * DAY for moment in left)


DECLARED = (
    """select attname, format_type(atttypid, atttypmod), attnotnull, pg_get_expr(adbin, adrelid)
       from pg_attribute left join pg_attrdef on adrelid = attrelid and adnum = attnum
       where attrelid = %s::regclass and attnum > 0 order by attnum""",
    """select pg_get_indexdef(indexrelid), inhparent::regclass::text
       from pg_index left join pg_inherits on inhrelid = indexrelid where indrelid = %s::regclass order by indkey::text""",
    "select pg_get_constraintdef(oid) from pg_constraint where conrelid = %s::regclass order by 1",
)


def test_a_made_partition_equals_one_that_the_database_makes(run, connection):
    freeze(connection, NOW)
    attach(connection, TODAY - DAY, TODAY, "wallet_snapshots_by_hand")
    run()

    def declared(name):
        found = [connection.execute(statement, (name,)).fetchall() for statement in DECLARED]
        return json.loads(json.dumps(found).replace(name, "it"))

    def unnamed(declaration):
        """The names of indexes are the server's own choice."""
        return re.sub(r"\w+_(idx\d*|pkey)\b", "", json.dumps(declaration))

    assert unnamed(declared(day(TODAY))) == unnamed(declared("wallet_snapshots_by_hand"))
    assert len(declared(day(TODAY))[1]) == 2


def test_a_partition_that_another_process_made_meanwhile_is_no_failure(run, connection, monkeypatch):
    freeze(connection, NOW)
    make = job._make

    def made_meanwhile(other, *, rule, span):
        monkeypatch.setattr(job, "_make", make)
        with psycopg.connect(connection.info.dsn, autocommit=True) as third:
            third.execute("set TimeZone = 'UTC'")
            assert job.cover(third, rule.name, [NOW])
        return make(other, rule=rule, span=span)

    monkeypatch.setattr(job, "_make", made_meanwhile)
    report = run()
    assert (report.status, report.details["partitions_made"]) == ("ok", {"wallet_snapshots": 3})
    assert job.cover(connection, "wallet_snapshots", [NOW, NOW])


@pytest.mark.parametrize(
    ("span", "names", "lower", "length"),
    [
        (
            "1 hour",
            ["20260310_1200", "20260310_1300", "20260310_1400", "20260310_1500"],
            "2026-03-10 12:00",
            1,
        ),
        (
            "36 hours",
            ["20260309_1200", "20260311_0000", "20260312_1200", "20260314_0000"],
            "2026-03-09 12:00",
            36,
        ),
        ("7 days", ["20260305", "20260312", "20260319", "20260326"], "2026-03-05 00:00", 168),
    ],
)
def test_bounds_are_aligned_to_the_epoch_and_names_tell_them(run, connection, span, names, lower, length):
    freeze(connection, NOW)
    connection.execute(
        "update retention_rules set partition_span = %s where table_name = 'wallet_snapshots'", (span,)
    )
    assert run().status == "ok"
    first = datetime.fromisoformat(f"{lower}+00:00")
    assert int(first.timestamp()) % (length * 3600) == 0
    expected = {
        f"wallet_snapshots_p{name}": bounds(
            first + n * timedelta(hours=length), first + (n + 1) * timedelta(hours=length)
        )
        for n, name in enumerate(names)
    }
    assert partitions(connection) == {**expected, "wallet_snapshots_default": "DEFAULT"}


def test_spans_that_other_partitions_cover_are_left_alone(run, connection):
    freeze(connection, NOW)
    attach(connection, TODAY - 5 * DAY, TODAY + timedelta(hours=7), "first")
    attach(connection, TODAY + timedelta(hours=7), TODAY + 2 * DAY, "second")
    connection.execute(
        f"create table third partition of wallet_snapshots for values from ('{TODAY + 3 * DAY}') to (maxvalue)"
    )
    report = run()
    assert (report.status, report.details["partitions_made"]) == ("ok", {"wallet_snapshots": 1})
    assert set(partitions(connection)) == {
        "first",
        "second",
        "third",
        day(TODAY + 2 * DAY),
        "wallet_snapshots_default",
    }


def test_a_span_that_is_covered_in_part_fails_alone(run, connection):
    freeze(connection, NOW)
    attach(connection, TODAY + DAY + timedelta(hours=7), TODAY + DAY + timedelta(hours=8), "odd")
    add_snapshots(connection, [TODAY + n * timedelta(hours=6) for n in range(16)])
    add_alerts(connection, [NOW - 91 * DAY])
    before, expected = dump(connection, "wallet_snapshots", without=()), {"wallet_snapshots": 3}
    why = "other partitions cover a part of 2026-03-11 00:00:00+00 to 2026-03-12 00:00:00+00"
    refused = f"wallet_snapshots: make {day(TODAY + DAY)}: {why}"
    rehearsed, report = run(dry_run=True), run()
    for each in (rehearsed, report):
        assert (each.exit_code, each.details["partitions_made"]) == (ExitCode.PARTIAL, expected)
        assert each.failed == [refused]
    assert report.details["rows_deleted"] == {"alerts": 1}
    assert report.numbers["units_failed"] == 1
    assert dump(connection, "wallet_snapshots", without=()) == before
    assert len(partitions(connection)) == 5


def test_partitions_that_end_at_or_before_the_cut_off_are_dropped(run, connection):
    cut_off = TODAY - 7 * DAY
    for back in (3, 2, 1, 0):
        attach(connection, cut_off - back * DAY, cut_off - (back - 1) * DAY, day(cut_off - back * DAY))
    connection.execute(
        f"create table oldest partition of wallet_snapshots for values from (minvalue) to ('{cut_off - 3 * DAY}')"
    )
    add_snapshots(connection, [cut_off - n * timedelta(hours=8) for n in range(-3, 15)])
    freeze(connection, TODAY - MICROSECOND)
    assert run().details["partitions_dropped"] == {"wallet_snapshots": 3}
    assert min(times(connection, "wallet_snapshots", "snapshot_ts")) == cut_off - DAY
    freeze(connection, TODAY)
    report = run()
    assert report.details == {
        **NOTHING,
        "partitions_made": {"wallet_snapshots": 1},
        "partitions_dropped": {"wallet_snapshots": 1},
    }
    assert times(connection, "wallet_snapshots", "snapshot_ts")[0] == cut_off
    assert day(cut_off) in partitions(connection)


def test_old_rows_of_the_default_partition_are_deleted_by_age(run, connection):
    freeze(connection, NOW)
    cut_off = NOW - 7 * DAY
    attach(connection, cut_off - timedelta(hours=2), cut_off + timedelta(hours=2), "across")
    add_snapshots(connection, [cut_off - 9 * DAY, cut_off - timedelta(hours=1), cut_off + timedelta(hours=3)])
    assert run().details["rows_deleted"] == {"wallet_snapshots": 1}
    # A partition goes as a whole, once all of it is old.
    assert times(connection, "wallet_snapshots", "snapshot_ts") == [
        cut_off - timedelta(hours=1),
        cut_off + timedelta(hours=3),
    ]


def test_any_partitioned_table_will_do(run, connection):
    """Quoted names, another schema, columns in another order, generated ones, no default partition."""
    freeze(connection, NOW)
    only(connection)
    table, column = '"Odd one"."The {} %s table"', '"at ""noon"" %s {}"'
    connection.execute(
        f"""
        create schema "Odd one";
        create table {table} (
            gone text, {column} timestamptz not null, n int constraint n_positive check (n > 0),
            twice int generated always as (n * 2) stored, note text default 'none') partition by range ({column});
        alter table {table} drop column gone;
        create table "Odd one".rest (
            note text default 'none', n int constraint n_positive check (n > 0), twice int generated always as (n * 2) stored, gone text,
            {column} timestamptz not null);
        alter table "Odd one".rest drop column gone;
        alter table {table} attach partition "Odd one".rest default;
        create table plain (at timestamptz not null) partition by range (at);
        insert into {table} ({column}, n, note)
            select timestamptz '{NOW}' + make_interval(hours => h), h + 100, 'note ' || h from generate_series(-60, 99) h
        """
    )
    for name, time_column in ((table, 'at "noon" %s {}'), ("public.plain", "at")):
        connection.execute(
            "insert into retention_rules values (%s, %s, '1 day', '1 day')", (name, time_column)
        )
    rows = f"select to_jsonb(t) from {table} t where {column} >= '{NOW - DAY}' order by n"
    before = connection.execute(rows).fetchall()
    report = run()
    assert (report.failed, report.details["partitions_made"]) == ([], {table: 4, "public.plain": 4})
    assert report.details["rows_deleted"] == {table: 60 - 24}
    assert connection.execute(rows).fetchall() == before
    assert len(before) == 24 + 100
    assert len(partitions(connection, table)) == 5
    # Of yesterday from the cut-off on, and beyond the four days.
    assert connection.execute('select count(*) from "Odd one".rest').fetchone() == (12 + 16,)


# --- rehearsal and wrong rules ------------------------------------------------------------------------------------


def test_a_dry_run_tells_what_a_run_will_do_and_changes_nothing(run, connection):
    freeze(connection, NOW)
    add_alerts(connection, [NOW - n * DAY for n in range(80, 100)])
    add_snapshots(connection, [NOW - n * DAY for n in range(12)])
    attach(connection, TODAY - 20 * DAY, TODAY - 19 * DAY, "old")
    before = everything(connection)
    rehearsed = run(dry_run=True)
    assert everything(connection) == before
    assert runs(connection, CHANNEL.name) == []
    assert (rehearsed.status, rehearsed.exit_code, rehearsed.run_id) == ("dry-run", ExitCode.OK, None)
    assert rehearsed.details == {
        "rows_deleted": {"alerts": 9, "wallet_snapshots": 4},
        "partitions_made": {"wallet_snapshots": 4},
        "partitions_dropped": {"wallet_snapshots": 1},
    }
    assert run().details == rehearsed.details
    assert run(dry_run=True).details == NOTHING


WRONG = {
    "nowhere": ("at", None, "there is no such table"),
    "pg_stat_activity": ("query_start", None, "this is no table"),
    "cursors": ("updated", None, "there is no column updated"),
    "local": ("at", None, "column at is no timestamptz"),
    "dated": ("at", None, "column at is no timestamptz"),
    "plain": ("at", "1 day", "partition_span is set, but the table is not partitioned by range of at"),
    "by_list": ("at", "1 day", "partition_span is set, but the table is not partitioned by range of at"),
    "by_other": ("at", "1 day", "partition_span is set, but the table is not partitioned by range of at"),
    "by_two": ("at", "1 day", "partition_span is set, but the table is not partitioned by range of at"),
    "by_at": ("at", None, "the table is partitioned, its rule needs a partition_span"),
    "by_month": ("at", "1 month", "timestamps cannot be binned into intervals containing months or years"),
    "otherdb.public.plain": ("at", None, "cross-database references are not implemented"),
    "long": ("at", None, "out of range"),
    "kept": ("at", None, "update or delete on table"),
}


def test_a_wrong_rule_fails_alone_and_says_why(run, connection):
    freeze(connection, NOW)
    only(connection, "alerts", "wallet_snapshots")
    connection.execute(
        """
        create table cursors (at timestamptz);
        create table local (at timestamp);
        create table dated (at date);
        create table plain (at timestamptz);
        create table long (at timestamptz);
        create table by_list (at timestamptz) partition by list (at);
        create table by_other (at timestamptz, other timestamptz) partition by range (other);
        create table by_two (at timestamptz, other timestamptz) partition by range (at, other);
        create table by_at (at timestamptz) partition by range (at);
        create table by_month (at timestamptz) partition by range (at);
        create table kept (id int primary key, at timestamptz);
        create table keeper (id int references kept);
        insert into plain values ('2000-01-01');
        insert into kept values (1, '2000-01-01');
        insert into keeper values (1)
        """
    )
    for table, (column, span, _) in WRONG.items():
        keep = "200000 years" if table == "long" else "1 day"
        connection.execute("insert into retention_rules values (%s, %s, %s, %s)", (table, column, keep, span))
    add_alerts(connection, [NOW - 91 * DAY, NOW])
    for report in (run(dry_run=True), run()):
        told = dict(line.split(": ", 1) for line in report.failed)
        # Only the server knows of what refers to a row, and only when it is deleted.
        expected = set(WRONG) - ({"kept"} if report.status == "dry-run" else set())
        assert set(told) == expected
        for table in expected:
            assert WRONG[table][2] in told[table], table
        assert report.exit_code is ExitCode.PARTIAL
        assert report.details["rows_deleted"].items() >= {"alerts": 1}.items()
        assert report.details["partitions_made"] == {"wallet_snapshots": 4}
    (ledger,) = runs(connection, CHANNEL.name)
    assert (ledger["status"], ledger["exit_code"], ledger["units_failed"]) == ("partial", 3, len(WRONG))
    assert ledger["details"]["failed"] == report.failed
    assert times(connection, "alerts", "alert_ts") == [NOW]
    assert connection.execute("select count(*) from plain").fetchone() == (1,)


def test_a_table_of_the_wanted_name_that_is_no_partition_is_not_touched(run, connection):
    freeze(connection, NOW)
    connection.execute(f"create table {day(TODAY)} as select 1 as mine")
    report = run()
    assert report.failed == [f'wallet_snapshots: make {day(TODAY)}: relation "{day(TODAY)}" already exists']
    assert report.details["partitions_made"] == {"wallet_snapshots": 3}
    assert connection.execute(f"select mine from {day(TODAY)}").fetchall() == [(1,)]


# --- locks, kills, writers ----------------------------------------------------------------------------------------


def test_a_table_in_use_is_left_for_the_next_run(run, connection, database, monkeypatch):
    assert job.LOCK_TIMEOUT == "5s"
    monkeypatch.setattr(job, "LOCK_TIMEOUT", "200ms")
    freeze(connection, NOW)
    run()
    attach(connection, TODAY - 20 * DAY, TODAY - 19 * DAY, "old")
    add_snapshots(connection, [TODAY - 20 * DAY, TODAY - 18 * DAY])
    freeze(connection, NOW + DAY)
    add_alerts(connection, [NOW - 91 * DAY])
    with psycopg.connect(database) as reader:
        reader.execute("select count(*) from wallet_snapshots")
        report = run()
        refused = "canceling statement due to lock timeout"
        assert report.failed == [
            f"wallet_snapshots: make {day(TODAY + 4 * DAY)}: {refused}",
            f"wallet_snapshots: drop old: {refused}",
        ]
        assert (report.status, report.exit_code, report.numbers["units_failed"]) == (
            "partial",
            ExitCode.PARTIAL,
            2,
        )
        # Rows are still deleted, in this table and in others.
        assert report.details == {**NOTHING, "rows_deleted": {"alerts": 1, "wallet_snapshots": 1}}
        assert reader.execute("select count(*) from old").fetchone() == (1,)
    report = run()
    assert report.status == "ok"
    assert report.details == {
        **NOTHING,
        "partitions_made": {"wallet_snapshots": 1},
        "partitions_dropped": {"wallet_snapshots": 1},
    }


def test_a_partition_in_use_by_name_is_left_for_the_next_run(run, connection, database, monkeypatch):
    monkeypatch.setattr(job, "LOCK_TIMEOUT", "200ms")
    freeze(connection, NOW)
    for back in (20, 19):
        attach(connection, TODAY - back * DAY, TODAY - (back - 1) * DAY, f"old{back}")
    with psycopg.connect(database) as reader:
        reader.execute("select count(*) from old20")
        report = run()
        assert report.failed == ["wallet_snapshots: drop old20: canceling statement due to lock timeout"]
        assert report.details["partitions_dropped"] == {"wallet_snapshots": 1}
    assert "old20" in partitions(connection)
    assert run().details["partitions_dropped"] == {"wallet_snapshots": 1}
    assert not {"old19", "old20"} & set(partitions(connection))


def test_a_row_that_is_made_young_while_it_is_deleted_stays(run, connection, database):
    freeze(connection, NOW)
    add_alerts(connection, [NOW - 91 * DAY, NOW - 92 * DAY])
    # Enough of them that the server goes to the chosen rows by their place.
    add_alerts(connection, [NOW - DAY + n * MICROSECOND for n in range(3000)])
    connection.execute("analyze alerts")
    reports = []
    with psycopg.connect(database) as writer:
        writer.execute("update alerts set alert_ts = %s where alert_ts = %s", (NOW, NOW - 91 * DAY))
        deleting = threading.Thread(target=lambda: reports.append(run()))
        deleting.start()
        until(lambda: waits(connection), "the row that is being changed")
        writer.commit()
        deleting.join(30)
    assert [report.details["rows_deleted"] for report in reports] == [{"alerts": 1}]
    assert times(connection, "alerts", "alert_ts")[2999:] == [NOW - DAY + 2999 * MICROSECOND, NOW]


def test_a_killed_delete_keeps_its_batches_and_the_next_run_finishes(start, run, connection, database):
    only(connection, "ingest_health")
    connection.execute(
        "insert into ingest_health (health_ts, snapshot_status, coverage_pct, health_state)"
        " select now() - interval '8 days' + make_interval(secs => s), 'x', 1, 'stale' from generate_series(1, %s) s",
        (3 * BATCH_ROWS,),
    )
    with psycopg.connect(database) as holder:
        # A row of the third batch, in the order of the rows on disk and of the index.
        holder.execute(
            "select from ingest_health where health_ts = (select health_ts from ingest_health order by 1 offset %s limit 1)"
            " for update",
            (2 * BATCH_ROWS + 5_000,),
        )
        process = start()
        until(lambda: waits(connection), "the third batch")
        process.kill()
        process.communicate()
        holder.rollback()
    alone(connection)
    assert connection.execute("select count(*) from ingest_health").fetchone() == (BATCH_ROWS,)
    assert [(row["status"], row["units_ok"]) for row in runs(connection, CHANNEL.name)] == [("running", 3)]
    assert run().details["rows_deleted"] == {"ingest_health": BATCH_ROWS}
    assert [row["status"] for row in runs(connection, CHANNEL.name)] == ["abandoned", "ok"]


def test_a_kill_while_rows_are_moved_leaves_them_where_they_were(start, run, connection, database):
    freeze(connection, NOW)
    add_snapshots(connection, [TODAY + n * timedelta(minutes=7) for n in range(400)])
    before = everything(connection)
    with psycopg.connect(database) as reader:
        # Rows can be moved beside this lock, the partition cannot be attached.
        reader.execute("select count(*) from wallet_snapshots_default")
        process = start()
        until(lambda: waits(connection), "the partition to be attached")
        process.kill()
        process.communicate()
        reader.rollback()
    alone(connection)
    assert everything(connection) == before
    assert connection.execute("select to_regclass(%s)", (day(TODAY),)).fetchone() == (None,)
    assert run().details["partitions_made"] == {"wallet_snapshots": 4}
    assert dump(connection, "wallet_snapshots", without=()) == before[1]["wallet_snapshots"]
    assert len(times(connection, day(TODAY), "snapshot_ts")) == 206


def test_no_writer_fails_and_no_row_is_lost_while_partitions_come_and_go(run, connection, database, rng):
    connection.execute(
        "update retention_rules set partition_span = '1 hour', keep = '5 hours' where table_name = 'wallet_snapshots'"
    )
    written, failures, stop = [], [], threading.Event()
    seeds = [rng.random() for _ in range(3)]

    def write(number):
        import random

        own = random.Random(seeds[number])
        try:
            with psycopg.connect(database, autocommit=True) as writer:
                while not stop.is_set():
                    wallet = f"{number}/{len(written)}/{own.random()}"
                    moments = [NOW + timedelta(hours=own.uniform(0, 20)) for _ in range(3)]
                    # As the loader does: look first, then write, in one transaction.
                    with writer.transaction():
                        if own.random() < 0.5:
                            writer.execute(
                                "select count(*) from wallet_snapshots where wallet_id = %s", (wallet,)
                            )
                        add_snapshots(writer, moments, wallet)
                    written.extend((moment, wallet) for moment in moments)
        except psycopg.Error as error:
            failures.append(error)

    writers = [threading.Thread(target=write, args=(number,)) for number in range(len(seeds))]
    for each in writers:
        each.start()
    try:
        made = dropped = 0
        # Old partitions, without a row, are dropped while rows are written beside them.
        full = NOW.replace(minute=0, second=0, microsecond=0)
        for back in range(20, 0, -1):
            attach(connection, full - timedelta(hours=back), full - timedelta(hours=back - 1), f"old{back}")
        for hour in range(5):
            freeze(connection, NOW + timedelta(hours=hour))
            time.sleep(0.2)
            report = run()
            assert report.status == "ok", report.failed
            made += report.details["partitions_made"].get("wallet_snapshots", 0)
            dropped += report.details["partitions_dropped"].get("wallet_snapshots", 0)
    finally:
        stop.set()
        for each in writers:
            each.join(30)
    assert failures == []
    assert (made, dropped) == (8, 19)
    stored = connection.execute("select snapshot_ts, wallet_id from wallet_snapshots").fetchall()
    assert len(written) > 100
    assert sorted(stored) == sorted(written)


# --- the command --------------------------------------------------------------------------------------------------


def test_the_command_prints_json_and_exits_with_the_runs_code(cli, database, connection):
    freeze(connection, NOW)
    add_alerts(connection, [NOW - 91 * DAY])

    def command(*args):
        done = cli("maintain", *args, "--json", DATABASE_URL=database, HL_EGRESS_KEY="test")
        return done.returncode, json.loads(done.stdout), done.stderr

    code, report, err = command("--dry-run")
    assert (code, report["status"], report["details"]["rows_deleted"], err) == (
        0,
        "dry-run",
        {"alerts": 1},
        "",
    )
    assert runs(connection, CHANNEL.name) == []
    code, report, err = command()
    assert (code, report["channel"], report["status"], err) == (0, "hlcli/maintenance", "ok", "")
    assert report["details"] == {
        "rows_deleted": {"alerts": 1},
        "partitions_made": {"wallet_snapshots": 4},
        "partitions_dropped": {},
    }
    (ledger,) = runs(connection, CHANNEL.name)
    assert (str(ledger["run_id"]), ledger["details"]) == (report["run_id"], report["details"])
    connection.execute("insert into retention_rules values ('nowhere', 'at', '1 day')")
    for args in (["--dry-run"], []):
        code, report, err = command(*args)
        assert (code, report["failed"]) == (3, ["nowhere: there is no such table"])
        assert err.count("\n") == 1
        assert "nowhere: there is no such table" in err
