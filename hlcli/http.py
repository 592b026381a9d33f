"""The one HTTP client: a single loop around request, whole body and decoding.

What requests leaves open is closed here: a body that is cut off is a failed attempt, not a shorter list; a body
that drips is ended by the clock; what a compressed body unpacks to is bounded; NaN is not a number and numbers are
never floats. Every retry waits with full jitter, or as long as the server asked.
"""

from __future__ import annotations

import json
import random
import re
import socket
import tempfile
import threading
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from decimal import Decimal
from email.utils import parsedate_to_datetime
from typing import IO, TYPE_CHECKING, Any, TypeVar, cast
from urllib.parse import urlsplit

from hlcli import __version__
from hlcli.budget import DeadlineError, Priority
from hlcli.exitcodes import TemporaryError
from hlcli.logs import log, one_line

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    import requests

    from hlcli.budget import Budget, Grant

T = TypeVar("T")

MEGABYTE = 1 << 20
CONNECT_TIMEOUT_S = 10.0
READ_TIMEOUT_S = 20.0
MAX_ATTEMPTS = 6
# 429 is not the item's fault and clears within a minute; it has a count of its own.
MAX_REFUSALS = 8
BACKOFF_BASE_S, BACKOFF_CAP_S = 0.5, 20.0
RETRY_AFTER_CAP_S = 300.0
MAX_REDIRECTS = 3
_CHUNK = 1 << 16
_RETRIED = frozenset({408, 425, 500, 502, 503, 504})
_JSON_TYPE = re.compile(r"(application|binary)/(json|[a-z0-9.+-]+\+json|octet-stream)\b")


class SourceError(TemporaryError):
    """A source did not serve what was asked; says where and why, never the whole answer."""


class BadPayloadError(SourceError):
    """An answer arrived but is not what the source promises: cut off, not JSON, too large, wrong type."""


class StatusError(SourceError):
    """The source answered with an error status; `retry_after_s` is 0 when it named no time."""

    def __init__(self, where: str, status: int, retry_after_s: float = 0.0) -> None:
        super().__init__(f"{where} answered HTTP {status}")
        self.status = status
        self.retry_after_s = retry_after_s

    @property
    def of_question(self) -> bool:
        """Whether the status speaks of what was asked, not of the source; 403 may well mean all that we ask."""
        return self.status in {400, 404, 422}


@dataclass(slots=True)
class Answer:
    """A whole answer, not yet decoded. `body` is a file at its start."""

    status: int
    headers: Mapping[str, str]
    body: IO[bytes]


@dataclass(kw_only=True)
class HttpClient:
    """A client for one run. Safe to use from several threads.

    `deadline` is a time.monotonic() value that no request outlives; `per_second` an own limit on requests; `attempts`
    how often a request is tried before it has failed (429 aside).
    """

    budget: Budget | None = None
    deadline: float = float("inf")
    per_second: float | None = None
    attempts: int = MAX_ATTEMPTS
    _local: threading.local = field(default_factory=threading.local, init=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False)
    _next_slot: float = field(default=0.0, init=False)
    _sessions: list[requests.Session] = field(default_factory=list, init=False)

    def post_json(
        self,
        url: str,
        body: Mapping[str, Any],
        *,
        weight: int,
        cost_of: Callable[[Any], int] | None = None,
        priority: Priority = Priority.NORMAL,
        limit_bytes: int = 32 * MEGABYTE,
        timeout_s: float = 30.0,
    ) -> Any:
        """POST JSON and return the decoded answer; numbers are int or Decimal, `null` is None.

        `weight` is the most that the request can cost; `cost_of(answer)` what it did cost (default: `weight`).

        Raises StatusError for a status that retrying does not cure, SourceError when every attempt failed,
        DeadlineError when the run's time is up.
        """
        where = f"{_place(url)} {body.get('type', '')}".strip()

        def attempt() -> Any:
            grant = self._reserve(weight, priority)
            cost, refused_s = weight, None
            try:
                answer = self._exchange("POST", url, where, limit_bytes, timeout_s, json=body)
                with answer.body:
                    _check(where, answer)
                    decoded = decode(where, answer.body.read())
                if cost_of is not None:
                    cost = cost_of(decoded)
            except StatusError as error:
                if error.status == 429:
                    refused_s = error.retry_after_s
                raise
            except OSError as error:
                if _never_sent(error):
                    cost = 0
                raise
            finally:
                if self.budget is not None and grant is not None:
                    self.budget.settle(grant, cost, refused_s=refused_s)
            return decoded

        return self._retrying(where, attempt, gate_waits=self.budget is not None)

    def download(
        self,
        url: str,
        *,
        etag: str | None = None,
        check: Callable[[IO[bytes]], T],
        limit_bytes: int = 256 * MEGABYTE,
        timeout_s: float = 300.0,
    ) -> tuple[T | None, str | None]:
        """GET a large JSON body, outside of the weight budget; returns what `check(body)` made of it, and its ETag.

        The first is None when `etag` still names the body. `check` gets the whole body as a file and raises
        BadPayloadError when it is not what it should be, which is retried. Raises like post_json().
        """
        where = _place(url)
        headers = {"If-None-Match": etag} if etag else {}

        def attempt() -> tuple[T | None, str | None]:
            answer = self._exchange("GET", url, where, limit_bytes, timeout_s, headers=headers)
            with answer.body:
                told = answer.headers.get("ETag")
                if answer.status == 304 and etag:
                    return None, told or etag
                _check(where, answer)
                return check(answer.body), told

        return self._retrying(where, attempt, gate_waits=False)

    @property
    def left_s(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()

    def close(self) -> None:
        """Close every connection of every thread."""
        with self._lock:
            for session in self._sessions:
                session.close()

    def _reserve(self, weight: int, priority: Priority) -> Grant | None:
        if self.per_second:
            with self._lock:
                now = time.monotonic()
                slot = max(self._next_slot, now)
                self._next_slot = slot + 1 / self.per_second
            self._sleep(slot - now)
        if self.budget is None:
            return None
        return self.budget.reserve(weight, priority, deadline=self.deadline)

    def _sleep(self, seconds: float) -> None:
        if time.monotonic() + seconds > self.deadline:
            raise DeadlineError("the run's time is up")
        if seconds > 0:
            time.sleep(seconds)

    def _retrying(self, where: str, attempt: Callable[[], T], *, gate_waits: bool) -> T:
        """The loop. `gate_waits`: after a 429 the budget's gate makes the next attempt wait, not this loop."""
        import requests
        import urllib3

        failures = refusals = 0
        while True:
            self._sleep(0)
            try:
                return attempt()
            except StatusError as error:
                if error.status == 429:
                    refusals += 1
                    if refusals >= MAX_REFUSALS:
                        raise
                    if not gate_waits:
                        self._sleep(error.retry_after_s or random.uniform(5, 15) * refusals)
                    log.info(
                        "%s: refused (429), waiting; machines behind one address need one HL_EGRESS_KEY",
                        where,
                    )
                    continue
                if error.status not in _RETRIED:
                    raise
                failure: SourceError = error
            except SourceError as error:
                failure = error
            except (requests.RequestException, urllib3.exceptions.HTTPError, OSError) as error:
                failure = SourceError(f"{where}: {_told(error)}")
                failure.__cause__ = error
            failures += 1
            if failures >= self.attempts:
                raise failure
            log.info("%s; attempt %d of %d", one_line(failure), failures + 1, self.attempts)
            asked = failure.retry_after_s if isinstance(failure, StatusError) else 0.0
            pause = asked or random.uniform(0, min(BACKOFF_CAP_S, BACKOFF_BASE_S * 2**failures))
            if time.monotonic() + pause > self.deadline:
                raise failure  # this one cannot be had in time, others may
            self._sleep(pause)

    def _exchange(
        self, method: str, url: str, where: str, limit_bytes: int, timeout_s: float, **options: Any
    ) -> Answer:
        """Send one request and read its whole body, both within `timeout_s` of wall-clock time."""
        began = time.monotonic()
        ends = min(began + timeout_s, self.deadline)
        body = cast("IO[bytes]", tempfile.SpooledTemporaryFile(max_size=4 * MEGABYTE))  # noqa: SIM115
        try:
            with _end_at(ends):
                response = self._session().request(
                    method,
                    url,
                    stream=True,
                    timeout=(max(min(CONNECT_TIMEOUT_S, ends - began), 0.01), READ_TIMEOUT_S),
                    allow_redirects=method == "GET",
                    **options,
                )
                with response:
                    # read1 returns what is there, so the clock is looked at after every packet.
                    while chunk := response.raw.read1(_CHUNK, decode_content=True):
                        body.write(chunk)
                        if body.tell() > limit_bytes:
                            raise BadPayloadError(f"{where} served more than {limit_bytes // MEGABYTE} MB")
            if time.monotonic() >= ends:
                # An answer without a length ends with its connection, and the timer may be what ended that.
                raise TimeoutError
        except BaseException as error:
            body.close()
            if time.monotonic() >= ends and isinstance(error, Exception):
                if ends == self.deadline:
                    raise DeadlineError("the run's time is up") from error
                raise SourceError(f"{where} did not answer whole within {timeout_s:g} s") from error
            raise
        body.seek(0)
        return Answer(response.status_code, response.headers, body)

    def _session(self) -> requests.Session:
        """A session a thread: requests does not promise that one may be shared."""
        session: requests.Session | None = getattr(self._local, "session", None)
        if session is None:
            session = _new_session()
            self._local.session = session
            with self._lock:
                self._sessions.append(session)
        return session


def decode(where: str, body: bytes) -> Any:
    """JSON with exact numbers: int and Decimal, never float. Raises BadPayloadError, also for NaN."""
    try:
        return json.loads(body, parse_float=Decimal, parse_constant=_no_constant)
    except (ValueError, RecursionError, ArithmeticError) as error:
        # ValueError: no JSON, no UTF-8, or an integer of thousands of digits.
        raise BadPayloadError(f"{where} served no valid JSON ({len(body)} bytes)") from error


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _check(where: str, answer: Answer) -> None:
    if answer.status != 200:
        raise StatusError(where, answer.status, _retry_after(answer.headers))
    kind = answer.headers.get("Content-Type", "")
    if kind and not _JSON_TYPE.match(kind.strip().lower()):
        raise BadPayloadError(f"{where} served {kind.split(';')[0][:40]} instead of JSON")


def _retry_after(headers: Mapping[str, str]) -> float:
    """Seconds that the server asked to wait, in either form of the header; 0 when absent or garbage."""
    value = headers.get("Retry-After", "").strip()
    if re.fullmatch(r"[0-9]{1,9}", value):
        return min(float(value), RETRY_AFTER_CAP_S)
    with suppress(ValueError, TypeError, OverflowError):
        return min(max(parsedate_to_datetime(value).timestamp() - time.time(), 0.0), RETRY_AFTER_CAP_S)
    return 0.0


def _place(url: str) -> str:
    """Host and path of a URL: enough to know the source, without user, password and query."""
    parts = urlsplit(url)
    return f"{parts.hostname}{parts.path}"


def _never_sent(error: BaseException | None) -> bool:
    """Whether there was no connection that could have carried the request."""
    from urllib3.exceptions import ConnectTimeoutError, NewConnectionError

    while error is not None and not isinstance(error, NewConnectionError | ConnectTimeoutError):
        error = error.__cause__ or error.__context__
    return error is not None


def _told(error: BaseException) -> str:
    """The innermost cause in short: urllib3 wraps a refused connection in three layers of text."""
    while error.__cause__ is not None or error.__context__ is not None:
        error = error.__cause__ or error.__context__ or error
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"


# The transport below exists for one thing: http.client reads headers byte by byte for as long as they drip, and no
# time-out of requests covers that. The thread that waits says until when; a timer then closes its socket.
_waiting = threading.local()


@contextmanager
def _end_at(ends: float) -> Iterator[None]:
    _waiting.ends, _waiting.timer = ends, None
    try:
        yield
    finally:
        if _waiting.timer is not None:
            _waiting.timer.cancel()


def _shut(sock: socket.socket) -> None:
    with suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)


def _arm(sock: socket.socket) -> None:
    if _waiting.timer is not None:
        _waiting.timer.cancel()
    left = _waiting.ends - time.monotonic()
    if left < threading.TIMEOUT_MAX:
        _waiting.timer = threading.Timer(max(left, 0.0), _shut, [sock])
        _waiting.timer.daemon = True
        _waiting.timer.start()


def _new_session() -> requests.Session:
    import requests
    from requests.adapters import HTTPAdapter
    from urllib3 import connection, connectionpool

    class Session(requests.Session):
        def get_redirect_target(self, resp: requests.Response) -> str | None:
            # Only a GET follows; for anything else requests would prepare the next request, body and all.
            target = super().get_redirect_target(resp) if resp.request.method == "GET" else None
            if target is not None:
                # requests reads the body of a redirect whole and into memory, however long it is.
                resp.raw.close()
                resp._content = b""  # noqa: SLF001
            return target

    class Connection(connection.HTTPConnection):
        def getresponse(self) -> Any:
            _arm(cast("socket.socket", self.sock))
            return super().getresponse()

    class SecureConnection(connection.HTTPSConnection):
        def getresponse(self) -> Any:
            _arm(cast("socket.socket", self.sock))
            return super().getresponse()

    class Pool(connectionpool.HTTPConnectionPool):
        ConnectionCls = Connection

    class SecurePool(connectionpool.HTTPSConnectionPool):
        ConnectionCls = SecureConnection

    class Adapter(HTTPAdapter):
        def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
            super().init_poolmanager(*args, **kwargs)
            self.poolmanager.pool_classes_by_scheme = {"http": Pool, "https": SecurePool}

    session = Session()
    session.max_redirects = MAX_REDIRECTS
    session.headers.update(
        {"User-Agent": f"hlcli/{__version__}", "Accept": "application/json", "Accept-Encoding": "gzip"}
    )
    for scheme in ("http://", "https://"):
        session.mount(scheme, Adapter(max_retries=0))
    return session
