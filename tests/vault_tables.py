"""What the vault tables must hold, computed from what the simulator serves and from none of the job's own code."""

from __future__ import annotations

import json
from decimal import Decimal
from fractions import Fraction

from psycopg import sql
from waiting import until

from hlcli.sim.wire import encode

VAULTS = "hyperliquid_vaults_discovery.vaults"
METRICS = "hyperliquid_vaults_discovery.vault_metrics"
TOP = "hyperliquid_vaults_discovery.top_500_vaults"
LIST = "/Mainnet/vaults"
CLOCK = ("created_at", "updated_at", "observed_at", "details_failed_at")
WINDOWS = {"day": "day", "week": "week", "month": "month", "allTime": "all_time"}
# Enough weight that no test waits for the budget.
PLENTY = {"HL_API_WEIGHT_PER_MINUTE": "100000"}


def dump(connection, table, without=CLOCK):
    """A whole table as sorted rows of text."""
    names = [
        name
        for (name,) in connection.execute(
            "select attname from pg_attribute where attrelid = %s::regclass and attnum > 0 and not attisdropped"
            " order by attnum",
            (table,),
        )
        if name not in without
    ]
    columns = sql.SQL(", ").join(sql.SQL("{}::text").format(sql.Identifier(name)) for name in names)
    query = sql.SQL("select {} from {}").format(columns, sql.Identifier(*table.split(".")))
    rows = [dict(zip(names, row, strict=True)) for row in connection.execute(query)]
    return sorted(rows, key=lambda row: [value or "" for value in row.values()])


def all_tables(connection):
    """The names of all tables, but for temporary ones, of sessions that may be ending."""
    names = connection.execute(
        "select format('%I.%I', schemaname, tablename) from pg_tables"
        " where schemaname <> 'information_schema' and schemaname not like 'pg\\_%' order by 1"
    )
    return [name for (name,) in names]


def by_address(rows):
    return {row["vault_address"]: row for row in rows}


def runs(connection, channel="vaults"):
    """The ledger, oldest run first."""
    cursor = connection.execute(
        "select * from ingestion_runs where channel = %s order by started_at", (channel,)
    )
    names = [column.name for column in cursor.description]
    return [dict(zip(names, row, strict=True)) for row in cursor]


def rejected(connection):
    """The quarantine as (table, key, column, reason)."""
    return sorted(
        (table.split(".")[1], key, column, reason)
        for table, key, column, reason in connection.execute(
            "select table_name, row_key, column_name, reason from rejected_rows"
        )
    )


def assert_ledger_adds_up(connection):
    wrong = connection.execute(
        "select * from ingestion_runs where rows_served <> rows_inserted + rows_updated + rows_unchanged"
        " + rows_duplicate + rows_rejected + rows_failed"
    ).fetchall()
    assert wrong == []


def assert_nothing_left(connection):
    """No lock, no temporary table, no run that claims to be alive: only meaningful once every job has ended."""
    assert connection.execute(
        "select count(*) from pg_locks where locktype = 'advisory'"
        " and database = (select oid from pg_database where datname = current_database())"
    ).fetchone() == (0,)
    # A server clears a session away after its client has gone.
    temporary = "select relname from pg_class where relpersistence = 't'"
    until(lambda: connection.execute(temporary).fetchall() == [], "the end of temporary tables")
    assert connection.execute("select run_id from ingestion_runs where status = 'running'").fetchall() == []


def exact(served):
    """A served number as NUMERIC prints it: every digit, no exponent."""
    if served is None:
        return None
    number = Decimal(served)
    return format(abs(number) if number == 0 else number, "f")


def timestamp(milliseconds):
    """Milliseconds as timestamptz prints them in UTC, without a float on the way."""
    from datetime import UTC, datetime

    whole, part = divmod(int(milliseconds), 1000)
    fraction = f".{part:03d}".rstrip("0") if part else ""
    return f"{datetime.fromtimestamp(whole, UTC):%Y-%m-%d %H:%M:%S}{fraction}+00"


def served_list(sim):
    return json.loads(sim.vaults.list_body, parse_float=str, parse_int=str)


def served_details(sim, address):
    """The answer as it goes over the wire, numbers as the text they are served as."""
    return json.loads(encode(sim.vaults.vault_details(address)), parse_float=str, parse_int=str)


def open_addresses(sim):
    """Open vaults, the largest first: the order in which a first run asks for them."""
    entries = [entry["summary"] for entry in served_list(sim) if not entry["summary"]["isClosed"]]
    entries.sort(key=lambda summary: (-Decimal(summary["tvl"]), summary["vaultAddress"]))
    return [summary["vaultAddress"] for summary in entries]


def expected_vaults(sim, asked):
    """The table `vaults` after a run that took the whole list and asked for the details of `asked`."""
    rows = {}
    for entry in served_list(sim):
        summary = entry["summary"]
        address = summary["vaultAddress"]
        data = summary["relationship"].get("data", {})
        children = data.get("childAddresses")
        details = served_details(sim, address) if address in asked else {}
        rows[address] = {
            "vault_address": address,
            "name": summary["name"],
            "leader_address": summary["leader"],
            "description": details.get("description"),
            "tvl_usd": exact(summary["tvl"]),
            "apr": exact(entry["apr"]),
            "is_closed": str(summary["isClosed"]).lower(),
            "relationship_type": summary["relationship"]["type"],
            "parent_address": data.get("parentAddress"),
            "child_addresses": children and json.dumps(children),
            "allow_deposits": details and str(details["allowDeposits"]).lower() or None,
            "always_close_on_withdraw": details and str(details["alwaysCloseOnWithdraw"]).lower() or None,
            "vault_create_time": timestamp(summary["createTimeMillis"]),
        }
    return rows


def expected_metrics(sim, asked):
    return {address: metric_row(served_details(sim, address)) for address in asked}


def metric_row(details):
    """One row of `vault_metrics`, from an answer whose numbers are text."""
    windows = dict(details["portfolio"])
    followers = details["followers"]
    row = {
        "vault_address": details["vaultAddress"],
        "source_ts": None,
        "account_value": None,
        "apr": exact(details["apr"]),
        "max_distributable_tvl": exact(details.get("maxDistributable")),
        "max_withdrawable": exact(details["maxWithdrawable"]),
        "leader_fraction": exact(details["leaderFraction"]),
        "leader_commission": exact(details["leaderCommission"]),
        "follower_count": str(len(followers)),
        "followers_truncated": str(len(followers) >= 100).lower(),
        "is_closed": str(details["isClosed"]).lower(),
    }
    finest = next((windows[name] for name in WINDOWS if name in windows), None)
    if finest:
        at, value = finest["accountValueHistory"][-1]
        row |= {"source_ts": timestamp(at), "account_value": exact(value)}
    for name, column in WINDOWS.items():
        history = windows.get(name, {"accountValueHistory": [], "pnlHistory": [], "vlm": None})
        values = [Fraction(value) for _, value in history["accountValueHistory"]]
        pnls = [Fraction(value) for _, value in history["pnlHistory"]]
        row[f"pnl_{column}"] = exact(history["pnlHistory"][-1][1]) if pnls else None
        row[f"vlm_{column}"] = exact(history["vlm"])
        row[f"max_drawdown_{column}"] = _percent(values)
        row[f"max_drawdown_pnl_{column}"] = _percent(_index(values, pnls)) if len(pnls) > 1 else None
    return row


def _percent(values):
    """The deepest fall below an earlier maximum, by exact fractions; None without money."""
    peak, worst = Fraction(0), Fraction(-1)
    for value in values:
        peak = max(peak, value)
        if peak > 0:
            worst = max(worst, 1 - value / peak)
    return None if worst < 0 else format(Decimal(round(worst * 10**10)).scaleb(-8), ".8f")


def _index(values, pnls):
    """1 grown by each step's profit over the value before it; empty when there never was any."""
    if not any(value > 0 for value in values[:-1]):
        return []
    levels = [Fraction(1)]
    for before, old, new in zip(values, pnls, pnls[1:], strict=False):
        grown = 1 + (new - old) / before if before > 0 else Fraction(1)
        levels.append(levels[-1] * max(grown, Fraction(0)))
    return levels
