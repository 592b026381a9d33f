"""The S3 client on a moto server: what it lists, and what it takes for a whole download."""

from __future__ import annotations

import base64
import io
import zlib
from dataclasses import replace

import pytest
from s3_server import SECRET, T0, assert_every_call_pays, cut, flip, refuse

from hlcli.exitcodes import ConfigError
from hlcli.s3 import S3, DeniedError, GoneError, ObjectError, ReplacedError, cost_usd

pytest_plugins = ("s3_fixtures",)
BODY = bytes(range(256)) * 5000


@pytest.fixture
def client(settings, s3, impatient):
    made = S3(settings(**s3.env()), "us-east-1")
    yield made
    made.close()


@pytest.fixture
def stored(client, s3):
    """An object of more than one chunk, as it was listed."""
    s3.put("raw/0", BODY)
    (found,) = client.list(s3.bucket, "raw/")
    return found


def in_parts(s3):
    """The same object uploaded in parts, whose ETag is no MD5."""
    import boto3

    uploader = boto3.client("s3", region_name="us-east-1", endpoint_url="http://{}:{}".format(*s3.target))
    where = {"Bucket": s3.bucket, "Key": "raw/0"}
    upload = uploader.create_multipart_upload(**where)["UploadId"]
    etag = uploader.upload_part(**where, UploadId=upload, PartNumber=1, Body=BODY)["ETag"]
    parts = {"Parts": [{"PartNumber": 1, "ETag": etag}]}
    uploader.complete_multipart_upload(**where, UploadId=upload, MultipartUpload=parts)
    uploader.close()


def downloaded(client, stored, **more):
    file = io.BytesIO(b"of an earlier attempt" * 10**6)
    client.download(stored, file, **more)
    return file.getvalue()


def test_an_object_is_listed_with_its_version(client, s3, stored):
    s3.put("raw/folder/", b"")
    s3.put("other", b"")
    (again,) = client.list(s3.bucket, "raw/")
    assert again == stored == client.head(s3.bucket, "raw/0")
    assert (stored.key, stored.size, len(stored.etag)) == ("raw/0", len(BODY), 32)
    assert stored.last_modified > T0
    assert list(client.list(s3.bucket, "none/")) == []
    assert_every_call_pays(s3)


def test_a_download_is_the_listed_version_or_none(client, s3, stored):
    assert downloaded(client, stored) == BODY
    assert s3.calls[-1].headers["if-match"] == f'"{stored.etag}"'
    s3.put("raw/0", BODY[1:])
    with pytest.raises(ReplacedError):
        downloaded(client, stored)
    s3.delete("raw/0")
    with pytest.raises(GoneError):
        downloaded(client, stored)
    with pytest.raises(GoneError):
        client.head(s3.bucket, "raw/0")
    assert s3.count("get") == 3
    assert_every_call_pays(s3)


@pytest.mark.parametrize(
    "change",
    [
        cut(),
        cut(at=1_100_000),
        cut(at=0),
        cut(at=-5, chunked=True),
        flip,
        lambda answer: replace(answer, body=answer.body[:-1]),
        lambda answer: replace(answer, body=answer.body + b"x"),
        lambda answer: replace(answer, body=b""),
    ],
    ids=["cut", "cut late", "cut at once", "cut chunk", "flipped", "shorter", "longer", "empty"],
)
def test_a_body_that_is_not_what_was_listed_is_asked_for_three_times(client, s3, stored, change):
    s3.fault("get", times=2, change=change)
    assert downloaded(client, stored) == BODY
    s3.fault("get", times=None, change=change)
    with pytest.raises(ObjectError, match="s3://"):
        downloaded(client, stored)
    assert s3.count("get") == 6


def test_an_object_in_parts_is_told_by_its_size_and_the_checksum_that_s3_has_of_it(client, s3, stored):
    in_parts(s3)
    (stored,) = client.list(s3.bucket, "raw/")
    assert "-" in stored.etag
    assert downloaded(client, stored) == BODY
    crc = base64.b64encode(zlib.crc32(BODY).to_bytes(4, "big")).decode()

    def told(answer):
        return replace(answer, headers={**answer.headers, "x-amz-checksum-crc32": crc})

    s3.fault("get", change=lambda answer: flip(told(answer)))
    s3.fault("get", change=told)
    before = s3.count("get")
    assert downloaded(client, stored) == BODY
    assert s3.count("get") == before + 2
    for wrong in (
        cut(),
        lambda answer: replace(answer, body=BODY[1:]),
        lambda answer: replace(answer, body=BODY + b"x"),
    ):
        s3.mend()
        s3.fault("get", times=None, change=wrong)
        with pytest.raises(ObjectError):
            downloaded(client, stored)


def test_one_encrypted_with_a_key_of_its_owners_has_an_etag_that_is_no_md5(client, s3, stored):
    encrypted = {"x-amz-server-side-encryption": "aws:kms"}
    s3.fault("get", change=lambda answer: flip(replace(answer, headers={**answer.headers, **encrypted})))
    assert downloaded(client, stored) != BODY
    assert s3.count("get") == 1


def test_a_refusal_costs_one_request_and_an_error_of_the_server_three(client, s3, stored):
    s3.fault("get", instead=refuse(403, "AccessDenied"))
    with pytest.raises(DeniedError, match="AccessDenied"):
        downloaded(client, stored)
    assert s3.count("get") == 1
    s3.fault("get", times=None, instead=refuse(503, "SlowDown"))
    with pytest.raises(ObjectError, match="SlowDown"):
        downloaded(client, stored)
    assert s3.count("get") == 4


def test_wrong_keys_end_everything_and_are_not_shown(client, s3, stored):
    s3.fault("get", instead=refuse(403, "InvalidAccessKeyId"))
    with pytest.raises(ConfigError) as caught:
        downloaded(client, stored)
    assert SECRET not in str(caught.value)


def test_a_download_is_ended_between_two_chunks_and_not_begun_again(client, s3, stored):
    with pytest.raises(ObjectError, match="deadline"):
        downloaded(client, stored, until=lambda: True)
    assert s3.count("get") == 1


def test_what_it_costs():
    assert cost_usd("us-east-1", 1000, 10**9) == pytest.approx(0.0904)
    assert cost_usd("ap-northeast-1", 0, 240 * 10**9) == pytest.approx(27.36)
