"""`hlcli rank vaults`: the 500 open vaults that could distribute most, from fresh metrics only."""

from __future__ import annotations

from collections import Counter
from datetime import timedelta
from typing import TYPE_CHECKING

from hlcli.exitcodes import TemporaryError
from hlcli.jobs import Report, running
from hlcli.ledger import Channel
from hlcli.loader import Merge, load
from hlcli.sqlfiles import query

if TYPE_CHECKING:
    from hlcli.settings import Settings

CHANNEL = Channel("hyperliquid", "top_500_vaults", timedelta(hours=4), "hlcli rank vaults", "58 */4 * * *")
TABLE = "hyperliquid_vaults_discovery.top_500_vaults"
PLACES = 500


def rank_vaults(settings: Settings, *, max_age: timedelta, fail_if_locked: bool = False) -> Report:
    """Replace the ranking in one transaction; the report says how many vaults were left out and why.

    Raises TemporaryError, and leaves the old ranking, when not one vault has fresh metrics.
    """
    import polars as pl

    with running(settings, CHANNEL, fail_if_locked=fail_if_locked) as (report, job):
        if job is None:
            return report
        run = job.run
        with run.unit() as connection:
            standing = connection.execute(
                query("vaults", "rank"), {"oldest": run.started_at - max_age}
            ).fetchall()
            left_out = Counter(reason for *_, reason, _ in standing if reason is not None)
            fresh = [row for row in standing if row[4] is None]
            ranked = fresh[:PLACES]
            left_out["beyond place 500"] = len(fresh) - len(ranked)
            report.details.update(
                ranked=len(ranked), left_out={k: n for k, n in sorted(left_out.items()) if n}
            )
            if not ranked:
                raise TemporaryError(
                    f"no open vault of {len(standing)} has metrics from the last "
                    f"{max_age.total_seconds() / 3600:g} h: the ranking stays as it was; run `hlcli ingest vaults`"
                )
            gone = connection.execute(
                query("vaults", "drop_unranked"), ([row[0] for row in ranked],)
            ).rowcount
            time = pl.Datetime("us", "UTC")
            frame = pl.DataFrame(
                {
                    "vault_address": [row[0] for row in ranked],
                    "rank": [row[5] for row in ranked],
                    "max_distributable_tvl": [str(row[3]) for row in ranked],
                    "tvl_usd": pl.Series(
                        [None if row[1] is None else str(row[1]) for row in ranked], dtype=pl.String
                    ),
                    "metrics_time": pl.Series([row[2] for row in ranked], dtype=time),
                }
            ).with_columns(pl.lit(run.started_at).cast(time).alias("updated_at"))
            counts = load(
                connection, TABLE, frame, rule=Merge.UPDATE, touch=["updated_at"], run_id=run.run_id
            )
            report.details["dropped"] = gone
            run.add(counts, units_ok=1)
    return report
