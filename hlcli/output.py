"""What a command prints: data on stdout as a table, TSV or JSON; progress on stderr, only on a terminal."""

from __future__ import annotations

import json
import sys
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from tqdm import tqdm

WIDTH = 100
SCHEMA_VERSION = 1


def _plain(value: Any) -> Any:
    """A value for json.dumps: NUMERIC as its text, times as ISO 8601 in UTC, spans in seconds."""
    if isinstance(value, Decimal):
        return str(value)
    if isinstance(value, datetime):
        return value.astimezone(UTC).isoformat().replace("+00:00", "Z")
    if isinstance(value, timedelta):
        return value.total_seconds()
    return str(value)


def print_json(data: Mapping[str, Any]) -> None:
    """One JSON object on stdout. Readers must ignore fields that they do not know."""
    # A terminal would obey control and bidi characters in untrusted names.
    told = {"schema_version": SCHEMA_VERSION, **data}
    print(json.dumps(told, default=_plain, ensure_ascii=sys.stdout.isatty(), indent=2))


def print_table(columns: Sequence[str], rows: Iterable[Sequence[Any]], *, whole: Sequence[str] = ()) -> None:
    """A table of at most 100 columns on a terminal, tab-separated lines elsewhere (nothing is cut there).

    Columns named in `whole` are never broken in two, so that what stands in them can be copied.
    """
    cells = ([_cell(value) for value in row] for row in rows)
    if not sys.stdout.isatty():
        print("\t".join(columns))
        for row in cells:
            print("\t".join(row))
        return
    from rich.console import Console
    from rich.table import Table

    console = Console(width=min(WIDTH, Console().width), emoji=False)
    table = Table(header_style="bold", box=None, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold", no_wrap=column in whole)
    for row in cells:
        table.add_row(*row)
    console.print(table, markup=False)


def _cell(value: Any) -> str:
    """One cell as text; control characters of untrusted names must not reach a terminal."""
    if value is None:
        return "-"
    if isinstance(value, datetime):
        return value.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%SZ")
    if isinstance(value, timedelta):
        return span(value.total_seconds())
    return printable(str(value))


def printable(text: str) -> str:
    """The text with every control, bidi and other non-printing character replaced."""
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text)


def span(seconds: float) -> str:
    """A duration a person can read: 45s, 12m, 3h 20m, 2d 4h."""
    whole = int(seconds)
    if whole < 120:
        return f"{whole}s"
    if whole < 7200:
        return f"{whole // 60}m"
    if whole < 172800:
        return f"{whole // 3600}h {whole % 3600 // 60}m"
    return f"{whole // 86400}d {whole % 86400 // 3600}h"


def progress(total: int | None, label: str, unit: str) -> tqdm[Any]:
    """A progress bar on stderr that does not exist without a terminal (cron mails what is printed)."""
    from tqdm import tqdm

    return tqdm(
        total=total,
        desc=label,
        unit=unit,
        unit_scale=unit == "B",
        disable=None,
        file=sys.stderr,
        dynamic_ncols=True,
        leave=False,
    )
