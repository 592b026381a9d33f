"""The threads of a backfill that lease wallets and ask for their pages."""

from __future__ import annotations

import threading
from math import inf
from queue import Empty, Full
from queue import Queue as Pipe
from typing import TYPE_CHECKING, Self

from hlcli.budget import DeadlineError
from hlcli.exitcodes import heed_stop
from hlcli.http import BACKOFF_CAP_S, SourceError, StatusError
from hlcli.jobs.backfill_store import Failed, Fetched, Item, Walked
from hlcli.logs import log
from hlcli.sources import user_fills
from hlcli.sources.files import UnusableError
from hlcli.sources.user_fills import Start

if TYPE_CHECKING:
    from collections.abc import Callable

    from hlcli.http import HttpClient
    from hlcli.jobs import Job
    from hlcli.jobs.backfill_queue import Lease, Queue

# Pages that wait for being loaded; more would only take memory.
PIPE_PAGES = 32
# What is loaded in one transaction at most.
GROUP_ROWS = 20_000
# Renewals during a lease: one that is late for once does not end it.
HEARTBEATS = 6
MOST_SILENT_S = 20.0
IDLE_S = 1.0
# Two million fills of one wallet, or a source that does not end.
MANY_PAGES = 1000


class Walkers:
    """Threads that walk wallets, and one that keeps their leases alive; leaving it as a context ends them."""

    def __init__(
        self,
        job: Job,
        client: HttpClient,
        queue: Queue,
        *,
        concurrency: int,
        limit: int | None,
        page_size: int,
    ) -> None:
        self._job, self._client, self._queue = job, client, queue
        self._page_size = page_size
        self._may_claim: float = inf if limit is None else limit
        self._pipe: Pipe[Item | BaseException] = Pipe(PIPE_PAGES)
        self._stopping, self._gone = threading.Event(), threading.Event()
        self.ended_by: Exception | None = None
        """What bound the run, where something did: its time, its weight, or a source that gave no answer in time."""
        self._claiming = threading.Lock()
        self._longest = {user_fills.FILLS: user_fills.Longest(), user_fills.SLICES: user_fills.Longest()}
        self._threads = [self._thread(self._walk_wallets) for _ in range(concurrency)]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop(at_once=True)

    def start(self) -> None:
        """Let them begin. An exception on the way leaves those that have begun to stop()."""
        for thread in (*self._threads, self._thread(self._beat)):
            thread.start()

    def ended(self) -> bool:
        """Whether nothing more will come."""
        return not any(thread.is_alive() for thread in self._threads) and self._pipe.empty()

    def stop(self, *, at_once: bool = False) -> None:
        """Begin no further page; `at_once`: what is under way is not waited for either."""
        self._stopping.set()
        if at_once:
            self._gone.set()
            self._client.deadline = 0.0  # no thread may begin another attempt
            with self._claiming:  # who was amid a claim has made it, for release() to find
                pass

    def ready(self) -> list[Item]:
        """What has come, some 20,000 rows of it at most; waits a moment for the first. Raises what ended a thread."""
        heed_stop()
        items: list[Item] = []
        rows = 0
        while rows < GROUP_ROWS and len(items) < 2 * PIPE_PAGES:
            try:
                item = self._pipe.get_nowait() if items else self._pipe.get(timeout=0.2)
            except Empty:
                break
            if isinstance(item, BaseException):
                raise item
            items.append(item)
            rows += item.fills if isinstance(item, Fetched) else 0
        return items

    def _thread(self, task: Callable[[], None]) -> threading.Thread:
        def guarded() -> None:
            try:
                task()
            except BaseException as error:
                # Whatever ends a thread ends the run.
                self._stopping.set()
                self._put(error)

        return threading.Thread(target=guarded, name=task.__name__, daemon=True)

    def _walk_wallets(self) -> None:
        while (lease := self._next()) is not None:
            try:
                self._walk(lease)
            except DeadlineError as error:
                self._ends_by(error)
            except (SourceError, UnusableError) as error:
                refused = isinstance(error, StatusError) and error.of_question
                if self._client.left_s < BACKOFF_CAP_S and isinstance(error, SourceError) and not refused:
                    self._ends_by(error)  # it might have been had, with more time
                else:
                    self._put(Failed(lease, error))

    def _ends_by(self, bound: Exception) -> None:
        if not self._gone.is_set():  # else it is what ended the questions under way
            self.ended_by = self.ended_by or bound
        self._stopping.set()

    def _next(self) -> Lease | None:
        """The next wallet to walk; waits while others hold what is left, as they may die."""
        while not self._stopping.is_set():
            with self._claiming:
                if self._stopping.is_set():
                    break
                if not self._may_claim:
                    return None
                # One, for the thread that begins it now: a lease counts as an attempt.
                for lease in self._queue.claim(1):
                    self._may_claim -= 1
                    return lease
                if not self._queue.has_left():
                    return None
                if self._client.left_s <= 0:
                    self._ends_by(DeadlineError("the run's time is up"))
                # With the lock: one that asks is enough.
                self._stopping.wait(IDLE_S)
        return None

    def _walk(self, lease: Lease) -> None:
        """Ask for all that is left of a wallet, page by page."""
        # Of slices there is no history to speak of: the exchange keeps some two weeks.
        for kind, ranges, begins in (
            (user_fills.FILLS, lease.fills, Start.UNKNOWN),
            (user_fills.SLICES, lease.slices, Start.PLAIN),
        ):
            spent: list[int] = []
            ask = user_fills.asker(
                self._client,
                self._job.settings,
                kind,
                lease.user,
                page_size=self._page_size,
                spent=spent.append,
            )
            for start, end in ranges:
                found = user_fills.pages(
                    ask, start, end, begins, page_size=self._page_size, longest=self._longest[kind]
                )
                for number, page in enumerate(found, 1):
                    if number % MANY_PAGES == 0:
                        log.warning("%s: %d pages so far", lease.user, number)
                    rows = user_fills.rows(lease.user, page.events)
                    self._put(Fetched.of(lease, kind, page, rows, sum(spent)))
                    spent.clear()
                    if lease.lost or self._stopping.is_set():
                        return
        self._put(Walked(lease))

    def _put(self, item: Item | BaseException) -> None:
        while not self._gone.is_set():
            try:
                return self._pipe.put(item, timeout=IDLE_S)
            except Full:
                continue
        return None

    def _beat(self) -> None:
        """Keep the leases, and the run's row, alive."""
        while not self._gone.wait(min(self._queue.lease.total_seconds() / HEARTBEATS, MOST_SILENT_S)):
            self._queue.renew()
            self._job.run.heard(self._queue.connection)
