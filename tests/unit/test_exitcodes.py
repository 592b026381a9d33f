"""What ends a command and which exit code it gets (promise G7), with errors that a real server raised."""

import errno
import signal
import socket
import sys
import threading
import time
import uuid

import polars as pl
import psycopg
import pytest
import requests
from psycopg import conninfo, sql
from psycopg.pq import TransactionStatus

from hlcli import db, exitcodes
from hlcli.__main__ import LOOK_AGAIN_S, _stopper
from hlcli.budget import DeadlineError
from hlcli.exitcodes import (
    MEANINGS,
    ConfigError,
    ExitCode,
    HlcliError,
    LockedError,
    TemporaryError,
    Terminated,
    UsageError,
    exit_code_for,
)
from hlcli.http import BadPayloadError, SourceError, StatusError


def test_the_numbers_are_an_interface():
    assert {code.name: int(code) for code in ExitCode} == {
        "OK": 0,
        "BUG": 1,
        "USAGE": 2,
        "PARTIAL": 3,
        "TEMPORARY": 4,
        "CONFIG": 5,
        "LOCKED": 6,
        "INTERRUPTED": 130,
        "TERMINATED": 143,
    }
    assert set(MEANINGS) == set(ExitCode)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (HlcliError("x"), ExitCode.BUG),
        (UsageError("x"), ExitCode.USAGE),
        (ConfigError("x"), ExitCode.CONFIG),
        (TemporaryError("x"), ExitCode.TEMPORARY),
        (LockedError("x"), ExitCode.LOCKED),
        (DeadlineError("x"), ExitCode.TEMPORARY),
        (SourceError("x"), ExitCode.TEMPORARY),
        (BadPayloadError("x"), ExitCode.TEMPORARY),
        (StatusError("x", 500), ExitCode.TEMPORARY),
        (Terminated(ExitCode.TERMINATED), ExitCode.TERMINATED),
        (Terminated(ExitCode.INTERRUPTED), ExitCode.INTERRUPTED),
        (KeyboardInterrupt(), ExitCode.INTERRUPTED),
        (SystemExit(0), ExitCode.OK),
        (SystemExit(3), ExitCode.PARTIAL),
        (SystemExit(None), ExitCode.OK),
        (SystemExit("message"), ExitCode.BUG),
        (SystemExit(77), ExitCode.BUG),
        (ValueError("x"), ExitCode.BUG),
        (AssertionError(), ExitCode.BUG),
        (MemoryError(), ExitCode.BUG),
        (RecursionError(), ExitCode.BUG),
        (OSError(errno.ENOSPC, "No space left on device"), ExitCode.TEMPORARY),
        (ConnectionResetError(), ExitCode.TEMPORARY),
        (TimeoutError(), ExitCode.TEMPORARY),
        (requests.ConnectionError(), ExitCode.TEMPORARY),
    ],
    ids=lambda value: repr(value) if isinstance(value, BaseException) else None,
)
def test_every_error_has_an_exit_code(error, code):
    assert exit_code_for(error) is code


@pytest.mark.parametrize(
    ("state", "code"),
    [
        *(
            (state, ExitCode.CONFIG)
            for state in ("28000", "28P01", "3D000", "3F000", "42501", "42P01", "42703", "0A000")
        ),
        *(
            (state, ExitCode.TEMPORARY)
            for state in (
                "40001",
                "40P01",
                "53000",
                "53100",
                "53200",
                "53300",
                "55P03",
                "57014",
                "57P01",
                "57P02",
                "57P03",
                "58030",
                "25006",
                "25P03",
                "08006",
            )
        ),
        *(
            (state, ExitCode.BUG)
            for state in (
                "22003",
                "22P02",
                "23502",
                "23505",
                "23514",
                "42601",
                "25P02",
                "21000",
                "P0001",
                "XX000",
            )
        ),
    ],
)
def test_errors_of_the_server_are_told_apart_by_sqlstate(server, state, code):
    with psycopg.connect(server) as opened, pytest.raises(psycopg.Error) as caught:
        opened.execute(f"do $$ begin raise exception using errcode = '{state}', message = 'told'; end $$")
    assert caught.value.sqlstate == state
    assert exit_code_for(caught.value) is code


def code_of(url: str) -> ExitCode:
    with pytest.raises(psycopg.Error) as caught:
        psycopg.connect(url, connect_timeout=5)
    return exit_code_for(caught.value)


def test_a_server_out_of_reach_is_temporary():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    assert code_of(f"postgresql://127.0.0.1:{port}/base") is ExitCode.TEMPORARY
    assert code_of("postgresql://no-such-host.invalid/base") is ExitCode.TEMPORARY
    assert code_of("host=/tmp/no-such-folder dbname=base") is ExitCode.TEMPORARY


def test_a_server_that_speaks_another_protocol_or_hangs_up_is_temporary():
    for said in (b"", b"HTTP/1.1 400 Bad Request\r\n\r\n"):
        with socket.create_server(("127.0.0.1", 0)) as listener:

            def answer(said=said, listener=listener):
                accepted, _ = listener.accept()
                with accepted:
                    accepted.recv(8)
                    accepted.sendall(said)

            thread = threading.Thread(target=answer, daemon=True)
            thread.start()
            port = listener.getsockname()[1]
            assert code_of(f"postgresql://127.0.0.1:{port}/base?sslmode=disable") is ExitCode.TEMPORARY
            thread.join(10)


@pytest.mark.parametrize(
    "url",
    [
        "junk",
        "postgresql://[::1/base",
        "postgresql://u:%zz@127.0.0.1:1/base",
        "postgresql://127.0.0.1:1/base?no_such_option=1",
        "postgresql://127.0.0.1:port/base",
        "postgresql://127.0.0.1:99999/base",
        "postgresql://127.0.0.1:1/base?sslmode=maybe",
        "host='unterminated",
    ],
)
def test_a_malformed_connection_string_is_a_matter_of_configuration(url):
    assert code_of(url) is ExitCode.CONFIG


def test_an_unknown_database_or_role_is_a_matter_of_configuration(server):
    unknown = f"nobody_{uuid.uuid4().hex}"
    assert code_of(conninfo.make_conninfo(server, dbname=unknown)) is ExitCode.CONFIG
    assert code_of(conninfo.make_conninfo(server, user=unknown, password="x")) is ExitCode.CONFIG


@pytest.fixture
def role(server, database):
    """An ordinary role that may log in, as a connection string to `database`."""
    name, password = f"hlcli_{uuid.uuid4().hex}", uuid.uuid4().hex
    with psycopg.connect(server, autocommit=True) as admin:
        try:
            admin.execute(
                sql.SQL("create role {} login password {}").format(
                    sql.Identifier(name), sql.Literal(password)
                )
            )
        except psycopg.errors.InsufficientPrivilege:
            pytest.skip("the server's user may not create roles")
        yield conninfo.make_conninfo(database, user=name, password=password)
        admin.execute(sql.SQL("drop role {}").format(sql.Identifier(name)))


def test_a_privilege_that_is_missing_is_a_matter_of_configuration(role):
    with psycopg.connect(role) as opened, pytest.raises(psycopg.Error) as caught:
        opened.execute("select * from ingestion_runs")
    assert exit_code_for(caught.value) is ExitCode.CONFIG


@pytest.mark.parametrize("what", ["role", "database"])
def test_too_many_connections_are_temporary(role, connection, what):
    parts = conninfo.conninfo_to_dict(role)
    name = parts["user"] if what == "role" else parts["dbname"]
    connection.execute(
        sql.SQL("alter {} {} connection limit 0").format(sql.SQL(what), sql.Identifier(str(name)))
    )
    with pytest.raises(psycopg.OperationalError, match="too many connections") as caught:
        psycopg.connect(role)
    assert exit_code_for(caught.value) is ExitCode.TEMPORARY


def test_a_connection_that_the_server_ended_is_temporary(settings, connection):
    with db.connect(settings(), role="victim") as opened:
        connection.execute("select pg_terminate_backend(%s, 5000)", (opened.info.backend_pid,))
        with pytest.raises(psycopg.Error) as caught:
            opened.execute("select 1")
        assert exit_code_for(caught.value) is ExitCode.TEMPORARY
        with pytest.raises(psycopg.Error) as caught:
            opened.execute("select 1")
        assert exit_code_for(caught.value) is ExitCode.TEMPORARY


def test_a_process_that_slept_through_its_transaction_is_temporary(settings, connection):
    with db.connect(settings(), role="sleeper") as opened:
        opened.execute("set idle_in_transaction_session_timeout = '20ms'")
        opened.execute("begin")
        pid = opened.info.backend_pid
        while connection.execute("select 1 from pg_stat_activity where pid = %s", (pid,)).fetchone():
            time.sleep(0.01)
        with pytest.raises(psycopg.Error) as caught:
            opened.execute("select 1")
        assert exit_code_for(caught.value) is ExitCode.TEMPORARY


def test_time_outs_and_locks_are_temporary(connection, database):
    with psycopg.connect(database) as holder:
        holder.execute("lock table ingestion_runs in exclusive mode")
        for setting in ("lock_timeout", "statement_timeout"):
            connection.execute(f"set {setting} = '20ms'")
            with pytest.raises(psycopg.Error) as caught:
                connection.execute("lock table ingestion_runs in exclusive mode; select 1")
            assert exit_code_for(caught.value) is ExitCode.TEMPORARY
            connection.execute(f"reset {setting}")


def test_a_read_only_server_is_temporary(connection):
    connection.execute("set default_transaction_read_only = on")
    with pytest.raises(psycopg.Error) as caught:
        connection.execute("create table x ()")
    assert exit_code_for(caught.value) is ExitCode.TEMPORARY


def test_an_unknown_table_is_a_matter_of_the_schema(connection):
    with pytest.raises(psycopg.Error) as caught:
        connection.execute("select * from no_such_table")
    assert exit_code_for(caught.value) is ExitCode.CONFIG


def test_the_process_ends_with_the_code_of_its_error(cli, server, empty_database):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    for url, code in {
        f"postgresql://127.0.0.1:{port}/base": ExitCode.TEMPORARY,
        "postgresql://[::1/base": ExitCode.CONFIG,
        conninfo.make_conninfo(server, dbname=f"nobody_{uuid.uuid4().hex}"): ExitCode.CONFIG,
        empty_database: ExitCode.CONFIG,
    }.items():
        done = cli("rank", "vaults", DATABASE_URL=url)
        assert (done.returncode, done.stdout) == (code, ""), done
        assert len(done.stderr.splitlines()) == 1, done.stderr


def test_a_stop_that_python_dropped_is_heeded_later(monkeypatch):
    monkeypatch.setattr(exitcodes, "_stopped_by", None)
    exitcodes.heed_stop()
    dropped = []
    monkeypatch.setattr(sys, "unraisablehook", dropped.append)

    class Cleared:
        def __del__(self):
            exitcodes.stop(ExitCode.TERMINATED)

    Cleared()
    assert [each.exc_type for each in dropped] == [exitcodes.Terminated]
    for _ in range(2):
        with pytest.raises(exitcodes.Terminated) as raised:
            exitcodes.heed_stop()
        assert exitcodes.exit_code_for(raised.value) is ExitCode.TERMINATED


@pytest.fixture
def stopper(monkeypatch):
    """Handle SIGTERM and SIGINT in this process as the command line does, for one test."""
    monkeypatch.setattr(exitcodes, "_stopped_by", None)
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM)}
    signal.signal(signal.SIGTERM, _stopper(ExitCode.TERMINATED))
    signal.signal(signal.SIGINT, _stopper(ExitCode.INTERRUPTED))
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


SIGNALS = {signal.SIGTERM: ExitCode.TERMINATED, signal.SIGINT: ExitCode.INTERRUPTED}


def on_stop(test):
    """A test in which signals stop this process as they stop a command; pytest's own alarm would be among them."""
    return pytest.mark.usefixtures("stopper")(pytest.mark.timeout(120, method="thread")(test))


def assert_stopped(raised, number):
    assert isinstance(raised, Terminated)
    assert (exit_code_for(raised), exitcodes.stopped_by()) == (SIGNALS[number], SIGNALS[number])
    # Whatever it led to; the second signal ends the process.
    assert exit_code_for(RuntimeError("a lock that is not held")) is SIGNALS[number]
    assert {signal.getsignal(each) for each in SIGNALS} == {signal.SIG_DFL}


@pytest.mark.parametrize("number", SIGNALS)
@on_stop
def test_a_signal_within_polars_waits_until_polars_is_done(number):
    made = []

    def double(value):
        signal.raise_signal(number)
        for _ in range(5):
            time.sleep(LOOK_AGAIN_S)  # it is looked again here, too
        return 2 * value

    with pytest.raises(Terminated) as raised:  # noqa: PT012 - after the list was made
        made.extend(pl.Series([21]).map_elements(double, return_dtype=pl.Int64))
        time.sleep(60)
    assert made == [42]
    assert_stopped(raised.value, number)


@pytest.mark.parametrize("number", SIGNALS)
@on_stop
def test_a_signal_waits_for_what_has_to_be_done_to_its_end(number):
    done = []
    with pytest.raises(Terminated) as raised:  # noqa: PT012 - it comes after the farewell
        with exitcodes.undisturbed():
            signal.raise_signal(number)
            time.sleep(5 * LOOK_AGAIN_S)
            done.append("farewell")
        time.sleep(60)
    assert done
    assert_stopped(raised.value, number)


@pytest.mark.parametrize("number", SIGNALS)
@on_stop
def test_a_signal_during_a_statement_cancels_it_and_leaves_the_connection_usable(connection, number):
    kick = threading.Timer(0.3, signal.pthread_kill, (threading.main_thread().ident, number))
    began = time.monotonic()
    with pytest.raises(Terminated) as raised, connection.transaction():  # noqa: PT012
        connection.execute("create table half_done ()")
        kick.start()
        connection.execute("select pg_sleep(60)")
    assert time.monotonic() - began < 30
    assert connection.info.transaction_status == TransactionStatus.IDLE
    assert connection.execute("select to_regclass('half_done')").fetchone() == (None,)
    assert_stopped(raised.value, number)


def stopped_at(line, work):
    """Do some work, with a signal at so many lines of Python after its beginning; whether there were so many."""
    left = line

    def trace(frame, event, _):
        nonlocal left
        if event == "line":
            left -= 1
            if not left:
                _stopper(ExitCode.TERMINATED)(signal.SIGTERM, frame)
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
        if left <= 0:
            time.sleep(60)  # it waits for a better moment
    except Terminated:
        pass
    finally:
        sys.settrace(before)
    return left <= 0


@on_stop
def test_a_signal_at_any_line_leaves_no_transaction_half_begun_or_half_ended(connection, rng):
    connection.execute("create table done (number integer)")

    def work():
        with connection.transaction():
            connection.execute("insert into done select %s", (line,))
            with connection.transaction(), connection.cursor().copy("copy done from stdin") as copy:
                copy.write(f"-{line}\n")

    line = 1
    while stopped_at(line, work):
        assert connection.info.transaction_status == TransactionStatus.IDLE, line
        with connection.transaction():
            found = connection.execute("select count(*) from done where abs(number) = %s", (line,)).fetchone()
        assert found in {(0,), (2,)}, line
        line += rng.randrange(1, 5)
    assert line > 100
