"""Connections to PostgreSQL: one way to open one, with the settings that keep a short-lived job safe."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hlcli.exitcodes import ConfigError

if TYPE_CHECKING:
    from psycopg import Connection, ConnectionInfo

    from hlcli.settings import Settings

MINIMUM_VERSION = 140000
CONNECT_TIMEOUT = 10

# Set after connecting, not through `options`: PgBouncer refuses start-up options that it does not know.
# A stopped process must not hold its lock for ever, a lost client must be noticed (the server's keepalives: a machine
# without power says no good-bye), a query must end.
SESSION = """
select set_config('TimeZone', 'UTC', false),
       set_config('statement_timeout', '15min', false),
       set_config('lock_timeout', '60s', false),
       set_config('idle_in_transaction_session_timeout', '5min', false),
       set_config('idle_session_timeout', '0', false),
       set_config('tcp_keepalives_idle', '20', false),
       set_config('tcp_keepalives_interval', '10', false),
       set_config('tcp_keepalives_count', '3', false),
       set_config('client_min_messages', 'warning', false),
       set_config('search_path', quote_ident(current_schema()), false),
       set_config('DateStyle', 'ISO, MDY', false),
       set_config('IntervalStyle', 'postgres', false),
       set_config('quote_all_identifiers', 'off', false),
       set_config('default_transaction_isolation', 'read committed', false)
"""


def conninfo(settings: Settings) -> str:
    """The connection string of the configured database; starts the embedded server when there is none."""
    if settings.database_url is not None:
        return settings.database_url
    from hlcli import embedded

    return embedded.ensure_running(settings.hlcli_home)


def target(settings: Settings) -> str:
    """conninfo() that libpq can parse. Raises ConfigError for any other."""
    import psycopg

    text = conninfo(settings)
    try:
        psycopg.conninfo.conninfo_to_dict(text)
    except (psycopg.ProgrammingError, UnicodeDecodeError):
        # libpq quotes what it cannot parse, and with it the password.
        raise ConfigError("DATABASE_URL is neither a PostgreSQL URL nor key=value pairs") from None
    return text


def keywords(role: str) -> dict[str, Any]:
    """What every connection is opened with: autocommit, time-outs, keepalives. SESSION belongs to it."""
    return {
        "autocommit": True,
        # Binary COPY sends UTF-8, whatever the environment, the role or the URL say.
        "client_encoding": "utf8",
        "application_name": f"hlcli:{role}",
        "connect_timeout": CONNECT_TIMEOUT,
        # A half-open connection is noticed within a minute, not within the kernel's two hours.
        "keepalives_idle": 20,
        "keepalives_interval": 10,
        "keepalives_count": 3,
        "tcp_user_timeout": 60_000,
        # Named prepared statements do not survive a transaction pooler.
        "prepare_threshold": None,
    }


def connect(settings: Settings, *, role: str) -> Connection[Any]:
    """Open an autocommit connection in UTC with time-outs and keepalives.

    `role` is what pg_stat_activity shows after "hlcli:".

    Raises psycopg.OperationalError when the server is out of reach and ConfigError when it is too old.
    """
    import psycopg

    connection = psycopg.connect(target(settings), **keywords(role))
    try:
        _require_server(connection.info)
        connection.execute(SESSION)
    except BaseException:
        connection.close()
        raise
    return connection


def _require_server(info: ConnectionInfo) -> None:
    if info.server_version < MINIMUM_VERSION:
        found = info.parameter_status("server_version")
        raise ConfigError(f"PostgreSQL 14 or newer is needed, the server is {found}")
    encoding = info.parameter_status("server_encoding")
    if encoding != "UTF8":
        raise ConfigError(
            f"the database's encoding is {encoding}: create one with ENCODING 'UTF8' TEMPLATE template0"
        )
