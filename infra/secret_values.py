"""The secrets of the production profile: which there are, how they are made, and the object store's roles.

Standard library only: ``make secrets`` runs this on a machine that has docker and nothing of ours installed.
"""

from __future__ import annotations

import json
import os
import secrets
import sys
from collections.abc import Mapping
from pathlib import Path

VARIABLE_PREFIX = "STACK_"
"""Of the variables in the env file. Not HYDRAOPT_: they are the stack's, and no setting of a client."""

STORE_SIGNING_KEYS = ("volume_write", "volume_read", "filer_write", "filer_read")
ROLES = ("publisher", "trainer", "reader")

_ONLY_PASSWORDS = (
    "postgres_password",
    "prefect_database_password",
    "mlflow_database_password",
    "mlflow_admin_password",
    "mlflow_secret_key",
    "prefect_password",
)
_PREFIX_OF_ROLE = {"publisher": "s3", "trainer": "trainer", "reader": "reader"}
_TRAINER_WRITES = ("adapters/*", "blobs/*", "self-test/*", "serving/*", "trainings/*")


def fresh_store_secrets() -> dict[str, str]:
    """The publisher's key, and the keys with which the store's own parts sign requests to each other.

    Without the latter its file and volume servers would let in anybody.
    """
    made = _fresh_key("publisher")
    return made | {f"store_{name}_key": secrets.token_hex(32) for name in STORE_SIGNING_KEYS}


def fresh_production_secrets() -> dict[str, str]:
    """All of them: what :func:`fresh_store_secrets` makes, the other roles' keys, and the servers' passwords."""
    made = fresh_store_secrets() | _fresh_key("trainer") | _fresh_key("reader")
    return made | {name: secrets.token_hex(24) for name in _ONLY_PASSWORDS}


def role_key(values: Mapping[str, str], role: str) -> tuple[str, str]:
    """Access key and secret key of a role of the object store."""
    prefix = _PREFIX_OF_ROLE[role]
    return values[f"{prefix}_access_key"], values[f"{prefix}_secret_key"]


def store_identities(values: Mapping[str, str], bucket: str) -> str:
    """SeaweedFS's file of identities, as JSON on one line: of the roles that ``values`` has a key for.

    The publisher reads and writes the bucket; the trainer reads it and writes adapters and their blobs, so it
    can neither publish nor decide; the reader, a device, only reads. Nobody is an administrator.
    """
    reads = [f"Read:{bucket}", f"List:{bucket}"]
    actions = {
        "publisher": [*reads, f"Write:{bucket}", f"Tagging:{bucket}"],
        "trainer": [*reads, *(f"Write:{bucket}/{prefix}" for prefix in _TRAINER_WRITES)],
        "reader": reads,
    }
    identities = []
    for role in ROLES:
        if f"{_PREFIX_OF_ROLE[role]}_access_key" not in values:
            continue
        access, secret = role_key(values, role)
        key = {"accessKey": access, "secretKey": secret}
        identities.append({"name": role, "credentials": [key], "actions": actions[role]})
    return json.dumps({"identities": identities})


def write_env_file(path: Path, bucket: str = "hydraopt") -> None:
    """Write fresh secrets for the containers, readable by their owner alone.

    Raises:
        FileExistsError: If there is such a file: other secrets would lock everybody out of the volumes.
    """
    values = fresh_production_secrets()
    lines = [f"{VARIABLE_PREFIX}{name.upper()}={value}" for name, value in sorted(values.items())]
    lines.append(f"{VARIABLE_PREFIX}STORE_IDENTITIES='{store_identities(values, bucket)}'")
    lines.append(f"COMPOSE_PROFILES={'gpu' if Path('/dev/nvidia0').exists() else 'no-gpu'}")
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write("\n".join(lines) + "\n")


def _fresh_key(role: str) -> dict[str, str]:
    prefix = _PREFIX_OF_ROLE[role]
    access = f"{'hydraopt' if role == 'publisher' else role}-{secrets.token_hex(8)}"
    return {f"{prefix}_access_key": access, f"{prefix}_secret_key": secrets.token_hex(32)}


def main() -> None:
    """``python -m infra.secret_values PATH``."""
    path = Path(sys.argv[1])
    try:
        write_env_file(path)
    except FileExistsError:
        sys.exit(f"{path} exists and is kept: the volumes were made with its secrets")
    sys.stdout.write(f"wrote {path} (mode 600)\n")


if __name__ == "__main__":
    main()
