"""S3 that lies, breaks off and goes away (F15), and sync jobs that end badly (F1, F2, F4, F19, F21; G1, G4, G5)."""

from __future__ import annotations

import os
import resource
import signal
import socket
import tempfile
import threading
import time
from dataclasses import replace
from datetime import timedelta

import psycopg
import pytest
from s3_server import (
    SECRET,
    T0,
    Answer,
    assert_every_call_pays,
    assert_numbers_add_up,
    cut,
    fill,
    fills,
    flip,
    log_of,
    packed,
    refuse,
    row_by_row,
    state,
    swap,
    tids,
    twaps,
)
from test_kills import alone, skipped
from vault_tables import assert_nothing_left, runs
from waiting import until

from hlcli import exitcodes
from hlcli import s3 as s3_module
from hlcli.exitcodes import ConfigError, TemporaryError
from hlcli.jobs import sync_fills
from hlcli.jobs.objects import Options
from hlcli.jobs.sync_twaps import sync_twaps

pytest_plugins = ("s3_fixtures",)
HOUR = timedelta(hours=1)


@pytest.fixture
def sync(settings, s3, impatient):
    """Run a job on the test's bucket, without a pause between attempts: sync("twaps", limit=2)."""

    def run(what="fills", **more):
        env = more.pop("env", {})
        chosen = Options(**{"max_bytes": 10**10, "jobs": 2, "deadline": HOUR, **more})
        job = sync_fills.sync_fills if what == "fills" else sync_twaps
        return job(settings(**s3.env(**env)), chosen)

    return run


@pytest.fixture
def start(spawn, s3, tmp_path):
    """Start a job as a process, with a folder for temporary files of its own."""
    (tmp_path / "tmp").mkdir()

    def run(what="fills", *args, **env):
        return spawn(what, "sync", *args, **{**s3.env(), "TMPDIR": str(tmp_path / "tmp"), **env})

    return run


def refused(sync, error, *words, code, **more):
    """The run ends by this error, told in one line without any secret; the ledger agrees."""
    with pytest.raises(error) as caught:
        sync(**more)
    told = exitcodes.exit_code_for(caught.value), str(caught.value)
    assert told[0] == code
    assert all(word in told[1] for word in words), told
    assert SECRET not in told[1]
    return told[1]


def last_run(connection, channel="fills"):
    run = runs(connection, channel)[-1]
    return run["status"], run["exit_code"]


# F15: objects


@pytest.mark.parametrize("chunked", [False, True], ids=["short", "cut chunk"])
def test_a_body_that_breaks_off_is_asked_for_again(sync, s3, connection, chunked):
    s3.put("raw/0.lz4", fills(0, 1))
    s3.fault("get", times=2, change=cut(chunked=chunked))
    assert sync().status == "ok"
    assert s3.count("get") == 3
    assert tids(connection) == [0, 1]
    assert_every_call_pays(s3)


def test_a_body_that_always_breaks_off_fails_its_object_and_no_other(sync, s3, connection):
    for number in range(4):
        s3.put(f"raw/{number}.lz4", fills(number))
    s3.fault("get", "raw/1.lz4", times=None, change=cut())
    s3.fault("get", "raw/2.lz4", times=None, change=lambda answer: replace(answer, body=answer.body[:-5]))
    report = sync()
    assert (report.status, int(report.exit_code), report.numbers["units_failed"]) == ("partial", 3, 2)
    assert s3.count("get", "raw/1.lz4") == s3.count("get", "raw/2.lz4") == 3
    assert tids(connection) == [0, 3]
    assert log_of(connection, "state") == {
        "raw/0.lz4": "ok", "raw/1.lz4": "failed", "raw/2.lz4": "failed", "raw/3.lz4": "ok"
    }  # fmt: skip
    s3.mend()
    assert sync().numbers["inserted"] == 2
    assert tids(connection) == [0, 1, 2, 3]
    assert_numbers_add_up(connection)
    assert_nothing_left(connection)


def test_what_cannot_be_fetched_is_never_given_up_and_costs_no_attempt_of_what_can(sync, s3, connection):
    s3.put("raw/0.lz4", fills(0)[:-9])
    s3.fault("get", times=None, change=cut())
    for _ in range(4):
        assert int(sync().exit_code) == 4
    assert log_of(connection, "state") == {"raw/0.lz4": "failed"}
    s3.mend()
    sync()
    assert log_of(connection, "state", "attempts") == {"raw/0.lz4": ("failed", 1)}
    s3.put("raw/0.lz4", fills(0))
    assert sync().status == "ok"


def test_a_bit_that_flips_on_the_way_is_found(sync, s3, connection):
    s3.put("raw/0.lz4", fills(0, 1))
    s3.fault("get", times=1, change=flip)
    assert sync().status == "ok"
    assert s3.count("get") == 2
    assert tids(connection) == [0, 1]


def test_an_object_that_is_replaced_after_it_was_listed_is_read_in_its_new_version(sync, s3, connection):
    s3.put("raw/0.lz4", fills(0))
    s3.fault("get", before=lambda: s3.put("raw/0.lz4", fills(1, 2), T0 + timedelta(days=2)))
    assert sync().status == "ok"
    assert [call.kind for call in s3.calls] == ["list", "get", "head", "get"]
    assert tids(connection) == [1, 2]
    assert sync().details["skipped"] == 1
    assert_every_call_pays(s3)


def test_an_object_that_is_replaced_all_the_time_fails_and_is_read_later(sync, s3, connection):
    s3.put("raw/0.lz4", fills(0))
    s3.put("raw/1.lz4", fills(100))
    versions = iter(range(1, 99))
    s3.fault("get", "raw/0.lz4", times=None, before=lambda: s3.put("raw/0.lz4", fills(next(versions))))
    assert int(sync().exit_code) == 3
    assert s3.count("get", "raw/0.lz4") == 3
    assert tids(connection) == [100]
    s3.mend()
    assert sync().status == "ok"
    assert tids(connection) == [3, 100]


def test_an_object_that_is_deleted_after_it_was_listed_is_gone_and_no_failure(sync, s3, connection):
    s3.put("raw/0.lz4", fills(0))
    s3.put("raw/1.lz4", fills(1))
    s3.fault("get", "raw/0.lz4", before=lambda: s3.delete("raw/0.lz4"))
    report = sync()
    assert (report.status, int(report.exit_code), report.details["gone"]) == ("ok", 0, 1)
    assert tids(connection) == [1]
    assert set(log_of(connection)) == {"raw/1.lz4"}


def test_one_that_is_replaced_and_then_deleted_is_gone(sync, s3, connection):
    s3.put("raw/0.lz4", fills(0))
    s3.fault("get", before=lambda: s3.put("raw/0.lz4", fills(1)))
    s3.fault("head", before=lambda: s3.delete("raw/0.lz4"))
    assert sync().details["gone"] == 1


def test_an_object_that_may_not_be_read_fails_after_one_request(sync, s3, connection):
    for number in range(3):
        s3.put(f"raw/{number}.lz4", fills(number))
    s3.fault("get", "raw/1.lz4", times=None, instead=refuse(403, "AccessDenied"))
    report = sync()
    assert (int(report.exit_code), s3.count("get", "raw/1.lz4")) == (3, 1)
    assert "AccessDenied" in report.failed[0]
    assert tids(connection) == [0, 2]
    s3.mend()
    assert sync().numbers["inserted"] == 1


def test_the_same_etag_with_another_size_is_another_version(sync, s3, connection):
    s3.put("raw/0.lz4", fills(0))
    sync()
    size = len(fills(0))
    s3.fault("list", times=None, change=swap(f"<Size>{size}<", f"<Size>{size + 1}<"))
    assert int(sync().exit_code) == 4  # it is read again, and is not what was listed
    assert log_of(connection, "state", "size") == {"raw/0.lz4": ("failed", size + 1)}
    s3.mend()
    assert sync().numbers["unchanged"] == 1


def test_over_a_thousand_objects_are_all_listed(sync, s3, settings):
    for number in range(2300):
        s3.put(f"raw/{number:04}.lz4", b"x")
    report = sync(dry_run=True)
    assert (report.details["objects"], s3.count("list")) == (2300, 3)
    assert_every_call_pays(s3)


def test_a_key_that_appears_while_pages_are_listed_is_read_now_or_by_the_next_run(sync, s3, connection):
    s3.page_size = 2
    for number in range(1, 6):
        s3.put(f"raw/{number}.lz4", fills(number))

    def add():
        s3.put("raw/0.lz4", fills(0))
        s3.put("raw/6.lz4", fills(6))

    s3.fault("list", times=1)
    s3.fault("list", before=add)
    assert sync().status == "ok"
    assert tids(connection) == [1, 2, 3, 4, 5, 6]
    assert sync().numbers["inserted"] == 1
    assert tids(connection) == list(range(7))


def test_a_listing_that_repeats_itself_ends(sync, s3, connection):
    s3.page_size = 1
    for number in range(3):
        s3.put(f"raw/{number}.lz4", fills(number))
    pages = []

    def first(answer):
        pages.append(answer)
        return pages[0]

    s3.fault("list", times=None, change=first)
    refused(sync, TemporaryError, code=4)
    assert s3.count("list") == 2
    assert last_run(connection) == ("failed", 4)
    assert tids(connection) == []


def test_a_listing_without_end_ends(sync, s3, monkeypatch):
    monkeypatch.setattr(s3_module, "MAX_PAGES", 20)
    s3.put("raw/0.lz4", fills(0))
    turn = iter(range(10**6))

    def more():
        body = (
            '<?xml version="1.0"?><ListBucketResult><Name>b</Name><KeyCount>0</KeyCount><IsTruncated>true'
            f"</IsTruncated><NextContinuationToken>t{next(turn)}</NextContinuationToken></ListBucketResult>"
        )
        return Answer(200, {"Content-Type": "application/xml"}, body.encode())

    s3.fault("list", times=None, instead=more)
    refused(sync, TemporaryError, "pages", code=4)
    assert s3.count("list") <= 21


@pytest.mark.parametrize("status", [500, 503])
def test_an_outage_ends_the_run_after_ten_objects_and_few_requests(sync, s3, connection, status):
    for number in range(40):
        s3.put(f"raw/{number:02}.lz4", fills(number))
    s3.fault("get", times=None, instead=refuse(status, "SlowDown" if status == 503 else "InternalError"))
    report = sync()
    assert (report.status, int(report.exit_code)) == ("failed", 4)
    assert report.numbers["units_failed"] == 10
    assert report.details["left"] == 30
    assert s3.count("get") <= 3 * (10 + 4)
    s3.mend()
    assert sync().numbers["inserted"] == 40
    assert_numbers_add_up(connection)


def test_one_refusal_is_tried_again(sync, s3, connection):
    s3.put("raw/0.lz4", fills(0))
    s3.fault("list", times=2, instead=refuse(503, "SlowDown"))
    s3.fault("get", times=2, instead=refuse(500))
    assert sync().status == "ok"
    assert (s3.count("list"), s3.count("get")) == (3, 3)
    assert_every_call_pays(s3)


def test_objects_that_always_fail_do_not_keep_the_others_from_being_read(sync, s3, connection):
    for number in range(14):
        s3.put(f"raw/{number:02}.lz4", fills(number))
        if number < 12:
            s3.fault("get", f"raw/{number:02}.lz4", times=None, instead=refuse(403, "InvalidObjectState"))
    sync()
    report = sync()
    assert tids(connection) == [12, 13]
    assert int(report.exit_code) == 3


def test_a_download_that_drips_is_left_when_the_time_is_over(sync, s3, connection):
    release = threading.Event()
    s3.put("raw/0.lz4", fills(0))
    s3.put("raw/1.lz4", fills(1))
    s3.fault("get", "raw/1.lz4", change=lambda answer: replace(answer, held=release))
    try:
        report = sync(deadline=timedelta(seconds=1))
        assert (report.status, report.details["left"]) == ("ok", 1)
        assert report.seconds < 10
        assert tids(connection) == [0]
    finally:
        release.set()
    assert sync().numbers["inserted"] == 1
    assert_numbers_add_up(connection)


# F15: buckets


@pytest.mark.parametrize(
    ("status", "name", "error", "code"),
    [
        (403, "AccessDenied", ConfigError, 5),
        (404, "NoSuchBucket", ConfigError, 5),
        (403, "InvalidAccessKeyId", ConfigError, 5),
        (403, "SignatureDoesNotMatch", ConfigError, 5),
        (400, "ExpiredToken", ConfigError, 5),
        (301, "PermanentRedirect", ConfigError, 5),
        (400, "AuthorizationHeaderMalformed", ConfigError, 5),
        (500, "InternalError", TemporaryError, 4),
        (503, "SlowDown", TemporaryError, 4),
    ],
)
def test_a_bucket_that_cannot_be_listed_ends_the_run(sync, s3, connection, status, name, error, code):
    s3.put("raw/0.lz4", fills(0))
    s3.fault("list", times=None, instead=refuse(status, name))
    told = refused(sync, error, f"s3://{s3.bucket}/raw/", code=code)
    assert name in told
    assert last_run(connection) == ("failed", code)
    assert s3.count("list") <= 3
    assert s3.count("get") == 0
    assert_nothing_left(connection)


def test_a_bucket_that_does_not_exist_is_a_matter_of_configuration(sync, s3, connection):
    refused(sync, ConfigError, "NoSuchBucket", code=5, env={"HL_FILLS_S3_BUCKET": "no-such-bucket-here"})


def test_an_s3_that_is_not_there_is_tried_later(sync, s3, connection):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
        refused(sync, TemporaryError, code=4, env={"AWS_ENDPOINT_URL_S3": f"http://127.0.0.1:{port}"})
    refused(sync, TemporaryError, code=4, env={"AWS_ENDPOINT_URL_S3": "http://nowhere.invalid"})
    assert last_run(connection) == ("failed", 4)


def test_no_credentials_and_a_profile_that_is_none_are_matters_of_configuration(
    sync, s3, monkeypatch, connection
):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    refused(sync, ConfigError, "AWS_ACCESS_KEY_ID", code=5)
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    refused(sync, ConfigError, "nobody", code=5)
    assert s3.count() == 0
    assert last_run(connection) == ("failed", 5)


# F1, F2: runs that end in the midst


def test_killed_runs_leave_whole_objects_or_nothing_and_the_next_one_finishes(
    start, sync, s3, connection, rng, tmp_path
):
    """Done when: run twice, killed at random in between, the tables equal one clean run's."""
    fill_bucket(s3, objects=50, page_size=25)
    kill_often(start, sync, s3, connection, rng, tmp_path, kills=4)


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_thirty_killed_runs_over_two_thousand_objects(start, sync, s3, connection, rng, tmp_path):
    fill_bucket(s3, objects=2000, page_size=None)
    kill_often(start, sync, s3, connection, rng, tmp_path, kills=30)
    assert s3.count("list") >= 2 * 30


def fill_bucket(s3, *, objects, page_size):
    """Objects of both kinds, each with rows of its own and, of fills, one of the object before it."""
    s3.page_size = page_size
    for number in range(objects):
        s3.put(f"fills/{number:04}.lz4", fills(*range(10 * number - (number > 0), 10 * number + 10)))
        s3.put(f"twaps/{number:04}.lz4", twaps(2 * number, 2 * number + 1))


def spread(s3):
    return {"AWS_S3_PREFIX": "twaps/", "HL_FILLS_S3_PREFIX": "fills/"}


def comparable(connection):
    """The state, but for which of two objects that share a row was the first to insert it."""
    found = state(connection)
    for row in found["log"]:
        del row["rows_ingested"], row["rows_inserted"]
    return found


def kill_often(start, sync, s3, connection, rng, tmp_path, kills):
    """Kill run after run at a random request or a random time; on the way one object fails and one is replaced."""
    env = spread(s3)
    broken, replaced = sorted(rng.sample(range(s3.count_keys("fills/")), 2))
    broken, replaced = f"fills/{broken:04}.lz4", f"fills/{replaced:04}.lz4"
    final = fills(*range(10**6, 10**6 + 7))
    old = s3.get(replaced)
    s3.put(replaced, final)
    for what in ("fills", "twaps"):
        assert sync(what, env=env).status == "ok"
    undisturbed = comparable(connection)
    connection.execute("truncate fills, twap_status, rejected_rows, etl_s3_ingest_log, ingestion_runs")
    s3.put(replaced, old)
    s3.fault("get", broken, times=None, change=cut())
    done = requests = 0
    while done < kills:
        before, process = s3.count(), start(rng.choice(["fills", "twap"]), **env)
        if rng.random() < 0.7:
            goal = before + rng.randrange(1, s3.count_keys("fills/") // 8 + 5)
            until(lambda p=process, goal=goal: s3.count() >= goal or p.poll() is not None, "a request", 120)
            time.sleep(rng.uniform(0, 0.1))
        else:
            time.sleep(rng.uniform(0.5, 4))
        process.kill()
        process.communicate()
        done += process.returncode == -signal.SIGKILL
        requests += s3.count() - before
        alone(connection)
        assert_whole_objects(connection)
        assert os.listdir(tmp_path / "tmp") == []
        if process.returncode != -signal.SIGKILL:
            connection.execute("truncate fills, twap_status, rejected_rows, etl_s3_ingest_log")
        if done == kills // 2:
            # A version that no clean run has ever seen.
            s3.put(replaced, fills(*range(2 * 10**6, 2 * 10**6 + 3)))
    stored = connection.execute(
        "select count(*) filter (where state = 'ok') from etl_s3_ingest_log"
    ).fetchone()
    print(f"{done} kills, {requests} requests, {stored[0]} objects done by killed runs")
    sync("fills", env=env)
    s3.mend()
    s3.put(replaced, final)
    # What was replaced may have to be read once more, for the rows it shared.
    for what in ("fills", "fills", "twaps"):
        assert sync(what, env=env).status == "ok"
    assert comparable(connection) == undisturbed
    assert sync("fills", env=env).numbers["served"] == 0
    assert_every_call_pays(s3)
    assert_numbers_add_up(connection)
    assert_nothing_left(connection)


def assert_whole_objects(connection):
    """Each object's rows and its row in the log are there together, or not at all."""
    for table in ("fills", "twap_status"):
        assert (
            connection.execute(
                f"select object_id, count(*) from {table} group by 1 except"
                # Also of one that is to be read again: the numbers are those of the version whose rows are there.
                " select object_id, rows_inserted from etl_s3_ingest_log where loaded_version is not null"
            ).fetchall()
            == []
        )
    assert_numbers_add_up(connection)


def big(number, rows=100_000):
    """An object that takes a second or more to load."""
    base = int(T0.timestamp() * 1000)
    return packed(
        *(
            {"block_time": "2026-09-24T12:00:00", "block_number": n, "events": [
                ["0x" + "a" * 40, fill(1000 * n + m, time=base + m)] for m in range(1000)
            ]}
            for n in range(number, number + rows // 1000)
        )
    )  # fmt: skip


def test_a_load_that_is_killed_leaves_nothing_of_its_object(start, sync, s3, connection, rng, tmp_path):
    s3.put("raw/0.lz4", big(0, 50_000))
    process = start()
    until(lambda: loading(connection), "a load")
    time.sleep(rng.uniform(0, 0.4))
    process.kill()
    process.communicate()
    alone(connection)
    rows = connection.execute("select count(*) from fills").fetchone()[0]
    assert rows in {0, 50_000}
    assert log_of(connection, "rows_inserted") == ({"raw/0.lz4": rows} if rows else {})
    assert os.listdir(tmp_path / "tmp") == []
    assert sync().status == "ok"
    assert connection.execute("select count(*) from fills").fetchone() == (50_000,)
    assert_nothing_left(connection)


def loading(connection):
    """Sessions of the job that are in the midst of a transaction."""
    return connection.execute(
        "select count(*) from pg_stat_activity where datname = current_database()"
        " and application_name = 'hlcli:fills' and xact_start is not null"
        " and (query like 'copy%' or query like 'create temp%' or query like '%fills%' or query like '%stage%')"
    ).fetchone()[0]


SIGNALS = pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=["SIGTERM", "SIGINT"]
)


def ends_soon(process, number, code, connection):
    process.send_signal(number)
    began = time.monotonic()
    out, err = process.communicate(timeout=40)
    seconds = time.monotonic() - began
    assert (process.returncode, out) == (code, "")
    assert "Traceback" not in err
    assert last_run(connection) == ("interrupted", code)
    assert seconds < 4, seconds


@SIGNALS
def test_a_signal_ends_a_run_whose_download_hangs(start, s3, connection, number, code, tmp_path):
    release = threading.Event()
    s3.put("raw/0.lz4", fills(0))
    s3.put("raw/1.lz4", fills(1))
    s3.fault("get", "raw/1.lz4", change=lambda answer: replace(answer, held=release))
    try:
        process = start()
        until(lambda: s3.count("get", "raw/1.lz4") and tids(connection) == [0], "the download")
        ends_soon(process, number, code, connection)
    finally:
        release.set()
    alone(connection)
    assert_nothing_left(connection)
    assert tids(connection) == [0]
    assert os.listdir(tmp_path / "tmp") == []


def test_a_signal_ends_a_run_whose_listing_hangs(start, s3, connection):
    release = threading.Event()
    s3.put("raw/0.lz4", fills(0))
    s3.fault("list", change=lambda answer: replace(answer, held=release))
    try:
        process = start()
        until(lambda: s3.count("list"), "the listing")
        time.sleep(0.2)
        ends_soon(process, signal.SIGTERM, 143, connection)
    finally:
        release.set()


def test_a_signal_ends_a_run_whose_load_waits_for_a_lock(start, s3, connection, database):
    s3.put("raw/0.lz4", fills(0))
    with psycopg.connect(database) as holder:
        holder.execute("lock table fills_default, fills in share mode")
        process = start()
        until(lambda: waiting(connection), "a load that waits")
        ends_soon(process, signal.SIGTERM, 143, connection)
    alone(connection)
    assert_nothing_left(connection)
    assert tids(connection) == []


def waiting(connection):
    return connection.execute(
        "select count(*) from pg_stat_activity where datname = current_database() and wait_event_type = 'Lock'"
    ).fetchone()[0]


def test_a_signal_ends_a_run_that_loads(start, sync, s3, connection, rng):
    s3.put("raw/0.lz4", big(0))
    process = start()
    until(lambda: loading(connection), "a load")
    time.sleep(rng.uniform(0, 0.3))
    ends_soon(process, signal.SIGINT, 130, connection)
    alone(connection)
    assert_nothing_left(connection)
    assert connection.execute("select count(*) from fills").fetchone() == (0,)
    assert log_of(connection) == {}


# F4: the database


def test_a_loaders_connection_that_is_lost_is_exit_4_and_nothing_of_its_object(start, sync, s3, connection):
    s3.put("raw/0.lz4", big(0, 50_000))
    s3.put("raw/1.lz4", fills(10**7))
    process = start()
    until(lambda: loading(connection), "a load")
    assert connection.execute(
        "select pg_terminate_backend(pid) from pg_stat_activity where datname = current_database()"
        " and application_name = 'hlcli:fills' and xact_start is not null"
    ).fetchall()
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err.count("\n")) == (4, "", 1), err
    alone(connection)
    assert last_run(connection) == ("failed", 4)
    assert "raw/0.lz4" not in log_of(connection)
    assert sync().status == "ok"
    assert connection.execute("select count(*) from fills").fetchone() == (50_001,)
    assert_numbers_add_up(connection)
    assert_nothing_left(connection)


def test_a_run_that_lost_its_lock_and_was_followed_by_another_commits_nothing(start, sync, s3, connection):
    release = threading.Event()
    s3.put("raw/0.lz4", fills(0))
    s3.fault("get", change=lambda answer: replace(answer, held=release))
    try:
        process = start("fills", "--jobs", "1")
        until(lambda: s3.count("get"), "the download")
        assert connection.execute(
            "select pg_terminate_backend(pid) from pg_stat_activity join pg_locks using (pid)"
            " where locktype = 'advisory' and datname = current_database()"
        ).fetchall() == [(True,)]
        until(lambda: not locked(connection), "the lock")
        assert sync().status == "ok"
        s3.put("raw/1.lz4", fills(1))
        before = state(connection)
    finally:
        release.set()
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err.count("\n")) == (4, "", 1), err
    assert "another run has taken over" in err
    assert state(connection) == before
    assert [run["status"] for run in runs(connection, "fills")] == ["abandoned", "ok"]


def locked(connection):
    return connection.execute(
        "select count(*) from pg_locks where locktype = 'advisory'"
        " and database = (select oid from pg_database where datname = current_database())"
    ).fetchone()[0]


def test_objects_that_overlap_in_opposite_order_are_both_read(sync, s3, connection, monkeypatch):
    """Each load holds what the other one wants: the server ends one of them, which begins anew."""
    for key in ("raw/0.lz4", "raw/1.lz4"):
        s3.put(key, fills(0, 1, 2, 3))
    both, turns, read = threading.Barrier(2), iter(range(9)), sync_fills.fills.read

    def in_step(batches, *, user):
        """One forwards, one backwards; when the third row is made the first one was loaded, and is held."""
        frames, turn = list(row_by_row(read(batches, user=user))), next(turns)
        for number, rows in enumerate(frames[::-1] if turn == 1 else frames):
            if number == 2 and turn < 2:
                both.wait(20)
            yield rows

    monkeypatch.setattr(sync_fills.fills, "read", in_step)
    with connection.cursor() as cursor:
        cursor.execute(f"alter database {connection.info.dbname} set deadlock_timeout = '50ms'")
    assert sync().status == "ok"
    assert next(turns) == 3, "no deadlock"
    assert tids(connection) == [0, 1, 2, 3]
    assert_numbers_add_up(connection)


# F19, F21


def test_of_ten_starts_at_once_one_works(start, s3, connection):
    release = threading.Event()
    for number in range(4):
        s3.put(f"raw/{number}.lz4", fills(number))
    s3.fault("get", times=None, change=lambda answer: replace(answer, held=release))
    try:
        processes = [start("fills", *(["--fail-if-locked"] if number % 2 else [])) for number in range(10)]
        until(lambda: sum(process.poll() is not None for process in processes) == 9, "nine skipped runs", 90)
    finally:
        release.set()
    codes = [(process.wait(60), number % 2) for number, process in enumerate(processes)]
    skips = [skipped(connection, process.pid) for process in processes]
    assert sorted(skips) == [False] + [True] * 9
    for (code, strict), skip in zip(codes, skips, strict=True):
        assert code == (6 if strict and skip else 0)
    assert tids(connection) == [0, 1, 2, 3]
    assert s3.count("get") == 4
    alone(connection)
    assert_nothing_left(connection)


@pytest.mark.parametrize("size", [600, 1 << 21], ids=["at the end", "in the midst"])
def test_a_disk_that_is_full_is_exit_4_with_a_clear_line(sync, s3, connection, size):
    """A file may have half as many bytes as the object."""
    s3.put("raw/0.lz4", os.urandom(size))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, before[1]))
    try:
        refused(sync, TemporaryError, "cannot write the download", "File too large", code=4)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert last_run(connection) == ("failed", 4)
    assert log_of(connection) == {}


def test_no_folder_for_temporary_files_is_exit_4_with_a_clear_line(sync, s3, connection, monkeypatch):
    s3.put("raw/0.lz4", fills(0))
    monkeypatch.setattr(tempfile, "tempdir", "/nonexistent")  # what TMPDIR, /tmp and the like come to
    refused(sync, TemporaryError, "cannot write the download", "/nonexistent", code=4)
    assert last_run(connection) == ("failed", 4)
