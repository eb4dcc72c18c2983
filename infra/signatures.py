"""Signed statements: ed25519 in a DSSE envelope (https://github.com/secure-systems-lab/dsse).

The signature covers the payload's type and its exact bytes, so nothing depends on how JSON is written.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hydraopt.atomic_files import sync
from hydraopt.errors import RecordError
from hydraopt.json_text import parse_object

PAYLOAD_TYPE = "application/vnd.hydraopt.record+json"


class Signature(BaseModel):
    """One signature of an envelope."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    keyid: str
    sig: str


class Envelope(BaseModel):
    """A DSSE envelope as it lies in the store."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    payloadType: str  # noqa: N815 - DSSE's spelling
    payload: str
    signatures: list[Signature] = Field(min_length=1, max_length=16)


def generate_key(path: Path) -> str:
    """Make a new private key in ``path`` (PEM, PKCS #8, mode 600) and return its public key (PEM).

    Raises:
        RecordError: If ``path`` exists; a key is never overwritten.
    """
    key = Ed25519PrivateKey.generate()
    content = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as handle:
            handle.write(content)
            handle.flush()
            os.fsync(handle.fileno())
        os.link(temporary, path)  # unlike a rename, this fails if path exists
    except FileExistsError:
        raise RecordError(f"{path} exists and a key is never overwritten: choose another file") from None
    finally:
        temporary.unlink()
    sync(path.parent)
    return public_key_pem(key)


def load_private_key(path: Path) -> Ed25519PrivateKey:
    """Read a private key made by :func:`generate_key`, or by ``openssl genpkey -algorithm ed25519``.

    Raises:
        RecordError: If the file cannot be read, anybody on this machine may read it, or it holds no such key.
    """
    try:
        mode, content = path.stat().st_mode, path.read_bytes()
    except OSError as error:
        raise RecordError(f"the key file {path} cannot be read: {error.strerror}") from error
    try:
        key = load_pem_private_key(content, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        # Not chained: the cause may quote the file.
        raise RecordError(
            f"{path} holds no private key in PEM form without a passphrase: make one with `hydraopt keygen`"
        ) from None
    if not isinstance(key, Ed25519PrivateKey):
        raise RecordError(f"{path} holds a key of another kind than ed25519: make one with `hydraopt keygen`")
    if mode & 0o007:
        raise RecordError(f"the key file {path} can be used by everybody on this machine: chmod 600 {path}")
    return key


def load_public_key(pem: str | bytes, source: str) -> Ed25519PublicKey:
    """Read a public key.

    Args:
        pem: The key's PEM text.
        source: Where it came from, for messages.

    Raises:
        RecordError: If it is no ed25519 public key.
    """
    try:
        key = load_pem_public_key(pem.encode() if isinstance(pem, str) else pem)
    except (ValueError, UnsupportedAlgorithm):
        raise RecordError(f"{source} holds no public key in PEM form") from None
    if not isinstance(key, Ed25519PublicKey):
        raise RecordError(f"{source} holds a public key of another kind than ed25519")
    return key


def public_key_pem(key: Ed25519PrivateKey | Ed25519PublicKey) -> str:
    """The public key as PEM text, to be handed to those who should trust it."""
    return _public(key).public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()


def key_id(key: Ed25519PrivateKey | Ed25519PublicKey) -> str:
    """SHA-256 (hex) of the public key's DER form: a hint in an envelope, and equal for equal keys."""
    der = _public(key).public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(der).hexdigest()


def sign(
    payload: Mapping[str, Any], key: Ed25519PrivateKey, payload_type: str = PAYLOAD_TYPE
) -> dict[str, Any]:
    """Return a DSSE envelope that holds ``payload`` as JSON, signed with ``key``."""
    body = json.dumps(dict(payload), sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
    signature = key.sign(signed_bytes(payload_type, body))
    return {
        "payloadType": payload_type,
        "payload": base64.b64encode(body).decode(),
        "signatures": [{"keyid": key_id(key), "sig": base64.b64encode(signature).decode()}],
    }


def open_signed(
    envelope: object, trusted: Mapping[str, Ed25519PublicKey] | None, payload_type: str = PAYLOAD_TYPE
) -> tuple[dict[str, Any], str]:
    """The payload of an envelope and the name of the trusted key that signed it.

    Every trusted key is tried: the envelope's own ``keyid`` is a hint from a stranger.

    Args:
        envelope: The envelope's JSON value.
        trusted: Public key by name. None: the envelope is vouched for otherwise, and the name is empty.
        payload_type: What it must hold.

    Raises:
        RecordError: If this is no envelope, or no trusted key signed exactly these bytes.
    """
    try:
        parsed = Envelope.model_validate(envelope)
        body = base64.b64decode(parsed.payload, validate=True)
        signatures = [base64.b64decode(one.sig, validate=True) for one in parsed.signatures]
    except (ValidationError, binascii.Error, ValueError):
        raise RecordError("a signed record is damaged: it is no DSSE envelope") from None
    if parsed.payloadType != payload_type:
        raise RecordError(f"a signed record is of type {parsed.payloadType!r}, expected {payload_type!r}")
    if trusted is None:
        return _payload(body), ""
    signed = signed_bytes(parsed.payloadType, body)
    for who, key in trusted.items():
        if any(_holds(key, signature, signed) for signature in signatures):
            return _payload(body), who
    known = ", ".join(sorted(trusted)) or "nobody"
    raise RecordError(
        f"a record is not signed by anybody trusted here ({known}): its signer's key is not trusted, or no more, or it "
        "was changed after signing"
    )


def _holds(key: Ed25519PublicKey, signature: bytes, signed: bytes) -> bool:
    try:
        key.verify(signature, signed)
    except InvalidSignature:
        return False
    return True


def _payload(body: bytes) -> dict[str, Any]:
    return parse_object(body, "what a signed record holds", RecordError)


def signed_bytes(payload_type: str, body: bytes) -> bytes:
    """DSSE's pre-authentication encoding: lengths first, so that no two messages encode alike."""
    kind = payload_type.encode()
    return b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(body), body)


def _public(key: Ed25519PrivateKey | Ed25519PublicKey) -> Ed25519PublicKey:
    return key.public_key() if isinstance(key, Ed25519PrivateKey) else key
