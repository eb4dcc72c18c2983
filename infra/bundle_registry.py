"""Bundles as MLflow shows them to people: scores, verdicts, and which one is live.

A view: the object store holds the truth, and every method can be repeated to repair what MLflow lost. No alias
or tag here is ever read to decide anything.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, TypeVar

from hydraopt.bundle.layout import Manifest
from hydraopt.evaluation.gates import GateReport
from hydraopt.names import check_name
from infra.mlflow_access import (
    ABSENT,
    EXISTS,
    Metric,
    MlflowException,
    Param,
    client,
    despite_races,
    every,
    told_plainly,
)
from infra.settings import Settings

CANDIDATE = "candidate"
"""Alias of the newest merged bundle."""
CHAMPION = "champion"
"""Alias of the live bundle."""
PREVIOUS = "previous"
"""Alias of the one that was live before it."""

_BUNDLE = "bundle_digest"
_REPORT = "gate_report_sha256"
_MOST_PARAMS = 100
_MOST_METRICS = 1000
_Value = TypeVar("_Value")


class BundleRegistry:
    """The bundles of a deployment in MLflow.

    Every method raises ServiceError, within half a minute, if MLflow does not answer or refuses.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._client = client(settings)

    def record_candidate(self, name: str, bundle_id: str, manifest: Manifest, report: GateReport) -> int:
        """Show a judged bundle: a run with its scores, a version of ``bundle.<name>``, the alias candidate.

        Args:
            name: Bundle name.
            bundle_id: Bundle id.
            manifest: Its manifest.
            report: What the gates said.

        Returns:
            MLflow's version number.
        """
        with told_plainly(self._settings, f"showing candidate {bundle_id[:12]} of {name!r}"):
            return despite_races(lambda: self._show_candidate(name, bundle_id, manifest, report))

    def record_release(
        self, name: str, bundle_id: str, version: int, channel: str = "stable", *, before: str | None = None
    ) -> int:
        """Show that a bundle is live, after a release or a rollback alike; safe to repeat.

        On the channel ``stable`` it gets the alias champion, on another one an alias of the channel's name.

        Args:
            name: Bundle name.
            bundle_id: Bundle id.
            version: Its number in the object store, which counts published bundles only.
            channel: Where it is live.
            before: The bundle that was live there before; on ``stable`` it gets the alias previous.

        Returns:
            MLflow's version number, which counts every candidate.
        """
        with told_plainly(self._settings, f"showing release {version} of {name!r}"):
            return despite_races(lambda: self._show_release(name, bundle_id, version, channel, before))

    def shown(self, name: str, channel: str = "stable") -> str | None:
        """The bundle that MLflow shows as live on a channel; None if it shows none."""
        with told_plainly(self._settings, f"looking for what is live of {name!r}"):
            try:
                found = self._client.get_model_version_by_alias(model_name(name), _alias(channel))
            except MlflowException as error:
                if error.error_code in {ABSENT, "INVALID_PARAMETER_VALUE"}:  # no such model; no such alias
                    return None
                raise
        return str(found.tags.get(_BUNDLE, "a version that is no bundle"))

    def _show_candidate(self, name: str, bundle_id: str, manifest: Manifest, report: GateReport) -> int:
        model = model_name(name)
        self._ensure_model(model, f"Bundles of {manifest.base_model.name}.")
        run_id = self._record_run(model, bundle_id, manifest, report)
        version = self._ensure_version(model, name, bundle_id, run_id)
        self._tag(model, version, {"gate": "pass" if report.passed else "fail", _REPORT: report.digest})
        self._point(model, CANDIDATE, version.version)
        return int(version.version)

    def _show_release(self, name: str, bundle_id: str, version: int, channel: str, before: str | None) -> int:
        model = model_name(name)
        self._ensure_model(model, "")
        shown = self._ensure_version(model, name, bundle_id, None)
        self._tag(model, shown, {"release": str(version)})
        wanted = {_alias(channel): int(shown.version)}
        if before is not None and channel == "stable":
            wanted[PREVIOUS] = int(self._ensure_version(model, name, before, None).version)
        there = self._aliases(model)
        for alias, number in wanted.items():
            if there.get(alias) != number:
                self._point(model, alias, number)
        return int(shown.version)

    def _record_run(self, model: str, bundle_id: str, manifest: Manifest, report: GateReport) -> str:
        """The run of a bundle, with the scores of its newest gate report."""
        experiment = self._experiment(model)
        run = self._find_run(experiment, bundle_id)
        if run is None:
            run = self._client.create_run(experiment, run_name=bundle_id[:12], tags={_BUNDLE: bundle_id})
        run_id: str = run.info.run_id
        if run.data.tags.get(_REPORT) != report.digest:
            for batch in _batches(_params(manifest).items(), _MOST_PARAMS):
                self._client.log_batch(run_id, params=[Param(key, value) for key, value in batch])
            now = int(time.time() * 1000)
            for scores in _batches(_metrics(manifest, report).items(), _MOST_METRICS):
                self._client.log_batch(run_id, metrics=[Metric(key, value, now, 0) for key, value in scores])
            self._client.log_text(run_id, _table(report), "gates.md")
            self._client.log_text(run_id, report.canonical().decode(), "gate-report.json")
            self._client.set_terminated(run_id)
            self._client.set_tag(run_id, _REPORT, report.digest)  # last: says that all of the above is there
        return run_id

    def _experiment(self, model: str) -> str:
        """Id of the experiment that holds the runs of a bundle's candidates."""
        try:
            made: str = self._client.create_experiment(model)
        except MlflowException as error:
            if error.error_code != EXISTS:
                raise
            found = self._client.get_experiment_by_name(model)
            if found.lifecycle_stage == "deleted":  # by somebody, in MLflow's pages; its name stays taken
                self._client.restore_experiment(found.experiment_id)
            return str(found.experiment_id)
        return made

    def _find_run(self, experiment: str, bundle_id: str) -> Any | None:
        runs = self._client.search_runs(
            [experiment],
            f"tags.{_BUNDLE} = '{bundle_id}'",
            max_results=1,
            order_by=["attributes.start_time ASC"],
        )
        return runs[0] if runs else None

    def _ensure_model(self, model: str, description: str) -> None:
        try:
            self._client.create_registered_model(model, description=description)
        except MlflowException as error:
            if error.error_code != EXISTS:
                raise

    def _ensure_version(self, model: str, name: str, bundle_id: str, run_id: str | None) -> Any:
        """The version of a bundle: found by its tag; the first one, should two processes have made it at once."""
        versions = every(
            lambda size, token: self._client.search_model_versions(
                f"name = '{model}' and tags.{_BUNDLE} = '{bundle_id}'", max_results=size, page_token=token
            )
        )
        known = min(versions, key=lambda version: int(version.version), default=None)
        if known is not None:
            return known
        source = f"s3://{self._settings.s3_bucket}/bundles/{name}/{bundle_id}/manifest.json"
        return self._client.create_model_version(model, source, run_id=run_id, tags={_BUNDLE: bundle_id})

    def _tag(self, model: str, version: Any, tags: dict[str, str]) -> None:
        for key, value in tags.items():
            if version.tags.get(key) != value:
                self._client.set_model_version_tag(model, version.version, key, value)

    def _aliases(self, model: str) -> dict[str, int]:
        return {
            alias: int(number) for alias, number in self._client.get_registered_model(model).aliases.items()
        }

    def _point(self, model: str, alias: str, number: int | str) -> None:
        self._client.set_registered_model_alias(model, alias, str(number))


def _alias(channel: str) -> str:
    return CHAMPION if channel == "stable" else channel


def model_name(name: str) -> str:
    """Name of the registered model of a bundle, such as ``bundle.assist``."""
    return f"bundle.{check_name(name, 'bundle name')}"


def _params(manifest: Manifest) -> dict[str, str]:
    params = {
        "base_model": manifest.base_model.name,
        "solver": manifest.solver,
        "tasks": str(len(manifest.tasks)),
    }
    params |= {f"recipe.{key}": str(value) for key, value in manifest.recipe.model_dump(mode="json").items()}
    return params | {f"adapter/{task}": digest for task, digest in manifest.adapters.items()}


def _metrics(manifest: Manifest, report: GateReport) -> dict[str, float]:
    """Every number that is one; what could not be measured is left out, the gate table names it."""
    metrics: dict[str, float | None] = {
        "storage_ratio": report.storage_ratio,
        "relative_error": manifest.relative_error,
        "mean_drop_percent": report.mean_drop_percent,
        "passed": float(report.passed),
    }
    for task, entry in manifest.tasks.items():
        metrics[f"relative_error/{task}"] = entry.relative_error
    for task, comparison in report.tasks.items():
        metrics |= {
            f"own/{task}": comparison.own,
            f"merged/{task}": comparison.merged,
            f"drop_percent/{task}": comparison.drop_percent,
        }
    return {key: value for key, value in metrics.items() if value is not None and math.isfinite(value)}


def _table(report: GateReport) -> str:
    """The gates as a Markdown table."""
    rows = ["| gate | of | value | limit | passed | why |", "|---|---|---|---|---|---|"]
    for verdict in report.verdicts:
        value = "not measured" if verdict.value is None else f"{verdict.value:.6g}"
        why = verdict.reason.replace("|", "\\|")
        rows.append(
            f"| {verdict.rule} | {verdict.subject} | {value} | {verdict.limit:.6g} | "
            f"{'yes' if verdict.passed else '**no**'} | {why} |"
        )
    return "\n".join(rows) + "\n"


def _batches(items: Iterable[tuple[str, _Value]], size: int) -> Iterator[list[tuple[str, _Value]]]:
    """``items`` in lists of at most ``size``: MLflow takes no more at once."""
    rest = iter(items)
    while batch := list(islice(rest, size)):
        yield batch
