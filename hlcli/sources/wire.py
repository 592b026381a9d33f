"""From decoded JSON to the text columns that the loader checks: nothing is judged and no digit changed here."""

from __future__ import annotations

import json
from decimal import Decimal
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    import polars as pl


def text(value: Any) -> str | None:
    """A scalar as its own text, true and false as such, a list or object as JSON text, None as None.

    Lone surrogates, which JSON can spell and UTF-8 cannot, become NUL, for which the loader rejects the row.
    """
    if value is None or isinstance(value, str):
        plain = value
    elif isinstance(value, bool):
        return "true" if value else "false"
    elif isinstance(value, (int, Decimal)):
        return str(value)
    else:
        plain = json.dumps(value, default=str, ensure_ascii=True)
    if plain is None or plain.isascii():
        return plain
    return "".join("\x00" if "\ud800" <= char <= "\udfff" else char for char in plain)


def frame(rows: Iterable[Mapping[str, Any]], columns: Sequence[str]) -> pl.DataFrame:
    """Rows as a frame of text columns; a key that a row lacks is null."""
    import polars as pl

    held = list(rows)
    return pl.DataFrame(
        {name: pl.Series(name, [text(row.get(name)) for row in held], dtype=pl.String) for name in columns}
    )


def mapping(value: Any) -> Mapping[str, Any]:
    """The value when it is a JSON object, else an empty one: what is missing in it becomes null."""
    return value if isinstance(value, dict) else {}


def address(value: Any) -> str | None:
    """An address in lower case; anything else as its text, for the table's CHECK to refuse."""
    plain = text(value)
    return plain.lower() if plain else plain
