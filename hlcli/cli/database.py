"""`hlcli init` and `hlcli db`: the schema and the server."""

from __future__ import annotations

import typer

from hlcli.cli import common
from hlcli.exitcodes import ExitCode

app = typer.Typer(help="The database: where it is, its schema, its server.", no_args_is_help=True)

MIGRATE_EPILOG = common.epilog(
    "DATABASE_URL=postgresql://user@host/db hlcli init", ExitCode.TEMPORARY, ExitCode.CONFIG
)


def init(as_json: common.Json = False) -> None:
    """Create or upgrade the schema. Harmless to repeat, and to start several times at once."""
    from hlcli import db, migrations, output

    with db.connect(common.settings(), role="init") as connection:
        done = migrations.migrate(connection)
        migrations.require_current(connection)
    labels = [migration.label for migration in done]
    if as_json:
        output.print_json({"applied": labels, "known": len(migrations.known())})
    else:
        for label in labels:
            print(f"applied {label}")
        if not labels:
            print("the schema is up to date")


app.command("migrate", epilog=MIGRATE_EPILOG)(init)


@app.command(epilog=common.epilog("hlcli db info --json", ExitCode.TEMPORARY, ExitCode.CONFIG))
def info(as_json: common.Json = False) -> None:
    """Show which database is used, its version, size and pending migrations."""
    from hlcli import db, migrations, output

    settings = common.settings()
    with db.connect(settings, role="info") as connection:
        about = connection.info
        size = connection.execute("select pg_size_pretty(pg_database_size(current_database()))").fetchone()
        facts = {
            "server": "embedded" if settings.embedded else "DATABASE_URL",
            "version": about.parameter_status("server_version"),
            "host": about.host,
            "port": about.port,
            "database": about.dbname,
            "user": about.user,
            "size": size[0] if size else None,
            "pending_migrations": [migration.label for migration in migrations.pending(connection)],
        }
    if as_json:
        output.print_json(facts)
        return
    output.print_table(["", ""], [[name.replace("_", " "), _text(value)] for name, value in facts.items()])


def _text(value: object) -> object:
    return (", ".join(map(str, value)) or "none") if isinstance(value, list) else value


@app.command(epilog=common.epilog("hlcli db stop", ExitCode.TEMPORARY, ExitCode.CONFIG))
def stop() -> None:
    """Stop the embedded server; the next command starts it again."""
    from hlcli import embedded
    from hlcli.exitcodes import ConfigError

    settings = common.settings()
    if not settings.embedded:
        raise ConfigError("DATABASE_URL is set: hlcli stops only the embedded server that it started")
    print("stopped" if embedded.stop(settings.hlcli_home) else "was not running")
