"""The dead-man's switch: a job says that it started and how it ended, to whoever watches HLCLI_PING_URL.

The form is healthchecks.io's: URL/start, URL/<exit code>, and the run's id as `rid` to pair them. Nothing is sent
for a skipped run, and a ping that fails never fails the job.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hlcli.exitcodes import ExitCode
from hlcli.logs import log, one_line

if TYPE_CHECKING:
    from uuid import UUID

    from hlcli.settings import Settings

TIMEOUT_S = 5


def ping(settings: Settings, job: str, run_id: UUID, exit_code: ExitCode | None, message: str = "") -> None:
    """Say that a run started (`exit_code` None) or how it ended; `message` is kept by the watcher as a log."""
    if settings.hlcli_ping_url is None:
        return
    import requests

    base = settings.hlcli_ping_url.replace("{job}", job)
    end = "start" if exit_code is None else str(int(exit_code))
    try:
        requests.post(
            f"{base}/{end}",
            params={"rid": str(run_id)},
            data=message.encode(),
            timeout=TIMEOUT_S,
            stream=True,
        ).close()
    except Exception as error:  # whatever it is, it must not change how the job ends
        log.warning("ping failed: %s", one_line(error))
