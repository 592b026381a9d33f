"""`hlcli fills coverage`: ranges from S3 and from the API against a plain model of hours, and whatever odd rows there are."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from functools import partial

import pytest

from hlcli.jobs.backfill import LAUNCH
from hlcli.jobs.fills_coverage import InState, Range, Stored, read_coverage

NODE, OTHER = "node-data", "other-data"
DAY = datetime(2025, 9, 14, tzinfo=UTC)
ALL = tuple(f"0x{number:040x}" for number in range(10, 30))
A, B, C, D, E = ALL[:5]


def node_key(hour, *, prefix="node_fills_by_block/hourly/", pad=False, suffix=".lz4"):
    return f"{prefix}{hour:%Y%m%d}/{f'{hour:%H}' if pad else hour.hour}{suffix}"


def folder_key(hour, *, prefix="raw/node_fills/hourly/", name="part-0.parquet"):
    return f"{prefix}{hour:%Y/%m/%d/%H}/{name}"


def logged(connection, *keys, state="ok", bucket=NODE, table="fills", rows=10, rejected=0):
    """Objects in the log; all were loaded once, whatever became of them since."""
    error = "why" if state in {"failed", "quarantined"} else None
    with connection.cursor() as cursor:
        cursor.executemany(
            "insert into etl_s3_ingest_log (table_name, bucket, s3_object_key, etag, size, last_modified, state,"
            " error_text, rows_read, rows_ingested, rows_rejected, loaded_version, run_id)"
            " values (%s, %s, %s, 'e', 1, now(), %s, %s, %s, %s, %s, 'e-1', gen_random_uuid())",
            [(table, bucket, key, state, error, rows + rejected, rows, rejected) for key in keys],
        )


def progress(connection, user, state="pending", *, wanted=(LAUNCH, DAY), **columns):
    """A wallet of the backfill; ranges as PostgreSQL writes them."""
    values = {
        "user_address": user,
        "state": state,
        "wanted_from": wanted[0],
        "wanted_to": wanted[1],
        **columns,
    }
    if state == "failed":
        values.setdefault("error", "why")
    names = ", ".join(values)
    if state == "running":
        names += ", lease_owner, lease_token, lease_expires_at"
    leased = ", gen_random_uuid(), gen_random_uuid(), now()" if state == "running" else ""
    connection.execute(
        f"insert into backfill_progress ({names}) values ({', '.join(['%s'] * len(values))}{leased})",
        list(values.values()),
    )


def stored(connection, user, source, *times):
    for tid, time in enumerate(times):
        connection.execute(
            "insert into fills (user_address, coin, tid, oid, side, time, px, sz, source)"
            " values (%s, 'BTC', %s, 1, 'A', %s, 1, 1, %s)",
            (user, tid + (source == "s3") * 1000, time, source),
        )


@pytest.fixture
def read(settings):
    def ask(*users, **options):
        with read_coverage(settings(), users=users, **options) as found:
            return found.s3, found.states, list(found.wallets)

    return ask


@pytest.fixture
def hours_of(read):
    """The hours of 2025-09-14 that S3 covers; more than a day is counted on."""

    def ask():
        return [hour for each in read()[0].ranges for hour in range(*map(hour_of, each))]

    return ask


def hour_of(text):
    return (datetime.fromisoformat(text) - DAY) // timedelta(hours=1)


def day_hours(*hours):
    return [DAY + timedelta(hours=hour) for hour in hours]


def test_empty_tables_cover_nothing_and_claim_nothing(read):
    s3, states, wallets = read()
    assert (s3.ranges, s3.gaps, s3.objects, s3.files, states, wallets) == ([], [], 0, 0, {}, [])
    (only,) = read(A)[2]
    assert (only.state, only.known, only.stored, only.api) == (None, False, [], [])
    # Nothing is in S3, so everything until now is wanted.
    assert only.missing == only.wanted
    ((start, end),) = only.missing
    assert start == "2023-11-01T00:00:00Z"
    assert abs(datetime.fromisoformat(end) - datetime.now(UTC)) < timedelta(minutes=5)


def test_an_hour_needs_the_next_object(connection, hours_of):
    logged(connection, *map(node_key, day_hours(8)))
    assert hours_of() == []
    logged(connection, *map(node_key, day_hours(9, 10, 12, 14, 15)))
    assert hours_of() == [8, 9, 14]


def test_ranges_and_gaps_are_told_over_midnight(connection, read):
    logged(connection, *map(node_key, day_hours(22, 23, 24, 25, 26, 30, 31)))
    s3 = read()[0]
    assert s3.ranges == [
        Range("2025-09-14T22:00:00Z", "2025-09-15T02:00:00Z"),
        Range("2025-09-15T06:00:00Z", "2025-09-15T07:00:00Z"),
    ]
    assert s3.gaps == [Range("2025-09-15T02:00:00Z", "2025-09-15T06:00:00Z")]


def test_an_object_that_is_not_there_in_its_present_version_breaks_two_hours(connection, hours_of):
    """Its own hour and the end of the one before, though its older version is in the table."""
    for state in ("pending", "failed", "quarantined"):
        for key in (node_key, folder_key):
            connection.execute("truncate etl_s3_ingest_log")
            logged(connection, *map(key, day_hours(1, 2, 4, 5)))
            logged(connection, *map(key, day_hours(3)), state=state)
            assert hours_of() == [1, 4], (state, key)


def test_a_folder_of_an_hour_is_there_when_all_of_it_is(connection, hours_of):
    for name in ("a.parquet", "b.parquet"):
        logged(connection, *(folder_key(hour, name=name) for hour in day_hours(1, 2, 3)))
    assert hours_of() == [1, 2]
    logged(connection, folder_key(day_hours(2)[0], name="c.parquet"), state="failed")
    assert hours_of() == []


def test_both_shapes_of_keys_tell_the_hour_below_any_prefix(connection, hours_of):
    shapes = (
        node_key,
        partial(node_key, pad=True),
        partial(node_key, suffix=".jsonl.gz"),
        partial(folder_key, name="x y.snappy.parquet"),
    )
    for prefix in ("", "a/", "raw/20240101/5.lz4/", "a b/%s/ünï/"):
        for make in shapes:
            connection.execute("truncate etl_s3_ingest_log")
            logged(connection, *(make(hour, prefix=prefix) for hour in day_hours(7, 8, 9)))
            assert hours_of() == [7, 8], (prefix, make)


NO_HOURS = [
    "8.lz4",
    "20250914/24.lz4",
    "20250914/008.lz4",
    "20250914/8",
    "20250914/.lz4",
    "20250914/part-8.lz4",
    "20250914/8/x.lz4",
    "20250914/-1.lz4",
    "20250914/٨.lz4",
    "20251301/8.lz4",
    "20250001/8.lz4",
    "20250229/8.lz4",
    "20250732/8.lz4",
    "20250700/8.lz4",
    "120250914/8.lz4",
    "2025-09-14/8.lz4",
    "99999999/99.lz4",
    "2025/09/14/08/",
    "2025/09/14/8/x.parquet",
    "2025/09/14/x.parquet",
    "2025/09/14/08.parquet",
    "2025/09/14/08/y/x.parquet",
    "2025/02/30/08/x.parquet",
    "2025/09/14/24/x.parquet",
    "",
    "x" * 1024,
]


def test_keys_without_an_hour_are_counted_and_claim_nothing(connection, read):
    logged(connection, *NO_HOURS, rows=7)
    s3 = read()[0]
    assert (s3.ranges, s3.objects, s3.objects_without_hour) == ([], len(NO_HOURS), len(NO_HOURS))
    assert s3.rows_ingested == 7 * len(NO_HOURS)


def test_each_published_series_is_cut_into_hours_by_itself(connection, hours_of):
    """The last object of one is not followed by the first of another: what arrived late is in neither."""
    old, new = (lambda hour, name=name: node_key(hour, prefix=f"{name}/hourly/") for name in ("old", "new"))
    logged(connection, *map(old, day_hours(6, 7)), *map(new, day_hours(8, 9)))
    assert hours_of() == [6, 8]
    logged(connection, *map(folder_key, day_hours(7)), bucket=OTHER)
    logged(connection, *map(folder_key, day_hours(8)), bucket=NODE)
    logged(connection, *map(folder_key, day_hours(10, 11)), bucket=OTHER)
    assert hours_of() == [6, 8, 10]
    # Both shapes below one prefix are two series, too.
    logged(connection, *(node_key(hour, prefix="z/") for hour in day_hours(15)), bucket=OTHER)
    logged(connection, *(folder_key(hour, prefix="z/") for hour in day_hours(16)), bucket=OTHER)
    assert hours_of() == [6, 8, 10]
    # What failed in one of them is whole in another.
    logged(connection, *map(old, day_hours(8, 9)), state="failed")
    assert hours_of() == [6, 8, 10]


def test_hours_amid_which_files_began_are_not_covered(connection, read):
    began = datetime(2025, 5, 25, 14, tzinfo=UTC), datetime(2025, 7, 27, 8, tzinfo=UTC)
    logged(connection, *(node_key(first + timedelta(hours=more)) for first in began for more in range(4)))
    assert read()[0].ranges == [
        Range("2025-05-25T15:00:00Z", "2025-05-25T17:00:00Z"),
        Range("2025-07-27T09:00:00Z", "2025-07-27T11:00:00Z"),
    ]


def test_only_objects_of_fills_count_and_local_files_claim_nothing(connection, read):
    logged(connection, *map(node_key, day_hours(1, 2)), table="twap_status")
    logged(connection, *(f"/data/{node_key(hour)}" for hour in day_hours(1, 2)), bucket="file:", rows=33)
    s3 = read()[0]
    assert (s3.ranges, s3.objects, s3.objects_without_hour, s3.rows_ingested) == ([], 0, 0, 0)
    assert (s3.files, s3.rows_of_files) == (2, 66)


def test_rows_and_rejected_rows_of_objects_are_summed(connection, read):
    logged(connection, *map(node_key, day_hours(1, 2)), rows=2**62, rejected=2)
    logged(connection, *map(node_key, day_hours(3)), state="failed")
    s3 = read()[0]
    assert (s3.objects, s3.objects_ok) == (3, 2)
    assert (s3.rows_ingested, s3.rows_rejected) == (2**63 + 10, 4)


def test_what_is_cut_off_is_missing_unless_s3_has_it(connection, read):
    cut = "{[2025-09-14 00:00+00, 2025-09-14 06:00+00)}"
    rest = "{[2025-09-14 06:00+00, 2025-09-14 08:00+00)}"
    progress(
        connection,
        A,
        "truncated",
        wanted=(DAY, DAY + timedelta(hours=8)),
        covered=rest,
        cut_off=cut,
        fills_count=5,
    )
    (before,) = read()[2]
    assert before.missing == before.cut_off == [Range("2025-09-14T00:00:00Z", "2025-09-14T06:00:00Z")]
    assert before.api == [Range("2025-09-14T06:00:00Z", "2025-09-14T08:00:00Z")]
    logged(connection, *map(node_key, day_hours(2, 3, 4)))
    (after,) = read()[2]
    assert after.missing == [
        Range("2025-09-14T00:00:00Z", "2025-09-14T02:00:00Z"),
        Range("2025-09-14T04:00:00Z", "2025-09-14T06:00:00Z"),
    ]
    assert read()[1] == {"truncated": InState(1, 5, 1, 1)}
    logged(connection, *map(node_key, day_hours(-1, 0, 1, 5, 6)))
    assert read()[2][0].missing == []
    assert read()[2][0].cut_off == before.cut_off
    assert read()[1] == {"truncated": InState(1, 5, 1, 0)}


def test_a_wallet_that_was_never_asked_for_is_wanted_until_s3_ends(connection, read):
    logged(connection, *map(node_key, day_hours(8, 9, 10)))
    stored(connection, A, "s3", DAY + timedelta(hours=8))
    found = {each.user_address: each for each in read(A, B)[2]}
    for each in found.values():
        assert each.wanted == [Range("2023-11-01T00:00:00Z", "2025-09-14T10:00:00Z")]
        assert each.missing == [Range("2023-11-01T00:00:00Z", "2025-09-14T08:00:00Z")]
        assert each.state is None
    assert (found[A].known, found[B].known) == (True, False)
    assert read()[2] == []  # it is not one of the backfill's


def test_objects_older_than_the_exchange_leave_nothing_wanted(connection, read):
    old = datetime(2023, 4, 15, tzinfo=UTC)
    logged(connection, node_key(old), node_key(old + timedelta(hours=1)))
    (only,) = read(A)[2]
    assert (only.wanted, only.missing) == ([], [])


def test_rows_of_named_wallets_are_counted_by_source(connection, read):
    progress(connection, A, "complete", fills_count=2)
    early, late = DAY - timedelta(days=400), DAY + timedelta(milliseconds=1)
    stored(connection, A, "api", late, early)
    stored(connection, A, "s3", DAY, DAY, DAY)
    stored(connection, B, "api", DAY)
    (first, second, third) = read(C, A, B, A)[2]
    assert [first.user_address, second.user_address, third.user_address] == [C, A, B]
    assert first.stored == []
    assert second.stored == [
        Stored("api", 2, "2024-08-10T00:00:00Z", "2025-09-14T00:00:00.001Z"),
        Stored("s3", 3, "2025-09-14T00:00:00Z", "2025-09-14T00:00:00Z"),
    ]
    assert (second.state, second.fills_count) == ("complete", 2)
    assert third.stored == [Stored("api", 1, "2025-09-14T00:00:00Z", "2025-09-14T00:00:00Z")]
    assert read()[2][0].stored is None


def test_what_misses_something_comes_first(connection, read):
    whole, half = (
        f"{{[2023-11-01 00:00+00, {end})}}" for end in ("2025-09-14 00:00+00", "2024-05-01 00:00+00")
    )
    rest = "{[2024-05-01 00:00+00, 2025-09-14 00:00+00)}"
    progress(connection, ALL[0], "complete", covered=whole)
    progress(connection, ALL[1], "truncated", covered=whole, cut_off=half)
    progress(connection, ALL[2], "running", covered=half)
    progress(connection, ALL[3], "truncated", covered=rest, cut_off=half)
    progress(connection, ALL[4], "failed", covered=whole)
    progress(connection, ALL[5], "complete", covered=whole)
    progress(connection, ALL[6], "pending")
    order = [4, 3, 2, 6, 1, 0, 5]
    assert [each.user_address for each in read()[2]] == [ALL[number] for number in order]
    assert [each.user_address for each in read(limit=3)[2]] == [ALL[number] for number in order[:3]]
    assert [each.user_address for each in read(state="truncated")[2]] == [ALL[3], ALL[1]]
    assert [each.user_address for each in read(state="truncated", limit=1)[2]] == [ALL[3]]
    assert [each.user_address for each in read(ALL[0], ALL[2], ALL[9], state="running")[2]] == [ALL[2]]
    assert read(state="truncated")[1] == read()[1]
    assert read()[1]["complete"] == InState(2, 0, 0, 0)


def test_slices_error_and_numbers_are_told_as_stored(connection, read):
    progress(
        connection,
        A,
        "failed",
        slices_covered="{[2026-11-08 12:00:01+00, 2026-11-21 00:00+00)}",
        error="a \x1b[31mred\ttext\nof two lines",
        pages=3,
        attempts=7,
        oldest_fill_time=1,
        completed_at=DAY,
    )
    (only,) = read()[2]
    assert only.slices == [Range("2026-11-08T12:00:01Z", "2026-11-21T00:00:00Z")]
    assert (only.pages, only.attempts, only.oldest_fill_time) == (3, 7, 1)
    assert only.completed_at == "2025-09-14T00:00:00Z"
    assert only.error == "a \x1b[31mred\ttext\nof two lines"


ODD = {
    "(,)": [Range(None, None)],
    "[-infinity, infinity]": [Range(None, None)],
    "(, 0044-03-15 00:00+00 BC]": [Range(None, "0044-03-15T00:00:00Z BC")],
    "[294276-12-31 23:59:59.999999+00,)": [Range("294276-12-31T23:59:59.999999Z", None)],
    "[2025-09-14 01:00:00.001+00, 2025-09-14 01:00:00.001+00]": [
        Range("2025-09-14T01:00:00.001Z", "2025-09-14T01:00:00.001Z")
    ],
    "empty": [],
    "(2025-09-14 02:30+02, 2025-09-14 12:00+05:30)": [Range("2025-09-14T00:30:00Z", "2025-09-14T06:30:00Z")],
}


# As far as times go.
FIRST, LAST = "4714-11-24 00:00+00 BC", "294276-12-31 00:00+00"


def test_odd_ranges_are_told_and_break_nothing(connection, read):
    logged(connection, *map(node_key, day_hours(1, 2)))
    for text, told in ODD.items():
        connection.execute("truncate backfill_progress")
        held = f"{{{text}}}" if text != "empty" else "{}"
        most = 2**63 - 1
        progress(connection, A, covered=held, cut_off=held, slices_covered=held, fills_count=most)
        progress(connection, B, "truncated", covered=held, wanted=(FIRST, LAST), fills_count=most)
        by_name = read(A, B)[2]
        _, states, listed = read()
        for first, second in zip(by_name, sorted(listed, key=lambda each: each.user_address), strict=True):
            assert first.api == second.api == told, text
            assert first.missing == second.missing
        assert by_name[0].cut_off == by_name[0].slices == told
        assert by_name[1].wanted == [Range("4714-11-24T00:00:00Z BC", "294276-12-31T00:00:00Z")]
        if told == [Range(None, None)]:
            assert by_name[0].missing == by_name[1].missing == []
        elif not told:
            assert by_name[1].missing == [
                Range("4714-11-24T00:00:00Z BC", "2025-09-14T01:00:00Z"),
                Range("2025-09-14T02:00:00Z", "294276-12-31T00:00:00Z"),
            ]
        assert sum(each.fills for each in states.values()) == 2 * most


def test_many_wallets_are_streamed_and_may_be_left_alone(connection, settings):
    connection.execute(
        "insert into backfill_progress (user_address, wanted_from, wanted_to, covered)"
        " select '0x' || lpad(to_hex(i), 40, '0'), '2023-11-01', '2025-09-14', tstzmultirange(tstzrange("
        " '2023-11-01', '2025-09-14')) from generate_series(1, 12000) i"
    )
    with read_coverage(settings()) as found:
        # What changes meanwhile is not seen: all is of one moment.
        assert next(found.wallets).user_address == f"0x{1:040x}"
        connection.execute("update backfill_progress set state = 'complete', covered = '{}'")
        rest = list(found.wallets)
    assert [int(each.user_address, 16) for each in rest] == list(range(2, 12001))
    assert all(each.state == "pending" and not each.missing for each in rest)
    with read_coverage(settings()) as found:
        assert next(found.wallets).missing
    assert connection.execute(
        "select count(*) from pg_stat_activity where application_name = 'hlcli:coverage'"
        " and state like 'idle in%' and datname = current_database()"
    ).fetchone() == (0,)


# --- against a plain model --------------------------------------------------------------------------------------

QUARTERS = 4 * 60  # of an hour, since DAY
STATES = ["ok"] * 12 + ["pending", "failed", "quarantined"]


def merged(points):
    """Runs of quarters of an hour as ranges."""
    edges = sorted({*(points - {each + 1 for each in points}), *({each + 1 for each in points} - points)})
    told = [f"{DAY + timedelta(minutes=15 * each):%Y-%m-%dT%H:%M:%SZ}" for each in edges]
    return [Range(*pair) for pair in zip(told[::2], told[1::2], strict=True)]


def as_text(points):
    return "{" + ",".join(f"[{start},{end})" for start, end in merged(points)) + "}"


def runs_of(rng, most):
    points = set()
    for _ in range(rng.randrange(most + 1)):
        start = rng.randrange(QUARTERS)
        points |= set(range(start, min(QUARTERS, start + rng.choice([1, 3, 4, 16, 100]))))
    return points


def test_every_range_is_that_of_a_plain_model(connection, read, rng):
    for _ in range(4):
        connection.execute("truncate etl_s3_ingest_log; truncate backfill_progress")
        compare_with_a_model(connection, read, rng)


def compare_with_a_model(connection, read, rng):
    there = {}  # (series, hour) -> whether all of its objects are ok
    for number, series in enumerate(["a/", "b/", ""]):
        for hour in range(60):
            at = DAY + timedelta(hours=hour)
            keys = {
                0: [node_key(at, prefix=series, pad=rng.random() < 0.5)],
                1: [
                    folder_key(at, prefix=series, name=f"{part}.parquet")
                    for part in range(rng.randrange(1, 4))
                ],
                2: [node_key(at, prefix=series), node_key(at, prefix=series, suffix=".json")],
            }[number]
            for key in keys:
                if rng.random() < 0.15:
                    continue
                state = rng.choice(STATES)
                logged(connection, key, state=state, bucket=f"bucket-{number}")
                there[number, hour] = there.get((number, hour), True) and state == "ok"
    hours = {hour for (series, hour), ok in there.items() if ok and there.get((series, hour + 1))}
    s3 = {4 * hour + quarter for hour in hours for quarter in range(4)}
    users = rng.sample(ALL, 12)
    expected = {}
    for user in users:
        start = rng.randrange(QUARTERS)
        wanted = set(range(start, rng.randrange(start + 1, QUARTERS + 1)))
        covered, cut = runs_of(rng, 4) & wanted, runs_of(rng, 2) & wanted
        cut -= covered
        slices = runs_of(rng, 1)
        state = rng.choice(["pending", "running", "complete", "truncated", "failed"])
        moments = [DAY + timedelta(minutes=15 * each) for each in (min(wanted), max(wanted) + 1)]
        progress(
            connection,
            user,
            state,
            wanted=moments,
            covered=as_text(covered),
            cut_off=as_text(cut),
            slices_covered=as_text(slices),
        )
        missing = wanted - covered - s3
        rank = 0 if state == "failed" else (1 if cut else 2) if missing else 3 if cut else 4
        told = [merged(each) for each in (wanted, covered, cut, slices, missing)]
        expected[user] = ((rank, user), state, *told)
    found_s3, states, wallets = read()
    assert found_s3.ranges == merged(s3)
    assert found_s3.gaps == (merged(set(range(min(s3), max(s3))) - s3) if s3 else [])
    told = [
        (each.user_address, each.state, each.wanted, each.api, each.cut_off, each.slices, each.missing)
        for each in wallets
    ]
    assert told == [
        (user, *values) for (_, user), *values in sorted(expected.values(), key=lambda each: each[0])
    ]
    for state, counts in states.items():
        mine = [each for each in expected.values() if each[1] == state]
        assert counts[:1] + counts[2:] == (
            len(mine),
            sum(bool(each[4]) for each in mine),
            sum(bool(each[6]) for each in mine),
        )
    assert sum(each.wallets for each in states.values()) == len(users)
    # Named, a wallet is told the same.
    named = {each.user_address: each for each in read(*users)[2]}
    assert list(named) == users
    assert all(named[each.user_address].missing == each.missing for each in wallets)
