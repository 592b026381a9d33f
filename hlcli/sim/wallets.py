"""The simulated wallets: the leaderboard that stats-data serves and the answers to ``clearinghouseState``.

The leaderboard follows from (seed, index). A position follows from (seed, wallet, coin, minute of the clock), in
closed form: whoever asks for one minute needs none of the minutes before it. A wallet trades a coin in rounds of
six steps that last equally long: it opens, adds, reduces, sometimes turns round, and is flat at the end. Which way
it opens is drawn against the crowd's bias in that coin at that time.

Everything is counted in integers: money in millionths of a dollar, sizes in the coin's smallest unit, and prices
in the tick that makes size times price millionths of a dollar.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from decimal import Decimal
from functools import cached_property
from hashlib import sha256
from random import Random
from typing import Any, NamedTuple

from hlcli.sim.answers import Answer, BadRequestError, Document, InfoHandler, address_field
from hlcli.sim.values import HOUR_MS, MINUTE_MS, USD, address_of, amount, decimal_text, noisy
from hlcli.sim.weights import BATCH_KIND, MAX_BATCH_USERS


class Coin(NamedTuple):
    """A perpetual: its digits, its usual price in ticks, and who trades it how."""

    name: str
    size_decimals: int
    price: int
    max_leverage: int
    traders: int  # per cent of the wallets
    bias_minutes: int  # how long the crowd takes from one mind to the other and back

    @property
    def price_decimals(self) -> int:
        """Size times price has six decimals."""
        return 6 - self.size_decimals


MAIN_DEX = ""
COINS: dict[str, tuple[Coin, ...]] = {
    MAIN_DEX: (
        Coin("HYPE", 2, 345_000, 10, 65, 11 * 60),
        Coin("BTC", 5, 865_750, 40, 65, 13 * 60),
        Coin("ETH", 4, 301_250, 25, 65, 7 * 60),
        Coin("SOL", 2, 1_380_000, 20, 65, 9 * 60),
        Coin("kPEPE", 0, 4_348, 10, 65, 17 * 60),
    ),
    "xyz": (
        Coin("xyz:GOLD", 4, 407_150, 20, 30, 19 * 60),
        Coin("xyz:TSLA", 3, 401_250, 10, 30, 5 * 60),
    ),
}
_BY_NAME = {coin.name: coin for coins in COINS.values() for coin in coins}

# Minutes a step lasts; the long ones are frequent, so that a crowd of which nearly half hold does not leave at once.
DWELLS = (3, 8, 15, 25, 40, 60, 60, 75, 90, 90, 120, 120)
# Each round in per cent of the wallet's usual size; it starts from flat and ends flat.
ROUNDS = (
    (50, 100, 100, 60, 0, 0),
    (100, 100, 150, 150, 75, 0),
    (40, 80, 120, 0, 0, 0),
    (100, 60, -80, -80, -40, 0),
    (0, 0, 100, 100, 100, 0),
)
STEPS = 6
MOST_BIASED = 94
# Period in minutes and height in millionths: 7 % in all, less than an isolated position at 3x can lose.
PRICE_WAVES = ((2963, 50_000), (401, 15_000), (37, 4_000), (7, 700))

WINDOWS = ("day", "week", "month", "allTime")
MONTH = WINDOWS.index("month")
# Odd rows come at fixed places of every forty, so that a small universe has them.
PLACES = 40
EMOJI_PLACE, MAIL_PLACE, CONTROL_PLACE, SYSTEM_PLACE, IDLE_PLACE = 3, 7, 11, 13, 29
TIED_PLACES = (35, 37)
TIED_LOSS = -12_345_678_901
SYSTEM_VALUE = 10_000_000_000 * USD
# A prime just below a million: multiples modulo it give every row a fraction of a dollar of its own.
FRACTIONS = 999_983

_NAMES = ("Sable", "quiet.hand", "0xHeron", "Night Desk", "量化猫", "delta zero", "Mistral", "ABC")


class Wallet(NamedTuple):
    """A row of the leaderboard; profits and volumes by window."""

    address: str
    name: str | None
    account_value: int
    profits: tuple[int, ...]
    volumes: tuple[int, ...]


class Habit(NamedTuple):
    """How a wallet trades a coin: its usual size, the minutes of a step, and where its rounds begin."""

    size: int
    dwell: int
    phase: int
    leverage: int
    isolated: bool


class Holding(NamedTuple):
    """An open position; ``size`` is negative when short, ``cost`` is what it was worth when it was entered."""

    coin: Coin
    habit: Habit
    size: int
    cost: int
    price: int
    opened: int
    changed: int

    @property
    def side(self) -> int:
        """1 long, -1 short."""
        return 1 if self.size > 0 else -1

    @property
    def value(self) -> int:
        """What it is worth now, whichever side."""
        return abs(self.size) * self.price

    @property
    def profit(self) -> int:
        """Not yet realized."""
        return self.side * (self.value - self.cost)

    @property
    def margin(self) -> int:
        """Margin used; that of an isolated position breathes with its profit."""
        if self.habit.isolated:
            return self.cost // self.habit.leverage + self.profit
        return self.value // self.habit.leverage

    @property
    def maintenance(self) -> int:
        """Half the initial margin at the greatest leverage."""
        return self.value // (2 * self.coin.max_leverage)


class WalletUniverse:
    """All wallets of one simulated exchange, at whatever time its clock shows (milliseconds)."""

    def __init__(self, seed: int, count: int, clock_ms: Callable[[], int]) -> None:
        self.seed = seed
        self.count = count
        self._clock_ms = clock_ms

    # All are built when they are first asked for: most tests never do.
    @cached_property
    def addresses(self) -> list[str]:
        """Every address, in the order of the leaderboard."""
        return [_address(self.seed, index) for index in range(self.count)]

    @cached_property
    def wallets(self) -> list[Wallet]:
        """Every row of the leaderboard."""
        return [make_wallet(self.seed, index) for index in range(self.count)]

    @cached_property
    def list_body(self) -> bytes:
        """The leaderboard, indented by two as stats-data serves it."""
        rows = ",\n".join(map(_row, self.wallets))
        return f'{{\n  "leaderboardRows": [\n{rows}\n  ]\n}}'.encode()

    @cached_property
    def _known(self) -> frozenset[str]:
        return frozenset(self.addresses)

    def top(self, n: int) -> list[str]:
        """The addresses with the greatest profit of the month; equal profits in the order of the addresses."""
        ranked = sorted(self.wallets, key=lambda wallet: (-wallet.profits[MONTH], wallet.address))
        return [wallet.address for wallet in ranked[:n]]

    def document(self) -> Document:
        """The leaderboard as a file."""
        return Document(lambda: self.list_body, self._clock_ms() // HOUR_MS * HOUR_MS)

    def info_handlers(self) -> dict[str, InfoHandler]:
        """The info types this module answers."""
        return {
            "clearinghouseState": self._answer_state,
            BATCH_KIND: self._answer_batch,
            "allMids": self._answer_mids,
        }

    def _answer_mids(self, request: Mapping[str, Any]) -> Answer:
        coins = COINS.get(_dex_field(request), ())
        return Answer({coin.name: str(self.price(coin.name, self._clock_ms())) for coin in coins})

    def _answer_state(self, request: Mapping[str, Any]) -> Answer:
        address, dex = address_field(request, "user"), _dex_field(request)
        return Answer(self.clearinghouse_state(address, dex, self._clock_ms()))

    def _answer_batch(self, request: Mapping[str, Any]) -> Answer:
        users, dex = request.get("users"), _dex_field(request)
        if not isinstance(users, list) or len(users) > MAX_BATCH_USERS:
            raise BadRequestError("users")
        addresses = [address_field({"user": user}, "user") for user in users]
        now_ms = self._clock_ms()
        return Answer([self.clearinghouse_state(address, dex, now_ms) for address in addresses])

    def position(self, address: str, coin: str, time_ms: int) -> Decimal:
        """The signed size a wallet holds of a coin (KeyError: no such coin) at a time; 0 when flat or unknown."""
        traded = _BY_NAME[coin]
        path = self._path(address.lower(), traded, time_ms // MINUTE_MS)
        return Decimal(path[-1][1]).scaleb(-traded.size_decimals) if path else Decimal(0)

    def price(self, coin: str, time_ms: int) -> Decimal:
        """The price of a coin (KeyError: no such coin) at a time."""
        traded = _BY_NAME[coin]
        return Decimal(self._ticks(traded, time_ms // MINUTE_MS)).scaleb(-traded.price_decimals)

    def clearinghouse_state(self, address: str, dex: str, time_ms: int) -> dict[str, Any]:
        """The answer to ``clearinghouseState``; an unknown wallet or dex looks like an empty account."""
        address, minute = address.lower(), time_ms // MINUTE_MS
        coins = COINS.get(dex, ())
        holdings = [held for coin in coins if (held := self._holding(address, coin, minute)) is not None]
        account = self._deposit(address, dex) + sum(held.profit for held in holdings)
        crossed = [held for held in holdings if not held.habit.isolated]
        cross_account = account - sum(held.margin for held in holdings if held.habit.isolated)
        maintenance = sum(held.maintenance for held in crossed)
        spare = cross_account - sum(held.margin for held in crossed)
        return {
            "marginSummary": _summary(account, holdings),
            "crossMarginSummary": _summary(cross_account, crossed),
            "crossMaintenanceMarginUsed": amount(maintenance),
            "withdrawable": amount(max(0, spare)),
            "assetPositions": [
                {
                    "type": "oneWay",
                    "position": self._entry(address, held, minute, cross_account - maintenance),
                }
                for held in holdings
            ],
            "time": time_ms,
        }

    def _entry(self, address: str, held: Holding, minute: int, cross_buffer: int) -> dict[str, Any]:
        coin, leverage = held.coin, held.habit.leverage
        buffer = held.margin - held.maintenance if held.habit.isolated else cross_buffer
        funding = held.side * held.cost * (minute - held.opened) // 10**7
        before = _draw(self.seed, address, coin.name, "funding") % (2 * held.habit.size + 1) - held.habit.size
        return {
            "coin": coin.name,
            "szi": decimal_text(held.size, coin.size_decimals),
            "leverage": (
                {
                    "type": "isolated",
                    "value": leverage,
                    "rawUsd": amount(held.margin - held.size * held.price),
                }
                if held.habit.isolated
                else {"type": "cross", "value": leverage}
            ),
            "entryPx": decimal_text(held.cost // abs(held.size), coin.price_decimals),
            "positionValue": amount(held.value),
            "unrealizedPnl": amount(held.profit),
            "returnOnEquity": decimal_text(held.profit * leverage * 10**10 // held.cost, 10),
            "liquidationPx": _liquidation_price(held, buffer),
            "marginUsed": amount(held.margin),
            "maxLeverage": coin.max_leverage,
            "cumFunding": {
                "allTime": amount(funding + before * coin.price // 100),
                "sinceOpen": amount(funding),
                "sinceChange": amount(held.side * held.cost * (minute - held.changed) // 10**7),
            },
        }

    def _deposit(self, address: str, dex: str) -> int:
        """What the account on a dex holds beside open profit: from a third to twice the most it may ever hold."""
        habits = [(coin, self._habit(address, coin)) for coin in COINS.get(dex, ())]
        most = sum(habit.size * coin.price * 225 // 100 for coin, habit in habits if habit is not None)
        return most * (_draw(self.seed, address, dex, "deposit") % 170 + 35) // 100

    def _holding(self, address: str, coin: Coin, minute: int) -> Holding | None:
        """The open position, its cost averaged over what was added since it was opened."""
        habit = self._habit(address, coin)
        if habit is None:
            return None
        size = cost = opened = changed = 0
        for at, wanted in self._path(address, coin, minute):
            if wanted == size:
                continue
            price = self._ticks(coin, at)
            if wanted * size <= 0:
                cost, opened = abs(wanted) * price, at
            elif abs(wanted) > abs(size):
                cost += (abs(wanted) - abs(size)) * price
            else:
                cost = cost * abs(wanted) // abs(size)
            size, changed = wanted, at
        return Holding(coin, habit, size, cost, self._ticks(coin, minute), opened, changed) if size else None

    def _path(self, address: str, coin: Coin, minute: int) -> list[tuple[int, int]]:
        """Minute and size of the steps of the present round, the step of this minute last; [] for no trader."""
        habit = self._habit(address, coin)
        if habit is None:
            return []
        number, into = divmod(minute + habit.phase, STEPS * habit.dwell)
        start = minute - into
        draw = _draw(self.seed, address, coin.name, number)
        draw, chance = divmod(draw, 100)
        draw, scale = divmod(draw, 101)
        side = 1 if chance < self._bias(coin, start) else -1
        size = side * habit.size * (50 + scale)
        steps = ROUNDS[draw % len(ROUNDS)][: into // habit.dwell + 1]
        return [(start + step * habit.dwell, size * share // 10_000) for step, share in enumerate(steps)]

    def _habit(self, address: str, coin: Coin) -> Habit | None:
        """None for a wallet that never trades the coin, or that does not exist."""
        if address not in self._known:
            return None
        draw, chance = divmod(_draw(self.seed, address, coin.name, "habit"), 100)
        if chance >= coin.traders:
            return None
        draw, choice = divmod(draw, len(DWELLS))
        draw, phase = divmod(draw, STEPS * DWELLS[choice])
        draw, magnitude = divmod(draw, 4)
        draw, digits = divmod(draw, 90)
        draw, isolated = divmod(draw, 6)
        leverage = 3 if isolated == 0 else min(coin.max_leverage, (5, 10, 20, 40)[draw % 4])
        notional = (10 + digits) * 10 ** (2 + magnitude) * USD
        return Habit(notional // coin.price, DWELLS[choice], phase, leverage, isolated == 0)

    def _bias(self, coin: Coin, minute: int) -> int:
        """Per cent of the wallets that open long."""
        phase = _draw(self.seed, coin.name, "bias") % coin.bias_minutes
        wanted = 50 + _triangle(minute + phase, coin.bias_minutes, 90)
        return min(MOST_BIASED, max(100 - MOST_BIASED, wanted))

    def _ticks(self, coin: Coin, minute: int) -> int:
        phase = _draw(self.seed, coin.name, "price") % 100_000
        moved = sum(_triangle(minute + phase, period, height) for period, height in PRICE_WAVES)
        return coin.price + coin.price * moved // 10**6


def make_wallet(seed: int, index: int) -> Wallet:
    """The row with this index, whatever the size of its universe."""
    rng = Random(f"{seed}:{index}:wallet")
    place = index % PLACES
    fraction = index * 618_033 % FRACTIONS
    volume = rng.randrange(100, 1000) * 10 ** rng.randrange(2, 7) * USD
    account = rng.randrange(1000, 10_000) * 10 ** rng.randrange(5) * USD + rng.randrange(USD)
    month = rng.randrange(1000, 10_000) * 10 ** rng.randrange(4) * USD + fraction
    if rng.randrange(100) < 15:
        month = -month
    if place in TIED_PLACES:
        month = TIED_LOSS
    week = month * rng.randrange(-30, 70) // 100
    profits = (week * rng.randrange(-40, 80) // 100, week, month, month * rng.randrange(-200, 500) // 100)
    if place in (SYSTEM_PLACE, IDLE_PLACE):
        profits = (0, 0, 0, 0)
    if place == SYSTEM_PLACE:
        account += SYSTEM_VALUE
    return Wallet(
        address=_address(seed, index),
        name=_display_name(rng, index),
        account_value=account,
        profits=profits,
        volumes=(volume, volume * 6, volume * 25, volume * rng.randrange(30, 300)),
    )


def _address(seed: int, index: int) -> str:
    """Like an owner's, or like those the exchange keeps for itself."""
    return f"0x20{index:038x}" if index % PLACES == SYSTEM_PLACE else address_of(seed, "wallet", index)


def _display_name(rng: Random, index: int) -> str | None:
    place = index % PLACES
    if place == EMOJI_PLACE:
        return f"🦊 whale {index} 👩‍🚀"
    if place == MAIL_PLACE:
        return f"trader{index}@example.org"
    if place == CONTROL_PLACE:
        return f'\u202e{index} "x\\y"\u200b \x1b[31mred\x07\n<b>\u2066&amp;'
    return f"{_NAMES[rng.randrange(len(_NAMES))]} {index}" if rng.random() < 0.2 else None


def _row(wallet: Wallet) -> str:
    windows = ",\n".join(
        f'        [\n          "{name}",\n          {{\n'
        f'            "pnl": "{noisy(profit)}",\n'
        f'            "roi": "{decimal_text(profit * 10**10 // wallet.account_value, 10)}",\n'
        f'            "vlm": "{noisy(volume)}"\n'
        "          }\n        ]"
        for name, profit, volume in zip(WINDOWS, wallet.profits, wallet.volumes, strict=True)
    )
    return (
        f'    {{\n      "ethAddress": "{wallet.address}",\n'
        f'      "accountValue": "{noisy(wallet.account_value)}",\n'
        f'      "windowPerformances": [\n{windows}\n      ],\n'
        f'      "prize": 0,\n      "displayName": {json.dumps(wallet.name, ensure_ascii=False)}\n    }}'
    )


def _summary(account: int, holdings: list[Holding]) -> dict[str, str]:
    return {
        "accountValue": amount(account),
        "totalNtlPos": amount(sum(held.value for held in holdings)),
        "totalRawUsd": amount(account - sum(held.side * held.value for held in holdings)),
        "totalMarginUsed": amount(sum(held.margin for held in holdings)),
    }


def _liquidation_price(held: Holding, buffer: int) -> str | None:
    """Where the buffer above the maintenance margin is gone, with ten decimals; None where no price reaches it."""
    double = 2 * held.coin.max_leverage
    scale = 10 ** (10 - held.coin.price_decimals)
    distance = buffer * double * scale // (abs(held.size) * (double - held.side))
    price = held.price * scale - held.side * distance
    return decimal_text(price, 10) if price > 0 else None


def _dex_field(request: Mapping[str, Any]) -> str:
    dex = request.get("dex")
    if dex is not None and not isinstance(dex, str):
        raise BadRequestError("dex")
    return dex or MAIN_DEX


def _draw(*key: object) -> int:
    """A number of 256 bits that follows from the key alone."""
    return int.from_bytes(sha256(":".join(map(str, key)).encode()).digest())


def _triangle(at: int, period: int, height: int) -> int:
    """A wave between -height and height, exact in integers."""
    return height * (2 * abs(2 * (at % period) - period) - period) // period
