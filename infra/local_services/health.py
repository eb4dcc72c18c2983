"""Whether a service does real work: each check makes it read what it stores, as a client would."""

from __future__ import annotations

import base64
import json
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from datetime import datetime
from typing import Any

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from hydraopt.errors import ServiceError
from hydraopt.json_text import parse_json

_TIMEOUT_S = 3.0
_SILENCE_S = 90.0
"""An executor asks Prefect for work every few seconds; longer silence means that it hangs."""


class UnhealthyError(Exception):
    """Why a service is not healthy; never leaves this package."""


def check_store(address: str, bucket: str, access_key: str, secret_key: str) -> None:
    """Ask for the bucket with our own key: a store that is not ours refuses.

    Raises:
        UnhealthyError: If that fails.
    """
    client = boto3.client(
        "s3",
        endpoint_url=address,
        aws_access_key_id=access_key,
        aws_secret_access_key=secret_key,
        region_name="us-east-1",
        config=Config(
            signature_version="s3v4",
            s3={"addressing_style": "path"},
            connect_timeout=_TIMEOUT_S,
            read_timeout=_TIMEOUT_S,
            retries={"total_max_attempts": 1},
            proxies={},
        ),
    )
    try:
        client.head_bucket(Bucket=bucket)
        client.list_objects_v2(Bucket=bucket, MaxKeys=1)
    except ClientError as error:
        code = error.response.get("Error", {}).get("Code", "?")
        raise UnhealthyError(f"it answers {code} to a request for bucket {bucket!r}") from None
    except BotoCoreError as error:
        raise UnhealthyError(type(error).__name__) from None
    finally:
        client.close()


def check_postgres(probe: Sequence[str]) -> None:
    """Whether it takes connections, by PostgreSQL's own ``pg_isready``.

    Raises:
        UnhealthyError: If it does not, or not within three seconds.
    """
    try:
        asked = subprocess.run(
            probe, check=False, timeout=_TIMEOUT_S, capture_output=True, stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UnhealthyError(type(error).__name__) from None
    if asked.returncode != 0:
        raise UnhealthyError("it takes no connections yet")


def check_mlflow(address: str, login: str | None = None) -> None:
    """Ask whether it is up, and for one registered model.

    Args:
        address: Of the server.
        login: ``user:password``, if it asks for one.

    Raises:
        UnhealthyError: If either fails.
    """
    _request(f"{address}/health")
    answer = _json(f"{address}/api/2.0/mlflow/registered-models/search?max_results=1", login=login)
    if not isinstance(answer, dict):
        raise UnhealthyError("it answers, but not like MLflow")


def check_prefect(address: str, login: str | None = None) -> None:
    """Ask whether it is up, and for the number of flows.

    Args:
        address: Of the server.
        login: ``user:password``, if it asks for one.

    Raises:
        UnhealthyError: If either fails.
    """
    if _json(f"{address}/api/health") is not True:
        raise UnhealthyError("it answers, but not like Prefect")
    _json(f"{address}/api/flows/count", {}, login)


def check_runner(prefect_address: str, started: float) -> None:
    """Ask Prefect whether the runner that began at ``started`` (seconds since 1970) has asked for work lately.

    A Prefect elsewhere that wants a password does not tell us; then a living process has to do.

    Raises:
        UnhealthyError: If not, or Prefect does not answer.
    """
    try:
        deployments = _json(f"{prefect_address}/api/deployments/filter", {"limit": 200})
    except UnhealthyError as error:
        if _status(error) in {401, 403}:
            return
        raise
    polls = [entry["last_polled"] for entry in deployments if entry.get("last_polled")]
    latest = max((datetime.fromisoformat(poll).timestamp() for poll in polls), default=0.0)
    if latest < max(started, time.time() - _SILENCE_S):
        raise UnhealthyError("it has not asked Prefect for work yet")


def check_worker(prefect_address: str, name: str, pool: str, started: float, login: str | None) -> None:
    """Ask Prefect whether the worker that began at ``started`` (seconds since 1970) has reported lately.

    Raises:
        UnhealthyError: If not, or Prefect does not answer.
    """
    workers = _json(f"{prefect_address}/api/work_pools/{pool}/workers/filter", {}, login)
    beats = [worker["last_heartbeat_time"] for worker in workers if worker["name"] == name]
    latest = max((datetime.fromisoformat(beat).timestamp() for beat in beats if beat), default=0.0)
    if latest < max(started, time.time() - _SILENCE_S):
        raise UnhealthyError("it has not reported to Prefect yet")


def check_elsewhere(address: str) -> None:
    """Whether a server that is not ours to start answers at all; a refusal is an answer.

    Raises:
        UnhealthyError: If nothing answers, or with a server error.
    """
    try:
        _request(address)
    except UnhealthyError as error:
        if not 300 <= _status(error) < 500:
            raise


def _status(error: UnhealthyError) -> int:
    """The HTTP status behind the error; 0 if nothing answered."""
    return error.__cause__.code if isinstance(error.__cause__, urllib.error.HTTPError) else 0


def _json(url: str, body: Any = None, login: str | None = None) -> Any:
    try:
        return parse_json(_request(url, body, login), url, ServiceError)
    except ServiceError as error:
        raise UnhealthyError(str(error)) from None


def _request(url: str, body: Any = None, login: str | None = None) -> bytes:
    """The answer to a GET, or to a POST of ``body`` as JSON; never through a proxy."""
    request = urllib.request.Request(url)  # noqa: S310  # an address of ours or from checked settings
    if body is not None:
        request.data = json.dumps(body).encode()
        request.add_header("Content-Type", "application/json")
    if login is not None:
        request.add_header("Authorization", f"Basic {base64.b64encode(login.encode()).decode()}")
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=_TIMEOUT_S) as response:
            content: bytes = response.read()
    except urllib.error.HTTPError as error:
        error.close()
        raise UnhealthyError(f"{url} answers {error.code}") from error
    except OSError as error:
        raise UnhealthyError(f"{url}: {getattr(error, 'reason', error)}") from error
    return content
