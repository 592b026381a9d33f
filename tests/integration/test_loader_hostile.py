"""Fault F17: every hostile value, from the JSON that is served to the table, is stored exactly or quarantined alone."""

from __future__ import annotations

import json
from dataclasses import dataclass
from uuid import uuid4

import psycopg
import pytest

from hlcli.http import BadPayloadError, decode
from hlcli.loader import Merge, load
from hlcli.sources import wire

TABLE = """
create table hostile (
    id text primary key, name text, address text constraint hostile_address check (address ~ '^0x[0-9a-f]{40}$'),
    amount numeric, small smallint, number integer, big bigint, flag boolean, at timestamptz, doc jsonb
)
"""
COLUMNS = ("id", "name", "address", "amount", "small", "number", "big", "flag", "at", "doc")
STAMP = "0xAbCdEf0123456789aBcDeF0123456789AbCdEf01"


@dataclass(frozen=True)
class Stored:
    """What the column holds then, as text."""

    text: str | None


@dataclass(frozen=True)
class Refused:
    """Why the row is in quarantine; `field` is None where a CHECK names no column."""

    reason: str
    field: bool = True


def same(text):
    """A string that is stored just as it is, and the JSON that serves it."""
    return json.dumps(text), Stored(text)


NOT_A_NUMBER, NOT_A_TIME, NOT_AN_INTEGER = (
    Refused("not_a_number"),
    Refused("not_a_time"),
    Refused("not_an_integer"),
)
NOT_A_BOOLEAN, NOT_JSON = Refused("not_a_boolean"), Refused("not_json")
OUT_OF_RANGE, NO_SUCH_TIME = Refused("out_of_range"), Refused("time_out_of_range")
INVALID_TEXT, NO_ADDRESS = Refused("invalid_text"), Refused("check hostile_address", field=False)

TEXTS = {
    "NUL": (r'"a\u0000b"', INVALID_TEXT),
    "only NUL": (r'"\u0000"', INVALID_TEXT),
    "lone high surrogate": (r'"a\ud83d"', INVALID_TEXT),
    "lone low surrogate": (r'"\ude00b"', INVALID_TEXT),
    "surrogates the wrong way round": (r'"\ude00\ud83d"', INVALID_TEXT),
    "a surrogate pair": (r'"\ud83d\ude00"', Stored("\U0001f600")),
    "the end mark of COPY": same("\\."),
    "the NULL of COPY": same("\\N"),
    "the words null and NULL": same("null NULL"),
    "tab, newline, return and backslash": same("a\tb\nc\rd\\e\\\\f"),
    "control characters": same("".join(map(chr, range(1, 32))) + "\x7f\x80\x9f"),
    "the text backslash u0000": same("\\u0000 \\ud83d \\x00"),
    "marks that turn the direction": same("\u202eabc\u200f\u2066\u2069"),
    "noncharacters": same("\ufffe\uffff\U0010ffff"),
    "a byte order mark": same("\ufeffa"),
    "separators of lines": same("a\u2028b\u2029c\x85d"),
    "accents before composition": same("e\u0301 \u00e9"),
    "quotes": same("'\"; drop table hostile; --"),
    "format marks": same("%s %(a)s {} {0} $1"),
    "an empty string": same(""),
    "whitespace": same("  \t \u00a0 "),
    "10 MB": (json.dumps("x" * 10_000_000), Refused("too_long")),
    "one byte too long": (json.dumps("x" * 1_000_001), Refused("too_long")),
    "too long in bytes, not in characters": (json.dumps("\u00e9" * 500_001), Refused("too_long")),
    "as long as can be": same("x" * 1_000_000),
    "an integer of text": ("12", Stored("12")),
    "a decimal of text": ("1.50", Stored("1.50")),
    "a boolean as text": ("true", Stored("true")),
    "null": ("null", Stored(None)),
    "a list as text": ('["a"]', Stored('["a"]')),
    "the last of two equal keys": ('"first", "name": "second"', Stored("second")),
}
KEYS = {
    "500 bytes": same("k" * 500),
    "501 bytes": (json.dumps("k" * 501), Refused("key_too_long")),
    # Random text, as what compresses well would fit into an index after all.
    "3 kB": (json.dumps("".join(chr(33 + i * i * 7919 % 89) for i in range(3000))), Refused("key_too_long")),
    "empty": same(""),
    "whitespace": same(" \t"),
    "NUL": (r'"\u0000"', INVALID_TEXT),
    "a lone surrogate": (r'"\udfff"', INVALID_TEXT),
    "missing": ("null", Refused("null")),
    "a direction mark": same("\u202e"),
    "the end mark of COPY": same("\\."),
}
ADDRESSES = {
    "lower case": same(STAMP.lower()),
    "checksummed": (json.dumps(STAMP), Stored(STAMP.lower())),
    "upper case": (json.dumps("0X" + STAMP[2:].upper()), Stored(STAMP.lower())),
    "too short": (json.dumps(STAMP[:-1]), NO_ADDRESS),
    "a newline behind it": (json.dumps(STAMP + "\n"), NO_ADDRESS),
    "a blank before it": (json.dumps(" " + STAMP), NO_ADDRESS),
    "letters beyond f": (json.dumps("0x" + "g" * 40), NO_ADDRESS),
    "wide digits": (json.dumps("0x" + "\uff11" * 40), NO_ADDRESS),
    "empty": ('""', NO_ADDRESS),
    "a number": ("12", NO_ADDRESS),
    "a list": ("[]", NO_ADDRESS),
    "NUL": (json.dumps(STAMP[:-1] + "\x00"), INVALID_TEXT),
    "null": ("null", Stored(None)),
}
AMOUNTS = {
    "NaN as text": ('"NaN"', NOT_A_NUMBER),
    "Infinity as text": ('"Infinity"', NOT_A_NUMBER),
    "minus infinity as text": ('"-inf"', NOT_A_NUMBER),
    "1e400": ("1e400", NOT_A_NUMBER),
    "1e400 as text": ('"1e400"', NOT_A_NUMBER),
    "1e-400": ("1e-400", NOT_A_NUMBER),
    "1e140000": ("1e140000", NOT_A_NUMBER),
    "1e140000 as text": ('"1e140000"', NOT_A_NUMBER),
    "an exponent beyond Decimal": ("1e9999999999999999999", None),
    "minus zero": ("-0", Stored("0")),
    "minus zero as text": ('"-0"', Stored("0")),
    "minus zero with decimals": ("-0.00", Stored("0.00")),
    "hexadecimal": ('"0x1"', NOT_A_NUMBER),
    "underscores": ('"1_000"', NOT_A_NUMBER),
    "a thousands comma": ('"1,000"', NOT_A_NUMBER),
    "true": ("true", NOT_A_NUMBER),
    "false": ("false", NOT_A_NUMBER),
    "2^63": (str(2**63), Stored(str(2**63))),
    "2^63 as text": (f'"{2**63}"', Stored(str(2**63))),
    "more digits than a float": (
        "0.1000000000000000055511151231257827",
        Stored("0.1000000000000000055511151231257827"),
    ),
    "zeros behind": ('"1.500000"', Stored("1.500000")),
    "40 digits": ("9" * 40, Stored("9" * 40)),
    "41 digits": ("9" * 41, NOT_A_NUMBER),
    "1e40": ("1e40", Stored("1" + "0" * 40)),
    "1e41": ("1e41", NOT_A_NUMBER),
    "an exponent": ('"1.25e-7"', Stored("0.000000125")),
    "a plus": ('"+1"', NOT_A_NUMBER),
    "no digit before the point": ('".5"', NOT_A_NUMBER),
    "no digit behind the point": ('"5."', NOT_A_NUMBER),
    "a blank before": ('" 1"', NOT_A_NUMBER),
    "a newline behind": (r'"1\n"', NOT_A_NUMBER),
    "wide digits": (r'"\uff11"', NOT_A_NUMBER),
    "Arabic digits": (r'"\u0661"', NOT_A_NUMBER),
    "NUL": (r'"1\u0000"', NOT_A_NUMBER),
    "empty": ('""', NOT_A_NUMBER),
    "blank": ('" "', NOT_A_NUMBER),
    "a list": ("[1]", NOT_A_NUMBER),
    "an object": ("{}", NOT_A_NUMBER),
    "null": ("null", Stored(None)),
}
SMALLS = {
    "2^15 - 1": ("32767", Stored("32767")),
    "-2^15": ("-32768", Stored("-32768")),
    "2^15": ("32768", OUT_OF_RANGE),
}
NUMBERS = {
    "2^31 - 1": (str(2**31 - 1), Stored(str(2**31 - 1))),
    "-2^31": (str(-(2**31)), Stored(str(-(2**31)))),
    "2^31": (str(2**31), OUT_OF_RANGE),
    "-2^31 - 1": (str(-(2**31) - 1), OUT_OF_RANGE),
    "2^63": (str(2**63), OUT_OF_RANGE),
    "as text": ('"7"', Stored("7")),
    "a float": ("1.0", NOT_AN_INTEGER),
    "a float with a fraction": ("1.5", NOT_AN_INTEGER),
    "an exponent": ("1e3", NOT_AN_INTEGER),
    "true": ("true", NOT_AN_INTEGER),
    "hexadecimal": ('"0x1"', NOT_AN_INTEGER),
    "underscores": ('"1_000"', NOT_AN_INTEGER),
    "NaN as text": ('"NaN"', NOT_AN_INTEGER),
    "wide digits": (r'"\uff11"', NOT_AN_INTEGER),
    "a newline behind": (r'"1\n"', NOT_AN_INTEGER),
    "empty": ('""', NOT_AN_INTEGER),
    "blank": ('" "', NOT_AN_INTEGER),
    "a list": ("[]", NOT_AN_INTEGER),
    "20 digits": ("1" * 20, NOT_AN_INTEGER),
    "minus zero": ("-0", Stored("0")),
}
BIGS = {
    "2^63 - 1": (str(2**63 - 1), Stored(str(2**63 - 1))),
    "-2^63": (str(-(2**63)), Stored(str(-(2**63)))),
    "2^63": (str(2**63), OUT_OF_RANGE),
    "2^63 as text": (f'"{2**63}"', OUT_OF_RANGE),
    "-2^63 - 1": (str(-(2**63) - 1), OUT_OF_RANGE),
    "a float": ("1.0", NOT_AN_INTEGER),
}
FLAGS = {
    "true": ("true", Stored("true")),
    "false": ("false", Stored("false")),
    "true as text": ('"true"', Stored("true")),
    "True as text": ('"True"', NOT_A_BOOLEAN),
    "t": ('"t"', NOT_A_BOOLEAN),
    "1": ("1", NOT_A_BOOLEAN),
    "0": ("0", NOT_A_BOOLEAN),
    "yes": ('"yes"', NOT_A_BOOLEAN),
    "empty": ('""', NOT_A_BOOLEAN),
    "a list": ("[]", NOT_A_BOOLEAN),
    "null": ("null", Stored(None)),
}
TIMES = {
    "milliseconds": ("1767225600123", Stored("2026-01-01 00:00:00.123+00")),
    "milliseconds as text": ('"1767225600123"', Stored("2026-01-01 00:00:00.123+00")),
    "the day summer time begins": ("1774746000000", Stored("2026-03-29 01:00:00+00")),
    # Nothing tells it from a real time; it is stored as what it says.
    "seconds where milliseconds belong": ("1767225600", Stored("1970-01-21 10:53:45.6+00")),
    "zero": ("0", Stored("1970-01-01 00:00:00+00")),
    "before 1970": ("-1", NO_SUCH_TIME),
    "year 0": ("-62167219200000", NO_SUCH_TIME),
    "year 9999": ("253402300799999", NO_SUCH_TIME),
    "year 294277": ("9224318016000000", NO_SUCH_TIME),
    "microseconds where milliseconds belong": ("1767225600123456", NO_SUCH_TIME),
    "2^63 - 1": (str(2**63 - 1), NO_SUCH_TIME),
    "2^63": (str(2**63), NO_SUCH_TIME),
    "1e140000": ("1e140000", NOT_A_TIME),
    "infinity": ('"infinity"', NOT_A_TIME),
    "minus infinity": ('"-infinity"', NOT_A_TIME),
    "now": ('"now"', NOT_A_TIME),
    "30 February": ('"2026-02-30T00:00:00Z"', NOT_A_TIME),
    "a real date": ('"2026-02-28"', NOT_A_TIME),
    "a float": ("1767225600123.5", NOT_A_TIME),
    "true": ("true", NOT_A_TIME),
    "NaN": ('"NaN"', NOT_A_TIME),
    "empty": ('""', NOT_A_TIME),
    "a list": ("[1767225600123]", NOT_A_TIME),
    "null": ("null", Stored(None)),
}
DOCS = {
    "an empty list": ("[]", Stored("[]")),
    "nested": ('{"b": [1, "x", null, true], "a": {}}', Stored('{"a": {}, "b": [1, "x", null, true]}')),
    "decimals": ("[1.50, -0.0000000001]", Stored("[1.50, -0.0000000001]")),
    "2^63": (f"[{2**63}]", Stored(f"[{2**63}]")),
    "NUL in a string": (r'["a\u0000b"]', NOT_JSON),
    "NUL in a name": (r'{"\u0000": 1}', NOT_JSON),
    "a lone surrogate": (r'["\ud83d"]', NOT_JSON),
    "a surrogate pair": (r'["\ud83d\ude00"]', Stored('["\U0001f600"]')),
    "the text backslash u0000": (r'["\\u0000"]', Stored(r'["\\u0000"]')),
    "the text backslash x00 beside a pair": (r'["\ud83d\ude00 \\x00"]', Stored('["\U0001f600 \\\\x00"]')),
    "equal names": ('{"a": 1, "a": 2}', Stored('{"a": 2}')),
    "1e140000": ("[1e140000]", NOT_JSON),
    "NaN as text": ('["NaN"]', Stored('["NaN"]')),
    "1 MB and more": (json.dumps(["x" * 1_000_000]), Refused("too_long")),
    "400 levels": ("[" * 400 + "]" * 400, Stored("[" * 400 + "]" * 400)),
    "null": ("null", Stored(None)),
}
BY_COLUMN = {
    "name": TEXTS,
    "id": KEYS,
    "address": ADDRESSES,
    "amount": AMOUNTS,
    "small": SMALLS,
    "number": NUMBERS,
    "big": BIGS,
    "flag": FLAGS,
    "at": TIMES,
    "doc": DOCS,
}


@pytest.fixture
def serve(connection):
    """Take the text of a JSON list of objects the way of every source: decode, wire, load."""
    connection.execute(TABLE)

    def run(text):
        rows = [
            each | {"address": wire.address(each.get("address"))} for each in decode("test", text.encode())
        ]
        with connection.transaction():
            counts = load(connection, "hostile", wire.frame(rows, COLUMNS), rule=Merge.UPDATE, run_id=uuid4())
        assert counts.served == len(rows) == counts.inserted + counts.rejected, counts
        return counts

    return run


def entry(name, column, value):
    given = {"id": json.dumps(name), column: value}
    return "{" + ", ".join(f'"{key}": {text}' for key, text in given.items()) + "}"


def stored(connection, column):
    """By id: what the column holds, as text."""
    return dict(connection.execute(f"select id, {column}::text from hostile").fetchall())


def what_became_of(serve, connection, column, value):
    """Serve the value between two good rows; returns what the table or the quarantine says of it."""
    parts = entry("before", "name", '"b"'), entry("hostile", column, value), entry("behind", "name", '"b"')
    with connection.transaction(force_rollback=True):
        counts = serve("[" + ", ".join(parts) + "]")
        held = stored(connection, column)
        quarantine = connection.execute(
            "select column_name, reason, length(payload) from rejected_rows"
        ).fetchall()
    # The neighbours are stored, whatever happened between them.
    assert {"before", "behind"} <= set(held)
    assert (len(held), len(quarantine)) == (2 + counts.inserted - 2, counts.rejected)
    if not quarantine:
        ((_, text),) = ((name, text) for name, text in held.items() if name not in {"before", "behind"})
        return Stored(text)
    ((field, reason, length),) = quarantine
    assert length <= 20_000
    assert field in {column, None}
    return Refused(reason, field=field is not None)


@pytest.mark.parametrize("column", BY_COLUMN)
def test_every_hostile_value_is_stored_exactly_or_quarantined_alone(serve, connection, column):
    wrong = {}
    for label, (value, expected) in BY_COLUMN[column].items():
        try:
            found = what_became_of(serve, connection, column, value)
        except (psycopg.Error, BadPayloadError) as error:
            # None: no decoder takes it, so that the answer is refused before there are rows.
            found = None if isinstance(error, BadPayloadError) else error
        if found != expected:
            wrong[label] = f"{found!r}"[:200], f"{expected!r}"[:200]
    assert wrong == {}


def test_nesting_that_the_decoder_still_takes_fails_no_batch(serve, connection):
    """Answers are decoded in a thread, near the end of its stack, and written down further up in another one."""
    deep = decode("test", b"[" * 900 + b"]" * 900)
    rows = [{"id": "before"}, {"id": "deep", "doc": deep}, {"id": "behind"}]

    def further_up(frames):
        return wire.frame(rows, COLUMNS) if not frames else further_up(frames - 1)

    frame = further_up(100)
    with connection.transaction():
        counts = load(connection, "hostile", frame, rule=Merge.UPDATE, run_id=uuid4())
    assert (counts.inserted, counts.rejected) == (2, 1)
    assert set(stored(connection, "id")) == {"before", "behind"}


@pytest.mark.parametrize("literal", ["NaN", "Infinity", "-Infinity"])
def test_numbers_that_json_does_not_know_are_no_answer(serve, literal):
    with pytest.raises(BadPayloadError):
        serve("[" + entry("a", "amount", literal) + "]")


def test_all_hostile_values_at_once_cost_no_other_row(serve, connection):
    """One batch of all of them between good rows; an id of its own makes each a row of its own."""
    cases = [
        (column, value, outcome)
        for column, cases in BY_COLUMN.items()
        for value, outcome in cases.values()
        if outcome is not None and column != "id"
    ]
    hostile = [entry(f"{n}", column, value) for n, (column, value, _) in enumerate(cases)]
    good = [entry(f"good {n}", "amount", f'"{n}.5"') for n in range(len(cases))]
    serve("[" + ", ".join(part for pair in zip(good, hostile, strict=True) for part in pair) + "]")
    held = stored(connection, "amount")
    assert [held.pop(f"good {n}", None) for n in range(len(cases))] == [f"{n}.5" for n in range(len(cases))]
    refused = {f"{n}" for n, (*_, outcome) in enumerate(cases) if isinstance(outcome, Refused)}
    assert set(held) == {f"{n}" for n in range(len(cases))} - refused
    keys = {json.loads(key)[0] for (key,) in connection.execute("select row_key from rejected_rows")}
    assert keys == refused


def test_addresses_of_any_case_are_one_key(connection):
    connection.execute("create table hostile (address text primary key, amount numeric)")
    served = [{"address": each, "amount": 1} for each in (STAMP, STAMP.lower(), "0X" + STAMP[2:].upper())]
    rows = [each | {"address": wire.address(each["address"])} for each in served]
    with connection.transaction():
        counts = load(
            connection, "hostile", wire.frame(rows, ("address", "amount")), rule=Merge.UPDATE, run_id=uuid4()
        )
    assert (counts.inserted, counts.duplicate) == (1, 2)
    assert connection.execute("select address from hostile").fetchall() == [(STAMP.lower(),)]
