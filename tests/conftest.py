"""What every test stands on: a real PostgreSQL, a database of its own, a clean environment, a printed seed.

The server is the one of the embedded wheel, private to this test process and below /tmp (the wheel opens the parent
folders of its data to its own user); or, with HLCLI_TEST_DATABASE_URL, any server whose user may create databases.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg import conninfo, sql

from hlcli import embedded, logs, migrations
from hlcli import settings as settings_module
from hlcli.settings import Settings

Cli = Callable[..., "subprocess.CompletedProcess[str]"]
Spawn = Callable[..., "subprocess.Popen[str]"]

_SEED = int(os.environ.get("HLCLI_SEED") or random.SystemRandom().randrange(2**32))
os.environ["HLCLI_SEED"] = str(_SEED)  # the processes of pytest-xdist draw from it, too
# What would make a test depend on whoever runs it.
_OURS = ("HL_", "HLCLI_", "DATABASE_URL", "AWS_", "PG", "API_", "POLYMARKET_", "DEFILLAMA_")
_KEPT = {"HLCLI_RECORDED", "HLCLI_SEED", "HLCLI_TEST_DATABASE_URL"}


def pytest_report_header() -> str:
    return f"hlcli seed: {_SEED} (repeat with HLCLI_SEED={_SEED})"


def _clean(env: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in env.items() if name in _KEPT or not name.startswith(_OURS)}


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No setting of the machine reaches a test, and no .env above the checkout is found."""
    for name in set(os.environ) - set(_clean(os.environ)):
        monkeypatch.delenv(name)
    monkeypatch.setenv("HLCLI_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    logs.set_run_id(None)  # a job that ran in this process left its own


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> random.Random:
    """Random numbers that differ every run; the seed is in the header of the report."""
    return random.Random(f"{_SEED}/{request.node.nodeid}")


@pytest.fixture(scope="session")
def server() -> Iterator[str]:
    """The connection string of a server on which databases can be created."""
    given = os.environ.get("HLCLI_TEST_DATABASE_URL")
    if given:
        yield given
        return
    home = Path(tempfile.mkdtemp(prefix="hlcli-test-", dir="/tmp"))
    try:
        address = embedded.ensure_running(home)
        with psycopg.connect(address, autocommit=True) as admin:
            # Tests kill clients, never this server: durability would only cost time.
            for setting in ("fsync = off", "synchronous_commit = off", "full_page_writes = off"):
                admin.execute(f"alter system set {setting}")
            admin.execute("select pg_reload_conf()")
        yield address
    finally:
        embedded.stop(home)
        shutil.rmtree(home, ignore_errors=True)


def _create(server: str, template: str | None = None) -> str:
    name = f"hlcli_test_{uuid.uuid4().hex}"
    with psycopg.connect(server, autocommit=True) as admin:
        admin.execute(
            sql.SQL("create database {} template {}").format(
                sql.Identifier(name), sql.Identifier(template or "template0")
            )
        )
    return conninfo.make_conninfo(server, dbname=name)


def _drop(server: str, url: str) -> None:
    name = conninfo.conninfo_to_dict(url)["dbname"]
    with psycopg.connect(server, autocommit=True) as admin:
        admin.execute(sql.SQL("drop database if exists {} with (force)").format(sql.Identifier(str(name))))


@pytest.fixture(scope="session")
def template(server: str) -> Iterator[str]:
    """The name of a database with the current schema, to copy from."""
    url = _create(server)
    with psycopg.connect(url, autocommit=True) as connection:
        migrations.migrate(connection)
    yield str(conninfo.conninfo_to_dict(url)["dbname"])
    _drop(server, url)


@pytest.fixture
def database(server: str, template: str) -> Iterator[str]:
    """The connection string of a fresh database with the current schema."""
    url = _create(server, template)
    yield url
    _drop(server, url)


@pytest.fixture
def empty_database(server: str) -> Iterator[str]:
    """The connection string of a database without any schema."""
    url = _create(server)
    yield url
    _drop(server, url)


@pytest.fixture
def connection(database: str) -> Iterator[psycopg.Connection[Any]]:
    """An autocommit connection to `database`, in UTC."""
    with psycopg.connect(database, autocommit=True, options="-c TimeZone=UTC") as opened:
        yield opened


@pytest.fixture
def settings(database: str) -> Callable[..., Settings]:
    """Make settings for `database`; keyword arguments are environment variables."""

    def make(**env: str) -> Settings:
        return settings_module.from_env({"DATABASE_URL": database, "HL_EGRESS_KEY": "test", **env})

    return make


@pytest.fixture
def cli(tmp_path: Path) -> Cli:
    """Run `hlcli ...` as a process of its own: cli("status", DATABASE_URL=...)."""

    def run(*args: str, timeout: float = 90, **env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "hlcli", *args],
            env={**os.environ, **env},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=timeout,
            stdin=subprocess.DEVNULL,
        )

    return run


@pytest.fixture
def spawn(database: str, tmp_path: Path) -> Iterator[Spawn]:
    """Start `hlcli ...` on `database` as a process that runs on: spawn("maintain", NAME="value"); none outlives the test."""
    started = []

    def run(*args: str, **env: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-m", "hlcli", *args],
            env={**os.environ, "DATABASE_URL": database, "HL_EGRESS_KEY": "test", **env},
            cwd=tmp_path,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield run
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


@pytest.fixture
def recorded() -> Path:
    """The folder of recorded responses; the test is skipped where there is none."""
    folder = os.environ.get("HLCLI_RECORDED")
    if not folder or not Path(folder).is_dir():
        pytest.skip("HLCLI_RECORDED names no folder of recorded responses")
    return Path(folder)
