"""The signals from their definitions: exact, slow, one wallet at a time, and with none of hlcli's own code.

Sizes come as Decimals, all results are unrounded Fractions. Only what trend and playbook rest on are alignment scores
as stored, with six decimals.
"""

from __future__ import annotations

import math
from collections import defaultdict
from datetime import timedelta
from fractions import Fraction

FIVE = timedelta(minutes=5)
DAY = timedelta(hours=24)
EPS_ABS = {"HYPE": Fraction(1, 100), "BTC": Fraction(1, 10_000), "ETH": Fraction(1, 1000)}
FEW_SNAPSHOTS = "4 of 5 snapshots"
PARTIAL = "partial snapshots"


def rounded(number, places=6):
    """The nearest number with so many decimals (half to even)."""
    return Fraction(round(number * 10**places), 10**places)


def root(number):
    """The square root to 40 decimals, rounded down (exact where it has no more)."""
    return Fraction(math.isqrt(number.numerator * 10**80 // number.denominator), 10**40)


def median(numbers):
    ordered = sorted(numbers)
    return mean([Fraction(each) for each in ordered[(len(ordered) - 1) // 2 : len(ordered) // 2 + 1]])


def mean(numbers):
    return Fraction(sum(numbers)) / len(numbers)


def p95(numbers):
    """The 95th percentile, interpolated linearly between the two nearest of the ordered values."""
    ordered = sorted(numbers)
    place = Fraction(95, 100) * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def sample_stdev(numbers):
    middle = mean(numbers)
    return root(sum((each - middle) ** 2 for each in numbers) / Fraction(len(numbers) - 1))


def epsilon(asset, history):
    """What a move must exceed, a Fraction; `history`: the closing positions of one wallet over (T-24h, T]."""
    return max(
        EPS_ABS.get(asset, Fraction(0)), Fraction(2, 100) * median([each.copy_abs() for each in history])
    )


def v1_class(p, c, eps):
    if c - p > eps and c > 0:
        return "add_long"
    if c - p < -eps and c < 0:
        return "add_short"
    if abs(c) < abs(p) - eps:
        return "reducer"
    return "flat"


def v1_ratio(p, c, eps):
    base = max(abs(p), eps)
    if base == 0:
        return Fraction((c > p) - (c < p)) * 2
    return max(Fraction(-2), min(Fraction(2), (c - p) / base))


def v1_scores(pairs):
    """Of (previous, current, eps) of each valid pair."""
    classes = [v1_class(*pair) for pair in pairs]
    count = {name: classes.count(name) for name in ("add_long", "add_short", "reducer", "flat")}
    n = len(pairs)
    exit_cluster = Fraction(100 * count["reducer"], n)
    alignment = 50 + Fraction(50 * (count["add_long"] - count["add_short"]), n)
    if exit_cluster > 25:
        alignment = min(alignment, Fraction(60))
    dispersion = Fraction(50)
    if n >= 5:
        dispersion = min(Fraction(100), 100 * sample_stdev([v1_ratio(*pair) for pair in pairs]))
    return {
        "alignment_score": alignment,
        "alignment_score_ntl": None,
        "dispersion_index": dispersion,
        "exit_cluster_score": exit_cluster,
        "exit_cluster_size": None,
        "exit_cluster_z": None,
        "add_long_count": count["add_long"],
        "add_short_count": count["add_short"],
        "reducer_count": count["reducer"],
        "flat_count": count["flat"],
    }


def v2_scores(pairs, shares):
    """Of (previous, current, eps) of each valid pair; `shares`: R/H of the day's windows with ten holders."""
    zero = Fraction(0)
    longs, shorts, reducers, holders = [], [], 0, []
    for p, c, eps in pairs:
        add_long = max(zero, max(c, zero) - max(p, zero))
        cut_long = max(zero, max(p, zero) - max(c, zero))
        add_short = max(zero, max(-c, zero) - max(-p, zero))
        cut_short = max(zero, max(-p, zero) - max(-c, zero))
        reduced = cut_long > eps or cut_short > eps
        reducers += reduced
        if add_long > eps:
            longs.append(add_long)
        if add_short > eps:
            shorts.append(add_short)
        if abs(p) > eps:
            holders.append((abs(p), cut_long + cut_short if reduced else zero))
    up, down, moved, held = len(longs), len(shorts), len(longs) + len(shorts), len(holders)

    by_size = Fraction(50)
    if moved:
        top = p95(longs + shorts)
        weight_up = sum(min(each, top) for each in longs)
        weight_down = sum(min(each, top) for each in shorts)
        by_size = 50 + 50 * Fraction(weight_up - weight_down) / (weight_up + weight_down)
    dispersion = None
    if moved >= 5:
        dispersion = 100 * (1 - Fraction(abs(up - down), moved)) * Fraction(moved, moved + 10)
    exit_cluster = exit_size = z = None
    if held >= 10:
        exit_cluster = Fraction(100 * reducers, held)
        top = p95([size for size, _ in holders])
        weights = [min(size, top) for size, _ in holders]
        given_up = [weight * cut / size for weight, (size, cut) in zip(weights, holders, strict=True)]
        exit_size = 100 * sum(given_up) / Fraction(sum(weights))
        if len(shares) >= 12:
            q = min(max(Fraction(1, 100), mean(shares)), Fraction(99, 100))
            z = (reducers - held * q) / root(held * q * (1 - q))
    return {
        "alignment_score": 50 + Fraction(50 * (up - down), moved + 10),
        "alignment_score_ntl": by_size,
        "dispersion_index": dispersion,
        "exit_cluster_score": exit_cluster,
        "exit_cluster_size": exit_size,
        "exit_cluster_z": z,
        "add_long_count": up,
        "add_short_count": down,
        "reducer_count": reducers,
        "holder_count": held,
    }


def trend(score, before):
    """`before`: the stored scores of [T-15min, T)."""
    if before and score > mean(before) + 5:
        return "rising"
    if before and score < mean(before) - 5:
        return "falling"
    return "flat"


def levels(version, row):
    dispersion, leaving, z = row["dispersion_index"], row["exit_cluster_score"], row["exit_cluster_z"]
    di = None if dispersion is None else "low" if dispersion < 40 else "medium" if dispersion < 60 else "high"
    ec = None if leaving is None else "low" if leaving <= 15 else "medium" if leaving <= 25 else "high"
    if version == "v2" and z is not None and z >= 3 and row["reducer_count"] >= 5:
        ec = "high"
    return di, ec


def playbook(version, cas, direction, di, ec):
    if di == "high" or ec == "high":
        return "No-trade", "Defensive"
    if version == "v2" and (di is None or ec is None):
        return "No-trade", "Reduced"
    if direction == "falling" and cas > 60:
        return "No-trade", "Reduced"
    if version == "v2" and direction == "rising" and cas < 40:
        return "No-trade", "Reduced"
    if 40 < cas < 60:
        return "No-trade", "Defensive"
    side, with_it = ("Long-only", "rising") if cas >= 60 else ("Short-only", "falling")
    far = cas > 75 or cas < 25
    if far and direction == with_it and di == "low":
        return side, "Normal" if ec == "low" else "Reduced"
    if far and direction == "flat" and di == "low" and ec == "low":
        return side, "Reduced"
    if not far and direction == with_it and di == "low" and ec == "low":
        return side, "Reduced"
    if not far and di == "medium" and ec == "low":
        return side, "Reduced"
    return "No-trade", "Reduced"


def advice(version, cas, direction, di, ec):
    """(add_exposure, tighten_stops)."""
    mirrored = version == "v2" and cas < 50
    add = direction == ("falling" if mirrored else "rising") and ec == "low" and di in {"low", "medium"}
    against = direction == ("rising" if mirrored else "falling")
    return add, ec == "high" or di == "high" or against


def compute(positions, windows, past):
    """What must be stored.

    positions: {(asset, wallet_id, window_end): (closing position as Decimal or None, found dirty)}
    windows: {window_end: (snapshots, partial ones, wallets expected, wanted)}
    past: {(signal_ts, asset, version): (stored alignment score, R, H)}
    Returns the signals {(signal_ts, asset, version): row}, the contributors {(signal_ts, asset): row} and the set of
    (signal_ts, asset or None) for which nothing is computed. In a row, `reasons` is how many reasons make it degraded.
    """
    assets = sorted({asset for asset, _, _ in positions})
    of_wallet = defaultdict(dict)
    found_dirty = defaultdict(set)
    for (asset, wallet, end), (size, dirty) in positions.items():
        if size is not None:
            of_wallet[asset, wallet][end] = size
        if dirty:
            found_dirty[asset, end].add(wallet)
    stored, signals, contributors, skipped = dict(past), {}, {}, set()

    for end in sorted(windows):
        snapshots, partial, expected, wanted = windows[end]
        if not wanted:
            continue
        if snapshots < 4 or windows.get(end - FIVE, (0,))[0] < 4:
            skipped.add((end, None))
            continue
        for asset in assets:
            held = {wallet: sizes for (each, wallet), sizes in of_wallet.items() if each == asset}
            known = Fraction(sum(end in sizes for sizes in held.values()), expected)
            pairs = [
                (
                    Fraction(sizes[end - FIVE]),
                    Fraction(sizes[end]),
                    epsilon(asset, [size for at, size in sizes.items() if end - DAY < at <= end]),
                )
                for sizes in held.values()
                if end in sizes and end - FIVE in sizes
            ]
            if known < Fraction(60, 100) or not pairs:
                skipped.add((end, asset))
                continue
            absent = max(0, expected - len(pairs))
            missing = Fraction(absent, expected)
            dirty = len(found_dirty[asset, end])
            reasons = {
                FEW_SNAPSHOTS: snapshots == 4,
                PARTIAL: partial > 0,
                "known": known < Fraction(80, 100),
                "dirty": Fraction(dirty, expected) > Fraction(10, 100),
                "missing": missing >= Fraction(10, 100),
            }
            for version in ("v1", "v2"):
                if version == "v1":
                    row = v1_scores(pairs)
                else:
                    shares = [
                        Fraction(r, h)
                        for (at, each, of), (_, r, h) in stored.items()
                        if each == asset and of == "v2" and end - DAY <= at < end and h >= 10
                    ]
                    row = v2_scores(pairs, shares)
                score = rounded(row["alignment_score"])
                before = [
                    cas
                    for (at, each, of), (cas, _, _) in stored.items()
                    if each == asset and of == version and end - 3 * FIVE <= at < end
                ]
                direction = trend(score, before)
                di, ec = levels(version, row)
                add, tighten = advice(version, score, direction, di, ec)
                book, risk = playbook(version, score, direction, di, ec)
                if reasons["missing"]:
                    book, add = "No-trade", False
                    risk = "Defensive" if missing > Fraction(25, 100) else "Reduced"
                    if version == "v1":
                        row["alignment_score"] = Fraction(50)
                row |= {
                    "alignment_trend": direction,
                    "allowed_playbook": book,
                    "risk_mode": risk,
                    "add_exposure": add,
                    "tighten_stops": tighten,
                    "wallet_count": len(pairs),
                    "missing_count": absent,
                    "dirty_count": dirty,
                    "snapshot_count": snapshots,
                    "is_degraded": any(reasons.values()),
                    "reasons": {reason for reason, holds in reasons.items() if holds},
                }
                if version == "v1":
                    names = ("add_long_count", "add_short_count", "reducer_count", "flat_count")
                    contributors[end, asset] = tuple(row[name] for name in names)
                    del row["flat_count"]
                signals[end, asset, version] = row
                stored[end, asset, version] = (
                    rounded(row["alignment_score"]),
                    row["reducer_count"],
                    row.get("holder_count"),
                )
    return signals, contributors, skipped
