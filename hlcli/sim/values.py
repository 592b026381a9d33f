"""What the simulated data is made of: addresses, spans of time, and integers written as decimal text."""

from __future__ import annotations

from hashlib import sha256

MINUTE_MS = 60_000
HOUR_MS = 60 * MINUTE_MS
DAY_MS = 24 * HOUR_MS

USD = 1_000_000
NOISE_DECIMALS = 10


def address_of(seed: int, role: str, number: int) -> str:
    """A lower-case address that nothing else in the universe has."""
    return "0x" + sha256(f"{seed}:{role}:{number}".encode()).hexdigest()[:40]


def decimal_text(value: int, decimals: int) -> str:
    """An integer count of 10**-decimals as the exchange writes it: at least one decimal, no further zeros."""
    if value < 0:
        return "-" + decimal_text(-value, decimals)
    whole, part = divmod(value, 10**decimals)
    return f"{whole}.{part:0{decimals}d}".rstrip("0") if part else f"{whole}.0"


def amount(micros: int) -> str:
    """Millionths as the exchange writes money: at least one decimal, at most six."""
    return decimal_text(micros, 6)


def noisy(micros: int) -> str:
    """The same with the ten decimals a sum of doubles leaves behind, on amounts large enough to have them."""
    if abs(micros) < 10_000 * USD:
        return amount(micros)
    return decimal_text(micros * 10_000 + micros * 7919 % 201 - 100, NOISE_DECIMALS)
