"""How far a series fell below its own highest point."""

from __future__ import annotations

from decimal import Decimal, localcontext
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

_PLACES = Decimal("0.00000001")


def max_drawdown(values: Sequence[Decimal]) -> Decimal | None:
    """The largest fall from a running maximum, in percent of that maximum (0 to 100 for values >= 0).

    Points before the first positive value are passed over, as nothing can be lost yet. None without any.
    """
    peak, worst, seen = Decimal(0), Decimal(0), False
    with localcontext(prec=60):
        for value in values:
            peak = max(peak, value)
            if peak > 0:
                seen = True
                worst = max(worst, (peak - value) / peak)
        return (worst * 100).quantize(_PLACES) if seen else None


def returns_drawdown(account_values: Sequence[Decimal], pnls: Sequence[Decimal]) -> Decimal | None:
    """The largest fall, in percent, of an index that grows only by returns: free of deposits and withdrawals.

    Both series belong to the same times. The index chains the time-weighted return of each step, the change of the
    cumulative pnl over the account value before it (as the Global Investment Performance Standards chain
    sub-period returns); steps from an empty account count as zero, and no step can lose more than everything.
    None when the series differ in length, or hold fewer than two points or no money.
    """
    if len(account_values) != len(pnls) or len(pnls) < 2:
        return None
    index, levels, funded = Decimal(1), [Decimal(1)], False
    with localcontext(prec=60):
        for i in range(1, len(pnls)):
            if account_values[i - 1] > 0:
                funded = True
                index *= max(1 + (pnls[i] - pnls[i - 1]) / account_values[i - 1], Decimal(0))
            levels.append(index)
    return max_drawdown(levels) if funded else None
