"""Settings: every variable, its default, what is refused, and where it may come from."""

import dataclasses
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from hlcli import logs
from hlcli import settings as settings_module
from hlcli.exitcodes import ConfigError, ExitCode
from hlcli.settings import Settings, default_home, from_env, load


@pytest.fixture(autouse=True)
def own_process_state(monkeypatch):
    """load() writes into os.environ and registers secrets for the whole process: undo both."""
    monkeypatch.setattr(logs, "_secrets", set())
    before = dict(os.environ)
    yield
    for name in set(os.environ) - set(before):
        del os.environ[name]
    os.environ.update(before)


DEFAULTS = {
    "database_url": None,
    "hl_api_url": "https://api.hyperliquid.xyz/info",
    "hl_stats_url": "https://stats-data.hyperliquid.xyz/Mainnet",
    "hl_api_weight_per_minute": 1200,
    "hl_api_requests_per_minute": None,
    "hl_egress_key": socket.gethostname(),
    "hlcli_ping_url": None,
    "hlcli_log_format": "text",
}
GIVEN = {
    "DATABASE_URL": ("postgresql://me@db.example.org:5432/base", "postgresql://me@db.example.org:5432/base"),
    "HLCLI_HOME": ("/srv/hlcli", Path("/srv/hlcli")),
    "HL_API_URL": ("http://127.0.0.1:8000/info/", "http://127.0.0.1:8000/info"),
    "HL_STATS_URL": ("https://stats.example.org/Mainnet", "https://stats.example.org/Mainnet"),
    "HL_API_WEIGHT_PER_MINUTE": ("600", 600),
    "HL_API_REQUESTS_PER_MINUTE": ("300", 300),
    "HL_EGRESS_KEY": ("office", "office"),
    "HLCLI_PING_URL": ("https://ping.example.org/key/{job}", "https://ping.example.org/key/{job}"),
    "HLCLI_LOG_FORMAT": ("json", "json"),
}


def value_of(settings: Settings, name: str) -> object:
    return getattr(settings, name.lower())


def test_every_setting_is_tested_here():
    fields = {field.name.upper() for field in dataclasses.fields(Settings)}
    tested = set(GIVEN)
    assert fields >= tested
    # A setting of a later dataset is tested beside its job; those of the foundation are all here.
    assert {name.lower() for name in tested} == {*DEFAULTS, "hlcli_home"}


def test_every_setting_has_its_default():
    made = from_env({})
    assert {name: getattr(made, name) for name in DEFAULTS} == DEFAULTS
    assert made.hlcli_home == default_home()
    assert made.embedded


@pytest.mark.parametrize("name", GIVEN)
def test_every_setting_is_read_from_its_variable(name):
    text, expected = GIVEN[name]
    assert value_of(from_env({name: text}), name) == expected
    assert value_of(from_env({name: f"  {text}\n"}), name) == expected


@pytest.mark.parametrize("name", GIVEN)
@pytest.mark.parametrize("empty", ["", "  ", "\t\n"])
def test_an_empty_value_counts_as_unset(name, empty):
    assert value_of(from_env({name: empty}), name) == value_of(from_env({}), name)


MALFORMED = {
    "DATABASE_URL": ["mysql://me:woodland@h/base", "sqlite:///woodland", "https://me:woodland@h/"],
    "HL_API_URL": [
        "api.hyperliquid.xyz/info",
        "ftp://me:woodland@h/",
        "http://",
        "http:///info",
        "https:me:woodland@h",
        "http://[::1",
        "http://me:woodland@[::1/x",
        "http://me:wood\u2100land@h/x",
        "http://me:woodland@h:99999/x",
        "http://me:woodland@h:port/x",
    ],
    "HL_STATS_URL": ["stats", "file:///etc/woodland", "http://[woodland"],
    "HL_API_WEIGHT_PER_MINUTE": [
        "0",
        "19",
        "-1200",
        "1200.0",
        "1e3",
        "0x4b0",
        "１２００",
        "many",
        "9" * 5000,
        "1 200",
    ],
    "HL_API_REQUESTS_PER_MINUTE": ["0", "-1", "none", "1000001"],
    "HLCLI_PING_URL": ["hc/woodland", "http://", "ftp://h/woodland", "http://[woodland"],
    "HLCLI_LOG_FORMAT": ["JSON", "xml", "woodland"],
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in MALFORMED.items() for value in values]
)
def test_a_malformed_value_is_a_configuration_error_that_names_the_variable_only(name, value):
    with pytest.raises(ConfigError) as caught:
        from_env({name: value})
    assert name in str(caught.value)
    assert "wood" not in str(caught.value)
    assert len(str(caught.value)) < 200


def test_a_malformed_setting_ends_a_command_with_the_code_for_configuration(cli):
    for name, value in (("HL_API_WEIGHT_PER_MINUTE", "many"), ("HL_API_URL", "http://me:woodland@[::1/x")):
        done = cli("status", **{name: value})
        assert (done.returncode, done.stdout) == (ExitCode.CONFIG, "")
        assert len(done.stderr.splitlines()) == 1
        assert name in done.stderr
        assert "wood" not in done.stderr


@pytest.mark.parametrize("prefix", ["postgresql", "postgres", "postgresql+psycopg", "postgresql+psycopg2"])
def test_every_way_to_write_a_database_url_becomes_libpqs(prefix):
    made = from_env({"DATABASE_URL": f"{prefix}://me:pw@h:5432/base?sslmode=require"})
    assert made.database_url == "postgresql://me:pw@h:5432/base?sslmode=require"
    assert not made.embedded


def test_such_urls_really_connect(database, cli):
    from psycopg import conninfo

    parts = conninfo.conninfo_to_dict(database)
    rest = "&".join(f"{name}={str(value).replace('/', '%2F')}" for name, value in parts.items())
    for prefix in ("postgresql", "postgres", "postgresql+psycopg"):
        done = cli("status", DATABASE_URL=f"{prefix}:///?{rest}")
        assert (done.returncode, done.stderr) == (0, ""), done


@pytest.mark.parametrize(
    "text",
    [
        "host=/tmp port=5432 dbname=base",
        "service=mine",
        "dbname='my base'",
        "host=h password='a://b' dbname=base",
    ],
)
def test_a_keyword_connection_string_is_left_alone(text):
    assert from_env({"DATABASE_URL": text}).database_url == text


def test_a_repr_shows_no_secret():
    made = from_env(
        {
            "DATABASE_URL": "postgresql://me:woodland@h/base",
            "HLCLI_PING_URL": "https://ping.example.org/woodland",
        }
    )
    for text in (repr(made), str(made), f"{made}", repr([made])):
        assert "woodland" not in text


def test_settings_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        from_env({}).hl_egress_key = "other"


# .env


def test_the_env_file_is_found_from_the_working_directory_upward(tmp_path, monkeypatch):
    (tmp_path / ".env").write_text("HL_EGRESS_KEY=from-the-top\n")
    below = tmp_path / "a" / "b"
    below.mkdir(parents=True)
    monkeypatch.chdir(below)
    assert load().hl_egress_key == "from-the-top"
    del os.environ["HL_EGRESS_KEY"]
    (tmp_path / "a" / ".env").write_text("HL_EGRESS_KEY=nearer\n")
    assert load().hl_egress_key == "nearer"


def test_no_env_file_is_no_error():
    assert load().hl_egress_key == socket.gethostname()


def test_the_environment_wins_over_the_file(tmp_path, monkeypatch):
    (tmp_path / ".env").write_text("HL_EGRESS_KEY=file\nHL_API_WEIGHT_PER_MINUTE=100\n")
    monkeypatch.setenv("HL_EGRESS_KEY", "environment")
    made = load()
    assert (made.hl_egress_key, made.hl_api_weight_per_minute) == ("environment", 100)


def test_an_empty_variable_keeps_the_file_from_setting_it(tmp_path, monkeypatch):
    (tmp_path / ".env").write_text("DATABASE_URL=postgresql://me@h/base\n")
    monkeypatch.setenv("DATABASE_URL", "")
    assert load().embedded


def test_a_named_file_is_read_instead_of_the_found_one(tmp_path):
    (tmp_path / ".env").write_text("HL_EGRESS_KEY=found\n")
    named = tmp_path / "other.env"
    named.write_text("HL_API_WEIGHT_PER_MINUTE=100\n")
    made = load(named)
    assert (made.hl_egress_key, made.hl_api_weight_per_minute) == (socket.gethostname(), 100)


def test_a_named_file_that_is_missing_is_a_configuration_error(tmp_path):
    with pytest.raises(ConfigError, match="--env-file"):
        load(tmp_path / "missing.env")
    with pytest.raises(ConfigError, match="--env-file"):
        load(tmp_path)


@pytest.mark.parametrize("content", [b"HL_EGRESS_KEY=\xff\xfe\n", b"HL_EGRESS_KEY=a\x00b\n"])
def test_a_file_that_cannot_be_read_is_a_configuration_error(tmp_path, content):
    (tmp_path / ".env").write_bytes(content)
    with pytest.raises(ConfigError, match=r"\.env"):
        load()


def test_other_programs_variables_enter_the_environment(tmp_path):
    (tmp_path / ".env").write_text("AWS_SECRET_ACCESS_KEY=woodland-key\nPGSSLMODE=require\n")
    load()
    assert os.environ["PGSSLMODE"] == "require"
    assert "woodland" not in logs.redact("refused woodland-key")


@pytest.mark.parametrize("password", ["p@:/%25#?$x", "a$b$$c", "a#b", "a b", "a'b", 'a"b', "a\\b"])
def test_a_password_is_read_from_the_file_as_it_is_written(tmp_path, password):
    url = f"postgresql://me:{password}@h/base"
    (tmp_path / ".env").write_text(f"DATABASE_URL={url}\n")
    assert load().database_url == url


def test_flag_over_environment_over_file(cli, tmp_path):
    """Of the formats only JSON begins with a brace; a warning is needed to see it."""
    (tmp_path / ".env").write_text("HLCLI_LOG_FORMAT=json\n")
    shown = (
        "import sys; from hlcli import logs; from hlcli.cli import app, common\n"
        "@app.command('probe')\n"
        "def probe():\n"
        "    common.settings(); logs.log.warning('x')\n"
        "app(sys.argv[1:])\n"
    )

    def line(*flags: str, **env: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", shown, *flags, "probe"],
            env={**os.environ, **env},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done
        return done.stderr[:1]

    assert line() == "{"
    assert line(HLCLI_LOG_FORMAT="text") == "h"
    assert line("--log-format", "json", HLCLI_LOG_FORMAT="text") == "{"
    (tmp_path / "named.env").write_text("HLCLI_LOG_FORMAT=text\n")
    assert line("--env-file", "named.env") == "h"


# Where the embedded server lives


def test_root_keeps_its_data_where_no_parent_is_private(monkeypatch):
    monkeypatch.setattr(settings_module.os, "geteuid", lambda: 0)
    monkeypatch.setenv("HOME", "/root")
    monkeypatch.setenv("XDG_DATA_HOME", "/root/.data")
    assert default_home() == Path("/var/lib/hlcli")


def test_others_keep_their_data_in_the_users_data_folder(monkeypatch):
    monkeypatch.setattr(settings_module.os, "geteuid", lambda: 1000)
    monkeypatch.setenv("HOME", "/home/me")

    monkeypatch.delenv("XDG_DATA_HOME", raising=False)
    assert default_home() == Path("/home/me/.local/share/hlcli")
    monkeypatch.setenv("XDG_DATA_HOME", "/data/me")
    assert default_home() == Path("/data/me/hlcli")
    # The standard says that a relative path is to be ignored.
    monkeypatch.setenv("XDG_DATA_HOME", "data")
    assert default_home() == Path("/home/me/.local/share/hlcli")


def test_a_tilde_in_the_home_is_the_users(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert from_env({"HLCLI_HOME": "~/hl"}).hlcli_home == Path("/home/me/hl")
