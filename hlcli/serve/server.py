"""`hlcli serve` below the command line: schema check, socket, uvicorn in the foreground."""

from __future__ import annotations

import errno
import ipaddress
import logging
import socket
from typing import TYPE_CHECKING

import uvicorn

from hlcli import logs, migrations
from hlcli.exitcodes import ConfigError, TemporaryError
from hlcli.serve import pool
from hlcli.serve.app import create_app

if TYPE_CHECKING:
    from hlcli.settings import Settings

MAX_CLIENTS = 1000


def run(settings: Settings, host: str, port: int, *, access_log: bool) -> None:
    """Serve until SIGTERM or SIGINT, which is raised again once the last request is answered.

    Port 0 takes any free one. Raises ConfigError for the schema or an unusable address, TemporaryError when the
    port is taken, psycopg.OperationalError when there is no database.
    """
    migrations.connect_ready(settings, role="serve").close()
    app = create_app(settings)
    with _listen(host, port) as listening:
        shown = f"[{host}]" if ":" in host else host
        url = f"http://{shown}:{listening.getsockname()[1]}"
        if not settings.api_token and not _is_loopback(listening):
            logs.log.warning("API_TOKEN is not set: %s is open to the whole network", url)
        for name in ("uvicorn", "psycopg"):
            library = logging.getLogger(name)
            library.handlers[:], library.propagate = logs.log.handlers, False
            library.setLevel(logging.WARNING)
        logging.getLogger("uvicorn.access").setLevel(logging.INFO)
        config = uvicorn.Config(
            app,
            log_config=None,
            access_log=access_log,
            lifespan="on",
            server_header=False,
            limit_concurrency=MAX_CLIENTS,
            timeout_graceful_shutdown=pool.ANSWER_TIMEOUT,
        )
        logs.log.info("listening on %s, documentation on %s/docs", url, url)
        uvicorn.Server(config).run([listening])


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family, backlog=1024)
    except (OSError, UnicodeError) as error:
        told = f"cannot listen on {host} port {port}: {logs.one_line(error)}"
        if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
            raise TemporaryError(told) from None
        raise ConfigError(told) from None


def _is_loopback(listening: socket.socket) -> bool:
    return ipaddress.ip_address(listening.getsockname()[0]).is_loopback
