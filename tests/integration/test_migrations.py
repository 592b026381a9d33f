"""The schema's history: any number of processes at once, edited and newer schemas, failures, repetition."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psycopg
import pytest

from hlcli import embedded, migrations, sqlfiles
from hlcli.exitcodes import ConfigError

PROCESSES = 12
JOBS = [("ingest", "vaults", "--limit", "0"), ("rank", "vaults"), ("status",)]
EVERY_JOB = pytest.mark.parametrize("command", JOBS, ids=[" ".join(command[:2]) for command in JOBS])
# A port on which nobody listens: a job that gets as far as asking would exit 4.
NOWHERE = {"HL_API_URL": "http://127.0.0.1:1/info", "HL_STATS_URL": "http://127.0.0.1:1/Mainnet"}


def at_once(count, *command, cwd, **env):
    """Start so many processes and return (exit code, stdout, stderr) of each."""
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "hlcli", *command],
            env={**os.environ, **env},
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(count)
    ]
    try:
        outputs = [process.communicate(timeout=150) for process in started]
        return [(process.returncode, *output) for process, output in zip(started, outputs, strict=True)]
    finally:
        for process in started:
            if process.poll() is None:
                process.kill()
                process.wait()


def connect(url):
    return psycopg.connect(url, autocommit=True)


def relations(url):
    """All that is in a database, with what tells a change: the version of every catalog row."""
    with connect(url) as connection:
        return connection.execute(
            "select 'relation', oid::regclass::text, xmin::text, relfilenode::text from pg_class"
            " where relnamespace not in (select oid from pg_namespace where nspname ~ '^pg_' or nspname = 'information_schema')"
            " union all select 'function', oid::regprocedure::text, xmin::text, '' from pg_proc"
            " where pronamespace = current_schema()::regnamespace"
            " union all select 'constraint', conname, xmin::text, oid::text from pg_constraint where conrelid >= 16384"
            " order by 1, 2, 3, 4"
        ).fetchall()


def history(url):
    with connect(url) as connection:
        return connection.execute("select *, xmin::text from schema_migrations order by version").fetchall()


def labels():
    return [f"{version:04d}_{name}" for version, name, _ in sqlfiles.migrations()]


def one_line(done):
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1, done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr


# --- many at once (F19) -------------------------------------------------------------------------------------------


def test_twelve_inits_at_once_on_an_empty_database_all_succeed(empty_database, tmp_path):
    done = at_once(PROCESSES, "init", cwd=tmp_path, DATABASE_URL=empty_database)
    assert [(code, errors) for code, _, errors in done] == [(0, "")] * PROCESSES
    # Each file was applied once, by one of them.
    applied = sorted(
        line for _, output, _ in done for line in output.splitlines() if line.startswith("applied")
    )
    assert applied == [f"applied {label}" for label in labels()]
    with connect(empty_database) as connection:
        migrations.require_current(connection)
        assert connection.execute("select count(*) from pg_locks where locktype = 'advisory'").fetchone() == (
            0,
        )


def test_what_twelve_inits_made_is_what_one_makes(empty_database, database, tmp_path):
    at_once(3, "init", cwd=tmp_path, DATABASE_URL=empty_database)

    def columns(url):
        with connect(url) as connection:
            return connection.execute(
                "select table_schema, table_name, column_name, data_type, is_nullable, column_default"
                " from information_schema.columns where table_schema not in ('pg_catalog', 'information_schema')"
                " order by 1, 2, ordinal_position"
            ).fetchall()

    assert columns(empty_database) == columns(database) != []


@pytest.fixture
def home():
    """An empty place for an embedded server; the server, if any, is ended afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="hlcli-home-", dir="/tmp"))
    yield folder
    embedded.stop(folder)
    shutil.rmtree(folder, ignore_errors=True)


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    # A dead child that nobody has waited for still has a number.
    return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()


def test_twelve_first_starts_on_an_empty_home_all_succeed_and_db_stop_ends_the_server(home, tmp_path, cli):
    done = at_once(PROCESSES, "status", cwd=tmp_path, HLCLI_HOME=str(home))
    assert [(code, errors) for code, _, errors in done] == [(0, "")] * PROCESSES
    assert all("vaults" in output for _, output, _ in done)
    data = embedded.data_folder(home)
    # One server, and no half-made folder of another.
    assert [path.name for path in home.iterdir() if not path.name.startswith(".lock")] == [data.name]
    pid = int((data / "postmaster.pid").read_text().splitlines()[0])
    assert alive(pid)
    stopped = cli("db", "stop", HLCLI_HOME=str(home))
    assert (stopped.returncode, stopped.stdout, stopped.stderr) == (0, "stopped\n", "")
    assert not (data / "postmaster.pid").exists()
    assert not alive(pid)
    again = cli("db", "stop", HLCLI_HOME=str(home))
    assert (again.returncode, again.stdout) == (0, "was not running\n")


@pytest.mark.long
def test_an_embedded_server_that_was_killed_is_started_again_with_its_data(home, cli):
    assert cli("status", HLCLI_HOME=str(home)).returncode == 0
    pid = int((embedded.data_folder(home) / "postmaster.pid").read_text().splitlines()[0])
    before = history(embedded.ensure_running(home))
    os.kill(pid, signal.SIGKILL)
    # Its number, too, must be gone: a process that nobody has waited for looks alive.
    for _ in range(100):
        if not Path(f"/proc/{pid}").exists():
            break
        time.sleep(0.1)
    done = cli("status", HLCLI_HOME=str(home))
    assert (done.returncode, done.stderr) == (0, "")
    assert history(embedded.ensure_running(home)) == before


def test_a_start_while_another_migrates_waits_for_it(empty_database, tmp_path):
    with connect(empty_database) as holder:
        with holder.transaction():
            holder.execute("select pg_advisory_xact_lock(%s, 1)", (migrations.LOCK_NAMESPACE,))
            init = subprocess.Popen(
                [sys.executable, "-m", "hlcli", "init"],
                env={**os.environ, "DATABASE_URL": empty_database},
                cwd=tmp_path,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for _ in range(6000):
                waiting = "select exists (select from pg_locks where locktype = 'advisory' and not granted)"
                if holder.execute(waiting).fetchone() == (True,) or init.poll() is not None:
                    break
                holder.execute("select pg_sleep(0.01)")
            assert init.poll() is None
            assert holder.execute("select to_regclass('ingestion_runs')").fetchone() == (None,)
        output, errors = init.communicate(timeout=60)
    assert (init.returncode, errors) == (0, "")
    assert output.splitlines() == [f"applied {label}" for label in labels()]


# --- a schema of another version ----------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [("init",), JOBS[0]], ids=["init", "ingest vaults"])
def test_an_edited_migration_is_exit_5_and_changes_nothing(cli, database, connection, command):
    connection.execute("update schema_migrations set sha256 = md5('another') where version = 2")
    before = relations(database), history(database)
    told = cli(*command, DATABASE_URL=database, **NOWHERE)
    assert told.returncode == 5
    assert "0002_vaults was edited" in one_line(told)
    assert (relations(database), history(database)) == before
    assert connection.execute("select count(*) from ingestion_runs").fetchone() == (0,)


@pytest.mark.parametrize("command", [("init",), JOBS[0]], ids=["init", "ingest vaults"])
def test_a_schema_newer_than_the_code_is_exit_5_and_changes_nothing(cli, database, connection, command):
    connection.execute(
        "insert into schema_migrations (version, name, sha256, hlcli_version) values (9999, 'future', 'x', '99.0')"
    )
    before = relations(database), history(database)
    told = cli(*command, DATABASE_URL=database, **NOWHERE)
    assert told.returncode == 5
    line = one_line(told)
    assert "9999_future" in line
    assert "upgrade hlcli" in line
    assert (relations(database), history(database)) == before


@EVERY_JOB
def test_a_job_on_an_empty_database_is_exit_5_names_hlcli_init_and_creates_nothing(
    cli, empty_database, command
):
    before = relations(empty_database)
    told = cli(*command, DATABASE_URL=empty_database, **NOWHERE)
    assert told.returncode == 5
    assert "hlcli init" in one_line(told)
    assert relations(empty_database) == before


def test_a_job_against_an_older_schema_is_exit_5_and_names_what_is_missing(cli, empty_database, monkeypatch):
    with monkeypatch.context() as older, psycopg.connect(empty_database, autocommit=True) as connection:
        held = sqlfiles.migrations()[:1]
        older.setattr(sqlfiles, "migrations", lambda: held)
        migrations.migrate(connection)
    told = cli("rank", "vaults", DATABASE_URL=empty_database, **NOWHERE)
    assert told.returncode == 5
    line = one_line(told)
    assert "hlcli init" in line
    assert "0002_vaults" in line
    # And init brings it up from there.
    done = cli("init", DATABASE_URL=empty_database)
    assert (done.returncode, done.stdout.splitlines()[0]) == (0, "applied 0002_vaults")


# --- failures and repetition --------------------------------------------------------------------------------------


def carry(monkeypatch, *more):
    """As if this version of hlcli carried these files too."""
    held = [*sqlfiles.migrations(), *more]
    monkeypatch.setattr(sqlfiles, "migrations", lambda: held)


BROKEN = "create schema half; create table half.made (a int); insert into half.made values (1); select 1 / 0;"


def test_a_failing_migration_leaves_nothing_of_itself_and_what_came_before(empty_database, monkeypatch):
    carry(
        monkeypatch,
        (9001, "fine", "create table fine (a int)"),
        (9002, "broken", BROKEN),
        (9003, "never", "create table never ()"),
    )
    with connect(empty_database) as connection:
        for _ in range(2):
            with pytest.raises(psycopg.errors.DivisionByZero):
                migrations.migrate(connection)
            assert connection.execute("select to_regnamespace('half'), to_regclass('never')").fetchone() == (
                None,
                None,
            )
            assert [each.version for each in migrations.pending(connection)] == [9002, 9003]
            assert connection.execute("table fine").fetchall() == []
        with pytest.raises(ConfigError, match="lacks migration 9002_broken"):
            migrations.require_current(connection)


def test_a_failed_migration_is_applied_once_it_is_mended(database, connection, monkeypatch):
    with monkeypatch.context() as patch:
        carry(patch, (9001, "mended", BROKEN))
        with pytest.raises(psycopg.errors.DivisionByZero):
            migrations.migrate(connection)
    carry(monkeypatch, (9001, "mended", BROKEN.replace("1 / 0", "1 / 1")))
    assert [each.label for each in migrations.migrate(connection)] == ["9001_mended"]
    assert connection.execute("table half.made").fetchall() == [(1,)]
    assert migrations.migrate(connection) == []
    migrations.require_current(connection)


def test_a_first_migration_that_fails_leaves_an_empty_database(empty_database, monkeypatch):
    before = relations(empty_database)
    monkeypatch.setattr(sqlfiles, "migrations", lambda: [(1, "broken", BROKEN)])
    with connect(empty_database) as connection, pytest.raises(psycopg.errors.DivisionByZero):
        migrations.migrate(connection)
    assert relations(empty_database) == before


def test_an_applied_migration_that_is_edited_is_refused_before_anything_new_is_applied(
    database, connection, monkeypatch
):
    first, *others = sqlfiles.migrations()
    held = [(first[0], first[1], first[2] + "\n-- edited"), *others, (9001, "new", "create table new_one ()")]
    monkeypatch.setattr(sqlfiles, "migrations", lambda: held)
    with pytest.raises(ConfigError, match="0001_foundation was edited"):
        migrations.migrate(connection)
    assert connection.execute("select to_regclass('new_one')").fetchone() == (None,)


def test_init_repeated_changes_nothing(cli, empty_database):
    first = cli("init", DATABASE_URL=empty_database)
    assert first.stdout.splitlines() == [f"applied {label}" for label in labels()]
    before = relations(empty_database), history(empty_database)
    for command in (("init",), ("db", "migrate")):
        again = cli(*command, DATABASE_URL=empty_database)
        assert (again.returncode, again.stdout, again.stderr) == (0, "the schema is up to date\n", "")
    assert (relations(empty_database), history(empty_database)) == before


def test_looking_for_pending_migrations_writes_nothing(empty_database, database):
    for url in (empty_database, database):
        before = relations(url)
        with connect(url) as connection:
            connection.execute("set default_transaction_read_only = on")
            migrations.pending(connection)
        assert relations(url) == before


def test_the_history_tells_the_file_its_digest_and_the_version(database):
    assert [row[:3] for row in history(database)] == [
        (migration.version, migration.name, migration.sha256) for migration in migrations.known()
    ]


def test_versions_are_numbered_without_gap_or_repetition():
    versions = [version for version, *_ in sqlfiles.migrations()]
    assert versions == list(range(1, len(versions) + 1))
