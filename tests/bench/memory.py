"""Peak memory and time of `hlcli ingest vaults --limit 0` on a list of 9,500 vaults (15 MB).

python -m tests.bench.memory [--vaults 9500]
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time

from hlcli.sim import Simulator
from tests.bench.server import private_server


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--vaults", type=int, default=9500)
    vaults = parser.parse_args().vaults
    with private_server() as url, Simulator(vaults=vaults) as exchange:
        env = {**os.environ, **exchange.env(), "DATABASE_URL": url}
        for arguments in (["init"], ["ingest", "vaults", "--limit", "0"]):
            began = time.perf_counter()
            child = subprocess.Popen(
                [sys.executable, "-m", "hlcli", *arguments], env=env, stdout=subprocess.DEVNULL
            )
            _, status, usage = os.wait4(child.pid, 0)
            child.returncode = os.waitstatus_to_exitcode(status)
            assert child.returncode == 0, arguments
    print(f"{vaults:,} vaults from the list into the table:")
    print(f"  peak memory {usage.ru_maxrss / 1024:.0f} MB, {time.perf_counter() - began:.1f} s with start-up")


if __name__ == "__main__":
    main()
