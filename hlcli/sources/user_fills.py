"""A wallet's fills, page by page, from userFillsByTime and userTwapSliceFillsByTime.

Both serve the oldest so many fills of a range first; start and end are inclusive. Perhaps only a wallet's newest
10,000 fills are served at all, and slices of TWAPs for some two weeks. What a page proves is told as a range of time:
times are milliseconds since 1970, ranges [from, to).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from itertools import pairwise, zip_longest
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from hlcli.budget import Priority
from hlcli.http import BadPayloadError
from hlcli.sources import files, fills, info

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from hlcli.http import HttpClient
    from hlcli.settings import Settings

FILLS = "userFillsByTime"
SLICES = "userTwapSliceFillsByTime"
PAGE_SIZE = 2000
# Of this many, or a multiple, the documentation speaks, too ("500 elements or distinct blocks"): such a page may be
# cut off, and one more question tells.
OTHER_PAGE_SIZE = 500
# Perhaps of a wallet's fills only so many, the newest, are served.
HISTORY_LIMIT = 10_000
# Before the exchange had any user; also the earliest time that the endpoints take.
BEGINNING = 0
# The year 2100: what is later is no time.
LATEST = 4_102_444_800_000

Range = tuple[int, int]


class Start(Enum):
    """What is known of the moment at which a range begins."""

    UNKNOWN = "unknown"
    """Whether the source's history reaches back to it must be found out."""
    FILL = "fill"
    """The source has served a fill of this very millisecond before: should it be missing, the limit has moved on."""
    PLAIN = "plain"
    """Nothing is to be found out."""


@dataclass(frozen=True, slots=True)
class Page:
    """Fills, and what they prove."""

    events: list[Any]
    """As served, in order of time; a millisecond is whole, unless it is cut off."""
    covered: Range
    """The source serves no other fills of this range; it may be empty."""
    cut_off: Range | None = None
    """The source has had fills of this range, or seems to, and does not serve them any more."""
    doubtful: Range | None = None
    """Up to the oldest fill served: whether there were others, which are not served any more, cannot be told, as there
    is more than a page since then and nothing is known to be older."""


@dataclass(slots=True)
class Longest:
    """The most fills that an answer had so far: fewer than that are no full page, whatever the source's limit is now."""

    fills: int = 0


class Ask(Protocol):
    """Asks for one page: the fills from `start` to `last`, both inclusive, or without an end."""

    def __call__(self, start: int, last: int | None, *, newest_first: bool = False) -> Any: ...


def asker(
    client: HttpClient,
    settings: Settings,
    kind: str,
    user: str,
    *,
    page_size: int = PAGE_SIZE,
    spent: Callable[[int], None],
) -> Ask:
    """What asks the exchange for a wallet's fills, as backfill; `spent` is told the weight of each answer.

    It raises as HttpClient.post_json() does.
    """

    def ask(start: int, last: int | None, *, newest_first: bool = False) -> Any:
        question: dict[str, Any] = {"type": kind, "user": user, "startTime": start, "aggregateByTime": False}
        if last is not None:
            question["endTime"] = last
        if newest_first:
            question["reversed"] = True
        answer = info.ask(client, settings.hl_api_url, question, most_items=page_size, priority=Priority.BULK)
        spent(info.weight(kind, len(answer) if isinstance(answer, list) else 0))
        return answer

    return ask


def rows(user: str, events: list[Any]) -> files.Rows | None:
    """The fills of a page as rows of table fills; None for none. Raises UnusableError for what cannot be any."""
    return next(fills.read([files.Batch(elements=events)], user=user), None) if events else None


def pages(
    ask: Ask,
    start: int,
    end: int,
    begins: Start,
    *,
    page_size: int = PAGE_SIZE,
    longest: Longest | None = None,
) -> Iterator[Page]:
    """All fills of [start, end), in pages whose ranges together are [start, end).

    Where nothing is known of the start the first question has no end: an answer that is not full then proves that
    nothing is cut off. Of a full page the last millisecond is asked for once more and left to the next page, so each
    millisecond comes from one answer. Pages that come newest first are walked from their other end.

    With `longest`, which walks share, one more question tells of an answer that is longer than all before whether it
    is the last one: should the source's pages hold less than `page_size`, nothing is lost.

    Raises BadPayloadError for an answer that cannot be one, and what `ask` raises.
    """
    left = [_Part(start, end, begins)]
    # Whether the source was seen to serve the newest first.
    falls = False
    while left:
        part = left.pop()
        unended = part.begins is Start.UNKNOWN
        unsure = unended or part.newer is not None
        answer = _read(
            ask(part.start, None if unended else part.end - 1), part, page_size, falls, unended=unended
        )
        if longest is not None and len(answer.events) >= max(longest.fills, 1):
            longest.fills = len(answer.events)
            if not answer.full and _goes_on(ask, part, answer, page_size):
                answer = answer._replace(full=True)
        low, high = answer.low, answer.high
        if answer.full and answer.descending and not falls and high is not None and high + 1 < part.end:
            # Or it is the oldest of them, turned round, and what is newer would never be asked for.
            newer = _Part(high + 1, part.end, Start.PLAIN)
            if _read(ask(newer.start, newer.end - 1), newer, page_size, unended=False).low is not None:
                raise BadPayloadError("the oldest fills of a range were served newest first")
        falls = answer.descending
        if not answer.full:
            moved_on = low is None and part.had_fill
            if moved_on and _is_empty(ask, part, page_size):
                raise BadPayloadError("no fill is served any more, though there were some")
            cut_to, doubtful_to = None, None
            if moved_on:
                cut_to = part.end
            elif part.begins is Start.FILL:
                cut_to = low
            elif part.newer is not None:
                cut_to, doubtful_to = _history(ask, part, answer if low is not None else part.newer)
            yield _page(answer, part, part.start, part.end, cut_to, doubtful_to)
        elif low is None or high is None:
            raise BadPayloadError("a page without a single time was served")
        elif low >= part.end and (answer.descending or low == high):
            left.append(part._replace(begins=Start.PLAIN, newer=answer))
        elif low == high:
            # Whether the limit has moved on meanwhile is found out as if nothing were known.
            left.append(_Part(low + 1, part.end, Start.UNKNOWN))
            begins = Start.PLAIN if unended else part.begins
            left.append(_Part(part.start, low, begins, answer if unsure else None))
            yield _millisecond(ask, answer, low)
        elif answer.descending:
            left.append(_Part(part.start, low + 1, Start.PLAIN, answer))
            yield _page(answer, part, max(low + 1, part.start), part.end)
        else:
            left.append(_Part(high, part.end, Start.FILL))
            cut_to, doubtful_to = None, None
            if part.begins is Start.FILL:
                cut_to = low
            elif unsure:
                cut_to, doubtful_to = _history(ask, part, answer)
            yield _page(answer, part, part.start, high, cut_to, doubtful_to)
        left = [each for each in left if each.start < each.end]


class _Part(NamedTuple):
    """A range that is still to be asked for."""

    start: int
    end: int
    begins: Start
    newer: _Answer | None = None
    """The full page that ends this part, where nothing older than it is known."""

    @property
    def had_fill(self) -> bool:
        """Whether a fill of it was served before."""
        return self.begins is Start.FILL or (self.newer is not None and self.newer.low == self.end - 1)


class _Answer(NamedTuple):
    """A page as it was served, put in order of time; what has no time stands at its end."""

    events: list[Any]
    times: list[int]
    full: bool
    descending: bool

    @property
    def low(self) -> int | None:
        return self.times[0] if self.times else None

    @property
    def high(self) -> int | None:
        return self.times[-1] if self.times else None


def _read(served: Any, part: _Part, page_size: int, was_falling: bool = False, *, unended: bool) -> _Answer:
    """Raises BadPayloadError for what is no page of this part."""
    if not isinstance(served, list):
        raise BadPayloadError(f"{_kind(served)} was served instead of a list of fills")
    timed = [(_time(event), event) for event in served]
    times = [time for time, _ in timed if time is not None]
    if any(time < part.start or (time >= part.end and not unended) for time in times):
        raise BadPayloadError("fills of another time than asked for were served")
    full = len(served) >= page_size or (len(served) > 0 and len(served) % OTHER_PAGE_SIZE == 0)
    does_rise = all(one <= other for one, other in pairwise(times))
    does_fall = all(one >= other for one, other in pairwise(times))
    if full and not does_rise and not does_fall:
        raise BadPayloadError("a page in no order of time was served")
    descending = does_fall and (was_falling or not does_rise)
    if descending:
        timed.reverse()
    ordered = sorted((each for each in timed if each[0] is not None), key=lambda each: each[0] or 0)
    astray = [event for time, event in timed if time is None]
    return _Answer([event for _, event in ordered] + astray, sorted(times), full, descending)


def _kind(value: Any) -> str:
    return "null" if value is None else "an object" if isinstance(value, dict) else "a bare value"


def _time(event: Any) -> int | None:
    fill = event.get("fill", event) if isinstance(event, dict) else None
    time = fill.get("time") if isinstance(fill, dict) else None
    return time if type(time) is int and 0 <= time < LATEST else None


def _page(
    answer: _Answer,
    part: _Part,
    served_from: int,
    served_to: int,
    cut_to: int | None = None,
    doubtful_to: int | None = None,
) -> Page:
    """The fills of [served_from, served_to) as far as they are the part's, which is cut off up to `cut_to`.

    Up to `doubtful_to` that is not known.
    """
    cut_off = (part.start, min(cut_to, part.end)) if cut_to is not None and part.start < cut_to else None
    first = cut_off[1] if cut_off else served_from
    last = max(first, min(served_to, part.end))
    # What has no time is the next answer's, too, but where it stands is not known.
    events = [
        event
        for time, event in zip_longest(answer.times, answer.events)
        if time is None or first <= time < last
    ]
    doubtful = (first, doubtful_to) if doubtful_to is not None and first < doubtful_to else None
    return Page(events, (first, last), cut_off, doubtful)


def _millisecond(ask: Ask, head: _Answer, time: int) -> Page:
    """A millisecond with more fills than a page holds: its beginning and, the other way round, its end."""
    tail = ask(time, time, newest_first=True)
    if not isinstance(tail, list):
        raise BadPayloadError(f"{_kind(tail)} was served instead of a list of fills")
    if any(_time(event) not in {time, None} for event in tail):
        raise BadPayloadError("fills of another time than asked for were served")
    # One has its beginning, the other its end; they overlap, or there are others between them. A source that knows no
    # other way round serves the same again, and nothing is known of the rest.
    older, newer = (tail, head.events) if head.descending else (head.events, tail[::-1])
    is_same = tail[:1] == (head.events[-1:] if head.descending else head.events[:1])
    shared = 0
    if not is_same:
        shared = next((n for n in range(min(len(older), len(newer)), 0, -1) if older[-n:] == newer[:n]), 0)
    events = head.events if is_same else older + newer[shared:]
    whole = (time, time + 1)
    return Page(events, whole if shared else (time, time), None if shared else whole)


def _is_empty(ask: Ask, part: _Part, page_size: int) -> bool:
    """Whether the source has nothing after the part either."""
    return _read(ask(part.start, None), part, page_size, unended=True).low is None


def _goes_on(ask: Ask, part: _Part, answer: _Answer, page_size: int) -> bool:
    """Whether the source has more of the part than it served, though that was less than a page."""
    low, high = answer.low, answer.high
    if low is None or high is None:
        return False
    sides = []
    if not answer.descending:
        sides.append((_Part(high, part.end, Start.PLAIN), high))
    if answer.descending or low == high:  # of a single millisecond nobody knows from which end it was served
        sides.append((_Part(part.start, low + 1, Start.PLAIN), low))
    for side, edge in sides:
        if side.start < side.end:
            rest = _read(ask(side.start, side.end - 1), side, page_size, answer.descending, unended=False)
            if len(rest.times) > answer.times.count(edge):
                return True
    return False


def _history(ask: Ask, part: _Part, oldest: _Answer) -> tuple[int | None, int | None]:
    """Up to where the part is cut off, or up to where that is doubtful, by the oldest page; neither where older is served."""
    older = _Part(BEGINNING, part.start, Start.PLAIN)
    from_nothing = _from_nothing(oldest.events)
    if (
        not from_nothing
        and part.start > BEGINNING
        and _read(ask(BEGINNING, part.start - 1), older, 1, unended=False).times
    ):
        return None, None
    low = oldest.low
    if low is not None and oldest.descending:
        low = min(low, part.end)  # what lies between them is still to be asked for
    return (None, low) if from_nothing else (low, None)


def _from_nothing(events: list[Any]) -> bool:
    """Whether no fill speaks of a position that was built by an older one: each perpetual's first starts from zero.

    Spot balances also come by transfer and say nothing.
    """
    seen = set()
    for event in events:
        fill = event.get("fill", event) if isinstance(event, dict) else None
        coin = fill.get("coin") if isinstance(fill, dict) else None
        if not isinstance(fill, dict) or not isinstance(coin, str) or coin in seen:
            continue
        seen.add(coin)
        is_spot = coin.startswith(("@", "#", "+")) or "/" in coin
        if not is_spot and str(fill.get("startPosition", "0")).strip("-0."):
            return False
    return True
