"""How far the backfill is, who works on it, and how long it would take."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from psycopg import sql
from psycopg.rows import class_row

from hlcli import migrations
from hlcli.jobs.backfill_queue import choose, for_all_wallets, past
from hlcli.sources import info, user_fills
from hlcli.sqlfiles import query

if TYPE_CHECKING:
    from psycopg import Connection

    from hlcli.jobs.backfill import Options
    from hlcli.settings import Settings

# A worker says every twenty seconds at least that it is alive.
SILENT_AFTER = timedelta(minutes=2)
# Spec 003's scenarios, in requests a wallet. Here all pages are full but the last one, which is so half.
SCENARIOS = {"optimistic": 1, "average": 3, "pessimistic": 5}
FLEETS = (1, 4, 10)
# Below this what the wallets cost so far says little of the others.
MEASURED_FROM = 100


@dataclass(frozen=True, slots=True)
class Member:
    """The newest run of one worker."""

    member: str
    """worker/workers@egress key."""
    host: str
    status: str
    started_at: datetime
    finished_at: datetime | None
    heard_at: datetime
    units_ok: int
    units_failed: int
    rows_served: int
    requests: int
    weight: int
    now: datetime
    """By the database's clock."""
    left: int = 0
    """Wallets of its shard that are not done."""

    @property
    def state(self) -> str:
        """working; silent: it should work and was not heard for two minutes; else how its run ended."""
        if self.status != "running":
            return self.status
        return "silent" if self.silence > SILENT_AFTER else "working"

    @property
    def silence(self) -> timedelta:
        """Since it was last heard."""
        return max(self.now - self.heard_at, timedelta(0))

    def per_minute(self, number: int) -> float:
        """A rate over the time of the run, or over its first minute: what came so far is not extrapolated."""
        return number / max((self.heard_at - self.started_at) / timedelta(minutes=1), 1)

    @property
    def shard(self) -> tuple[int, int]:
        worker, workers = self.member.partition("@")[0].split("/")
        return int(worker), int(workers)

    def as_json(self) -> dict[str, Any]:
        return {
            "member": self.member,
            "host": self.host,
            "state": self.state,
            "started_at": self.started_at,
            "finished_at": self.finished_at,
            "heard_at": self.heard_at,
            "wallets": self.units_ok,
            "failed": self.units_failed,
            "fills": self.rows_served,
            "requests": self.requests,
            "weight": self.weight,
            "wallets_per_minute": round(self.per_minute(self.units_ok), 1),
            "weight_per_minute": round(self.per_minute(self.weight)),
            "left": self.left,
        }


@dataclass(frozen=True, slots=True)
class Fleet:
    """The whole backfill: wallets by state, and its workers."""

    states: dict[str, int]
    fills: int
    pages: int
    weight: int
    members: list[Member]

    @property
    def wallets(self) -> int:
        return sum(self.states.values())

    @property
    def left(self) -> int:
        return self.states.get("pending", 0) + self.states.get("running", 0)

    @property
    def seconds_left(self) -> float | None:
        """At the pace of those who work now; None when nobody does."""
        pace = sum(each.per_minute(each.units_ok) for each in self.members if each.state == "working")
        return 60 * self.left / pace if pace > 0 else None

    def as_json(self) -> dict[str, Any]:
        return {
            "wallets": self.wallets,
            "left": self.left,
            "states": self.states,
            "fills": self.fills,
            "pages": self.pages,
            "weight": self.weight,
            "seconds_left": None if self.seconds_left is None else round(self.seconds_left),
            "workers": [each.as_json() for each in self.members],
        }


@dataclass(frozen=True, slots=True)
class Scenario:
    """What a backfill would take if each wallet took so many requests."""

    name: str
    requests: int
    weight: int
    hours: dict[int, Decimal]
    """By the number of workers, each with an address of its own."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """Before anything is asked: how many wallets are left, and what they would take."""

    wallets: int
    weight_per_minute: int
    scenarios: list[Scenario]


def read_fleet(settings: Settings) -> Fleet:
    """How far the backfill is. Raises ConfigError for an old schema."""
    with migrations.connect_ready(settings, role="status") as connection:
        return fleet(connection)


def fleet(connection: Connection[Any]) -> Fleet:
    """The same on an open connection."""
    states = connection.execute(query("backfill", "states")).fetchall()
    cursor = connection.cursor(row_factory=class_row(Member))
    members = cursor.execute(query("backfill", "workers")).fetchall()
    left: dict[int, dict[int, int]] = {}
    for workers in {each.shard[1] for each in members}:
        rows = connection.execute(query("backfill", "left_by_shard"), {"workers": workers}).fetchall()
        left[workers] = dict(rows)
    return Fleet(
        states={state: count for state, count, *_ in states},
        fills=sum(row[2] for row in states),
        pages=sum(row[3] for row in states),
        weight=sum(row[4] for row in states),
        members=[replace(each, left=left[each.shard[1]].get(each.shard[0], 0)) for each in members],
    )


def estimate(settings: Settings, options: Options) -> Estimate:
    """What the options would ask for. Nothing is asked, and nothing but a temporary table is written.

    Raises UsageError for an empty window, ConfigError for an old schema.
    """
    asked = options.window
    with migrations.connect_ready(settings, role="estimate") as connection:
        window = past(connection, asked)
        choose(connection, options.users or ())
        if options.users is None:
            for_all_wallets(connection, query("backfill", "choose_all"))
            known = sql.SQL(query("backfill", "wallets_of_queue"))
            connection.execute(sql.SQL(query("backfill", "choose_all")).format(wallets=known))
        counted = connection.execute(
            query("backfill", "count_todo"),
            {
                "since": window.since,
                "until": window.until,
                "named": options.users is not None,
                "shard": options.worker_id if options.own_shard else None,
                "workers": options.total_workers,
            },
        ).fetchone()
        measured = connection.execute(query("backfill", "measured")).fetchone()
    assert counted is not None
    assert measured is not None
    wallets_left = min(counted[0], options.limit) if options.limit is not None else counted[0]
    budget = settings.hl_api_weight_per_minute
    full = info.weight(user_fills.FILLS, options.page_size)
    half = info.weight(user_fills.FILLS, options.page_size // 2)
    scenarios = [
        _scenario(name, wallets_left, Decimal(pages), Decimal((pages - 1) * full + half), budget)
        for name, pages in SCENARIOS.items()
    ]
    if measured[0] >= MEASURED_FROM:
        scenarios.append(_scenario("as measured", wallets_left, measured[1], measured[2], budget))
    return Estimate(wallets_left, budget, scenarios)


def _scenario(name: str, wallets: int, pages: Decimal, weight: Decimal, budget: int) -> Scenario:
    """`pages` and `weight` are those of one wallet, `budget` the weight that a worker has a minute."""
    hours = {workers: wallets * weight / budget / workers / 60 for workers in FLEETS}
    return Scenario(
        name,
        round(wallets * pages),
        round(wallets * weight),
        {
            workers: each.quantize(Decimal("0.1") if each >= 10 else Decimal("0.01"))
            for workers, each in hours.items()
        },
    )
