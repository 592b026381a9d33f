"""The pager of a wallet's fills loses and repeats nothing, whatever the source's order, page size and history limit."""

from __future__ import annotations

import json
import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from decimal import Decimal
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count, islice
from typing import Any, NamedTuple

import pytest

from hlcli import settings as settings_module
from hlcli.budget import Grant, Priority
from hlcli.http import BadPayloadError, HttpClient, SourceError
from hlcli.sources import fills as fill_rows
from hlcli.sources import user_fills
from hlcli.sources.user_fills import FILLS, SLICES, Page, Start

USER = "0x" + "5a" * 20
PERPS = ("BTC", "kPEPE", "xyz:GOLD")
SPOT = ("@107", "PURR/USDC")
WORLDS = 800
T0 = 1_753_600_000_000


@dataclass
class Source:
    """A source of fills as the documentation leaves it open: what it keeps, in which order it serves, where it cuts."""

    fills: list[dict[str, Any]]
    """All there ever were, in order of execution."""
    page_size: int
    keeps: int | None = None
    """Only the newest so many are served."""
    newest_first: bool = False
    on_reversed: str = "newest"
    """What `reversed` does: "newest" first, the "other" way round, or "nothing"."""
    splits: bool = True
    """Whether a page may end inside a millisecond; else it is served whole, in a longer page."""
    arriving: list[dict[str, Any]] = field(default_factory=list)
    """New fills: `flow` of them come after each question."""
    flow: int = 0
    asked: list[tuple[int, int | None, bool]] = field(default_factory=list)
    has_shown_order: bool = False
    order_shown_from: int = 0
    times_served: set[int] = field(default_factory=set)

    @property
    def shows_both_ends(self) -> bool:
        """Whether `reversed` serves the other end of a millisecond than its absence does."""
        return self.on_reversed == "other" or (self.on_reversed == "newest" and not self.newest_first)

    @property
    def served(self) -> list[dict[str, Any]]:
        return self.fills[-self.keeps :] if self.keeps is not None else self.fills

    def __call__(self, start: int, last: int | None, *, newest_first: bool = False) -> list[dict[str, Any]]:
        self.asked.append((start, last, newest_first))
        found = [
            each for each in self.served if start <= each["time"] and (last is None or each["time"] <= last)
        ]
        turned = {"newest": True, "other": not self.newest_first, "nothing": self.newest_first}[
            self.on_reversed
        ]
        if turned if newest_first else self.newest_first:
            found.reverse()
        size = self.page_size
        while not self.splits and size < len(found) and found[size]["time"] == found[size - 1]["time"]:
            size += 1
        page = found[:size]
        self.has_shown_order |= start >= self.order_shown_from and len({each["time"] for each in page}) > 1
        self.times_served.update(each["time"] for each in page)
        self.fills += self.arriving[: self.flow]
        del self.arriving[: self.flow]
        return page


class World(NamedTuple):
    source: Source
    start: int
    end: int

    @property
    def wanted(self) -> list[dict[str, Any]]:
        return [each for each in self.source.fills if self.start <= each["time"] < self.end]


class Walked(NamedTuple):
    page: Page
    knew_order: bool
    """Whether the source had shown by then in which order it serves."""


def text(event: dict[str, Any]) -> str:
    return json.dumps(event, sort_keys=True)


def trades(
    rng: random.Random, times: list[int], *, repeats: float = 0.0, first_tid: int = 1
) -> list[dict[str, Any]]:
    """Fills at these times that hang together: each starts from the position that the ones before it built."""
    held: Counter[str] = Counter()
    made = []
    for tid, time in enumerate(times, first_tid):
        coin = rng.choice(PERPS + SPOT)
        side = rng.choice("AB")
        size = abs(held[coin]) if held[coin] and rng.random() < 0.6 else rng.randint(1, 3)
        size = max(size, 1)
        made.append(
            {
                "coin": coin,
                "px": "10.5",
                "sz": f"{size}.0",
                "side": side,
                "time": time,
                "startPosition": rng.choice(("0.0", "-0.0", "0")) if not held[coin] else f"{held[coin]}.0",
                "oid": rng.randint(1, 9),
                "tid": tid,
            }
        )
        held[coin] += size if side == "B" else -size
        if rng.random() < repeats:
            made.append(dict(made[-1]))
    return made


def moments(rng: random.Random, number: int, page_size: int, since: int) -> list[int]:
    """Times in order, some alone, some in groups, now and then of more than a page or two."""
    times: list[int] = []
    time = since
    while len(times) < number:
        group = rng.choice((1, 1, 1, 2, 3, page_size - 1, page_size, page_size + 1, 2 * page_size - 1))
        if rng.random() < 0.05:
            group = rng.randint(2 * page_size, 3 * page_size + 1)
        if rng.random() < 0.7:
            group = 1
        times += [time] * max(group, 1)
        time += rng.choice((1, 1, 2, 50))
    return times


def world(rng: random.Random, **given: Any) -> World:
    page_size = given.pop("page_size", None) or rng.choice((2, 3, 4, 5, 8, 13))
    times = moments(rng, rng.choice((0, 1, page_size, 4 * page_size, rng.randint(0, 80))), page_size, 1000)
    made = trades(rng, times, repeats=rng.choice((0, 0, 0.2)))
    start = rng.choice((0, 990, 1000, rng.randint(990, 1100)))
    end = max(start + 1, rng.choice((times[-1] + 1 if times else 5, 2000, rng.randint(1000, 1300))))
    source = Source(
        made,
        page_size,
        keeps=rng.choice((None, None, page_size, rng.randint(page_size, max(page_size, len(made))))),
        newest_first=rng.random() < 0.3,
        on_reversed=rng.choice(("newest", "newest", "other", "nothing")),
        splits=rng.random() < 0.8,
    )
    return World(replace(source, **given), start, end)


def walk(where: World, ranges: list[tuple[int, int, Start]], most: int | None = None) -> list[Walked]:
    # What is asked about the time before the range is about whether there is any.
    where.source.has_shown_order, where.source.order_shown_from = False, where.start
    return [
        Walked(page, where.source.has_shown_order)
        for start, end, begins in ranges
        for page in islice(
            user_fills.pages(where.source, start, end, begins, page_size=where.source.page_size), most
        )
    ]


def whole_walk(where: World) -> list[Walked]:
    return walk(where, [(where.start, where.end, Start.UNKNOWN)])


def broken_walk(where: World, rng: random.Random) -> list[Walked]:
    """As a worker that is stopped again and again: only what is told of the pages so far is known."""
    told: list[Walked] = []
    for _ in range(10_000):
        todo = rest(where, [each.page for each in told])
        if not todo:
            return told
        start, end = rng.choice(todo)
        was_served = start in where.source.times_served
        begins = Start.FILL if was_served and rng.random() < 0.5 else Start.UNKNOWN
        told += walk(where, [(start, end, begins)], rng.randint(1, 3))
    raise AssertionError("the walk does not end")


def rest(where: World, pages: list[Page]) -> list[tuple[int, int]]:
    """What is left of the world's range, in pieces."""
    left, at = [], where.start
    for low, high in sorted(each for page in pages for each in (page.covered, page.cut_off) if each):
        if at < low:
            left.append((at, min(low, where.end)))
        at = max(at, high)
    return [*left, (at, where.end)] if at < where.end else left


def check_sides(start: int, end: int, pages: list[Page]) -> None:
    """All ranges lie side by side and are together what was asked for."""
    at = start
    for low, high in sorted(each for page in pages for each in (page.covered, page.cut_off) if each):
        if low < high:
            assert low == at
            at = high
    assert at == end


def check_ranges(where: World, pages: list[Page]) -> None:
    """The ranges are right, and a page's fills are of its ranges."""
    check_sides(where.start, where.end, pages)
    for page in pages:
        assert where.start <= page.covered[0] <= page.covered[1] <= where.end
        times = [event["time"] for event in page.events]
        assert times == sorted(times)
        of_one = set(times) if page.covered[0] == page.covered[1] else set()
        for time in times:
            assert page.covered[0] <= time < page.covered[1] or (
                page.cut_off == (time, time + 1) and of_one == {time}
            )


def is_cut(pages: list[Page], time: int) -> bool:
    return any(page.cut_off and page.cut_off[0] <= time < page.cut_off[1] for page in pages)


def check_fills(where: World, walked: list[Walked], served: list[dict[str, Any]]) -> None:
    """What the source serves came once, each millisecond from one page and in order; all else is told to be cut off."""
    pages = [each.page for each in walked]
    size = where.source.page_size
    came: dict[int, list[tuple[Walked, list[str]]]] = {}
    for each in walked:
        by_time: dict[int, list[str]] = {}
        for event in each.page.events:
            by_time.setdefault(event["time"], []).append(text(event))
        for time, texts in by_time.items():
            came.setdefault(time, []).append((each, texts))
    true: dict[int, list[str]] = {}
    for event in served:
        if where.start <= event["time"] < where.end:
            true.setdefault(event["time"], []).append(text(event))
    assert set(came) == set(true)
    for time, texts in true.items():
        [(each, got)] = came[time]
        # The same row twice is the same fill.
        expected = list(dict.fromkeys(texts))
        if is_cut(pages, time):
            assert len(texts) >= size
            assert not where.source.shows_both_ends or texts[0] == texts[-1] or len(texts) >= 2 * size
            assert set(got) <= set(expected)
            assert len(got) >= size
        elif each.knew_order or not where.source.newest_first:
            assert list(dict.fromkeys(got)) == expected
        else:
            assert sorted(set(got)) == sorted(expected)
        if not is_cut(pages, time) and len(texts) < size:
            assert len(got) == len(texts)


def check_lost(where: World, pages: list[Page], served: list[dict[str, Any]]) -> None:
    """What the source serves no more is told: as a range, or, where no position gives it away, as a doubtful one."""
    kept = {id(event) for event in served}
    lost = [event for event in where.wanted if id(event) not in kept]
    oldest = min((event["time"] for event in served), default=None)
    told = [page.doubtful for page in pages if page.doubtful]
    # The page that shows what was held at the limit; of a source that serves the newest first it may be one fill.
    shown = [event for event in served if event["time"] >= where.start][: where.source.page_size]
    if where.source.newest_first:
        alone = len(shown) == 1 or (len(shown) > 1 and shown[0]["time"] < shown[1]["time"])
        shown = [event for event in shown[:1] if alone and event["time"] < where.end]
    firsts = {event["coin"]: event for event in reversed(shown)}
    given_away = any(firsts[coin]["startPosition"].strip("-0.") for coin in PERPS if coin in firsts)
    for event in lost:
        # Of a millisecond that the limit cuts in two nobody can tell that there was more.
        if event["time"] != oldest and not is_cut(pages, event["time"]):
            assert not given_away
            assert any(begins <= event["time"] < ends for begins, ends in told)
    # Of a source that serves the newest first a burst may begin the page, and not show what was held before it.
    if where.source.keeps is None and not where.source.newest_first:
        times = Counter(event["time"] for event in where.wanted)
        assert all(times[page.cut_off[0]] >= where.source.page_size for page in pages if page.cut_off)


def most_questions(where: World) -> int:
    """Each full page brings at least what is not of its last millisecond, which is smaller than a page or a burst."""
    size = where.source.page_size
    groups = Counter(event["time"] for event in where.source.served if event["time"] >= where.start).values()
    bursts = sum(each >= size for each in groups)
    largest = max((each for each in groups if each < size), default=0)
    number = sum(each for each in groups if each < size)
    return 4 + number // (size - largest) + 6 * bursts


@pytest.mark.parametrize("way", ["oldest first", "newest first"])
def test_every_fill_comes_once_and_every_range_is_told(rng, way):
    for _ in range(WORLDS):
        where = world(rng, newest_first=way == "newest first")
        served = list(where.source.served)
        walked = whole_walk(where)
        pages = [each.page for each in walked]
        check_ranges(where, pages)
        check_fills(where, walked, served)
        check_lost(where, pages, served)
        assert len(where.source.asked) <= most_questions(where)


@pytest.mark.parametrize("way", ["oldest first", "newest first"])
def test_a_source_whose_pages_are_smaller_than_known_loses_nothing(rng, way):
    smaller = 0
    for _ in range(WORLDS // 2):
        size = rng.randint(2, 9)
        groups = [rng.choice((1, 1, rng.randint(1, size - 1))) for _ in range(rng.randint(0, 40))]
        times = [1000 + 3 * place for place, group in enumerate(groups) for _ in range(group)]
        source = Source(trades(rng, times), size, newest_first=way == "newest first")
        longest = user_fills.Longest()
        for start, end in ((1000, 1060), (1060, 1200)):
            pages = list(user_fills.pages(source, start, end, Start.UNKNOWN, page_size=1000, longest=longest))
            check_sides(start, end, pages)
            assert not any(page.cut_off for page in pages)
            came = [text(event) for page in pages for event in page.events]
            assert sorted(came) == sorted(
                text(event) for event in source.fills if start <= event["time"] < end
            )
            smaller += len(came) > size
    assert smaller > WORLDS // 4


@pytest.mark.parametrize("way", ["oldest first", "newest first"])
def test_a_walk_that_is_broken_off_anywhere_goes_on_from_the_ranges(rng, way):
    for _ in range(WORLDS // 2):
        where = world(rng, newest_first=way == "newest first")
        served = list(where.source.served)
        walked = broken_walk(where, rng)
        pages = [each.page for each in walked]
        check_ranges(where, pages)
        check_fills(where, walked, served)
        check_lost(where, pages, served)


@pytest.mark.parametrize("is_broken", [False, True])
def test_fills_that_leave_the_history_meanwhile_are_told_as_cut_off(rng, is_broken):
    left_meanwhile = 0
    for _ in range(WORLDS // 2):
        where = world(rng, newest_first=rng.random() < 0.2)
        source = where.source
        source.keeps = rng.randint(source.page_size, max(source.page_size, len(source.fills)))
        after = max([2000, *(event["time"] for event in source.fills)])
        source.arriving = trades(rng, list(range(after, after + 40)), first_tid=1000)
        source.flow = rng.choice((1, 1, 2, source.page_size))
        before = list(source.served)
        walked = broken_walk(where, rng) if is_broken else whole_walk(where)
        pages = [each.page for each in walked]
        check_ranges(where, pages)
        came = Counter(text(event) for page in pages for event in page.events)
        pages_of = Counter(time for page in pages for time in {event["time"] for event in page.events})
        assert set(pages_of.values()) <= {1}
        told = [page.doubtful for page in pages if page.doubtful]
        for event in where.wanted:
            # The limit may cut a millisecond in two.
            is_known = event["time"] in pages_of or is_cut(pages, event["time"])
            if not is_known:
                assert any(begins <= event["time"] < ends for begins, ends in told)
            left_meanwhile += not came[text(event)] and event["time"] > before[0]["time"]
        assert set(came) <= {text(event) for event in where.wanted}
    assert left_meanwhile > 50


# One shape each


def at(*times: int, **same: Any) -> list[dict[str, Any]]:
    """A fill at each of these times, of one perpetual that is held all along; the first starts from zero."""
    return [
        {
            "coin": "BTC",
            "side": "B",
            "sz": "1.0",
            "px": "9",
            "tid": ix,
            "oid": 7,
            "time": time,
            "startPosition": f"{ix}.0",
        }
        | same
        for ix, time in enumerate(times)
    ]


def told(
    source: Callable[..., Any], start: int, end: int, begins: Start = Start.UNKNOWN, size: int = 3
) -> list[Page]:
    return list(user_fills.pages(source, start, end, begins, page_size=size))


def test_the_first_question_has_no_end_and_later_ones_do():
    source = Source(at(1, 2, 3, 4, 5, 6, 7), 3)
    assert [page.covered for page in told(source, 0, 9)] == [(0, 3), (3, 5), (5, 7), (7, 9)]
    assert source.asked == [(0, None, False), (3, 8, False), (5, 8, False), (7, 8, False)]


@pytest.mark.parametrize(("begins", "last"), [(Start.UNKNOWN, None), (Start.FILL, 8), (Start.PLAIN, 8)])
def test_a_page_that_is_not_full_is_the_only_one(begins, last):
    source = Source(at(1, 8, 9), 3)
    [page] = told(source, 1, 9, begins, size=4)
    assert (page.covered, page.cut_off, page.doubtful) == ((1, 9), None, None)
    assert [event["time"] for event in page.events] == [1, 8]
    assert source.asked == [(1, last, False)]


def test_a_history_that_begins_amid_a_position_is_cut_off_before():
    pages = told(Source(at(*range(100)), 3, keeps=10), 0, 100)
    assert (pages[0].cut_off, pages[0].covered) == ((0, 90), (90, 92))
    assert all(page.cut_off is None for page in pages[1:])
    assert all(page.doubtful is None for page in pages)


def test_a_history_that_begins_from_nothing_tells_where():
    fills = at(*range(90), coin="@107") + at(*range(90, 100))
    pages = told(Source(fills, 3, keeps=10), 0, 100)
    assert (pages[0].cut_off, pages[0].covered, pages[0].doubtful) == (None, (0, 92), (0, 90))
    assert all(page.doubtful is None for page in pages[1:])


def test_a_range_that_begins_amid_the_history_is_not_cut_off():
    pages = told(Source(at(*range(100)), 3), 50, 60)
    assert all((page.cut_off, page.doubtful) == (None, None) for page in pages)


@pytest.mark.parametrize("newest_first", [False, True])
def test_a_history_that_begins_with_a_burst_is_cut_off_before(newest_first):
    fills = at(1, 2, 3, *[50] * 4, 60, 61, 62)
    pages = told(Source(fills, 3, keeps=7, newest_first=newest_first, on_reversed="other"), 0, 55)
    assert [page.cut_off for page in pages if page.cut_off] == [(0, 50)]
    assert [event["tid"] for page in pages for event in page.events] == [3, 4, 5, 6]


@pytest.mark.parametrize("newest_first", [False, True])
def test_a_history_that_begins_after_the_range_is_cut_off(newest_first):
    pages = told(Source(at(1, 2, 3, *range(50, 60)), 3, keeps=8, newest_first=newest_first), 0, 10)
    assert [(page.events, page.cut_off) for page in pages] == [([], (0, 10))]


def test_a_limit_that_moves_on_between_two_pages_leaves_a_gap():
    source = Source(at(*range(0, 40, 2)), 4, keeps=20, arriving=at(*range(100, 104)), flow=4)
    first, second, *others = told(source, 0, 40, size=4)
    assert (first.covered, first.cut_off) == ((0, 6), None)
    assert (second.covered, second.cut_off) == ((8, 14), (6, 8))
    assert all(page.cut_off is None for page in others)


@pytest.mark.parametrize("newest_first", [False, True])
def test_a_limit_that_moves_past_the_rest_of_the_range_cuts_it_off(newest_first):
    arriving = at(*range(100, 110))
    source = Source(at(*range(10)), 4, keeps=10, arriving=arriving, flow=10, newest_first=newest_first)
    first, second = told(source, 0, 10, size=4)
    assert second == Page([], (first.covered[0],) * 2 if newest_first else (10, 10), second.cut_off)
    assert second.cut_off == ((0, first.covered[0]) if newest_first else (first.covered[1], 10))


@pytest.mark.parametrize(
    ("group", "tids", "is_whole"),
    [
        (3, [0, 1, 2], True),
        (4, [0, 1, 2, 3], True),
        (5, [0, 1, 2, 3, 4], True),
        (6, [0, 1, 2, 3, 4, 5], False),  # nothing says that the two halves meet
        (8, [0, 1, 2, 5, 6, 7], False),
    ],
)
@pytest.mark.parametrize("newest_first", [False, True])
def test_a_burst_is_its_beginning_and_its_end(group, tids, is_whole, newest_first):
    # So that a source that serves the newest first shows that it does.
    source = Source(at(*[5] * group, 6, 7), 3, newest_first=newest_first, on_reversed="other")
    pages = told(source, 5, 8)
    [burst] = [page for page in pages if page.events and page.events[0]["time"] == 5]
    assert [event["tid"] for event in burst.events] == tids
    assert (burst.covered, burst.cut_off) == (((5, 6), None) if is_whole else ((5, 5), (5, 6)))


@pytest.mark.parametrize("on_reversed", ["newest", "nothing"])
@pytest.mark.parametrize("newest_first", [False, True])
def test_a_burst_of_which_the_source_shows_one_end_only_is_cut_off(on_reversed, newest_first):
    source = Source(at(*[5] * 4, 6, 7), 3, newest_first=newest_first, on_reversed=on_reversed)
    if source.shows_both_ends:
        return
    pages = told(source, 5, 8)
    [burst] = [page for page in pages if page.cut_off]
    assert (burst.covered, burst.cut_off) == ((5, 5), (5, 6))
    assert [event["tid"] for event in burst.events] == ([1, 2, 3] if newest_first else [0, 1, 2])


def test_a_row_that_is_at_both_ends_of_a_burst_does_not_join_them():
    one, two, three, four, five, six = at(*[5] * 6)
    pages = told(Source([one, two, three, four, five, six, one], 3), 5, 6)
    assert pages[0].cut_off == (5, 6)


def test_slices_of_twaps_are_walked_by_the_fill_in_them():
    fills = at(*range(10), *[10] * 5, *range(11, 15))
    source = Source(fills, 3)

    def ask(start: int, last: int | None, *, newest_first: bool = False) -> list[Any]:
        return [{"fill": fill, "twapId": 1} for fill in source(start, last, newest_first=newest_first)]

    pages = told(ask, 0, 15)
    assert sorted(event["fill"]["tid"] for page in pages for event in page.events) == list(range(19))
    assert all(page.cut_off is None for page in pages)


@pytest.mark.parametrize("limit", [500, 1000, 1500])
def test_a_page_of_500_or_a_multiple_may_be_cut_off(limit):
    source = Source(at(*range(4200)), limit)
    pages = told(source, 0, 5000, size=2000)
    assert [event["tid"] for page in pages for event in page.events] == list(range(4200))
    assert len(source.asked) == -(-4199 // (limit - 1))


@pytest.mark.parametrize(
    ("number", "questions"), [(499, 1), (500, 2), (501, 1), (1000, 2), (1999, 1), (2000, 2)]
)
def test_a_page_that_looks_full_costs_one_more_question(number, questions):
    source = Source(at(*range(number)), 2000)
    pages = told(source, 0, 5000, size=2000)
    assert sum(len(page.events) for page in pages) == number
    assert len(source.asked) == questions


# Sources that are none


def row(time: Any) -> dict[str, Any]:
    return {"coin": "BTC", "time": time, "tid": 1}


@pytest.mark.parametrize(
    "answer",
    [
        None,
        {},
        {"fills": []},
        "[]",
        5,
        True,
        [None, 1, "x"],
        [row("5"), row("6"), row("7")],
        [row(True), row(False), row(True)],
        [row(Decimal(5)), row(Decimal(6)), row(Decimal("7.5"))],
        [{"fill": None}, {"fill": []}, {}],
        [row(5), row(8), row(6)],
        [row(-1), row(5), row(6)],
        [row(4), row(5), row(6)],
    ],
)
def test_an_answer_that_is_no_page_is_refused(answer):
    with pytest.raises(BadPayloadError):
        told(lambda *_, **__: answer, 5, 10)


@pytest.mark.parametrize("begins", [Start.FILL, Start.PLAIN])
def test_a_fill_after_the_end_that_was_asked_for_is_refused(begins):
    with pytest.raises(BadPayloadError, match="another time"):
        told(lambda *_, **__: [row(5), row(10)], 5, 10, begins)


def test_a_fill_without_a_time_comes_along():
    odd = [None, row("5"), row(True), [1], {"fill": 3}]
    [page] = told(lambda *_, **__: [row(6), *odd, row(8), row(5)], 5, 10, size=50)
    assert page.events == [row(5), row(6), row(8), *odd]


def test_a_full_page_in_no_order_is_refused():
    with pytest.raises(BadPayloadError, match="no order"):
        told(lambda *_, **__: [row(5), row(8), row(6)], 5, 10)


def test_a_balance_that_was_there_before_says_nothing():
    names = ("@107", "PURR/USDC", "#1890", "+3")
    fills = [fill | {"coin": names[ix % 4], "startPosition": "5.0"} for ix, fill in enumerate(at(*range(20)))]
    pages = told(Source(fills, 3, keeps=10), 0, 20)
    assert (pages[0].cut_off, pages[0].doubtful) == (None, (0, 10))


@pytest.mark.parametrize("time", [10**30, 10**15, -(10**30)])
def test_a_time_that_is_none_does_not_end_the_walk(time):
    fills = at(*range(5, 15))

    def ask(start: int, last: int | None, *, newest_first: bool = False) -> list[Any]:
        page = [fill for fill in fills if start <= fill["time"] and (last is None or fill["time"] <= last)][
            :3
        ]
        return [*page[:-1], row(time)] if start == 5 else page

    pages = told(ask, 5, 20)
    came = {event["tid"] for page in pages for event in page.events if event["time"] != time}
    assert came == set(range(10))


@pytest.mark.parametrize(
    "times", [(5, 6, 7), (7, 6, 5), (5, 5, 5), (9, 9, 9), (5, 5, 6), (8, 9, 9), (12, 12, 12)]
)
@pytest.mark.parametrize("begins", list(Start))
def test_a_source_that_always_serves_the_same_page_is_not_asked_for_ever(times, begins):
    number = count()

    def ask(*_: Any, **__: Any) -> list[Any]:
        assert next(number) < 12
        return [row(time) for time in times]

    with pytest.raises(BadPayloadError):
        told(ask, 5, 10, begins)


def test_a_source_that_serves_nothing_any_more_is_refused():
    answers = iter([at(5, 6, 7), [], []])
    walk = user_fills.pages(lambda *_, **__: next(answers), 5, 10, Start.UNKNOWN, page_size=3)
    assert next(walk).covered == (5, 7)
    with pytest.raises(BadPayloadError, match="any more"):
        next(walk)


@pytest.mark.parametrize("tail", [None, {}, [row(6)], [row(5), row(4)], "x"])
def test_the_end_of_a_burst_that_is_no_page_is_refused(tail):
    answers = iter([[row(5)] * 3, tail])
    with pytest.raises(BadPayloadError):
        told(lambda *_, **__: next(answers), 5, 10)


@dataclass
class Liar:
    """Answers at random: the more tidy, the more often with a page that could be one."""

    rng: random.Random
    start: int
    end: int
    page_size: int
    tidy: float
    asked: int = 0

    def __call__(self, start: int, last: int | None, *, newest_first: bool = False) -> Any:
        self.asked += 1
        assert self.asked < 8 * (self.end - self.start) + 8
        rng = self.rng
        if rng.random() < 0.02:
            return rng.choice((None, {}, "x", []))
        number = rng.randint(0, 2 * self.page_size)
        if rng.random() < self.tidy:
            times = [rng.randint(start, self.end + 2 if last is None else last) for _ in range(number)]
            return [row(time) for time in sorted(times, reverse=rng.random() < 0.3)]
        odd = ["5", None, True, 10**30, -1, Decimal(3), self.start - 1, *range(self.start, self.end + 2)]
        return [rng.choice((row(rng.choice(odd)), rng.choice((None, 5, [], {})))) for _ in range(number)]


def test_no_source_keeps_the_pager_for_ever(rng):
    ended: Counter[str] = Counter()
    for _ in range(WORLDS):
        start, end, size = 10, rng.randint(11, 30), rng.choice((1, 2, 3, 5))
        liar = Liar(rng, start, end, size, tidy=rng.random())
        try:
            pages = told(liar, start, end, rng.choice(list(Start)), size=size)
        except BadPayloadError:
            ended["refused"] += 1
        else:
            ended["finished"] += 1
            check_sides(start, end, pages)
    assert min(ended["refused"], ended["finished"]) > WORLDS // 50


# Recorded pages


def recordings(recorded: Any) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    for path in sorted((recorded / "hyperliquid" / "userFillsByTime").glob("*.json")):
        yield path.name, json.loads(path.read_text(), parse_float=Decimal)


@pytest.mark.parametrize("newest_first", [False, True])
def test_recorded_pages_lose_nothing_whatever_the_page_size(recorded, rng, newest_first):
    rows = 0
    for name, fills in recordings(recorded):
        rows += len(fills)
        for size in (20, *range(1, 8)):
            first, last = (fills[0]["time"], fills[-1]["time"]) if fills else (1000, 2000)
            source = Source(fills, size, newest_first=newest_first, on_reversed="other")
            where = World(source, rng.choice((0, first - 5, first)), last + rng.choice((1, 500)))
            walked = whole_walk(where)
            check_ranges(where, [each.page for each in walked])
            check_fills(where, walked, fills)
            assert len(source.asked) <= most_questions(where)
            if size == 20:
                came = [text(event) for each in walked for event in each.page.events]
                assert sorted(came) == sorted(map(text, fills)), name
            if name == "papa_leader_2_647.json" and size == 20:
                assert len(source.asked) < 45
    assert rows > 1000


def test_recorded_pages_become_rows_with_a_key_each(recorded):
    import polars as pl

    for name, fills in recordings(recorded):
        if not fills:
            continue
        pages = walk(
            World(Source(fills, 20), 0, fills[-1]["time"] + 1), [(0, fills[-1]["time"] + 1, Start.UNKNOWN)]
        )
        frames = [rows_of(each.page.events) for each in pages if each.page.events]
        rows = pl.concat(frames, how="vertical_relaxed")
        assert rows.height == len(fills)
        assert not rows.select(*fill_rows.KEY, "event_ix").is_duplicated().any(), name


def rows_of(events: list[Any]) -> Any:
    rows = user_fills.rows(USER, events)
    assert rows is not None
    assert rows.rejected == []
    return rows.frame


@pytest.mark.parametrize("newest_first", [False, True])
def test_fills_with_one_key_are_numbered_in_the_order_of_execution(rng, newest_first):
    import polars as pl

    for _ in range(20):
        groups = [rng.choice((1, 1, 2, 4, 6)) for _ in range(12)]
        times = [T0 + ix for ix, group in enumerate(groups) for _ in range(group)]
        dust = at(*times, tid=0, oid=1, coin="@107")
        for number, fill in enumerate(dust):
            fill["sz"] = f"{number + 1}.0"
        # Distinct moments at the end, so that a page from there shows the order.
        source = Source(
            dust + at(*range(T0 + 12, T0 + 16)), 4, newest_first=newest_first, on_reversed="other"
        )
        pages = [each.page for each in whole_walk(World(source, T0, T0 + 16))]
        rows = pl.concat([rows_of(page.events) for page in pages if page.events], how="vertical_relaxed")
        got = rows.filter(pl.col("coin") == "@107").sort("time", "event_ix")
        assert got["sz"].cast(pl.Float64).to_list() == [number + 1.0 for number in range(len(dust))]
        assert got["event_ix"].to_list() == [ix for group in groups for ix in range(group)]


# What asks


class Exchange(BaseHTTPRequestHandler):
    """Answers with what the server has in `answers`, and keeps what it was asked."""

    def do_POST(self) -> None:
        self.server.bodies.append(self.rfile.read(int(self.headers["Content-Length"])))
        status, answer = self.server.answers.pop(0)
        body = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


class Purse:
    """Stands in for the budget: notes what is reserved and what is settled."""

    def __init__(self) -> None:
        self.reserved: list[tuple[int, Priority]] = []
        self.settled: list[int] = []

    def reserve(self, weight: int, priority: Priority, *, deadline: float) -> Grant:
        self.reserved.append((weight, priority))
        return Grant(0, weight, priority)

    def settle(self, grant: Grant, cost: int, *, refused_s: float | None = None) -> None:
        self.settled.append(cost)


@pytest.fixture
def exchange() -> Iterator[Any]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Exchange)
    server.bodies, server.answers = [], []
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    purse = Purse()
    client = HttpClient(budget=purse, attempts=1)
    settings = settings_module.from_env(
        {
            "DATABASE_URL": "postgresql://localhost/x",
            "HL_API_URL": f"http://127.0.0.1:{server.server_port}/info",
        }
    )
    server.purse, server.spent = purse, []

    def asker(kind: str, **options: Any) -> user_fills.Ask:
        return user_fills.asker(client, settings, kind, USER, spent=server.spent.append, **options)

    server.asker = asker
    yield server
    client.close()
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.parametrize("kind", [FILLS, SLICES])
def test_a_question_has_the_fields_that_the_exchange_knows(exchange, kind):
    exchange.answers += [(200, [])] * 4
    ask = exchange.asker(kind)
    assert ask(5, None) == []
    ask(0, 9)
    ask(7, 7, newest_first=True)
    ask(0, 0)
    same = {"type": kind, "user": USER, "aggregateByTime": False}
    assert list(map(json.loads, exchange.bodies)) == [
        {**same, "startTime": 5},
        {**same, "startTime": 0, "endTime": 9},
        {**same, "startTime": 7, "endTime": 7, "reversed": True},
        {**same, "startTime": 0, "endTime": 0},
    ]


@pytest.mark.parametrize(("size", "reserved"), [(2000, 120), (500, 45), (1, 21)])
def test_a_question_reserves_a_full_page_as_bulk_and_tells_what_it_weighed(exchange, size, reserved):
    served = [[], [row(1)], [row(1)] * 20, [row(1)] * 21, [row(1)] * 2000, None, {}]
    exchange.answers += [(200, answer) for answer in served]
    ask = exchange.asker(FILLS, **({} if size == 2000 else {"page_size": size}))
    assert [ask(0, None) for _ in served] == served
    weights = [20, 21, 21, 22, 120, 20, 20]
    assert exchange.spent == weights == exchange.purse.settled
    assert exchange.purse.reserved == [(reserved, Priority.BULK)] * len(served)


def test_a_question_that_fails_tells_no_weight(exchange):
    exchange.answers += [(422, None)]
    with pytest.raises(SourceError, match="422"):
        exchange.asker(FILLS)(0, None)
    assert exchange.spent == []


def test_a_walk_over_the_wire_ends(exchange):
    fills = at(*range(5))
    exchange.answers += [(200, fills[:3]), (200, fills[2:4])]
    pages = told(exchange.asker(FILLS, page_size=3), 0, 4, size=3)
    assert [event["tid"] for page in pages for event in page.events] == [0, 1, 2, 3]
