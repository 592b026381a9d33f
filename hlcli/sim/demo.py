"""The steps of `hlcli demo`: the very commands that a crontab would start, against the simulated exchange."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING, NamedTuple

from hlcli.sim import objects
from hlcli.sim.server import Simulator

if TYPE_CHECKING:
    from pathlib import Path

VAULTS = 400
WALLETS = 300
# The simulator allows more than the exchange does, so that the demo need not wait for the budget.
WEIGHT_PER_MINUTE = 60_000
# Two windows of signals, and the minutes since.
MINUTES = 17


# Stands in arguments for the folder of the invented files.
SAMPLE = "{sample}"


class Step(NamedTuple):
    """One command, or the same one in each of the last minutes, by a clock that is set back."""

    arguments: tuple[str, ...]
    minutes: int = 0


# A later dataset adds its step here. A step that another run keeps from working must not pass for done.
STEPS = (
    Step(("init",)),
    Step(("ingest", "vaults", "--fail-if-locked")),
    Step(("rank", "vaults", "--fail-if-locked")),
    Step(("universe", "refresh", "--size", "100", "--fail-if-locked")),
    Step(("snapshot", "--fail-if-locked"), minutes=MINUTES),
    Step(("signals", "compute", "--fail-if-locked")),
    Step(("signals", "show")),
    Step(("twap", "sync", "--local-file", f"{SAMPLE}/twaps", "--fail-if-locked")),
    Step(("fills", "sync", "--local-file", f"{SAMPLE}/fills", "--fail-if-locked")),
    Step(("backfill", "--users-file", f"{SAMPLE}/wallets.txt", "--fail-if-locked")),
    Step(("fills", "coverage", "--limit", "5")),
    Step(("maintain", "--fail-if-locked")),
    Step(("status",)),
)


def run(home: Path) -> int:
    """Run all steps and print what to do next; returns the exit code of the step that failed, or 0."""
    home = home.resolve()
    print("A simulated exchange on this machine; the database is private to the demo:")
    print(f"  {home}\n", flush=True)
    began = time.monotonic()
    sample = home / "sample"
    objects.sample(sample, datetime.now(UTC))
    with Simulator(vaults=VAULTS, wallets=WALLETS, weight_per_minute=WEIGHT_PER_MINUTE) as exchange:
        (sample / "wallets.txt").write_text("\n".join(exchange.user_fills.addresses) + "\n", "ascii")
        env = {
            **os.environ,
            **exchange.env(),
            # Empty means unset, and keeps a .env from setting it again.
            "DATABASE_URL": "",
            "HLCLI_PING_URL": "",
            "HLCLI_HOME": str(home),
            "HLCLI_ASSETS": "",
            "HL_EGRESS_KEY": "demo",
            "HL_API_REQUESTS_PER_MINUTE": "",
            "HL_API_WEIGHT_PER_MINUTE": str(WEIGHT_PER_MINUTE),
        }
        for number, step in enumerate(STEPS, 1):
            often = f"   (the last {step.minutes} minutes)" if step.minutes else ""
            arguments = [argument.replace(SAMPLE, str(sample)) for argument in step.arguments]
            print(f"[{number}/{len(STEPS)}] hlcli {shlex.join(arguments)}{often}", flush=True)
            code = _run(arguments, step.minutes, exchange, env)
            if code:
                print(f"\nThe step failed with exit code {code}.", file=sys.stderr)
                return code if code > 0 else 128 - code
            print(flush=True)
    here = f"HLCLI_HOME={shlex.quote(str(home))}"
    print(f"Done in {time.monotonic() - began:.0f} s. What to run next:")
    print(f"  {here} hlcli db info        # where the demo's database is; psql can attach there")
    print(f"  {here} hlcli status --json  # the same health, for programs")
    print(f"  {here} hlcli db stop        # stop its server")
    print(f"  {here} hlcli universe show --diff")
    print(f"  {here} hlcli serve          # the HTTP API of TWAPs; needs pip install -e '.[serve]'")
    print("  hlcli ingest vaults --limit 50   # the real exchange, into your own database")
    return 0


def _run(arguments: list[str], minutes: int, exchange: Simulator, env: dict[str, str]) -> int:
    """Run a command and return its exit code; if for many minutes, only the last one's output is shown."""
    command = [sys.executable, "-m", "hlcli", *arguments]
    if not minutes:
        return subprocess.run(command, env=env, check=False).returncode
    this_minute = time.time() // 60 * 60
    code = 0
    for ago in reversed(range(minutes)):
        # Five seconds into each minute, so that none is too far gone to be taken.
        shift_s = round(this_minute - 60 * ago + 5 - time.time())
        exchange.clock_offset_ms = 1000 * shift_s
        code = subprocess.run(
            command,
            env={**env, "PGOPTIONS": f"-c hlcli.clock_offset={shift_s}s"},
            stdout=subprocess.DEVNULL if ago else None,
            check=False,
        ).returncode
        if code:
            break
    exchange.clock_offset_ms = 0
    return code
