"""The loader against a real table: the three merge rules, exact counts, exact digits, nothing left behind."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from uuid import uuid4

import polars as pl
import psycopg
import pytest

from hlcli import loader
from hlcli.loader import Counts, Merge, load
from hlcli.sources import wire

NAME = "loaded"
COLUMNS = """
    coin text collate "C" not null,
    at timestamptz not null,
    px numeric,
    open boolean,
    doc jsonb,
    version bigint not null,
    touched integer,
    kind text not null default 'plain',
    primary key (coin, at),
    constraint loaded_coin check (coin ~ '^[a-z]+$')
"""
PLAIN = f"create table loaded ({COLUMNS})"
PARTITIONED = f"""
create table loaded ({COLUMNS}) partition by range (at);
create table loaded_early partition of loaded for values from (minvalue) to ('2026-01-05');
create table loaded_late partition of loaded for values from ('2026-01-05') to (maxvalue);
"""
START = datetime(2026, 1, 1, tzinfo=UTC)
EVERYTHING = ("coin", "at", "px", "open", "doc", "version", "touched")
BOTH_KINDS = pytest.mark.parametrize("declaration", [PLAIN, PARTITIONED], ids=["plain", "partitioned"])
ALL_RULES = pytest.mark.parametrize("rule", list(Merge), ids=[rule.value for rule in Merge])


def ms(when):
    return int(when.timestamp() * 1000)


def row(coin="btc", day=0, px="1.5", version=1, touched=1, **more):
    """A row as a source serves it: every value as text."""
    return {
        "coin": coin,
        "at": ms(START) + day * 86_400_000,
        "px": px,
        "version": version,
        "touched": touched,
        **more,
    }


@contextmanager
def opened(database):
    with psycopg.connect(
        database, autocommit=True, options="-c TimeZone=UTC -c deadlock_timeout=50ms"
    ) as connection:
        yield connection


def put(
    connection, rows, rule=Merge.UPDATE, *, columns=("coin", "at", "px", "version", "touched"), **options
):
    """Load rows of text in one transaction and check that the counts add up."""
    frame = rows if isinstance(rows, pl.DataFrame) else wire.frame(rows, columns)
    if rule is Merge.NEWER:
        options.setdefault("newer", "version")
    with connection.transaction():
        counts = load(connection, options.pop("table", NAME), frame, rule=rule, run_id=uuid4(), **options)
    return exact(counts, frame.height)


def exact(counts, served):
    parts = (counts.inserted, counts.updated, counts.unchanged, counts.duplicate, counts.rejected)
    assert min(parts) >= 0, counts
    assert counts.served == served == sum(parts), counts
    assert 0 <= counts.new_rejects <= counts.rejected, counts
    return counts


def stored(connection, columns="coin, at, px::text, version, touched"):
    return connection.execute(f"select {columns} from loaded order by coin, at").fetchall()


def stored_px(connection):
    return [px for (px,) in connection.execute("select px::text from loaded")]


def stored_of(connection, columns):
    return connection.execute(f"select {columns} from loaded order by 1").fetchall()


def quarantined(connection):
    return sorted(
        connection.execute("select row_key, column_name, reason, times from rejected_rows").fetchall(),
        key=str,
    )


def temporary_tables(connection):
    return connection.execute(
        "select relname from pg_class where relpersistence = 't' and relkind = 'r'"
    ).fetchall()


def wait_until_blocked(connection, pid):
    """Until the other session waits for a lock."""
    for _ in range(2000):
        if connection.execute(
            "select exists (select from pg_locks where pid = %s and not granted)", (pid,)
        ).fetchone() == (True,):
            return
        connection.execute("select pg_sleep(0.005)")
    raise AssertionError("the other session never waited")


# --- the three rules, by hand -------------------------------------------------------------------------------------


@BOTH_KINDS
def test_ignore_keeps_the_stored_row_and_of_a_batch_the_first(connection, declaration):
    connection.execute(declaration)
    first = put(connection, [row(px="1"), row(px="2"), row("eth", 9, px="3")], Merge.IGNORE)
    assert (first.inserted, first.duplicate) == (2, 1)
    again = put(connection, [row(px="7", version=9), row("sol", px="4")], Merge.IGNORE)
    assert (again.inserted, again.updated, again.unchanged) == (1, 0, 1)
    assert stored(connection, "coin, px::text") == [("btc", "1"), ("eth", "3"), ("sol", "4")]


@BOTH_KINDS
def test_update_takes_what_differs_and_of_a_batch_the_last(connection, declaration):
    connection.execute(declaration)
    first = put(connection, [row(px="1"), row(px="2"), row("eth", 9, px="3")])
    assert (first.inserted, first.duplicate) == (2, 1)
    again = put(connection, [row(px="2"), row("eth", 9, px=None), row("sol", px="4")])
    assert (again.inserted, again.updated, again.unchanged) == (1, 1, 1)
    assert stored(connection, "coin, px::text") == [("btc", "2"), ("eth", None), ("sol", "4")]


@BOTH_KINDS
def test_newer_takes_only_a_greater_version_and_of_a_batch_the_greatest(connection, declaration):
    connection.execute(declaration)
    first = put(
        connection, [row(px="5", version=10), row(px="6", version=9), row("eth", 9, version=3)], Merge.NEWER
    )
    assert (first.inserted, first.duplicate) == (2, 1)
    again = put(connection, [row(px="8", version=10), row("eth", 9, px="9", version=4)], Merge.NEWER)
    assert (again.updated, again.unchanged) == (1, 1)
    older = put(connection, [row(px="8", version=9)], Merge.NEWER)
    assert (older.updated, older.unchanged) == (0, 1)
    assert stored(connection, "coin, px::text, version") == [("btc", "5", 10), ("eth", "9", 4)]


def test_newer_compares_times_as_times(connection):
    connection.execute("create table loaded (coin text primary key, seen timestamptz not null, px numeric)")
    columns = ("coin", "seen", "px")
    put(connection, [{"coin": "a", "seen": 9_000, "px": "1"}], Merge.NEWER, columns=columns, newer="seen")
    rows = [{"coin": "a", "seen": 10_000, "px": "3"}, {"coin": "a", "seen": 9_500, "px": "2"}]
    counts = put(connection, rows, Merge.NEWER, columns=columns, newer="seen")
    assert (counts.updated, counts.duplicate) == (1, 1)
    assert stored_px(connection) == ["3"]


def test_newer_compares_numbers_by_value_or_refuses_the_column(connection):
    connection.execute("create table loaded (coin text primary key, seq numeric not null, px numeric)")
    rows = [{"coin": "a", "seq": "10", "px": "2"}, {"coin": "a", "seq": "9", "px": "1"}]
    try:
        put(connection, rows, Merge.NEWER, columns=("coin", "seq", "px"), newer="seq")
    except ValueError:
        return
    assert stored_px(connection) == ["2"]


def test_keys_that_are_equal_numbers_are_one_key_or_the_table_is_refused(connection):
    connection.execute("create table loaded (level numeric primary key, px numeric)")
    rows = [{"level": "1.0", "px": "1"}, {"level": "1.00", "px": "2"}]
    try:
        counts = put(connection, rows, columns=("level", "px"))
    except ValueError:
        return
    assert (counts.inserted, counts.duplicate) == (1, 1)
    assert stored_px(connection) == ["2"]


def test_a_null_is_a_value_that_can_change_both_ways(connection):
    connection.execute(PLAIN)
    put(connection, [row(px=None, open=None)], columns=EVERYTHING)
    assert put(connection, [row(px=None, open=None)], columns=EVERYTHING).unchanged == 1
    assert put(connection, [row(px="0", open="false")], columns=EVERYTHING).updated == 1
    assert put(connection, [row(px=None, open=None)], columns=EVERYTHING).updated == 1
    assert stored(connection, "px, open") == [(None, None)]


def test_columns_that_the_frame_leaves_out_keep_their_default_and_later_their_value(connection):
    connection.execute(PLAIN)
    put(connection, [row()])
    assert stored(connection, "kind, doc") == [("plain", None)]
    connection.execute("""update loaded set kind = 'rare', doc = '{"a": 1}'""")
    assert put(connection, [row(px="9")]).updated == 1
    assert stored(connection, "kind, doc, px::text") == [("rare", {"a": 1}, "9")]


@ALL_RULES
def test_touch_columns_are_written_with_a_change_but_make_none(connection, rule):
    connection.execute(PLAIN)
    put(connection, [row(touched=1), row("eth", touched=1)], rule, touch=("touched",))
    changed = row("eth", px="2", version=2, touched=2)
    counts = put(connection, [row(touched=2), changed], rule, touch=("touched",))
    moved = 0 if rule is Merge.IGNORE else 1
    assert (counts.updated, counts.unchanged) == (moved, 2 - moved)
    assert stored(connection, "coin, touched") == [("btc", 1), ("eth", 1 + moved)]


def test_a_frame_of_key_and_touch_columns_changes_nothing_that_is_stored(connection):
    connection.execute("create table loaded (coin text primary key, touched integer)")
    columns = ("coin", "touched")
    put(connection, [{"coin": "a", "touched": 1}], columns=columns, touch=("touched",))
    rows = [{"coin": "a", "touched": 2}, {"coin": "b", "touched": 2}]
    counts = put(connection, rows, columns=columns, touch=("touched",))
    assert (counts.inserted, counts.unchanged) == (1, 1)
    assert stored_of(connection, "coin, touched") == [("a", 1), ("b", 2)]


@ALL_RULES
def test_a_batch_of_one_key_many_times_over_is_one_row(connection, rule):
    connection.execute(PLAIN)
    # Work that grows with the square of the repetition would take minutes.
    connection.execute("set statement_timeout = '30s'")
    rows = [row(px=f"{number}", version=number) for number in range(20_000)]
    counts = put(connection, rows, rule)
    assert (counts.inserted, counts.duplicate) == (1, 19_999)
    assert stored(connection, "version") == [(0 if rule is Merge.IGNORE else 19_999,)]


def test_loading_the_same_batch_twice_writes_no_row_version(connection):
    connection.execute(PLAIN)
    rows = [row(coin, day, px=f"{day}.50", doc=[day, None]) for coin in ("a", "b") for day in range(20)]
    put(connection, rows, columns=EVERYTHING)
    before = stored(connection, "coin, at, ctid, xmin")
    assert put(connection, rows, columns=EVERYTHING).unchanged == 40
    assert stored(connection, "coin, at, ctid, xmin") == before


# --- random batches against a model -------------------------------------------------------------------------------


class Model:
    """What the table must hold, in plain Python."""

    def __init__(self, rule):
        self.rule, self.rows, self.rejects = rule, {}, {}

    def load(self, batch):
        """Take (row, reason) pairs in the order served; returns the counts."""
        counts = dict.fromkeys(
            ("inserted", "updated", "unchanged", "duplicate", "rejected", "new_rejects"), 0
        )
        chosen = {}
        for served, reason in batch:
            key = (served["coin"], served["at"])
            if reason is not None:
                counts["rejected"] += 1
                counts["new_rejects"] += (key, reason) not in self.rejects
                self.rejects[key, reason] = self.rejects.get((key, reason), 0) + 1
            elif key not in chosen:
                chosen[key] = served
            else:
                counts["duplicate"] += 1
                if self.rule in {Merge.UPDATE, Merge.COMPLETE} or (
                    self.rule is Merge.NEWER and served["version"] >= chosen[key]["version"]
                ):
                    chosen[key] = served
        for key, served in chosen.items():
            held = self.rows.get(key)
            if held is not None and self.rule is Merge.COMPLETE:
                served = {name: held[name] if value is None else value for name, value in served.items()}  # noqa: PLW2901
            if held is None:
                counts["inserted"] += 1
            elif self._wins(served, held):
                counts["updated"] += 1
            else:
                counts["unchanged"] += 1
                continue
            self.rows[key] = served
        return Counts(served=len(batch), **counts)

    def _wins(self, served, held):
        if self.rule is Merge.NEWER:
            return served["version"] > held["version"]
        return self.rule in {Merge.UPDATE, Merge.COMPLETE} and any(
            served[name] != held[name] for name in EVERYTHING if name != "touched"
        )


def random_batch(rng, number):
    batch = []
    for position in range(rng.randrange(40)):
        served = row(
            rng.choice(["a", "b", "c", "dd"]),
            rng.randrange(8),
            px=rng.choice([None, f"{rng.randrange(3)}.{rng.randrange(3)}"]),
            version=rng.randrange(6),
            touched=number,
            open=rng.choice([None, True, False]),
            doc=rng.choice([None, [], {"n": "1"}]),
        )
        reason = None
        if rng.random() < 0.15:
            broken, reason = rng.choice(
                [
                    ({"px": "NaN"}, "not_a_number"),
                    ({"version": None}, "null"),
                    ({"version": 2**63}, "out_of_range"),
                    ({"open": "yes"}, "not_a_boolean"),
                    ({"coin": f"B{number}{position}"}, "check loaded_coin"),
                    ({"at": -1}, "time_out_of_range"),
                ]
            )
            served |= broken
        batch.append((served, reason))
    return batch


def as_stored(served):
    """A served row as PostgreSQL gives it back."""
    return (
        served["coin"],
        START + timedelta(milliseconds=served["at"] - ms(START)),
        served["px"],
        served["open"],
        served["doc"],
        served["version"],
        served["touched"],
    )


@BOTH_KINDS
@ALL_RULES
@pytest.mark.parametrize("many_rows", [1, loader.MANY_ROWS], ids=["many", "few"])
def test_random_batches_end_as_the_model_says_and_every_count_is_exact(
    connection, rng, monkeypatch, declaration, rule, many_rows
):
    monkeypatch.setattr(loader, "MANY_ROWS", many_rows)
    connection.execute(declaration)
    model = Model(rule)
    for number in range(12):
        batch = random_batch(rng, number)
        counts = put(
            connection, [served for served, _ in batch], rule, columns=EVERYTHING, touch=("touched",)
        )
        assert counts == model.load(batch), number
        expected = sorted((as_stored(served) for served in model.rows.values()), key=lambda each: each[:2])
        assert stored(connection, "coin, at, px::text, open, doc, version, touched") == expected, number
    times = [times for *_, times in quarantined(connection)]
    assert sorted(times) == sorted(model.rejects.values())


def test_complete_never_puts_null_over_a_value_and_a_greater_newer_keeps_its_own(connection):
    connection.execute(PLAIN)
    columns = ("coin", "at", "px", "version", "open", "touched")
    put(
        connection,
        [row(px="1", version=5, open=None, touched=1)],
        Merge.COMPLETE,
        columns=columns,
        newer="version",
    )

    def then(**served):
        counts = put(
            connection, [row(**served)], Merge.COMPLETE, columns=columns, newer="version", touch=("touched",)
        )
        return (counts.updated, counts.unchanged), stored(connection, "px::text, version, open, touched")[0]

    # Older: its value fills the gap only, and the touched column stays the better row's.
    assert then(px="2", version=4, open="true", touched=2) == ((1, 0), ("1", 5, True, 1))
    assert then(px="2", version=4, open="false", touched=3) == ((0, 1), ("1", 5, True, 1))
    # As new: its values win, its NULL does not.
    assert then(px="2", version=5, open=None, touched=4) == ((1, 0), ("2", 5, True, 4))
    assert then(px=None, version=6, open=None, touched=5) == ((1, 0), ("2", 6, True, 5))
    assert then(px="2", version=6, open="true", touched=6) == ((0, 1), ("2", 6, True, 5))


# --- more rows than MANY_ROWS ------------------------------------------------------------------------------------

MANY = loader.MANY_ROWS + 500


def many(first=0, count=MANY, **more):
    letters = "abcdefghij"
    return [
        row("".join(letters[int(digit)] for digit in f"{number:06d}"), number % 9, px=f"{number}.25", **more)
        for number in range(first, first + count)
    ]


def contents(rows):
    return sorted((each["coin"], each["px"], each["version"]) for each in rows)


@BOTH_KINDS
@ALL_RULES
def test_a_large_batch_is_stored_whole_then_merged_by_the_rule(connection, rng, declaration, rule):
    connection.execute(declaration)
    rows = many()
    assert put(connection, rng.sample(rows, MANY), rule).inserted == MANY
    # All stored, then half of them stored, then none of them.
    assert put(connection, rows, rule).unchanged == MANY
    later = many(MANY // 2, version=2)
    counts = put(connection, rng.sample(later, MANY), rule)
    known = MANY - MANY // 2
    assert counts.inserted == MANY - known
    assert (counts.updated, counts.unchanged) == ((0, known) if rule is Merge.IGNORE else (known, 0))
    assert put(connection, many(10 * MANY), rule).inserted == MANY
    merged = {each["coin"]: each for each in (*later, *rows)} if rule is Merge.IGNORE else None
    merged = merged or {each["coin"]: each for each in (*rows, *later)}
    expected = contents([*merged.values(), *many(10 * MANY)])
    assert stored(connection, "coin, px::text, version") == expected


def test_a_large_batch_of_new_rows_takes_the_plain_insert(connection, monkeypatch):
    connection.execute(PLAIN)
    number, inserts = loader._number, []

    def spy(connection, query):
        inserts.append(query.as_string(connection))
        return number(connection, query)

    monkeypatch.setattr(loader, "_number", spy)

    def ways(rows):
        inserts.clear()
        put(connection, rows)
        return ["on conflict" in each for each in inserts if "insert into" in each]

    assert ways(many()) == [False]
    assert ways([row("few")]) == [True]
    # All of them are stored by now: none is new, and then each is compared.
    assert ways(many()) == [False, True, True]


def test_a_row_that_the_table_refuses_is_found_and_the_others_are_stored(connection):
    """The table itself finds it, as it takes the rows; then all are looked through."""
    connection.execute(PLAIN)
    rows = [*many(), row("NO"), row("NEITHER")]
    counts = put(connection, rows)
    assert (counts.inserted, counts.rejected) == (MANY, 2)
    assert stored(connection, "coin, px::text, version") == contents(many())
    assert put(connection, rows).unchanged == MANY


@ALL_RULES
@BOTH_KINDS
def test_a_key_committed_between_probe_and_insert_is_merged_by_the_rule(
    connection, database, declaration, rule
):
    connection.execute(declaration)
    rows = many(version=2)
    contested = rows[MANY // 2]
    with opened(database) as other, ThreadPoolExecutor(1) as pool:
        # An open transaction holds the key: the probe cannot see it, the plain insert waits for it.
        with other.transaction():
            put_open(other, [contested | {"px": "0.5", "version": 1}])
            pending = pool.submit(put, connection, rows, rule)
            with opened(database) as watch:
                wait_until_blocked(watch, connection.info.backend_pid)
        counts = pending.result(timeout=60)
    kept = rule is Merge.IGNORE
    assert (counts.inserted, counts.updated, counts.unchanged) == (MANY - 1, 1 - kept, kept)
    winner = contested | {"px": "0.5", "version": 1} if kept else contested
    assert stored(connection, "coin, px::text, version") == contents(
        [winner if each is contested else each for each in rows]
    )


def put_open(connection, rows, rule=Merge.IGNORE):
    """Load within the caller's transaction."""
    return load(
        connection, NAME, wire.frame(rows, ("coin", "at", "px", "version")), rule=rule, run_id=uuid4()
    )


@ALL_RULES
@BOTH_KINDS
def test_a_key_committed_during_a_small_load_is_merged_by_the_rule(connection, database, declaration, rule):
    connection.execute(declaration)
    rows = many(count=20, version=2)
    contested = rows[10]
    with opened(database) as other, ThreadPoolExecutor(1) as pool:
        with other.transaction():
            put_open(other, [contested | {"px": "0.5", "version": 1}])
            pending = pool.submit(put, connection, rows, rule)
            with opened(database) as watch:
                wait_until_blocked(watch, connection.info.backend_pid)
        counts = pending.result(timeout=60)
    # Whether the contested row counts as inserted or updated is left open; that it counts once is not.
    kept = rule is Merge.IGNORE
    assert (counts.inserted + counts.updated, counts.unchanged) == (20 - kept, kept)
    winner = contested | {"px": "0.5", "version": 1} if kept else contested
    assert stored(connection, "coin, px::text, version") == contents(
        [winner if each is contested else each for each in rows]
    )


def test_a_key_that_was_rolled_back_between_probe_and_insert_is_inserted(connection, database):
    connection.execute(PLAIN)
    rows = many()
    with opened(database) as other, ThreadPoolExecutor(1) as pool:
        with other.transaction(force_rollback=True):
            put_open(other, rows[:1])
            pending = pool.submit(put, connection, rows)
            with opened(database) as watch:
                wait_until_blocked(watch, connection.info.backend_pid)
        counts = pending.result(timeout=60)
    assert counts.inserted == MANY


# --- two writers --------------------------------------------------------------------------------------------------

# Each row takes a moment, so that two loads are sure to meet in the middle.
SLOW = """
create function slow() returns trigger language plpgsql as 'begin perform pg_sleep(0.002); return new; end';
create trigger slow before insert on {} for each row execute function slow();
"""


@ALL_RULES
@BOTH_KINDS
@pytest.mark.parametrize("many_rows", [1, loader.MANY_ROWS], ids=["many", "few"])
def test_two_loads_in_opposite_order_do_not_deadlock_and_end_as_the_union(
    connection, database, monkeypatch, declaration, rule, many_rows
):
    monkeypatch.setattr(loader, "MANY_ROWS", many_rows)
    connection.execute(declaration)
    connection.execute(SLOW.format(NAME))
    rows = many(count=60)
    # Each has ten keys of its own beside fifty common ones; the rows are equal, so either may win.
    batches = [rows[:55], rows[5:][::-1]]
    gate = threading.Barrier(2)

    def one(batch):
        with opened(database) as own:
            gate.wait()
            return put(own, batch, rule)

    with ThreadPoolExecutor(2) as pool:
        done = list(pool.map(one, batches))
    assert sum(counts.inserted for counts in done) == 60
    assert sum(counts.unchanged for counts in done) == 50
    assert stored(connection, "coin, px::text, version") == contents(rows)


def test_two_loads_that_reject_the_same_rows_in_opposite_order_do_not_deadlock(connection, database):
    connection.execute(PLAIN)
    connection.execute(SLOW.format("rejected_rows"))
    rows = many(count=40, open="maybe")
    gate = threading.Barrier(2)

    def one(batch):
        with opened(database) as own:
            gate.wait()
            return put(own, batch, columns=EVERYTHING)

    with ThreadPoolExecutor(2) as pool:
        done = list(pool.map(one, [rows, rows[::-1]]))
    assert [counts.rejected for counts in done] == [40, 40]
    assert sum(counts.new_rejects for counts in done) == 40
    assert [times for *_, times in quarantined(connection)] == [2] * 40


# --- digits -------------------------------------------------------------------------------------------------------


def decimal_text(rng):
    digits = "".join(rng.choices("0123456789", k=rng.choice([1, 2, 15, 16, 17, 40])))
    if rng.random() < 0.7:
        digits = (digits.lstrip("0") or "0")[:40]
    text = rng.choice(["", "-"]) + digits
    if rng.random() < 0.7:
        text += "." + "".join(rng.choices("0123456789", k=rng.choice([1, 2, 8, 10, 18, 40])))
    if rng.random() < 0.25:
        text += rng.choice("eE") + rng.choice(["", "+", "-"]) + str(rng.randrange(41))
    return text


def test_decimal_text_is_stored_digit_for_digit(connection, rng):
    connection.execute("create table loaded (n integer primary key, v numeric)")
    texts = [decimal_text(rng) for _ in range(3000)]
    rows = [{"n": n, "v": text} for n, text in enumerate(texts)]
    assert put(connection, rows, Merge.IGNORE, columns=("n", "v")).inserted == 3000
    for given, (value,) in zip(
        texts, connection.execute("select v::text from loaded order by n"), strict=True
    ):
        if "e" not in given.lower() and str(Decimal(given)) == given and Decimal(given):
            assert value == given
        # PostgreSQL knows no minus zero and writes no exponent and no leading zeros.
        assert value == f"{abs(Decimal(given)) if not Decimal(given) else Decimal(given):f}", given


def test_decimals_of_a_frame_keep_their_scale(connection):
    connection.execute("create table loaded (n integer primary key, v numeric)")
    values = ["123456789012345678.9000000000", "-0.0000000001", "0.0000000000", None]
    frame = pl.DataFrame(
        {"n": [1, 2, 3, 4], "v": pl.Series(values).cast(pl.Decimal(38, 10))}, schema_overrides={"n": pl.Int32}
    )
    put(connection, frame)
    assert [value for (value,) in connection.execute("select v::text from loaded order by n")] == values


# --- what a table refuses -----------------------------------------------------------------------------------------


def test_a_row_that_breaks_a_check_is_quarantined_and_its_neighbours_are_stored(connection):
    connection.execute(PLAIN)
    counts = put(connection, [row("a"), row("B"), row("c"), row("D", day=1)])
    assert (counts.inserted, counts.rejected, counts.new_rejects) == (2, 2, 2)
    assert [coin for (coin,) in stored(connection, "coin")] == ["a", "c"]
    assert [(column, reason) for _, column, reason, _ in quarantined(connection)] == [
        (None, "check loaded_coin")
    ] * 2
    payload = connection.execute(
        "select payload::jsonb from rejected_rows where row_key like '%B%'"
    ).fetchone()[0]
    assert (payload["coin"], payload["px"]) == ("B", "1.5")


VALUE_CHECK = """
create table loaded (
    coin text primary key, px numeric, sz numeric,
    constraint positive check (px > 0), constraint sizes check (sz > px)
)
"""


@ALL_RULES
@pytest.mark.parametrize(
    ("rows", "columns", "reasons"),
    [
        (
            [("a", "1", "2"), ("b", "-1", "2"), ("c", "3", "2")],
            ("coin", "px", "sz"),
            ["check positive", "check sizes"],
        ),
        ([("b", "-1", "2")], ("coin", "px", "sz"), ["check positive"]),
        ([("a", None, "2"), ("b", None, "1")], ("coin", "px", "sz"), []),
        ([("a", "1", None), ("b", "-2", None)], ("coin", "px", "sz"), ["check positive"]),
        ([("a", None, None)], ("coin", "px", "sz"), []),
        ([("b", "x", "2")], ("coin", "px", "sz"), ["not_a_number"]),
        ([("a", "1"), ("b", "-1")], ("coin", "px"), ["check positive"]),
        ([("a",)], ("coin",), []),
    ],
    ids=[
        "mixed",
        "all break it",
        "all null",
        "other null",
        "nulls only",
        "none is left",
        "no size",
        "key only",
    ],
)
def test_checks_hold_whatever_columns_and_values_a_frame_has(connection, rule, rows, columns, reasons):
    connection.execute(VALUE_CHECK)
    if rule is Merge.NEWER and "px" not in columns:
        pytest.skip("NEWER needs its column")
    served = [dict(zip(columns, values, strict=True)) for values in rows]
    if rule is Merge.NEWER:
        connection.execute("alter table loaded add version bigint not null")
        served = [each | {"version": 1} for each in served]
        columns = (*columns, "version")
    counts = put(connection, served, rule, columns=columns)
    assert (counts.inserted, counts.rejected) == (len(rows) - len(reasons), len(reasons))
    assert [reason for _, _, reason, _ in quarantined(connection)] == reasons
    good = [values[0] for values in rows if values[0] == "a" or not reasons]
    assert [coin for (coin,) in stored_of(connection, "coin")] == good


@ALL_RULES
def test_a_row_that_breaks_a_check_takes_no_good_row_of_its_key_with_it(connection, rule):
    """As with every other refusal: what is refused is out before the rule chooses among the rows of a key."""
    connection.execute(PLAIN)
    connection.execute("alter table loaded add constraint positive check (px > 0)")
    good, broken = row(px="5", version=1), row(px="-1", version=1)
    batch = [broken, good] if rule is Merge.IGNORE else [good, broken]
    counts = put(connection, batch, rule)
    assert (counts.inserted, counts.rejected, counts.duplicate) == (1, 1, 0)
    assert stored(connection, "px::text") == [("5",)]


def test_times_without_a_partition_of_their_own_are_stored_in_the_default_one(connection):
    connection.execute(f"create table loaded ({COLUMNS}) partition by range (at)")
    connection.execute(
        "create table loaded_1 partition of loaded for values from ('2026-01-01') to ('2026-01-02')"
    )
    connection.execute("create table loaded_rest partition of loaded default")
    rows = [row("a"), row("b", day=1), row("c"), row("d", at=0), row("e", at=180 * 31_556_952_000)]
    assert put(connection, rows).inserted == 5
    assert put(connection, rows).unchanged == 5
    assert connection.execute("select coin from loaded_rest order by 1").fetchall() == [
        ("b",),
        ("d",),
        ("e",),
    ]


REFUSED = {
    "null in a NOT NULL column": ({"version": None}, "version", "null"),
    "null in the key": ({"coin": None}, "coin", "null"),
    "null time in the key": ({"at": None}, "at", "null"),
    "key too long": ({"coin": "x" * 501}, "coin", "key_too_long"),
    "key too long in bytes": ({"coin": "\u00e9" * 251}, "coin", "key_too_long"),
    "integer above its type": ({"touched": 2**31}, "touched", "out_of_range"),
    "integer below its type": ({"touched": -(2**31) - 1}, "touched", "out_of_range"),
    "bigint above its type": ({"version": 2**63}, "version", "out_of_range"),
    "bigint below its type": ({"version": -(2**63) - 1}, "version", "out_of_range"),
    "before 1970": ({"at": -1}, "at", "time_out_of_range"),
    "after 2149": ({"at": 180 * 31_556_952_000 + 1}, "at", "time_out_of_range"),
    "beyond any clock": ({"at": 2**63 - 1}, "at", "time_out_of_range"),
    "NUL escape in JSON": ({"doc": '{"a": "\\u0000"}'}, "doc", "not_json"),
    "NUL escape in a JSON key": ({"doc": '{"\\u0000": 1}'}, "doc", "not_json"),
    "lone high surrogate in JSON": ({"doc": '["\\ud83d"]'}, "doc", "not_json"),
    "lone low surrogate in JSON": ({"doc": '["\\uDE00"]'}, "doc", "not_json"),
    "NaN in JSON": ({"doc": '{"a": NaN}'}, "doc", "not_json"),
    "Infinity in JSON": ({"doc": "[-Infinity]"}, "doc", "not_json"),
    "a number that jsonb cannot hold": ({"doc": "[1e140000]"}, "doc", "not_json"),
    "half a JSON": ({"doc": '{"a": 1'}, "doc", "not_json"),
    "no JSON": ({"doc": ""}, "doc", "not_json"),
    "deep JSON": ({"doc": "[" * 100_000 + "]" * 100_000}, "doc", "not_json"),
    "JSON too long": ({"doc": '"' + "x" * 1_000_000 + '"'}, "doc", "too_long"),
}


@pytest.mark.parametrize(("changes", "column", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_the_table_would_refuse_is_quarantined_with_field_and_reason(
    connection, changes, column, reason
):
    connection.execute(PLAIN)
    rows = [row("before"), row("hostile", doc=None) | changes, row("behind")]
    counts = put(connection, rows, columns=EVERYTHING)
    assert (counts.inserted, counts.rejected) == (2, 1)
    assert [(each[1], each[2]) for each in quarantined(connection)] == [(column, reason)]
    assert [coin for (coin,) in stored(connection, "coin")] == ["before", "behind"]


BOUNDS = {
    "the longest key": {"coin": "x" * 500},
    "the first time": {"at": 0},
    "the last time": {"at": 180 * 31_556_952_000},
    "the greatest bigint": {"version": 2**63 - 1},
    "the least bigint": {"version": -(2**63)},
    "the greatest integer": {"touched": 2**31 - 1},
    "the least integer": {"touched": -(2**31)},
    "the widest number": {"px": "9" * 40 + "." + "9" * 40},
}


@pytest.mark.parametrize("changes", BOUNDS.values(), ids=BOUNDS)
def test_the_last_value_within_bounds_is_stored_exactly(connection, changes):
    connection.execute(PLAIN)
    served = row() | changes
    assert put(connection, [served]).inserted == 1
    expected = as_stored(served | {"open": None, "doc": None})
    assert stored(connection, "coin, at, px::text, open, doc, version, touched") == [expected]


JSON_ODDITIES = [
    '"a backslash, u0000: \\\\u0000"',
    '"\\ud83d\\ude00"',
    '["\\ud83d\\ude00", "the text \\\\x00"]',
    '{"a": 1, "a": 2}',
    "0.10000000000000000000000000000000000001",
    "123456789012345678901234567890",
    "-0.00",
    " [ ] ",
    "null",
    "true",
    '"\u202e\ufffe\\u001f"',
]


@pytest.mark.parametrize("text", JSON_ODDITIES)
def test_odd_but_valid_json_is_stored_as_the_server_reads_it(connection, text):
    connection.execute(PLAIN)
    assert put(connection, [row(doc=text)], columns=EVERYTHING).inserted == 1
    assert stored(connection, "doc::text") == [
        connection.execute("select %s::jsonb::text", (text,)).fetchone()
    ]


FRAGMENTS = [
    "[", "]", "{", "}", ",", ":", '"', '"a"', "1", "-", "0", ".5", "e9", "1e400", "1e140000", "1e-140000", "null", "true",
    "NaN", "Infinity", "\\u0000", "\\ud83d", "\\ude00", "\\", "\\\\", "u0000", "\\x00", "\x1f", "\t", " ", "\u00a0", "\u2028",
    "\ufeff", "\u0661", "\\u00e9", "/*", "'a'", "\x00",
]  # fmt: skip


def random_json(rng, depth=0):
    """Mostly valid JSON, with an odd fragment here and there."""
    kind = rng.randrange(6 if depth < 3 else 3)
    if rng.random() < 0.15:
        return rng.choice(FRAGMENTS)
    if kind == 0:
        return rng.choice(["1", "-2.50", "1e5", "null", "true", "1e400", "1e140000"])
    if kind <= 2:
        inside = [each for each in FRAGMENTS if '"' not in each and each not in "\x00\t\x1f\\"]
        return '"' + "".join(rng.choices(inside, k=rng.randrange(4))) + '"'
    parts = [random_json(rng, depth + 1) for _ in range(rng.randrange(4))]
    if kind == 3:
        return "{" + ",".join(f'"k{n}":{part}' for n, part in enumerate(parts)) + "}"
    return "[" + ", ".join(parts) + "]"


def test_random_json_is_stored_exactly_when_the_server_takes_it(connection, rng):
    connection.execute("create table loaded (n integer primary key, doc jsonb)")
    texts = [random_json(rng) for _ in range(600)]
    expected = {}
    for n, text in enumerate(texts):
        try:
            with connection.transaction():
                expected[n] = connection.execute("select %s::jsonb::text", (text,)).fetchone()[0]
        except (psycopg.DataError, psycopg.errors.UntranslatableCharacter):
            continue
    assert 50 < len(expected) < 600
    rows = [{"n": n, "doc": text} for n, text in enumerate(texts)]
    counts = put(connection, rows, columns=("n", "doc"))
    assert dict(connection.execute("select n, doc::text from loaded").fetchall()) == expected
    assert (counts.inserted, counts.rejected) == (len(expected), 600 - len(expected))


def test_a_rejected_row_seen_again_is_counted_not_repeated(connection):
    connection.execute(PLAIN)
    assert put(connection, [row("B"), row("c", px="x")]).new_rejects == 2
    again = put(connection, [row("B"), row("c", px="x"), row("c", px="1e999"), row("c", version="x")])
    assert (again.rejected, again.new_rejects) == (4, 1)
    assert sorted(times for *_, times in quarantined(connection)) == [1, 2, 3]


def test_the_quarantine_names_both_runs(connection):
    connection.execute(PLAIN)
    runs = [uuid4(), uuid4()]
    for run_id in runs:
        with connection.transaction():
            load(
                connection,
                NAME,
                wire.frame([row("B")], ("coin", "at", "version")),
                rule=Merge.UPDATE,
                run_id=run_id,
            )
    assert connection.execute(
        "select table_name, first_run_id, last_run_id from rejected_rows"
    ).fetchall() == [(NAME, *runs)]


# --- frames that do not fit, and transactions ---------------------------------------------------------------------

MISFITS = {
    "an unknown column": {"coin": ["a"], "at": [1], "version": [1], "price": ["1"]},
    "no key": {"at": [1], "version": [1]},
    "a NOT NULL column missing": {"coin": ["a"], "at": [1]},
    "a float for a numeric": {"coin": ["a"], "at": [1], "version": [1], "px": [1.5]},
    "a float for an integer": {"coin": ["a"], "at": [1], "version": [1.0]},
    "a float for a time": {"coin": ["a"], "at": [1.5], "version": [1]},
    "a float for text": {"coin": [1.5], "at": [1], "version": [1]},
    "a list for JSON": {"coin": ["a"], "at": [1], "version": [1], "doc": [["a"]]},
    "an integer for a boolean": {"coin": ["a"], "at": [1], "version": [1], "open": [1]},
}


@pytest.mark.parametrize("columns", MISFITS.values(), ids=MISFITS)
def test_a_frame_that_does_not_fit_the_table_is_a_value_error(connection, columns):
    connection.execute(PLAIN)
    with pytest.raises(ValueError):
        put(connection, pl.DataFrame(columns))
    assert stored(connection) == []


def test_a_table_without_a_key_is_a_value_error(connection):
    connection.execute("create table loaded (coin text)")
    with pytest.raises(ValueError, match="no primary key"):
        put(connection, [{"coin": "a"}], columns=("coin",))


def test_typed_columns_are_stored_like_their_text(connection):
    connection.execute(PLAIN)
    when = START + timedelta(microseconds=1)
    frame = pl.DataFrame(
        {
            "coin": ["a", "b"],
            "at": pl.Series([when, when.replace(year=2030)], dtype=pl.Datetime("us", "UTC")),
            "px": [1, None],
            "open": [True, None],
            "version": pl.Series([2**63 - 1, 0], dtype=pl.UInt64),
        }
    )
    put(connection, frame)
    assert stored(connection, "coin, at, px::text, open, version") == [
        ("a", when, "1", True, 2**63 - 1),
        ("b", when.replace(year=2030), None, None, 0),
    ]


@pytest.mark.parametrize("unit", ["ms", "us", "ns"])
@pytest.mark.parametrize("zone", [None, "UTC", "Asia/Tokyo"])
def test_times_of_any_unit_and_zone_are_one_instant_and_naive_ones_utc(connection, unit, zone):
    connection.execute("create table loaded (at timestamptz primary key, px numeric)")
    times = pl.Series([START, START - timedelta(days=365 * 60)], dtype=pl.Datetime(unit, "UTC"))
    times = times.dt.convert_time_zone(zone) if zone else times.dt.replace_time_zone(None)
    counts = put(connection, pl.DataFrame({"at": times}))
    assert (counts.inserted, counts.rejected) == (1, 1)
    assert stored_of(connection, "at") == [(START,)]


@ALL_RULES
def test_a_load_of_no_rows_is_nothing(connection, rule):
    connection.execute(PLAIN)
    assert put(connection, [], rule) == Counts()
    assert temporary_tables(connection) == []


def test_load_outside_a_transaction_is_refused(connection):
    connection.execute(PLAIN)
    with pytest.raises(AssertionError, match="transaction"):
        load(
            connection,
            NAME,
            wire.frame([row()], ("coin", "at", "version")),
            rule=Merge.UPDATE,
            run_id=uuid4(),
        )
    assert stored(connection) == []
    assert temporary_tables(connection) == []


@pytest.mark.parametrize("count", [3, MANY])
def test_a_rollback_leaves_nothing(connection, count):
    connection.execute(PLAIN)
    rows = [*many(count=count), row("BAD"), row("c", px="NaN")]
    with connection.transaction(force_rollback=True):
        counts = load(
            connection,
            NAME,
            wire.frame(rows, ("coin", "at", "px", "version")),
            rule=Merge.UPDATE,
            run_id=uuid4(),
        )
        assert (counts.inserted, counts.rejected) == (count, 2)
    assert stored(connection) == []
    assert quarantined(connection) == []
    assert temporary_tables(connection) == []
    assert put(connection, rows).new_rejects == 2


def test_a_commit_leaves_no_temporary_table_and_one_transaction_takes_many_loads(connection):
    connection.execute(PLAIN)
    with connection.transaction():
        for version in range(3):
            put_open(connection, [row(version=version), row(f"c{version}", version=version)], Merge.UPDATE)
            assert temporary_tables(connection) == []
    assert stored(connection, "coin, version") == [("btc", 2)]
    assert len(quarantined(connection)) == 3


@ALL_RULES
def test_the_settings_of_the_session_survive_a_probe(connection, monkeypatch, rule):
    monkeypatch.setattr(loader, "MANY_ROWS", 1)
    connection.execute(PLAIN)
    put(connection, [row()], rule)
    put(connection, [row(), row("eth")], rule)
    for name in ("enable_hashjoin", "enable_mergejoin"):
        assert connection.execute("select current_setting(%s)", (name,)).fetchone() == ("on",)


def test_a_table_of_another_schema_with_odd_column_names_is_loaded(connection):
    connection.execute(
        'create schema other; create table other.loaded ("Key" text primary key, "select" numeric)'
    )
    rows = [{"Key": "a", "select": "1"}, {"Key": "b", "select": "x"}]
    counts = put(connection, rows, columns=("Key", "select"), table="other.loaded")
    assert (counts.inserted, counts.rejected) == (1, 1)
    assert connection.execute("table other.loaded").fetchall() == [("a", Decimal(1))]
