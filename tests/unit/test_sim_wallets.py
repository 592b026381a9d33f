"""The simulated wallets: the leaderboard, the positions minute by minute, and the clock they follow."""

import gzip
import json
import re
import subprocess
import sys
import time
from collections import Counter
from decimal import Decimal

import pytest
import requests

from hlcli.sim import Fault, Simulator
from hlcli.sim.wallets import COINS, WalletUniverse
from hlcli.sim.weights import base_weight, request_weight
from hlcli.sim.wire import encode

MINUTE = 60_000
HOUR = 60 * MINUTE
NOW_MS = 1_794_000_000_000 // HOUR * HOUR
LEADERBOARD = "/Mainnet/leaderboard"
UNKNOWN_ADDRESS = "0x" + "0" * 40
MAIN_COINS = [coin.name for coin in COINS[""]]
ZEROS = {"accountValue": "0.0", "totalNtlPos": "0.0", "totalRawUsd": "0.0", "totalMarginUsed": "0.0"}
UNPROCESSABLE = "Failed to deserialize the JSON body into the target type"


@pytest.fixture(scope="module")
def universe():
    return WalletUniverse(1, 300, lambda: NOW_MS)


@pytest.fixture
def sim():
    with Simulator(vaults=5, wallets=80, now_ms=NOW_MS) as simulator:
        yield simulator


@pytest.fixture
def http_session():
    with requests.Session() as session:
        session.trust_env = False
        yield session


def ask(sim, session, user, **more):
    request = {"type": "clearinghouseState", "user": user, **more}
    return session.post(sim.info_url, json=request, timeout=5)


def ask_batch(sim, session, users, **more):
    request = {"type": "batchClearinghouseStates", "users": users, **more}
    return session.post(sim.info_url, json=request, timeout=5)


def states(universe, time_ms, dex=""):
    return [universe.clearinghouse_state(address, dex, time_ms) for address in universe.addresses]


def positions(state):
    return [entry["position"] for entry in state["assetPositions"]]


def month(row):
    return Decimal(dict(row["windowPerformances"])["month"]["pnl"])


# --- shapes ------------------------------------------------------------------------------------------------


def shape(value, where="$"):
    """Every path of a JSON value with the kind of what stands there; the entries of a list share a path."""
    if isinstance(value, dict):
        return {where}.union(*(shape(inner, f"{where}.{name}") for name, inner in value.items()))
    if isinstance(value, list):
        return {where}.union(*(shape(inner, f"{where}[]") for inner in value))
    if isinstance(value, str) and re.fullmatch(r"-?\d+\.\d+", value):
        return {f"{where} decimal text"}
    return {f"{where} {type(value).__name__}"}


def test_the_shape_tells_apart_what_differs():
    assert shape({"a": ["1.0"]}) == {"$", "$.a", "$.a[] decimal text"}
    assert len({frozenset(shape(value)) for value in ("1.0", "1", 1, None, [], {})}) == 5


def test_leaderboard_rows_have_the_recorded_shape(universe, recorded):
    files = sorted((recorded / "hyperliquid/leaderboard").glob("*.json"))
    served = json.loads(universe.list_body)
    theirs = set().union(*(shape(json.loads(file.read_text("utf-8"))) for file in files))
    assert shape(served) == theirs
    order = [list(row) for file in files for row in json.loads(file.read_text("utf-8"))["leaderboardRows"]]
    assert all(list(row) == order[0] for row in served["leaderboardRows"])


def test_states_have_the_recorded_shape(universe, recorded):
    bodies = {
        file.stem: json.loads(file.read_text("utf-8"))
        for file in (recorded / "hyperliquid/clearinghouseState").glob("*.json")
    }
    assert len(bodies.pop("pysdk_2023-03")["assetPositions"]) > 1  # another shape, no longer served
    theirs = set().union(*map(shape, bodies.values()))
    ours = set().union(*map(shape, states(universe, NOW_MS)))
    # No isolated position was recorded.
    assert ours - theirs == {"$.assetPositions[].position.leverage.rawUsd decimal text"}
    assert theirs <= ours
    empty = universe.clearinghouse_state(UNKNOWN_ADDRESS, "", bodies["rotki_empty_dex_main"]["time"])
    assert encode(empty) == encode(bodies["rotki_empty_dex_main"])


# --- the leaderboard ---------------------------------------------------------------------------------------


def test_the_leaderboard_is_indented_by_two_and_its_names_are_not_escaped(universe):
    body = universe.list_body.decode()
    assert body == json.dumps(json.loads(body), indent=2, ensure_ascii=False)


def test_the_leaderboard_is_sorted_by_nothing(universe):
    rows = json.loads(universe.list_body)["leaderboardRows"]
    assert [row["ethAddress"] for row in rows] == universe.addresses
    assert len(set(universe.addresses)) == 300
    columns = [
        universe.addresses,
        [month(row) for row in rows],
        [Decimal(row["accountValue"]) for row in rows],
    ]
    for column in columns:
        assert column not in (sorted(column), sorted(column, reverse=True))


def test_amounts_carry_the_noise_of_doubles(universe):
    rows = json.loads(universe.list_body)["leaderboardRows"]
    digits = Counter(
        len(text.partition(".")[2])
        for row in rows
        for _, window in row["windowPerformances"]
        for text in (row["accountValue"], *window.values())
    )
    assert max(digits) == 10
    assert digits[10] > 500


def test_a_small_leaderboard_has_the_odd_rows():
    rows = json.loads(WalletUniverse(5, 40, lambda: NOW_MS).list_body)["leaderboardRows"]
    names = [row["displayName"] for row in rows]
    assert None in names
    assert any(ord(char) > 0xFFFF for name in names if name for char in name)
    assert any(name and "@" in name for name in names)
    assert any(name and {"\u202e", "\x1b", "\x07", "\n"} <= set(name) for name in names)
    absurd = [row for row in rows if Decimal(row["accountValue"]) > 9_000_000_000]
    assert [row["ethAddress"][:20] for row in absurd] == ["0x200000000000000000"]


def test_the_best_are_unambiguous_and_a_few_further_down_are_tied(universe):
    rows = json.loads(universe.list_body)["leaderboardRows"]
    ranked = sorted(rows, key=lambda row: (-month(row), row["ethAddress"]))
    assert universe.top(300) == [row["ethAddress"] for row in ranked]
    assert universe.top(7) == universe.top(300)[:7]
    best = [month(row) for row in ranked[:201]]
    assert best == sorted(set(best), reverse=True)
    assert best[199] > 0
    tied = sum(count for count in Counter(map(month, rows)).values() if count > 1)
    assert 10 <= tied <= 40


def test_the_top_of_many_has_no_ties():
    crowd = WalletUniverse(2, 5000, lambda: NOW_MS)
    pnls = sorted((month(row) for row in json.loads(crowd.list_body)["leaderboardRows"]), reverse=True)
    assert len(set(pnls[:3500])) == 3500


def test_a_row_follows_from_the_seed_and_its_place_alone(universe):
    again = WalletUniverse(1, 300, lambda: NOW_MS + 5 * HOUR)
    assert again.list_body == universe.list_body
    assert WalletUniverse(1, 400, lambda: NOW_MS).wallets[:300] == universe.wallets
    other = WalletUniverse(2, 300, lambda: NOW_MS)
    assert sum(address in other.addresses for address in universe.addresses) == 8  # the exchange's own


def test_nothing_is_built_before_it_is_asked_for():
    simulator = Simulator(vaults=1, wallets=10**12)
    assert not {"addresses", "wallets", "list_body"} & set(vars(simulator.wallets))


def test_thirty_thousand_rows_are_as_large_as_the_real_list():
    body = WalletUniverse(1, 30_000, lambda: NOW_MS).list_body
    assert 23e6 < len(body) < 30e6
    assert body.count(b'"ethAddress"') == 30_000


def test_the_leaderboard_has_validators_and_compression(sim, http_session):
    url = sim.url + LEADERBOARD
    assert url == sim.stats_url + "/leaderboard"
    plain = http_session.get(url, headers={"Accept-Encoding": "identity"}, timeout=5)
    assert (plain.content, plain.headers.get("Content-Encoding")) == (sim.wallets.list_body, None)
    packed = http_session.get(url, headers={"Accept-Encoding": "gzip"}, timeout=5, stream=True)
    assert packed.headers["Content-Encoding"] == "gzip"
    assert gzip.decompress(packed.raw.read(decode_content=False)) == plain.content
    tag = plain.headers["ETag"]
    same = http_session.get(url, headers={"If-None-Match": tag}, timeout=5)
    assert (same.status_code, same.content) == (304, b"")
    sim.add_fault(Fault(LEADERBOARD, "shrink", share=0.5))
    short = http_session.get(url, headers={"If-None-Match": tag}, timeout=5)
    assert (short.status_code, len(short.json()["leaderboardRows"])) == (200, 40)
    assert sim.exchange.window.used == 0


# --- positions ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dex", ["", "xyz"])
def test_a_state_shows_the_positions_that_are_not_flat(universe, rng, dex):
    time_ms = NOW_MS + rng.randrange(10**10)
    filled = 0
    for address, state in zip(universe.addresses, states(universe, time_ms, dex), strict=True):
        assert state["time"] == time_ms
        shown = {one["coin"]: Decimal(one["szi"]) for one in positions(state)}
        held = {coin.name: universe.position(address, coin.name, time_ms) for coin in COINS[dex]}
        assert shown == {coin: size for coin, size in held.items() if size != 0}
        filled += bool(shown)
    assert 0 < filled < 300


def test_sums_reconcile_to_the_digit(universe, rng):
    time_ms = NOW_MS + rng.randrange(10**10)
    decimals = {coin.name: coin.size_decimals for coin in COINS[""]}
    isolated = 0
    for state in states(universe, time_ms):
        held = positions(state)
        crossed = [one for one in held if one["leverage"]["type"] == "cross"]
        fixed = [one for one in held if one not in crossed]
        isolated += len(fixed)
        for one in held:
            size, value, profit = (Decimal(one[name]) for name in ("szi", "positionValue", "unrealizedPnl"))
            price = universe.price(one["coin"], time_ms)
            assert value == abs(size) * price
            assert -size.as_tuple().exponent <= max(1, decimals[one["coin"]])
            tick = Decimal(1).scaleb(decimals[one["coin"]] - 6)
            assert abs(size * (price - Decimal(one["entryPx"])) - profit) <= abs(size) * tick
            assert one["leverage"]["value"] <= one["maxLeverage"]
            leverage, cost = one["leverage"]["value"], value - profit.copy_sign(profit * size)
            margin = cost / leverage + profit if one in fixed else value / leverage
            assert 0 <= margin - Decimal(one["marginUsed"]) < Decimal("0.000001")
            assert abs(profit * leverage / cost - Decimal(one["returnOnEquity"])) < Decimal("1e-10")
        for one in fixed:
            size = Decimal(one["szi"])
            raw = Decimal(one["leverage"]["rawUsd"])
            assert raw + size * universe.price(one["coin"], time_ms) == Decimal(one["marginUsed"]) > 0
            assert (raw < 0) == (size > 0)
        whole, cross = state["marginSummary"], state["crossMarginSummary"]
        for summary, those in ((whole, held), (cross, crossed)):
            value = sum(Decimal(one["positionValue"]) for one in those)
            signed = sum(Decimal(one["positionValue"]).copy_sign(Decimal(one["szi"])) for one in those)
            assert Decimal(summary["totalNtlPos"]) == value
            assert Decimal(summary["totalMarginUsed"]) == sum(Decimal(one["marginUsed"]) for one in those)
            assert Decimal(summary["accountValue"]) == Decimal(summary["totalRawUsd"]) + signed
        apart = sum(Decimal(one["marginUsed"]) for one in fixed)
        assert Decimal(whole["accountValue"]) - Decimal(cross["accountValue"]) == apart
        assert Decimal(cross["accountValue"]) >= Decimal(state["crossMaintenanceMarginUsed"])
        assert Decimal(state["withdrawable"]) >= 0
    assert isolated > 20


def test_a_liquidation_price_lies_on_the_losing_side_or_is_null(universe, rng):
    time_ms = NOW_MS + rng.randrange(10**10)
    seen = Counter()
    for state in states(universe, time_ms):
        for one in positions(state):
            seen[one["liquidationPx"] is None] += 1
            if one["liquidationPx"] is not None:
                away = Decimal(one["liquidationPx"]) - universe.price(one["coin"], time_ms)
                assert away * Decimal(one["szi"]) < 0
                assert Decimal(one["liquidationPx"]) > 0
    assert min(seen[True], seen[False]) > 20


def test_positions_stand_for_whole_minutes_and_for_three_of_them_at_least(universe, rng):
    start = NOW_MS + rng.randrange(10**5) * MINUTE
    stretches = Counter()
    for address in universe.addresses[:60]:
        coin = rng.choice(MAIN_COINS)
        sizes = [universe.position(address, coin, start + step * MINUTE) for step in range(400)]
        again = [
            universe.position(address, coin, start + step * MINUTE + rng.randrange(MINUTE))
            for step in range(400)
        ]
        assert again == sizes
        changes = [step for step in range(1, 400) if sizes[step] != sizes[step - 1]]
        stretches.update(later - before for before, later in zip(changes, changes[1:], strict=False))
    assert min(stretches) >= 3
    assert max(stretches) > 60


def test_wallets_add_reduce_close_turn_round_and_some_never_trade_a_coin(universe):
    moves, idle = Counter(), 0
    for address in universe.addresses[:80]:
        sizes = [universe.position(address, "BTC", NOW_MS + step * 3 * MINUTE) for step in range(300)]
        idle += not any(sizes)
        for before, now in zip(sizes, sizes[1:], strict=False):
            if before == now:
                continue
            if before == 0:
                moves["open"] += 1
            elif now == 0:
                moves["close"] += 1
            elif before * now < 0:
                moves["turn"] += 1
            else:
                moves["add" if abs(now) > abs(before) else "reduce"] += 1
    assert min(moves[kind] for kind in ("open", "close", "turn", "add", "reduce")) > 15
    assert 10 < idle < 50


def test_a_third_to_a_half_hold_each_main_coin_at_any_minute(universe, rng):
    for coin in MAIN_COINS:
        for _ in range(10):
            time_ms = rng.randrange(2 * 10**12)
            held = sum(universe.position(address, coin, time_ms) != 0 for address in universe.addresses)
            assert 0.3 < held / 300 < 0.55


def test_the_crowd_leans_one_way_and_then_the_other(universe):
    for coin in MAIN_COINS:
        longs = []
        for hour in range(24):
            held = [universe.position(one, coin, NOW_MS + hour * HOUR) for one in universe.addresses]
            longs.append(sum(size > 0 for size in held) / sum(size != 0 for size in held))
        assert min(longs) < 0.45
        assert max(longs) > 0.55


def test_an_unknown_wallet_and_an_unknown_dex_look_empty(sim, http_session):
    empty = {
        "marginSummary": ZEROS,
        "crossMarginSummary": ZEROS,
        "crossMaintenanceMarginUsed": "0.0",
        "withdrawable": "0.0",
        "assetPositions": [],
        "time": NOW_MS,
    }
    wallet = sim.wallets.addresses[0]
    assert ask(sim, http_session, UNKNOWN_ADDRESS).json() == empty
    assert ask(sim, http_session, wallet, dex="nowhere").json() == empty
    assert ask(sim, http_session, wallet).json() != empty
    assert sim.wallets.position(UNKNOWN_ADDRESS, "BTC", NOW_MS) == 0
    with pytest.raises(KeyError):
        sim.wallets.position(wallet, "DOGE", NOW_MS)


def test_the_main_dex_needs_no_name_and_addresses_come_in_any_case(sim, http_session):
    wallet = next(one for one in sim.wallets.addresses if sim.wallets.position(one, "BTC", NOW_MS))
    answers = [
        ask(sim, http_session, wallet),
        ask(sim, http_session, wallet, dex=""),
        ask(sim, http_session, wallet, dex=None),
        ask(sim, http_session, "0x" + wallet[2:].upper()),
    ]
    assert {answer.content for answer in answers} == {
        encode(sim.wallets.clearinghouse_state(wallet, "", NOW_MS))
    }
    assert sim.wallets.position("0x" + wallet[2:].upper(), "BTC", NOW_MS) != 0
    other = ask(sim, http_session, wallet, dex="xyz").json()
    assert all(one["coin"].startswith("xyz:") for one in positions(other))
    assert [record.weight for record in sim.log] == [2] * 5


@pytest.mark.parametrize(
    "request_fields",
    [
        {"type": "clearinghouseState"},
        {"type": "clearinghouseState", "user": "0x12"},
        {"type": "clearinghouseState", "user": None},
        {"type": "clearinghouseState", "user": UNKNOWN_ADDRESS + "\n"},
        {"type": "clearinghouseState", "user": UNKNOWN_ADDRESS, "dex": 1},
        {"type": "batchClearinghouseStates"},
        {"type": "batchClearinghouseStates", "users": UNKNOWN_ADDRESS},
        {"type": "batchClearinghouseStates", "users": [UNKNOWN_ADDRESS, "0x12"]},
        {"type": "batchClearinghouseStates", "users": [UNKNOWN_ADDRESS, None]},
        {"type": "batchClearinghouseStates", "users": [UNKNOWN_ADDRESS] * 51},
        {"type": "batchClearinghouseStates", "users": [UNKNOWN_ADDRESS], "dex": ["xyz"]},
    ],
)
def test_requests_that_do_not_deserialize(sim, http_session, request_fields):
    answer = http_session.post(sim.info_url, json=request_fields, timeout=5)
    assert (answer.status_code, answer.text) == (422, UNPROCESSABLE)


# --- the batch ---------------------------------------------------------------------------------------------


def test_a_batch_answers_in_the_order_of_its_users(sim, http_session, rng):
    users = [*rng.sample(sim.wallets.addresses, 48), UNKNOWN_ADDRESS]
    rng.shuffle(users)
    users.append(users[0])
    for more in ({}, {"dex": "xyz"}):
        batch = ask_batch(sim, http_session, users, **more)
        assert batch.json() == [ask(sim, http_session, user, **more).json() for user in users]
    assert ask_batch(sim, http_session, []).json() == []
    assert [record.weight for record in sim.log if record.kind.startswith("batch")] == [100, 100, 20]


def test_a_batch_pays_for_each_user_before_it_is_admitted(http_session):
    with Simulator(vaults=1, wallets=60, now_ms=NOW_MS, weight_per_minute=101, clock=lambda: 0.0) as sim:
        answers = [ask_batch(sim, http_session, sim.wallets.addresses[:25]) for _ in range(3)]
        assert [answer.status_code for answer in answers] == [200, 200, 429]
        assert sim.exchange.window.peak == 100
    many = {"users": [UNKNOWN_ADDRESS] * 51}
    assert request_weight("batchClearinghouseStates", many) == 20
    assert request_weight("clearinghouseState", many) == base_weight("clearinghouseState") == 2
    assert request_weight("(unknown)", None) == 20


def test_faults_select_a_wallet_but_not_within_a_batch(sim, http_session):
    first, second = sim.wallets.addresses[:2]
    sim.add_fault(Fault("*", "status", status=500, times=None, address=first.upper()))
    assert [ask(sim, http_session, user).status_code for user in (first, second, first)] == [500, 200, 500]
    assert ask_batch(sim, http_session, [first, second]).status_code == 200
    assert [record.address for record in sim.log] == [first, second, first, None]


# --- the clock ---------------------------------------------------------------------------------------------


def test_the_clock_can_be_set(sim, http_session):
    control = sim.url + "/sim/clock"
    wallet = sim.wallets.addresses[0]
    vault = {"type": "vaultDetails", "vaultAddress": sim.vaults.addresses[0]}
    before = http_session.post(sim.info_url, json=vault, timeout=5).content
    answer = http_session.post(control, json={"offset_ms": -600_000}, timeout=5)
    assert (answer.status_code, answer.json()) == (200, {"now_ms": NOW_MS - 600_000})
    assert sim.clock_offset_ms == -600_000
    then = ask(sim, http_session, wallet)
    assert then.content == encode(sim.wallets.clearinghouse_state(wallet, "", NOW_MS - 600_000))
    sim.clock_offset_ms = 7 * HOUR
    assert ask(sim, http_session, wallet).json()["time"] == NOW_MS + 7 * HOUR
    assert ask_batch(sim, http_session, [wallet]).json()[0]["time"] == NOW_MS + 7 * HOUR
    assert http_session.post(sim.info_url, json=vault, timeout=5).content == before


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"{}",
        b'{"offset_ms": 1.5}',
        b'{"offset_ms": true}',
        b'{"offset_ms": 1, "more": 2}',
        b"[" * 9999,
    ],
)
def test_a_clock_that_cannot_be_understood_is_left_alone(sim, http_session, body):
    sim.clock_offset_ms = 5
    assert http_session.post(sim.url + "/sim/clock", data=body, timeout=5).status_code == 400
    assert sim.clock_offset_ms == 5
    assert http_session.get(sim.url + "/sim/clock", timeout=5).status_code == 404


def test_without_a_given_time_the_wallets_follow_the_real_one():
    simulator = Simulator(vaults=1, wallets=1)
    simulator.clock_offset_ms = -HOUR
    earliest = int(time.time() * 1000) - HOUR
    assert earliest <= simulator.clock_ms() <= int(time.time() * 1000) - HOUR
    assert simulator.now_ms % HOUR == 0


def test_two_processes_and_two_clocks_agree_about_a_minute(http_session):
    earlier = 3 * HOUR
    command = [sys.executable, "-m", "hlcli.sim", "--vaults", "1", "--wallets", "60", "--until-eof"]
    command += ["--now-ms", str(NOW_MS + earlier)]
    ours = Simulator(vaults=1, wallets=60, now_ms=NOW_MS).wallets
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        urls = json.loads(child.stdout.readline())
        moved = http_session.post(urls["url"] + "/sim/clock", json={"offset_ms": -earlier}, timeout=5)
        assert moved.json() == {"now_ms": NOW_MS}
        request = {"type": "batchClearinghouseStates", "users": ours.addresses[:50]}
        theirs = http_session.post(urls["info_url"], json=request, timeout=5).content
        leaderboard = http_session.get(urls["stats_url"] + "/leaderboard", timeout=5).content
        http_session.close()
        child.communicate(timeout=10)
    assert child.returncode == 0
    assert theirs == encode([ours.clearinghouse_state(user, "", NOW_MS) for user in ours.addresses[:50]])
    assert leaderboard == ours.list_body
