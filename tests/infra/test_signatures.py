"""Signed envelopes and key files."""

from __future__ import annotations

import base64
import copy
import json

import pytest
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1
from cryptography.hazmat.primitives.asymmetric.ec import generate_private_key as generate_ec_key
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from hydraopt.errors import RecordError
from infra.signatures import (
    generate_key,
    load_private_key,
    load_public_key,
    open_signed,
    public_key_pem,
    sign,
)

PAYLOAD = {"bundle_id": "ab" * 32, "decision": "approved", "as": "alice", "ümlaut": "✓"}


@pytest.fixture
def key():
    return Ed25519PrivateKey.generate()


def test_what_was_signed_comes_back_with_the_signer(key):
    stranger = Ed25519PrivateKey.generate().public_key()
    payload, who = open_signed(sign(PAYLOAD, key), {"bob": stranger, "alice": key.public_key()})
    assert (payload, who) == (PAYLOAD, "alice")


def test_signature_is_over_dsse_pre_authentication_encoding(key):
    """Checked against the encoding as the specification words it, written out independently."""
    envelope = sign({"a": 1}, key)
    body, kind = b'{"a":1}', envelope["payloadType"]
    message = f"DSSEv1 {len(kind)} {kind} {len(body)} ".encode() + body
    key.public_key().verify(base64.b64decode(envelope["signatures"][0]["sig"]), message)


@pytest.mark.parametrize("field", ["payload", "payloadType", "sig"])
def test_every_changed_byte_is_noticed(key, field):
    envelope = sign(PAYLOAD, key)
    changed = copy.deepcopy(envelope)
    if field == "payload":
        body = base64.b64decode(envelope["payload"]).replace(b"approved", b"rejected")
        changed["payload"] = base64.b64encode(body).decode()
    elif field == "payloadType":
        changed["payloadType"] = "application/json"
    else:
        changed["signatures"][0]["sig"] = base64.b64encode(bytes(64)).decode()
    with pytest.raises(RecordError):
        open_signed(changed, {"alice": key.public_key()})


def test_key_id_alone_convinces_nobody(key):
    """The envelope may claim any key; only a signature that verifies counts."""
    forged = sign(PAYLOAD, Ed25519PrivateKey.generate())
    forged["signatures"][0]["keyid"] = sign(PAYLOAD, key)["signatures"][0]["keyid"]
    with pytest.raises(RecordError, match="not signed by anybody trusted here \\(alice\\)"):
        open_signed(forged, {"alice": key.public_key()})


@pytest.mark.parametrize(
    "envelope",
    [
        None,
        [],
        {},
        {"payloadType": 3},
        {"payloadType": "x", "payload": "!", "signatures": [{"keyid": "", "sig": ""}]},
    ],
)
def test_what_is_no_envelope_is_a_record_error(key, envelope):
    with pytest.raises(RecordError):
        open_signed(envelope, {"alice": key.public_key()})


def test_nobody_trusted_means_nothing_verifies(key):
    with pytest.raises(RecordError, match="nobody"):
        open_signed(sign(PAYLOAD, key), {})


def test_key_file_is_private_and_never_overwritten(tmp_path):
    path = tmp_path / "keys" / "alice.pem"
    public = generate_key(path)
    before = path.read_bytes()
    assert path.stat().st_mode & 0o777 == 0o600
    assert public_key_pem(load_private_key(path)) == public
    assert public_key_pem(load_public_key(public, "alice")) == public
    with pytest.raises(RecordError, match="exists"):
        generate_key(path)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_key_file_that_others_can_read_is_refused(tmp_path):
    path = tmp_path / "alice.pem"
    generate_key(path)
    path.chmod(0o644)
    with pytest.raises(RecordError, match="chmod 600"):
        load_private_key(path)


@pytest.mark.parametrize("kind", ["missing", "rubbish", "public", "elliptic"])
def test_what_is_no_private_key_is_told_without_its_content(tmp_path, kind):
    path = tmp_path / "key.pem"
    secret = "hidden-content"
    if kind == "rubbish":
        path.write_text(secret)
    elif kind == "public":
        path.write_text(generate_key(tmp_path / "other.pem"))
    elif kind == "elliptic":
        path.write_bytes(
            generate_ec_key(SECP256R1()).private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        )
    if path.exists():
        path.chmod(0o644)  # nor is somebody told to hide what is no secret
    with pytest.raises(RecordError, match=r"^(?!.*chmod)") as caught:
        load_private_key(path)
    assert secret not in str(caught.value)


def test_envelope_is_plain_json(key):
    envelope = json.loads(json.dumps(sign(PAYLOAD, key)))
    assert open_signed(envelope, {"alice": key.public_key()})[0] == PAYLOAD
