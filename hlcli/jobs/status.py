"""`hlcli status`: how every channel is doing and how much of the API budget is used."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hlcli import ledger, migrations
from hlcli.exitcodes import ExitCode, UsageError
from hlcli.jobs import channels
from hlcli.jobs.backfill_fleet import Fleet, fleet
from hlcli.sqlfiles import query

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime
    from decimal import Decimal

    from hlcli.settings import Settings


@dataclass(frozen=True, slots=True)
class BudgetUse:
    """The last 60 seconds of one egress key."""

    egress_key: str
    weight: int
    requests: int
    blocked_until: datetime | None


@dataclass(frozen=True, slots=True)
class SnapshotHealth:
    """v_latest_health: how fresh and complete the wallets' snapshots are now."""

    health_state: str
    """healthy, degraded or stale."""
    coverage_pct: Decimal
    """Of the newest minute."""
    last_snapshot_ts: datetime
    last_success_snapshot_ts: datetime | None
    snapshot_status: str
    age_s: float | None
    """Since the newest usable minute began."""
    error: str | None


@dataclass(frozen=True, slots=True)
class Status:
    """Everything that `hlcli status` shows."""

    health: list[ledger.Health]
    budgets: list[BudgetUse]
    weight_per_minute: int
    snapshots: SnapshotHealth | None
    """None before the first snapshot."""
    backfill: Fleet | None
    """None before the first one."""

    def exit_code(self, *, named: bool) -> ExitCode:
        """PARTIAL when a channel failed or is stale; one that never ran counts only when asked for by name."""
        bad = {"failed", "stale", "missing"} if named else {"failed", "stale"}
        return ExitCode.PARTIAL if any(each.state in bad for each in self.health) else ExitCode.OK


def read_status(settings: Settings, names: Sequence[str] = ()) -> Status:
    """Read the state of all channels, or of those named "source/channel" or "channel".

    Raises UsageError for an unknown name, ConfigError for an old schema.
    """
    known = channels()
    chosen = [each for each in known if not names or each.label in names or each.name in names]
    unknown = [name for name in names if not any(name in (each.label, each.name) for each in known)]
    if unknown:
        raise UsageError(f"no channel {unknown[0]!r}; there are {', '.join(each.label for each in known)}")
    with migrations.connect_ready(settings, role="status") as connection:
        health = [ledger.health(connection, channel) for channel in chosen]
        rows: list[tuple[Any, ...]] = connection.execute(query("ledger", "budget")).fetchall()
        workers = fleet(connection)
        snapshots: tuple[Any, ...] | None = connection.execute(query("wallets", "health")).fetchone()
    return Status(
        health,
        [BudgetUse(*row) for row in rows],
        settings.hl_api_weight_per_minute,
        SnapshotHealth(*snapshots) if snapshots else None,
        workers if workers.wallets or workers.members else None,
    )
