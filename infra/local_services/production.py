"""The production profile: what each service runs, the same on one machine without docker and in containers.

``hydraopt up --profile production`` starts exactly this, and a test holds docker-compose.yml to it. What differs
between the two stands in a :class:`Place`. No password is part of a command, where every user could read it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePath

from infra.local_services.pools import EXECUTOR_MODULE, service_of
from infra.local_services.ports import HOST
from infra.local_services.seaweedfs import store_command, store_variables
from infra.settings import ADMIN, Settings

PROBE_MODULE = "infra.local_services.probe"
_WORKER_MODULE = "flows.worker"


@dataclass(frozen=True)
class Place:
    """Where the services run: programs, folders, addresses, secrets."""

    python: str
    weed: str
    postgres: str
    pg_isready: str
    bind: str
    """Interface that servers listen on."""
    hosts: Mapping[str, str]
    """By service, the name under which the others reach it."""
    ports: Mapping[str, Mapping[str, int]]
    home: PurePath
    """Of the workers."""
    folders: Mapping[str, PurePath]
    """Data folder by server."""
    identities: PurePath
    """File of the store's identities."""
    store_tls: PurePath
    """Folder of the certificate that the store's parts show each other."""
    mlflow_auth: PurePath
    sockets: str
    """Folder of PostgreSQL's Unix sockets; empty: none."""
    secrets: Mapping[str, str] = field(repr=False)

    def address(self, name: str, port: str = "http") -> str:
        """The web address of a server, as the others use it."""
        return f"http://{self.hosts[name]}:{self.ports[name][port]}"

    def names(self, name: str) -> list[str]:
        """Every ``host:port`` that a client may call the server."""
        hosts = dict.fromkeys((self.hosts[name], HOST, "localhost"))
        return [f"{host}:{self.ports[name]['http']}" for host in hosts]


@dataclass(frozen=True)
class Blueprint:
    """How one service runs at a place."""

    command: tuple[str, ...]
    variables: Mapping[str, str] = field(repr=False)
    probe: tuple[str, ...]
    """Command beside the service that succeeds if it works."""


def postgres(place: Place) -> Blueprint:
    """PostgreSQL, by password only. A failed statement is not logged: it may hold one."""
    port = place.ports["postgres"]["sql"]
    options = {
        "listen_addresses": place.bind,
        "port": str(port),
        "unix_socket_directories": place.sockets,
        "password_encryption": "scram-sha-256",
        "log_min_error_statement": "panic",
    }
    command = [place.postgres]
    for name, value in options.items():
        command += ["-c", f"{name}={value}"]
    probe = (place.pg_isready, "--quiet", f"--host={HOST}", f"--port={port}", "--username=postgres")
    return Blueprint(tuple(command), {"PGDATA": str(place.folders["postgres"])}, probe)


def database_variables(place: Place) -> dict[str, str]:
    """What ``databases.sql`` reads: the passwords that Prefect and MLflow log in with."""
    return {
        f"{name.upper()}_DATABASE_PASSWORD": place.secrets[f"{name}_database_password"]
        for name in ("prefect", "mlflow")
    }


def store(place: Place, bucket: str) -> Blueprint:
    """SeaweedFS in one process, with a key per role."""
    ports, data = place.ports["store"], place.folders["store"]
    command = store_command(place.weed, data, place.identities, ports, place.bind)
    variables = store_variables(place.secrets, bucket, data, place.store_tls)
    probe = ("wget", "-q", "-O", "/dev/null", f"http://{HOST}:{ports['s3']}/healthz")
    return Blueprint(command, variables, probe)


def mlflow(place: Place) -> Blueprint:
    """MLflow on PostgreSQL behind its own login."""
    port = place.ports["mlflow"]["http"]
    command = (
        place.python,
        "-m",
        "mlflow",
        "server",
        f"--host={place.bind}",
        f"--port={port}",
        "--workers=1",
        "--app-name=basic-auth",
        f"--artifacts-destination={place.folders['mlflow']}",
        "--serve-artifacts",
        f"--allowed-hosts={','.join(place.names('mlflow'))}",
        f"--cors-allowed-origins={','.join(f'http://{name}' for name in place.names('mlflow'))}",
    )
    variables = {
        **_database_login(place, "mlflow"),
        "MLFLOW_BACKEND_STORE_URI": "postgresql+psycopg2:///mlflow",
        "MLFLOW_AUTH_CONFIG_PATH": str(place.mlflow_auth),
        "MLFLOW_AUTH_ADMIN_PASSWORD": place.secrets["mlflow_admin_password"],
        "MLFLOW_FLASK_SERVER_SECRET_KEY": place.secrets["mlflow_secret_key"],
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # seven more processes, for features we do not use
        "DO_NOT_TRACK": "1",
    }
    return Blueprint(command, variables, _probe(place, "mlflow", f"http://{HOST}:{port}"))


def prefect(place: Place) -> Blueprint:
    """Prefect's server on PostgreSQL, its background services included, behind one password."""
    port = place.ports["prefect"]["http"]
    command = (place.python, "-m", "prefect", "server", "start", f"--host={place.bind}", f"--port={port}")
    login = f"{ADMIN}:{place.secrets['prefect_password']}"
    variables = {
        **_database_login(place, "prefect"),
        "PREFECT_API_DATABASE_CONNECTION_URL": "postgresql+asyncpg:///prefect",
        "PREFECT_HOME": str(place.folders["prefect"]),
        "PREFECT_API_URL": f"http://{HOST}:{port}/api",
        "PREFECT_SERVER_API_AUTH_STRING": login,
        "PREFECT_API_AUTH_STRING": login,
        "PREFECT_SERVER_ALLOW_EPHEMERAL_MODE": "false",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
        # In memory, the default, a killed server would leave the one merge slot taken for ever.
        "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
        # The default lets any web page that the user visits start flows here.
        "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": ",".join(f"http://{name}" for name in place.names("prefect")),
        # The default is inside the installed package, where two servers would overwrite each other's files.
        "PREFECT_UI_STATIC_DIRECTORY": str(place.folders["prefect"] / "ui"),
    }
    return Blueprint(command, variables, _probe(place, "prefect", f"http://{HOST}:{port}"))


def worker(place: Place, settings: Settings, pool: str) -> Blueprint:
    """The executor of a work pool. It is given all it needs; ``settings`` name the servers and hold the keys."""
    keys = {
        "S3_SECRET_KEY": settings.s3_secret_key,
        "MLFLOW_PASSWORD": settings.mlflow_password,
        "PREFECT_AUTH": settings.prefect_auth,
    }
    plain = {
        "S3_ENDPOINT": settings.s3_endpoint,
        "S3_BUCKET": settings.s3_bucket,
        "S3_ACCESS_KEY": settings.s3_access_key,
        "MLFLOW_URI": settings.mlflow_uri,
        "MLFLOW_USERNAME": settings.mlflow_username,
        "PREFECT_API_URL": settings.prefect_api_url,
    }
    if pool == "cpu" and settings.webhook_port is not None:
        plain["WEBHOOK_PORT"] = str(settings.webhook_port)
        keys["WEBHOOK_SECRET"] = settings.webhook_secret
    given = plain | {name: key.get_secret_value() for name, key in keys.items() if key is not None}
    variables = {
        **settings.environment(),
        **settings.passwords(),
        **{f"HYDRAOPT_{name}": value for name, value in given.items() if value is not None},
        "PREFECT_WORKER_QUERY_SECONDS": "2",
    }
    address = (settings.prefect_api_url or "").removesuffix("/api")
    command = (place.python, "-m", EXECUTOR_MODULE, _WORKER_MODULE, pool)
    return Blueprint(command, variables, _probe(place, service_of(pool), address))


def _database_login(place: Place, name: str) -> dict[str, str]:
    """Where PostgreSQL is, for both of its drivers: no password in an address that somebody may log."""
    return {
        "PGHOST": place.hosts["postgres"],
        "PGPORT": str(place.ports["postgres"]["sql"]),
        "PGUSER": name,
        "PGPASSWORD": place.secrets[f"{name}_database_password"],
    }


def _probe(place: Place, name: str, address: str) -> tuple[str, ...]:
    return (place.python, "-m", PROBE_MODULE, name, address)
