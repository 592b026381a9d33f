"""Fills: one row a side of a trade, out of node files, flattened files and answers of the API."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hlcli.loader import Rejected
from hlcli.sources import columns, times
from hlcli.sources.files import Batch, Rows

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
# When a node wrote the line: no fact of the fill.
IGNORED = ("localtime",)
NEEDED = (*KEY, "px", "sz")


def read(batches: Iterable[Batch], *, user: str | None = None) -> Iterator[Rows]:
    """Fills in frames of some 20,000 rows; the fills of a millisecond stay together.

    Takes lines of node_fills_by_block {block_time, block_number, events: [[user, fill], ...]} and of node_fills
    [user, fill]; flattened fills with their user, as JSON or Parquet; and answers of userFills and
    userTwapSliceFills, which do not say whose fills they are: `user` does, and then the API is their source.

    Raises UnusableError for a file that lacks a column or is damaged.
    """
    import polars as pl

    source = pl.lit("api" if user else "s3").alias("source")
    held: pl.DataFrame | None = None
    for batch in batches:
        if batch.frame is not None:
            rows = _from_frame(batch.frame, user)
        else:
            rows = columns.exactly_if_needed(
                batch, lambda values, exact: _from_values(values, user, exact=exact)
            )
        frame = rows.frame if held is None else pl.concat([held, rows.frame], how="vertical_relaxed")
        # Equal keys are told apart by their order, and a batch may end between two of them.
        whole = _before_last_time(frame)
        held = frame.slice(whole)
        yield Rows(numbered(frame.head(whole)).with_columns(source), rows.rejected)
    if held is not None:
        yield Rows(numbered(held).with_columns(source))


def _before_last_time(fills: pl.DataFrame) -> int:
    """Where the last run of fills with one time begins; all of them when there is but one run."""
    import polars as pl

    changes = fills.select((pl.col("time") != pl.col("time").shift(1)).arg_true()).to_series()
    return int(changes[-1]) if len(changes) else fills.height


def numbered(fills: pl.DataFrame) -> pl.DataFrame:
    """The fills with `event_ix`: 0, and 1, 2, ... for further ones with the same key, in their order.

    What is the same in all that the exchange says of it is the same fill served twice, and gets the same number.
    """
    import polars as pl

    if not fills.select(pl.struct(KEY).is_duplicated().any()).item():
        return fills.with_columns(pl.lit(0, pl.Int32).alias("event_ix"))
    numbers = [0] * fills.height
    told: dict[tuple[Any, ...], dict[tuple[Any, ...], int]] = {}
    same = fills.with_row_index("_at").filter(pl.struct(KEY).is_duplicated())
    for row in same.drop("block_time", "block_number").iter_rows(named=True):
        at = row.pop("_at")
        contents = told.setdefault(tuple(row[name] for name in KEY), {})
        numbers[at] = contents.setdefault(tuple(row.values()), len(contents))
    return fills.with_columns(pl.Series("event_ix", numbers, dtype=pl.Int32))


def _from_values(values: Sequence[Any], user: str | None, *, exact: bool) -> Rows:
    """Decoded JSON as rows. Raises InexactError."""
    users: list[Any] = []
    fills: list[Mapping[str, Any]] = []
    block_times: list[Any] = []
    block_numbers: list[Any] = []
    rejected: list[Rejected] = []

    def add(events: Iterable[Any], block_time: Any = None, block_number: Any = None) -> None:
        before = len(fills)
        for event in events:
            if isinstance(event, list) and len(event) == 2 and isinstance(event[1], dict):
                users.append(event[0])
                fills.append(event[1])
            elif isinstance(event, dict):
                users.append(user)
                # A slice of a TWAP as userTwapSliceFills tells it.
                inner = event.get("fill")
                fills.append({**inner, "twapId": event.get("twapId")} if isinstance(inner, dict) else event)
            else:
                rejected.append(Rejected([None], "not_a_fill", {"event": event}))
        block_times.extend([block_time] * (len(fills) - before))
        block_numbers.extend([block_number] * (len(fills) - before))

    for value in values:
        if isinstance(value, dict) and isinstance(value.get("events"), list):
            add(value["events"], value.get("block_time"), value.get("block_number"))
        elif isinstance(value, list) and not (len(value) == 2 and isinstance(value[0], str)):
            add(value)
        else:
            add([value])
    told, unknown = columns.of_dicts(fills, NAMES)
    around = {"user_address": users, "block_time": block_times, "block_number": block_numbers}
    for name, given in around.items():
        told[name] = columns.first_of(given, told[name]) if name in told else given
    extra = [key for key in unknown if columns.plain(key) not in IGNORED]
    if extra:
        left = [{key: fill[key] for key in extra if fill.get(key) is not None} for fill in fills]
        told["extra"] = [each or None for each in left]
    found = {name: columns.series(told[name], KINDS[name], exact=exact) for name in told}
    return _typed(found, len(fills), lambda at: {"user": users[at], **fills[at]}, rejected)


def _from_frame(frame: pl.DataFrame, user: str | None) -> Rows:
    """Rows of a Parquet file as rows of ours. Raises UnusableError."""
    import polars as pl

    found, unknown = columns.of_frame(frame, NAMES)
    if user is not None:
        found.setdefault("user_address", pl.repeat(user, frame.height, eager=True))
    columns.needed(found, NEEDED)
    extra = [name for name in unknown if columns.plain(name) not in IGNORED]
    if extra:
        found["extra"] = columns.documents(frame.select(extra))
    return _typed(found, frame.height, lambda at: frame.row(at, named=True), [])


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
    if timeless.any():
        rejected = [
            *rejected,
            *(
                Rejected([frame[name][at] for name in KEY], "no time from 2023 to 2100", served(at), "time")
                for at in timeless.arg_true()
            ),
        ]
        frame = frame.filter(~timeless)
    return Rows(
        frame.with_columns(
            pl.col("user_address").str.to_lowercase(),
            pl.lit(lossy or None, pl.Boolean).alias("lossy_numeric"),
            times.timestamp(frame["time"]),
            times.timestamp(frame["block_time"]),
        ),
        rejected,
    )
