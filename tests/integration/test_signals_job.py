"""`hlcli signals compute` on a real database: windows, locks, recomputing, catching up, alerts, kills (F1, F18, F19).

Most tests fill wallet_snapshots themselves and let the database's clock stand still: T is the newest window.
"""

from __future__ import annotations

import json
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from functools import partial

import psycopg
import pytest
import signal_oracle
from vault_tables import PLENTY, assert_ledger_adds_up, assert_nothing_left, dump, runs
from waiting import until
from wallet_tables import freeze

from hlcli.exitcodes import ExitCode, LockedError, UsageError
from hlcli.jobs import refresh_universe, snapshot
from hlcli.jobs.compute_signals import CHANNEL, Options, compute_signals
from hlcli.sim import Simulator

T = datetime(2026, 3, 10, 12, 5, tzinfo=UTC)
MINUTE, FIVE, DAY = timedelta(minutes=1), timedelta(minutes=5), timedelta(hours=24)
MICROSECOND = timedelta(microseconds=1)
LAG = timedelta(minutes=2)
NOW = T + LAG + timedelta(seconds=30)
TABLES = ("signals", "signal_contributors", "alerts", "alert_state")
QUIET = "100"
WALLETS = 20


def put(connection, size, *, after, until=T, assets=("BTC",), wallets=WALLETS):
    """A full snapshot for every minute in (after, until]; `size`: SQL of the minute m and the window w (T is 0 for
    both), the wallet n (from 1) and the asset."""
    values = {"after": after, "until": until, "assets": list(assets), "wallets": wallets, "t": T}
    connection.execute(
        "insert into ingest_runs (snapshot_ts, status, wallets_expected, wallets_succeeded, wallets_failed,"
        " rows_expected, rows_written, coverage_pct, duration_ms, ledger_run_id)"
        " select ts, 'success', %(wallets)s, %(wallets)s, 0, 1, 1, 100, 1, gen_random_uuid()"
        " from generate_series(%(after)s::timestamptz + interval '1 minute', %(until)s, '1 minute') ts",
        values,
    )
    connection.execute(
        "insert into wallet_snapshots (snapshot_ts, wallet_id, asset, position_szi, ingest_run_id)"
        f" select ts, '0x' || lpad(to_hex(n), 40, '0'), asset, {size}, 1"
        " from generate_series(%(after)s::timestamptz + interval '1 minute', %(until)s, '1 minute') ts,"
        " generate_series(1, %(wallets)s) n, unnest(%(assets)s::text[]) asset,"
        " lateral (select round(extract(epoch from ts - %(t)s) / 60)::int as m) minute,"
        " lateral (select ceil(m / 5.0)::int as w) of_window",
        values,
    )


def wallet(n):
    return f"0x{n:040x}"


def spoil(connection, moment, reason, *, wallets=WALLETS, asset="BTC", value=None):
    """Let what the first wallets hold in one minute be dirty, or not known."""
    changed = connection.execute(
        "update wallet_snapshots set is_dirty = true, dirty_reason = %(reason)s, position_szi = %(value)s,"
        " missing_reason = case when %(value)s::numeric is null then 'timeout' end"
        " where snapshot_ts = %(moment)s and asset = %(asset)s and wallet_id = any (%(wallets)s)",
        {
            "reason": reason,
            "value": value,
            "moment": moment,
            "asset": asset,
            "wallets": [wallet(n) for n in range(1, wallets + 1)],
        },
    )
    assert changed.rowcount == wallets


def set_status(connection, moment, status):
    """None: there was no snapshot in this minute."""
    if status is None:
        changed = connection.execute("delete from ingest_runs where snapshot_ts = %s", (moment,))
    else:
        changed = connection.execute(
            "update ingest_runs set status = %s where snapshot_ts = %s", (status, moment)
        )
    assert changed.rowcount == 1


@pytest.fixture
def compute(settings, connection):
    """Run the job in this process; afterwards the ledger adds up and nothing is left behind."""
    connection.execute("create temp table initial_alert_state as select * from alert_state")
    freeze(connection, NOW)

    def run(**options):
        return compute_signals(settings(), Options(**options))

    yield run
    connection.execute("drop table initial_alert_state")
    assert_ledger_adds_up(connection)
    assert_nothing_left(connection)


def begin_again(connection):
    """As if nothing had ever been computed."""
    connection.execute("truncate signals, signal_contributors, alerts")
    connection.execute("delete from alert_state")
    connection.execute("insert into alert_state select * from initial_alert_state")


def everything(connection, without=()):
    return {table: dump(connection, table, without=without) for table in TABLES}


def rows_of(connection, columns, where="formula_version = 'v2'"):
    """Columns of the signals that are wanted, in order of time, asset and version."""
    return connection.execute(
        f"select {columns} from signals where {where} order by signal_ts, asset, formula_version"
    ).fetchall()


def only_row(connection, columns, moment=T, asset="BTC", version="v2"):
    (row,) = connection.execute(
        f"select {columns} from signals where signal_ts = %s and asset = %s and formula_version = %s",
        (moment, asset, version),
    ).fetchall()
    return row


# --- windows ------------------------------------------------------------------------------------------------------


def test_a_snapshot_at_the_end_belongs_to_its_window_and_the_next_minute_to_the_next(compute, connection):
    freeze(connection, NOW + FIVE)
    # 100 became 60 in the window's last minute and 30 in the first minute of the next.
    put(
        connection,
        "case when m >= 1 then 30 when m = 0 then 60 else 100 end",
        after=T - 2 * FIVE,
        until=T + FIVE,
    )
    compute()
    assert rows_of(connection, "signal_ts, exit_cluster_size") == [(T, 40), (T + FIVE, 50)]


def test_the_newest_clean_row_of_the_window_is_its_position(compute, connection):
    put(connection, "case when m > -2 then 70 + m when m = -2 then 60 else 100 end", after=T - 2 * FIVE)
    spoil(connection, T, "transient_collapse", value=0)
    spoil(connection, T - MINUTE, "null_szi")
    compute()
    assert only_row(connection, "exit_cluster_size, wallet_count, missing_count, dirty_count") == (
        40,
        WALLETS,
        0,
        WALLETS,
    )


def test_a_wallet_without_a_clean_row_in_the_window_is_missing_not_flat(compute, connection):
    put(connection, QUIET, after=T - 2 * FIVE)
    for back in range(5):
        spoil(connection, T - back * MINUTE, "null_szi", wallets=1)
    compute()
    columns = "wallet_count, missing_count, dirty_count, reducer_count"
    assert only_row(connection, columns) == (WALLETS - 1, 1, 0, 0)


def test_a_window_is_computed_two_minutes_after_its_end_and_no_sooner(compute, connection):
    put(connection, QUIET, after=T - 4 * FIVE, until=T + 2 * FIVE)
    newest_at = {
        T + LAG - MICROSECOND: T - FIVE,
        T + LAG: T,
        T + LAG + FIVE - MICROSECOND: T,
        T + LAG + FIVE: T + FIVE,
    }
    for now, newest in newest_at.items():
        freeze(connection, now)
        report = compute()
        assert connection.execute("select max(signal_ts) from signals").fetchone() == (newest,)
        assert report.details["newest_window"] == newest
        with pytest.raises(UsageError, match="newest window"):
            compute(at=newest + FIVE)


def test_prev_is_the_window_before_and_never_an_older_one(compute, connection):
    put(connection, QUIET, after=T - 4 * FIVE)
    for back in range(5, 10):
        spoil(connection, T - back * MINUTE, "null_szi", wallets=1)
    compute()
    assert rows_of(connection, "signal_ts, missing_count") == [(T - 2 * FIVE, 0), (T - FIVE, 1), (T, 1)]


def test_rows_older_than_a_day_do_not_decide_what_is_dust(compute, connection):
    # At 1000 the wallets' dust would be 20, at 100 it is 2: they cut by 5.
    put(connection, "1000", after=T - DAY - 24 * FIVE, until=T - DAY, wallets=12)
    put(connection, "case when w = 0 then 95 else 100 end", after=T - 6 * FIVE, wallets=12)
    compute(at=T)
    assert only_row(connection, "reducer_count, holder_count") == (12, 12)


def test_rows_of_the_last_day_do_decide_what_is_dust(compute, connection):
    put(
        connection,
        "case when w = 0 then 95 when w >= -5 then 100 else 1000 end",
        after=T - 24 * FIVE,
        wallets=12,
    )
    compute(at=T)
    assert only_row(connection, "reducer_count, holder_count") == (0, 12)


# --- locks --------------------------------------------------------------------------------------------------------

# What happens to the minutes T, T-1, ... and what is then told: (degraded_reason) or (None, skipped because).
LOCKS = {
    "two missing": ([None, None], None, "3 of 5 snapshots"),
    "two failed": (["failed", "failed"], None, "3 of 5 snapshots"),
    "one missing, one failed": ([None, "failed"], None, "3 of 5 snapshots"),
    "one missing": ([None], "4 of 5 snapshots", None),
    "one failed": (["success", "failed"], "4 of 5 snapshots", None),
    "one partial": (["partial"], "partial snapshots", None),
    "one partial, one failed": (["partial", "failed"], "4 of 5 snapshots; partial snapshots", None),
    "all partial": (["partial"] * 5, "partial snapshots", None),
    "two missing before": (["success"] * 5 + [None] * 2, None, "3 of 5 snapshots in the window before"),
    "one missing before": (["success"] * 5 + [None], None, None),
    "one partial before": (["success"] * 5 + ["partial"], None, None),
}


def test_too_few_snapshots_lock_a_window_and_thin_ones_degrade_it(compute, connection):
    put(connection, QUIET, after=T - 3 * len(LOCKS) * FIVE)
    for place, (name, (statuses, degraded, skipped)) in enumerate(LOCKS.items()):
        end = T - 3 * place * FIVE
        for back, status in enumerate(statuses):
            set_status(connection, end - back * MINUTE, status)
        report = compute(at=end)
        found = rows_of(
            connection, "is_degraded, degraded_reason, snapshot_count", f"signal_ts = '{end.isoformat()}'"
        )
        if skipped:
            assert report.details["skipped"] == {skipped: 1}, name
            assert runs(connection, CHANNEL.name)[-1]["details"]["skipped"] == {skipped: 1}
            assert (report.status, report.exit_code, report.numbers["served"]) == ("ok", ExitCode.OK, 0)
            assert found == [], name
        else:
            usable = sum(status not in {None, "failed"} for status in (statuses + ["success"] * 5)[:5])
            assert found == [(degraded is not None, degraded, usable)] * 2, name
            assert report.details["skipped"] == {}, name


def test_windows_without_any_snapshot_are_told_too(compute, connection):
    put(connection, QUIET, after=T - 4 * FIVE)
    for back in range(5, 10):
        set_status(connection, T - back * MINUTE, None)
    assert compute(at=T - FIVE).details["skipped"] == {"0 of 5 snapshots": 1}
    assert compute(at=T).details["skipped"] == {"0 of 5 snapshots in the window before": 1}
    assert rows_of(connection, "1") == []


# Of 20 wallets so many are not known in the window: what is stored, or why nothing is.
UNKNOWN = {
    1: (None, "Reduced"),
    2: ("10 % or more missing", "Reduced"),
    4: ("10 % or more missing", "Reduced"),
    5: ("under 80 % of the wallets known; 10 % or more missing", "Reduced"),
    6: ("under 80 % of the wallets known; 10 % or more missing", "Defensive"),
    8: ("under 80 % of the wallets known; 10 % or more missing", "Defensive"),
}


def test_shares_of_unknown_wallets_are_stored_as_degraded_and_risk(compute, connection):
    put(connection, QUIET, after=T - 2 * FIVE, assets=[f"A{unknown}" for unknown in UNKNOWN])
    for unknown in UNKNOWN:
        for back in range(5):
            spoil(connection, T - back * MINUTE, "null_szi", wallets=unknown, asset=f"A{unknown}")
    compute()
    columns = "degraded_reason, risk_mode, allowed_playbook, wallet_count, missing_count"
    for unknown, (reason, risk) in UNKNOWN.items():
        expected = (reason, risk, "No-trade", WALLETS - unknown, unknown)
        assert only_row(connection, columns, asset=f"A{unknown}") == expected


def test_an_asset_with_under_60_percent_known_is_skipped_and_the_others_are_not(compute, connection):
    put(connection, QUIET, after=T - 2 * FIVE, assets=("BTC", "ETH"))
    for back in range(5):
        spoil(connection, T - back * MINUTE, "null_szi", wallets=9, asset="ETH")
    report = compute()
    assert rows_of(connection, "asset, is_degraded") == [("BTC", False)]
    assert [row["asset"] for row in everything(connection)["signal_contributors"]] == ["BTC"]
    assert report.details["skipped"]["under 60 % of the wallets known"] == 1


def test_more_than_a_tenth_dirty_is_degraded(compute, connection):
    put(connection, QUIET, after=T - 2 * FIVE, assets=("BTC", "ETH"))
    for asset, dirty in {"BTC": 2, "ETH": 3}.items():
        spoil(connection, T - MINUTE, "transient_collapse", wallets=dirty, value=0, asset=asset)
        spoil(connection, T - 2 * MINUTE, "null_szi", wallets=10, asset=asset)
    compute()
    found = rows_of(connection, "asset, degraded_reason, dirty_count")
    assert found == [("BTC", None, 2), ("ETH", "over 10 % dirty", 3)]


def test_the_expected_wallets_are_those_of_the_newest_snapshot(compute, connection):
    put(connection, QUIET, after=T - 2 * FIVE)
    connection.execute(
        "update ingest_runs set wallets_expected = 25, wallets_failed = 5 where snapshot_ts = %s", (T,)
    )
    compute()
    assert only_row(connection, "wallet_count, missing_count, degraded_reason") == (
        WALLETS,
        5,
        "10 % or more missing",
    )


def test_every_asset_that_was_snapshot_is_computed(compute, connection):
    assets = ["BTC", "SOL", "kPEPE", "xyz:GOLD"]
    # Each its own way, so that none can stand in for another; without a floor even a thousandth is no dust.
    put(
        connection,
        "case asset when 'xyz:GOLD' then 0.001 * (w + 2) when 'SOL' then 0 when 'BTC' then 0.00005 * (w + 2)"
        " else -100 * (w + 2) end",
        after=T - 2 * FIVE,
        assets=assets,
    )
    compute()
    counts = "asset, add_long_count, add_short_count, holder_count"
    assert rows_of(connection, counts) == [
        ("BTC", 0, 0, 0),
        ("SOL", 0, 0, 0),
        ("kPEPE", 0, WALLETS, WALLETS),
        ("xyz:GOLD", WALLETS, 0, WALLETS),
    ]
    assert [row["asset"] for row in everything(connection)["signal_contributors"]] == assets


# --- again, and in other portions ---------------------------------------------------------------------------------

# Wallets that change position every few minutes, some with holes, by a hash of the seed.
RANDOM = (
    "case when abs(hashtext(concat('{seed}', asset, n, m / 20))::bigint) %% 12 = 0 then 0"
    " else abs(hashtext(concat(asset, n, m / (n %% 7 + 2), '{seed}'))::bigint) %% 2001 / 100.0 - 9.5 end"
)


def put_random(connection, rng, *, after, **options):
    put(connection, RANDOM.format(seed=rng.random()), after=after, **options)
    # Some rows are dirty and some minutes failed.
    connection.execute(
        "update wallet_snapshots set is_dirty = true, dirty_reason = case when draw % 2 = 0 then 'szi_jump'"
        " else 'null_szi' end, position_szi = case when draw % 2 = 0 then position_szi * 30 end,"
        " missing_reason = case when draw % 2 = 1 then 'timeout' end"
        " from (select snapshot_ts as t, wallet_id as w, asset as a,"
        f" abs(hashtext(concat(wallet_id, asset, snapshot_ts, '{rng.random()}'))::bigint) as draw"
        " from wallet_snapshots) drawn where (snapshot_ts, wallet_id, asset) = (t, w, a) and draw % 39 < 2"
    )
    connection.execute(
        "update ingest_runs set status = case when extract(minute from snapshot_ts)::int %% 11 = 0 then 'partial'"
        " else 'failed' end where extract(minute from snapshot_ts)::int %% 11 = 0"
        " or abs(hashtext(concat(snapshot_ts, %s::text))::bigint) %% 60 = 0",
        (str(rng.random()),),
    )


def test_a_second_run_changes_nothing_but_the_ledger(compute, connection, rng):
    put_random(connection, rng, after=T - timedelta(hours=3), assets=("BTC", "xyz:GOLD"))
    first = compute()
    before = everything(connection)
    assert before["signals"]
    assert before["alert_state"]
    second = compute()
    assert everything(connection) == before
    assert (second.numbers["inserted"], second.numbers["updated"]) == (0, 0)
    assert first.numbers["inserted"] == len(before["signals"]) + len(before["signal_contributors"])
    assert [run["status"] for run in runs(connection, CHANNEL.name)] == ["ok", "ok"]


def test_computing_again_what_has_not_changed_leaves_every_row_unchanged(compute, connection, rng):
    put_random(connection, rng, after=T - timedelta(hours=3))
    first = compute()
    before = everything(connection)
    report = compute(since=T - DAY)
    assert everything(connection) == before
    assert report.numbers["unchanged"] == report.numbers["served"] == first.numbers["inserted"]
    assert report.details["windows"] == first.details["windows"] > 20
    again = compute(at=T - 4 * FIVE)
    assert everything(connection) == before
    assert again.numbers["unchanged"] == 2 + 1


def test_at_computes_this_window_again_from_changed_snapshots_and_no_other(compute, connection):
    put(connection, QUIET, after=T - 6 * FIVE)
    compute()
    before = everything(connection)
    # Changes the windows T-10 and, as what is before it, T-5.
    connection.execute(
        "update wallet_snapshots set position_szi = 60 where snapshot_ts = %s", (T - 2 * FIVE,)
    )
    report = compute(at=T - 2 * FIVE)
    after = everything(connection)
    changed = {row["signal_ts"] for row in after["signals"] if row not in before["signals"]}
    assert changed == {f"{T - 2 * FIVE:%Y-%m-%d %H:%M:%S}+00"}
    assert only_row(connection, "exit_cluster_size, reducer_count", T - 2 * FIVE) == (40, WALLETS)
    assert (report.numbers["updated"], report.numbers["unchanged"], report.numbers["inserted"]) == (3, 0, 0)
    assert report.details["windows"] == 1


def test_since_computes_again_and_updates_only_what_changed(compute, connection):
    put(connection, QUIET, after=T - 8 * FIVE)
    compute()
    before = {row["signal_ts"]: row for row in dump(connection, "signal_contributors", without=())}
    connection.execute(
        "update wallet_snapshots set position_szi = 60 where snapshot_ts = %s", (T - 2 * FIVE,)
    )
    report = compute(since=T - 4 * FIVE)
    assert report.details["windows"] == 5
    after = {row["signal_ts"]: row for row in dump(connection, "signal_contributors", without=())}
    changed = {key for key in after if after[key] != before[key]}
    # 100 to 60 in one window and back to 100 in the next.
    assert changed == {f"{T - back * FIVE:%Y-%m-%d %H:%M:%S}+00" for back in (2, 1)}
    assert report.numbers["inserted"] == 0
    assert rows_of(connection, "add_long_count", "formula_version = 'v1'")[-2:] == [(WALLETS,), (0,)]


def test_since_takes_the_window_that_the_moment_lies_in(compute, connection):
    put(connection, QUIET, after=T - 8 * FIVE)
    compute(since=T - 3 * FIVE + MICROSECOND)
    assert rows_of(connection, "signal_ts") == [(T - 2 * FIVE,), (T - FIVE,), (T,)]
    compute(since=T - 4 * FIVE)
    assert len(rows_of(connection, "signal_ts")) == 5


def test_since_before_the_data_begins_where_the_data_does(compute, connection, rng):
    put_random(connection, rng, after=T - timedelta(hours=2))
    compute()
    before = everything(connection)
    report = compute(since=datetime(1970, 1, 1, tzinfo=UTC))
    assert everything(connection) == before
    assert (report.numbers["inserted"], report.numbers["updated"]) == (0, 0)
    assert report.seconds < 30


def one_by_one(compute, connection, windows):
    """Each window by a run of its own, as cron would do it."""
    for end in windows:
        freeze(connection, end + LAG)
        compute()


def ends(first, last):
    return [first + step * FIVE for step in range((last - first) // FIVE + 1)]


def test_days_in_one_pass_equal_window_by_window(compute, connection, rng):
    """The first windows, of which nothing is known yet; those around the ends of the portions; the last ones."""
    begin = T - timedelta(hours=50)
    put_random(connection, rng, after=begin - FIVE, wallets=12)
    compute(since=begin)
    whole = everything(connection, without=("computation_ms",))
    assert len(whole["signals"]) > 2 * 500
    assert sum(row["exit_cluster_z"] is not None for row in whole["signals"]) > 300
    connection.execute("create temp table kept as select * from signals")
    for windows in (
        ends(begin, begin + 14 * FIVE),
        ends(begin + DAY - FIVE, begin + DAY + FIVE),
        ends(begin + 2 * DAY - FIVE, begin + 2 * DAY + FIVE),
        ends(T - 2 * FIVE, T),
    ):
        connection.execute("delete from signals where signal_ts >= %s", (windows[0],))
        connection.execute("delete from signal_contributors where signal_ts = any (%s)", (windows,))
        one_by_one(compute, connection, windows)
        connection.execute("insert into signals select * from kept where signal_ts > %s", (windows[-1],))
        for table in ("signals", "signal_contributors"):
            assert dump(connection, table, without=("computation_ms",)) == whole[table], windows[0]
    connection.execute("drop table kept")


def test_a_window_that_does_not_exist_yet_or_never_does_is_wrong_usage(compute, connection):
    put(connection, QUIET, after=T - 4 * FIVE)
    for wrong in (
        {"at": T - MINUTE},
        {"at": T - MICROSECOND},
        {"at": T + FIVE},
        {"since": T + MICROSECOND},
    ):
        with pytest.raises(UsageError):
            compute(**wrong)
    assert everything(connection)["signals"] == []


def test_a_run_after_a_gap_catches_up_with_every_window_since_the_last(compute, connection):
    put(connection, QUIET, after=T - 30 * FIVE)
    freeze(connection, T - 20 * FIVE + LAG)
    compute()
    connection.execute("delete from signals where signal_ts < %s", (T - 20 * FIVE,))
    freeze(connection, NOW)
    report = compute()
    assert [moment for (moment,) in rows_of(connection, "signal_ts")] == ends(T - 20 * FIVE, T)
    # The last one of before is looked at again, and is as it was.
    assert (report.numbers["inserted"], report.numbers["unchanged"]) == (20 * 3, 3)


def test_a_hole_in_the_snapshots_leaves_a_hole_in_the_signals(compute, connection):
    put(connection, QUIET, after=T - 12 * FIVE, until=T - 8 * FIVE)
    put(connection, QUIET, after=T - 4 * FIVE)
    report = compute()
    # The first window after a hole has none to be compared with.
    assert [moment for (moment,) in rows_of(connection, "signal_ts")] == [
        *ends(T - 10 * FIVE, T - 8 * FIVE),
        *ends(T - 2 * FIVE, T),
    ]
    assert report.details["windows"] == 6
    assert sum(report.details["skipped"].values()) == 12 - 6


def test_a_run_after_a_long_rest_goes_back_a_day_and_no_further(compute, connection):
    put(connection, QUIET, after=T - DAY - 12 * FIVE, wallets=2)
    compute()
    # A day by the clock, not by the newest window.
    assert rows_of(connection, "signal_ts")[0] == (T - DAY + FIVE,)


def test_empty_tables_are_no_error(compute, connection):
    for _ in range(2):
        report = compute()
        assert (report.status, report.exit_code, report.numbers["served"]) == ("ok", ExitCode.OK, 0)
    compute(since=T - DAY)
    compute(at=T)
    assert everything(connection)["signals"] == []
    found = connection.execute("select alert_ts, asset, alert_type, message from alerts").fetchall()
    assert found == [], "what never ran has not stopped"


def test_who_left_the_universe_is_not_counted_for_who_came_and_could_not_be_read(compute, connection):
    put(connection, QUIET, after=T - 2 * FIVE)
    # In the middle of the window three wallets make way for three that cannot be read.
    moved = {"since": T - 2 * MINUTE, "old": [wallet(n) for n in (1, 2, 3)]}
    connection.execute(
        "update wallet_snapshots set wallet_id = '0xff' || substr(wallet_id, 5), position_szi = null,"
        " missing_reason = 'timeout', is_dirty = true, dirty_reason = 'null_szi'"
        " where snapshot_ts > %(since)s and wallet_id = any (%(old)s)",
        moved,
    )
    compute(at=T)
    columns = "wallet_count, missing_count, allowed_playbook, degraded_reason"
    assert rows_of(connection, columns) == [(17, 3, "No-trade", "10 % or more missing")]


def test_signals_computed_from_a_whole_day_outlive_its_snapshots(compute, connection):
    put(connection, "case when w %% 2 = 0 then 100 else 1 end", after=T - DAY - 6 * FIVE)
    compute(since=T - DAY - 6 * FIVE)
    before = everything(connection)["signals"]
    connection.execute("delete from wallet_snapshots where snapshot_ts < %s", (T - timedelta(hours=10),))
    compute(since=T - 2 * DAY)
    assert everything(connection, without=("computation_ms",))["signals"] == [
        {name: value for name, value in row.items() if name != "computation_ms"} for row in before
    ]


# --- alerts -------------------------------------------------------------------------------------------------------


def growing(*spans):
    """All wallets hold 100, and 10 % more each window of these spans (first, last): Long-only, else No-trade."""
    grown = " + ".join(
        f"least(greatest(w - ({first}) + 1, 0), {last} - ({first}) + 1)" for first, last in spans
    )
    return f"(100 * 1.1 ^ ({grown}))::numeric"


def alerts(connection, columns="alert_ts, alert_type, suppressed", where="asset <> 'SYSTEM'"):
    return connection.execute(
        f"select {columns} from alerts where {where} order by alert_ts, asset, alert_type"
    ).fetchall()


def state(connection, alert_type, columns, asset="BTC"):
    return connection.execute(
        f"select {columns} from alert_state where asset = %s and alert_type = %s", (asset, alert_type)
    ).fetchone()


def test_a_regime_changes_after_two_windows(compute, connection):
    put(connection, growing((-2, 0)), after=T - 10 * FIVE)
    freeze(connection, T - 2 * FIVE + LAG)
    compute()
    assert alerts(connection) == []
    columns = "current_playbook, pending_playbook, pending_periods, last_evaluated_ts"
    assert state(connection, "regime_change", columns) == ("No-trade", "Long-only", 1, T - 2 * FIVE)
    freeze(connection, T - FIVE + LAG)
    assert compute().details["alerts"] == 1
    fired = (T - FIVE, "BTC", "regime_change", "medium", "BTC: No-trade became Long-only")
    assert alerts(connection, "alert_ts, asset, alert_type, severity, message") == [fired]
    assert alerts(connection, "cooldown_until, suppressed") == [(T + timedelta(minutes=25), False)]
    assert state(connection, "regime_change", columns) == ("Long-only", None, 0, T - FIVE)
    freeze(connection, NOW)
    assert compute().details["alerts"] == 0
    assert len(alerts(connection)) == 1


def test_one_window_of_another_playbook_is_no_alert(compute, connection):
    put(connection, growing((-6, -6), (-3, -3)), after=T - 10 * FIVE)
    compute()
    assert ("Long-only",) in rows_of(connection, "allowed_playbook")
    assert alerts(connection) == []


def test_an_alert_holds_its_signal_as_it_was(compute, connection):
    put(connection, growing((-1, 0)), after=T - 10 * FIVE)
    compute()
    ((kept,),) = alerts(connection, "signal_snapshot")
    ((now,),) = rows_of(
        connection, "to_jsonb(signals)", f"signal_ts = '{T.isoformat()}' and formula_version = 'v2'"
    )
    assert kept == now
    assert (kept["formula_version"], kept["allowed_playbook"]) == ("v2", "Long-only")


def test_an_alert_in_its_cooldown_is_kept_but_suppressed(compute, connection):
    # Long-only from -10 on is told at -9; No-trade from -7 on would be told at -6, after 15 minutes; Long-only again
    # at -3, after exactly 30.
    put(connection, growing((-10, -8), (-4, 0)), after=T - 16 * FIVE)
    compute()
    assert alerts(connection) == [
        (T - 9 * FIVE, "regime_change", False),
        (T - 6 * FIVE, "regime_change", True),
        (T - 3 * FIVE, "regime_change", False),
    ]
    assert alerts(connection, "cooldown_until", "suppressed") == [(None,)]
    assert state(connection, "regime_change", "daily_count, last_triggered_ts, cooldown_until") == (
        2,
        T - 3 * FIVE,
        T + 3 * FIVE,
    )
    recent = connection.execute("select alert_ts from v_recent_alerts where asset = 'BTC'").fetchall()
    assert recent == [(T - 3 * FIVE,), (T - 9 * FIVE,)]


def test_the_fifth_alert_of_an_asset_in_a_day_is_suppressed(compute, connection):
    spans = [(start, start + 6) for start in (-62, -48, -34)]
    put(connection, growing(*spans), after=T - 70 * FIVE)
    compute()
    assert [suppressed for _, _, suppressed in alerts(connection)] == [False] * 4 + [True] * 2
    assert state(connection, "regime_change", "daily_count") == (4,)


# Everybody cuts a tenth in window `w`, and is back long before the next time.
def leaving(*windows):
    return f"case when w in ({', '.join(map(str, windows))}) then 90 else 100 end"


def test_an_exit_cluster_fires_once_and_again_only_after_it_has_passed(compute, connection):
    # Two windows of leaving in a row are one cluster: 100, 90, 80.
    put(
        connection,
        "case when w in (-19, 0) then 80 when w = -20 then 90 else 100 end",
        after=T - 36 * FIVE,
    )
    freeze(connection, T - 20 * FIVE + LAG)
    compute()
    columns = "alert_ts, alert_type, severity, suppressed, cooldown_until"
    first = (T - 20 * FIVE, "exit_cluster", "high", False, T - 8 * FIVE)
    assert alerts(connection, columns) == [first]
    assert state(connection, "exit_cluster", "is_active") == (True,)
    freeze(connection, T - 19 * FIVE + LAG)
    compute()
    assert only_row(connection, "exit_cluster_z > 3 and reducer_count = 20", T - 19 * FIVE) == (True,)
    assert state(connection, "exit_cluster", "is_active") == (True,)
    assert alerts(connection, columns) == [first]
    freeze(connection, T - 18 * FIVE + LAG)
    compute()
    assert state(connection, "exit_cluster", "is_active") == (False,)
    freeze(connection, NOW)
    compute()
    assert [row[:4] for row in alerts(connection, columns)] == [
        first[:4],
        (T, "exit_cluster", "high", False),
    ]
    ((message,),) = alerts(connection, "message", f"alert_ts = '{T.isoformat()}'")
    assert message.startswith("BTC: 20 of 20 holders reduced (")


def test_an_exit_cluster_within_the_hour_of_the_last_is_suppressed(compute, connection):
    put(connection, leaving(-20, -9, -8 + 1), after=T - 36 * FIVE)
    compute()
    assert alerts(connection) == [
        (T - 20 * FIVE, "exit_cluster", False),
        (T - 9 * FIVE, "exit_cluster", True),
        (T - 7 * FIVE, "exit_cluster", False),
    ]


def test_windows_that_lack_a_tenth_of_the_wallets_raise_nothing(compute, connection):
    put(connection, leaving(-3), after=T - 20 * FIVE)
    connection.execute(
        "update ingest_runs set wallets_expected = 23, wallets_failed = 3 where snapshot_ts = %s",
        (T - 3 * FIVE,),
    )
    compute()
    assert only_row(connection, "exit_cluster_z > 3", T - 3 * FIVE) == (True,)
    assert alerts(connection) == []
    assert state(connection, "exit_cluster", "is_active, last_evaluated_ts") == (False, T)


def test_a_stale_system_is_told_once_and_again_after_it_has_recovered(compute, connection):
    put(connection, QUIET, after=T - 4 * FIVE)
    stale = "alert_ts, severity, message, suppressed"
    limit = T + timedelta(seconds=600)
    freeze(connection, limit)
    compute()
    assert alerts(connection, stale, "true") == []
    for later in (MICROSECOND, MINUTE):
        freeze(connection, limit + later)
        compute()
        assert state(connection, "system_stale", "is_active, last_triggered_ts", "SYSTEM") == (
            True,
            limit + MICROSECOND,
        )
    told = (limit + MICROSECOND, "critical", f"no usable snapshot since {T:%Y-%m-%d %H:%MZ}", False)
    assert alerts(connection, stale, "asset = 'SYSTEM'") == [told]
    put(connection, QUIET, after=T + 3 * FIVE, until=T + 4 * FIVE)
    freeze(connection, T + 4 * FIVE)
    compute()
    assert state(connection, "system_stale", "is_active", "SYSTEM") == (False,)
    freeze(connection, T + 8 * FIVE)
    compute()
    assert [row[0] for row in alerts(connection, stale, "asset = 'SYSTEM'")] == [told[0], T + 8 * FIVE]


def test_failed_snapshots_do_not_end_staleness_and_partial_ones_do(compute, connection):
    put(connection, QUIET, after=T - 4 * FIVE, until=T + 3 * FIVE)
    connection.execute("update ingest_runs set status = 'failed' where snapshot_ts > %s", (T,))
    freeze(connection, T + 3 * FIVE)
    compute()
    assert state(connection, "system_stale", "is_active", "SYSTEM") == (True,)
    set_status(connection, T + 3 * FIVE, "partial")
    compute()
    assert state(connection, "system_stale", "is_active", "SYSTEM") == (False,)


def test_while_the_system_is_stale_other_alerts_are_suppressed(compute, connection):
    put(connection, growing((-1, 0)), after=T - 10 * FIVE)
    freeze(connection, T + timedelta(minutes=11))
    compute()
    assert alerts(connection) == [(T, "regime_change", True)]
    recent = connection.execute("select asset, alert_type from v_recent_alerts").fetchall()
    assert recent == [("SYSTEM", "system_stale")]


def test_old_windows_computed_again_raise_nothing_again(compute, connection):
    put(connection, growing((-10, -5)), after=T - 16 * FIVE)
    compute()
    assert len(alerts(connection)) == 2
    before = {table: dump(connection, table, without=()) for table in ("alerts", "alert_state")}
    compute(since=T - DAY)
    # Nor when the past turns out to have been another.
    connection.execute("update wallet_snapshots set position_szi = 100")
    report = compute(since=T - DAY)
    assert report.numbers["updated"] > 0
    assert {table: dump(connection, table, without=()) for table in before} == before


def test_alert_state_begins_with_seven_rows_and_grows_with_the_assets(compute, connection):
    first = {(asset, kind) for asset in ("HYPE", "BTC", "ETH") for kind in ("regime_change", "exit_cluster")}
    first.add(("SYSTEM", "system_stale"))

    def keys():
        return set(connection.execute("select asset, alert_type from alert_state").fetchall())

    assert keys() == first
    put(connection, QUIET, after=T - 4 * FIVE, assets=("BTC", "kPEPE", "xyz:GOLD"))
    compute()
    new = {(asset, kind) for asset in ("kPEPE", "xyz:GOLD") for kind in ("regime_change", "exit_cluster")}
    assert keys() == first | new
    assert state(connection, "regime_change", "last_evaluated_ts", "xyz:GOLD") == (T,)
    assert state(connection, "regime_change", "last_evaluated_ts", "HYPE") == (None,)


def test_alerts_are_the_same_in_one_run_and_in_many(compute, connection):
    put(
        connection,
        f"case when asset = 'BTC' then {growing((-10, -4))} else {leaving(-8, -1)} end",
        after=T - 24 * FIVE,
        assets=("BTC", "ETH"),
    )
    compute()
    columns = "alert_ts, asset, alert_type, message, cooldown_until, suppressed"
    whole, states = alerts(connection, columns), dump(connection, "alert_state", without=())
    assert len(whole) == 4
    assert {suppressed for *_, suppressed in whole} == {False, True}
    begin_again(connection)
    one_by_one(compute, connection, [T - 11 * FIVE, *ends(T - 9 * FIVE, T)])
    freeze(connection, NOW)
    compute()
    assert alerts(connection, columns) == whole
    assert dump(connection, "alert_state", without=()) == states


def test_recent_alerts_are_the_days_five_newest_trouble_with_the_data_first(connection):
    freeze(connection, NOW)
    minutes = {"BTC": 1, "ETH": 2, "kPEPE": 3, "SOL": 3, "HYPE": 4, "xyz:GOLD": 5}
    for asset, ago in minutes.items():
        connection.execute(
            "insert into alerts (alert_ts, asset, alert_type, severity, message) values (%s, %s, 'regime_change',"
            " 'medium', '-')",
            (NOW - ago * MINUTE, asset),
        )
    for at, kind, suppressed in (
        (NOW - timedelta(hours=23), "system_stale", False),
        (NOW - DAY, "exit_cluster", False),
        (NOW, "exit_cluster", True),
    ):
        connection.execute(
            "insert into alerts (alert_ts, asset, alert_type, severity, message, suppressed)"
            " values (%s, 'SYSTEM', %s, 'high', '-', %s)",
            (at, kind, suppressed),
        )
    shown = connection.execute("select asset, alert_type from v_recent_alerts").fetchall()
    regime = "regime_change"
    assert shown == [
        ("SYSTEM", "system_stale"),
        *((asset, regime) for asset in ("BTC", "ETH", "SOL", "kPEPE")),
    ]


# --- runs that end badly, and two at once -------------------------------------------------------------------------


@pytest.fixture
def start(spawn):
    """Start `hlcli signals compute` as a process."""
    return partial(spawn, "signals", "compute")


def count(connection, where):
    (found,) = connection.execute(
        f"select count(*) from pg_stat_activity where datname = current_database() and {where}"
    ).fetchone()
    return found


@contextmanager
def held_at(database, connection, table):
    """Whoever wants to write this table waits until the block ends."""
    with psycopg.connect(database) as holder:
        holder.execute(f"lock table {table} in share row exclusive mode")
        yield lambda: until(
            lambda: count(connection, "wait_event_type = 'Lock'"), f"a run that writes {table}"
        )


def told(connection):
    """All that does not depend on when it was computed and how fast."""
    tables = everything(connection, without=("created_at", "computation_ms", "id"))
    for row in tables["alerts"]:
        kept = json.loads(row["signal_snapshot"])
        kept.pop("computation_ms", None)
        row["signal_snapshot"] = kept
    return tables


def test_a_killed_run_leaves_nothing_that_the_next_does_not_mend(compute, start, database, connection):
    put(connection, growing((-10, -5)), after=T - 40 * FIVE)
    compute()
    whole = told(connection)
    assert whole["alerts"]
    for table, stored in (("signal_contributors", 0), ("alerts", 1), ("alert_state", 1)):
        begin_again(connection)
        with held_at(database, connection, table) as arrived:
            process = start()
            arrived()
            process.kill()
            process.wait(30)
        until(
            lambda: not count(connection, "pid <> pg_backend_pid()"), "the end of the killed run's sessions"
        )
        # The windows and the alerts are a unit each: there is all of it or nothing.
        assert len(dump(connection, "signals")) == stored * len(whole["signals"])
        assert len(dump(connection, "signal_contributors")) == stored * len(whole["signal_contributors"])
        assert alerts(connection) == []
        assert state(connection, "regime_change", "last_evaluated_ts") == (None,)
        compute()
        assert told(connection) == whole
    assert [run["status"] for run in runs(connection, CHANNEL.name)][1:] == ["abandoned", "ok"] * 3


def test_of_two_runs_at_once_one_is_skipped(compute, settings, start, database, connection):
    put(connection, QUIET, after=T - 4 * FIVE)
    with held_at(database, connection, "signals") as arrived:
        first = start()
        arrived()
        assert compute().status == "skipped"
        with pytest.raises(LockedError):
            compute(fail_if_locked=True)
    assert first.wait(60) == 0
    assert [(run["status"], run["exit_code"]) for run in runs(connection, CHANNEL.name)] == [
        ("ok", 0),
        ("skipped", 0),
        ("skipped", 6),
    ]
    assert len(rows_of(connection, "1")) == 3


# --- from the exchange to the signals -----------------------------------------------------------------------------


@pytest.fixture
def market():
    with Simulator(vaults=1, wallets=60, weight_per_minute=1_000_000) as running:
        yield running


ASSETS = ("BTC", "kPEPE", "xyz:GOLD")


def test_what_the_wallets_of_the_exchange_did_is_what_is_stored(settings, market, connection, monkeypatch):
    """Universe, a quarter of an hour of snapshots, signals: against the exchange's own positions and the reference."""
    size = 24
    made = settings(**market.env(), **PLENTY, HLCLI_ASSETS=",".join(ASSETS))
    # A fixed moment: what the simulated crowd does follows from the clock, and not at every time is all of it at work.
    end = datetime(2026, 10, 26, 7, 20, tzinfo=UTC)

    def clock(moment):
        """Shift the exchange's clock and that of the database for every connection that is opened from now on."""
        offset = moment - datetime.now(UTC)
        market.clock_offset_ms = offset // timedelta(milliseconds=1)
        monkeypatch.setenv("PGOPTIONS", f"-c hlcli.clock_offset={offset.total_seconds():.3f}s")

    clock(end - 3 * FIVE)
    refresh_universe.refresh_universe(made, refresh_universe.Options(size=size))
    minutes = [end - back * MINUTE for back in range(14, -1, -1)]
    for minute in minutes:
        clock(minute + timedelta(seconds=15))
        assert snapshot.snapshot(made, snapshot.Options()).details["minute"] == minute
    clock(end + LAG + timedelta(seconds=1))
    report = compute_signals(made, Options())
    assert report.details["windows"] == 2
    assert report.details["skipped"] == {"0 of 5 snapshots in the window before": 1}

    windows = [end - 2 * FIVE, end - FIVE, end]
    positions = {
        (asset, address, at): (market.wallets.position(address, asset, int(at.timestamp() * 1000)), False)
        for asset in ASSETS
        for address in market.wallets.top(size)
        for at in windows
    }
    expected, contributors, _ = signal_oracle.compute(
        positions, dict.fromkeys(windows, (5, 0, size, True)), {}
    )
    cursor = connection.execute("select * from signals")
    names = [column.name for column in cursor.description]
    stored = {row[:3]: dict(zip(names, row, strict=True)) for row in cursor}
    assert stored.keys() == expected.keys()
    assert len(stored) == 2 * len(ASSETS) * 2
    assert any(row["reducer_count"] and row["add_long_count"] for row in stored.values())
    for key, row in expected.items():
        for name, value in row.items():
            if name == "reasons":
                assert not value
            elif name == "flat_count" or value is None or isinstance(value, (bool, str)):
                assert stored[key][name] == value, (key, name)
            else:
                assert stored[key][name] == pytest.approx(Decimal(float(value)), abs=Decimal("2e-6")), (
                    key,
                    name,
                )
    held = {
        row[:2]: row[2:]
        for row in connection.execute(
            "select signal_ts, asset, count_add_long, count_add_short, count_reducers, count_flat"
            " from signal_contributors"
        )
    }
    assert held == contributors
    assert connection.execute("select health_state from v_latest_health").fetchone() == ("stale",)
    assert_ledger_adds_up(connection)
    assert_nothing_left(connection)
