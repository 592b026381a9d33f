"""From decoded JSON to the text columns that the loader checks: nothing is judged and no digit changed here."""

from __future__ import annotations

import io
import json
import re
from decimal import Decimal
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    import polars as pl


_CHUNK = 1 << 18
_MAX_ITEM = 1 << 20
_NO_SPACE = re.compile(r"[^ \t\r\n]")
# NaN and Infinity, which JSON does not have, stay text, for the loader to refuse the one row and not the list.
_DECODER = json.JSONDecoder(parse_float=Decimal, parse_constant=str)


def items(body: IO[bytes], name: str | None = None) -> Iterator[Any]:
    """The elements of a JSON array one by one, so that 40 MB are never 40 MB of Python objects.

    The array is the whole body or, with `name`, the value of that name in the object that the body is.

    Not by ijson: what it remembers grows with the square of the nesting, gigabytes for 200 KB of brackets, and one
    lone surrogate in a name makes it give up the list.

    Raises ValueError, ArithmeticError or RecursionError for a body that is cut off, has no such array, or holds an
    element of over a million characters.
    """
    source = io.TextIOWrapper(body, "utf-8", newline="")
    try:
        reader = _Reader(source)
        yield from reader.elements() if name is None else reader.member(name)
        if reader.token():
            raise ValueError("something follows the JSON value")
    finally:
        source.detach()


class _Reader:
    """Characters of a JSON text, of which only the element at hand is kept."""

    def __init__(self, source: io.TextIOWrapper) -> None:
        self._source = source
        self._buffer, self._at, self._ended = "", 0, False

    def _fill(self) -> None:
        chunk = self._source.read(_CHUNK)
        self._ended = not chunk
        self._buffer, self._at = self._buffer[self._at :] + chunk, 0

    def peek(self) -> str:
        """The next character that is no white space, or "" at the end."""
        while True:
            found = _NO_SPACE.search(self._buffer, self._at)
            self._at = found.start() if found else len(self._buffer)
            if found or self._ended:
                return self._buffer[self._at : self._at + 1]
            self._fill()

    def token(self) -> str:
        """The same, and step over it."""
        char = self.peek()
        self._at += len(char)
        return char

    def expect(self, char: str) -> None:
        """Step over this character."""
        if self.token() != char:
            raise ValueError(f"not the JSON that was expected, or cut off: no {char}")

    def another(self, closing: str) -> bool:
        """After a value: whether another one follows, or else the closing bracket."""
        mark = self.token()
        if mark not in {",", closing} or not mark:
            raise ValueError("the JSON is cut off")
        return mark == ","

    def elements(self) -> Iterator[Any]:
        """The elements of the array that comes next."""
        self.expect("[")
        if self.peek() == "]":
            self.token()
            return
        yield self.element()
        while self.another("]"):
            yield self.element()

    def member(self, name: str) -> Iterator[Any]:
        """The elements of the array of this name in the object that comes next."""
        self.expect("{")
        found = False
        while True:
            key = self.element()
            self.expect(":")
            if key == name:
                if found:
                    raise ValueError(f"the JSON object has {name} twice")
                found = True
                yield from self.elements()
            else:
                self.element()
            if not self.another("}"):
                break
        if not found:
            raise ValueError(f"the JSON object has no {name}")

    def element(self) -> Any:
        """The value that comes next, decoded."""
        self.peek()
        while True:
            try:
                element, end = _DECODER.raw_decode(self._buffer, self._at)
            except json.JSONDecodeError:
                if self._ended or len(self._buffer) - self._at > _MAX_ITEM:
                    raise
            else:
                if end < len(self._buffer) or self._ended:  # else a number may go on in the next chunk
                    self._at = end
                    return element
            self._fill()


def text(value: Any) -> str | None:
    """A scalar as its own text, true and false as such, a list or object as JSON text, None as None.

    Lone surrogates, which JSON can spell and UTF-8 cannot, become NUL, for which the loader rejects the row;
    so does what is nested too deeply to write down.
    """
    if value is None or isinstance(value, str):
        plain = value
    elif isinstance(value, bool):
        return "true" if value else "false"
    elif isinstance(value, (int, Decimal)):
        return str(value)
    else:
        try:
            plain = _json(value)
        except RecursionError:
            plain = "\x00"
    if plain is None or plain.isascii():
        return plain
    return "".join("\x00" if "\ud800" <= char <= "\udfff" else char for char in plain)


def _json(value: Any) -> str:
    """JSON text with the digits of every Decimal, which json.dumps could only turn into a string or a float."""
    if isinstance(value, Decimal):
        return str(value)
    if isinstance(value, dict):
        return "{" + ", ".join([f"{json.dumps(name)}: {_json(held)}" for name, held in value.items()]) + "}"
    if isinstance(value, list):
        return "[" + ", ".join([_json(held) for held in value]) + "]"
    return json.dumps(value)


def frame(rows: Iterable[Mapping[str, Any]], columns: Sequence[str]) -> pl.DataFrame:
    """Rows as a frame of text columns; a key that a row lacks is null."""
    import polars as pl

    held = list(rows)
    return pl.DataFrame(
        {name: pl.Series(name, [text(row.get(name)) for row in held], dtype=pl.String) for name in columns}
    )


def mapping(value: Any) -> Mapping[str, Any]:
    """The value when it is a JSON object, else an empty one: what is missing in it becomes null."""
    return value if isinstance(value, dict) else {}


def address(value: Any) -> str | None:
    """An address in lower case; anything else as its text, for the table's CHECK to refuse."""
    plain = text(value)
    return plain.lower() if plain else plain
