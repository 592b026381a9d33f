"""The signals against values worked by hand from their definitions, and against a slow, exact reference."""

from __future__ import annotations

import random
from dataclasses import fields
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from fractions import Fraction

import polars as pl
import pytest
import signal_oracle

from hlcli.features import signals
from hlcli.features.signals import Signals

T = datetime(2026, 1, 5, 12, tzinfo=UTC)
FIVE = timedelta(minutes=5)
DAY = timedelta(hours=24)
TIME = pl.Datetime("us", "UTC")
POSITIONS = {
    "asset": pl.String,
    "wallet_id": pl.String,
    "window_end": TIME,
    "position_szi": pl.Float64,
    "is_dirty": pl.Boolean,
}
WINDOWS = {
    "window_end": TIME,
    "snapshot_count": pl.Int64,
    "partial_count": pl.Int64,
    "wallets_expected": pl.Int64,
    "wanted": pl.Boolean,
}
PAST = {
    "signal_ts": TIME,
    "asset": pl.String,
    "formula_version": pl.String,
    "alignment_score": pl.Float64,
    "reducer_count": pl.Int64,
    "holder_count": pl.Int64,
}
NUMBERS = (
    "alignment_score",
    "alignment_score_ntl",
    "dispersion_index",
    "exit_cluster_score",
    "exit_cluster_size",
    "exit_cluster_z",
)
COLUMNS = {
    "signals": {
        "signal_ts", "asset", "formula_version", *NUMBERS, "alignment_trend", "allowed_playbook", "risk_mode",
        "add_exposure", "tighten_stops", "add_long_count", "add_short_count", "reducer_count", "holder_count",
        "wallet_count", "missing_count", "dirty_count", "snapshot_count", "is_degraded", "degraded_reason",
    },
    "contributors": {
        "signal_ts", "asset", "pct_add_long", "pct_add_short", "pct_reducers", "pct_flat",
        "count_add_long", "count_add_short", "count_reducers", "count_flat", "total_wallets",
    },
    "skipped": {"signal_ts", "asset", "reason"},
}  # fmt: skip
KEYS = ["signal_ts", "asset", "formula_version"]


def frame(rows, schema):
    return pl.DataFrame(rows, schema=schema, orient="row")


def position_rows(positions):
    """{(asset, wallet, window_end): (size as text or None, found dirty)} as rows."""
    return [(*key, None if size is None else float(size), dirty) for key, (size, dirty) in positions.items()]


def compute(positions, windows, past=None):
    """All as the reference takes it: see signal_oracle.compute."""
    return signals.compute(
        frame(position_rows(positions), POSITIONS),
        frame([(end, *row) for end, row in windows.items()], WINDOWS),
        frame([(*key, float(score), r, h) for key, (score, r, h) in (past or {}).items()], PAST),
    )


def scene(pairs, *, asset="HYPE", past=None, expected=None, now=(5, 0), before=(5, 0), older=None, dirty=0):
    """One window of one asset. `pairs`: (previous, current) of each wallet, None where not known; `older`: further
    closing positions {window_end: size} of every wallet; `now`, `before`: (snapshots, partial ones) of the window and
    of the one before; `dirty`: the first so many wallets have a dirty value now, beside their clean one if they have one."""
    expected = len(pairs) if expected is None else expected
    positions = {}
    for number, (p, c) in enumerate(pairs):
        wallet = f"0x{number:040x}"
        positions[asset, wallet, T - FIVE] = (p, False)
        positions[asset, wallet, T] = (c, number < dirty)
        positions |= {(asset, wallet, end): (size, False) for end, size in (older or {}).items()}
    return compute(positions, {T - FIVE: (*before, expected, False), T: (*now, expected, True)}, past)


def rows(found):
    """{version: row} of a result with one window and one asset; numbers as Decimal."""
    assert found.skipped.is_empty()
    assert found.signals.height == 2
    return {
        row["formula_version"]: {
            name: Decimal(value) if name in NUMBERS and value is not None else value
            for name, value in row.items()
        }
        for row in found.signals.to_dicts()
    }


def score(found, version, column):
    value = rows(found)[version][column]
    return None if value is None else str(round(value, 6) + 0)  # no negative zero


def history(scores, version="v2", asset="HYPE", r=0, h=0):
    """Stored signals 5, 10, ... minutes before T."""
    return {(T - FIVE * n, asset, version): (each, r, h) for n, each in enumerate(scores, 1)}


# Wallets to build a crowd from. eps is 2 % of the median of the two values (1 % of their sum), at least 0.01 (HYPE).
LONG, SHORT = ("100", "110"), ("-100", "-110")  # eps 2.1 < 10: adds; a holder
CUT, COVER = ("100", "90"), ("-100", "-90")  # eps 1.9 < 10: gives up a tenth; a holder
OPEN, OPEN_SHORT = ("0", "100"), ("0", "-100")  # eps 1: adds; no holder
HOLD, NONE = ("100", "100"), ("0", "0")  # eps 2 and 0.01: flat; a holder and none


# --- classes ------------------------------------------------------------------------------------------------------

# asset, previous, current: the v1 class, and in which of v2's L, S, R, H it counts
CLASSES = {
    "adds to a long, eps 2.1": ("HYPE", "100", "110", "add_long", "LH"),
    "adds to a short": ("HYPE", "-100", "-110", "add_short", "SH"),
    "a move of 2 with eps 2.02": ("HYPE", "100", "102", "flat", "H"),
    "a move of 2.1 with eps 2.021": ("HYPE", "100", "102.1", "add_long", "LH"),
    "cuts a long, eps 1.9": ("HYPE", "100", "90", "reducers", "RH"),
    "covers a short: the move is up, the position is not": ("HYPE", "-100", "-90", "reducers", "RH"),
    "closes a long, eps 1": ("HYPE", "100", "0", "reducers", "RH"),
    "closes a short": ("HYPE", "-100", "0", "reducers", "RH"),
    "opens a long from zero": ("HYPE", "0", "100", "add_long", "L"),
    "opens a short from zero": ("HYPE", "0", "-100", "add_short", "S"),
    "holds": ("HYPE", "100", "100", "flat", "H"),
    "holds a short": ("HYPE", "-100", "-100", "flat", "H"),
    "has nothing": ("HYPE", "0", "0", "flat", ""),
    "flips +100 to -1: eps 1.01, so no short was added": ("HYPE", "100", "-1", "add_short", "RH"),
    "flips +100 to -2: eps 1.02": ("HYPE", "100", "-2", "add_short", "SRH"),
    "flips -100 to 50": ("HYPE", "-100", "50", "add_long", "LRH"),
    "flips -1 to 100: eps 1.01, held less than that": ("HYPE", "-1", "100", "add_long", "L"),
    "flips 1 to -1: eps 0.02": ("HYPE", "1", "-1", "add_short", "SRH"),
    "HYPE: up by exactly eps 0.01": ("HYPE", "0.02", "0.03", "flat", "H"),
    "HYPE: up by exactly eps, where a float difference is too large": ("HYPE", "0.06", "0.07", "flat", "H"),
    "HYPE: down by exactly eps": ("HYPE", "0.07", "0.06", "flat", "H"),
    "HYPE: a short up by exactly eps": ("HYPE", "-0.06", "-0.07", "flat", "H"),
    "HYPE: just more than eps": ("HYPE", "0.06", "0.07001", "add_long", "LH"),
    "HYPE: just more than eps down": ("HYPE", "0.07001", "0.06", "reducers", "RH"),
    "HYPE: opens exactly eps": ("HYPE", "0", "0.01", "flat", ""),
    "HYPE: closes exactly eps, which is not held": ("HYPE", "0.01", "0", "flat", ""),
    "HYPE: opens more": ("HYPE", "0", "0.01001", "add_long", "L"),
    "HYPE: closes more": ("HYPE", "-0.01001", "0", "reducers", "RH"),
    "HYPE: flips by more than eps, each half by less": ("HYPE", "0.008", "-0.008", "add_short", ""),
    "BTC: exactly eps 0.0001": ("BTC", "0.0006", "0.0007", "flat", "H"),
    "BTC: more": ("BTC", "0.0006", "0.00071", "add_long", "LH"),
    "ETH: exactly eps 0.001": ("ETH", "0.006", "0.007", "flat", "H"),
    "ETH: more": ("ETH", "-0.006", "-0.00701", "add_short", "SH"),
    "another: no least eps; 2 % of 0.000005": ("kPEPE", "0", "0.00001", "add_long", "L"),
    "another, of a builder's dex": ("xyz:HYPE", "0.0002", "0.0003", "add_long", "LH"),
}


@pytest.mark.parametrize(("asset", "p", "c", "v1", "v2"), CLASSES.values(), ids=CLASSES)
def test_a_wallet_is_in_one_v1_class_and_in_every_v2_count_that_holds(asset, p, c, v1, v2):
    found = scene([(p, c)], asset=asset)
    counts = found.contributors.row(0, named=True)
    names = ("add_long", "add_short", "reducers", "flat")
    assert {name: counts[f"count_{name}"] for name in names} == {name: int(name == v1) for name in names}
    assert {name: Decimal(str(counts[f"pct_{name}"])) for name in names} == {
        name: 100 * (name == v1) for name in names
    }
    assert (counts["signal_ts"], counts["asset"], counts["total_wallets"]) == (T, asset, 1)
    row = rows(found)["v1"]
    assert (row["add_long_count"], row["add_short_count"], row["reducer_count"]) == (
        v1 == "add_long", v1 == "add_short", v1 == "reducers",
    )  # fmt: skip
    row = rows(found)["v2"]
    named = ("add_long_count", "add_short_count", "reducer_count", "holder_count")
    assert "".join(letter for letter, name in zip("LSRH", named, strict=True) if row[name] == 1) == v2
    assert sum(row[name] for name in named) == len(v2)


# --- eps ----------------------------------------------------------------------------------------------------------


def longs(older, pair=("10", "10.3"), asset="kPEPE"):
    return rows(scene([pair], asset=asset, older=older))["v2"]["add_long_count"]


def test_eps_is_two_percent_of_the_median_of_the_closing_positions_of_24_hours():
    # 10, 10.3: eps 0.203 < 0.3. With 40 and 40: median 25.15, eps 0.503.
    assert longs({}) == 1
    assert longs({T - 2 * FIVE: "40"}) == 1  # median 10.3, eps 0.206
    assert longs({T - 2 * FIVE: "40", T - 3 * FIVE: "40"}) == 0
    assert longs({T - 2 * FIVE: "-40", T - 3 * FIVE: "-40"}) == 0  # sizes, not sides


def test_the_24_hours_of_eps_are_open_at_their_start():
    assert longs({T - 2 * FIVE: "40", T - DAY + FIVE: "40"}) == 0
    assert longs({T - 2 * FIVE: "40", T - DAY: "40"}) == 1
    assert longs({T - 2 * FIVE: "40", T - DAY - FIVE: "40"}) == 1


def test_zeros_count_in_eps_and_unknown_positions_do_not():
    pair = ("10", "10.15")  # alone: median 10.075, eps 0.2015 > 0.15
    older = [T - n * FIVE for n in (2, 3, 4)]
    assert longs({}, pair) == 0
    assert longs(dict.fromkeys(older, "0"), pair) == 1  # median 0
    assert longs(dict.fromkeys(older, None), pair) == 0


def test_eps_is_at_least_the_least_move_of_the_asset():
    older = {T - n * FIVE: "0" for n in (2, 3, 4)}
    assert longs(older, ("10", "10.01"), "HYPE") == 0
    assert longs(older, ("10", "10.01"), "kPEPE") == 1
    assert longs(older, ("10", "10.01001"), "HYPE") == 1


@pytest.mark.parametrize(
    ("size", "up", "down"),
    # In floats 0.02 x 0.011 is less than 0.00022, and 0.02 x 0.007 is more than 0.00014.
    [("0.011", "0.01122", "0.01078"), ("0.007", "0.00714", "0.00686"), ("0.051", "0.05202", "0.04998")],
)
def test_a_move_of_exactly_two_percent_of_the_median_is_none(size, up, down):
    older = {T - n * FIVE: size for n in (2, 3, 4)}
    for current in (up, down):
        found = scene([(size, current)], asset="kPEPE", older=older)
        assert found.contributors["count_flat"].to_list() == [1]
        row = rows(found)["v2"]
        assert (row["add_long_count"], row["reducer_count"], row["holder_count"]) == (0, 0, 1)


def test_eps_of_a_wallet_and_asset_does_not_look_at_others():
    positions = {}
    for asset, wallet, size in (("kPEPE", "a", "10"), ("kPEPE", "b", "4000"), ("BTC", "a", "4000")):
        for n in range(5):
            positions[asset, wallet, T - n * FIVE] = (size if n else str(Decimal(size) + 1), False)
    found = compute(positions, {T - FIVE: (5, 0, 2, False), T: (5, 0, 2, True)})
    counts = found.signals.filter(pl.col("formula_version") == "v2", pl.col("asset") == "kPEPE")
    assert counts["add_long_count"].to_list() == [1]  # a: eps 0.2; b: eps 80


# --- v1 scores ----------------------------------------------------------------------------------------------------

V1 = {
    # crowd, then alignment score, exit cluster
    "46 of 200 add: 50 + 50 x 0.23": (46 * [OPEN] + 154 * [NONE], "61.500000", "0.000000"),
    "46 of 200 add short": (46 * [OPEN_SHORT] + 154 * [NONE], "38.500000", "0.000000"),
    "46 add, 50 of 200 reduce: 25 % is not more than 25 %": (
        46 * [LONG] + 50 * [CUT] + 104 * [HOLD],
        "61.500000",
        "25.000000",
    ),
    "46 add, 51 of 200 reduce: capped": (46 * [LONG] + 51 * [CUT] + 103 * [HOLD], "60.000000", "25.500000"),
    "the cap lifts nothing": (46 * [SHORT] + 51 * [COVER] + 103 * [HOLD], "38.500000", "25.500000"),
    "all add": (7 * [LONG], "100.000000", "0.000000"),
    "all add short": (7 * [SHORT], "0.000000", "0.000000"),
    "all reduce": (7 * [CUT], "50.000000", "100.000000"),
    "as many either way": (3 * [LONG] + 3 * [SHORT] + [HOLD], "50.000000", "0.000000"),
    "2 against 1 of 3: 50 + 50/3": (2 * [LONG] + [SHORT], "66.666667", "0.000000"),
    "1 of 7: 50 + 50/7; 1 of 7 reduces: 100/7": ([LONG, CUT] + 5 * [HOLD], "57.142857", "14.285714"),
    "nobody moves": (9 * [NONE], "50.000000", "0.000000"),
    "a flip +100 to -1 adds short and is no exit: 50 - 50/2": (
        [("100", "-1"), HOLD],
        "25.000000",
        "0.000000",
    ),
}


@pytest.mark.parametrize(("crowd", "cas", "leaving"), V1.values(), ids=V1)
def test_v1_alignment_and_exit_cluster(crowd, cas, leaving):
    found = scene(crowd)
    assert score(found, "v1", "alignment_score") == cas
    assert score(found, "v1", "exit_cluster_score") == leaving
    row = rows(found)["v1"]
    assert (row["wallet_count"], row["missing_count"], row["dirty_count"]) == (len(crowd), 0, 0)
    assert [row[name] for name in ("alignment_score_ntl", "exit_cluster_size", "exit_cluster_z")] == 3 * [
        None
    ]


DISPERSION = {
    # Of N ratios 2 among 200: 200 x sqrt(N/200 (1 - N/200) 200/199)
    "5 of 200 open": (5 * [OPEN] + 195 * [NONE], "31.303346"),
    "10 of 200 open": (10 * [OPEN] + 190 * [NONE], "43.698372"),
    "20 of 200 open": (20 * [OPEN] + 180 * [NONE], "60.150565"),
    "46 of 200 open": (46 * [OPEN] + 154 * [NONE], "84.377710"),
    "4 pairs are too few": (4 * [LONG], "50.000000"),
    "4 known pairs of 5 wallets": (4 * [LONG] + [("100", None)], "50.000000"),
    "5 pairs alike": (5 * [LONG], "0.000000"),
    # 0.1 0.1 0 0 -0.1: mean 0.02, squares 2 x 0.0064 + 2 x 0.0004 + 0.0144 = 0.028; sqrt(0.007)
    "mixed": (2 * [LONG] + [CUT] + 2 * [HOLD], "8.366600"),
    # 9 is clamped to 2: mean 0.4, squares 2.56 + 4 x 0.16 = 3.2; sqrt(0.8)
    "a tenfold position": ([("100", "1000"), *4 * [HOLD]], "89.442719"),
    "a threefold position: exactly 2": ([("100", "300"), *4 * [HOLD]], "89.442719"),
    # -2: the same; -1: half of it
    "a flip to as much": ([("100", "-100"), *4 * [HOLD]], "89.442719"),
    "a flip to more is clamped": ([("100", "-900"), *4 * [HOLD]], "89.442719"),
    "a close": ([("100", "0"), *4 * [HOLD]], "44.721360"),
    # For a short the move is divided by the size: +1
    "a short closed": ([("-100", "0"), *4 * [HOLD]], "44.721360"),
    # 2, -2, 0, 0, 0: sqrt(8/4) = 1.41
    "at most 100": ([("0", "100"), ("0", "-100"), *3 * [HOLD]], "100.000000"),
    # A move of eps 0.01 from zero: 1; of 0.005 from 0.005: 0.5
    "eps from zero": ([("0", "0.01"), *4 * [NONE]], "44.721360"),
    "by eps where the position is smaller": ([("0.005", "0.01"), *4 * [NONE]], "22.360680"),
}


@pytest.mark.parametrize(("crowd", "expected"), DISPERSION.values(), ids=DISPERSION)
def test_v1_dispersion(crowd, expected):
    assert score(scene(crowd), "v1", "dispersion_index") == expected


@pytest.mark.parametrize("size", ["5", "-5"])
def test_v1_dispersion_where_eps_is_zero(size):
    # Each median is 0 and the asset has no least move: 0/0 is 0, and a move from zero counts 2, whatever its size.
    older = {T - n * FIVE: "0" for n in (2, 3, 4)}
    found = scene([("0", size), *4 * [NONE]], asset="kPEPE", older=older)
    assert score(found, "v1", "dispersion_index") == "89.442719"
    assert score(found, "v1", "alignment_score") == ("60.000000" if size == "5" else "40.000000")


# --- v2 scores ----------------------------------------------------------------------------------------------------

# L, S: alignment score 50 + 50 (L-S)/(L+S+10), dispersion 200 min(L, S)/(L+S+10)
V2 = {
    (0, 0): ("50.000000", None),
    (1, 0): ("54.545455", None),
    (3, 0): ("61.538462", None),
    (0, 3): ("38.461538", None),
    (2, 2): ("50.000000", None),
    (4, 0): ("64.285714", None),
    (5, 0): ("66.666667", "0.000000"),
    (0, 5): ("33.333333", "0.000000"),
    (3, 2): ("53.333333", "26.666667"),
    (1, 4): ("40.000000", "13.333333"),
    (7, 3): ("60.000000", "30.000000"),
    (10, 0): ("75.000000", "0.000000"),
    (5, 5): ("50.000000", "50.000000"),
    (10, 10): ("50.000000", "66.666667"),
    (20, 20): ("50.000000", "80.000000"),
    (30, 10): ("70.000000", "40.000000"),
    (46, 0): ("91.071429", "0.000000"),
    (0, 46): ("8.928571", "0.000000"),
}


@pytest.mark.parametrize(("counts", "expected"), V2.items())
@pytest.mark.parametrize(
    ("long", "short"), [(LONG, SHORT), (OPEN, OPEN_SHORT), (("-50", "100"), ("50", "-100"))]
)
def test_v2_alignment_and_dispersion_of_adders(counts, expected, long, short):
    found = scene(counts[0] * [long] + counts[1] * [short] + 4 * [NONE])
    assert (score(found, "v2", "alignment_score"), score(found, "v2", "dispersion_index")) == expected


BY_SIZE = {
    # w = min(add, p95)
    "nobody": ([HOLD], "50.000000"),
    "one": ([LONG, CUT], "100.000000"),
    "one short": ([SHORT], "0.000000"),
    "two alike": ([LONG, SHORT], "50.000000"),
    # p95 of 10, 30 = 29: 50 + 50 x 19/39
    "30 against 10": ([("100", "130"), SHORT], "74.358974"),
    # p95 of 10, 20, 100 = 20 + 0.9 x 80 = 92: 50 - 50 x 62/122
    "10 and 20 against 100": ([LONG, ("100", "120"), ("-100", "-200")], "24.590164"),
    # Of a flip only what is beyond zero was added: p95 of 10, 50 = 48: 50 + 50 x 38/58
    "a flip": ([("-100", "50"), SHORT], "82.758621"),
    # 20 of 10 and one of 1000: p95 is the 20th of 21: 10
    "one giant against twenty": (20 * [SHORT] + [("100", "1100")], "4.761905"),
}


@pytest.mark.parametrize(("crowd", "expected"), BY_SIZE.values(), ids=BY_SIZE)
def test_v2_alignment_by_size_is_winsorised(crowd, expected):
    assert score(scene(crowd), "v2", "alignment_score_ntl") == expected


EXITS = {
    # crowd; R/H; by size
    "nine holders are too few": (9 * [CUT] + [OPEN, NONE], None, None),
    "ten holders": (10 * [HOLD], "0.000000", "0.000000"),
    "one of ten gives up a tenth": ([CUT] + 9 * [HOLD], "10.000000", "1.000000"),
    "one of ten closes": ([("-100", "0")] + 9 * [HOLD], "10.000000", "10.000000"),
    "a flip gives up all": ([("100", "-100")] + 9 * [HOLD], "10.000000", "10.000000"),
    "one of thirty": ([COVER] + 29 * [HOLD], "3.333333", "0.333333"),
    "wallets with nothing do not count": ([CUT] + 9 * [HOLD] + 90 * [NONE], "10.000000", "1.000000"),
    "who opens does not count": ([CUT] + 9 * [HOLD] + 90 * [OPEN], "10.000000", "1.000000"),
    "all close": (10 * [("100", "0")], "100.000000", "100.000000"),
    # eps 1.985 > 1.5
    "a cut below eps gives up nothing": ([("100", "98.5"), CUT] + 8 * [HOLD], "10.000000", "1.000000"),
    # p95 of nine 10 and one 1000 = 10 + 0.55 x 990 = 554.5: 554.5 / (90 + 554.5)
    "a giant closes": ([("1000", "0")] + 9 * [("10", "10")], "10.000000", "86.035687"),
    # the giant halves: 277.25 / 644.5
    "a giant halves": ([("1000", "500")] + 9 * [("-10", "-10")], "10.000000", "43.017843"),
    # p95 of twenty 10 and one 1000 is the 20th of 21: 10 / 210
    "a giant among twenty": ([("1000", "0")] + 20 * [("10", "10")], "4.761905", "4.761905"),
}


@pytest.mark.parametrize(("crowd", "leaving", "by_size"), EXITS.values(), ids=EXITS)
def test_v2_exit_cluster_of_holders_and_by_size(crowd, leaving, by_size):
    found = scene(crowd)
    assert (score(found, "v2", "exit_cluster_score"), score(found, "v2", "exit_cluster_size")) == (
        leaving,
        by_size,
    )


def reducing(r, h):
    return r * [CUT] + (h - r) * [HOLD]


def usual(r, h, n=12):
    return history(n * [50], r=r, h=h)


SCORES_Z = {
    # q = 0.1, H = 100: (R - 10)/3
    "three exactly": (reducing(19, 100), usual(1, 10), "3.000000"),
    "more": (reducing(20, 100), usual(10, 100), "3.333333"),
    "as usual": (reducing(10, 100), usual(7, 70), "0.000000"),
    "less than usual": (reducing(5, 100), usual(1, 10), "-1.666667"),
    # q = 0.01, H = 100: (R - 1)/sqrt(0.99)
    "a floor of 1 %": (reducing(5, 100), usual(0, 50), "4.020151"),
    "a floor of 1 %, nobody": (reducing(0, 100), usual(0, 50), "-1.005038"),
    "a ceiling of 99 %": (reducing(100, 100), usual(50, 50), "1.005038"),
    "eleven windows": (reducing(19, 100), usual(1, 10, n=11), None),
    "no history": (reducing(19, 100), {}, None),
    "nine holders": (reducing(5, 9), usual(1, 10), None),
    "one of twelve had nine holders": (
        reducing(19, 100),
        usual(1, 10) | {(T - FIVE, "HYPE", "v2"): (50, 0, 9)},
        None,
    ),
    # A window of nine beside twelve does not move the mean.
    "one of thirteen had nine holders": (
        reducing(19, 100),
        usual(1, 10) | {(T - 13 * FIVE, "HYPE", "v2"): (50, 9, 9)},
        "3.000000",
    ),
    # The mean of the shares 0.1 and 0.3, not the share of the sums: q = 0.2, H = 25: (9 - 5)/2
    "each window weighs the same": (
        reducing(9, 25),
        usual(60, 200)
        | usual(1, 10, n=6)
        | {(T - n * FIVE, "HYPE", "v2"): (50, 60, 200) for n in range(7, 13)},
        "2.000000",
    ),
    "the twelfth exactly a day ago": (
        reducing(19, 100),
        usual(1, 10, n=11) | {(T - DAY, "HYPE", "v2"): (50, 1, 10)},
        "3.000000",
    ),
    "the twelfth more than a day ago": (
        reducing(19, 100),
        usual(1, 10, n=11) | {(T - DAY - FIVE, "HYPE", "v2"): (50, 1, 10)},
        None,
    ),
    "v1 counts are no history": (reducing(19, 100), history(12 * [50], "v1", r=1, h=10), None),
    "nor are those of another asset": (reducing(19, 100), history(12 * [50], asset="BTC", r=1, h=10), None),
}


@pytest.mark.parametrize(("crowd", "past", "expected"), SCORES_Z.values(), ids=SCORES_Z)
def test_v2_exits_are_measured_by_the_days_usual(crowd, past, expected):
    assert score(scene(crowd, past=past), "v2", "exit_cluster_z") == expected


# --- trend --------------------------------------------------------------------------------------------------------

# The score is 75: v1 with 1 of 2 adding, v2 with 10 adding.
TRENDS = [
    ([], "flat"),
    (["70"], "flat"),
    (["69.999999"], "rising"),
    (["80"], "flat"),
    (["80.000001"], "falling"),
    (["60", "80"], "flat"),
    (["60", "79"], "rising"),
    (["80", "81"], "falling"),
    (["60", "70", "80"], "flat"),
    (["69.999999", "70", "70"], "rising"),
    (["80", "80", "80.000001"], "falling"),
    (["100", "90", "80"], "falling"),
    # only the last 15 minutes
    (["70", "70", "70", "0"], "flat"),
    (["80", "80", "80", "100"], "flat"),
]


@pytest.mark.parametrize(("before", "expected"), TRENDS)
@pytest.mark.parametrize(("version", "crowd"), [("v1", [LONG, HOLD]), ("v2", 10 * [LONG])])
def test_the_trend_is_against_the_mean_of_the_last_three_scores(version, crowd, before, expected):
    found = scene(crowd, past=history(before, version))
    assert score(found, version, "alignment_score") == "75.000000"
    assert rows(found)[version]["alignment_trend"] == expected


def test_the_trend_looks_back_15_minutes_whatever_is_missing_there():
    past = {(T - n * FIVE, "HYPE", "v2"): (each, 0, 0) for n, each in ((3, "60"), (4, "100"), (5, "100"))}
    assert rows(scene(10 * [LONG], past=past))["v2"]["alignment_trend"] == "rising"


def test_the_trend_does_not_look_at_the_other_version_or_asset():
    past = history(["0"] * 3, "v1") | history(["0"] * 3, "v2", "BTC")
    assert rows(scene(10 * [LONG], past=past))["v2"]["alignment_trend"] == "flat"


# --- playbook -----------------------------------------------------------------------------------------------------

RISING, FLAT, FALLING = ["0", "0"], [], ["100", "100"]


def crowd(up, down, r=0, h=0):
    """Adders from zero (who hold nothing), reducers and further holders."""
    return up * [OPEN] + down * [OPEN_SHORT] + reducing(r, h)


def mirrored(pairs):
    return [tuple(str(-Decimal(size)) for size in pair) for pair in pairs]


LONG_ONLY, NO_TRADE = "Long-only", "No-trade"
DIRECTIONS = {"rising": RISING, "flat": FLAT, "falling": FALLING}
# v2. L, S, R, H, trend: playbook, risk mode, add exposure, tighten stops.
# CAS 50 + 50 (L-S)/(L+S+10), DI 200 min(L, S)/(L+S+10), EC 100 R/H.
V2_BOOK = {
    "above 75, rising, exits low: 15/20": (11, 0, 3, 20, "rising", LONG_ONLY, "Normal", True, False),
    "above 75, rising, exits medium: 20 %": (11, 0, 4, 20, "rising", LONG_ONLY, "Reduced", False, False),
    "above 75, rising, exits medium: 25 %": (11, 0, 5, 20, "rising", LONG_ONLY, "Reduced", False, False),
    "above 75, rising, exits high: 30 %": (11, 0, 6, 20, "rising", NO_TRADE, "Defensive", False, True),
    "above 75, flat, exits low": (11, 0, 3, 20, "flat", LONG_ONLY, "Reduced", False, False),
    "above 75, flat, exits medium": (11, 0, 4, 20, "flat", NO_TRADE, "Reduced", False, False),
    "above 75, falling": (11, 0, 0, 20, "falling", NO_TRADE, "Reduced", False, True),
    "above 75, rising, divided 40": (78, 22, 0, 20, "rising", NO_TRADE, "Reduced", True, False),
    "75 exactly, rising": (10, 0, 0, 20, "rising", LONG_ONLY, "Reduced", True, False),
    "75 exactly, flat": (10, 0, 0, 20, "flat", NO_TRADE, "Reduced", False, False),
    "66.7, rising, exits medium": (5, 0, 4, 20, "rising", NO_TRADE, "Reduced", False, False),
    "66.7, falling": (5, 0, 0, 20, "falling", NO_TRADE, "Reduced", False, True),
    "60 exactly, rising, divided 30": (7, 3, 0, 20, "rising", LONG_ONLY, "Reduced", True, False),
    "60 exactly, falling, divided 30": (7, 3, 0, 20, "falling", NO_TRADE, "Reduced", False, True),
    "60 exactly, falling, divided 55": (19, 11, 0, 20, "falling", LONG_ONLY, "Reduced", False, True),
    "72, divided 36, flat": (31, 9, 0, 20, "flat", NO_TRADE, "Reduced", False, False),
    "70, divided 40, rising": (30, 10, 0, 20, "rising", LONG_ONLY, "Reduced", True, False),
    "70, divided 40, flat": (30, 10, 0, 20, "flat", LONG_ONLY, "Reduced", False, False),
    "70, divided 40, falling": (30, 10, 0, 20, "falling", NO_TRADE, "Reduced", False, True),
    "70, divided 40, flat, exits medium": (30, 10, 4, 20, "flat", NO_TRADE, "Reduced", False, False),
    "60, divided 60": (25, 15, 0, 20, "rising", NO_TRADE, "Defensive", False, True),
    "53, rising": (3, 2, 0, 20, "rising", NO_TRADE, "Defensive", True, False),
    "53, falling": (3, 2, 0, 20, "falling", NO_TRADE, "Defensive", False, True),
    "61.5, too few moved": (3, 0, 0, 20, "rising", NO_TRADE, "Reduced", False, False),
    "66.7, too few hold": (5, 0, 1, 9, "rising", NO_TRADE, "Reduced", False, False),
    "61.5, too few moved, falling": (3, 0, 0, 20, "falling", NO_TRADE, "Reduced", False, True),
    "61.5, too few moved, exits high": (3, 0, 6, 20, "rising", NO_TRADE, "Defensive", False, True),
    "50, too few hold, divided 67": (10, 10, 0, 9, "flat", NO_TRADE, "Defensive", False, True),
}


@pytest.mark.parametrize("mirror", [False, True], ids=["long", "short"])
@pytest.mark.parametrize("case", V2_BOOK.values(), ids=V2_BOOK)
def test_v2_playbook(case, mirror):
    up, down, r, h, trend, book, risk, add, tighten = case
    pairs, past = crowd(up, down, r, h), history(DIRECTIONS[trend])
    if mirror:
        pairs, past = mirrored(pairs), history([100 - int(each) for each in DIRECTIONS[trend]])
        book = "Short-only" if book == LONG_ONLY else book
        trend = {"rising": "falling", "falling": "rising"}.get(trend, trend)
    row = rows(scene(pairs, past=past))["v2"]
    assert (row["reducer_count"], row["holder_count"], row["alignment_trend"]) == (r, h, trend)
    assert (row["allowed_playbook"], row["risk_mode"]) == (book, risk)
    assert (row["add_exposure"], row["tighten_stops"]) == (add, tighten)


def test_v2_balance_counts_as_long_for_the_advice():
    for trend, add, tighten in ((RISING, True, False), (FALLING, False, True)):
        row = rows(scene(crowd(3, 3, 0, 20), past=history(trend)))["v2"]
        assert (row["alignment_score"], row["add_exposure"], row["tighten_stops"]) == (50, add, tighten)


@pytest.mark.parametrize(
    ("r", "h", "usually", "risk"),
    [
        (19, 100, (1, 10), "Defensive"),  # z = 3 exactly
        (18, 100, (1, 10), "Reduced"),  # z = 2.67, EC 18 % medium
        (5, 100, (0, 10), "Defensive"),  # z = 4.02, EC 5 %
        (4, 50, (0, 10), "Normal"),  # z = 4.97, EC 8 %, but only four
    ],
)
def test_v2_exits_are_high_when_unusual_and_at_least_five(r, h, usually, risk):
    past = history(["0"] * 3 + [50] * 9, r=usually[0], h=usually[1])
    row = rows(scene(crowd(11, 0, r, h), past=past))["v2"]
    assert row["risk_mode"] == risk
    assert row["allowed_playbook"] == (NO_TRADE if risk == "Defensive" else LONG_ONLY)
    assert row["tighten_stops"] == (risk == "Defensive")
    assert row["add_exposure"] == (risk == "Normal")


# v1 of 40 wallets. L by a tenth, R, openers of a long (ratio 2), trend. CAS 50 + 50 (L + openers)/40.
# Dispersion: ratios of 0.1 and 0 stay below 40; 3 openers make it medium, 5 high.
V1_BOOK = {
    "80, rising, exits low: 6/40": (24, 6, 0, "rising", LONG_ONLY, "Normal", True, False),
    "80, rising, exits medium: 10/40": (24, 10, 0, "rising", LONG_ONLY, "Reduced", False, False),
    "80, flat": (24, 6, 0, "flat", LONG_ONLY, "Reduced", False, False),
    "80, flat, exits medium": (24, 7, 0, "flat", NO_TRADE, "Reduced", False, False),
    "80, falling": (24, 0, 0, "falling", NO_TRADE, "Reduced", False, True),
    "80 capped at 60, exits high": (24, 11, 0, "rising", NO_TRADE, "Defensive", False, True),
    "80, rising, medium dispersion": (21, 0, 3, "rising", NO_TRADE, "Reduced", True, False),
    "75 exactly, rising": (20, 0, 0, "rising", LONG_ONLY, "Reduced", True, False),
    "75 exactly, flat": (20, 0, 0, "flat", NO_TRADE, "Reduced", False, False),
    "70, rising, exits medium": (16, 8, 0, "rising", NO_TRADE, "Reduced", False, False),
    "70, rising, medium dispersion": (13, 0, 3, "rising", LONG_ONLY, "Reduced", True, False),
    "70, flat, medium dispersion": (13, 0, 3, "flat", LONG_ONLY, "Reduced", False, False),
    "70, falling, medium dispersion": (13, 0, 3, "falling", NO_TRADE, "Reduced", False, True),
    "60 exactly, falling, medium dispersion": (5, 0, 3, "falling", LONG_ONLY, "Reduced", False, True),
    "60 exactly, falling, low dispersion": (8, 0, 0, "falling", NO_TRADE, "Reduced", False, True),
    "70, rising, high dispersion": (11, 0, 5, "rising", NO_TRADE, "Defensive", False, True),
    "58.75": (7, 0, 0, "rising", NO_TRADE, "Defensive", True, False),
}


def v1_crowd(up, r, openers):
    return up * [LONG] + r * [CUT] + openers * [OPEN] + (40 - up - r - openers) * [HOLD]


@pytest.mark.parametrize("case", V1_BOOK.values(), ids=V1_BOOK)
def test_v1_playbook(case):
    up, r, openers, trend, book, risk, add, tighten = case
    row = rows(scene(v1_crowd(up, r, openers), past=history(DIRECTIONS[trend], "v1")))["v1"]
    assert (row["alignment_trend"], row["wallet_count"]) == (trend, 40)
    assert (row["allowed_playbook"], row["risk_mode"]) == (book, risk)
    assert (row["add_exposure"], row["tighten_stops"]) == (add, tighten)


# The same crowds selling: the matrix is mirrored, the overrides and the advice are not.
V1_SHORT_BOOK = {
    "20, falling, exits low": (24, 6, 0, "falling", "Short-only", "Normal", False, True),
    "20, falling, exits medium": (24, 10, 0, "falling", "Short-only", "Reduced", False, True),
    "20, falling, exits high": (24, 11, 0, "falling", NO_TRADE, "Defensive", False, True),
    "20, flat": (24, 6, 0, "flat", "Short-only", "Reduced", False, False),
    "20, rising": (24, 6, 0, "rising", NO_TRADE, "Reduced", True, False),
    "25 exactly, falling": (20, 0, 0, "falling", "Short-only", "Reduced", False, True),
    "25 exactly, flat": (20, 0, 0, "flat", NO_TRADE, "Reduced", False, False),
    "30, rising, low dispersion": (16, 0, 0, "rising", NO_TRADE, "Reduced", True, False),
    "30, rising, medium dispersion: nothing against it": (
        13,
        0,
        3,
        "rising",
        "Short-only",
        "Reduced",
        True,
        False,
    ),
    "30, flat, medium dispersion": (13, 0, 3, "flat", "Short-only", "Reduced", False, False),
    "40 exactly, falling, low dispersion": (8, 0, 0, "falling", "Short-only", "Reduced", False, True),
    "40 exactly, flat, medium dispersion": (5, 0, 3, "flat", "Short-only", "Reduced", False, False),
    "41.25": (7, 0, 0, "falling", NO_TRADE, "Defensive", False, True),
    "30, falling, high dispersion": (11, 0, 5, "falling", NO_TRADE, "Defensive", False, True),
}


@pytest.mark.parametrize("case", V1_SHORT_BOOK.values(), ids=V1_SHORT_BOOK)
def test_v1_playbook_of_sellers(case):
    up, r, openers, trend, book, risk, add, tighten = case
    pairs = mirrored(v1_crowd(up, r, openers))
    row = rows(scene(pairs, past=history(DIRECTIONS[trend], "v1")))["v1"]
    assert (row["alignment_trend"], row["wallet_count"]) == (trend, 40)
    assert (row["allowed_playbook"], row["risk_mode"]) == (book, risk)
    assert (row["add_exposure"], row["tighten_stops"]) == (add, tighten)


# --- lock ---------------------------------------------------------------------------------------------------------


def reasons(found):
    """Why each version's row is degraded; the two agree."""
    v1, v2 = rows(found).values()
    assert v1["degraded_reason"] == v2["degraded_reason"]
    assert v1["is_degraded"] == v2["is_degraded"] == (v1["degraded_reason"] is not None)
    return [] if v1["degraded_reason"] is None else v1["degraded_reason"].split("; ")


def skipped(found):
    assert all(found.skipped["reason"].str.len_chars() > 0)
    return set(found.skipped.select("signal_ts", "asset").rows())


@pytest.mark.parametrize("count", [0, 3])
def test_nothing_is_computed_from_fewer_than_four_snapshots_of_either_window(count):
    for windows in ({"now": (count, 0)}, {"before": (count, 0)}):
        found = scene(20 * [LONG], **windows)
        assert skipped(found) == {(T, None)}
        assert found.signals.is_empty()
        assert found.contributors.is_empty()


def test_nothing_is_computed_without_the_window_before():
    positions = {("HYPE", str(n), end): ("1", False) for n in range(20) for end in (T, T - FIVE)}
    assert skipped(compute(positions, {T: (5, 0, 20, True)})) == {(T, None)}


@pytest.mark.parametrize(
    ("now", "before", "expected"),
    [
        ((5, 0), (5, 0), []),
        ((4, 0), (5, 0), ["4 of 5 snapshots"]),
        ((5, 0), (4, 0), []),
        ((5, 1), (5, 0), ["partial snapshots"]),
        ((5, 5), (5, 0), ["partial snapshots"]),
        ((5, 0), (5, 5), []),
    ],
)
def test_few_or_partial_snapshots_degrade_their_window(now, before, expected):
    found = scene(20 * [LONG], now=now, before=before)
    assert reasons(found) == expected
    assert {row["snapshot_count"] for row in rows(found).values()} == {now[0]}


def test_several_reasons_are_joined():
    assert set(reasons(scene(20 * [LONG], now=(4, 2)))) == {"4 of 5 snapshots", "partial snapshots"}
    assert len(reasons(scene(20 * [LONG] + 80 * [NONE], now=(4, 2), expected=120))) == 3


# 200 wallets, of which some are not known now: how many reasons (the missing, the known share), or None: not computed
@pytest.mark.parametrize(
    ("known", "expected"),
    [(200, 0), (181, 0), (180, 1), (160, 1), (159, 2), (120, 2), (119, None), (0, None)],
)
@pytest.mark.parametrize("how", ["not known", "absent"])
def test_the_known_share_of_an_asset_degrades_or_locks_it(known, expected, how):
    unknown = (200 - known) * [("100", None)] if how == "not known" else []
    found = scene(known * [HOLD] + unknown + ([] if known else [("1", None)]), expected=200)
    if expected is None:
        assert skipped(found) == {(T, "HYPE")}
        assert found.signals.is_empty()
    else:
        assert len(reasons(found)) == expected
        assert {row["missing_count"] for row in rows(found).values()} == {200 - known}


def test_an_asset_without_a_single_pair_is_passed_over_with_a_reason():
    found = scene(20 * [(None, "100")])
    assert found.signals.is_empty()
    assert found.contributors.is_empty()
    assert skipped(found) == {(T, "HYPE")}


def test_wallets_beyond_those_expected_are_not_less_than_nothing_missing():
    found = scene(20 * [HOLD], expected=18)
    assert reasons(found) == []
    assert {(row["wallet_count"], row["missing_count"]) for row in rows(found).values()} == {(20, 0)}


def test_one_locked_asset_does_not_hold_up_another():
    positions = {}
    for n in range(20):
        for end in (T, T - FIVE):
            positions["HYPE", str(n), end] = ("1", False)
            positions["BTC", str(n), end] = ("1" if n < 11 else None, n >= 11)
    found = compute(positions, {T - FIVE: (5, 0, 20, False), T: (5, 0, 20, True)})
    assert skipped(found) == {(T, "BTC")}
    assert found.signals.select(KEYS).rows() == [(T, "HYPE", "v1"), (T, "HYPE", "v2")]


def test_more_than_a_tenth_dirty_degrades():
    for dirty, expected in ((0, 0), (20, 0), (21, 1)):
        found = scene(200 * [LONG], dirty=dirty)
        assert len(reasons(found)) == expected
        assert {row["dirty_count"] for row in rows(found).values()} == {dirty}
    # A wallet without any clean value counts too.
    found = scene(15 * [("1", None)] + 185 * [LONG], dirty=21)
    assert len(reasons(found)) == 1
    assert {(row["dirty_count"], row["missing_count"]) for row in rows(found).values()} == {(21, 15)}


def test_what_was_dirty_in_the_window_before_degrades_that_window_only():
    positions = {("HYPE", str(n), end): ("1", end < T) for n in range(20) for end in (T, T - FIVE)}
    found = compute(positions, {T - FIVE: (5, 0, 20, False), T: (5, 0, 20, True)})
    assert reasons(found) == []
    assert {row["dirty_count"] for row in rows(found).values()} == {0}


@pytest.mark.parametrize("unknown", [("100", None), (None, "100"), (None, None)])
@pytest.mark.parametrize("missing", [0, 19, 20, 50, 51, 60])
def test_a_tenth_of_the_pairs_missing_stops_trading(missing, unknown):
    # 60 open long, the others hold, two of them reduce: v1 50 + 50 x 60/N, v2 50 + 50 x 60/70.
    pairs = 60 * [LONG] + 2 * [CUT] + (138 - missing) * [HOLD] + missing * [unknown]
    past = history(RISING, "v1") | history(RISING, "v2")
    found = rows(scene(pairs, past=past, expected=200))
    v1, v2 = found["v1"], found["v2"]
    for row in (v1, v2):
        assert (row["wallet_count"], row["missing_count"]) == (200 - missing, missing)
        assert row["tighten_stops"] is False
        assert row["is_degraded"] == (missing >= 20)
        assert row["add_exposure"] == (missing < 20)
    assert round(v2["alignment_score"], 6) == Decimal("92.857143")
    assert (v2["alignment_trend"], v2["dispersion_index"]) == ("rising", 0)
    if missing < 20:
        assert round(v1["alignment_score"], 6) == round(Decimal(50) + Decimal(3000) / (200 - missing), 6)
        assert (v2["allowed_playbook"], v2["risk_mode"]) == ("Long-only", "Normal")
        assert (v1["allowed_playbook"], v1["risk_mode"]) == ("Long-only", "Reduced")
    else:
        risk = "Defensive" if missing > 50 else "Reduced"
        assert v1["alignment_score"] == 50
        assert {(row["allowed_playbook"], row["risk_mode"]) for row in (v1, v2)} == {("No-trade", risk)}


def test_stops_stay_tight_when_pairs_are_missing():
    past = history(FALLING, "v1") | history(FALLING, "v2")
    found = rows(scene(crowd(20, 0, 0, 140) + 40 * [(None, "1")], past=past))
    assert [row["tighten_stops"] for row in found.values()] == [True, True]


def test_a_gap_in_the_data_is_no_falling_market():
    # v1 would be 50 + 50 x 80/140 = 78.6 against 80: flat. That its stored score becomes 50 must not tighten stops.
    past = history(["80"], "v1") | history(["80"], "v2")
    found = rows(scene(80 * [LONG] + 60 * [HOLD] + 60 * [(None, "1")], past=past))
    assert found["v1"]["alignment_score"] == 50
    assert found["v1"]["alignment_trend"] == "flat"
    assert found["v1"]["tighten_stops"] is False


# --- frames -------------------------------------------------------------------------------------------------------


def assert_shape(found):
    for field in fields(Signals):
        assert set(getattr(found, field.name).columns) == COLUMNS[field.name]
    assert {found.signals.schema[name] for name in NUMBERS} == {pl.String}


def test_the_frames_have_their_columns_also_when_empty():
    nothing = compute({}, {})
    assert_shape(nothing)
    assert [frame.height for frame in (nothing.signals, nothing.contributors, nothing.skipped)] == [0, 0, 0]
    full = scene(3 * [LONG])
    assert_shape(full)
    for name in ("signals", "contributors"):
        assert getattr(full, name).schema == getattr(nothing, name).schema
    locked = scene(3 * [LONG], now=(0, 0))
    assert_shape(locked)
    assert locked.skipped.schema == nothing.skipped.schema
    assert locked.signals.schema == full.signals.schema


def test_a_window_that_is_not_wanted_yields_nothing():
    positions = {("HYPE", "a", T - n * FIVE): ("1", False) for n in range(4)}
    windows = {T - n * FIVE: (5, 0, 1, n == 1) for n in range(4)}
    found = compute(positions, windows)
    assert found.signals["signal_ts"].unique().to_list() == [T - FIVE]
    assert found.skipped.is_empty()


def test_numbers_have_six_decimals():
    for name in NUMBERS:
        text = scene(3 * [LONG] + reducing(1, 13), past=usual(1, 17)).signals[name].drop_nulls()
        assert len(text)
        assert all(-Decimal(each).as_tuple().exponent <= 6 for each in text), name


# --- against the reference ------------------------------------------------------------------------------------------

ASSETS = {"BTC": 5, "HYPE": 2, "xyz:DOGE": 0}
N_WALLETS, N_OLDER, N_WANTED = 40, 30, 30


def walk(rng, places, moods):
    """Closing positions of one wallet: mostly at rest, now and then with the crowd, or around eps, or anything."""
    unit = Decimal(1).scaleb(-places)
    size = (Decimal(rng.choice(["0", "0.05", "1", "30", "500"])) * Decimal(rng.uniform(-1, 1))).quantize(unit)
    for mood in moods:
        kind = rng.random()
        if mood and rng.random() < 0.4:
            size = size * Decimal("0.6") if mood == "leave" else size + mood * Decimal(rng.uniform(1, 100))
        elif kind < 0.05:
            size += size * Decimal(rng.choice(["0.02", "-0.02", "0.021", "-0.021", "0.1", "-0.3", "1.5"]))
        elif kind < 0.07:
            size += rng.choice([-1, 1]) * rng.choice([unit, Decimal("0.01"), Decimal("0.0001")])
        elif kind < 0.08:
            size = Decimal(0)
        elif kind < 0.10:
            size = -size * Decimal(rng.choice(["1", "0.01", "3"]))
        size = size.quantize(unit)
        yield size


def random_market(rng):
    """(positions, windows, past) as signal_oracle.compute takes them."""
    ends = [T + FIVE * n for n in range(-N_OLDER, N_WANTED)]
    positions = {}
    for asset, places in ASSETS.items():
        unknown = rng.choices([0, 0.03, 0.1, 0.2, 0.4], weights=[12, 4, 1, 1, 1], k=len(ends))
        dirty = rng.choices([0, 0.08, 0.2], weights=[3, 1, 1], k=len(ends))
        moods = rng.choices([None, 1, -1, "leave"], weights=[6, 2, 2, 1], k=len(ends))
        for number in range(N_WALLETS):
            # A few enter the universe late or leave it.
            start, stop = rng.choices([(0, 60), (40, 60), (0, 45)], weights=[30, 1, 1])[0]
            for n, size in enumerate(walk(rng, places, moods)):
                if start <= n < stop:
                    positions[asset, f"w{number}", ends[n]] = (
                        None if rng.random() < unknown[n] else size,
                        rng.random() < dirty[n],
                    )
    windows = {
        end: (
            rng.choices([5, 4, 3, 0], weights=[20, 5, 1, 1])[0],
            rng.choice([0, 0, 0, 0, 1, 3]),
            rng.choice([N_WALLETS - 1, N_WALLETS, N_WALLETS, N_WALLETS + 2]),
            end >= T,
        )
        for end in ends[N_OLDER - 1 :]
    }
    past = {}
    for asset in ASSETS:
        for n in rng.sample(range(1, 289), rng.choice([5, 11, 60])) + [1, 2]:
            h = rng.randrange(30)
            for version in ("v1", "v2"):
                cas = Fraction(rng.randrange(30_000_000, 70_000_000), 10**6)
                past[T - n * FIVE, asset, version] = (cas, rng.randrange(max(1, h // 5)), h)
    return positions, windows, past


def assert_same(found, expected):
    signals_expected, contributors_expected, skipped_expected = expected
    assert skipped(found) == skipped_expected
    assert found.signals.select(KEYS).rows() == sorted(signals_expected)
    for row in found.signals.to_dicts():
        exact = dict(signals_expected[row["signal_ts"], row["asset"], row["formula_version"]])
        because = set() if row["degraded_reason"] is None else set(row["degraded_reason"].split("; "))
        known = {signal_oracle.FEW_SNAPSHOTS, signal_oracle.PARTIAL}
        assert (len(because), because & known) == (len(exact["reasons"]), exact["reasons"] & known), row
        del exact["reasons"]
        for name, value in exact.items():
            if name in NUMBERS and value is not None:
                # Six decimals of the exact number; at the half between two of them a float may choose either.
                assert abs(Fraction(row[name]) - value) <= Fraction(1, 2_000_000) + Fraction(1, 10**10), (
                    name,
                    row,
                )
            else:
                assert row[name] == value, (name, value, row)
    assert found.contributors.height == len(contributors_expected)
    for row in found.contributors.to_dicts():
        counts = contributors_expected[row["signal_ts"], row["asset"]]
        for name, count in zip(("add_long", "add_short", "reducers", "flat"), counts, strict=True):
            assert row[f"count_{name}"] == count
            share = Fraction(100 * count, sum(counts))
            assert abs(Fraction(str(row[f"pct_{name}"])) - share) <= Fraction(1, 2_000_000) + Fraction(
                1, 10**10
            )
        assert row["total_wallets"] == sum(counts)


@pytest.mark.parametrize("draw", range(2))
def test_random_markets_give_what_the_definitions_say(rng, draw):
    market = random_market(rng)
    expected = signal_oracle.compute(*market)
    assert expected[0]
    assert_same(compute(*market), expected)


def test_the_random_markets_reach_every_state():
    # Fixed, so that it always holds: what the test above compares is not only the easy part.
    found = {name: set() for name in ("alignment_trend", "allowed_playbook", "risk_mode", "add_exposure")}
    nulls = {name: set() for name in ("dispersion_index", "exit_cluster_z")}
    reasons_seen, skipped_seen = set(), set()
    for seed in range(4):
        expected, _, left_out = signal_oracle.compute(*random_market(random.Random(seed)))
        for row in expected.values():
            for name, values in found.items():
                values.add(row[name])
            for name, values in nulls.items():
                values.add(row[name] is None)
            reasons_seen |= row["reasons"]
        skipped_seen |= {asset is None for _, asset in left_out}
    assert {name: len(values) for name, values in found.items()} == {
        "alignment_trend": 3,
        "allowed_playbook": 3,
        "risk_mode": 3,
        "add_exposure": 2,
    }
    assert all(values == {True, False} for values in nulls.values())
    assert len(reasons_seen) == 5
    assert skipped_seen == {True, False}


def as_stored(found):
    """What a later pass reads back of a result."""
    return found.signals.select(
        "signal_ts",
        "asset",
        "formula_version",
        pl.col("alignment_score").cast(pl.Float64),
        pl.col("reducer_count").cast(pl.Int64),
        pl.col("holder_count").cast(pl.Int64),
    )


def test_all_windows_in_one_pass_are_the_same_as_one_by_one(rng):
    positions, windows, past = random_market(rng)
    together = compute(positions, windows, past)
    sizes = frame(position_rows(positions), POSITIONS)
    stored = frame([(*key, float(cas), r, h) for key, (cas, r, h) in past.items()], PAST)
    parts = []
    for end in sorted(end for end, row in windows.items() if row[3]):
        two = [(at, *windows[at][:3], at == end) for at in (end - FIVE, end)]
        part = signals.compute(
            sizes.filter(pl.col("window_end").is_between(end - DAY, end, closed="right")),
            frame(two, WINDOWS),
            stored.filter(pl.col("signal_ts").is_between(end - DAY, end, closed="left")),
        )
        parts.append(part)
        stored = pl.concat([stored, as_stored(part)])
    for name, columns in COLUMNS.items():
        order = [column for column in KEYS if column in columns]
        alone = pl.concat([getattr(part, name) for part in parts]).sort(order, nulls_last=True)
        assert alone.equals(getattr(together, name).sort(order, nulls_last=True)), name


def test_the_order_of_the_rows_does_not_matter(rng):
    positions, windows, past = random_market(rng)

    def shuffled(rows_of):
        items = list(rows_of.items())
        rng.shuffle(items)
        return dict(items)

    first = compute(positions, windows, past)
    assert first.signals.select(KEYS).rows() == sorted(first.signals.select(KEYS).rows())
    for _ in range(3):
        again = compute(shuffled(positions), shuffled(windows), shuffled(past))
        for name, columns in COLUMNS.items():
            order = [column for column in KEYS if column in columns]
            assert getattr(again, name).sort(order).equals(getattr(first, name).sort(order)), name
        assert again.signals.equals(first.signals)
