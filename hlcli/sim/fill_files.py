"""Files of invented fills, in the shapes that nodes, Artemis and others publish."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from hlcli.sim.columns import filled, iso, moment
from hlcli.sim.files import BLOCK, block_lines, decoded, number, write_lines, write_parquet

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    import polars as pl

# Our names and the exchange's, in its order.
_FIELDS = {
    "coin": "coin",
    "px": "px",
    "sz": "sz",
    "side": "side",
    "time": "time",
    "start_position": "startPosition",
    "dir": "dir",
    "closed_pnl": "closedPnl",
    "hash": "hash",
    "oid": "oid",
    "crossed": "crossed",
    "fee": "fee",
    "tid": "tid",
    "cloid": "cloid",
    "liquidation": "liquidation",
    "builder_fee": "builderFee",
    "builder": "builder",
    "deployer_fee": "deployerFee",
    "priority_gas": "priorityGas",
    "fee_token": "feeToken",
    "twap_id": "twapId",
}
_LIQUIDATION = {
    "liquidatedUser": "liquidated_user",
    "markPx": "liquidation_mark",
    "method": "liquidation_method",
}
_OPTIONAL = ("builder_fee", "builder", "deployer_fee", "priority_gas")
_BARE = ("time", "oid", "crossed", "tid", "twap_id")
_NUMBERS = ("px", "sz", "start_position", "closed_pnl", "fee", "builder_fee", "deployer_fee", "priority_gas")


@dataclass(frozen=True, slots=True)
class FillShape:
    """How a file of fills is written.

    layout: blocks (one line a block), pairs (the older lines [user, fill]), flat (lines with the user in the fill), or
    parquet. Of parquet: snake_case names instead of the exchange's; times as integers (milliseconds, and block_time as
    text), as timestamps of a unit, or misread (milliseconds that are declared nanoseconds, and no block_time, as
    Artemis had it); and numbers as text, decimals or floating point.
    """

    layout: Literal["blocks", "pairs", "flat", "parquet"]
    snake: bool = False
    times: Literal["int", "ms", "us", "ns", "misread"] = "int"
    numbers: Literal["text", "decimal", "double"] = "text"


BY_BLOCK = FillShape("blocks")


def write_fills(path: Path, frames: Iterable[pl.DataFrame], shape: FillShape, *, whole: bool = False) -> int:
    """Write rows of fills() to a file, compressed if it is called .lz4; returns how many.

    A Parquet file gets one row group a frame, or, with `whole`, a single one, for which all rows are held.
    """
    if shape.layout == "parquet":
        return write_parquet(path, (_parquet_fills(frame, shape) for frame in frames), whole=whole)
    return write_lines(path, ((frame.height, _fill_lines(frame, shape)) for frame in frames))


def fill_rows(frames: Iterable[pl.DataFrame], shape: FillShape) -> list[dict[str, Any]]:
    """What table fills must hold after a file with these rows, but object_id: Decimal, datetime, None, dict."""
    import polars as pl

    key = ["user", "coin", "tid", "oid", "side", "time"]
    rows = pl.concat(frames)
    told = (shape.layout in {"blocks", "flat"}) or (shape.layout == "parquet" and shape.times != "misread")
    cut = 10**6 if shape.times == "ms" else 10**3
    block_time = pl.when(told).then(pl.col("block_ns") // cut * cut // 1000)
    rows = rows.select(
        *(name for name in _FIELDS if name not in {"time", "liquidation"}),
        user_address="user",
        event_ix=pl.int_range(pl.len()).over(key),
        time=moment(pl.col("time") * 1000),
        block_time=moment(block_time),
        block_number=pl.when(shape.layout == "blocks").then("block_number"),
        liquidation=_liquidation(),
        is_exact=pl.lit(shape.numbers != "double"),
        extra=pl.lit(None),
        source=pl.lit("s3"),
    )
    return [decoded(row, _NUMBERS) for row in rows.iter_rows(named=True)]


def _liquidation() -> pl.Expr:
    import polars as pl

    fields = [pl.col(ours).alias(theirs) for theirs, ours in _LIQUIDATION.items()]
    return pl.when(pl.col("liquidated_user").is_not_null()).then(pl.struct(fields))


def _fill_lines(rows: pl.DataFrame, shape: FillShape) -> pl.Series:
    import polars as pl

    fill = _fill_json()
    if shape.layout == "flat":
        plus = ',"user":"%","block_time":"%"}'
        flat = filled("%" + plus, fill.str.strip_suffix("}"), "user", iso(pl.col("block_ns")))
        return rows.select(flat).to_series()
    pairs = rows.select(*BLOCK, events=filled('["%",%]', "user", fill))
    return pairs["events"] if shape.layout == "pairs" else block_lines(pairs)


def _fill_json() -> pl.Expr:
    import polars as pl

    parts = []
    for ours, theirs in _FIELDS.items():
        if ours == "liquidation":
            of = '{"liquidatedUser":"%","markPx":"%","method":"%"}'
            part = filled(f',"{theirs}":{of}', *_LIQUIDATION.values()).fill_null("")
        elif ours == "cloid":
            # Sometimes it is there and null.
            none = pl.when(pl.col("oid") % 20 == 0).then(pl.lit(f',"{theirs}":null')).otherwise(pl.lit(""))
            part = pl.coalesce(filled(f',"{theirs}":"%"', ours), none)
        elif ours in _OPTIONAL:
            part = filled(f',"{theirs}":"%"', ours).fill_null("")
        elif ours in _BARE:
            part = filled(f',"{theirs}":%', pl.col(ours).cast(pl.String).fill_null("null"))
        else:
            part = filled(f',"{theirs}":"%"', ours)
        parts.append(part)
    return filled("{%}", pl.concat_str(parts).str.strip_prefix(","))


def _parquet_fills(rows: pl.DataFrame, shape: FillShape) -> pl.DataFrame:
    import polars as pl

    block_ns, ms = pl.col("block_ns"), pl.col("time")
    times: dict[str, tuple[pl.Expr, pl.Expr | None]] = {
        "int": (ms, iso(block_ns)),
        "ms": (ms.cast(pl.Datetime("ms")), (block_ns // 10**6).cast(pl.Datetime("ms"))),
        "us": ((ms * 1000).cast(pl.Datetime("us")), (block_ns // 1000).cast(pl.Datetime("us"))),
        "ns": ((ms * 10**6).cast(pl.Datetime("ns")), block_ns.cast(pl.Datetime("ns"))),
        "misread": (ms.cast(pl.Datetime("ns")), None),
    }
    time, block_time = times[shape.times]
    columns = {ours: pl.col(ours) for ours in _FIELDS if ours not in {"time", "liquidation", *_NUMBERS}}
    columns |= {name: number(name, shape.numbers) for name in _NUMBERS}
    columns |= {"time": time, "liquidation": _liquidation(), "user": pl.col("user")}
    names = {ours: ours if shape.snake else theirs for ours, theirs in _FIELDS.items()}
    names["user"] = "user_address" if shape.snake else "user"
    chosen = [columns[ours].alias(name) for ours, name in names.items()]
    if block_time is not None:
        chosen.append(block_time.alias("block_time"))
    return rows.select(chosen)
