"""MLflow's client, bounded in time and with errors that name the address.

The only module that imports mlflow, so that telemetry is off before it loads.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

from mlflow import MlflowClient
from mlflow.entities import Metric, Param
from mlflow.exceptions import MlflowException

from hydraopt.errors import ServiceError
from infra.listening import check_listens
from infra.settings import Settings

__all__ = [
    "ABSENT",
    "EXISTS",
    "Metric",
    "MlflowClient",
    "MlflowException",
    "Param",
    "client",
    "despite_races",
    "every",
    "told_plainly",
]

EXISTS = "RESOURCE_ALREADY_EXISTS"
ABSENT = "RESOURCE_DOES_NOT_EXIST"

_PAGE = 200
_MOST_SECONDS = 10.0
_RACES = 6
_Result = TypeVar("_Result")


def client(settings: Settings) -> MlflowClient:
    """A client of the deployment's MLflow that gives up within half a minute.

    Raises:
        ServiceError: If MLflow has no address, or nothing listens there.
    """
    address = settings.mlflow_uri
    if address is None:
        raise ServiceError("MLflow is not running: start it with `hydraopt up`, or set HYDRAOPT_MLFLOW_URI")
    # Together with one retry and the connection below: at most 26 s. The defaults add up to many minutes.
    os.environ.setdefault(
        "MLFLOW_HTTP_REQUEST_TIMEOUT", str(int(max(1, min(_MOST_SECONDS, settings.service_timeout_s))))
    )
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "0")
    os.environ.update(settings.passwords())  # MLflow's client reads them there, at every request
    check_listens("MLflow", address)
    return MlflowClient(tracking_uri=address, registry_uri=address)


@contextmanager
def told_plainly(settings: Settings, doing: str) -> Iterator[None]:
    """Turn what MLflow's client raises into a ServiceError.

    Args:
        settings: Name the server.
        doing: What was being done, such as "reading the serving adapters".
    """
    try:
        yield
    except MlflowException as error:
        reason = " ".join(str(error.message).partition("[SQL:")[0].split())[:400]
        raise ServiceError(
            f"MLflow at {settings.mlflow_uri} failed while {doing} ({error.error_code}: {reason}): "
            "what is in the object store stays; see its log, start it with `hydraopt up`, and run this again"
        ) from error


def despite_races(work: Callable[[], _Result]) -> _Result:
    """The result of ``work``, which is safe to repeat, repeated if another client was in the way.

    MLflow looks before it writes an alias or a tag; of two clients that look at once, one gets a database error.
    """
    for attempt in range(_RACES):
        try:
            return work()
        except MlflowException as error:
            if error.error_code != "BAD_REQUEST" or attempt == _RACES - 1:
                raise
            time.sleep(random.uniform(0.02, 0.2))  # noqa: S311 - so that the two do not meet again
    raise AssertionError("unreachable")


def every(fetch: Callable[[int, str | None], Any]) -> Iterator[Any]:
    """All items of a search, page by page.

    Args:
        fetch: Given the page size and the token of the page, returns one of MLflow's paged lists.
    """
    token: str | None = None
    while True:
        page = fetch(_PAGE, token)
        yield from page
        token = page.token
        if not token:
            return
