"""Which set of adapters a bundle should hold."""

import pytest

pytest.importorskip("prefect")

from hydraopt.errors import AdapterMismatchError, RecordError
from infra.adapter_store import AdapterVersion
from infra.pipeline_spec import BundleSpec
from tasks import desired
from tasks.desired import DesiredSet, find_desired


def version(task: str, digest: str, revision: str | None = None) -> AdapterVersion:
    return AdapterVersion(
        task=task,
        base_model="org/model",
        revision=revision,
        digest=digest * 64,
        files={},
        reference_bytes=1,
        source="a test",
    )


@pytest.fixture
def wanted(monkeypatch):
    """``wanted(spec, serving versions)``: the desired set, with the versions read from here."""

    def make(spec: BundleSpec, versions: list[AdapterVersion]) -> DesiredSet:
        by_task = {one.task: one for one in versions}
        monkeypatch.setattr(
            desired,
            "load_adapter_versions",
            lambda _store, _base, digests: {one: by_task[one] for one in digests},
        )
        return desired._desired(None, spec, {task: one.digest for task, one in by_task.items()})

    return make


def spec(**changes) -> BundleSpec:
    return BundleSpec.model_validate({"name": "b", "base_model": "org/model", **changes})


def test_every_serving_adapter_belongs_to_a_bundle_that_names_none(wanted):
    found = wanted(spec(), [version("a", "1"), version("b", "2")])
    assert set(found.versions) == {"a", "b"}
    assert found.fingerprint is not None


def test_a_bundle_waits_for_the_tasks_it_names(wanted):
    found = wanted(spec(tasks=["a", "b", "c"]), [version("a", "1"), version("z", "2")])
    assert found.waiting_for == ("b", "c")
    assert found.fingerprint is None


def test_no_adapter_makes_no_set(wanted):
    assert wanted(spec(), []).fingerprint is None


def test_adapter_and_recipe_change_the_fingerprint_and_gates_do_not(wanted):
    versions = [version("a", "1")]
    prints = {
        "same": wanted(spec(), versions).fingerprint,
        "gates": wanted(spec(gates={"max_mean_drop_percent": 3}), versions).fingerprint,
        "adapter": wanted(spec(), [version("a", "3")]).fingerprint,
        "recipe": wanted(spec(recipe={"budget": 0.3}), versions).fingerprint,
    }
    assert prints["same"] == prints["gates"]
    assert len(set(prints.values())) == 3


def test_two_revisions_of_a_base_model_never_meet(wanted):
    with pytest.raises(AdapterMismatchError, match="revisions"):
        wanted(spec(), [version("a", "1", "main"), version("b", "2", "v2")])


def test_an_unknown_bundle_is_named_with_those_there_are(wanted):
    with pytest.raises(RecordError, match="known: b"):
        find_desired([wanted(spec(), [version("a", "1")])], "other")
