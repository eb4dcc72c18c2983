"""The S3 client: how requests are signed, where they go, and when they give up."""

from __future__ import annotations

import ipaddress
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import boto3
from botocore.config import Config

from infra.settings import Settings

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

ATTEMPTS = 3
"""How often a request that broke off is sent."""


def make_client(settings: Settings, address: str) -> S3Client:
    """A client whose requests fail within ``settings.service_timeout_s`` and about three seconds of pauses."""
    timeout_s = settings.service_timeout_s / ATTEMPTS
    key = settings.s3_secret_key
    config = Config(
        signature_version="s3v4",  # presigned addresses default to the older, weaker one
        connect_timeout=min(5.0, timeout_s),
        read_timeout=timeout_s,
        retries={"total_max_attempts": ATTEMPTS, "mode": "standard"},
        request_checksum_calculation=settings.s3_checksums,
        response_checksum_validation=settings.s3_checksums,
        max_pool_connections=32,
        proxies={} if _is_loopback(address) else None,  # a proxy cannot reach our own machine
        s3={"addressing_style": "path"},  # "bucket.127.0.0.1" is no host name
    )
    session = boto3.session.Session(
        aws_access_key_id=settings.s3_access_key,
        aws_secret_access_key=key.get_secret_value() if key else None,
        region_name=settings.s3_region,
    )
    return session.client("s3", endpoint_url=address, config=config)


def _is_loopback(address: str) -> bool:
    host = urlsplit(address).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
