"""The certificate by which the object store's own parts know each other.

Behind its S3 gateway SeaweedFS speaks gRPC, and whoever may speak it may delete every object, whatever the keys
say. So each part shows this certificate and asks for it. It is made anew before each start, and the authority's
key is forgotten.
"""

from __future__ import annotations

import ipaddress
import sys
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path, PurePath

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from hydraopt.atomic_files import write_atomically

FOLDER = "store-tls"

_AUTHORITY, _CERTIFICATE, _KEY = "authority.crt", "store.crt", "store.key"
_PARTS = ("MASTER", "VOLUME", "FILER", "S3", "ADMIN", "WORKER", "CLIENT")
_VALID = timedelta(days=3650)
_CLOCK_SKEW = timedelta(days=1)


def certificate_variables(folder: PurePath) -> Mapping[str, str]:
    """What tells SeaweedFS where its certificate is."""
    variables = {"WEED_GRPC_CA": str(folder / _AUTHORITY)}
    for part in _PARTS:
        variables[f"WEED_GRPC_{part}_CERT"] = str(folder / _CERTIFICATE)
        variables[f"WEED_GRPC_{part}_KEY"] = str(folder / _KEY)
    return variables


def write_certificate(folder: Path) -> None:
    """Write an authority's certificate, one that it signed for 127.0.0.1, and that one's key (mode 600)."""
    folder.mkdir(exist_ok=True, mode=0o700)
    authority_key, key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    name = _named("hydraopt store authority")
    authority = (
        _builder(name, name, authority_key.public_key())
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(authority_key, hashes.SHA256())
    )
    usages = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
    loopback = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
    certificate = (
        _builder(_named("hydraopt store"), name, key.public_key())
        .add_extension(x509.SubjectAlternativeName([loopback, x509.DNSName("localhost")]), critical=False)
        .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
        .sign(authority_key, hashes.SHA256())
    )
    secret = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    write_atomically(folder / _AUTHORITY, authority.public_bytes(serialization.Encoding.PEM))
    write_atomically(folder / _CERTIFICATE, certificate.public_bytes(serialization.Encoding.PEM))
    write_atomically(folder / _KEY, secret, mode=0o600)


def _named(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _CLOCK_SKEW)
        .not_valid_after(now + _VALID)
    )


if __name__ == "__main__":
    write_certificate(Path(sys.argv[1]))
