"""Where the servers are and how to reach them, read once where a process starts and then passed down.

A value comes from, first found: an argument, a ``HYDRAOPT_*`` variable, the files that ``hydraopt up`` writes
below the home folder (``services.json``: addresses; ``credentials.json``, mode 600: keys), the default.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from hydraopt.errors import HydraoptError, RecordError, ServiceError
from hydraopt.json_text import parse_object
from infra.listening import CLUSTER_SCHEMES, WEB_SCHEMES

PREFIX = "HYDRAOPT_"
DEFAULT_HOME = Path(".hydraopt")
SERVICES_FILE = "services.json"
CREDENTIALS_FILE = "credentials.json"
ADMIN = "admin"
"""The user that our own MLflow and Prefect know."""

_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
_STORE_KEY = ("s3_access_key", "s3_secret_key")


def home_folder() -> Path:
    """The home folder, absolute, for what needs no other setting: one of them may be what is broken."""
    found = [value for name, value in os.environ.items() if name.upper() == f"{PREFIX}HOME" and value]
    return Path(found[0] if found else DEFAULT_HOME).expanduser().absolute()


def _without_password(address: str) -> str:
    """Return ``address``; it is printed in messages, so it may not carry a secret."""
    if "@" in urlsplit(address).netloc:
        raise ValueError(
            "an address must not hold a user or password; give them as MLFLOW_TRACKING_USERNAME and "
            "MLFLOW_TRACKING_PASSWORD, PREFECT_API_AUTH_STRING, or HYDRAOPT_S3_ACCESS_KEY and _SECRET_KEY"
        )
    return address.rstrip("/")


def _is_http(address: str) -> str:
    parts = urlsplit(address)
    if parts.scheme not in WEB_SCHEMES or not parts.hostname:
        raise ValueError("an address looks like http://127.0.0.1:8333")
    return address


def _is_cluster(address: str) -> str:
    parts = urlsplit(address)
    if parts.scheme not in CLUSTER_SCHEMES or not parts.hostname or not parts.port:
        raise ValueError("a cluster's address looks like dask://127.0.0.1:8786 or ray://127.0.0.1:10001")
    return address


Address = Annotated[str, AfterValidator(_without_password)]
ClusterAddress = Annotated[str, AfterValidator(_without_password), AfterValidator(_is_cluster)]
HttpAddress = Annotated[str, AfterValidator(_without_password), AfterValidator(_is_http)]


class Settings(BaseSettings):
    """One deployment: its home folder, its servers, its keys."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        env_ignore_empty=True,
        frozen=True,
        extra="forbid",
        hide_input_in_errors=True,  # else a failed load prints the key
    )

    home: Path = Field(DEFAULT_HOME, description="Folder of all local state; made absolute.")
    s3_endpoint: HttpAddress | None = Field(None, description="Address of the object store's S3 API.")
    s3_bucket: str = Field("hydraopt", description="Bucket that holds adapters, bundles and records.")
    s3_access_key: str | None = Field(
        None, min_length=1, description="Access key; None: boto3 looks for one."
    )
    s3_secret_key: SecretStr | None = Field(None, min_length=1, description="Secret key, never shown.")
    s3_region: str = Field("us-east-1", min_length=1, description="Region that requests are signed for.")
    s3_checksums: Literal["when_required", "when_supported"] = Field(
        "when_supported", description="boto3's default checksums; a few foreign servers need when_required."
    )
    mlflow_uri: Address | None = Field(None, description="MLflow tracking and registry address.")
    mlflow_username: str | None = Field(None, min_length=1, description="MLflow user; None: no password.")
    mlflow_password: SecretStr | None = Field(None, min_length=1, description="The user's, never shown.")
    prefect_api_url: HttpAddress | None = Field(None, description="Prefect API, ending in /api.")
    prefect_auth: SecretStr | None = Field(None, description="user:password for Prefect, never shown.")
    webhook_port: int | None = Field(
        None, ge=1, le=65535, description="Port on loopback for MLflow's webhooks; None: none are received."
    )
    webhook_secret: SecretStr | None = Field(
        None, min_length=16, description="Secret that MLflow signs them with, never shown."
    )
    merge_workers: ClusterAddress | None = Field(
        None,
        description="Dask's or Ray's address that merges fan out to; None: threads of the merging process.",
    )
    service_timeout_s: float = Field(
        20.0, gt=0, le=25, allow_inf_nan=False, description="Seconds one request may take; at most 25."
    )

    @classmethod
    def load(cls, home: Path | None = None) -> Self:
        """Settings of this process.

        Args:
            home: Home folder; None reads ``HYDRAOPT_HOME``, else ``.hydraopt`` below the current folder.

        Raises:
            HydraoptError: If a variable is unknown or its value is not allowed, or a file below the home
                folder cannot be read. No value is shown: it may be a key.
        """
        try:
            return cls() if home is None else cls(home=home)
        except ValidationError as error:
            raise HydraoptError(f"settings: {_reasons(error)}") from None

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Arguments, then variables, then the files below the home folder."""
        del dotenv_settings, file_secret_settings
        return init_settings, env_settings, _HomeFiles(settings_cls)

    @field_validator("home", mode="after")
    @classmethod
    def _absolute(cls, home: Path) -> Path:
        return home.expanduser().absolute()

    @field_validator("prefect_auth", mode="after")
    @classmethod
    def _user_and_password(cls, auth: SecretStr | None) -> SecretStr | None:
        if auth is not None and not all(auth.get_secret_value().partition(":")):
            raise ValueError("a user, a colon and a password are needed")
        return auth

    @field_validator("s3_bucket", mode="after")
    @classmethod
    def _bucket_name(cls, bucket: str) -> str:
        if not _BUCKET.fullmatch(bucket) or ".." in bucket:
            raise ValueError(
                "a bucket name has 3 to 63 of a-z, 0-9, '.', '-' and starts with a letter or digit"
            )
        return bucket

    @model_validator(mode="after")
    def _whole_key(self) -> Self:
        if (self.s3_access_key is None) != (self.s3_secret_key is None):
            raise ValueError("give HYDRAOPT_S3_ACCESS_KEY and HYDRAOPT_S3_SECRET_KEY together, or neither")
        if (self.webhook_port is None) != (self.webhook_secret is None):
            raise ValueError("give HYDRAOPT_WEBHOOK_PORT and HYDRAOPT_WEBHOOK_SECRET together, or neither")
        if (self.mlflow_username is None) != (self.mlflow_password is None):
            raise ValueError(
                "give HYDRAOPT_MLFLOW_USERNAME and HYDRAOPT_MLFLOW_PASSWORD together, or neither"
            )
        return self

    @model_validator(mode="after")
    def _no_unknown_variables(self) -> Self:
        # extra="forbid" does not look at the environment: a misspelt name would be silent.
        known = {PREFIX + name.upper() for name in type(self).model_fields}
        unknown = {
            name for name in os.environ if name.upper().startswith(PREFIX) and name.upper() not in known
        }
        if unknown:
            raise ValueError(f"unknown variables {sorted(unknown)}; known are {sorted(known)}")
        return self

    def require_services(self) -> Self:
        """Return these settings if they name all three servers.

        Raises:
            ServiceError: If one has no address: it was never started, or is configured elsewhere.
        """
        addresses = {
            "object store": (self.s3_endpoint, "S3_ENDPOINT"),
            "MLflow": (self.mlflow_uri, "MLFLOW_URI"),
            "Prefect": (self.prefect_api_url, "PREFECT_API_URL"),
        }
        missing = {name: PREFIX + key for name, (address, key) in addresses.items() if address is None}
        if missing:
            raise ServiceError(
                f"{', '.join(missing)} not running (home {self.home}): start with `hydraopt up`, "
                f"or set {', '.join(missing.values())}"
            )
        return self

    def environment(self) -> dict[str, str]:
        """Variables to add for a child process that works with these servers.

        They make Prefect and MLflow inside the child agree with these settings and keep telemetry off. No
        keys: the child reads them where this process did, below the home folder or from inherited variables.
        """
        variables = {
            f"{PREFIX}HOME": str(self.home),
            "PREFECT_HOME": str(self.home / "prefect"),
            "PREFECT_SERVER_ALLOW_EPHEMERAL_MODE": "false",
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",  # seconds; tells from afar that a run's process lives
            "DO_NOT_TRACK": "1",
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
        }
        if self.prefect_api_url is not None:
            variables["PREFECT_API_URL"] = self.prefect_api_url
        if self.mlflow_uri is not None:
            variables["MLFLOW_TRACKING_URI"] = self.mlflow_uri
            variables["MLFLOW_REGISTRY_URI"] = self.mlflow_uri
        return variables

    def passwords(self) -> dict[str, str]:
        """Variables that let Prefect's and MLflow's clients in this process log in; empty where none is asked."""
        variables = {}
        if self.mlflow_username is not None and self.mlflow_password is not None:
            variables["MLFLOW_TRACKING_USERNAME"] = self.mlflow_username
            variables["MLFLOW_TRACKING_PASSWORD"] = self.mlflow_password.get_secret_value()
        if self.prefect_auth is not None:
            variables["PREFECT_API_AUTH_STRING"] = self.prefect_auth.get_secret_value()
        return variables


class _HomeFiles(PydanticBaseSettingsSource):
    """Addresses of the running local services and the local store's key."""

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        del field
        return None, field_name, False  # the interface asks for it; __call__ does the work

    def __call__(self) -> dict[str, Any]:
        # The sources before this one were read already; the first that names a home wins.
        home = Path(self.current_state.get("home") or DEFAULT_HOME).expanduser()
        found: dict[str, Any] = {}
        running = _running_addresses(home / SERVICES_FILE)
        secrets = read_secrets(home / CREDENTIALS_FILE) if running else {}
        passwords = _passwords(secrets)
        if "mlflow" in running:
            found["mlflow_uri"] = running["mlflow"]
            if not self._given("mlflow_uri", "mlflow_username", "mlflow_password"):
                found |= {name: value for name, value in passwords.items() if name.startswith("mlflow")}
        if "prefect" in running:
            found["prefect_api_url"] = running["prefect"] + "/api"
            if not self._given("prefect_api_url", "prefect_auth"):
                found |= {name: value for name, value in passwords.items() if name.startswith("prefect")}
        # The local key is for the local store alone: never signed with for an address given elsewhere.
        if "store" in running and not self._given("s3_endpoint", *_STORE_KEY):
            found["s3_endpoint"] = running["store"]
            found |= {name: secrets[name] for name in _STORE_KEY if name in secrets}
        return found

    def _given(self, *names: str) -> bool:
        """Whether an argument or a variable sets one of ``names``: then ours do not belong there."""
        return any(self.current_state.get(name) is not None for name in names)


def _running_addresses(path: Path) -> dict[str, str]:
    """Address by service of those that ``up`` started and ``down`` has not stopped."""
    services = _read_object(path).get("services", {})
    try:
        return {name: str(entry["address"]) for name, entry in services.items() if entry.get("pid")}
    except (AttributeError, KeyError, TypeError):
        raise _damaged(path) from None


def read_secrets(path: Path) -> dict[str, str]:
    """Every key and password of the home's own services; empty if there is no such file.

    Raises:
        HydraoptError: If the file is damaged, or others than its owner may read it.
    """
    content = _read_object(path)
    if content and path.stat().st_mode & 0o077:
        raise HydraoptError(f"{path} holds keys and can be read by others: run `chmod 600 {path}`")
    if content and not content.keys() >= set(_STORE_KEY):
        raise _damaged(path)
    return {name: str(value) for name, value in content.items()}


def _passwords(secrets: Mapping[str, str]) -> dict[str, str]:
    """What our own MLflow and Prefect ask for, as the settings' fields; empty in the local profile."""
    found: dict[str, str] = {}
    if "mlflow_admin_password" in secrets:
        found |= {"mlflow_username": ADMIN, "mlflow_password": secrets["mlflow_admin_password"]}
    if "prefect_password" in secrets:
        found["prefect_auth"] = f"{ADMIN}:{secrets['prefect_password']}"
    return found


def _read_object(path: Path) -> dict[str, Any]:
    """The JSON object in ``path``; empty if there is no such file."""
    try:
        return parse_object(path.read_bytes(), "", RecordError)
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise HydraoptError(f"{path} cannot be read: {error.strerror}") from None
    except RecordError:
        raise _damaged(path) from None


def _damaged(path: Path) -> HydraoptError:
    return HydraoptError(f"{path} is damaged: move it away, then run `hydraopt up`")


def _reasons(error: ValidationError) -> str:
    """What pydantic found wrong, one clause per variable, without any value."""
    clauses = []
    for problem in error.errors(include_input=False, include_url=False, include_context=False):
        message = problem["msg"].removeprefix("Value error, ")
        where = "".join(PREFIX + str(part).upper() + ": " for part in problem["loc"][:1])
        clauses.append(where + message)
    return "; ".join(clauses)
