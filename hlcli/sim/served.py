"""The record of everything the simulator answered."""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(slots=True)
class Served:
    """One request; ``bytes`` and ``seconds`` grow until the answer is out, the rest is final at once."""

    at: float
    method: str
    path: str
    kind: str
    address: str | None
    weight: int
    status: int
    fault: str | None
    bytes: int = 0
    seconds: float = 0.0


class ServedLog:
    """An append-only list that handler threads share with a test."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._records: list[Served] = []

    def add(self, record: Served) -> None:
        """Append; called before the first byte leaves, so a client that has its answer finds it logged."""
        with self._lock:
            self._records.append(record)

    def snapshot(self) -> list[Served]:
        """The records so far."""
        with self._lock:
            return list(self._records)

    def count(self, kind: str | None = None, status: int | None = None) -> int:
        """How many requests were of this kind and got this status."""
        return sum(
            (kind is None or record.kind == kind) and (status is None or record.status == status)
            for record in self.snapshot()
        )

    def per_status(self) -> dict[str, int]:
        """Requests by status; 0 stands for those that got no answer."""
        return dict(Counter(str(record.status) for record in self.snapshot()))

    def as_json(self) -> list[dict[str, Any]]:
        """The records as JSON values."""
        return [asdict(record) for record in self.snapshot()]
