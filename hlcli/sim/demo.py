"""The steps of `hlcli demo`: the very commands that a crontab would start, against the simulated exchange."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from typing import TYPE_CHECKING

from hlcli.sim.server import Simulator

if TYPE_CHECKING:
    from pathlib import Path

VAULTS = 400
# The simulator allows more than the exchange does, so that the demo need not wait for the budget.
WEIGHT_PER_MINUTE = 60_000
# A later dataset adds its step here.
STEPS: tuple[tuple[str, ...], ...] = (
    ("init",),
    # A step that another run keeps from working must not pass for done.
    ("ingest", "vaults", "--fail-if-locked"),
    ("rank", "vaults", "--fail-if-locked"),
    ("status",),
)


def run(home: Path) -> int:
    """Run all steps and print what to do next; returns the exit code of the step that failed, or 0."""
    home = home.resolve()
    print("A simulated exchange on this machine; the database is private to the demo:")
    print(f"  {home}\n", flush=True)
    began = time.monotonic()
    with Simulator(vaults=VAULTS, weight_per_minute=WEIGHT_PER_MINUTE) as exchange:
        env = {
            **os.environ,
            **exchange.env(),
            # Empty means unset, and keeps a .env from setting it again.
            "DATABASE_URL": "",
            "HLCLI_PING_URL": "",
            "HLCLI_HOME": str(home),
            "HL_EGRESS_KEY": "demo",
            "HL_API_REQUESTS_PER_MINUTE": "",
            "HL_API_WEIGHT_PER_MINUTE": str(WEIGHT_PER_MINUTE),
        }
        for number, step in enumerate(STEPS, 1):
            print(f"[{number}/{len(STEPS)}] hlcli {shlex.join(step)}", flush=True)
            code = subprocess.run([sys.executable, "-m", "hlcli", *step], env=env, check=False).returncode
            if code:
                print(f"\nThe step failed with exit code {code}.", file=sys.stderr)
                return code if code > 0 else 128 - code
            print(flush=True)
    here = f"HLCLI_HOME={shlex.quote(str(home))}"
    print(f"Done in {time.monotonic() - began:.0f} s. What to run next:")
    print(f"  {here} hlcli db info        # where the demo's database is; psql can attach there")
    print(f"  {here} hlcli status --json  # the same health, for programs")
    print(f"  {here} hlcli db stop        # stop its server")
    print("  hlcli ingest vaults --limit 50   # the real exchange, into your own database")
    return 0
