"""Everything that the environment decides, read once, checked, immutable.

Order: command-line flag over environment over `.env`. The `.env` file is found from the working directory
upward (cron starts in $HOME, so the README's crontab changes directory first) or named by --env-file.
"""

from __future__ import annotations

import os
import re
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from hlcli.exitcodes import ConfigError
from hlcli.logs import register_secrets

if TYPE_CHECKING:
    from collections.abc import Mapping

MAX_ASSETS = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The settings of one process. Field names are the environment variables in lower case."""

    database_url: str | None
    """libpq connection string or URL; None means the embedded server."""
    hlcli_home: Path
    """Where the embedded server keeps its data."""
    hl_api_url: str
    hl_stats_url: str
    hl_api_weight_per_minute: int
    """Weight per IP and minute that all processes of one egress key may spend together."""
    hl_api_requests_per_minute: int | None
    """An extra cap in requests, for whoever wants to be politer than the published limit."""
    hl_egress_key: str
    """Whose budget this process spends: equal on all hosts behind one public address."""
    aws_region: str
    """Of the bucket of TWAP statuses; credentials are boto3's own business."""
    aws_s3_bucket: str
    aws_s3_prefix: str
    aws_request_payer: str
    """Always "requester": the buckets serve nobody else."""
    aws_endpoint_url_s3: str | None
    """Another S3 than Amazon's."""
    hl_fills_s3_bucket: str
    hl_fills_s3_prefix: str
    hl_fills_s3_region: str
    api_host: str
    """Where `hlcli serve` listens."""
    api_port: int
    api_token: str | None
    """What clients of `hlcli serve` must show, where it is set."""
    hlcli_assets: tuple[str, ...]
    """The coins whose positions are watched; `dex:COIN` for a builder-deployed market."""
    hlcli_ping_url: str | None
    """Dead-man's switch; `{job}` is replaced by the channel, /start and /<exit code> are appended."""
    hlcli_log_format: str

    @property
    def embedded(self) -> bool:
        return self.database_url is None

    def __repr__(self) -> str:
        """Settings hold secrets; a stray repr in a message must not show them."""
        return f"Settings(embedded={self.embedded}, egress={self.hl_egress_key!r})"


def load(env_file: Path | None = None) -> Settings:
    """Read `.env` into the environment (never over what is already set) and parse the environment.

    The variables really enter os.environ, because boto3 and libpq read their own from there.

    Raises ConfigError for a missing --env-file or a malformed value.
    """
    from dotenv import find_dotenv, load_dotenv

    if env_file is not None and not env_file.is_file():
        raise ConfigError(f"--env-file: there is no file {env_file}")
    # find_dotenv() alone walks up from the installed module's folder and finds nothing.
    path = str(env_file) if env_file is not None else find_dotenv(usecwd=True)
    if path:
        try:
            load_dotenv(path, override=False)
        except (OSError, ValueError) as error:  # ValueError: no UTF-8, or a NUL
            raise ConfigError(f"cannot read {path}: {error}") from error
    return from_env(os.environ)


def from_env(env: Mapping[str, str]) -> Settings:
    """Parse settings from a mapping; an empty value counts as unset. Raises ConfigError, naming the variable."""

    def text(name: str, default: str = "") -> str:
        return env.get(name, "").strip() or default

    def url(name: str, default: str) -> str:
        value = text(name, default).rstrip("/")
        try:
            parts = urlsplit(value)
            usable = parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0
        except ValueError:  # its text would quote the password
            usable = False
        if not usable:
            raise ConfigError(f"{name} is not an http(s) URL")
        return value

    def count(name: str, default: int | None, low: int, high: int) -> int | None:
        value = text(name)
        if not value:
            return default
        if not re.fullmatch(r"[0-9]{1,9}", value) or not low <= int(value) <= high:
            raise ConfigError(f"{name} must be a whole number from {low} to {high}")
        return int(value)

    log_format = text("HLCLI_LOG_FORMAT", "text")
    if log_format not in {"text", "json"}:
        raise ConfigError("HLCLI_LOG_FORMAT must be text or json")

    def bucket(name: str, default: str) -> str:
        value = text(name, default)
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{2,254}", value):
            raise ConfigError(f"{name} is no name of an S3 bucket")
        return value

    def region(name: str, default: str) -> str:
        value = text(name, default)
        if not re.fullmatch(r"[a-z0-9-]{1,40}", value):
            raise ConfigError(f"{name} is no AWS region")
        return value

    def prefix(name: str, default: str) -> str:
        value = text(name, default)
        if len(value) > 500 or not value.isprintable():
            raise ConfigError(f"{name} must be at most 500 printable characters")
        return value

    weight = count("HL_API_WEIGHT_PER_MINUTE", 1200, 20, 1_000_000)
    api_port = count("API_PORT", 8000, 1, 65535)
    assert weight is not None
    assert api_port is not None
    if text("AWS_REQUEST_PAYER", "requester") != "requester":
        raise ConfigError('AWS_REQUEST_PAYER must be "requester": the buckets serve nobody else')
    database_url = text("DATABASE_URL") or None
    egress_key = text("HL_EGRESS_KEY", socket.gethostname())
    if len(egress_key) > 200 or not egress_key.isprintable():
        raise ConfigError("HL_EGRESS_KEY must be at most 200 printable characters")
    ping_url = url("HLCLI_PING_URL", "") if text("HLCLI_PING_URL") else None
    register_secrets(
        [
            *_passwords_of(database_url),
            text("API_TOKEN"),
            text("AWS_SECRET_ACCESS_KEY"),
            text("AWS_SESSION_TOKEN"),
            text("PGPASSWORD"),
            # The path of a ping URL is its secret.
            *(part.strip("/") for part in urlsplit(ping_url or "").path.split("{job}")),
        ]
    )
    return Settings(
        database_url=_libpq(database_url),
        hlcli_home=Path(text("HLCLI_HOME")).expanduser() if text("HLCLI_HOME") else default_home(),
        hl_api_url=url("HL_API_URL", "https://api.hyperliquid.xyz/info"),
        hl_stats_url=url("HL_STATS_URL", "https://stats-data.hyperliquid.xyz/Mainnet"),
        hl_api_weight_per_minute=weight,
        hl_api_requests_per_minute=count("HL_API_REQUESTS_PER_MINUTE", None, 1, 1_000_000),
        hl_egress_key=egress_key,
        aws_region=region("AWS_REGION", "us-east-1"),
        aws_s3_bucket=bucket("AWS_S3_BUCKET", "artemis-hyperliquid-data"),
        aws_s3_prefix=prefix("AWS_S3_PREFIX", "raw/twap_statuses/"),
        aws_request_payer="requester",
        aws_endpoint_url_s3=url("AWS_ENDPOINT_URL_S3", "") if text("AWS_ENDPOINT_URL_S3") else None,
        hl_fills_s3_bucket=bucket("HL_FILLS_S3_BUCKET", "hl-mainnet-node-data"),
        hl_fills_s3_prefix=prefix("HL_FILLS_S3_PREFIX", "node_fills_by_block/hourly/"),
        hl_fills_s3_region=region("HL_FILLS_S3_REGION", "ap-northeast-1"),
        api_host=text("API_HOST", "127.0.0.1"),
        api_port=api_port,
        api_token=text("API_TOKEN") or None,
        hlcli_assets=assets_of(text("HLCLI_ASSETS", "HYPE,BTC,ETH")),
        hlcli_ping_url=ping_url,
        hlcli_log_format=log_format,
    )


def assets_of(text: str) -> tuple[str, ...]:
    """Coins out of a list with commas, each once, in their order; names are case-sensitive. Raises ConfigError."""
    assets = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    wrong = [asset for asset in assets if not re.fullmatch(r"([a-z0-9]{1,12}:)?[A-Za-z0-9]{1,24}", asset)]
    if wrong or not 1 <= len(assets) <= MAX_ASSETS:
        raise ConfigError(
            f"HLCLI_ASSETS must be 1 to {MAX_ASSETS} names such as BTC or xyz:GOLD, separated by commas"
        )
    return assets


def default_home() -> Path:
    """The platform's user data folder; for root /var/lib/hlcli.

    Root is special because the embedded server opens the parents of its data folder to other users, which
    would expose /root.
    """
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        return Path("/var/lib/hlcli")
    # macOS too: the space in "Application Support" is more than the embedded server's starter can take.
    base = os.environ.get("XDG_DATA_HOME", "")
    return (Path(base) if base.startswith("/") else Path.home() / ".local" / "share") / "hlcli"


def _libpq(database_url: str | None) -> str | None:
    """SQLAlchemy writes postgresql+psycopg://, older tools postgres://; libpq knows only its own form."""
    if database_url is None:
        return None
    url = re.sub(r"^postgres(ql)?(\+[a-z0-9]+)?://", "postgresql://", database_url)
    if re.match(r"\w[\w+.-]*://", url) and not url.startswith("postgresql://"):
        raise ConfigError("DATABASE_URL is not a PostgreSQL URL")
    return url


def _passwords_of(database_url: str | None) -> set[str]:
    """Whatever may be a password in a database URL, and every piece of it that libpq may quote.

    libpq takes an unescaped delimiter for the end of the password and complains of the rest as host, port or option.
    """
    # By hand: urlsplit refuses exactly the malformed URLs whose password must not be shown either.
    found = re.findall(r"://[^:/@]*:(.*)@", database_url or "")
    for text in re.findall(r"password\s*=\s*('(?:[^'\\]|\\.)*'?|\S+)", database_url or ""):
        found += [text.strip("'"), text.split("&")[0]]
    pieces = set(found)
    for text in found:
        cuts = [match.start() for match in re.finditer(r"[@:/?#&=%,\[\]]", text)][:50]
        pieces |= {text[start:end] for start in (0, *(cut + 1 for cut in cuts)) for end in (*cuts, len(text))}
    return pieces
