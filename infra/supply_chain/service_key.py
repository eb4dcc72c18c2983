"""The key by which a deployment's own services sign what they made: ``<home>/keys/service.pem``, never a person's."""

from __future__ import annotations

import contextlib
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from hydraopt.errors import RecordError
from infra.approvers import SERVICES, trust
from infra.signatures import generate_key, key_id, load_private_key, public_key_pem


def service_key(home: Path) -> Ed25519PrivateKey:
    """The key of this home's services, made on first use and trusted here; safe to race.

    Its public half lies in ``<home>/services`` and belongs, like the approvers' keys, on every machine that pulls.

    Raises:
        RecordError: If the key file cannot be used.
    """
    path = home / "keys" / "service.pem"
    if not path.exists():
        try:
            generate_key(path)
        except RecordError:
            if not path.exists():
                raise  # else another process was faster: its key is the one
    key = load_private_key(path)
    # Where the folder is given from outside and read-only, who gave it decides which services are trusted.
    with contextlib.suppress(OSError):
        trust(home, f"pipeline-{key_id(key)[:12]}", public_key_pem(key), SERVICES)
    return key
