"""`hlcli ingest vaults` and `hlcli rank vaults` against the simulated exchange and a real database."""

from __future__ import annotations

import threading
import time
from contextlib import contextmanager
from datetime import timedelta
from decimal import Decimal

import psycopg
import pytest
from vault_tables import (
    LIST,
    METRICS,
    PLENTY,
    TOP,
    VAULTS,
    assert_ledger_adds_up,
    assert_nothing_left,
    by_address,
    dump,
    expected_metrics,
    expected_vaults,
    open_addresses,
    rejected,
    runs,
)

from hlcli.exitcodes import ExitCode, TemporaryError
from hlcli.jobs.ingest_vaults import Options, ingest_vaults
from hlcli.jobs.rank_vaults import rank_vaults
from hlcli.sim import Fault, Simulator

STRANGER = "0x" + "5" * 40


@pytest.fixture
def sim():
    with Simulator(vaults=60, weight_per_minute=100_000) as running:
        yield running


@pytest.fixture
def ingest(settings, sim, connection):
    """Run the job in this process; afterwards the ledger adds up and nothing is left behind."""

    # observed_at is the database's hour: a test that compares two runs must not span two hours.
    left = connection.execute("select 3600 - extract(epoch from now())::bigint % 3600").fetchone()[0]
    if left < 30:
        time.sleep(left + 1)

    def run(*, against=sim, **options):
        return ingest_vaults(settings(**against.env(), **PLENTY), Options(**options))

    yield run
    assert_ledger_adds_up(connection)
    assert_nothing_left(connection)


def everything(connection):
    """All data with its time stamps; not the ledger, the budget and the cursors."""
    return {table: dump(connection, table, without=()) for table in (VAULTS, METRICS, TOP)}


def asked(sim):
    return [served.address for served in sim.log if served.kind == "vaultDetails"]


def test_rows_equal_what_was_served_digit_for_digit(ingest, sim, connection):
    report = ingest()
    assert (report.status, report.exit_code) == ("ok", ExitCode.OK)
    chosen = open_addresses(sim)
    assert by_address(dump(connection, VAULTS)) == expected_vaults(sim, set(chosen))
    assert by_address(dump(connection, METRICS)) == expected_metrics(sim, chosen)


def test_include_closed_asks_closed_vaults_too(ingest, sim, connection):
    ingest(include_closed=True)
    everyone = set(sim.vaults.addresses)
    assert by_address(dump(connection, VAULTS)) == expected_vaults(sim, everyone)
    assert by_address(dump(connection, METRICS)) == expected_metrics(sim, everyone)
    # The universe must hold what the promise is about, or the comparison proves little.
    assert any(row["max_distributable_tvl"] is None for row in dump(connection, METRICS))
    assert any(row["followers_truncated"] == "true" for row in dump(connection, METRICS))
    assert any(row["child_addresses"] for row in dump(connection, VAULTS))


def test_observed_at_is_the_hour_of_the_run(ingest, connection):
    ingest(limit=3)
    hours = connection.execute(f"select distinct observed_at from {METRICS}").fetchall()
    assert hours == connection.execute("select date_trunc('hour', started_at) from ingestion_runs").fetchall()


def test_a_second_run_in_the_hour_changes_nothing_but_the_ledger(ingest, sim, connection):
    ingest()
    before, requests = everything(connection), sim.count("vaultDetails")
    report = ingest()
    assert everything(connection) == before
    assert sim.count("vaultDetails") == requests
    assert report.numbers["served"] == 0
    assert [run["status"] for run in runs(connection)] == ["ok", "ok"]


def test_an_equal_list_under_another_etag_changes_no_row(ingest, sim, connection):
    ingest()
    before = everything(connection)
    sim.add_fault(Fault(LIST, "patch", patch=lambda entries: entries[::-1]))
    report = ingest()
    assert report.details["vaults_in_list"] == 60
    assert (report.numbers["unchanged"], report.numbers["inserted"], report.numbers["updated"]) == (60, 0, 0)
    assert everything(connection) == before


def test_only_a_changed_vault_gets_a_new_updated_at(ingest, sim, connection):
    ingest(limit=0)
    before = by_address(dump(connection, VAULTS, without=()))
    changed = sim.vaults.addresses[11]

    def rename(entries):
        entries[11]["summary"]["name"] = "renamed"
        return entries

    sim.add_fault(Fault(LIST, "patch", patch=rename))
    report = ingest(limit=0)
    after = by_address(dump(connection, VAULTS, without=()))
    assert report.numbers["updated"] == 1
    assert {address for address in after if after[address] != before[address]} == {changed}
    assert after[changed]["name"] == "renamed"
    assert after[changed]["updated_at"] > before[changed]["updated_at"]
    assert after[changed]["created_at"] == before[changed]["created_at"]


def test_a_vault_that_left_the_list_is_kept(ingest, sim, connection):
    ingest(limit=0)
    sim.add_fault(Fault(LIST, "patch", patch=lambda entries: entries[1:]))
    ingest(limit=0)
    assert connection.execute(f"select count(*) from {VAULTS}").fetchone() == (60,)


def test_the_list_is_not_fetched_again_while_its_etag_stands(ingest, sim):
    ingest(limit=0)
    report = ingest(limit=0)
    assert report.details["vaults_in_list"] == "not modified"
    assert [served.status for served in sim.log if served.kind == LIST] == [200, 304]


def test_limit_asks_the_largest_vaults_first(ingest, sim):
    report = ingest(limit=7, concurrency=1)
    assert asked(sim) == open_addresses(sim)[:7]
    assert (report.details["selected"], report.details["left_for_next_run"]) == (7, 0)


def test_limit_zero_takes_the_list_only(ingest, sim, connection):
    ingest(limit=0)
    assert asked(sim) == []
    assert by_address(dump(connection, VAULTS)) == expected_vaults(sim, set())


def test_min_tvl_leaves_smaller_vaults_alone(ingest, sim, connection):
    addresses = open_addresses(sim)
    rows = expected_vaults(sim, set())
    border = Decimal(rows[addresses[9]]["tvl_usd"])
    ingest(min_tvl=border)
    assert set(asked(sim)) == {one for one in addresses if Decimal(rows[one]["tvl_usd"]) >= border}
    assert connection.execute(f"select count(*) from {VAULTS}").fetchone() == (60,)


def test_order_is_never_seen_first_then_age_times_tvl(ingest, sim, connection):
    """Large vaults are seen often, small ones still get their turn."""
    ingest(limit=0)
    chosen = open_addresses(sim)[:6]
    never, old_small, large, middle, same_age_small, fresh = chosen
    connection.execute(f"update {VAULTS} set is_closed = not vault_address = any (%s)", (chosen,))
    plan = {
        never: (1, None),
        old_small: (10, 40),
        large: (1_000_000, 4),
        middle: (1_000, 4),
        same_age_small: (10, 4),
        fresh: (1_000, 1),
    }
    for address, (tvl, hours) in plan.items():
        connection.execute(f"update {VAULTS} set tvl_usd = %s where vault_address = %s", (tvl, address))
        if hours is not None:
            connection.execute(
                f"insert into {METRICS} (vault_address, observed_at)"
                " values (%s, date_trunc('hour', clock_timestamp()) - make_interval(hours => %s))",
                (address, hours),
            )
    ingest(concurrency=1)
    assert asked(sim) == [never, old_small, large, middle, same_age_small, fresh]


@pytest.mark.parametrize("kind", ["null", "status"])
def test_a_vault_that_cannot_be_read_does_not_head_the_queue_for_ever(ingest, sim, connection, kind):
    largest, *others = open_addresses(sim)
    sim.add_fault(Fault("vaultDetails", kind, times=None, address=largest, status=422))
    ingest(limit=3, concurrency=1)
    assert asked(sim) == [largest, *others[:2]]
    for table, column in ((VAULTS, "details_failed_at"), (METRICS, "observed_at")):
        connection.execute(f"update {table} set {column} = {column} - interval '1 hour'")
    ingest(limit=3, concurrency=1)
    assert asked(sim)[3:] == others[2:5], "those never asked come before the one that failed"


def test_a_partial_run_is_finished_by_the_next_one_without_asking_twice(ingest, sim, connection):
    ingest(limit=10)
    first = set(asked(sim))
    assert ingest(limit=10).details["already_done"] == 10
    assert len(asked(sim)) == 10
    report = ingest()
    assert report.details["already_done"] == 10
    assert len(asked(sim)) == len(set(asked(sim))) == len(open_addresses(sim))
    assert set(asked(sim)) > first
    assert by_address(dump(connection, METRICS)) == expected_metrics(sim, open_addresses(sim))


def test_address_asks_exactly_the_named_vaults_even_closed_ones(ingest, sim, connection):
    rows = expected_vaults(sim, set())
    closed = next(address for address in rows if rows[address]["is_closed"] == "true")
    wanted = [open_addresses(sim)[3], closed]
    report = ingest(addresses=wanted, min_tvl=Decimal("1e15"))
    assert sorted(asked(sim)) == sorted(wanted)
    assert by_address(dump(connection, METRICS)) == expected_metrics(sim, wanted)
    assert report.details["selected"] == 2


def test_an_address_that_is_no_vault_is_quarantined_by_name(ingest, sim, connection):
    report = ingest(addresses=[STRANGER])
    assert rejected(connection) == [("vault_metrics", f'["{STRANGER}"]', None, "not_a_vault")]
    assert connection.execute(f"select count(*) from {METRICS}").fetchone() == (0,)
    assert (report.exit_code, report.numbers["rejected"]) == (ExitCode.OK, 1)


def test_an_unlisted_vault_is_stored_from_its_details(ingest, sim, connection):
    hidden = open_addresses(sim)[2]
    sim.add_fault(
        Fault(
            LIST,
            "patch",
            times=None,
            patch=lambda es: [e for e in es if e["summary"]["vaultAddress"] != hidden],
        )
    )
    ingest(addresses=[hidden])
    expected = expected_vaults(sim, {hidden})[hidden] | {"tvl_usd": None, "vault_create_time": None}
    assert by_address(dump(connection, VAULTS))[hidden] == expected
    assert by_address(dump(connection, METRICS)) == expected_metrics(sim, [hidden])
    before = everything(connection)
    ingest(addresses=[hidden])
    assert everything(connection) == before


def test_the_command_line_takes_repeated_and_mixed_case_addresses_once(cli, sim, database, connection):
    address = open_addresses(sim)[0]
    upper = "0x" + address[2:].upper()
    done = cli(
        "ingest",
        "vaults",
        "--address",
        address,
        "--address",
        upper,
        "--address",
        address,
        DATABASE_URL=database,
        **PLENTY,
        **sim.env(),
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert asked(sim) == [address]


def test_the_deadline_is_no_failure_and_the_next_run_goes_on(ingest, sim, connection):
    ingest(limit=0)
    total = len(open_addresses(sim))
    report = ingest(deadline=timedelta(seconds=2), requests_per_second=3)
    left = report.details["left_for_next_run"]
    assert (report.status, report.exit_code) == ("ok", ExitCode.OK)
    assert 0 < left < total
    assert connection.execute(f"select count(*) from {METRICS}").fetchone() == (total - left,)
    assert runs(connection)[-1]["details"]["left_for_next_run"] == left
    assert ingest().details["left_for_next_run"] == 0
    assert by_address(dump(connection, METRICS)) == expected_metrics(sim, open_addresses(sim))


def test_requests_per_second_is_a_ceiling(ingest, sim):
    report = ingest(limit=11, requests_per_second=10, concurrency=8)
    # Ten pauses of 0.1 s cannot take less; how much more depends on the machine.
    assert report.seconds >= 1.0
    assert len(asked(sim)) == 11


def test_concurrency_is_a_ceiling(ingest, sim):
    under_way, most, lock = 0, 0, threading.Lock()

    def watch(answer):
        nonlocal under_way, most
        with lock:
            under_way += 1
            most = max(most, under_way)
        time.sleep(0.02)
        with lock:
            under_way -= 1
        return answer

    sim.add_fault(Fault("vaultDetails", "patch", times=None, patch=watch))
    ingest(concurrency=3)
    assert most == 3


def test_the_ledger_tells_rows_units_requests_and_weight(ingest, sim, connection):
    report = ingest()
    vaults, details = 60, len(open_addresses(sim))
    (run,) = runs(connection)
    assert (
        run["rows_served"] == vaults + 2 * details
    )  # each answer is a row of vaults and one of vault_metrics
    assert (run["rows_inserted"], run["rows_updated"]) == (vaults + details, details)
    assert (run["units_ok"], run["units_failed"]) == (details, 0)
    assert (run["requests"], run["weight"]) == (details, 20 * details)
    assert run["weight"] == sum(served.weight for served in sim.log)
    assert (run["status"], run["exit_code"], run["error"]) == ("ok", 0, None)
    assert run["finished_at"] > run["started_at"]
    spent = connection.execute("select sum(weight), sum(requests) from rate_budget_buckets").fetchone()
    assert spent == (run["weight"], run["requests"])
    assert str(run["run_id"]) == report.run_id


# --- rank ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def rank(settings, connection):
    yield lambda **options: rank_vaults(
        settings(), max_age=options.pop("max_age", timedelta(hours=6)), **options
    )
    assert_ledger_adds_up(connection)
    assert_nothing_left(connection)


def put(connection, number, distributable, *, hours=0, closed=False, tvl=1):
    """A vault with one metric so many hours old (None: never measured); returns its address."""
    address = f"0x{number:040x}"
    connection.execute(
        f"insert into {VAULTS} (vault_address, tvl_usd, is_closed, updated_at) values (%s, %s, %s, now())"
        " on conflict (vault_address) do update set is_closed = excluded.is_closed",
        (address, tvl, closed),
    )
    if hours is not None:
        connection.execute(
            f"insert into {METRICS} (vault_address, observed_at, max_distributable_tvl)"
            " values (%s, date_trunc('hour', now()) - make_interval(hours => %s), %s)"
            " on conflict do nothing",
            (address, hours, distributable),
        )
    return address


def ranking(connection):
    return connection.execute(f"select vault_address from {TOP} order by rank").fetchall()


def test_rank_orders_by_max_distributable_and_breaks_ties_by_address(rank, connection):
    numbers = {
        3: "5.0000000001",
        1: "5",
        2: "5.00",
        4: "5.00000000010",
        5: "-1",
        6: "123456789012345.0123456789",
    }
    for number, distributable in numbers.items():
        put(connection, number, distributable, tvl="7.5")
    report = rank()
    rows = connection.execute(
        f"select rank, vault_address, max_distributable_tvl::text, tvl_usd::text, metrics_time from {TOP} order by rank"
    ).fetchall()
    hour = connection.execute(f"select max(observed_at) from {METRICS}").fetchone()[0]
    order = [6, 3, 4, 1, 2, 5]
    assert rows == [
        (place, f"0x{number:040x}", numbers[number], "7.5", hour) for place, number in enumerate(order, 1)
    ]
    assert report.details["ranked"] == 6
    assert report.details["left_out"] == {}


def test_rank_leaves_out_and_counts_what_cannot_be_ranked(rank, connection):
    ranked = [put(connection, 1, "10"), put(connection, 2, "9", hours=5)]
    put(connection, 3, "99", closed=True)
    put(connection, 4, "98", closed=True, hours=99)
    put(connection, 5, "97", hours=8)
    put(connection, 6, None)
    put(connection, 7, None, hours=None)
    put(connection, 8, None, hours=None)
    # A stale value must not stand in for a fresh row that has none.
    put(connection, 6, "96", hours=1)
    report = rank()
    assert [address for (address,) in ranking(connection)] == ranked
    left_out = {"closed": 2, "never measured": 2, "no max distributable": 1, "stale": 1}
    assert report.details["left_out"] == left_out
    assert runs(connection, "top_500_vaults")[0]["details"]["left_out"] == left_out


def test_rank_keeps_500_places_and_counts_the_rest(rank, connection):
    connection.execute(
        f"insert into {VAULTS} (vault_address, is_closed, updated_at)"
        " select '0x' || lpad(to_hex(n), 40, '0'), false, now() from generate_series(1, 520) n"
    )
    connection.execute(
        f"insert into {METRICS} (vault_address, observed_at, max_distributable_tvl)"
        f" select vault_address, date_trunc('hour', now()), row_number() over (order by vault_address) from {VAULTS}"
    )
    report = rank()
    places = connection.execute(
        f"select rank, max_distributable_tvl::int from {TOP} order by rank"
    ).fetchall()
    assert places == [(place, 521 - place) for place in range(1, 501)]
    assert report.details["left_out"] == {"beyond place 500": 20}


def test_rank_max_age_decides_what_is_stale(rank, connection):
    put(connection, 1, "1", hours=3)
    put(connection, 2, "2", hours=20)
    rank(max_age=timedelta(hours=4))
    assert len(ranking(connection)) == 1
    rank(max_age=timedelta(hours=22))
    assert len(ranking(connection)) == 2


def test_rank_without_a_fresh_vault_fails_and_keeps_the_old_ranking(rank, connection):
    put(connection, 1, "1", hours=2)
    rank()
    before = dump(connection, TOP, without=())
    with pytest.raises(TemporaryError, match="ranking stays as it was"):
        rank(max_age=timedelta(hours=1))
    assert dump(connection, TOP, without=()) == before != []
    last = runs(connection, "top_500_vaults")[-1]
    assert (last["status"], last["exit_code"]) == ("failed", 4)


def test_rank_on_an_empty_database_exits_4(cli, database):
    done = cli("rank", "vaults", DATABASE_URL=database)
    assert done.returncode == 4
    assert done.stderr.count("\n") == 1


def test_rank_twice_changes_nothing_but_the_ledger(rank, connection):
    for number in range(1, 20):
        put(connection, number, str(number))
    rank()
    before = dump(connection, TOP, without=())
    report = rank()
    assert dump(connection, TOP, without=()) == before
    assert (report.numbers["unchanged"], report.numbers["updated"], report.details["dropped"]) == (19, 0, 0)


def test_rank_changes_only_the_rows_whose_place_changed(rank, connection):
    for number in range(1, 6):
        put(connection, number, str(number))
    rank()
    before = by_address(dump(connection, TOP, without=()))
    gone = f"0x{1:040x}"  # the last place
    put(connection, 1, "1", closed=True)
    assert rank().details["dropped"] == 1
    after = by_address(dump(connection, TOP, without=()))
    assert after == {address: row for address, row in before.items() if address != gone}


def test_a_reader_sees_the_old_ranking_or_the_new_one_never_less(rank, connection, database):
    first = {put(connection, number, str(number)) for number in range(1, 40)}
    second = {put(connection, number, str(number), closed=True) for number in range(41, 90)}
    rank()
    seen, stop = [], threading.Event()

    def read():
        with psycopg.connect(database, autocommit=True) as reader:
            while not stop.is_set():
                seen.append(frozenset(row[0] for row in reader.execute(f"select vault_address from {TOP}")))

    thread = threading.Thread(target=read)
    thread.start()
    try:
        for _ in range(6):
            connection.execute(f"update {VAULTS} set is_closed = not is_closed")
            rank()
    finally:
        stop.set()
        thread.join()
    assert set(seen) <= {frozenset(first), frozenset(second)}
    assert len(set(seen)) == 2


def test_what_was_ingested_is_ranked(ingest, rank, sim, connection):
    ingest()
    rank()
    metrics = expected_metrics(sim, open_addresses(sim))
    order = sorted(
        (row for row in metrics.values() if row["max_distributable_tvl"] is not None),
        key=lambda row: (-Decimal(row["max_distributable_tvl"]), row["vault_address"]),
    )
    assert ranking(connection) == [(row["vault_address"],) for row in order]


@contextmanager
def lock_of(connection, channel):
    from hlcli.migrations import LOCK_NAMESPACE

    where = (LOCK_NAMESPACE, channel.lock_key)
    connection.execute("select pg_advisory_lock(%s, %s)", where)
    yield
    connection.execute("select pg_advisory_unlock(%s, %s)", where)


def test_rank_is_skipped_while_another_run_holds_the_lock(rank, connection):
    from hlcli.exitcodes import LockedError
    from hlcli.jobs.rank_vaults import CHANNEL

    put(connection, 1, "1")
    with lock_of(connection, CHANNEL):
        assert rank().status == "skipped"
        with pytest.raises(LockedError):
            rank(fail_if_locked=True)
    assert ranking(connection) == []
    assert [(run["status"], run["exit_code"]) for run in runs(connection, "top_500_vaults")] == [
        ("skipped", 0),
        ("skipped", 6),
    ]
