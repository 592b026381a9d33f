"""Invented trades between few wallets over a long time, as the fills endpoints tell of them.

All follows from the arguments. Other than in the files of `hlcli.sim.fills` every wallet begins with empty positions,
and some wallets trade very much, most a little, some never. Money, sizes and prices are counted in integers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import NamedTuple

from hlcli.sim.markets import MARKETS, PERPS, PRICES, TOKEN_FACTORS
from hlcli.sim.values import HOUR_MS, USD
from hlcli.sim.wallets import PLACES, SYSTEM_PLACE

DUST = len(MARKETS)  # the market of the dust conversions
DUST_ROWS, DUST_EVERY = 8, 4000  # rows of a conversion, and of so many rows one
DUST_PRICE = 104_730_168  # thousandths
MOST_IN_ORDER = 100
# Of every sixteen wallets one never trades; nor do those in whose place the leaderboard has a system address.
IDLE_EVERY, IDLE_PLACE = 16, 9
HEAVY_EVERY = 20  # of so many wallets one has more than a page, as far as there are fills
WHALES = (40, 34, 26)  # what these have of the rest, per cent
# Cumulated per cent of the orders that have at most so many fills.
ORDER_SIZES = ((55, 1, 1), (85, 2, 5), (97, 6, 30), (100, 31, MOST_IN_ORDER))
# Of every 64 orders, by their place.
SLICES, LIQUIDATES, NETS = range(8), range(8, 14), range(14, 16)
# Hundred-thousandths of the notional, by wallet; some makers are paid.
TAKER_RATES, MAKER_RATES = (45, 40, 35, 28), (15, 12, 0, -1, -3)
BUILDERS, BUILDER_RATE = 8, 5
SPOT_BALANCE = 10**12  # smallest units, of every wallet before its first fill
TWAP_MS = 6 * HOUR_MS
FIRST_OID, FIRST_TWAP = 180_000_000_000, 1_400_000
_BY_SHARE = tuple(place for place, market in enumerate(MARKETS) for _ in range(market.share))


class Liquidation(NamedTuple):
    wallet: int
    mark: int
    method: str


class Fill(NamedTuple):
    """One side of a trade; what is optional is None."""

    wallet: int
    market: int
    time: int
    buys: bool
    price: int
    units: int
    before: int
    direction: str
    pnl: int
    fee: int
    order: int | None  # what the hash is made of; None: no hash
    oid: int
    crossed: bool
    tid: int
    cloid: int | None = None
    builder_fee: int | None = None
    liquidation: Liquidation | None = None
    twap_id: int | None = None
    hidden: bool = False  # a slice that the slices endpoint alone serves


class Order(NamedTuple):
    """A taker and the number of its fills, all in one millisecond; none: a dust conversion.

    An order that stands alone shares its millisecond with no other.
    """

    wallet: int
    size: int
    alone: bool = False


@dataclass(frozen=True)
class World:
    """What there is to be of; times in milliseconds, the spans (begin, end, share of the orders) follow each other.

    Of a wallet at most `page` fills are in one millisecond, but in each of so many bursts one has `burst_rows`.
    """

    seed: int
    wallets: int
    fills: int
    page: int
    spans: Sequence[tuple[int, int, int]]
    bursts: int
    burst_rows: int

    def __post_init__(self) -> None:
        """ValueError where such a world cannot be."""
        if self.fills % 2 or self.wallets < 8 or self.fills < 2 * self.wallets:
            raise ValueError("an even number of fills of at least eight wallets, at least two for each")
        if self.page < 2:
            raise ValueError("a page holds at least two fills")

    def trades(self) -> Iterator[Fill]:
        """Every fill in the order of execution; the two of a trade follow each other, the taker's first."""
        return _Maker(self, Random(f"{self.seed}:user fills")).fills()


def _is_idle(wallet: int) -> bool:
    return wallet % IDLE_EVERY == IDLE_PLACE or wallet % PLACES == SYSTEM_PLACE


@dataclass
class _Maker:
    world: World
    rng: Random
    # What the wallets hold, by wallet and market.
    positions: dict[tuple[int, int], int] = field(default_factory=dict)
    # Of each wallet the latest TWAP: its number, market, side and end.
    twaps: dict[int, tuple[int, int, bool, int]] = field(default_factory=dict)
    spare: tuple[int, int] | None = None  # a tid that may come again, and its time
    number: int = 0

    def fills(self) -> Iterator[Fill]:
        rng, world = self.rng, self.world
        active = [number for number in range(world.wallets) if not _is_idle(number)]
        rng.shuffle(active)
        conversions = -(-world.fills // DUST_EVERY)
        counts = self._counts(active, world.fills - conversions * DUST_ROWS)
        orders, makers = self._split(counts, active[-1], conversions)
        others = active[:-1]
        for order, time in zip(orders, self._times(orders), strict=True):
            self.number += 1
            if order.size:
                yield from self._order(order, time, makers)
            else:
                yield from self._dust(order.wallet, rng.sample(others, DUST_ROWS // 2), time)

    def _counts(self, active: list[int], fills: int) -> dict[int, int]:
        """How many fills each wallet has: together so many."""
        rng, world = self.rng, self.world
        heavy = min(len(active) // HEAVY_EVERY, fills // (4 * world.page))
        mean = min(4.0, fills / len(active) / 8)
        counts = {wallet: 1 + int(rng.expovariate(1 / mean)) for wallet in active[len(WHALES) + heavy :]}
        for wallet in active[len(WHALES) : len(WHALES) + heavy]:
            counts[wallet] = world.page + rng.randrange(1, world.page)
        rest = fills - sum(counts.values())
        for wallet, share in zip(active, WHALES, strict=False):
            counts[wallet] = rest * share // 100
        counts[active[0]] += fills - sum(counts.values())
        return counts

    def _split(self, counts: dict[int, int], buyer: int, conversions: int) -> tuple[list[Order], list[int]]:
        """What the wallets take, as orders; and who makes, fill by fill. Both are equally many fills."""
        rng, world = self.rng, self.world
        most = max(1, min(MOST_IN_ORDER, world.page // 2))
        takes, makers = {}, []
        up = False
        for wallet, count in counts.items():
            up ^= count % 2 == 1
            takes[wallet] = (count + (count % 2 and up)) // 2
            makers += [wallet] * (count - takes[wallet])
        rng.shuffle(makers)
        bursts, orders = [], []
        for _ in range(world.bursts):
            wallet = max(takes, key=takes.__getitem__)
            if takes[wallet] < world.burst_rows:
                raise ValueError(f"{world.fills} fills are too few for {world.bursts} bursts")
            takes[wallet] -= world.burst_rows
            bursts.append(Order(wallet, world.burst_rows, alone=True))
        for wallet, count in takes.items():
            left = count
            while left:
                chance = rng.randrange(100)
                least, largest = next((a, b) for below, a, b in ORDER_SIZES if chance < below)
                size = min(rng.randint(least, largest), left, most)
                orders.append(Order(wallet, size))
                left -= size
        orders += [Order(buyer, 0, alone=True)] * conversions
        rng.shuffle(orders)
        for burst in bursts:  # early, while there are many others to trade with
            orders.insert(rng.randrange(len(orders) // 2), burst)
        return orders, makers

    def _times(self, orders: list[Order]) -> Iterator[int]:
        """A millisecond for each of the orders in turn; some share theirs with the one before."""
        rng = self.rng
        most = max(1, min(MOST_IN_ORDER, self.world.page // 2))
        shares, done, last = sum(share for _, _, share in self.world.spans), 0, 0
        within, alone = 0, True
        numbers = iter(orders)
        for place, (begin, end, share) in enumerate(self.world.spans):
            count = len(orders) * share // shares
            if place == len(self.world.spans) - 1:
                count = len(orders) - done
            done += count
            if end - begin <= count:
                raise ValueError(f"{count} orders are too many for {end - begin} milliseconds")
            for drawn in sorted(rng.randrange(begin, end - count) for _ in range(count)):
                order = next(numbers)
                joins = rng.randrange(4) == 0 and not (alone or order.alone) and within + order.size <= most
                if joins and last >= begin:
                    within += order.size
                else:
                    last, within = max(drawn, last + 1), order.size
                alone = order.alone
                yield last

    def _order(self, order: Order, time: int, makers: list[int]) -> Iterator[Fill]:
        """The fills of an order, of which each takes from the next maker."""
        rng, taker = self.rng, order.wallet
        draw = rng.getrandbits(62)
        kind = draw % 64
        market, buys, twap_id = _BY_SHARE[draw // 2**6 % 64], draw // 2**12 % 2 == 0, None
        if kind in SLICES and not order.alone:
            twap_id, market, buys, _ = self._twap(taker, time, buys=buys)
        hidden = draw // 2**13 % 2 == 0
        usual = PRICES[market]
        price = usual + usual * (time // 60_000 * 7919 % 2001 - 1000) // 50_000
        step = (usual // 50_000 + 1) * (1 if buys else -1)
        dollars = (10 + draw // 2**14 % 90) * (1, 10, 100, 1000)[draw // 2**21 % 4]
        oid = FIRST_OID + self.number * 1000
        built = market < PERPS and twap_id is None and draw // 2**23 % 12 == 0
        met: Counter[int] = Counter()
        barred = {taker}
        for number in range(order.size):
            # Few trades are of a wallet with itself.
            maker = self._maker(makers, barred if order.alone or rng.randrange(8) else set())
            met[maker] += 1
            if met[maker] == self.world.page:
                barred.add(maker)
            more = rng.getrandbits(62)
            at = price + number % MOST_IN_ORDER * step
            units = max(1, (dollars + more % 9) * USD // at)
            held = self.positions.get((taker, market), 0)
            closes = market < PERPS and units <= abs(held) and (held > 0) != buys
            tid = self._tid(more, time)
            liquidation = None
            if kind in LIQUIDATES and closes:
                method = "backstop" if draw // 2**27 % 8 == 0 else "market"
                liquidation = Liquidation(taker, at + usual // 20_000, method)
            for wallet, side in ((taker, buys), (maker, not buys)):
                crossed = side == buys
                before, direction, pnl = self._move(wallet, market, units if side else -units, at)
                if liquidation is not None and crossed:
                    direction = f"Liquidated Cross {'Long' if before > 0 else 'Short'}"
                elif kind in NETS and market < PERPS:
                    direction = "Net Child Vaults"
                # An order of the taker's has several fills here, one of a maker's (placed before) has one.
                cloid, drawn, rates = (
                    (self.number, draw, TAKER_RATES) if crossed else (more, more, MAKER_RATES)
                )
                rate = rates[wallet % len(rates)]
                in_token = side and MARKETS[market].token is not None
                yield Fill(
                    wallet,
                    market,
                    time,
                    side,
                    at,
                    units,
                    before,
                    direction,
                    pnl,
                    units * (TOKEN_FACTORS[market] if in_token else at) * rate // 100_000,
                    None if twap_id is not None else self.number,
                    oid if crossed else oid - 1 - more // 2**4 % 10**7 * 1000 - number,
                    crossed,
                    tid,
                    cloid=cloid if drawn // 2**30 % 3 == 0 else None,
                    builder_fee=units * at * BUILDER_RATE // 100_000 if built and crossed else None,
                    liquidation=liquidation,
                    twap_id=twap_id if crossed else None,
                    hidden=crossed and hidden and twap_id is not None,
                )

    def _maker(self, makers: list[int], barred: set[int]) -> int:
        """Take the next one away that is not barred (if there is any)."""
        last = len(makers) - 1
        place = next((place for place in range(last, -1, -1) if makers[place] not in barred), last)
        makers[place], makers[last] = makers[last], makers[place]
        return makers.pop()

    def _move(self, wallet: int, market: int, signed: int, price: int) -> tuple[int, str, int]:
        """What a wallet held before, what its fill does to that, and what it gains."""
        key = wallet, market
        before = self.positions.get(key, 0 if market < PERPS else SPOT_BALANCE)
        after = self.positions[key] = before + signed
        if market >= PERPS:
            return before, "Buy" if signed > 0 else "Sell", 0
        if before == 0 or (before > 0) == (signed > 0):
            return before, "Open Long" if signed > 0 else "Open Short", 0
        was, becomes = ("Long", "Short") if before > 0 else ("Short", "Long")
        pnl = min(abs(before), abs(signed)) * (price - PRICES[market]) * (1 if before > 0 else -1)
        turns = after != 0 and (after > 0) != (before > 0)
        return before, f"{was} > {becomes}" if turns else f"Close {was}", pnl

    def _tid(self, draw: int, time: int) -> int:
        """50 bits; some trades have those of another, long before."""
        if self.spare is not None and draw % 512 == 0 and self.spare[1] < time:
            tid, self.spare = self.spare[0], None
            return tid
        tid = draw // 2**12
        self.spare = self.spare or (tid, time)
        return tid

    def _twap(self, wallet: int, time: int, *, buys: bool) -> tuple[int, int, bool, int]:
        """The wallet's TWAP at this time; a new one where the last is over."""
        twap = self.twaps.get(wallet)
        if twap is None or twap[3] < time:
            market = self.rng.randrange(PERPS)
            twap = self.twaps[wallet] = FIRST_TWAP + self.number, market, buys, time + TWAP_MS
        return twap

    def _dust(self, buyer: int, sellers: list[int], time: int) -> Iterator[Fill]:
        """Small rests are converted: all with one order's number and no trade's.

        The buyer's rows differ in size and position alone.
        """
        for seller in sellers:
            units = self.rng.randrange(1, 10**6)
            held = self.positions.get((buyer, DUST), 0)
            self.positions[buyer, DUST] = held + units
            for wallet, buys, before in ((seller, False, units), (buyer, True, held)):
                yield Fill(
                    wallet,
                    DUST,
                    time,
                    buys,
                    DUST_PRICE,
                    units,
                    before,
                    "Spot Dust Conversion",
                    0,
                    0,
                    None,
                    FIRST_OID + self.number * 1000,
                    crossed=not buys,
                    tid=0,
                )
