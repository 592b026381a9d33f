"""The command line. Each file beside this one is a command group: parse, call one job, print, exit."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hlcli import __version__
from hlcli.cli import (
    backfill,
    common,
    database,
    demo,
    fills,
    ingest,
    maintain,
    rank,
    serve,
    signals,
    snapshot,
    status,
    twap,
    universe,
)
from hlcli.exitcodes import MEANINGS

_EXIT_CODES = "\n\n".join(f"[bold]{int(code):>3}[/bold]  {meaning}" for code, meaning in MEANINGS.items())

app = typer.Typer(
    name="hlcli",
    help="Keeps a PostgreSQL database filled with Hyperliquid's public data.\n\n"
    "Try it without any set-up:  [bold]hlcli demo[/bold]",
    epilog=f"Exit codes\n\n{_EXIT_CODES}",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)


def _version(asked: bool) -> None:
    if asked:
        print(f"hlcli {__version__}")
        raise typer.Exit


def _log_format(value: str | None) -> str | None:
    if value not in {None, "text", "json"}:
        raise typer.BadParameter("must be text or json")
    return value


@app.callback()
def _root(
    env_file: Annotated[
        Path | None, typer.Option(help="Read this file instead of the .env found from here upward.")
    ] = None,
    log_format: Annotated[
        str | None, typer.Option(metavar="text|json", callback=_log_format, help="How stderr is written.")
    ] = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Tell more on stderr.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks (masked).")] = False,
    version: Annotated[  # noqa: ARG001 - its callback answers
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    common.root.env_file, common.root.log_format = env_file, log_format
    common.root.verbose, common.root.debug = verbose, debug


app.command("init", epilog=database.MIGRATE_EPILOG)(database.init)
app.add_typer(ingest.app, name="ingest")
app.add_typer(rank.app, name="rank")
app.add_typer(universe.app, name="universe")
app.command("snapshot", epilog=snapshot.EPILOG)(snapshot.snapshot)
app.add_typer(signals.app, name="signals")
app.add_typer(twap.app, name="twap")
app.add_typer(fills.app, name="fills")
app.command("backfill", epilog=backfill.EPILOG)(backfill.backfill)
app.command("maintain", epilog=maintain.EPILOG)(maintain.maintain)
app.command("serve", epilog=serve.EPILOG)(serve.serve)
app.command("status", epilog=status.EPILOG)(status.status)
app.add_typer(database.app, name="db")
app.command("demo", epilog=demo.EPILOG)(demo.demo)
