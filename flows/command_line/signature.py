"""The part of ``hydraopt verify`` that looks at what lies beside a bundle; it needs the pipeline extra, no server."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flows.command_line.output import Output
from hydraopt.bundle.layout import Manifest
from hydraopt.errors import RecordError
from infra.approvers import Approvers, approvers_of
from infra.settings import Settings
from infra.signatures import load_public_key
from infra.supply_chain.release_file import ReleaseFile


def check_signature(
    output: Output, manifest: Manifest, documents: Path, keys: tuple[Path, ...]
) -> dict[str, Any] | None:
    """Check approvals, provenance and bill of materials; None, and a note, if nobody is trusted here.

    Args:
        output: Where to say so.
        manifest: The bundle's.
        documents: What lies beside it.
        keys: Public keys to trust instead of those of this home.

    Raises:
        RefusedError: If too few approved.
        RecordError: If anything was changed, or there are keys to check with and nothing to check.
    """
    if not documents.is_file():
        raise RecordError(
            f"{documents} is missing, and with it every signature: pull the bundle, or leave --key out"
        )
    release = ReleaseFile.load(documents)
    approvers = _given(keys) if keys else approvers_of(Settings.load().home, release.name)
    if not approvers.people:
        output.note("its signature was NOT checked: nobody is trusted here, give --key NAME.pem")
        return None
    sign_off = release.verify(manifest, approvers)
    output.show(
        f"approved by {', '.join(sign_off.by)}; provenance and bill of materials are those they signed"
        + ("" if approvers.services else " (the service's own key is not known here)")
    )
    return {
        "approved_by": list(sign_off.by),
        "policy_sha256": sign_off.policy_sha256,
        "provenance_signature_checked": bool(approvers.services),
        "documents": documents,
    }


def _given(keys: tuple[Path, ...]) -> Approvers:
    """People and services by the names of their key files."""
    named = {path.stem: load_public_key(path.read_bytes(), str(path)) for path in keys}
    services = {name: key for name, key in named.items() if name.startswith("pipeline-")}
    return Approvers({name: key for name, key in named.items() if name not in services}, services)
