"""A file of variables per role of the object store: what a trainer's or a device's machine needs, and no more."""

from __future__ import annotations

from hydraopt.atomic_files import write_atomically
from infra.local_services.credentials import ensure_credentials
from infra.secret_values import ROLES, role_key
from infra.settings import PREFIX, Settings

FOLDER = "roles"


def write_role_files(settings: Settings) -> None:
    """Write ``roles/ROLE.env`` below the home, mode 600. To be read by a shell: ``set -a; . roles/reader.env``."""
    values = ensure_credentials(settings.home, production=True)
    for role in ROLES:
        access, secret = role_key(values, role)
        variables = {
            "S3_ENDPOINT": settings.s3_endpoint,
            "S3_BUCKET": settings.s3_bucket,
            "S3_ACCESS_KEY": access,
            "S3_SECRET_KEY": secret,
        }
        lines = [f"{PREFIX}{name}={value}\n" for name, value in variables.items()]
        write_atomically(settings.home / FOLDER / f"{role}.env", "".join(lines).encode(), mode=0o600)
