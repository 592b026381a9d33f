"""When a signal becomes an alert: sequences of windows with the alerts that must come of them, worked by hand."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from decimal import Decimal

import pytest

from hlcli.features.alerting import Signal, State, evaluate

T = datetime(2026, 1, 5, tzinfo=UTC)
FIVE = timedelta(minutes=5)
DAY = timedelta(hours=24)
PLAYBOOKS = {"L": "Long-only", "S": "Short-only", "N": "No-trade"}
REGIME, EXITS, STALE = "regime_change", "exit_cluster", "system_stale"
SYSTEM = ("SYSTEM", STALE)


def signal(n, playbook="N", z=None, *, asset="HYPE", r=10, missing=0.0):
    """The signal of window n."""
    z = None if z is None else Decimal(str(z))
    return Signal(T + n * FIVE, asset, PLAYBOOKS[playbook], z, r, 100, missing)


def run(signals, states=None, *, age=timedelta(minutes=1)):
    """Evaluate three minutes after the last window; `age`: of the last usable snapshot then."""
    signals = list(signals)
    now = max((each.signal_ts for each in signals), default=T) + timedelta(minutes=3)
    return evaluate(states or {}, signals, now=now, last_snapshot=now - age)


def told(alerts):
    """The windows of alerts, those that are suppressed with an s: '2 4s'."""
    return " ".join(f"{(each.alert_ts - T) // FIVE}{'s' * each.suppressed}" for each in alerts)


def playbooks(text):
    """A letter a window; '.': more than a tenth is missing, '-': there is no signal."""
    return [
        signal(n, "N" if letter == "." else letter, missing=0.1 if letter == "." else 0.0)
        for n, letter in enumerate(text)
        if letter != "-"
    ]


def scores(values):
    """A z a window; 'x': more than a tenth is missing and z is 0."""
    return [
        signal(n, z=0 if value == "x" else value, missing=0.1 if value == "x" else 0.0)
        for n, value in enumerate(values)
    ]


# --- regime change ------------------------------------------------------------------------------------------------

REGIMES = {
    "the first playbook is no change": ("L", "", "L"),
    "no change": ("LLLL", "", "L"),
    "one window is not enough": ("LN", "", "L"),
    "two in a row": ("LNN", "2", "N"),
    "once only": ("LNNNNNNNNN", "2", "N"),
    "flapping": ("LNLNLNLN", "", "L"),
    "flapping, then settled": ("LNLNN", "4", "N"),
    "two others, one window each": ("LNS", "", "L"),
    "each window another": ("LNSNSNS", "", "L"),
    "the second other one settles": ("LNSS", "3", "S"),
    "back to the first other one": ("LNSNN", "4", "N"),
    "a window with too much missing is passed over": ("LN.N", "3", "N"),
    "and does not count as No-trade": ("L....", "", "L"),
    "nor as the first playbook": (".LL", "", "L"),
    "nor as a return": ("NL.LL", "3", "L"),
    "no signal at all for a while": ("LN---N", "5", "N"),
    "back within the cooldown of 30 minutes": ("LNNLL", "2 4s", "L"),
    "to and fro within the cooldown": ("LNNLLNN", "2 4s 6s", "N"),
    "25 minutes after": ("LNNNNNLL", "2 7s", "L"),
    "30 minutes after": ("LNNNNNNLL", "2 8", "L"),
    "what was suppressed started no cooldown": ("LNNLLLLNN", "2 4s 8", "N"),
}


@pytest.mark.parametrize(("windows", "expected", "playbook"), REGIMES.values(), ids=REGIMES)
def test_regime_change(windows, expected, playbook):
    states, alerts = run(playbooks(windows))
    assert told(alerts) == expected
    assert {(each.asset, each.alert_type, each.severity) for each in alerts} <= {("HYPE", REGIME, "medium")}
    assert states["HYPE", REGIME].current_playbook == PLAYBOOKS[playbook]


def test_a_pending_playbook_is_kept_between_runs():
    states, _ = run(playbooks("LN"))
    state = states["HYPE", REGIME]
    assert (state.pending_playbook, state.pending_periods) == ("No-trade", 1)
    states, alerts = run([signal(2, "N")], states)
    assert told(alerts) == "2"
    state = states["HYPE", REGIME]
    assert (state.pending_playbook, state.pending_periods) == (None, 0)
    states, _ = run([signal(3, "L")], states)
    states, _ = run([signal(4, "N")], states)
    assert states["HYPE", REGIME].pending_periods == 0


def test_an_alert_says_what_it_is_about_and_starts_its_cooldown():
    states, (regime, exits) = run([signal(0, "L"), signal(1, "N"), signal(2, "N", 3)])
    assert regime.alert_ts == exits.alert_ts == T + 2 * FIVE
    assert (regime.alert_type, regime.severity) == (REGIME, "medium")
    assert (exits.alert_type, exits.severity) == (EXITS, "high")
    assert regime.cooldown_until == regime.alert_ts + timedelta(minutes=30)
    assert exits.cooldown_until == exits.alert_ts + timedelta(minutes=60)
    assert "Long-only" in regime.message
    assert "No-trade" in regime.message
    for alert in (regime, exits):
        assert "HYPE" in alert.message
        state = states["HYPE", alert.alert_type]
        assert (state.last_triggered_ts, state.cooldown_until) == (alert.alert_ts, alert.cooldown_until)
        assert (state.daily_count, state.daily_window_start) == (1, alert.alert_ts)


# --- exit cluster -------------------------------------------------------------------------------------------------

REARMED = [3, *11 * [0]]
EXIT_CLUSTERS = {
    "three": ([3], "0", True),
    "just under three": ([2.999999], "", False),
    "once while it lasts": ([3, 4, 5, 3], "0", True),
    "down to two is not over": ([3, *12 * [2], 3], "0", True),
    "under two is over": ([3, 1.999999], "0", False),
    "no score keeps it active": ([3, *12 * [None], 3], "0", True),
    "no score fires nothing": ([None, None], "", False),
    "no score keeps it armed": ([0, None, 3], "2", True),
    "too much missing keeps it active": ([3, *12 * ["x"], 3], "0", True),
    "again within the hour": ([3, 1, 3], "0 2s", True),
    "55 minutes after": ([*REARMED[:11], 3], "0 11s", True),
    "60 minutes after": ([*REARMED, 3], "0 12", True),
    "what was suppressed is not fired again while it lasts": ([3, 1, 3, *20 * [3]], "0 2s", True),
    "what was suppressed started no cooldown": ([3, 1, 3, 1, *8 * [0], 3], "0 2s 12", True),
    "negative": ([-5], "", False),
}


@pytest.mark.parametrize(("windows", "expected", "active"), EXIT_CLUSTERS.values(), ids=EXIT_CLUSTERS)
def test_exit_cluster(windows, expected, active):
    states, alerts = run(scores(windows))
    assert told(alerts) == expected
    assert {(each.asset, each.alert_type, each.severity) for each in alerts} <= {("HYPE", EXITS, "high")}
    assert states["HYPE", EXITS].is_active == active


def test_exit_cluster_needs_five_reducers_to_fire_but_not_to_last():
    states, alerts = run([signal(0, z=9, r=4)])
    assert (told(alerts), states["HYPE", EXITS].is_active) == ("", False)
    states, alerts = run([signal(0, z=9, r=5), signal(1, z=9, r=0), signal(2, z=2, r=0)])
    assert (told(alerts), states["HYPE", EXITS].is_active) == ("0", True)


@pytest.mark.parametrize(("missing", "expected"), [(0.0, "0"), (0.095, "0"), (0.1, ""), (0.5, "")])
def test_a_window_with_a_tenth_missing_is_passed_over(missing, expected):
    states, alerts = run([signal(0, "L", z=9, missing=missing)])
    assert told(alerts) == expected
    assert states["HYPE", REGIME].current_playbook == ("Long-only" if expected else None)


# --- at most four a day -------------------------------------------------------------------------------------------


def fire(*windows, asset="HYPE"):
    """An exit cluster in each of these windows, over in the next."""
    return [signal(n + m, z=3 - 3 * m, asset=asset) for n in windows for m in (0, 1)]


def change(*windows):
    """A regime change in each of these windows, the playbook having been another one since long before."""
    return [signal(n - 1 + m, "LN"[number % 2], z=None) for number, n in enumerate(windows) for m in (0, 1)]


FOUR = (0, 13, 26, 39)


@pytest.mark.parametrize(
    ("windows", "expected"),
    [
        ((*FOUR, 52), "0 13 26 39 52s"),
        ((*FOUR, 52, 65, 78), "0 13 26 39 52s 65s 78s"),
        # What a cooldown suppressed does not count.
        ((0, 3, 6, 13, 26, 39, 52), "0 3s 6s 13 26 39 52s"),
        # A day is 288 windows, from the first alert.
        ((*FOUR, 287), "0 13 26 39 287s"),
        ((*FOUR, 288), "0 13 26 39 288"),
        ((*FOUR, 288, 301, 314, 327, 340), "0 13 26 39 288 301 314 327 340s"),
        # The next day begins with its first alert.
        ((*FOUR, 400, 413, 426, 439, 687, 688), "0 13 26 39 400 413 426 439 687s"),
        ((*FOUR, 400, 413, 426, 439, 688), "0 13 26 39 400 413 426 439 688"),
    ],
)
def test_at_most_four_alerts_of_an_asset_in_a_day(windows, expected):
    _, alerts = run(fire(*windows))
    assert told(alerts) == expected
    assert [each.cooldown_until is None for each in alerts] == [each.suppressed for each in alerts]


def test_the_day_begins_anew_with_one_alert():
    states, _ = run(fire(*FOUR, 300))
    state = states["HYPE", EXITS]
    assert (state.daily_count, state.daily_window_start) == (1, T + 300 * FIVE)


def test_both_kinds_of_alert_count_for_the_cap():
    states = {("HYPE", REGIME): State("HYPE", REGIME, current_playbook="No-trade")}
    _, alerts = run(change(2, 20) + fire(40, 60, 80), states)
    assert told(alerts) == "2 20 40 60 80s"
    _, alerts = run(fire(2, 20) + change(40, 60, 80), states)
    assert told(alerts) == "2 20 40 60 80s"


def test_each_kind_has_its_own_day():
    states = {("HYPE", REGIME): State("HYPE", REGIME, current_playbook="No-trade")}
    # The exits' first day ends before 288, the regimes' before 388.
    signals = fire(0, 13) + change(100, 110) + fire(288, 302, 316) + change(387, 395)
    _, alerts = run(signals, states)
    assert told(alerts) == "0 13 100 110 288 302 316s 387s 395"


def test_the_cap_of_one_asset_is_not_that_of_another():
    _, alerts = run(fire(*FOUR, 52) + fire(52, asset="BTC"))
    assert [(each.asset, each.suppressed) for each in alerts if each.alert_ts == T + 52 * FIVE] == [
        ("BTC", False),
        ("HYPE", True),
    ]


# --- system stale -------------------------------------------------------------------------------------------------

SECONDS = timedelta(seconds=1)


@pytest.mark.parametrize(
    ("age", "stale"),
    [
        (60 * SECONDS, False),
        (600 * SECONDS, False),
        (600 * SECONDS + timedelta(microseconds=1), True),
        (3600 * SECONDS, True),
    ],
)
def test_the_system_is_stale_after_more_than_600_seconds(age, stale):
    states, alerts = run([], age=age)
    assert states[SYSTEM].is_active == stale
    assert len(alerts) == stale
    for alert in alerts:
        assert (alert.asset, alert.alert_type, alert.severity) == ("SYSTEM", STALE, "critical")
        assert alert.alert_ts == T + timedelta(minutes=3)
        assert alert.suppressed is False
        assert alert.message


def test_system_stale_fires_once_until_there_is_a_snapshot_again():
    states, heard = {}, []
    for minute, last in enumerate([0, 0, 0, 17, 18, 0, 0], start=20):
        now = T + timedelta(minutes=minute)
        states, alerts = evaluate(states, [], now=now, last_snapshot=T + timedelta(minutes=last))
        heard.append(len(alerts))
    assert heard == [1, 0, 0, 0, 0, 1, 0]


def test_while_the_system_is_stale_others_are_suppressed_and_neither_count_nor_cool_down():
    signals = [signal(0, "L"), signal(1, "N"), signal(2, "N", 3)]
    states, alerts = run(signals, age=700 * SECONDS)
    assert [(each.alert_type, each.suppressed) for each in alerts] == [
        (STALE, False),
        (REGIME, True),
        (EXITS, True),
    ]
    for alert in alerts[1:]:
        assert alert.cooldown_until is None
        state = states["HYPE", alert.alert_type]
        assert (state.cooldown_until, state.daily_count) == (None, 0)
    assert states["HYPE", REGIME].current_playbook == "No-trade"
    # Still stale: no second alert of it, and the others stay suppressed.
    states, alerts = run([signal(3, z=0), signal(4, z=3)], states, age=800 * SECONDS)
    assert told(alerts) == "4s"
    # Recovered: nothing is left of what was suppressed.
    states, alerts = run([signal(5, z=0), signal(6, "L", z=3), signal(7, "L", z=3)], states)
    assert [(each.alert_type, told([each])) for each in alerts] == [(EXITS, "6"), (REGIME, "7")]
    assert states[SYSTEM].is_active is False


# --- runs ---------------------------------------------------------------------------------------------------------


def test_assets_that_nobody_knew_get_a_state():
    states, alerts = run([signal(0, "L", z=3, asset="xyz:GOLD")])
    assert [each.asset for each in alerts] == ["xyz:GOLD"]
    assert set(states) == {("xyz:GOLD", REGIME), ("xyz:GOLD", EXITS), SYSTEM}
    for (asset, alert_type), state in states.items():
        assert (state.asset, state.alert_type) == (asset, alert_type)


def test_the_states_given_are_left_alone_and_those_without_signals_stay():
    given = {("ETH", REGIME): State("ETH", REGIME, current_playbook="Long-only", daily_count=3)}
    before = dict(given)
    states, _ = run(playbooks("LNN"), given)
    assert given == before
    assert states["ETH", REGIME] == given["ETH", REGIME]


def test_what_was_decided_is_not_decided_again():
    signals = playbooks("LNNLLSSNL") + scores([0, 3, 0, 3])[1:]
    states, alerts = run(signals)
    assert alerts
    assert run(signals, states) == (states, [])
    # Nor is what comes late, before the last window that was decided.
    last = max(each.signal_ts for each in signals)
    assert states["HYPE", REGIME].last_evaluated_ts == states["HYPE", EXITS].last_evaluated_ts == last
    again, alerts = evaluate(
        states,
        [signal(2, "S", 9), signal(3, "S", 9), signal((last - T) // FIVE, "S", 9)],
        now=last + timedelta(minutes=3),
        last_snapshot=last + timedelta(minutes=2),
    )
    assert (again, alerts) == (states, [])


def test_each_kind_goes_on_where_it_stopped():
    states = {
        ("HYPE", REGIME): State("HYPE", REGIME, current_playbook="Long-only", last_evaluated_ts=T),
        ("HYPE", EXITS): State("HYPE", EXITS, last_evaluated_ts=T + 5 * FIVE),
    }
    _, alerts = run([signal(n, "N", 3) for n in range(7)], states)
    assert [(each.alert_type, told([each])) for each in alerts] == [(REGIME, "2"), (EXITS, "6")]


def test_windows_are_decided_in_order_of_time_then_asset(rng):
    signals = [
        signal(n, z=z, asset=asset) for asset in ("HYPE", "BTC", "ETH") for n, z in ((0, 3), (1, 0), (20, 3))
    ]
    states, alerts = run(signals)
    assert [(each.alert_ts, each.asset) for each in alerts] == [
        (T + n * FIVE, asset) for n in (0, 20) for asset in ("BTC", "ETH", "HYPE")
    ]
    for _ in range(5):
        rng.shuffle(signals)
        assert run(signals) == (states, alerts)


def by_history(signals):
    """(window, asset, type, suppressed) of all alerts, judged from the list of those sent, with no states."""
    heard, sent = [], []
    for asset in sorted({each.asset for each in signals}):
        good = sorted(
            (each for each in signals if each.asset == asset and each.missing_share < 0.1),
            key=lambda each: each.signal_ts,
        )
        current, armed, previous = None, True, None
        for each in good:
            wanted = []
            book = each.allowed_playbook
            if current is None:
                current = book
            elif book != current and book == previous:
                current = book
                wanted.append(REGIME)
            previous = book
            z = each.exit_cluster_z
            if armed and z is not None and z >= 3 and each.reducer_count >= 5:
                armed = False
                wanted.append(EXITS)
            elif not armed and z is not None and z < 2:
                armed = True
            for kind in wanted:
                pause = timedelta(minutes=30 if kind == REGIME else 60)
                count = 0
                for other in (REGIME, EXITS):
                    times = [at for at, whose, what in sent if (whose, what) == (asset, other)]
                    day = []
                    for at in times:
                        day = [*day, at] if day and at < day[0] + DAY else [at]
                    count += len(day) if day and each.signal_ts < day[0] + DAY else 0
                cooling = any(
                    (whose, what) == (asset, kind) and each.signal_ts < at + pause for at, whose, what in sent
                )
                heard.append((each.signal_ts, asset, kind, cooling or count >= 4))
                if not heard[-1][-1]:
                    sent.append((each.signal_ts, asset, kind))
    return sorted(heard)


def test_random_windows_give_what_the_history_of_alerts_allows_in_any_number_of_runs(rng):
    signals = []
    for asset in ("HYPE", "BTC"):
        book = "L"
        for n in range(900):
            book = rng.choice("LSN") if rng.random() < 0.07 else book
            shown = rng.choice("LSN") if rng.random() < 0.1 else book
            z = rng.choices([None, 0, 1.99, 2, 2.5, 3, 4], weights=[2, 20, 2, 2, 1, 1, 1])[0]
            missing = 0.2 if rng.random() < 0.05 else 0.0
            signals.append(signal(n, shown, z, asset=asset, r=rng.choice([4, 5, 9]), missing=missing))
    states, alerts = run(signals)
    found = sorted((each.alert_ts, each.asset, each.alert_type, each.suppressed) for each in alerts)
    assert found == by_history(signals)
    assert {each.suppressed for each in alerts} == {False, True}
    assert {each.alert_type for each in alerts} == {REGIME, EXITS}

    parts, kept = [], {}
    cuts = sorted(rng.sample(range(900), 30))
    for start, stop in zip([0, *cuts], [*cuts, 900], strict=True):
        some = [each for each in signals if T + start * FIVE <= each.signal_ts < T + stop * FIVE]
        kept, heard = run(some, kept)
        parts += heard
    # The system's state knows the time of the run.
    assert parts == alerts
    assert {key: state for key, state in kept.items() if key != SYSTEM} == {
        key: state for key, state in states.items() if key != SYSTEM
    }
