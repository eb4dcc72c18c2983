"""Provenance and bill of materials of a bundle, against the specifications; no server needed."""

from __future__ import annotations

import base64
import importlib.resources
import json

import jsonschema
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from referencing import Registry, Resource

from hydraopt.bundle.layout import SCHEMA, BaseModelEntry, FileEntry, Manifest, TaskEntry
from hydraopt.errors import RecordError
from hydraopt.recipe import Recipe
from infra.adapter_store import AdapterVersion
from infra.blobs import BlobRef
from infra.signatures import signed_bytes
from infra.supply_chain.bom import bill_of_materials, check_bill
from infra.supply_chain.provenance import PAYLOAD_TYPE, makers, open_provenance, signed_provenance
from infra.supply_chain.service_key import service_key

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
SERVICES = {"pipeline": KEY.public_key()}


def manifest(**changes) -> Manifest:
    file = FileEntry(sha256="a" * 64, bytes=10)
    tasks = {
        task: TaskEntry(adapter=digit * 64, bytes=10_000, file=file, relative_error=0.125)
        for task, digit in (("mood", "1"), ("topic", "2"))
    }
    values = {
        "schema_version": SCHEMA,
        "base_model": BaseModelEntry(name="org/model", revision="abc"),
        "recipe": Recipe(budget=0.25),
        "solver": "1",
        "precisions": (16,),
        "relative_error": 0.1,
        "modules": (),
        "shared": file,
        "tasks": tasks,
    }
    return Manifest(**(values | changes))


def versions() -> dict[str, AdapterVersion]:
    ref = BlobRef(sha256="b" * 64, bytes=5)
    mood = AdapterVersion(
        task="mood",
        base_model="org/model",
        digest="1" * 64,
        files={"adapter_model.safetensors": ref},
        reference_bytes=5,
        evaluation_rows=ref,
        source="test",
        training_key="c" * 64,
        made_by=("ana",),
    )
    return {"mood": mood}


def provenance(**changes) -> bytes:
    one = manifest()
    values = {"name": "assist", "bundle_id": one.id, "manifest": one, "adapters": versions()} | changes
    return signed_provenance(*values.values(), fingerprint="f" * 64, key=KEY)


def bill() -> bytes:
    one = manifest()
    return bill_of_materials("assist", one.id, one, versions(), merged_at="2026-01-02T03:04:05+00:00")


def test_what_is_signed_is_the_specifications_encoding():
    """The example of https://github.com/secure-systems-lab/dsse/blob/master/protocol.md."""
    assert (
        signed_bytes("http://example.com/HelloWorld", b"hello world")
        == b"DSSEv1 29 http://example.com/HelloWorld 11 hello world"
    )


def test_the_envelope_holds_for_any_reader_of_dsse():
    """Verified here by hand, with the public key and the specification alone."""
    envelope = json.loads(provenance())
    assert envelope["payloadType"] == PAYLOAD_TYPE == "application/vnd.in-toto+json"
    body = base64.b64decode(envelope["payload"])
    kind = envelope["payloadType"].encode()
    signed = b"DSSEv1 " + b" ".join([str(len(kind)).encode(), kind, str(len(body)).encode(), body])
    KEY.public_key().verify(base64.b64decode(envelope["signatures"][0]["sig"]), signed)
    statement = json.loads(body)
    assert statement["_type"] == "https://in-toto.io/Statement/v1"
    assert statement["predicateType"] == "https://slsa.dev/provenance/v1"
    assert {"name": "manifest.json", "digest": {"sha256": manifest().id}} in statement["subject"]


def test_provenance_names_everything_the_bundle_came_from():
    one = manifest()
    statement = open_provenance(provenance(), "assist", one.id, one, SERVICES)
    definition = statement["predicate"]["buildDefinition"]
    parameters = definition["externalParameters"]
    assert parameters["adapters"] == {"mood": "1" * 64, "topic": "2" * 64}
    assert parameters["baseModel"] == {"name": "org/model", "revision": "abc"}
    assert parameters["recipe"]["budget"] == 0.25
    assert parameters["fingerprint"] == "f" * 64
    code = definition["resolvedDependencies"][-1]
    assert code["name"] == "hydraopt"
    assert len(code["digest"]["hydraoptSource"]) == 64
    assert makers(statement) == {"ana"}


def test_the_same_bundle_has_the_same_documents():
    assert provenance() == provenance()
    assert bill() == bill()


@pytest.mark.parametrize(
    "other",
    [
        {"base_model": BaseModelEntry(name="org/model", revision="other")},
        {"recipe": Recipe(budget=0.5)},
        {"tasks": {"mood": manifest().tasks["mood"]}},
        {"shared": FileEntry(sha256="d" * 64, bytes=10)},
    ],
    ids=lambda other: next(iter(other)),
)
def test_documents_of_another_bundle_are_refused(other):
    """Also with the right id written over the wrong content."""
    one = manifest(**other)
    for bundle_id in (one.id, manifest().id):
        with pytest.raises(RecordError, match="provenance"):
            open_provenance(provenance(), "assist", bundle_id, one, SERVICES)
    if "recipe" not in other:  # only the id tells it in a bill
        with pytest.raises(RecordError, match="bill of materials"):
            check_bill(bill(), "assist", manifest().id, one)
    with pytest.raises(RecordError, match="bill of materials"):
        check_bill(bill(), "assist", one.id, one)


def test_documents_count_for_one_name_only():
    one = manifest()
    with pytest.raises(RecordError, match="parameters"):
        open_provenance(provenance(), "other", one.id, one, SERVICES)
    with pytest.raises(RecordError, match="bundle"):
        check_bill(bill(), "other", one.id, one)


def test_a_strangers_provenance_is_refused():
    one = manifest()
    stranger = {"x": Ed25519PrivateKey.generate().public_key()}
    with pytest.raises(RecordError, match="not signed by anybody trusted"):
        open_provenance(provenance(), "assist", one.id, one, stranger)
    envelope = json.loads(provenance())
    body = base64.b64decode(envelope["payload"]).replace(b'"revision":"abc"', b'"revision":"abd"')
    envelope["payload"] = base64.b64encode(body).decode()
    with pytest.raises(RecordError, match="not signed by anybody trusted"):
        open_provenance(json.dumps(envelope).encode(), "assist", one.id, one, SERVICES)


@pytest.mark.parametrize("data", [b"", b"[]", b"{}", b"\xff", b'{"payload": 1}'])
def test_rubbish_is_refused(data):
    one = manifest()
    with pytest.raises(RecordError):
        open_provenance(data, "assist", one.id, one, SERVICES)
    with pytest.raises(RecordError):
        check_bill(data, "assist", one.id, one)


def cyclonedx_schema(name: str) -> dict:
    folder = importlib.resources.files("cyclonedx.schema") / "_res"
    return json.loads((folder / f"{name}.SNAPSHOT.schema.json").read_text())


def test_the_bill_is_valid_cyclonedx():
    """Against the 1.6 schema that the library carries: nothing is fetched."""
    schema = cyclonedx_schema("bom-1.6")
    others = ["spdx", "jsf-0.82", "cryptography-defs"]
    registry = Registry().with_resources(
        [
            (
                f"http://cyclonedx.org/schema/{name}.SNAPSHOT.schema.json",
                Resource.from_contents(cyclonedx_schema(name)),
            )
            for name in others
        ]
        + [
            (
                f"http://cyclonedx.org/schema/{name}.schema.json",
                Resource.from_contents(cyclonedx_schema(name)),
            )
            for name in others
        ]
    )
    validator = jsonschema.Draft7Validator(
        schema, registry=registry, format_checker=jsonschema.FormatChecker()
    )
    content = json.loads(bill())
    assert [error.message for error in validator.iter_errors(content)] == []
    assert list(validator.iter_errors(content | {"components": [{"name": "x"}]}))


def test_the_bill_names_parts_and_model_card():
    content = json.loads(bill())
    bundle = content["metadata"]["component"]
    assert bundle["type"] == "machine-learning-model"
    metrics = bundle["modelCard"]["quantitativeAnalysis"]["performanceMetrics"]
    assert {"type": "relative_error/mood", "value": "0.125"} in metrics
    refs = {one["bom-ref"]: one for one in content["components"]}
    assert refs["adapter:mood"]["version"] == "1" * 64
    assert refs["rows:mood"]["hashes"] == [{"alg": "SHA-256", "content": "b" * 64}]
    needs = {one["ref"]: set(one.get("dependsOn", [])) for one in content["dependencies"]}
    assert needs["bundle"] == {"base-model", "adapter:mood", "adapter:topic"}


def test_the_services_key_is_made_once_and_is_nobodys(tmp_path):
    first = service_key(tmp_path)
    assert service_key(tmp_path).private_bytes_raw() == first.private_bytes_raw()
    assert (tmp_path / "keys" / "service.pem").stat().st_mode & 0o777 == 0o600
    assert len(list((tmp_path / "services").glob("pipeline-*.pem"))) == 1
    assert not (tmp_path / "approvers").exists()
