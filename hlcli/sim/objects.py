"""A sample of invented files, of fills and of TWAP statuses, in every shape that is published."""

from __future__ import annotations

from datetime import UTC, datetime
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple

from hlcli.sim.columns import HOUR_NS
from hlcli.sim.fill_files import BY_BLOCK, FillShape, fill_rows, write_fills
from hlcli.sim.fills import fills
from hlcli.sim.twap_files import TwapShape, twap_rows, write_twaps
from hlcli.sim.twaps import twaps

if TYPE_CHECKING:
    from pathlib import Path

SAMPLE_FILLS = {
    "blocks.lz4": BY_BLOCK,
    "more-blocks.lz4": BY_BLOCK,
    "legacy.lz4": FillShape("pairs"),
    "flat.jsonl": FillShape("flat"),
    "camel.parquet": FillShape("parquet"),
    "snake.parquet": FillShape("parquet", snake=True, times="us", numbers="decimal"),
    "double.parquet": FillShape("parquet", times="ns", numbers="double"),
}
SAMPLE_TWAPS = {
    "lines.jsonl": TwapShape("lines"),
    "lines.lz4": TwapShape("lines"),
    "blocks.lz4": TwapShape("blocks"),
    "columns.parquet": TwapShape("columns"),
    "struct.parquet": TwapShape("struct", numbers="double"),
    "text.parquet": TwapShape("text"),
}


class Sample(NamedTuple):
    """What a sample must leave in the tables, see fill_rows() and twap_rows()."""

    fills: list[dict[str, Any]]
    twaps: list[dict[str, Any]]


def sample(folder: Path, now: datetime, *, seed: int = 1, count: int = 21_000) -> Sample:
    """Write files of every shape below `fills` and `twaps` in a folder, with what happened in the last day.

    So many fills in the last whole hours, one file an hour, and some 500 events of the TWAPs that they are slices of.
    """
    hour = int(now.timestamp()) // 3600
    truth = Sample([], [])
    for name in ("fills", "twaps"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    first = hour - len(SAMPLE_FILLS)
    parts = fills(seed, first, count // len(SAMPLE_FILLS), len(SAMPLE_FILLS))
    for (name, shape), (number, those) in zip(
        SAMPLE_FILLS.items(), groupby(parts, lambda part: part.hour), strict=True
    ):
        frames = [part.rows for part in those]
        write_fills(folder / "fills" / f"{_stamp(number)}-{name}", frames, shape)
        truth.fills.extend(fill_rows(frames, shape))
    events = twaps(seed, hour - 23, hours=23)
    size = -(-events.height // len(SAMPLE_TWAPS))
    for (name, twap_shape), frame in zip(SAMPLE_TWAPS.items(), events.iter_slices(size), strict=True):
        number = frame["time_ns"][0] // HOUR_NS
        write_twaps(folder / "twaps" / f"{_stamp(number)}-{name}", frame, twap_shape)
        truth.twaps.extend(twap_rows(frame, twap_shape))
    return truth


def _stamp(hour: int) -> str:
    return f"{datetime.fromtimestamp(hour * 3600, UTC):%Y%m%d-%H}"
