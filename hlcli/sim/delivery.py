"""How an answer travels: whole, or spoilt on the way as a transport fault says."""

from __future__ import annotations

import os
import select
import socket
import struct
import threading
from email.utils import formatdate
from http.client import responses
from time import monotonic

from hlcli.sim.faults import Fault, Reply
from hlcli.sim.served import Served

SLICE = 256 * 1024
DRIP_SECONDS = 0.2
ENDLESS_BLOCK = b"0," * 32_768
_STEP_SECONDS = 0.02


class Line:
    """One client's connection: counts what is written and waits without outliving the client or the server."""

    def __init__(self, connection: socket.socket, stopping: threading.Event, served: Served | None) -> None:
        self._connection = connection
        self._stopping = stopping
        self._served = served

    def head(self, data: bytes) -> None:
        """Write bytes that are not part of the body."""
        self._connection.sendall(data)

    def body(self, data: bytes) -> None:
        """Write body bytes, counted just before they leave: a client that has them finds them counted."""
        view = memoryview(data)
        for start in range(0, len(view), SLICE):
            piece = view[start : start + SLICE]
            if self._served is not None:
                self._served.bytes += len(piece)
            self._connection.sendall(piece)

    def wait(self, seconds: float) -> bool:
        """Sleep; False as soon as the client has left or the server stops."""
        end = monotonic() + seconds
        while (left := end - monotonic()) > 0:
            if self._stopping.wait(min(left, _STEP_SECONDS)) or self._gone():
                return False
        return not self._stopping.is_set()

    def reset(self) -> None:
        """Drop the connection with RST: no lingering, and the descriptor closed before anybody sends FIN."""
        self._connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        os.close(self._connection.detach())

    def _gone(self) -> bool:
        try:
            readable, _, _ = select.select([self._connection], [], [], 0)
            return bool(readable) and self._connection.recv(1, socket.MSG_PEEK) == b""
        except (OSError, ValueError):
            return True


def deliver(line: Line, reply: Reply, fault: Fault | None, *, head_only: bool, close: bool) -> bool:
    """Send the answer; True if the connection may carry another request."""
    kind = None if fault is None else fault.kind
    if fault is not None and kind == "reset":
        line.reset()
        return False
    if fault is not None and kind == "silent":
        line.wait(fault.seconds)
        return False
    if fault is not None and kind == "latency" and not line.wait(fault.seconds):
        return False
    if fault is not None and not head_only and kind in _SPOILERS:
        _SPOILERS[kind](line, reply, fault)
        return False
    bare = reply.status in (204, 304)
    line.head(head(reply, {} if bare else {"Content-Length": str(len(reply.body))}, close=close))
    if not head_only and not bare:
        line.body(reply.body)
    return not close


def head(reply: Reply, framing: dict[str, str], *, close: bool) -> bytes:
    """Status line and headers; what the reply names wins over what we would say."""
    lines = {"date": ("Date", formatdate(usegmt=True)), "server": ("Server", "simulator")}
    lines["content-type"] = ("Content-Type", reply.content_type)
    for name, value in framing.items():
        lines[name.lower()] = (name, value)
    if close:
        lines["connection"] = ("Connection", "close")
    for name, value in reply.headers.items():
        lines[name.lower()] = (name, value)
    text = f"HTTP/1.1 {reply.status} {responses.get(reply.status, 'Unknown')}\r\n"
    text += "".join(f"{name}: {value}\r\n" for name, value in lines.values())
    return (text + "\r\n").encode("latin-1", "replace")


def _part(reply: Reply, fault: Fault) -> bytes:
    """The part that gets through: never all of it."""
    return reply.body[: min(int(len(reply.body) * fault.share), max(0, len(reply.body) - 1))]


def _cut(line: Line, reply: Reply, fault: Fault) -> None:
    line.head(head(reply, {"Content-Length": str(len(reply.body))}, close=False))
    line.body(_part(reply, fault))


def _cut_chunked(line: Line, reply: Reply, fault: Fault) -> None:
    line.head(head(reply, {"Transfer-Encoding": "chunked"}, close=False))
    part = _part(reply, fault)
    middle = len(part) // 2
    if middle:
        line.head(f"{middle:x}\r\n".encode())
        line.body(part[:middle])
        line.head(b"\r\n")
    line.head(f"{len(reply.body) - middle:x}\r\n".encode())
    line.body(part[middle:])


def _cut_close(line: Line, reply: Reply, fault: Fault) -> None:
    line.head(head(reply, {}, close=True))
    line.body(_part(reply, fault))


def _drip(line: Line, reply: Reply, fault: Fault) -> None:
    line.head(head(reply, {"Content-Length": str(len(reply.body))}, close=True))
    end = monotonic() + fault.seconds
    for index in range(len(reply.body)):
        if monotonic() >= end or not line.wait(DRIP_SECONDS):
            return
        line.body(reply.body[index : index + 1])


def _drip_headers(line: Line, reply: Reply, fault: Fault) -> None:
    text = head(reply, {"Content-Length": str(len(reply.body))}, close=True)
    end = monotonic() + fault.seconds
    for index in range(len(text)):
        if monotonic() >= end or not line.wait(DRIP_SECONDS):
            return
        line.head(text[index : index + 1])
    line.body(reply.body)


def _endless(line: Line, reply: Reply, fault: Fault) -> None:
    """A JSON array that goes on and on, as fast as the client reads it."""
    line.head(head(reply, {"Transfer-Encoding": "chunked"}, close=False))
    end = monotonic() + fault.seconds
    line.head(b"1\r\n[\r\n")
    while monotonic() < end and line.wait(0):
        line.head(f"{len(ENDLESS_BLOCK):x}\r\n".encode())
        line.body(ENDLESS_BLOCK)
        line.head(b"\r\n")


_SPOILERS = {
    "cut": _cut,
    "cut_chunked": _cut_chunked,
    "cut_close": _cut_close,
    "drip": _drip,
    "drip_headers": _drip_headers,
    "endless": _endless,
}
