"""Whose approval counts on this machine: one public key per person in ``<home>/approvers/<who>.pem``."""

from __future__ import annotations

from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from hydraopt.errors import RecordError
from hydraopt.names import check_name
from infra.atomic_files import write_atomically
from infra.signatures import key_id, load_public_key, public_key_pem

FOLDER = "approvers"


def trust(home: Path, who: str, public_pem: str) -> Path:
    """Let ``who`` approve, with this public key; repeating it changes nothing.

    Returns:
        The file that says so; remove it to end the trust.

    Raises:
        HydraoptError: If the name is not allowed.
        RecordError: If the key is unreadable, or ``who`` or the key is already in use otherwise.
    """
    check_name(who, "approver name")
    key = load_public_key(public_pem, f"the key of {who!r}")
    target = home / FOLDER / f"{who}.pem"
    for other, known in trusted(home).items():
        if other == who and key_id(known) == key_id(key):
            return target
        if other == who:
            raise RecordError(
                f"{who!r} is trusted with another key: remove {target} first if it was replaced"
            )
        if key_id(known) == key_id(key):
            # One key under two names could stand for two people.
            raise RecordError(
                f"this key is already the key of {other!r}: every approver needs one of their own"
            )
    write_atomically(target, public_key_pem(key).encode())
    return target


def trusted(home: Path) -> dict[str, Ed25519PublicKey]:
    """Public key by name of everybody whose approval counts here; empty if nobody's does.

    Raises:
        RecordError: If a file in the folder is no key: guessing who is meant would be unsafe.
    """
    folder = home / FOLDER
    if not folder.is_dir():
        return {}
    keys = {}
    for path in sorted(folder.glob("*.pem")):
        try:
            keys[check_name(path.stem, "approver name")] = load_public_key(path.read_bytes(), str(path))
        except OSError as error:
            raise RecordError(f"{path} cannot be read: {error.strerror}") from error
    return keys
