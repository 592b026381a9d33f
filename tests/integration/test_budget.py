"""The weight budget (promise G6), on a real database, over threads and processes.

Waiting a minute for weight to come free would make every test a minute long. Instead time is let pass by moving the
buckets into the past: `pass_time` is what the database sees when nothing happens for so long.
"""

import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from dataclasses import dataclass, field

import psycopg
import pytest
from budget_clock import FULL, Address, Clock, simulate_clock, wallet

import hlcli.budget
from hlcli.budget import MARGIN_S, Budget, DeadlineError, Priority
from hlcli.http import HttpClient, SourceError, StatusError
from hlcli.sim import Fault, Simulator

KEY = "test"
URGENT, NORMAL, BULK = (int(priority) for priority in Priority)
# A bucket counts until the whole of its second is out of the window.
WINDOW_S = 60 + MARGIN_S


@pytest.fixture
def make(settings):
    """Make Budget objects that are closed after the test."""
    made = []

    def budget(**env) -> Budget:
        made.append(Budget(settings(**env)))
        return made[-1]

    yield budget
    for one in made:
        one.close()


@dataclass
class Sql:
    """The two functions, called without waiting."""

    connection: psycopg.Connection
    limit: int = 200
    requests: int | None = None
    key: str = KEY
    passed: int = 0
    _ids: dict[str, uuid.UUID] = field(default_factory=dict)

    def ask(self, weight: int, rank: int = NORMAL, who: str | None = None) -> tuple[float, int | None]:
        """Seconds to wait and the granted second; `who` asks again as the same waiter."""
        waiter = self._ids.setdefault(who, uuid.uuid4()) if who else uuid.uuid4()
        return self.connection.execute(
            "select wait_s, granted_second from budget_reserve(%s, %s, %s, %s, %s, %s, %s)",
            (self.key, waiter, weight, rank, self.limit, self.requests, MARGIN_S),
        ).fetchone()

    def granted(self, weight: int, rank: int = NORMAL, who: str | None = None) -> int | None:
        return self.ask(weight, rank, who)[1]

    def settle(
        self, second: int, reserved: int, cost: int, rank: int = NORMAL, refused_s: float | None = None
    ) -> None:
        self.connection.execute(
            "select budget_settle(%s, %s, %s, %s, %s, %s, %s)",
            (self.key, second, reserved, cost, rank, refused_s, self.limit),
        )

    def pass_time(self, seconds: int) -> None:
        """Let so many seconds pass for everything but the waiters, which in truth would keep asking."""
        with self.connection.transaction():
            # Two steps: a bucket may move onto the second of another one that has yet to move.
            for shift in (-(10**12) - seconds, 10**12):
                self.connection.execute(
                    "update rate_budget_buckets set second = second + %s where egress_key = %s",
                    (shift, self.key),
                )
            self.connection.execute(
                "update rate_budget set blocked_until = blocked_until - make_interval(secs => %(s)s),"
                " paced_until = paced_until - make_interval(secs => %(s)s),"
                " urgent_at = urgent_at - make_interval(secs => %(s)s) where egress_key = %(key)s",
                {"s": seconds, "key": self.key},
            )
        self.passed += seconds

    @property
    def now(self) -> float:
        return self.one("select extract(epoch from clock_timestamp())::float8")

    @property
    def waiters(self) -> int:
        return self.one("select count(*) from rate_budget_waiters")

    @property
    def used(self) -> int:
        return self.one(
            "select coalesce(sum(weight), 0)::int from rate_budget_buckets where egress_key = %s", self.key
        )

    @property
    def blocked_s(self) -> float:
        return self.one(
            "select extract(epoch from blocked_until - clock_timestamp())::float8 from rate_budget"
            " where egress_key = %s",
            self.key,
        )

    def one(self, query: str, *values: object):
        return self.connection.execute(query, values).fetchone()[0]


@pytest.fixture
def sql(connection):
    return Sql(connection)


# The limit


def test_no_window_ever_holds_more_than_the_limit(sql, rng):
    """Random requests, refunds and pauses, against a list of what a server could have charged, and when."""
    charges: list[list[float]] = []  # granted at, settled at, cost
    flying: list[tuple[int, int, int, list[float]]] = []
    granted = 0
    for _ in range(1500):
        move = rng.random()
        if move < 0.6:
            weight, rank = rng.choice([2, 20, 20, 60, 120]), rng.choice([URGENT, NORMAL, BULK])
            # Waiters are the subject of other tests; here every refused caller gives up.
            _, second = sql.ask(weight, rank)
            sql.connection.execute("delete from rate_budget_waiters")
            if second is None:
                continue
            granted += 1
            now = sql.now + sql.passed
            charge = [now, float("inf"), weight]
            charges.append(charge)
            flying.append((second + sql.passed, weight, rank, charge))
            # A server charges at some moment between grant and answer. Whatever it chooses, the sixty seconds
            # up to this grant must hold.
            worst = sum(cost for _, settled, cost in charges if settled >= now - 60)
            assert worst <= sql.limit, (now, charges[-20:])
        elif move < 0.9 and flying:
            second, weight, rank, charge = flying.pop(rng.randrange(len(flying)))
            cost = rng.randrange(weight + 1)
            sql.settle(second - sql.passed, weight, cost, rank)
            charge[1:] = [sql.now + sql.passed, cost]
        else:
            # No request stays in the air for longer than a minute: its time-out is half of that.
            oldest = min((charge[0] for *_, charge in flying), default=float("inf"))
            seconds = rng.choice([1, 1, 3, 10, 25])
            if sql.now + sql.passed + seconds - oldest < 50:
                sql.pass_time(seconds)
    assert granted > 100, "or nothing was tested"


SPENDER = """
import json, random, sys, threading, time
from hlcli import settings
from hlcli.budget import Budget, DeadlineError, Priority
url, limit, seed, threads = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
budget = Budget(settings.from_env({"DATABASE_URL": url, "HL_EGRESS_KEY": "test", "HL_API_WEIGHT_PER_MINUTE": limit}))
print("ready", flush=True)
sys.stdin.readline()
ends = time.monotonic() + 3
costs = []
def spend(number):
    rng = random.Random(f"{seed}/{number}")
    while True:
        weight = rng.choice([2, 20, 20, 120])
        try:
            grant = budget.reserve(weight, Priority.NORMAL, deadline=ends)
        except DeadlineError:
            return
        cost = rng.randrange(weight + 1)
        budget.settle(grant, cost)
        costs.append(cost)
workers = [threading.Thread(target=spend, args=(n,)) for n in range(threads)]
for worker in workers: worker.start()
for worker in workers: worker.join()
print(json.dumps(costs))
"""


def spenders(database: str, limit: int, seed: int, count: int, threads: int) -> list[subprocess.Popen[str]]:
    """Processes that all spend at once for three seconds."""
    started = [
        subprocess.Popen(
            [sys.executable, "-c", SPENDER, database, str(limit), f"{seed}/{number}", str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(count)
    ]
    for process in started:
        assert process.stdout.readline() == "ready\n"
    for process in started:
        process.stdin.write("go\n")
        process.stdin.flush()
    return started


def test_threads_and_processes_together_stay_below_the_limit_and_use_it(database, sql, rng):
    sql.limit = 600
    costs: list[int] = []
    for process in spenders(database, sql.limit, rng.randrange(10**9), 3, 4):
        out, _ = process.communicate(timeout=60)
        assert process.returncode == 0
        costs += json.loads(out)
    assert sum(costs) <= sql.limit, "all of it within one window"
    assert sum(costs) > sql.limit - 150, "what was given back was granted again"
    assert (sql.used, sql.waiters) == (sum(costs), 0)
    assert sql.one("select sum(requests) from rate_budget_buckets") == len(costs)


def test_the_first_use_of_a_key_by_many_threads_at_once(make):
    budgets = [make(HL_EGRESS_KEY="never seen") for _ in range(12)]
    start, grants, errors = threading.Barrier(12), [], []

    def first(budget):
        try:
            start.wait(30)
            grants.append(budget.reserve(20, Priority.NORMAL, deadline=time.monotonic() + 60))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=first, args=(budget,)) for budget in budgets]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(90)
    assert (len(grants), errors) == (12, [])


def test_callers_at_the_same_instant_never_share_the_last_of_the_weight(database):
    callers, rounds = 8, 15
    start, granted = threading.Barrier(callers), []

    def ask():
        with psycopg.connect(database, autocommit=True) as own:
            for number in range(rounds):
                sql = Sql(own, limit=60, key=f"round {number}")
                start.wait(60)
                if sql.granted(20, URGENT) is not None:
                    granted.append(number)

    threads = [threading.Thread(target=ask) for _ in range(callers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(90)
    # Waiters count as ahead of whoever came later, so nobody but the first three is served.
    assert sorted(granted) == sorted(list(range(rounds)) * 3)


def test_one_budget_is_shared_by_threads(make, sql):
    budget = make()
    errors = []

    def spend():
        try:
            for _ in range(5):
                budget.settle(budget.reserve(20, Priority.NORMAL, deadline=time.monotonic() + 60), 3)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=spend) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(90)
    assert (errors, budget.requests, budget.weight, sql.used) == ([], 40, 120, 120)


@pytest.mark.parametrize("limit", [20, 200, 1200])
def test_the_whole_limit_is_granted_to_a_job_that_is_alone(sql, limit):
    sql.limit = limit
    for _ in range(limit // 20):
        assert sql.granted(20) is not None
    assert sql.granted(2, who="me") is None
    sql.pass_time(62)
    assert sql.granted(2, who="me") is not None


@pytest.mark.parametrize("rank", Priority)
def test_a_request_dearer_than_the_limit_is_served_alone(sql, rank):
    sql.limit = 20
    assert sql.granted(120, rank) is not None
    assert sql.granted(120, rank, "next") is None
    # Six minutes' weight: bulk waits for all of them, the others until the window is empty.
    sql.pass_time(362 if rank == BULK else 62)
    assert sql.granted(120, rank, "next") is not None


def test_what_is_given_back_can_be_granted_again(sql):
    second = sql.granted(200)
    assert sql.granted(120) is None
    sql.connection.execute("delete from rate_budget_waiters")
    sql.settle(second, 200, 80)
    assert sql.used == 80
    assert sql.granted(120) is not None
    assert sql.granted(2) is None


def test_a_charge_counts_from_its_answer_not_from_its_request(sql):
    second = sql.granted(200)
    sql.pass_time(40)
    sql.settle(second - 40, 200, 200)
    sql.pass_time(30)
    assert sql.granted(2) is None, "the server may have charged it only thirty seconds ago"
    sql.pass_time(32)
    sql.connection.execute("delete from rate_budget_waiters")
    assert sql.granted(200) is not None


def test_an_answer_later_than_the_window_is_charged(sql):
    second = sql.granted(100)
    sql.pass_time(300)
    assert sql.granted(20) is not None
    sql.settle(second - 300, 100, 90)
    assert sql.used == 110


def test_what_does_not_fit_waits_for_the_right_time(sql, make):
    budget = make(HL_API_WEIGHT_PER_MINUTE="200")
    sql.granted(200)
    second = int(sql.now - WINDOW_S)
    # It leaves the window within a second.
    sql.connection.execute("update rate_budget_buckets set second = %s", (second,))
    leaves = second + 1 + WINDOW_S
    before = sql.now
    wait, granted = sql.ask(120, who="me")
    if granted is None:  # else the second ended just now
        assert leaves - sql.now - 0.01 <= wait <= max(leaves - before, 0.01) + 0.001
    sql.connection.execute("delete from rate_budget_waiters")
    if granted is None:
        budget.reserve(120, Priority.NORMAL, deadline=time.monotonic() + 60)
    assert sql.now >= leaves


def test_nobody_waits_longer_than_a_second_before_asking_again(sql):
    sql.granted(200)
    for rank in Priority:
        wait, second = sql.ask(20, rank)
        assert second is None
        assert 0 < wait <= 1


# Who comes first


def test_a_dear_request_is_not_starved_by_cheap_ones(sql):
    for _ in range(10):
        sql.granted(20)
        sql.pass_time(5)
    assert sql.granted(120, who="dear") is None
    served = []
    for _ in range(40):
        served += ["cheap" for number in range(8) if sql.granted(20, who=f"cheap {number}") is not None]
        if sql.granted(120, who="dear") is not None:
            break
        sql.pass_time(1)
    else:
        pytest.fail("the dear request was never served")
    assert served == []


def test_the_order_of_arrival_holds_within_a_priority(sql, rng):
    sql.granted(200)
    names = [f"caller {number}" for number in range(6)]
    for name in names:
        assert sql.granted(40, who=name) is None
    sql.pass_time(62)
    # Whoever asks again first, room for five goes to the first five.
    shuffled = rng.sample(names, len(names))
    assert {name for name in shuffled if sql.granted(40, who=name) is not None} == set(names[:5])


def test_a_waiter_that_fits_beside_those_ahead_need_not_wait_for_them(sql):
    sql.granted(60)
    sql.pass_time(10)
    sql.granted(60)
    assert sql.granted(60, who="first") is not None
    assert sql.granted(120, who="dear") is None
    assert sql.granted(20, who="late") is None, "it would take what the dear one waits for"
    sql.pass_time(52)
    assert sql.granted(120, who="dear") is None or sql.used <= sql.limit


@pytest.mark.parametrize("below", [NORMAL, BULK])
def test_a_higher_priority_overtakes(sql, below):
    sql.granted(200)
    assert sql.granted(120, below, "first") is None
    assert sql.granted(120, below - 1, "later") is None
    sql.pass_time(62)
    assert sql.granted(120, below, "first") is None
    assert sql.granted(120, below - 1, "later") is not None


def test_an_urgent_caller_is_served_at_once_while_bulk_saturates(sql):
    sql.limit = 1200
    # The reserve is kept for ten minutes after an urgent caller.
    assert sql.granted(20, URGENT) is not None
    for minute in range(3):
        taken = 0
        for _ in range(60):
            while sql.granted(20, BULK, "bulk") is not None:
                taken += 1
            sql.pass_time(1)
        if minute:
            assert taken * 20 > 1100, "bulk uses what nobody else wants"
        assert sql.granted(20, URGENT) is not None, f"minute {minute}"


def test_the_reserve_is_kept_only_while_urgent_callers_are_about(sql):
    sql.limit = 1200

    def taken() -> int:
        """What bulk callers that ask for full pages hold after two minutes."""
        for _ in range(120):
            sql.granted(120, BULK, "bulk")
            sql.pass_time(1)
        sql.connection.execute("delete from rate_budget_waiters")
        return sql.used

    assert taken() == 1200
    sql.pass_time(100)
    assert sql.granted(2, URGENT) is not None
    assert taken() == 1080
    # 120 s of this, and of the ten minutes that are counted from the urgent caller, are over.
    sql.pass_time(500)
    assert taken() == 1200


@pytest.mark.parametrize(("urgent", "after_s"), [(False, 1), (True, 4)])
def test_a_second_page_may_fly_sooner_while_no_urgent_caller_is_about(sql, urgent, after_s):
    sql.limit = 1200
    if urgent:
        assert sql.granted(120, URGENT) is not None
    assert sql.granted(120, BULK) is not None
    assert sql.granted(120, BULK, "second") is None
    sql.pass_time(after_s - 1)
    assert sql.granted(120, BULK, "second") is None
    sql.pass_time(1)
    assert sql.granted(120, BULK, "second") is not None


def test_the_first_urgent_caller_after_a_long_silence_overtakes_all_bulk_callers(sql):
    sql.limit = 1200
    callers = [f"bulk {number}" for number in range(8)]
    for _ in range(180):
        for who in callers:
            sql.granted(20, BULK, who)
        sql.pass_time(1)
    assert sql.used > 1000, "bulk callers use what nobody else wants"
    seconds = 0
    while sql.granted(20, URGENT, "urgent") is None:
        assert [sql.granted(20, BULK, who) for who in callers] == [None] * 8
        sql.pass_time(1)
        seconds += 1
    assert seconds <= 6, "bulk callers are paced: no gap is longer than a second and their credit of 3.3 s"


# Under a simulated clock: a backfill alone, eight requests in the air, answers after 0.2 to 3 s


@pytest.fixture
def backfill(connection, rng):
    """Start a backfill of wallets of so many pages; 0: of full pages only."""
    simulate_clock(connection)

    def start(pages: int) -> Address:
        address = Address(Clock(connection, rng), lambda: rng.uniform(0.2, 3))
        address.backfill(wallet(rng, pages) if pages else [FULL] for _ in itertools.count())
        return address

    return start


# Before a request is sent, all of its 120 must be free. Of short pages alone the window so never holds more than
# 1200 - 120 and the last of them, and that for 60 of some 63 seconds: it counts from before the request until a
# minute after its answer, in whole seconds.
@pytest.mark.parametrize(("pages", "least"), [(0, 0.95), (3, 0.86), (1, 0.79)])
def test_a_backfill_alone_uses_the_limit_and_is_never_refused(backfill, pages, least):
    address = backfill(pages)
    address.clock.run(600)
    assert address.used(60) >= least
    assert (address.window.refused, address.window.peak <= address.limit) == (0, True)


@pytest.mark.parametrize(("pages", "most_s"), [(0, 15), (1, 3)])
def test_an_urgent_caller_comes_before_every_page_that_waits(backfill, pages, most_s):
    address = backfill(pages)
    address.clock.run(150)
    # More than is kept for urgent callers anyway.
    address.ask(60, 60, Priority.URGENT)
    address.clock.run(30)
    (urgent,) = [one for one in address.served if one.priority == Priority.URGENT]
    assert urgent.granted - urgent.asked < most_s, "the time until the next page leaves the window"
    between = [one for one in address.served if urgent.asked < one.granted < urgent.granted]
    # A page may go while the urgent caller is on its way back; it takes nothing of what that one waits for.
    assert all(one.free >= 60 for one in between)
    assert address.window.refused == 0


def test_bulk_gets_no_more_than_its_share_of_a_second(sql):
    sql.limit = 1200
    assert sql.granted(20, BULK) is not None
    burst = 1
    while sql.granted(20, BULK, "bulk") is not None:
        burst += 1
    assert burst <= 5, "the rest of the minute would be empty"


def test_normal_callers_are_paced_only_while_urgent_ones_are_about(sql):
    sql.limit = 1200
    for _ in range(20):
        assert sql.granted(20) is not None
    sql.pass_time(120)
    assert sql.granted(20, URGENT) is not None
    granted = [sql.granted(20, who="normal") for _ in range(20)]
    assert None in granted
    sql.pass_time(660)
    sql.connection.execute("delete from rate_budget_waiters")
    assert None not in [sql.granted(20) for _ in range(20)]


def test_bulk_is_served_beside_urgent_callers_that_take_nearly_all(sql):
    sql.limit = 1200
    served = 0
    for _ in range(130):
        for _ in range(17):
            sql.granted(1, URGENT)
        sql.connection.execute("delete from rate_budget_waiters where priority = 0")
        served += sql.granted(20, BULK, "bulk") is not None
        sql.pass_time(1)
    assert served >= 5


@pytest.mark.parametrize("rank", [URGENT, NORMAL])
def test_a_dead_waiter_blocks_nobody_beyond_its_expiry(sql, rank):
    sql.granted(100)
    # It asks once and never comes back.
    assert sql.granted(120, rank, "dead") is None
    assert sql.granted(60) is None
    expires = sql.one(
        "select extract(epoch from max(expires_at) - clock_timestamp())::float8 from rate_budget_waiters"
    )
    assert 0 < expires <= 4
    sql.connection.execute("update rate_budget_waiters set expires_at = expires_at - interval '4.1 s'")
    assert sql.granted(60) is not None
    assert sql.waiters == 0


HOLDER = """
import sys, time
from hlcli import settings
from hlcli.budget import Budget, Priority
env = {"DATABASE_URL": sys.argv[1], "HL_EGRESS_KEY": "test", "HL_API_WEIGHT_PER_MINUTE": "200"}
Budget(settings.from_env(env)).reserve(200, Priority.NORMAL, deadline=time.monotonic() + 30)
print("granted", flush=True)
time.sleep(60)
"""


def test_the_reservation_of_a_killed_process_expires(database, sql):
    killed = subprocess.Popen(
        [
            sys.executable,
            "-c",
            HOLDER,
            database,
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert killed.stdout.readline() == "granted\n"
    os.kill(killed.pid, signal.SIGKILL)
    killed.communicate()
    assert sql.granted(20, who="me") is None, "its request may be on the way"
    sql.pass_time(62)
    assert sql.granted(20, who="me") is not None


# Deadlines


def test_a_deadline_charges_nothing_and_leaves_no_waiter(make, sql):
    budget = make(HL_API_WEIGHT_PER_MINUTE="200")
    budget.reserve(200, Priority.NORMAL, deadline=time.monotonic() + 60)
    for priority in Priority:
        with pytest.raises(DeadlineError):
            budget.reserve(20, priority, deadline=time.monotonic() + 0.2)
    assert (sql.used, sql.waiters, budget.requests, budget.weight) == (200, 0, 0, 0)


def test_a_deadline_in_the_past_still_takes_what_is_free_at_once(make, sql):
    assert make().reserve(20, Priority.NORMAL, deadline=time.monotonic() - 1).weight == 20


# Requests a minute


def test_the_cap_on_requests_holds_beside_the_weight(sql):
    sql.limit, sql.requests = 1200, 5
    assert None not in [sql.granted(2) for _ in range(5)]
    wait, second = sql.ask(2, who="me")
    assert (second, wait) == (None, 1.0)
    sql.pass_time(62)
    assert sql.granted(2, who="me") is not None


def test_the_cap_on_requests_is_read_from_the_settings(make):
    budget = make(HL_API_REQUESTS_PER_MINUTE="2")
    for _ in range(2):
        budget.settle(budget.reserve(20, Priority.NORMAL, deadline=time.monotonic() + 60), 20)
    with pytest.raises(DeadlineError):
        budget.reserve(2, Priority.URGENT, deadline=time.monotonic())


# 429


def test_a_429_closes_the_gate_for_every_process_of_the_key_and_for_no_other(make, sql):
    first, second, other = make(), make(), make(HL_EGRESS_KEY="elsewhere")
    with Simulator(
        vaults=5, faults=[Fault("*", "status", status=429, headers={"Retry-After": "30"})]
    ) as exchange:
        client = HttpClient(budget=first, deadline=time.monotonic() + 3)
        with pytest.raises((DeadlineError, StatusError)):
            client.post_json(exchange.info_url, {"type": "vaultDetails"}, weight=20)
        client.close()
        assert exchange.count() == 1
    for priority in Priority:
        with pytest.raises(DeadlineError):
            second.reserve(2, priority, deadline=time.monotonic() + 0.1)
    assert 0 < sql.blocked_s <= 30
    other.reserve(20, Priority.NORMAL, deadline=time.monotonic())
    sql.pass_time(30)
    second.reserve(20, Priority.NORMAL, deadline=time.monotonic())


def test_strikes_grow_and_a_served_request_resets_them(sql):
    def refused() -> float:
        sql.settle(sql.granted(2), 2, 2, refused_s=0)
        seconds = sql.blocked_s
        sql.pass_time(61)
        return seconds

    # What is left of the wait when it is read: a little less than what was set.
    expected = [10, 20, 40, 60, 60, 60]
    assert [-(-refused() // 5) * 5 for _ in expected] == expected
    sql.settle(sql.granted(2), 2, 2)
    assert sql.one("select strikes from rate_budget") == 0
    assert 5 < refused() <= 10


def test_a_shorter_refusal_never_opens_the_gate_earlier(sql):
    grants = [sql.granted(2), sql.granted(2)]
    sql.settle(grants[0], 2, 2, refused_s=100)
    sql.settle(grants[1], 2, 2, refused_s=1)
    assert sql.blocked_s > 50


def test_a_request_that_found_no_server_costs_nothing_and_one_that_was_cut_off_its_worst(make, sql):
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # and does not listen
        url = f"http://127.0.0.1:{nobody.getsockname()[1]}/info"
        client = HttpClient(budget=(budget := make()), attempts=1)
        with pytest.raises(SourceError):
            client.post_json(url, {"type": "userFillsByTime"}, weight=120)
        client.close()
    assert (budget.weight, sql.used) == (0, 0)
    with Simulator(vaults=5, faults=[Fault("*", "reset", times=None)]) as exchange:
        client = HttpClient(budget=budget, attempts=1)
        with pytest.raises(SourceError):
            client.post_json(exchange.info_url, {"type": "userFillsByTime"}, weight=120)
        client.close()
    assert (budget.weight, sql.used) == (120, 120)


# The database


def test_what_a_clock_that_was_set_back_left_in_the_future_does_not_close_the_gate(sql):
    sql.granted(200)
    sql.pass_time(-3600)
    assert sql.used == 200
    assert sql.granted(200) is not None


def test_a_waiter_from_the_future_does_not_hold_up_others(sql):
    sql.granted(120)
    assert sql.granted(120, URGENT, "dead") is None
    sql.connection.execute("update rate_budget_waiters set expires_at = expires_at + interval '10 min'")
    assert sql.granted(60) is not None


def test_a_pace_from_the_future_does_not_stop_bulk(sql):
    assert sql.granted(20, BULK) is not None
    sql.connection.execute("update rate_budget set paced_until = paced_until + interval '1 hour'")
    assert sql.granted(20, BULK) is not None


def test_a_refusal_from_the_future_does_not_close_the_gate(sql):
    # No refusal closes the gate for longer than five minutes.
    sql.settle(sql.granted(2), 2, 2, refused_s=300)
    sql.connection.execute("update rate_budget set blocked_until = blocked_until + interval '1 hour'")
    assert sql.granted(2) is not None


def test_a_lost_connection_is_opened_again(make, connection, monkeypatch):
    monkeypatch.setattr(hlcli.budget.time, "sleep", lambda _: None)
    budget = make()
    for _ in range(3):
        grant = budget.reserve(20, Priority.NORMAL, deadline=time.monotonic() + 60)
        ended = connection.execute(
            "select pg_terminate_backend(pid, 5000) from pg_stat_activity"
            " where datname = current_database() and application_name = 'hlcli:budget'"
        ).fetchall()
        assert ended == [(True,)]
        budget.settle(grant, 20)
    assert connection.execute("select sum(weight) from rate_budget_buckets").fetchone() == (60,)


def test_a_database_that_stays_away_is_an_error_after_a_few_attempts(make, monkeypatch):
    monkeypatch.setattr(hlcli.budget.time, "sleep", lambda _: None)
    with pytest.raises(psycopg.OperationalError):
        make(DATABASE_URL="postgresql://127.0.0.1:1/nowhere").reserve(
            2, Priority.NORMAL, deadline=time.monotonic()
        )


def test_the_tables_stay_small(sql, rng):
    for _ in range(300):
        second = sql.granted(2, rng.choice([URGENT, NORMAL, BULK]))
        if second is not None:
            sql.settle(second, 2, 1)
        sql.pass_time(rng.randrange(4))
    assert sql.one("select count(*) from rate_budget_buckets") <= 64
    assert sql.one("select count(*) from rate_budget") == 1


# The whole of it, against a server that enforces the published weights (fault F24)

BACKFILL = """
import json, random, sys, time
from hlcli import settings
from hlcli.budget import Budget, DeadlineError, Priority
from hlcli.http import HttpClient
url, info_url, address, seconds, urgent = sys.argv[1:]
budget = Budget(settings.from_env({"DATABASE_URL": url, "HL_EGRESS_KEY": "test"}))
ends = time.monotonic() + float(seconds)
waits = []
class Timed:
    def reserve(self, *args, **kwargs):
        began = time.monotonic()
        grant = budget.reserve(*args, **kwargs)
        waits.append(time.monotonic() - began)
        return grant
    def settle(self, *args, **kwargs):
        budget.settle(*args, **kwargs)
client = HttpClient(budget=Timed(), deadline=ends)
done = 0
try:
    while True:
        if urgent == "urgent":
            time.sleep(5)
        client.post_json(info_url, {"type": "vaultDetails", "vaultAddress": address}, weight=20,
                         priority=Priority.URGENT if urgent == "urgent" else Priority.BULK)
        done += 1
except DeadlineError:
    pass
print(json.dumps({"done": done, "longest": max(waits, default=0)}))
"""


@pytest.mark.long
@pytest.mark.timeout(300)
def test_four_backfills_use_the_budget_and_an_urgent_job_never_waits(database):
    seconds = 185
    with Simulator(vaults=20, weight_per_minute=1200, latency=0.1) as exchange:
        began = time.monotonic()
        jobs = [
            subprocess.Popen(
                [
                    sys.executable,
                    "-c",
                    BACKFILL,
                    database,
                    exchange.info_url,
                    exchange.vaults.addresses[number],
                    str(seconds),
                    "urgent" if number == 4 else "bulk",
                ],
                stdout=subprocess.PIPE,
                text=True,
            )
            for number in range(5)
        ]
        results = []
        for job in jobs:
            out, _ = job.communicate(timeout=seconds + 60)
            assert job.returncode == 0
            results.append(json.loads(out))
        log = exchange.log
    after_first = [served for served in log if began + 60 <= served.at < began + 180]
    used = sum(served.weight for served in after_first) / 2 / 1200
    told = (
        f"used {used:.1%}, refused {exchange.refused}, peak {exchange.exchange.window.peak}, "
        f"longest urgent wait {results[4]['longest']:.2f} s, requests {[result['done'] for result in results]}"
    )
    print(told)
    assert exchange.refused == 0, told
    assert used >= 0.95, told
    assert results[4]["done"] >= 30, told
    assert results[4]["longest"] < 2, told
