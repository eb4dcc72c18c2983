"""Connect this process to the deployment's servers. Must run before Prefect is imported."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from hydraopt.errors import ServiceError
from infra.listening import check_listens
from infra.settings import Settings

_DELIVERY_S = 10.0
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
    os.environ.update(settings.environment() | settings.passwords())
    if not verbose:
        for name, value in _QUIET.items():
            os.environ.setdefault(name, value)
    return settings


@contextlib.contextmanager
def running_flows(settings: Settings) -> Iterator[None]:
    """Run flows inside. When it is left, Prefect has what they logged, and its server may be stopped.

    Raises:
        ServiceError: If the connection to Prefect broke, or its server failed, instead of what its client raised.
    """
    import httpx

    try:
        yield
    except httpx.TransportError as error:
        raise ServiceError(
            f"Prefect at {settings.prefect_api_url} stopped answering ({type(error).__name__}): see its log, "
            "start it with `hydraopt up` and run this again; what was done is kept"
        ) from error
    except httpx.HTTPStatusError as error:
        if not error.response.is_server_error:
            raise
        raise ServiceError(
            f"Prefect at {settings.prefect_api_url} failed (HTTP {error.response.status_code}): see its log and "
            "`hydraopt status`, start what does not work with `hydraopt up` and run this again; what was done is kept"
        ) from error
    finally:
        _deliver()


def _deliver() -> None:
    """Have Prefect's clients send the log lines and events they hold back for seconds, to send many at once.

    Left to the end of the process they would find no server, and try for more than a minute.
    """
    from prefect.events.worker import EventsWorker
    from prefect.logging.handlers import APILogWorker

    for worker in (APILogWorker, EventsWorker):
        worker.drain_all(timeout=_DELIVERY_S)
