"""The SQL files of the project: numbered migrations and named queries.

In a checkout they lie in `sql/` beside the package, in an installed wheel inside it.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import LiteralString, cast

_PACKAGE = Path(__file__).parent
_NUMBERED = re.compile(r"(\d{4})_([a-z0-9_]+)\.sql")
# What stands above a name is about that query, and would end the line of whatever another one is put into.
_SECTION = re.compile(r"(?:^-- (?!name: ).*\n)*^-- name: (\w+)$", re.MULTILINE)


def folder() -> Path:
    """The folder that holds the SQL of this installation."""
    inside = _PACKAGE / "sql"
    return inside if inside.is_dir() else _PACKAGE.parent / "sql"


def migrations() -> list[tuple[int, str, str]]:
    """Every migration as (version, name, text), in order."""
    return [
        (int(match[1]), match[2], path.read_text("utf-8"))
        for path in sorted(folder().iterdir())
        if (match := _NUMBERED.fullmatch(path.name))
    ]


@cache
def query(file: str, name: str) -> LiteralString:
    """The query that follows `-- name: NAME` in sql/queries/FILE.sql. Raises KeyError for an unknown name."""
    parts = _SECTION.split((folder() / "queries" / f"{file}.sql").read_text("utf-8"))
    # Files of this package are as trustworthy as its code; psycopg wants to be told.
    return cast("LiteralString", dict(zip(parts[1::2], parts[2::2], strict=True))[name].strip())
