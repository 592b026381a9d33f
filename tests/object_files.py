"""Small files of fills and TWAP statuses: the rows are written out here, the containers around them made on the spot."""

from __future__ import annotations

import io
import json
from datetime import UTC, datetime, timedelta

import pyarrow as pa
from pyarrow import parquet

from hlcli.sources import files

WALLETS = tuple(f"0x{digit * 40}" for digit in "abcdef")
T0_NS = 1_790_248_352_992_506_967
T0_MS = T0_NS // 10**6
ZERO_HASH = "0x" + "0" * 64


def iso(ns):
    """Nanoseconds since 1970 as nodes write them."""
    whole = datetime(1970, 1, 1) + timedelta(seconds=ns // 10**9)
    return f"{whole.isoformat()}.{ns % 10**9:09}"


def moment(ns):
    """The same as the table holds it."""
    return datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=ns // 1000)


def fill(number, **more):
    """A fill as it is served; ... takes a field away."""
    served = {
        "coin": "BTC",
        "px": f"{64_000 + number}.10",
        "sz": "0.00100",
        "side": "BA"[number % 2],
        "time": T0_MS + 1000 * number,
        "startPosition": "-0.5000",
        "dir": "Open Long",
        "closedPnl": "0.0",
        "hash": "0x" + f"{number:064x}",
        "oid": 500_000_000 + number,
        "crossed": number % 2 == 0,
        "fee": "-0.000010",
        "tid": 1_000_000_000_000 + number,
        "cloid": "0x" + f"{number:032x}",
        "feeToken": "USDC",
        "twapId": None,
    } | more
    return {name: value for name, value in served.items() if value is not ...}


def event(number, status="activated", **more):
    """A TWAP's event as a node writes it; of `more`, what a state has goes there, and ... takes a field away."""
    state = {
        "coin": "ETH",
        "user": WALLETS[0],
        "side": "A",
        "sz": "10.00",
        "executedSz": "0.10",
        "executedNtl": "250.125000",
        "minutes": 5,
        "reduceOnly": False,
        "randomize": True,
        "timestamp": T0_MS - 5,
    }
    told = {"time": iso(T0_NS + number * 10**9), "twap_id": 2_250_263 + number, "status": status}
    for name, value in more.items():
        (state if name in state else told)[name] = value
    told.setdefault("state", {name: value for name, value in state.items() if value is not ...})
    return {name: value for name, value in told.items() if value is not ...}


def block(events, number=1_159_309_631, ns=T0_NS, **more):
    """A line by block."""
    return {
        "local_time": iso(ns + 10**9),
        "block_time": iso(ns),
        "block_number": number,
        "events": events,
    } | more


def lines(*values):
    """JSON lines; bytes stay what they are."""
    return b"".join(
        (value if isinstance(value, bytes) else json.dumps(value).encode()) + b"\n" for value in values
    )


def packed(body, codec):
    """Compressed; codec None leaves it as it is."""
    if codec is None:
        return body
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, codec) as out:
        out.write(body)
    return sink.getvalue().to_pybytes()


def as_parquet(columns, **options):
    """A Parquet file of these columns: values, or a pyarrow array."""
    sink = pa.BufferOutputStream()
    parquet.write_table(pa.table(columns), sink, **options)
    return sink.getvalue().to_pybytes()


def batches(body):
    """The batches of a file with these bytes."""
    with files.opened(io.BytesIO(body)) as file:
        yield from file.batches()


def read(source, body, **options):
    """(rows, rejected) that fills or twaps make of a file: dicts, and the Rejected."""
    rows, rejected = [], []
    for found in source.read(batches(body), **options):
        rows += found.frame.to_dicts()
        rejected += found.rejected
    return rows, rejected


def clean(source, body, **options):
    """The rows of a file of which nothing is rejected."""
    rows, rejected = read(source, body, **options)
    assert rejected == []
    return rows
