"""What the wallet tables must hold, computed from what the simulator serves and from none of the job's own code."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from decimal import Decimal

from vault_tables import dump, exact, timestamp

LEADERBOARD = "/Mainnet/leaderboard"
STATE = "clearinghouseState"
BATCH = "batchClearinghouseStates"
CURRENT = "wallet_universe_current"
MEMBERS = "wallet_universe_members"
UNIVERSE_RUNS = "wallet_universe_runs"
SNAPSHOTS = "wallet_snapshots"
ASSETS = ("HYPE", "BTC", "ETH")
# A minute of which no test outlives the end, because every run of a job begins at its first second.
MINUTE_MS = 1_793_000_040_000
MINUTE = datetime.fromtimestamp(MINUTE_MS / 1000, UTC)


def freeze(connection, moment):
    """Let the database's clock stand still: a limit can then be met to the microsecond."""
    connection.execute(
        "create or replace function hlcli_now() returns timestamptz language sql volatile"
        f" as $$ select timestamptz '{moment.isoformat()}' $$"
    )


class Clock:
    """Sets the clocks of the database and of the exchange to so many minutes after MINUTE."""

    def __init__(self, sim, monkeypatch):
        """`sim` must have been made with now_ms=MINUTE_MS."""
        self._sim, self._monkeypatch = sim, monkeypatch

    def set(self, minute, *, second=1.0):
        """In force for every session and process that begins from now on."""
        offset = MINUTE + timedelta(minutes=minute, seconds=second) - datetime.now(UTC)
        self._monkeypatch.setenv("PGOPTIONS", f"-c hlcli.clock_offset={offset.total_seconds():.3f}s")
        self._sim.clock_offset_ms = minute * 60_000


def shift(connection, seconds):
    """Set hlcli_now() of this connection to so many seconds after MINUTE."""
    connection.execute(
        "select set_config('hlcli.clock_offset', (%s - clock_timestamp())::text, false)",
        (MINUTE + timedelta(seconds=seconds),),
    )


def rejected(connection):
    """The quarantine as (table, key, column, reason)."""
    return sorted(
        connection.execute("select table_name, row_key, column_name, reason from rejected_rows").fetchall(),
        key=lambda row: [value or "" for value in row],
    )


# --- the universe -------------------------------------------------------------------------------------------------


def served_rows(sim):
    """The leaderboard's rows, numbers as the text they are served as."""
    return json.loads(sim.wallets.list_body, parse_float=str, parse_int=str)["leaderboardRows"]


def board(rows):
    """The body of a leaderboard of these rows; a lone surrogate is served as its escape."""
    return json.dumps({"leaderboardRows": rows})


def listed(number, pnl, **more):
    """A row of the leaderboard; ... takes a field away."""
    row = {
        "ethAddress": f"0x{number:040x}",
        "accountValue": "1000.5",
        "windowPerformances": [
            ["day", {"pnl": "1.0", "roi": "0.1", "vlm": "0.0"}],
            ["month", {"pnl": pnl, "roi": "0.25", "vlm": "7.0"}],
        ],
        "prize": 0,
        "displayName": None,
    } | more
    return {name: value for name, value in row.items() if value is not ...}


def ranked(rows, size):
    """The best `size` of these rows, in the order of the ranking; the lower address comes first among equals."""

    def month(row):
        return dict(row["windowPerformances"])["month"]

    best = sorted(rows, key=lambda row: (-Decimal(month(row)["pnl"]), row["ethAddress"].lower()))[:size]
    return [
        {
            "wallet_id": row["ethAddress"].lower(),
            "rank": str(place),
            "month_pnl": exact(month(row)["pnl"]),
            "month_roi": exact(month(row)["roi"]),
            "account_value": exact(row["accountValue"]),
            "display_name": row["displayName"],
        }
        for place, row in enumerate(best, 1)
    ]


def stored_universe(connection, table=CURRENT, run_id=None):
    """The universe in the order of its ranks, without times."""
    rows = dump(connection, table, without=("as_of_ts", "updated_at"))
    if table == MEMBERS:
        rows = [row for row in rows if row.pop("run_id") == str(run_id)]
    return sorted(rows, key=lambda row: int(row["rank"]))


def universe_runs(connection):
    """Table wallet_universe_runs, the oldest first."""
    cursor = connection.execute(f"select * from {UNIVERSE_RUNS} order by run_id")
    names = [column.name for column in cursor.description]
    return [dict(zip(names, row, strict=True)) for row in cursor]


def assert_universe_agrees(connection):
    """The current universe is what the last successful run found, and that run counts it."""
    (*_, last) = [run for run in universe_runs(connection) if run["status"] == "success"]
    current = stored_universe(connection)
    assert stored_universe(connection, MEMBERS, last["run_id"]) == current
    assert [row["rank"] for row in current] == [str(place) for place in range(1, last["n_received"] + 1)]
    assert connection.execute(f"select distinct as_of_ts, updated_at from {CURRENT}").fetchall() == [
        (last["as_of_ts"], last["as_of_ts"])
    ]


# --- snapshots ----------------------------------------------------------------------------------------------------


def watch(connection, addresses):
    """Make these wallets the universe, in this order."""
    connection.execute(f"truncate {CURRENT}")
    with connection.cursor() as cursor:
        cursor.executemany(
            f"insert into {CURRENT} (wallet_id, rank, month_pnl, as_of_ts, updated_at) values (%s, %s, 1, now(), now())",
            [(address, place) for place, address in enumerate(addresses, 1)],
        )


def state(**positions):
    """A clearinghouseState that holds these sizes; coins of a dex as keys with two underscores."""
    return {
        "assetPositions": [
            {"type": "oneWay", "position": {"coin": coin.replace("__", ":"), "szi": szi}}
            for coin, szi in positions.items()
        ],
        "time": MINUTE_MS,
    }


def dex_of(asset):
    return asset.split(":")[0] if ":" in asset else ""


def snapshot_row(address, asset, served, minute):
    """One row of wallet_snapshots, from an answer whose numbers are text."""
    row = unknown_row(address, asset, None, minute) | {"position_szi": "0", "is_dirty": "false"}
    row |= {"dirty_reason": None, "source_ts": "time" in served and timestamp(served["time"]) or None}
    for entry in served["assetPositions"]:
        position = entry["position"]
        if position["coin"] == asset:
            leverage = position.get("leverage", {})
            row |= {
                "position_szi": exact(position["szi"]),
                "entry_px": exact(position.get("entryPx")),
                "liq_px": exact(position.get("liquidationPx")),
                "leverage": exact(leverage.get("value")),
                "leverage_type": leverage.get("type"),
                "margin_used": exact(position.get("marginUsed")),
                "position_value": exact(position.get("positionValue")),
            }
    return row


def unknown_row(address, asset, reason, minute):
    """The row of a position that is not known."""
    return {
        "snapshot_ts": timestamp(MINUTE_MS + minute * 60_000),
        "wallet_id": address,
        "asset": asset,
        "position_szi": None,
        "entry_px": None,
        "liq_px": None,
        "leverage": None,
        "leverage_type": None,
        "margin_used": None,
        "position_value": None,
        "missing_reason": reason,
        "is_dirty": "true",
        "dirty_reason": "null_szi",
        "source_ts": None,
    }


def expected_snapshot(sim, addresses, assets=ASSETS, *, minute=0, unknown=()):
    """Rows of wallet_snapshots by wallet and asset; `unknown` wallets are left out, the test says what they are."""
    time_ms = MINUTE_MS + minute * 60_000
    rows = {}
    for address in addresses:
        if address in unknown:
            continue
        for asset in assets:
            served = json.loads(
                json.dumps(sim.wallets.clearinghouse_state(address, dex_of(asset), time_ms)), parse_int=str
            )
            row = snapshot_row(address, asset, served, minute)
            assert Decimal(row["position_szi"]) == sim.wallets.position(address, asset, time_ms)
            rows[address, asset] = row
    return rows


def stored_snapshots(connection, *, minute=0):
    """Rows of wallet_snapshots of one minute by wallet and asset."""
    at = timestamp(MINUTE_MS + minute * 60_000)
    return {
        (row["wallet_id"], row["asset"]): row
        for row in dump(connection, SNAPSHOTS, without=("created_at", "ingest_run_id"))
        if row["snapshot_ts"] == at
    }


def minutes(connection):
    """Table ingest_runs, the oldest first; snapshot_ts as the minutes since MINUTE."""
    cursor = connection.execute("select * from ingest_runs order by snapshot_ts")
    names = [column.name for column in cursor.description]
    rows = [dict(zip(names, row, strict=True)) for row in cursor]
    for row in rows:
        row["minute"] = (row.pop("snapshot_ts") - MINUTE) / timedelta(minutes=1)
    return rows


def anomalies(connection):
    """Table snapshot_anomalies as (minute, wallet, asset, kind, details)."""
    return sorted(
        ((at - MINUTE) / timedelta(minutes=1), *rest)
        for at, *rest in connection.execute(
            "select snapshot_ts, wallet_id, asset, anomaly_type, details from snapshot_anomalies"
        )
    )


def assert_minutes_add_up(connection):
    """Every run of a minute counts exactly what the snapshots of that minute hold."""
    wrong = connection.execute(
        f"""
        with wallet as (
            select snapshot_ts, wallet_id, count(*) as held, count(position_szi) as known,
                   count(distinct ingest_run_id) as run_ids, min(ingest_run_id) as run_id
            from {SNAPSHOTS} group by 1, 2
        ), minute as (
            select snapshot_ts, count(*) as wallets, count(*) filter (where held = known) as succeeded,
                   sum(held) as held, sum(known) as known, max(run_ids) as run_ids, min(run_id) as run_id,
                   max(run_id) as last_id
            from wallet group by 1
        )
        select * from ingest_runs r full join minute m using (snapshot_ts)
        where (r.wallets_expected, r.wallets_succeeded, r.rows_expected, r.rows_written, r.run_id, r.run_id)
              is distinct from (m.wallets, m.succeeded, m.held, m.known, m.run_id, m.last_id)
           or m.run_ids <> 1 or abs(r.coverage_pct - 100.0 * m.succeeded / m.wallets) > 0.005
        """
    ).fetchall()
    assert wrong == []
    # NULL has its reason, and only NULL; a value is dirty only with an anomaly that tells why.
    assert (
        connection.execute(
            f"""
        select * from {SNAPSHOTS} s where dirty_reason <> 'null_szi' and not exists (
            select from snapshot_anomalies a where a.snapshot_ts = s.snapshot_ts and a.wallet_id = s.wallet_id
                and a.asset = s.asset and a.anomaly_type = s.dirty_reason)
        """
        ).fetchall()
        == []
    )
