"""TWAP orders: one row an event (activated; finished, terminated or error), out of node files and Parquet."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from hlcli.loader import Rejected
from hlcli.sources import columns, times, wire
from hlcli.sources.files import Batch, LackingError, Rows
from hlcli.sources.times import GARBLED

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    import polars as pl

TABLE = "twap_status"
KINDS: dict[str, columns.Kind] = {
    "twap_id": "integer",
    "wallet": "text",
    "status": "text",
    "status_error": "text",
    "asset": "text",
    "side": "text",
    "size_requested": "number",
    "size_executed": "number",
    "notional_executed": "number",
    "duration_minutes": "integer",
    "reduce_only": "boolean",
    "randomize": "boolean",
    "block_number": "integer",
    "created_at": "time",
    "event_time": "time",
    "block_time": "time",
    "raw_payload": "document",
}
# What stands in `state`, or flat as state_*.
STATE = {
    "coin": "asset",
    "user": "wallet",
    "side": "side",
    "sz": "size_requested",
    "executedsz": "size_executed",
    "executedntl": "notional_executed",
    "minutes": "duration_minutes",
    "timestamp": "created_at",
    "reduceonly": "reduce_only",
    "randomize": "randomize",
}
NAMES = {
    **{f"state{name}": ours for name, ours in STATE.items()},
    "twapid": "twap_id",
    "status": "status",
    "statuserror": "status_error",
    "time": "event_time",
    "blocktime": "block_time",
    "blocknumber": "block_number",
    "state": "state",
}
NEEDED = ("twap_id", "wallet", "status")
ERROR = "error"
TIMELESS = "no time"


def read(batches: Iterable[Batch]) -> Iterator[Rows]:
    """Events in frames of some 20,000 rows.

    Takes lines of node_twap_statuses {time, twap_id, state, status}, by block or not, answers of twapHistory, and
    Parquet with flat state_* columns, a struct `state` or one of JSON text. `ts` is when the event happened; of
    files that do not say, when its block was made; else when the TWAP was created.

    Raises UnusableError for a file that is damaged or lacks a column, LackingError for one without any time.
    """
    first = True
    for batch in batches:
        rows = columns.rows_of(batch, _from_values, _from_frame)
        if first and rows.frame.is_empty() and {each.reason for each in rows.rejected} == {TIMELESS}:
            raise LackingError("neither an event nor a creation time")
        first = False
        yield rows


def _from_values(values: Sequence[Any]) -> Rows:
    """Decoded JSON as rows."""
    events: list[Mapping[str, Any]] = []
    block_times: list[Any] = []
    block_numbers: list[Any] = []
    rejected: list[Rejected] = []
    for event, block_time, block_number in columns.events_of(values):
        if isinstance(event, dict):
            events.append(event)
            block_times.append(block_time)
            block_numbers.append(block_number)
        else:
            rejected.append(Rejected([None], "not_an_event", {"event": event}))
    told, _ = columns.of_dicts(events, NAMES)
    states = [wire.mapping(_decoded(state)) for state in told.pop("state", [])]
    nested, _ = columns.of_dicts(states, STATE)
    for more in (nested, {"block_time": block_times, "block_number": block_numbers}):
        for name, given in more.items():
            told[name] = columns.first_of(told[name], given) if name in told else given
    if "status" in told:
        told["status"], errors = _statuses(told["status"])
        told["status_error"] = columns.first_of(errors, told.get("status_error", errors))
    told["raw_payload"] = events
    found = {name: columns.series(told[name], KINDS[name]) for name in told}
    return _typed(found, len(events), events.__getitem__, rejected)


def _decoded(value: Any) -> Any:
    """JSON text decoded, where it is that; anything else as it is."""
    if not isinstance(value, str) or value.lstrip()[:1] not in {"{", '"'}:
        return value
    try:
        return json.loads(value, parse_float=str, parse_constant=str)
    except (ValueError, RecursionError):
        return value


def _statuses(served: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """Statuses and messages of error: "finished", {"error": message}, {"status": "finished"}, or JSON text of these."""
    statuses, errors = [], []
    for each in served:
        status, error = _decoded(each), None
        if isinstance(status, dict) and status.get("status") is not None:
            status = status["status"]
        if isinstance(status, dict):
            error = status.get("error")
            status = None if error is None else ERROR
        statuses.append(status if isinstance(status, str) or status is None else wire.text(status))
        errors.append(error if isinstance(error, str) or error is None else wire.text(error))
    return statuses, errors


def _from_frame(frame: pl.DataFrame) -> Rows:
    """Rows of a Parquet file as rows of ours. Raises UnusableError."""
    import polars as pl

    found, _ = columns.of_frame(frame, NAMES)
    state = found.pop("state", None)
    if state is not None and isinstance(state.dtype, pl.Struct):
        nested, _ = columns.of_frame(state.struct.unnest(), STATE)
        found = {**nested, **found}
    elif state is not None:
        texts = [wire.mapping(_decoded(each)) for each in columns.text(state)]
        told, _ = columns.of_dicts(texts, STATE)
        found = {**{name: columns.series(told[name], KINDS[name]) for name in told}, **found}
    columns.needed(found, NEEDED)
    status = found["status"]
    is_struct = isinstance(status.dtype, pl.Struct)
    told_statuses = columns.documents(status.struct.unnest()) if is_struct else columns.text(status)
    statuses, errors = _statuses(told_statuses.to_list())
    found["status"] = pl.Series(statuses, dtype=pl.String)
    told_errors = pl.Series(errors, dtype=pl.String)
    found["status_error"] = told_errors.zip_with(
        told_errors.is_not_null(), columns.text(found.get("status_error", told_errors))
    )
    found["raw_payload"] = columns.documents(frame)
    return _typed(found, frame.height, columns.rows_as_told(frame), [])


def _typed(
    found: Mapping[str, pl.Series],
    height: int,
    served: Callable[[int], Mapping[str, Any]],
    rejected: list[Rejected],
) -> Rows:
    """The columns of the table; `served` gives a row as it came, for quarantine."""
    import polars as pl

    frame, lossy = columns.typed(found, KINDS, height)
    # A time that was served and tells none is no reason to take the next best one.
    garbled = pl.Series([False]).new_from_index(0, height)
    for name in ("event_time", "block_time", "created_at"):
        if name in found:
            garbled |= found[name].is_not_null() & frame[name].is_null()
    happened = pl.coalesce("event_time", "block_time")
    frame = frame.with_columns(
        pl.col("wallet").str.to_lowercase(),
        # Some exports have "" where there was no error.
        pl.col("status_error").replace("", None),
        pl.when(~garbled).then(pl.coalesce(happened, "created_at")).alias("ts"),
        pl.when(pl.col("event_time").is_not_null())
        .then(pl.lit("event"))
        .when(pl.col("block_time").is_not_null())
        .then(pl.lit("block"))
        .otherwise(pl.lit("creation"))
        .alias("ts_kind"),
        happened.alias("event_time_ns"),
        pl.lit(not lossy).alias("is_exact"),
    )
    timeless = frame["ts"].is_null()
    rejected = rejected + [
        Rejected(
            [frame[name][at] for name in NEEDED],
            GARBLED if garbled[at] else TIMELESS,
            served(at),
            "ts",
        )
        for at in timeless.arg_true()
    ]
    kept = frame.filter(~timeless)
    return Rows(
        kept.with_columns(times.timestamp(kept["ts"]), times.timestamp(kept["created_at"])).drop(
            "event_time", "block_time"
        ),
        rejected,
    )
