"""Whose word counts on this machine, by public key.

People's lie in ``<home>/approvers/<who>.pem``, those of the deployment's own services in
``<home>/services/<service>.pem``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from hydraopt.atomic_files import write_atomically
from hydraopt.errors import RecordError
from hydraopt.names import check_name
from infra.approval_policy import ANYBODY, ApprovalPolicy, ApprovalTerms
from infra.pipeline_spec import load_specs
from infra.signatures import key_id, load_public_key, public_key_pem

FOLDER = "approvers"
SERVICES = "services"

Trusted = Mapping[str, Ed25519PublicKey]
"""Public key by name of everybody whose signature counts."""


@dataclass(frozen=True)
class Approvers:
    """Whose word counts for one bundle on this machine, and under which policy."""

    keys: Trusted = field(default_factory=dict)
    services: Trusted = field(default_factory=dict)
    policy: ApprovalPolicy | None = None  # None: as the approvals themselves say, see infra.sign_off

    @property
    def people(self) -> dict[str, Ed25519PublicKey]:
        """Public key by name of those who may approve."""
        return (self.policy or ANYBODY).keyring(self.keys)

    @property
    def terms(self) -> ApprovalTerms:
        """What an approval given on this machine says it counts for."""
        return (self.policy or ANYBODY).terms(self.keys)


def approvers_of(home: Path, bundle: str) -> Approvers:
    """Whose word counts for a bundle here.

    Raises:
        RecordError: If a key file cannot be used.
        TaskFileError: If a bundle file cannot be used.
    """
    policy = next((spec.approval for spec in load_specs(home) if spec.name == bundle), None)
    return Approvers(trusted(home), trusted(home, SERVICES), policy)


def trust(home: Path, who: str, public_pem: str, folder: str = FOLDER) -> Path:
    """Let ``who`` approve, with this public key; repeating it changes nothing.

    Returns:
        The file that says so; remove it to end the trust.

    Raises:
        HydraoptError: If the name is not allowed.
        RecordError: If the key is unreadable, or ``who`` or the key is already in use otherwise.
    """
    check_name(who, "approver name")
    key = load_public_key(public_pem, f"the key of {who!r}")
    target = home / folder / f"{who}.pem"
    for other, known in trusted(home, folder).items():
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


def trusted(home: Path, folder: str = FOLDER) -> dict[str, Ed25519PublicKey]:
    """Public key by name of everybody whose approval counts here; empty if nobody's does.

    Raises:
        RecordError: If a file in the folder is no key: guessing who is meant would be unsafe.
    """
    if not (home / folder).is_dir():
        return {}
    keys = {}
    for path in sorted((home / folder).glob("*.pem")):
        try:
            keys[check_name(path.stem, "approver name")] = load_public_key(path.read_bytes(), str(path))
        except OSError as error:
            raise RecordError(f"{path} cannot be read: {error.strerror}") from error
    return keys
