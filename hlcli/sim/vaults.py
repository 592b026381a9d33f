"""The simulated vaults: the list that stats-data serves and the answer to ``vaultDetails``.

Everything about a vault follows from (seed, index, now_ms), in integers: money is counted in millionths of a
dollar and written as text, so no float chooses a digit and two processes serve the same bytes. The profit of a
vault is a function of time, hence all windows of one answer, the list, and the answers of a later hour agree
wherever they speak of the same moment.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from functools import cached_property
from hashlib import sha256
from random import Random
from typing import Any, NamedTuple

from hlcli.sim.answers import Answer, Document, InfoHandler, address_field
from hlcli.sim.values import DAY_MS, HOUR_MS, MINUTE_MS, USD, address_of, amount, noisy
from hlcli.sim.wire import RawNumber

FIRST_CREATED_MS = 1_683_500_000_000
LAST_CREATED_MS = 1_788_000_000_000

LIST_POINTS = {"day": 13, "week": 12, "month": 13, "allTime": 11}
DETAIL_POINTS = {"day": 13, "week": 64, "month": 45, "allTime": 76}
PERP_ALL_TIME_POINTS = 72
WINDOW_MS = {"day": DAY_MS, "week": 7 * DAY_MS, "month": 30 * DAY_MS}

FOREVER_MS = 1 << 62
PARENT_INDEX = 0
CHILD_INDEXES = range(1, 6)
IMITATION_INDEX = 8
PARENT_NAME = "House Liquidity Pool (HLP)"
MAX_FOLLOWERS = 100

_FIRST = (
    "Amber",
    "Basalt",
    "Cedar",
    "Delta",
    "Ember",
    "Fjord",
    "Granite",
    "Harbor",
    "Indigo",
    "Juniper",
    "Karst",
)
_SECOND = ("Carry", "Drift", "Grid", "Hedge", "Momentum", "Neutral", "Range", "Scalp", "Spread", "Trend")
_EMOJI = ("🚀", "🦊", "👩‍🚀", "🇨🇭", "💎🙌")
_CHINESE = ("长期主义", "量化一号", "稳健增长", "龙虎榜")
_NOTES = (
    "Follows the trend, both ways.",
    "No leverage above 3x.\n\nQuestions: ask before you deposit.",
    'Rules:\n\t1. patience\n\t2. "risk first"\n\t3. size \\ conviction',
    "稳健为主 — не спешим — 🚀",
    "",
)


class Wave(NamedTuple):
    """A triangle wave: profit that comes and goes, exact in integers."""

    period: int
    phase: int
    height: int


class Vault(NamedTuple):
    """Who a vault is, and its value and profit at any time."""

    number: int
    address: str
    leader: str
    name: str
    created_ms: int
    closed_ms: int | None
    start_equity: int
    rest: int
    waves: tuple[Wave, ...]
    apr: str

    @property
    def is_closed(self) -> bool:
        """Closed vaults stay in the list for ever."""
        return self.closed_ms is not None

    def profits(self, times: Iterable[int]) -> list[int]:
        """Profit since creation at these times; it stands still once the vault is closed.

        Many times at once and without inner calls, because a full list asks half a million times.
        """
        if not self.waves:
            return [0 for _ in times]
        end = FOREVER_MS if self.closed_ms is None else self.closed_ms
        (p, a, h), (q, b, k) = self.waves
        values = []
        for at in (self.created_ms, *times):
            t = min(at, end)
            values.append(h * abs(2 * ((t + a) % p) - p) // p + k * abs(2 * ((t + b) % q) - q) // q)
        base = values.pop(0)
        return [value - base for value in values]

    def equity(self, time_ms: int) -> int:
        """Account value; a closed vault keeps only what nobody withdrew."""
        return self.equity_of(time_ms, self.profits([time_ms])[0])

    def equity_of(self, time_ms: int, profit: int) -> int:
        """The same where the profit is known already."""
        if self.closed_ms is not None and time_ms >= self.closed_ms:
            return self.rest
        return self.start_equity + profit

    def window_start(self, window: str, now_ms: int) -> int:
        """Where a window of this vault begins."""
        length = WINDOW_MS.get(window)
        return self.created_ms if length is None else max(self.created_ms, now_ms - length)


class VaultUniverse:
    """All vaults of one simulated exchange at one moment."""

    def __init__(self, seed: int, count: int, now_ms: int) -> None:
        self.seed = seed
        self.now_ms = now_ms
        self.vaults = [make_vault(seed, index, now_ms) for index in range(count)]
        self._by_address = {vault.address: vault for vault in self.vaults}

    @property
    def addresses(self) -> list[str]:
        """Every address, in the order of the list."""
        return [vault.address for vault in self.vaults]

    # Built when it is first asked for: most tests never do.
    @cached_property
    def list_body(self) -> bytes:
        """The whole list, indented by two as stats-data serves it."""
        return ("[\n" + ",\n".join(self._list_entry(vault) for vault in self.vaults) + "\n]").encode("utf-8")

    def document(self) -> Document:
        """The list as a file; it changes with the hour."""
        return Document(lambda: self.list_body, self.now_ms)

    def info_handlers(self) -> dict[str, InfoHandler]:
        """The info types this module answers."""
        return {"vaultDetails": self._answer_details}

    def _answer_details(self, request: Mapping[str, Any]) -> Answer:
        address = address_field(request, "vaultAddress")
        if request.get("user") is not None:
            address_field(request, "user")
        return Answer(self.vault_details(address))

    def vault_details(self, address: str) -> dict[str, Any] | None:
        """The answer to ``vaultDetails``, or None for an address that is no vault."""
        vault = self._by_address.get(address.lower())
        if vault is None:
            return None
        rng = Random(f"{self.seed}:{vault.number}:details")
        in_family = vault.number == PARENT_INDEX or vault.number in CHILD_INDEXES
        equity = vault.equity(self.now_ms)
        leader_parts = rng.randrange(500, 9_000)
        details: dict[str, Any] = {
            "name": vault.name,
            "vaultAddress": vault.address,
            "leader": vault.leader,
            "description": _NOTES[rng.randrange(len(_NOTES))],
            "portfolio": self._portfolio(vault, rng),
            "apr": RawNumber(vault.apr),
            "followerState": None,
            "leaderFraction": RawNumber(f"0.{leader_parts:04d}{rng.randrange(10**12):012d}"),
            "leaderCommission": 0 if in_family or rng.random() < 0.25 else RawNumber("0.1"),
            "followers": self._followers(vault, rng, equity, leader_parts),
            "maxDistributable": RawNumber(amount(equity * 3 // 10)),
            "maxWithdrawable": RawNumber("0.0"),
            "isClosed": vault.is_closed,
            "relationship": self._relationship(vault),
            "allowDeposits": in_family or (not vault.is_closed and rng.random() < 0.8),
            "alwaysCloseOnWithdraw": rng.random() < 0.1,
        }
        if vault.number % 20 == 7:
            del details["maxDistributable"]
        return details

    def _portfolio(self, vault: Vault, rng: Random) -> list[list[Any]]:
        windows = []
        day_volume = vault.start_equity * rng.randrange(1, 300) // 100
        days = {"day": 1, "week": 6, "month": 25, "allTime": 300}
        for prefix in ("", "perp"):
            for window, points in DETAIL_POINTS.items():
                name = prefix + window[0].upper() + window[1:] if prefix else window
                count = PERP_ALL_TIME_POINTS if name == "perpAllTime" else points
                start = vault.window_start(window, self.now_ms)
                times = timeline(start, self.now_ms, count)
                profits = vault.profits(times)
                base = profits[0]
                volume = 0 if vault.is_closed and window != "allTime" else day_volume * days[window]
                history = {
                    "accountValueHistory": [
                        [at, noisy(vault.equity_of(at, profit))]
                        for at, profit in zip(times, profits, strict=True)
                    ],
                    "pnlHistory": [
                        [at, amount(profit - base)] for at, profit in zip(times, profits, strict=True)
                    ],
                    "vlm": noisy(volume),
                }
                windows.append([name, history])
        return windows

    def _followers(self, vault: Vault, rng: Random, equity: int, leader_parts: int) -> list[dict[str, Any]]:
        if vault.is_closed:
            return []
        if vault.number == PARENT_INDEX:
            others = MAX_FOLLOWERS - 1
        else:
            others = min(MAX_FOLLOWERS - 1, int(rng.expovariate(1 / 12))) if equity else 0
        leader_equity = equity * leader_parts // 10_000
        left = equity - leader_equity
        rows = [self._follower("Leader", vault, rng, leader_equity, vault.created_ms)]
        for number in range(others):
            share = left // 4
            left -= share
            entered = vault.created_ms + (self.now_ms - vault.created_ms) * rng.randrange(1000) // 1000
            user = address_of(self.seed, "follower", vault.number * MAX_FOLLOWERS + number)
            rows.append(self._follower(user, vault, rng, share, entered))
        rng.shuffle(rows)
        return rows

    def _follower(self, user: str, vault: Vault, rng: Random, equity: int, entered: int) -> dict[str, Any]:
        profit = equity * rng.randrange(-300, 500) // 1000
        lockup_days = 4 if vault.number == PARENT_INDEX else 1
        return {
            "user": user,
            "vaultEquity": amount(equity),
            "pnl": amount(profit),
            "allTimePnl": amount(profit + profit // 7),
            "daysFollowing": max(0, self.now_ms - entered) // DAY_MS,
            "vaultEntryTime": entered,
            "lockupUntil": entered + lockup_days * DAY_MS,
        }

    def _relationship(self, vault: Vault) -> dict[str, Any]:
        if vault.number == PARENT_INDEX:
            children = [address_of(self.seed, "vault", index) for index in CHILD_INDEXES]
            return {"type": "parent", "data": {"childAddresses": children}}
        if vault.number in CHILD_INDEXES:
            return {"type": "child", "data": {"parentAddress": address_of(self.seed, "vault", PARENT_INDEX)}}
        return {"type": "normal"}

    def _list_entry(self, vault: Vault) -> str:
        windows = ",\n".join(
            f'      [\n        "{window}",\n        [\n          '
            + ",\n          ".join(self._list_profits(vault, window, points))
            + "\n        ]\n      ]"
            for window, points in LIST_POINTS.items()
        )
        relationship = _indented(self._relationship(vault), "      ")
        return (
            f'  {{\n    "apr": {vault.apr},\n    "pnls": [\n{windows}\n    ],\n    "summary": {{\n'
            f'      "name": {json.dumps(vault.name, ensure_ascii=False)},\n'
            f'      "vaultAddress": "{vault.address}",\n'
            f'      "leader": "{vault.leader}",\n'
            f'      "tvl": "{noisy(vault.equity(self.now_ms))}",\n'
            f'      "isClosed": {"true" if vault.is_closed else "false"},\n'
            f'      "relationship": {relationship},\n'
            f'      "createTimeMillis": {vault.created_ms}\n'
            "    }\n  }"
        )

    def _list_profits(self, vault: Vault, window: str, points: int) -> list[str]:
        start = vault.window_start(window, self.now_ms)
        if not vault.waves or (vault.closed_ms is not None and vault.closed_ms <= start):
            return ['"0.0"'] * points
        span, parts = self.now_ms - start, points - 1
        times = [start + span * step // parts for step in range(points)]
        settled = 0
        if vault.closed_ms is not None:
            # Points after the closing repeat the last one: compute and print them once.
            settled = max(0, sum(at > vault.closed_ms for at in times) - 1)
        values = vault.profits(times[: points - settled])
        base = values[0]
        texts = [f'"{amount(value - base)}"' for value in values]
        return texts + texts[-1:] * settled


def make_vault(seed: int, index: int, now_ms: int) -> Vault:
    """The vault with this index, whatever the size of its universe."""
    rng = Random(f"{seed}:{index}:vault")
    draw = rng.random
    in_family = index == PARENT_INDEX or index in CHILD_INDEXES
    created = FIRST_CREATED_MS + int(draw() * (LAST_CREATED_MS - FIRST_CREATED_MS))
    if in_family:
        created = FIRST_CREATED_MS + index * 977
    if created >= now_ms - HOUR_MS:
        # A universe set in the past has no vaults from its future.
        created = now_ms - DAY_MS - int(draw() * 300) * DAY_MS
    closed = (draw() >= 1 / 3 and not in_family) or index == IMITATION_INDEX
    closed_ms = min(created + int(draw() * max(1, LAST_CREATED_MS - created)), now_ms) if closed else None
    equity = int(rng.lognormvariate(8.0, 2.4) * USD) + 1
    empty = draw() < (0.65 if closed else 0.05)
    rest = 0 if empty else int(rng.lognormvariate(0.0, 4.0) * USD / 100) + 1
    if index == PARENT_INDEX:
        equity = 401_234_567_890_123
    elif index in CHILD_INDEXES:
        equity = 40_123_456_789_012 * index // 3
    elif empty and not closed:
        equity = 0
    return Vault(
        number=index,
        address=address_of(seed, "vault", index),
        leader=address_of(seed, "leader", PARENT_INDEX if in_family else index - index % 3),
        name=_name(seed, index),
        created_ms=created,
        closed_ms=closed_ms,
        start_equity=equity,
        rest=rest,
        waves=_waves(rng, equity),
        apr=_apr(rng, still=closed or equity == 0),
    )


def _waves(rng: Random, equity: int) -> tuple[Wave, ...]:
    """Profit over months and over hours; together less than the equity, which therefore stays positive."""
    if not equity:
        return ()  # never funded: nothing to win or lose
    return tuple(
        Wave(period, rng.randrange(period), equity * rng.randrange(1, parts) // 100)
        for period, parts in ((97 * DAY_MS + 41, 65), (31 * HOUR_MS + 7, 12))
    )


def _apr(rng: Random, *, still: bool) -> str:
    """An annual rate as a JSON number, with all the digits a double prints and now and then an exponent."""
    if still:
        return "0.0"
    digits = rng.randrange(10**15, 10**16)
    shape = rng.randrange(40)
    if shape == 0:
        return f"{digits % 9 + 1}.{digits % 10**6:06d}e-7"
    if shape == 1:
        return f"{digits % 90 + 10}.{digits % 10**12:012d}"
    return f"{'-' if shape % 3 == 0 else ''}0.{digits}"


def _name(seed: int, index: int) -> str:
    """A name; the odd ones come at fixed places so that even a small universe has them."""
    if index in (PARENT_INDEX, IMITATION_INDEX):
        return PARENT_NAME
    if index in CHILD_INDEXES:
        return f"HLP Strategy {chr(ord('A') + index - 1)}"
    place = index % 50
    if place == 41:
        return _name(seed, index - 1)
    if place == 43:
        return _name(seed, index - 1) + " "
    choice = sha256(f"{seed}:{index}:name".encode()).digest()
    plain = f"{_FIRST[choice[0] % len(_FIRST)]} {_SECOND[choice[1] % len(_SECOND)]} {index}"
    if place == 17:
        return f"  {plain} "
    if place == 23:
        return f"{_EMOJI[choice[2] % len(_EMOJI)]} {plain}"
    if place == 31:
        return f"{_CHINESE[choice[2] % len(_CHINESE)]}{index}"
    if place == 37:
        return f'{plain} "x\\y" <b>\u202e&amp;\u200b'
    return plain


def timeline(start_ms: int, now_ms: int, count: int) -> list[int]:
    """The times of one window: its start, points of a fixed grid with a few milliseconds' jitter, and now.

    The grid does not move with the hour, as on the exchange, so a later answer repeats most points and drops
    the oldest ones.
    """
    span = now_ms - start_ms
    unit = _grid_unit(span)
    step = max(1, span // (count - 1) // unit * unit)
    inner: list[int] = []
    number = (now_ms - 1) // step
    while len(inner) < count - 2 and number * step > start_ms:
        at = number * step + number * 7919 % 97
        if start_ms < at < now_ms:
            inner.append(at)
        number -= 1
    return [start_ms, *reversed(inner), now_ms]


def _grid_unit(span_ms: int) -> int:
    """Round steps: whole hours for long windows, minutes for short ones, milliseconds for a newborn vault."""
    if span_ms >= 300 * DAY_MS:
        return DAY_MS
    if span_ms >= 20 * DAY_MS:
        return HOUR_MS
    if span_ms >= DAY_MS:
        return MINUTE_MS
    return 1


def _indented(value: dict[str, Any], margin: str) -> str:
    """JSON at some depth of an indented document."""
    return json.dumps(value, indent=2).replace("\n", "\n" + margin)
