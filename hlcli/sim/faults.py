"""Scripted faults: what goes wrong, for whom, and how often.

A fault either changes what is answered (``rewrite`` here) or how it travels (``delivery``). Keeping the script
apart from both makes it loadable from JSON and easy to replace while the server runs.
"""

from __future__ import annotations

import json
import threading
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache
from typing import Any

from hlcli.sim.answers import Document
from hlcli.sim.wire import decode, encode

CONTENT_KINDS = frozenset(
    {"status", "html", "null", "gzip_bomb", "deep", "bigint", "shrink", "replace", "patch"},
)
TRANSPORT_KINDS = frozenset(
    {"cut", "cut_chunked", "cut_close", "reset", "silent", "drip", "drip_headers", "endless", "latency"},
)
KINDS = CONTENT_KINDS | TRANSPORT_KINDS

UNPROCESSABLE = "Failed to deserialize the JSON body into the target type"
NOT_JSON = "text/html; charset=utf-8"
JSON = "application/json"
CLOUDFRONT = {"X-Cache": "Error from cloudfront", "Via": "1.1 simulator.cloudfront.net (CloudFront)"}
BOMB_MEBIBYTES = 200
NESTING = 100_000
BIG_DIGITS = 5000


@dataclass(frozen=True, slots=True)
class Fault:
    """One scripted fault.

    ``match`` is an info type, a path, or ``*``. Requests that match are counted from the start of the script:
    the first ``after`` pass, the next ``times`` are hit (None: all of them).
    """

    match: str
    kind: str
    times: int | None = 1
    after: int = 0
    address: str | None = None
    status: int | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes | str | None = None
    seconds: float = 5.0
    share: float = 0.5
    patch: Callable[[Any], Any] | None = None

    def __post_init__(self) -> None:
        """Refuse a script that could only fail silently later."""
        if self.kind not in KINDS:
            raise ValueError(f"unknown fault kind {self.kind!r}")
        if self.kind == "status" and not (self.status is not None and 200 <= self.status <= 599):
            raise ValueError("a status fault needs a status from 200 to 599")
        if self.kind == "replace" and self.body is None:
            raise ValueError("a replace fault needs a body")
        if (self.kind == "patch") != (self.patch is not None):
            raise ValueError("a patch fault needs a patch function, and no other fault has one")
        if (self.times is not None and self.times < 0) or self.after < 0 or self.seconds < 0:
            raise ValueError("times, after and seconds cannot be negative")
        if not 0 <= self.share <= 1:
            raise ValueError("share must lie between 0 and 1")

    @classmethod
    def from_json(cls, entry: object) -> Fault:
        """A fault from a decoded JSON object; unknown or mistyped fields are errors."""
        if not isinstance(entry, dict):
            raise ValueError("a fault must be an object")  # noqa: TRY004 - one kind of error for a bad script
        known = {item.name for item in fields(cls)} - {"patch"}
        unknown = sorted(set(entry) - known)
        if unknown:
            raise ValueError(f"unknown fault fields: {', '.join(unknown)}")
        for name, value in entry.items():
            if not _has_type(name, value):
                raise ValueError(f"fault field {name} has the wrong type")
        try:
            return cls(**entry)
        except TypeError as error:
            raise ValueError("a fault needs match and kind") from error

    def concerns(self, kind: str, path: str, address: str | None) -> bool:
        """Whether a request is one of those the fault was written for."""
        if self.match not in ("*", kind, path):
            return False
        return self.address is None or (address is not None and address == self.address.lower())

    @property
    def payload(self) -> bytes | None:
        """The scripted body as bytes; surrogates pass, because a broken encoding is a fault too."""
        return self.body.encode("utf-8", "surrogatepass") if isinstance(self.body, str) else self.body


def load_faults(text: str | bytes) -> list[Fault]:
    """A fault script from JSON: an array of fault objects."""
    script = json.loads(text)
    if not isinstance(script, list):
        raise ValueError("a fault script must be an array")  # noqa: TRY004
    return [Fault.from_json(entry) for entry in script]


class FaultScript:
    """The faults in force with their counters."""

    def __init__(self, faults: Iterable[Fault] = ()) -> None:
        self._lock = threading.Lock()
        self._entries = [_Entry(fault) for fault in faults]

    def add(self, fault: Fault) -> None:
        """Append a fault; its counters start now."""
        with self._lock:
            self._entries.append(_Entry(fault))

    def replace(self, faults: Iterable[Fault]) -> None:
        """Put another script in force, counters at zero."""
        entries = [_Entry(fault) for fault in faults]
        with self._lock:
            self._entries = entries

    def pick(self, kind: str, path: str, address: str | None) -> Fault | None:
        """The first fault due for this request; every matching fault counts it, only the chosen one is spent."""
        chosen: Fault | None = None
        with self._lock:
            for entry in self._entries:
                fault = entry.fault
                if not fault.concerns(kind, path, address):
                    continue
                entry.seen += 1
                due = entry.seen > fault.after and (fault.times is None or entry.hits < fault.times)
                if due and chosen is None:
                    entry.hits += 1
                    chosen = fault
        return chosen


@dataclass(slots=True)
class _Entry:
    fault: Fault
    seen: int = 0
    hits: int = 0


@dataclass(frozen=True, slots=True)
class Reply:
    """An HTTP answer before it is put on the wire; a document adds validators and compression to it."""

    status: int
    body: bytes
    content_type: str = JSON
    headers: Mapping[str, str] = field(default_factory=dict)
    document: Document | None = None


def rewrite(fault: Fault, reply: Reply) -> Reply:
    """The answer as a content fault makes it; transport faults only add their headers."""
    changed = _rewritten(fault, reply)
    return replace(changed, headers={**changed.headers, **fault.headers}) if fault.headers else changed


def _rewritten(fault: Fault, reply: Reply) -> Reply:
    kind = fault.kind
    if kind == "status":
        assert fault.status is not None
        return default_reply(fault.status, fault.payload)
    if kind == "html":
        return Reply(fault.status or 200, fault.payload or _page(200, "Just a moment"), NOT_JSON)
    if kind == "null":
        return Reply(fault.status or 200, b"null")
    if kind == "gzip_bomb":
        return Reply(200, gzip_bomb(), headers={"Content-Encoding": "gzip"})
    if kind == "deep":
        return Reply(200, b"[" * NESTING + b"]" * NESTING)
    if kind == "bigint":
        return Reply(200, b"9" * BIG_DIGITS)
    if kind == "replace":
        return _with_body(reply, fault.payload or b"", fault.status or 200)
    if reply.status != 200 or kind not in ("shrink", "patch"):
        return reply
    if kind == "shrink":
        return _with_body(reply, encode(_shrunk(decode(reply.body), fault.share)), 200)
    assert fault.patch is not None
    return _with_body(reply, encode(fault.patch(decode(reply.body)), ascii_only=True), 200)


def default_reply(status: int, body: bytes | None = None) -> Reply:
    """What the exchange and the CDN before it send with a status."""
    if status == 429:
        return Reply(status, b"null" if body is None else body, JSON, CLOUDFRONT)
    if status == 422:
        return Reply(status, UNPROCESSABLE.encode() if body is None else body, "text/plain; charset=utf-8")
    if 200 <= status < 300:
        return Reply(status, b"" if body is None else body, JSON)
    return Reply(status, _page(status, "Bad Gateway") if body is None else body, NOT_JSON)


def _page(status: int, title: str) -> bytes:
    heading = f"{status} {title}"
    return (
        f"<html>\r\n<head><title>{heading}</title></head>\r\n<body>\r\n<center><h1>{heading}</h1></center>\r\n"
        "<hr><center>simulator</center>\r\n</body>\r\n</html>\r\n"
    ).encode()


def _with_body(reply: Reply, body: bytes, status: int) -> Reply:
    """The same answer with another body; a document keeps being one, with the validator of what it now says."""
    document = None if reply.document is None else Document(lambda: body, reply.document.modified_ms)
    return Reply(status, body, JSON, document=document)


def _shrunk(value: Any, share: float) -> Any:
    """A list, or the lists directly inside an object, with only the first part of their entries."""
    if isinstance(value, list):
        return value[: int(len(value) * share)]
    if isinstance(value, dict):
        return {
            name: _shrunk(inner, share) if isinstance(inner, list) else inner for name, inner in value.items()
        }
    return value


@lru_cache(maxsize=1)
def gzip_bomb() -> bytes:
    """200 MiB of zero bytes as one gzip member.

    A full flush makes compressed blocks independent of each other, so one compressed MiB can be repeated.
    """
    block = bytes(1 << 20)
    compressor = zlib.compressobj(9, zlib.DEFLATED, -15)
    piece = compressor.compress(block) + compressor.flush(zlib.Z_FULL_FLUSH)
    checksum = 0
    for _ in range(BOMB_MEBIBYTES):
        checksum = zlib.crc32(block, checksum)
    header = b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x02\xff"
    size = BOMB_MEBIBYTES << 20
    trailer = checksum.to_bytes(4, "little") + (size & 0xFFFFFFFF).to_bytes(4, "little")
    return header + piece * BOMB_MEBIBYTES + compressor.flush(zlib.Z_FINISH) + trailer


def _has_type(name: str, value: object) -> bool:
    """Whether a JSON value fits the field; bool is an int to Python but not to a script."""
    if isinstance(value, bool):
        return False
    if name in ("match", "kind"):
        return isinstance(value, str)
    if name in ("address", "body"):
        return value is None or isinstance(value, str)
    if name in ("times", "status"):
        return value is None or isinstance(value, int)
    if name == "after":
        return isinstance(value, int)
    if name == "headers":
        return isinstance(value, dict) and all(isinstance(text, str) for text in value.values())
    return isinstance(value, int | float)
