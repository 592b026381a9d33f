"""Wallets: the leaderboard of the stats server, and the positions of one wallet.

Shapes: facts A4 and A6 of the project's notes on the exchange; decimals are text, times milliseconds.
"""

from __future__ import annotations

import heapq
import re
import time
from dataclasses import dataclass, field
from decimal import Decimal
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from hlcli.budget import DeadlineError, Priority
from hlcli.http import MEGABYTE, BadPayloadError, HttpClient
from hlcli.loader import Rejected
from hlcli.loader.checks import MAX_MS, NUMERIC_TEXT
from hlcli.loader.quarantine import MAX_PAYLOAD
from hlcli.sources import info, wire

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    import polars as pl

    from hlcli.settings import Settings

UNIVERSE = "wallet_universe_current"
SNAPSHOTS = "wallet_snapshots"

# Ten times the longest list ever seen; and so many unusable rows are a broken answer, not odd wallets.
MAX_LISTED = 500_000
MAX_UNUSABLE = 1_000
MAX_NAME = 1_000
_ADDRESS = re.compile(r"0x[0-9a-f]{40}")
_NUMBER = re.compile(NUMERIC_TEXT)

_UNIVERSE_COLUMNS = ("wallet_id", "rank", "month_pnl", "month_roi", "account_value", "display_name")
_SNAPSHOT_COLUMNS = (
    "wallet_id",
    "asset",
    "position_szi",
    "entry_px",
    "liq_px",
    "leverage",
    "leverage_type",
    "margin_used",
    "position_value",
    "missing_reason",
    "is_dirty",
    "dirty_reason",
    "source_ts",
)


@dataclass(frozen=True, slots=True)
class Leaderboard:
    """The best of a leaderboard: `wallets` has columns of wallet_universe_current, in order of rank."""

    wallets: pl.DataFrame
    listed: int
    """Wallets in the whole list whose rank can be told."""
    rejected: list[Rejected]


def fetch_leaderboard(client: HttpClient, settings: Settings, size: int) -> Leaderboard:
    """GET the stats server's leaderboard (about 47,500 rows, 40 MB) and keep the best `size` by 30-day PnL.

    Raises SourceError when it cannot be had whole.
    """

    def rows(body: IO[bytes]) -> Iterator[Any]:
        for row in wire.items(body, "leaderboardRows"):
            if time.monotonic() > client.deadline:
                raise DeadlineError("the run's time is up")
            yield row

    def check(body: IO[bytes]) -> Leaderboard:
        try:
            return best(rows(body), size)
        except (ValueError, ArithmeticError, RecursionError) as error:
            raise BadPayloadError("the leaderboard is cut off or no leaderboard") from error

    found, _ = client.download(f"{settings.hl_stats_url}/leaderboard", check=check)
    assert found is not None  # only an ETag, which none was sent, makes it None
    return found


def fetch_leaderboard_from_info(client: HttpClient, settings: Settings, size: int) -> Leaderboard:
    """The same from the info endpoint, undocumented; seen to answer 422. Raises SourceError."""
    answer = info.ask(client, settings.hl_api_url, {"type": "leaderboard"})
    rows = wire.mapping(answer).get("leaderboardRows")
    if not isinstance(rows, list):
        raise BadPayloadError("the info endpoint served no leaderboard")
    return best(rows, size)


def best(entries: Iterable[Any], size: int) -> Leaderboard:
    """The `size` wallets with the highest PnL of 30 days; of equal ones the lower address comes first.

    An address that comes twice counts once, as it came first. Raises BadPayloadError for a list that is empty,
    absurdly long or has over a thousand unusable rows.
    """
    reading = _Reading()
    top = heapq.nsmallest(size, reading.wallets(entries), key=lambda row: (-row["pnl"], row["wallet_id"]))
    if not reading.seen:
        raise BadPayloadError("the leaderboard is empty or no leaderboard")
    rows = [{**row, "rank": place} for place, row in enumerate(top, 1)]
    return Leaderboard(wire.frame(rows, _UNIVERSE_COLUMNS), len(reading.seen), reading.rejected)


def _cut(payload: dict[str, Any]) -> dict[str, Any] | str:
    """What quarantine will show of it: decoded JSON takes twenty times its bytes, and is kept until the end."""
    told = wire.text(payload) or ""
    return payload if len(told) <= MAX_PAYLOAD else told[:MAX_PAYLOAD]


@dataclass(slots=True)
class _Reading:
    """What was met while reading a leaderboard row by row."""

    seen: set[str] = field(default_factory=set)
    rejected: list[Rejected] = field(default_factory=list)

    def wallets(self, entries: Iterable[Any]) -> Iterator[dict[str, Any]]:
        for entry in entries:
            row, column, reason = _wallet_row(entry)
            if reason:
                self.rejected.append(Rejected([row["wallet_id"]], reason, _cut({"entry": entry}), column))
                if len(self.rejected) > MAX_UNUSABLE:
                    raise BadPayloadError(f"over {MAX_UNUSABLE} rows of the leaderboard are unusable")
            if column not in {None, "display_name"} or row["wallet_id"] in self.seen:
                continue
            self.seen.add(row["wallet_id"])
            if len(self.seen) > MAX_LISTED:
                raise BadPayloadError(f"the leaderboard has over {MAX_LISTED} wallets")
            yield row


def _wallet_row(entry: Any) -> tuple[dict[str, Any], str | None, str | None]:
    """A row of the universe, and the column that cannot be stored with the reason, or None twice."""
    listed = wire.mapping(entry)
    windows = listed.get("windowPerformances")
    month: dict[str, Any] = {}
    for window in windows if isinstance(windows, list) else ():
        if isinstance(window, list) and len(window) == 2 and window[0] == "month":
            month = dict(wire.mapping(window[1]))
    row: dict[str, Any] = {
        "wallet_id": wire.address(listed.get("ethAddress")),
        "month_pnl": wire.text(month.get("pnl")),
        "month_roi": wire.text(month.get("roi")),
        "account_value": wire.text(listed.get("accountValue")),
        "display_name": wire.text(listed.get("displayName")),
    }
    if not _ADDRESS.fullmatch(row["wallet_id"] or ""):
        return row, "wallet_id", "not_an_address"
    for name in ("month_pnl", "month_roi", "account_value"):
        value = row[name]
        if value is None and name == "month_pnl":
            return row, name, "null"
        if value is not None and not _NUMBER.fullmatch(value):
            return row, name, "not_a_number"
    row["pnl"] = Decimal(row["month_pnl"])
    if row["display_name"] and ("\x00" in row["display_name"] or len(row["display_name"]) > MAX_NAME):
        # The name is no reason to lose the wallet.
        row["display_name"] = None
        return row, "display_name", "invalid_text"
    return row, None, None


class Question(NamedTuple):
    """What one clearinghouseState is asked for: the positions of a wallet in assets of one dex."""

    wallet_id: str
    dex: str
    """"" is the exchange's own."""
    assets: tuple[str, ...]


def questions(wallet_id: str, assets: Iterable[str]) -> list[Question]:
    """The questions that tell these assets: one for each dex, which is what stands before the colon of dex:COIN."""
    by_dex: dict[str, list[str]] = {}
    for asset in assets:
        by_dex.setdefault(asset.rpartition(":")[0], []).append(asset)
    return [Question(wallet_id, dex, tuple(held)) for dex, held in by_dex.items()]


@dataclass(frozen=True, slots=True)
class Positions:
    """A wallet's positions: a row of wallet_snapshots for each asset asked, less the time and the run."""

    rows: list[dict[str, Any]]
    rejected: list[Rejected]


def fetch_positions(
    client: HttpClient, settings: Settings, question: Question, *, timeout_s: float
) -> Positions:
    """Ask clearinghouseState of one wallet (weight 2), urgently. Raises SourceError."""
    answer = _ask(
        client, settings, {"type": "clearinghouseState", "user": question.wallet_id}, question.dex, timeout_s
    )
    return positions(question, answer)


def fetch_batch(
    client: HttpClient, settings: Settings, batch: Sequence[Question], *, timeout_s: float
) -> list[Positions | None]:
    """Ask the undocumented batchClearinghouseStates of wallets of one dex; None for one that it did not tell.

    Raises SourceError.
    """
    users = [question.wallet_id for question in batch]
    answers = _ask(
        client, settings, {"type": "batchClearinghouseStates", "users": users}, batch[0].dex, timeout_s
    )
    # The states do not name their wallets: only their number shows that none is missing.
    if not isinstance(answers, list) or len(answers) != len(batch):
        raise BadPayloadError(f"a batch of {len(batch)} states came back as something else")
    return [_or_none(question, answer) for question, answer in zip(batch, answers, strict=True)]


def _or_none(question: Question, answer: Any) -> Positions | None:
    try:
        return positions(question, answer)
    except BadPayloadError:
        return None


def _ask(client: HttpClient, settings: Settings, question: dict[str, Any], dex: str, timeout_s: float) -> Any:
    return info.ask(
        client,
        settings.hl_api_url,
        {**question, "dex": dex} if dex else question,
        priority=Priority.URGENT,
        most_items=len(question.get("users", ())),
        timeout_s=timeout_s,
        # A wallet in every coin that there is takes 100 KB; decoded, twenty times as much.
        limit_bytes=min(max(len(question.get("users", ())), 1), 32) * MEGABYTE,
    )


def positions(question: Question, answer: Any) -> Positions:
    """Read a clearinghouseState: a position that is closed is simply absent, and so is written as 0.

    Nothing is taken for flat on a guess: a position that cannot be understood is unknown.

    Raises BadPayloadError when the answer as a whole cannot be understood.
    """
    held = wire.mapping(answer).get("assetPositions")
    if not isinstance(held, list):
        raise BadPayloadError("a clearinghouseState without its list of positions")
    served: dict[str, list[Any]] = {}
    for entry in held:
        position = wire.mapping(wire.mapping(entry).get("position"))
        coin = position.get("coin")
        if not isinstance(coin, str):
            raise BadPayloadError("a clearinghouseState with a position that names no coin")
        served.setdefault(coin, []).append(position)
    told = answer.get("time")
    source_ts = told if isinstance(told, int) and not isinstance(told, bool) and 0 <= told <= MAX_MS else None
    rows, rejected = [], []
    for asset in question.assets:
        found = served.get(asset, [])
        row, reason = _position_row(found)
        if reason:
            row = _unknown(reason)
            rejected.append(Rejected([question.wallet_id, asset], reason, _cut({"positions": found})))
        rows.append({"wallet_id": question.wallet_id, "asset": asset, "source_ts": source_ts, **row})
    return Positions(rows, rejected)


def fetch_coins(client: HttpClient, settings: Settings, dex: str, *, timeout_s: float) -> set[str]:
    """The coins of a dex ("": the exchange's own), as they are spelt. Raises SourceError."""
    mids = _ask(client, settings, {"type": "allMids"}, dex, timeout_s)
    if not isinstance(mids, dict):
        raise BadPayloadError("allMids served no prices")
    return set(mids)


def unknown_rows(question: Question, reason: str) -> list[dict[str, Any]]:
    """The rows of a wallet that could not be read."""
    return [
        {"wallet_id": question.wallet_id, "asset": asset, **_unknown(reason)} for asset in question.assets
    ]


def _unknown(reason: str) -> dict[str, Any]:
    return {"missing_reason": reason, "is_dirty": True, "dirty_reason": "null_szi"}


def _position_row(found: Sequence[Any]) -> tuple[dict[str, Any], str | None]:
    """The columns of a position, or why they cannot be told."""
    if not found:
        return {"position_szi": "0", "is_dirty": False}, None
    if len(found) > 1:
        return {}, "served_twice"
    position = found[0]
    leverage = wire.mapping(position.get("leverage"))
    row: dict[str, Any] = {
        "position_szi": position.get("szi"),
        "entry_px": position.get("entryPx"),
        "liq_px": position.get("liquidationPx"),
        "leverage": leverage.get("value"),
        "margin_used": position.get("marginUsed"),
        "position_value": position.get("positionValue"),
    }
    for name, value in row.items():
        plain = wire.text(value)
        if plain is None and name == "position_szi":
            return {}, f"{name}: null"
        if plain is not None and not _NUMBER.fullmatch(plain):
            return {}, f"{name}: not_a_number"
    kind = leverage.get("type")
    # Not a set: what is served may have no hash.
    row["leverage_type"] = kind if kind in ("cross", "isolated") else None
    return {**row, "is_dirty": False}, None


def snapshot_frame(rows: Iterable[dict[str, Any]]) -> pl.DataFrame:
    """Rows of positions as a frame for wallet_snapshots, less the time and the run."""
    return wire.frame(rows, _SNAPSHOT_COLUMNS)
