"""Files of JSON lines and of Parquet, written frame by frame."""

from __future__ import annotations

from contextlib import contextmanager
from decimal import Decimal
from typing import IO, TYPE_CHECKING, Any

from hlcli.sim.columns import filled, iso

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    import polars as pl

BLOCK = ("local_ns", "block_ns", "block_number")


def block_lines(events: pl.DataFrame) -> pl.Series:
    import polars as pl

    blocks = events.group_by(BLOCK, maintain_order=True).agg(pl.col("events").str.join(","))
    template = '{"local_time":"%","block_time":"%","block_number":%,"events":[%]}'
    times = (iso(pl.col("local_ns")), iso(pl.col("block_ns")))
    return blocks.select(filled(template, *times, "block_number", "events")).to_series()


def number(name: str, numbers: str) -> pl.Expr:
    import polars as pl

    column = pl.col(name)
    if numbers == "text":
        return column
    return column.cast(pl.Float64 if numbers == "double" else pl.Decimal(38, 12))


def decoded(row: dict[str, Any], numbers: Iterable[str]) -> dict[str, Any]:
    for name in numbers:
        if row[name] is not None:
            row[name] = Decimal(row[name])
    return row


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    import pyarrow as pa

    with path.open("wb") as plain:
        if path.suffix != ".lz4":
            yield plain
            return
        with pa.CompressedOutputStream(plain, "lz4") as packed:
            yield packed


def write_lines(path: Path, batches: Iterable[tuple[int, pl.Series]]) -> int:
    count = 0
    with _opened(path) as file:
        for size, lines in batches:
            count += size
            if size:
                file.write(lines.str.join("\n").item().encode() + b"\n")
    return count


def write_parquet(path: Path, frames: Iterable[pl.DataFrame], *, whole: bool = False) -> int:
    import polars as pl
    from pyarrow import parquet

    if whole:
        frames = [pl.concat(frames)]
    count, writer = 0, None
    try:
        for frame in frames:
            table = frame.to_arrow(compat_level=pl.CompatLevel.oldest())
            writer = writer or parquet.ParquetWriter(path, table.schema, compression="zstd")
            writer.write_table(table, row_group_size=max(1, table.num_rows))
            count += table.num_rows
    finally:
        if writer:
            writer.close()
    return count
