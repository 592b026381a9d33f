"""When a signal becomes an alert: persistence, re-arming, cooldown and a daily cap; no clock and no database.

The rules are those of the dashboard that v1 comes from, with v2's exit score in place of v1's, which cannot fire: a
quarter of all wallets would have to leave within five minutes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import TYPE_CHECKING

from hlcli.features.signals import ALERT_REDUCERS, ALERT_Z, DAY, MISSING_NEUTRAL

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from decimal import Decimal

REGIME, EXITS, STALE = "regime_change", "exit_cluster", "system_stale"
SYSTEM = "SYSTEM"
PERSIST_WINDOWS = 2
COOLDOWN = {REGIME: timedelta(minutes=30), EXITS: timedelta(minutes=60)}
SEVERITY = {REGIME: "medium", EXITS: "high", STALE: "critical"}
REARM_Z = 2
DAILY_CAP = 4
STALE_AFTER = timedelta(seconds=600)

Key = tuple[str, str]
"""(asset, alert_type)"""


@dataclass(frozen=True, slots=True)
class State:
    """A row of alert_state."""

    asset: str
    alert_type: str
    is_active: bool = False
    last_triggered_ts: datetime | None = None
    cooldown_until: datetime | None = None
    daily_count: int = 0
    daily_window_start: datetime | None = None
    current_playbook: str | None = None
    pending_playbook: str | None = None
    pending_periods: int = 0
    last_evaluated_ts: datetime | None = None


@dataclass(frozen=True, slots=True)
class Signal:
    """What the decision rests on: a v2 signal."""

    signal_ts: datetime
    asset: str
    allowed_playbook: str
    exit_cluster_z: Decimal | None
    reducer_count: int
    holder_count: int
    missing_share: float
    """Of the wallets expected; from a tenth on the playbook speaks of the data, not of the market."""


@dataclass(frozen=True, slots=True)
class Alert:
    """A row of alerts, less its picture of the signal."""

    alert_ts: datetime
    asset: str
    alert_type: str
    severity: str
    message: str
    cooldown_until: datetime | None
    suppressed: bool


def evaluate(
    states: Mapping[Key, State], signals: Iterable[Signal], *, now: datetime, last_snapshot: datetime
) -> tuple[dict[Key, State], list[Alert]]:
    """Decide the signals that each alert has not seen yet, in order of time; returns the new states and the alerts.

    `last_snapshot` is the newest usable one: when it is over ten minutes old at `now` the system is stale, and
    everything else is suppressed until it is not.
    """
    desk = _Desk(dict(states))
    desk.look_at_system(now, last_snapshot)
    for signal in sorted(signals, key=lambda each: (each.signal_ts, each.asset)):
        for alert_type in (REGIME, EXITS):
            desk.look_at(signal, alert_type)
    return desk.states, desk.alerts


class _Desk:
    def __init__(self, states: dict[Key, State]) -> None:
        self.states = states
        self.alerts: list[Alert] = []

    def state(self, asset: str, alert_type: str) -> State:
        return self.states.get((asset, alert_type)) or State(asset, alert_type)

    def keep(self, state: State) -> None:
        self.states[state.asset, state.alert_type] = state

    def look_at_system(self, now: datetime, last_snapshot: datetime) -> None:
        state = self.state(SYSTEM, STALE)
        stale = now - last_snapshot > STALE_AFTER
        if stale and not state.is_active:
            message = f"no usable snapshot since {last_snapshot:%Y-%m-%d %H:%MZ}"
            self.alerts.append(Alert(now, SYSTEM, STALE, SEVERITY[STALE], message, None, suppressed=False))
            state = replace(state, last_triggered_ts=now)
        self.keep(replace(state, is_active=stale, last_evaluated_ts=now))

    def look_at(self, signal: Signal, alert_type: str) -> None:
        state = self.state(signal.asset, alert_type)
        if state.last_evaluated_ts is not None and signal.signal_ts <= state.last_evaluated_ts:
            return
        state = replace(state, last_evaluated_ts=signal.signal_ts)
        if signal.missing_share < MISSING_NEUTRAL:
            state, message = (_regime if alert_type == REGIME else _exits)(state, signal)
            if message:
                state = self.fire(state, signal.signal_ts, message)
        self.keep(state)

    def fire(self, state: State, at: datetime, message: str) -> State:
        """Record the alert; only one that is not suppressed counts and starts a cooldown."""
        suppressed = (
            self.state(SYSTEM, STALE).is_active
            or (state.cooldown_until is not None and at < state.cooldown_until)
            or self.fired_today(state.asset, at) >= DAILY_CAP
        )
        until = None if suppressed else at + COOLDOWN[state.alert_type]
        severity = SEVERITY[state.alert_type]
        self.alerts.append(Alert(at, state.asset, state.alert_type, severity, message, until, suppressed))
        if suppressed:
            return state
        if _window_over(state, at):
            state = replace(state, daily_count=0, daily_window_start=at)
        return replace(state, last_triggered_ts=at, cooldown_until=until, daily_count=state.daily_count + 1)

    def fired_today(self, asset: str, at: datetime) -> int:
        """Alerts of the asset in the day's windows of both its kinds."""
        held = [self.state(asset, alert_type) for alert_type in (REGIME, EXITS)]
        return sum(state.daily_count for state in held if not _window_over(state, at))


def _window_over(state: State, at: datetime) -> bool:
    return state.daily_window_start is None or at - state.daily_window_start >= DAY


def _regime(state: State, signal: Signal) -> tuple[State, str | None]:
    """A playbook counts as changed when it has been another one twice in a row."""
    found, before = signal.allowed_playbook, state.current_playbook
    if before is None or found == before:
        return replace(state, current_playbook=found, pending_playbook=None, pending_periods=0), None
    periods = state.pending_periods + 1 if found == state.pending_playbook else 1
    if periods < PERSIST_WINDOWS:
        return replace(state, pending_playbook=found, pending_periods=periods), None
    changed = replace(state, current_playbook=found, pending_playbook=None, pending_periods=0)
    return changed, f"{signal.asset}: {before} became {found}"


def _exits(state: State, signal: Signal) -> tuple[State, str | None]:
    """Fires once when far more holders reduce than is usual, and again only after that has passed."""
    z = signal.exit_cluster_z
    if state.is_active:
        return replace(state, is_active=z is None or z >= REARM_Z), None
    if z is None or z < ALERT_Z or signal.reducer_count < ALERT_REDUCERS:
        return state, None
    message = (
        f"{signal.asset}: {signal.reducer_count} of {signal.holder_count} holders reduced"
        f" ({z:.1f} standard deviations above usual)"
    )
    return replace(state, is_active=True), message
