"""What is answered, without a socket: weights, dispatch, the fault script and the log.

An endpoint is a handler registered here by name; a data module brings its own and needs no other change.
"""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from time import monotonic
from typing import Any

from hlcli.sim.answers import BadRequestError, Document, InfoHandler
from hlcli.sim.faults import Fault, FaultScript, Reply, default_reply, load_faults, rewrite
from hlcli.sim.served import Served, ServedLog
from hlcli.sim.weights import WeightWindow, extra_weight, request_weight
from hlcli.sim.wire import encode

INFO_PATH = "/info"
UNKNOWN = "(unknown)"
_NO_ANSWER = ("reset", "silent")


@dataclass(frozen=True, slots=True)
class Outcome:
    """An answer, how it is to be spoilt on its way, and its log record (None: not part of the traffic)."""

    reply: Reply
    fault: Fault | None = None
    served: Served | None = None


class Exchange:
    """Answers requests; thread-safe."""

    def __init__(
        self,
        weight_per_minute: int,
        faults: Iterable[Fault] = (),
        clock: Callable[[], float] = monotonic,
    ) -> None:
        self.window = WeightWindow(weight_per_minute, clock)
        self.script = FaultScript(faults)
        self.log = ServedLog()
        self._info: dict[str, InfoHandler] = {}
        self._documents: dict[str, Document] = {}
        self._controls: dict[tuple[str, str], Callable[[bytes], Any]] = {
            ("GET", "/sim/log"): lambda _: self.log.as_json(),
            ("GET", "/sim/stats"): lambda _: self.stats(),
            ("POST", "/sim/faults"): self._replace_faults,
        }

    def register_info(self, handlers: Mapping[str, InfoHandler]) -> None:
        """Answer these info types."""
        self._info.update(handlers)

    def register_document(self, path: str, document: Document) -> None:
        """Serve this document under a path, outside the weight budget."""
        self._documents[path] = document

    def register_control(self, path: str, handler: Callable[[bytes], Any]) -> None:
        """Let POSTs to a page below /sim/ change the simulator; ValueError means a bad request."""
        self._controls["POST", path] = handler

    def answer(self, method: str, path: str, headers: Mapping[str, str], body: bytes) -> Outcome:
        """The answer to one request; header names are in lower case."""
        if path.startswith("/sim/"):
            return Outcome(self._control(method, path, body))
        if path == INFO_PATH and method == "POST":
            return self._info_request(path, body)
        return self._document_request(method, path, headers)

    def stats(self) -> dict[str, Any]:
        """Totals, for a test in another process."""
        return {
            "requests": self.log.count(),
            "refused": self.window.refused,
            "weight_used": self.window.used,
            "weight_peak": self.window.peak,
            "weight_limit": self.window.limit,
            "per_status": self.log.per_status(),
        }

    def _info_request(self, path: str, body: bytes) -> Outcome:
        request, kind, address = _parse(body)
        base = request_weight(kind, request)
        served = Served(monotonic(), "POST", path, kind, address, 0, 429, None)
        if not self.window.admit(base):
            self.log.add(served)
            return Outcome(default_reply(429), None, served)
        fault = self.script.pick(kind, path, address)
        reply, items = self._handled(kind, request)
        extra = extra_weight(kind, items)
        self.window.charge(extra)
        served.weight = base + extra
        return self._finish(reply, fault, served)

    def _handled(self, kind: str, request: Mapping[str, Any] | None) -> tuple[Reply, int]:
        handler = self._info.get(kind)
        if request is None or handler is None:
            return default_reply(422), 0
        try:
            answer = handler(request)
        except BadRequestError:
            return default_reply(422), 0
        return Reply(200, encode(answer.value)), answer.items

    def _document_request(self, method: str, path: str, headers: Mapping[str, str]) -> Outcome:
        served = Served(monotonic(), method, path, path, None, 0, 0, None)
        fault = self.script.pick(path, path, None)
        document = self._documents.get(path)
        if document is None:
            reply = Reply(404, b"not found", "text/plain; charset=utf-8")
        elif method not in ("GET", "HEAD"):
            reply = Reply(405, b"", "text/plain; charset=utf-8", {"Allow": "GET, HEAD"})
        else:
            reply = Reply(200, document.body, document=document)
        return self._finish(reply, fault, served, headers)

    def _finish(
        self,
        reply: Reply,
        fault: Fault | None,
        served: Served,
        headers: Mapping[str, str] | None = None,
    ) -> Outcome:
        """Spoil the answer if the script says so, then log it."""
        if fault is not None:
            served.fault = fault.kind
            try:
                reply = rewrite(fault, reply)
            except Exception:
                # A patch that fails is a mistake in the test: say so loudly, and keep serving.
                traceback.print_exc()
                reply = Reply(500, b"the fault's patch failed", "text/plain; charset=utf-8")
        if reply.document is not None and reply.status == 200:
            reply = _as_file(reply, reply.document, headers or {})
        served.status = 0 if fault is not None and fault.kind in _NO_ANSWER else reply.status
        self.log.add(served)
        return Outcome(reply, fault, served)

    def _control(self, method: str, path: str, body: bytes) -> Reply:
        """The simulator's own pages, for a test that runs in another process."""
        handler = self._controls.get((method, path))
        if handler is None:
            return Reply(404, b"not found", "text/plain; charset=utf-8")
        try:
            value = handler(body)
        except (ValueError, RecursionError) as error:
            return Reply(400, str(error).encode(), "text/plain; charset=utf-8")
        return Reply(200, json.dumps(value).encode())

    def _replace_faults(self, body: bytes) -> dict[str, int]:
        faults = load_faults(body)
        self.script.replace(faults)
        return {"faults": len(faults)}


def _parse(body: bytes) -> tuple[dict[str, Any] | None, str, str | None]:
    """The request, its info type and the address it is about; None if it is not an object with a type."""
    try:
        request = json.loads(body)
    except (ValueError, RecursionError):
        return None, UNKNOWN, None
    if not isinstance(request, dict) or not isinstance(request.get("type"), str):
        return None, UNKNOWN, None
    for name in ("vaultAddress", "user"):
        if isinstance(request.get(name), str):
            return request, request["type"], request[name].lower()
    return request, request["type"], None


def _as_file(reply: Reply, document: Document, headers: Mapping[str, str]) -> Reply:
    """Validators, 304 and gzip, as the CDN does it; the tag is weak because both encodings share it."""
    tag = f'W/"{document.tag}"'
    extra = {
        "ETag": tag,
        "Last-Modified": document.last_modified,
        "Cache-Control": "max-age=60",
        "Vary": "Accept-Encoding",
        **reply.headers,
    }
    wanted = headers.get("if-none-match")
    if wanted is not None:
        known = {text.strip().removeprefix("W/") for text in wanted.split(",")}
        unchanged = "*" in known or f'"{document.tag}"' in known
    else:
        unchanged = headers.get("if-modified-since") == document.last_modified
    if unchanged:
        return replace(reply, status=304, body=b"", headers=extra)
    if _accepts_gzip(headers.get("accept-encoding", "")):
        return replace(reply, body=document.gzipped, headers={**extra, "Content-Encoding": "gzip"})
    return replace(reply, headers=extra)


def _accepts_gzip(value: str) -> bool:
    for choice in value.lower().split(","):
        name, _, quality = choice.partition(";")
        if name.strip() in ("gzip", "*"):
            return quality.replace(" ", "") not in ("q=0", "q=0.0", "q=0.00", "q=0.000")
    return False
