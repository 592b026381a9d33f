"""Recorded answers about wallets, served byte for byte, go through the real jobs; the digits arrive as served."""

from __future__ import annotations

import io
import json

import pytest
from vault_tables import PLENTY, assert_ledger_adds_up, exact
from wallet_tables import (
    LEADERBOARD,
    MINUTE_MS,
    STATE,
    Clock,
    assert_minutes_add_up,
    assert_universe_agrees,
    ranked,
    rejected,
    snapshot_row,
    stored_snapshots,
    stored_universe,
    watch,
)

from hlcli.jobs.refresh_universe import Options as UniverseOptions
from hlcli.jobs.refresh_universe import refresh_universe
from hlcli.jobs.snapshot import Options, snapshot
from hlcli.sim import Fault, Simulator
from hlcli.sources import wire
from hlcli.sources.wallets import best

WALLET = "0x" + "a" * 40


@pytest.fixture
def hyperliquid(recorded):
    return recorded / "hyperliquid"


def as_text(body):
    return json.loads(body, parse_float=str, parse_int=str)


def files_of(folder):
    found = sorted(folder.glob("*.json"))
    assert found
    return found


def test_recorded_positions_are_stored_digit_for_digit(hyperliquid, settings, connection, monkeypatch):
    files = files_of(hyperliquid / STATE)
    watch(connection, [WALLET])
    seen = set()
    with Simulator(vaults=1, wallets=1, weight_per_minute=100_000, now_ms=MINUTE_MS) as sim:
        clock = Clock(sim, monkeypatch)
        for minute, path in enumerate(files):
            body = path.read_bytes()
            served = as_text(body)
            sim.clear_faults()
            sim.add_fault(Fault(STATE, "replace", times=None, body=body))
            coins = [entry["position"]["coin"] for entry in served["assetPositions"]]
            assets = sorted({*coins, "ETH"})
            clock.set(minute)
            report = snapshot(settings(**sim.env(), **PLENTY), Options(assets=assets))
            assert report.status == "ok", path.name
            stored = stored_snapshots(connection, minute=minute)
            assert stored == {
                (WALLET, asset): snapshot_row(WALLET, asset, served, minute) for asset in assets
            }, path.name
            for entry in served["assetPositions"]:
                position = entry["position"]
                assert stored[WALLET, position["coin"]]["position_szi"] == exact(position["szi"])
            seen |= {row["position_szi"][0] for row in stored.values()}
    assert rejected(connection) == []
    assert_ledger_adds_up(connection)
    assert_minutes_add_up(connection)
    # Some recorded wallet is long, one short, one flat.
    assert {"-", "0"} < seen


def test_recorded_leaderboards_are_ranked_and_stored_digit_for_digit(hyperliquid, settings, connection):
    for path in files_of(hyperliquid / "leaderboard"):
        body = path.read_bytes()
        served = as_text(body)["leaderboardRows"]
        found = best(wire.items(io.BytesIO(body), "leaderboardRows"), len(served))
        assert (found.listed, found.rejected) == (len(served), []), path.name
        expected = ranked(served, len(served))
        assert found.wallets["wallet_id"].to_list() == [row["wallet_id"] for row in expected]
        with Simulator(vaults=1, wallets=1) as sim:
            sim.add_fault(Fault(LEADERBOARD, "replace", times=None, body=body))
            # Another size, another universe: no churn.
            options = UniverseOptions(size=len(served), accept_short_list=True)
            assert refresh_universe(settings(**sim.env(), **PLENTY), options).status == "ok", path.name
        assert stored_universe(connection) == expected, path.name
        assert_universe_agrees(connection)
    assert rejected(connection) == []
    assert_ledger_adds_up(connection)
