"""An S3 for tests: moto's server behind a proxy that logs every request and can lie, and small objects to put into it."""

from __future__ import annotations

import http.client
import io
import json
import threading
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import psycopg
from vault_tables import dump

from hlcli.sources.files import Rows

SECRET = "s3-secret/with+delimiters="
USER = "0x" + "a" * 40
T0 = datetime(2026, 9, 24, 12, tzinfo=UTC)
HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "te", "upgrade"}


@dataclass(frozen=True)
class Call:
    """A request as it came; `kind` is list, head, get or other."""

    kind: str
    key: str
    query: dict[str, str]
    headers: dict[str, str]


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes
    cut: int | None = None
    """So many bytes of the body, then the connection is closed."""
    chunked: bool = False
    held: threading.Event | None = None
    """The second half of the body waits for it."""


@dataclass
class Fault:
    """What happens to the next `times` requests (None: all) of a kind, and of one key where it is given."""

    kind: str
    key: str | None = None
    times: int | None = 1
    before: Callable[[], object] | None = None
    """Is called before the request reaches the server."""
    instead: Callable[[], Answer] | None = None
    """Answers in the server's place."""
    change: Callable[[Answer], Answer] | None = None


def refuse(status, code="InternalError", **headers):
    """An error as S3 words it."""
    body = f'<?xml version="1.0"?><Error><Code>{code}</Code><Message>{code} it is</Message></Error>'.encode()
    return lambda: Answer(status, {"Content-Type": "application/xml", **headers}, body)


def cut(at=-20, *, chunked=False):
    """The body breaks off."""
    return lambda answer: replace(answer, cut=at % max(len(answer.body), 1), chunked=chunked)


def flip(answer):
    """One bit of the body differs."""
    body = bytearray(answer.body)
    body[len(body) // 2] ^= 1
    return replace(answer, body=bytes(body))


def swap(old, new):
    """Another text in the body."""

    def change(answer):
        assert old.encode() in answer.body
        return replace(answer, body=answer.body.replace(old.encode(), new.encode()))

    return change


class Store:
    """A bucket of moto's, and the proxy through which it is seen."""

    def __init__(self, target):
        from moto.core import DEFAULT_ACCOUNT_ID
        from moto.s3.models import s3_backends

        self.bucket = f"test-{uuid.uuid4().hex}"
        self.target, self._backend = target, s3_backends[DEFAULT_ACCOUNT_ID]["aws"]
        self._backend.create_bucket(self.bucket, "us-east-1")
        self.calls: list[Call] = []
        self._faults: list[Fault] = []
        self._mutex = threading.Lock()
        self.page_size: int | None = None
        self._server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"store": self}))
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self):
        self._server.shutdown()
        self._server.server_close()
        self._backend.buckets.pop(self.bucket)

    def env(self, prefix="", **more):
        """What makes both commands read from here."""
        return {
            "AWS_ENDPOINT_URL_S3": self.url,
            "AWS_S3_BUCKET": self.bucket,
            "AWS_S3_PREFIX": prefix or "raw/",
            "HL_FILLS_S3_BUCKET": self.bucket,
            "HL_FILLS_S3_PREFIX": prefix or "raw/",
            "HL_FILLS_S3_REGION": "us-east-1",
            **more,
        }

    def put(self, key, body, modified=None):
        made = self._backend.put_object(self.bucket, key, body)
        # Whole seconds, as S3 tells them; moto's own clock plays no part.
        made.last_modified = (modified or T0 + timedelta(days=1)).replace(tzinfo=None)

    def delete(self, key):
        self._backend.delete_object(self.bucket, key)

    def get(self, key):
        return self._backend.get_object(self.bucket, key).value

    def count_keys(self, prefix):
        return sum(key.startswith(prefix) for key in self._backend.buckets[self.bucket].keys)

    def fault(self, kind, key=None, **what):
        with self._mutex:
            self._faults.append(Fault(kind, key, **what))

    def mend(self):
        with self._mutex:
            self._faults.clear()

    def count(self, kind=None, key=None):
        return sum(kind in {None, call.kind} and key in {None, call.key} for call in list(self.calls))

    def of(self, call):
        """The fault for this request, used up by it."""
        with self._mutex:
            self.calls.append(call)
            for fault in self._faults:
                if fault.kind == call.kind and fault.key in {None, call.key} and fault.times != 0:
                    fault.times = None if fault.times is None else fault.times - 1
                    return fault
        return None

    def forward(self, method, path, query, headers):
        if self.page_size and "list-type" in query:
            path += f"&max-keys={self.page_size}"
        upstream = http.client.HTTPConnection(*self.target, timeout=30)
        try:
            upstream.request(method, path, headers=headers)
            answer = upstream.getresponse()
            kept = {name: value for name, value in answer.getheaders() if name.lower() not in HOP_BY_HOP}
            return Answer(answer.status, kept, answer.read())
        finally:
            upstream.close()


class _Server(ThreadingHTTPServer):
    daemon_threads, block_on_close = True, False

    def handle_error(self, request, client_address):
        """A client that goes away is what some tests are about."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    store: Store

    def _serve(self):
        parts = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(parts.query).items()}
        bucket, _, key = unquote(parts.path.lstrip("/")).partition("/")
        kind = {"HEAD": "head", "GET": "get"}.get(self.command, "other") if key else "other"
        if "list-type" in query and not key:
            kind = "list"
        headers = {name.lower(): value for name, value in self.headers.items()}
        fault = self.store.of(Call(kind, key, query, headers))
        if fault and fault.before:
            fault.before()
        if fault and fault.instead:
            answer = fault.instead()
        else:
            answer = self.store.forward(self.command, self.path, query, dict(self.headers))
        if fault and fault.change:
            answer = fault.change(answer)
        with suppress(ConnectionError):
            self._send(answer)

    do_GET = do_HEAD = _serve

    def _send(self, answer):
        body = b"" if self.command == "HEAD" else answer.body
        length = answer.headers.get("Content-Length") if self.command == "HEAD" else str(len(body))
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            if name.lower() != "content-length":
                self.send_header(name, value)
        if answer.chunked:
            self.send_header("Transfer-Encoding", "chunked")
            body = b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
        else:
            self.send_header("Content-Length", length or "0")
        self.end_headers()
        if answer.held:
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            answer.held.wait(60)
            body = body[len(body) // 2 :]
        if answer.cut is not None:
            body, self.close_connection = body[: answer.cut], True
        self.wfile.write(body)

    def log_message(self, *args):
        pass


def packed(*lines):
    """Lines of JSON, as they are when they are bytes, in an LZ4 frame."""
    import pyarrow as pa

    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "lz4") as out:
        out.write(
            b"".join(
                (line if isinstance(line, bytes) else json.dumps(line).encode()) + b"\n" for line in lines
            )
        )
    return sink.getvalue().to_pybytes()


def iso(moment):
    return f"{moment:%Y-%m-%dT%H:%M:%S.%f}000"


def fill(number, **changes):
    """A fill as nodes write it, a second after the one before it."""
    return {
        "coin": "BTC",
        "px": f"{64_000 + number}.10",
        "sz": "0.00100",
        "side": "BA"[number % 2],
        "time": int(T0.timestamp() * 1000) + 1000 * number,
        "startPosition": "0.5000",
        "dir": "Open Long",
        "closedPnl": "0.0",
        "hash": f"0x{number:064x}",
        "oid": 500_000_000 + number,
        "crossed": True,
        "fee": "0.000010",
        "tid": 10**12 + number,
        "feeToken": "USDC",
        "twapId": None,
        **changes,
    }


def block(*numbers, user=USER, **changes):
    """A line by block that holds these fills."""
    time = T0 + timedelta(seconds=numbers[0] if numbers else 0)
    events = [[user, fill(number, **changes)] for number in numbers]
    return {"local_time": iso(time), "block_time": iso(time), "block_number": 10**9, "events": events}


def fills(*numbers, **changes):
    """An object of these fills, each in a block of its own."""
    return packed(*(block(number, **changes) for number in numbers))


def event(number, status="activated", **changes):
    """A TWAP's event as nodes write it, a second after the one before it."""
    time = T0 + timedelta(seconds=number)
    state = {
        "coin": "ETH",
        "user": USER,
        "side": "A",
        "sz": "10.00",
        "executedSz": "0.10",
        "executedNtl": "250.125000",
        "minutes": 5,
        "reduceOnly": False,
        "randomize": True,
        "timestamp": int(T0.timestamp() * 1000) - 5,
        **changes,
    }
    return {"time": iso(time), "twap_id": 2_250_263 + number, "state": state, "status": status}


def twaps(*numbers, **changes):
    return packed(*(event(number, **changes) for number in numbers))


def as_parquet(columns):
    import pyarrow as pa
    from pyarrow import parquet

    sink = io.BytesIO()
    parquet.write_table(pa.table(columns), sink)
    return sink.getvalue()


def log_of(connection, *columns):
    """Columns of the log by key; of one column its value alone."""
    columns = columns or ("state", "attempts", "rows_read", "rows_ingested", "rows_inserted", "rows_rejected")
    rows = connection.execute(f"select s3_object_key, {', '.join(columns)} from etl_s3_ingest_log").fetchall()
    return {key: told[0] if len(columns) == 1 else tuple(told) for key, *told in rows}


def state(connection):
    """Everything that the order and the number of runs must not change."""
    return {
        "fills": dump(connection, "fills", without=("object_id",)),
        "twap_status": dump(connection, "twap_status", without=("object_id", "inserted_at")),
        "rejected_rows": connection.execute(
            "select table_name, row_key, column_name, reason from rejected_rows order by 1, 2, 3, 4"
        ).fetchall(),
        "log": dump(
            connection, "etl_s3_ingest_log", without=("object_id", "run_id", "ingested_at", "attempts")
        ),
    }


def tids(connection):
    """The numbers of the stored fills."""
    return [tid - 10**12 for (tid,) in connection.execute("select tid from fills order by tid")]


def twap_ids(connection):
    return [
        found - 2_250_263 for (found,) in connection.execute("select twap_id from twap_status order by 1")
    ]


def assert_every_call_pays(store):
    """What lists, heads or gets says that the requester pays, and what gets, which version it wants."""
    assert store.calls
    for call in store.calls:
        assert call.kind != "other", call
        assert call.headers.get("x-amz-request-payer") == "requester", call
        assert (call.kind == "get") == ("if-match" in call.headers), call


def assert_numbers_add_up(connection: psycopg.Connection):
    """What the log says of an object is all that there is to say; what a run served went somewhere."""
    assert (
        connection.execute(
            "select * from etl_s3_ingest_log where rows_read < rows_ingested + rows_rejected"
            " or rows_inserted > rows_ingested or (state = 'ok') > (loaded_version = etag || ' ' || size)"
        ).fetchall()
        == []
    )
    assert (
        connection.execute(
            "select * from ingestion_runs where rows_served <> rows_inserted + rows_updated + rows_unchanged"
            " + rows_duplicate + rows_rejected + rows_failed"
        ).fetchall()
        == []
    )


def row_by_row(batches):
    """Rows in frames of one: a load of several batches, however small."""
    for rows in batches:
        for number in range(rows.frame.height):
            yield Rows(rows.frame.slice(number, 1))
