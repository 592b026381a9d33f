"""The fills endpoints: what wallets traded, page by page.

A row is what the exchange serves of a fill: ``{"coin", "px", "sz", "side", "time", "startPosition", "dir",
"closedPnl", "hash", "oid", "crossed", "fee", "tid", "feeToken", "twapId"}`` and, where there is one, ``cloid``,
``builderFee`` with ``builder``, and ``liquidation``. Amounts are decimal text, times milliseconds.

`userFillsByTime` keeps silent about half of the TWAP slices, which only `userTwapSliceFillsByTime` serves, for 13 days.
"""

from __future__ import annotations

import threading
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from decimal import Decimal
from hashlib import sha256
from typing import Any, Literal, NamedTuple, TypeVar

from hlcli.sim.answers import Answer, BadRequestError, InfoHandler, address_field
from hlcli.sim.markets import MARKETS
from hlcli.sim.user_trades import BUILDERS, DUST, Fill, World
from hlcli.sim.values import DAY_MS, address_of, amount, decimal_text

PAGE_LIMIT, HISTORY_LIMIT = 2000, 10_000
SLICES_MS = 13 * DAY_MS
EARLIEST_MS = 1_698_796_800_000  # 2023-11-01
BEGINS_MS, ENDS_MS = 1_752_969_600_000, 1_753_660_800_000  # 2025-07-20 and 28
RECENT_MS, RECENT_PER_CENT = 10 * DAY_MS, 25
ZERO_HASH = "0x" + 64 * "0"
# Of each market the name, the decimals of sizes and prices, and what a buyer of spot pays fees in.
_COINS = [(market.name, market.size_decimals, 6 - market.size_decimals, market.token) for market in MARKETS]
_DUST = ("@142", 10, 3, None)
Row = dict[str, Any]
_Item = TypeVar("_Item")
Order = Literal["oldest_first", "newest_first"]


class _Shelf(NamedTuple):
    """The fills of a wallet that an endpoint knows of, oldest first, and their times."""

    fills: list[Fill]
    times: list[int]

    def between(
        self, start_ms: int, end_ms: int, now_ms: int, history_limit: int | None = None
    ) -> list[Fill]:
        """Those of a range, both ends inclusive, as far as they are among the newest so many at this time."""
        last = bisect_right(self.times, now_ms)
        first = 0 if history_limit is None else max(0, last - history_limit)
        return self.fills[
            max(first, bisect_left(self.times, start_ms)) : min(last, bisect_right(self.times, end_ms))
        ]


class _Wallet(NamedTuple):
    every: list[Fill]
    fills: _Shelf
    slices: _Shelf


_NOBODY = _Wallet([], _Shelf([], []), _Shelf([], []))


class UserFills:
    """Wallets and their fills; they follow from the arguments and are made when first asked for.

    `fills` counts rows (even: two for a trade). They lie in [begins_ms, ends_ms), and where `recent_before_ms` is
    more than a day after that, some quarter of them in the ten days before it. Of a wallet at most `page_limit` are
    in one millisecond, but for so many `bursts`: milliseconds with `burst_rows` (by default 9/8 pages) of one wallet.

    Of what userFills and userFillsByTime have of a wallet they serve only the newest `history_limit` (None: all).
    With the `order` newest_first a range is served as if the request said `reversed`. ValueError where such a world
    cannot be; with too many bursts not before it is made.
    """

    def __init__(
        self,
        seed: int = 1,
        *,
        wallets: int = 120,
        fills: int = 20_000,
        begins_ms: int = BEGINS_MS,
        ends_ms: int = ENDS_MS,
        recent_before_ms: int | None = None,
        page_limit: int = PAGE_LIMIT,
        history_limit: int | None = HISTORY_LIMIT,
        order: Order = "oldest_first",
        bursts: int = 0,
        burst_rows: int | None = None,
    ) -> None:
        if begins_ms < EARLIEST_MS or (history_limit is not None and history_limit < 1):
            raise ValueError("fills begin in November 2023, and a history holds at least one")
        spans: Sequence[tuple[int, int, int]] = [(begins_ms, ends_ms, 100)]
        if recent_before_ms is not None and recent_before_ms > ends_ms + DAY_MS:
            recent = max(ends_ms, recent_before_ms - RECENT_MS), recent_before_ms, RECENT_PER_CENT
            spans = [(begins_ms, ends_ms, 100 - RECENT_PER_CENT), recent]
        burst_rows = page_limit * 9 // 8 + 1 if burst_rows is None else burst_rows
        self.seed = seed
        self.page_limit = page_limit
        self.history_limit = history_limit
        self.order = order
        self.addresses = [address_of(seed, "wallet", number) for number in range(wallets)]
        self._world = World(seed, wallets, fills, page_limit, spans, bursts, burst_rows)
        self._lock = threading.Lock()
        self._wallets: dict[str, _Wallet] | None = None

    def info_handlers(self, clock_ms: Callable[[], int]) -> dict[str, InfoHandler]:
        """The info types it answers, by the clock: what is later does not exist yet."""

        def handler(answer: Callable[[Mapping[str, Any], int], list[Any]]) -> InfoHandler:
            def handle(request: Mapping[str, Any]) -> Answer:
                items = answer(request, clock_ms())
                return Answer(items, len(items))

            return handle

        return {
            "userFills": handler(self._newest),
            "userFillsByTime": handler(self._by_time),
            "userTwapSliceFills": handler(self._newest_slices),
            "userTwapSliceFillsByTime": handler(self._slices_by_time),
        }

    def fills_of(self, address: str) -> list[Row]:
        """Every fill of a wallet as a row with its "user", in the order of execution, whoever serves it."""
        return [self._with_user(fill) for fill in self._wallet(address).every]

    def served_of(self, address: str, now_ms: int) -> list[Row]:
        """Those of them that the endpoints together serve at this time.

        The newest `history_limit` of what is not silent, and the slices of the last 13 days.
        """
        wallet = self._wallet(address)
        kept = self._kept(wallet, 0, now_ms, now_ms) + self._kept_slices(wallet, 0, now_ms, now_ms)
        numbers = {id(fill) for fill in kept}
        return [self._with_user(fill) for fill in wallet.every if id(fill) in numbers]

    def rows(self) -> Iterator[Row]:
        """The rows of all wallets as fills_of() has them, wallet by wallet."""
        for address in self.addresses:
            yield from self.fills_of(address)

    def _newest(self, request: Mapping[str, Any], now_ms: int) -> list[Row]:
        fills = self._kept(self._wallet(address_field(request, "user")), 0, now_ms, now_ms)
        return self._rows(request, fills, newest_first=True)

    def _by_time(self, request: Mapping[str, Any], now_ms: int) -> list[Row]:
        wallet, start_ms, end_ms, newest_first = self._range(request, now_ms)
        fills = self._kept(wallet, start_ms, end_ms, now_ms)
        return self._rows(request, fills, newest_first=newest_first)

    def _newest_slices(self, request: Mapping[str, Any], now_ms: int) -> list[Row]:
        slices = self._kept_slices(self._wallet(address_field(request, "user")), 0, now_ms, now_ms)
        return [self._slice(fill) for fill in self._page(slices, newest_first=True)]

    def _slices_by_time(self, request: Mapping[str, Any], now_ms: int) -> list[Row]:
        wallet, start_ms, end_ms, newest_first = self._range(request, now_ms)
        slices = self._kept_slices(wallet, start_ms, end_ms, now_ms)
        return [self._slice(fill) for fill in self._page(slices, newest_first=newest_first)]

    def _range(self, request: Mapping[str, Any], now_ms: int) -> tuple[_Wallet, int, int, bool]:
        """The wallet, the first and the last millisecond, and whether the newest come first."""
        wallet = self._wallet(address_field(request, "user"))
        start_ms, end_ms = request.get("startTime"), request.get("endTime")
        if type(start_ms) is not int or start_ms < 0:
            raise BadRequestError("startTime")
        if end_ms is not None and (type(end_ms) is not int or end_ms < 0):
            raise BadRequestError("endTime")
        newest_first = _flag(request, "reversed") or self.order == "newest_first"
        return wallet, start_ms, now_ms if end_ms is None else end_ms, newest_first

    def _kept(self, wallet: _Wallet, start_ms: int, end_ms: int, now_ms: int) -> list[Fill]:
        return wallet.fills.between(start_ms, end_ms, now_ms, self.history_limit)

    def _kept_slices(self, wallet: _Wallet, start_ms: int, end_ms: int, now_ms: int) -> list[Fill]:
        return wallet.slices.between(max(start_ms, now_ms - SLICES_MS), end_ms, now_ms)

    def _page(self, items: list[_Item], *, newest_first: bool) -> list[_Item]:
        return items[::-1][: self.page_limit] if newest_first else items[: self.page_limit]

    def _rows(self, request: Mapping[str, Any], fills: list[Fill], *, newest_first: bool) -> list[Row]:
        if _flag(request, "aggregateByTime"):
            return self._page(_aggregated([self._row(fill) for fill in fills]), newest_first=newest_first)
        return [self._row(fill) for fill in self._page(fills, newest_first=newest_first)]

    def _wallet(self, address: str) -> _Wallet:
        with self._lock:
            if self._wallets is None:
                self._wallets = self._made()
        return self._wallets.get(address, _NOBODY)

    def _made(self) -> dict[str, _Wallet]:
        lists: list[list[Fill]] = [[] for _ in self.addresses]
        for fill in self._world.trades():
            lists[fill.wallet].append(fill)
        return {
            address: _Wallet(
                fills,
                _shelf([fill for fill in fills if not fill.hidden]),
                _shelf([fill for fill in fills if fill.twap_id is not None]),
            )
            for address, fills in zip(self.addresses, lists, strict=True)
        }

    def _with_user(self, fill: Fill) -> Row:
        return {"user": self.addresses[fill.wallet], **self._row(fill)}

    def _slice(self, fill: Fill) -> Row:
        return {"fill": {**self._row(fill), "twapId": None}, "twapId": fill.twap_id}

    def _row(self, fill: Fill) -> Row:
        dust = fill.market == DUST
        coin, decimals, price_decimals, token = _DUST if dust else _COINS[fill.market]
        in_token = token is not None and fill.buys
        row: Row = {
            "coin": coin,
            "px": decimal_text(fill.price, price_decimals),
            "sz": decimal_text(fill.units, decimals),
            "side": "B" if fill.buys else "A",
            "time": fill.time,
            "startPosition": decimal_text(fill.before, decimals),
            "dir": fill.direction,
            "closedPnl": amount(fill.pnl),
            "hash": ZERO_HASH if fill.order is None else "0x" + self._digest("hash", fill.order),
            "oid": fill.oid,
            "crossed": fill.crossed,
            "fee": decimal_text(fill.fee, 8 if in_token else 6),
            "tid": fill.tid,
            "feeToken": token if in_token else "USDC",
            "twapId": fill.twap_id,
        }
        if fill.cloid is not None:
            row["cloid"] = "0x" + self._digest("cloid", fill.cloid)[:32]
        if fill.builder_fee is not None:
            row["builderFee"] = amount(fill.builder_fee)
            row["builder"] = address_of(self.seed, "builder", fill.oid // 1000 % BUILDERS)
        if fill.liquidation is not None:
            row["liquidation"] = {
                "liquidatedUser": self.addresses[fill.liquidation.wallet],
                "markPx": decimal_text(fill.liquidation.mark, price_decimals),
                "method": fill.liquidation.method,
            }
        return row

    def _digest(self, kind: str, number: int) -> str:
        return sha256(f"{self.seed}:{kind}:{number}".encode()).hexdigest()


def _shelf(fills: list[Fill]) -> _Shelf:
    return _Shelf(fills, [fill.time for fill in fills])


def _flag(request: Mapping[str, Any], name: str) -> bool:
    value = request.get(name)
    if value is not None and not isinstance(value, bool):
        raise BadRequestError(name)
    return bool(value)


def _aggregated(rows: list[Row]) -> list[Row]:
    """One row for all fills of an order in a millisecond: sums, and the mean price."""
    groups: dict[tuple[object, ...], list[Row]] = {}
    for row in rows:
        # Conversions of dust share an order without being parts of it.
        part = len(groups) if row["tid"] == 0 else None
        groups.setdefault((row["time"], row["coin"], row["oid"], row["side"], part), []).append(row)
    return [group[0] if len(group) == 1 else _merged(group) for group in groups.values()]


def _merged(group: list[Row]) -> Row:
    size = sum(Decimal(row["sz"]) for row in group)
    mean = sum(Decimal(row["px"]) * Decimal(row["sz"]) for row in group) / size
    digits = max(len(row["px"].partition(".")[2]) for row in group)
    sums: Row = {
        name: f"{sum(Decimal(row[name]) for row in group):f}"
        for name in ("sz", "closedPnl", "fee", "builderFee")
        if name in group[0]
    }
    return {**group[0], **sums, "px": f"{mean:.{digits}f}"}
