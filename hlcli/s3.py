"""The one S3 client: listing and downloads from buckets whose requester pays.

Every call says that the requester pays, every download names the version that was listed, and what arrives is
checked before anybody reads it.
"""

from __future__ import annotations

import hashlib
import time
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING

from hlcli.exitcodes import ConfigError, TemporaryError
from hlcli.logs import log, one_line

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from datetime import datetime

    from hlcli.settings import Settings

MAX_OBJECTS = 1_000_000
MAX_PAGES = 10_000
CHUNK = 1 << 20
CONNECT_TIMEOUT = 10
READ_TIMEOUT = 60
# boto3 repeats a request that failed; one whose body broke off we repeat ourselves.
ATTEMPTS = 3
PAUSE_S = 1.0
_DENIED = {"AccessDenied", "403", "Forbidden", "AllAccessDisabled", "AccountProblem"}
_KEYS = {"InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken", "RequestExpired"}
_GONE = {"NoSuchKey", "404", "NotFound"}
# What a person must mend before any call can succeed.
_NO_BUCKET = {"NoSuchBucket", "PermanentRedirect", "AuthorizationHeaderMalformed", "InvalidBucketName"}


class ObjectError(TemporaryError):
    """An object could not be fetched; others may be."""


class GoneError(ObjectError):
    """The object was deleted after it was listed."""


class ReplacedError(ObjectError):
    """The object was replaced after it was listed."""


class DeniedError(ObjectError):
    """The object may not be read by us: asking again would only be paid for again."""


@dataclass(frozen=True, slots=True)
class StoredObject:
    """One version of an object, or of a file of this machine."""

    bucket: str
    key: str
    etag: str
    size: int
    """Bytes."""
    last_modified: datetime


class S3:
    """A client for one region. Raises ConfigError where credentials are missing or wrong."""

    def __init__(self, settings: Settings, region: str, *, pause_s: float = PAUSE_S) -> None:
        import boto3
        from botocore.config import Config
        from botocore.exceptions import BotoCoreError

        self._payer = settings.aws_request_payer
        self._pause_s = pause_s
        try:
            session = boto3.Session()
            if session.get_credentials() is None:
                raise ConfigError(
                    "no AWS credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
                )
            self._client = session.client(
                "s3",
                region_name=region,
                endpoint_url=settings.aws_endpoint_url_s3,
                config=Config(
                    connect_timeout=CONNECT_TIMEOUT,
                    read_timeout=READ_TIMEOUT,
                    retries={"mode": "standard", "total_max_attempts": ATTEMPTS},
                    # A bucket's name in the host's would not resolve on an endpoint of one's own.
                    s3={"addressing_style": "path" if settings.aws_endpoint_url_s3 else "auto"},
                ),
            )
        except BotoCoreError as error:  # a profile that does not exist, a broken config file
            raise ConfigError(f"AWS: {one_line(error)}") from error

    def close(self) -> None:
        self._client.close()

    def list(self, bucket: str, prefix: str) -> Iterator[StoredObject]:
        """All objects below a prefix, in the order of their keys.

        Raises ConfigError when the bucket cannot be read by us or there are over a million, TemporaryError.
        """
        from botocore.exceptions import PaginationError

        pages = self._client.get_paginator("list_objects_v2").paginate(
            Bucket=bucket, Prefix=prefix, RequestPayer=self._payer
        )
        number = 0
        with _translated(f"s3://{bucket}/{prefix}", ConfigError):
            try:
                for turn, page in enumerate(pages):
                    if turn >= MAX_PAGES:
                        raise TemporaryError(
                            f"s3://{bucket}/{prefix}: the listing has over {MAX_PAGES:,} pages"
                        )
                    for found in page.get("Contents", ()):
                        number += 1
                        if number > MAX_OBJECTS:
                            raise ConfigError(
                                f"s3://{bucket}/{prefix} holds over {MAX_OBJECTS:,} objects: name a longer prefix"
                            )
                        if not found["Key"].endswith("/"):  # what some consoles make for an empty folder
                            yield StoredObject(
                                bucket,
                                found["Key"],
                                found["ETag"].strip('"'),
                                found["Size"],
                                found["LastModified"],
                            )
            except PaginationError as error:  # the server sends the same page again and again
                raise TemporaryError(f"s3://{bucket}/{prefix}: {one_line(error)}") from error

    def head(self, bucket: str, key: str) -> StoredObject:
        """The object as it is now. Raises GoneError, ObjectError, ConfigError."""
        with _translated(f"s3://{bucket}/{key}", ObjectError):
            found = self._client.head_object(Bucket=bucket, Key=key, RequestPayer=self._payer)
            return StoredObject(
                bucket, key, found["ETag"].strip('"'), found["ContentLength"], found["LastModified"]
            )

    def download(
        self, stored: StoredObject, file: IO[bytes], *, until: Callable[[], bool] | None = None
    ) -> None:
        """Write the listed version of an object to a file, whole or not at all; broken bodies are asked for again.

        `until` is asked between chunks and ends the download by ObjectError when it says yes.

        Raises ReplacedError, GoneError, ObjectError, ConfigError.
        """
        where = f"s3://{stored.bucket}/{stored.key}"
        for attempt in range(1, ATTEMPTS + 1):
            with _translated(where, ObjectError):
                answer = self._client.get_object(
                    Bucket=stored.bucket, Key=stored.key, IfMatch=f'"{stored.etag}"', RequestPayer=self._payer
                )
            try:
                # Not as its own context manager, which would give the bare stream and check no checksum.
                with _translated(where, ObjectError), closing(answer["Body"]) as body:
                    digest = _copy(stored, body, file, until)
                    # The ETag of an object uploaded in one piece and not encrypted with a key of its owner's is its MD5.
                    plain = answer.get("ServerSideEncryption") in {None, "AES256"} and len(stored.etag) == 32
                    if plain and digest != stored.etag:
                        raise ObjectError(f"{where}: what came is not what its ETag says")
            except ObjectError as error:
                if attempt == ATTEMPTS or (until is not None and until()):
                    raise
                log.info("attempt %d: %s", attempt, one_line(error))
                time.sleep(self._pause_s * attempt)
            else:
                return


def _copy(stored: StoredObject, body: IO[bytes], file: IO[bytes], until: Callable[[], bool] | None) -> str:
    """Write a body to a file; returns its MD5. Raises ObjectError when it is of another size than was listed."""
    where = f"s3://{stored.bucket}/{stored.key}"
    digest, size = hashlib.md5(usedforsecurity=False), 0
    file.seek(0)
    file.truncate()
    while chunk := body.read(CHUNK):
        size += len(chunk)
        if size > stored.size:
            break
        if until is not None and until():
            raise ObjectError(f"{where}: ended by the deadline")
        digest.update(chunk)
        file.write(chunk)
    file.flush()
    if size != stored.size:
        raise ObjectError(f"{where}: {size:,} bytes came of {stored.size:,} that were listed")
    return digest.hexdigest()


@contextmanager
def _translated(where: str, denied: type[ConfigError | ObjectError]) -> Iterator[None]:
    """boto3's exceptions as ours; `denied` is what a refusal means."""
    import urllib3.exceptions
    from botocore import exceptions

    try:
        yield
    except exceptions.ClientError as error:
        told = f"{where}: {one_line(error)}"
        code = str(error.response.get("Error", {}).get("Code", ""))
        status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
        if code in _KEYS or code in _NO_BUCKET:
            raise ConfigError(told) from error
        if code in _DENIED or status == 403:
            raise (DeniedError(told) if denied is ObjectError else ConfigError(told)) from error
        if code in _GONE or status == 404:
            raise GoneError(told) from error
        if code == "PreconditionFailed" or status == 412:
            raise ReplacedError(told) from error
        raise ObjectError(told) from error
    except exceptions.NoCredentialsError as error:
        raise ConfigError("no AWS credentials") from error
    except (exceptions.BotoCoreError, urllib3.exceptions.HTTPError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None and not isinstance(error, ConnectionError):
            raise TemporaryError(f"{where}: cannot write the download: {one_line(error)}") from error
        raise ObjectError(f"{where}: {one_line(error)}") from error


# What it costs to be the requester, in USD, as Amazon published it in 2026: bytes to the Internet and 1,000 GETs.
# Within the region of the bucket the bytes are free.
USD_PER_GB = {"ap-northeast-1": 0.114}
USD_PER_GB_ELSEWHERE = 0.09
USD_PER_1000_GETS = 0.0004


def cost_usd(region: str, objects: int, size: int) -> float:
    """About what downloading costs the requester."""
    return size / 1e9 * USD_PER_GB.get(region, USD_PER_GB_ELSEWHERE) + objects / 1000 * USD_PER_1000_GETS
