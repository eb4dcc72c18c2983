"""Where an adapter made elsewhere comes from: a folder or an S3 prefix."""

from __future__ import annotations

import hashlib
from http import HTTPStatus
from pathlib import Path
from urllib.parse import urlsplit

import boto3
from botocore.config import Config
from botocore.exceptions import ClientError

from hydraopt.adapters.peft_folder import CONFIG_FILE, TENSOR_FILE
from hydraopt.errors import AdapterFormatError
from infra.settings import Settings
from infra.store_faults import status_of, told_plainly
from tasks.verb import verb


@verb(task_run_name="fetch {source}")
def fetch_source(settings: Settings, source: str) -> Path:
    """A local folder with the adapter at ``source``: the folder itself, or its files from S3.

    Only the two files an adapter consists of are read, so a pickle beside them never arrives.

    Raises:
        AdapterFormatError: If the folder or one of the objects does not exist.
        ServiceError: If the object store cannot be read.
    """
    if not source.startswith("s3://"):
        folder = Path(source)
        if not folder.is_dir():
            raise AdapterFormatError(f"{source} is not a folder: give a PEFT folder or s3://bucket/prefix")
        return folder
    parts = urlsplit(source)
    if not parts.netloc or not parts.path.strip("/"):
        raise AdapterFormatError(f"{source!r} is not like s3://bucket/prefix")
    folder = settings.home / "work" / "sources" / hashlib.sha256(source.encode()).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    for name in (CONFIG_FILE, TENSOR_FILE):
        _download(settings, parts.netloc, f"{parts.path.strip('/')}/{name}", folder / name)
    return folder


def _download(settings: Settings, bucket: str, key: str, target: Path) -> None:
    """Fetch one object; boto3 moves it into place when it is whole."""
    secret = settings.s3_secret_key
    address = str(settings.s3_endpoint)
    with told_plainly(address, bucket, f"reading {key}"):
        client = boto3.client(
            "s3",
            endpoint_url=address,
            aws_access_key_id=settings.s3_access_key,
            aws_secret_access_key=secret.get_secret_value() if secret else None,
            region_name=settings.s3_region,
            config=Config(signature_version="s3v4", connect_timeout=5, s3={"addressing_style": "path"}),
        )
        try:
            client.download_file(bucket, key, str(target))
        except ClientError as error:
            if status_of(error) != HTTPStatus.NOT_FOUND:
                raise
            raise AdapterFormatError(
                f"s3://{bucket}/{key} does not exist: an adapter is {CONFIG_FILE} and {TENSOR_FILE}"
            ) from None
