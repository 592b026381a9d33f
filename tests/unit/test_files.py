"""Files in all their containers are the same events; a damaged one is refused or read, and nothing else happens."""

from __future__ import annotations

import gzip
import io
import json
import tracemalloc
from decimal import Decimal

import pyarrow as pa
import pytest
from object_files import WALLETS, as_parquet, batches, block, clean, fill, lines, packed, read
from pyarrow import parquet

from hlcli.sources import files, fills, twaps
from hlcli.sources.files import UnusableError

CODECS = (None, "lz4", "gzip", "zstd")
SKIPPABLE = b"\x50\x2a\x4d\x18\x04\x00\x00\x00abcd"


def decoded(body):
    """(values, rejected) of all batches."""
    values, rejected = [], []
    for batch in batches(body):
        more, bad = batch.values()
        values += more
        rejected += bad
    return values, rejected


def values_of(body):
    values, rejected = decoded(body)
    assert rejected == []
    return values


# --- containers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", CODECS)
def test_lines_are_the_same_in_every_container(codec):
    given = [{"n": number, "text": "x" * (number % 97)} for number in range(5_000)]
    body = lines(*given)
    assert values_of(packed(body, codec)) == given
    # Nodes append, so a file may hold several compressed streams, which end anywhere.
    cut = len(body) // 3
    assert values_of(packed(body[:cut], codec) + packed(body[cut:], codec)) == given


@pytest.mark.parametrize("codec", CODECS)
def test_an_array_is_the_same_in_every_container(codec):
    given = [{"n": number, "nested": [{"a": None}]} for number in range(3_000)]
    for indent in (None, 1):
        assert decoded(packed(json.dumps(given, indent=indent).encode(), codec)) in (
            (given, []),
            ([given], []),  # in one line: whoever reads the value takes it apart
        )
    assert values_of(packed(b" \n[\n\n]\n", codec)) == []


@pytest.mark.parametrize("codec", ["lz4", "zstd"])
def test_frames_to_be_skipped_are_skipped(codec):
    body = lines({"n": 1})
    assert values_of(packed(body, codec) + SKIPPABLE) == [{"n": 1}]


def test_a_frame_to_be_skipped_may_come_first_in_lz4():
    assert values_of(SKIPPABLE + packed(lines({"n": 1}), "lz4")) == [{"n": 1}]


@pytest.mark.parametrize("codec", CODECS)
def test_the_last_line_needs_no_end(codec):
    assert values_of(packed(b'{"n":1}\n{"n":2}', codec)) == [{"n": 1}, {"n": 2}]


def test_blank_lines_a_byte_order_mark_and_windows_line_ends_change_nothing():
    body = b'\xef\xbb\xbf{"n":1}\r\n\r\n  \n\n{"n":2}\r\n \t'
    assert values_of(body) == [{"n": 1}, {"n": 2}]
    assert values_of(b"\xef\xbb\xbf[\n1]") == [1]
    assert values_of(b"\xef\xbb\xbf") == []


def test_a_file_object_and_a_path_are_the_same(tmp_path):
    (tmp_path / "misnamed.parquet").write_bytes(packed(lines({"n": 1}), "gzip"))
    with files.opened(tmp_path / "misnamed.parquet") as file:
        assert file.position == 0
        for batch in file.batches():
            assert batch.values() == ([{"n": 1}], [])
            assert file.position == (tmp_path / "misnamed.parquet").stat().st_size


def test_batches_are_bounded_in_events_and_bytes(monkeypatch):
    monkeypatch.setattr(files, "BATCH", 100)
    monkeypatch.setattr(files, "BATCH_BYTES", 2_000)
    given = [{"n": number} for number in range(950)]
    for body in (lines(*given), json.dumps(given, indent=1).encode(), as_parquet({"n": list(range(950))})):
        sizes, found = [], []
        for batch in batches(body):
            rows = batch.values()[0] if batch.frame is None else batch.frame.to_dicts()
            sizes.append(len(rows))
            found += rows
        assert found == given
        assert max(sizes) <= 100
    long = [{"text": "x" * 900}] * 10
    assert max(len(batch.lines) for batch in batches(lines(*long))) == 3


# --- what is no JSON ----------------------------------------------------------------------------------------------


def test_a_bad_line_is_rejected_by_its_number_and_the_others_stay(monkeypatch):
    bad = [
        b"{",
        b"<html>",
        b'{"a":1}}',
        b"\xff\xfe",
        b'{"a":nul}',
        b'{"a":01}',
        b"[" * 100_000,
        b'{"a":1e9999999999999999999}',
    ]
    monkeypatch.setattr(files, "BATCH", 3)
    body = b"".join(b'{"n":%d}\n\n%s\n' % (number, line) for number, line in enumerate(bad))
    values, rejected = decoded(body)
    assert values == [{"n": number} for number in range(len(bad))]
    assert [(each.key, each.reason) for each in rejected] == [
        ([f"line {3 * number + 3}"], "not_json") for number in range(len(bad))
    ]
    assert rejected[1].payload == "<html>"


def test_the_first_line_of_pairs_may_be_bad():
    body = b'["0xaa", {"coin": \n' + lines([WALLETS[0], fill(1)])
    rows, rejected = read(fills, body)
    assert [row["tid"] for row in rows] == [fill(1)["tid"]]
    assert [each.key for each in rejected] == [["line 1"]]


def test_every_value_of_json_may_be_a_line():
    body = b'1\n"a"\nnull\ntrue\n[]\n{}\n1.10\n[1, 2]\n'
    assert values_of(body) == [1, "a", None, True, [], {}, Decimal("1.10"), [1, 2]]


def test_numbers_keep_their_digits_where_they_are_asked_for():
    line = b'{"a":1.10,"b":12345678901234567890.123,"c":123456789012345678901234567890,"d":NaN,"e":-0.0,"f":1E400}'
    (value,) = values_of(line)
    assert [str(each) for each in value.values()] == [
        "1.10",
        "12345678901234567890.123",
        "123456789012345678901234567890",
        "NaN",
        "-0.0",
        "1E+400",
    ]


@pytest.mark.parametrize(
    "body",
    [
        b"[\n1,\n2",
        b"[\n1,\n2,",
        b"[\n1 2]",
        b"[\n1]\n[2]",
        b"[\n1] x",
        b"[\n" + b"[" * 100_000,
        b"[\n1e99999999999999999999]",
        b'[\n1, "\xff"]',
        b'[\n1, "' + b"x" * (2 << 20) + b'"]',
    ],
    ids=range(9),
)
def test_an_array_that_is_none_is_refused(body):
    with pytest.raises(UnusableError, match="no JSON array"):
        decoded(body)


@pytest.mark.parametrize("body", [b'{"n":1}\n{"n":', b'{"n":1}\n{"n"', b"<html>"])
def test_lines_that_are_cut_off_are_refused(body):
    with pytest.raises(UnusableError, match="cut off in line"):
        decoded(body)


@pytest.mark.parametrize("codec", ["lz4", "gzip", "zstd"])
def test_a_compressed_file_cut_off_anywhere_is_refused(codec, rng):
    whole = packed(lines(*({"n": rng.random()} for _ in range(3_000))), codec)
    for size in {
        1,
        5,
        11,
        len(whole) // 2,
        len(whole) - 1,
        *(rng.randrange(4, len(whole)) for _ in range(10)),
    }:
        with pytest.raises(UnusableError):
            decoded(whole[:size])
    with pytest.raises(UnusableError):
        decoded(whole + whole[: len(whole) // 2])
    with pytest.raises(UnusableError):
        decoded(whole + b"something else")


# --- Parquet ------------------------------------------------------------------------------------------------------


def frames_of(body):
    return [batch.frame for batch in batches(body)]


def test_decimals_are_their_text():
    values = [Decimal("1.1000000000"), Decimal("-123456789012345678901234567.1234567891"), None, Decimal(0)]
    nested = [{"sz": value, "all": [value], "blob": b"a"} for value in values]
    for kind in (pa.decimal128(38, 10), pa.decimal256(60, 10)):
        inner = pa.struct({"sz": kind, "all": pa.list_(kind), "blob": pa.binary()})
        (frame,) = frames_of(as_parquet({"flat": pa.array(values, kind), "nested": pa.array(nested, inner)}))
        told = [None if text is None else Decimal(text) for text in frame["flat"]]
        assert told == values
        assert frame["flat"][0] == "1.1000000000"
        assert frame["nested"].struct.field("sz").to_list() == frame["flat"].to_list()
        assert frame["nested"].struct.field("all").to_list() == [[text] for text in frame["flat"]]


def test_a_file_of_no_rows_is_a_file():
    assert frames_of(as_parquet({"time": pa.array([], pa.int64())})) == []
    assert clean(fills, as_parquet({"time": pa.array([], pa.int64())})) == []


def test_twenty_million_rows_of_one_value_are_not_believed():
    sink = pa.BufferOutputStream()
    table = pa.table({"time": pa.array([1]).take(pa.array([0] * 500_000))})
    with parquet.ParquetWriter(sink, table.schema, compression="zstd") as writer:
        for _ in range(40):
            writer.write_table(table, row_group_size=500_000)
    body = sink.getvalue().to_pybytes()
    assert len(body) < 100_000
    with pytest.raises(UnusableError, match="20,000,000 rows in .* are not believed"):
        decoded(body)


def test_columns_are_counted_to_the_leaves_and_may_stand_once():
    wide = pa.array([{f"c{number}": 1 for number in range(501)}])
    with pytest.raises(UnusableError, match="501 columns"):
        decoded(as_parquet({"a": wide}))
    sink = pa.BufferOutputStream()
    twice = pa.Table.from_arrays([pa.array([1]), pa.array([2])], names=["time", "time"])
    parquet.write_table(twice, sink)
    with pytest.raises(UnusableError, match="'time' stands twice"):
        decoded(sink.getvalue().to_pybytes())


def test_text_that_is_no_utf_8_is_refused():
    garbled = pa.StringArray.from_buffers(
        1, pa.array([0, 2], pa.int32()).buffers()[1], pa.py_buffer(b"\xff\xfe")
    )
    for column in (garbled, pa.StructArray.from_arrays([garbled], ["inner"])):
        with pytest.raises(UnusableError, match="UTF"):
            decoded(as_parquet({"user": column}))


@pytest.mark.parametrize(
    "body",
    [b"", b"PAR1", b"PAR1PAR1", b"PAR1" + b"\0" * 100 + b"PAR1", b"PAR1\xff\xff\xff\x7fPAR1"],
    ids=["empty", "magic", "twice", "zeros", "footer of 2 GB"],
)
def test_what_only_looks_like_parquet_is_refused(body):
    with pytest.raises(UnusableError):
        decoded(body)


def test_half_a_parquet_file_is_refused(rng):
    whole = sample_parquet()
    for size in {4, 12, len(whole) // 2, len(whole) - 1, *(rng.randrange(4, len(whole)) for _ in range(20))}:
        with pytest.raises(UnusableError):
            decoded(whole[:size])


def sample_parquet(**options):
    rows = [
        {
            "user": WALLETS[number % 3],
            **fill(number),
            "liquidation": {"markPx": "1.5"} if number % 2 else None,
        }
        for number in range(40)
    ]
    names = rows[0].keys()
    return as_parquet({name: [row[name] for row in rows] for name in names}, **options)


def survives(source, body):
    """Whatever the bytes are: rows, rejected rows, or UnusableError; how many rows."""
    try:
        rows, _ = read(source, body)
    except UnusableError:
        return -1
    return len(rows)


@pytest.mark.parametrize("compression", ["snappy", "none"])
def test_a_flipped_byte_in_parquet_is_survived(compression, rng):
    whole = sample_parquet(compression=compression, use_dictionary=["user", "side", "coin"])
    results = []
    for at in sorted(rng.sample(range(len(whole)), 400)):
        flipped = bytearray(whole)
        flipped[at] ^= 1 << rng.randrange(8)
        results.append(survives(fills, bytes(flipped)))
    assert -1 in results
    assert set(results) <= {-1, *range(41)}


def test_a_flipped_byte_in_a_page_is_noticed_where_pages_have_checksums(rng):
    whole = sample_parquet(write_page_checksum=True, compression="none")
    at = whole.index(fill(7)["hash"].encode()) + 40
    flipped = whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :]
    assert len(clean(fills, whole)) == 40
    with pytest.raises(UnusableError):
        read(fills, flipped)


@pytest.mark.parametrize("codec", CODECS)
def test_a_flipped_byte_in_lines_is_survived(codec, rng):
    given = [block([[WALLETS[0], fill(number)], [WALLETS[1], fill(number)]]) for number in range(20)]
    whole = packed(lines(*given), codec)
    for at in sorted(rng.sample(range(len(whole)), 150)):
        flipped = bytearray(whole)
        flipped[at] ^= 1 << rng.randrange(8)
        # Of lines that are damaged only a few can be wrong; a frame without a checksum may repeat what it likes.
        assert survives(fills, bytes(flipped)) <= 45


@pytest.mark.parametrize(
    "start", [b"", b"PAR1", b"\x04\x22\x4d\x18", b"\x1f\x8b\x08", b"\x28\xb5\x2f\xfd", b"[", b'{"']
)
def test_noise_is_survived(start, rng):
    for _ in range(30):
        body = start + rng.randbytes(rng.randrange(1, 2_000))
        for source in (fills, twaps):
            assert survives(source, body) <= 0


# --- bombs --------------------------------------------------------------------------------------------------------


def test_a_line_of_a_hundred_megabytes_is_not_held():
    body = packed(b'{"text":"' + b"x" * (100 << 20) + b'"}\n', "lz4")
    tracemalloc.start()
    try:
        with pytest.raises(UnusableError, match="a line of over"):
            decoded(body)
        assert tracemalloc.get_traced_memory()[1] < 80 << 20
    finally:
        tracemalloc.stop()


def test_hundreds_of_megabytes_of_blank_lines_are_passed_over():
    blank = packed(b"\n" * (32 << 20), "zstd")
    assert len(blank) < 10_000
    found = list(batches(packed(b'{"n":1}\n', "zstd") + blank * 4 + packed(b'x\n{"n":2}', "zstd")))
    rejected = [each.key for batch in found for each in batch.values()[1]]
    assert rejected == [[f"line {(32 << 20) * 4 + 2}"]]


def test_deep_nesting_costs_one_row():
    deep = b'{"a":' * 900 + b"1" + b"}" * 900
    deeper = b'{"a":' * 100_000 + b"1" + b"}" * 100_000
    good = json.dumps(block([[WALLETS[0], fill(1)]])).encode()
    odd = (
        json.dumps(block([[WALLETS[1], fill(2, odd=...)]]))
        .encode()
        .replace(b'"coin"', b'"odd": %s, "coin"' % deep)
    )
    rows, rejected = read(fills, lines(good, odd, deeper, good))
    assert {row["tid"] for row in rows if row["extra"] is None} == {fill(1)["tid"]}
    assert [row["extra"] for row in rows if row["extra"] is not None] in ([], ["\0"])
    assert "line 3" in [each.key[0] for each in rejected]


def test_gzip_that_python_wrote_is_read():
    assert values_of(gzip.compress(b"1\n2\n")) == [1, 2]


def test_an_unreadable_file_object_is_unusable():
    class Broken(io.BytesIO):
        def read(self, size=-1):
            raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"), files.opened(Broken(b"x")):
        pass
