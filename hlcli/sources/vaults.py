"""Vaults: the list of the stats server and the details of one vault.

Shapes: facts A4 and A5 of the project's notes on the exchange; both bodies carry decimals as text, some numbers as
JSON numbers, times in milliseconds.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal
from typing import IO, TYPE_CHECKING, Any

from hlcli.features.drawdown import max_drawdown, returns_drawdown
from hlcli.http import BadPayloadError, HttpClient
from hlcli.loader import Rejected
from hlcli.loader.checks import NUMERIC_TEXT
from hlcli.sources import info, wire

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from datetime import datetime

    import polars as pl

    from hlcli.budget import Priority
    from hlcli.settings import Settings

VAULTS = "hyperliquid_vaults_discovery.vaults"
METRICS = "hyperliquid_vaults_discovery.vault_metrics"

FOLLOWERS_SERVED = 100
MAX_POINTS = 5_000
_NUMBER = re.compile(NUMERIC_TEXT)

_LIST_COLUMNS = (
    "vault_address",
    "name",
    "leader_address",
    "tvl_usd",
    "apr",
    "is_closed",
    "relationship_type",
    "parent_address",
    "child_addresses",
    "vault_create_time",
)
_DETAIL_COLUMNS = ("vault_address", "description", "allow_deposits", "always_close_on_withdraw", "is_closed")
_WINDOWS = {"day": "day", "week": "week", "month": "month", "allTime": "all_time"}
_METRIC_COLUMNS = (
    "vault_address",
    "source_ts",
    "apr",
    "account_value",
    "max_distributable_tvl",
    "max_withdrawable",
    "leader_fraction",
    "leader_commission",
    "follower_count",
    "followers_truncated",
    "is_closed",
    *(
        f"{what}_{window}"
        for what in ("pnl", "vlm", "max_drawdown", "max_drawdown_pnl")
        for window in _WINDOWS.values()
    ),
)


@dataclass(frozen=True, slots=True)
class VaultList:
    """The whole list: `vaults` has the table's columns, `rejected` the entries that are no vault."""

    vaults: pl.DataFrame
    rejected: list[Rejected]

    @property
    def served(self) -> int:
        return self.vaults.height + len(self.rejected)


@dataclass(frozen=True, slots=True)
class Details:
    """What vaultDetails told of several vaults: a row each in `metrics` and in one of the first two."""

    listed: pl.DataFrame
    """Columns that only the details have: of all else the list is the authority."""
    unlisted: pl.DataFrame
    """Vaults that are not in the list, so that the details are all there is."""
    metrics: pl.DataFrame
    rejected: list[Rejected]


def list_url(settings: Settings) -> str:
    """Where the list is."""
    return f"{settings.hl_stats_url}/vaults"


def fetch_list(
    client: HttpClient, settings: Settings, *, etag: str | None
) -> tuple[VaultList | None, str | None]:
    """GET the vault list (about 9,500 entries, 14 MB) and its ETag; None when `etag` still names it.

    Raises SourceError when it cannot be had whole.
    """
    return client.download(list_url(settings), etag=etag, check=parse_list)


def parse_list(body: IO[bytes]) -> VaultList:
    """Read the list entry by entry; the pnl series that make up most of it are never kept.

    Raises BadPayloadError for a body that is cut off, no JSON, or not an array of at least one entry.
    """
    rows: list[dict[str, str | None]] = []
    rejected: list[Rejected] = []
    try:
        for entry in wire.items(body):
            row = _list_row(entry)
            if row["vault_address"] is None:
                rejected.append(Rejected([None], "not_a_vault", {"entry": entry}))
            else:
                rows.append({name: wire.text(value) for name, value in row.items()})
    except (ValueError, ArithmeticError, RecursionError) as error:
        raise BadPayloadError("the vault list is cut off or no JSON") from error
    if not rows:
        raise BadPayloadError("the vault list is empty or no list of vaults")
    return VaultList(wire.frame(rows, _LIST_COLUMNS), rejected)


def _list_row(entry: Any) -> dict[str, Any]:
    summary = wire.mapping(wire.mapping(entry).get("summary"))
    return {
        "vault_address": wire.address(summary.get("vaultAddress")),
        "name": summary.get("name"),
        "leader_address": wire.address(summary.get("leader")),
        "tvl_usd": summary.get("tvl"),
        "apr": wire.mapping(entry).get("apr"),
        "is_closed": summary.get("isClosed"),
        **_relationship(summary),
        "vault_create_time": summary.get("createTimeMillis"),
    }


def _relationship(holder: Mapping[str, Any]) -> dict[str, Any]:
    relationship = wire.mapping(holder.get("relationship"))
    data = wire.mapping(relationship.get("data"))
    children = data.get("childAddresses")
    return {
        "relationship_type": relationship.get("type"),
        "parent_address": wire.address(data.get("parentAddress")),
        "child_addresses": wire.text(children) if isinstance(children, list) else None,
    }


def fetch_details(client: HttpClient, settings: Settings, address: str, priority: Priority) -> Any:
    """Ask vaultDetails of one vault (weight 20); None when the address is no vault. Raises SourceError."""
    question = {"type": "vaultDetails", "vaultAddress": address}
    return info.ask(client, settings.hl_api_url, question, priority=priority)


def details(
    answers: Iterable[tuple[str, Any]], observed_at: datetime, unlisted: frozenset[str] = frozenset()
) -> Details:
    """Turn answers of vaultDetails, each with the address that was asked, into rows of both tables."""
    import polars as pl

    listed: list[dict[str, Any]] = []
    strangers: list[dict[str, Any]] = []
    metrics: list[dict[str, Any]] = []
    rejected: list[Rejected] = []
    for address, answer in answers:
        reason = _refusal(address, answer)
        if reason:
            rejected.append(Rejected([address], reason, {"vault_address": address, "answer": answer}))
            continue
        (strangers if address in unlisted else listed).append(_vault_row(address, answer))
        metrics.append(_metric_row(address, answer))
    observed = pl.lit(observed_at).cast(pl.Datetime("us", "UTC")).alias("observed_at")
    return Details(
        wire.frame(listed, _DETAIL_COLUMNS),
        wire.frame(strangers, tuple(dict.fromkeys((*_LIST_COLUMNS, *_DETAIL_COLUMNS)))),
        wire.frame(metrics, _METRIC_COLUMNS).with_columns(observed),
        rejected,
    )


def _refusal(address: str, answer: Any) -> str | None:
    if answer is None:
        return "not_a_vault"
    if not isinstance(answer, dict) or not isinstance(answer.get("portfolio"), list):
        return "unknown_shape"
    if wire.address(answer.get("vaultAddress")) != address:
        return "another_vault"
    return None


def _vault_row(address: str, answer: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that vaultDetails says of the vault itself; it has no TVL and no creation time."""
    return {
        "vault_address": address,
        "name": answer.get("name"),
        "leader_address": wire.address(answer.get("leader")),
        "apr": answer.get("apr"),
        "is_closed": answer.get("isClosed"),
        **_relationship(answer),
        "description": answer.get("description"),
        "allow_deposits": answer.get("allowDeposits"),
        "always_close_on_withdraw": answer.get("alwaysCloseOnWithdraw"),
    }


def _metric_row(address: str, answer: Mapping[str, Any]) -> dict[str, Any]:
    followers = answer.get("followers")
    served = len(followers) if isinstance(followers, list) else None
    row: dict[str, Any] = {
        "vault_address": address,
        "apr": answer.get("apr"),
        "max_distributable_tvl": answer.get("maxDistributable"),
        "max_withdrawable": answer.get("maxWithdrawable"),
        "leader_fraction": answer.get("leaderFraction"),
        "leader_commission": answer.get("leaderCommission"),
        "follower_count": served,
        "followers_truncated": None if served is None else served >= FOLLOWERS_SERVED,
        "is_closed": answer.get("isClosed"),
    }
    windows = {
        pair[0]: wire.mapping(pair[1])
        for pair in answer["portfolio"]
        if isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str)
    }
    for wire_name, name in _WINDOWS.items():
        row.update(_window_columns(name, windows.get(wire_name, {})))
    # The day's series is the finest and ends last; a young vault may lack it.
    for wire_name in _WINDOWS:
        points = _points(windows.get(wire_name, {}).get("accountValueHistory"))
        if points:
            row["source_ts"], row["account_value"] = points[-1]
            break
    return row


def _window_columns(window: str, served: Mapping[str, Any]) -> dict[str, Any]:
    account, pnl = _points(served.get("accountValueHistory")), _points(served.get("pnlHistory"))
    columns: dict[str, Any] = {
        f"pnl_{window}": pnl[-1][1] if pnl else None,
        f"vlm_{window}": served.get("vlm"),
    }
    account_values, pnls = _decimals(account), _decimals(pnl)
    if account_values is not None:
        columns[f"max_drawdown_{window}"] = max_drawdown(account_values)
        if pnls is not None and [when for when, _ in account] == [when for when, _ in pnl]:
            columns[f"max_drawdown_pnl_{window}"] = returns_drawdown(account_values, pnls)
    return columns


def _points(history: Any) -> Sequence[tuple[Any, Any]]:
    """The [time, value] pairs of a history, in time order as served; what is no pair is passed over."""
    if not isinstance(history, list):
        return []
    return [
        (point[0], point[1]) for point in history[-MAX_POINTS:] if isinstance(point, list) and len(point) == 2
    ]


def _decimals(points: Sequence[tuple[Any, Any]]) -> list[Decimal] | None:
    """The values as numbers; None when there is none or one is not a sane number."""
    values = [wire.text(value) or "" for _, value in points]
    if not values or not all(map(_NUMBER.fullmatch, values)):
        return None
    return [Decimal(value) for value in values]
