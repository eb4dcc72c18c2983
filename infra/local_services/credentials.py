"""The home's own random keys and passwords, made once and kept where only their owner can read them."""

from __future__ import annotations

import json
from pathlib import Path

from hydraopt.atomic_files import write_atomically
from infra.secret_values import fresh_production_secrets, fresh_store_secrets
from infra.settings import CREDENTIALS_FILE, read_secrets


def ensure_credentials(home: Path, *, production: bool = False) -> dict[str, str]:
    """The secrets of the home's services, made at the first call.

    Args:
        home: Folder of all state.
        production: Whether the servers' passwords and the other roles' keys are needed, too.

    Raises:
        HydraoptError: If the file is damaged or others may read it.
    """
    path = home / CREDENTIALS_FILE
    if not path.exists():
        fresh = fresh_production_secrets() if production else fresh_store_secrets()
        write_atomically(path, json.dumps(fresh, indent=2).encode(), mode=0o600)
    return read_secrets(path)
