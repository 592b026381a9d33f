"""The queue of the backfill on the real database: shards, what is wanted, leases, ranges, the source's limit."""

from __future__ import annotations

import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from itertools import cycle
from types import SimpleNamespace
from uuid import uuid4

import psycopg
import pytest
from backfill_tables import progress, states
from psycopg import errors
from waiting import until
from wallet_tables import MEMBERS, watch

from hlcli.exitcodes import UsageError
from hlcli.jobs import backfill_queue, maintain
from hlcli.jobs.backfill_queue import (
    ENLIST_LOCK,
    MOST_ATTEMPTS,
    Queue,
    Shard,
    Window,
    decide,
    fail,
    finish,
    keep_page,
)
from hlcli.jobs.backfill_store import Fetched
from hlcli.migrations import LOCK_NAMESPACE
from hlcli.sources.user_fills import FILLS, SLICES

START, END = datetime(2024, 1, 1, tzinfo=UTC), datetime(2024, 7, 1, tzinfo=UTC)
WINDOW = Window(START, END)
START_MS, END_MS = (round(each.timestamp() * 1000) for each in WINDOW)
DAY = timedelta(days=1)
DAY_MS = 86_400_000
A, B, C, D, E = (f"0x{number:040x}" for number in range(10, 15))


@pytest.fixture
def worker(database):
    """Make a worker's queue, on a connection of its own."""
    with ExitStack() as opened:

        def make(number=0, workers=1, *, own=False, users=None, lease=timedelta(minutes=2)):
            connection = opened.enter_context(
                psycopg.connect(database, autocommit=True, options="-c TimeZone=UTC")
            )
            return Queue(connection, uuid4(), Shard(number, workers, own), lease, users)

        yield make


@pytest.fixture
def walk(connection):
    """Do all that is left of a lease in one page of each kind; returns the state of the wallet then."""

    def do(lease, **more):
        for kind, ranges in ((FILLS, lease.fills), (SLICES, lease.slices)):
            for span in ranges:
                assert keep_page(connection, page(lease, span, kind=kind, **more), lasts=DAY)
        return finish(connection, lease)

    return do


def page(lease, covered, *, cut_off=None, kind=FILLS, doubtful=None, fills=0, weight=20):
    """A page without any rows, which the queue does not look at; times in milliseconds."""
    return Fetched(lease, kind, covered, cut_off, doubtful, fills, weight, None, [])


def addresses(rng, number):
    return [f"0x{rng.getrandbits(160):040x}" for _ in range(number)]


def enlist(connection, users, state="pending", **columns):
    """Put wallets into the queue by hand, in this order."""
    values = {"state": state, "wanted_from": START, "wanted_to": END, **columns}
    if state == "failed":
        values.setdefault("error", "why")
    with connection.cursor() as cursor:
        cursor.executemany(
            f"insert into backfill_progress (user_address, {', '.join(values)})"
            f" values (%s{', %s' * len(values)})",
            [(user, *values.values()) for user in users],
        )


def expire(connection, *users):
    """Let a lease end now."""
    connection.execute(
        "update backfill_progress set lease_expires_at = clock_timestamp() - interval '1 microsecond'"
        " where state = 'running' and user_address = any(%s)",
        (list(users),),
    )


def spans(multirange):
    """A multirange as milliseconds."""
    return [
        (round(each.lower.timestamp() * 1000), round(each.upper.timestamp() * 1000)) for each in multirange
    ]


def users_of(leases):
    return [lease.user for lease in leases]


def add_fills(connection, user, times, source="s3"):
    connection.execute(
        "insert into fills (user_address, coin, tid, oid, side, time, px, sz, source)"
        " select %s, 'BTC', n, 1, 'A', t, 1, 1, %s from unnest(%s::timestamptz[]) with ordinality as _ (t, n)",
        (user, source, list(times)),
    )


# --- shards -------------------------------------------------------------------------------------------------------


def test_every_wallet_is_in_exactly_one_shard_of_any_number(connection, rng):
    users = addresses(rng, 4_000)
    hashes = dict(
        connection.execute("select u, hashtextextended(u, 0) from unnest(%s::text[]) u", (users,)).fetchall()
    )
    # Of a negative hash the remainder is negative, of the most negative one abs() fails.
    assert min(hashes.values()) < -(2**63) * 0.99
    assert max(hashes.values()) > 2**63 * 0.99
    for user, workers, shard in connection.execute(
        "select u, m, backfill_shard(u, m) from unnest(%s::text[]) u, generate_series(1, 60, %s) m",
        (users, rng.randrange(1, 8)),
    ):
        assert shard == (hashes[user] & (2**63 - 1)) % workers
    sizes = connection.execute(
        "select m, array_agg(n order by s), array_agg(s order by s), sum(n) from (select m, backfill_shard(u, m) s,"
        " count(*) n from unnest(%s::text[]) u, generate_series(1, 60) m group by 1, 2) x group by 1",
        (users,),
    ).fetchall()
    assert len(sizes) == 60
    for workers, counts, shards, total in sizes:
        assert shards == list(range(workers))
        assert total == len(users)
        assert max(counts) < 2 * len(users) / workers + 20, workers


def test_the_most_negative_hash_has_a_shard(connection):
    """No address is known to have it, so the function is taken apart."""
    (body,) = connection.execute(
        "select pg_get_function_sqlbody('backfill_shard(text, integer)'::regprocedure)"
    ).fetchone()
    assert "hashtextextended(user_address, (0)::bigint)" in body
    formula = body.removeprefix("RETURN ").replace("hashtextextended(user_address, (0)::bigint)", "h")
    formula = formula.replace("workers", "m")
    found = connection.execute(
        f"select m, {formula} from generate_series(1, 60) m, (values ((-9223372036854775807 - 1)::bigint)) _ (h)"
    ).fetchall()
    assert found == [(workers, 0) for workers in range(1, 61)]


def test_shards_together_are_all_wallets_and_each_is_claimed_by_its_own(connection, worker, rng):
    users = addresses(rng, 150)
    workers = rng.randrange(2, 9)
    enlist(connection, users)
    claimed = [users_of(worker(number, workers, own=True).claim(1000)) for number in range(workers)]
    assert Counter(user for shard in claimed for user in shard) == Counter(users)
    for number, shard in enumerate(claimed):
        assert connection.execute(
            "select count(*) from unnest(%s::text[]) u where backfill_shard(u, %s) <> %s",
            (shard, workers, number),
        ).fetchone() == (0,)


# --- what is wanted -----------------------------------------------------------------------------------------------


def test_all_wallets_are_those_of_fills_and_of_the_universe_past_and_present(connection, worker):
    maintain.cover(connection, "fills", [START, START + DAY])
    for user, *times in (
        (A, START, START + DAY),
        (B, START + DAY),
        (C, END),  # in the default partition
    ):
        add_fills(connection, user, times)
    parts = connection.execute(
        "select user_address, array_agg(tableoid::regclass::text order by time) from fills group by 1 order by 1"
    ).fetchall()
    assert [len(set(of)) for _, of in parts] == [2, 1, 1]
    assert parts[2][1] == ["fills_default"]
    watch(connection, [D])
    connection.execute(
        f"insert into wallet_universe_runs (as_of_ts, status, n_requested, duration_ms, ledger_run_id)"
        " values (now(), 'success', 1, 1, gen_random_uuid());"
        f"insert into {MEMBERS} (run_id, wallet_id, rank, month_pnl, as_of_ts)"
        f" select run_id, '{E}', 1, 1, now() from wallet_universe_runs"
    )
    queue = worker()
    queue.want(WINDOW)
    found = progress(connection)
    assert sorted(found) == [A, B, C, D, E]
    for row in found.values():
        assert (row["state"], row["wanted_from"], row["wanted_to"]) == ("pending", START, END)
        assert (row["attempts"], row["pages"], row["started_at"]) == (0, 0, None)
    assert queue.left() == (5, 5)


def test_a_list_is_wanted_and_claimed_alone(connection, worker):
    add_fills(connection, A, [START])
    enlist(connection, [E], wanted_to=START + DAY)
    queue = worker(users=[C, B, C])
    queue.want(WINDOW)
    assert states(connection) == {B: "pending", C: "pending", E: "pending"}
    assert progress(connection)[E]["wanted_to"] == START + DAY
    assert queue.left() == (2, 2)
    assert users_of(queue.claim(10)) == [B, C]
    assert not queue.claim(10)
    assert queue.has_left()


def test_a_wider_window_reopens_only_the_rest_and_a_narrower_one_nothing(connection, worker, walk):
    queue = worker(users=[A])
    queue.want(Window(START + 30 * DAY, END - 30 * DAY))
    (lease,) = queue.claim(1)
    assert lease.fills == [(START_MS + 30 * DAY_MS, END_MS - 30 * DAY_MS)]
    assert lease.slices == []
    assert walk(lease) == "complete"
    first = progress(connection)[A]
    queue.want(Window(START + 30 * DAY, END - 30 * DAY))
    assert progress(connection)[A] == first
    queue.want(Window(START + 60 * DAY, END - 60 * DAY))
    assert (states(connection)[A], queue.claim(1)) == ("complete", [])
    queue.want(WINDOW)
    assert states(connection)[A] == "pending"
    (lease,) = queue.claim(1)
    assert lease.fills == [(START_MS, START_MS + 30 * DAY_MS), (END_MS - 30 * DAY_MS, END_MS)]
    assert walk(lease) == "complete"
    assert spans(progress(connection)[A]["covered"]) == [(START_MS, END_MS)]


def test_what_is_cut_off_is_not_asked_again_and_the_wallet_never_complete(connection, worker):
    queue = worker(users=[A])
    queue.want(WINDOW)
    (lease,) = queue.claim(1)
    cut = START_MS + 10 * DAY_MS
    assert keep_page(connection, page(lease, (cut, END_MS), cut_off=(START_MS, cut)), lasts=DAY)
    assert finish(connection, lease) == "truncated"
    assert not progress(connection)[A]["completed"]
    queue.want(Window(START + 10 * DAY, END))
    assert (states(connection)[A], queue.claim(1)) == ("truncated", [])
    queue.want(Window(START + 9 * DAY, END))
    assert states(connection)[A] == "truncated"
    queue.want(Window(START - DAY, END))
    (lease,) = queue.claim(1)
    assert lease.fills == [(START_MS - DAY_MS, START_MS)]


def test_slices_are_wanted_of_the_last_thirteen_days_alone(connection, worker, walk):
    now = datetime.now(UTC).replace(microsecond=0)
    queue = worker(users=[A])
    queue.want(Window(now - 20 * DAY, now - 13 * DAY - timedelta(seconds=5)))
    (lease,) = queue.claim(1)
    assert lease.slices == []
    assert walk(lease) == "complete"
    queue.want(Window(now - 20 * DAY, now - 2 * DAY))
    (lease,) = queue.claim(1)
    ((begins, ends),) = lease.slices
    assert ends == round((now - 2 * DAY).timestamp() * 1000)
    assert 0 <= begins / 1000 - (now - 13 * DAY).timestamp() < 60
    for span in lease.fills:
        assert keep_page(connection, page(lease, span), lasts=DAY)
    assert finish(connection, lease) == "pending"
    (lease,) = queue.claim(1)
    assert (lease.fills, lease.slices[0][1]) == ([], ends)
    assert walk(lease) == "complete"
    (row,) = progress(connection).values()
    ((first, last),) = spans(row["slices_covered"])
    assert begins <= first < begins + 60_000
    assert last == ends


def test_failed_wallets_rest_as_many_hours_as_they_were_tried(connection, worker):
    for attempts, user in enumerate((A, B, C), 1):
        enlist(connection, [user], "failed", attempts=attempts)
        connection.execute(
            "update backfill_progress set updated_at = clock_timestamp() - interval '119 minutes'"
        )
    watch(connection, [D])
    worker().want(WINDOW)
    assert states(connection) == {A: "pending", B: "failed", C: "failed", D: "pending"}
    worker(users=[C]).want(WINDOW)
    found = progress(connection)
    assert [found[user]["state"] for user in (A, B, C)] == ["pending", "failed", "pending"]
    # One that is named begins anew.
    assert [found[user]["attempts"] for user in (A, B, C)] == [1, 2, 0]
    connection.execute(
        "update backfill_progress set updated_at = updated_at - interval '2 minutes' where user_address = %s",
        (B,),
    )
    worker().want(WINDOW)
    assert states(connection)[B] == "pending"


def test_another_window_leaves_a_lease_to_its_holder_and_the_rest_to_a_later_one(connection, worker, walk):
    watch(connection, [A, B])
    first = worker()
    first.want(Window(START + DAY, END))
    leases = first.claim(2)
    before = progress(connection)
    second = worker()
    second.want(WINDOW)
    for user, row in progress(connection).items():
        assert row["state"] == "running"
        assert row["lease_token"] == before[user]["lease_token"]
        assert row["lease_expires_at"] == before[user]["lease_expires_at"]
        assert row["wanted_from"] == START
    assert second.claim(5) == []
    assert [walk(lease) for lease in leases] == ["pending", "pending"]
    again = second.claim(5)
    assert [lease.fills for lease in again] == [[(START_MS, START_MS + DAY_MS)]] * 2
    assert [walk(lease) for lease in again] == ["complete", "complete"]


def test_only_who_names_a_wallet_takes_back_what_somebody_wants_of_it(connection, worker):
    watch(connection, [A, B, C])
    enlist(connection, [A, B], wanted_from=START - DAY, wanted_to=END - DAY)
    (lease,) = worker(users=[B]).claim(1)
    worker().want(WINDOW)
    found = progress(connection)
    assert [found[user]["wanted_from"] for user in (A, B, C)] == [START - DAY, START - DAY, START]
    assert {row["wanted_to"] for row in found.values()} == {END}
    worker(users=[A]).want(Window(START, START + DAY))
    found = progress(connection)
    assert (found[A]["wanted_from"], found[A]["wanted_to"]) == (START, START + DAY)
    assert (found[B]["wanted_from"], found[B]["lease_token"]) == (START - DAY, lease.token)


def test_a_window_ends_a_minute_ago_by_the_clock_of_the_database(connection, worker):
    queue = worker(users=[A])
    queue.connection.execute(
        "select set_config('hlcli.clock_offset', (timestamptz '2024-03-01' - clock_timestamp())::text, false)"
    )
    queue.want(WINDOW)
    (row,) = progress(connection).values()
    late = (row["wanted_to"] - datetime(2024, 2, 29, 23, 59, tzinfo=UTC)).total_seconds()
    assert 0 <= late < 30
    assert row["wanted_to"].microsecond % 1000 == 0
    before = progress(connection)
    for since in (datetime(2024, 3, 1, tzinfo=UTC), datetime(2031, 1, 1, tzinfo=UTC)):
        with pytest.raises(UsageError, match="lies in the future"):
            queue.want(Window(since, since + DAY))
    assert progress(connection) == before


def test_times_finer_than_a_millisecond_are_cut(connection, worker):
    queue = worker(users=[A])
    queue.want(Window(START + timedelta(microseconds=1_999), END + timedelta(microseconds=999)))
    (lease,) = queue.claim(1)
    assert lease.fills == [(START_MS + 1, END_MS)]


@pytest.fixture
def looked(monkeypatch):
    """A list that grows by one whenever somebody looks for wallets."""
    times, real = [], backfill_queue.for_all_wallets

    def look(*args):
        times.append(args)
        return real(*args)

    monkeypatch.setattr(backfill_queue, "for_all_wallets", look)
    return times


def test_workers_that_start_together_look_for_wallets_once(connection, worker, looked, monkeypatch):
    watch(connection, [A, B])
    lock = (LOCK_NAMESPACE, ENLIST_LOCK)
    queues = [worker(number, 3) for number in range(3)]
    waiting = set()

    def nap(_):
        waiting.add(threading.get_ident())
        time.sleep(0.01)

    with monkeypatch.context() as patched, ThreadPoolExecutor(3) as pool:
        patched.setattr(backfill_queue, "time", SimpleNamespace(sleep=nap))
        connection.execute("select pg_advisory_lock(%s, %s)", lock)
        started = [pool.submit(queue.want, WINDOW) for queue in queues]
        ends = time.monotonic() + 60
        while len(waiting) < 3:
            assert time.monotonic() < ends
            time.sleep(0.01)
        connection.execute("select pg_advisory_unlock(%s, %s)", lock)
        for each in started:
            each.result()
    assert len(looked) == 1
    assert {queue.left().all for queue in queues} == {2}


def test_a_partition_that_is_dropped_meanwhile_is_passed_over(connection, worker, database):
    days = [START + number * DAY for number in range(3)]
    maintain.cover(connection, "fills", days)
    for user, day in zip((A, B, C), days, strict=True):
        add_fills(connection, user, [day])
    queue = worker()
    first, second, _ = (f"fills_p{day:%Y%m%d}" for day in days)
    with psycopg.connect(database) as maintaining, ThreadPoolExecutor(1) as pool:
        maintaining.execute(f"lock table {first} in access exclusive mode")
        wanting = pool.submit(queue.want, WINDOW)
        waits = "select exists (select from pg_locks where pid = %s and not granted)"
        until(
            lambda: connection.execute(waits, (queue.connection.info.backend_pid,)).fetchone() == (True,),
            "the first partition",
        )
        maintaining.execute(f"drop table {second}")
        maintaining.commit()
        wanting.result(60)
    assert set(progress(connection)) == {A, C}


def test_a_worker_that_joins_later_looks_for_wallets_after_six_hours(connection, worker, looked):
    watch(connection, [A])
    worker().want(WINDOW)
    watch(connection, [A, B])
    worker().want(WINDOW)
    assert (len(looked), set(progress(connection))) == (1, {A})
    # But for another window.
    worker().want(Window(START, END + DAY))
    assert (len(looked), set(progress(connection))) == (2, {A, B})
    watch(connection, [C])
    connection.execute("update ingest_cursors set updated_at = updated_at - interval '6 hours'")
    worker().want(Window(START, END + DAY))
    assert (len(looked), set(progress(connection))) == (3, {A, B, C})


def test_where_nothing_is_left_a_worker_looks_for_new_wallets(connection, worker, walk):
    watch(connection, [A])
    queue = worker()
    queue.want(WINDOW)
    (lease,) = queue.claim(5)
    walk(lease)
    watch(connection, [A, B])
    worker().want(WINDOW)
    assert states(connection) == {A: "complete", B: "pending"}


def test_the_lock_of_looking_is_given_back_where_that_fails(connection, worker, monkeypatch):
    watch(connection, [A])

    def broken(*_):
        raise errors.UndefinedTable("no such table")

    with monkeypatch.context() as patched:
        patched.setattr(backfill_queue, "for_all_wallets", broken)
        with pytest.raises(errors.UndefinedTable):
            worker().want(WINDOW)
    worker().want(WINDOW)
    assert set(progress(connection)) == {A}


def test_another_window_and_pages_that_come_together_do_not_stop_each_other(connection, worker, database):
    """Pages are kept in the order of wallets, whatever order a statement for all of them takes."""
    enlist(connection, [B])
    enlist(connection, [A])
    leases = {lease.user: lease for lease in worker().claim(2)}
    connection.execute("update backfill_progress set weight = 1 where user_address = %s", (A,))
    at = "select user_address from backfill_progress order by ctid"
    assert connection.execute(at).fetchall() == [(B,), (A,)]
    queue = worker()
    waits = "select count(*) from pg_stat_activity where pid = %s and wait_event_type = 'Lock'"
    with psycopg.connect(database) as store, ThreadPoolExecutor(1) as pool:

        def keep(user):
            assert keep_page(store, page(leases[user], (START_MS, START_MS + 1)), lasts=DAY)

        keep(A)
        wanting = pool.submit(queue.want, Window(START, END + DAY))
        ends = time.monotonic() + 60
        while connection.execute(waits, (queue.connection.info.backend_pid,)).fetchone() != (1,):
            assert not wanting.done(), wanting.result()
            assert time.monotonic() < ends
            time.sleep(0.01)
        try:
            keep(B)
        except errors.DeadlockDetected:  # one of the two; a worker then keeps its pages once more
            store.rollback()
            keep(A)
            keep(B)
        store.commit()
        wanting.result(60)
    for row in progress(connection).values():
        assert (row["wanted_to"], row["pages"]) == (END + DAY, 1)


# --- leases -------------------------------------------------------------------------------------------------------


def test_a_worker_begins_with_its_own_and_helps_from_the_other_end(connection, worker, rng):
    users = sorted(addresses(rng, 60))
    enlist(connection, users)
    own = [
        user
        for (user,) in connection.execute(
            "select user_address from backfill_progress where backfill_shard(user_address, 3) = 1 order by 1"
        )
    ]
    others = [user for user in users if user not in own]
    queue = worker(1, 3)
    assert set(users_of(queue.claim(4))) == set(own[:4])
    assert set(users_of(queue.claim(1000))) == set(own[4:])
    assert queue.left() == (60, len(own))
    assert set(users_of(queue.claim(5))) == set(others[-5:])
    assert set(users_of(queue.claim(1000))) == set(others[:-5])
    assert queue.claim(1) == []


def test_a_worker_of_its_own_shard_alone_leaves_the_others(connection, worker, walk, rng):
    enlist(connection, addresses(rng, 40))
    queue = worker(0, 2, own=True)
    mine = queue.claim(1000)
    assert 0 < len(mine) < 40
    assert queue.left() == (40, len(mine))
    assert (queue.claim(10), queue.has_left()) == ([], True)
    for lease in mine:
        walk(lease)
    assert queue.left() == (40 - len(mine), 0)
    assert (queue.claim(10), queue.has_left()) == ([], False)
    assert worker(0, 2).has_left()


def test_a_lease_is_skipped_until_it_expires_and_then_taken(connection, worker):
    enlist(connection, [A, B])
    first, second = worker(), worker()
    (old,) = first.claim(1)
    assert (old.user, users_of(second.claim(5))) == (A, [B])
    assert second.claim(5) == []
    expire(connection, A)
    (new,) = second.claim(5)
    assert (new.user, new.token != old.token) == (A, True)
    (owner, attempts) = connection.execute(
        "select lease_owner, attempts from backfill_progress where user_address = %s", (A,)
    ).fetchone()
    assert (owner, attempts) == (second._values["owner"], 2)
    assert first.claim(5) == []


def test_after_five_leases_without_a_page_a_wallet_is_given_up(connection, worker):
    enlist(connection, [A, B])
    for attempt in range(1, MOST_ATTEMPTS + 1):
        leases = {lease.user: lease for lease in worker().claim(5)}
        assert progress(connection)[A]["attempts"] == attempt
        assert leases.keys() == {A, B}
        if attempt == 3:
            assert keep_page(connection, page(leases[B], (START_MS, START_MS + 1)), lasts=DAY)
        expire(connection, A, B)
    assert users_of(worker().claim(5)) == [B]
    found = progress(connection)
    assert (found[A]["state"], found[A]["lease_token"]) == ("failed", None)
    assert "5 workers in a row" in found[A]["error"]
    assert (found[B]["state"], found[B]["attempts"]) == ("running", 3)


def test_a_lease_that_lives_is_not_given_up(connection, worker):
    enlist(connection, [A])
    connection.execute("update backfill_progress set attempts = 20")
    (lease,) = worker().claim(1)
    assert worker().claim(1) == []
    assert finish(connection, lease) == "pending"


def test_two_workers_that_claim_at_once_never_get_the_same_wallet(connection, worker, rng):
    users = addresses(rng, 400)
    enlist(connection, users)
    sizes = [rng.randrange(1, 12) for _ in range(4)]
    # One queue for several threads, and others beside it; with shards of which one does not exist any more.
    shared = worker(1, 3)
    queues = [shared, shared, worker(1, 3), worker(0, 3)]
    barrier = threading.Barrier(len(queues))

    def take(queue, most):
        barrier.wait(60)
        taken = queue.claim(most)
        # Nobody goes on before everybody has some.
        barrier.wait(60)
        while True:
            leases = queue.claim(most)
            if (
                not leases
                and not connection.execute(
                    "select count(*) from backfill_progress where state = 'pending'"
                ).fetchone()[0]
            ):
                return taken
            assert len(leases) <= most
            taken += leases

    with ThreadPoolExecutor(len(queues)) as pool:
        found = list(pool.map(take, queues, sizes))
    leases = [lease for taken in found for lease in taken]
    assert Counter(users_of(leases)) == Counter(users)
    assert len({lease.token for lease in leases}) == len(users)
    assert all(found)
    owners = Counter(row["lease_owner"] for row in progress(connection).values())
    assert owners[shared._values["owner"]] == len(found[0]) + len(found[1])


def test_renewing_prolongs_what_has_not_expired_and_is_ones_own(connection, worker):
    enlist(connection, [A, B, C])
    first, second = worker(lease=timedelta(seconds=30)), worker()
    assert len(first.claim(2)) == 2
    assert users_of(second.claim(1)) == [C]
    expire(connection, B)
    before = {user: row["lease_expires_at"] for user, row in progress(connection).items()}
    first.renew()
    after = {user: row["lease_expires_at"] for user, row in progress(connection).items()}
    assert after[A] > before[A]
    assert (after[B], after[C]) == (before[B], before[C])
    (left,) = connection.execute(
        "select lease_expires_at - clock_timestamp() from backfill_progress where user_address = %s", (A,)
    ).fetchone()
    assert timedelta(seconds=20) < left <= timedelta(seconds=30)


def test_renewing_does_not_wait_for_a_page_that_is_being_stored(connection, worker, database):
    enlist(connection, [A, B])
    queue = worker()
    leases = queue.claim(2)
    with psycopg.connect(database) as store:
        assert keep_page(store, page(leases[0], (START_MS, END_MS)), lasts=DAY)
        queue.connection.execute("set statement_timeout = '5s'")
        before = progress(connection)[B]["lease_expires_at"]
        queue.renew()
        assert progress(connection)[B]["lease_expires_at"] > before
        queue.release()
        store.rollback()
    assert states(connection) == {A: "running", B: "pending"}


def test_what_a_transaction_holds_that_is_ending_is_given_back_after_it(connection, worker, database):
    enlist(connection, [A, B])
    queue = worker()
    leases = queue.claim(2)
    with psycopg.connect(database) as store, ThreadPoolExecutor(1) as pool:
        assert keep_page(store, page(leases[0], (START_MS, END_MS)), lasts=DAY)
        releasing = pool.submit(queue.release)
        until(lambda: states(connection) == {A: "running", B: "pending"}, "the one that nothing holds")
        store.rollback()
        releasing.result(60)
    assert states(connection) == {A: "pending", B: "pending"}


def test_what_is_given_back_waits_as_if_it_had_not_been_leased(connection, worker):
    enlist(connection, [A, B, C, D])
    queue, other = worker(), worker()
    leases = queue.claim(3)
    assert users_of(other.claim(1)) == [D]
    connection.execute("update backfill_progress set attempts = 4 where user_address = %s", (B,))
    assert keep_page(connection, page(leases[2], (START_MS, END_MS)), lasts=DAY)
    queue.release()
    found = progress(connection)
    assert [found[user]["state"] for user in (A, B, C, D)] == ["pending", "pending", "pending", "running"]
    assert [found[user]["attempts"] for user in (A, B, C)] == [0, 3, 0]
    assert not keep_page(connection, page(leases[0], (START_MS, END_MS)), lasts=DAY)
    assert finish(connection, leases[1]) is None
    assert not fail(connection, leases[1], "why")
    assert progress(connection) == found


def test_what_comes_under_an_old_or_a_foreign_token_is_refused(connection, worker):
    enlist(connection, [A, B])
    (late,) = worker().claim(1)
    (other,) = worker().claim(1)
    expire(connection, A)
    before = progress(connection)
    assert not keep_page(connection, page(late, (START_MS, END_MS)), lasts=DAY)
    assert finish(connection, late) is None
    other.user, late.user = late.user, other.user  # the token of the one, the wallet of the other
    for lease in (other, late):
        assert not keep_page(connection, page(lease, (START_MS, END_MS)), lasts=DAY)
        assert finish(connection, lease) is None
        assert not fail(connection, lease, "why")
    late.user = A
    assert progress(connection) == before
    (new,) = worker().claim(1)
    taken = progress(connection)
    assert not keep_page(connection, page(late, (START_MS, END_MS)), lasts=DAY)
    assert finish(connection, late) is None
    assert not fail(connection, late, "why")
    assert progress(connection) == taken
    assert keep_page(connection, page(new, (START_MS, END_MS)), lasts=DAY)
    assert finish(connection, new) == "complete"


def test_the_limit_is_not_noted_under_an_old_token(connection, worker):
    enlist(connection, [A])
    (late,) = worker().claim(1)
    begins = START + 10 * DAY
    assert keep_page(
        connection,
        page(late, (START_MS, END_MS), doubtful=(START_MS, round(begins.timestamp() * 1000))),
        lasts=DAY,
    )
    connection.execute(
        "insert into fills (user_address, coin, tid, oid, side, time, px, sz, source)"
        " select %s, 'BTC', n, 1, 'A', %s, 1, 1, 'api' from generate_series(1, 10000) n",
        (A, begins),
    )
    expire(connection, A)
    (new,) = worker().claim(1)
    before = progress(connection)
    decide(connection, late)
    assert finish(connection, late) is None
    assert progress(connection) == before
    decide(connection, new)
    assert finish(connection, new) == "truncated"


# --- ranges -------------------------------------------------------------------------------------------------------


def test_pages_in_any_order_add_up_to_what_is_wanted(connection, worker, rng):
    """Against a plain set of numbers; between pages the lease changes hands."""
    size = 40
    begins, ends = START_MS, START_MS + size
    enlist(connection, [A], wanted_to=START + timedelta(milliseconds=size))
    covered, cut_off, pages, weight, fills = set(), set(), 0, 0, 0
    queues = cycle([worker(), worker()])
    (lease,) = next(queues).claim(1)
    while len(covered | cut_off) < size:
        start = rng.randrange(size)
        end = rng.randint(start, min(size, start + 6))  # it may be empty
        cut = None
        if rng.random() < 0.25:
            place = rng.randrange(size)
            cut = (begins + place, begins + min(size, place + rng.randint(0, 3)))
        told = {"fills": rng.randrange(50), "weight": rng.randrange(20, 120)}
        assert keep_page(
            connection, page(lease, (begins + start, begins + end), cut_off=cut, **told), lasts=DAY
        )
        covered |= set(range(start, end))
        cut_off |= set(range(cut[0] - begins, cut[1] - begins)) if cut else set()
        pages, weight, fills = pages + 1, weight + told["weight"], fills + told["fills"]
        if rng.random() < 0.5:
            expire(connection, A)
            (lease,) = next(queues).claim(1)
            left = {number - begins for span in lease.fills for number in range(*span)}
            assert left == set(range(size)) - covered - cut_off
            assert all(one[1] < other[0] for one, other in zip(lease.fills, lease.fills[1:], strict=False))
    row = progress(connection)[A]
    for held, numbers in ((row["covered"], covered), (row["cut_off"], cut_off)):
        assert {number - begins for span in spans(held) for number in range(*span)} == numbers
    assert (row["pages"], row["weight"], row["fills_count"]) == (pages, weight, fills)
    assert (row["coverage_from"], row["coverage_to"]) == tuple(
        START + timedelta(milliseconds=number) for number in (min(covered), max(covered) + 1)
    )
    assert (row["slices_covered"], ends) == (type(row["covered"])(), begins + size)
    assert finish(connection, lease) == ("truncated" if cut_off else "complete")


def test_what_is_cut_off_outside_of_what_is_wanted_makes_a_wallet_truncated_too(connection, worker, walk):
    enlist(connection, [A, B], cut_off="{[2023-11-01, 2024-01-01), [2024-07-01, 2024-08-01)}")
    enlist(connection, [C])
    assert {lease.user: walk(lease) for lease in worker().claim(3)} == {
        A: "truncated",
        B: "truncated",
        C: "complete",
    }


def test_finishing_early_leaves_the_rest_pending(connection, worker):
    enlist(connection, [A])
    (lease,) = worker().claim(1)
    assert keep_page(connection, page(lease, (START_MS, END_MS - 1)), lasts=DAY)
    assert finish(connection, lease) == "pending"
    (row,) = progress(connection).values()
    assert (row["lease_token"], row["completed"]) == (None, False)


# By the number of fills since the oldest one that the API served: whether the history is cut off there.
NEAR = {9_799: "complete", 9_800: "truncated", 10_000: "truncated", 10_200: "truncated", 10_201: "complete"}


def test_a_history_of_just_the_limit_is_cut_off_where_it_begins(connection, worker):
    """Fills from S3 count: the limit is on the newest ones, and only they tell of those after the window."""
    users = dict(zip((A, B, C, D, E), NEAR, strict=True))
    enlist(connection, users)
    begins = START + 10 * DAY
    begins_ms = round(begins.timestamp() * 1000)
    for user, number in users.items():
        connection.execute(
            "insert into fills (user_address, coin, tid, oid, side, time, px, sz, source)"
            " select %(user)s, 'BTC', n, 1, 'A', %(begins)s + n * interval '1 hour', 1, 1,"
            " case when n < 3000 then 'api' else 's3' end from generate_series(0, %(number)s - 1) n"
            # What is older, from another source, and what others did are none of these.
            " union all select %(user)s, 'ETH', n, 1, 'A', %(begins)s - interval '1 ms', 1, 1, 's3'"
            " from generate_series(1, 300) n",
            {"user": user, "begins": begins, "number": number},
        )
    for lease in worker().claim(5):
        assert keep_page(
            connection, page(lease, (START_MS, END_MS), doubtful=(START_MS, begins_ms)), lasts=DAY
        )
        decide(connection, lease)
        state = finish(connection, lease)
        row = progress(connection)[lease.user]
        assert state == row["state"] == NEAR[users[lease.user]], users[lease.user]
        cut = [(START_MS, begins_ms)] if state == "truncated" else []
        assert spans(row["cut_off"]) == cut
        assert spans(row["covered"]) == [(begins_ms if cut else START_MS, END_MS)]


def fills_since(connection, user, begins, number):
    connection.execute(
        "insert into fills (user_address, coin, tid, oid, side, time, px, sz, source)"
        " select %s, '@107', n, 1, 'A', %s + n * interval '1 minute', 1, 1, 'api' from generate_series(0, %s - 1) n",
        (user, begins, number),
    )


def walk_doubtful(connection, worker, until, history):
    """Ask for more of wallet A, up to a time, of which one page comes whose oldest fill is the oldest served."""
    asking = worker(users=[A])
    asking.want(Window(START, until))
    (lease,) = asking.claim(1)
    ((begins, ends),) = lease.fills
    told = page(lease, (begins, ends), doubtful=(begins, to_ms(history)) if history else None)
    assert keep_page(connection, told, lasts=DAY)
    decide(connection, lease)
    return finish(connection, lease)


def to_ms(moment):
    return round(moment.timestamp() * 1000)


def test_a_limit_that_moved_on_between_two_windows_cuts_off_both_times(connection, worker):
    first, second, later = START + 20 * DAY, END + 50 * DAY, END + 120 * DAY
    fills_since(connection, A, first, 10_000)
    assert walk_doubtful(connection, worker, END, first) == "truncated"
    fills_since(connection, A, second, 10_000)
    assert walk_doubtful(connection, worker, later, second) == "truncated"
    row = progress(connection)[A]
    assert spans(row["cut_off"]) == [(START_MS, to_ms(first)), (END_MS, to_ms(second))]
    assert spans(row["covered"]) == [(to_ms(first), END_MS), (to_ms(second), to_ms(later))]
    assert spans(row["doubtful"]) == []


def test_a_limit_in_a_later_window_takes_nothing_from_what_was_covered(connection, worker):
    second, later = END + 50 * DAY, END + 120 * DAY
    fills_since(connection, A, START + 20 * DAY, 300)
    assert walk_doubtful(connection, worker, END, None) == "complete"
    fills_since(connection, A, second, 10_000)
    assert walk_doubtful(connection, worker, later, second) == "truncated"
    row = progress(connection)[A]
    assert spans(row["cut_off"]) == [(END_MS, to_ms(second))]
    assert spans(row["covered"]) == [(START_MS, END_MS), (to_ms(second), to_ms(later))]


def test_a_limit_that_passed_what_was_covered_takes_nothing_from_it(connection, worker):
    """The oldest fill that is served lies beyond the covered range, which is older than it and newer than the part."""
    third = END + 50 * DAY
    fills_since(connection, A, START + 20 * DAY, 300)
    enlist(connection, [A])
    (lease,) = worker().claim(1)
    oldest = to_ms(START + 20 * DAY)
    assert keep_page(connection, page(lease, (START_MS, END_MS), fills=300), lasts=DAY)
    connection.execute("update backfill_progress set oldest_fill_time = %s", (oldest,))
    assert finish(connection, lease) == "complete"
    fills_since(connection, A, third, 50)
    asking = worker(users=[A])
    asking.want(Window(START - 30 * DAY, END + 120 * DAY))
    (lease,) = asking.claim(1)
    for begins, ends in lease.fills:
        assert keep_page(connection, page(lease, (begins, ends), doubtful=(begins, to_ms(third))), lasts=DAY)
    # Until that is decided none of it is covered.
    assert spans(progress(connection)[A]["covered"]) == [
        (START_MS, END_MS),
        (to_ms(third), to_ms(END + 120 * DAY)),
    ]
    decide(connection, lease)
    assert finish(connection, lease) == "truncated"
    row = progress(connection)[A]
    assert spans(row["cut_off"]) == [(to_ms(START - 30 * DAY), START_MS), (END_MS, to_ms(third))]
    assert spans(row["covered"]) == [(START_MS, END_MS), (to_ms(third), to_ms(END + 120 * DAY))]
    assert (row["doubtful_at"], spans(row["doubtful"])) == (None, [])


def test_fills_that_came_after_the_doubt_arose_do_not_settle_it(connection, worker):
    history = START + 20 * DAY
    fills_since(connection, A, history, 10_000)
    enlist(connection, [A])
    (lease,) = worker().claim(1)
    told = page(lease, (START_MS, END_MS - DAY_MS), doubtful=(START_MS, to_ms(history)))
    assert keep_page(connection, told, lasts=DAY)
    # Half a year later the rest is asked for, and much has come meanwhile.
    connection.execute("update backfill_progress set doubtful_at = %s", (END - DAY,))
    fills_since(connection, A, END - DAY, 1_000)
    expire(connection, A)
    (lease,) = worker().claim(1)
    # It is not asked for again.
    assert lease.fills == [(END_MS - DAY_MS, END_MS)]
    assert keep_page(connection, page(lease, *lease.fills), lasts=DAY)
    decide(connection, lease)
    assert finish(connection, lease) == "truncated"
    row = progress(connection)[A]
    assert spans(row["cut_off"]) == [(START_MS, to_ms(history))]
    assert spans(row["covered"]) == [(to_ms(history), END_MS)]


def test_what_is_not_decided_is_not_done(connection, worker):
    enlist(connection, [A])
    (lease,) = worker().claim(1)
    assert keep_page(
        connection, page(lease, (START_MS, END_MS), doubtful=(START_MS, START_MS + 5)), lasts=DAY
    )
    assert finish(connection, lease) == "pending"


def test_counting_locks_few_partitions_at_a_time(connection, worker, database):
    """A server has some thousand locks for all of its connections."""
    first = START.replace(hour=0)
    maintain.cover(connection, "fills", [first + number * DAY for number in range(200)])
    enlist(connection, [A])
    (lease,) = worker().claim(1)
    assert keep_page(
        connection, page(lease, (START_MS, END_MS), doubtful=(START_MS, START_MS + DAY_MS)), lasts=DAY
    )
    with psycopg.connect(database) as other, psycopg.connect(database, autocommit=True) as counting:
        partition = f"fills_p{first + 160 * DAY:%Y%m%d}"
        other.execute(f"lock table {partition} in access exclusive mode")
        with ThreadPoolExecutor(1) as pool:
            deciding = pool.submit(decide, counting, lease)
            held = "select count(*), bool_and(granted) from pg_locks where pid = %s and locktype = 'relation'"

            def waits():
                locks, all_granted = connection.execute(held, (counting.info.backend_pid,)).fetchone()
                return locks if locks and not all_granted else None

            locks = until(waits, "the partition that is locked")
            other.rollback()
            deciding.result(60)
    (indexes,) = connection.execute(
        "select count(*) from pg_index where indrelid = %s::regclass", (partition,)
    ).fetchone()
    assert locks <= 32 * (1 + indexes) + 10
    assert spans(progress(connection)[A]["doubtful"]) == []
