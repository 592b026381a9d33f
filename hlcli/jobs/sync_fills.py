"""`hlcli fills sync`: every wallet's fills, from the files that the exchange's nodes write."""

from __future__ import annotations

from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING

from hlcli.jobs import Report, objects
from hlcli.jobs.object_plan import Dataset
from hlcli.ledger import Channel
from hlcli.sources import fills

if TYPE_CHECKING:
    from hlcli.jobs.object_plan import Options
    from hlcli.settings import Settings

# A file of an hour appears some minutes after the hour.
CHANNEL = Channel("s3", "fills", timedelta(hours=1), "hlcli fills sync", "17 * * * *")


def sync_fills(settings: Settings, options: Options, *, user: str | None = None) -> Report:
    """Read fills from new objects, or from files; `user` says whose they are where the file does not.

    Files are cut by arrival: the fills of an hour are in its object and in the next one.

    Raises what objects.sync() raises.
    """
    dataset = Dataset(
        channel=CHANNEL,
        table=fills.TABLE,
        time="time",
        newer=fills.NEWER,
        bucket=settings.hl_fills_s3_bucket,
        prefix=settings.hl_fills_s3_prefix,
        region=settings.hl_fills_s3_region,
        read=partial(fills.read, user=user),
    )
    return objects.sync(settings, dataset, options)
