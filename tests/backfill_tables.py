"""What the backfill must leave in the tables, computed from the simulator's world and from none of the job's own code."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter, defaultdict
from decimal import Decimal
from typing import NamedTuple

from vault_tables import assert_ledger_adds_up, assert_nothing_left, exact, runs, timestamp

from hlcli.sim.user_fills import UserFills

# A budget that nobody waits for, and a simulator that grants it.
PLENTY = {"HL_API_WEIGHT_PER_MINUTE": "1000000"}
SERVER_WEIGHT = 10**8
FILLS, SLICES = "userFillsByTime", "userTwapSliceFillsByTime"
LAUNCH_MS = 1_698_796_800_000  # 2023-11-01
S3_BEGINS_MS = 1_753_606_800_000  # 2025-07-27 09:00
# The columns of table fills and what the exchange calls them; the rest must be empty.
NUMBERS = {
    "px": "px",
    "sz": "sz",
    "start_position": "startPosition",
    "closed_pnl": "closedPnl",
    "fee": "fee",
    "builder_fee": "builderFee",
    "deployer_fee": "deployerFee",
    "priority_gas": "priorityGas",
}
OTHERS = {
    "user_address": "user",
    "coin": "coin",
    "tid": "tid",
    "oid": "oid",
    "side": "side",
    "dir": "dir",
    "fee_token": "feeToken",
    "crossed": "crossed",
    "hash": "hash",
    "twap_id": "twapId",
    "cloid": "cloid",
    "builder": "builder",
}
KEY = ("user_address", "coin", "tid", "oid", "side", "time")
EMPTY = ("block_time", "block_number", "extra", "object_id")


class Question(NamedTuple):
    """What was asked of a fills endpoint."""

    kind: str
    user: str
    start: int
    end: int | None
    newest_first: bool


class World(UserFills):
    """A world that remembers what it was asked, in order."""

    def __init__(self, seed, **more):
        super().__init__(seed, **more)
        self.asked = []
        self.before_answer = None
        self._asking = threading.Lock()

    def info_handlers(self, clock_ms):
        return {name: self._remembered(handle) for name, handle in super().info_handlers(clock_ms).items()}

    def _remembered(self, handle):
        def answer(request):
            asked = Question(
                request["type"],
                request["user"],
                request.get("startTime"),
                request.get("endTime"),
                bool(request.get("reversed")),
            )
            with self._asking:
                self.asked.append(asked)
            if self.before_answer:
                self.before_answer()
            return handle(request)

        return answer

    def asked_twice(self):
        """The questions that were asked more than once, spoilt answers included."""
        return {question: count for question, count in Counter(self.asked).items() if count > 1}

    def repeats(self):
        """How many questions had been asked before."""
        return len(self.asked) - len(set(self.asked))

    def expected(self, now_ms, *, users=None, since_ms=LAUNCH_MS, until_ms=S3_BEGINS_MS):
        """What the tables hold of a window when all was asked, and in which states a wallet may be then.

        Where slices of a TWAP are not served any more positions do not add up, just as behind a limit: who sees that
        may well say truncated. The first page may reach beyond the window.
        """
        rows, states = [], {}
        for user in self.addresses if users is None else users:
            later = within(self.served_of(user, now_ms), since_ms, now_ms + 1)
            served = within(later, since_ms, until_ms)
            seen_ms = max([until_ms, *(row["time"] + 1 for row in later[: self.page_limit])])
            rows += fills_rows(served)
            if len(within(self._unlimited(user, now_ms), since_ms, until_ms)) > len(served):
                is_told = tells_of_older(served[: self.page_limit])
                states[user] = {"truncated"} if is_told else {"truncated", "complete"}
            elif len(within(self.fills_of(user), LAUNCH_MS, seen_ms)) > len(within(later, since_ms, seen_ms)):
                states[user] = {"complete", "truncated"}
            else:
                states[user] = {"complete"}
        return rows, states

    def _unlimited(self, user, now_ms):
        """What would be served of a wallet if there were no limit."""
        limit, self.history_limit = self.history_limit, None
        try:
            return self.served_of(user, now_ms)
        finally:
            self.history_limit = limit


def now_ms():
    return int(time.time() * 1000)


def tells_of_older(page):
    """Whether a page can only follow older fills: spot alone, or positions that all begin with it, tell of none."""
    first = {}
    for row in page:
        first.setdefault(row["coin"], row["startPosition"])
    spot = ("@", "#", "+")
    return any(
        Decimal(held) != 0 for coin, held in first.items() if not coin.startswith(spot) and "/" not in coin
    )


def within(served, since_ms, until_ms):
    return [row for row in served if since_ms <= row["time"] < until_ms]


def fills_rows(served):
    """The rows of a wallet's fills, given in order, as the table's text."""
    rows, numbers = [], defaultdict(int)
    for told in served:
        row = {column: exact(told.get(name)) for column, name in NUMBERS.items()}
        row |= {column: as_text(told.get(name)) for column, name in OTHERS.items()}
        row |= dict.fromkeys(EMPTY)
        row |= {"time": timestamp(told["time"]), "is_exact": "true", "source": "api"}
        row["liquidation"] = told.get("liquidation") and json.dumps(told["liquidation"], sort_keys=True)
        key = tuple(row[name] for name in KEY)
        row["event_ix"] = str(numbers[key])
        numbers[key] += 1
        rows.append(row)
    return rows


def as_text(value):
    if value is None:
        return None
    return str(value).lower() if isinstance(value, bool) else str(value)


def stored_fills(connection):
    """Table fills as rows of text, documents with their keys in order."""
    names = [
        name
        for (name,) in connection.execute(
            "select attname from pg_attribute where attrelid = 'fills'::regclass and attnum > 0 and not attisdropped"
        )
    ]
    found = []
    for values in connection.execute(f"select {', '.join(f'{name}::text' for name in names)} from fills"):
        row = dict(zip(names, values, strict=True))
        row["liquidation"] = row["liquidation"] and json.dumps(json.loads(row["liquidation"]), sort_keys=True)
        found.append(row)
    return found


def assert_same_fills(connection, expected, *, besides=()):
    """Table fills holds these rows, each once, digit for digit, and nothing else, `besides` those of some wallets."""
    wanted = Counter(map(_frozen, expected))
    assert not wanted or max(wanted.values()) == 1
    stored = Counter(_frozen(row) for row in stored_fills(connection) if row["user_address"] not in besides)
    missing, more = wanted - stored, stored - wanted
    assert not missing and not more, (  # noqa: PT018 - both say what happened
        f"{missing.total()} missing, such as {list(missing)[:1]}; {more.total()} too many, such as {list(more)[:1]}"
    )


def _frozen(row):
    return tuple(sorted(row.items(), key=lambda item: item[0]))


def progress(connection):
    """The queue by wallet."""
    cursor = connection.execute("select * from backfill_progress")
    names = [column.name for column in cursor.description]
    return {row[0]: dict(zip(names, row, strict=True)) for row in cursor}


def states(connection):
    return {user: row["state"] for user, row in progress(connection).items()}


def assert_done(connection, world, now_ms, *, users=None, since_ms=LAUNCH_MS, until_ms=S3_BEGINS_MS):
    """Every wallet is done, every fill that can be served is stored once, nothing else is, and all counts add up."""
    users = world.addresses if users is None else users
    rows, allowed = world.expected(now_ms, users=users, since_ms=since_ms, until_ms=until_ms)
    assert_same_fills(connection, rows)
    found = states(connection)
    assert found.keys() == set(users)
    wrong = {user: (state, allowed[user]) for user, state in found.items() if state not in allowed[user]}
    assert not wrong, f"world {world.seed}: {wrong}"
    assert_adds_up(connection)
    assert_nothing_left(connection)


def assert_adds_up(connection):
    """The ledger and the queue agree with each other and with what is stored."""
    assert_ledger_adds_up(connection)
    leased = "lease_owner is not null or lease_token is not null or lease_expires_at is not null or state = 'running'"
    assert connection.execute(f"select count(*) from backfill_progress where {leased}").fetchone() == (0,)
    fills = Counter(user for (user,) in connection.execute("select user_address from fills"))
    found = progress(connection)
    assert all(row["fills_count"] >= fills[user] for user, row in found.items())
    ledger = runs(connection, "backfill")
    assert sum(run["rows_inserted"] for run in ledger) == fills.total()
    assert sum(run["rows_served"] for run in ledger) == sum(row["fills_count"] for row in found.values())
    for user, row in found.items():
        if row["state"] in {"complete", "truncated"}:
            assert (row["error"], row["attempts"]) == (None, 0), user
