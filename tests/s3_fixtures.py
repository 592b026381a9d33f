"""Fixtures `moto`, one server a session, and `s3`, a bucket and a proxy of its own for each test.

A plugin, to be named in pytest_plugins.
"""

from __future__ import annotations

import logging

import pytest
from s3_server import SECRET, Store


@pytest.fixture(scope="session")
def moto():
    """The address of moto's server, in this process."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    yield server.get_host_and_port()
    server.stop()


@pytest.fixture
def s3(moto, monkeypatch, tmp_path):
    """A Store; boto3 finds these credentials, and none of the machine's."""
    for name, value in {
        "AWS_ACCESS_KEY_ID": "AKIATESTTESTTESTTEST",
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_CONFIG_FILE": str(tmp_path / "no-aws-config"),
        "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "no-aws-credentials"),
        "AWS_EC2_METADATA_DISABLED": "true",
    }.items():
        monkeypatch.setenv(name, value)
    store = Store(moto)
    yield store
    store.close()


@pytest.fixture
def impatient(monkeypatch):
    """Nobody waits between two attempts in this process."""
    from botocore.retries import standard

    from hlcli import s3 as module

    monkeypatch.setattr(standard.ExponentialBackoff, "delay_amount", lambda self, context: 0)
    monkeypatch.setitem(module.S3.__init__.__kwdefaults__, "pause_s", 0.0)
