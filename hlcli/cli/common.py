"""What every command shares: settings, options, how a report or an error is shown."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hlcli import logs
from hlcli.exitcodes import MEANINGS, ConfigError, ExitCode, HlcliError, exit_code_for

if TYPE_CHECKING:
    from hlcli.jobs import Report
    from hlcli.jobs.backfill_fleet import Fleet
    from hlcli.settings import Settings

Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")]
FailIfLocked = Annotated[
    bool, typer.Option("--fail-if-locked", help="Exit 6 instead of 0 when another run holds the lock.")
]


@dataclass(slots=True)
class _Root:
    """The options before the command's name."""

    env_file: Path | None = None
    debug: bool = False
    verbose: bool = False
    log_format: str | None = None


root = _Root()


def settings() -> Settings:
    """Settings of this process; the first call also sets up the log. Raises ConfigError."""
    from hlcli.settings import load

    loaded = load(root.env_file)
    json_lines = (root.log_format or loaded.hlcli_log_format) == "json"
    logs.setup(verbose=root.verbose or root.debug, json_lines=json_lines)
    return loaded


def epilog(example: str, *codes: ExitCode) -> str:
    """The end of a command's help: an example and the exit codes that it can give."""
    told = "; ".join(f"{int(code)} {MEANINGS[code]}" for code in (ExitCode.OK, *codes))
    return f"Example:  {example}\n\nExit codes:  {told}."


JOB_CODES = (ExitCode.PARTIAL, ExitCode.TEMPORARY, ExitCode.CONFIG, ExitCode.LOCKED)


def duration(text: str | timedelta) -> timedelta:
    """90s, 50m, 6h, 7d or plain seconds as a timedelta; a default comes as one already."""
    if isinstance(text, timedelta):
        return text
    found = re.fullmatch(r"([0-9]{1,7}(?:\.[0-9]{1,3})?)([smhd]?)", text.strip().lower())
    if (
        not found
        or not (seconds := float(found[1]) * {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}[found[2]]) > 0
    ):
        raise typer.BadParameter(f"{text!r} is no duration such as 90s, 50m, 6h or 7d")
    return timedelta(seconds=min(seconds, 10 * 365 * 86400))


def duration_option(told: str) -> Any:
    """An option that is a duration; `told` says what for, and the default, which Typer would print as 0:50:00."""
    return typer.Option(parser=duration, metavar="DURATION", help=told, show_default=False)


def moment(text: str) -> datetime:
    """An ISO 8601 time; without an offset it is UTC."""
    try:
        value = datetime.fromisoformat(text.strip())
        value = value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)
    except (ValueError, OverflowError):
        value = datetime.max.replace(tzinfo=UTC)
    if not 1970 <= value.year < 9999:  # a day more or less must be a time, too
        raise typer.BadParameter(f"{text!r} is no time such as 2026-11-21T12:05Z")
    return value


def amount(text: str) -> Decimal:
    """A finite decimal number."""
    try:
        value = Decimal(text if text.isascii() and "_" not in text else "NaN")
    except InvalidOperation:
        value = Decimal("NaN")
    if not value.is_finite() or abs(value) >= Decimal("1e40"):
        raise typer.BadParameter(f"{text!r} is no number")
    return value


def asset(text: str) -> str:
    """A coin, or dex:COIN."""
    from hlcli.settings import assets_of

    try:
        (name,) = assets_of(text)
    except (ConfigError, ValueError):
        raise typer.BadParameter(f"{text!r} is no coin such as BTC or xyz:GOLD") from None
    return name


def address(text: str) -> str:
    """An address, in lower case."""
    plain = text.strip().lower()
    if not re.fullmatch(r"0x[0-9a-f]{40}", plain):
        raise typer.BadParameter(f"{text[:60]!r} is no address (0x and 40 hex digits)")
    return plain


def show_report(report: Report, *, as_json: bool, always: bool = False) -> None:
    """Print what a job did, then exit with its code: JSON when asked, a summary on a terminal, else nothing.

    `always`: the summary is what was asked for.
    """
    from hlcli import output

    if as_json:
        output.print_json(report.as_json())
    elif always or sys.stdout.isatty():
        _summary(report)
    if report.exit_code:
        logs.log.warning("%s: %s", report.channel.label, report.error or report.status)
    raise typer.Exit(int(report.exit_code))


def _summary(report: Report) -> None:
    from hlcli import output

    numbers = report.numbers
    print(f"{report.channel.label}: {report.status} in {output.span(report.seconds)}")
    if numbers:
        rows = ", ".join(
            f"{numbers[name]:,} {name.removeprefix('rows_')}"
            for name in ("inserted", "updated", "unchanged", "duplicate", "rejected", "rows_failed")
            if numbers[name]
        )
        print(f"  rows      {numbers['served']:,} served: {rows or 'none'}")
        if numbers["requests"]:
            print(f"  requests  {numbers['requests']:,}, weight {numbers['weight']:,}")
    for name, value in report.details.items():
        if isinstance(value, dict):
            value = ", ".join(f"{count:,} x {what}" for what, count in value.items()) or "none"  # noqa: PLW2901
        elif isinstance(value, datetime):
            value = f"{value:%Y-%m-%d %H:%MZ}"  # noqa: PLW2901
        elif isinstance(value, int):
            value = f"{value:,}"  # noqa: PLW2901
        elif isinstance(value, list):
            value = "".join(f"\n    {output.printable(each)}" for each in value) or "none"  # noqa: PLW2901
        print(f"  {name.replace('_', ' ')}: {value}")


def fleet_line(found: Fleet) -> str:
    """The backfill in a line."""
    from hlcli import output

    states = found.states
    told = [f"{states[name]:,} {name}" for name in ("complete", "truncated", "failed") if states.get(name)]
    working = sum(each.state == "working" for each in found.members)
    left = "none left" if found.wallets else "`hlcli backfill` begins with all wallets that are known"
    if found.left:
        left = f"{found.left:,} left, {working} worker{'s' * (working != 1)}"
    if found.left and found.seconds_left is not None:
        left += f", {output.span(found.seconds_left)} at this pace"
    return f"backfill: {found.wallets:,} wallets ({', '.join(told) or 'none done'}), {left}; {found.fills:,} fills served"


def tell(error: BaseException) -> ExitCode:
    """Print an error as one masked line (with --json as an object, with --debug after its traceback)."""
    code = exit_code_for(error)
    message = logs.one_line(error)
    if code is ExitCode.BUG and not isinstance(error, HlcliError):
        message = f"bug: {type(error).__name__}: {message} (--debug shows where)"
    if root.debug:
        import traceback

        print(logs.redact("".join(traceback.format_exception(error))), file=sys.stderr, end="")
    if "--json" in sys.argv[1:]:
        line: Any = json.dumps({"message_type": "exit_error", "code": int(code), "message": message})
    else:
        line = f"hlcli: {message}"
    print(line, file=sys.stderr)
    return code
