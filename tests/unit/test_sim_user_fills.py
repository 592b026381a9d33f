"""The fills endpoints of the simulated exchange, against a plain model of what they promise."""

import http.client
import json
import subprocess
import sys
from collections import Counter, defaultdict
from decimal import Decimal

import pytest
import requests

from hlcli.sim import Simulator
from hlcli.sim.answers import BadRequestError
from hlcli.sim.user_fills import BEGINS_MS, EARLIEST_MS, ENDS_MS, UserFills
from hlcli.sim.values import address_of

DAY = 86_400_000
NOW_MS = 1_794_000_000_000 // 3_600_000 * 3_600_000
NOBODY = "0x" + "0" * 40
ZERO_HASH = "0x" + "0" * 64
ALWAYS = set(
    "coin px sz side time startPosition dir closedPnl hash oid crossed fee tid feeToken twapId".split()
)
PERPS = {"BTC", "ETH", "HYPE", "SOL", "kPEPE", "xyz:NFLX"}
PAGE, BURSTS, BURST_ROWS = 20, 4, 33
SMALL = {
    "wallets": 100,
    "fills": 6_000,
    "recent_before_ms": NOW_MS,
    "page_limit": PAGE,
    "bursts": BURSTS,
    "burst_rows": BURST_ROWS,
}


def world(seed, **more):
    return UserFills(seed, **{**SMALL, "history_limit": None, **more})


def asker(fills, now_ms=NOW_MS):
    """A function that asks an info type of a wallet."""
    handlers = fills.info_handlers(lambda: now_ms)

    def ask(kind, user, **more):
        answer = handlers[kind]({"type": kind, "user": user, **more})
        assert answer.items == len(answer.value)
        return answer.value

    return ask


def time_of(item):
    return item["fill"]["time"] if "fill" in item else item["time"]


def walk(ask, kind, user, page=PAGE):
    """Everything an endpoint has of a wallet, by pages from the oldest on; the tail of a full millisecond backwards."""
    got, start = [], EARLIEST_MS
    while True:
        items = ask(kind, user, startTime=start)
        if len(items) < page:
            return got + items
        last = time_of(items[-1])
        if time_of(items[0]) == last:
            tail = ask(kind, user, startTime=last, endTime=last, reversed=True)[::-1]
            while tail and tail[0] in items:  # the whole row: an endpoint has each of them once
                del tail[0]
            got += items + tail
            start = last + 1
        else:
            got += [item for item in items if time_of(item) < last]
            start = last


def key(row):
    """What makes a fill another one; rests of dust share the rest of it."""
    names = ("coin", "tid", "oid", "side", "time") + (("sz", "startPosition") if row["tid"] == 0 else ())
    return tuple(row[name] for name in names)


def plain(row):
    return {name: value for name, value in row.items() if name != "user"}


@pytest.fixture(scope="module")
def fills():
    return world(7)


@pytest.fixture(scope="module")
def rows(fills):
    return list(fills.rows())


@pytest.fixture(scope="module")
def visible(fills):
    """What userFillsByTime has of each wallet without a history limit, by hand."""
    ask = asker(fills)
    return {user: walk(ask, "userFillsByTime", user) for user in fills.addresses}


@pytest.fixture(scope="module")
def http_sim(fills):
    with Simulator(
        vaults=5, wallets=60, now_ms=NOW_MS, weight_per_minute=10**6, user_fills=fills
    ) as simulator:
        yield simulator


@pytest.fixture
def post(http_sim):
    with requests.Session() as session:
        session.trust_env = False
        yield lambda body: session.post(http_sim.info_url, json=body, timeout=5)


# --- pages -------------------------------------------------------------------------------------------------


def test_paging_by_hand_gets_everything_once(fills, visible):
    ask = asker(fills)
    pages = 0
    for user in fills.addresses:
        got = {key(row): row for row in visible[user]}
        assert len(got) == len(visible[user])
        for item in walk(ask, "userTwapSliceFillsByTime", user):
            got[key(item["fill"])] = {**item["fill"], "twapId": item["twapId"]}
        served = fills.served_of(user, NOW_MS)
        assert {row["user"] for row in served} <= {user}
        assert got == {key(row): plain(row) for row in served}
        assert [row for row in fills.fills_of(user) if row in served] == served
        pages += len(served) // PAGE
    assert pages > 100


def test_a_range_is_inclusive_and_cut_at_the_page(rng, fills, visible):
    ask = asker(fills)
    users = sorted((user for user in fills.addresses if visible[user]), key=lambda user: len(visible[user]))
    sizes = Counter()
    for _ in range(1500):
        user = rng.choice(rng.choice((users, users[-5:])))
        times = [row["time"] for row in visible[user]]
        start, end = sorted(max(0, rng.choice(times) + rng.choice((-1, 0, 0, 1))) for _ in range(2))
        backwards = rng.random() < 0.5
        wanted = [row for row in visible[user] if start <= row["time"] <= end]
        wanted = (wanted[::-1] if backwards else wanted)[:PAGE]
        asked = rng.choice(({"reversed": True}, {"reversed": True, "aggregateByTime": False}))
        asked = asked if backwards else rng.choice(({}, {"reversed": False, "aggregateByTime": None}))
        assert ask("userFillsByTime", user, startTime=start, endTime=end, **asked) == wanted
        sizes[len(wanted)] += 1
    assert sizes[PAGE] > 100
    assert sizes[1] > 20


def test_bounds_that_cross_and_wallets_without_fills_answer_nothing(fills):
    ask = asker(fills)
    assert ask("userFillsByTime", fills.addresses[0], startTime=NOW_MS, endTime=EARLIEST_MS) == []
    idle = [user for user in fills.addresses if not fills.fills_of(user)]
    assert 3 < len(idle) < 20
    for user in (NOBODY, *idle):
        for kind in ("userFills", "userTwapSliceFills"):
            assert ask(kind, user) == []
        for kind in ("userFillsByTime", "userTwapSliceFillsByTime"):
            assert ask(kind, user, startTime=0) == []


def test_an_end_after_the_clock_and_none_are_the_same(rng, fills, visible):
    user = max(visible, key=lambda user: len(visible[user]))
    now_ms = rng.choice(visible[user])["time"]
    ask = asker(fills, now_ms)
    past = [row for row in visible[user] if row["time"] <= now_ms]
    start = past[max(0, len(past) - PAGE // 2)]["time"]
    wanted = [row for row in past if row["time"] >= start][:PAGE]
    assert ask("userFillsByTime", user, startTime=start) == wanted
    assert ask("userFillsByTime", user, startTime=start, endTime=None) == wanted
    assert ask("userFillsByTime", user, startTime=start, endTime=NOW_MS) == wanted
    assert ask("userFills", user) == past[::-1][:PAGE]


def test_newest_first_is_what_reversed_gets(rng, fills, visible):
    other = asker(world(7, order="newest_first"))
    user = max(visible, key=lambda user: len(visible[user]))
    for row in rng.sample(visible[user], 50):
        wanted = [later for later in visible[user] if later["time"] >= row["time"]][::-1][:PAGE]
        assert other("userFillsByTime", user, startTime=row["time"]) == wanted
        assert other("userFillsByTime", user, startTime=row["time"], reversed=False) == wanted


@pytest.mark.parametrize("limit", [1, 7, 55, 400])
def test_only_the_newest_exist_under_a_history_limit(rng, limit, fills, visible):
    limited = world(7, history_limit=limit)
    largest = sorted(visible, key=lambda user: len(visible[user]))[-5:]
    some = set(rng.sample(fills.addresses, 12)) - {largest[-1]}
    cut = 0
    for user in some | set(largest):
        now_ms = rng.choice(visible[user])["time"] if visible[user] and user in some else NOW_MS
        ask = asker(limited, now_ms)
        past = [row for row in visible[user] if row["time"] <= now_ms]
        kept = past[-limit:]
        assert walk(ask, "userFillsByTime", user) == kept
        assert ask("userFills", user) == kept[::-1][:PAGE]
        slices = {key(item["fill"]) for item in walk(ask, "userTwapSliceFillsByTime", user)}
        together = {key(row) for row in kept} | slices
        assert {key(row) for row in limited.served_of(user, now_ms)} == together
        cut += len(kept) < len(past)
    assert cut


def test_slices_are_kept_for_13_days_and_half_of_them_are_nowhere_else(rng, fills, visible):
    ask = asker(fills)
    both = alone = 0
    for user in fills.addresses:
        shown = {key(row) for row in visible[user]}
        every = fills.fills_of(user)
        sliced = [row for row in every if row["twapId"] is not None]
        assert {key(row) for row in every} - {key(row) for row in sliced} <= shown
        assert all(row["hash"] == ZERO_HASH and row["crossed"] for row in sliced)
        kept = [row for row in sliced if row["time"] >= NOW_MS - 13 * DAY]
        wanted = [{"fill": {**plain(row), "twapId": None}, "twapId": row["twapId"]} for row in kept]
        assert walk(ask, "userTwapSliceFillsByTime", user) == wanted
        assert ask("userTwapSliceFills", user) == wanted[::-1][:PAGE]
        both += sum(key(row) in shown for row in sliced)
        alone += sum(key(row) not in shown for row in sliced)
        if kept:
            moved = asker(fills, kept[0]["time"] + 13 * DAY)
            assert moved("userTwapSliceFills", user)
            last = asker(fills, kept[-1]["time"] + 13 * DAY + 1)
            assert last("userTwapSliceFills", user) == []
    assert 0.25 < both / (both + alone) < 0.75
    assert both + alone > 100


def test_aggregated_rows_are_sums_of_an_orders_parts(fills, visible):
    ask = asker(fills)
    merged = 0
    for user in visible:
        dust = {row["time"] for row in visible[user] if row["tid"] == 0}
        for start in dust.union(row["time"] for row in visible[user][::17]):
            parts = defaultdict(list)
            raw = [row for row in visible[user] if row["time"] == start]
            for row in raw:
                place = row["startPosition"] if row["tid"] == 0 else ""
                parts[row["coin"], row["oid"], row["side"], place].append(row)
            whole = ask("userFillsByTime", user, startTime=start, endTime=start, aggregateByTime=True)
            assert len(whole) == min(PAGE, len(parts))
            for row, group in zip(whole, parts.values(), strict=False):
                for name in ("sz", "fee", "closedPnl"):
                    assert Decimal(row[name]) == sum(Decimal(part[name]) for part in group)
                prices = [Decimal(part["px"]) for part in group]
                assert min(prices) <= Decimal(row["px"]) <= max(prices)
                kept = ALWAYS - {"sz", "fee", "closedPnl", "px"}
                assert all(row[name] == group[0][name] for name in kept)
            merged += len(parts) < len(raw)
    assert merged > 50


@pytest.mark.parametrize("kind", ["userFills", "userTwapSliceFills"])
@pytest.mark.parametrize("user", [None, 5, "", "0x12", "0x" + "g" * 40, [NOBODY]])
def test_a_bad_user_is_a_bad_request(kind, user, fills):
    for name in (kind, kind + "ByTime"):
        with pytest.raises(BadRequestError):
            asker(fills)(name, user, startTime=0)


@pytest.mark.parametrize("kind", ["userFillsByTime", "userTwapSliceFillsByTime"])
@pytest.mark.parametrize(
    "more",
    [
        {},
        {"startTime": None},
        {"startTime": "0"},
        {"startTime": 1.0},
        {"startTime": True},
        {"startTime": -1},
        {"startTime": 0, "endTime": "5"},
        {"startTime": 0, "endTime": -5},
        {"startTime": 0, "reversed": "true"},
    ],
)
def test_a_bad_range_is_a_bad_request(kind, more, fills):
    with pytest.raises(BadRequestError):
        asker(fills)(kind, NOBODY, **more)


# --- over HTTP ---------------------------------------------------------------------------------------------


def test_weights_grow_with_the_items(rng, fills, visible, http_sim, post):
    for user in [NOBODY, *rng.sample(fills.addresses, 8), max(visible, key=lambda user: len(visible[user]))]:
        for kind in ("userFillsByTime", "userFills", "userTwapSliceFills", "userTwapSliceFillsByTime"):
            body = {"type": kind, "user": user.upper().replace("0X", "0x"), "startTime": EARLIEST_MS}
            response = post(body)
            assert response.status_code == 200
            assert response.json() == asker(fills)(kind, user, startTime=EARLIEST_MS)
            served = http_sim.log[-1]
            assert (served.kind, served.address) == (kind, user)
            assert served.weight == 20 + -(-len(response.json()) // 20)


def test_a_bad_request_is_422_over_http(post):
    for body in ({"user": NOBODY}, {"user": "0x1", "startTime": 0}, {"startTime": 0}):
        assert post({"type": "userFillsByTime", **body}).status_code == 422


def test_the_default_world_is_of_the_leaderboards_wallets_and_made_when_asked_for():
    simulator = Simulator(vaults=5, wallets=200, now_ms=NOW_MS)
    fills = simulator.user_fills
    assert fills._wallets is None
    listed = set(simulator.wallets.addresses)
    rows = list(fills.rows())
    assert len(rows) == 20_000
    assert len(fills.addresses) == 120
    assert {row["user"] for row in rows} <= listed
    times = [row["time"] for row in rows]
    assert all(BEGINS_MS <= time < ENDS_MS or NOW_MS - 10 * DAY <= time < NOW_MS for time in times)
    assert 2_000 < sum(time > ENDS_MS for time in times) < 8_000
    in_one_ms = Counter((row["user"], row["time"]) for row in rows)
    assert sum(count > 2000 for count in in_one_ms.values()) == 1
    dust = {row["time"] for row in rows if row["tid"] == 0}
    assert len(dust) == 5
    assert all(row["tid"] == 0 for row in rows if row["time"] in dust)


@pytest.mark.parametrize("now_ms", [BEGINS_MS - DAY, BEGINS_MS + DAY, ENDS_MS, ENDS_MS + DAY + 3_600_000])
def test_the_default_world_stands_with_any_clock(now_ms):
    simulator = Simulator(vaults=5, wallets=10, now_ms=now_ms)
    ask = asker(simulator.user_fills, now_ms)
    last = [ask("userFills", user)[:1] for user in simulator.user_fills.addresses]
    assert all(row["time"] <= now_ms for found in last for row in found)
    assert any(last) == (now_ms > BEGINS_MS)


def test_the_flags_of_the_command():
    command = [sys.executable, "-m", "hlcli.sim", "--until-eof", "--now-ms", str(NOW_MS), "--seed", "3"]
    command += ["--fill-wallets", "40", "--fills", "3000", "--page-limit", "30", "--history-limit", "45"]
    same = UserFills(3, wallets=40, fills=3000, page_limit=30, history_limit=45, recent_before_ms=NOW_MS)
    user = max(same.addresses, key=lambda address: len(same.fills_of(address)))
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        try:
            port = int(json.loads(process.stdout.readline())["url"].rpartition(":")[2])
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
            body = {"type": "userFillsByTime", "user": user, "startTime": 0}
            connection.request("POST", "/info", json.dumps(body))
            served = json.loads(connection.getresponse().read())
            connection.close()
        finally:
            process.stdin.close()
        assert process.wait(10) == 0
    assert len(served) == 30
    assert served == asker(same)("userFillsByTime", user, startTime=0)


# --- the world ---------------------------------------------------------------------------------------------


def test_all_follows_from_the_arguments(rng):
    seed = rng.randrange(1000)
    first, again, other = world(seed), world(seed, history_limit=3), world(seed + 1)
    user = first.addresses[0]
    # In another order of questions.
    assert [again.fills_of(user) for user in reversed(again.addresses)][::-1] == [
        first.fills_of(user) for user in first.addresses
    ]
    assert user == address_of(seed, "wallet", 0)
    assert {row["tid"] for row in first.rows()}.isdisjoint({row["tid"] for row in other.rows()} - {0})


def test_both_sides_of_every_trade_are_in_two_lists(rng):
    trades = defaultdict(list)
    rows = list(world(rng.randrange(1000)).rows())
    assert len(rows) == SMALL["fills"]
    for row in rows:
        if row["tid"]:
            assert 0 < row["tid"] < 2**50
            trades[row["time"], row["coin"], row["tid"]].append(row)
    for pair in trades.values():
        assert sorted(row["side"] for row in pair) == ["A", "B"]
        assert sorted(row["crossed"] for row in pair) == [False, True]
        assert len({(row["px"], row["sz"], row["hash"]) for row in pair}) == 1
        assert len({row["oid"] for row in pair}) == 2
    alone = sum(len({row["user"] for row in pair}) == 1 for pair in trades.values())
    assert 0 < alone < len(trades) // 5
    assert len({tid for _, _, tid in trades}) < len(trades)  # not unique over time


def test_positions_begin_empty_and_continue(rng):
    fills = world(rng.randrange(1000))
    turned = 0
    for user in fills.addresses:
        held = {}
        times = [row["time"] for row in fills.fills_of(user)]
        assert times == sorted(times)
        for row in fills.fills_of(user):
            before, signed = (
                Decimal(row["startPosition"]),
                Decimal(row["sz"]) * (1 if row["side"] == "B" else -1),
            )
            if row["coin"] in PERPS:
                assert before == held.get(row["coin"], 0)
                turned += before * (before + signed) < 0
                if row["dir"].startswith("Close"):
                    assert abs(before + signed) < abs(before)
                if " > " in row["dir"]:
                    assert before * (before + signed) < 0
            elif row["dir"] != "Spot Dust Conversion":
                assert before == held.get(row["coin"], before)
                assert before + signed >= 0
            held[row["coin"]] = before + signed
    assert turned


def test_a_history_that_is_cut_off_starts_with_a_position(fills, visible):
    user = max(visible, key=lambda user: len(visible[user]))
    served = world(7, history_limit=300).served_of(user, NOW_MS)
    first = {}
    for row in served:
        first.setdefault(row["coin"], row["startPosition"])
    assert any(first[coin] != "0.0" for coin in PERPS & set(first))


def test_a_fill_is_one_of_its_kind_but_for_dust(rows):
    counts = Counter(
        (row["user"], *(row[name] for name in ("coin", "tid", "oid", "side", "time"))) for row in rows
    )
    twice = {place for place, count in counts.items() if count > 1}
    assert twice
    assert {place[2] for place in twice} == {0}
    dust = [row for row in rows if row["tid"] == 0]
    for row in dust:
        assert row["dir"] == "Spot Dust Conversion"
        assert row["hash"] == ZERO_HASH
    orders = defaultdict(list)
    for row in dust:
        orders[row["oid"]].append(row)
    for group in orders.values():
        assert len({row["user"] for row in group}) > 2
        buys = [row for row in group if row["side"] == "B"]
        assert len({row["user"] for row in buys}) == 1
        names = ALWAYS - {"sz", "startPosition"}
        assert all(row[name] == buys[0][name] for row in buys for name in names)
        assert len({row["startPosition"] for row in buys}) == len(buys) > 1


@pytest.mark.parametrize("seed", [0, 1, None])
def test_milliseconds_hold_as_many_as_promised(rng, seed):
    fills = world(rng.randrange(1000) if seed is None else seed)
    counts = Counter((row["user"], row["time"]) for row in fills.rows())
    sizes = sorted(counts.values())
    assert sizes[-BURSTS:] == [BURST_ROWS] * BURSTS
    assert sizes[-BURSTS - 1] <= PAGE
    assert sum(size > 1 for size in sizes) > 500


def test_wallets_are_uneven():
    fills = UserFills(4, wallets=500, fills=20_000, page_limit=100)
    sizes = sorted(len(fills.fills_of(user)) for user in fills.addresses)
    assert sizes[0] == 0
    assert sizes[250] < 10
    assert sum(size > 100 for size in sizes) > 15
    assert sizes[-1] > 2_000


def test_rows_have_the_shape_and_the_oddities(rows):
    optional = Counter()
    for row in rows:
        names = set(row) - {"user"}
        assert names >= ALWAYS
        optional.update(names - ALWAYS)
        assert EARLIEST_MS <= row["time"] < NOW_MS
        assert 2**32 < row["oid"] < 2**53
        for name in ("px", "sz", "startPosition", "closedPnl", "fee"):
            assert "." in row[name]
            assert Decimal(row[name]).is_finite()
        assert Decimal(row["px"]) > 0
        assert Decimal(row["sz"]) > 0
    assert set(optional) == {"cloid", "builderFee", "builder", "liquidation"}
    assert min(optional.values()) > 5
    assert {"@107", "PURR/USDC", "xyz:NFLX", "#1890", "kPEPE", "@142"} <= {row["coin"] for row in rows}
    assert {"Short > Long", "Long > Short", "Net Child Vaults", "Buy", "Sell"} <= {row["dir"] for row in rows}
    assert {"USDC", "HYPE", "PURR"} <= {row["feeToken"] for row in rows}
    assert any(row["dir"].startswith("Liquidated") for row in rows)
    assert any(row["fee"].startswith("-") for row in rows)
    for row in rows:
        if "liquidation" in row:
            assert set(row["liquidation"]) == {"liquidatedUser", "markPx", "method"}
        if "cloid" in row:
            assert len(row["cloid"]) == 34


def test_rows_look_like_the_recorded_ones(recorded, rows):
    pages = [json.loads(file.read_bytes()) for file in recorded.glob("hyperliquid/userFillsByTime/*.json")]
    theirs = [row for page in pages for row in page]
    assert theirs
    kinds = {name: type(value) for row in rows for name, value in row.items() if value is not None}
    for row in theirs:
        assert ALWAYS <= set(row) <= set(kinds)
        assert all(type(value) in (kinds[name], type(None)) for name, value in row.items())
        assert len(row["hash"]) == 66
    slices = json.loads((recorded / "s3/twap_api/nautilus_ws_user_twap_slice_fills.json").read_bytes())
    for item in slices["data"]["twapSliceFills"]:
        assert set(item) == {"fill", "twapId"}
        assert ALWAYS <= set(item["fill"])
        assert item["fill"]["twapId"] is None


@pytest.mark.parametrize(
    "wrong",
    [
        {"fills": 4001},
        {"wallets": 7},
        {"fills": 20},
        {"page_limit": 1},
        {"history_limit": 0},
        {"begins_ms": 0},
    ],
)
def test_a_world_that_cannot_be_is_refused(wrong):
    with pytest.raises(ValueError):
        world(1, **wrong)


def test_too_many_bursts_are_refused():
    with pytest.raises(ValueError, match="bursts"):
        world(1, bursts=400).fills_of(NOBODY)
