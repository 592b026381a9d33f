"""README, .env.example and crontab.example say what the code does."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from hlcli import settings
from hlcli.exitcodes import MEANINGS
from hlcli.jobs import channels

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def test_the_readme_lists_the_exit_codes_of_the_enum():
    for code, meaning in MEANINGS.items():
        assert f"| {int(code)} | {meaning} |" in README


@pytest.mark.parametrize("document", ["README.md", "tests/faults/README.md"])
def test_every_test_that_a_document_names_exists(document):
    path = ROOT / document
    named = re.findall(r"\[`(\w+)`\]\(((?:\.\./)*tests/[\w/]+\.py)\)", path.read_text())
    assert named
    for test, file in named:
        assert f"def test_{test}(" in (path.parent / file).read_text(), (test, file)


def test_every_link_to_a_file_leads_somewhere():
    for target in re.findall(r"\]\(([\w./-]+)\)", README):
        assert (ROOT / target).exists(), target


def test_env_example_lists_exactly_the_settings():
    listed = set(re.findall(r"^#([A-Z0-9_]+)=", (ROOT / ".env.example").read_text(), re.MULTILINE))
    fields = {name.upper() for name in settings.Settings.__slots__}
    assert listed == fields


def test_the_crontab_runs_every_channel_as_declared_and_has_no_percent():
    text = (ROOT / "crontab.example").read_text()
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert "CRON_TZ=UTC" in lines
    assert "%" not in "".join(lines)
    jobs = [(" ".join(line.split()[:5]), line) for line in lines if "&&" in line]
    for channel in channels():
        assert any(cron == channel.cron and channel.command in line for cron, line in jobs), channel
    minutes = [cron.split()[0] for cron, _ in jobs]
    assert "0" not in minutes, "the full hour is when everybody starts"


def test_the_readme_names_every_command():
    help_text = subprocess.run(
        [sys.executable, "-m", "hlcli", "--help"], capture_output=True, text=True, check=True
    ).stdout
    commands = re.findall(r"^│ (\w+)  ", help_text, re.MULTILINE)
    assert len(commands) >= 6
    for command in commands:
        assert f"`hlcli {command}" in README, command


def test_no_placeholder_is_left():
    assert not re.search(r"@[A-Z]+@", README)
