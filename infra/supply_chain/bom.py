"""What a bundle is made of, as a bill of materials in CycloneDX 1.6 (JSON) that other tools read."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Any

from cyclonedx.model import HashAlgorithm, HashType, Property
from cyclonedx.model.bom import Bom, BomMetaData
from cyclonedx.model.component import Component, ComponentType, Pedigree
from cyclonedx.model.tool import ToolRepository
from cyclonedx.output.json import JsonV1Dot6

from hydraopt.bundle.layout import Manifest
from hydraopt.errors import RecordError
from hydraopt.json_text import parse_object
from infra.adapter_store import AdapterVersion
from infra.supply_chain import code_version

_NAMESPACE = uuid.UUID(
    "5a1c6a0e-6f0b-5b1e-9d0a-3f6f6f1f8f6b"
)  # of our serial numbers; any fixed one would do


def bill_of_materials(
    name: str, bundle_id: str, manifest: Manifest, adapters: Mapping[str, AdapterVersion], *, merged_at: str
) -> bytes:
    """The bill: the bundle, its files, its adapters and their test rows, the base model, the code.

    Args:
        name: Bundle name.
        bundle_id: Bundle id.
        manifest: Its manifest.
        adapters: What the store records of each task's adapter, where it does.
        merged_at: When it was merged, ISO 8601.
    """
    base = _base_model(manifest)
    code = Component(
        name="hydraopt",
        type=ComponentType.LIBRARY,
        version=code_version.version(),
        bom_ref="hydraopt",
        properties=_properties({"sourceSha256": code_version.source_sha256()}),
    )
    bundle = Component(
        name=name,
        type=ComponentType.MACHINE_LEARNING_MODEL,
        version=bundle_id,
        bom_ref="bundle",
        hashes=[_sha256(bundle_id)],
        pedigree=Pedigree(ancestors=[base]),
        properties=_properties(
            {"recipe": json.dumps(manifest.recipe.model_dump(mode="json", exclude_none=True), sort_keys=True)}
        ),
    )
    parts = [_adapter(task, digest, base, adapters.get(task)) for task, digest in manifest.adapters.items()]
    rows = [_rows(task, version) for task, version in sorted(adapters.items()) if version.evaluation_rows]
    bom = Bom(
        serial_number=uuid.uuid5(_NAMESPACE, f"{name}/{bundle_id}"),
        metadata=BomMetaData(
            component=bundle,
            tools=ToolRepository(components=[code]),
            timestamp=datetime.fromisoformat(merged_at),
        ),
        components=[base, *parts, *rows, *_files(manifest)],
    )
    bom.register_dependency(bundle, [base, *parts])
    for part in parts:
        bom.register_dependency(part, [base])
    return _with_model_card(JsonV1Dot6(bom).output_as_string(), manifest)


def check_bill(bill: bytes, name: str, bundle_id: str, manifest: Manifest) -> None:
    """Refuse a bill that is not about exactly this bundle.

    Raises:
        RecordError: If it is damaged, or names other files, adapters or another base model.
    """
    content = parse_object(bill, f"the bill of materials of bundle {bundle_id} is damaged", RecordError)
    try:
        about = content["metadata"]["component"]
        found = {
            "format": (content["bomFormat"], content["specVersion"]),
            "bundle": (about["name"], about["version"], about["hashes"]),
            "files": {one["name"]: one["hashes"][0]["content"] for one in _of(content, "file:")},
            "adapters": {one["name"]: one["version"] for one in _of(content, "adapter:")},
            "base model": [(one["name"], one.get("version")) for one in _of(content, "base-model")],
        }
    except (KeyError, TypeError, IndexError, AttributeError):
        raise RecordError(f"the bill of materials of bundle {bundle_id} is damaged") from None
    expected = {
        "format": ("CycloneDX", "1.6"),
        "bundle": (name, bundle_id, [{"alg": "SHA-256", "content": bundle_id}]),
        "files": {path: entry.sha256 for path, entry in manifest.files().items()},
        "adapters": manifest.adapters,
        "base model": [(manifest.base_model.name, manifest.base_model.revision)],
    }
    for what, value in expected.items():
        if found[what] != value:
            raise RecordError(
                f"the bill of materials of bundle {bundle_id} names another {what} than it holds"
            )


def _base_model(manifest: Manifest) -> Component:
    return Component(
        name=manifest.base_model.name,
        type=ComponentType.MACHINE_LEARNING_MODEL,
        version=manifest.base_model.revision,
        bom_ref="base-model",
    )


def _adapter(task: str, digest: str, base: Component, version: AdapterVersion | None) -> Component:
    files = sorted(version.files.items()) if version else []
    facts = {f"file:{file}": ref.sha256 for file, ref in files}
    if version is not None and version.training_key is not None:
        facts["trainingKey"] = version.training_key
    return Component(
        name=task,
        type=ComponentType.MACHINE_LEARNING_MODEL,
        version=digest,
        bom_ref=f"adapter:{task}",
        pedigree=Pedigree(ancestors=[base]),
        properties=_properties(facts),
    )


def _rows(task: str, version: AdapterVersion) -> Component:
    sha256 = version.evaluation_rows.sha256 if version.evaluation_rows else ""
    return Component(
        name=f"{task} test rows", type=ComponentType.DATA, bom_ref=f"rows:{task}", hashes=[_sha256(sha256)]
    )


def _files(manifest: Manifest) -> list[Component]:
    return [
        Component(name=path, type=ComponentType.FILE, bom_ref=f"file:{path}", hashes=[_sha256(entry.sha256)])
        for path, entry in manifest.files().items()
    ]


def _with_model_card(text: str, manifest: Manifest) -> bytes:
    """Add what the library has no field for yet: the model card with the measured errors."""
    content = parse_object(text, "the bill of materials", RecordError)
    metrics = {"relative_error": manifest.relative_error, "storage_ratio": manifest.storage_ratio}
    metrics |= {
        f"relative_error/{task}": entry.relative_error for task, entry in sorted(manifest.tasks.items())
    }
    content["metadata"]["component"]["modelCard"] = {
        "modelParameters": {"task": "merge of task adapters", "modelArchitecture": manifest.base_model.name},
        "quantitativeAnalysis": {
            "performanceMetrics": [{"type": kind, "value": f"{value:.9g}"} for kind, value in metrics.items()]
        },
    }
    return json.dumps(content, sort_keys=True, separators=(",", ":")).encode()


def _properties(facts: Mapping[str, str]) -> list[Property]:
    return [Property(name=f"hydraopt:{key}", value=value) for key, value in facts.items()]


def _sha256(digest: str) -> HashType:
    return HashType(alg=HashAlgorithm.SHA_256, content=digest)


def _of(content: Mapping[str, Any], prefix: str) -> Iterable[dict[str, Any]]:
    """The components whose reference starts with ``prefix``."""
    return [one for one in content["components"] if one["bom-ref"].startswith(prefix)]
