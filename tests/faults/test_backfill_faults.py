"""What may go wrong under `hlcli backfill`: workers that die, stop, double and meet, and a source that fails.

Whatever happened, in the end every fill that the simulator serves is stored once, digit for digit, and nothing else.
"""

from __future__ import annotations

import json
import signal
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from uuid import uuid4

import psycopg
import pytest
from backfill_tables import (
    FILLS,
    PLENTY,
    S3_BEGINS_MS,
    SERVER_WEIGHT,
    SLICES,
    World,
    assert_adds_up,
    assert_done,
    assert_same_fills,
    now_ms,
    progress,
    states,
)
from vault_tables import assert_nothing_left, runs
from waiting import until
from wallet_tables import watch

from hlcli.exitcodes import ExitCode, LockedError, exit_code_for
from hlcli.http import SourceError
from hlcli.jobs.backfill import Options, backfill
from hlcli.jobs.backfill_queue import MOST_ATTEMPTS, Queue, Shard
from hlcli.sim import Fault, Simulator

PAGE = 40
DAY_MS = 86_400_000


@pytest.fixture
def world(rng, request):
    """60 wallets, or as many as a test asks for: three with about twenty pages, the others with one or two.

    The limit cuts off a hundred fills or more of two: so many that the positions on the first page must tell.
    """
    wallets = getattr(request, "param", 60)
    return World(
        rng.randrange(2**32),
        wallets=wallets,
        fills=2_500 + 1_000 * wallets // 60,
        page_limit=PAGE,
        history_limit=880,
        bursts=2,
    )


@pytest.fixture
def sim(world, request):
    """A simulator that answers at once, or after as many seconds as a test asks for."""
    world.fills_of(world.addresses[0])  # made before the clock of any test begins
    latency = getattr(request, "param", 0.0)
    with Simulator(vaults=1, weight_per_minute=SERVER_WEIGHT, user_fills=world, latency=latency) as running:
        yield running


@pytest.fixture
def whales(world):
    """The wallets, those with the most fills first."""
    return sorted(world.addresses, key=lambda user: -len(world.fills_of(user)))


@pytest.fixture
def run(settings, sim, world, monkeypatch):
    """Run a worker in this process, with short pauses between attempts; by default for all wallets of the world."""
    monkeypatch.setattr("hlcli.http.BACKOFF_BASE_S", 0.001)
    monkeypatch.setattr("hlcli.jobs.backfill_walk.IDLE_S", 0.05)

    def work(egress="test", *, users=world.addresses, **options):
        made = settings(**sim.env(), **PLENTY, HL_EGRESS_KEY=egress)
        return backfill(made, Options(users=users, page_size=PAGE, **options))

    return work


@pytest.fixture
def done(connection, world):
    """Check that all is there."""

    def check(**window):
        assert_done(connection, world, now_ms(), **window)

    return check


def together(*tasks):
    """Call all of them at once; returns what they return, raises what they raise."""
    barrier = threading.Barrier(len(tasks))

    def begin(task):
        barrier.wait(60)
        return task()

    with ThreadPoolExecutor(len(tasks)) as pool:
        return [each.result() for each in [pool.submit(begin, task) for task in tasks]]


class Gate:
    """An answer has `arrived`; it, and those that come with it, wait until the gate is `opened`."""

    def __init__(self, sim, *, after=0, times=None, address=None):
        self.arrived, self.opened = threading.Event(), threading.Event()
        sim.add_fault(Fault(FILLS, "patch", times=times, after=after, address=address, patch=self.hold))

    def hold(self, answer):
        self.arrived.set()
        self.opened.wait(60)
        return answer

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.opened.set()

    def wait(self):
        assert self.arrived.wait(60), "nothing was asked"


def details(connection):
    return [run["details"] for run in runs(connection, "backfill")]


# --- killed -------------------------------------------------------------------------------------------------------


class Fleet:
    """Workers as processes, each behind an egress key of its own."""

    def __init__(self, spawn, sim, world, path, connection, *more):
        path.write_text("\n".join(world.addresses))
        self._spawn, self._sim, self._connection = spawn, sim, connection
        self._args = ["--users-file", str(path), "--page-size", str(world.page_limit), *more]
        self.processes = {}
        self.kills = 0

    def start(self, number, workers):
        args = ["--worker-id", str(number), "--total-workers", str(workers), "--fail-if-locked", *self._args]
        env = {**PLENTY, **self._sim.env(), "HL_EGRESS_KEY": f"machine-{number}"}
        self.processes[number] = self._spawn("backfill", *args, **env)

    def kill(self, number):
        """End a worker at once; True if it was still alive."""
        process = self.processes.pop(number)
        process.kill()
        told = process.communicate()
        if process.returncode == -signal.SIGKILL:
            self.kills += 1
            self._forgotten(number)
            return True
        assert process.returncode == 0, (number, told)
        return False

    def _forgotten(self, number):
        """Wait until the server has noticed: until then the next one would find its lock held."""
        held = (
            "select count(*) from ingestion_runs r join pg_locks l on l.locktype = 'advisory' and l.objid = r.lock_key"
            " and l.database = (select oid from pg_database where datname = current_database())"
            " where r.member like %s and r.status = 'running'"
        )
        until(
            lambda: self._connection.execute(held, (f"{number}/%",)).fetchone() == (0,),
            "the lock of the dead",
        )

    def finish(self):
        """Wait for all that still run; each must say that all is done."""
        for number, process in self.processes.items():
            told = process.communicate(timeout=600)
            assert process.returncode == 0, (number, told)
        self.processes.clear()


def kill_fleet(fleet, world, rng, *, kills, workers, later_workers=None):
    """Kill workers at random, `kills` times each; the last one that dies is never started again.

    With `later_workers` the whole fleet dies half-way, and one of that many is started.
    """
    numbers = list(range(workers))
    for number in numbers:
        fleet.start(number, workers)
    victims = numbers * kills
    rng.shuffle(victims)
    for place, victim in enumerate(victims):
        # All kills together come before half of the work is done.
        goal = len(world.asked) + rng.randrange(1, max(2, len(world.addresses) // (2 * len(victims))))
        until(
            lambda goal=goal: (
                len(world.asked) >= goal or all(each.poll() is not None for each in fleet.processes.values())
            ),
            "a question",
        )
        time.sleep(rng.uniform(0, 0.2))
        if not fleet.kill(victim):  # all is done
            break
        if later_workers and place == len(victims) // 2:
            for number in list(fleet.processes):
                fleet.kill(number)
            numbers = list(range(later_workers))
            for number in numbers:
                fleet.start(number, later_workers)
        elif place < len(victims) - 1:
            fleet.start(victim, len(numbers))
    fleet.finish()
    assert fleet.kills > len(victims) // 2


def assert_nothing_is_left_to_ask(run, world, connection):
    """One more run finds the dead ones' rows and no wallet to ask for."""
    before = len(world.asked)
    assert run("afterwards").numbers["units_ok"] == 0
    assert len(world.asked) == before
    assert {row["status"] for row in runs(connection, "backfill")} == {"ok", "abandoned"}


@pytest.mark.parametrize(("world", "sim"), [(150, 0.04)], indirect=True)
def test_killed_workers_lose_and_repeat_nothing(spawn, sim, world, connection, rng, run, done, tmp_path):
    fleet = Fleet(spawn, sim, world, tmp_path / "users", connection, "--lease", "2s", "--concurrency", "2")
    kill_fleet(fleet, world, rng, kills=1, workers=4)
    assert_nothing_is_left_to_ask(run, world, connection)
    done()


# --- several at once ----------------------------------------------------------------------------------------------


def test_two_workers_of_one_shard_ask_nothing_twice(run, sim, world, connection, done):
    with Gate(sim) as gate:
        # Both are at work before the first answer.
        def look():
            until(lambda: len({question.user for question in world.asked}) >= 4, "both workers")
            gate.opened.set()

        one, other, _ = together(
            lambda: run("one", worker_id=1, total_workers=4, concurrency=2),
            lambda: run("other", worker_id=1, total_workers=4, concurrency=2),
            look,
        )
    assert min(one.numbers["units_ok"], other.numbers["units_ok"]) > 0
    assert one.numbers["units_ok"] + other.numbers["units_ok"] == len(world.addresses)
    assert world.asked_twice() == {}
    done()


def test_one_worker_started_twice_behind_one_address_works_once(run, sim, world, connection, done):
    with Gate(sim) as gate, ThreadPoolExecutor(1) as pool:
        first = pool.submit(run, worker_id=1, total_workers=4)
        gate.wait()
        second = run(worker_id=1, total_workers=4)
        assert (second.status, second.exit_code) == ("skipped", ExitCode.OK)
        with pytest.raises(LockedError) as caught:
            run(worker_id=1, total_workers=4, fail_if_locked=True)
        assert caught.value.exit_code == ExitCode.LOCKED
        gate.opened.set()
        assert first.result().numbers["units_ok"] == len(world.addresses)
    assert world.asked_twice() == {}
    done()


def fleet_of(run, workers, **options):
    return [
        lambda number=number: run(
            f"{number} of {workers}", worker_id=number, total_workers=workers, **options
        )
        for number in range(workers)
    ]


def test_six_workers_after_four_lose_and_repeat_nothing(run, world, connection, done):
    four = together(*fleet_of(run, 4, limit=6))
    assert [report.numbers["units_ok"] for report in four] == [6] * 4
    six = together(*fleet_of(run, 6))
    assert sum(report.numbers["units_ok"] for report in six) == len(world.addresses) - 24
    assert world.asked_twice() == {}
    done()


def test_six_workers_beside_four_lose_and_repeat_nothing(run, sim, world, connection, done):
    with Gate(sim) as gate:

        def six():
            gate.wait()
            tasks = fleet_of(run, 6, concurrency=1)
            with ThreadPoolExecutor(6) as pool:
                started = [pool.submit(task) for task in tasks]
                until(lambda: len({question.user for question in world.asked}) == 10, "all workers")
                gate.opened.set()
                return [each.result() for each in started]

        *four, later = together(*fleet_of(run, 4, concurrency=1), six)
    assert sum(report.numbers["units_ok"] for report in [*four, *later]) == len(world.addresses)
    assert world.asked_twice() == {}
    done()


def test_a_worker_with_its_own_shard_leaves_the_others_alone(run, world, connection, done):
    (mine,) = connection.execute(
        "select array_agg(user_address) from unnest(%s::text[]) user_address"
        " where backfill_shard(user_address, 4) = 1",
        (world.addresses,),
    ).fetchone()
    assert run(worker_id=1, total_workers=4, own_shard=True).numbers["units_ok"] == len(mine)
    assert {question.user for question in world.asked} == set(mine)
    for number in (0, 2, 3):
        run(worker_id=number, total_workers=4, own_shard=True)
    assert world.asked_twice() == {}
    done()


# --- leases -------------------------------------------------------------------------------------------------------


def test_what_a_worker_brings_that_slept_over_its_lease_is_refused(
    spawn, run, sim, world, whales, connection, done, tmp_path
):
    users = tmp_path / "users"
    users.write_text("\n".join(whales[:3]))  # full pages alone: all_stored() counts no questions after them
    with Gate(sim, after=6) as gate:
        sleeper = spawn(
            "backfill", "--users-file", str(users), "--page-size", str(PAGE), "--concurrency", "2", "--lease", "2s",
            "--json", HL_EGRESS_KEY="sleeper", **PLENTY, **sim.env(),
        )  # fmt: skip
        until(lambda: len(world.asked) == 8, "two questions that wait for their answers")
        # Not amid a transaction, whose locks would be kept, too.
        until(lambda: all_stored(connection, world, 2), "the pages before them")
        sleeper.send_signal(signal.SIGSTOP)
        sim.clear_faults()
        try:
            assert run("awake").numbers["units_ok"] > 0
            assert set(states(connection).values()) <= {"complete", "truncated"}
        finally:
            gate.opened.set()
            sleeper.send_signal(signal.SIGCONT)
        told, errors = sleeper.communicate(timeout=60)
    assert sleeper.returncode == 0, errors
    # Two were walked; one may have been leased and not begun.
    assert 2 <= json.loads(told)["details"]["lost_leases"] <= 3
    done()


def all_stored(connection, world, waiting):
    """Whether every answer is stored, and of just so many wallets a question waits for its own."""
    under_way = {
        user: row["pages"] for user, row in progress(connection).items() if row["state"] == "running"
    }
    return len(under_way) == waiting and all(
        pages == pages_of([question for question in world.asked if question.user == user])
        for user, pages in under_way.items()
    )


def pages_of(asked):
    """How many pages a wallet's questions have brought, of which the last one waits for its answer."""
    # From the beginning, or the other way round: about the page before, which does not come without that answer.
    return sum(question.start > 0 and not question.newest_first for question in asked) - 1


LOST = {
    "taken over": "lease_owner = gen_random_uuid(), lease_token = gen_random_uuid(),"
    " lease_expires_at = clock_timestamp() + interval '1 second'",
    "expired": "lease_expires_at = clock_timestamp() - interval '1 second'",
}


@pytest.mark.parametrize("change", LOST.values(), ids=LOST)
def test_what_comes_under_a_lost_lease_is_refused(run, sim, world, whales, connection, done, change):
    whale = whales[0]
    with Gate(sim, address=whale, after=5, times=1) as gate, ThreadPoolExecutor(1) as pool:
        worker = pool.submit(run, concurrency=1)
        gate.wait()
        pages, left = connection.execute(
            f"update backfill_progress set {change} where user_address = %s"
            " returning pages, lower(backfill_todo(wanted_from, wanted_to, covered, cut_off))",
            (whale,),
        ).fetchone()
        gate.opened.set()
        report = worker.result()
    # The same worker finished it, when the other did not come back.
    assert (report.status, report.details["lost_leases"]) == ("ok", 1)
    assert progress(connection)[whale]["pages"] > pages + 10
    # Only what was refused was asked for again, however far the walk had gone on meanwhile.
    again = world.asked_twice()
    assert {question.user for question in again} <= {whale}
    assert_only_from(round(left.timestamp() * 1000), again)
    done()


def assert_only_from(time_ms, questions):
    """None is about what was stored before; one about all that is older begins at 0 and ends where a part begins."""
    assert all((question.start or question.end + 1) >= time_ms for question in questions)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_gives_the_leases_back_at_once(
    spawn, run, sim, world, connection, done, tmp_path, number, code
):
    users = tmp_path / "users"
    users.write_text("\n".join(world.addresses))
    with Gate(sim, after=20):
        worker = spawn(
            "backfill", "--users-file", str(users), "--page-size", str(PAGE), **PLENTY, **sim.env()
        )
        until(lambda: len(world.asked) >= 28, "eight questions that wait for their answers")
        worker.send_signal(number)
        _, told = worker.communicate(timeout=60)
        assert worker.returncode == code, told
        found = progress(connection).values()
        assert "running" not in {row["state"] for row in found}
        assert "pending" in {row["state"] for row in found}
        assert {row["attempts"] for row in found} == {0}
        assert_adds_up(connection)
        assert_nothing_left(connection)
    (ended,) = runs(connection, "backfill")
    assert (ended["status"], ended["exit_code"]) == ("interrupted", code)
    sim.clear_faults()
    run()
    done()


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("sim", [0.03], indirect=True)
def test_signals_at_random_moments_give_the_leases_back(
    spawn, run, world, sim, connection, done, tmp_path, rng
):
    users = tmp_path / "users"
    users.write_text("\n".join(world.addresses))
    stops = 0
    while stops < 200:
        world.asked.clear()
        worker = spawn(
            "backfill", "--users-file", str(users), "--page-size", str(PAGE), **PLENTY, **sim.env()
        )
        until(lambda: world.asked or worker.poll() is not None, "a first question")  # noqa: B023
        time.sleep(rng.uniform(0, 1.5))
        number, code = rng.choice([(signal.SIGTERM, 143), (signal.SIGINT, 130)])
        worker.send_signal(number)
        _, told = worker.communicate(timeout=60)
        last = runs(connection, "backfill")[-1]
        assert (worker.returncode, last["exit_code"]) in {(code, code), (code, 0), (0, 0)}, told
        assert_adds_up(connection)
        stops += last["exit_code"] == code
        if last["exit_code"] == 0:
            done()
            connection.execute("truncate backfill_progress, fills, ingestion_runs cascade")


def test_a_deadline_leaves_the_rest_to_the_next_run_which_goes_on_inside_the_wallet(
    run, sim, world, whales, connection, done
):
    whale = whales[0]
    with Gate(sim, after=12):
        report = run(users=[whale], deadline=timedelta(seconds=2))
    assert (report.status, report.exit_code, report.details["wallets_left"]) == ("ok", ExitCode.OK, 1)
    row = progress(connection)[whale]
    assert (row["state"], row["attempts"]) == ("pending", 0)
    # Twelve questions were answered; what history there is and a millisecond that fills a page take some of them.
    assert row["pages"] >= 6
    sim.clear_faults()
    asked = len(world.asked)
    run(users=[whale])
    reached = round(row["coverage_to"].timestamp() * 1000)
    assert_only_from(reached, world.asked_twice())
    assert min(question.start for question in world.asked[asked:] if question.start) == reached
    done(users=[whale])


def test_a_deadline_without_a_single_answer_is_no_success(run, sim, whales, connection):
    sim.add_fault(Fault(FILLS, "status", times=None, status=503))
    with pytest.raises(SourceError, match="503"):
        run(users=whales[:2], concurrency=2, deadline=timedelta(seconds=15))
    (ended,) = runs(connection, "backfill")
    assert (ended["status"], ended["exit_code"]) == ("failed", ExitCode.TEMPORARY)
    assert {(row["state"], row["attempts"]) for row in progress(connection).values()} == {("pending", 0)}
    sim.clear_faults()
    assert run(users=whales[:2], deadline=timedelta(seconds=15)).status == "ok"


def test_no_more_weight_is_spent_than_was_allowed(run, sim, world, connection, done):
    spent = 0
    for most in (50, 700, 1500):
        report = run(max_weight=most)
        assert report.exit_code == ExitCode.OK
        assert report.details["wallets_left"] > 0
        weight = sum(served.weight for served in sim.log) - spent
        spent += weight
        # Not less either: what is left would not be enough for a few questions at once.
        assert most - 8 * 42 <= weight <= most
        assert report.numbers["weight"] == weight
    run()
    # What was answered is not asked for again, but where the last weight was missing for a second question about it.
    assert world.repeats() <= 3 * 8
    done()


def test_a_limit_is_exact(run, world, connection, done):
    finished = 0
    for limit, concurrency in ((1, 8), (7, 8), (8, 3), (9, 8), (5, 1)):
        report = run(limit=limit, concurrency=concurrency)
        finished += limit
        assert (report.numbers["units_ok"], report.details["wallets_left"]) == (limit, 60 - finished)
        assert len({question.user for question in world.asked}) == finished
    run()
    assert world.asked_twice() == {}
    done()


# --- the source fails ---------------------------------------------------------------------------------------------


def test_a_wallet_that_always_fails_costs_no_other_and_rests(run, sim, world, whales, connection, done):
    watch(connection, world.addresses)
    busy, odd = whales[0], whales[30]
    sim.add_fault(Fault(FILLS, "status", times=None, after=3, address=busy, status=500, body="null"))
    sim.add_fault(Fault(FILLS, "status", times=None, address=odd, status=422))
    report = run(users=None)
    assert (report.status, report.exit_code) == ("partial", ExitCode.PARTIAL)
    assert (report.numbers["units_ok"], report.numbers["units_failed"]) == (58, 2)
    assert sorted(told.split(":")[0] for told in report.failed) == sorted((busy, odd))
    found = progress(connection)
    assert {user for user, row in found.items() if row["state"] == "failed"} == {busy, odd}
    assert ["HTTP 500" in found[busy]["error"], "HTTP 422" in found[odd]["error"]] == [True, True]
    # Others of the three questions may have been for the oldest fill of all, or for the end of a full millisecond.
    assert 1 <= found[busy]["pages"] <= 3
    assert_adds_up(connection)
    assert_nothing_left(connection)
    # They are not asked for again at once, and by nobody who does not name them.
    asked = len(world.asked)
    assert run(users=None).exit_code == ExitCode.OK
    assert len(world.asked) == asked
    sim.clear_faults()
    assert run(users=[busy]).numbers["units_ok"] == 1
    assert {question.user for question in world.asked[asked:]} == {busy}
    assert states(connection)[odd] == "failed"
    run(users=[odd])
    done()


def test_a_wallet_that_failed_is_tried_again_after_an_hour(run, sim, world, whales, connection, done):
    watch(connection, world.addresses)
    sim.add_fault(Fault(FILLS, "status", times=1, address=whales[3], status=422))
    assert run(users=None).exit_code == ExitCode.PARTIAL
    connection.execute("update backfill_progress set updated_at = updated_at - interval '61 minutes'")
    assert run(users=None).numbers["units_ok"] == 1
    done()


def test_what_the_source_refuses_fails_its_wallet_however_little_time_is_left(
    run, sim, world, whales, connection
):
    users = whales[-4:]
    sim.add_fault(Fault(FILLS, "status", times=None, address=users[0], status=422))
    report = run(users=users, deadline=timedelta(seconds=19))
    assert (report.status, report.numbers["units_failed"]) == ("partial", 1)
    assert "ended_by" not in report.details
    assert sorted(states(connection).values()) == ["complete", "complete", "complete", "failed"]


STORMS = {
    "429": {"kind": "status", "status": 429, "headers": {"Retry-After": "1"}, "times": 4},
    "503": {"kind": "status", "status": 503, "times": 5},
    "500 null": {"kind": "status", "status": 500, "body": "null", "times": 5},
    "cut off": {"kind": "cut", "share": 0.6, "times": 5},
    "cut off in a chunk": {"kind": "cut_chunked", "share": 0.9, "times": 5},
    "closed before its end": {"kind": "cut_close", "share": 0.99, "times": 5},
    "a page": {"kind": "html", "times": 5},
    "reset": {"kind": "reset", "times": 5},
}


def test_storms_pass(run, sim, world, connection, done):
    """All of them, one after the other; no wallet fails of it."""
    for place, fault in enumerate(STORMS.values()):
        sim.add_fault(Fault(FILLS, after=5 + place * 16, **fault))
    # A thread's question meets at most a few of them.
    assert run().status == "ok"
    assert {served.fault for served in sim.log} >= {fault["kind"] for fault in STORMS.values()}
    done()


@pytest.fixture
def three_at_most_uncounted(world, connection):
    """Let no more than three wallets fail that are not counted yet: the threads run ahead of who counts."""
    failed = "select coalesce(sum(units_failed), 0) from ingestion_runs"

    def is_next():
        if world.before_answer is None:
            return True
        (counted,) = connection.execute(failed).fetchone()
        return len({question.user for question in world.asked}) <= counted + 3

    world.before_answer = lambda: until(is_next, "the failures to be counted")
    yield
    world.before_answer = None


@pytest.mark.usefixtures("three_at_most_uncounted")
def test_an_outage_ends_the_run_after_a_few_wallets(run, sim, world, done):
    sim.add_fault(Fault(FILLS, "status", times=None, status=502))
    report = run(concurrency=3)
    assert (report.status, report.exit_code) == ("failed", ExitCode.TEMPORARY)
    assert 10 <= report.numbers["units_failed"] <= 12
    # Each thread may have asked for one more.
    assert len({question.user for question in world.asked}) <= 12 + 3
    # It was not the wallets: none of them rests.
    assert report.details["wallets_left"] == 60
    world.before_answer = None
    sim.clear_faults()
    assert run().status == "ok"
    done()


@pytest.mark.usefixtures("three_at_most_uncounted")
def test_a_source_that_will_hear_of_no_wallet_is_not_asked_of_them_all(run, sim, world):
    sim.add_fault(Fault(FILLS, "status", times=None, status=404))
    report = run(concurrency=3)
    assert (report.status, report.exit_code) == ("failed", ExitCode.TEMPORARY)
    assert 30 <= report.numbers["units_failed"] <= 32
    assert len(world.asked) <= 32 + 3


def test_a_run_whose_window_another_one_replaced_says_so(run, world, connection):
    users = world.addresses[:12]
    mine, others = Options().until, Options().since + timedelta(days=30)
    connection.execute(
        "create function narrow() returns trigger language plpgsql as $$ begin"
        f" new.wanted_to = '{others:%Y-%m-%d}'; return new; end $$"
    )
    connection.execute(
        "create trigger narrow before update on backfill_progress for each row when (new.state = 'running')"
        " execute function narrow()"
    )
    report = run(users=users, until=mine)
    assert (report.status, report.exit_code) == ("partial", ExitCode.PARTIAL)
    assert "another run has asked for another window" in report.failed[0]


def test_an_outage_in_mid_run_leaves_the_rest_to_the_next(run, sim, world, connection, done):
    sim.add_fault(Fault(FILLS, "status", times=None, after=15, status=502))
    report = run(concurrency=3)
    assert (report.status, report.exit_code) == ("partial", ExitCode.PARTIAL)
    assert report.details["wallets_left"] > 10
    sim.clear_faults()
    assert run().status == "ok"
    done()


WRONG = {
    "an object": {"kind": "replace", "body": '{"fills":[]}'},
    "null": {"kind": "null"},
    "a number": {"kind": "replace", "body": "5"},
    "text": {"kind": "replace", "body": '"busy"'},
    "deep": {"kind": "deep"},
    "an integer of 5000 digits": {"kind": "bigint"},
    "a full page without times": {"kind": "replace", "body": json.dumps([{"coin": "BTC"}] * PAGE)},
    "fills of another time": {"kind": "replace", "body": json.dumps([{"coin": "BTC", "time": 1}])},
    "a page in no order": {
        "kind": "patch",
        "patch": lambda page: [page[0], page[-1], *page[1:-1]] if len(page) == PAGE else page,
    },
}


def test_an_answer_of_a_wrong_shape_fails_its_wallet_alone(run, sim, world, whales, connection, done):
    """One of the wallets with several pages for the last, any other for the rest."""
    victims = dict(zip([*whales[1 : len(WRONG)], whales[0]], WRONG.values(), strict=True))
    for user, fault in victims.items():
        sim.add_fault(Fault(FILLS, times=None, address=user, **fault))
    report = run()
    assert (report.exit_code, report.numbers["units_failed"]) == (ExitCode.PARTIAL, len(WRONG))
    found = progress(connection)
    assert {user for user, row in found.items() if row["state"] == "failed"} == set(victims)
    assert all(found[user]["error"] and found[user]["error"].isprintable() for user in victims)
    rows, _ = world.expected(now_ms(), users=[user for user in world.addresses if user not in victims])
    assert_same_fills(connection, rows, besides=victims)
    assert connection.execute("select count(*) from rejected_rows").fetchone() == (0,)
    assert_adds_up(connection)
    sim.clear_faults()
    assert run().status == "ok"
    done()


def test_rows_that_are_no_fills_are_quarantined_with_a_reason(run, sim, world, whales, connection):
    user = whales[0]
    served = world.served_of(user, now_ms())
    at_once = Counter(row["time"] for row in served)
    fills = [row for row in served if row["time"] < S3_BEGINS_MS and at_once[row["time"]] == 1][:3]
    plain = [{name: value for name, value in row.items() if name != "user"} for row in fills]
    spoilt = [
        1, None, "x", {},
        {**plain[1], "px": "NaN"},
        {**plain[1], "sz": None},
        {**plain[1], "side": "C"},
        {**plain[1], "time": "soon"},
        {**plain[1], "tid": "x"},
    ]  # fmt: skip
    body = json.dumps([plain[0], *spoilt, plain[2]])
    sim.add_fault(Fault(FILLS, "replace", address=user, body=body))
    # The window ends with them, as what is served of later times is not spoilt.
    report = run(users=[user], until=datetime.fromtimestamp((plain[2]["time"] + 1) / 1000, UTC))
    assert report.numbers["served"] == 2 + len(spoilt)
    assert report.numbers["rejected"] == len(spoilt)
    assert set(connection.execute("select tid, oid from fills")) == {
        (fill["tid"], fill["oid"]) for fill in (plain[0], plain[2])
    }
    reasons = [reason for (reason,) in connection.execute("select reason from rejected_rows")]
    assert len(reasons) == len(spoilt)
    assert all(reasons)
    assert_adds_up(connection)
    assert_nothing_left(connection)


def hang_up(sim, connection, role):
    """End a connection of the run at the 21st answer; the list that is returned then tells of it."""
    cut = []

    def patch(answer):
        cut.extend(
            connection.execute(
                "select pg_terminate_backend(pid) from pg_stat_activity where datname = current_database()"
                " and application_name = %s",
                (f"hlcli:{role}",),
            )
        )
        return answer

    sim.add_fault(Fault(FILLS, "patch", after=20, patch=patch))
    return cut


@pytest.mark.parametrize("role", ["backfill", "backfill_queue"])
def test_a_lost_database_connection_ends_the_run_and_the_next_one_finishes(
    run, sim, world, connection, done, role
):
    cut = hang_up(sim, connection, role)
    with pytest.raises(psycopg.OperationalError) as caught:
        run(lease=timedelta(seconds=2))
    assert (exit_code_for(caught.value), cut) == (ExitCode.TEMPORARY, [(True,)])
    (ended,) = runs(connection, "backfill")
    assert (ended["status"], ended["exit_code"]) == ("failed", 4)
    # Whatever is leased still is so for no longer than a lease.
    leased = connection.execute(
        "select max(lease_expires_at - clock_timestamp()) from backfill_progress"
    ).fetchone()[0]
    assert leased is None or leased <= timedelta(seconds=2)
    assert run().status == "ok"
    done()


def test_a_lost_budget_connection_is_opened_again(run, sim, connection, done):
    cut = hang_up(sim, connection, "budget")
    assert run().status == "ok"
    assert cut == [(True,)]
    done()


def test_a_wallet_over_which_five_workers_ended_is_left_alone(
    run, sim, world, whales, settings, connection, done
):
    watch(connection, world.addresses)
    deadly = whales[5]
    for _ in range(MOST_ATTEMPTS):
        with psycopg.connect(settings().database_url, autocommit=True) as other:
            queue = Queue(other, uuid4(), Shard(0, 1), timedelta(milliseconds=1), [deadly])
            if not progress(connection):
                queue.want(Options().window)
            (lease,) = queue.claim(1)
            assert lease.user == deadly
            time.sleep(0.01)
    report = run(users=None)
    assert deadly not in {question.user for question in world.asked}
    row = progress(connection)[deadly]
    assert (row["state"], row["attempts"]) == ("failed", MOST_ATTEMPTS)
    assert "workers in a row" in row["error"]
    # It must not look as if all were well.
    assert (report.status, report.exit_code) == ("partial", ExitCode.PARTIAL)
    assert run(users=[deadly]).status == "ok"
    done()


# --- slices of TWAPs ----------------------------------------------------------------------------------------------


@pytest.fixture
def recent(rng):
    """A world of which a quarter is of the last ten days."""
    return World(
        rng.randrange(2**32),
        wallets=24,
        fills=4_000,
        page_limit=PAGE,
        history_limit=None,
        recent_before_ms=now_ms() - 120_000,
    )


def test_slices_are_asked_for_where_the_window_reaches_into_what_is_kept(
    settings, recent, connection, monkeypatch
):
    now = datetime.now(UTC)
    with Simulator(vaults=1, weight_per_minute=SERVER_WEIGHT, user_fills=recent) as sim:

        def run(end):
            begins = len(recent.asked)
            made = settings(**sim.env(), **PLENTY)
            assert backfill(made, Options(users=recent.addresses, page_size=PAGE, until=end)).status == "ok"
            return {question for question in recent.asked[begins:] if question.kind == SLICES}

        assert run(now - timedelta(days=13, minutes=1)) == set()
        asked = run(now - timedelta(days=12))
        assert {question.user for question in asked} == set(recent.addresses)
        # Not from the beginning on: what is older is not kept.
        first = int((now - timedelta(days=13)).timestamp() * 1000) - 1000
        assert min(question.start for question in asked) >= first
        until_ms = int((now - timedelta(minutes=2)).timestamp() * 1000)
        asked = run(datetime.fromtimestamp(until_ms / 1000, UTC))
        assert {question.user for question in asked} == set(recent.addresses)
        rows, _ = recent.expected(now_ms(), until_ms=until_ms)
        assert_same_fills(connection, rows)
        slices = [row for row in rows if row["twap_id"] is not None]
        assert len(slices) > 10
        assert set(states(connection).values()) <= {"complete", "truncated"}
        assert_nothing_left(connection)


# --- the whole, at length -----------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("later", [None, 6], ids=["always four", "six after four"])
def test_five_thousand_wallets_and_four_workers_that_die_again_and_again(
    spawn, connection, settings, rng, tmp_path, later, capsys
):
    began = time.monotonic()
    world = World(rng.randrange(2**32), wallets=5_000, fills=200_000, page_limit=100, bursts=5)
    world.fills_of(world.addresses[0])
    with Simulator(vaults=1, weight_per_minute=SERVER_WEIGHT, user_fills=world) as sim:
        fleet = Fleet(spawn, sim, world, tmp_path / "users", connection, "--lease", "3s")
        kill_fleet(fleet, world, rng, kills=5, workers=4, later_workers=later)

        def again(egress):
            made = settings(**sim.env(), HL_EGRESS_KEY=egress)
            return backfill(made, Options(users=world.addresses, page_size=world.page_limit))

        assert_nothing_is_left_to_ask(again, world, connection)
    seconds = time.monotonic() - began
    assert_done(connection, world, now_ms())
    lost = sum(each.get("lost_leases", 0) for each in details(connection))
    with capsys.disabled():
        print(
            f"\nworld {world.seed}: {fleet.kills} kills, {len(runs(connection, 'backfill'))} runs,"
            f" {len(world.asked):,} questions, {world.repeats():,} of them again,"
            f" {lost} leases lost, {seconds:.0f} s"
        )
