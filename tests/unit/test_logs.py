"""No secret in any message (promise G8), and log lines that a program can read."""

import json
import logging
import os
import socket
import subprocess
import sys
import traceback
from urllib.parse import quote, quote_plus

import psycopg
import pytest
import requests

from hlcli import db, logs, settings
from hlcli.exitcodes import ConfigError
from hlcli.logs import MASK, log, one_line, redact, register_secrets


@pytest.fixture(autouse=True)
def own_secrets(monkeypatch):
    """The known secrets are one set a process; every test starts with none."""
    monkeypatch.setattr(logs, "_secrets", set())


@pytest.fixture
def refused():
    """A port of loopback on which nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return taken.getsockname()[1]


def shown(error: BaseException) -> str:
    """Everything a user may be shown of an error, --debug included."""
    return one_line(error) + redact("".join(traceback.format_exception(error)))


def telling(text: str, secret: str, length: int = 5) -> list[str]:
    """Which pieces of a secret stand in a text."""
    return [
        secret[at : at + length] for at in range(len(secret) - length + 1) if secret[at : at + length] in text
    ]


PASSWORDS = [
    "plainsecret",
    "hunter2@woodland",
    "hunter2:woodland",
    "hunter2/woodland",
    "hunter2%woodland",
    "hunter2%zzwood",
    "hunter2#woodland",
    "hunter2?woodland",
    "hunter2$woodland",
    "hunter2?wood=land&rock",
    "@hunter2@woodland@",
    "wood/land@hunter2#x?rock$y%25",
    "[woodland]",
    "hunter2'wood\"land",
    "ünïcödé-wörd",
    "50%25woodland",
    "50%e2woodland",
]


@pytest.mark.parametrize("password", PASSWORDS)
@pytest.mark.parametrize("scheme", ["postgresql", "postgres", "postgresql+psycopg"])
def test_no_piece_of_a_database_password_is_shown_however_it_was_written(password, scheme, refused):
    for written in (password, quote(password, safe=""), quote_plus(password)):
        for place in (f"127.0.0.1:{refused}", "no-such-host.invalid", "127.0.0.1:port", "[::1"):
            url = f"{scheme}://user:{written}@{place}/base"
            with pytest.raises((psycopg.Error, ConfigError)) as caught:
                db.connect(settings.from_env({"DATABASE_URL": url}), role="test")
            assert telling(shown(caught.value), password) == [], place
            assert telling(shown(caught.value), written) == [], place
            assert telling(redact(f"connecting to {url} failed"), password) == []


def test_no_piece_of_a_random_password_is_shown(rng, refused):
    for _ in range(150):
        alphabet = "abcdefghijkXYZ0123456789" + "@:/%#?$&=[]'" * 2
        password = "".join(rng.choice(alphabet) for _ in range(rng.randrange(8, 24)))
        url = f"postgresql://user:{password}@127.0.0.1:{refused}/base"
        with pytest.raises((psycopg.Error, ConfigError)) as caught:
            db.connect(settings.from_env({"DATABASE_URL": url}), role="test")
        assert telling(shown(caught.value), password) == [], url


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://user@127.0.0.1:{port}/base?password=woodland&foo=1",
        "postgresql://127.0.0.1:{port}/base?user=me&password=woodland%zz&connect_timeout=1",
        "postgresql://127.0.0.1:{port}/base?connect_timeout=1&password=woodland",
        "host=127.0.0.1 port={port} user=me password=woodland",
        "host=127.0.0.1 port={port} user=me password='hunter2 woodland'",
        "host=127.0.0.1 port={port} password = 'woodland' junk",
        "password='hunter2 woodland",
        "woodland",
    ],
)
def test_a_password_in_a_parameter_is_not_shown(url, refused):
    made = settings.from_env({"DATABASE_URL": url.format(port=refused)})
    with pytest.raises((psycopg.Error, ConfigError)) as caught:
        db.connect(made, role="test")
    if url != "woodland":
        assert "woodland" not in shown(caught.value)
    assert "woodland" not in repr(made)
    if "password=woodland" in url:
        assert "woodland" not in redact("they said woodland")


def test_both_passwords_of_a_url_are_known():
    settings.from_env({"DATABASE_URL": "postgresql://me:firstword@h/db?password=secondword&sslmode=disable"})
    assert redact("firstword, secondword") == f"{MASK}, {MASK}"


def test_what_requests_tells_of_a_ping_url_hides_its_path(refused):
    key = "a1b2c3d4-woodland"
    settings.from_env({"HLCLI_PING_URL": f"http://127.0.0.1:{refused}/{key}/{{job}}"})
    with pytest.raises(requests.ConnectionError) as caught:
        requests.post(f"http://127.0.0.1:{refused}/{key}/vaults/start", timeout=5)
    assert key in str(caught.value), "or the test shows nothing"
    assert key not in shown(caught.value)


@pytest.mark.parametrize(
    "path", ["KEYWORD1/{job}", "{job}/KEYWORD1", "KEYWORD1/{job}/KEYWORD2", "ping/KEYWORD1-{job}"]
)
def test_a_ping_key_is_hidden_wherever_the_job_stands_in_the_path(path):
    settings.from_env({"HLCLI_PING_URL": f"https://ping.example.org/{path}"})
    told = redact("cannot reach /" + path.replace("{job}", "vaults") + "/start?rid=1")
    assert "KEYWORD" not in told


def test_what_requests_tells_of_user_and_password_is_hidden(refused):
    url = f"http://user:woodland@127.0.0.1:{refused}/x"
    assert "woodland" not in redact(f"cannot reach {url}")
    for bad in (
        f"http://user:woodland@127.0.0.1:{refused}x/",
        "http://user:woodland@:80/",
        "ftp://user:woodland@host/",
    ):
        with pytest.raises(requests.RequestException) as caught:
            requests.get(bad, timeout=5)
        assert "woodland" not in shown(caught.value)


@pytest.mark.parametrize("name", ["AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "API_TOKEN", "PGPASSWORD"])
def test_secrets_of_the_environment_are_hidden(name):
    secret = "wJalrXUtnFEMI/K7MDENG+bPxRfiCY="
    settings.from_env({name: secret})
    assert redact(f"refused: {secret}!") == f"refused: {MASK}!"
    assert "bPxRfiCY" not in redact(f"refused: {quote(secret, safe='')}"), "as it stands in a URL"


@pytest.mark.parametrize(
    "text",
    [
        "password=woodland",
        "password = 'wood land'",
        'PASSWORD: "wood land"',
        "PGPASSWORD=woodland",
        "sslpassword=woodland",
        "pwd=woodland;x",
        "?token=woodland&x=1",
        "API_TOKEN=woodland",
        "api_key=woodland",
        "apikey: woodland",
        "aws_secret_access_key = woodland",
        "{'password': 'woodland'}",
        '{"token": "woodland"}',
        "redis://:woodland@host",
        "https://me:wood@land@host/path",
    ],
)
def test_unknown_secrets_are_recognised_by_their_place(text):
    assert "wood" not in redact(text)
    assert "land" not in redact(text)


@pytest.mark.parametrize(
    "text",
    [
        "https://api.hyperliquid.xyz/info answered HTTP 500",
        'relation "secrets" does not exist',
        "at 2026-11-21T06:46:35+00:00: 5 of 7",
        "mail to someone@example.org",
        "postgresql://user@host:5432/base",
    ],
)
def test_what_is_no_secret_stays_readable(text):
    assert redact(text) == text


def test_registered_secrets_are_masked_in_every_form_and_the_longest_first():
    register_secrets([None, "", "abc", "word", "word%2Fland+x", "wordy"])
    assert redact("abc word wordy word%2Fland+x word/land+x word/land x") == " ".join(["abc", *[MASK] * 5])


def test_one_line_is_one_short_line_and_never_empty():
    assert one_line(ValueError("a\n\tb\r\n  c")) == "a b c"
    assert one_line(TimeoutError()) == "TimeoutError"
    assert len(one_line(ValueError("x" * 10_000))) == 500
    register_secrets(["woodland"])
    cut = one_line(ValueError("x" * 496 + "woodland"))
    assert "wood" not in cut, "masked before it is cut"


# Log lines


@pytest.fixture
def lines(capsys):
    """Set up the log and read back what it wrote."""
    before = log.handlers[:], log.propagate, log.level

    def written(**how: bool) -> list[str]:
        # Not splitlines(): U+2028 ends no line of a log.
        return capsys.readouterr().err.removesuffix("\n").split("\n")

    yield written
    logs.set_run_id(None)
    log.handlers[:], log.propagate, _ = before
    log.setLevel(before[2])


def test_a_json_log_line_is_one_json_object_with_the_run(lines):
    register_secrets(['wood"land'])
    logs.setup(json_lines=True, verbose=True)
    log.info("before")
    logs.set_run_id("run-1")
    texts = [
        "two\nlines",
        'quo"te \\ back',
        "\x00\x1b[31m\u2028\u202e 龙",
        "lone \ud800 surrogate",
        "%s %d",
        'wood"land',
    ]
    for text in texts:
        log.warning("%s", text)
    try:
        raise ValueError('wood"land')
    except ValueError:
        log.exception("failed")
    entries = [json.loads(line) for line in lines()]
    assert [entry["message"] for entry in entries[1:6]] == texts[:5]
    assert entries[6]["message"] == MASK
    assert "run_id" not in entries[0]
    assert {entry["run_id"] for entry in entries[1:8]} == {"run-1"}
    assert "ValueError" in entries[7]["traceback"]
    assert "wood" not in json.dumps(entries[7]["traceback"])
    assert [entry["level"] for entry in entries[:2]] == ["info", "warning"]
    assert all(entry["time"].endswith("+00:00") for entry in entries)


def test_a_text_log_line_says_its_level_and_hides_secrets(lines):
    register_secrets(["woodland"])
    logs.setup(verbose=True)
    log.info("all is %s", "well")
    log.warning("refused woodland")
    try:
        raise ValueError("woodland")
    except ValueError:
        log.exception("failed")
    written = lines()
    assert written[:3] == ["hlcli: all is well", f"hlcli: warning: refused {MASK}", "hlcli: error: failed"]
    assert written[-1] == f"ValueError: {MASK}"


def test_without_a_terminal_only_warnings_are_written(lines):
    logs.setup()
    log.info("narration")
    log.warning("trouble")
    assert lines() == ["hlcli: warning: trouble"]


def test_a_second_setup_replaces_the_first(lines):
    logs.setup()
    logs.setup(json_lines=True)
    log.warning("once")
    assert len(lines()) == 1
    assert isinstance(log.handlers[0], logging.StreamHandler)


CODE = """
from hlcli import logs
for how in (False, True):
    logs.setup(json_lines=how)
    logs.log.warning("é 龙 \\U0001f680 \\ud800")
"""


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_a_log_line_never_fails_for_its_encoding(encoding):
    done = subprocess.run(
        [sys.executable, "-c", CODE],
        env={**os.environ, "PYTHONIOENCODING": f"{encoding}:backslashreplace"},
        capture_output=True,
        timeout=60,
    )
    assert done.returncode == 0
    text, entry = done.stderr.splitlines()
    assert text.startswith(b"hlcli: warning: ")
    assert json.loads(entry.decode(encoding))["message"] == "é 龙 \U0001f680 \ud800"


@pytest.mark.parametrize("how", [[], ["--debug"], ["--log-format", "json"]])
def test_a_wrong_database_url_is_told_in_one_line_without_its_password(cli, refused, how):
    done = cli(*how, "status", DATABASE_URL=f"postgresql://user:hunter2@woodland@127.0.0.1:{refused}/base")
    assert done.returncode in (4, 5), done
    assert "wood" not in done.stdout + done.stderr
    assert how == ["--debug"] or len(done.stderr.splitlines()) == 1, done.stderr
