"""Narration on stderr, with every secret masked.

`redact` is used by the log formatter and by whatever prints an exception, because libraries quote connection
strings: psycopg repeats a malformed URL whole, requests prints the URL it could not reach.
"""

from __future__ import annotations

import json
import logging
import re
import sys
from datetime import UTC, datetime
from typing import TYPE_CHECKING, TextIO
from urllib.parse import quote, quote_plus, unquote, unquote_plus

from hlcli.output import printable

if TYPE_CHECKING:
    from collections.abc import Iterable

log = logging.getLogger("hlcli")

MASK = "***"
_secrets: set[str] = set()

# A password in a URL may itself hold "@" when it was not escaped: take everything up to the last one.
_URL_PASSWORD = re.compile(
    r"(?P<head>\b[a-z][a-z0-9+.-]*://[^\s:/@]*:)(?P<secret>[^\s]*)(?=@)", re.IGNORECASE
)
_KEYWORD = re.compile(
    r"(?P<head>(?:password|passwd|pwd|token|secret|api_?key|aws_secret_access_key)['\"]?\s*[=:]\s*)"
    r"(?P<secret>'[^']*'|\"[^\"]*\"|[^\s&,;]+)",
    re.IGNORECASE,
)


def register_secrets(values: Iterable[str | None]) -> None:
    """Make sure these texts never appear in any message, as they are, percent-decoded or percent-encoded.

    Texts under four characters are left out: masking them would only garble messages.
    """
    for value in values:
        plain = value or ""
        for form in {
            plain,
            *(change(plain) for change in (unquote, unquote_plus, quote, quote_plus)),
            quote(plain, ""),
        }:
            if len(form) >= 4:
                _secrets.add(form)


def redact(text: str) -> str:
    """The text without any known secret, URL password or `password=` value."""
    for secret in sorted(_secrets, key=len, reverse=True):
        text = text.replace(secret, MASK)
    text = _URL_PASSWORD.sub(rf"\g<head>{MASK}", text)
    return _KEYWORD.sub(rf"\g<head>{MASK}", text)


def one_line(error: BaseException) -> str:
    """An exception as the single, masked, printable line that users see and tables store (NUL they cannot)."""
    told = " ".join(str(error).split()) or type(error).__name__
    return printable(redact(told)[:500])


_run_id: str | None = None


class _TextFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        level = "" if record.levelno == logging.INFO else f"{record.levelname.lower()}: "
        text = f"hlcli: {level}{record.getMessage()}"
        if record.exc_info:
            text += "\n" + self.formatException(record.exc_info)
        return redact(text)


class _JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        entry = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(),
            "level": record.levelname.lower(),
            "message": redact(record.getMessage()),
        }
        if _run_id:
            entry["run_id"] = _run_id
        if record.exc_info:
            entry["traceback"] = redact(self.formatException(record.exc_info))
        return json.dumps(entry)


class _StderrHandler(logging.StreamHandler[TextIO]):
    """Writes above a progress bar instead of through it, and to whatever stderr is now."""

    def emit(self, record: logging.LogRecord) -> None:
        bars = sys.modules.get("tqdm")
        if bars is not None and bars.tqdm._instances:  # noqa: SLF001 - tqdm offers no public question
            bars.tqdm.write(self.format(record), file=sys.stderr)
            return
        self.stream = sys.stderr
        super().emit(record)


def set_run_id(run_id: str | None) -> None:
    """Put this run id into every JSON log line from now on."""
    global _run_id  # noqa: PLW0603 - one process is one run
    _run_id = run_id


def setup(*, verbose: bool = False, json_lines: bool = False) -> None:
    """Send our log to stderr: warnings only, or everything from INFO with a terminal or `verbose`."""
    handler = _StderrHandler(sys.stderr)
    handler.setFormatter(_JsonFormatter() if json_lines else _TextFormatter())
    log.handlers[:] = [handler]
    log.propagate = False
    log.setLevel(logging.INFO if verbose or sys.stderr.isatty() else logging.WARNING)
