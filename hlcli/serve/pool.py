"""Read-only connections for the HTTP API, bounded in number, in waiting and in the time of a query."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, LiteralString

import psycopg
import psycopg_pool
from psycopg import errors

from hlcli import db, logs

if TYPE_CHECKING:
    from collections.abc import Mapping

    from hlcli.settings import Settings

# A query keeps one core busy: more connections than a small machine's cores only make each other slow.
CONNECTIONS = 8
# Requests beyond are refused at once: they would time out in the queue.
WAITING = 200
CONNECTION_TIMEOUT = 3
STATEMENT_TIMEOUT = 5
# For a server that does not answer at all, not even to say that the statement took too long.
ANSWER_TIMEOUT = STATEMENT_TIMEOUT + 2

READ_ONLY = """
select set_config('default_transaction_read_only', 'on', false),
       set_config('statement_timeout', %s, false)
"""


class UnavailableError(Exception):
    """The database cannot answer now; the text is fit for any client."""


class Pool:
    """Asks queries that answer one row."""

    def __init__(self, settings: Settings) -> None:
        self.connections: psycopg_pool.AsyncConnectionPool[psycopg.AsyncConnection[Any]]
        self.connections = psycopg_pool.AsyncConnectionPool(
            db.target(settings),
            kwargs=db.keywords("serve"),
            configure=_configure,
            min_size=1,
            max_size=CONNECTIONS,
            max_waiting=WAITING,
            timeout=CONNECTION_TIMEOUT,
            # Attempts go on as long as somebody asks.
            reconnect_timeout=1,
            open=False,
        )

    async def one(self, query: LiteralString, values: Mapping[str, Any]) -> tuple[Any, ...] | None:
        """The first row. Raises UnavailableError, and psycopg.Error for a query or schema that is wrong."""
        try:
            async with asyncio.timeout(CONNECTION_TIMEOUT + ANSWER_TIMEOUT):
                try:
                    return await self._one(query, values)
                except _BrokenError:
                    # The server was restarted: no idle connection is alive. Reading twice does no harm.
                    await self.connections.check()
                    return await self._one(query, values)
        except errors.QueryCanceled:
            raise UnavailableError("the query took too long: ask for less") from None
        except psycopg_pool.TooManyRequests:
            raise UnavailableError("too many requests at once") from None
        except (psycopg.OperationalError, psycopg.InterfaceError, _BrokenError, TimeoutError) as error:
            logs.log.warning("serve: %s", logs.one_line(error))
            raise UnavailableError("the database is unavailable") from None

    async def _one(self, query: LiteralString, values: Mapping[str, Any]) -> tuple[Any, ...] | None:
        async with self.connections.connection() as connection:
            try:
                async with asyncio.timeout(ANSWER_TIMEOUT):
                    cursor = await connection.execute(query, values)
                    row: tuple[Any, ...] | None = await cursor.fetchone()
                    return row
            except psycopg.Error as error:
                if connection.broken:
                    raise _BrokenError(logs.one_line(error)) from None
                raise


class _BrokenError(Exception):
    """The connection was lost under the query."""


async def _configure(connection: psycopg.AsyncConnection[Any]) -> None:
    await connection.execute(db.SESSION)
    await connection.execute(READ_ONLY, (f"{STATEMENT_TIMEOUT}s",))
