"""What a run's end means, in one place: the exit code of the process and of the ledger row.

Exit codes are an interface. New ones may be added; whoever meets an unknown code must treat it as a failure.
"""

from __future__ import annotations

from contextlib import contextmanager
from enum import IntEnum
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from collections.abc import Iterator


class ExitCode(IntEnum):
    """The exit codes of every command."""

    OK = 0
    BUG = 1
    USAGE = 2
    PARTIAL = 3
    TEMPORARY = 4
    CONFIG = 5
    LOCKED = 6
    INTERRUPTED = 130
    TERMINATED = 143


MEANINGS: dict[ExitCode, str] = {
    ExitCode.OK: "done; also nothing to do, or another run holds the lock",
    ExitCode.BUG: "a bug in hlcli",
    ExitCode.USAGE: "wrong usage",
    ExitCode.PARTIAL: "partial: some units failed, the ledger says which",
    ExitCode.TEMPORARY: "temporary: source, database or S3 unavailable; try again later",
    ExitCode.CONFIG: "configuration or schema: needs a person",
    ExitCode.LOCKED: "another run holds the lock (only with --fail-if-locked)",
    ExitCode.INTERRUPTED: "interrupted (SIGINT)",
    ExitCode.TERMINATED: "terminated (SIGTERM)",
}


class HlcliError(Exception):
    """A failure with a meaning; its text is the one line that the user sees."""

    exit_code = ExitCode.BUG


class UsageError(HlcliError):
    """The command was called wrongly in a way that the parser cannot see."""

    exit_code = ExitCode.USAGE


class ConfigError(HlcliError):
    """A setting, the schema or a permission is wrong; trying again will not help."""

    exit_code = ExitCode.CONFIG


class TemporaryError(HlcliError):
    """A source or the database is unavailable; the next run may succeed."""

    exit_code = ExitCode.TEMPORARY


class LockedError(HlcliError):
    """Another run of the same job holds the lock."""

    exit_code = ExitCode.LOCKED


class Terminated(SystemExit):
    """SIGTERM or SIGINT arrived. A SystemExit, so that nothing mistakes it for a failed unit."""

    def __init__(self, code: ExitCode) -> None:
        super().__init__(int(code))


_stopped_by: ExitCode | None = None
_undisturbed = 0


def stop(code: ExitCode) -> NoReturn:
    """Raise Terminated, as the handler of a signal, and have it remembered for heed_stop()."""
    global _stopped_by  # noqa: PLW0603 - a process is stopped once
    _stopped_by = code
    raise Terminated(code)


def stopped_by() -> ExitCode | None:
    """The exit code of the signal that stops this process, None where there was none."""
    return _stopped_by


def heed_stop() -> None:
    """Raise Terminated where that of a signal was lost: Python drops what is raised while it clears an object away.

    Whatever waits in a loop asks each time.
    """
    if _stopped_by is not None:
        raise Terminated(_stopped_by)


@contextmanager
def undisturbed() -> Iterator[None]:
    """In the main thread: what has to be done to its end, such as a farewell. A signal takes effect after it."""
    global _undisturbed  # noqa: PLW0603 - signals are the whole process's
    _undisturbed += 1
    try:
        yield
    finally:
        _undisturbed -= 1


def is_undisturbed() -> bool:
    """Whether a signal has to wait."""
    return _undisturbed > 0


# sqlstates that mean "needs a person": authorisation, unknown database or schema, insufficient privilege,
# a table or column that another version of the schema has, a feature that this server lacks.
_PERSON_NEEDED = ("28", "3D", "3F", "42501", "42P01", "42703", "0A")
# The server closes a connection attempt before there is a sqlstate to read; its words are all there is.
_PERSON_NEEDED_WORDS = (
    "password authentication failed",
    "no password supplied",
    "no pg_hba.conf entry",
    'database "',
    'role "',
    "invalid connection option",
    "for connection option",
    "invalid port number",
    "invalid sslmode value",
    "certificate",
    "permission denied",
)


def exit_code_for(error: BaseException) -> ExitCode:
    """Map any exception that ended a command to its exit code.

    Database errors are told apart by sqlstate: what needs a person is CONFIG, an outage is TEMPORARY, and what
    the server rejects as wrong data or wrong SQL is a BUG.
    """
    if _stopped_by is not None:
        return _stopped_by  # whatever else the signal led to
    if isinstance(error, HlcliError):
        return error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return ExitCode.INTERRUPTED
    if isinstance(error, SystemExit):
        wanted = 0 if error.code is None else error.code
        return next((code for code in ExitCode if code == wanted), ExitCode.BUG)
    import psycopg  # already loaded wherever its errors come from

    if isinstance(error, psycopg.Error):
        state = error.sqlstate or ""
        if state.startswith(_PERSON_NEEDED):
            return ExitCode.CONFIG
        if isinstance(error, psycopg.OperationalError):
            told = str(error)
            known = not state and any(word in told for word in _PERSON_NEEDED_WORDS)
            known = known and "too many connections" not in told
            return ExitCode.CONFIG if known else ExitCode.TEMPORARY
        # 40: serialisation and deadlock; 53: out of disk or connections; 57: shutdown; 25006: read-only replica;
        # 25P03: the process was stopped for so long that the server ended its transaction.
        if state.startswith(("40", "53", "57", "58")) or state in {"25006", "25P03"}:
            return ExitCode.TEMPORARY
        if isinstance(error, psycopg.ProgrammingError) and not state:
            return ExitCode.CONFIG  # an unparsable connection string
        return ExitCode.BUG
    if isinstance(error, PermissionError):
        return ExitCode.CONFIG
    if isinstance(error, OSError):
        return ExitCode.TEMPORARY  # disk full, socket errors: outside of our hands
    return ExitCode.BUG
