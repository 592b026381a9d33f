"""The info endpoint of Hyperliquid's API: one POST for every question, each with its published weight.

Weights from the documentation's page on rate limits, read November 2026; see budget.py for how they are spent.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hlcli.budget import Priority
from hlcli.http import MEGABYTE

if TYPE_CHECKING:
    from collections.abc import Callable

    from hlcli.http import HttpClient

# Every other documented question weighs 20.
_BASE = {
    "l2Book": 2,
    "allMids": 2,
    "clearinghouseState": 2,
    "orderStatus": 2,
    "spotClearinghouseState": 2,
    "exchangeStatus": 2,
    "userRole": 60,
}
# One more for each so many items returned.
_ITEMS_PER_WEIGHT = {
    "recentTrades": 20,
    "historicalOrders": 20,
    "userFills": 20,
    "userFillsByTime": 20,
    "fundingHistory": 20,
    "userFunding": 20,
    "userNonFundingLedgerUpdates": 20,
    "userTwapSliceFills": 20,
    "userTwapSliceFillsByTime": 20,
    "candleSnapshot": 60,
}


def weight(kind: str, items: int = 0) -> int:
    """What a question of this type costs when it returns so many items (rounded up: the rounding is unpublished)."""
    if kind == "batchClearinghouseStates":
        return max(20, 2 * items)  # undocumented: the dearer of any question and of each wallet by itself
    per = _ITEMS_PER_WEIGHT.get(kind)
    return _BASE.get(kind, 20) + (-(-items // per) if per else 0)


def ask(
    client: HttpClient,
    url: str,
    question: dict[str, Any],
    *,
    most_items: int = 0,
    priority: Priority = Priority.NORMAL,
    timeout_s: float = 30.0,
    limit_bytes: int = 32 * MEGABYTE,
) -> Any:
    """Ask one question and return the decoded answer; `most_items` is the most that it can return.

    Raises as HttpClient.post_json() does. `null` comes back as None: the exchange has no such thing.
    """
    kind = question["type"]
    if kind in _ITEMS_PER_WEIGHT and most_items <= 0:
        raise ValueError(f"{kind}: its weight depends on how many items it can return; say most_items")
    cost_of: Callable[[Any], int] | None = None
    if kind in _ITEMS_PER_WEIGHT:

        def cost_of(answer: Any) -> int:
            return weight(kind, len(answer) if isinstance(answer, list) else 0)

    return client.post_json(
        url,
        question,
        weight=weight(kind, most_items),
        cost_of=cost_of,
        priority=priority,
        timeout_s=timeout_s,
        limit_bytes=limit_bytes,
    )
