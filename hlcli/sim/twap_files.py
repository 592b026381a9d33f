"""Files of invented TWAP statuses, in the shapes that nodes, Artemis and others publish."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from hlcli.sim.columns import filled, iso, moment
from hlcli.sim.files import block_lines, decoded, number, write_lines, write_parquet
from hlcli.sim.twaps import ERRORS

if TYPE_CHECKING:
    from pathlib import Path

    import polars as pl

FRAME = 50_000  # events written at once


# Our names and the exchange's, in its order.
_STATE = {
    "coin": "coin",
    "user": "user",
    "side": "side",
    "sz": "sz",
    "executed_sz": "executedSz",
    "executed_ntl": "executedNtl",
    "minutes": "minutes",
    "reduce_only": "reduceOnly",
    "randomize": "randomize",
    "timestamp": "timestamp",
}


@dataclass(frozen=True, slots=True)
class TwapShape:
    """How a file of TWAP statuses is written.

    layout: lines (one an event), blocks (one a block), or parquet with the state in columns (times as integers,
    StatusError beside Status), in a struct (timestamps, the status as text or JSON text), or as JSON text (ISO times).
    numbers: of columns and struct.
    """

    layout: Literal["lines", "blocks", "columns", "struct", "text"]
    numbers: Literal["text", "double"] = "text"


def write_twaps(path: Path, rows: pl.DataFrame, shape: TwapShape) -> int:
    """Write rows of twaps() to a file, compressed if it is called .lz4; returns how many."""
    slices = rows.iter_slices(FRAME)
    if shape.layout in {"lines", "blocks"}:
        return write_lines(path, ((frame.height, _twap_lines(frame, shape)) for frame in slices))
    return write_parquet(path, (_parquet_twaps(frame, shape) for frame in slices))


def twap_rows(rows: pl.DataFrame, shape: TwapShape) -> list[dict[str, Any]]:
    """What table twap_status must hold after a file with these rows, but raw_payload and what tells of the object."""
    import polars as pl

    lossy = shape.numbers == "double"
    numbered = shape.layout in {"blocks", "columns"}
    rows = rows.select(
        "twap_id",
        "status",
        "side",
        "reduce_only",
        "randomize",
        wallet="user",
        ts=moment(pl.col("time_ns") // 1000),
        asset="coin",
        size_requested="sz",
        size_executed="executed_sz",
        notional_executed="executed_ntl",
        duration_minutes="minutes",
        status_error="error",
        created_at=moment(pl.col("timestamp") * 1000),
        ts_kind=pl.lit("event"),
        event_time_ns="time_ns",
        block_number=pl.when(numbered).then("block_number"),
        is_exact=pl.lit(not lossy),
    )
    numbers = ("size_requested", "size_executed", "notional_executed")
    return [decoded(row, numbers) for row in rows.iter_rows(named=True)]


def _twap_lines(rows: pl.DataFrame, shape: TwapShape) -> pl.Series:
    import polars as pl

    template = '{"time":"%","twap_id":%,"state":%,"status":%}'
    status = pl.coalesce(_error_json(), filled('"%"', "status"))
    event = filled(template, iso(pl.col("time_ns")), "twap_id", _state_json(), status)
    if shape.layout == "lines":
        return rows.select(event).to_series()
    local_ns = pl.col("time_ns") + 170_000_000
    return block_lines(rows.select("block_number", block_ns="time_ns", local_ns=local_ns, events=event))


def _error_json() -> pl.Expr:
    """The status of an error, NULL of others."""
    import polars as pl

    quoted = {text: json.dumps({"error": text}) for text in ERRORS}
    return pl.col("error").replace_strict(quoted, return_dtype=pl.String)


def _state_json() -> pl.Expr:
    amounts = '"sz":"%","executedSz":"%","executedNtl":"%"'
    template = f'{{"coin":"%","user":"%","side":"%",{amounts},"minutes":%,"reduceOnly":%,"randomize":%,"timestamp":%}}'
    return filled(template, *_STATE)


def _parquet_twaps(rows: pl.DataFrame, shape: TwapShape) -> pl.DataFrame:
    import polars as pl

    numbers = ("sz", "executed_sz", "executed_ntl")
    state = [
        (number(name, shape.numbers) if name in numbers else pl.col(name)).alias(theirs)
        for name, theirs in _STATE.items()
    ]
    if shape.layout == "columns":
        columns = {
            "block_number": "Block_Number",
            "twap_id": "TwapId",
            "status": "Status",
            "error": "StatusError",
        }
        return rows.select(
            *(pl.col(ours).alias(theirs) for ours, theirs in columns.items()),
            *(column.name.map(lambda name: "State_" + name[0].upper() + name[1:]) for column in state),
            Block_Time="time_ns",
            Time="time_ns",
        )
    status, time_ns = pl.coalesce(_error_json(), "status"), pl.col("time_ns")
    if shape.layout == "struct":
        moment = time_ns.cast(pl.Datetime("ns"))
        return rows.select("twap_id", time=moment, state=pl.struct(state), status=status)
    return rows.select("twap_id", time=iso(time_ns), state=_state_json(), status=status)
