"""What is wanted: the bundles of this deployment and the adapters each should hold now."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from hydraopt.errors import AdapterMismatchError, RecordError
from hydraopt.recipe import set_fingerprint
from infra.adapter_registry import AdapterRegistry
from infra.adapter_store import AdapterVersion, load_adapter_versions
from infra.object_store import ObjectStore
from infra.pipeline_spec import BundleSpec, desired_specs
from infra.serving_record import copy_serving
from infra.settings import Settings
from tasks.store import object_store
from tasks.verb import verb


class DesiredSet(BaseModel):
    """The adapters a bundle should hold now."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    spec: BundleSpec
    versions: dict[str, AdapterVersion] = Field(description="Serving adapter version by task.")
    waiting_for: tuple[str, ...] = Field(description="Tasks the bundle names that no adapter serves yet.")
    fingerprint: str | None = Field(description="Of the set under its recipe; None while it is incomplete.")


@verb(task_run_name="read what is wanted")
def read_desired(settings: Settings, *, remember: bool = False) -> list[DesiredSet]:
    """Every bundle's desired set: what the registry says serves, in the versions the store holds.

    With ``remember`` what serves is copied to the store, from where a lost registry is brought back.
    """
    serving = AdapterRegistry(settings).serving()
    store = object_store(settings)
    if remember:
        copy_serving(store, serving)
    base_models = sorted({base_model for base_model, _ in serving})
    return [
        _desired(
            store, spec, {task: digest for (base, task), digest in serving.items() if base == spec.base_model}
        )
        for spec in desired_specs(settings.home, base_models)
    ]


def find_desired(sets: list[DesiredSet], bundle: str) -> DesiredSet:
    """The set of one bundle.

    Raises:
        RecordError: If this deployment has no bundle of that name.
    """
    for one in sets:
        if one.spec.name == bundle:
            return one
    known = ", ".join(one.spec.name for one in sets) or "none"
    raise RecordError(
        f"there is no bundle {bundle!r} here (known: {known}): register adapters or describe it"
    )


def _desired(store: ObjectStore, spec: BundleSpec, serving: dict[str, str]) -> DesiredSet:
    """The set of ``spec``, given the serving digest by task of its base model."""
    tasks = sorted(serving) if spec.tasks is None else sorted(spec.tasks)
    versions = load_adapter_versions(
        store, spec.base_model, {task: serving[task] for task in tasks if task in serving}
    )
    waiting_for = tuple(task for task in tasks if task not in serving)
    complete = bool(versions) and not waiting_for
    return DesiredSet(
        spec=spec,
        versions=versions,
        waiting_for=waiting_for,
        fingerprint=_fingerprint(spec, versions) if complete else None,
    )


def _fingerprint(spec: BundleSpec, versions: dict[str, AdapterVersion]) -> str:
    revisions = {version.revision for version in versions.values()}
    if len(revisions) != 1:
        named = {task: version.revision for task, version in versions.items()}
        raise AdapterMismatchError(
            f"the adapters of bundle {spec.name!r} name different revisions of {spec.base_model!r}: {named}; "
            "train them on one"
        )
    digests = {task: version.digest for task, version in versions.items()}
    return set_fingerprint(
        spec.base_model, revisions.pop(), digests, spec.recipe, keep_shared=spec.keep_shared
    )
