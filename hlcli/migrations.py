"""The schema's history: numbered SQL files, each applied once, in one transaction, under an advisory lock."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hlcli import __version__, db, sqlfiles
from hlcli.exitcodes import ConfigError

if TYPE_CHECKING:
    from psycopg import Connection

    from hlcli.settings import Settings

# Two-int advisory locks: the first names hlcli, the second what is locked. Fixed for ever.
LOCK_NAMESPACE = 0x484C  # "HL"
_MIGRATE_LOCK = 1

_CREATE = """
create table if not exists schema_migrations (
    version       integer primary key,
    name          text not null,
    sha256        text not null,
    applied_at    timestamptz not null default clock_timestamp(),
    hlcli_version text not null
)
"""


@dataclass(frozen=True, slots=True)
class Migration:
    """One SQL file; `sha256` is that of its text."""

    version: int
    name: str
    text: str

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()

    @property
    def label(self) -> str:
        return f"{self.version:04d}_{self.name}"


def known() -> list[Migration]:
    """The migrations that this version of hlcli carries."""
    return [Migration(*entry) for entry in sqlfiles.migrations()]


def pending(connection: Connection[Any]) -> list[Migration]:
    """The migrations that this database still lacks; reads only.

    Raises ConfigError when an applied migration was edited afterwards or is unknown to this version.
    """
    if connection.execute("select to_regclass('schema_migrations')").fetchone() == (None,):
        return known()
    rows = connection.execute("select version, name, sha256 from schema_migrations").fetchall()
    applied = {version: (name, sha256) for version, name, sha256 in rows}
    carried = {migration.version: migration for migration in known()}
    for version, (name, sha256) in sorted(applied.items()):
        if version not in carried:
            raise ConfigError(
                f"the database has migration {version:04d}_{name}, unknown to hlcli {__version__}: upgrade hlcli"
            )
        if carried[version].sha256 != sha256:
            raise ConfigError(
                f"migration {carried[version].label} was edited after it was applied: restore the file"
            )
    return [migration for version, migration in carried.items() if version not in applied]


def migrate(connection: Connection[Any]) -> list[Migration]:
    """Apply what is pending and return it. Any number of processes may call this at once.

    Each file is one transaction: what fails leaves the files before it applied and nothing of its own.
    """
    done = []
    for migration in known():
        with connection.transaction():
            connection.execute("set local lock_timeout = '10min'")
            connection.execute("set local statement_timeout = 0")
            connection.execute("select pg_advisory_xact_lock(%s, %s)", (LOCK_NAMESPACE, _MIGRATE_LOCK))
            connection.execute(_CREATE)
            if migration.version not in {each.version for each in pending(connection)}:
                continue
            connection.execute(migration.text.encode())
            connection.execute(
                "insert into schema_migrations (version, name, sha256, hlcli_version) values (%s, %s, %s, %s)",
                (migration.version, migration.name, migration.sha256, __version__),
            )
        done.append(migration)
    return done


def require_current(connection: Connection[Any]) -> None:
    """Raise ConfigError with the command to run unless the schema is the one of this version."""
    missing = pending(connection)
    if missing:
        have = "is empty" if len(missing) == len(known()) else f"lacks migration {missing[0].label}"
        raise ConfigError(f"the database {have}: run `hlcli init`")


def connect_ready(settings: Settings, *, role: str) -> Connection[Any]:
    """An autocommit connection to a database with the schema of this version.

    The embedded database is ours and brought up to date without asking; any other only by `hlcli init`.

    Raises ConfigError when the schema is not current.
    """
    connection = db.connect(settings, role=role)
    try:
        if settings.embedded and pending(connection):
            migrate(connection)
        require_current(connection)
    except BaseException:
        connection.close()
        raise
    return connection
