"""Callers of the weight budget under a simulated clock: the installed SQL functions, an hour in seconds.

The server counts as published: a request's base at some moment between its grant and its answer, the extra of what it
returns at a later one. It refuses what does not fit.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from psycopg import Connection, sql

from hlcli.budget import MARGIN_S, Priority
from hlcli.sim.weights import WeightWindow, base_weight, extra_weight

KIND = "userFillsByTime"
PAGE = 2000
BASE, FULL = base_weight(KIND), base_weight(KIND) + extra_weight(KIND, PAGE)
# Any will do; far from what a clock shows, so that nothing can mix the two up.
BEGIN_S = 4_000_000_000.0

_CLOCK = """
    create or replace function simulated_clock() returns timestamptz language sql volatile
    as $$ select to_timestamp(current_setting('simulated.clock')::float8) $$
"""
# The functions depend on what sets the clock, so that it is set before they look.
_RESERVE = """
    with clock as materialized (select set_config('simulated.clock', %s, false) as now)
    select wait_s, granted_second from clock, budget_reserve(case when now <> '' then %s end, %s, %s, %s, %s, null, %s)
"""
_SETTLE = """
    with clock as materialized (select set_config('simulated.clock', %s, false) as now)
    select budget_settle(case when now <> '' then %s end, %s, %s, %s, %s, null, %s) from clock
"""
_USED = "select sum(weight)::bigint from rate_budget_buckets where egress_key = %s"


def simulate_clock(connection: Connection[Any]) -> None:
    """Let this database's budget functions read a clock that `Clock` sets, for good; all else in them stays."""
    connection.execute(_CLOCK)
    for name in ("budget_reserve", "budget_settle"):
        (text,) = connection.execute("select pg_get_functiondef(%s::regproc)", (name,)).fetchone() or ("",)
        assert "clock_timestamp()" in text, name
        connection.execute(sql.SQL(text.replace("clock_timestamp()", "simulated_clock()")))


class Clock:
    """What happens when, on one connection to a database of simulate_clock()."""

    def __init__(self, connection: Connection[Any], rng: random.Random) -> None:
        self.connection, self.rng = connection, rng
        self.now = BEGIN_S
        self._events: list[tuple[float, int, Callable[..., object], tuple[Any, ...]]] = []
        self._order = itertools.count()

    def after(self, seconds: float, what: Callable[..., object], *arguments: Any) -> None:
        heapq.heappush(self._events, (self.now + seconds, next(self._order), what, arguments))

    def run(self, seconds: float) -> None:
        """Let so much time pass."""
        ends = self.now + seconds
        while self._events and self._events[0][0] <= ends:
            self.now, _, what, arguments = heapq.heappop(self._events)
            what(*arguments)
        self.now = ends

    def ask(self, query: str, *values: object) -> tuple[Any, ...]:
        row: tuple[Any, ...] | None = self.connection.execute(query, (repr(self.now), *values)).fetchone()
        assert row is not None
        return row


class Served(NamedTuple):
    """A settled request; times in seconds since the clock's begin."""

    asked: float
    granted: float
    settled: float
    cost: int
    priority: Priority
    free: int
    """What its grant left of the limit."""


@dataclass
class Address:
    """A public address: its callers, and the window in which the server counts what they cost."""

    clock: Clock
    latency: Callable[[], float]
    key: str = "simulated"
    limit: int = 1200
    served: list[Served] = field(default_factory=list)
    wallets: int = 0

    def __post_init__(self) -> None:
        self.window = WeightWindow(self.limit, lambda: self.clock.now)

    def backfill(self, wallets: Iterable[list[int]], flying: int = 8) -> None:
        """Start so many callers that take wallet after wallet (the costs of its pages, asked one by one)."""
        queue = iter(wallets)
        for _ in range(flying):
            self.clock.after(self.clock.rng.uniform(0, 0.1), self._wallet, queue)

    def ask(
        self, reserved: int, cost: int, priority: Priority, then: Callable[[], None] = lambda: None
    ) -> None:
        """Ask for weight as Budget.reserve() does, send, settle, go on with `then`."""
        waiter, asked = uuid.UUID(int=self.clock.rng.getrandbits(128)), self.clock.now

        def reserve() -> None:
            wait_s, second = self.clock.ask(
                _RESERVE, self.key, waiter, reserved, int(priority), self.limit, MARGIN_S
            )
            if second is None:
                self.clock.after(wait_s * self.clock.rng.uniform(1.0, 1.05), reserve)
                return
            (used,) = self.clock.connection.execute(_USED, (self.key,)).fetchone() or (0,)
            latency, granted = self.latency(), self.clock.now
            arrives, answers = sorted(self.clock.rng.uniform(0, latency) for _ in range(2))
            self.clock.after(arrives, self.window.admit, min(BASE, cost))
            self.clock.after(answers, self.window.charge, cost - min(BASE, cost))
            self.clock.after(latency, settle, second, granted, self.limit - used)

        def settle(second: int, granted: float, free: int) -> None:
            self.clock.ask(_SETTLE, self.key, second, reserved, cost, int(priority), self.limit)
            self.served.append(
                Served(asked - BEGIN_S, granted - BEGIN_S, self.clock.now - BEGIN_S, cost, priority, free)
            )
            then()

        reserve()

    def used(self, after_s: float) -> float:
        """The share of the limit that was used, from the first answer after so many seconds to the last one."""
        settled = [one for one in self.served if one.settled >= after_s]
        seconds = settled[-1].settled - settled[0].settled
        return sum(one.cost for one in settled[1:]) / seconds * 60 / self.limit

    def _wallet(self, queue: Iterator[list[int]]) -> None:
        wallet = next(queue, None)
        if wallet is not None:
            self._page(queue, wallet, 0)

    def _page(self, queue: Iterator[list[int]], wallet: list[int], number: int) -> None:
        if number < len(wallet):
            self.ask(FULL, wallet[number], Priority.BULK, lambda: self._page(queue, wallet, number + 1))
        else:
            self.wallets += 1
            self._wallet(queue)


def wallet(rng: random.Random, pages: int) -> list[int]:
    """The costs of a wallet's pages: all full but the last one.

    The size of that is log-uniform from 1 to 1999 fills: half of them have less than 45, the mean is 263.
    """
    fills = int(math.exp(rng.uniform(0, math.log(PAGE))))
    return [FULL] * (pages - 1) + [BASE + extra_weight(KIND, fills)]
