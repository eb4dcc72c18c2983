"""Connect this process to the deployment's servers. Must run before Prefect is imported."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from hydraopt.errors import ServiceError
from infra.listening import check_listens
from infra.settings import Settings

_QUIET = {
    "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}


def connect(*, verbose: bool = False) -> Settings:
    """Settings of a deployment whose three servers answer, with Prefect and MLflow pointed at them.

    Prefect keeps every log line of a flow run on its server; the console shows them only with ``verbose``.

    Raises:
        ServiceError: If a server has no address or does not accept a connection within five seconds.
    """
    settings = Settings.load().require_services()
    for name, address in (
        ("object store", settings.s3_endpoint),
        ("MLflow", settings.mlflow_uri),
        ("Prefect", settings.prefect_api_url),
    ):
        check_listens(name, str(address))
    os.environ.update(settings.environment())
    if not verbose:
        for name, value in _QUIET.items():
            os.environ.setdefault(name, value)
    return settings


@contextlib.contextmanager
def prefect_may_fail(settings: Settings) -> Iterator[None]:
    """Turn a connection to Prefect that broke while a flow ran into an error that says so.

    Raises:
        ServiceError: Instead of what Prefect's client raised.
    """
    import httpx

    try:
        yield
    except httpx.TransportError as error:
        raise ServiceError(
            f"Prefect at {settings.prefect_api_url} stopped answering ({type(error).__name__}): see its log, "
            "start it with `hydraopt up` and run this again; what was done is kept"
        ) from error
