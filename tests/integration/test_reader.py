"""read(): what a query finds arrives in the frame as it is, whatever its type and characters."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta

import polars as pl
import psycopg
import pytest

from hlcli.reader import read

TIME = pl.Datetime("us", "UTC")
MICROSECONDS = "(extract(epoch from {})::numeric * 1000000)::bigint"


@pytest.fixture
def connection(server):
    """A session on the server; none of these tests needs a table."""
    with psycopg.connect(server, autocommit=True) as opened:
        yield opened


def one_column(connection, expressions, kind):
    """Each expression as a row of one column; a first column numbers them."""
    rows = " union all ".join(f"select {place}, {each}" for place, each in enumerate(expressions))
    frame = read(connection, f"{rows} order by 1", {}, {"place": pl.Int64, "value": kind})
    assert frame.schema == {"place": pl.Int64, "value": kind}
    assert frame["place"].to_list() == list(range(len(expressions)))
    return frame["value"].to_list()


def test_every_type_with_its_extremes_and_null(connection):
    assert one_column(connection, ["4611686018427387904", "-9223372036854775808", "null", "0"], pl.Int64) == [
        2**62,
        -(2**63),
        None,
        0,
    ]
    assert one_column(connection, ["true", "null", "false"], pl.Boolean) == [True, None, False]
    assert one_column(connection, ["'a'", "null::text"], pl.String) == ["a", None]


def test_doubles_arrive_to_the_last_bit(connection, rng):
    values = [0.1, 1 / 3, 5e-324, 1.7976931348623157e308, -0.0, 2.0**53 + 2, 1e22, 123456.789]
    values += [rng.uniform(-1, 1) * 10.0 ** rng.randint(-300, 300) for _ in range(500)]
    values += [None, float("inf"), -float("inf")]
    rows = read(
        connection,
        "select n, value from unnest(%(values)s::float8[]) with ordinality as t (value, n) order by n",
        {"values": values},
        {"n": pl.Int64, "value": pl.Float64},
    )
    assert list(map(repr, rows["value"])) == list(map(repr, values))


def test_numerics_arrive_with_every_digit_as_text(connection):
    digits = ["1234567890123456789012345678901234567890", "-0.0000000000000000000000000000000000000001"]
    digits += ["12345678901234567890.12345678901234567890", "1.500", "100", "0", "-7"]
    assert one_column(connection, [f"{each}::numeric" for each in [*digits, "null"]], pl.String) == [
        *digits,
        None,
    ]


def test_numerics_read_as_doubles_are_the_nearest_ones(connection, rng):
    texts = [f"{rng.randrange(10**12)}.{rng.randrange(10**8):08d}" for _ in range(300)]
    found = one_column(connection, [f"{each}::numeric" for each in texts], pl.Float64)
    assert found == [float(each) for each in texts]


@pytest.mark.parametrize("zone", ["UTC", "Asia/Kathmandu", "America/New_York"])
def test_times_arrive_to_the_microsecond_whatever_the_session_s_zone(connection, zone):
    connection.execute(f"set timezone to '{zone}'")
    times = [
        datetime(2026, 3, 29, 1, 30, 0, 1, UTC),
        datetime(2026, 10, 25, 1, 30, 59, 999999, UTC),
        datetime(1970, 1, 1, tzinfo=UTC),
        datetime(1969, 12, 31, 23, 59, 59, 999999, UTC),
        datetime(9999, 12, 31, 23, 59, 59, 999999, UTC),
    ]
    told = [MICROSECONDS.format(f"timestamptz '{each.isoformat()}'") for each in times]
    assert one_column(connection, [*told, "null"], TIME) == [*times, None]


def test_dates_and_coarser_times_arrive_too(connection):
    day = MICROSECONDS.format("timestamptz '2026-03-29 00:00Z'")
    assert one_column(connection, [day, "null"], pl.Date) == [date(2026, 3, 29), None]
    milliseconds = pl.Datetime("ms", "UTC")
    assert one_column(connection, [day], milliseconds) == [datetime(2026, 3, 29, tzinfo=UTC)]


ODD = (
    "a,b",
    'say "so"',
    '"',
    '""',
    "it's",
    "two\nlines",
    "carriage\rreturn",
    "\r\n",
    "\n",
    "tab\there",
    "\\.",
    "\\N",
    "\\n",
    "null",
    "NULL",
    "NaN",
    "t",
    " blanks around ",
    " ",
    "#no comment",
    "量化猫",
    "👍🏽",
    "\u202eright to left",
    "\ufeffmark",
    "\u2028",
    "\x1b[31m",
    "\x7f",
    "100 %",
    "%s %(name)s %%",
    "{} {0}",
    "$1",
    "; drop table signals; --",
    "00012",
    "1e5",
)


def test_any_text_arrives_as_it_is(connection):
    frame = read(
        connection,
        "select n, value, value from unnest(%(values)s::text[]) with ordinality as t (value, n) order by n",
        {"values": list(ODD)},
        {"n": pl.Int64, "value": pl.String, "again": pl.String},
    )
    assert frame["value"].to_list() == frame["again"].to_list() == list(ODD)


def test_texts_of_random_characters_arrive_as_they_are(connection, rng):
    """Enough rows, with line ends in them, that they are read in several pieces."""
    letters = [*"ab,\"\n\r\t \\'%{}é量👍", "\x01", "0"]
    values = ["".join(rng.choices(letters, k=rng.randint(1, 40))) for _ in range(30_000)]
    frame = read(
        connection,
        "select n, value from unnest(%(values)s::text[]) with ordinality as t (value, n) order by n",
        {"values": values},
        {"n": pl.Int64, "value": pl.String},
    )
    assert frame["n"].to_list() == list(range(1, len(values) + 1))
    assert frame["value"].to_list() == values


def test_values_are_quoted_into_the_query_whatever_they_hold(connection):
    for value in ODD:
        frame = read(
            connection,
            "select length(%(value)s), %(value)s = 'it''s', 7 %% 4, '{}' || %(value)s",
            {"value": value},
            {"length": pl.Int64, "same": pl.Boolean, "three": pl.Int64, "text": pl.String},
        )
        assert frame.row(0) == (len(value), value == "it's", 3, "{}" + value)


def test_times_lists_and_none_can_be_values(connection):
    moment = datetime(2026, 3, 10, 12, 5, 0, 1, UTC)
    frame = read(
        connection,
        f"select {MICROSECONDS.format('%(at)s::timestamptz')}, 'b' = any (%(names)s::text[]), %(nothing)s::text is null,"
        " extract(epoch from %(span)s)::bigint",
        {"at": moment, "names": ["a", "b"], "nothing": None, "span": timedelta(minutes=5)},
        {"at": TIME, "within": pl.Boolean, "nothing": pl.Boolean, "span": pl.Int64},
    )
    assert frame.row(0) == (moment, True, True, 300)


@pytest.mark.parametrize("kind", [pl.Int64, pl.Float64, pl.String, pl.Boolean, TIME], ids=str)
def test_a_null_alone_in_its_row_is_a_row(connection, kind):
    frame = read(connection, "select null from generate_series(1, 3)", {}, {"value": kind})
    assert frame.schema == {"value": kind}
    assert frame["value"].to_list() == [None] * 3


def test_no_rows_are_a_frame_of_the_schema(connection):
    schema = {"a": pl.String, "b": pl.Float64, "c": pl.Int64, "d": pl.Boolean, "e": TIME}
    frame = read(connection, "select '', 0, 0, true, 0 where %(none)s", {"none": False}, schema)
    assert frame.schema == schema
    assert frame.height == 0


def test_a_long_result_is_whole_and_in_order(connection):
    frame = read(
        connection,
        "select n, case when n %% 3 = 0 then null else n / 7.0 end from generate_series(1, %(n)s) n",
        {"n": 150_000},
        {"n": pl.Int64, "part": pl.Float64},
    )
    assert frame["n"].to_list() == list(range(1, 150_001))
    assert frame["part"].null_count() == 50_000


def test_what_is_not_of_its_type_is_an_error_and_no_null(connection):
    # Far below the rows from which a reader would guess.
    query = "select case when n = 150000 then 'none' else n::text end from generate_series(1, 200000) n"
    with pytest.raises(pl.exceptions.PolarsError):
        read(connection, query, {}, {"n": pl.Int64})


def test_an_error_of_the_database_is_told_and_the_connection_goes_on(connection):
    with pytest.raises(psycopg.errors.DivisionByZero):
        read(connection, "select 1 / (n - 5) from generate_series(1, 9) n", {}, {"n": pl.Int64})
    assert read(connection, "select 1", {}, {"n": pl.Int64}).item() == 1


def test_a_query_may_end_in_a_comment(connection):
    """As one in a file does when the next one begins with one."""
    assert read(connection, "select 1\n\n-- The next query.", {}, {"n": pl.Int64}).item() == 1


def test_a_read_sees_what_its_transaction_wrote(connection):
    with connection.transaction():
        connection.execute("create temp table written as select 7 as n")
        assert read(connection, "select n from written", {}, {"n": pl.Int64}).item() == 7
        connection.execute("drop table written")
