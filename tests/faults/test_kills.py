"""Runs that end badly: killed, asked to stop, doubled, cut off from the database (F1, F2, F4, F19; G4, G5, G7)."""

from __future__ import annotations

import signal
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from vault_tables import (
    METRICS,
    PLENTY,
    VAULTS,
    assert_ledger_adds_up,
    assert_nothing_left,
    dump,
    open_addresses,
    runs,
)
from waiting import until

from hlcli.jobs.ingest_vaults import CHANNEL, Options, ingest_vaults
from hlcli.jobs.status import read_status
from hlcli.sim import Fault, Simulator

# Everything a run writes; the budget is shared and no part of what a run must restore.
WRITTEN = (VAULTS, METRICS, "ingest_cursors", "rejected_rows")


@pytest.fixture
def sim():
    with Simulator(vaults=120, weight_per_minute=1_000_000, latency=0.005) as running:
        yield running


@pytest.fixture
def start(spawn, sim):
    """Start `hlcli ingest vaults` as a process."""

    def run(*args, **env):
        return spawn("ingest", "vaults", *args, **{**PLENTY, **sim.env(), **env})

    return run


class Gate:
    """Two events: a vaultDetails request has `arrived`; its answer waits until the gate is `opened`."""

    def __init__(self):
        self.arrived, self.opened = threading.Event(), threading.Event()

    def hold(self, answer):
        self.arrived.set()
        self.opened.wait(60)
        return answer

    def wait(self):
        assert self.arrived.wait(45), "no vault was asked"


@contextmanager
def gate(sim):
    """Hold every vaultDetails answer back until the gate is opened, or the block ends."""
    made = Gate()
    sim.add_fault(Fault("vaultDetails", "patch", times=None, patch=made.hold))
    try:
        yield made
    finally:
        made.opened.set()


def alone(connection):
    """Wait until the server has noticed that every client of ours has gone."""
    until(
        lambda: (
            connection.execute(
                "select count(*) from pg_stat_activity where datname = current_database() and pid <> pg_backend_pid()"
            ).fetchone()
            == (0,)
        ),
        "the end of the killed run's sessions",
    )


def health(settings):
    (found,) = read_status(settings(), ["hyperliquid/vaults"]).health
    return found


def state(connection):
    tables = {
        table: dump(connection, table, without=("created_at", "updated_at", "observed_at"))
        for table in WRITTEN
    }
    hours = connection.execute(
        f"select vault_address, count(*) from {METRICS} group by 1 having count(*) > 1"
    )
    return tables, hours.fetchall()


def wipe(connection):
    connection.execute(f"truncate {', '.join(WRITTEN)}, ingestion_runs")


def wait_for_room_in_the_hour(connection, seconds):
    """A run that is resumed in the next hour rightly asks for everything again."""
    left = connection.execute("select 3600 - extract(epoch from now())::bigint % 3600").fetchone()[0]
    if left < seconds:
        time.sleep(left + 1)


def kill_often(start, settings, sim, connection, rng, kills):
    """Kill run after run, at a random request or a random time, then let one finish: nothing must differ."""
    environment = settings(**sim.env(), **PLENTY)
    wait_for_room_in_the_hour(connection, 45)
    ingest_vaults(environment, Options())
    undisturbed = state(connection)
    wipe(connection)
    done = 0
    while done < kills:
        wait_for_room_in_the_hour(connection, 45)
        before, process = sim.count(), start()
        if rng.random() < 0.7:
            # At some request of the run, and a little later, so that commits are hit as well.
            goal = before + rng.randrange(1, len(open_addresses(sim)) + 2)
            until(lambda p=process, goal=goal: sim.count() >= goal or p.poll() is not None, "a request")
            time.sleep(rng.uniform(0, 0.05))
        else:
            time.sleep(rng.uniform(0, 2))
        process.kill()
        process.communicate()
        done += process.returncode == -signal.SIGKILL
        alone(connection)
        assert_ledger_adds_up(connection)
        if process.returncode == 0 or rng.random() < 0.3:
            report = ingest_vaults(environment, Options())
            assert report.status == "ok"
            assert state(connection) == undisturbed
            assert_nothing_left(connection)
            wipe(connection)
    assert ingest_vaults(environment, Options()).status == "ok"
    assert state(connection) == undisturbed
    assert_nothing_left(connection)
    assert_ledger_adds_up(connection)


def test_killed_runs_leave_nothing_behind_and_the_next_one_finishes_the_work(
    start, settings, sim, connection, rng
):
    kill_often(start, settings, sim, connection, rng, kills=3)


@pytest.mark.long
@pytest.mark.timeout(900)
def test_fifty_killed_runs_leave_nothing_behind(start, settings, sim, connection, rng):
    kill_often(start, settings, sim, connection, rng, kills=50)


def test_a_killed_run_is_running_then_failed_then_abandoned(start, settings, sim, connection):
    with gate(sim) as held:
        process = start()
        held.wait()
        assert health(settings).state == "running"
        process.kill()
        process.communicate()
        alone(connection)
    found = health(settings)
    assert (found.state, found.last_status) == ("failed", "abandoned")
    sim.clear_faults()
    ingest_vaults(settings(**sim.env(), **PLENTY), Options(limit=1))
    assert [(run["status"], run["exit_code"]) for run in runs(connection)] == [("abandoned", None), ("ok", 0)]
    assert health(settings).state == "ok"


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=["SIGTERM", "SIGINT"]
)
def test_a_signal_ends_the_run_as_interrupted(start, settings, sim, connection, number, code):
    with gate(sim) as held:
        process = start()
        held.wait()
        process.send_signal(number)
        out, err = process.communicate(timeout=20)
    assert (process.returncode, out) == (code, "")
    assert "Traceback" not in err
    (run,) = runs(connection)
    assert (run["status"], run["exit_code"]) == ("interrupted", code)
    alone(connection)
    assert_nothing_left(connection)
    assert_ledger_adds_up(connection)
    assert health(settings).state == "failed"


def test_a_second_signal_ends_at_once(start, sim, connection):
    """The first signal's farewell hangs in a ping that nobody answers; the second does not wait for it."""
    farewell, release = threading.Event(), threading.Event()

    class Watcher(BaseHTTPRequestHandler):
        def do_POST(self):
            if "/143" in self.path:
                farewell.set()
                release.wait(60)
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *args):
            pass

    watcher = ThreadingHTTPServer(("127.0.0.1", 0), Watcher)
    threading.Thread(target=watcher.serve_forever, daemon=True).start()
    try:
        with gate(sim) as held:
            process = start(HLCLI_PING_URL=f"http://127.0.0.1:{watcher.server_port}/secret-path")
            held.wait()
            process.terminate()
            assert farewell.wait(20)
            process.terminate()
            process.communicate(timeout=20)
        assert process.returncode == -signal.SIGTERM
        assert runs(connection)[0]["status"] == "interrupted"
    finally:
        release.set()
        watcher.shutdown()
        watcher.server_close()


def test_of_ten_starts_at_once_one_works_and_the_others_say_so(start, settings, sim, connection):
    with gate(sim) as held:
        processes = [start(*(["--fail-if-locked"] if number % 2 else [])) for number in range(10)]
        until(lambda: sum(process.poll() is not None for process in processes) == 9, "nine skipped runs")
        assert health(settings).skips == 9
        held.opened.set()
        codes = [(process.wait(60), number % 2) for number, process in enumerate(processes)]
    (worker,) = [number for number, run in enumerate(processes) if not skipped(connection, run.pid)]
    assert codes[worker][0] == 0
    assert {code for number, (code, strict) in enumerate(codes) if number != worker and strict} == {6}
    assert {code for number, (code, strict) in enumerate(codes) if number != worker and not strict} == {0}
    ledger = {run["pid"]: (run["status"], run["exit_code"]) for run in runs(connection)}
    assert {process.pid: code for process, (code, _) in zip(processes, codes, strict=True)} == {
        pid: code for pid, (_, code) in ledger.items()
    }
    asked = [served.address for served in sim.log if served.kind == "vaultDetails"]
    assert sorted(asked) == sorted(open_addresses(sim))
    alone(connection)
    assert_nothing_left(connection)


def skipped(connection, pid):
    return connection.execute(
        "select status = 'skipped' from ingestion_runs where pid = %s", (pid,)
    ).fetchone()[0]


def terminate(connection, role):
    return connection.execute(
        "select pg_terminate_backend(pid) from pg_stat_activity where datname = current_database()"
        " and application_name = %s",
        (f"hlcli:{role}",),
    ).fetchall()


def test_a_lost_database_connection_is_exit_4_and_a_failed_run(start, settings, sim, connection):
    with gate(sim) as held:
        process = start()
        held.wait()
        assert terminate(connection, CHANNEL.name) == [(True,)]
        held.opened.set()
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err.count("\n")) == (4, "", 1)
    (run,) = runs(connection)
    assert (run["status"], run["exit_code"]) == ("failed", 4)
    # Whoever lost the lock has written nothing since.
    assert connection.execute(f"select count(*) from {METRICS}").fetchone() == (0,)
    sim.clear_faults()
    assert ingest_vaults(settings(**sim.env(), **PLENTY), Options()).status == "ok"
    assert connection.execute(f"select count(*) from {METRICS}").fetchone() == (len(open_addresses(sim)),)
    alone(connection)
    assert_nothing_left(connection)
    assert_ledger_adds_up(connection)


def test_a_lost_budget_connection_is_opened_again(start, sim, connection):
    with gate(sim) as held:
        process = start()
        held.wait()
        assert terminate(connection, "budget") == [(True,)]
        held.opened.set()
        process.communicate(timeout=60)
    assert process.returncode == 0
    (run,) = runs(connection)
    assert (run["status"], run["units_ok"]) == ("ok", len(open_addresses(sim)))


def test_a_stopped_run_that_wakes_up_after_its_session_ended_commits_nothing(
    start, settings, sim, connection
):
    """F3: the lock lives on the connection that writes, so who lost the one has lost the other."""
    with gate(sim) as held:
        process = start()
        held.wait()
        process.send_signal(signal.SIGSTOP)
        terminate(connection, CHANNEL.name)
        terminate(connection, "budget")
        alone(connection)
        held.opened.set()
        assert ingest_vaults(settings(**sim.env(), **PLENTY), Options()).status == "ok"
        before = state(connection)
        process.send_signal(signal.SIGCONT)
        process.communicate(timeout=60)
    assert process.returncode == 4
    assert state(connection) == before
    assert [run["status"] for run in runs(connection)] == ["abandoned", "ok"]
