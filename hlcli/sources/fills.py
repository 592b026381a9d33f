"""Fills: one row a side of a trade, out of node files, flattened files and answers of the API."""

from __future__ import annotations

import re
from functools import cache, partial
from typing import TYPE_CHECKING, Any

from hlcli.loader import Rejected
from hlcli.sources import columns, times
from hlcli.sources.files import BATCH, Batch, LackingError, Rows, UnusableError
from hlcli.sources.times import GARBLED

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    import polars as pl

TABLE = "fills"
KEY = ("user_address", "coin", "tid", "oid", "side", "time")
KINDS: dict[str, columns.Kind] = {
    "user_address": "text",
    "coin": "text",
    "tid": "integer",
    "oid": "integer",
    "side": "text",
    "time": "time",
    "px": "number",
    "sz": "number",
    "dir": "text",
    "start_position": "number",
    "closed_pnl": "number",
    "fee": "number",
    "fee_token": "text",
    "crossed": "boolean",
    "hash": "text",
    "block_time": "time",
    "block_number": "integer",
    "twap_id": "integer",
    "cloid": "text",
    "builder": "text",
    "builder_fee": "number",
    "deployer_fee": "number",
    "priority_gas": "number",
    "liquidation": "document",
    "extra": "document",
}
NAMES = {**{columns.plain(name): name for name in KINDS if name != "extra"}, "user": "user_address"}
# What a node calls them, but for those that it tells beside the fill.
WIRE_NAMES = {
    name: re.sub("_(.)", lambda found: found[1].upper(), name)
    for name in KINDS
    if name not in {"user_address", "block_time", "block_number", "extra"}
}
# Fills of one time that are held together. No block is near it.
MAX_HELD = 200_000
# When a node wrote the line: no fact of the fill.
IGNORED = ("localtime",)
NEEDED = (*KEY, "px", "sz")
# Of two rows with one key the exact one wins, then the one from S3, which tells more.
NEWER = ("is_exact", "source")
NAMED = "says itself whose fills these are: leave out --user"
# By key the fills that have it, each with its number.
_Told = dict[tuple[Any, ...], dict[tuple[Any, ...], int]]


def read(batches: Iterable[Batch], *, user: str | None = None) -> Iterator[Rows]:
    """Fills in frames of some 20,000 rows, those of a small file in one; the fills of a millisecond stay together.

    Takes lines of node_fills_by_block {block_time, block_number, events: [[user, fill], ...]} and of node_fills
    [user, fill]; flattened fills with their user, as JSON or Parquet; and answers of userFills and
    userTwapSliceFills, which do not say whose fills they are: `user` does, and then the API is their source.

    Raises UnusableError for a file that lacks a column or is damaged, LackingError for one that names no user.
    """
    import polars as pl

    source = pl.lit("api" if user else "s3").alias("source")
    held: pl.DataFrame | None = None
    rejected: list[Rejected] = []
    dust: _Told = {}
    for batch, is_last in _marked(batches):
        rows = _from_blocks(batch) if user is None else None
        rows = rows or columns.rows_of(batch, partial(_from_values, user), partial(_from_frame, user))
        if held is None and 0 < rows.frame.height == rows.frame["user_address"].null_count():
            raise LackingError("does not say whose fills these are (with --local-file, --user does)")
        frame = rows.frame if held is None else pl.concat([held, rows.frame], how="vertical_relaxed")
        # Equal keys are told apart by their order, and a batch may end between two of them.
        whole = frame.height if is_last else _before_last_time(frame)
        held = frame.slice(whole)
        rejected += rows.rejected
        if whole or is_last or len(rejected) >= BATCH:
            yield Rows(numbered(frame.head(whole), dust).with_columns(source), rejected)
            rejected = []


def _marked(batches: Iterable[Batch]) -> Iterator[tuple[Batch, bool]]:
    """Each batch, and whether it is the last one."""
    waiting: Batch | None = None
    for batch in batches:
        if waiting is not None:
            yield waiting, False
        waiting = batch
    if waiting is not None:
        yield waiting, True


def _before_last_time(fills: pl.DataFrame) -> int:
    """Where the last run of fills with one time begins. Raises UnusableError for one too long to be true."""
    import polars as pl

    changes = fills.select((pl.col("time") != pl.col("time").shift(1)).arg_true()).to_series()
    begins = int(changes[-1]) if len(changes) else 0
    if fills.height - begins > MAX_HELD:
        raise UnusableError(f"over {MAX_HELD:,} fills have one time")
    return begins


def numbered(fills: pl.DataFrame, dust: _Told | None = None) -> pl.DataFrame:
    """The fills with `event_ix`: 0, and 1, 2, ... for further ones with the same key, in their order.

    What is the same in all that the exchange says of it is the same fill served twice, and gets the same number.
    `dust` remembers fills with tid 0, which files that are not in order of time may have far from each other.
    """
    import polars as pl

    # Of numbers alone, which is quicker than of all of the key: nearly always none repeats.
    nil = 0 if fills.schema["tid"].is_integer() else "0"
    alike = pl.struct("tid", "oid").is_duplicated() | (pl.col("tid") == nil)
    apart = fills.with_row_index("_at").filter(alike)
    if apart.is_empty():
        return fills.with_columns(pl.lit(0, pl.Int32).alias("event_ix"))
    numbers = [0] * fills.height
    told: _Told = {}
    for row in apart.drop("block_time", "block_number").iter_rows(named=True):
        at = row.pop("_at")
        seen = dust if dust is not None and str(row["tid"]) == "0" and len(dust) < MAX_HELD else told
        contents = seen.setdefault(tuple(row[name] for name in KEY), {})
        numbers[at] = contents.setdefault(tuple(row.values()), len(contents))
    return fills.with_columns(pl.Series("event_ix", numbers, dtype=pl.Int32))


@cache
def _block_decoder() -> Callable[[bytes], Any]:
    """Decodes a line by block of which every field is known and of its usual type; ValueError for any other."""
    import msgspec

    types = {"text": str, "number": str, "integer": int, "time": int, "boolean": bool}
    fields: list[tuple[str, Any, None]] = [
        (wire_name, types[KINDS[name]] | None if KINDS[name] in types else msgspec.Raw, None)
        for name, wire_name in WIRE_NAMES.items()
    ]
    fill = msgspec.defstruct("Fill", fields, forbid_unknown_fields=True, gc=False)
    # mypy knows no types that are made while the program runs.
    around = [("events", list[tuple[str, fill]]), ("block_time", str), ("block_number", int)]  # type: ignore[valid-type]
    return msgspec.json.Decoder(msgspec.defstruct("Block", around, gc=False)).decode


def _from_blocks(batch: Batch) -> Rows | None:
    """The rows of lines by block as nodes write them, at half the price of _from_values(); None for anything else."""
    import polars as pl
    from msgspec.structs import astuple

    decode = _block_decoder()
    try:
        blocks = [decode(line) for line in batch.lines]
    except (ValueError, RecursionError):
        return None
    events = [event for block in blocks for event in block.events]
    if not events:
        return None
    users, fills = zip(*events, strict=True)
    told: dict[str, Sequence[Any]] = dict(
        zip(WIRE_NAMES, zip(*map(astuple, fills), strict=True), strict=True)
    )
    told["user_address"] = users
    told["block_time"] = [block.block_time for block in blocks for _ in block.events]
    told["block_number"] = [block.block_number for block in blocks for _ in block.events]
    told["liquidation"] = [raw and _json_text(raw) for raw in told["liquidation"]]
    found = {name: columns.series(told[name], KINDS[name]) for name in told if name != "liquidation"}
    found["liquidation"] = pl.Series(told["liquidation"], dtype=pl.String)
    return _typed(found, len(fills), lambda at: {name: values[at] for name, values in told.items()}, [])


def _json_text(raw: Any) -> str | None:
    text = bytes(raw).decode()
    return None if text == "null" else text


def _is_pair(value: list[Any]) -> bool:
    """Whether a list is a line [user, fill], and not one of fills."""
    return len(value) == 2 and isinstance(value[0], str)


def _from_values(user: str | None, values: Sequence[Any]) -> Rows:
    """Decoded JSON as rows."""
    users: list[Any] = []
    fills: list[Mapping[str, Any]] = []
    block_times: list[Any] = []
    block_numbers: list[Any] = []
    rejected: list[Rejected] = []
    for event, block_time, block_number in columns.events_of(values, _is_pair):
        if isinstance(event, list) and len(event) == 2 and isinstance(event[1], dict):
            users.append(event[0])
            fills.append(event[1])
        elif isinstance(event, dict):
            users.append(None)
            # A slice of a TWAP as userTwapSliceFills tells it.
            inner = event.get("fill")
            fills.append({**inner, "twapId": event.get("twapId")} if isinstance(inner, dict) else event)
        else:
            rejected.append(Rejected([None], "not_a_fill", {"event": event}))
            continue
        block_times.append(block_time)
        block_numbers.append(block_number)
    told, unknown = columns.of_dicts(fills, NAMES)
    around = {"user_address": users, "block_time": block_times, "block_number": block_numbers}
    for name, given in around.items():
        told[name] = columns.first_of(given, told[name]) if name in told else given
    if user is not None:
        if any(each is not None and str(each).lower() != user for each in told["user_address"]):
            raise LackingError(NAMED)
        told["user_address"] = [user] * len(fills)
    extra = [key for key in unknown if columns.plain(key) not in IGNORED]
    if extra:
        left = [{key: fill[key] for key in extra if fill.get(key) is not None} for fill in fills]
        told["extra"] = [each or None for each in left]
    found = {name: columns.series(told[name], KINDS[name]) for name in told}
    return _typed(found, len(fills), lambda at: {"user": users[at], **fills[at]}, rejected)


def _from_frame(user: str | None, frame: pl.DataFrame) -> Rows:
    """Rows of a Parquet file as rows of ours. Raises UnusableError."""
    import polars as pl

    found, unknown = columns.of_frame(frame, NAMES)
    if user is not None:
        if "user_address" in found:
            raise LackingError(NAMED)
        found["user_address"] = pl.repeat(user, frame.height, eager=True)
    columns.needed(found, NEEDED)
    extra = [name for name in unknown if columns.plain(name) not in IGNORED]
    if extra:
        found["extra"] = columns.documents(frame.select(extra))
    return _typed(found, frame.height, columns.rows_as_told(frame), [])


def _typed(
    found: Mapping[str, pl.Series],
    height: int,
    served: Callable[[int], dict[str, Any]],
    rejected: list[Rejected],
) -> Rows:
    """The columns of the table; `served` gives a row as it came, for quarantine."""
    import polars as pl

    frame, lossy = columns.typed(found, KINDS, height)
    timeless = frame["time"].is_null()
    garbled = {"time": timeless}
    if "block_time" in found:
        garbled["block_time"] = ~timeless & found["block_time"].is_not_null() & frame["block_time"].is_null()
    for name, bad in garbled.items():
        rejected = rejected + [
            Rejected([frame[part][at] for part in KEY], GARBLED, served(at), name) for at in bad.arg_true()
        ]
    frame = frame.filter(~pl.any_horizontal(garbled.values()))
    return Rows(
        frame.with_columns(
            pl.col("user_address").str.to_lowercase(),
            pl.lit(not lossy).alias("is_exact"),
            times.timestamp(frame["time"]),
            times.timestamp(frame["block_time"]),
        ),
        rejected,
    )
