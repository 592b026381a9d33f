"""`sync_fills` and `sync_twaps` on a moto server: what is read, what is skipped, what becomes of the rows."""

from __future__ import annotations

import json
import os
import re
import threading
import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import psycopg
import pytest
from s3_server import (
    T0,
    USER,
    assert_every_call_pays,
    assert_numbers_add_up,
    block,
    event,
    fill,
    fills,
    log_of,
    packed,
    row_by_row,
    state,
    tids,
    twap_ids,
    twaps,
)
from vault_tables import assert_nothing_left, dump, runs

from hlcli.exitcodes import UsageError
from hlcli.jobs import objects, sync_fills
from hlcli.jobs.maintain import maintain
from hlcli.jobs.objects import Options
from hlcli.jobs.sync_twaps import sync_twaps

pytest_plugins = ("s3_fixtures",)
HOUR = timedelta(hours=1)
OTHER = "0x" + "b" * 40


@pytest.fixture
def sync(settings, s3):
    """Run a job on the test's bucket: sync("twaps", limit=2)."""

    def run(what="fills", user=None, local=None, **more):
        more["local"] = [local] if local else []
        chosen = Options(**{"max_bytes": 10**10, "jobs": 2, "deadline": HOUR, **more})
        if what == "fills":
            return sync_fills.sync_fills(settings(**s3.env()), chosen, user=user)
        return sync_twaps(settings(**s3.env()), chosen)

    return run


# What is read


def test_each_object_is_read_once_over_all_pages(sync, s3, connection):
    s3.page_size = 3
    for number in range(8):
        s3.put(f"raw/{number}.lz4", fills(2 * number, 2 * number + 1))
    s3.put("raw/", b"")  # what some consoles make for a folder
    s3.put("elsewhere/9.lz4", fills(99))
    first = sync()
    assert (first.status, first.numbers["inserted"], first.numbers["units_ok"]) == ("ok", 16, 8)
    assert tids(connection) == list(range(16))
    assert log_of(connection) == {f"raw/{number}.lz4": ("ok", 1, 2, 2, 2, 0) for number in range(8)}
    assert (s3.count("list"), s3.count("get")) == (3, 8)
    before = state(connection)
    again = sync()
    assert (again.status, again.details["skipped"], again.numbers["units_ok"]) == ("ok", 8, 0)
    assert s3.count("get") == 8
    assert state(connection) == before
    assert_every_call_pays(s3)
    assert_numbers_add_up(connection)
    assert_nothing_left(connection)


def test_keys_of_every_kind_are_read_and_logged_as_they_are(sync, s3, connection):
    keys = [
        "raw/a b+c%20.lz4",
        "raw/ü€😀.lz4",
        "raw/..lz4",
        "raw/a&b<c>.lz4",
        "raw/tab\there.lz4",
        "raw/x?y=z#.lz4",
    ]
    for number, key in enumerate(keys):
        s3.put(key, fills(number))
    assert sync().status == "ok"
    assert set(log_of(connection)) == set(keys)
    assert tids(connection) == list(range(6))
    assert sync(keys=keys).numbers["unchanged"] == 6
    assert_every_call_pays(s3)


@pytest.mark.parametrize("jobs", [1, 2, 8])
def test_any_number_of_jobs_stores_the_same(sync, s3, connection, jobs):
    for number in range(6):
        s3.put(f"raw/{number}.lz4", fills(*range(2 * number, 2 * number + 3)))
        s3.put(f"raw/{number}.twaps.lz4", twaps(number))
    s3.env()
    report = sync(jobs=jobs)
    assert (report.numbers["units_ok"], report.numbers["units_failed"]) == (6, 6)
    assert tids(connection) == list(range(13))
    assert_numbers_add_up(connection)


def test_since_until_and_limit_choose_by_the_time_of_the_last_change(sync, s3, connection):
    for number in range(6):
        s3.put(f"raw/{number}.lz4", fills(number), T0 + number * HOUR)
    report = sync(since=T0 + HOUR, until=T0 + 5 * HOUR, limit=3)
    assert (report.details["objects"], report.details["left"]) == (3, 1)
    assert tids(connection) == [1, 2, 3]
    assert sync(since=T0 + 5 * HOUR).details["objects"] == 1
    assert sync(since=T0 + 9 * HOUR).details["objects"] == 0
    assert sync().details == {
        "objects": 2, "bytes": len(fills(0)) + len(fills(4)), "skipped": 4, "quarantined_before": 0, "left": 0, "gone": 0
    }  # fmt: skip
    assert tids(connection) == list(range(6))


def test_max_gb_counts_compressed_bytes_and_reads_one_object_at_least(sync, s3, connection):
    bodies = [fills(number) for number in range(4)]
    for number, body in enumerate(bodies):
        s3.put(f"raw/{number}.lz4", body)
    assert sync(max_bytes=1).details["left"] == 3
    assert tids(connection) == [0]
    assert sync(max_bytes=len(bodies[1]) + len(bodies[2])).details["left"] == 1
    assert tids(connection) == [0, 1, 2]


def test_a_deadline_that_has_passed_begins_nothing(sync, s3, connection):
    s3.put("raw/0.lz4", fills(0))
    report = sync(deadline=timedelta(0))
    assert (report.status, report.details["left"], s3.count("get")) == ("ok", 1, 0)
    assert sync().numbers["inserted"] == 1


def test_named_keys_and_again_read_what_is_done(sync, s3, connection):
    for number in range(3):
        s3.put(f"raw/{number}.lz4", fills(number))
    s3.put("other/3.lz4", fills(3))
    sync()
    assert sync(keys=["raw/1.lz4", "other/3.lz4", "raw/1.lz4"]).numbers == pytest.approx(
        {"served": 2, "inserted": 1, "unchanged": 1, "units_ok": 2}
        | dict.fromkeys(("updated", "duplicate", "rejected", "new_rejects", "units_failed", "rows_failed"), 0)
        | {"requests": 0, "weight": 0}
    )
    assert log_of(connection)["raw/1.lz4"] == ("ok", 2, 1, 0, 0, 0)
    assert s3.count("list") == 1
    assert sync(again=True).numbers["unchanged"] == 3
    assert sync(again=True, since=T0 + 99 * HOUR).numbers["units_ok"] == 0
    assert_every_call_pays(s3)
    assert_numbers_add_up(connection)


def test_a_key_that_is_not_there_is_wrong_usage(sync, s3, connection):
    with pytest.raises(UsageError, match="raw/none"):
        sync(keys=["raw/none"])
    assert runs(connection, "fills") == []  # a slip of the hand is no failure of the channel


def test_a_dry_run_tells_what_it_would_cost_and_writes_nothing(sync, s3, settings, connection, database):
    for number in range(30):
        s3.put(f"raw/{number:02}.lz4", fills(number))
    sync(limit=4)
    before = state(connection), connection.execute("select count(*) from ingestion_runs").fetchone()
    size = sum(len(fills(number)) for number in range(4, 30))
    with psycopg.connect(database, autocommit=True) as holder:
        holder.execute(
            "select pg_advisory_lock(%s, %s)",
            (objects.migrations.LOCK_NAMESPACE, sync_fills.CHANNEL.lock_key),
        )
        report = sync(dry_run=True)
    assert (report.status, report.run_id, int(report.exit_code)) == ("dry-run", None, 0)
    assert report.details == {
        "objects": 26, "bytes": size, "skipped": 4, "quarantined_before": 0, "left": 0, "cost_usd": "<0.01",
        "first": [f"raw/{number:02}.lz4" for number in range(4, 24)],
    }  # fmt: skip
    assert (state(connection), connection.execute("select count(*) from ingestion_runs").fetchone()) == before
    assert s3.count("get") == 4


def test_the_cost_follows_size_and_region(sync, s3, settings, monkeypatch):
    s3.put("raw/0.lz4", b"x")
    s3.fault("list", times=None, change=lambda answer: _resized(answer, 46_000_000_000))
    assert sync(dry_run=True).details["cost_usd"] == "4.14"
    told = settings(**s3.env(HL_FILLS_S3_REGION="ap-northeast-1"))
    chosen = Options(max_bytes=10**12, jobs=2, deadline=HOUR, dry_run=True)
    assert sync_fills.sync_fills(told, chosen).details["cost_usd"] == "5.24"


def _resized(answer, size):
    return replace(answer, body=re.sub(rb"<Size>\d+</Size>", b"<Size>%d</Size>" % size, answer.body))


# Files of this machine


def test_a_folder_is_read_once_and_a_changed_file_again(sync, connection, tmp_path):
    folder = tmp_path / "in"
    (folder / "sub").mkdir(parents=True)
    for number, name in enumerate(["a.lz4", "sub/b.jsonl", "sub/c"]):
        body = fills(number) if name.endswith("lz4") else json.dumps(block(number)).encode()
        (folder / name).write_bytes(body)
    (folder / ".hidden.lz4").write_bytes(fills(7))
    report = sync(local=folder)
    assert (report.details["objects"], report.numbers["inserted"]) == (2, 2)
    assert sync(local=folder).details["skipped"] == 2
    (folder / "a.lz4").write_bytes(fills(3, 4))
    report = sync(local=folder)
    assert (report.details["objects"], report.details["skipped"]) == (1, 1)
    assert tids(connection) == [1, 3, 4]
    # A file that is named is read whatever the log and its name say.
    assert sync(local=folder / "sub/b.jsonl").numbers["unchanged"] == 1
    assert sync(local=folder / "sub/c").numbers["inserted"] == 1
    logged = connection.execute(
        "select bucket, s3_object_key, etag from etl_s3_ingest_log order by 2"
    ).fetchall()
    assert [(bucket, key) for bucket, key, _ in logged] == [
        ("file:", str(folder / name)) for name in ("a.lz4", "sub/b.jsonl", "sub/c")
    ]
    assert_numbers_add_up(connection)


def test_one_file_by_two_names_is_one_object(sync, connection, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.lz4").write_bytes(fills(0))
    (tmp_path / "in/b.lz4").symlink_to(tmp_path / "in/a.lz4")
    assert sync(local=tmp_path / "in").numbers["units_ok"] == 1


def test_a_file_that_changes_while_it_is_read_is_not_kept(sync, connection, tmp_path, monkeypatch):
    path = tmp_path / "a.lz4"
    path.write_bytes(fills(0))
    read = sync_fills.fills.read

    def changing(batches, *, user):
        yield from read(batches, user=user)
        path.write_bytes(fills(0, 1))

    monkeypatch.setattr(sync_fills.fills, "read", changing)
    report = sync(local=path)
    assert (report.status, int(report.exit_code)) == ("partial", 3)
    assert "changed while it was read" in report.failed[0]
    assert tids(connection) == []
    monkeypatch.undo()
    assert sync(local=path).numbers["inserted"] == 2


def test_paths_that_are_none_are_wrong_usage(sync, connection, tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for path in ("missing", "fifo", "loop", "/dev/zero", "a.lz4/b"):
        with pytest.raises(UsageError, match="--local-file"):
            sync(local=tmp_path / path)
    (tmp_path / "none").mkdir()
    (tmp_path / "none/round").symlink_to(tmp_path / "none")
    report = sync(local=tmp_path / "none")
    assert (report.status, report.details["objects"]) == ("ok", 0)


# Content that is no good


def test_what_is_malformed_is_tried_three_times_and_then_left_until_it_is_replaced(sync, s3, connection):
    s3.put("raw/bad.lz4", fills(0, 1)[:-9])
    s3.put("raw/good.lz4", fills(5))
    codes, states = [], []
    for _ in range(4):
        report = sync()
        codes.append(int(report.exit_code))
        states.append(log_of(connection, "state", "attempts")["raw/bad.lz4"])
    assert codes == [3, 3, 3, 0]
    assert states == [("failed", 1), ("failed", 2), ("quarantined", 3), ("quarantined", 3)]
    assert report.details["quarantined_before"] == 1
    assert tids(connection) == [5]
    s3.put("raw/bad.lz4", fills(0, 1))
    assert sync().numbers["inserted"] == 2
    assert log_of(connection)["raw/bad.lz4"] == ("ok", 1, 2, 2, 2, 0)
    assert connection.execute(
        "select count(*) from etl_s3_ingest_log where error_text is not null"
    ).fetchone() == (0,)
    assert_numbers_add_up(connection)


def test_an_object_of_which_no_row_can_be_stored_is_left_at_once(sync, s3, connection):
    s3.put("raw/bad.lz4", fills(0, 1, side="X"))
    s3.put("raw/mixed.lz4", packed(block(2), block(3, px="NaN"), b"not json", block(4)))
    report = sync()
    assert int(report.exit_code) == 3
    assert log_of(connection) == {
        "raw/bad.lz4": ("quarantined", 1, 0, 0, 0, 0),
        "raw/mixed.lz4": ("ok", 1, 4, 2, 2, 2),
    }
    assert connection.execute("select count(*) from rejected_rows").fetchone() == (2,)
    assert log_of(connection, "error_text")["raw/bad.lz4"] == (
        "2 of 2 rows cannot be stored, the first for: check fills_row"
    )
    assert int(sync().exit_code) == 0
    assert_numbers_add_up(connection)


def test_twaps_without_any_time_of_their_events_are_left_at_once(sync, s3, connection):
    timeless = {name: value for name, value in event(0, timestamp=None).items() if name != "time"}
    s3.put("raw/0.lz4", packed(timeless))
    s3.put("raw/1.lz4", twaps(1))
    report = sync("twaps")
    assert int(report.exit_code) == 3
    assert log_of(connection, "state") == {"raw/0.lz4": "quarantined", "raw/1.lz4": "ok"}
    assert sync("twaps").details["quarantined_before"] == 1
    s3.put("raw/0.lz4", twaps(0))
    assert sync("twaps").numbers["inserted"] == 1
    assert twap_ids(connection) == [0, 1]


def test_an_empty_object_has_failed_and_one_without_events_has_not(sync, s3, connection):
    s3.put("raw/0.lz4", b"")
    s3.put("raw/1.lz4", packed(block()))
    assert int(sync().exit_code) == 3
    assert log_of(connection, "state", "error_text") == {
        "raw/0.lz4": ("failed", "empty"),
        "raw/1.lz4": ("ok", None),
    }


# An object that was replaced


def test_rows_that_a_new_version_lacks_are_gone(sync, s3, connection):
    s3.put("raw/0.lz4", fills(0, 1, 2))
    s3.put("raw/1.lz4", fills(10))
    sync()
    s3.put("raw/0.lz4", fills(1, 3, px="7.5"))
    report = sync()
    assert (report.numbers["inserted"], report.numbers["updated"], report.details["skipped"]) == (2, 0, 1)
    assert tids(connection) == [1, 3, 10]
    assert log_of(connection)["raw/0.lz4"] == ("ok", 1, 2, 2, 2, 0)
    s3.put("raw/0.lz4", packed(block()))
    sync()
    assert tids(connection) == [10]
    s3.put("raw/0.lz4", fills(4))
    sync()
    assert tids(connection) == [4, 10]
    assert_numbers_add_up(connection)


@pytest.mark.parametrize("jobs", [1, 2])
def test_rows_that_another_object_has_as_well_come_back_with_the_next_run(sync, s3, connection, jobs):
    s3.put("raw/0.lz4", fills(0, 1, 2))
    s3.put("raw/1.lz4", fills(2, 3))
    s3.put("raw/2.lz4", fills(10, 11))
    sync(jobs=1)
    s3.put("raw/0.lz4", fills(0))
    sync(jobs=jobs)
    assert log_of(connection, "state") == {"raw/0.lz4": "ok", "raw/1.lz4": "pending", "raw/2.lz4": "ok"}
    sync(jobs=jobs)
    assert tids(connection) == [0, 2, 3, 10, 11]
    assert set(log_of(connection, "state").values()) == {"ok"}
    assert_numbers_add_up(connection)


def test_a_version_that_cannot_be_read_leaves_the_rows_of_the_one_before_it(sync, s3, connection):
    s3.put("raw/0.lz4", fills(0, 1))
    sync()
    old = connection.execute("select loaded_version from etl_s3_ingest_log").fetchone()
    s3.put("raw/0.lz4", fills(0, 2)[:-9])
    assert int(sync().exit_code) == 3
    assert tids(connection) == [0, 1]
    assert log_of(connection)["raw/0.lz4"] == ("failed", 1, 2, 2, 2, 0)
    assert connection.execute("select loaded_version from etl_s3_ingest_log").fetchone() == old
    s3.put("raw/0.lz4", packed(b"<html>", b"<body>", b"</html>"))
    assert int(sync().exit_code) == 3
    assert tids(connection) == [0, 1]
    s3.put("raw/0.lz4", fills(0, 3))
    sync()
    assert tids(connection) == [0, 3]


def test_a_new_version_and_a_new_object_with_the_same_row_at_once_lose_nothing(
    sync, s3, connection, monkeypatch
):
    """The new object finds the row of the old version and holds it; the removal waits, and then sees who had it."""
    s3.put("raw/0.lz4", fills(0, 1))
    sync()
    s3.put("raw/0.lz4", fills(0))
    s3.put("raw/1.lz4", fills(1, 2, 3))
    read = sync_fills.fills.read
    removing = (
        "select count(*) from pg_stat_activity where datname = current_database() and wait_event_type = 'Lock'"
        " and query like 'delete from%'"
    )
    held, seen = threading.Event(), []

    def slow(batches, *, user):
        """Row by row; the one after the next is made when one was loaded."""
        for number, rows in enumerate(row_by_row(read(batches, user=user))):
            if rows.frame["tid"][0] == 10**12:
                assert held.wait(20)
            elif number == 2:
                held.set()
                seen.append(
                    any(connection.execute(removing).fetchone()[0] or time.sleep(0.01) for _ in range(2000))
                )
            yield rows

    with monkeypatch.context() as patch:
        patch.setattr(sync_fills.fills, "read", slow)
        sync()
    assert seen == [True]
    sync()
    assert tids(connection) == [0, 1, 2, 3]


def test_of_two_twap_files_the_newer_wins_and_a_replaced_one_takes_its_rows_along(sync, s3, connection):
    s3.put("raw/0.lz4", twaps(0, 1, sz="1"), T0 + 2 * HOUR)
    s3.put("raw/1.lz4", twaps(0, sz="2"), T0 + HOUR)
    s3.put("raw/2.lz4", twaps(1, sz="3"), T0 + 3 * HOUR)
    sync("twaps", jobs=1)
    held = "select twap_id - 2250263, size_requested::text, s3_object_key from twap_status order by 1"
    assert connection.execute(held).fetchall() == [(0, "1", "raw/0.lz4"), (1, "3", "raw/2.lz4")]
    s3.put("raw/0.lz4", twaps(5), T0 + 4 * HOUR)
    sync("twaps")
    sync("twaps")
    assert connection.execute(held).fetchall() == [
        (0, "2", "raw/1.lz4"), (1, "3", "raw/2.lz4"), (5, "10.00", "raw/0.lz4")
    ]  # fmt: skip
    assert_numbers_add_up(connection)


@pytest.mark.parametrize("rounds", [8, pytest.param(150, marks=[pytest.mark.long, pytest.mark.timeout(600)])])
def test_whatever_is_replaced_or_damaged_in_whatever_order_the_table_is_what_the_objects_hold(
    sync, s3, connection, rng, rounds
):
    held = {}
    for _ in range(rounds):
        for key in rng.sample(range(6), rng.randrange(1, 4)):
            # Half of the versions share rows with other objects, at times all of them.
            held[key] = sorted(rng.sample(range(14), rng.randrange(5)))
            body = fills(*held[key]) if held[key] else packed(block())
            s3.put(f"raw/{key}.lz4", body[:-9] if rng.random() < 0.15 else body)
        if rng.random() < 0.6:
            sync(jobs=rng.choice([1, 2, 4]), limit=rng.choice([None, 2]))
    for key, numbers in held.items():
        s3.put(f"raw/{key}.lz4", fills(*numbers) if numbers else packed(block()))
    sync()
    sync()
    assert tids(connection) == sorted(set().union(*held.values())), held
    assert set(log_of(connection, "state").values()) == {"ok"}
    assert sync().numbers["served"] == 0
    assert_numbers_add_up(connection)
    assert_nothing_left(connection)


# The API and S3


SHOWN = (
    "select px::text, fee::text, dir, builder_fee::text, block_number, source,"
    " object_id = (select object_id from etl_s3_ingest_log where bucket <> 'file:') from fills"
)


@pytest.mark.parametrize("first", ["api", "s3"])
def test_s3_wins_over_the_api_whichever_comes_first_and_null_over_nothing(
    sync, s3, connection, tmp_path, first
):
    answer = tmp_path / "userFills.json"
    answer.write_text(json.dumps([fill(0, px="1.5", fee="9", builderFee="0.3")]))
    s3.put("raw/0.lz4", packed({**block(0), "events": [[USER, fill(0, px="2.50", dir=None)]]}))
    steps = [lambda: sync(local=answer, user=USER), sync]
    for step in steps if first == "api" else reversed(steps):
        assert step().status == "ok"
    assert connection.execute(SHOWN).fetchall() == [
        ("2.50", "0.000010", "Open Long", "0.3", 10**9, "s3", True)
    ]
    before = state(connection)
    sync(again=True)
    sync(local=answer, user=USER)
    assert dump(connection, "fills") and state(connection)["fills"] == before["fills"]
    assert_numbers_add_up(connection)


# Partitions


def test_rows_of_past_days_go_to_partitions_of_their_own(sync, s3, connection):
    days = [datetime(2025, 7, 27, tzinfo=UTC) + timedelta(days=day) for day in range(4)]
    for number, day in enumerate(days):
        late, early = int(day.timestamp() * 1000) - 1, int(day.timestamp() * 1000)
        s3.put(f"raw/{number}.lz4", packed(block(number, time=late), block(number, time=early)))
    assert sync().status == "ok"
    assert connection.execute(
        "select tableoid::regclass::text, count(*) from fills group by 1 order by 1"
    ).fetchall() == [
        ("fills_p20250726", 1),
        ("fills_p20250727", 2),
        ("fills_p20250728", 2),
        ("fills_p20250729", 2),
        ("fills_p20250730", 1),
    ]


def test_a_long_reader_sends_rows_to_the_default_partition_and_maintain_sorts_them(
    sync, s3, settings, connection, database, monkeypatch
):
    monkeypatch.setattr("hlcli.jobs.maintain.LOCK_TIMEOUT", "100ms")
    s3.put("raw/0.lz4", fills(0))
    with psycopg.connect(database) as reader:
        reader.execute("select count(*) from fills")
        assert sync().status == "ok"
    where = "select tableoid::regclass::text from fills"
    assert connection.execute(where).fetchall() == [("fills_default",)]
    maintain(settings())
    assert connection.execute(where).fetchall() == [(f"fills_p{T0:%Y%m%d}",)]
    assert tids(connection) == [0]
    assert sync().details["skipped"] == 1


def test_objects_of_several_days_loaded_at_once_do_not_keep_each_other_from_their_partitions(
    sync, s3, connection, monkeypatch
):
    """A load holds the table for as long as it takes; who needs a new day does not give up on it after seconds."""
    monkeypatch.setattr("hlcli.jobs.maintain.LOCK_TIMEOUT", "100ms")
    read = sync_fills.fills.read

    def slow(batches, *, user):
        for rows in row_by_row(read(batches, user=user)):
            yield rows
            time.sleep(0.2)

    monkeypatch.setattr(sync_fills.fills, "read", slow)
    for day in range(6):
        s3.put(f"raw/{day}.lz4", fills(86400 * day, 86400 * day + 1))
    assert sync(jobs=3).status == "ok"
    assert connection.execute("select count(*) from fills_default").fetchone() == (0,)
    assert len(tids(connection)) == 12
