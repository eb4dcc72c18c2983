"""How a bundle came to be: an in-toto statement (v1) with SLSA provenance (v1), signed in a DSSE envelope.

https://github.com/in-toto/attestation/blob/main/spec/v1/statement.md, https://slsa.dev/spec/v1.0/provenance
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from hydraopt.bundle.layout import MANIFEST_FILE, Manifest
from hydraopt.errors import RecordError
from hydraopt.json_text import parse_object
from infra.adapter_store import AdapterVersion
from infra.approvers import Trusted
from infra.records import canonical
from infra.signatures import key_id, open_signed, sign
from infra.supply_chain import code_version

PAYLOAD_TYPE = "application/vnd.in-toto+json"
STATEMENT = "https://in-toto.io/Statement/v1"
PREDICATE = "https://slsa.dev/provenance/v1"
BUILD_TYPE = "urn:hydraopt:merge-set:1"


def signed_provenance(
    name: str,
    bundle_id: str,
    manifest: Manifest,
    adapters: Mapping[str, AdapterVersion],
    *,
    fingerprint: str,
    key: Ed25519PrivateKey,
) -> bytes:
    """The signed statement: the same bundle, code and key always give the same bytes.

    Args:
        name: Bundle name.
        bundle_id: Bundle id.
        manifest: Its manifest.
        adapters: What the store records of each task's adapter, where it does.
        fingerprint: Of the adapter set under its recipe.
        key: The service's own.
    """
    statement = {
        "_type": STATEMENT,
        "subject": _subjects(bundle_id, manifest),
        "predicateType": PREDICATE,
        "predicate": {
            "buildDefinition": {
                "buildType": BUILD_TYPE,
                "externalParameters": _parameters(name, manifest, fingerprint),
                "internalParameters": {"solver": manifest.solver},
                "resolvedDependencies": [
                    *(
                        _adapter(task, digest, adapters.get(task))
                        for task, digest in manifest.adapters.items()
                    ),
                    {
                        "name": "hydraopt",
                        "uri": f"pkg:pypi/hydraopt@{code_version.version()}",
                        "digest": {"hydraoptSource": code_version.source_sha256()},
                    },
                ],
            },
            "runDetails": {
                "builder": {
                    "id": f"urn:hydraopt:service:{key_id(key)}",
                    "version": {"hydraopt": code_version.version()},
                },
                "metadata": {"invocationId": fingerprint},
            },
        },
    }
    return canonical(sign(statement, key, PAYLOAD_TYPE))


def open_provenance(
    envelope: bytes, name: str, bundle_id: str, manifest: Manifest, services: Trusted
) -> dict[str, Any]:
    """The statement, checked against the bundle it is about.

    Args:
        envelope: The DSSE envelope's bytes.
        name: Bundle name.
        bundle_id: Bundle id.
        manifest: The bundle's manifest, already checked against the id.
        services: Keys of the services that may have made it. Empty: this machine knows none, and what the approvers
            signed has to vouch for the envelope.

    Raises:
        RecordError: If it is damaged, about something else, or not signed by one of the services.
    """
    content = parse_object(envelope, f"the provenance of bundle {bundle_id} is damaged", RecordError)
    try:
        statement, _ = open_signed(content, services or None, PAYLOAD_TYPE)
    except RecordError as error:
        raise RecordError(
            f"the provenance of bundle {bundle_id}: {error}. If a worker with a home of its own merged it, copy the "
            "worker's services/*.pem into this home's"
        ) from None
    try:
        definition = statement["predicate"]["buildDefinition"]
        parameters = dict(definition["externalParameters"])
        found = {
            "subject": statement["subject"],
            "parameters": {**parameters, "fingerprint": ""},
            "adapters": _named_adapters(definition),
            "types": (statement["_type"], statement["predicateType"], definition["buildType"]),
        }
    except (KeyError, TypeError):
        raise RecordError(f"the provenance of bundle {bundle_id} is damaged: fields are missing") from None
    expected = {
        "subject": _subjects(bundle_id, manifest),
        "parameters": _parameters(name, manifest, ""),
        "adapters": manifest.adapters,
        "types": (STATEMENT, PREDICATE, BUILD_TYPE),
    }
    for what, value in expected.items():
        if found[what] != value:
            raise RecordError(
                f"the provenance of bundle {bundle_id} names another {what} than the bundle holds"
            )
    return statement


def makers(statement: Mapping[str, Any]) -> set[str]:
    """Who trained or brought in the adapters, as the statement says."""
    dependencies = statement["predicate"]["buildDefinition"]["resolvedDependencies"]
    return {str(who) for one in dependencies for who in one.get("annotations", {}).get("madeBy", [])}


def _subjects(bundle_id: str, manifest: Manifest) -> list[dict[str, Any]]:
    files = {path: entry.sha256 for path, entry in manifest.files().items()}
    return [
        {"name": path, "digest": {"sha256": sha}} for path, sha in {MANIFEST_FILE: bundle_id, **files}.items()
    ]


def _parameters(name: str, manifest: Manifest, fingerprint: str) -> dict[str, Any]:
    return {
        "bundle": name,
        "fingerprint": fingerprint,
        "recipe": manifest.recipe.model_dump(mode="json", exclude_none=True),
        "baseModel": manifest.base_model.model_dump(mode="json"),
        "adapters": manifest.adapters,
    }


def _adapter(task: str, digest: str, version: AdapterVersion | None) -> dict[str, Any]:
    """One adapter as a dependency; its own digest is over tensors and configuration, not over a file."""
    entry: dict[str, Any] = {
        "name": f"adapter/{task}",
        "uri": f"urn:hydraopt:adapter:{digest}",
        "digest": {"hydraoptAdapter": digest},
    }
    if version is not None:
        entry["annotations"] = {
            "files": {file: ref.sha256 for file, ref in sorted(version.files.items())},
            "evaluationRows": version.evaluation_rows.sha256 if version.evaluation_rows else None,
            "trainingKey": version.training_key,
            "madeBy": sorted(version.made_by),
        }
    return entry


def _named_adapters(definition: Mapping[str, Any]) -> dict[str, str]:
    return {
        str(one["name"]).removeprefix("adapter/"): one["digest"]["hydraoptAdapter"]
        for one in definition["resolvedDependencies"]
        if str(one["name"]).startswith("adapter/")
    }
