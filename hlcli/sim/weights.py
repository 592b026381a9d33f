"""The published request weights, and the sliding minute in which the server counts them."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Mapping
from time import monotonic
from typing import Any

WINDOW_SECONDS = 60.0
DEFAULT_WEIGHT = 20

# Not documented, hence a guess: what the same users would cost one by one.
BATCH_KIND = "batchClearinghouseStates"
MAX_BATCH_USERS = 50

BASE_WEIGHTS: dict[str, int] = {
    "allMids": 2,
    "clearinghouseState": 2,
    "exchangeStatus": 2,
    "l2Book": 2,
    "orderStatus": 2,
    "spotClearinghouseState": 2,
    "userRole": 60,
}

ITEMS_PER_WEIGHT: dict[str, int] = {
    "candleSnapshot": 60,
    "delegatorHistory": 20,
    "delegatorRewards": 20,
    "fundingHistory": 20,
    "historicalOrders": 20,
    "nonUserFundingUpdates": 20,
    "recentTrades": 20,
    "twapHistory": 20,
    "userFills": 20,
    "userFillsByTime": 20,
    "userFunding": 20,
    "userTwapSliceFills": 20,
    "userTwapSliceFillsByTime": 20,
    "validatorStats": 20,
}


def base_weight(kind: str) -> int:
    """What a request of this info type costs before anybody knows how much it returns."""
    return BASE_WEIGHTS.get(kind, DEFAULT_WEIGHT)


def request_weight(kind: str, request: Mapping[str, Any] | None) -> int:
    """The same for one request (None: it did not parse); a batch pays for each of its users."""
    users = None if request is None else request.get("users")
    if kind == BATCH_KIND and isinstance(users, list) and 0 < len(users) <= MAX_BATCH_USERS:
        return BASE_WEIGHTS["clearinghouseState"] * len(users)
    return base_weight(kind)


def extra_weight(kind: str, items: int) -> int:
    """What the returned items cost on top.

    The rounding is not documented. Upwards is the strict reading: a client that stays inside it is safe with both.
    """
    per = ITEMS_PER_WEIGHT.get(kind)
    return 0 if per is None else -(-items // per)


class WeightWindow:
    """The weight spent in the last 60 seconds, refusing what does not fit.

    Extra weight is known only when the answer exists, so it is charged without asking and may overdraw the
    window; the next requests pay for it by waiting.
    """

    def __init__(self, limit_per_minute: int, clock: Callable[[], float] = monotonic) -> None:
        self.limit = limit_per_minute
        self._clock = clock
        self._lock = threading.Lock()
        self._spent: deque[tuple[float, int]] = deque()
        self._used = 0
        self._refused = 0
        self._peak = 0

    def admit(self, weight: int) -> bool:
        """Charge the base weight if it fits; a refused request costs nothing."""
        with self._lock:
            now = self._expire()
            if self._used + weight > self.limit:
                self._refused += 1
                return False
            self._add(now, weight)
            return True

    def charge(self, weight: int) -> None:
        """Charge what the answer turned out to cost."""
        if weight > 0:
            with self._lock:
                self._add(self._expire(), weight)

    @property
    def used(self) -> int:
        """Weight spent in the last 60 seconds."""
        with self._lock:
            self._expire()
            return self._used

    @property
    def peak(self) -> int:
        """The most that was ever spent in one window."""
        with self._lock:
            return self._peak

    @property
    def refused(self) -> int:
        """How many requests did not fit."""
        with self._lock:
            return self._refused

    def _add(self, now: float, weight: int) -> None:
        self._spent.append((now, weight))
        self._used += weight
        self._peak = max(self._peak, self._used)

    def _expire(self) -> float:
        now = self._clock()
        while self._spent and self._spent[0][0] <= now - WINDOW_SECONDS:
            self._used -= self._spent.popleft()[1]
        return now
