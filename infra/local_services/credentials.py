"""The local object store's own random keys, made once and kept where only their owner can read them."""

from __future__ import annotations

import json
import secrets
from pathlib import Path

from infra.atomic_files import write_atomically
from infra.settings import CREDENTIALS_FILE, read_credentials

_SIGNING_KEYS = ("volume_write", "volume_read", "filer_write", "filer_read")


def ensure_credentials(home: Path) -> dict[str, str]:
    """The keys of the store below ``home``, made at the first call.

    Returns:
        ``s3_access_key`` and ``s3_secret_key`` for clients, and the four keys with which the store's own parts
        sign requests to each other. Without those its file and volume servers would let in anybody.

    Raises:
        HydraoptError: If the file is damaged or others may read it.
    """
    path = home / CREDENTIALS_FILE
    if not path.exists():
        fresh = {"s3_access_key": "hydraopt-" + secrets.token_hex(8), "s3_secret_key": secrets.token_hex(32)}
        fresh |= {f"store_{name}_key": secrets.token_hex(32) for name in _SIGNING_KEYS}
        write_atomically(path, json.dumps(fresh, indent=2).encode(), mode=0o600)
    read_credentials(path)  # refuses a damaged or readable file
    content: dict[str, str] = json.loads(path.read_text(encoding="utf-8"))
    return content
