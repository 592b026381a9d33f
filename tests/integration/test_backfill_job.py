"""`hlcli backfill` against the simulator, in this process: what it stores, counts, reports and shows of a fleet."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from contextlib import ExitStack
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from uuid import uuid4

import psycopg
import pytest
from backfill_tables import (
    FILLS,
    LAUNCH_MS,
    PLENTY,
    S3_BEGINS_MS,
    SERVER_WEIGHT,
    World,
    assert_adds_up,
    assert_done,
    assert_same_fills,
    exact,
    fills_rows,
    now_ms,
    progress,
    states,
    stored_fills,
    tells_of_older,
    within,
)
from vault_tables import all_tables, dump, runs
from wallet_tables import watch

from hlcli import ledger
from hlcli.exitcodes import ExitCode
from hlcli.jobs.backfill import CHANNEL, LAUNCH, S3_BEGINS, Options, backfill
from hlcli.jobs.backfill_fleet import SILENT_AFTER, read_fleet
from hlcli.jobs.backfill_walk import Walkers
from hlcli.jobs.fills_coverage import read_coverage
from hlcli.loader import Merge, load
from hlcli.sim import Fault, Simulator
from hlcli.sources import fills as source

PAGE = 40
DAY = timedelta(days=1)


def ms(moment):
    return round(moment.timestamp() * 1000)


@pytest.fixture
def world(rng, request):
    """24 wallets, of which a few have more fills than are served."""
    more = {"history_limit": 200, **getattr(request, "param", {})}
    return World(rng.randrange(2**32), wallets=24, fills=1_200, page_limit=PAGE, bursts=1, **more)


@pytest.fixture
def sim(world):
    with Simulator(vaults=1, weight_per_minute=SERVER_WEIGHT, user_fills=world) as running:
        yield running


@pytest.fixture
def run(settings, sim, world, monkeypatch):
    """Run a worker; by default for all wallets of the world."""
    monkeypatch.setattr("hlcli.jobs.backfill_walk.IDLE_S", 0.05)

    def work(*, users=world.addresses, **options):
        return backfill(settings(**sim.env(), **PLENTY), Options(users=users, page_size=PAGE, **options))

    return work


def everything(connection):
    """All tables but the ledger, the budget and what they are kept with, as text."""
    kept = {"ingestion_runs", "ingest_cursors", "rate_budget", "rate_budget_buckets", "rate_budget_waiters"}
    return {
        table: dump(connection, table, ())
        for table in all_tables(connection)
        if table.split(".")[1] not in kept
    }


# --- what is stored -----------------------------------------------------------------------------------------------


def test_every_wallet_of_the_universe_is_asked_for_and_a_second_run_changes_nothing(
    run, sim, world, connection
):
    watch(connection, world.addresses)
    report = run(users=None)
    assert_done(connection, world, now_ms())
    found = states(connection)
    counts = Counter(found.values())
    assert min(counts["complete"], counts["truncated"]) > 0
    assert report.details == {
        "complete": counts["complete"],
        "truncated": counts["truncated"],
        "lost_leases": 0,
        "wallets_left": 0,
    }
    (ended,) = runs(connection, "backfill")
    assert (report.status, report.exit_code, report.failed) == ("ok", ExitCode.OK, [])
    assert (ended["status"], ended["details"], ended["member"]) == ("ok", report.details, "0/1@test")
    numbers = report.numbers
    assert numbers["units_ok"] == ended["units_ok"] == len(world.addresses)
    assert numbers["inserted"] == ended["rows_inserted"] == len(stored_fills(connection))
    assert numbers["requests"] == ended["requests"] == len(sim.log)
    assert numbers["weight"] == ended["weight"] == sum(served.weight for served in sim.log)
    spent = sum(row["weight"] for row in progress(connection).values())
    assert spent == numbers["weight"]

    before, asked = everything(connection), len(world.asked)
    again = run(users=None)
    assert len(world.asked) == asked
    assert everything(connection) == before
    assert (again.status, again.exit_code) == ("ok", ExitCode.OK)
    assert set(again.numbers.values()) == {0}
    assert again.details == {"complete": 0, "truncated": 0, "lost_leases": 0, "wallets_left": 0}
    assert_adds_up(connection)


def test_all_asked_again_changes_no_fill(run, world, connection):
    first = run()
    before = dump(connection, "fills", ())
    connection.execute("truncate backfill_progress")
    again = run()
    assert dump(connection, "fills", ()) == before
    assert again.numbers["unchanged"] == first.numbers["inserted"] > 0
    assert (again.numbers["inserted"], again.numbers["updated"]) == (0, 0)


@pytest.mark.parametrize("world", [{"history_limit": None}], indirect=True)
def test_both_sides_of_a_trade_are_stored(run, world, connection):
    run()
    sides = defaultdict(list)
    for tid, side, user in connection.execute("select tid, side, user_address from fills where tid <> 0"):
        sides[tid].append((side, user))
    whole = [each for each in sides.values() if sorted(side for side, _ in each) == ["A", "B"]]
    # A slice that the fills endpoint keeps silent about is one side alone.
    assert len(whole) > 0.8 * len(sides)
    assert set(states(connection).values()) <= {"complete", "truncated"}


def test_the_window_is_from_the_launch_to_the_first_hour_of_s3(run, world, connection):
    assert (ms(LAUNCH), ms(S3_BEGINS)) == (LAUNCH_MS, S3_BEGINS_MS)
    run()
    assert {(row["wanted_from"], row["wanted_to"]) for row in progress(connection).values()} == {
        (LAUNCH, S3_BEGINS)
    }
    later = [row for user in world.addresses for row in world.fills_of(user) if row["time"] >= S3_BEGINS_MS]
    assert later
    newest = connection.execute("select max(time) from fills").fetchone()[0]
    assert S3_BEGINS - DAY < newest < S3_BEGINS


def test_days_gone_by_get_partitions(run, world, connection):
    before = partitions(connection)
    run()
    days = {row[0] for row in connection.execute("select distinct date_trunc('day', time) from fills")}
    assert len(days) >= 7
    assert connection.execute("select count(*) from fills_default").fetchone() == (0,)
    assert len(partitions(connection) - before) == len(days)


def partitions(connection):
    return {
        name
        for (name,) in connection.execute(
            "select relid::regclass::text from pg_partition_tree('fills') where isleaf"
        )
    }


def test_a_window_may_end_and_begin_anywhere(run, world, connection, rng):
    times = sorted(row["time"] for user in world.addresses for row in world.fills_of(user))
    one, other = sorted(rng.sample(times[100:-300], 2))
    if one == other:
        other += 1
    since, until = (datetime.fromtimestamp(each / 1000, UTC) for each in (one, other))
    run(since=since, until=until)
    # The millisecond at which it ends is not part of it.
    assert_same_fills(connection, expected(world, one, other))
    assert {(row["wanted_from"], row["wanted_to"]) for row in progress(connection).values()} == {
        (since, until)
    }
    asked = len(world.asked)
    run(since=since)
    for question in world.asked[asked:]:
        # The rest alone; once of all that is older, to know where the history begins.
        assert question.start >= other or question.start == 0
    run()
    assert_done(connection, world, now_ms())
    assert {len(spans) for row in progress(connection).values() for spans in [list(row["covered"])]} <= {0, 1}


def expected(world, since_ms, until_ms):
    return [
        row
        for user in world.addresses
        for row in fills_rows(within(world.served_of(user, now_ms()), since_ms, until_ms))
    ]


def test_what_the_source_does_not_serve_lies_in_what_is_cut_off(run, world, connection, settings):
    run()
    found = progress(connection)
    limited = blind = 0
    for user in world.addresses:
        row = found[user]
        served = world.served_of(user, now_ms())
        told = {id_of(fill) for fill in served}
        wanted = within(world.fills_of(user), LAUNCH_MS, S3_BEGINS_MS)
        kept_back = [fill for fill in wanted if id_of(fill) not in told and fill["twapId"] is None]
        covered, cut_off = (
            [(ms(each.lower), ms(each.upper)) for each in row[name]] for name in ("covered", "cut_off")
        )
        # Together they are what was wanted, without overlapping.
        assert sorted(covered + cut_off) == merged_ends(covered + cut_off)
        assert (min(covered + cut_off)[0], max(covered + cut_off)[1]) == (LAUNCH_MS, S3_BEGINS_MS)
        assert row["state"] == ("truncated" if cut_off else "complete"), user
        assert not [fill for fill in within(served, LAUNCH_MS, S3_BEGINS_MS) if is_in(fill, cut_off)]
        if cut_off:
            oldest = min((fill["time"] for fill in served), default=S3_BEGINS_MS)
            assert cut_off == [(LAUNCH_MS, min(oldest, S3_BEGINS_MS))]
        if kept_back:
            limited += 1
            if not cut_off:
                assert not tells_of_older(served[:PAGE]), user
                blind += 1
            else:
                # The limit may lie amid a millisecond: of that one only the rest is served.
                (span,) = cut_off
                assert all(span[0] <= fill["time"] <= span[1] for fill in kept_back), user
    assert limited >= 3
    assert blind < limited
    with read_coverage(settings(), state="truncated") as shown:
        assert {each.user_address for each in shown.wallets} == {
            user for user, row in found.items() if row["state"] == "truncated"
        }


def id_of(fill):
    return tuple(
        str(fill[name]) for name in ("coin", "tid", "oid", "side", "time", "px", "sz", "startPosition")
    )


def merged_ends(spans):
    """The spans in order, where each begins as the one before it ends."""
    ordered = sorted(spans)
    assert all(one[1] == other[0] for one, other in zip(ordered, ordered[1:], strict=False))
    return ordered


def is_in(fill, spans):
    return any(start <= fill["time"] < end for start, end in spans)


# --- beside other sources -----------------------------------------------------------------------------------------


@pytest.fixture
def recent(rng):
    """A simulator with fills, and slices of TWAPs, of the last ten days."""
    now = now_ms()
    world = World(
        rng.randrange(2**32),
        wallets=16,
        fills=1_600,
        page_limit=PAGE,
        history_limit=None,
        begins_ms=now - 10 * 86_400_000,
        ends_ms=now - 120_000,
    )
    with Simulator(vaults=1, weight_per_minute=SERVER_WEIGHT, user_fills=world) as sim:
        yield sim, world


def test_slices_complete_the_fills_that_do_not_say_that_they_are_any(recent, settings, connection):
    sim, world = recent
    sim.add_fault(
        Fault(FILLS, "patch", times=None, patch=lambda page: [{**fill, "twapId": None} for fill in page])
    )
    until_ms = now_ms() - 120_000
    options = Options(
        users=world.addresses,
        page_size=PAGE,
        since=datetime.now(UTC) - 11 * DAY,
        until=datetime.fromtimestamp(until_ms / 1000, UTC),
    )
    since_ms = ms(options.since)
    report = backfill(settings(**sim.env(), **PLENTY), options)
    rows = expected(world, since_ms, until_ms)
    assert_same_fills(connection, rows)
    twice = report.numbers["served"] - len(rows)
    # Each of those that both endpoints serve was completed.
    assert report.numbers["updated"] == twice > 0
    assert twice <= sum(row["twap_id"] is not None for row in rows)
    assert report.numbers["inserted"] == len(rows)
    assert report.numbers["rejected"] == 0


def from_s3(connection, told, **changed):
    """Load fills as S3 has them: with the block, without what the API alone tells."""
    import polars as pl

    frame = pl.DataFrame(
        [
            {
                **{name: row[name] for name in ("user_address", "coin", "side", "dir", "hash")},
                **{name: int(row[name]) for name in ("tid", "oid", "event_ix")},
                **{name: row[name] for name in ("px", "sz", "closed_pnl", "start_position", "builder_fee")},
                "time": datetime.fromisoformat(row["time"]),
                "block_time": datetime.fromisoformat(row["time"]),
                "block_number": 7_000_000,
                "is_exact": True,
                "source": "s3",
                **changed,
            }
            for row in told
        ],
        infer_schema_length=None,
    )
    with connection.transaction():
        return load(connection, source.TABLE, frame, rule=Merge.COMPLETE, newer=source.NEWER, run_id=uuid4())


def test_a_row_from_s3_wins_and_gets_what_it_lacks_whichever_comes_first(run, world, connection, rng):
    rows = expected(world, LAUNCH_MS, S3_BEGINS_MS)
    rng.shuffle(rows)
    early, late, both = rows[:200], rows[200:300], {"closed_pnl": "-0.00000000123", "dir": "As S3 says"}
    from_s3(connection, early, **both)
    report = run()
    assert report.numbers["updated"] == len(early)
    assert report.numbers["inserted"] == len(rows) - len(early)
    from_s3(connection, late, **both)
    block = {
        "block_number": "7000000",
        "source": "s3",
        "dir": "As S3 says",
        "closed_pnl": exact("-0.00000000123"),
    }
    assert block["closed_pnl"] == "-0.00000000123"
    assert_same_fills(
        connection,
        [row | block | {"block_time": row["time"]} for row in rows[:300]] + rows[300:],
    )
    # What S3 has is the API's, too: the queue counts what was served, the ledger what was new.
    assert sum(row["fills_count"] for row in progress(connection).values()) == report.numbers["served"]


def test_where_no_wallet_is_known_it_says_what_to_do(run, connection, caplog):
    report = run(users=None)
    assert (report.status, report.details["wallets_left"]) == ("ok", 0)
    assert "hlcli universe refresh" in caplog.text


def test_wallets_that_only_s3_knows_are_found_in_fills(run, world, connection):
    users = [
        user for user in world.addresses if within(world.served_of(user, now_ms()), LAUNCH_MS, S3_BEGINS_MS)
    ]
    first = {user: fills_rows(world.served_of(user, now_ms()))[-1] for user in users[:3]}
    from_s3(connection, first.values())
    run(users=None)
    assert set(states(connection)) == set(first)
    assert {question.user for question in world.asked} == set(first)


def test_a_fill_that_is_not_exact_gives_way_to_the_api(run, world, connection):
    rows = expected(world, LAUNCH_MS, S3_BEGINS_MS)
    from_s3(connection, rows[:50], is_exact=False, px="1.25")
    assert run().numbers["updated"] == 50
    found = {
        tuple(row[name] for name in ("user_address", "coin", "tid", "oid", "side", "time", "event_ix")): row
        for row in stored_fills(connection)
    }
    for row in rows[:50]:
        key = tuple(row[name] for name in ("user_address", "coin", "tid", "oid", "side", "time", "event_ix"))
        assert (found[key]["px"], found[key]["is_exact"], found[key]["block_number"]) == (
            row["px"],
            "true",
            "7000000",
        )


# --- members in the ledger ----------------------------------------------------------------------------------------


@pytest.fixture
def begin(database):
    """Begin a run of a member of the backfill, on a connection of its own; None when it was skipped."""
    with ExitStack() as opened:

        def make(member):
            connection = opened.enter_context(psycopg.connect(database, autocommit=True))
            return ledger.begin(connection, replace(CHANNEL, member=member))

        yield make


def die(connection, run):
    """What is left of a machine that lost power, once the server has noticed."""
    run.connection.close()
    ends = time.monotonic() + 30
    held = "select count(*) from pg_locks where locktype = 'advisory' and objid = %s"
    while connection.execute(held, (run.channel.lock_key,)).fetchone()[0]:
        assert time.monotonic() < ends
        time.sleep(0.01)


def statuses(connection):
    return Counter((run["member"], run["status"]) for run in runs(connection, "backfill"))


def test_members_run_side_by_side_and_the_same_one_only_once(connection, begin):
    one, other = begin("0/2@a"), begin("1/2@a")
    assert one
    assert other
    assert begin("0/2@a") is None
    # Another number of workers, or another address, is another one.
    more = [begin("0/3@a"), begin("0/2@b")]
    assert all(more)
    assert statuses(connection) == {
        ("0/2@a", "running"): 1, ("0/2@a", "skipped"): 1, ("1/2@a", "running"): 1,
        ("0/3@a", "running"): 1, ("0/2@b", "running"): 1,
    }  # fmt: skip
    one.finish(one.connection, "ok", ExitCode.OK, None, {})
    one.release()
    again = begin("0/2@a")
    assert again
    for each in (other, again, *more):
        each.release()
    assert_no_locks(connection)


def assert_no_locks(connection):
    assert connection.execute(
        "select count(*) from pg_locks where locktype = 'advisory'"
        " and database = (select oid from pg_database where datname = current_database())"
    ).fetchone() == (0,)


def test_the_dead_become_abandoned_when_any_member_begins_and_the_living_do_not(connection, begin):
    dead, living = begin("0/3@a"), begin("1/3@a")
    die(connection, dead)
    assert statuses(connection) == {("0/3@a", "running"): 1, ("1/3@a", "running"): 1}
    begin("2/3@a")
    assert statuses(connection)[("0/3@a", "abandoned")] == 1
    assert statuses(connection)[("1/3@a", "running")] == 1
    (row,) = [run for run in runs(connection, "backfill") if run["run_id"] == dead.run_id]
    assert row["finished_at"]
    assert row["error"] == "found dead by a later run"
    # It may begin again, and the others live on.
    assert begin("0/3@a")
    with living.unit() as unit:
        unit.add(units_ok=1)
    assert statuses(connection)[("0/3@a", "abandoned")] == 1


def test_the_channel_is_running_while_any_member_is(connection, begin):
    assert ledger.health(connection, CHANNEL).state == "missing"
    one, other = begin("0/2@a"), begin("1/2@a")
    assert ledger.health(connection, CHANNEL).state == "running"
    die(connection, other)
    assert ledger.health(connection, CHANNEL).state == "running"
    one.finish(one.connection, "ok", ExitCode.OK, None, {})
    one.release()
    # The last one is dead, and nobody has begun since.
    found = ledger.health(connection, CHANNEL)
    assert (found.state, found.last_status) == ("failed", "abandoned")
    assert begin("0/2@a")
    assert ledger.health(connection, CHANNEL).state == "running"


def test_a_run_that_is_heard_is_running_however_old_and_one_that_is_not_is_stale(connection, begin):
    run = begin("0/1@a")
    age(connection, run, "started_at", "9 days")
    assert ledger.health(connection, CHANNEL).state == "stale"
    run.heard(run.connection)
    assert ledger.health(connection, CHANNEL).state == "running"
    age(connection, run, "heard_at", "2 days 1 minute")
    assert ledger.health(connection, CHANNEL).state == "stale"
    with run.unit() as unit:
        unit.add()
    assert ledger.health(connection, CHANNEL).state == "running"


def age(connection, run, column, span):
    connection.execute(
        f"update ingestion_runs set {column} = clock_timestamp() - %s::interval where run_id = %s",
        (span, run.run_id),
    )


def test_one_that_is_heard_is_enough_though_a_newer_one_hangs(connection, begin):
    old, new = begin("0/2@a"), begin("1/2@a")
    age(connection, old, "started_at", "4 days")
    age(connection, new, "started_at", "3 days")
    old.heard(old.connection)
    assert ledger.health(connection, CHANNEL).state == "running"


# --- the fleet ----------------------------------------------------------------------------------------------------


def test_the_fleet_tells_the_pace_of_each_worker_and_what_is_left_of_its_shard(
    connection, begin, settings, rng
):
    users = [f"0x{rng.getrandbits(160):040x}" for _ in range(50)]
    shards = Counter()
    for user in users:
        connection.execute(
            "insert into backfill_progress (user_address, wanted_from, wanted_to, state, error)"
            " values (%s, '2024-01-01', '2024-02-01', %s, 'why')",
            (user, state := rng.choice(["pending", "complete", "truncated", "failed"])),
        )
        (shard,) = connection.execute("select backfill_shard(%s, 3)", (user,)).fetchone()
        shards[shard] += state == "pending"
    working, silent, gone = (begin(f"{number}/3@k@y") for number in range(3))
    figures = "units_ok = 300, units_failed = 2, rows_served = 9000, requests = 450, weight = 12000"
    for each, started, heard in (
        (working, "10 minutes", "0"),
        (silent, "15 minutes", "5 minutes"),
        (gone, "3 hours", "2 hours"),
    ):
        connection.execute(
            f"update ingestion_runs set {figures}, started_at = clock_timestamp() - %s::interval,"
            " heard_at = clock_timestamp() - %s::interval where run_id = %s",
            (started, heard, each.run_id),
        )
    gone.finish(gone.connection, "ok", ExitCode.OK, None, {})
    fleet = read_fleet(settings())
    members = {each.member: each for each in fleet.members}
    assert {name: each.state for name, each in members.items()} == {
        "0/3@k@y": "working",
        "1/3@k@y": "silent",
        "2/3@k@y": "ok",
    }
    for each in members.values():
        assert each.left == shards[each.shard[0]]
    one = members["0/3@k@y"].as_json()
    assert one["wallets_per_minute"] == pytest.approx(30, abs=0.3)
    assert one["weight_per_minute"] == pytest.approx(1200, abs=12)
    assert members["1/3@k@y"].per_minute(300) == pytest.approx(30, abs=0.3)
    assert timedelta(minutes=5) <= members["1/3@k@y"].silence < timedelta(minutes=6)
    assert SILENT_AFTER == timedelta(minutes=2)
    assert (fleet.wallets, fleet.left) == (50, shards.total())
    # At the pace of the one that works.
    assert fleet.seconds_left == pytest.approx(60 * shards.total() / 30, rel=0.01)
    told = fleet.as_json()
    assert told["states"] == dict(
        connection.execute("select state, count(*) from backfill_progress group by 1").fetchall()
    )
    assert (told["left"], len(told["workers"])) == (shards.total(), 3)


def test_a_worker_that_ended_a_day_ago_is_not_shown_and_one_that_died_is(connection, begin, settings):
    ended, died = begin("0/2@a"), begin("1/2@a")
    ended.finish(ended.connection, "failed", ExitCode.TEMPORARY, "why", {})
    assert {each.member: each.state for each in read_fleet(settings()).members}["0/2@a"] == "failed"
    age(connection, ended, "finished_at", "25 hours")
    age(connection, died, "started_at", "9 days")
    die(connection, died)
    assert [(each.member, each.state) for each in read_fleet(settings()).members] == [("1/2@a", "silent")]


def test_an_empty_fleet(settings, connection):
    fleet = read_fleet(settings())
    assert (fleet.wallets, fleet.left, fleet.members, fleet.seconds_left, fleet.fills) == (0, 0, [], None, 0)


@pytest.mark.parametrize("lease", [timedelta(seconds=1), timedelta(minutes=2), timedelta(days=1)])
def test_a_worker_says_often_enough_that_it_lives(lease):
    """For its leases, and, however long they are, lest it is shown as silent."""
    waits = []

    class Gone:
        def wait(self, seconds):
            waits.append(seconds)
            return True

    queue = SimpleNamespace(lease=lease)
    walkers = Walkers(None, None, queue, concurrency=1, limit=None, page_size=PAGE)
    walkers._gone = Gone()
    walkers._beat()
    assert 0 < waits[0] <= min(lease.total_seconds() / 3, SILENT_AFTER.total_seconds() / 2)
