"""`hlcli demo`: every pipeline once, against a simulated exchange, on a database of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hlcli.cli import common
from hlcli.exitcodes import ExitCode

EPILOG = common.epilog("hlcli demo", ExitCode.TEMPORARY, ExitCode.CONFIG)


def demo(
    home: Annotated[
        Path | None, typer.Option(help="Folder of the demo's database; default: `demo` below HLCLI_HOME.")
    ] = None,
) -> None:
    """Run every pipeline against a simulated exchange. Needs no network, touches no other database."""
    from hlcli.sim.demo import run

    raise typer.Exit(run(home or common.settings().hlcli_home / "demo"))
