"""Files of events, whatever they are written in: Parquet, JSON lines or a JSON array, plain or compressed.

What a file is, its first bytes say; names lie. A file is read in batches and never held whole.
"""

from __future__ import annotations

import codecs
import io
import json
import re
from contextlib import contextmanager
from dataclasses import dataclass, field
from decimal import Decimal
from functools import cache
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from hlcli.loader import Rejected
from hlcli.sources import wire

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import polars as pl
    import pyarrow as pa

# Events that are decoded together, and so the rows of a load.
BATCH = 20_000
BATCH_BYTES = 6 << 20
PARTS = 10
CHUNK = 1 << 20
# A block of a busy second is some 2 MB.
MAX_LINE = 16 << 20
MAX_COLUMNS = 500
# A Parquet file of over 100,000 rows with less than a byte for each repeats one row to fill our disk.
BOMB_ROWS = 100_000
MAX_ROWS = 100_000_000

_COMPRESSIONS = {b"\x04\x22\x4d\x18": "lz4", b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}
_PARQUET = b"PAR1"
# A skippable LZ4 or Zstandard frame, which may stand before the first real one.
_SKIPPABLE = re.compile(rb"[\x50-\x5f]\x2a\x4d\x18")


class UnusableError(ValueError):
    """The file as a whole cannot be read or understood; nothing of it may be kept."""

    final = False
    """Whether it was not written badly but lacks something: reading it again will not help."""


class LackingError(UnusableError):
    """The file is sound but does not tell what it must."""

    final = True


@dataclass(slots=True)
class Batch:
    """A stretch of a file: lines of JSON, or decoded elements of a JSON array, or rows of a Parquet file."""

    lines: list[bytes] = field(default_factory=list)
    first_line: int = 1
    cut_off: bool = False
    """The last line does not end as a line does: if it is no JSON either, the file is not whole."""
    elements: list[Any] | None = None
    frame: pl.DataFrame | None = None

    def values(self) -> tuple[list[Any], list[Rejected]]:
        """The JSON values, a number with a point or an exponent as a Decimal, and the lines that are no JSON.

        Raises UnusableError for a file that is cut off.
        """
        if self.elements is not None:
            return self.elements, []
        decode = decoder()
        values, rejected = [], []
        for number, line in enumerate(self.lines, self.first_line):
            try:
                values.append(decode(line))
            except (ValueError, ArithmeticError, RecursionError):
                if not line.strip():
                    continue
                try:
                    values.append(_decode_slowly(line))
                except (ValueError, ArithmeticError, RecursionError):
                    if self.cut_off and number == self.first_line + len(self.lines) - 1:
                        raise UnusableError(f"cut off in line {number:,}") from None
                    text = line[:20_000].decode("utf-8", "replace")
                    rejected.append(Rejected([f"line {number}"], "not_json", text))
        return values, rejected


@dataclass(slots=True)
class Rows:
    """Rows whose columns are a table's, and what could not become a row."""

    frame: pl.DataFrame
    rejected: list[Rejected] = field(default_factory=list)


class File:
    """An open file; `position` tells how many of its bytes were consumed."""

    def __init__(self, raw: pa.NativeFile, head: bytes) -> None:
        self._raw = raw
        self._head = head

    @property
    def position(self) -> int:
        return 0 if self._raw.closed else int(self._raw.tell())

    def batches(self) -> Iterator[Batch]:
        """The file in batches of some 20,000 events. Raises UnusableError for a file that is damaged."""
        import pyarrow as pa

        try:
            if self._head.startswith(_PARQUET):
                for frame in _parquet(self._raw):
                    yield Batch(frame=frame)
            else:
                yield from _json(self._plain())
        except (pa.ArrowException, OSError, UnicodeError) as error:
            raise UnusableError(f"damaged: {error}") from error

    def _plain(self) -> IO[bytes]:
        import pyarrow as pa

        codec = next((name for magic, name in _COMPRESSIONS.items() if self._head.startswith(magic)), None)
        if codec is None and _SKIPPABLE.match(self._head):
            codec = "lz4"
        stream: IO[bytes] = pa.CompressedInputStream(self._raw, codec) if codec else self._raw
        return stream


@contextmanager
def opened(place: Path | IO[bytes]) -> Iterator[File]:
    """Open a file, or take an open one that can be sought, to read its events. Raises UnusableError for an empty one."""
    import pyarrow as pa

    with pa.OSFile(str(place), "rb") if isinstance(place, Path) else pa.PythonFile(place, "r") as raw:
        raw.seek(0)
        head = raw.read(16)
        raw.seek(0)
        if not head:
            raise UnusableError("empty")
        yield File(raw, head)


def _parquet(raw: pa.NativeFile) -> Iterator[pl.DataFrame]:
    import polars as pl
    from pyarrow import parquet

    size = raw.size()
    # Buffered: a row group's columns would else be read whole, and a file may be a single row group.
    with parquet.ParquetFile(
        raw, buffer_size=CHUNK, pre_buffer=False, page_checksum_verification=True
    ) as file:
        rows, leaves = file.metadata.num_rows, file.metadata.num_columns
        names = file.schema_arrow.names
        if rows > MAX_ROWS or (rows > BOMB_ROWS and rows > size):
            raise UnusableError(f"{rows:,} rows in {size:,} bytes are not believed")
        if leaves > MAX_COLUMNS:
            raise UnusableError(f"{leaves:,} columns")
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise UnusableError(f"column {twice[0]!r} stands twice")
        seen = 0
        parts: list[pl.DataFrame] = []
        # One text may stand in a dictionary and in a million rows: bytes are bounded as well as rows.
        for batch in file.iter_batches(batch_size=max(BATCH // PARTS, 1), use_threads=False):
            seen += batch.num_rows
            # Parquet's text is any bytes, and Polars takes Arrow's word that it is UTF-8.
            batch.validate(full=True)
            try:
                parts.append(_frame(batch))
            except (pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:
                raise UnusableError(f"holds what cannot be read: {error}") from error
            full = len(parts) == PARTS or sum(part.estimated_size() for part in parts) >= 4 * BATCH_BYTES
            if full or seen == rows:
                yield pl.concat(parts)
                parts = []
        if seen != rows:
            raise UnusableError(f"holds {seen:,} rows of the {rows:,} that it promises")


def _frame(batch: pa.RecordBatch) -> pl.DataFrame:
    """A record batch as a frame; decimals as their text, as Polars knows fewer digits than Parquet."""
    import polars as pl
    import pyarrow as pa

    kinds = [_readable(kind) for kind in batch.schema.types]
    columns = [
        column if column.type == kind else column.cast(kind)
        for column, kind in zip(batch.columns, kinds, strict=True)
    ]
    frame = pl.from_arrow(pa.RecordBatch.from_arrays(columns, names=batch.schema.names))
    assert isinstance(frame, pl.DataFrame)
    return frame


def _readable(kind: pa.DataType) -> pa.DataType:
    """The type as which a column is handed to Polars."""
    import pyarrow as pa

    if pa.types.is_decimal(kind):
        return pa.string()
    if pa.types.is_date(kind):  # whose years may have too many digits to be shown
        return pa.timestamp("ms")
    if isinstance(kind, pa.BaseExtensionType):  # text that is marked as JSON
        return _readable(kind.storage_type)
    if pa.types.is_struct(kind):
        return pa.struct([each.with_type(_readable(each.type)) for each in kind.fields])
    if pa.types.is_list(kind):
        return pa.list_(kind.value_field.with_type(_readable(kind.value_type)))
    return kind


def _json(source: IO[bytes]) -> Iterator[Batch]:
    """JSON lines; or, when the first line is but the beginning of an array, the elements of that array."""
    head = source.read(CHUNK).removeprefix(codecs.BOM_UTF8)
    first = head.lstrip()
    # A line ["0x...", fill] is no array of fills, not even when it is damaged.
    if re.match(rb'\[\s*[^"\s]|\[\s*$', first) and not _is_json(first.split(b"\n", 1)[0]):
        yield from _array(io.BufferedReader(_Joined(head, source)))
        return
    lines: list[bytes] = []
    number = size = 0
    rest, chunk = b"", head
    while chunk:
        if not rest and chunk.isspace():  # of which a small file can hold gigabytes
            if lines:
                yield Batch(lines, number - len(lines) + 1)
                lines, size = [], 0
            number += chunk.count(b"\n")
            chunk = source.read(CHUNK)
            continue
        *whole, rest = (rest + chunk).split(b"\n")
        for line in whole:
            number += 1
            lines.append(line)
            size += len(line)
            if len(lines) >= BATCH or size >= BATCH_BYTES:
                yield Batch(lines, number - len(lines) + 1)
                lines, size = [], 0
        if len(rest) > MAX_LINE:
            raise UnusableError(f"a line of over {MAX_LINE:,} bytes")
        chunk = source.read(CHUNK)
    if rest and not rest.isspace():
        number += 1
        yield Batch([*lines, rest], number - len(lines), cut_off=True)
    elif lines:
        yield Batch(lines, number - len(lines) + 1)


def _array(source: IO[bytes]) -> Iterator[Batch]:
    elements: list[Any] = []
    size = 0
    try:
        for value in wire.items(source):
            elements.append(value)
            size += len(str(value))
            if len(elements) >= BATCH or size >= BATCH_BYTES:
                yield Batch(elements=elements)
                elements, size = [], 0
    except (ValueError, ArithmeticError, RecursionError) as error:
        raise UnusableError(f"no JSON array: {error}") from None
    yield Batch(elements=elements)


class _Joined(io.RawIOBase):
    """What was read already, and then the rest."""

    def __init__(self, head: bytes, rest: IO[bytes]) -> None:
        self._head, self._rest = head, rest

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        chunk = self._head[: len(buffer)] or self._rest.read(len(buffer))
        self._head = self._head[len(chunk) :] if self._head else b""
        buffer[: len(chunk)] = chunk
        return len(chunk)


def _is_json(line: bytes) -> bool:
    try:
        _decode_slowly(line)
    except (ValueError, ArithmeticError, RecursionError):
        return False
    return True


@cache
def decoder() -> Callable[[bytes | str], Any]:
    """JSON to values with all digits. Raises ValueError, also for NaN and lone surrogates, which json would take."""
    import msgspec

    return msgspec.json.Decoder(float_hook=Decimal).decode


def _decode_slowly(line: bytes) -> Any:
    return json.loads(line, parse_float=Decimal, parse_constant=str)
