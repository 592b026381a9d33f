"""`hlcli serve`: the HTTP API."""

from __future__ import annotations

from typing import Annotated

import typer

from hlcli.cli import common
from hlcli.exitcodes import ConfigError, ExitCode

EPILOG = common.epilog(
    "hlcli serve --port 8080",
    ExitCode.TEMPORARY,
    ExitCode.CONFIG,
    ExitCode.INTERRUPTED,
    ExitCode.TERMINATED,
)


def serve(
    host: Annotated[
        str | None,
        typer.Option(metavar="ADDRESS", help="Where to listen; default: API_HOST, else 127.0.0.1."),
    ] = None,
    port: Annotated[
        int | None,
        typer.Option(min=0, max=65535, help="Default: API_PORT, else 8000; 0: any free one, told with -v."),
    ] = None,
) -> None:
    """Serve TWAPs over HTTP, in the foreground, until SIGTERM or SIGINT. Reads only."""
    settings = common.settings()
    try:
        from hlcli.serve import server
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("hlcli"):
            raise
        raise ConfigError(f"the API needs the package {error.name}: pip install 'hlcli[serve]'") from None
    server.run(
        settings,
        settings.api_host if host is None else host,
        settings.api_port if port is None else port,
        access_log=common.root.verbose,
    )
