"""What the HTTP API takes and answers; OpenAPI is made of these."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

MAX_RANGE = timedelta(days=366)


def iso(value: datetime) -> str:
    """A time in UTC as every answer writes it: 2025-11-03T12:00:00Z, with microseconds only where there are some."""
    return value.astimezone(UTC).isoformat().replace("+00:00", "Z")


def _moment(given: object) -> datetime:
    # An offset's "+" that the client did not escape arrives as a space.
    text = re.sub(r"(T\S+) (\d\d:?\d\d)$", r"\1+\2", str(given))
    try:
        value = datetime.fromisoformat(text)
        value = value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)
    except (ValueError, OverflowError):
        value = datetime.min.replace(tzinfo=UTC)
    if not 1970 <= value.year < 9999:
        raise ValueError("must be an ISO 8601 time such as 2025-11-01T00:00:00Z")
    return value


def _whole(given: object) -> object:
    # int() takes 1_000, too, and " 7".
    if isinstance(given, str) and not re.fullmatch(r"-?[0-9]{1,20}", given):
        raise ValueError("must be a whole number")
    return given


Moment = Annotated[datetime, BeforeValidator(_moment)]
TwapId = Annotated[
    int,
    BeforeValidator(_whole),
    Field(ge=-(2**63), le=2**63 - 1, description="Number of the TWAP."),
]


class TwapsQuery(BaseModel):
    """The parameters of /api/v1/twaps; one that it does not know is refused, as it is most likely misspelt."""

    model_config = ConfigDict(extra="forbid")

    wallet: Annotated[str, AfterValidator(str.lower)] = Field(
        pattern="^0[xX][0-9a-fA-F]{40}$",
        description="Address, in any case.",
        examples=["0x31ca8395cf837de08b24da3f660e77761dfb974b"],
    )
    start: Moment = Field(
        description="ISO 8601; UTC unless it has an offset.", examples=["2025-11-01T00:00:00Z"]
    )
    end: Moment = Field(
        description="ISO 8601, inclusive; at most 366 days after start.", examples=["2025-11-04T00:00:00Z"]
    )
    asset: Annotated[str, Field(min_length=1, max_length=40, pattern=r"^[^\x00-\x1f\x7f]+$")] | None = Field(
        None, description="Only this coin, as the exchange writes it.", examples=["SOL"]
    )
    latest_per_twap: bool = Field(True, description="The latest row of each TWAP; false: every row of it.")
    limit: Annotated[int, BeforeValidator(_whole)] = Field(
        500, ge=1, le=1000, description="How many TWAPs, not rows; the newest are kept."
    )
    by: Literal["event", "created", "active"] = Field(
        "event",
        description="What lies between start and end. event: rows by their ts, and only these are shown; created: "
        "TWAPs by their creation; active: TWAPs alive at any moment of it.",
    )

    @model_validator(mode="after")
    def _range(self) -> Self:
        if self.end < self.start:
            raise ValueError("end is before start")
        if self.end - self.start > MAX_RANGE:
            raise ValueError(f"end is more than {MAX_RANGE.days} days after start")
        return self


class Executed(BaseModel):
    """What was executed so far: decimal numbers as text, digit for digit as stored."""

    size: str | None = Field(description="Units of the asset.", examples=["10.5"])
    notional: str | None = Field(description="USD.", examples=["950.25"])


class Twap(BaseModel):
    """One row of a TWAP, the latest unless every row was asked for."""

    twap_id: str = Field(examples=["123456"])
    asset: str | None = Field(examples=["SOL"])
    side: str | None = Field(description="B buys, A sells.", examples=["B"])
    status: str = Field(description="activated, finished, terminated or error; others as served.")
    duration_minutes: int | None = Field(examples=[30])
    latest_ts: datetime = Field(examples=["2025-11-03T12:00:00Z"])
    executed: Executed
    raw: dict[str, Any] = Field(description="The event as the exchange served it.")


class Twaps(BaseModel):
    """TWAPs of one wallet, newest first; rows of one TWAP stand together."""

    wallet: str = Field(description="In lower case.")
    start: datetime
    end: datetime
    twaps: list[Twap]


class TwapRow(BaseModel):
    """One event of a TWAP."""

    wallet: str
    ts: datetime
    status: str
    raw: dict[str, Any]


class TwapRows(BaseModel):
    """Every event of one TWAP, oldest first."""

    twap_id: str
    rows: list[TwapRow]


class LastIngested(BaseModel):
    """The object of TWAP statuses that was read last."""

    s3_object_key: str
    last_modified: datetime
    ingested_at: datetime
    rows_ingested: int


class Health(BaseModel):
    """Whether the API can answer."""

    status: Literal["ok", "error"]
    database: Literal["ok", "unavailable"]
    last_ingested: LastIngested | None = Field(description="null: nothing was read yet.")


class Problem(BaseModel):
    """Why there is no answer."""

    detail: str
