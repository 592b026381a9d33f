"""The coins of the invented fills and TWAPs, with their digits and prices; amounts are counted in integers."""

from __future__ import annotations

from typing import NamedTuple


class Market(NamedTuple):
    """A coin: of 64 orders so many are in it, its digits, its usual price in ticks, what a buyer of spot pays fees in.

    A size times a price has six decimals.
    """

    name: str
    share: int
    size_decimals: int
    price: int
    token: str | None = None


MARKETS = (
    Market("BTC", 16, 5, 865_750),
    Market("ETH", 12, 4, 301_250),
    Market("HYPE", 12, 2, 345_000),
    Market("SOL", 8, 2, 1_380_000),
    Market("kPEPE", 4, 0, 4_348),
    Market("xyz:NFLX", 4, 3, 1_093_250),
    Market("@107", 4, 2, 345_100, "HYPE"),
    Market("PURR/USDC", 2, 0, 185_310, "PURR"),
    Market("@156", 1, 3, 160_320, "USOL"),
    Market("#1890", 1, 0, 431_250, "+1890"),
)
PERPS = 6  # the first ones
DEPLOYED = 5  # the place of the one on a dex of its own
NAMES, SHARES, SIZE_DECIMALS, PRICES, TOKENS = zip(*MARKETS, strict=True)
SIZE_SCALES = [10**decimals for decimals in SIZE_DECIMALS]
PRICE_SCALES = [10 ** (6 - decimals) for decimals in SIZE_DECIMALS]
# Fees in a token have eight decimals.
TOKEN_SCALE = 10**8
TOKEN_FACTORS = [10 ** (8 - decimals) for decimals in SIZE_DECIMALS]
