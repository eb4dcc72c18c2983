"""Which adapter serves each task, as MLflow's registry shows it.

One registered model per base model and task; each adapter version is a version of it, known by the digest in its
tags; the alias ``serving`` says which one belongs to the adapter set.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from hydraopt.errors import RecordError
from hydraopt.names import check_task_name, slug
from infra.adapter_store import AdapterVersion
from infra.mlflow_access import ABSENT, EXISTS, MlflowException, client, despite_races, every, told_plainly
from infra.records import check_digest
from infra.settings import Settings

SERVING = "serving"
"""The alias of the version that is in the set."""

_PREFIX = "adapter."
_LONGEST_SLUG = 120  # of the 256 characters MLflow allows for the whole name
_READS = 8  # versions asked for at the same time


class AdapterRegistry:
    """The adapters of a deployment in MLflow.

    Every method raises ServiceError, within half a minute, if MLflow does not answer or refuses.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._client = client(settings)

    def register(self, version: AdapterVersion, source_uri: str, *, serve: bool = True) -> int:
        """Show ``version`` in MLflow and make it the serving one of its task; safe to repeat.

        Args:
            version: The adapter version, already in the object store.
            source_uri: Where its record is, such as ``s3://bucket/adapters/...``.
            serve: Whether it becomes the serving one.

        Returns:
            MLflow's version number.

        Raises:
            RecordError: If another base model and task already go by the same name.
        """
        with told_plainly(self._settings, f"registering adapter {version.task!r}"):
            return despite_races(lambda: self._register(version, source_uri, serve=serve))

    def serving(self, base_model: str | None = None) -> dict[tuple[str, str], str]:
        """The adapter set: digest of the serving version by (base model, task).

        Args:
            base_model: Only this one's; None: all.

        Raises:
            RecordError: If the alias points to a version without a digest: it was not made by us.
        """
        with told_plainly(self._settings, "reading the serving adapters"), ThreadPoolExecutor(_READS) as pool:
            models = [
                model
                for model in self._models()
                if SERVING in model.aliases and base_model in {None, model.tags["base_model"]}
            ]
            digests = pool.map(self._listed_digest, models)
            return {
                (model.tags["base_model"], model.tags["task"]): digest
                for model, digest in zip(models, digests, strict=True)
                if digest is not None
            }

    def owner(self, name: str) -> tuple[str, str] | None:
        """Base model and task of a registered model; None if it holds no adapters of ours, or is not there."""
        if not name.startswith(_PREFIX):
            return None
        with told_plainly(self._settings, f"reading the registered model {name!r}"):
            try:
                tags = self._client.get_registered_model(name).tags
            except MlflowException as error:
                if error.error_code == ABSENT:
                    return None
                raise
        return (tags["base_model"], tags["task"]) if {"base_model", "task"} <= tags.keys() else None

    def base_models(self) -> list[str]:
        """Names of the base models that have a serving adapter, sorted."""
        with told_plainly(self._settings, "reading the base models"):
            return sorted({model.tags["base_model"] for model in self._models() if SERVING in model.aliases})

    def set_serving(self, base_model: str, task: str, digest: str) -> int:
        """Make a version registered before the serving one again; returns MLflow's version number.

        Raises:
            RecordError: If that version was never registered.
        """
        name = model_name(base_model, task)
        check_digest(digest, "adapter digest")
        with told_plainly(self._settings, f"choosing the serving adapter of {task!r}"):
            known = self._find(name, digest)
            if known is None:
                raise RecordError(
                    f"no adapter {digest} of task {task!r} for {base_model!r} is registered: ingest it"
                )
            despite_races(lambda: self._client.set_registered_model_alias(name, SERVING, known.version))
        return int(known.version)

    def remove(self, base_model: str, task: str) -> bool:
        """Take a task out of the set; its versions stay. Returns whether it was in."""
        name = model_name(base_model, task)
        with told_plainly(self._settings, f"removing adapter {task!r} from the set"):
            if self._serving_digest(name) is None:
                return False
            self._client.delete_registered_model_alias(name, SERVING)
        return True

    def _register(self, version: AdapterVersion, source_uri: str, *, serve: bool) -> int:
        name, tags = model_name(version.base_model, version.task), _tags(version)
        self._ensure_model(name, version.base_model, version.task)
        known = self._find(name, version.digest)
        if known is None:
            known = self._client.create_model_version(
                name, source_uri, tags=tags, description=_describe(version)
            )
        for key, value in tags.items():  # it may have been measured again since
            if known.tags.get(key) != value:
                self._client.set_model_version_tag(name, known.version, key, value)
        if serve:
            self._client.set_registered_model_alias(name, SERVING, known.version)
        return int(known.version)

    def _models(self) -> Iterator[Any]:
        """Our registered models; what others put into the same MLflow is not looked at."""
        for model in every(
            lambda size, token: self._client.search_registered_models(
                filter_string=f"name LIKE '{_PREFIX}%'",
                max_results=size,
                order_by=["name ASC"],
                page_token=token,
            )
        ):
            if "base_model" in model.tags and "task" in model.tags:
                yield model

    def _ensure_model(self, name: str, base_model: str, task: str) -> None:
        tags = {"base_model": base_model, "task": task}
        try:
            self._client.create_registered_model(
                name, tags=tags, description=f"Adapters of {base_model} for {task}."
            )
        except MlflowException as error:
            if error.error_code != EXISTS:
                raise
            found = self._client.get_registered_model(name).tags
            # "llama-3" with task "1.chat" and "llama-3.1" with "chat" would share a name.
            if {key: found.get(key) for key in tags} != tags:
                raise RecordError(
                    f"registered model {name!r} belongs to task {found.get('task')!r} of "
                    f"{found.get('base_model')!r}, not to {task!r} of {base_model!r}: rename the task"
                ) from None

    def _find(self, name: str, digest: str) -> Any | None:
        """The version with this digest; the first one, should two processes have registered it at once."""
        versions = every(
            lambda size, token: self._client.search_model_versions(
                f"name = '{name}' and tags.digest = '{digest}'", max_results=size, page_token=token
            )
        )
        return min(versions, key=lambda version: int(version.version), default=None)

    def _listed_digest(self, model: Any) -> str | None:
        """Digest of a listed model's serving version; None if there is none (any more)."""
        for version in model.latest_versions:
            # Nearly always the one: a request for each of a thousand adapters would take most of a minute.
            if int(version.version) == int(model.aliases[SERVING]):
                return _digest(model.name, version)
        return self._serving_digest(model.name)

    def _serving_digest(self, name: str) -> str | None:
        """Digest of the serving version; None if there is none (any more)."""
        try:
            version = self._client.get_model_version_by_alias(name, SERVING)
        except MlflowException as error:
            # Alias gone or model gone: between listing and looking, anybody may have removed it.
            if error.error_code in {ABSENT, "INVALID_PARAMETER_VALUE"}:
                return None
            raise
        return _digest(name, version)


def model_name(base_model: str, task: str) -> str:
    """Name of the registered model of a task, such as ``adapter.org-model.chat``."""
    base = slug(base_model)
    if len(base) > _LONGEST_SLUG:
        base = f"{base[:_LONGEST_SLUG]}-{hashlib.sha256(base_model.encode()).hexdigest()[:12]}"
    return f"{_PREFIX}{base}.{check_task_name(task)}"


def _digest(name: str, version: Any) -> str:
    """What a serving version of MLflow's says it is."""
    if "digest" not in version.tags:
        raise RecordError(
            f"alias {SERVING!r} of {name!r} points to version {version.version}, which hydraopt did not "
            "register: move the alias back, or ingest the adapter"
        )
    return str(version.tags["digest"])


def _tags(version: AdapterVersion) -> dict[str, str]:
    tags = {
        "digest": version.digest,
        "base_model": version.base_model,
        "revision": version.revision or "",
        "task": version.task,
        "source": version.source,
        "reference_bytes": str(version.reference_bytes),
        "training_key": version.training_key or "",
    }
    for key in ("metric", "value", "low", "high", "samples"):
        if version.own_evaluation and key in version.own_evaluation:
            tags[f"evaluation.{key}"] = str(version.own_evaluation[key])
    return tags


def _describe(version: AdapterVersion) -> str:
    own = version.own_evaluation
    score = f"{own.get('metric')} {own.get('value')} on {own.get('samples')} rows" if own else "not measured"
    return f"Adapter {version.digest[:12]} for {version.task} on {version.base_model}: {score}."
