"""Drawdowns against examples worked by hand."""

from __future__ import annotations

from decimal import Decimal, getcontext, localcontext

import pytest

from hlcli.features.drawdown import max_drawdown, returns_drawdown

THIRD_OF_100 = Decimal("33.33333333")


def numbers(text):
    return [Decimal(each) for each in text.split()]


BY_HAND = {
    "nothing": ("", None),
    "one point": ("5", "0"),
    "always up": ("1 2 3", "0"),
    "flat": ("7 7 7", "0"),
    "half": ("100 50", "50"),
    "the largest of two falls, not the last": ("100 40 200 150", "60"),
    "the largest of two falls, not the first": ("100 90 200 50", "75"),
    "from the peak before, not from the start": ("10 80 20 60 40", "75"),
    "over several steps": ("100 90 80 70 120", "30"),
    "a new peak counts from there": ("100 110 99", "10"),
    "a recovery undoes nothing": ("100 20 1000", "80"),
    "everything": ("100 0", "100"),
    "a third": ("3 2", THIRD_OF_100),
    "into debt": ("100 -50", "150"),
    "zeros first": ("0 0 100 75", "25"),
    "debt first": ("-10 -20 100 75", "25"),
    "only zeros": ("0 0", None),
    "only debt": ("-5 -1 -9", None),
    "dust": ("0.00000001 0.000000005", "50"),
    "huge": ("1e30 9e29", "10"),
}


@pytest.mark.parametrize(("values", "expected"), BY_HAND.values(), ids=BY_HAND)
def test_the_largest_fall_from_the_highest_point(values, expected):
    assert max_drawdown(numbers(values)) == (None if expected is None else Decimal(expected))


def test_no_digit_of_a_long_value_is_lost():
    # One part in 10^10 of a value with 20 digits: a float, or the default 28 digits squared, would see no fall.
    assert max_drawdown(
        numbers("99999999999999999999.0000000001 99999999989999999999.0000000001")
    ) == Decimal("0.00000001")


def test_the_result_has_eight_places_and_the_callers_precision_does_not_matter(monkeypatch):
    monkeypatch.setattr(getcontext(), "prec", 3)
    assert max_drawdown(numbers("3 2")) == THIRD_OF_100
    assert str(max_drawdown(numbers("100 50"))) == "50.00000000"
    assert returns_drawdown(numbers("3 2"), numbers("0 -1")) == THIRD_OF_100
    assert getcontext().prec == 3


def test_scale_does_not_matter(rng):
    values = [Decimal(rng.randrange(1, 10**9)) / 1000 for _ in range(50)]
    assert max_drawdown(values) == max_drawdown([value * 1000 for value in values])


def test_it_is_the_worst_of_all_pairs(rng):
    values = [Decimal(rng.randrange(1, 100_000)) for _ in range(40)]
    worst = max((a - b) / a for i, a in enumerate(values) for b in values[i:])
    assert max_drawdown(values) == (worst * 100).quantize(Decimal("0.00000001"))


# --- of returns ---------------------------------------------------------------------------------------------------

RETURNS_BY_HAND = {
    # account values, cumulative pnls, percent
    "nothing": ("", "", None),
    "one point": ("100", "0", None),
    "one loss": ("100 90", "0 -10", "10"),
    "two losses chain": ("100 90 81", "0 -10 -19", "19"),
    "a gain, then a loss": ("100 200 150", "0 100 50", "25"),
    "only gains": ("100 110 121", "0 10 21", "0"),
    "a pnl that did not start at zero": ("100 90", "1000 990", "10"),
    "from an empty account": ("0 100 50", "0 0 -50", "50"),
    "never any money": ("0 0 0", "0 0 0", None),
    "money only at the end": ("0 0 100", "0 0 0", None),
    "in debt only": ("-5 -6", "0 -1", None),
    "a step out of debt counts as zero": ("100 -20 50 40", "0 0 -500 -510", "20"),
    "everything": ("100 0", "0 -100", "100"),
    "more than everything": ("100 -50", "0 -150", "100"),
    "after everything nothing comes back": ("100 0 100 200", "0 -100 -100 0", "100"),
    "series of different length": ("100 90", "0 -10 -20", None),
    "a third": ("3 2", "0 -1", THIRD_OF_100),
}


@pytest.mark.parametrize(("accounts", "pnls", "expected"), RETURNS_BY_HAND.values(), ids=RETURNS_BY_HAND)
def test_the_largest_fall_of_chained_returns(accounts, pnls, expected):
    found = returns_drawdown(numbers(accounts), numbers(pnls))
    assert found == (None if expected is None else Decimal(expected))


def test_a_withdrawal_is_no_fall():
    accounts, pnls = numbers("100 10 10"), numbers("0 0 0")
    assert max_drawdown(accounts) == 90
    assert returns_drawdown(accounts, pnls) == 0


def test_a_deposit_hides_no_fall():
    # A deposit of 900 while a quarter is lost: the account only ever grew.
    accounts, pnls = numbers("100 975 975"), numbers("0 -25 -25")
    assert max_drawdown(accounts) == 0
    assert returns_drawdown(accounts, pnls) == 25


def test_deposits_and_withdrawals_of_any_size_change_nothing(rng):
    """The same returns on accounts with and without money coming and going show the same fall."""
    rates = [Decimal(rng.randrange(-30, 31)) / 100 for _ in range(30)]

    def history(flows):
        accounts, pnls = [Decimal(1000)], [Decimal(0)]
        for rate, flow in zip(rates, flows, strict=True):
            pnls.append(pnls[-1] + accounts[-1] * rate)
            accounts.append(accounts[-1] * (1 + rate) * flow)
        return accounts, pnls

    with localcontext(prec=400):  # every product exact
        still = history([Decimal(1)] * 30)
        moving = history([Decimal(rng.randrange(1, 1000)) / 100 for _ in rates])
    expected = max_drawdown(still[0])
    assert expected > 0
    assert returns_drawdown(*still) == expected
    assert returns_drawdown(*moving) == expected


def test_the_level_of_the_cumulative_pnl_does_not_matter(rng):
    accounts = [Decimal(rng.randrange(100, 200)) for _ in range(20)]
    pnls = [Decimal(rng.randrange(-20, 20)) for _ in range(20)]
    assert returns_drawdown(accounts, pnls) == returns_drawdown(accounts, [pnl + 10**12 for pnl in pnls])


def test_the_given_series_are_left_alone():
    accounts, pnls = numbers("100 -5 90"), numbers("0 -10 -10")
    returns_drawdown(accounts, pnls)
    max_drawdown(accounts)
    assert (accounts, pnls) == (numbers("100 -5 90"), numbers("0 -10 -10"))
