"""Transactions that get into each other's way are done once more."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from psycopg import errors

from hlcli.logs import log

if TYPE_CHECKING:
    from collections.abc import Callable

Result = TypeVar("Result")

TIMES = 5
CONFLICTS = (errors.DeadlockDetected, errors.SerializationFailure, errors.LockNotAvailable)


def persist(
    transaction: Callable[[], Result], name: str, *, conflicts: tuple[type[Exception], ...] = CONFLICTS
) -> Result:
    """Do a whole transaction, up to five times in all while it is in conflict with another; the last error is raised.

    `name` is what the log calls it.
    """
    for _ in range(TIMES - 1):
        try:
            return transaction()
        except conflicts:
            log.info("%s: in another transaction's way, once more", name)
    return transaction()
