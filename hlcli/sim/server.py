"""The HTTP server around the exchange, on the loopback interface only."""

from __future__ import annotations

import json
import socket
import socketserver
import sys
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from time import monotonic, time
from types import TracebackType
from typing import Any, Self

from hlcli.sim.delivery import Line, deliver
from hlcli.sim.exchange import Exchange
from hlcli.sim.faults import Fault, Reply
from hlcli.sim.served import Served
from hlcli.sim.user_fills import UserFills
from hlcli.sim.values import HOUR_MS
from hlcli.sim.vaults import VaultUniverse
from hlcli.sim.wallets import WalletUniverse

HOST = "127.0.0.1"
MAX_REQUEST_BYTES = 1 << 20
_PLAIN = "text/plain; charset=utf-8"


class _Server(ThreadingHTTPServer):
    """Threads that never keep the process alive, and connections that end when the server does."""

    daemon_threads = True
    request_queue_size = 256

    def __init__(self, port: int, exchange: Exchange, latency: float) -> None:
        self.exchange = exchange
        self.latency = latency
        self.stopping = threading.Event()
        self._connections: set[socket.socket] = set()
        self._lock = threading.Lock()
        super().__init__((HOST, port), _Handler)

    def server_bind(self) -> None:
        """Bind without the reverse look-up of the host name, which may take seconds."""
        socketserver.TCPServer.server_bind(self)
        self.server_name = HOST
        self.server_port = self.server_address[1]

    def process_request(self, request: Any, client_address: Any) -> None:
        """Remember the connection, so that a stop reaches a client that keeps it open."""
        with self._lock:
            self._connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        """Forget it again."""
        with self._lock:
            self._connections.discard(request)
        super().shutdown_request(request)

    def hang_up(self) -> None:
        """End every open connection."""
        self.stopping.set()
        with self._lock:
            for connection in self._connections:
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that leaves is no error of ours; anything else is, and is shown."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    timeout = 120.0
    server: _Server

    def do_GET(self) -> None:
        """Answer a read."""
        self._respond(b"")

    def do_HEAD(self) -> None:
        """Answer a read without its body."""
        self._respond(b"")

    def do_POST(self) -> None:
        """Read a bounded body and answer it."""
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdigit()):
            self._refuse(411, "a POST needs a Content-Length")
        elif len(length) > 9 or int(length) > MAX_REQUEST_BYTES:
            self._refuse(413, "the request is too large")
        else:
            body = self.rfile.read(int(length))
            if len(body) < int(length):
                self.close_connection = True
            else:
                self._respond(body)

    def _respond(self, body: bytes) -> None:
        started = monotonic()
        server = self.server
        path = self.path.partition("?")[0]
        headers = {name.lower(): value for name, value in self.headers.items()}
        outcome = server.exchange.answer(self.command, path, headers, body)
        served = outcome.served
        line = Line(self.connection, server.stopping, served)
        self.close_connection = self.close_connection or headers.get("connection", "").lower() == "close"
        try:
            if served is not None and server.latency > 0 and not line.wait(server.latency):
                self.close_connection = True
                return
            keep = deliver(
                line,
                outcome.reply,
                outcome.fault,
                head_only=self.command == "HEAD",
                close=self.close_connection,
            )
            self.close_connection = not keep
        finally:
            if served is not None:
                served.seconds = monotonic() - started

    def _refuse(self, status: int, reason: str) -> None:
        """Answer a request whose body we will not read; the connection cannot be used again."""
        self.close_connection = True
        line = Line(self.connection, self.server.stopping, None)
        deliver(line, Reply(status, reason.encode(), _PLAIN), None, head_only=False, close=True)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Stay silent: the log is kept as data."""


class Simulator:
    """A simulated exchange; a context manager that serves while it is open.

    ``clock_offset_ms`` shifts the wallets' clock: real time, or ``now_ms`` where that was given. The vaults stay at
    ``now_ms``, by default the hour. ``user_fills`` are by default those of a small world, which is made when first
    asked for.
    """

    def __init__(
        self,
        *,
        seed: int = 1,
        vaults: int = 300,
        wallets: int = 300,
        weight_per_minute: int = 1200,
        latency: float = 0.0,
        faults: Iterable[Fault] = (),
        now_ms: int | None = None,
        port: int = 0,
        clock: Callable[[], float] = monotonic,
        user_fills: UserFills | None = None,
    ) -> None:
        self._fixed_ms = now_ms
        self.clock_offset_ms = 0
        self.now_ms = int(time() * 1000) // HOUR_MS * HOUR_MS if now_ms is None else now_ms
        self.vaults = VaultUniverse(seed, vaults, self.now_ms)
        self.wallets = WalletUniverse(seed, wallets, self.clock_ms)
        self.user_fills = (
            UserFills(seed, recent_before_ms=self.now_ms, bursts=1) if user_fills is None else user_fills
        )
        self.exchange = Exchange(weight_per_minute, faults, clock)
        self.exchange.register_info(self.vaults.info_handlers())
        self.exchange.register_info(self.wallets.info_handlers())
        self.exchange.register_info(self.user_fills.info_handlers(self.clock_ms))
        self.exchange.register_document("/Mainnet/vaults", self.vaults.document())
        self.exchange.register_document("/Mainnet/leaderboard", self.wallets.document())
        self.exchange.register_control("/sim/clock", self._set_clock)
        self._latency = latency
        self._wanted_port = port
        self._server: _Server | None = None
        self._thread: threading.Thread | None = None

    def clock_ms(self) -> int:
        """What the wallets' clock shows."""
        now_ms = int(time() * 1000) if self._fixed_ms is None else self._fixed_ms
        return now_ms + self.clock_offset_ms

    def _set_clock(self, body: bytes) -> dict[str, int]:
        wanted = json.loads(body)
        if (
            not isinstance(wanted, dict)
            or set(wanted) != {"offset_ms"}
            or type(wanted["offset_ms"]) is not int
        ):
            raise ValueError('expected {"offset_ms": <integer>}')
        self.clock_offset_ms = wanted["offset_ms"]
        return {"now_ms": self.clock_ms()}

    def start(self) -> Self:
        """Listen and serve in a thread of its own."""
        if self._server is not None:
            raise RuntimeError("the simulator is already running")
        self._server = _Server(self._wanted_port, self.exchange, self._latency)
        self._thread = threading.Thread(
            target=self._server.serve_forever,
            kwargs={"poll_interval": 0.02},
            name="simulator",
            daemon=True,
        )
        self._thread.start()
        return self

    def stop(self) -> None:
        """Stop listening and end open connections; harmless when it is not running."""
        server, thread = self._server, self._thread
        self._server = self._thread = None
        if server is not None and thread is not None:
            server.stopping.set()
            server.shutdown()
            thread.join()
            server.hang_up()
            server.server_close()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    @property
    def port(self) -> int:
        """The port it listens on."""
        if self._server is None:
            raise RuntimeError("the simulator is not running")
        return int(self._server.server_port)

    @property
    def url(self) -> str:
        """The root of the simulator's own pages."""
        return f"http://{HOST}:{self.port}"

    @property
    def info_url(self) -> str:
        """What HL_API_URL is on the real exchange."""
        return f"{self.url}/info"

    @property
    def stats_url(self) -> str:
        """What HL_STATS_URL is on the real exchange."""
        return f"{self.url}/Mainnet"

    def env(self) -> dict[str, str]:
        """The environment that points a command at this simulator."""
        return {"HL_API_URL": self.info_url, "HL_STATS_URL": self.stats_url}

    @property
    def log(self) -> list[Served]:
        """Everything served so far."""
        return self.exchange.log.snapshot()

    @property
    def refused(self) -> int:
        """How many requests the weight window refused."""
        return self.exchange.window.refused

    def count(self, kind: str | None = None, status: int | None = None) -> int:
        """How many requests were of this kind (info type or path) and got this status."""
        return self.exchange.log.count(kind, status)

    def add_fault(self, fault: Fault) -> None:
        """Add a fault to the script."""
        self.exchange.script.add(fault)

    def clear_faults(self) -> None:
        """From now on nothing goes wrong."""
        self.exchange.script.replace(())
