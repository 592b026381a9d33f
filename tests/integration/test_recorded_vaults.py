"""Recorded answers of the exchange, served byte for byte, go through the real job; the digits arrive as served."""

from __future__ import annotations

import json

import pytest
from vault_tables import (
    LIST,
    METRICS,
    PLENTY,
    VAULTS,
    assert_ledger_adds_up,
    by_address,
    dump,
    exact,
    metric_row,
    rejected,
    timestamp,
)

from hlcli.jobs.ingest_vaults import Options, ingest_vaults
from hlcli.sim import Fault, Simulator


@pytest.fixture
def hyperliquid(recorded):
    return recorded / "hyperliquid"


@pytest.fixture
def serve(settings, connection):
    """Serve a body for vaultDetails, or for the list, and run the job once."""

    def run(match, body, **options):
        faults = [Fault(match, "replace", times=None, body=body)]
        with Simulator(vaults=1, weight_per_minute=100_000, faults=faults) as sim:
            report = ingest_vaults(settings(**sim.env(), **PLENTY), Options(**options))
        assert_ledger_adds_up(connection)
        return report

    return run


def as_text(body):
    return json.loads(body, parse_float=str, parse_int=str)


def names(folder, *subfolders):
    return [path for sub in subfolders for path in sorted((folder / sub).glob("*.json"))]


def test_recorded_details_are_stored_digit_for_digit(hyperliquid, serve, connection):
    files = [path for path in names(hyperliquid, "vaultDetails") if not path.name.startswith("null")]
    assert files
    for path in files:
        connection.execute(f"truncate {VAULTS}, {METRICS}")
        body = path.read_bytes()
        served = as_text(body)
        address = served["vaultAddress"]
        report = serve("vaultDetails", body, addresses=[address])
        assert report.status == "ok", path.name
        assert dump(connection, METRICS) == [metric_row(served)], path.name
        row = by_address(dump(connection, VAULTS))[address]
        assert (row["name"], row["description"], row["leader_address"]) == (
            served["name"],
            served["description"],
            served["leader"],
        )
        assert row["apr"] == exact(served["apr"])
        assert row["relationship_type"] == served["relationship"]["type"]
        assert json.loads(row["child_addresses"]) == served["relationship"]["data"]["childAddresses"]


def test_a_recorded_portfolio_is_stored_digit_for_digit(hyperliquid, serve, connection):
    files = names(hyperliquid, "portfolio")
    assert files
    address = "0x" + "a" * 40
    head = f'{{"name":"p","vaultAddress":"{address}","leader":"{address}","description":"","portfolio":'
    tail = (
        ',"apr":0.1,"followerState":null,"leaderFraction":0.5,"leaderCommission":0,"followers":[],'
        '"maxDistributable":1.5,"maxWithdrawable":0.0,"isClosed":false,"relationship":{"type":"normal"},'
        '"allowDeposits":true,"alwaysCloseOnWithdraw":false}'
    )
    for path in files:
        connection.execute(f"truncate {VAULTS}, {METRICS}")
        body = head.encode() + path.read_bytes() + tail.encode()
        serve("vaultDetails", body, addresses=[address])
        (row,) = dump(connection, METRICS)
        assert row == metric_row(as_text(body)), path.name
        # What the promise is about: more digits than a float can carry.
        assert len(row["vlm_all_time"].replace(".", "")) > 17, path.name


def test_recorded_lists_are_stored_digit_for_digit(hyperliquid, serve, connection):
    files = names(hyperliquid, "vaults")
    assert files
    for path in files:
        connection.execute(f"truncate {VAULTS}, {METRICS}")
        body = path.read_bytes()
        serve(LIST, body, limit=0, accept_short_list=True)
        rows = by_address(dump(connection, VAULTS))
        assert len(rows) == len(as_text(body)), path.name
        for entry in as_text(body):
            summary = entry["summary"]
            row = rows[summary["vaultAddress"]]
            assert row["tvl_usd"] == exact(summary["tvl"])
            assert row["apr"] == exact(entry["apr"])
            assert row["name"] == summary["name"]
            assert row["leader_address"] == summary["leader"]
            assert row["is_closed"] == str(summary["isClosed"]).lower()
            assert row["vault_create_time"] == timestamp(summary["createTimeMillis"])


def test_the_recorded_null_is_quarantined_and_stores_nothing(hyperliquid, serve, connection):
    address = "0x" + "b" * 40
    body = (hyperliquid / "vaultDetails" / "null_not_a_vault.json").read_bytes()
    serve("vaultDetails", body, addresses=[address])
    assert rejected(connection) == [("vault_metrics", f'["{address}"]', None, "not_a_vault")]
    assert dump(connection, METRICS) == []
    assert address not in by_address(dump(connection, VAULTS))
