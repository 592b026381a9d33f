"""The rules that a value must pass, by type, without a database: what is staged and why a row is refused."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta

import polars as pl
import pytest

from hlcli.loader import checks
from hlcli.loader.catalog import Column, Table

INTEGERS = {"smallint": 2**15, "integer": 2**31, "bigint": 2**63}
TIME = "timestamp with time zone"


def column(name, kind, *, not_null=False, default=None):
    return Column(name, kind, not_null, default is not None, default)


def table(kind, *, not_null=False, key=False):
    columns = {"id": column("id", "bigint", not_null=True), "v": column("v", kind, not_null=not_null or key)}
    return Table("t", columns, ("id", "v") if key else ("id",), {})


def judge(kind, values, dtype=pl.String, **options):
    """For each value what is staged, or ("refused", reason)."""
    frame = pl.DataFrame({"id": list(range(len(values))), "v": pl.Series(values, dtype=dtype)})
    good, bad = checks.split(frame, table(kind, **options))
    assert good.height + bad.height == len(values)
    assert set(bad["_column"]) <= {"v"}
    found = dict(good.select("id", "v").rows())
    found |= {each["id"]: ("refused", each["_reason"]) for each in bad.to_dicts()}
    # What is refused is kept as it was served.
    assert frame["v"].gather(bad["id"]).equals(bad["v"])
    return [found[n] for n in range(len(values))]


def refused(reason, count=1):
    return [("refused", reason)] * count


@pytest.mark.parametrize(
    "text", ["0", "-0", "1", "-1.5", "007.10", "1e5", "1E+05", "1e-40", "1e40", "9" * 40 + "." + "9" * 40]
)
def test_numeric_passes_text_on_untouched(text):
    assert judge("numeric", [text]) == [text]


@pytest.mark.parametrize(
    "text",
    [
        "", " ", "NaN", "nan", "Infinity", "-inf", "1e41", "1e-41", "1e0041x", "1e400", "1e140000", "9" * 41, "0." + "1" * 41,
        "+1", ".5", "5.", "1 ", " 1", "1\n", "\n1", "1\x00", "0x1", "0b1", "1_000", "1,5", "--1", "1e", "1e+", "true", "\uff11", "\u0661", "\u22121",
    ],
)  # fmt: skip
def test_numeric_refuses_what_is_no_plain_finite_number(text):
    assert judge("numeric", [text, "1"]) == [*refused("not_a_number"), "1"]


def test_the_pattern_of_numbers_agrees_with_a_parser_of_its_own(rng):
    pattern = re.compile(r"(-?)(\d{1,40})(?:\.(\d{1,40}))?(?:[eE]([+-]?)(\d+))?", re.ASCII)
    texts = [
        "".join(
            rng.choices("0123456789.-+eE_ ", weights=[5] * 10 + [2, 1, 1, 2, 1, 1, 1], k=rng.randrange(1, 8))
        )
        for _ in range(5000)
    ]
    texts += [
        f"1e{sign}{'0' * zeros}{power}"
        for sign in ("", "-", "+")
        for zeros in range(5)
        for power in range(60)
    ]
    expected = []
    for text in texts:
        found = pattern.fullmatch(text)
        # An exponent may have three zeros before it, and at most the value 40.
        fits = found and (
            found[5] is None or (int(found[5]) <= 40 and len(found[5]) - len(str(int(found[5]))) <= 3)
        )
        expected.append(text if fits else ("refused", "not_a_number"))
    found = judge("numeric", texts)
    odd = [
        (text, is_, should) for text, is_, should in zip(texts, found, expected, strict=True) if is_ != should
    ]
    # "0000" is three zeros and a nought.
    assert odd == []


def test_numeric_takes_integers_and_decimals_but_no_float():
    assert judge("numeric", [1, None, -(2**63)], pl.Int64) == ["1", None, str(-(2**63))]
    assert judge("numeric", ["1.50", None], pl.String) == ["1.50", None]
    with pytest.raises(ValueError, match="v: Float64"):
        judge("numeric", [1.5], pl.Float64)


@pytest.mark.parametrize(("kind", "bound"), INTEGERS.items())
@pytest.mark.parametrize("as_text", [True, False])
def test_integers_are_kept_within_their_type(kind, bound, as_text):
    values = [-bound - 1, -bound, -1, 0, bound - 1, bound, None]
    expected = [*refused("out_of_range"), -bound, -1, 0, bound - 1, *refused("out_of_range"), None]
    if as_text:
        assert judge(kind, [None if each is None else str(each) for each in values]) == expected
    elif kind == "bigint":
        assert judge(kind, [bound - 1, bound, None], pl.UInt64) == [expected[4], expected[5], None]
    else:
        assert judge(kind, values, pl.Int64) == expected


@pytest.mark.parametrize(
    "text", ["", " ", "1.0", "1e3", "+1", "0x1", "1_0", "true", "NaN", "1\n", "\uff11", "1" * 20, "-"]
)
def test_integers_refuse_any_other_text(text):
    assert judge("integer", [text]) == refused("not_an_integer")


def test_integers_refuse_a_frame_of_other_types():
    for values, dtype in (([1.0], pl.Float64), ([True], pl.Boolean)):
        with pytest.raises(ValueError, match="cannot be stored as integer"):
            judge("integer", values, dtype)


def test_booleans_are_the_words_of_json():
    assert judge("boolean", ["true", "false", None]) == [True, False, None]
    assert judge("boolean", [True, False, None], pl.Boolean) == [True, False, None]
    odd = ["True", "FALSE", "t", "f", "yes", "no", "on", "1", "0", "", " true", "true\n"]
    assert judge("boolean", odd) == refused("not_a_boolean", len(odd))
    with pytest.raises(ValueError):
        judge("boolean", [1], pl.Int64)


def at(milliseconds):
    return datetime(1970, 1, 1, tzinfo=UTC) + timedelta(milliseconds=milliseconds)


@pytest.mark.parametrize("dtype", [pl.String, pl.Int64])
def test_times_are_milliseconds_between_1970_and_2149(dtype):
    values = [
        checks.MIN_MS - 1,
        checks.MIN_MS,
        1_767_225_600_123,
        checks.MAX_MS,
        checks.MAX_MS + 1,
        2**63 - 1,
        -(2**63),
        None,
    ]
    served = [None if each is None or dtype == pl.Int64 else str(each) for each in values]
    expected = [
        at(each) if each is not None and 0 <= each <= checks.MAX_MS else ("refused", "time_out_of_range")
        for each in values[:-1]
    ]
    assert judge(TIME, values if dtype == pl.Int64 else served, dtype) == [*expected, None]


@pytest.mark.parametrize(
    "text", ["", "infinity", "-infinity", "now", "2026-01-01", "1.5", "1e12", "true", "12:00", "1\n"]
)
def test_times_refuse_any_other_text(text):
    assert judge(TIME, [text]) == refused("not_a_time")


@pytest.mark.parametrize("unit", ["ms", "us", "ns"])
def test_datetimes_are_instants_in_range(unit):
    when = datetime(2026, 3, 29, 1, 30, tzinfo=UTC)
    old = datetime(1969, 12, 31, 23, 59, 59, 999000, tzinfo=UTC)
    for dtype, values in (
        (pl.Datetime(unit, "UTC"), [when, old, None]),
        (pl.Datetime(unit), [when.replace(tzinfo=None), old.replace(tzinfo=None), None]),
    ):
        assert judge(TIME, values, dtype) == [when, *refused("time_out_of_range"), None]


def test_times_refuse_floats_and_dates():
    for values, dtype in (([1.5], pl.Float64), ([at(0).date()], pl.Date), ([True], pl.Boolean)):
        with pytest.raises(ValueError, match="cannot be stored as timestamp"):
            judge(TIME, values, dtype)


def test_text_takes_everything_but_nul_and_too_much():
    fine = ["", " ", "\\.", "\\N", "a\tb\n", "\u202e", "\ufffe", "\U0001f600", "x" * checks.MAX_TEXT_BYTES]
    assert judge("text", fine) == fine
    assert judge(
        "text",
        ["\x00", "a\x00", "x" * (checks.MAX_TEXT_BYTES + 1), "\u00e9" * (checks.MAX_TEXT_BYTES // 2 + 1)],
    ) == [
        *refused("invalid_text", 2),
        *refused("too_long", 2),
    ]
    assert judge("text", [1, None], pl.Int64) == ["1", None]
    with pytest.raises(ValueError):
        judge("text", [1.5], pl.Float64)


def test_text_of_a_key_has_a_limit_in_bytes():
    limit = checks.MAX_KEY_BYTES
    values = ["x" * limit, "x" * (limit + 1), "\u00e9" * (limit // 2), "\u00e9" * (limit // 2 + 1), ""]
    expected = [values[0], *refused("key_too_long"), values[2], *refused("key_too_long"), ""]
    assert judge("text", values, key=True) == expected
    assert judge("text", values) == values


def test_doubles_are_finite():
    values = [1.5, -0.0, 5e-324, float("nan"), float("inf"), float("-inf"), None]
    assert judge("double precision", values, pl.Float64) == [
        1.5,
        -0.0,
        5e-324,
        *refused("not_a_number", 3),
        None,
    ]
    assert judge("double precision", [1, None], pl.Int64) == [1.0, None]
    with pytest.raises(ValueError):
        judge("double precision", ["1"])


VALID_JSON = [
    "null", "[]", "{}", "1", '"a"', " [1 , 2] ", '"\\u00e9"', '"\\ud83d\\ude00"', '"\\\\u0000"', '"\\\\ud83d"', '"\\uD83D\\uDE00"',
    '["\\ud83d\\ude00", "\\\\x00"]', '{"\\ud83d\\ude00": "\\\\\\\\x00"}', "1e5", "-0.0", '{"a": 1, "a": 2}', "[" * 300 + "]" * 300, '"NaN"',
]  # fmt: skip
INVALID_JSON = [
    "", " ", "nul", "NaN", "[NaN]", "Infinity", "-Infinity", '{"a": -Infinity}', "[1,]", "{'a': 1}", "{a: 1}", "01", "1.", ".5", "+1", "0x1",
    '"\\u0000"', '{"\\u0000": 1}', '{"a": ["\\u0000"]}', '"\\\\\\u0000"', '"\\ud83d"', '"\\uDE00"', '"\\ude00\\ud83d"', '{"\\ud83d": 1}',
    '"\\ud83d\\u0041"', '"\x00"', '"\n"', '"\\x00"', '"', "[", "\ufeff[]", "[" * 100_000, "[" * 100_000 + "]" * 100_000, "[] []",
    "1" * 5000, "1e140000", "[-1.5E+200000]", "\u00a01",
]  # fmt: skip


@pytest.mark.parametrize("text", VALID_JSON)
def test_json_that_the_server_takes_is_passed_on_untouched(text):
    assert judge("jsonb", [text]) == [text]


@pytest.mark.parametrize("text", INVALID_JSON, ids=lambda text: repr(text[:20]))
def test_json_that_the_server_refuses_is_refused_here(text):
    assert judge("jsonb", [text, "[]"]) == [*refused("not_json"), "[]"]


def test_json_that_is_too_long_is_refused():
    longest = '"' + "x" * (checks.MAX_TEXT_BYTES - 2) + '"'
    assert judge("jsonb", [longest, longest.replace('"', ' "', 1)]) == [longest, *refused("too_long")]


EVERY_KIND = ["text", "numeric", "boolean", "double precision", "jsonb", TIME, *INTEGERS]


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_null_is_stored_where_the_column_takes_it_and_refused_where_not(kind):
    assert judge(kind, [None, None], pl.Null) == [None, None]
    assert judge(kind, [None, None], pl.Null, not_null=True) == refused("null", 2)
    if kind != "double precision":
        assert judge(kind, [None], pl.String) == [None]
        assert judge(kind, [None], pl.String, not_null=True) == refused("null")


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_no_rows_are_no_rows(kind):
    good, bad = checks.split(
        pl.DataFrame({"id": [], "v": []}, schema={"id": pl.Int64, "v": pl.Null}), table(kind)
    )
    assert (good.height, bad.height) == (0, 0)


def test_a_row_is_refused_once_for_its_first_bad_column():
    columns = {"a": column("a", "text"), "b": column("b", "numeric"), "c": column("c", "numeric")}
    frame = pl.DataFrame({"a": ["k", "l", "m", "n"], "b": ["x", "1", "x", "1"], "c": ["y", "y", "1", "1"]})
    good, bad = checks.split(frame, Table("t", columns, ("a",), {}))
    assert good.rows() == [("n", "1", "1")]
    assert bad.select("a", "_column", "_reason").rows() == [
        ("k", "b", "not_a_number"),
        ("l", "c", "not_a_number"),
        ("m", "b", "not_a_number"),
    ]


def test_good_rows_keep_their_order(rng):
    values = [rng.choice(["1", "x", "2.5", None]) for _ in range(500)]
    frame = pl.DataFrame({"id": range(500), "v": values})
    good, _ = checks.split(frame, table("numeric"))
    assert good.rows() == [(n, value) for n, value in enumerate(values) if value != "x"]


@pytest.mark.parametrize(
    "columns",
    [{"id": [1], "price": ["1"]}, {"v": ["1"]}, {"id": [1]}],
    ids=["unknown column", "no key", "no v"],
)
def test_a_frame_that_does_not_fit_is_the_callers_error(columns):
    with pytest.raises(ValueError, match="t: the frame has unknown columns"):
        checks.split(pl.DataFrame(columns), table("numeric", not_null=True))


def test_a_missing_column_is_fine_where_the_table_fills_it():
    nullable, filled = column("v", "numeric"), column("v", "numeric", not_null=True, default="0")
    for each in (nullable, filled):
        held = Table("t", {"id": column("id", "bigint", not_null=True), "v": each}, ("id",), {})
        good, bad = checks.split(pl.DataFrame({"id": [1]}), held)
        assert (good.rows(), bad.height) == ([(1,)], 0)


@pytest.mark.parametrize("kind", ["numeric", "jsonb"])
def test_a_type_whose_equal_values_have_several_spellings_is_no_key(kind):
    with pytest.raises(ValueError, match="a column of a key cannot be"):
        judge(kind, ["1.0", "1.00"], key=True)


def test_a_type_that_the_loader_does_not_know_is_the_callers_error():
    with pytest.raises(ValueError, match="does not know the type inet"):
        judge("inet", ["::1"])
