"""The weight budget that all processes behind one public address share, kept in the database.

The exchange allows 1200 units of weight per minute and address. A request reserves the worst that it can cost
before it is sent and settles for what it did cost once its answer is here; the bookkeeping is two SQL functions
(budget_reserve and budget_settle), so that it is one round trip and the database's clock alone decides.
"""

from __future__ import annotations

import random
import threading
import time
import uuid
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, Any

from hlcli import db
from hlcli.exitcodes import TemporaryError

if TYPE_CHECKING:
    from collections.abc import Callable

    from psycopg import Connection

    from hlcli.settings import Settings

# A request sent just before the process died may reach the server this much later than it was granted.
MARGIN_S = 0.5


class Priority(IntEnum):
    """Who is served first when weight is short; see budget_reserve()."""

    URGENT = 0
    """Worth nothing when late: a minute's snapshot."""
    NORMAL = 1
    """Scheduled jobs."""
    BULK = 2
    """Takes what nobody else wants: backfill."""


@dataclass(frozen=True, slots=True)
class Grant:
    """Weight that was reserved; give it back with Budget.settle()."""

    second: int
    weight: int
    priority: Priority


class DeadlineError(TemporaryError):
    """The time for a run or a request is up, or the weight that a run may spend."""


class Budget:
    """One process's door to the shared budget of its egress key. Safe to use from several threads.

    `most_weight` is the most that this process may spend in all.
    """

    def __init__(self, settings: Settings, *, most_weight: int | None = None) -> None:
        self._settings = settings
        self._most_weight = most_weight
        self._asked = 0
        self._lock = threading.Lock()
        self._connection: Connection[Any] | None = None
        self._closed = False
        self.requests = 0
        """Requests settled by this process."""
        self.weight = 0
        """Weight charged to this process."""

    def reserve(self, weight: int, priority: Priority, *, deadline: float) -> Grant:
        """Wait until `weight` fits into the budget, at most until time.monotonic() reaches `deadline`.

        Raises DeadlineError when it does not fit in time; nothing is charged then.
        """
        while not self._admit(weight):  # what is in the air may turn out cheaper
            if self._closed or time.monotonic() > deadline:
                raise DeadlineError("the run has ended")
            time.sleep(0.05)
        try:
            return self._reserve(weight, priority, deadline)
        except BaseException:
            with self._lock:
                self._asked -= weight
            raise

    def _admit(self, weight: int) -> bool:
        """Whether so much may be spent beside what is in the air. Raises DeadlineError when it may not at all."""
        with self._lock:
            most = self._most_weight
            if most is not None and self.weight + weight > most:
                raise DeadlineError(f"the next request might spend more than {most} weight")
            if most is not None and self.weight + self._asked + weight > most:
                return False
            self._asked += weight
            return True

    def _reserve(self, weight: int, priority: Priority, deadline: float) -> Grant:
        settings, waiter = self._settings, uuid.uuid4()
        while True:
            wait_s, second = self._call(
                "select wait_s, granted_second from budget_reserve(%s, %s, %s, %s, %s, %s, %s)",
                settings.hl_egress_key,
                waiter,
                weight,
                int(priority),
                settings.hl_api_weight_per_minute,
                settings.hl_api_requests_per_minute,
                MARGIN_S,
            )
            if self._closed:
                raise DeadlineError("the run has ended")
            if second is not None:
                return Grant(second, weight, priority)
            left = deadline - time.monotonic()
            if left < wait_s:
                self._call("delete from rate_budget_waiters where waiter = %s returning null, null", waiter)
                raise DeadlineError("the time was up while waiting for API weight")
            time.sleep(wait_s * random.uniform(1.0, 1.05))

    def settle(self, grant: Grant, cost: int, *, refused_s: float | None = None) -> None:
        """Say what a granted request cost.

        `refused_s` closes the gate for every process of the key: the server answered 429 and asked to wait so
        many seconds (0 when it named no time).
        """
        with self._lock:
            self.requests += 1
            self.weight += cost
            self._asked -= grant.weight
        self._call(
            "select budget_settle(%s, %s, %s, %s, %s, %s, %s), null",
            self._settings.hl_egress_key,
            grant.second,
            grant.weight,
            cost,
            int(grant.priority),
            refused_s,
            self._settings.hl_api_weight_per_minute,
        )

    def close(self) -> None:
        """Grant no more; what is in the air stays charged as reserved."""
        with self._lock:
            self._closed = True
            if self._connection is not None:
                self._connection.close()
                self._connection = None

    def _call(self, query: Any, *values: object) -> tuple[Any, Any]:
        return self._retried(lambda connection: connection.execute(query, values).fetchone())

    def _retried(self, ask: Callable[[Connection[Any]], Any]) -> tuple[Any, Any]:
        """Run one statement on the budget's own connection; a lost connection is opened again, twice."""
        import psycopg

        for attempt in (1, 2, 3):
            with self._lock:
                if self._closed:
                    return None, None
                try:
                    if self._connection is None or self._connection.closed:
                        self._connection = db.connect(self._settings, role="budget")
                        # Two commits a request, and nothing lost with a server that goes down: no need of the disk.
                        self._connection.execute("set synchronous_commit = off")
                    row = ask(self._connection)
                except psycopg.OperationalError:
                    if self._connection is not None:
                        self._connection.close()
                    if attempt == 3:
                        raise
                else:
                    return row if row is not None else (None, None)
            time.sleep(attempt)
        raise AssertionError
