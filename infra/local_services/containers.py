"""The production profile in containers: its :class:`Place`.

A test holds docker-compose.yml and the Kubernetes example to it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from pydantic import SecretStr

from infra.local_services.production import Place
from infra.local_services.profiles import PREFERRED_PORTS
from infra.secret_values import VARIABLE_PREFIX, fresh_production_secrets
from infra.settings import ADMIN, Settings

HOME = PurePosixPath("/var/lib/hydraopt")


def placeholder(name: str) -> str:
    """What stands for a secret in docker-compose.yml: its variable, and what to do if it is missing."""
    return f"${{{VARIABLE_PREFIX}{name.upper()}:?run make secrets}}"


def place() -> Place:
    """One container per service, each reached by the service's name, secrets from the env file."""
    return Place(
        python="python",
        weed="weed",
        postgres="postgres",
        pg_isready="pg_isready",
        bind="0.0.0.0",  # noqa: S104 - of the container; compose publishes what it publishes on loopback
        hosts={name: name for name in ("postgres", "store", "mlflow", "prefect")},
        ports=PREFERRED_PORTS,
        home=HOME,
        folders={
            "postgres": PurePosixPath("/var/lib/postgresql/data"),
            "store": PurePosixPath("/data"),
            "mlflow": PurePosixPath("/var/lib/mlflow"),
            "prefect": PurePosixPath("/var/lib/prefect"),
        },
        identities=PurePosixPath("/run/store/identities.json"),
        store_tls=PurePosixPath("/var/lib/store-tls"),
        mlflow_auth=PurePosixPath("/etc/hydraopt/mlflow_auth.ini"),
        sockets="/var/run/postgresql",
        secrets={name: placeholder(name) for name in fresh_production_secrets()},
    )


def worker_settings(place: Place, secrets: Mapping[str, str]) -> Settings:
    """What a worker in a container is told. Not validated: secrets are placeholders here."""
    return Settings.model_construct(
        home=Path(place.home),
        s3_endpoint=place.address("store", "s3"),
        s3_bucket="hydraopt",
        s3_access_key=secrets["s3_access_key"],
        s3_secret_key=SecretStr(secrets["s3_secret_key"]),
        mlflow_uri=place.address("mlflow"),
        mlflow_username=ADMIN,
        mlflow_password=SecretStr(secrets["mlflow_admin_password"]),
        prefect_api_url=place.address("prefect") + "/api",
        prefect_auth=SecretStr(f"{ADMIN}:{secrets['prefect_password']}"),
    )
