"""What the sources of wallets make of an answer: a ranking, and the positions of one wallet."""

from __future__ import annotations

import io
import itertools
import json
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hlcli.http import BadPayloadError
from hlcli.sources import wallets, wire
from hlcli.sources.wallets import Question, best, positions, questions

WALLET = "0x" + "a" * 40


def listed(number, pnl="1.0", **more):
    """A row of the leaderboard; ... takes a field away."""
    row = {
        "ethAddress": f"0x{number:040x}",
        "accountValue": "10.5",
        "windowPerformances": [["week", {"pnl": "9e9"}], ["month", {"pnl": pnl, "roi": "0.5", "vlm": "1"}]],
        "displayName": None,
    } | more
    return {name: value for name, value in row.items() if value is not ...}


def months(pnl, roi="0.5"):
    return [["month", {"pnl": pnl, "roi": roi}]]


def held(**position):
    return {"type": "oneWay", "position": {"coin": "BTC", "szi": "1.5", **position}}


def told(*entries, assets=("BTC",), **more):
    """The positions read out of an answer with these entries."""
    return positions(Question(WALLET, "", assets), {"assetPositions": list(entries), "time": 5, **more})


# --- best() -------------------------------------------------------------------------------------------------------


def test_the_best_are_ranked_by_pnl_of_30_days_and_equal_ones_by_address():
    rows = [listed(3, "5.0"), listed(2, "5.00"), listed(9, "-1"), listed(7, "5.0000000001"), listed(1, "-2")]
    found = best(rows, 4)
    assert found.wallets.select("wallet_id", "rank", "month_pnl").rows() == [
        (f"0x{number:040x}", str(place), pnl)
        for place, (number, pnl) in enumerate(((7, "5.0000000001"), (2, "5.00"), (3, "5.0"), (9, "-1")), 1)
    ]
    assert (found.listed, found.rejected) == (5, [])


@given(
    st.lists(st.tuples(st.integers(0, 30), st.decimals(-100, 100, places=3)), min_size=1), st.integers(1, 40)
)
def test_any_list_is_ranked_as_sorting_all_of_it_would(pairs, size):
    first = {}
    for number, pnl in pairs:
        first.setdefault(number, pnl)
    order = sorted(first, key=lambda number: (-first[number], number))[:size]
    found = best([listed(number, str(pnl)) for number, pnl in pairs], size)
    assert found.wallets["wallet_id"].to_list() == [f"0x{number:040x}" for number in order]
    assert found.wallets["rank"].to_list() == [str(place) for place in range(1, len(order) + 1)]
    assert found.listed == len(first)


def test_numbers_wider_than_a_double_are_told_apart_and_kept():
    rows = [listed(1, "9007199254740992.0000000001"), listed(2, "9007199254740992.0000000002")]
    assert best(rows, 2).wallets["month_pnl"].to_list() == [
        "9007199254740992.0000000002",
        "9007199254740992.0000000001",
    ]


def test_a_mixed_case_address_is_the_same_wallet_and_comes_first_once():
    row = listed(0xABCDEF, "1")
    again = row | {
        "ethAddress": row["ethAddress"].upper().replace("0X", "0x"),
        "windowPerformances": months("9"),
    }
    found = best([row, again], 5)
    assert found.wallets.select("wallet_id", "month_pnl").rows() == [(row["ethAddress"], "1")]
    assert found.listed == 1


UNUSABLE = {
    "null": (None, "wallet_id", "not_an_address"),
    "a number": (7, "wallet_id", "not_an_address"),
    "no address": (listed(1, ethAddress=...), "wallet_id", "not_an_address"),
    "a short address": (listed(1, ethAddress="0x12"), "wallet_id", "not_an_address"),
    "a long address": (listed(1, ethAddress="0x" + "a" * 41), "wallet_id", "not_an_address"),
    "an address and a line break": (listed(1, ethAddress=WALLET + "\n"), "wallet_id", "not_an_address"),
    "no windows": (listed(1, windowPerformances=...), "month_pnl", "null"),
    "no month": (listed(1, windowPerformances=[["day", {"pnl": "1"}]]), "month_pnl", "null"),
    "a month of null": (listed(1, windowPerformances=[["month", None]]), "month_pnl", "null"),
    "windows as an object": (listed(1, windowPerformances={"month": {"pnl": "1"}}), "month_pnl", "null"),
    "pnl NaN": (listed(1, "NaN"), "month_pnl", "not_a_number"),
    "pnl Infinity": (listed(1, "-Infinity"), "month_pnl", "not_a_number"),
    "pnl 1e400": (listed(1, "1e400"), "month_pnl", "not_a_number"),
    "pnl empty": (listed(1, ""), "month_pnl", "not_a_number"),
    "pnl true": (listed(1, True), "month_pnl", "not_a_number"),
    "pnl and a line break": (listed(1, "5\n"), "month_pnl", "not_a_number"),
    "pnl in Arabic digits": (listed(1, "١"), "month_pnl", "not_a_number"),
    "roi text": (listed(1, windowPerformances=months("1", "much")), "month_roi", "not_a_number"),
    "account value 1_000": (listed(1, accountValue="1_000"), "account_value", "not_a_number"),
}


@pytest.mark.parametrize(("row", "column", "reason"), UNUSABLE.values(), ids=UNUSABLE)
def test_an_unusable_row_costs_only_itself(row, column, reason):
    found = best([listed(5, "2"), row, listed(6, "1")], 10)
    assert [(each.column, each.reason) for each in found.rejected] == [(column, reason)]
    assert found.wallets["rank"].to_list() == ["1", "2"]
    assert found.listed == 2


NAMES = {"NUL": "a\x00b", "a lone surrogate": "a\ud800b", "1 MB": "x" * 1_000_000}


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_a_name_that_cannot_be_stored_costs_only_the_name(name):
    found = best([listed(5, displayName=name)], 10)
    assert found.wallets["display_name"].to_list() == [None]
    assert [(each.column, each.reason) for each in found.rejected] == [("display_name", "invalid_text")]


@pytest.mark.parametrize("name", ["", " ", "\x1b[31mred\x07", "\u202e", "👩‍🚀", "x" * 1000])
def test_any_other_name_is_kept_as_it_is(name):
    assert best([listed(5, displayName=name)], 1).wallets["display_name"].to_list() == [name]


def test_roi_and_account_value_may_be_missing():
    row = listed(1, accountValue=None, windowPerformances=[["month", {"pnl": "1"}]])
    (stored,) = best([row], 1).wallets.to_dicts()
    assert (stored["month_roi"], stored["account_value"]) == (None, None)


@pytest.mark.parametrize("rows", [[], [None], [{}] * 3], ids=["empty", "null", "objects"])
def test_a_list_without_a_wallet_is_refused(rows):
    with pytest.raises(BadPayloadError, match="empty"):
        best(rows, 10)


def test_over_a_thousand_unusable_rows_are_no_leaderboard():
    good = [listed(1)]
    assert len(best([*good, *[None] * wallets.MAX_UNUSABLE], 1).rejected) == wallets.MAX_UNUSABLE
    with pytest.raises(BadPayloadError, match="unusable"):
        best([*good, *[None] * (wallets.MAX_UNUSABLE + 1)], 1)


def test_a_list_without_end_is_refused(monkeypatch):
    monkeypatch.setattr(wallets, "MAX_LISTED", 50)
    with pytest.raises(BadPayloadError, match="over 50"):
        best((listed(number) for number in itertools.count()), 1)


# --- wire.items with a name ---------------------------------------------------------------------------------------


def items(text, name="rows"):
    return list(wire.items(io.BytesIO(text.encode()), name))


BODIES = {
    "first": '{"rows":[1,{"a":[2]}],"time":5}',
    "last": '{"time":5,"more":{"rows":[9]},"rows":[1,{"a":[2]}]}',
    "alone with white space": ' {\n "rows" : [ 1 , {"a":[2]}\r\n] \t} \n',
}


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
def test_the_named_array_is_found_wherever_it_stands(body):
    assert items(body) == [1, {"a": [2]}]


def test_the_named_array_may_be_empty_and_its_digits_are_kept():
    assert items('{"rows":[]}') == []
    assert items('{"rows":[1.10, 12345678901234567890.0000000001]}') == [
        Decimal("1.10"),
        Decimal("12345678901234567890.0000000001"),
    ]


@pytest.mark.parametrize("cut", range(1, len(BODIES["first"])))
def test_an_object_cut_anywhere_is_never_a_shorter_list(cut):
    with pytest.raises(ValueError):
        items(BODIES["first"][:cut])


@pytest.mark.parametrize(
    "body",
    [
        "",
        "null",
        "[]",
        "{}",
        '"rows"',
        '{"other":[1]}',
        '{"rows":null}',
        '{"rows":{"a":1}}',
        '{"rows":[1]} x',
        "<html>",
    ],
)
def test_what_has_no_such_array_is_refused(body):
    with pytest.raises(ValueError):
        items(body)


@pytest.mark.parametrize("chunk", [1, 2, 7])
def test_the_size_of_a_packet_changes_nothing(monkeypatch, chunk):
    monkeypatch.setattr(wire, "_CHUNK", chunk)
    for body in BODIES.values():
        assert items(body) == [1, {"a": [2]}]
    with pytest.raises(ValueError):
        items(BODIES["first"][:-1])


# --- positions() --------------------------------------------------------------------------------------------------


def test_a_position_is_told_with_its_digits_and_what_is_not_held_is_flat():
    leverage = {"type": "isolated", "value": 3, "rawUsd": "1"}
    found = told(
        held(
            szi="-0.10",
            entryPx="1.50",
            liquidationPx=None,
            leverage=leverage,
            marginUsed="2",
            positionValue="3.0",
        ),
        held(coin="SOL"),
        assets=("BTC", "ETH"),
    )
    btc, eth = found.rows
    assert {name: value for name, value in btc.items() if value is not None} == {
        "wallet_id": WALLET,
        "asset": "BTC",
        "source_ts": 5,
        "position_szi": "-0.10",
        "entry_px": "1.50",
        "leverage": 3,
        "leverage_type": "isolated",
        "margin_used": "2",
        "position_value": "3.0",
        "is_dirty": False,
    }
    assert eth == {
        "wallet_id": WALLET,
        "asset": "ETH",
        "source_ts": 5,
        "position_szi": "0",
        "is_dirty": False,
    }
    assert found.rejected == []


WHOLES = {
    "null": None,
    "an empty object": {},
    "a list": [],
    "text": "busy",
    "a number": 0,
    "positions null": {"assetPositions": None},
    "positions an object": {"assetPositions": {}},
    "an entry of null": {"assetPositions": [None]},
    "an entry without position": {"assetPositions": [{}]},
    "an entry of another shape": {"assetPositions": [{"position": []}]},
    "no coin": {"assetPositions": [{"position": {"szi": "1"}}]},
    "coin null": {"assetPositions": [held(), held(coin=None)]},
    "coin a number": {"assetPositions": [held(coin=5)]},
}


@pytest.mark.parametrize("answer", WHOLES.values(), ids=WHOLES)
def test_an_answer_that_cannot_be_understood_is_refused_as_a_whole(answer):
    with pytest.raises(BadPayloadError):
        positions(Question(WALLET, "", ("BTC",)), answer)


BAD_POSITIONS = {
    "szi missing": ([{"position": {"coin": "BTC"}}], "position_szi: null"),
    "szi null": ([held(szi=None)], "position_szi: null"),
    "szi NaN": ([held(szi="NaN")], "position_szi: not_a_number"),
    "szi Infinity": ([held(szi="Infinity")], "position_szi: not_a_number"),
    "szi empty": ([held(szi="")], "position_szi: not_a_number"),
    "szi true": ([held(szi=True)], "position_szi: not_a_number"),
    "szi a list": ([held(szi=["1"])], "position_szi: not_a_number"),
    "szi 1e400": ([held(szi="1e400")], "position_szi: not_a_number"),
    "szi and a line break": ([held(szi="1.5\n")], "position_szi: not_a_number"),
    "szi with a comma": ([held(szi="1,5")], "position_szi: not_a_number"),
    "entry price text": ([held(entryPx="cheap")], "entry_px: not_a_number"),
    "liquidation price NaN": ([held(liquidationPx="NaN")], "liq_px: not_a_number"),
    "leverage value an object": ([held(leverage={"value": {}})], "leverage: not_a_number"),
    "margin NaN": ([held(marginUsed="NaN")], "margin_used: not_a_number"),
    "value text": ([held(positionValue="x")], "position_value: not_a_number"),
    "the coin twice": ([held(), held(szi="0")], "served_twice"),
}


@pytest.mark.parametrize(("entries", "reason"), BAD_POSITIONS.values(), ids=BAD_POSITIONS)
def test_a_position_that_cannot_be_understood_is_unknown_and_no_other_is(entries, reason):
    found = told(held(coin="ETH", szi="7"), *entries, assets=("BTC", "ETH", "HYPE"))
    btc, eth, hype = found.rows
    assert (btc.get("position_szi"), btc["missing_reason"]) == (None, reason)
    assert (btc["is_dirty"], btc["dirty_reason"]) == (True, "null_szi")
    assert (eth["position_szi"], hype["position_szi"]) == ("7", "0")
    assert [(each.key, each.reason) for each in found.rejected] == [([WALLET, "BTC"], reason)]


def test_a_bad_position_of_a_coin_that_is_not_watched_is_of_no_concern():
    found = told(held(), held(coin="SOL", szi="NaN"), held(coin="SOL"))
    assert ([row["position_szi"] for row in found.rows], found.rejected) == (["1.5"], [])


@pytest.mark.parametrize("leverage", [None, "20x", [], {}, {"type": 5}, {"type": "portfolio"}])
def test_an_unknown_kind_of_leverage_is_no_reason_to_lose_the_position(leverage):
    (row,) = told(held(leverage=leverage)).rows
    assert (row["position_szi"], row["leverage"], row["leverage_type"]) == ("1.5", None, None)


@pytest.mark.parametrize("time", [None, "5", -1, True, 2**63, 5.5, [], ...])
def test_a_time_that_is_none_is_left_out(time):
    answer = {"assetPositions": [held()], "time": time}
    if time is ...:
        del answer["time"]
    (row,) = positions(Question(WALLET, "", ("BTC",)), answer).rows
    assert (row["position_szi"], row["source_ts"]) == ("1.5", None)


def test_one_question_a_dex_in_the_order_of_the_assets():
    asked = questions(WALLET, ["BTC", "xyz:GOLD", "ETH", "abc:GOLD", "xyz:TSLA"])
    assert asked == [
        (WALLET, "", ("BTC", "ETH")),
        (WALLET, "xyz", ("xyz:GOLD", "xyz:TSLA")),
        (WALLET, "abc", ("abc:GOLD",)),
    ]


def test_rows_of_a_wallet_that_could_not_be_read_are_unknown_not_flat():
    rows = wallets.unknown_rows(Question(WALLET, "", ("BTC", "ETH")), "no answer")
    assert json.loads(json.dumps(rows)) == [
        {
            "wallet_id": WALLET,
            "asset": asset,
            "missing_reason": "no answer",
            "is_dirty": True,
            "dirty_reason": "null_szi",
        }
        for asset in ("BTC", "ETH")
    ]
