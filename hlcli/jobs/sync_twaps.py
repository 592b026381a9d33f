"""`hlcli twap sync`: TWAP orders and what became of them, from S3."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

from hlcli.jobs import Report, objects
from hlcli.jobs.object_plan import Dataset
from hlcli.ledger import Channel
from hlcli.sources import twaps

if TYPE_CHECKING:
    from hlcli.jobs.object_plan import Options
    from hlcli.settings import Settings

CHANNEL = Channel("s3", "twap_status", timedelta(days=1), "hlcli twap sync", "30 0 * * *")


def sync_twaps(settings: Settings, options: Options) -> Report:
    """Read TWAP events from new objects, or from files. Raises what objects.sync() raises."""
    dataset = Dataset(
        channel=CHANNEL,
        table=twaps.TABLE,
        time="ts",
        newer=["is_exact", "s3_last_modified"],
        bucket=settings.aws_s3_bucket,
        prefix=settings.aws_s3_prefix,
        region=settings.aws_region,
        read=twaps.read,
        columns=lambda stored: {"s3_object_key": stored.key, "s3_last_modified": stored.last_modified},
        touch=["raw_payload"],
    )
    return objects.sync(settings, dataset, options)
