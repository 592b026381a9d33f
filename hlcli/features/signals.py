"""What the watched wallets did between two five-minute windows, as scores and a playbook.

For a wallet and a coin, p is its last clean position in the window before and c the one in this window; d = c - p; eps
is what counts as dust: EPS_ABS, or 2 % of the median size of its closing positions of 24 hours where that is more.

v1 is what the dashboard was first built on. Of N wallets known in both windows, L have d > eps and c > 0, S have
d < -eps and c < 0, R have |c| < |p| - eps, the others are flat:
    alignment  50 + 50 (L - S) / N, at most 60 when exits are over 25
    dispersion the standard deviation of d / max(|p|, eps), each within -2 and 2, times 100, at most 100
    exits      100 R / N
Most wallets do nothing in five minutes, so dividing by all of them seldom leaves the middle, and a flip is no exit.

v2 splits each move at zero: L and S add more than eps to a long or a short, R cut more than eps, H hold |p| > eps, and a
flip counts in two of them. Small crowds are shrunk towards balance:
    alignment  50 + 50 (L - S) / (L + S + 10), and the same weighted by what was added
    dispersion 100 (1 - |L - S| / (L + S)) (L + S) / (L + S + 10)
    exits      100 R / H, and the same weighted by what was held
    z          (R - H q) / sqrt(H q (1 - q)), q being the mean of R / H over the last 24 hours

Scores are statistics of sizes and are computed in doubles; sizes have at most six decimals, so differences are rounded
to eight before they are compared, and 0.03 - 0.02 is 0.01.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import polars as pl

WINDOW = timedelta(minutes=5)
DAY = timedelta(hours=24)
TREND_SPAN = 3 * WINDOW
# In units of the coin; what is smaller is dust. Coins that are not named here have no floor.
EPS_ABS = {"HYPE": 0.01, "BTC": 0.0001, "ETH": 0.001}
EPS_SHARE = 0.02
SHRINK = 10
MIN_MOVERS = 5
MIN_HOLDERS = 10
MIN_PAST_WINDOWS = 12
LEAST_Q = 0.01
TREND_STEP = 5
ALERT_Z, ALERT_REDUCERS = 3, 5

SNAPSHOTS_FULL, SNAPSHOTS_LEAST = 5, 4
KNOWN_LEAST, KNOWN_FULL = 0.6, 0.8
MISSING_NEUTRAL, MISSING_DEFENSIVE = 0.10, 0.25
DIRTY_DEGRADED = 0.10

_KEY = ["signal_ts", "asset"]
_SCORES = (
    "alignment_score",
    "alignment_score_ntl",
    "dispersion_index",
    "exit_cluster_score",
    "exit_cluster_size",
    "exit_cluster_z",
)
_COUNTS = (
    "add_long_count",
    "add_short_count",
    "reducer_count",
    "holder_count",
    "wallet_count",
    "missing_count",
    "dirty_count",
    "snapshot_count",
)
_CLASSES = ("add_long", "add_short", "reducers", "flat")


@dataclass(frozen=True, slots=True)
class Signals:
    """Frames with the columns of their tables; numbers for NUMERIC are text."""

    signals: pl.DataFrame
    """All of table signals but computation_ms, by signal_ts, asset and formula_version."""
    contributors: pl.DataFrame
    """Table signal_contributors: the classes of v1."""
    skipped: pl.DataFrame
    """signal_ts, asset (null: all) and reason of what the data is too thin to tell."""


def compute(positions: pl.DataFrame, windows: pl.DataFrame, past: pl.DataFrame) -> Signals:
    """The signals of all wanted windows in one pass.

    `positions`: asset, wallet_id, window_end, position_szi (Float64: the newest clean observation in the window, or
    null), is_dirty (a value in the window was found implausible); for the wanted windows, the one before each, and
    the 24 hours before, which decide what is dust for a wallet.

    `windows`: window_end, snapshot_count and partial_count (usable snapshots, and those of them that lacked wallets),
    wallets_expected, wanted.

    `past`: signal_ts, asset, formula_version, alignment_score (Float64), reducer_count, holder_count of the signals
    stored for the 24 hours before the first wanted window: trends and what is usual rest on them.
    """
    import polars as pl

    open_windows, skipped = _unlocked(windows)
    asked = positions.join(open_windows.select(window_end="signal_ts"), on="window_end", how="semi")
    known = asked.group_by(signal_ts="window_end", asset="asset").agg(
        known_count=pl.col("position_szi").count(), dirty_count=pl.col("is_dirty").sum()
    )
    counted = known.join(open_windows, on="signal_ts")
    thin = pl.col("known_count") < KNOWN_LEAST * pl.col("wallets_expected")
    skipped = pl.concat(
        [skipped, counted.filter(thin).select(*_KEY, reason=pl.lit("under 60 % of the wallets known"))]
    )
    base = counted.filter(~thin)
    moves = _moves(positions, base)
    base = base.join(moves.group_by(_KEY).agg(wallet_count=pl.len()), on=_KEY, how="left").with_columns(
        pl.col("wallet_count").fill_null(0)
    )
    unpaired = pl.col("wallet_count") == 0
    skipped = pl.concat(
        [skipped, base.filter(unpaired).select(*_KEY, reason=pl.lit("no wallet known in both windows"))]
    )
    base = _judged(base.filter(~unpaired))
    first = open_windows["signal_ts"].min()
    past = past.filter(pl.col("signal_ts") < pl.lit(first, pl.Datetime("us", "UTC")))
    classes = _classes(moves)
    both = [
        _decided(_v1(classes, base), past, "v1"),
        _decided(_v2(moves, base, past), past, "v2"),
    ]
    return Signals(
        pl.concat(both).sort(*_KEY, "formula_version"),
        _contributors(classes, base).sort(_KEY),
        skipped.sort("signal_ts", "asset", nulls_last=False),
    )


def _unlocked(windows: pl.DataFrame) -> tuple[pl.DataFrame, pl.DataFrame]:
    """The wanted windows with enough snapshots, in them and in the window before; and the others with the reason."""
    import polars as pl

    before = windows.select(
        signal_ts=pl.col("window_end") + WINDOW, before_count=pl.col("snapshot_count").cast(pl.Int64)
    )
    wanted = (
        windows.filter("wanted")
        .rename({"window_end": "signal_ts"})
        .join(before, on="signal_ts", how="left")
        .with_columns(pl.col("before_count").fill_null(0), pl.col("snapshot_count").cast(pl.Int64))
    )
    reason = (
        pl.when(pl.col("snapshot_count") < SNAPSHOTS_LEAST)
        .then(pl.format("{} of 5 snapshots", "snapshot_count"))
        .when(pl.col("before_count") < SNAPSHOTS_LEAST)
        .then(pl.format("{} of 5 snapshots in the window before", "before_count"))
    )
    wanted = wanted.with_columns(reason=reason)
    return (
        wanted.filter(pl.col("reason").is_null()).drop("reason", "wanted"),
        wanted.filter(pl.col("reason").is_not_null()).select(
            "signal_ts", pl.lit(None, pl.String).alias("asset"), "reason"
        ),
    )


def _moves(positions: pl.DataFrame, base: pl.DataFrame) -> pl.DataFrame:
    """Each wallet known in both windows: p before, c now, d = c - p, eps, and the move split through zero."""
    import polars as pl

    closing = (
        positions.filter(pl.col("position_szi").is_not_null())
        .select("asset", "wallet_id", "window_end", c="position_szi")
        .sort("asset", "wallet_id", "window_end")
    )
    before = closing.select("asset", "wallet_id", pl.col("window_end") + WINDOW, p="c")
    # Closed on the right: the last 24 hours, this window included.
    usual = (
        closing.rolling("window_end", period=DAY, group_by=["asset", "wallet_id"])
        .agg(usual=pl.col("c").abs().median())
        .join(base.select("asset", window_end="signal_ts"), on=["asset", "window_end"], how="semi")
    )
    keys = ["asset", "wallet_id", "window_end"]
    c, p, eps = pl.col("c"), pl.col("p"), pl.col("eps")
    floor = pl.col("asset").replace_strict(EPS_ABS, default=0.0, return_dtype=pl.Float64)

    def gone(start: pl.Expr, end: pl.Expr) -> pl.Expr:
        return (start.clip(lower_bound=0) - end.clip(lower_bound=0)).round(8).clip(lower_bound=0)

    return (
        usual.join(closing, on=keys)
        .join(before, on=keys)
        .rename({"window_end": "signal_ts"})
        .with_columns(
            d=(c - p).round(8), eps=pl.max_horizontal(floor, (EPS_SHARE * pl.col("usual")).round(8))
        )
        .with_columns(
            shrunk=(p.abs() - c.abs()).round(8) > eps,
            add_long=gone(c, p),
            add_short=gone(-c, -p),
            cut=gone(p, c) + gone(-p, -c),
        )
    )


def _judged(base: pl.DataFrame) -> pl.DataFrame:
    """How much is missing, and why the window counts as degraded."""
    import polars as pl

    expected = pl.col("wallets_expected")
    base = base.with_columns(
        missing_count=(expected - pl.col("wallet_count")).clip(lower_bound=0).cast(pl.Int64),
        dirty_count=pl.col("dirty_count").cast(pl.Int64),
        wallet_count=pl.col("wallet_count").cast(pl.Int64),
    ).with_columns(missing_share=pl.col("missing_count") / expected)
    reasons = {
        "4 of 5 snapshots": pl.col("snapshot_count") < SNAPSHOTS_FULL,
        "partial snapshots": pl.col("partial_count") > 0,
        "under 80 % of the wallets known": pl.col("known_count") < KNOWN_FULL * expected,
        "over 10 % dirty": pl.col("dirty_count") > DIRTY_DEGRADED * expected,
        "10 % or more missing": pl.col("missing_share") >= MISSING_NEUTRAL,
    }
    told = pl.concat_str(
        [pl.when(holds).then(pl.lit(reason)) for reason, holds in reasons.items()],
        separator="; ",
        ignore_nulls=True,
    )
    return base.with_columns(degraded_reason=pl.when(told != "").then(told)).with_columns(
        is_degraded=pl.col("degraded_reason").is_not_null()
    )


def _classes(moves: pl.DataFrame) -> pl.DataFrame:
    """v1 puts each wallet in exactly one class; by key their counts, and the dispersion of the relative moves."""
    import polars as pl

    d, eps = pl.col("d"), pl.col("eps")
    kind = (
        pl.when((d > eps) & (pl.col("c") > 0))
        .then(pl.lit("add_long"))
        .when((d < -eps) & (pl.col("c") < 0))
        .then(pl.lit("add_short"))
        .when("shrunk")
        .then(pl.lit("reducers"))
        .otherwise(pl.lit("flat"))
    )
    ratio = (d / pl.max_horizontal(pl.col("p").abs(), eps)).fill_nan(0.0).clip(-2, 2)
    return (
        moves.with_columns(kind=kind, ratio=ratio)
        .group_by(_KEY)
        .agg(
            *((pl.col("kind") == name).sum().cast(pl.Int64).alias(name) for name in _CLASSES),
            total=pl.len().cast(pl.Int64),
            spread=pl.col("ratio").std(),
            holder_count=(pl.col("p").abs() > eps).sum().cast(pl.Int64),
        )
    )


def _contributors(classes: pl.DataFrame, base: pl.DataFrame) -> pl.DataFrame:
    import polars as pl

    return classes.join(base.select(_KEY), on=_KEY, how="semi").select(
        *_KEY,
        *(_text(100 * pl.col(name) / pl.col("total")).alias(f"pct_{name}") for name in _CLASSES),
        *(pl.col(name).alias(f"count_{name}") for name in _CLASSES),
        total_wallets="total",
    )


def _v1(classes: pl.DataFrame, base: pl.DataFrame) -> pl.DataFrame:
    """Scores and counts of v1; a window that lacks a tenth of the wallets says nothing and scores 50."""
    import polars as pl

    total = pl.col("total")
    exits = 100 * pl.col("reducers") / total
    score = 50 + 50 * (pl.col("add_long") - pl.col("add_short")) / total
    return base.join(classes, on=_KEY).select(
        *base.columns,
        alignment_score=pl.when(exits > 25).then(pl.min_horizontal(score, pl.lit(60.0))).otherwise(score),
        alignment_score_ntl=pl.lit(None, pl.Float64),
        dispersion_index=pl.when(total < MIN_MOVERS)
        .then(50.0)
        .otherwise((100 * pl.col("spread")).clip(upper_bound=100)),
        exit_cluster_score=exits,
        exit_cluster_size=pl.lit(None, pl.Float64),
        exit_cluster_z=pl.lit(None, pl.Float64),
        add_long_count="add_long",
        add_short_count="add_short",
        reducer_count="reducers",
        holder_count="holder_count",
    )


def _v2(moves: pl.DataFrame, base: pl.DataFrame, past: pl.DataFrame) -> pl.DataFrame:
    """Scores and counts of v2: only who moved or holds is counted. Price cancels out of the weighted scores."""
    import polars as pl

    eps, held = pl.col("eps"), pl.col("p").abs()
    longs, shorts = pl.col("add_long") > eps, pl.col("add_short") > eps
    holds, cuts = held > eps, pl.col("cut") > eps
    added = pl.max_horizontal("add_long", "add_short")
    sums = (
        moves.with_columns(
            # One whale must not be the crowd: weights end at the 95th percentile.
            added=pl.when(longs | shorts).then(added),
            held=pl.when(holds).then(held),
        )
        .with_columns(
            weight=pl.when(longs | shorts).then(
                pl.min_horizontal("added", pl.col("added").quantile(0.95, "linear").over(_KEY))
            ),
            stake=pl.when(holds).then(
                pl.min_horizontal("held", pl.col("held").quantile(0.95, "linear").over(_KEY))
            ),
        )
        .group_by(_KEY)
        .agg(
            add_long_count=longs.sum().cast(pl.Int64),
            add_short_count=shorts.sum().cast(pl.Int64),
            reducer_count=cuts.sum().cast(pl.Int64),
            holder_count=holds.sum().cast(pl.Int64),
            signed=(pl.col("weight") * pl.when(longs).then(1.0).otherwise(-1.0)).sum(),
            weight=pl.col("weight").sum(),
            given_up=(pl.when(cuts).then(pl.col("stake") * pl.col("cut") / held)).sum(),
            stake=pl.col("stake").sum(),
        )
    )
    net, movers = pl.col("add_long_count") - pl.col("add_short_count"), pl.col("movers")
    holders = pl.col("holder_count")
    enough = holders >= MIN_HOLDERS
    scored = (
        base.join(sums, on=_KEY)
        .with_columns(movers=pl.col("add_long_count") + pl.col("add_short_count"))
        .with_columns(
            alignment_score=50 + 50 * net / (movers + SHRINK),
            alignment_score_ntl=pl.when(movers > 0)
            .then(50 + 50 * pl.col("signed") / pl.col("weight"))
            .otherwise(50.0),
            dispersion_index=pl.when(movers >= MIN_MOVERS).then(
                100 * (1 - net.abs() / movers) * movers / (movers + SHRINK)
            ),
            exit_cluster_score=pl.when(enough).then(100 * pl.col("reducer_count") / holders),
            exit_cluster_size=pl.when(enough).then(100 * pl.col("given_up") / pl.col("stake")),
        )
    )
    usual = _usual_share(scored, past)
    return (
        scored.join(usual, on=_KEY, how="left")
        .with_columns(
            exit_cluster_z=pl.when(enough).then(
                (pl.col("reducer_count") - holders * pl.col("q"))
                / (holders * pl.col("q") * (1 - pl.col("q"))).sqrt()
            )
        )
        .select(
            *base.columns,
            *_SCORES,
            "add_long_count",
            "add_short_count",
            "reducer_count",
            "holder_count",
        )
    )


def _usual_share(scored: pl.DataFrame, past: pl.DataFrame) -> pl.DataFrame:
    """q: the mean share of holders who reduced in the 24 hours before; null where under an hour of it is known."""
    import polars as pl

    columns = [*_KEY, "reducer_count", "holder_count"]
    stored = past.filter(pl.col("formula_version") == "v2").select(columns)
    shares = pl.concat([stored, scored.select(columns)], how="vertical_relaxed").sort("asset", "signal_ts")
    share = pl.when(pl.col("holder_count") >= MIN_HOLDERS).then(
        pl.col("reducer_count") / pl.col("holder_count")
    )
    return shares.with_columns(share=share).select(
        *_KEY,
        q=pl.col("share")
        .rolling_mean_by("signal_ts", DAY, min_samples=MIN_PAST_WINDOWS, closed="left")
        .over("asset")
        .clip(LEAST_Q, 1 - LEAST_Q),
    )


def _decided(scored: pl.DataFrame, past: pl.DataFrame, version: str) -> pl.DataFrame:
    """Trend, playbook and flags from the scores; returns the columns of table signals."""
    import polars as pl

    scored = scored.with_columns(pl.col(name).round(6) for name in _SCORES)
    gone = pl.lit(version == "v1") & (pl.col("missing_share") >= MISSING_NEUTRAL)
    kept = pl.when(gone).then(50.0).otherwise("alignment_score").alias("alignment_score")
    stored = past.filter(pl.col("formula_version") == version).select(*_KEY, "alignment_score")
    lately = (
        pl.concat([stored, scored.select(*_KEY, kept)])
        .sort("asset", "signal_ts")
        .select(
            *_KEY,
            lately=pl.col("alignment_score")
            .rolling_mean_by("signal_ts", TREND_SPAN, min_samples=1, closed="left")
            .over("asset"),
        )
    )
    step = (pl.col("alignment_score") - pl.col("lately")).round(8)
    # v1 knows no mirror for two of its rules.
    mirrored = pl.lit(version == "v2")
    is_long = pl.col("alignment_score") >= 50
    rising, falling = pl.col("trend") > 0, pl.col("trend") < 0
    scored = (
        scored.join(lately, on=_KEY, how="left")
        .with_columns(
            trend=pl.when(step > TREND_STEP).then(1).when(step < -TREND_STEP).then(-1).otherwise(0),
            # Whether the score stands for buying or for selling, the rules are the same.
            strength=pl.max_horizontal("alignment_score", 100 - pl.col("alignment_score")),
            dispersion=_level(pl.col("dispersion_index"), pl.col("dispersion_index") < 40, 60, strict=False),
            exits=_level(pl.col("exit_cluster_score"), pl.col("exit_cluster_score") <= 15, 25, strict=True),
        )
        .with_columns(
            exits=pl.when((pl.col("exit_cluster_z") >= ALERT_Z) & (pl.col("reducer_count") >= ALERT_REDUCERS))
            .then(2)
            .otherwise("exits"),
            onward=pl.when(is_long).then(rising).otherwise(falling),
            backward=pl.when(is_long).then(falling).otherwise(rising),
        )
    )
    missing = pl.col("missing_share")
    tells = missing < MISSING_NEUTRAL
    trades, risk = _playbook(pl.when(mirrored | is_long).then("backward").otherwise(pl.lit(value=False)))
    adds = pl.when(mirrored).then("onward").otherwise(rising)
    tightens = pl.when(mirrored).then("backward").otherwise(falling)
    high = (pl.col("exits") == 2) | (pl.col("dispersion") == 2)
    return scored.select(
        *_KEY,
        formula_version=pl.lit(version),
        alignment_score=_text(kept),
        **{name: _text(pl.col(name)) for name in _SCORES[1:]},
        alignment_trend=pl.when(rising)
        .then(pl.lit("rising"))
        .when(falling)
        .then(pl.lit("falling"))
        .otherwise(pl.lit("flat")),
        allowed_playbook=pl.when(tells & trades & is_long)
        .then(pl.lit("Long-only"))
        .when(tells & trades)
        .then(pl.lit("Short-only"))
        .otherwise(pl.lit("No-trade")),
        risk_mode=pl.when(missing > MISSING_DEFENSIVE)
        .then(pl.lit("Defensive"))
        .when(~tells)
        .then(pl.lit("Reduced"))
        .otherwise(risk),
        add_exposure=(tells & adds & (pl.col("exits") == 0) & (pl.col("dispersion") < 2)).fill_null(
            value=False
        ),
        tighten_stops=tightens | high.fill_null(value=False),
        **{name: pl.col(name) for name in _COUNTS},
        is_degraded="is_degraded",
        degraded_reason="degraded_reason",
    )


def _playbook(turns: pl.Expr) -> tuple[pl.Expr, pl.Expr]:
    """Whether to trade with the crowd, and the risk mode; `turns`: a strong score that falls back."""
    import polars as pl

    strength, onward, flat = pl.col("strength"), pl.col("onward"), pl.col("trend") == 0
    dispersion, exits = pl.col("dispersion"), pl.col("exits")
    strong, fair = strength > 75, strength.is_between(60, 75)
    calm, settled = (dispersion == 0) & (exits == 0), dispersion == 0
    stop = (dispersion == 2) | (exits == 2)
    unsaid = dispersion.is_null() | exits.is_null() | (turns & (strength > 60))
    normal = strong & onward & calm
    reduced = (
        (strong & onward & settled & (exits == 1))
        | (strong & flat & calm)
        | (fair & onward & calm)
        | (fair & (dispersion == 1) & (exits == 0))
    )
    may = ~(stop.fill_null(value=False) | unsaid)
    trades = (may & (normal | reduced)).fill_null(value=False)
    risk = (
        pl.when(stop)
        .then(pl.lit("Defensive"))
        .when(unsaid)
        .then(pl.lit("Reduced"))
        .when(normal)
        .then(pl.lit("Normal"))
        .when(strength < 60)
        .then(pl.lit("Defensive"))
        .otherwise(pl.lit("Reduced"))
    )
    return trades, risk


def _level(value: pl.Expr, low: pl.Expr, high: float, *, strict: bool) -> pl.Expr:
    """0 low, 1 medium, 2 high; null where the value is."""
    import polars as pl

    is_high = value > high if strict else value >= high
    return pl.when(value.is_null()).then(None).when(low).then(0).when(is_high).then(2).otherwise(1)


def _text(value: pl.Expr) -> pl.Expr:
    """Rounded decimal text for a NUMERIC column."""
    import polars as pl

    return value.round(6).cast(pl.String)
