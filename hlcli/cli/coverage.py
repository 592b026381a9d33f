"""`hlcli fills coverage`: which times of whose fills came from where, and which are missing."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

import typer

from hlcli.cli import common
from hlcli.exitcodes import ExitCode

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hlcli.jobs.fills_coverage import Coverage, Range, Ranges, Wallet

EPILOG = common.epilog("hlcli fills coverage --state truncated", ExitCode.TEMPORARY, ExitCode.CONFIG)
LIMIT_ON_A_TERMINAL = 50
RANGES_IN_A_SUMMARY = 6
State = Literal["pending", "running", "complete", "truncated", "failed"]


def coverage(
    user: Annotated[
        list[str] | None,
        typer.Option(
            parser=common.address,
            metavar="ADDRESS",
            help="Only this wallet, and what is stored of it; may be repeated.",
        ),
    ] = None,
    state: Annotated[
        State | None,
        typer.Option(help="Only wallets in this state of the backfill."),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=10**9,
            metavar="N",
            show_default=False,
            help=f"At most so many wallets. Default: {LIMIT_ON_A_TERMINAL} on a terminal, else all.",
        ),
    ] = None,
    as_json: common.Json = False,
) -> None:
    """Show which times of whose fills came from S3 and from the API, and what is missing.

    s3: hours of which all objects are there, the same for every wallet. api: what the API served of a wallet. cut \
off: what its limit on a wallet's history keeps back. slices: of which slices of TWAPs were asked for, too. missing: \
wanted, but in neither. Wallets that miss something come first. Times are UTC; the last one of a range is not part of it.
    """
    from hlcli.jobs.fills_coverage import read_coverage

    on_terminal = sys.stdout.isatty()
    if limit is None and on_terminal and not user and not as_json:
        limit = LIMIT_ON_A_TERMINAL
    with read_coverage(common.settings(), users=user or (), state=state, limit=limit) as found:
        if as_json:
            _print_json(found)
        elif not on_terminal:
            _print_lines(found)
        elif user:
            _print_wallets(found)
        else:
            _print_summary(found)
            _print_table(found)


def _print_json(found: Coverage) -> None:
    """One document, a line a wallet, written while the wallets are read."""
    from hlcli import output

    ascii_only = sys.stdout.isatty()
    s3 = found.s3
    head = {
        "schema_version": output.SCHEMA_VERSION,
        "s3": {
            "ranges": [each.as_json() for each in s3.ranges],
            "gaps": [each.as_json() for each in s3.gaps],
            "objects": s3.objects,
            "objects_ok": s3.objects_ok,
            "objects_without_hour": s3.objects_without_hour,
            "rows_ingested": s3.rows_ingested,
            "rows_rejected": s3.rows_rejected,
        },
        "local_files": {"files": s3.files, "rows_ingested": s3.rows_of_files},
        "states": {name: each._asdict() for name, each in sorted(found.states.items())},
    }
    print(json.dumps(head, indent=2).removesuffix("\n}"), end=',\n  "wallets": [')
    between = "\n    "
    for wallet in found.wallets:
        print(between + json.dumps(_as_json(wallet), ensure_ascii=ascii_only), end="")
        between = ",\n    "
    print("\n  ]\n}")


def _as_json(wallet: Wallet) -> dict[str, Any]:
    told: dict[str, Any] = {
        "user_address": wallet.user_address,
        "state": wallet.state,
        "known": wallet.known,
        "wanted": [each.as_json() for each in wallet.wanted],
        "api": [each.as_json() for each in wallet.api],
        "cut_off": [each.as_json() for each in wallet.cut_off],
        "slices": [each.as_json() for each in wallet.slices],
        "missing": [each.as_json() for each in wallet.missing],
        "fills_count": wallet.fills_count,
        "pages": wallet.pages,
        "attempts": wallet.attempts,
        "oldest_fill_time": wallet.oldest_fill_time,
        "completed_at": wallet.completed_at,
        "error": wallet.error,
    }
    if wallet.stored is not None:
        told["stored"] = [
            {"source": each.source, "rows": each.rows, "first": each.first, "last": each.last}
            for each in wallet.stored
        ]
    return told


def _print_lines(found: Coverage) -> None:
    """A line a wallet, with everything."""
    from hlcli import output

    output.print_table(
        ["wallet", "state", "fills", "wanted", "api", "cut off", "slices", "missing", "stored", "error"],
        (
            [
                each.user_address,
                _state(each),
                each.fills_count,
                *(
                    _told(held) or None
                    for held in (each.wanted, each.api, each.cut_off, each.slices, each.missing)
                ),
                "; ".join(_stored(each)) or None,
                each.error,
            ]
            for each in found.wallets
        ),
    )


def _print_summary(found: Coverage) -> None:
    s3, states = found.s3, found.states
    _say("s3", _told(s3.ranges, RANGES_IN_A_SUMMARY) or "covers nothing")
    if s3.gaps:
        _say("s3 lacks", _told(s3.gaps, RANGES_IN_A_SUMMARY))
    if s3.objects:
        hourless = f" ({s3.objects_without_hour:,} of no hour)" if s3.objects_without_hour else ""
        rejected = f", {s3.rows_rejected:,} rejected" if s3.rows_rejected else ""
        _say(
            "", f"{s3.objects_ok:,} of {s3.objects:,} objects{hourless}, {s3.rows_ingested:,} rows{rejected}"
        )
    if s3.files:
        _say("files", f"{s3.files:,}, {s3.rows_of_files:,} rows; of which times, nobody knows")
    told = [f"{states[name].wallets:,} {name}" for name in get_args(State) if name in states]
    _say("wallets", ", ".join(told) or "none: `hlcli backfill` asks the API for them")
    if states:
        fills, cut, missing = (
            sum(getattr(each, name) for each in states.values()) for name in ("fills", "cut_off", "missing")
        )
        _say("", f"{fills:,} fills from the API; {missing:,} miss something, {cut:,} were cut off")


def _say(name: str, told: str, indent: str = "") -> None:
    """A line that begins with a name, broken where the terminal ends."""
    import shutil
    import textwrap

    from hlcli import output

    width = min(output.WIDTH, shutil.get_terminal_size().columns)
    start = f"{indent}{name:9}"
    print(textwrap.fill(told, width, initial_indent=start, subsequent_indent=" " * len(start)))


def _print_table(found: Coverage) -> None:
    """Of each wallet a line for each range of its fills."""
    from hlcli import output

    def rows() -> Iterator[list[Any]]:
        for each in found.wallets:
            start = [each.user_address, _state(each), f"{each.fills_count:,}"]
            told = [
                (name, one)
                for name, held in (("api", each.api), ("cut off", each.cut_off), ("missing", each.missing))
                for one in _short(held, RANGES_IN_A_SUMMARY)
            ]
            for name, one in told or [("", "")]:
                yield [*start, name, one]
                start = ["", "", ""]
            if each.error:
                yield [*start, "error", each.error[:200]]

    if found.states:
        output.print_table(
            ["wallet", "state", "fills", "", "times"], rows(), whole=["wallet", "state", "fills"]
        )


def _print_wallets(found: Coverage) -> None:
    """Of each wallet a paragraph."""
    from hlcli import output

    s3 = _told(found.s3.ranges, RANGES_IN_A_SUMMARY) or "covers nothing"
    for each in found.wallets:
        fills = f", {each.fills_count:,} fills from the API" if each.state else ""
        print(f"{each.user_address} {_state(each)}{fills}")
        for name, told in (
            ("wanted", _told(each.wanted)),
            ("s3", s3),
            ("api", _told(each.api)),
            ("cut off", _told(each.cut_off)),
            ("slices", _told(each.slices)),
            ("missing", _told(each.missing) or "nothing"),
            *(("stored", line) for line in _stored(each) or ["nothing"]),
            ("error", each.error and output.printable(each.error[:200])),
        ):
            if told:
                _say(name, told, "  ")


def _state(wallet: Wallet) -> str:
    return wallet.state or ("not asked for" if wallet.known else "unknown: neither asked for nor stored")


def _stored(wallet: Wallet) -> list[str]:
    return [
        f"{each.rows:,} from {each.source}, {_moment(each.first)} .. {_moment(each.last)}"
        for each in wallet.stored or ()
    ]


def _told(held: Ranges, most: int | None = None) -> str:
    return ", ".join(_short(held, most))


def _short(held: Ranges, most: int | None = None) -> list[str]:
    """Each range as text; of more than `most` the first ones, their number and the last one."""
    if most is None or len(held) <= most:
        return [_span(each) for each in held]
    left = len(held) - most + 1
    return [*(_span(each) for each in held[: most - 2]), f"{left:,} more", _span(held[-1])]


def _span(each: Range) -> str:
    return f"{_moment(each.start or '-infinity')} .. {_moment(each.end or 'infinity')}"


def _moment(iso: str) -> str:
    """2026-11-21T00:00:00Z as 2026-11-21, 2026-11-21T12:05:00Z as 2026-11-21 12:05Z; all digits where there are more."""
    if iso.endswith("T00:00:00Z"):
        return iso.removesuffix("T00:00:00Z")
    return (iso.removesuffix(":00Z") + "Z" if iso.endswith(":00Z") else iso).replace("T", " ", 1)
