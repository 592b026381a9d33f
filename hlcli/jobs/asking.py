"""Asking one question of each of many units with a few threads: vaults, wallets, coins."""

from __future__ import annotations

from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from hlcli import output
from hlcli.budget import DeadlineError
from hlcli.exitcodes import heed_stop
from hlcli.http import HttpClient, SourceError, StatusError
from hlcli.logs import log, one_line

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

Unit = TypeVar("Unit")
Told_contra = TypeVar("Told_contra", contravariant=True)

# So many failures in a row are an outage; asking the rest would only burn the budget.
OUTAGE_AFTER = 10


class Outcomes(Protocol[Told_contra]):
    """Who takes what came of each unit; called in the thread that called ask_each()."""

    def answered(self, unit: Told_contra, answer: Any) -> None: ...

    def failed(self, unit: Told_contra, error: SourceError) -> None: ...


def ask_each(
    client: HttpClient,
    units: Sequence[Unit],
    ask: Callable[[Unit], Any],
    outcomes: Outcomes[Unit],
    *,
    concurrency: int,
    label: str,
    outage_after: int | None = OUTAGE_AFTER,
) -> int:
    """Ask of every unit, in order, `concurrency` at once; returns how many are left.

    Units are left when the client's deadline is reached, or after `outage_after` failures in a row. Whatever `outcomes`
    raises ends the asking; threads still under way are given up. `label` names the units on the progress bar.
    """
    left = iter(units)
    under_way: dict[Future[Any], Unit] = {}
    settled = failures_in_a_row = 0
    stopping = False
    pool = ThreadPoolExecutor(concurrency, thread_name_prefix="ask")
    bar = output.progress(len(units), label, f" {label}")
    try:
        while True:
            while not stopping and len(under_way) < concurrency and (unit := next(left, None)) is not None:
                under_way[pool.submit(ask, unit)] = unit
            if not under_way:
                return len(units) - settled
            heed_stop()
            # A signal that comes just before a wait without end would be looked at only after it.
            for future in wait(under_way, timeout=1.0, return_when=FIRST_COMPLETED).done:
                unit = under_way.pop(future)
                try:
                    answer = future.result()
                except DeadlineError:
                    stopping = True
                    continue
                except SourceError as error:
                    failures_in_a_row += not (isinstance(error, StatusError) and error.of_question)
                    if failures_in_a_row == outage_after and not stopping:
                        stopping = True
                        log.warning(
                            "%d %s failed in a row, stopping: %s", outage_after, label, one_line(error)
                        )
                    outcomes.failed(unit, error)
                else:
                    failures_in_a_row = 0
                    outcomes.answered(unit, answer)
                settled += 1
                bar.update()
    finally:
        if under_way:  # ended by an exception: no thread may begin another attempt
            client.deadline = 0.0
        pool.shutdown(wait=False, cancel_futures=True)
        bar.close()
