"""The command line as cron, scripts and people meet it: every test runs the real process."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import termios
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest
from vault_tables import PLENTY, runs

from hlcli import __version__, embedded
from hlcli.sim import Fault, Simulator

HEAVY = {"polars", "pyarrow", "boto3", "requests", "psycopg", "ijson", "pgpq", "tqdm", "urllib3"}
# Port 1 of the loopback refuses at once.
NOWHERE = "postgresql://user@127.0.0.1:1/db"


def commands():
    """Every command as (its words, whether it is a group)."""
    import typer

    from hlcli.cli import app

    def walk(command, words):
        inner = getattr(command, "commands", {})
        yield words, bool(inner)
        for name, child in inner.items():
            yield from walk(child, (*words, name))

    return list(walk(typer.main.get_command(app), ()))


COMMANDS = commands()
LEAVES = [words for words, group in COMMANDS if not group]


@pytest.fixture
def sim():
    with Simulator(vaults=30, weight_per_minute=100_000) as running:
        yield running


@pytest.fixture
def env(sim, database):
    return {"DATABASE_URL": database, "HL_EGRESS_KEY": "test", **PLENTY, **sim.env()}


# --- help, version, usage -----------------------------------------------------------------------------------------


def test_version(cli):
    done = cli("--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"hlcli {__version__}\n", "")
    assert cli("--debug", "--version").stdout == done.stdout


@pytest.mark.parametrize(
    ("words", "group"), COMMANDS, ids=[" ".join(words) or "hlcli" for words, _ in COMMANDS]
)
def test_help_has_an_example_and_exit_codes_and_fits_100_columns(cli, words, group):
    done = cli(*words, "--help", COLUMNS="100", NO_COLOR="1")
    assert (done.returncode, done.stderr) == (0, "")
    assert max(map(len, done.stdout.splitlines())) <= 100
    if not group:
        assert "Example" in done.stdout
        assert f"hlcli {' '.join(words)}" in done.stdout
        assert "Exit codes" in done.stdout


def test_the_main_help_tells_every_exit_code(cli):
    from hlcli.exitcodes import MEANINGS

    shown = cli("--help", COLUMNS="100", NO_COLOR="1").stdout
    for code, meaning in MEANINGS.items():
        assert re.search(rf"\b{int(code)}\b\s+{re.escape(meaning.split(';')[0])}", shown), code


USAGE = [
    ("nonsense",),
    ("ingest", "nonsense"),
    ("--nonsense", "status"),
    ("ingest", "vaults", "--limit", "-1"),
    ("ingest", "vaults", "--limit", "many"),
    ("ingest", "vaults", "--address", "0x12"),
    ("ingest", "vaults", "--min-tvl", "NaN"),
    ("ingest", "vaults", "--min-tvl", "1e999"),
    ("ingest", "vaults", "--concurrency", "0"),
    ("ingest", "vaults", "--deadline", "soon"),
    ("ingest", "vaults", "--deadline", "0"),
    ("rank", "vaults", "--max-age", "-6h"),
    ("rank", "vaults", "extra"),
    ("--log-format", "xml", "status"),
]


@pytest.mark.parametrize("args", USAGE, ids=" ".join)
def test_wrong_usage_exits_2_before_anything_happens(cli, args):
    done = cli(*args, DATABASE_URL=NOWHERE)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "args", [("--help",), ("--version",), ("ingest", "--help"), ("ingest", "vaults", "--help")], ids=" ".join
)
def test_help_and_version_load_nothing_heavy(tmp_path, args):
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "hlcli", *args],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    loaded = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert "hlcli" in loaded
    assert loaded & HEAVY == set()


# --- what is printed ----------------------------------------------------------------------------------------------


def test_success_is_silent_without_a_terminal(cli, env):
    for args in (("ingest", "vaults"), ("rank", "vaults")):
        done = cli(*args, **env)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", ""), args


def test_json_output_is_one_object_with_its_version(cli, env):
    for args in (
        ("init",),
        ("ingest", "vaults"),
        ("rank", "vaults"),
        ("status",),
        ("db", "info"),
        ("db", "migrate"),
    ):
        done = cli(*args, "--json", **env)
        assert (done.returncode, done.stderr) == (0, ""), args
        told = json.loads(done.stdout)
        assert told["schema_version"] == 1, args


def test_the_report_agrees_with_the_ledger_and_the_exit_code(cli, env, sim, connection):
    sim.add_fault(Fault("vaultDetails", "status", status=422))
    done = cli("ingest", "vaults", "--json", **env)
    told = json.loads(done.stdout)
    (run,) = runs(connection)
    assert (done.returncode, told["exit_code"], run["exit_code"]) == (3, 3, 3)
    assert (told["run_id"], told["status"]) == (str(run["run_id"]), run["status"])
    numbers = told["numbers"]
    for name in ("served", "inserted", "updated", "unchanged", "duplicate", "rejected"):
        assert numbers[name] == run[f"rows_{name}"], name
    assert (numbers["requests"], numbers["weight"]) == (run["requests"], run["weight"])


@pytest.mark.parametrize(
    ("database_url", "code"),
    [(NOWHERE, 4), ("mysql://x/y", 5), ("postgresql://[::1/x", 5)],
    ids=["4", "5", "bad"],
)
def test_an_error_is_one_line_and_with_json_one_object_on_stderr(cli, database_url, code):
    done = cli("status", DATABASE_URL=database_url)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (code, "", 1)
    assert done.stderr.startswith("hlcli: ")
    done = cli("status", "--json", DATABASE_URL=database_url)
    assert (done.returncode, done.stdout) == (code, "")
    told = json.loads(done.stderr)
    assert (told["message_type"], told["code"]) == ("exit_error", code)
    assert told["message"]


def test_an_empty_database_is_exit_5_and_names_the_cure(cli, empty_database):
    for args in (("ingest", "vaults"), ("rank", "vaults"), ("status",)):
        done = cli(*args, DATABASE_URL=empty_database)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (5, "", 1)
        assert "hlcli init" in done.stderr


def on_terminal(args, env, *, columns, cwd):
    """Run a command on a terminal so many columns wide; returns (exit code, the lines that it showed)."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    process = subprocess.Popen(
        [sys.executable, "-m", "hlcli", *args],
        stdin=slave,
        stdout=slave,
        stderr=slave,
        # Whoever runs the tests side by side may have told them a width of his own.
        env={**os.environ, "TERM": "xterm", "COLUMNS": str(columns), **env},
        cwd=cwd,
    )
    os.close(slave)
    shown = b""
    try:
        while chunk := os.read(master, 65536):
            shown += chunk
    except OSError:  # Linux: the other side was closed
        pass
    os.close(master)
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode())
    # A carriage return within a line is a progress bar that overwrites itself.
    return process.wait(60), [part for line in plain.split("\n") for part in line.strip("\r").split("\r")]


@pytest.mark.parametrize("columns", [80, 250])
def test_tables_fit_the_terminal_and_never_exceed_100_columns(cli, env, tmp_path, columns):
    cli("ingest", "vaults", **env)
    for args in (["status"], ["db", "info"]):
        code, lines = on_terminal(args, env, columns=columns, cwd=tmp_path)
        assert code == 0
        assert max(map(len, lines)) <= min(columns, 100), args
        assert len(lines) > 3


def test_a_terminal_gets_a_summary(env, tmp_path):
    code, lines = on_terminal(["ingest", "vaults"], env, columns=80, cwd=tmp_path)
    text = "\n".join(lines)
    assert code == 0
    assert "hyperliquid/vaults: ok" in text
    assert "served" in text


# --- no secret anywhere (F25) -------------------------------------------------------------------------------------

# None of the two halves of a password may be shown, whatever a library makes of the characters between them.
HALVES = ("Zq7Head", "Wx9Tail")
BETWEEN = {
    "nothing": "",
    "escapes": "%40%3A%2F%25%23%3F%24",
    "an at sign": "@",
    "everything raw": "@:/%#?$",
    "a slash": "/",
    "a hash": "#",
    "a bad escape": "%ZZ",
    "a question mark": "?",
    "a blank": " ",
}


def assert_hidden(done, parts=HALVES):
    shown = done.stdout + done.stderr
    assert shown
    for part in parts:
        assert part not in shown, shown


@pytest.mark.parametrize("between", BETWEEN.values(), ids=BETWEEN)
def test_no_password_of_a_url_is_ever_shown(cli, between):
    url = f"postgresql://user:{between.join(HALVES)}@127.0.0.1:1/db"
    # --debug shows the most: the log, the traceback and the line of the error.
    done = cli("--debug", "-v", "status", "--json", DATABASE_URL=url)
    assert done.returncode in (4, 5)
    assert_hidden(done)


BAD_URLS = {
    "keywords": "host=127.0.0.1 port=1 user=u password=Zq7HeadWx9Tail dbname=x",
    "quoted keywords": "host=127.0.0.1 port=1 user=u password='Zq7Head it\\'s Wx9Tail' dbname=x",
    "keywords with a bare blank": "host=127.0.0.1 port=1 user=u password=Zq7Head Wx9Tail dbname=x",
    "an unknown option": "postgresql://u:Zq7HeadWx9Tail@127.0.0.1:1/db?nonsense=1",
    "a bad port": "postgresql://u:Zq7HeadWx9Tail@127.0.0.1:port/db",
    "an open bracket": "postgresql://u:Zq7HeadWx9Tail@[::1/db",
    "another scheme": "mysql://u:Zq7HeadWx9Tail@127.0.0.1/db",
    "a password as option": "postgresql://127.0.0.1:1/db?user=u&password=Zq7HeadWx9Tail",
    "no host": "postgresql://u:Zq7HeadWx9Tail@",
    "not a URL": "u:Zq7HeadWx9Tail@127.0.0.1",
}


@pytest.mark.parametrize("url", BAD_URLS.values(), ids=BAD_URLS)
def test_no_bad_url_is_quoted_with_its_password(cli, url):
    done = cli("--debug", "-v", "status", DATABASE_URL=url)
    assert done.returncode in (4, 5)
    assert_hidden(done)


@pytest.mark.parametrize("args", [words for words in LEAVES if words != ("demo",)], ids=" ".join)
def test_no_command_shows_the_password(cli, args):
    done = cli("--debug", *args, DATABASE_URL="postgresql://user:Zq7Head%40Wx9Tail@127.0.0.1:1/db")
    assert done.returncode in (4, 5)
    assert_hidden(done)


def test_a_ping_that_fails_neither_fails_the_job_nor_tells_its_url(cli, env, connection):
    secret = "6f1c2f36-0000-4e0b-9d3b-2b9f1c6f8a77"
    done = cli(
        "--debug", "ingest", "vaults", "--limit", "1", HLCLI_PING_URL=f"http://127.0.0.1:1/{secret}", **env
    )
    assert done.returncode == 0
    assert "ping failed" in done.stderr
    assert_hidden(done, [secret, secret[:8]])
    done = cli("--debug", "status", HLCLI_PING_URL=f"htp://x/{secret}", **env)
    assert done.returncode == 5
    assert_hidden(done, [secret, secret[:8]])


# --- surroundings (F26) -------------------------------------------------------------------------------------------


def shell(line, env, cwd):
    return subprocess.run(
        ["bash", "-c", f'hlcli() {{ {sys.executable} -m hlcli "$@"; }}\n{line}'],
        env={**os.environ, **env},
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_a_reader_that_stops_reading_causes_no_traceback(env, tmp_path):
    done = shell("hlcli status --json | head -1", env, tmp_path)
    assert (done.stdout, done.stderr) == ("{\n", "")


@pytest.mark.parametrize("line", ["hlcli ingest vaults --json | true", "hlcli ingest vaults --json >&-"])
def test_a_job_whose_reader_has_gone_still_does_its_work_and_says_0(env, tmp_path, connection, line):
    """G7: the ledger says ok, so the exit code must not say that it is a bug."""
    done = shell(f"set -o pipefail\n{line}", env, tmp_path)
    assert [run["status"] for run in runs(connection)] == ["ok"]
    assert "Traceback" not in done.stderr
    assert done.returncode == 0


ODD = {
    "LC_ALL=C": {"LC_ALL": "C", "LANG": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    "TERM=dumb": {"TERM": "dumb"},
    "no HOME": {"HOME": None, "XDG_DATA_HOME": None, "USER": None, "LOGNAME": None},
    "cwd=/": {"cwd": "/"},
    "nothing but the database": {"PATH": None, "HOME": None, "LANG": None, "TERM": None, "SHELL": None},
}


@pytest.mark.parametrize("odd", ODD.values(), ids=ODD)
def test_odd_surroundings_change_nothing(env, tmp_path, odd):
    surroundings = {**os.environ, **env, **{k: v for k, v in odd.items() if v is not None and k != "cwd"}}
    for name in [name for name, value in odd.items() if value is None]:
        surroundings.pop(name, None)
    for args in (["ingest", "vaults"], ["status", "--json"]):
        done = subprocess.run(
            [sys.executable, "-m", "hlcli", *args],
            env=surroundings,
            cwd=odd.get("cwd", tmp_path),
            capture_output=True,
            timeout=60,
            stdin=None,
        )
        assert (done.returncode, done.stderr) == (0, b""), args


# --- the dead-man's switch ----------------------------------------------------------------------------------------


@pytest.fixture
def watcher():
    """A server that keeps the (path, rid) of every ping."""
    pings = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            parts = urlsplit(self.path)
            pings.append((parts.path, parse_qs(parts.query).get("rid")))
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/check-uuid", pings
    server.shutdown()
    server.server_close()


def test_pings_say_start_and_exit_code_with_the_run_id(cli, env, sim, connection, watcher):
    url, pings = watcher
    assert cli("ingest", "vaults", "--limit", "1", HLCLI_PING_URL=url, **env).returncode == 0
    connection.execute("update ingest_cursors set value = value - 'etag'")
    sim.add_fault(Fault("/Mainnet/vaults", "status", status=403))
    assert cli("ingest", "vaults", HLCLI_PING_URL=url + "/{job}", **env).returncode == 4
    first, second = ([str(run["run_id"])] for run in runs(connection))
    assert pings == [
        ("/check-uuid/start", first),
        ("/check-uuid/0", first),
        ("/check-uuid/vaults/start", second),
        ("/check-uuid/vaults/4", second),
    ]


def test_a_skipped_run_pings_nobody(cli, env, connection, watcher):
    from hlcli.jobs.ingest_vaults import CHANNEL
    from hlcli.migrations import LOCK_NAMESPACE

    url, pings = watcher
    connection.execute("select pg_advisory_lock(%s, %s)", (LOCK_NAMESPACE, CHANNEL.lock_key))
    assert cli("ingest", "vaults", HLCLI_PING_URL=url, **env).returncode == 0
    assert cli("ingest", "vaults", "--fail-if-locked", HLCLI_PING_URL=url, **env).returncode == 6
    assert pings == []


# --- the demo -----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(bool(os.environ.get("HLCLI_TEST_DATABASE_URL")), reason="needs the embedded server")
def test_the_demo_runs_every_step_on_a_database_of_its_own(cli):
    home = Path(tempfile.mkdtemp(prefix="hlcli-demo-", dir="/tmp"))
    try:
        done = cli(
            "demo",
            "--home",
            str(home),
            DATABASE_URL=NOWHERE,
            HLCLI_PING_URL="http://127.0.0.1:1/x",
            timeout=150,
        )
        assert (done.returncode, done.stderr) == (0, "")
        steps = re.findall(r"^\[\d+/\d+\] hlcli (.*)$", done.stdout, re.MULTILINE)
        assert "s3/fills\tok" in done.stdout
        assert "s3/twap_status\tok" in done.stdout
        assert steps[0] == "init"
        assert steps[-1] == "status"
        assert "hyperliquid/vaults\tok" in done.stdout
        assert "hyperliquid/top_500_vaults\tok" in done.stdout
    finally:
        embedded.stop(home)
        shutil.rmtree(home, ignore_errors=True)
