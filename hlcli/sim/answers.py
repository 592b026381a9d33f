"""What a data module hands to the exchange: answers to info requests and whole documents."""

from __future__ import annotations

import gzip
import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from email.utils import formatdate
from functools import cached_property
from typing import Any

_ADDRESS = re.compile(r"0x[0-9a-fA-F]{40}")


class BadRequestError(Exception):
    """The request does not deserialize: the exchange answers 422 whatever the reason was."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A JSON value and how many items of it count for the extra weight."""

    value: object
    items: int = 0


InfoHandler = Callable[[Mapping[str, Any]], Answer]


class Document:
    """A body that is served as a file: rendered once, when first asked for, with a validator."""

    def __init__(self, render: Callable[[], bytes], modified_ms: int) -> None:
        self.modified_ms = modified_ms
        self._render = render

    @cached_property
    def body(self) -> bytes:
        """The bytes as they are."""
        return self._render()

    @cached_property
    def tag(self) -> str:
        """The ETag's opaque part; it follows the content, so a changed answer never looks unchanged."""
        return hashlib.sha256(self.body).hexdigest()[:32]

    @cached_property
    def gzipped(self) -> bytes:
        """The body compressed once, as a CDN would keep it."""
        return gzip.compress(self.body, compresslevel=1, mtime=0)

    @property
    def last_modified(self) -> str:
        """The modification time as an HTTP date."""
        return formatdate(self.modified_ms / 1000, usegmt=True)


def address_field(request: Mapping[str, Any], name: str) -> str:
    """The address in a field, lower case as the exchange replies with it, or BadRequestError."""
    value = request.get(name)
    if not isinstance(value, str) or _ADDRESS.fullmatch(value) is None:
        raise BadRequestError(name)
    return value.lower()
