"""`hlcli rank vaults`: the 500 open vaults that could distribute most, from fresh metrics only."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from datetime import datetime, timedelta
from decimal import Decimal
from typing import TYPE_CHECKING

from hlcli.exitcodes import TemporaryError
from hlcli.jobs import Job, Report, run_job
from hlcli.ledger import Channel
from hlcli.loader import Merge, load
from hlcli.sources import wire
from hlcli.sqlfiles import query

if TYPE_CHECKING:
    from hlcli.ledger import Unit
    from hlcli.settings import Settings

CHANNEL = Channel("hyperliquid", "top_500_vaults", timedelta(hours=4), "hlcli rank vaults", "58 */4 * * *")
TABLE = "hyperliquid_vaults_discovery.top_500_vaults"
PLACES = 500


@dataclass(frozen=True, slots=True)
class Standing:
    """A vault with its place, or with the reason why it has none."""

    vault_address: str
    tvl_usd: Decimal | None
    observed_at: datetime | None
    max_distributable_tvl: Decimal | None
    left_out: str | None
    place: int


def rank_vaults(settings: Settings, *, max_age: timedelta, fail_if_locked: bool = False) -> Report:
    """Replace the ranking in one transaction; the report says how many vaults were left out and why.

    Raises TemporaryError, and leaves the old ranking, when not one vault has fresh metrics.
    """

    def work(job: Job) -> None:
        with job.run.unit() as unit:
            _rank(job, unit, max_age)

    return run_job(settings, CHANNEL, work, fail_if_locked=fail_if_locked)


def _rank(job: Job, unit: Unit, max_age: timedelta) -> None:
    import polars as pl
    from psycopg.rows import class_row

    cursor = unit.connection.cursor(row_factory=class_row(Standing))
    standing = cursor.execute(query("vaults", "rank"), {"oldest": job.run.started_at - max_age}).fetchall()
    left_out = Counter(vault.left_out for vault in standing if vault.left_out)
    fresh = [vault for vault in standing if not vault.left_out]
    ranked = fresh[:PLACES]
    left_out[f"beyond place {PLACES}"] = len(fresh) - len(ranked)
    job.report.details.update(
        ranked=len(ranked), left_out={why: n for why, n in sorted(left_out.items()) if n}
    )
    if not ranked:
        raise TemporaryError(
            f"no open vault of {len(standing)} has metrics from the last {max_age.total_seconds() / 3600:g} h: "
            "the ranking stays as it was; run `hlcli ingest vaults`"
        )
    dropped = unit.connection.execute(
        query("vaults", "drop_unranked"), ([vault.vault_address for vault in ranked],)
    ).rowcount
    job.report.details["dropped"] = dropped
    time = pl.Datetime("us", "UTC")
    frame = pl.DataFrame(
        {
            "vault_address": [vault.vault_address for vault in ranked],
            "rank": [vault.place for vault in ranked],
            "max_distributable_tvl": [wire.text(vault.max_distributable_tvl) for vault in ranked],
            "tvl_usd": [wire.text(vault.tvl_usd) for vault in ranked],
            "metrics_time": [vault.observed_at for vault in ranked],
        },
        schema_overrides={"tvl_usd": pl.String, "metrics_time": time},
    ).with_columns(pl.lit(job.run.started_at).cast(time).alias("updated_at"))
    unit.add(
        load(unit.connection, TABLE, frame, rule=Merge.UPDATE, touch=["updated_at"], run_id=job.run.run_id),
        units_ok=1,
    )
