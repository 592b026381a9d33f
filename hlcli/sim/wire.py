"""JSON text with exact digits.

The exchange serves numbers no float can hold (and hostile ones such as ``1e400``), so the simulator never lets
a float choose the digits: a number is a ``Decimal`` or a ``RawNumber`` and reaches the wire as written.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

_MARK = "raw-number-7f3a91c4:"
_MARKED = re.compile(f'"{_MARK}([^"]*)"')


@dataclass(frozen=True, slots=True)
class RawNumber:
    """Text that goes between the commas as it is; it need not be valid JSON."""

    text: str


def encode(value: object, *, ascii_only: bool = False) -> bytes:
    """Compact JSON as UTF-8; ``ascii_only`` escapes, which is the only way to serve a lone surrogate."""
    default, seen = _raw_marker()
    text = json.dumps(value, ensure_ascii=ascii_only, separators=(",", ":"), default=default, allow_nan=True)
    if seen:
        text = _MARKED.sub(lambda match: match.group(1), text)
    return text.encode("utf-8")


def decode(body: bytes) -> Any:
    """Parse an answer of our own without losing a digit."""
    return json.loads(body, parse_float=Decimal)


def _raw_marker() -> tuple[Callable[[object], str], list[bool]]:
    """A ``default`` hook that marks raw numbers, and a flag that tells whether there were any."""
    seen: list[bool] = []

    def default(value: object) -> str:
        if isinstance(value, RawNumber):
            text = value.text
        elif isinstance(value, Decimal):
            text = str(value)
        else:
            raise TypeError(f"cannot encode {type(value).__name__}")
        if '"' in text or "\\" in text or not text.isascii():
            raise ValueError("a raw number may hold neither quotes, backslashes nor non-ASCII characters")
        seen.append(True)
        return _MARK + text

    return default, seen
